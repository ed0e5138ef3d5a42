//! The addresses of the API servers: the hosts that this host must reach without the tunnel.
//!
//! A balancer on this host or the `kubernetes` service hides the addresses that the plan needs, so the
//! agent reads the endpoints of that service. API servers may advertise private addresses that only
//! their own region can reach. A private address counts only if it answers a connection that carries
//! the tunnel's mark: kept out of the tunnel without need, that node would be unreachable from here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures::future::join_all;
use serde::Deserialize;
use tokio::net::TcpSocket;
use tokio::sync::watch;

use super::access::Connection;
use super::backoff::jitter;
use super::call::{self, Failure};
use crate::topology::is_public;

/// Selected by name, so that the agent's ClusterRole can be narrowed to that name.
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices?fieldSelector=metadata.name%3Dkubernetes";

/// Interval between checks. Servers change rarely, and a new connection triggers a check at once.
const PERIOD: Duration = Duration::from_secs(600);
/// The port for a slice without one.
const HTTPS: u16 = 443;
/// Interval after a failed check.
const RETRY: Duration = Duration::from_secs(60);

/// Enough for a server on another continent to answer.
const PROBE: Duration = Duration::from_secs(3);
/// Consecutive rounds in which an address that was reached directly may fail to answer: its host may be down
/// for a moment. After that it counts as reachable through the tunnel only.
const ROUNDS: u32 = 3;

/// The addresses that are reached directly, each with its number of consecutive rounds without an answer.
type Known = BTreeMap<IpAddr, u32>;

/// The addresses of the API servers.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Servers {
    /// Every address that this host reaches directly, or did in one of the last rounds.
    pub addresses: BTreeSet<IpAddr>,
    /// Why addresses may be missing: a clause for the operator.
    pub incomplete: Option<String>,
    /// Whether some of the addresses still wait for their first probe.
    pub probing: bool,
}

#[derive(Deserialize)]
struct Slices {
    #[serde(default)]
    items: Vec<Slice>,
}

#[derive(Deserialize)]
struct Slice {
    #[serde(default)]
    endpoints: Option<Vec<Endpoint>>,
    #[serde(default)]
    ports: Option<Vec<Port>>,
}

#[derive(Deserialize)]
struct Endpoint {
    #[serde(default)]
    addresses: Vec<String>,
}

#[derive(Deserialize)]
struct Port {
    #[serde(default)]
    port: Option<u16>,
}

/// Keeps the addresses up to date until the receiver is dropped. The first result is sent even if it
/// is unchanged, so that the receiver can wait for it.
///
/// Without the tunnel's `mark` every address counts as reached directly.
pub(super) async fn run(
    mark: Option<u32>,
    mut connections: watch::Receiver<Option<Connection>>,
    servers: watch::Sender<Servers>,
) {
    let addresses = servers.borrow().addresses.clone();
    let mut known = addresses.into_iter().map(|ip| (ip, 0)).collect::<Known>();
    let mut first = true;
    loop {
        let Some(connection) = connections.borrow_and_update().clone() else {
            if connections.changed().await.is_err() {
                return;
            }
            continue;
        };
        let named = resolve_host(&connection.host).await;
        let endpoints = endpoints(&connection).await;
        if let (true, Ok(endpoints)) = (first, &endpoints) {
            // Until the probes end, no address goes through the tunnel: for a moment, reaching the
            // API server matters more than reaching a node.
            let mut all = known.keys().copied().collect::<BTreeSet<_>>();
            all.extend(&named);
            all.extend(endpoints.iter().map(SocketAddr::ip));
            let now = Servers {
                addresses: all,
                incomplete: None,
                probing: true,
            };
            show(&servers, now, first);
            first = false;
        }
        let incomplete = match endpoints {
            Ok(endpoints) => {
                known = direct(probe(endpoints, mark).await, &known);
                None
            }
            Err(failure) => Some(explain(&failure)),
        };
        known.extend(named.into_iter().map(|ip| (ip, 0)));
        let doubtful = known.values().any(|misses| *misses > 0);
        let pause = if incomplete.is_some() || doubtful {
            RETRY
        } else {
            PERIOD
        };
        let now = Servers {
            addresses: known.keys().copied().collect(),
            incomplete,
            probing: false,
        };
        show(&servers, now, first);
        first = false;
        tokio::select! {
            () = tokio::time::sleep(jitter(pause)) => {}
            changed = connections.changed() => if changed.is_err() { return },
            () = servers.closed() => return,
        }
    }
}

fn show(servers: &watch::Sender<Servers>, now: Servers, first: bool) {
    servers.send_if_modified(|servers| {
        let changed = *servers != now;
        if changed && let Some(reason) = &now.incomplete {
            tracing::info!(error = %reason, "addresses of API servers incomplete");
        }
        *servers = now;
        changed || first
    });
}

/// The addresses of a URL's host, without loopback addresses.
async fn resolve_host(host: &str) -> BTreeSet<IpAddr> {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let ips: BTreeSet<IpAddr> = match host.parse() {
        Ok(ip) => BTreeSet::from([ip]),
        Err(_) => match tokio::net::lookup_host((host, 0)).await {
            Ok(addrs) => addrs.map(|addr| addr.ip()).collect(),
            Err(_) => BTreeSet::new(),
        },
    };
    ips.into_iter().filter(|ip| !ip.is_loopback()).collect()
}

/// Probes which addresses this host reaches without the tunnel; public ones count without a probe.
async fn probe(endpoints: BTreeSet<SocketAddr>, mark: Option<u32>) -> Vec<(IpAddr, bool)> {
    let probes = endpoints.into_iter().map(|address| async move {
        let answered = match mark {
            Some(mark) if !is_public(address.ip()) => answers(address, mark).await,
            Some(_) | None => true,
        };
        (address.ip(), answered)
    });
    join_all(probes).await
}

/// The probed addresses that count as reached directly, given the results of earlier rounds.
fn direct(probed: Vec<(IpAddr, bool)>, before: &Known) -> Known {
    let judge = |(ip, answered): (IpAddr, bool)| {
        if answered {
            return Some((ip, 0));
        }
        let misses = before.get(&ip)?.saturating_add(1);
        (misses < ROUNDS).then_some((ip, misses))
    };
    probed.into_iter().filter_map(judge).collect()
}

/// Whether an address answers without the tunnel; a refused connection counts as an answer.
async fn answers(address: SocketAddr, mark: u32) -> bool {
    let connect = async {
        let socket = if address.is_ipv4() {
            TcpSocket::new_v4()?
        } else {
            TcpSocket::new_v6()?
        };
        socket2::SockRef::from(&socket).set_mark(mark)?;
        socket.connect(address).await
    };
    match tokio::time::timeout(PROBE, connect).await {
        Ok(Ok(_)) => true,
        Ok(Err(error)) => error.kind() == std::io::ErrorKind::ConnectionRefused,
        Err(_) => false,
    }
}

async fn endpoints(connection: &Connection) -> Result<BTreeSet<SocketAddr>, Failure> {
    let body = call::call(&connection.client, call::get(SLICES)).await?;
    let slices: Slices = serde_json::from_slice(&body)
        .map_err(|error| Failure::Unreadable(crate::text::message(&error.to_string())))?;
    let addresses = slices.items.iter().flat_map(|slice| {
        let ports = slice.ports.iter().flatten();
        let port = ports.filter_map(|port| port.port).next().unwrap_or(HTTPS);
        let endpoints = slice.endpoints.iter().flatten();
        let addresses = endpoints.flat_map(|endpoint| &endpoint.addresses);
        let addresses = addresses.filter_map(|text| text.parse().ok());
        addresses.map(move |ip| SocketAddr::new(ip, port))
    });
    Ok(addresses.collect())
}

fn explain(failure: &Failure) -> String {
    if let Failure::Forbidden(_) = failure {
        "the agent may not list EndpointSlices in the namespace default: check its ClusterRole"
            .to_owned()
    } else {
        format!("the endpoints of the kubernetes service cannot be read: {failure}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[tokio::test]
    async fn public_addresses_count_without_a_probe() {
        let endpoint = "203.0.113.10:6443".parse().unwrap();
        let probed = probe([endpoint].into(), Some(1)).await;
        assert_eq!(probed, [(endpoint.ip(), true)]);
    }

    #[tokio::test]
    async fn without_a_mark_every_address_counts() {
        let endpoint = "172.16.0.10:6443".parse().unwrap();
        let probed = probe([endpoint].into(), None).await;
        assert_eq!(probed, [(endpoint.ip(), true)]);
    }

    #[test]
    fn an_address_that_never_answered_is_not_reached_directly() {
        let known = direct(vec![(ip("172.16.0.10"), false)], &Known::new());
        assert_eq!(known, Known::new());
    }

    #[test]
    fn one_that_answered_before_may_miss_two_rounds_and_not_three() {
        let server = ip("172.16.0.10");
        let mut known = Known::from([(server, 0)]);
        for round in [1, 2] {
            known = direct(vec![(server, false)], &known);
            assert_eq!(known, Known::from([(server, round)]));
        }
        assert_eq!(direct(vec![(server, true)], &known)[&server], 0);
        assert_eq!(direct(vec![(server, false)], &known), Known::new());
    }
}
