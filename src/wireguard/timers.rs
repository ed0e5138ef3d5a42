//! When handshakes and keepalives are due for a peer (WireGuard paper, 6).
//!
//! The packet threads only record what happened, with a few relaxed stores per batch. The handshake thread
//! polls what is due. The times are the kernel's: data without an answer leads to a handshake after 15 s,
//! received data without a reply to a keepalive after 10 s, and an initiation is repeated every 5 s for
//! 90 s. Unlike boringtun's, these timers have no dead end: a persistent keepalive always begins again.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::clock::Time;
use super::protocol::{KEEPALIVE_TIMEOUT, REJECT_AFTER_TIME, REKEY_ATTEMPT_TIME, REKEY_TIMEOUT};

/// An initiation that the kernel refused to send is repeated after this time. It cost no network traffic,
/// and the obstacle, a route or a firewall, may not last.
pub(super) const REFUSED_TIMEOUT: Duration = Duration::from_millis(500);

/// A peer is silent when nothing came back for this time: more than any round trip, and less than the 15
/// seconds after which a handshake begins.
pub const SILENT_AFTER: Duration = Duration::from_secs(5);

/// A random time of up to this is added, so that the handshakes of two peers do not collide again and again.
const JITTER_MS: u64 = 334;
/// Repeated and refused initiations are counted in units of the time that they waited.
const ATTEMPT: u32 = (REKEY_TIMEOUT.as_millis() / REFUSED_TIMEOUT.as_millis()) as u32;
const REFUSED_ATTEMPT: u32 = 1;
const ATTEMPTS: u32 = (REKEY_ATTEMPT_TIME.as_secs() / REKEY_TIMEOUT.as_secs()) as u32 * ATTEMPT;

/// The timers of one peer.
#[derive(Debug, Default)]
pub(super) struct Timers {
    /// A handshake is due, since no answer came to data.
    unanswered: Deadline,
    /// When data or an initiation was first sent after the last message of the peer.
    waiting_since: Deadline,
    /// Whether [`Due::silent`] was reported since then.
    silent_reported: AtomicBool,
    /// The last handshake was [`REJECT_AFTER_TIME`] ago.
    expiry: Deadline,
    keepalive: Deadline,
    /// Data was received while the keepalive was armed.
    another_keepalive: AtomicBool,
    persistent: Deadline,
    interval: AtomicU16,
    retransmit: Deadline,
    /// The attempts so far, see [`ATTEMPT`].
    attempts: AtomicU32,
    /// The kernel refused to send the last initiation.
    refused: AtomicBool,
    /// All keys are forgotten.
    wipe: Deadline,
    /// A handshake was begun on receipt with the current session.
    rekeyed_on_receive: AtomicBool,
}

/// What is due for a peer now, and when to poll again.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Due {
    /// Send an initiation.
    pub handshake: Option<Attempt>,
    /// Send a keepalive.
    pub keepalive: bool,
    /// The peer does not answer: drop the packets that wait for a session.
    pub give_up: bool,
    /// Forget all sessions and handshakes.
    pub wipe: bool,
    /// No message came for [`SILENT_AFTER`] although one was awaited.
    pub silent: bool,
    /// The last session has just ended.
    pub expired: bool,
    /// When something may be due next.
    pub next: Option<Time>,
}

/// Why an initiation is sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Attempt {
    /// The first of a series.
    First,
    /// The one before got no answer.
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
        // Usually it is clear already, and a store would take the cache line from the other thread.
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
            // A thread that has moved it meanwhile wins.
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
            // Does not delay a keepalive that is due: peers are set at each change of the mesh, and the
            // mapping of a NAT would end meanwhile.
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

    /// Authenticated messages were sent, with `data` or without.
    pub(super) fn sent(&self, data: bool, now: Time) {
        self.traversed(now);
        self.keepalive.clear();
        if data {
            self.waiting_since.arm_if_idle(|| now);
            self.unanswered
                .arm_if_idle(|| now + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT + jitter());
        }
    }

    /// Authenticated messages were received, with `data` or without. True if silence had been reported.
    pub(super) fn received(&self, data: bool, now: Time) -> bool {
        self.traversed(now);
        self.unanswered.clear();
        let mut was_silent = false;
        if self.waiting_since.is_armed() {
            self.waiting_since.clear();
            was_silent = self.silent_reported.load(Ordering::Relaxed)
                && self.silent_reported.swap(false, Ordering::Relaxed);
        }
        if data && !self.keepalive.arm_if_idle(|| now + KEEPALIVE_TIMEOUT) {
            self.another_keepalive.store(true, Ordering::Relaxed);
        }
        was_silent
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

    /// The kernel refused to send the initiation.
    pub(super) fn initiation_refused(&self, now: Time) {
        self.refused.store(true, Ordering::Relaxed);
        self.retransmit.arm(now + REFUSED_TIMEOUT);
    }

    /// A cookie was received for the initiation. In the first attempts the initiation is repeated with it
    /// at once, not after the timeout.
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
    pub(super) fn handshake_completed(&self, now: Time) {
        self.expiry.arm(now + REJECT_AFTER_TIME);
        self.retransmit.clear();
        self.attempts.store(0, Ordering::Relaxed);
    }

    /// When data or an initiation was first sent after the last message of the peer; `None` if nothing is
    /// awaited.
    pub(super) fn waiting_since(&self) -> Option<Time> {
        self.waiting_since.at()
    }

    /// Whether the handshake on receipt has not begun yet for the current session.
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
        due.expired = self.expiry.take(now);
        let silence = self.silence();
        due.silent = silence.is_some_and(|at| at <= now);
        if due.silent {
            self.silent_reported.store(true, Ordering::Relaxed);
        }
        let deadlines = [
            &self.unanswered,
            &self.keepalive,
            &self.persistent,
            &self.retransmit,
            &self.wipe,
            &self.expiry,
        ];
        due.next = deadlines
            .into_iter()
            .filter_map(Deadline::at)
            .chain(silence.filter(|_| !due.silent))
            .min();
        due
    }

    /// When silence is to be reported; `None` if nothing is awaited or it was reported.
    fn silence(&self) -> Option<Time> {
        let since = self.waiting_since()?;
        let reported = self.silent_reported.load(Ordering::Relaxed);
        (!reported).then(|| since + SILENT_AFTER)
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
        // Silence and expiry are only reported.
        due == Due {
            silent: due.silent,
            expired: due.expired,
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
    fn an_answer_is_awaited_since_the_first_data_or_initiation() {
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
    fn a_message_of_any_kind_is_an_answer() {
        let timers = Timers::default();
        timers.sent(true, time(0));
        timers.received(false, time(1000));
        assert!(nothing(&timers, 60_000));
    }

    #[test]
    fn received_data_without_a_reply_leads_to_a_keepalive_after_10_seconds_and_more_data_to_another()
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
    fn no_keepalive_is_due_after_sending_anything() {
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
    fn a_refused_initiation_is_repeated_each_half_second_and_given_up_after_90_seconds() {
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

    /// boringtun stopped for ever after 90 s without an answer.
    #[test]
    fn persistent_keepalives_never_stop_without_an_answer() {
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
    fn setting_the_same_keepalive_again_does_not_delay_it() {
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
    fn silence_is_reported_once_after_5_seconds_and_again_after_an_answer() {
        let timers = Timers::default();
        timers.sent(true, time(0));
        timers.sent(true, time(3000));
        assert_eq!(timers.poll(time(0)).next, Some(time(5000)));
        assert!(!timers.poll(time(4999)).silent);
        assert!(timers.poll(time(5000)).silent);
        assert!(!timers.poll(time(6000)).silent);
        assert!(timers.received(false, time(7000)));
        assert!(!timers.received(false, time(7001)));
        timers.sent(true, time(8000));
        assert!(timers.poll(time(13_000)).silent);
    }

    #[test]
    fn a_session_expires_180_seconds_after_its_handshake() {
        let timers = Timers::default();
        timers.handshake_completed(time(0));
        timers.handshake_completed(time(1000));
        assert!(!timers.poll(time(180_999)).expired);
        assert!(timers.poll(time(181_000)).expired);
        assert!(!timers.poll(time(400_000)).expired);
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
