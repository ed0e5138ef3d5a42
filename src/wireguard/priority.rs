//! The priority of the packet threads.
//!
//! A packet that waits while another program has the CPU is late by a time slice at each end, which
//! is milliseconds where the work takes microseconds; the kernel's own packet processing does not
//! wait like that either. So the packet threads run before ordinary programs (`SCHED_RR`, at its
//! lowest priority), where they may (`CAP_SYS_NICE`). A thread that has so much to do that it would
//! starve the others takes its turn with them until that is over.
#![expect(unsafe_code, reason = "the scheduling policy of a thread")]

use std::time::Duration;

use nix::errno::Errno;
use nix::time::{ClockId, clock_gettime};

use super::clock::Time;

/// The use of the CPU is looked at over this time.
const WINDOW: Duration = Duration::from_millis(100);
/// A thread that uses more of a window than this goes back to the ordinary policy: others get the
/// rest of the window at the least, which is enough for what has to answer within a second.
const SHARE: Duration = Duration::from_millis(85);
/// For this long.
const PENALTY: Duration = Duration::from_secs(1);

/// The priority of the calling thread.
#[derive(Debug)]
pub(super) struct Priority {
    /// Whether it may be raised at all.
    allowed: bool,
    budget: Budget,
}

impl Priority {
    /// Raises the priority of the calling thread, if that is wanted and allowed.
    pub(super) fn raise(wanted: bool, now: Time) -> Self {
        let allowed = wanted && set_policy(libc::SCHED_RR, 1).is_ok();
        Self {
            allowed,
            budget: Budget::new(now, Duration::ZERO),
        }
    }

    /// Looks at the use of the CPU from time to time; to be called once per batch.
    pub(super) fn check(&mut self, now: Time) {
        if !self.allowed || !self.budget.is_due(now) {
            return;
        }
        let used = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from);
        let changed = match self.budget.account(now, used.unwrap_or_default()) {
            Some(true) => set_policy(libc::SCHED_RR, 1),
            Some(false) => set_policy(libc::SCHED_OTHER, 0),
            None => Ok(()),
        };
        self.allowed = changed.is_ok();
    }
}

/// Decides when a thread has had more than its share.
#[derive(Debug)]
struct Budget {
    begun: Time,
    /// CPU time at the begin of the window.
    used: Duration,
    lowered_until: Option<Time>,
}

impl Budget {
    fn new(now: Time, used: Duration) -> Self {
        Self {
            begun: now,
            used,
            lowered_until: None,
        }
    }

    fn is_due(&self, now: Time) -> bool {
        now.since(self.begun) >= WINDOW
    }

    /// Ends a window; says whether the priority is to be raised or lowered.
    fn account(&mut self, now: Time, used: Duration) -> Option<bool> {
        let (elapsed, spent) = (now.since(self.begun), used.saturating_sub(self.used));
        (self.begun, self.used) = (now, used);
        match self.lowered_until {
            Some(until) if until > now => None,
            Some(_) => {
                self.lowered_until = None;
                Some(true)
            }
            // In proportion, because the window may have been longer.
            None if spent.as_nanos() * WINDOW.as_nanos()
                > SHARE.as_nanos() * elapsed.as_nanos() =>
            {
                self.lowered_until = Some(now + PENALTY);
                Some(false)
            }
            None => None,
        }
    }
}

fn set_policy(policy: libc::c_int, priority: libc::c_int) -> nix::Result<()> {
    // SAFETY: all-zero bytes are a valid sched_param; some C libraries have more fields in it.
    let mut parameter: libc::sched_param = unsafe { std::mem::zeroed() };
    parameter.sched_priority = priority;
    // SAFETY: 0 names the calling thread, and the parameter lives through the call.
    let result = unsafe { libc::sched_setscheduler(0, policy, &raw const parameter) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn time(at: u64) -> Time {
        Time::from_duration(millis(1000 + at))
    }

    #[test]
    fn a_thread_that_uses_more_than_its_share_is_lowered_for_a_second() {
        let mut budget = Budget::new(time(0), millis(0));
        assert!(!budget.is_due(time(99)));
        assert_eq!(budget.account(time(100), millis(80)), None);
        assert_eq!(budget.account(time(200), millis(170)), Some(false));
        assert_eq!(budget.account(time(1100), millis(1000)), None);
        assert_eq!(budget.account(time(1250), millis(1100)), Some(true));
        assert_eq!(budget.account(time(1350), millis(1110)), None);
    }

    #[test]
    fn a_pause_counts_as_time_in_which_others_ran() {
        let mut budget = Budget::new(time(0), millis(0));
        assert_eq!(budget.account(time(10_000), millis(99)), None);
    }

    #[test]
    fn raising_is_harmless_where_it_is_not_allowed() {
        let mut priority = Priority::raise(false, time(0));
        priority.check(time(1000));
        assert!(!priority.allowed);
    }
}
