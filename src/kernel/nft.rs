//! Renders [`Firewall`] into the text that `nft` reads: the agent's own table `inet selvedge`.
//!
//! Text and not JSON: it is what an operator reads in `nft list table inet selvedge`.
//!
//! No rule accepts packets. A verdict of `accept` ends only its own chain, so it cannot undo a drop in the
//! host's own firewall; `doctor` reports such drops to the operator.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::net::IpAddr;

use ipnet::IpNet;

mod aliases;

use super::nft_identity::digest;
use crate::state::{Firewall, FirewallId};
use crate::wireguard::RELAY_PORT;

/// The table's name; its family is `inet`.
pub const TABLE: &str = "selvedge";
/// The counter of packets that would have left the region in clear.
pub const LEAK_DROPS: &str = "leak_drops";
/// The counter of packets that left the region in clear, with `--on-tunnel-down=open`.
pub const LEAKS: &str = "leaks";
/// The counter of packets from pods to the ports of VXLAN and the tunnel and to the addresses for echoes, and of
/// VXLAN out of the tunnel.
pub const POD_DROPS: &str = "pod_drops";
/// The counter of packets from outside the mesh into it, and out of the tunnel to outside the region.
pub const STRANGER_DROPS: &str = "stranger_drops";
/// The counter of packets of the own region for another one that a leader would have sent back to its region.
pub const LOOP_DROPS: &str = "loop_drops";
/// The counter of packets that came out of the tunnel and would have gone into it again, without being a relay's or an
/// external peer's.
pub const TRANSIT_DROPS: &str = "transit_drops";
/// The chain that sees no packets; the comment of its only rule identifies what was installed.
pub(super) const SEAL: &str = "seal";

/// The bridge that flannel's CNI configuration puts pods on, here and in k3s.
pub(super) const POD_BRIDGE: &str = "cni0";
/// The bit of the mark that kube-proxy sets on packets that it masquerades.
const KUBE_MASQUERADE: &str = "0x00004000";
/// What a node translated, or answers to it.
const KNOWN: [&str; 2] = [
    "ct state established,related return",
    "ct status dnat return",
];
/// Lowers the segment size that a SYN offers to what the routes both ways carry.
const CLAMP: &str = "tcp flags syn / syn,rst tcp option maxseg size set rt mtu";

/// The table as `nft -f` reads it, replacing one that is there, in one transaction.
///
/// For some microseconds of it packets see the new rules with nothing in their sets yet: the kernel starts
/// the new generation of rules before it shows the elements of new sets. A packet that belongs to the
/// region is then taken for one that leaves it. So this is for a table that is not there, or whose frame
/// differs; see [`render_elements`].
pub fn render(firewall: &Firewall) -> String {
    let text = Text::new(firewall);
    // Deleting a table that is not there would fail, so it is added first.
    format!(
        "table inet {TABLE}\ndelete table inet {TABLE}\n{}",
        text.table(true)
    )
}

/// What the table is without the elements of its sets, which is what mostly changes.
pub fn frame(firewall: &Firewall) -> FirewallId {
    digest(Text::new(firewall).table(false).as_bytes())
}

/// The elements of the sets as `nft -f` reads them, replacing those of a table of the same frame, in one
/// transaction. Packets see the old elements or the new.
pub(super) fn render_elements(firewall: &Firewall) -> String {
    let mut text = Text::new(firewall);
    for ((name, family), nets) in std::mem::take(&mut text.sets) {
        let set = format!("inet {TABLE} {name}{}", family.digit());
        text.line(0, format!("flush set {set}"));
        if !nets.is_empty() {
            text.line(0, format!("add element {set} {}", one_of(&nets)));
        }
    }
    text.alias_elements();
    text.out
}

/// An address family of the table.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Family {
    V4,
    V6,
}

impl Family {
    const BOTH: [Self; 2] = [Self::V4, Self::V6];

    fn of(net: &IpNet) -> Self {
        match net {
            IpNet::V4(_) => Self::V4,
            IpNet::V6(_) => Self::V6,
        }
    }

    /// nft's name of the header, before `saddr` and `daddr`.
    fn ip(self) -> &'static str {
        match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
        }
    }

    /// nft's name of the family after `meta nfproto`.
    fn protocol(self) -> &'static str {
        match self {
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
        }
    }

    /// What the names of its sets end with.
    fn digit(self) -> char {
        match self {
            Self::V4 => '4',
            Self::V6 => '6',
        }
    }
}

/// The text under construction.
struct Text<'a> {
    firewall: &'a Firewall,
    /// The named sets: prefixes that neither overlap nor touch. For a family that occurs at all every set
    /// exists, even an empty one, so that the rules stay when it fills.
    sets: BTreeMap<(&'static str, Family), Vec<IpNet>>,
    vxlan_ports: BTreeSet<u16>,
    out: String,
}

impl<'a> Text<'a> {
    fn new(firewall: &'a Firewall) -> Self {
        let underlay = firewall.region_underlay.iter().copied().map(IpNet::from);
        let guard = &firewall.guard;
        let hops = guard.hops.iter().copied().map(IpNet::from);
        let probes = firewall.probes.iter().copied().map(IpNet::from);
        let probes = probes.collect::<BTreeSet<_>>();
        let leaders = |ips: &BTreeSet<IpAddr>| ips.iter().copied().map(IpNet::from).collect();
        // The addresses of the region's nodes in the pod network, the first of their pod CIDRs.
        let members = firewall.region_pods.iter();
        let members = members.map(|pods| IpNet::from(pods.network()));
        // The kernel fills them in this order: sets that allow before sets that drop.
        let named = [
            ("allowed_hops", hops.collect()),
            ("cluster", guard.cluster.clone()),
            ("far", guard.far.clone()),
            ("far_from_pods", guard.far_from_pods.clone()),
            ("near", guard.near.clone()),
            ("vxlan_from", firewall.vxlan_sources.clone()),
            ("wide", guard.wide.clone()),
            ("known", firewall.known.clone()),
            ("local_pods", firewall.local_pods.clone()),
            ("masquerade_from", firewall.masquerade_sources.clone()),
            ("masquerade_to", firewall.masquerade_destinations.clone()),
            ("members", members.collect()),
            ("mesh", &firewall.remote_pods | &firewall.mesh_nodes),
            ("probes", probes.clone()),
            ("region", &firewall.region_pods | &firewall.region_nodes),
            ("relay_from", leaders(&firewall.relay.from)),
            ("relay_to", leaders(&firewall.relay.to)),
            ("region_underlay", underlay.collect()),
            (
                "remote",
                &(&firewall.remote_pods | &firewall.remote_nodes) | &probes,
            ),
            ("remote_pods", firewall.remote_pods.clone()),
        ];
        let nets = || named.iter().flat_map(|(_, nets)| nets);
        let families: BTreeSet<_> = nets().map(Family::of).collect();
        let mut sets: BTreeMap<_, Vec<IpNet>> = BTreeMap::new();
        for (name, nets) in &named {
            for family in &families {
                let nets = nets.iter().filter(|net| Family::of(net) == *family);
                sets.insert((*name, *family), nets.copied().collect());
            }
        }
        // A set refuses intervals that overlap.
        for nets in sets.values_mut() {
            *nets = IpNet::aggregate(nets);
            nets.sort_unstable();
        }
        Self {
            firewall,
            sets,
            vxlan_ports: firewall.vxlan.values().copied().collect(),
            out: String::new(),
        }
    }

    /// The whole table, with what is in its sets or without.
    fn table(mut self, filled: bool) -> String {
        self.line(0, format!("table inet {TABLE} {{"));
        let counters = [
            LEAK_DROPS,
            LEAKS,
            LOOP_DROPS,
            POD_DROPS,
            STRANGER_DROPS,
            TRANSIT_DROPS,
        ];
        for counter in counters {
            self.line(1, format!("counter {counter} {{ }}"));
        }
        self.sets(filled);
        self.alias_maps(filled);
        self.transit();
        self.translate();
        self.translate_aliases();
        self.clamp();
        self.underlay();
        self.leave();
        self.turn_no_packet_back();
        self.guard_vxlan();
        self.guard_doors();
        self.guard_transit();
        self.guard_probes();
        self.guard_ports();
        self.chain(SEAL, None, |_| ());
        self.line(0, "}");
        self.out
    }

    /// `@name4`, or `None` where nothing is of that family and a rule with it could not match.
    fn set(&self, name: &'static str, family: Family) -> Option<String> {
        self.sets
            .contains_key(&(name, family))
            .then(|| format!("@{name}{}", family.digit()))
    }

    /// This node's address in the pod network: the first of its pod CIDR.
    fn own(&self, family: Family) -> Option<IpAddr> {
        let mut pods = self.firewall.local_pods.iter();
        pods.find(|net| Family::of(net) == family)
            .map(IpNet::network)
    }

    fn line(&mut self, depth: usize, line: impl AsRef<str>) {
        self.out.extend(std::iter::repeat_n('\t', depth));
        self.out.push_str(line.as_ref());
        self.out.push('\n');
    }

    fn rule(&mut self, rule: impl AsRef<str>) {
        self.line(2, rule);
    }

    fn chain(&mut self, name: &str, hook: Option<&str>, rules: impl FnOnce(&mut Self)) {
        self.line(0, "");
        self.line(1, format!("chain {name} {{"));
        if let Some(hook) = hook {
            self.rule(format!("type {hook}; policy accept;"));
        }
        rules(self);
        self.line(1, "}");
    }

    fn sets(&mut self, filled: bool) {
        for ((name, family), nets) in std::mem::take(&mut self.sets) {
            self.line(0, "");
            self.line(1, format!("set {name}{} {{", family.digit()));
            self.rule(format!("type {}_addr", family.protocol()));
            self.rule("flags interval");
            if filled && !nets.is_empty() {
                self.rule(format!("elements = {}", one_of(&nets)));
            }
            self.line(1, "}");
            self.sets.insert((name, family), nets);
        }
    }

    /// Pure transit is not tracked: flannel would masquerade it, and where the way back leads over
    /// another leader, kube-proxy would drop it as invalid.
    ///
    /// A leader may also be its region's router. Packets that it forwards past the tunnel stay tracked, or
    /// they would not be translated.
    ///
    /// A former leader still receives packets from nodes that have not changed their routes yet, and passes
    /// them on to the new leader. If they were tracked, flannel would masquerade them in the middle of a
    /// connection.
    fn transit(&mut self) {
        let tunnel = &self.firewall.tunnel;
        let hook = Some("filter hook prerouting priority raw");
        if !self.firewall.leader {
            self.chain("transit", hook, |text| {
                for family in Family::BOTH {
                    let ip = family.ip();
                    let sets = (text.set("region", family), text.set("remote_pods", family));
                    if let (Some(region), Some(pods)) = sets {
                        text.rule(format!("{ip} saddr {region} {ip} daddr {pods} notrack"));
                    }
                }
            });
            return;
        }
        self.chain("transit", hook, |text| {
            text.rule("fib daddr type local return");
            for family in Family::BOTH {
                let ip = family.ip();
                let Some(remote) = text.set("remote", family) else {
                    continue;
                };
                if let Some(region) = text.set("region", family) {
                    text.rule(format!(
                        "iifname \"{tunnel}\" {ip} saddr {remote} {ip} daddr {region} notrack"
                    ));
                    text.rule(format!(
                        "iifname != \"{tunnel}\" {ip} saddr {region} {ip} daddr {remote} fib daddr oifname \"{tunnel}\" notrack"
                    ));
                }
                text.rule(format!(
                    "iifname \"{tunnel}\" {ip} saddr {remote} {ip} daddr {remote} notrack"
                ));
            }
        });
    }

    /// Decides on translation before flannel's rules at `srcnat` do: a source translated to itself is
    /// bound for the connection's life, and later chains are not asked. `accept` would not do that.
    ///
    /// A packet that kube-proxy marks for masquerading gets this node's address in the pod network, by
    /// whatever device it leaves. Masquerading would use the underlay's address where flannel routes
    /// directly, and the leader's FORWARD chain would not accept that source.
    fn translate(&mut self) {
        let firewall = self.firewall;
        let tunnel = &firewall.tunnel;
        let hook = Some("nat hook postrouting priority srcnat - 1");
        let marked = format!("meta mark & {KUBE_MASQUERADE} == {KUBE_MASQUERADE}");
        self.chain("translate", hook, |text| {
            for family in Family::BOTH {
                let ip = family.ip();
                let (Some(mesh), Some(own)) = (text.set("mesh", family), text.own(family)) else {
                    continue;
                };
                text.rule(format!(
                    "{marked} {ip} daddr {mesh} snat {ip} to {own} fully-random"
                ));
            }
            text.rule(format!(
                "{marked} return comment \"kube-proxy masquerades it\""
            ));
            for family in Family::BOTH {
                let ip = family.ip();
                let keep = format!("snat {ip} to {ip} saddr");
                let known = text.set("known", family);
                if let Some(from) = text.set("masquerade_from", family) {
                    if let Some(known) = &known {
                        text.rule(format!("{ip} saddr {from} {ip} daddr {known} {keep}"));
                    }
                    text.rule(format!("{ip} saddr {from} masquerade"));
                }
                if let Some(to) = text.set("masquerade_to", family) {
                    let unknown = known.map(|known| format!("{ip} daddr != {known} "));
                    text.rule(format!(
                        "{ip} daddr {to} {}masquerade",
                        unknown.unwrap_or_default()
                    ));
                }
                if let Some(region) = text.set("region", family).filter(|_| firewall.leader) {
                    text.rule(format!("oifname \"{tunnel}\" {ip} saddr {region} {keep}"));
                }
                let Some(pods) = text.set("local_pods", family) else {
                    continue;
                };
                if firewall.leader {
                    text.rule(format!("oifname \"{tunnel}\" {ip} saddr {pods} {keep}"));
                }
                if let Some(remote) = text.set("remote", family) {
                    // With `--on-tunnel-down=open` packets to a remote node may take the default route,
                    // and need flannel's masquerading there.
                    let devices = if firewall.fail_closed {
                        String::new()
                    } else {
                        let devices = firewall.vxlan.keys().chain([tunnel]);
                        format!(
                            "oifname {} ",
                            one_of(devices.map(|name| format!("\"{name}\"")))
                        )
                    };
                    text.rule(format!(
                        "{devices}{ip} saddr {pods} {ip} daddr {remote} {keep}"
                    ));
                }
            }
        });
    }

    /// Limits the segment size of new connections to what fits into the tunnel, for senders that ICMP does
    /// not reach.
    fn clamp(&mut self) {
        let tunnel = &self.firewall.tunnel;
        self.chain(
            "clamp",
            Some("filter hook forward priority mangle"),
            |text| {
                text.rule(format!("iifname \"{tunnel}\" {CLAMP}"));
                text.rule(format!("oifname \"{tunnel}\" {CLAMP}"));
                for family in Family::BOTH {
                    let ip = family.ip();
                    if let Some(remote) = text.set("remote", family) {
                        text.rule(format!("{ip} saddr {remote} {CLAMP}"));
                        text.rule(format!("{ip} daddr {remote} {CLAMP}"));
                    }
                }
            },
        );
    }

    /// Keeps VXLAN, which is not encrypted, in its region.
    fn underlay(&mut self) {
        if self.vxlan_ports.is_empty() {
            return;
        }
        let ports = one_of(&self.vxlan_ports);
        let end = self.leak();
        let hook = Some("filter hook output priority filter");
        self.chain("underlay", hook, |text| {
            for family in Family::BOTH {
                let elsewhere = match text.set("region_underlay", family) {
                    Some(region) => format!("{} daddr != {region}", family.ip()),
                    None => format!("meta nfproto {}", family.protocol()),
                };
                text.rule(format!("{elsewhere} udp dport {ports} {end}"));
            }
        });
    }

    /// Packets for other regions leave a leader through the tunnel, and any node by a next hop that is a node of
    /// its region. All others are dropped, even if rules or routes are missing. A leader needs the second way for
    /// the addresses of its region's other leaders, and for regions that it reaches only through them. So the
    /// verdicts on its tunnels change no set.
    ///
    /// VXLAN to a node of the region is such a next hop: its gateway is that node's address in the cluster
    /// network. Where `rt` finds no next hop the rule does not match.
    fn leave(&mut self) {
        let firewall = self.firewall;
        let end = self.leak();
        let hook = Some("filter hook postrouting priority filter");
        self.chain("leave", hook, |text| {
            if firewall.leader {
                text.rule(format!(
                    "oifname {{ \"lo\", \"{}\" }} return",
                    firewall.tunnel
                ));
            } else {
                text.rule("oifname \"lo\" return");
            }
            for family in Family::BOTH {
                let ip = family.ip();
                let Some(hops) = text.set("allowed_hops", family) else {
                    continue;
                };
                let astray = format!("rt {ip} nexthop != {hops} {end}");
                text.for_other_regions(family, &astray);
            }
        });
    }

    /// Rules that end so for packets whose destination is in another region.
    fn for_other_regions(&mut self, family: Family, end: &str) {
        let ip = family.ip();
        let sets = ["far", "far_from_pods", "cluster", "near", "wide"];
        let [far, far_from_pods, cluster, near, wide] =
            sets.map(|name| self.set(name, family).unwrap_or_default());
        self.rule(format!("{ip} daddr {far} {end}"));
        self.rule(format!(
            "{ip} saddr {cluster} {ip} daddr {far_from_pods} {end}"
        ));
        self.rule(format!("{ip} daddr {near} return"));
        self.rule(format!("{ip} daddr {wide} {end}"));
    }

    /// What a leader received from a node of its region for another region never goes back to a node of its region. Two
    /// leaders that lost their tunnels, and each believe that the other has not, would send it to and fro.
    fn turn_no_packet_back(&mut self) {
        let firewall = self.firewall;
        if !firewall.leader {
            return;
        }
        let devices = firewall.region_devices.iter();
        let devices = one_of(devices.map(|name| format!("\"{name}\"")));
        let end = format!("counter name \"{LOOP_DROPS}\" drop");
        let hook = Some("filter hook forward priority filter");
        self.chain("turn_back", hook, |text| {
            if firewall.region_devices.is_empty() {
                return;
            }
            text.rule(format!("oifname \"{}\" return", firewall.tunnel));
            text.rule(format!("iifname != {devices} return"));
            for family in Family::BOTH {
                let ip = family.ip();
                let Some(hops) = text.set("allowed_hops", family) else {
                    continue;
                };
                let back = format!("rt {ip} nexthop {hops} {end}");
                text.for_other_regions(family, &back);
            }
        });
    }

    /// Accepts VXLAN from the region's nodes only: the packets in it may have any source.
    fn guard_vxlan(&mut self) {
        if self.vxlan_ports.is_empty() {
            return;
        }
        let ports = one_of(&self.vxlan_ports);
        let end = format!("counter name \"{STRANGER_DROPS}\" drop");
        let hook = Some("filter hook input priority filter");
        self.chain("from_strangers", hook, |text| {
            for family in Family::BOTH {
                let stranger = match text.set("vxlan_from", family) {
                    Some(near) => format!("{} saddr != {near}", family.ip()),
                    None => format!("meta nfproto {}", family.protocol()),
                };
                text.rule(format!("{stranger} udp dport {ports} {end}"));
            }
        });
    }

    /// Into the tunnel go packets from local pods by the device that leads to them, from the region's nodes
    /// by the devices that lead there, and packets that this node translated or that answer a known
    /// connection. Out of it come packets for the region.
    fn guard_doors(&mut self) {
        let firewall = self.firewall;
        if !firewall.leader {
            return;
        }
        let tunnel = &firewall.tunnel;
        let end = format!("counter name \"{STRANGER_DROPS}\" drop");
        let devices = firewall.region_devices.iter();
        let devices = one_of(devices.map(|name| format!("\"{name}\"")));
        let hook = Some("filter hook forward priority filter");
        self.chain("into_tunnel", hook, |text| {
            text.rule(format!("oifname != \"{tunnel}\" return"));
            text.rule(format!("iifname \"{tunnel}\" return"));
            for rule in KNOWN {
                text.rule(rule);
            }
            for family in Family::BOTH {
                let ip = family.ip();
                let sets = ["local_pods", "region", "masquerade_to"];
                let [Some(pods), Some(region), Some(offers)] =
                    sets.map(|name| text.set(name, family))
                else {
                    continue;
                };
                text.rule(format!(
                    "{ip} saddr {pods} fib saddr . iif oif exists return"
                ));
                if !firewall.region_devices.is_empty() {
                    text.rule(format!("iifname {devices} {ip} saddr {region} return"));
                }
                text.rule(format!("{ip} saddr {offers} return"));
            }
            text.rule(&end);
        });
        self.chain("out_of_tunnel", hook, |text| {
            text.rule(format!("iifname != \"{tunnel}\" return"));
            text.rule(format!("oifname \"{tunnel}\" return"));
            for rule in KNOWN {
                text.rule(rule);
            }
            for family in Family::BOTH {
                let ip = family.ip();
                for name in ["local_pods", "region", "masquerade_to"] {
                    if let Some(set) = text.set(name, family) {
                        text.rule(format!("{ip} daddr {set} return"));
                    }
                }
                if let Some(peers) = text.set("masquerade_from", family)
                    && firewall.peer_internet
                {
                    text.rule(format!("{ip} saddr {peers} return"));
                }
            }
            text.rule(&end);
        });
    }

    /// What comes out of the tunnel does not go into it again: each leader has a tunnel to every other region, and two
    /// leaders that see different regions would send a packet to and fro. It does for external peers, which talk to one
    /// leader of each region, for connections that this node translates, and for the tunnel's own datagrams between
    /// leaders that this one relays.
    fn guard_transit(&mut self) {
        let firewall = self.firewall;
        if !firewall.leader {
            return;
        }
        let tunnel = &firewall.tunnel;
        let hook = Some("filter hook forward priority filter");
        self.chain("through_tunnel", hook, |text| {
            text.rule(format!("iifname != \"{tunnel}\" return"));
            text.rule(format!("oifname != \"{tunnel}\" return"));
            for rule in KNOWN {
                text.rule(rule);
            }
            for family in Family::BOTH {
                let ip = family.ip();
                if let Some(peers) = text.set("masquerade_from", family) {
                    text.rule(format!("{ip} saddr {peers} return"));
                    text.rule(format!("{ip} daddr {peers} return"));
                }
                let sets = (text.set("relay_from", family), text.set("relay_to", family));
                if let (Some(from), Some(to)) = sets {
                    text.rule(format!(
                        "{ip} saddr {from} {ip} daddr {to} udp sport {RELAY_PORT} udp dport {RELAY_PORT} return"
                    ));
                }
            }
            text.rule(format!("counter name \"{TRANSIT_DROPS}\" drop"));
        });
    }

    /// Only nodes send echoes. A node's own are not forwarded; a leader forwards those of the region's other nodes
    /// into the tunnel's link.
    fn guard_probes(&mut self) {
        let firewall = self.firewall;
        let devices = firewall.region_devices.iter();
        let devices = one_of(devices.map(|name| format!("\"{name}\"")));
        let end = format!("counter name \"{POD_DROPS}\" drop");
        let hook = Some("filter hook forward priority filter");
        self.chain("to_probes", hook, |text| {
            for family in Family::BOTH {
                let ip = family.ip();
                let sets = (text.set("probes", family), text.set("members", family));
                let (Some(probes), Some(members)) = sets else {
                    continue;
                };
                if firewall.leader && !firewall.region_devices.is_empty() {
                    text.rule(format!(
                        "iifname {devices} oifname \"{}\" {ip} saddr {members} {ip} daddr {probes} return",
                        firewall.tunnel
                    ));
                }
                text.rule(format!("{ip} daddr {probes} {end}"));
            }
        });
    }

    /// Pods must not speak VXLAN to nodes: it would carry packets with any source into the cluster.
    /// Nor do they need the tunnel's port. The same holds for pods of other regions and VPN peers, whose
    /// packets come out of the tunnel; VXLAN between nodes never takes the tunnel.
    fn guard_ports(&mut self) {
        let tunnel = &self.firewall.tunnel;
        let end = format!("counter name \"{POD_DROPS}\" drop");
        let mut ports = self.vxlan_ports.clone();
        ports.insert(self.firewall.port);
        let ports = one_of(ports);
        let vxlan = (!self.vxlan_ports.is_empty()).then(|| one_of(&self.vxlan_ports));
        let hook = Some("filter hook input priority filter");
        self.chain("from_pods", hook, |text| {
            text.rule(format!("iifname \"{POD_BRIDGE}\" udp dport {ports} {end}"));
            if let Some(vxlan) = &vxlan {
                text.rule(format!("iifname \"{tunnel}\" udp dport {vxlan} {end}"));
            }
            for family in Family::BOTH {
                if let Some(pods) = text.set("local_pods", family) {
                    text.rule(format!(
                        "iifname != \"lo\" {} saddr {pods} udp dport {ports} {end}",
                        family.ip()
                    ));
                }
            }
        });
        let Some(ports) = vxlan else {
            return;
        };
        let hook = Some("filter hook forward priority filter");
        self.chain("from_pods_on", hook, |text| {
            for family in Family::BOTH {
                let ip = family.ip();
                let Some(nodes) = text.set("region_underlay", family) else {
                    continue;
                };
                text.rule(format!(
                    "iifname {{ \"{POD_BRIDGE}\", \"{tunnel}\" }} {ip} daddr {nodes} udp dport {ports} {end}"
                ));
                if let Some(pods) = text.set("local_pods", family) {
                    text.rule(format!(
                        "{ip} saddr {pods} {ip} daddr {nodes} udp dport {ports} {end}"
                    ));
                }
            }
        });
    }

    /// The end of a rule for a packet that would leave in clear.
    fn leak(&self) -> String {
        if self.firewall.fail_closed {
            format!("counter name \"{LEAK_DROPS}\" drop")
        } else {
            format!("counter name \"{LEAKS}\"")
        }
    }
}

/// `{ a, b }`
fn one_of<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    format!("{{ {} }}", items.join(", "))
}
