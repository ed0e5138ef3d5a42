//! Kilo's interface end to end, on a real flannel and a real kube-apiserver: VPN clients behind NAT,
//! regions behind NAT that find each other, and every granularity.
//!
//! Each group of steps has a cluster of its own; its steps run in order.
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test may run programs and wait, and fails by panicking"
)]

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::ensure;
use selvedge_lab::claims::{self, By};
use selvedge_lab::lab::{AGENT_FLAGS, Mesh, Options, Proxy};
use selvedge_lab::topology::{
    FOLLOWER_OF_TWO as FOLLOWER, LEADER, SECOND_LEADER, Shape, THIRD_LEADER, Third,
};
use selvedge_lab::traffic::Servers;
use selvedge_lab::{Lab, Node, Steps};

mod bad_peers;
mod clients;
mod meshes;
mod nat;

const SELVEDGE: &str = env!("CARGO_BIN_EXE_selvedge");
const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/selvedge-k3s.yaml");

/// How long the mesh may take to follow a change on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    let mut steps = Steps::from_args("kilo_features");
    behind_nat(&mut steps);
    nat::symmetric(&mut steps);
    for granularity in ["full", "cross"] {
        meshes::granularities(&mut steps, granularity);
    }
    meshes::mixed(&mut steps);
    meshes::six_clouds(&mut steps);
    steps.finish()
}

/// Two regions behind NAT, each with two leaders, a public master, and VPN clients behind a NAT of their own.
fn behind_nat(steps: &mut Steps) -> Option<()> {
    let shape = Shape {
        third: Third::Distinct,
        ..Shape::default()
    };
    let (mut lab, _servers) = up(
        steps,
        "a_cluster_of_three_regions_comes_up",
        shape,
        Proxy::Iptables,
    )?;
    let flags = flags(&["--service-cidr=10.43.0.0/16"]);
    steps.required("its_agents_become_ready", || {
        lab.join(&mesh(&flags, true))?;
        Ok(String::new())
    })?;
    steps.step("all_pods_and_nodes_reach_each_other", || settled(&lab));
    nat::regions(steps, &mut lab, &flags);
    clients::clients(steps, &lab)
}

fn mesh<'a>(flags: &'a [&'a str], annotate: bool) -> Mesh<'a> {
    Mesh {
        annotate,
        ..Mesh::labelled(Path::new(SELVEDGE), Path::new(MANIFEST), flags)
    }
}

fn flags<'a>(more: &[&'a str]) -> Vec<&'a str> {
    AGENT_FLAGS.iter().chain(more).copied().collect()
}

fn up(steps: &mut Steps, step: &str, shape: Shape, proxy: Proxy) -> Option<(Lab, Servers)> {
    let options = Options {
        shape,
        proxy,
        ..Options::default()
    };
    steps.cluster(step, "kilo-features", options)
}

fn selvedge(client: &Node, lab: &Lab, arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = Command::new(SELVEDGE);
    command
        .args(arguments)
        .env("KUBECONFIG", lab.admin_kubeconfig());
    let output = client.output(command)?;
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{arguments:?}: {complaint}");
    Ok(String::from_utf8(output.stdout)?)
}

/// All pods and nodes reach each other, at the latest when the leaders behind NAT have found each other.
fn settled(lab: &Lab) -> anyhow::Result<String> {
    claims::all_places_come_to_reach_each_other(lab, By::OwnAddress, Duration::from_secs(40))
}
