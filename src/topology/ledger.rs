//! The times of a node's claims, as all agents read them from its Node.
//!
//! An object's age is not the age of its claims: an old Node can name a new address. So each agent records
//! the time of every claim, and the admission policy refuses a time in the past. The text form is in [`crate::cluster::since`].

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::SegmentName;
use crate::wireguard::key::PublicKey;

/// The most entries of a ledger. A node claims a key, or two while it replaces it, a region, a lead and an address of each family, and
/// keeps no claim that it gave up.
pub const MAX_ENTRIES: usize = 16;

/// Something that one node can hold and another can claim.
#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Claim {
    /// An address that is carried for the node.
    Address(IpAddr),
    /// The WireGuard key.
    Key(PublicKey),
    /// Membership in a region.
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
        let index = self
            .0
            .binary_search_by(|(known, _)| known.cmp(claim))
            .ok()?;
        Some(self.0[index].1)
    }

    /// The rank of a node among others by its oldest record, in the order of [`Self::rank`]: it does not change with
    /// the node's key.
    pub fn seniority(&self) -> (bool, i64) {
        let oldest = self.0.iter().map(|(_, since)| *since).min();
        oldest.map_or((true, i64::MAX), |since| (false, since))
    }

    /// The rank of the claim among equal ones: recorded before unrecorded, then by time. The least wins.
    pub fn rank(&self, claim: &Claim) -> (bool, i64) {
        self.since(claim)
            .map_or((true, i64::MAX), |since| (false, since))
    }

    /// The ledger of a node that makes these claims at `now`, in Unix seconds of the API server. A claim that
    /// was recorded before keeps its time, and one that the node gave up is dropped. Without a time no claim
    /// is added.
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
    fn a_claim_keeps_its_time_until_the_node_gives_it_up() {
        let old = Ledger::new([(address("10.0.0.1"), 100), (address("10.0.0.2"), 100)]);
        let new = old.renewed([address("10.0.0.2"), address("10.0.0.3")], Some(200));
        assert_eq!(
            new,
            Ledger::new([(address("10.0.0.2"), 100), (address("10.0.0.3"), 200)])
        );
        // When it is made again, it is a new claim.
        let again = new.renewed([address("10.0.0.1")], Some(300));
        assert_eq!(again.since(&address("10.0.0.1")), Some(300));
    }

    #[test]
    fn no_claim_is_recorded_while_the_servers_time_is_unknown() {
        let old = Ledger::new([(address("10.0.0.1"), 100)]);
        let new = old.renewed([address("10.0.0.1"), address("10.0.0.2")], None);
        assert_eq!(new, old);
    }

    #[test]
    fn recorded_claims_rank_before_unrecorded_ones_and_older_before_newer() {
        let ledger = Ledger::new([(address("10.0.0.1"), 100), (address("10.0.0.2"), 200)]);
        let rank = |text| ledger.rank(&address(text));
        assert!(rank("10.0.0.1") < rank("10.0.0.2"));
        assert!(rank("10.0.0.2") < rank("10.0.0.3"));
    }

    #[test]
    fn a_ledger_holds_at_most_its_limit_of_entries() {
        let many = (0..200).map(|host| (address(&format!("10.0.0.{host}")), 1));
        assert_eq!(Ledger::new(many).iter().count(), MAX_ENTRIES);
    }
}
