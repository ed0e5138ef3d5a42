//! The table as `nft` lists it to an operator.

use selvedge::state::Firewall;

use super::{install, v4_only};
use crate::fixture::{Node, firewall, nets};

#[test]
fn the_table_of_a_leader() {
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

    	counter loop_drops {
    		packets 0 bytes 0
    	}

    	counter pod_drops {
    		packets 0 bytes 0
    	}

    	counter stranger_drops {
    		packets 0 bytes 0
    	}

    	counter transit_drops {
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
    		elements = { 10.4.0.1, 10.4.255.253,
    			     10.4.255.254, 10.5.0.1 }
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

    	set members4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.42.2.0, 10.42.3.0 }
    	}

    	set members6 {
    		type ipv6_addr
    		flags interval
    		elements = { fd42:0:0:2:: }
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

    	set probes4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.4.255.253, 10.4.255.254 }
    	}

    	set probes6 {
    		type ipv6_addr
    		flags interval
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

    	set relay_from4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.4.0.1, 10.4.0.3 }
    	}

    	set relay_from6 {
    		type ipv6_addr
    		flags interval
    		elements = { fd04::1 }
    	}

    	set relay_to4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.4.0.1 }
    	}

    	set relay_to6 {
    		type ipv6_addr
    		flags interval
    		elements = { fd04::1 }
    	}

    	set remote4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.4.0.1, 10.4.255.253,
    			     10.4.255.254, 10.42.0.0/24,
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
    		ip daddr @far4 rt ip nexthop != @allowed_hops4 counter name "leak_drops" drop
    		ip saddr @cluster4 ip daddr @far_from_pods4 rt ip nexthop != @allowed_hops4 counter name "leak_drops" drop
    		ip daddr @near4 return
    		ip daddr @wide4 rt ip nexthop != @allowed_hops4 counter name "leak_drops" drop
    		ip6 daddr @far6 rt ip6 nexthop != @allowed_hops6 counter name "leak_drops" drop
    		ip6 saddr @cluster6 ip6 daddr @far_from_pods6 rt ip6 nexthop != @allowed_hops6 counter name "leak_drops" drop
    		ip6 daddr @near6 return
    		ip6 daddr @wide6 rt ip6 nexthop != @allowed_hops6 counter name "leak_drops" drop
    	}

    	chain turn_back {
    		type filter hook forward priority filter; policy accept;
    		oifname "kilo0" return
    		iifname != { "eth0", "flannel.1" } return
    		ip daddr @far4 rt ip nexthop @allowed_hops4 counter name "loop_drops" drop
    		ip saddr @cluster4 ip daddr @far_from_pods4 rt ip nexthop @allowed_hops4 counter name "loop_drops" drop
    		ip daddr @near4 return
    		ip daddr @wide4 rt ip nexthop @allowed_hops4 counter name "loop_drops" drop
    		ip6 daddr @far6 rt ip6 nexthop @allowed_hops6 counter name "loop_drops" drop
    		ip6 saddr @cluster6 ip6 daddr @far_from_pods6 rt ip6 nexthop @allowed_hops6 counter name "loop_drops" drop
    		ip6 daddr @near6 return
    		ip6 daddr @wide6 rt ip6 nexthop @allowed_hops6 counter name "loop_drops" drop
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

    	chain through_tunnel {
    		type filter hook forward priority filter; policy accept;
    		iifname != "kilo0" return
    		oifname != "kilo0" return
    		ct state established,related return
    		ct status dnat return
    		ip saddr @masquerade_from4 return
    		ip daddr @masquerade_from4 return
    		ip saddr @relay_from4 ip daddr @relay_to4 udp sport 51820 udp dport 51820 return
    		ip6 saddr @masquerade_from6 return
    		ip6 daddr @masquerade_from6 return
    		ip6 saddr @relay_from6 ip6 daddr @relay_to6 udp sport 51820 udp dport 51820 return
    		counter name "transit_drops" drop
    	}

    	chain to_probes {
    		type filter hook forward priority filter; policy accept;
    		iifname { "eth0", "flannel.1" } oifname "kilo0" ip saddr @members4 ip daddr @probes4 return
    		ip daddr @probes4 counter name "pod_drops" drop
    		iifname { "eth0", "flannel.1" } oifname "kilo0" ip6 saddr @members6 ip6 daddr @probes6 return
    		ip6 daddr @probes6 counter name "pod_drops" drop
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
fn the_table_of_a_follower() {
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

    	counter loop_drops {
    		packets 0 bytes 0
    	}

    	counter pod_drops {
    		packets 0 bytes 0
    	}

    	counter stranger_drops {
    		packets 0 bytes 0
    	}

    	counter transit_drops {
    		packets 0 bytes 0
    	}

    	set allowed_hops4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.42.2.0, 192.168.50.12 }
    	}

    	set cluster4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.42.0.0/16 }
    	}

    	set far4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.4.0.1, 10.4.255.253,
    			     10.4.255.254, 10.5.0.1 }
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

    	set members4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.42.2.0, 10.42.3.0 }
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

    	set probes4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.4.255.253, 10.4.255.254 }
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

    	set relay_from4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.4.0.1, 10.4.0.3 }
    	}

    	set relay_to4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.4.0.1 }
    	}

    	set remote4 {
    		type ipv4_addr
    		flags interval
    		elements = { 10.4.0.1, 10.4.255.253,
    			     10.4.255.254, 10.42.0.0/24,
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

    	chain to_probes {
    		type filter hook forward priority filter; policy accept;
    		ip daddr @probes4 counter name "pod_drops" drop
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

/// The table as `nft` shows it, without the identities in its seal.
fn listing(node: &Node) -> String {
    let listing = node.run("nft list table inet selvedge");
    let (before, rest) = listing.split_once("installed ").unwrap();
    let (_, after) = rest.split_once('"').unwrap();
    format!("{before}installed …\"{after}")
}
