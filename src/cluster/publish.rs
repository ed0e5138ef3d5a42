//! Writes this node's annotations on its own Node when they differ from the observed ones.
//!
//! Nothing is written in steady state. The desired annotations are compared with what the watch
//! shows, so an annotation that another program removed is written again. The operator's and
//! flannel's annotations are never touched.

use std::collections::BTreeMap;
use std::time::Duration;

use http::Method;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::access::{Access, Connection};
use super::call::{self, Failure};
use super::{annotation, backoff};
use crate::clock::now;
use crate::topology::NodeName;

/// The annotations to publish; keys of [`annotation::PUBLISHED`] that are missing here are removed.
pub type Annotations = BTreeMap<&'static str, String>;

const STRATEGIC: &str = "application/strategic-merge-patch+json";

/// Debounce: changes within this time are written together.
const DEBOUNCE: Duration = Duration::from_millis(200);
/// Longest wait until the watch shows the written annotations.
const OBSERVE_TIMEOUT: Duration = Duration::from_secs(5);

/// The annotations of the own Node as the watch shows them; `None` before it is listed, and without such a Node.
pub(super) type Observed = Option<BTreeMap<String, String>>;

/// Publishes the desired annotations until their sender is dropped.
pub(super) async fn run(
    node: NodeName,
    mut connections: watch::Receiver<Option<Connection>>,
    mut desired: watch::Receiver<Option<Annotations>>,
    mut observed: watch::Receiver<Observed>,
) {
    let mut backoff = backoff::Backoff::up_to(Duration::from_secs(30));
    // Enough for a start and some changes; then four a minute, even if another program writes these
    // annotations too. Next to Kilo's agents three writes a minute are due, of `last-seen`.
    let mut writes = backoff::Budget::new(10, Duration::from_secs(15));
    loop {
        let patch = {
            let desired = desired.borrow_and_update();
            let observed = observed.borrow_and_update();
            match (desired.as_ref(), observed.as_ref()) {
                (Some(desired), Some(observed)) => difference(desired, observed),
                _ => None,
            }
        };
        let connection = connections.borrow_and_update().clone();
        let (Some(_), Some(connection)) = (patch, connection) else {
            let changed = tokio::select! {
                changed = desired.changed() => changed,
                changed = observed.changed() => changed,
                changed = connections.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
            tokio::time::sleep(DEBOUNCE).await;
            continue;
        };

        let wait = writes.take(now());
        if !wait.is_zero() {
            tracing::warn!(
                wait_seconds = wait.as_secs(),
                "publishing annotations rate-limited: another agent or tool may write them too"
            );
            tokio::time::sleep(wait).await;
        }
        // The state may have changed during the wait.
        let Some(patch) = current(&desired, &observed) else {
            continue;
        };
        match call::call(&connection.client, request(&node, &patch)).await {
            Ok(_) => {
                backoff.reset();
                tracing::info!(annotations = %names(&patch), "annotations published");
                await_observed(&desired, &mut observed).await;
            }
            Err(failure) => {
                let pause = backoff.pause(failure.pause());
                log_failure(&node, &failure, backoff.failures());
                tokio::time::sleep(pause).await;
            }
        }
    }
}

/// Removes all published annotations. Needs only the right to patch; missing annotations are no error.
///
/// # Errors
///
/// No server answers, or the server refuses.
pub async fn withdraw(access: &Access, node: &NodeName) -> anyhow::Result<()> {
    let connection = access.connect(0, None).await?;
    let nothing = Annotations::new();
    let everything = annotation::PUBLISHED
        .iter()
        .map(|key| ((*key).to_owned(), String::new()))
        .collect();
    let patch = difference(&nothing, &everything).unwrap_or_default();
    match call::call(&connection.client, request(node, &patch)).await {
        // A deleted Node has no annotations left.
        Ok(_) | Err(Failure::Absent) => Ok(()),
        Err(failure) => {
            Err(anyhow::Error::new(failure).context(format!("removing the annotations of {node}")))
        }
    }
}

/// The annotations to set, and those to remove as null; `None` where nothing differs.
fn difference(
    desired: &Annotations,
    observed: &BTreeMap<String, String>,
) -> Option<BTreeMap<&'static str, Value>> {
    let patch: BTreeMap<_, _> = annotation::PUBLISHED
        .into_iter()
        .filter(|key| desired.get(key) != observed.get(*key))
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
    observed: &watch::Receiver<Observed>,
) -> Option<BTreeMap<&'static str, Value>> {
    let (desired, observed) = (desired.borrow(), observed.borrow());
    difference(desired.as_ref()?, observed.as_ref()?)
}

/// Waits until the watch shows the written annotations, so that they are not written twice.
async fn await_observed(
    desired: &watch::Receiver<Option<Annotations>>,
    observed: &mut watch::Receiver<Observed>,
) {
    let echo = async {
        while current(desired, observed).is_some() {
            if observed.changed().await.is_err() {
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

/// The names of the annotations, without their prefix.
fn names(patch: &BTreeMap<&'static str, Value>) -> String {
    let names: Vec<_> = patch
        .keys()
        .map(|key| key.rsplit('/').next().unwrap_or(key))
        .collect();
    names.join(" ")
}

fn log_failure(node: &NodeName, failure: &Failure, failures: u32) {
    if *failure == Failure::Absent {
        tracing::warn!(%node, "no Node of this name: set --hostname");
    } else if let Failure::Forbidden(reason) = failure {
        tracing::warn!(%node, error = %reason, "publishing annotations refused: check the ClusterRole and the admission policies");
    } else if failures > 1 {
        tracing::warn!(%node, error = %failure, "publishing annotations failed");
    } else {
        // A single failure is common and needs no attention.
        tracing::debug!(%node, error = %failure, "publishing annotations failed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        pairs.iter().map(owned).collect()
    }

    #[test]
    fn nothing_is_written_when_all_annotations_match() {
        let desired = Annotations::from([(annotation::ENDPOINT, "203.0.113.10:51820".to_owned())]);
        let there = observed(&[(annotation::ENDPOINT, "203.0.113.10:51820")]);
        assert_eq!(difference(&desired, &there), None);
    }

    #[test]
    fn differing_annotations_are_written_and_unwanted_ones_removed() {
        let desired = Annotations::from([
            (annotation::ENDPOINT, "203.0.113.10:51820".to_owned()),
            (annotation::WIREGUARD_IP, String::new()),
        ]);
        let there = observed(&[
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
    fn the_operators_annotations_are_never_in_a_patch() {
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
