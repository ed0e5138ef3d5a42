//! When this node's agent records a claim in its ledger, and with what time. State machines, without
//! a clock of their own.
//!
//! What it claims is decided in [`super::publication`].

use std::time::{Duration, Instant};

use crate::topology::SegmentName;

/// How long a node leads without a break before it records that. A region that starts as a whole
/// changes its mind a few times within seconds, and a record would hold on to the first.
const PROVEN: Duration = Duration::from_secs(30);
/// How long a time is used for new entries. What is written must not change while the API server
/// shows what was written before.
const HOLD: Duration = Duration::from_secs(5);
/// Seconds by which the last change of the own Node may be ahead of the API server's clock. Several
/// servers differ by less. A later time is forged, and the admission policy refuses entries from minutes
/// ahead, so that an agent which followed it could publish nothing.
const MAX_AHEAD: i64 = 60;

/// How long this node has led its segment without a break.
#[derive(Debug, Default)]
pub struct Tenure(Option<(SegmentName, Instant)>);

impl Tenure {
    /// Takes the segment that this node leads now, if any.
    pub fn handle_lead(&mut self, now: Instant, lead: Option<&SegmentName>) {
        let unbroken = self.0.as_ref().map(|(segment, _)| segment) == lead;
        if !unbroken {
            self.0 = lead.map(|segment| (segment.clone(), now));
        }
    }

    /// The segment that it has led for long enough to record it.
    pub fn poll_proven(&self, now: Instant) -> Option<SegmentName> {
        let (segment, since) = self.0.as_ref()?;
        let led = now.saturating_duration_since(*since);
        (led >= PROVEN).then(|| segment.clone())
    }

    /// When [`Self::poll_proven`] may have news.
    pub fn poll_due(&self, now: Instant) -> Option<Instant> {
        let due = self.0.as_ref()?.1 + PROVEN;
        (due > now).then_some(due)
    }
}

/// The time that new entries get.
#[derive(Debug, Default)]
pub struct Stamp(Option<(i64, Instant)>);

impl Stamp {
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
    use crate::topology::RegionName;

    fn nd() -> SegmentName {
        SegmentName::Location(RegionName("nd".into()))
    }

    #[expect(clippy::disallowed_methods, reason = "any instant to count from")]
    fn start() -> Instant {
        Instant::now()
    }

    #[test]
    fn a_lead_is_recorded_after_thirty_seconds_without_a_break() {
        let (mut tenure, start) = (Tenure::default(), start());
        let at = |seconds| start + Duration::from_secs(seconds);

        tenure.handle_lead(at(0), Some(&nd()));
        assert_eq!(tenure.poll_due(at(0)), Some(at(30)));
        tenure.handle_lead(at(29), Some(&nd()));
        assert_eq!(tenure.poll_proven(at(29)), None);
        assert_eq!(tenure.poll_proven(at(30)), Some(nd()));
        assert_eq!(tenure.poll_due(at(30)), None);
    }

    #[test]
    fn a_lead_that_was_interrupted_counts_from_its_new_start() {
        let (mut tenure, start) = (Tenure::default(), start());
        let at = |seconds| start + Duration::from_secs(seconds);

        tenure.handle_lead(at(0), Some(&nd()));
        tenure.handle_lead(at(20), None);
        tenure.handle_lead(at(21), Some(&nd()));
        assert_eq!(tenure.poll_proven(at(50)), None);
        assert_eq!(tenure.poll_proven(at(51)), Some(nd()));

        let other = SegmentName::Location(RegionName("third".into()));
        tenure.handle_lead(at(60), Some(&other));
        assert_eq!(tenure.poll_proven(at(60)), None);
    }

    #[test]
    fn an_entry_is_never_older_than_the_last_change_of_its_node() {
        let (mut stamp, start) = (Stamp::default(), start());
        let at = |seconds| start + Duration::from_secs(seconds);

        assert_eq!(stamp.handle_time(at(0), 1_000, Some(990)), 1_000);
        // The kubelet wrote while the patch was on its way, or this server's clock is behind.
        assert_eq!(stamp.handle_time(at(1), 1_001, Some(1_002)), 1_002);
    }

    #[test]
    fn a_change_of_the_node_from_the_future_does_not_date_entries_ahead() {
        let mut stamp = Stamp::default();

        assert_eq!(stamp.handle_time(start(), 1_000, Some(9_999)), 1_000);
    }

    #[test]
    fn a_time_that_was_published_stays_until_the_watch_has_shown_it() {
        let (mut stamp, start) = (Stamp::default(), start());
        let at = |seconds| start + Duration::from_secs(seconds);

        assert_eq!(stamp.handle_time(at(0), 1_000, None), 1_000);
        assert_eq!(stamp.handle_time(at(4), 1_004, Some(1_000)), 1_000);
        assert_eq!(stamp.handle_time(at(5), 1_005, Some(1_000)), 1_005);
    }
}
