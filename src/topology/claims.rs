//! What is believed of what nodes and peers say about themselves.
//!
//! Two may claim the same key, prefix or address, by mistake or on purpose. The older object keeps
//! it, so that whoever joins a cluster can disturb nobody who is there. Between kinds of claims the
//! better founded one wins: pod CIDRs (given by the control plane), then node addresses (from the
//! Node's status), then external peers, then `allowed-location-ips`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::address::{PrefixMap, is_unicast, overlap};
use super::excluded::{Excluded, Field, Overlap, Reason, Subject};
use super::{Endpoint, ExternalPeer, Node, NodeName, SegmentName, Settings, Snapshot};
use crate::wireguard::key::PublicKey;

/// No prefix shorter than this is carried for a peer or a location: IPv4, IPv6.
const WIDEST: [u8; 2] = [8, 16];

/// What is believed of one node.
#[derive(Clone, Debug, Default)]
pub(super) struct Belief {
    /// Whether its key is its own.
    pub(super) key: bool,
    pub(super) pod_cidrs: Vec<IpNet>,
    pub(super) addresses: Vec<IpAddr>,
    pub(super) allowed_location_ips: Vec<IpNet>,
}

impl Belief {
    /// Whether the node takes part in the mesh.
    pub(super) fn is_meshed(&self) -> bool {
        self.key && !self.pod_cidrs.is_empty()
    }
}

/// All beliefs, and what is not believed.
pub(super) struct Claims<'a> {
    snapshot: &'a Snapshot,
    /// Networks that nobody may claim: pods (as a whole), services, WireGuard addresses.
    reserved: Vec<IpNet>,
    cluster_networks: &'a [IpNet],
    internal_cidrs: &'a [IpNet],
    /// All nodes, the oldest first.
    by_age: Vec<&'a Node>,
    pub(super) nodes: BTreeMap<&'a NodeName, Belief>,
    pub(super) peers: Vec<ExternalPeer>,
    pub(super) excluded: Vec<Excluded>,
    pub(super) overlaps: Vec<Overlap>,
    pods: PrefixMap<&'a NodeName>,
}

impl<'a> Claims<'a> {
    /// Judges everything the snapshot says, except what depends on who leads.
    ///
    /// `group` tells who shares a region, as far as that is known before anything is believed.
    pub(super) fn new(
        snapshot: &'a Snapshot,
        settings: &'a Settings,
        segment: impl Fn(&Node) -> SegmentName,
    ) -> Self {
        let mut by_age = snapshot.nodes.values().collect::<Vec<_>>();
        by_age.sort_by_key(|node| (node.created, &node.name));
        let reserved = settings
            .cluster_networks
            .iter()
            .chain(&settings.service_cidrs)
            .chain(&settings.subnets);

        let mut claims = Self {
            snapshot,
            reserved: reserved.copied().collect(),
            cluster_networks: &settings.cluster_networks,
            internal_cidrs: &settings.internal_cidrs,
            by_age,
            nodes: snapshot
                .nodes
                .keys()
                .map(|name| (name, Belief::default()))
                .collect(),
            peers: Vec::new(),
            excluded: Vec::new(),
            overlaps: Vec::new(),
            pods: PrefixMap::default(),
        };
        claims.judge_keys();
        claims.judge_pod_cidrs();
        claims.judge_addresses();
        claims.judge_peers();
        claims.judge_allowed_location_ips(segment);
        claims
    }

    /// All nodes, the oldest first.
    pub(super) fn by_age(&self) -> impl Iterator<Item = &'a Node> + use<'a> {
        self.by_age.clone().into_iter()
    }

    /// An endpoint that is a host's own: not one of the cluster's inner addresses, through which no
    /// tunnel can reach anything.
    pub(super) fn endpoint_address(
        &mut self,
        subject: &Subject,
        endpoint: &Endpoint,
    ) -> Option<SocketAddr> {
        let address = endpoint.resolve(&self.snapshot.resolved)?;
        let ip = address.ip();
        let reason = if is_unicast(ip) {
            let net = IpNet::from(ip);
            self.reserved_for(&net).map(Reason::Reserved)
        } else {
            Some(Reason::NotUnicast)
        };
        match reason {
            Some(reason) => {
                self.exclude(subject.clone(), Field::Endpoint(ip), reason);
                None
            }
            None => Some(address),
        }
    }

    pub(super) fn exclude(&mut self, subject: Subject, field: Field, reason: Reason) {
        self.excluded.push(Excluded {
            subject,
            field,
            reason,
        });
    }

    fn judge_keys(&mut self) {
        let nodes = self.snapshot.nodes.values().filter_map(|node| {
            let key = node.public_key?;
            Some((node.created, Subject::Node(node.name.clone()), key))
        });
        let peers = self.snapshot.peers.values().map(|peer| {
            let subject = Subject::Peer(peer.name.clone());
            (peer.created, subject, peer.public_key)
        });
        let mut claimants = nodes.chain(peers).collect::<Vec<_>>();
        claimants.sort();

        let mut holders = BTreeMap::<PublicKey, Subject>::new();
        for (_, subject, key) in claimants {
            if let Some(holder) = holders.get(&key) {
                let reason = Reason::TakenBy(holder.clone());
                self.exclude(subject, Field::Key, reason);
                continue;
            }
            match &subject {
                Subject::Node(name) => {
                    if let Some(belief) = self.nodes.get_mut(name) {
                        belief.key = true;
                    }
                }
                Subject::Peer(name) => {
                    let peer = self.snapshot.peers.get(name);
                    self.peers.extend(peer.cloned().map(|peer| ExternalPeer {
                        allowed_ips: Vec::new(),
                        ..peer
                    }));
                }
            }
            holders.insert(key, subject);
        }
        self.peers.sort_by(|a, b| a.name.cmp(&b.name));
    }

    fn judge_pod_cidrs(&mut self) {
        for node in self.by_age() {
            for &net in &node.pod_cidrs {
                match self.pod_cidr_fault(&net) {
                    Some(reason) => self.exclude_of(node, Field::PodCidr(net), reason),
                    None => {
                        self.pods.insert(net, &node.name);
                        self.belief(node).pod_cidrs.push(net);
                    }
                }
            }
            let belief = self.belief(node);
            if belief.key && belief.pod_cidrs.is_empty() {
                self.exclude_of(node, Field::Whole, Reason::NoPodCidr);
            }
        }
    }

    fn pod_cidr_fault(&self, net: &IpNet) -> Option<Reason> {
        if is_too_wide(net) {
            return Some(Reason::TooWide);
        }
        let networks = self.cluster_networks;
        if !networks.is_empty() && !networks.iter().any(|network| network.contains(net)) {
            return Some(Reason::OutsideClusterNetwork);
        }
        let others = self.reserved.get(networks.len()..).unwrap_or_default();
        if let Some(reserved) = others.iter().find(|reserved| overlap(reserved, net)) {
            return Some(Reason::Reserved(*reserved));
        }
        let (_, holder) = self.pods.overlapping(net)?;
        Some(Reason::TakenBy(Subject::Node((*holder).clone())))
    }

    fn judge_addresses(&mut self) {
        let mut holders = BTreeMap::<IpAddr, &NodeName>::new();
        for node in self.by_age() {
            if !self.belief(node).is_meshed() {
                continue;
            }
            let private = node.private_ip.map(|private| private.addr());
            let status = node.internal_ips.iter().copied();
            let mut addresses = private
                .into_iter()
                .chain(status)
                .filter(|ip| {
                    // Who has no pods of a family has no part in it.
                    let pods = &self.nodes[&node.name].pod_cidrs;
                    pods.iter().any(|net| net.addr().is_ipv6() == ip.is_ipv6())
                })
                .collect::<Vec<_>>();
            dedup(&mut addresses);

            for ip in addresses {
                if let Some(reason) = self.address_fault(node, ip) {
                    self.exclude_of(node, Field::NodeAddress(ip), reason);
                } else if let Some(&holder) = holders.get(&ip) {
                    let alias = self.belief(node).pod_cidrs.iter().map(IpNet::network);
                    let alias = alias.into_iter().find(|a| a.is_ipv6() == ip.is_ipv6());
                    self.overlaps.push(Overlap {
                        node: node.name.clone(),
                        address: ip,
                        holder: holder.clone(),
                        alias,
                    });
                } else {
                    holders.insert(ip, &node.name);
                    self.belief(node).addresses.push(ip);
                }
            }
        }
    }

    fn address_fault(&self, node: &Node, ip: IpAddr) -> Option<Reason> {
        if !is_unicast(ip) {
            return Some(Reason::NotUnicast);
        }
        let believed = node.internal_ips.contains(&ip)
            || self.internal_cidrs.iter().any(|net| net.contains(&ip));
        if !believed {
            return Some(Reason::NotInStatus);
        }
        self.reserved_for(&ip.into()).map(Reason::Reserved)
    }

    fn judge_peers(&mut self) {
        let mut order = (0..self.peers.len()).collect::<Vec<_>>();
        order.sort_by_key(|&index| (self.peers[index].created, index));
        // Whether they are carried or not: a peer must not get between a region and its own nodes.
        let mut node_addresses = PrefixMap::default();
        for node in &self.by_age {
            for ip in &node.internal_ips {
                node_addresses.insert(IpNet::from(*ip), &node.name);
            }
        }

        let mut holders = PrefixMap::<String>::default();
        for index in order {
            let name = self.peers[index].name.clone();
            let claimed = &self.snapshot.peers[&name].allowed_ips;
            let mut seen = BTreeSet::new();
            for &net in claimed.iter().filter(|net| seen.insert(**net)) {
                let reason = if is_too_wide(&net) {
                    Some(Reason::TooWide)
                } else if let Some(reserved) = self.reserved_for(&net) {
                    Some(Reason::Reserved(reserved))
                } else if let Some((_, node)) = node_addresses.overlapping(&net) {
                    Some(Reason::TakenBy(Subject::Node((*node).clone())))
                } else {
                    holders
                        .overlapping(&net)
                        .filter(|(_, holder)| **holder != name)
                        .map(|(_, holder)| Reason::TakenBy(Subject::Peer(holder.clone())))
                };
                match reason {
                    Some(reason) => {
                        let subject = Subject::Peer(name.clone());
                        self.exclude(subject, Field::AllowedIp(net), reason);
                    }
                    None => {
                        holders.insert(net, name.clone());
                        self.peers[index].allowed_ips.push(net);
                    }
                }
            }
        }
    }

    /// Kilo's filters (contract 3.7), except that of two overlapping claims the older one stays.
    ///
    /// A wide item may contain addresses of nodes elsewhere: they are more specific and win.
    fn judge_allowed_location_ips(&mut self, segment: impl Fn(&Node) -> SegmentName) {
        let mut peers = PrefixMap::default();
        for peer in &self.peers {
            for net in &peer.allowed_ips {
                peers.insert(*net, peer.name.clone());
            }
        }
        let mut node_addresses = BTreeMap::new();
        for (name, belief) in &self.nodes {
            for ip in &belief.addresses {
                node_addresses.insert(IpNet::from(*ip), *name);
            }
        }

        let mut holders = PrefixMap::<(SegmentName, &NodeName)>::default();
        for node in self.by_age() {
            if node.allowed_location_ips.is_empty() || !self.belief(node).is_meshed() {
                continue;
            }
            let segment = segment(node);
            for &net in &node.allowed_location_ips {
                let reason = if is_too_wide(&net) {
                    Some(Reason::TooWide)
                } else if let Some(reserved) = self.reserved_for(&net) {
                    Some(Reason::Reserved(reserved))
                } else if let Some(holder) = node_addresses.get(&net) {
                    Some(Reason::TakenBy(Subject::Node((*holder).clone())))
                } else if let Some((_, peer)) = peers.overlapping(&net) {
                    Some(Reason::TakenBy(Subject::Peer(peer.clone())))
                } else {
                    holders
                        .overlapping(&net)
                        .filter(|(_, (holder, _))| *holder != segment)
                        .map(|(_, (_, node))| Reason::TakenBy(Subject::Node((*node).clone())))
                };
                match reason {
                    Some(reason) => self.exclude_of(node, Field::AllowedLocationIp(net), reason),
                    None => {
                        holders.insert(net, (segment.clone(), &node.name));
                        self.belief(node).allowed_location_ips.push(net);
                    }
                }
            }
        }
    }

    /// The network, if any, for whose sake a prefix must not be claimed.
    fn reserved_for(&self, net: &IpNet) -> Option<IpNet> {
        let reserved = self.reserved.iter().find(|other| overlap(other, net));
        reserved.copied().or_else(|| {
            // Where flannel's networks are unknown, every pod CIDR stands for itself.
            let unknown = self.cluster_networks.is_empty();
            let (pods, _) = unknown.then(|| self.pods.overlapping(net)).flatten()?;
            Some(*pods)
        })
    }

    fn exclude_of(&mut self, node: &Node, field: Field, reason: Reason) {
        self.exclude(Subject::Node(node.name.clone()), field, reason);
    }

    fn belief(&mut self, node: &'a Node) -> &mut Belief {
        self.nodes.entry(&node.name).or_default()
    }
}

fn is_too_wide(net: &IpNet) -> bool {
    net.prefix_len() < WIDEST[usize::from(net.addr().is_ipv6())]
}

/// Removes what occurred before, keeping the order.
pub(super) fn dedup<T: Copy + PartialEq>(items: &mut Vec<T>) {
    let mut kept = Vec::with_capacity(items.len());
    for item in items.iter() {
        if !kept.contains(item) {
            kept.push(*item);
        }
    }
    *items = kept;
}
