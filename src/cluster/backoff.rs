//! How often the API server is asked: back-off after failures, and a budget for what costs much.
//!
//! Every pause is jittered, or a thousand agents that lost the same server would return together.

use std::time::Duration;

use rand::Rng as _;
use tokio::time::Instant;

/// How long things may take before something is done about them.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Timeouts {
    /// Nothing is heard for this long on a watch: the connection is half-open. API servers send a
    /// bookmark every minute.
    pub silence: Duration,
    /// The objects of a streamed list may take this long. Servers before Kubernetes 1.27 do not know
    /// the request and never say that the list is complete.
    pub streamed_list: Duration,
    /// A list of suspicious size is asked for again after this long.
    pub second_look: Duration,
    /// A resource that is not there is asked for again after this long.
    pub absent: Duration,
    /// Lists beyond the first few are this far apart.
    pub between_lists: Duration,
    /// The one agent that looks for the admission policies begins this long after its start, past the
    /// rush in which all agents of a cluster start, and looks again after ten times as long.
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

/// Pauses that double from 0.8 s on, each between half and all of its length.
#[derive(Debug)]
pub(super) struct Backoff {
    longest: Duration,
    failures: u32,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(800);

    /// Pauses that grow up to `longest`.
    pub(super) const fn up_to(longest: Duration) -> Self {
        Self {
            longest,
            failures: 0,
        }
    }

    /// The pause after one more failure; at least what the server asked for.
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

    /// Begins again at the shortest pause.
    pub(super) const fn reset(&mut self) {
        self.failures = 0;
    }
}

/// Between half and all of `duration`.
pub(super) fn jitter(duration: Duration) -> Duration {
    duration.mul_f64(rand::rng().random_range(0.5..=1.0))
}

/// A budget that fills up by one each `interval` up to `capacity`.
#[derive(Debug)]
pub(super) struct Budget {
    capacity: u32,
    interval: Duration,
    /// When the budget was, or will be, full.
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

    /// Takes one, and says how long to wait until it was there to be taken.
    pub(super) fn take(&mut self, now: Instant) -> Duration {
        let full_at = self.full_at.map_or(now, |at| at.max(now));
        // With everything taken the budget is full again after capacity × interval; what exceeds
        // that is a debt to wait for.
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
    fn pauses_grow_to_half_a_minute_and_begin_again_after_success() {
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
    fn no_pause_is_shorter_than_the_server_asks() {
        let mut backoff = Backoff::up_to(Duration::from_secs(30));
        for _ in 0..20 {
            let pause = backoff.pause(Some(Duration::from_secs(7)));
            assert!((7.0..=10.5).contains(&pause.as_secs_f64()), "{pause:?}");
        }
    }

    #[test]
    fn a_budget_is_spent_at_once_and_then_at_its_rate() {
        let now = Instant::now();
        let mut budget = Budget::new(3, Duration::from_secs(30));
        let waits: Vec<_> = (0..5).map(|_| budget.take(now).as_secs()).collect();
        assert_eq!(waits, [0, 0, 0, 30, 60]);
        let later = now + Duration::from_secs(600);
        assert_eq!(budget.take(later).as_secs(), 0);
    }
}
