//! Which address of a leader answers is tried, not told from its look: regions whose routers hand out IPv6,
//! nodes with their NAT's address, and regions behind NAT whose agents start in every order.
//!
//! Real flannel, a real kube-apiserver, real NATs; no node has the annotation `persistent-keepalive`.
#![expect(
    clippy::disallowed_methods,
    reason = "a test may run programs and wait"
)]

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use selvedge_lab::lab::{Access, Mesh, Options, SCENARIO_FLAGS};
use selvedge_lab::netns::unique_prefix;
use selvedge_lab::topology::Shape;
use selvedge_lab::{Lab, Steps, claims, scratch};

mod external_address;
mod home;
mod start_orders;

const SELVEDGE: &str = env!("CARGO_BIN_EXE_selvedge");
const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/selvedge-k3s.yaml");

const LEADER: &str = "node-agent-01";
const FOLLOWER: &str = "node-agent-02";
const THIRD_LEADER: &str = "node-third-01";

/// How long the mesh may take to follow a change in a loaded machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a home router remembers of UDP, in seconds; Linux would remember an answered flow for 120.
const HOME_TIMEOUT: &str = "30";

fn main() -> ExitCode {
    let mut steps = Steps::from_args("endpoint_discovery");
    home::home_with_ipv6(&mut steps);
    external_address::external_address_of_the_nat(&mut steps);
    start_orders::orders_of_start(&mut steps);
    steps.finish()
}

fn up(shape: Shape) -> anyhow::Result<Lab> {
    let options = Options {
        shape,
        ..Options::default()
    };
    Lab::up(&unique_prefix(), scratch("endpoints")?, options, &|_| {})
}

fn flags<'a>(more: &[&'a str]) -> Vec<&'a str> {
    SCENARIO_FLAGS.iter().chain(more).copied().collect()
}

/// Agents whose nodes have their regions' labels and no annotation.
fn mesh<'a>(flags: &'a [&'a str]) -> Mesh<'a> {
    Mesh {
        binary: Path::new(SELVEDGE),
        manifest: Path::new(MANIFEST),
        access: Access::Kubeconfig,
        flags,
        annotate: false,
    }
}

fn remember_as_at_home(lab: &Lab, routers: &[&str]) -> anyhow::Result<()> {
    for router in routers {
        let router = lab.network().router(router)?;
        for timeout in ["udp_timeout", "udp_timeout_stream"] {
            router.sysctl(&format!("netfilter/nf_conntrack_{timeout}"), HOME_TIMEOUT)?;
        }
    }
    Ok(())
}

fn annotation(lab: &Lab, node: &str, key: &str) -> anyhow::Result<String> {
    let object = lab.api().get(&format!("/api/v1/nodes/{node}"))?;
    let value = object["metadata"]["annotations"][key].as_str();
    Ok(value.unwrap_or_default().to_owned())
}

/// What `selvedge doctor` and `selvedge status` print on a node.
fn looks(lab: &Lab, node: &str) -> anyhow::Result<[String; 2]> {
    let look = |command: &str| {
        let mut program = Command::new(SELVEDGE);
        program.arg(command);
        let output = lab.node(node)?.output(program)?;
        anyhow::Ok(String::from_utf8(output.stdout)?)
    };
    Ok([look("doctor")?, look("status")?])
}

fn reached_both_ways(
    lab: &Lab,
    one: &str,
    other: &str,
    patience: Duration,
) -> anyhow::Result<String> {
    let begun = Instant::now();
    for (from, to) in [(one, other), (other, one)] {
        let (from, to) = (format!("pod@{from}"), format!("pod@{to}"));
        claims::reached_within(lab, &from, &to, patience)
            .with_context(|| lab.tail(one, "agent"))?;
    }
    Ok(format!("after {:.1} s", begun.elapsed().as_secs_f64()))
}
