//! Pods: a namespace each, on the bridge `cni0` of their node, as flannel's CNI plugin leaves them.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, bail};
use ipnet::Ipv4Net;
use serde_json::{Value, json};

use crate::controlplane::POD_NETWORK;
use crate::flannel::SUBNET_ENV;
use crate::netns::Namespace;
use crate::node::Node;

/// A pod of a lab.
#[derive(Debug)]
pub struct Pod {
    namespace: Namespace,
    address: Ipv4Addr,
}

/// What a node's `subnet.env` tells about its pods.
struct Subnet {
    gateway: Ipv4Addr,
    pods: Ipv4Net,
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
        let address = match plugins.then(cni_plugins).flatten() {
            Some(directory) => by_plugin(node, &namespace, &subnet, directory)?,
            None => by_hand(node, &namespace, &subnet)?,
        };
        Ok(Self { namespace, address })
    }

    /// The pod's address.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
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
                .with_context(|| format!("{key} in {SUBNET_ENV}"))
        };
        let subnet: Ipv4Net = field("FLANNEL_SUBNET")?.parse()?;
        Ok(Self {
            gateway: subnet.addr(),
            pods: subnet.trunc(),
            mtu: field("FLANNEL_MTU")?.parse()?,
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
) -> anyhow::Result<Ipv4Addr> {
    let config = json!({
        "cniVersion": "1.0.0", "name": "cbr0", "type": "bridge", "bridge": "cni0",
        "mtu": subnet.mtu, "isGateway": true, "isDefaultGateway": true, "hairpinMode": true,
        "forceAddress": true, "ipMasq": false,
        "ipam": {"type": "host-local", "ranges": [[{"subnet": subnet.pods}]],
            "routes": [{"dst": POD_NETWORK}]},
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
    let Some(address) = answer["ips"][0]["address"].as_str() else {
        bail!(
            "CNI plugin on {}: {answer} {}",
            node.name(),
            String::from_utf8_lossy(&output.stderr)
        );
    };
    Ok(address.parse::<Ipv4Net>()?.addr())
}

/// The same, with nothing but `ip`.
fn by_hand(node: &Node, pod: &Namespace, subnet: &Subnet) -> anyhow::Result<Ipv4Addr> {
    let Subnet { gateway, pods, mtu } = subnet;
    let length = pods.prefix_len();
    let broadcast = pods.broadcast();
    let host = node.namespace();
    if host.attempt("ip link show cni0")?.status.success() {
        let taken = host.run("ip -o link show master cni0")?.lines().count();
        return plug(node, pod, subnet, taken);
    }
    host.sh(&format!(
        "ip link add cni0 mtu {mtu} type bridge
         ip address add {gateway}/{length} broadcast {broadcast} dev cni0
         ip link set cni0 up"
    ))?;
    plug(node, pod, subnet, 0)
}

/// Connects a pod to `cni0` with the next address after the `taken` ones.
fn plug(node: &Node, pod: &Namespace, subnet: &Subnet, taken: usize) -> anyhow::Result<Ipv4Addr> {
    let Subnet { gateway, pods, mtu } = subnet;
    let address = Ipv4Addr::from(u32::from(*gateway) + 1 + u32::try_from(taken)?);
    let device = format!("veth{taken}");
    let host = node.namespace();
    host.veth(&device, pod, "eth0")?;
    host.sh(&format!(
        "ip link set {device} mtu {mtu} master cni0
         bridge link set dev {device} hairpin on"
    ))?;
    pod.sh(&format!(
        "ip link set eth0 mtu {mtu}
         ip address add {address}/{} dev eth0
         ip route add default via {gateway}
         ip route add {POD_NETWORK} via {gateway}",
        pods.prefix_len()
    ))?;
    Ok(address)
}
