//! Computes the changes that turn the observed state into the desired one.
//!
//! Pure. This module only finds the changes and their order. The reconciler applies them to the kernel and the
//! tunnel device.

use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU16;

use ipnet::IpNet;

use crate::state::{Firewall, Link, MAIN, PROTOCOL, Route, RouteKey, Rule, Ruleset, Scope, State};
use crate::wireguard::key::PublicKey;
use crate::wireguard::{PeerConfig, PeerId};

/// One idempotent operation on the kernel or the tunnel device.
///
/// `Display` prints what an operator would type.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Change {
    /// For [`crate::kernel`].
    Kernel(KernelChange),
    /// For the tunnel device ([`crate::wireguard`]).
    Tunnel(TunnelChange),
}

impl Change {
    /// The change, if it is the kernel's.
    pub fn of_kernel(&self) -> Option<&KernelChange> {
        match self {
            Self::Kernel(change) => Some(change),
            Self::Tunnel(_) => None,
        }
    }
}

/// A change of the kernel.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum KernelChange {
    /// Changes the MTU of the tunnel's link.
    SetMtu {
        /// The link.
        name: String,
        /// In bytes.
        mtu: u32,
    },
    /// Writes a sysctl of the tunnel's link.
    SetSysctl {
        /// Below `/proc/sys`.
        path: String,
        /// What to write.
        value: String,
    },
    /// Sets the tunnel's link up.
    SetUp {
        /// The link.
        name: String,
    },
    /// Adds an address to the tunnel's link.
    AddAddress {
        /// The link.
        dev: String,
        /// The address.
        address: IpNet,
        /// Its scope (IPv4 only).
        scope: Scope,
    },
    /// Replaces the nft table in one transaction. Where only prefixes differ, only the elements of its sets change.
    ReplaceFirewall(Box<Firewall>),
    /// Adds a route, or replaces the one with the same key in place.
    ReplaceRoute {
        /// The kernel's key.
        key: RouteKey,
        /// What it should be.
        route: Route,
    },
    /// Adds a rule.
    AddRule(Rule),
    /// Deletes a rule.
    DeleteRule(Rule),
    /// Deletes a route.
    DeleteRoute(RouteKey),
    /// Deletes an address of the tunnel's link.
    DeleteAddress {
        /// The link.
        dev: String,
        /// The address.
        address: IpNet,
    },
    /// Sets the tunnel's link down.
    SetDown {
        /// The link.
        name: String,
    },
    /// Deletes the tunnel's link.
    DeleteLink {
        /// The link.
        name: String,
    },
    /// Deletes the nft table.
    DeleteFirewall,
}

/// A change of the tunnel device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum TunnelChange {
    /// Creates the tunnel's link, down.
    CreateLink {
        /// Its name.
        name: String,
        /// Its MTU in bytes.
        mtu: u32,
    },
    /// Makes the tunnel device listen on another UDP port.
    SetListenPort {
        /// The link.
        dev: String,
        /// The port.
        port: NonZeroU16,
    },
    /// Adds a peer to the tunnel device, or changes it.
    SetPeer {
        /// The link.
        dev: String,
        /// The peer.
        id: PeerId,
        /// The peer's present key, if it is another one.
        replaced: Option<PublicKey>,
        /// What it should be.
        peer: Box<PeerConfig>,
    },
    /// Removes a peer from the tunnel device.
    RemovePeer {
        /// The link.
        dev: String,
        /// The peer.
        id: PeerId,
        /// Its key.
        key: PublicKey,
    },
}

/// Returns the changes in the order they must be applied.
///
/// Additions come before deletions, so that every destination has a route in between:
///
/// 1. The link, its addresses and peers come before the routes that need them. The kernel refuses a
///    route through a link that is down and a preferred source that is not an address of the host;
///    an IPv6 address is only usable once its link is up.
/// 2. The firewall comes before the first route, so no packet of a new route is translated or leaks in
///    between. The agent applies the firewall on a thread of its own, and holds back the changes that must
///    wait for it ([`crate::reconciler::core`]).
/// 3. A route whose key stays is replaced in place: followers move to a new leader without an interruption. The
///    `throw` route of a prefix comes before the wider prefix that would take its packets.
/// 4. Routes come before the rules that lead to them, so no look-up sees half a table.
/// 5. Deletions come in the opposite order: a backstop before the route that it stands behind, or it would refuse
///    the packets of a destination that moved to another table. A link is set down only when no remaining route leads
///    through it (the kernel flushes the others), and the last IPv4 address is never deleted while such a route
///    exists (the kernel would flush it, in every table). Other addresses are deleted before routes are added: this
///    node's former WireGuard address may be another leader's now, and the kernel refuses an own address as a
///    gateway.
pub fn diff(observed: &State, desired: &State) -> Vec<Change> {
    let mut changes = Vec::new();
    add(observed, desired, &mut changes);
    delete(observed, desired, &mut changes);
    changes
}

fn add(observed: &State, desired: &State, changes: &mut Vec<Change>) {
    if let Some(link) = &desired.link {
        add_link(observed, desired, link, changes);
    }
    if let Some(ruleset @ Ruleset::Planned(firewall)) = &desired.firewall
        && observed.firewall.as_ref() != Some(ruleset)
    {
        changes.push(Change::Kernel(KernelChange::ReplaceFirewall(
            firewall.clone(),
        )));
    }
    let routes = |throw: bool| {
        let is_new = move |(key, route): &(&RouteKey, &Route)| {
            (**route == Route::Throw) == throw && observed.routes.get(*key) != Some(route)
        };
        let replace = |(&key, route): (&RouteKey, &Route)| {
            Change::Kernel(KernelChange::ReplaceRoute {
                key,
                route: route.clone(),
            })
        };
        desired.routes.iter().filter(is_new).map(replace)
    };
    changes.extend(routes(true));
    changes.extend(routes(false));
    let rules = desired.rules.difference(&observed.rules);
    changes.extend(
        rules
            .cloned()
            .map(|it| Change::Kernel(KernelChange::AddRule(it))),
    );
}

/// Adds the link, with its addresses, the device's port and its peers.
fn add_link(observed: &State, desired: &State, link: &Link, changes: &mut Vec<Change>) {
    // A link of another name is another link, which inherits nothing from the old one.
    let (nothing, name) = (State::default(), || link.name.clone());
    let old = if same_link(observed, desired) {
        observed
    } else {
        &nothing
    };
    match &old.link {
        None => changes.push(Change::Tunnel(TunnelChange::CreateLink {
            name: name(),
            mtu: link.mtu,
        })),
        Some(old) if old.mtu != link.mtu => changes.push(Change::Kernel(KernelChange::SetMtu {
            name: name(),
            mtu: link.mtu,
        })),
        Some(_) => {}
    }
    changes.extend(
        desired
            .sysctls
            .iter()
            .filter(|(path, value)| old.sysctls.get(*path) != Some(value))
            .map(|(path, value)| {
                Change::Kernel(KernelChange::SetSysctl {
                    path: path.clone(),
                    value: value.clone(),
                })
            }),
    );
    if link.up && !old.link.as_ref().is_some_and(|old| old.up) {
        changes.push(Change::Kernel(KernelChange::SetUp { name: name() }));
    }
    for (&address, &scope) in &desired.addresses {
        let dev = name();
        match old.addresses.get(&address) {
            Some(old) if *old == scope => continue,
            // Another program added it. A scope cannot be changed, so the address is replaced. If it is the last one,
            // the next pass restores the routes that the kernel flushes.
            Some(_) => changes.push(Change::Kernel(KernelChange::DeleteAddress { dev, address })),
            None => {}
        }
        changes.push(Change::Kernel(KernelChange::AddAddress {
            dev: name(),
            address,
            scope,
        }));
    }
    changes.extend(
        stale(old, desired)
            .filter(|a| !is_last(a, desired))
            .map(|address| {
                Change::Kernel(KernelChange::DeleteAddress {
                    dev: name(),
                    address,
                })
            }),
    );
    if let Some(port) = desired.listen_port
        && old.listen_port != desired.listen_port
    {
        changes.push(Change::Tunnel(TunnelChange::SetListenPort {
            dev: name(),
            port,
        }));
    }
    let changed = |(id, peer): &(&PeerId, &PeerConfig)| old.peers.get(*id) != Some(peer);
    let changed = by_key(desired.peers.iter().filter(changed));
    changes.extend(changed.map(|(id, peer)| {
        let before = old.peers.get(id).map(|before| before.public_key);
        Change::Tunnel(TunnelChange::SetPeer {
            dev: name(),
            id: id.clone(),
            replaced: before.filter(|key| *key != peer.public_key),
            peer: Box::new(peer.clone()),
        })
    }));
}

fn delete(observed: &State, desired: &State, changes: &mut Vec<Change>) {
    let rules = observed.rules.difference(&desired.rules);
    changes.extend(
        rules
            .cloned()
            .map(|it| Change::Kernel(KernelChange::DeleteRule(it))),
    );
    let routes = |throw: bool| {
        let is_old = move |(key, route): &(&RouteKey, &Route)| {
            (**route == Route::Throw) == throw && !desired.routes.contains_key(*key)
        };
        let delete = |(&key, _)| Change::Kernel(KernelChange::DeleteRoute(key));
        observed.routes.iter().rev().filter(is_old).map(delete)
    };
    changes.extend(routes(false));
    changes.extend(routes(true));
    if let Some(link) = &observed.link {
        delete_link(observed, desired, link, changes);
    }
    if observed.firewall.is_some() && desired.firewall.is_none() {
        changes.push(Change::Kernel(KernelChange::DeleteFirewall));
    }
}

fn delete_link(observed: &State, desired: &State, link: &Link, changes: &mut Vec<Change>) {
    let name = || link.name.clone();
    if !same_link(observed, desired) {
        // The kernel deletes everything else with it.
        changes.push(Change::Kernel(KernelChange::DeleteLink { name: name() }));
        return;
    }
    let removed = observed.peers.iter();
    let removed = by_key(removed.filter(|(id, _)| !desired.peers.contains_key(*id)));
    changes.extend(removed.map(|(id, peer)| {
        Change::Tunnel(TunnelChange::RemovePeer {
            dev: name(),
            id: id.clone(),
            key: peer.public_key,
        })
    }));
    changes.extend(
        stale(observed, desired)
            .filter(|address| is_last(address, desired))
            .map(|address| {
                Change::Kernel(KernelChange::DeleteAddress {
                    dev: name(),
                    address,
                })
            }),
    );
    if link.up && desired.link.as_ref().is_some_and(|new| !new.up) {
        changes.push(Change::Kernel(KernelChange::SetDown { name: name() }));
    }
}

/// Peers in the order of their keys, as `wg` lists them.
fn by_key<'a>(
    peers: impl Iterator<Item = (&'a PeerId, &'a PeerConfig)>,
) -> impl Iterator<Item = (&'a PeerId, &'a PeerConfig)> {
    let mut peers: Vec<_> = peers.collect();
    peers.sort_by_key(|(_, peer)| peer.public_key);
    peers.into_iter()
}

/// The addresses to delete.
fn stale<'a>(observed: &'a State, desired: &'a State) -> impl Iterator<Item = IpNet> + 'a {
    let addresses = observed.addresses.keys().copied();
    addresses.filter(|address| !desired.addresses.contains_key(address))
}

/// Whether no address of the family remains.
fn is_last(address: &IpNet, desired: &State) -> bool {
    let v6 = address.addr().is_ipv6();
    let mut stay = desired.addresses.keys();
    !stay.any(|other| other.addr().is_ipv6() == v6)
}

fn same_link(observed: &State, desired: &State) -> bool {
    match (&observed.link, &desired.link) {
        (Some(old), Some(new)) => old.name == new.name,
        (None, _) | (_, None) => false,
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel(change) => change.fmt(f),
            Self::Tunnel(change) => change.fmt(f),
        }
    }
}

impl fmt::Display for KernelChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetMtu { name, mtu } => write!(f, "ip link set {name} mtu {mtu}"),
            Self::SetSysctl { path, value } => write!(f, "sysctl -w {path}={value}"),
            Self::SetUp { name } => write!(f, "ip link set {name} up"),
            Self::AddAddress {
                dev,
                address,
                scope,
            } => {
                write!(f, "ip addr add {address} dev {dev}")?;
                match scope {
                    Scope::Global => Ok(()),
                    Scope::Link => f.write_str(" scope link"),
                }
            }
            Self::ReplaceFirewall(_) => f.write_str("nft -f -"),
            Self::ReplaceRoute { key, route } => {
                write!(f, "{}", RouteCommand("replace", key, Some(route)))
            }
            Self::AddRule(rule) => write!(f, "ip {}rule add {rule}", family(rule.v6)),
            Self::DeleteRule(rule) => write!(f, "ip {}rule del {rule}", family(rule.v6)),
            Self::DeleteRoute(key) => write!(f, "{}", RouteCommand("del", key, None)),
            Self::DeleteAddress { dev, address } => write!(f, "ip addr del {address} dev {dev}"),
            Self::SetDown { name } => write!(f, "ip link set {name} down"),
            Self::DeleteLink { name } => write!(f, "ip link del {name}"),
            Self::DeleteFirewall => f.write_str("nft delete table inet selvedge"),
        }
    }
}

impl fmt::Display for TunnelChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CreateLink { name, mtu } => {
                write!(
                    f,
                    "ip tuntap add {name} mode tun; ip link set {name} mtu {mtu}"
                )
            }
            Self::SetListenPort { dev, port } => write!(f, "wg set {dev} listen-port {port}"),
            Self::SetPeer {
                dev,
                replaced,
                peer,
                ..
            } => {
                write!(f, "wg set {dev}")?;
                if let Some(key) = replaced {
                    write!(f, " peer {key} remove")?;
                }
                write!(f, " peer {}{peer}", peer.public_key)
            }
            Self::RemovePeer { dev, key, .. } => write!(f, "wg set {dev} peer {key} remove"),
        }
    }
}

/// `ip route VERB …`, with the kind of route between the verb and the destination as `ip` wants it.
struct RouteCommand<'a>(&'static str, &'a RouteKey, Option<&'a Route>);

impl fmt::Display for RouteCommand<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(verb, key, route) = self;
        let kind = match route {
            Some(Route::Unreachable) => "unreachable ",
            Some(Route::Blackhole) => "blackhole ",
            Some(Route::Throw) => "throw ",
            Some(Route::Unicast { .. }) | None => "",
        };
        let family = family(key.dst.addr().is_ipv6());
        write!(
            f,
            "ip {family}route {verb} table {} {kind}{}",
            key.table.id(),
            Destination(key.dst)
        )?;
        if let Some(route) = route {
            if key.dst.addr().is_ipv6() {
                write!(f, "{route:#}")?;
            } else {
                write!(f, "{route}")?;
            }
        }
        if key.metric != 0 {
            write!(f, " metric {}", key.metric)?;
        }
        write!(f, " proto {PROTOCOL}")
    }
}

/// A prefix as `ip` prints it: a host has no length.
struct Destination(IpNet);

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.prefix_len() == self.0.max_prefix_len() {
            write!(f, "{}", self.0.addr())
        } else {
            write!(f, "{}", self.0)
        }
    }
}

impl fmt::Display for Route {
    /// The arguments of `ip route` behind the destination. The alternate form is for IPv6 routes, whose MTU applies
    /// to forwarded packets only when it is locked.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Unicast {
            next_hops,
            src,
            mtu,
        } = self
        else {
            return Ok(());
        };
        let multipath = next_hops.len() > 1;
        for hop in next_hops {
            if multipath {
                f.write_str(" nexthop")?;
            }
            match hop.via {
                Some(IpAddr::V4(via)) => write!(f, " via {via}")?,
                Some(IpAddr::V6(via)) => write!(f, " via {via}")?,
                None => {}
            }
            write!(f, " dev {}", hop.dev)?;
            if hop.onlink {
                f.write_str(" onlink")?;
            }
        }
        if let Some(src) = src {
            write!(f, " src {src}")?;
        }
        if let Some(mtu) = mtu {
            let lock = if f.alternate() { "lock " } else { "" };
            write!(f, " mtu {lock}{mtu}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pref {}", self.priority)?;
        if self.not {
            f.write_str(" not")?;
        }
        match self.from {
            Some(from) => write!(f, " from {from}")?,
            None => f.write_str(" from all")?,
        }
        if let Some(iif) = &self.iif {
            write!(f, " iif {iif}")?;
        }
        if let Some(mark) = self.fwmark {
            write!(f, " fwmark {mark:#x}")?;
        }
        match self.table {
            MAIN => f.write_str(" lookup main")?,
            table => write!(f, " lookup {table}")?,
        }
        write!(f, " proto {PROTOCOL}")
    }
}

fn family(v6: bool) -> &'static str {
    if v6 { "-6 " } else { "" }
}
