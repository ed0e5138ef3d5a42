//! Since when a node has claimed what it claims, as all agents read it from its Node.
//!
//! The age of an object says nothing about the age of a claim: an old Node can name a new address.
//! So each agent records the time of every claim, and the admission policy lets it record no time in
//! the past. The text form is in [`crate::cluster::since`].

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::SegmentName;
use crate::wireguard::key::PublicKey;

/// Entries that a ledger has at most. A node claims a key, a region, a lead and an address of each
/// family, and keeps none that it gave up.
pub const MAX_ENTRIES: usize = 16;

/// What a node can hold and another can want.
#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Claim {
    /// An address that is carried for the node.
    Address(IpAddr),
    /// The WireGuard key.
    Key(PublicKey),
    /// A place in a segment.
    Region(SegmentName),
    /// The lead of a segment.
    Lead(SegmentName),
}

/// The recorded claims of one node with the API server's time in Unix seconds, ordered by claim.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Ledger(Vec<(Claim, i64)>);

impl Ledger {
    /// Takes at most [`MAX_ENTRIES`] entries. Of two for one claim the older stays.
    pub fn new(entries: impl IntoIterator<Item = (Claim, i64)>) -> Self {
        let mut entries = entries.into_iter().collect::<Vec<_>>();
        entries.sort();
        entries.dedup_by(|later, earlier| later.0 == earlier.0);
        entries.truncate(MAX_ENTRIES);
        Self(entries)
    }

    /// All entries, ordered by claim.
    pub fn iter(&self) -> impl Iterator<Item = (&Claim, i64)> {
        self.0.iter().map(|(claim, since)| (claim, *since))
    }

    /// Whether nothing is recorded.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The time of the claim in Unix seconds; `None` where it is not recorded.
    pub fn since(&self, claim: &Claim) -> Option<i64> {
        let place = self
            .0
            .binary_search_by(|(known, _)| known.cmp(claim))
            .ok()?;
        Some(self.0[place].1)
    }

    /// How the claim ranks among equal ones: recorded before not recorded, then by time. Less is
    /// better.
    pub fn rank(&self, claim: &Claim) -> (bool, i64) {
        self.since(claim)
            .map_or((true, i64::MAX), |since| (false, since))
    }

    /// The ledger of a node that claims `claims` at `now`, in Unix seconds of the API server: what
    /// it recorded before keeps its time, what it gave up is dropped. Without a time nothing is
    /// added.
    #[must_use]
    pub fn renewed(&self, claims: impl IntoIterator<Item = Claim>, now: Option<i64>) -> Self {
        let entries = claims.into_iter().filter_map(|claim| {
            let since = self.since(&claim).or(now)?;
            Some((claim, since))
        });
        Self::new(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Claim {
        Claim::Address(text.parse().unwrap())
    }

    #[test]
    fn a_claim_that_stays_keeps_its_time_and_one_given_up_loses_it() {
        let old = Ledger::new([(address("10.0.0.1"), 100), (address("10.0.0.2"), 100)]);
        let new = old.renewed([address("10.0.0.2"), address("10.0.0.3")], Some(200));
        assert_eq!(
            new,
            Ledger::new([(address("10.0.0.2"), 100), (address("10.0.0.3"), 200)])
        );
        // Taken up again, it is a new claim.
        let again = new.renewed([address("10.0.0.1")], Some(300));
        assert_eq!(again.since(&address("10.0.0.1")), Some(300));
    }

    #[test]
    fn nothing_is_recorded_while_the_servers_time_is_not_known() {
        let old = Ledger::new([(address("10.0.0.1"), 100)]);
        let new = old.renewed([address("10.0.0.1"), address("10.0.0.2")], None);
        assert_eq!(new, old);
    }

    #[test]
    fn a_recorded_claim_ranks_before_one_that_is_not_and_the_older_before_the_newer() {
        let ledger = Ledger::new([(address("10.0.0.1"), 100), (address("10.0.0.2"), 200)]);
        let rank = |text| ledger.rank(&address(text));
        assert!(rank("10.0.0.1") < rank("10.0.0.2"));
        assert!(rank("10.0.0.2") < rank("10.0.0.3"));
    }

    #[test]
    fn a_ledger_is_bounded() {
        let many = (0..200).map(|host| (address(&format!("10.0.0.{host}")), 1));
        assert_eq!(Ledger::new(many).iter().count(), MAX_ENTRIES);
    }
}
