//! The cluster with its agents, the flows between the two regions, and which node carries them.

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use selvedge_lab::lab::{Mesh, ONE_LEADER, Options};
use selvedge_lab::topology::{MASTER_PUBLIC, Nat, Shape, Third, public_address};
use selvedge_lab::traffic::flows::{End, Flows, Time, now};
use selvedge_lab::{Lab, claims};

use super::{FOLLOWER, LEADER, MASTER, PATIENCE, RELAYS, THIRD_FOLLOWER, THIRD_LEADER};

const SELVEDGE: &str = env!("CARGO_BIN_EXE_selvedge");
const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/selvedge-k3s.yaml");

/// What flows without a gap of [`STEADY_GAP`] for this long is steady.
const STEADY: Duration = Duration::from_secs(1);
const STEADY_GAP: Duration = Duration::from_millis(200);
/// For how long relayed datagrams are counted.
const COUNTING: Duration = Duration::from_millis(500);

/// The routers of the two regions, each with the address of the other.
const NATS: [(&str, &str); 2] = [("nat1", "203.0.113.30"), ("nat2", "203.0.113.20")];

/// By then both leaders have taken another UDP port.
const PORTS_TRIED: Duration = Duration::from_secs(25);

/// Where the pools of WireGuard addresses begin, and the port of relayed datagrams.
const RELAYED: &str = "10.4.";

pub(super) fn options() -> Options {
    Options {
        shape: Shape {
            agents: 2,
            third: Third::Distinct,
            clouds: 1,
            nat: Nat::Symmetric,
            ..Shape::default()
        },
        ..Options::default()
    }
}

/// The cluster.
pub(super) struct Field {
    lab: Lab,
    joined: Instant,
}

impl Field {
    pub(super) fn new(lab: Lab) -> Self {
        let joined = Instant::now();
        Self { lab, joined }
    }

    pub(super) const fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Starts the agents, and counts on the public nodes what they relay.
    pub(super) fn join(&mut self) -> anyhow::Result<String> {
        for leader in [LEADER, THIRD_LEADER] {
            let lead = ("kilo.squat.ai/leader", Some("true"));
            self.lab.api().annotate(leader, &[lead])?;
        }
        for (node, public) in RELAYS
            .into_iter()
            .zip([MASTER_PUBLIC, public_address(1, 1)])
        {
            let endpoint = format!("{public}:51820");
            let endpoint = ("kilo.squat.ai/force-endpoint", Some(&*endpoint));
            self.lab.api().annotate(node, &[endpoint])?;
            // After the agent's own rules.
            self.lab
                .node(node)?
                .namespace()
                .sh("nft add table inet carried
                 nft add counter inet carried relayed
                 nft add chain inet carried forwarded '{ type filter hook forward priority 300; }'
                 nft add rule inet carried forwarded iifname kilo0 oifname kilo0 udp dport 51820 \
                     counter name relayed")?;
        }
        // With DROP, flannel's rules accept what pods send, and a host must accept what it relays.
        self.lab.policy_of_forward("ACCEPT")?;
        let ready = self.lab.join(&mesh())?;
        self.joined = Instant::now();
        Ok(format!("after {ready:.1?}"))
    }

    /// Has the NATs keep a host's port towards every destination. They forget what led from one to the other: a Linux
    /// router gives a new flow the port of another one of the same host, and attempts renew it.
    ///
    /// Before, both leaders have taken another port, since they got no answer.
    pub(super) fn make_cones(&self) -> anyhow::Result<()> {
        sleep(PORTS_TRIED.saturating_sub(self.joined.elapsed()));
        let network = self.lab.network();
        for (router, _) in NATS {
            network.translate(router, Nat::Cone)?;
        }
        for (router, other) in NATS {
            let forget = format!("conntrack -D -p udp --orig-dst {other} || true");
            network.router(router)?.sh(&forget)?;
        }
        Ok(())
    }

    pub(super) fn kill_agent(&mut self, node: &str) -> anyhow::Result<()> {
        self.lab.take_agent(node)?.kill();
        Ok(())
    }

    pub(super) fn start_agent(&mut self, node: &str) -> anyhow::Result<()> {
        let mesh = mesh();
        self.lab
            .restart_agent(mesh.binary, node, mesh.access, mesh.flags)?;
        self.lab.wait_agents(PATIENCE)?;
        Ok(())
    }

    /// The endpoint that a leader has of the leader behind the other NAT.
    fn endpoint(&self, at: &str, of: &str) -> Option<String> {
        let key = self.lab.annotation(of, "kilo.squat.ai/key").ok()?;
        let peers = claims::wg_show(&self.lab, at).ok()?;
        let peer = peers.into_iter().find(|peer| peer.key == key)?;
        (peer.handshake > 0).then_some(peer.endpoint)
    }

    fn endpoints_begin_with(&self, begins: [&str; 2]) -> bool {
        let pairs = [(LEADER, THIRD_LEADER), (THIRD_LEADER, LEADER)];
        pairs.into_iter().zip(begins).all(|((at, of), begin)| {
            let endpoint = self.endpoint(at, of);
            endpoint.is_some_and(|endpoint| endpoint.starts_with(begin))
        })
    }

    /// Whether both leaders behind NATs send to each other through a relay.
    pub(super) fn is_relayed(&self) -> bool {
        self.endpoints_begin_with([RELAYED, RELAYED])
    }

    /// Whether both send to each other's router.
    pub(super) fn is_direct(&self) -> bool {
        self.endpoints_begin_with(["203.0.113.30:", "203.0.113.20:"])
    }

    fn end(&self, node: &str) -> anyhow::Result<End> {
        let pod = self.lab.pod(node)?;
        Ok(End {
            name: format!("pod@{node}"),
            node: node.to_owned(),
            address: pod.address(),
            namespace: pod.namespace().path(),
        })
    }

    /// Starts flows between pods of the two regions: of their leaders and of their followers.
    pub(super) fn flows(&self) -> anyhow::Result<Flows> {
        let pair = |one, other| anyhow::Ok((self.end(one)?, self.end(other)?));
        Flows::start(&[pair(LEADER, THIRD_LEADER)?, pair(FOLLOWER, THIRD_FOLLOWER)?])
    }

    /// Waits until all flows arrive without a gap.
    pub(super) fn settle(&self, flows: &Flows) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        sleep(STEADY);
        while !flows.flow_since(now() - STEADY, STEADY_GAP, |_, _| true) {
            if begun.elapsed() > PATIENCE {
                bail!("the flows do not arrive\n{}", self.evidence());
            }
            sleep(Duration::from_millis(50));
        }
        Ok(begun.elapsed())
    }

    /// How many datagrams each public node has relayed so far.
    fn relayed(&self, node: &str) -> anyhow::Result<u64> {
        let namespace = self.lab.node(node)?.namespace();
        let text = namespace.run("nft list counter inet carried relayed")?;
        let mut words = text.split_whitespace();
        words.find(|word| *word == "packets");
        let packets = words.next().context("nft list counter: no packets")?;
        Ok(packets.parse()?)
    }

    fn relayed_now(&self) -> anyhow::Result<Vec<(u64, &'static str)>> {
        let count = || -> anyhow::Result<Vec<u64>> {
            RELAYS.iter().map(|node| self.relayed(node)).collect()
        };
        let before = count()?;
        sleep(COUNTING);
        let passed = count()?.into_iter().zip(before);
        let passed = passed.map(|(after, before)| after - before);
        Ok(passed.zip(RELAYS).collect())
    }

    /// The node that relays most now.
    pub(super) fn relay(&self) -> anyhow::Result<&'static str> {
        let most = self.relayed_now()?.into_iter().max();
        let (count, node) = most.context("no node may relay")?;
        if count == 0 {
            bail!("no node relays\n{}", self.evidence());
        }
        Ok(node)
    }

    /// How many datagrams any node relays within an instant.
    pub(super) fn carried_by_relays(&self) -> anyhow::Result<u64> {
        Ok(self
            .relayed_now()?
            .into_iter()
            .map(|(count, _)| count)
            .sum())
    }

    /// How many packets in a capture are between pods of the two regions.
    pub(super) fn inner_packets(&self, file: &Path) -> anyhow::Result<usize> {
        let net = |node: &str| anyhow::Ok(format!("net {}", self.lab.pod_cidr(node)?));
        let either =
            |one: &str, other: &str| anyhow::Ok(format!("({} or {})", net(one)?, net(other)?));
        let expression = format!(
            "{} and {}",
            either(LEADER, FOLLOWER)?,
            either(THIRD_LEADER, THIRD_FOLLOWER)?
        );
        let namespace = self.lab.node(MASTER)?.namespace();
        let mut command = namespace.command("tcpdump");
        command.args(["-n", "-r"]).arg(file).arg(expression);
        let output = command.output()?;
        if !output.status.success() {
            bail!("tcpdump -r: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).lines().count())
    }

    /// The counters of what an agent dropped.
    fn drops(&self, node: &str) -> anyhow::Result<String> {
        let (_, metrics) = self.lab.ask_agent(node, "/metrics")?;
        let is_drop =
            |line: &&str| line.contains("drop") && !line.starts_with('#') && !line.ends_with(" 0");
        Ok(metrics
            .lines()
            .filter(is_drop)
            .collect::<Vec<_>>()
            .join("\n"))
    }

    /// What the nodes know, for the message of a failure.
    pub(super) fn evidence(&self) -> String {
        let mut text = String::new();
        for name in [LEADER, THIRD_LEADER, RELAYS[0], RELAYS[1]] {
            let shown = self
                .lab
                .node(name)
                .and_then(|node| node.run("wg show kilo0"));
            let shown = shown.unwrap_or_else(|error| error.to_string());
            let status = self.lab.selvedge(Path::new(SELVEDGE), name, &["status"]);
            let status = status.unwrap_or_else(|error| error.to_string());
            let drops = self.drops(name).unwrap_or_else(|error| error.to_string());
            text += &format!(
                "[{name}] {shown}\n{drops}\n{status}\n{}\n",
                self.lab.tail(name, "agent")
            );
        }
        text
    }
}

fn mesh() -> Mesh<'static> {
    Mesh::labelled(Path::new(SELVEDGE), Path::new(MANIFEST), &ONE_LEADER)
}

/// What all flows felt together.
#[derive(Debug, Default)]
pub(super) struct Felt {
    pub(super) sent: usize,
    pub(super) lost: usize,
    pub(super) gap: Duration,
    which: String,
}

impl fmt::Display for Felt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            sent,
            lost,
            gap,
            which,
        } = self;
        write!(
            f,
            "{lost} of {sent} datagrams lost, longest gap {gap:.2?} ({which})"
        )
    }
}

pub(super) fn worst(flows: &Flows, within: &Range<Time>) -> Felt {
    let mut felt = Felt::default();
    for report in flows.report(within) {
        felt.sent += report.sent;
        felt.lost += report.lost;
        if report.gap >= felt.gap {
            felt.gap = report.gap;
            felt.which = report.to_string();
        }
    }
    felt
}
