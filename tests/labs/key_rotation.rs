//! Keys that are replaced under load, on a real flannel and a real kube-apiserver: no numbered datagram is lost,
//! and a copy of an old key is worth nothing afterwards.
//!
//! The short form replaces each key once. `SELVEDGE_KEY_ROTATION=all` does so until a million datagrams were sent.
#![expect(
    clippy::disallowed_methods,
    reason = "a test may run programs and wait"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use selvedge_lab::capture::Capture;
use selvedge_lab::controlplane::POD_NETWORK;
use selvedge_lab::lab::{AGENT_FLAGS, Mesh, Options};
use selvedge_lab::topology::{FOLLOWER, LEADER, MASTER, MASTER_PUBLIC};
use selvedge_lab::traffic::flows::{End, Flows, Time, now};
use selvedge_lab::{Lab, Steps, claims, wait_for};

const SELVEDGE: &str = env!("CARGO_BIN_EXE_selvedge");
const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/selvedge-k3s.yaml");

/// How long the mesh may take to follow a change on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// A replacement takes half a minute: 10 seconds until the switch, and 20 of overlap.
const REPLACED: Duration = Duration::from_secs(80);
/// What was sent this recently may still be under way.
const UNDER_WAY: Duration = Duration::from_millis(300);
/// The datagrams of the long form.
const MILLION: usize = 1_000_000;

fn main() -> ExitCode {
    let mut steps = Steps::from_args("key_rotation");
    run(&mut steps);
    steps.finish()
}

fn flags() -> Vec<&'static str> {
    let more = ["--key-overlap=30s", "--leaders-per-region=2"];
    AGENT_FLAGS.iter().copied().chain(more).collect()
}

fn run(steps: &mut Steps) -> Option<()> {
    let (mut lab, _servers) = steps.cluster("the_cluster_comes_up", "keys", Options::default())?;
    let flags = flags();
    let mesh = Mesh::labelled(Path::new(SELVEDGE), Path::new(MANIFEST), &flags);
    steps.required("all_agents_become_ready", || {
        let time = lab.join(&mesh)?;
        claims::reached_within(&lab, "pod@node-agent-03", "pod@node-master", PATIENCE)?;
        Ok(format!("{:.1} s", time.as_secs_f64()))
    })?;
    let stolen = lab.directory().join("stolen");
    steps.required("a_leaders_key_is_copied", || {
        fs::copy(key_file(&lab, LEADER)?, &stolen)?;
        // The echoes know all paths.
        sleep(Duration::from_secs(4));
        Ok(String::new())
    })?;
    steps.required(
        "all_keys_are_replaced_under_load_and_nothing_is_lost",
        || under_load(&lab),
    )?;
    steps.step(
        "a_copy_of_the_old_key_gets_no_answer_and_one_of_the_new_key_does",
        || {
            let old = handshakes_with(&lab, &stolen)?;
            let new = handshakes_with(&lab, &key_file(&lab, LEADER)?)?;
            ensure!(new, "the control: the new key gets no answer either");
            ensure!(!old, "the old key gets an answer");
            Ok(String::new())
        },
    );
    Some(())
}

fn key_file(lab: &Lab, node: &str) -> anyhow::Result<PathBuf> {
    Ok(lab.node(node)?.outside("/var/lib/selvedge/key"))
}

fn status(lab: &Lab, node: &str) -> anyhow::Result<serde_json::Value> {
    let shown = lab.selvedge(Path::new(SELVEDGE), node, &["status", "--output=json"])?;
    Ok(serde_json::from_str(&shown)?)
}

fn public_key(lab: &Lab, node: &str) -> anyhow::Result<String> {
    let shown = status(lab, node)?;
    let key = shown["tunnel"]["public_key"].as_str();
    Ok(key.context("it has no key")?.to_owned())
}

fn end_of(lab: &Lab, node: &str) -> anyhow::Result<End> {
    let pod = lab.pod(node)?;
    Ok(End {
        name: format!("pod@{node}"),
        node: node.to_owned(),
        address: pod.address(),
        namespace: pod.namespace().path(),
    })
}

/// Replaces the keys of all nodes with an agent, while datagrams pass between the regions both ways.
fn under_load(lab: &Lab) -> anyhow::Result<String> {
    let names = lab.node_names();
    let nodes: Vec<&str> = names.iter().map(String::as_str).collect();
    let thorough = std::env::var_os("SELVEDGE_KEY_ROTATION").is_some();
    let wanted = if thorough { MILLION } else { 1 };
    let far = end_of(lab, MASTER)?;
    let near = nodes
        .iter()
        .filter(|node| **node != MASTER && **node != FOLLOWER);
    let pairs = near.map(|node| Ok((end_of(lab, node)?, far.clone())));
    let pairs = pairs.collect::<anyhow::Result<Vec<_>>>()?;
    let file = lab.directory().join("keys.pcap");
    let expression = "not udp port 51820 and not icmp";
    let capture = Capture::start_of(lab.network().internet(), &file, expression)?;
    let flows = Flows::start(&pairs)?;
    sleep(Duration::from_secs(1));
    let (mut sent, mut rounds) = (0, 0);
    let begun = std::time::Instant::now();
    while sent < wanted {
        let before = now();
        replace_all(lab, &nodes)?;
        let end = now();
        sleep(UNDER_WAY);
        sent += lossless(&flows, before, end)?;
        rounds += 1;
    }
    let findings = capture.finish(POD_NETWORK.parse()?)?;
    ensure!(findings.nothing_in_clear(), "in clear: {findings}");
    let took = begun.elapsed().as_secs_f64();
    Ok(format!(
        "0 of {sent} datagrams of {} flows lost while {} keys were replaced {rounds} times, in {took:.0} s",
        2 * pairs.len(),
        nodes.len()
    ))
}

/// How many datagrams were sent; fails if one is lost.
fn lossless(flows: &Flows, before: Time, end: Time) -> anyhow::Result<usize> {
    let reports = flows.report(&(before..end));
    for report in &reports {
        ensure!(report.lost == 0, "{} lost: {report}", report.lost);
        ensure!(report.sent > 1_000, "only {} sent: {report}", report.sent);
    }
    Ok(reports.iter().map(|report| report.sent).sum())
}

fn replace_all(lab: &Lab, nodes: &[&str]) -> anyhow::Result<()> {
    let keys = nodes.iter().map(|node| public_key(lab, node));
    let keys = keys.collect::<anyhow::Result<Vec<_>>>()?;
    for node in nodes {
        lab.selvedge(Path::new(SELVEDGE), node, &["rotate-key"])?;
    }
    for (node, before) in nodes.iter().zip(&keys) {
        let is_done = |shown: &serde_json::Value| {
            let tunnel = &shown["tunnel"];
            tunnel["public_key"] != before.as_str()
                && tunnel["next_key"].is_null()
                && tunnel["previous_key"].is_null()
        };
        wait_for(&format!("the new key of {node}"), REPLACED, || {
            status(lab, node).is_ok_and(|shown| is_done(&shown))
        })
        .with_context(|| lab.tail(node, "agent"))?;
        let kilos = lab.api().get(&format!("/api/v1/nodes/{node}"))?;
        let kilos = &kilos["metadata"]["annotations"]["kilo.squat.ai/key"];
        ensure!(
            *kilos == public_key(lab, node)?,
            "Kilo's annotation of {node} holds {kilos}"
        );
    }
    Ok(())
}

/// Whether the master's tunnel completes a handshake with a plain device on the internet that has this key.
fn handshakes_with(lab: &Lab, key: &Path) -> anyhow::Result<bool> {
    let internet = lab.network().internet();
    let link = "selvedge-copy";
    let _device = internet.spawn(&format!("{SELVEDGE} tunnel --foreground {link}"))?;
    let socket = PathBuf::from(format!("/var/run/wireguard/{link}.sock"));
    wait_for("the plain device", PATIENCE, || socket.exists())?;
    let master = public_key(lab, MASTER)?;
    internet.run(&format!(
        "wg set {link} private-key {} peer {master} endpoint {MASTER_PUBLIC}:51820 allowed-ips 10.99.0.0/16 persistent-keepalive 1",
        key.display()
    ))?;
    internet.run(&format!("ip link set {link} up"))?;
    let answered = wait_for("a handshake", Duration::from_secs(12), || {
        let shown = internet.run(&format!("wg show {link} latest-handshakes"));
        shown.is_ok_and(|shown| !shown.trim_end().ends_with("\t0") && !shown.is_empty())
    });
    Ok(answered.is_ok())
}
