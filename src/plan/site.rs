//! The topology as this node sees it: its own region, the remote segments, and the next hops to them.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;

use ipnet::IpNet;

use super::{Candidates, Inputs, candidates, paths};
use crate::flannel::{Backend, Flannel, Vtep};
use crate::policy::Encapsulation;
use crate::probe::Verdicts;
use crate::state::NextHop;
use crate::topology::{
    Endpoint, ExternalPeer, Leader, Member, Mode, Outsider, Segment, SegmentName, is_public,
};

/// The role of a node in its segment.
#[derive(Clone, Copy, Debug)]
pub(super) enum Role<'a> {
    /// It carries its segment's traffic through its own tunnel.
    Leader(&'a Leader),
    /// It sends traffic for other regions to the leaders of its segment.
    Follower,
    /// It takes no part in the mesh and sends nothing to other regions.
    Outsider,
}

/// This node's position in the topology, with the values that the plan derives from it.
pub(super) struct Site<'a> {
    pub(super) inputs: &'a Inputs<'a>,
    pub(super) role: Role<'a>,
    /// The group of nodes that this node reaches without the tunnel.
    group: &'a SegmentName,
    /// This node's segment; `None` for an outsider.
    pub(super) segment: Option<&'a Segment>,
    /// This node's pod CIDRs, as far as flannel uses what the cluster gave it.
    subnets: Vec<IpNet>,
    /// Every address of the own region's nodes, and of this one.
    pub(super) region_underlay: BTreeSet<IpAddr>,
    /// The networks of the own region's nodes.
    pub(super) region_networks: BTreeSet<IpNet>,
    /// The addresses that this host must reach without the tunnel, beside all public ones.
    pub(super) direct: BTreeSet<IpAddr>,
    endpoint: Option<&'a Endpoint>,
    private_ip: Option<IpNet>,
    /// The candidates of the other leaders and the VPN peers.
    candidates: Candidates,
    /// The verdicts on the paths, where they count.
    pub(super) verdicts: &'a Verdicts,
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
                    verdicts: paths::trusted(inputs.verdicts),
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
                    verdicts: inputs.verdicts,
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

    /// Addresses of the own region's nodes that only flannel's annotations name and that are on a network this
    /// node is connected to. A remote leader's endpoint is not among them, or an annotation would cut this node
    /// off from that leader.
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

    /// The segments of other regions.
    pub(super) fn remotes(&self) -> impl Iterator<Item = &'a Segment> + use<'a> {
        let group = self.group;
        let segments = self.inputs.topology.segments.iter();
        segments.filter(move |segment| segment.group != *group)
    }

    /// The nodes of the own region that take no part in the mesh. This one may be among them.
    pub(super) fn outside_neighbours(&self) -> impl Iterator<Item = &'a Outsider> + use<'a> {
        let group = self.group;
        let outsiders = self.inputs.topology.outsiders.iter();
        outsiders.filter(move |node| node.group == *group)
    }

    /// The nodes of other regions that take no part in the mesh.
    pub(super) fn remote_outsiders(&self) -> impl Iterator<Item = &'a Outsider> + use<'a> {
        let group = self.group;
        let outsiders = self.inputs.topology.outsiders.iter();
        outsiders.filter(move |node| node.group != *group)
    }

    /// The other nodes of the own region that take part in the mesh.
    pub(super) fn other_members(&self) -> impl Iterator<Item = &'a Member> + use<'a> {
        let me = self.inputs.me;
        let nodes = self.neighbours().flat_map(|segment| &segment.nodes);
        nodes.filter(move |node| node.name != *me)
    }

    /// The pods of the own region's other nodes, outsiders among them.
    pub(super) fn region_pods(&self) -> impl Iterator<Item = IpNet> + '_ {
        let members = self.other_members().flat_map(|node| &node.pod_cidrs);
        let outsiders = self.outside_neighbours().flat_map(|node| &node.pod_cidrs);
        let own = &self.inputs.flannel.subnets;
        let all = members.chain(outsiders).copied();
        all.filter(|net| !own.contains(net))
    }

    /// The addresses of a remote node that this node carries. Two regions may use the same subnet: an address of
    /// the own region or of a network that this node is connected to is not carried.
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

    /// The aliases of a remote node that this node carries.
    pub(super) fn carried_aliases<'s>(
        &'s self,
        node: &'s Member,
    ) -> impl Iterator<Item = IpAddr> + 's {
        let aliases = node.aliases.keys().copied();
        aliases.filter(|ip| self.connected_to(&IpNet::from(*ip)).is_none())
    }

    /// The aliases of the own region's nodes, this one among them, each with the address that it stands for.
    pub(super) fn region_aliases(&self) -> impl Iterator<Item = (IpAddr, IpAddr)> + '_ {
        let nodes = self.neighbours().flat_map(|segment| &segment.nodes);
        let aliases = nodes.flat_map(|node| &node.aliases);
        let aliases = aliases.map(|(alias, address)| (*alias, *address));
        aliases.filter(|(alias, _)| {
            self.has_family(alias.is_ipv6()) && self.connected_to(&IpNet::from(*alias)).is_none()
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

    /// The probe address of a leader of the own segment, where the segment has other nodes.
    pub(super) fn carried_probe_ip(&self, leader: &Leader) -> Option<IpAddr> {
        let ip = leader.probe_ip?;
        let is_free = self.connected_to(&IpNet::from(ip)).is_none();
        (is_free && self.has_family(ip.is_ipv6())).then_some(ip)
    }

    /// The `allowed-location-ips` of a segment that this node carries. Those inside a network of the own region
    /// belong to the region.
    pub(super) fn carried_location_ips<'s>(
        &'s self,
        segment: &'s Segment,
    ) -> impl Iterator<Item = IpNet> + 's {
        let nets = segment.allowed_location_ips.iter().copied();
        nets.filter(|net| {
            let mut own = self.region_networks.iter();
            !own.any(|network| network.contains(net)) && self.connected_to(net).is_none()
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

    /// The network this node is connected to, if any, that contains a prefix.
    pub(super) fn connected_to(&self, net: &IpNet) -> Option<IpNet> {
        let mut connected = self.inputs.connected.iter();
        connected.find(|network| network.contains(net)).copied()
    }

    /// The network this node is connected to, if any, that contains the address of a remote node. An address at
    /// which the tunnel receives from a leader of that node's segment is the segment's: the handshake proves it.
    pub(super) fn connected_for(&self, segment: &Segment, ip: IpAddr) -> Option<IpNet> {
        let is_observed_there = |leader: &Leader| {
            let observed = leader.find_in(self.inputs.observed);
            observed.is_some_and(|observed| observed.ip() == ip)
        };
        if segment.leaders.iter().any(is_observed_there) {
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

    /// Whether this host's own processes must reach an address of another region without the tunnel.
    ///
    /// A public address is reached directly from every host, so its host answers directly too. If it were routed
    /// into the tunnel here, strict reverse-path filtering would drop packets from it. The same holds for the
    /// source addresses of the tunnel's own datagrams, because the check of an arriving packet has no mark. And
    /// the route to the API server must not depend on the tunnel that is configured through it.
    pub(super) fn is_direct(&self, ip: IpAddr) -> bool {
        is_public(ip) || self.direct.contains(&ip)
    }

    /// The endpoint at which this node's tunnel sends to another leader: the observed one, else the likeliest of
    /// the candidates, all of which are tried ([`super::candidates()`]).
    pub(super) fn endpoint_of(&self, leader: &Leader) -> Option<SocketAddr> {
        let observed = leader.find_in(self.inputs.observed).copied();
        let endpoint = match self.inputs.topology.mode {
            Mode::Native => observed.or_else(|| {
                let candidates = self.candidates.get(&leader.peer_id())?;
                Some(candidates.first()?.address)
            }),
            Mode::Kilo(_) => self.kilos_endpoint_of(leader, observed),
        };
        endpoint.filter(|address| !self.region_underlay.contains(&address.ip()))
    }

    /// Kilo's rule: the observed endpoint for a leader whose operator set a keepalive, the announced one for others.
    fn kilos_endpoint_of(
        &self,
        leader: &Leader,
        observed: Option<SocketAddr>,
    ) -> Option<SocketAddr> {
        let own = self.own_lead().and_then(|own| own.discovered);
        let same_router = |seen: &SocketAddr| own.is_some_and(|own| own.ip() == seen.ip());
        let seen = observed.or_else(|| leader.discovered.filter(|seen| !same_router(seen)));
        seen.filter(|_| leader.behind_nat).or(leader.address)
    }

    /// The endpoint at which it sends to an external peer. A peer without a configured endpoint roams: while this
    /// node receives from it, the device has the newest endpoint.
    pub(super) fn endpoint_of_peer(&self, peer: &ExternalPeer) -> Option<SocketAddr> {
        let peer_addresses = self.inputs.topology.peer_addresses.get(&peer.public_key)?;
        let is_observed = self.inputs.observed.contains_key(&peer.public_key);
        let discovered = peer_addresses.discovered.filter(|_| !is_observed);
        peer_addresses.address.or(discovered)
    }

    /// The UDP port of this node's tunnel: its endpoint's, as in Kilo.
    pub(super) fn listen_port(&self) -> NonZeroU16 {
        self.endpoint
            .and_then(|endpoint| NonZeroU16::new(endpoint.port()))
            .unwrap_or(self.inputs.settings.port)
    }

    /// Whether this node has pods of a family. It carries no traffic of the other.
    pub(super) fn has_family(&self, v6: bool) -> bool {
        self.source(v6).is_some()
    }

    /// This node's address inside the cluster network, the same as flannel's: the first of its pod CIDR. Every
    /// node has a route to it.
    pub(super) fn source(&self, v6: bool) -> Option<IpAddr> {
        let subnets = self.subnets.iter();
        subnets
            .map(IpNet::network)
            .find(|address| address.is_ipv6() == v6)
    }

    /// The next hops to a remote segment, for a family: its leaders on a leader, the leaders of the own segment on
    /// a follower, and on a leader that does not reach it.
    ///
    /// On a leader all of the segment's leaders are behind the tunnel, which looks at a packet's destination alone: the
    /// peers' routes decide which of the leaders receives it. So verdicts on them change no next hop.
    pub(super) fn next_hops(&self, remote: &Segment, v6: bool) -> BTreeSet<NextHop> {
        let hops = self.hops_without_gateway(remote, v6);
        if !hops.contains(&self.tunnel()) {
            return hops;
        }
        // flannel's DirectRouting takes a destination for directly connected if the kernel's route to it has no
        // gateway. With one it never does.
        let ips = remote
            .leaders
            .iter()
            .flat_map(|leader| &leader.wireguard_ips);
        let gateways = ips.copied().filter(|ip| ip.is_ipv6() == v6);
        let through: BTreeSet<_> = gateways
            .map(|via| NextHop {
                onlink: true,
                via: Some(via),
                ..self.tunnel()
            })
            .collect();
        if through.is_empty() { hops } else { through }
    }

    /// The same for destinations without a gateway behind the tunnel: the gateways themselves.
    pub(super) fn hops_without_gateway(&self, remote: &Segment, v6: bool) -> BTreeSet<NextHop> {
        match self.role {
            Role::Leader(_) => {
                let detour = self.detour(remote, v6);
                if detour.is_empty() {
                    [self.tunnel()].into()
                } else {
                    detour
                }
            }
            Role::Follower => self.hops_to(self.leaders_towards(remote), v6),
            Role::Outsider => BTreeSet::new(),
        }
    }

    /// The next hops to other leaders of the own segment.
    pub(super) fn hops_to<'l>(
        &self,
        leaders: impl IntoIterator<Item = &'l Leader>,
        v6: bool,
    ) -> BTreeSet<NextHop> {
        let leaders = leaders.into_iter();
        leaders
            .filter_map(|leader| self.hop_to(self.segment?.member(&leader.node)?, v6))
            .collect()
    }

    pub(super) fn tunnel(&self) -> NextHop {
        NextHop {
            via: None,
            dev: self.inputs.settings.interface.clone(),
            onlink: false,
        }
    }

    /// The next hop to another node of the own region.
    pub(super) fn hop_to(&self, node: &Member, v6: bool) -> Option<NextHop> {
        let flannel = self.inputs.flannel;
        let pods = node.pod_cidrs.iter();
        let pods = pods.into_iter().find(|net| net.addr().is_ipv6() == v6)?;
        // In Kilo's mode claims are not judged: two nodes may have the same pods, and this may be one of them.
        if flannel.subnets.contains(pods) {
            return None;
        }
        let hop = flannel_hop(flannel, pods);
        match self.inputs.settings.encapsulation {
            // Where flannel itself sends directly, its VXLAN device has no neighbour entry.
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

    /// Whether a next hop to a node of the own region leads through flannel's VXLAN device.
    pub(super) fn is_encapsulated(&self, hop: &NextHop) -> bool {
        let vteps = &self.inputs.flannel.vteps;
        vteps.iter().any(|vtep| vtep.name == hop.dev)
    }
}

fn subnets(flannel: &Flannel, pod_cidrs: &[IpNet]) -> Vec<IpNet> {
    let subnets = flannel.subnets.iter().copied();
    subnets.filter(|net| pod_cidrs.contains(net)).collect()
}

/// flannel's own next hop to a node's pods, or where flannel lost it (its device was recreated) the one that
/// flannel would install.
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
