//! Reports to the operator what is refused or left out: once in the log of every agent, and once as
//! an Event from the one agent that is the reporter of the object.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use http::Method;
use k8s_openapi::jiff::Timestamp;
use serde_json::json;
use tokio::sync::{mpsc, watch};

use super::access::Connection;
use super::call::{self, Failure};
use super::{Object, Rejected, peer};
use crate::liveness;
use crate::plan::Caveat;
use crate::text;
use crate::topology::{Excluded, Node, NodeName, Overlap, Snapshot};

/// At most one notice per field in this time, even if its value keeps changing.
const REPEAT_AFTER: Duration = Duration::from_secs(600);
/// Most Events in flight; further ones add nothing to the first.
pub(super) const QUEUE: usize = 64;
/// The API refuses a longer note (events.k8s.io/v1).
const MAX_NOTE: usize = 1024;
/// The API refuses a longer name of the reporting instance.
const MAX_INSTANCE: usize = 128;
/// Names of Events are names of objects and a suffix; together at most 253.
const MAX_NAME: usize = 200;

const PATH: &str = "/apis/events.k8s.io/v1/namespaces/default/events?fieldManager=selvedge";

/// Something about an object that the operator should know.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Notice {
    /// The object.
    pub object: Object,
    /// The part of the object; notices of one field share one rate limit.
    pub field: String,
    /// The reason, one word in Kubernetes' style that starts with `Selvedge`, such as `SelvedgeExcluded`.
    pub reason: &'static str,
    /// One sentence, fit for a log.
    pub note: String,
}

impl From<&Rejected> for Notice {
    fn from(rejected: &Rejected) -> Self {
        let reason = match &rejected.object {
            Object::Node(_) => "SelvedgeInvalidAnnotation",
            Object::Peer(_) => "SelvedgeInvalidPeer",
        };
        Self {
            object: rejected.object.clone(),
            field: rejected.field.to_owned(),
            reason,
            note: rejected.to_string(),
        }
    }
}

impl From<&Excluded> for Notice {
    fn from(excluded: &Excluded) -> Self {
        Self {
            object: excluded.object.clone(),
            field: excluded.field.to_string(),
            reason: "SelvedgeExcluded",
            note: excluded.to_string(),
        }
    }
}

impl From<&Overlap> for Notice {
    fn from(overlap: &Overlap) -> Self {
        Self {
            object: Object::Node(overlap.node.clone()),
            field: overlap.address.to_string(),
            reason: match overlap.alias {
                Some(_) => "SelvedgeAddressAlias",
                None => "SelvedgeAddressOverlap",
            },
            note: overlap.to_string(),
        }
    }
}

impl Notice {
    /// A caveat of a node's plan, as a notice about that node.
    pub(crate) fn of_caveat(node: &NodeName, caveat: &Caveat) -> Self {
        let (field, reason) = match caveat {
            Caveat::RuleInTheWay(_) => ("routing rules".to_owned(), "SelvedgeRuleInTheWay"),
            Caveat::Connected { net, .. } => {
                (format!("connected {net}"), "SelvedgeConnectedNetwork")
            }
        };
        Self {
            object: Object::Node(node.clone()),
            field,
            reason,
            note: caveat.to_string(),
        }
    }
}

/// Finds the new notices among all current ones. Pure.
#[derive(Debug, Default)]
pub(super) struct NoticeFilter {
    current: BTreeSet<Notice>,
    reported: BTreeMap<(Object, String), Instant>,
}

impl NoticeFilter {
    /// The notices to report now, given `all` current ones.
    pub(super) fn new_notices(&mut self, all: BTreeSet<Notice>, now: Instant) -> Vec<Notice> {
        self.reported
            .retain(|_, at| now.saturating_duration_since(*at) < REPEAT_AFTER);
        let mut new = Vec::new();
        for notice in all.difference(&self.current) {
            let key = (notice.object.clone(), notice.field.clone());
            if let std::collections::btree_map::Entry::Vacant(entry) = self.reported.entry(key) {
                entry.insert(now);
                new.push(notice.clone());
            }
        }
        self.current = all;
        new
    }
}

/// Whether a node's agent is ours and alive, so that it may write Events for others.
fn may_report(node: &Node) -> bool {
    node.ours && liveness::may_lead(node.ready)
}

/// Whether the agent of `own` is the reporter of an object: of a thousand agents that see the same
/// mistake, one writes the Event.
pub(super) fn is_reporter(own: &NodeName, object: &Object, snapshot: &Snapshot) -> bool {
    let can_report = |name: &NodeName| snapshot.nodes.get(name).is_some_and(may_report);
    let first = || snapshot.nodes.values().find(|node| may_report(node));
    match object {
        Object::Node(name) if can_report(name) => own == name,
        Object::Node(_) | Object::Peer(_) => first().is_some_and(|node| node.name == *own),
    }
}

/// A notice to be written to the API as an Event.
#[derive(Debug)]
pub(super) struct PendingEvent {
    pub(super) notice: Notice,
    pub(super) uid: String,
}

/// Writes Events. An Event that cannot be written is dropped: the log holds its notice.
pub(super) async fn run(
    own: NodeName,
    connections: watch::Receiver<Option<Connection>>,
    mut pending_events: mpsc::Receiver<PendingEvent>,
) {
    let mut allowed = true;
    while let Some(pending) = pending_events.recv().await {
        let Some(connection) = connections.borrow().clone() else {
            continue;
        };
        let body = event(&own, &pending, Timestamp::now(), rand::random());
        let request = call::send_json(Method::POST, PATH, "application/json", &body);
        match call::call(&connection.client, request).await {
            Ok(_) => allowed = true,
            Err(Failure::Forbidden(_)) if allowed => {
                allowed = false;
                tracing::info!("writing Events refused: notices stand in the log only");
            }
            Err(failure) => tracing::debug!(error = %failure, "writing an Event failed"),
        }
    }
}

fn event(
    own: &NodeName,
    pending: &PendingEvent,
    time: Timestamp,
    random: u64,
) -> serde_json::Value {
    let PendingEvent { notice, uid } = pending;
    // The admission policy selvedge-events admits no other reason.
    debug_assert!(notice.reason.starts_with("Selvedge"), "{}", notice.reason);
    let (kind, api_version, name, uid) = match &notice.object {
        // As the kubelet does: `kubectl describe node` finds Events by the Node's name.
        Object::Node(NodeName(name)) => ("Node", "v1", name, name),
        Object::Peer(name) => ("Peer", peer::API_VERSION, name, uid),
    };
    let prefix = cut(name, MAX_NAME).trim_end_matches(['.', '-']);
    json!({
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": format!("{prefix}.{random:016x}"), "namespace": "default"},
        "eventTime": format!("{time:.6}"),
        "type": "Warning",
        "reason": notice.reason,
        "action": "Ignore",
        "note": cut(&text::line(&notice.note), MAX_NOTE),
        "regarding": {"apiVersion": api_version, "kind": kind, "name": name, "uid": uid},
        "reportingController": "selvedge",
        "reportingInstance": cut(&own.0, MAX_INSTANCE),
    })
}

/// The longest prefix of a text with at most `limit` bytes.
pub(super) fn cut(text: &str, limit: usize) -> &str {
    let ends = |at: &usize| text.is_char_boundary(*at);
    let end = (0..=limit.min(text.len())).rev().find(ends).unwrap_or(0);
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    fn notice(node: &str, field: &str, note: &str) -> Notice {
        Notice {
            object: Object::Node(NodeName(node.to_owned())),
            field: field.to_owned(),
            reason: "SelvedgeInvalidAnnotation",
            note: note.to_owned(),
        }
    }

    #[test]
    fn a_lasting_notice_is_reported_once() {
        let mut notice_filter = NoticeFilter::default();
        let now = clock::now();
        let all = BTreeSet::from([notice("a1", "key", "x")]);
        assert_eq!(notice_filter.new_notices(all.clone(), now).len(), 1);
        for minutes in 1..100 {
            let later = now + Duration::from_secs(60 * minutes);
            assert_eq!(notice_filter.new_notices(all.clone(), later), []);
        }
    }

    #[test]
    fn a_field_that_keeps_changing_is_reported_once_in_ten_minutes() {
        let mut notice_filter = NoticeFilter::default();
        let now = clock::now();
        let reported: usize = (0..1200)
            .map(|second| {
                let all = BTreeSet::from([notice("a1", "key", &second.to_string())]);
                notice_filter
                    .new_notices(all, now + Duration::from_secs(second))
                    .len()
            })
            .sum();
        assert_eq!(reported, 2);
    }

    #[test]
    fn fields_have_separate_rate_limits() {
        let mut notice_filter = NoticeFilter::default();
        let all = BTreeSet::from([
            notice("a1", "key", "x"),
            notice("a1", "endpoint", "x"),
            notice("a2", "key", "x"),
        ]);
        assert_eq!(notice_filter.new_notices(all, clock::now()).len(), 3);
    }

    #[test]
    fn a_note_with_bidirectional_marks_is_escaped() {
        let pending = PendingEvent {
            notice: notice("a1", "key", "n\u{202e}d"),
            uid: String::new(),
        };
        let event = event(&NodeName("a1".into()), &pending, Timestamp::UNIX_EPOCH, 1);
        assert_eq!(event["note"], "n\\u{202e}d");
    }

    #[test]
    fn events_keep_to_the_limits_of_the_api() {
        let pending = PendingEvent {
            notice: notice(&"n".repeat(253), "key", &"ä".repeat(2000)),
            uid: String::new(),
        };
        let own = NodeName("n".repeat(253));
        let event = event(&own, &pending, Timestamp::UNIX_EPOCH, u64::MAX);
        assert!(event["metadata"]["name"].as_str().unwrap().len() <= 253);
        assert!(event["note"].as_str().unwrap().len() <= 1024);
        assert!(event["reportingInstance"].as_str().unwrap().len() <= 128);
        assert_eq!(event["eventTime"], "1970-01-01T00:00:00.000000Z");
    }
}
