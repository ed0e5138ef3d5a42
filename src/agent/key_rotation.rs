//! The replacement of this node's WireGuard key, as a state machine: pure, the times are passed in.
//!
//! ```text
//!  resting ──make──► announced ──switch──► overlapping ──retire──► resting
//!          next key           each leader           no peer uses
//!          on disk            answered under it     the old key any more
//! ```
//!
//! Announced: the Node names the next key, and every other agent accepts it beside the current one. This node tries a
//! handshake under it with each leader. What a leader answers proves that it knows the key. Overlapping: the next key
//! is the current one, and the old one is still accepted here and elsewhere. Each peer has moved to the new key when
//! its session is under it. Then the old key is erased, and others forget it when it is gone from the Node.
//!
//! What step the node is at follows from the keys that it has on disk, so a crash at any time resumes there.
//! The private keys are in [`super::key_ring`].

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::topology::OtherKeys;
use crate::wireguard::PeerId;
use crate::wireguard::key::PublicKey;

/// How long a state of the Node must have been there before other agents are expected to know it. A watch takes
/// milliseconds, and the list of an agent that lost it some seconds.
const KNOWN_AFTER: Duration = Duration::from_secs(10);
/// The next key becomes the current one after this time even if a leader with a session does not answer under it:
/// the old one is still accepted.
const ANNOUNCED_AT_MOST: Duration = Duration::from_secs(300);
/// The old key is accepted at least so long.
const OVERLAP_AT_LEAST: Duration = Duration::from_secs(20);
/// Between two trials with a peer, as between two initiations (WireGuard paper, 6.1: REKEY_TIMEOUT).
const AGAIN: Duration = Duration::from_secs(5);
/// Nodes that were made together do not change their keys at once: up to this part of the period is added.
const SPREAD: u32 = 8;

/// The keys of a node, as they are on its disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct OwnKeys {
    /// The current one.
    pub current: PublicKey,
    /// The others, at most one of which is there.
    pub others: OtherKeys,
    /// When the current one was put in place, in Unix seconds of this node's clock.
    pub since: i64,
}

impl OwnKeys {
    /// A node with this key alone.
    pub fn of(current: PublicKey) -> Self {
        Self {
            current,
            others: OtherKeys::default(),
            since: 0,
        }
    }
}

/// A step that changes the keys on disk and in the tunnel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum KeyStep {
    /// Make the next key.
    Make,
    /// The next key becomes the current one, and that the previous one.
    Switch,
    /// Erase the previous key.
    Retire,
}

/// Why a replacement does not begin: one sentence.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Refused {
    /// One is under way.
    #[error("the key is being replaced already: selvedge status shows how far that is")]
    UnderWay,
    /// A real `kg` is in the mesh.
    #[error(
        "a real kg is in the mesh, which accepts one key of a node at a time, so packets would be lost: replace Kilo's agents first"
    )]
    BesideKilo,
    /// The API server cannot be reached.
    #[error("other nodes cannot learn of a new key while no API server is reached: try again then")]
    Offline,
}

/// What the replacement depends on, as of one moment.
#[derive(Clone, Debug, Default)]
pub struct Look {
    /// The own Node is as the API shows it, not as the cache does.
    pub is_live: bool,
    /// Selvedge's algorithm is in force.
    pub is_native: bool,
    /// This node's clock in Unix seconds.
    pub unix: i64,
    /// The keys on the own Node.
    pub published: Option<PublicKey>,
    /// The others there.
    pub published_others: OtherKeys,
    /// The peers of the tunnel.
    pub peers: Vec<Sign>,
}

/// What the tunnel says of a peer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Sign {
    /// The peer.
    pub id: PeerId,
    /// Whether it is a leader, whose agent learns of a new key.
    pub is_leader: bool,
    /// Whether its session is alive.
    pub is_alive: bool,
    /// The own key of the session that seals.
    pub sealed_under: Option<PublicKey>,
}

/// How far the replacement is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Progress {
    /// No replacement is under way.
    #[default]
    Resting,
    /// The next key is announced.
    Announced {
        /// The leaders with a session that have not answered under it.
        missing: usize,
    },
    /// The old key is still accepted.
    Overlapping {
        /// The leaders that have not answered under the new key, and the peers that use the old one.
        missing: usize,
    },
}

/// The replacement of the key.
#[derive(Debug)]
pub struct KeyRotation {
    keys: OwnKeys,
    /// The period of automatic replacements.
    after: Option<Duration>,
    /// How long the old key is accepted at most.
    overlap: Duration,
    asked: bool,
    /// A step that was handed out and is not done yet.
    pending: bool,
    /// No step before this time, because one failed.
    not_before: Option<Instant>,
    /// Since when the API has shown the present keys on the own Node.
    shown: Option<Instant>,
    /// The leaders that have answered under the newest key.
    proven: BTreeSet<PeerId>,
    tried: Option<Instant>,
    progress: Progress,
}

impl KeyRotation {
    /// A node with these keys; `after` is the age at which a key is replaced.
    pub fn new(keys: OwnKeys, after: Option<Duration>, overlap: Duration) -> Self {
        Self {
            keys,
            after,
            overlap,
            asked: false,
            pending: false,
            not_before: None,
            shown: None,
            proven: BTreeSet::new(),
            tried: None,
            progress: Progress::default(),
        }
    }

    /// The keys.
    pub fn keys(&self) -> &OwnKeys {
        &self.keys
    }

    /// How far the replacement is.
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// The operator asks for another key.
    ///
    /// # Errors
    /// Says why none is made.
    pub fn handle_request(&mut self, look: &Look) -> Result<(), Refused> {
        if self.pending || self.asked || self.keys.others != OtherKeys::default() {
            return Err(Refused::UnderWay);
        }
        if !look.is_native {
            return Err(Refused::BesideKilo);
        }
        if !look.is_live {
            return Err(Refused::Offline);
        }
        self.asked = true;
        Ok(())
    }

    /// The step that was handed out is done, and these are the keys now; `None` if it failed.
    pub fn handle_done(&mut self, keys: Option<OwnKeys>, now: Instant) {
        self.pending = false;
        let Some(keys) = keys else {
            self.not_before = Some(now + AGAIN);
            return;
        };
        self.asked &= keys.others.next.is_none();
        self.keys = keys;
        self.shown = None;
        self.tried = None;
        if keys.others.next.is_some() {
            self.proven.clear();
        }
    }

    /// Takes a look; returns the step that is due. It is answered by [`Self::handle_done`].
    pub fn handle_look(&mut self, look: &Look, now: Instant) -> Option<KeyStep> {
        let OwnKeys {
            current, others, ..
        } = self.keys;
        let is_shown =
            look.is_live && look.published == Some(current) && look.published_others == others;
        if !is_shown {
            self.shown = None;
        }
        let shown = is_shown.then(|| *self.shown.get_or_insert(now));
        let shown_for = shown.map(|shown| now.saturating_duration_since(shown));
        let newest = others.next.unwrap_or(current);
        let proven = look
            .peers
            .iter()
            .filter(|peer| peer.sealed_under == Some(newest));
        self.proven.extend(proven.map(|peer| peer.id.clone()));
        self.progress = self.progress_of(look);

        let is_ready = !self.pending && self.not_before.is_none_or(|at| now >= at);
        let step = shown_for.filter(|_| is_ready).and_then(|for_| {
            let is_known = for_ >= KNOWN_AFTER;
            match self.progress {
                Progress::Resting => {
                    let is_due = self.asked || self.is_old(look.unix);
                    (is_due && look.is_native).then_some(KeyStep::Make)
                }
                Progress::Announced { missing } => {
                    let is_over = for_ >= ANNOUNCED_AT_MOST;
                    (is_known && missing == 0 || is_over).then_some(KeyStep::Switch)
                }
                Progress::Overlapping { missing } => {
                    let age = look.unix.saturating_sub(self.keys.since);
                    let is_over = age >= i64::try_from(self.overlap.as_secs()).unwrap_or(i64::MAX);
                    let is_unused = for_ >= OVERLAP_AT_LEAST && missing == 0;
                    (is_unused || is_known && is_over).then_some(KeyStep::Retire)
                }
            }
        });
        self.pending |= step.is_some();
        step
    }

    /// The peers to try a handshake with under the newest key, and that key.
    pub fn poll_trials(&mut self, look: &Look, now: Instant) -> Option<(PublicKey, Vec<PeerId>)> {
        let others = self.keys.others;
        let current = self.keys.current;
        let newest = others.next.or_else(|| others.previous.map(|_| current))?;
        // Others must know it first.
        self.shown?;
        if self
            .tried
            .is_some_and(|at| now.saturating_duration_since(at) < AGAIN)
        {
            return None;
        }
        let is_left = |peer: &&Sign| {
            let is_moved = match others.next {
                Some(_) => self.proven.contains(&peer.id),
                None => peer.sealed_under == Some(newest),
            };
            peer.is_leader && peer.is_alive && !is_moved
        };
        let peers: Vec<_> = look
            .peers
            .iter()
            .filter(is_left)
            .map(|peer| peer.id.clone())
            .collect();
        if peers.is_empty() {
            return None;
        }
        self.tried = Some(now);
        Some((newest, peers))
    }

    /// How far the replacement is, and who is missing.
    fn progress_of(&self, look: &Look) -> Progress {
        let OtherKeys { next, previous } = self.keys.others;
        if next.is_some() {
            let missing =
                |peer: &&Sign| peer.is_leader && peer.is_alive && !self.proven.contains(&peer.id);
            let missing = look.peers.iter().filter(missing).count();
            return Progress::Announced { missing };
        }
        let Some(previous) = previous else {
            return Progress::Resting;
        };
        let missing = |peer: &&Sign| {
            let uses_old = peer.is_alive && peer.sealed_under == Some(previous);
            uses_old || peer.is_leader && !self.proven.contains(&peer.id)
        };
        let missing = look.peers.iter().filter(missing).count();
        Progress::Overlapping { missing }
    }

    /// Whether the key has its age.
    fn is_old(&self, unix: i64) -> bool {
        let Some(after) = self.after else {
            return false;
        };
        let part = u32::from(self.keys.current.0[0]);
        let after = after + after / SPREAD * part / 256;
        let age = unix.saturating_sub(self.keys.since);
        age >= i64::try_from(after.as_secs()).unwrap_or(i64::MAX)
    }
}

#[cfg(test)]
#[path = "key_rotation/tests.rs"]
mod tests;
