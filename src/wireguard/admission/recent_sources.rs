//! The addresses that sent a handshake message within the last seconds.
//!
//! In a flood of handshakes from forged addresses there is no time to answer all of them, and a sender with
//! a real address would hardly ever be chosen. A real initiator sends one initiation and waits five seconds
//! before the next (paper, 6.4), while a flood uses the same addresses over and over. So addresses without a
//! recent message come first, which is quick to check. To crowd them out, a flood needs millions of
//! addresses.
//!
//! The table has a fixed size and holds times, not addresses. Two addresses may share their entries, and no
//! attacker can find out which.

use std::hash::{BuildHasher as _, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::time::Duration;

use super::rate_limit::source_of;
use crate::wireguard::clock::Time;

/// A message within this time of the last is too soon. Initiators wait five seconds (`REKEY_TIMEOUT`).
const RECENT: Duration = Duration::from_millis(4500);
/// The unit of time of an entry; 65,535 units are more than four hours.
const UNIT: Duration = Duration::from_millis(250);
/// Each address has two entries in one cache line, because to fetch a second line takes as long as the
/// rest of the work. With 65,536 active addresses a new one finds both entries taken in one case of fifty.
/// The table takes two MiB.
const LINES: usize = 1 << 15;
const ENTRIES: usize = 32;
/// One of this many messages that come too soon is admitted, so that an attacker that forges an address
/// does not keep its owner out.
const ONE_IN: u32 = 64;

/// When an address last sent a message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Recency {
    /// Not within the last seconds.
    New,
    /// Just now, but this message is the sample that is admitted if there is time.
    Sampled,
    /// Just now.
    Recent,
}

/// When each address last sent a message.
#[derive(Debug)]
pub(super) struct RecentSources {
    /// Keyed at random: no attacker can find addresses that share entries.
    hash: RandomState,
    lines: Box<[Line]>,
    repeated: AtomicU32,
}

#[derive(Debug, Default)]
#[repr(align(64))]
struct Line([AtomicU16; ENTRIES]);

impl Default for RecentSources {
    fn default() -> Self {
        Self {
            hash: RandomState::new(),
            lines: (0..LINES).map(|_| Line::default()).collect(),
            repeated: AtomicU32::new(0),
        }
    }
}

impl RecentSources {
    /// Records a message of an address; returns when the last one before it was.
    pub(super) fn note(&self, address: IpAddr, now: Time) -> Recency {
        let units = now.as_duration().as_millis() / UNIT.as_millis();
        // The time wraps around. Zero is never.
        let now = u16::try_from(units % u128::from(u16::MAX)).unwrap_or(0) + 1;
        let hash = self.hash.hash_one(source_of(address));
        let part = |shift: u32, of: usize| usize::try_from(hash >> shift).unwrap_or(0) % of;
        let Line(line) = &self.lines[part(0, LINES)];
        let first = part(32, ENTRIES);
        let mut new = false;
        for at in [first, (first + 1 + part(40, ENTRIES - 1)) % ENTRIES] {
            let before = line[at].swap(now, Ordering::Relaxed);
            let age = u32::from(now.wrapping_sub(before));
            new |= before == 0 || UNIT * age >= RECENT;
        }
        if new {
            Recency::New
        } else if self.repeated.fetch_add(1, Ordering::Relaxed) % ONE_IN == ONE_IN - 1 {
            Recency::Sampled
        } else {
            Recency::Recent
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn time(millis: u64) -> Time {
        Time::from_duration(Duration::from_millis(1_000_000 + millis))
    }

    fn admitted(sources: &RecentSources, address: IpAddr, millis: u64) -> bool {
        sources.note(address, time(millis)) != Recency::Recent
    }

    fn flood(sources: &RecentSources, millis: u64) -> usize {
        let addresses = 0xc612_0000..=0xc612_ffff_u32;
        addresses
            .filter(|&address| admitted(sources, Ipv4Addr::from(address).into(), millis))
            .count()
    }

    #[test]
    fn a_flood_from_the_same_addresses_is_admitted_once_and_new_addresses_are_admitted() {
        let sources = RecentSources::default();
        assert!(flood(&sources, 0) > 60_000, "all are new");
        for round in 1..10 {
            let admitted = flood(&sources, round * 700);
            assert!(admitted <= 1025, "{admitted} of 65,536 were admitted again");
        }
        let new = (0..1000_u32)
            .map(|n| sources.note(Ipv4Addr::from(0x0a00_0000 | n).into(), time(7000)))
            .filter(|&recency| recency == Recency::New)
            .count();
        assert!(new > 900, "only {new} of 1000 were admitted");
    }

    #[test]
    fn a_sender_that_waits_for_five_seconds_is_always_admitted() {
        let sources = RecentSources::default();
        let address = IpAddr::from([192, 0, 2, 1]);
        for attempt in 0..10_000 {
            let recency = sources.note(address, time(attempt * 5000));
            assert_eq!(recency, Recency::New, "{attempt}");
        }
        assert!(!admitted(&sources, address, 10_000 * 5000 - 4000));
    }

    #[test]
    fn a_sender_that_does_not_wait_is_admitted_now_and_then() {
        let sources = RecentSources::default();
        let address = IpAddr::from([192, 0, 2, 1]);
        let admitted = (0..6400)
            .filter(|&n| admitted(&sources, address, n))
            .count();
        assert!((90..=110).contains(&admitted), "{admitted} of 6400");
    }
}
