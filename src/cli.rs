//! The command line: runs the subcommand and returns its exit code.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use clap::{ArgMatches, Command, FromArgMatches};

use crate::config::{self, Config, Flags};
use crate::refusal::{self, Refusal};
use crate::status;
use crate::text;

/// Runs the command in the arguments; an error gives one sentence on stderr.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    // Keys are in this process's memory: forbid core files, and ptrace by users other than root. No kernel
    // in use refuses this call.
    let _ = nix::sys::prctl::set_dumpable(false);
    let args = args.into_iter().collect::<Vec<_>>();
    match run(args) {
        Ok(code) => code,
        Err(error) => {
            let sentence = format!("{error:#}");
            let _ = writeln!(std::io::stderr(), "selvedge: {}", text::lines(&sentence));
            ExitCode::from(refusal::exit_code(&error))
        }
    }
}

fn run(args: Vec<OsString>) -> anyhow::Result<ExitCode> {
    let environment = environment(std::env::vars_os())?;
    let matches = match config::parse(command(), &with_subcommand(args), &environment)? {
        Ok(matches) => matches,
        Err(asked_for) => {
            // A reader may close the pipe early.
            let _ = write!(std::io::stdout(), "{}", asked_for.render());
            return Ok(ExitCode::SUCCESS);
        }
    };

    let Some((name, matches)) = matches.subcommand() else {
        return Err(Refusal::usage("no command given; see selvedge --help").into());
    };
    match name {
        "agent" => crate::agent::run(agent_config(matches)?),
        "status" => status::run(arguments(matches)?),
        "rotate-key" => status::run_rotate_key(arguments(matches)?),
        "cleanup" => crate::agent::cleanup::run(&agent_config(matches)?),
        "doctor" => crate::doctor::run(arguments(matches)?),
        "connect" => crate::connect::run(&arguments(matches)?),
        "graph" => crate::graph::run(&arguments(matches)?),
        "showconf" => crate::showconf::run(&arguments(matches)?),
        "guard" => crate::guard::run(&arguments(matches)?),
        "tunnel" => crate::tunnel::run(&arguments(matches)?),
        other => unreachable!("clap knows no command {other}"),
    }
}

/// The variables that may hold a flag's value. Other variables need not be valid UTF-8.
fn environment(
    variables: impl Iterator<Item = (OsString, OsString)>,
) -> Result<BTreeMap<String, String>, Refusal> {
    let ours = variables.filter_map(|(name, value)| {
        let name = name.into_string().ok()?;
        name.starts_with(config::PREFIX).then_some((name, value))
    });
    ours.map(|(name, value)| match value.into_string() {
        Ok(value) => Ok((name, value)),
        Err(_) => Err(Refusal::usage(format!("{name} is not text in UTF-8"))),
    })
    .collect()
}

fn agent_config(matches: &ArgMatches) -> Result<Config, Refusal> {
    Config::new(arguments::<Flags>(matches)?)
}

fn arguments<T: FromArgMatches>(matches: &ArgMatches) -> Result<T, Refusal> {
    T::from_arg_matches(matches).map_err(|error| Refusal::usage(config::sentence(&error)))
}

/// The text below the help of commands with the agent's flags.
const LAYERS: &str = "Each flag is also read from the environment (SELVEDGE_LOG_LEVEL for --log-level) \
and from the file of --config (lines such as log-level: debug). A flag wins over the environment, \
and the environment over the file.";

fn command() -> Command {
    let agents_flags = |name, about| subcommand::<Flags>(name, about).after_help(LAYERS);
    Command::new("selvedge")
        .about("Joins the regions of a flannel cluster through WireGuard tunnels between leaders")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .args_override_self(true)
        .infer_long_args(false)
        .subcommand(agents_flags("agent", "Run this node's part of the mesh"))
        .subcommand(agents_flags(
            "cleanup",
            "Remove everything that the agent installed on this node, except its key",
        ))
        .subcommand(agents_flags(
            "doctor",
            "Find problems of this node's mesh, with remedies",
        ))
        .subcommand(subcommand::<status::Args>(
            "status",
            "Show the state of this node's agent",
        ))
        .subcommand(subcommand::<status::RotateKeyArgs>(
            "rotate-key",
            "Replace this node's WireGuard key without interrupting traffic",
        ))
        .subcommand(subcommand::<crate::connect::Args>(
            "connect",
            "Make this host an external peer of the mesh",
        ))
        .subcommand(subcommand::<crate::graph::Args>("graph", "Draw the mesh"))
        .subcommand(subcommand::<crate::showconf::Args>(
            "showconf",
            "Show the WireGuard configuration of a node or peer",
        ))
        .subcommand(subcommand::<crate::guard::Args>(
            "guard",
            "Refuse traffic for other regions until the agent runs",
        ))
        .subcommand(subcommand::<crate::tunnel::Args>(
            "tunnel",
            "Run a plain WireGuard device, configured with wg",
        ))
}

/// A command with the arguments of `T`, without `T`'s doc comment in the help.
fn subcommand<T: clap::Args>(name: &'static str, about: &'static str) -> Command {
    T::augment_args(Command::new(name))
        .about(about)
        .long_about(None)
}

/// Flags without a command are the agent's, as with Kilo's `kg`, so that the image can be replaced
/// without a change of its arguments. `kubectl selvedge …` calls the program `kubectl-selvedge`. With this
/// name, or `kgctl`, flags may stand before the command.
fn with_subcommand(mut args: Vec<OsString>) -> Vec<OsString> {
    let program = args
        .first()
        .and_then(|program| Path::new(program).file_name())
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    if matches!(program, "kgctl" | "kubectl-selvedge") {
        let flags = leading_flags(&args[1..]);
        if let Some(to_command) = args.get_mut(1..=flags + 1) {
            to_command.rotate_right(1);
        }
        return args;
    }
    let named_kg = program == "kg";
    let first = args.get(1).and_then(|arg| arg.to_str()).unwrap_or_default();
    let starts_with_flag =
        first.starts_with('-') && !matches!(first, "-h" | "--help" | "-V" | "--version");
    if starts_with_flag || (named_kg && args.len() == 1) {
        args.insert(1, "agent".into());
    }
    args
}

/// The number of leading arguments that are flags or their values.
fn leading_flags(args: &[OsString]) -> usize {
    let mut count = 0;
    while let Some(flag) = args.get(count).and_then(|arg| arg.to_str()) {
        if !flag.starts_with("--") || matches!(flag, "--" | "--help" | "--version") {
            break;
        }
        count += if flag.contains('=') { 1 } else { 2 };
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kgctl_accepts_flags_before_the_command() {
        let sorted = |args: &[&str]| {
            let args = args.iter().map(OsString::from).collect::<Vec<_>>();
            let args = with_subcommand(args).into_iter();
            args.map(|arg| arg.into_string().unwrap())
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(
            sorted(&[
                "kgctl",
                "--kubeconfig",
                "x",
                "--port=1",
                "showconf",
                "node",
                "n"
            ]),
            "kgctl showconf --kubeconfig x --port=1 node n"
        );
        assert_eq!(
            sorted(&["/bin/kubectl-selvedge", "graph", "-f", "svg"]),
            "/bin/kubectl-selvedge graph -f svg"
        );
        for args in [
            &["kgctl"][..],
            &["kgctl", "--version"],
            &["kgctl", "--kubeconfig"],
            &["kgctl", "--kubeconfig", "x"],
        ] {
            assert_eq!(sorted(args), args.join(" "));
        }
    }

    #[test]
    fn a_flag_in_a_variable_must_be_utf_8() {
        use std::os::unix::ffi::OsStringExt as _;
        let variable = |name: &str, value: &[u8]| {
            environment([(name.into(), OsString::from_vec(value.to_vec()))].into_iter())
        };
        assert_eq!(
            variable("SELVEDGE_MTU", b"1300").unwrap()["SELVEDGE_MTU"],
            "1300"
        );
        assert_eq!(
            variable("SELVEDGE_MTU", b"\xff").unwrap_err().sentence,
            "SELVEDGE_MTU is not text in UTF-8"
        );
        assert!(variable("LESS", b"\xff").unwrap().is_empty());
    }

    #[test]
    fn flags_without_a_command_are_the_agents() {
        let args = |args: &[&str]| args.iter().map(OsString::from).collect::<Vec<_>>();
        assert_eq!(
            with_subcommand(args(&["kg", "--cni=false"])),
            args(&["kg", "agent", "--cni=false"])
        );
        assert_eq!(
            with_subcommand(args(&["/opt/bin/kg"])),
            args(&["/opt/bin/kg", "agent"])
        );
        assert_eq!(
            with_subcommand(args(&["selvedge", "--help"])),
            args(&["selvedge", "--help"])
        );
        assert_eq!(with_subcommand(args(&["selvedge"])), args(&["selvedge"]));
    }

    #[test]
    fn every_command_is_well_formed() {
        command().debug_assert();
    }
}
