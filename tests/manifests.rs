//! The manifests of `deploy/` on a real API server: what they install, what they allow, and what they
//! refuse.
//!
//! Needs root (the control plane runs in a network namespace) and the programs of `lab/build.sh`.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests run kubectl, wait for what it started, and fail by panicking"
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

#[path = "manifests/guide.rs"]
mod guide;

const PEERS: &str = "/apis/kilo.squat.ai/v1alpha1/peers";
const KEY: &str = "oGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=";
const PSK: &str = "PSKwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=";

/// A control plane with the k3s manifests applied and two nodes, shared by the tests that run at once.
struct Cluster {
    // Declared in the order in which they must end.
    plane: ControlPlane,
    node: Node,
    files: Scratch,
}

/// Names of Peers are unique per test, so that the tests do not meet.
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
        let applied = cluster.kubectl(&["apply", "-f", manifest]);
        assert!(
            applied.contains("daemonset.apps/selvedge created"),
            "{applied}"
        );
        for name in ["node-a", "node-b"] {
            cluster.register(name)?;
        }
        cluster.wait_for_admission()?;
        Ok(cluster)
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
        Ok(Self { plane, node, files })
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
        Ok(())
    }

    fn kubectl(&self, args: &[&str]) -> String {
        let mut command = Command::new(program("labcp").unwrap());
        command
            .arg("kubectl")
            .arg("--kubeconfig")
            .arg(self.plane.kubeconfig_path("admin"))
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
        let pods =
            "/api/v1/namespaces/kube-system/pods?labelSelector=app.kubernetes.io/name=selvedge";
        let mut found = None;
        wait_for("the agent's pod", Duration::from_secs(60), || {
            let pods = self.api().get(pods).unwrap();
            let pods = pods["items"].as_array().cloned().unwrap_or_default();
            found = pods.into_iter().find(|pod| pod["spec"]["nodeName"] == node);
            found.is_some()
        })
        .unwrap();
        let pod = found.unwrap();
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {"boundObjectRef": {
                "apiVersion": "v1", "kind": "Pod",
                "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}},
        });
        let account = "/api/v1/namespaces/kube-system/serviceaccounts/selvedge/token";
        let answer = self.api().create(account, &request).unwrap();
        self.api()
            .with_token(answer["status"]["token"].as_str().unwrap())
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

/// The annotations that are the operator's, and nobody's agent's or kubelet's.
const OPERATORS: [&str; 6] = [
    "force-endpoint",
    "force-internal-ip",
    "leader",
    "location",
    "persistent-keepalive",
    "allowed-location-ips",
];

#[test]
fn an_agent_changes_its_own_annotations_on_its_own_node_and_nothing_else() {
    let cluster = cluster();
    let agent = cluster.agent_of("node-a");
    let (own, other) = ("/api/v1/nodes/node-a", "/api/v1/nodes/node-b");
    cluster
        .api()
        .annotate(
            "node-a",
            &[
                ("kilo.squat.ai/leader", Some("true")),
                ("other.example/a", Some("1")),
            ],
        )
        .unwrap();

    // Everything the agent publishes, and taking it back.
    let published = [
        "kilo.squat.ai/cni-compatibility-ip",
        "kilo.squat.ai/discovered-endpoints",
        "kilo.squat.ai/endpoint",
        "kilo.squat.ai/granularity",
        "kilo.squat.ai/internal-ip",
        "kilo.squat.ai/key",
        "kilo.squat.ai/last-seen",
        "kilo.squat.ai/wireguard-ip",
        "selvedge.dev/agent",
    ];
    for key in published {
        assert_eq!(
            patch(&agent, own, &annotations(&json!({key: "x"}))).0,
            200,
            "{key}"
        );
        assert_eq!(
            patch(&agent, own, &annotations(&json!({key: "y"}))).0,
            200,
            "{key}"
        );
        assert_eq!(
            patch(&agent, own, &annotations(&json!({key: null}))).0,
            200,
            "{key}"
        );
    }

    let mut refused = vec![
        (
            "another node",
            other,
            annotations(&json!({"kilo.squat.ai/key": "x"})),
        ),
        (
            "labels",
            own,
            json!({"metadata": {"labels": {"topology.kubernetes.io/region": "x"}}}),
        ),
        (
            "taking a label away",
            own,
            json!({"metadata": {"labels": {"kubernetes.io/os": null}}}),
        ),
        ("taints", own, json!({"spec": {"taints": []}})),
        ("cordoning", own, json!({"spec": {"unschedulable": true}})),
        (
            "the provider's name",
            own,
            json!({"spec": {"providerID": "x://y"}}),
        ),
        (
            "finalizers",
            own,
            json!({"metadata": {"finalizers": ["a.example/b"]}}),
        ),
        (
            "owners",
            own,
            json!({"metadata": {"ownerReferences": [
            {"apiVersion": "v1", "kind": "Node", "name": "node-b", "uid": "u"}]}}),
        ),
        (
            "too long a value",
            own,
            annotations(&json!({"kilo.squat.ai/key": "x".repeat(4097)})),
        ),
        (
            "an operator's annotation taken away",
            own,
            annotations(&json!({"kilo.squat.ai/leader": null})),
        ),
        (
            "a stranger's annotation",
            own,
            annotations(&json!({"other.example/a": "2"})),
        ),
        (
            "a good and a bad one",
            own,
            annotations(&json!({"kilo.squat.ai/key": "x", "a.example/b": "y"})),
        ),
    ];
    for key in OPERATORS {
        let entry = json!({format!("kilo.squat.ai/{key}"): "x"});
        refused.push(("an operator's annotation", own, annotations(&entry)));
    }
    for (what, path, change) in &refused {
        let (status, message) = patch(&agent, path, change);
        assert_eq!(status, 403, "{what}: {message}");
        assert!(message.contains("selvedge-own-node"), "{what}: {message}");
    }
    // The pod CIDR cannot be changed by anybody: the API server itself says so.
    let (status, _) = patch(
        &agent,
        own,
        &json!({"spec": {"podCIDR": "10.42.7.0/24", "podCIDRs": ["10.42.7.0/24"]}}),
    );
    assert!(status == 403 || status == 422, "{status}");

    let status = json!({"status": {"capacity": {"cpu": "99"}}});
    assert_eq!(patch(&agent, &format!("{own}/status"), &status).0, 403);
    assert!(agent.delete(other).is_err());
    assert!(agent.get("/api/v1/secrets").is_err());
    assert!(agent.get("/api/v1/nodes").is_ok() && agent.get(PEERS).is_ok());
}

#[test]
fn a_token_that_is_bound_to_no_node_changes_no_node() {
    let cluster = cluster();
    let token = cluster.plane.token("kube-system", "selvedge").unwrap();
    let loose = cluster.api().with_token(&token);

    let change = annotations(&json!({"kilo.squat.ai/key": "x"}));
    let (status, message) = patch(&loose, "/api/v1/nodes/node-a", &change);

    assert_eq!(status, 403, "{message}");
    assert!(message.contains("must be bound to a node"), "{message}");
}

#[test]
fn a_kubelet_does_not_speak_for_the_operator() {
    let cluster = cluster();
    let kubelet = cluster.kubelet_of_node_b();
    let node = "/api/v1/nodes/node-b";
    let status = "/api/v1/nodes/node-b/status";
    for key in OPERATORS {
        let change = annotations(&json!({format!("kilo.squat.ai/{key}"): "x"}));
        for path in [node, status] {
            let (code, message) = patch(&kubelet, path, &change);
            assert_eq!(code, 403, "{key} of {path}: {message}");
            assert!(message.contains("selvedge-operator"), "{key}: {message}");
        }
    }
    // What the operator said stays, and all else is the kubelet's business.
    let leader = annotations(&json!({"kilo.squat.ai/leader": "true"}));
    let withdrawn = annotations(&json!({"kilo.squat.ai/leader": null}));
    assert_eq!(patch(cluster.api(), node, &leader).0, 200);
    assert_eq!(patch(&kubelet, node, &withdrawn).0, 403);
    let other = annotations(&json!({"node.example/a": "x"}));
    for path in [node, status] {
        assert_eq!(patch(&kubelet, path, &other).0, 200);
    }
    assert_eq!(patch(cluster.api(), node, &withdrawn).0, 200);
}

#[test]
fn others_change_nodes_as_before() {
    let cluster = cluster();
    let change = annotations(&json!({"kilo.squat.ai/force-endpoint": "203.0.113.10:51820"}));
    assert_eq!(patch(cluster.api(), "/api/v1/nodes/node-b", &change).0, 200);
}

#[test]
fn an_agent_reports_events_and_conditions() {
    let cluster = cluster();
    let agent = cluster.agent_of("node-b");
    let spec = json!({"allowedIPs": ["10.77.0.1/32"], "publicKey": KEY});
    assert_eq!(cluster.create_peer("conditions", &spec).0, 201);

    let condition = json!({"status": {"conditions": [{
        "type": "Accepted", "status": "False", "reason": "Overlap", "message": "taken by another",
        "lastTransitionTime": "2026-01-01T00:00:00Z"}]}});
    let (status, message) = patch(&agent, &format!("{PEERS}/conditions/status"), &condition);
    assert_eq!(status, 200, "{message}");
    assert!(cluster.kubectl(&["get", "peers"]).contains("Overlap"));
    // The specification is not the agent's to change.
    let (status, _) = patch(
        &agent,
        &format!("{PEERS}/conditions"),
        &json!({"spec": spec}),
    );
    assert_eq!(status, 403);

    let event = json!({
        "apiVersion": "events.k8s.io/v1", "kind": "Event",
        "metadata": {"generateName": "selvedge-", "namespace": "default"},
        "eventTime": "2026-01-01T00:00:00.000000Z", "type": "Warning", "reason": "Test",
        "action": "Test", "note": "a test", "reportingController": "selvedge",
        "reportingInstance": "node-b",
        "regarding": {"kind": "Node", "name": "node-b", "uid": "node-b"},
    });
    agent
        .create("/apis/events.k8s.io/v1/namespaces/default/events", &event)
        .unwrap();
}

#[test]
fn the_daemonset_reaches_tainted_nodes_too() {
    let cluster = cluster();
    cluster.agent_of("node-a");
    cluster.agent_of("node-b");
}

#[test]
fn every_bad_peer_is_refused_by_the_api() {
    let cluster = cluster();
    let good = json!({"allowedIPs": ["10.5.0.1/32"], "publicKey": KEY});
    let with = |field: &str, value: Value| {
        let mut spec = good.clone();
        spec[field] = value;
        spec
    };
    let endpoint =
        |host: Value, port: Value| with("endpoint", json!({"dnsOrIP": host, "port": port}));
    let mut bad = vec![
        ("no specification", Value::Null),
        ("no key", json!({"allowedIPs": ["10.5.0.1/32"]})),
        ("no allowed IPs", json!({"publicKey": KEY})),
        ("null for allowed IPs", with("allowedIPs", Value::Null)),
        ("null for a key", with("publicKey", Value::Null)),
        (
            "an empty list of allowed IPs",
            with("allowedIPs", json!([])),
        ),
        (
            "too many allowed IPs",
            with(
                "allowedIPs",
                json!(
                    (0..257)
                        .map(|i| format!("10.5.{}.{}/32", i / 250, i % 250))
                        .collect::<Vec<_>>()
                ),
            ),
        ),
        ("a bad preshared key", with("presharedKey", json!("secret"))),
        (
            "a short preshared key",
            with("presharedKey", json!("c2hvcnQ=")),
        ),
        (
            "a preshared key of zeros",
            with(
                "presharedKey",
                json!("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="),
            ),
        ),
        (
            "a negative keepalive",
            with("persistentKeepalive", json!(-1)),
        ),
        (
            "too long a keepalive",
            with("persistentKeepalive", json!(65536)),
        ),
        (
            "a keepalive in words",
            with("persistentKeepalive", json!("25s")),
        ),
        (
            "an endpoint without a host",
            endpoint(json!({}), json!(51820)),
        ),
        (
            "an endpoint with an empty host",
            endpoint(json!({"dns": "", "ip": ""}), json!(51820)),
        ),
        (
            "an endpoint with both",
            endpoint(json!({"dns": "a.example", "ip": "192.0.2.1"}), json!(51820)),
        ),
        (
            "an endpoint without a port",
            with("endpoint", json!({"dnsOrIP": {"ip": "192.0.2.1"}})),
        ),
    ];
    for port in [
        json!(0),
        json!(-1),
        json!(65536),
        json!(70000),
        json!("51820"),
    ] {
        bad.push(("a bad port", endpoint(json!({"ip": "192.0.2.1"}), port)));
    }
    for ip in [
        "192.0.2",
        "192.0.2.256",
        "0.0.0.0",
        "::",
        "127.0.0.1",
        "::1",
        "224.0.0.1",
        "ff02::1",
        "255.255.255.255",
        "169.254.1.1",
        "fe80::1",
        "fe80::1%eth0",
        "::ffff:192.0.2.1",
        "vpn.example",
    ] {
        bad.push(("a bad address", endpoint(json!({"ip": ip}), json!(51820))));
    }
    let long = format!("{}.example", "a".repeat(64));
    for name in [
        "UPPER.example",
        "a_b.example",
        "-a.example",
        "a-.example",
        "a..example",
        ".example",
        "example.",
        "ex ample",
        "exämple.com",
        "192.0.2.256",
        "host.123",
        "a.example:51820",
        &long,
    ] {
        bad.push(("a bad name", endpoint(json!({"dns": name}), json!(51820))));
    }
    for net in [
        "",
        "10.5.0.1",
        "10.5.0.0/33",
        "10.5.0.0/-1",
        "10.5.0/24",
        " 10.5.0.1/32",
        "10.5.0.1/32 ",
        "10.5.0.1/32,10.5.0.2/32",
        "fd00::/129",
        "::ffff:10.5.0.1/128",
        "0.0.0.0/0",
        "::/0",
        "10.0.0.0/7",
        "2000::/3",
        "127.0.0.0/8",
        "::1/128",
        "224.0.0.0/8",
        "ff00::/16",
        "169.254.1.0/24",
        "fe80::/64",
        "0.0.0.0/8",
        "255.255.255.255/32",
        // The networks of a k3s cluster: pods, services, WireGuard addresses, and what holds them.
        "10.42.0.0/16",
        "10.42.3.7/32",
        "10.43.0.1/32",
        "10.4.0.9/32",
        "10.0.0.0/8",
    ] {
        bad.push(("a bad prefix", with("allowedIPs", json!([net]))));
        bad.push((
            "a bad prefix behind a good one",
            with("allowedIPs", json!(["10.5.0.1/32", net])),
        ));
    }
    for key in [
        "",
        "key",
        "c2hvcnQ=",
        "oGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA",
        "oGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDB=",
        "oGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA= ",
        "oGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDAx",
    ] {
        bad.push(("a bad key", with("publicKey", json!(key))));
    }
    for key in LOW_ORDER {
        bad.push(("a key of small order", with("publicKey", json!(key))));
    }

    let count = bad.len();
    let accepted: Vec<_> = bad
        .into_iter()
        .filter(|(_, spec)| {
            let (status, _) = cluster.create_peer("bad", spec);
            if status == 201 {
                cluster.api().delete(&format!("{PEERS}/bad")).unwrap();
            }
            !matches!(status, 400 | 422)
        })
        .map(|(what, spec)| format!("{what}: {spec}"))
        .collect();
    assert!(accepted.is_empty(), "accepted of {count}: {accepted:#?}");
}

#[test]
fn the_networks_that_no_peer_may_claim_are_written_as_people_write_lists() {
    let cluster = cluster();
    let api = cluster.api();
    // Lists of its own, for labelled Peers alone: other tests' Peers are judged at the same time.
    let label = json!({"list": "of-people"});
    let policies = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings";
    let list = "/api/v1/namespaces/kube-system/configmaps";
    let config_map = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "of-people"},
        "data": {"networks": " 172.31.0.0/16 , fd31::/16,\n"},
    });
    api.create(list, &config_map).unwrap();
    let binding = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": "of-people"},
        "spec": {
            "policyName": "selvedge-peers", "validationActions": ["Deny"],
            "paramRef": {"name": "of-people", "namespace": "kube-system", "parameterNotFoundAction": "Allow"},
            "matchResources": {"objectSelector": {"matchLabels": label}},
        },
    });
    api.create(policies, &binding).unwrap();
    let create = |net: &str| {
        let peer = json!({
            "apiVersion": "kilo.squat.ai/v1alpha1", "kind": "Peer",
            "metadata": {"name": "of-people", "labels": label},
            "spec": {"allowedIPs": [net], "publicKey": KEY},
        });
        let (status, answer) = api
            .request("POST", PEERS, "application/json", Some(&peer))
            .unwrap();
        if status == 201 {
            api.delete(&format!("{PEERS}/of-people")).unwrap();
        }
        (status, answer.to_string())
    };

    wait_for("a list with spaces", Duration::from_secs(30), || {
        create("172.31.7.0/24").0 == 422
    })
    .unwrap();
    assert_eq!(create("fd31:7::/64").0, 422);
    assert_eq!(create("172.30.7.0/24").0, 201);

    let mistake = json!({"data": {"networks": "172.31.0.0,10.42.0.0/16"}});
    let (status, answer) = patch(api, &format!("{list}/of-people"), &mistake);
    assert_eq!(status, 200, "{answer}");
    let mut told = (201, String::new());
    wait_for("a list with a mistake", Duration::from_secs(30), || {
        told = create("172.30.7.0/24");
        told.0 != 201
    })
    .unwrap();
    assert!(
        told.1
            .contains("selvedge-networks holds 172.31.0.0, which is no network"),
        "{told:?}"
    );
}

/// Points of small order (RFC 7748, 6.1), also with the bit set that is ignored.
const LOW_ORDER: [&str; 14] = [
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAIA=",
    "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
    "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAIA=",
    "4Ot6fDtBuK4WVuP68Z/EatoJjeucMrH9hmIFFl9JuAA=",
    "4Ot6fDtBuK4WVuP68Z/EatoJjeucMrH9hmIFFl9JuIA=",
    "X5yVvKNQjCSx0LFVnIPvWwREXMRYHI6G2CJO3dCfEVc=",
    "X5yVvKNQjCSx0LFVnIPvWwREXMRYHI6G2CJO3dCfEdc=",
    "7P///////////////////////////////////////38=",
    "7P////////////////////////////////////////8=",
    "7f///////////////////////////////////////38=",
    "7f////////////////////////////////////////8=",
    "7v///////////////////////////////////////38=",
    "7v////////////////////////////////////////8=",
];

#[test]
fn peers_as_kilos_users_write_them_are_accepted() {
    let cluster = cluster();
    let good = [
        json!({"allowedIPs": ["10.5.0.1/32"], "publicKey": KEY, "persistentKeepalive": 10}),
        json!({"allowedIPs": ["10.5.0.0/24", "192.168.77.0/24", "fd00:5::1/128"], "publicKey": KEY, "presharedKey": PSK}),
        // Host bits are masked, as in Kilo.
        json!({"allowedIPs": ["10.5.0.7/24"], "publicKey": KEY, "presharedKey": "", "persistentKeepalive": 0}),
        json!({"allowedIPs": ["10.5.0.1/32"], "publicKey": KEY,
            "endpoint": {"dnsOrIP": {"dns": "vpn.example.com"}, "port": 51820}}),
        json!({"allowedIPs": ["10.5.0.1/32"], "publicKey": KEY,
            "endpoint": {"dnsOrIP": {"ip": "192.0.2.1", "dns": ""}, "port": 1}}),
        json!({"allowedIPs": ["10.5.0.1/32"], "publicKey": KEY,
            "endpoint": {"dnsOrIP": {"ip": "2001:db8::1"}, "port": 65535}}),
    ];
    for spec in good {
        let (status, answer) = cluster.create_peer("good", &spec);
        assert_eq!(status, 201, "{spec}: {answer}");
        cluster.api().delete(&format!("{PEERS}/good")).unwrap();
    }
}

#[test]
fn a_peers_name_may_have_253_characters_and_no_more() {
    let cluster = cluster();
    let spec = json!({"allowedIPs": ["10.5.0.9/32"], "publicKey": KEY});
    let label = "n".repeat(63);
    let longest = [label.as_str(), &label, &label, &label[..61]].join(".");
    assert_eq!(longest.len(), 253);
    let (status, answer) = cluster.create_peer(&longest, &spec);
    assert_eq!(status, 201, "{answer}");
    let path = format!("{PEERS}/{longest}");
    cluster.api().delete(&path).unwrap();
    for name in [
        format!("{longest}n").as_str(),
        "Laptop",
        "a_b",
        "-a",
        "a/b",
        "",
    ] {
        let (status, answer) = cluster.create_peer(name, &spec);
        assert!(matches!(status, 400 | 422), "{name}: {status} {answer}");
    }
}

#[test]
fn a_peer_that_kilo_let_in_stays_and_can_be_labelled_but_not_made_worse() {
    let cluster = cluster();
    let path = format!("{PEERS}/old");

    let label = json!({"metadata": {"labels": {"a": "b"}}});
    assert_eq!(patch(cluster.api(), &path, &label).0, 200);
    let worse = json!({"spec": {"allowedIPs": ["0.0.0.0/0", "other nonsense"]}});
    assert_eq!(patch(cluster.api(), &path, &worse).0, 422);
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

#[test]
fn the_agent_gets_net_admin_and_nothing_else_of_the_host() {
    for overlay in ["k3s", "kubeadm"] {
        let daemonset = object(overlay, "DaemonSet");
        let pod = &daemonset["spec"]["template"]["spec"];
        assert_eq!(pod["priorityClassName"], "system-node-critical");
        assert_eq!(pod["hostNetwork"], true);
        assert_eq!(pod["hostPID"], Value::Null);
        assert_eq!(pod["initContainers"], Value::Null);
        assert_eq!(
            pod["securityContext"]["seccompProfile"]["type"],
            "RuntimeDefault"
        );

        let containers = pod["containers"].as_array().unwrap();
        assert_eq!(containers.len(), 1);
        let container = &containers[0];
        assert_eq!(
            container["securityContext"],
            json!({
                "privileged": false, "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                "runAsUser": 0, "runAsGroup": 0,
                "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]},
            })
        );
        for probe in ["livenessProbe", "readinessProbe"] {
            assert_eq!(container[probe]["httpGet"]["host"], "127.0.0.1", "{probe}");
        }
        assert!(
            container["ports"]
                == json!([{"name": "metrics", "containerPort": 1107, "hostPort": 1107, "hostIP": "127.0.0.1"}]),
            "the host's loopback alone: {}",
            container["ports"]
        );
        assert!(container["resources"]["limits"]["memory"].is_string());
        assert!(container["resources"]["limits"]["cpu"].is_null());

        let mounted: Vec<_> = pod["volumes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|volume| {
                volume["hostPath"]["path"]
                    .as_str()
                    .expect("only paths of the host")
            })
            .collect();
        let mut expected = vec![
            "/dev/net/tun",
            "/var/lib/selvedge",
            "/run/selvedge",
            "/var/run/wireguard",
            "/run/flannel",
            "/var/lib/kilo",
        ];
        if overlay == "k3s" {
            expected.push("/var/lib/rancher/k3s/agent/etc/flannel");
        }
        assert_eq!(mounted, expected);
    }
}

#[test]
fn the_agents_rights_are_these() {
    let role = object("k3s", "ClusterRole");
    assert_eq!(
        role["rules"],
        json!([
            {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch", "patch"]},
            {"apiGroups": ["kilo.squat.ai"], "resources": ["peers"], "verbs": ["get", "list", "watch"]},
            {"apiGroups": ["kilo.squat.ai"], "resources": ["peers/status"], "verbs": ["patch"]},
            {
                "apiGroups": ["discovery.k8s.io"],
                "resources": ["endpointslices"],
                "resourceNames": ["kubernetes"],
                "verbs": ["list"],
            },
            {"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create"]},
        ])
    );
}

#[test]
fn the_agents_arguments_are_valid_flags() {
    for overlay in ["k3s", "kubeadm"] {
        let daemonset = object(overlay, "DaemonSet");
        let args = daemonset["spec"]["template"]["spec"]["containers"][0]["args"].clone();
        let mut args: Vec<String> = serde_json::from_value(args).unwrap();
        args.iter_mut()
            .for_each(|arg| *arg = arg.replace("$(NODE_NAME)", "node-a"));
        // A bad value after them is what gets refused, so they themselves were not.
        args.push("--log-level=loud".into());
        let output = Command::new(env!("CARGO_BIN_EXE_selvedge"))
            .arg("agent")
            .args(&args)
            .output()
            .unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{complaint}");
        assert!(complaint.contains("--log-level \"loud\""), "{complaint}");
    }
}

/// The one object of a kind in the file of an overlay.
fn object(overlay: &str, kind: &str) -> Value {
    use serde::Deserialize as _;
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("deploy/selvedge-{overlay}.yaml"));
    let text = std::fs::read_to_string(path).unwrap();
    let mut objects = serde_yaml_ng::Deserializer::from_str(&text)
        .map(|document| Value::deserialize(document).unwrap())
        .filter(|object| object["kind"] == kind);
    let object = objects.next().unwrap();
    assert!(objects.next().is_none(), "more than one {kind}");
    object
}
