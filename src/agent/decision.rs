//! What follows from what is known: the topology, this node's desired state, what it publishes. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;

use ipnet::IpNet;

use super::endpoint_discovery::Keys;
use super::key_rotation::OwnKeys;
use super::mtu;
use super::publication;
use crate::cluster::Annotations;
use crate::config::Config;
use crate::flannel::Flannel;
use crate::plan::{
    self, Candidates, Caveat, candidates, observed_addresses, plan, relayed_candidates,
};
use crate::probe::{Sizes, Verdicts};
use crate::state::{OtherRule, State};
use crate::topology::{
    self, Endpoint, InterfaceAddr, Ledger, Resolved, SegmentName, Snapshot, Topology,
};
use crate::wireguard::PeerId;
use crate::wireguard::key::PublicKey;

/// Everything that is decided on, gathered by the [`Controller`](super::controller::Controller).
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The cluster.
    pub snapshot: Arc<Snapshot>,
    /// The last good address of each name.
    pub resolved: Arc<Resolved>,
    /// The reader's clock in Unix seconds, which only Kilo's algorithm looks at.
    pub unix_now: i64,
    /// flannel; `None` while it is awaited.
    pub flannel: Option<Flannel>,
    /// The addresses on this node's links.
    pub links: Vec<InterfaceAddr>,
    /// Those of them at which the tunnel may be offered to others.
    pub offered: Vec<IpAddr>,
    /// The networks this node is connected to.
    pub connected: BTreeSet<IpNet>,
    /// The routing policy rules of other programs.
    pub other_rules: Vec<OtherRule>,
    /// The MTU in bytes of the link that leads out.
    pub underlay_mtu: Option<u32>,
    /// The API servers that this node's kubelet and agent use.
    pub api_servers: BTreeSet<IpAddr>,
    /// Where the tunnel heard each peer with which its session is alive. For one behind a relay it is its WireGuard
    /// address.
    pub alive: BTreeMap<PublicKey, SocketAddr>,
    /// The peers that have shown that they can call this node without being kept in a NAT's memory.
    pub callers: BTreeSet<PublicKey>,
    /// What echoes say of the leaders.
    pub verdicts: Verdicts,
    /// The MTUs of the paths to leaders of other regions, as far as they are measured.
    pub mtus: BTreeMap<PeerId, u32>,
    /// The leaders to which the tunnel sends through a relay.
    pub relayed: BTreeSet<PeerId>,
    /// The peers that never had a session but through a relay.
    pub only_relayed: BTreeSet<PublicKey>,
    /// The endpoint to publish for each peer that ever had a session: where the tunnel heard it, rate-limited
    /// for those that flap. None for a peer behind a relay.
    pub heard: BTreeMap<PublicKey, SocketAddr>,
    /// The UDP port to publish and to listen on; `None` for `--port`.
    pub listen_port: Option<u16>,
    /// When this node checked in, in Unix seconds; only published beside a real `kg`.
    pub last_seen: i64,
    /// The API server's time in Unix seconds, for claims that are new; `None` where it is not known.
    pub server_time: Option<i64>,
    /// The entries of this node's ledger that were handed out to be written and that the API does not show yet.
    pub pending: Ledger,
    /// The segment that this node has led for long enough to record it.
    pub lead: Option<SegmentName>,
}

/// What follows from the facts.
#[derive(Clone, Debug, Default)]
pub struct Decision {
    /// The topology.
    pub topology: Arc<Topology>,
    /// Whose each key is.
    pub keys: Keys,
    /// Where the peers may be.
    pub candidates: Candidates,
    /// The candidates of peers that lead through a relay.
    pub relayed: BTreeMap<PeerId, SocketAddr>,
    /// Where other leaders see this node, beside the addresses that it announces.
    pub seen: BTreeSet<SocketAddr>,
    /// What this node should have; `None` to leave all as it is.
    pub desired: Option<State>,
    /// What of that its operator should know.
    pub caveats: Vec<Caveat>,
    /// What its Node should carry; `None` while there is no such Node.
    pub annotations: Option<Annotations>,
    /// The names that stand in endpoints.
    pub names: BTreeSet<String>,
}

/// Draws the conclusions.
pub fn decide(facts: &Facts, config: &Config, keys: &OwnKeys) -> Decision {
    let networks = facts
        .flannel
        .as_ref()
        .map(|flannel| flannel.networks.clone())
        .unwrap_or_default();
    let topology = Topology::new(
        &facts.snapshot,
        &topology::Settings {
            granularity: config.granularity,
            leaders_per_region: config.leaders_per_region,
            subnets: config.subnets.clone(),
            alias_pools: config.alias_pools.clone(),
            service_cidrs: config.service_cidrs.clone(),
            internal_cidrs: config.internal_cidrs.clone(),
            region_networks: config.region_networks.clone(),
            beside_kilo: config.beside_kilo,
            cluster_networks: networks,
        },
        &facts.resolved,
        facts.unix_now,
    );
    let settings = settings(facts, config);
    let inputs = facts.flannel.as_ref().map(|flannel| plan::Inputs {
        topology: &topology,
        me: &config.node,
        flannel,
        settings: &settings,
        api_servers: &facts.api_servers,
        observed: &facts.alive,
        connected: &facts.connected,
        other_rules: &facts.other_rules,
        callers: &facts.callers,
        verdicts: &facts.verdicts,
        mtus: &facts.mtus,
    });
    let desired = inputs.as_ref().and_then(plan);
    let caveats = match (&inputs, &desired) {
        (Some(inputs), Some(desired)) => plan::caveats(inputs, desired),
        _ => Vec::new(),
    };
    let annotations = facts.snapshot.nodes.get(&config.node).map(|node| {
        publication::annotations(&publication::Inputs {
            node,
            snapshot: &facts.snapshot,
            topology: &topology,
            config,
            links: &facts.links,
            offered: &facts.offered,
            port: facts.listen_port.unwrap_or(config.port),
            public_key: keys.current,
            other_keys: keys.others,
            heard: &facts.heard,
            last_seen: facts.last_seen,
            server_time: facts.server_time,
            pending: &facts.pending,
            lead: facts.lead.as_ref(),
        })
    });
    Decision {
        names: names(&facts.snapshot),
        keys: Keys::new(&topology),
        candidates: candidates(&topology, &config.node),
        relayed: relayed_candidates(&topology, &config.node, &facts.verdicts),
        seen: topology
            .segment_of(&config.node)
            .into_iter()
            .flat_map(|own| &own.leaders)
            .flat_map(|leader| observed_addresses(&leader.candidates))
            .collect(),
        topology: Arc::new(topology),
        desired,
        caveats,
        annotations,
    }
}

/// The tunnel's MTU in bytes.
fn tunnel_mtu(facts: &Facts, config: &Config) -> u32 {
    mtu::of(config.mtu, facts.underlay_mtu, has_ipv6(facts, config))
}

/// The sizes that the paths to other regions may have; `None` where they are not measured.
pub fn sizes(facts: &Facts, config: &Config) -> Option<Sizes> {
    mtu::sizes(config.mtu, facts.underlay_mtu, has_ipv6(facts, config))
}

/// Whether the tunnel carries IPv6.
fn has_ipv6(facts: &Facts, config: &Config) -> bool {
    let inside = facts.flannel.iter().flat_map(|flannel| &flannel.networks);
    let mut inside = inside.chain(&config.subnets);
    inside.any(|net| net.addr().is_ipv6())
}

fn settings(facts: &Facts, config: &Config) -> plan::Settings {
    plan::Settings {
        interface: config.interface.clone(),
        mtu: tunnel_mtu(facts, config),
        path_mtu: sizes(facts, config).map(mtu::most),
        port: NonZeroU16::new(config.port).expect("--port is not 0"),
        fwmark: config.fwmark,
        rule_priority: config.rule_priority,
        encapsulation: config.encapsulation,
        on_tunnel_down: config.on_tunnel_down,
        service_cidrs: config.service_cidrs.clone(),
        peer_internet: config.peer_internet,
        relaying: config.relaying.clone(),
    }
}

fn names(snapshot: &Snapshot) -> BTreeSet<String> {
    let nodes = snapshot.nodes.values().map(|node| &node.endpoint);
    let peers = snapshot.peers.values().map(|peer| &peer.endpoint);
    nodes
        .chain(peers)
        .filter_map(|endpoint| match endpoint {
            Some(Endpoint::Dns { host, .. }) => Some(host.clone()),
            Some(Endpoint::Addr(_)) | None => None,
        })
        .collect()
}
