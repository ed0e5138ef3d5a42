//! The MTU of one path to a leader of another region, measured with padded echoes. Pure: the time is passed in.
//!
//! This is DPLPMTUD (RFC 8899) with WireGuard as its packetization layer: an echo is padded inside the tunnel, its datagram
//! may not be fragmented, and the answer is small. So each direction is measured by its sender, and no ICMP error
//! is needed or believed. All sizes are bytes of the packet inside the tunnel.
//!
//! ```text
//!              the present size passes               no larger one is left
//!   Confirm ─────────────────────────────► Search ─────────────────────────► rest
//!    │ ▲ ▲                                  ▲   │ a size passes or not            │
//!    │ │ │      it is lost while the base   │   └───► the next size               │
//!    │ │ │      passes: down to the base    │                                     │
//!    │ └─┼──────────────────────────────────┘                                     │
//!    │   └──── once a second with traffic, every 15 s without, or time to raise ──┘
//!    ▼ the base is lost too
//!   Base ── it is lost while small echoes pass ──► down to the floor, Search
//! ```
//!
//! - A path begins with the configured size, not with the base as in the RFC: most paths carry it, and the first
//!   echo is a round trip away from the proof.
//! - **Loss of large packets only.** From the second try on a small echo goes with each large one. A try counts
//!   against a size only if the small echo came back and the large one did not. So an outage lowers nothing, and
//!   random loss must hit several large echoes in a row and none of the small ones; how many depends on the loss of the
//!   path.
//! - The search tries the largest size first, then that of Ethernet, then other common ones by bisection, then bytes.
//! - It is repeated after 30 seconds, then ever more rarely, at last every ten minutes (RFC 8899, 5.1.1:
//!   `PMTU_RAISE_TIMER`), and at once where the endpoint moves.

mod limits;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

pub use self::limits::{Limits, Sizes};

/// The MTU of Ethernet in bytes.
pub const ETHERNET: u32 = 1500;
/// Common sizes of IP packets, up to jumbo frames: tunnels (GRE, VXLAN, PPPoE, IPsec, WireGuard) and clouds.
const COMMON: [u32; 25] = [
    1280, 1320, 1350, 1380, 1400, 1420, 1430, 1440, 1450, 1460, 1472, 1480, 1492, 1500, 1504, 1600,
    2000, 4352, 8000, 8500, 8896, 8950, 9000, 9001, 9216,
];

/// The time between the tries of one size, after the first.
const FAST: Duration = Duration::from_millis(100);
/// How often the present size is confirmed while there is traffic, and how long nothing is done in an outage.
const CONFIRM: Duration = Duration::from_secs(1);
/// The same without traffic.
const CONFIRM_IDLE: Duration = Duration::from_secs(15);
/// When a larger size is searched again: at first, and at most.
const RAISE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(600));
/// After a search that an outage interrupted.
const RAISE_SOON: Duration = Duration::from_secs(5);
/// Tries that must fail before a larger size counts as too large. A mistake is corrected by the next search.
const SEARCHED: usize = 4;
/// Tries that must fail before the present size counts as too large, at least and at most.
const LOST: (usize, usize) = (6, 16);
/// The accepted chance, in a million, that random loss alone lowers a path at one confirmation.
const MISTAKE: u64 = 5;
/// Tries without a result after which a size is left alone.
const BLANK: usize = 4;
/// The most echoes of past attempts that are remembered.
const REMEMBERED: usize = 64;
/// How long an answer that is late still proves a size.
const LATEST: Duration = Duration::from_secs(3);

/// An echo to send now, and the small one beside it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ask {
    /// The bytes of the padded packet.
    pub size: u32,
    /// The same of the small echo; 0 is without padding.
    pub beside: Option<u32>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Purpose {
    Confirm,
    Base,
    Search,
}

/// The tries of one size.
#[derive(Clone, Debug)]
struct Attempt {
    purpose: Purpose,
    size: u32,
    /// The size of the small echoes.
    beside: u32,
    tries: Vec<Try>,
    next: Instant,
}

#[derive(Clone, Copy, Debug)]
struct Try {
    at: Instant,
    token: u64,
    /// The token of the small echo, and whether it was answered.
    beside: Option<(u64, bool)>,
}

/// The result of an attempt, besides success.
enum Verdict {
    Open,
    TooLarge,
    Unclear,
}

/// The MTU of one path, and the echoes that measure it.
#[derive(Clone, Debug)]
pub struct PathMtu {
    limits: Limits,
    /// The size that is used.
    mtu: u32,
    since: Instant,
    /// When it last passed.
    confirmed: Option<Instant>,
    /// The largest size that passed in this search.
    passed: u32,
    /// The least size that did not.
    failed: Option<u32>,
    attempt: Option<Attempt>,
    /// Echoes of attempts that are over: token, size, time.
    late: VecDeque<(u64, u32, Instant)>,
    /// When the present size is confirmed next.
    next: Instant,
    raise: Instant,
    raise_pause: Duration,
    is_alive: bool,
    is_busy: bool,
    /// The time of the last call.
    looked: Instant,
    /// After this time an echo without an answer counts as lost.
    overdue: Duration,
    /// Tries that must fail before the present size is lowered.
    needed: usize,
}

impl PathMtu {
    /// A path of which nothing is known. Nothing is sent until [`Self::set_alive`] says that small echoes pass.
    pub fn new(now: Instant, limits: Limits) -> Self {
        Self {
            limits,
            mtu: limits.start,
            since: now,
            confirmed: None,
            passed: limits.start,
            failed: None,
            attempt: None,
            late: VecDeque::new(),
            next: now,
            raise: now,
            raise_pause: RAISE.0,
            is_alive: false,
            is_busy: false,
            looked: now,
            overdue: CONFIRM,
            needed: LOST.0,
        }
    }

    /// The peer is reached in another way from now on: all begins again, with no more than the size so far.
    pub fn handle_move(&mut self, now: Instant, limits: Limits) {
        let start = limits.start.min(self.mtu.max(limits.base));
        let since = if start == self.mtu { self.since } else { now };
        *self = Self {
            mtu: start,
            passed: start,
            since,
            is_alive: self.is_alive,
            is_busy: self.is_busy,
            overdue: self.overdue,
            needed: self.needed,
            ..Self::new(now, limits)
        };
    }

    /// The same way allows other sizes.
    pub fn handle_limits(&mut self, now: Instant, limits: Limits) {
        if limits == self.limits {
            return;
        }
        self.limits = limits;
        self.end_attempt();
        self.failed = None;
        if self.mtu > limits.most {
            self.publish(now, limits.most);
        }
        self.passed = self.mtu;
        (self.next, self.raise) = (now, now);
    }

    /// Whether small echoes pass. While they do not, nothing is sent.
    pub fn set_alive(&mut self, now: Instant, is_alive: bool) {
        if std::mem::replace(&mut self.is_alive, is_alive) == is_alive {
            return;
        }
        self.end_attempt();
        self.next = now;
    }

    /// Whether there is traffic on the path.
    pub fn set_busy(&mut self, now: Instant, is_busy: bool) {
        if !std::mem::replace(&mut self.is_busy, is_busy) && is_busy {
            let due = self.confirmed.map_or(now, |at| at + CONFIRM);
            self.next = self.next.min(due.max(now));
        }
    }

    /// What small echoes say: after how long one without an answer is lost, and how many are, in thousandths.
    pub fn set_quality(&mut self, overdue: Duration, loss: Option<u32>) {
        self.overdue = overdue;
        let loss = u64::from(loss.unwrap_or(0).min(900));
        let (mut chance, mut needed) = (1_000_000, 0);
        while chance > MISTAKE && needed < LOST.1 {
            chance = chance * loss / 1_000;
            needed += 1;
        }
        self.needed = needed.max(LOST.0);
    }

    /// The size that is used now.
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// Since when it is used.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Whether it has ever passed.
    pub fn is_confirmed(&self) -> bool {
        self.confirmed.is_some()
    }

    /// What is possible on the path.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// When [`Self::handle_timeout`] is to be called; `None` while small echoes do not pass.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if !self.is_alive {
            return None;
        }
        let Some(attempt) = &self.attempt else {
            let raise = (self.mtu < self.limits.most).then_some(self.raise);
            return raise.into_iter().chain([self.next]).min();
        };
        let settled = attempt.tries.iter().map(|one| one.at + self.overdue);
        let settled = settled.filter(|at| *at > self.looked);
        let next = self.may_try(attempt).then_some(attempt.next);
        settled.chain(next).min()
    }

    /// The time of [`Self::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.looked = now;
        if !self.is_alive {
            return;
        }
        match self.judge(now) {
            None if self.mtu < self.limits.most && self.raise <= now => {
                self.failed = None;
                self.passed = self.mtu;
                self.begin_or_confirm(now);
            }
            None if self.next <= now => self.begin(now, Purpose::Confirm, self.mtu),
            None | Some(Verdict::Open) => {}
            Some(Verdict::TooLarge) => self.lower_or_search(now),
            Some(Verdict::Unclear) => self.give_up(now),
        }
    }

    /// What to send now. [`Self::handle_sent`] must follow.
    pub fn poll_ask(&self, now: Instant) -> Option<Ask> {
        let attempt = self.attempt.as_ref().filter(|_| self.is_alive)?;
        let is_due = attempt.next <= now && self.may_try(attempt);
        is_due.then(|| Ask {
            size: attempt.size,
            beside: (!attempt.tries.is_empty()).then_some(attempt.beside),
        })
    }

    /// It was sent, with these tokens.
    pub fn handle_sent(&mut self, now: Instant, token: u64, beside: Option<u64>) {
        if let Some(attempt) = &mut self.attempt {
            // Most sizes that are searched are too large, and most that are confirmed pass at once.
            let is_fast = beside.is_some() || attempt.purpose == Purpose::Search;
            attempt.next = now + if is_fast { FAST } else { self.overdue };
            attempt.tries.push(Try {
                at: now,
                token,
                beside: beside.map(|token| (token, false)),
            });
        }
    }

    /// An answer with this token came; false if it is to none of these echoes.
    pub fn handle_answer(&mut self, now: Instant, token: u64) -> bool {
        let attempt = self.attempt.as_mut();
        for one in attempt.into_iter().flat_map(|attempt| &mut attempt.tries) {
            if one.token == token {
                self.succeed(now);
                return true;
            }
            if let Some((beside, is_answered)) = &mut one.beside
                && *beside == token
            {
                *is_answered = true;
                return true;
            }
        }
        let late = self.late.iter().find(|(late, ..)| *late == token);
        let Some((_, size, at)) = late.copied() else {
            return false;
        };
        if now.saturating_duration_since(at) <= LATEST && self.failed.is_some_and(|too| size >= too)
        {
            // It was slow, not lost.
            self.failed = None;
            self.raise = now;
        }
        true
    }

    /// Whether another try may change the result.
    fn may_try(&self, attempt: &Attempt) -> bool {
        let is_blank = |one: &&Try| {
            let is_settled = one.at + self.overdue <= self.looked;
            is_settled && one.beside.is_some_and(|(_, answered)| !answered)
        };
        let blank = attempt.tries.iter().filter(is_blank).count();
        blank < BLANK && attempt.tries.len() - blank < self.needed(attempt.purpose)
    }

    fn needed(&self, purpose: Purpose) -> usize {
        match purpose {
            Purpose::Confirm | Purpose::Base => self.needed,
            Purpose::Search => SEARCHED,
        }
    }

    /// What the tries of the present attempt say; `None` if there is none.
    fn judge(&self, now: Instant) -> Option<Verdict> {
        let attempt = self.attempt.as_ref()?;
        let settled = attempt
            .tries
            .iter()
            .filter(|one| one.at + self.overdue <= now);
        let (mut counted, mut blank, mut beside) = (0, 0, false);
        for one in settled {
            match one.beside {
                None => counted += 1,
                Some((_, true)) => (counted, beside) = (counted + 1, true),
                Some((_, false)) => blank += 1,
            }
        }
        Some(if counted >= self.needed(attempt.purpose) && beside {
            Verdict::TooLarge
        } else if blank >= BLANK {
            Verdict::Unclear
        } else {
            Verdict::Open
        })
    }

    fn begin(&mut self, now: Instant, purpose: Purpose, size: u32) {
        self.end_attempt();
        let beside = match purpose {
            Purpose::Confirm if size > self.limits.base => self.limits.base,
            Purpose::Confirm | Purpose::Base => 0,
            Purpose::Search => self.passed,
        };
        self.attempt = Some(Attempt {
            purpose,
            size,
            beside,
            tries: Vec::new(),
            next: now,
        });
    }

    /// Ends the attempt; its echoes may still be answered.
    fn end_attempt(&mut self) {
        let Some(attempt) = self.attempt.take() else {
            return;
        };
        for one in attempt.tries {
            self.late.push_back((one.token, attempt.size, one.at));
            let beside = one.beside.map(|(token, _)| token);
            let beside = beside.map(|token| (token, attempt.beside, one.at));
            self.late.extend(beside);
        }
        let surplus = self.late.len().saturating_sub(REMEMBERED);
        self.late.drain(..surplus);
    }

    /// Searches a larger size, if the present one has passed just now, else confirms it first.
    fn begin_or_confirm(&mut self, now: Instant) {
        let is_fresh = |at: Instant| now.saturating_duration_since(at) < CONFIRM;
        if self.confirmed.is_some_and(is_fresh) {
            self.search(now);
        } else {
            self.begin(now, Purpose::Confirm, self.mtu);
        }
    }

    /// Tries the next size, or ends the search.
    fn search(&mut self, now: Instant) {
        if let Some(size) = self.candidate() {
            return self.begin(now, Purpose::Search, size);
        }
        self.end_attempt();
        self.use_passed(now);
        self.raise = now + self.raise_pause;
        self.raise_pause = (self.raise_pause * 2).min(RAISE.1);
        self.rest(now);
    }

    /// The size to try next: more than what passed, less than what did not.
    fn candidate(&self) -> Option<u32> {
        let most = self.limits.most;
        let passed = self.passed;
        if passed >= most {
            return None;
        }
        let Some(failed) = self.failed else {
            return Some(most);
        };
        let inside = |size: &u32| (passed + 1..failed).contains(size);
        let inner = |outer: u32| outer.saturating_sub(self.limits.overhead);
        if let Some(size) = Some(inner(ETHERNET)).filter(inside) {
            return Some(size);
        }
        let common = COMMON.map(inner);
        let common = common.into_iter().filter(inside).collect::<Vec<_>>();
        if let Some(size) = common.get(common.len() / 2) {
            return Some(*size);
        }
        let is_close = failed - passed <= (passed / 1_000).max(1);
        (!is_close).then_some(passed.midpoint(failed))
    }

    fn succeed(&mut self, now: Instant) {
        let Some(attempt) = &self.attempt else {
            return;
        };
        let (purpose, size) = (attempt.purpose, attempt.size);
        self.end_attempt();
        match purpose {
            Purpose::Confirm => {
                self.confirmed = Some(now);
                if self.mtu < self.limits.most && self.raise <= now {
                    (self.passed, self.failed) = (self.mtu, None);
                    self.search(now);
                } else {
                    self.rest(now);
                }
            }
            Purpose::Base => self.begin(now, Purpose::Confirm, self.mtu),
            Purpose::Search => {
                (self.passed, self.confirmed) = (size, Some(now));
                self.search(now);
            }
        }
    }

    /// The size of the attempt is too large.
    fn lower_or_search(&mut self, now: Instant) {
        let Some(attempt) = &self.attempt else {
            return;
        };
        let (purpose, size) = (attempt.purpose, attempt.size);
        self.end_attempt();
        let lower = match purpose {
            Purpose::Search => {
                self.failed = Some(size);
                return self.search(now);
            }
            Purpose::Confirm if size > self.limits.base => self.limits.base,
            Purpose::Confirm | Purpose::Base => self.limits.floor,
        };
        if lower >= self.mtu {
            return self.wait(now);
        }
        self.publish(now, lower);
        (self.passed, self.failed) = (lower, Some(size));
        // The small echoes have shown that the base passes, but nothing of the floor.
        self.confirmed = (lower == self.limits.base).then_some(now);
        self.search(now);
    }

    /// The tries of the attempt say nothing: the path has failed, or not even the base passes.
    fn give_up(&mut self, now: Instant) {
        let Some(attempt) = &self.attempt else {
            return;
        };
        let answered = |one: &Try| one.beside.is_some_and(|(_, answered)| answered);
        let none = !attempt.tries.iter().any(answered);
        let purpose = attempt.purpose;
        self.end_attempt();
        match purpose {
            Purpose::Confirm if none && self.mtu > self.limits.base => {
                self.begin(now, Purpose::Base, self.limits.base);
            }
            Purpose::Confirm | Purpose::Base => self.wait(now),
            Purpose::Search => {
                self.use_passed(now);
                self.next = now;
                self.raise = now + RAISE_SOON;
            }
        }
    }

    fn rest(&mut self, now: Instant) {
        let pause = if self.is_busy { CONFIRM } else { CONFIRM_IDLE };
        self.next = now + pause;
    }

    fn wait(&mut self, now: Instant) {
        self.next = now + CONFIRM;
        self.raise = self.raise.max(self.next);
    }

    fn use_passed(&mut self, now: Instant) {
        if self.passed > self.mtu {
            self.publish(now, self.passed);
        }
    }

    fn publish(&mut self, now: Instant, mtu: u32) {
        self.raise_pause = RAISE.0;
        (self.mtu, self.since) = (mtu, now);
    }
}
