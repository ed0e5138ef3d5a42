//! Finds an API server: which addresses may lead to one, and which of them answers.
//!
//! The API may be far away behind the very tunnel this agent builds, so the nearest way comes first
//! and none is relied upon. A server counts when `/version` answers behind a certificate of the
//! cluster's CA; nothing is sent to any other.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use k8s_openapi::jiff::fmt::rfc2822;
use kube::client::{ClientBuilder, ConfigExt as _};
use kube::config::{
    AuthInfo, Cluster, Context, Kubeconfig, NamedAuthInfo, NamedCluster, NamedContext,
};
use kube::{Client, Config};
use tokio::time::Instant;
use tower::ServiceBuilder;

use super::call::{self, Failure};
use super::kubeconfig;
use crate::refusal::Refusal;

/// Where a pod finds its service account.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Ports on this host behind which an API server may be: k3s agents balance on 6444, servers listen
/// on 6443, Talos balances on 7445.
const LOCAL_PORTS: [u16; 3] = [6444, 6443, 7445];

/// A name that every API server's certificate carries, whatever address it is reached by.
const SERVER_NAME: &str = "kubernetes.default.svc";

/// TCP and TLS together; a server that needs longer is not the one to choose.
const CONNECT: Duration = Duration::from_secs(3);
/// How long `/version` may take.
const PROBE: Duration = Duration::from_secs(5);
/// Nothing is heard for this long on a connection that should carry something: it is half-open.
/// API servers send a bookmark every minute.
pub(super) const SILENCE: Duration = Duration::from_secs(90);

/// A connection on which nothing comes is probed after this long, as Go's programs do a little later.
///
/// Watches are silent for a minute at a time. A router on the way that restarts knows nothing of them,
/// and drops what the server sends; this host's next packet makes it known again, or the server refuses
/// it and a new connection is made. Until then this node learns of nothing: a minute in which it does
/// not speak to who wants to reach it through the NAT.
const PROBE_IDLE: Duration = Duration::from_secs(10);
/// Between probes that are not answered, and how many of them end the connection.
const PROBE_AGAIN: Duration = Duration::from_secs(5);
const PROBES: u32 = 4;

/// Where to look for an API server.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Sources {
    /// `--kubeconfig`.
    pub kubeconfig: Option<PathBuf>,
    /// `--master`: a URL that replaces the kubeconfig's, or goes with the service account.
    pub master: Option<String>,
    /// The directory with the service account's `token` and `ca.crt`.
    pub service_account: PathBuf,
    /// Where an API server may listen on this host.
    pub local: Vec<SocketAddr>,
    /// The URL of the `kubernetes` service, from a pod's environment.
    pub service: Option<String>,
    /// The tunnel's mark: connections that carry it tell which servers answer without the tunnel.
    pub mark: Option<u32>,
}

impl Sources {
    /// What the flags say, and what every pod is told.
    pub fn new(kubeconfig: Option<PathBuf>, master: Option<String>) -> Self {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let service = variable("KUBERNETES_SERVICE_HOST").map(|host| {
            let port = variable("KUBERNETES_SERVICE_PORT").unwrap_or_else(|| "443".to_owned());
            match host.contains(':') {
                true => format!("https://[{host}]:{port}"),
                false => format!("https://{host}:{port}"),
            }
        });
        Self {
            kubeconfig,
            master,
            service_account: PathBuf::from(SERVICE_ACCOUNT),
            local: LOCAL_PORTS
                .map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
                .to_vec(),
            service,
            mark: None,
        }
    }
}

/// One way to an API server.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Origin {
    /// The server named in `--kubeconfig`.
    Kubeconfig(PathBuf),
    /// `--master`.
    Master(String),
    /// A port on this host.
    Local(SocketAddr),
    /// The address of the `kubernetes` service.
    Service(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kubeconfig(path) => write!(f, "the server in {}", path.display()),
            Self::Master(url) => write!(f, "--master {url}"),
            Self::Local(addr) => write!(f, "{addr} on this host"),
            Self::Service(url) => write!(f, "the service {url}"),
        }
    }
}

/// A server that answered.
#[derive(Clone)]
pub(super) struct Connection {
    /// Tells connections apart.
    pub(super) number: u64,
    /// The way to it.
    pub(super) origin: Origin,
    /// The host of its URL.
    pub(super) host: String,
    /// Speaks to it.
    pub(super) client: Client,
}

/// No server answered: each way that was tried, and what came of it.
#[derive(Clone, Debug, thiserror::Error)]
#[error("no API server answers: {}", Tried(.0))]
pub(super) struct NoServer(Vec<(Origin, String)>);

struct Tried<'a>(&'a [(Origin, String)]);

impl fmt::Display for Tried<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (origin, outcome)) in self.0.iter().enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            write!(f, "{comma}{origin} ({outcome})")?;
        }
        Ok(())
    }
}

/// The ways to the cluster's API servers.
#[derive(Clone, Debug)]
pub struct Access {
    sources: Sources,
    clock: ServerClock,
}

/// The API server's clock, as the `Date` of its last answer told it (RFC 9110, 6.6.1).
///
/// What is recorded for all agents to compare must not depend on this node's clock.
#[derive(Clone, Debug, Default)]
struct ServerClock(Arc<Mutex<Option<(i64, Instant)>>>);

impl ServerClock {
    fn handle_answer<B>(&self, answer: &http::Response<B>) {
        let date = answer.headers().get(http::header::DATE);
        let date = date.and_then(|date| date.to_str().ok());
        let date = date.and_then(|date| rfc2822::parse(date).ok());
        if let Some(date) = date {
            let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            *known = Some((date.timestamp().as_second(), Instant::now()));
        }
    }

    fn now(&self) -> Option<i64> {
        let known = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (date, at) = known?;
        let passed = i64::try_from(at.elapsed().as_secs()).unwrap_or(i64::MAX);
        Some(date.saturating_add(passed))
    }
}

impl Access {
    /// Checks what can be checked without a server.
    ///
    /// # Errors
    ///
    /// A kubeconfig that cannot be read, or neither a kubeconfig nor a service account to speak with.
    pub async fn new(sources: Sources) -> Result<Self, Refusal> {
        if let Some(path) = &sources.kubeconfig {
            from_kubeconfig(path, sources.master.as_deref())
                .await
                .map_err(|reason| {
                    Refusal::configuration(format!("--kubeconfig {}: {reason}", path.display()))
                })?;
        }
        let access = Self {
            sources,
            clock: ServerClock::default(),
        };
        if access.ways().await.is_empty() {
            return Err(Refusal::configuration(format!(
                "there is no way to the API server: give --kubeconfig, or run in a pod whose service account is mounted at {}",
                access.sources.service_account.display()
            )));
        }
        Ok(access)
    }

    /// Asks at every way at once, in order of preference: for people who want to know which answer.
    /// The outcome of one that does not is why: a clause.
    pub async fn try_all(&self) -> Vec<(Origin, Result<(), String>)> {
        let ways = self.ways().await.into_iter().map(async |(origin, config)| {
            let outcome = match config {
                Ok(config) => probe(0, &origin, config, &self.clock).await.map(drop),
                Err(reason) => Err(reason),
            };
            (origin, outcome)
        });
        join_all(ways).await
    }

    /// The API server's time in Unix seconds; `None` before its first answer.
    pub fn server_time(&self) -> Option<i64> {
        self.clock.now()
    }

    /// The tunnel's mark.
    pub(super) fn mark(&self) -> Option<u32> {
        self.sources.mark
    }

    /// Connects to the first server that answers; `avoid` is tried last.
    pub(super) async fn connect(
        &self,
        number: u64,
        avoid: Option<&Origin>,
    ) -> Result<Connection, NoServer> {
        let mut ways = self.ways().await;
        ways.sort_by_key(|(origin, _)| Some(origin) == avoid);

        let mut tried = Vec::new();
        for (origin, config) in ways {
            let outcome = match config {
                Ok(config) => probe(number, &origin, config, &self.clock).await,
                Err(reason) => Err(reason),
            };
            match outcome {
                Ok(connection) => return Ok(connection),
                Err(reason) => tried.push((origin, reason)),
            }
        }
        Err(NoServer(tried))
    }

    /// Every way in order of preference. Files are read anew each time: kubeconfigs are replaced,
    /// service accounts appear.
    async fn ways(&self) -> Vec<(Origin, Result<Config, String>)> {
        let sources = &self.sources;
        let account = self
            .service_account("https://service-account.invalid")
            .await;
        let mut ways = Vec::new();
        let mut of_kubeconfig = None;

        if let Some(path) = &sources.kubeconfig {
            let config = from_kubeconfig(path, sources.master.as_deref()).await;
            of_kubeconfig = config.clone().ok();
            ways.push((Origin::Kubeconfig(path.clone()), config));
        } else if let Some(url) = &sources.master {
            let config = match &account {
                // A plain port is `kubectl proxy`: it needs no token, and shall not see one.
                _ if url.starts_with("http://") => Some(
                    url.parse()
                        .map(Config::new)
                        .map_err(|e| format!("{url:?} is no URL: {e}")),
                ),
                Some(account) => Some(at(account, url)),
                None => None,
            };
            ways.extend(config.map(|config| (Origin::Master(url.clone()), config)));
        }

        // Whoever listens there must show a certificate of the cluster's CA before it sees a token.
        let credentials = account.as_ref().or_else(|| {
            of_kubeconfig
                .as_ref()
                .filter(|config| config.root_cert.is_some() && !config.accept_invalid_certs)
        });
        for addr in &sources.local {
            let Some(credentials) = credentials else {
                break;
            };
            let config = at(credentials, &format!("https://{addr}")).map(|mut config| {
                config.tls_server_name = Some(SERVER_NAME.to_owned());
                config
            });
            ways.push((Origin::Local(*addr), config));
        }

        if let (Some(account), Some(url)) = (&account, &sources.service) {
            ways.push((Origin::Service(url.clone()), at(account, url)));
        }
        ways
    }

    /// The service account's credentials; both files are read again while the agent runs, because
    /// tokens expire within the hour and CAs are rotated.
    async fn service_account(&self, url: &str) -> Option<Config> {
        let directory = &self.sources.service_account;
        let (token, ca) = (directory.join("token"), directory.join("ca.crt"));
        if !token.exists() || !ca.exists() {
            return None;
        }
        let text = |path: &Path| path.to_str().map(ToOwned::to_owned);
        let name = "service-account".to_owned();
        let kubeconfig = Kubeconfig {
            clusters: vec![NamedCluster {
                name: name.clone(),
                cluster: Some(Cluster {
                    server: Some(url.to_owned()),
                    certificate_authority: text(&ca),
                    ..Cluster::default()
                }),
                ..NamedCluster::default()
            }],
            auth_infos: vec![NamedAuthInfo {
                name: name.clone(),
                auth_info: Some(AuthInfo {
                    token_file: text(&token),
                    ..AuthInfo::default()
                }),
                ..NamedAuthInfo::default()
            }],
            contexts: vec![NamedContext {
                name: name.clone(),
                context: Some(Context {
                    cluster: name.clone(),
                    user: Some(name.clone()),
                    ..Context::default()
                }),
                ..NamedContext::default()
            }],
            current_context: Some(name),
            ..Kubeconfig::default()
        };
        let mut config = kubeconfig::choose(kubeconfig).await.ok()?;
        config.proxy_url = None;
        config.root_cert_file = Some(ca);
        Some(config)
    }
}

/// The same credentials at another server.
fn at(config: &Config, url: &str) -> Result<Config, String> {
    let mut config = config.clone();
    config.cluster_url = url.parse().map_err(|e| format!("{url:?} is no URL: {e}"))?;
    Ok(config)
}

async fn from_kubeconfig(path: &Path, master: Option<&str>) -> Result<Config, String> {
    let kubeconfig = kubeconfig::read(path)?;
    let clusters = kubeconfig.clusters.iter();
    let names_proxy = clusters
        .filter_map(|named| named.cluster.as_ref())
        .any(|cluster| cluster.proxy_url.is_some());
    let mut config = kubeconfig::choose(kubeconfig).await?;
    if !names_proxy {
        // A proxy in the environment is for the way out of the cluster.
        config.proxy_url = None;
    }
    master.map_or(Ok(config.clone()), |url| at(&config, url))
}

/// An error with its causes, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Many errors of kube repeat their source's text in their own.
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    crate::text::message(&text)
}

async fn probe(
    number: u64,
    origin: &Origin,
    mut config: Config,
    clock: &ServerClock,
) -> Result<Connection, String> {
    config.connect_timeout = Some(CONNECT);
    config.read_timeout = Some(SILENCE);
    config.write_timeout = Some(SILENCE);
    // The time a connection waits in the pool is not the server's silence.
    config.reset_reader_on_write = true;
    // Retries are decided where it is known what the request is worth.
    config.default_retry = false;

    let host = config.cluster_url.host().unwrap_or_default().to_owned();
    let client = client(config, clock.clone()).map_err(|e| chain(&e))?;
    match tokio::time::timeout(PROBE, call::call(&client, call::get("/version"))).await {
        // 403 comes from a server that knows us and guards even its version.
        Ok(Ok(_) | Err(Failure::Forbidden(_))) => Ok(Connection {
            number,
            origin: origin.clone(),
            host,
            client,
        }),
        Ok(Err(failure)) => Err(failure.to_string()),
        Err(_) => Err(format!("no answer within {} s", PROBE.as_secs())),
    }
}

/// kube's client, but for the probes on its connections, which kube has no setting for, and the server's
/// time.
fn client(config: Config, clock: ServerClock) -> kube::Result<Client> {
    if config.proxy_url.is_some() {
        return Client::try_from(config);
    }
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_keepalive(Some(PROBE_IDLE));
    tcp.set_keepalive_interval(Some(PROBE_AGAIN));
    tcp.set_keepalive_retries(Some(PROBES));
    let mut connector = TimeoutConnector::new(config.rustls_https_connector_with_connector(tcp)?);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(config.read_timeout);
    connector.set_write_timeout(config.write_timeout);
    connector.set_reset_reader_on_write(config.reset_reader_on_write);
    let http = legacy::Client::builder(TokioExecutor::new()).build(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(tower::BoxError::from)
        .map_response(move |answer| {
            clock.handle_answer(&answer);
            answer
        })
        .service(http);
    Ok(ClientBuilder::new(service, config.default_namespace).build())
}
