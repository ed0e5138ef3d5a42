//! Every flag of Kilo's `kg` and `kgctl`: the name, the default, what it means here; each form and each
//! place in which a value may stand, and a bad value refused in one sentence that names that place.
//!
//! The tables are Kilo's own, written down from its documentation and its behaviour, not from ours.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests run the program and fail by panicking"
)]

use std::collections::BTreeMap;
use std::process::{Command, Output};

use selvedge::config::Config;

/// What became of a flag.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Here {
    /// Same name, default and meaning.
    Same,
    /// Same name and meaning; another default, or more values.
    Better(&'static str),
    /// Accepted; one log line where the given value asks for what does not happen here.
    NoMeaning,
}
use Here::{Better, NoMeaning, Same};

/// A flag of `kg`'s.
struct Flag {
    name: &'static str,
    /// Kilo's default; empty where there is none, or where the machine decides.
    default: &'static str,
    here: Here,
    good: &'static str,
    /// Values that are refused; none where every text may be one.
    bad: &'static [&'static str],
}

const fn flag(
    name: &'static str,
    default: &'static str,
    here: Here,
    good: &'static str,
    bad: &'static [&'static str],
) -> Flag {
    Flag {
        name,
        default,
        here,
        good,
        bad,
    }
}

const KG: [Flag; 27] = [
    flag("backend", "kubernetes", Same, "kubernetes", &["etcd", ""]),
    // A restart of the agent leaves the data plane alone.
    flag("clean-up", "true", Better(""), "false", &["yes"]),
    flag("clean-up-interface", "false", Same, "true", &["maybe"]),
    flag("cni", "true", NoMeaning, "true", &["on"]),
    flag(
        "cni-path",
        "/etc/cni/net.d/10-kilo.conflist",
        NoMeaning,
        "/etc/cni/net.d/10-kilo.conflist",
        &[],
    ),
    // Kilo takes any other value for its own CNI mode.
    flag(
        "compatibility",
        "",
        Better("flannel"),
        "flannel",
        &["flanel", "cilium"],
    ),
    flag("create-interface", "true", NoMeaning, "false", &["2"]),
    flag(
        "encapsulate",
        "always",
        Same,
        "crosssubnet",
        &["sometimes", ""],
    ),
    flag("hostname", "", Same, "node-agent-01", &["", "Node", "a_b"]),
    flag(
        "interface",
        "kilo0",
        Same,
        "kilo1",
        &["", "a/b", "sixteen-letters-"],
    ),
    flag(
        "internal-cidr",
        "",
        Same,
        "192.168.50.11/32",
        &["192.168.50.11"],
    ),
    flag("iptables-forward-rules", "false", NoMeaning, "true", &["y"]),
    flag("kubeconfig", "", Same, "/etc/kubernetes/kubeconfig", &[]),
    // Not on every address of the node.
    flag(
        "listen",
        ":1107",
        Better("127.0.0.1:1107"),
        ":1107",
        &["1107", ":0"],
    ),
    flag("local", "true", NoMeaning, "false", &["no"]),
    flag("log-level", "info", Same, "debug", &["loud", ""]),
    flag(
        "master",
        "",
        Same,
        "https://10.0.0.1:6443",
        &["10.0.0.1", "https://", "ftp://10.0.0.1", "https://a b"],
    ),
    // And cross.
    flag(
        "mesh-granularity",
        "location",
        Same,
        "full",
        &["region", ""],
    ),
    flag("mtu", "auto", Same, "1300", &["abc", "0", "70000", "-1"]),
    flag("port", "51820", Same, "51999", &["0", "65536", "x"]),
    flag(
        "prioritise-private-addresses",
        "false",
        Same,
        "true",
        &["x"],
    ),
    flag("resync-period", "30s", Same, "1m30s", &["30", "-1s", "0s"]),
    flag("service-cidr", "", Same, "10.43.0.0/16", &["10.43.0.0/33"]),
    flag(
        "subnet",
        "10.4.0.0/16",
        Same,
        "10.5.0.0/16",
        &[
            "10.4.0.0",
            "10.4.0.0/31",
            "224.0.0.0/8",
            "169.254.0.0/16",
            "ff00::/16",
            "10.4.0.0/16,10.5.0.0/16",
        ],
    ),
    flag(
        "topology-label",
        "topology.kubernetes.io/region",
        Same,
        "example.com/site",
        &["", "a b", "/region", "example.com/", "a/b/c"],
    ),
    // Of the program and not of its agent.
    flag("version", "", Same, "", &[]),
    flag("help", "", Same, "", &[]),
];

/// Those that take a value.
fn valued() -> impl Iterator<Item = &'static Flag> {
    KG.iter()
        .filter(|flag| !matches!(flag.name, "version" | "help"))
}

const BOOLEANS: [&str; 7] = [
    "clean-up",
    "clean-up-interface",
    "cni",
    "create-interface",
    "iptables-forward-rules",
    "local",
    "prioritise-private-addresses",
];

fn agent(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_selvedge"))
        .arg("agent")
        .args(arguments)
        .env_remove("NODE_NAME")
        .envs(environment.iter().copied())
        .output()
        .unwrap()
}

/// What an agent prints that does not start: one line, and no more.
fn refusal(arguments: &[&str], environment: &[(&str, &str)]) -> String {
    let output = agent(arguments, environment);
    let text = String::from_utf8(output.stderr).unwrap();
    let code = output.status.code();
    assert!(
        matches!(code, Some(64 | 78)),
        "{arguments:?} {environment:?}: {code:?} {text}"
    );
    assert_eq!(
        text.lines().count(),
        1,
        "{arguments:?} {environment:?}: {text}"
    );
    text
}

/// The defaults that `--help` shows, by flag.
fn shown_defaults() -> BTreeMap<String, String> {
    let output = agent(&["--help"], &[]);
    let help = String::from_utf8(output.stdout).unwrap();
    let mut defaults = BTreeMap::new();
    let mut current = String::new();
    for line in help.lines() {
        let words = line.trim_start().trim_start_matches("-h, ");
        if let Some(rest) = words.strip_prefix("--") {
            let end = rest.find(|c: char| !(c.is_ascii_lowercase() || c == '-'));
            current = rest[..end.unwrap_or(rest.len())].to_owned();
            defaults.insert(current.clone(), String::new());
        }
        if let Some((_, default)) = line.split_once("[default: ")
            && let Some(entry) = defaults.get_mut(&current)
        {
            *entry = default.split(']').next().unwrap().to_owned();
        }
    }
    defaults
}

#[test]
fn every_flag_of_kgs_is_there_with_its_default() {
    let text = shown_defaults();
    for flag in valued() {
        let name = flag.name;
        let default = text.get(name);
        let default = default.unwrap_or_else(|| panic!("--{name} is not in --help"));
        match flag.here {
            // Where the machine decides, words say how.
            Same if flag.default.is_empty() => {
                assert!(!default.starts_with('/'), "--{name}: {default}")
            }
            Same => assert_eq!(default, flag.default, "--{name}"),
            Better(ours) => assert_eq!(default, ours, "--{name}"),
            NoMeaning => assert_eq!(default, "", "--{name}"),
        }
    }
    let version = Command::new(env!("CARGO_BIN_EXE_selvedge"))
        .arg("--version")
        .output()
        .unwrap();
    let version = String::from_utf8(version.stdout).unwrap();
    assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");
}

#[test]
fn every_flag_of_kgs_takes_its_value_in_both_forms() {
    for flag in valued() {
        let (name, good) = (flag.name, flag.good);
        let joined = format!("--{name}={good}");
        let config = Config::from_args(["--hostname=a", &joined]);
        assert!(config.is_ok(), "{joined}: {config:?}");
        if BOOLEANS.contains(&name) {
            // As with Kilo, a value must be joined, and the flag alone means true.
            let alone = format!("--{name}");
            let config = Config::from_args(["--hostname=a", &alone]);
            assert!(config.is_ok(), "{alone}: {config:?}");
        } else {
            let flag = format!("--{name}");
            let config = Config::from_args(["--hostname=a", &flag, good]);
            assert!(config.is_ok(), "{flag} {good}: {config:?}");
        }
    }
}

#[test]
fn a_flag_with_a_meaning_changes_the_configuration() {
    let text = |arguments: &[&str]| {
        let arguments = [&["--hostname=a"], arguments].concat();
        format!("{:?}", Config::from_args(arguments).unwrap())
    };
    let defaults = text(&[]);
    for flag in valued() {
        let given = format!("--{}={}", flag.name, flag.good);
        let changed = text(&[&given]) != defaults;
        // One value alone is possible, or ours is Kilo's other one.
        let same = matches!(flag.name, "backend" | "compatibility" | "clean-up");
        let notes = flag.here == NoMeaning;
        assert_eq!(changed, !same || notes, "{given}");
    }
    assert_ne!(text(&["--clean-up"]), defaults);
}

#[test]
fn a_flag_without_a_meaning_is_accepted_and_says_so_once() {
    for flag in valued() {
        let given = format!("--{}={}", flag.name, flag.good);
        let config = Config::from_args(["--hostname=a", &given, &given]).unwrap();
        let about: Vec<_> = config
            .notes
            .iter()
            .filter(|note| note.contains("no effect"))
            .collect();
        if flag.here == NoMeaning {
            let name = format!("--{}", flag.name);
            assert_eq!(about.len(), 1, "{given}: {about:?}");
            assert!(about[0].contains(&name), "{given}: {about:?}");
        } else {
            assert!(about.is_empty(), "{given}: {about:?}");
        }
    }
    // What happens here anyway needs no word.
    let as_here = ["--hostname=a", "--cni=false", "--create-interface=true"];
    assert!(Config::from_args(as_here).unwrap().notes.is_empty());
}

#[test]
fn a_bad_value_is_refused_in_one_sentence_wherever_it_stands() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("conf");
    for flag in valued() {
        for bad in flag.bad {
            let name = flag.name;
            let text = refusal(&["--hostname=a", &format!("--{name}={bad}")], &[]);
            assert!(text.starts_with("selvedge: --"), "{text}");
            assert!(text.contains(&format!("--{name}")), "{text}");

            // An empty variable is as good as none to those who write manifests.
            if bad.is_empty() {
                continue;
            }
            let variable = format!("SELVEDGE_{}", name.to_ascii_uppercase().replace('-', "_"));
            let hostname: &[&str] = if name == "hostname" {
                &[]
            } else {
                &["--hostname=a"]
            };
            let text = refusal(hostname, &[(&variable, bad)]);
            let blamed = format!("selvedge: {variable} ");
            assert!(text.starts_with(&blamed), "{variable}={bad}: {text}");

            std::fs::write(&file, format!("# ours\n{name}: {bad}\n")).unwrap();
            let config = format!("--config={}", file.display());
            let text = refusal(&[hostname, &[config.as_str()]].concat(), &[]);
            let line = format!("selvedge: line 2 of {}: {name} ", file.display());
            assert!(text.starts_with(&line), "{name}: {bad} in a file: {text}");
        }
    }
}

/// A flag, a value that it takes, and Kilo's default where `--help` has one.
type Row = (&'static str, &'static str, &'static str);

/// Every flag of `kgctl`'s, by command.
const KGCTL: [(&[&str], &[Row]); 4] = [
    (&["graph"], EVERYWHERE),
    (&["showconf", "node", "a"], SHOWCONF),
    (&["showconf", "peer", "a"], SHOWCONF),
    (
        &["connect", "a"],
        &[
            ("--backend", "kubernetes", ""),
            ("--mesh-granularity", "location", "auto"),
            ("--port", "51820", ""),
            (
                "--topology-label",
                "example.com/site",
                "topology.kubernetes.io/region",
            ),
            ("--allowed-ip", "10.10.10.11/32", "10.10.10.10/32"),
            ("-a", "10.10.10.11/32", "10.10.10.10/32"),
            ("--allowed-ips", "10.43.0.0/16,10.44.0.0/16", ""),
            ("--private-key", "/nonexistent/key", ""),
            ("--clean-up", "false", "true"),
            ("--mtu", "1300", "1420"),
            ("--resync-period", "1m", "30s"),
            ("--interface", "kilo1", "kilo0"),
            ("-i", "kilo1", "kilo0"),
            ("--persistent-keepalive", "25", "10"),
            ("--log-level", "debug", "info"),
        ],
    ),
];
const EVERYWHERE: &[Row] = &[
    ("--backend", "kubernetes", ""),
    ("--mesh-granularity", "full", "auto"),
    ("--port", "51820", ""),
    (
        "--topology-label",
        "example.com/site",
        "topology.kubernetes.io/region",
    ),
];
const SHOWCONF: &[Row] = &[
    ("--backend", "kubernetes", ""),
    ("--mesh-granularity", "full", "auto"),
    ("--port", "51820", ""),
    (
        "--topology-label",
        "example.com/site",
        "topology.kubernetes.io/region",
    ),
    ("--output", "json", "wireguard"),
    ("-o", "yaml", "wireguard"),
    ("--allowed-ips", "10.43.0.0/16,10.44.0.0/16", ""),
];

fn selvedge(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_selvedge"));
    command.args(arguments).output().unwrap()
}

#[test]
fn every_flag_of_kgctls_is_there_with_its_default() {
    // After all flags were read, the missing kubeconfig ends the command, or before it the missing right to
    // change the network.
    let no_cluster = "--kubeconfig=/nonexistent";
    for (command, flags) in KGCTL {
        let help = selvedge(&[command, &["--help"]].concat());
        let help = String::from_utf8(help.stdout).unwrap();
        for (flag, value, default) in flags {
            let joined = if flag.starts_with("--") {
                format!("{flag}={value}")
            } else {
                format!("{flag}{value}")
            };
            let mut forms = vec![vec![joined.as_str()]];
            if *flag != "--clean-up" {
                forms.push(vec![flag, value]);
            }
            for form in forms {
                let output = selvedge(&[command, &form, &[no_cluster]].concat());
                let text = String::from_utf8(output.stderr).unwrap();
                // What only shapes a Peer says so before, where none is asked for.
                let last = text.lines().last().unwrap_or_default();
                assert!(
                    last.starts_with("selvedge: ")
                        && (last.contains("/nonexistent") || last.contains("NET_ADMIN")),
                    "{command:?} {form:?}: {text}"
                );
            }
            let line = help.lines().find(|line| {
                let mut words = line.split([' ', ',', '[', '=']);
                words.any(|word| word == *flag)
            });
            if default.is_empty() {
                continue;
            }
            let line = line.unwrap_or_else(|| panic!("{flag} is not in --help: {help}"));
            let default = format!("[default: {default}]");
            assert!(line.contains(&default), "{line:?} has no {default}");
        }
    }
    let as_peer = ["showconf", "node", "a", "--as-peer", no_cluster];
    let text = String::from_utf8(selvedge(&as_peer).stderr).unwrap();
    assert!(text.contains("/nonexistent"), "{text}");
}

#[test]
fn a_bad_value_of_a_commands_is_refused_in_one_sentence() {
    for (arguments, expected) in [
        (
            &["graph", "--mesh-granularity=foo"][..],
            "--mesh-granularity \"foo\": unknown; possible values are: location, full, cross, auto",
        ),
        (
            &["graph", "--backend=etcd"],
            "--backend \"etcd\": unknown; possible values are: kubernetes",
        ),
        (
            &["showconf", "node", "a", "-o", "x"],
            "--output \"x\": unknown; possible values are: json, wireguard, yaml",
        ),
        (
            &["showconf", "node", "a", "--allowed-ips=x"],
            "--allowed-ips \"x\": is not a CIDR such as 10.43.0.0/16",
        ),
        (
            &["connect", "--allowed-ip=10.10.10.10"],
            "--allowed-ip \"10.10.10.10\": is not an address with its prefix length, such as 10.10.10.10/32",
        ),
        (
            &["connect", "--persistent-keepalive=25s"],
            "--persistent-keepalive \"25s\"",
        ),
        (
            &["connect", "--resync-period=30"],
            "--resync-period \"30\": must be a duration",
        ),
        (
            &["graph", "--port=x"],
            "--port \"x\": must be a port in the range 1 to 65535",
        ),
        (
            &["showconf", "node", "a", "--port=0"],
            "--port \"0\": must be a port in the range 1 to 65535",
        ),
        (
            &["connect", "--port=65536"],
            "--port \"65536\": must be a port in the range 1 to 65535",
        ),
        (
            &["graph", "--topology-label=a b"],
            "--topology-label \"a b\": must be the key of a Node label",
        ),
        (&["nosuch"], "unrecognized subcommand 'nosuch'"),
    ] {
        let output = selvedge(arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{arguments:?}: {text}");
        assert!(text.starts_with(&format!("selvedge: {expected}")), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}
