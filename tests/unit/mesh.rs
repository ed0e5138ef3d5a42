//! Whole clusters as values: what the agent of each node sees, and what it does about it.
//!
//! Shared by the tests and the example. No kernel, no API server.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;

use ipnet::IpNet;
use selvedge::cluster::{ParseSettings, node, peer};
use selvedge::diff::{Change, diff};
use selvedge::flannel::{Backend, Flannel, Mac, Vtep, device_name};
use selvedge::plan::{self, Inputs, plan};
use selvedge::policy::{Encapsulation, OnTunnelDown, Relaying};
use selvedge::probe::Verdicts;
use selvedge::state::{NextHop, State};
use selvedge::topology::{
    self, Claim, Endpoint, ExternalPeer, Granularity, LeaderCount, Ledger, Node, NodeName,
    OtherKeys, RegionName, Resolved, SegmentName, Snapshot, Topology,
};
use selvedge::wireguard::key::PublicKey;
use selvedge::wireguard::{PeerConfig, PeerId};
use serde::Deserialize;

/// A cluster, the flags its agents were given, and the flannel they run beside.
#[derive(Clone, Debug)]
pub(crate) struct Mesh {
    pub(crate) snapshot: Snapshot,
    pub(crate) resolved: Resolved,
    pub(crate) now: i64,
    pub(crate) agreed: topology::Settings,
    pub(crate) local: plan::Settings,
    pub(crate) backend: Backend,
    pub(crate) direct_routing: bool,
    pub(crate) api_servers: BTreeSet<IpAddr>,
    pub(crate) observed: BTreeMap<PublicKey, SocketAddr>,
    pub(crate) connected: BTreeSet<IpNet>,
    pub(crate) other_rules: Vec<selvedge::state::OtherRule>,
    pub(crate) callers: BTreeSet<PublicKey>,
    pub(crate) verdicts: Verdicts,
    pub(crate) mtus: BTreeMap<PeerId, u32>,
}

impl Mesh {
    /// A cluster with the flags of the manifests: VXLAN, pods in 10.42.0.0/16 and fd42::/48.
    pub(crate) fn new(nodes: impl IntoIterator<Item = Node>) -> Self {
        let nodes = nodes.into_iter();
        Self {
            snapshot: Snapshot {
                nodes: nodes.map(|node| (node.name.clone(), node)).collect(),
                ..Snapshot::default()
            },
            resolved: Resolved::new(),
            now: 0,
            agreed: topology::Settings {
                granularity: Granularity::Location,
                // Tests of several leaders ask for more.
                leaders_per_region: leaders(1),
                subnets: vec![net("10.4.0.0/16")],
                service_cidrs: vec![net("10.43.0.0/16")],
                internal_cidrs: vec![],
                alias_pools: vec![],
                region_networks: BTreeMap::new(),
                // Where no node looks like Kilo's this changes nothing.
                beside_kilo: true,
                cluster_networks: vec![net("10.42.0.0/16"), net("fd42::/48")],
            },
            local: plan::Settings {
                interface: "kilo0".into(),
                mtu: 1420,
                path_mtu: None,
                port: NonZeroU16::new(51820).expect("not zero"),
                fwmark: 0x51e0_0000,
                rule_priority: 5190,
                encapsulation: Encapsulation::CrossSubnet,
                on_tunnel_down: OnTunnelDown::Closed,
                service_cidrs: vec![net("10.43.0.0/16")],
                peer_internet: false,
                relaying: Relaying::Auto,
            },
            backend: Backend::Vxlan,
            direct_routing: false,
            api_servers: BTreeSet::new(),
            observed: BTreeMap::new(),
            connected: BTreeSet::new(),
            other_rules: Vec::new(),
            callers: BTreeSet::new(),
            verdicts: Verdicts::default(),
            mtus: BTreeMap::new(),
        }
    }

    /// Reads a List of Nodes and Peers, as `kubectl get … -o yaml` prints it.
    pub(crate) fn from_yaml(text: &str) -> Result<Self, serde_yaml_ng::Error> {
        #[derive(Deserialize)]
        struct List {
            items: Vec<serde_yaml_ng::Value>,
        }

        let mut mesh = Self::new([]);
        for item in serde_yaml_ng::from_str::<List>(text)?.items {
            if item.get("kind").and_then(|kind| kind.as_str()) == Some("Peer") {
                let (peer, _) = peer::parse(&serde_yaml_ng::from_value(item)?);
                mesh.add_peers(peer);
            } else {
                let object = serde_yaml_ng::from_value(item)?;
                let (node, _) = node::parse(&object, &ParseSettings::default());
                let node = node.map(|node| (node.name.clone(), node));
                mesh.snapshot.nodes.extend(node);
            }
        }
        Ok(mesh)
    }

    pub(crate) fn add_peers(&mut self, peers: impl IntoIterator<Item = ExternalPeer>) {
        let peers = peers.into_iter().map(|peer| (peer.name.clone(), peer));
        self.snapshot.peers.extend(peers);
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &NodeName> {
        self.snapshot.nodes.keys()
    }

    pub(crate) fn node(&mut self, name: &str) -> &mut Node {
        self.snapshot
            .nodes
            .get_mut(&NodeName(name.into()))
            .expect("no such node")
    }

    pub(crate) fn topology(&self) -> Topology {
        Topology::new(&self.snapshot, &self.agreed, &self.resolved, self.now)
    }

    /// flannel on a node, everything in place.
    pub(crate) fn flannel(&self, me: &NodeName) -> Flannel {
        let node = &self.snapshot.nodes[me];
        let vtep = |subnet: &IpNet| Vtep {
            name: device_name(1, is_v6(subnet)),
            index: 3,
            vni: 1,
            port: 8472,
            mac: Mac([2, 0, 0, 0, 0, 1]),
            mtu: 1450,
            local: None,
            parent: Some("eth0".into()),
            addresses: vec![subnet.network().into()],
        };
        let vteps = match self.backend {
            Backend::Vxlan => node.pod_cidrs.iter().map(vtep).collect(),
            Backend::HostGw => vec![],
        };
        let others = self.snapshot.nodes.values().filter(|n| n.name != *me);
        let mut others = others.collect::<Vec<_>>();
        // Of two nodes with the same pods the older one keeps the route.
        others.sort_by_key(|node| std::cmp::Reverse((node.created, &node.name)));
        let next_hops = others
            .into_iter()
            .flat_map(|other| other.pod_cidrs.iter().map(move |pods| (other, pods)))
            .filter_map(|(other, pods)| Some((*pods, self.flannel_hop(node, other, pods)?)));
        Flannel {
            backend: self.backend,
            direct_routing: self.direct_routing,
            networks: self
                .agreed
                .cluster_networks
                .iter()
                .filter(|n| node.pod_cidrs.iter().any(|pods| is_v6(pods) == is_v6(n)))
                .copied()
                .collect(),
            subnets: node.pod_cidrs.clone(),
            mtu: 1450,
            vteps,
            next_hops: next_hops.collect(),
        }
    }

    /// flannel's route: directly where the backend does so inside a subnet, else by VXLAN.
    fn flannel_hop(&self, me: &Node, other: &Node, pods: &IpNet) -> Option<NextHop> {
        let direct = || {
            let (mine, theirs) = (me.private_ip?, other.private_ip?.addr());
            let near = mine.contains(&theirs) && mine.addr() != theirs;
            (near && theirs.is_ipv6() == is_v6(pods)).then(|| NextHop {
                via: Some(theirs),
                dev: "eth0".into(),
                onlink: false,
            })
        };
        let vxlan = || {
            me.pod_cidrs.iter().find(|own| is_v6(own) == is_v6(pods))?;
            Some(NextHop {
                via: Some(pods.network()),
                dev: device_name(1, is_v6(pods)),
                onlink: true,
            })
        };
        match self.backend {
            Backend::HostGw => direct(),
            Backend::Vxlan if self.direct_routing => direct().or_else(vxlan),
            Backend::Vxlan => vxlan(),
        }
    }

    /// What a node should have, or nothing where it should leave things as they are.
    pub(crate) fn plan(&self, topology: &Topology, me: &NodeName) -> Option<State> {
        self.plan_beside(&self.flannel(me), topology, me)
    }

    /// The same beside another flannel than [`Self::flannel`].
    pub(crate) fn plan_beside(
        &self,
        flannel: &Flannel,
        topology: &Topology,
        me: &NodeName,
    ) -> Option<State> {
        plan(&Inputs {
            topology,
            me,
            flannel,
            settings: &self.local,
            api_servers: &self.api_servers,
            observed: &self.observed,
            connected: &self.connected,
            other_rules: &self.other_rules,
            callers: &self.callers,
            verdicts: &self.verdicts,
            mtus: &self.mtus,
        })
    }

    pub(crate) fn state(&self, me: &str) -> State {
        let state = self.plan(&self.topology(), &NodeName(me.into()));
        state.expect("the cluster knows the node")
    }

    /// What an operator would type on a fresh node.
    pub(crate) fn commands(&self, me: &str) -> String {
        lines(&diff(&State::default(), &self.state(me)))
    }

    /// Those of [`Self::commands`] that begin with one of these words.
    pub(crate) fn commands_of(&self, me: &str, wanted: &[&str]) -> String {
        let changes = diff(&State::default(), &self.state(me));
        let wanted = |line: &String| wanted.iter().any(|start| line.starts_with(start));
        let lines = changes.iter().map(ToString::to_string).filter(wanted);
        lines.map(|line| line + "\n").collect()
    }
}

pub(crate) fn leaders(count: u8) -> LeaderCount {
    LeaderCount::new(count).expect("a number in the range 1 to 8")
}

pub(crate) fn lines(changes: &[Change]) -> String {
    changes.iter().map(|change| format!("{change}\n")).collect()
}

pub(crate) fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub(crate) fn is_v6(net: &IpNet) -> bool {
    net.addr().is_ipv6()
}

/// A key that is easy to distinguish from others.
pub(crate) fn key(seed: u8) -> PublicKey {
    PublicKey([seed; 32])
}

/// The peer with this key.
pub(crate) fn peer_with(state: &State, key: PublicKey) -> &PeerConfig {
    let mut peers = state.peers.values();
    peers
        .find(|peer| peer.public_key == key)
        .expect("no peer has this key")
}

/// A node with an agent of ours, Ready, with a private address and pods, and nothing else.
pub(crate) fn node(name: &str, region: &str, seed: u8, address: &str) -> Node {
    let address = net(address);
    Node {
        name: NodeName(name.into()),
        created: i64::from(seed),
        region: RegionName(region.into()),
        region_declared: false,
        public_key: Some(key(seed)),
        endpoint: Some(Endpoint::Addr(SocketAddr::new(address.addr(), 51820))),
        endpoint_forced: false,
        internal_ips: vec![address.addr()],
        external_ips: vec![],
        private_ip: (!topology::is_public(address.addr())).then_some(address),
        private_ip_forced: false,
        pod_cidrs: vec![net(&format!("10.42.{seed}.0/24"))],
        wireguard_ips: vec![],
        leader: false,
        ready: true,
        persistent_keepalive: None,
        allowed_location_ips: vec![],
        discovered_endpoints: BTreeMap::new(),
        aliases: vec![],
        candidates: Vec::new(),
        granularity: None,
        last_seen: None,
        ours: true,
        ledger: Ledger::default(),
        other_keys: OtherKeys::default(),
        relay_forbidden: false,
        lease: None,
    }
}

/// A ledger in which a node records all that it claims, but for a lead, at `since` in Unix seconds.
pub(crate) fn recorded(node: &Node, since: i64) -> Ledger {
    let addresses = node.internal_ips.iter().copied();
    let private = node.private_ip.iter().chain(&node.wireguard_ips);
    let addresses = addresses.chain(private.map(IpNet::addr));
    let addresses = addresses.chain(node.aliases.iter().copied());
    let key = node.public_key.map(Claim::Key);
    let place = SegmentName::Location(node.region.clone());
    let region = node.private_ip.map(|_| Claim::Region(place));
    let claims = addresses.map(Claim::Address).chain(key).chain(region);
    Ledger::default().renewed(claims, Some(since))
}

/// Adds what tests vary.
pub(crate) trait With: Sized {
    fn with(self, change: impl FnOnce(&mut Self)) -> Self;
}

impl<T> With for T {
    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}

pub(crate) fn addr(text: &str) -> Option<Endpoint> {
    Some(Endpoint::Addr(text.parse().expect("an endpoint")))
}

pub(crate) fn vpn_peer(name: &str, seed: u8, allowed_ips: &[&str]) -> ExternalPeer {
    ExternalPeer {
        name: name.into(),
        created: i64::from(seed),
        public_key: key(seed),
        preshared_key: None,
        endpoint: None,
        persistent_keepalive: 0,
        allowed_ips: allowed_ips.iter().map(|text| net(text)).collect(),
    }
}
