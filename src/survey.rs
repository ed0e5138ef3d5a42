//! Reads the cluster once, for the commands that people run on their own computers.
//!
//! Nodes and Peers are read with the user's kubeconfig, as `kubectl` does, and give the same topology as in
//! the agents. [`crate::cluster`] watches and writes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use futures::future::join_all;
use ipnet::IpNet;
use kube::api::ListParams;
use kube::{Api, Client};

use crate::clock;
use crate::cluster::node::{self, NodeObject, ParseSettings};
use crate::cluster::peer::{self, PeerObject};
use crate::cluster::{Rejected, annotation, kubeconfig};
use crate::config::{self, RegionCidrs, region_networks};
use crate::refusal::Refusal;
use crate::resolve;
use crate::topology::{Endpoint, Granularity, LeaderCount, Node, Settings, Snapshot, Topology};

/// Timeout for resolving the name of an endpoint.
const RESOLVE: Duration = Duration::from_secs(2);
/// Timeout of the API server.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Flags about the cluster and how to read it.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct Args {
    /// Kubeconfig for the API server [default: KUBECONFIG, else ~/.kube/config, else the
    /// pod's own service account]
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig [default: its current one]
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
    /// Which nodes have tunnels: location, full, cross, or auto: the value that the agents publish
    #[arg(long, value_name = "GRANULARITY", default_value = "auto", value_parser = granularity)]
    pub mesh_granularity: Auto,
    /// The agents' --leaders-per-region
    #[arg(long, value_name = "NUMBER", default_value = "2")]
    pub leaders_per_region: LeaderCount,
    /// Node label that names the region
    #[arg(long, value_name = "LABEL", default_value = "topology.kubernetes.io/region",
          value_parser = config::label_key)]
    pub topology_label: String,
    /// The agents' --internal-cidr, if they have one (comma separated)
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = cidr)]
    pub internal_cidr: Vec<IpNet>,
    /// The agents' --region-cidr, if they have one: `REGION=CIDR,CIDR` (repeatable)
    #[arg(long, value_name = "REGION=CIDR")]
    pub region_cidr: Vec<RegionCidrs>,
    /// Only `kubernetes`
    #[arg(long, hide = true, default_value = "kubernetes", value_parser = ["kubernetes"])]
    pub backend: String,
}

/// A granularity, or `None` for the one that the agents publish.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Auto(Option<Granularity>);

fn granularity(text: &str) -> Result<Auto, String> {
    match text {
        "auto" => Ok(Auto(None)),
        _ => annotation::granularity(text)
            .map(|granularity| Auto(Some(granularity)))
            .map_err(|_| "unknown; possible values are: location, full, cross, auto".into()),
    }
}

/// Reads a CIDR and masks its host bits.
pub(crate) fn cidr(text: &str) -> Result<IpNet, String> {
    text.trim()
        .parse::<IpNet>()
        .map(|net| net.trunc())
        .map_err(|_| "is not a CIDR such as 10.43.0.0/16".into())
}

/// The cluster at one moment.
#[derive(Clone, Debug)]
pub struct Survey {
    /// The topology, as the agents compute it.
    pub topology: Topology,
    /// The refused values of the objects.
    pub rejected: Vec<Rejected>,
}

/// A connection to the API server.
#[derive(Clone)]
pub struct Access {
    /// The client for requests.
    pub client: Client,
    /// The server's name or address.
    pub host: String,
    /// The server's port.
    pub port: u16,
}

/// Connects as `kubectl` would.
///
/// # Errors
///
/// No kubeconfig is found, or it is invalid.
pub async fn access(args: &Args) -> anyhow::Result<Access> {
    let mut config = match (&args.kubeconfig, &args.context) {
        (None, None) => kube::Config::infer().await.map_err(|error| {
            Refusal::configuration(match kubeconfig::explain_default(&error) {
                Some(reason) => format!("the kubeconfig is invalid: {reason}"),
                None => "found no kubeconfig: set --kubeconfig FILE or KUBECONFIG".to_owned(),
            })
        })?,
        (path, context) => kubeconfig::load(path.as_deref(), context.as_deref())
            .await
            .map_err(|reason| {
                Refusal::configuration(match path {
                    Some(path) => format!("--kubeconfig {}: {reason}", path.display()),
                    None => format!("the kubeconfig is invalid: {reason}"),
                })
            })?,
    };
    config.connect_timeout = Some(TIMEOUT);
    config.read_timeout = Some(TIMEOUT);
    let host = config.cluster_url.host().unwrap_or_default();
    Ok(Access {
        host: host.trim_matches(['[', ']']).to_owned(),
        port: config.cluster_url.port_u16().unwrap_or(443),
        client: Client::try_from(config).context("setting up the connection to the API server")?,
    })
}

/// Reads the cluster once.
///
/// # Errors
///
/// The API server does not answer, or the agents disagree on the granularity.
pub async fn survey(client: &Client, args: &Args) -> anyhow::Result<Survey> {
    let parse = ParseSettings {
        topology_label: args.topology_label.clone(),
    };
    let all = ListParams::default();
    let nodes: Api<NodeObject> = Api::all(client.clone());
    let nodes = nodes.list(&all).await.map_err(describe)?;
    let peers: Api<PeerObject> = Api::all(client.clone());
    let peers = match peers.list(&all).await {
        Ok(peers) => peers.items,
        // Without the CRD there are no peers.
        Err(kube::Error::Api(status)) if status.code == 404 => Vec::new(),
        Err(error) => return Err(describe(error)),
    };

    let mut snapshot = Snapshot::default();
    let mut rejected = Vec::new();
    for object in &nodes.items {
        let (node, refused) = node::parse(object, &parse);
        rejected.extend(refused);
        snapshot
            .nodes
            .extend(node.map(|node| (node.name.clone(), node)));
    }
    for object in &peers {
        let (peer, refused) = peer::parse(object);
        rejected.extend(refused);
        snapshot
            .peers
            .extend(peer.map(|peer| (peer.name.clone(), peer)));
    }
    let resolved = resolve_names(&snapshot).await;

    let settings = Settings {
        granularity: match args.mesh_granularity {
            Auto(Some(granularity)) => granularity,
            Auto(None) => published_granularity(&snapshot)?,
        },
        leaders_per_region: args.leaders_per_region,
        subnets: published_subnets(&snapshot),
        alias_pools: published_aliases(&snapshot),
        internal_cidrs: args.internal_cidr.clone(),
        region_networks: region_networks(args.region_cidr.clone()),
        beside_kilo: follows_kilo(&snapshot),
        ..Settings::default()
    };
    Ok(Survey {
        topology: Topology::new(&snapshot, &settings, &resolved, clock::unix_now()),
        rejected,
    })
}

/// The server's own message, or the reason why there is none.
pub(crate) fn describe(error: kube::Error) -> anyhow::Error {
    let root = |error: &dyn std::error::Error| {
        let (mut text, mut cause) = (error.to_string(), error.source());
        while let Some(error) = cause {
            (text, cause) = (error.to_string(), error.source());
        }
        text
    };
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "all other errors have a clear message"
    )]
    match error {
        kube::Error::Api(status) if status.code == 401 => Refusal::configuration(
            "the API server does not accept the kubeconfig's token or certificate",
        )
        .into(),
        kube::Error::Api(status) if matches!(status.code, 400 | 403 | 409 | 422) => {
            Refusal::configuration(status.message).into()
        }
        kube::Error::Api(status) => anyhow!("the API server: {}", status.message),
        kube::Error::Service(error) => {
            anyhow!("the API server does not answer: {}", root(error.as_ref()))
        }
        other => anyhow!("{}", root(&other)),
    }
}

/// The granularity that all agents publish; `location` while none does.
fn published_granularity(snapshot: &Snapshot) -> anyhow::Result<Granularity> {
    let published = snapshot.nodes.values().filter_map(|node| node.granularity);
    let published: BTreeSet<_> = published.collect();
    if published.len() > 1 {
        let names = published.into_iter().map(annotation::format_granularity);
        let names: Vec<_> = names.collect();
        return Err(Refusal::configuration(format!(
            "the agents publish different granularities ({}): set --mesh-granularity",
            names.join(", ")
        ))
        .into());
    }
    Ok(published.into_iter().next().unwrap_or_default())
}

/// Whether Kilo's algorithm is in force next to a real `kg`: there is no agent of Selvedge, or one writes
/// `last-seen`, which it does only with `--beside-kilo`.
fn follows_kilo(snapshot: &Snapshot) -> bool {
    let mut ours = snapshot.nodes.values().filter(|node| node.ours);
    let beside_kilo = ours.clone().any(|node| node.last_seen.is_some());
    beside_kilo || ours.next().is_none()
}

/// The published aliases, each as a pool of its own: no node is shown with one that it does not have yet.
fn published_aliases(snapshot: &Snapshot) -> Vec<IpNet> {
    let aliases = snapshot.nodes.values().flat_map(|node| &node.aliases);
    aliases.copied().map(IpNet::from).collect()
}

/// The pools of most published WireGuard addresses; Kilo's default while there are none.
fn published_subnets(snapshot: &Snapshot) -> Vec<IpNet> {
    let mut subnets = Vec::new();
    for v6 in [false, true] {
        let mut votes = BTreeMap::<IpNet, usize>::new();
        let addresses = snapshot.nodes.values().flat_map(|node| &node.wireguard_ips);
        for address in addresses.filter(|address| address.addr().is_ipv6() == v6) {
            *votes.entry(address.trunc()).or_default() += 1;
        }
        let most = votes.into_iter().max_by_key(|(_, count)| *count);
        subnets.extend(most.map(|(net, _)| net));
    }
    if subnets.is_empty() {
        subnets.extend("10.4.0.0/16".parse::<IpNet>());
    }
    subnets
}

/// Resolves all names at once, and chooses for each the address that an agent would choose. A name that
/// does not resolve is left out.
async fn resolve_names(snapshot: &Snapshot) -> BTreeMap<String, IpAddr> {
    let of_nodes = snapshot.nodes.values().map(|node: &Node| &node.endpoint);
    let of_peers = snapshot.peers.values().map(|peer| &peer.endpoint);
    let names: BTreeSet<&str> = of_nodes
        .chain(of_peers)
        .filter_map(|endpoint| match endpoint {
            Some(Endpoint::Dns { host, .. }) => Some(host.as_str()),
            Some(Endpoint::Addr(_)) | None => None,
        })
        .collect();
    let lookups = names.into_iter().map(|name| async move {
        let lookup = tokio::net::lookup_host((name, 0));
        let found = tokio::time::timeout(RESOLVE, lookup).await.ok()?.ok()?;
        let answer: Vec<_> = found.map(|address| address.ip()).collect();
        Some((name.to_owned(), resolve::choose(&answer, None)?))
    });
    join_all(lookups).await.into_iter().flatten().collect()
}

/// Runs a command that reads the cluster.
///
/// # Errors
///
/// The command's own.
pub(crate) fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    runtime.block_on(work)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(nodes: &[(&str, Option<Granularity>, &str)]) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for (name, granularity, wireguard_ip) in nodes {
            let object = serde_json::from_value(serde_json::json!({
                "metadata": {"name": name, "annotations": {"kilo.squat.ai/wireguard-ip": wireguard_ip}},
            }));
            let (node, _) = node::parse(&object.unwrap(), &ParseSettings::default());
            let mut node = node.unwrap();
            node.granularity = *granularity;
            snapshot.nodes.insert(node.name.clone(), node);
        }
        snapshot
    }

    #[tokio::test]
    async fn names_resolve_as_in_agents_and_unknown_names_are_left_out() {
        let mut snapshot = snapshot(&[("a", None, ""), ("b", None, ""), ("c", None, "")]);
        // Literal addresses resolve without a server. Agents ignore loopback addresses.
        let hosts = ["203.0.113.9", "127.0.0.1", "unknown.invalid"];
        for (node, host) in snapshot.nodes.values_mut().zip(hosts) {
            node.endpoint = Some(Endpoint::Dns {
                host: host.to_owned(),
                port: 51820,
            });
        }
        let resolved = resolve_names(&snapshot).await;
        let address: IpAddr = "203.0.113.9".parse().unwrap();
        assert_eq!(resolved, [("203.0.113.9".to_owned(), address)].into());
    }

    #[test]
    fn the_granularity_is_the_agents_published_one() {
        let full = Some(Granularity::Full);
        let agree = snapshot(&[("a", full, ""), ("b", None, ""), ("c", full, "")]);
        assert_eq!(published_granularity(&agree).unwrap(), Granularity::Full);
        let silent = snapshot(&[("a", None, "")]);
        assert_eq!(
            published_granularity(&silent).unwrap(),
            Granularity::Location
        );
        let differ = snapshot(&[("a", full, ""), ("b", Some(Granularity::Location), "")]);
        let error = published_granularity(&differ).unwrap_err();
        assert_eq!(crate::refusal::exit_code(&error), 78);
        assert_eq!(
            error.to_string(),
            "the agents publish different granularities (location, full): set --mesh-granularity"
        );
    }

    #[test]
    fn the_subnet_is_that_of_most_wireguard_addresses() {
        let nodes = [
            ("a", None, "10.4.0.1/16"),
            ("b", None, "10.9.0.2/24"),
            ("c", None, "10.9.0.3/24,fd00:4::1/64"),
        ];
        let nets: Vec<_> = published_subnets(&snapshot(&nodes))
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(nets, ["10.9.0.0/24", "fd00:4::/64"]);
        assert_eq!(
            published_subnets(&snapshot(&[("a", None, "")]))[0].to_string(),
            "10.4.0.0/16"
        );
    }
}
