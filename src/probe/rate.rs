//! A rate limit: so many a second, and a few at once. Pure: the time is passed in.

use std::time::{Duration, Instant};

/// A rate limit by the generic cell rate algorithm (ITU-T I.371).
#[derive(Clone, Debug)]
pub(super) struct Rate {
    /// The time that each takes.
    cost: Duration,
    /// How far ahead of the time may be taken.
    burst: Duration,
    /// When all that was taken is paid.
    paid: Option<Instant>,
}

impl Rate {
    /// So many a second, `burst` of them at once. Both are at least 1.
    pub(super) fn new(per_second: u32, burst: u32) -> Self {
        let cost = Duration::from_secs(1) / per_second.max(1);
        Self {
            cost,
            burst: cost * (burst.max(1) - 1),
            paid: None,
        }
    }

    /// Takes one, unless it is too soon.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let paid = self.paid.map_or(now, |paid| paid.max(now));
        if paid > now + self.burst {
            return false;
        }
        self.paid = Some(paid + self.cost);
        true
    }

    /// When the next one may be taken; `None` for at once.
    pub(super) fn poll_ready(&self) -> Option<Instant> {
        self.paid?.checked_sub(self.burst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "an Instant has no other origin")]
    fn start() -> Instant {
        Instant::now()
    }

    #[test]
    fn no_second_has_more_than_the_rate_and_the_burst() {
        let mut rate = Rate::new(20, 5);
        let t0 = start();
        let taken = |rate: &mut Rate, from: u64, to: u64| {
            let times = (from..to).map(|ms| t0 + Duration::from_millis(ms));
            times.filter(|at| rate.take(*at)).count()
        };
        assert_eq!(taken(&mut rate, 0, 1), 1);
        assert_eq!(taken(&mut rate, 0, 1_000), 23);
        assert_eq!(taken(&mut rate, 1_000, 2_000), 20);
        let ready = rate.poll_ready().unwrap();
        assert!(rate.take(ready.max(t0 + Duration::from_secs(2))));
    }
}
