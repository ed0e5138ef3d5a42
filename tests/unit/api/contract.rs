//! What must hold on the stand-in and on a real kube-apiserver alike (`tests/root/api_contract.rs`).

use std::collections::BTreeSet;
use std::future::Future;
use std::net::Ipv4Addr;
use std::pin::Pin;
use std::time::Duration;

use selvedge::cluster::{Access, Annotations, Notice, annotation, withdraw};
use selvedge::topology::{NodeName, Object};
use serde_json::{Value, json};

use super::bench::{KEY, Server, eventually, node_names, peer, sources};

/// Where the API server says it is: the real one, and the stand-in.
pub(super) const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

pub(super) type Case = for<'a> fn(&'a Server) -> Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Passes the names of all cases to another macro.
macro_rules! cases {
    ($to:ident) => {
        $to! {
            the_server_answers_requests_as_they_should_be,
            nodes_are_seen_as_they_come_and_change_and_go,
            the_first_view_has_all_nodes_of_a_long_list,
            the_agent_publishes_on_its_own_node_and_puts_back_what_others_take,
            withdrawing_removes_what_was_published_and_nothing_else,
            what_is_refused_becomes_one_event,
            the_first_view_knows_the_servers_by_the_endpoints_of_their_service,
            peers_are_seen_once_they_are_defined,
        }
    };
}
pub(super) use cases;

pub(super) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// Requests of all kinds that agents, flannel and kubectl make, with what a server says to them.
pub(super) async fn the_server_answers_requests_as_they_should_be(server: &Server) {
    const MERGE: &str = "application/merge-patch+json";
    const STRATEGIC: &str = "application/strategic-merge-patch+json";
    const APPLY: &str = "application/apply-patch+yaml";
    const JSON: &str = "application/json";
    let nodes = "/api/v1/nodes";
    let a1 = "/api/v1/nodes/a1";
    let status = "/api/v1/nodes/a1/status";
    let applied = "/api/v1/nodes/a1?fieldManager=test";
    let none = Value::Null;
    let annotations = |value: Value| json!({"metadata": {"annotations": value}});

    let steps: Vec<(&str, &str, &str, Value, u16)> = vec![
        ("GET", "/version", "", none.clone(), 200),
        ("GET", "/readyz", "", none.clone(), 200),
        ("GET", a1, "", none.clone(), 404),
        (
            "POST",
            nodes,
            JSON,
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "a1"}}),
            201,
        ),
        (
            "POST",
            nodes,
            JSON,
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "a1"}}),
            409,
        ),
        (
            "PATCH",
            a1,
            STRATEGIC,
            annotations(json!({"x.example/a": "1", "x.example/b": "2"})),
            200,
        ),
        (
            "PATCH",
            a1,
            STRATEGIC,
            annotations(json!({"x.example/a": null, "x.example/none": null})),
            200,
        ),
        (
            "PATCH",
            a1,
            MERGE,
            annotations(json!({"x.example/c": "3"})),
            200,
        ),
        (
            "PATCH",
            a1,
            "application/json-patch+json",
            json!([{"op": "remove", "path": "/metadata/annotations/x.example~1c"}]),
            200,
        ),
        (
            "PATCH",
            a1,
            "application/json-patch+json",
            json!([{"op": "remove", "path": "/metadata/annotations/x.example~1c"}]),
            422,
        ),
        ("PATCH", a1, "text/plain", json!({}), 415),
        ("PATCH", a1, STRATEGIC, json!("{"), 400),
        (
            "PATCH",
            a1,
            APPLY,
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "a1"}}),
            422,
        ),
        (
            "PATCH",
            applied,
            APPLY,
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "a1", "labels": {"x.example/l": "1"}}}),
            200,
        ),
        (
            "PATCH",
            status,
            STRATEGIC,
            json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}, "metadata": {"annotations": {"x.example/d": "4"}}}),
            200,
        ),
        (
            "PATCH",
            a1,
            STRATEGIC,
            json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}}),
            200,
        ),
        (
            "PATCH",
            "/api/v1/nodes/none",
            STRATEGIC,
            annotations(json!({"x.example/a": "1"})),
            404,
        ),
        (
            "PATCH",
            a1,
            MERGE,
            json!({"metadata": {"resourceVersion": "1"}}),
            409,
        ),
        (
            "GET",
            "/apis/kilo.squat.ai/v1alpha1/peers",
            "",
            none.clone(),
            404,
        ),
        ("GET", "/api/v1/nodes?limit=1", "", none.clone(), 200),
        ("DELETE", a1, "", none.clone(), 200),
        ("DELETE", a1, "", none, 404),
    ];
    for (method, path, media_type, body, expected) in steps {
        let before = match method {
            "PATCH" => server.request("GET", a1, "", &Value::Null).await.1,
            _ => Value::Null,
        };
        let (code, answer) = server.request(method, path, media_type, &body).await;
        assert_eq!(code, expected, "{method} {path} {body}: {answer}");
        if code >= 400 && path != "/apis/kilo.squat.ai/v1alpha1/peers" {
            assert_eq!(answer["kind"], "Status", "{method} {path}: {answer}");
            assert_eq!(answer["code"], code);
        }
        if path == "/api/v1/nodes?limit=1" {
            assert_eq!(
                answer["items"][0]["metadata"]["annotations"]["x.example/b"],
                "2"
            );
            assert_eq!(
                answer["items"][0]["metadata"]["annotations"]["x.example/d"],
                "4"
            );
            assert_eq!(answer["items"][0]["metadata"]["labels"]["x.example/l"], "1");
            assert_eq!(
                answer["items"][0]["status"]["conditions"][0]["status"],
                "True"
            );
            assert!(answer["metadata"]["resourceVersion"].is_string());
        }
        if media_type == MERGE && code == 200 {
            let version = |object: &Value| object["metadata"]["resourceVersion"].clone();
            assert_ne!(version(&before), version(&answer));
            let (_, again) = server.request(method, path, media_type, &body).await;
            assert_eq!(
                version(&answer),
                version(&again),
                "a patch that changes nothing makes no version"
            );
        }
    }
}

pub(super) async fn nodes_are_seen_as_they_come_and_change_and_go(server: &Server) {
    server.create_node("a1", &json!({})).await;
    let mut agent = server.agent("a1").await;
    agent.expect_nodes(&["a1"]).await;

    server
        .create_node("a2", &json!({"kilo.squat.ai/location": "nd"}))
        .await;
    agent.expect_nodes(&["a1", "a2"]).await;

    server
        .annotate("a2", &json!({"kilo.squat.ai/location": "home"}))
        .await;
    agent
        .expect("the new location", |view| {
            view.snapshot
                .nodes
                .values()
                .any(|node| node.region.0 == "home")
        })
        .await;

    server.delete("/api/v1/nodes/a2").await;
    agent.expect_nodes(&["a1"]).await;
}

pub(super) async fn the_first_view_has_all_nodes_of_a_long_list(server: &Server) {
    let names: Vec<_> = (0..250).map(|i| format!("n{i:03}")).collect();
    for name in &names {
        server.create_node(name, &json!({})).await;
    }
    let mut agent = server.agent("n000").await;
    let first = agent.expect("a view", |_| true).await;
    assert_eq!(node_names(&first), names);
}

pub(super) async fn the_agent_publishes_on_its_own_node_and_puts_back_what_others_take(
    server: &Server,
) {
    server
        .create_node(
            "a1",
            &json!({"kilo.squat.ai/last-seen": "1", "x.example/other": "stays"}),
        )
        .await;
    server.create_node("a2", &json!({})).await;
    let agent = server.agent("a1").await;
    agent.cluster.publish(Annotations::from([
        (annotation::ENDPOINT, "192.168.50.11:51820".to_owned()),
        (annotation::KEY, KEY.to_owned()),
        (annotation::WIREGUARD_IP, String::new()),
    ]));
    let published = async || {
        let annotations = server.annotations("a1").await;
        annotations
            .get(annotation::ENDPOINT)
            .is_some_and(|text| text == "192.168.50.11:51820")
            && annotations
                .get(annotation::KEY)
                .is_some_and(|text| text == KEY)
            && annotations
                .get(annotation::WIREGUARD_IP)
                .is_some_and(String::is_empty)
            && !annotations.contains_key(annotation::LAST_SEEN)
            && annotations
                .get("x.example/other")
                .is_some_and(|text| text == "stays")
    };
    eventually("published", published).await;
    let version =
        async || server.get("/api/v1/nodes/a1").await["metadata"]["resourceVersion"].clone();
    let before = version().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(
        version().await,
        before,
        "nothing is written in steady state"
    );

    // What Kilo's agent removes when it stops.
    server
        .annotate(
            "a1",
            &json!({"kilo.squat.ai/key": null, "kilo.squat.ai/endpoint": null}),
        )
        .await;
    eventually("published again", published).await;
    let others = server.annotations("a2").await;
    assert!(
        !others.keys().any(|key| key.starts_with("kilo.squat.ai/")),
        "{others:?}"
    );
}

pub(super) async fn withdrawing_removes_what_was_published_and_nothing_else(server: &Server) {
    let operators = json!({
        "kilo.squat.ai/force-endpoint": "203.0.113.10:51820",
        "kilo.squat.ai/leader": "",
        "flannel.alpha.coreos.com/public-ip": "192.168.50.11",
    });
    server.create_node("a1", &operators).await;
    server
        .annotate(
            "a1",
            &json!({"kilo.squat.ai/key": KEY, "selvedge.dev/agent": "0.1.0"}),
        )
        .await;
    let access = Access::new(sources(&server.kubeconfig)).await.unwrap();
    let own = NodeName("a1".to_owned());
    for _ in 0..2 {
        withdraw(&access, &own).await.unwrap();
        let mut left = server.annotations("a1").await;
        left.retain(|key, _| !key.starts_with("node.alpha.kubernetes.io/"));
        assert_eq!(json!(left), operators);
    }
    withdraw(&access, &NodeName("gone".to_owned()))
        .await
        .unwrap();
}

pub(super) async fn what_is_refused_becomes_one_event(server: &Server) {
    server
        .create_node(
            "a1",
            &json!({"selvedge.dev/agent": "0.1.0", "kilo.squat.ai/force-endpoint": "nonsense"}),
        )
        .await;
    // Real servers drop the status of an object that is created.
    let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    server
        .request(
            "PATCH",
            "/api/v1/nodes/a1/status",
            "application/strategic-merge-patch+json",
            &ready,
        )
        .await;
    let mut agent = server.agent("a1").await;
    agent
        .expect("the refusal", |view| view.rejected.len() == 1)
        .await;
    let reports = BTreeSet::from([Notice {
        object: Object::Node(NodeName("a1".to_owned())),
        field: "pod CIDR".to_owned(),
        reason: "SelvedgeExcluded",
        note: "node a1: left out pod CIDR 10.42.0.0/24".to_owned(),
    }]);
    agent.cluster.report(reports);

    let events = async || {
        let events = server
            .get("/apis/events.k8s.io/v1/namespaces/default/events")
            .await;
        let events = events["items"].as_array().unwrap().clone();
        let ours = |event: &Value| event["reportingController"] == "selvedge";
        events.into_iter().filter(ours).collect::<Vec<_>>()
    };
    eventually("two events", async || events().await.len() == 2).await;
    let events = events().await;
    let event = events
        .iter()
        .find(|event| event["reason"] == "SelvedgeInvalidAnnotation")
        .unwrap();
    assert_eq!(event["regarding"]["name"], "a1");
    assert_eq!(event["type"], "Warning");
    assert_eq!(
        event["note"],
        "node a1: kilo.squat.ai/force-endpoint \"nonsense\" is refused: an endpoint is written host:port"
    );
}

pub(super) async fn the_first_view_knows_the_servers_by_the_endpoints_of_their_service(
    server: &Server,
) {
    server.create_node("a1", &json!({})).await;
    let mut agent = server.agent("a1").await;
    let first = agent.expect("a view", |_| true).await;
    assert_eq!(first.servers.incomplete, None);
    assert!(
        first.servers.addresses.contains(&ADDRESS.into()),
        "{first:?}"
    );
}

pub(super) async fn peers_are_seen_once_they_are_defined(server: &Server) {
    server.create_node("a1", &json!({})).await;
    let mut agent = server.agent("a1").await;
    let view = agent.expect_nodes(&["a1"]).await;
    assert!(view.snapshot.peers.is_empty());

    let definition = json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "peers.kilo.squat.ai"},
        "spec": {
            "group": "kilo.squat.ai",
            "names": {"plural": "peers", "singular": "peer", "kind": "Peer", "listKind": "PeerList"},
            "scope": "Cluster",
            "versions": [{
                "name": "v1alpha1",
                "served": true,
                "storage": true,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}},
            }],
        },
    });
    server
        .create(
            "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
            &definition,
        )
        .await;
    let peers = "/apis/kilo.squat.ai/v1alpha1/peers";
    eventually("the definition is served", async || {
        server.request("GET", peers, "", &Value::Null).await.0 == 200
    })
    .await;
    server
        .create(peers, &peer("laptop", &["10.5.0.1/32"]))
        .await;
    server.create(peers, &peer("bad", &["0.0.0.0/0"])).await;
    let view = agent
        .expect("the peer", |view| view.snapshot.peers.len() == 1)
        .await;
    assert_eq!(view.snapshot.peers.keys().collect::<Vec<_>>(), ["laptop"]);
    assert_eq!(view.rejected.len(), 1);

    server.delete(&format!("{peers}/laptop")).await;
    agent
        .expect("no peer", |view| view.snapshot.peers.is_empty())
        .await;
}
