//! Claims made older than they are, and the times in `managedFields` that show it.

use super::*;

/// A claim made older than it is.
pub(super) fn ledgers(table: &mut Table, all: &Parties, cluster: &Cluster) {
    parties!(all; admin = "cluster-admin", agent_a = "agent of node-a", flannel = "flannel",
        kubelet = "kubelet of node-b");
    let since = |text: String| annotate(NODE_A, json!({"selvedge.dev/since": text}));
    let old = "address:192.168.50.11=2026-01-01T00:00:00Z";
    table.allowed(
        "the operator writes an old claim",
        admin,
        &since(old.to_owned()),
    );
    let renamed = since(old.replace(".11=", ".12="));
    table.refused(
        "another address with the age of the recorded one",
        agent_a,
        "annotations",
        &renamed,
    );
    let added = |entry: String| since(format!("{old} {entry}"));
    let lead = |offset| format!("lead:location:nd={}", time(offset));
    table.refused(
        "a claim dated back by a day",
        agent_a,
        "annotations",
        &added(lead(-86_400)),
    );
    table.refused(
        "a claim dated back by two minutes",
        agent_a,
        "annotations",
        &added(lead(-120)),
    );
    table.refused(
        "a claim dated ahead by an hour",
        agent_a,
        "annotations",
        &added(lead(3600)),
    );
    table.allowed(
        "dated now, beside the recorded one",
        agent_a,
        &added(lead(-2)),
    );
    table.refused(
        "what is no entry",
        agent_a,
        "annotations",
        &since("since ever".to_owned()),
    );
    let many = |count| {
        since(
            (0..count)
                .map(|n| format!("address:10.0.0.{n}={}", time(0)))
                .collect::<Vec<_>>()
                .join(" "),
        )
    };
    table.refused("17 entries", agent_a, "annotations", &many(17));
    table.allowed("16", agent_a, &many(16));

    // managedFields hold the server's times, and a request may bring its own.
    let entry = |manager: &str, time: &str| {
        json!({"manager": manager, "operation": "Update", "apiVersion": "v1", "time": time,
            "fieldsType": "FieldsV1", "fieldsV1": {"f:metadata": {"f:annotations": {"f:x": {}}}}})
    };
    let key = || format!("key:{KEY}={}", time(-86_400));
    let with_fields = |path: &str, fields: Value| {
        change(
            path,
            json!({"metadata": {
            "annotations": {"selvedge.dev/since": key()}, "managedFields": fields}}),
        )
    };
    let manager = format!("{NODE_A}?fieldManager=selvedge");
    let forged = with_fields(&manager, json!([entry("selvedge", "2020-01-01T00:00:00Z")]));
    table.refused(
        "dated back, with times of its own in managedFields",
        agent_a,
        "annotations",
        &forged,
    );
    let emptied = with_fields(&manager, json!([{}]));
    table.refused(
        "dated back, with managedFields emptied",
        agent_a,
        "annotations",
        &emptied,
    );
    let mut crowd = vec![entry("x", "2020-01-01T00:00:00Z")];
    crowd.extend((0..12).map(|n| entry(&format!("y{n}"), "2099-01-01T00:00:00Z")));
    let ancient = with_fields(
        &format!("{NODE_A}?fieldManager=ancient-changes"),
        json!(crowd),
    );
    table.refused(
        "dated back, as the manager that the server merges into",
        agent_a,
        "annotations",
        &ancient,
    );
    let applied = |time: String| Write {
        method: "PATCH",
        path: format!("{manager}&force=true"),
        content_type: "application/apply-patch+yaml",
        body: json!({"apiVersion": "v1", "kind": "Node", "metadata": {
            "annotations": {"selvedge.dev/since": format!("key:{KEY}={time}")}}}),
    };
    table.refused(
        "dated back, by server-side apply",
        agent_a,
        "annotations",
        &applied(time(-86_400)),
    );
    table.allowed(
        "dated now, by server-side apply",
        agent_a,
        &applied(time(0)),
    );
    let removed = change(STATUS_A, annotations(&json!({"selvedge.dev/since": null})));
    table.refused(
        "another node's claims removed",
        flannel,
        "annotations",
        &removed,
    );
    table.allowed(
        "its own agent",
        agent_a,
        &annotate(NODE_A, json!({"selvedge.dev/since": null})),
    );
    let emptied = change(NODE_B, json!({"metadata": {"managedFields": [{}]}}));
    table.refused(
        "managedFields of its own Node emptied",
        kubelet,
        "annotations",
        &emptied,
    );
    let other = change(NODE_B, annotations(&json!({"node.example/a": "x"})));
    table.allowed("another write to it", kubelet, &other);
    untracked(table, cluster);
}

/// A Node for which the API server keeps no managedFields, as of those from before Kubernetes 1.18.
fn untracked(table: &mut Table, cluster: &Cluster) {
    let api = cluster.api();
    let bare = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-c"}});
    let node = api.create("/api/v1/nodes", &bare).unwrap();
    assert!(node["metadata"]["managedFields"].is_null(), "{node}");
    let object = json!({"apiVersion": "v1", "kind": "Node", "name": "node-c", "uid": node["metadata"]["uid"]});
    let token = cluster.plane.bound_token(NAMESPACE, "selvedge", &object);
    let agent = Party {
        name: "agent of node-c",
        client: &api.with_token(&token.unwrap()),
    };
    let path = "/api/v1/nodes/node-c";
    let lead = |offset| {
        let text = format!("lead:location:nd={}", time(offset));
        annotate(path, json!({"selvedge.dev/since": text}))
    };
    let what = "dated back to before a Node without managedFields";
    table.refused(what, agent, "annotations", &lead(-86_400));
    table.allowed("dated now", agent, &lead(1));
    // Written before the heartbeat's time is read, so that no pause of the machine puts it after the heartbeat.
    let early = lead(0);
    let heartbeat = json!({"status": {"conditions": [{"type": "Ready", "status": "True",
        "reason": "KubeletReady", "lastHeartbeatTime": time(30)}]}});
    api.merge(&format!("{path}/status"), &heartbeat).unwrap();
    let what = "dated back to before its last heartbeat";
    table.refused(what, agent, "annotations", &early);
    table.allowed("dated after it", agent, &lead(31));
}
