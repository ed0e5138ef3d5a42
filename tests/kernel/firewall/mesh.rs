//! A leader with its region and another region, without a tunnel: what the table does to packets.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use selvedge::kernel::{Counters, Kernel};
use selvedge::state::Firewall;
use selvedge_lab::netns::Namespace;

use super::{bind, install};

/// The timeout for a datagram between two namespaces of a busy machine. A test waits as long for a dropped
/// one.
const ARRIVAL: Duration = Duration::from_secs(1);

/// A leader between its region (one other node and its pod) and another region (a node and its pod).
/// `kilo0` is a wire here: the table knows links by their names.
///
/// ```text
/// near ── eth0 leader kilo0 ── far
///              │  └─ wan ───────┘
///             cni0 ── pod
/// ```
pub(super) struct Mesh {
    pub(super) near: Namespace,
    pub(super) leader: Namespace,
    pub(super) pod: Namespace,
    pub(super) far: Namespace,
}

impl Mesh {
    pub(super) fn new(label: &str) -> Self {
        let make = |part: &str| Namespace::new(&format!("{label}{part}")).unwrap();
        let mesh = Self {
            near: make("n"),
            leader: make("l"),
            pod: make("p"),
            far: make("f"),
        };
        mesh.leader.veth("eth0", &mesh.near, "eth0").unwrap();
        mesh.leader.veth("kilo0", &mesh.far, "kilo0").unwrap();
        mesh.leader.veth("wan", &mesh.far, "wan").unwrap();
        mesh.leader.veth("veth1", &mesh.pod, "eth0").unwrap();
        mesh.leader
            .sh("
                sysctl -q net.ipv4.ip_forward=1
                ip addr add 192.168.50.11/24 dev eth0
                ip addr add 10.42.1.0/32 dev kilo0
                ip addr add 10.4.0.2/32 dev kilo0 scope link
                ip addr add 198.51.100.1/24 dev wan
                ip link add cni0 type bridge
                ip addr add 10.42.1.1/24 dev cni0
                ip link set cni0 up
                ip link set veth1 master cni0
                ip route add 10.4.0.1 dev kilo0
                ip route add 10.42.0.0/24 via 10.4.0.1 dev kilo0
                ip route add 10.5.0.1 via 10.4.0.1 dev kilo0
                ip route add 203.0.113.10 via 10.4.0.1 dev kilo0
                ip route add 10.42.2.0/24 via 192.168.50.12
                ip route add 192.0.2.12 via 192.168.50.12
            ")
            .unwrap();
        mesh.near
            .sh("
                ip addr add 192.168.50.12/24 dev eth0
                ip addr add 10.42.2.5/32 dev lo
                ip addr add 192.0.2.12/32 dev lo
                ip route add default via 192.168.50.11
            ")
            .unwrap();
        mesh.pod
            .sh("
                ip addr add 10.42.1.5/24 dev eth0
                ip addr add 192.168.50.13/32 dev eth0
                ip route add default via 10.42.1.1
            ")
            .unwrap();
        mesh.far
            .sh("
                ip addr add 10.4.0.1/32 dev kilo0
                ip addr add 10.42.0.5/32 dev lo
                ip addr add 10.5.0.1/32 dev lo
                ip addr add 203.0.113.10/32 dev lo
                ip addr add 198.51.100.10/24 dev wan
                ip route add 10.4.0.2 dev kilo0
                ip route add default via 10.4.0.2 dev kilo0
            ")
            .unwrap();
        mesh
    }

    /// Flannel's rules on the leader, with its own program; none is nftables mode.
    pub(super) fn masquerade_as_flannel(&self, program: &str) {
        let script = if program.is_empty() {
            "
            nft add table ip flannel-ipv4
            nft 'add chain ip flannel-ipv4 postrtg { type nat hook postrouting priority srcnat; }'
            nft 'add rule ip flannel-ipv4 postrtg meta mark 0x4000 return'
            nft 'add rule ip flannel-ipv4 postrtg ip saddr 10.42.1.0/24 ip daddr 10.42.0.0/16 return'
            nft 'add rule ip flannel-ipv4 postrtg ip saddr 10.42.0.0/16 ip daddr 10.42.1.0/24 return'
            nft 'add rule ip flannel-ipv4 postrtg ip saddr != 10.42.1.0/24 ip daddr 10.42.0.0/16 return'
            nft 'add rule ip flannel-ipv4 postrtg ip saddr 10.42.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random'
            "
            .to_owned()
        } else {
            format!(
                "
                {program} -t nat -N FLANNEL-POSTRTG
                {program} -t nat -A POSTROUTING -j FLANNEL-POSTRTG
                r='{program} -t nat -A FLANNEL-POSTRTG'
                $r -m mark --mark 0x4000/0x4000 -j RETURN
                $r -s 10.42.1.0/24 -d 10.42.0.0/16 -j RETURN
                $r -s 10.42.0.0/16 -d 10.42.1.0/24 -j RETURN
                $r ! -s 10.42.0.0/16 -d 10.42.1.0/24 -j RETURN
                $r -s 10.42.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully
                $r ! -s 10.42.0.0/16 -d 10.42.0.0/16 -j MASQUERADE --random-fully
                "
            )
        };
        self.leader.sh(&script).unwrap();
    }

    pub(super) fn install(&self, firewall: &Firewall) {
        self.leader
            .within(|| install(&Kernel::open("kilo0").unwrap(), firewall));
    }

    pub(super) fn counters(&self) -> Counters {
        self.leader
            .within(|| Kernel::open("kilo0").unwrap().nft.counters().unwrap())
    }

    /// The namespace that has the address.
    pub(super) fn owner(&self, address: &str) -> &Namespace {
        [&self.near, &self.leader, &self.pod, &self.far]
            .into_iter()
            .find(|namespace| {
                let addresses = namespace.run("ip -o addr show").unwrap();
                addresses.contains(&format!("inet {address}/"))
            })
            .unwrap()
    }

    /// Sends a datagram and returns the source address it arrives with, if its answer comes back.
    pub(super) fn seen_by(&self, to: &Namespace, from: &str, address: &str) -> Option<String> {
        let server = to.within(|| UdpSocket::bind((address, 0)).unwrap());
        let port = server.local_addr().unwrap().port();
        let client = self
            .owner(from)
            .within(|| UdpSocket::bind((from, 0)).unwrap());
        for socket in [&server, &client] {
            socket.set_read_timeout(Some(ARRIVAL)).unwrap();
        }
        client.send_to(b"?", (address, port)).unwrap();
        let mut buffer = [0; 8];
        let (_, source) = server.recv_from(&mut buffer).ok()?;
        server.send_to(b"!", source).unwrap();
        client.recv_from(&mut buffer).ok()?;
        Some(source.ip().to_string())
    }

    /// Whether a datagram arrives.
    pub(super) fn delivered(
        &self,
        from: &Namespace,
        source: &str,
        to: &Namespace,
        at: &str,
        port: u16,
    ) -> bool {
        let server = to.within(|| bind(at, port));
        server.set_read_timeout(Some(ARRIVAL)).unwrap();
        from.within(|| {
            let client = UdpSocket::bind((source, 0)).unwrap();
            client.send_to(b"?", (at, port)).unwrap();
        });
        server.recv(&mut [0; 8]).is_ok()
    }

    /// Whether a datagram arrives behind a translation.
    pub(super) fn delivered_by(
        &self,
        from: &Namespace,
        source: &str,
        at: &Namespace,
        to: (&str, u16),
        port: u16,
    ) -> bool {
        let server = at.within(|| bind("10.42.0.5", port));
        server.set_read_timeout(Some(ARRIVAL)).unwrap();
        from.within(|| {
            let client = UdpSocket::bind((source, 0)).unwrap();
            client.send_to(b"?", to).unwrap();
        });
        server.recv(&mut [0; 8]).is_ok()
    }

    /// The segment size a TCP connection from `from` to `to` uses.
    pub(super) fn segment_size(&self, from: &str, to: &str) -> u32 {
        use nix::sys::socket::{getsockopt, sockopt::TcpMaxSeg};

        let server = self
            .owner(to)
            .within(|| std::net::TcpListener::bind((to, 0)).unwrap());
        let remote = server.local_addr().unwrap();
        let client = self.owner(from).within(|| {
            let socket =
                socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            let local: SocketAddr = format!("{from}:0").parse().unwrap();
            socket.bind(&local.into()).unwrap();
            socket.connect(&remote.into()).unwrap();
            socket
        });
        let _accepted = server.accept().unwrap();
        getsockopt(&client, TcpMaxSeg).unwrap()
    }
}
