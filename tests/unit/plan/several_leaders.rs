//! A region with two leaders: what its nodes and a leader elsewhere do, and how they follow verdicts.

use selvedge::liveness::{Cause, PathState};
use selvedge::probe::{RegionLeader, Verdicts};
use selvedge::topology::{Segment, SegmentName, Topology};
use selvedge::wireguard::PeerId;

use super::*;
use crate::fake_kernel::FakeKernel;

/// The main scenario with two leaders a region: node-agent-01 and node-agent-02 lead region nd.
fn two_leaders() -> (Mesh, Topology) {
    let mut mesh = two_regions();
    mesh.agreed.leaders_per_region = leaders(2);
    let topology = mesh.topology();
    (mesh, topology)
}

fn state(mesh: &Mesh, topology: &Topology, me: &str) -> State {
    let state = mesh.plan(topology, &NodeName(me.into()));
    state.expect("the cluster knows the node")
}

/// The commands of a fresh node that begin with one of these words, without backstops.
fn commands(mesh: &Mesh, topology: &Topology, me: &str, wanted: &[&str]) -> String {
    let changes = diff(&State::default(), &state(mesh, topology, me));
    let text = lines(&changes).replace(" proto 118", "");
    let wanted = |line: &&str| wanted.iter().any(|start| line.starts_with(start));
    let lines = text.lines().filter(wanted);
    lines
        .filter(|line| !line.contains("unreachable"))
        .map(|line| format!("{line}\n"))
        .collect()
}

#[test]
fn a_remote_leader_has_a_peer_for_each_leader_and_routes_over_all_of_them() {
    let (mesh, topology) = two_leaders();
    let wanted = ["wg set kilo0 peer", "ip route replace table"];
    insta::assert_snapshot!(commands(&mesh, &topology, "node-master", &wanted), @"
    wg set kilo0 peer h/wYe0dl8DAI8SLTR2E+bEkgxVvTFwS0ArNTXESFtFw= endpoint 192.168.50.12:51820 persistent-keepalive 25 allowed-ips 10.4.0.2/32,10.4.0.3/32,10.42.1.0/24,10.42.2.0/24,10.42.3.0/24,192.168.50.11/32,192.168.50.12/32,192.168.50.13/32
    wg set kilo0 peer jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w= endpoint 198.51.100.7:24276 persistent-keepalive 25 allowed-ips 10.4.0.2/32,10.4.0.3/32,10.42.1.0/24,10.42.2.0/24,10.42.3.0/24,192.168.50.11/32,192.168.50.12/32,192.168.50.13/32
    ip route replace table 5130 throw 10.42.0.0/24
    ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.0.0 mtu 1420
    ip route replace table 5130 10.4.0.3 dev kilo0 src 10.42.0.0 mtu 1420
    ip route replace table 5130 10.42.1.0/24 nexthop via 10.4.0.2 dev kilo0 onlink nexthop via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420
    ip route replace table 5130 10.42.2.0/24 nexthop via 10.4.0.2 dev kilo0 onlink nexthop via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420
    ip route replace table 5130 10.42.3.0/24 nexthop via 10.4.0.2 dev kilo0 onlink nexthop via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420
    ip route replace table 5130 192.168.50.11 nexthop via 10.4.0.2 dev kilo0 onlink nexthop via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420
    ip route replace table 5130 192.168.50.13 nexthop via 10.4.0.2 dev kilo0 onlink nexthop via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420
    ip route replace table 5131 192.168.50.12 nexthop via 10.4.0.2 dev kilo0 onlink nexthop via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420
    ");
}

#[test]
fn a_follower_spreads_its_flows_over_the_leaders_of_its_segment() {
    let (mesh, topology) = two_leaders();
    let wanted = ["wg set kilo0 peer", "ip route replace table"];
    insta::assert_snapshot!(commands(&mesh, &topology, "node-agent-03", &wanted), @"
    ip route replace table 5130 throw 10.42.1.0/24
    ip route replace table 5130 throw 10.42.2.0/24
    ip route replace table 5130 throw 10.42.3.0/24
    ip route replace table 5130 10.4.0.1 nexthop via 10.42.1.0 dev flannel.1 onlink nexthop via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 10.4.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 10.4.0.3 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 10.4.255.253 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 blackhole 10.4.255.253 metric 4278198272
    ip route replace table 5130 10.4.255.254 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 blackhole 10.4.255.254 metric 4278198272
    ip route replace table 5130 10.42.0.0/24 nexthop via 10.42.1.0 dev flannel.1 onlink nexthop via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5131 203.0.113.10 nexthop via 10.42.1.0 dev flannel.1 onlink nexthop via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ");
}

#[test]
fn each_leader_has_its_own_address_and_reaches_the_other_leaders_by_flannel() {
    let (mesh, topology) = two_leaders();
    let wanted = ["ip addr add", "wg set kilo0 peer", "ip route replace table"];
    insta::assert_snapshot!(commands(&mesh, &topology, "node-agent-02", &wanted), @"
    ip addr add 10.4.0.3/32 dev kilo0 scope link
    ip addr add 10.42.2.0/32 dev kilo0
    wg set kilo0 peer ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs= endpoint 203.0.113.10:51820 persistent-keepalive 25 allowed-ips 10.4.0.1/32,10.42.0.0/24,203.0.113.10/32
    ip route replace table 5130 throw 10.42.1.0/24
    ip route replace table 5130 throw 10.42.2.0/24
    ip route replace table 5130 throw 10.42.3.0/24
    ip route replace table 5130 10.4.0.1 dev kilo0 src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.4.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.4.255.253 dev kilo0 src 10.42.2.0 mtu 1420
    ip route replace table 5130 blackhole 10.4.255.253 metric 4278198272
    ip route replace table 5130 10.4.255.254 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 blackhole 10.4.255.254 metric 4278198272
    ip route replace table 5130 10.42.0.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5131 203.0.113.10 via 10.4.0.1 dev kilo0 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5132 192.168.50.11 via 10.42.1.0 dev flannel.1 onlink
    ip route replace table 5132 192.168.50.13 via 10.42.3.0 dev flannel.1 onlink
    ");
}

#[test]
fn leaders_share_the_destinations_that_are_not_their_own_and_each_may_send_from_all() {
    let (mesh, topology) = two_leaders();
    let nets = |texts: &[&str]| texts.iter().map(|text| net(text)).collect::<BTreeSet<_>>();
    let shared = nets(&["10.42.3.0/24", "192.168.50.13/32"]);
    let first = nets(&["10.4.0.2/32", "10.42.1.0/24", "192.168.50.11/32"]);
    let second = nets(&["10.4.0.3/32", "10.42.2.0/24", "192.168.50.12/32"]);

    let state = state(&mesh, &topology, "node-master");
    let [one, two] = [&first, &second].map(|own| own.union(&shared).copied().collect());
    let routes = state.peers.values().map(|peer| &peer.routes);
    assert_eq!(routes.collect::<Vec<_>>(), [&one, &two]);
    let all = one.union(&two).copied().collect();
    assert!(state.peers.values().all(|peer| peer.accepts == all));
}

/// The changes of a node after its verdicts changed, without backstops.
fn follows(me: &str, verdicts: &Verdicts) -> String {
    let (mut mesh, topology) = two_leaders();
    let before = state(&mesh, &topology, me);
    mesh.verdicts = verdicts.clone();
    let changes = diff(&before, &state(&mesh, &topology, me));
    lines(&changes).replace(" proto 118", "")
}

const DOWN: PathState = PathState::Down(Cause::Silent);

fn through(leader: &str, state: PathState) -> Verdicts {
    let known = RegionLeader {
        state,
        ..RegionLeader::default()
    };
    Verdicts {
        leaders: [(NodeName(leader.into()), known)].into(),
        ..Verdicts::default()
    }
}

fn to(leader: &str, state: PathState) -> Verdicts {
    let id = PeerId::new(format!("node/{leader}"));
    Verdicts {
        peers: [(id, state)].into(),
        ..Verdicts::default()
    }
}

fn both(one: Verdicts, other: Verdicts) -> Verdicts {
    Verdicts {
        peers: one.peers.into_iter().chain(other.peers).collect(),
        leaders: one.leaders.into_iter().chain(other.leaders).collect(),
        ..Verdicts::default()
    }
}

#[test]
fn a_member_leaves_a_leader_that_is_down() {
    let verdicts = both(
        through("node-agent-01", DOWN),
        through("node-agent-02", PathState::Up),
    );
    insta::assert_snapshot!(follows("node-agent-03", &verdicts), @"
    ip route replace table 5130 10.4.0.1 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 10.42.0.0/24 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5131 203.0.113.10 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ");
    let draining = both(
        through("node-agent-01", PathState::Draining),
        through("node-agent-02", PathState::Up),
    );
    assert_eq!(
        follows("node-agent-03", &draining),
        follows("node-agent-03", &verdicts)
    );
}

#[test]
fn a_member_leaves_a_leader_for_the_segment_that_it_does_not_reach() {
    let (_, topology) = two_leaders();
    let remote = |segment: &&Segment| segment.nodes.len() == 1;
    let master = topology.segments.iter().find(remote).unwrap().name.clone();
    let up = through("node-agent-02", PathState::Up);
    let says = |unreached: SegmentName| {
        let mut verdicts = both(through("node-agent-01", PathState::Up), up.clone());
        let first = verdicts.leaders.first_entry();
        first.unwrap().get_mut().unreached = [unreached].into();
        verdicts
    };
    let down = both(through("node-agent-01", DOWN), up.clone());
    let cut_off = follows("node-agent-03", &says(master));
    assert_eq!(cut_off, follows("node-agent-03", &down));
    let elsewhere = SegmentName::Node(NodeName("elsewhere".into()));
    assert_eq!(follows("node-agent-03", &says(elsewhere)), "");
}

#[test]
fn a_leader_that_reaches_no_leader_of_a_segment_sends_through_another_one_of_its_region() {
    let cut_off = to("node-master", DOWN);
    let verdicts = both(cut_off.clone(), through("node-agent-02", PathState::Up));
    insta::assert_snapshot!(follows("node-agent-01", &verdicts), @"
    ip route replace table 5130 10.4.0.1 via 10.42.2.0 dev flannel.1 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.42.0.0/24 via 10.42.2.0 dev flannel.1 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5131 203.0.113.10 via 10.42.2.0 dev flannel.1 onlink src 10.42.1.0 mtu 1420
    ");
    // Not through one that is not known to work.
    for state in [PathState::Unknown, PathState::Draining] {
        let verdicts = both(cut_off.clone(), through("node-agent-02", state));
        assert_eq!(follows("node-agent-01", &verdicts), "");
    }
}

#[test]
fn a_far_leader_sends_to_those_leaders_that_answer() {
    let (mut mesh, topology) = two_leaders();
    mesh.verdicts = both(
        to("node-agent-01", DOWN),
        to("node-agent-02", PathState::Up),
    );
    let state = state(&mesh, &topology, "node-master");
    let routes = |name: &str| &state.peers[&PeerId::new(format!("node/{name}"))].routes;
    assert_eq!(routes("node-agent-01"), &BTreeSet::new());
    let second = &state.peers[&PeerId::new("node/node-agent-02")];
    assert_eq!(second.routes, second.accepts);
    // The kernel's routes stay: behind the tunnel's link are all leaders.
    let changes = follows("node-master", &mesh.verdicts);
    assert!(
        changes.lines().all(|line| line.starts_with("wg set")),
        "{changes}"
    );
}

/// A leader sends its own packets into its tunnel as soon as an answer came, and a strict check of flannel's device
/// drops what another leader brings from there.
#[test]
fn a_path_that_is_new_or_came_back_is_used_for_the_leaders_own_prefixes_alone() {
    let (mut mesh, topology) = two_leaders();
    let nets = |texts: &[&str]| texts.iter().map(|text| net(text)).collect::<BTreeSet<_>>();
    for path in [PathState::Unknown, PathState::Returning] {
        mesh.verdicts = both(
            to("node-agent-01", path),
            to("node-agent-02", PathState::Up),
        );
        let state = state(&mesh, &topology, "node-master");
        let [first, second] = ["node-agent-01", "node-agent-02"].map(|name| {
            let id = PeerId::new(format!("node/{name}"));
            state.peers[&id].clone()
        });
        let own = nets(&["10.4.0.2/32", "10.42.1.0/24", "192.168.50.11/32"]);
        assert_eq!(first.routes, own, "{path:?}");
        assert_eq!(second.routes, &second.accepts - &own, "{path:?}");
    }
}

#[test]
fn an_address_for_echoes_stays_when_another_leader_becomes_the_primary() {
    let probes = |first: bool| {
        let (mut mesh, _) = two_leaders();
        mesh.node("node-agent-01").leader = first;
        mesh.node("node-agent-02").leader = !first;
        let topology = mesh.topology();
        let leaders = topology.leaders().map(|(_, leader)| leader.clone());
        let leaders = leaders.filter(|leader| leader.probe_ip.is_some());
        let leaders: Vec<_> = leaders.collect();
        let primary = leaders[0].node.clone();
        let probes = leaders.into_iter();
        let probes = probes.map(|leader| (leader.node, leader.probe_ip));
        (primary, probes.collect::<BTreeMap<_, _>>())
    };
    let ((one, before), (other, after)) = (probes(true), probes(false));
    assert_ne!(one, other);
    assert_eq!(before, after);
}

#[test]
fn external_peers_are_reached_through_the_primary_unless_it_is_down() {
    let (mut mesh, _) = two_leaders();
    mesh.add_peers([vpn_peer("laptop", 9, &["10.5.0.1/32"])]);
    let topology = mesh.topology();
    let way = |mesh: &Mesh, me: &str| {
        let all = commands(mesh, &topology, me, ROUTES);
        let line = all.lines().find(|line| line.contains(" 10.5.0.1 "));
        line.unwrap().split_once("10.5.0.1 ").unwrap().1.to_owned()
    };
    let primary = "via 10.42.1.0 dev flannel.1 onlink";
    let at = |mesh: &Mesh| {
        ["node-agent-01", "node-agent-02", "node-agent-03"].map(|me| {
            let way = way(mesh, me);
            let (way, _) = way.split_once(" src").unwrap();
            way.to_owned()
        })
    };
    assert_eq!(at(&mesh), ["dev kilo0", primary, primary]);
    for (state, of_second, of_third) in [
        (PathState::Draining, primary, primary),
        (DOWN, "dev kilo0", "via 10.42.2.0 dev flannel.1 onlink"),
    ] {
        mesh.verdicts = both(
            through("node-agent-01", state),
            // Its own tunnels work, so that its uplink is not to blame.
            both(
                through("node-agent-02", PathState::Up),
                to("node-master", PathState::Up),
            ),
        );
        assert_eq!(at(&mesh)[1..], [of_second, of_third]);
    }
}

#[test]
fn a_kernel_takes_the_change_to_two_leaders_and_back() {
    let (mut mesh, two) = two_leaders();
    mesh.agreed.leaders_per_region = leaders(1);
    let one = mesh.topology();
    for me in mesh.names() {
        let mut kernel = FakeKernel::before_the_agent(&mesh, me);
        for topology in [&one, &two, &one] {
            let desired = mesh.plan(topology, me).unwrap();
            for change in diff(&kernel.observe(), &desired) {
                kernel.apply(&change).unwrap();
            }
            assert_eq!(kernel.observe(), desired, "{me}");
        }
    }
}
