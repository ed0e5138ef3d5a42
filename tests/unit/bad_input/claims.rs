//! Nodes and peers that claim what belongs to others.

use super::*;

/// A node that joins the second region, younger than all others.
fn newcomer() -> Value {
    let mut node = objects()
        .into_iter()
        .find(|o| o["metadata"]["name"] == "node-agent-03")
        .unwrap();
    node["metadata"]["name"] = json!("node-agent-04");
    node["metadata"]["creationTimestamp"] = json!("2026-02-01T00:00:00Z");
    let annotations = &mut node["metadata"]["annotations"];
    annotations
        .as_object_mut()
        .unwrap()
        .remove("selvedge.dev/since");
    annotations["kilo.squat.ai/key"] = json!(LAPTOPS_KEY);
    annotations["kilo.squat.ai/endpoint"] = json!("192.168.50.14:51820");
    annotations["kilo.squat.ai/internal-ip"] = json!("192.168.50.14/24");
    annotations["flannel.alpha.coreos.com/public-ip"] = json!("192.168.50.14");
    node["spec"]["podCIDR"] = json!("10.42.4.0/24");
    node["spec"]["podCIDRs"] = json!(["10.42.4.0/24"]);
    node["status"]["addresses"][0]["address"] = json!("192.168.50.14");
    node
}

/// Expects that a newcomer with a bad claim changes the others' states no more than one without it.
fn expect_newcomer(what: &str, claim: impl Fn(&mut Value), without: impl Fn(&mut Value)) {
    let with = |change: &dyn Fn(&mut Value)| {
        let mut node = newcomer();
        change(&mut node);
        let mut objects = objects();
        objects.push(node);
        outcome(&objects)
    };
    let (bad, good) = (with(&claim), with(&without));
    for name in NODES {
        let name = NodeName(name.into());
        assert_eq!(
            bad.states[&name], good.states[&name],
            "{what}: the state of {name}"
        );
    }
    let new: Vec<_> = bad.reports.difference(&good.reports).collect();
    assert!(!new.is_empty(), "{what}: nothing is said");
    assert!(
        new.iter().all(|text| text.contains("node-agent-04")),
        "{what}: {new:?}"
    );
}

#[test]
fn a_newcomer_takes_nothing_from_nodes_and_peers() {
    let annotations = |node: &mut Value, key: &str, value: Option<&str>| {
        let map = node["metadata"]["annotations"].as_object_mut().unwrap();
        match value {
            Some(value) => drop(map.insert(key.to_owned(), json!(value))),
            None => drop(map.remove(key)),
        }
    };
    let pods = |node: &mut Value, cidrs: Value| {
        node["spec"] = json!({"podCIDRs": cidrs});
    };
    expect_newcomer(
        "the master's key",
        |node| annotations(node, "kilo.squat.ai/key", Some(MASTERS_KEY)),
        |node| annotations(node, "kilo.squat.ai/key", None),
    );
    for stolen in [
        "10.42.0.0/24",
        "10.42.1.0/24",
        "10.42.0.0/16",
        "10.42.2.128/25",
    ] {
        expect_newcomer(
            stolen,
            |node| pods(node, json!([stolen])),
            |node| pods(node, json!([])),
        );
    }
    for foreign in ["10.99.0.0/24", "10.43.0.0/24", "0.0.0.0/0", "nonsense"] {
        expect_newcomer(
            foreign,
            |node| pods(node, json!([foreign])),
            |node| pods(node, json!([])),
        );
    }
    expect_newcomer(
        "the master's WireGuard address",
        |node| {
            annotations(node, "kilo.squat.ai/wireguard-ip", Some("10.4.0.1/16"));
            annotations(node, "kilo.squat.ai/leader", Some(""));
            annotations(node, "kilo.squat.ai/location", Some("third"));
        },
        |node| {
            annotations(node, "kilo.squat.ai/leader", Some(""));
            annotations(node, "kilo.squat.ai/location", Some("third"));
        },
    );
}

#[test]
fn a_private_address_of_another_node_is_not_carried() {
    for foreign in [
        "203.0.113.10/24",
        "10.42.0.1/24",
        "10.43.0.1/16",
        "192.168.50.11/24",
        "8.8.8.8/32",
    ] {
        expect_newcomer(
            foreign,
            |node| node["metadata"]["annotations"]["kilo.squat.ai/internal-ip"] = json!(foreign),
            // The kubelet's address still counts.
            |_| {},
        );
    }
}

fn laptop(spec: &Value) -> Value {
    json!({
        "apiVersion": "kilo.squat.ai/v1alpha1",
        "kind": "Peer",
        "metadata": {"name": "laptop", "creationTimestamp": "2026-03-01T00:00:00Z"},
        "spec": spec,
    })
}

#[test]
fn a_bad_peer_counts_as_absent() {
    let good = json!({"allowedIPs": ["10.5.0.1/32"], "publicKey": LAPTOPS_KEY});
    let rows: Vec<(&str, Value)> = vec![
        ("allowedIPs", json!([])),
        ("allowedIPs", json!(["0.0.0.0/0"])),
        ("allowedIPs", json!(["10.5.0.1/32", "nonsense"])),
        ("allowedIPs", json!("10.5.0.1/32")),
        ("endpoint", json!({"dnsOrIP": {}, "port": 51820})),
        (
            "endpoint",
            json!({"dnsOrIP": {"ip": "198.51.100.7"}, "port": 0}),
        ),
        ("endpoint", json!({"dnsOrIP": {"dns": "-"}, "port": 51820})),
        ("persistentKeepalive", json!(-1)),
        ("persistentKeepalive", json!(1_u64 << 40)),
        ("presharedKey", json!("not a key")),
        ("presharedKey", json!(7)),
        ("publicKey", json!("")),
        (
            "publicKey",
            json!("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="),
        ),
    ];
    let owner = Object::Peer("laptop".to_owned());
    for (field, value) in rows {
        let mut spec = good.clone();
        spec[field] = value;
        let mut objects = objects();
        let without = objects.clone();
        objects.push(laptop(&spec));
        expect_only(&format!("laptop {spec}"), &objects, &without, &owner);
    }
}

#[test]
fn a_peer_takes_nothing_from_nodes_and_older_peers() {
    let older = json!({
        "apiVersion": "kilo.squat.ai/v1alpha1",
        "kind": "Peer",
        "metadata": {"name": "office", "creationTimestamp": "2026-02-01T00:00:00Z"},
        "spec": {"allowedIPs": ["10.6.0.0/24"], "publicKey": "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="},
    });
    for stolen in [
        "10.42.0.0/16",
        "10.42.1.0/24",
        "10.42.1.7/32",
        "10.43.0.0/16",
        "10.4.0.1/32",
        "192.168.50.11/32",
        "203.0.113.10/32",
        "10.6.0.0/24",
        "10.6.0.128/25",
    ] {
        let with = |allowed: &[&str]| {
            let mut objects = objects();
            objects.push(older.clone());
            objects.push(laptop(
                &json!({"allowedIPs": allowed, "publicKey": LAPTOPS_KEY}),
            ));
            objects
        };
        let owner = Object::Peer("laptop".to_owned());
        expect_only(
            stolen,
            &with(&["10.5.0.1/32", stolen]),
            &with(&["10.5.0.1/32"]),
            &owner,
        );
    }
}

#[test]
fn a_peer_with_the_key_of_a_node_or_of_an_older_peer_counts_as_absent() {
    let older = json!({
        "apiVersion": "kilo.squat.ai/v1alpha1",
        "kind": "Peer",
        "metadata": {"name": "office", "creationTimestamp": "2026-02-01T00:00:00Z"},
        "spec": {"allowedIPs": ["10.6.0.0/24"], "publicKey": LAPTOPS_KEY},
    });
    for key in [MASTERS_KEY, LAPTOPS_KEY] {
        let mut without = objects();
        without.push(older.clone());
        let mut with = without.clone();
        with.push(laptop(
            &json!({"allowedIPs": ["10.5.0.1/32"], "publicKey": key}),
        ));
        expect_only(key, &with, &without, &Object::Peer("laptop".to_owned()));
    }
}
