//! Which peers are still there, judged by what arrives from them. Pure: the time is passed in.
//!
//! A session stays valid for minutes after its peer has moved away. One that sends keepalives and falls
//! silent has moved, and is looked for where others see it now.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::topology::Topology;
use crate::wireguard::key::PublicKey;

/// A session that had no handshake for so long carries nothing (WireGuard paper, 6.1:
/// REJECT_AFTER_TIME).
const SESSION: Duration = Duration::from_secs(180);
/// Beside two keepalives of which neither arrived: how late they may be.
const LATE: Duration = Duration::from_secs(5);

/// When something last arrived from each peer.
#[derive(Debug, Default)]
pub struct Hearing {
    last: BTreeMap<PublicKey, Arrival>,
}

#[derive(Clone, Copy, Debug)]
struct Arrival {
    bytes: u64,
    at: Instant,
}

impl Hearing {
    /// Takes a peer's counter, and tells whether it is there: its last handshake was `age` ago.
    pub fn handle_stats(
        &mut self,
        key: PublicKey,
        received: u64,
        age: Duration,
        topology: &Topology,
        now: Instant,
    ) -> bool {
        let arrival = Arrival {
            bytes: received,
            at: now,
        };
        let last = self.last.entry(key).or_insert(arrival);
        if last.bytes != received {
            *last = arrival;
        }
        let silence = now.saturating_duration_since(last.at);
        let patience = match keepalive(topology, &key) {
            0 => SESSION,
            seconds => 2 * Duration::from_secs(seconds.into()) + LATE,
        };
        age < SESSION && silence < patience
    }

    /// Forgets peers that the tunnel no longer has.
    pub fn retain(&mut self, has: impl Fn(&PublicKey) -> bool) {
        self.last.retain(|key, _| has(key));
    }
}

/// The keepalives that a peer sends by itself, in seconds; 0 for none.
fn keepalive(topology: &Topology, key: &PublicKey) -> u16 {
    let segments = topology.segments.iter();
    let segments = segments.map(|segment| (segment.public_key, segment.persistent_keepalive));
    let peers = topology.peers.iter();
    let peers = peers.map(|peer| (peer.public_key, peer.persistent_keepalive));
    segments
        .chain(peers)
        .find_map(|(of, seconds)| (of == *key).then_some(seconds))
        .unwrap_or_default()
}

#[cfg(test)]
#[expect(
    clippy::disallowed_methods,
    reason = "an instant can only be had from the clock"
)]
mod tests {
    use super::*;
    use crate::topology::ExternalPeer;

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

    /// Whether the peer counts as there, `seconds` after the last byte.
    fn there(topology: &Topology, seconds: u64) -> bool {
        let mut hearing = Hearing::default();
        let start = Instant::now();
        let age = Duration::from_secs(seconds);
        assert!(hearing.handle_stats(KEY, 100, Duration::ZERO, topology, start));
        hearing.handle_stats(KEY, 100, age, topology, start + age)
    }

    #[test]
    fn who_sends_keepalives_and_falls_silent_has_gone() {
        assert!(there(&with_keepalive(10), 24));
        assert!(!there(&with_keepalive(10), 25));
    }

    #[test]
    fn who_sends_none_is_there_as_long_as_its_session() {
        assert!(there(&with_keepalive(0), 179));
        assert!(!there(&with_keepalive(0), 180));
        assert!(there(&Topology::default(), 179));
    }

    #[test]
    fn whatever_arrives_is_a_sign_of_life() {
        let topology = with_keepalive(10);
        let mut hearing = Hearing::default();
        let start = Instant::now();
        let later = start + Duration::from_secs(60);
        let age = Duration::from_secs(60);
        hearing.handle_stats(KEY, 100, Duration::ZERO, &topology, start);
        assert!(hearing.handle_stats(KEY, 132, age, &topology, later));
    }
}
