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
use selvedge_lab::lab::{Access, Mesh, Options, Proxy, SCENARIO_FLAGS};
use selvedge_lab::netns::unique_prefix;
use selvedge_lab::topology::{Shape, Third};
use selvedge_lab::traffic::Servers;
use selvedge_lab::{Lab, Node, Steps, scratch};

mod bad_peers;
mod clients;
mod meshes;
mod nat;

const SELVEDGE: &str = env!("CARGO_BIN_EXE_selvedge");
const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/selvedge-k3s.yaml");

const LEADER: &str = "node-agent-01";
const FOLLOWER: &str = "node-agent-02";
const THIRD_LEADER: &str = "node-third-01";

/// How long the mesh may take to follow a change in a loaded machine.
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

/// Two regions behind NAT, a public master, and VPN clients behind a NAT of their own.
fn behind_nat(steps: &mut Steps) -> Option<()> {
    let shape = Shape {
        agents: 2,
        third: Third::Distinct,
        ..Shape::default()
    };
    let mut lab = steps.required("a_cluster_of_three_regions_comes_up", || {
        up(shape, Proxy::Iptables)
    })?;
    let _servers = Servers::start(&lab.places()).ok()?;
    let flags = flags(&["--service-cidr=10.43.0.0/16"]);
    steps.required("its_agents_become_ready", || {
        lab.join(&mesh(&flags, true))?;
        Ok(String::new())
    })?;
    steps.step("everybody_reaches_everybody", || settled(&lab));
    nat::regions(steps, &mut lab, &flags);
    clients::clients(steps, &lab)
}

fn mesh<'a>(flags: &'a [&'a str], annotate: bool) -> Mesh<'a> {
    Mesh {
        binary: Path::new(SELVEDGE),
        manifest: Path::new(MANIFEST),
        access: Access::Kubeconfig,
        flags,
        annotate,
    }
}

fn flags<'a>(more: &[&'a str]) -> Vec<&'a str> {
    SCENARIO_FLAGS.iter().chain(more).copied().collect()
}

fn up(shape: Shape, proxy: Proxy) -> anyhow::Result<Lab> {
    let options = Options {
        shape,
        proxy,
        ..Options::default()
    };
    Lab::up(
        &unique_prefix(),
        scratch("kilo-features")?,
        options,
        &|_| {},
    )
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

/// Everybody reaches everybody, at the latest when the nodes behind NAT have found each other.
fn settled(lab: &Lab) -> anyhow::Result<String> {
    claims::everybody_comes_to_reach_everybody(lab, By::OwnAddress, Duration::from_secs(40))
}
