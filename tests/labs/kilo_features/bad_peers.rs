//! Peers that the API server lets in, since it cannot know what nodes and other peers have, and that the
//! mesh leaves out: each gets an Event and a condition, and no other peer or node is affected.

use std::net::SocketAddr;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use selvedge_lab::topology::MASTER;
use selvedge_lab::traffic::{PORT, Stream};
use selvedge_lab::{Lab, claims, wait_for};
use serde_json::{Value, json};

use crate::clients::{PEERS, create_peer, on_the_master};
use crate::{FOLLOWER, LEADER, PATIENCE};

const EVENTS: &str = "/apis/events.k8s.io/v1/namespaces/default/events";
const GOOD: &str = "oGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=";
const OTHERS: [&str; 3] = [
    "zGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=",
    "yGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=",
    "xGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=",
];

/// The longest name that an object may have, 253 characters, all of one letter.
fn longest(letter: &str) -> String {
    let label = letter.repeat(63);
    [label.as_str(), &label, &label, &letter.repeat(61)].join(".")
}

/// Which peer of the master's and the leader's tunnel has which prefixes.
fn owners(lab: &Lab) -> anyhow::Result<Vec<String>> {
    let mut owners = Vec::new();
    for node in [MASTER, LEADER] {
        let dump = lab.node(node)?.run("wg show kilo0 allowed-ips")?;
        let lines = dump.lines().filter(|line| !line.ends_with("(none)"));
        owners.extend(lines.map(|line| format!("{node} {line}")));
    }
    owners.sort();
    Ok(owners)
}

pub(super) fn left_out_with_event_and_condition(lab: &Lab) -> anyhow::Result<String> {
    let spec = |net: &str, key: &str| json!({"allowedIPs": [net], "publicKey": key});
    let (good, last) = (longest("g"), longest("b"));
    create_peer(lab, &good, &spec("10.10.13.1/32", GOOD))?;
    on_the_master(lab, &["10.10.13.1/32"])?;
    // Ages are in whole seconds, and of equal ones the name decides.
    sleep(Duration::from_millis(1100));

    let server = SocketAddr::from((lab.pod(FOLLOWER)?.address(), PORT));
    let stream = Stream::start_warm(&lab.pod(MASTER)?.namespace().path(), server)?;
    let before = owners(lab)?;
    let leaders_key = lab.node(LEADER)?.run("wg show kilo0 public-key")?;
    let node_ip = format!("{}/32", lab.node(FOLLOWER)?.address());
    let bad = [
        ("a-nodes-address", node_ip.as_str(), OTHERS[0]),
        ("around-another-peer", "10.10.13.0/24", OTHERS[1]),
        ("a-nodes-key", "10.10.13.9/32", leaders_key.trim()),
        ("another-peers-key", "10.10.13.10/32", GOOD),
        (last.as_str(), "10.10.13.1/32", OTHERS[2]),
    ];
    for (name, net, key) in bad {
        create_peer(lab, name, &spec(net, key))?;
    }
    for (name, ..) in bad {
        let mut seen = Value::Null;
        wait_for("an Event and a condition", PATIENCE, || {
            let event = lab.api().get(EVENTS).is_ok_and(|events| {
                let mut events = events["items"].as_array().into_iter().flatten();
                events.any(|event| {
                    event["regarding"]["name"] == name && event["reportingController"] == "selvedge"
                })
            });
            let peer = lab.api().get(&format!("{PEERS}/{name}"));
            seen = peer.map_or(Value::Null, |peer| peer["status"]["conditions"][0].clone());
            event && seen["type"] == "Accepted" && seen["status"] == "False"
        })
        .with_context(|| format!("{name}: {seen}\n{}", lab.tail(MASTER, "agent")))?;
    }
    let after = owners(lab)?;
    ensure!(after == before, "{after:#?} instead of {before:#?}");
    for (name, ..) in bad {
        lab.api().delete(&format!("{PEERS}/{name}"))?;
    }
    lab.api().delete(&format!("{PEERS}/{good}"))?;
    wait_for("the good peer's end", PATIENCE, || {
        let peers = claims::wg_show(lab, MASTER).unwrap_or_default();
        let mut nets = peers.iter().flat_map(|peer| &peer.allowed);
        !nets.any(|net| net.starts_with("10.10.13."))
    })?;
    let report = stream.stop()?;
    ensure!(report.lost() == 0, "{report}");
    Ok(format!("{} peers left out; {report}", bad.len()))
}
