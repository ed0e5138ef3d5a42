//! What happens to hosts in production, on a real flannel and a real kube-apiserver: large frames on the NIC,
//! a region label that disappears for a while, a cloned disk, a port that is taken, a kernel and a firewall
//! that forward nothing.
//!
//! The steps share one cluster and run in order; each is named after a problem of the
//! field, and has that problem as its control where it can be reproduced.
#![expect(
    clippy::disallowed_methods,
    reason = "a test may wait and read the clock"
)]

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use selvedge_lab::claims;
use selvedge_lab::lab::{Mesh, Options};
use selvedge_lab::topology::{FOLLOWER, LEADER, MASTER, Shape};
use selvedge_lab::traffic::{PORT, Stream};
use selvedge_lab::{Lab, Namespace, Steps, wait_for};
use serde_json::Value;

const SELVEDGE: &str = env!("CARGO_BIN_EXE_selvedge");
const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/selvedge-k3s.yaml");

const REGION: &str = "topology.kubernetes.io/region";

/// The agent looks each second; a busy CI machine gets some more.
const SOON: Duration = Duration::from_secs(20);
/// An agent reads the firewall every half minute.
const FIREWALL: Duration = Duration::from_secs(60);

/// One leader a region, so that each fault concerns the node that carries the traffic, and its follower is the
/// control.
fn mesh() -> Mesh<'static> {
    Mesh::of_one_leader(Path::new(SELVEDGE), Path::new(MANIFEST))
}

fn main() -> ExitCode {
    let mut steps = Steps::from_args("host_faults");
    run(&mut steps);
    steps.finish()
}

fn run(steps: &mut Steps) -> Option<()> {
    let options = Options {
        shape: Shape {
            agents: 2,
            ..Shape::default()
        },
        ..Options::default()
    };
    let (mut lab, _servers) = steps.cluster("the_cluster_comes_up", "hosts", options)?;
    steps.required("all_agents_become_ready_with_nics_of_9000_bytes", || {
        large_frames(&lab)?;
        let time = lab.join(&mesh())?;
        claims::reached_within(&lab, "pod@node-agent-02", "pod@node-master", SOON)?;
        Ok(format!("{:.1} s", time.as_secs_f64()))
    })?;

    steps.step(
        "a_nic_of_9000_bytes_makes_no_fragments_between_regions",
        || no_fragments(&lab),
    );
    steps.step(
        "a_tunnel_of_8920_bytes_has_full_packets_fragmented_and_lost",
        || fragments(&mut lab),
    );
    steps.step(
        "a_region_label_that_goes_and_comes_again_moves_no_node",
        || label_returns(&lab),
    );
    steps.step(
        "a_region_label_that_stays_away_moves_the_node_after_half_a_minute",
        || label_stays_away(&lab),
    );
    steps.step(
        "a_cloned_disk_is_left_out_not_ready_and_shown_the_command",
        || cloned_disk(&mut lab),
    );
    steps.step(
        "a_port_that_is_taken_at_the_start_is_waited_for_while_the_rest_goes_on",
        || taken_port(&mut lab),
    );
    steps.step("a_leader_that_forwards_nothing_is_not_ready", || {
        no_forwarding(&lab)
    });
    steps.step(
        "a_leader_whose_firewall_drops_what_it_forwards_is_not_ready",
        || closed_firewall(&lab),
    );
    Some(())
}

/// Gives the data centre frames of 9,000 bytes. The internet keeps its 1,500, and so does flannel, which
/// read the sizes before.
fn large_frames(lab: &Lab) -> anyhow::Result<()> {
    let router = lab.network().router("nat1")?;
    for node in [LEADER, FOLLOWER] {
        router.run(&format!("ip link set {node} mtu 9000"))?;
        lab.node(node)?.run("ip link set eth0 mtu 9000")?;
    }
    router.run("ip link set br0 mtu 9000")?;
    lab.network().internet().sh(
        "nft add table bridge fragments
         nft add chain bridge fragments seen '{ type filter hook forward priority 0; }'
         nft add counter bridge fragments count
         nft add rule bridge fragments seen ether type ip ip frag-off '&' 0x3fff != 0 counter name count",
    )?;
    lab.pod(MASTER)?.namespace().sh("nft add table ip heard
         nft add chain ip heard requests '{ type filter hook input priority 0; }'
         nft add counter ip heard count
         nft add rule ip heard requests icmp type echo-request counter name count")?;
    Ok(())
}

/// The fragments that crossed the internet since it was last asked.
fn fragments_seen(lab: &Lab) -> anyhow::Result<u64> {
    counted(lab.network().internet(), "bridge fragments count")
}

/// The packets of a counter since it was last asked.
fn counted(namespace: &Namespace, counter: &str) -> anyhow::Result<u64> {
    let text = namespace.run(&format!("nft reset counter {counter}"))?;
    let mut words = text.split_whitespace();
    words
        .find(|word| *word == "packets")
        .and_then(|_| words.next()?.parse().ok())
        .with_context(|| text.clone())
}

/// Sends five packets of one size, IP's header counted, from a follower's pod to one of another region, and
/// returns how many arrived there.
fn arrived(lab: &Lab, size: u32) -> anyhow::Result<u64> {
    let to = lab.pod(MASTER)?;
    let counter = "ip heard count";
    counted(to.namespace(), counter)?;
    // Forgets path MTUs that were learned before.
    let pod = lab.pod(FOLLOWER)?.namespace();
    pod.run("ip route flush cache")?;
    let (payload, address) = (size - 28, to.address());
    let line = format!("ping -M do -s {payload} -c 5 -i 0.2 -W 1 {address}");
    pod.attempt(&line)?;
    counted(to.namespace(), counter)
}

fn no_fragments(lab: &Lab) -> anyhow::Result<String> {
    let pods = lab.pod_cidr(MASTER)?;
    let line = format!("ip route show table 5130 {pods}");
    wait_for("the MTU of the path", SOON, || {
        let routes = lab.node(LEADER).and_then(|leader| leader.run(&line));
        routes.is_ok_and(|routes| routes.contains("mtu 1440"))
    })?;
    fragments_seen(lab)?;
    let (full, larger) = (arrived(lab, 1440)?, arrived(lab, 1450)?);
    let seen = fragments_seen(lab)?;
    ensure!(full == 5, "{full} of 5 full packets arrived");
    ensure!(seen == 0, "{seen} fragments crossed the internet");
    ensure!(larger == 0, "packets larger than the path passed with DF");
    Ok("packets of 1440 bytes pass whole".to_owned())
}

/// The control: a tunnel as large as the NIC allows.
fn fragments(lab: &mut Lab) -> anyhow::Result<String> {
    for node in [LEADER, FOLLOWER] {
        restart(lab, node, &["--mtu=8920"])?;
    }
    lab.wait_agents(SOON)?;
    wait_for("full packets", SOON, || {
        arrived(lab, 1450).is_ok_and(|arrived| arrived == 5)
    })?;
    let seen = fragments_seen(lab)?;
    ensure!(seen > 0, "nothing was fragmented");
    let rule = "bridge fragments seen ether type ip ip frag-off & 0x3fff != 0 drop";
    let internet = lab.network().internet();
    internet.sh(&format!("nft add rule {}", rule.replace('&', "'&'")))?;
    let (small, large) = (arrived(lab, 1400)?, arrived(lab, 1450)?);
    let doctor = doctor(lab, LEADER)?;
    ensure!(doctor.contains("The tunnel's MTU 8920"), "{doctor}");
    internet.run("nft flush chain bridge fragments seen")?;
    for node in [LEADER, FOLLOWER] {
        restart(lab, node, &[])?;
    }
    lab.wait_agents(SOON)?;
    ensure!(small == 5, "{small} of 5 small packets arrived");
    ensure!(large == 0, "{large} full packets arrived without fragments");
    Ok(format!("{seen} fragments; none got through a filter"))
}

fn label_returns(lab: &Lab) -> anyhow::Result<String> {
    let to = SocketAddr::new(lab.pod(FOLLOWER)?.address(), PORT);
    let from = lab.pod(MASTER)?.namespace().path();
    let stream = Stream::start_warm(&from, to)?;
    lab.api().label(FOLLOWER, &[(REGION, None)])?;
    sleep(Duration::from_secs(8));
    let away = region_of(lab, MASTER, FOLLOWER)?;
    lab.api().label(FOLLOWER, &[(REGION, Some("nd"))])?;
    sleep(Duration::from_secs(2));
    let report = stream.stop()?;
    ensure!(away == "location:nd", "it counted in {away}");
    ensure!(report.lost() == 0, "{report}");
    Ok(report.to_string())
}

fn label_stays_away(lab: &Lab) -> anyhow::Result<String> {
    let begun = Instant::now();
    lab.api().label(FOLLOWER, &[(REGION, None)])?;
    let patience = Duration::from_secs(60);
    let moved = wait_for("the other region", patience, || {
        region_of(lab, MASTER, FOLLOWER).is_ok_and(|region| region != "location:nd")
    });
    let after = begun.elapsed();
    lab.api().label(FOLLOWER, &[(REGION, Some("nd"))])?;
    moved?;
    wait_for("the region again", SOON, || {
        region_of(lab, MASTER, FOLLOWER).is_ok_and(|region| region == "location:nd")
    })?;
    ensure!(after >= Duration::from_secs(29), "moved after {after:.1?}");
    claims::reached_within(lab, "pod@node-agent-02", "pod@node-master", SOON)?;
    Ok(format!("moved after {after:.1?}"))
}

fn cloned_disk(lab: &mut Lab) -> anyhow::Result<String> {
    let key =
        |node: &str| -> anyhow::Result<_> { Ok(lab.node(node)?.outside("/var/lib/selvedge/key")) };
    let (original, clone) = (key(LEADER)?, key(FOLLOWER)?);
    lab.take_agent(FOLLOWER)?.stop()?;
    // The whole disk: the state of the other agent is on it.
    let (from, to) = (original.parent(), clone.parent());
    let (from, to) = (from.context("no directory")?, to.context("no directory")?);
    for file in fs::read_dir(from)? {
        let file = file?;
        fs::copy(file.path(), to.join(file.file_name()))?;
    }
    restart(lab, FOLLOWER, &[])?;
    let command = "rm -f /var/lib/selvedge/key";
    let reason = not_ready(lab, FOLLOWER, command, SOON)?;
    ensure!(
        reason.contains("node node-agent-01 has the private key"),
        "{reason}"
    );
    event(lab, FOLLOWER, command)?;
    for text in [doctor(lab, FOLLOWER)?, status(lab, FOLLOWER, "text")?] {
        ensure!(text.contains(command), "{text}");
    }
    let (code, body) = lab.ask_agent(LEADER, "/ready")?;
    ensure!(code == 200, "the original is not ready: {body}");
    claims::reached_within(lab, "pod@node-agent-01", "pod@node-master", SOON)?;

    lab.take_agent(FOLLOWER)?.stop()?;
    lab.node(FOLLOWER)?.run(command)?;
    restart(lab, FOLLOWER, &[])?;
    lab.wait_agents(SOON)?;
    claims::reached_within(lab, "pod@node-agent-02", "pod@node-master", SOON)?;
    Ok(reason)
}

fn taken_port(lab: &mut Lab) -> anyhow::Result<String> {
    let before = claims::own_state(lab, LEADER)?;
    lab.take_agent(LEADER)?.stop()?;
    let other = lab
        .node(LEADER)?
        .within(|| UdpSocket::bind("0.0.0.0:51820"))?;
    restart(lab, LEADER, &[])?;
    let reason = not_ready(lab, LEADER, "UDP port 51820 is held by ", SOON)?;
    event(lab, LEADER, "UDP port 51820 is held by ")?;
    // What the node itself begins works, and nothing was removed meanwhile.
    claims::reached_within(lab, "pod@node-agent-02", "pod@node-master", SOON)?;
    let meanwhile = claims::own_state(lab, LEADER)?;
    ensure!(meanwhile == before, "was {before}\nand became {meanwhile}");
    let ended = lab.agent(LEADER).and_then(selvedge_lab::Process::ended);
    ensure!(ended.is_none(), "the agent ended");
    drop(other);
    let begun = Instant::now();
    wait_for("the port", SOON, || is_ready(lab, LEADER))?;
    let after = begun.elapsed();
    claims::reached_within(lab, "pod@node-master", "pod@node-agent-02", SOON)?;
    Ok(format!(
        "ready {after:.1?} after it was free; before: {reason}"
    ))
}

fn no_forwarding(lab: &Lab) -> anyhow::Result<String> {
    let set = |node: &str, value: &str| -> anyhow::Result<()> {
        let namespace = lab.node(node)?.namespace();
        namespace.sysctl("ipv4/ip_forward", value)
    };
    // The control: a follower passes nothing on between regions.
    set(FOLLOWER, "0")?;
    sleep(Duration::from_secs(3));
    let follower = is_ready(lab, FOLLOWER);
    set(FOLLOWER, "1")?;
    ensure!(follower, "a follower is not ready");

    set(LEADER, "0")?;
    let command = "sysctl -w net.ipv4.ip_forward=1";
    let reason = not_ready(lab, LEADER, command, SOON);
    let event_seen = event(lab, LEADER, command);
    set(LEADER, "1")?;
    event_seen?;
    wait_for("forwarding", SOON, || is_ready(lab, LEADER))?;
    reason
}

fn closed_firewall(lab: &Lab) -> anyhow::Result<String> {
    let node = lab.node(LEADER)?;
    // The control: the FORWARD chain of this lab drops, too, but flannel opens it for pods.
    let policy = node.run("iptables -S FORWARD")?;
    ensure!(policy.contains("-P FORWARD DROP"), "{policy}");
    ensure!(is_ready(lab, LEADER), "not ready before");

    node.run("nft add table inet closed")?;
    node.namespace().run(
        "nft add chain inet closed forwarded { type filter hook forward priority 10 ; policy drop ; }",
    )?;
    let found = "The chain forwarded of the firewall table inet closed drops";
    let reason = not_ready(lab, LEADER, found, FIREWALL);
    let event_seen = event(lab, LEADER, found);
    node.run("nft delete table inet closed")?;
    event_seen?;
    wait_for("an open firewall", FIREWALL, || is_ready(lab, LEADER))?;
    reason
}

fn restart(lab: &mut Lab, node: &str, more: &[&str]) -> anyhow::Result<()> {
    if lab.agent(node).is_some() {
        lab.take_agent(node)?.stop()?;
    }
    let mesh = mesh();
    let flags = [mesh.flags, more].concat();
    lab.restart_agent(mesh.binary, node, mesh.access, &flags)
}

fn is_ready(lab: &Lab, node: &str) -> bool {
    let answer = lab.ask_agent(node, "/ready");
    answer.is_ok_and(|(code, _)| code == 200)
}

/// Waits until an agent is not ready for a reason that contains this, and returns the reason.
fn not_ready(lab: &Lab, node: &str, why: &str, patience: Duration) -> anyhow::Result<String> {
    let mut last = String::new();
    let mut line = None;
    let waited = wait_for(&format!("{why:?} on {node}"), patience, || {
        if let Ok((code, body)) = lab.ask_agent(node, "/ready") {
            let mut lines = body.lines();
            line = lines.find(|line| line.contains(why)).map(str::to_owned);
            last = format!("{code} {body}");
        }
        line.is_some() && last.starts_with("503")
    });
    waited.with_context(|| format!("the last answer was {last}"))?;
    line.context("no reason")
}

/// Waits for an Event on a Node.
fn event(lab: &Lab, node: &str, what: &str) -> anyhow::Result<()> {
    let path = "/apis/events.k8s.io/v1/namespaces/default/events";
    let is_it = |event: &Value| {
        event["regarding"]["name"] == node
            && event["note"]
                .as_str()
                .is_some_and(|note| note.contains(what))
    };
    wait_for(&format!("an Event on {node}"), SOON, || {
        let events = lab.api().get(path).unwrap_or_default();
        let items = events["items"].as_array();
        items.is_some_and(|items| items.iter().any(is_it))
    })?;
    Ok(())
}

/// The segment that an agent counts a node in.
fn region_of(lab: &Lab, asked: &str, node: &str) -> anyhow::Result<String> {
    let status: Value = serde_json::from_str(&status(lab, asked, "json")?)?;
    let segments = status["segments"].as_array().context("no segments")?;
    let is_in = |segment: &&Value| {
        let nodes = segment["nodes"].as_array();
        nodes.is_some_and(|nodes| nodes.iter().any(|name| name == node))
    };
    let segment = segments.iter().find(is_in);
    let name = segment.and_then(|segment| segment["name"].as_str());
    Ok(name.unwrap_or("none").to_owned())
}

fn status(lab: &Lab, node: &str, output: &str) -> anyhow::Result<String> {
    printed(lab, node, &["status", "--output", output])
}

fn doctor(lab: &Lab, node: &str) -> anyhow::Result<String> {
    let hostname = format!("--hostname={node}");
    let kubeconfig = "--kubeconfig=/run/selvedge-lab.kubeconfig";
    printed(lab, node, &["doctor", kubeconfig, &hostname])
}

/// What the program prints on a node, whatever its exit code.
fn printed(lab: &Lab, node: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = std::process::Command::new(SELVEDGE);
    command.args(arguments);
    let output = lab.node(node)?.output(command)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
