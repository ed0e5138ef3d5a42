//! Receiver indices: the numbers by which peers address sessions and handshakes of this device.
//!
//! They are drawn at random for every handshake. So an observer cannot link sessions by them, and a packet to
//! an old session practically never meets a new one.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use super::peer::Peer;
use super::session::Session;

/// The peer or session of each index. The receive threads cache what they find, and look here once per
/// session, not per packet.
#[derive(Default)]
pub(super) struct Indices(RwLock<HashMap<u32, Entry>>);

enum Entry {
    /// An initiation that was sent, or a response being made.
    Handshake(Arc<Peer>),
    Session(Arc<Session>),
}

impl Indices {
    fn write(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<u32, Entry>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Draws an index for a handshake with a peer.
    pub(super) fn draw(&self, peer: &Arc<Peer>) -> u32 {
        let mut entries = self.write();
        loop {
            let index = rand::random();
            if let std::collections::hash_map::Entry::Vacant(entry) = entries.entry(index) {
                entry.insert(Entry::Handshake(peer.clone()));
                return index;
            }
        }
    }

    /// Gives the index of a handshake to its session.
    pub(super) fn establish(&self, session: &Arc<Session>) {
        self.write()
            .insert(session.local_index(), Entry::Session(session.clone()));
    }

    /// Releases an index.
    pub(super) fn release(&self, index: u32) {
        self.write().remove(&index);
    }

    /// Releases the index of a failed handshake. One that became a session stays.
    pub(super) fn release_handshake(&self, index: u32) {
        let mut entries = self.write();
        if let Some(Entry::Handshake(_)) = entries.get(&index) {
            entries.remove(&index);
        }
    }

    /// Ends sessions.
    pub(super) fn retire(&self, sessions: Vec<Arc<Session>>) {
        for session in sessions {
            session.retire();
            self.release(session.local_index());
        }
    }

    pub(super) fn session(&self, index: u32) -> Option<Arc<Session>> {
        let entries = self.0.read().unwrap_or_else(PoisonError::into_inner);
        match entries.get(&index)? {
            Entry::Session(session) => Some(session.clone()),
            Entry::Handshake(_) => None,
        }
    }

    /// The peer of an initiation of this device with this index.
    pub(super) fn handshake(&self, index: u32) -> Option<Arc<Peer>> {
        let entries = self.0.read().unwrap_or_else(PoisonError::into_inner);
        match entries.get(&index)? {
            Entry::Handshake(peer) => Some(peer.clone()),
            Entry::Session(_) => None,
        }
    }

    /// The peer of any message of this device with this index.
    pub(super) fn peer(&self, index: u32) -> Option<Arc<Peer>> {
        let entries = self.0.read().unwrap_or_else(PoisonError::into_inner);
        match entries.get(&index)? {
            Entry::Handshake(peer) => Some(peer.clone()),
            Entry::Session(session) => session.peer().upgrade(),
        }
    }
}
