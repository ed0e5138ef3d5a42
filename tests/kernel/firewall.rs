//! The nft table: how it reads, how it is replaced, and what it does to packets.

use std::net::UdpSocket;
use std::time::Duration;

use selvedge::diff::KernelChange;
use selvedge::kernel::Kernel;
use selvedge::state::{Firewall, Guard, RelayDoor};

mod aliases;
mod drops;
mod leaders;
mod listing;
mod mesh;
mod replacing;
mod transit;
mod translation;

fn install(kernel: &Kernel, firewall: &Firewall) {
    let change = KernelChange::ReplaceFirewall(Box::new(firewall.clone()));
    kernel.apply(&change).unwrap();
}

fn v4_only(firewall: Firewall) -> Firewall {
    let v4 = |nets: std::collections::BTreeSet<ipnet::IpNet>| {
        nets.into_iter()
            .filter(|net| net.addr().is_ipv4())
            .collect()
    };
    let only_v4 = |ips: std::collections::BTreeSet<std::net::IpAddr>| {
        ips.into_iter().filter(std::net::IpAddr::is_ipv4).collect()
    };
    Firewall {
        region_underlay: firewall
            .region_underlay
            .into_iter()
            .filter(|ip| ip.is_ipv4())
            .collect(),
        remote_pods: v4(firewall.remote_pods),
        remote_nodes: v4(firewall.remote_nodes),
        mesh_nodes: v4(firewall.mesh_nodes),
        region_pods: v4(firewall.region_pods),
        region_nodes: v4(firewall.region_nodes),
        probes: firewall
            .probes
            .into_iter()
            .filter(|ip| ip.is_ipv4())
            .collect(),
        local_pods: v4(firewall.local_pods),
        guard: Guard {
            hops: firewall
                .guard
                .hops
                .into_iter()
                .filter(|ip| ip.is_ipv4())
                .collect(),
            far: v4(firewall.guard.far),
            far_from_pods: v4(firewall.guard.far_from_pods),
            near: v4(firewall.guard.near),
            wide: v4(firewall.guard.wide),
            cluster: v4(firewall.guard.cluster),
        },
        vxlan_sources: v4(firewall.vxlan_sources),
        relay: RelayDoor {
            from: only_v4(firewall.relay.from),
            to: only_v4(firewall.relay.to),
        },
        ..firewall
    }
}

/// Binds a port that a child process of another test may still hold between its fork and exec.
fn bind(address: &str, port: u16) -> UdpSocket {
    for _ in 0..1000 {
        if let Ok(socket) = UdpSocket::bind((address, port)) {
            return socket;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{address}:{port} stays in use");
}
