//! The HTTP pages on `--listen`: probes, metrics and the graph of the mesh.
//!
//! The pages are read-only. They have no TLS and no passwords, so the default address is a loopback one. On
//! a loopback address a request must name a local host. Otherwise a web page whose name resolves to
//! 127.0.0.1 (DNS rebinding) could read the mesh through a browser on the node.

mod connection_limit;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::sync::watch;

use self::connection_limit::ConnectionLimit;
use crate::config::Listen;
use crate::refusal::Refusal;
use crate::status::{Report, ReportSource};
use crate::telemetry::metrics::Metrics;
use crate::text;
use crate::topology::Topology;

/// The event loop counts as stuck after this long without a turn: several resync periods.
const STUCK: Duration = Duration::from_secs(300);

/// How long the event loop may take to answer; it never waits for anything.
const ANSWER: Duration = Duration::from_secs(5);

/// The data of the pages.
#[derive(Clone, Debug)]
pub struct Pages {
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// Where the agent's report comes from.
    pub report: ReportSource,
    /// The agent's latest topology.
    pub topology: watch::Receiver<Arc<Topology>>,
    /// The time of the event loop's last turn.
    pub alive: watch::Receiver<Instant>,
}

/// Binds the first address that is free.
pub async fn bind(listen: Listen) -> Result<Option<TcpListener>, Refusal> {
    let mut failure: Option<(SocketAddr, io::Error)> = None;
    for address in listen.addresses() {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(Some(listener)),
            Err(error) => failure = Some((address, error)),
        }
    }
    match failure {
        None => Ok(None),
        Some((address, error)) => Err(Refusal::configuration(format!(
            "cannot serve pages on {address}: {error}: stop the program that uses it (Kilo's kg uses port 1107; never run both on a node), or choose another --listen address, or an empty one"
        ))),
    }
}

/// Serves the pages for as long as the process runs.
pub async fn serve(listener: TcpListener, pages: Pages) {
    let local = listener.local_addr();
    let local_only = local.is_ok_and(|address| address.ip().to_canonical().is_loopback());
    let mut router = Router::new()
        .route("/", get(index))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .route("/graph", get(graph))
        .with_state(pages);
    if local_only {
        router = router.layer(middleware::from_fn(refuse_foreign_hosts));
    }
    if let Err(error) = axum::serve(ConnectionLimit::new(listener), router).await {
        tracing::warn!(%error, "serving pages failed");
    }
}

/// Answers only requests for a local host. A request without a host is not from a browser.
async fn refuse_foreign_hosts(request: Request, next: Next) -> Response {
    let named = request.uri().host().map(str::as_bytes);
    let headers = request.headers().get_all(header::HOST);
    let mut hosts = named
        .into_iter()
        .chain(headers.into_iter().map(HeaderValue::as_bytes));
    if hosts.all(is_local_host) {
        return next.run(request).await;
    }
    let what = "these pages answer only for localhost and loopback addresses: use one of them, or give the agent a wider --listen\n";
    (StatusCode::MISDIRECTED_REQUEST, what).into_response()
}

/// Whether `Host` (RFC 9110, section 7.2) is `localhost` or a loopback address, with or without a port.
fn is_local_host(host: &[u8]) -> bool {
    let Ok(host) = std::str::from_utf8(host) else {
        return false;
    };
    let host = match host.rsplit_once(':') {
        Some((name, port)) if !name.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => name,
        Some(_) | None => host,
    };
    let bracketed = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    match bracketed {
        Some(inside) => inside
            .parse::<Ipv6Addr>()
            .is_ok_and(|address| address.to_canonical().is_loopback()),
        None => {
            host.eq_ignore_ascii_case("localhost")
                || host
                    .parse::<Ipv4Addr>()
                    .is_ok_and(|address| address.is_loopback())
        }
    }
}

async fn index() -> Html<&'static str> {
    Html(
        "<!DOCTYPE html><title>Selvedge</title><h1>Selvedge</h1><ul>\
         <li><a href=\"/health\">/health</a>: whether the agent is alive\
         <li><a href=\"/ready\">/ready</a>: whether this node is in the desired state\
         <li><a href=\"/metrics\">/metrics</a>: for Prometheus\
         <li><a href=\"/status\">/status</a>: the state of the agent, as JSON\
         <li><a href=\"/graph\">/graph</a>: the mesh (?format=svg, dot or text)</ul>\n",
    )
}

async fn health(State(pages): State<Pages>) -> Response {
    if pages.alive.borrow().elapsed() < STUCK {
        StatusCode::OK.into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the event loop is stuck\n").into_response()
    }
}

/// The agent's report, or the answer for a client while there is none.
async fn report(pages: &Pages) -> Result<Report, Response> {
    let report = tokio::time::timeout(ANSWER, pages.report.report()).await;
    report.ok().flatten().ok_or_else(|| {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "the event loop does not answer\n",
        )
            .into_response()
    })
}

async fn ready(State(pages): State<Pages>) -> Response {
    let report = match report(&pages).await {
        Ok(report) => report,
        Err(stuck) => return stuck,
    };
    if report.ready {
        StatusCode::OK.into_response()
    } else {
        let problems = report.problems.join("\n") + "\n";
        let problems = text::lines(&problems).into_owned();
        (StatusCode::SERVICE_UNAVAILABLE, problems).into_response()
    }
}

async fn metrics(State(pages): State<Pages>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    match report(&pages).await {
        Ok(report) => {
            ([(header::CONTENT_TYPE, kind)], pages.metrics.render(report)).into_response()
        }
        Err(stuck) => stuck,
    }
}

async fn status(State(pages): State<Pages>) -> Response {
    let report = match report(&pages).await {
        Ok(report) => report,
        Err(stuck) => return stuck,
    };
    let json = serde_json::to_string_pretty(&report).expect("a report is plain data");
    let json = text::json(&json).into_owned() + "\n";
    ([(header::CONTENT_TYPE, "application/json")], json).into_response()
}

/// The query of `/graph`, with Kilo's parameters.
#[derive(Debug, Deserialize)]
struct Picture {
    format: Option<String>,
    layout: Option<String>,
}

async fn graph(State(pages): State<Pages>, Query(picture): Query<Picture>) -> Response {
    let topology = Arc::clone(&pages.topology.borrow());
    let relayed = match report(&pages).await {
        Ok(report) => crate::graph::relayed(&report),
        // The drawing needs no answer of the loop.
        Err(_) => Vec::new(),
    };
    // Not on the event loop: a full mesh of a thousand nodes gives half a million lines.
    let page = tokio::task::spawn_blocking(move || {
        let Picture { format, layout } = picture;
        let (format, layout) = (format.as_deref(), layout.as_deref());
        crate::graph::page(&topology, format, layout, &relayed)
    });
    match page.await.expect("a panic ends the process") {
        Ok(page) => ([(header::CONTENT_TYPE, page.content_type)], page.body).into_response(),
        // Kilo's status code for every error.
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    use super::*;

    async fn fetch(address: SocketAddr, path: &str) -> String {
        fetch_as(address, path, "Host: localhost\r\n").await
    }

    async fn fetch_as(address: SocketAddr, path: &str, hosts: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\n{hosts}Connection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    fn pages() -> Pages {
        Pages {
            metrics: Arc::new(Metrics::new()),
            report: ReportSource::fixed(Report::default()),
            topology: watch::channel(Arc::default()).1,
            alive: watch::channel(crate::clock::now()).1,
        }
    }

    #[tokio::test]
    async fn dns_rebinding_to_the_loopback_reads_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, pages()));
        for path in ["/health", "/ready", "/metrics", "/status", "/graph", "/"] {
            for host in [
                "evil.example",
                "evil.example:1107",
                "localhost.evil.example",
                "127.0.0.1.evil.example",
                "192.0.2.1:1107",
                "[2001:db8::1]:1107",
                "[::1].evil.example",
                "",
            ] {
                let answer = fetch_as(address, path, &format!("Host: {host}\r\n")).await;
                assert!(answer.starts_with("HTTP/1.1 421"), "{host}: {answer}");
                assert!(!answer.contains("kilo_"), "{answer}");
            }
        }
        let answer = fetch_as(address, "http://evil.example/health", "Host: localhost\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 421"), "{answer}");
        for host in [
            "localhost",
            "LOCALHOST:1107",
            "127.0.0.1",
            "127.0.0.1:1107",
            "127.1.2.3:1",
            "[::1]:1107",
            "[::ffff:127.0.0.1]",
        ] {
            let answer = fetch_as(address, "/health", &format!("Host: {host}\r\n")).await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{host}: {answer}");
        }
        server.abort();
    }

    #[tokio::test]
    async fn pages_on_a_wider_address_answer_any_host_name() {
        // The address of --listen=:1107.
        let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(serve(listener, pages()));
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let answer = fetch_as(address, "/health", "Host: node-1.example:1107\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        server.abort();
    }

    #[tokio::test]
    async fn probes_report_the_agents_state() {
        let (source, mut questions) = ReportSource::channel();
        let (report, seen) = watch::channel(Report {
            problems: vec!["waiting for flannel".into()],
            ..Report::default()
        });
        tokio::spawn(async move {
            while let Some(question) = questions.recv().await {
                let _ = question.send(seen.borrow().clone());
            }
        });
        let (_alive, alive) = watch::channel(crate::clock::now());
        let (_topology, topology) = watch::channel(Arc::default());
        let pages = Pages {
            metrics: Arc::new(Metrics::new()),
            report: source,
            topology,
            alive,
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, pages));

        assert!(fetch(address, "/health").await.starts_with("HTTP/1.1 200"));
        let answer = fetch(address, "/ready").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("waiting for flannel"));
        report.send_replace(Report {
            ready: true,
            ..Report::default()
        });
        assert!(fetch(address, "/ready").await.starts_with("HTTP/1.1 200"));
        assert!(fetch(address, "/metrics").await.contains("kilo_leader 0"));
        assert!(
            fetch(address, "/debug/pprof/")
                .await
                .starts_with("HTTP/1.1 404")
        );
        server.abort();
    }

    /// A mesh of one node.
    fn mesh() -> Topology {
        use crate::topology::{Leader, Member, NodeName, Segment, SegmentName};

        let name = SegmentName::Node(NodeName("a1".into()));
        Topology {
            segments: vec![Segment {
                group: name.clone(),
                name,
                leaders: vec![Leader {
                    node: NodeName("a1".into()),
                    keys: vec![crate::wireguard::key::PublicKey([1; 32])],
                    endpoint: None,
                    address: None,
                    discovered: None,
                    behind_nat: false,
                    candidates: vec![],
                    keepalive_forced: false,
                    persistent_keepalive: 0,
                    wireguard_ips: vec![],
                    probe_ip: None,
                }],
                nodes: vec![Member {
                    name: NodeName("a1".into()),
                    endpoint: None,
                    pod_cidrs: vec![],
                    addresses: vec![],
                    aliases: [].into(),
                    underlay: [].into(),
                    flannel_ips: [].into(),
                    private_ip: None,
                }],
                allowed_location_ips: vec![],
            }],
            ..Topology::default()
        }
    }

    /// The path, the expected status, content type (empty for any) and start of the body.
    type Row<'a> = (&'a str, u16, &'a str, &'a str);

    #[tokio::test]
    async fn kilos_pages_answer_as_kilos_do() {
        let report = ReportSource::fixed(Report::default());
        let (_alive, alive) = watch::channel(crate::clock::now());
        let (topology, seen) = watch::channel(Arc::default());
        let pages = Pages {
            metrics: Arc::new(Metrics::new()),
            report,
            topology: seen,
            alive,
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, pages));
        let check = async |(path, status, kind, body): Row<'_>| {
            let answer = fetch(address, path).await;
            let (head, content) = answer.split_once("\r\n\r\n").unwrap();
            assert!(
                head.starts_with(&format!("HTTP/1.1 {status} ")),
                "{path}: {answer}"
            );
            assert!(head.contains(kind), "{path}: {head}");
            assert!(content.starts_with(body), "{path}: {content}");
        };

        let no_nodes = "did not find any valid Kilo nodes in the cluster";
        check(("/graph", 500, "", no_nodes)).await;
        topology.send_replace(Arc::new(mesh()));
        let (svg, dot) = ("<svg ", "digraph kilo {\n");
        let (text, html) = ("text/plain", "text/html");
        let rows: [Row<'_>; 14] = [
            ("/", 200, html, "<!DOCTYPE html>"),
            ("/health", 200, "content-length: 0", ""),
            ("/metrics", 200, "", "# HELP "),
            ("/graph", 200, "image/svg+xml", svg),
            ("/graph?format=&layout=", 200, "image/svg+xml", svg),
            ("/graph?format=svg&layout=circo", 200, "image/svg+xml", svg),
            ("/graph?layout=dot", 200, "image/svg+xml", svg),
            ("/graph?layout=neato", 200, "image/svg+xml", svg),
            ("/graph?layout=twopi", 200, "image/svg+xml", svg),
            ("/graph?layout=fdp", 200, "image/svg+xml", svg),
            ("/graph?format=dot", 200, text, dot),
            ("/graph?format=gv", 200, text, dot),
            ("/graph?layout=round", 500, "", "unsupported layout"),
            ("/graph?format=doc", 500, "", "unsupported format"),
        ];
        for row in rows {
            check(row).await;
        }
        // Kilo makes these formats with graphviz.
        for format in ["png", "bmp", "fig", "gif", "json", "ps"] {
            let path = format!("/graph?format={format}");
            check((&path, 500, "", "unsupported format")).await;
        }
        let index = fetch(address, "/").await;
        for page in ["/health", "/metrics", "/graph"] {
            assert!(index.contains(page), "{index}");
        }
        // Profiling pages would expose keys in the process's memory.
        for page in ["", "heap", "profile", "goroutine", "cmdline"] {
            check((&format!("/debug/pprof/{page}"), 404, "", "")).await;
        }
        server.abort();
    }

    #[tokio::test]
    async fn idle_connections_do_not_block_others() {
        let report = ReportSource::fixed(Report::default());
        let (_alive, alive) = watch::channel(crate::clock::now());
        let (_topology, topology) = watch::channel(Arc::default());
        let pages = Pages {
            metrics: Arc::new(Metrics::new()),
            report,
            topology,
            alive,
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, pages));
        let mut idle = Vec::new();
        for _ in 0..100 {
            idle.push(TcpStream::connect(address).await.unwrap());
        }

        assert!(fetch(address, "/health").await.starts_with("HTTP/1.1 200"));

        // The oldest connections were closed, so their file descriptors are free.
        let mut byte = [0];
        let end = tokio::time::timeout(Duration::from_secs(5), idle[0].read(&mut byte)).await;
        assert!(matches!(end, Ok(Ok(0) | Err(_))), "{end:?}");
        server.abort();
    }

    #[tokio::test]
    async fn an_address_in_use_is_named_in_the_error() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        let error = bind(Listen::Address(address)).await.unwrap_err();
        assert!(error.sentence.contains(&address.to_string()), "{error}");
    }
}
