//! Limits the handshake messages of each source while the device is under load (paper, 5.3).
//!
//! Only sources that have proved with a cookie that they receive are counted, so forged addresses do not
//! fill the table.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use crate::wireguard::clock::Time;

/// Handshake messages per second and source.
const PER_SECOND: u32 = 20;
/// Messages that may come at once.
const BURST: u32 = 5;
/// The time that one message costs.
const COST: Duration = Duration::from_nanos(1_000_000_000 / PER_SECOND as u64);
/// The most sources that are counted. Others are refused until some have sent nothing for a second.
const MAX_SOURCES: usize = 8192;

/// A token bucket for each source: an IPv4 address, or a /64 of IPv6, which is what one host has.
#[derive(Debug, Default)]
pub(in crate::wireguard) struct RateLimit {
    sources: HashMap<IpAddr, Bucket>,
    swept: Option<Time>,
}

#[derive(Debug)]
struct Bucket {
    tokens: Duration,
    at: Time,
}

/// The source that an address counts for.
pub(super) fn source_of(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => {
            let network = u128::from(address) & !u128::from(u64::MAX);
            Ipv6Addr::from(network).into()
        }
    }
}

impl RateLimit {
    /// Whether a message from this address may be processed.
    pub(in crate::wireguard) fn allows(&mut self, address: IpAddr, now: Time) -> bool {
        let full = COST * BURST;
        if self
            .swept
            .is_none_or(|swept| now.since(swept) >= Duration::from_secs(1))
        {
            self.sources
                .retain(|_, bucket| now.since(bucket.at) < Duration::from_secs(1));
            self.swept = Some(now);
        }
        let source = source_of(address);
        if !self.sources.contains_key(&source) && self.sources.len() >= MAX_SOURCES {
            return false;
        }
        let bucket = self.sources.entry(source).or_insert(Bucket {
            tokens: full,
            at: now,
        });
        bucket.tokens = full.min(bucket.tokens + now.since(bucket.at));
        bucket.at = now;
        match bucket.tokens.checked_sub(COST) {
            Some(left) => {
                bucket.tokens = left;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(millis: u64) -> Time {
        Time::from_duration(Duration::from_millis(1000 + millis))
    }

    #[test]
    fn a_source_may_send_5_at_once_and_20_per_second() {
        let mut limit = RateLimit::default();
        let address = IpAddr::from([192, 0, 2, 1]);
        assert_eq!(
            (0..100).filter(|_| limit.allows(address, time(0))).count(),
            5
        );
        let allowed = (1..=10_000)
            .filter(|&millis| limit.allows(address, time(millis)))
            .count();
        assert_eq!(allowed, 200);
        assert!(
            limit.allows([192, 0, 2, 2].into(), time(10_000)),
            "another source has its own limit"
        );
    }

    #[test]
    fn a_network_of_64_bits_is_one_source() {
        let mut limit = RateLimit::default();
        let allowed = (0..100_u128)
            .filter(|&n| limit.allows(Ipv6Addr::from(0xfd00_u128 << 112 | n).into(), time(0)))
            .count();
        assert_eq!(allowed, 5);
    }

    #[test]
    fn the_table_is_bounded_and_empties_itself() {
        let mut limit = RateLimit::default();
        let allowed = (0..100_000_u32)
            .filter(|&n| limit.allows(std::net::Ipv4Addr::from(n).into(), time(0)))
            .count();
        assert_eq!(allowed, MAX_SOURCES);
        assert!(limit.allows([9, 9, 9, 9].into(), time(1000)));
        assert_eq!(limit.sources.len(), 1);
    }
}
