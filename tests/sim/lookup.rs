//! One node's look-ups: its rules and routes, then flannel's table main, then the firewall on the way out.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use selvedge::state::{Firewall, MAIN, Route, Rule, Ruleset, State, Table};

/// Where a packet comes from, as far as rules and the firewall select by it.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Source {
    /// A process of the host, which has not chosen a source.
    Host,
    /// A pod of this node.
    Pod,
    /// flannel's device: another node of the region.
    Region,
    /// The tunnel.
    Tunnel,
    /// The tunnel: a datagram of another session, between leaders.
    Relay,
}

/// What becomes of a packet at a node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Step {
    /// It is for this node.
    Deliver,
    /// Into the tunnel.
    Tunnel,
    /// By flannel to the node whose pods have this network.
    Flannel(IpNet),
    /// By the underlay, in clear.
    Underlay,
    /// Refused, by a route or the firewall, for this reason.
    Refused(&'static str),
}

/// What a node has beside the agent's state.
#[derive(Clone, Debug)]
pub(crate) struct Host<'a> {
    pub(crate) pods: IpNet,
    pub(crate) address: IpAddr,
    /// The pod networks of all other nodes, to which flannel has routes in table main.
    pub(crate) others: &'a [IpNet],
    /// Whether its kernel forwards.
    pub(crate) forwards: bool,
    /// The rule against packets that turn back to their region, which a mutant leaves out.
    pub(crate) turns_back: bool,
    /// Whether the rule against packets that go through the tunnel twice is left out, as a mutant has it.
    pub(crate) passes_on: bool,
}

/// The flannel network of the simulation.
pub(crate) const CLUSTER: &str = "10.42.0.0/16";
pub(crate) const TUNNEL: &str = "kilo0";

/// All steps that a packet for an address may take, one for each next hop.
pub(crate) fn steps(state: &State, host: &Host<'_>, from: Source, dst: IpAddr) -> Vec<Step> {
    if host.pods.contains(&dst) || host.address == dst {
        return vec![Step::Deliver];
    }
    let is_forwarded = matches!(from, Source::Region | Source::Tunnel | Source::Relay);
    if is_forwarded && !host.forwards {
        return vec![Step::Refused("it does not forward")];
    }
    let mut rules: Vec<_> = state.rules.iter().filter(|rule| !rule.v6).collect();
    rules.sort_by_key(|rule| rule.priority);
    for rule in rules {
        if !selects(rule, from) {
            continue;
        }
        match best(state, rule.table, dst) {
            None | Some(Route::Throw) => {}
            Some(Route::Unreachable) => return vec![Step::Refused("unreachable")],
            Some(Route::Blackhole) => return vec![Step::Refused("blackhole")],
            Some(Route::Unicast { next_hops, .. }) => {
                let steps = next_hops.iter().map(|hop| {
                    let step = if hop.dev == TUNNEL {
                        Step::Tunnel
                    } else if let Some(via) = hop.via.filter(|_| hop.dev.starts_with("flannel")) {
                        let mut others = host.others.iter();
                        let pods = others.find(|pods| pods.network() == via);
                        pods.map_or(Step::Refused("no such gateway"), |pods| {
                            Step::Flannel(*pods)
                        })
                    } else {
                        Step::Underlay
                    };
                    filtered(state, host, from, dst, step)
                });
                return steps.collect();
            }
        }
    }
    let step = match host.others.iter().find(|pods| pods.contains(&dst)) {
        Some(pods) => Step::Flannel(*pods),
        None => Step::Underlay,
    };
    vec![filtered(state, host, from, dst, step)]
}

fn selects(rule: &Rule, from: Source) -> bool {
    let iif = rule
        .iif
        .as_ref()
        .is_none_or(|iif| iif == TUNNEL && matches!(from, Source::Tunnel | Source::Relay));
    // Every source is in the cluster network, but that of a host that has chosen none and a leader's WireGuard address.
    let source = rule.from.is_none() || !matches!(from, Source::Host | Source::Relay);
    // Only the tunnel's own datagrams have the mark.
    let mark = rule.fwmark.is_none() || rule.not;
    iif && source && mark
}

/// The route of the longest prefix, and of those the one with the lowest metric.
fn best(state: &State, table: u32, dst: IpAddr) -> Option<&Route> {
    if table == MAIN {
        return None;
    }
    let table = Table::ALL.into_iter().find(|it| it.id() == table)?;
    let routes = state.routes.iter();
    let routes = routes.filter(|(key, _)| key.table == table && key.dst.contains(&dst));
    let best = routes.max_by_key(|(key, _)| (key.dst.prefix_len(), std::cmp::Reverse(key.metric)));
    best.map(|(_, route)| route)
}

/// What the nft table does to a packet that leaves by this step.
fn filtered(state: &State, host: &Host<'_>, from: Source, dst: IpAddr, step: Step) -> Step {
    let Some(Ruleset::Planned(firewall)) = &state.firewall else {
        return step;
    };
    match &step {
        Step::Deliver | Step::Refused(_) => return step,
        Step::Tunnel if firewall.leader => {
            let passes = match from {
                Source::Tunnel => host.passes_on,
                Source::Relay => firewall.relay.to.contains(&dst),
                Source::Host | Source::Pod | Source::Region => true,
            };
            return if passes {
                step
            } else {
                Step::Refused("the firewall: it would go through the tunnel twice")
            };
        }
        Step::Tunnel | Step::Flannel(_) | Step::Underlay => {}
    }
    let is_far = is_far(firewall, from, dst);
    let is_allowed_hop =
        matches!(&step, Step::Flannel(pods) if firewall.guard.hops.contains(&pods.network()));
    if is_far && !is_allowed_hop {
        return Step::Refused("the firewall: it would leave in clear");
    }
    if is_far && firewall.leader && from == Source::Region && host.turns_back {
        return Step::Refused("the firewall: it would turn back");
    }
    step
}

/// Whether the firewall takes a destination for one of another region.
fn is_far(firewall: &Firewall, from: Source, dst: IpAddr) -> bool {
    let guard = &firewall.guard;
    let has = |nets: &BTreeSet<IpNet>| nets.iter().any(|net| net.contains(&dst));
    has(&guard.far)
        || !matches!(from, Source::Host | Source::Relay) && has(&guard.far_from_pods)
        || !has(&guard.near) && has(&guard.wide)
}
