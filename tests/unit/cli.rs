//! Bad flags and files: each ends the program at once, with one sentence on stderr and the exit code 64 or 78.
//!
//! What is in the way on a node is in `tests/root/bare_node.rs`.
#![expect(clippy::disallowed_methods, reason = "a test may run programs")]

use std::process::Command;

use crate::refused::refused;

fn selvedge(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_selvedge"));
    command.args(arguments);
    command
}

#[test]
fn bad_flags_are_refused_in_one_sentence() {
    for (arguments, expected) in [
        (&["agent", "--nosuch"][..], "unexpected argument '--nosuch'"),
        (&["agent", "--compatibility=flanel"], "--compatibility"),
        (&["agent", "--port=70000"], "--port"),
        (&["--encapsulate=sometimes"], "--encapsulate"),
        (&["agent", "--interface=sixteen-letters-"], "--interface"),
        (&["agent", "--resync-period=30"], "--resync-period"),
        (&["agent", "--prot=5"], "did you mean --port?"),
        (&["nosuch"], "unrecognized subcommand"),
        (&["agnet"], "did you mean agent?"),
        (&[], "requires a subcommand"),
    ] {
        refused(selvedge(arguments), 64, expected);
    }
}

#[test]
fn a_bad_configuration_file_is_named() {
    refused(
        selvedge(&["agent", "--config=/nonexistent"]),
        78,
        "/nonexistent",
    );
}

#[test]
fn status_without_an_agent_says_so() {
    refused(
        selvedge(&["status", "--control-socket=/nonexistent"]),
        78,
        "no agent answers",
    );
}
