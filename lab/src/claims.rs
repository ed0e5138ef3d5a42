//! Claims about a lab in which Selvedge runs, each of which a test states in its own name.
//!
//! They measure from outside: sockets, captures, `ip`, `nft`, `wg` and `/proc`, never the agent's
//! own opinion of itself, except where that opinion is the claim.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::controlplane::KUBERNETES_SERVICE;
use crate::lab::Lab;
use crate::matrix::Matrix;
use crate::process::wait_for;
use crate::topology::{MASTER, Site};
use crate::traffic::{KUBELET_PORT, PORT, Place, transfer};

/// Which address of a place is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The pod's address, or the node's `InternalIP`.
    OwnAddress,
    /// The address of the service in front of it.
    Service,
}

/// Every pod and host reaches every other, of all regions.
///
/// # Errors
///
/// When a pair does not answer; the error lists them.
pub fn everybody_reaches_everybody(lab: &Lab, by: By) -> anyhow::Result<String> {
    let places = lab.places();
    let matrix = ask(lab, &places, by);
    let failures = matrix.failures();
    ensure!(
        failures.is_empty(),
        "{} of {} pairs failed\n{matrix}\n{}",
        failures.len(),
        matrix.asked(),
        failures.join("\n")
    );
    Ok(format!("{} ordered pairs", matrix.asked()))
}

/// Exactly the pairs within one region reach each other, as flannel alone does it.
///
/// Hosts count as sources only: they reach public addresses without any overlay.
///
/// # Errors
///
/// When a pair of one region fails, or one of two regions answers.
pub fn only_regions_are_connected(lab: &Lab) -> anyhow::Result<String> {
    let places = lab.places();
    let matrix = Matrix::ask(&places, |to| to.pod.then_some((to.address, PORT)));
    let mut apart = 0;
    for from in &places {
        for to in places.iter().filter(|to| to.pod && to.name != from.name) {
            let expected = !lab.apart(&from.node, &to.node)?;
            apart += usize::from(!expected);
            ensure!(
                matrix.reached(&from.name, &to.name) == expected,
                "{} -> {}: expected {expected}\n{matrix}",
                from.name,
                to.name
            );
        }
    }
    Ok(format!("{apart} pairs of two regions, none answers"))
}

/// Every pod and host reaches every pod, of all regions, whatever the hosts' addresses are.
///
/// # Errors
///
/// When a pair does not answer.
pub fn everybody_reaches_every_pod(lab: &Lab) -> anyhow::Result<String> {
    let matrix = Matrix::ask(&lab.places(), |to| to.pod.then_some((to.address, PORT)));
    let failures = matrix.failures();
    ensure!(failures.is_empty(), "{matrix}\n{}", failures.join("\n"));
    Ok(format!("{} ordered pairs", matrix.asked()))
}

/// Inside each region everybody reaches everybody, hosts by their `InternalIP` too.
///
/// # Errors
///
/// When a pair of one region fails.
pub fn regions_are_undisturbed(lab: &Lab) -> anyhow::Result<String> {
    let places = lab.places();
    let mut asked = 0;
    for from in &places {
        for to in places.iter().filter(|to| to.name != from.name) {
            if lab.apart(&from.node, &to.node)? {
                continue;
            }
            let server = SocketAddr::from((to.address, PORT));
            crate::traffic::who(&from.namespace, server)
                .with_context(|| format!("{} -> {}", from.name, to.name))?;
            asked += 1;
        }
    }
    Ok(format!("{asked} ordered pairs"))
}

/// A server in a pod sees the address of the pod that called, for every pair of pods.
///
/// # Errors
///
/// When a pair fails, or when something translated the source on the way.
pub fn pods_keep_their_address(lab: &Lab) -> anyhow::Result<String> {
    let places = lab.places();
    let pods: Vec<Place> = places.into_iter().filter(|place| place.pod).collect();
    let matrix = ask(lab, &pods, By::OwnAddress);
    ensure!(matrix.failures().is_empty(), "{matrix}");
    for (from, to, seen) in matrix.seen() {
        let own = lab.place(from)?.address;
        ensure!(
            seen == IpAddr::V4(own),
            "{to} sees {from} ({own}) as {seen}"
        );
    }
    Ok(format!("{} ordered pairs", matrix.asked()))
}

/// Which pairs of places exchange bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    /// All.
    All,
    /// All but hosts of other regions to a host's public address: they reach it without any
    /// overlay, in clear, and that is their own business.
    BesidesPublicHosts,
}

/// Moves `bytes` each way between ordered pairs of places, and every byte arrives as sent.
///
/// # Errors
///
/// When a pair fails, stalls or delivers something else.
pub fn bytes_arrive_intact(lab: &Lab, bytes: u64, which: Pairs) -> anyhow::Result<String> {
    let places = lab.places();
    let mut slowest = (Duration::ZERO, String::new());
    let mut pairs = 0;
    for from in &places {
        for to in places.iter().filter(|to| to.name != from.name) {
            let direct = !from.pod && !to.pod && !to.address.is_private();
            if which == Pairs::BesidesPublicHosts && direct {
                continue;
            }
            let server = SocketAddr::from((to.address, PORT));
            let pair = format!("{} -> {}", from.name, to.name);
            let time = transfer(&from.namespace, server, bytes).with_context(|| pair.clone())?;
            pairs += 1;
            slowest = slowest.max((time, pair));
        }
    }
    let megabytes = bytes / 1_000_000;
    let (time, pair) = slowest;
    Ok(format!(
        "{megabytes} MB each way, {pairs} ordered pairs, the slowest {time:.1?} ({pair})"
    ))
}

/// Pods of every region reach the service `kubernetes`.
///
/// # Errors
///
/// When one does not.
pub fn pods_reach_the_api(lab: &Lab) -> anyhow::Result<String> {
    for name in lab.node_names() {
        let pod = lab.pod(&name)?;
        let server = SocketAddr::from((KUBERNETES_SERVICE, 443));
        pod.namespace()
            .within(|| std::net::TcpStream::connect_timeout(&server, Duration::from_secs(5)))
            .with_context(|| format!("pod on {name} -> {server}"))?;
    }
    Ok(String::new())
}

/// The master reaches the kubelet's port of every other node by its `InternalIP`.
///
/// # Errors
///
/// When one does not answer.
pub fn master_reaches_every_kubelet(lab: &Lab) -> anyhow::Result<String> {
    let places = lab.places();
    let master = lab.place(MASTER)?;
    for place in places
        .iter()
        .filter(|place| !place.pod && place.node != MASTER)
    {
        let kubelet = SocketAddr::from((place.address, KUBELET_PORT));
        crate::traffic::who(&master.namespace, kubelet).with_context(|| place.name.clone())?;
    }
    Ok(String::new())
}

/// One line of `wg show kilo0 dump`.
#[derive(Clone, Debug)]
pub struct WgPeer {
    /// Where its packets go; `(none)` if nowhere yet.
    pub endpoint: String,
    /// Its allowed IPs.
    pub allowed: BTreeSet<String>,
    /// Seconds since 1970 of the last handshake, 0 for never.
    pub handshake: u64,
    /// Its keepalive, `off` or seconds.
    pub keepalive: String,
}

/// What `wg show kilo0` tells on a node.
///
/// # Errors
///
/// When `wg` fails there.
pub fn wg_show(lab: &Lab, node: &str) -> anyhow::Result<Vec<WgPeer>> {
    let dump = lab.node(node)?.run("wg show kilo0 dump")?;
    let peer = |line: &str| {
        let fields: Vec<&str> = line.split('\t').collect();
        let [_, _, endpoint, allowed, handshake, _, _, keepalive] = fields[..] else {
            anyhow::bail!("wg show kilo0 dump: {line}");
        };
        Ok(WgPeer {
            endpoint: endpoint.to_owned(),
            allowed: allowed.split(',').map(str::to_owned).collect(),
            handshake: handshake.parse()?,
            keepalive: keepalive.to_owned(),
        })
    };
    // The first line is the device's own.
    dump.lines().skip(1).map(peer).collect()
}

/// What a leader must allow of another region: pod CIDRs, node addresses, the WireGuard IP.
///
/// # Errors
///
/// When a node of that region does not exist.
pub fn allowed_ips_of(
    lab: &Lab,
    site: Site,
    wireguard_ip: &str,
) -> anyhow::Result<BTreeSet<String>> {
    let mut allowed = BTreeSet::from([format!("{wireguard_ip}/32")]);
    for node in lab.network().nodes() {
        if lab.network().site(node.name())? == site {
            allowed.insert(format!("{}/32", node.address()));
            allowed.insert(lab.pod_cidr(node.name())?.to_string());
        }
    }
    Ok(allowed)
}

/// Whether a pod is answered by another place, asked until it is.
///
/// # Errors
///
/// When it is not within `patience`.
pub fn reached_within(
    lab: &Lab,
    from: &str,
    to: &str,
    patience: Duration,
) -> anyhow::Result<Duration> {
    let (from, to) = (lab.place(from)?, lab.place(to)?);
    let server = SocketAddr::from((to.address, PORT));
    let what = format!("{} -> {}", from.name, to.name);
    wait_for(&what, patience, || {
        crate::traffic::who(&from.namespace, server).is_ok()
    })
}

/// A pod's packet that fits flannel's link but not the tunnel is answered by "fragmentation needed"
/// from its own node, with a size that fits.
///
/// # Errors
///
/// When nobody answers, or somebody farther away does.
pub fn too_large_is_told_at_home(lab: &Lab, node: &str, to: Ipv4Addr) -> anyhow::Result<String> {
    let pod = lab.pod(node)?;
    // 1422 bytes of payload, 8 of ICMP, 20 of IP: what the pod's link of 1450 takes.
    let output = pod
        .namespace()
        .attempt(&format!("ping -M do -s 1422 -c 1 -W 2 {to}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = text
        .lines()
        .find(|line| line.contains("Frag needed"))
        .with_context(|| format!("no answer \"fragmentation needed\": {text}"))?;
    let home = lab.pod_cidr(node)?;
    let from: Ipv4Addr = complaint
        .split_whitespace()
        .nth(1)
        .and_then(|word| word.trim_end_matches(':').parse().ok())
        .with_context(|| complaint.to_owned())?;
    ensure!(
        home.contains(&from),
        "{node} is {home}, but was told by {from}"
    );
    Ok(complaint.trim().to_owned())
}

/// All that Selvedge has installed on a node, as text that is equal when the state is.
///
/// # Errors
///
/// When the node does not exist.
pub fn own_state(lab: &Lab, node: &str) -> anyhow::Result<String> {
    let node = lab.node(node)?;
    let mut state = String::new();
    for line in [
        "ip -4 rule",
        "ip -4 route show table 5130",
        "ip -4 route show table 5131",
        "ip -4 route show table 5132",
        "ip -4 -br address show dev kilo0",
        "ip -br link show dev kilo0",
        "nft -s list table inet selvedge",
    ] {
        // What is not there is state as well.
        let text = node.run(line).unwrap_or_else(|error| error.to_string());
        state += &format!("# {line}\n{text}\n");
    }
    Ok(state)
}

/// Breaks something on a node and waits until Selvedge's state is what it was; tells how long.
///
/// # Errors
///
/// When the command fails, or when the state is not back within `patience`; the
/// error shows what is there instead.
pub fn repaired_within(
    lab: &Lab,
    node: &str,
    command: &str,
    patience: Duration,
) -> anyhow::Result<Duration> {
    let before = own_state(lab, node)?;
    lab.node(node)?.run(command)?;
    let mut now = String::new();
    let what = format!("repair of `{command}` on {node}");
    // A repair can be faster than the first look, so "changed nothing" is not checked here.
    let outcome = wait_for(&what, patience, || {
        now = own_state(lab, node).unwrap_or_default();
        now == before
    });
    outcome.with_context(|| format!("before:\n{before}\nnow:\n{now}"))
}

/// The resident memory of an agent, in KiB.
///
/// # Errors
///
/// When it does not run.
pub fn resident_kib(pid: u32) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.context("no VmRSS")?.parse()?)
}

fn ask(lab: &Lab, places: &[Place], by: By) -> Matrix {
    Matrix::ask(places, |to| match by {
        By::OwnAddress => Some((to.address, PORT)),
        By::Service => Some((lab.service(to), PORT)),
    })
}
