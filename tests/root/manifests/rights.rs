//! Which identity may change what: an agent by its token, a kubelet, and all others as before.

use super::*;

/// The annotations that only the operator may change, and no agent or kubelet.
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
        "kilo.squat.ai/wireguard-ip",
        "selvedge.dev/agent",
        "selvedge.dev/candidates",
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
        let policy = "ValidatingAdmissionPolicy 'selvedge-";
        assert!(message.contains(policy), "{what}: {message}");
    }
    // The pod CIDR cannot be changed: the API server refuses it.
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
            assert!(message.contains("selvedge-annotations"), "{key}: {message}");
        }
    }
    // Nor does it get rid of them by making its Node again: Kubernetes itself refuses that.
    assert!(kubelet.delete(node).is_err());
    // The operator's annotations stay; the kubelet may change the rest.
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
        "eventTime": "2026-01-01T00:00:00.000000Z", "type": "Warning", "reason": "SelvedgeExcluded",
        "action": "Ignore", "note": "a test", "reportingController": "selvedge",
        "reportingInstance": "node-b",
        "regarding": {"apiVersion": "v1", "kind": "Node", "name": "node-b", "uid": "node-b"},
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
