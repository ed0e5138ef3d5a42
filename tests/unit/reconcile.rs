//! Properties of the topology, the plan and the diff that hold for every cluster.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use proptest::prelude::*;
use selvedge::diff::diff;
use selvedge::state::{BACKSTOP_METRIC, Link, Route, RouteKey, State, Table};
use selvedge::topology::{
    Claim, Granularity, Ledger, Node, NodeName, Segment, SegmentName, Topology,
};
use selvedge::wireguard::{PeerConfig, PeerId};

use crate::cluster_strategy::{any_mesh, mesh, node};
use crate::fake_kernel::FakeKernel;
use crate::mesh::{Mesh, With, ip, is_v6, key, lines, net, node as node_of, recorded};

fn reach(kernel: &mut FakeKernel, desired: &State) -> Result<(), TestCaseError> {
    for change in diff(&kernel.observe(), desired) {
        kernel.apply(&change).map_err(TestCaseError::fail)?;
    }
    let left = lines(&diff(&kernel.observe(), desired));
    prop_assert_eq!(left, "", "that is left to do");
    prop_assert_eq!(&kernel.observe(), desired);
    Ok(())
}

/// The devices and gateways of each destination.
fn unicast<'a>(state: &'a State, table: Table, dst: &IpNet) -> Vec<&'a RouteKey> {
    let is_unicast = |route: &Route| matches!(route, Route::Unicast { .. });
    let routes = state.routes.iter();
    routes
        .filter(|(key, route)| key.table == table && key.dst == *dst && is_unicast(route))
        .map(|(key, _)| key)
        .collect()
}

/// The route that the kernel finds in one table: that of the longest prefix and the lowest metric.
fn look_up(state: &State, table: Table, ip: std::net::IpAddr) -> Option<&Route> {
    let routes = state.routes.iter();
    routes
        .filter(|(key, _)| key.table == table && key.dst.contains(&ip))
        .min_by_key(|(key, _)| (u8::MAX - key.dst.prefix_len(), key.metric))
        .map(|(_, route)| route)
}

type Destinations = BTreeSet<(Table, IpNet)>;

/// The destinations with a route, and those with a route or a backstop.
fn destinations(state: &State) -> (Destinations, Destinations) {
    let (mut routed, mut held) = (BTreeSet::new(), BTreeSet::new());
    for (key, route) in &state.routes {
        match route {
            Route::Unicast { .. } => {
                routed.insert((key.table, key.dst));
                held.insert((key.table, key.dst));
            }
            Route::Unreachable | Route::Blackhole => {
                held.insert((key.table, key.dst));
            }
            Route::Throw => {}
        }
    }
    (routed, held)
}

fn elsewhere<'a>(
    topology: &'a Topology,
    me: &'a NodeName,
) -> impl Iterator<Item = &'a Segment> + 'a {
    let group = topology.segment_of(me).map(|segment| &segment.group);
    let segments = topology.segments.iter();
    segments.filter(move |segment| Some(&segment.group) != group)
}

/// Pods look in the table `Pods` first. A backstop there, without its route, refuses what `Mesh` routes already.
#[test]
fn a_destination_that_moves_to_another_table_is_refused_at_no_moment() {
    let routes = |table| {
        let route = Route::Unicast {
            next_hops: BTreeSet::new(),
            src: None,
            mtu: None,
        };
        let key = |metric| RouteKey {
            table,
            dst: net("192.168.51.12/32"),
            metric,
        };
        [(key(0), route), (key(BACKSTOP_METRIC), Route::Unreachable)]
    };
    let state = |table| State {
        routes: routes(table).into(),
        ..State::default()
    };
    insta::assert_snapshot!(lines(&diff(&state(Table::Pods), &state(Table::Mesh))), @"
    ip route replace table 5130 192.168.51.12 proto 118
    ip route replace table 5130 unreachable 192.168.51.12 metric 4278198272 proto 118
    ip route del table 5131 192.168.51.12 metric 4278198272 proto 118
    ip route del table 5131 192.168.51.12 proto 118
    ");
}

/// An operator sees that a key is exchanged: `wg set` takes both peers in one command.
#[test]
fn a_peer_whose_key_changes_is_changed_in_place() {
    let (id, prefix) = (PeerId::new("node/a"), net("10.42.1.0/24"));
    let with = |seed| {
        let peer = PeerConfig::new(key(seed)).with_allowed_ips([prefix].into());
        let link = Link {
            name: "kilo0".into(),
            mtu: 1420,
            up: true,
        };
        State {
            link: Some(link),
            peers: [(id.clone(), peer)].into(),
            ..State::default()
        }
    };
    let changes = lines(&diff(&with(1), &with(2)));
    assert_eq!(
        changes.trim(),
        format!(
            "wg set kilo0 peer {} remove peer {} allowed-ips 10.42.1.0/24",
            key(1),
            key(2)
        )
    );
}

proptest! {
    // 256 cases, or as many as PROPTEST_CASES asks for.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Agents receive nodes in different orders and must agree.
    #[test]
    fn the_topology_ignores_the_order_of_nodes_and_peers(
        mesh in mesh(),
        (nodes, peers) in mesh_parts(),
    ) {
        let build = |nodes: &[Node], reverse: bool| {
            let mut other = mesh.clone();
            other.snapshot.nodes.clear();
            let mut peers = peers.clone();
            if reverse {
                peers.reverse();
            }
            for node in nodes {
                other.snapshot.nodes.insert(node.name.clone(), node.clone());
            }
            other.add_peers(peers);
            other.topology()
        };
        let mut sorted = nodes.clone();
        sorted.sort_by(|a, b| a.name.cmp(&b.name));

        prop_assert_eq!(build(&nodes, false), build(&sorted, true));
    }

    #[test]
    fn applying_the_diff_reaches_the_desired_state_without_an_interruption(
        before in any_mesh(),
        after in any_mesh(),
    ) {
        for me in before.names().filter(|me| after.snapshot.nodes.contains_key(*me)) {
            // For one node, whose own flannel and addresses stay the same.
            let mut after = after.clone();
            after.backend = before.backend;
            after.direct_routing = before.direct_routing;
            let own = before.snapshot.nodes[me].clone();
            let own = Node { region: after.snapshot.nodes[me].region.clone(), ..own };
            after.snapshot.nodes.insert(me.clone(), own);
            let states = [&before, &after].map(|mesh| mesh.plan(&mesh.topology(), me));
            let [Some(first), Some(second)] = states else { continue };

            let mut kernel = FakeKernel::before_the_agent(&before, me);
            reach(&mut kernel, &first)?;

            let (old, new) = (destinations(&first), destinations(&second));
            for change in diff(&kernel.observe(), &second) {
                kernel.apply(&change).map_err(TestCaseError::fail)?;

                let now = destinations(&kernel.observe());
                let hole = old.0.intersection(&new.0).find(|dst| !now.0.contains(*dst));
                prop_assert_eq!(hole, None, "no way there after {}", change);
                let leak = old.1.intersection(&new.1).find(|dst| !now.1.contains(*dst));
                prop_assert_eq!(leak, None, "not even refused after {}", change);
            }
            let left = lines(&diff(&kernel.observe(), &second));
            prop_assert_eq!(left, "", "that is left to do");
            prop_assert_eq!(&kernel.observe(), &second);
            prop_assert!(diff(&second, &second).is_empty());
        }
    }

    /// Two peers with the same allowed IP would take each other's traffic. A wide item of a location or an external
    /// peer may contain single nodes that joined later: the longer prefix always wins.
    #[test]
    fn allowed_ips_of_peers_are_disjoint(mesh in mesh()) {
        let topology = mesh.topology();
        for me in mesh.names() {
            let Some(state) = mesh.plan(&topology, me) else { continue };
            let mut owners = BTreeMap::new();
            for (id, peer) in &state.peers {
                prop_assert_eq!(&peer.routes, &peer.accepts);
                for net in &peer.routes {
                    prop_assert_eq!(owners.insert(*net, id), None, "{} is claimed twice", net);
                }
            }
            let offered = topology.segments.iter().flat_map(|s| &s.allowed_location_ips);
            let peers = topology.peers.iter().flat_map(|peer| &peer.allowed_ips);
            let offered = offered.chain(peers).collect::<BTreeSet<_>>();
            for (net, owner) in &owners {
                for (inner, other) in owners.range(net..).take_while(|(n, _)| net.contains(&n.addr())) {
                    if owner != other && net.contains(inner) {
                        let host = inner.prefix_len() == inner.max_prefix_len();
                        prop_assert!(host && offered.contains(net), "{} is inside of {}", inner, net);
                    }
                }
            }
        }
    }

    /// What a node published it has, unless another holds it by an older claim; and once all have published, nothing
    /// changes.
    #[test]
    fn an_alias_has_one_node_and_stays_once_it_is_published(mut mesh in mesh()) {
        let given = |mesh: &Mesh| {
            let topology = mesh.topology();
            let members = topology.segments.iter().flat_map(|segment| &segment.nodes);
            let mut aliases = BTreeMap::new();
            for member in members {
                for (alias, address) in &member.aliases {
                    let before = aliases.insert(*alias, (member.name.clone(), *address));
                    assert_eq!(before, None, "{alias} has two nodes");
                }
            }
            aliases
        };
        let first = given(&mesh);
        prop_assert!(first.is_empty() || !mesh.agreed.alias_pools.is_empty());
        for (alias, (_, address)) in &first {
            let mut pools = mesh.agreed.alias_pools.iter();
            prop_assert!(pools.any(|pool| pool.contains(alias)) && alias.is_ipv4() == address.is_ipv4());
        }
        let topology = mesh.topology();
        for node in mesh.snapshot.nodes.values_mut() {
            node.aliases = topology.alias_annotation(&node.name).unwrap_or_else(|| node.aliases.clone());
        }
        prop_assert_eq!(first, given(&mesh));
    }

    #[test]
    fn every_remote_pod_cidr_has_one_route_and_one_backstop_on_every_node(mesh in mesh()) {
        let topology = mesh.topology();
        for me in mesh.names() {
            let (Some(state), Some(own)) = (mesh.plan(&topology, me), topology.segment_of(me)) else {
                continue;
            };
            let leaders = own.leaders.iter().map(|leader| own.member(&leader.node).unwrap());
            let leaders: Vec<_> = leaders.collect();
            for segment in elsewhere(&topology, me) {
                for pods in segment.nodes.iter().flat_map(|node| &node.pod_cidrs) {
                    let same_family = |net: &&IpNet| is_v6(net) == is_v6(pods);
                    let mine = &mesh.snapshot.nodes[me].pod_cidrs;
                    if !mine.iter().any(|net| same_family(&net)) {
                        continue;
                    }
                    let backstop = RouteKey { table: Table::Mesh, dst: *pods, metric: BACKSTOP_METRIC };
                    prop_assert_eq!(state.routes.get(&backstop), Some(&Route::Unreachable));

                    // flannel has a route to the leader of this node, if that is another node.
                    let reachable = own.leader(me).is_some()
                        || leaders.iter().flat_map(|node| &node.pod_cidrs).filter(same_family).any(|net| {
                            let flannel = mesh.flannel(me);
                            flannel.next_hops.contains_key(net)
                        });
                    let ways = unicast(&state, Table::Mesh, pods).len();
                    prop_assert_eq!(ways, usize::from(reachable), "{} on {}", pods, me);
                }
            }
        }
    }

    /// Two regions may use the same subnet: flannel and table main reach the addresses of the own region.
    #[test]
    fn addresses_of_the_own_region_are_not_routed_to_another(mesh in mesh()) {
        let topology = mesh.topology();
        for me in mesh.names() {
            let (Some(state), Some(own)) = (mesh.plan(&topology, me), topology.segment_of(me)) else {
                continue;
            };
            let near = topology.segments.iter().filter(|s| s.group == own.group);
            for member in near.flat_map(|segment| &segment.nodes) {
                let pods = member.pod_cidrs.iter().map(IpNet::network);
                for ip in pods.chain(member.underlay.iter().copied()) {
                    for table in [Table::Mesh, Table::Pods] {
                        let found = look_up(&state, table, ip);
                        prop_assert!(
                            matches!(found, None | Some(Route::Throw)),
                            "{} is near {} and yet {:?}", ip, me, found
                        );
                    }
                }
            }
        }
    }

    /// Both ends of a tunnel are peers of each other, and each accepts the other's pods.
    #[test]
    fn both_leaders_of_a_tunnel_have_each_other_as_peers(mesh in mesh()) {
        let topology = mesh.topology();
        for (_, leader) in topology.leaders() {
            let state = mesh.plan(&topology, &leader.node).unwrap();
            for other in elsewhere(&topology, &leader.node) {
                let peer = &state.peers[&other.primary().peer_id()];
                let mut pods = other.nodes.iter().flat_map(|node| &node.pod_cidrs);
                prop_assert!(pods.all(|net| peer.routes.contains(net)));
            }
            let leaders = elsewhere(&topology, &leader.node).flat_map(|segment| &segment.leaders);
            prop_assert_eq!(state.peers.len(), leaders.count() + topology.peers.len());
        }
    }

    /// A node that joins in a region of its own takes nothing from the others, for any of its statements.
    #[test]
    fn a_newcomer_takes_nothing_from_other_nodes(mesh in mesh(), newcomer in node(11)) {
        let mut mesh = mesh;
        settle(&mut mesh);
        let old = mesh.topology();
        let newcomer = newcomer.with(|node| {
            node.created = 1 << 40;
            node.region.0 = "zz".into();
            node.name.0 = "zz".into();
            // Observations of other leaders' endpoints are left to the present leaders.
            node.discovered_endpoints.clear();
            node.ledger = recorded(node, node.created);
        });
        let mut larger = mesh.clone();
        larger.snapshot.nodes.insert(newcomer.name.clone(), newcomer);
        let new = larger.topology();

        for me in mesh.names() {
            let (Some(before), Some(after)) = (mesh.plan(&old, me), larger.plan(&new, me)) else {
                continue;
            };
            prop_assert_eq!(&before.addresses, &after.addresses);
            // An address that overlaps from now on gets an alias.
            let is_alias = |net: &IpNet| mesh.agreed.alias_pools.iter().any(|pool| pool.contains(net));
            for (id, peer) in &before.peers {
                let mut now = after.peers[id].clone();
                now.routes.retain(|net| peer.routes.contains(net) || !is_alias(net));
                now.accepts.retain(|net| peer.accepts.contains(net) || !is_alias(net));
                prop_assert_eq!(&now, peer);
            }
            for (key, route) in &before.routes {
                prop_assert_eq!(after.routes.get(key), Some(route), "{:?} on {}", key, me);
            }
            prop_assert!(before.rules.is_subset(&after.rules));
        }
    }

    /// A newcomer in any region, with any name, whose Node is older than all others, takes nothing from Ready nodes
    /// that recorded their claims. It records its own claims as the admission policy allows: not in the past.
    #[test]
    fn a_newcomer_with_an_old_object_takes_nothing_that_is_recorded(
        mesh in mesh(),
        newcomer in node(11),
        name in prop_oneof![Just("aa"), Just("zz")],
        leads in any::<bool>(),
    ) {
        let mut mesh = mesh;
        for node in mesh.snapshot.nodes.values_mut() {
            node.ready = true;
        }
        settle(&mut mesh);
        let newcomer = newcomer.with(|node| {
            node.created = -1;
            node.name.0 = name.into();
            // Only the control plane and the operator write these.
            node.pod_cidrs = vec![net("10.42.11.0/24")];
            node.leader = false;
            node.allowed_location_ips.clear();
            node.discovered_endpoints.clear();
            node.ledger = recorded(node, SETTLED + 1);
            if leads {
                let lead = Claim::Lead(SegmentName::Location(node.region.clone()));
                let claims = node.ledger.iter().map(|(claim, _)| claim.clone());
                let claims = claims.chain([lead]).collect::<Vec<_>>();
                node.ledger = Ledger::default().renewed(claims, Some(SETTLED + 1));
            }
        });
        let newcomer_ips = newcomer.internal_ips.clone();
        let newcomer_name = newcomer.name.clone();
        let mut larger = mesh.clone();
        larger.snapshot.nodes.insert(newcomer.name.clone(), newcomer);
        let (old, new) = (mesh.topology(), larger.topology());

        for segment in &old.segments {
            let leader = &segment.primary().node;
            let now = new.segment_of(leader).map(|segment| (&segment.name, &segment.primary().node));
            prop_assert_eq!(now, Some((&segment.name, leader)));
            for member in &segment.nodes {
                let now = new.member(&member.name);
                prop_assert_eq!(now.map(|now| &now.addresses), Some(&member.addresses), "{}", member.name);
                let mut aliases = member.aliases.keys();
                prop_assert!(aliases.all(|alias| now.is_some_and(|now| now.aliases.contains_key(alias))));
            }
        }
        prop_assert_eq!(&old.peers, &new.peers);
        for me in mesh.names() {
            let (Some(before), Some(after)) = (mesh.plan(&old, me), larger.plan(&new, me)) else {
                continue;
            };
            prop_assert_eq!(&before.addresses, &after.addresses);
            // Where two regions share a subnet, an address in it belongs to the own region and is not routed to the
            // other one.
            let group = |name: &NodeName| {
                let outside = new.outsider(name).map(|outsider| &outsider.group);
                new.segment_of(name).map(|segment| &segment.group).or(outside)
            };
            let near = group(me).is_some() && group(me) == group(&newcomer_name);
            for (id, peer) in &before.peers {
                let now = &after.peers[id];
                let mut lost = peer.routes.difference(&now.routes);
                let own = |net: &IpNet| near && newcomer_ips.contains(&net.addr());
                prop_assert!(lost.all(own), "{} on {}", id, me);
                let own = near && peer.endpoint.is_some_and(|at| newcomer_ips.contains(&at.ip()));
                prop_assert!(own || peer.endpoint == now.endpoint, "{} on {}", id, me);
            }
        }
    }
}

/// The time at which the nodes of a settled mesh recorded their claims: after all objects were created.
const SETTLED: i64 = 1 << 30;

/// A mesh that has settled: leaders have published their addresses, and all claims are recorded.
fn settle(mesh: &mut Mesh) {
    for node in mesh.snapshot.nodes.values_mut() {
        node.ledger = Ledger::default();
    }
    for (_, leader) in mesh.topology().leaders() {
        let ips = leader.wireguard_ips.iter().copied();
        mesh.node(&leader.node.0).wireguard_ips = ips.map(IpNet::from).collect();
    }
    let topology = mesh.topology();
    for node in mesh.snapshot.nodes.values_mut() {
        let aliases = topology.alias_annotation(&node.name);
        node.aliases = aliases.unwrap_or_default();
    }
    for node in mesh.snapshot.nodes.values_mut() {
        node.ledger = recorded(node, SETTLED);
    }
    for segment in mesh.topology().segments {
        let leader = mesh.node(&segment.primary().node.0);
        let claims = leader.ledger.iter().map(|(claim, _)| claim.clone());
        let claims = claims
            .chain([Claim::Lead(segment.name)])
            .collect::<Vec<_>>();
        leader.ledger = leader.ledger.renewed(claims, Some(SETTLED));
    }
}

fn mesh_parts() -> impl Strategy<Value = (Vec<Node>, Vec<selvedge::topology::ExternalPeer>)> {
    let nodes = crate::cluster_strategy::nodes()
        .prop_map(Just)
        .prop_flat_map(Strategy::prop_shuffle);
    (nodes, crate::cluster_strategy::peers())
}

#[test]
fn the_fake_kernel_refuses_what_the_kernel_refuses() {
    let mesh = Mesh::new([
        crate::mesh::node("a", "a", 1, "192.168.1.1/24"),
        crate::mesh::node("b", "b", 2, "192.168.2.1/24"),
    ]);
    let me = NodeName("a".into());
    let desired = mesh.state("a");
    let changes = diff(&State::default(), &desired);

    // In the reverse order something that is needed is missing.
    let mut kernel = FakeKernel::before_the_agent(&mesh, &me);
    let backwards = changes.iter().rev().map(|change| kernel.apply(change));
    assert!(backwards.filter(Result::is_err).count() > 5);

    // Existing objects are not created again.
    let mut kernel = FakeKernel::before_the_agent(&mesh, &me);
    assert!(changes.iter().all(|change| kernel.apply(change).is_ok()));
    assert!(changes.iter().all(|change| kernel.apply(change).is_err()));

    // The kernel deletes the routes with the last address.
    let link = selvedge::diff::Change::Kernel(selvedge::diff::KernelChange::DeleteAddress {
        dev: "kilo0".into(),
        address: net("10.42.1.0/32"),
    });
    kernel.apply(&link).unwrap();
    let wireguard = selvedge::diff::Change::Kernel(selvedge::diff::KernelChange::DeleteAddress {
        dev: "kilo0".into(),
        address: net("10.4.0.1/32"),
    });
    kernel.apply(&wireguard).unwrap();
    let left = kernel.observe().routes;
    assert!(
        left.values()
            .all(|route| !matches!(route, Route::Unicast { .. }))
    );
}

/// Both nodes publish an address that is not in their status, so their status counts, and it is the same. The first
/// node holds it. To the second it is its own network.
#[test]
fn a_wide_prefix_takes_no_route_to_an_address_that_two_nodes_claim() {
    let claimant = |number: u8| {
        let name = format!("node-{number}");
        node_of(&name, "r0", number, "192.168.0.1/24").with(|node| {
            node.internal_ips = vec![ip("192.168.77.7")];
        })
    };
    let mut mesh = Mesh::new(vec![claimant(4), claimant(5)]);
    mesh.agreed.granularity = Granularity::Full;
    let route = |mesh: &Mesh| {
        let routes = mesh.state("node-5").routes;
        let mut routes = routes.into_iter();
        routes.find(|(key, _)| key.dst == net("192.168.77.7/32"))
    };
    let alone = route(&mesh);
    assert!(
        matches!(alone, Some((_, Route::Unicast { .. }))),
        "{alone:?}"
    );

    let newcomer = node_of("zz", "zz", 9, "192.168.1.5/24").with(|node| {
        node.allowed_location_ips = vec![net("192.168.0.0/16")];
    });
    mesh.snapshot.nodes.insert(newcomer.name.clone(), newcomer);
    assert_eq!(route(&mesh), alone);
}
