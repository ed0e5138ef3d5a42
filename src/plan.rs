//! Derives the desired state of this node's kernel and tunnel from the topology.
//!
//! Pure: no clock, no I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;

use ipnet::IpNet;

use crate::flannel::Flannel;
use crate::policy::{Encapsulation, OnTunnelDown, Relaying};
use crate::probe::Verdicts;
use crate::state::{OtherRule, Ruleset, State};
use crate::topology::{NodeName, Topology};
use crate::wireguard::PeerId;
use crate::wireguard::key::PublicKey;

mod candidates;
mod caveat;
mod firewall;
mod mtu;
mod paths;
mod precedence;
mod relay;
mod routes;
mod site;
mod tunnel;

pub use candidates::{Candidates, candidates, observed_addresses};
pub use caveat::{Caveat, caveats};
pub use precedence::{Place, place};
pub use relay::{is_relayed, relayed_candidates};
use site::Site;

/// This node's own flags.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Settings {
    /// `--interface`.
    pub interface: String,
    /// The tunnel's MTU in bytes: `--mtu`, or what the shell found for `auto`. Where paths are measured, it is what
    /// they begin with and what external peers get.
    pub mtu: u32,
    /// The most that any path carries, if the MTUs of paths are measured.
    pub path_mtu: Option<u32>,
    /// `--port`: listened on unless the node's endpoint names another.
    pub port: NonZeroU16,
    /// `--fwmark` of the tunnel's own datagrams, compared whole.
    pub fwmark: u32,
    /// `--rule-priority`: the priority of the agent's first rule, unless a rule of another program is in the way.
    pub rule_priority: u32,
    /// `--encapsulate`.
    pub encapsulation: Encapsulation,
    /// `--on-tunnel-down`.
    pub on_tunnel_down: OnTunnelDown,
    /// `--service-cidr`.
    pub service_cidrs: Vec<IpNet>,
    /// `--peer-internet`.
    pub peer_internet: bool,
    /// `--relay`.
    pub relaying: Relaying,
}

/// The inputs of [`plan()`].
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// The topology of the mesh.
    pub topology: &'a Topology,
    /// The node to plan for.
    pub me: &'a NodeName,
    /// flannel on this node.
    pub flannel: &'a Flannel,
    /// This node's own flags.
    pub settings: &'a Settings,
    /// The addresses of the API servers that answer this host without the tunnel, on a connection that carries
    /// the tunnel's mark. A private address that is only advertised must not be among them, or this host could
    /// not reach its node at all.
    pub api_servers: &'a BTreeSet<IpAddr>,
    /// The endpoint at which the tunnel device last received from each peer, if the session with it is alive.
    pub observed: &'a BTreeMap<PublicKey, SocketAddr>,
    /// The networks this node is connected to, without the tunnel's, flannel's and the pods' bridge.
    pub connected: &'a BTreeSet<IpNet>,
    /// The routing policy rules of other programs.
    pub other_rules: &'a [OtherRule],
    /// The peers that opened a session with this node although it had sent them nothing for minutes. They need
    /// no keepalives that hold a NAT or a firewall in front of this node open.
    pub callers: &'a BTreeSet<PublicKey>,
    /// What echoes say of the leaders.
    pub verdicts: &'a Verdicts,
    /// The MTUs of the paths to them, as far as they are measured.
    pub mtus: &'a BTreeMap<PeerId, u32>,
}

/// Returns the state this node should have; `None` to leave everything as it is, because the cluster does not
/// (or no longer) know the node.
///
/// A node that takes no part in the mesh (it has no key yet) refuses traffic to other regions, so that none
/// leaves in clear, and leaves everything else to flannel.
pub fn plan(inputs: &Inputs<'_>) -> Option<State> {
    let site = Site::new(inputs)?;
    let routes = routes::routes(&site);
    let firewall = firewall::firewall(&site, &routes);
    Some(State {
        link: Some(tunnel::link(&site)),
        addresses: tunnel::addresses(&site),
        listen_port: Some(site.listen_port()),
        peers: tunnel::peers(&site),
        rules: routes::rules(&site, &routes),
        routes,
        firewall: Some(Ruleset::Planned(Box::new(firewall))),
        sysctls: tunnel::sysctls(&site),
    })
}
