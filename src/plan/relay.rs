//! Relays in the plan: which peers relay to which, what this node forwards for others, and what a relay takes from the
//! MTU.
//!
//! A relayed peer's endpoint is its WireGuard address. So the endpoint at which the tunnel device last received says
//! whether a path goes through a relay, and no statement does.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use super::site::Site;
use crate::probe::Verdicts;
use crate::state::RelayDoor;
use crate::topology::{Leader, Mode, NodeName, Segment, Topology};
use crate::wireguard::{PeerId, RELAY_PORT, overhead};

/// The endpoint of a leader behind a relay, as the tunnel device of a leader with these WireGuard addresses knows it;
/// `None` where the two have no address of one family.
pub(super) fn relayed_endpoint(leader: &Leader, own: &[IpAddr]) -> Option<SocketAddr> {
    let mut addresses = leader.wireguard_ips.iter();
    let address = addresses.find(|ip| own.iter().any(|own| own.is_ipv6() == ip.is_ipv6()));
    address.map(|ip| SocketAddr::new(*ip, RELAY_PORT))
}

/// Whether an endpoint of a leader leads through a relay.
pub fn is_relayed(leader: &Leader, endpoint: SocketAddr) -> bool {
    endpoint.port() == RELAY_PORT && leader.wireguard_ips.contains(&endpoint.ip())
}

impl<'a> Site<'a> {
    /// Whether the tunnel last received from a leader through a relay.
    pub(super) fn is_relayed(&self, leader: &Leader) -> bool {
        let mut observed = leader
            .keys
            .iter()
            .filter_map(|key| self.inputs.observed.get(key));
        observed.any(|endpoint| is_relayed(leader, *endpoint))
    }

    /// Whether packets to a leader arrive: directly, or through a relay that is chosen.
    pub(super) fn answers(&self, segment: &Segment, leader: &Leader) -> bool {
        let has_relay = self.verdicts.relays.contains_key(&segment.name);
        self.verdicts.peer(&leader.peer_id()).answers() && (has_relay || !self.is_relayed(leader))
    }

    /// The WireGuard addresses of other leaders to which a leader elsewhere relays for this one.
    pub(super) fn relays_to(&self, relay: &Leader) -> BTreeSet<IpAddr> {
        let id = relay.peer_id();
        let relays = &self.verdicts.relays;
        let segments = self
            .remotes()
            .filter(|segment| relays.get(&segment.name) == Some(&id));
        self.relay_addresses(segments.flat_map(|segment| &segment.leaders))
    }

    /// The WireGuard addresses of other leaders whose datagrams may come through a leader elsewhere: of those that this
    /// node does not reach directly, or did not a moment ago, through those that it does. The other end may choose a
    /// relay a moment before this node does.
    pub(super) fn relayed_from(&self, group: &Segment, relay: &Leader) -> BTreeSet<IpAddr> {
        let topology = self.inputs.topology;
        let relaying = &self.inputs.settings.relaying;
        let may_relay = topology.mode == Mode::Native
            && !topology.not_relaying.contains(&relay.node)
            && relaying.rank(group.region()).is_some()
            && self.is_direct_path(relay);
        if !may_relay {
            return BTreeSet::new();
        }
        let others = self.remotes().filter(|other| other.group != group.group);
        let leaders = others.flat_map(|other| {
            let has_relay = self.verdicts.relays.contains_key(&other.name);
            let leaders = other.leaders.iter();
            leaders.filter(move |leader| has_relay || !self.is_direct_path(leader))
        });
        self.relay_addresses(leaders)
    }

    /// What this node forwards between leaders of other regions: the tunnel's datagrams alone, and to those that it
    /// reaches directly. So no datagram passes two relays.
    pub(super) fn relay_door(&self) -> RelayDoor {
        let topology = self.inputs.topology;
        let (Some(own), Some(segment)) = (self.own_lead(), self.segment) else {
            return RelayDoor::default();
        };
        let relaying = &self.inputs.settings.relaying;
        // The same in Kilo's mode, so that its begin and end change no rule.
        let may_relay =
            !topology.not_relaying.contains(&own.node) && relaying.rank(segment.region()).is_some();
        if !may_relay {
            return RelayDoor::default();
        }
        let leaders = || self.remotes().flat_map(|segment| &segment.leaders);
        let direct = leaders().filter(|leader| !self.is_relayed(leader));
        let addresses = |leader: &'a Leader| self.carried_wireguard_ips(leader).collect::<Vec<_>>();
        RelayDoor {
            from: leaders().flat_map(addresses).collect(),
            to: direct.flat_map(addresses).collect(),
        }
    }

    /// What relays take from the MTU of packets to a remote segment, in bytes; 0 where none is used.
    pub(super) fn relay_overhead(&self, segment: &Segment) -> u32 {
        if self.own_lead().is_none() {
            return 0;
        }
        let has_relay = self.verdicts.relays.contains_key(&segment.name);
        let leaders = self.leaders_of(segment).into_iter();
        let relayed = leaders.filter(|leader| has_relay || self.is_relayed(leader));
        let addresses = self.relay_addresses(relayed).into_iter();
        let taken = addresses.map(|ip| overhead(ip.is_ipv6()));
        taken.max().unwrap_or_default()
    }

    fn is_direct_path(&self, leader: &Leader) -> bool {
        self.verdicts.peer(&leader.peer_id()).answers() && !self.is_relayed(leader)
    }

    fn relay_addresses<'l>(&self, leaders: impl Iterator<Item = &'l Leader>) -> BTreeSet<IpAddr> {
        let own = self.own_lead().map_or(&[][..], |own| &own.wireguard_ips);
        let endpoints = leaders.filter_map(|leader| relayed_endpoint(leader, own));
        endpoints.map(|endpoint| endpoint.ip()).collect()
    }
}

/// The candidates that lead through the relays which the echoes chose, by peer.
pub fn relayed_candidates(
    topology: &Topology,
    me: &NodeName,
    verdicts: &Verdicts,
) -> BTreeMap<PeerId, SocketAddr> {
    let Some(own) = topology.leader(me) else {
        return BTreeMap::new();
    };
    let leaders = topology
        .leaders()
        .filter(|(segment, _)| verdicts.relays.contains_key(&segment.name));
    leaders
        .filter_map(|(_, leader)| {
            let endpoint = relayed_endpoint(leader, &own.wireguard_ips)?;
            Some((leader.peer_id(), endpoint))
        })
        .collect()
}
