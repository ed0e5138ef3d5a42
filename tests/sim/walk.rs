//! The packet walk: hop by hop through what each node has installed at this moment.
//!
//! Where several next hops or peers may carry a flow, all of them are walked, since flows differ.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use selvedge::state::State;

use super::lookup::{Host, Source, Step, steps};
use super::network::Id;

/// The destination of a walk.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Target {
    Pod(Id),
    Host(Id),
}

impl Target {
    pub(crate) fn node(self) -> Id {
        match self {
            Self::Pod(node) | Self::Host(node) => node,
        }
    }
}

/// The steps of one node, computed once for each change of its state.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fib {
    steps: BTreeMap<(IpAddr, Source), Vec<Step>>,
    /// The nodes to whose devices the tunnel may send.
    owners: BTreeMap<IpAddr, Vec<Id>>,
    /// The nodes from which the tunnel accepts this node's packets.
    accepted: BTreeMap<Id, Vec<Id>>,
}

impl Fib {
    pub(crate) fn clear(&mut self) {
        self.steps.clear();
        self.owners.clear();
        self.accepted.clear();
    }

    pub(crate) fn steps(
        &mut self,
        state: &State,
        host: &Host<'_>,
        from: Source,
        to: IpAddr,
    ) -> &[Step] {
        let entry = self.steps.entry((to, from));
        entry.or_insert_with(|| steps(state, host, from, to))
    }

    /// The nodes that own the most specific route to an address.
    pub(crate) fn owners(
        &mut self,
        state: &State,
        to: IpAddr,
        node_of: impl Fn(&[u8; 32]) -> Option<Id>,
    ) -> &[Id] {
        self.owners.entry(to).or_insert_with(|| {
            let peers = state.peers.values();
            let routes = peers.flat_map(|peer| peer.routes.iter().map(move |net| (net, peer)));
            most_specific(routes, to, node_of)
        })
    }

    /// The nodes from which packets with a source of this node's pod network are accepted.
    pub(crate) fn accepted(
        &mut self,
        state: &State,
        source: (Id, IpAddr),
        node_of: impl Fn(&[u8; 32]) -> Option<Id>,
    ) -> &[Id] {
        self.accepted.entry(source.0).or_insert_with(|| {
            let peers = state.peers.values();
            let accepts = peers.flat_map(|peer| peer.accepts.iter().map(move |net| (net, peer)));
            most_specific(accepts, source.1, node_of)
        })
    }
}

fn most_specific<'a>(
    prefixes: impl Iterator<Item = (&'a IpNet, &'a selvedge::wireguard::PeerConfig)>,
    address: IpAddr,
    node_of: impl Fn(&[u8; 32]) -> Option<Id>,
) -> Vec<Id> {
    let mut best = None;
    let mut owners = Vec::new();
    for (net, peer) in prefixes.filter(|(net, _)| net.contains(&address)) {
        let length = Some(net.prefix_len());
        if length > best {
            best = length;
            owners.clear();
        }
        if length == best {
            owners.extend(node_of(&peer.public_key.0));
        }
    }
    owners
}

/// How a walk ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum End {
    Delivered,
    Lost(String),
}
