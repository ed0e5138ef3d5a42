//! The addresses of the API servers: what this host must reach without the tunnel.
//!
//! A balancer on this host or the `kubernetes` service hides them, but where they are is what the
//! plan needs; the endpoints of that service tell.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::watch;

use super::access::Connection;
use super::call::{self, Failure};
use super::pace::jitter;

/// Asked for by name, so that the agent's role can be narrowed to that name.
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices?fieldSelector=metadata.name%3Dkubernetes";

/// Servers come and go rarely, and a new connection asks at once.
const PERIOD: Duration = Duration::from_secs(600);
/// After a failure.
const RETRY: Duration = Duration::from_secs(60);

/// Where the API servers are.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Servers {
    /// Every address that is known, also from before: an address too many costs nothing.
    pub addresses: BTreeSet<IpAddr>,
    /// Why there may be more: a clause for the operator.
    pub incomplete: Option<String>,
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
}

#[derive(Deserialize)]
struct Endpoint {
    #[serde(default)]
    addresses: Vec<String>,
}

/// Keeps the addresses up to date until nobody wants them any more.
pub(super) async fn run(
    mut connections: watch::Receiver<Option<Connection>>,
    servers: watch::Sender<Servers>,
) {
    loop {
        let Some(connection) = connections.borrow_and_update().clone() else {
            if connections.changed().await.is_err() {
                return;
            }
            continue;
        };
        let named = named(&connection.host).await;
        let (endpoints, incomplete) = match endpoints(&connection).await {
            Ok(endpoints) => (endpoints, None),
            Err(failure) => (BTreeSet::new(), Some(explain(&failure))),
        };
        let pause = if incomplete.is_some() { RETRY } else { PERIOD };
        servers.send_if_modified(|servers| {
            let mut addresses = match incomplete {
                None => endpoints,
                Some(_) => servers.addresses.clone(),
            };
            addresses.extend(named);
            let now = Servers {
                addresses,
                incomplete,
            };
            let changed = *servers != now;
            if changed && let Some(reason) = &now.incomplete {
                tracing::info!(%reason, "not every address of the API servers may be known");
            }
            *servers = now;
            changed
        });
        tokio::select! {
            () = tokio::time::sleep(jitter(pause)) => {}
            changed = connections.changed() => if changed.is_err() { return },
            () = servers.closed() => return,
        }
    }
}

/// The addresses behind the host of a URL that are not this host.
async fn named(host: &str) -> BTreeSet<IpAddr> {
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

async fn endpoints(connection: &Connection) -> Result<BTreeSet<IpAddr>, Failure> {
    let body = call::call(&connection.client, call::get(SLICES)).await?;
    let slices: Slices = serde_json::from_slice(&body)
        .map_err(|error| Failure::Unreadable(super::quote(&error.to_string())))?;
    let endpoints = slices
        .items
        .iter()
        .flat_map(|slice| slice.endpoints.iter().flatten());
    Ok(endpoints
        .flat_map(|endpoint| &endpoint.addresses)
        .filter_map(|text| text.parse().ok())
        .collect())
}

fn explain(failure: &Failure) -> String {
    if let Failure::Forbidden(_) = failure {
        "the agent may not list EndpointSlices in the namespace default: check its ClusterRole"
            .to_owned()
    } else {
        format!("the endpoints of the kubernetes service cannot be read: {failure}")
    }
}
