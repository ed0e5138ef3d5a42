//! What the agent remembers of the cluster over a restart: the cluster as it was last seen.
//!
//! With it the tunnels come up while no API server answers. It is a cache: what is damaged, of
//! another version or another owner's is ignored with a warning, and what cannot be written costs a
//! warning. Preshared keys of external peers are in it, or those peers would be cut off by a restart
//! during an outage; so it is the agent's alone (0600), like the private key beside it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use zeroize::Zeroizing;

use crate::cluster::{Servers, View};
use crate::envelope::Envelope;
use crate::guard::{self, Guard};
use crate::secure_file;
use crate::topology::{Endpoint, ExternalPeer, Node, NodeName, Resolved, Snapshot};
use crate::wireguard::key::PublicKey;

/// The cluster's file below `--state-dir`.
const STATE: &str = "state.json";

/// The form of the file; it changes with any type in it.
const FORMAT: u32 = 2;
/// Five thousand Nodes are some four megabytes; a file larger than this was never a cache.
const MAX_SIZE: u64 = 64 << 20;
/// The file is written this often at most; a cluster that is being built changes all the time.
const INTERVAL: Duration = Duration::from_secs(5);

/// What is remembered of the cluster.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct SavedView {
    /// Nodes and Peers.
    pub snapshot: Arc<Snapshot>,
    /// The addresses that names resolved to.
    pub resolved: Arc<Resolved>,
    /// The addresses of the API servers.
    pub servers: BTreeSet<IpAddr>,
}

impl SavedView {
    /// What is worth remembering of a view.
    pub fn new(view: &View, resolved: Arc<Resolved>) -> Self {
        Self {
            snapshot: Arc::clone(&view.snapshot),
            resolved,
            servers: view.servers.addresses.clone(),
        }
    }

    /// The view as it was.
    pub fn into_view(self) -> View {
        View {
            snapshot: self.snapshot,
            servers: Servers {
                addresses: self.servers,
                incomplete: None,
                probing: false,
            },
            ..View::default()
        }
    }
}

#[derive(Deserialize, Serialize)]
struct State {
    nodes: BTreeMap<NodeName, Node>,
    peers: Vec<Peer>,
    resolved: BTreeMap<String, IpAddr>,
    servers: BTreeSet<IpAddr>,
}

/// An [`ExternalPeer`]. Only here is its preshared key ever written anywhere.
#[derive(Deserialize, Serialize)]
struct Peer {
    name: String,
    created: i64,
    public_key: PublicKey,
    preshared_key: Option<Secret>,
    endpoint: Option<Endpoint>,
    persistent_keepalive: u16,
    allowed_ips: Vec<IpNet>,
}

/// A preshared key in base64, wiped when dropped.
struct Secret(Zeroizing<String>);

impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| Self(Zeroizing::new(text)))
    }
}

impl From<&ExternalPeer> for Peer {
    fn from(peer: &ExternalPeer) -> Self {
        Self {
            name: peer.name.clone(),
            created: peer.created,
            public_key: peer.public_key,
            preshared_key: peer
                .preshared_key
                .as_ref()
                .map(|key| Secret(key.to_base64())),
            endpoint: peer.endpoint.clone(),
            persistent_keepalive: peer.persistent_keepalive,
            allowed_ips: peer.allowed_ips.clone(),
        }
    }
}

impl TryFrom<Peer> for ExternalPeer {
    type Error = crate::wireguard::key::InvalidKey;

    fn try_from(peer: Peer) -> Result<Self, Self::Error> {
        let preshared_key = peer.preshared_key.map(|key| key.0.parse()).transpose()?;
        Ok(Self {
            name: peer.name,
            created: peer.created,
            public_key: peer.public_key,
            preshared_key,
            endpoint: peer.endpoint,
            persistent_keepalive: peer.persistent_keepalive,
            allowed_ips: peer.allowed_ips,
        })
    }
}

/// Reads what was remembered below `state_dir`; none where there is nothing of use.
pub fn load(state_dir: &Path) -> Option<SavedView> {
    let path = state_dir.join(STATE);
    let read = secure_file::read(&path, MAX_SIZE)
        .and_then(|text| text.map(|text| decode(&text)).transpose());
    match read {
        Ok(saved) => saved,
        Err(error) => {
            tracing::warn!(path = %path.display(), error = %format_args!("{error:#}"), "reading the cached state failed: starting without it");
            None
        }
    }
}

/// Removes what was remembered of the cluster. How far timestamps had come stays, like the key they
/// belong to.
///
/// # Errors
///
/// When the file is there and cannot be removed.
pub fn forget(state_dir: &Path) -> io::Result<()> {
    secure_file::remove(&state_dir.join(STATE))
}

/// Writes the cluster's state on a separate thread, because disks may be slow: the latest state,
/// at most every five seconds, and once more when it is dropped.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    next: Mutex<Next>,
    wake: Condvar,
    failures: AtomicU64,
}

#[derive(Debug, Default)]
struct Next {
    saved: Option<SavedView>,
    guard: Option<Guard>,
    end: bool,
}

impl Writer {
    /// Will write below `state_dir`.
    ///
    /// # Errors
    ///
    /// When no thread can be started.
    pub fn start(state_dir: PathBuf) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let thread = {
            let shared = Arc::clone(&shared);
            let name = "state".to_owned();
            std::thread::Builder::new()
                .name(name)
                .spawn(move || shared.run(&state_dir))?
        };
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Has `saved` be written; returns at once.
    pub fn save(&self, saved: SavedView) {
        self.shared.next().saved = Some(saved);
        self.shared.wake.notify_one();
    }

    /// Has `guard` be written for the next boot; returns at once. An empty one removes the file.
    pub fn keep_guard(&self, guard: Guard) {
        self.shared.next().guard = Some(guard);
        self.shared.wake.notify_one();
    }

    /// How often writing has failed.
    pub fn failures(&self) -> u64 {
        self.shared.failures.load(Ordering::Relaxed)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.next().end = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic there has aborted the process, or printed itself in a test.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn next(&self) -> MutexGuard<'_, Next> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, state_dir: &Path) {
        let mut state = Kept::new(
            state_dir.join(STATE),
            "without it a restart needs an API server",
        );
        let mut guarded = Kept::new(
            state_dir.join(guard::FILE),
            "until it is, the guard of the next boot is that of an earlier state",
        );
        loop {
            let (saved, guard, end) = {
                let idle =
                    |next: &mut Next| next.saved.is_none() && next.guard.is_none() && !next.end;
                let mut next = self
                    .wake
                    .wait_while(self.next(), idle)
                    .unwrap_or_else(PoisonError::into_inner);
                (next.saved.take(), next.guard.take(), next.end)
            };
            // The guard first: it is small, and what is missing in it leaves in clear after a reboot.
            guarded.keep(guard, |guard| guard.save(state_dir), &self.failures);
            state.keep(saved, |saved| save(state_dir, saved), &self.failures);
            if end {
                return;
            }
            // Only the end cuts the interval short.
            let until_end = |next: &mut Next| !next.end;
            drop(
                self.wake
                    .wait_timeout_while(self.next(), INTERVAL, until_end),
            );
        }
    }
}

/// A file that is written when its content is another one than before.
struct Kept<T> {
    path: PathBuf,
    /// What it means that the file cannot be written: a clause for the log.
    otherwise: &'static str,
    written: Option<T>,
    failing: bool,
}

impl<T: PartialEq> Kept<T> {
    fn new(path: PathBuf, otherwise: &'static str) -> Self {
        Self {
            path,
            otherwise,
            written: None,
            failing: false,
        }
    }

    fn keep(
        &mut self,
        content: Option<T>,
        write: impl FnOnce(&T) -> anyhow::Result<()>,
        failures: &AtomicU64,
    ) {
        let Some(content) = content.filter(|content| self.written.as_ref() != Some(content)) else {
            return;
        };
        let path = self.path.display();
        match write(&content) {
            Ok(()) => {
                if self.failing {
                    tracing::info!(%path, "file writable again");
                }
                self.failing = false;
                self.written = Some(content);
            }
            Err(error) => {
                failures.fetch_add(1, Ordering::Relaxed);
                if !self.failing {
                    let consequence = self.otherwise;
                    tracing::warn!(%path, error = %format_args!("{error:#}"), consequence, "writing the file failed");
                }
                self.failing = true;
                self.written = None;
            }
        }
    }
}

fn save(state_dir: &Path, saved: &SavedView) -> anyhow::Result<()> {
    let text = encode(saved)?;
    Ok(secure_file::replace(state_dir, STATE, text.as_bytes())?)
}

fn encode(saved: &SavedView) -> anyhow::Result<Zeroizing<String>> {
    let SavedView {
        snapshot,
        resolved,
        servers,
    } = saved;
    let state = State {
        nodes: snapshot.nodes.clone(),
        peers: snapshot.peers.values().map(Peer::from).collect(),
        resolved: Resolved::clone(resolved),
        servers: servers.clone(),
    };
    let state = RawValue::from_string(serde_json::to_string(&state)?)?;
    let envelope = Envelope::new(FORMAT, &state);
    Ok(Zeroizing::new(serde_json::to_string(&envelope)?))
}

/// What the text of the file says.
///
/// # Errors
/// When it is damaged, or of another version; no error repeats any of it, for there may be preshared
/// keys in it.
pub fn decode(text: &str) -> anyhow::Result<SavedView> {
    let state = Envelope::open(text, FORMAT)?;
    let state: State = serde_json::from_str(state.get())
        .ok()
        .context("it is of another version")?;
    let mut peers = BTreeMap::new();
    for peer in state.peers {
        let peer = ExternalPeer::try_from(peer).context("a preshared key in it is damaged")?;
        peers.insert(peer.name.clone(), peer);
    }
    Ok(SavedView {
        snapshot: Arc::new(Snapshot {
            nodes: state.nodes,
            peers,
        }),
        resolved: Arc::new(state.resolved),
        servers: state.servers,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

    use super::*;
    use crate::cluster::{ParseSettings, node, peer};

    fn saved() -> SavedView {
        let node = serde_json::from_value(serde_json::json!({
            "metadata": {
                "name": "a1",
                "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": {"topology.kubernetes.io/region": "nd"},
                "annotations": {
                    "flannel.alpha.coreos.com/backend-data": "{\"VNI\":1,\"VtepMAC\":\"9e:94:f2:d4:ca:3a\"}",
                    "flannel.alpha.coreos.com/backend-type": "vxlan",
                    "flannel.alpha.coreos.com/kube-subnet-manager": "true",
                    "flannel.alpha.coreos.com/public-ip": "192.168.50.11",
                    "kilo.squat.ai/allowed-location-ips": "10.6.0.0/24",
                    "kilo.squat.ai/discovered-endpoints": "{\"ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs=\":{\"IP\":\"198.51.100.7\",\"Port\":24276,\"Zone\":\"\"}}",
                    "kilo.squat.ai/force-endpoint": "vpn.example.com:51820",
                    "kilo.squat.ai/granularity": "location",
                    "kilo.squat.ai/internal-ip": "192.168.50.11/24",
                    "kilo.squat.ai/key": "jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w=",
                    "kilo.squat.ai/last-seen": "1767225600",
                    "kilo.squat.ai/persistent-keepalive": "25",
                    "kilo.squat.ai/wireguard-ip": "10.4.0.2/16",
                },
            },
            "spec": {"podCIDRs": ["10.42.1.0/24"]},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.168.50.11"}]},
        }));
        let (node, rejected) = node::parse(&node.unwrap(), &ParseSettings::default());
        assert!(rejected.is_empty(), "{rejected:?}");
        let peer = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "laptop", "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {
                "allowedIPs": ["10.5.0.1/32"],
                "endpoint": {"dnsOrIP": {"ip": "198.51.100.7"}, "port": 51820},
                "persistentKeepalive": 10,
                "presharedKey": "PSKwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=",
                "publicKey": "ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs=",
            },
        }));
        let (peer, rejected) = peer::parse(&peer.unwrap());
        assert!(rejected.is_empty(), "{rejected:?}");
        let (node, peer) = (node.unwrap(), peer.unwrap());
        SavedView {
            snapshot: Arc::new(Snapshot {
                nodes: BTreeMap::from([(node.name.clone(), node)]),
                peers: BTreeMap::from([(peer.name.clone(), peer)]),
            }),
            resolved: Arc::new(BTreeMap::from([(
                "vpn.example.com".to_owned(),
                "203.0.113.7".parse().unwrap(),
            )])),
            servers: BTreeSet::from(["203.0.113.10".parse().unwrap()]),
        }
    }

    fn write(dir: &Path, saved: SavedView) -> u64 {
        let writer = Writer::start(dir.to_owned()).unwrap();
        writer.save(saved);
        // The end of the thread is the end of writing.
        let shared = Arc::clone(&writer.shared);
        drop(writer);
        shared.failures.load(Ordering::Relaxed)
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(load(dir.path()), None);
        write(dir.path(), saved());
        assert_eq!(load(dir.path()), Some(saved()));
        let mode = fs::metadata(dir.path().join(STATE)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    /// When this fails, a file that older versions wrote cannot be read any more: raise [`FORMAT`].
    #[test]
    fn the_form_of_the_file_is_that_of_its_number() {
        let text = include_str!("../../tests/testdata/state-2.json");
        assert_eq!(encode(&saved()).unwrap().as_str(), text.trim_end());
        assert_eq!(decode(text).unwrap(), saved());
    }

    #[test]
    fn a_file_with_any_byte_changed_is_ignored() {
        let text = encode(&saved()).unwrap();
        assert!(decode(&text).is_ok());
        for at in 0..text.len() {
            let mut bytes = text.as_bytes().to_vec();
            bytes[at] ^= 1;
            let Ok(changed) = String::from_utf8(bytes) else {
                continue;
            };
            // A name of an envelope's field is all that may differ without harm: there is none.
            assert!(decode(&changed).is_err(), "byte {at}");
        }
        for length in 0..text.len() {
            assert!(decode(&text[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_file_of_another_version_is_ignored() {
        let text = encode(&saved()).unwrap();
        let newer = text.replacen("\"format\":2", "\"format\":3", 1);
        let error = decode(&newer).unwrap_err().to_string();
        assert_eq!(error, "it has format 3, and this version reads format 2");
    }

    #[test]
    fn a_file_that_others_could_have_written_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), saved());
        let path = dir.path().join(STATE);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(load(dir.path()), None);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(load(dir.path()).is_some());
        let elsewhere = dir.path().join("elsewhere");
        fs::rename(&path, &elsewhere).unwrap();
        symlink(&elsewhere, &path).unwrap();
        assert_eq!(load(dir.path()), None);
    }

    #[test]
    fn what_is_forgotten_is_not_loaded() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), saved());
        forget(dir.path()).unwrap();
        forget(dir.path()).unwrap();
        assert_eq!(load(dir.path()), None);
    }

    #[test]
    fn a_directory_that_cannot_be_written_costs_a_warning() {
        assert_eq!(write(Path::new("/proc/nonexistent"), saved()), 1);
        assert_eq!(write(Path::new("/dev/full"), saved()), 1);
    }

    #[test]
    fn no_error_quotes_the_file() {
        let text = encode(&saved()).unwrap();
        let damaged = text.replace("\"created\":", "\"created\":x");
        let error = format!("{:#}", decode(&damaged).unwrap_err());
        assert!(!error.contains("PSK"), "{error}");
    }
}
