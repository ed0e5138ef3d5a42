//! One node: its kernel, and the agent that runs on it with the real controller and reconciler.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use selvedge::agent::controller::{Controller, Effect, Setup, WallClock};
use selvedge::agent::kernel_facts::KernelFacts;
use selvedge::agent::key_rotation::OwnKeys;
use selvedge::cluster::View;
use selvedge::config::Config;
use selvedge::diff::Change;
use selvedge::probe::{Prober, Targets, Transmit};
use selvedge::reconciler::core::{Applied, Core};
use selvedge::reconciler::firewall::Job;
use selvedge::topology::{NodeName, Snapshot, Topology};
use selvedge::wireguard::PeerId;
use selvedge::wireguard::key::PublicKey;

use super::device::Device;
use super::echoes::Drain;
use super::kernel::Kernel;
use super::rng::Rng;
use super::walk::Fib;
use super::world::Mutant;

/// As the agent's loop: how often the tunnel's counters are read.
const TICK: Duration = Duration::from_secs(1);
const TICK_AT_REST: Duration = Duration::from_secs(5);
/// The reconciler's thread reads the kernel.
const FACTS: Duration = Duration::from_millis(1);
/// As the reconciler: how long it waits for a table in which only elements differ.
const ELEMENTS: Duration = Duration::from_millis(25);
/// `nft`, from the start of the program to its end.
const NFT: Duration = Duration::from_millis(15);
/// As the publisher: changes within this time are written together.
const DEBOUNCE: Duration = Duration::from_millis(200);

/// Whether an agent runs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Life {
    Running,
    /// It is stopped in the middle, and its tunnel with it: as by SIGSTOP, or without processor time.
    Paused,
    /// There is no process.
    Ended,
}

/// One run of an agent.
pub(crate) struct Agent {
    pub(crate) controller: Controller,
    core: Core,
    pub(crate) device: Device,
    pub(crate) shown: Arc<Topology>,
    /// The topologies of what the reconciler has to make, and of what it last made.
    wanted: Arc<Topology>,
    pub(crate) made: Arc<Topology>,
    /// Whether the leaders, their order or their probe addresses have changed.
    pub(crate) has_new_leaders: bool,
    /// The version of the API that it has seen.
    pub(crate) seen: Option<usize>,
    pub(crate) view_at: Option<Instant>,
    facts_at: Option<Instant>,
    tick_at: Instant,
    pub(crate) publish: Option<BTreeMap<&'static str, String>>,
    pub(crate) publish_at: Option<Instant>,
    firewall: Option<(Instant, Job)>,
    pass_at: Option<Instant>,
    pub(crate) prober: Prober,
    /// The addresses to which the device diverts echoes.
    pub(crate) diverted: BTreeSet<IpAddr>,
    /// What the prober sends inside the region.
    pub(crate) transmits: Vec<Transmit>,
    pub(crate) drain: Option<Drain>,
    /// What the echoes said, for people.
    pub(crate) said: Vec<String>,
    /// Whether the controller gets verdicts, which a mutant keeps from it.
    pub(crate) hears_echoes: bool,
    /// Whether each path to another region is up, and when it came up.
    pub(crate) returns: BTreeMap<PeerId, (bool, Vec<Instant>)>,
    /// Whether what is known of a path is kept when it goes down, which a mutant forgets.
    pub(crate) keeps_paths: bool,
}

pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) number: u8,
    pub(crate) key: PublicKey,
    pub(crate) config: Arc<Config>,
    pub(crate) is_on: bool,
    pub(crate) life: Life,
    pub(crate) kernel: Kernel,
    pub(crate) agent: Option<Agent>,
    /// What the last run of the agent saved.
    pub(crate) saved: Option<Arc<Snapshot>>,
    pub(crate) fib: Fib,
    /// The counters of changes when the look-ups were last computed.
    pub(crate) looked: (u64, u64),
    /// Whether an agent has made this node as desired since it was switched on.
    pub(crate) is_installed: bool,
    /// How long a change of the API takes to this node, and how far its clock is off in seconds.
    pub(crate) watch: Duration,
    pub(crate) skew: i64,
    /// When the world has to look at this node.
    pub(crate) wake_at: Option<Instant>,
    /// Passes that changed something.
    pub(crate) busy_passes: u64,
}

impl Node {
    pub(crate) fn is_running(&self) -> bool {
        self.is_on && self.life == Life::Running && self.agent.is_some()
    }

    /// Starts an agent. `run` tells its sessions from those of earlier runs.
    pub(crate) fn start(&mut self, now: Instant, run: u64, mutant: Mutant) {
        let setup = Setup {
            config: Arc::clone(&self.config),
            keys: OwnKeys::of(self.key),
            key_files: Vec::new(),
            resolved: Arc::default(),
        };
        let mut controller = Controller::new(setup, now);
        if let Some(snapshot) = &self.saved {
            let view = View {
                snapshot: Arc::clone(snapshot),
                live: false,
                ..View::default()
            };
            controller.handle_view(now, Arc::new(view));
        }
        self.kernel.end_tunnel();
        self.kernel.begin_tunnel(self.config.port);
        self.agent = Some(Agent {
            controller,
            core: Core::default(),
            device: Device::new(self.key, now, run),
            shown: Arc::default(),
            wanted: Arc::default(),
            made: Arc::default(),
            has_new_leaders: false,
            seen: None,
            view_at: None,
            facts_at: None,
            tick_at: now + TICK,
            publish: None,
            publish_at: None,
            firewall: None,
            pass_at: None,
            prober: prober(run),
            diverted: BTreeSet::new(),
            transmits: Vec::new(),
            drain: None,
            said: Vec::new(),
            returns: BTreeMap::new(),
            hears_echoes: mutant != Mutant::NoVerdicts,
            keeps_paths: mutant != Mutant::NoDamping,
        });
        self.life = Life::Running;
    }

    /// The agent's process ends, and the tunnel with it; link, routes and firewall stay.
    pub(crate) fn end(&mut self) {
        self.agent = None;
        self.life = Life::Ended;
        self.kernel.end_tunnel();
    }

    /// When something is due.
    pub(crate) fn poll_timeout(&self, now: Instant, api_is_up: bool) -> Option<Instant> {
        let agent = self.agent.as_ref().filter(|_| self.is_running())?;
        let firewall = agent.firewall.as_ref().map(|(at, _)| *at);
        [
            agent.controller.poll_timeout(),
            agent.core.poll_timeout(),
            agent.device.poll_timeout(),
            agent.view_at.filter(|_| api_is_up),
            agent.facts_at,
            Some(agent.tick_at),
            agent.publish_at.filter(|_| api_is_up),
            firewall,
            agent.pass_at,
            agent.prober.poll_timeout(),
            agent.drain_at(now),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Does what is due, but for views and publications, which are the world's.
    pub(crate) fn handle_timeout(
        &mut self,
        now: Instant,
        wall: WallClock,
        facts: impl FnOnce() -> KernelFacts,
    ) {
        let Some(agent) = self.agent.as_mut().filter(|_| self.is_on) else {
            return;
        };
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if is_due(agent.device.poll_timeout()) {
            agent.device.handle_timeout(now);
        }
        if is_due(agent.facts_at) {
            agent.facts_at = None;
            agent
                .controller
                .handle_tunnel(now, &agent.device.stats(now));
            agent.controller.handle_kernel(now, wall, facts());
        }
        if agent.tick_at <= now {
            agent
                .controller
                .handle_tunnel(now, &agent.device.stats(now));
            let off = (!self.kernel.forwards).then(|| "ip_forward is off".to_owned());
            agent.controller.handle_forwarding(now, off);
            let rest = agent.controller.is_at_rest() && !agent.device.take_events();
            agent.tick_at = now + if rest { TICK_AT_REST } else { TICK };
        }
        if let Some((_, job)) = agent.firewall.take_if(|(at, _)| *at <= now) {
            let waited = agent.core.waits_for_firewall();
            let outcome = self.kernel.work(job);
            let applied = agent.core.handle_firewall(outcome, now);
            agent.handle_applied(now, applied);
            if waited || agent.pass_at.is_some() {
                agent.pass_at = Some(now);
            }
        }
        if is_due(agent.core.poll_timeout()) {
            agent.pass_at = Some(now);
        }
        if is_due(agent.controller.poll_timeout()) {
            agent.controller.handle_timeout(now);
        }
        self.carry_out(now);
    }

    /// Carries out what the controller asks for.
    pub(crate) fn carry_out(&mut self, now: Instant) {
        if !self.is_running() {
            return;
        }
        loop {
            let Some(agent) = &mut self.agent else { return };
            agent.follow_echoes(now);
            if agent.controller.poll_timeout().is_some_and(|at| at <= now) {
                agent.controller.handle_timeout(now);
            }
            while let Some(effect) = agent.controller.poll_effect() {
                match effect {
                    Effect::Observe => agent.facts_at = Some(now + FACTS),
                    Effect::Publish(annotations) => {
                        if agent.publish.as_ref() != Some(&annotations) {
                            agent.publish = Some(annotations);
                        }
                        agent.publish_at.get_or_insert(now + DEBOUNCE);
                    }
                    Effect::Reconcile(desired) => {
                        agent.core.handle_desired(desired);
                        agent.wanted = Arc::clone(agent.controller.topology());
                        agent.pass_at = Some(now);
                    }
                    Effect::Probe(targets) => agent.set_targets(now, *targets),
                    Effect::Show(topology) => {
                        agent.has_new_leaders |= leads(&agent.shown) != leads(&topology);
                        agent.shown = topology;
                    }
                    Effect::FindPeer { id, candidates } => {
                        agent.device.try_candidates(now, &id, &candidates);
                    }
                    Effect::Save(saved) => self.saved = Some(saved.snapshot),
                    Effect::Judge(_)
                    | Effect::Translate(_)
                    | Effect::Report(_)
                    | Effect::KeepGuard(_)
                    | Effect::ChangeKeys(_)
                    | Effect::TryKey { .. }
                    | Effect::Resolve(_) => {}
                }
            }
            if agent.firewall.is_none()
                && let Some(job) = agent.core.poll_firewall(now)
            {
                agent.firewall = Some((now + NFT, job));
                if agent.core.has_new_elements() && agent.pass_at.is_some() {
                    agent.pass_at = Some(now + ELEMENTS);
                }
            }
            if agent.pass_at.take_if(|at| *at <= now).is_some() {
                self.pass(now);
            } else if agent.is_idle(now) {
                return;
            }
        }
    }

    fn pass(&mut self, now: Instant) {
        let Some(agent) = &mut self.agent else { return };
        let applied = agent.core.pass(&mut self.kernel, now);
        if !applied.made.is_empty() {
            self.busy_passes += 1;
            let is_tunnels = |change: &Change| matches!(change, Change::Tunnel(_));
            if applied.made.iter().any(is_tunnels) {
                agent.device.set_peers(now, &self.kernel.state().peers);
            }
        }
        agent.made = Arc::clone(&agent.wanted);
        self.is_installed |= !applied.waiting && !self.kernel.state().routes.is_empty();
        agent.handle_applied(now, applied);
    }
}

impl Agent {
    fn handle_applied(&mut self, now: Instant, applied: Applied) {
        let is_news = !applied.made.is_empty();
        self.controller.handle_applied(now, applied);
        if is_news {
            // The kernel reports the agent's own changes too.
            self.controller.handle_trigger(now);
        }
    }

    fn is_idle(&self, now: Instant) -> bool {
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        !is_due(self.controller.poll_timeout()) && !is_due(self.prober.poll_timeout())
    }

    fn set_targets(&mut self, now: Instant, targets: Targets) {
        self.diverted = targets.diverted();
        self.device.set_own_addresses(targets.own_addresses());
        self.prober.handle_targets(now, targets);
    }

    /// The tunnel has events: its counters are read at the next tick at the latest.
    pub(crate) fn hurry(&mut self, now: Instant) {
        if self.device.take_events() {
            self.tick_at = self.tick_at.min(now + TICK);
        }
    }
}

/// A prober whose tokens follow from the number of the agent's run.
fn prober(run: u64) -> Prober {
    let mut rng = Rng::new(run);
    let mut seed = [0; 32];
    for bytes in seed.chunks_mut(8) {
        bytes.copy_from_slice(&rng.next().to_be_bytes());
    }
    Prober::new(seed)
}

/// All leaders in their order, with their probe addresses.
fn leads(topology: &Topology) -> Vec<(&NodeName, Option<IpAddr>)> {
    let leaders = topology.leaders();
    leaders
        .map(|(_, leader)| (&leader.node, leader.probe_ip))
        .collect()
}
