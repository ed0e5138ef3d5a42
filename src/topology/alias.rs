//! Aliases: addresses from a pool (`--alias-cidr`) by which other regions reach nodes whose own address means
//! something else to them.
//!
//! Private regions choose their networks on their own, so two may have the same. A node needs an alias where its
//! address is another node's too, or lies in a network of another region. A node keeps the alias that it published,
//! also when the need ends: other programs may have written it down. Its operator ends it by deleting the annotation,
//! and gives one to any node by writing it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::address::{is_host_of, nth};
use super::claims::{Accepted, Claims, pod_address};
use super::excluded::{Conflict, Field, Object, Overlap, Reason};
use super::{Claim, Node, NodeName, SegmentName, Settings};

/// The aliases of a node, each with the node's own address.
pub(super) type Aliases = BTreeMap<NodeName, BTreeMap<IpAddr, IpAddr>>;

/// Gives out the aliases, and reports which address of which node needs one.
///
/// A requested alias is given to the node that requests it; of two equal requests the older claim wins. Then the nodes
/// that need one get the lowest free ones, by name. So agents with the same view agree, and where two agents decided at
/// the same time, the ledger does.
pub(super) fn aliases(claims: &mut Claims<'_>, settings: &Settings) -> Aliases {
    let mut aliases = Aliases::new();
    if settings.alias_pools.is_empty() {
        return aliases;
    }
    let conflicts = conflicts(claims);
    for v6 in [false, true] {
        let pools = settings.alias_pools.iter();
        let pools = pools.filter(|pool| pool.addr().is_ipv6() == v6);
        let pools = pools.copied().collect::<Vec<_>>();
        if pools.is_empty() {
            continue;
        }
        let kept = kept(&pools, v6, claims);
        let mut used = kept.values().copied().collect::<BTreeSet<_>>();
        let mut next = pools.iter().flat_map(free_of);
        let names = claims.nodes.keys().copied().collect::<Vec<_>>();
        for name in names {
            let accepted = &claims.nodes[name];
            let of_family = |ip: &&IpAddr| ip.is_ipv6() == v6;
            let contested = conflicts.get(name).into_iter().flatten();
            let contested = contested.map(|(ip, _)| ip).find(of_family).copied();
            let first = accepted.own.iter().find(of_family).copied();
            let has_pods = |ip: &IpAddr| pod_address(accepted, *ip).is_some();
            let address = contested.or(first).filter(has_pods);
            let (true, Some(address)) = (accepted.is_meshed(), address) else {
                continue;
            };
            let mut take = || next.find(|ip| used.insert(*ip));
            let alias = kept.get(name).copied();
            let alias = alias.or_else(|| contested.and_then(|_| take()));
            match alias {
                Some(alias) => {
                    let given = aliases.entry(name.clone());
                    given.or_default().insert(alias, address);
                }
                None if contested.is_some() => {
                    let object = Object::Node(name.clone());
                    let reason = Reason::AliasesExhausted;
                    claims.exclude(object, Field::NodeAddress(address), reason);
                }
                None => {}
            }
        }
    }
    report(claims, conflicts, &aliases);
    aliases
}

/// The addresses of a pool for hosts, in order.
fn free_of(pool: &IpNet) -> impl Iterator<Item = IpAddr> + use<> {
    let pool = *pool;
    let ips = (0..).map_while(move |offset| nth(&pool, offset));
    ips.filter(move |ip| is_alias_in(&pool, *ip))
}

/// A pool may be a single address: commands for people know the published aliases alone.
fn is_alias_in(pool: &IpNet, ip: IpAddr) -> bool {
    is_host_of(pool, ip) || *pool == IpNet::from(ip)
}

/// The aliases of a family that nodes requested and keep.
fn kept(pools: &[IpNet], v6: bool, claims: &mut Claims<'_>) -> BTreeMap<NodeName, IpAddr> {
    let mut requests = Vec::new();
    for node in claims.by_age() {
        let mut requested = node.aliases.iter().copied();
        if let Some(ip) = requested.find(|ip| ip.is_ipv6() == v6) {
            let rank = node.ledger.rank(&Claim::Address(ip));
            requests.push((rank, node.created, &node.name, ip));
        }
    }
    requests.sort();
    let mut holders = BTreeMap::<IpAddr, &NodeName>::new();
    let mut kept = BTreeMap::new();
    for (.., name, ip) in requests {
        let reason = if !pools.iter().any(|pool| is_alias_in(pool, ip)) {
            Some(Reason::NotInAliasPool)
        } else {
            let holder = holders.get(&ip).copied().cloned();
            holder.map(|holder| Reason::TakenBy(Object::Node(holder)))
        };
        match reason {
            Some(reason) if claims.nodes[name].is_meshed() => {
                claims.exclude(Object::Node(name.clone()), Field::Alias(ip), reason);
            }
            Some(_) => {}
            None => {
                holders.insert(ip, name);
                kept.insert(name.clone(), ip);
            }
        }
    }
    kept
}

/// The addresses of each node by which some other region does not reach it.
type Conflicts = BTreeMap<NodeName, Vec<(IpAddr, Conflict)>>;

fn conflicts(claims: &Claims<'_>) -> Conflicts {
    let networks = Networks::new(claims);
    let mut conflicts = Conflicts::new();
    for overlap in &claims.overlaps {
        let of_node = conflicts.entry(overlap.node.clone()).or_default();
        of_node.push((overlap.address, overlap.conflict.clone()));
    }
    for node in claims.by_age() {
        let accepted = &claims.nodes[&node.name];
        let place = place(node, accepted);
        for ip in accepted.addresses.iter().filter(|_| accepted.is_meshed()) {
            if let Some(network) = networks.elsewhere(*ip, &place) {
                let of_node = conflicts.entry(node.name.clone()).or_default();
                of_node.push((*ip, Conflict::Network(network)));
            }
        }
    }
    for (name, of_node) in &mut conflicts {
        let own = &claims.nodes[name].own;
        of_node.sort_by_key(|(ip, _)| own.iter().position(|other| other == ip));
    }
    conflicts
}

/// The nodes that reach each other by the addresses of their links.
fn place(node: &Node, accepted: &Accepted) -> SegmentName {
    if accepted.in_region {
        SegmentName::Location(node.region.clone())
    } else {
        SegmentName::Node(node.name.clone())
    }
}

/// The networks in which nodes have addresses, and addresses that nodes say they have, each with its place; `None` for
/// several places.
struct Networks(BTreeMap<IpNet, Option<SegmentName>>);

impl Networks {
    fn new(claims: &Claims<'_>) -> Self {
        let mut networks = BTreeMap::new();
        for node in claims.by_age() {
            let accepted = &claims.nodes[&node.name];
            let place = place(node, accepted);
            let link = accepted.private_ip.map(|address| address.trunc());
            let own = accepted.own.iter().filter(|_| accepted.is_meshed());
            let addresses = accepted.underlay.iter().chain(own);
            let addresses = addresses.copied().map(IpNet::from);
            for net in link.into_iter().chain(addresses) {
                let entry = networks.entry(net).or_insert_with(|| Some(place.clone()));
                if entry.as_ref().is_some_and(|other| *other != place) {
                    *entry = None;
                }
            }
        }
        Self(networks)
    }

    /// The widest network of another place that contains an address.
    fn elsewhere(&self, ip: IpAddr, place: &SegmentName) -> Option<IpNet> {
        let host = IpNet::from(ip);
        let parents = (0..=host.max_prefix_len()).filter_map(|length| {
            let parent = IpNet::new(ip, length).ok()?.trunc();
            self.0.get_key_value(&parent)
        });
        let mut others = parents.filter(|(_, of)| of.as_ref() != Some(place));
        others.next().map(|(net, _)| *net)
    }
}

/// Names the alias of each node in the reports on its addresses.
fn report(claims: &mut Claims<'_>, conflicts: Conflicts, aliases: &Aliases) {
    let mut overlaps = Vec::new();
    for (node, of_node) in conflicts {
        let accepted = &claims.nodes[&node];
        for (address, conflict) in of_node {
            let alias = aliases.get(&node).into_iter().flatten();
            let mut alias = alias.filter(|(_, own)| own.is_ipv6() == address.is_ipv6());
            overlaps.push(Overlap {
                alias: alias.next().map(|(alias, _)| *alias),
                pod_address: pod_address(accepted, address),
                node: node.clone(),
                address,
                conflict,
            });
        }
    }
    claims.overlaps = overlaps;
}
