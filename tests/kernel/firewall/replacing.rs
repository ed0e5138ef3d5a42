//! How one table takes the place of another, or new elements that of old ones.

use std::sync::atomic::{AtomicBool, Ordering};

use selvedge::state::Firewall;

use super::{bind, install, v4_only};
use crate::fixture::{Node, firewall, ip, nets};

#[test]
fn overlapping_and_adjacent_prefixes_are_merged() {
    let node = Node::with_tunnel("overlap");
    let wide = Firewall {
        remote_nodes: nets(&[
            "192.168.0.0/16",
            "192.168.7.0/24",
            "10.4.0.0/32",
            "10.4.0.1/32",
        ]),
        ..v4_only(firewall())
    };
    node.with(|kernel| {
        install(kernel, &wide);
        assert_eq!(kernel.observe().unwrap().firewall.unwrap().id(), wide.id());
    });
    let set = node.run("nft list set inet selvedge remote4");
    assert!(set.contains("10.4.0.0/31"), "{set}");
    assert!(!set.contains("192.168.7.0"), "{set}");
}

#[test]
fn a_foreign_table_of_the_same_name_is_replaced() {
    let node = Node::with_tunnel("usurped");
    node.sh("
        nft add table inet selvedge
        nft 'add chain inet selvedge x { type filter hook input priority 0; policy drop; }'
    ");
    node.with(|kernel| {
        assert_ne!(
            kernel.observe().unwrap().firewall.unwrap().id(),
            firewall().id()
        );
        install(kernel, &firewall());
        assert_eq!(
            kernel.observe().unwrap().firewall.unwrap().id(),
            firewall().id()
        );
    });
    assert!(!node.run("nft list table inet selvedge").contains("chain x"));
}

/// A change of prefixes replaces the elements of sets. A new table would let packets see new rules with
/// empty sets, and drop one to a member of the region as one that leaves it.
#[test]
fn a_change_of_prefixes_drops_no_packet() {
    let node = Node::with_tunnel("swap");
    node.run("ip neigh add 192.168.50.12 lladdr 02:00:00:00:00:12 dev eth0 nud permanent");
    node.with(|kernel| {
        let stop = AtomicBool::new(false);
        let peers = |n: u8| Firewall {
            masquerade_sources: nets(&[&format!("10.5.1.{n}/32")]),
            remote_nodes: nets(&["10.4.0.1/32", &format!("203.0.113.{n}/32")]),
            ..firewall()
        };
        let none = Firewall {
            masquerade_sources: nets(&[]),
            masquerade_destinations: nets(&[]),
            known: nets(&[]),
            ..firewall()
        };
        install(kernel, &none);
        let socket = bind("192.168.50.11", 8473);
        // The sender sees a drop as an error. It sends without a pause, since the gap of a wrong change
        // lasts for some microseconds.
        let send = || {
            let (mut sent, mut refused) = (0_u32, 0_u32);
            while !stop.load(Ordering::Relaxed) {
                sent += 1;
                refused += u32::from(socket.send_to(b"vxlan", "192.168.50.12:8472").is_err());
            }
            (sent, refused)
        };
        let (sent, refused) = std::thread::scope(|scope| {
            let sender = scope.spawn(send);
            for n in 1..60 {
                install(kernel, &peers(n));
                let id = kernel.observe().unwrap().firewall.unwrap().id();
                assert_eq!(id, peers(n).id());
            }
            install(kernel, &none);
            stop.store(true, Ordering::Relaxed);
            sender.join().unwrap()
        });
        assert_eq!(refused, 0, "of {sent}");

        // Control: a packet to an address outside the sets is refused, and counted.
        let gone = Firewall {
            region_underlay: [ip("192.168.50.11")].into(),
            ..peers(1)
        };
        install(kernel, &gone);
        assert!(socket.send_to(b"vxlan", "192.168.50.12:8472").is_err());
        assert_eq!(kernel.nft.counters().unwrap().leak_drops, 1);
    });
}

#[test]
fn a_modified_table_is_replaced_even_if_its_frame_is_the_same() {
    let node = Node::with_tunnel("touched");
    node.with(|kernel| install(kernel, &firewall()));
    node.sh("nft insert rule inet selvedge underlay udp dport 8472 accept");
    node.with(|kernel| install(kernel, &firewall()));
    let rules = node.run("nft list chain inet selvedge underlay");
    assert!(!rules.contains("dport 8472 accept"), "{rules}");
}
