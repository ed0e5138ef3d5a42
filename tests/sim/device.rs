//! A tunnel device: sessions by handshakes, datagrams that move endpoints, keepalives, counters.
//!
//! It exchanges messages as the real one does, without cryptography: a session is a number that both ends have.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use selvedge::wireguard::key::PublicKey;
use selvedge::wireguard::{Answer, PeerConfig, PeerId, PeerStats, RELAY_PORT, Stats};

/// WireGuard paper, 6.1.
const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
const REKEY_AFTER: Duration = Duration::from_secs(120);
const REJECT_AFTER: Duration = Duration::from_secs(180);
/// Without an answer for so long a new handshake begins: KEEPALIVE_TIMEOUT and REKEY_TIMEOUT.
const UNANSWERED: Duration = Duration::from_secs(15);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// A replaced session still decrypts.
const REPLACED: Duration = Duration::from_secs(10);
/// As in the real device: without anything sent for so long an initiation is unasked.
const UNASKED_AFTER: Duration = Duration::from_secs(180);

/// Initiations that wait for their key.
const MAX_HELD: usize = 16;

/// What a datagram holds.
#[derive(Clone, Debug)]
pub(crate) enum Message {
    Initiation {
        from: PublicKey,
        to: PublicKey,
        number: u64,
    },
    Response {
        from: PublicKey,
        number: u64,
    },
    Data {
        from: PublicKey,
        number: u64,
        packet: Option<Vec<u8>>,
    },
    /// A datagram of another session, in the session with a relay.
    Relayed {
        from: PublicKey,
        number: u64,
        inner: Box<Relayed>,
    },
}

/// A datagram to a WireGuard address through a relay. The relay sees no more of the message than that there is one.
#[derive(Clone, Debug)]
pub(crate) struct Relayed {
    pub(crate) source: IpAddr,
    pub(crate) to: IpAddr,
    pub(crate) message: Message,
}

/// Without anything that came directly for so long a message through a relay moves the endpoint.
const DIRECT_LASTS: Duration = Duration::from_secs(5);

/// What a message proves of the way on which it came.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Evidence {
    /// It answers an initiation that was sent then.
    Answer(Instant),
    /// It confirms a session, whose answer went the same way.
    Confirmation,
    Message,
}

#[derive(Clone, Copy, Debug)]
struct Session {
    number: u64,
    since: Instant,
    /// Where a responder sends once the session is confirmed; `None` when it is.
    unconfirmed: Option<SocketAddr>,
}

#[derive(Debug)]
struct Peer {
    id: PeerId,
    config: PeerConfig,
    endpoint: Option<SocketAddr>,
    session: Option<Session>,
    next: Option<Session>,
    /// Replaced sessions, the latest last, with the times until which they decrypt. The latest does so until the
    /// next is replaced.
    replaced: Vec<(u64, Instant)>,
    /// The last initiation, and when it was sent.
    initiated: Option<(u64, Instant)>,
    /// The last but one: its answer may still come.
    before: Option<(u64, Instant)>,
    /// When to initiate again.
    again: Option<Instant>,
    rx: u64,
    tx: u64,
    handshake: Option<Instant>,
    unasked: Option<Instant>,
    waiting: Option<Instant>,
    answer: Option<(SocketAddr, Duration, Instant)>,
    sent: Option<Instant>,
    /// Data came and nothing was sent since.
    owes: Option<Instant>,
    /// The greatest initiation that was accepted: older ones are replays.
    accepted: u64,
    /// The greatest initiation of this side that was answered.
    answered: u64,
    /// When something last came directly, and when the direct way last worked in both directions.
    heard: Option<Instant>,
    proven: Option<Instant>,
}

/// An initiation that came before its key: it is answered if the key becomes known soon.
#[derive(Clone, Copy, Debug)]
struct Held {
    from: PublicKey,
    number: u64,
    source: SocketAddr,
    until: Instant,
}

/// The device of one run of an agent.
#[derive(Debug)]
pub(crate) struct Device {
    key: PublicKey,
    peers: BTreeMap<PublicKey, Peer>,
    begun: Instant,
    outgoing: Vec<(SocketAddr, Message)>,
    /// Packets that came through sessions.
    received: Vec<(PeerId, Vec<u8>)>,
    /// Whether a session began, an endpoint moved or a peer is silent.
    has_events: bool,
    /// Counts changes of sessions.
    pub(crate) changes: u64,
    numbers: u64,
    held: Vec<Held>,
    /// This node's WireGuard addresses.
    own: BTreeSet<IpAddr>,
    /// Packets that came through sessions and are the kernel's to forward.
    forwarded: Vec<Relayed>,
}

impl Device {
    /// `first` makes the numbers of its sessions its own.
    pub(crate) fn new(key: PublicKey, now: Instant, first: u64) -> Self {
        Self {
            key,
            peers: BTreeMap::new(),
            begun: now,
            outgoing: Vec::new(),
            received: Vec::new(),
            has_events: false,
            changes: 0,
            numbers: first << 32,
            held: Vec::new(),
            own: BTreeSet::new(),
            forwarded: Vec::new(),
        }
    }

    pub(crate) fn set_own_addresses(&mut self, own: BTreeSet<IpAddr>) {
        self.own = own;
    }

    /// The peer that relays to an address.
    pub(crate) fn relay_to(&self, address: IpAddr) -> Option<PublicKey> {
        let mut peers = self.peers.iter();
        let relay = peers.find(|(_, peer)| peer.config.relays_to.contains(&address));
        relay.map(|(key, _)| *key)
    }

    /// Whether an endpoint leads through a relay: the addresses of the simulation's pool are no others.
    pub(crate) fn is_relayed(endpoint: SocketAddr) -> bool {
        let is_of_pool = matches!(endpoint.ip(), IpAddr::V4(ip) if ip.octets()[..2] == [10, 4]);
        is_of_pool && endpoint.port() == RELAY_PORT
    }

    /// Whether datagrams from an address may come through a peer.
    pub(crate) fn admits(&self, through: &PublicKey, source: IpAddr) -> bool {
        let peer = self.peers.get(through);
        peer.is_some_and(|peer| peer.config.relayed_from.contains(&source))
    }

    /// Sends a message: directly, or in the session with a relay. What answers a message goes back through the relay by
    /// which that came, where no peer relays to its sender.
    fn push(&mut self, to: SocketAddr, message: Message, back: Option<PublicKey>) {
        if !Self::is_relayed(to) {
            self.outgoing.push((to, message));
            return;
        }
        let relay = self.relay_to(to.ip()).or(back);
        let source = self.own.first().copied();
        let (Some(relay), Some(source)) = (relay, source) else {
            return;
        };
        let Some(peer) = self.peers.get(&relay) else {
            return;
        };
        let (Some(session), Some(endpoint)) = (peer.session, peer.endpoint) else {
            return;
        };
        // One relay deep.
        if Self::is_relayed(endpoint) {
            return;
        }
        let relayed = Relayed {
            source,
            to: to.ip(),
            message,
        };
        let message = Message::Relayed {
            from: self.key,
            number: session.number,
            inner: Box::new(relayed),
        };
        self.outgoing.push((endpoint, message));
    }

    /// The kernel forwards a relayed datagram into the tunnel, to this peer.
    pub(crate) fn forward(&mut self, to: &PublicKey, relayed: Relayed) {
        let Some(peer) = self.peers.get(to) else {
            return;
        };
        let (Some(session), Some(endpoint)) = (peer.session, peer.endpoint) else {
            return;
        };
        // As the real device: what it would send through a relay itself goes nowhere.
        if Self::is_relayed(endpoint) || self.relay_to(relayed.to).is_some() {
            return;
        }
        let message = Message::Relayed {
            from: self.key,
            number: session.number,
            inner: Box::new(relayed),
        };
        self.outgoing.push((endpoint, message));
    }

    pub(crate) fn take_forwarded(&mut self) -> Vec<Relayed> {
        std::mem::take(&mut self.forwarded)
    }

    pub(crate) fn set_peers(&mut self, now: Instant, peers: &BTreeMap<PeerId, PeerConfig>) {
        let wanted: BTreeMap<_, _> = peers
            .iter()
            .map(|(id, config)| (config.public_key, (id, config)))
            .collect();
        self.peers.retain(|key, _| wanted.contains_key(key));
        for (key, (id, config)) in wanted {
            match self.peers.get_mut(&key) {
                Some(peer) => {
                    if peer.config.endpoint != config.endpoint && config.endpoint.is_some() {
                        peer.endpoint = config.endpoint;
                    }
                    peer.config = config.clone();
                }
                None => {
                    let peer = Peer {
                        id: id.clone(),
                        config: config.clone(),
                        endpoint: config.endpoint,
                        session: None,
                        next: None,
                        replaced: Vec::new(),
                        before: None,
                        initiated: None,
                        again: config.persistent_keepalive.map(|_| now),
                        rx: 0,
                        tx: 0,
                        handshake: None,
                        unasked: None,
                        waiting: None,
                        answer: None,
                        sent: None,
                        owes: None,
                        accepted: 0,
                        answered: 0,
                        heard: None,
                        proven: None,
                    };
                    self.peers.insert(key, peer);
                }
            }
        }
        self.changes += 1;
        let (known, waiting) = std::mem::take(&mut self.held)
            .into_iter()
            .filter(|held| now < held.until)
            .partition(|held| self.peers.contains_key(&held.from));
        self.held = waiting;
        let known: Vec<Held> = known;
        for Held {
            from,
            number,
            source,
            ..
        } in known
        {
            self.handle_initiation(now, source, from, number, None);
        }
    }

    pub(crate) fn has_session(&self, key: &PublicKey) -> bool {
        self.peers
            .get(key)
            .is_some_and(|peer| peer.session.is_some())
    }

    /// Since when the present session with a peer lasts.
    pub(crate) fn session_since(&self, key: &PublicKey) -> Option<Instant> {
        Some(self.peers.get(key)?.session?.since)
    }

    /// The peers that have a session.
    pub(crate) fn number_of(&self, key: &PublicKey) -> Option<u64> {
        Some(self.peers.get(key)?.session?.number)
    }

    /// Whether a datagram of this session would be accepted.
    pub(crate) fn decrypts(&self, from: &PublicKey, number: u64) -> bool {
        self.peers.get(from).is_some_and(|peer| {
            let current = peer.session.is_some_and(|it| it.number == number);
            let next = peer.next.is_some_and(|it| it.number == number);
            current || next || peer.replaced.iter().any(|(it, _)| *it == number)
        })
    }

    pub(crate) fn endpoint(&self, key: &PublicKey) -> Option<SocketAddr> {
        self.peers.get(key)?.endpoint
    }

    /// Sends a packet through the session with a peer; false without one.
    pub(crate) fn send_packet(&mut self, now: Instant, id: &PeerId, packet: Vec<u8>) -> bool {
        let Some(key) = self
            .peers
            .values()
            .find(|peer| peer.id == *id)
            .map(|peer| peer.config.public_key)
        else {
            return false;
        };
        if self.has_session(&key) {
            self.send_data(now, &key, Some(packet));
            return true;
        }
        if let Some(peer) = self.peers.get_mut(&key)
            && peer.again.is_none()
        {
            peer.again = Some(now);
        }
        false
    }

    pub(crate) fn try_candidates(&mut self, now: Instant, id: &PeerId, candidates: &[SocketAddr]) {
        let mut messages = Vec::new();
        let peer = self.peers.values_mut().find(|peer| peer.id == *id);
        if let Some(peer) = peer {
            let number = {
                self.numbers += 1;
                self.numbers
            };
            peer.before = peer.initiated.replace((number, now));
            peer.waiting.get_or_insert(now);
            peer.again = Some(now + REKEY_TIMEOUT);
            for candidate in candidates {
                peer.tx += 148;
                let to = peer.config.public_key;
                let message = Message::Initiation {
                    from: self.key,
                    to,
                    number,
                };
                messages.push((*candidate, message));
            }
        }
        for (to, message) in messages {
            self.push(to, message, None);
        }
    }

    pub(crate) fn take_outgoing(&mut self) -> Vec<(SocketAddr, Message)> {
        std::mem::take(&mut self.outgoing)
    }

    pub(crate) fn take_received(&mut self) -> Vec<(PeerId, Vec<u8>)> {
        std::mem::take(&mut self.received)
    }

    pub(crate) fn take_events(&mut self) -> bool {
        std::mem::take(&mut self.has_events)
    }

    fn send_data(&mut self, now: Instant, key: &PublicKey, packet: Option<Vec<u8>>) {
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        let (Some(session), Some(endpoint)) = (peer.session, peer.endpoint) else {
            return;
        };
        peer.tx += 32;
        peer.sent = Some(now);
        peer.owes = None;
        if packet.is_some() {
            peer.waiting.get_or_insert(now);
        }
        if now - session.since >= REKEY_AFTER && peer.again.is_none() {
            peer.again = Some(now);
        }
        let message = Message::Data {
            from: self.key,
            number: session.number,
            packet,
        };
        self.push(endpoint, message, None);
    }

    pub(crate) fn handle_message(&mut self, now: Instant, source: SocketAddr, message: Message) {
        self.handle(now, source, message, None);
    }

    fn handle(
        &mut self,
        now: Instant,
        source: SocketAddr,
        message: Message,
        through: Option<PublicKey>,
    ) {
        match message {
            Message::Relayed {
                from,
                number,
                inner,
            } => {
                if through.is_some() || !self.decrypts(&from, number) {
                    return;
                }
                // To the session it is data as any other.
                let data = Message::Data {
                    from,
                    number,
                    packet: None,
                };
                self.handle(now, source, data, None);
                if !self.own.contains(&inner.to) {
                    self.forwarded.push(*inner);
                } else if self.admits(&from, inner.source) {
                    let source = SocketAddr::new(inner.source, RELAY_PORT);
                    self.handle(now, source, inner.message, Some(from));
                }
            }
            Message::Initiation { from, to, number } => {
                if to != self.key {
                    return;
                }
                if self.peers.contains_key(&from) {
                    self.handle_initiation(now, source, from, number, through);
                } else if through.is_none() && self.held.len() < MAX_HELD {
                    let until = now + REKEY_TIMEOUT;
                    self.held.push(Held {
                        from,
                        number,
                        source,
                        until,
                    });
                }
            }
            Message::Response { from, number } => {
                let Some(peer) = self.peers.get_mut(&from) else {
                    return;
                };
                let mut sent = peer.initiated.into_iter().chain(peer.before);
                let Some((_, at)) = sent.find(|(sent, _)| *sent == number) else {
                    return;
                };
                // The answer to the last initiation may have overtaken this one.
                if peer.answered > number {
                    return;
                }
                peer.answered = number;
                peer.rx += 92;
                peer.answer = Some((source, now - at, now));
                let session = Session {
                    number,
                    since: now,
                    unconfirmed: None,
                };
                peer.begin(session, now);
                self.roam(now, &from, source, Evidence::Answer(at));
                self.has_events = true;
                self.changes += 1;
                self.send_data(now, &from, None);
            }
            Message::Data {
                from,
                number,
                packet,
            } => {
                let Some(peer) = self.peers.get_mut(&from) else {
                    return;
                };
                let mut evidence = Evidence::Message;
                if let Some(next) = peer.next.take_if(|next| next.number == number) {
                    if next.unconfirmed == Some(source) {
                        evidence = Evidence::Confirmation;
                    }
                    peer.begin(next, now);
                    self.has_events = true;
                    self.changes += 1;
                } else {
                    let is_current = peer.session.is_some_and(|it| it.number == number);
                    let is_replaced = peer.replaced.iter().any(|(it, _)| *it == number);
                    if !is_current && !is_replaced {
                        return;
                    }
                }
                self.roam(now, &from, source, evidence);
                let Some(peer) = self.peers.get_mut(&from) else {
                    return;
                };
                peer.rx += 32;
                peer.waiting = None;
                if let Some(packet) = packet {
                    peer.owes.get_or_insert(now);
                    let id = peer.id.clone();
                    self.received.push((id, packet));
                }
            }
        }
    }

    fn handle_initiation(
        &mut self,
        now: Instant,
        source: SocketAddr,
        from: PublicKey,
        number: u64,
        through: Option<PublicKey>,
    ) {
        let Some(peer) = self
            .peers
            .get_mut(&from)
            .filter(|peer| peer.accepted < number)
        else {
            return;
        };
        let quiet = peer
            .sent
            .max(peer.initiated.map(|(_, at)| at))
            .unwrap_or(self.begun);
        if through.is_none() && now - quiet >= UNASKED_AFTER {
            peer.unasked = Some(now);
        }
        peer.accepted = number;
        peer.rx += 148;
        peer.waiting = None;
        peer.next = Some(Session {
            number,
            since: now,
            unconfirmed: Some(source),
        });
        peer.tx += 92;
        let from = self.key;
        self.push(source, Message::Response { from, number }, through);
    }

    /// Moves the endpoint to the source of a message, if the message proves enough: the real device's rule.
    fn roam(&mut self, now: Instant, from: &PublicKey, source: SocketAddr, evidence: Evidence) {
        let is_relayed = Self::is_relayed(source);
        let relayed_address = |peer: &Peer| {
            let endpoint = peer.endpoint.filter(|at| Self::is_relayed(*at));
            endpoint
                .or_else(|| is_relayed.then_some(source))
                .map(|at| at.ip())
        };
        let address = self.peers.get(from).and_then(relayed_address);
        let has_relay = address.is_some_and(|address| self.relay_to(address).is_some());
        let Some(peer) = self.peers.get_mut(from) else {
            return;
        };
        let was_relayed = peer.endpoint.map(Self::is_relayed);
        let proves = !is_relayed && evidence != Evidence::Message;
        let moves = match (was_relayed, is_relayed) {
            (None | Some(false), false) => true,
            (None | Some(true), true) => has_relay,
            (Some(true), false) => !has_relay || proves,
            (Some(false), true) => {
                let is_answer = matches!(evidence, Evidence::Answer(begun) if peer.proven.is_none_or(|at| begun > at));
                let is_quiet = peer.heard.is_none_or(|at| now - at >= DIRECT_LASTS);
                has_relay && (is_answer || is_quiet)
            }
        };
        if !is_relayed {
            peer.heard = Some(now);
            if proves {
                peer.proven = Some(now);
            }
        }
        if moves && peer.endpoint != Some(source) {
            peer.endpoint = Some(source);
            self.has_events = true;
            self.changes += 1;
        }
    }

    /// When [`Self::handle_timeout`] is to be called.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.peers.values().filter_map(Peer::poll_timeout).min()
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        let due: Vec<_> = self
            .peers
            .values()
            .filter(|peer| peer.poll_timeout().is_some_and(|at| at <= now))
            .map(|peer| peer.config.public_key)
            .collect();
        for key in due {
            self.handle_peer(now, key);
        }
    }

    fn handle_peer(&mut self, now: Instant, key: PublicKey) {
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        if peer
            .session
            .take_if(|session| now - session.since >= REJECT_AFTER)
            .is_some()
        {
            self.changes += 1;
            peer.again = Some(now);
        }
        if peer.waiting.is_some_and(|since| now - since >= UNANSWERED) && peer.again.is_none() {
            peer.again = Some(now);
        }
        if peer.again.is_some_and(|at| at <= now) {
            self.numbers += 1;
            let number = self.numbers;
            peer.before = peer.initiated.replace((number, now));
            peer.waiting.get_or_insert(now);
            peer.again = Some(now + REKEY_TIMEOUT + Duration::from_millis(number % 333));
            if let Some(endpoint) = peer.endpoint {
                peer.tx += 148;
                let message = Message::Initiation {
                    from: self.key,
                    to: key,
                    number,
                };
                self.push(endpoint, message, None);
            }
        }
        let Some(peer) = self.peers.get(&key) else {
            return;
        };
        let is_due = peer.keepalive_at().is_some_and(|at| at <= now);
        if is_due {
            self.send_data(now, &key, None);
        }
    }

    /// One line for each peer, for people.
    pub(crate) fn describe(&self, now: Instant) -> Vec<String> {
        let peers = self.peers.values().map(|peer| {
            let ago = |at: Instant| (now - at).as_secs_f32();
            format!(
                "  {} at {:?}, session {:?}, next {:?}, replaced {:?}, since {:?} s, initiated {:?} s ago, sent {:?} s ago, routes {:?}",
                peer.id,
                peer.endpoint,
                peer.session.map(|it| it.number),
                peer.next.map(|it| it.number),
                peer.replaced.iter().map(|(it, _)| *it).collect::<Vec<_>>(),
                peer.session.map(|it| ago(it.since)),
                peer.initiated.map(|(_, at)| ago(at)),
                peer.sent.map(ago),
                peer.config.routes.iter().map(ToString::to_string).collect::<Vec<_>>(),
            )
        });
        peers.collect()
    }

    pub(crate) fn stats(&self, now: Instant) -> Stats {
        let peers = self.peers.iter().map(|(key, peer)| {
            let ago = |at: Instant| now.saturating_duration_since(at);
            let stats = PeerStats {
                public_key: *key,
                pair: None,
                endpoint: peer.endpoint,
                relayed: peer.endpoint.is_some_and(Self::is_relayed),
                rx_bytes: peer.rx,
                tx_bytes: peer.tx,
                last_handshake: peer.handshake.map(ago),
                heard_unasked: peer.unasked.map(ago),
                unanswered: peer.waiting.map(ago),
                answer: peer.answer.map(|(from, round_trip, at)| Answer {
                    from,
                    round_trip,
                    ago: ago(at),
                }),
            };
            (peer.id.clone(), stats)
        });
        Stats {
            peers: peers.collect(),
            drops: BTreeMap::new(),
        }
    }
}

impl Peer {
    fn begin(&mut self, session: Session, now: Instant) {
        if let Some(old) = self.session.replace(Session {
            unconfirmed: None,
            ..session
        }) {
            self.replaced.retain(|(_, until)| now < *until);
            self.replaced.push((old.number, now + REPLACED));
        }
        self.handshake = Some(now);
        self.again = None;
        self.waiting = None;
    }

    fn keepalive_at(&self) -> Option<Instant> {
        self.session?;
        let sent = self.sent?;
        let every = self
            .config
            .persistent_keepalive
            .map(|it| Duration::from_secs(it.get().into()));
        let persistent = every.map(|every| sent + every);
        let passive = self.owes.map(|since| since + KEEPALIVE_TIMEOUT);
        persistent.into_iter().chain(passive).min()
    }

    fn poll_timeout(&self) -> Option<Instant> {
        let unanswered = self.waiting.filter(|_| self.again.is_none());
        let unanswered = unanswered.map(|since| since + UNANSWERED);
        let end = self.session.map(|session| session.since + REJECT_AFTER);
        [self.again, unanswered, self.keepalive_at(), end]
            .into_iter()
            .flatten()
            .min()
    }
}
