//! What the agent owns on a node: its link, addresses, peers, routes, rules and firewall, as values.
//!
//! [`State`] is one type for the observed and the desired state, with the kernel's keys. [`crate::plan`] computes
//! the desired one, [`crate::diff`] compares the two, [`crate::kernel`] reads and changes the real one.

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

/// The number of consecutive rule priorities that the agent uses.
pub const RULES: u32 = 3;

/// The agent's own routing tables.
///
/// | table | selected by | holds |
/// |---|---|---|
/// | `Mesh` | every packet | remote pod CIDRs, node addresses, WireGuard addresses |
/// | `Pods` | source in the cluster network | remote node addresses that the host must reach directly: tunnel endpoints, the API server |
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

/// The action of a route.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Route {
    /// Forwards the packet.
    Unicast {
        /// The next hops; more than one is a multipath route, hashed by flow.
        next_hops: BTreeSet<NextHop>,
        /// The preferred source address for packets of the host itself.
        src: Option<IpAddr>,
        /// RTAX_MTU in bytes. With it the sender's own node reports the size that fits into the tunnel.
        mtu: Option<u32>,
    },
    /// Refuses the packet with ICMP unreachable, so that none between regions leaves in clear.
    Unreachable,
    /// Drops the packet without an answer. For echoes, to whose sender there may be no route but the default one.
    Blackhole,
    /// Ends the look-up in this table and leaves the packet to flannel's routes.
    Throw,
}

/// A next hop of a route.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct NextHop {
    /// The gateway, if any.
    pub via: Option<IpAddr>,
    /// The name of the device.
    pub dev: String,
    /// Whether the kernel takes the gateway for reachable on the link without checking (`onlink`).
    pub onlink: bool,
}

/// A routing policy rule, of one address family.
///
/// The guard's file holds rules too: a change of this type needs another [`crate::guard::FORMAT`].
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
    /// Whether the selector is inverted (`ip rule add not …`). The kernel inverts it as a whole, so this is useful
    /// with a single field only.
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

/// The scope of an address of the tunnel's link (`ip address … scope`).
///
/// Masquerading uses a link's first address of global scope. The WireGuard address has link scope. So in whatever
/// order the two were added, packets masqueraded into the tunnel have an address of this node's pod CIDR, and
/// answers come back to this node. IPv6 has no such scope.
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
    /// Underlay addresses to which VXLAN may be sent: the nodes of the own region.
    pub region_underlay: BTreeSet<IpAddr>,
    /// Pod CIDRs of other regions. A leader never sends packets for them through flannel's device.
    pub remote_pods: BTreeSet<IpNet>,
    /// Node, WireGuard and allowed-location addresses of other regions.
    pub remote_nodes: BTreeSet<IpNet>,
    /// Those of them that this host reaches through the mesh, not directly.
    pub mesh_nodes: BTreeSet<IpNet>,
    /// Pod CIDRs of the own region without this node's.
    pub region_pods: BTreeSet<IpNet>,
    /// Node addresses of the own region without this node's.
    pub region_nodes: BTreeSet<IpNet>,
    /// The pools of aliases of the families that this node carries.
    pub alias_pools: BTreeSet<IpNet>,
    /// The aliases of the region's nodes, this one among them, each with the address that it stands for. This node
    /// translates what it sends to them itself; what arrives by the tunnel has the node's address already.
    pub region_aliases: BTreeMap<IpAddr, IpAddr>,
    /// The probe addresses of the region's leaders. Only nodes send to them.
    pub probes: BTreeSet<IpAddr>,
    /// This node's own pod CIDRs.
    pub local_pods: BTreeSet<IpNet>,
    /// Whether this node forwards for its region. Then transit is not tracked, and the MSS of SYNs is clamped.
    pub leader: bool,
    /// Whether VXLAN to other regions is dropped (`--on-tunnel-down=closed`, the default).
    pub fail_closed: bool,
    /// Sources (VPN peers) that are masqueraded towards destinations outside of [`Self::known`].
    pub masquerade_sources: BTreeSet<IpNet>,
    /// Destinations (the own region's `allowed-location-ips`) towards which all sources are masqueraded, except for
    /// [`Self::known`] destinations: hosts there have no route back to pods.
    pub masquerade_destinations: BTreeSet<IpNet>,
    /// Destinations that are never masqueraded.
    pub known: BTreeSet<IpNet>,
    /// The destinations that packets reach through the mesh or not at all.
    pub guard: Guard,
    /// Sources from which this node accepts VXLAN: the nodes of its region and their networks; empty where it is its
    /// region's only node.
    pub vxlan_sources: BTreeSet<IpNet>,
    /// The devices by which the region's other nodes are reached and reach this one.
    pub region_devices: BTreeSet<String>,
    /// Whether VPN peers may leave the cluster through this node (`--peer-internet`).
    pub peer_internet: bool,
    /// What a leader passes on between other regions.
    pub relay: RelayDoor,
}

/// The WireGuard addresses between which a leader passes on the tunnel's datagrams, as a relay. Empty where it does not
/// relay.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RelayDoor {
    /// The leaders of other regions.
    pub from: BTreeSet<IpAddr>,
    /// Those that it reaches directly.
    pub to: BTreeSet<IpAddr>,
}

/// The destinations that packets reach through the mesh or not at all, derived from the routes. The nft table holds
/// them too, so that no packet leaves in clear when rules or routes are missing.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Guard {
    /// The next hops by which the other nodes of the region are reached.
    pub hops: BTreeSet<IpAddr>,
    /// What goes through the tunnel (leaders) or to another node of the region.
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

/// The identity of an nft table's content: a digest of the text that `nft` loaded.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct FirewallId(pub [u8; 16]);

impl FirewallId {
    /// The identity of a table that another program changed. No [`Firewall`] has it.
    pub const UNKNOWN: Self = Self([0; 16]);
}

/// The agent's nft table, as planned or as observed.
///
/// The plan holds the rules. Of the kernel's table only the identity is known, and that no other program has changed
/// it since. The two are equal when their identities are.
#[derive(Clone, Debug)]
pub enum Ruleset {
    /// The desired content.
    Planned(Box<Firewall>),
    /// The present content.
    Installed(FirewallId),
}

/// All that the agent owns on this node.
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
    /// Its action.
    pub action: OtherAction,
}

/// The action of another program's rule.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum OtherAction {
    /// Looks up a table that may lead to other hosts.
    Lookup(u32),
    /// Delivers to this host: the table `local`, or one with `local` routes alone, as transparent
    /// proxies have it.
    Deliver,
    /// Looks up the table of the packet's VRF. Packets without a VRF are not affected.
    Vrf,
    /// Continues at a rule of a higher priority.
    Goto(u32),
    /// Refuses the packet, or does nothing.
    Refuse,
}

impl fmt::Display for OtherRule {
    /// As `ip rule` prints it, as far as its fields are known.
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
