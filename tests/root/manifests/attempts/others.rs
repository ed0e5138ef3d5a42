//! Tokens of kubelets, flannel, controllers and Kilo.

use super::*;

/// What a kubelet may say of its Node.
pub(super) fn kubelets(table: &mut Table, all: &Parties) {
    parties!(all; admin = "cluster-admin", operator = "operator's role", agent_b = "agent of node-b",
        kubelet = "kubelet of node-b", cloud = "cloud controllers");
    for path in [NODE_B, STATUS_B] {
        let by = if path == NODE_B { "node" } else { "status" };
        let endpoint = |path| {
            annotate(
                path,
                json!({"kilo.squat.ai/endpoint": format!("203.0.113.66:{}", path.len())}),
            )
        };
        table.refused(
            &format!("its endpoint, by {by}"),
            kubelet,
            "annotations",
            &endpoint(path),
        );
        table.allowed("its agent", agent_b, &endpoint(NODE_B));
        let leader = annotate(path, json!({"kilo.squat.ai/leader": by}));
        table.refused(
            &format!("to lead, by {by}"),
            kubelet,
            "annotations",
            &leader,
        );
        table.allowed("the operator", admin, &leader);
    }
    let removed = annotate(NODE_B, json!({"kilo.squat.ai/leader": null}));
    table.refused(
        "the operator's annotation taken away",
        kubelet,
        "annotations",
        &removed,
    );
    table.allowed("the operator", operator, &removed);
    let k3s = change(
        NODE_B,
        annotations(&json!({"k3s.io/node-args": "[]", "k3s.io/internal-ip": "192.168.51.12"})),
    );
    table.allowed("k3s's own annotations", kubelet, &k3s);
    let heartbeat = change(
        STATUS_B,
        json!({"status": {"conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}]}}),
    );
    table.allowed("a heartbeat", kubelet, &heartbeat);

    let region = |path: &str, value: Value| {
        change(
            path,
            json!({"metadata": {"labels": {"topology.kubernetes.io/region": value}}}),
        )
    };
    table.allowed(
        "its region, while it has none",
        kubelet,
        &region(NODE_B, json!("third")),
    );
    table.refused(
        "another region once it has one",
        kubelet,
        "region",
        &region(NODE_B, json!("nd")),
    );
    table.refused(
        "another region by status",
        kubelet,
        "region",
        &region(STATUS_B, json!("nd")),
    );
    table.refused(
        "its region taken away",
        kubelet,
        "region",
        &region(NODE_B, Value::Null),
    );
    table.allowed(
        "the cloud's controllers",
        cloud,
        &region(NODE_B, json!("nd")),
    );
    table.allowed("the operator", admin, &region(NODE_B, json!("third")));

    admin.client.delete(NODE_B).unwrap();
    let node = |metadata: Value, spec: Value| {
        let mut object =
            json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": spec});
        object["metadata"]["name"] = json!("node-b");
        create("/api/v1/nodes", object)
    };
    let labels = json!({"kubernetes.io/os": "linux", "topology.kubernetes.io/region": "third"});
    let pods = json!({"podCIDR": "10.42.77.0/24", "podCIDRs": ["10.42.77.0/24"]});
    table.refused(
        "a Node with pod CIDRs of its choice",
        kubelet,
        "pod-cidrs",
        &node(json!({"labels": labels}), pods),
    );
    let annotated = json!({"labels": labels, "annotations": {"kilo.squat.ai/leader": "true"}});
    table.refused(
        "a Node that leads from its first moment",
        kubelet,
        "annotations",
        &node(annotated, json!({})),
    );
    let claiming = json!({"labels": labels, "annotations": {
        "selvedge.dev/since": "lead:location:third=2020-01-01T00:00:00Z"}});
    table.refused(
        "a Node with old claims from its first moment",
        kubelet,
        "annotations",
        &node(claiming, json!({})),
    );
    table.allowed(
        "an ordinary Node",
        kubelet,
        &node(json!({"labels": labels}), json!({})),
    );
}

/// Other identities that may patch Nodes.
pub(super) fn strangers(table: &mut Table, all: &Parties) {
    parties!(all; admin = "cluster-admin", agent_a = "agent of node-a", flannel = "flannel", cloud = "cloud controllers");
    let key = |path| annotate(path, json!({"kilo.squat.ai/key": "other"}));
    table.refused(
        "another node's key, by status",
        flannel,
        "annotations",
        &key(STATUS_A),
    );
    table.allowed("its own agent", agent_a, &key(NODE_A));
    let mark = |path, value: &str| annotate(path, json!({"selvedge.dev/agent": value}));
    table.refused(
        "another node's mark, by status",
        flannel,
        "annotations",
        &mark(STATUS_A, "9"),
    );
    table.allowed("its own agent", agent_a, &mark(NODE_A, "0.1.1"));
    let leader = |path| annotate(path, json!({"kilo.squat.ai/leader": "true"}));
    table.refused(
        "another node to lead, by status",
        flannel,
        "annotations",
        &leader(STATUS_A),
    );
    table.allowed("the operator", admin, &leader(STATUS_A));
    let region = |path: &str| {
        change(
            path,
            json!({"metadata": {"labels": {"topology.kubernetes.io/region": "third"}}}),
        )
    };
    table.refused(
        "another node's region, by status",
        flannel,
        "region",
        &region(STATUS_A),
    );
    table.allowed("the operator", admin, &region(STATUS_A));
    let endpoint = annotate(
        NODE_A,
        json!({"kilo.squat.ai/force-endpoint": "203.0.113.77:51820"}),
    );
    table.refused(
        "a controller without the named permission",
        cloud,
        "annotations",
        &endpoint,
    );
    table.allowed("the operator", admin, &endpoint);
}

/// A real `kg` during a migration.
pub(super) fn kilo(table: &mut Table, all: &Parties, cluster: &Cluster) {
    parties!(all; agent_b = "agent of node-b", kilo = "kilo on node-a", operator = "operator's role");
    let check_in = |path, time: &str| {
        change(
            path,
            annotations(
                &json!({"kilo.squat.ai/last-seen": time, "kilo.squat.ai/key": KEY,
            "kilo.squat.ai/endpoint": "203.0.113.10:51820", "kilo.squat.ai/wireguard-ip": "10.4.0.1/16"}),
            ),
        )
    };
    table.refused(
        "Kilo without the guide's binding",
        kilo,
        "annotations",
        &check_in(NODE_A, "1"),
    );
    let account = format!("--serviceaccount={NAMESPACE}:kilo");
    cluster.kubectl(&[
        "create",
        "clusterrolebinding",
        "selvedge-kilo",
        "--clusterrole=selvedge-kilo",
        &account,
    ]);
    wait_for("the binding", Duration::from_secs(10), || {
        send(kilo, &check_in(NODE_A, "2")).0 == 200
    })
    .unwrap();
    table.allowed("with the guide's binding", kilo, &check_in(NODE_A, "3"));
    table.refused(
        "Kilo for another node",
        kilo,
        "annotations",
        &check_in(NODE_B, "4"),
    );
    table.allowed(
        "its own agent",
        agent_b,
        &annotate(NODE_B, json!({"kilo.squat.ai/key": KEY})),
    );
    let leader = change(
        NODE_A,
        annotations(&json!({"kilo.squat.ai/location": "third"})),
    );
    table.refused("Kilo for the operator", kilo, "annotations", &leader);
    table.allowed("the operator", operator, &leader);
    let mark = change(NODE_A, annotations(&json!({"selvedge.dev/agent": "0.1.0"})));
    table.refused("Kilo as an agent of ours", kilo, "annotations", &mark);
    table.allowed("its cleaning up", kilo, &check_in_removed());
    cluster.kubectl(&["delete", "clusterrolebinding", "selvedge-kilo"]);
    wait_for("the binding's end", Duration::from_secs(10), || {
        send(kilo, &check_in(NODE_A, "5")).0 == 403
    })
    .unwrap();
    table.refused(
        "Kilo after the migration",
        kilo,
        "annotations",
        &check_in(NODE_A, "6"),
    );
}

fn check_in_removed() -> Write {
    let none = json!({"kilo.squat.ai/last-seen": null, "kilo.squat.ai/key": null,
        "kilo.squat.ai/endpoint": null, "kilo.squat.ai/wireguard-ip": null});
    change(NODE_A, annotations(&none))
}

/// Agents with another `--topology-label` have it in the ConfigMap.
pub(super) fn another_label(table: &mut Table, all: &Parties, cluster: &Cluster) {
    parties!(all; admin = "cluster-admin", kubelet = "kubelet of node-b");
    let map = format!("/api/v1/namespaces/{NAMESPACE}/configmaps/selvedge-networks");
    let label = json!({"data": {"topology-label": "example.com/site"}});
    cluster.api().merge(&map, &label).unwrap();
    let site = |value: &str| {
        change(
            NODE_B,
            json!({"metadata": {"labels": {"example.com/site": value}}}),
        )
    };
    table.allowed("its site, while it has none", kubelet, &site("s1"));
    wait_for("the other label", Duration::from_secs(30), || {
        send(kubelet, &site("s2")).0 == 403
    })
    .unwrap();
    table.refused(
        "another site, with --topology-label",
        kubelet,
        "region",
        &site("s3"),
    );
    table.allowed("the operator", admin, &site("s3"));
}
