//! What the topology leaves out, and why, as values that the shell turns into Events and metrics.
//!
//! Their `Display` is one sentence for the operator.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use super::NodeName;

/// Whose statement was left out.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Subject {
    /// A Node.
    Node(NodeName),
    /// A `Peer` object.
    Peer(String),
}

/// What was left out of it.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Field {
    /// All of it.
    Whole,
    /// The WireGuard key, and with it the rest.
    Key,
    /// A pod CIDR.
    PodCidr(IpNet),
    /// The address of the node.
    NodeAddress(IpAddr),
    /// A wish for a WireGuard address.
    WireguardIp(IpAddr),
    /// The endpoint.
    Endpoint(IpAddr),
    /// An item of `allowed-location-ips`.
    AllowedLocationIp(IpNet),
    /// An item of a peer's `allowedIPs`.
    AllowedIp(IpNet),
}

/// Why it was left out.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Reason {
    /// Somebody with an older (or better) claim has it.
    TakenBy(Subject),
    /// Not inside flannel's networks.
    OutsideClusterNetwork,
    /// Inside a network that is not for it: pods, services, WireGuard addresses.
    Reserved(IpNet),
    /// Neither in the Node's status nor in the operator's networks.
    NotInStatus,
    /// Not inside `--subnet`, or not an address for a host there.
    NotInSubnet,
    /// So wide that it would take traffic that nobody meant.
    TooWide,
    /// Not an address packets can be sent to.
    NotUnicast,
    /// `--subnet` has no free address left.
    SubnetExhausted,
    /// It has no pod CIDR that is carried.
    NoPodCidr,
}

/// One statement of one Node or Peer that the topology does not follow.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Excluded {
    /// Whose.
    pub subject: Subject,
    /// Which.
    pub field: Field,
    /// Why.
    pub reason: Reason,
}

/// A node address that other regions cannot use because an older node has the same one.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Overlap {
    /// The node that cannot be reached by it from other regions.
    pub node: NodeName,
    /// The address.
    pub address: IpAddr,
    /// The node that can.
    pub holder: NodeName,
    /// An address that reaches the node from everywhere: the first of its pod CIDR, which flannel
    /// or the agent gives to the host itself.
    pub alias: Option<IpAddr>,
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(name) => write!(f, "node {name}"),
            Self::Peer(name) => write!(f, "peer {}", name.escape_debug()),
        }
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole => f.write_str("the whole object"),
            Self::Key => f.write_str("the WireGuard key"),
            Self::PodCidr(net) => write!(f, "pod CIDR {net}"),
            Self::NodeAddress(ip) => write!(f, "node address {ip}"),
            Self::WireguardIp(ip) => write!(f, "WireGuard address {ip}"),
            Self::Endpoint(ip) => write!(f, "endpoint {ip}"),
            Self::AllowedLocationIp(net) => write!(f, "allowed location IPs {net}"),
            Self::AllowedIp(net) => write!(f, "allowed IPs {net}"),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TakenBy(subject) => write!(f, "claimed by {subject} before"),
            Self::OutsideClusterNetwork => f.write_str("outside of flannel's networks"),
            Self::Reserved(net) => write!(f, "overlaps {net}, which is not for it"),
            Self::NotInStatus => f.write_str(
                "not an InternalIP of the node's status; if it is right, name its network with --internal-cidr",
            ),
            Self::NotInSubnet => f.write_str("not an address for a host inside of --subnet"),
            Self::TooWide => f.write_str("wider than /8 (IPv6: /16)"),
            Self::NotUnicast => f.write_str("not a unicast address"),
            Self::SubnetExhausted => {
                f.write_str("no address is left in --subnet; choose a larger one")
            }
            Self::NoPodCidr => f.write_str("no pod CIDR of it is carried"),
        }
    }
}

impl fmt::Display for Excluded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            subject,
            field,
            reason,
        } = self;
        write!(f, "{subject}: left out {field}: {reason}")
    }
}

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            node,
            address,
            holder,
            alias,
        } = self;
        write!(
            f,
            "node {node}: other regions cannot reach it by {address}, which is node {holder}'s address too"
        )?;
        match alias {
            Some(alias) => write!(f, "; {alias} reaches it from everywhere"),
            None => Ok(()),
        }
    }
}
