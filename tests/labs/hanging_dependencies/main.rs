//! Dependencies that hang: an `nft` that hangs, a DNS server that stops answering, and one whose answers
//! change. Everything else continues, and unanswered requests are repeated.
//!
//! Uses the lab's stand-ins for flannel and the API server. The hanging program and server are visible in
//! one node's view of the file system only, so they affect no other node and no other test.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use selvedge::kernel::Rtnetlink;
use selvedge_lab::claims;
use selvedge_lab::lab::{Mesh, Options, Parts};
use selvedge_lab::netns::unique_prefix;
use selvedge_lab::topology::{MASTER, Shape};
use selvedge_lab::traffic::Servers;
use selvedge_lab::{Lab, scratch, wait_for};
use serde_json::json;

mod dns;

use dns::Dns;

const SELVEDGE: &str = env!("CARGO_BIN_EXE_selvedge");
const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/selvedge-k3s.yaml");

/// The data centre's leader; `node-agent-02` follows it.
const LEADER: &str = "node-agent-01";

/// Everything here takes the agent at most half a minute: so often names are looked up, and so long it
/// leaves `nft` alone and waits for it.
const PATIENCE: Duration = Duration::from_secs(120);

/// Within which an agent acts while `nft` hangs, on a host that has nothing else to do. 50 ms of it are spent on
/// waiting for further changes.
const PROMPT: Duration = Duration::from_millis(100);
/// The same on a host that is busy with other tests.
const LATE: Duration = Duration::from_secs(3);
/// How often each is measured; together they take longer than the 10 s for which `nft` is waited for.
const TURNS: usize = 13;

#[expect(clippy::disallowed_methods, reason = "a test measures")]
fn now() -> std::time::Instant {
    std::time::Instant::now()
}

/// Looks every millisecond.
fn wait_until(is_so: impl Fn() -> bool) {
    let end = now() + PATIENCE;
    while !is_so() {
        assert!(now() < end, "nothing happens");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn mesh() -> Mesh<'static> {
    Mesh::annotated(Path::new(SELVEDGE), Path::new(MANIFEST))
}

fn lab(label: &str) -> Lab {
    let options = Options {
        shape: Shape {
            agents: 2,
            ..Shape::default()
        },
        parts: Parts::StandIns,
        ..Options::default()
    };
    Lab::up(&unique_prefix(), scratch(label).unwrap(), options, &|_| {}).unwrap()
}

/// A shell script in a node's own view of the file system.
fn sh(lab: &Lab, node: &str, script: &str) {
    let file = lab.directory().join(format!("{node}.sh"));
    fs::write(&file, script).unwrap();
    let line = format!("sh -eu {}", file.display());
    lab.node(node).unwrap().run(&line).unwrap();
}

fn reached(lab: &Lab, from: &str, to: &str) {
    let time = claims::reached_within(lab, from, to, PATIENCE).unwrap();
    eprintln!("{from} -> {to}: after {time:.1?}");
}

#[test]
fn an_nft_that_hangs_holds_up_the_firewall_alone() {
    let mut lab = lab("hanging-nft");
    let _servers = Servers::start(&lab.places()).unwrap();
    lab.join(&mesh()).unwrap();
    // In the leader's network, but past its view of the file system.
    let firewall = |lab: &Lab| {
        let leader = lab.node(LEADER).unwrap().namespace();
        leader.run("nft -s list table inet selvedge").unwrap()
    };
    let before = firewall(&lab);
    sh(
        &lab,
        LEADER,
        "printf '#!/bin/sh\\nexec sleep 6000\\n' >/run/nft-that-hangs
         chmod +x /run/nft-that-hangs
         mount --bind /run/nft-that-hangs \"$(readlink -f \"$(command -v nft)\")\"",
    );

    // From the first hang on: a change of the API's is followed, a route that is gone comes back, and the
    // agent answers, while nft hangs and afterwards, when it is left alone.
    let table = lab.node(LEADER).unwrap().namespace();
    let table = table.within(|| Rtnetlink::open("kilo0").unwrap());
    let has_route = |prefix: &str| {
        let routes = table.observe().unwrap().routes;
        routes
            .keys()
            .any(|key| key.dst.to_string() == prefix && key.metric == 0)
    };
    let mut followed = Vec::new();
    let mut repaired = Vec::new();
    let mut answered = Vec::new();
    for turn in 0..TURNS {
        let prefix = format!("10.78.{turn}.0/24");
        let annotation = ("kilo.squat.ai/allowed-location-ips", Some(prefix.as_str()));
        lab.api().annotate(MASTER, &[annotation]).unwrap();
        let begun = now();
        wait_until(|| has_route(&prefix));
        followed.push(begun.elapsed());

        let begun = now();
        lab.node(LEADER)
            .unwrap()
            .namespace()
            .run(&format!("ip route del {prefix} table 5130 metric 0"))
            .unwrap();
        let gone = now();
        wait_until(|| has_route(&prefix));
        repaired.push(gone.elapsed().min(begun.elapsed()));

        let begun = now();
        let (status, _) = lab.ask_agent(LEADER, "/health").unwrap();
        answered.push(begun.elapsed());
        assert_eq!(status, 200);
        std::thread::sleep(Duration::from_secs(1));
    }
    for (what, mut times) in [
        ("a change of the API is in the kernel", followed),
        ("a route that is gone is back", repaired),
        ("/health answers", answered),
    ] {
        times.sort();
        let (shortest, median) = (times[0], times[times.len() / 2]);
        let longest = times[times.len() - 1];
        eprintln!(
            "{what}: {shortest:.1?} at best, {median:.1?} in the median, {longest:.1?} at worst"
        );
        assert!(shortest <= PROMPT, "{what}: {times:?}");
        // Other programs of the host may delay any of them; nft would hold each up for 10 s.
        assert!(longest <= LATE, "{what}: {times:?}");
    }
    assert_eq!(firewall(&lab), before, "the stand-in did not stand in");

    // Needs a route and an element of the firewall's.
    let location_ips = ("kilo.squat.ai/allowed-location-ips", Some("10.77.0.0/24"));
    lab.api().annotate(MASTER, &[location_ips]).unwrap();

    let route = |lab: &Lab| {
        let routes = lab.node(LEADER).unwrap().run("ip route show table 5130");
        routes.unwrap().contains("10.77.0.0/24 ")
    };
    let time = wait_for("the new route", PATIENCE, || route(&lab)).unwrap();
    eprintln!("the new route: after {time:.1?}");
    let told = |lab: &Lab| {
        let log = fs::read_to_string(lab.node(LEADER).unwrap().log("agent")).unwrap();
        log.contains("the program nft took longer than 10 s")
    };
    wait_for("the complaint", PATIENCE, || told(&lab)).unwrap();
    let (status, body) = lab.ask_agent(LEADER, "/ready").unwrap();
    assert!(status == 503 && body.contains("nft"), "{status}: {body}");
    // Removed routes are still restored while `nft` hangs.
    for turn in 0..3 {
        lab.node(LEADER)
            .unwrap()
            .run("ip route del 10.77.0.0/24 table 5130 metric 0")
            .unwrap();
        let time = wait_for("the route's repair", PATIENCE, || route(&lab)).unwrap();
        eprintln!("repair {turn}: after {time:.1?}");
    }
    reached(&lab, "pod@node-agent-01", "pod@node-master");
    assert_eq!(firewall(&lab), before, "the stand-in did not stand in");
    let pid = lab.agent(LEADER).unwrap().pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let children = children.split_whitespace().count();
    assert!(children <= 1, "{children} of them pile up");

    sh(
        &lab,
        LEADER,
        "umount -l \"$(readlink -f \"$(command -v nft)\")\"",
    );

    let time = wait_for("the firewall", PATIENCE, || {
        firewall(&lab).contains("10.77.0.0/24")
    })
    .unwrap();
    eprintln!("the firewall: {time:.1?} after nft answered again");
    lab.wait_agents(PATIENCE).unwrap();
}

#[test]
fn an_endpoint_by_name_is_followed_and_kept_while_nobody_answers() {
    const MOVES: &str = "master.selvedge.test";
    const SILENT: &str = "laptop.selvedge.test";
    const SERVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 53);
    const OLD: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
    const NEW: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 11);
    const LAPTOP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 77);
    const KEY: &str = "CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk=";

    let mut lab = lab("names");
    let _servers = Servers::start(&lab.places()).unwrap();
    let internet = lab.network().internet();
    internet
        .run(&format!("ip address add {SERVER}/24 dev br0"))
        .unwrap();
    let dns = Dns::start(internet, SERVER).unwrap();
    dns.answer(MOVES, Some(OLD));
    dns.answer(SILENT, Some(LAPTOP));
    for node in lab.node_names() {
        sh(
            &lab,
            &node,
            &format!(
                "echo 'nameserver {SERVER}\noptions timeout:1 attempts:1' >/run/names
                 echo 'hosts: files dns' >/run/order
                 for pair in names:/etc/resolv.conf order:/etc/nsswitch.conf; do
                     # It may lead to where the host's own resolver keeps it, which nodes do not see.
                     file=$(readlink -m \"${{pair#*:}}\")
                     mkdir -p \"$(dirname \"$file\")\"
                     [ -e \"$file\" ] || touch \"$file\"
                     mount --bind \"/run/${{pair%%:*}}\" \"$file\"
                 done"
            ),
        );
    }
    lab.api()
        .create(
            "/apis/kilo.squat.ai/v1alpha1/peers",
            &json!({
                "apiVersion": "kilo.squat.ai/v1alpha1", "kind": "Peer", "metadata": {"name": "laptop"},
                "spec": {"allowedIPs": ["10.10.10.10/32"], "publicKey": KEY,
                    "endpoint": {"dnsOrIP": {"dns": SILENT}, "port": 51820}},
            }),
        )
        .unwrap();
    let mesh = mesh();
    lab.annotate_nodes().unwrap();
    let endpoint = format!("{MOVES}:51820");
    let endpoint = ("kilo.squat.ai/force-endpoint", Some(endpoint.as_str()));
    lab.api().annotate(MASTER, &[endpoint]).unwrap();
    for node in lab.node_names() {
        lab.start_agent(mesh.binary, &node, mesh.access, mesh.flags)
            .unwrap();
    }
    let called = |lab: &Lab, node: &str, place: Ipv4Addr| {
        let place = format!("{place}:51820");
        let peers = claims::wg_show(lab, node).unwrap_or_default();
        peers.iter().any(|peer| peer.endpoint == place)
    };
    reached(&lab, "pod@node-agent-02", "pod@node-master");
    assert!(called(&lab, LEADER, OLD));
    for node in [MASTER, LEADER] {
        wait_for("the laptop's name", PATIENCE, || called(&lab, node, LAPTOP)).unwrap();
    }

    // The master moves: neither does it hear what comes to the old address, nor speak from there.
    let master = lab.node(MASTER).unwrap();
    master
        .namespace()
        .sh(&format!(
            "ip address add {NEW}/24 dev eth0
             nft add table ip moved
             nft add chain ip moved in '{{ type filter hook input priority -300; }}'
             nft add chain ip moved out '{{ type filter hook output priority -300; }}'
             nft add rule ip moved in ip daddr {OLD} udp dport 51820 drop
             nft add rule ip moved out ip saddr {OLD} udp sport 51820 drop"
        ))
        .unwrap();
    let from = lab.place("pod@node-agent-02").unwrap();
    let to = lab.place("pod@node-master").unwrap();
    let server = (to.address, selvedge_lab::traffic::PORT).into();
    let cut = selvedge_lab::traffic::source_seen(&from.namespace, server);
    assert!(cut.is_err(), "the control: no node follows the new address");
    dns.answer(SILENT, None);
    dns.answer(MOVES, Some(NEW));

    let time = wait_for("the new address", PATIENCE, || called(&lab, LEADER, NEW)).unwrap();
    eprintln!("the new address: after {time:.1?}");
    reached(&lab, "pod@node-agent-02", "pod@node-master");
    reached(&lab, "pod@node-master", "pod@node-agent-02");

    let asked = wait_for("unanswered lookups", PATIENCE, || {
        // Each of the three nodes asks for both families.
        dns.unanswered(SILENT) >= 6
    })
    .unwrap();
    eprintln!("look-ups without an answer: after {asked:.1?} more");
    // They give up after a second for each of both families.
    std::thread::sleep(Duration::from_secs(4));
    for node in [MASTER, LEADER] {
        assert!(
            called(&lab, node, LAPTOP),
            "{node} forgot the last good address"
        );
    }
}
