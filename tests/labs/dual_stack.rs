//! IPv6 and dual stack on a real flannel and a real kube-apiserver: pods of both families over an
//! internet of IPv4 and over one of IPv6, and pods of one family over each of them.
//!
//! Each is a master and a data centre of two nodes behind a router, with strict reverse path filters
//! and a FORWARD policy of DROP; IPv6 is never translated, so there the router is a firewall that
//! admits nothing inbound. What applies to both families alike is shown in `two_regions_behind_nat`.

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use selvedge_lab::claims::{self, By, Pairs};
use selvedge_lab::dumps::Dumps;
use selvedge_lab::family::{Family, Inner};
use selvedge_lab::lab::{AGENT_FLAGS, Access, Mesh, Options, Places as _, Proxy};
use selvedge_lab::topology::{FOLLOWER_OF_TWO as FOLLOWER, LEADER, MASTER, SECOND_LEADER, Shape};
use selvedge_lab::traffic::{PORT, shout};
use selvedge_lab::{Lab, Steps, wait_for};

const SELVEDGE: &str = env!("CARGO_BIN_EXE_selvedge");
const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/selvedge-k3s.yaml");

/// Repairs are promised within one second; a busy CI machine gets some more before it is a failure.
const REPAIR: Duration = Duration::from_secs(5);
/// How long the regions may take to be joined, per pair.
const JOINED: Duration = Duration::from_secs(15);

/// One cluster and what is done with it.
struct Case {
    name: &'static str,
    inner: Inner,
    wan: Family,
    /// Whether things are deleted, too.
    faults: bool,
}

fn main() -> ExitCode {
    let mut steps = Steps::from_args("dual_stack");
    for case in [
        Case {
            name: "both_families_over_ipv4",
            inner: Inner::Dual,
            wan: Family::V4,
            faults: true,
        },
        Case {
            name: "both_families_over_ipv6",
            inner: Inner::Dual,
            wan: Family::V6,
            faults: false,
        },
        Case {
            name: "ipv6_alone",
            inner: Inner::V6,
            wan: Family::V6,
            faults: false,
        },
        Case {
            name: "ipv4_alone_over_ipv6",
            inner: Inner::V4,
            wan: Family::V6,
            faults: false,
        },
        Case {
            name: "ipv6_alone_over_ipv4",
            inner: Inner::V6,
            wan: Family::V4,
            faults: false,
        },
    ] {
        if steps.selects(case.name) {
            run(&mut steps, &case);
        }
    }
    steps.finish()
}

fn run(steps: &mut Steps, case: &Case) -> Option<()> {
    let Case { name, .. } = case;
    let options = Options {
        shape: Shape {
            inner: case.inner,
            wan: case.wan,
            ..Shape::default()
        },
        proxy: Proxy::Iptables,
        ..Options::default()
    };
    let (mut lab, _servers) = steps.cluster(
        &format!("{name}::the_cluster_comes_up"),
        "dual-stack",
        options,
    )?;
    without_selvedge(steps, name, &lab);
    let before = steps.required(&format!("{name}::the_nodes_are_dumped"), || {
        Dumps::take(&lab)
    })?;

    let mut flags = AGENT_FLAGS.to_vec();
    flags.push("--subnet=10.4.0.0/16,fd0a:4::/64");
    let mesh = Mesh {
        binary: Path::new(SELVEDGE),
        manifest: Path::new(MANIFEST),
        access: Access::Kubeconfig,
        flags: &flags,
        annotate: false,
    };
    steps.required(&format!("{name}::all_agents_become_ready"), || {
        lab.annotate_nodes()?;
        let wish = (
            "kilo.squat.ai/wireguard-ip",
            Some("10.4.0.2/16,fd0a:4::77/64"),
        );
        lab.api().annotate(LEADER, &[wish])?;
        let time = lab.join(&mesh)?;
        Ok(format!("{time:.1?} after the last was started"))
    })?;
    let capture = lab.capture_internet("ready").ok()?;
    for family in lab.families() {
        reachability(steps, name, &lab, family);
    }
    steps.step(
        &format!("{name}::pods_reach_the_service_kubernetes"),
        || claims::pods_reach_the_api(&lab),
    );
    steps.step(
        &format!("{name}::nothing_crosses_the_internet_in_clear"),
        || {
            let findings = capture.finish_all(&lab.pod_networks())?;
            ensure!(findings.nothing_in_clear(), "{findings}");
            let tunnel = findings.udp.get(&51820).copied().unwrap_or(0);
            ensure!(tunnel > 500, "only {tunnel} packets of the tunnel");
            Ok(findings.to_string())
        },
    );
    let outer = family_name(case.wan);
    steps.step(
        &format!("{name}::the_tunnels_endpoints_are_{outer}"),
        || endpoints(&lab, case.wan),
    );
    if case.faults {
        faults(steps, name, &lab);
    }
    steps.step(
        &format!("{name}::cleanup_leaves_the_nodes_as_they_were"),
        || claims::cleanup_leaves_nothing(&mut lab, Path::new(SELVEDGE), &before),
    );
    if case.faults {
        steps.step(
            &format!("{name}::a_node_with_ipv6_off_keeps_ipv4_and_warns_once"),
            || ipv6_off(&mut lab, &mesh),
        );
    }
    Some(())
}

/// The control run, in each family.
fn without_selvedge(steps: &mut Steps, name: &str, lab: &Lab) {
    for family in lab.families() {
        let inner = family_name(family);
        steps.step(
            &format!("{name}::flannel_alone_connects_no_two_regions_by_{inner}"),
            || claims::only_regions_are_connected(&lab.of(family)),
        );
    }
    for family in lab.families() {
        let inner = family_name(family);
        steps.step(
            &format!("{name}::flannel_alone_sends_{inner}_of_pods_in_clear"),
            || {
                let capture = lab.capture_internet("flannel-alone")?;
                let from = lab.of(family).place("pod@node-master")?;
                let to = lab.of(family).place("pod@node-agent-01")?;
                for _ in 0..20 {
                    shout(&from.namespace, SocketAddr::from((to.address, PORT)))?;
                    sleep(Duration::from_millis(20));
                }
                let findings = capture.finish_all(&lab.pod_networks())?;
                ensure!(findings.magic > 0 && findings.vxlan > 0, "{findings}");
                Ok(findings.to_string())
            },
        );
    }
}

fn reachability(steps: &mut Steps, name: &str, lab: &Lab, family: Family) {
    let inner = family_name(family);
    let view = lab.of(family);
    steps.step(
        &format!("{name}::the_regions_are_joined_by_{inner}"),
        || {
            let mut summary = Vec::new();
            for (from, to) in [
                ("pod@node-agent-03", "pod@node-master"),
                ("pod@node-master", "pod@node-agent-03"),
                ("node-master", "node-agent-01"),
            ] {
                let time = claims::reached_within(&view, from, to, JOINED)?;
                summary.push(format!("{from} -> {to} after {time:.1?} more"));
            }
            Ok(summary.join(", "))
        },
    );
    steps.step(
        &format!("{name}::all_pods_and_nodes_reach_each_other_by_{inner}"),
        || claims::all_places_reach_each_other(&view, By::OwnAddress),
    );
    steps.step(
        &format!("{name}::all_pods_and_nodes_reach_every_service_by_{inner}"),
        || claims::all_places_reach_each_other(&view, By::Service),
    );
    steps.step(
        &format!("{name}::a_server_sees_the_pods_own_{inner}_address"),
        || claims::pods_keep_their_address(&view),
    );
    steps.step(
        &format!("{name}::the_master_reaches_every_kubelet_by_{inner}"),
        || claims::master_reaches_every_kubelet(&view),
    );
    steps.step(
        &format!("{name}::the_leader_answers_at_the_wireguard_ip_asked_for_in_{inner}"),
        || {
            let wish = match family {
                Family::V4 => "10.4.0.2",
                Family::V6 => "fd0a:4::77",
            };
            lab.node(MASTER)?
                .run(&format!("ping -c 2 -i 0.2 -W 2 {wish}"))?;
            Ok(wish.to_owned())
        },
    );
    steps.step(
        &format!("{name}::an_{inner}_packet_too_large_is_refused_in_its_own_region"),
        || {
            let master = view.place("pod@node-master")?.address;
            claims::too_large_is_refused_in_its_region(lab, LEADER, LEADER, master)?;
            claims::too_large_is_refused_in_its_region(lab, FOLLOWER, LEADER, master)
        },
    );
    steps.step(
        &format!("{name}::a_megabyte_arrives_intact_by_{inner}"),
        || claims::bytes_arrive_intact(&view, 1_000_000, Pairs::BesidesPublicHosts),
    );
    steps.step(
        &format!("{name}::other_regions_are_refused_or_tunnelled_in_{inner}"),
        || backstops(lab, family),
    );
}

/// Each remote prefix has its backstop, on leaders and followers, and VXLAN of the family is dropped.
fn backstops(lab: &Lab, family: Family) -> anyhow::Result<String> {
    let mut backstops = 0;
    for node in lab.node_names() {
        let machine = lab.node(&node)?;
        let option = family.option();
        let routes = machine.run(&format!("ip {option} route show table 5130"))?;
        for other in lab.node_names() {
            if !lab.apart(&node, &other)? {
                continue;
            }
            let pods = lab.pod_cidrs(&other)?.into_iter();
            for pods in pods.filter(|net| Family::of(net.addr()) == family) {
                let backstop = format!("unreachable {pods}");
                ensure!(
                    routes.contains(&backstop),
                    "{node}: no {backstop}\n{routes}"
                );
                backstops += 1;
            }
        }
        let address = match family {
            Family::V4 => "ip daddr",
            Family::V6 => "ip6 daddr",
        };
        let table = machine.run("nft list table inet selvedge")?;
        let drops = table.lines().any(|line| {
            line.contains(address) && line.contains("udp dport 8472") && line.contains("drop")
        });
        ensure!(drops, "{node}: no drop of VXLAN over {address}\n{table}");
    }
    Ok(format!("{backstops} prefixes"))
}

/// All leaders speak over the family of the internet.
fn endpoints(lab: &Lab, wan: Family) -> anyhow::Result<String> {
    let mut summary = Vec::new();
    // The master is alone in its region; the data centre has two leaders.
    for (leader, tunnels) in [(MASTER, 2), (LEADER, 1), (SECOND_LEADER, 1)] {
        let peers = claims::wg_show(lab, leader)?;
        ensure!(peers.len() == tunnels, "{leader} has {peers:?}");
        for peer in peers {
            let endpoint: SocketAddr = peer.endpoint.parse().context("the endpoint")?;
            ensure!(
                Family::of(endpoint.ip()) == wan,
                "{leader} sends to {endpoint}"
            );
            summary.push(format!("{leader} -> {endpoint}"));
        }
    }
    Ok(summary.join(", "))
}

fn faults(steps: &mut Steps, name: &str, lab: &Lab) {
    for node in [LEADER, FOLLOWER] {
        steps.step(
            &format!("{name}::what_is_deleted_on_{node}_is_repaired_in_ipv6"),
            || claims::what_is_deleted_is_repaired(lab, node, Family::V6, REPAIR),
        );
    }
    for family in Family::BOTH {
        let inner = family_name(family);
        steps.step(
            &format!("{name}::all_pods_and_nodes_still_reach_each_other_by_{inner}"),
            || claims::all_places_reach_each_other(&lab.of(family), By::OwnAddress),
        );
    }
}

/// A follower whose operator turns IPv6 off, after flannel came up with it, and while its agent runs.
fn ipv6_off(lab: &mut Lab, mesh: &Mesh<'_>) -> anyhow::Result<String> {
    for name in lab.node_names() {
        lab.start_agent(mesh.binary, &name, mesh.access, mesh.flags)?;
    }
    lab.wait_agents(Duration::from_secs(120))?;
    let length = |lab: &Lab| -> anyhow::Result<usize> {
        let log = std::fs::read_to_string(lab.node(FOLLOWER)?.log("agent"))?;
        Ok(log.len())
    };
    let before = length(lab)?;
    lab.node(FOLLOWER)?
        .namespace()
        .sysctl("ipv6/conf/all/disable_ipv6", "1")?;
    wait_for("the agent to leave IPv6", JOINED, || {
        let rules = lab.node(FOLLOWER).and_then(|node| node.run("ip -6 rule"));
        rules.is_ok_and(|rules| !rules.contains("519"))
    })?;
    // Long enough for a loop to show.
    sleep(Duration::from_secs(2));
    let log = std::fs::read_to_string(lab.node(FOLLOWER)?.log("agent"))?;
    let warnings = log.get(before..).unwrap_or_default().lines();
    // Of the API server, on a busy machine, it may complain with reason.
    let warnings: Vec<&str> = warnings
        .filter(|line| line.contains("WARN") || line.contains("ERROR"))
        .filter(|line| {
            !line.contains("API server") && !line.contains("publishing annotations failed")
        })
        .collect();
    ensure!(
        warnings.len() == 1 && warnings[0].contains("IPv6 is off"),
        "{}",
        warnings.join("\n")
    );
    claims::what_is_deleted_is_repaired(lab, FOLLOWER, Family::V4, REPAIR)?;
    claims::all_places_reach_each_other(&lab.of(Family::V4), By::OwnAddress)?;
    let log = std::fs::read_to_string(lab.node(FOLLOWER)?.log("agent"))?;
    ensure!(
        log.get(before..)
            .unwrap_or_default()
            .matches("IPv6 is off")
            .count()
            == 1,
        "the warning that IPv6 is off was repeated"
    );
    let (status, _) = lab.ask_agent(FOLLOWER, "/ready")?;
    ensure!(status == 200, "/ready answers {status}");
    Ok(String::new())
}

fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    }
}
