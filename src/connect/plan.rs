//! What a machine outside the cluster needs to be a peer of the mesh. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::showconf::Configuration;
use crate::state::{Link, NextHop, Route, RouteKey, Rule, Scope, State, Table};
use crate::topology::{ExternalPeer, InterfaceAddr, Topology};
use crate::wireguard::{PeerConfig, PeerId};

/// The mark of the tunnel's own datagrams, as the agent's `--fwmark`.
pub(super) const FWMARK: u32 = 0x51e0_0000;
/// The priority of the first rule, as the agent's `--rule-priority`.
const RULE_PRIORITY: u32 = 5190;
/// A metric in IPv6 that the kernel does not read as "the default"; IPv4 has no metric.
const METRIC_V6: u32 = 512;

/// What the user asked for.
#[derive(Clone, Debug)]
pub(super) struct Request {
    /// `--interface`.
    pub(super) interface: String,
    /// `--mtu` in bytes.
    pub(super) mtu: u32,
    /// `--allowed-ip`: the address of this machine in the mesh.
    pub(super) address: InterfaceAddr,
    /// `--allowed-ips`: further networks that are reached through the mesh.
    pub(super) extra: Vec<IpNet>,
    /// Where nodes are reached without the tunnel: the API server, lest the tunnel depend on itself, and
    /// the networks this machine is on, whose hosts may have the addresses of nodes far away.
    pub(super) direct: BTreeSet<IpNet>,
}

/// The peers of the tunnel: the primary leaders of the segments, then the other external peers.
///
/// Further networks belong to the first of those leaders that has an endpoint; a leader without one cannot be
/// called, and costs only itself.
pub(super) fn peers(
    topology: &Topology,
    own: &ExternalPeer,
    request: &Request,
) -> BTreeMap<PeerId, PeerConfig> {
    let leaders = topology.leaders();
    let ids = leaders.map(|(_, leader)| (leader.public_key(), leader.peer_id()));
    let external = topology.peers.iter();
    let ids: BTreeMap<_, _> = external
        .map(|peer| (peer.public_key, peer.peer_id()))
        .chain(ids)
        .collect();
    let addresses = topology
        .leaders()
        .map(|(_, leader)| (leader.public_key(), leader.discovered.or(leader.address)));
    let of_peers = topology
        .peer_addresses
        .iter()
        .map(|(key, place)| (*key, place.discovered.or(place.address)));
    let addresses: BTreeMap<_, _> = addresses.chain(of_peers).collect();
    let first = topology
        .segments
        .iter()
        .map(|segment| segment.primary().public_key())
        .find(|key| addresses.get(key).is_some_and(Option::is_some));

    let sections = Configuration::of_peer(topology, own).peers;
    let configs = sections.into_iter().map(|section| {
        let mut allowed_ips: BTreeSet<_> = section.allowed_ips.into_iter().collect();
        if Some(section.public_key) == first {
            allowed_ips.extend(request.extra.iter().copied());
        }
        let key = section.public_key;
        let config = PeerConfig {
            endpoint: addresses.get(&key).copied().flatten(),
            preshared_key: section.preshared_key,
            persistent_keepalive: section.persistent_keepalive.try_into().ok(),
            ..PeerConfig::new(key).with_allowed_ips(allowed_ips)
        };
        let id = ids.get(&key).cloned();
        (id.unwrap_or_else(|| PeerId::from(&key)), config)
    });
    configs.collect()
}

/// The state of this machine: the link with its address, and a route for all that the peers own.
///
/// The tunnel's own datagrams are marked and keep out of the mesh's table, so that an address may be both
/// an endpoint and reached through the tunnel without a loop.
pub(super) fn state(peers: &BTreeMap<PeerId, PeerConfig>, request: &Request) -> State {
    let own = request.address.addr();
    let reached = peers.values().flat_map(|peer| &peer.routes);
    let reached: BTreeSet<_> = reached.filter(|net| !is_direct(net, request)).collect();
    let routes: BTreeMap<_, _> = reached
        .into_iter()
        .map(|net| {
            let key = RouteKey {
                table: Table::Mesh,
                dst: *net,
                metric: if net.addr().is_ipv6() { METRIC_V6 } else { 0 },
            };
            (key, route(net, own, request))
        })
        .collect();
    let families = routes.keys().map(|key| key.dst.addr().is_ipv6());
    let families: BTreeSet<bool> = families.collect();
    let rules = families.into_iter().map(|v6| Rule {
        // The agent's third place, for the same table.
        priority: RULE_PRIORITY + 2,
        v6,
        from: None,
        iif: None,
        fwmark: Some(FWMARK),
        not: true,
        table: Table::Mesh.id(),
    });
    State {
        link: Some(Link {
            name: request.interface.clone(),
            mtu: request.mtu,
            up: true,
        }),
        peers: peers.clone(),
        addresses: [(request.address, Scope::Global)].into(),
        rules: rules.collect(),
        routes,
        ..State::default()
    }
}

fn is_direct(net: &IpNet, request: &Request) -> bool {
    net.prefix_len() == net.max_prefix_len()
        && request.direct.iter().any(|direct| direct.contains(net))
}

fn route(net: &IpNet, own: IpAddr, request: &Request) -> Route {
    let hop = NextHop {
        via: None,
        dev: request.interface.clone(),
        onlink: false,
    };
    Route::Unicast {
        next_hops: [hop].into(),
        src: Some(own).filter(|own| own.is_ipv6() == net.addr().is_ipv6()),
        mtu: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diff::diff;
    use crate::topology::{Endpoint, Leader, Member, NodeName, RegionName, Segment, SegmentName};
    use crate::wireguard::key::PublicKey;

    fn request() -> Request {
        Request {
            interface: "kilo0".into(),
            mtu: 1420,
            address: "10.5.0.1/32".parse().unwrap(),
            extra: vec!["10.43.0.0/16".parse().unwrap()],
            direct: ["203.0.113.10/32".parse().unwrap()].into(),
        }
    }

    fn segment(
        region: &str,
        key: u8,
        pods: &str,
        address: &str,
        endpoint: Option<&str>,
    ) -> Segment {
        let name = SegmentName::Location(RegionName(region.into()));
        let leader = NodeName(format!("{region}-1"));
        let at = endpoint.map(|text| text.parse().unwrap());
        Segment {
            group: name.clone(),
            name,
            leaders: vec![Leader {
                node: leader.clone(),
                keys: vec![PublicKey([key; 32])],
                endpoint: at.map(Endpoint::Addr),
                address: at,
                discovered: at,
                behind_nat: false,
                candidates: vec![],
                keepalive_forced: false,
                persistent_keepalive: 0,
                wireguard_ips: vec![[10, 4, 0, key].into()],
                probe_ip: None,
            }],
            nodes: vec![Member {
                name: leader,
                endpoint: at.map(Endpoint::Addr),
                pod_cidrs: vec![pods.parse().unwrap()],
                addresses: vec![address.parse().unwrap()],
                aliases: [].into(),
                underlay: BTreeSet::new(),
                flannel_ips: [].into(),
                private_ip: None,
            }],
            allowed_location_ips: vec![],
        }
    }

    fn own() -> ExternalPeer {
        ExternalPeer {
            name: "laptop".into(),
            created: 0,
            public_key: PublicKey([9; 32]),
            preshared_key: None,
            endpoint: None,
            persistent_keepalive: 10,
            allowed_ips: vec!["10.5.0.1/32".parse().unwrap()],
        }
    }

    fn two_regions() -> Topology {
        Topology {
            segments: vec![
                segment("away", 1, "10.42.9.0/24", "192.168.9.1", None),
                segment(
                    "cloud",
                    2,
                    "10.42.0.0/24",
                    "203.0.113.10",
                    Some("203.0.113.10:51820"),
                ),
                segment(
                    "office",
                    3,
                    "10.42.1.0/24",
                    "192.168.1.1",
                    Some("192.168.1.1:51820"),
                ),
            ],
            peers: vec![own()],
            ..Topology::default()
        }
    }

    #[test]
    fn everything_of_the_cluster_is_routed_into_the_tunnel() {
        let peers = peers(&two_regions(), &own(), &request());
        let changes = diff(&State::default(), &state(&peers, &request()));
        let changes = changes.iter().map(ToString::to_string);
        // The peers have tests of their own.
        let changes: Vec<_> = changes
            .filter(|change| !change.starts_with("wg "))
            .collect();
        insta::assert_snapshot!(changes.join("\n"), @"
        ip tuntap add kilo0 mode tun; ip link set kilo0 mtu 1420
        ip link set kilo0 up
        ip addr add 10.5.0.1/32 dev kilo0
        ip route replace table 5130 10.4.0.1 dev kilo0 src 10.5.0.1 proto 118
        ip route replace table 5130 10.4.0.2 dev kilo0 src 10.5.0.1 proto 118
        ip route replace table 5130 10.4.0.3 dev kilo0 src 10.5.0.1 proto 118
        ip route replace table 5130 10.42.0.0/24 dev kilo0 src 10.5.0.1 proto 118
        ip route replace table 5130 10.42.1.0/24 dev kilo0 src 10.5.0.1 proto 118
        ip route replace table 5130 10.42.9.0/24 dev kilo0 src 10.5.0.1 proto 118
        ip route replace table 5130 10.43.0.0/16 dev kilo0 src 10.5.0.1 proto 118
        ip route replace table 5130 192.168.1.1 dev kilo0 src 10.5.0.1 proto 118
        ip route replace table 5130 192.168.9.1 dev kilo0 src 10.5.0.1 proto 118
        ip rule add pref 5192 not from all fwmark 0x51e00000 lookup 5130 proto 118
        ");
    }

    #[test]
    fn a_node_without_an_endpoint_disturbs_no_other() {
        let peers = peers(&two_regions(), &own(), &request());

        let [away, cloud] = ["node/away-1", "node/cloud-1"].map(|name| &peers[&PeerId::new(name)]);
        assert_eq!(away.endpoint, None);
        assert!(cloud.endpoint.is_some());
        let services = "10.43.0.0/16".parse().unwrap();
        assert!(cloud.routes.contains(&services));
        assert!(!away.routes.contains(&services));
    }

    #[test]
    fn an_endpoint_that_is_a_nodes_address_makes_no_loop() {
        let peers = peers(&two_regions(), &own(), &request());
        let state = state(&peers, &request());

        // The address is routed into the tunnel, the tunnel's own datagrams to it are not.
        assert!(
            state
                .routes
                .keys()
                .any(|key| key.dst.to_string() == "192.168.1.1/32")
        );
        let first = state.rules.first().unwrap();
        assert_eq!((first.not, first.fwmark), (true, Some(FWMARK)));
    }

    #[test]
    fn hosts_of_the_own_network_are_not_looked_for_in_the_cluster() {
        let mut request = request();
        request.direct.insert("192.168.1.0/24".parse().unwrap());
        let peers = peers(&two_regions(), &own(), &request);
        let state = state(&peers, &request);

        let routed = |net: &str| state.routes.keys().any(|key| key.dst.to_string() == net);
        assert!(!routed("192.168.1.1/32"));
        assert!(routed("10.42.1.0/24") && routed("192.168.9.1/32"));
    }

    #[test]
    fn keepalives_are_this_peers_own() {
        let peers = peers(&two_regions(), &own(), &request());
        assert!(
            peers
                .values()
                .all(|peer| peer.persistent_keepalive == 10_u16.try_into().ok())
        );
    }
}
