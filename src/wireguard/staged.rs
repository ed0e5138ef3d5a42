//! Packets that wait for a session.
//!
//! Few wait, because a handshake takes a round trip or never succeeds, and old packets are useless by then. So
//! the oldest are dropped first. boringtun kept the oldest 256 and dropped later ones.

use std::collections::VecDeque;

/// The most packets that wait for one peer, as in the kernel.
const MAX_PACKETS: usize = 128;
/// The most bytes that wait for one peer: two large packets fit.
const MAX_BYTES: usize = 192 << 10;

/// The packets that wait for one peer, in order, as they were read from the TUN device.
#[derive(Debug, Default)]
pub(super) struct Staged {
    packets: VecDeque<Box<[u8]>>,
    bytes: usize,
}

impl Staged {
    /// Adds a packet; returns how many were dropped to make room.
    pub(super) fn push(&mut self, packet: &[u8]) -> u64 {
        self.packets.push_back(packet.into());
        self.bytes += packet.len();
        let mut dropped = 0;
        while self.packets.len() > MAX_PACKETS || self.bytes > MAX_BYTES {
            let Some(oldest) = self.pop() else { break };
            drop(oldest);
            dropped += 1;
        }
        dropped
    }

    /// The packet that waited longest.
    pub(super) fn pop(&mut self) -> Option<Box<[u8]>> {
        let packet = self.packets.pop_front()?;
        self.bytes -= packet.len();
        Some(packet)
    }

    /// Drops all; returns how many.
    pub(super) fn clear(&mut self) -> u64 {
        let dropped = self.packets.len() as u64;
        *self = Self::default();
        dropped
    }

    /// Whether none waits.
    pub(super) fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_packets_are_kept() {
        let mut staged = Staged::default();
        let dropped: u64 = (0..200_u8).map(|n| staged.push(&[n])).sum();
        assert_eq!(dropped, 72);
        assert_eq!(staged.pop().unwrap()[..], [72]);
        assert_eq!(staged.clear(), 127);
        assert!(staged.is_empty());
    }

    #[test]
    fn large_packets_are_bounded_by_their_bytes() {
        let mut staged = Staged::default();
        for _ in 0..10 {
            staged.push(&[0; 65_000]);
        }
        assert_eq!(staged.clear(), 3);
    }
}
