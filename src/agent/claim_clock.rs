//! The time that new entries of this node's ledger get. Pure: the time is passed in.
//!
//! What the node claims is decided in [`super::publication`].

use std::time::{Duration, Instant};

/// How long a time is used for new entries. What is written must not change while the API server
/// shows what was written before.
const HOLD: Duration = Duration::from_secs(5);
/// Seconds by which the last change of the own Node may be ahead of the API server's clock. Several
/// servers differ by less. A later time is forged, and the admission policy refuses entries from minutes
/// ahead, so that an agent which followed it could publish nothing.
const MAX_AHEAD: i64 = 60;

/// The time that new entries get.
#[derive(Debug, Default)]
pub struct ClaimClock(Option<(i64, Instant)>);

impl ClaimClock {
    /// Takes the API server's time and the time of the last change of the own Node, both in Unix
    /// seconds, and returns the time for new entries. It is never before that change: the admission
    /// policy refuses an entry that would be older than the object it stands in.
    pub fn handle_time(&mut self, now: Instant, server: i64, changed: Option<i64>) -> i64 {
        let latest = server.saturating_add(MAX_AHEAD);
        let least = changed.filter(|changed| *changed <= latest);
        let least = least.unwrap_or(i64::MIN);
        if let Some((time, at)) = self.0
            && time >= least
            && now.saturating_duration_since(at) < HOLD
        {
            return time;
        }
        let time = server.max(least);
        self.0 = Some((time, now));
        time
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "any instant to count from")]
    fn start() -> Instant {
        Instant::now()
    }

    #[test]
    fn an_entry_is_never_older_than_the_last_change_of_its_node() {
        let (mut stamp, start) = (ClaimClock::default(), start());
        let at = |seconds| start + Duration::from_secs(seconds);

        assert_eq!(stamp.handle_time(at(0), 1_000, Some(990)), 1_000);
        // The kubelet wrote while the patch was on its way, or this server's clock is behind.
        assert_eq!(stamp.handle_time(at(1), 1_001, Some(1_002)), 1_002);
    }

    #[test]
    fn a_change_of_the_node_from_the_future_does_not_date_entries_ahead() {
        let mut stamp = ClaimClock::default();

        assert_eq!(stamp.handle_time(start(), 1_000, Some(9_999)), 1_000);
    }

    #[test]
    fn a_time_that_was_published_stays_until_the_watch_has_shown_it() {
        let (mut stamp, start) = (ClaimClock::default(), start());
        let at = |seconds| start + Duration::from_secs(seconds);

        assert_eq!(stamp.handle_time(at(0), 1_000, None), 1_000);
        assert_eq!(stamp.handle_time(at(4), 1_004, Some(1_000)), 1_000);
        assert_eq!(stamp.handle_time(at(5), 1_005, Some(1_000)), 1_005);
    }
}
