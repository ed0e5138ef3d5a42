//! The state machine of all echoes of one node.

mod reach;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};

use self::reach::Reach;
use super::message::{self, Datagram, Kind, Message};
use super::mtus::Mtus;
use super::path_mtu::Ask;
use super::rate::Rate;
use super::responder::{Forwarding, Responder, Sender};
use super::targets::{Lead, Targets};
use super::{RegionLeader, Verdicts};
use crate::liveness::PathState;
use crate::liveness::path::{INTERVAL, Path, Statement};
use crate::topology::{NodeName, SegmentName};
use crate::wireguard::{PeerId, PeerWay};

/// The UDP port of echoes and answers (RFC 5881, 4: BFD's echo packets).
pub const PORT: u16 = crate::wireguard::ECHO_PORT;
/// Echoes that all paths together send at most, a second and at once.
const BUDGET: (u32, u32) = (190, 10);
/// Echoes that healthy paths send a second at most. The rest of the budget is for paths in doubt.
const STEADY: u32 = 180;
/// Echoes of one path are up to this much further apart than the interval, in thousandths.
const JITTER: u64 = 50;

/// A path, by what it leads through or to.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Key {
    Leader(NodeName),
    Peer(PeerId),
}

#[derive(Debug)]
struct Probe {
    path: Path,
    /// The token of the last answer; 0 before the first.
    acknowledged: u64,
    /// The segments that the leader says it does not reach.
    unreached: BTreeSet<SegmentName>,
}

/// Something to send.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Transmit {
    /// A UDP payload from the socket in the pod network.
    Socket {
        /// The probe address of a leader, and [`PORT`].
        to: SocketAddr,
        /// The payload.
        payload: Vec<u8>,
    },
    /// An IP packet to the link, which the kernel forwards.
    Link(Vec<u8>),
    /// An IP packet to a peer of the tunnel.
    Peer(PeerId, Vec<u8>),
    /// The same, padded to so many bytes, in a datagram that nothing may fragment.
    Padded(PeerId, Vec<u8>, u16),
}

/// What the echoes say.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct News {
    /// Of the other leaders.
    pub verdicts: Verdicts,
    /// Of this node as a leader.
    pub forwarding: Forwarding,
    /// The largest packets in bytes that the paths to leaders of other regions carry, where that is measured.
    pub mtus: BTreeMap<PeerId, u32>,
}

/// The kind of a path.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum PathKind {
    /// Through another leader of the own region.
    Leader,
    /// Through the tunnel, to a leader of another region.
    Peer,
}

/// A path and what is measured on it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PathStats {
    /// Its kind.
    pub kind: PathKind,
    /// The leader.
    pub node: NodeName,
    /// The segment of that leader.
    pub segment: SegmentName,
    /// What the echoes say.
    pub state: PathState,
    /// Since when.
    pub since: Instant,
    /// The smoothed round-trip time; `None` before the first answer.
    pub rtt: Option<Duration>,
    /// How many of the last 100 echoes stayed unanswered, in thousandths; `None` before the first results.
    pub loss: Option<u32>,
    /// Its MTU, where it is measured.
    pub mtu: Option<MtuStats>,
    /// The relay that the tunnel's datagrams go through; `None` where they go directly.
    pub via: Option<Via>,
}

/// A relay on a path.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Via {
    /// The leader that relays.
    pub node: NodeName,
    /// Its segment.
    pub segment: SegmentName,
    /// Since when this node uses it.
    pub since: Instant,
}

/// The measured MTU of a path.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MtuStats {
    /// The bytes of a packet inside the tunnel.
    pub bytes: u32,
    /// Since when it is so much.
    pub since: Instant,
    /// Whether an echo of this size has ever passed.
    pub is_confirmed: bool,
}

/// Sends echoes, answers those of others, and says what they prove.
///
/// ```text
///   targets ──► handle_targets ─┐                        ┌─► Socket ──► flannel ──► other leaders
///   SIGTERM ──► handle_drain ───┤                        ├─► Link ────► kernel ───► nodes of the region
///   socket ───► handle_datagram ┼─► paths, responder ────┼─► Peer ────► tunnel ───► leaders elsewhere
///   device ───► handle_packet ──┤        │               │
///   device ───► handle_ways ────┤        │               │
///   clock ────► handle_timeout ─┘        └─► News ──► controller ──► plan
/// ```
///
/// The contract is the controller's: the owner calls a `handle_` method for all that happens, with times that do
/// not decrease, and then takes everything from [`Self::poll_transmit`] and [`Self::poll_news`]. At
/// [`Self::poll_timeout`] it calls [`Self::handle_timeout`]. The same calls with the same seed have the same
/// results.
///
/// # What is trusted
/// Packets of a peer of the tunnel are that peer's: WireGuard has authenticated them. In the region an answer counts
/// only with the random token of a recent echo over that path (as QUIC's PATH_CHALLENGE, RFC 9000, 8.2), and
/// echoes of addresses outside the region get no answer. An answer has the length of its echo, and each
/// sender gets a limited number of them, so no sender can use a leader to flood another.
#[derive(Debug)]
pub struct Prober {
    targets: Targets,
    generation: u64,
    probes: BTreeMap<Key, Probe>,
    mtus: Mtus,
    responder: Responder,
    budget: Rate,
    random: StdRng,
    draining: bool,
    transmits: VecDeque<Transmit>,
    /// Whether a verdict may be another than in `told`.
    changed: bool,
    told: News,
    /// Messages that were refused.
    refused: u64,
    /// Which segments leaders reach directly, and the relays that follow from it.
    reach: Reach,
}

impl Prober {
    /// A prober without targets. The seed must be random: the tokens follow from it.
    pub fn new(seed: [u8; 32]) -> Self {
        Self {
            targets: Targets::default(),
            generation: 0,
            probes: BTreeMap::new(),
            mtus: Mtus::default(),
            responder: Responder::default(),
            budget: Rate::new(BUDGET.0, BUDGET.1),
            random: StdRng::from_seed(seed),
            draining: false,
            transmits: VecDeque::new(),
            changed: false,
            told: News::default(),
            refused: 0,
            reach: Reach::default(),
        }
    }

    /// These are the targets from now on. What is known of paths that stay is kept.
    pub fn handle_targets(&mut self, now: Instant, targets: Targets) {
        if targets == self.targets {
            return;
        }
        if targets.all_segments != self.targets.all_segments {
            self.forget_own_reach();
        }
        let generation = targets.generation();
        let leaders = targets.leaders.keys().cloned().map(Key::Leader);
        let peers = targets.lead.iter().flat_map(|lead| lead.peers.keys());
        let keys = leaders.chain(peers.cloned().map(Key::Peer));
        let keys = keys.collect::<BTreeSet<_>>();
        let interval = interval(keys.len());
        // A probe address follows the leader's place among the others of its segment. The path through it is the
        // same in any place.
        let moved = |key: &Key| match key {
            Key::Leader(_) => false,
            Key::Peer(id) => far_address(&self.targets, id) != far_address(&targets, id),
        };
        let stay = |key: &Key| keys.contains(key) && !moved(key);
        self.probes.retain(|key, _| stay(key));
        for key in keys {
            let spread = self.random.random_range(Duration::ZERO..interval);
            let probe = self.probes.entry(key).or_insert_with(|| Probe {
                path: Path::new(now, now + spread, interval),
                acknowledged: 0,
                unreached: BTreeSet::new(),
            });
            probe.path.set_interval(interval);
            if generation != self.generation {
                probe.unreached.clear();
            }
        }
        let lead = targets.lead.as_ref();
        let measured = lead.filter(|lead| lead.sizes.is_some());
        self.mtus.retain(|id| {
            let stays = measured.is_some_and(|lead| lead.peers.contains_key(id));
            stays && !moved(&Key::Peer(id.clone()))
        });
        self.responder.retain(|sender| match sender {
            Sender::Member(address) => lead.is_some_and(|lead| lead.members.contains_key(address)),
            Sender::Peer(id) => lead.is_some_and(|lead| lead.peers.contains_key(id)),
        });
        self.generation = generation;
        self.targets = targets;
        self.retain_statements();
        self.changed = true;
    }

    /// This node is about to stop: says so to all that send echoes to it, at once and in every further answer.
    pub fn handle_drain(&mut self, now: Instant) {
        if std::mem::replace(&mut self.draining, true) {
            return;
        }
        self.changed = true;
        for (sender, from, token) in self.responder.recent(now) {
            self.answer(now, &sender, from, token);
        }
    }

    /// Whether everything that sends echoes to this node knows that it drains.
    pub fn is_drained(&self, now: Instant) -> bool {
        self.draining && self.responder.all_know(now)
    }

    /// A datagram came to the socket in the pod network.
    pub fn handle_datagram(&mut self, now: Instant, from: SocketAddr, payload: &[u8]) {
        let mut leaders = self.targets.leaders.iter();
        let leader = leaders.find(|(_, ip)| **ip == from.ip() && from.port() == PORT);
        let message = Message::parse(payload).filter(|message| message.kind == Kind::Answer);
        let (Some((name, _)), Some(message)) = (leader, message) else {
            self.refused += 1;
            return;
        };
        self.handle_answer(now, &Key::Leader(name.clone()), &message);
    }

    /// The peers of the tunnel are reached so now. Without this, no MTU is measured.
    pub fn handle_ways(&mut self, now: Instant, ways: &BTreeMap<PeerId, PeerWay>) {
        let Some((lead, sizes)) =
            (self.targets.lead.as_ref()).and_then(|lead| Some((lead, lead.sizes?)))
        else {
            return;
        };
        let is_path = |id: &PeerId| lead.peers.contains_key(id);
        self.changed |= self.mtus.handle_ways(now, sizes, ways, is_path);
    }

    /// An IP packet to an address of [`Targets::diverted`] came through the device: from a peer, or from the link.
    pub fn handle_packet(&mut self, now: Instant, peer: Option<&PeerId>, packet: &[u8]) {
        let read = message::datagram(packet)
            .and_then(|datagram| Some((datagram, Message::parse(datagram.payload)?)));
        let (Some((datagram, message)), Some(lead)) = (read, &self.targets.lead) else {
            self.refused += 1;
            return;
        };
        let Some(sender) = sender(lead, peer, &datagram) else {
            self.refused += 1;
            return;
        };
        match (message.kind, &sender) {
            (Kind::Echo, _) => {
                let (from, token) = (datagram.from, message.token);
                self.take_statement(&sender, &message);
                if self
                    .responder
                    .handle_echo(now, sender.clone(), from, &message)
                {
                    self.answer(now, &sender, from, token);
                }
            }
            (Kind::Answer, Sender::Peer(id)) => {
                self.handle_answer(now, &Key::Peer(id.clone()), &message);
            }
            // Answers of the region come to the socket.
            (Kind::Answer, Sender::Member(_)) => self.refused += 1,
        }
    }

    /// The time of [`Self::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Instant) {
        let mut due = Vec::new();
        for (key, probe) in &mut self.probes {
            let before = probe.path.state();
            probe.path.handle_timeout(now);
            self.changed |= probe.path.state() != before;
            let at = probe.path.poll_echo();
            if at <= now {
                due.push((at, key.clone()));
            }
            if let Key::Peer(id) = key {
                self.mtus.follow(now, id, &probe.path);
            }
        }
        due.sort();
        for (_, key) in due {
            if !self.budget.take(now) {
                break;
            }
            self.send_echo(now, &key);
        }
        let (asks, changed) = self.mtus.handle_timeout(now);
        self.changed |= changed;
        for (id, ask) in asks {
            self.send_padded(now, &id, ask);
        }
    }

    /// When [`Self::handle_timeout`] is to be called; `None` without targets.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let ready = self.budget.poll_ready();
        let paths = self.probes.values().map(|probe| &probe.path);
        let times = paths.map(|path| {
            let echo = path.poll_echo();
            let echo = ready.map_or(echo, |ready| ready.max(echo));
            path.poll_timeout().map_or(echo, |at| at.min(echo))
        });
        let others = [self.mtus.poll_timeout(), self.reach.poll_timeout()];
        times.chain(others.into_iter().flatten()).min()
    }

    /// The next thing to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// What the echoes say, if it is something else than last time.
    pub fn poll_news(&mut self, now: Instant) -> Option<News> {
        let forwarding = self.forwarding(now);
        if self.changed || self.reach.poll_timeout().is_some_and(|at| at <= now) {
            self.changed = true;
            self.follow_reach(now);
        }
        if !std::mem::take(&mut self.changed) && forwarding == self.told.forwarding {
            return None;
        }
        let news = News {
            verdicts: self.verdicts(),
            forwarding,
            mtus: self.mtus.mtus(),
        };
        (news != self.told).then(|| {
            self.told = news.clone();
            news
        })
    }

    /// All paths, those through the own region first.
    pub fn stats(&self) -> Vec<PathStats> {
        let probes = self.probes.iter();
        probes
            .filter_map(|(key, probe)| {
                let (kind, node, segment, mtu) = match key {
                    Key::Leader(name) => {
                        (PathKind::Leader, name, self.targets.segment.as_ref()?, None)
                    }
                    Key::Peer(id) => {
                        let far = self.targets.lead.as_ref()?.peers.get(id)?;
                        (PathKind::Peer, &far.node, &far.segment, self.mtus.get(id))
                    }
                };
                Some(PathStats {
                    kind,
                    node: node.clone(),
                    segment: segment.clone(),
                    state: probe.path.state(),
                    since: probe.path.since(),
                    rtt: probe.path.rtt(),
                    loss: probe.path.loss(),
                    mtu: mtu.map(|mtu| MtuStats {
                        bytes: mtu.mtu(),
                        since: mtu.since(),
                        is_confirmed: mtu.is_confirmed(),
                    }),
                    via: self.via(key),
                })
            })
            .collect()
    }

    /// What it sends echoes to, and whose it answers.
    pub fn targets(&self) -> &Targets {
        &self.targets
    }

    /// How long a path may be silent before it is down.
    pub fn detection(&self) -> Duration {
        let paths = self.probes.values().map(|probe| probe.path.detection());
        paths.max().unwrap_or_default()
    }

    /// Messages that were refused: of strangers, malformed, or of another version.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Whether another leader of the region answers, so that this node may leave its traffic to that one.
    pub fn has_other_leader(&self) -> bool {
        let mut probes = self.probes.iter();
        probes.any(|(key, probe)| {
            matches!(key, Key::Leader(_)) && probe.path.state() == PathState::Up
        })
    }

    fn verdicts(&self) -> Verdicts {
        let mut verdicts = Verdicts::default();
        for (key, probe) in &self.probes {
            let state = probe.path.state();
            match key {
                Key::Leader(name) => {
                    let leader = RegionLeader {
                        state,
                        unreached: probe.unreached.clone(),
                        direct: self.stated(key).cloned(),
                    };
                    verdicts.leaders.insert(name.clone(), leader);
                }
                Key::Peer(id) => {
                    verdicts.peers.insert(id.clone(), state);
                }
            }
        }
        verdicts.relays = self.reach.relays.peers();
        verdicts
    }

    fn forwarding(&self, now: Instant) -> Forwarding {
        let Some(lead) = &self.targets.lead else {
            return Forwarding::Unknown;
        };
        let leaders = lead.members.iter().filter_map(|(address, name)| {
            let probe = self.probes.get(&Key::Leader(name.clone()))?;
            let path = Some(&probe.path).filter(|path| path.state() == PathState::Up)?;
            Some((*address, (path.answering()?, path.heard()?)))
        });
        self.responder.forwarding(now, &leaders.collect())
    }

    /// Whether this leader forwards, as far as it knows.
    fn forwards(&self, now: Instant, lead: &Lead) -> bool {
        match self.forwarding(now) {
            Forwarding::Works => true,
            Forwarding::NoWayBack | Forwarding::NoWayIn => false,
            Forwarding::Unknown => lead.may_forward,
        }
    }

    fn handle_answer(&mut self, now: Instant, key: &Key, message: &Message) {
        if let Key::Peer(id) = key
            && let Some(changed) = self.mtus.handle_answer(now, id, message.token)
        {
            self.changed |= changed;
            return;
        }
        let Some(probe) = self.probes.get_mut(key) else {
            return;
        };
        let says = Statement {
            draining: message.draining,
            // An answer through a leader of the own region proves that it forwards.
            forwards: message.forwards || matches!(key, Key::Leader(_)),
        };
        let before = probe.path.state();
        if !probe.path.handle_answer(now, message.token, says) {
            self.refused += 1;
            return;
        }
        self.changed |= probe.path.state() != before;
        probe.acknowledged = message.token;
        if let Key::Peer(id) = key {
            self.mtus.follow(now, id, &probe.path);
        }
        if matches!(key, Key::Leader(_)) && message.generation == self.generation {
            let segments = self.targets.segments.iter().enumerate();
            let lacking = segments.filter(|(number, _)| message.lacks(*number));
            let unreached = lacking.map(|(_, name)| name.clone()).collect();
            self.changed |= probe.unreached != unreached;
            probe.unreached = unreached;
        }
    }

    fn send_echo(&mut self, now: Instant, key: &Key) {
        let Some(probe) = self.probes.get_mut(key) else {
            return;
        };
        // Zero stands for no answer.
        let token = self.random.next_u64().max(1);
        let jitter = self.random.random_range(0..=JITTER);
        let jitter = INTERVAL * u32::try_from(jitter).unwrap_or_default() / 1_000;
        probe.path.handle_sent(now, token, jitter);
        let Some(payload) = self.echo(now, key, token) else {
            return;
        };
        let transmit = match key {
            Key::Leader(name) => {
                let ip = self.targets.leaders.get(name);
                ip.map(|ip| Transmit::Socket {
                    to: SocketAddr::new(*ip, PORT),
                    payload,
                })
            }
            Key::Peer(id) => self.to_peer(id, &payload),
        };
        self.transmits.extend(transmit);
    }

    /// Sends a padded echo, and the small one beside it.
    fn send_padded(&mut self, now: Instant, id: &PeerId, ask: Ask) {
        let key = Key::Peer(id.clone());
        let mut send = |size: u32| {
            let token = self.random.next_u64().max(1);
            let payload = self.echo(now, &key, token)?;
            let Transmit::Peer(id, packet) = self.to_peer(id, &payload)? else {
                return None;
            };
            let size = u16::try_from(size).unwrap_or(u16::MAX);
            self.transmits.push_back(Transmit::Padded(id, packet, size));
            Some(token)
        };
        let large = send(ask.size);
        let small = ask.beside.and_then(send);
        // A token that was not sent has no answer.
        self.mtus
            .handle_sent(now, id, ask, (large.unwrap_or(0), small));
    }

    /// The echo of a path.
    fn echo(&self, now: Instant, key: &Key, token: u64) -> Option<Vec<u8>> {
        let probe = self.probes.get(key)?;
        let echo = Message {
            kind: Kind::Echo,
            draining: self.draining,
            forwards: true,
            knows: probe.path.state() == PathState::Draining,
            direct: false,
            token,
            acknowledged: probe.acknowledged,
            generation: self.generation,
            unreached: Message::NOTHING,
        };
        Some(self.state_reach(now, key, echo).encode())
    }

    /// Answers an echo, or answers it again.
    fn answer(&mut self, now: Instant, to: &Sender, from: SocketAddr, token: u64) {
        let Some(lead) = &self.targets.lead else {
            return;
        };
        let mut answer = Message {
            kind: Kind::Answer,
            draining: self.draining,
            forwards: self.forwards(now, lead),
            knows: false,
            direct: false,
            token,
            acknowledged: 0,
            generation: self.generation,
            unreached: Message::NOTHING,
        };
        let transmit = match to {
            Sender::Member(_) => {
                for number in self.unreached(lead) {
                    answer.set_lacking(number);
                }
                let probe_ip = lead.probe_ip;
                probe_ip.and_then(|probe_ip| {
                    let packet = message::packet(&Datagram {
                        from: SocketAddr::new(probe_ip, PORT),
                        to: from,
                        payload: &answer.encode(),
                    });
                    packet.map(Transmit::Link)
                })
            }
            Sender::Peer(id) => self.to_peer(id, &answer.encode()),
        };
        if let Some(transmit) = transmit {
            self.transmits.push_back(transmit);
            self.responder.handle_answered(now, to, token);
        }
    }

    fn to_peer(&self, id: &PeerId, payload: &[u8]) -> Option<Transmit> {
        let far = self.targets.lead.as_ref()?.peers.get(id)?;
        let packet = message::packet(&Datagram {
            from: SocketAddr::new(far.own, PORT),
            to: SocketAddr::new(far.address, PORT),
            payload,
        })?;
        Some(Transmit::Peer(id.clone(), packet))
    }
}

/// The interval between the echoes of each of so many healthy paths.
pub(super) fn interval(paths: usize) -> Duration {
    let paths = u32::try_from(paths).unwrap_or(u32::MAX);
    INTERVAL.max(Duration::from_secs(1) * paths / STEADY)
}

/// Who sent a datagram that came from this peer, or from the link; `None` if it may not send any here.
fn sender(lead: &Lead, peer: Option<&PeerId>, datagram: &Datagram<'_>) -> Option<Sender> {
    let (from, to) = (datagram.from, datagram.to);
    match peer {
        Some(id) => {
            let far = lead.peers.get(id)?;
            let expected = (
                SocketAddr::new(far.address, PORT),
                SocketAddr::new(far.own, PORT),
            );
            ((from, to) == expected).then(|| Sender::Peer(id.clone()))
        }
        None => {
            let is_here = to.port() == PORT && Some(to.ip()) == lead.probe_ip;
            (is_here && lead.members.contains_key(&from.ip())).then(|| Sender::Member(from.ip()))
        }
    }
}

fn far_address(targets: &Targets, id: &PeerId) -> Option<(IpAddr, IpAddr)> {
    let far = targets.lead.as_ref()?.peers.get(id)?;
    Some((far.address, far.own))
}
