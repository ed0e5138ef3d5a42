//! Finds an API server: the addresses to try, and the first that answers.
//!
//! The API server may be reachable only through the tunnel that this agent builds, so the nearest
//! address is tried first and none is required. A server counts if `/version` answers with a certificate
//! of the cluster's CA; the agent sends nothing to any other.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

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
use tower::ServiceBuilder;

use super::call::{self, Failure};
use super::kubeconfig;
use crate::clock::now;
use crate::refusal::Refusal;

/// The directory of a pod's service account.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Ports on this host that may lead to an API server: k3s agents balance on 6444, servers listen
/// on 6443, Talos balances on 7445.
const LOCAL_PORTS: [u16; 3] = [6444, 6443, 7445];

/// A name in every API server's certificate, independent of the address.
const SERVER_NAME: &str = "kubernetes.default.svc";

/// Timeout of TCP and TLS together; a slower server should not be chosen.
const CONNECT: Duration = Duration::from_secs(3);
/// Timeout of `/version`.
const PROBE: Duration = Duration::from_secs(5);
/// A connection without expected data for this long is half-open. API servers send a bookmark every
/// minute.
pub(super) const SILENCE: Duration = Duration::from_secs(90);

/// TCP keepalive: an idle connection is probed after this long, a little earlier than in Go programs.
///
/// Watches are silent for up to a minute. A router on the path that restarts has lost their state and
/// drops the server's packets. This host's next packet restores the state, or the server refuses it and
/// the agent opens a new connection. Until then this node receives no changes: for a minute it would not
/// call a new peer that can reach it only through the NAT.
const PROBE_IDLE: Duration = Duration::from_secs(10);
/// Interval between unanswered probes, and the number of them that closes the connection.
const PROBE_AGAIN: Duration = Duration::from_secs(5);
const PROBES: u32 = 4;

/// Where an API server may be found.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Sources {
    /// `--kubeconfig`.
    pub kubeconfig: Option<PathBuf>,
    /// `--master`: a URL that replaces the kubeconfig's, or is used with the service account.
    pub master: Option<String>,
    /// The directory with the service account's `token` and `ca.crt`.
    pub service_account: PathBuf,
    /// Addresses on this host where an API server may listen.
    pub local: Vec<SocketAddr>,
    /// The URL of the `kubernetes` service, from a pod's environment.
    pub service: Option<String>,
    /// The tunnel's mark: connections that carry it show which servers answer without the tunnel.
    pub mark: Option<u32>,
}

impl Sources {
    /// The sources from the flags and from a pod's environment.
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

/// One address of an API server, by its source.
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
    /// Identifies the connection.
    pub(super) number: u64,
    /// Its source.
    pub(super) origin: Origin,
    /// The host of its URL.
    pub(super) host: String,
    /// The client.
    pub(super) client: Client,
}

/// No server answered: each candidate with its error.
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

/// The candidates for the cluster's API server.
#[derive(Clone, Debug)]
pub struct Access {
    sources: Sources,
    clock: ServerClock,
}

/// The API server's clock, from the `Date` of its last response (RFC 9110, 6.6.1).
///
/// Times that all agents compare must not depend on this node's clock.
#[derive(Clone, Debug, Default)]
struct ServerClock(Arc<Mutex<Option<(i64, Instant)>>>);

impl ServerClock {
    fn handle_answer<B>(&self, answer: &http::Response<B>) {
        let date = answer.headers().get(http::header::DATE);
        let date = date.and_then(|date| date.to_str().ok());
        let date = date.and_then(|date| rfc2822::parse(date).ok());
        if let Some(date) = date {
            let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            *known = Some((date.timestamp().as_second(), now()));
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
    /// Checks the sources, without contacting a server.
    ///
    /// # Errors
    ///
    /// The kubeconfig cannot be read, or there is neither a kubeconfig nor a service account.
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
        if access.candidates().await.is_empty() {
            return Err(Refusal::configuration(format!(
                "no credentials for the API server: set --kubeconfig, or run in a pod whose service account is mounted at {}",
                access.sources.service_account.display()
            )));
        }
        Ok(access)
    }

    /// Probes all candidates at once, for `doctor`. The results are in order of preference; an error is
    /// a clause.
    pub async fn try_all(&self) -> Vec<(Origin, Result<(), String>)> {
        let candidates = self
            .candidates()
            .await
            .into_iter()
            .map(async |(origin, config)| {
                let outcome = match config {
                    Ok(config) => probe(0, &origin, config, &self.clock).await.map(drop),
                    Err(reason) => Err(reason),
                };
                (origin, outcome)
            });
        join_all(candidates).await
    }

    /// The API server's time in Unix seconds; `None` before its first response.
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
        let mut candidates = self.candidates().await;
        candidates.sort_by_key(|(origin, _)| Some(origin) == avoid);

        let mut tried = Vec::new();
        for (origin, config) in candidates {
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

    /// All candidates in order of preference. Files are read again on each call, because kubeconfigs
    /// are replaced and service accounts appear.
    async fn candidates(&self) -> Vec<(Origin, Result<Config, String>)> {
        let sources = &self.sources;
        let account = self
            .service_account("https://service-account.invalid")
            .await;
        let mut candidates = Vec::new();
        let mut of_kubeconfig = None;

        if let Some(path) = &sources.kubeconfig {
            let config = from_kubeconfig(path, sources.master.as_deref()).await;
            of_kubeconfig = config.clone().ok();
            candidates.push((Origin::Kubeconfig(path.clone()), config));
        } else if let Some(url) = &sources.master {
            let config = match &account {
                // A plain HTTP port is `kubectl proxy`: it needs no token and must not receive one.
                _ if url.starts_with("http://") => Some(
                    url.parse()
                        .map(Config::new)
                        .map_err(|e| format!("{url:?} is not a URL: {e}")),
                ),
                Some(account) => Some(at(account, url)),
                None => None,
            };
            candidates.extend(config.map(|config| (Origin::Master(url.clone()), config)));
        }

        // A listener must present a certificate of the cluster's CA before it receives a token.
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
            candidates.push((Origin::Local(*addr), config));
        }

        if let (Some(account), Some(url)) = (&account, &sources.service) {
            candidates.push((Origin::Service(url.clone()), at(account, url)));
        }
        candidates
    }

    /// The service account's credentials. Both files are read again while the agent runs, because
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

/// The same credentials for another server.
fn at(config: &Config, url: &str) -> Result<Config, String> {
    let mut config = config.clone();
    config.cluster_url = url
        .parse()
        .map_err(|e| format!("{url:?} is not a URL: {e}"))?;
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
        // A proxy from the environment is for destinations outside the cluster.
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
    // The time a connection waits in the pool does not count as the server's silence.
    config.reset_reader_on_write = true;
    // The caller decides about retries, by the kind of request.
    config.default_retry = false;

    let host = config.cluster_url.host().unwrap_or_default().to_owned();
    let client = client(config, clock.clone()).map_err(|e| chain(&e))?;
    match tokio::time::timeout(PROBE, call::call(&client, call::get("/version"))).await {
        // 403 comes from a server that knows the agent and restricts even `/version`.
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

/// kube's client with two additions that kube has no setting for: TCP keepalive on its connections, and
/// the server's time.
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
