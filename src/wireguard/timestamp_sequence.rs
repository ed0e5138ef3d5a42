//! Makes the timestamps of initiations, each later than all before.
//!
//! How far ahead of the clock they are reserved on disk, and why, is in `timestamp`.

use std::time::Duration;

use super::timestamp::Timestamp;
use super::timestamp_store::StoreWriter;

/// How far ahead of the clock timestamps are reserved, so that the disk is written seldom. After a crash,
/// peers refuse an implementation that follows the clock for this long.
const AHEAD: Duration = Duration::from_secs(120);
/// When no more than this is left of it, more is reserved.
const LOW: Duration = Duration::from_secs(60);
/// Reserved while timestamps are ahead of the clock and grow by a nanosecond each: a million timestamps.
const AHEAD_OF_CLOCK: Duration = Duration::from_millis(1);

/// Makes timestamps, each later than all before. Dropping it is the orderly end.
#[derive(Debug)]
pub(super) struct TimestampSequence {
    last: Timestamp,
    used: bool,
    writer: Option<StoreWriter>,
}

impl TimestampSequence {
    /// Begins after `floor`, the last timestamp that was reserved in an earlier run. The writer must begin
    /// there too.
    pub(super) fn new(floor: Timestamp, writer: Option<StoreWriter>) -> Self {
        Self {
            last: floor,
            used: false,
            writer,
        }
    }

    /// A timestamp for an initiation that is sent now, by the wall clock.
    ///
    /// Waits for the disk only with the first one, or after the clock has jumped, and then only briefly.
    pub(super) fn next(&mut self, now: Timestamp) -> Timestamp {
        let least = self.last.plus(Duration::from_nanos(1));
        self.last = now.coarse().max(least);
        self.used = true;
        if let Some(writer) = &mut self.writer {
            let reserve = |ahead, ahead_of_clock| {
                let of_clock = now.coarse().plus(ahead);
                of_clock.max(self.last.plus(ahead_of_clock))
            };
            if writer.wanted() < reserve(LOW, AHEAD_OF_CLOCK / 2) {
                writer.reserve(reserve(AHEAD, AHEAD_OF_CLOCK));
            }
            writer.wait(self.last);
        }
        self.last
    }

    /// Starts to write a new greatest timestamp of a peer; returns at once.
    pub(super) fn accepted(&self) {
        if let Some(writer) = &self.writer {
            writer.keep_accepted();
        }
    }
}

impl Drop for TimestampSequence {
    fn drop(&mut self) {
        if let Some(writer) = self.writer.as_mut().filter(|_| self.used) {
            writer.settle(self.last);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::wireguard::timestamp::{Accepted, Store};

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_unix(Duration::from_secs(seconds))
    }

    #[test]
    fn timestamps_grow_when_the_clock_stands_still_or_goes_back() {
        let mut timestamps = TimestampSequence::new(Timestamp::default(), None);
        let clock = [1000, 1000, 0, 999, 1001, 1001].map(at);
        let made = clock.map(|now| timestamps.next(now).to_tai64n());
        assert!(made.is_sorted_by(|one, next| one < next), "{made:?}");
    }

    /// A disk: what was written, and a lock that keeps it from writing.
    #[derive(Clone, Default)]
    struct Disk(Arc<(Mutex<Vec<Timestamp>>, Mutex<()>)>);

    impl Store for Disk {
        fn keep_own(&self, mark: Timestamp) {
            let _turn = self.0.1.lock().unwrap();
            self.0.0.lock().unwrap().push(mark);
        }

        fn keep_accepted(&self, _: &Accepted) {}
    }

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

        fn timestamps(&self, floor: Timestamp) -> TimestampSequence {
            let writer = StoreWriter::start(floor, Arc::default(), Box::new(self.clone()));
            TimestampSequence::new(floor, Some(writer.unwrap()))
        }

        /// What a run begins with after the one before was killed, or has ended.
        fn mark(&self) -> Timestamp {
            self.written().last().copied().unwrap_or_default()
        }
    }

    fn is_late(timestamps: &TimestampSequence) -> bool {
        timestamps.writer.as_ref().is_some_and(StoreWriter::is_late)
    }

    /// Until the disk has taken what was reserved.
    fn next_on_disk(timestamps: &mut TimestampSequence, now: Timestamp) -> Timestamp {
        loop {
            let next = timestamps.next(now);
            if !is_late(timestamps) {
                return next;
            }
        }
    }

    #[test]
    fn after_a_restart_in_1970_they_are_later_than_before() {
        let disk = Disk::default();
        let mut timestamps = disk.timestamps(Timestamp::default());
        let last = (0..20)
            .map(|second| next_on_disk(&mut timestamps, at(1_000_000 + 10 * second)))
            .max()
            .unwrap();
        drop(timestamps);
        disk.takes(last);
        let written = disk.written();
        // Fewer, where the thread that writes was not yet there for one when the next was wanted.
        assert!(
            (2..=5).contains(&written.len()),
            "two minutes are reserved at a time, again after half of it, and the last one used: {written:?}"
        );

        let mut timestamps = TimestampSequence::new(disk.mark(), None);
        assert!(timestamps.next(at(0)) > last);
    }

    #[test]
    fn thirteen_orderly_restarts_are_not_ahead_of_the_clock() {
        let disk = Disk::default();
        for start in 0..13 {
            let now = at(1_000_000 + start);
            let mut timestamps = disk.timestamps(disk.mark());
            assert_eq!(timestamps.next(now), now, "start {start}");
            let used = timestamps.next(now);
            drop(timestamps);
            for _ in 0..3000 {
                if disk.mark() == used {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            assert_eq!(disk.mark(), used, "start {start}");
        }
    }

    #[test]
    fn thirteen_crashes_cost_no_more_than_one() {
        let disk = Disk::default();
        let mut last = Timestamp::default();
        for crash in 0..13 {
            let now = at(1_000_000 + crash);
            let mut timestamps = disk.timestamps(disk.mark());
            let next = next_on_disk(&mut timestamps, now);
            assert!(next > last, "crash {crash}");
            last = next;
            let most = now.plus(AHEAD + AHEAD_OF_CLOCK * 20);
            assert!(next < most, "crash {crash}: {next:?} at {now:?}");
            // Nothing is written at the end.
            std::mem::forget(timestamps);
        }
        // The control: by the clock alone, every restart within two minutes would repeat a timestamp.
        assert!(last > at(1_000_100));
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
    fn a_minute_without_a_disk_is_not_noticed() {
        let disk = Disk::default();
        let mut timestamps = disk.timestamps(Timestamp::default());
        next_on_disk(&mut timestamps, at(1_000_000));
        let hanging = disk.0.1.lock().unwrap();
        for second in 0..120 {
            timestamps.next(at(1_000_000 + second));
            assert!(!is_late(&timestamps), "second {second}");
        }
        // The control: beyond two minutes it is noticed.
        timestamps.next(at(1_000_000 + 121));
        assert!(is_late(&timestamps));
        drop(hanging);
    }

    #[test]
    fn timestamps_do_not_tell_the_exact_time() {
        let mut timestamps = TimestampSequence::new(Timestamp::default(), None);
        let made = timestamps.next(Timestamp::from_unix(Duration::new(5, 123_456_789)));
        assert_eq!(made.to_unix(), Duration::new(5, 117_440_512));
    }
}
