//! The times that new entries of this node's ledger get. Pure: the time is passed in.
//!
//! What the node claims is decided in [`super::publication`].

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::topology::{Claim, Ledger};

/// For how long an entry is written with the same time although the API does not show it. The admission policy
/// refuses an entry from more than a minute ago.
const KEPT: Duration = Duration::from_secs(45);
/// Seconds by which the last change of the own Node may be ahead of the API server's clock. Several
/// servers differ by less. A later time is forged, and the admission policy refuses entries from minutes
/// ahead, so that an agent which followed it could publish nothing.
const MAX_AHEAD: i64 = 60;

/// The times of entries that were handed out to be written and that the API does not show yet. What is written
/// again must say the same, or an agent that is cut off would write a new time at every look.
#[derive(Debug, Default)]
pub struct ClaimClock(BTreeMap<Claim, Pending>);

#[derive(Clone, Copy, Debug)]
struct Pending {
    /// In Unix seconds of the API server.
    time: i64,
    /// When it was first handed out.
    since: Instant,
}

impl ClaimClock {
    /// Takes the API server's time and the time of the last change of the own Node, both in Unix
    /// seconds, and returns the time for new entries. It is never before that change: the admission
    /// policy refuses an entry that would be older than the object it stands in.
    pub fn handle_time(&mut self, server: i64, changed: Option<i64>) -> i64 {
        let latest = server.saturating_add(MAX_AHEAD);
        let least = changed.filter(|changed| *changed <= latest);
        let least = least.unwrap_or(i64::MIN);
        self.0.retain(|_, pending| pending.time >= least);
        server.max(least)
    }

    /// The API shows these entries. One that it still does not show long after it was handed out was not written,
    /// and gets another time.
    pub fn handle_shown(&mut self, now: Instant, shown: &Ledger) {
        self.0.retain(|claim, pending| {
            let is_recent = now.saturating_duration_since(pending.since) < KEPT;
            shown.since(claim).is_none() && is_recent
        });
    }

    /// These entries are to be written, while the API shows those of `shown`.
    pub fn handle_published(&mut self, now: Instant, published: &Ledger, shown: &Ledger) {
        let new = published.iter();
        let new = new.filter(|(claim, _)| shown.since(claim).is_none());
        let pending = new.map(|(claim, time)| {
            let before = self.0.get(claim).filter(|pending| pending.time == time);
            let since = before.map_or(now, |pending| pending.since);
            (claim.clone(), Pending { time, since })
        });
        self.0 = pending.collect();
    }

    /// The entries that the API does not show yet.
    pub fn pending(&self) -> Ledger {
        let pending = self.0.iter();
        Ledger::new(pending.map(|(claim, pending)| (claim.clone(), pending.time)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "any instant to count from")]
    fn start() -> Instant {
        Instant::now()
    }

    fn address(last: u8) -> Claim {
        Claim::Address([10, 0, 0, last].into())
    }

    fn ledger(entries: &[(u8, i64)]) -> Ledger {
        Ledger::new(entries.iter().map(|(last, time)| (address(*last), *time)))
    }

    /// Publishes claims of these addresses, as the agent does, and returns what is written.
    fn publish(
        clock: &mut ClaimClock,
        at: Instant,
        server: i64,
        shown: &Ledger,
        claims: &[u8],
    ) -> Ledger {
        let time = clock.handle_time(server, None);
        let known = shown.iter().map(|(claim, since)| (claim.clone(), since));
        let pending = clock.pending();
        let pending = pending.iter().map(|(claim, since)| (claim.clone(), since));
        let known = Ledger::new(known.chain(pending));
        let claims = claims.iter().map(|last| address(*last));
        let published = known.renewed(claims, Some(time));
        clock.handle_published(at, &published, shown);
        published
    }

    #[test]
    fn an_entry_is_never_older_than_the_last_change_of_its_node() {
        let (mut clock, start) = (ClaimClock::default(), start());
        assert_eq!(clock.handle_time(1_000, Some(990)), 1_000);
        clock.handle_published(start, &ledger(&[(1, 1_000)]), &Ledger::default());
        // The kubelet wrote while the patch was on its way, or this server's clock is behind.
        assert_eq!(clock.handle_time(1_001, Some(1_002)), 1_002);
        assert!(clock.pending().is_empty());
    }

    #[test]
    fn a_change_of_the_node_from_the_future_does_not_date_entries_ahead() {
        let mut clock = ClaimClock::default();
        assert_eq!(clock.handle_time(1_000, Some(9_999)), 1_000);
    }

    #[test]
    fn an_agent_that_is_cut_off_writes_the_same_times_until_it_sees_them() {
        let (mut clock, start) = (ClaimClock::default(), start());
        let at = |seconds| start + Duration::from_secs(seconds);
        let none = Ledger::default();
        let first = publish(&mut clock, at(0), 1_000, &none, &[1]);
        assert_eq!(first, ledger(&[(1, 1_000)]));
        for seconds in 1..300 {
            let server = 1_000 + i64::try_from(seconds).unwrap();
            let again = publish(&mut clock, at(seconds), server, &none, &[1]);
            assert_eq!(again, first, "after {seconds} s");
        }
        // A claim that is new meanwhile has its own time.
        let more = publish(&mut clock, at(300), 1_300, &none, &[1, 2]);
        assert_eq!(more, ledger(&[(1, 1_000), (2, 1_300)]));

        clock.handle_shown(at(310), &more);
        assert!(clock.pending().is_empty());
        let shown = publish(&mut clock, at(310), 1_310, &more, &[1, 2]);
        assert_eq!(shown, more);
    }

    #[test]
    fn an_entry_that_the_api_does_not_show_in_time_gets_another_time() {
        let (mut clock, start) = (ClaimClock::default(), start());
        let at = |seconds| start + Duration::from_secs(seconds);
        let none = Ledger::default();
        publish(&mut clock, at(0), 1_000, &none, &[1]);
        clock.handle_shown(at(44), &none);
        let again = publish(&mut clock, at(44), 1_044, &none, &[1]);
        assert_eq!(again, ledger(&[(1, 1_000)]));
        // The policy would refuse it from now on.
        clock.handle_shown(at(46), &none);
        let again = publish(&mut clock, at(46), 1_046, &none, &[1]);
        assert_eq!(again, ledger(&[(1, 1_046)]));
    }

    #[test]
    fn a_claim_that_was_given_up_has_another_time_when_it_is_made_again() {
        let (mut clock, start) = (ClaimClock::default(), start());
        let none = Ledger::default();
        publish(&mut clock, start, 1_000, &none, &[1, 2]);
        publish(&mut clock, start, 1_001, &none, &[1]);
        let again = publish(&mut clock, start, 1_002, &none, &[1, 2]);
        assert_eq!(again, ledger(&[(1, 1_000), (2, 1_002)]));
    }
}
