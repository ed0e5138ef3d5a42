//! Limits of requests to the API server: back-off after failures, and a budget for expensive requests.
//!
//! Every pause is jittered. Otherwise a thousand agents that lost the same server would return together.

use std::time::{Duration, Instant};

use rand::RngExt as _;

/// The timeouts and intervals of requests to the API.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Timeouts {
    /// A watch without data for this long has a half-open connection. API servers send a bookmark
    /// every minute.
    pub silence: Duration,
    /// Longest wait for the objects of a streamed list. Servers before Kubernetes 1.27 do not know
    /// the request and never mark the list as complete.
    pub streamed_list: Duration,
    /// Pause before a list of suspicious size is requested again.
    pub second_look: Duration,
    /// Pause before an absent resource is requested again.
    pub absent: Duration,
    /// Interval between lists after the first few.
    pub between_lists: Duration,
    /// The agent that checks the admission policies starts this long after its own start, when the rush
    /// of all agents' starts is over. It checks again after ten times as long.
    pub policies: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            silence: Duration::from_secs(90),
            streamed_list: Duration::from_secs(20),
            second_look: Duration::from_secs(10),
            absent: Duration::from_secs(60),
            between_lists: Duration::from_secs(30),
            policies: Duration::from_secs(60),
        }
    }
}

/// Exponential back-off: pauses double from 0.8 s, each jittered to between half and all of its length.
#[derive(Debug)]
pub(super) struct Backoff {
    longest: Duration,
    failures: u32,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(800);

    /// A back-off whose pauses grow up to `longest`.
    pub(super) const fn up_to(longest: Duration) -> Self {
        Self {
            longest,
            failures: 0,
        }
    }

    /// The pause after one more failure; at least `asked`, the server's `Retry-After`.
    pub(super) fn pause(&mut self, asked: Option<Duration>) -> Duration {
        let doubled = Self::FIRST.saturating_mul(1 << self.failures.min(10));
        self.failures = self.failures.saturating_add(1);
        let pause = jitter(doubled.min(self.longest));
        asked.map_or(pause, |asked| asked + pause.min(asked / 2))
    }

    /// Failures since the last [`Self::reset`].
    pub(super) const fn failures(&self) -> u32 {
        self.failures
    }

    /// Starts again at the shortest pause.
    pub(super) const fn reset(&mut self) {
        self.failures = 0;
    }
}

/// A random duration between half and all of `duration`.
pub(super) fn jitter(duration: Duration) -> Duration {
    duration.mul_f64(rand::rng().random_range(0.5..=1.0))
}

/// A token bucket: gains one token per `interval`, up to `capacity`.
#[derive(Debug)]
pub(super) struct Budget {
    capacity: u32,
    interval: Duration,
    /// When the budget was or will be full; `None` before the first use.
    full_at: Option<Instant>,
}

impl Budget {
    /// A full budget.
    pub(super) const fn new(capacity: u32, interval: Duration) -> Self {
        Self {
            capacity,
            interval,
            full_at: None,
        }
    }

    /// Takes one token; returns how long to wait until it is available.
    pub(super) fn take(&mut self, now: Instant) -> Duration {
        let full_at = self.full_at.map_or(now, |at| at.max(now));
        // An empty budget is full again after capacity × interval; any excess
        // over that is the wait.
        let debt = (full_at + self.interval)
            .saturating_duration_since(now + self.interval * self.capacity);
        self.full_at = Some(full_at + self.interval);
        debt
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_half_a_minute_and_start_again_after_success() {
        let mut backoff = Backoff::up_to(Duration::from_secs(30));
        let pauses: Vec<_> = (0..20).map(|_| backoff.pause(None)).collect();
        assert!(pauses[0] <= Duration::from_millis(800), "{pauses:?}");
        assert!(pauses[0] >= Duration::from_millis(400), "{pauses:?}");
        assert!(
            pauses[10..]
                .iter()
                .all(|p| (15.0..=30.0).contains(&p.as_secs_f64()))
        );
        backoff.reset();
        assert!(backoff.pause(None) <= Duration::from_millis(800));
    }

    #[test]
    fn no_pause_is_shorter_than_retry_after() {
        let mut backoff = Backoff::up_to(Duration::from_secs(30));
        for _ in 0..20 {
            let pause = backoff.pause(Some(Duration::from_secs(7)));
            assert!((7.0..=10.5).contains(&pause.as_secs_f64()), "{pause:?}");
        }
    }

    #[test]
    fn a_budget_is_spent_at_once_and_then_at_its_rate() {
        let now = crate::clock::now();
        let mut budget = Budget::new(3, Duration::from_secs(30));
        let waits: Vec<_> = (0..5).map(|_| budget.take(now).as_secs()).collect();
        assert_eq!(waits, [0, 0, 0, 30, 60]);
        let later = now + Duration::from_secs(600);
        assert_eq!(budget.take(later).as_secs(), 0);
    }
}
