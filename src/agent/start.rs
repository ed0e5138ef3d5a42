//! Opens and starts everything an agent works with, in the order in which it may be refused.

use std::sync::Arc;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, watch};

use super::control::KeyRequest;
use super::controller::{Controller, Setup};
use super::forwarding::HostFirewall;
use super::kernel_facts::{self, KernelFacts};
use super::key_changes::KeyChanges;
use super::key_ring::KeyRing;
use super::probe::{Echoes, Wake};
use super::saved_view::{self, SavedView};
use super::{Agent, Shown, control, timestamps};
use crate::clock::now;
use crate::cluster::{Access, Cluster, ParseSettings, Sources};
use crate::config::Config;
use crate::kernel::{Kernel, Monitor};
use crate::pages::{self, Pages};
use crate::reconciler::{Message, Owner, Reconciler};
use crate::refusal::Refusal;
use crate::resolve;
use crate::status::ReportSource;
use crate::telemetry::metrics::Metrics;
use crate::topology::Resolved;
use crate::wireguard::{self, Device, StartError, uapi};

impl Agent {
    /// An agent that has begun to follow the cluster and has changed nothing but the tunnel's link.
    ///
    /// # Errors
    ///
    /// A [`Refusal`] where something else has what the agent needs, or a right is missing.
    pub(super) async fn start(config: Config, ring: KeyRing) -> anyhow::Result<Self> {
        let key_files = ring.holders();
        let listener = pages::bind(config.listen).await?;
        let sources = Sources {
            mark: Some(config.fwmark),
            ..Sources::new(config.kubeconfig.clone(), config.master.clone())
        };
        let access = Access::new(sources).await?;
        let kernel = Kernel::open(&config.interface)?;
        // A `kg` that is still there has the port of the pages, which comes first.
        if kernel
            .rtnetlink
            .take_over()
            .context("taking Kilo's place")?
        {
            tracing::info!(
                interface = config.interface,
                "replaced a WireGuard link of the kernel's, as Kilo leaves it"
            );
        }
        kernel.rtnetlink.check()?;
        // Before the first look, so that nothing is missed in between.
        let monitor = Monitor::open(&config.interface)?;
        let keys = ring.public();
        let public_key = keys.current;
        let tunnel_events = Arc::new(Notify::new());
        let wake = Wake::new().context("opening a descriptor")?;
        let device = start_tunnel(&config, &ring, &tunnel_events, &wake)?;
        let uapi = uapi::serve(&config.interface, device.clone())?;

        let (ask_for_key, key_requests) = mpsc::channel(1);
        let shown = show(&config, listener, ask_for_key);

        let settings = ParseSettings {
            topology_label: config.topology_label.clone(),
        };
        // A node that starts while no API server answers is as it was when it stopped.
        let saved = saved_view::load(&config.state_dir);
        let resolved = saved
            .as_ref()
            .map(|saved| saved.resolved.clone())
            .unwrap_or_default();
        let cached = saved.map(SavedView::into_view);
        let cluster = Cluster::start(access.clone(), config.node.clone(), settings, cached);
        let (names, wanted) = mpsc::channel(8);
        let (found, addresses) = mpsc::channel(8);
        tokio::spawn(resolve::follow(wanted, found, Resolved::clone(&resolved)));

        tracing::info!(
            node = %config.node,
            version = env!("CARGO_PKG_VERSION"),
            %public_key,
            "started"
        );
        let config = Arc::new(config);
        let setup = Setup {
            config: Arc::clone(&config),
            keys,
            key_files,
            resolved,
        };
        let (said, news) = mpsc::unbounded_channel();
        let echoes = Echoes::start(device.clone(), wake, move |news| {
            // The loop may have ended.
            let _ = said.send(news);
        });
        let (reconciler, messages) = start_reconciler(&config, kernel, device)?;
        Ok(Self {
            controller: Controller::new(setup, now()),
            reconciler,
            writer: saved_view::Writer::start(config.state_dir.clone())
                .context("starting a thread")?,
            host_firewall: HostFirewall::start(&config.interface),
            access,
            cluster,
            messages,
            echoes: echoes.context("starting a thread")?,
            news,
            tunnel_events,
            ticked: now(),
            has_events: false,
            monitor,
            key_changes: KeyChanges::new(ring),
            key_requests,
            names,
            addresses,
            shown,
            _uapi: uapi,
            config,
        })
    }
}

/// Opens what people and probes look at: the control socket and the pages.
fn show(
    config: &Config,
    listener: Option<TcpListener>,
    key_requests: mpsc::Sender<KeyRequest>,
) -> Shown {
    let metrics = Arc::new(Metrics::new());
    let (topology, shown) = watch::channel(Arc::default());
    let (alive, came_round) = watch::channel(now());
    let (source, questions) = ReportSource::channel();
    match control::bind(&config.control_socket) {
        Ok(socket) => {
            tokio::spawn(control::serve(socket, source.clone(), key_requests));
        }
        // The mesh does not depend on being looked at.
        Err(error) => tracing::warn!(
            path = %config.control_socket.display(),
            %error,
            "opening the control socket failed: selvedge status cannot ask this agent"
        ),
    }
    if let Some(listener) = listener {
        let pages = Pages {
            metrics: Arc::clone(&metrics),
            report: source,
            topology: shown,
            alive: came_round,
        };
        tokio::spawn(pages::serve(listener, pages));
    }
    Shown {
        metrics,
        questions,
        topology,
        alive,
    }
}

/// Starts the threads that own the kernel and the tunnel; their messages come by the receiver.
fn start_reconciler(
    config: &Arc<Config>,
    kernel: Kernel,
    device: Arc<Device>,
) -> anyhow::Result<(Reconciler, mpsc::UnboundedReceiver<Message<KernelFacts>>)> {
    let (sender, messages) = mpsc::unbounded_channel();
    let flags = Arc::clone(config);
    let owner = Owner {
        read: Box::new(move |kernel| kernel_facts::read(&flags, kernel)),
        send: Box::new(move |message| {
            // The loop may have ended.
            let _ = sender.send(message);
        }),
    };
    let reconciler = Reconciler::start(kernel, device, owner).context("starting a thread")?;
    Ok((reconciler, messages))
}

/// Starts the tunnel: its link, its port, its threads.
fn start_tunnel(
    config: &Config,
    ring: &KeyRing,
    events: &Arc<Notify>,
    echoes: &Wake,
) -> Result<Arc<Device>, Refusal> {
    let options = |listen_port| wireguard::Options {
        persistent: true,
        listen_port,
        fwmark: config.fwmark,
        timestamp_floor: timestamps::load_own(&config.state_dir),
        accepted: timestamps::load_accepted(&config.state_dir),
        store: Some(Box::new(timestamps::Disk::new(config.state_dir.clone()))),
        unicast_only: true,
        on_events: {
            let events = Arc::clone(events);
            Box::new(move || events.notify_one())
        },
        on_diverted: {
            let echoes = echoes.clone();
            Box::new(move || echoes.wake())
        },
        ..wireguard::Options::new(config.interface.clone())
    };
    let device = match Device::start(options(config.port)) {
        // The agent starts on a free port: routes, guard and its own handshakes work while the
        // port is another's, and each second it tries to have it.
        Err(StartError::PortInUse(_)) => Device::start(options(0)),
        started => started,
    };
    let device = device.map_err(|error| Refusal::configuration(error.to_string()))?;
    let (current, also) = ring.identities();
    device.set_identities(current, also);
    Ok(Arc::new(device))
}
