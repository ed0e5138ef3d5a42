//! Handshakes and timers: what runs on the handshake thread.
//!
//! A message without a valid first MAC gets no answer, so the device is silent to a sender that does not
//! know its public key. Under load it also requires the second MAC, which proves that the sender receives
//! at its address, and limits each source. It spends at most a tenth of its time on unknown senders, so a
//! flood costs the packet threads little. An initiation whose key is not known yet may wait for it, see `held`.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::{HalfHandshake, Handshake, SessionKeys, parse_handshake_anon};
use boringtun::noise::{HandshakeInit, Packet, parse_incoming_packet};
use boringtun::x25519;

use super::admission::rate_limit::RateLimit;
use super::admission::{HandshakeMessage, Job, LOAD_LASTS};
use super::clock::Time;
use super::core::Core;
use super::drops::Dropped;
use super::endpoint_rule::Evidence;
use super::events::Event;
use super::held::Held;
use super::identity::Identity;
use super::key::PublicKey;
use super::packet::Outer;
use super::pairings::{Pair, Pairing};
use super::peer::{HandshakeState, Peer, Wire};
use super::protocol::{
    COOKIE_REPLY_SIZE, COOKIE_SECRET_MAX_AGE, INITIATION_SIZE, REKEY_TIMEOUT, RESPONSE_SIZE,
};
use super::send::{send, send_through_relay, send_to};
use super::session::Session;
use super::timers::Attempt;
use super::transmit::Transmit;
use super::way::Way;

/// The least time between two accepted initiations of a peer: at most 50 per second.
const INITIATION_INTERVAL: Duration = Duration::from_millis(20);
/// A cookie is used for the age of its secret, less the time that it was under way.
const COOKIE_LASTS: Duration = Duration::from_secs(COOKIE_SECRET_MAX_AGE.as_secs() - 5);

/// Under load, unknown senders get this much of each [`SLICE`]: enough for some thousand cookies a second.
const UNKNOWN_SHARE: Duration = Duration::from_micros(500);
const SLICE: Duration = Duration::from_millis(10);

/// The handshake thread's state.
pub(super) struct Handshaker {
    core: Arc<Core>,
    /// For sources with a valid cookie.
    limit: RateLimit,
    /// For addresses of peers, which need no cookie within this limit.
    known_limit: RateLimit,
    loaded: Option<Time>,
    /// Initiations that came before their key was known.
    held: Held,
    /// When the current slice began, and how much of it unknown senders have used.
    slice: Option<Time>,
    spent: Duration,
    /// For packets that waited for a session, and for keepalives.
    transmit: Transmit,
}

impl Handshaker {
    pub(super) fn new(core: Arc<Core>) -> Self {
        Self {
            core,
            limit: RateLimit::default(),
            known_limit: RateLimit::default(),
            loaded: None,
            held: Held::default(),
            slice: None,
            spent: Duration::ZERO,
            transmit: Transmit::default(),
        }
    }

    /// Does every queued job, except messages of unknown senders beyond their share; returns when to go on
    /// with those.
    pub(super) fn run(&mut self, wire: &impl Wire, clock: impl Fn() -> Time) -> Option<Time> {
        let core = self.core.clone();
        let mut now = clock();
        while let Some((job, loaded)) = core.jobs.pop(self.has_time_for_unknown(now)) {
            if loaded || core.jobs.is_flooded(now) {
                self.loaded = Some(now);
            }
            match job {
                Job::Message(message) => {
                    let result = self.message(&message, wire, now);
                    if let Err(reason) = result {
                        core.drops.add(reason, 1);
                    }
                    // A forged message may have the address of a peer.
                    if !message.known || result.is_err() {
                        self.spent += clock().since(now);
                    }
                }
                Job::Initiate(peer) => {
                    peer.handshake_asked
                        .store(false, std::sync::atomic::Ordering::Relaxed);
                    self.initiate(&peer, Attempt::First, wire, now);
                }
                Job::KeysAdded => self.answer_held(wire, now),
                Job::TryIdentity(peer, own) => self.try_identity(&peer, &own, wire, now),
                Job::TryCandidates(peer, candidates) => {
                    self.try_candidates(&peer, &candidates, wire, now);
                }
                Job::Source(peer, from) => peer.judge_source(from, wire.leads(&from)),
                Job::Flush(peer) => {
                    self.transmit.flush_staged(&core, wire, &peer, now);
                }
                Job::Keepalive(peer) => self.transmit.keepalive(&core, wire, &peer, now),
            }
            now = clock();
        }
        self.transmit.rest();
        self.slice
            .filter(|_| core.jobs.unknown() > 0 || core.jobs.is_flooded(now))
            .map(|slice| slice + SLICE)
    }

    fn has_time_for_unknown(&mut self, now: Time) -> bool {
        if self.slice.is_none_or(|slice| now.since(slice) >= SLICE) {
            self.slice = Some(now);
            self.spent = Duration::ZERO;
        }
        self.spent < UNKNOWN_SHARE || !self.is_loaded(now)
    }

    /// Does what is due for all peers; returns when to poll again.
    pub(super) fn tick(&mut self, wire: &impl Wire, now: Time) -> Option<Time> {
        let core = self.core.clone();
        let table = core.table.load_full();
        let mut next: Option<Time> = None;
        for peer in table.peers.values() {
            let due = peer.timers.poll(now);
            if let Some(attempt) = due.handshake {
                // The local address may not exist any more.
                peer.clear_source();
                self.initiate(peer, attempt, wire, now);
            }
            if due.keepalive && core.is_up() {
                self.transmit.keepalive(&core, wire, peer, now);
            }
            if due.give_up {
                core.drops.add(Dropped::NoSession, peer.staged().clear());
            }
            if due.silent {
                core.raise(peer, Event::Silent);
            }
            if due.expired {
                core.raise(peer, Event::Expired);
            }
            if due.wipe {
                core.indices.retire(peer.forget_sessions());
                forget_handshakes(&core, &mut peer.handshake());
            }
            next = [next, due.next].into_iter().flatten().min();
        }
        self.transmit.rest();
        core.note_known_addresses();
        next
    }

    fn message(
        &mut self,
        message: &HandshakeMessage,
        wire: &impl Wire,
        now: Time,
    ) -> Result<(), Dropped> {
        let core = self.core.clone();
        let bytes = message.bytes();
        let identities = core.identities.load();
        if identities.current().is_none() {
            return Err(Dropped::UnknownIndex);
        }
        let packet = parse_incoming_packet(bytes).map_err(|_| Dropped::Malformed)?;
        if let Packet::PacketCookieReply(reply) = packet {
            return cookie(&core, reply.receiver_idx, bytes, now);
        }
        let identity = identities.addressed(bytes).ok_or(Dropped::Unauthentic)?;
        if self.is_loaded(now) {
            self.admit(identity, message, wire, now)?;
        }
        match packet {
            Packet::HandshakeInit(init) => self.respond(identity, &init, message, wire, now),
            Packet::HandshakeResponse(response) => {
                self.complete(identity, response.receiver_idx, message, wire, now)
            }
            Packet::PacketCookieReply(_) | Packet::PacketData(_) => Err(Dropped::Malformed),
        }
    }

    /// Under load: whether a message is worth the work of a handshake.
    fn admit(
        &mut self,
        identity: &Identity,
        message: &HandshakeMessage,
        wire: &impl Wire,
        now: Time,
    ) -> Result<(), Dropped> {
        let (bytes, remote) = (message.bytes(), message.from.remote());
        if message.known && self.known_limit.allows(remote.ip(), now) {
            return Ok(());
        }
        if !self.has_time_for_unknown(now) {
            return Err(Dropped::RateLimited);
        }
        let cookies = &identity.cookies;
        if !cookies.verify_mac2(bytes, remote, now.as_duration()) {
            send_cookie(&self.core, identity, message, wire, now)?;
            return Err(Dropped::RateLimited);
        }
        if self.limit.allows(remote.ip(), now) {
            Ok(())
        } else {
            Err(Dropped::RateLimited)
        }
    }

    fn is_loaded(&self, now: Time) -> bool {
        self.loaded
            .is_some_and(|loaded| now.since(loaded) < LOAD_LASTS)
    }

    /// Sends an initiation, unless one was sent within [`REKEY_TIMEOUT`] for another reason.
    fn initiate(&self, peer: &Arc<Peer>, attempt: Attempt, wire: &impl Wire, now: Time) {
        let recent = |at| now.since(at) < REKEY_TIMEOUT;
        if attempt == Attempt::First && peer.last_initiation().is_some_and(recent) {
            return;
        }
        let mut buffer = [0; INITIATION_SIZE];
        if !self.begin(peer, None, &mut buffer, now) {
            return;
        }
        tracing::debug!(peer = %peer.id(), ?attempt, "sending a handshake initiation");
        peer.timers.sent(false, now);
        peer.timers.initiated(attempt, now);
        let run = (&buffer[..], INITIATION_SIZE);
        let sent = send(&self.core, wire, peer, run, Outer::default(), now);
        if !sent {
            peer.timers.initiation_refused(now);
        }
    }

    /// Sends one initiation under an own key to the endpoint of a peer, beside the traffic. It arms no timer: a
    /// peer that does not know the key gives no answer.
    fn try_identity(&self, peer: &Arc<Peer>, own: &PublicKey, wire: &impl Wire, now: Time) {
        let mut buffer = [0; INITIATION_SIZE];
        if peer.way().is_some() && self.begin(peer, Some(own), &mut buffer, now) {
            tracing::debug!(peer = %peer.id(), %own, "trying a handshake under another key");
            let run = (&buffer[..], INITIATION_SIZE);
            send(&self.core, wire, peer, run, Outer::default(), now);
        }
    }

    /// Sends one initiation to all candidate endpoints of a peer, beside the traffic to its endpoint.
    ///
    /// The answer moves the endpoint to its source. Without an answer, later attempts go to the endpoint as it
    /// was. The peer accepts the first copy of the initiation only: the others are no newer (paper, 5.1).
    fn try_candidates(
        &self,
        peer: &Arc<Peer>,
        candidates: &[SocketAddr],
        wire: &impl Wire,
        now: Time,
    ) {
        let mut buffer = [0; INITIATION_SIZE];
        if !self.begin(peer, None, &mut buffer, now) {
            return;
        }
        tracing::debug!(peer = %peer.id(), ?candidates, "trying candidates");
        peer.timers.initiated(Attempt::First, now);
        let core = &self.core;
        let table = core.table.load();
        let run = (&buffer[..], INITIATION_SIZE);
        for &candidate in candidates {
            match table.relays.way_to(candidate) {
                Way::Direct(to) => match wire.send(run.0, run.1, &to, Outer::default(), false) {
                    Ok(_) => peer.note_sent(now),
                    Err(_) => core.drops.add(Dropped::SendFailed, 1),
                },
                Way::Relayed(to) => {
                    send_through_relay(core, wire, run, (to, None), Outer::default(), now);
                }
            }
        }
    }

    /// Begins a handshake by writing its first message, under this own key or, without one, under the pair of keys
    /// whose turn it is; false if none is possible with the peer.
    fn begin(
        &self,
        peer: &Arc<Peer>,
        own: Option<&PublicKey>,
        buffer: &mut [u8; INITIATION_SIZE],
        now: Time,
    ) -> bool {
        let mut state = peer.handshake();
        if state
            .cookie_since
            .is_some_and(|since| now.since(since) >= COOKIE_LASTS)
        {
            state.cookie_since = None;
            state.pairings.clear_cookies();
        }
        let pairing = match own {
            Some(own) => state.pairings.with_own(own),
            None => state.pairings.for_initiation(),
        };
        let Some(Pairing { noise, .. }) = pairing else {
            return false;
        };
        let index = self.core.indices.draw(peer);
        let timestamp = {
            let mut timestamps = self
                .core
                .timestamps
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            timestamps.next((self.core.wall)()).to_tai64n()
        };
        // Fails only for a key of small order. Nothing is ever sent to such a peer.
        if noise
            .format_handshake_initiation(index, timestamp, buffer)
            .is_err()
        {
            self.core.indices.release(index);
            return false;
        }
        note_awaiting(&self.core, &mut state);
        peer.initiated(now);
        true
    }

    /// Answers an initiation of a peer, or holds one of a key that is not known.
    fn respond(
        &mut self,
        identity: &Identity,
        init: &HandshakeInit<'_>,
        message: &HandshakeMessage,
        wire: &impl Wire,
        now: Time,
    ) -> Result<(), Dropped> {
        let public = x25519::PublicKey::from(identity.public.0);
        let half = parse_handshake_anon(&identity.secret, &public, init).map_err(reason)?;
        let table = self.core.table.load();
        let key = PublicKey(half.peer_static_public);
        if let Some(peer) = table.peer_of(&key) {
            let pair = Pair {
                own: identity.public,
                peer: key,
            };
            return answer(&self.core, peer, pair, half, message, wire, now);
        }
        if !self.is_loaded(now) && self.held.has_room(&key, message.from.remote().ip(), now) {
            let mut noise = Handshake::new(identity.secret.clone(), public, key.0.into(), None);
            noise.set_last_timestamp(self.core.last_accepted(&key));
            if noise.receive_handshake_initialization(half).is_ok() {
                self.held.hold(key, noise.last_timestamp(), message, now);
            }
        }
        // It counts as dropped, whether it is answered later or not.
        Err(Dropped::Unauthentic)
    }

    /// Processes the held initiations whose key is known now, with every check.
    fn answer_held(&mut self, wire: &impl Wire, now: Time) {
        let core = self.core.clone();
        let table = core.table.load();
        let is_known = |key: &PublicKey| table.peer_of(key).is_some();
        for message in self.held.take(is_known, now) {
            if let Err(reason) = self.message(&message, wire, now) {
                core.drops.add(reason, 1);
            }
        }
    }

    /// Completes a handshake that this side began.
    fn complete(
        &mut self,
        identity: &Identity,
        index: u32,
        message: &HandshakeMessage,
        wire: &impl Wire,
        now: Time,
    ) -> Result<(), Dropped> {
        let core = self.core.clone();
        let peer = core.indices.handshake(index).ok_or(Dropped::UnknownIndex)?;
        {
            let mut state = peer.handshake();
            let own = &identity.public;
            let received = state.pairings.receive_response(message.bytes(), own);
            let (pair, keys) = received.map_err(reason)?;
            state.pairings.completed();
            let session = establish(&core, &peer, pair, &keys, true, now);
            let yields = pair.own > pair.peer;
            core.indices
                .retire(peer.install_initiated(session, yields, now));
            note_awaiting(&core, &mut state);
        }
        tracing::debug!(peer = %peer.id(), "handshake completed as initiator");
        let begun = peer.last_initiation().unwrap_or(now);
        peer.note_answer(message.from.remote(), now);
        core.roam(&peer, message.from, Evidence::Answer { begun }, now);
        peer.count_received(RESPONSE_SIZE);
        core.received(&peer, false, now);
        peer.timers.session_derived(now);
        core.handshake_completed(&peer, now);
        // The responder may not send before it has a message under the new key.
        if !self.transmit.flush_staged(&core, wire, &peer, now) {
            self.transmit.keepalive(&core, wire, &peer, now);
        }
        Ok(())
    }
}

/// Answers an initiation at its source. The endpoint of the peer stays until the peer confirms the session:
/// another host may have recorded and sent the initiation.
fn answer(
    core: &Core,
    peer: &Arc<Peer>,
    pair: Pair,
    half: HalfHandshake,
    message: &HandshakeMessage,
    wire: &impl Wire,
    now: Time,
) -> Result<(), Dropped> {
    let mut buffer = [0; RESPONSE_SIZE];
    let answer_to;
    {
        let mut state = peer.handshake();
        let soon = |taken| now.since(taken) < INITIATION_INTERVAL;
        if state.last_accepted.is_some_and(soon) {
            return Err(Dropped::RateLimited);
        }
        let noise = state.pairings.get(pair).ok_or(Dropped::Unauthentic)?;
        noise
            .receive_handshake_initialization(half)
            .map_err(reason)?;
        core.note_accepted(&pair.peer, noise.last_timestamp());
        let index = core.indices.draw(peer);
        let keys = match noise.format_handshake_response(index, &mut buffer) {
            Ok((_, keys)) => keys,
            Err(error) => {
                core.indices.release(index);
                return Err(reason(error));
            }
        };
        answer_to = peer.answer_from(message.from, |from| wire.leads(from), now);
        let session = establish(core, peer, pair, &keys, false, now);
        core.indices.retire(peer.install_responded(session, now));
        note_awaiting(core, &mut state);
        state.pairings.completed();
        state.last_accepted = Some(now);
    }
    if core.is_unasked(peer, message.from, now) {
        peer.note_unasked(now);
    }
    tracing::debug!(peer = %peer.id(), "answering a handshake initiation");
    peer.count_received(INITIATION_SIZE);
    core.received(peer, false, now);
    peer.timers.session_derived(now);
    peer.timers.sent(false, now);
    send_to(
        core,
        wire,
        peer,
        (&buffer, RESPONSE_SIZE),
        (answer_to, message.through.as_ref()),
        Outer::default(),
        now,
    );
    Ok(())
}

fn establish(
    core: &Core,
    peer: &Arc<Peer>,
    pair: Pair,
    keys: &SessionKeys,
    initiator: bool,
    now: Time,
) -> Arc<Session> {
    let session = Arc::new(Session::new(
        keys,
        Arc::downgrade(peer),
        pair,
        initiator,
        now,
    ));
    core.indices.establish(&session);
    session
}

/// Accepts a cookie. It moves no endpoint and does not count as traffic of the peer.
fn cookie(core: &Core, index: u32, message: &[u8], now: Time) -> Result<(), Dropped> {
    let peer = core.indices.peer(index).ok_or(Dropped::UnknownIndex)?;
    let mut state = peer.handshake();
    state.pairings.receive_cookie(message).map_err(reason)?;
    state.cookie_since = Some(now);
    peer.timers.cookie_received(now);
    Ok(())
}

fn send_cookie(
    core: &Core,
    identity: &Identity,
    message: &HandshakeMessage,
    wire: &impl Wire,
    now: Time,
) -> Result<(), Dropped> {
    let mut buffer = [0; COOKIE_REPLY_SIZE];
    let remote = message.from.remote();
    let reply = identity
        .cookies
        .cookie_reply(message.bytes(), remote, now.as_duration(), &mut buffer)
        .map_err(reason)?;
    match message.from {
        Way::Direct(to) => {
            let sent = wire.send(reply, COOKIE_REPLY_SIZE, &to, Outer::default(), false);
            sent.map(drop).map_err(|_| Dropped::SendFailed)
        }
        Way::Relayed(to) => {
            let (run, to) = ((&*reply, COOKIE_REPLY_SIZE), (to, message.through.as_ref()));
            send_through_relay(core, wire, run, to, Outer::default(), now);
            Ok(())
        }
    }
}

fn reason(error: WireGuardError) -> Dropped {
    if matches!(error, WireGuardError::WrongTai64nTimestamp) {
        Dropped::Replayed
    } else if matches!(
        error,
        WireGuardError::UnexpectedPacket | WireGuardError::WrongIndex
    ) {
        Dropped::UnknownIndex
    } else {
        Dropped::Unauthentic
    }
}

/// Releases the indices of initiations that can get no answer any more.
pub(super) fn note_awaiting(core: &Core, state: &mut HandshakeState) {
    let awaiting = state.pairings.awaiting();
    for index in &state.awaiting {
        if !awaiting.contains(index) {
            core.indices.release_handshake(*index);
        }
    }
    state.awaiting = awaiting;
}

/// Abandons every handshake that is under way with a peer.
pub(super) fn forget_handshakes(core: &Core, state: &mut HandshakeState) {
    state.pairings.clear();
    note_awaiting(core, state);
}
