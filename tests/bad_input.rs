//! What people and programs write wrongly into the cluster's objects, from the object to the plan.
//!
//! A bad value is as if it were not there: every node's state is byte for byte what it is without it,
//! and it is said once, of the object and the field that it stands in.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use selvedge::cluster::{Object, ParseSettings, Rejected, node, peer};
use selvedge::plan::State;
use selvedge::topology::{NodeName, Topology};
use serde_json::{Value, json};

#[expect(dead_code, reason = "every test binary uses its own part")]
mod mesh;

use mesh::Mesh;

const NODES: [&str; 4] = [
    "node-master",
    "node-agent-01",
    "node-agent-02",
    "node-agent-03",
];
const MASTERS_KEY: &str = "ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs=";
const LAPTOPS_KEY: &str = "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw=";

/// The objects of scenario 000.
fn objects() -> Vec<Value> {
    let list: Value = serde_yaml_ng::from_str(include_str!("testdata/two-regions.yaml")).unwrap();
    list["items"].as_array().unwrap().clone()
}

fn object<'a>(objects: &'a mut [Value], name: &str) -> &'a mut Value {
    let named = |object: &&mut Value| object["metadata"]["name"] == name;
    objects.iter_mut().find(named).unwrap()
}

/// What all agents make of the objects, and what they report.
#[derive(Debug)]
struct Outcome {
    topology: Topology,
    states: BTreeMap<NodeName, Option<State>>,
    reports: BTreeSet<String>,
}

fn outcome(objects: &[Value]) -> Outcome {
    let mut mesh = Mesh::new([]);
    let mut rejected: Vec<Rejected> = Vec::new();
    for object in objects {
        if object["kind"] == "Peer" {
            let (peer, refused) = peer::parse(&serde_json::from_value(object.clone()).unwrap());
            mesh.add_peers(peer);
            rejected.extend(refused);
        } else {
            let parsed = serde_json::from_value(object.clone()).unwrap();
            let (node, refused) = node::parse(&parsed, &ParseSettings::default());
            mesh.snapshot
                .nodes
                .extend(node.map(|node| (node.name.clone(), node)));
            rejected.extend(refused);
        }
    }
    for refused in &rejected {
        assert!(refused.value.len() <= 256, "{refused:?}");
        assert!(
            !refused.to_string().contains(char::is_control),
            "{refused:?}"
        );
    }
    let topology: Topology = mesh.topology();
    let mut reports: BTreeSet<_> = rejected.iter().map(ToString::to_string).collect();
    reports.extend(topology.excluded.iter().map(ToString::to_string));
    reports.extend(topology.overlaps.iter().map(ToString::to_string));
    let names: Vec<_> = mesh.names().cloned().collect();
    let states = names.into_iter().map(|name| {
        let state = mesh.plan(&topology, &name);
        (name, state)
    });
    let states = states.collect();
    Outcome {
        topology,
        states,
        reports,
    }
}

/// Expects that `bad` is for everybody as `without` is, but for one report that names `object`.
fn expect_only(what: &str, bad: &[Value], without: &[Value], object: &Object) {
    let (bad, without) = (outcome(bad), outcome(without));
    for (name, state) in &without.states {
        assert_eq!(
            bad.states.get(name),
            Some(state),
            "{what}: the state of {name}"
        );
    }
    let new: Vec<_> = bad.reports.difference(&without.reports).collect();
    assert_eq!(new.len(), 1, "{what}: {new:?}");
    assert!(new[0].starts_with(&object.to_string()), "{what}: {new:?}");
}

/// One row: the annotation, what is wrong with it, what it counts as; none is its absence.
type Row<'a> = (&'a str, &'a str, Option<&'a str>);

fn expect_annotations(rows: &[Row<'_>]) {
    for (key, bad, counts_as) in rows {
        for victim in NODES {
            let with = |value: Option<&str>| {
                let mut objects = objects();
                let annotations = &mut object(&mut objects, victim)["metadata"]["annotations"];
                match value {
                    Some(value) => annotations[*key] = json!(value),
                    None => drop(annotations.as_object_mut().unwrap().remove(*key)),
                }
                objects
            };
            let shown: String = bad.chars().take(60).collect();
            let what = format!("{victim} {key}={shown:?}");
            let owner = Object::Node(NodeName(victim.into()));
            expect_only(&what, &with(Some(bad)), &with(*counts_as), &owner);
        }
    }
}

#[test]
fn a_bad_key_leaves_the_node_without_one() {
    let key = "kilo.squat.ai/key";
    expect_annotations(&[
        (key, "", None),
        (key, "not base64", None),
        (key, "AAAA", None),
        (key, "jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w", None),
        (key, " jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w=", None),
        (key, "jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF1w==", None),
        (key, "jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10wA", None),
        (key, &"A".repeat(100_000), None),
        (key, "\u{1b}[2J\r\nkey", None),
    ]);
}

#[test]
fn a_key_of_small_order_leaves_the_node_without_one() {
    use base64::Engine as _;

    // The seven points of small order and their twins beyond the field's prime.
    let points = [
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    ];
    for point in points {
        let bytes: Vec<_> = (0..32)
            .map(|at| u8::from_str_radix(&point[2 * at..2 * at + 2], 16).unwrap())
            .collect();
        let text = base64::engine::general_purpose::STANDARD.encode(bytes);
        expect_annotations(&[("kilo.squat.ai/key", &text, None)]);
    }
}

#[test]
fn a_bad_endpoint_is_as_none() {
    let long = format!("{}.example:51820", "a".repeat(254));
    let bad = [
        "",
        "203.0.113.10",
        "203.0.113.10:",
        "203.0.113.10:0",
        "203.0.113.10:-1",
        "203.0.113.10:65536",
        "203.0.113.10:70000",
        "[::1%eth0]:1",
        "[::ffff:203.0.113.10]:51820",
        "[::1]:51820",
        "[ff02::1]:51820",
        "224.0.0.1:51820",
        "127.0.0.1:51820",
        "0.0.0.0:51820",
        "169.254.1.1:51820",
        "vpn.exämple.com:51820",
        "vpn.ехаmple.com:51820",
        "vpn.example.com:51820 ",
        "vpn.example.com:51820\r\n",
        "203.0.113.10:51820,203.0.113.11:51820",
        long.as_str(),
    ];
    for text in bad {
        expect_annotations(&[
            ("kilo.squat.ai/force-endpoint", text, None),
            ("kilo.squat.ai/endpoint", text, None),
        ]);
    }
}

#[test]
fn a_bad_private_address_is_as_none() {
    for text in [
        "192.168.50.11",
        "192.168.50.11/33",
        "192.168.50.11/0",
        "192.168.50.0/24",
        "none",
        "127.0.0.1/8",
        "fe80::1/64",
        "::ffff:192.168.50.11/120",
    ] {
        expect_annotations(&[
            ("kilo.squat.ai/internal-ip", text, None),
            ("kilo.squat.ai/force-internal-ip", text, None),
        ]);
    }
}

#[test]
fn bad_items_of_allowed_location_ips_leave_the_good_ones() {
    let key = "kilo.squat.ai/allowed-location-ips";
    let many: Vec<_> = (0..10_000)
        .map(|i| format!("10.{}.{}.0/24", 64 + i / 256, i % 256))
        .collect();
    expect_annotations(&[
        (key, "0.0.0.0/0", None),
        (key, "::/0", None),
        (key, "10.6.0.0/24,0.0.0.0/0", Some("10.6.0.0/24")),
        (key, "10.6.0.0/24,10.6.0.0", Some("10.6.0.0/24")),
        (
            key,
            "10.6.0.0/24,nonsense,,10.7.0.0/24",
            Some("10.6.0.0/24,10.7.0.0/24"),
        ),
        (
            key,
            "10.6.0.9/24,10.6.0.0/24,128.0.0.0/1",
            Some("10.6.0.0/24"),
        ),
        (key, "10.6.0.0/24,224.0.0.0/8", Some("10.6.0.0/24")),
        (key, &many.join(","), Some(&many[..256].join(","))),
    ]);
}

#[test]
fn allowed_location_ips_that_are_others_are_left_out() {
    let key = "kilo.squat.ai/allowed-location-ips";
    expect_annotations(&[
        // Pods, services and WireGuard addresses of everybody.
        (key, "10.42.0.0/16", None),
        (key, "10.43.7.0/24", None),
        (key, "10.4.0.0/16", None),
        (key, "10.6.0.0/24,10.42.1.0/25", Some("10.6.0.0/24")),
    ]);
}

#[test]
fn a_bad_wish_for_a_wireguard_address_is_as_none() {
    let key = "kilo.squat.ai/wireguard-ip";
    expect_annotations(&[
        (key, "10.4.0.7", None),
        (key, "10.4.0.0/16", None),
        (key, "10.4.255.255/16", None),
        (key, "10.4.0.7/33", None),
        (key, "10.4.0.7/16,10.4.0.8/16", None),
        (key, "nonsense", None),
    ]);
}

#[test]
fn a_wish_for_an_address_outside_the_subnet_is_as_none() {
    for leader in ["node-master", "node-agent-01"] {
        let with = |value: Option<&str>| {
            let mut objects = objects();
            object(&mut objects, leader)["metadata"]["annotations"]["kilo.squat.ai/wireguard-ip"] =
                json!(value);
            objects
        };
        let owner = Object::Node(NodeName(leader.into()));
        // Null is no text: the annotation as absent.
        let mut without = with(None);
        let annotations = &mut object(&mut without, leader)["metadata"]["annotations"];
        annotations
            .as_object_mut()
            .unwrap()
            .remove("kilo.squat.ai/wireguard-ip");
        expect_only(leader, &with(Some("192.168.77.1/16")), &without, &owner);
    }
}

#[test]
fn a_bad_keepalive_is_as_none() {
    let key = "kilo.squat.ai/persistent-keepalive";
    for text in [
        "",
        "-1",
        "65536",
        "1e3",
        "25s",
        "9223372036854775808",
        " 25",
        "٢٥",
    ] {
        expect_annotations(&[(key, text, None)]);
    }
}

#[test]
fn a_bad_time_of_the_last_sign_of_life_is_as_none() {
    let key = "kilo.squat.ai/last-seen";
    for text in ["", "yesterday", "9223372036854775808", "1.5"] {
        expect_annotations(&[(key, text, None)]);
    }
}

#[test]
fn a_leader_annotation_that_says_false_still_counts_and_is_pointed_out() {
    expect_annotations(&[
        ("kilo.squat.ai/leader", "false", Some("")),
        ("kilo.squat.ai/leader", "False", Some("true")),
    ]);
}

#[test]
fn a_bad_location_is_as_none() {
    let key = "kilo.squat.ai/location";
    expect_annotations(&[
        (key, &"x".repeat(64), None),
        (key, &"x".repeat(65_536), None),
        (key, "a\nb", None),
        (key, "\u{0}", None),
    ]);
}

#[test]
fn bad_discovered_endpoints_are_as_none() {
    let key = "kilo.squat.ai/discovered-endpoints";
    let many: BTreeMap<_, _> = (0..10_000)
        .map(|i| {
            (
                i.to_string(),
                json!({"IP": "198.51.100.7", "Port": 1, "Zone": ""}),
            )
        })
        .collect();
    let entry = |key: &str, ip: &str, port: u32, zone: &str| {
        json!({key: {"IP": ip, "Port": port, "Zone": zone}}).to_string()
    };
    expect_annotations(&[
        (key, "{", None),
        (key, "[]", None),
        (key, "\"text\"", None),
        (key, "7", None),
        (key, &json!(many).to_string(), None),
        (key, &entry("short", "198.51.100.7", 1, ""), None),
        (key, &entry(MASTERS_KEY, "127.0.0.1", 1, ""), None),
        (key, &entry(MASTERS_KEY, "198.51.100.7", 0, ""), None),
        (key, &entry(MASTERS_KEY, "198.51.100.7", 70_000, ""), None),
        (key, &entry(MASTERS_KEY, "fe80::1", 1, "eth0"), None),
    ]);
}

#[test]
fn a_bad_granularity_is_as_none() {
    expect_annotations(&[
        ("kilo.squat.ai/granularity", "mesh", None),
        ("kilo.squat.ai/granularity", "Full", None),
    ]);
}

#[test]
fn bad_annotations_of_flannels_cost_what_they_are_for() {
    let data = "flannel.alpha.coreos.com/backend-data";
    let public_ip = "flannel.alpha.coreos.com/public-ip";
    expect_annotations(&[
        (data, "{\"VNI\":1,\"VtepMAC\":", None),
        (data, "\u{feff}{}", None),
        (public_ip, "192.168.50.256", None),
        (public_ip, "127.0.0.1", None),
        (public_ip, "2001:db8::1", None),
    ]);
}

/// Expects that `change` to a Node is for all others as if it had not been made.
fn expect_others_untouched(
    what: &str,
    victim: &str,
    change: impl Fn(&mut Value),
) -> BTreeSet<String> {
    let mut objects = objects();
    let before = outcome(&objects);
    change(object(&mut objects, victim));
    let after = outcome(&objects);
    for name in NODES.into_iter().filter(|name| *name != victim) {
        let name = NodeName(name.into());
        assert_eq!(
            after.states[&name], before.states[&name],
            "{what}: the state of {name}"
        );
    }
    after.reports.difference(&before.reports).cloned().collect()
}

#[test]
fn what_does_not_matter_of_a_node_disturbs_nobody() {
    for victim in NODES {
        let reports = expect_others_untouched("annotations of a megabyte", victim, |node| {
            node["metadata"]["annotations"]["x.example/large"] = json!("x".repeat(1 << 20));
            node["metadata"]["labels"]["x.example/\u{202e}"] = json!("\u{0}");
            node["status"]["images"] = json!([{"names": ["x"], "sizeBytes": -1}]);
        });
        assert!(reports.is_empty(), "{reports:?}");
    }
}

/// A node that joins the second region, younger than all.
fn newcomer() -> Value {
    let mut node = objects()
        .into_iter()
        .find(|o| o["metadata"]["name"] == "node-agent-03")
        .unwrap();
    node["metadata"]["name"] = json!("node-agent-04");
    node["metadata"]["creationTimestamp"] = json!("2026-02-01T00:00:00Z");
    let annotations = &mut node["metadata"]["annotations"];
    annotations["kilo.squat.ai/key"] = json!(LAPTOPS_KEY);
    annotations["kilo.squat.ai/endpoint"] = json!("192.168.50.14:51820");
    annotations["kilo.squat.ai/internal-ip"] = json!("192.168.50.14/24");
    annotations["flannel.alpha.coreos.com/public-ip"] = json!("192.168.50.14");
    node["spec"]["podCIDR"] = json!("10.42.4.0/24");
    node["spec"]["podCIDRs"] = json!(["10.42.4.0/24"]);
    node["status"]["addresses"][0]["address"] = json!("192.168.50.14");
    node
}

/// Expects that a newcomer with a bad claim is for the others as one without it.
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
fn a_newcomer_takes_nothing_from_anybody() {
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
fn a_foreign_private_address_is_not_carried() {
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
            // What the kubelet says counts all the same.
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
fn a_bad_peer_is_as_none() {
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
fn a_peer_with_the_key_of_a_node_or_of_an_older_peer_is_as_none() {
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

mod anything {
    use proptest::prelude::*;
    use selvedge::cluster::annotation as read;

    use super::*;

    const KEYS: [&str; 17] = [
        "flannel.alpha.coreos.com/backend-data",
        "flannel.alpha.coreos.com/backend-type",
        "flannel.alpha.coreos.com/kube-subnet-manager",
        "flannel.alpha.coreos.com/public-ip",
        "flannel.alpha.coreos.com/public-ipv6",
        read::ALLOWED_LOCATION_IPS,
        read::DISCOVERED_ENDPOINTS,
        read::ENDPOINT,
        read::FORCE_ENDPOINT,
        read::FORCE_INTERNAL_IP,
        read::GRANULARITY,
        read::INTERNAL_IP,
        read::KEY,
        read::LAST_SEEN,
        read::LOCATION,
        read::PERSISTENT_KEEPALIVE,
        read::WIREGUARD_IP,
    ];

    /// Text that is nearly right, which finds more than text that is not at all.
    fn text() -> impl Strategy<Value = String> {
        prop_oneof![
            any::<String>(),
            "[0-9a-f.:/,\\[\\]%-]{0,40}",
            "[0-9]{1,3}(\\.[0-9]{1,3}){3}(/[0-9]{1,2})?(:[0-9]{1,5})?",
            "(10|172|192)\\.[0-9]{1,2}\\.[0-9]{1,2}\\.[0-9]{1,2}/(8|16|24|31|32)",
            "[A-Za-z0-9+/]{43}=",
            "\\{\"[A-Za-z0-9+/]{43}=\":\\{\"IP\":\"[0-9.:]{1,15}\",\"Port\":[0-9]{1,6},\"Zone\":\"\"\\}\\}",
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            // PROPTEST_CASES asks for more.
            cases: ProptestConfig::default().cases.max(512),
            ..ProptestConfig::default()
        })]

        /// Whatever stands on one node, no agent panics and no other region loses its pods.
        #[test]
        fn on_a_node_costs_no_other_node_its_pods(
            victim in 0..NODES.len(),
            annotations in prop::collection::btree_map(prop::sample::select(&KEYS[..]), text(), 0..6),
        ) {
            let mut objects = objects();
            for (key, value) in &annotations {
                object(&mut objects, NODES[victim])["metadata"]["annotations"][*key] = json!(value);
            }
            let pods = |name: &str| {
                let object = objects.iter().find(|object| object["metadata"]["name"] == name);
                object.unwrap()["spec"]["podCIDR"].as_str().unwrap().to_owned()
            };
            let outcome = outcome(&objects);
            for name in NODES.into_iter().filter(|name| *name != NODES[victim]) {
                let pods = [pods(name).parse().unwrap()];
                let member = outcome.topology.member(&NodeName(name.into())).unwrap();
                prop_assert_eq!(&member.pod_cidrs[..], &pods[..], "{}", name);
                for state in outcome.states.values().flatten() {
                    let owners = state.peers.values().filter(|peer| peer.allowed_ips.contains(&pods[0]));
                    prop_assert!(owners.count() <= 1, "{name}");
                }
            }
        }

        /// What is read and written again reads the same.
        #[test]
        fn that_is_read_can_be_published(text in text()) {
            if let Ok(endpoint) = read::endpoint(&text) {
                prop_assert_eq!(read::endpoint(&read::format_endpoint(&endpoint)), Ok(endpoint));
            }
            if let Ok(addrs) = read::wireguard_ips(&text) {
                prop_assert_eq!(read::wireguard_ips(&read::format_addrs(&addrs)), Ok(addrs));
            }
            if let Ok(found) = read::discovered(&text) {
                let again = read::discovered(&read::format_discovered(&found.endpoints)).unwrap();
                prop_assert_eq!(again.endpoints, found.endpoints);
            }
        }
    }
}
