//! Reads and makes what rtnetlink carries: links, their addresses and sysctls, routes, rules, and
//! flannel's entries.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, anyhow};
use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;

use super::flannel_repair::{self, FlannelState, Repair};
use super::netlink::{Netlink, Refused};
use super::{dump, link, route, rule, sysctl};
use crate::diff::KernelChange;
use crate::flannel::Vtep;
use crate::state::{Link, Route, RouteKey, Scope, State, Table};

/// The part of the kernel that answers rtnetlink, in one network namespace.
///
/// A call takes microseconds a route and never runs a program.
#[derive(Debug)]
pub struct Rtnetlink {
    /// The name of the tunnel's link.
    pub(super) interface: String,
    socket: Mutex<Netlink>,
}

impl Rtnetlink {
    /// Opens the socket; `interface` is the tunnel's link, whether or not it exists yet.
    ///
    /// # Errors
    ///
    /// Where the kernel gives no netlink socket.
    pub fn open(interface: &str) -> anyhow::Result<Self> {
        let socket = Netlink::open(NETLINK_ROUTE).context("opening a socket to rtnetlink")?;
        Ok(Self {
            interface: interface.to_owned(),
            socket: Mutex::new(socket),
        })
    }

    /// Reads everything the agent owns, but for the nft table and the tunnel's port and peers.
    ///
    /// Every route in the agent's tables counts as its own, whichever program made it; a rule does by its
    /// protocol number.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses a listing.
    pub fn observe(&self) -> anyhow::Result<State> {
        let mut netlink = self.netlink();
        let links = dump::links(&mut netlink)?;
        // A link of another kind is not the agent's; `check` refuses it at the start.
        let own = links
            .iter()
            .find(|link| link.name == self.interface && link.is_tun());
        let addresses = match own {
            Some(own) => dump::addresses(&mut netlink, own.index)?
                .into_iter()
                .filter(|address| !address.link_local)
                .map(|address| (address.net, address.scope))
                .collect(),
            None => BTreeMap::new(),
        };
        let names = links
            .iter()
            .map(|link| (link.index, link.name.clone()))
            .collect();
        let routes = routes(&mut netlink, &names)?;
        let rules = dump::rules(&mut netlink)?
            .into_iter()
            .filter(rule::Found::is_ours)
            .filter_map(|found| found.rule)
            .collect();
        Ok(State {
            link: own.map(|own| Link {
                name: own.name.clone(),
                mtu: own.mtu,
                up: own.up,
            }),
            addresses,
            routes,
            rules,
            sysctls: own.map(sysctl::of).unwrap_or_default(),
            ..State::default()
        })
    }

    /// Makes one change. It is no error if all is already so.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses it, and for a change of the nft table or of the tunnel device.
    pub fn apply(&self, change: &KernelChange) -> anyhow::Result<()> {
        match self.apply_all(&[change]).pop() {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }

    /// Makes changes in their order and returns those that failed. One that fails does not keep
    /// those behind it from being made.
    ///
    /// Many routes in a row cost one exchange with the kernel.
    pub fn apply_all<'a>(
        &self,
        changes: &[&'a KernelChange],
    ) -> Vec<(&'a KernelChange, anyhow::Error)> {
        let mut netlink = self.netlink();
        let mut failed = Vec::new();
        let mut requested = Vec::new();
        let mut requests = Vec::new();
        let indexes = self.indexes(&mut netlink, changes);
        for &change in changes {
            match self.request(change, &indexes) {
                Ok(Some(request)) => {
                    requested.push(change);
                    requests.push(request);
                }
                // The link is gone, and with it what the change deletes.
                Ok(None) => {}
                Err(error) => failed.push((change, error)),
            }
        }
        let results = netlink.change_all(requests);
        for (change, result) in requested.into_iter().zip(results) {
            if let Err(refused) = result
                && !is_done(change, &refused)
            {
                failed.push((change, refused.into()));
            }
        }
        failed
    }

    /// Reads what flannel has in the kernel; routes only those to prefixes inside `networks`.
    pub fn flannel(&self, networks: &[IpNet]) -> anyhow::Result<FlannelState> {
        let mut netlink = self.netlink();
        let links = dump::links(&mut netlink)?;
        let addresses = dump::addresses(&mut netlink, 0)?;
        let vteps: Vec<Vtep> = links
            .iter()
            .filter_map(|link| link.to_vtep(&addresses, &links))
            .collect();
        let names = links
            .iter()
            .map(|link| (link.index, link.name.clone()))
            .collect();
        let mut state = FlannelState::default();
        for v6 in [false, true] {
            for message in dump::flannel_routes(&mut netlink, v6)? {
                let hops = route::next_hops(&message, &names);
                if let Some(dst) = route::destination(&message)
                    && networks.iter().any(|net| net.contains(&dst))
                    && let [hop] = &Vec::from_iter(hops)[..]
                {
                    state.next_hops.insert(dst, hop.clone());
                }
            }
        }
        for vtep in &vteps {
            for (index, ip, mac) in dump::neighbours(&mut netlink, vtep.index)? {
                state.neighbours.insert((index, ip), mac);
            }
            for (index, ip, mac) in dump::forwarding(&mut netlink, vtep.index)? {
                state.forwarding.entry((index, mac)).or_default().insert(ip);
            }
        }
        state.vteps = vteps;
        Ok(state)
    }

    /// Makes repairs and returns those that failed.
    pub fn repair<'a>(&self, repairs: &'a [Repair]) -> Vec<(&'a Repair, anyhow::Error)> {
        let requests = repairs
            .iter()
            .map(|repair| {
                (
                    flannel_repair::to_message(repair),
                    flannel_repair::flags(repair),
                )
            })
            .collect();
        let results = self.netlink().change_all(requests);
        repairs
            .iter()
            .zip(results)
            .filter_map(|(repair, result)| match result {
                Ok(()) => None,
                // flannel was quicker.
                Err(refused) if refused.errno() == libc::EEXIST => None,
                Err(refused) => Some((repair, refused.into())),
            })
            .collect()
    }

    /// The message that makes a change, and its flags; `None` where there is nothing left to delete.
    fn request(
        &self,
        change: &KernelChange,
        indexes: &route::Indexes,
    ) -> anyhow::Result<Option<(RouteNetlinkMessage, u16)>> {
        use RouteNetlinkMessage as Message;

        let index = |name: &str| {
            indexes
                .get(name)
                .copied()
                .with_context(|| format!("there is no link {}", crate::text::quote(name)))
        };
        let request = match change {
            KernelChange::SetMtu { name, mtu } => {
                (Message::SetLink(link::to_mtu(index(name)?, *mtu)), 0)
            }
            KernelChange::SetUp { name } => (Message::SetLink(link::to_up(index(name)?, true)), 0),
            KernelChange::AddAddress {
                dev,
                address,
                scope,
            } => (
                Message::NewAddress(link::to_address(index(dev)?, *address, *scope)),
                NLM_F_CREATE | NLM_F_EXCL,
            ),
            KernelChange::ReplaceRoute { key, route } => (
                Message::NewRoute(route::to_message(key, route, indexes)?),
                NLM_F_CREATE | NLM_F_REPLACE,
            ),
            KernelChange::SetSysctl { path, value } => {
                let key = sysctl::key(path, &self.interface)?;
                let message = link::to_sysctl(index(&self.interface)?, &key, value)
                    .with_context(|| format!("{} is no value for it", crate::text::quote(value)))?;
                (Message::SetLink(message), 0)
            }
            KernelChange::AddRule(rule) => (
                Message::NewRule(rule::to_message(rule)),
                NLM_F_CREATE | NLM_F_EXCL,
            ),
            KernelChange::DeleteRule(rule) => (Message::DelRule(rule::to_message(rule)), 0),
            KernelChange::DeleteRoute(key) => (Message::DelRoute(route::to_key_message(key)?), 0),
            KernelChange::DeleteAddress { dev, address } => {
                let Some(&index) = indexes.get(dev) else {
                    return Ok(None);
                };
                let message = link::to_address(index, *address, Scope::Global);
                (Message::DelAddress(message), 0)
            }
            KernelChange::SetDown { name } | KernelChange::DeleteLink { name } => {
                let Some(&index) = indexes.get(name) else {
                    return Ok(None);
                };
                match change {
                    KernelChange::SetDown { .. } => {
                        (Message::SetLink(link::to_up(index, false)), 0)
                    }
                    _ => (Message::DelLink(link::to_index(index)), 0),
                }
            }
            other => return Err(anyhow!("rtnetlink does not make this change: {other}")),
        };
        Ok(Some(request))
    }

    /// The indexes of the links that changes name. One that does not exist is left out.
    fn indexes(&self, netlink: &mut Netlink, changes: &[&KernelChange]) -> route::Indexes {
        let mut names = BTreeSet::new();
        for change in changes {
            match change {
                KernelChange::SetMtu { name, .. }
                | KernelChange::SetUp { name }
                | KernelChange::SetDown { name }
                | KernelChange::DeleteLink { name } => {
                    names.insert(name);
                }
                KernelChange::SetSysctl { .. } => {
                    names.insert(&self.interface);
                }
                KernelChange::AddAddress { dev, .. } | KernelChange::DeleteAddress { dev, .. } => {
                    names.insert(dev);
                }
                KernelChange::ReplaceRoute {
                    route: Route::Unicast { next_hops, .. },
                    ..
                } => names.extend(next_hops.iter().map(|hop| &hop.dev)),
                _ => {}
            }
        }
        names
            .into_iter()
            .filter_map(|name| Some((name.clone(), dump::index(netlink, name).ok()??)))
            .collect()
    }

    pub(super) fn netlink(&self) -> MutexGuard<'_, Netlink> {
        // The socket stays usable after a panic of the thread that held it.
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a refusal means that the change is already made.
fn is_done(change: &KernelChange, refused: &Refused) -> bool {
    match (change, refused.errno()) {
        // The link has the address; the same rule is there.
        (KernelChange::AddAddress { .. } | KernelChange::AddRule(_), libc::EEXIST) => true,
        // No such route; no such table (IPv4); the link it led through is gone.
        (KernelChange::DeleteRoute(_), libc::ESRCH | libc::ENOENT | libc::ENODEV) => true,
        // No such rule; no IPv6 in this kernel.
        (KernelChange::DeleteRule(_), libc::ENOENT | libc::EAFNOSUPPORT) => true,
        // The link does not have the address; the link is gone.
        (KernelChange::DeleteAddress { .. }, libc::EADDRNOTAVAIL | libc::ENODEV) => true,
        // The link is gone.
        (KernelChange::SetDown { .. } | KernelChange::DeleteLink { .. }, libc::ENODEV) => true,
        _ => false,
    }
}

/// The routes in the agent's own tables.
fn routes(
    netlink: &mut Netlink,
    names: &route::Names,
) -> anyhow::Result<BTreeMap<RouteKey, Route>> {
    let mut routes = BTreeMap::new();
    for (table, v6) in Table::ALL.into_iter().flat_map(|t| [(t, false), (t, true)]) {
        let messages = dump::routes(netlink, v6, table.id())?;
        routes.extend(
            messages
                .iter()
                .filter_map(|message| route::from_message(message, names)),
        );
    }
    Ok(routes)
}
