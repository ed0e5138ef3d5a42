//! Limits how often the observed endpoint of a moving peer is published. Pure: the time is passed in.
//!
//! Each change of a published endpoint is a write to the API, and every agent computes its topology again
//! for it. Some NATs never keep a mapping: they give another port every minute, or alternate between two.
//! The first moves are published at once, later ones with growing pauses, until the peer has not moved for
//! a while. Route flap damping of BGP (RFC 2439) does the same.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::wireguard::key::PublicKey;

/// Moves that are published at once: a laptop changes its network, its router restarts, and both again.
const FREE: u32 = 6;
/// The pause before the next one; doubled with each.
const PAUSE: Duration = Duration::from_secs(30);
/// The longest pause: a peer that never stops moving costs twelve writes an hour.
const LONGEST: Duration = Duration::from_secs(300);
/// A peer that did not move for so long counts as stable again.
const CALM: Duration = Duration::from_secs(900);

/// The published endpoint of each peer.
#[derive(Debug, Default)]
pub struct FlapDamping(BTreeMap<PublicKey, Peer>);

#[derive(Debug)]
struct Peer {
    published: SocketAddr,
    observed: SocketAddr,
    /// When the observed endpoint last changed.
    moved: Instant,
    /// When the published endpoint last changed.
    published_at: Instant,
    /// The moves published since the peer was last stable.
    moves: u32,
}

impl Peer {
    fn pause(&self) -> Duration {
        match self.moves.checked_sub(FREE) {
            None => Duration::ZERO,
            Some(more) => PAUSE.saturating_mul(1 << more.min(8)).min(LONGEST),
        }
    }
}

impl FlapDamping {
    /// Takes the observed endpoints; returns the endpoint to publish for each peer, and the peers that have
    /// begun to flap.
    pub fn handle_observed(
        &mut self,
        observed: &BTreeMap<PublicKey, SocketAddr>,
        now: Instant,
    ) -> (BTreeMap<PublicKey, SocketAddr>, Vec<PublicKey>) {
        self.0.retain(|key, _| observed.contains_key(key));
        let mut flapping = Vec::new();
        for (key, endpoint) in observed {
            let peer = self.0.entry(*key).or_insert_with(|| Peer {
                published: *endpoint,
                observed: *endpoint,
                moved: now,
                published_at: now,
                moves: 0,
            });
            if peer.observed != *endpoint {
                if now.saturating_duration_since(peer.moved) >= CALM {
                    peer.moves = 0;
                }
                (peer.observed, peer.moved) = (*endpoint, now);
            }
            let since = now.saturating_duration_since(peer.published_at);
            if peer.published != *endpoint && since >= peer.pause() {
                (peer.published, peer.published_at) = (*endpoint, now);
                peer.moves += 1;
                flapping.extend((peer.moves == FREE).then_some(*key));
            }
        }
        let published = self.0.iter().map(|(key, peer)| (*key, peer.published));
        (published.collect(), flapping)
    }
}

#[cfg(test)]
#[expect(
    clippy::disallowed_methods,
    reason = "an instant can only be had from the clock"
)]
mod tests {
    use super::*;

    const KEY: PublicKey = PublicKey([7; 32]);

    /// A peer, and what was published of it.
    struct World {
        damping: FlapDamping,
        start: Instant,
        published: Option<SocketAddr>,
        times: Vec<u64>,
        flapping: Vec<u64>,
    }

    impl World {
        fn new() -> Self {
            Self {
                damping: FlapDamping::default(),
                start: Instant::now(),
                published: None,
                times: Vec::new(),
                flapping: Vec::new(),
            }
        }

        /// It is heard at a port at a time in seconds.
        fn at(&mut self, seconds: u64, port: u16) {
            let place = SocketAddr::from(([198, 51, 100, 7], port));
            let now = self.start + Duration::from_secs(seconds);
            let (published, flapping) = self.damping.handle_observed(&[(KEY, place)].into(), now);
            if self.published != published.get(&KEY).copied() {
                self.published = published.get(&KEY).copied();
                self.times.push(seconds);
            }
            if !flapping.is_empty() {
                self.flapping.push(seconds);
            }
        }
    }

    #[test]
    fn the_first_moves_are_published_at_once() {
        let mut world = World::new();
        for (seconds, port) in [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)] {
            world.at(seconds, port);
        }
        assert_eq!(world.times, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_mapping_that_keeps_changing_is_published_ever_more_seldom_and_reported_once() {
        let mut world = World::new();
        for seconds in 0..3600 {
            // To and fro, each second.
            world.at(seconds, 1 + u16::try_from(seconds % 2).unwrap());
        }
        // Where it stands still when its time comes, it is published the second after.
        assert_eq!(world.times[..10], [0, 1, 2, 3, 4, 5, 6, 37, 98, 219]);
        assert!(world.times.len() < 22, "{:?}", world.times);
        assert_eq!(world.flapping, [6]);
    }

    #[test]
    fn the_final_endpoint_is_published_and_later_moves_at_once_again() {
        let mut world = World::new();
        for seconds in 0..600 {
            world.at(seconds, 1 + u16::try_from(seconds).unwrap());
        }
        for seconds in 600..2000 {
            world.at(seconds, 9999);
        }
        let last = *world.times.last().unwrap();
        assert!((600..900).contains(&last), "{last}");
        assert_eq!(world.published.unwrap().port(), 9999);
        world.at(2000, 1);
        world.at(2001, 2);
        assert_eq!(world.times[world.times.len() - 2..], [2000, 2001]);
    }

    #[test]
    fn a_peer_that_is_gone_is_forgotten() {
        let mut world = World::new();
        world.at(0, 1);
        let now = world.start + Duration::from_secs(1);
        assert_eq!(
            world.damping.handle_observed(&BTreeMap::new(), now).0.len(),
            0
        );
        assert!(world.damping.0.is_empty());
    }
}
