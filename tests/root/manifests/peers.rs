//! Which Peers the API lets in.

use super::*;

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
    let mut answer = (201, String::new());
    wait_for("a list with a mistake", Duration::from_secs(30), || {
        answer = create("172.30.7.0/24");
        answer.0 != 201
    })
    .unwrap();
    assert!(
        answer
            .1
            .contains("selvedge-networks holds 172.31.0.0, which is not a network"),
        "{answer:?}"
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
