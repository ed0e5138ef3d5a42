//! Six nodes in five clouds, worked out by hand from Kilo's behaviour beside flannel.
//!
//! Annotations, the tunnel's configuration and routes. The tests of `showconf` and `graph` use the same cluster.

use super::golden::{Difference, annotations, wireguard};
use super::*;

/// Name, location, private address, number of its pod CIDR, public address.
const NODES: [(&str, &str, &str, u8, &str); 6] = [
    ("ty1.k3s", "ctyun", "192.168.1.226/24", 0, "203.0.113.1"),
    (
        "hw1.k3s",
        "huaweicloud",
        "192.168.7.226/24",
        1,
        "203.0.113.2",
    ),
    ("tx1.k3s", "tencentcloud", "172.17.0.3/20", 2, "203.0.113.3"),
    ("ali1.k3s", "aliyun", "172.21.143.136/20", 3, "203.0.113.4"),
    ("bd1.k3s", "baidu", "192.168.64.4/20", 4, "203.0.113.5"),
    ("bd2.k3s", "baidu", "192.168.64.5/20", 5, "203.0.113.6"),
];

/// Kilo's routes by node, in its compatibility with flannel and without local routes. The destinations of one line
/// have the same next hop.
const KILO: [(&str, &[(&str, &str)]); 6] = [
    (
        "ty1.k3s",
        &[
            ("10.42.1.0/24 192.168.7.226", "via 10.4.0.4 dev kilo0"),
            ("10.42.2.0/24 172.17.0.3", "via 10.4.0.5 dev kilo0"),
            ("10.42.3.0/24 172.21.143.136", "via 10.4.0.1 dev kilo0"),
            (
                "10.42.4.0/24 10.42.5.0/24 192.168.64.4 192.168.64.5",
                "via 10.4.0.2 dev kilo0",
            ),
        ],
    ),
    (
        "hw1.k3s",
        &[
            ("10.42.0.0/24 192.168.1.226", "via 10.4.0.3 dev kilo0"),
            ("10.42.2.0/24 172.17.0.3", "via 10.4.0.5 dev kilo0"),
            ("10.42.3.0/24 172.21.143.136", "via 10.4.0.1 dev kilo0"),
            (
                "10.42.4.0/24 10.42.5.0/24 192.168.64.4 192.168.64.5",
                "via 10.4.0.2 dev kilo0",
            ),
        ],
    ),
    (
        "tx1.k3s",
        &[
            ("10.42.0.0/24 192.168.1.226", "via 10.4.0.3 dev kilo0"),
            ("10.42.1.0/24 192.168.7.226", "via 10.4.0.4 dev kilo0"),
            ("10.42.3.0/24 172.21.143.136", "via 10.4.0.1 dev kilo0"),
            (
                "10.42.4.0/24 10.42.5.0/24 192.168.64.4 192.168.64.5",
                "via 10.4.0.2 dev kilo0",
            ),
        ],
    ),
    (
        "ali1.k3s",
        &[
            ("10.42.0.0/24 192.168.1.226", "via 10.4.0.3 dev kilo0"),
            ("10.42.1.0/24 192.168.7.226", "via 10.4.0.4 dev kilo0"),
            ("10.42.2.0/24 172.17.0.3", "via 10.4.0.5 dev kilo0"),
            (
                "10.42.4.0/24 10.42.5.0/24 192.168.64.4 192.168.64.5",
                "via 10.4.0.2 dev kilo0",
            ),
        ],
    ),
    (
        "bd1.k3s",
        &[
            ("10.42.0.0/24 192.168.1.226", "via 10.4.0.3 dev kilo0"),
            ("10.42.1.0/24 192.168.7.226", "via 10.4.0.4 dev kilo0"),
            ("10.42.2.0/24 172.17.0.3", "via 10.4.0.5 dev kilo0"),
            ("10.42.3.0/24 172.21.143.136", "via 10.4.0.1 dev kilo0"),
            // Kilo's table 1107.
            ("192.168.64.5", "via 10.42.5.0 dev flannel.1"),
        ],
    ),
    (
        "bd2.k3s",
        &[(
            "10.4.0.1 10.4.0.2 10.4.0.3 10.4.0.4 10.4.0.5 \
             10.42.0.0/24 10.42.1.0/24 10.42.2.0/24 10.42.3.0/24 \
             172.17.0.3 172.21.143.136 192.168.1.226 192.168.7.226",
            "via 10.42.4.0 dev flannel.1",
        )],
    ),
];

/// Kilo's peers of any leader: those of the other segments.
const PEERS: [(&str, &str); 5] = [
    ("ali1.k3s", "10.42.3.0/24, 172.21.143.136/32, 10.4.0.1/32"),
    (
        "bd1.k3s",
        "10.42.4.0/24, 192.168.64.4/32, 10.42.5.0/24, 192.168.64.5/32, 10.4.0.2/32",
    ),
    ("ty1.k3s", "10.42.0.0/24, 192.168.1.226/32, 10.4.0.3/32"),
    ("hw1.k3s", "10.42.1.0/24, 192.168.7.226/32, 10.4.0.4/32"),
    ("tx1.k3s", "10.42.2.0/24, 172.17.0.3/32, 10.4.0.5/32"),
];

fn six_clouds() -> Mesh {
    Mesh::new(NODES.map(|(name, location, address, pods, public)| {
        node(name, location, pods, address).with(|node| {
            node.public_key = Some(key(100 + pods));
            node.endpoint = addr(&format!("{public}:51820"));
            node.persistent_keepalive = Some(20);
        })
    }))
}

/// The same six nodes, one of them still running a real `kg`.
fn with_a_real_kilo() -> Mesh {
    golden::with_a_real_kilo(six_clouds(), "tx1.k3s")
}

/// All of Kilo's lines for a node.
fn kilo(me: &str) -> String {
    let (_, _, private, ..) = NODES.into_iter().find(|(name, ..)| *name == me).unwrap();
    let private = net(private).addr();
    let mut text = String::new();
    for (leader, nets) in PEERS {
        if leader == me {
            let own = nets.rsplit(", ").next().unwrap().trim_end_matches("/32");
            text += &format!("10.4.0.0/16 dev kilo0 proto kernel scope link src {own}\n");
        }
    }
    let (_, ways) = KILO.into_iter().find(|(name, _)| *name == me).unwrap();
    for (destinations, way) in ways {
        for destination in destinations.split_whitespace() {
            // Where flannel routes the pods, only the member's host needs a route.
            if me == "bd1.k3s" && way.contains("flannel") {
                text += &format!("from all to {destination} iif kilo0 lookup 1107\n");
                text += &format!("table 1107 {destination} {way} proto static onlink\n");
            } else {
                text += &format!("{destination} {way} proto static src {private} onlink\n");
            }
        }
    }
    text
}

#[test]
fn routes_are_kilos_but_for_these_differences() {
    use Difference::*;
    let everywhere = [
        OwnTables,
        ClusterSource,
        Mtu,
        Backstop,
        OwnPodsStay,
        NetworkEnds,
        FixedRules,
    ];
    let leads = [&everywhere[..], &[OneRoutePerAddress]].concat();
    let hands_on = [&leads[..], &[OneRuleForMembers]].concat();
    for mesh in [six_clouds(), with_a_real_kilo()] {
        for (name, cluster_address, others, differences) in [
            ("ty1.k3s", "10.42.0.0", [1, 2, 4, 5].as_slice(), &leads[..]),
            ("hw1.k3s", "10.42.1.0", &[1, 2, 3, 5], &leads),
            ("tx1.k3s", "10.42.2.0", &[1, 2, 3, 4], &leads),
            ("ali1.k3s", "10.42.3.0", &[2, 3, 4, 5], &leads),
            ("bd1.k3s", "10.42.4.0", &[1, 3, 4, 5], &hands_on),
            ("bd2.k3s", "10.42.5.0", &[], &everywhere),
        ] {
            let addresses = ["10.4.0.1", "10.4.0.2", "10.4.0.3", "10.4.0.4", "10.4.0.5"];
            let others: Vec<_> = others.iter().map(|number| addresses[number - 1]).collect();
            let region_pods: &[&str] = match name {
                "bd1.k3s" => &["10.42.5.0/24"],
                "bd2.k3s" => &["10.42.4.0/24"],
                _ => &[],
            };
            let node = golden::Node {
                name,
                cluster_address,
                others: &others,
                region_pods,
                kilo: &kilo(name),
                endpoints: &[],
            };
            node.check(&mesh, differences);
        }
    }
}

#[test]
fn tunnels_are_kilos() {
    let names = NODES.map(|(name, _, _, pods, _)| (key(100 + pods).to_string(), name));
    let names = names.into();
    for mesh in [six_clouds(), with_a_real_kilo()] {
        assert_eq!(
            wireguard(&mesh.state("bd1.k3s"), &names),
            "listen 51820\n\
             address 10.4.0.2/32\n\
             ali1.k3s at 203.0.113.4:51820 every 20: 10.4.0.1/32 10.42.3.0/24 172.21.143.136/32\n\
             hw1.k3s at 203.0.113.2:51820 every 20: 10.4.0.4/32 10.42.1.0/24 192.168.7.226/32\n\
             tx1.k3s at 203.0.113.3:51820 every 20: 10.4.0.5/32 10.42.2.0/24 172.17.0.3/32\n\
             ty1.k3s at 203.0.113.1:51820 every 20: 10.4.0.3/32 10.42.0.0/24 192.168.1.226/32\n"
        );
        assert_eq!(wireguard(&mesh.state("bd2.k3s"), &names), "listen 51820\n");
    }
}

/// The operator forces the endpoint, and the agent finds the rest.
#[test]
fn annotations_are_the_scenarios() {
    let version = env!("CARGO_PKG_VERSION");
    let addresses = [
        "10.4.0.3", "10.4.0.4", "10.4.0.5", "10.4.0.1", "10.4.0.2", "",
    ];
    for mesh in [six_clouds(), with_a_real_kilo()] {
        let beside_kilo = mesh.now != 0;
        for ((name, _, private, pods, public), address) in NODES.into_iter().zip(addresses) {
            let mut mesh = mesh.clone();
            for node in mesh.snapshot.nodes.values_mut() {
                node.endpoint_forced = true;
            }
            let (cni, seen, mark) = if beside_kilo {
                (
                    "kilo.squat.ai/cni-compatibility-ip: \n",
                    "kilo.squat.ai/last-seen: 1000\n",
                    " last-seen=1000",
                )
            } else {
                ("", "", "")
            };
            let wireguard_ip = match (address, beside_kilo) {
                ("", false) => String::new(),
                ("", true) => "kilo.squat.ai/wireguard-ip: \n".to_owned(),
                _ => format!("kilo.squat.ai/wireguard-ip: {address}/16\n"),
            };
            assert_eq!(
                annotations(&mesh, name, &[]),
                format!(
                    "{cni}kilo.squat.ai/endpoint: {public}:51820\n\
                     kilo.squat.ai/granularity: location\n\
                     kilo.squat.ai/internal-ip: {private}\n\
                     kilo.squat.ai/key: {}\n{seen}{wireguard_ip}\
                     selvedge.dev/agent: {version}{mark}\n",
                    key(100 + pods)
                )
            );
        }
    }
}

#[test]
fn peers_are_kilos() {
    for mesh in [six_clouds(), with_a_real_kilo()] {
        let topology = mesh.topology();
        let ours = topology.segments.iter().map(|segment| {
            let nets = segment.allowed_ips().map(|net| net.to_string());
            (
                segment.primary().node.0.as_str(),
                nets.collect::<Vec<_>>().join(", "),
            )
        });
        let expected = PEERS.map(|(leader, nets)| (leader, nets.to_owned()));
        assert_eq!(ours.collect::<Vec<_>>(), expected);

        let state = mesh.state("ty1.k3s");
        assert_eq!(state.peers.len(), 4);
        let baidu = peer_with(&state, key(104));
        assert_eq!(baidu.endpoint, "203.0.113.5:51820".parse().ok());
        assert_eq!(baidu.persistent_keepalive.map(u16::from), Some(20));
        assert_eq!(
            baidu.routes.iter().copied().collect::<BTreeSet<_>>(),
            PEERS[1].1.split(", ").map(net).collect()
        );
    }
}

#[test]
fn in_a_full_mesh_every_node_is_numbered_by_name() {
    for mesh in [six_clouds(), with_a_real_kilo()] {
        let mesh = mesh.with(|mesh| mesh.agreed.granularity = Granularity::Full);
        let names = mesh.topology().segments.into_iter();
        let names = names.map(|s| format!("{}={}", s.name, s.primary().wireguard_ips[0]));
        let expected = [
            "node:ali1.k3s=10.4.0.1",
            "node:bd1.k3s=10.4.0.2",
            "node:bd2.k3s=10.4.0.3",
            "node:hw1.k3s=10.4.0.4",
            "node:tx1.k3s=10.4.0.5",
            "node:ty1.k3s=10.4.0.6",
        ];
        assert_eq!(names.collect::<Vec<_>>(), expected);
    }
}
