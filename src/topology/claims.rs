//! Judges what nodes and peers state about themselves.
//!
//! Two of them may claim the same key, prefix or address, by mistake or on purpose. The older *recorded* claim
//! wins ([`super::ledger`]), so a newcomer takes nothing from a node that is there, and an old Node cannot take
//! what a newer one holds. Between claims that no ledger records, the older object wins. A Peer's claims are as
//! old as its object, since only operators write Peers. Pod CIDRs, which the control plane assigns, come before
//! all other claims.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::address::{PrefixMap, is_public, is_unicast, overlap};
use super::excluded::{Conflict, Excluded, Field, Object, Overlap, Reason};
use super::region::Regions;
use super::{
    Claim, Endpoint, ExternalPeer, InterfaceAddr, Node, NodeName, Resolved, SegmentName, Settings,
    Snapshot,
};
use crate::wireguard::key::PublicKey;

/// No prefix shorter than this is carried for a peer or a location: IPv4, IPv6.
const WIDEST: [u8; 2] = [8, 16];

/// The accepted statements of one node.
#[derive(Clone, Debug, Default)]
pub(super) struct Accepted {
    /// Whether its key is accepted.
    pub(super) key: bool,
    /// Its other accepted keys.
    pub(super) other_keys: Vec<PublicKey>,
    pub(super) pod_cidrs: Vec<IpNet>,
    /// Its own addresses, whether or not another node has them too: at most the private one and one of
    /// each family.
    pub(super) own: Vec<IpAddr>,
    /// Those of them that are carried for it.
    pub(super) addresses: Vec<IpAddr>,
    /// Its private address with its network, if it is one of its own addresses.
    pub(super) private_ip: Option<InterfaceAddr>,
    /// Whether it is inside its region, so that flannel may send VXLAN to it in clear.
    pub(super) in_region: bool,
    /// Its judged addresses, as [`super::Member::underlay`].
    pub(super) underlay: BTreeSet<IpAddr>,
    /// As [`super::Member::flannel_ips`].
    pub(super) flannel_ips: BTreeSet<IpAddr>,
    pub(super) allowed_location_ips: Vec<IpNet>,
}

impl Accepted {
    /// Whether the node takes part in the mesh.
    pub(super) fn is_meshed(&self) -> bool {
        self.key && !self.pod_cidrs.is_empty()
    }
}

/// The holders of the prefixes that were accepted so far.
#[derive(Default)]
struct Holders<'a> {
    /// Node addresses, carried or not.
    present: PrefixMap<&'a NodeName>,
    /// Allowed IPs of external peers.
    peers: PrefixMap<Object>,
    /// `allowed-location-ips`.
    location_ips: PrefixMap<(SegmentName, &'a NodeName)>,
}

enum Claimant<'a> {
    /// An address of a node.
    Address(&'a Node, IpAddr),
    /// The `allowed-location-ips` of a node.
    LocationIps(&'a Node),
    /// The peer at this index.
    Peer(usize),
}

/// The order of claims: by the recorded time, or the creation of a peer; then by the creation of the object;
/// then by its name. A claim without a record comes after all recorded ones.
type Order = (i64, i64, Object);

fn order_of(node: &Node, claim: &Claim) -> Order {
    let (_, since) = node.ledger.rank(claim);
    (since, node.created, Object::Node(node.name.clone()))
}

fn order_of_peer(peer: &ExternalPeer) -> Order {
    (peer.created, peer.created, Object::Peer(peer.name.clone()))
}

/// All accepted, and what is not believed.
pub(super) struct Claims<'a> {
    snapshot: &'a Snapshot,
    resolved: &'a Resolved,
    /// Networks that no node or peer may claim: pods (as a whole), services, WireGuard addresses, aliases.
    reserved: Vec<IpNet>,
    cluster_networks: &'a [IpNet],
    settings: &'a Settings,
    pub(super) regions: Regions,
    /// All nodes, the oldest first.
    by_age: Vec<&'a Node>,
    pub(super) nodes: BTreeMap<&'a NodeName, Accepted>,
    pub(super) peers: Vec<ExternalPeer>,
    pub(super) excluded: Vec<Excluded>,
    pub(super) overlaps: Vec<Overlap>,
    pods: PrefixMap<&'a NodeName>,
}

impl<'a> Claims<'a> {
    /// Judges all statements of the snapshot except those that depend on the leaders.
    ///
    /// `segment` returns the segment of a node, given its accepted statements.
    pub(super) fn new(
        snapshot: &'a Snapshot,
        settings: &'a Settings,
        resolved: &'a Resolved,
        segment: impl Fn(&Node, &Accepted) -> SegmentName,
    ) -> Self {
        let mut by_age = snapshot.nodes.values().collect::<Vec<_>>();
        by_age.sort_by_key(|node| (node.created, &node.name));
        let reserved = settings
            .cluster_networks
            .iter()
            .chain(&settings.service_cidrs)
            .chain(&settings.subnets)
            .chain(&settings.alias_pools);

        let mut claims = Self {
            snapshot,
            resolved,
            reserved: reserved.copied().collect(),
            cluster_networks: &settings.cluster_networks,
            settings,
            regions: Regions::default(),
            by_age,
            nodes: snapshot
                .nodes
                .keys()
                .map(|name| (name, Accepted::default()))
                .collect(),
            peers: Vec::new(),
            excluded: Vec::new(),
            overlaps: Vec::new(),
            pods: PrefixMap::default(),
        };
        claims.judge_keys();
        claims.judge_pod_cidrs();
        claims.judge_own_addresses();
        claims.judge_regions();
        claims.judge_prefixes(segment);
        claims.judge_underlay();
        claims
    }

    /// All nodes, the oldest first.
    pub(super) fn by_age(&self) -> impl Iterator<Item = &'a Node> + use<'a> {
        self.by_age.clone().into_iter()
    }

    /// The address of an endpoint, resolved. An address inside the cluster's networks is refused, because no
    /// tunnel can be reached there.
    pub(super) fn endpoint_address(
        &mut self,
        object: &Object,
        endpoint: &Endpoint,
    ) -> Option<SocketAddr> {
        let address = endpoint.resolve(self.resolved)?;
        let ip = address.ip();
        let reason = if is_unicast(ip) {
            let net = IpNet::from(ip);
            self.reserved_for(&net).map(Reason::Reserved)
        } else {
            Some(Reason::NotUnicast)
        };
        match reason {
            Some(reason) => {
                self.exclude(object.clone(), Field::Endpoint(ip), reason);
                None
            }
            None => Some(address),
        }
    }

    /// Whether a tunnel may be reached at an address: a unicast one outside of the cluster's networks.
    pub(super) fn may_be_endpoint(&self, ip: IpAddr) -> bool {
        is_unicast(ip) && self.reserved_for(&IpNet::from(ip)).is_none()
    }

    pub(super) fn exclude(&mut self, object: Object, field: Field, reason: Reason) {
        self.excluded.push(Excluded {
            object,
            field,
            reason,
        });
    }

    fn judge_keys(&mut self) {
        let nodes = self.snapshot.nodes.values().flat_map(|node| {
            let current = node.public_key.map(|key| (key, false));
            let others = node.other_keys.iter().map(|key| (key, true));
            let others = others.filter(move |_| current.is_some());
            let keys = current.into_iter().chain(others);
            keys.map(|(key, other)| (order_of(node, &Claim::Key(key)), key, other))
        });
        let peers = self.snapshot.peers.values();
        let peers = peers.map(|peer| (order_of_peer(peer), peer.public_key, false));
        let mut claimants = nodes.chain(peers).collect::<Vec<_>>();
        claimants.sort();

        let mut holders = BTreeMap::<PublicKey, Object>::new();
        for ((_, _, object), key, is_other) in claimants {
            if let Some(holder) = holders.get(&key) {
                let field = if is_other {
                    Field::OtherKey
                } else {
                    Field::Key
                };
                if *holder != object {
                    self.exclude(object, field, Reason::TakenBy(holder.clone()));
                }
                continue;
            }
            match &object {
                Object::Node(name) => {
                    if let Some(accepted) = self.nodes.get_mut(name) {
                        if is_other {
                            accepted.other_keys.push(key);
                        } else {
                            accepted.key = true;
                        }
                    }
                }
                Object::Peer(name) => {
                    let peer = self.snapshot.peers.get(name);
                    self.peers.extend(peer.cloned().map(|peer| ExternalPeer {
                        allowed_ips: Vec::new(),
                        ..peer
                    }));
                }
            }
            holders.insert(key, object);
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
                        self.accepted(node).pod_cidrs.push(net);
                    }
                }
            }
            let accepted = self.accepted(node);
            if accepted.key && accepted.pod_cidrs.is_empty() {
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
        Some(Reason::TakenBy(Object::Node((*holder).clone())))
    }

    /// Finds each node's own addresses, whether or not another node has them too.
    fn judge_own_addresses(&mut self) {
        for node in self.by_age() {
            let private = node.private_ip.map(|private| private.addr());
            let status = node.internal_ips.iter().copied();
            let mut addresses = private.into_iter().chain(status).collect::<Vec<_>>();
            dedup(&mut addresses);
            for ip in addresses {
                match self.address_fault(node, ip) {
                    None => self.accepted(node).own.push(ip),
                    Some(reason) if self.accepted(node).is_meshed() => {
                        self.exclude_of(node, Field::NodeAddress(ip), reason);
                    }
                    Some(_) => {}
                }
            }
            let own = &self.nodes[&node.name].own;
            let believed = |private: &InterfaceAddr| {
                own.contains(&private.addr()) && !is_too_wide(&private.trunc())
            };
            // Where a node publishes a wrong address, its status counts, which has no network.
            let private = node.private_ip.and_then(|private| {
                let mut status = own.iter().filter(|ip| !is_public(**ip));
                let fallback = || status.next().map(|ip| IpNet::from(*ip));
                Some(private).filter(believed).or_else(fallback)
            });
            self.accepted(node).private_ip = private;
        }
    }

    /// Finds the nodes inside their regions. A label is not enough: the address must be inside the region's
    /// networks, or the operator must have declared the region or the address for this node.
    fn judge_regions(&mut self) {
        let members = self.by_age.iter().filter_map(|node| {
            let accepted = &self.nodes[&node.name];
            Some((*node, accepted.private_ip.filter(|_| accepted.is_meshed())?))
        });
        self.regions = Regions::new(self.settings, members);
        for node in self.by_age() {
            let Some(address) = self.nodes[&node.name].private_ip else {
                continue;
            };
            let inside = self.regions.contain(&node.region, address.addr());
            let declared = node.region_declared || node.private_ip_forced;
            let clipped = self.regions.clip(&node.region, address);
            let accepted = self.accepted(node);
            accepted.in_region = inside || declared;
            accepted.private_ip = Some(clipped);
            if accepted.is_meshed() && !accepted.in_region {
                let networks = self.regions.networks(&node.region).unwrap_or_default();
                let reason = Reason::OutsideRegion {
                    region: node.region.clone(),
                    networks: networks.to_vec(),
                };
                self.exclude_of(node, Field::Region, reason);
            }
        }
    }

    /// Judges node addresses, peers and `allowed-location-ips` in the order in which they were claimed.
    fn judge_prefixes(&mut self, segment: impl Fn(&Node, &Accepted) -> SegmentName) {
        let winners = self.address_winners();
        let mut claimants = Vec::new();
        for node in self.by_age() {
            for &ip in self.nodes[&node.name].own.iter().chain(&node.internal_ips) {
                let order = order_of(node, &Claim::Address(ip));
                claimants.push((order, Claimant::Address(node, ip)));
            }
            if self.accepted(node).is_meshed() && !node.allowed_location_ips.is_empty() {
                let object = Object::Node(node.name.clone());
                let order = (node.created, node.created, object);
                claimants.push((order, Claimant::LocationIps(node)));
            }
        }
        for (index, peer) in self.peers.iter().enumerate() {
            claimants.push((order_of_peer(peer), Claimant::Peer(index)));
        }
        claimants.sort_by(|(a, _), (b, _)| a.cmp(b));

        let mut holders = Holders::default();
        for ((_, _, object), claimant) in claimants {
            match claimant {
                Claimant::Address(node, ip) => holders.present.insert(IpNet::from(ip), &node.name),
                Claimant::LocationIps(node) => {
                    let segment = segment(node, &self.nodes[&node.name]);
                    self.judge_allowed_location_ips(node, &segment, &winners, &mut holders);
                }
                Claimant::Peer(index) => self.judge_peer(index, object, &mut holders),
            }
        }
        self.judge_addresses(&winners, &holders);
    }

    /// For each address the node with the oldest claim to it. A node without pods of the address's family is left
    /// out.
    fn address_winners(&self) -> BTreeMap<IpAddr, &'a Node> {
        let mut winners = BTreeMap::<IpAddr, (Order, &'a Node)>::new();
        for node in self.by_age() {
            let accepted = &self.nodes[&node.name];
            for &ip in accepted.own.iter().filter(|_| accepted.is_meshed()) {
                if pod_address(accepted, ip).is_none() {
                    continue;
                }
                let order = order_of(node, &Claim::Address(ip));
                match winners.get(&ip) {
                    Some((holder, _)) if *holder <= order => {}
                    Some(_) | None => drop(winners.insert(ip, (order, node))),
                }
            }
        }
        let winners = winners.into_iter();
        winners.map(|(ip, (_, node))| (ip, node)).collect()
    }

    fn judge_addresses(&mut self, winners: &BTreeMap<IpAddr, &'a Node>, holders: &Holders<'a>) {
        for node in self.by_age() {
            let accepted = self.accepted(node).clone();
            if !accepted.is_meshed() {
                continue;
            }
            for ip in accepted.own.iter().copied() {
                let pod_address = pod_address(&accepted, ip);
                let (Some(_), Some(holder)) = (pod_address, winners.get(&ip)) else {
                    continue;
                };
                let net = IpNet::from(ip);
                let location = holders.location_ips.get(&net).map(|(_, name)| *name);
                let location = location.filter(|name| **name != node.name);
                let location = location.map(|name| Object::Node(name.clone()));
                if let Some(other) = holders.peers.get(&net).cloned().or(location) {
                    let reason = Reason::TakenBy(other);
                    self.exclude_of(node, Field::NodeAddress(ip), reason);
                } else if holder.name == node.name {
                    self.accepted(node).addresses.push(ip);
                } else {
                    self.overlaps.push(Overlap {
                        node: node.name.clone(),
                        address: ip,
                        conflict: Conflict::Holder(holder.name.clone()),
                        pod_address,
                        alias: None,
                    });
                }
            }
        }
    }

    /// Finds the addresses to which flannel may send VXLAN in clear: accepted ones that no other node holds.
    /// Each node compares the others, which the status or flannel's annotations name, with the networks that it
    /// is connected to.
    fn judge_underlay(&mut self) {
        let mut held = BTreeMap::<IpAddr, &'a NodeName>::new();
        for node in self.by_age() {
            for ip in &self.nodes[&node.name].addresses {
                held.insert(*ip, &node.name);
            }
        }
        for node in self.by_age() {
            let accepted = &self.nodes[&node.name];
            let inside = |ip: &IpAddr| self.regions.contain(&node.region, *ip);
            // Regions may share a subnet: an address inside the own region is not in another one.
            let anothers = |ip: &IpAddr| {
                let holder = held.get(ip).filter(|holder| ***holder != node.name);
                let other = holder.and_then(|holder| self.snapshot.nodes.get(*holder));
                other.is_some_and(|other| {
                    // A node that takes no part yet may still have the older claim.
                    let claim = Claim::Address(*ip);
                    let older = order_of(other, &claim) < order_of(node, &claim);
                    older && (other.region == node.region || !inside(ip))
                })
            };
            let lease = node.lease.iter().flat_map(|lease| {
                let v4 = lease.public_ip.map(IpAddr::V4);
                v4.into_iter().chain(lease.public_ipv6.map(IpAddr::V6))
            });
            let named = accepted.own.iter().copied().chain(lease);
            let named = named.filter(|ip| is_unicast(*ip) && !anothers(ip));
            let judged = |ip: &IpAddr| {
                inside(ip) || (accepted.private_ip.is_some() && accepted.own.contains(ip))
            };
            let (underlay, flannel_ips) = named.partition(judged);
            let accepted = self.accepted(node);
            accepted.underlay = underlay;
            accepted.flannel_ips = flannel_ips;
        }
    }

    fn address_fault(&self, node: &Node, ip: IpAddr) -> Option<Reason> {
        if !is_unicast(ip) {
            return Some(Reason::NotUnicast);
        }
        let forced =
            node.private_ip_forced && node.private_ip.is_some_and(|private| private.addr() == ip);
        let named = self
            .settings
            .internal_cidrs
            .iter()
            .any(|net| net.contains(&ip));
        if !node.internal_ips.contains(&ip) && !named && !forced {
            return Some(Reason::NotInStatus);
        }
        let endpoint = node.endpoint.as_ref().filter(|_| node.endpoint_forced);
        let announced = matches!(endpoint, Some(Endpoint::Addr(address)) if address.ip() == ip);
        if is_public(ip) && !named && !forced && !announced {
            return Some(Reason::PublicUndeclared);
        }
        if let Some(reserved) = self.reserved_for(&ip.into()) {
            return Some(Reason::Reserved(reserved));
        }
        let networks = self.settings.region_networks.get(&node.region);
        let networks = networks.filter(|networks| !networks.is_empty())?;
        let declared = forced || announced || node.region_declared;
        let inside = networks.iter().any(|network| network.contains(&ip));
        (!inside && !declared).then(|| Reason::OutsideRegion {
            region: node.region.clone(),
            networks: networks.clone(),
        })
    }

    fn judge_peer(&mut self, index: usize, object: Object, holders: &mut Holders<'a>) {
        let Object::Peer(name) = &object else {
            return;
        };
        let Some(peer) = self.snapshot.peers.get(name) else {
            return;
        };
        let mut seen = BTreeSet::new();
        for &net in peer.allowed_ips.iter().filter(|net| seen.insert(**net)) {
            let reason = self.prefix_fault(&net).or_else(|| {
                // Carried or not: a peer must not take a region's traffic to its own nodes.
                let node = holders.present.overlapping(&net);
                let node = node.map(|(_, node)| Object::Node((*node).clone()));
                let peer = holders.peers.overlapping(&net);
                let peer = peer.filter(|(_, other)| **other != object);
                let location = holders.location_ips.overlapping(&net);
                let location = location.map(|(_, (_, node))| Object::Node((*node).clone()));
                let holder = node.or_else(|| peer.map(|(_, other)| other.clone()));
                holder.or(location).map(Reason::TakenBy)
            });
            match reason {
                Some(reason) => self.exclude(object.clone(), Field::AllowedIp(net), reason),
                None => {
                    holders.peers.insert(net, object.clone());
                    self.peers[index].allowed_ips.push(net);
                }
            }
        }
    }

    /// Applies Kilo's filters (`filter_allowed_location_ips` in [`super::kilo`]), except that the older claim
    /// wins, not the later segment's.
    ///
    /// A wide item may contain addresses of nodes in other segments: those are more specific and win.
    fn judge_allowed_location_ips(
        &mut self,
        node: &'a Node,
        segment: &SegmentName,
        winners: &BTreeMap<IpAddr, &'a Node>,
        holders: &mut Holders<'a>,
    ) {
        let object = Object::Node(node.name.clone());
        let order = (node.created, node.created, object);
        for &net in &node.allowed_location_ips {
            let reason = self.prefix_fault(&net).or_else(|| {
                let address = winners.get(&net.addr());
                let address = address.filter(|_| net.prefix_len() == net.max_prefix_len());
                let address =
                    address.filter(|holder| order_of(holder, &Claim::Address(net.addr())) < order);
                let address = address.map(|node| Object::Node(node.name.clone()));
                let peer = holders.peers.overlapping(&net);
                let location = holders.location_ips.overlapping(&net);
                let location = location.filter(|(_, (other, _))| other != segment);
                let location = location.map(|(_, (_, node))| Object::Node((*node).clone()));
                let holder = address.or_else(|| peer.map(|(_, peer)| peer.clone()));
                holder.or(location).map(Reason::TakenBy)
            });
            match reason {
                Some(reason) => self.exclude_of(node, Field::AllowedLocationIp(net), reason),
                None => {
                    let holder = (segment.clone(), &node.name);
                    holders.location_ips.insert(net, holder);
                    self.accepted(node).allowed_location_ips.push(net);
                }
            }
        }
    }

    /// The reason, if any, to refuse a prefix regardless of other claims.
    fn prefix_fault(&self, net: &IpNet) -> Option<Reason> {
        if is_too_wide(net) {
            return Some(Reason::TooWide);
        }
        self.reserved_for(net).map(Reason::Reserved)
    }

    /// The reserved network, if any, that a prefix overlaps.
    fn reserved_for(&self, net: &IpNet) -> Option<IpNet> {
        let reserved = self.reserved.iter().find(|other| overlap(other, net));
        reserved.copied().or_else(|| {
            // Where flannel's networks are unknown, each pod CIDR is reserved.
            let unknown = self.cluster_networks.is_empty();
            let (pods, _) = unknown.then(|| self.pods.overlapping(net)).flatten()?;
            Some(*pods)
        })
    }

    fn exclude_of(&mut self, node: &Node, field: Field, reason: Reason) {
        self.exclude(Object::Node(node.name.clone()), field, reason);
    }

    fn accepted(&mut self, node: &'a Node) -> &mut Accepted {
        self.nodes.entry(&node.name).or_default()
    }
}

/// An address in the pod network by which every region reaches the node; none where it has no pods of the family.
pub(super) fn pod_address(accepted: &Accepted, ip: IpAddr) -> Option<IpAddr> {
    let mut pods = accepted.pod_cidrs.iter().map(IpNet::network);
    pods.find(|address| address.is_ipv6() == ip.is_ipv6())
}

fn is_too_wide(net: &IpNet) -> bool {
    net.prefix_len() < WIDEST[usize::from(net.addr().is_ipv6())]
}

/// Removes repeated items, keeping the order.
pub(super) fn dedup<T: Copy + PartialEq>(items: &mut Vec<T>) {
    let mut kept = Vec::with_capacity(items.len());
    for item in items.iter() {
        if !kept.contains(item) {
            kept.push(*item);
        }
    }
    *items = kept;
}
