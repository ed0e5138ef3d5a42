//! What time it is to Kilo's algorithm, and when this node checks in. Pure: the clock is passed in.
//!
//! A real `kg` judges by `last-seen` which nodes are alive, so beside one every agent writes it, and reads it
//! the same way. While the API takes no check-ins, no check-in is fresh, and that says nothing about any node:
//! time stands still here until all have had the chance to check in again. Kilo itself forgets its
//! peers in that moment.

/// Seconds after which a check-in is repeated. Kilo repeats its own after 30 and forgets a node after
/// 60; every write is a change of the big Node object that all agents receive, so not much earlier.
const PERIOD: i64 = 25;
/// A check-in older than that, in seconds, was not taken by the API: it has been tried since
/// [`PERIOD`]. Well before others count this node out, so that they are still judged fresh.
const OVERDUE: i64 = 40;
/// Seconds until everybody has checked in again: Kilo's 30, and what a busy API server takes.
const CATCHING_UP: i64 = 35;

/// The reader's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct KiloClock {
    /// Whether a check-in of this agent's has come back from the API.
    taken: bool,
    /// The time at which it stands still.
    stopped: Option<i64>,
    /// When it goes on.
    resumes: Option<i64>,
}

impl KiloClock {
    /// The time, in Unix seconds, at which to judge the others: `now`, or earlier.
    ///
    /// `own` is this node's `last-seen` as the API shows it, and `live` whether what is known of the
    /// cluster comes from the API and not from the cache.
    pub fn handle_clock(&mut self, now: i64, own: Option<i64>, live: bool) -> i64 {
        let Some(own) = own else {
            *self = Self::default();
            return now;
        };
        if !live {
            // What was remembered is judged as of when it was true.
            return own;
        }
        let age = now.saturating_sub(own);
        if age <= PERIOD {
            self.taken = true;
            if self.stopped.is_some() {
                self.resumes.get_or_insert(now + CATCHING_UP);
            }
        } else if age > OVERDUE && self.taken {
            self.stopped.get_or_insert(own + OVERDUE);
            self.resumes = None;
        }
        if self.resumes.is_some_and(|resumes| now >= resumes) {
            self.stopped = None;
            self.resumes = None;
        }
        self.stopped.unwrap_or(now)
    }
}

/// The `last-seen` to publish: the published one while it is fresh, so that nothing is written.
pub fn last_seen(now: i64, own: Option<i64>) -> i64 {
    own.filter(|seen| (0..PERIOD).contains(&now.saturating_sub(*seen)))
        .unwrap_or(now)
}

/// Seconds until the next check-in is due; a moment, where one is under way or overdue.
pub fn due(now: i64, own: Option<i64>) -> u64 {
    let age = own.map_or(PERIOD, |seen| now.saturating_sub(seen));
    (PERIOD - age).clamp(5, PERIOD).unsigned_abs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_in_is_repeated_when_it_is_25_seconds_old_and_not_before() {
        assert_eq!(last_seen(1_000, None), 1_000);
        assert_eq!(last_seen(1_024, Some(1_000)), 1_000);
        assert_eq!(last_seen(1_025, Some(1_000)), 1_025);
        // A clock that was set back.
        assert_eq!(last_seen(900, Some(1_000)), 900);
        assert_eq!(due(1_000, Some(1_000)), 25);
        assert_eq!(due(1_010, Some(1_000)), 15);
        assert_eq!(due(1_090, Some(1_000)), 5);
        assert_eq!(due(1_000, None), 5);
    }

    #[test]
    fn time_stands_still_while_the_api_takes_no_check_ins_and_until_all_have_caught_up() {
        let mut clock = KiloClock::default();
        assert_eq!(clock.handle_clock(1_000, None, true), 1_000);
        assert_eq!(clock.handle_clock(1_001, Some(1_000), true), 1_001);
        assert_eq!(clock.handle_clock(1_040, Some(1_000), true), 1_040);
        for now in [1_041, 1_060, 1_130, 1_300] {
            assert_eq!(clock.handle_clock(now, Some(1_000), true), 1_040);
        }
        // It answers again: the others' check-ins come one by one.
        assert_eq!(clock.handle_clock(1_301, Some(1_301), true), 1_040);
        assert_eq!(clock.handle_clock(1_335, Some(1_326), true), 1_040);
        assert_eq!(clock.handle_clock(1_336, Some(1_326), true), 1_336);
    }

    #[test]
    fn what_a_kilo_left_behind_long_ago_does_not_stop_the_clock() {
        let mut clock = KiloClock::default();
        assert_eq!(clock.handle_clock(9_000, Some(1_000), true), 9_000);
        assert_eq!(clock.handle_clock(9_001, Some(9_000), true), 9_001);
    }

    #[test]
    fn an_agent_that_starts_without_an_api_judges_the_cache_as_of_its_own_time() {
        let mut clock = KiloClock::default();
        assert_eq!(clock.handle_clock(9_000, Some(1_000), false), 1_000);
        assert_eq!(clock.handle_clock(9_000, None, false), 9_000);
    }

    #[test]
    fn without_a_kilo_the_clock_is_the_clock() {
        let mut clock = KiloClock::default();
        clock.handle_clock(1_000, Some(1_000), true);
        clock.handle_clock(1_100, Some(1_000), true);
        assert_eq!(clock.handle_clock(1_200, None, true), 1_200);
    }
}
