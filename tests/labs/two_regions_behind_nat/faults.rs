//! Faults: flannel restarts, its device and its entries are deleted, what the agent installed is
//! deleted, agents are killed. Each with what may be lost at most, and with a control.

use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use selvedge_lab::claims::{self, By};
use selvedge_lab::controlplane::POD_NETWORK;
use selvedge_lab::family::Family;
use selvedge_lab::lab::Mesh;
use selvedge_lab::topology::MASTER;
use selvedge_lab::traffic::PORT;
use selvedge_lab::{Lab, Steps, wait_for};

use super::{FOLLOWER, LEADER, SECOND_LEADER, doctor, leak_something, stream};

/// Repairs are promised within one second; a busy CI machine gets some more before it is a failure.
const REPAIR: Duration = Duration::from_secs(5);

/// How long a path may be left alone after it failed several times; a busy CI machine gets some more.
const DAMPED: Duration = Duration::from_secs(90);

/// How long streams go on after something was broken: longer than what would be a failure.
const LOOK: Duration = Duration::from_secs(6);

/// Pods of two regions both ways, and of one.
const POD_PAIRS: [(&str, &str); 3] = [
    ("pod@node-agent-03", "pod@node-master"),
    ("pod@node-master", "pod@node-agent-01"),
    ("pod@node-agent-03", "pod@node-agent-02"),
];

pub(super) fn all(steps: &mut Steps, lab: &mut Lab, mesh: &Mesh<'_>) {
    steps.step("flannel_restarts_and_nothing_is_lost", || {
        // With a policy of DROP flannel's own gap would hide ours; the next step measures that.
        lab.policy_of_forward("ACCEPT")?;
        let outcome = flannel_restarts(lab, &POD_PAIRS);
        lab.policy_of_forward("DROP")?;
        let Restarts { lost, summary, .. } = outcome?;
        ensure!(lost == 0, "{summary}");
        Ok(summary)
    });
    steps.step(
        "flannel_restarts_under_a_policy_of_drop_and_only_its_own_gap_is_felt",
        || {
            let Restarts {
                lost,
                dropped,
                summary,
            } = flannel_restarts(lab, &POD_PAIRS)?;
            ensure!(
                lost <= dropped,
                "{lost} lost, of which FORWARD dropped {dropped}: {summary}"
            );
            // Between the leaders themselves nothing is forwarded.
            let hosts = flannel_restarts(lab, &[(MASTER, LEADER), (LEADER, FOLLOWER)])?;
            ensure!(hosts.lost == 0, "{}", hosts.summary);
            Ok(format!(
                "pods lost {lost}, FORWARD dropped {dropped} packets meanwhile; hosts: {}",
                hosts.summary
            ))
        },
    );
    steps.step("an_entry_of_flannels_is_deleted_and_comes_back", || {
        flannel_entries_deleted(lab)
    });
    for node in [LEADER, FOLLOWER, MASTER] {
        let name = format!("flannels_device_is_deleted_on_{}", node.replace('-', "_"));
        steps.step(&name, || flannel_device_deleted(lab, node));
    }
    steps.step("both_leaders_are_used_again", || both_are_used(lab));
    for node in [LEADER, SECOND_LEADER, FOLLOWER, MASTER] {
        let name = format!("what_is_deleted_on_{}_is_repaired", node.replace('-', "_"));
        steps.step(&name, || {
            claims::what_is_deleted_is_repaired(lab, node, Family::V4, REPAIR)
        });
    }
    steps.step(
        "an_agent_out_of_file_descriptors_still_repairs_routes",
        || out_of_descriptors(lab),
    );
    steps.step("all_pods_and_nodes_still_reach_each_other", || {
        claims::all_places_reach_each_other(lab, By::OwnAddress)
    });
    steps.step(
        "an_agent_is_killed_and_nothing_leaves_in_clear_meanwhile",
        || agents_killed(lab, mesh),
    );
    steps.step(
        "the_control_run_without_our_state_sees_clear_packets",
        || circumvented(lab, mesh),
    );
    steps.step(
        "all_pods_and_nodes_reach_each_other_after_all_faults",
        || claims::all_places_reach_each_other(lab, By::OwnAddress),
    );
    steps.step("both_leaders_are_used_again_after_all_faults", || {
        both_are_used(lab)
    });
}

/// Takes the streams' packets out of the nodes' connection tracking, or puts them back.
pub(super) fn untracked(lab: &Lab, on: bool) -> anyhow::Result<()> {
    for name in lab.node_names() {
        let script = if on {
            format!(
                "nft add table ip aside; nft add chain ip aside early '{{ type filter hook prerouting priority raw; }}'; nft add rule ip aside early udp dport {PORT} notrack; nft add rule ip aside early udp sport {PORT} notrack"
            )
        } else {
            "nft delete table ip aside".to_owned()
        };
        lab.node(&name)?.namespace().sh(&script)?;
    }
    Ok(())
}

/// What streams lost while flannel was restarted on all nodes, one after the other.
pub(super) struct Restarts {
    /// How much they lost together.
    pub(super) lost: u32,
    /// How many of their packets the chain `FORWARD` of some node dropped.
    pub(super) dropped: u32,
    /// Each one's report.
    pub(super) summary: String,
}

/// flannel removes its rules and adds them again when it starts. Where no other rule accepts its packets
/// meanwhile, they are dropped: in a region as between regions, with Selvedge or without. kube-proxy
/// accepts established connections, but no untracked packets, such as a leader's transit.
pub(super) fn flannel_restarts(lab: &mut Lab, pairs: &[(&str, &str)]) -> anyhow::Result<Restarts> {
    for name in lab.node_names() {
        // What passes before the chain FORWARD, and what after it.
        let count = |chain, priority| {
            format!(
                "nft add table ip lost; nft add chain ip lost {chain} '{{ type filter hook forward priority {priority}; }}'; nft add rule ip lost {chain} udp dport {PORT} counter; nft add rule ip lost {chain} udp sport {PORT} counter;"
            )
        };
        let script = count("before", -1) + &count("after", 1);
        lab.node(&name)?.namespace().sh(&script)?;
    }
    let streams = pairs
        .iter()
        .map(|(from, to)| stream(lab, from, to))
        .collect::<anyhow::Result<Vec<_>>>()?;
    for name in [MASTER, LEADER, SECOND_LEADER, FOLLOWER] {
        lab.restart_flannel(name)?;
        sleep(Duration::from_secs(2));
    }
    let mut restarts = Restarts {
        lost: 0,
        dropped: 0,
        summary: String::new(),
    };
    for (stream, (from, to)) in streams.into_iter().zip(pairs) {
        let report = stream.stop()?;
        restarts.lost += report.lost();
        restarts.summary += &format!("{from} -> {to}: {report}; ");
    }
    for name in lab.node_names() {
        let node = lab.node(&name)?;
        let passed = |chain: &str| -> anyhow::Result<u32> {
            let text = node.run(&format!("nft list chain ip lost {chain}"))?;
            let counters = text.split("packets ").skip(1);
            counters
                .map(|rest| {
                    Ok(rest
                        .split_whitespace()
                        .next()
                        .context("no count")?
                        .parse::<u32>()?)
                })
                .sum()
        };
        restarts.dropped += passed("before")?.saturating_sub(passed("after")?);
        node.run("nft delete table ip lost")?;
    }
    Ok(restarts)
}

/// One neighbour and one forwarding entry of flannel's: flannel does not notice.
fn flannel_entries_deleted(lab: &Lab) -> anyhow::Result<String> {
    let mac = lab
        .node(LEADER)?
        .run("cat /sys/class/net/flannel.1/address")?;
    let mac = mac.trim();
    let gateway = lab.pod_cidr(LEADER)?.network();
    let mut summary = Vec::new();
    for command in [
        format!("ip neigh del {gateway} dev flannel.1"),
        format!("bridge fdb del {mac} dev flannel.1"),
    ] {
        let near = stream(lab, "pod@node-agent-03", "pod@node-agent-01")?;
        let far = stream(lab, "pod@node-agent-03", "pod@node-master")?;
        sleep(Duration::from_millis(300));
        lab.node(FOLLOWER)?.run(&command)?;
        sleep(LOOK);
        for stream in [near, far] {
            let report = stream.stop()?;
            ensure!(report.silence < REPAIR, "{command}: {report}");
            summary.push(format!("{command}: {report}"));
        }
    }
    Ok(summary.join("; "))
}

/// Waits until all paths through and to leaders are up, and the follower and the far leader use both. A path that
/// failed has to answer for a while before, the longer the more often it failed, at most half a minute.
fn both_are_used(lab: &Lab) -> anyhow::Result<String> {
    let time = wait_for("all paths to be up", DAMPED, || {
        lab.node_names().iter().all(|node| {
            let (_, metrics) = lab.ask_agent(node, "/metrics").unwrap_or_default();
            let mut paths = metrics
                .lines()
                .filter(|line| line.starts_with("selvedge_path_up{"))
                .peekable();
            paths.peek().is_some() && paths.all(|line| line.ends_with(" 1.0"))
        })
    })?;
    for (node, far) in [(FOLLOWER, MASTER), (MASTER, FOLLOWER)] {
        let line = format!("ip route show table 5130 {} metric 0", lab.pod_cidr(far)?);
        let machine = lab.node(node)?;
        wait_for(&format!("two next hops on {node}"), REPAIR, || {
            let route = machine.run(&line);
            route.is_ok_and(|route| route.matches("nexthop").count() == 2)
        })?;
    }
    Ok(format!("after {time:.1?} more"))
}

/// A repair by netlink needs no descriptor; a repair by `nft` waits until there are some again.
fn out_of_descriptors(lab: &mut Lab) -> anyhow::Result<String> {
    let pid = lab.agent(FOLLOWER).context("no agent")?.pid();
    // The hard limit stays, so that there is a way back.
    let limit = |soft: u32| -> anyhow::Result<()> {
        let status = Command::new("prlimit")
            .args(["--pid", &pid.to_string(), &format!("--nofile={soft}:")])
            .status()?;
        ensure!(status.success(), "prlimit: {status}");
        Ok(())
    };
    let far = lab.pod_cidr(MASTER)?;
    let (follower, route) = (lab.node(FOLLOWER)?, format!("table 5130 {far}"));
    let stream = stream(lab, "pod@node-agent-03", "pod@node-master")?;
    sleep(Duration::from_millis(300));
    limit(20)?;
    follower.run("nft delete table inet selvedge")?;
    follower.run(&format!("ip route del {route} metric 0"))?;
    let repaired = wait_for("the route", REPAIR, || {
        follower
            .run(&format!("ip route show {route}"))
            .is_ok_and(|routes| routes.contains("flannel.1"))
    });
    limit(1024)?;
    let repaired = repaired?;
    let firewall = wait_for("the nft table", Duration::from_secs(60), || {
        follower.run("nft list table inet selvedge").is_ok()
    })?;
    let report = stream.stop()?;
    ensure!(report.silence < REPAIR, "{report}");
    Ok(format!(
        "the route after {repaired:.1?}, the firewall {firewall:.1?} after there were some; {report}"
    ))
}

fn flannel_device_deleted(lab: &mut Lab, node: &str) -> anyhow::Result<String> {
    let streams = [
        stream(lab, "pod@node-agent-03", "pod@node-master")?,
        stream(lab, "pod@node-agent-03", "pod@node-agent-01")?,
        stream(lab, "pod@node-master", "pod@node-agent-01")?,
    ];
    sleep(Duration::from_millis(500));
    lab.node(node)?.run("ip link delete flannel.1")?;
    sleep(LOOK);
    let mut summary = Vec::new();
    for stream in streams {
        let report = stream.stop()?;
        ensure!(report.silence < REPAIR, "{report}");
        summary.push(report.to_string());
    }
    // flannel learns its entries for other regions, which only flannel uses, again when it starts.
    lab.restart_flannel(node)?;
    Ok(summary.join("; "))
}

fn agents_killed(lab: &mut Lab, mesh: &Mesh<'_>) -> anyhow::Result<String> {
    let mut summary = Vec::new();
    for node in [LEADER, SECOND_LEADER, FOLLOWER, MASTER] {
        let capture = lab.capture_internet(&format!("killed-{node}"))?;
        let stream = stream(lab, "pod@node-agent-03", "pod@node-master")?;
        let back = super::stream(lab, "pod@node-master", "pod@node-agent-01")?;
        sleep(Duration::from_millis(500));
        lab.take_agent(node)?.kill();
        // Of two leaders the other one carries the region's traffic meanwhile.
        let has_other = [LEADER, SECOND_LEADER].contains(&node);
        sleep(if has_other {
            LOOK
        } else {
            Duration::from_secs(2)
        });
        // The master is the only leader of its region.
        if node == MASTER {
            let text = doctor(lab, FOLLOWER)?;
            ensure!(text.contains("node-master, the leader of"), "{text}");
            ensure!(text.contains("does not answer"), "{text}");
        }
        lab.start_agent(mesh.binary, node, mesh.access, mesh.flags)?;
        lab.wait_agents(Duration::from_secs(120))?;
        sleep(Duration::from_secs(2));
        let (report, back) = (stream.stop()?, back.stop()?);
        let findings = capture.finish(POD_NETWORK.parse()?)?;
        ensure!(findings.nothing_in_clear(), "{node}: {findings}");
        ensure!(report.answered > 0, "{node}: {report}");
        ensure!(!has_other || report.silence < REPAIR, "{node}: {report}");
        // The pods of the node itself wait for their own agent.
        let own = node == LEADER;
        ensure!(!has_other || own || back.silence < REPAIR, "{node}: {back}");
        summary.push(format!("{node}: {report}; {back}"));
    }
    Ok(summary.join("; "))
}

/// The control: the capture sees the same traffic once our state is removed.
fn circumvented(lab: &mut Lab, mesh: &Mesh<'_>) -> anyhow::Result<String> {
    lab.take_agent(MASTER)?.kill();
    lab.node(MASTER)?
        .run("ip rule add priority 1 lookup main")?;
    lab.node(MASTER)?.run("nft delete table inet selvedge")?;
    let capture = lab.capture_internet("circumvented")?;
    leak_something(lab)?;
    let findings = capture.finish(POD_NETWORK.parse()?)?;
    lab.node(MASTER)?.run("ip rule delete priority 1")?;
    lab.start_agent(mesh.binary, MASTER, mesh.access, mesh.flags)?;
    lab.wait_agents(Duration::from_secs(120))?;
    ensure!(
        findings.magic > 0 && !findings.nothing_in_clear(),
        "{findings}"
    );
    claims::reached_within(
        lab,
        "pod@node-master",
        "pod@node-agent-03",
        Duration::from_secs(15),
    )?;
    Ok(findings.to_string())
}
