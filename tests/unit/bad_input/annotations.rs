//! Each annotation of a Node, one bad value at a time.

use super::*;

/// One row: the annotation, a bad value, and the value that it counts as; `None` is its absence.
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
fn a_bad_endpoint_counts_as_absent() {
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
fn a_bad_private_address_counts_as_absent() {
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
fn allowed_location_ips_of_other_owners_are_left_out() {
    let key = "kilo.squat.ai/allowed-location-ips";
    expect_annotations(&[
        // Pods, services and WireGuard addresses of the cluster.
        (key, "10.42.0.0/16", None),
        (key, "10.43.7.0/24", None),
        (key, "10.4.0.0/16", None),
        (key, "10.6.0.0/24,10.42.1.0/25", Some("10.6.0.0/24")),
    ]);
}

#[test]
fn a_bad_request_for_a_wireguard_address_counts_as_absent() {
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
fn a_requested_address_outside_the_subnet_counts_as_absent() {
    for leader in ["node-master", "node-agent-01"] {
        let with = |value: Option<&str>| {
            let mut objects = objects();
            object(&mut objects, leader)["metadata"]["annotations"]["kilo.squat.ai/wireguard-ip"] =
                json!(value);
            objects
        };
        let owner = Object::Node(NodeName(leader.into()));
        // Null is not a string: the annotation counts as absent.
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
fn a_bad_keepalive_counts_as_absent() {
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
fn a_bad_last_seen_time_counts_as_absent() {
    let key = "kilo.squat.ai/last-seen";
    for text in ["", "yesterday", "9223372036854775808", "1.5"] {
        expect_annotations(&[(key, text, None)]);
    }
}

#[test]
fn a_leader_annotation_of_false_still_counts_and_is_reported() {
    expect_annotations(&[
        ("kilo.squat.ai/leader", "false", Some("")),
        ("kilo.squat.ai/leader", "False", Some("true")),
    ]);
}

#[test]
fn a_bad_location_counts_as_absent() {
    let key = "kilo.squat.ai/location";
    expect_annotations(&[
        (key, &"x".repeat(64), None),
        (key, &"x".repeat(65_536), None),
        (key, "a\nb", None),
        (key, "\u{0}", None),
    ]);
}

#[test]
fn bad_discovered_endpoints_count_as_absent() {
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
fn a_bad_granularity_counts_as_absent() {
    expect_annotations(&[
        ("kilo.squat.ai/granularity", "mesh", None),
        ("kilo.squat.ai/granularity", "Full", None),
    ]);
}

#[test]
fn bad_flannel_annotations_count_as_absent() {
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

/// Expects that `change` to a Node changes no other node's state.
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
fn irrelevant_changes_of_a_node_change_no_plan() {
    for victim in NODES {
        let reports = expect_others_untouched("annotations of a megabyte", victim, |node| {
            node["metadata"]["annotations"]["x.example/large"] = json!("x".repeat(1 << 20));
            node["metadata"]["labels"]["x.example/\u{202e}"] = json!("\u{0}");
            node["status"]["images"] = json!([{"names": ["x"], "sizeBytes": -1}]);
        });
        assert!(reports.is_empty(), "{reports:?}");
    }
}
