//! The node's own uplink, addresses and paths.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use selvedge::diff::{Change, KernelChange, diff};
use selvedge::kernel::{LocalAddress, Path, Uplink};
use selvedge::state::{Route, State, Table};

use crate::fixture::{Node, hop, ip, key, leader, net, reach, unicast};

#[test]
fn the_uplink_is_the_link_of_the_best_default_route() {
    let node = Node::new("uplink");
    node.sh("
        ip link add wan mtu 1400 type veth peer name wan2
        ip link set wan2 up
        ip link set wan up
        ip addr add 198.51.100.7/24 dev wan
        ip route add default via 198.51.100.1 metric 50
    ");
    let expected = Uplink {
        name: "eth0".to_owned(),
        mtu: 1500,
        addresses: vec![net("192.168.50.11/24"), net("2001:db8:50::11/64")],
    };
    let uplink = || node.with(|kernel| kernel.rtnetlink.uplink().unwrap());
    assert_eq!(uplink(), Some(expected));

    node.run("ip route del default via 192.168.50.1");
    let uplink_now = uplink().unwrap();
    assert_eq!((uplink_now.name.as_str(), uplink_now.mtu), ("wan", 1400));

    node.sh("ip route del default; ip -6 route add default via 2001:db8:50::1");
    assert_eq!(uplink().unwrap().name, "eth0");

    node.run("ip -6 route del default");
    assert_eq!(uplink(), None);
}

#[test]
fn the_nodes_addresses_are_those_of_its_own_links() {
    let node = Node::with_tunnel("addresses");
    node.with(|kernel| {
        reach(kernel, &leader());
        let of_eth0 = |text: &str| LocalAddress {
            link: "eth0".to_owned(),
            net: net(text),
            offered: true,
        };
        assert_eq!(
            kernel.rtnetlink.node_addresses().unwrap(),
            [of_eth0("192.168.50.11/24"), of_eth0("2001:db8:50::11/64")]
        );
        for (address, local) in [
            ("192.168.50.11", true),
            ("10.4.0.2", true),
            ("10.4.0.1", false),
        ] {
            assert_eq!(
                kernel.rtnetlink.is_local(ip(address)).unwrap(),
                local,
                "{address}"
            );
        }
    });
}

#[test]
fn the_path_to_an_address_depends_on_the_mark() {
    let node = Node::with_tunnel("path");
    node.with(|kernel| {
        reach(kernel, &leader());
        let path = |address: &str, mark| kernel.rtnetlink.path_to(ip(address), mark).unwrap();
        let out = Path {
            link: "eth0".to_owned(),
            src: Some(ip("192.168.50.11")),
            via: Some(ip("192.168.50.1")),
        };
        let tunnel = Path {
            link: "kilo0".to_owned(),
            src: Some(ip("10.42.1.0")),
            via: Some(ip("10.4.0.1")),
        };
        assert_eq!(path("10.42.0.5", 0), Some(tunnel));
        assert_eq!(path("10.42.0.5", 0x51e0_0000), Some(out.clone()));
        assert_eq!(path("203.0.113.10", 0), Some(out));
        assert_eq!(path("fd42::5", 0).unwrap().link, "kilo0");

        // With the tunnel down, the backstop applies.
        node.run("ip link set kilo0 down");
        assert_eq!(path("10.42.0.5", 0), None);
    });
}

#[test]
fn thousands_of_routes_are_quick_even_on_a_busy_router() {
    const ROUTES: u32 = 5000;
    const FOREIGN: u32 = 20_000;
    let node = Node::with_tunnel("scale");
    let foreign: String = (0..FOREIGN)
        .map(|n| {
            format!(
                "route add 100.{}.{}.{}/32 via 192.168.50.1 proto bird\n",
                n >> 16,
                (n >> 8) & 255,
                n & 255
            )
        })
        .collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), foreign).unwrap();
    node.run(&format!("ip -batch {}", file.path().display()));
    let via = hop(Some("10.42.2.0"), "flannel.1", true);
    let desired = State {
        routes: (0..ROUTES)
            .flat_map(|n| {
                let dst = format!("10.{}.{}.0/24", 100 + (n >> 8), n & 255);
                [
                    (
                        key(Table::Mesh, &dst, 0),
                        unicast([&via], Some("10.42.1.0")),
                    ),
                    (key(Table::Mesh, &dst, 4_278_198_272), Route::Unreachable),
                ]
            })
            .collect(),
        ..State::default()
    };
    node.with(|kernel| {
        let mut clock = Stopwatch::start();
        let changes = diff(&kernel.observe().unwrap(), &desired);
        let changes: Vec<&KernelChange> = changes
            .iter()
            .filter_map(Change::of_kernel)
            .filter(|change| matches!(change, KernelChange::ReplaceRoute { .. }))
            .collect();
        assert_eq!(changes.len(), 2 * ROUTES as usize);
        clock.lap("observing 20,000 foreign routes");
        assert!(kernel.apply_all(&changes).is_empty());
        clock.lap("adding 10,000 routes");
        assert_eq!(kernel.observe().unwrap().routes, desired.routes);
        clock.lap("reading 10,000 routes");
        kernel.rtnetlink.flannel(&[net("10.42.0.0/16")]).unwrap();
        clock.lap("reading flannel's state");
        kernel.rtnetlink.uplink().unwrap();
        clock.lap("finding the uplink");
        assert!(kernel.cleanup().is_empty());
        let total = clock.lap("removing 10,000 routes");
        assert!(total < 10.0, "{total} s");
    });
}

/// Prints the processor time of this thread for each step. Only the sum has a limit, since machines differ.
/// The kernel works on the calling thread, and the load of other processes does not count.
struct Stopwatch {
    start: Duration,
    last: Duration,
}

impl Stopwatch {
    fn start() -> Self {
        let now = busy();
        Self {
            start: now,
            last: now,
        }
    }

    /// Seconds since the start.
    fn lap(&mut self, what: &str) -> f64 {
        let now = busy();
        eprintln!("{what}: {:.1} ms", (now - self.last).as_secs_f64() * 1e3);
        self.last = now;
        (now - self.start).as_secs_f64()
    }
}

/// The processor time of this thread.
fn busy() -> Duration {
    let clock = ClockId::CLOCK_THREAD_CPUTIME_ID;
    clock_gettime(clock).unwrap().into()
}
