//! The agent's [`Report`], put together from what it knows. Pure.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::controller::label;
use super::decision::{Decision, Facts};
use super::endpoint_discovery::Outcome;
use super::key_rotation::Progress;
use super::listen_port::ListenPort;
use crate::cluster::{ApiStatus, annotation};
use crate::config::{Config, Mtu};
use crate::flannel::Backend;
use crate::kernel::Counters;
use crate::liveness::PathState;
use crate::plan::Caveat;
use crate::policy::OnTunnelDown;
use crate::probe::{PathKind, PathStats};
use crate::state::State;
use crate::status::{
    Alias, Api, Candidate, Flannel, LeaderPath, Peer, Report, Role, Segment, Tunnel, Via,
};
use crate::topology::{Mode, OtherKeys, Topology};
use crate::wireguard::key::PublicKey;

/// What the tunnel says of a peer.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Traffic {
    /// Where it sends.
    pub endpoint: Option<SocketAddr>,
    /// The time since the last handshake; `None` where there was none.
    pub handshake_age: Option<Duration>,
    /// Bytes received.
    pub received: u64,
    /// Bytes sent.
    pub sent: u64,
    /// Whether it is not alive, or owes an answer.
    pub is_waiting: bool,
    /// What came of its candidates.
    pub candidates: Vec<Outcome>,
}

/// The state of this node's keys.
#[derive(Clone, Copy, Debug, Default)]
pub struct Keys {
    /// Seconds since the current key was put in place, where that is known.
    pub age: Option<u64>,
    /// The keys beside it.
    pub others: OtherKeys,
    /// How far a replacement is.
    pub progress: Progress,
}

/// What is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// The flags.
    pub config: &'a Config,
    /// This node's key.
    pub public_key: PublicKey,
    /// Its age, and what is beside it.
    pub keys: Keys,
    /// What the last pass looked at.
    pub facts: &'a Facts,
    /// What followed from it.
    pub decision: &'a Decision,
    /// How the API is reached.
    pub contact: &'a ApiStatus,
    /// Whether the cluster was read from the API, and not from the cache.
    pub live: bool,
    /// What was refused while reading the cluster's objects.
    pub rejected: &'a [String],
    /// What keeps the node from being as it should.
    pub problems: &'a [String],
    /// The tunnel's peers.
    pub traffic: &'a BTreeMap<PublicKey, Traffic>,
    /// The tunnel's port.
    pub listen_port: &'a ListenPort,
    /// Packets the tunnel dropped, by reason.
    pub drops: &'a BTreeMap<String, u64>,
    /// What the nft table counted; `None` where it could not be asked.
    pub counters: Option<Counters>,
    /// How often the cluster's state could not be written to disk.
    pub cache_failures: u64,
    /// The time of the report.
    pub now: Instant,
    /// The paths over which echoes are sent.
    pub paths: &'a [PathStats],
    /// How often the socket of the echoes failed.
    pub echo_failures: u64,
    /// How often traffic left a path, by cause.
    pub failovers: &'a BTreeMap<&'static str, u64>,
}

/// Puts the report together.
pub fn report(inputs: &Inputs<'_>) -> Report {
    let Inputs {
        config,
        facts,
        decision,
        ..
    } = inputs;
    let topology = &decision.topology;
    let segment = topology.segment_of(&config.node);
    let none = State::default();
    let desired = decision.desired.as_ref().unwrap_or(&none);
    let mut excluded = inputs.rejected.to_vec();
    excluded.extend(topology.excluded.iter().map(ToString::to_string));
    let (translated, overlaps): (Vec<_>, Vec<_>) = topology
        .overlaps
        .iter()
        .partition(|overlap| overlap.alias.is_some());
    excluded.extend(overlaps.into_iter().map(ToString::to_string));
    let is_connected = |caveat: &&Caveat| matches!(caveat, Caveat::Connected { .. });
    let connected = decision.caveats.iter().filter(is_connected);
    let connected = connected.map(ToString::to_string).collect::<Vec<_>>();

    Report {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        node: config.node.to_string(),
        ready: inputs.problems.is_empty(),
        problems: inputs.problems.to_vec(),
        role: match segment {
            Some(segment) if segment.leader(&config.node).is_some() => Role::Leader,
            Some(_) => Role::Follower,
            None => Role::Outside,
        },
        segment: segment.map(|segment| segment.name.to_string()),
        leader: segment.map(|segment| segment.primary().node.to_string()),
        mode: topology.mode.to_string(),
        kilo_nodes: match &topology.mode {
            Mode::Native => Vec::new(),
            Mode::Kilo(nodes) => strings(nodes),
        },
        kilo_refused: strings(&topology.foreign),
        granularity: annotation::format_granularity(config.granularity).to_owned(),
        tunnel: Tunnel {
            interface: config.interface.clone(),
            public_key: inputs.public_key.to_string(),
            key_age: inputs.keys.age,
            next_key: inputs.keys.others.next.map(|key| key.to_string()),
            previous_key: inputs.keys.others.previous.map(|key| key.to_string()),
            key_awaits: match inputs.keys.progress {
                Progress::Resting => None,
                Progress::Announced { missing } | Progress::Overlapping { missing } => {
                    Some(missing as u64)
                }
            },
            listen_port: desired.listen_port.map(Into::into),
            port_reason: port_reason(inputs, desired),
            mtu: desired.link.as_ref().map(|link| link.mtu),
            measures_mtu: config.mtu == Mtu::Auto && matches!(topology.mode, Mode::Native),
            addresses: desired.addresses.keys().map(ToString::to_string).collect(),
            endpoint: decision
                .annotations
                .as_ref()
                .and_then(|annotations| annotations.get(annotation::ENDPOINT).cloned()),
        },
        flannel: facts.flannel.as_ref().map(|flannel| Flannel {
            backend: match flannel.backend {
                Backend::Vxlan => "vxlan".to_owned(),
                Backend::HostGw => "host-gw".to_owned(),
            },
            direct_routing: flannel.direct_routing,
            networks: strings(&flannel.networks),
            subnets: strings(&flannel.subnets),
            mtu: flannel.mtu,
            links: flannel.vteps.iter().map(|vtep| vtep.name.clone()).collect(),
        }),
        api: Api {
            server: inputs.contact.origin.as_ref().map(ToString::to_string),
            cached: !inputs.live,
            error: inputs.contact.error.clone(),
            missing_policies: inputs.contact.missing_policies.clone(),
        },
        segments: topology
            .leaders()
            .map(|(segment, leader)| Segment {
                name: segment.name.to_string(),
                leader: leader.node.to_string(),
                endpoint: leader
                    .discovered
                    .map(|address| address.to_string())
                    .or_else(|| leader.endpoint.as_ref().map(ToString::to_string)),
                wireguard_ips: strings(&leader.wireguard_ips),
                nodes: segment
                    .nodes
                    .iter()
                    .map(|node| node.name.to_string())
                    .collect(),
            })
            .collect(),
        peers: peers(inputs, desired),
        outsiders: topology
            .outsiders
            .iter()
            .map(|outsider| outsider.name.to_string())
            .collect(),
        excluded,
        aliases: aliases(topology),
        overlaps: strings(translated),
        connected,
        ready_nodes: topology
            .segments
            .iter()
            .map(|segment| segment.nodes.len())
            .sum(),
        external_peers: topology.peers.len(),
        routes: desired.routes.len(),
        fail_open: config.on_tunnel_down == OnTunnelDown::Open,
        drops: inputs.drops.clone(),
        leak_drops: inputs.counters.map(|counters| counters.leak_drops),
        stranger_drops: inputs.counters.map(|counters| counters.stranger_drops),
        transit_drops: inputs.counters.map(|counters| counters.transit_drops),
        relays: segment.is_some_and(|segment| {
            segment.leader(&config.node).is_some()
                && topology.mode == Mode::Native
                && config.relaying.rank(segment.region()).is_some()
                && !topology.not_relaying.contains(&config.node)
        }),
        cache_failures: inputs.cache_failures,
        paths: inputs
            .paths
            .iter()
            .map(|stats| path(stats, inputs.now))
            .collect(),
        echo_failures: inputs.echo_failures,
        failovers: inputs
            .failovers
            .iter()
            .map(|(cause, count)| ((*cause).to_owned(), *count))
            .collect(),
    }
}

fn aliases(topology: &Topology) -> Vec<Alias> {
    let members = topology.segments.iter().flat_map(|segment| &segment.nodes);
    let aliases = members.flat_map(|member| member.aliases.iter().map(move |pair| (member, pair)));
    aliases
        .map(|(member, (alias, address))| Alias {
            node: member.name.to_string(),
            alias: alias.to_string(),
            address: address.to_string(),
        })
        .collect()
}

fn path(stats: &PathStats, now: Instant) -> LeaderPath {
    let (state, cause) = match stats.state {
        PathState::Up => ("up", None),
        PathState::Unknown => ("unknown", None),
        PathState::Returning => ("returning", None),
        PathState::Draining => ("draining", None),
        PathState::Down(cause) => ("down", Some(label(cause).to_owned())),
    };
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    LeaderPath {
        kind: match stats.kind {
            PathKind::Leader => "leader".to_owned(),
            PathKind::Peer => "peer".to_owned(),
        },
        name: stats.node.to_string(),
        region: stats.segment.to_string(),
        state: state.to_owned(),
        cause,
        since: now.saturating_duration_since(stats.since).as_secs(),
        rtt_us: stats.rtt.map(micros),
        loss_permille: stats.loss,
        mtu: stats.mtu.map(|mtu| mtu.bytes),
        mtu_since: stats
            .mtu
            .map(|mtu| now.saturating_duration_since(mtu.since).as_secs()),
        mtu_confirmed: stats.mtu.is_some_and(|mtu| mtu.is_confirmed),
        via: stats.via.as_ref().map(|via| Via {
            leader: via.node.to_string(),
            region: via.segment.to_string(),
            since: now.saturating_duration_since(via.since).as_secs(),
        }),
    }
}

fn peers(inputs: &Inputs<'_>, desired: &State) -> Vec<Peer> {
    let topology = &inputs.decision.topology;
    let is_behind_nat = |key: &PublicKey| {
        let mut leaders = topology.leaders();
        leaders.any(|(_, leader)| leader.keys.contains(key) && leader.behind_nat)
    };
    let mut peers = desired
        .peers
        .values()
        .map(|peer| {
            let key = &peer.public_key;
            let traffic = inputs.traffic.get(key).cloned().unwrap_or_default();
            Peer {
                name: name(&inputs.decision.topology, key),
                public_key: key.to_string(),
                endpoint: traffic
                    .endpoint
                    .or(peer.endpoint)
                    .map(|endpoint| endpoint.to_string()),
                allowed_ips: strings(peer.allowed_ips()),
                handshake_age: traffic.handshake_age.map(|age| age.as_secs()),
                received: traffic.received,
                sent: traffic.sent,
                persistent_keepalive: peer.persistent_keepalive.map_or(0, Into::into),
                both_behind_nat: is_behind_nat(key) && is_behind_nat(&inputs.public_key),
                candidates: candidates(&traffic),
            }
        })
        .collect::<Vec<_>>();
    peers.sort_by(|a, b| a.name.cmp(&b.name));
    peers
}

/// Why the tunnel does not listen on `--port`.
fn port_reason(inputs: &Inputs<'_>, desired: &State) -> Option<String> {
    let configured = inputs.config.port;
    // The tunnel follows the published endpoint, a moment after the choice.
    if desired.listen_port?.get() == configured {
        return None;
    }
    let reason = match inputs.listen_port.reason()? {
        Some(peer) => format!(
            "{} never answered there",
            name(&inputs.decision.topology, &peer)
        ),
        None => "an earlier agent of this node had no answer there".to_owned(),
    };
    Some(format!("instead of {configured}, since {reason}"))
}

/// None is in use before the first handshake.
fn candidates(traffic: &Traffic) -> Vec<Candidate> {
    let in_use = |outcome: &Outcome| outcome.in_use && traffic.handshake_age.is_some();
    let outcomes = traffic.candidates.iter();
    outcomes
        .map(|outcome| Candidate {
            in_use: in_use(outcome),
            ..candidate(outcome)
        })
        .collect()
}

fn candidate(outcome: &Outcome) -> Candidate {
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    Candidate {
        address: outcome.candidate.address.to_string(),
        origin: outcome.candidate.origin.to_string(),
        in_use: outcome.in_use,
        answered_in: outcome.answered.map(|(round_trip, _)| millis(round_trip)),
        answered: outcome.answered.map(|(_, ago)| ago.as_secs()),
        tried: outcome.tried.map(|ago| ago.as_secs()),
    }
}

fn name(topology: &Topology, key: &PublicKey) -> String {
    let segment = topology
        .leaders()
        .find(|(_, leader)| leader.keys.contains(key))
        .map(|(segment, _)| segment.name.to_string());
    let external = || {
        topology
            .peers
            .iter()
            .find(|peer| peer.public_key == *key)
            .map(|peer| peer.name.clone())
    };
    segment.or_else(external).unwrap_or_default()
}

fn strings<'a, T: ToString + 'a>(items: impl IntoIterator<Item = &'a T>) -> Vec<String> {
    items.into_iter().map(ToString::to_string).collect()
}
