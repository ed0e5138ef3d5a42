//! No packet for another region leaves a node in clear when its rules or routes are gone: the test counts
//! every datagram that reaches the internet. The control is the same node without the nft table.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use selvedge::flannel::Backend;
use selvedge::kernel::Kernel;
use selvedge::state::State;
use selvedge::topology::NodeName;
use selvedge_lab::netns::Namespace;
use socket2::{Domain, Socket, Type};

use crate::fixture::{ip, net, reach};
use crate::mesh::{Mesh, With as _, addr, node, vpn_peer};

/// What the sender sends to, and the internet listens on.
const PORT: u16 = 4000;
const VXLAN: u16 = 8472;

/// The destinations of the host's own datagrams, each with its owner.
const FAR: [(&str, &str); 6] = [
    ("a pod of another region", "10.42.4.5"),
    ("a node of another region", "192.168.60.13"),
    ("another leader's WireGuard address", "10.4.0.2"),
    ("a VPN peer", "10.5.0.1"),
    ("a pod that no node has", "10.42.77.5"),
    ("a pod of a node that takes no part", "10.42.5.5"),
];
/// The destinations that the mesh carries for pods only.
const MASTER: &str = "203.0.113.10";

/// `a1` leads `a2`; `b1` is behind a NAT of its own, and the master is public.
fn mesh(backend: Backend) -> Mesh {
    let mut mesh = Mesh::new([
        node("a1", "a", 1, "192.168.50.11/24").with(|node| node.leader = true),
        node("a2", "a", 2, "192.168.50.12/24"),
        node("b1", "b", 4, "192.168.60.11/24"),
        node("b2", "b", 5, "192.168.60.12/24").with(|node| node.public_key = None),
        node("b3", "b", 7, "192.168.60.13/24"),
        // A public address counts if the operator declared it.
        node("m", "m", 6, "203.0.113.10/24").with(|node| {
            node.endpoint = addr("203.0.113.10:51820");
            node.endpoint_forced = true;
        }),
    ]);
    mesh.add_peers([vpn_peer("laptop", 9, &["10.5.0.1/32"])]);
    mesh.backend = backend;
    mesh
}

/// A node between its pod and its router, behind which every address there is answers to a socket.
struct Site {
    node: Namespace,
    pod: Namespace,
    router: Namespace,
    state: State,
}

impl Site {
    fn new(me: &str, backend: Backend) -> Self {
        let mesh = mesh(backend);
        let (own, other) = if me == "a1" { (1, 2) } else { (2, 1) };
        let label = if backend == Backend::Vxlan { "v" } else { "h" };
        let make = |part: &str| Namespace::new(&format!("g{me}{label}{part}")).unwrap();
        let (node, pod, router) = (make("n"), make("p"), make("r"));
        node.veth("eth0", &router, "eth0").unwrap();
        node.veth("veth1", &pod, "eth0").unwrap();
        node.sh(&format!(
            "
            sysctl -q net.ipv4.ip_forward=1
            ip addr add 192.168.50.1{own}/24 dev eth0
            ip route add default via 192.168.50.1
            ip link add cni0 type bridge
            ip addr add 10.42.{own}.1/24 dev cni0
            ip link set cni0 up
            ip link set veth1 master cni0
            ip tuntap add kilo0 mode tun
            "
        ))
        .unwrap();
        if backend == Backend::Vxlan {
            node.sh(&format!(
                "
                ip link add flannel.1 type vxlan id 1 local 192.168.50.1{own} dev eth0 dstport {VXLAN} nolearning
                ip addr add 10.42.{own}.0/32 dev flannel.1
                ip link set flannel.1 up
                "
            ))
            .unwrap();
            for (pods, at) in [
                (other, format!("192.168.50.1{other}")),
                (4, "192.168.60.11".to_owned()),
                (5, "192.168.60.12".to_owned()),
                (6, MASTER.to_owned()),
            ] {
                node.sh(&format!(
                    "
                    ip neigh add 10.42.{pods}.0 lladdr 02:00:00:00:00:0{pods} dev flannel.1 nud permanent
                    bridge fdb add 02:00:00:00:00:0{pods} dst {at} dev flannel.1 self permanent
                    ip route add 10.42.{pods}.0/24 via 10.42.{pods}.0 dev flannel.1 onlink
                    "
                ))
                .unwrap();
            }
        } else {
            node.run(&format!(
                "ip route add 10.42.{other}.0/24 via 192.168.50.1{other} dev eth0"
            ))
            .unwrap();
        }
        pod.sh(&format!(
            "ip addr add 10.42.{own}.5/24 dev eth0; ip route add default via 10.42.{own}.1"
        ))
        .unwrap();
        router
            .sh(&format!(
                "
                ip addr add 192.168.50.1/24 dev eth0
                ip addr add 192.168.50.1{other}/24 dev eth0
                ip route add local default dev lo
                ip route add 10.42.{own}.0/24 dev eth0
                "
            ))
            .unwrap();
        let name = NodeName(me.into());
        let mut state = mesh.plan(&mesh.topology(), &name).unwrap();
        // The tunnel device's own changes.
        state.peers.clear();
        state.listen_port = None;
        node.within(|| reach(&Kernel::open("kilo0").unwrap(), &state));
        Self {
            node,
            pod,
            router,
            state,
        }
    }

    /// How many of ten datagrams the router sees: plain, or in VXLAN to another region. It does not count
    /// those that a next hop of the region gets.
    fn leaks(&self, from: &Namespace, to: &str) -> usize {
        let own = self.own_hop();
        // The socket with the more specific address gets the datagrams to it.
        let sinks = self.router.within(|| {
            let near = bind(own, VXLAN);
            (near, [PORT, VXLAN].map(|port| bind("0.0.0.0", port)))
        });
        from.within(|| {
            let sender = UdpSocket::bind("0.0.0.0:0").unwrap();
            for _ in 0..10 {
                // The sender gets an error for a dropped datagram, and goes on.
                let _ = sender.send_to(b"in clear", (to, PORT));
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        std::thread::sleep(Duration::from_millis(100));
        let mut seen = 0;
        for sink in &sinks.1 {
            sink.set_nonblocking(true).unwrap();
            while sink.recv(&mut [0; 2048]).is_ok() {
                seen += 1;
            }
        }
        seen
    }

    /// The region's other node, played by the router.
    fn own_hop(&self) -> &'static str {
        if self
            .node
            .run("ip -o addr show dev eth0")
            .unwrap()
            .contains("192.168.50.11/")
        {
            "192.168.50.12"
        } else {
            "192.168.50.11"
        }
    }

    fn all(&self) -> Vec<(String, usize)> {
        let host = FAR.map(|(whose, to)| (whose.to_owned(), self.leaks(&self.node, to)));
        let pod =
            FAR.map(|(whose, to)| (format!("{whose}, from a pod"), self.leaks(&self.pod, to)));
        let master = (
            "the master, from a pod".to_owned(),
            self.leaks(&self.pod, MASTER),
        );
        host.into_iter().chain(pod).chain([master]).collect()
    }

    fn nothing_leaks(&self, when: &str) {
        let leaks: Vec<_> = self
            .all()
            .into_iter()
            .filter(|(_, seen)| *seen > 0)
            .collect();
        assert_eq!(leaks, [], "{when}");
    }

    fn delete_rules(&self) {
        for rule in &self.state.rules {
            self.node
                .run(&format!("ip rule del pref {}", rule.priority))
                .unwrap();
        }
    }

    fn flush_tables(&self) {
        for table in [5130, 5131, 5132] {
            let flush = format!("ip route flush table {table} 2>/dev/null || true");
            self.node.sh(&flush).unwrap();
        }
    }

    /// Damages the node step by step, with the nft table and then without.
    fn check(&self) {
        self.nothing_leaks("with all in place");
        self.delete_rules();
        self.nothing_leaks("without rules");
        self.flush_tables();
        self.nothing_leaks("without rules and routes");

        // Control.
        self.node.run("nft delete table inet selvedge").unwrap();
        let quiet: Vec<_> = self
            .all()
            .into_iter()
            .filter(|(_, seen)| *seen == 0)
            .collect();
        assert_eq!(quiet, [], "without the guard all of it is seen");
    }
}

fn bind(address: &str, port: u16) -> UdpSocket {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    let address: SocketAddr = format!("{address}:{port}").parse().unwrap();
    socket.bind(&address.into()).unwrap();
    socket.into()
}

#[test]
fn a_leader_without_rules_or_routes_sends_nothing_in_clear() {
    Site::new("a1", Backend::Vxlan).check();
}

#[test]
fn a_follower_without_rules_or_routes_sends_nothing_in_clear() {
    Site::new("a2", Backend::Vxlan).check();
}

#[test]
fn a_host_gw_leader_without_rules_or_routes_sends_nothing_in_clear() {
    Site::new("a1", Backend::HostGw).check();
}

/// A Node that was deleted, or an address that no node has: the mesh's table ends with the cluster network.
#[test]
fn a_pod_address_without_a_node_is_unreachable_and_the_regions_pods_use_flannel() {
    let site = Site::new("a2", Backend::Vxlan);
    let path = |to: &str| {
        site.node.within(|| {
            Kernel::open("kilo0")
                .unwrap()
                .rtnetlink
                .path_to(ip(to), 0)
                .unwrap()
        })
    };
    assert_eq!(path("10.42.77.5"), None);
    assert_eq!(path("10.42.1.5").unwrap().link, "flannel.1");
    assert_eq!(path("10.42.2.5").unwrap().link, "cni0");

    // Control: without it the path is the default route.
    site.node
        .run("ip route del table 5130 unreachable 10.42.0.0/16 metric 4278198272")
        .unwrap();
    assert_eq!(path("10.42.77.5").unwrap().link, "eth0");
}

/// A follower sends to its leader by the path that flannel uses for any node of the region.
#[test]
fn the_table_lets_a_follower_reach_its_leader() {
    for (backend, port) in [(Backend::Vxlan, VXLAN), (Backend::HostGw, PORT)] {
        let site = Site::new("a2", backend);
        let received = |to: &str| {
            let address = if port == VXLAN { "192.168.50.11" } else { to };
            let address = if to == "10.42.1.5" && port == PORT {
                "0.0.0.0"
            } else {
                address
            };
            let sink = site.router.within(|| bind(address, port));
            sink.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
            site.pod.within(|| {
                let sender = UdpSocket::bind("0.0.0.0:0").unwrap();
                sender.send_to(b"?", (to, PORT)).unwrap();
            });
            sink.recv(&mut [0; 2048]).is_ok()
        };
        assert!(received("10.42.4.5"), "{backend:?}");
        assert!(received("192.168.60.13"), "{backend:?}");
        assert!(received("10.42.1.5"), "{backend:?}: a pod of its leader");
        let network = net("10.42.0.0/16");
        assert!(site.state.routes.keys().any(|key| key.dst == network));
    }
}
