//! The destinations that the plan of this node leaves out or cannot protect, as values. The agent turns them into
//! Events, metrics and problems.
//!
//! Their `Display` is one sentence for the operator, without the full stop.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use super::site::Site;
use super::{Inputs, routes};
use crate::state::{OtherRule, State};
use crate::topology::{NodeName, Object};

/// A limitation of this node's plan that its operator should know.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Caveat {
    /// A rule of another program stands in front of the agent's, and there is no room before it.
    RuleInTheWay(OtherRule),
    /// A prefix of the mesh lies in a network that this node is connected to, so this node does not
    /// carry it.
    Connected {
        /// The prefix that is left out.
        net: IpNet,
        /// The Node or Peer that the prefix belongs to.
        of: Object,
        /// The network this node is connected to.
        network: IpNet,
    },
}

/// The caveats of a node's plan. `state` is the plan from these inputs.
pub fn caveats(inputs: &Inputs<'_>, state: &State) -> Vec<Caveat> {
    let Some(site) = Site::new(inputs) else {
        return Vec::new();
    };
    let obstacle = routes::rules_place(&site, &state.routes).obstacle;
    let mut caveats = Vec::from_iter(obstacle.map(Caveat::RuleInTheWay));
    if !inputs.connected.is_empty() {
        add_connected(&site, &mut caveats);
    }
    caveats
}

fn add_connected(site: &Site<'_>, caveats: &mut Vec<Caveat>) {
    let node = |name: &NodeName| Object::Node(name.clone());
    let mut add = |net: IpNet, of: Object, network: Option<IpNet>| {
        caveats.extend(network.map(|network| Caveat::Connected { net, of, network }));
    };
    for segment in site.remotes() {
        for member in &segment.nodes {
            let foreign = |ip: &&IpAddr| !site.region_underlay.contains(*ip);
            for ip in member.addresses.iter().filter(foreign) {
                let network = site.connected_for(segment, *ip);
                add(IpNet::from(*ip), node(&member.name), network);
            }
        }
        for member in &segment.nodes {
            for net in member.aliases.keys().copied().map(IpNet::from) {
                add(net, node(&member.name), site.connected_to(&net));
            }
        }
        for net in &segment.allowed_location_ips {
            add(*net, node(&segment.primary().node), site.connected_to(net));
        }
    }
    for segment in site.remotes().chain(site.neighbours()) {
        let leaders = segment.leaders.iter();
        for leader in leaders.filter(|leader| leader.node != *site.inputs.me) {
            for net in leader.wireguard_ips.iter().copied().map(IpNet::from) {
                add(net, node(&leader.node), site.connected_to(&net));
            }
        }
    }
    for peer in &site.inputs.topology.peers {
        for net in &peer.allowed_ips {
            let of = Object::Peer(peer.name.clone());
            add(*net, of, site.connected_to(net));
        }
    }
}

impl fmt::Display for Caveat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RuleInTheWay(rule) => write!(
                f,
                "the rule \"{rule}\" of another program comes before the agent's rules and may send packets for other regions elsewhere, and no priorities are free before it: give that rule a priority above {}",
                crate::state::RULES
            ),
            Self::Connected { net, of, network } => {
                let net = Prefix(*net);
                write!(
                    f,
                    "{of}: {net} is not reached through the tunnel from here, because this node is connected to {network}"
                )
            }
        }
    }
}

/// A prefix without the length where it is one address.
struct Prefix(IpNet);

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.prefix_len() == self.0.max_prefix_len() {
            write!(f, "{}", self.0.addr())
        } else {
            write!(f, "{}", self.0)
        }
    }
}
