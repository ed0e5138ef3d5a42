//! The boot guard: what it adds to a node without any state of the agent, and that an agent keeps it.
#![expect(clippy::disallowed_methods, reason = "a test may run programs")]

use std::io::Read as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use selvedge::guard::Guard;

use crate::fixture::{Node, commands, leader, reach};

/// A node after a reboot: with its network card, without flannel and tunnel.
fn booted(label: &str) -> Node {
    let node = Node::new(label);
    node.sh("ip link del flannel.1; ip link del flannel-v6.1; ip link del cni0");
    node
}

#[test]
fn the_guard_needs_neither_links_nor_nft() {
    let node = booted("guard");
    let guard = Guard::of(&leader());
    node.namespace.within(|| guard.apply().unwrap());
    // systemd runs it at every start of the kubelet.
    node.namespace.within(|| guard.apply().unwrap());
    insta::assert_snapshot!(node.sh("ip rule; ip -6 rule; ip route show table 5130; ip -6 route show table 5130"), @r"
    0:	from all lookup local
    5191:	from all iif kilo0 [detached] lookup 5132 proto 118
    5192:	from 10.42.0.0/16 iif lo lookup 5132 proto 118
    5193:	from 10.42.0.0/16 lookup 5131 proto 118
    5194:	not from all fwmark 0x51e00000 lookup 5130 proto 118
    32766:	from all lookup main
    32767:	from all lookup default
    0:	from all lookup local
    5191:	from all iif kilo0 [detached] lookup 5132 proto 118
    5192:	from fd42::/56 iif lo lookup 5132 proto 118
    5193:	from fd42::/56 lookup 5131 proto 118
    5194:	not from all fwmark 0x51e00000 lookup 5130 proto 118
    32766:	from all lookup main
    unreachable 10.42.0.0/24 proto 118 metric 4278198272 
    throw 10.42.1.0/24 proto 118 
    unreachable fd42::/64 dev lo proto 118 metric 4278198272 pref medium
    throw fd42:0:0:1::/64 dev lo proto 118 metric 512 pref medium
    ");
    assert_eq!(node.sh("nft list tables"), "");
}

/// Any local user may bind the name of an agent's lock.
#[test]
fn the_guard_ignores_an_agents_lock_that_another_user_holds() {
    const HOLD: &str = r#"use Socket; socket(S, PF_UNIX, SOCK_STREAM, 0) && bind(S, pack("Sa*", AF_UNIX, "\0selvedge.kilo0"))
        && listen(S, 8) || die $!; $| = 1; print "held\n"; sleep 600"#;
    let node = booted("squatted");
    let state = tempfile::tempdir().unwrap();
    Guard::of(&leader()).save(state.path()).unwrap();
    let guarded_while_held_by = |user: u32| {
        let mut holder = node.namespace.within(|| {
            let mut command = Command::new("perl");
            command.args(["-e", HOLD]).uid(user).stdout(Stdio::piped());
            command.spawn().unwrap()
        });
        let mut held = [0; 5];
        holder.stdout.take().unwrap().read_exact(&mut held).unwrap();
        let mut guard = node.namespace.command(env!("CARGO_BIN_EXE_selvedge"));
        guard.arg("guard").arg("--state-dir").arg(state.path());
        let output = guard.output().unwrap();
        holder.kill().unwrap();
        holder.wait().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };

    // The control: root holds it, as an agent would.
    let output = guarded_while_held_by(0);
    assert!(output.contains("the agent runs"), "{output}");
    let output = guarded_while_held_by(65534);
    assert!(output.contains("guard this node until"), "{output}");
    assert!(node.run("ip rule").contains("lookup 5130"));
}

#[test]
fn an_agent_keeps_what_the_guard_added() {
    let node = Node::with_tunnel("guarded");
    let guard = Guard::of(&leader());
    node.namespace.within(|| guard.apply().unwrap());
    node.with(|kernel| {
        let changes = commands(kernel, &leader());
        let touched = changes.iter().filter(|change| {
            change.contains(" rule ") || change.contains("unreachable") || change.contains("throw")
        });
        assert_eq!(touched.collect::<Vec<_>>(), Vec::<&String>::new());
        reach(kernel, &leader());
        assert_eq!(kernel.observe().unwrap(), leader());
    });
}

#[test]
fn an_older_guard_changes_nothing_that_an_agent_left() {
    let node = Node::with_tunnel("older");
    // Since then these pods have another leader, and a route through the tunnel.
    let mut older = leader();
    for (key, route) in &mut older.routes {
        if key.dst == "10.42.3.0/24".parse().unwrap() {
            *route = selvedge::state::Route::Throw;
        }
    }
    node.with(|kernel| {
        reach(kernel, &leader());
        Guard::of(&older).apply().unwrap();
        assert_eq!(kernel.observe().unwrap(), leader());
    });
}
