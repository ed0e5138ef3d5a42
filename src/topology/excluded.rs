//! The statements that the topology leaves out, with the reasons, as values. The agent turns them into Events
//! and metrics.
//!
//! Their `Display` is one sentence for the operator.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use super::{NodeName, RegionName};
use crate::text::quote;

/// An object of the cluster that makes statements.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Object {
    /// A Node.
    Node(NodeName),
    /// A `Peer` object.
    Peer(String),
}

/// The statement that was left out.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Field {
    /// The whole object.
    Whole,
    /// The WireGuard key, and with it the rest.
    Key,
    /// A key that a node has beside its current one while it replaces it.
    OtherKey,
    /// A pod CIDR.
    PodCidr(IpNet),
    /// The address of the node.
    NodeAddress(IpAddr),
    /// A requested alias.
    Alias(IpAddr),
    /// A requested WireGuard address.
    WireguardIp(IpAddr),
    /// The endpoint.
    Endpoint(IpAddr),
    /// The node's membership in its region.
    Region,
    /// Kilo's algorithm, which a real `kg` needs.
    Algorithm,
    /// An item of `allowed-location-ips`.
    AllowedLocationIp(IpNet),
    /// An item of a peer's `allowedIPs`.
    AllowedIp(IpNet),
}

/// The reason for which a statement was left out.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Reason {
    /// Another object has the older claim.
    TakenBy(Object),
    /// Not inside flannel's networks.
    OutsideClusterNetwork,
    /// It overlaps a network of pods, services or WireGuard addresses.
    Reserved(IpNet),
    /// Neither in the Node's status nor in the operator's networks.
    NotInStatus,
    /// A public address that the operator did not declare as the node's.
    PublicUndeclared,
    /// Outside of the networks of the region.
    OutsideRegion {
        /// The region.
        region: RegionName,
        /// Its networks.
        networks: Vec<IpNet>,
    },
    /// `--beside-kilo` is off.
    NotBesideKilo,
    /// Not inside `--subnet`, or not an address for a host there.
    NotInSubnet,
    /// So wide that it would take unrelated traffic.
    TooWide,
    /// Not an address packets can be sent to.
    NotUnicast,
    /// `--subnet` has no free address left.
    SubnetExhausted,
    /// Not inside `--alias-cidr`, or not an address for a host there.
    NotInAliasPool,
    /// `--alias-cidr` has no free address left.
    AliasesExhausted,
    /// No pod CIDR of the node is carried.
    NoPodCidr,
}

/// One statement of one Node or Peer that the topology does not follow.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Excluded {
    /// The object that makes the statement.
    pub object: Object,
    /// The statement.
    pub field: Field,
    /// The reason.
    pub reason: Reason,
}

/// The reason for which other regions do not reach a node by its address.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Conflict {
    /// This node has the address too, by an older claim, and is reached by it.
    Holder(NodeName),
    /// It is inside of a network of another region, where it means a host there.
    Network(IpNet),
}

/// A node address that some other region cannot use.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Overlap {
    /// The node that other regions cannot reach by the address.
    pub node: NodeName,
    /// The address.
    pub address: IpAddr,
    /// The reason.
    pub conflict: Conflict,
    /// An address by which every region reaches the host: the first of its pod CIDR, which flannel or the agent
    /// assigns to it.
    pub pod_address: Option<IpAddr>,
    /// The node's alias, by which every region reaches this address; `None` without `--alias-cidr`.
    pub alias: Option<IpAddr>,
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(NodeName(name)) => write!(f, "node {}", quote(name)),
            Self::Peer(name) => write!(f, "peer {}", quote(name)),
        }
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole => f.write_str("the whole object"),
            Self::Key => f.write_str("the WireGuard key"),
            Self::OtherKey => f.write_str("its next or previous WireGuard key"),
            Self::PodCidr(net) => write!(f, "pod CIDR {net}"),
            Self::NodeAddress(ip) => write!(f, "node address {ip}"),
            Self::Alias(ip) => write!(f, "alias {ip}"),
            Self::WireguardIp(ip) => write!(f, "WireGuard address {ip}"),
            Self::Endpoint(ip) => write!(f, "endpoint {ip}"),
            Self::Region => f.write_str("its place in its region"),
            Self::Algorithm => f.write_str("Kilo's algorithm"),
            Self::AllowedLocationIp(net) => write!(f, "allowed location IPs {net}"),
            Self::AllowedIp(net) => write!(f, "allowed IPs {net}"),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TakenBy(object) => write!(f, "claimed by {object} before"),
            Self::OutsideClusterNetwork => f.write_str("outside of flannel's networks"),
            Self::Reserved(net) => write!(f, "overlaps {net}, which is not for it"),
            Self::NotInStatus => f.write_str(
                "not an InternalIP of the node's status; if it is right, name its network with --internal-cidr",
            ),
            Self::PublicUndeclared => f.write_str(
                "a public address needs the operator's word: name its network with --internal-cidr, or annotate the node with kilo.squat.ai/force-internal-ip or force-endpoint",
            ),
            Self::OutsideRegion { region, networks } => {
                let networks = networks.iter().map(ToString::to_string);
                let networks = networks.collect::<Vec<_>>().join(", ");
                write!(
                    f,
                    "its address is outside of the networks of region \"{}\" ({networks}), so it has a tunnel of its own; if it belongs there, annotate the node with kilo.squat.ai/location or name its network with --region-cidr",
                    region.0.escape_debug()
                )
            }
            Self::NotBesideKilo => f.write_str(
                "a kg of Kilo's seems to run there; start all agents with --beside-kilo while both are in the mesh",
            ),
            Self::NotInSubnet => f.write_str("not an address for a host inside of --subnet"),
            Self::TooWide => f.write_str("wider than /8 (IPv6: /16)"),
            Self::NotUnicast => f.write_str("not a unicast address"),
            Self::SubnetExhausted => {
                f.write_str("no address is left in --subnet; choose a larger one")
            }
            Self::NotInAliasPool => f.write_str("not an address for a host inside of --alias-cidr"),
            Self::AliasesExhausted => f.write_str(
                "other regions need an alias for it, and none is left in --alias-cidr; choose a larger pool",
            ),
            Self::NoPodCidr => f.write_str("no pod CIDR of it is carried"),
        }
    }
}

impl fmt::Display for Excluded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            object,
            field,
            reason,
        } = self;
        write!(f, "{object}: left out {field}: {reason}")
    }
}

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            node,
            address,
            conflict,
            pod_address,
            alias,
        } = self;
        match (conflict, alias) {
            (Conflict::Holder(holder), Some(alias)) => {
                return write!(
                    f,
                    "node {node}: other regions reach it by its alias {alias}, since {address} is node {holder}'s address too"
                );
            }
            (Conflict::Network(network), Some(alias)) => {
                return write!(
                    f,
                    "node {node}: regions that use {network} reach it by its alias {alias}, since {address} is an address of their own"
                );
            }
            (Conflict::Holder(holder), None) => write!(
                f,
                "node {node}: other regions cannot reach it by {address}, which is node {holder}'s address too"
            )?,
            (Conflict::Network(network), None) => write!(
                f,
                "node {node}: regions that use {network} cannot reach it by {address}, an address of their own"
            )?,
        }
        match pod_address {
            Some(address) => write!(f, "; {address} reaches it from everywhere"),
            None => Ok(()),
        }
    }
}
