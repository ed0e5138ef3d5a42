//! Tells each Peer whether the mesh carries it: the condition `Accepted` of its status.
//!
//! Written by the one agent that speaks for Peers, and only when it differs from what is there. Without
//! the right to, or with a definition of the resource that has no status, nothing is written at all.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use http::Method;
use k8s_openapi::jiff::Timestamp;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;

use super::access::Connection;
use super::call::{self, Failure};
use super::events::{self, Notice};
use super::{Object, View, backoff};
use crate::topology::NodeName;

const MERGE: &str = "application/merge-patch+json";
/// The condition's type.
const ACCEPTED: &str = "Accepted";
/// The API refuses a longer message.
const MAX_MESSAGE: usize = 32_768;
/// How long the watch may take to show what was written.
const OBSERVE_TIMEOUT: Duration = Duration::from_secs(5);

/// What became of a Peer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Verdict {
    /// Whether all of it is carried.
    accepted: bool,
    /// In one word of Kubernetes' style.
    reason: &'static str,
    /// What is not carried, and why.
    message: String,
}

/// What became of the Peers, by name; empty for an agent that does not speak for them.
pub type Verdicts = BTreeMap<String, Verdict>;

/// The condition that a Peer has; none where it has none.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(default)]
pub(super) struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
    reason: String,
    message: String,
    #[serde(rename = "lastTransitionTime")]
    since: String,
}

/// The conditions that Peers have, by the Peer's name.
pub(super) type Conditions = BTreeMap<String, Option<Condition>>;

/// Judges the Peers of a view by what is reported of them.
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
    read.find(|condition| condition.kind == ACCEPTED)
}

/// Writes conditions until nobody judges any more, or until it turns out that they cannot be written.
pub(super) async fn run(
    mut connections: watch::Receiver<Option<Connection>>,
    mut verdicts: watch::Receiver<Verdicts>,
    mut shown: watch::Receiver<Conditions>,
) {
    let mut backoff = backoff::Backoff::up_to(Duration::from_secs(60));
    // A burst of new Peers; then two a minute, whoever else writes conditions.
    let mut writes = backoff::Budget::new(20, Duration::from_secs(30));
    let mut sent = Sent::default();
    loop {
        let now = Instant::now();
        let next = {
            let (verdicts, shown) = (verdicts.borrow_and_update(), shown.borrow_and_update());
            sent.forget(&shown, now);
            difference(&verdicts, &shown, &sent)
        };
        let connection = connections.borrow_and_update().clone();
        let (Some((name, verdict, since)), Some(connection)) = (next, connection) else {
            let changed = tokio::select! {
                changed = verdicts.changed() => changed,
                changed = shown.changed() => changed,
                changed = connections.changed() => changed,
                () = tokio::time::sleep(OBSERVE_TIMEOUT), if !sent.written.is_empty() => Ok(()),
            };
            if changed.is_err() {
                return;
            }
            continue;
        };

        tokio::time::sleep(writes.take(now)).await;
        let body = condition(&verdict, since.as_deref(), Timestamp::now());
        let path =
            format!("/apis/kilo.squat.ai/v1alpha1/peers/{name}/status?fieldManager=selvedge");
        let request = call::send_json(Method::PATCH, &path, MERGE, &body);
        match call::call(&connection.client, request).await {
            Ok(_) => {
                backoff.reset();
                sent.written.insert(name, (verdict, Instant::now()));
            }
            Err(Failure::Forbidden(reason)) => {
                tracing::info!(%reason, "the agent may not write conditions of Peers");
                return;
            }
            // The Peer is gone, or Kilo's definition is in place, which has no status.
            Err(Failure::Absent) => {
                sent.untold.insert(name, verdict);
                tokio::time::sleep(backoff.pause(None)).await;
            }
            Err(failure) => {
                tracing::debug!(%failure, "a condition could not be written");
                tokio::time::sleep(backoff.pause(failure.pause())).await;
            }
        }
    }
}

/// What was sent and need not be sent again.
#[derive(Debug, Default)]
struct Sent {
    /// What the watch should show soon.
    written: BTreeMap<String, (Verdict, Instant)>,
    /// What could not be told, because there is nowhere to write it.
    untold: BTreeMap<String, Verdict>,
}

impl Sent {
    /// Forgets what the watch has had time to show, and Peers that are gone.
    fn forget(&mut self, shown: &Conditions, now: Instant) {
        self.written
            .retain(|_, (_, at)| now.saturating_duration_since(*at) < OBSERVE_TIMEOUT);
        self.untold.retain(|name, _| shown.contains_key(name));
    }

    fn has(&self, name: &str, verdict: &Verdict) -> bool {
        let written = self.written.get(name).map(|(sent, _)| sent);
        [written, self.untold.get(name)].contains(&Some(verdict))
    }
}

/// The first Peer whose condition is not as it should be, and since when the present one holds if its
/// status stays.
fn difference(
    verdicts: &Verdicts,
    shown: &Conditions,
    sent: &Sent,
) -> Option<(String, Verdict, Option<String>)> {
    verdicts.iter().find_map(|(name, verdict)| {
        let shown = shown.get(name)?.as_ref();
        let status = status(verdict);
        let same = shown.is_some_and(|shown| {
            shown.status == status
                && shown.reason == verdict.reason
                && shown.message == cut(&verdict.message)
        });
        if same || sent.has(name, verdict) {
            return None;
        }
        let since = shown.filter(|shown| shown.status == status);
        let since = since.map(|shown| shown.since.clone());
        Some((name.clone(), verdict.clone(), since))
    })
}

fn condition(verdict: &Verdict, since: Option<&str>, now: Timestamp) -> serde_json::Value {
    let now = format!("{now:.0}");
    json!({"status": {"conditions": [{
        "type": ACCEPTED,
        "status": status(verdict),
        "reason": verdict.reason,
        "message": cut(&verdict.message),
        "lastTransitionTime": since.unwrap_or(&now),
    }]}})
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
    fn a_peer_is_told_all_that_is_wrong_with_it() {
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
    fn one_agent_alone_speaks() {
        let other = NodeName("b".into());
        assert!(verdicts(&other, &view(&["good"]), &BTreeSet::new()).is_empty());
    }

    #[test]
    fn what_is_there_already_is_not_written() {
        let view = view(&["good"]);
        let verdicts = verdicts(&own(), &view, &BTreeSet::new());
        let written = Sent::default();
        let nothing = [("good".to_owned(), None)].into();
        let (_, verdict, since) = difference(&verdicts, &nothing, &written).unwrap();
        assert_eq!(since, None);

        let status = condition(&verdict, None, Timestamp::UNIX_EPOCH);
        let there = [("good".to_owned(), read(&status["status"]))].into();
        assert_eq!(difference(&verdicts, &there, &written), None);
        // A Peer that is gone meanwhile is nobody's business.
        assert_eq!(difference(&verdicts, &Conditions::new(), &written), None);
    }

    #[test]
    fn a_change_of_the_reason_is_no_transition() {
        let mut view = view(&["bad"]);
        let first = verdicts(&own(), &view, &[notice("bad", "one")].into());
        let status = condition(&first["bad"], None, Timestamp::UNIX_EPOCH);
        let there: Conditions = [("bad".to_owned(), read(&status["status"]))].into();
        let second = verdicts(&own(), &view, &[notice("bad", "two")].into());

        let (_, _, since) = difference(&second, &there, &Sent::default()).unwrap();
        assert_eq!(since.as_deref(), Some("1970-01-01T00:00:00Z"));

        Arc::make_mut(&mut view.snapshot).peers.clear();
        assert!(verdicts(&own(), &view, &BTreeSet::new()).is_empty());
    }

    #[test]
    fn a_peer_that_has_no_status_is_asked_once_for_each_verdict() {
        let view = view(&["good"]);
        let first = verdicts(&own(), &view, &BTreeSet::new());
        let there: Conditions = [("good".to_owned(), None)].into();
        let (now, mut sent) = (Instant::now(), Sent::default());
        sent.untold.insert("good".to_owned(), first["good"].clone());

        sent.forget(&there, now + 100 * OBSERVE_TIMEOUT);
        assert_eq!(difference(&first, &there, &sent), None);
        let second = verdicts(&own(), &view, &[notice("good", "bad")].into());
        assert!(difference(&second, &there, &sent).is_some());

        // Another object of the name may have one.
        sent.forget(&Conditions::new(), now);
        assert!(difference(&first, &there, &sent).is_some());
    }

    #[test]
    fn strange_conditions_are_none() {
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
