//! The agent's control loop, simulated with a clock that the test turns, on kernels that fit in a test.
//!
//! Here one node's schedule, decisions and reconciler meet any cluster and any faults; in [`three_agents`] and
//! [`several_leaders`] the whole controllers of several nodes meet each other in a [`world`].

mod key_rotation;
mod several_leaders;
mod three_agents;
mod world;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use proptest::prelude::*;
use selvedge::agent::decision::{self, Facts};
use selvedge::agent::key_rotation::OwnKeys;
use selvedge::agent::schedule::{Outcome, Schedule};
use selvedge::config::Config;
use selvedge::diff::{Change, KernelChange};
use selvedge::kernel::flannel_repair::Repair;
use selvedge::reconciler::core::{Core, Desired, Failure, Platform};
use selvedge::reconciler::firewall::{Job, Outcome as FirewallOutcome};
use selvedge::state::{Ruleset, State};
use selvedge::topology::NodeName;

use crate::cluster_strategy::mesh;
use crate::fake_kernel::FakeKernel;
use crate::mesh::Mesh;

const RESYNC: Duration = Duration::from_secs(30);
/// What is promised: a repair within a second.
const REPAIR: Duration = Duration::from_secs(1);

/// Something that happens to a node from outside.
#[derive(Clone, Debug)]
enum Event {
    /// Another program removes the installed object of this number.
    Drift(usize),
    /// This many of the next changes fail.
    Faults(u8),
    /// Reading the kernel fails once.
    Blind,
    /// A Node is deleted, or comes back.
    Toggle(usize),
}

/// A kernel that fails when told to.
struct Shaky {
    kernel: FakeKernel,
    faults: u8,
    blind: bool,
}

impl Platform for Shaky {
    fn observe(&mut self) -> anyhow::Result<State> {
        if std::mem::take(&mut self.blind) {
            return Err(anyhow!("the socket overran"));
        }
        Ok(State {
            firewall: None,
            ..self.kernel.observe()
        })
    }

    fn apply_all<'a>(&mut self, changes: &'a [Change]) -> Vec<(&'a Change, anyhow::Error)> {
        let mut failed = Vec::new();
        for change in changes {
            if let Err(error) = self.apply(change) {
                failed.push((change, anyhow!(error)));
            }
        }
        failed
    }

    fn repair<'a>(&mut self, _: &'a [Repair]) -> Vec<(&'a Repair, anyhow::Error)> {
        Vec::new()
    }
}

impl Shaky {
    fn apply(&mut self, change: &Change) -> Result<(), String> {
        if self.faults > 0 {
            self.faults -= 1;
            return Err("EBUSY".to_owned());
        }
        self.kernel.apply(change)
    }

    /// What the firewall's worker does, at once.
    fn work(&mut self, job: Job) -> FirewallOutcome {
        let observed = self.kernel.observe().firewall;
        let wanted = job.firewall.as_deref().cloned().map(Box::new);
        let change = match wanted {
            Some(wanted) if observed == Some(Ruleset::Planned(wanted.clone())) => None,
            Some(wanted) => Some(Change::Kernel(KernelChange::ReplaceFirewall(wanted))),
            None => observed.map(|_| Change::Kernel(KernelChange::DeleteFirewall)),
        };
        let result = match &change {
            Some(change) => self.apply(change).map_err(|error| anyhow!(error)),
            None => Ok(()),
        };
        FirewallOutcome {
            firewall: job.firewall,
            took: Duration::ZERO,
            result: result.map(|()| change),
        }
    }
}

/// One node's agent, its kernel and the clock.
struct Sim {
    config: Config,
    mesh: Mesh,
    me: NodeName,
    absent: BTreeSet<NodeName>,
    node: Shaky,
    core: Core,
    schedule: Schedule,
    now: Instant,
    passes: u32,
    /// What the last pass could not do.
    failed: Vec<Failure>,
}

impl Sim {
    fn new(mesh: Mesh, me: &NodeName) -> Self {
        let config = Config::from_args([
            format!("--hostname={me}").as_str(),
            "--encapsulate=crosssubnet",
            "--service-cidr=10.43.0.0/16",
        ]);
        let kernel = FakeKernel::before_the_agent(&mesh, me);
        #[expect(clippy::disallowed_methods, reason = "an Instant has no other origin")]
        let now = Instant::now();
        Self {
            config: config.expect("these flags are good"),
            me: me.clone(),
            absent: BTreeSet::new(),
            node: Shaky {
                kernel,
                faults: 0,
                blind: false,
            },
            core: Core::default(),
            schedule: Schedule::new(now, RESYNC),
            mesh,
            now,
            passes: 0,
            failed: Vec::new(),
        }
    }

    fn desired(&self) -> Option<State> {
        let mut facts = Facts {
            snapshot: Arc::new(self.mesh.snapshot.clone()),
            resolved: Arc::new(self.mesh.resolved.clone()),
            unix_now: self.mesh.now,
            flannel: Some(self.mesh.flannel(&self.me)),
            underlay_mtu: Some(1500),
            api_servers: self.mesh.api_servers.clone(),
            alive: self.mesh.observed.clone(),
            ..Facts::default()
        };
        Arc::make_mut(&mut facts.snapshot)
            .nodes
            .retain(|name, _| !self.absent.contains(name));
        let decision = decision::decide(&facts, &self.config, &OwnKeys::of(crate::mesh::key(1)));
        decision.desired
    }

    /// Lets the agent run until then.
    fn run_until(&mut self, end: Instant) {
        loop {
            let due = self.schedule.poll_due();
            let retry = self.core.poll_timeout();
            let next = retry.map_or(due, |retry| retry.min(due));
            if next > end {
                break;
            }
            self.now = self.now.max(next);
            if due <= self.now {
                self.schedule.handle_start(self.now);
                let state = self.desired();
                self.core.handle_desired(Desired {
                    state,
                    interface: "kilo0".to_owned(),
                    ..Desired::default()
                });
            }
            if let Some(job) = self.core.poll_firewall(self.now) {
                let outcome = self.node.work(job);
                let made = self.core.handle_firewall(outcome, self.now).made;
                if !made.is_empty() {
                    self.schedule.handle_trigger(self.now);
                }
            }
            let applied = self.core.pass(&mut self.node, self.now);
            let outcome = Outcome::from(&applied);
            self.failed = applied.failures;
            self.schedule.handle_outcome(self.now, outcome);
            if !applied.made.is_empty() {
                // The kernel reports the agent's own changes too.
                self.schedule.handle_trigger(self.now);
            }
            self.passes += 1;
            assert!(self.passes < 10_000, "the loop does not rest");
        }
        self.now = end;
    }

    fn happen(&mut self, event: &Event) {
        match event {
            Event::Drift(number) => {
                let installed = removals(&self.node.kernel.observe());
                if let Some(removal) = installed.get(number % installed.len().max(1)) {
                    let _ = self.node.kernel.apply(removal);
                }
            }
            Event::Faults(count) => self.node.faults = *count,
            Event::Blind => self.node.blind = true,
            Event::Toggle(number) => {
                let others = self.mesh.names().filter(|name| **name != self.me);
                let others = others.cloned().collect::<Vec<_>>();
                if let Some(name) = others.get(number % others.len().max(1))
                    && !self.absent.remove(name)
                {
                    self.absent.insert(name.clone());
                }
            }
        }
        self.schedule.handle_trigger(self.now);
    }

    fn is_as_desired(&self) -> bool {
        self.desired()
            .is_none_or(|desired| self.node.kernel.observe() == desired)
    }
}

/// Everything that another program could remove.
fn removals(state: &State) -> Vec<Change> {
    let mut removals = Vec::new();
    removals.extend(
        state
            .routes
            .keys()
            .copied()
            .map(|it| Change::Kernel(KernelChange::DeleteRoute(it))),
    );
    removals.extend(
        state
            .rules
            .iter()
            .cloned()
            .map(|it| Change::Kernel(KernelChange::DeleteRule(it))),
    );
    removals.extend(
        state
            .firewall
            .iter()
            .map(|_| Change::Kernel(KernelChange::DeleteFirewall)),
    );
    if let Some(link) = &state.link {
        let dev = &link.name;
        removals.extend(state.addresses.keys().map(|address| {
            Change::Kernel(KernelChange::DeleteAddress {
                dev: dev.clone(),
                address: *address,
            })
        }));
        removals.extend(
            link.up
                .then(|| Change::Kernel(KernelChange::SetDown { name: dev.clone() })),
        );
        removals.push(Change::Kernel(KernelChange::DeleteLink {
            name: dev.clone(),
        }));
    }
    removals
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => any::<usize>().prop_map(Event::Drift),
        2 => (1..20u8).prop_map(Event::Faults),
        1 => Just(Event::Blind),
        3 => any::<usize>().prop_map(Event::Toggle),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 40, ..ProptestConfig::default() })]

    /// Whatever is taken away, and whatever changes in the cluster, is made good within a second.
    #[test]
    fn a_node_is_made_good_within_a_second(
        mesh in mesh(),
        me in any::<prop::sample::Index>(),
        events in proptest::collection::vec((event(), 0..3000u64), 1..30),
    ) {
        prop_assume!(mesh.names().next().is_some());
        let names = mesh.names().cloned().collect::<Vec<_>>();
        let mut sim = Sim::new(mesh, me.get(&names));
        sim.run_until(sim.now + REPAIR);
        prop_assert!(sim.is_as_desired(), "{:?}", sim.failed);

        for (event, pause) in &events {
            sim.happen(event);
            let faultless = sim.node.faults == 0 && !sim.node.blind;
            sim.run_until(sim.now + REPAIR);
            prop_assert!(!faultless || sim.is_as_desired(), "after {event:?}: {:?}", sim.failed);
            sim.run_until(sim.now + Duration::from_millis(*pause));
        }

        // Faults end, and the last of them is made good too.
        sim.node.faults = 0;
        sim.run_until(sim.now + Duration::from_secs(6));
        prop_assert!(sim.is_as_desired(), "{:?}", sim.failed);
    }

    /// A cluster that rests costs a look every resync period, and nothing is changed by it.
    #[test]
    fn a_node_at_rest_is_left_alone(mesh in mesh(), me in any::<prop::sample::Index>()) {
        prop_assume!(mesh.names().next().is_some());
        let names = mesh.names().cloned().collect::<Vec<_>>();
        let mut sim = Sim::new(mesh, me.get(&names));
        sim.run_until(sim.now + REPAIR);
        let passes = sim.passes;

        sim.run_until(sim.now + 20 * RESYNC);

        prop_assert!(sim.passes - passes <= 21, "{} passes", sim.passes - passes);
        prop_assert!(sim.is_as_desired(), "{:?}", sim.failed);
    }
}
