//! Packets on their way through a mesh whose nodes have different verdicts on its leaders: look-up by look-up, over
//! the planned states of all nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use proptest::collection::vec;
use proptest::prelude::*;
use selvedge::flannel::Backend;
use selvedge::liveness::{Cause, PathState};
use selvedge::policy::Encapsulation;
use selvedge::probe::{RegionLeader, Verdicts};
use selvedge::state::{Firewall, NextHop, Route, Ruleset, State, Table};
use selvedge::topology::{NodeName, Topology};

use crate::mesh::{Mesh, leaders, net, node, vpn_peer};

/// Where a packet came from.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum From {
    /// A pod or the host of the node itself.
    Here,
    /// Another node of the region.
    Region,
    /// The tunnel.
    Tunnel,
}

/// A packet at a node.
type Step = (NodeName, From);

/// From one node to the next.
type Hop = (NodeName, NodeName);

/// What a node does with a packet.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Next {
    Delivered,
    /// It left the mesh to an external peer.
    ToPeer,
    Dropped,
    On(Step),
}

/// A mesh with the planned state of each node.
struct Plans<'a> {
    mesh: &'a Mesh,
    topology: &'a Topology,
    states: BTreeMap<NodeName, State>,
}

impl<'a> Plans<'a> {
    fn new(
        mesh: &'a Mesh,
        topology: &'a Topology,
        mut verdicts: impl FnMut(&NodeName) -> Verdicts,
    ) -> Self {
        let states = mesh.names().filter_map(|me| {
            let mesh = Mesh {
                verdicts: verdicts(me),
                ..mesh.clone()
            };
            Some((me.clone(), mesh.plan(topology, me)?))
        });
        Self {
            mesh,
            topology,
            states: states.collect(),
        }
    }

    /// The node that has a gateway: its address in the pod network, or its own.
    fn node_at(&self, gateway: IpAddr) -> Option<&NodeName> {
        let nodes = self.mesh.snapshot.nodes.values();
        let mut at = nodes.filter(|node| {
            let private = node.private_ip.map(|net| net.addr());
            let pods = node.pod_cidrs.iter().map(IpNet::network);
            pods.chain(private).any(|ip| ip == gateway)
        });
        at.next().map(|node| &node.name)
    }

    fn owner(&self, dst: IpAddr) -> Option<&NodeName> {
        let nodes = self.mesh.snapshot.nodes.values();
        let mut owners = nodes.filter(|node| node.pod_cidrs.iter().any(|net| net.contains(&dst)));
        owners.next().map(|node| &node.name)
    }

    /// All ways on that a packet may take, for any hash of its flow.
    fn next(&self, (me, from): &Step, src: IpAddr, dst: IpAddr) -> BTreeSet<Next> {
        let state = &self.states[me];
        let tables = [
            (Table::Members, *from == From::Tunnel),
            (Table::Pods, true),
            (Table::Mesh, true),
        ];
        let tables = tables.iter().filter(|(_, selected)| *selected);
        for (table, _) in tables {
            match look_up(state, *table, dst) {
                None | Some(Route::Throw) => {}
                Some(Route::Unreachable | Route::Blackhole) => return [Next::Dropped].into(),
                Some(Route::Unicast { next_hops, .. }) => {
                    let hops = next_hops.iter();
                    return hops
                        .flat_map(|hop| self.by_hop(hop, me, *from, src, dst))
                        .collect();
                }
            }
        }
        // Table main, with flannel's routes.
        let same_region = |owner: &&NodeName| {
            let group = |node| self.topology.segment_of(node).map(|s| &s.group);
            group(owner) == group(me)
        };
        match self.owner(dst).filter(same_region) {
            Some(owner) if owner == me => [Next::Delivered].into(),
            Some(owner) => [Next::On((owner.clone(), From::Region))].into(),
            None => panic!("{me} sends {dst} by table main"),
        }
    }

    fn by_hop(
        &self,
        hop: &NextHop,
        me: &NodeName,
        from: From,
        src: IpAddr,
        dst: IpAddr,
    ) -> BTreeSet<Next> {
        let state = &self.states[me];
        if hop.dev != "kilo0" {
            if from == From::Region && turns_back(state, src, dst) {
                return [Next::Dropped].into();
            }
            let at = hop.via.and_then(|via| self.node_at(via));
            let at = at.expect("a next hop in the region is a node");
            return [Next::On((at.clone(), From::Region))].into();
        }
        let lengths = state.peers.values().flat_map(|peer| &peer.routes);
        let lengths = lengths.filter(|net| net.contains(&dst));
        let longest = lengths.map(IpNet::prefix_len).max();
        let owners = state.peers.iter().filter(|(_, peer)| {
            let mut nets = peer.routes.iter();
            nets.any(|net| net.contains(&dst) && Some(net.prefix_len()) == longest)
        });
        let next = owners.map(|(id, _)| match id.to_string().split_once('/') {
            Some(("node", name)) => {
                let to = NodeName(name.into());
                let peer = &self.states[&to].peers.iter();
                let own = peer
                    .clone()
                    .find(|(id, _)| id.to_string() == format!("node/{me}"));
                let (_, own) = own.expect("both ends of a tunnel are peers of each other");
                assert!(
                    own.accepts.iter().any(|net| net.contains(&src)),
                    "{to} accepts {src} from {me}"
                );
                Next::On((to, From::Tunnel))
            }
            _ => Next::ToPeer,
        });
        let next = next.collect::<BTreeSet<_>>();
        if next.is_empty() {
            [Next::Dropped].into()
        } else {
            next
        }
    }

    /// Follows a packet by all of its ways. Returns their ends, and the nodes and tunnels on them.
    fn follow(
        &self,
        src: IpAddr,
        dst: IpAddr,
    ) -> Result<(BTreeSet<Next>, BTreeSet<Hop>), TestCaseError> {
        let first = self.owner(src).expect("a pod's node").clone();
        let mut ends = BTreeSet::new();
        let mut hops = BTreeSet::new();
        let mut ways = vec![vec![(first, From::Here)]];
        while let Some(way) = ways.pop() {
            let last = way.last().expect("not empty");
            for next in self.next(last, src, dst) {
                let Next::On(step) = next else {
                    ends.insert(next);
                    continue;
                };
                prop_assert!(
                    !way.contains(&step),
                    "{} to {} goes round: {:?}",
                    src,
                    dst,
                    way
                );
                hops.insert((last.0.clone(), step.0.clone()));
                let mut way = way.clone();
                way.push(step);
                ways.push(way);
            }
        }
        Ok((ends, hops))
    }
}

/// What the nft table of a leader does to a packet from its region that would go to a node of the region again.
fn turns_back(state: &State, src: IpAddr, dst: IpAddr) -> bool {
    let firewall = firewall(state);
    let any = |nets: &BTreeSet<IpNet>, ip: &IpAddr| nets.iter().any(|net| net.contains(ip));
    let guard = &firewall.guard;
    firewall.leader
        && (any(&guard.far, &dst)
            || any(&guard.cluster, &src) && any(&guard.far_from_pods, &dst)
            || any(&guard.wide, &dst) && !any(&guard.near, &dst))
}

fn firewall(state: &State) -> &Firewall {
    match &state.firewall {
        Some(Ruleset::Planned(firewall)) => firewall,
        other => panic!("no plan: {other:?}"),
    }
}

/// The route that the kernel finds in one table.
fn look_up(state: &State, table: Table, ip: IpAddr) -> Option<&Route> {
    let routes = state.routes.iter();
    routes
        .filter(|(key, _)| key.table == table && key.dst.contains(&ip))
        .min_by_key(|(key, _)| (u8::MAX - key.dst.prefix_len(), key.metric))
        .map(|(_, route)| route)
}

/// Regions of one to four nodes with up to three leaders each, and VPN peers.
fn regions() -> impl Strategy<Value = Mesh> {
    let flannel = prop_oneof![
        2 => Just((Backend::Vxlan, false)),
        1 => Just((Backend::Vxlan, true)),
        1 => Just((Backend::HostGw, false)),
    ];
    let encapsulation = prop_oneof![Just(Encapsulation::Always), Just(Encapsulation::Never)];
    (
        vec(1..5u8, 2..4),
        1..4u8,
        flannel,
        encapsulation,
        any::<bool>(),
    )
        .prop_map(
            |(sizes, count, (backend, direct_routing), encapsulation, dual_stack)| {
                let sizes = sizes.into_iter().zip(0u8..);
                let nodes = sizes.flat_map(|(size, region)| {
                    (0..size).map(move |place| {
                        let seed = 10 * region + place + 1;
                        let address = format!("192.168.{region}.{}/24", place + 1);
                        let mut node = node(
                            &format!("n{region}{place}"),
                            &format!("r{region}"),
                            seed,
                            &address,
                        );
                        if dual_stack {
                            node.pod_cidrs.push(net(&format!("fd42:0:0:{seed}::/64")));
                        }
                        node.allowed_location_ips = match place {
                            0 => vec![net(&format!("172.30.{region}.0/24"))],
                            _ => vec![],
                        };
                        node
                    })
                });
                let mut mesh = Mesh::new(nodes);
                mesh.add_peers([
                    vpn_peer("laptop", 101, &["10.5.0.1/32"]),
                    vpn_peer("office", 102, &["172.31.0.0/16", "10.8.0.0/13"]),
                ]);
                mesh.agreed.leaders_per_region = leaders(count);
                // flannel's host-gw has no IPv6 here.
                if dual_stack && backend == Backend::Vxlan {
                    mesh.agreed.subnets.push(net("fd04::/64"));
                } else {
                    for node in mesh.snapshot.nodes.values_mut() {
                        node.pod_cidrs.truncate(1);
                    }
                }
                (mesh.backend, mesh.direct_routing) = (backend, direct_routing);
                mesh.local.encapsulation = encapsulation;
                mesh
            },
        )
}

/// Any verdicts of one node, made of numbers.
fn any_verdicts(topology: &Topology, me: &NodeName, draw: &mut impl FnMut() -> u8) -> Verdicts {
    let states = [
        PathState::Up,
        PathState::Up,
        PathState::Unknown,
        PathState::Draining,
        PathState::Down(Cause::Silent),
        PathState::Down(Cause::NotForwarding),
    ];
    let own = topology.segment_of(me);
    let mut verdicts = Verdicts::default();
    for segment in &topology.segments {
        for leader in segment.leaders.iter().filter(|leader| leader.node != *me) {
            let state = states[usize::from(draw()) % states.len()];
            if own.is_some_and(|own| own.name == segment.name) {
                let others = topology.segments.iter().map(|segment| segment.name.clone());
                let unreached = others.filter(|_| draw().is_multiple_of(3)).collect();
                let all = topology.segments.iter().map(|segment| segment.name.clone());
                let direct = all.filter(|_| draw().is_multiple_of(2)).collect();
                let known = RegionLeader {
                    state,
                    unreached,
                    direct: draw().is_multiple_of(2).then_some(direct),
                };
                verdicts.leaders.insert(leader.node.clone(), known);
            } else if topology.is_leader(me) {
                verdicts.peers.insert(leader.peer_id(), state);
            }
        }
    }
    let peers = verdicts.peers.keys().cloned().collect::<Vec<_>>();
    for segment in &topology.segments {
        let relay = peers.get(usize::from(draw()));
        if let Some(relay) = relay.filter(|_| own.is_some_and(|own| own.group != segment.group)) {
            verdicts.relays.insert(segment.name.clone(), relay.clone());
        }
    }
    verdicts
}

/// The same verdict on every path.
fn uniform(topology: &Topology, me: &NodeName, state: PathState) -> Verdicts {
    let mut verdicts = any_verdicts(topology, me, &mut || 0);
    verdicts.relays.clear();
    verdicts.peers.values_mut().for_each(|peer| *peer = state);
    for leader in verdicts.leaders.values_mut() {
        *leader = RegionLeader {
            state,
            unreached: topology.segments.iter().map(|s| s.name.clone()).collect(),
            direct: None,
        };
    }
    verdicts
}

/// The first pod of each node, in each family.
fn pods(mesh: &Mesh) -> Vec<(NodeName, IpAddr)> {
    let nodes = mesh.snapshot.nodes.values();
    let pods = nodes.flat_map(|node| {
        let hosts = node.pod_cidrs.iter().filter_map(|net| net.hosts().nth(4));
        hosts.map(|pod| (node.name.clone(), pod))
    });
    pods.collect()
}

/// The dead nodes and the broken tunnels of a mesh.
struct Damage {
    dead: BTreeSet<NodeName>,
    broken: BTreeSet<Hop>,
}

impl Damage {
    fn new(topology: &Topology, draw: &mut impl FnMut() -> u8) -> Self {
        let leaders = topology
            .leaders()
            .map(|(segment, leader)| (segment, &leader.node));
        let leaders = leaders.collect::<Vec<_>>();
        let dead = leaders.iter().filter(|_| draw().is_multiple_of(5));
        let dead = dead.map(|(_, node)| (*node).clone()).collect();
        let mut broken = BTreeSet::new();
        for (one, node) in &leaders {
            for (other, far) in &leaders {
                if one.name < other.name && draw().is_multiple_of(4) {
                    broken.insert(((*node).clone(), (*far).clone()));
                    broken.insert(((*far).clone(), (*node).clone()));
                }
            }
        }
        Self { dead, broken }
    }

    fn is_up(&self, from: &NodeName, to: &NodeName) -> bool {
        let tunnel = (from.clone(), to.clone());
        !self.dead.contains(to) && !self.broken.contains(&tunnel)
    }

    /// Whether a leader reaches a segment.
    fn reaches(&self, leader: &NodeName, segment: &selvedge::topology::Segment) -> bool {
        let mut far = segment.leaders.iter();
        !self.dead.contains(leader) && far.any(|far| self.is_up(leader, &far.node))
    }

    /// What a node's echoes say of it.
    fn verdicts(&self, topology: &Topology, me: &NodeName) -> Verdicts {
        let mut verdicts = any_verdicts(topology, me, &mut || 0);
        verdicts.relays.clear();
        let state = |is_up| match is_up {
            true => PathState::Up,
            false => PathState::Down(Cause::Silent),
        };
        for (segment, leader) in topology.leaders() {
            let is_up = self.is_up(me, &leader.node);
            if let Some(peer) = verdicts.peers.get_mut(&leader.peer_id()) {
                *peer = state(is_up);
            }
            if let Some(known) = verdicts.leaders.get_mut(&leader.node) {
                let others = topology
                    .segments
                    .iter()
                    .filter(|other| other.name != segment.name);
                let unreached = others.filter(|other| !self.reaches(&leader.node, other));
                *known = RegionLeader {
                    state: state(is_up),
                    unreached: unreached.map(|other| other.name.clone()).collect(),
                    direct: None,
                };
            }
        }
        verdicts
    }
}

proptest! {
    // 256 cases, or as many as PROPTEST_CASES asks for.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Each node judges on its own, and may be wrong.
    #[test]
    fn with_any_verdicts_no_packet_goes_round_and_none_leaves_the_mesh(
        mesh in regions(),
        numbers in vec(any::<u8>(), 64),
    ) {
        let topology = mesh.topology();
        let mut numbers = numbers.iter().cycle().copied();
        let mut draw = move || numbers.next().unwrap_or_default();
        let plans = Plans::new(&mesh, &topology, |me| any_verdicts(&topology, me, &mut draw));
        let pods = pods(&mesh);
        for (node, src) in &pods {
            for (at, dst) in pods.iter().filter(|(at, dst)| at != node && dst.is_ipv6() == src.is_ipv6()) {
                let (ends, _) = plans.follow(*src, *dst)?;
                prop_assert!(!ends.contains(&Next::ToPeer), "{} to {}", src, dst);
                let group = |node| topology.segment_of(node).map(|segment| &segment.group);
                if group(node) == group(at) {
                    prop_assert_eq!(ends, [Next::Delivered].into());
                }
            }
            for peer in ["10.5.0.1", "172.31.7.7", "10.9.0.1"].iter().filter(|_| src.is_ipv4()) {
                let (ends, _) = plans.follow(*src, peer.parse().unwrap())?;
                prop_assert!(!ends.contains(&Next::Delivered), "{} to {}", src, peer);
            }
        }
    }

    /// Of dead leaders and broken tunnels no packet suffers while the region has a leader with a way.
    #[test]
    fn with_true_verdicts_every_packet_arrives_that_has_a_way(
        mesh in regions(),
        numbers in vec(any::<u8>(), 64),
    ) {
        let topology = mesh.topology();
        let mut numbers = numbers.iter().cycle().copied();
        let damage = Damage::new(&topology, &mut || numbers.next().unwrap_or_default());
        let plans = Plans::new(&mesh, &topology, |me| damage.verdicts(&topology, me));
        let pods = pods(&mesh);
        let alive = |node: &NodeName| !damage.dead.contains(node);
        for (node, src) in pods.iter().filter(|(node, _)| alive(node)) {
            for (at, dst) in pods.iter().filter(|(at, _)| alive(at)) {
                let (Some(own), Some(far)) = (topology.segment_of(node), topology.segment_of(at)) else {
                    continue;
                };
                let mut leaders = own.leaders.iter();
                let has_way = leaders.any(|leader| damage.reaches(&leader.node, far));
                if own.name == far.name || src.is_ipv6() != dst.is_ipv6() || !has_way {
                    continue;
                }
                let (ends, hops) = plans.follow(*src, *dst)?;
                prop_assert_eq!(ends, [Next::Delivered].into(), "{} to {}: {:?}", node, at, hops);
                for hop in hops {
                    prop_assert!(alive(&hop.1) && !damage.broken.contains(&hop), "{:?}", hop);
                }
            }
        }
    }

    /// Verdicts choose among ways. What there is a way to, who may send what, and the nft table are not theirs.
    #[test]
    fn verdicts_change_next_hops_and_the_tunnels_routes_alone(
        mesh in regions(),
        numbers in vec(any::<u8>(), 64),
    ) {
        let topology = mesh.topology();
        let mut numbers = numbers.iter().cycle().copied();
        let mut draw = move || numbers.next().unwrap_or_default();
        let without = Plans::new(&mesh, &topology, |_| Verdicts::default());
        let with = Plans::new(&mesh, &topology, |me| any_verdicts(&topology, me, &mut draw));
        for (me, before) in &without.states {
            let mut after = with.states[me].clone();
            prop_assert!(after.routes.keys().eq(before.routes.keys()));
            for (key, route) in &mut after.routes {
                if let (
                    Route::Unicast { next_hops, mtu, .. },
                    Route::Unicast { next_hops: old, mtu: full, .. },
                ) = (route, &before.routes[key])
                {
                    prop_assert!(!next_hops.is_empty());
                    next_hops.clone_from(old);
                    // Less through a relay.
                    prop_assert!(*mtu <= *full);
                    *mtu = *full;
                }
            }
            let (mut owners, mut relayed) = (BTreeMap::new(), BTreeSet::new());
            for (id, peer) in &mut after.peers {
                prop_assert!(peer.routes.is_subset(&peer.accepts));
                let segment = topology.leaders().find(|(_, leader)| leader.peer_id() == *id);
                let segment = segment.map(|(segment, _)| &segment.name);
                for net in &peer.routes {
                    let other = owners.insert(*net, segment);
                    prop_assert!(other.is_none_or(|other| other == segment), "{} has two owners", net);
                }
                peer.routes.clone_from(&before.peers[id].routes);
                for address in &peer.relays_to {
                    prop_assert!(relayed.insert(*address), "{} has two relays", address);
                }
                peer.relays_to.clear();
                peer.relayed_from.clear();
            }
            for peer in before.peers.values() {
                prop_assert!(peer.routes.iter().all(|net| owners.contains_key(net)));
            }
            prop_assert_eq!(&after, before);
        }
    }

    #[test]
    fn verdicts_that_are_all_down_change_nothing(mesh in regions()) {
        let topology = mesh.topology();
        let without = Plans::new(&mesh, &topology, |_| Verdicts::default());
        for state in [PathState::Unknown, PathState::Down(Cause::Silent), PathState::Down(Cause::NotForwarding)] {
            let with = Plans::new(&mesh, &topology, |me| {
                let mut verdicts = uniform(&topology, me, state);
                if state == PathState::Unknown {
                    verdicts.leaders.values_mut().for_each(|leader| leader.unreached.clear());
                }
                verdicts
            });
            for (me, state) in &with.states {
                prop_assert_eq!(state, &without.states[me]);
            }
        }
    }
}
