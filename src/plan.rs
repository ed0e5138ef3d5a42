//! Derives what this node's kernel and tunnel should look like from the topology.
//!
//! Pure: no clock, no I/O. [`State`] is one type for what is observed and what is desired, keyed as
//! the kernel keys it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::config::{Encapsulation, OnTunnelDown};
use crate::flannel::Flannel;
use crate::topology::{NodeName, Topology};
use crate::wireguard::key::{PresharedKey, PublicKey};

mod candidates;
mod caveat;
mod firewall;
mod precedence;
mod routes;
mod site;
mod tunnel;

pub use candidates::{Candidates, candidates, seen};
pub use caveat::{Caveat, caveats};
pub use precedence::{OtherAction, OtherRule, Place, place};
use site::Site;

/// The protocol number (`RTPROT`) of every route and rule the agent installs.
pub const PROTOCOL: u8 = 118;
/// The metric of `unreachable` backstops: the largest the kernel's own routes use.
pub const BACKSTOP_METRIC: u32 = 4_278_198_272;

/// How many rule priorities the agent uses, one after the other.
pub const RULES: u32 = 3;

/// The agent's own routing tables.
///
/// | table | selected by | holds |
/// |---|---|---|
/// | `Mesh` | every packet | remote pod CIDRs, node addresses, WireGuard addresses |
/// | `Pods` | source in the cluster network | remote node addresses that the host itself must reach directly: tunnel endpoints, the API server |
/// | `Members` | arriving from the tunnel | node addresses of the own region behind flannel's device |
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Table {
    /// 5130
    Mesh,
    /// 5131
    Pods,
    /// 5132
    Members,
}

impl Table {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Mesh, Self::Pods, Self::Members];

    /// The kernel's number of the table.
    pub const fn id(self) -> u32 {
        match self {
            Self::Mesh => 5130,
            Self::Pods => 5131,
            Self::Members => 5132,
        }
    }
}

/// The kernel's key of a route (dst, table, metric; tos is always 0).
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct RouteKey {
    /// The table.
    pub table: Table,
    /// The destination, truncated.
    pub dst: IpNet,
    /// The metric; IPv6 routes never use 0, which the kernel reads as 1024.
    pub metric: u32,
}

/// What a route does with a packet.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Route {
    /// Sends it on.
    Unicast {
        /// The next hops; more than one is a multipath route, hashed by flow.
        next_hops: BTreeSet<NextHop>,
        /// The preferred source address for packets of the host itself.
        src: Option<IpAddr>,
        /// RTAX_MTU in bytes: the sender is told by its own node what fits into the tunnel.
        mtu: Option<u32>,
    },
    /// Refuses it with ICMP unreachable: no packet between regions leaves in clear.
    Unreachable,
    /// Ends the look-up in this table: flannel decides.
    Throw,
}

/// A next hop of a route.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct NextHop {
    /// The gateway, if any.
    pub via: Option<IpAddr>,
    /// The name of the device.
    pub dev: String,
    /// Whether the gateway is taken to be on the link.
    pub onlink: bool,
}

/// A routing policy rule, of one address family.
///
/// Rules stand in the guard's file, too: a change here needs another [`crate::guard::FORMAT`].
#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Rule {
    /// The priority (`pref`).
    pub priority: u32,
    /// The family: true for IPv6.
    pub v6: bool,
    /// The source prefix; `None` is every source.
    pub from: Option<IpNet>,
    /// The incoming device; `lo` matches packets of the host and the kernel's reverse-path checks.
    pub iif: Option<String>,
    /// The firewall mark, compared whole.
    pub fwmark: Option<u32>,
    /// Whether the rule selects what the fields above do not (`ip rule add not …`). The kernel inverts
    /// the whole selector, so this makes sense with one field alone.
    pub not: bool,
    /// The table to look in.
    pub table: u32,
}

/// The tunnel's link.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Link {
    /// Its name, `kilo0` unless `--interface` says otherwise.
    pub name: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
}

/// How far an address of the tunnel's link goes (`ip address … scope`).
///
/// Masquerading takes a link's first address of global scope. The WireGuard address has the scope of
/// the link, so whatever the order in which the two were added, what is masqueraded into the tunnel
/// carries an address of this node's pod CIDR and comes back to this node. IPv6 knows no such scope.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Scope {
    /// May be a source for any destination.
    Global,
    /// Never chosen as a source for what leaves the link.
    Link,
}

impl Scope {
    fn of_wireguard_ip(ip: IpAddr) -> Self {
        if ip.is_ipv4() {
            Self::Link
        } else {
            Self::Global
        }
    }
}

/// A peer of the tunnel device, as the plan wants it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Peer {
    /// Where to send until the peer is heard from elsewhere.
    pub endpoint: Option<SocketAddr>,
    /// The preshared key.
    pub preshared_key: Option<PresharedKey>,
    /// Seconds between keepalives; `None` is off.
    pub persistent_keepalive: Option<NonZeroU16>,
    /// What may come from it and is sent to it.
    pub allowed_ips: BTreeSet<IpNet>,
}

/// The values of the agent's own nft table `inet selvedge`; `kernel::nft` renders them.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Firewall {
    /// The tunnel's device.
    pub tunnel: String,
    /// The tunnel's UDP port, which is not for pods.
    pub port: u16,
    /// flannel's vxlan devices and their UDP ports on this node.
    pub vxlan: BTreeMap<String, u16>,
    /// Underlay addresses VXLAN may go to: the nodes of the own region.
    pub region_underlay: BTreeSet<IpAddr>,
    /// Pod CIDRs of other regions. A leader never sends them by flannel's device.
    pub remote_pods: BTreeSet<IpNet>,
    /// Node, WireGuard and allowed-location addresses of other regions.
    pub remote_nodes: BTreeSet<IpNet>,
    /// Those of them that this host itself reaches through the mesh, not directly.
    pub mesh_nodes: BTreeSet<IpNet>,
    /// Pod CIDRs of the own region without this node's.
    pub region_pods: BTreeSet<IpNet>,
    /// Node addresses of the own region without this node's.
    pub region_nodes: BTreeSet<IpNet>,
    /// This node's own pod CIDRs.
    pub local_pods: BTreeSet<IpNet>,
    /// Whether this node forwards for its region: transit is not tracked, SYNs are clamped.
    pub leader: bool,
    /// Whether VXLAN to other regions is dropped (`--on-tunnel-down=closed`, the default).
    pub fail_closed: bool,
    /// Sources (VPN peers) masqueraded where they leave to destinations outside [`Self::known`].
    pub masquerade_sources: BTreeSet<IpNet>,
    /// Destinations (the own region's `allowed-location-ips`) towards which everything is masqueraded
    /// unless it goes to [`Self::known`]: hosts there have no route back to pods.
    pub masquerade_destinations: BTreeSet<IpNet>,
    /// Destinations that are never masqueraded.
    pub known: BTreeSet<IpNet>,
    /// What leaves this node through the mesh or not at all.
    pub guard: Guard,
    /// Sources whose VXLAN this node takes: the nodes of its region and their networks; empty where it
    /// is its region's only node.
    pub vxlan_sources: BTreeSet<IpNet>,
    /// The devices by which the region's other nodes are reached and reach this one.
    pub region_devices: BTreeSet<String>,
    /// Whether VPN peers may leave the cluster through this node (`--peer-internet`).
    pub peer_internet: bool,
}

/// What leaves a node through the mesh or not at all, as its routes have it. The nft table holds it too,
/// so that nothing leaves in clear when rules or routes are gone.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Guard {
    /// The next hops by which the other nodes of the region are reached.
    pub hops: BTreeSet<IpAddr>,
    /// What goes to another node of the own region, whatever this node's role.
    pub beside: BTreeSet<IpNet>,
    /// What goes through the tunnel (leaders) or to another node of the region (followers).
    pub far: BTreeSet<IpNet>,
    /// What does so if it comes from the cluster network.
    pub far_from_pods: BTreeSet<IpNet>,
    /// What main decides on, though it lies in [`Self::wide`].
    pub near: BTreeSet<IpNet>,
    /// As [`Self::far`], but for [`Self::near`].
    pub wide: BTreeSet<IpNet>,
    /// flannel's networks.
    pub cluster: BTreeSet<IpNet>,
}

/// The identity of an nft table's content: a digest of the text `nft` was given.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct FirewallId(pub [u8; 16]);

impl FirewallId {
    /// A table that is not as the agent left it; no [`Firewall`] has this identity.
    pub const UNKNOWN: Self = Self([0; 16]);
}

/// The agent's nft table, as planned or as found.
///
/// The plan knows the rules; the kernel only tells which rules it was given, and that nobody has
/// touched them since. The two are equal when their identities are.
#[derive(Clone, Debug)]
pub enum Ruleset {
    /// What the table should hold.
    Planned(Box<Firewall>),
    /// What the table holds.
    Installed(FirewallId),
}

impl Ruleset {
    /// The identity of the content.
    pub fn id(&self) -> FirewallId {
        match self {
            Self::Planned(firewall) => firewall.id(),
            Self::Installed(id) => *id,
        }
    }
}

impl PartialEq for Ruleset {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Planned(one), Self::Planned(two)) => one == two,
            (Self::Planned(_), Self::Installed(_)) | (Self::Installed(_), _) => {
                self.id() == other.id()
            }
        }
    }
}

impl Eq for Ruleset {}

/// Everything the agent owns on this node, and nothing else.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct State {
    /// The tunnel's link; `None` where there is none.
    pub link: Option<Link>,
    /// The addresses of the tunnel's link, without link-local ones.
    pub addresses: BTreeMap<IpNet, Scope>,
    /// The UDP port the tunnel listens on.
    pub listen_port: Option<NonZeroU16>,
    /// The peers of the tunnel device.
    pub peers: BTreeMap<PublicKey, Peer>,
    /// Routes in the agent's own tables.
    pub routes: BTreeMap<RouteKey, Route>,
    /// Rules that lead there.
    pub rules: BTreeSet<Rule>,
    /// The nft table; `None` where there is none.
    pub firewall: Option<Ruleset>,
    /// Sysctls of the tunnel's link, by path below `/proc/sys`.
    pub sysctls: BTreeMap<String, String>,
}

/// What this node's operator asked of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Settings {
    /// `--interface`.
    pub interface: String,
    /// The tunnel's MTU in bytes: `--mtu`, or what the shell found for `auto`.
    pub mtu: u32,
    /// `--port`: listened on unless the node's endpoint names another.
    pub port: NonZeroU16,
    /// `--fwmark` of the tunnel's own datagrams, compared whole.
    pub fwmark: u32,
    /// `--rule-priority`: where the agent's rules begin, unless a rule of another program is in the way.
    pub rule_priority: u32,
    /// `--encapsulate`.
    pub encapsulation: Encapsulation,
    /// `--on-tunnel-down`.
    pub on_tunnel_down: OnTunnelDown,
    /// `--service-cidr`.
    pub service_cidrs: Vec<IpNet>,
    /// `--peer-internet`.
    pub peer_internet: bool,
}

/// Everything [`plan`] looks at.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// Who is where.
    pub topology: &'a Topology,
    /// The node to plan for.
    pub me: &'a NodeName,
    /// flannel on this node.
    pub flannel: &'a Flannel,
    /// What this node's operator asked of it.
    pub settings: &'a Settings,
    /// The addresses of the API servers that answer this host directly: without the tunnel, as a
    /// connection that carries the tunnel's mark does. A private address that is only advertised must
    /// not be among them, or this host could not reach its node at all.
    pub api_servers: &'a BTreeSet<IpAddr>,
    /// Where the tunnel device itself last heard each peer from, if the session with it is alive.
    pub observed: &'a BTreeMap<PublicKey, SocketAddr>,
    /// The networks this node is connected to, without the tunnel's, flannel's and the pods' bridge.
    pub connected: &'a BTreeSet<IpNet>,
    /// The routing policy rules of other programs.
    pub other_rules: &'a [OtherRule],
    /// The peers that have shown that they can call this node although it had sent them nothing for minutes:
    /// no NAT or firewall in front of it has to be kept open for them.
    pub callers: &'a BTreeSet<PublicKey>,
}

/// Returns the state this node should have; `None` to leave everything as it is, because the
/// cluster does not (or no longer) know the node.
///
/// A node that takes no part (it has no key yet) refuses what is meant for other regions, so that
/// nothing goes there in clear, and leaves everything else to flannel.
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
