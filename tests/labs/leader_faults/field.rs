//! The cluster with its agents, the flows between its pods, and which leaders carry them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sys::signal::Signal;
use selvedge_lab::capture::Capture;
use selvedge_lab::controlplane::POD_NETWORK;
use selvedge_lab::lab::{AGENT_FLAGS, Mesh};
use selvedge_lab::topology::{MASTER_PUBLIC, Site, beside_master};
use selvedge_lab::traffic::flows::{End, Flows, PORT, now};
use selvedge_lab::{Lab, wait_for};

use super::{FAR_MEMBER, LEADER, MASTER, MEMBER, PUBLIC, SECOND};

pub(super) const SELVEDGE: &str = env!("CARGO_BIN_EXE_selvedge");
const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/selvedge-k3s.yaml");

const LEAD: &str = "kilo.squat.ai/leader";

/// Further addresses of the follower's pod, so that some flow takes each path: the kernel chooses among next
/// hops by the addresses.
const MORE: [u8; 3] = [201, 202, 203];

/// How long all paths may take to be in use again after a fault; a path that was down several times in a row
/// waits for half a minute.
const SETTLING: Duration = Duration::from_secs(60);

/// How many looks in a row must find each flow on the same path.
const STEADY_LOOKS: u32 = 3;

/// A gap this short is the machine's.
const SHORT: Duration = Duration::from_millis(200);

/// Who sent, and to whom.
pub(super) type Pair = (IpAddr, IpAddr);

/// The cluster.
pub(super) struct Field {
    pub(super) lab: Lab,
    per_region: u8,
}

impl Field {
    pub(super) fn new(lab: Lab) -> Self {
        Self { lab, per_region: 2 }
    }

    /// Starts the agents, with two leaders a region.
    pub(super) fn join(&mut self) -> anyhow::Result<String> {
        let pod = self.lab.pod(MEMBER)?;
        let IpAddr::V4(address) = pod.address() else {
            bail!("the pods have IPv4");
        };
        let [a, b, c, _] = address.octets();
        for last in MORE {
            let line = format!("ip address add {a}.{b}.{c}.{last}/24 dev eth0");
            pod.namespace().run(&line)?;
        }
        self.annotate()?;
        for (node, public) in [(MASTER, MASTER_PUBLIC), (PUBLIC, beside_master(1))] {
            let endpoint = format!("{public}:51820");
            let endpoint = ("kilo.squat.ai/force-endpoint", Some(&*endpoint));
            self.lab.api().annotate(node, &[endpoint])?;
        }
        let flags = flags(self.per_region);
        let flags: Vec<_> = flags.iter().map(String::as_str).collect();
        let mesh = Mesh::labelled(Path::new(SELVEDGE), Path::new(MANIFEST), &flags);
        let ready = self.lab.join(&mesh)?;
        let flows = self.flows()?;
        let settled = self.settle(&flows, |_| true)?;
        Ok(format!(
            "ready after {ready:.1?}, all paths {settled:.1?} later"
        ))
    }

    /// Has this many leaders in each region, for which all agents start again.
    pub(super) fn lead_by(&mut self, per_region: u8) -> anyhow::Result<()> {
        if self.per_region == per_region {
            return Ok(());
        }
        self.per_region = per_region;
        self.annotate()?;
        let names = self.lab.node_names();
        for name in &names {
            self.lab
                .agent(name)
                .context("no agent")?
                .signal(Signal::SIGTERM);
        }
        for name in &names {
            self.lab.take_agent(name)?.stop()?;
            self.start_agent(name)?;
        }
        self.lab.wait_agents(SETTLING)?;
        let flows = self.flows()?;
        self.settle(&flows, |_| true)?;
        Ok(())
    }

    pub(super) fn start_agent(&mut self, node: &str) -> anyhow::Result<()> {
        let flags = flags(self.per_region);
        let flags: Vec<_> = flags.iter().map(String::as_str).collect();
        let mesh = Mesh::labelled(Path::new(SELVEDGE), Path::new(MANIFEST), &flags);
        self.lab
            .restart_agent(mesh.binary, node, mesh.access, mesh.flags)
    }

    /// The leaders as annotated.
    pub(super) fn leaders(&self) -> Vec<&'static str> {
        match self.per_region {
            1 => vec![LEADER, MASTER],
            _ => vec![LEADER, SECOND, MASTER, PUBLIC],
        }
    }

    /// Annotates the leaders, and no other node.
    pub(super) fn annotate(&self) -> anyhow::Result<()> {
        self.annotate_these(&self.leaders())
    }

    pub(super) fn annotate_these(&self, leaders: &[&str]) -> anyhow::Result<()> {
        for name in self.lab.node_names() {
            let lead = leaders.contains(&&*name).then_some("true");
            self.lab.api().annotate(&name, &[(LEAD, lead)])?;
        }
        Ok(())
    }

    fn ends_of(&self, node: &str) -> anyhow::Result<Vec<End>> {
        let pod = self.lab.pod(node)?;
        let mut ends = vec![End {
            name: format!("pod@{node}"),
            node: node.to_owned(),
            address: pod.address(),
            namespace: pod.namespace().path(),
        }];
        if node == MEMBER {
            for last in MORE {
                let mut end = ends[0].clone();
                if let IpAddr::V4(address) = end.address {
                    let [a, b, c, _] = address.octets();
                    end.address = [a, b, c, last].into();
                }
                end.name += &format!(".{last}");
                ends.push(end);
            }
        }
        Ok(ends)
    }

    /// Starts flows: of the follower's pod with those of a follower and a leader of the other region, and of the
    /// leaders' pods.
    pub(super) fn flows(&self) -> anyhow::Result<Flows> {
        let of = |node: &str| self.ends_of(node);
        let mut pairs = Vec::new();
        for far in [FAR_MEMBER, MASTER] {
            for near in of(MEMBER)? {
                pairs.push((near, of(far)?.remove(0)));
            }
        }
        pairs.push((of(LEADER)?.remove(0), of(MASTER)?.remove(0)));
        pairs.push((of(SECOND)?.remove(0), of(PUBLIC)?.remove(0)));
        self.count()?;
        Flows::start(&pairs)
    }

    /// Counts on all nodes which flows pass their tunnels.
    pub(super) fn count(&self) -> anyhow::Result<()> {
        let names = self.lab.node_names();
        names.iter().try_for_each(|name| self.count_on(name))
    }

    fn count_on(&self, node: &str) -> anyhow::Result<()> {
        let rule = |direction: &str| {
            format!(
                "nft add rule inet carried forwarded {direction} kilo0 udp dport {PORT} \
                 update @pairs '{{ ip saddr . ip daddr counter }}'\n"
            )
        };
        self.lab.node(node)?.namespace().sh(&format!(
            "nft add table inet carried
             nft delete table inet carried
             nft add table inet carried
             nft add set inet carried pairs \
                 '{{ type ipv4_addr . ipv4_addr; flags dynamic; size 1024; }}'
             nft add chain inet carried forwarded \
                 '{{ type filter hook forward priority 300; }}'
             {}{}",
            rule("iifname"),
            rule("oifname")
        ))?;
        Ok(())
    }

    fn forget_carried(&self, node: &str) -> anyhow::Result<()> {
        let namespace = self.lab.node(node)?.namespace();
        namespace.run("nft flush set inet carried pairs")?;
        Ok(())
    }

    /// Which flows passed each leader's tunnel within the last instants.
    pub(super) fn carried(&self) -> anyhow::Result<BTreeMap<&'static str, BTreeSet<Pair>>> {
        const LOOK: Duration = Duration::from_millis(300);
        for node in self.leaders() {
            self.forget_carried(node)?;
        }
        sleep(LOOK);
        let mut carried = BTreeMap::new();
        for node in self.leaders() {
            let namespace = self.lab.node(node)?.namespace();
            let text = namespace.run("nft list set inet carried pairs")?;
            carried.insert(node, pairs_in(&text));
        }
        Ok(carried)
    }

    /// The same, once flows have stayed where they are: a path that has just come back takes some over.
    pub(super) fn carried_steadily(
        &self,
    ) -> anyhow::Result<BTreeMap<&'static str, BTreeSet<Pair>>> {
        let mut last = self.carried()?;
        let mut same = 0;
        wait_for("flows that keep their paths", SETTLING, || {
            let now = self.carried().unwrap_or_default();
            same = if now == last { same + 1 } else { 0 };
            last = now;
            same == STEADY_LOOKS
        })?;
        Ok(last)
    }

    /// Waits until every leader carries flows of its region's follower, and nothing of what is between wanted ends is lost.
    pub(super) fn settle(
        &self,
        flows: &Flows,
        wanted: impl Fn(&End) -> bool,
    ) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        let far = self.ends_of(FAR_MEMBER)?.remove(0).address;
        let near = self.ends_of(MEMBER)?.into_iter();
        let near: BTreeSet<_> = near.map(|end| end.address).collect();
        let mut seen = String::new();
        while begun.elapsed() < SETTLING {
            let carried = self.carried()?;
            let all = carried.iter().all(|(node, pairs)| {
                let site = self.lab.network().site(node);
                let is_of_follower = |ip: &IpAddr| match site {
                    Ok(Site::Cloud) => *ip == far,
                    _ => near.contains(ip),
                };
                let mut pairs = pairs.iter();
                pairs.any(|(from, to)| is_of_follower(from) || is_of_follower(to))
            });
            let since = now() - Duration::from_millis(700);
            let flowing = flows.flow_since(since, SHORT, |from, to| wanted(from) && wanted(to));
            if all && flowing {
                return Ok(begun.elapsed());
            }
            seen = format!("carried: {carried:?}");
            let reports = flows.report(&(since..now()));
            for report in reports.iter().filter(|report| report.gap >= SHORT) {
                seen += &format!("\n{report}");
            }
        }
        bail!(
            "after {SETTLING:?} not all paths are in use: {seen}\n{}",
            self.evidence()
        )
    }

    /// What the nodes know, for the message of a failure.
    pub(super) fn evidence(&self) -> String {
        let mut text = String::new();
        for name in self.lab.node_names() {
            let Ok(node) = self.lab.node(&name) else {
                continue;
            };
            for line in ["ip route show table 5130", "wg show kilo0"] {
                let shown = node.run(line).unwrap_or_else(|error| error.to_string());
                text += &format!("[{name}] {line}\n{shown}\n");
            }
        }
        text
    }

    /// Begins to capture what crosses the internet, but for the tunnels.
    ///
    /// A node that boots answers its region's echoes by ICMP until its agent is up, and before flannel has its
    /// routes that takes the default route. It is of one region.
    pub(super) fn capture(&self, name: &str) -> anyhow::Result<Capture> {
        let file = self.lab.directory().join(format!("{name}.pcap"));
        let mut own = Vec::new();
        for node in [LEADER, SECOND, MEMBER] {
            own.push(format!("dst net {}", self.lab.pod_cidr(node)?));
        }
        let own = own.join(" or ");
        let expression =
            format!("not udp port 51820 and not (icmp and src net 192.168.50.0/24 and ({own}))");
        Capture::start_of(self.lab.network().internet(), &file, &expression)
    }

    /// Ends a capture, which must have seen nothing that was readable.
    pub(super) fn nothing_in_clear(&self, capture: Capture) -> anyhow::Result<()> {
        let file = capture.file().display().to_string();
        let findings = capture.finish(POD_NETWORK.parse()?)?;
        if !findings.nothing_in_clear() {
            let shown = format!("tcpdump -nr {file} -c 20 net {POD_NETWORK} or udp port 8472");
            let shown = self.lab.network().internet().run(&shown);
            bail!("in clear: {findings}: {}", shown.unwrap_or_default());
        }
        Ok(())
    }
}

fn flags(per_region: u8) -> Vec<String> {
    let flags = AGENT_FLAGS.into_iter().map(str::to_owned);
    flags
        .chain([format!("--leaders-per-region={per_region}")])
        .collect()
}

/// The elements of a set of pairs, as `nft` lists it.
fn pairs_in(text: &str) -> BTreeSet<Pair> {
    let elements = text.split_once("elements = {").map_or("", |(_, rest)| rest);
    let pair = |element: &str| {
        let mut words = element.split_whitespace();
        let from = words.next()?.parse().ok()?;
        let to = words.nth(1)?.parse().ok()?;
        Some((from, to))
    };
    elements.split(',').filter_map(pair).collect()
}
