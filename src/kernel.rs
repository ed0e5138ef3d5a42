//! Reads and changes the kernel: the only caller of netlink, nft and sysctl.
//!
//! [`Kernel::observe`] reads what the agent owns, [`Kernel::apply`] makes one change of a diff; both
//! are idempotent and remember nothing that the kernel can tell. The tunnel's port and peers are not
//! the kernel's business but the device's ([`crate::wireguard`]).
//!
//! Calls block for as long as the kernel takes: microseconds a route, some milliseconds where `nft`
//! runs. They work in the network namespace of the thread that opened the [`Kernel`], and must be
//! made from threads of the same.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "netlink's messages and attributes are many and get more; each function wants a few"
)]

mod guard;
pub mod heal;
mod host;
mod link;
mod list;
mod monitor;
mod netlink;
mod nfnetlink;
pub mod nft;
mod others;
mod ownership;
pub(crate) mod program;
mod route;
mod rule;
mod ruleset;
mod sysctl;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, anyhow};
use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;

pub use self::guard::guard;
use self::heal::{FlannelState, Repair};
pub use self::host::{LocalAddress, Path, Uplink};
pub use self::monitor::{Event, Monitor, read_news};
use self::netlink::{Netlink, Refused};
pub use self::ownership::KilosRemains;
pub use self::ruleset::Counters;
use self::ruleset::Rulesets;
pub use self::sysctl::ipv6_is_off;
use crate::diff::Change;
use crate::flannel::Vtep;
use crate::state::{Link, Route, RouteKey, Ruleset, Scope, State, Table};

/// The kernel of this node, in one network namespace.
#[derive(Debug)]
pub struct Kernel {
    /// The name of the tunnel's link.
    interface: String,
    route: Mutex<Netlink>,
    rulesets: Mutex<Rulesets>,
}

impl Kernel {
    /// Opens the sockets; `interface` is the tunnel's link, whether or not it exists yet.
    pub fn open(interface: &str) -> anyhow::Result<Self> {
        let route = Netlink::open(NETLINK_ROUTE).context("opening a socket to rtnetlink")?;
        Ok(Self {
            interface: interface.to_owned(),
            route: Mutex::new(route),
            rulesets: Mutex::new(Rulesets::open()?),
        })
    }

    /// Reads everything the agent owns, but for the tunnel's port and peers.
    ///
    /// All routes in the agent's tables are its own, whoever made them; rules are by their protocol
    /// number.
    pub fn observe(&self) -> anyhow::Result<State> {
        let mut netlink = self.netlink();
        let links = list::links(&mut netlink)?;
        // A link of another kind is not ours; the check at the start says so.
        let own = links
            .iter()
            .find(|link| link.name == self.interface && link.is_tun());
        let addresses = match own {
            Some(own) => list::addresses(&mut netlink, own.index)?
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
        let rules = list::rules(&mut netlink)?
            .into_iter()
            .filter(rule::Found::is_ours)
            .filter_map(|found| found.rule)
            .collect();
        drop(netlink);
        Ok(State {
            link: own.map(|own| Link {
                name: own.name.clone(),
                mtu: own.mtu,
                up: own.up,
            }),
            addresses,
            routes,
            rules,
            firewall: self.rulesets().observe()?.map(Ruleset::Installed),
            sysctls: own.map(sysctl::of).unwrap_or_default(),
            ..State::default()
        })
    }

    /// Makes one change. It is no error if all is already so.
    pub fn apply(&self, change: &Change) -> anyhow::Result<()> {
        match self.apply_all(std::slice::from_ref(change)).pop() {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }

    /// Makes changes in their order and returns those that failed; one that fails does not keep
    /// those behind it from being made.
    ///
    /// Many routes in a row cost one exchange with the kernel.
    pub fn apply_all<'a>(&self, changes: &'a [Change]) -> Vec<(&'a Change, anyhow::Error)> {
        let mut failed = Vec::new();
        let mut rest = changes;
        while let Some(first) = rest.first() {
            let length = if is_netlink(first) {
                rest.iter().take_while(|change| is_netlink(change)).count()
            } else {
                1
            };
            let (run, after) = rest.split_at(length);
            rest = after;
            if is_netlink(first) {
                failed.extend(self.apply_run(run));
            } else if let Err(error) = self.apply_other(first) {
                failed.push((first, error));
            }
        }
        failed
    }

    /// Reads what flannel has in the kernel; routes only those to prefixes inside `networks`.
    pub fn flannel(&self, networks: &[IpNet]) -> anyhow::Result<FlannelState> {
        let mut netlink = self.netlink();
        let links = list::links(&mut netlink)?;
        let addresses = list::addresses(&mut netlink, 0)?;
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
            for message in list::flannel_routes(&mut netlink, v6)? {
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
            for (index, ip, mac) in list::neighbours(&mut netlink, vtep.index)? {
                state.neighbours.insert((index, ip), mac);
            }
            for (index, ip, mac) in list::forwarding(&mut netlink, vtep.index)? {
                state.forwarding.entry((index, mac)).or_default().insert(ip);
            }
        }
        state.vteps = vteps;
        Ok(state)
    }

    /// Makes repairs and returns those that failed.
    pub fn heal<'a>(&self, repairs: &'a [Repair]) -> Vec<(&'a Repair, anyhow::Error)> {
        let requests = repairs
            .iter()
            .map(|repair| (heal::to_message(repair), heal::flags(repair)))
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

    /// What the agent's nft table has counted.
    pub fn counters(&self) -> anyhow::Result<Counters> {
        self.rulesets().counters()
    }

    /// Makes a run of changes that are all netlink messages.
    fn apply_run<'a>(&self, run: &'a [Change]) -> Vec<(&'a Change, anyhow::Error)> {
        let mut netlink = self.netlink();
        let mut failed = Vec::new();
        let mut asked = Vec::new();
        let mut requests = Vec::new();
        let indexes = indexes(&mut netlink, run);
        for change in run {
            match request(change, &indexes) {
                Ok(Some(request)) => {
                    asked.push(change);
                    requests.push(request);
                }
                // Nothing to delete it from.
                Ok(None) => {}
                Err(error) => failed.push((change, error)),
            }
        }
        let results = netlink.change_all(requests);
        for (change, result) in asked.into_iter().zip(results) {
            if let Err(refused) = result
                && !is_done(change, &refused)
            {
                failed.push((change, refused.into()));
            }
        }
        failed
    }

    fn apply_other(&self, change: &Change) -> anyhow::Result<()> {
        match change {
            Change::ReplaceFirewall(firewall) => self.rulesets().replace(firewall),
            Change::DeleteFirewall => self.rulesets().delete(),
            Change::SetSysctl { path, value } => self.set_sysctl(path, value),
            other => Err(anyhow!("this is for the tunnel device: {other}")),
        }
    }

    fn set_sysctl(&self, path: &str, value: &str) -> anyhow::Result<()> {
        let key = sysctl::key(path, &self.interface)?;
        let mut netlink = self.netlink();
        let index = list::index(&mut netlink, &self.interface)?
            .with_context(|| format!("there is no link {}", self.interface))?;
        let message = link::to_sysctl(index, &key, value)
            .with_context(|| format!("{} is no value for it", crate::text::quote(value)))?;
        netlink.change(RouteNetlinkMessage::SetLink(message), 0)?;
        Ok(())
    }

    fn netlink(&self) -> MutexGuard<'_, Netlink> {
        // Sockets stay usable whatever happened to the thread that held them.
        self.route.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rulesets(&self) -> MutexGuard<'_, Rulesets> {
        self.rulesets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a change is one netlink message.
fn is_netlink(change: &Change) -> bool {
    match change {
        Change::SetMtu { .. }
        | Change::SetUp { .. }
        | Change::SetDown { .. }
        | Change::DeleteLink { .. }
        | Change::AddAddress { .. }
        | Change::DeleteAddress { .. }
        | Change::ReplaceRoute { .. }
        | Change::DeleteRoute(_)
        | Change::AddRule(_)
        | Change::DeleteRule(_) => true,
        Change::CreateLink { .. }
        | Change::SetSysctl { .. }
        | Change::SetListenPort { .. }
        | Change::SetPeer { .. }
        | Change::RemovePeer { .. }
        | Change::ReplaceFirewall(_)
        | Change::DeleteFirewall => false,
    }
}

/// The message that makes a change, and its flags; `None` where there is nothing left to delete.
fn request(
    change: &Change,
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
        Change::SetMtu { name, mtu } => (Message::SetLink(link::to_mtu(index(name)?, *mtu)), 0),
        Change::SetUp { name } => (Message::SetLink(link::to_up(index(name)?, true)), 0),
        Change::AddAddress {
            dev,
            address,
            scope,
        } => (
            Message::NewAddress(link::to_address(index(dev)?, *address, *scope)),
            NLM_F_CREATE | NLM_F_EXCL,
        ),
        Change::ReplaceRoute { key, route } => (
            Message::NewRoute(route::to_message(key, route, indexes)?),
            NLM_F_CREATE | NLM_F_REPLACE,
        ),
        Change::AddRule(rule) => (
            Message::NewRule(rule::to_message(rule)),
            NLM_F_CREATE | NLM_F_EXCL,
        ),
        Change::DeleteRule(rule) => (Message::DelRule(rule::to_message(rule)), 0),
        Change::DeleteRoute(key) => (Message::DelRoute(route::to_key_message(key)), 0),
        Change::DeleteAddress { dev, address } => {
            let Some(&index) = indexes.get(dev) else {
                return Ok(None);
            };
            let message = link::to_address(index, *address, Scope::Global);
            (Message::DelAddress(message), 0)
        }
        Change::SetDown { name } | Change::DeleteLink { name } => {
            let Some(&index) = indexes.get(name) else {
                return Ok(None);
            };
            match change {
                Change::SetDown { .. } => (Message::SetLink(link::to_up(index, false)), 0),
                _ => (Message::DelLink(link::to_index(index)), 0),
            }
        }
        other => return Err(anyhow!("this is no netlink message: {other}")),
    };
    Ok(Some(request))
}

/// Whether a refusal only says that all is already as the change wants it.
fn is_done(change: &Change, refused: &Refused) -> bool {
    match (change, refused.errno()) {
        // The link has the address; the same rule is there.
        (Change::AddAddress { .. } | Change::AddRule(_), libc::EEXIST) => true,
        // No such route; no such table (IPv4); the link it led through is gone.
        (Change::DeleteRoute(_), libc::ESRCH | libc::ENOENT | libc::ENODEV) => true,
        // No such rule; no IPv6 in this kernel.
        (Change::DeleteRule(_), libc::ENOENT | libc::EAFNOSUPPORT) => true,
        // The link does not have the address; the link is gone.
        (Change::DeleteAddress { .. }, libc::EADDRNOTAVAIL | libc::ENODEV) => true,
        // The link is gone.
        (Change::SetDown { .. } | Change::DeleteLink { .. }, libc::ENODEV) => true,
        _ => false,
    }
}

/// The indexes of the links that changes name. One that does not exist is left out.
fn indexes(netlink: &mut Netlink, changes: &[Change]) -> route::Indexes {
    let mut names = BTreeSet::new();
    for change in changes {
        match change {
            Change::SetMtu { name, .. }
            | Change::SetUp { name }
            | Change::SetDown { name }
            | Change::DeleteLink { name } => {
                names.insert(name);
            }
            Change::AddAddress { dev, .. } | Change::DeleteAddress { dev, .. } => {
                names.insert(dev);
            }
            Change::ReplaceRoute {
                route: Route::Unicast { next_hops, .. },
                ..
            } => names.extend(next_hops.iter().map(|hop| &hop.dev)),
            _ => {}
        }
    }
    names
        .into_iter()
        .filter_map(|name| Some((name.clone(), list::index(netlink, name).ok()??)))
        .collect()
}

/// The routes in the agent's own tables.
fn routes(
    netlink: &mut Netlink,
    names: &route::Names,
) -> anyhow::Result<BTreeMap<RouteKey, Route>> {
    let mut routes = BTreeMap::new();
    for (table, v6) in Table::ALL.into_iter().flat_map(|t| [(t, false), (t, true)]) {
        let messages = list::routes(netlink, v6, table.id())?;
        routes.extend(
            messages
                .iter()
                .filter_map(|message| route::from_message(message, names)),
        );
    }
    Ok(routes)
}
