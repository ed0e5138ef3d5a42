//! When a peer is to be sent a handshake or a keepalive (WireGuard paper 6).
//!
//! The packet threads only note what happened, with a few relaxed stores per batch; the handshake
//! thread asks what is due. The times are the kernel's: a peer that is sent data but does not answer
//! is shaken hands with after 15 s, one that sends data and hears nothing gets a keepalive after
//! 10 s, an initiation is repeated every 5 s for 90 s. Unlike boringtun's timers these never reach a
//! state from which nothing leads out: a persistent keepalive always begins again.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::clock::Time;
use super::protocol::{KEEPALIVE_TIMEOUT, REJECT_AFTER_TIME, REKEY_ATTEMPT_TIME, REKEY_TIMEOUT};

/// An initiation that the kernel refused to send is repeated after this time: nobody was bothered, and
/// what is in its way, a route or a firewall, may be gone the next moment.
pub(super) const REFUSED_TIMEOUT: Duration = Duration::from_millis(500);

/// Added at random, so that two peers that lost each other do not go on colliding.
const JITTER_MS: u64 = 334;
/// What one repeated initiation counts, and one that was refused: by the time it waited.
const ATTEMPT: u32 = (REKEY_TIMEOUT.as_millis() / REFUSED_TIMEOUT.as_millis()) as u32;
const REFUSED_ATTEMPT: u32 = 1;
const ATTEMPTS: u32 = (REKEY_ATTEMPT_TIME.as_secs() / REKEY_TIMEOUT.as_secs()) as u32 * ATTEMPT;

/// The timers of one peer.
#[derive(Debug, Default)]
pub(super) struct Timers {
    /// Nothing came back for what was sent.
    unanswered: Deadline,
    /// When the first data or initiation was sent after something last came back.
    waiting_since: Deadline,
    keepalive: Deadline,
    /// Data came while the keepalive was armed already.
    another_keepalive: AtomicBool,
    persistent: Deadline,
    interval: AtomicU16,
    retransmit: Deadline,
    /// The attempts so far, see [`ATTEMPT`].
    attempts: AtomicU32,
    /// The kernel refused to send the last one.
    refused: AtomicBool,
    /// Old keys are forgotten.
    wipe: Deadline,
    /// A handshake was begun on receipt with the current session.
    rekeyed_on_receive: AtomicBool,
}

/// What is to be done for a peer now, and when to ask again.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Due {
    /// Send an initiation.
    pub handshake: Option<Attempt>,
    /// Send a keepalive.
    pub keepalive: bool,
    /// Nobody answers: drop what waits for a session.
    pub give_up: bool,
    /// Forget all sessions and handshakes.
    pub wipe: bool,
    /// When something may be due next.
    pub next: Option<Time>,
}

/// Why an initiation is sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Attempt {
    /// Something new asks for it: the count of attempts begins anew.
    First,
    /// The one before was not answered.
    Repeated,
}

/// A point in time, or none, that any thread may set.
#[derive(Debug, Default)]
struct Deadline(AtomicU64);

impl Deadline {
    fn arm(&self, at: Time) {
        self.0.store(at.as_nanos(), Ordering::Relaxed);
    }

    fn arm_if_idle(&self, at: impl FnOnce() -> Time) -> bool {
        let idle = !self.is_armed();
        if idle {
            self.arm(at());
        }
        idle
    }

    fn clear(&self) {
        // Mostly it is clear already, and a store would take the cache line from the other thread.
        if self.is_armed() {
            self.0.store(0, Ordering::Relaxed);
        }
    }

    fn is_armed(&self) -> bool {
        self.0.load(Ordering::Relaxed) != 0
    }

    fn at(&self) -> Option<Time> {
        Time::from_nanos(self.0.load(Ordering::Relaxed))
    }

    /// Whether it has passed; then it is cleared.
    fn take(&self, now: Time) -> bool {
        let nanos = self.0.load(Ordering::Relaxed);
        nanos != 0
            && nanos <= now.as_nanos()
            // A thread that moved it in the meantime wins.
            && self.0.compare_exchange(nanos, 0, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

fn jitter() -> Duration {
    Duration::from_millis(rand::random_range(0..JITTER_MS))
}

impl Timers {
    /// Sets the persistent keepalive, in seconds; 0 is off. True if there was none before.
    pub(super) fn set_persistent_keepalive(&self, seconds: u16, now: Time) -> bool {
        let before = self.interval.swap(seconds, Ordering::Relaxed);
        if before == seconds {
            // One that is due is not put off: peers are set anew whenever the mesh changes, and a NAT
            // does not wait.
            return false;
        }
        self.traversed(now);
        if seconds == 0 {
            self.persistent.clear();
        }
        before == 0 && seconds != 0
    }

    /// The persistent keepalive in seconds, 0 for none.
    pub(super) fn persistent_keepalive(&self) -> u16 {
        self.interval.load(Ordering::Relaxed)
    }

    fn traversed(&self, now: Time) {
        let interval = self.interval.load(Ordering::Relaxed);
        if interval != 0 {
            self.persistent
                .arm(now + Duration::from_secs(interval.into()));
        }
    }

    /// Authenticated messages were sent, among them data or not.
    pub(super) fn sent(&self, data: bool, now: Time) {
        self.traversed(now);
        self.keepalive.clear();
        if data {
            self.waiting_since.arm_if_idle(|| now);
            self.unanswered
                .arm_if_idle(|| now + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT + jitter());
        }
    }

    /// Authenticated messages were received, among them data or not.
    pub(super) fn received(&self, data: bool, now: Time) {
        self.traversed(now);
        self.unanswered.clear();
        self.waiting_since.clear();
        if data && !self.keepalive.arm_if_idle(|| now + KEEPALIVE_TIMEOUT) {
            self.another_keepalive.store(true, Ordering::Relaxed);
        }
    }

    /// An initiation was sent.
    pub(super) fn initiated(&self, attempt: Attempt, now: Time) {
        if attempt == Attempt::First {
            self.attempts.store(0, Ordering::Relaxed);
        }
        self.refused.store(false, Ordering::Relaxed);
        self.waiting_since.arm_if_idle(|| now);
        self.retransmit.arm(now + REKEY_TIMEOUT + jitter());
    }

    /// The initiation was refused by the kernel and never left.
    pub(super) fn initiation_refused(&self, now: Time) {
        self.refused.store(true, Ordering::Relaxed);
        self.retransmit.arm(now + REFUSED_TIMEOUT);
    }

    /// A cookie came for the initiation under way: it is repeated with it at once, for the first
    /// attempts, instead of after the timeout.
    pub(super) fn cookie_received(&self, now: Time) {
        if self.retransmit.is_armed() && self.attempts.load(Ordering::Relaxed) < 3 * ATTEMPT {
            self.retransmit.arm(now + jitter() / 2);
        }
    }

    /// A handshake ended with a session.
    pub(super) fn session_derived(&self, now: Time) {
        self.wipe.arm(now + 3 * REJECT_AFTER_TIME);
        self.rekeyed_on_receive.store(false, Ordering::Relaxed);
    }

    /// A session is in use by both sides.
    pub(super) fn handshake_completed(&self) {
        self.retransmit.clear();
        self.attempts.store(0, Ordering::Relaxed);
    }

    /// When the first data or initiation was sent after something last came back from the peer; `None` where
    /// nothing is awaited.
    pub(super) fn waiting_since(&self) -> Option<Time> {
        self.waiting_since.at()
    }

    /// Whether the initiation on receipt is still to be sent for the current session.
    pub(super) fn rekey_on_receive(&self) -> bool {
        !self.rekeyed_on_receive.swap(true, Ordering::Relaxed)
    }

    /// What is due.
    pub(super) fn poll(&self, now: Time) -> Due {
        let mut due = Due::default();
        if self.retransmit.take(now) {
            let waited = if self.refused.swap(false, Ordering::Relaxed) {
                REFUSED_ATTEMPT
            } else {
                ATTEMPT
            };
            if self.attempts.fetch_add(waited, Ordering::Relaxed) >= ATTEMPTS {
                due.give_up = true;
                self.keepalive.clear();
                self.wipe.arm_if_idle(|| now + 3 * REJECT_AFTER_TIME);
            } else {
                due.handshake = Some(Attempt::Repeated);
            }
        }
        if self.unanswered.take(now) {
            due.handshake.get_or_insert(Attempt::First);
        }
        if self.keepalive.take(now) {
            due.keepalive = true;
            if self.another_keepalive.swap(false, Ordering::Relaxed) {
                self.keepalive.arm(now + KEEPALIVE_TIMEOUT);
            }
        }
        if self.persistent.take(now) {
            due.keepalive = true;
            self.traversed(now);
        }
        due.wipe = self.wipe.take(now);
        due.next = [
            &self.unanswered,
            &self.keepalive,
            &self.persistent,
            &self.retransmit,
            &self.wipe,
        ]
        .into_iter()
        .filter_map(Deadline::at)
        .min();
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(millis: u64) -> Time {
        Time::from_duration(Duration::from_secs(1000) + Duration::from_millis(millis))
    }

    fn nothing(timers: &Timers, millis: u64) -> bool {
        let due = timers.poll(time(millis));
        due == Due {
            next: due.next,
            ..Due::default()
        }
    }

    #[test]
    fn data_without_an_answer_leads_to_a_handshake_after_15_seconds() {
        let timers = Timers::default();
        timers.sent(true, time(0));
        timers.sent(true, time(14_000));
        assert!(nothing(&timers, 14_999));
        assert_eq!(timers.poll(time(15_334)).handshake, Some(Attempt::First));
        assert!(nothing(&timers, 40_000));
    }

    #[test]
    fn what_is_awaited_is_told_since_the_first_of_what_was_sent() {
        let timers = Timers::default();
        timers.sent(false, time(0));
        assert_eq!(timers.waiting_since(), None, "a keepalive is not answered");
        timers.sent(true, time(1000));
        timers.initiated(Attempt::First, time(3000));
        assert_eq!(timers.waiting_since(), Some(time(1000)));
        timers.received(false, time(4000));
        assert_eq!(timers.waiting_since(), None);
        timers.initiated(Attempt::First, time(5000));
        assert_eq!(timers.waiting_since(), Some(time(5000)));
    }

    #[test]
    fn an_answer_of_any_kind_stops_the_wait() {
        let timers = Timers::default();
        timers.sent(true, time(0));
        timers.received(false, time(1000));
        assert!(nothing(&timers, 60_000));
    }

    #[test]
    fn data_that_is_not_answered_gets_a_keepalive_after_10_seconds_and_one_more_if_there_was_more()
    {
        let timers = Timers::default();
        timers.received(true, time(0));
        timers.received(true, time(5000));
        assert!(nothing(&timers, 9_999));
        assert!(timers.poll(time(10_000)).keepalive);
        assert!(timers.poll(time(20_000)).keepalive);
        assert!(nothing(&timers, 60_000));
    }

    #[test]
    fn sending_anything_saves_the_keepalive() {
        let timers = Timers::default();
        timers.received(true, time(0));
        timers.sent(false, time(5000));
        assert!(nothing(&timers, 60_000));
    }

    #[test]
    fn an_initiation_is_repeated_for_90_seconds_and_then_given_up() {
        let timers = Timers::default();
        timers.initiated(Attempt::First, time(0));
        let (mut now, mut sent) = (0, 1);
        loop {
            now += 5_334;
            let due = timers.poll(time(now));
            if due.give_up {
                break;
            }
            assert_eq!(due.handshake, Some(Attempt::Repeated));
            sent += 1;
            timers.initiated(Attempt::Repeated, time(now));
        }
        assert_eq!(sent, 19);
        assert!((90_000..110_000).contains(&now), "{now}");
        assert!(nothing(&timers, now + 400_000));
        assert!(timers.poll(time(now + 540_000)).wipe);
    }

    #[test]
    fn an_initiation_that_was_refused_is_repeated_each_half_second_and_given_up_as_late() {
        let timers = Timers::default();
        let (mut now, mut attempt) = (0, Attempt::First);
        loop {
            timers.initiated(attempt, time(now));
            timers.initiation_refused(time(now));
            assert!(nothing(&timers, now + 499));
            now += 500;
            let due = timers.poll(time(now));
            if due.give_up {
                break;
            }
            attempt = due.handshake.unwrap();
            assert_eq!(attempt, Attempt::Repeated);
        }
        assert!((90_000..=91_000).contains(&now), "{now}");
        assert!(nothing(&timers, now + 400_000));
    }

    /// boringtun's first gap: after 90 s without an answer it never began again.
    #[test]
    fn a_peer_with_persistent_keepalive_comes_back_by_itself_however_long_nobody_answered() {
        let timers = Timers::default();
        timers.set_persistent_keepalive(25, time(0));
        let mut keepalives = 0;
        for second in 0..3600 {
            let due = timers.poll(time(second * 1000));
            keepalives += u32::from(due.keepalive);
        }
        assert!((140..=145).contains(&keepalives), "{keepalives}");
    }

    #[test]
    fn persistent_keepalives_count_from_the_last_message_either_way() {
        let timers = Timers::default();
        timers.set_persistent_keepalive(25, time(0));
        timers.received(false, time(20_000));
        assert!(nothing(&timers, 44_000));
        assert!(timers.poll(time(45_000)).keepalive);
        timers.set_persistent_keepalive(0, time(45_000));
        assert!(nothing(&timers, 200_000));
    }

    #[test]
    fn setting_the_same_keepalive_again_does_not_put_it_off() {
        let timers = Timers::default();
        assert!(timers.set_persistent_keepalive(25, time(0)));
        assert!(!timers.set_persistent_keepalive(25, time(20_000)));
        assert!(timers.poll(time(25_000)).keepalive);
    }

    #[test]
    fn keys_are_forgotten_540_seconds_after_the_last_session() {
        let timers = Timers::default();
        timers.session_derived(time(0));
        timers.session_derived(time(100_000));
        assert!(nothing(&timers, 639_999));
        assert!(timers.poll(time(640_000)).wipe);
    }

    #[test]
    fn the_next_deadline_is_the_earliest() {
        let timers = Timers::default();
        assert_eq!(timers.poll(time(0)).next, None);
        timers.session_derived(time(0));
        timers.received(true, time(0));
        assert_eq!(timers.poll(time(1)).next, Some(time(10_000)));
    }
}
