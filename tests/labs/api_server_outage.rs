//! The API server hangs, on a real flannel and a real kube-apiserver: nothing that works stops
//! working, and an agent that starts meanwhile, even after a reboot, does its work from its cache.
//!
//! The server is stopped by SIGSTOP and not ended: its connections stay open, and no answer comes.

use std::path::Path;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use selvedge_lab::claims::{self, By};
use selvedge_lab::lab::{Mesh, Options};
use selvedge_lab::topology::{FOLLOWER_OF_TWO as FOLLOWER, LEADER, MASTER, SECOND_LEADER};
use selvedge_lab::{Lab, Steps, wait_for};

const SELVEDGE: &str = env!("CARGO_BIN_EXE_selvedge");
const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/selvedge-k3s.yaml");

/// A tunnel is up within two seconds of the agent's start; a busy CI machine gets some more.
const START: Duration = Duration::from_secs(15);
/// The watch notices a dead connection within a minute and a half.
const LIVE_AGAIN: Duration = Duration::from_secs(120);

fn mesh() -> Mesh<'static> {
    Mesh::annotated(Path::new(SELVEDGE), Path::new(MANIFEST))
}

fn main() -> ExitCode {
    let mut steps = Steps::from_args("api_server_outage");
    run(&mut steps);
    steps.finish()
}

fn run(steps: &mut Steps) -> Option<()> {
    let (mut lab, _servers) =
        steps.cluster("the_cluster_comes_up", "outage", Options::default())?;
    steps.required("all_agents_become_ready", || {
        let time = lab.join(&mesh())?;
        claims::reached_within(&lab, "pod@node-agent-03", "pod@node-master", START)?;
        Ok(format!("{:.1} s", time.as_secs_f64()))
    })?;
    // The cache is written within five seconds of a change.
    sleep(Duration::from_secs(6));

    steps.required("the_api_server_hangs", || {
        lab.plane()?.freeze(true);
        ensure!(!lab.api().ready(), "it still answers");
        Ok(String::new())
    })?;
    steps.step("all_pods_and_nodes_still_reach_each_other", || {
        claims::all_places_reach_each_other(&lab, By::OwnAddress)
    });
    for node in [LEADER, SECOND_LEADER, FOLLOWER, MASTER] {
        let name = node.replace('-', "_");
        steps.step(&format!("an_agent_restarts_on_{name}"), || {
            lab.take_agent(node)?.stop()?;
            starts(&mut lab, node)
        });
        steps.step(&format!("an_agent_starts_after_a_reboot_of_{name}"), || {
            lab.take_agent(node)?.kill();
            forget(&lab, node)?;
            starts(&mut lab, node)
        });
    }
    steps.step("all_pods_and_nodes_reach_each_other_after_all_this", || {
        claims::all_places_reach_each_other(&lab, By::OwnAddress)
    });
    steps.required("the_api_server_goes_on", || {
        lab.plane()?.freeze(false);
        let time = wait_for("the API server", START, || lab.api().ready())?;
        Ok(format!("{:.1} s", time.as_secs_f64()))
    })?;
    steps.step("all_agents_follow_the_cluster_again", || follow(&lab));
    steps.step("all_pods_and_nodes_reach_each_other_in_the_end", || {
        claims::all_places_reach_each_other(&lab, By::OwnAddress)
    });
    Some(())
}

/// Starts the agent of a node, and waits until its tunnel carries.
fn starts(lab: &mut Lab, node: &str) -> anyhow::Result<String> {
    let mesh = mesh();
    lab.restart_agent(mesh.binary, node, mesh.access, mesh.flags)?;
    let far = if node == MASTER { LEADER } else { MASTER };
    let (from, to) = (format!("pod@{node}"), format!("pod@{far}"));
    let time =
        claims::reached_within(lab, &from, &to, START).with_context(|| lab.tail(node, "agent"))?;
    Ok(format!("{:.1} s", time.as_secs_f64()))
}

/// Takes from a node what it would lose in a reboot, and the proof that it matters.
fn forget(lab: &Lab, node: &str) -> anyhow::Result<()> {
    let machine = lab.node(node)?;
    machine.run("ip link del kilo0")?;
    machine.run("nft delete table inet selvedge")?;
    for family in ["-4", "-6"] {
        // How many rules there are is the plan's business.
        while machine
            .run(&format!("ip {family} rule del protocol 118"))
            .is_ok()
        {}
        for table in ["5130", "5131", "5132"] {
            let _ = machine.run(&format!("ip {family} route flush table {table}"));
        }
    }
    let far = if node == MASTER { LEADER } else { MASTER };
    let (from, to) = (format!("pod@{node}"), format!("pod@{far}"));
    let reached = claims::reached_within(lab, &from, &to, Duration::from_secs(1));
    ensure!(reached.is_err(), "{from} reaches {to} without an agent");
    Ok(())
}

/// A change in the cluster arrives at every node.
fn follow(lab: &Lab) -> anyhow::Result<String> {
    let location_ips = ("kilo.squat.ai/allowed-location-ips", Some("10.77.0.0/24"));
    lab.api().annotate(MASTER, &[location_ips])?;
    let time = wait_for("the route on all nodes", LIVE_AGAIN, || {
        lab.node_names()
            .iter()
            .filter(|name| *name != MASTER)
            .all(|name| {
                let routes = lab
                    .node(name)
                    .and_then(|node| node.run("ip route show table 5130"));
                routes.is_ok_and(|routes| routes.contains("10.77.0.0/24"))
            })
    })?;
    Ok(format!("{:.1} s", time.as_secs_f64()))
}
