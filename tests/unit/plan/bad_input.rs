//! A bad statement of one object affects that object alone, and is reported.
//!
//! A fifth node, in a region of its own, makes a bad statement, parsed from JSON as the API returns it. All other
//! nodes must have exactly the plan that they would have without the statement.

use serde_json::{Value, json};

use selvedge::cluster::{ParseSettings, node as parse_node, peer as parse_peer};

use super::*;

const KEY: &str = "kilo.squat.ai/key";

/// A Node of region `bad`, younger than all others, with a good value everywhere.
fn object() -> Value {
    json!({
        "metadata": {
            "name": "bad",
            "creationTimestamp": "2026-02-01T00:00:00Z",
            "labels": {"topology.kubernetes.io/region": "bad"},
            "annotations": {
                KEY: "BQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQU=",
                "kilo.squat.ai/endpoint": "203.0.113.50:51820",
                "kilo.squat.ai/internal-ip": "172.16.5.5/24",
                "kilo.squat.ai/wireguard-ip": "10.4.0.9/16",
                "selvedge.dev/agent": "0.1.0",
            },
        },
        "spec": {"podCIDR": "10.42.9.0/24", "podCIDRs": ["10.42.9.0/24"]},
        "status": {
            "addresses": [{"type": "InternalIP", "address": "172.16.5.5"}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    })
}

fn annotated(key: &str, value: &str) -> Value {
    object().with(|object| object["metadata"]["annotations"][key] = value.into())
}

fn without(key: &str) -> Value {
    object().with(|object| {
        let annotations = object["metadata"]["annotations"].as_object_mut();
        annotations.unwrap().remove(key);
    })
}

fn pods(pods: &[&str]) -> Value {
    object().with(|object| {
        object["spec"] = json!({"podCIDR": pods.first(), "podCIDRs": pods});
    })
}

/// The four good nodes and this one, and the reports about it.
fn mesh(object: &Value) -> (Mesh, Vec<String>) {
    let mut mesh = two_regions();
    let object = serde_json::from_value(object.clone()).unwrap();
    let (node, rejected) = parse_node::parse(&object, &ParseSettings::default());
    mesh.snapshot
        .nodes
        .extend(node.map(|node| (node.name.clone(), node)));
    let rejected = rejected.iter().map(ToString::to_string);
    let topology = mesh.topology();
    let excluded = topology.excluded.iter().map(ToString::to_string);
    let overlaps = topology.overlaps.iter().map(ToString::to_string);
    let said = rejected.chain(excluded).chain(overlaps).collect();
    (mesh, said)
}

fn states(mesh: &Mesh) -> Vec<State> {
    let good = [
        "node-master",
        "node-agent-01",
        "node-agent-02",
        "node-agent-03",
    ];
    good.map(|name| mesh.state(name)).into()
}

/// Other nodes treat `bad` like `as_if`, and the reason is reported.
fn is_taken_as(bad: &Value, as_if: &Value) {
    let (mesh_with, said) = mesh(bad);
    assert!(!said.is_empty(), "no report about {bad}");
    assert!(
        said.iter().all(|line| line.contains("node bad")),
        "{said:?}"
    );
    assert_eq!(states(&mesh_with), states(&mesh(as_if).0), "{bad}");
}

#[test]
fn a_good_node_is_not_reported() {
    assert_eq!(mesh(&object()).1, Vec::<String>::new());
}

#[test]
fn a_bad_key_excludes_the_node() {
    let keys = [
        "not base64",
        "BQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQ==",
        "BQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUF",
        "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        "4Ot6fDtBuK4WVuP68Z/EatoJjeucMrH9hmIFFl9JuAA=",
        "7P///////////////////////////////////////38=",
        // The master's.
        "ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs=",
    ];
    for key in keys {
        is_taken_as(&annotated(KEY, key), &without(KEY));
    }
}

#[test]
fn a_bad_endpoint_is_left_out() {
    let key = "kilo.squat.ai/endpoint";
    let endpoints = [
        "203.0.113.50",
        "203.0.113.50:0",
        "203.0.113.50:-1",
        "203.0.113.50:65536",
        "203.0.113.50:51820,203.0.113.51:51820",
        "[::1%eth0]:1",
        "127.0.0.1:51820",
        "0.0.0.0:51820",
        "169.254.1.1:51820",
        "224.0.0.1:51820",
        "10.42.3.3:51820",
        "10.4.0.1:51820",
        "203.0.113.50:51820\r\nX: y",
        "xn--\u{fffd}.example:51820",
    ];
    for endpoint in endpoints {
        is_taken_as(&annotated(key, endpoint), &without(key));
    }
}

#[test]
fn an_endpoint_whose_name_does_not_resolve_is_left_out() {
    let key = "kilo.squat.ai/endpoint";
    let (mesh_with, _) = mesh(&annotated(key, "nowhere.example:51820"));
    assert_eq!(states(&mesh_with), states(&mesh(&without(key)).0));
}

#[test]
fn an_endpoint_whose_name_resolves_to_a_cluster_address_is_left_out() {
    let key = "kilo.squat.ai/endpoint";
    for inner in ["10.42.3.3", "10.4.0.2", "127.0.0.1", "10.43.0.1"] {
        let (mut mesh_with, _) = mesh(&annotated(key, "trap.example:51820"));
        mesh_with.resolved = [("trap.example".to_owned(), ip(inner))].into();
        assert_eq!(
            states(&mesh_with),
            states(&mesh(&without(key)).0),
            "{inner}"
        );
        assert_eq!(mesh_with.topology().excluded.len(), 1);
    }
}

#[test]
fn an_address_that_is_not_the_nodes_own_is_left_out() {
    let key = "kilo.squat.ai/internal-ip";
    let good = annotated(key, "172.16.5.5/24");
    let addresses = [
        // Another node's, a pod's, a service's, the API server's, or a foreign address.
        "192.168.50.12/24",
        "10.42.2.7/24",
        "10.43.0.1/32",
        "203.0.113.10/32",
        "8.8.8.8/32",
        "10.4.0.1/16",
    ];
    for address in addresses {
        is_taken_as(&annotated(key, address), &good);
    }
    // Not an address at all: none.
    for text in ["172.16.5.5", "172.16.5.5/33", "172.16.5.5/24 ", "x"] {
        is_taken_as(&annotated(key, text), &annotated(key, ""));
    }
}

#[test]
fn a_status_with_another_nodes_address_takes_it_from_no_node() {
    let stolen = object().with(|object| {
        object["status"]["addresses"] = json!([
            {"type": "InternalIP", "address": "172.16.5.5"},
            {"type": "InternalIP", "address": "192.168.50.12"},
        ]);
    });
    is_taken_as(&stolen, &object());
}

#[test]
fn bad_pod_cidrs_are_left_out() {
    // Without pods it takes no part in the mesh, and there are none to refuse.
    for stolen in [
        "10.42.2.0/24",
        "10.42.0.0/16",
        "10.42.2.128/25",
        "10.99.0.0/24",
        "0.0.0.0/0",
        "10.43.1.0/24",
    ] {
        is_taken_as(&pods(&[stolen]), &pods(&[]));
    }
}

#[test]
fn bad_requests_for_a_wireguard_address_are_left_out() {
    let key = "kilo.squat.ai/wireguard-ip";
    for wish in [
        "10.4.0.1/16",
        "10.4.0.2/32",
        "10.5.0.1/16",
        "10.4.0.0/16",
        "10.4.255.255/16",
        "x",
    ] {
        is_taken_as(&annotated(key, wish), &without(key));
    }
}

#[test]
fn bad_location_ips_are_left_out_one_by_one() {
    let key = "kilo.squat.ai/allowed-location-ips";
    let items = [
        "0.0.0.0/0",
        "::/0",
        "10.42.2.0/24",
        "10.42.1.5/32",
        "10.43.0.0/16",
        "10.4.0.0/24",
        "192.168.50.12/32",
        "10.0.0.0/7",
        "x",
    ];
    for item in items {
        let bad = annotated(key, &format!("10.66.0.0/24,{item}"));
        is_taken_as(&bad, &annotated(key, "10.66.0.0/24"));
    }
}

#[test]
fn bad_keepalives_are_left_out() {
    let key = "kilo.squat.ai/persistent-keepalive";
    for text in ["-1", "65536", "1e3", "25s", "9223372036854775808", ""] {
        is_taken_as(&annotated(key, text), &object());
    }
}

#[test]
fn bad_discovered_endpoints_are_left_out() {
    let key = "kilo.squat.ai/discovered-endpoints";
    for text in ["{", "[]", "null ", "{\"x\":1}"] {
        let (mesh_with, _) = mesh(&annotated(key, text));
        assert_eq!(states(&mesh_with), states(&mesh(&object()).0), "{text}");
    }
}

#[test]
fn a_bad_peer_takes_nothing_from_nodes_and_peers() {
    let peer = |spec: Value| json!({"metadata": {"name": "bad", "creationTimestamp": "2026-02-01T00:00:00Z"}, "spec": spec});
    let key = "BQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQU=";
    let with = |object: &Value| {
        let mut mesh = two_regions();
        let (peer, rejected) = parse_peer::parse(&serde_json::from_value(object.clone()).unwrap());
        mesh.add_peers(peer);
        let excluded = mesh.topology().excluded.into_iter().map(|e| e.to_string());
        let said = rejected.iter().map(ToString::to_string).chain(excluded);
        let said = said.collect::<Vec<_>>();
        (mesh, said)
    };

    // One item is bad: the other items are carried.
    let good = with(&peer(
        json!({"publicKey": key, "allowedIPs": ["10.5.0.1/32"]}),
    ))
    .0;
    for item in [
        "10.42.0.0/16",
        "10.42.1.5/32",
        "10.43.0.0/16",
        "10.4.0.1/32",
        "192.168.50.0/24",
        "203.0.113.10/32",
    ] {
        let (mesh, said) = with(&peer(
            json!({"publicKey": key, "allowedIPs": ["10.5.0.1/32", item]}),
        ));
        assert_eq!(states(&mesh), states(&good), "{item}");
        assert!(said.len() == 1 && said[0].contains("peer bad"), "{said:?}");
    }

    // All of it is bad.
    let psk = "not a key";
    let master = "ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs=";
    let net = ["10.5.0.1/32"];
    for spec in [
        json!({"publicKey": master, "allowedIPs": net}),
        json!({"publicKey": "x", "allowedIPs": net}),
        json!({"publicKey": key, "allowedIPs": ["x"]}),
        json!({"publicKey": key, "allowedIPs": ["0.0.0.0/0"]}),
        json!({"publicKey": key, "allowedIPs": net, "presharedKey": psk}),
        json!({"publicKey": key, "allowedIPs": net, "persistentKeepalive": -1}),
        json!({"publicKey": key, "allowedIPs": net, "endpoint": {"dnsOrIP": {"ip": "x"}, "port": 1}}),
        json!({"publicKey": key, "allowedIPs": net, "endpoint": {"dnsOrIP": {"ip": "203.0.113.1"}, "port": 0}}),
    ] {
        let (mesh, said) = with(&peer(spec.clone()));
        assert_eq!(states(&mesh), states(&two_regions()), "{spec}");
        assert!(!said.is_empty(), "{spec}");
    }

    // An endpoint that is invalid or unreachable: the peer roams.
    for (ip, dns) in [(Some("10.42.1.1"), None), (None, Some("nowhere.example"))] {
        let endpoint = json!({"dnsOrIP": {"ip": ip, "dns": dns}, "port": 51820});
        let (mesh, _) = with(&peer(
            json!({"publicKey": key, "allowedIPs": net, "endpoint": endpoint}),
        ));
        assert_eq!(states(&mesh), states(&good));
    }
}
