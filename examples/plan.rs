//! Prints the changes of one node's agent on a fresh host, without root and without a
//! cluster:
//!
//! ```sh
//! cargo run --example plan -- tests/testdata/two-regions.yaml node-agent-02
//! ```
//!
//! The file is a List of Nodes (and Peers), as `kubectl get nodes -o yaml` prints it. The example assumes that
//! flannel runs with VXLAN and is up.
#![expect(clippy::print_stdout, reason = "the example prints")]

use std::process::ExitCode;

use selvedge::diff::diff;
use selvedge::state::State;
use selvedge::topology::NodeName;

#[path = "../tests/unit/mesh.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod mesh;

use mesh::{Mesh, lines};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("{sentence}");
            ExitCode::from(64)
        }
    }
}

fn run() -> Result<(), String> {
    let mut args = std::env::args().skip(1);
    let (Some(file), Some(name), None) = (args.next(), args.next(), args.next()) else {
        return Err("usage: plan FILE NODE".into());
    };
    let text = std::fs::read_to_string(&file).map_err(|error| format!("{file}: {error}"))?;
    let mesh = Mesh::from_yaml(&text).map_err(|error| format!("{file}: {error}"))?;
    let me = NodeName(name);
    if !mesh.snapshot.nodes.contains_key(&me) {
        return Err(format!("{file} has no node {me}"));
    }
    let topology = mesh.topology();
    for excluded in &topology.excluded {
        println!("# {excluded}");
    }
    for overlap in &topology.overlaps {
        println!("# {overlap}");
    }
    let state = mesh.plan(&topology, &me).ok_or_else(|| {
        format!("node {me} is not ready in a mesh with Kilo: its agent would change nothing")
    })?;
    print!("{}", lines(&diff(&State::default(), &state)));
    Ok(())
}
