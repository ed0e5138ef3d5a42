//! An agent's token beyond what is its own: other Nodes, the operator's annotations, Kilo's mark, Events.

use super::*;

/// An agent beyond what is its own.
pub(super) fn agents(table: &mut Table, all: &Parties) {
    parties!(all; admin = "cluster-admin", operator = "operator's role", agent_a = "agent of node-a",
        agent_b = "agent of node-b", loose = "unbound agent token", flannel = "flannel");
    let key = |path| annotate(path, json!({"kilo.squat.ai/key": KEY}));
    table.refused(
        "the key of another node",
        agent_a,
        "annotations/own-node",
        &key(NODE_B),
    );
    table.allowed("its own agent", agent_b, &key(NODE_B));
    let alias = |path| annotate(path, json!({"selvedge.dev/alias": "10.7.0.1"}));
    table.refused(
        "the alias of another node",
        agent_a,
        "annotations/own-node",
        &alias(NODE_B),
    );
    table.allowed("its own agent", agent_b, &alias(NODE_B));
    table.allowed("the operator", operator, &alias(NODE_A));
    table.refused(
        "a key with a token of no pod",
        loose,
        "annotations/own-node",
        &key(NODE_A),
    );
    table.allowed("with a pod's", agent_a, &key(NODE_A));
    for (name, value) in [
        ("leader", "true"),
        ("force-endpoint", "203.0.113.66:51820"),
        ("force-internal-ip", "203.0.113.66/32"),
        ("location", "nd"),
        ("persistent-keepalive", "1"),
        ("allowed-location-ips", "198.51.100.0/24"),
    ] {
        let entry = annotate(NODE_A, json!({format!("kilo.squat.ai/{name}"): value}));
        table.refused(
            &format!("{name} of its own node"),
            agent_a,
            "annotations",
            &entry,
        );
        let by = if name == "leader" { admin } else { operator };
        table.allowed("the operator", by, &entry);
    }
    let removed = annotate(NODE_A, json!({"kilo.squat.ai/leader": null}));
    table.refused(
        "the operator's leader taken away",
        agent_a,
        "annotations",
        &removed,
    );
    table.allowed("the operator", operator, &removed);
    let relay = |value: Value| annotate(NODE_A, json!({"selvedge.dev/relay": value}));
    table.allowed(
        "the operator forbids a relay",
        operator,
        &relay(json!("false")),
    );
    for value in [json!("true"), Value::Null] {
        table.refused(
            "a relay that the operator forbade",
            agent_a,
            "annotations",
            &relay(value),
        );
    }
    table.allowed("the operator", operator, &relay(Value::Null));
    let unknown = annotate(NODE_A, json!({"selvedge.dev/anything": "x"}));
    table.refused(
        "an unknown annotation of selvedge.dev",
        agent_a,
        "annotations",
        &unknown,
    );
    table.allowed("the operator", operator, &unknown);
    let value = |length| {
        annotate(
            NODE_A,
            json!({"selvedge.dev/candidates": "x".repeat(length)}),
        )
    };
    table.refused(
        "an annotation of 4,097 bytes",
        agent_a,
        "annotations",
        &value(4097),
    );
    table.allowed("of 4,096", agent_a, &value(4096));
    for name in ["selvedge.dev/next-key", "selvedge.dev/previous-key"] {
        let key = |path| annotate(path, json!({name: KEY}));
        table.refused(
            &format!("{name} of another node"),
            agent_a,
            "annotations/own-node",
            &key(NODE_B),
        );
        table.allowed("its own agent", agent_b, &key(NODE_B));
        table.refused(
            &format!("{name} that is no key"),
            agent_a,
            "annotations",
            &annotate(NODE_A, json!({name: "AAAA"})),
        );
        table.allowed("a key", agent_a, &key(NODE_A));
        table.allowed(
            "none any more",
            agent_a,
            &annotate(NODE_A, json!({name: null})),
        );
    }
    let foreign = annotate(
        NODE_A,
        json!({"flannel.alpha.coreos.com/public-ip": "203.0.113.66"}),
    );
    table.refused("flannel's public-ip", agent_a, "own-node", &foreign);
    let foreign = change(
        STATUS_A,
        annotations(&json!({"flannel.alpha.coreos.com/public-ip": "192.168.50.11"})),
    );
    table.allowed("flannel", flannel, &foreign);
    let label = |value: Value| {
        change(
            NODE_A,
            json!({"metadata": {"labels": {"topology.kubernetes.io/region": value}}}),
        )
    };
    table.refused(
        "the region of its own node",
        agent_a,
        "own-node",
        &label(json!("nd")),
    );
    table.allowed("the operator", admin, &label(json!("nd")));
    let taints = change(NODE_A, json!({"spec": {"taints": []}}));
    table.refused("the taints of its own node", agent_a, "own-node", &taints);
    table.allowed("the operator", admin, &taints);
}

/// A node that claims to run Kilo.
pub(super) fn marks(table: &mut Table, all: &Parties) {
    parties!(all; agent_a = "agent of node-a");
    let kilo = annotate(
        NODE_A,
        json!({"selvedge.dev/agent": null, "kilo.squat.ai/last-seen": "9999999999",
            "kilo.squat.ai/internal-ip": "203.0.113.66/32"}),
    );
    table.refused(
        "to be Kilo: last-seen without the agent's mark",
        agent_a,
        "annotations",
        &kilo,
    );
    let marked = |mark: Value, seen: Value| {
        annotate(
            NODE_A,
            json!({"selvedge.dev/agent": mark, "kilo.squat.ai/last-seen": seen}),
        )
    };
    let mark = json!("0.1.0 last-seen=1767225600");
    table.allowed(
        "with the mark of the same time",
        agent_a,
        &marked(mark.clone(), json!("1767225600")),
    );
    table.refused(
        "another last-seen than the mark's",
        agent_a,
        "annotations",
        &marked(mark, json!("1767225601")),
    );
    let twice = json!("0 last-seen=1 last-seen=1767225602");
    table.refused(
        "a mark with two times",
        agent_a,
        "annotations",
        &marked(twice, json!("1767225602")),
    );
    let bare = annotate(NODE_A, json!({"selvedge.dev/agent": null}));
    table.refused(
        "the mark taken away from under last-seen",
        agent_a,
        "annotations",
        &bare,
    );
    table.allowed(
        "both taken away",
        agent_a,
        &marked(Value::Null, Value::Null),
    );
    table.allowed(
        "the mark alone",
        agent_a,
        &marked(json!("0.1.0"), Value::Null),
    );
}

/// What an agent may write into the cluster's Events.
pub(super) fn events(table: &mut Table, all: &Parties) {
    parties!(all; admin = "cluster-admin", agent_a = "agent of node-a", loose = "unbound agent token");
    let event = |edit: Value| {
        let mut event = json!({
            "apiVersion": "events.k8s.io/v1", "kind": "Event",
            "metadata": {"generateName": "attempt-", "namespace": "default"},
            "eventTime": "2026-01-01T00:00:00.000000Z", "type": "Warning",
            "reason": "SelvedgeExcluded", "action": "Ignore", "note": "an attempt",
            "reportingController": "selvedge", "reportingInstance": "node-a",
            "regarding": {"apiVersion": "v1", "kind": "Node", "name": "node-a", "uid": "node-a"},
        });
        for (field, value) in edit.as_object().unwrap() {
            event[field] = value.clone();
        }
        create("/apis/events.k8s.io/v1/namespaces/default/events", event)
    };
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "name": "p", "namespace": "default"});
    for (what, edit) in [
        (
            "an Event in the kubelet's name",
            json!({"reportingController": "kubelet"}),
        ),
        (
            "an Event of another node's agent",
            json!({"reportingInstance": "node-b"}),
        ),
        ("an Event about a Pod", json!({"regarding": pod})),
        ("an Event of another reason", json!({"reason": "Evicted"})),
        ("an Event with a relation", json!({"related": pod})),
    ] {
        table.refused(what, agent_a, "events", &event(edit.clone()));
        if what.ends_with("reason") {
            table.allowed("another party", admin, &event(edit));
        }
    }
    table.refused(
        "an Event with a token of no pod",
        loose,
        "events",
        &event(json!({})),
    );
    table.allowed("in its own name about a Node", agent_a, &event(json!({})));
    let peer = json!({"apiVersion": "kilo.squat.ai/v1alpha1", "kind": "Peer", "name": "laptop"});
    table.allowed(
        "in its own name about a Peer",
        agent_a,
        &event(json!({"regarding": peer})),
    );
}
