//! A stand-in for Kilo's agent `kg` on a node, for meshes in which it and Selvedge live together.
//!
//! It behaves as `kg --cni=false --compatibility=flannel --local=false` of Kilo 0.7 does to others: the
//! annotations with the check-in, segments, leaders and positional WireGuard addresses, routes in table
//! main and in 1107, a userspace tunnel (wireguard-go), and the clean-up of a graceful end. It is not
//! Kilo's code and shares none with the product, so neither can be right by the other's mistakes.
//!
//! Left out: `Peer` objects, `allowed-location-ips`, full granularity, iptables (with these flags and
//! without Peers Kilo changes no packet). It checks in more often than `kg`, so that tests take less time.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::{self, Permissions};
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

use crate::client::Client;
use crate::controlplane::program;
use crate::lab::Lab;
use crate::process::{Process, wait_for};

/// Kilo checks in every 30 s, and publishes only then where it saw its peers.
const CHECK_IN: Duration = Duration::from_secs(5);
/// How often the cluster is looked at; `kg` watches it.
const LOOK: Duration = Duration::from_millis(300);
/// Seconds after which a silent node is forgotten.
const READY_WINDOW: i64 = 60;
/// What it takes back of its Node at a graceful end, all or nothing.
const WITHDRAWN: [&str; 7] = [
    "endpoint",
    "internal-ip",
    "key",
    "last-seen",
    "wireguard-ip",
    "discovered-endpoints",
    "granularity",
];

/// A running stand-in; ends gracefully by [`Kg::stop`], and as if killed when it is dropped.
#[derive(Debug)]
pub struct Kg {
    stop: Arc<AtomicBool>,
    worker: Option<JoinHandle<anyhow::Result<()>>>,
    tunnel: Option<Process>,
}

impl Kg {
    /// Starts it on a node on which no other agent runs, with the key that the node has already.
    ///
    /// # Errors
    ///
    /// When wireguard-go does not come up, or when there is a link `kilo0` already.
    pub fn start(lab: &Lab, name: &str) -> anyhow::Result<Self> {
        let node = lab.node(name)?;
        ensure!(
            node.run("ip link show kilo0").is_err(),
            "{name} has a link kilo0 already: kg cannot configure one that is not WireGuard's"
        );
        let IpAddr::V4(address) = node.address() else {
            bail!("{name} has no IPv4, the only family Kilo knows");
        };
        let key = node.outside("/var/lib/kilo/key");
        if !key.exists() {
            fs::create_dir_all(key.with_file_name(""))?;
            fs::write(&key, node.run("wg genkey")?.trim())?;
            fs::set_permissions(&key, Permissions::from_mode(0o600))?;
        }
        let mut tunnel = Command::new(program("wireguard-go")?);
        tunnel.args(["--foreground", "kilo0"]);
        let tunnel = node.spawn("kg-tunnel", tunnel)?;
        wait_for("wireguard-go", Duration::from_secs(20), || {
            node.tunnel_answers("kilo0")
        })
        .with_context(|| lab.tail(name, "kg-tunnel"))?;
        node.run("wg set kilo0 private-key /var/lib/kilo/key listen-port 51820")?;
        node.run("ip link set kilo0 mtu 1420")?;
        let machine = Machine {
            name: name.to_owned(),
            address,
            key: node.run("wg show kilo0 public-key")?.trim().to_owned(),
            pid: tunnel.pid(),
            conf: node.outside("/run/kg.conf"),
            log: node.log("kg"),
            api: lab.api().clone(),
            published: None,
            applied: Applied::default(),
        };
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let worker = std::thread::Builder::new()
            .name("lab-kg".to_owned())
            .spawn(move || machine.run(&stopped))?;
        Ok(Self {
            stop,
            worker: Some(worker),
            tunnel: Some(tunnel),
        })
    }

    /// Ends it as SIGTERM does, the pod's userspace tunnel with it.
    ///
    /// # Errors
    ///
    /// When something could not be taken back.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(worker) = self.worker.take() {
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        if let Some(tunnel) = self.tunnel.take() {
            tunnel.stop()?;
        }
        Ok(())
    }
}

impl Drop for Kg {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

/// The node as its `kg` knows it.
struct Machine {
    name: String,
    address: Ipv4Addr,
    key: String,
    /// wireguard-go's: its namespaces are the node's.
    pid: u32,
    conf: PathBuf,
    log: PathBuf,
    api: Client,
    /// What was published last, and when.
    published: Option<(Value, Instant)>,
    applied: Applied,
}

/// What it has done to the node.
#[derive(Default)]
struct Applied {
    link: String,
    conf: String,
    routes: BTreeSet<String>,
    rules: BTreeSet<String>,
}

/// A node that takes part.
#[derive(Debug)]
struct Ready {
    name: String,
    location: String,
    leader: bool,
    key: String,
    endpoint: SocketAddrV4,
    private: Option<Ipv4Addr>,
    pods: String,
    keepalive: u32,
    discovered: BTreeMap<String, SocketAddrV4>,
}

/// A segment, with its place in the order of all.
struct Segment<'a> {
    nodes: &'a [Ready],
    leader: &'a Ready,
    ip: Ipv4Addr,
    endpoint: SocketAddrV4,
}

impl Machine {
    fn run(mut self, stop: &AtomicBool) -> anyhow::Result<()> {
        while !stop.load(Ordering::Relaxed) {
            if let Err(error) = self.pass() {
                let before = fs::read_to_string(&self.log).unwrap_or_default();
                let _ = fs::write(&self.log, format!("{before}{error:#}\n"));
            }
            sleep(LOOK);
        }
        self.clean_up()
    }

    /// Runs a script on the node.
    fn sh(&self, script: &str) -> anyhow::Result<String> {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.pid));
        command.args(["--net", "--mount", "--uts", "sh", "-euc", script]);
        let output = command.output()?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{script}: {}", complaint.trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn pass(&mut self) -> anyhow::Result<()> {
        let list = self.api.get("/api/v1/nodes")?;
        let nodes = list["items"].as_array().context("a list of nodes")?;
        let now = unix_now();
        let segments = by_name(nodes.iter().filter_map(|node| read(node, now)));
        // What this node sees itself, then what others publish, in the order of segments and names.
        let mut discovered = self.heard()?;
        for node in segments.values().flatten() {
            for (key, endpoint) in &node.discovered {
                discovered.entry(key.clone()).or_insert(*endpoint);
            }
        }
        let segments: Vec<Segment<'_>> = segments
            .values()
            .zip(1..)
            .map(|(nodes, position)| segment(nodes, position, &discovered))
            .collect();
        let mine = segments
            .iter()
            .position(|segment| segment.nodes.iter().any(|node| node.name == self.name));
        let leads = mine.filter(|mine| segments[*mine].leader.name == self.name);
        let ip = leads.map(|mine| segments[mine].ip);
        let natted: BTreeSet<&str> = segments
            .iter()
            .flat_map(|segment| segment.nodes)
            .filter(|node| node.keepalive != 0)
            .map(|node| node.key.as_str())
            .collect();
        discovered.retain(|key, _| natted.contains(key.as_str()) && *key != self.key);
        let own = nodes
            .iter()
            .find(|node| node["metadata"]["name"] == json!(self.name));
        self.publish(own.context("this node")?, ip, &discovered)?;
        // It applies nothing while its own Node does not count.
        match mine {
            Some(mine) => self.apply(&segments, mine),
            None => Ok(()),
        }
    }

    /// Where the tunnel last heard each peer with which it had a handshake.
    fn heard(&self) -> anyhow::Result<BTreeMap<String, SocketAddrV4>> {
        let dump = self.sh("wg show kilo0 dump")?;
        let peers = dump.lines().skip(1).filter_map(|line| {
            let fields: Vec<&str> = line.split('\t').collect();
            let endpoint = fields.get(2)?.parse().ok()?;
            (*fields.get(4)? != "0").then(|| (fields[0].to_owned(), endpoint))
        });
        Ok(peers.collect())
    }

    /// Checks in when it is time, when something of it changed, or when it was taken away.
    fn publish(
        &mut self,
        own: &Value,
        ip: Option<Ipv4Addr>,
        discovered: &BTreeMap<String, SocketAddrV4>,
    ) -> anyhow::Result<()> {
        let annotation = |name: &str| own["metadata"]["annotations"][kilo(name)].as_str();
        let endpoint = annotation("force-endpoint")
            .or_else(|| annotation("endpoint"))
            .map_or_else(|| format!("{}:51820", self.address), str::to_owned);
        let private = is_private(self.address).then(|| format!("{}/24", self.address));
        let discovered: BTreeMap<_, _> = discovered
            .iter()
            .map(|(key, at)| (key, json!({"IP": at.ip(), "Port": at.port(), "Zone": ""})))
            .collect();
        let facts = json!({
            kilo("endpoint"): endpoint,
            kilo("internal-ip"): private.unwrap_or_default(),
            kilo("key"): self.key,
            kilo("wireguard-ip"): ip.map_or_else(String::new, |ip| format!("{ip}/16")),
            kilo("discovered-endpoints"): serde_json::to_string(&discovered)?,
            kilo("granularity"): "location",
            kilo("cni-compatibility-ip"): "",
        });
        let fresh = self
            .published
            .as_ref()
            .is_some_and(|(published, at)| *published == facts && at.elapsed() < CHECK_IN);
        if fresh && annotation("key") == Some(&self.key) {
            return Ok(());
        }
        let mut annotations = facts.clone();
        annotations[kilo("last-seen")] = json!(unix_now().to_string());
        let patch = json!({"metadata": {"annotations": annotations}});
        self.api
            .merge(&format!("/api/v1/nodes/{}", self.name), &patch)?;
        self.published = Some((facts, Instant::now()));
        Ok(())
    }

    fn apply(&mut self, segments: &[Segment<'_>], mine: usize) -> anyhow::Result<()> {
        let own = &segments[mine];
        let me = own.nodes.iter().find(|node| node.name == self.name);
        let me = me.context("a segment without its node")?;
        let leads = own.leader.name == self.name;
        let src = me
            .private
            .map_or_else(String::new, |ip| format!(" src {ip}"));
        let others = || {
            let others = segments.iter().enumerate();
            others
                .filter(move |(at, _)| *at != mine)
                .map(|(_, segment)| segment)
        };
        let (mut routes, mut rules) = (BTreeSet::new(), BTreeSet::new());
        if leads {
            for segment in others() {
                let via = format!("via {} dev kilo0 onlink proto static{src}", segment.ip);
                for node in segment.nodes {
                    routes.insert(format!("{} {via}", node.pods));
                    let private = node.private.filter(|ip| ip != segment.endpoint.ip());
                    routes.extend(private.map(|ip| format!("{ip}/32 {via}")));
                }
            }
            for node in own.nodes.iter().filter(|node| node.name != self.name) {
                let Some(ip) = node.private else { continue };
                let (via, to) = (first_address(&node.pods), format!("to {ip} iif kilo0"));
                routes.insert(format!(
                    "{ip}/32 via {via} dev flannel.1 onlink proto static table 1107"
                ));
                rules.insert(format!("{to} lookup 1107"));
            }
        } else {
            let via = first_address(&own.leader.pods);
            let via = format!("via {via} dev flannel.1 onlink proto static{src}");
            routes.extend(
                segments
                    .iter()
                    .map(|segment| format!("{}/32 {via}", segment.ip)),
            );
            for node in others().flat_map(|segment| segment.nodes) {
                routes.insert(format!("{} {via}", node.pods));
                routes.extend(node.private.map(|ip| format!("{ip}/32 {via}")));
            }
        }
        // The link before its routes, and routes go with a link that goes down.
        self.set_link(leads.then_some(own.ip))?;
        if leads {
            let peers: Vec<_> = others().collect();
            self.set_tunnel(&peers, me.keepalive)?;
        }
        self.set_routes(routes, rules)
    }

    fn set_link(&mut self, ip: Option<Ipv4Addr>) -> anyhow::Result<()> {
        let script = match ip {
            Some(ip) => format!(
                "ip -4 address flush dev kilo0; ip address add {ip}/16 dev kilo0; ip link set kilo0 up"
            ),
            // The address goes too: Kilo leaves it, and its owner then suffers (squat/kilo#393).
            None => "ip -4 address flush dev kilo0; ip link set kilo0 down".to_owned(),
        };
        if self.applied.link != script {
            self.sh(&script)?;
            // An address that goes takes the routes with it that name it.
            self.applied.routes.clear();
            self.applied.link = script;
        }
        Ok(())
    }

    fn set_tunnel(&mut self, peers: &[&Segment<'_>], keepalive: u32) -> anyhow::Result<()> {
        let mut conf = format!(
            "[Interface]\nListenPort = 51820\nPrivateKey = {}\n",
            self.sh("cat /var/lib/kilo/key")?.trim()
        );
        for segment in peers {
            let mut nets = Vec::new();
            for node in segment.nodes {
                nets.push(node.pods.clone());
                nets.extend(node.private.map(|ip| format!("{ip}/32")));
            }
            nets.push(format!("{}/32", segment.ip));
            write!(
                conf,
                "[Peer]\nPublicKey = {}\nAllowedIPs = {}\nEndpoint = {}\nPersistentKeepalive = {keepalive}\n",
                segment.leader.key,
                nets.join(", "),
                segment.endpoint
            )?;
        }
        if self.applied.conf != conf {
            fs::write(&self.conf, &conf)?;
            self.sh("wg syncconf kilo0 /run/kg.conf")?;
            self.applied.conf = conf;
        }
        Ok(())
    }

    fn set_routes(
        &mut self,
        routes: BTreeSet<String>,
        rules: BTreeSet<String>,
    ) -> anyhow::Result<()> {
        if self.applied.routes == routes && self.applied.rules == rules {
            return Ok(());
        }
        let mut script = String::new();
        for route in self.applied.routes.difference(&routes) {
            let destination = route.split(' ').next().unwrap_or_default();
            let table = if route.contains("table 1107") {
                1107
            } else {
                254
            };
            let kept = routes.iter().any(|other| other.starts_with(destination));
            if !kept {
                writeln!(
                    script,
                    "ip route delete {destination} proto static table {table} || true"
                )?;
            }
        }
        for route in &routes {
            writeln!(script, "ip route replace {route}")?;
        }
        for rule in self.applied.rules.difference(&rules) {
            writeln!(script, "ip rule delete {rule}")?;
        }
        for rule in rules.difference(&self.applied.rules) {
            writeln!(script, "ip rule add {rule}")?;
        }
        self.sh(&script)?;
        (self.applied.routes, self.applied.rules) = (routes, rules);
        Ok(())
    }

    /// Routes of table main, rules, annotations. Table 1107 and flannel's replaced routes are left as
    /// they are, which is Kilo's mistake.
    fn clean_up(mut self) -> anyhow::Result<()> {
        let stay = |route: &String| route.contains("table 1107");
        let left = self
            .applied
            .routes
            .iter()
            .filter(|route| stay(route))
            .cloned()
            .collect();
        self.set_routes(left, BTreeSet::new())?;
        let removed: serde_json::Map<_, _> = WITHDRAWN
            .iter()
            .map(|key| (kilo(key), Value::Null))
            .collect();
        let patch = json!({"metadata": {"annotations": removed}});
        self.api
            .merge(&format!("/api/v1/nodes/{}", self.name), &patch)?;
        Ok(())
    }
}

/// A Node that takes part at this moment; `None` for any other.
fn read(node: &Value, now: i64) -> Option<Ready> {
    let annotation = |name: &str| node["metadata"]["annotations"][kilo(name)].as_str();
    let endpoint = |name: &str| annotation(name)?.parse().ok();
    let last_seen: i64 = annotation("last-seen")?.parse().ok()?;
    if now - last_seen >= READY_WINDOW {
        return None;
    }
    let label = node["metadata"]["labels"]["topology.kubernetes.io/region"].as_str();
    let discovered: Value = annotation("discovered-endpoints")
        .and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or_default();
    let discovered = discovered.as_object().into_iter().flatten();
    Some(Ready {
        name: node["metadata"]["name"].as_str()?.to_owned(),
        location: annotation("location")
            .or(label)
            .unwrap_or_default()
            .to_owned(),
        leader: annotation("leader").is_some(),
        key: annotation("key")?.to_owned(),
        endpoint: endpoint("force-endpoint").or_else(|| endpoint("endpoint"))?,
        private: annotation("internal-ip").and_then(|text| text.split_once('/')?.0.parse().ok()),
        pods: node["spec"]["podCIDR"].as_str()?.to_owned(),
        keepalive: annotation("persistent-keepalive")
            .and_then(|text| text.parse().ok())
            .unwrap_or(0),
        discovered: discovered
            .filter_map(|(key, at)| {
                let port = u16::try_from(at["Port"].as_u64()?).ok()?;
                Some((
                    key.clone(),
                    SocketAddrV4::new(at["IP"].as_str()?.parse().ok()?, port),
                ))
            })
            .collect(),
    })
}

/// Nodes by the name of their segment, and in it by their own.
fn by_name(nodes: impl Iterator<Item = Ready>) -> BTreeMap<String, Vec<Ready>> {
    let mut segments = BTreeMap::<String, Vec<Ready>>::new();
    for node in nodes {
        let name = match node.private {
            Some(_) => format!("location:{}", node.location),
            None => format!("node:{}", node.name),
        };
        segments.entry(name).or_default().push(node);
    }
    for nodes in segments.values_mut() {
        nodes.sort_by(|one, other| one.name.cmp(&other.name));
    }
    segments
}

/// The k-th segment: its leader, its address, and where that is.
fn segment<'a>(
    nodes: &'a [Ready],
    position: u8,
    discovered: &BTreeMap<String, SocketAddrV4>,
) -> Segment<'a> {
    let public = |node: &&Ready| !is_private(*node.endpoint.ip());
    let leader = nodes
        .iter()
        .find(|node| node.leader && public(node))
        .or_else(|| nodes.iter().find(|node| node.leader))
        .or_else(|| nodes.iter().find(public))
        .unwrap_or(&nodes[0]);
    let seen = discovered
        .get(&leader.key)
        .filter(|_| leader.keepalive != 0);
    Segment {
        nodes,
        leader,
        ip: Ipv4Addr::new(10, 4, 0, position),
        endpoint: seen.copied().unwrap_or(leader.endpoint),
    }
}

fn kilo(name: &str) -> String {
    format!("kilo.squat.ai/{name}")
}

fn is_private(address: Ipv4Addr) -> bool {
    address.is_private()
}

fn first_address(net: &str) -> &str {
    net.split_once('/').map_or(net, |(address, _)| address)
}

fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    })
}
