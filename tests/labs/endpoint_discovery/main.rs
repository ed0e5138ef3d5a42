//! Endpoint discovery: every candidate of a leader is tried, and none is judged by its range. Regions whose
//! routers hand out IPv6, nodes with their NAT's address, and regions behind NAT whose agents start in every order.
//!
//! Real flannel, a real kube-apiserver, real NATs; no node has the annotation `persistent-keepalive`.
#![expect(
    clippy::disallowed_methods,
    reason = "a test may run programs and wait"
)]

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use selvedge_lab::lab::{AGENT_FLAGS, Mesh, Options};
use selvedge_lab::topology::{FOLLOWER, LEADER, Shape, THIRD_LEADER};
use selvedge_lab::traffic::Servers;
use selvedge_lab::{Lab, Steps, claims};

mod external_address;
mod home;
mod start_orders;

const SELVEDGE: &str = env!("CARGO_BIN_EXE_selvedge");
const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/selvedge-k3s.yaml");

/// How long the mesh may take to follow a change on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long a home router keeps a UDP mapping, in seconds; Linux keeps that of an answered flow for 120.
const HOME_TIMEOUT: &str = "30";

fn main() -> ExitCode {
    let mut steps = Steps::from_args("endpoint_discovery");
    home::home_with_ipv6(&mut steps);
    external_address::external_address_of_the_nat(&mut steps);
    start_orders::orders_of_start(&mut steps);
    steps.finish()
}

fn up(steps: &mut Steps, step: &str, shape: Shape) -> Option<(Lab, Servers)> {
    let options = Options {
        shape,
        ..Options::default()
    };
    steps.cluster(step, "endpoints", options)
}

fn flags<'a>(more: &[&'a str]) -> Vec<&'a str> {
    AGENT_FLAGS.iter().chain(more).copied().collect()
}

/// Agents whose nodes have their regions' labels and no annotation.
fn mesh<'a>(flags: &'a [&'a str]) -> Mesh<'a> {
    Mesh::labelled(Path::new(SELVEDGE), Path::new(MANIFEST), flags)
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

/// What `selvedge doctor` and `selvedge status` print on a node.
fn looks(lab: &Lab, node: &str) -> anyhow::Result<[String; 2]> {
    let program = Path::new(SELVEDGE);
    let doctor = lab.selvedge(program, node, &["doctor"])?;
    Ok([doctor, lab.selvedge(program, node, &["status"])?])
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
