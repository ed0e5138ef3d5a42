//! A fake kernel and a fake tunnel device.
//!
//! They refuse what the real ones refuse and flush what the real ones flush; `tests/kernel`
//! holds the agent against the real ones. Beyond that they refuse changes that change nothing: a
//! minimal list of changes has none.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use selvedge::diff::{Change, KernelChange, TunnelChange};
use selvedge::state::{Link, NextHop, Route, RouteKey, State};
use selvedge::topology::NodeName;

use crate::mesh::Mesh;

/// Longest name of a link (IFNAMSIZ without the terminator).
const MAX_NAME: usize = 15;

/// A link that is not the agent's.
#[derive(Clone, Debug)]
pub(crate) struct ForeignLink {
    pub(crate) addresses: BTreeSet<IpNet>,
}

/// The kernel of one node.
#[derive(Clone, Debug, Default)]
pub(crate) struct FakeKernel {
    /// Links of others, all up.
    pub(crate) links: BTreeMap<String, ForeignLink>,
    state: State,
}

impl FakeKernel {
    /// The kernel of a node on which flannel runs and the agent has not started yet.
    pub(crate) fn before_the_agent(mesh: &Mesh, node: &NodeName) -> Self {
        let flannel = mesh.flannel(node);
        let object = &mesh.snapshot.nodes[node];
        let underlay = object.private_ip.into_iter();
        let eth0 = underlay.chain(object.internal_ips.iter().map(|ip| IpNet::from(*ip)));
        let bridge = |pods: &IpNet| {
            let gateway = pods.hosts().next().expect("no pod network is that small");
            IpNet::new(gateway, pods.prefix_len()).expect("the length of another")
        };
        let mut links = BTreeMap::from([
            ("eth0", eth0.collect()),
            ("cni0", flannel.subnets.iter().map(bridge).collect()),
        ]);
        for vtep in &flannel.vteps {
            links.insert(&vtep.name, vtep.addresses.iter().copied().collect());
        }
        let links = links
            .into_iter()
            .map(|(name, addresses)| (name.to_owned(), ForeignLink { addresses }));
        Self {
            links: links.collect(),
            ..Self::default()
        }
    }

    /// The agent's objects.
    pub(crate) fn observe(&self) -> State {
        self.state().clone()
    }

    /// The same, to look at.
    pub(crate) fn state(&self) -> &State {
        &self.state
    }

    /// Applies a change, or returns the kernel's error.
    pub(crate) fn apply(&mut self, change: &Change) -> Result<(), String> {
        self.try_apply(change)
            .map_err(|errno| format!("{errno}: {change}"))
    }

    fn try_apply(&mut self, change: &Change) -> Result<(), &'static str> {
        let state = &mut self.state;
        match change {
            Change::Tunnel(TunnelChange::CreateLink { name, mtu }) => {
                refuse(state.link.is_some(), "the old link must be moved off first")?;
                refuse(self.links.contains_key(name), "EEXIST")?;
                refuse(name.len() > MAX_NAME, "ERANGE")?;
                state.link = Some(Link {
                    name: name.clone(),
                    mtu: *mtu,
                    up: false,
                });
            }
            Change::Kernel(KernelChange::SetMtu { name, mtu }) => {
                let link = own(state, name)?;
                refuse(link.mtu == *mtu, "redundant")?;
                link.mtu = *mtu;
            }
            Change::Kernel(KernelChange::SetSysctl { path, value }) => {
                let name = path.split('/').nth(3).ok_or("ENOENT")?;
                own(state, name)?;
                let old = state.sysctls.insert(path.clone(), value.clone());
                refuse(old.as_ref() == Some(value), "redundant")?;
            }
            Change::Kernel(KernelChange::SetUp { name }) => {
                let link = own(state, name)?;
                refuse(link.up, "redundant")?;
                link.up = true;
            }
            Change::Kernel(KernelChange::AddAddress {
                dev,
                address,
                scope,
            }) => {
                own(state, dev)?;
                let old = state.addresses.insert(*address, *scope);
                refuse(old.is_some(), "EEXIST")?;
            }
            Change::Tunnel(TunnelChange::SetListenPort { dev, port }) => {
                own(state, dev)?;
                refuse(state.listen_port == Some(*port), "redundant")?;
                state.listen_port = Some(*port);
            }
            Change::Tunnel(TunnelChange::SetPeer {
                dev,
                id,
                replaced,
                peer,
            }) => {
                own(state, dev)?;
                let old = state.peers.get(id);
                refuse(old == Some(&**peer), "redundant")?;
                let old = old.map(|old| old.public_key);
                let other_key = old.filter(|key| *key != peer.public_key);
                refuse(*replaced != other_key, "another key is replaced")?;
                // Several peers may own one prefix.
                state.peers.insert(id.clone(), (**peer).clone());
            }
            Change::Kernel(KernelChange::ReplaceFirewall(firewall)) => {
                let new = Some(selvedge::state::Ruleset::Planned(firewall.clone()));
                refuse(state.firewall == new, "redundant")?;
                state.firewall = new;
            }
            Change::Kernel(KernelChange::ReplaceRoute { key, route }) => {
                self.replace_route(*key, route)?
            }
            Change::Kernel(KernelChange::AddRule(rule)) => {
                refuse(!state.rules.insert(rule.clone()), "EEXIST")?
            }
            Change::Kernel(KernelChange::DeleteRule(rule)) => {
                refuse(!state.rules.remove(rule), "ENOENT")?
            }
            Change::Kernel(KernelChange::DeleteRoute(key)) => {
                refuse(state.routes.remove(key).is_none(), "ESRCH")?;
            }
            Change::Tunnel(TunnelChange::RemovePeer { dev, id, key }) => {
                own(state, dev)?;
                let old = state.peers.remove(id).map(|old| old.public_key);
                refuse(old != Some(*key), "redundant")?;
            }
            Change::Kernel(KernelChange::DeleteAddress { dev, address }) => {
                own(state, dev)?;
                refuse(state.addresses.remove(address).is_none(), "EADDRNOTAVAIL")?;
                self.forget_address(address);
            }
            Change::Kernel(KernelChange::SetDown { name }) => {
                let link = own(state, name)?;
                refuse(!link.up, "redundant")?;
                link.up = false;
                // The kernel deletes the IPv6 addresses of a link that is set down, and keeps the IPv4 ones.
                state
                    .addresses
                    .retain(|address, _| address.addr().is_ipv4());
                self.flush(|_| true);
            }
            Change::Kernel(KernelChange::DeleteLink { name }) => {
                own(state, name)?;
                self.flush(|_| true);
                self.state.link = None;
                self.state.addresses.clear();
                self.state.peers.clear();
                self.state.sysctls.clear();
                self.state.listen_port = None;
            }
            Change::Kernel(KernelChange::DeleteFirewall) => {
                refuse(state.firewall.take().is_none(), "ENOENT")?;
            }
        }
        Ok(())
    }

    fn replace_route(&mut self, key: RouteKey, route: &Route) -> Result<(), &'static str> {
        refuse(key.dst != key.dst.trunc(), "EINVAL: host bits")?;
        // The kernel would silently make it 1024.
        let v6 = key.dst.addr().is_ipv6();
        refuse(v6 && key.metric == 0, "EINVAL: no metric")?;
        if let Route::Unicast { next_hops, src, .. } = route {
            refuse(next_hops.is_empty(), "EINVAL: no next hop")?;
            for hop in next_hops {
                self.check_hop(hop, v6)?;
            }
            if let Some(src) = src {
                refuse(src.is_ipv6() != v6, "EINVAL: family")?;
                refuse(!self.is_local(*src), "EINVAL: not a local address")?;
            }
        }
        // One route for each destination, table and metric, of any kind.
        let old = self.state.routes.insert(key, route.clone());
        refuse(old.as_ref() == Some(route), "redundant")
    }

    fn check_hop(&self, hop: &NextHop, v6: bool) -> Result<(), &'static str> {
        let foreign = self.links.get(&hop.dev);
        let own = self.state.link.as_ref().filter(|l| l.name == hop.dev);
        refuse(foreign.is_none() && own.is_none(), "ENODEV")?;
        refuse(own.is_some_and(|link| !link.up), "ENETDOWN")?;
        let Some(via) = hop.via else {
            return refuse(hop.onlink, "EINVAL: onlink without a gateway");
        };
        refuse(via.is_ipv6() != v6, "EINVAL: family")?;
        refuse(self.is_local(via), "EINVAL: the gateway is this host")?;
        let on_link = foreign.is_some_and(|link| {
            let mut addresses = link.addresses.iter();
            addresses.any(|address| address.contains(&via))
        });
        refuse(!hop.onlink && !on_link, "ENETUNREACH")
    }

    /// Whether an address is this host's. An IPv4 address counts on any link, up or down; an IPv6
    /// one only once its link is up.
    fn is_local(&self, ip: IpAddr) -> bool {
        let foreign = self.links.values().flat_map(|link| &link.addresses);
        let usable = ip.is_ipv4() || self.state.link.as_ref().is_some_and(|link| link.up);
        let own = self.state.addresses.keys().filter(|_| usable);
        foreign.chain(own).any(|address| address.addr() == ip)
    }

    fn forget_address(&mut self, address: &IpNet) {
        let v4 = address.addr().is_ipv4();
        let state = &mut self.state;
        let last = !state.addresses.keys().any(|other| other.addr().is_ipv4());
        if v4 && last {
            // In every table, not only in main.
            self.flush(|dst| dst.addr().is_ipv4());
            return;
        }
        if v4 {
            // Outside of table main a route keeps a source that was deleted.
            return;
        }
        let name = self.state.link.as_ref().map(|link| link.name.clone());
        for route in self.state.routes.values_mut() {
            if let Route::Unicast { next_hops, src, .. } = route
                && *src == Some(address.addr())
                && next_hops.iter().any(|hop| Some(&hop.dev) == name.as_ref())
            {
                *src = None;
            }
        }
    }

    /// Deletes the routes through the agent's link.
    fn flush(&mut self, matches: impl Fn(&IpNet) -> bool) {
        let Some(name) = self.state.link.as_ref().map(|link| link.name.clone()) else {
            return;
        };
        self.state.routes.retain(|key, route| match route {
            Route::Unicast { next_hops, .. } => {
                !(matches(&key.dst) && next_hops.iter().any(|hop| hop.dev == name))
            }
            Route::Unreachable | Route::Blackhole | Route::Throw => true,
        });
    }
}

fn own<'a>(state: &'a mut State, name: &str) -> Result<&'a mut Link, &'static str> {
    let link = state.link.as_mut().filter(|link| link.name == name);
    link.ok_or("ENODEV")
}

fn refuse(refused: bool, errno: &'static str) -> Result<(), &'static str> {
    if refused { Err(errno) } else { Ok(()) }
}
