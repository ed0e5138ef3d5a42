//! The tunnel's link, its addresses and its peers.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;

use ipnet::IpNet;

use super::relay::is_relayed;
use super::site::{Role, Site};
use crate::flannel::Backend;
use crate::state::{Link, Scope};
use crate::topology::{ExternalPeer, Leader, Segment};
use crate::wireguard::key::PublicKey;
use crate::wireguard::{PeerConfig, PeerId};

/// Seconds between keepalives: less than the 30 seconds after which common NATs forget a UDP mapping.
const KEEPALIVE: Option<NonZeroU16> = NonZeroU16::new(25);

/// The tunnel's link, which is on every node and up where it has addresses.
///
/// With host-gw no device of flannel has this node's address inside the cluster network, so a follower needs the
/// link for that address.
pub(super) fn link(site: &Site<'_>) -> Link {
    let settings = site.inputs.settings;
    Link {
        name: settings.interface.clone(),
        mtu: site.link_mtu(),
        up: holds_addresses(site),
    }
}

fn holds_addresses(site: &Site<'_>) -> bool {
    match site.role {
        Role::Leader(_) => true,
        Role::Follower => site.inputs.flannel.backend == Backend::HostGw,
        Role::Outsider => false,
    }
}

/// The addresses of the tunnel's link.
pub(super) fn addresses(site: &Site<'_>) -> BTreeMap<IpNet, Scope> {
    if !holds_addresses(site) {
        return BTreeMap::new();
    }
    let sources = [false, true].into_iter().filter_map(|v6| site.source(v6));
    let wireguard = site
        .own_lead()
        .into_iter()
        .flat_map(|own| &own.wireguard_ips);
    let wireguard = wireguard.filter(|ip| site.has_family(ip.is_ipv6()));
    let link = wireguard.map(|ip| (IpNet::from(*ip), Scope::of_wireguard_ip(*ip)));
    sources
        .map(|ip| (IpNet::from(ip), Scope::Global))
        .chain(link)
        .collect()
}

/// The sysctls of the tunnel's link, below `/proc/sys`.
pub(super) fn sysctls(site: &Site<'_>) -> BTreeMap<String, String> {
    let name = &site.inputs.settings.interface;
    let mut sysctls = BTreeMap::new();
    // Loose, also where `all` is strict: the tunnel has checked the source of a packet against its sender's allowed
    // IPs, and the route back may lead through another leader of this region.
    sysctls.insert(format!("net/ipv4/conf/{name}/rp_filter"), "2".to_owned());
    let mut subnets = site.inputs.flannel.subnets.iter();
    if subnets.any(|subnet| subnet.addr().is_ipv6()) {
        // A tunnel needs no link-local address.
        sysctls.insert(
            format!("net/ipv6/conf/{name}/addr_gen_mode"),
            "1".to_owned(),
        );
    }
    sysctls
}

/// The peers of a leader: the leaders of other regions and the external peers.
pub(super) fn peers(site: &Site<'_>) -> BTreeMap<PeerId, PeerConfig> {
    let Some(own) = site.own_lead() else {
        return BTreeMap::new();
    };
    // Native topologies are disjoint already. In Kilo's, the first of two equal claims counts.
    let mut taken = BTreeSet::new();
    // Of two peers with one key the last counts.
    let mut peers = BTreeMap::new();
    for segment in site.remotes() {
        let accepts = segment
            .allowed_ips()
            .filter(|net| !is_local(site, segment, net) && taken.insert(*net))
            .collect::<BTreeSet<_>>();
        let used = site.leaders_of(segment);
        let direct = site.direct_leaders_of(segment);
        for leader in &segment.leaders {
            let key = leader.public_key();
            // Several leaders share what is not their own, and packets may come back through any of them.
            let routes = match &segment.leaders[..] {
                [_] => accepts.clone(),
                _ => {
                    let routes = segment.routes_to(leader, &used, &direct);
                    routes.filter(|net| accepts.contains(net)).collect()
                }
            };
            let peer = PeerConfig {
                // Only the device moves an endpoint to a relay, and it keeps that one.
                endpoint: site
                    .endpoint_of(leader)
                    .filter(|endpoint| !is_relayed(leader, *endpoint)),
                relays_to: site.relays_to(leader),
                relayed_from: site.relayed_from(segment, leader),
                persistent_keepalive: keepalive(site, own, &leader.keys, None),
                routes,
                accepts: accepts.clone(),
                mtu: site.peer_mtu(leader),
                also_keys: leader.keys.iter().skip(1).copied().collect(),
                ..PeerConfig::new(key)
            };
            peers.insert(key, (leader.peer_id(), peer));
        }
    }
    for vpn in &site.inputs.topology.peers {
        let nets = site.carried_allowed_ips(vpn);
        let allowed_ips = nets.filter(|net| taken.insert(*net)).collect();
        let peer = PeerConfig {
            endpoint: site.endpoint_of_peer(vpn),
            preshared_key: vpn.preshared_key.clone(),
            persistent_keepalive: keepalive(site, own, &[vpn.public_key], Some(vpn)),
            mtu: site.external_mtu(),
            ..PeerConfig::new(vpn.public_key).with_allowed_ips(allowed_ips)
        };
        peers.insert(vpn.public_key, (vpn.peer_id(), peer));
    }
    peers.into_values().collect()
}

/// The interval of the keepalives that a leader sends to a peer: the one that its operator or the Peer object
/// sets, else a default for every peer that has not yet opened a session without keepalives.
///
/// This node's addresses do not show whether a NAT or a firewall is in front of it: a router may translate a
/// public address, and filter IPv6.
fn keepalive(
    site: &Site<'_>,
    own: &Leader,
    keys: &[PublicKey],
    vpn: Option<&ExternalPeer>,
) -> Option<NonZeroU16> {
    if own.keepalive_forced {
        return NonZeroU16::new(own.persistent_keepalive);
    }
    let of_peer = vpn.and_then(|vpn| NonZeroU16::new(vpn.persistent_keepalive));
    let peer_addresses = &site.inputs.topology.peer_addresses;
    let peer_addresses = keys.iter().find_map(|key| peer_addresses.get(key));
    // A VPN peer without a known address must open the session.
    let has_address = vpn.is_none() || peer_addresses.is_some_and(|at| !at.candidates.is_empty());
    let is_caller = keys.iter().any(|key| site.inputs.callers.contains(key));
    of_peer.or_else(|| KEEPALIVE.filter(|_| has_address && !is_caller))
}

/// Whether a prefix of another region is local to this node: an address that the own region uses too, or inside
/// a network that this node is connected to.
fn is_local(site: &Site<'_>, segment: &Segment, net: &IpNet) -> bool {
    if net.prefix_len() < net.max_prefix_len() {
        return site.connected_to(net).is_some();
    }
    let ip = net.addr();
    site.region_underlay.contains(&ip) || site.connected_for(segment, ip).is_some()
}
