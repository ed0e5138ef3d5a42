//! What flannel does on this node and says of others: its files, its annotations, its links.
//!
//! Read only. Nothing of flannel's is ever written, except to restore what flannel itself forgot
//! when its device was recreated (the kernel module does that).

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::plan::NextHop;

/// A flannel backend that Selvedge works beside.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Backend {
    /// VXLAN, with or without `DirectRouting`.
    Vxlan,
    /// Plain routes inside one subnet.
    HostGw,
}

/// A VTEP's hardware address.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Mac(pub [u8; 6]);

/// What flannel's annotations on a Node say (contract 2).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Lease {
    /// `backend-type`; `None` for one that is not in [`Backend`].
    pub backend: Option<Backend>,
    /// `backend-data`: VNI.
    pub vni: Option<u32>,
    /// `backend-data`: `VtepMAC` of `flannel.<VNI>`.
    pub vtep_mac: Option<Mac>,
    /// `backend-v6-data`: `VtepMAC` of `flannel-v6.<VNI>`.
    pub vtep_mac_v6: Option<Mac>,
    /// `public-ip`: where others send VXLAN for this node.
    pub public_ip: Option<Ipv4Addr>,
    /// `public-ipv6`.
    pub public_ipv6: Option<Ipv6Addr>,
}

/// A vxlan device of flannel's, as the kernel shows it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Vtep {
    /// `flannel.<VNI>` or `flannel-v6.<VNI>`.
    pub name: String,
    /// The kernel's index; a new one means that the device was recreated.
    pub index: u32,
    /// The VXLAN network identifier.
    pub vni: u32,
    /// The UDP port.
    pub port: u16,
    /// Its hardware address.
    pub mac: Mac,
    /// The MTU in bytes.
    pub mtu: u32,
    /// The underlay address it sends from.
    pub local: Option<IpAddr>,
    /// Its addresses (`10.42.N.0/32`).
    pub addresses: Vec<IpNet>,
}

/// flannel on this node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Flannel {
    /// The backend.
    pub backend: Backend,
    /// `DirectRouting`: nodes of the same subnet are reached without VXLAN.
    pub direct_routing: bool,
    /// The cluster networks (`FLANNEL_NETWORK`, `FLANNEL_IPV6_NETWORK`), at most one a family.
    pub networks: Vec<IpNet>,
    /// This node's pod CIDRs (`FLANNEL_SUBNET`, `FLANNEL_IPV6_SUBNET`), truncated.
    pub subnets: Vec<IpNet>,
    /// `FLANNEL_MTU` in bytes.
    pub mtu: u32,
    /// The vxlan devices, IPv4 first; empty for host-gw.
    pub vteps: Vec<Vtep>,
    /// The next hops flannel itself uses for pod CIDRs of other nodes, read from table main.
    pub next_hops: BTreeMap<IpNet, NextHop>,
}
