//! When to look at everything again. Pure: time is passed in.
//!
//! Every trigger (a Node changed, the kernel reported a change, a peer's endpoint moved) leads to the
//! same full pass; this only decides when the next one starts.

use std::time::{Duration, Instant};

use crate::reconciler::core::Applied;

/// How long to wait for more of the same: a change of the cluster or of the kernel seldom comes
/// alone.
const QUIET: Duration = Duration::from_millis(50);
/// How long a trigger may be put off by later ones.
const PATIENCE: Duration = Duration::from_millis(200);
/// Passes in a row that may change something at full speed. More of them mean that something else on
/// this node undoes what the agent does.
const BURST: u32 = 20;
/// Pause between passes of such a fight: it is neither given up, nor is a core burnt on it.
const FIGHT: Duration = Duration::from_millis(500);

/// How a pass ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// All was as it should be.
    Unchanged,
    /// All is as it should be now.
    Changed,
    /// Something could not be done.
    Failed,
}

impl From<&Applied> for Outcome {
    fn from(applied: &Applied) -> Self {
        if applied.failed {
            Self::Failed
        } else if applied.made.is_empty() {
            Self::Unchanged
        } else {
            Self::Changed
        }
    }
}

/// The time of the next pass.
#[derive(Clone, Debug)]
pub struct Schedule {
    resync: Duration,
    due: Instant,
    /// When the first trigger since the last pass came.
    first: Option<Instant>,
    /// No pass begins earlier.
    not_before: Instant,
    /// Passes in a row that changed something.
    changes: u32,
}

impl Schedule {
    /// The first pass is due at once.
    pub fn new(now: Instant, resync: Duration) -> Self {
        Self {
            resync,
            due: now,
            first: None,
            not_before: now,
            changes: 0,
        }
    }

    /// Something may have changed.
    pub fn handle_trigger(&mut self, now: Instant) {
        let first = *self.first.get_or_insert(now);
        let wanted = (now + QUIET).min(first + PATIENCE);
        // A trigger may put a debounced pass off a little, never a resync.
        let debounced = self.due <= first + PATIENCE;
        self.due = if debounced {
            wanted
        } else {
            self.due.min(wanted)
        };
        self.due = self.due.max(self.not_before);
    }

    /// Something changed whose changes are gathered already: it is looked at next.
    pub fn handle_news(&mut self, now: Instant) {
        self.due = self.due.min(now).max(self.not_before);
    }

    /// A pass is due at that time at the latest.
    pub fn handle_deadline(&mut self, at: Instant) {
        self.due = self.due.min(at).max(self.not_before);
    }

    /// A pass begins.
    pub fn handle_start(&mut self, now: Instant) {
        self.first = None;
        self.due = now + self.resync;
    }

    /// A pass has ended. What it could not do is tried again by the reconciler.
    pub fn handle_outcome(&mut self, now: Instant, outcome: Outcome) {
        self.changes = match outcome {
            Outcome::Unchanged => 0,
            // What was done before it failed may itself be reported as a trigger.
            Outcome::Changed | Outcome::Failed => self.changes.saturating_add(1),
        };
        self.not_before = if self.changes > BURST {
            now + FIGHT
        } else {
            now
        };
        self.due = self.due.max(self.not_before);
    }

    /// When the next pass is due.
    pub fn poll_due(&self) -> Instant {
        self.due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESYNC: Duration = Duration::from_secs(30);

    #[expect(clippy::disallowed_methods, reason = "an Instant has no other origin")]
    fn start() -> Instant {
        Instant::now()
    }

    fn after(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn an_idle_node_is_looked_at_every_resync_period() {
        let t0 = start();
        let mut schedule = Schedule::new(t0, RESYNC);
        assert_eq!(schedule.poll_due(), t0);

        schedule.handle_start(t0);
        schedule.handle_outcome(t0, Outcome::Unchanged);
        assert_eq!(schedule.poll_due(), t0 + RESYNC);
    }

    #[test]
    fn a_deadline_is_kept_though_a_resync_is_far() {
        let t0 = start();
        let mut schedule = Schedule::new(t0, RESYNC);
        schedule.handle_start(t0);
        schedule.handle_outcome(t0, Outcome::Unchanged);
        schedule.handle_deadline(t0 + after(25_000));
        assert_eq!(schedule.poll_due(), t0 + after(25_000));
        schedule.handle_deadline(t0 + after(60_000));
        assert_eq!(schedule.poll_due(), t0 + after(25_000));
    }

    #[test]
    fn triggers_that_come_together_lead_to_one_pass_soon() {
        let t0 = start();
        let mut schedule = Schedule::new(t0, RESYNC);
        schedule.handle_start(t0);
        schedule.handle_outcome(t0, Outcome::Unchanged);

        schedule.handle_trigger(t0 + after(1000));
        assert_eq!(schedule.poll_due(), t0 + after(1050));
        schedule.handle_trigger(t0 + after(1030));
        assert_eq!(schedule.poll_due(), t0 + after(1080));
        for ms in [1070, 1110, 1150, 1190] {
            schedule.handle_trigger(t0 + after(ms));
        }
        assert_eq!(schedule.poll_due(), t0 + after(1200));
    }

    #[test]
    fn a_trigger_just_before_a_resync_does_not_put_it_off() {
        let t0 = start();
        let mut schedule = Schedule::new(t0, RESYNC);
        schedule.handle_start(t0);
        schedule.handle_outcome(t0, Outcome::Unchanged);
        schedule.handle_trigger(t0 + RESYNC - after(300));
        assert!(schedule.poll_due() <= t0 + RESYNC);
    }

    #[test]
    fn a_fight_with_another_program_costs_two_passes_a_second_at_most() {
        let t0 = start();
        let mut schedule = Schedule::new(t0, RESYNC);
        let (mut now, mut passes) = (t0, 0);
        while now < t0 + Duration::from_secs(60) {
            now = schedule.poll_due().max(now);
            schedule.handle_start(now);
            schedule.handle_outcome(now, Outcome::Changed);
            passes += 1;
            // Undone at once, each time.
            schedule.handle_trigger(now + after(1));
        }
        assert!(passes <= BURST + 130, "{passes} passes in a minute");
        // And a repair is still made within the second.
        assert!(schedule.poll_due() - now <= Duration::from_secs(1));
    }
}
