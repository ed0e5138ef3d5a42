//! A session: the pair of keys that a handshake agreed on, and what they may still be used for.
//!
//! Sealing and opening take `&self` and a batch of datagrams of one session, in the layout of UDP
//! segmentation offload: one after the other in one buffer, all of one size but the last. A faster AEAD
//! would replace the work on a batch and nothing around it.
//!
//! # Why not boringtun's sessions
//!
//! boringtun's `Tunn` has both directions of a peer behind one `&mut`, copies every packet, has a replay
//! window of 1,024, no limit on messages, and a panic before authentication. There are ways around all but
//! the first two. Little of `Tunn` would remain after patches that hand out its sessions: its timers need
//! the same `&mut` and a clock of their own. So boringtun provides the Noise handshake and the cookies
//! (`vendor/boringtun`), which are delicate, and this file does the rest with `ring`, in about 200 lines
//! whose only lock is that of the replay window. The timers are in `timers`.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, Weak};

use boringtun::noise::handshake::SessionKeys;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

use super::clock::Time;
use super::drops::Dropped;
use super::pairings::Pair;
use super::peer::Peer;
use super::protocol::{
    DATA, DATA_HEADER, OVERHEAD, REJECT_AFTER_MESSAGES, REJECT_AFTER_TIME, REKEY_AFTER_MESSAGES,
    REKEY_AFTER_TIME, TAG, data_header,
};
use super::replay::ReplayWindow;

/// A key for each direction, and their use so far.
pub(super) struct Session {
    local_index: u32,
    peer_index: u32,
    peer: Weak<Peer>,
    pair: Pair,
    created: Time,
    initiator: bool,
    sealing: LessSafeKey,
    opening: LessSafeKey,
    /// The counter of the next message to be sealed.
    next: AtomicU64,
    window: Mutex<ReplayWindow>,
    /// Whether the peer has proved that it has the keys. The responder may not send before.
    confirmed: AtomicBool,
    /// Set when the session has ended.
    retired: AtomicBool,
}

/// The result of [`Session::open_batch`] for one datagram: the range of its plaintext in the batch.
pub(super) type Opened = Result<std::ops::Range<usize>, Dropped>;

fn key(bytes: &[u8; 32]) -> LessSafeKey {
    let key = UnboundKey::new(&CHACHA20_POLY1305, bytes);
    LessSafeKey::new(key.expect("every 32 bytes are a key of ChaCha20-Poly1305"))
}

fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

impl Session {
    /// The session of a completed handshake.
    pub(super) fn new(
        keys: &SessionKeys,
        peer: Weak<Peer>,
        pair: Pair,
        initiator: bool,
        now: Time,
    ) -> Self {
        Self {
            local_index: keys.local_index,
            peer_index: keys.peer_index,
            peer,
            pair,
            created: now,
            initiator,
            sealing: key(&keys.sending_key),
            opening: key(&keys.receiving_key),
            next: AtomicU64::new(0),
            window: Mutex::default(),
            confirmed: AtomicBool::new(initiator),
            retired: AtomicBool::new(false),
        }
    }

    /// The index that the peer puts into datagrams of this session.
    pub(super) fn local_index(&self) -> u32 {
        self.local_index
    }

    /// The peer of the session.
    pub(super) fn peer(&self) -> &Weak<Peer> {
        &self.peer
    }

    /// The keys of the handshake.
    pub(super) fn pair(&self) -> Pair {
        self.pair
    }

    /// When the handshake was completed.
    pub(super) fn created(&self) -> Time {
        self.created
    }

    /// Whether this side began the handshake.
    pub(super) fn is_initiator(&self) -> bool {
        self.initiator
    }

    /// Whether the session may seal at this time.
    pub(super) fn may_send(&self, now: Time) -> bool {
        now.since(self.created) < REJECT_AFTER_TIME
            && self.next.load(Ordering::Relaxed) < REJECT_AFTER_MESSAGES
    }

    /// Whether the next handshake is due after something was sent.
    pub(super) fn wants_rekey(&self, now: Time) -> bool {
        self.next.load(Ordering::Relaxed) > REKEY_AFTER_MESSAGES
            || self.initiator && now.since(self.created) >= REKEY_AFTER_TIME
    }

    /// Whether the peer has not yet proved that it has the keys.
    pub(super) fn awaits_confirmation(&self) -> bool {
        !self.confirmed.load(Ordering::Relaxed)
    }

    /// Records that the peer has the keys; true the first time.
    pub(super) fn confirm(&self) -> bool {
        !self.confirmed.load(Ordering::Relaxed) && !self.confirmed.swap(true, Ordering::AcqRel)
    }

    /// Ends the session.
    pub(super) fn retire(&self) {
        self.retired.store(true, Ordering::Release);
    }

    /// Whether the session has ended.
    pub(super) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    /// Seals every datagram of a batch in place and fills in its header.
    ///
    /// `batch` holds datagrams of `stride` bytes, the last of at most so many; each has room for the
    /// header, then the plaintext, then room for the tag. Returns false, with the batch as it was,
    /// if the session may not send as many messages.
    pub(super) fn seal_batch(&self, batch: &mut [u8], stride: usize) -> bool {
        debug_assert!(stride >= OVERHEAD);
        let count = batch.len().div_ceil(stride) as u64;
        // Checked before it is raised: the counter cannot wrap, however many threads try.
        if self.next.load(Ordering::Relaxed) >= REJECT_AFTER_MESSAGES {
            return false;
        }
        let first = self.next.fetch_add(count, Ordering::Relaxed);
        for (counter, datagram) in (first..).zip(batch.chunks_mut(stride)) {
            self.seal(counter, datagram);
        }
        true
    }

    fn seal(&self, counter: u64, datagram: &mut [u8]) {
        let Some((header, body)) = datagram.split_first_chunk_mut::<DATA_HEADER>() else {
            return;
        };
        header[..4].copy_from_slice(&DATA.to_le_bytes());
        header[4..8].copy_from_slice(&self.peer_index.to_le_bytes());
        header[8..].copy_from_slice(&counter.to_le_bytes());
        let Some((plaintext, tag)) = body.split_last_chunk_mut::<TAG>() else {
            return;
        };
        let sealed = self
            .sealing
            .seal_in_place_separate_tag(nonce(counter), Aad::empty(), plaintext)
            .expect("a datagram is far shorter than the cipher's limit of 256 GiB");
        tag.copy_from_slice(sealed.as_ref());
    }

    /// Opens every datagram of a batch in place and puts the ranges of the plaintexts into `opened`.
    ///
    /// The datagrams are data messages to this session (see [`data_header`]), laid out as in
    /// [`Self::seal_batch`]. Each has a result of its own: it may be forged, repeated or too late.
    pub(super) fn open_batch(
        &self,
        batch: &mut [u8],
        stride: usize,
        now: Time,
        opened: &mut Vec<Opened>,
    ) {
        opened.clear();
        let expired = now.since(self.created) >= REJECT_AFTER_TIME;
        {
            let window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
            opened.extend(batch.chunks(stride).enumerate().map(|(n, datagram)| {
                let (_, counter) = data_header(datagram).ok_or(Dropped::Malformed)?;
                if expired || counter >= REJECT_AFTER_MESSAGES {
                    return Err(Dropped::Expired);
                }
                if !window.is_fresh(counter) {
                    return Err(Dropped::Replayed);
                }
                let start = n * stride + DATA_HEADER;
                Ok(start..start + datagram.len() - OVERHEAD)
            }));
        }
        for (datagram, slot) in batch.chunks_mut(stride).zip(opened.iter_mut()) {
            if slot.is_ok() && self.open(datagram).is_none() {
                *slot = Err(Dropped::Unauthentic);
            }
        }
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        for (datagram, slot) in batch.chunks(stride).zip(opened.iter_mut()) {
            // The header is unchanged. A repetition within the batch is found only here.
            if slot.is_ok()
                && data_header(datagram).is_none_or(|(_, counter)| !window.mark(counter))
            {
                *slot = Err(Dropped::Replayed);
            }
        }
    }

    fn open(&self, datagram: &mut [u8]) -> Option<()> {
        let (_, counter) = data_header(datagram)?;
        let sealed = datagram.get_mut(DATA_HEADER..)?;
        self.opening
            .open_in_place(nonce(counter), Aad::empty(), sealed)
            .ok()
            .map(|_| ())
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("local_index", &self.local_index)
            .field("peer_index", &self.peer_index)
            .field("initiator", &self.initiator)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use zeroize::Zeroizing;

    use super::*;
    use crate::wireguard::key::PublicKey;

    const PAIR: Pair = Pair {
        own: PublicKey([1; 32]),
        peer: PublicKey([2; 32]),
    };

    fn time(seconds: u64) -> Time {
        Time::from_duration(Duration::from_secs(seconds))
    }

    fn pair() -> (Session, Session) {
        let keys = |local_index, peer_index, receiving: u8, sending: u8| SessionKeys {
            local_index,
            peer_index,
            receiving_key: Zeroizing::new([receiving; 32]),
            sending_key: Zeroizing::new([sending; 32]),
        };
        (
            Session::new(&keys(1, 2, 7, 9), Weak::new(), PAIR, true, time(1)),
            Session::new(&keys(2, 1, 9, 7), Weak::new(), PAIR, false, time(1)),
        )
    }

    fn batch(sizes: &[usize]) -> Vec<u8> {
        sizes
            .iter()
            .flat_map(|&size| {
                let mut datagram = vec![0; size + OVERHEAD];
                datagram[DATA_HEADER..DATA_HEADER + size].fill(0xab);
                datagram
            })
            .collect()
    }

    #[test]
    fn a_batch_is_opened_as_it_was_sealed() {
        let (alice, bob) = pair();
        let mut datagrams = batch(&[64, 64, 64, 10]);

        assert!(alice.seal_batch(&mut datagrams, 96));
        assert_eq!(data_header(&datagrams[96..]), Some((2, 1)));
        assert!(!datagrams.windows(8).any(|bytes| bytes == [0xab; 8]));

        let mut opened = Vec::new();
        bob.open_batch(&mut datagrams, 96, time(2), &mut opened);
        let ranges: Vec<_> = opened.into_iter().map(Result::unwrap).collect();
        assert_eq!(ranges, [16..80, 112..176, 208..272, 304..314]);
        assert!(
            ranges
                .into_iter()
                .all(|range| datagrams[range].iter().all(|&byte| byte == 0xab))
        );
    }

    #[test]
    fn repetitions_are_dropped_within_a_batch_and_between_batches() {
        let (alice, bob) = pair();
        let mut datagram = batch(&[32]);
        alice.seal_batch(&mut datagram, 64);
        let mut twice = [datagram.clone(), datagram.clone()].concat();

        let mut opened = Vec::new();
        bob.open_batch(&mut twice, 64, time(2), &mut opened);
        assert_eq!(opened, [Ok(16..48), Err(Dropped::Replayed)]);
        bob.open_batch(&mut datagram, 64, time(2), &mut opened);
        assert_eq!(opened, [Err(Dropped::Replayed)]);
    }

    #[test]
    fn one_forged_datagram_costs_only_itself() {
        let (alice, bob) = pair();
        let mut datagrams = batch(&[32, 32, 32]);
        alice.seal_batch(&mut datagrams, 64);
        datagrams[64 + 20] ^= 1;

        let mut opened = Vec::new();
        bob.open_batch(&mut datagrams, 64, time(2), &mut opened);
        assert_eq!(
            opened,
            [Ok(16..48), Err(Dropped::Unauthentic), Ok(144..176)]
        );
    }

    #[test]
    fn a_session_ends_after_180_seconds_for_both_directions() {
        let (alice, bob) = pair();
        let mut datagram = batch(&[0]);
        alice.seal_batch(&mut datagram, 32);

        assert!(alice.may_send(time(180)));
        assert!(!alice.may_send(time(181)));
        let mut opened = Vec::new();
        bob.open_batch(&mut datagram, 32, time(181), &mut opened);
        assert_eq!(opened, [Err(Dropped::Expired)]);
    }

    #[test]
    fn a_session_ends_after_its_last_message_for_both_directions() {
        let (alice, bob) = pair();
        alice
            .next
            .store(REJECT_AFTER_MESSAGES - 1, Ordering::Relaxed);
        let mut datagrams = batch(&[0, 0]);

        assert!(alice.seal_batch(&mut datagrams, 32));
        assert!(!alice.seal_batch(&mut batch(&[0]), 32));
        assert!(!alice.may_send(time(2)));
        let mut opened = Vec::new();
        bob.open_batch(&mut datagrams, 32, time(2), &mut opened);
        assert_eq!(opened, [Ok(16..16), Err(Dropped::Expired)]);
    }

    #[test]
    fn the_initiator_wants_a_new_key_after_120_seconds_and_the_responder_leaves_it_to_it() {
        let (alice, bob) = pair();
        assert!(!alice.wants_rekey(time(120)));
        assert!(alice.wants_rekey(time(121)));
        assert!(!bob.wants_rekey(time(170)));
    }
}
