//! Whether one path carries packets, by echoes over it. Pure: the time is passed in.
//!
//! It has the shape of BFD's echo function (RFC 5880, 6.4; RFC 5881): echoes go out at an interval, and a path
//! is down when none came back for the detection time.
//!
//! ```text
//!                 an answer                   an answer says "draining"
//!   Unknown ─────────────────────────► Up ◄──────────────────────────────► Draining
//!                                      │ ▲        one without it              │
//!       no answer for the detection    │ │                                    │ the same
//!       time, or "not forwarding"      │ │ enough good answers                │
//!                                      ▼ │                                    │
//!                                     Down ◄──────────────────────────────────┘
//!                                      │ ▲
//!                  three good answers, │ │ no answer for the detection time,
//!                  and more are needed ▼ │ or "not forwarding"
//!                                   Returning ── enough good answers ──► Up
//! ```
//!
//! Unknown becomes Down as well where no answer comes at first; then one answer is enough.
//! A path that is down or returning is draining too as soon as an answer says so, and returns afterwards.
//!
//! - One lost echo moves nothing: while an echo is overdue, the next ones follow every [`FAST`]. So a path that
//!   loses one packet in ten needs some nine losses in a row to be down, and a dead one is found as soon.
//! - A sender that was held up itself blames no path: at least [`MISSED`] echoes must be overdue.
//! - Flap damping: a path that goes down within [`MEMORY`] after it came back needs twice as many good answers the
//!   next time, at most [`LONGEST`] worth of them. Meanwhile it is *returning*: better than a path that is down or
//!   never answered, and worse than one that is up.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::{Cause, PathState};

/// The least interval between the echoes of a healthy path.
pub const INTERVAL: Duration = Duration::from_millis(500);
/// The interval while an echo is overdue.
pub const FAST: Duration = Duration::from_millis(100);
/// The least time without an answer after which a path is down.
const DETECTION: Duration = Duration::from_millis(1_500);
/// What the detection time has beside a long interval: time for the echoes that follow a lost one.
const BESIDE_INTERVAL: Duration = Duration::from_millis(900);
/// The least time after which a path that never answered is down. A handshake and an echo take less.
const FIRST_ANSWER: Duration = Duration::from_secs(2);
/// Echoes that must be overdue before a path is down.
const MISSED: usize = 3;
/// Good answers in a row after which a path that was down is up again.
const GOOD: u32 = 3;
/// For how long a return is remembered.
const MEMORY: Duration = Duration::from_secs(60);
/// The longest that a flapping path must answer before it is up again.
const LONGEST: Duration = Duration::from_secs(30);
/// An answer is overdue after the round-trip time and four deviations (RFC 6298), between these bounds.
const OVERDUE: (Duration, Duration) = (Duration::from_millis(150), Duration::from_secs(1));
/// The same before the first answer.
const OVERDUE_AT_FIRST: Duration = Duration::from_millis(500);
/// An answer counts for so long after its echo.
const LATEST: Duration = Duration::from_secs(3);
/// The most echoes that are remembered: more than are sent in [`LATEST`].
const REMEMBERED: usize = 64;
/// Echoes over which the loss is counted.
const COUNTED: u32 = 100;

/// What an answer says of the leader that sent it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Statement {
    /// It is about to stop.
    pub draining: bool,
    /// It forwards for its region.
    pub forwards: bool,
}

/// One path, and the echoes over it.
#[derive(Clone, Debug)]
pub struct Path {
    interval: Duration,
    state: PathState,
    since: Instant,
    /// When the next echo is due if none is overdue.
    next: Instant,
    /// The last echoes, the oldest first.
    sent: VecDeque<Sent>,
    /// When an answer last came.
    heard: Option<Instant>,
    /// Since when answers come without a gap of the detection time.
    answering: Option<Instant>,
    /// When the latest of the answered echoes was sent.
    answered: Option<Instant>,
    /// The smoothed round-trip time and its deviation.
    rtt: Option<(Duration, Duration)>,
    loss: Loss,
    /// Good answers in a row while it is down, and how many are needed.
    good: u32,
    needed: u32,
    /// Whether it never was down, or had enough good answers since.
    proven: bool,
    /// When it last came back.
    returned: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    token: u64,
    at: Instant,
    answered: bool,
}

/// The results of the last echoes, one bit each.
#[derive(Clone, Copy, Debug, Default)]
struct Loss {
    lost: u128,
    count: u32,
}

impl Path {
    /// A path of which nothing is known. Its first echo is due at `first`.
    pub fn new(now: Instant, first: Instant, interval: Duration) -> Self {
        Self {
            interval,
            state: PathState::Unknown,
            since: now,
            next: first,
            sent: VecDeque::new(),
            heard: None,
            answering: None,
            answered: None,
            rtt: None,
            loss: Loss::default(),
            good: 0,
            needed: GOOD,
            proven: true,
            returned: None,
        }
    }

    /// Changes the interval, from the next echo on.
    pub fn set_interval(&mut self, interval: Duration) {
        self.interval = interval;
    }

    /// An echo was sent. `jitter` puts the next one off, so that many senders do not fall into step.
    pub fn handle_sent(&mut self, now: Instant, token: u64, jitter: Duration) {
        self.forget(now);
        if self.sent.len() == REMEMBERED {
            self.forget_one();
        }
        self.sent.push_back(Sent {
            token,
            at: now,
            answered: false,
        });
        self.next = now + self.interval + jitter;
    }

    /// An answer came. False if no recent echo had this token: it is ignored.
    ///
    /// A second answer to one echo says nothing of the path, but may say that the leader has begun to drain.
    pub fn handle_answer(&mut self, now: Instant, token: u64, says: Statement) -> bool {
        self.forget(now);
        let Some(echo) = self.sent.iter_mut().find(|echo| echo.token == token) else {
            return false;
        };
        let at = echo.at;
        let is_first = !std::mem::replace(&mut echo.answered, true);
        // Of answers that overtake each other the one to the latest echo counts.
        let is_latest = self.answered.is_none_or(|latest| at >= latest);
        if is_first {
            self.measure(now.saturating_duration_since(at));
            let heard = self.heard.replace(now);
            let gap = heard.map(|heard| now.saturating_duration_since(heard));
            if gap.is_none_or(|gap| gap >= self.detection()) {
                self.good = 0;
                self.answering = Some(now);
            }
            self.good += 1;
            self.answered = self.answered.max(Some(at));
        }
        if is_latest {
            self.take(now, says);
        }
        true
    }

    /// The time of [`Self::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.forget(now);
        if self.down_at().is_some_and(|at| at <= now) {
            self.enter(now, PathState::Down(Cause::Silent));
        }
    }

    /// When the next echo is due.
    pub fn poll_echo(&self) -> Instant {
        let (Some(first), Some(last)) = (self.missing().next(), self.sent.back()) else {
            return self.next;
        };
        if self.state.answers() {
            let soon = (first.at + self.overdue()).max(last.at + FAST);
            self.next.min(soon)
        } else {
            self.next
        }
    }

    /// When [`Self::handle_timeout`] may find the path down; `None` while an echo must be sent before.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.down_at()
    }

    /// What the echoes say.
    pub fn state(&self) -> PathState {
        self.state
    }

    /// Since when they say so.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// When an answer last came.
    pub fn heard(&self) -> Option<Instant> {
        self.heard
    }

    /// Since when answers have come without a gap of the detection time, up to [`Self::heard`].
    pub fn answering(&self) -> Option<Instant> {
        self.answering
    }

    /// The smoothed round-trip time.
    pub fn rtt(&self) -> Option<Duration> {
        self.rtt.map(|(smooth, _)| smooth)
    }

    /// How many of the last echoes stayed unanswered, in thousandths; `None` before the first results.
    pub fn loss(&self) -> Option<u32> {
        let lost = self.loss.lost.count_ones();
        (self.loss.count > 0).then(|| lost * 1_000 / self.loss.count)
    }

    /// How long a path may be silent before it is down: 1.5 s, or more where echoes are rare.
    pub fn detection(&self) -> Duration {
        DETECTION.max(self.interval + BESIDE_INTERVAL)
    }

    /// The echoes after the last answered one.
    fn missing(&self) -> impl Iterator<Item = &Sent> {
        let answered = self.answered;
        let echoes = self.sent.iter();
        echoes.filter(move |echo| !echo.answered && answered.is_none_or(|at| echo.at > at))
    }

    fn down_at(&self) -> Option<Instant> {
        let silent = match self.state {
            PathState::Down(Cause::Silent) => return None,
            PathState::Unknown => self.since + FIRST_ANSWER.max(self.detection()),
            PathState::Up
            | PathState::Returning
            | PathState::Draining
            | PathState::Down(Cause::NotForwarding) => self.heard? + self.detection(),
        };
        let missed = self.missing().nth(MISSED - 1)?;
        Some((missed.at + self.overdue()).max(silent))
    }

    /// The time after which an echo without an answer is overdue.
    pub fn overdue(&self) -> Duration {
        self.rtt.map_or(OVERDUE_AT_FIRST, |(smooth, deviation)| {
            (smooth + 4 * deviation).clamp(OVERDUE.0, OVERDUE.1)
        })
    }

    /// Takes what the latest answer says.
    fn take(&mut self, now: Instant, says: Statement) {
        if !says.forwards {
            self.enter(now, PathState::Down(Cause::NotForwarding));
            return;
        }
        if !self.proven && self.good >= self.needed {
            self.proven = true;
            self.returned = Some(now);
        }
        let state = match (says.draining, self.proven) {
            // Also while it returns: the leader waits for this node, and stops soon.
            (true, _) => PathState::Draining,
            (false, true) => PathState::Up,
            (false, false) if self.good >= GOOD || self.state == PathState::Draining => {
                PathState::Returning
            }
            (false, false) => return,
        };
        self.enter(now, state);
    }

    fn enter(&mut self, now: Instant, state: PathState) {
        if let PathState::Down(_) = state {
            self.good = 0;
            if matches!(self.state, PathState::Down(_)) {
                // Down for another reason.
                self.state = state;
                return;
            }
            let most = u32::try_from(LONGEST.as_millis() / self.interval.as_millis().max(1));
            let is_new =
                (self.state, state) == (PathState::Unknown, PathState::Down(Cause::Silent));
            let is_flapping = !self.proven
                || self
                    .returned
                    .is_some_and(|at| now.saturating_duration_since(at) < MEMORY);
            self.proven = false;
            self.needed = if is_flapping {
                (2 * self.needed).min(most.unwrap_or(GOOD)).max(GOOD)
            } else if is_new {
                // It never failed, and its first answer may just have to wait for a handshake.
                1
            } else {
                GOOD
            };
        }
        if self.state != state {
            self.state = state;
            self.since = now;
            if state == PathState::Draining {
                // The leader waits for the news that this node knows.
                self.next = now;
            }
        }
    }

    fn measure(&mut self, sample: Duration) {
        // RFC 6298, 2.
        self.rtt = Some(match self.rtt {
            None => (sample, sample / 2),
            Some((smooth, deviation)) => {
                let off = smooth.abs_diff(sample);
                ((7 * smooth + sample) / 8, (3 * deviation + off) / 4)
            }
        });
    }

    /// Forgets the echoes whose answers do not count any more.
    fn forget(&mut self, now: Instant) {
        let is_old = |echo: &Sent| now.saturating_duration_since(echo.at) >= LATEST;
        while self.sent.front().is_some_and(is_old) {
            self.forget_one();
        }
    }

    fn forget_one(&mut self) {
        if let Some(echo) = self.sent.pop_front() {
            self.loss.add(!echo.answered);
        }
    }
}

impl Loss {
    fn add(&mut self, lost: bool) {
        let kept = (1 << COUNTED) - 1;
        self.lost = (self.lost << 1 | u128::from(lost)) & kept;
        self.count = (self.count + 1).min(COUNTED);
    }
}

#[cfg(test)]
mod tests;
