//! The timestamps of initiations, which must grow for as long as the key lives.
//!
//! A peer refuses an initiation that is not newer than the last one it took. The wall clock alone
//! does not see to that: it may be set back, or be in 1970 at boot. So the highest timestamp that may
//! have been used is remembered, by whoever embeds the device, in steps of an hour, and again when
//! half of it is used, so that a disk may be slow or away for as long as that without anybody noticing.

use std::time::Duration;

use super::keeper::Keeper;

/// Seconds and nanoseconds since the Unix epoch, in the order of time.
///
/// Sent as TAI64N with UTC's seconds, which is what WireGuard implementations send.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Timestamp(Duration);

/// What remembers the high-water mark: it is called with a timestamp that should be on disk when it
/// returns, or the next run may have to wait for the clock.
///
/// It is called on a thread of its own, about every half hour in which there are handshakes, and may
/// take as long as it takes: handshakes go on meanwhile. Each call has a later timestamp than the one
/// before, and none is made before the last one has returned.
pub type Persist = Box<dyn Fn(Timestamp) + Send>;

/// How far ahead of the clock the high-water mark is set, so that it is seldom written.
const AHEAD: Duration = Duration::from_secs(3600);
/// When no more than so much of that is left, more is asked for.
const LOW: Duration = Duration::from_secs(1800);

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

    fn plus(self, time: Duration) -> Self {
        Self(self.0.saturating_add(time))
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
#[derive(Debug)]
pub(super) struct Timestamps {
    last: Timestamp,
    keeper: Option<Keeper>,
}

impl Timestamps {
    /// Begins after `floor`, which is the last thing that was remembered, in any earlier run; the
    /// keeper has to begin there as well.
    pub(super) fn new(floor: Timestamp, keeper: Option<Keeper>) -> Self {
        Self {
            last: floor,
            keeper,
        }
    }

    /// A timestamp for an initiation that is sent now, by the wall clock.
    ///
    /// Waits for the disk only with the first one, or after a leap of the clock, and then but a moment.
    pub(super) fn next(&mut self, now: Timestamp) -> Timestamp {
        let least = self.last.plus(Duration::from_nanos(1));
        self.last = now.coarse().max(least);
        if let Some(keeper) = &mut self.keeper {
            if self.last.plus(LOW) > keeper.wanted() {
                keeper.reserve(self.last.plus(AHEAD));
            }
            keeper.wait(self.last);
        }
        self.last
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

    /// A disk: what was written, and a lock that keeps it from writing.
    #[derive(Clone, Default)]
    struct Disk(Arc<(Mutex<Vec<Timestamp>>, Mutex<()>)>);

    impl Disk {
        fn written(&self) -> Vec<Timestamp> {
            self.0.0.lock().unwrap().clone()
        }

        /// Waits until a mark is written that is no earlier than this: the end of a device does not wait
        /// for long.
        fn takes(&self, used: Timestamp) {
            for _ in 0..3000 {
                if self.written().last().is_some_and(|mark| *mark >= used) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            panic!("{:?} and not {used:?} was written", self.written());
        }

        fn timestamps(&self, floor: Timestamp) -> Timestamps {
            let disk = self.0.clone();
            let persist = Box::new(move |timestamp| {
                let _turn = disk.1.lock().unwrap();
                disk.0.lock().unwrap().push(timestamp);
            });
            Timestamps::new(floor, Some(Keeper::start(floor, persist).unwrap()))
        }
    }

    fn is_late(timestamps: &Timestamps) -> bool {
        timestamps.keeper.as_ref().is_some_and(Keeper::is_late)
    }

    #[test]
    fn after_a_restart_in_1970_they_are_later_than_before() {
        let disk = Disk::default();
        let mut timestamps = disk.timestamps(Timestamp::default());
        let last = (0..100)
            .map(|minute| timestamps.next(at(1_000_000 + 60 * minute)))
            .max()
            .unwrap();
        drop(timestamps);
        disk.takes(last);
        let written = disk.written();
        // Fewer, where the thread that writes was not yet there for one when the next was wanted.
        assert!(
            (1..=4).contains(&written.len()),
            "an hour is reserved at a time, and again after half of it: {written:?}"
        );

        let mut timestamps = Timestamps::new(*written.last().unwrap(), None);
        assert!(timestamps.next(at(0)) > last);
    }

    #[test]
    fn a_disk_that_hangs_holds_up_no_handshake_and_gets_the_last_mark_when_it_is_back() {
        let disk = Disk::default();
        let mut timestamps = disk.timestamps(at(10));
        let hanging = disk.0.1.lock().unwrap();
        // Were each to wait, this would take more than four minutes; were one to wait for the disk,
        // it would take for ever.
        let last = (0..1000)
            .map(|minute| timestamps.next(at(1_000_000 + 60 * minute)))
            .max()
            .unwrap();
        assert_eq!(disk.written(), []);

        drop(hanging);
        let next = timestamps.next(at(1_000_000));
        drop(timestamps);
        assert!(next > last);
        disk.takes(next);
    }

    #[test]
    fn a_device_may_end_while_its_disk_hangs() {
        let disk = Disk::default();
        let hanging = disk.0.1.lock().unwrap();
        let mut timestamps = disk.timestamps(Timestamp::default());
        timestamps.next(at(1_000_000));
        drop(timestamps);
        assert_eq!(disk.written(), []);
        drop(hanging);
    }

    #[test]
    fn while_half_an_hour_is_left_nobody_waits_for_the_disk() {
        let disk = Disk::default();
        let mut timestamps = disk.timestamps(Timestamp::default());
        loop {
            timestamps.next(at(1_000_000));
            if !is_late(&timestamps) {
                break;
            }
        }
        let hanging = disk.0.1.lock().unwrap();
        for minute in 0..59 {
            timestamps.next(at(1_000_000 + 60 * minute));
            assert!(!is_late(&timestamps), "minute {minute}");
        }
        // The control: beyond the hour it is noticed.
        timestamps.next(at(1_000_000 + 60 * 61));
        assert!(is_late(&timestamps));
        drop(hanging);
    }

    #[test]
    fn timestamps_do_not_tell_the_exact_time() {
        let mut timestamps = Timestamps::new(Timestamp::default(), None);
        let made = timestamps.next(Timestamp::from_unix(Duration::new(5, 123_456_789)));
        assert_eq!(made.to_unix(), Duration::new(5, 117_440_512));
    }
}
