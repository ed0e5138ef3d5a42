//! The plan of each node of a known cluster, as commands that a network engineer can review.
//!
//! Every route to another region has a backstop (`unreachable …`). Tests about something else leave backstops out;
//! `tests/unit/reconcile.rs` shows that none is missing.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use selvedge::diff::diff;
use selvedge::flannel::Backend;
use selvedge::state::{Firewall, Ruleset, State};
use selvedge::topology::{Granularity, Node, NodeName};

mod aliases;
mod backends;
mod bad_input;
mod golden;
mod kilo_nat;
mod kilo_six_clouds_configs;
mod kilo_tutorial;
mod kilo_tutorial_configs;
mod kilo_two_regions_configs;
mod leaders;
mod locations;
mod path_mtu;
mod peers;
mod probe_addresses;
mod regions;
mod relays;
mod several_leaders;
mod two_regions_behind_nat;
mod wireguard_addresses;

use crate::mesh::{Mesh, With, addr, ip, key, leaders, lines, net, node, peer_with, vpn_peer};

/// The routes, in all tables.
const ROUTES: &[&str] = &["ip route replace table", "ip -6 route replace table"];

fn two_regions() -> Mesh {
    Mesh::from_yaml(include_str!("../testdata/two-regions.yaml")).unwrap()
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
