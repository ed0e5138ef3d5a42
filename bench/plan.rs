//! One full recompute, from what the cluster looks like to the list of changes.
//!
//! The target is 50 ms for 5,000 nodes in 100 regions, on a leader, with nothing in the kernel yet.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use selvedge::diff::diff;
use selvedge::plan::{Inputs, plan};
use selvedge::state::State;
use selvedge::topology::{Node, NodeName, RegionName, Topology};

#[path = "../tests/unit/mesh.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod mesh;

use mesh::{Mesh, addr, net, node};

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
            let run = |observed: &State| {
                let topology =
                    Topology::new(&mesh.snapshot, &mesh.agreed, &mesh.resolved, mesh.now);
                let desired = plan(&Inputs {
                    topology: &topology,
                    me: &me,
                    flannel: &flannel,
                    settings: &mesh.local,
                    api_servers: &mesh.api_servers,
                    observed: &mesh.observed,
                    connected: &mesh.connected,
                    other_rules: &mesh.other_rules,
                    callers: &mesh.callers,
                    verdicts: &mesh.verdicts,
                });
                let desired = desired.expect("the node is known");
                diff(observed, &desired)
            };
            let settled = mesh.plan(&topology, &me).expect("the node is known");
            for (name, observed) in [("fresh", State::default()), ("settled", settled)] {
                let id = BenchmarkId::new(format!("{role}-{name}"), nodes);
                group.bench_function(id, |bencher| bencher.iter(|| black_box(run(&observed))));
            }
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = recompute
}
criterion_main!(benches);
