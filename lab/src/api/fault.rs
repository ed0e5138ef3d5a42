//! What can be made to go wrong with the stand-in, while it runs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// The state of the switches. All off by default.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Connections are reset as soon as they are accepted, and those that stand are closed.
    pub refuse: bool,
    /// Connections are accepted and requests read, but nothing is ever answered; open watches fall
    /// silent.
    pub half_open: bool,
    /// Watches stay open and carry nothing, not even bookmarks; all else works.
    pub stall_watches: bool,
    /// Watches end as soon as they have begun.
    pub short_watches: bool,
    /// So many watches from a version get 410.
    pub gone: u32,
    /// Whether that 410 is the answer, and not an event on the watch.
    pub gone_as_status: bool,
    /// So many requests get 429 with this `Retry-After` in seconds.
    pub busy: (u32, u64),
    /// So many requests get 503 without `Retry-After`.
    pub unavailable: u32,
    /// So many lists hold only their first objects, as many as the second number says.
    pub truncate: (u32, usize),
    /// Names that a user does not get to see: a server cut off from the others.
    pub hidden: BTreeMap<String, BTreeSet<String>>,
    /// Requests whose path contains one of these get 403.
    pub forbid: BTreeSet<String>,
    /// Streamed lists are refused, as before Kubernetes 1.32.
    pub no_streamed_lists: bool,
    /// Streamed lists are taken for plain watches, as before Kubernetes 1.27.
    pub ignore_streamed_lists: bool,
    /// Every answer comes this much later.
    pub delay: Duration,
}

impl Faults {
    /// Uses up one of a number of failures.
    pub(super) const fn spend(count: &mut u32) -> bool {
        match count.checked_sub(1) {
            Some(rest) => {
                *count = rest;
                true
            }
            None => false,
        }
    }
}
