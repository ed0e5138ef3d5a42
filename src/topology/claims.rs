//! What is believed of what nodes and peers say about themselves.
//!
//! Two may claim the same key, prefix or address, by mistake or on purpose. The older object keeps
//! it, so that whoever joins a cluster can disturb nobody who is there. Only pod CIDRs, which the
//! control plane gives, go before everything else, whatever its age.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::address::{PrefixMap, is_unicast, overlap};
use super::excluded::{Excluded, Field, Overlap, Reason, Subject};
use super::{
    Endpoint, ExternalPeer, InterfaceAddr, Node, NodeName, SegmentName, Settings, Snapshot,
};
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
    /// Its private address, if that is one of its own and tells its network.
    pub(super) private_ip: Option<InterfaceAddr>,
    pub(super) allowed_location_ips: Vec<IpNet>,
}

impl Belief {
    /// Whether the node takes part in the mesh.
    pub(super) fn is_meshed(&self) -> bool {
        self.key && !self.pod_cidrs.is_empty()
    }
}

/// Who has which prefix so far.
#[derive(Default)]
struct Holders<'a> {
    /// Node addresses that are carried.
    addresses: BTreeMap<IpAddr, &'a NodeName>,
    /// Node addresses, carried or not.
    present: PrefixMap<&'a NodeName>,
    /// Allowed IPs of external peers.
    peers: PrefixMap<Subject>,
    /// `allowed-location-ips`.
    offers: PrefixMap<(SegmentName, &'a NodeName)>,
}

impl Holders<'_> {
    /// The peer or location, if any, that has exactly this prefix.
    fn holder_of_all(&self, net: &IpNet) -> Option<Subject> {
        let offer = self.offers.get(net);
        let offer = offer.map(|(_, node)| Subject::Node((*node).clone()));
        self.peers.get(net).cloned().or(offer)
    }
}

enum Claimant<'a> {
    Node(&'a Node),
    /// By its place among the peers.
    Peer(usize),
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
    /// `segment` tells who shares a leader, as far as that is known before anything is believed.
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
        claims.judge_prefixes(segment);
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

    /// Everything but keys and pod CIDRs, the oldest object first.
    fn judge_prefixes(&mut self, segment: impl Fn(&Node) -> SegmentName) {
        let nodes = self.by_age().map(|node| {
            let order = (node.created, Subject::Node(node.name.clone()));
            (order, Claimant::Node(node))
        });
        let peers = self.peers.iter().enumerate().map(|(index, peer)| {
            let order = (peer.created, Subject::Peer(peer.name.clone()));
            (order, Claimant::Peer(index))
        });
        let mut claimants = nodes.chain(peers).collect::<Vec<_>>();
        claimants.sort_by(|(a, _), (b, _)| a.cmp(b));

        let mut holders = Holders::default();
        for ((_, subject), claimant) in claimants {
            match claimant {
                Claimant::Node(node) => {
                    if self.belief(node).is_meshed() {
                        self.judge_addresses(node, &mut holders);
                        if !node.allowed_location_ips.is_empty() {
                            self.judge_allowed_location_ips(node, &segment(node), &mut holders);
                        }
                    }
                    for ip in &node.internal_ips {
                        holders.present.insert(IpNet::from(*ip), &node.name);
                    }
                }
                Claimant::Peer(index) => self.judge_peer(index, subject, &mut holders),
            }
        }
    }

    fn judge_addresses(&mut self, node: &'a Node, holders: &mut Holders<'a>) {
        let believed = node.private_ip.filter(|private| {
            self.is_believed(node, private.addr()) && !is_too_wide(&private.trunc())
        });
        self.belief(node).private_ip = believed;
        let private = node.private_ip.map(|private| private.addr());
        let status = node.internal_ips.iter().copied();
        let mut addresses = private.into_iter().chain(status).collect::<Vec<_>>();
        dedup(&mut addresses);
        // Who has no pods of a family has no part in it.
        let pods = self.belief(node).pod_cidrs.clone();
        let alias = |ip: &IpAddr| {
            let mut pods = pods.iter().map(IpNet::network);
            pods.find(|address| address.is_ipv6() == ip.is_ipv6())
        };
        for ip in addresses.into_iter().filter(|ip| alias(ip).is_some()) {
            let reason = self
                .address_fault(node, ip)
                .or_else(|| holders.holder_of_all(&IpNet::from(ip)).map(Reason::TakenBy));
            if let Some(reason) = reason {
                self.exclude_of(node, Field::NodeAddress(ip), reason);
            } else if let Some(&holder) = holders.addresses.get(&ip) {
                self.overlaps.push(Overlap {
                    node: node.name.clone(),
                    address: ip,
                    holder: holder.clone(),
                    alias: alias(&ip),
                });
            } else {
                holders.addresses.insert(ip, &node.name);
                self.belief(node).addresses.push(ip);
            }
        }
    }

    fn address_fault(&self, node: &Node, ip: IpAddr) -> Option<Reason> {
        if !is_unicast(ip) {
            return Some(Reason::NotUnicast);
        }
        if !self.is_believed(node, ip) {
            return Some(Reason::NotInStatus);
        }
        self.reserved_for(&ip.into()).map(Reason::Reserved)
    }

    /// Whether an address is the node's: the kubelet says so, which may write no other Node's
    /// status, or the operator.
    fn is_believed(&self, node: &Node, ip: IpAddr) -> bool {
        node.internal_ips.contains(&ip) || self.internal_cidrs.iter().any(|net| net.contains(&ip))
    }

    fn judge_peer(&mut self, index: usize, subject: Subject, holders: &mut Holders<'a>) {
        let Subject::Peer(name) = &subject else {
            return;
        };
        let Some(peer) = self.snapshot.peers.get(name) else {
            return;
        };
        let mut seen = BTreeSet::new();
        for &net in peer.allowed_ips.iter().filter(|net| seen.insert(**net)) {
            let reason = self.prefix_fault(&net).or_else(|| {
                // Carried or not: a peer must not get between a region and its own nodes.
                let node = holders.present.overlapping(&net);
                let node = node.map(|(_, node)| Subject::Node((*node).clone()));
                let peer = holders.peers.overlapping(&net);
                let peer = peer.filter(|(_, other)| **other != subject);
                let offer = holders.offers.overlapping(&net);
                let offer = offer.map(|(_, (_, node))| Subject::Node((*node).clone()));
                let holder = node.or_else(|| peer.map(|(_, other)| other.clone()));
                holder.or(offer).map(Reason::TakenBy)
            });
            match reason {
                Some(reason) => self.exclude(subject.clone(), Field::AllowedIp(net), reason),
                None => {
                    holders.peers.insert(net, subject.clone());
                    self.peers[index].allowed_ips.push(net);
                }
            }
        }
    }

    /// Kilo's filters (`filter_allowed_location_ips` in [`super::kilo`]), except that the older claim stays, not the later segment's.
    ///
    /// A wide item may contain addresses of nodes elsewhere: they are more specific and win.
    fn judge_allowed_location_ips(
        &mut self,
        node: &'a Node,
        segment: &SegmentName,
        holders: &mut Holders<'a>,
    ) {
        for &net in &node.allowed_location_ips {
            let reason = self.prefix_fault(&net).or_else(|| {
                let address = holders.addresses.get(&net.addr());
                let address = address.filter(|_| net.prefix_len() == net.max_prefix_len());
                let address = address.map(|node| Subject::Node((*node).clone()));
                let peer = holders.peers.overlapping(&net);
                let offer = holders.offers.overlapping(&net);
                let offer = offer.filter(|(_, (other, _))| other != segment);
                let offer = offer.map(|(_, (_, node))| Subject::Node((*node).clone()));
                let holder = address.or_else(|| peer.map(|(_, peer)| peer.clone()));
                holder.or(offer).map(Reason::TakenBy)
            });
            match reason {
                Some(reason) => self.exclude_of(node, Field::AllowedLocationIp(net), reason),
                None => {
                    let holder = (segment.clone(), &node.name);
                    holders.offers.insert(net, holder);
                    self.belief(node).allowed_location_ips.push(net);
                }
            }
        }
    }

    /// What is wrong with a prefix, whoever else claims it.
    fn prefix_fault(&self, net: &IpNet) -> Option<Reason> {
        if is_too_wide(net) {
            return Some(Reason::TooWide);
        }
        self.reserved_for(net).map(Reason::Reserved)
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
