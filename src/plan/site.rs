//! This node's place in the topology: which segments are elsewhere, and how to get there.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;

use ipnet::IpNet;

use super::{Candidates, Inputs, candidates};
use crate::flannel::{Backend, Flannel, Vtep};
use crate::policy::Encapsulation;
use crate::state::NextHop;
use crate::topology::{
    Endpoint, ExternalPeer, Leader, Member, Mode, Outsider, Segment, SegmentName, is_public,
};

/// What a node does for its region.
#[derive(Clone, Copy, Debug)]
pub(super) enum Role<'a> {
    /// It carries its segment's traffic through its own tunnel.
    Leader(&'a Leader),
    /// It sends what goes elsewhere to the leaders of its segment.
    Follower,
    /// It takes no part: it sends nothing elsewhere.
    Outsider,
}

/// Everything the plan derives from where this node is.
pub(super) struct Site<'a> {
    pub(super) inputs: &'a Inputs<'a>,
    pub(super) role: Role<'a>,
    /// What this node reaches without the tunnel.
    group: &'a SegmentName,
    /// This node's segment; none for an outsider.
    pub(super) segment: Option<&'a Segment>,
    /// This node's pod CIDRs, as far as flannel uses what the cluster gave it.
    subnets: Vec<IpNet>,
    /// Every address of the own region's nodes, and of this one.
    pub(super) region_underlay: BTreeSet<IpAddr>,
    /// The networks of the own region's nodes.
    pub(super) region_networks: BTreeSet<IpNet>,
    /// What this host must reach without the tunnel, beside all public addresses.
    pub(super) direct: BTreeSet<IpAddr>,
    endpoint: Option<&'a Endpoint>,
    private_ip: Option<IpNet>,
    /// Where the other leaders and the VPN peers may be.
    candidates: Candidates,
}

impl<'a> Site<'a> {
    /// `None` if the cluster does not know this node, or if Kilo's algorithm holds and Kilo would
    /// not apply anything because the node is not ready.
    pub(super) fn new(inputs: &'a Inputs<'a>) -> Option<Self> {
        let (topology, me) = (inputs.topology, inputs.me);
        let mut site = match topology.segment_of(me) {
            Some(segment) => {
                let member = segment.member(me)?;
                Self {
                    inputs,
                    role: segment.leader(me).map_or(Role::Follower, Role::Leader),
                    group: &segment.group,
                    segment: Some(segment),
                    subnets: subnets(inputs.flannel, &member.pod_cidrs),
                    region_underlay: BTreeSet::new(),
                    region_networks: BTreeSet::new(),
                    direct: inputs.api_servers.clone(),
                    endpoint: member.endpoint.as_ref(),
                    private_ip: member.private_ip,
                    candidates: candidates(topology, me),
                }
            }
            None => {
                let outsider = topology.outsider(me)?;
                if let Mode::Kilo(_) = topology.mode {
                    return None;
                }
                Self {
                    inputs,
                    role: Role::Outsider,
                    group: &outsider.group,
                    segment: None,
                    subnets: inputs.flannel.subnets.clone(),
                    region_underlay: BTreeSet::new(),
                    region_networks: BTreeSet::new(),
                    direct: inputs.api_servers.clone(),
                    endpoint: outsider.endpoint.as_ref(),
                    private_ip: None,
                    candidates: Candidates::new(),
                }
            }
        };
        site.region_underlay = site
            .neighbours()
            .flat_map(|segment| &segment.nodes)
            .flat_map(|node| &node.underlay)
            .chain(site.outside_neighbours().flat_map(|node| &node.underlay))
            .copied()
            .collect();
        let connected = site.connected_flannel_ips();
        site.region_underlay.extend(connected);
        site.region_networks = site
            .neighbours()
            .flat_map(|segment| &segment.nodes)
            .filter_map(|node| node.private_ip)
            .map(|address| address.trunc())
            .collect();
        if site.own_lead().is_some() {
            // A leader's endpoint makes no difference to the addresses of other nodes.
            let own_address = |segment: &Segment, leader: &Leader| {
                let ip = site.endpoint_of(leader)?.ip();
                let mut nodes = segment.nodes.iter();
                nodes.any(|node| node.addresses.contains(&ip)).then_some(ip)
            };
            let endpoints = site.remotes().flat_map(|segment| {
                let leaders = segment.leaders.iter();
                leaders.filter_map(move |leader| own_address(segment, leader))
            });
            let endpoints = endpoints.collect::<Vec<_>>();
            site.direct.extend(endpoints);
        }
        Some(site)
    }

    /// Addresses that only flannel's annotations name, of nodes of the own region: those on a network
    /// that this node is connected to. One that is a remote leader's endpoint is not among them, or an
    /// annotation would cut this node off from that leader.
    fn connected_flannel_ips(&self) -> Vec<IpAddr> {
        let leaders = self.remotes().flat_map(|segment| &segment.leaders);
        let endpoints = leaders
            .filter_map(|leader| Some(leader.address?.ip()))
            .collect::<BTreeSet<_>>();
        let connected = |ip: &IpAddr| {
            let mut networks = self.inputs.connected.iter();
            networks.any(|network| network.contains(ip))
        };
        let members = self.neighbours().flat_map(|segment| &segment.nodes);
        members
            .flat_map(|node| &node.flannel_ips)
            .chain(self.outside_neighbours().flat_map(|node| &node.flannel_ips))
            .copied()
            .filter(|ip| connected(ip) && !endpoints.contains(ip))
            .collect()
    }

    /// The segments this node reaches without the tunnel, its own among them.
    pub(super) fn neighbours(&self) -> impl Iterator<Item = &'a Segment> + use<'a> {
        let group = self.group;
        let segments = self.inputs.topology.segments.iter();
        segments.filter(move |segment| segment.group == *group)
    }

    /// The segments that are elsewhere.
    pub(super) fn remotes(&self) -> impl Iterator<Item = &'a Segment> + use<'a> {
        let group = self.group;
        let segments = self.inputs.topology.segments.iter();
        segments.filter(move |segment| segment.group != *group)
    }

    /// The nodes of the own region that take no part; this one may be among them.
    pub(super) fn outside_neighbours(&self) -> impl Iterator<Item = &'a Outsider> + use<'a> {
        let group = self.group;
        let outsiders = self.inputs.topology.outsiders.iter();
        outsiders.filter(move |node| node.group == *group)
    }

    /// The nodes elsewhere that take no part.
    pub(super) fn remote_outsiders(&self) -> impl Iterator<Item = &'a Outsider> + use<'a> {
        let group = self.group;
        let outsiders = self.inputs.topology.outsiders.iter();
        outsiders.filter(move |node| node.group != *group)
    }

    /// The other nodes of the own region that take part.
    pub(super) fn other_members(&self) -> impl Iterator<Item = &'a Member> + use<'a> {
        let me = self.inputs.me;
        let nodes = self.neighbours().flat_map(|segment| &segment.nodes);
        nodes.filter(move |node| node.name != *me)
    }

    /// The pods of the own region's other nodes, whether they take part yet or not.
    pub(super) fn region_pods(&self) -> impl Iterator<Item = IpNet> + '_ {
        let members = self.other_members().flat_map(|node| &node.pod_cidrs);
        let outsiders = self.outside_neighbours().flat_map(|node| &node.pod_cidrs);
        let own = &self.inputs.flannel.subnets;
        let all = members.chain(outsiders).copied();
        all.filter(|net| !own.contains(net))
    }

    /// The addresses of a node elsewhere that this node carries. Two regions may use the same subnet: what
    /// is near is never looked for elsewhere, nor what a network is for that this node is connected to.
    pub(super) fn carried_addresses<'s>(
        &'s self,
        segment: &'s Segment,
        node: &'s Member,
    ) -> impl Iterator<Item = IpAddr> + 's {
        let addresses = node.addresses.iter().copied();
        addresses.filter(|ip| {
            !self.region_underlay.contains(ip) && self.connected_for(segment, *ip).is_none()
        })
    }

    /// The WireGuard addresses of a leader that this node carries.
    pub(super) fn carried_wireguard_ips<'s>(
        &'s self,
        leader: &'s Leader,
    ) -> impl Iterator<Item = IpAddr> + 's {
        let ips = leader.wireguard_ips.iter().copied();
        ips.filter(|ip| self.connected_to(&IpNet::from(*ip)).is_none())
    }

    /// The `allowed-location-ips` of a segment that this node carries. What lies inside a network of the
    /// own region is the region's.
    pub(super) fn carried_offers<'s>(
        &'s self,
        segment: &'s Segment,
    ) -> impl Iterator<Item = IpNet> + 's {
        let offers = segment.allowed_location_ips.iter().copied();
        offers.filter(|net| {
            let mut near = self.region_networks.iter();
            !near.any(|near| near.contains(net)) && self.connected_to(net).is_none()
        })
    }

    /// The allowed IPs of an external peer that this node carries.
    pub(super) fn carried_allowed_ips<'s>(
        &'s self,
        peer: &'s ExternalPeer,
    ) -> impl Iterator<Item = IpNet> + 's {
        let nets = peer.allowed_ips.iter().copied();
        nets.filter(|net| self.connected_to(net).is_none())
    }

    /// The network this node is connected to, if any, that a prefix lies in.
    pub(super) fn connected_to(&self, net: &IpNet) -> Option<IpNet> {
        let mut connected = self.inputs.connected.iter();
        connected.find(|network| network.contains(net)).copied()
    }

    /// The network this node is connected to, if any, that the address of a node elsewhere lies in. An
    /// address that the tunnel hears that node's leader from is the node's: its handshake proves it.
    pub(super) fn connected_for(&self, segment: &Segment, ip: IpAddr) -> Option<IpNet> {
        let is_heard_there = |leader: &Leader| {
            let heard = self.inputs.observed.get(&leader.public_key());
            heard.is_some_and(|heard| heard.ip() == ip)
        };
        if segment.leaders.iter().any(is_heard_there) {
            return None;
        }
        self.connected_to(&IpNet::from(ip))
    }

    /// The other nodes this node forwards for.
    pub(super) fn followers(&self) -> impl Iterator<Item = &'a Member> + use<'a> {
        let me = self.inputs.me;
        let segment = self.segment.filter(|_| self.own_lead().is_some());
        let nodes = segment.into_iter().flat_map(|segment| &segment.nodes);
        nodes.filter(move |node| node.name != *me)
    }

    /// This node as a leader of its segment, if it is one.
    pub(super) fn own_lead(&self) -> Option<&'a Leader> {
        match self.role {
            Role::Leader(own) => Some(own),
            Role::Follower | Role::Outsider => None,
        }
    }

    /// Whether an address elsewhere has to be reached by this host's own processes without the
    /// tunnel.
    ///
    /// A public address is reached directly from everywhere, so its host answers directly too. Were
    /// it routed into the tunnel here, strict reverse-path filtering would drop what comes from it;
    /// the same holds for the addresses the tunnel's own datagrams come from, whatever they are,
    /// since the check of what arrives knows no mark. And the way to the API server must not depend
    /// on the tunnel that is configured through it.
    pub(super) fn is_direct(&self, ip: IpAddr) -> bool {
        is_public(ip) || self.direct.contains(&ip)
    }

    /// Where this node's tunnel sends to another leader: where it hears it, else at the likeliest of the
    /// candidates, all of which are tried ([`super::candidates()`]).
    pub(super) fn endpoint_of(&self, leader: &Leader) -> Option<SocketAddr> {
        let key = leader.public_key();
        let observed = self.inputs.observed.get(&key).copied();
        let endpoint = match self.inputs.topology.mode {
            Mode::Native => observed.or_else(|| {
                let candidates = self.candidates.get(&key)?;
                Some(candidates.first()?.address)
            }),
            Mode::Kilo(_) => self.kilos_endpoint_of(leader, observed),
        };
        endpoint.filter(|address| !self.region_underlay.contains(&address.ip()))
    }

    /// Kilo's rule: a leader whose operator set a keepalive is where it was seen, others are where they say.
    fn kilos_endpoint_of(
        &self,
        leader: &Leader,
        observed: Option<SocketAddr>,
    ) -> Option<SocketAddr> {
        let own = self.own_lead().and_then(|own| own.discovered);
        let beside_us = |seen: &SocketAddr| own.is_some_and(|own| own.ip() == seen.ip());
        let seen = observed.or_else(|| leader.discovered.filter(|seen| !beside_us(seen)));
        seen.filter(|_| leader.behind_nat).or(leader.address)
    }

    /// Where it sends to an external peer. One without an endpoint of its own roams: while this node
    /// hears it, the device knows better than any configuration.
    pub(super) fn endpoint_of_peer(&self, peer: &ExternalPeer) -> Option<SocketAddr> {
        let peer_addresses = self.inputs.topology.peer_addresses.get(&peer.public_key)?;
        let heard = self.inputs.observed.contains_key(&peer.public_key);
        let discovered = peer_addresses.discovered.filter(|_| !heard);
        peer_addresses.address.or(discovered)
    }

    /// The UDP port of this node's tunnel: its endpoint's, as Kilo has it.
    pub(super) fn listen_port(&self) -> NonZeroU16 {
        self.endpoint
            .and_then(|endpoint| NonZeroU16::new(endpoint.port()))
            .unwrap_or(self.inputs.settings.port)
    }

    /// Whether this node has pods of a family. Of others it carries nothing.
    pub(super) fn has_family(&self, v6: bool) -> bool {
        self.source(v6).is_some()
    }

    /// This node's address inside the cluster network, the same as flannel's: the first of its pod
    /// CIDR. Everybody has a route to it.
    pub(super) fn source(&self, v6: bool) -> Option<IpAddr> {
        let subnets = self.subnets.iter();
        subnets
            .map(IpNet::network)
            .find(|address| address.is_ipv6() == v6)
    }

    /// How to reach what is in a remote segment, for a family: by each of its leaders on a leader, by each
    /// leader of the own segment on a follower.
    ///
    /// On a leader all of these next hops are behind the tunnel, which looks at a packet's destination
    /// alone: the peers' allowed IPs say which leader receives it.
    pub(super) fn next_hops(&self, remote: &Segment, v6: bool) -> BTreeSet<NextHop> {
        if self.own_lead().is_none() {
            return self.tunnel_hops(v6);
        }
        // With a gateway flannel's DirectRouting never takes what is behind the tunnel for
        // directly connected: it asks the kernel for the route and looks whether that has one.
        let ips = remote
            .leaders
            .iter()
            .flat_map(|leader| &leader.wireguard_ips);
        let gateways = ips.copied().filter(|ip| ip.is_ipv6() == v6);
        let hops: BTreeSet<_> = gateways
            .map(|via| NextHop {
                onlink: true,
                via: Some(via),
                ..self.tunnel()
            })
            .collect();
        if hops.is_empty() {
            self.tunnel_hops(v6)
        } else {
            hops
        }
    }

    /// How to reach what is behind the tunnel but has no gateway: external peers.
    pub(super) fn tunnel_hops(&self, v6: bool) -> BTreeSet<NextHop> {
        match self.role {
            Role::Leader(_) => [self.tunnel()].into(),
            Role::Follower => self.hops_to_leaders(v6),
            Role::Outsider => BTreeSet::new(),
        }
    }

    /// How to reach the leaders of the own segment.
    fn hops_to_leaders(&self, v6: bool) -> BTreeSet<NextHop> {
        let segment = self.segment.into_iter();
        let leaders = segment.flat_map(|segment| {
            let leaders = segment.leaders.iter();
            leaders.filter_map(|leader| segment.member(&leader.node))
        });
        leaders
            .filter_map(|leader| self.hop_to(leader, v6))
            .collect()
    }

    fn tunnel(&self) -> NextHop {
        NextHop {
            via: None,
            dev: self.inputs.settings.interface.clone(),
            onlink: false,
        }
    }

    /// How to reach another node of the own region from this host.
    pub(super) fn hop_to(&self, node: &Member, v6: bool) -> Option<NextHop> {
        let flannel = self.inputs.flannel;
        let pods = node.pod_cidrs.iter();
        let pods = pods.into_iter().find(|net| net.addr().is_ipv6() == v6)?;
        // Kilo judges no claims: two nodes may have the same pods, and this may be one of them.
        if flannel.subnets.contains(pods) {
            return None;
        }
        let hop = flannel_hop(flannel, pods);
        match self.inputs.settings.encapsulation {
            // Where flannel itself goes directly its VXLAN device has no neighbour to send to.
            Encapsulation::CrossSubnet | Encapsulation::Always => hop,
            Encapsulation::Never => self.direct_hop(node, v6).or(hop),
        }
    }

    /// The node's own address, if it is on this node's subnet.
    fn direct_hop(&self, node: &Member, v6: bool) -> Option<NextHop> {
        let (mine, theirs) = (self.private_ip?, node.private_ip?.addr());
        let device = self.inputs.flannel.vteps.iter();
        let device = device.filter_map(|vtep| vtep.parent.clone()).next()?;
        let is_near = mine.contains(&theirs) && mine.addr() != theirs;
        (theirs.is_ipv6() == v6 && is_near).then_some(NextHop {
            via: Some(theirs),
            dev: device,
            onlink: true,
        })
    }

    /// Whether flannel's device carries what this host sends to a node of the own region.
    pub(super) fn is_encapsulated(&self, hop: &NextHop) -> bool {
        let vteps = &self.inputs.flannel.vteps;
        vteps.iter().any(|vtep| vtep.name == hop.dev)
    }
}

fn subnets(flannel: &Flannel, pod_cidrs: &[IpNet]) -> Vec<IpNet> {
    let subnets = flannel.subnets.iter().copied();
    subnets.filter(|net| pod_cidrs.contains(net)).collect()
}

/// flannel's own next hop to a node's pods.
///
/// Where flannel has lost it (its device was recreated), what flannel will install.
fn flannel_hop(flannel: &Flannel, pods: &IpNet) -> Option<NextHop> {
    if let Some(hop) = flannel.next_hops.get(pods) {
        return Some(hop.clone());
    }
    let gateway = pods.network();
    let vtep = vtep_of(flannel, gateway.is_ipv6())?;
    Some(NextHop {
        via: Some(gateway),
        dev: vtep.name.clone(),
        onlink: true,
    })
}

fn vtep_of(flannel: &Flannel, v6: bool) -> Option<&Vtep> {
    match flannel.backend {
        Backend::HostGw => None,
        Backend::Vxlan => flannel
            .vteps
            .iter()
            .find(|vtep| vtep.addresses.iter().any(|a| a.addr().is_ipv6() == v6)),
    }
}
