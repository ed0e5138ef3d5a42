//! The values of the nft table.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::site::{Role, Site};
use crate::policy::OnTunnelDown;
use crate::state::{Firewall, Guard, NextHop, Route, RouteKey, Table};

/// The values of this node's nft table.
pub(super) fn firewall(site: &Site<'_>, routes: &BTreeMap<RouteKey, Route>) -> Firewall {
    let settings = site.inputs.settings;
    let flannel = site.inputs.flannel;
    let topology = site.inputs.topology;
    let local_pods = flannel.subnets.iter().copied().collect::<BTreeSet<_>>();

    let remote_nodes = site.remotes().flat_map(|segment| {
        let nodes = segment.nodes.iter();
        let addresses = nodes.flat_map(move |node| {
            let aliases = site.carried_aliases(node);
            site.carried_addresses(segment, node).chain(aliases)
        });
        let leaders = segment.leaders.iter();
        let addresses =
            addresses.chain(leaders.flat_map(|leader| site.carried_wireguard_ips(leader)));
        addresses
            .map(IpNet::from)
            .chain(site.carried_location_ips(segment))
    });
    let remote_nodes = remote_nodes.collect::<BTreeSet<_>>();
    let direct =
        |net: &IpNet| net.prefix_len() == net.max_prefix_len() && site.is_direct(net.addr());
    let is_alias = |net: &IpNet| topology.alias_pools.iter().any(|pool| pool.contains(net));
    let mesh_nodes = remote_nodes.iter();
    let mesh_nodes = mesh_nodes.filter(|net| is_alias(net) || !direct(net));
    let remote_pods = site
        .remotes()
        .flat_map(|segment| &segment.nodes)
        .flat_map(|node| &node.pod_cidrs)
        .chain(site.remote_outsiders().flat_map(|node| &node.pod_cidrs));
    let region_pods = site
        .other_members()
        .flat_map(|node| &node.pod_cidrs)
        .chain(site.outside_neighbours().flat_map(|node| &node.pod_cidrs));
    let peers = topology.peers.iter().flat_map(|peer| &peer.allowed_ips);
    let masquerade_sources = peers.copied().collect::<BTreeSet<_>>();
    // On every node of the region, as in Kilo: these networks may be behind a node that does not lead, and hosts
    // there may have a route to that node alone.
    let masquerade_destinations = site
        .segment
        .into_iter()
        .flat_map(|segment| segment.allowed_location_ips.iter().copied())
        .collect::<BTreeSet<_>>();
    // As in Kilo: traffic between destinations of the mesh is not masqueraded. Where there is no masquerading at
    // all, the set is not needed.
    let known = if masquerade_sources.is_empty() && masquerade_destinations.is_empty() {
        BTreeSet::new()
    } else {
        let segments = topology.segments.iter();
        segments
            .flat_map(|segment| segment.node_allowed_ips())
            .chain(masquerade_sources.iter().copied())
            .chain(settings.service_cidrs.iter().copied())
            // Behind the tunnel packets for an alias have the node's own address.
            .chain(site.region_aliases().map(|(_, ip)| IpNet::from(ip)))
            .collect()
    };

    Firewall {
        tunnel: settings.interface.clone(),
        port: site.listen_port().get(),
        vxlan: flannel
            .vteps
            .iter()
            .map(|vtep| (vtep.name.clone(), vtep.port))
            .collect(),
        region_underlay: site.region_underlay.clone(),
        remote_pods: remote_pods.copied().collect(),
        mesh_nodes: mesh_nodes.copied().collect(),
        remote_nodes,
        region_pods: region_pods
            .copied()
            .filter(|net| !local_pods.contains(net))
            .collect(),
        region_nodes: site
            .other_members()
            .flat_map(|node| node.served_addresses())
            .map(IpNet::from)
            .collect(),
        alias_pools: topology
            .alias_pools
            .iter()
            .copied()
            .filter(|pool| site.has_family(pool.addr().is_ipv6()))
            .collect(),
        region_aliases: site.region_aliases().collect(),
        probes: site
            .segment
            .into_iter()
            .flat_map(|segment| &segment.leaders)
            .filter_map(|leader| site.carried_probe_ip(leader))
            .collect(),
        local_pods,
        leader: matches!(site.role, Role::Leader(_)),
        fail_closed: settings.on_tunnel_down == OnTunnelDown::Closed,
        masquerade_sources,
        masquerade_destinations,
        known,
        guard: guard(site, routes),
        vxlan_sources: vxlan_sources(site),
        region_devices: region_hops(site).map(|hop| hop.dev).collect(),
        peer_internet: settings.peer_internet,
        relay: site.relay_door(),
    }
}

/// The next hops to the other nodes of the region.
fn region_hops<'s>(site: &'s Site<'_>) -> impl Iterator<Item = NextHop> + 's {
    let members = site.other_members();
    let families = |node| [false, true].map(|v6| (node, v6));
    members
        .flat_map(families)
        .filter_map(|(node, v6)| site.hop_to(node, v6))
}

/// The sources from which VXLAN is accepted. flannel sends from the address of its device's underlay. A node
/// with several addresses need not announce that one, but it is in a network of the region. Where the region
/// has no other node, no VXLAN packet is flannel's.
fn vxlan_sources(site: &Site<'_>) -> BTreeSet<IpNet> {
    let others = site.other_members().next().is_some();
    let me = site.inputs.me;
    let mut outside = site.outside_neighbours();
    if !others && !outside.any(|node| node.name != *me) {
        return BTreeSet::new();
    }
    let addresses = site.region_underlay.iter().copied().map(IpNet::from);
    addresses
        .chain(site.region_networks.iter().copied())
        .collect()
}

/// The guard derived from the routes: the prefixes that they send through the mesh or refuse, and those that they
/// leave to table main.
///
/// A set of prefixes has no longest match. So a prefix that contains a local one is looked up after that, and all
/// others before it. The pods of other regions are inside the cluster network.
fn guard(site: &Site<'_>, routes: &BTreeMap<RouteKey, Route>) -> Guard {
    let networks = &site.inputs.flannel.networks;
    let mut guard = Guard {
        hops: region_hops(site).filter_map(|hop| hop.via).collect(),
        cluster: networks.iter().copied().collect(),
        ..Guard::default()
    };
    for (key, route) in routes {
        if key.table == Table::Mesh && *route == Route::Throw {
            guard.near.insert(key.dst);
        }
    }
    for (key, route) in routes {
        let dst = key.dst;
        match (key.table, route) {
            (Table::Members, _) | (_, Route::Throw) => {}
            (Table::Pods, _) => {
                guard.far_from_pods.insert(dst);
            }
            (Table::Mesh, Route::Unicast { .. } | Route::Unreachable | Route::Blackhole) => {
                let inside = |net: &IpNet| net.contains(&dst) && *net != dst;
                if guard
                    .near
                    .range(dst..)
                    .next()
                    .is_some_and(|near| dst.contains(near))
                {
                    guard.wide.insert(dst);
                } else if !networks.iter().any(inside) {
                    guard.far.insert(dst);
                }
            }
        }
    }
    guard
}
