//! What each node of a known cluster does, as commands that a network engineer can review.
//!
//! Backstops (`unreachable …`) stand beside every route to another region; where a test is about
//! something else they are left out, and `tests/reconcile.rs` shows that none is missing.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use selvedge::diff::diff;
use selvedge::flannel::Backend;
use selvedge::state::{Firewall, Ruleset, State};
use selvedge::topology::{Granularity, Node, NodeName};

#[expect(dead_code, reason = "every test binary uses its own part")]
mod mesh;

#[path = "plan/backends.rs"]
mod backends;
#[path = "plan/bad_input.rs"]
mod bad_input;
#[path = "plan/golden.rs"]
mod golden;
#[path = "plan/golden_000.rs"]
mod golden_000;
#[path = "plan/golden_002.rs"]
mod golden_002;
#[path = "plan/kilo_nat.rs"]
mod kilo_nat;
#[path = "plan/leaders.rs"]
mod leaders;
#[path = "plan/locations.rs"]
mod locations;
#[path = "plan/peers.rs"]
mod peers;
#[path = "plan/regions.rs"]
mod regions;
#[path = "plan/scenario_000.rs"]
mod scenario_000;
#[path = "plan/scenario_002.rs"]
mod scenario_002;
#[path = "plan/scenario_003.rs"]
mod scenario_003;
#[path = "plan/wireguard_addresses.rs"]
mod wireguard_addresses;

use mesh::{Mesh, With, addr, ip, key, lines, net, node, vpn_peer};

/// The routes, in all tables.
const ROUTES: &[&str] = &["ip route replace table", "ip -6 route replace table"];

fn scenario_000() -> Mesh {
    Mesh::from_yaml(include_str!("testdata/two-regions.yaml")).unwrap()
}

/// Routes without their backstops.
fn routes(mesh: &Mesh, me: &str) -> String {
    let all = mesh.commands_of(me, ROUTES);
    let lines = all.lines().filter(|line| !line.contains("unreachable"));
    lines
        .map(|line| line.replace(" proto 118", "") + "\n")
        .collect()
}

fn firewall(mesh: &Mesh, me: &str) -> Firewall {
    match mesh.state(me).firewall {
        Some(Ruleset::Planned(firewall)) => *firewall,
        other => panic!("no plan: {other:?}"),
    }
}
