//! Checks whether the admission policies of the manifests are in force.
//!
//! RBAC alone lets an agent patch every Node, so without the policies a stolen token controls the mesh.
//! One agent of the cluster, the reporter for Peers, checks soon after its start and then every ten
//! minutes, with fourteen small requests. The other agents make no such requests. `selvedge doctor`
//! checks on every run. The contents of the policies are not checked: an operator may change them.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use serde::Deserialize;
use tokio::sync::watch;

use super::access::{Access, Connection};
use super::call::{self, Failure};
use super::events::{self, Notice};
use super::{ApiStatus, Object, View};
use crate::topology::NodeName;

/// The policies of `deploy/base/admission.yaml`. Their bindings have the same names.
pub const NAMES: [&str; 6] = [
    "selvedge-annotations",
    "selvedge-events",
    "selvedge-own-node",
    "selvedge-peers",
    "selvedge-pod-cidrs",
    "selvedge-region",
];

/// What the operator should do where a policy is missing.
pub const REMEDY: &str = "Apply the manifest again (deploy/selvedge-k3s.yaml or deploy/selvedge-kubeadm.yaml); the policies need Kubernetes 1.30.";

const GROUP: &str = "/apis/admissionregistration.k8s.io/v1";
/// Interval between two checks, as a multiple of the delay of the first: an operator who deletes a
/// policy by mistake gets an Event within ten minutes.
const REPEAT_FACTOR: u32 = 10;

/// A policy that is not in force.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Gap {
    /// The policy's name.
    pub policy: &'static str,
    /// What is wrong.
    pub fault: Fault,
}

/// Why a policy is not in force.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Fault {
    /// There is no such policy.
    Missing,
    /// No binding of this name binds the policy.
    Unbound,
    /// The binding only warns or writes audit records.
    NotDenying,
    /// The ConfigMap that the binding names is missing, and the binding then admits every request.
    WithoutParameter,
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fault = match self.fault {
            Fault::Missing => "is missing",
            Fault::Unbound => "has no binding",
            Fault::NotDenying => "has a binding that denies nothing",
            Fault::WithoutParameter => "lacks its ConfigMap (selvedge-networks)",
        };
        write!(f, "the admission policy {} {fault}", self.policy)
    }
}

/// The parts of a binding that are read.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Binding {
    spec: BindingSpec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct BindingSpec {
    policy_name: String,
    validation_actions: Vec<String>,
    param_ref: Option<Parameter>,
}

/// The ConfigMap that a policy's expressions read.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Parameter {
    name: String,
    namespace: String,
}

/// Reads all policies and their bindings.
async fn find_gaps(client: &Client) -> Result<BTreeSet<Gap>, Failure> {
    let mut gaps = BTreeSet::new();
    for policy in NAMES {
        let path = format!("{GROUP}/validatingadmissionpolicies/{policy}");
        let fault = match call::call(client, call::get(&path)).await {
            Ok(_) => fault_of_binding(client, policy).await?,
            Err(Failure::Absent) => Some(Fault::Missing),
            Err(failure) => return Err(failure),
        };
        gaps.extend(fault.map(|fault| Gap { policy, fault }));
    }
    Ok(gaps)
}

async fn fault_of_binding(client: &Client, policy: &str) -> Result<Option<Fault>, Failure> {
    let path = format!("{GROUP}/validatingadmissionpolicybindings/{policy}");
    let answer = match call::call(client, call::get(&path)).await {
        Ok(answer) => answer,
        Err(Failure::Absent) => return Ok(Some(Fault::Unbound)),
        Err(failure) => return Err(failure),
    };
    let binding: Binding = serde_json::from_slice(&answer)
        .map_err(|error| Failure::Unreadable(crate::text::message(&error.to_string())))?;
    let fault = judge(policy, &binding);
    let Some(Parameter { name, namespace }) = binding.spec.param_ref.filter(|_| fault.is_none())
    else {
        return Ok(fault);
    };
    let path = format!("/api/v1/namespaces/{namespace}/configmaps/{name}");
    match call::call(client, call::get(&path)).await {
        Ok(_) => Ok(None),
        Err(Failure::Absent) => Ok(Some(Fault::WithoutParameter)),
        Err(failure) => Err(failure),
    }
}

/// The fault of a binding, if any.
fn judge(policy: &str, binding: &Binding) -> Option<Fault> {
    let Binding { spec } = binding;
    if spec.policy_name != policy {
        Some(Fault::Unbound)
    } else if spec
        .validation_actions
        .iter()
        .all(|action| action != "Deny")
    {
        Some(Fault::NotDenying)
    } else {
        None
    }
}

impl Access {
    /// The policies that are not in force, one sentence without a full stop each; for `doctor`.
    ///
    /// # Errors
    ///
    /// Why the check failed: a clause.
    pub async fn missing_policies(&self) -> Result<Vec<String>, String> {
        let connection = self.connect(0, None).await.map_err(|e| e.to_string())?;
        let gaps = find_gaps(&connection.client)
            .await
            .map_err(|e| e.to_string())?;
        Ok(gaps.iter().map(ToString::to_string).collect())
    }
}

/// The notice for the log and for an Event on the Node of the agent that checked.
pub(super) fn notice(own: &NodeName, missing: &[String]) -> Option<Notice> {
    (!missing.is_empty()).then(|| Notice {
        object: Object::Node(own.clone()),
        field: "admission policies".to_owned(),
        reason: "SelvedgePolicyMissing",
        note: format!(
            "tokens of nodes may change more of the mesh than they should: {}. {REMEDY}",
            missing.join(", ")
        ),
    })
}

/// Checks periodically while this agent is the checking one, and publishes the missing policies.
pub(super) async fn run(
    own: NodeName,
    connections: watch::Receiver<Option<Connection>>,
    mut views: watch::Receiver<Option<Arc<View>>>,
    statuses: watch::Sender<ApiStatus>,
    first: Duration,
) {
    let publish = |missing: Vec<String>| {
        statuses.send_if_modified(|api_status| {
            let changed = api_status.missing_policies != missing;
            api_status.missing_policies = missing;
            changed
        });
    };
    let mut pause = first;
    loop {
        let checks =
            |view: &Option<Arc<View>>| view.as_deref().is_some_and(|view| is_checker(&own, view));
        if views.wait_for(checks).await.is_err() {
            return;
        }
        tokio::time::sleep(pause).await;
        if !checks(&views.borrow()) {
            publish(Vec::new());
            pause = first;
            continue;
        }
        let Some(connection) = connections.borrow().clone() else {
            continue;
        };
        pause = first * REPEAT_FACTOR;
        match find_gaps(&connection.client).await {
            Ok(gaps) => publish(gaps.iter().map(ToString::to_string).collect()),
            Err(Failure::Forbidden(reason)) => {
                tracing::info!(error = %reason, "reading admission policies refused: check the ClusterRole");
            }
            Err(failure) => tracing::debug!(error = %failure, "reading admission policies failed"),
        }
    }
}

/// Whether this agent is the one that checks.
fn is_checker(own: &NodeName, view: &View) -> bool {
    view.live && events::is_reporter(own, &Object::Peer(String::new()), &view.snapshot)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn binding(policy: &str, actions: &[&str]) -> Binding {
        let object =
            serde_json::json!({"spec": {"policyName": policy, "validationActions": actions}});
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn a_binding_counts_only_if_it_denies_and_names_its_policy() {
        let judge = |bound, actions: &[&str]| judge("selvedge-region", &binding(bound, actions));
        assert_eq!(judge("selvedge-region", &["Deny", "Audit"]), None);
        assert_eq!(
            judge("selvedge-region", &["Warn", "Audit"]),
            Some(Fault::NotDenying)
        );
        assert_eq!(judge("selvedge-peers", &["Deny"]), Some(Fault::Unbound));
    }

    #[test]
    fn a_notice_names_the_missing_policy_and_the_remedy() {
        let own = NodeName("a1".to_owned());
        assert_eq!(notice(&own, &[]), None);
        let gap = Gap {
            policy: "selvedge-region",
            fault: Fault::Missing,
        };
        let note = notice(&own, &[gap.to_string()]).unwrap().note;
        assert_eq!(
            note,
            "tokens of nodes may change more of the mesh than they should: the admission policy selvedge-region is missing. Apply the manifest again (deploy/selvedge-k3s.yaml or deploy/selvedge-kubeadm.yaml); the policies need Kubernetes 1.30."
        );
    }
}
