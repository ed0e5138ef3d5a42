//! The one event loop: snapshot, kernel event, timer or signal → plan → apply.
//!
//! The loop gathers [`reconcile::Facts`], lets [`reconcile::decide`] draw the conclusions and has a
//! pass made over the node; whatever happened, the pass is the same. It owns all state of the control
//! plane. Packets run on threads of the tunnel's own, the API is followed by tasks of the cluster
//! module, names are resolved by another; none of them is ever waited for.

pub mod address;
pub mod checkin;
pub mod cleanup;
pub mod control;
pub mod hearing;
pub mod keyfile;
pub mod machine;
pub mod preflight;
mod private;
pub mod publication;
pub mod reconcile;
pub mod report;
pub mod resolve;
pub mod schedule;
pub mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use self::checkin::CheckIn;
use self::control::NodeLock;
use self::hearing::Hearing;
use self::keyfile::Origin;
use self::machine::Machine;
use self::reconcile::{Decision, Facts};
use self::report::Traffic;
use self::schedule::{Outcome, Schedule};
use self::state::Saved;
use crate::cluster::{self, Access, Cluster, ParseSettings, Sources, View};
use crate::config::Config;
use crate::flannel::{Files, Flannel, Unready};
use crate::kernel::heal::{self, FlannelState, Repair};
use crate::kernel::{Kernel, Monitor, ipv6_is_off};
use crate::plan::{Link, State};
use crate::refusal::Refusal;
use crate::status::Report;
use crate::telemetry;
use crate::telemetry::metrics::{Event, Metrics};
use crate::telemetry::pages::{self, Pages};
use crate::topology::{Mode, Topology};
use crate::wireguard::key::{PrivateKey, PublicKey};
use crate::wireguard::{self, Device, uapi};

/// How often the tunnel is asked where its peers are, and flannel's files are looked at.
const TICK: Duration = Duration::from_secs(1);
/// Changes logged one by one; more of them are a new cluster, and a number says as much.
const LOGGED: usize = 40;
/// A new agent is ready when nothing had to be changed for so long: what others publish in answer to
/// it has come in by then.
const SETTLED: Duration = Duration::from_secs(1);
/// How long a new agent waits for its peers' first answers before it is ready without them.
const FIRST_HANDSHAKES: Duration = Duration::from_secs(10);
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
    let (key, origin) = keyfile::load(&config.state_dir, Path::new(keyfile::KILO_KEY))?;
    match origin {
        Origin::Existing => {}
        Origin::Kilo => tracing::info!("took over Kilo's key {}", keyfile::KILO_KEY),
        Origin::Generated => tracing::info!(public_key = %key.public_key(), "made a new key"),
    }
    let files = Files::read(config.flannel_conf.as_deref(), &config.subnet_file)?;
    if let Some(env) = &files.env {
        config.check_against_flannel(&env.networks)?;
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
    machine: Machine,
    access: Access,
    cluster: Cluster,
    view: Option<Arc<View>>,
    /// Remembers the view for the next agent.
    writer: state::Writer,
    /// The last good address of each name.
    resolved: resolve::Addresses,
    facts: Facts,
    hearing: Hearing,
    check_in: CheckIn,
    decision: Decision,
    schedule: Schedule,
    /// What flannel keeps this node waiting for.
    awaited: Option<String>,
    /// Whether flannel has IPv6, but this node has turned it off.
    without_ipv6: bool,
    /// What flannel forgot, to be put back by the next pass.
    forgotten: Vec<Repair>,
    /// What the last pass could not do.
    failed: Vec<String>,
    /// When the agent began, when it last had to change something, and whether it has been ready.
    begun: Instant,
    last_change: Instant,
    settled: bool,
    /// What was already said to have failed.
    complained: BTreeSet<String>,
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
    /// Opens and starts everything, in the order in which it may be refused.
    async fn start(config: Config, key: PrivateKey) -> anyhow::Result<Self> {
        let listener = pages::bind(config.listen).await?;
        let sources = Sources {
            mark: Some(config.fwmark),
            ..Sources::new(config.kubeconfig.clone(), config.master.clone())
        };
        let access = Access::new(sources).await?;
        let kernel = Kernel::open(&config.interface)?;
        kernel.check(config.rule_priorities())?;
        // Before the first look, so that nothing is missed in between.
        let monitor = Monitor::open(&config.interface)?;
        let public_key = key.public_key();
        let device = start_tunnel(&config, key)?;
        let uapi = uapi::serve(&config.interface, device.clone())?;

        let shown = Shown {
            metrics: Arc::new(Metrics::new()),
            report: watch::channel(Arc::new(Report::default())).0,
            topology: watch::channel(Arc::default()).0,
            alive: watch::channel(tokio::time::Instant::now()).0,
        };
        match control::bind(&config.control_socket) {
            Ok(socket) => {
                tokio::spawn(control::serve(socket, shown.report.subscribe()));
            }
            // The mesh does not depend on being looked at.
            Err(error) => tracing::warn!(
                path = %config.control_socket.display(),
                %error,
                "selvedge status cannot ask this agent"
            ),
        }
        if let Some(listener) = listener {
            let pages = Pages {
                metrics: Arc::clone(&shown.metrics),
                report: shown.report.subscribe(),
                topology: shown.topology.subscribe(),
                alive: shown.alive.subscribe(),
            };
            tokio::spawn(pages::serve(listener, pages));
        }

        let settings = ParseSettings {
            topology_label: config.topology_label.clone(),
        };
        // A node that starts while no API server answers is as it was when it stopped.
        let saved = state::load(&config.state_dir);
        let resolved = saved
            .as_ref()
            .map(|saved| saved.snapshot.resolved.clone())
            .unwrap_or_default();
        let cached = saved.map(Saved::into_view);
        let cluster = Cluster::start(access.clone(), config.node.clone(), settings, cached);
        let (names, wanted) = mpsc::channel(8);
        let (found, addresses) = mpsc::channel(8);
        tokio::spawn(resolve::follow(wanted, found, resolved.clone()));

        tracing::info!(
            node = %config.node,
            version = env!("CARGO_PKG_VERSION"),
            %public_key,
            "started"
        );
        Ok(Self {
            schedule: Schedule::new(now(), config.resync_period),
            machine: Machine::new(kernel, device),
            access,
            cluster,
            view: None,
            writer: state::Writer::start(config.state_dir.clone()).context("starting a thread")?,
            resolved,
            facts: Facts::default(),
            hearing: Hearing::default(),
            check_in: CheckIn::default(),
            decision: Decision::default(),
            awaited: None,
            without_ipv6: false,
            forgotten: Vec::new(),
            failed: Vec::new(),
            begun: now(),
            last_change: now(),
            settled: false,
            complained: BTreeSet::new(),
            traffic: BTreeMap::new(),
            drops: BTreeMap::new(),
            shown,
            names,
            addresses,
            monitor,
            _uapi: uapi,
            public_key,
            config,
        })
    }

    /// Turns causes into passes until a signal ends it.
    async fn run(&mut self) -> anyhow::Result<ExitCode> {
        let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
        // Taken, so that a terminal that goes away does not take the network with it.
        let _hangup = signal(SignalKind::hangup()).context("listening for SIGHUP")?;
        let mut views = self.cluster.views();
        let mut contact = self.cluster.contact();
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
                    self.view = views.borrow_and_update().clone();
                    self.schedule.handle_cause(now());
                }
                changed = contact.changed() => {
                    changed.context("following the API server")?;
                    self.show();
                }
                event = self.monitor.changed() => {
                    event.context("following the kernel")?;
                    self.schedule.handle_cause(now());
                }
                Some(addresses) = self.addresses.recv() => {
                    self.resolved = addresses;
                    self.schedule.handle_cause(now());
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
        if self.decision.topology.mode != mode {
            tracing::info!("the mesh follows {}", self.decision.topology.mode);
        }
        if let Some(annotations) = self.decision.annotations.clone().filter(|_| self.is_live()) {
            self.cluster.publish(annotations);
        }
        self.tell();
        // A full queue means that the names are about to be looked at anyway.
        let _ = self.names.try_send(self.decision.names.clone());

        let pass = match &self.decision.desired {
            Some(desired) => reconcile::pass(&mut self.machine, desired),
            None => reconcile::Pass::default(),
        };
        let mut pass = pass;
        for repair in &self.forgotten {
            tracing::info!("for flannel: {repair}");
        }
        let unhealed = self.machine.kernel().heal(&self.forgotten);
        pass.failed.extend(
            unhealed
                .iter()
                .map(|(repair, error)| format!("{repair}: {error:#}")),
        );
        let outcome = pass.outcome();
        if outcome != Outcome::Unchanged {
            self.last_change = now();
        }
        log_changes(&pass.made);
        self.complain(pass.failed);
        self.shown
            .metrics
            .reconciled(begun.elapsed(), pass.made.len(), outcome != Outcome::Failed);
        self.schedule.handle_outcome(now(), outcome);
        if let Mode::Kilo(_) = self.decision.topology.mode {
            let due = checkin::due(unix_now(), self.own_last_seen());
            self.schedule
                .handle_deadline(now() + Duration::from_secs(due));
        }
        self.shown
            .topology
            .send_replace(Arc::new(self.decision.topology.clone()));
        self.show();
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
        self.writer.save(Saved::new(view, &self.resolved));
        let topology = &self.decision.topology;
        let excluded = topology.excluded.iter().map(cluster::Report::from);
        let overlaps = topology.overlaps.iter().map(cluster::Report::from);
        let reports = excluded.chain(overlaps).collect();
        let verdicts = cluster::verdicts(&self.config.node, view, &reports);
        self.cluster.judge(verdicts);
        self.cluster.report(reports);
    }

    /// Reads what the kernel and flannel's files say, and takes what else has come in.
    fn gather(&mut self) {
        let kernel = self.machine.kernel();
        match kernel.node_addresses() {
            Ok(addresses) => {
                self.facts.links = addresses.into_iter().map(|found| found.net).collect()
            }
            Err(error) => tracing::warn!("reading this node's addresses: {error:#}"),
        }
        match kernel.uplink() {
            Ok(uplink) => self.facts.underlay_mtu = uplink.map(|uplink| uplink.mtu),
            Err(error) => tracing::warn!("reading the default route: {error:#}"),
        }
        if let Some(view) = &self.view {
            self.facts.snapshot = view.snapshot.clone();
            self.facts.snapshot.resolved = self.resolved.clone();
            self.facts.api_servers = view.servers.addresses.clone();
        }
        let (now, own) = (unix_now(), self.own_last_seen());
        self.facts.last_seen = checkin::last_seen(now, own);
        self.facts.snapshot.now = self.check_in.handle_clock(now, own, self.is_live());
        // What was last known of flannel stays in force while it restarts or makes its device anew.
        self.forgotten = Vec::new();
        match self.flannel() {
            Ok((flannel, found, without_ipv6)) => {
                self.awaited = None;
                if without_ipv6 && !self.without_ipv6 {
                    tracing::warn!(
                        "IPv6 is off on this node (sysctl net.ipv6.conf.default.disable_ipv6), so it carries IPv4 alone"
                    );
                }
                self.without_ipv6 = without_ipv6;
                self.forgotten = self.forgotten_by(&flannel, &found);
                self.facts.flannel = Some(flannel);
            }
            Err(Unready::Waiting(what)) => {
                self.awaited = Some(format!("waiting for flannel: {what}"))
            }
            Err(Unready::Refused(refusal)) => self.awaited = Some(refusal.sentence),
        }
    }

    /// flannel here, what the kernel holds of it, and whether its IPv6 is left out.
    fn flannel(&self) -> Result<(Flannel, FlannelState, bool), Unready> {
        let mut files = Files::read(
            self.config.flannel_conf.as_deref(),
            &self.config.subnet_file,
        )?;
        let without_ipv6 = ipv6_is_off(&self.config.interface) && files.leave_out_ipv6()?;
        let own = self.facts.snapshot.nodes.get(&self.config.node);
        let lease = own.and_then(|node| node.lease.as_ref());
        let networks = files.env.as_ref().map(|env| env.networks.as_slice());
        let found = self
            .machine
            .kernel()
            .flannel(networks.unwrap_or_default())
            .map_err(|error| Unready::Waiting(format!("{error:#}")))?;
        let flannel =
            Flannel::assemble(&files, lease, found.vteps.clone(), found.next_hops.clone())?;
        Ok((flannel, found, without_ipv6))
    }

    /// What flannel lost of its own when its device was made anew: it does not put it back.
    fn forgotten_by(&self, flannel: &Flannel, found: &FlannelState) -> Vec<Repair> {
        let nodes = &self.facts.snapshot.nodes;
        let Some(own) = self.decision.topology.segment_of(&self.config.node) else {
            return Vec::new();
        };
        let topology = &self.decision.topology;
        let members = topology
            .segments
            .iter()
            .filter(|segment| segment.group == own.group)
            .flat_map(|segment| segment.nodes.iter().map(|member| &member.name));
        let outsiders = topology
            .outsiders
            .iter()
            .filter(|outsider| outsider.group == own.group)
            .map(|outsider| &outsider.name);
        let others = members
            .chain(outsiders)
            .filter(|name| **name != self.config.node)
            .filter_map(|name| {
                let node = nodes.get(name)?;
                Some((node.pod_cidrs.as_slice(), node.lease.as_ref()?))
            })
            .collect::<Vec<_>>();
        heal::missing(flannel, &others, found)
    }

    /// Asks the tunnel where its peers are. One that moved, or came alive, is a cause for a pass.
    fn look_at_tunnel(&mut self) {
        let stats = self.machine.stats();
        let mut alive = BTreeMap::new();
        let mut heard = BTreeMap::new();
        self.traffic.clear();
        for (key, peer) in &stats.peers {
            self.traffic.insert(
                *key,
                Traffic {
                    endpoint: peer.endpoint,
                    handshake_age: peer.last_handshake,
                    received: peer.rx_bytes,
                    sent: peer.tx_bytes,
                },
            );
            let (Some(endpoint), Some(age)) = (peer.endpoint, peer.last_handshake) else {
                continue;
            };
            heard.insert(*key, endpoint);
            let topology = &self.decision.topology;
            let there = self
                .hearing
                .handle_stats(*key, peer.rx_bytes, age, topology, now());
            if there {
                alive.insert(*key, endpoint);
            }
        }
        self.hearing.retain(|key| stats.peers.contains_key(key));
        self.drops = stats
            .drops
            .iter()
            .map(|(reason, count)| (reason.label().to_owned(), *count))
            .collect();
        if self.facts.alive != alive || self.facts.heard != heard {
            self.facts.alive = alive;
            self.facts.heard = heard;
            self.schedule.handle_cause(now());
        }
        self.settled |= self.problems().is_empty() && self.unsettled().is_none();
        self.show();
    }

    /// What a new agent waits for although it has done all it can.
    fn unsettled(&self) -> Option<String> {
        if self.last_change.elapsed() < SETTLED {
            return Some("waiting for the mesh to settle".to_owned());
        }
        let peers = self
            .decision
            .desired
            .iter()
            .flat_map(|desired| &desired.peers);
        let unheard = peers
            .filter(|(key, peer)| peer.endpoint.is_some() && !self.facts.heard.contains_key(key))
            .count();
        (unheard > 0 && self.begun.elapsed() < FIRST_HANDSHAKES)
            .then(|| format!("waiting for the first handshake with {unheard} peers"))
    }

    /// Says once what cannot be done, and once that it can be done again.
    fn complain(&mut self, failed: Vec<String>) {
        for sentence in &failed {
            self.shown.metrics.error(Event::Apply);
            if self.complained.insert(sentence.clone()) {
                tracing::warn!("{sentence}");
            }
        }
        if failed.is_empty() && !self.complained.is_empty() {
            tracing::info!("what failed is done now");
            self.complained.clear();
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
        } else if self.facts.flannel.is_some() && self.decision.desired.is_none() {
            problems.push(format!(
                "node {} takes no part in the mesh yet",
                self.config.node
            ));
        }
        problems.extend(self.failed.iter().cloned());
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
        let contact = self.cluster.contact();
        let mut problems = self.problems();
        if !self.settled {
            problems.extend(self.unsettled());
        }
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
            leak_drops: self
                .machine
                .kernel()
                .counters()
                .ok()
                .map(|counters| counters.leak_drops),
        });
        let report = Arc::new(report);
        self.shown.metrics.show(Arc::clone(&report));
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
        let mut failures = self.remove_all();
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

    /// Removes what was installed, but for the link, which the tunnel still holds.
    fn remove_all(&mut self) -> Vec<String> {
        let link = self
            .machine
            .kernel()
            .observe()
            .ok()
            .and_then(|observed| observed.link);
        let nothing = State {
            link: link.map(|link| Link { up: false, ..link }),
            ..State::default()
        };
        let pass = reconcile::pass(&mut self.machine, &nothing);
        log_changes(&pass.made);
        let mut failures = pass.failed;
        if self.config.clean_up_interface {
            // Then it goes with this process.
            if let Err(error) = self.machine.let_link_go() {
                failures.push(format!(
                    "removing the link {}: {error}",
                    self.config.interface
                ));
            }
        }
        failures
    }
}

/// Starts the tunnel: its link, its port, its threads.
fn start_tunnel(config: &Config, key: PrivateKey) -> Result<Arc<Device>, Refusal> {
    let options = wireguard::Options {
        persistent: true,
        listen_port: config.port,
        fwmark: config.fwmark,
        timestamp_floor: state::load_timestamp(&config.state_dir),
        persist_timestamp: Some(state::timestamp_keeper(config.state_dir.clone())),
        ..wireguard::Options::new(config.interface.clone())
    };
    let device =
        Device::start(options).map_err(|error| Refusal::configuration(error.to_string()))?;
    device.set_private_key(Some(key));
    Ok(Arc::new(device))
}

/// One line for each change: the operator can follow what is done to the node.
fn log_changes(made: &[crate::diff::Change]) {
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

#[expect(clippy::disallowed_methods, reason = "the shell reads the clock")]
fn now() -> Instant {
    Instant::now()
}

/// The wall clock, which only Kilo's algorithm looks at.
#[expect(clippy::disallowed_methods, reason = "the shell reads the clock")]
fn unix_now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    })
}
