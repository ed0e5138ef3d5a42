//! `selvedge status`: the state of this node's agent.
//!
//! The agent sends a [`Report`] on its control socket. This command, `doctor` and `/metrics` all show
//! parts of such a report.

mod rotate_key;
mod source;
mod terminal;

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

pub use self::rotate_key::{ROTATE_KEY, RotateKeyArgs, rotate_key, run_rotate_key};
pub use self::source::{Question, ReportSource};
pub use self::terminal::render;
use crate::liveness;
use crate::refusal::Refusal;
use crate::text;

/// The agent's control socket, for `selvedge status`, `doctor` and `graph`.
pub const CONTROL_SOCKET: &str = "/run/selvedge/selvedge.sock";

/// Timeout of the agent's answer, which comes from memory.
const TIMEOUT: Duration = Duration::from_secs(2);

/// The state of an agent and its view of the mesh.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct Report {
    /// The agent's version.
    pub version: String,
    /// This node.
    pub node: String,
    /// Whether the node is in the desired state after the last pass.
    pub ready: bool,
    /// Why the node is not ready, in sentences.
    pub problems: Vec<String>,
    /// The node's role in the mesh.
    pub role: Role,
    /// The node's segment, as Kilo names it.
    pub segment: Option<String>,
    /// The leader of that segment.
    pub leader: Option<String>,
    /// The algorithm in force, and why.
    pub mode: String,
    /// The nodes on which a real `kg` runs; while there are any, Kilo's algorithm is in force.
    pub kilo_nodes: Vec<String>,
    /// The nodes that seem to run a real `kg` though `--beside-kilo` is off.
    #[serde(default)]
    pub kilo_refused: Vec<String>,
    /// `location`, `full` or `cross`.
    pub granularity: String,
    /// The tunnel's link.
    pub tunnel: Tunnel,
    /// flannel on this node; `None` while the agent waits for it.
    pub flannel: Option<Flannel>,
    /// The API server.
    pub api: Api,
    /// All segments, in Kilo's order.
    pub segments: Vec<Segment>,
    /// The peers of the tunnel.
    pub peers: Vec<Peer>,
    /// Nodes outside the mesh, by name.
    pub outsiders: Vec<String>,
    /// What is left out of the mesh, and why.
    pub excluded: Vec<String>,
    /// The aliases by which other regions reach nodes.
    pub aliases: Vec<Alias>,
    /// Why nodes need their aliases, in sentences. An alias that is kept is not among them.
    pub overlaps: Vec<String>,
    /// Addresses that this node does not reach through the tunnel, because it is connected to their network.
    pub connected: Vec<String>,
    /// Number of nodes that are Ready for the mesh (Kilo's `kilo_nodes`).
    pub ready_nodes: usize,
    /// Number of external peers in force.
    pub external_peers: usize,
    /// Number of desired routes.
    pub routes: usize,
    /// Whether `--on-tunnel-down=open` lets traffic between regions leave in clear.
    pub fail_open: bool,
    /// Packets that the tunnel dropped since it started, by reason.
    pub drops: BTreeMap<String, u64>,
    /// VXLAN packets to other regions that the firewall dropped; `None` where the counter could not be read.
    pub leak_drops: Option<u64>,
    /// Packets from outside to the mesh, or from the tunnel to other destinations, that the firewall
    /// dropped; `None` where the counter could not be read.
    pub stranger_drops: Option<u64>,
    /// Packets out of the tunnel that would have gone into it again, and that the firewall dropped; `None` where the
    /// counter could not be read.
    pub transit_drops: Option<u64>,
    /// Whether this node relays the tunnel's datagrams between other regions, if it leads.
    pub relays: bool,
    /// Failed writes of the cluster's state to disk since the agent started.
    pub cache_failures: u64,
    /// The paths over which this node sends echoes: through the other leaders of its region, and, on a leader, to
    /// the leaders of other regions.
    pub paths: Vec<LeaderPath>,
    /// Failures of the socket of the echoes since the agent started.
    pub echo_failures: u64,
    /// How often traffic left a path since the agent started, by cause.
    pub failovers: BTreeMap<String, u64>,
}

/// The role of a node in the mesh.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// None: the node is not in the cluster, or has no key there yet.
    #[default]
    Outside,
    /// Sends traffic for other regions to its leader.
    Follower,
    /// Has tunnels.
    Leader,
}

/// The tunnel's link, as desired.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Tunnel {
    /// Its name.
    pub interface: String,
    /// This node's public key.
    pub public_key: String,
    /// Seconds since it was put in place.
    pub key_age: Option<u64>,
    /// The key that is to replace it.
    pub next_key: Option<String>,
    /// The key that it replaced, while that is still accepted.
    pub previous_key: Option<String>,
    /// While a key is replaced: the leaders that have not answered under the new one yet, and the peers that use
    /// the old one.
    pub key_awaits: Option<u64>,
    /// The UDP port it listens on.
    pub listen_port: Option<u16>,
    /// Why it listens on another port than `--port`; `None` where it does not. A clause.
    pub port_reason: Option<String>,
    /// Its MTU in bytes.
    pub mtu: Option<u32>,
    /// Whether the MTU of each path to another region is measured.
    pub measures_mtu: bool,
    /// Its addresses.
    pub addresses: Vec<String>,
    /// The endpoint published for other nodes.
    pub endpoint: Option<String>,
}

/// flannel on this node.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Flannel {
    /// `vxlan` or `host-gw`.
    pub backend: String,
    /// Whether nodes of one subnet are reached without VXLAN.
    pub direct_routing: bool,
    /// The cluster networks.
    pub networks: Vec<String>,
    /// This node's pod CIDRs.
    pub subnets: Vec<String>,
    /// The MTU of its devices in bytes.
    pub mtu: u32,
    /// Its vxlan devices.
    pub links: Vec<String>,
}

/// The API server.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Api {
    /// The server in use; `None` without a connection.
    pub server: Option<String>,
    /// Whether the cluster's state comes from the cache on disk.
    pub cached: bool,
    /// The last error; `None` while the connection works.
    pub error: Option<String>,
    /// Admission policies that are not in force, in sentences. One agent of the cluster checks.
    pub missing_policies: Vec<String>,
}

/// A segment of the topology; one with several leaders stands once for each of them.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Segment {
    /// Its name, in Kilo's form.
    pub name: String,
    /// The leader.
    pub leader: String,
    /// The leader's endpoint.
    pub endpoint: Option<String>,
    /// The leader's WireGuard addresses.
    pub wireguard_ips: Vec<String>,
    /// Its nodes.
    pub nodes: Vec<String>,
}

/// A peer of the tunnel.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Peer {
    /// The segment or the external peer.
    pub name: String,
    /// Its public key.
    pub public_key: String,
    /// The endpoint in use.
    pub endpoint: Option<String>,
    /// The sources that the tunnel accepts from the peer.
    pub allowed_ips: Vec<String>,
    /// Seconds since the last handshake; `None` before the first.
    pub handshake_age: Option<u64>,
    /// Bytes received.
    pub received: u64,
    /// Bytes sent.
    pub sent: u64,
    /// Seconds between keepalives; 0 is off.
    pub persistent_keepalive: u16,
    /// Whether its leader and this node are both behind NAT, so that neither reaches the other directly.
    pub both_behind_nat: bool,
    /// Its candidate endpoints, the likeliest first, with the results of trying them.
    pub candidates: Vec<Candidate>,
}

/// An alias of a node.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Alias {
    /// The node.
    pub node: String,
    /// The alias.
    pub alias: String,
    /// The node's own address, which the leaders of its region put in its place.
    pub address: String,
}

/// A path through or to a leader, as echoes see it.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct LeaderPath {
    /// `leader`, through another leader of the own region, or `peer`, to a leader of another one.
    pub kind: String,
    /// The leader's node.
    pub name: String,
    /// The leader's segment.
    pub region: String,
    /// `up`, `unknown`, `returning`, `draining` or `down`.
    pub state: String,
    /// Why it is down: `silent` or `not_forwarding`.
    pub cause: Option<String>,
    /// Seconds for which it has been so.
    pub since: u64,
    /// The round-trip time in microseconds; `None` before the first answer.
    pub rtt_us: Option<u64>,
    /// How many of the last 100 echoes stayed unanswered, in thousandths; `None` before the first results.
    pub loss_permille: Option<u32>,
    /// The bytes of the largest packet that it carries, inside the tunnel; `None` where that is not measured.
    pub mtu: Option<u32>,
    /// Seconds for which it has been so much.
    pub mtu_since: Option<u64>,
    /// Whether an echo of that size has ever passed.
    pub mtu_confirmed: bool,
    /// The relay that the tunnel's datagrams go through; `None` where they go directly.
    pub via: Option<Via>,
}

/// A relay on a path.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Via {
    /// The leader that relays.
    pub leader: String,
    /// Its segment.
    pub region: String,
    /// Seconds for which this node has used it.
    pub since: u64,
}

/// A candidate endpoint of a peer.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Candidate {
    /// Its address and port.
    pub address: String,
    /// Its source.
    pub origin: String,
    /// Whether the tunnel sends there.
    pub in_use: bool,
    /// Milliseconds of its last answer; `None` if it never answered.
    pub answered_in: Option<u64>,
    /// Seconds since that answer.
    pub answered: Option<u64>,
    /// Seconds since it was last tried; `None` if it never was.
    pub tried: Option<u64>,
}

impl Candidate {
    /// The result of trying it: a clause.
    pub fn outcome(&self) -> String {
        let used = if self.in_use { "in use, " } else { "" };
        let outcome = match (self.answered_in, self.answered, self.tried) {
            (Some(millis), Some(answered), tried)
                if tried.is_none_or(|tried| tried + 1 >= answered) =>
            {
                format!("answered in {millis} ms, {answered} s ago")
            }
            (Some(_), Some(answered), _) => format!("no answer since {answered} s"),
            _ if self.in_use => "the peer called from there".to_owned(),
            (_, _, Some(tried)) => format!("tried {tried} s ago, no answer"),
            (_, _, None) => "never tried".to_owned(),
        };
        format!("{used}{outcome}")
    }
}

impl Peer {
    /// Whether the peer counts as silent ([`liveness::looks_dead`]).
    pub fn is_silent(&self) -> bool {
        let handshake = self.handshake_age.map(Duration::from_secs);
        liveness::looks_dead(handshake, self.persistent_keepalive)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Outside => "outside the mesh",
            Self::Follower => "follower",
            Self::Leader => "leader",
        })
    }
}

/// The output format of `selvedge status`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// Arguments of `selvedge status`.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The agent's control socket
    #[arg(long, value_name = "PATH", default_value = CONTROL_SOCKET)]
    control_socket: PathBuf,
    /// The output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// Prints the report of this node's agent. The exit code is 0 if the node is ready, else 1.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let report = ask(&args.control_socket)?;
    let shown = match args.output {
        Output::Text => render(&report),
        Output::Json => text::json(&serde_json::to_string_pretty(&report)?).into_owned() + "\n",
    };
    // A reader may close the pipe early.
    let _ = io::stdout().write_all(shown.as_bytes());
    Ok(if report.ready {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Connects to the agent behind a control socket.
fn connect(socket: &Path) -> anyhow::Result<UnixStream> {
    let shown = socket.display();
    let stream = UnixStream::connect(socket).map_err(|error| {
        let kind = error.kind();
        Refusal::configuration(if matches!(kind, io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) {
            format!("no agent answers on {shown}: run this on a node of the mesh, in the agent's container or as root")
        } else if kind == io::ErrorKind::PermissionDenied {
            format!("no right to ask the agent on {shown}: run this as root")
        } else {
            format!("cannot ask the agent on {shown}: {error}")
        })
    })?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    Ok(stream)
}

/// Reads the report of the agent behind a control socket.
pub fn ask(socket: &Path) -> anyhow::Result<Report> {
    let shown = socket.display();
    let mut stream = connect(socket)?;
    // Nothing is asked for but the report.
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream
        .read_to_end(&mut answer)
        .map_err(|error| anyhow::anyhow!("the agent on {shown} does not answer: {error}"))?;
    serde_json::from_slice(&answer)
        .map_err(|error| anyhow::anyhow!("the agent on {shown} sent a malformed report: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_reads_like_wg_show() {
        let report = Report {
            version: "1.0.0".into(),
            node: "node-master".into(),
            ready: true,
            role: Role::Leader,
            segment: Some("location:default".into()),
            leader: Some("node-master".into()),
            mode: "Selvedge's own algorithm".into(),
            granularity: "location".into(),
            tunnel: Tunnel {
                interface: "kilo0".into(),
                public_key: "K=".into(),
                key_age: Some(7_300),
                next_key: Some("N=".into()),
                previous_key: None,
                key_awaits: Some(1),
                listen_port: Some(51820),
                port_reason: None,
                mtu: Some(1420),
                measures_mtu: true,
                addresses: vec!["10.42.0.0/32".into(), "10.4.0.1/32".into()],
                endpoint: Some("203.0.113.10:51820".into()),
            },
            api: Api {
                server: Some("https://127.0.0.1:6444".into()),
                ..Api::default()
            },
            peers: vec![Peer {
                name: "location:nd".into(),
                public_key: "P=".into(),
                endpoint: Some("198.51.100.7:24276".into()),
                allowed_ips: vec!["10.42.1.0/24".into()],
                handshake_age: Some(12),
                received: 5,
                sent: 6,
                persistent_keepalive: 25,
                both_behind_nat: false,
                candidates: vec![
                    Candidate {
                        address: "198.51.100.7:24276".into(),
                        origin: "discovered by a leader".into(),
                        in_use: true,
                        answered_in: Some(31),
                        answered: Some(12),
                        tried: Some(12),
                    },
                    Candidate {
                        address: "192.168.50.11:51820".into(),
                        origin: "announced".into(),
                        tried: Some(12),
                        ..Candidate::default()
                    },
                ],
            }],
            paths: vec![
                LeaderPath {
                    kind: "leader".into(),
                    name: "node-02".into(),
                    region: "location:default".into(),
                    state: "up".into(),
                    since: 70,
                    rtt_us: Some(412),
                    loss_permille: Some(15),
                    ..LeaderPath::default()
                },
                LeaderPath {
                    kind: "peer".into(),
                    name: "home-01".into(),
                    region: "location:home".into(),
                    state: "up".into(),
                    since: 9,
                    via: Some(Via {
                        leader: "edge-01".into(),
                        region: "location:edge".into(),
                        since: 11,
                    }),
                    ..LeaderPath::default()
                },
                LeaderPath {
                    kind: "peer".into(),
                    name: "node-agent-01".into(),
                    region: "location:nd".into(),
                    state: "down".into(),
                    cause: Some("not_forwarding".into()),
                    since: 3,
                    mtu: Some(1340),
                    mtu_since: Some(20),
                    mtu_confirmed: true,
                    ..LeaderPath::default()
                },
            ],
            ..Report::default()
        };

        insta::assert_snapshot!(render(&report), @r"
        node: node-master (ready, leader)
          version: 1.0.0
          segment: location:default, led by node-master
          mesh: granularity location, Selvedge's own algorithm
          api server: https://127.0.0.1:6444
          flannel: not up yet

        interface: kilo0
          public key: K= (in use for 2 h)
          next key: N= (announced, 1 leaders have not answered under it)
          listening port: 51820
          mtu: 1420 (each path has its own)
          addresses: 10.42.0.0/32, 10.4.0.1/32
          own endpoint: 203.0.113.10:51820

        peer: location:nd (P=)
          endpoint: 198.51.100.7:24276
          candidate: 198.51.100.7:24276 (discovered by a leader): in use, answered in 31 ms, 12 s ago
          candidate: 192.168.50.11:51820 (announced): tried 12 s ago, no answer
          allowed ips: 10.42.1.0/24
          latest handshake: 12 s ago
          transfer: 5 B received, 6 B sent
          persistent keepalive: every 25 s

        paths:
          through node-02 (location:default): up since 70 s, round trip 0.412 ms, loss 1.5 %
          to home-01 (location:home): up since 9 s, via edge-01 (location:edge) since 11 s
          to node-agent-01 (location:nd): down (does not forward) since 3 s, mtu 1340 since 20 s
        ");
    }

    #[test]
    fn a_region_with_bidirectional_marks_is_escaped() {
        let report = Report {
            segment: Some("location:n\u{202e}d".into()),
            problems: vec!["one\u{1b}[2Jline".into()],
            ..Report::default()
        };
        let text = render(&report);
        assert!(text.contains("segment: location:n\\u{202e}d,"), "{text}");
        assert!(text.contains("one\\u{1b}[2Jline"), "{text}");
    }

    #[test]
    fn a_report_of_another_version_is_read() {
        let report = serde_json::from_str::<Report>(r#"{"node":"a","future":1}"#).unwrap();
        assert_eq!(report.node, "a");
    }

    #[test]
    fn a_missing_agent_is_reported_in_a_sentence() {
        let error = ask(Path::new("/nonexistent/selvedge.sock")).unwrap_err();
        assert_eq!(
            crate::refusal::exit_code(&error),
            crate::refusal::CONFIGURATION
        );
        assert!(
            error
                .to_string()
                .starts_with("no agent answers on /nonexistent")
        );
    }
}
