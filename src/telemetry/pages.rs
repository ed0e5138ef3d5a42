//! The pages on `--listen`: probes, metrics and the picture of the mesh.
//!
//! No TLS and no passwords, so the default address is the node's own; nothing here changes anything.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::metrics::Metrics;
use super::visitors::Visitors;
use crate::config::Listen;
use crate::refusal::Refusal;
use crate::status::Report;
use crate::topology::Topology;

/// How long a probe waits before it calls the event loop stuck: several resync periods.
const STUCK: Duration = Duration::from_secs(300);

/// What the pages show.
#[derive(Clone, Debug)]
pub struct Pages {
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// The agent's latest report.
    pub report: watch::Receiver<Arc<Report>>,
    /// The mesh, as the agent last saw it.
    pub topology: watch::Receiver<Arc<Topology>>,
    /// When the event loop last came round.
    pub alive: watch::Receiver<tokio::time::Instant>,
}

/// Binds the first of the addresses that can be.
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
            "cannot serve pages on {address}: {error}: stop what has it (Kilo's kg has port 1107, and never run both on a node), or choose another --listen address, or an empty one"
        ))),
    }
}

/// Serves the pages for as long as the process runs.
pub async fn serve(listener: TcpListener, pages: Pages) {
    let router = Router::new()
        .route("/", get(index))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .route("/graph", get(graph))
        .with_state(pages);
    if let Err(error) = axum::serve(Visitors::new(listener), router).await {
        tracing::warn!(%error, "pages");
    }
}

async fn index() -> Html<&'static str> {
    Html(
        "<!DOCTYPE html><title>Selvedge</title><h1>Selvedge</h1><ul>\
         <li><a href=\"/health\">/health</a>: whether the agent is alive\
         <li><a href=\"/ready\">/ready</a>: whether this node is as it should be\
         <li><a href=\"/metrics\">/metrics</a>: for Prometheus\
         <li><a href=\"/status\">/status</a>: what the agent sees and does, as JSON\
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

async fn ready(State(pages): State<Pages>) -> Response {
    let report = Arc::clone(&pages.report.borrow());
    if report.ready {
        StatusCode::OK.into_response()
    } else {
        let problems = report.problems.join("\n") + "\n";
        (StatusCode::SERVICE_UNAVAILABLE, problems).into_response()
    }
}

async fn metrics(State(pages): State<Pages>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], pages.metrics.render()).into_response()
}

async fn status(State(pages): State<Pages>) -> Response {
    let report = Arc::clone(&pages.report.borrow());
    let json = serde_json::to_string_pretty(&*report).expect("a report is plain data");
    ([(header::CONTENT_TYPE, "application/json")], json + "\n").into_response()
}

/// The query of `/graph`, as Kilo has it.
#[derive(Debug, Deserialize)]
struct Picture {
    format: Option<String>,
    layout: Option<String>,
}

async fn graph(State(pages): State<Pages>, Query(picture): Query<Picture>) -> Response {
    let topology = Arc::clone(&pages.topology.borrow());
    // Beside the event loop: a full mesh of a thousand nodes is half a million lines.
    let page = tokio::task::spawn_blocking(move || {
        let Picture { format, layout } = picture;
        crate::graph::page(&topology, format.as_deref(), layout.as_deref())
    });
    match page.await.expect("a panic ends the process") {
        Ok(page) => ([(header::CONTENT_TYPE, page.content_type)], page.body).into_response(),
        // Kilo's status for whatever is wrong.
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    use super::*;

    async fn fetch(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn probes_see_the_agents_state() {
        let (report, seen) = watch::channel(Arc::new(Report {
            problems: vec!["waiting for flannel".into()],
            ..Report::default()
        }));
        let (_alive, alive) = watch::channel(tokio::time::Instant::now());
        let (_topology, topology) = watch::channel(Arc::default());
        let pages = Pages {
            metrics: Arc::new(Metrics::new()),
            report: seen,
            topology,
            alive,
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, pages));

        assert!(fetch(address, "/health").await.starts_with("HTTP/1.1 200"));
        let answer = fetch(address, "/ready").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("waiting for flannel"));
        report.send_replace(Arc::new(Report {
            ready: true,
            ..Report::default()
        }));
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
        use crate::topology::{Member, NodeName, Segment, SegmentName};

        let name = SegmentName::Node(NodeName("a1".into()));
        Topology {
            segments: vec![Segment {
                group: name.clone(),
                name,
                leader: NodeName("a1".into()),
                public_key: crate::wireguard::key::PublicKey([1; 32]),
                endpoint: None,
                address: None,
                discovered: None,
                behind_nat: false,
                persistent_keepalive: 0,
                wireguard_ips: vec![],
                nodes: vec![Member {
                    name: NodeName("a1".into()),
                    endpoint: None,
                    pod_cidrs: vec![],
                    addresses: vec![],
                    underlay: [].into(),
                    flannel_ips: [].into(),
                    private_ip: None,
                }],
                allowed_location_ips: vec![],
            }],
            ..Topology::default()
        }
    }

    /// What is asked for, the status, the type of what comes (empty for any), and how it begins.
    type Row<'a> = (&'a str, u16, &'a str, &'a str);

    #[tokio::test]
    async fn kilos_pages_answer_as_kilos_do() {
        let (_report, report) = watch::channel(Arc::default());
        let (_alive, alive) = watch::channel(tokio::time::Instant::now());
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
            let (head, told) = answer.split_once("\r\n\r\n").unwrap();
            assert!(
                head.starts_with(&format!("HTTP/1.1 {status} ")),
                "{path}: {answer}"
            );
            assert!(head.contains(kind), "{path}: {head}");
            assert!(told.starts_with(body), "{path}: {told}");
        };

        let nobody = "did not find any valid Kilo nodes in the cluster";
        check(("/graph", 500, "", nobody)).await;
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
        // Kilo has graphviz make these.
        for format in ["png", "bmp", "fig", "gif", "json", "ps"] {
            let path = format!("/graph?format={format}");
            check((&path, 500, "", "unsupported format")).await;
        }
        let index = fetch(address, "/").await;
        for page in ["/health", "/metrics", "/graph"] {
            assert!(index.contains(page), "{index}");
        }
        // Whoever reaches the page could read keys out of the memory.
        for page in ["", "heap", "profile", "goroutine", "cmdline"] {
            check((&format!("/debug/pprof/{page}"), 404, "", "")).await;
        }
        server.abort();
    }

    #[tokio::test]
    async fn who_connects_and_says_nothing_keeps_nobody_out() {
        let (_report, report) = watch::channel(Arc::default());
        let (_alive, alive) = watch::channel(tokio::time::Instant::now());
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

        // The first ones were sent away, so they cost no descriptor any more.
        let mut byte = [0];
        let end = tokio::time::timeout(Duration::from_secs(5), idle[0].read(&mut byte)).await;
        assert!(matches!(end, Ok(Ok(0) | Err(_))), "{end:?}");
        server.abort();
    }

    #[tokio::test]
    async fn an_address_in_use_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        let error = bind(Listen::Address(address)).await.unwrap_err();
        assert!(error.sentence.contains(&address.to_string()), "{error}");
    }
}
