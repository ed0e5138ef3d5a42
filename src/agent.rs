//! The agent of a node: one event loop that carries messages.
//!
//! The loop hands everything that happens to the [`Controller`], which decides, and
//! carries out the effects that it asks for. It waits for nothing: the API is followed by tasks of the
//! cluster module, names are resolved by another, the kernel and the tunnel are read and changed by the
//! [reconciler's](crate::reconciler) threads, packets run on threads of the tunnel's own.

pub mod address;
pub mod claim_clock;
pub mod cleanup;
pub mod control;
pub mod controller;
pub mod decision;
pub mod endpoint_discovery;
pub mod flannel;
pub mod flap_damping;
pub mod forwarding;
pub mod grace;
pub mod kernel_facts;
mod key_changes;
pub mod key_ring;
pub mod key_rotation;
pub mod keyfile;
pub mod kilo_clock;
pub mod linger;
pub mod listen_port;
pub mod mtu;
pub mod obstacle;
pub mod probe;
pub mod publication;
pub mod readiness;
pub mod report;
pub mod saved_view;
pub mod schedule;
mod start;
pub mod tenure;
pub mod timestamps;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc, watch};

use self::control::KeyRequest;
use self::controller::{Controller, Effect, ShellFacts, WallClock};
use self::forwarding::HostFirewall;
use self::kernel_facts::KernelFacts;
use self::key_changes::KeyChanges;
use self::key_ring::KeyRing;
use self::keyfile::Origin;
use self::probe::Echoes;
use crate::clock::{now, sleep_until, unix_now};
use crate::cluster::{Access, Cluster};
use crate::config::Config;
use crate::diff::Change;
use crate::flannel::Files;
use crate::guard::{Guard, boots};
use crate::kernel::Monitor;
use crate::node_lock::NodeLock;
use crate::probe::News;
use crate::reconciler::core::{Applied, Source};
use crate::reconciler::{Message, Reconciler};
use crate::status::Question;
use crate::telemetry;
use crate::telemetry::metrics::{Event, Metrics};
use crate::topology::Topology;
use crate::wireguard::uapi;
use crate::{preflight, resolve};

/// How often the tunnel's counters and the settings of the kernel are read while something is awaited.
const TICK: Duration = Duration::from_secs(1);
/// The same at rest. The tunnel reports handshakes, moved endpoints and silent peers at once.
const TICK_AT_REST: Duration = Duration::from_secs(5);
/// How long the end waits until the others know of it.
const DRAIN: Duration = Duration::from_millis(1_200);
/// How long they have to change their routes then.
const SETTLE: Duration = Duration::from_millis(300);
/// Changes logged one by one; more of them are a new cluster, and a number says as much.
const LOGGED: usize = 40;
/// Threads for blocking work, such as look-ups of names.
const BLOCKING_THREADS: usize = 4;

/// Runs the agent until a signal ends it.
pub fn run(config: Config) -> anyhow::Result<ExitCode> {
    telemetry::start_logging(config.log_level, config.log_format);
    preflight::check()?;
    let lock = NodeLock::take(&config.interface)?;
    for note in &config.notes {
        tracing::info!(note, "configuration note");
    }
    let files = Files::read(config.flannel_conf.as_deref(), &config.subnet_file)?;
    if let Some(env) = &files.env {
        config.check_against_flannel(&env.networks)?;
    }
    // Last, so that an agent that is refused leaves nothing on the disk.
    let (keys, origin) = KeyRing::load(&config.state_dir, Path::new(keyfile::KILO_KEY))?;
    match origin {
        Origin::Existing => {}
        Origin::Kilo => tracing::info!(path = keyfile::KILO_KEY, "took over Kilo's key"),
        Origin::Generated => {
            tracing::info!(public_key = %keys.public().current, "made a new key");
        }
    }
    if boots::look(&config.state_dir) == boots::Verdict::DidNotRun {
        tracing::warn!(problem = boots::DID_NOT_RUN, "problem found");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build()
        .context("starting the control plane")?;
    let result = runtime.block_on(async {
        let agent = Agent::start(config, keys).await?;
        agent.run().await
    });
    // Look-ups of names may block for long; their answers are not needed any more.
    runtime.shutdown_background();
    drop(lock);
    result
}

/// The controller, and the ends of everything that it hears of and acts on.
struct Agent {
    config: Arc<Config>,
    controller: Controller,
    access: Access,
    cluster: Cluster,
    reconciler: Reconciler,
    messages: mpsc::UnboundedReceiver<Message<KernelFacts>>,
    echoes: Echoes,
    /// What the echoes say.
    news: mpsc::UnboundedReceiver<News>,
    /// Wakes the loop when the tunnel has events.
    tunnel_events: Arc<Notify>,
    /// When the tunnel's counters were last read at a tick.
    ticked: Instant,
    /// Whether the tunnel had events since then.
    has_events: bool,
    monitor: Monitor,
    host_firewall: HostFirewall,
    writer: saved_view::Writer,
    key_changes: KeyChanges,
    /// Requests for another key.
    key_requests: mpsc::Receiver<KeyRequest>,
    names: mpsc::Sender<BTreeSet<String>>,
    addresses: mpsc::Receiver<resolve::Addresses>,
    shown: Shown,
    /// For as long as `wg` can ask.
    _uapi: uapi::Server,
}

/// The ends at which people and probes look.
struct Shown {
    metrics: Arc<Metrics>,
    questions: mpsc::Receiver<Question>,
    topology: watch::Sender<Arc<Topology>>,
    /// When the loop last came round, for the probe of liveness.
    alive: watch::Sender<Instant>,
}

impl Agent {
    /// Carries messages until a signal ends it.
    async fn run(mut self) -> anyhow::Result<ExitCode> {
        let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
        // Taken, so that a terminal that goes away does not take the network with it.
        let _hangup = signal(SignalKind::hangup()).context("listening for SIGHUP")?;
        let mut views = self.cluster.views();
        let cached = views.borrow_and_update().clone();
        if let Some(view) = cached {
            self.controller.handle_view(now(), view);
        }

        loop {
            self.carry_out();
            self.shown.alive.send_replace(now());
            let timeout = self.controller.poll_timeout();
            let is_at_rest = self.controller.is_at_rest() && !self.has_events;
            let tick = self.ticked + if is_at_rest { TICK_AT_REST } else { TICK };
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                changed = views.changed() => {
                    changed.context("following the cluster")?;
                    let view = views.borrow_and_update().clone();
                    if let Some(view) = view {
                        self.controller.handle_view(now(), view);
                    }
                }
                Some(message) = self.messages.recv() => self.handle_message(message),
                Some(news) = self.news.recv() => {
                    self.controller.handle_verdicts(now(), news.verdicts);
                    self.controller.handle_mtus(now(), news.mtus);
                    self.controller.handle_echo_forwarding(now(), news.forwarding);
                }
                event = self.monitor.changed() => {
                    let event = event.context("following the kernel")?;
                    if event.firewall {
                        self.host_firewall.handle_change();
                    }
                    if event.plan {
                        self.controller.handle_trigger(now());
                    }
                }
                problem = self.host_firewall.changed() => {
                    self.controller.handle_host_firewall(now(), problem);
                }
                Some(addresses) = self.addresses.recv() => {
                    self.controller.handle_resolved(now(), Arc::new(addresses));
                }
                Some(done) = self.key_changes.done() => {
                    let (step, changed) = self.key_changes.finish(done, self.reconciler.tunnel());
                    self.controller.handle_keys(now(), step, changed);
                }
                Some(request) = self.key_requests.recv() => {
                    let answer = self.controller.handle_key_request(now());
                    // The client may be gone.
                    let _ = request.send(answer.map_err(|refused| refused.to_string()));
                }
                Some(question) = self.shown.questions.recv() => {
                    // The client may be gone.
                    let _ = question.send(self.report());
                }
                // An event is a reason to read the counters, which have the values: at once from rest, and
                // not more often than at every tick, or each step of a search would be published.
                () = self.tunnel_events.notified() => {
                    self.reconciler.tunnel().take_events();
                    self.has_events = true;
                }
                () = sleep_until(Some(tick)) => self.handle_tick(),
                () = sleep_until(timeout) => self.controller.handle_timeout(now()),
            }
        }
        self.stop().await
    }

    fn handle_message(&mut self, message: Message<KernelFacts>) {
        match message {
            Message::Facts(facts) => {
                self.read_tunnel();
                let wall = WallClock {
                    node: unix_now(),
                    server: self.access.server_time(),
                };
                self.controller.handle_kernel(now(), wall, *facts);
            }
            Message::Applied(applied) => {
                log_changes(&applied.made);
                self.count(&applied);
                self.controller.handle_applied(now(), applied);
            }
        }
    }

    fn read_tunnel(&mut self) {
        let stats = self.reconciler.tunnel().stats();
        self.controller.handle_tunnel(now(), &stats);
    }

    fn handle_tick(&mut self) {
        self.ticked = now();
        self.has_events = false;
        self.read_tunnel();
        let (links, ipv6) = self.controller.forwarding_links();
        let off = forwarding::settings(&links, ipv6);
        self.controller.handle_forwarding(now(), off);
    }

    /// Does what the controller asks for. None of it blocks.
    fn carry_out(&mut self) {
        while let Some(effect) = self.controller.poll_effect() {
            match effect {
                Effect::Observe => self.reconciler.read(),
                Effect::Publish(annotations) => self.cluster.publish(annotations),
                Effect::Judge(verdicts) => self.cluster.judge(verdicts),
                Effect::Report(reports) => self.cluster.report(reports),
                Effect::Save(saved) => self.writer.save(saved),
                Effect::KeepGuard(guard) => self.writer.keep_guard(guard),
                Effect::Resolve(names) => {
                    // A full queue means that the names are about to be looked at anyway.
                    let _ = self.names.try_send(names);
                }
                Effect::FindPeer { id, candidates } => {
                    self.reconciler.tunnel().try_candidates(&id, &candidates);
                }
                Effect::Translate(aliases) => self.reconciler.tunnel().set_aliases(&aliases),
                Effect::ChangeKeys(step) => self.key_changes.start(step),
                Effect::TryKey { key, peers } => {
                    for id in &peers {
                        self.reconciler.tunnel().try_identity(id, key);
                    }
                }
                Effect::Reconcile(desired) => self.reconciler.reconcile(desired),
                Effect::Probe(targets) => self.echoes.set_targets(*targets),
                Effect::Show(topology) => {
                    self.shown.topology.send_replace(topology);
                }
            }
        }
    }

    /// What people and probes see now.
    fn report(&mut self) -> crate::status::Report {
        self.read_tunnel();
        let echoes = self.echoes.shown();
        let shell = ShellFacts {
            api: self.cluster.api_status().borrow().clone(),
            counters: self.reconciler.counters().ok(),
            cache_failures: self.writer.failures(),
            paths: echoes.paths.clone(),
            echo_failures: echoes.failures,
        };
        self.controller.report(now(), &shell)
    }

    fn count(&self, applied: &Applied) {
        if applied.source == Source::Firewall && applied.made.is_empty() && !applied.failed {
            return;
        }
        if applied.failed {
            for _ in &applied.failures {
                self.shown.metrics.error(Event::Apply);
            }
        }
        let (took, made) = (applied.took, applied.made.len());
        self.shown.metrics.reconciled(took, made, !applied.failed);
    }

    /// Lets the others move their traffic to another leader of the region, if there is one: the tunnel ends with
    /// this process.
    async fn drain(&self) {
        match tokio::time::timeout(DRAIN, self.echoes.drain()).await {
            Ok(Ok(true)) => {
                tracing::info!("other leaders are used from now on");
                tokio::time::sleep(SETTLE).await;
            }
            Ok(Ok(false) | Err(_)) => {}
            Err(_) => tracing::info!("some nodes do not know yet that this leader stops"),
        }
    }

    /// Leaves the data plane as it is, so that the next agent finds it at work; or removes it.
    async fn stop(mut self) -> anyhow::Result<ExitCode> {
        let remove = self.config.clean_up;
        if !remove {
            self.drain().await;
        }
        if remove {
            // Or what is withdrawn would be published again.
            self.cluster.end();
            self.writer.keep_guard(Guard::default());
        }
        let tunnel = Arc::clone(self.reconciler.tunnel());
        let removed = self.reconciler.stop(remove);
        if !remove {
            tracing::info!("stopped: link, routes and firewall stay for the next agent");
            return Ok(ExitCode::SUCCESS);
        }
        log_changes(&removed.made);
        let mut failures = removed.failed;
        // With this setting the link goes with the process.
        if self.config.clean_up_interface
            && let Err(error) = tunnel.set_persistent(false)
        {
            let link = &self.config.interface;
            failures.push(format!("removing the link {link}: {error}"));
        }
        if let Err(error) = cleanup::withdraw(&self.access, &self.config).await {
            failures.push(format!("removing the annotations: {error:#}"));
        }
        for failure in &failures {
            self.shown.metrics.error(Event::CleanUp);
            tracing::warn!(problem = failure, "removal failed");
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
        tracing::info!(%change, "change applied");
    }
    for change in made.iter().skip(LOGGED) {
        tracing::debug!(%change, "change applied");
    }
    if made.len() > LOGGED {
        let count = made.len() - LOGGED;
        tracing::info!(count, "further changes applied");
    }
}
