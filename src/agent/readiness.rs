//! When a new agent is ready: it has done all it can, and what others do in answer has come in. Pure:
//! the time is passed in.
//!
//! Once an agent has been ready only what it cannot do makes it unready again.

use std::time::{Duration, Instant};

/// A new agent is ready when nothing had to be changed for so long: what others publish in answer to
/// it has come in by then.
const SETTLED: Duration = Duration::from_secs(1);
/// How long a new agent waits for its peers' first answers before it is ready without them.
const FIRST_HANDSHAKES: Duration = Duration::from_secs(10);

/// How far a new agent has come.
#[derive(Debug)]
pub struct Readiness {
    begun: Instant,
    /// When something last changed, or was heard that the next pass has to work off.
    unrest: Instant,
    reached: bool,
}

impl Readiness {
    /// Nothing is done yet.
    pub fn new(now: Instant) -> Self {
        Self {
            begun: now,
            unrest: now,
            reached: false,
        }
    }

    /// A pass had to change something, or something is known that it will have to.
    pub fn handle_unrest(&mut self, now: Instant) {
        self.unrest = now;
    }

    /// Nothing keeps the agent from being ready except what [`Self::poll_wait`] returns.
    pub fn handle_no_problems(&mut self, now: Instant, unheard: usize) {
        self.reached |= self.poll_wait(now, unheard).is_none();
    }

    /// Whether the agent has been ready.
    pub fn is_reached(&self) -> bool {
        self.reached
    }

    /// What a new agent still waits for, although it has done all it can; `unheard` peers have an
    /// endpoint and never answered.
    pub fn poll_wait(&self, now: Instant, unheard: usize) -> Option<String> {
        if self.reached {
            None
        } else if now.saturating_duration_since(self.unrest) < SETTLED {
            Some("waiting for the mesh to settle".to_owned())
        } else {
            let waits = now.saturating_duration_since(self.begun) < FIRST_HANDSHAKES;
            (unheard > 0 && waits)
                .then(|| format!("waiting for the first handshake with {unheard} peers"))
        }
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
    fn an_agent_is_ready_when_nothing_happened_for_a_second() {
        let t0 = start();
        let mut readiness = Readiness::new(t0);
        readiness.handle_unrest(t0 + Duration::from_millis(500));
        assert!(readiness.poll_wait(t0 + SETTLED, 0).is_some());
        let later = t0 + Duration::from_millis(1_500);
        readiness.handle_no_problems(later, 0);
        assert_eq!(readiness.poll_wait(later, 0), None);
        // Later changes are everyday life.
        readiness.handle_unrest(later);
        assert_eq!(readiness.poll_wait(later, 3), None);
    }

    #[test]
    fn what_was_just_heard_is_worked_off_first() {
        let t0 = start();
        let mut readiness = Readiness::new(t0);
        let heard = t0 + Duration::from_secs(5);
        readiness.handle_no_problems(heard, 1);
        readiness.handle_unrest(heard);
        readiness.handle_no_problems(heard, 0);
        assert!(readiness.poll_wait(heard, 0).is_some());
        assert_eq!(readiness.poll_wait(heard + SETTLED, 0), None);
    }

    #[test]
    fn peers_that_never_answer_are_waited_for_ten_seconds() {
        let t0 = start();
        let readiness = Readiness::new(t0);
        let waits = |seconds| readiness.poll_wait(t0 + Duration::from_secs(seconds), 2);
        assert_eq!(
            waits(9).as_deref(),
            Some("waiting for the first handshake with 2 peers")
        );
        assert_eq!(waits(10), None);
    }
}
