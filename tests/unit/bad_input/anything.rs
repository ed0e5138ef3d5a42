//! Arbitrary text in the annotations.

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

/// Text that is nearly right, which finds more bugs than random text.
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
        // PROPTEST_CASES sets more.
        cases: ProptestConfig::default().cases.max(512),
        ..ProptestConfig::default()
    })]

    /// For any annotations of one node no agent panics and no other region loses its pods.
    #[test]
    fn arbitrary_annotations_of_a_node_cost_no_other_node_its_pods(
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
                let owners = state.peers.values().filter(|peer| peer.routes.contains(&pods[0]));
                prop_assert!(owners.count() <= 1, "{name}");
            }
        }
    }

    /// A parsed value that is formatted again parses to the same value.
    #[test]
    fn a_parsed_annotation_can_be_published_again(text in text()) {
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
