//! Opens and starts everything an agent works with, in the order in which it may be refused.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use tokio::sync::{mpsc, watch};

use super::claim_clock::ClaimClock;
use super::endpoint_discovery::EndpointDiscovery;
use super::flap_damping::FlapDamping;
use super::grace::Grace;
use super::host::Host;
use super::kilo_clock::KiloClock;
use super::readiness::Readiness;
use super::reconcile::{Decision, Facts};
use super::saved_view::{self, SavedView};
use super::schedule::Schedule;
use super::tenure::Tenure;
use super::timestamps;
use super::{Agent, Shown, control, forwarding, keyfile};
use crate::clock::now;
use crate::cluster::{Access, Cluster, ParseSettings, Sources};
use crate::config::Config;
use crate::kernel::{Kernel, Monitor};
use crate::pages::{self, Pages};
use crate::refusal::Refusal;
use crate::resolve;
use crate::status::Report;
use crate::telemetry::metrics::Metrics;
use crate::topology::Resolved;
use crate::wireguard::key::PrivateKey;
use crate::wireguard::{self, Device, StartError, uapi};

impl Agent {
    /// An agent that has begun to follow the cluster and has changed nothing but the tunnel's link.
    ///
    /// # Errors
    ///
    /// A [`Refusal`] where something else has what the agent needs, or a right is missing.
    pub(super) async fn start(config: Config, key: PrivateKey) -> anyhow::Result<Self> {
        let key_files = keyfile::holders(&key, &config.state_dir, Path::new(keyfile::KILO_KEY));
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
                link = config.interface,
                "took the place of a WireGuard link of the kernel's, as Kilo leaves it"
            );
        }
        kernel.rtnetlink.check()?;
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
        Ok(Self {
            schedule: Schedule::new(now(), config.resync_period),
            host: Host::new(kernel, device),
            access,
            cluster,
            view: None,
            writer: saved_view::Writer::start(config.state_dir.clone())
                .context("starting a thread")?,
            resolved,
            facts: Facts::default(),
            discovery: EndpointDiscovery::default(),
            flap_damping: FlapDamping::default(),
            kilo_clock: KiloClock::default(),
            tenure: Tenure::default(),
            claim_clock: ClaimClock::default(),
            decision: Decision::default(),
            awaited: None,
            without_ipv6: false,
            grace: Grace::default(),
            key_files,
            firewall: forwarding::Firewall::start(&config.interface),
            obstacles: Vec::new(),
            forgotten: Vec::new(),
            failed: Vec::new(),
            readiness: Readiness::new(now()),
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
}

/// Starts the tunnel: its link, its port, its threads.
fn start_tunnel(config: &Config, key: PrivateKey) -> Result<Arc<Device>, Refusal> {
    let options = |listen_port| wireguard::Options {
        persistent: true,
        listen_port,
        fwmark: config.fwmark,
        timestamp_floor: timestamps::load_own(&config.state_dir),
        accepted: timestamps::load_accepted(&config.state_dir),
        store: Some(Box::new(timestamps::Disk::new(config.state_dir.clone()))),
        unicast_only: true,
        ..wireguard::Options::new(config.interface.clone())
    };
    let device = match Device::start(options(config.port)) {
        // The agent goes on by a free port: routes, guard and what it begins itself are kept while the
        // port is another's, and each second it tries to have it.
        Err(StartError::PortInUse(_)) => Device::start(options(0)),
        started => started,
    };
    let device = device.map_err(|error| Refusal::configuration(error.to_string()))?;
    device.set_private_key(Some(key));
    Ok(Arc::new(device))
}
