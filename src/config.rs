//! Flags, environment and `--config` file → one validated [`Config`].
//!
//! Only the command line, the environment and the named file are read. The state of the node, of
//! flannel and of the cluster is checked later.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args as _, Command, FromArgMatches as _};
use ipnet::IpNet;

use crate::policy::{Encapsulation, OnTunnelDown, Relaying};
use crate::refusal::Refusal;
use crate::telemetry::{LogFormat, LogLevel};
use crate::topology::{Granularity, LeaderCount, NodeName, RegionName, overlap};

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

/// The operator's configuration of this agent; every value is valid, alone and together with the others.
#[derive(Clone, Debug)]
pub struct Config {
    /// `--hostname`: this host's Node.
    pub node: NodeName,
    /// `--kubeconfig`.
    pub kubeconfig: Option<PathBuf>,
    /// `--master`: the API server's URL.
    pub master: Option<String>,
    /// `--topology-label`.
    pub topology_label: String,
    /// `--mesh-granularity`.
    pub granularity: Granularity,
    /// `--leaders-per-region`.
    pub leaders_per_region: LeaderCount,
    /// `--subnet`: the pools of WireGuard addresses, truncated, at most one of each family.
    pub subnets: Vec<IpNet>,
    /// `--alias-cidr`: the pools of aliases, truncated, at most one of each family; empty for none.
    pub alias_pools: Vec<IpNet>,
    /// `--encapsulate`.
    pub encapsulation: Encapsulation,
    /// `--service-cidr`, truncated.
    pub service_cidrs: Vec<IpNet>,
    /// `--region-cidr`, truncated: the networks of the regions that it names.
    pub region_networks: BTreeMap<RegionName, Vec<IpNet>>,
    /// `--beside-kilo`: whether a real `kg` in the mesh puts Kilo's algorithm into force.
    pub beside_kilo: bool,
    /// `--on-tunnel-down`.
    pub on_tunnel_down: OnTunnelDown,
    /// `--peer-internet`: whether VPN peers may leave the cluster through a leader.
    pub peer_internet: bool,
    /// `--relay`: which regions relay between regions that do not reach each other.
    pub relaying: Relaying,
    /// `--interface`: the name of the tunnel's link.
    pub interface: String,
    /// `--port`: the port of the endpoint that the agent detects.
    pub port: u16,
    /// `--mtu`.
    pub mtu: Mtu,
    /// `--internal-cidr`, truncated; if set, only addresses in these networks count as private.
    pub internal_cidrs: Vec<IpNet>,
    /// `--prioritise-private-addresses`.
    pub prioritise_private_addresses: bool,
    /// `--resync-period`.
    pub resync_period: Duration,
    /// `--rule-priority`: the first priority of the agent's rules, unless another program's rule precedes it.
    pub rule_priority: u32,
    /// `--fwmark`: the mark of the tunnel's own datagrams, compared whole.
    pub fwmark: u32,
    /// `--rotate-key-after`: the age at which the key is replaced; `None` for never.
    pub rotate_key_after: Option<Duration>,
    /// `--key-overlap`: how long a replaced key is accepted at most.
    pub key_overlap: Duration,
    /// `--state-dir`.
    pub state_dir: PathBuf,
    /// `--control-socket`.
    pub control_socket: PathBuf,
    /// `--clean-up`: whether a stop signal removes all that the agent installed.
    pub clean_up: bool,
    /// `--clean-up-interface`: whether that includes the tunnel's link.
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
    /// Notes, logged once, on flags that were set and have no effect.
    pub notes: Vec<String>,
}

impl Config {
    /// The configuration of `selvedge agent` with these flags and an empty environment.
    pub fn from_args<'a>(args: impl IntoIterator<Item = &'a str>) -> Result<Self, Refusal> {
        let args = ["agent"]
            .into_iter()
            .chain(args)
            .map(OsString::from)
            .collect::<Vec<_>>();
        let command = Flags::augment_args(Command::new("agent").args_override_self(true));
        let matches = parse(command, &args, &BTreeMap::new())?
            .map_err(|_| Refusal::usage("--help is not a configuration"))?;
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
        let alias_pools = flags.alias_cidr.map(|pools| pools.0).unwrap_or_default();
        let region_networks = region_networks(flags.region_cidr);
        let internal_cidrs = Flags::nets(&flags.internal_cidr);
        let networks = region_networks.values().flatten();
        let others = (subnets.iter().map(|net| ("--subnet", net)))
            .chain(service_cidrs.iter().map(|net| ("--service-cidr", net)))
            .chain(internal_cidrs.iter().map(|net| ("--internal-cidr", net)))
            .chain(networks.map(|net| ("--region-cidr", net)));
        for (flag, net) in others {
            if let Some(pool) = alias_pools.iter().find(|pool| overlap(pool, net)) {
                return Err(Refusal::usage(format!(
                    "--alias-cidr {pool} overlaps {flag} {net}: choose a pool that nothing else uses"
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
            leaders_per_region: flags.leaders_per_region,
            subnets,
            alias_pools,
            encapsulation: flags.encapsulate,
            service_cidrs,
            region_networks,
            beside_kilo: flags.beside_kilo,
            on_tunnel_down: flags.on_tunnel_down,
            peer_internet: flags.peer_internet,
            relaying: flags.relay,
            interface: flags.interface,
            port: flags.port,
            mtu: flags.mtu,
            internal_cidrs,
            prioritise_private_addresses: flags.prioritise_private_addresses,
            resync_period: flags.resync_period,
            rule_priority: flags.rule_priority,
            fwmark: flags.fwmark,
            rotate_key_after: flags.rotate_key_after,
            key_overlap: flags.key_overlap,
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

    /// Refuses pools that flannel's networks already use.
    pub fn check_against_flannel(&self, networks: &[IpNet]) -> Result<(), Refusal> {
        let subnets = self.subnets.iter().map(|pool| ("--subnet", pool));
        let aliases = self.alias_pools.iter().map(|pool| ("--alias-cidr", pool));
        for (flag, pool) in subnets.chain(aliases) {
            if let Some(network) = networks.iter().find(|network| overlap(pool, network)) {
                return Err(Refusal::configuration(format!(
                    "{flag} {pool} overlaps the cluster network {network}: choose a pool that nothing else uses"
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

/// The default of `--hostname`: the variable NODE_NAME of the downward API, else the host's name.
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
            "the host's name {name:?} is not a valid Node name: set --hostname"
        ))
    })
}

/// Notes on flags that were set and have no effect with flannel.
fn notes(flags: &Flags) -> Vec<String> {
    let mut notes = Vec::new();
    let mut note = |given: bool, sentence: &str| {
        if given {
            notes.push(sentence.to_owned());
        }
    };
    note(
        flags.cni == Some(true) || flags.cni_path.is_some(),
        "--cni and --cni-path have no effect: flannel manages the CNI configuration",
    );
    note(
        flags.local.is_some(),
        "--local has no effect: inside a region flannel does the routing",
    );
    note(
        flags.create_interface == Some(false),
        "--create-interface=false has no effect: the agent has its own data path and creates its link; remove a userspace WireGuard sidecar",
    );
    note(
        flags.iptables_forward_rules.is_some(),
        "--iptables-forward-rules has no effect: no rule of another table can undo a drop; selvedge doctor names the chain that drops",
    );
    notes
}
