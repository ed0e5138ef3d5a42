//! Flannel on the nodes of a lab: the real daemon, or a stand-in that leaves the same state behind.
//!
//! The stand-in needs nothing but `ip`, `bridge` and `iptables`. It does not watch anything: it
//! sets up a cluster whose nodes are all known, as flannel 0.28 does for each lease. A test
//! compares what both leave on a node.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use ipnet::IpNet;
use serde_json::{Value, json};

use crate::client::Client;
use crate::controlplane::program;
use crate::family::{Family, Inner};
use crate::node::Node;
use crate::process::Process;

/// Where k3s keeps flannel's configuration, and the agent looks for it.
pub const NET_CONF: &str = "/var/lib/rancher/k3s/agent/etc/flannel/net-conf.json";

/// What flannel writes when it is up.
pub const SUBNET_ENV: &str = "/run/flannel/subnet.env";

/// How flannel carries packets between the nodes of one region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// Always through `flannel.1`.
    #[default]
    Vxlan,
    /// Directly between nodes of one subnet, else through `flannel.1`.
    DirectRouting,
    /// Directly; nodes of other subnets get no route at all.
    HostGateway,
}

/// Which firewall flannel (and kube-proxy, if asked for iptables) writes its rules into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Firewall {
    /// The `iptables` program over nf_tables.
    #[default]
    IptablesNft,
    /// The `iptables` program over the old tables.
    IptablesLegacy,
    /// `EnableNFTables`: no iptables.
    Nftables,
}

/// What flannel publishes of one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The node's name.
    pub node: String,
    /// What it has of each family.
    pub parts: Vec<Part>,
}

/// What flannel publishes of one family of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The node's pods.
    pub pods: IpNet,
    /// Where VXLAN packets to it go.
    pub public: IpAddr,
    /// The address of its `flannel.1` or `flannel-v6.1`.
    pub mac: String,
}

impl Lease {
    fn part(&self, family: Family) -> Option<&Part> {
        let mut parts = self.parts.iter();
        parts.find(|part| Family::of(part.public) == family)
    }
}

/// The name of flannel's VXLAN device.
#[must_use]
pub const fn device(family: Family) -> &'static str {
    match family {
        Family::V4 => "flannel.1",
        Family::V6 => "flannel-v6.1",
    }
}

impl Backend {
    /// The text of `net-conf.json` as k3s writes it.
    #[must_use]
    pub fn net_conf(self, firewall: Firewall, inner: Inner) -> String {
        let backend = match self {
            Self::Vxlan => json!({"Type": "vxlan"}),
            Self::DirectRouting => json!({"Type": "vxlan", "DirectRouting": true}),
            Self::HostGateway => json!({"Type": "host-gw"}),
        };
        let mut config = json!({
            "Network": Family::V4.pod_network(), "EnableIPv4": inner.has(Family::V4),
            "IPv6Network": Family::V6.pod_network(), "EnableIPv6": inner.has(Family::V6),
            "Backend": backend,
        });
        // What k3s writes for a family that is off.
        if !inner.has(Family::V4) {
            config["Network"] = "0.0.0.0/0".into();
        }
        if !inner.has(Family::V6) {
            config["IPv6Network"] = "::/0".into();
        }
        if firewall == Firewall::Nftables {
            config["EnableNFTables"] = Value::Bool(true);
        }
        config.to_string()
    }
}

impl Firewall {
    /// A search path on which `iptables` is of this flavour.
    ///
    /// # Errors
    ///
    /// When the machine has no such flavour.
    pub fn search_path(self, directory: &Path) -> anyhow::Result<String> {
        let flavour = match self {
            Self::IptablesNft | Self::Nftables => "nft",
            Self::IptablesLegacy => "legacy",
        };
        let ambient = std::env::var("PATH").unwrap_or_default();
        let links = directory.join(format!("iptables-{flavour}"));
        if !links.exists() {
            fs::create_dir_all(&links)?;
            for family in ["iptables", "ip6tables"] {
                for verb in ["", "-save", "-restore"] {
                    let target = find(&ambient, &format!("{family}-{flavour}{verb}"))?;
                    symlink(target, links.join(format!("{family}{verb}")))?;
                }
            }
        }
        Ok(format!("{}:{ambient}", links.display()))
    }
}

/// Makes the service account that flanneld runs as, with the rights its manifest gives it.
///
/// # Errors
///
/// When the API server refuses.
pub fn create_account(api: &Client) -> anyhow::Result<()> {
    let name = json!({"name": "flannel"});
    api.create(
        "/api/v1/namespaces",
        &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kube-flannel"}}),
    )?;
    api.create(
        "/api/v1/namespaces/kube-flannel/serviceaccounts",
        &json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": name}),
    )?;
    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    api.create(
        &format!("{rbac}/clusterroles"),
        &json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": name,
            "rules": [
                {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]},
                {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]},
                {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]},
            ],
        }),
    )?;
    api.create(
        &format!("{rbac}/clusterrolebindings"),
        &json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
            "metadata": name,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole",
                "name": "flannel"},
            "subjects": [{"kind": "ServiceAccount", "name": "flannel",
                "namespace": "kube-flannel"}],
        }),
    )?;
    Ok(())
}

/// Starts the real flanneld on a node; it is up once [`SUBNET_ENV`] is there.
///
/// # Errors
///
/// When it has not been built or cannot be started.
pub fn start(node: &Node, kubeconfig: &Path, path: &str) -> anyhow::Result<Process> {
    let mut command = Command::new(program("flanneld")?);
    command
        .env("NODE_NAME", node.name())
        .env("PATH", path)
        .args(["--kube-subnet-mgr", "--iface=eth0", "--ip-masq"])
        .arg("--net-config-path")
        .arg(NET_CONF)
        .arg("--kubeconfig-file")
        .arg(kubeconfig);
    node.spawn("flanneld", command)
}

/// Writes the configuration that flannel and the agent read.
///
/// # Errors
///
/// When the file cannot be written.
pub fn write_net_conf(
    node: &Node,
    backend: Backend,
    firewall: Firewall,
    inner: Inner,
) -> anyhow::Result<()> {
    let file = node.outside(NET_CONF);
    fs::create_dir_all(file.parent().context("NET_CONF lies in a directory")?)?;
    fs::write(&file, backend.net_conf(firewall, inner))?;
    Ok(())
}

/// Does on `node` what flannel does when it starts, for a cluster of these leases.
///
/// # Errors
///
/// When one of the commands fails.
pub fn stand_in(node: &Node, leases: &[Lease], backend: Backend) -> anyhow::Result<()> {
    let own = leases
        .iter()
        .find(|lease| lease.node == node.name())
        .with_context(|| format!("no lease of {}", node.name()))?;
    let mut script = String::new();
    for part in &own.parts {
        script += &stand_in_family(own, part, leases, backend);
    }
    node.namespace().sh(&script)?;

    let env = node.outside(SUBNET_ENV);
    fs::create_dir_all(env.parent().context("SUBNET_ENV lies in a directory")?)?;
    let mtu = match backend {
        Backend::HostGateway => 1500,
        Backend::Vxlan | Backend::DirectRouting => 1450,
    };
    let mut text = String::new();
    for part in &own.parts {
        let family = Family::of(part.public);
        let infix = match family {
            Family::V4 => "",
            Family::V6 => "IPV6_",
        };
        text += &format!(
            "FLANNEL_{infix}NETWORK={}\nFLANNEL_{infix}SUBNET={}/{}\n",
            family.pod_network(),
            nth(part.pods, 1),
            part.pods.prefix_len()
        );
    }
    text += &format!("FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=true\n");
    fs::write(env, text)?;
    Ok(())
}

/// The commands for one family of a node.
fn stand_in_family(own: &Lease, part: &Part, leases: &[Lease], backend: Backend) -> String {
    let family = Family::of(part.public);
    let (device, option) = (device(family), family.option());
    let mut script = String::new();
    if backend != Backend::HostGateway {
        script += &format!(
            "ip link add {device} address {} mtu 1450 txqueuelen 0 type vxlan \
                 id 1 dev eth0 local {} dstport 8472 nolearning\n\
             ip address add {}/{} dev {device}{}\n\
             ip link set {device} up\n",
            part.mac,
            part.public,
            part.pods.network(),
            part.pods.max_prefix_len(),
            if family == Family::V6 { " nodad" } else { "" },
        );
    }
    for lease in leases.iter().filter(|lease| lease.node != own.node) {
        let Some(Part { pods, public, mac }) = lease.part(family) else {
            continue;
        };
        let gateway = pods.network();
        match backend {
            Backend::HostGateway | Backend::DirectRouting if on_one_link(*public, part.public) => {
                script += &format!("ip {option} route replace {pods} via {public} dev eth0\n");
            }
            Backend::HostGateway => {}
            Backend::Vxlan | Backend::DirectRouting => {
                script += &format!(
                    "ip neighbour replace {gateway} lladdr {mac} dev {device} nud permanent\n\
                     bridge fdb replace {mac} dev {device} dst {public} self permanent\n\
                     ip {option} route replace {pods} via {gateway} dev {device} onlink\n"
                );
            }
        }
    }
    script + &masquerade(part.pods)
}

/// The lab's subnets are all /24 and /64, and so is flannel's test whether a node is a neighbour.
fn on_one_link(one: IpAddr, other: IpAddr) -> bool {
    match (one, other) {
        (IpAddr::V4(one), IpAddr::V4(other)) => one.octets()[..3] == other.octets()[..3],
        (IpAddr::V6(one), IpAddr::V6(other)) => one.octets()[..8] == other.octets()[..8],
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
    }
}

/// The address `offset` after a network's own.
pub(crate) fn nth(net: IpNet, offset: u8) -> IpAddr {
    match net.network() {
        IpAddr::V4(first) => Ipv4Addr::from(u32::from(first) + u32::from(offset)).into(),
        IpAddr::V6(first) => Ipv6Addr::from(u128::from(first) + u128::from(offset)).into(),
    }
}

/// The annotations that flannel puts on a lease's Node.
#[must_use]
pub fn annotations(lease: &Lease, backend: Backend) -> BTreeMap<String, String> {
    let kind = match backend {
        Backend::HostGateway => "host-gw",
        Backend::Vxlan | Backend::DirectRouting => "vxlan",
    };
    let mut annotations = vec![
        ("kube-subnet-manager", "true".to_owned()),
        ("backend-type", kind.to_owned()),
    ];
    for part in &lease.parts {
        let (data_key, ip_key) = match part.public {
            IpAddr::V4(_) => ("backend-data", "public-ip"),
            IpAddr::V6(_) => ("backend-v6-data", "public-ipv6"),
        };
        let data = match backend {
            Backend::HostGateway => "null".to_owned(),
            Backend::Vxlan | Backend::DirectRouting => {
                format!("{{\"VNI\":1,\"VtepMAC\":\"{}\"}}", part.mac)
            }
        };
        annotations.push((data_key, data));
        annotations.push((ip_key, part.public.to_string()));
    }
    annotations
        .into_iter()
        .map(|(key, value)| (format!("flannel.alpha.coreos.com/{key}"), value))
        .collect()
}

/// Flannel's rules, in its order and with its comments.
fn masquerade(pods: IpNet) -> String {
    let family = Family::of(pods.addr());
    let (iptables, network) = (family.iptables(), family.pod_network());
    let multicast = match family {
        Family::V4 => "224.0.0.0/4",
        Family::V6 => "ff00::/8",
    };
    let nat = |rule: &str| {
        format!(
            "{iptables} -t nat -A FLANNEL-POSTRTG {}\n",
            rule.replace("//", "-m comment --comment 'flanneld masq' -j")
        )
    };
    [
        format!("{iptables} -t nat -N FLANNEL-POSTRTG\n"),
        format!(
            "{iptables} -t nat -A POSTROUTING -m comment --comment 'flanneld masq' -j FLANNEL-POSTRTG\n"
        ),
        nat("-m mark --mark 0x4000/0x4000 // RETURN"),
        nat(&format!("-s {pods} -d {network} // RETURN")),
        nat(&format!("-s {network} -d {pods} // RETURN")),
        nat(&format!("! -s {network} -d {pods} // RETURN")),
        nat(&format!(
            "-s {network} ! -d {multicast} // MASQUERADE --random-fully"
        )),
        nat(&format!(
            "! -s {network} -d {network} // MASQUERADE --random-fully"
        )),
        format!(
            "{iptables} -N FLANNEL-FWD
             {iptables} -A FORWARD -m comment --comment 'flanneld forward' -j FLANNEL-FWD
             {iptables} -A FLANNEL-FWD -s {network} -m comment --comment 'flanneld forward' -j ACCEPT
             {iptables} -A FLANNEL-FWD -d {network} -m comment --comment 'flanneld forward' -j ACCEPT\n"
        ),
    ]
    .concat()
}

fn find(path: &str, program: &str) -> anyhow::Result<PathBuf> {
    std::env::split_paths(path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")])
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.exists())
        .with_context(|| format!("{program} is missing: install iptables (scripts/setup.sh does)"))
}
