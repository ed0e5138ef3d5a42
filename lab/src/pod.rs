//! Pods: a namespace each, on the bridge `cni0` of their node, as flannel's CNI plugin leaves them.

use std::fs::{self, File};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, bail, ensure};
use ipnet::IpNet;
use serde_json::{Value, json};

use crate::family::Family;
use crate::flannel::{SUBNET_ENV, nth};
use crate::netns::Namespace;
use crate::node::Node;

/// A pod of a lab.
#[derive(Debug)]
pub struct Pod {
    namespace: Namespace,
    addresses: Vec<IpAddr>,
}

/// What a node's `subnet.env` says about its pods.
struct Subnet {
    /// The bridge's addresses, with the lengths of the pod CIDRs.
    gateways: Vec<IpNet>,
    mtu: u16,
}

impl Pod {
    /// Makes a pod on a node on which flannel is up, by the CNI plugins where they are installed.
    ///
    /// # Errors
    ///
    /// When a command or a plugin fails.
    pub fn create(node: &Node, name: &str, plugins: bool) -> anyhow::Result<Self> {
        let namespace = Namespace::named(name.to_owned())?;
        let subnet = Subnet::read(node)?;
        let addresses = match plugins.then(cni_plugins).flatten() {
            Some(directory) => by_plugin(node, &namespace, &subnet, directory)?,
            None => by_hand(node, &namespace, &subnet)?,
        };
        ensure!(!addresses.is_empty(), "{name} got no address");
        Ok(Self {
            namespace,
            addresses,
        })
    }

    /// The pod's address, the IPv4 one where it has two.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.addresses[0]
    }

    /// The pod's address of a family.
    #[must_use]
    pub fn address_of(&self, family: Family) -> Option<IpAddr> {
        let mut addresses = self.addresses.iter().copied();
        addresses.find(|ip| Family::of(*ip) == family)
    }

    /// The pod's network.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Leaves the pod there when the value is dropped.
    pub fn keep(&mut self) {
        self.namespace.keep();
    }
}

impl Subnet {
    fn read(node: &Node) -> anyhow::Result<Self> {
        let text = fs::read_to_string(node.outside(SUBNET_ENV))
            .with_context(|| format!("{SUBNET_ENV} on {}", node.name()))?;
        let field = |key: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
        };
        let gateways = ["FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"]
            .into_iter()
            .filter_map(field)
            .map(str::parse);
        let mtu = field("FLANNEL_MTU").context("FLANNEL_MTU in subnet.env")?;
        Ok(Self {
            gateways: gateways.collect::<Result<_, _>>()?,
            mtu: mtu.parse()?,
        })
    }
}

fn cni_plugins() -> Option<&'static str> {
    ["/usr/lib/cni", "/opt/cni/bin"]
        .into_iter()
        .find(|directory| fs::exists(format!("{directory}/bridge")).is_ok_and(|there| there))
}

/// What flannel's plugin hands to the plugin `bridge`, with the settings of k3s.
fn by_plugin(
    node: &Node,
    pod: &Namespace,
    subnet: &Subnet,
    plugins: &str,
) -> anyhow::Result<Vec<IpAddr>> {
    let ranges = subnet
        .gateways
        .iter()
        .map(|gateway| json!([{"subnet": gateway.trunc()}]));
    let routes = subnet
        .gateways
        .iter()
        .map(|gateway| json!({"dst": Family::of(gateway.addr()).pod_network()}));
    let config = json!({
        "cniVersion": "1.0.0", "name": "cbr0", "type": "bridge", "bridge": "cni0",
        "mtu": subnet.mtu, "isGateway": true, "isDefaultGateway": true, "hairpinMode": true,
        "forceAddress": true, "ipMasq": false,
        "ipam": {"type": "host-local", "ranges": ranges.collect::<Vec<_>>(),
            "routes": routes.collect::<Vec<_>>()},
    });
    let file = node.log(&format!("{}.cni.json", pod.name()));
    fs::write(&file, config.to_string())?;
    let output = node.within(|| {
        Command::new(PathBuf::from(plugins).join("bridge"))
            .env("CNI_COMMAND", "ADD")
            .env("CNI_CONTAINERID", pod.name())
            .env("CNI_NETNS", pod.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", plugins)
            .stdin(File::open(&file)?)
            .output()
    })?;
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let addresses = answer["ips"].as_array().into_iter().flatten();
    let addresses = addresses
        .filter_map(|ip| ip["address"].as_str())
        .map(|address| Ok(address.parse::<IpNet>()?.addr()))
        .collect::<anyhow::Result<Vec<_>>>()?;
    if addresses.len() != subnet.gateways.len() {
        bail!(
            "CNI plugin on {}: {answer} {}",
            node.name(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(addresses)
}

/// The same, with nothing but `ip`.
fn by_hand(node: &Node, pod: &Namespace, subnet: &Subnet) -> anyhow::Result<Vec<IpAddr>> {
    let Subnet { gateways, mtu } = subnet;
    let host = node.namespace();
    if host.attempt("ip link show cni0")?.status.success() {
        let taken = host.run("ip -o link show master cni0")?.lines().count();
        return plug(node, pod, subnet, taken);
    }
    host.run(&format!("ip link add cni0 mtu {mtu} type bridge"))?;
    for gateway in gateways {
        let more = match gateway {
            IpNet::V4(net) => format!("broadcast {}", net.broadcast()),
            IpNet::V6(_) => "nodad".to_owned(),
        };
        host.run(&format!("ip address add {gateway} {more} dev cni0"))?;
    }
    host.run("ip link set cni0 up")?;
    plug(node, pod, subnet, 0)
}

/// Connects a pod to `cni0` with the next addresses after the `taken` ones.
fn plug(
    node: &Node,
    pod: &Namespace,
    subnet: &Subnet,
    taken: usize,
) -> anyhow::Result<Vec<IpAddr>> {
    let Subnet { gateways, mtu } = subnet;
    let device = format!("veth{taken}");
    let host = node.namespace();
    host.veth(&device, pod, "eth0")?;
    host.sh(&format!(
        "ip link set {device} mtu {mtu} master cni0
         bridge link set dev {device} hairpin on"
    ))?;
    pod.run(&format!("ip link set eth0 mtu {mtu}"))?;
    let mut addresses = Vec::new();
    for gateway in gateways {
        let family = Family::of(gateway.addr());
        let address = nth(*gateway, u8::try_from(taken + 2)?);
        let flags = if family == Family::V6 { "nodad" } else { "" };
        let (option, via) = (family.option(), gateway.addr());
        pod.sh(&format!(
            "ip address add {address}/{} dev eth0 {flags}
             ip {option} route add default via {via}
             ip {option} route add {} via {via}",
            gateway.prefix_len(),
            family.pod_network()
        ))?;
        addresses.push(address);
    }
    Ok(addresses)
}
