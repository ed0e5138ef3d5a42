//! The one event loop: snapshot, kernel event, timer or signal → plan → apply.
//!
//! The loop gathers [`reconcile::Facts`], lets [`reconcile::decide`] draw the conclusions and has a
//! pass made over the node; whatever happened, the pass is the same. It owns all state of the control
//! plane. Packets run on threads of the tunnel's own, the API is followed by tasks of the cluster
//! module, names are resolved by another; none of them is ever waited for.

pub mod address;
pub mod claim_clock;
pub mod cleanup;
pub mod control;
pub mod endpoint_discovery;
pub mod flannel;
pub mod flap_damping;
pub mod forwarding;
pub mod grace;
pub mod host;
pub mod keyfile;
pub mod kilo_clock;
pub mod mtu;
pub mod obstacle;
pub mod publication;
pub mod readiness;
pub mod reconcile;
pub mod report;
pub mod saved_view;
pub mod schedule;
mod start;
pub mod tenure;
pub mod timestamps;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use self::claim_clock::ClaimClock;
use self::endpoint_discovery::EndpointDiscovery;
use self::flap_damping::FlapDamping;
use self::forwarding::Firewall;
use self::grace::Grace;
use self::host::Host;
use self::keyfile::Origin;
use self::kilo_clock::KiloClock;
use self::obstacle::Obstacle;
use self::readiness::Readiness;
use self::reconcile::{Decision, Facts};
use self::report::Traffic;
use self::saved_view::SavedView;
use self::schedule::{Outcome, Schedule};
use self::tenure::Tenure;
use crate::clock::{now, unix_now};
use crate::cluster::{self, Access, Cluster, View};
use crate::config::Config;
use crate::diff::Change;
use crate::flannel::{Files, Unready};
use crate::guard::{Guard, boots};
use crate::kernel::Monitor;
use crate::kernel::flannel_repair::Repair;
use crate::node_lock::NodeLock;
use crate::plan::Caveat;
use crate::status::Report;
use crate::telemetry;
use crate::telemetry::metrics::{Event, Metrics};
use crate::topology::{Mode, Resolved, Topology};
use crate::wireguard::key::PublicKey;
use crate::wireguard::uapi;
use crate::{preflight, resolve};

/// How often the tunnel is asked where its peers are.
const TICK: Duration = Duration::from_secs(1);
/// Changes logged one by one; more of them are a new cluster, and a number says as much.
const LOGGED: usize = 40;
/// What to do beside each other: the agent itself needs one thread, look-ups of names block others.
const BLOCKING_THREADS: usize = 4;

/// Runs the agent until it is told to stop.
pub fn run(config: Config) -> anyhow::Result<ExitCode> {
    telemetry::start_logging(config.log_level, config.log_format);
    preflight::check()?;
    let lock = NodeLock::take(&config.interface)?;
    for note in &config.notes {
        tracing::info!("{note}");
    }
    let files = Files::read(config.flannel_conf.as_deref(), &config.subnet_file)?;
    if let Some(env) = &files.env {
        config.check_against_flannel(&env.networks)?;
    }
    // Last, so that who is refused leaves nothing on the disk.
    let (key, origin) = keyfile::load(&config.state_dir, Path::new(keyfile::KILO_KEY))?;
    match origin {
        Origin::Existing => {}
        Origin::Kilo => tracing::info!("took over Kilo's key {}", keyfile::KILO_KEY),
        Origin::Generated => tracing::info!(public_key = %key.public_key(), "made a new key"),
    }
    if boots::look(&config.state_dir) == boots::Verdict::DidNotRun {
        tracing::warn!("{}", boots::DID_NOT_RUN);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build()
        .context("starting the control plane")?;
    let result = runtime.block_on(async {
        let mut agent = Agent::start(config, key).await?;
        agent.run().await
    });
    // Look-ups of names may block for long; nobody needs their answers any more.
    runtime.shutdown_background();
    drop(lock);
    result
}

/// Everything the loop owns.
struct Agent {
    config: Config,
    public_key: PublicKey,
    host: Host,
    access: Access,
    cluster: Cluster,
    view: Option<Arc<View>>,
    /// Remembers the view for the next agent.
    writer: saved_view::Writer,
    /// The last good address of each name.
    resolved: Arc<Resolved>,
    facts: Facts,
    discovery: EndpointDiscovery,
    /// Limits how often a moving peer is published.
    flap_damping: FlapDamping,
    kilo_clock: KiloClock,
    /// How long this node has led.
    tenure: Tenure,
    /// The time that new claims are recorded with.
    claim_clock: ClaimClock,
    decision: Decision,
    schedule: Schedule,
    /// What flannel keeps this node waiting for.
    awaited: Option<String>,
    /// Whether flannel has IPv6, but this node has turned it off.
    without_ipv6: bool,
    /// The last region of nodes whose label is missing.
    grace: Grace,
    /// The files that hold this node's key.
    key_files: Vec<PathBuf>,
    firewall: Firewall,
    /// What the operator has to mend.
    obstacles: Vec<Obstacle>,
    /// What flannel forgot, to be put back by the next pass.
    forgotten: Vec<Repair>,
    /// What the last pass could not do, in sentences that were logged.
    failed: Vec<String>,
    readiness: Readiness,
    traffic: BTreeMap<PublicKey, Traffic>,
    drops: BTreeMap<String, u64>,
    shown: Shown,
    names: mpsc::Sender<BTreeSet<String>>,
    addresses: mpsc::Receiver<resolve::Addresses>,
    monitor: Monitor,
    /// For as long as `wg` can ask.
    _uapi: uapi::Server,
}

/// The ends at which people and probes look.
struct Shown {
    metrics: Arc<Metrics>,
    report: watch::Sender<Arc<Report>>,
    topology: watch::Sender<Arc<Topology>>,
    alive: watch::Sender<tokio::time::Instant>,
}

impl Agent {
    /// Turns causes into passes until a signal ends it.
    async fn run(&mut self) -> anyhow::Result<ExitCode> {
        let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
        // Taken, so that a terminal that goes away does not take the network with it.
        let _hangup = signal(SignalKind::hangup()).context("listening for SIGHUP")?;
        let mut views = self.cluster.views();
        let mut contact = self.cluster.api_status();
        self.view = views.borrow_and_update().clone();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);

        loop {
            self.shown.alive.send_replace(tokio::time::Instant::now());
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                changed = views.changed() => {
                    changed.context("following the cluster")?;
                    self.wait_for_servers();
                    self.view = views.borrow_and_update().clone();
                    self.schedule.handle_trigger(now());
                }
                changed = contact.changed() => {
                    changed.context("following the API server")?;
                    self.show();
                }
                event = self.monitor.changed() => {
                    let event = event.context("following the kernel")?;
                    if event.firewall {
                        self.firewall.handle_change();
                    }
                    if event.concerns_the_plan() {
                        self.schedule.handle_trigger(now());
                    }
                }
                Some(addresses) = self.addresses.recv() => {
                    self.resolved = Arc::new(addresses);
                    self.schedule.handle_trigger(now());
                }
                _ = ticks.tick() => self.look_at_tunnel(),
                () = tokio::time::sleep_until(self.schedule.poll_due().into()) => self.pass(),
            }
        }
        self.stop().await
    }
}

impl Agent {
    /// Looks at everything, decides, and makes it so.
    fn pass(&mut self) {
        let begun = now();
        self.gather();
        let mode = self.decision.topology.mode.clone();
        self.decision = reconcile::decide(&self.facts, &self.config, self.public_key);
        let (nodes, own) = (&self.facts.snapshot, &self.config.node);
        if obstacle::holder_of_key(nodes, own, self.public_key).is_some() {
            self.decision.desired = None;
            self.decision.annotations = None;
        }
        if self.decision.topology.mode != mode {
            tracing::info!("the mesh follows {}", self.decision.topology.mode);
        }
        self.follow_lead();
        if let Some(annotations) = self.decision.annotations.clone().filter(|_| self.is_live()) {
            self.cluster.publish(annotations);
        }
        self.look_for_obstacles();
        self.tell();
        // A full queue means that the names are about to be looked at anyway.
        let _ = self.names.try_send(self.decision.names.clone());

        if let Some(desired) = &self.decision.desired {
            self.writer.keep_guard(Guard::of(desired));
        }
        let mut pass = match &self.decision.desired {
            Some(desired) => reconcile::pass(&mut self.host, desired),
            None => reconcile::Pass::default(),
        };
        for repair in &self.forgotten {
            tracing::info!("for flannel: {repair}");
        }
        let unrepaired = self.host.kernel().rtnetlink.repair(&self.forgotten);
        pass.failed.extend(
            unrepaired
                .iter()
                .map(|(repair, error)| format!("{repair}: {error:#}")),
        );
        let outcome = pass.outcome();
        if outcome != Outcome::Unchanged {
            self.readiness.handle_unrest(now());
        }
        log_changes(&pass.made);
        self.complain(pass.failed);
        self.shown
            .metrics
            .reconciled(begun.elapsed(), pass.made.len(), outcome != Outcome::Failed);
        self.schedule.handle_outcome(now(), outcome);
        if let Some(at) = self.grace.poll_deadline() {
            self.schedule.handle_deadline(at);
        }
        if let Mode::Kilo(_) = self.decision.topology.mode {
            let due = kilo_clock::due(unix_now(), self.own_last_seen());
            self.schedule
                .handle_deadline(now() + Duration::from_secs(due));
        }
        self.shown
            .topology
            .send_replace(Arc::clone(&self.decision.topology));
        self.show();
    }

    /// Counts how long this node has led its segment, as far as the API says so.
    fn follow_lead(&mut self) {
        let lead = publication::lead(&self.decision.topology, &self.config.node);
        let lead = lead.filter(|_| self.is_live()).cloned();
        self.tenure.handle_lead(now(), lead.as_ref());
        if let Some(due) = self.tenure.poll_due(now()) {
            self.schedule.handle_deadline(due);
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

    /// Remembers the cluster, and has what the topology leaves out be reported.
    fn tell(&self) {
        let Some(view) = self.view.as_ref().filter(|view| view.live) else {
            return;
        };
        let mut saved = SavedView::new(view, Arc::clone(&self.resolved));
        self.grace.keep(&mut saved.snapshot);
        self.writer.save(saved);
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
        let own_reports = caveats.chain(obstacles);
        let reports = excluded.chain(overlaps).chain(own_reports).collect();
        let verdicts = cluster::verdicts(&self.config.node, view, &reports);
        self.cluster.judge(verdicts);
        self.cluster.report(reports);
    }

    /// Reads what the kernel and flannel's files say, and takes what else has come in.
    fn gather(&mut self) {
        let kernel = self.host.kernel();
        match kernel.rtnetlink.node_addresses() {
            Ok(addresses) => {
                let offered = addresses.iter().filter(|found| found.offered);
                self.facts.offered = offered.map(|found| found.net.addr()).collect();
                self.facts.links = addresses.into_iter().map(|found| found.net).collect();
            }
            Err(error) => tracing::warn!("reading this node's addresses: {error:#}"),
        }
        match kernel.rtnetlink.connected() {
            Ok(connected) => self.facts.connected = connected,
            Err(error) => tracing::warn!("reading the networks of this node: {error:#}"),
        }
        match kernel.rtnetlink.other_rules() {
            Ok(rules) => self.facts.other_rules = rules,
            Err(error) => tracing::warn!("reading the rules of other programs: {error:#}"),
        }
        match kernel.rtnetlink.uplink() {
            Ok(uplink) => self.facts.underlay_mtu = uplink.map(|uplink| uplink.mtu),
            Err(error) => tracing::warn!("reading the default route: {error:#}"),
        }
        if let Some(view) = &self.view {
            self.facts.snapshot = Arc::clone(&view.snapshot);
            match self.decision.topology.mode {
                Mode::Native => self.grace.handle_snapshot(&mut self.facts.snapshot, now()),
                // A `kg` follows a label at once, and all must follow it alike.
                Mode::Kilo(_) => self.grace = Grace::default(),
            }
            self.facts.resolved = Arc::clone(&self.resolved);
            self.facts.api_servers = view.servers.addresses.clone();
        }
        let server = self.access.server_time().unwrap_or_else(unix_now);
        let changed = self.view.as_ref().and_then(|view| view.own_changed);
        self.facts.server_time = Some(self.claim_clock.handle_time(now(), server, changed));
        self.facts.lead = self.tenure.poll_proven(now());
        // As late as can be: whoever moves meanwhile is not to be called back to where it was.
        self.listen();
        let (now, own) = (unix_now(), self.own_last_seen());
        self.facts.last_seen = kilo_clock::last_seen(now, own);
        self.facts.unix_now = self.kilo_clock.handle_clock(now, own, self.is_live());
        // What was last known of flannel stays in force while it restarts or makes its device anew.
        self.forgotten = Vec::new();
        let own = self.facts.snapshot.nodes.get(&self.config.node);
        match flannel::look(&self.config, self.host.kernel(), own) {
            Ok(found) => {
                self.awaited = None;
                if found.without_ipv6 && !self.without_ipv6 {
                    tracing::warn!(
                        "IPv6 is off on this node (sysctl net.ipv6.conf.default.disable_ipv6), so it carries IPv4 alone"
                    );
                }
                self.without_ipv6 = found.without_ipv6;
                let (topology, nodes) = (&self.decision.topology, &self.facts.snapshot.nodes);
                self.forgotten = flannel::forgotten(&found, topology, nodes, &self.config.node);
                self.facts.flannel = Some(found.flannel);
            }
            Err(Unready::Waiting(what)) => {
                self.awaited = Some(format!("waiting for flannel: {what}"))
            }
            Err(Unready::Refused(refusal)) => self.awaited = Some(refusal.sentence),
        }
    }

    /// Asks the tunnel where its peers are. One that moved, or came alive, is a cause for a pass.
    fn look_at_tunnel(&mut self) {
        if self.listen() {
            self.schedule.handle_trigger(now());
        }
        self.wait_for_servers();
        if self.look_for_obstacles() {
            self.schedule.handle_trigger(now());
        }
        if self.problems().is_empty() {
            self.readiness.handle_no_problems(now(), self.unheard());
        }
        self.show();
    }

    /// While API servers are being asked whether this host reaches them directly, it calls all of them
    /// so, and what it begins on the way to one that only the tunnel reaches comes to nothing.
    fn wait_for_servers(&mut self) {
        if self.view.as_ref().is_some_and(|view| view.servers.probing) {
            self.readiness.handle_unrest(now());
        }
    }

    /// Takes what the tunnel tells of its peers, and looks for those that may have moved. True if there is
    /// news.
    fn listen(&mut self) -> bool {
        let stats = self.host.stats();
        let (keys, candidates) = (&self.decision.keys, &self.decision.candidates);
        let moved = self.discovery.handle_own(self.decision.seen.clone());
        let mut alive = BTreeMap::new();
        let mut heard = BTreeMap::new();
        let mut callers = BTreeSet::new();
        self.traffic.clear();
        for (key, peer) in &stats.peers {
            let now = now();
            let candidates = candidates.get(key).map_or(&[][..], Vec::as_slice);
            let sign = endpoint_discovery::Sign {
                endpoint: peer.endpoint,
                received: peer.rx_bytes,
                age: peer.last_handshake,
                unanswered: peer.unanswered,
                answer: peer.answer,
            };
            let is_alive = self
                .discovery
                .handle_sign(*key, sign, candidates, keys, now);
            let mut tried = self.discovery.poll_search(key, keys, now);
            if let (Some(endpoint), Some(_)) = (peer.endpoint, peer.last_handshake) {
                heard.insert(*key, endpoint);
                if is_alive {
                    alive.insert(*key, endpoint);
                }
                // Their routers let this node's answers in when it has spoken first.
                let is_tried = tried.contains(&endpoint);
                tried.extend(
                    Some(endpoint).filter(|_| moved && !candidates.is_empty() && !is_tried),
                );
            }
            if peer.heard_unasked.is_some() {
                callers.insert(*key);
            }
            if !tried.is_empty() {
                self.host.look_for(key, &tried);
            }
            self.traffic.insert(
                *key,
                Traffic {
                    endpoint: peer.endpoint,
                    handshake_age: peer.last_handshake,
                    received: peer.rx_bytes,
                    sent: peer.tx_bytes,
                    candidates: self.discovery.outcomes(key, now),
                },
            );
        }
        self.discovery.retain(|key| stats.peers.contains_key(key));
        self.drops = stats
            .drops
            .iter()
            .map(|(reason, count)| (reason.label().to_owned(), *count))
            .collect();
        let (heard, flapping) = self.flap_damping.handle_observed(&heard, now());
        for peer in flapping {
            tracing::warn!(%peer, "peer endpoint flapping: publishing rate-limited");
        }
        let news =
            self.facts.alive != alive || self.facts.heard != heard || self.facts.callers != callers;
        self.facts.alive = alive;
        self.facts.heard = heard;
        self.facts.callers = callers;
        if news {
            self.readiness.handle_unrest(now());
        }
        news
    }

    /// How many peers have an endpoint and never answered.
    fn unheard(&self) -> usize {
        let desired = self.decision.desired.iter();
        desired
            .flat_map(|desired| &desired.peers)
            .filter(|(key, peer)| peer.endpoint.is_some() && !self.facts.heard.contains_key(key))
            .count()
    }

    /// Says once what cannot be done, and once that it can be done again.
    fn complain(&mut self, failed: Vec<String>) {
        for sentence in &failed {
            self.shown.metrics.error(Event::Apply);
            if !self.failed.contains(sentence) {
                tracing::warn!("{sentence}");
            }
        }
        if failed.is_empty() && !self.failed.is_empty() {
            tracing::info!("what failed is done now");
        }
        self.failed = failed;
    }

    /// What keeps this node from being as it should be.
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        problems.extend(self.awaited.clone());
        if self.view.is_none() {
            problems.push("waiting for the list of Nodes from the API server".to_owned());
        } else if !self.facts.snapshot.nodes.contains_key(&self.config.node) {
            problems.push(format!(
                "the cluster has no Node called {}: give --hostname",
                self.config.node
            ));
        } else if self.facts.flannel.is_some()
            && self.decision.desired.is_none()
            && self.obstacles.is_empty()
        {
            problems.push(format!(
                "node {} takes no part in the mesh yet",
                self.config.node
            ));
        }
        let caveats = self.decision.caveats.iter();
        let rules = caveats.filter(|caveat| matches!(caveat, Caveat::RuleInTheWay(_)));
        problems.extend(rules.map(ToString::to_string));
        let obstacles = self.obstacles.iter().map(|obstacle| &obstacle.sentence);
        problems.extend(obstacles.cloned());
        let is_told = |failed: &&String| {
            let mut obstacles = self.obstacles.iter();
            obstacles.any(|obstacle| failed.ends_with(&obstacle.sentence))
        };
        let failed = self.failed.iter().filter(|failed| !is_told(failed));
        problems.extend(failed.cloned());
        problems
    }

    /// Shows what is known now to people and probes.
    fn show(&self) {
        let rejected = self
            .view
            .iter()
            .flat_map(|view| &view.rejected)
            .map(ToString::to_string)
            .collect::<Vec<_>>();
        let contact = self.cluster.api_status();
        let mut problems = self.problems();
        problems.extend(self.readiness.poll_wait(now(), self.unheard()));
        let report = report::report(&report::Inputs {
            config: &self.config,
            public_key: self.public_key,
            facts: &self.facts,
            decision: &self.decision,
            contact: &contact.borrow(),
            live: self.is_live(),
            rejected: &rejected,
            problems: &problems,
            traffic: &self.traffic,
            drops: &self.drops,
            counters: self.host.kernel().nft.counters().ok(),
            cache_failures: self.writer.failures(),
        });
        let report = Arc::new(report);
        self.shown.metrics.set_report(Arc::clone(&report));
        self.shown.report.send_replace(report);
    }

    /// Leaves the data plane as it is, so that the next agent finds it at work; or removes it.
    async fn stop(&mut self) -> anyhow::Result<ExitCode> {
        if !self.config.clean_up {
            tracing::info!("stopped; link, routes and firewall stay for the next agent");
            return Ok(ExitCode::SUCCESS);
        }
        // Or what is withdrawn would be published again.
        self.cluster.end();
        self.writer.keep_guard(Guard::default());
        let (made, mut failures) = cleanup::remove_all(&mut self.host, &self.config);
        log_changes(&made);
        if let Err(error) = cleanup::withdraw(&self.access, &self.config).await {
            failures.push(format!("removing the annotations: {error:#}"));
        }
        for failure in &failures {
            self.shown.metrics.error(Event::CleanUp);
            tracing::warn!("{failure}");
        }
        Ok(if failures.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

/// One line for each change: the operator can follow what is done to the node.
fn log_changes(made: &[Change]) {
    for change in made.iter().take(LOGGED) {
        tracing::info!("{change}");
    }
    for change in made.iter().skip(LOGGED) {
        tracing::debug!("{change}");
    }
    if made.len() > LOGGED {
        tracing::info!("and {} more changes", made.len() - LOGGED);
    }
}
