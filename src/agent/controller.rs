//! The agent's control loop as a state machine: pure, without a clock, without I/O.

mod echoes;
mod effect;
mod keys;
mod problems;
mod tunnel;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::echoes::Echoes;
pub(super) use self::echoes::label;
pub use self::effect::Effect;
use super::claim_clock::ClaimClock;
use super::decision::{self, Decision, Facts};
use super::endpoint_discovery::EndpointDiscovery;
use super::flannel;
use super::flap_damping::FlapDamping;
use super::grace::Grace;
use super::kernel_facts::{FlannelFacts, KernelFacts};
use super::key_rotation::{KeyRotation, OwnKeys};
use super::kilo_clock::{self, KiloClock};
use super::linger::{Linger, Place};
use super::listen_port::ListenPort;
use super::obstacle::{self, Obstacle};
use super::publication;
use super::readiness::Readiness;
use super::report::{self, Traffic};
use super::saved_view::SavedView;
use super::schedule::{Outcome, Schedule};
use super::tenure::Tenure;
use crate::cluster::{self, ApiStatus, View, annotation, since};
use crate::config::Config;
use crate::flannel::{Flannel, Unready};
use crate::guard::Guard;
use crate::kernel::Counters;
use crate::kernel::flannel_repair::Repair;
use crate::probe::PathStats;
use crate::reconciler::core::{Applied, Desired, Failure, Source};
use crate::status::Report;
use crate::topology::{Mode, Resolved, Topology};
use crate::wireguard::key::PublicKey;

/// What an agent is started with.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The flags.
    pub config: Arc<Config>,
    /// This node's keys.
    pub keys: OwnKeys,
    /// The files that hold it.
    pub key_files: Vec<PathBuf>,
    /// The last good address of each name, from the run before.
    pub resolved: Arc<Resolved>,
}

/// The wall clocks at one moment, in Unix seconds. The API server's clock gives claims their age. Beside a real
/// `kg`, this node's clock decides which nodes take part.
#[derive(Clone, Copy, Debug, Default)]
pub struct WallClock {
    /// This node's.
    pub node: i64,
    /// The API server's clock, by the `Date` of its last answer.
    pub server: Option<i64>,
}

/// Decides everything that an agent does.
///
/// ```text
///            views ──► handle_view ─┐                    ┌─► Publish, Judge, Report ──► API
///        addresses ──► handle_resolved                   ├─► Resolve ──► names
///   kernel's news ───► handle_trigger ──► schedule       ├─► Save, KeepGuard ──► disk
///            clock ──► handle_timeout ─┘      │          ├─► Show ──► pages
///                                             ▼          │
///                                          Observe       │
///                                             │          │
///   reconciler ── facts ─► handle_kernel ──► decide ─────┴─► Reconcile ──► reconciler
///       │                                     ▲                                │
///       └──────── applied ─► handle_applied   │ observed endpoints             │
///                                             │                                ▼
///   tunnel ── counters ──► handle_tunnel ──► endpoint discovery ─► FindPeer ─► kernel, tunnel
///   echoes ── verdicts ──► handle_verdicts ──► schedule, decide ──► Probe ──► echoes
///          ── path MTUs ─► handle_mtus ──────► schedule, decide
/// ```
///
/// The contract, which is that of `quinn-proto` and other protocol state machines:
///
/// - The owner calls a `handle_` method for everything that happens, with the time at which it happened.
///   Times do not decrease. No call blocks, reads a clock or does I/O.
/// - After each call the owner takes effects with [`Self::poll_effect`] until there is none, and carries
///   them out in their order. Effects may take any time; the controller waits for none of them.
/// - An [`Effect::Observe`] is answered by [`Self::handle_kernel`], at any later time; until then no other
///   is asked for. Every pass of the reconciler comes by [`Self::handle_applied`], at least one for each
///   [`Effect::Reconcile`].
/// - At [`Self::poll_timeout`], or later, the owner calls [`Self::handle_timeout`].
/// - What people see is computed when they ask, by [`Self::report`].
///
/// The same calls lead to the same effects.
pub struct Controller {
    config: Arc<Config>,
    key_rotation: KeyRotation,
    /// This node's clock in Unix seconds, when the kernel was last read.
    unix: Option<(Instant, i64)>,
    key_files: Vec<PathBuf>,
    view: Option<Arc<View>>,
    resolved: Arc<Resolved>,
    facts: Facts,
    decision: Decision,
    /// When to look at everything again.
    schedule: Schedule,
    /// Whether an [`Effect::Observe`] is not answered yet.
    observing: bool,
    discovery: EndpointDiscovery,
    listen_port: ListenPort,
    flap_damping: FlapDamping,
    kilo_clock: KiloClock,
    tenure: Tenure,
    claim_clock: ClaimClock,
    grace: Grace,
    linger: Linger,
    readiness: Readiness,
    /// Why there is no flannel to work beside.
    awaited: Option<String>,
    /// Whether flannel has IPv6, but this node has turned it off.
    without_ipv6: bool,
    /// Which setting keeps this node from forwarding.
    forwarding_off: Option<String>,
    /// What the host's firewall does to forwarded packets.
    host_firewall: Option<String>,
    /// The obstacles that the operator has to remove.
    obstacles: Vec<Obstacle>,
    /// What the reconciler could not do yet.
    failures: Vec<Failure>,
    echoes: Echoes,
    /// Whether routes and rules wait for the firewall.
    firewall_awaited: bool,
    traffic: BTreeMap<PublicKey, Traffic>,
    /// Whether a decision was made since the tunnel's counters were last read.
    decided: bool,
    drops: BTreeMap<String, u64>,
    effects: VecDeque<Effect>,
}

impl Controller {
    /// A controller that knows nothing yet. Its first [`Effect::Observe`] is due at once.
    pub fn new(setup: Setup, now: Instant) -> Self {
        let Setup {
            config,
            keys,
            key_files,
            resolved,
        } = setup;
        Self {
            schedule: Schedule::new(now, config.resync_period),
            readiness: Readiness::new(now),
            listen_port: ListenPort::new(config.port, keys.current),
            key_rotation: KeyRotation::new(keys, config.rotate_key_after, config.key_overlap),
            unix: None,
            config,
            key_files,
            view: None,
            resolved,
            facts: Facts::default(),
            decision: Decision::default(),
            observing: false,
            discovery: EndpointDiscovery::default(),
            flap_damping: FlapDamping::default(),
            kilo_clock: KiloClock::default(),
            tenure: Tenure::default(),
            claim_clock: ClaimClock::default(),
            grace: Grace::default(),
            linger: Linger::default(),
            awaited: None,
            without_ipv6: false,
            forwarding_off: None,
            host_firewall: None,
            obstacles: Vec::new(),
            failures: Vec::new(),
            echoes: Echoes::default(),
            firewall_awaited: false,
            traffic: BTreeMap::new(),
            decided: false,
            drops: BTreeMap::new(),
            effects: VecDeque::new(),
        }
    }

    /// The cluster looks like this now.
    pub fn handle_view(&mut self, now: Instant, view: Arc<View>) {
        self.wait_for_servers(now);
        if let Some(own) = view.snapshot.nodes.get(&self.config.node) {
            self.claim_clock.handle_shown(now, &own.ledger);
        }
        self.view = Some(view);
        // The cluster module has waited for further changes.
        self.schedule.handle_news(now);
    }

    /// Something changed in the kernel.
    pub fn handle_trigger(&mut self, now: Instant) {
        self.schedule.handle_trigger(now);
    }

    /// Names resolve to these addresses now.
    pub fn handle_resolved(&mut self, now: Instant, resolved: Arc<Resolved>) {
        self.resolved = resolved;
        self.schedule.handle_trigger(now);
    }

    /// What the host's firewall does to what the mesh forwards, in one sentence; `None` if it lets it pass.
    pub fn handle_host_firewall(&mut self, now: Instant, problem: Option<String>) {
        let is_new = self.host_firewall != problem;
        self.host_firewall = problem;
        self.handle_obstacles(now);
        if is_new {
            self.follow_targets();
        }
    }

    /// Which setting keeps this node from forwarding, in one sentence; `None` if it forwards.
    pub fn handle_forwarding(&mut self, now: Instant, problem: Option<String>) {
        let is_new = self.forwarding_off != problem;
        self.forwarding_off = problem;
        self.handle_obstacles(now);
        // Called at every tick, and a large mesh has many targets.
        if is_new {
            self.follow_targets();
        }
    }

    /// The links between which a leader forwards, and whether IPv6 is forwarded too.
    pub fn forwarding_links(&self) -> (Vec<&str>, bool) {
        let flannel = self.facts.flannel.as_ref();
        let links = flannel.into_iter().flat_map(|flannel| &flannel.vteps);
        let links = links.map(|vtep| vtep.name.as_str());
        let mut networks = flannel.into_iter().flat_map(|flannel| &flannel.networks);
        let ipv6 = networks.any(|net| net.addr().is_ipv6());
        (
            links.chain([self.config.interface.as_str()]).collect(),
            ipv6,
        )
    }

    /// The time of [`Self::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Instant) {
        if !self.observing && self.schedule.poll_due() <= now {
            self.observing = true;
            self.schedule.handle_start(now);
            self.effects.push_back(Effect::Observe);
        }
    }

    /// The kernel says this: decides, and has everything be done that follows.
    pub fn handle_kernel(&mut self, now: Instant, wall: WallClock, kernel: KernelFacts) {
        self.observing = false;
        self.decided = true;
        self.unix = Some((now, wall.node));
        let repairs = self.gather(now, wall, kernel);
        let mode = self.decision.topology.mode.clone();
        self.decision = decision::decide(&self.facts, &self.config, self.key_rotation.keys());
        let (nodes, own) = (&self.facts.snapshot, &self.config.node);
        if obstacle::holder_of_key(nodes, own, self.public_key()).is_some() {
            self.decision.desired = None;
            self.decision.annotations = None;
        }
        if self.decision.topology.mode != mode {
            tracing::info!(mode = %self.decision.topology.mode, "mesh algorithm changed");
        }
        self.keep_former_leaders(now);
        self.follow_lead(now);
        if let Some(annotations) = self.decision.annotations.clone().filter(|_| self.is_live()) {
            self.follow_claims(now, &annotations);
            self.effects.push_back(Effect::Publish(annotations));
        }
        self.look_for_obstacles();
        self.report_to_cluster();
        let names = self.decision.names.clone();
        self.effects.push_back(Effect::Resolve(names));
        if let Some(desired) = &self.decision.desired {
            let guard = Guard::of(desired);
            self.effects.push_back(Effect::KeepGuard(guard));
        }
        // On every member: a former leader still carries packets for a moment.
        let aliases = self.decision.topology.aliases_at(&self.config.node);
        self.effects.push_back(Effect::Translate(aliases));
        self.effects.push_back(Effect::Reconcile(Desired {
            state: self.decision.desired.clone(),
            interface: self.config.interface.clone(),
            listen_port: std::num::NonZeroU16::new(self.listen_port.port()),
            repairs,
        }));
        self.follow_decided_targets();
        let topology = Arc::clone(&self.decision.topology);
        self.effects.push_back(Effect::Show(topology));

        let deadlines = [self.grace.poll_deadline(), self.linger.poll_deadline(now)];
        for at in deadlines.into_iter().flatten() {
            self.schedule.handle_deadline(at);
        }
        if let Mode::Kilo(_) = self.decision.topology.mode {
            let due = kilo_clock::due(wall.node, self.own_last_seen());
            self.schedule
                .handle_deadline(now + Duration::from_secs(due));
        }
    }

    /// The reconciler made these changes, and this is all that it could not do.
    pub fn handle_applied(&mut self, now: Instant, applied: Applied) {
        let outcome = Outcome::from(&applied);
        if outcome != Outcome::Unchanged {
            self.readiness.handle_unrest(now);
        }
        // The firewall's worker has a limit of its own.
        if applied.source == Source::Pass {
            self.schedule.handle_outcome(now, outcome);
            if !applied.waiting {
                self.follow_routed_targets();
                self.try_relays(now);
            }
        }
        self.firewall_awaited = applied.waiting;
        self.handle_failures(applied.failures);
        self.handle_obstacles(now);
    }

    /// The next thing to do, if there is one.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When [`Self::handle_timeout`] is to be called; `None` while facts are awaited.
    pub fn poll_timeout(&self) -> Option<Instant> {
        (!self.observing).then(|| self.schedule.poll_due())
    }

    /// Everything that people and probes see, as of now.
    pub fn report(&self, now: Instant, shell: &ShellFacts) -> Report {
        let rejected = self
            .view
            .iter()
            .flat_map(|view| &view.rejected)
            .map(ToString::to_string)
            .collect::<Vec<_>>();
        let mut problems = self.problems();
        problems.extend(self.readiness.poll_wait(now, self.unheard()));
        report::report(&report::Inputs {
            config: &self.config,
            public_key: self.public_key(),
            keys: self.report_keys(now),
            facts: &self.facts,
            decision: &self.decision,
            contact: &shell.api,
            live: self.is_live(),
            rejected: &rejected,
            problems: &problems,
            traffic: &self.traffic,
            listen_port: &self.listen_port,
            drops: &self.drops,
            counters: shell.counters,
            cache_failures: shell.cache_failures,
            now,
            paths: &shell.paths,
            echo_failures: shell.echo_failures,
            failovers: &self.echoes.failovers,
        })
    }

    /// The topology of the last decision.
    pub fn topology(&self) -> &Arc<Topology> {
        &self.decision.topology
    }

    /// Keeps tunnels for a moment that a change of leaders takes away. A real `kg` keeps none.
    fn keep_former_leaders(&mut self, now: Instant) {
        let topology = &self.decision.topology;
        let own = &self.config.node;
        let place = match topology.mode {
            Mode::Native => topology.segment_of(own).map(|segment| Place {
                segment,
                leads: segment.leader(own).is_some(),
                topology,
            }),
            Mode::Kilo(_) => None,
        };
        let linger = &mut self.linger;
        let desired = self.decision.desired.take();
        self.decision.desired = desired.map(|desired| linger.handle_desired(desired, place, now));
    }

    /// Takes what the kernel, flannel and the cluster say into the facts; returns what flannel forgot.
    fn gather(&mut self, now: Instant, wall: WallClock, kernel: KernelFacts) -> Vec<Repair> {
        let facts = &mut self.facts;
        if let Some(addresses) = kernel.addresses {
            let offered = addresses.iter().filter(|found| found.offered);
            facts.offered = offered.map(|found| found.net.addr()).collect();
            facts.links = addresses.into_iter().map(|found| found.net).collect();
        }
        facts.connected = kernel
            .connected
            .unwrap_or_else(|| std::mem::take(&mut facts.connected));
        facts.other_rules =
            (kernel.other_rules).unwrap_or_else(|| std::mem::take(&mut facts.other_rules));
        facts.underlay_mtu = kernel.underlay_mtu.unwrap_or(facts.underlay_mtu);
        if let Some(view) = &self.view {
            facts.snapshot = Arc::clone(&view.snapshot);
            match self.decision.topology.mode {
                Mode::Native => self.grace.handle_snapshot(&mut facts.snapshot, now),
                // A `kg` follows a label at once, and all must follow it alike.
                Mode::Kilo(_) => self.grace = Grace::default(),
            }
            facts.api_servers = view.servers.addresses.clone();
        }
        facts.resolved = Arc::clone(&self.resolved);
        let own = facts.snapshot.nodes.get(&self.config.node);
        if let Some(endpoint) = own.and_then(|own| own.endpoint.as_ref()) {
            self.listen_port.handle_published(endpoint.port(), now);
        }
        facts.listen_port = Some(self.listen_port.port());
        let changed = self.view.as_ref().and_then(|view| view.own_changed);
        let server = wall.server.unwrap_or(wall.node);
        facts.server_time = Some(self.claim_clock.handle_time(server, changed));
        facts.pending = self.claim_clock.pending();
        facts.lead = self.tenure.poll_proven(now);
        let (own, is_live) = (self.own_last_seen(), self.is_live());
        self.facts.last_seen = kilo_clock::last_seen(wall.node, own);
        self.facts.unix_now = self.kilo_clock.handle_clock(wall.node, own, is_live);
        self.gather_flannel(kernel.flannel)
    }

    /// What was last known of flannel stays in force while it restarts or recreates its device.
    fn gather_flannel(&mut self, found: Result<FlannelFacts, Unready>) -> Vec<Repair> {
        let own = self.facts.snapshot.nodes.get(&self.config.node);
        let lease = own.and_then(|node| node.lease.as_ref());
        let assembled = found.and_then(|found| {
            let (vteps, hops) = (found.state.vteps.clone(), found.state.next_hops.clone());
            let flannel = Flannel::assemble(&found.files, lease, vteps, hops)?;
            Ok((flannel, found))
        });
        match assembled {
            Ok((flannel, found)) => {
                self.awaited = None;
                if found.without_ipv6 && !self.without_ipv6 {
                    tracing::warn!(
                        sysctl = "net.ipv6.conf.default.disable_ipv6",
                        "IPv6 is off on this node: only IPv4 is carried"
                    );
                }
                self.without_ipv6 = found.without_ipv6;
                let (topology, nodes) = (&self.decision.topology, &self.facts.snapshot.nodes);
                let me = &self.config.node;
                let forgotten = flannel::forgotten(&flannel, &found.state, topology, nodes, me);
                self.facts.flannel = Some(flannel);
                forgotten
            }
            Err(Unready::Waiting(what)) => {
                self.awaited = Some(format!("waiting for flannel: {what}"));
                Vec::new()
            }
            Err(Unready::Refused(refusal)) => {
                self.awaited = Some(refusal.sentence);
                Vec::new()
            }
        }
    }

    /// Remembers the times of the claims that are written.
    fn follow_claims(&mut self, now: Instant, annotations: &cluster::Annotations) {
        let own = self.facts.snapshot.nodes.get(&self.config.node);
        let text = annotations.get(annotation::SINCE);
        if let (Some(own), Some(written)) = (own, text.and_then(|text| since::parse(text).ok())) {
            let written = &written.ledger;
            self.claim_clock.handle_published(now, written, &own.ledger);
        }
    }

    /// Counts how long this node has led its segment, as far as the API says so.
    fn follow_lead(&mut self, now: Instant) {
        let lead = publication::lead(&self.decision.topology, &self.config.node);
        let lead = lead.filter(|_| self.is_live()).cloned();
        self.tenure.handle_lead(now, lead.as_ref());
        if let Some(due) = self.tenure.poll_due(now) {
            self.schedule.handle_deadline(due);
        }
    }

    /// Saves the cluster, and reports what the topology leaves out.
    fn report_to_cluster(&mut self) {
        let Some(view) = self.view.as_ref().filter(|view| view.live) else {
            return;
        };
        let mut saved = SavedView::new(view, Arc::clone(&self.resolved));
        self.grace.keep(&mut saved.snapshot);
        let (own, topology) = (&self.config.node, &self.decision.topology);
        let excluded = topology.excluded.iter();
        // Its obstacle says more.
        let excluded = excluded.filter(|excluded| !obstacle::is_key_taken(excluded, own));
        let excluded = excluded.map(cluster::Notice::from);
        let overlaps = topology.overlaps.iter().map(cluster::Notice::from);
        let caveats = self.decision.caveats.iter();
        let caveats = caveats.map(|caveat| cluster::Notice::of_caveat(own, caveat));
        let obstacles = self.obstacles.iter();
        let obstacles = obstacles.map(|obstacle| obstacle.report(own));
        let own_reports = caveats.chain(obstacles).chain(self.path_notices());
        let own_reports = own_reports.chain(self.key_notice());
        let reports = excluded.chain(overlaps).chain(own_reports).collect();
        let verdicts = cluster::verdicts(own, view, &reports);
        self.effects.push_back(Effect::Save(saved));
        self.effects.push_back(Effect::Judge(verdicts));
        self.effects.push_back(Effect::Report(reports));
    }

    /// While API servers are being asked whether this host reaches them directly, all of them count as
    /// reached so, and a connection to one that only the tunnel reaches fails.
    fn wait_for_servers(&mut self, now: Instant) {
        if self.view.as_ref().is_some_and(|view| view.servers.probing) {
            self.readiness.handle_unrest(now);
        }
    }

    /// Whether what is known of the cluster comes from the API.
    fn is_live(&self) -> bool {
        self.view.as_ref().is_some_and(|view| view.live)
    }

    /// This node's last check-in, as the API shows it.
    fn own_last_seen(&self) -> Option<i64> {
        let own = self.facts.snapshot.nodes.get(&self.config.node)?;
        own.last_seen
    }
}

/// What a report shows beside what the controller knows.
#[derive(Clone, Debug, Default)]
pub struct ShellFacts {
    /// How the API is reached.
    pub api: ApiStatus,
    /// What the nft table counted; `None` where it could not be asked.
    pub counters: Option<Counters>,
    /// How often the cluster's state could not be written to disk.
    pub cache_failures: u64,
    /// The paths over which echoes are sent.
    pub paths: Vec<PathStats>,
    /// How often the socket of the echoes failed.
    pub echo_failures: u64,
}

#[cfg(test)]
mod tests;
