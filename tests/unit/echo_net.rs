//! A fake network between the probers of several nodes, with a clock that the test turns.
//!
//! A packet takes a millisecond. Leaders that are not in the network answer every echo, so a large mesh need not be
//! there as a whole. Faults are set by the test: dead nodes, broken directions, leaders that do not
//! forward, and random loss.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use selvedge::probe::message::{Datagram, Kind, Message, datagram, packet};
use selvedge::probe::{Far, Lead, News, PORT, Prober, Sizes, Targets, Transmit};
use selvedge::topology::{NodeName, RegionName, SegmentName};
use selvedge::wireguard::{PeerId, PeerWay};

const TRIP: Duration = Duration::from_millis(1);
/// The port of every node's socket.
const SOCKET: u16 = 40_000;

/// What goes wrong.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    /// Nodes that neither send nor receive.
    pub(crate) dead: BTreeSet<String>,
    /// Directions from one node to another that carry nothing.
    pub(crate) broken: BTreeSet<(String, String)>,
    /// Leaders whose kernel forwards nothing from flannel into the tunnel's link.
    pub(crate) no_way_in: BTreeSet<String>,
    /// Leaders whose kernel forwards nothing from the tunnel's link to flannel.
    pub(crate) no_way_back: BTreeSet<String>,
    /// Lost packets, in thousandths.
    pub(crate) loss: u32,
    /// The largest packets in bytes that the tunnel carries from one leader to another.
    pub(crate) mtus: BTreeMap<(String, String), u32>,
}

pub(crate) struct Node {
    pub(crate) prober: Prober,
    /// Its address in the pod network.
    pub(crate) own: IpAddr,
    /// What its prober said, and when.
    pub(crate) news: Vec<(Instant, News)>,
    /// When it sent an echo or an answer: to the socket, the link or a peer.
    pub(crate) sent: Vec<(Instant, Transmit)>,
}

enum Arrival {
    Link(Vec<u8>),
    Peer(PeerId, Vec<u8>),
    Socket(SocketAddr, Vec<u8>),
}

pub(crate) struct Net {
    pub(crate) now: Instant,
    pub(crate) nodes: BTreeMap<String, Node>,
    pub(crate) faults: Faults,
    coming: Vec<(Instant, String, Arrival)>,
    random: StdRng,
}

impl Net {
    pub(crate) fn new(now: Instant, seed: u64) -> Self {
        Self {
            now,
            nodes: BTreeMap::new(),
            faults: Faults::default(),
            coming: Vec::new(),
            random: StdRng::seed_from_u64(seed),
        }
    }

    /// Regions with so many nodes each, of which the first two lead (or the only one).
    pub(crate) fn regions(now: Instant, seed: u64, sizes: &[(&str, usize)]) -> Self {
        Self::some_regions(now, seed, sizes, sizes.len())
    }

    /// The same mesh with the nodes of the first `count` regions only.
    pub(crate) fn some_regions(
        now: Instant,
        seed: u64,
        sizes: &[(&str, usize)],
        count: usize,
    ) -> Self {
        let mut net = Self::new(now, seed);
        let segment = |region: &str| SegmentName::Location(RegionName(region.to_owned()));
        let name = |region: &str, number: usize| NodeName(format!("{region}{}", number + 1));
        let own = |index: usize, number: usize| -> IpAddr {
            let (high, low) = (u8::try_from(index).unwrap(), u8::try_from(number).unwrap());
            [10, 42 + high, low, 0].into()
        };
        let wireguard = |index: usize, number: usize| -> IpAddr {
            let (high, low) = (u8::try_from(index).unwrap(), u8::try_from(number).unwrap());
            [10, 4, high, low + 1].into()
        };
        let probe_ip =
            |number: usize| -> IpAddr { [10, 4, 255, 254 - u8::try_from(number).unwrap()].into() };
        for (index, (region, size)) in sizes.iter().enumerate().take(count) {
            let others = || {
                sizes
                    .iter()
                    .enumerate()
                    .filter(move |(other, _)| *other != index)
            };
            let mut segments: Vec<_> = others().map(|(_, (other, _))| segment(other)).collect();
            segments.sort();
            let mut all_segments: Vec<_> =
                sizes.iter().map(|(region, _)| segment(region)).collect();
            all_segments.sort();
            for number in 0..*size {
                let leaders = (0..*size.min(&2)).filter(|leader| *leader != number);
                let far = |(other, (region, size)): (usize, &(&str, usize))| -> Vec<(PeerId, Far)> {
                    (0..*size.min(&2))
                        .map(|leader| {
                            let node = self::name(region, leader);
                            let far = Far {
                                segment: segment(region),
                                group: segment(region),
                                relay_rank: Some(0),
                                address: wireguard(other, leader),
                                own: wireguard(index, number),
                                node: NodeName(node.clone()),
                            };
                            (PeerId::new(format!("node/{node}")), far)
                        })
                        .collect()
                };
                let members = (0..*size).filter(|member| *member != number);
                let lead = (number < 2).then(|| Lead {
                    probe_ip: Some(probe_ip(number)),
                    members: members
                        .map(|member| (own(index, member), name(region, member)))
                        .collect(),
                    peers: others().flat_map(far).collect(),
                    may_forward: true,
                    sizes: None,
                    relays: true,
                    relayed: BTreeSet::new(),
                });
                let targets = Targets {
                    own: Some(own(index, number)),
                    segment: Some(segment(region)),
                    leaders: leaders
                        .map(|leader| (name(region, leader), probe_ip(leader)))
                        .collect(),
                    segments: segments.clone(),
                    all_segments: all_segments.clone(),
                    lead,
                };
                net.add(&name(region, number).0, own(index, number));
                net.set_targets(&name(region, number).0, targets);
            }
        }
        net
    }

    pub(crate) fn add(&mut self, name: &str, own: IpAddr) {
        let node = Node {
            prober: Prober::new(self.random.random()),
            own,
            news: Vec::new(),
            sent: Vec::new(),
        };
        self.nodes.insert(name.to_owned(), node);
    }

    pub(crate) fn set_targets(&mut self, name: &str, targets: Targets) {
        let now = self.now;
        self.node(name).prober.handle_targets(now, targets);
    }

    pub(crate) fn node(&mut self, name: &str) -> &mut Node {
        self.nodes.get_mut(name).expect("there is such a node")
    }

    /// Every leader measures its paths from now on, at endpoints of IPv4 below a link of this MTU.
    pub(crate) fn measure(&mut self, underlay: u32) {
        for name in self.nodes.keys().cloned().collect::<Vec<_>>() {
            let mut targets = self.node(&name).prober.targets().clone();
            if let Some(lead) = &mut targets.lead {
                let start = 1420.min(underlay - 60);
                lead.sizes = Some(Sizes { start, underlay });
                self.set_targets(&name, targets);
            }
        }
        self.look(|_, _| 0);
    }

    /// Every leader sees how its peers are reached, and that it sent so much.
    pub(crate) fn look(&mut self, sent: impl Fn(&str, &PeerId) -> u64) {
        let now = self.now;
        for (name, node) in &mut self.nodes {
            let lead = node.prober.targets().lead.clone();
            let peers = lead.into_iter().flat_map(|lead| lead.peers.into_keys());
            let way = |id: PeerId| {
                let way = PeerWay {
                    address: [192, 0, 2, 1].into(),
                    relay: None,
                    sent: sent(name, &id),
                };
                (id, way)
            };
            let ways = peers.map(way).collect();
            node.prober.handle_ways(now, &ways);
        }
    }

    /// Has a node say that it is about to stop.
    pub(crate) fn drain(&mut self, name: &str) {
        let now = self.now;
        self.node(name).prober.handle_drain(now);
        self.take(name);
    }

    /// When something is due next.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        let alive = self
            .nodes
            .iter()
            .filter(|(name, _)| !self.faults.dead.contains(*name));
        let timeouts = alive.filter_map(|(_, node)| node.prober.poll_timeout());
        let arrivals = self.coming.iter().map(|(at, ..)| *at);
        timeouts.chain(arrivals).min()
    }

    /// Does what is due.
    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        self.now = now;
        let (due, coming) = std::mem::take(&mut self.coming)
            .into_iter()
            .partition::<Vec<_>, _>(|(at, ..)| *at <= now);
        self.coming = coming;
        for (_, name, arrival) in due {
            if self.faults.dead.contains(&name) {
                continue;
            }
            let prober = &mut self.node(&name).prober;
            match arrival {
                Arrival::Link(packet) => prober.handle_packet(now, None, &packet),
                Arrival::Peer(id, packet) => prober.handle_packet(now, Some(&id), &packet),
                Arrival::Socket(from, payload) => prober.handle_datagram(now, from, &payload),
            }
            self.take(&name);
        }
        for name in self.nodes.keys().cloned().collect::<Vec<_>>() {
            if self.faults.dead.contains(&name) {
                continue;
            }
            let prober = &mut self.node(&name).prober;
            if prober.poll_timeout().is_some_and(|at| at <= now) {
                prober.handle_timeout(now);
                self.take(&name);
            }
        }
    }

    /// Runs for so long.
    pub(crate) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(next) = self.poll_timeout().filter(|next| *next <= end) {
            self.handle_timeout(next.max(self.now));
        }
        self.now = end;
    }

    /// Takes what a prober sends and says.
    fn take(&mut self, name: &str) {
        let now = self.now;
        while let Some(transmit) = self.node(name).prober.poll_transmit() {
            let node = self.node(name);
            node.sent.push((now, transmit.clone()));
            let own = node.own;
            match transmit {
                Transmit::Socket { to, payload } => self.deliver_to_leader(name, own, to, &payload),
                Transmit::Link(packet) => self.deliver_to_member(name, &packet),
                Transmit::Peer(..) | Transmit::Padded(..) => {
                    let (id, packet, size) = match transmit {
                        Transmit::Padded(id, packet, size) => (id, packet, u32::from(size)),
                        Transmit::Peer(id, packet) => (id, packet, 0),
                        Transmit::Socket { .. } | Transmit::Link(_) => unreachable!(),
                    };
                    let to = id.to_string();
                    let to = to
                        .strip_prefix("node/")
                        .expect("peers are nodes")
                        .to_owned();
                    let mtu = self.faults.mtus.get(&(name.to_owned(), to.clone()));
                    if mtu.is_some_and(|mtu| size > *mtu) {
                        continue;
                    }
                    if self.nodes.contains_key(&to) {
                        let from = PeerId::new(format!("node/{name}"));
                        self.send(name, &to, Arrival::Peer(from, packet));
                    } else {
                        self.answer(name, &to, id, &packet);
                    }
                }
            }
        }
        let node = self.node(name);
        if let Some(news) = node.prober.poll_news(now) {
            node.news.push((now, news));
        }
    }

    /// Answers the echo of a node in the place of a leader that is not in the network.
    fn answer(&mut self, name: &str, leader: &str, id: PeerId, packet: &[u8]) {
        let read = datagram(packet).expect("a UDP datagram");
        let message = Message::parse(read.payload).expect("a message");
        let direction = (name.to_owned(), leader.to_owned());
        let is_cut = self.faults.dead.contains(leader) || self.faults.broken.contains(&direction);
        if is_cut || message.kind != Kind::Echo {
            return;
        }
        let answer = Message {
            kind: Kind::Answer,
            ..message
        };
        let answer = self::packet(&Datagram {
            from: read.to,
            to: read.from,
            payload: &answer.encode(),
        });
        let arrival = Arrival::Peer(id, answer.expect("one family"));
        self.send(leader, name, arrival);
    }

    fn deliver_to_leader(&mut self, name: &str, own: IpAddr, to: SocketAddr, payload: &[u8]) {
        let leaders = self.nodes.iter().filter(|(other, node)| {
            let lead = node.prober.targets().lead.as_ref();
            *other != name
                && lead.is_some_and(|lead| {
                    lead.probe_ip == Some(to.ip()) && lead.members.contains_key(&own)
                })
        });
        let leaders: Vec<String> = leaders.map(|(name, _)| name.clone()).collect();
        for leader in leaders {
            if self.faults.no_way_in.contains(&leader) {
                continue;
            }
            let packet = packet(&Datagram {
                from: SocketAddr::new(own, SOCKET),
                to,
                payload,
            });
            self.send(name, &leader, Arrival::Link(packet.expect("one family")));
        }
    }

    fn deliver_to_member(&mut self, name: &str, packet: &[u8]) {
        if self.faults.no_way_back.contains(name) {
            return;
        }
        let read = datagram(packet).expect("a UDP datagram");
        assert_eq!(read.from.port(), PORT);
        let mut nodes = self.nodes.iter();
        let member = nodes.find(|(_, node)| node.own == read.to.ip());
        if let Some(member) = member.map(|(name, _)| name.clone()) {
            assert_eq!(read.to.port(), SOCKET);
            let arrival = Arrival::Socket(read.from, read.payload.to_vec());
            self.send(name, &member, arrival);
        }
    }

    fn send(&mut self, from: &str, to: &str, arrival: Arrival) {
        let is_broken = self
            .faults
            .broken
            .contains(&(from.to_owned(), to.to_owned()));
        let is_lost = self.random.random_range(0..1_000) < self.faults.loss;
        if !is_broken && !is_lost {
            self.coming.push((self.now + TRIP, to.to_owned(), arrival));
        }
    }
}

/// The name of a node of [`Net::regions`].
pub(crate) fn name(region: &str, number: usize) -> String {
    format!("{region}{}", number + 1)
}
