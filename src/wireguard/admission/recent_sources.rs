//! Who asks for the first time in a while.
//!
//! Under a flood of handshakes from made-up addresses a stranger with a real one would hardly ever be
//! among those that there is time to answer. But who means it asks once and then not again for five
//! seconds (paper, 6.4), and who floods asks from the same addresses over and over; and to have asked
//! just now takes no time to see. So those come first that have not, and a flood has to make up
//! addresses by the million to crowd them out.
//!
//! What is remembered are marks in a table of fixed size, without the addresses: a stranger is taken
//! for somebody else now and then, and no attacker can tell for whom.

use std::hash::{BuildHasher as _, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::time::Duration;

use super::rate_limit::source_of;
use crate::wireguard::clock::Time;

/// Who asked within this time asks again too soon. Initiators wait five seconds (`REKEY_TIMEOUT`).
const WHILE: Duration = Duration::from_millis(4500);
/// The grain of time of a mark; 65,535 of them are more than four hours.
const GRAIN: Duration = Duration::from_millis(250);
/// Each address has two marks in one cache line, because to fetch a second line takes as long as all
/// the rest. With 65,536 addresses at work a newcomer finds both of its own taken in one case out of
/// fifty; the table has two MiB.
const LINES: usize = 1 << 15;
const MARKS: usize = 32;
/// Of those who ask too soon one in so many is heard, so that nobody who makes up somebody's address
/// keeps that one out.
const ONE_IN: u32 = 64;

/// Whether to listen to who asks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Recency {
    /// It asks for the first time in a while.
    New,
    /// It asks again too soon, and is the one in so many that is heard if there is time.
    Sampled,
    /// It asks again too soon.
    Recent,
}

/// When each address last asked.
#[derive(Debug)]
pub(super) struct RecentSources {
    /// So that nobody knows which addresses share marks.
    hash: RandomState,
    lines: Box<[Line]>,
    repeated: AtomicU32,
}

#[derive(Debug, Default)]
#[repr(align(64))]
struct Line([AtomicU16; MARKS]);

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
    /// Takes note that an address asks; whether to listen to it.
    pub(super) fn note(&self, address: IpAddr, now: Time) -> Recency {
        let grains = now.as_duration().as_millis() / GRAIN.as_millis();
        // Time goes round; zero stands for never.
        let now = u16::try_from(grains % u128::from(u16::MAX)).unwrap_or(0) + 1;
        let hash = self.hash.hash_one(source_of(address));
        let part = |shift: u32, of: usize| usize::try_from(hash >> shift).unwrap_or(0) % of;
        let Line(line) = &self.lines[part(0, LINES)];
        let first = part(32, MARKS);
        let mut new = false;
        for at in [first, (first + 1 + part(40, MARKS - 1)) % MARKS] {
            let before = line[at].swap(now, Ordering::Relaxed);
            let age = u32::from(now.wrapping_sub(before));
            new |= before == 0 || GRAIN * age >= WHILE;
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

    fn heard(sources: &RecentSources, address: IpAddr, millis: u64) -> bool {
        sources.note(address, time(millis)) != Recency::Recent
    }

    fn flood(sources: &RecentSources, millis: u64) -> usize {
        let addresses = 0xc612_0000..=0xc612_ffff_u32;
        addresses
            .filter(|&address| heard(sources, Ipv4Addr::from(address).into(), millis))
            .count()
    }

    #[test]
    fn a_flood_from_the_same_addresses_is_heard_once_and_newcomers_are() {
        let sources = RecentSources::default();
        assert!(flood(&sources, 0) > 60_000, "all are new");
        for round in 1..10 {
            let heard = flood(&sources, round * 700);
            assert!(heard <= 1025, "{heard} of 65,536 were heard again");
        }
        let newcomers = (0..1000_u32)
            .map(|n| sources.note(Ipv4Addr::from(0x0a00_0000 | n).into(), time(7000)))
            .filter(|&recency| recency == Recency::New)
            .count();
        assert!(newcomers > 900, "only {newcomers} of 1000 were heard");
    }

    #[test]
    fn who_waits_for_five_seconds_is_heard_every_time() {
        let sources = RecentSources::default();
        let address = IpAddr::from([192, 0, 2, 1]);
        for attempt in 0..10_000 {
            let recency = sources.note(address, time(attempt * 5000));
            assert_eq!(recency, Recency::New, "{attempt}");
        }
        assert!(!heard(&sources, address, 10_000 * 5000 - 4000));
    }

    #[test]
    fn who_asks_all_the_time_is_heard_now_and_then() {
        let sources = RecentSources::default();
        let address = IpAddr::from([192, 0, 2, 1]);
        let heard = (0..6400).filter(|&n| heard(&sources, address, n)).count();
        assert!((90..=110).contains(&heard), "{heard} of 6400");
    }
}
