//! Initiations of senders whose key is not known yet.
//!
//! A new leader may learn of this device before this device learns of it. Its first initiation then comes
//! too early, and the next one is five seconds away (paper, 6.4). So a few early initiations wait for their key.
//! They get no answer meanwhile, and each is authentic: a sender can only take places with keys that it has.

use std::net::IpAddr;
use std::time::Duration;

use super::admission::HandshakeMessage;
use super::clock::Time;
use super::key::PublicKey;
use super::protocol::REKEY_TIMEOUT;
use super::timestamp::Tai64n;

/// The most initiations that are held.
const MAX_HELD: usize = 16;
/// The most from one IP address: the leaders of a region may be behind one NAT.
const MAX_HELD_OF_ADDRESS: usize = 4;
/// How long an initiation is held. Then its sender sends another one.
const HELD_FOR: Duration = REKEY_TIMEOUT;

/// The initiations that wait, at most one for each key.
#[derive(Default)]
pub(super) struct Held(Vec<Early>);

struct Early {
    key: PublicKey,
    timestamp: Tai64n,
    message: HandshakeMessage,
    since: Time,
}

impl Held {
    /// Whether an initiation with this key and source would be held, unless it is older than that of the same key.
    pub(super) fn has_room(&mut self, key: &PublicKey, from: IpAddr, now: Time) -> bool {
        self.0.retain(|early| early.is_valid(now));
        let others = || self.0.iter().filter(|early| early.key != *key);
        let same_address = |early: &&Early| early.message.from.remote().ip() == from;
        others().count() < MAX_HELD && others().filter(same_address).count() < MAX_HELD_OF_ADDRESS
    }

    /// Holds an authentic initiation if there is room. Of two with one key it keeps the later one.
    pub(super) fn hold(
        &mut self,
        key: PublicKey,
        timestamp: Tai64n,
        message: &HandshakeMessage,
        now: Time,
    ) {
        if !self.has_room(&key, message.from.remote().ip(), now) {
            return;
        }
        let before = self.0.iter().position(|early| early.key == key);
        if let Some(before) = before {
            if self.0[before].timestamp >= timestamp {
                return;
            }
            self.0.remove(before);
        }
        self.0.push(Early {
            key,
            timestamp,
            message: message.clone(),
            since: now,
        });
    }

    /// Takes the initiations whose key is known now, in the order of their arrival.
    pub(super) fn take(
        &mut self,
        is_known: impl Fn(&PublicKey) -> bool,
        now: Time,
    ) -> Vec<HandshakeMessage> {
        self.0.retain(|early| early.is_valid(now));
        self.0
            .extract_if(.., |early| is_known(&early.key))
            .map(|early| early.message)
            .collect()
    }
}

impl Early {
    fn is_valid(&self, now: Time) -> bool {
        now.since(self.since) < HELD_FOR
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use super::*;
    use crate::wireguard::protocol::INITIATION_SIZE;
    use crate::wireguard::way::Way;

    fn at(seconds: u64) -> Time {
        Time::from_duration(Duration::from_secs(1000 + seconds))
    }

    /// A message from 10.0.0.`address`, whose first byte is `mark`.
    fn message(address: u8, mark: u8) -> HandshakeMessage {
        let from = SocketAddr::from((Ipv4Addr::new(10, 0, 0, address), 1));
        HandshakeMessage::new(
            &[mark; INITIATION_SIZE],
            (Way::Direct(from.into()), None),
            false,
        )
        .unwrap()
    }

    fn key(n: u8) -> PublicKey {
        PublicKey([n; 32])
    }

    fn marks(messages: &[HandshakeMessage]) -> Vec<u8> {
        messages.iter().map(|message| message.bytes()[0]).collect()
    }

    #[test]
    fn an_initiation_is_taken_once_and_only_for_its_key() {
        let mut held = Held::default();
        held.hold(key(1), [1; 12], &message(1, 7), at(0));
        assert_eq!(marks(&held.take(|known| *known == key(2), at(1))), [0; 0]);
        assert_eq!(marks(&held.take(|known| *known == key(1), at(4))), [7]);
        assert_eq!(marks(&held.take(|_| true, at(4))), [0; 0]);
    }

    #[test]
    fn after_five_seconds_it_is_gone() {
        let mut held = Held::default();
        held.hold(key(1), [1; 12], &message(1, 7), at(0));
        assert_eq!(marks(&held.take(|_| true, at(5))), [0; 0]);
    }

    #[test]
    fn the_later_one_of_a_key_counts() {
        let mut held = Held::default();
        held.hold(key(1), [2; 12], &message(1, 2), at(0));
        held.hold(key(1), [1; 12], &message(2, 1), at(0));
        held.hold(key(1), [2; 12], &message(3, 3), at(0));
        assert_eq!(marks(&held.take(|_| true, at(1))), [2]);
        held.hold(key(1), [2; 12], &message(1, 2), at(1));
        held.hold(key(1), [3; 12], &message(1, 3), at(2));
        assert_eq!(marks(&held.take(|_| true, at(6))), [3]);
    }

    #[test]
    fn the_seventeenth_and_the_fifth_of_an_address_are_not_held() {
        let mut held = Held::default();
        for n in 0..5 {
            held.hold(key(n), [1; 12], &message(1, n), at(0));
        }
        for n in 5..30 {
            held.hold(key(n), [1; 12], &message(n, n), at(0));
        }
        let expected: Vec<_> = (0..4).chain(5..17).collect();
        assert_eq!(marks(&held.take(|_| true, at(1))), expected);
    }

    #[test]
    fn old_ones_make_room() {
        let mut held = Held::default();
        for n in 0..16 {
            held.hold(key(n), [1; 12], &message(n, n), at(0));
        }
        assert!(!held.has_room(&key(20), message(20, 0).from.remote().ip(), at(4)));
        held.hold(key(20), [1; 12], &message(20, 20), at(5));
        assert_eq!(marks(&held.take(|_| true, at(6))), [20]);
    }
}
