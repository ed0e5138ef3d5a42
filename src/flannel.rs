//! flannel's state on this node, and its annotations on others, from its files, annotations and links.
//!
//! This module only reads. The agent never changes flannel's state, except that [`crate::kernel`] restores
//! entries that flannel lost when its device was recreated.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::refusal::Refusal;
use crate::state::NextHop;

mod env;
mod files;
mod netconf;

pub use env::{SubnetEnv, SubnetEnvError};
pub use files::Files;
pub use netconf::{NetConf, NetConfError};

mod lease;

/// A flannel backend that Selvedge supports.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Backend {
    /// VXLAN, with or without `DirectRouting`.
    Vxlan,
    /// Plain routes inside one subnet.
    HostGw,
}

/// A VTEP's hardware address.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Mac(pub [u8; 6]);

/// flannel's annotations on a Node.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Lease {
    /// `backend-type`; `None` for one that is not in [`Backend`].
    pub backend: Option<Backend>,
    /// `backend-data`: VNI.
    pub vni: Option<u32>,
    /// `backend-data`: `VtepMAC` of `flannel.<VNI>`.
    pub vtep_mac: Option<Mac>,
    /// `backend-v6-data`: `VtepMAC` of `flannel-v6.<VNI>`.
    pub vtep_mac_v6: Option<Mac>,
    /// `public-ip`: the destination of other nodes' VXLAN packets for this node.
    pub public_ip: Option<Ipv4Addr>,
    /// `public-ipv6`.
    pub public_ipv6: Option<Ipv6Addr>,
}

/// A vxlan device of flannel, as observed in the kernel.
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
    /// The underlay device it sends through.
    pub parent: Option<String>,
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
    /// The next hops that flannel uses for pod CIDRs of other nodes, read from table main.
    pub next_hops: BTreeMap<IpNet, NextHop>,
}

/// Why there is no [`Flannel`] yet.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Unready {
    /// flannel is not up yet; the text names what the agent waits for.
    #[error("waiting for flannel: {0}")]
    Waiting(String),
    /// flannel has a configuration that Selvedge does not support.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

impl Flannel {
    /// Combines the files, this node's annotations and the kernel's state.
    ///
    /// The live system wins over `net-conf.json`, which is stale if k3s was given another file. `vteps`
    /// and `next_hops` are observed in the kernel, with any VNI.
    pub fn assemble(
        files: &Files,
        lease: Option<&Lease>,
        vteps: Vec<Vtep>,
        next_hops: BTreeMap<IpNet, NextHop>,
    ) -> Result<Self, Unready> {
        let Some(env) = &files.env else {
            return Err(Unready::Waiting(format!(
                "{} does not exist yet",
                files.env_path.display()
            )));
        };
        let backend = match (lease, &files.conf) {
            (Some(lease), _) => lease.backend.ok_or_else(|| {
                Refusal::configuration(
                    "flannel runs a backend on this node that Selvedge does not support: set its Backend.Type to \"vxlan\" or \"host-gw\"",
                )
            })?,
            (None, Some(conf)) => conf.backend,
            (None, None) if vteps.is_empty() => Backend::HostGw,
            (None, None) => Backend::Vxlan,
        };

        let mut flannel = Self {
            backend,
            direct_routing: false,
            networks: env.networks.clone(),
            subnets: env.subnets.clone(),
            mtu: env.mtu,
            vteps: Vec::new(),
            next_hops,
        };
        if backend == Backend::HostGw {
            return Ok(flannel);
        }
        let vni = lease
            .and_then(|lease| lease.vni)
            .or_else(|| files.conf.as_ref().map(|conf| conf.vni))
            .or_else(|| vteps.iter().map(|vtep| vtep.vni).min())
            .unwrap_or(1);
        for subnet in &env.subnets {
            let name = device_name(vni, subnet.addr().is_ipv6());
            let vtep = vteps
                .iter()
                .find(|vtep| vtep.name == name)
                .ok_or_else(|| Unready::Waiting(format!("the link {name} does not exist yet")))?;
            // flannel's own check of its device: the subnet's first address with a full prefix.
            let address = IpNet::from(subnet.network());
            if !vtep.addresses.contains(&address) {
                return Err(Unready::Waiting(format!(
                    "the link {name} does not have the address {address} yet"
                )));
            }
            flannel.vteps.push(vtep.clone());
        }
        flannel.direct_routing = match &files.conf {
            Some(conf) => conf.direct_routing,
            None => flannel
                .next_hops
                .values()
                .any(|hop| flannel.vteps.iter().all(|vtep| vtep.name != hop.dev)),
        };
        Ok(flannel)
    }
}

/// The name of flannel's vxlan device.
pub fn device_name(vni: u32, v6: bool) -> String {
    if v6 {
        format!("flannel-v6.{vni}")
    } else {
        format!("flannel.{vni}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(conf: Option<&str>) -> Files {
        Files {
            conf: conf.map(|conf| NetConf::parse(conf.as_bytes()).unwrap()),
            env: Some(SubnetEnv {
                networks: vec!["10.42.0.0/16".parse().unwrap()],
                subnets: vec!["10.42.1.0/24".parse().unwrap()],
                mtu: 1450,
            }),
            env_path: "/run/flannel/subnet.env".into(),
        }
    }

    fn vtep(vni: u32, addresses: &[&str]) -> Vtep {
        Vtep {
            name: device_name(vni, false),
            index: 3,
            vni,
            port: 8472,
            mac: Mac([2; 6]),
            mtu: 1450,
            local: None,
            parent: None,
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        }
    }

    fn lease(backend: Option<Backend>) -> Lease {
        Lease {
            backend,
            vni: Some(7),
            vtep_mac: None,
            vtep_mac_v6: None,
            public_ip: None,
            public_ipv6: None,
        }
    }

    fn waits_for(result: Result<Flannel, Unready>) -> String {
        match result {
            Err(Unready::Waiting(what)) => what,
            other => panic!("not waiting: {other:?}"),
        }
    }

    #[test]
    fn an_unready_flannel_names_what_is_missing() {
        let mut early = files(None);
        early.env = None;
        let none = BTreeMap::new();
        let conf = Some(r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan"}}"#);
        let assemble =
            |files: &Files, vteps| waits_for(Flannel::assemble(files, None, vteps, none.clone()));

        assert_eq!(
            assemble(&early, vec![]),
            "/run/flannel/subnet.env does not exist yet"
        );
        assert_eq!(
            assemble(&files(conf), vec![]),
            "the link flannel.1 does not exist yet"
        );
        assert_eq!(
            assemble(&files(conf), vec![vtep(1, &[])]),
            "the link flannel.1 does not have the address 10.42.1.0/32 yet"
        );
    }

    #[test]
    fn without_a_configuration_file_the_device_decides() {
        let flannel = Flannel::assemble(
            &files(None),
            None,
            vec![vtep(7, &["10.42.1.0/32"])],
            BTreeMap::new(),
        )
        .unwrap();
        assert_eq!((flannel.backend, flannel.vteps[0].vni), (Backend::Vxlan, 7));

        let flannel = Flannel::assemble(&files(None), None, vec![], BTreeMap::new()).unwrap();
        assert_eq!(flannel.backend, Backend::HostGw);
    }

    #[test]
    fn the_live_system_wins_over_a_stale_file() {
        let stale = r#"{"Network":"10.42.0.0/16","Backend":{"Type":"host-gw"}}"#;
        let flannel = Flannel::assemble(
            &files(Some(stale)),
            Some(&lease(Some(Backend::Vxlan))),
            vec![vtep(1, &[]), vtep(7, &["10.42.1.0/32"])],
            BTreeMap::new(),
        )
        .unwrap();
        assert_eq!((flannel.backend, flannel.vteps[0].vni), (Backend::Vxlan, 7));
    }

    #[test]
    fn an_unsupported_backend_in_the_annotations_is_refused() {
        let result = Flannel::assemble(&files(None), Some(&lease(None)), vec![], BTreeMap::new());
        assert!(matches!(result, Err(Unready::Refused(_))));
    }

    #[test]
    fn direct_routing_is_read_from_the_routes() {
        let hop = NextHop {
            via: Some([192, 168, 50, 12].into()),
            dev: "eth0".into(),
            onlink: false,
        };
        let flannel = Flannel::assemble(
            &files(None),
            None,
            vec![vtep(1, &["10.42.1.0/32"])],
            [("10.42.2.0/24".parse().unwrap(), hop)].into(),
        )
        .unwrap();
        assert!(flannel.direct_routing);
    }
}
