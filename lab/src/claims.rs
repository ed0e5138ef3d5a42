//! Claims about a lab in which Selvedge runs, each of which a test states in its own name.
//!
//! They measure from outside: sockets, captures, `ip`, `nft`, `wg` and `/proc`, never what
//! the agent reports, except where its report is the claim.
//!
//! A claim about addresses is one about those of one family: of the lab's primary one, or of that
//! which [`Lab::of`] names.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ipnet::IpNet;

use crate::controlplane::kubernetes_service;
use crate::dumps::Dumps;
use crate::family::Family;
use crate::lab::{Lab, Places};
use crate::matrix::Matrix;
use crate::process::wait_for;
use crate::topology::{MASTER, Site};
use crate::traffic::{KUBELET_PORT, PORT, Place, transfer};

/// The agent's routing tables.
const TABLES: [u32; 3] = [5130, 5131, 5132];

/// What a mesh may take to settle after its first pair of each kind answered: ten seconds, and five
/// times as much on a busy machine.
pub const SETTLING: Duration = Duration::from_secs(50);

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
pub fn all_places_reach_each_other(lab: &impl Places, by: By) -> anyhow::Result<String> {
    let places = lab.places();
    let matrix = ask(lab.lab(), &places, by);
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

/// The same, at the latest after a time: observed endpoints are published through the API, and while an
/// address still counts as a leader's endpoint, hosts send there directly.
///
/// # Errors
///
/// When a pair still does not answer; the error lists them.
pub fn all_places_come_to_reach_each_other(
    lab: &impl Places,
    by: By,
    patience: Duration,
) -> anyhow::Result<String> {
    let places = lab.places();
    let mut matrix = ask(lab.lab(), &places, by);
    let (asked, late) = (matrix.asked(), matrix.failures());
    let waited = wait_for("the mesh", patience, || {
        if !matrix.failures().is_empty() {
            matrix = ask(lab.lab(), &places, by);
        }
        matrix.failures().is_empty()
    });
    let waited = waited.with_context(|| format!("{matrix}\n{}", matrix.failures().join("\n")))?;
    if late.is_empty() {
        return Ok(format!("{asked} ordered pairs, all at once"));
    }
    let waited = waited.as_secs_f64();
    Ok(format!(
        "{asked} ordered pairs, after {waited:.1} s: at first not {}",
        late.join(", ")
    ))
}

/// Exactly the pairs within one region reach each other, as flannel alone does it.
///
/// Hosts count as sources only: they reach public addresses without any overlay.
///
/// # Errors
///
/// When a pair of one region fails, or one of two regions answers.
pub fn only_regions_are_connected(lab: &impl Places) -> anyhow::Result<String> {
    let places = lab.places();
    let matrix = Matrix::ask(&places, |to| to.pod.then_some((to.address, PORT)));
    let mut apart = 0;
    for from in &places {
        for to in places.iter().filter(|to| to.pod && to.name != from.name) {
            let expected = !lab.lab().apart(&from.node, &to.node)?;
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
pub fn all_places_reach_every_pod(lab: &impl Places) -> anyhow::Result<String> {
    let matrix = Matrix::ask(&lab.places(), |to| to.pod.then_some((to.address, PORT)));
    let failures = matrix.failures();
    ensure!(failures.is_empty(), "{matrix}\n{}", failures.join("\n"));
    Ok(format!("{} ordered pairs", matrix.asked()))
}

/// Inside each region all places reach each other, hosts by their `InternalIP` too.
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
            crate::traffic::source_seen(&from.namespace, server)
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
pub fn pods_keep_their_address(lab: &impl Places) -> anyhow::Result<String> {
    let places = lab.places();
    let pods: Vec<Place> = places.into_iter().filter(|place| place.pod).collect();
    let matrix = ask(lab.lab(), &pods, By::OwnAddress);
    ensure!(matrix.failures().is_empty(), "{matrix}");
    for (from, to, seen) in matrix.seen() {
        let own = lab.place(from)?.address;
        ensure!(seen == own, "{to} sees {from} ({own}) as {seen}");
    }
    Ok(format!("{} ordered pairs", matrix.asked()))
}

/// Which pairs of places exchange bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    /// All.
    All,
    /// All but hosts of other regions to a host's public address: they reach it without any
    /// overlay, in clear, which the mesh does not concern.
    BesidesPublicHosts,
}

/// Moves `bytes` each way between ordered pairs of places, and every byte arrives as sent.
///
/// # Errors
///
/// When a pair fails, stalls or delivers something else.
pub fn bytes_arrive_intact(lab: &impl Places, bytes: u64, which: Pairs) -> anyhow::Result<String> {
    let places = lab.places();
    let mut slowest = (Duration::ZERO, String::new());
    let mut pairs = 0;
    for from in &places {
        for to in places.iter().filter(|to| to.name != from.name) {
            let direct = !from.pod && !to.pod && is_public(to.address);
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

/// Whether the lab's internet routes an address.
fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_private(),
        IpAddr::V6(ip) => !ip.is_unique_local(),
    }
}

/// Pods of every region reach the service `kubernetes`.
///
/// # Errors
///
/// When one does not.
pub fn pods_reach_the_api(lab: &Lab) -> anyhow::Result<String> {
    for name in lab.node_names() {
        let pod = lab.pod(&name)?;
        let server = SocketAddr::from((kubernetes_service(lab.family()), 443));
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
pub fn master_reaches_every_kubelet(lab: &impl Places) -> anyhow::Result<String> {
    let places = lab.places();
    let master = lab.place(MASTER)?;
    for place in places
        .iter()
        .filter(|place| !place.pod && place.node != MASTER)
    {
        let kubelet = SocketAddr::from((place.address, KUBELET_PORT));
        crate::traffic::source_seen(&master.namespace, kubelet)
            .with_context(|| place.name.clone())?;
    }
    Ok(String::new())
}

/// One line of `wg show kilo0 dump`.
#[derive(Clone, Debug)]
pub struct WgPeer {
    /// Its public key.
    pub key: String,
    /// Where its packets go; `(none)` if nowhere yet.
    pub endpoint: String,
    /// Its allowed IPs.
    pub allowed: BTreeSet<String>,
    /// Seconds since 1970 of the last handshake, 0 for never.
    pub handshake: u64,
    /// Its keepalive, `off` or seconds.
    pub keepalive: String,
}

/// What `wg show kilo0` prints on a node.
///
/// # Errors
///
/// When `wg` fails there.
pub fn wg_show(lab: &Lab, node: &str) -> anyhow::Result<Vec<WgPeer>> {
    let dump = lab.node(node)?.run("wg show kilo0 dump")?;
    let peer = |line: &str| {
        let fields: Vec<&str> = line.split('\t').collect();
        let [key, _, endpoint, allowed, handshake, _, _, keepalive] = fields[..] else {
            anyhow::bail!("wg show kilo0 dump: {line}");
        };
        Ok(WgPeer {
            key: key.to_owned(),
            endpoint: endpoint.to_owned(),
            allowed: allowed.split(',').map(str::to_owned).collect(),
            handshake: handshake.parse()?,
            keepalive: keepalive.to_owned(),
        })
    };
    // The first line is the device's own.
    dump.lines().skip(1).map(peer).collect()
}

/// Waits until a leader's record of its lead is in its Node: a leader writes it once, after half a minute.
///
/// # Errors
///
/// When it is not there within a minute.
pub fn lead_is_recorded(lab: &Lab, leader: &str) -> anyhow::Result<()> {
    let what = format!("the record of {leader}'s lead");
    wait_for(&what, Duration::from_secs(60), || {
        let since = lab.annotation(leader, "selvedge.dev/since");
        since.is_ok_and(|ledger| ledger.contains("lead:"))
    })?;
    Ok(())
}

/// What a leader must allow each leader of another region: pod CIDRs, node addresses, the leaders' WireGuard IPs.
///
/// # Errors
///
/// When a node of that region does not exist.
pub fn allowed_ips_of(
    lab: &Lab,
    site: Site,
    wireguard_ips: &[&str],
) -> anyhow::Result<BTreeSet<String>> {
    let mut allowed: BTreeSet<String> = wireguard_ips.iter().map(|ip| format!("{ip}/32")).collect();
    for node in lab.network().nodes() {
        if lab.network().site(node.name())? == site {
            let addresses = node.addresses().iter().copied();
            allowed.extend(addresses.map(|address| IpNet::from(address).to_string()));
            let pods = lab.pod_cidrs(node.name())?;
            allowed.extend(pods.iter().map(ToString::to_string));
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
    lab: &impl Places,
    from: &str,
    to: &str,
    patience: Duration,
) -> anyhow::Result<Duration> {
    let (from, to) = (lab.place(from)?, lab.place(to)?);
    let server = SocketAddr::from((to.address, PORT));
    let what = format!("{} -> {}", from.name, to.name);
    wait_for(&what, patience, || {
        crate::traffic::source_seen(&from.namespace, server).is_ok()
    })
}

/// A pod's packet that fits its link but not the path to another region is answered by "fragmentation needed" or
/// "packet too big" from nodes of its own region: at last with the MTU of the leader's route, unless flannel's device
/// carries less.
///
/// # Errors
///
/// When there is no answer, or one from another region, or one with another size.
pub fn too_large_is_refused_in_its_region(
    lab: &Lab,
    node: &str,
    leader: &str,
    to: IpAddr,
) -> anyhow::Result<String> {
    let pod = lab.pod(node)?.namespace();
    let (headers, complaint) = match Family::of(to) {
        Family::V4 => (28, "Frag needed"),
        Family::V6 => (48, "Packet too big"),
    };
    let mut homes = Vec::new();
    for other in lab.node_names() {
        if !lab.apart(node, &other)? {
            homes.extend(lab.pod_cidrs(&other)?);
        }
    }
    let route = lab.node(leader)?.run(&format!("ip route get {to}"))?;
    let words = route.split_whitespace().skip_while(|word| *word != "mtu");
    let mtu: Option<u32> = words.filter_map(|word| word.parse().ok()).next();
    let mtu = mtu.with_context(|| format!("{leader} has {route}"))?;

    let mut size = 1450;
    let mut said = String::new();
    let mut is_own = false;
    while size > mtu {
        let line = format!("ping -M do -s {} -c 1 -W 2 {to}", size - headers);
        let output = pod.attempt(&line)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let complaint = text
            .lines()
            .find(|line| line.contains(complaint))
            .with_context(|| format!("no answer \"{complaint}\" to {size} bytes: {text}"))?;
        let from: IpAddr = complaint
            .split_whitespace()
            .nth(1)
            .and_then(|word| word.parse().ok())
            .with_context(|| complaint.to_owned())?;
        let at_home = homes.iter().any(|home| home.contains(&from));
        ensure!(at_home, "the region has {homes:?}, but {from} answered");
        let told = complaint.trim_end_matches(')').rsplit(['=', ' ']).next();
        let told: u32 = told.and_then(|size| size.parse().ok()).unwrap_or(size);
        ensure!(
            told < size,
            "{size} bytes, {leader} has {route}: {complaint}"
        );
        size = told;
        is_own = lab.pod_cidrs(node)?.iter().any(|own| own.contains(&from));
        complaint.trim().clone_into(&mut said);
    }
    ensure!(size == mtu || is_own, "{leader} has {route}: {said}");
    let line = format!("ping -M do -s {} -c 1 -W 2 {to}", size - headers);
    pod.run(&line)?;
    Ok(said)
}

/// Routes without their MTU: it is measured, and begins with a default when an agent starts.
fn without_mtu(routes: &str) -> String {
    let lines = routes.lines().map(|line| {
        let mut words = line.split_whitespace();
        let mut kept = Vec::new();
        while let Some(word) = words.next() {
            if word == "mtu" {
                words.next();
            } else {
                kept.push(word);
            }
        }
        kept.join(" ")
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// All that Selvedge has installed on a node, as text that is equal when the state is, the MTU of paths aside.
///
/// # Errors
///
/// When the node does not exist.
pub fn own_state(lab: &Lab, node: &str) -> anyhow::Result<String> {
    let node = lab.node(node)?;
    let mut state = String::new();
    let mut lines = vec![
        "ip -br link show dev kilo0".to_owned(),
        "nft -s list table inet selvedge".to_owned(),
    ];
    for family in lab.families() {
        let option = family.option();
        lines.push(format!("ip {option} rule"));
        for table in TABLES {
            lines.push(format!("ip {option} route show table {table}"));
        }
        lines.push(format!("ip {option} -br address show dev kilo0"));
    }
    for line in lines {
        // That something is missing is state as well.
        let text = node.run(&line).unwrap_or_else(|error| error.to_string());
        // A new link is in no known state until its carrier changes for the first time.
        let text = text.replace(" UNKNOWN ", " UP ");
        // The kernel lists IPv6 addresses by their age, which means nothing here.
        let mut words: Vec<&str> = text.split_whitespace().collect();
        words.sort_unstable();
        let text = if line.contains(" address ") {
            words.join(" ")
        } else if line.contains(" route ") {
            without_mtu(&text)
        } else {
            text
        };
        state += &format!("# {line}\n{text}\n");
    }
    Ok(state)
}

/// Deletes all that Selvedge has installed on a node of a family, and what belongs to no family, one
/// by one, and takes one next hop from each route of several; each is back within `patience`.
///
/// # Errors
///
/// When something is not; the error shows what is there instead.
pub fn what_is_deleted_is_repaired(
    lab: &Lab,
    node: &str,
    family: Family,
    patience: Duration,
) -> anyhow::Result<String> {
    let machine = lab.node(node)?;
    let option = family.option();
    let mut commands = vec!["nft delete table inet selvedge".to_owned()];
    for rule in machine.run(&format!("ip {option} rule"))?.lines() {
        if let Some((priority, _)) = rule.split_once(':')
            && (5190..5200).contains(&priority.parse::<u32>()?)
        {
            commands.push(format!("ip {option} rule delete priority {priority}"));
        }
    }
    ensure!(commands.len() > 2, "{node} has too few rules: {commands:?}");
    for table in TABLES {
        let routes = machine.run(&format!("ip {option} route show table {table}"));
        let routes = routes.unwrap_or_default();
        let mut head = "";
        let mut hops = 0;
        for line in routes.lines() {
            // The next hops of a route that has several follow it, one a line.
            if !line.starts_with(char::is_whitespace) {
                (head, hops) = (line, 0);
                commands.push(route_deletion(family, table, head));
                continue;
            }
            hops += 1;
            if hops == 1 {
                let hop = line.trim();
                commands.push(format!(
                    "ip {option} route replace {head} table {table} {hop}"
                ));
            }
        }
        if !routes.is_empty() {
            commands.push(format!("ip {option} route flush table {table}"));
        }
    }
    let addresses = machine.run(&format!("ip {option} -br address show dev kilo0"))?;
    for address in addresses
        .split_whitespace()
        .filter(|word| word.contains('/'))
    {
        commands.push(format!("ip address delete {address} dev kilo0"));
    }
    if addresses.contains('/') {
        commands.push("ip link set kilo0 down".to_owned());
    }
    commands.push("ip link delete kilo0".to_owned());
    let mut slowest = (Duration::ZERO, String::new());
    for command in &commands {
        let time = repaired_within(lab, node, command, patience)?;
        slowest = slowest.max((time, command.clone()));
    }
    let (time, command) = slowest;
    Ok(format!(
        "{} things, the slowest after {time:.2?}: {command}",
        commands.len()
    ))
}

/// The command that deletes a route, from the line that shows it.
fn route_deletion(family: Family, table: u32, route: &str) -> String {
    let words: Vec<&str> = route.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "metric");
    let metric = at.map_or(String::new(), |at| format!("metric {}", words[at + 1]));
    let target = match words[0] {
        "unreachable" | "blackhole" | "throw" => &words[..2],
        _ => &words[..1],
    };
    let (option, target) = (family.option(), target.join(" "));
    format!("ip {option} route delete {target} table {table} {metric}")
}

/// Breaks something on a node and waits until Selvedge's state is what it was; returns how long that took.
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

/// Agents that are stopped (those that still run are), and `selvedge cleanup` after them, leave every node as it was `before`.
///
/// # Errors
///
/// When a line of a dump differs; the error lists such lines.
pub fn cleanup_leaves_nothing(
    lab: &mut Lab,
    binary: &Path,
    before: &Dumps,
) -> anyhow::Result<String> {
    for name in lab.node_names() {
        if lab.agent(&name).is_some() {
            lab.take_agent(&name)?.stop()?;
        }
    }
    for name in lab.node_names() {
        let mut command = Command::new(binary);
        command.arg("cleanup");
        let output = lab.node(&name)?.output(command)?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "cleanup on {name}: {complaint}");
    }
    // flannel notices within five seconds that its rules are complete; nothing else moves.
    let mut difference = String::new();
    let outcome = wait_for("the dumps to be equal", Duration::from_secs(10), || {
        match Dumps::take(lab) {
            Ok(now) => difference = now.difference(before),
            Err(error) => difference = error.to_string(),
        }
        difference.is_empty()
    });
    outcome.with_context(|| difference.clone())?;
    let (nodes, commands) = before.size();
    Ok(format!("{commands} dumps on {nodes} nodes are equal"))
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
