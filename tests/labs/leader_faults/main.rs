//! Faults of leaders while pods of two regions talk, on a real flannel and a real kube-apiserver: how long each
//! flow is silent, with two leaders a region, and as the control with one.
//!
//! ```text
//!    region default, a cloud with elastic IPs: node-master and node-public-01, which lead, and node-public-02
//!    region nd, behind one NAT: node-agent-01 and -02, which lead, and node-agent-03
//! ```
//!
//! Each fault happens once; with `SELVEDGE_LEADER_FAULTS=all` five times, with medians, and the faults that last
//! do so for minutes. A step fails at five times of what is promised, since CI machines are slow, and prints what
//! it measured.
#![expect(
    clippy::disallowed_methods,
    reason = "a test may run programs and wait"
)]

use std::process::ExitCode;
use std::time::Duration;

use selvedge_lab::lab::Options;
use selvedge_lab::topology::{LEADER, MASTER, Master, PUBLIC, Shape};
use selvedge_lab::{Lab, Steps};

mod changes;
mod control_plane;
mod controls;
mod fault;
mod field;
mod measure;
mod paths;
mod throughput;

use fault::FAULTS;
use field::Field;

/// The region's other leader, where two lead.
const SECOND: &str = "node-agent-02";
/// The follower there.
const MEMBER: &str = "node-agent-03";
/// The follower of the other region.
const FAR_MEMBER: &str = "node-public-02";

/// How much longer than promised a fault may be felt on a slow machine.
const FACTOR: u32 = 5;

fn main() -> ExitCode {
    let mut steps = Steps::from_args("leader_faults");
    run(&mut steps);
    steps.finish()
}

fn run(steps: &mut Steps) -> Option<()> {
    let options = Options {
        shape: Shape {
            master: Master::ElasticIp,
            beside_master: 2,
            ..Shape::default()
        },
        ..Options::default()
    };
    let lab = steps.required("the_cluster_comes_up", || {
        Lab::for_test("leader-faults", options)
    })?;
    let mut field = Field::new(lab);
    steps.required("two_leaders_of_each_region_carry_traffic", || field.join())?;
    for fault in &FAULTS {
        steps.step(fault.name, || measure::repeated(&mut field, fault));
    }
    steps.step(
        "a_leader_that_is_terminated_hands_over_first_and_nothing_is_lost",
        || changes::terminated(&mut field),
    );
    steps.step("the_annotation_leader_moves_and_nothing_is_lost", || {
        changes::annotation_moved(&mut field)
    });
    steps.step("random_loss_of_a_tenth_moves_no_path", || {
        changes::random_loss(&mut field)
    });
    steps.step("a_flapping_link_moves_paths_three_times_a_minute", || {
        changes::flapping(&mut field)
    });
    steps.step(
        "all_nodes_are_not_ready_at_once_and_nothing_is_lost",
        || control_plane::not_ready(&mut field),
    );
    steps.step("a_leader_is_drained_and_nothing_is_lost", || {
        control_plane::drained(&mut field)
    });
    steps.step("two_leaders_are_as_fast_as_one", || {
        throughput::compared(&mut field)
    });
    controls::all(steps, &mut field);
    Some(())
}

/// Whether everything is repeated, and lasts.
fn thorough() -> bool {
    std::env::var("SELVEDGE_LEADER_FAULTS").is_ok_and(|which| which == "all")
}

/// A figure that is promised, as a failure.
fn at_most(what: &str, measured: Duration, promised: Duration) -> anyhow::Result<()> {
    anyhow::ensure!(
        measured <= promised * FACTOR,
        "{what} was {measured:.1?}, more than {FACTOR} times {promised:?}"
    );
    Ok(())
}
