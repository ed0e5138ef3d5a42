//! A stand-in for the API server: the real protocol, a store in memory, and faults at will.
//!
//! It speaks lists in pages, watches with bookmarks and streamed lists, versions and 410, the four
//! kinds of patches, subresources, bearer tokens and TLS, on the kinds that agents use. It leaves
//! out admission, authorization and schemas: what depends on those is tested on the real server.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

mod fault;
mod http;
mod patch;
mod store;
mod tls;

pub use fault::Faults;
pub use store::{KINDS, Kind, Refused};
pub use tls::Authority;

use store::Store;

/// A request that was answered.
#[derive(Clone, Debug)]
pub struct Logged {
    /// When it had been read.
    pub at: Instant,
    /// `GET`, `PATCH` …
    pub method: String,
    /// Without the query.
    pub path: String,
    /// The query, decoded.
    pub query: BTreeMap<String, String>,
    /// Whose token it carried.
    pub user: String,
    /// `User-Agent`.
    pub agent: String,
    /// The status of the answer.
    pub status: u16,
    /// What was sent.
    pub body: String,
}

impl Logged {
    /// Whether the request asked for a change.
    #[must_use]
    pub fn is_write(&self) -> bool {
        self.method != "GET"
    }

    /// Whether it is a list: in pages, or as the beginning of a watch.
    #[must_use]
    pub fn is_list(&self) -> bool {
        let watch = self.query.contains_key("watch");
        let more = self.query.contains_key("continue");
        self.method == "GET" && (!watch || self.query.contains_key("sendInitialEvents")) && !more
    }

    /// Whether it is a watch that goes on from a version.
    #[must_use]
    pub fn is_resumed_watch(&self) -> bool {
        self.query.contains_key("watch") && self.query.contains_key("resourceVersion")
    }
}

/// How a stand-in is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whether it speaks TLS.
    pub tls: bool,
    /// Addresses for its certificate beside the one it listens on.
    pub addresses: Vec<IpAddr>,
    /// Users by token; every caller is accepted when there are none.
    pub tokens: BTreeMap<String, String>,
    /// Time between bookmarks; a minute on real servers.
    pub bookmarks: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            tls: true,
            addresses: Vec::new(),
            tokens: BTreeMap::new(),
            bookmarks: Duration::from_secs(60),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    store: Store,
    faults: Faults,
    log: Vec<Logged>,
    tokens: BTreeMap<String, String>,
    /// Counts up to end all watches.
    watch_epoch: u64,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    bookmarks: Duration,
    /// Counts changes of the store and of the faults.
    changes: watch::Sender<u64>,
    /// Counts up to close all connections.
    cut: watch::Sender<u64>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }
}

/// A stand-in that runs on a thread of its own until it is dropped.
#[derive(Debug)]
pub struct Api {
    shared: Arc<Shared>,
    authority: Authority,
    addr: SocketAddr,
    tls: bool,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Api {
    /// Serves on a port of this host that is free.
    ///
    /// # Errors
    ///
    /// No port, or no thread.
    pub fn start(options: Options) -> anyhow::Result<Self> {
        Self::serve(
            TcpListener::bind("127.0.0.1:0").context("binding a port")?,
            options,
        )
    }

    /// Serves on `listener`. A socket stays in the network namespace it was made in, so one that was
    /// bound [`within`](crate::Namespace::within) a namespace serves there.
    ///
    /// # Errors
    ///
    /// No thread, or a socket that is none.
    pub fn serve(listener: TcpListener, options: Options) -> anyhow::Result<Self> {
        let addr = listener.local_addr().context("the stand-in's address")?;
        listener
            .set_nonblocking(true)
            .context("the stand-in's socket")?;
        let authority = Authority::new()?;
        let mut addresses = options.addresses.clone();
        addresses.extend([addr.ip(), IpAddr::from([127, 0, 0, 1])]);
        let acceptor = match options.tls {
            true => Some(authority.acceptor(&addresses)?),
            false => None,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                tokens: options.tokens,
                ..State::default()
            }),
            bookmarks: options.bookmarks,
            changes: watch::channel(0).0,
            cut: watch::channel(0).0,
        });

        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("the stand-in's runtime")?;
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let served = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("lab-api".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        outcome = accept(served, listener, acceptor) => {
                            if let Err(error) = outcome {
                                eprintln!("the API stand-in stopped: {error:#}");
                            }
                        }
                        _ = stopped => {}
                    }
                });
            })
            .context("the stand-in's thread")?;
        Ok(Self {
            shared,
            authority,
            addr,
            tls: options.tls,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Where it listens.
    #[must_use]
    pub const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Its URL.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://{}", self.addr)
    }

    /// The certificate of its CA in PEM.
    #[must_use]
    pub fn ca(&self) -> &str {
        self.authority.pem()
    }

    /// Writes a kubeconfig for the holder of `token`.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn write_kubeconfig(&self, path: &Path, token: &str) -> anyhow::Result<()> {
        let ca = path.with_extension("ca.crt");
        fs::write(&ca, self.ca()).with_context(|| ca.display().to_string())?;
        let mut cluster = json!({"server": self.url()});
        if self.tls {
            cluster["certificate-authority"] = json!(ca);
        }
        let user = match token {
            "" => json!({}),
            token => json!({"token": token}),
        };
        // JSON is YAML.
        let kubeconfig = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "lab",
            "clusters": [{"name": "lab", "cluster": cluster}],
            "users": [{"name": "lab", "user": user}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
        });
        let text = format!("{kubeconfig:#}\n");
        fs::write(path, text).with_context(|| path.display().to_string())
    }

    /// Writes what a pod finds of its service account: `token` and `ca.crt`.
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn write_service_account(&self, directory: &Path, token: &str) -> anyhow::Result<PathBuf> {
        fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        for (name, text) in [
            ("token", token),
            ("ca.crt", self.ca()),
            ("namespace", "kube-system"),
        ] {
            let path = directory.join(name);
            fs::write(&path, text).with_context(|| path.display().to_string())?;
        }
        Ok(directory.to_owned())
    }

    /// Creates or replaces an object with all that it says, its status too.
    ///
    /// # Errors
    ///
    /// A kind that is not served.
    pub fn put(&self, object: Value) -> anyhow::Result<Value> {
        let (kind, namespace, name) = http::target_of(&object)?;
        let mut state = self.shared.state();
        let store = &mut state.store;
        let put = match store.get(kind, &namespace, &name) {
            Ok(_) => store.update(kind, &namespace, &name, |_| Ok(object)),
            Err(_) => store.create(kind, &namespace, object),
        };
        drop(state);
        self.shared.changed();
        put.map_err(|refused| anyhow::anyhow!("{}", refused.message))
    }

    /// Merges `patch` into an object, status and all.
    ///
    /// # Errors
    ///
    /// No such object.
    pub fn merge(&self, plural: &str, name: &str, patch: &Value) -> anyhow::Result<Value> {
        let kind = http::kind_named(plural);
        let namespace = if kind.namespaced { "default" } else { "" };
        let edit = |old: &Value| {
            let patch = patch.to_string();
            patch::apply(
                "application/strategic-merge-patch+json",
                old,
                patch.as_bytes(),
            )
        };
        let merged = self
            .shared
            .state()
            .store
            .update(kind, namespace, name, edit);
        self.shared.changed();
        merged.map_err(|refused| anyhow::anyhow!("{}", refused.message))
    }

    /// Sets an annotation of a Node, or removes it.
    ///
    /// # Errors
    ///
    /// No such Node.
    pub fn annotate(&self, node: &str, key: &str, value: Option<&str>) -> anyhow::Result<()> {
        let patch = json!({"metadata": {"annotations": {key: value}}});
        self.merge("nodes", node, &patch).map(drop)
    }

    /// Deletes an object (of the namespace `default`, where it lives in one).
    ///
    /// # Errors
    ///
    /// No such object.
    pub fn delete(&self, plural: &str, name: &str) -> anyhow::Result<()> {
        let kind = http::kind_named(plural);
        let namespace = if kind.namespaced { "default" } else { "" };
        let deleted = self.shared.state().store.delete(kind, namespace, name);
        self.shared.changed();
        deleted
            .map(drop)
            .map_err(|refused| anyhow::anyhow!("{}", refused.message))
    }

    /// One object, as it is now.
    #[must_use]
    pub fn get(&self, plural: &str, name: &str) -> Option<Value> {
        let kind = http::kind_named(plural);
        let namespace = if kind.namespaced { "default" } else { "" };
        self.shared
            .state()
            .store
            .get(kind, namespace, name)
            .ok()
            .cloned()
    }

    /// All objects of a resource.
    #[must_use]
    pub fn list(&self, plural: &str) -> Vec<Value> {
        let state = self.shared.state();
        let selector = store::Selector::default();
        state
            .store
            .list(http::kind_named(plural), &selector)
            .cloned()
            .collect()
    }

    /// Has Peers be served.
    ///
    /// # Errors
    ///
    /// None that are known.
    pub fn define_peers(&self) -> anyhow::Result<()> {
        self.put(json!({
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": "peers.kilo.squat.ai"},
            "spec": {"group": "kilo.squat.ai", "names": {"plural": "peers", "kind": "Peer"}, "scope": "Cluster"},
        }))
        .map(drop)
    }

    /// Turns switches of the faults.
    pub fn fault(&self, turn: impl FnOnce(&mut Faults)) {
        let refuse = {
            let mut state = self.shared.state();
            turn(&mut state.faults);
            state.faults.refuse
        };
        if refuse {
            self.cut_connections();
        }
        self.shared.changed();
    }

    /// Lets users in by these tokens only.
    pub fn set_tokens(&self, tokens: BTreeMap<String, String>) {
        self.shared.state().tokens = tokens;
    }

    /// Ends all watches as a server does whose time for them is over.
    pub fn end_watches(&self) {
        self.shared.state().watch_epoch += 1;
        self.shared.changed();
    }

    /// Closes all connections in the middle of whatever they do.
    pub fn cut_connections(&self) {
        self.shared.cut.send_modify(|count| *count += 1);
    }

    /// Forgets the history, so that watches from before now get 410.
    pub fn compact(&self) {
        self.shared.state().store.compact();
        self.shared.changed();
    }

    /// The requests since the start, or since the log was last taken.
    #[must_use]
    pub fn requests(&self) -> Vec<Logged> {
        self.shared.state().log.clone()
    }

    /// Takes the log: the next requests are the first in it.
    pub fn take_requests(&self) -> Vec<Logged> {
        std::mem::take(&mut self.shared.state().log)
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic in there has been printed.
            let _ = thread.join();
        }
    }
}

async fn accept(
    shared: Arc<Shared>,
    listener: TcpListener,
    acceptor: Option<TlsAcceptor>,
) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        let (stream, _) = listener.accept().await?;
        let faults = shared.state().faults.clone();
        if faults.refuse {
            // A reset, as from a port without a server.
            let _ = stream.set_zero_linger();
            continue;
        }
        tokio::spawn(connection(Arc::clone(&shared), stream, acceptor.clone()));
    }
}

async fn connection(shared: Arc<Shared>, stream: TcpStream, acceptor: Option<TlsAcceptor>) {
    let mut cut = shared.cut.subscribe();
    cut.borrow_and_update();
    // Small lines of watches must not wait for one another.
    let _ = stream.set_nodelay(true);
    if shared.state().faults.half_open {
        let _ = cut.changed().await;
        return;
    }
    let serving = async {
        match acceptor {
            Some(acceptor) => {
                if let Ok(stream) = acceptor.accept(stream).await {
                    requests(&shared, stream).await;
                }
            }
            None => requests(&shared, stream).await,
        }
    };
    tokio::select! {
        () = serving => {}
        _ = cut.changed() => {}
    }
}

async fn requests(
    shared: &Arc<Shared>,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) {
    let service = service_fn(|request| http::handle(Arc::clone(shared), request));
    // Clients come and go as they like; what they break is theirs.
    let _ = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await;
}
