//! Flags, environment and `--config` file → one validated [`Config`].
//!
//! Reads the command line and the named file and nothing else; what the node, flannel and the
//! cluster are like is found out later.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args as _, Command, FromArgMatches as _};
use ipnet::IpNet;

use crate::policy::{Encapsulation, OnTunnelDown};
use crate::refusal::Refusal;
use crate::telemetry::{LogFormat, LogLevel};
use crate::topology::{Granularity, NodeName, RegionName, overlap};

mod flags;
mod layers;
mod values;

pub use flags::Flags;
pub(crate) use layers::PREFIX;
pub use layers::{parse, sentence};
pub use values::{Listen, Mtu, RegionCidrs};
pub(crate) use values::{boolean, label_key, link_name, port, region_networks, resync_period};

/// `--compatibility`: Selvedge works beside flannel only.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Compatibility;

impl FromStr for Compatibility {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" | "flannel" => Ok(Self),
            _ => Err("unknown; the only possible value is: flannel".into()),
        }
    }
}

/// What the operator asked of this agent; every value is valid on its own and beside the others.
#[derive(Clone, Debug)]
pub struct Config {
    /// `--hostname`: this machine's Node.
    pub node: NodeName,
    /// `--kubeconfig`.
    pub kubeconfig: Option<PathBuf>,
    /// `--master`: the API server's URL.
    pub master: Option<String>,
    /// `--topology-label`.
    pub topology_label: String,
    /// `--mesh-granularity`.
    pub granularity: Granularity,
    /// `--subnet`: the pools of WireGuard addresses, truncated, at most one of each family.
    pub subnets: Vec<IpNet>,
    /// `--encapsulate`.
    pub encapsulation: Encapsulation,
    /// `--service-cidr`, truncated.
    pub service_cidrs: Vec<IpNet>,
    /// `--region-cidr`, truncated: the networks of the regions that it names.
    pub region_networks: BTreeMap<RegionName, Vec<IpNet>>,
    /// `--beside-kilo`: whether a real `kg` in the mesh brings Kilo's algorithm into force.
    pub beside_kilo: bool,
    /// `--on-tunnel-down`.
    pub on_tunnel_down: OnTunnelDown,
    /// `--peer-internet`: whether VPN peers may leave the cluster through a leader.
    pub peer_internet: bool,
    /// `--interface`: the name of the tunnel's link.
    pub interface: String,
    /// `--port`: of the endpoint this node finds for itself.
    pub port: u16,
    /// `--mtu`.
    pub mtu: Mtu,
    /// `--internal-cidr`, truncated; where given, only these hold private addresses.
    pub internal_cidrs: Vec<IpNet>,
    /// `--prioritise-private-addresses`.
    pub prioritise_private_addresses: bool,
    /// `--resync-period`.
    pub resync_period: Duration,
    /// `--rule-priority`: where the agent's rules begin, unless a rule of another program is in the way.
    pub rule_priority: u32,
    /// `--fwmark`: of the tunnel's own datagrams, compared whole.
    pub fwmark: u32,
    /// `--state-dir`.
    pub state_dir: PathBuf,
    /// `--control-socket`.
    pub control_socket: PathBuf,
    /// `--clean-up`: whether being told to stop removes what the agent installed.
    pub clean_up: bool,
    /// `--clean-up-interface`: and the tunnel's link.
    pub clean_up_interface: bool,
    /// `--flannel-conf`.
    pub flannel_conf: Option<PathBuf>,
    /// `--subnet-file`.
    pub subnet_file: PathBuf,
    /// `--listen`.
    pub listen: Listen,
    /// `--log-level`.
    pub log_level: LogLevel,
    /// `--log-format`.
    pub log_format: LogFormat,
    /// What to tell the user once about flags that were given and change nothing here.
    pub notes: Vec<String>,
}

impl Config {
    /// What `selvedge agent` with these flags, and nothing in the environment, would run with.
    pub fn from_args<'a>(args: impl IntoIterator<Item = &'a str>) -> Result<Self, Refusal> {
        let args = ["agent"]
            .into_iter()
            .chain(args)
            .map(OsString::from)
            .collect::<Vec<_>>();
        let command = Flags::augment_args(Command::new("agent").args_override_self(true));
        let matches = parse(command, &args, &BTreeMap::new())?
            .map_err(|_| Refusal::usage("--help is no configuration"))?;
        let flags =
            Flags::from_arg_matches(&matches).map_err(|error| Refusal::usage(sentence(&error)))?;
        Self::new(flags)
    }

    /// Checks the flags against each other.
    pub fn new(flags: Flags) -> Result<Self, Refusal> {
        let notes = notes(&flags);
        let subnets = flags.subnet.0;
        let service_cidrs = Flags::nets(&flags.service_cidr);
        for (pool, service) in subnets
            .iter()
            .flat_map(|pool| service_cidrs.iter().map(move |service| (pool, service)))
        {
            if overlap(pool, service) {
                return Err(Refusal::usage(format!(
                    "--subnet {pool} overlaps --service-cidr {service}: choose a pool that nothing else uses"
                )));
            }
        }
        Ok(Self {
            node: NodeName(match flags.hostname {
                Some(name) => name,
                None => own_name()?,
            }),
            kubeconfig: flags.kubeconfig.filter(|path| !path.as_os_str().is_empty()),
            master: flags.master.filter(|url| !url.is_empty()),
            topology_label: flags.topology_label,
            granularity: flags.mesh_granularity,
            subnets,
            encapsulation: flags.encapsulate,
            service_cidrs,
            region_networks: region_networks(flags.region_cidr),
            beside_kilo: flags.beside_kilo,
            on_tunnel_down: flags.on_tunnel_down,
            peer_internet: flags.peer_internet,
            interface: flags.interface,
            port: flags.port,
            mtu: flags.mtu,
            internal_cidrs: Flags::nets(&flags.internal_cidr),
            prioritise_private_addresses: flags.prioritise_private_addresses,
            resync_period: flags.resync_period,
            rule_priority: flags.rule_priority,
            fwmark: flags.fwmark,
            state_dir: flags.state_dir,
            control_socket: flags.control_socket,
            clean_up: flags.clean_up.unwrap_or(false),
            clean_up_interface: flags.clean_up_interface,
            flannel_conf: flags.flannel_conf,
            subnet_file: flags.subnet_file,
            listen: flags.listen,
            log_level: flags.log_level,
            log_format: flags.log_format,
            notes,
        })
    }

    /// Refuses pools of WireGuard addresses that flannel's networks already use.
    pub fn check_against_flannel(&self, networks: &[IpNet]) -> Result<(), Refusal> {
        for pool in &self.subnets {
            if let Some(network) = networks.iter().find(|network| overlap(pool, network)) {
                return Err(Refusal::configuration(format!(
                    "--subnet {pool} overlaps the cluster network {network}: choose a pool that nothing else uses"
                )));
            }
        }
        Ok(())
    }

    /// The pool of one family.
    pub fn subnet(&self, v6: bool) -> Option<IpNet> {
        self.subnets
            .iter()
            .copied()
            .find(|net| matches!(net, IpNet::V6(_)) == v6)
    }
}

/// The Node this machine is, where nobody said: the downward API's usual variable, else the host.
fn own_name() -> Result<String, Refusal> {
    let name = match std::env::var("NODE_NAME") {
        Ok(name) if !name.is_empty() => name,
        Ok(_) | Err(_) => nix::unistd::gethostname()
            .ok()
            .and_then(|name| name.into_string().ok())
            .unwrap_or_default()
            .to_ascii_lowercase(),
    };
    values::node_name(&name).map_err(|_| {
        Refusal::usage(format!(
            "this host is called {name:?}, which is no Node's name: give --hostname"
        ))
    })
}

/// Sentences on flags that were given and mean nothing beside flannel.
fn notes(flags: &Flags) -> Vec<String> {
    let mut notes = Vec::new();
    let mut note = |given: bool, sentence: &str| {
        if given {
            notes.push(sentence.to_owned());
        }
    };
    note(
        flags.cni == Some(true) || flags.cni_path.is_some(),
        "--cni and --cni-path change nothing: flannel manages the CNI configuration",
    );
    note(
        flags.local.is_some(),
        "--local changes nothing: inside a region flannel does the routing",
    );
    note(
        flags.create_interface == Some(false),
        "--create-interface=false changes nothing: the agent carries its own data path and makes its link; remove a userspace WireGuard sidecar",
    );
    note(
        flags.iptables_forward_rules.is_some(),
        "--iptables-forward-rules changes nothing: no rule of another table can undo a drop; selvedge doctor names the chain that stands in the way",
    );
    notes
}
