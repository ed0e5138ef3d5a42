//! One full recompute, from what the cluster looks like to the list of changes.
//!
//! The target is 50 ms for 5,000 nodes in 100 regions, on a leader, with nothing in the kernel yet. `failover` is the
//! same after one of two leaders went down, for a node that sent to both.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use selvedge::diff::{Change, diff};
use selvedge::flannel::Flannel;
use selvedge::liveness::{Cause, PathState};
use selvedge::plan::{Inputs, plan};
use selvedge::probe::{RegionLeader, Verdicts};
use selvedge::state::State;
use selvedge::topology::{Node, NodeName, RegionName, Topology};

#[path = "../tests/unit/mesh.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod mesh;

use mesh::{Mesh, addr, leaders, net, node};

/// Sizes of clusters and into how many regions their nodes are spread.
const SIZES: [(u16, u16); 4] = [(10, 2), (100, 10), (1000, 50), (5000, 100)];

fn cluster(nodes: u16, regions: u16) -> Mesh {
    let nodes = (0..nodes).map(|number| {
        let [high, low] = number.to_be_bytes();
        let region = number % regions;
        let mut key = [7; 32];
        key[..2].copy_from_slice(&number.to_be_bytes());
        // Regions share subnets, as they do in practice.
        let address = format!("192.168.{}.{}/24", number / regions % 250, region % 250 + 1);
        Node {
            public_key: Some(selvedge::wireguard::key::PublicKey(key)),
            endpoint: addr(&format!("203.{high}.{low}.1:51820")),
            pod_cidrs: vec![net(&format!("10.{}.{low}.0/24", 64 + high))],
            ..node(
                &format!("node-{number:04}"),
                &format!("region-{region:02}"),
                0,
                &address,
            )
        }
    });
    let mut mesh = Mesh::new(nodes);
    mesh.agreed.cluster_networks = vec![net("10.64.0.0/10")];
    let names = (0..regions).map(|region| RegionName(format!("region-{region:02}")));
    let networks = vec![net("192.168.0.0/16")];
    mesh.agreed.region_networks = names.map(|name| (name, networks.clone())).collect();
    mesh
}

fn recompute(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("recompute");
    for (nodes, regions) in SIZES {
        let mesh = cluster(nodes, regions);
        let topology = mesh.topology();
        // The first node leads the first region, the last follows.
        let leader = topology.segments[0].primary().node.clone();
        let follower = NodeName(format!("node-{:04}", nodes - 1));
        for (role, me) in [("leader", leader), ("follower", follower)] {
            let flannel = mesh.flannel(&me);
            let run = |observed: &State| changes(&mesh, &me, &flannel, observed);
            let settled = mesh.plan(&topology, &me).expect("the node is known");
            for (name, observed) in [("fresh", State::default()), ("settled", settled)] {
                let id = BenchmarkId::new(format!("{role}-{name}"), nodes);
                group.bench_function(id, |bencher| bencher.iter(|| black_box(run(&observed))));
            }
        }
    }
    group.finish();
}

/// The whole pass of a node.
fn changes(mesh: &Mesh, me: &NodeName, flannel: &Flannel, observed: &State) -> Vec<Change> {
    let topology = Topology::new(&mesh.snapshot, &mesh.agreed, &mesh.resolved, mesh.now);
    let desired = plan(&Inputs {
        topology: &topology,
        me,
        flannel,
        settings: &mesh.local,
        api_servers: &mesh.api_servers,
        observed: &mesh.observed,
        connected: &mesh.connected,
        other_rules: &mesh.other_rules,
        callers: &mesh.callers,
        verdicts: &mesh.verdicts,
        mtus: &mesh.mtus,
    });
    diff(observed, &desired.expect("the node is known"))
}

/// One of two leaders goes down: of the own region for a follower, of another region for a leader.
#[expect(clippy::print_stdout, reason = "the number of changes is a result")]
fn failover(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("failover");
    for (nodes, regions) in SIZES {
        let mut mesh = cluster(nodes, regions);
        mesh.agreed.leaders_per_region = leaders(2);
        let topology = mesh.topology();
        let (near, far) = (&topology.segments[0], &topology.segments[1]);
        let follower = near.nodes.last().expect("not empty").name.clone();
        let down = PathState::Down(Cause::Silent);
        let through = near.leaders.iter().zip([down, PathState::Up]);
        let through = through.map(|(leader, state)| {
            let known = RegionLeader {
                state,
                ..RegionLeader::default()
            };
            (leader.node.clone(), known)
        });
        let to = far.leaders.iter().zip([down, PathState::Up]);
        let verdicts = Verdicts {
            peers: to.map(|(far, state)| (far.peer_id(), state)).collect(),
            leaders: through.collect(),
            ..Verdicts::default()
        };
        for (role, me) in [
            ("leader", near.primary().node.clone()),
            ("follower", follower),
        ] {
            let flannel = mesh.flannel(&me);
            mesh.verdicts = Verdicts::default();
            let settled = mesh.plan(&topology, &me).expect("the node is known");
            mesh.verdicts = verdicts.clone();
            let count = changes(&mesh, &me, &flannel, &settled).len();
            println!("failover/{role}/{nodes}: {count} changes");
            group.bench_function(BenchmarkId::new(role, nodes), |bencher| {
                bencher.iter(|| black_box(changes(&mesh, &me, &flannel, &settled)));
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = recompute, failover
}
criterion_main!(benches);
