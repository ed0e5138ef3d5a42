//! Random clusters: small, so that names, addresses and prefixes collide often.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use proptest::collection::{btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use selvedge::flannel::Backend;
use selvedge::policy::{Encapsulation, OnTunnelDown};
use selvedge::topology::{
    Claim, Endpoint, ExternalPeer, Granularity, Ledger, Node, NodeName, OtherKeys, RegionName,
    SegmentName,
};

use crate::mesh::{Mesh, With, addr, ip, key, net, recorded, vpn_peer};

/// Where a node is and what it says of that.
fn addresses() -> impl Strategy<Value = (Option<IpNet>, Vec<IpAddr>)> {
    let private = (0..3u8, 1..6u8).prop_map(|(subnet, host)| {
        let address = net(&format!("192.168.{subnet}.{host}/24"));
        (Some(address), vec![address.addr()])
    });
    let public = (1..6u8).prop_map(|host| (None, vec![ip(&format!("203.0.113.{host}"))]));
    let both = (0..3u8, 1..6u8).prop_map(|(subnet, host)| {
        let address = net(&format!("10.0.{subnet}.{host}/20"));
        let other = ip(&format!("fd00::{subnet}:{host}"));
        (Some(address), vec![address.addr(), other])
    });
    // What the annotation says is not what the status says.
    let lie = (1..6u8).prop_map(|host| {
        let claimed = net(&format!("192.168.0.{host}/24"));
        (Some(claimed), vec![ip("192.168.77.7")])
    });
    prop_oneof![4 => private, 2 => public, 2 => both, 1 => lie]
}

fn endpoint() -> impl Strategy<Value = Option<Endpoint>> {
    let address = prop_oneof![
        (1..6u8).prop_map(|host| format!("203.0.113.{host}:51820")),
        (0..3u8, 1..6u8).prop_map(|(s, h)| format!("192.168.{s}.{h}:51820")),
        Just("100.64.0.9:51820".to_owned()),
        Just("10.42.3.3:51820".to_owned()),
        Just("127.0.0.1:51820".to_owned()),
    ];
    let address = address.prop_map(|text| addr(&text).expect("an endpoint"));
    let name = prop_oneof![Just("a.example"), Just("unknown.example")];
    let name = name.prop_map(|host| Endpoint::Dns {
        host: host.into(),
        port: 51820,
    });
    option::weighted(0.9, prop_oneof![4 => address, 1 => name])
}

fn location_ips() -> impl Strategy<Value = Vec<IpNet>> {
    let items = prop_oneof![
        Just("10.6.0.0/24"),
        Just("10.6.0.7/32"),
        Just("192.168.0.0/16"),
        Just("192.168.1.3/32"),
        Just("10.42.1.5/32"),
        Just("0.0.0.0/0"),
        Just("10.4.0.1/32"),
        Just("10.4.0.3/32"),
        Just("10.5.0.1/32"),
        Just("172.30.0.0/16"),
    ];
    prop_oneof![3 => Just(vec![]), 1 => vec(items.prop_map(net), 1..4)]
}

fn seen() -> impl Strategy<Value = Vec<(u8, SocketAddr)>> {
    let address = (1..4u8, 1..4u16)
        .prop_map(|(host, port)| SocketAddr::new(ip(&format!("198.51.100.{host}")), 40000 + port));
    vec((0..10u8, address), 0..3)
}

/// Which of its claims a node has recorded, and when.
fn times() -> impl Strategy<Value = [Option<i64>; 4]> {
    let time = || option::of(0..6i64);
    prop_oneof![1 => Just([None; 4]), 2 => [time(), time(), time(), time()]]
}

fn ledger(node: &Node, times: [Option<i64>; 4]) -> Ledger {
    let place = SegmentName::Location(node.region.clone());
    let all = recorded(node, 0);
    let all = all.iter().map(|(claim, _)| claim.clone());
    let entries = all.chain([Claim::Lead(place)]).filter_map(|claim| {
        let kind = match claim {
            Claim::Address(_) => 0,
            Claim::Key(_) => 1,
            Claim::Region(_) => 2,
            Claim::Lead(_) => 3,
        };
        Some((claim, times[kind]?))
    });
    Ledger::new(entries)
}

/// One node; `number` makes most of it unique, but not its claims.
pub(crate) fn node(number: u8) -> impl Strategy<Value = Node> {
    let who = (0..4i64, 0..3u8, option::weighted(0.9, 0..10u8));
    let where_ = (addresses(), endpoint(), 0..10u8);
    let flags = (
        any::<bool>(),
        prop::bool::weighted(0.8),
        prop::bool::weighted(0.2),
    );
    let wishes = (
        option::of(prop_oneof![Just(0u16), Just(25)]),
        option::weighted(0.5, 0..6u8),
        location_ips(),
        seen(),
        option::of(0..120i64),
        times(),
        option::weighted(0.3, 0..6u8),
    );
    (who, where_, flags, wishes).prop_map(move |(who, where_, flags, wishes)| {
        let (created, region, own_key) = who;
        let ((private_ip, internal_ips), endpoint, pods) = where_;
        let (leader, ready, foreign_pods) = flags;
        let (keepalive, wish, allowed_location_ips, seen, age, times, alias) = wishes;
        // Mostly its own key and pods; sometimes those of another.
        let pods = if foreign_pods { pods } else { number };
        let own_key = own_key.map(|other| if foreign_pods { other } else { number });
        Node {
            name: NodeName(format!("node-{number}")),
            created,
            region: RegionName(format!("r{region}")),
            region_declared: false,
            public_key: own_key.map(key),
            endpoint,
            endpoint_forced: false,
            internal_ips,
            external_ips: vec![],
            private_ip,
            private_ip_forced: false,
            pod_cidrs: vec![
                net(&format!("10.42.{pods}.0/24")),
                net(&format!("fd42:0:0:{pods}::/64")),
            ],
            wireguard_ips: wish
                .map(|wish| net(&format!("10.4.0.{wish}/16")))
                .into_iter()
                .collect(),
            leader,
            ready,
            persistent_keepalive: keepalive,
            allowed_location_ips,
            discovered_endpoints: seen.into_iter().map(|(n, at)| (key(n), at)).collect(),
            aliases: alias
                .map(|host| ip(&format!("10.7.0.{host}")))
                .into_iter()
                .collect(),
            candidates: vec![],
            granularity: None,
            last_seen: age.map(|age| 1_000_000 - age),
            ours: true,
            ledger: Ledger::default(),
            other_keys: OtherKeys::default(),
            relay_forbidden: false,
            lease: None,
        }
        .with(|node| node.ledger = ledger(node, times))
    })
}

pub(crate) fn nodes() -> impl Strategy<Value = Vec<Node>> {
    let numbers = btree_set(0..10u8, 0..8);
    numbers.prop_flat_map(|numbers| numbers.into_iter().map(node).collect::<Vec<_>>())
}

pub(crate) fn peers() -> impl Strategy<Value = Vec<ExternalPeer>> {
    let nets = prop_oneof![
        Just("10.5.0.1/32"),
        Just("10.5.0.2/32"),
        Just("10.5.0.0/24"),
        Just("10.6.0.0/16"),
        Just("10.42.0.0/16"),
        Just("192.168.1.0/24"),
        Just("0.0.0.0/0"),
    ];
    let peer = (0..14u8, 0..4i64, vec(nets, 0..3), endpoint(), 0..2u16);
    vec(peer, 0..3).prop_map(|peers| {
        let peers = peers.into_iter().enumerate();
        let peers = peers.map(
            |(index, (seed, created, nets, endpoint, keepalive))| ExternalPeer {
                created,
                endpoint,
                persistent_keepalive: keepalive * 25,
                ..vpn_peer(&format!("peer-{index}"), seed, &nets)
            },
        );
        peers.collect()
    })
}

/// A whole cluster, of ours or with real agents of Kilo's in it.
pub(crate) fn any_mesh() -> impl Strategy<Value = Mesh> {
    let foreign = prop_oneof![2 => Just(vec![]), 1 => vec(0..10u8, 1..4)];
    (mesh(), foreign).prop_map(|(mut mesh, foreign)| {
        for number in foreign {
            let name = NodeName(format!("node-{number}"));
            if let Some(node) = mesh.snapshot.nodes.get_mut(&name) {
                node.ours = false;
                node.last_seen = Some(mesh.now);
            }
        }
        mesh
    })
}

/// A whole cluster of ours.
pub(crate) fn mesh() -> impl Strategy<Value = Mesh> {
    let granularity = prop_oneof![
        4 => Just(Granularity::Location),
        1 => Just(Granularity::Full),
        1 => Just(Granularity::Cross),
    ];
    let encapsulation = prop_oneof![
        2 => Just(Encapsulation::CrossSubnet),
        1 => Just(Encapsulation::Always),
        1 => Just(Encapsulation::Never),
    ];
    let flannel = (prop::bool::weighted(0.2), any::<bool>(), any::<bool>());
    let flannel = (flannel, any::<bool>());
    (nodes(), peers(), granularity, encapsulation, flannel).prop_map(
        |(
            nodes,
            peers,
            granularity,
            encapsulation,
            ((host_gw, direct, dual_stack), has_aliases),
        )| {
            let mut mesh = Mesh::new(nodes);
            mesh.add_peers(peers);
            mesh.agreed.granularity = granularity;
            mesh.local.encapsulation = encapsulation;
            mesh.local.on_tunnel_down = OnTunnelDown::Closed;
            mesh.direct_routing = direct;
            if host_gw {
                mesh.backend = Backend::HostGw;
            }
            if dual_stack {
                mesh.agreed.subnets.push(net("fd04::/64"));
            } else {
                for node in mesh.snapshot.nodes.values_mut() {
                    node.pod_cidrs.retain(|pods| pods.addr().is_ipv4());
                }
            }
            if has_aliases {
                mesh.agreed.alias_pools = vec![net("10.7.0.0/28")];
            }
            mesh.resolved = [("a.example".to_owned(), ip("203.0.113.4"))].into();
            mesh.now = 1_000_000;
            mesh
        },
    )
}
