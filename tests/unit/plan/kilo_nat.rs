//! Masquerading, rule by rule as in Kilo's chain `KILO-NAT`.
//!
//! The chains are those of Kilo in this cluster (`--cni=false`), as `iptables-save` and `ip6tables-save` print them.
//! Our table is compared for every pair of addresses that a rule distinguishes. `tests/kernel` covers the table in
//! the kernel.

use std::net::IpAddr;

use ipnet::IpNet;
use selvedge::state::Firewall;

use super::*;

/// On every node: WireGuard addresses, what segments allow, peers, services.
const KILO_NAT: &str = "
-A KILO-NAT -d 10.4.0.1/32 -j RETURN
-A KILO-NAT -d fd0a:4::1/128 -j RETURN
-A KILO-NAT -d 10.42.1.0/24 -j RETURN
-A KILO-NAT -d fd42:0:0:1::/64 -j RETURN
-A KILO-NAT -d 192.168.1.1/32 -j RETURN
-A KILO-NAT -d fd10::1/128 -j RETURN
-A KILO-NAT -d 10.42.2.0/24 -j RETURN
-A KILO-NAT -d fd42:0:0:2::/64 -j RETURN
-A KILO-NAT -d 192.168.1.2/32 -j RETURN
-A KILO-NAT -d fd10::2/128 -j RETURN
-A KILO-NAT -d 10.4.0.2/32 -j RETURN
-A KILO-NAT -d fd0a:4::2/128 -j RETURN
-A KILO-NAT -d 10.42.3.0/24 -j RETURN
-A KILO-NAT -d fd42:0:0:3::/64 -j RETURN
-A KILO-NAT -d 192.168.2.3/32 -j RETURN
-A KILO-NAT -d fd10::3/128 -j RETURN
-A KILO-NAT -d 10.6.0.0/24 -j RETURN
-A KILO-NAT -d fd06::/64 -j RETURN
-A KILO-NAT -d 10.5.0.1/32 -j RETURN
-A KILO-NAT -d 10.43.0.0/16 -j RETURN
-A KILO-NAT -d fd43::/112 -j RETURN
-A KILO-NAT -j MASQUERADE
-A POSTROUTING -s 10.6.0.0/24 -j KILO-NAT
-A POSTROUTING -s fd06::/64 -j KILO-NAT
-A POSTROUTING -s 10.5.0.1/32 -j KILO-NAT
";

/// On the nodes of region `a`, the one that does not lead included.
const IN_A: &str = "
-A POSTROUTING -d 192.168.77.0/24 -j KILO-NAT
-A POSTROUTING -d fd77::/64 -j KILO-NAT
";

/// On the node of region `b`, whose location is in part a node's address.
const IN_B: &str = "
-A POSTROUTING -d 192.168.2.0/24 -j KILO-NAT
";

/// Two regions of both families, their `allowed-location-ips`, and two peers.
fn mesh() -> Mesh {
    let both = |name: &str, region: &str, seed: u8, address: &str| {
        node(name, region, seed, address).with(|node| {
            node.pod_cidrs.push(net(&format!("fd42:0:0:{seed}::/64")));
            node.internal_ips.push(ip(&format!("fd10::{seed}")));
        })
    };
    Mesh::new([
        both("a1", "a", 1, "192.168.1.1/24"),
        both("a2", "a", 2, "192.168.1.2/24").with(|node| {
            node.allowed_location_ips = vec![net("192.168.77.0/24"), net("fd77::/64")];
        }),
        both("b1", "b", 3, "192.168.2.3/24")
            .with(|node| node.allowed_location_ips = vec![net("192.168.2.0/24")]),
    ])
    .with(|mesh| {
        mesh.agreed.subnets = vec![net("10.4.0.0/16"), net("fd0a:4::/64")];
        let services = vec![net("10.43.0.0/16"), net("fd43::/112")];
        mesh.agreed.service_cidrs = services.clone();
        mesh.local.service_cidrs = services;
        mesh.add_peers([
            vpn_peer("office", 100, &["10.6.0.0/24", "fd06::/64"]),
            vpn_peer("laptop", 101, &["10.5.0.1/32"]),
        ]);
    })
}

/// A rule of `iptables-save`.
struct Rule<'a> {
    chain: &'a str,
    source: Option<IpNet>,
    destination: Option<IpNet>,
    target: &'a str,
}

fn rules(text: &str) -> Vec<Rule<'_>> {
    let lines = text.lines().filter(|line| !line.is_empty());
    let rule = |line| {
        let words: Vec<&str> = str::split_whitespace(line).collect();
        let after = |flag| {
            let at = words.iter().position(|word| *word == flag)?;
            words.get(at + 1).copied()
        };
        Rule {
            chain: after("-A").unwrap(),
            source: after("-s").map(net),
            destination: after("-d").map(net),
            target: after("-j").unwrap(),
        }
    };
    lines.map(rule).collect()
}

/// Whether Kilo masquerades a packet that leaves.
fn kilo_masquerades(rules: &[Rule<'_>], from: IpAddr, to: IpAddr) -> bool {
    let of = |chain: &'static str| {
        rules.iter().find(move |rule| {
            rule.chain == chain
                && rule.source.is_none_or(|net| net.contains(&from))
                && rule.destination.is_none_or(|net| net.contains(&to))
        })
    };
    of("POSTROUTING")
        .is_some_and(|_| of("KILO-NAT").is_some_and(|rule| rule.target == "MASQUERADE"))
}

/// Whether our table does, by the values of [`Firewall`].
fn we_masquerade(firewall: &Firewall, from: IpAddr, to: IpAddr) -> bool {
    let holds = |nets: &BTreeSet<IpNet>, ip: IpAddr| nets.iter().any(|net| net.contains(&ip));
    let asked =
        holds(&firewall.masquerade_sources, from) || holds(&firewall.masquerade_destinations, to);
    asked && !holds(&firewall.known, to)
}

/// The first and the last address of every prefix of the rules, the neighbours of its ends, and some without
/// a rule.
fn probes(rules: &[Rule<'_>]) -> BTreeSet<IpAddr> {
    let nets = rules
        .iter()
        .flat_map(|rule| [rule.source, rule.destination]);
    let ends = nets.flatten().flat_map(|net| {
        let after = match net.broadcast() {
            IpAddr::V4(last) => IpAddr::V4((u32::from(last) + 1).into()),
            IpAddr::V6(last) => IpAddr::V6((u128::from(last) + 1).into()),
        };
        [net.network(), net.broadcast(), after]
    });
    let strangers = ["198.51.100.8", "192.168.88.1", "2001:db8::8"].map(ip);
    ends.chain(strangers).collect()
}

/// The pairs of one family for which Kilo and our table differ.
fn differences(kilo: &[Rule<'_>], ours: &Firewall, probes: &BTreeSet<IpAddr>) -> Vec<String> {
    let pairs = probes
        .iter()
        .flat_map(|from| probes.iter().map(move |to| (*from, *to)))
        .filter(|(from, to)| from.is_ipv6() == to.is_ipv6());
    pairs
        .filter(|(from, to)| kilo_masquerades(kilo, *from, *to) != we_masquerade(ours, *from, *to))
        .map(|(from, to)| format!("{from} to {to}"))
        .collect()
}

#[test]
fn masquerading_is_exactly_that_of_kilos_chain() {
    let mesh = mesh();
    for (me, of_its_region) in [("a1", IN_A), ("a2", IN_A), ("b1", IN_B)] {
        let text = format!("{KILO_NAT}{of_its_region}");
        let kilo = rules(&text);
        let probes = probes(&kilo);
        let ours = firewall(&mesh, me);
        assert_eq!(differences(&kilo, &ours, &probes), [""; 0], "{me}");

        // The control: without any one of Kilo's rules the results differ.
        for left_out in text.lines().filter(|line| !line.is_empty()) {
            let less = text.replace(&format!("{left_out}\n"), "");
            let found = differences(&rules(&less), &ours, &probes);
            assert!(!found.is_empty(), "{me} without {left_out}");
        }
    }
}

#[test]
fn without_peers_and_locations_nothing_is_masqueraded() {
    let mut mesh = mesh();
    mesh.snapshot.peers.clear();
    for name in ["a2", "b1"] {
        mesh.node(name).allowed_location_ips.clear();
    }
    for me in ["a1", "a2", "b1"] {
        let firewall = firewall(&mesh, me);
        assert!(firewall.masquerade_sources.is_empty(), "{me}");
        assert!(firewall.masquerade_destinations.is_empty(), "{me}");
    }
}
