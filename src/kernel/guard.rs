//! Adds the boot guard's routes and rules through one rtnetlink socket.
//!
//! It needs neither links nor nf_tables. It changes no existing route or rule: what an agent left or has
//! just installed is newer than the guard's file.

use std::collections::BTreeSet;

use anyhow::Context as _;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;

use super::netlink::Netlink;
use super::{route, rule};
use crate::diff::KernelChange;
use crate::state::{Route, RouteKey, Rule};

/// Adds routes without next hops and the rules that lead to them, and returns what could not be added.
///
/// Routes come first, so no look-up sees half a table. A failure does not stop the rest.
///
/// # Errors
///
/// If the kernel gives no rtnetlink socket.
pub fn guard(
    routes: &[(RouteKey, Route)],
    rules: &BTreeSet<Rule>,
) -> anyhow::Result<Vec<(KernelChange, anyhow::Error)>> {
    let mut netlink = Netlink::open(NETLINK_ROUTE).context("opening a socket to rtnetlink")?;
    let mut changes = Vec::with_capacity(routes.len() + rules.len());
    let mut requests = Vec::with_capacity(changes.capacity());
    for (key, route) in routes {
        let message = route::to_message(key, route, &route::Indexes::new())?;
        requests.push(RouteNetlinkMessage::NewRoute(message));
        changes.push(KernelChange::ReplaceRoute {
            key: *key,
            route: route.clone(),
        });
    }
    for rule in rules {
        requests.push(RouteNetlinkMessage::NewRule(rule::to_message(rule)));
        changes.push(KernelChange::AddRule(rule.clone()));
    }
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    let requests = requests.into_iter().map(|request| (request, flags));
    let results = netlink.change_all(requests.collect());
    let failed = changes.into_iter().zip(results);
    Ok(failed
        .filter_map(|(change, result)| match result {
            Ok(()) => None,
            // A route or rule with this key exists.
            Err(refused) if refused.errno() == libc::EEXIST => None,
            // No IPv6 in this kernel, so no IPv6 to guard.
            Err(refused) if refused.errno() == libc::EAFNOSUPPORT => None,
            Err(refused) => Some((change, refused.into())),
        })
        .collect())
}
