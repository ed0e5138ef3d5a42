//! What flannel forgot on this node. Pure.

use std::collections::BTreeMap;

use crate::flannel::Flannel;
use crate::kernel::flannel_repair::{self, FlannelState, Repair};
use crate::topology::{Node, NodeName, Topology};

/// What flannel lost of its own towards the region's nodes when its device was recreated: it does not
/// put it back. Nothing while the node `me` is in no segment.
pub fn forgotten(
    flannel: &Flannel,
    state: &FlannelState,
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
    flannel_repair::missing(flannel, &others, state)
}
