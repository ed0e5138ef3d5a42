//! Metrics: Kilo's names, for its dashboards, and Selvedge's own.
//!
//! Gauges are read from the agent's latest [`Report`] at each scrape. Only counters are kept here.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::status::{LeaderPath, Report, Role};
use crate::text;

/// The errors that the agent counts, by Kilo's labels.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Event {
    /// Changes to the kernel or the tunnel failed.
    Apply,
    /// A removal failed.
    CleanUp,
}

impl Event {
    const fn label(self) -> &'static str {
        match self {
            Self::Apply => "apply",
            Self::CleanUp => "cleanUp",
        }
    }
}

/// The registry and the agent's own counters.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    errors: Family<[(&'static str, &'static str); 1], Counter>,
    reconciles: Counter,
    results: Family<[(&'static str, &'static str); 1], Counter>,
    seconds: Histogram,
    changes: Counter,
    report: Arc<Mutex<Arc<Report>>>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// An empty set.
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let errors = Family::default();
        let reconciles = Counter::default();
        let results = Family::default();
        // From a pass without changes to one that writes thousands of routes.
        let seconds = Histogram::new([0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0]);
        let changes = Counter::default();
        let report = Arc::<Mutex<Arc<Report>>>::default();

        registry.register(
            "kilo_errors",
            "Errors while administering the mesh",
            errors.clone(),
        );
        registry.register("kilo_reconciles", "Reconcile passes", reconciles.clone());
        registry.register(
            "selvedge_reconcile",
            "Reconcile passes by result",
            results.clone(),
        );
        registry.register(
            "selvedge_reconcile_seconds",
            "Duration of a reconcile pass",
            seconds.clone(),
        );
        registry.register(
            "selvedge_changes",
            "Changes applied to the kernel and the tunnel",
            changes.clone(),
        );
        registry.register_collector(Box::new(Latest(Arc::clone(&report))));
        Self {
            registry,
            errors,
            reconciles,
            results,
            seconds,
            changes,
            report,
        }
    }

    /// Counts an error.
    pub fn error(&self, event: Event) {
        self.errors.get_or_create(&[("event", event.label())]).inc();
    }

    /// Counts a reconcile pass, with its duration, its number of changes, and whether all succeeded.
    pub fn reconciled(&self, took: Duration, changes: usize, succeeded: bool) {
        let result = if succeeded { "success" } else { "error" };
        self.reconciles.inc();
        self.results.get_or_create(&[("result", result)]).inc();
        self.seconds.observe(took.as_secs_f64());
        self.changes.inc_by(changes.try_into().unwrap_or(u64::MAX));
    }

    /// All metrics in the text form Prometheus reads, with what this report says.
    pub fn render(&self, report: Report) -> String {
        *self.report.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(report);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)
            .expect("a String takes all that is written to it");
        text
    }
}

/// Reads the latest report.
#[derive(Debug)]
struct Latest(Arc<Mutex<Arc<Report>>>);

impl Collector for Latest {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let report = Arc::clone(&self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let mut gauge = |name, help, value: i64| {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
        };
        let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        gauge(
            "kilo_leader",
            "Whether this node leads its segment",
            (report.role == Role::Leader).into(),
        )?;
        gauge("kilo_nodes", "Nodes in the mesh", count(report.ready_nodes))?;
        gauge(
            "kilo_peers",
            "External peers in the mesh",
            count(report.external_peers),
        )?;
        gauge(
            "selvedge_kilo_nodes",
            "Nodes that run a real kg; while there are any, Kilo's algorithm is in force",
            count(report.kilo_nodes.len()),
        )?;
        gauge(
            "selvedge_kilo_refused_nodes",
            "Nodes that seem to run a real kg while --beside-kilo is off",
            count(report.kilo_refused.len()),
        )?;
        gauge(
            "selvedge_ready",
            "Whether this node is in the desired state",
            report.ready.into(),
        )?;
        gauge(
            "selvedge_fail_open",
            "Whether traffic to a region whose tunnel is down leaves in clear",
            report.fail_open.into(),
        )?;
        gauge(
            "selvedge_other_listen_port",
            "Whether the tunnel listens on another UDP port than --port, where a peer behind NAT never answered",
            report.tunnel.port_reason.is_some().into(),
        )?;
        gauge(
            "selvedge_key_age_seconds",
            "Time since this node's WireGuard key was put in place",
            i64::try_from(report.tunnel.key_age.unwrap_or(0)).unwrap_or(i64::MAX),
        )?;
        gauge(
            "selvedge_key_announced",
            "Whether another key is announced that is to replace this node's",
            report.tunnel.next_key.is_some().into(),
        )?;
        gauge(
            "selvedge_key_overlapping",
            "Whether a key that this node replaced is still accepted",
            report.tunnel.previous_key.is_some().into(),
        )?;
        gauge(
            "selvedge_desired_routes",
            "Routes in the agent's own tables",
            count(report.routes),
        )?;
        gauge(
            "selvedge_invalid_objects",
            "Nodes, peers and fields that are left out of the mesh",
            count(report.excluded.len()),
        )?;
        gauge(
            "selvedge_aliases",
            "Aliases by which other regions reach nodes whose addresses overlap",
            count(report.aliases.len()),
        )?;
        gauge(
            "selvedge_api_cached",
            "Whether the agent works from its cache",
            report.api.cached.into(),
        )?;
        gauge(
            "selvedge_missing_policies",
            "Admission policies that are not in force, on the one node whose agent checks them",
            count(report.api.missing_policies.len()),
        )?;

        let names = report.peers.iter().map(|peer| text::line(&peer.name));
        let named = names.zip(&report.peers).collect::<Vec<_>>();
        let peers = |value: fn(&crate::status::Peer) -> u64| {
            named.iter().map(move |(name, peer)| {
                (
                    [
                        ("peer", name.as_ref()),
                        ("public_key", peer.public_key.as_str()),
                    ],
                    value(peer),
                )
            })
        };
        counters(
            encoder.encode_descriptor(
                "selvedge_peer_received_bytes",
                "Bytes received from a peer",
                None,
                MetricType::Counter,
            )?,
            peers(|peer| peer.received),
        )?;
        counters(
            encoder.encode_descriptor(
                "selvedge_peer_sent_bytes",
                "Bytes sent to a peer",
                None,
                MetricType::Counter,
            )?,
            peers(|peer| peer.sent),
        )?;
        let mut ages = encoder.encode_descriptor(
            "selvedge_peer_handshake_age_seconds",
            "Time since the last handshake with a peer",
            None,
            MetricType::Gauge,
        )?;
        for (name, peer) in &named {
            if let Some(age) = peer.handshake_age {
                let labels = [
                    ("peer", name.as_ref()),
                    ("public_key", peer.public_key.as_str()),
                ];
                let age = ConstGauge::new(i64::try_from(age).unwrap_or(i64::MAX));
                age.encode(ages.encode_family(&labels)?)?;
            }
        }
        paths(&mut encoder, &report.paths)?;
        counters(
            encoder.encode_descriptor(
                "selvedge_failovers",
                "How often traffic left a path for another one, by cause",
                None,
                MetricType::Counter,
            )?,
            report
                .failovers
                .iter()
                .map(|(cause, count)| ([("cause", cause.as_str())], *count)),
        )?;
        let counter = ConstCounter::new(report.echo_failures);
        counter.encode(encoder.encode_descriptor(
            "selvedge_echo_socket_failures",
            "Failures of the socket that sends echoes",
            None,
            MetricType::Counter,
        )?)?;
        counters(
            encoder.encode_descriptor(
                "selvedge_packets_dropped",
                "Packets that the tunnel dropped, by reason",
                None,
                MetricType::Counter,
            )?,
            report
                .drops
                .iter()
                .map(|(reason, count)| ([("reason", reason.as_str())], *count)),
        )?;
        if let Some(drops) = report.leak_drops {
            let counter = ConstCounter::new(drops);
            counter.encode(encoder.encode_descriptor(
                "selvedge_leak_drops",
                "VXLAN packets to other regions that the firewall dropped",
                None,
                MetricType::Counter,
            )?)?;
        }
        if let Some(drops) = report.stranger_drops {
            let counter = ConstCounter::new(drops);
            counter.encode(encoder.encode_descriptor(
                "selvedge_stranger_drops",
                "Packets from outside to the mesh, or from the tunnel to other destinations, that the firewall dropped",
                None,
                MetricType::Counter,
            )?)?;
        }
        if let Some(drops) = report.transit_drops {
            let counter = ConstCounter::new(drops);
            counter.encode(encoder.encode_descriptor(
                "selvedge_transit_drops",
                "Packets out of the tunnel that would have gone into it again, and that the firewall dropped",
                None,
                MetricType::Counter,
            )?)?;
        }
        let connected = i64::try_from(report.connected.len()).unwrap_or(i64::MAX);
        ConstGauge::new(connected).encode(encoder.encode_descriptor(
            "selvedge_left_to_connected_networks",
            "Addresses of the mesh that this node does not carry, because it is connected to their network",
            None,
            MetricType::Gauge,
        )?)?;
        let counter = ConstCounter::new(report.cache_failures);
        counter.encode(encoder.encode_descriptor(
            "selvedge_cache_write_failures",
            "Failed writes of the cluster's state to disk",
            None,
            MetricType::Counter,
        )?)?;
        let info = [("version", report.version.as_str())];
        let mut build = encoder.encode_descriptor(
            "selvedge_build_info",
            "The agent's version",
            None,
            MetricType::Gauge,
        )?;
        ConstGauge::new(1_i64).encode(build.encode_family(&info)?)
    }
}

/// The paths over which echoes are sent.
fn paths(encoder: &mut DescriptorEncoder<'_>, paths: &[LeaderPath]) -> fmt::Result {
    let regions = paths.iter().map(|path| text::line(&path.region));
    let named = regions.zip(paths).collect::<Vec<_>>();
    let mut family = |name, help, value: fn(&LeaderPath) -> Option<f64>| {
        let mut gauges = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (region, path) in &named {
            let labels = [
                ("kind", path.kind.as_str()),
                ("name", path.name.as_str()),
                ("region", region.as_ref()),
            ];
            if let Some(value) = value(path) {
                ConstGauge::new(value).encode(gauges.encode_family(&labels)?)?;
            }
        }
        Ok(())
    };
    family(
        "selvedge_path_up",
        "Whether echoes through or to a leader come back: 1, or 0 if it is down; none while unknown",
        |path| match path.state.as_str() {
            "up" | "draining" => Some(1.0),
            "down" | "returning" => Some(0.0),
            _ => None,
        },
    )?;
    family(
        "selvedge_path_rtt_seconds",
        "Smoothed round-trip time of the echoes over a path",
        |path| {
            let micros = u32::try_from(path.rtt_us?).unwrap_or(u32::MAX);
            Some(f64::from(micros) / 1e6)
        },
    )?;
    family(
        "selvedge_path_loss_ratio",
        "Share of the last 100 echoes over a path that stayed unanswered",
        |path| Some(f64::from(path.loss_permille?) / 1e3),
    )?;
    family(
        "selvedge_path_mtu_bytes",
        "Size of the largest packet inside the tunnel that a path to another region carries",
        |path| Some(f64::from(path.mtu?)),
    )?;
    family(
        "selvedge_path_relayed",
        "Whether the tunnel's datagrams to a leader of another region go through a relay: 1, or 0 for a direct path",
        |path| (path.kind == "peer").then(|| f64::from(u8::from(path.via.is_some()))),
    )?;
    let mut relays = encoder.encode_descriptor(
        "selvedge_relay_info",
        "The leader that relays to a leader of another region, and its region",
        None,
        MetricType::Gauge,
    )?;
    for (region, path) in &named {
        let Some(via) = &path.via else { continue };
        let via_region = text::line(&via.region);
        let labels = [
            ("name", path.name.as_str()),
            ("region", region.as_ref()),
            ("via", via.leader.as_str()),
            ("via_region", via_region.as_ref()),
        ];
        ConstGauge::new(1_i64).encode(relays.encode_family(&labels)?)?;
    }
    Ok(())
}

fn counters<'a, const N: usize>(
    mut encoder: MetricEncoder<'_>,
    values: impl Iterator<Item = ([(&'static str, &'a str); N], u64)>,
) -> fmt::Result {
    for (labels, value) in values {
        ConstCounter::new(value).encode(encoder.encode_family(&labels)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{Peer, Via};

    #[test]
    fn kilos_five_metrics_exist() {
        let metrics = Metrics::new();
        for event in [Event::Apply, Event::CleanUp] {
            metrics.error(event);
        }
        metrics.reconciled(Duration::from_millis(3), 2, true);
        let report = Report {
            role: Role::Leader,
            ready_nodes: 4,
            external_peers: 2,
            kilo_nodes: vec!["a".into()],
            kilo_refused: vec!["b".into(), "c".into()],
            ..Report::default()
        };

        let text = metrics.render(report);

        for line in [
            "kilo_errors_total{event=\"apply\"} 1",
            "kilo_errors_total{event=\"cleanUp\"} 1",
            "# TYPE kilo_errors counter",
            "# TYPE kilo_reconciles counter",
            "# TYPE kilo_leader gauge",
            "# TYPE kilo_nodes gauge",
            "# TYPE kilo_peers gauge",
            "kilo_leader 1",
            "kilo_nodes 4",
            "kilo_peers 2",
            "selvedge_kilo_nodes 1",
            "selvedge_kilo_refused_nodes 2",
            "kilo_reconciles_total 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn peers_and_drops_have_their_own_lines() {
        let metrics = Metrics::new();
        let report = Report {
            version: "1.2.3".into(),
            peers: vec![Peer {
                name: "location:nd".into(),
                public_key: "K=".into(),
                handshake_age: Some(9),
                received: 10,
                sent: 20,
                ..Peer::default()
            }],
            drops: [("source".to_owned(), 3)].into(),
            leak_drops: Some(4),
            transit_drops: Some(8),
            connected: vec!["10.9.9.9".to_owned()],
            cache_failures: 5,
            paths: vec![
                LeaderPath {
                    kind: "leader".into(),
                    name: "a2".into(),
                    region: "location:a".into(),
                    state: "up".into(),
                    rtt_us: Some(1_250),
                    loss_permille: Some(20),
                    ..LeaderPath::default()
                },
                LeaderPath {
                    kind: "peer".into(),
                    name: "b1".into(),
                    region: "location:b".into(),
                    state: "down".into(),
                    via: Some(Via {
                        leader: "c1".into(),
                        region: "location:c".into(),
                        since: 4,
                    }),
                    ..LeaderPath::default()
                },
                LeaderPath {
                    name: "b2".into(),
                    state: "unknown".into(),
                    ..LeaderPath::default()
                },
            ],
            echo_failures: 6,
            failovers: [("silent".to_owned(), 7)].into(),
            ..Report::default()
        };

        let text = metrics.render(report);

        for line in [
            "selvedge_peer_received_bytes_total{peer=\"location:nd\",public_key=\"K=\"} 10",
            "selvedge_peer_sent_bytes_total{peer=\"location:nd\",public_key=\"K=\"} 20",
            "selvedge_peer_handshake_age_seconds{peer=\"location:nd\",public_key=\"K=\"} 9",
            "selvedge_packets_dropped_total{reason=\"source\"} 3",
            "selvedge_leak_drops_total 4",
            "selvedge_left_to_connected_networks 1",
            "selvedge_cache_write_failures_total 5",
            "selvedge_path_up{kind=\"leader\",name=\"a2\",region=\"location:a\"} 1.0",
            "selvedge_path_up{kind=\"peer\",name=\"b1\",region=\"location:b\"} 0.0",
            "selvedge_path_rtt_seconds{kind=\"leader\",name=\"a2\",region=\"location:a\"} 0.00125",
            "selvedge_path_loss_ratio{kind=\"leader\",name=\"a2\",region=\"location:a\"} 0.02",
            "selvedge_path_relayed{kind=\"peer\",name=\"b1\",region=\"location:b\"} 1.0",
            "selvedge_relay_info{name=\"b1\",region=\"location:b\",via=\"c1\",via_region=\"location:c\"} 1",
            "selvedge_transit_drops_total 8",
            "selvedge_failovers_total{cause=\"silent\"} 7",
            "selvedge_echo_socket_failures_total 6",
            "selvedge_build_info{version=\"1.2.3\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
