//! Whole meshes in a deterministic simulation: real controllers and reconcilers, on fake kernels and tunnels, on a
//! simulated network and clock.
//!
//! Every schedule follows from its seed. A failing test prints the seed and what happened;
//! `SELVEDGE_SIM_SEED=n cargo test --test sim` replays it. `SELVEDGE_SIM_SCHEDULES=n` runs more of them
//! (`make sim SCHEDULES=n`).
#![expect(
    clippy::disallowed_methods,
    reason = "the runner measures the time that it takes"
)]

mod api;
mod device;
mod echoes;
#[path = "../unit/fake_kernel.rs"]
mod fake_kernel;
mod faults;
mod flannel;
mod invariants;
mod kernel;
mod lookup;
#[path = "../unit/mesh.rs"]
#[expect(dead_code, reason = "the unit tests use more of it")]
mod mesh;
mod network;
mod node;
mod relays;
mod rng;
mod walk;
mod world;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use faults::Plan;
use selvedge::agent::controller::ShellFacts;
use world::{Mutant, World};

/// Schedules that a run of the tests tries.
const SCHEDULES: u64 = 40;
/// Schedules within which every mutant is found.
const FOR_MUTANTS: u64 = 300;

/// What a schedule found, in sentences; none if all was well.
struct Failure {
    seed: u64,
    finding: String,
    text: String,
}

#[derive(Default)]
struct Totals {
    schedules: AtomicU64,
    checks: AtomicU64,
    pairs: AtomicU64,
    events: AtomicU64,
    millis: AtomicU64,
    passes: AtomicU64,
}

fn run_one(seed: u64, mutant: Mutant, totals: &Totals) -> Option<Failure> {
    let plan = Plan::new(seed);
    let mut world = World::new(&plan, mutant);
    world.run();
    let add = |total: &AtomicU64, number: u64| total.fetch_add(number, Ordering::Relaxed);
    add(&totals.schedules, 1);
    add(&totals.checks, world.checks);
    add(&totals.pairs, world.pairs_checked);
    add(&totals.events, world.events);
    add(&totals.passes, world.busy_passes());
    add(
        &totals.millis,
        plan.length.as_millis().try_into().expect("minutes"),
    );
    let finding = world.findings.first()?;
    let mut text = format!("seed {seed}, at {:.3} s: {finding}\n", world.seconds());
    let regions: Vec<_> = world
        .kinds()
        .iter()
        .map(|kind| format!("{kind:?}"))
        .collect();
    text += &format!("regions: {}\n", regions.join(", "));
    for (id, node) in world.nodes.iter().enumerate() {
        let place = world.network.places[id];
        text += &format!(
            "node {id} is {} in r{}, on: {}, agent: {:?}, forwards: {}\n",
            node.name, place.region, node.is_on, node.life, node.kernel.forwards
        );
        if let Some(agent) = &node.agent {
            for (segment, leader) in agent.shown.leaders() {
                text += &format!("  sees {} lead {}\n", leader.node, segment.name);
            }
            let report = agent.controller.report(world.now, &ShellFacts::default());
            for problem in report.problems {
                text += &format!("  problem: {problem}\n");
            }
            for path in agent.prober.stats() {
                let since = (world.now - path.since).as_secs_f32();
                text += &format!("  {} is {:?} since {since:.1} s\n", path.node, path.state);
            }
            for line in agent.device.describe(world.now) {
                text += &format!("{line}\n");
            }
        }
    }
    for link in world.network.faulty() {
        text += &format!("loss of {link} thousandths\n");
    }
    for line in &world.story {
        text += &format!("{line}\n");
    }
    text += &format!("seed {seed}, at {:.3} s: {finding}\n", world.seconds());
    let finding = finding.clone();
    Some(Failure {
        seed,
        finding,
        text,
    })
}

/// Runs schedules on all processors until one fails with a finding of these words.
fn run_many(
    seeds: std::ops::Range<u64>,
    mutant: Mutant,
    words: &str,
    totals: &Totals,
) -> Vec<Failure> {
    let next = AtomicU64::new(seeds.start);
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    let failures = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || !failures.lock().expect("no panic").is_empty() {
                        return;
                    }
                    if let Some(failure) = run_one(seed, mutant, totals)
                        && failure.finding.contains(words)
                    {
                        failures.lock().expect("no panic").push(failure);
                    }
                }
            });
        }
    });
    failures.into_inner().expect("no panic")
}

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(value.parse().expect("a number"))
}

#[test]
fn no_schedule_of_faults_breaks_an_invariant() {
    let totals = Totals::default();
    let begun = Instant::now();
    let failures = if let Some(seed) = number("SELVEDGE_SIM_SEED") {
        run_many(seed..seed + 1, Mutant::None, "", &totals)
    } else {
        let first = number("SELVEDGE_SIM_FIRST").unwrap_or(1);
        let count = number("SELVEDGE_SIM_SCHEDULES").unwrap_or(SCHEDULES);
        run_many(first..first + count, Mutant::None, "", &totals)
    };
    let get = |total: &AtomicU64| total.load(Ordering::Relaxed);
    eprintln!(
        "{} schedules, {} simulated seconds, {} events, {} checks of convergence, {} walks, {} passes with changes, in {:?}",
        get(&totals.schedules),
        get(&totals.millis) / 1000,
        get(&totals.events),
        get(&totals.checks),
        get(&totals.pairs),
        get(&totals.passes),
        begun.elapsed()
    );
    if let Some(failure) = failures.first() {
        panic!(
            "{}\nreplay: SELVEDGE_SIM_SEED={} cargo test --test sim",
            failure.text, failure.seed
        );
    }
}

/// Finds a mutant by what its finding says.
#[track_caller]
fn is_found(mutant: Mutant, words: &str) {
    let failures = run_many(1..1 + FOR_MUTANTS, mutant, words, &Totals::default());
    assert!(
        !failures.is_empty(),
        "the simulation does not find {mutant:?}"
    );
}

#[test]
fn deletions_before_additions_are_found() {
    is_found(Mutant::DeletesFirst, "no way to");
}

#[test]
fn a_verdict_in_the_topology_is_found() {
    is_found(Mutant::VerdictInTopology, "do not agree on the topology");
}

#[test]
fn a_controller_without_verdicts_is_found() {
    is_found(Mutant::NoVerdicts, "does not reach");
}

#[test]
fn a_leader_that_stops_without_a_drain_is_found() {
    is_found(Mutant::NoDrain, "a leader stopped after its drain");
}

#[test]
fn a_prober_without_flap_damping_is_found() {
    is_found(Mutant::NoDamping, "for good");
}

#[test]
fn a_mesh_without_relays_is_found() {
    is_found(Mutant::NoRelays, "does not reach");
}

#[test]
fn a_firewall_that_lets_packets_through_the_tunnel_twice_is_found() {
    is_found(Mutant::PassesOn, "reads a packet");
}

#[test]
fn a_firewall_that_lets_packets_turn_back_is_found() {
    is_found(Mutant::TurnsBack, "in a loop");
}
