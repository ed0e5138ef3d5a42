//! Which peers are still there, judged by what arrives from them, and where to look for those that may
//! be elsewhere by now. Pure: the time is passed in.
//!
//! A router that restarts gives the leader behind it another address and port. Whoever that leader
//! speaks to, and lets everybody in, sees it with the next keepalive and publishes it; the others hear
//! nothing more, for a session stays valid for minutes after its peer has moved away. What somebody saw
//! need not hold for this node, though: some NATs have a mapping for each observer. So nothing is
//! believed: this node asks for a handshake at the new place and goes on sending to the old one until it
//! has an answer. Whoever moved is told by the same publications, and asks the others in turn, so that
//! the routers of both sides let the answers in.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::topology::{NodeName, Snapshot, Topology};
use crate::wireguard::key::PublicKey;

/// A session that had no handshake for so long carries nothing (WireGuard paper, 6.1:
/// REJECT_AFTER_TIME).
const SESSION: Duration = Duration::from_secs(180);
/// Beside two keepalives of which neither arrived: how late they may be.
const LATE: Duration = Duration::from_secs(5);
/// Between two attempts, as between the initiations of WireGuard (paper, 6.1: REKEY_TIMEOUT).
const AGAIN: Duration = Duration::from_secs(5);
/// From this attempt on they are further apart: enough for a NAT that forgets an unanswered flow after
/// 30 seconds, so that the two sides' attempts meet.
const PATIENT: u32 = 6;
const SELDOM: Duration = Duration::from_secs(25);
/// Places that are looked at, the latest first. There are as many as leaders that tell different ones.
const MAX_PLACES: usize = 4;

/// Where others see the peers.
pub type Sightings = BTreeMap<PublicKey, BTreeSet<SocketAddr>>;

/// What is asked of a peer's key at every look at the tunnel: found out once for each topology, for with a
/// tunnel from everybody to everybody there are as many peers as segments to look through.
#[derive(Clone, Debug, Default)]
pub struct Keys(BTreeMap<PublicKey, Known>);

#[derive(Clone, Copy, Debug)]
struct Known {
    /// The keepalives that it sends by itself, in seconds; 0 for none.
    keepalive: u16,
    is_leader: bool,
    /// Whether it has no place of its own that holds for everybody.
    is_sought: bool,
}

impl Keys {
    /// The leaders' keys and those of external peers.
    pub fn new(topology: &Topology) -> Self {
        let mut keys = BTreeMap::new();
        for segment in &topology.segments {
            keys.entry(segment.public_key).or_insert(Known {
                keepalive: segment.persistent_keepalive,
                is_leader: true,
                is_sought: segment.behind_nat,
            });
        }
        for peer in &topology.peers {
            keys.entry(peer.public_key).or_insert_with(|| Known {
                keepalive: peer.persistent_keepalive,
                is_leader: false,
                is_sought: topology.whereabouts.contains_key(&peer.public_key),
            });
        }
        Self(keys)
    }

    fn keepalive(&self, key: &PublicKey) -> u16 {
        self.0.get(key).map_or(0, |known| known.keepalive)
    }

    fn is_leader(&self, key: &PublicKey) -> bool {
        self.0.get(key).is_some_and(|known| known.is_leader)
    }

    fn is_sought(&self, key: &PublicKey) -> bool {
        self.0.get(key).is_some_and(|known| known.is_sought)
    }
}

/// What the tunnel tells of a peer with which it had a session.
#[derive(Clone, Copy, Debug)]
pub struct Sign {
    /// Where it was last heard, or is said to be.
    pub endpoint: SocketAddr,
    /// The bytes that came from it.
    pub received: u64,
    /// Since the last handshake.
    pub age: Duration,
}

/// When something last arrived from each peer, and where else it may be.
#[derive(Debug, Default)]
pub struct Hearing {
    peers: BTreeMap<PublicKey, Heard>,
    /// Where others see this node; none before it is first told.
    own: Option<BTreeSet<SocketAddr>>,
}

#[derive(Debug)]
struct Heard {
    received: u64,
    at: Instant,
    /// Where others see it, and since when this node knows; none for what is older than all it heard.
    places: BTreeMap<SocketAddr, Option<Instant>>,
    attempts: u32,
    next: Instant,
}

impl Hearing {
    /// Takes what the tunnel and the others tell of a peer, and tells whether it is there.
    pub fn handle_sign(
        &mut self,
        key: PublicKey,
        sign: Sign,
        seen: Option<&BTreeSet<SocketAddr>>,
        keys: &Keys,
        now: Instant,
    ) -> bool {
        let nowhere = BTreeSet::new();
        let seen = seen.unwrap_or(&nowhere);
        let heard = self.peers.entry(key).or_insert_with(|| Heard {
            received: sign.received,
            at: now,
            places: seen.iter().map(|place| (*place, None)).collect(),
            attempts: 0,
            next: now,
        });
        if heard.received != sign.received {
            heard.received = sign.received;
            heard.at = now;
            heard.attempts = 0;
        }
        heard.places.retain(|place, _| seen.contains(place));
        for place in seen {
            heard.places.entry(*place).or_insert_with(|| {
                heard.attempts = 0;
                heard.next = now;
                Some(now)
            });
        }
        // A side whose keepalives are always the second says nothing for minutes, and is there; one
        // whose session has ended as well is not.
        sign.age < SESSION || !heard.is_silent(keys.keepalive(&key), now)
    }

    /// Where to look for a peer now, if anywhere: where it was seen after it was last heard, and when it
    /// has been silent for long, where it was seen at all.
    pub fn poll_search(
        &mut self,
        key: &PublicKey,
        endpoint: SocketAddr,
        keys: &Keys,
        now: Instant,
    ) -> Vec<SocketAddr> {
        let Some(heard) = self.peers.get_mut(key) else {
            return Vec::new();
        };
        if now < heard.next {
            return Vec::new();
        }
        let silent = heard.is_silent(keys.keepalive(key), now);
        // What came in at the same look may be from before: one attempt too many costs nothing.
        let is_news = |since: &Option<Instant>| since.is_some_and(|since| since >= heard.at);
        let mut places: Vec<_> = heard
            .places
            .iter()
            .filter(|(place, since)| **place != endpoint && (silent || is_news(since)))
            .map(|(place, since)| (*since, *place))
            .collect();
        if places.is_empty() {
            return Vec::new();
        }
        heard.attempts += 1;
        heard.next = now
            + match heard.attempts {
                0..PATIENT => AGAIN,
                _ => SELDOM,
            };
        places.sort();
        let places = places.into_iter().rev().map(|(_, place)| place);
        places.take(MAX_PLACES).collect()
    }

    /// Takes where others see this node; true if it has moved.
    pub fn handle_own(&mut self, seen: Option<&BTreeSet<SocketAddr>>) -> bool {
        let Some(seen) = seen else {
            return false;
        };
        let before = self.own.replace(seen.clone());
        before.is_some_and(|before| !seen.is_subset(&before))
    }

    /// Forgets peers that the tunnel no longer has.
    pub fn retain(&mut self, has: impl Fn(&PublicKey) -> bool) {
        self.peers.retain(|key, _| has(key));
    }
}

impl Heard {
    fn is_silent(&self, keepalive: u16, now: Instant) -> bool {
        let patience = match keepalive {
            0 => SESSION,
            seconds => 2 * Duration::from_secs(seconds.into()) + LATE,
        };
        now.saturating_duration_since(self.at) >= patience
    }
}

/// Where the leaders see each other and the external peers, as far as it is of use to this node: what
/// has a place of its own that holds for everybody is not looked for.
///
/// Every leader is asked: the one whose word counts in the topology may be away, and what it published
/// is there all the same.
pub fn sightings(
    topology: &Topology,
    keys: &Keys,
    snapshot: &Snapshot,
    me: &NodeName,
) -> Sightings {
    let Some(own) = topology.segment_of(me).filter(|own| own.leader == *me) else {
        return Sightings::new();
    };
    let mut sightings = Sightings::new();
    let leaders = topology.segments.iter().map(|segment| &segment.leader);
    let nodes = leaders.filter_map(|leader| snapshot.nodes.get(leader));
    let near = topology.segments.iter();
    let near = near.filter(|segment| segment.group == own.group);
    let ours: BTreeSet<_> = near
        .flat_map(|segment| &segment.nodes)
        .flat_map(|node| &node.underlay)
        .collect();
    for (key, place) in nodes.flat_map(|node| &node.discovered_endpoints) {
        let is_wanted = keys.is_sought(key) || *key == own.public_key;
        if is_wanted && !ours.contains(&place.ip()) {
            sightings.entry(*key).or_default().insert(*place);
        }
    }
    // Two that are seen at one address are behind one router, which need not let a packet out and in
    // again.
    let beside_us: BTreeSet<_> = sightings
        .get(&own.public_key)
        .into_iter()
        .flatten()
        .map(SocketAddr::ip)
        .collect();
    for (key, places) in &mut sightings {
        if keys.is_leader(key) && *key != own.public_key {
            places.retain(|place| !beside_us.contains(&place.ip()));
        }
    }
    sightings.retain(|key, places| keys.is_sought(key) && !places.is_empty());
    sightings
}

#[cfg(test)]
#[expect(
    clippy::disallowed_methods,
    reason = "an instant can only be had from the clock"
)]
mod tests {
    use super::*;
    use crate::topology::{ExternalPeer, Member, Node, RegionName, Segment, SegmentName};

    const KEY: PublicKey = PublicKey([7; 32]);

    fn with_keepalive(persistent_keepalive: u16) -> Topology {
        Topology {
            peers: vec![ExternalPeer {
                name: "laptop".into(),
                created: 0,
                public_key: KEY,
                preshared_key: None,
                endpoint: None,
                persistent_keepalive,
                allowed_ips: vec![],
            }],
            ..Topology::default()
        }
    }

    /// A peer that sends a keepalive every ten seconds, and the others' word of it.
    struct World {
        hearing: Hearing,
        keys: Keys,
        start: Instant,
        received: u64,
        seen: BTreeSet<SocketAddr>,
    }

    impl World {
        fn new() -> Self {
            let mut world = Self {
                hearing: Hearing::default(),
                keys: Keys::new(&with_keepalive(10)),
                start: Instant::now(),
                received: 100,
                seen: [place(1)].into(),
            };
            world.at(0);
            world
        }

        /// Whether it is there, and where it is looked for, at a time in seconds.
        fn at(&mut self, seconds: u64) -> (bool, Vec<SocketAddr>) {
            let now = self.start + Duration::from_secs(seconds);
            let sign = Sign {
                endpoint: place(1),
                received: self.received,
                age: Duration::from_secs(seconds),
            };
            let (hearing, keys) = (&mut self.hearing, &self.keys);
            let there = hearing.handle_sign(KEY, sign, Some(&self.seen), keys, now);
            (there, hearing.poll_search(&KEY, sign.endpoint, keys, now))
        }
    }

    fn place(last: u8) -> SocketAddr {
        ([203, 0, 113, last], 51820).into()
    }

    #[test]
    fn a_new_sighting_is_looked_at_at_once_and_again_until_the_peer_is_heard() {
        let mut world = World::new();
        assert_eq!(world.at(1).1, []);
        world.seen = [place(2)].into();
        let tries: Vec<_> = (2..90).filter(|at| !world.at(*at).1.is_empty()).collect();
        assert_eq!(tries, [2, 7, 12, 17, 22, 27, 52, 77]);

        world.received += 32;
        assert_eq!(world.at(90).1, []);
        assert_eq!(world.at(95).1, []);
    }

    #[test]
    fn what_was_seen_before_the_peer_was_last_heard_is_old() {
        let mut world = World::new();
        world.received += 32;
        world.seen = [place(2)].into();
        assert_eq!(world.at(1).1, [place(2)]);
        // It answers from where it was.
        world.received += 92;
        for at in 2..26 {
            assert_eq!(world.at(at).1, [], "at {at}");
        }
    }

    #[test]
    fn who_is_silent_for_two_keepalives_is_looked_for_wherever_it_was_seen() {
        let mut world = World::new();
        world.seen.insert(place(2));
        world.at(1);
        world.received += 32;
        world.at(2);
        assert_eq!(world.at(26).1, []);
        assert_eq!(world.at(27).1, [place(2)]);
    }

    #[test]
    fn an_idle_session_is_there_however_long_the_other_side_says_nothing() {
        let mut world = World::new();
        assert!(world.at(179).0);
        // Its session has ended, and it was not heard for two keepalives.
        assert!(!world.at(180).0);
        world.received += 32;
        assert!(world.at(181).0);
    }

    #[test]
    fn the_latest_of_many_sightings_are_looked_at() {
        let mut world = World::new();
        world.seen.extend((10..20).map(place));
        world.at(1);
        world.seen.insert(place(5));
        let places = world.at(2).1;
        assert_eq!(places[0], place(5));
        assert_eq!(places.len(), MAX_PLACES);
    }

    #[test]
    fn a_node_learns_from_others_that_it_has_moved() {
        let mut hearing = Hearing::default();
        assert!(!hearing.handle_own(None));
        assert!(!hearing.handle_own(Some(&[place(1)].into())));
        assert!(!hearing.handle_own(Some(&[place(1)].into())));
        assert!(hearing.handle_own(Some(&[place(2)].into())));
        // A second observer of the same.
        assert!(!hearing.handle_own(Some(&[place(2)].into())));
        assert!(hearing.handle_own(Some(&[place(2), place(3)].into())));
        assert!(!hearing.handle_own(Some(&[place(3)].into())));
    }

    /// A leader of a region, at a private address behind NAT unless it is `public`.
    fn segment(name: &str, key: u8, public: bool) -> Segment {
        let group = SegmentName::Location(RegionName(name.into()));
        Segment {
            name: group.clone(),
            group,
            leader: NodeName(name.into()),
            public_key: PublicKey([key; 32]),
            endpoint: None,
            address: None,
            discovered: None,
            behind_nat: !public,
            persistent_keepalive: 25,
            wireguard_ips: vec![],
            nodes: vec![Member {
                name: NodeName(name.into()),
                endpoint: None,
                pod_cidrs: vec![],
                addresses: vec![],
                underlay: [[192, 168, key, 11].into()].into(),
                flannel_ips: [].into(),
                private_ip: None,
            }],
            allowed_location_ips: vec![],
        }
    }

    /// What a node published of where it saw others.
    fn saw(name: &str, others: &[(u8, SocketAddr)]) -> (NodeName, Node) {
        let object = serde_json::json!({"metadata": {"name": name}});
        let object = serde_json::from_value(object).unwrap();
        let settings = crate::cluster::ParseSettings::default();
        let mut node = crate::cluster::node::parse(&object, &settings).0.unwrap();
        let places = others.iter().map(|(key, at)| (PublicKey([*key; 32]), *at));
        node.discovered_endpoints = places.collect();
        (NodeName(name.into()), node)
    }

    #[test]
    fn leaders_behind_nat_are_looked_for_wherever_any_leader_saw_them() {
        let topology = Topology {
            segments: vec![
                segment("cloud", 1, true),
                segment("home", 2, false),
                segment("office", 3, false),
                segment("beside", 4, false),
            ],
            ..Topology::default()
        };
        let near = ([192, 168, 2, 11], 51820).into();
        let snapshot = Snapshot {
            nodes: [
                saw(
                    "cloud",
                    &[(1, place(1)), (2, place(2)), (3, place(3)), (4, place(2))],
                ),
                // Another mapping of the same router, and an address of this node's own region.
                saw("office", &[(2, place(22)), (4, near)]),
                saw("beside", &[(3, place(33))]),
                saw("no-leader", &[(3, place(9))]),
            ]
            .into(),
            ..Snapshot::default()
        };

        let sightings = sightings(
            &topology,
            &Keys::new(&topology),
            &snapshot,
            &NodeName("home".into()),
        );

        let expected: Sightings = [
            (PublicKey([2; 32]), [place(2), place(22)].into()),
            (PublicKey([3; 32]), [place(3), place(33)].into()),
        ]
        .into();
        assert_eq!(sightings, expected);
    }

    #[test]
    fn a_key_is_known_for_what_its_first_holder_is() {
        let mut topology = Topology {
            segments: vec![segment("cloud", 1, true), segment("home", 2, false)],
            ..with_keepalive(10)
        };
        // A peer of a leader's key is left out of the mesh; should one be there, it changes nothing.
        let mut twin = topology.peers[0].clone();
        twin.public_key = PublicKey([2; 32]);
        topology.peers.push(twin);
        let place = crate::topology::Whereabouts::default();
        topology.whereabouts.insert(KEY, place);
        let keys = Keys::new(&topology);

        let told = |key| {
            (
                keys.keepalive(key),
                keys.is_leader(key),
                keys.is_sought(key),
            )
        };
        assert_eq!(told(&PublicKey([1; 32])), (25, true, false));
        assert_eq!(told(&PublicKey([2; 32])), (25, true, true));
        assert_eq!(told(&KEY), (10, false, true));
        assert_eq!(told(&PublicKey([9; 32])), (0, false, false));
    }

    /// With `--mesh-granularity=full` everybody looks at everybody, once a second.
    #[test]
    fn five_thousand_leaders_are_looked_at_in_a_moment() {
        const NODES: u16 = 5000;
        let key = |n: u16| PublicKey([n.to_be_bytes(); 16].concat().try_into().unwrap());
        let segments = (1..=NODES).map(|n| Segment {
            public_key: key(n),
            ..segment(&format!("node-{n}"), 1, n % 10 != 0)
        });
        let topology = Topology {
            segments: segments.collect(),
            ..Topology::default()
        };
        let nodes = (1..=NODES).map(|n| {
            let (name, mut node) = saw(&format!("node-{n}"), &[]);
            let others = (1..=20).map(|step| (key((n + step * 10) % NODES), place(1)));
            node.discovered_endpoints = others.collect();
            (name, node)
        });
        let snapshot = Snapshot {
            nodes: nodes.collect(),
            ..Snapshot::default()
        };
        let me = NodeName("node-1".into());

        let begun = Instant::now();
        let keys = Keys::new(&topology);
        let seen = sightings(&topology, &keys, &snapshot, &me);
        let found = begun.elapsed();
        let mut hearing = Hearing::default();
        let begun = Instant::now();
        for n in 1..=NODES {
            let sign = Sign {
                endpoint: place(1),
                received: 1,
                age: Duration::ZERO,
            };
            let at = seen.get(&key(n));
            assert!(hearing.handle_sign(key(n), sign, at, &keys, begun));
            hearing.poll_search(&key(n), place(1), &keys, begun);
        }
        let looked = begun.elapsed();
        // Half a second without optimisation.
        assert!(
            found + looked < Duration::from_secs(10),
            "{found:?} {looked:?}"
        );
    }

    #[test]
    fn who_does_not_lead_looks_for_nobody() {
        let topology = Topology {
            segments: vec![segment("cloud", 1, true), segment("home", 2, false)],
            ..Topology::default()
        };
        let snapshot = Snapshot {
            nodes: [saw("cloud", &[(2, place(2))])].into(),
            ..Snapshot::default()
        };
        assert_eq!(
            sightings(
                &topology,
                &Keys::new(&topology),
                &snapshot,
                &NodeName("follower".into())
            ),
            Sightings::new()
        );
    }
}
