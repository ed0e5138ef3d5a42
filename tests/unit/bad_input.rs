//! Wrong values in the cluster's objects, from the object to the plan.
//!
//! A bad value counts as absent: every node's state is byte for byte the one without it. It is reported once, with
//! its object and field.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use selvedge::cluster::{ParseSettings, Rejected, node, peer};
use selvedge::state::State;
use selvedge::topology::{NodeName, Object, Topology};
use serde_json::{Value, json};

mod annotations;
mod anything;
mod claims;
mod statements;

use crate::mesh::Mesh;

const NODES: [&str; 4] = [
    "node-master",
    "node-agent-01",
    "node-agent-02",
    "node-agent-03",
];
const MASTERS_KEY: &str = "ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs=";
const LAPTOPS_KEY: &str = "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw=";

/// The objects of the two regions behind NAT.
fn objects() -> Vec<Value> {
    let list: Value =
        serde_yaml_ng::from_str(include_str!("../testdata/two-regions.yaml")).unwrap();
    list["items"].as_array().unwrap().clone()
}

fn object<'a>(objects: &'a mut [Value], name: &str) -> &'a mut Value {
    let named = |object: &&mut Value| object["metadata"]["name"] == name;
    objects.iter_mut().find(named).unwrap()
}

/// The states and reports of all agents, given the objects.
#[derive(Debug)]
struct Outcome {
    topology: Topology,
    states: BTreeMap<NodeName, Option<State>>,
    reports: BTreeSet<String>,
}

fn outcome(objects: &[Value]) -> Outcome {
    let mut mesh = Mesh::new([]);
    let mut rejected: Vec<Rejected> = Vec::new();
    for object in objects {
        if object["kind"] == "Peer" {
            let (peer, refused) = peer::parse(&serde_json::from_value(object.clone()).unwrap());
            mesh.add_peers(peer);
            rejected.extend(refused);
        } else {
            let parsed = serde_json::from_value(object.clone()).unwrap();
            let (node, refused) = node::parse(&parsed, &ParseSettings::default());
            mesh.snapshot
                .nodes
                .extend(node.map(|node| (node.name.clone(), node)));
            rejected.extend(refused);
        }
    }
    for refused in &rejected {
        assert!(refused.value.len() <= 256, "{refused:?}");
        assert!(
            !refused.to_string().contains(char::is_control),
            "{refused:?}"
        );
    }
    let topology: Topology = mesh.topology();
    let mut reports: BTreeSet<_> = rejected.iter().map(ToString::to_string).collect();
    reports.extend(topology.excluded.iter().map(ToString::to_string));
    reports.extend(topology.overlaps.iter().map(ToString::to_string));
    let names: Vec<_> = mesh.names().cloned().collect();
    let states = names.into_iter().map(|name| {
        let state = mesh.plan(&topology, &name);
        (name, state)
    });
    let states = states.collect();
    Outcome {
        topology,
        states,
        reports,
    }
}

/// Expects that `bad` and `without` give every node the same state, except for one report that names `object`.
fn expect_only(what: &str, bad: &[Value], without: &[Value], object: &Object) {
    let (bad, without) = (outcome(bad), outcome(without));
    for (name, state) in &without.states {
        assert_eq!(
            bad.states.get(name),
            Some(state),
            "{what}: the state of {name}"
        );
    }
    let new: Vec<_> = bad.reports.difference(&without.reports).collect();
    assert_eq!(new.len(), 1, "{what}: {new:?}");
    assert!(new[0].starts_with(&object.to_string()), "{what}: {new:?}");
}
