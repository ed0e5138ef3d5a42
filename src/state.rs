//! What the agent owns on a node: its link, addresses, peers, routes, rules and firewall, as values.
//!
//! [`State`] is one type for what is observed and what is desired, keyed as the kernel keys it.
//! [`crate::plan`] says what it should be, [`crate::diff`] compares two of them, [`crate::kernel`]
//! reads and changes the real one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU16;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::wireguard::{PeerConfig, PeerId};

/// The protocol number (`RTPROT`) of every route and rule the agent installs.
pub const PROTOCOL: u8 = 118;
/// The metric of `unreachable` backstops: the largest the kernel's own routes use.
pub const BACKSTOP_METRIC: u32 = 4_278_198_272;

/// The kernel's number of the routing table `main` (`RT_TABLE_MAIN`).
pub const MAIN: u32 = 254;

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
    pub(crate) fn of_wireguard_ip(ip: IpAddr) -> Self {
        if ip.is_ipv4() {
            Self::Link
        } else {
            Self::Global
        }
    }
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
    pub peers: BTreeMap<PeerId, PeerConfig>,
    /// Routes in the agent's own tables.
    pub routes: BTreeMap<RouteKey, Route>,
    /// Rules that lead there.
    pub rules: BTreeSet<Rule>,
    /// The nft table; `None` where there is none.
    pub firewall: Option<Ruleset>,
    /// Sysctls of the tunnel's link, by path below `/proc/sys`.
    pub sysctls: BTreeMap<String, String>,
}

/// A routing policy rule of another program.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct OtherRule {
    /// The priority (`pref`).
    pub priority: u32,
    /// The family: true for IPv6.
    pub v6: bool,
    /// The only destinations it selects; `None` is all.
    pub to: Option<IpNet>,
    /// What it does with a packet.
    pub action: OtherAction,
}

/// What a rule of another program does with a packet that it selects.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum OtherAction {
    /// Looks into a table that may lead away from this host.
    Lookup(u32),
    /// Delivers to this host: the table `local`, or one with `local` routes alone, as transparent
    /// proxies have it.
    Deliver,
    /// Looks into the table of the packet's VRF. It finds nothing for a packet of none.
    Vrf,
    /// Goes on at a rule of a higher priority.
    Goto(u32),
    /// Refuses the packet, or does nothing.
    Refuse,
}

impl fmt::Display for OtherRule {
    /// As `ip rule` prints it, as far as it is known.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.v6 { "-6 " } else { "" };
        write!(f, "ip {family}rule pref {}", self.priority)?;
        if let Some(to) = self.to {
            write!(f, " to {to}")?;
        }
        match self.action {
            OtherAction::Lookup(MAIN) => f.write_str(" lookup main"),
            OtherAction::Lookup(table) => write!(f, " lookup {table}"),
            OtherAction::Deliver => f.write_str(" lookup local"),
            OtherAction::Vrf => f.write_str(" lookup l3mdev-table"),
            OtherAction::Goto(priority) => write!(f, " goto {priority}"),
            OtherAction::Refuse => f.write_str(" unreachable"),
        }
    }
}
