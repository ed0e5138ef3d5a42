//! flannel on a node, and what the agent reads of it and of the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use selvedge::agent::kernel_facts::{FlannelFacts, KernelFacts};
use selvedge::flannel::{Files, Mac, SubnetEnv};
use selvedge::kernel::LocalAddress;
use selvedge::kernel::flannel_repair::FlannelState;
use selvedge::topology::NodeName;

use super::api::Api;
use super::lookup::CLUSTER;
use crate::mesh::{Mesh, net};

/// The mesh as the API has it.
pub(crate) fn mesh_of(api: &Api) -> Mesh {
    let mut mesh = Mesh::new(api.nodes().values().cloned());
    mesh.agreed.cluster_networks = vec![net(CLUSTER)];
    mesh
}

/// What the kernel and flannel's files say on a node.
pub(crate) fn kernel_facts(mesh: &Mesh, name: &str, number: u8, address: IpAddr) -> KernelFacts {
    let name = NodeName(name.to_owned());
    let underlay = IpNet::new(address, 24).expect("a length of IPv4");
    let env = format!(
        "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.{number}.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
    );
    let state = if mesh.snapshot.nodes.contains_key(&name) {
        flannel_state(mesh, &name)
    } else {
        FlannelState::default()
    };
    KernelFacts {
        addresses: Some(vec![LocalAddress {
            link: "eth0".into(),
            net: underlay,
            offered: true,
        }]),
        connected: Some([underlay.trunc()].into()),
        other_rules: Some(Vec::new()),
        underlay_mtu: Some(Some(1500)),
        flannel: Ok(FlannelFacts {
            files: Files {
                conf: None,
                env: Some(SubnetEnv::parse(env.as_bytes()).expect("flannel's format")),
                env_path: "/run/flannel/subnet.env".into(),
            },
            state,
            without_ipv6: false,
        }),
    }
}

fn flannel_state(mesh: &Mesh, me: &NodeName) -> FlannelState {
    let flannel = mesh.flannel(me);
    let others = mesh.snapshot.nodes.values().filter(|node| node.name != *me);
    let mut neighbours = BTreeMap::new();
    let mut forwarding = BTreeMap::<_, BTreeSet<IpAddr>>::new();
    for other in others {
        let number = other.pod_cidrs.first().map(|pods| match pods.network() {
            IpAddr::V4(ip) => ip.octets()[2],
            IpAddr::V6(_) => 0,
        });
        let mac = Mac([2, 0, 0, 0, 0, number.unwrap_or(0)]);
        for pods in &other.pod_cidrs {
            neighbours.insert((3, pods.network()), mac);
        }
        for address in &other.internal_ips {
            forwarding.entry((3, mac)).or_default().insert(*address);
        }
    }
    FlannelState {
        vteps: flannel.vteps,
        next_hops: flannel.next_hops,
        neighbours,
        forwarding,
    }
}
