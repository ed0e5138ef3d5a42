//! The command: flags, the loop, and removing everything at the end.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use ipnet::IpNet;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::SockaddrStorage;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use zeroize::Zeroizing;

use super::plan::{self, FWMARK, Request};
use super::registration::{Identity, Registration};
use crate::clock::now;
use crate::config;
use crate::kernel::Kernel;
use crate::preflight;
use crate::reconciler::core::{Desired, Failure, Source};
use crate::reconciler::{Message, Owner, Reconciler};
use crate::refusal::Refusal;
use crate::survey::{self, Access, Survey};
use crate::telemetry::{LogFormat, LogLevel, start_logging};
use crate::topology::Object;
use crate::wireguard::key::PrivateKey;
use crate::wireguard::{Device, Options, uapi};

/// How soon to read the cluster again after that failed.
const RETRY: Duration = Duration::from_secs(5);
/// How long deleting the Peer may take at the end.
const FAREWELL: Duration = Duration::from_secs(10);

/// A key is 44 bytes; what is longer than this was never one.
const MAX_KEY: u64 = 4096;

/// Flags of `selvedge connect`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Name of the Peer that stands for this machine; made if it is not there [default: the host's name]
    name: Option<String>,
    /// Address of this machine in the mesh; no other may have it
    #[arg(long, short, value_name = "CIDR", default_value = "10.10.10.10/32", value_parser = address)]
    allowed_ip: IpNet,
    /// Further networks to reach through the mesh, such as the services' (comma separated)
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = survey::cidr)]
    allowed_ips: Vec<IpNet>,
    /// File with the private key in base64 [default: a new key, for this run]
    #[arg(long, value_name = "FILE")]
    private_key: Option<PathBuf>,
    /// Delete the Peer at the end, if this command made it
    #[arg(long, value_name = "BOOL", default_value = "true", value_parser = config::boolean,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    clean_up: bool,
    /// MTU of the tunnel's link in bytes
    #[arg(long, value_name = "BYTES", default_value = "1420", value_parser = clap::value_parser!(u32).range(576..=65_455))]
    mtu: u32,
    /// How often to look at the cluster
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = config::resync_period)]
    resync_period: Duration,
    /// Name of the tunnel's link
    #[arg(long, short, value_name = "LINK", default_value = "kilo0", value_parser = config::link_name)]
    interface: String,
    /// Seconds between keepalives; 0 turns them off
    #[arg(long, value_name = "SECONDS", default_value = "10")]
    persistent_keepalive: u16,
    /// UDP port to listen on [default: a free one]
    #[arg(long, value_parser = config::port)]
    port: Option<u16>,
    /// What is logged: all, debug, info, warn, error or none
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log_level: LogLevel,
    #[command(flatten)]
    cluster: survey::Args,
}

/// An address with the length of its prefix; host bits count.
fn address(text: &str) -> Result<IpNet, String> {
    text.parse()
        .map_err(|_| "is not an address with its prefix length, such as 10.10.10.10/32".into())
}

/// Connects this host until a signal ends it.
///
/// # Errors
///
/// One sentence that says what is missing or in the way; nothing is left behind then.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    start_logging(args.log_level, LogFormat::Text);
    preflight::check_rights()?;
    if if_nametoindex(args.interface.as_str()).is_ok() {
        return Err(Refusal::configuration(format!(
            "there is a link {} already: stop what uses it, or choose another --interface",
            args.interface
        ))
        .into());
    }
    let key = private_key(args)?;
    survey::block_on(async {
        let access = survey::access(&args.cluster).await?;
        let who = Identity {
            name: match &args.name {
                Some(name) => name.clone(),
                None => host()?,
            },
            host: host()?,
            address: args.allowed_ip,
            public_key: key.public_key(),
            persistent_keepalive: args.persistent_keepalive,
        };
        // Taken first, or a signal while the Peer is being made would leave it behind.
        let mut stop = Stop::new().context("waiting for signals")?;
        let mut making = std::pin::pin!(Registration::find_or_make(&access.client, &who));
        let (registration, stopped) = tokio::select! {
            made = &mut making => (made?, false),
            // What is under way has to end before it can be taken back.
            () = stop.recv() => match tokio::time::timeout(FAREWELL, making).await {
                Ok(made) => (made?, true),
                Err(_) => bail!(
                    "the API server does not answer: the peer {:?} may be left there",
                    who.name
                ),
            },
        };
        let outcome = match stopped {
            true => Ok(()),
            false => connect(args, key, &access, &registration, stop).await,
        };
        if args.clean_up {
            match tokio::time::timeout(FAREWELL, registration.delete()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(
                    error = %format_args!("{error:#}"),
                    "deleting the Peer failed"
                ),
                Err(_) => {
                    tracing::warn!("deleting the Peer failed: the API server does not answer")
                }
            }
        }
        outcome
    })?;
    Ok(ExitCode::SUCCESS)
}

/// The tunnel and its routes, from the first look at the cluster to the signal to stop.
async fn connect(
    args: &Args,
    key: PrivateKey,
    access: &Access,
    registration: &Registration,
    mut stop: Stop,
) -> anyhow::Result<()> {
    let client = &access.client;
    let request = Request {
        interface: args.interface.clone(),
        mtu: args.mtu,
        address: args.allowed_ip,
        extra: args.allowed_ips.clone(),
        direct: BTreeSet::new(),
    };
    // The first look may fail loudly; later ones are tried again.
    let survey = tokio::select! {
        () = stop.recv() => return Ok(()),
        survey = survey::survey(client, &args.cluster) => survey?,
    };

    let device = Device::start(Options {
        mtu: args.mtu,
        listen_port: args.port.unwrap_or(0),
        fwmark: FWMARK,
        ..Options::new(args.interface.as_str())
    });
    let device = device.map_err(|error| Refusal::configuration(error.to_string()))?;
    device.set_private_key(Some(key));
    let device = Arc::new(device);
    let _socket = uapi::serve(
        &args.interface,
        Arc::clone(&device) as Arc<dyn uapi::Control>,
    )?;
    let (sender, mut messages) = mpsc::unbounded_channel();
    let owner = Owner {
        read: Box::new(|_| ()),
        send: Box::new(move |message| {
            // The loop may have ended.
            let _ = sender.send(message);
        }),
    };
    let kernel = Kernel::open(&args.interface)?;
    let mut client_host = ClientHost {
        reconciler: Some(Reconciler::start(kernel, device, owner)?),
        request,
        api_server: addresses(access).await,
        complaints: BTreeSet::new(),
    };
    client_host.follow(&survey, registration);
    // What fails at first is most likely a mistake; later failures are tried again.
    let mut failures = Vec::new();
    let mut is_first = true;
    let mut next = now() + args.resync_period;
    loop {
        let look = async {
            tokio::time::sleep_until(next.into()).await;
            survey::survey(client, &args.cluster).await
        };
        tokio::select! {
            () = stop.recv() => return Ok(()),
            Some(message) = messages.recv() => {
                let Message::Applied(applied) = message else { continue };
                for change in &applied.made {
                    tracing::info!(%change, "change applied");
                }
                if let Some(failure) = applied.failures.first().filter(|_| is_first) {
                    bail!(failure.sentence.clone());
                }
                is_first &= applied.source == Source::Firewall;
                log_failures(&mut failures, applied.failures);
            }
            found = look => {
                next = now() + match found {
                    Ok(survey) => {
                        client_host.follow(&survey, registration);
                        args.resync_period
                    }
                    Err(error) => {
                        tracing::warn!(
                            error = %format_args!("{error:#}"),
                            "reading the cluster failed: everything stays as it is"
                        );
                        RETRY
                    }
                };
            }
        }
    }
}

/// Logs what is new of what could not be done.
fn log_failures(known: &mut Vec<Failure>, failures: Vec<Failure>) {
    for failure in failures.iter().filter(|failure| !known.contains(failure)) {
        tracing::warn!(problem = failure.sentence, "change failed");
    }
    if failures.is_empty() && !known.is_empty() {
        tracing::info!("all failed changes applied");
    }
    *known = failures;
}

/// The signals to stop.
struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn recv(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// This host's part: removes its routes and rules when it is dropped.
struct ClientHost {
    /// There until it is dropped.
    reconciler: Option<Reconciler>,
    request: Request,
    api_server: BTreeSet<IpAddr>,
    /// What was logged already.
    complaints: BTreeSet<String>,
}

impl ClientHost {
    /// Makes this host as the cluster says.
    fn follow(&mut self, survey: &Survey, registration: &Registration) {
        self.complain(survey, registration);
        let api_server = self.api_server.iter().copied().map(IpNet::from);
        let around = networks_around(&self.request.interface);
        self.request.direct = api_server.chain(around).collect();
        let name = &registration.peer.name;
        let current = survey.topology.peers.iter().find(|peer| peer.name == *name);
        let own = current.unwrap_or(&registration.peer);
        let peers = plan::peers(&survey.topology, own, &self.request);
        if let Some(reconciler) = &self.reconciler {
            reconciler.reconcile(Desired {
                state: Some(plan::state(&peers, &self.request)),
                interface: self.request.interface.clone(),
                ..Desired::default()
            });
        }
    }

    /// Logs once what the mesh does not accept of this peer.
    fn complain(&mut self, survey: &Survey, registration: &Registration) {
        let own = Object::Peer(registration.peer.name.clone());
        let excluded = survey.topology.excluded.iter();
        for excluded in excluded.filter(|excluded| excluded.object == own) {
            let text = excluded.to_string();
            if !self.complaints.contains(&text) {
                tracing::warn!(problem = text, "the mesh does not accept all of this peer");
                self.complaints.insert(text);
            }
        }
    }
}

impl Drop for ClientHost {
    fn drop(&mut self) {
        // The link goes with the device; it must be there until its routes are gone.
        let removed = self
            .reconciler
            .take()
            .map(|reconciler| reconciler.stop(true));
        for problem in removed.into_iter().flat_map(|removed| removed.failed) {
            tracing::warn!(problem, table = 5130, "removal failed: routes may be left");
        }
    }
}

/// The addresses of the API server, which is reached without the tunnel at this moment.
async fn addresses(access: &Access) -> BTreeSet<IpAddr> {
    match tokio::net::lookup_host((access.host.as_str(), access.port)).await {
        Ok(found) => found.map(|address| address.ip()).collect(),
        Err(_) => BTreeSet::new(),
    }
}

/// The networks of this machine's other links, which change when it moves about.
fn networks_around(own: &str) -> Vec<IpNet> {
    let Ok(addresses) = nix::ifaddrs::getifaddrs() else {
        return Vec::new();
    };
    let others = addresses.filter(|address| address.interface_name != own);
    let nets = others.filter_map(|address| {
        let ip = ip_of(address.address.as_ref()?)?;
        let mask = ip_of(address.netmask.as_ref()?)?;
        IpNet::with_netmask(ip, mask).ok().map(|net| net.trunc())
    });
    nets.collect()
}

fn ip_of(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|address| address.ip().into());
    v4.or_else(|| address.as_sockaddr_in6().map(|address| address.ip().into()))
}

fn private_key(args: &Args) -> anyhow::Result<PrivateKey> {
    match &args.private_key {
        None => Ok(PrivateKey::generate()),
        Some(path) => Ok(read_key(path)?),
    }
}

/// Reads a key from a file that its owner alone may read, or from a pipe. With sudo the owner may be
/// another than root.
fn read_key(path: &Path) -> Result<PrivateKey, Refusal> {
    let shown = path.display();
    let refuse =
        |what: &dyn fmt::Display| Refusal::configuration(format!("--private-key {shown}: {what}"));
    let file = File::open(path).map_err(|error| refuse(&error))?;
    let metadata = file.metadata().map_err(|error| refuse(&error))?;
    let mode = metadata.mode() & 0o777;
    if metadata.is_file() && mode & 0o077 != 0 {
        return Err(refuse(&format!(
            "others can read or write it (mode {mode:03o}): run chmod 600 {shown}, and use another key if others may have read this one"
        )));
    }
    let mut text = Zeroizing::new(String::new());
    file.take(MAX_KEY)
        .read_to_string(&mut text)
        .map_err(|error| refuse(&error))?;
    text.trim().parse().map_err(|error| refuse(&error))
}

/// This machine's name, as a Peer can have it.
fn host() -> anyhow::Result<String> {
    let name = nix::unistd::gethostname().context("asking for the host's name")?;
    let name = name.to_string_lossy().to_ascii_lowercase();
    if name.is_empty() {
        return Err(Refusal::usage("this host has no name: give the name of a Peer").into());
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_private_key_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let key = PrivateKey::generate();
        fs::write(&path, format!("{}\n", &*key.to_base64())).unwrap();
        for mode in [0o644, 0o640, 0o604, 0o620] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let error = read_key(&path).unwrap_err();
            let command = format!("chmod 600 {}", path.display());
            assert!(error.sentence.contains(&command), "{error}");
        }
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        assert_eq!(read_key(&path).unwrap(), key);
    }
}
