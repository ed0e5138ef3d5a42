//! The manifests of `deploy/` on a real API server: what they install, what they allow, and what they
//! refuse.
//!
//! Needs root (the control plane runs in a network namespace) and the programs of `lab/build.sh`.

#![expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "tests run kubectl, wait for what it started, print their tables, and fail by panicking"
)]

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use selvedge_lab::controlplane::program;
use selvedge_lab::netns::require_root;
use selvedge_lab::{Client, ControlPlane, Namespace, Node, Scratch, scratch, wait_for};
use serde_json::{Value, json};

mod attempts;
mod guide;
mod peers;
mod rights;

const PEERS: &str = "/apis/kilo.squat.ai/v1alpha1/peers";
const KEY: &str = "oGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=";
const PSK: &str = "PSKwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=";

/// A control plane with the k3s manifests applied and two nodes, shared by the tests that run at once.
struct Cluster {
    // Declared in the order in which they must end.
    plane: ControlPlane,
    node: Node,
    files: Scratch,
    /// Where Selvedge is installed.
    namespace: &'static str,
}

/// Names of Peers are unique per test, so that tests do not disturb each other.
fn cluster() -> Arc<Cluster> {
    static SHARED: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());
    let mut shared = SHARED
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    shared.upgrade().unwrap_or_else(|| {
        let cluster = Arc::new(Cluster::start().unwrap());
        *shared = Arc::downgrade(&cluster);
        cluster
    })
}

impl Cluster {
    fn start() -> anyhow::Result<Self> {
        let cluster = Self::empty("manifests")?;
        cluster.leave_as_kilo_did()?;
        let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/selvedge-k3s.yaml");
        cluster.install(&["apply", "-f", manifest])?;
        Ok(cluster)
    }

    /// Applies the manifests, registers two nodes, and waits until the policies are in force.
    fn install(&self, apply: &[&str]) -> anyhow::Result<()> {
        let applied = self.kubectl(apply);
        assert!(
            applied.contains("daemonset.apps/selvedge created"),
            "{applied}"
        );
        for name in ["node-a", "node-b"] {
            self.register(name)?;
        }
        self.wait_for_admission()
    }

    /// A control plane without anything.
    fn empty(label: &str) -> anyhow::Result<Self> {
        require_root()?;
        let address = Ipv4Addr::new(203, 0, 113, 10);
        let files = scratch(label)?;
        let namespace = Namespace::new(label)?;
        namespace.run(&format!("ip addr add {address}/32 dev lo"))?;
        let node = Node::new("node-a", address, namespace, files.path().join("node-a"))?;
        let plane = ControlPlane::start(&node, address, &files.path().join("plane"))?;
        Ok(Self {
            plane,
            node,
            files,
            namespace: "kube-system",
        })
    }

    fn api(&self) -> &Client {
        self.plane.admin()
    }

    /// Installs Kilo's definition of the resource, which checks next to nothing, and a Peer of the kind
    /// that Kilo's agents ignore in silence.
    fn leave_as_kilo_did(&self) -> anyhow::Result<()> {
        let string = json!({"type": "string"});
        let spec = json!({
            "type": "object", "required": ["allowedIPs", "publicKey"],
            "properties": {
                "allowedIPs": {"type": "array", "items": string},
                "endpoint": {"type": "object", "required": ["dnsOrIP", "port"], "properties": {
                    "dnsOrIP": {"type": "object", "properties": {"dns": string, "ip": string}},
                    "port": {"type": "integer", "format": "int32"}}},
                "persistentKeepalive": {"type": "integer"},
                "presharedKey": string,
                "publicKey": string,
            },
        });
        let schema = json!({"type": "object", "required": ["spec"], "properties": {"spec": spec}});
        self.api().create(
            "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
            &json!({
                "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
                "metadata": {"name": "peers.kilo.squat.ai"},
                "spec": {
                    "group": "kilo.squat.ai", "scope": "Cluster",
                    "names": {"kind": "Peer", "listKind": "PeerList", "plural": "peers", "singular": "peer"},
                    "versions": [{"name": "v1alpha1", "served": true, "storage": true,
                        "schema": {"openAPIV3Schema": schema}}],
                },
            }),
        )?;
        let bad = json!({"allowedIPs": ["0.0.0.0/0", "nonsense"], "publicKey": KEY, "presharedKey": "secret"});
        wait_for("Kilo's definition", Duration::from_secs(30), || {
            self.create_peer("old", &bad).0 == 201
        })?;
        Ok(())
    }

    /// Registers a node with room for pods and a taint that keeps ordinary ones away.
    fn register(&self, name: &str) -> anyhow::Result<()> {
        self.api().create(
            "/api/v1/nodes",
            &json!({
                "apiVersion": "v1", "kind": "Node",
                "metadata": {"name": name, "labels": {"kubernetes.io/os": "linux"}},
                "spec": {"taints": [
                    {"key": "node.example/new", "effect": "NoSchedule"},
                    {"key": "node.example/sick", "effect": "NoExecute"}]},
            }),
        )?;
        let room = json!({"cpu": "2", "memory": "2Gi", "pods": "10"});
        self.api().merge(
            &format!("/api/v1/nodes/{name}/status"),
            &json!({"status": {
                "capacity": room, "allocatable": room,
                "conditions": [{"type": "Ready", "status": "True", "reason": "Test"}]}}),
        )?;
        Ok(())
    }

    /// The API server takes policies up some time after they were created.
    fn wait_for_admission(&self) -> anyhow::Result<()> {
        let overlap = json!({"allowedIPs": ["10.42.0.0/16"], "publicKey": KEY});
        wait_for("the policy on Peers", Duration::from_secs(30), || {
            let (status, _) = self.create_peer("probe", &overlap);
            if status == 201 {
                let _ = self.api().delete(&format!("{PEERS}/probe"));
            }
            status == 422
        })?;
        let kubelet = self.kubelet_of_node_b();
        let leader = annotations(&json!({"kilo.squat.ai/leader": "probe"}));
        wait_for("the policy on annotations", Duration::from_secs(30), || {
            patch(&kubelet, "/api/v1/nodes/node-b", &leader).0 == 403
        })?;
        let withdrawn = annotations(&json!({"kilo.squat.ai/leader": null}));
        self.api().merge("/api/v1/nodes/node-b", &withdrawn)?;
        Ok(())
    }

    fn kubectl(&self, args: &[&str]) -> String {
        let mut command = Command::new(program("labcp").unwrap());
        command
            .arg("kubectl")
            .arg("--kubeconfig")
            .arg(self.plane.kubeconfig_path("admin"))
            // Clusters of other tests have the same address, and other kinds of objects.
            .arg("--cache-dir")
            .arg(self.files.path().join("kubectl"))
            .args(args);
        let output = self.node.output(command).unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "kubectl {args:?}: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text
    }

    /// A client with the rights of the kubelet of `node-b`.
    fn kubelet_of_node_b(&self) -> Client {
        let path = self.plane.kubeconfig_path("system:node:node-b");
        let kubeconfig: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let token = &kubeconfig["users"][0]["user"]["token"];
        self.api().with_token(token.as_str().unwrap())
    }

    fn create_peer(&self, name: &str, spec: &Value) -> (u16, Value) {
        let peer = json!({
            "apiVersion": "kilo.squat.ai/v1alpha1", "kind": "Peer",
            "metadata": {"name": name}, "spec": spec,
        });
        let json = "application/json";
        self.api()
            .request("POST", PEERS, json, Some(&peer))
            .unwrap()
    }

    /// A client with the token that the agent's pod on a node has.
    fn agent_of(&self, node: &str) -> Client {
        self.api().with_token(&self.agents_token(node))
    }

    fn agents_token(&self, node: &str) -> String {
        let pods = format!(
            "/api/v1/namespaces/{}/pods?labelSelector=app.kubernetes.io/name=selvedge",
            self.namespace
        );
        let mut found = None;
        wait_for("the agent's pod", Duration::from_secs(60), || {
            let pods = self.api().get(&pods).unwrap();
            let pods = pods["items"].as_array().cloned().unwrap_or_default();
            found = pods.into_iter().find(|pod| pod["spec"]["nodeName"] == node);
            found.is_some()
        })
        .unwrap();
        self.bound_token(self.namespace, "selvedge", &found.unwrap())
    }

    /// A client with the token that a pod of a service account has.
    fn bound(&self, namespace: &str, account: &str, pod: &Value) -> Client {
        self.api()
            .with_token(&self.bound_token(namespace, account, pod))
    }

    fn bound_token(&self, namespace: &str, account: &str, pod: &Value) -> String {
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]});
        let token = self.plane.bound_token(namespace, account, &object);
        token.unwrap()
    }
}

fn patch(client: &Client, path: &str, patch: &Value) -> (u16, String) {
    let merge = "application/merge-patch+json";
    let (status, answer) = client.request("PATCH", path, merge, Some(patch)).unwrap();
    (
        status,
        answer["message"].as_str().unwrap_or_default().to_owned(),
    )
}

fn annotations(entries: &Value) -> Value {
    json!({"metadata": {"annotations": entries}})
}

#[test]
fn the_files_people_apply_are_in_step_with_their_overlays() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy");
    for overlay in ["k3s", "kubeadm"] {
        let output = Command::new(program("labcp").unwrap())
            .args(["kubectl", "kustomize"])
            .arg(root.join(overlay))
            .output()
            .unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{overlay}: {complaint}");
        let file = std::fs::read_to_string(root.join(format!("selvedge-{overlay}.yaml"))).unwrap();
        let rendered = String::from_utf8(output.stdout).unwrap();
        let stored: String = file.split_inclusive('\n').skip(2).collect();
        assert!(
            stored == rendered,
            "run deploy/generate: selvedge-{overlay}.yaml is out of step"
        );
    }
}
