//! Writes the condition `Accepted` of each Peer: whether the mesh carries it.
//!
//! Only the reporter agent for Peers writes it, and only when it differs from the observed condition.
//! Without the right to write it, or where the CRD has no status subresource, it writes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use http::Method;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::watch;

use super::access::Connection;
use super::call::{self, Failure};
use super::events::{self, Notice};
use super::{Object, View, backoff};
use crate::clock;
use crate::topology::NodeName;

const MERGE: &str = "application/merge-patch+json";
/// The condition's type.
const ACCEPTED: &str = "Accepted";
/// The API refuses a longer message.
const MAX_MESSAGE: usize = 32_768;
/// Longest wait until the watch shows the written condition.
const OBSERVE_TIMEOUT: Duration = Duration::from_secs(5);

/// The verdict on a Peer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Verdict {
    /// Whether the mesh carries the whole Peer.
    accepted: bool,
    /// One word in Kubernetes' style.
    reason: &'static str,
    /// What the mesh does not carry, and why.
    message: String,
}

/// The verdicts on the Peers, by name; empty for an agent that is not their reporter.
pub type Verdicts = BTreeMap<String, Verdict>;

/// The conditions of the Peers, by name; `None` for a Peer without the condition.
pub(super) type Conditions = BTreeMap<String, Option<Condition>>;

/// Derives the verdicts on the Peers of a view from its refused values and the notices.
pub fn verdicts(own: &NodeName, view: &View, notices: &BTreeSet<Notice>) -> Verdicts {
    let of_peers = Object::Peer(String::new());
    if !events::is_reporter(own, &of_peers, &view.snapshot) {
        return Verdicts::new();
    }
    let accepted = Verdict {
        accepted: true,
        reason: "Carried",
        message: String::new(),
    };
    let peers = view.snapshot.peers.keys();
    let mut verdicts: Verdicts = peers.map(|name| (name.clone(), accepted.clone())).collect();
    let refused = view.rejected.iter().map(Notice::from);
    for notice in refused.chain(notices.iter().cloned()) {
        let Object::Peer(name) = notice.object else {
            continue;
        };
        let verdict = verdicts.entry(name).or_insert_with(|| accepted.clone());
        verdict.accepted = false;
        verdict.reason = notice.reason;
        if !verdict.message.is_empty() {
            verdict.message.push_str("; ");
        }
        verdict.message.push_str(&notice.note);
    }
    verdicts
}

/// Finds the condition in the status of a Peer.
pub(super) fn read(status: &serde_json::Value) -> Option<Condition> {
    let conditions = status.get("conditions")?.as_array()?;
    let mut read = conditions
        .iter()
        .filter_map(|condition| Condition::deserialize(condition).ok());
    read.find(|condition| condition.type_ == ACCEPTED)
}

/// Writes conditions until the sender of verdicts is dropped, or until the API server forbids it.
pub(super) async fn run(
    mut connections: watch::Receiver<Option<Connection>>,
    mut verdicts: watch::Receiver<Verdicts>,
    mut observed: watch::Receiver<Conditions>,
) {
    let mut backoff = backoff::Backoff::up_to(Duration::from_secs(60));
    // Enough for a burst of new Peers; then two a minute, even if another program writes conditions too.
    let mut writes = backoff::Budget::new(20, Duration::from_secs(30));
    let mut sent = Sent::default();
    loop {
        let now = clock::now();
        let next = {
            let (verdicts, observed) = (verdicts.borrow_and_update(), observed.borrow_and_update());
            sent.forget(&observed, now);
            difference(&verdicts, &observed, &sent)
        };
        let connection = connections.borrow_and_update().clone();
        let (Some((name, verdict, since)), Some(connection)) = (next, connection) else {
            let changed = tokio::select! {
                changed = verdicts.changed() => changed,
                changed = observed.changed() => changed,
                changed = connections.changed() => changed,
                () = tokio::time::sleep(OBSERVE_TIMEOUT), if !sent.written.is_empty() => Ok(()),
            };
            if changed.is_err() {
                return;
            }
            continue;
        };

        tokio::time::sleep(writes.take(now)).await;
        let body = condition(&verdict, since, Timestamp::now());
        let path =
            format!("/apis/kilo.squat.ai/v1alpha1/peers/{name}/status?fieldManager=selvedge");
        let request = call::send_json(Method::PATCH, &path, MERGE, &body);
        match call::call(&connection.client, request).await {
            Ok(_) => {
                backoff.reset();
                sent.written.insert(name, (verdict, clock::now()));
            }
            Err(Failure::Forbidden(reason)) => {
                tracing::info!(error = %reason, "writing conditions of Peers refused: check the ClusterRole");
                return;
            }
            // The Peer was deleted, or the CRD is Kilo's, which has no status subresource.
            Err(Failure::Absent) => {
                sent.unwritable.insert(name, verdict);
                tokio::time::sleep(backoff.pause(None)).await;
            }
            Err(failure) => {
                tracing::debug!(error = %failure, "writing a condition failed");
                tokio::time::sleep(backoff.pause(failure.pause())).await;
            }
        }
    }
}

/// Verdicts that were sent and need not be sent again.
#[derive(Debug, Default)]
struct Sent {
    /// Written; the watch should show them soon.
    written: BTreeMap<String, (Verdict, Instant)>,
    /// Not written, because the Peer has no status to write to.
    unwritable: BTreeMap<String, Verdict>,
}

impl Sent {
    /// Forgets entries that the watch had time to show, and deleted Peers.
    fn forget(&mut self, observed: &Conditions, now: Instant) {
        self.written
            .retain(|_, (_, at)| now.saturating_duration_since(*at) < OBSERVE_TIMEOUT);
        self.unwritable
            .retain(|name, _| observed.contains_key(name));
    }

    fn has(&self, name: &str, verdict: &Verdict) -> bool {
        let written = self.written.get(name).map(|(sent, _)| sent);
        [written, self.unwritable.get(name)].contains(&Some(verdict))
    }
}

/// The first Peer whose observed condition differs from its verdict, with the verdict, and the present
/// condition's transition time if the status stays.
fn difference(
    verdicts: &Verdicts,
    observed: &Conditions,
    sent: &Sent,
) -> Option<(String, Verdict, Option<Time>)> {
    verdicts.iter().find_map(|(name, verdict)| {
        let observed = observed.get(name)?.as_ref();
        let status = status(verdict);
        let same = observed.is_some_and(|observed| {
            observed.status == status
                && observed.reason == verdict.reason
                && observed.message == cut(&verdict.message)
        });
        if same || sent.has(name, verdict) {
            return None;
        }
        let since = observed.filter(|observed| observed.status == status);
        let since = since.map(|observed| observed.last_transition_time.clone());
        Some((name.clone(), verdict.clone(), since))
    })
}

fn condition(verdict: &Verdict, since: Option<Time>, now: Timestamp) -> serde_json::Value {
    let condition = Condition {
        type_: ACCEPTED.to_owned(),
        status: status(verdict).to_owned(),
        reason: verdict.reason.to_owned(),
        message: cut(&verdict.message).to_owned(),
        last_transition_time: since.unwrap_or(Time(now)),
        observed_generation: None,
    };
    json!({"status": {"conditions": [condition]}})
}

fn status(verdict: &Verdict) -> &'static str {
    if verdict.accepted { "True" } else { "False" }
}

fn cut(message: &str) -> &str {
    events::cut(message, MAX_MESSAGE)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::cluster::Rejected;
    use crate::topology::{ExternalPeer, Snapshot};
    use crate::wireguard::key::PublicKey;

    fn own() -> NodeName {
        NodeName("a".into())
    }

    /// A cluster of one ready node of ours with the given Peers.
    fn view(peers: &[&str]) -> View {
        let node = json!({
            "metadata": {"name": "a", "annotations": {"selvedge.dev/agent": "1"}},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        });
        let node = serde_json::from_value(node).unwrap();
        let (node, _) =
            crate::cluster::node::parse(&node, &crate::cluster::ParseSettings::default());
        let peer = |name: &&str| ExternalPeer {
            name: (*name).to_owned(),
            created: 0,
            public_key: PublicKey([1; 32]),
            preshared_key: None,
            endpoint: None,
            persistent_keepalive: 0,
            allowed_ips: vec![],
        };
        View {
            snapshot: Arc::new(Snapshot {
                nodes: node
                    .map(|node| (node.name.clone(), node))
                    .into_iter()
                    .collect(),
                peers: peers
                    .iter()
                    .map(peer)
                    .map(|peer| (peer.name.clone(), peer))
                    .collect(),
            }),
            ..View::default()
        }
    }

    fn notice(peer: &str, note: &str) -> Notice {
        Notice {
            object: Object::Peer(peer.into()),
            field: note.into(),
            reason: "SelvedgeExcluded",
            note: note.into(),
        }
    }

    #[test]
    fn a_verdict_lists_every_problem_of_the_peer() {
        let mut view = view(&["good", "bad"]);
        let unreadable = Object::Peer("unreadable".into());
        let rejected = Rejected::new(unreadable, "spec.publicKey", "x", "this is no key");
        view.rejected.insert(rejected);
        let notices = [notice("bad", "one"), notice("bad", "two")].into();

        let verdicts = verdicts(&own(), &view, &notices);

        assert!(verdicts["good"].accepted);
        assert_eq!(
            (verdicts["bad"].accepted, verdicts["bad"].message.as_str()),
            (false, "one; two")
        );
        assert!(verdicts["unreadable"].message.contains("this is no key"));
    }

    #[test]
    fn only_the_reporter_agent_has_verdicts() {
        let other = NodeName("b".into());
        assert!(verdicts(&other, &view(&["good"]), &BTreeSet::new()).is_empty());
    }

    #[test]
    fn an_unchanged_condition_is_not_written() {
        let view = view(&["good"]);
        let verdicts = verdicts(&own(), &view, &BTreeSet::new());
        let written = Sent::default();
        let nothing = [("good".to_owned(), None)].into();
        let (_, verdict, since) = difference(&verdicts, &nothing, &written).unwrap();
        assert_eq!(since, None);

        let status = condition(&verdict, None, Timestamp::UNIX_EPOCH);
        let there = [("good".to_owned(), read(&status["status"]))].into();
        assert_eq!(difference(&verdicts, &there, &written), None);
        // A Peer that was deleted meanwhile gets no condition.
        assert_eq!(difference(&verdicts, &Conditions::new(), &written), None);
    }

    #[test]
    fn a_changed_reason_keeps_the_transition_time() {
        let mut view = view(&["bad"]);
        let first = verdicts(&own(), &view, &[notice("bad", "one")].into());
        let status = condition(&first["bad"], None, Timestamp::UNIX_EPOCH);
        let there: Conditions = [("bad".to_owned(), read(&status["status"]))].into();
        let second = verdicts(&own(), &view, &[notice("bad", "two")].into());

        let (_, _, since) = difference(&second, &there, &Sent::default()).unwrap();
        assert_eq!(since, Some(Time(Timestamp::UNIX_EPOCH)));

        Arc::make_mut(&mut view.snapshot).peers.clear();
        assert!(verdicts(&own(), &view, &BTreeSet::new()).is_empty());
    }

    #[test]
    fn a_peer_without_status_gets_one_attempt_per_verdict() {
        let view = view(&["good"]);
        let first = verdicts(&own(), &view, &BTreeSet::new());
        let there: Conditions = [("good".to_owned(), None)].into();
        let (now, mut sent) = (clock::now(), Sent::default());
        sent.unwritable
            .insert("good".to_owned(), first["good"].clone());

        sent.forget(&there, now + 100 * OBSERVE_TIMEOUT);
        assert_eq!(difference(&first, &there, &sent), None);
        let second = verdicts(&own(), &view, &[notice("good", "bad")].into());
        assert!(difference(&second, &there, &sent).is_some());

        // A new object of the same name may have one.
        sent.forget(&Conditions::new(), now);
        assert!(difference(&first, &there, &sent).is_some());
    }

    #[test]
    fn malformed_conditions_are_ignored() {
        for status in [
            json!(null),
            json!({}),
            json!({"conditions": 7}),
            json!({"conditions": [{"type": 7}, {}]}),
        ] {
            assert_eq!(read(&status), None);
        }
    }
}
