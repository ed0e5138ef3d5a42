//! Writes this node's own annotations on its own Node, when they differ from what is there.
//!
//! Nothing is written in steady state: what is published is compared with what the watch shows, so
//! that a removal by somebody else is noticed too. No annotation of the operator's or flannel's is
//! ever touched.

use std::collections::BTreeMap;
use std::time::Duration;

use http::Method;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::access::{Access, Connection};
use super::call::{self, Failure};
use super::{annotation, backoff};
use crate::topology::NodeName;

/// What is to be published; keys of [`annotation::PUBLISHED`] that are left out are removed.
pub type Annotations = BTreeMap<&'static str, String>;

const STRATEGIC: &str = "application/strategic-merge-patch+json";

/// Changes that come together are written together.
const QUIET: Duration = Duration::from_millis(200);
/// How long the watch may take to show what was written.
const OBSERVE_TIMEOUT: Duration = Duration::from_secs(5);

/// What the watch shows of the own Node; none until it is listed, and where there is no such Node.
pub(super) type Shown = Option<BTreeMap<String, String>>;

/// Publishes until the desired annotations are not wanted any more.
pub(super) async fn run(
    node: NodeName,
    mut connections: watch::Receiver<Option<Connection>>,
    mut desired: watch::Receiver<Option<Annotations>>,
    mut shown: watch::Receiver<Shown>,
) {
    let mut backoff = backoff::Backoff::up_to(Duration::from_secs(30));
    // A start and a few changes of mind; then four a minute, whoever else writes these annotations.
    // Beside Kilo's agents three signs of life a minute are due.
    let mut writes = backoff::Budget::new(10, Duration::from_secs(15));
    loop {
        let patch = {
            let desired = desired.borrow_and_update();
            let shown = shown.borrow_and_update();
            match (desired.as_ref(), shown.as_ref()) {
                (Some(desired), Some(shown)) => difference(desired, shown),
                _ => None,
            }
        };
        let connection = connections.borrow_and_update().clone();
        let (Some(_), Some(connection)) = (patch, connection) else {
            let changed = tokio::select! {
                changed = desired.changed() => changed,
                changed = shown.changed() => changed,
                changed = connections.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
            tokio::time::sleep(QUIET).await;
            continue;
        };

        let wait = writes.take(Instant::now());
        if !wait.is_zero() {
            tracing::warn!(
                seconds = wait.as_secs(),
                "this node's annotations keep changing: does another agent, or a tool, write them too? Writing is slowed down"
            );
            tokio::time::sleep(wait).await;
        }
        // What was true before the wait may not be any more.
        let Some(patch) = current(&desired, &shown) else {
            continue;
        };
        match call::call(&connection.client, request(&node, &patch)).await {
            Ok(_) => {
                backoff.reset();
                tracing::info!(annotations = %names(&patch), "published");
                await_observed(&desired, &mut shown).await;
            }
            Err(failure) => {
                let pause = backoff.pause(failure.pause());
                log_failure(&node, &failure, backoff.failures());
                tokio::time::sleep(pause).await;
            }
        }
    }
}

/// Removes what was published. Needs no right but to patch, and minds nothing that is missing.
///
/// # Errors
///
/// No server, or one that refuses.
pub async fn withdraw(access: &Access, node: &NodeName) -> anyhow::Result<()> {
    let connection = access.connect(0, None).await?;
    let nothing = Annotations::new();
    let everything = annotation::PUBLISHED
        .iter()
        .map(|key| ((*key).to_owned(), String::new()))
        .collect();
    let patch = difference(&nothing, &everything).unwrap_or_default();
    match call::call(&connection.client, request(node, &patch)).await {
        // A Node that is gone took its annotations with it.
        Ok(_) | Err(Failure::Absent) => Ok(()),
        Err(failure) => {
            Err(anyhow::Error::new(failure).context(format!("removing the annotations of {node}")))
        }
    }
}

/// The annotations to set, and with null those to remove; none where nothing is to be done.
fn difference(
    desired: &Annotations,
    shown: &BTreeMap<String, String>,
) -> Option<BTreeMap<&'static str, Value>> {
    let patch: BTreeMap<_, _> = annotation::PUBLISHED
        .into_iter()
        .filter(|key| desired.get(key) != shown.get(*key))
        .map(|key| {
            (
                key,
                desired.get(key).map_or(Value::Null, |value| json!(value)),
            )
        })
        .collect();
    (!patch.is_empty()).then_some(patch)
}

fn current(
    desired: &watch::Receiver<Option<Annotations>>,
    shown: &watch::Receiver<Shown>,
) -> Option<BTreeMap<&'static str, Value>> {
    let (desired, shown) = (desired.borrow(), shown.borrow());
    difference(desired.as_ref()?, shown.as_ref()?)
}

/// Waits until the watch shows what was written, so that it is not written twice.
async fn await_observed(
    desired: &watch::Receiver<Option<Annotations>>,
    shown: &mut watch::Receiver<Shown>,
) {
    let echo = async {
        while current(desired, shown).is_some() {
            if shown.changed().await.is_err() {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(OBSERVE_TIMEOUT, echo).await;
}

fn request(
    node: &NodeName,
    patch: &BTreeMap<&'static str, Value>,
) -> http::Request<kube::client::Body> {
    let path = format!("/api/v1/nodes/{}?fieldManager=selvedge", node.0);
    let body = json!({"metadata": {"annotations": patch}});
    call::send_json(Method::PATCH, &path, STRATEGIC, &body)
}

/// The names of the annotations, without the prefix that all share.
fn names(patch: &BTreeMap<&'static str, Value>) -> String {
    let names: Vec<_> = patch
        .keys()
        .map(|key| key.rsplit('/').next().unwrap_or(key))
        .collect();
    names.join(" ")
}

fn log_failure(node: &NodeName, failure: &Failure, failures: u32) {
    if *failure == Failure::Absent {
        tracing::warn!(%node, "there is no Node of this name: give --hostname");
    } else if let Failure::Forbidden(reason) = failure {
        tracing::warn!(%node, %reason, "the agent may not write its own annotations: check its ClusterRole and the admission policies");
    } else if failures > 1 {
        tracing::warn!(%node, %failure, "publishing failed");
    } else {
        // One failure is everyday life.
        tracing::debug!(%node, %failure, "publishing failed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        pairs.iter().map(owned).collect()
    }

    #[test]
    fn nothing_is_written_when_all_is_there() {
        let desired = Annotations::from([(annotation::ENDPOINT, "203.0.113.10:51820".to_owned())]);
        let there = shown(&[(annotation::ENDPOINT, "203.0.113.10:51820")]);
        assert_eq!(difference(&desired, &there), None);
    }

    #[test]
    fn only_what_differs_is_written_and_what_is_not_wanted_is_removed() {
        let desired = Annotations::from([
            (annotation::ENDPOINT, "203.0.113.10:51820".to_owned()),
            (annotation::WIREGUARD_IP, String::new()),
        ]);
        let there = shown(&[
            (annotation::ENDPOINT, "203.0.113.10:51820"),
            (annotation::LAST_SEEN, "1767225600"),
        ]);
        let patch = difference(&desired, &there).unwrap();
        assert_eq!(
            json!(patch),
            json!({"kilo.squat.ai/last-seen": null, "kilo.squat.ai/wireguard-ip": ""})
        );
    }

    #[test]
    fn nothing_of_the_operators_is_ever_in_a_patch() {
        for key in [
            annotation::FORCE_ENDPOINT,
            annotation::FORCE_INTERNAL_IP,
            annotation::LEADER,
            annotation::LOCATION,
            annotation::PERSISTENT_KEEPALIVE,
            annotation::ALLOWED_LOCATION_IPS,
        ] {
            assert!(!annotation::PUBLISHED.contains(&key));
        }
    }
}
