//! The sources of a flag's value, in ascending precedence: default, `--config` file, environment, command line.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgMatches, Command};

use crate::refusal::Refusal;

/// The prefix of environment variables, before a flag's name in upper case.
pub(crate) const PREFIX: &str = "SELVEDGE_";
/// The flag that sets the file.
const FILE: &str = "config";

/// A value from the environment or the file, and its place for error messages.
struct Layered {
    value: String,
    origin: String,
}

/// A flag's value in the file, and its line numbers, counted from 1.
struct Written {
    value: String,
    lines: Vec<usize>,
}

impl Written {
    fn place(&self) -> String {
        /// Most line numbers in a message.
        const SHOWN: usize = 8;
        let shown = self.lines.iter().take(SHOWN);
        let shown: Vec<_> = shown.map(usize::to_string).collect();
        let shown = shown.join(", ");
        match self.lines.len() {
            1 => format!("line {shown}"),
            2..=SHOWN => format!("lines {shown}"),
            all => format!("lines {shown} and {} more", all - SHOWN),
        }
    }
}

/// Parses the arguments of `command`; its subcommands' flags may also be set in the environment and in
/// the file of `--config`.
///
/// The inner error holds the output of `--help` and `--version`.
pub fn parse(
    command: Command,
    args: &[OsString],
    environment: &BTreeMap<String, String>,
) -> Result<Result<ArgMatches, clap::Error>, Refusal> {
    let path = config_file(args, environment);
    let file = match &path {
        Some(path) => read_file(Path::new(path), &command)?,
        None => BTreeMap::new(),
    };
    let mut layers = BTreeMap::new();
    let names = flag_names(&command);
    for name in &names {
        let variable = format!("{PREFIX}{}", name.to_ascii_uppercase().replace('-', "_"));
        let from_environment = environment
            .get(&variable)
            .filter(|value| !is_service_link(value))
            .map(|value| Layered {
                value: value.clone(),
                origin: variable.clone(),
            });
        let layer = from_environment.or_else(|| {
            let line = file.get(name)?;
            let path = path.as_deref().unwrap_or_default().display();
            Some(Layered {
                value: line.value.clone(),
                origin: format!("{} of {path}: {name}", line.place()),
            })
        });
        if let Some(layer) = layer {
            layers.insert(name.clone(), layer);
        }
    }

    let command = with_defaults(command, &layers);
    match command.try_get_matches_from(args) {
        Ok(matches) => Ok(Ok(matches)),
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
            ) =>
        {
            Ok(Err(error))
        }
        Err(error) => Err(Refusal::usage(blame(&error, args, &layers))),
    }
}

/// clap's error in one sentence.
pub fn sentence(error: &clap::Error) -> String {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    if (error.kind() == ErrorKind::ValueValidation || error.kind() == ErrorKind::InvalidValue)
        && let (Some(flag), Some(value)) = (
            context(ContextKind::InvalidArg),
            context(ContextKind::InvalidValue),
        )
    {
        let flag = flag.split([' ', '=', '[']).next().unwrap_or(flag);
        if value.is_empty() {
            return format!("{flag} needs a value");
        }
        let value = crate::text::quote(value);
        if let Some(reason) = std::error::Error::source(error) {
            return format!("{flag} \"{value}\": {reason}");
        }
        if let Some(ContextValue::Strings(valid)) = error.get(ContextKind::ValidValue) {
            return format!(
                "{flag} \"{value}\": unknown; possible values are: {}",
                valid.join(", ")
            );
        }
    }
    let text = error.render().to_string();
    let text = text
        .trim_start_matches("error: ")
        .lines()
        .take_while(|line| !line.trim().is_empty())
        .map(str::trim)
        .collect::<Vec<_>>()
        .join(" ");
    match suggestion(error) {
        Some(suggestion) => format!("{text}: did you mean {suggestion}?"),
        None => text,
    }
}

/// clap's suggestion for a mistyped flag or command.
fn suggestion(error: &clap::Error) -> Option<&str> {
    [ContextKind::SuggestedArg, ContextKind::SuggestedSubcommand]
        .into_iter()
        .find_map(|kind| {
            let found = error.get(kind)?;
            if let ContextValue::Strings(texts) = found {
                texts.first().map(String::as_str)
            } else if let ContextValue::String(text) = found {
                Some(text.as_str())
            } else {
                None
            }
        })
}

/// Replaces the flag's name by the variable or the file's line, if the value comes from there.
fn blame(error: &clap::Error, args: &[OsString], layers: &BTreeMap<String, Layered>) -> String {
    let sentence = sentence(error);
    let named = sentence
        .strip_prefix("--")
        .map(|rest| rest.split(' ').next().unwrap_or(rest));
    let Some((name, layer)) = named.and_then(|name| layers.get_key_value(name)) else {
        return sentence;
    };
    let on_command_line = args
        .iter()
        .filter_map(|arg| arg.to_str()?.strip_prefix("--"))
        .any(|arg| {
            arg == name
                || arg
                    .strip_prefix(name)
                    .is_some_and(|rest| rest.starts_with('='))
        });
    if on_command_line {
        return sentence;
    }
    sentence.replacen(&format!("--{name}"), &layer.origin, 1)
}

/// Whether a variable comes from a Service called `selvedge` in the pod's namespace, which sets
/// `SELVEDGE_PORT=tcp://10.43.0.7:1107` and the like. Such a value is not a flag's.
fn is_service_link(value: &str) -> bool {
    ["tcp://", "udp://", "sctp://"]
        .iter()
        .any(|scheme| value.starts_with(scheme))
}

fn config_file(args: &[OsString], environment: &BTreeMap<String, String>) -> Option<OsString> {
    let mut args = args.iter();
    let mut found = None;
    while let Some(arg) = args.next() {
        let Some(text) = arg.to_str() else { continue };
        if text == "--" {
            break;
        }
        if text == "--config" {
            found = args.next().cloned();
        } else if let Some(path) = text.strip_prefix("--config=") {
            found = Some(path.into());
        }
    }
    found
        .or_else(|| environment.get("SELVEDGE_CONFIG").map(OsString::from))
        .filter(|path| !path.is_empty())
}

/// Reads lines of `name: value` or `name=value`; a repeated name adds to the list.
fn read_file(path: &Path, command: &Command) -> Result<BTreeMap<String, Written>, Refusal> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).map_err(|error| {
        Refusal::configuration(format!("cannot read --config {shown}: {error}"))
    })?;
    let known = flag_names(command);
    let mut values = BTreeMap::<String, Written>::new();
    for (number, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
        let line = line.split(" #").next().unwrap_or(line).trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let wrong =
            |what: &str| Refusal::configuration(format!("line {} of {shown} {what}", number + 1));
        let at = line
            .find([':', '='])
            .ok_or_else(|| wrong("is not of the form name: value"))?;
        let name = line[..at].trim().trim_start_matches('-');
        let value = line[at + 1..].trim().trim_matches(['"', '\'']);
        if name == FILE || !known.iter().any(|known| known == name) {
            return Err(wrong(&format!(
                "names no flag: \"{}\"",
                crate::text::quote(name)
            )));
        }
        values
            .entry(name.to_owned())
            .and_modify(|list| {
                list.value.push(',');
                list.value.push_str(value);
                list.lines.push(number + 1);
            })
            .or_insert_with(|| Written {
                value: value.to_owned(),
                lines: vec![number + 1],
            });
    }
    Ok(values)
}

/// Every long flag of the command and its subcommands.
fn flag_names(command: &Command) -> Vec<String> {
    let mut names = command
        .get_arguments()
        .filter_map(Arg::get_long)
        .filter(|name| !matches!(*name, "help" | "version"))
        .map(str::to_owned)
        .collect::<Vec<_>>();
    names.extend(command.get_subcommands().flat_map(flag_names));
    names.sort();
    names.dedup();
    names
}

fn with_defaults(command: Command, layers: &BTreeMap<String, Layered>) -> Command {
    let command = command.mut_args(|arg| {
        let Some(layer) = arg.get_long().and_then(|name| layers.get(name)) else {
            return arg;
        };
        // clap needs defaults with the lifetime of the program.
        let value: &'static str = layer.value.clone().leak();
        arg.default_value(OsStr::new(value))
    });
    command.mut_subcommands(|command| with_defaults(command, layers))
}

#[cfg(test)]
mod tests {
    use clap::Args as _;

    use super::*;
    use crate::config::{Config, Encapsulation, Flags};

    fn config(args: &[&str], environment: &[(&str, &str)]) -> Result<Config, Refusal> {
        let command = Flags::augment_args(Command::new("agent").args_override_self(true));
        let args = ["agent"]
            .iter()
            .chain(args)
            .map(OsString::from)
            .collect::<Vec<_>>();
        let environment = environment
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let matches =
            parse(command, &args, &environment)?.map_err(|_| Refusal::usage("help was shown"))?;
        let flags = clap::FromArgMatches::from_arg_matches(&matches)
            .map_err(|error| Refusal::usage(sentence(&error)))?;
        Config::new(flags)
    }

    fn refusal(args: &[&str]) -> String {
        config(args, &[])
            .expect_err("bad flags are refused")
            .sentence
    }

    #[test]
    fn the_command_line_of_a_kilo_daemonset_is_accepted_unchanged() {
        let config = config(
            &[
                "--kubeconfig=/etc/kubernetes/kubeconfig",
                "--hostname=node-agent-01",
                "--cni=false",
                "--compatibility=flannel",
                "--local=false",
                "--encapsulate=crosssubnet",
                "--internal-cidr=192.168.50.11/32",
            ],
            &[],
        )
        .unwrap();

        assert_eq!(config.node.0, "node-agent-01");
        assert_eq!(config.encapsulation, Encapsulation::CrossSubnet);
        assert_eq!(config.port, 51820);
        assert_eq!(config.interface, "kilo0");
        assert_eq!(config.subnets, ["10.4.0.0/16".parse().unwrap()]);
        assert_eq!(
            config.notes,
            ["--local has no effect: inside a region flannel does the routing"]
        );
    }

    #[test]
    fn the_command_line_wins_over_the_environment_and_that_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("selvedge.conf");
        std::fs::write(
            &file,
            "# ours\nport: 1001\n--mtu = 1300\nhostname: n1\nservice-cidr: 10.43.0.0/16 # k3s\nservice-cidr: fd43::/112\n",
        )
        .unwrap();
        let file = format!("--config={}", file.display());
        let environment = [("SELVEDGE_PORT", "1002"), ("SELVEDGE_INTERFACE", "kilo1")];

        let config = config(&[&file, "--interface", "kilo2"], &environment).unwrap();

        assert_eq!(config.port, 1002);
        assert_eq!(config.interface, "kilo2");
        assert_eq!(config.mtu, crate::config::Mtu::Bytes(1300));
        assert_eq!(config.service_cidrs.len(), 2);
    }

    #[test]
    fn a_service_called_selvedge_does_not_change_the_port() {
        let environment = [("SELVEDGE_PORT", "tcp://10.43.0.7:1107")];
        assert_eq!(config(&["--hostname=a"], &environment).unwrap().port, 51820);
    }

    #[test]
    fn the_last_of_repeated_flags_counts_and_lists_add_up() {
        let args = [
            "--hostname=a",
            "--port=1",
            "--port=2",
            "--service-cidr=10.43.0.0/16,10.44.0.0/16",
            "--service-cidr=10.45.0.0/16",
        ];
        let config = config(&args, &[]).unwrap();
        assert_eq!(config.port, 2);
        assert_eq!(config.service_cidrs.len(), 3);
    }

    #[test]
    fn bad_values_are_refused_with_the_flag_and_valid_values() {
        for (args, expected) in [
            (
                &["--encapsulate=x"][..],
                "--encapsulate \"x\": unknown; possible values are: never, crosssubnet, always",
            ),
            (
                &["--mesh-granularity=x"],
                "--mesh-granularity \"x\": unknown; possible values are: location, full, cross",
            ),
            (
                &["--compatibility=flanel"],
                "--compatibility \"flanel\": unknown; the only possible value is: flannel",
            ),
            (
                &["--backend=etcd"],
                "--backend \"etcd\": unknown; possible values are: kubernetes",
            ),
            (
                &["--port=0"],
                "--port \"0\": must be a port in the range 1 to 65535",
            ),
            (&["--cni=yes"], "--cni \"yes\": must be true or false"),
            (
                &["--mtu=abc"],
                "--mtu \"abc\": must be auto or a number of bytes in the range 576 to 65455",
            ),
            (
                &["--subnet=10.4.0.0"],
                "--subnet \"10.4.0.0\": \"10.4.0.0\" is not a CIDR such as 10.43.0.0/16",
            ),
            (
                &["--log-level=loud"],
                "--log-level \"loud\": unknown; possible values are: all, debug, info, warn, error, none",
            ),
            (&["--nosuch"], "unexpected argument '--nosuch' found"),
            (
                &["--hostname=a", "--subnet=10.4.0.0/31"],
                "--subnet \"10.4.0.0/31\": is too small: it must hold an address for each region",
            ),
            (
                &["--hostname=a", "--service-cidr=10.4.1.0/24"],
                "--subnet 10.4.0.0/16 overlaps --service-cidr 10.4.1.0/24: choose a pool that nothing else uses",
            ),
            (
                &["--alias-cidr=203.0.113.0/24"],
                "--alias-cidr \"203.0.113.0/24\": must be a private network, of RFC 1918, RFC 6598 or RFC 4193",
            ),
            (
                &["--hostname=a", "--alias-cidr=10.4.9.0/24"],
                "--alias-cidr 10.4.9.0/24 overlaps --subnet 10.4.0.0/16: choose a pool that nothing else uses",
            ),
            (
                &[
                    "--hostname=a",
                    "--alias-cidr=10.7.0.0/24",
                    "--region-cidr=nd=10.7.0.0/16",
                ],
                "--alias-cidr 10.7.0.0/24 overlaps --region-cidr 10.7.0.0/16: choose a pool that nothing else uses",
            ),
            (
                &["--hostname=a", "--master=10.0.0.1"],
                "--master \"10.0.0.1\": must be a URL such as https://10.0.0.1:6443",
            ),
            (
                &["--topology-label=the region"],
                "--topology-label \"the region\": must be the key of a Node label, such as topology.kubernetes.io/region",
            ),
            (
                &["--subnet=169.254.0.0/16"],
                "--subnet \"169.254.0.0/16\": is not a network of unicast addresses",
            ),
            (
                &["--subnet=10.4.0.0/16,10.5.0.0/16"],
                "--subnet \"10.4.0.0/16,10.5.0.0/16\": must be one CIDR, or one of each family separated by a comma",
            ),
            (
                &["--interface=a/b"],
                "--interface \"a/b\": must be a link name of 1 to 15 letters, digits, dots or dashes",
            ),
            (
                &["--listen=1107"],
                "--listen \"1107\": must be ADDRESS:PORT, such as 127.0.0.1:1107, or :PORT",
            ),
            (
                &["--config=/nonexistent"],
                "cannot read --config /nonexistent: No such file or directory (os error 2)",
            ),
        ] {
            assert_eq!(refusal(args), expected, "{args:?}");
        }
    }

    #[test]
    fn an_error_names_the_source_of_the_bad_value() {
        let error = config(&[], &[("SELVEDGE_MTU", "x")]).unwrap_err();
        assert!(
            error
                .sentence
                .starts_with("SELVEDGE_MTU \"x\": must be auto"),
            "{error}"
        );
    }

    #[test]
    fn an_error_names_the_lines_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c");
        let told = |text: &str, args: &[&str]| {
            std::fs::write(&file, text).unwrap();
            let path = ["--config", file.to_str().unwrap()];
            config(&[&path, args].concat(), &[]).map_err(|error| error.sentence)
        };
        let shown = file.display();

        assert_eq!(
            told("# ours\n\nmtu: x\n", &[]).unwrap_err(),
            format!(
                "line 3 of {shown}: mtu \"x\": must be auto or a number of bytes in the range 576 to 65455"
            )
        );
        // A list may take several lines of the file.
        assert_eq!(
            told(
                "service-cidr: 10.43.0.0/16\nport: 1\nservice-cidr: y\n",
                &[]
            )
            .unwrap_err(),
            format!(
                "lines 1, 3 of {shown}: service-cidr \"10.43.0.0/16,y\": \"y\" is not a CIDR such as 10.43.0.0/16"
            )
        );
        let error = told(&"port: 1\n".repeat(100), &[]).unwrap_err();
        let place = format!("lines 1, 2, 3, 4, 5, 6, 7, 8 and 92 more of {shown}: port ");
        assert!(error.starts_with(&place), "{error}");
        // An error in a flag does not name the overridden line of the file, and the reverse.
        assert!(told("mtu: x\n", &["--mtu=1300", "--hostname=a"]).is_ok());
        let error = told("mtu: 1300\n", &["--mtu=y"]).unwrap_err();
        assert!(error.starts_with("--mtu \"y\""), "{error}");
    }

    #[test]
    fn a_line_without_a_known_flag_is_named_in_the_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c");
        for (text, expected) in [
            ("port 1\n", "line 1 of"),
            ("\nprot: 1\n", "line 2 of"),
            ("config: x\n", "line 1 of"),
        ] {
            std::fs::write(&file, text).unwrap();
            let error = config(&["--config", file.to_str().unwrap()], &[]).unwrap_err();
            assert!(error.sentence.starts_with(expected), "{error}");
            assert_eq!(error.code, crate::refusal::CONFIGURATION);
        }
    }
}
