//! The nft table: how it reads, and what it does to packets.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use selvedge::diff::Change;
use selvedge::kernel::{Counters, Kernel};
use selvedge::state::{Firewall, Guard};
use selvedge_lab::netns::Namespace;

use crate::fixture::{Node, firewall, ip, nets};

#[test]
fn an_operator_reads_what_a_leader_does() {
    let node = Node::with_tunnel("leader");
    node.with(|kernel| install(kernel, &firewall()));
    insta::assert_snapshot!(listing(&node), @r#"
    table inet selvedge {
    	counter leak_drops {
    		packets 0 bytes 0
    	}

    	counter leaks {
    		packets 0 bytes 0
    	}

    	counter pod_drops {
    		packets 0 bytes 0
    	}

    	counter stranger_drops {
    		packets 0 bytes 0
    	}

    	set allowed_hops4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.42.2.0, 192.168.50.12 }
    	}

    	set allowed_hops6 {
    		type ipv6_addr
    		flags interval
    		elements = { fd42:0:0:2:: }
    	}

    	set beside4 {
    		type ipv4_addr
    		flags interval
    	}

    	set beside6 {
    		type ipv6_addr
    		flags interval
    	}

    	set cluster4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.42.0.0/16 }
    	}

    	set cluster6 {
    		type ipv6_addr
    		flags interval
    		elements = { fd42::/56 }
    	}

    	set far4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.4.0.1, 10.5.0.1 }
    	}

    	set far6 {
    		type ipv6_addr
    		flags interval
    		elements = { fd04::1 }
    	}

    	set far_from_pods4 {
    		type ipv4_addr
    		flags interval
    		elements = { 203.0.113.10 }
    	}

    	set far_from_pods6 {
    		type ipv6_addr
    		flags interval
    	}

    	set known4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.42.0.0/16, 203.0.113.10 }
    	}

    	set known6 {
    		type ipv6_addr
    		flags interval
    	}

    	set local_pods4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.42.1.0/24 }
    	}

    	set local_pods6 {
    		type ipv6_addr
    		flags interval
    		elements = { fd42:0:0:1::/64 }
    	}

    	set masquerade_from4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.5.0.1 }
    	}

    	set masquerade_from6 {
    		type ipv6_addr
    		flags interval
    	}

    	set masquerade_to4 {
    		type ipv4_addr
    		flags interval
    		elements = { 172.16.0.0/24 }
    	}

    	set masquerade_to6 {
    		type ipv6_addr
    		flags interval
    	}

    	set mesh4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.4.0.1, 10.42.0.0/24,
    			     10.42.4.0/24 }
    	}

    	set mesh6 {
    		type ipv6_addr
    		flags interval
    		elements = { fd04::1,
    			     fd42::/64 }
    	}

    	set near4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.42.1.0/24, 10.42.2.0/23 }
    	}

    	set near6 {
    		type ipv6_addr
    		flags interval
    		elements = { fd42:0:0:1::/64,
    			     fd42:0:0:2::/64 }
    	}

    	set region4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.42.2.0/23, 192.168.50.12 }
    	}

    	set region6 {
    		type ipv6_addr
    		flags interval
    		elements = { 2001:db8:50::12,
    			     fd42:0:0:2::/64 }
    	}

    	set region_underlay4 {
    		type ipv4_addr
    		flags interval
    		elements = { 192.168.50.11, 192.168.50.12 }
    	}

    	set region_underlay6 {
    		type ipv6_addr
    		flags interval
    		elements = { 2001:db8:50::12 }
    	}

    	set remote4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.4.0.1, 10.42.0.0/24,
    			     10.42.4.0/24, 203.0.113.10 }
    	}

    	set remote6 {
    		type ipv6_addr
    		flags interval
    		elements = { fd04::1,
    			     fd42::/64 }
    	}

    	set remote_pods4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.42.0.0/24, 10.42.4.0/24 }
    	}

    	set remote_pods6 {
    		type ipv6_addr
    		flags interval
    		elements = { fd42::/64 }
    	}

    	set vxlan_from4 {
    		type ipv4_addr
    		flags interval
    		elements = { 192.168.50.0/24 }
    	}

    	set vxlan_from6 {
    		type ipv6_addr
    		flags interval
    		elements = { 2001:db8:50::12 }
    	}

    	set wide4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.42.0.0/16 }
    	}

    	set wide6 {
    		type ipv6_addr
    		flags interval
    		elements = { fd42::/56 }
    	}

    	chain transit {
    		type filter hook prerouting priority raw; policy accept;
    		fib daddr type local return
    		iifname "kilo0" ip saddr @remote4 ip daddr @region4 notrack
    		iifname != "kilo0" ip saddr @region4 ip daddr @remote4 fib daddr oifname "kilo0" notrack
    		iifname "kilo0" ip saddr @remote4 ip daddr @remote4 notrack
    		iifname "kilo0" ip6 saddr @remote6 ip6 daddr @region6 notrack
    		iifname != "kilo0" ip6 saddr @region6 ip6 daddr @remote6 fib daddr oifname "kilo0" notrack
    		iifname "kilo0" ip6 saddr @remote6 ip6 daddr @remote6 notrack
    	}

    	chain translate {
    		type nat hook postrouting priority srcnat - 1; policy accept;
    		meta mark & 0x00004000 == 0x00004000 ip daddr @mesh4 snat ip to 10.42.1.0 fully-random
    		meta mark & 0x00004000 == 0x00004000 ip6 daddr @mesh6 snat ip6 to fd42:0:0:1:: fully-random
    		meta mark & 0x00004000 == 0x00004000 return comment "kube-proxy masquerades it"
    		ip saddr @masquerade_from4 ip daddr @known4 snat ip to ip saddr
    		ip saddr @masquerade_from4 masquerade
    		ip daddr @masquerade_to4 ip daddr != @known4 masquerade
    		oifname "kilo0" ip saddr @region4 snat ip to ip saddr
    		oifname "kilo0" ip saddr @local_pods4 snat ip to ip saddr
    		ip saddr @local_pods4 ip daddr @remote4 snat ip to ip saddr
    		ip6 saddr @masquerade_from6 ip6 daddr @known6 snat ip6 to ip6 saddr
    		ip6 saddr @masquerade_from6 masquerade
    		ip6 daddr @masquerade_to6 ip6 daddr != @known6 masquerade
    		oifname "kilo0" ip6 saddr @region6 snat ip6 to ip6 saddr
    		oifname "kilo0" ip6 saddr @local_pods6 snat ip6 to ip6 saddr
    		ip6 saddr @local_pods6 ip6 daddr @remote6 snat ip6 to ip6 saddr
    	}

    	chain clamp {
    		type filter hook forward priority mangle; policy accept;
    		iifname "kilo0" tcp flags syn / syn,rst tcp option maxseg size set rt mtu
    		oifname "kilo0" tcp flags syn / syn,rst tcp option maxseg size set rt mtu
    		ip saddr @remote4 tcp flags syn / syn,rst tcp option maxseg size set rt mtu
    		ip daddr @remote4 tcp flags syn / syn,rst tcp option maxseg size set rt mtu
    		ip6 saddr @remote6 tcp flags syn / syn,rst tcp option maxseg size set rt mtu
    		ip6 daddr @remote6 tcp flags syn / syn,rst tcp option maxseg size set rt mtu
    	}

    	chain underlay {
    		type filter hook output priority filter; policy accept;
    		ip daddr != @region_underlay4 udp dport 8472 counter name "leak_drops" drop
    		ip6 daddr != @region_underlay6 udp dport 8472 counter name "leak_drops" drop
    	}

    	chain leave {
    		type filter hook postrouting priority filter; policy accept;
    		oifname { "lo", "kilo0" } return
    		ip daddr @beside4 rt ip nexthop != @allowed_hops4 counter name "leak_drops" drop
    		ip daddr @far4 counter name "leak_drops" drop
    		ip saddr @cluster4 ip daddr @far_from_pods4 counter name "leak_drops" drop
    		ip daddr @near4 return
    		ip daddr @wide4 counter name "leak_drops" drop
    		ip6 daddr @beside6 rt ip6 nexthop != @allowed_hops6 counter name "leak_drops" drop
    		ip6 daddr @far6 counter name "leak_drops" drop
    		ip6 saddr @cluster6 ip6 daddr @far_from_pods6 counter name "leak_drops" drop
    		ip6 daddr @near6 return
    		ip6 daddr @wide6 counter name "leak_drops" drop
    	}

    	chain from_strangers {
    		type filter hook input priority filter; policy accept;
    		ip saddr != @vxlan_from4 udp dport 8472 counter name "stranger_drops" drop
    		ip6 saddr != @vxlan_from6 udp dport 8472 counter name "stranger_drops" drop
    	}

    	chain into_tunnel {
    		type filter hook forward priority filter; policy accept;
    		oifname != "kilo0" return
    		iifname "kilo0" return
    		ct state established,related return
    		ct status dnat return
    		ip saddr @local_pods4 fib saddr . iif oif exists return
    		iifname { "eth0", "flannel.1" } ip saddr @region4 return
    		ip saddr @masquerade_to4 return
    		ip6 saddr @local_pods6 fib saddr . iif oif exists return
    		iifname { "eth0", "flannel.1" } ip6 saddr @region6 return
    		ip6 saddr @masquerade_to6 return
    		counter name "stranger_drops" drop
    	}

    	chain out_of_tunnel {
    		type filter hook forward priority filter; policy accept;
    		iifname != "kilo0" return
    		oifname "kilo0" return
    		ct state established,related return
    		ct status dnat return
    		ip daddr @local_pods4 return
    		ip daddr @region4 return
    		ip daddr @masquerade_to4 return
    		ip6 daddr @local_pods6 return
    		ip6 daddr @region6 return
    		ip6 daddr @masquerade_to6 return
    		counter name "stranger_drops" drop
    	}

    	chain from_pods {
    		type filter hook input priority filter; policy accept;
    		iifname "cni0" udp dport { 8472, 51820 } counter name "pod_drops" drop
    		iifname "kilo0" udp dport 8472 counter name "pod_drops" drop
    		iifname != "lo" ip saddr @local_pods4 udp dport { 8472, 51820 } counter name "pod_drops" drop
    		iifname != "lo" ip6 saddr @local_pods6 udp dport { 8472, 51820 } counter name "pod_drops" drop
    	}

    	chain from_pods_on {
    		type filter hook forward priority filter; policy accept;
    		iifname { "cni0", "kilo0" } ip daddr @region_underlay4 udp dport 8472 counter name "pod_drops" drop
    		ip saddr @local_pods4 ip daddr @region_underlay4 udp dport 8472 counter name "pod_drops" drop
    		iifname { "cni0", "kilo0" } ip6 daddr @region_underlay6 udp dport 8472 counter name "pod_drops" drop
    		ip6 saddr @local_pods6 ip6 daddr @region_underlay6 udp dport 8472 counter name "pod_drops" drop
    	}

    	chain seal {
    		continue comment "installed …"
    	}
    }
    "#);
}

#[test]
fn an_operator_reads_what_a_follower_does() {
    let node = Node::with_tunnel("follower");
    let follower = Firewall {
        leader: false,
        masquerade_sources: nets(&[]),
        masquerade_destinations: nets(&[]),
        known: nets(&[]),
        vxlan: [("flannel.1".to_owned(), 8472)].into(),
        ..v4_only(firewall())
    };
    node.with(|kernel| install(kernel, &follower));
    insta::assert_snapshot!(listing(&node), @r#"
    table inet selvedge {
    	counter leak_drops {
    		packets 0 bytes 0
    	}

    	counter leaks {
    		packets 0 bytes 0
    	}

    	counter pod_drops {
    		packets 0 bytes 0
    	}

    	counter stranger_drops {
    		packets 0 bytes 0
    	}

    	set allowed_hops4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.42.2.0, 192.168.50.12 }
    	}

    	set beside4 {
    		type ipv4_addr
    		flags interval
    	}

    	set cluster4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.42.0.0/16 }
    	}

    	set far4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.4.0.1, 10.5.0.1 }
    	}

    	set far_from_pods4 {
    		type ipv4_addr
    		flags interval
    		elements = { 203.0.113.10 }
    	}

    	set known4 {
    		type ipv4_addr
    		flags interval
    	}

    	set local_pods4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.42.1.0/24 }
    	}

    	set masquerade_from4 {
    		type ipv4_addr
    		flags interval
    	}

    	set masquerade_to4 {
    		type ipv4_addr
    		flags interval
    	}

    	set mesh4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.4.0.1, 10.42.0.0/24,
    			     10.42.4.0/24 }
    	}

    	set near4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.42.1.0/24, 10.42.2.0/23 }
    	}

    	set region4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.42.2.0/23, 192.168.50.12 }
    	}

    	set region_underlay4 {
    		type ipv4_addr
    		flags interval
    		elements = { 192.168.50.11, 192.168.50.12 }
    	}

    	set remote4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.4.0.1, 10.42.0.0/24,
    			     10.42.4.0/24, 203.0.113.10 }
    	}

    	set remote_pods4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.42.0.0/24, 10.42.4.0/24 }
    	}

    	set vxlan_from4 {
    		type ipv4_addr
    		flags interval
    		elements = { 192.168.50.0/24 }
    	}

    	set wide4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.42.0.0/16 }
    	}

    	chain transit {
    		type filter hook prerouting priority raw; policy accept;
    		ip saddr @region4 ip daddr @remote_pods4 notrack
    	}

    	chain translate {
    		type nat hook postrouting priority srcnat - 1; policy accept;
    		meta mark & 0x00004000 == 0x00004000 ip daddr @mesh4 snat ip to 10.42.1.0 fully-random
    		meta mark & 0x00004000 == 0x00004000 return comment "kube-proxy masquerades it"
    		ip saddr @masquerade_from4 ip daddr @known4 snat ip to ip saddr
    		ip saddr @masquerade_from4 masquerade
    		ip daddr @masquerade_to4 ip daddr != @known4 masquerade
    		ip saddr @local_pods4 ip daddr @remote4 snat ip to ip saddr
    	}

    	chain clamp {
    		type filter hook forward priority mangle; policy accept;
    		iifname "kilo0" tcp flags syn / syn,rst tcp option maxseg size set rt mtu
    		oifname "kilo0" tcp flags syn / syn,rst tcp option maxseg size set rt mtu
    		ip saddr @remote4 tcp flags syn / syn,rst tcp option maxseg size set rt mtu
    		ip daddr @remote4 tcp flags syn / syn,rst tcp option maxseg size set rt mtu
    	}

    	chain underlay {
    		type filter hook output priority filter; policy accept;
    		ip daddr != @region_underlay4 udp dport 8472 counter name "leak_drops" drop
    		meta nfproto ipv6 udp dport 8472 counter name "leak_drops" drop
    	}

    	chain leave {
    		type filter hook postrouting priority filter; policy accept;
    		oifname "lo" return
    		ip daddr @beside4 rt ip nexthop != @allowed_hops4 counter name "leak_drops" drop
    		ip daddr @far4 rt ip nexthop != @allowed_hops4 counter name "leak_drops" drop
    		ip saddr @cluster4 ip daddr @far_from_pods4 rt ip nexthop != @allowed_hops4 counter name "leak_drops" drop
    		ip daddr @near4 return
    		ip daddr @wide4 rt ip nexthop != @allowed_hops4 counter name "leak_drops" drop
    	}

    	chain from_strangers {
    		type filter hook input priority filter; policy accept;
    		ip saddr != @vxlan_from4 udp dport 8472 counter name "stranger_drops" drop
    		meta nfproto ipv6 udp dport 8472 counter name "stranger_drops" drop
    	}

    	chain from_pods {
    		type filter hook input priority filter; policy accept;
    		iifname "cni0" udp dport { 8472, 51820 } counter name "pod_drops" drop
    		iifname "kilo0" udp dport 8472 counter name "pod_drops" drop
    		iifname != "lo" ip saddr @local_pods4 udp dport { 8472, 51820 } counter name "pod_drops" drop
    	}

    	chain from_pods_on {
    		type filter hook forward priority filter; policy accept;
    		iifname { "cni0", "kilo0" } ip daddr @region_underlay4 udp dport 8472 counter name "pod_drops" drop
    		ip saddr @local_pods4 ip daddr @region_underlay4 udp dport 8472 counter name "pod_drops" drop
    	}

    	chain seal {
    		continue comment "installed …"
    	}
    }
    "#);
}

#[test]
fn prefixes_that_overlap_or_touch_become_one() {
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
fn a_table_of_anybodys_making_under_our_name_is_replaced() {
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

/// How flannel keeps its masquerading rules.
const FLAVOURS: [(&str, &str); 3] = [
    ("iptables-nft", "iptables"),
    ("iptables-legacy", "iptables-legacy"),
    ("nftables", ""),
];

/// A change of who is where replaces the elements of sets. A new table would let packets see new rules with
/// nothing in their sets: one to a member of the region looked like one that leaves it.
#[test]
fn a_change_of_prefixes_disturbs_no_packet() {
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
        // A refusal is told to the sender. It sends without a pause: what a change gets wrong lasts
        // for some microseconds.
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

        // Control: what the sets do not hold is refused, and noticed.
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
fn a_table_that_somebody_touched_is_made_anew_though_its_frame_is_the_same() {
    let node = Node::with_tunnel("touched");
    node.with(|kernel| install(kernel, &firewall()));
    node.sh("nft insert rule inet selvedge underlay udp dport 8472 accept");
    node.with(|kernel| install(kernel, &firewall()));
    let rules = node.run("nft list chain inet selvedge underlay");
    assert!(!rules.contains("dport 8472 accept"), "{rules}");
}

#[test]
fn without_us_flannel_hides_the_source_of_what_a_leader_forwards() {
    let mesh = Mesh::new("control");
    mesh.masquerade_as_flannel("iptables");

    assert_eq!(
        mesh.seen_by(&mesh.far, "10.42.2.5", "10.42.0.5"),
        Some("10.42.1.0".to_owned())
    );
}

#[test]
fn transit_keeps_its_source_and_leaves_no_trace_whatever_flannel_uses() {
    for (flavour, program) in FLAVOURS {
        let mesh = Mesh::new(&flavour[flavour.len() - 4..]);
        mesh.masquerade_as_flannel(program);
        mesh.install(&firewall());
        let ways = [
            (&mesh.far, "10.42.2.5", "10.42.0.5"),
            (&mesh.far, "192.168.50.12", "10.42.0.5"),
            (&mesh.far, "10.42.2.5", "203.0.113.10"),
            (&mesh.near, "10.42.0.5", "10.42.2.5"),
            (&mesh.near, "10.42.0.5", "192.168.50.12"),
            (&mesh.near, "203.0.113.10", "192.168.50.12"),
        ];
        for (to, from, address) in ways {
            let seen = mesh.seen_by(to, from, address);
            assert_eq!(
                seen.as_deref(),
                Some(from),
                "{flavour}: {from} to {address}"
            );
        }
        let tracked = mesh.leader.sh("conntrack -L -p udp 2>/dev/null").unwrap();
        assert_eq!(tracked, "", "{flavour}");
    }
}

#[test]
fn a_leaders_own_pods_keep_their_source_towards_remote_nodes() {
    for (flavour, program) in FLAVOURS {
        let mesh = Mesh::new(&format!("p{}", &flavour[flavour.len() - 4..]));
        mesh.masquerade_as_flannel(program);
        mesh.install(&firewall());

        let seen = mesh.seen_by(&mesh.far, "10.42.1.5", "203.0.113.10");

        assert_eq!(seen.as_deref(), Some("10.42.1.5"), "{flavour}");
    }
}

#[test]
fn what_kube_proxy_marks_is_masqueraded_by_it() {
    let mesh = Mesh::new("marked");
    mesh.leader
        .sh("
            nft add table ip kp
            nft 'add chain ip kp pre { type filter hook prerouting priority -150; }'
            nft 'add rule ip kp pre ip saddr 10.42.1.5 meta mark set 0x4000'
            nft 'add chain ip kp post { type nat hook postrouting priority 100; }'
            nft 'add rule ip kp post mark and 0x4000 == 0x4000 masquerade'
        ")
        .unwrap();
    mesh.install(&firewall());

    let seen = mesh.seen_by(&mesh.far, "10.42.1.5", "10.42.0.5");

    assert_eq!(
        seen.as_deref(),
        Some("10.42.1.0"),
        "the tunnel's first address"
    );
}

#[test]
fn a_leader_that_is_its_regions_router_still_translates_what_passes_the_tunnel_by() {
    let mesh = Mesh::new("router");
    // Hosts reach the public address of a remote node directly; here, over what stands for the WAN.
    mesh.leader
        .sh("
            ip route del 203.0.113.10
            ip route add 203.0.113.10 dev wan
            nft add table ip host
            nft 'add chain ip host post { type nat hook postrouting priority 100; }'
            nft 'add rule ip host post oifname wan masquerade'
        ")
        .unwrap();
    mesh.install(&firewall());

    let seen = mesh.seen_by(&mesh.far, "192.168.50.12", "203.0.113.10");

    assert_eq!(seen.as_deref(), Some("198.51.100.1"));
}

#[test]
fn a_vpn_peer_is_itself_inside_the_mesh_and_leaves_it_only_where_the_operator_says_so() {
    let mesh = Mesh::new("vpn");
    mesh.masquerade_as_flannel("iptables");
    mesh.install(&firewall());
    assert_eq!(mesh.seen_by(&mesh.near, "10.5.0.1", "192.0.2.12"), None);
    assert_eq!(mesh.counters().stranger_drops, 1);
    mesh.install(&Firewall {
        peer_internet: true,
        ..firewall()
    });

    let inside = mesh.seen_by(&mesh.near, "10.5.0.1", "10.42.2.5");
    let outside = mesh.seen_by(&mesh.near, "10.5.0.1", "192.0.2.12");

    assert_eq!(inside.as_deref(), Some("10.5.0.1"));
    assert_eq!(outside.as_deref(), Some("192.168.50.11"));
}

#[test]
fn connections_agree_on_segments_that_fit_into_the_tunnel() {
    let mesh = Mesh::new("mss");
    mesh.leader
        .run("ip route replace 10.42.0.0/24 via 10.4.0.1 dev kilo0 mtu 1420")
        .unwrap();

    let before = mesh.segment_size("10.42.2.5", "10.42.0.5");
    mesh.install(&firewall());
    let after = mesh.segment_size("10.42.2.5", "10.42.0.5");

    // Timestamps take 12 bytes of each segment.
    assert_eq!((before, after), (1448, 1368));
}

#[test]
fn vxlan_leaves_for_the_own_region_only() {
    let mesh = Mesh::new("vxlan");
    let send = |to: &str| {
        let address: SocketAddr = to.parse().unwrap();
        mesh.leader.within(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.send_to(b"vxlan", address).is_ok()
        })
    };
    assert!(send("203.0.113.10:8472"), "control");
    mesh.install(&firewall());

    assert!(send("192.168.50.12:8472"));
    assert!(send("203.0.113.10:8473"));
    assert!(!send("203.0.113.10:8472"));
    assert_eq!(mesh.counters().leak_drops, 1);

    mesh.install(&Firewall {
        fail_closed: false,
        ..firewall()
    });
    assert!(send("203.0.113.10:8472"));
    let expected = Counters {
        leaks: 1,
        ..Counters::default()
    };
    assert_eq!(mesh.counters(), expected);
}

#[test]
fn a_leader_sends_nothing_to_remote_pods_beside_the_tunnel() {
    let mesh = Mesh::new("beside");
    mesh.leader
        .run("ip route replace 10.42.0.0/24 dev wan")
        .unwrap();
    let arrives = || mesh.seen_by(&mesh.far, "10.42.2.5", "10.42.0.5").is_some();
    assert!(arrives(), "control");

    mesh.install(&firewall());

    assert!(!arrives());
    assert_eq!(mesh.counters().leak_drops, 1);
}

#[test]
fn pods_cannot_speak_vxlan_or_wireguard_to_nodes() {
    let mesh = Mesh::new("pods");
    let from_pod = |source: &str, to: &str, port: u16| {
        let target = if to == "192.168.50.12" {
            &mesh.near
        } else {
            &mesh.leader
        };
        mesh.delivered(&mesh.pod, source, target, to, port)
    };
    let attempts = [
        ("10.42.1.5", "192.168.50.11", 8472),
        ("10.42.1.5", "192.168.50.11", 51820),
        ("10.42.1.5", "192.168.50.12", 8472),
        // In the name of a node of the region.
        ("192.168.50.13", "192.168.50.11", 8472),
        ("192.168.50.13", "192.168.50.12", 8472),
    ];
    for (source, to, port) in attempts {
        assert!(
            from_pod(source, to, port),
            "control: {source} to {to}:{port}"
        );
    }
    mesh.install(&firewall());
    for (source, to, port) in attempts {
        assert!(!from_pod(source, to, port), "{source} to {to}:{port}");
    }
    assert_eq!(mesh.counters().pod_drops, 5);
    assert!(from_pod("10.42.1.5", "192.168.50.11", 53), "all else goes");
    assert!(mesh.delivered(
        &mesh.near,
        "192.168.50.12",
        &mesh.leader,
        "192.168.50.11",
        8472
    ));
}

#[test]
fn no_vxlan_comes_out_of_the_tunnel() {
    let mesh = Mesh::new("out");
    let attempts = [
        // A pod of another region, and somebody's laptop.
        ("10.42.0.5", "192.168.50.11"),
        ("10.42.0.5", "192.168.50.12"),
        ("10.5.0.1", "192.168.50.11"),
        ("10.5.0.1", "192.168.50.12"),
    ];
    let arrives = |(source, to): (&str, &str), port| {
        mesh.delivered(&mesh.far, source, mesh.owner(to), to, port)
    };
    for attempt in attempts {
        assert!(arrives(attempt, 8472), "control: {attempt:?}");
    }
    mesh.install(&firewall());
    for attempt in attempts {
        assert!(!arrives(attempt, 8472), "{attempt:?}");
        assert!(arrives(attempt, 53), "all else goes: {attempt:?}");
    }
    assert_eq!(mesh.counters().pod_drops, 4);
}

#[test]
fn a_neighbour_with_a_route_for_the_cluster_network_does_not_enter_the_tunnel() {
    let mesh = Mesh::new("door");
    mesh.near
        .run("ip addr add 192.168.50.77/24 dev eth0")
        .unwrap();
    // A node port of the leader's, behind which is a pod elsewhere.
    mesh.leader
        .sh("
            nft add table ip kp
            nft 'add chain ip kp pre { type nat hook prerouting priority -100; }'
            nft 'add rule ip kp pre udp dport 30000 dnat to 10.42.0.5'
            nft 'add chain ip kp post { type nat hook postrouting priority 100; }'
            nft 'add rule ip kp post ct status dnat masquerade'
        ")
        .unwrap();
    let arrives = |from: &Namespace, source: &str, to: &str| {
        mesh.delivered(from, source, &mesh.far, to, 4000)
    };
    let stranger = |to: &str| arrives(&mesh.near, "192.168.50.77", to);
    assert!(stranger("10.42.0.5"), "control");
    mesh.install(&firewall());

    assert!(!stranger("10.42.0.5"));
    assert_eq!(mesh.counters().stranger_drops, 1);
    assert!(
        arrives(&mesh.near, "192.168.50.12", "10.42.0.5"),
        "a node of the region"
    );
    assert!(
        arrives(&mesh.near, "10.42.2.5", "10.42.0.5"),
        "a pod of the region"
    );
    assert!(
        arrives(&mesh.pod, "10.42.1.5", "10.42.0.5"),
        "a pod of the leader"
    );
    // In the name of a node, by the device of the pods.
    assert!(!arrives(&mesh.pod, "192.168.50.13", "10.42.0.5"));
    let node_port = || {
        mesh.delivered_by(
            &mesh.near,
            "192.168.50.77",
            &mesh.far,
            ("192.168.50.11", 30000),
            30000,
        )
    };
    assert!(node_port(), "what the leader itself translated");
}

#[test]
fn vxlan_is_taken_from_the_region_alone() {
    let mesh = Mesh::new("vxin");
    let arrives = |from: &Namespace, source: &str, to: &str| {
        mesh.delivered(from, source, &mesh.leader, to, 8472)
    };
    let stranger = || arrives(&mesh.far, "198.51.100.10", "198.51.100.1");
    let member = || arrives(&mesh.near, "192.168.50.12", "192.168.50.11");
    assert!(stranger() && member(), "control");

    mesh.install(&firewall());
    assert!(!stranger());
    assert!(member());

    // The region's only node expects none.
    mesh.install(&Firewall {
        vxlan_sources: nets(&[]),
        ..firewall()
    });
    assert!(!stranger() && !member());
}

/// The table as `nft` shows it, without the identities in its seal.
fn listing(node: &Node) -> String {
    let listing = node.run("nft list table inet selvedge");
    let (before, rest) = listing.split_once("installed ").unwrap();
    let (_, after) = rest.split_once('"').unwrap();
    format!("{before}installed …\"{after}")
}

fn install(kernel: &Kernel, firewall: &Firewall) {
    let change = Change::ReplaceFirewall(Box::new(firewall.clone()));
    kernel.apply(&change).unwrap();
}

fn v4_only(firewall: Firewall) -> Firewall {
    let v4 = |nets: std::collections::BTreeSet<ipnet::IpNet>| {
        nets.into_iter()
            .filter(|net| net.addr().is_ipv4())
            .collect()
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
        local_pods: v4(firewall.local_pods),
        guard: Guard {
            hops: firewall
                .guard
                .hops
                .into_iter()
                .filter(|ip| ip.is_ipv4())
                .collect(),
            beside: v4(firewall.guard.beside),
            far: v4(firewall.guard.far),
            far_from_pods: v4(firewall.guard.far_from_pods),
            near: v4(firewall.guard.near),
            wide: v4(firewall.guard.wide),
            cluster: v4(firewall.guard.cluster),
        },
        vxlan_sources: v4(firewall.vxlan_sources),
        ..firewall
    }
}

/// How long a datagram may be under way between two namespaces of a machine that has much else to do.
/// What is dropped is waited for as long.
const ARRIVAL: Duration = Duration::from_secs(1);

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

/// A leader between its region (one other node and its pod) and another region (a node and its pod).
/// What is called `kilo0` is a wire: the table knows links by their names.
///
/// ```text
/// near ── eth0 leader kilo0 ── far
///              │  └─ wan ───────┘
///             cni0 ── pod
/// ```
struct Mesh {
    near: Namespace,
    leader: Namespace,
    pod: Namespace,
    far: Namespace,
}

impl Mesh {
    fn new(label: &str) -> Self {
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
    fn masquerade_as_flannel(&self, program: &str) {
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

    fn install(&self, firewall: &Firewall) {
        self.leader
            .within(|| install(&Kernel::open("kilo0").unwrap(), firewall));
    }

    fn counters(&self) -> Counters {
        self.leader
            .within(|| Kernel::open("kilo0").unwrap().nft.counters().unwrap())
    }

    /// Who has the address.
    fn owner(&self, address: &str) -> &Namespace {
        [&self.near, &self.leader, &self.pod, &self.far]
            .into_iter()
            .find(|namespace| {
                let addresses = namespace.run("ip -o addr show").unwrap();
                addresses.contains(&format!("inet {address}/"))
            })
            .unwrap()
    }

    /// Sends a datagram and returns the source address it arrives with, if its answer comes back.
    fn seen_by(&self, to: &Namespace, from: &str, address: &str) -> Option<String> {
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

    /// Whether a datagram arrives; an answer is not asked for.
    fn delivered(
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
    fn delivered_by(
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
    fn segment_size(&self, from: &str, to: &str) -> u32 {
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
