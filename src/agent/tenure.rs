//! How long this node has led its region, which decides when it records the lead. Pure: the time is passed in.
//!
//! What else the node claims is decided in [`super::publication`].

use std::time::{Duration, Instant};

use crate::topology::SegmentName;

/// How long a node leads without a break before it records that. A region that starts as a whole
/// changes its mind a few times within seconds, and a record would hold on to the first.
const PROVEN: Duration = Duration::from_secs(30);
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
}
