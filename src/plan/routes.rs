//! Routes and rules.
//!
//! Three look-ups, from the first priority on, which [`super::place`] chooses:
//!
//! 0. Packets from the tunnel: `Members`. A leader sends packets for a member's node address through flannel's
//!    device, like those for its pods. On the underlay, clouds drop packets with a pod's source. The kernel's
//!    strict reverse-path check of packets that a leader forwards into the tunnel also looks here (it looks up
//!    the route back with the outgoing device as the incoming one), so the answers of a member's host through
//!    flannel's device are accepted.
//! 1. Packets with a source in the cluster network: `Pods`, the addresses that the host itself reaches directly.
//!    They are selected by source and not by the pods' bridge, because on followers and leaders alike the
//!    reverse-path check of the answer looks up a route from the pod.
//! 2. All packets but the tunnel's own datagrams: `Mesh`. It holds the destinations of other regions, never a
//!    default route, and it ends with the cluster network, `unreachable`: packets for a pod that no node has are
//!    refused.
//!
//! The tunnel's own datagrams carry a mark, which the last rule leaves out. The first two rules select none of
//! them: they neither arrive from the tunnel nor have a source in the cluster network. So the host's other rules
//! and its table main route them, like those of any socket. Nothing else is selected by mark: a reverse-path
//! check carries none.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::site::{Role, Site};
use super::{Place, place};
use crate::policy::OnTunnelDown;
use crate::state::{BACKSTOP_METRIC, NextHop, Route, RouteKey, Rule, Table};
use crate::topology::Segment;

/// The metric of IPv6 routes that are not backstops. Zero is not possible, and 1024 is flannel's.
const METRIC_V6: u32 = 512;

/// The routes of this node.
pub(super) fn routes(site: &Site<'_>) -> BTreeMap<RouteKey, Route> {
    let mut routes = Routes {
        site,
        wide: BTreeMap::new(),
        routes: BTreeMap::new(),
    };
    routes.add_remote_segments();
    routes.add_remote_outsiders();
    routes.add_peers();
    routes.add_neighbours();
    routes.add_probes();
    routes.add_followers();
    routes.end_cluster_networks();
    routes.end_alias_pools();
    routes.except_local_destinations();
    routes.routes
}

/// The priorities of the rules that lead to these routes.
pub(super) fn rules_place(site: &Site<'_>, routes: &BTreeMap<RouteKey, Route>) -> Place {
    let destinations = || {
        let leads = |key: &&RouteKey| key.table != Table::Members;
        routes.keys().filter(leads).map(|key| &key.dst)
    };
    let preferred = site.inputs.settings.rule_priority;
    place(preferred, site.inputs.other_rules, destinations)
}

/// The rules of this node.
pub(super) fn rules(site: &Site<'_>, routes: &BTreeMap<RouteKey, Route>) -> BTreeSet<Rule> {
    let settings = site.inputs.settings;
    let tables = routes.keys().map(|key| (key.table, is_v6(&key.dst)));
    let tables = tables.collect::<BTreeSet<_>>();
    let first = rules_place(site, routes).first;
    let mut rules = BTreeSet::new();
    for v6 in [false, true] {
        if !site.has_family(v6) {
            continue;
        }
        let rule = |offset, table: Table| Rule {
            priority: first + offset,
            v6,
            from: None,
            iif: None,
            fwmark: None,
            not: false,
            table: table.id(),
        };
        if tables.contains(&(Table::Members, v6)) {
            rules.insert(Rule {
                iif: Some(settings.interface.clone()),
                ..rule(0, Table::Members)
            });
        }
        let networks = site.inputs.flannel.networks.iter();
        for network in networks.filter(|network| is_v6(network) == v6) {
            rules.insert(Rule {
                from: Some(*network),
                ..rule(1, Table::Pods)
            });
        }
        rules.insert(Rule {
            fwmark: Some(settings.fwmark),
            not: true,
            ..rule(2, Table::Mesh)
        });
    }
    rules
}

/// The next hops of a route, and its MTU.
#[derive(Clone, Debug)]
struct Way {
    hops: BTreeSet<NextHop>,
    mtu: Option<u32>,
}

struct Routes<'a> {
    site: &'a Site<'a>,
    /// Prefixes in `Mesh` that may contain local destinations, with their ways.
    wide: BTreeMap<IpNet, Way>,
    routes: BTreeMap<RouteKey, Route>,
}

impl Routes<'_> {
    fn add_remote_segments(&mut self) {
        for v6 in [false, true] {
            if !self.site.has_family(v6) {
                continue;
            }
            for segment in self.site.remotes() {
                let way = self.way_to(segment, self.site.next_hops(segment, v6), v6);
                let of_family = |net: &IpNet| is_v6(net) == v6;
                for node in &segment.nodes {
                    for net in node.pod_cidrs.iter().filter(|net| of_family(net)) {
                        self.add(Table::Mesh, *net, &way);
                    }
                    let addresses = self.site.carried_addresses(segment, node);
                    for ip in addresses.filter(|ip| ip.is_ipv6() == v6) {
                        self.add_node_address(ip, &way);
                    }
                    let aliases = self.site.carried_aliases(node);
                    for ip in aliases.filter(|ip| ip.is_ipv6() == v6) {
                        self.add(Table::Mesh, IpNet::from(ip), &way);
                    }
                }
                for leader in &segment.leaders {
                    let ips = self.site.carried_wireguard_ips(leader);
                    for ip in ips.filter(|ip| ip.is_ipv6() == v6) {
                        let hops = self.site.hops_without_gateway(segment, v6);
                        let way = self.way_to(segment, hops, v6);
                        self.add(Table::Mesh, IpNet::from(ip), &way);
                    }
                }
                for net in self.site.carried_location_ips(segment).filter(of_family) {
                    self.add_wide(net, way.clone());
                }
            }
        }
    }

    fn way_to(&self, segment: &Segment, hops: BTreeSet<NextHop>, v6: bool) -> Way {
        let mtu = self.site.mtu_to(segment, &hops, v6);
        Way { hops, mtu }
    }

    /// These next hops, with the configured MTU.
    fn way_by(&self, hops: BTreeSet<NextHop>) -> Way {
        let mtu = Some(self.site.inputs.settings.mtu);
        Way { hops, mtu }
    }

    /// Where this host itself reaches an address directly, only packets from pods use the tunnel.
    fn add_node_address(&mut self, ip: IpAddr, way: &Way) {
        let table = if self.site.is_direct(ip) {
            Table::Pods
        } else {
            Table::Mesh
        };
        self.add(table, ip.into(), way);
    }

    /// No leader carries traffic to their pods, and flannel must not send it in clear.
    fn add_remote_outsiders(&mut self) {
        for node in self.site.remote_outsiders() {
            for net in &node.pod_cidrs {
                if self.site.has_family(is_v6(net)) {
                    self.refuse(Table::Mesh, *net);
                }
            }
        }
    }

    fn add_peers(&mut self) {
        for peer in &self.site.inputs.topology.peers {
            for net in self.site.carried_allowed_ips(peer) {
                let v6 = is_v6(&net);
                if self.site.has_family(v6) {
                    let way = self.way_by(self.site.peer_hops(v6));
                    self.add_wide(net, way);
                }
            }
        }
    }

    /// Refuses the rest of the cluster network: the pods of a deleted Node, an address that no node has. By table
    /// main such packets would leave in clear. The region's pods are left to flannel.
    fn end_cluster_networks(&mut self) {
        if self.site.inputs.settings.on_tunnel_down != OnTunnelDown::Closed {
            return;
        }
        for network in &self.site.inputs.flannel.networks {
            if self.site.has_family(is_v6(network)) {
                self.refuse(Table::Mesh, *network);
            }
        }
        for net in self.site.region_pods() {
            if self.site.has_family(is_v6(&net)) {
                self.throw(net);
            }
        }
    }

    /// Refuses aliases that no node has. The nft table of this node translates those of its own region, so that this
    /// look-up must not refuse them.
    fn end_alias_pools(&mut self) {
        if self.site.inputs.settings.on_tunnel_down != OnTunnelDown::Closed {
            return;
        }
        for pool in &self.site.inputs.topology.alias_pools {
            if !self.site.has_family(is_v6(pool)) || self.site.connected_to(pool).is_some() {
                continue;
            }
            self.refuse(Table::Mesh, *pool);
            let connected = self.site.inputs.connected.iter();
            for net in connected.filter(|net| pool.contains(*net)) {
                self.throw(*net);
            }
        }
        for (alias, _) in self.site.region_aliases() {
            self.throw(IpNet::from(alias));
        }
    }

    /// The WireGuard addresses of the own region, by flannel's next hop to their nodes.
    fn add_neighbours(&mut self) {
        if matches!(self.site.role, Role::Outsider) {
            return;
        }
        for segment in self.site.neighbours() {
            let others = segment.leaders.iter();
            for leader in others.filter(|leader| leader.node != *self.site.inputs.me) {
                let Some(node) = segment.member(&leader.node) else {
                    continue;
                };
                let ips = self.site.carried_wireguard_ips(leader);
                for ip in ips.filter(|ip| self.site.has_family(ip.is_ipv6())) {
                    let hop = self.site.hop_to(node, ip.is_ipv6());
                    let way = self.way_by(hop.into_iter().collect());
                    self.add(Table::Mesh, IpNet::from(ip), &way);
                }
            }
        }
    }

    /// The probe addresses of the own segment's leaders: on a leader its own leads into the tunnel's link, so that its
    /// kernel must forward an echo as any packet for another region; by flannel's next hop the others.
    fn add_probes(&mut self) {
        let leaders = self
            .site
            .segment
            .map_or(&[][..], |segment| &segment.leaders);
        for leader in leaders {
            let Some(ip) = self.site.carried_probe_ip(leader) else {
                continue;
            };
            let hops = if leader.node == *self.site.inputs.me {
                [self.site.tunnel()].into()
            } else {
                self.site.hops_to([leader], ip.is_ipv6())
            };
            let dst = IpNet::from(ip);
            let way = self.way_by(hops);
            self.add(Table::Mesh, dst, &way);
            // A leader that boots has no route to the sender yet, and an ICMP error would leave by the default route.
            let backstop = RouteKey {
                table: Table::Mesh,
                dst,
                metric: BACKSTOP_METRIC,
            };
            if let Some(route) = self.routes.get_mut(&backstop) {
                *route = Route::Blackhole;
            }
        }
    }

    /// Routes for packets from the tunnel to the hosts of a leader's members. Where flannel sends directly, table
    /// main has the same next hop.
    fn add_followers(&mut self) {
        for node in self.site.followers() {
            for ip in node.served_addresses() {
                let v6 = ip.is_ipv6();
                let hop = self.site.hop_to(node, v6);
                let Some(hop) = hop.filter(|hop| self.site.is_encapsulated(hop)) else {
                    continue;
                };
                let route = Route::Unicast {
                    next_hops: [hop].into(),
                    src: None,
                    mtu: None,
                };
                self.routes.insert(
                    RouteKey {
                        table: Table::Members,
                        dst: IpNet::from(ip),
                        metric: metric(v6),
                    },
                    route,
                );
            }
        }
    }

    /// Leaves local destinations inside a wide prefix of another region to table main: this host's own pods, the
    /// networks of its region and those it is connected to, and the addresses that it must reach directly.
    fn except_local_destinations(&mut self) {
        for net in &self.site.inputs.flannel.subnets {
            self.throw(*net);
        }
        if self.wide.is_empty() {
            return;
        }
        let wide = std::mem::take(&mut self.wide);
        for network in self
            .site
            .region_networks
            .iter()
            .chain(self.site.inputs.connected)
        {
            // Of two nodes that claim one address, another region's may hold it.
            let is_held = network.prefix_len() == network.max_prefix_len()
                && !wide.contains_key(network)
                && self.is_routed(Table::Mesh, network.addr());
            if !is_held && wide.keys().any(|net| net.contains(network)) {
                self.throw(*network);
            }
        }
        // The observed endpoints of peers, except node addresses, which have routes of their own.
        let observed = self.site.inputs.observed.values().map(SocketAddr::ip);
        let observed = observed.filter(|ip| !self.is_routed(Table::Mesh, *ip));
        let region = self.site.region_underlay.iter().copied();
        let direct = self.site.direct.iter().copied();
        let all = direct
            .chain(region)
            .chain(observed)
            .collect::<BTreeSet<_>>();
        for ip in all {
            let dst = IpNet::from(ip);
            // The longest prefix comes last.
            let Some((_, way)) = wide.iter().rev().find(|(net, _)| net.contains(&dst)) else {
                continue;
            };
            self.throw(dst);
            if !self.is_routed(Table::Pods, ip) && !self.site.region_underlay.contains(&ip) {
                self.add(Table::Pods, dst, way);
            }
        }
    }

    fn is_routed(&self, table: Table, ip: IpAddr) -> bool {
        let (dst, metric) = (IpNet::from(ip), metric(ip.is_ipv6()));
        self.routes.contains_key(&RouteKey { table, dst, metric })
    }

    /// Adds a prefix that is not a node's own, so that it may contain local destinations.
    fn add_wide(&mut self, net: IpNet, way: Way) {
        self.add(Table::Mesh, net, &way);
        self.wide.insert(net, way);
    }

    /// Adds the route to a prefix, and its backstop: if the route is lost, packets for another region never fall
    /// through to flannel's route in table main.
    fn add(&mut self, table: Table, dst: IpNet, way: &Way) {
        let v6 = is_v6(&dst);
        if !way.hops.is_empty() {
            let route = Route::Unicast {
                next_hops: way.hops.clone(),
                src: self.site.source(v6),
                mtu: way.mtu,
            };
            let metric = metric(v6);
            self.routes.insert(RouteKey { table, dst, metric }, route);
        }
        self.refuse(table, dst);
    }

    /// Adds the backstop alone, which refuses packets for which no other route is left.
    fn refuse(&mut self, table: Table, dst: IpNet) {
        if self.site.inputs.settings.on_tunnel_down == OnTunnelDown::Closed {
            let metric = BACKSTOP_METRIC;
            let key = RouteKey { table, dst, metric };
            self.routes.insert(key, Route::Unreachable);
        }
    }

    /// Leaves a prefix to the next rules, and so to table main.
    fn throw(&mut self, dst: IpNet) {
        let table = Table::Mesh;
        let backstop = RouteKey {
            table,
            dst,
            metric: BACKSTOP_METRIC,
        };
        self.routes.remove(&backstop);
        let metric = metric(is_v6(&dst));
        self.routes
            .insert(RouteKey { table, dst, metric }, Route::Throw);
    }
}

fn metric(v6: bool) -> u32 {
    if v6 { METRIC_V6 } else { 0 }
}

fn is_v6(net: &IpNet) -> bool {
    net.addr().is_ipv6()
}
