//! An independent model of Kilo's parsing of a Node's annotations: slow, on text, key by key.
//!
//! Kilo and our agents parse these values alike. The tests of bad input cover those that only ours refuse (an
//! endpoint at 127.0.0.1) or only ours accept (a space after a comma).

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use selvedge::cluster::{ParseSettings, node};
use selvedge::topology::{Endpoint, Granularity};
use serde_json::{Value, json};

/// Every key with its values, all equally likely. `None` is its absence.
const VALUES: [(&str, &[Option<&str>]); 11] = [
    (
        "force-endpoint",
        &[
            None,
            None,
            Some("vpn.example.com:443"),
            Some("203.0.113.9"),
            Some("x:0"),
            Some(""),
        ],
    ),
    (
        "endpoint",
        &[
            None,
            Some("203.0.113.1:51820"),
            Some("[2001:db8::1]:51820"),
            Some("203.0.113.1:70000"),
        ],
    ),
    (
        "force-internal-ip",
        &[
            None,
            None,
            Some("-"),
            Some(""),
            Some("10.0.0.9/8"),
            Some("10.0.0.9"),
        ],
    ),
    (
        "internal-ip",
        &[
            None,
            Some(""),
            Some("192.168.50.11/24"),
            Some("192.168.50.11"),
        ],
    ),
    ("leader", &[None, Some("true"), Some("false"), Some("")]),
    ("location", &[None, Some("home"), Some("")]),
    (
        "persistent-keepalive",
        &[None, Some("25"), Some("0"), Some("25s"), Some("")],
    ),
    (
        "allowed-location-ips",
        &[
            None,
            Some("10.6.0.0/24"),
            Some("10.6.0.0/24,nonsense,10.7.0.1/32"),
            Some("nonsense"),
        ],
    ),
    ("last-seen", &[None, Some("1767225600"), Some("now")]),
    (
        "granularity",
        &[None, Some("location"), Some("full"), Some("mesh")],
    ),
    (
        "discovered-endpoints",
        &[
            None,
            Some(""),
            Some("{}"),
            Some("{"),
            Some(
                "{\"jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w=\":{\"IP\":\"198.51.100.7\",\"Port\":24276,\"Zone\":\"\"}}",
            ),
        ],
    ),
];

fn annotations() -> impl Strategy<Value = (BTreeMap<String, String>, bool)> {
    let picks: Vec<_> = VALUES.iter().map(|(_, values)| 0..values.len()).collect();
    (picks, any::<bool>()).prop_map(|(picks, labelled)| {
        let chosen = VALUES.iter().zip(picks);
        let chosen = chosen.filter_map(|((key, values), pick)| {
            let value = values[pick]?;
            Some((format!("kilo.squat.ai/{key}"), value.to_owned()))
        });
        (chosen.collect(), labelled)
    })
}

/// `host:port` with a port from 1 to 65535. Any other text counts as absent.
fn endpoint(text: &str) -> Option<String> {
    let (host, port) = text.rsplit_once(':')?;
    let port: u16 = port.parse().ok()?;
    (port != 0 && host != "x" && !host.is_empty()).then(|| text.to_owned())
}

/// An address with its mask.
fn cidr(text: &str) -> Option<String> {
    let (address, length) = text.split_once('/')?;
    address.parse::<std::net::IpAddr>().ok()?;
    length.parse::<u8>().ok()?;
    Some(text.to_owned())
}

#[test]
fn annotations_are_read_as_kilo_reads_them() {
    let mut runner = TestRunner::new(super::config());
    let result = runner.run(&annotations(), |(annotations, labelled)| {
        let text = |key: &str| {
            annotations
                .get(&format!("kilo.squat.ai/{key}"))
                .map(String::as_str)
        };
        let mut labels = json!({});
        if labelled {
            labels["topology.kubernetes.io/region"] = json!("nd");
        }
        let object = json!({
            "metadata": {"name": "a", "annotations": annotations.clone(), "labels": labels},
            "spec": {"podCIDR": "10.42.1.0/24"},
        });
        let object = serde_json::from_value(object).expect("a Node");
        let read = node::parse(&object, &ParseSettings::default())
            .0
            .expect("a name");

        let expected = text("force-endpoint").and_then(endpoint);
        let expected = expected.or_else(|| text("endpoint").and_then(endpoint));
        let shown = read.endpoint.as_ref().map(|endpoint| match endpoint {
            Endpoint::Addr(address) => address.to_string(),
            Endpoint::Dns { host, port } => format!("{host}:{port}"),
        });
        prop_assert_eq!(shown, expected);

        let published = text("internal-ip").and_then(cidr);
        let expected = match text("force-internal-ip") {
            Some("" | "-") => None,
            Some(forced) => cidr(forced).or(published),
            None => published,
        };
        prop_assert_eq!(read.private_ip.map(|net| net.to_string()), expected);

        prop_assert_eq!(read.leader, text("leader").is_some());
        let label = if labelled { "nd" } else { "" };
        prop_assert_eq!(read.region.0, text("location").unwrap_or(label));
        let keepalive = text("persistent-keepalive").and_then(|text| text.parse::<u16>().ok());
        prop_assert_eq!(
            read.persistent_keepalive.unwrap_or(0),
            keepalive.unwrap_or(0)
        );

        let items = text("allowed-location-ips").unwrap_or_default().split(',');
        let items: Vec<_> = items.filter_map(cidr).collect();
        let shown: Vec<_> = read
            .allowed_location_ips
            .iter()
            .map(ToString::to_string)
            .collect();
        prop_assert_eq!(shown, items);

        let seen = text("last-seen").and_then(|text| text.parse::<i64>().ok());
        prop_assert_eq!(read.last_seen.unwrap_or(0), seen.unwrap_or(0));
        let granularity = match text("granularity") {
            Some("location") => Some(Granularity::Location),
            Some("full") => Some(Granularity::Full),
            _ => None,
        };
        prop_assert_eq!(read.granularity, granularity);

        let found = text("discovered-endpoints").unwrap_or_default();
        let found: Option<BTreeMap<String, Value>> = serde_json::from_str(found).ok();
        let found = found.unwrap_or_default().into_iter().map(|(key, place)| {
            let address = place["IP"].as_str().expect("an address");
            (key, format!("{address}:{}", place["Port"]))
        });
        let shown = read.discovered_endpoints.iter();
        let shown = shown.map(|(key, at)| (key.to_string(), at.to_string()));
        prop_assert_eq!(shown.collect::<Vec<_>>(), found.collect::<Vec<_>>());
        Ok(())
    });
    result.expect("read alike");
}
