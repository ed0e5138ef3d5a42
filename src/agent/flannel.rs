//! flannel on this node, as a pass sees it: its files, its links, its lease, and what it forgot.

use std::collections::BTreeMap;

use crate::config::Config;
use crate::flannel::{Files, Flannel, Unready};
use crate::kernel::flannel_repair::{self, FlannelState, Repair};
use crate::kernel::{Kernel, ipv6_is_off};
use crate::topology::{Node, NodeName, Topology};

/// What a look at flannel finds.
#[derive(Debug)]
pub struct Found {
    /// flannel, as far as the agent has to know it.
    pub flannel: Flannel,
    /// What the kernel holds of it.
    pub state: FlannelState,
    /// Whether it has IPv6, which this node has turned off.
    pub without_ipv6: bool,
}

/// Looks at flannel; `own` is this node's object.
///
/// # Errors
///
/// While flannel is not up, and where it is not as the agent needs it.
pub fn look(config: &Config, kernel: &Kernel, own: Option<&Node>) -> Result<Found, Unready> {
    let mut files = Files::read(config.flannel_conf.as_deref(), &config.subnet_file)?;
    let without_ipv6 = ipv6_is_off(&config.interface) && files.leave_out_ipv6()?;
    let lease = own.and_then(|node| node.lease.as_ref());
    let networks = files.env.as_ref().map(|env| env.networks.as_slice());
    let state = kernel
        .rtnetlink
        .flannel(networks.unwrap_or_default())
        .map_err(|error| Unready::Waiting(format!("{error:#}")))?;
    let flannel = Flannel::assemble(&files, lease, state.vteps.clone(), state.next_hops.clone())?;
    Ok(Found {
        flannel,
        state,
        without_ipv6,
    })
}

/// What flannel lost of its own towards the region's nodes when its device was made anew: it does not
/// put it back. Nothing while the node `me` is in no segment.
pub fn forgotten(
    found: &Found,
    topology: &Topology,
    nodes: &BTreeMap<NodeName, Node>,
    me: &NodeName,
) -> Vec<Repair> {
    let Some(own) = topology.segment_of(me) else {
        return Vec::new();
    };
    let members = topology
        .segments
        .iter()
        .filter(|segment| segment.group == own.group)
        .flat_map(|segment| segment.nodes.iter().map(|member| &member.name));
    let outsiders = topology
        .outsiders
        .iter()
        .filter(|outsider| outsider.group == own.group)
        .map(|outsider| &outsider.name);
    let others = members
        .chain(outsiders)
        .filter(|name| *name != me)
        .filter_map(|name| {
            let node = nodes.get(name)?;
            Some((node.pod_cidrs.as_slice(), node.lease.as_ref()?))
        })
        .collect::<Vec<_>>();
    flannel_repair::missing(&found.flannel, &others, &found.state)
}
