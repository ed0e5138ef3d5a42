//! The timestamps of initiations, which must grow for as long as the key lives.
//!
//! A peer refuses an initiation that is not newer than the last one it took. The wall clock alone
//! does not see to that: it may be set back, or be in 1970 at boot. So the highest timestamp that may
//! have been used is remembered, by whoever embeds the device, in steps of an hour.

use std::fmt;
use std::time::Duration;

/// Seconds and nanoseconds since the Unix epoch, in the order of time.
///
/// Sent as TAI64N with UTC's seconds, which is what WireGuard implementations send.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Timestamp(Duration);

/// What remembers the high-water mark: it is called with a timestamp that must be on disk before it
/// returns, or the next run may have to wait for the clock.
pub type Persist = Box<dyn Fn(Timestamp) + Send>;

/// How far ahead of the clock the high-water mark is set, so that it is seldom written.
const AHEAD: Duration = Duration::from_secs(3600);

/// Timestamps are no finer than this, so that they do not tell the machine's load or its clock's
/// drift (as in the kernel: 2^24 ns).
const GRANULARITY: u32 = 1 << 24;

const TAI64_BASE: u64 = (1 << 62) + 10;

impl Timestamp {
    /// A time since the Unix epoch.
    pub const fn from_unix(since_epoch: Duration) -> Self {
        Self(since_epoch)
    }

    /// The time since the Unix epoch.
    pub const fn to_unix(self) -> Duration {
        self.0
    }

    fn coarse(self) -> Self {
        let nanos = self.0.subsec_nanos() & !(GRANULARITY - 1);
        Self(Duration::new(self.0.as_secs(), nanos))
    }

    /// The form in which it is sent.
    pub fn to_tai64n(self) -> [u8; 12] {
        let mut bytes = [0; 12];
        let seconds = TAI64_BASE.wrapping_add(self.0.as_secs());
        bytes[..8].copy_from_slice(&seconds.to_be_bytes());
        bytes[8..].copy_from_slice(&self.0.subsec_nanos().to_be_bytes());
        bytes
    }
}

/// Makes timestamps, each later than all before.
pub(super) struct Timestamps {
    last: Timestamp,
    reserved: Timestamp,
    persist: Option<Persist>,
}

impl Timestamps {
    /// Begins after `floor`, which is the last thing `persist` was called with, in any earlier run.
    pub(super) fn new(floor: Timestamp, persist: Option<Persist>) -> Self {
        Self {
            last: floor,
            reserved: floor,
            persist,
        }
    }

    /// A timestamp for an initiation that is sent now, by the wall clock.
    pub(super) fn next(&mut self, now: Timestamp) -> Timestamp {
        let least = Timestamp(self.last.0.saturating_add(Duration::from_nanos(1)));
        self.last = now.coarse().max(least);
        if let Some(persist) = self.persist.as_ref().filter(|_| self.last > self.reserved) {
            self.reserved = Timestamp(self.last.0.saturating_add(AHEAD));
            persist(self.reserved);
        }
        self.last
    }
}

impl fmt::Debug for Timestamps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timestamps")
            .field("last", &self.last)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_unix(Duration::from_secs(seconds))
    }

    #[test]
    fn timestamps_grow_when_the_clock_stands_still_or_goes_back() {
        let mut timestamps = Timestamps::new(Timestamp::default(), None);
        let clock = [1000, 1000, 0, 999, 1001, 1001].map(at);
        let made = clock.map(|now| timestamps.next(now).to_tai64n());
        assert!(made.is_sorted_by(|one, next| one < next), "{made:?}");
    }

    #[test]
    fn after_a_restart_in_1970_they_are_later_than_before() {
        let stored = Arc::new(Mutex::new(Vec::new()));
        let persist = {
            let stored = stored.clone();
            Box::new(move |timestamp| stored.lock().unwrap().push(timestamp))
        };
        let mut timestamps = Timestamps::new(Timestamp::default(), Some(persist));
        let last = (0..100)
            .map(|minute| timestamps.next(at(1_000_000 + 60 * minute)))
            .max()
            .unwrap();
        let stored = stored.lock().unwrap();
        assert_eq!(stored.len(), 2, "an hour is reserved at a time");

        let mut timestamps = Timestamps::new(*stored.last().unwrap(), None);
        assert!(timestamps.next(at(0)) > last);
    }

    #[test]
    fn timestamps_do_not_tell_the_exact_time() {
        let mut timestamps = Timestamps::new(Timestamp::default(), None);
        let made = timestamps.next(Timestamp::from_unix(Duration::new(5, 123_456_789)));
        assert_eq!(made.to_unix(), Duration::new(5, 117_440_512));
    }
}
