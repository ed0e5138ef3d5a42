//! The agent's flags: those of Kilo's `kg`, with the same names and defaults, and Selvedge's own.
//!
//! [`super::Config`] validates the values together.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use ipnet::IpNet;

use super::Compatibility;
use super::values::{self, Cidrs, Listen, Mtu, RegionCidrs};
use crate::policy::{Encapsulation, OnTunnelDown, Relaying};
use crate::telemetry::{LogFormat, LogLevel};
use crate::topology::{Granularity, LeaderCount};

const KUBERNETES: &str = "Kubernetes";
const MESH: &str = "Mesh";
const NODE: &str = "This node";
const FLANNEL: &str = "flannel";
const WATCHING: &str = "Logs and pages";
const KILO: &str = "Accepted for compatibility with Kilo";

/// Flags of `selvedge agent` and `selvedge cleanup`.
///
/// Each flag is also read from the environment (`SELVEDGE_LOG_LEVEL` for `--log-level`) and from the file
/// of `--config` (lines such as `log-level: debug`); a flag wins over the environment, and the
/// environment over the file.
#[derive(Args, Clone, Debug)]
pub struct Flags {
    /// Read flags from FILE: one `name: value` per line, `#` starts a comment
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,

    // Kubernetes
    /// Kubeconfig for the API server [default: the pod's service account, at the first server that
    /// answers: one on this host, then the cluster's service]
    #[arg(long, value_name = "FILE", help_heading = KUBERNETES)]
    pub(super) kubeconfig: Option<PathBuf>,
    /// URL of the API server, instead of the kubeconfig's
    #[arg(long, value_name = "URL", help_heading = KUBERNETES, value_parser = values::master)]
    pub(super) master: Option<String>,
    /// Name of this host's Node object [default: NODE_NAME, else the host's name]
    #[arg(long, value_name = "NODE", help_heading = KUBERNETES, value_parser = values::node_name)]
    pub(super) hostname: Option<String>,
    /// Node label that names the region
    #[arg(long, value_name = "LABEL", help_heading = KUBERNETES, value_parser = values::label_key,
          default_value = "topology.kubernetes.io/region")]
    pub(super) topology_label: String,

    // Mesh
    /// Which nodes have tunnels: `location`, the leaders of each region; `cross`, every node, to the nodes
    /// of other regions; `full`, every node, to all others
    #[arg(long, value_name = "GRANULARITY", help_heading = MESH, default_value = "location",
          value_parser = values::granularity)]
    pub(super) mesh_granularity: Granularity,
    /// Leaders of each region, 1 to 8, the same for all agents: all of them carry traffic, and when one
    /// fails the others take over
    #[arg(long, value_name = "NUMBER", help_heading = MESH, default_value = "2")]
    pub(super) leaders_per_region: LeaderCount,
    /// Pool of the leaders' WireGuard addresses; one CIDR, or one of each family
    #[arg(long, value_name = "CIDR", help_heading = MESH, default_value = "10.4.0.0/16",
          value_parser = values::pools)]
    pub(super) subnet: Cidrs,
    /// Pool of aliases for nodes whose address is another node's too, or is in a network of another region; one
    /// CIDR, or one of each family, the same for all agents [default: none]
    #[arg(long, value_name = "CIDR", help_heading = MESH, value_parser = values::alias_pools)]
    pub(super) alias_cidr: Option<Cidrs>,
    /// Inside a region: `always` and `crosssubnet` follow flannel's routes, `never` routes directly where possible
    #[arg(long, value_name = "WHEN", help_heading = MESH, default_value = "always")]
    pub(super) encapsulate: Encapsulation,
    /// Service CIDRs: never masqueraded for VPN peers (repeatable)
    #[arg(long, value_name = "CIDR", help_heading = MESH)]
    pub(super) service_cidr: Vec<Cidrs>,
    /// Networks of a region, `REGION=CIDR[,CIDR]`, the same for all agents: a node of the region with
    /// an address outside them gets its own tunnel (repeatable) [default: the link network of the
    /// region's oldest node]
    #[arg(long, value_name = "REGION=CIDR", help_heading = MESH)]
    pub(super) region_cidr: Vec<RegionCidrs>,
    /// Follow Kilo's algorithm while a real kg is in the mesh; set it on all agents during a
    /// migration
    #[arg(long, value_name = "BOOL", help_heading = MESH, default_value = "false",
          value_parser = values::boolean,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) beside_kilo: bool,
    /// Traffic to a region whose tunnel is down: `closed` refuses it, `open` leaves it to flannel,
    /// in clear
    #[arg(long, value_name = "HOW", help_heading = MESH, default_value = "closed")]
    pub(super) on_tunnel_down: OnTunnelDown,

    /// Let VPN peers (`Peer` objects) leave the cluster through a leader, to the internet or its LAN
    #[arg(long, value_name = "BOOL", help_heading = MESH, default_value = "false",
          value_parser = values::boolean,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) peer_internet: bool,
    /// Regions that relay between two regions that do not reach each other, the same for all agents: `auto`, any
    /// region that reaches both, the nearest first; `off`, none; or names in order of preference
    #[arg(long, value_name = "REGION[,REGION]", help_heading = MESH, default_value = "auto")]
    pub(super) relay: Relaying,

    // This node
    /// Name of the tunnel's link
    #[arg(long, value_name = "LINK", help_heading = NODE, default_value = "kilo0",
          value_parser = values::link_name)]
    pub(super) interface: String,
    /// UDP port of the tunnel, unless an endpoint annotation sets another
    #[arg(long, help_heading = NODE, default_value = "51820", value_parser = values::port)]
    pub(super) port: u16,
    /// MTU inside the tunnel: `auto` (measured for each path to another region), or a number of bytes for all
    #[arg(long, value_name = "BYTES", help_heading = NODE, default_value = "auto")]
    pub(super) mtu: Mtu,
    /// Take the private address from these CIDRs only (repeatable)
    #[arg(long, value_name = "CIDR", help_heading = NODE)]
    pub(super) internal_cidr: Vec<Cidrs>,
    /// Publish the private address as the endpoint, if there is one
    #[arg(long, value_name = "BOOL", help_heading = NODE, default_value = "false",
          value_parser = values::boolean,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) prioritise_private_addresses: bool,
    /// Period of full reconcile passes, in addition to those after changes
    #[arg(long, value_name = "DURATION", help_heading = NODE, default_value = "30s",
          value_parser = values::resync_period)]
    pub(super) resync_period: Duration,
    /// First priority of the agent's three routing policy rules; the agent lowers it if another program's
    /// rule would precede them
    #[arg(long, value_name = "NUMBER", help_heading = NODE, default_value = "5190",
          value_parser = values::rule_priority)]
    pub(super) rule_priority: u32,
    /// Firewall mark of the tunnel's own datagrams
    #[arg(long, value_name = "MARK", help_heading = NODE, default_value = "0x51e00000",
          value_parser = values::fwmark)]
    pub(super) fwmark: u32,
    /// Replace the WireGuard key when it has this age, such as 720h, plus up to an eighth: nodes do not change
    /// theirs together [default: never; see `selvedge rotate-key`]
    #[arg(long, value_name = "DURATION", help_heading = NODE, value_parser = values::key_age)]
    pub(super) rotate_key_after: Option<Duration>,
    /// How long a replaced key is accepted at most, for nodes and VPN peers that still use it
    #[arg(long, value_name = "DURATION", help_heading = NODE, default_value = "24h",
          value_parser = values::key_overlap)]
    pub(super) key_overlap: Duration,
    /// Directory of the private key and the cached state
    #[arg(long, value_name = "DIR", help_heading = NODE, default_value = "/var/lib/selvedge")]
    pub(super) state_dir: PathBuf,
    /// Control socket for `selvedge status` and `doctor`
    #[arg(long, value_name = "PATH", help_heading = NODE, default_value = crate::status::CONTROL_SOCKET)]
    pub(super) control_socket: PathBuf,
    /// Remove rules, routes, the nft table and the agent's annotations on a stop signal; without this flag
    /// they stay, so that a restart interrupts no traffic
    #[arg(long, value_name = "BOOL", help_heading = NODE, value_parser = values::boolean,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) clean_up: Option<bool>,
    /// With --clean-up, also remove the tunnel's link
    #[arg(long, value_name = "BOOL", help_heading = NODE, default_value = "false",
          value_parser = values::boolean,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) clean_up_interface: bool,

    // flannel
    /// flannel's net-conf.json [default: the paths of k3s and kube-flannel, else the live system]
    #[arg(long, value_name = "FILE", help_heading = FLANNEL)]
    pub(super) flannel_conf: Option<PathBuf>,
    /// flannel's subnet.env
    #[arg(long, value_name = "FILE", help_heading = FLANNEL, default_value = "/run/flannel/subnet.env")]
    pub(super) subnet_file: PathBuf,

    // Logs and pages
    /// Address of /health, /ready, /metrics and /graph; empty turns them off
    #[arg(long, value_name = "ADDRESS", help_heading = WATCHING, default_value = "127.0.0.1:1107")]
    pub(super) listen: Listen,
    /// Log level: all, debug, info, warn, error or none
    #[arg(long, value_name = "LEVEL", help_heading = WATCHING, default_value = "info")]
    pub(super) log_level: LogLevel,
    /// Log format: text or json
    #[arg(long, value_name = "FORMAT", help_heading = WATCHING, default_value = "text")]
    pub(super) log_format: LogFormat,

    // Accepted for compatibility with Kilo
    /// Only `kubernetes`
    #[arg(long, value_name = "STORE", help_heading = KILO, default_value = "kubernetes",
          value_parser = ["kubernetes"], hide_possible_values = true)]
    pub(super) backend: String,
    /// Only `flannel`, the default
    #[arg(long, value_name = "CNI", help_heading = KILO, default_value = "flannel")]
    pub(super) compatibility: Compatibility,
    /// flannel manages the CNI configuration
    #[arg(long, value_name = "BOOL", help_heading = KILO, value_parser = values::boolean,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) cni: Option<bool>,
    /// flannel manages the CNI configuration
    #[arg(long, value_name = "FILE", help_heading = KILO)]
    pub(super) cni_path: Option<PathBuf>,
    /// The agent always creates its own link
    #[arg(long, value_name = "BOOL", help_heading = KILO, value_parser = values::boolean,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) create_interface: Option<bool>,
    /// No rule of another table can undo a drop; `selvedge doctor` names the chain that drops
    #[arg(long, value_name = "BOOL", help_heading = KILO, value_parser = values::boolean,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) iptables_forward_rules: Option<bool>,
    /// Inside a region flannel does the routing
    #[arg(long, value_name = "BOOL", help_heading = KILO, value_parser = values::boolean,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) local: Option<bool>,
}

impl Flags {
    /// The networks of all values of a repeatable flag.
    pub(super) fn nets(lists: &[Cidrs]) -> Vec<IpNet> {
        lists.iter().flat_map(|Cidrs(nets)| nets.clone()).collect()
    }
}
