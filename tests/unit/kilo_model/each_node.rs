//! The tunnel's configuration and the annotations of each node by Kilo's rules, given the model's segments.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use proptest::prelude::*;
use selvedge::agent::publication;
use selvedge::config::Config;
use selvedge::topology::{Endpoint, Granularity, Ledger, NodeName, OtherKeys, Topology};
use selvedge::wireguard::key::PublicKey;

use super::{Hits, ModelSegment, model_peers};
use crate::mesh::Mesh;

/// Compares the tunnel's peers with those of `kg`: one for each other segment and each external peer.
pub(super) fn entries_are_kilos(
    mesh: &Mesh,
    topology: &Topology,
    segments: &[ModelSegment],
    me: &NodeName,
    hits: &Hits,
) -> Result<(), TestCaseError> {
    let Some(own) = segments
        .iter()
        .find(|segment| segment.nodes.contains(&me.0))
    else {
        return Ok(());
    };
    let node = &mesh.snapshot.nodes[me];
    let state = mesh.plan(topology, me).expect("ready");
    let annotated = node.endpoint.as_ref().expect("ready");
    let port = match annotated {
        Endpoint::Addr(address) => address.port(),
        Endpoint::Dns { port, .. } => *port,
    };
    prop_assert_eq!(state.listen_port.map(u16::from), Some(port));
    hits.hit("a node listens on the port of its endpoint");
    if own.leader != me.0 {
        hits.hit("a node that does not lead has no entries");
        prop_assert!(state.peers.is_empty());
        return Ok(());
    }

    let peers = state.peers.values();
    let peers: BTreeMap<_, _> = peers.map(|peer| (peer.public_key, peer)).collect();
    let mut expected = BTreeMap::new();
    for segment in segments.iter().filter(|segment| segment.name != own.name) {
        let leader = &mesh.snapshot.nodes[&NodeName(segment.leader.clone())];
        let key = leader.public_key.expect("ready");
        let mut endpoint = segment.endpoint;
        if let Some(seen) = mesh.observed.get(&key)
            && segment.keepalive != 0
        {
            hits.hit("what a node sees itself counts first");
            endpoint = Some(*seen);
        }
        hits.when(
            own.keepalive == 0 && segment.keepalive != 0,
            "a node without keepalives sends none to a peer that does",
        );
        expected.insert(key, (endpoint, None));
    }
    for (name, _) in model_peers(mesh, &Hits::default()) {
        let peer = &mesh.snapshot.peers[&name];
        hits.when(peer.preshared_key.is_some(), "a peer has its preshared key");
        // The device's endpoint has precedence: the peer starts the handshake, and the device follows.
        let entry = peers.get(&peer.public_key);
        let endpoint = entry.and_then(|entry| entry.endpoint);
        expected.insert(peer.public_key, (endpoint, peer.preshared_key.clone()));
    }
    prop_assert_eq!(
        peers.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>()
    );
    for (key, (endpoint, preshared_key)) in expected {
        let entry = peers[&key];
        let keepalive = entry.persistent_keepalive.map_or(0, u16::from);
        prop_assert_eq!(keepalive, node.persistent_keepalive.unwrap_or(0), "{}", me);
        hits.when(keepalive != 0, "every entry has the node's own keepalive");
        prop_assert_eq!(&entry.preshared_key, &preshared_key);
        if !is_sent_elsewhere(mesh, own, endpoint) {
            prop_assert_eq!(entry.endpoint, endpoint, "{} to {}", me, key);
        }
    }
    Ok(())
}

/// Selvedge never sends to a leader of another region at an address of its own region, and two leaders behind
/// one router use their private addresses. Neither changes other nodes.
fn is_sent_elsewhere(mesh: &Mesh, own: &ModelSegment, endpoint: Option<SocketAddr>) -> bool {
    let Some(endpoint) = endpoint else {
        return false;
    };
    let near = mesh.snapshot.nodes.values().any(|node| {
        let private = node.private_ip.map(|net| net.addr());
        private == Some(endpoint.ip()) || node.internal_ips.contains(&endpoint.ip())
    });
    let router = own.endpoint.is_some_and(|own| own.ip() == endpoint.ip());
    near || router
}

/// The annotations that `kg` would publish on the node, with Selvedge's mark. The operator's endpoint and address
/// are used, since Selvedge detects its own at every pass, and Kilo only once.
pub(super) fn annotations_are_kilos(
    mesh: &Mesh,
    topology: &Topology,
    segments: &[ModelSegment],
    me: &NodeName,
) -> Result<(), TestCaseError> {
    let mut node = mesh.snapshot.nodes[me].clone();
    let is_ready = segments.iter().any(|segment| segment.nodes.contains(&me.0));
    let (true, Some(public_key), Some(endpoint)) = (is_ready, node.public_key, &node.endpoint)
    else {
        return Ok(());
    };
    let mut expected = BTreeMap::new();
    let mut publish = |key: &str, value: String| {
        expected.insert(format!("kilo.squat.ai/{key}"), value);
    };
    publish("key", public_key.to_string());
    publish(
        "endpoint",
        match endpoint {
            Endpoint::Addr(address) => address.to_string(),
            Endpoint::Dns { host, port } => format!("{host}:{port}"),
        },
    );
    publish(
        "internal-ip",
        node.private_ip
            .map(|net| net.to_string())
            .unwrap_or_default(),
    );
    let full = mesh.agreed.granularity == Granularity::Full;
    publish(
        "granularity",
        if full { "full" } else { "location" }.to_owned(),
    );
    publish("last-seen", "999999".to_owned());
    publish("cni-compatibility-ip", String::new());
    let leads = segments.iter().find(|segment| segment.leader == me.0);
    publish(
        "wireguard-ip",
        leads
            .map(|led| format!("{}/16", led.wireguard_ip))
            .unwrap_or_default(),
    );
    expected.insert(
        "selvedge.dev/agent".to_owned(),
        format!("{} last-seen=999999", env!("CARGO_PKG_VERSION")),
    );

    node.endpoint_forced = true;
    node.private_ip_forced = true;
    let config = Config::from_args([format!("--hostname={me}").as_str()]);
    let config = config.map_err(|error| TestCaseError::fail(error.to_string()))?;
    let published = publication::annotations(&publication::Inputs {
        node: &node,
        snapshot: &mesh.snapshot,
        topology,
        config: &config,
        links: node.private_ip.as_slice(),
        offered: &[],
        port: config.port,
        public_key,
        other_keys: OtherKeys::default(),
        heard: &mesh.observed,
        last_seen: 999_999,
        server_time: None,
        pending: &Ledger::default(),
        lead: None,
    });
    let mut published: BTreeMap<_, _> = published
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect();
    let seen = published.remove("kilo.squat.ai/discovered-endpoints");
    // Kilo has no ledger.
    published.remove("selvedge.dev/since");
    prop_assert_eq!(published, expected);

    // Of all observations: those of leaders with keepalives, and of peers.
    let mut sought = BTreeSet::<PublicKey>::new();
    for segment in segments.iter().filter(|segment| segment.keepalive != 0) {
        sought.extend(mesh.snapshot.nodes[&NodeName(segment.leader.clone())].public_key);
    }
    for (name, _) in model_peers(mesh, &Hits::default()) {
        sought.insert(mesh.snapshot.peers[&name].public_key);
    }
    sought.remove(&public_key);
    let mut known = BTreeMap::new();
    let members = segments.iter().flat_map(|segment| &segment.nodes);
    let members = members.map(|name| &mesh.snapshot.nodes[&NodeName(name.clone())]);
    // The device's, then those published before a restart, then the first by segment and name.
    let told = std::iter::once(&node)
        .chain(members)
        .map(|node| &node.discovered_endpoints);
    for places in std::iter::once(&mesh.observed).chain(told) {
        for (key, at) in places.iter().filter(|(key, _)| sought.contains(key)) {
            known.entry(key.to_string()).or_insert_with(
                || serde_json::json!({"IP": at.ip().to_string(), "Port": at.port(), "Zone": ""}),
            );
        }
    }
    if leads.is_none() {
        known.clear();
    }
    let seen = seen.map(|text| serde_json::from_str::<BTreeMap<_, _>>(&text).expect("JSON"));
    prop_assert_eq!(seen.unwrap_or_default(), known, "{}", me);
    Ok(())
}
