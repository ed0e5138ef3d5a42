//! Keeps for a moment what a change of leaders takes away: the own lead, and the tunnels to former leaders.
//! Pure: the time is passed in.
//!
//! Agents see a change of the cluster some milliseconds apart, and packets are under way. If a former leader
//! closed its tunnel at once, it would drop what its members still send to it; if the other side closed it, it
//! would drop what the former leader still sends. So both keep the tunnel for [`LINGER`]:
//!
//! | after | the former leader | leaders of other regions |
//! |---|---|---|
//! | 0 s | goes on as a leader, also for members that do not know of the change yet | send to the new leaders, and to the former one what is for its own pods and host, if it was one of several |
//! | [`HANDOVER`] | receives by its tunnel, and sends through the new leaders | the same |
//! | [`HANDOVER`], twice | the same | send nothing to it |
//! | [`LINGER`] | is a follower | accept nothing from it |
//!
//! The order matters where reverse-path checks are strict: what comes by flannel's device is accepted once this
//! node's own routes lead there, and what comes by the tunnel always is.
//!
//! A node that leaves its segment or the mesh gets no grace, and neither does one whose segment has other members now.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use ipnet::IpNet;

use crate::state::{State, Table};
use crate::topology::{Leader, Member, NodeName, Segment, SegmentName, Topology};
use crate::wireguard::{PeerConfig, PeerId};

/// How long a former leader stays. Shorter than an operator's patience.
pub const LINGER: Duration = Duration::from_secs(3);

/// How long a former leader sends into its own tunnel. Longer than a watch needs to reach every agent.
pub const HANDOVER: Duration = Duration::from_millis(500);

/// The place of this node in the topology.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Its segment.
    pub segment: &'a Segment,
    /// Whether it leads there.
    pub leads: bool,
    /// The topology.
    pub topology: &'a Topology,
}

/// What lingers.
#[derive(Debug, Default)]
pub struct Linger {
    /// The last desired state of this node as a leader.
    lead: Option<Lead>,
    /// The segments of the leaders among its peers.
    segments: BTreeMap<PeerId, SegmentName>,
    /// Since when this node does not lead any more, while it still acts as a leader.
    demoted: Option<Instant>,
    /// The leaders that were peers until a moment ago.
    former: BTreeMap<PeerId, Former>,
}

#[derive(Debug)]
struct Lead {
    segment: SegmentName,
    /// The nodes of the segment. What the state says of a node that joined or left since is wrong.
    members: Vec<NodeName>,
    state: State,
}

#[derive(Debug)]
struct Former {
    /// The segment that it led.
    segment: SegmentName,
    peer: PeerConfig,
    /// Whether it was one of several leaders, each of which was sent what is for its own pods and host.
    has_others: bool,
    since: Instant,
}

impl Linger {
    /// Returns the state to reconcile: `desired`, with what lingers. `place` is `None` for a node outside of the mesh.
    pub fn handle_desired(
        &mut self,
        desired: State,
        place: Option<Place<'_>>,
        now: Instant,
    ) -> State {
        let Some(place) = place else {
            *self = Self::default();
            return desired;
        };
        if place.leads {
            self.demoted = None;
            self.note_former(&desired, &place.segment.name, now);
            let leaders = place.topology.leaders();
            let named = leaders.map(|(of, leader)| (leader.peer_id(), of.name.clone()));
            self.segments = named.collect();
            let desired = self.with_former(desired, place.topology, now);
            self.lead = Some(Lead {
                segment: place.segment.name.clone(),
                members: members(place.segment),
                state: desired.clone(),
            });
            return desired;
        }
        self.former.clear();
        let is_same = |lead: &&Lead| {
            lead.segment == place.segment.name && lead.members == members(place.segment)
        };
        let Some(Lead { state: lead, .. }) = self.lead.as_ref().filter(is_same) else {
            self.lead = None;
            return desired;
        };
        let since = *self.demoted.get_or_insert(now);
        if now < since + HANDOVER {
            return lead.clone();
        }
        if now < since + LINGER {
            return receiving(lead, desired);
        }
        self.lead = None;
        self.demoted = None;
        desired
    }

    /// When what lingers changes next, so that a pass is due.
    pub fn poll_deadline(&self, now: Instant) -> Option<Instant> {
        let former = self.former.values();
        let former =
            former.flat_map(|former| [HANDOVER * 2, LINGER].map(|after| former.since + after));
        let demoted = self.demoted.into_iter();
        let demoted = demoted.flat_map(|since| [HANDOVER, LINGER].map(|after| since + after));
        former.chain(demoted).filter(|at| *at > now).min()
    }

    /// Remembers the leaders that were peers in the last state and are none now.
    fn note_former(&mut self, desired: &State, segment: &SegmentName, now: Instant) {
        let last = self.lead.as_ref();
        let Some(Lead { state: last, .. }) = last.filter(|last| last.segment == *segment) else {
            self.former.clear();
            return;
        };
        for (id, peer) in &last.peers {
            if let Some(segment) = self.segments.get(id)
                && !desired.peers.contains_key(id)
            {
                self.former.entry(id.clone()).or_insert_with(|| Former {
                    segment: segment.clone(),
                    peer: peer.clone(),
                    has_others: has_others(id, peer, &last.peers),
                    since: now,
                });
            }
        }
    }

    /// Adds the former leaders, each with the sources that it shares with the leader that succeeds it.
    fn with_former(&mut self, mut desired: State, topology: &Topology, now: Instant) -> State {
        let peers = &desired.peers;
        self.former.retain(|id, former| {
            now < former.since + LINGER
                && member(topology, id, &former.segment).is_some()
                && !peers.contains_key(id)
                && peers
                    .values()
                    .all(|peer| peer.public_key != former.peer.public_key)
        });
        let kept = self.former.iter().filter_map(|(id, former)| {
            let leaders = peers
                .iter()
                .filter(|(id, _)| self.segments.contains_key(*id));
            let accepts = shared_with_successor(&former.peer, leaders.map(|(_, peer)| peer));
            (!accepts.is_empty()).then(|| {
                let is_sent_its_own = now < former.since + HANDOVER * 2;
                let own = member(topology, id, &former.segment);
                let own = own.filter(|_| former.has_others);
                let own = own.into_iter().flat_map(Member::allowed_ips);
                let routes = own.filter(|net| accepts.contains(net)).collect();
                let peer = PeerConfig {
                    routes: if is_sent_its_own {
                        routes
                    } else {
                        BTreeSet::new()
                    },
                    accepts,
                    // An address has one relay, and a leader has it.
                    relays_to: BTreeSet::new(),
                    ..former.peer.clone()
                };
                (id.clone(), peer)
            })
        });
        let kept = kept.collect::<Vec<_>>();
        for (_, former) in &kept {
            for peer in desired.peers.values_mut() {
                peer.routes.retain(|net| !former.routes.contains(net));
            }
        }
        desired.peers.extend(kept);
        desired
    }
}

/// The nodes of the segment.
fn members(segment: &Segment) -> Vec<NodeName> {
    let nodes = segment.nodes.iter();
    nodes.map(|node| node.name.clone()).collect()
}

/// The node of this leader, if it is a member of a segment.
fn member<'a>(topology: &'a Topology, id: &PeerId, segment: &SegmentName) -> Option<&'a Member> {
    let mut segments = topology.segments.iter();
    let mut nodes = segments.find(|of| of.name == *segment)?.nodes.iter();
    nodes.find(|node| Leader::id_of(&node.name) == *id)
}

/// Whether the segment of this leader has others: they accept the same sources.
fn has_others(id: &PeerId, peer: &PeerConfig, peers: &BTreeMap<PeerId, PeerConfig>) -> bool {
    let mut others = peers.iter().filter(|(other, _)| *other != id);
    others.any(|(_, other)| other.accepts == peer.accepts)
}

/// The state of a former leader that sends as a follower, and still receives by its tunnel.
fn receiving(lead: &State, follower: State) -> State {
    let members = lead.routes.iter();
    let members = members.filter(|(key, _)| key.table == Table::Members);
    let members = members.map(|(key, route)| (*key, route.clone()));
    State {
        routes: follower.routes.into_iter().chain(members).collect(),
        ..lead.clone()
    }
}

/// The sources of a former leader that the leader with most of them has now. A prefix that moved to another segment
/// is not among them.
fn shared_with_successor<'a>(
    former: &PeerConfig,
    leaders: impl Iterator<Item = &'a PeerConfig>,
) -> BTreeSet<IpNet> {
    let shared = leaders.map(|leader| &former.accepts & &leader.accepts);
    shared.max_by_key(BTreeSet::len).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Route, RouteKey};
    use crate::topology::RegionName;
    use crate::wireguard::key::PublicKey;

    #[expect(clippy::disallowed_methods, reason = "an Instant has no other origin")]
    fn start() -> Instant {
        Instant::now()
    }

    fn nets(prefixes: &[&str]) -> BTreeSet<IpNet> {
        let nets = prefixes.iter().map(|prefix| prefix.parse().unwrap());
        nets.collect()
    }

    /// A leader's state with these peers: name, number of the key, prefixes.
    fn state(peers: &[(&str, u8, &[&str])]) -> State {
        let peer = |(name, key, prefixes): &(&str, u8, &[&str])| {
            let peer = PeerConfig::new(PublicKey([*key; 32]));
            (PeerId::new(*name), peer.with_allowed_ips(nets(prefixes)))
        };
        State {
            peers: peers.iter().map(peer).collect(),
            ..State::default()
        }
    }

    fn segment(region: &str) -> SegmentName {
        SegmentName::Location(RegionName(region.into()))
    }

    /// A topology of regions, each with the names of its nodes, all of which lead.
    fn topology(regions: &[(&str, &[&str])]) -> Topology {
        let leader = |name: &&str| Leader {
            node: NodeName((*name).into()),
            keys: Vec::new(),
            endpoint: None,
            address: None,
            discovered: None,
            candidates: Vec::new(),
            behind_nat: false,
            persistent_keepalive: 0,
            keepalive_forced: false,
            wireguard_ips: Vec::new(),
            probe_ip: None,
        };
        let member = |name: &&str| Member {
            name: NodeName((*name).into()),
            endpoint: None,
            pod_cidrs: vec![format!("10.42.{}.0/24", &name[1..]).parse().unwrap()],
            addresses: Vec::new(),
            aliases: [].into(),
            underlay: BTreeSet::new(),
            flannel_ips: BTreeSet::new(),
            private_ip: None,
        };
        let segment = |(region, nodes): &(&str, &[&str])| Segment {
            name: segment(region),
            group: segment(region),
            leaders: nodes.iter().map(leader).collect(),
            nodes: nodes.iter().map(member).collect(),
            allowed_location_ips: Vec::new(),
        };
        Topology {
            segments: regions.iter().map(segment).collect(),
            ..Topology::default()
        }
    }

    /// A leader of region `b`, or a follower there, and the other regions.
    struct Home(SegmentName, Topology);

    impl Home {
        fn new(region: &str) -> Self {
            let regions: [(&str, &[&str]); 3] = [
                ("a", &["a1", "a2", "a3", "a9"]),
                ("b", &["b1"]),
                ("c", &["c1"]),
            ];
            Self(segment(region), topology(&regions))
        }

        fn leads(&self, leads: bool) -> Option<Place<'_>> {
            Some(Place {
                segment: self.1.segments.iter().find(|of| of.name == self.0)?,
                leads,
                topology: &self.1,
            })
        }
    }

    const BEFORE: &[(&str, u8, &[&str])] = &[
        (
            "node/a1",
            1,
            &["10.42.1.0/24", "10.42.2.0/24", "10.4.0.1/32"],
        ),
        ("peer/phone", 9, &["10.5.0.9/32"]),
    ];
    const AFTER: &[(&str, u8, &[&str])] = &[(
        "node/a2",
        2,
        &["10.42.1.0/24", "10.42.2.0/24", "10.4.0.2/32"],
    )];

    #[test]
    fn a_former_leader_may_send_for_three_seconds_and_is_sent_nothing() {
        let t0 = start();
        let home = Home::new("b");
        let mut linger = Linger::default();
        linger.handle_desired(state(BEFORE), home.leads(true), t0);

        let kept = linger.handle_desired(state(AFTER), home.leads(true), t0);
        let former = &kept.peers[&PeerId::new("node/a1")];
        assert_eq!(former.accepts, nets(&["10.42.1.0/24", "10.42.2.0/24"]));
        assert_eq!(former.routes, BTreeSet::new());
        assert!(!kept.peers.contains_key(&PeerId::new("peer/phone")));
        assert_eq!(linger.poll_deadline(t0 + HANDOVER * 2), Some(t0 + LINGER));

        // A pass in between does not begin the time again.
        linger.handle_desired(state(AFTER), home.leads(true), t0 + LINGER / 2);
        let after = linger.handle_desired(state(AFTER), home.leads(true), t0 + LINGER);
        assert_eq!(after, state(AFTER));
        assert_eq!(linger.poll_deadline(t0 + LINGER), None);
    }

    #[test]
    fn one_of_several_leaders_is_sent_what_is_for_itself_until_its_own_routes_changed() {
        let t0 = start();
        let home = Home::new("b");
        let (own, shared) = (nets(&["10.42.1.0/24"]), nets(&["10.42.3.0/24"]));
        let leaders = |leaders: &[(&str, u8, &BTreeSet<IpNet>)]| State {
            peers: leaders
                .iter()
                .map(|(name, key, own)| {
                    let peer = PeerConfig {
                        routes: *own | &shared,
                        accepts: nets(&["10.42.1.0/24", "10.42.2.0/24", "10.42.3.0/24"]),
                        ..PeerConfig::new(PublicKey([*key; 32]))
                    };
                    (PeerId::new(*name), peer)
                })
                .collect(),
            ..State::default()
        };
        let others = nets(&["10.42.2.0/24"]);
        let before = leaders(&[("node/a1", 1, &own), ("node/a2", 2, &others)]);
        let after = leaders(&[("node/a2", 2, &(&own | &others)), ("node/a3", 3, &own)]);
        let mut linger = Linger::default();
        linger.handle_desired(before, home.leads(true), t0);

        let routes = |state: &State, name: &str| state.peers[&PeerId::new(name)].routes.clone();
        let kept = linger.handle_desired(after.clone(), home.leads(true), t0);
        assert_eq!(routes(&kept, "node/a1"), own);
        assert_eq!(routes(&kept, "node/a2"), &others | &shared);
        assert_eq!(routes(&kept, "node/a3"), shared);
        assert_eq!(linger.poll_deadline(t0), Some(t0 + HANDOVER * 2));

        let kept = linger.handle_desired(after.clone(), home.leads(true), t0 + HANDOVER * 2);
        assert_eq!(routes(&kept, "node/a1"), BTreeSet::new());
        assert_eq!(routes(&kept, "node/a3"), routes(&after, "node/a3"));
    }

    /// The paths to `a2` had failed, so `a1` was sent what is for the followers alone.
    #[test]
    fn what_is_for_a_follower_goes_to_the_new_leaders_at_once() {
        let t0 = start();
        let home = Home::new("b");
        let accepts = nets(&["10.42.1.0/24", "10.42.2.0/24", "10.42.3.0/24"]);
        let leaders = |leaders: &[(&str, u8, &[&str])]| State {
            peers: leaders
                .iter()
                .map(|(name, key, routes)| {
                    let peer = PeerConfig {
                        routes: nets(routes),
                        accepts: accepts.clone(),
                        ..PeerConfig::new(PublicKey([*key; 32]))
                    };
                    (PeerId::new(*name), peer)
                })
                .collect(),
            ..State::default()
        };
        let before: [(&str, u8, &[&str]); 2] = [
            ("node/a1", 1, &["10.42.1.0/24", "10.42.3.0/24"]),
            ("node/a2", 2, &["10.42.2.0/24"]),
        ];
        let after: [(&str, u8, &[&str]); 2] = [
            ("node/a2", 2, &["10.42.1.0/24", "10.42.2.0/24"]),
            ("node/a3", 3, &["10.42.1.0/24", "10.42.3.0/24"]),
        ];
        let mut linger = Linger::default();
        linger.handle_desired(leaders(&before), home.leads(true), t0);
        let kept = linger.handle_desired(leaders(&after), home.leads(true), t0);
        let routes = |name: &str| kept.peers[&PeerId::new(name)].routes.clone();
        assert_eq!(routes("node/a1"), nets(&["10.42.1.0/24"]));
        assert_eq!(routes("node/a3"), nets(&["10.42.3.0/24"]));
    }

    #[test]
    fn a_prefix_that_moved_to_another_segment_is_not_accepted_from_the_former_leader() {
        let t0 = start();
        let home = Home::new("b");
        let mut linger = Linger::default();
        linger.handle_desired(state(BEFORE), home.leads(true), t0);
        let moved = state(&[
            ("node/a2", 2, &["10.42.1.0/24"]),
            ("node/c1", 3, &["10.42.2.0/24"]),
        ]);
        let kept = linger.handle_desired(moved, home.leads(true), t0);
        assert_eq!(
            kept.peers[&PeerId::new("node/a1")].accepts.len(),
            1,
            "one of the two segments is the successor"
        );
    }

    #[test]
    fn a_former_leader_that_left_its_segment_is_no_peer_any_more() {
        let t0 = start();
        let before = Home::new("b");
        let mut linger = Linger::default();
        linger.handle_desired(state(BEFORE), before.leads(true), t0);
        let regions: [(&str, &[&str]); 3] = [("a", &["a2"]), ("b", &["b1"]), ("c", &["c1", "a1"])];
        let after = Home(segment("b"), topology(&regions));
        let kept = linger.handle_desired(state(AFTER), after.leads(true), t0);
        assert_eq!(kept, state(AFTER));
    }

    #[test]
    fn a_key_that_another_node_has_now_does_not_linger() {
        let t0 = start();
        let home = Home::new("b");
        let mut linger = Linger::default();
        linger.handle_desired(state(BEFORE), home.leads(true), t0);
        let renamed = state(&[("node/a9", 1, &["10.42.1.0/24"])]);
        let kept = linger.handle_desired(renamed.clone(), home.leads(true), t0);
        assert_eq!(kept, renamed);
    }

    #[test]
    fn a_node_that_lost_the_lead_carries_traffic_for_three_seconds_more() {
        let t0 = start();
        let mut linger = Linger::default();
        let mut lead = state(BEFORE);
        let members = RouteKey {
            table: Table::Members,
            dst: "10.42.9.0/24".parse().unwrap(),
            metric: 0,
        };
        lead.routes.insert(members, Route::Throw);
        let home = Home::new("a");
        linger.handle_desired(lead.clone(), home.leads(true), t0);
        let route = |table| RouteKey {
            table,
            dst: "10.42.9.0/24".parse().unwrap(),
            metric: 0,
        };
        let desired = || State {
            routes: [(route(Table::Mesh), Route::Unreachable)].into(),
            ..State::default()
        };
        let kept = linger.handle_desired(desired(), home.leads(false), t0);
        assert_eq!(kept, lead);
        assert_eq!(linger.poll_deadline(t0), Some(t0 + HANDOVER));
        let receiving = linger.handle_desired(desired(), home.leads(false), t0 + HANDOVER);
        assert_eq!(receiving.peers, lead.peers);
        let routes = receiving.routes.keys().copied();
        assert_eq!(
            routes.collect::<Vec<_>>(),
            [route(Table::Mesh), route(Table::Members)]
        );
        assert_eq!(linger.poll_deadline(t0 + HANDOVER), Some(t0 + LINGER));
        let after = linger.handle_desired(desired(), home.leads(false), t0 + LINGER);
        assert_eq!(after, desired());
        assert_eq!(linger.poll_deadline(t0 + LINGER), None);
    }

    #[test]
    fn a_node_that_leaves_its_segment_or_gets_other_neighbours_gets_no_grace() {
        let t0 = start();
        let (home, elsewhere) = (Home::new("a"), Home::new("c"));
        let joined: [(&str, &[&str]); 2] = [("a", &["a1", "a2", "a3", "a9", "c1"]), ("b", &["b1"])];
        let other_members = Home(segment("a"), topology(&joined));
        for left in [elsewhere.leads(false), other_members.leads(false), None] {
            let mut linger = Linger::default();
            linger.handle_desired(state(BEFORE), home.leads(true), t0);
            let after = linger.handle_desired(State::default(), left, t0);
            assert_eq!(after, State::default());
            assert_eq!(linger.poll_deadline(t0), None);
        }
    }
}
