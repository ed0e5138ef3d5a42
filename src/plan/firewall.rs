//! The values of the nft table.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::Firewall;
use super::site::{Role, Site};
use crate::config::OnTunnelDown;

/// What the nft table of this node must know.
pub(super) fn firewall(site: &Site<'_>) -> Firewall {
    let settings = site.inputs.settings;
    let flannel = site.inputs.flannel;
    let topology = site.inputs.topology;
    let local_pods = flannel.subnets.iter().copied().collect::<BTreeSet<_>>();

    let remote_nodes = site.remotes().flat_map(|segment| {
        let nodes = segment.nodes.iter();
        let addresses = nodes.flat_map(move |node| site.carried_addresses(segment, node));
        let addresses = addresses.chain(site.carried_wireguard_ips(segment));
        addresses
            .map(IpNet::from)
            .chain(site.carried_offers(segment))
    });
    let remote_nodes = remote_nodes.collect::<BTreeSet<_>>();
    let direct =
        |net: &IpNet| net.prefix_len() == net.max_prefix_len() && site.is_direct(net.addr());
    let mesh_nodes = remote_nodes.iter().filter(|net| !direct(net));
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
    // On every node of the region, as Kilo has it: what is offered may be behind one that does not lead,
    // and hosts there know that node at best.
    let masquerade_destinations = site
        .segment
        .into_iter()
        .flat_map(|segment| segment.allowed_location_ips.iter().copied())
        .collect::<BTreeSet<_>>();
    // As Kilo has it: between what the mesh knows nothing is masqueraded. Nobody asks where nothing is
    // masqueraded at all.
    let known = if masquerade_sources.is_empty() && masquerade_destinations.is_empty() {
        BTreeSet::new()
    } else {
        let segments = topology.segments.iter();
        segments
            .flat_map(|segment| segment.node_allowed_ips())
            .chain(masquerade_sources.iter().copied())
            .chain(settings.service_cidrs.iter().copied())
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
            .flat_map(|node| node.addresses.iter().copied())
            .map(IpNet::from)
            .collect(),
        local_pods,
        leader: matches!(site.role, Role::Leader),
        fail_closed: settings.on_tunnel_down == OnTunnelDown::Closed,
        masquerade_sources,
        masquerade_destinations,
        known,
    }
}
