//! Flannel on the nodes of a lab: the real daemon, or a stand-in that leaves the same state behind.
//!
//! The stand-in needs nothing but `ip`, `bridge` and `iptables`. It does not watch anything: it
//! sets up a cluster whose nodes are all known, as flannel 0.28 does for each lease. A test
//! compares what both leave on a node.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use ipnet::Ipv4Net;
use serde_json::{Value, json};

use crate::client::Client;
use crate::controlplane::{POD_NETWORK, program};
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
    /// The node's pods.
    pub pods: Ipv4Net,
    /// Where VXLAN packets to it go.
    pub public: Ipv4Addr,
    /// The address of its `flannel.1`.
    pub mac: String,
}

impl Backend {
    /// The text of `net-conf.json` as k3s writes it.
    #[must_use]
    pub fn net_conf(self, firewall: Firewall) -> String {
        let backend = match self {
            Self::Vxlan => json!({"Type": "vxlan"}),
            Self::DirectRouting => json!({"Type": "vxlan", "DirectRouting": true}),
            Self::HostGateway => json!({"Type": "host-gw"}),
        };
        let mut config = json!({
            "Network": POD_NETWORK, "EnableIPv4": true, "EnableIPv6": false,
            "IPv6Network": "::/0", "Backend": backend,
        });
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
pub fn write_net_conf(node: &Node, backend: Backend, firewall: Firewall) -> anyhow::Result<()> {
    let file = node.outside(NET_CONF);
    fs::create_dir_all(file.parent().context("NET_CONF lies in a directory")?)?;
    fs::write(&file, backend.net_conf(firewall))?;
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
    if backend != Backend::HostGateway {
        script += &format!(
            "ip link add flannel.1 address {} mtu 1450 txqueuelen 0 type vxlan \
                 id 1 dev eth0 local {} dstport 8472 nolearning\n\
             ip address add {}/32 dev flannel.1\n\
             ip link set flannel.1 up\n",
            own.mac,
            own.public,
            own.pods.network()
        );
    }
    for lease in leases.iter().filter(|lease| lease.node != own.node) {
        let Lease {
            pods, public, mac, ..
        } = lease;
        // The lab's subnets are all /24, and so is flannel's test whether a node is a neighbour.
        let neighbour = public.octets()[..3] == own.public.octets()[..3];
        let gateway = pods.network();
        match backend {
            Backend::HostGateway | Backend::DirectRouting if neighbour => {
                script += &format!("ip route replace {pods} via {public} dev eth0\n");
            }
            Backend::HostGateway => {}
            Backend::Vxlan | Backend::DirectRouting => {
                script += &format!(
                    "ip neighbour replace {gateway} lladdr {mac} dev flannel.1 nud permanent\n\
                     bridge fdb replace {mac} dev flannel.1 dst {public} self permanent\n\
                     ip route replace {pods} via {gateway} dev flannel.1 onlink\n"
                );
            }
        }
    }
    script += &masquerade(own.pods);
    node.namespace().sh(&script)?;

    let env = node.outside(SUBNET_ENV);
    fs::create_dir_all(env.parent().context("SUBNET_ENV lies in a directory")?)?;
    let mtu = match backend {
        Backend::HostGateway => 1500,
        Backend::Vxlan | Backend::DirectRouting => 1450,
    };
    let gateway = Ipv4Addr::from(u32::from(own.pods.network()) + 1);
    fs::write(
        env,
        format!(
            "FLANNEL_NETWORK={POD_NETWORK}\nFLANNEL_SUBNET={gateway}/{}\n\
             FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=true\n",
            own.pods.prefix_len()
        ),
    )?;
    Ok(())
}

/// The annotations that flannel puts on a lease's Node.
#[must_use]
pub fn annotations(lease: &Lease, backend: Backend) -> BTreeMap<String, String> {
    let (kind, data) = match backend {
        Backend::HostGateway => ("host-gw", "null".to_owned()),
        Backend::Vxlan | Backend::DirectRouting => (
            "vxlan",
            format!("{{\"VNI\":1,\"VtepMAC\":\"{}\"}}", lease.mac),
        ),
    };
    [
        ("kube-subnet-manager", "true".to_owned()),
        ("backend-type", kind.to_owned()),
        ("backend-data", data),
        ("public-ip", lease.public.to_string()),
    ]
    .into_iter()
    .map(|(key, value)| (format!("flannel.alpha.coreos.com/{key}"), value))
    .collect()
}

/// Flannel's rules, in its order and with its comments.
fn masquerade(pods: Ipv4Net) -> String {
    let nat = |rule: &str| {
        format!(
            "iptables -t nat -A FLANNEL-POSTRTG {}\n",
            rule.replace("//", "-m comment --comment 'flanneld masq' -j")
        )
    };
    [
        "iptables -t nat -N FLANNEL-POSTRTG\n".to_owned(),
        "iptables -t nat -A POSTROUTING -m comment --comment 'flanneld masq' -j FLANNEL-POSTRTG\n"
            .to_owned(),
        nat("-m mark --mark 0x4000/0x4000 // RETURN"),
        nat(&format!("-s {pods} -d {POD_NETWORK} // RETURN")),
        nat(&format!("-s {POD_NETWORK} -d {pods} // RETURN")),
        nat(&format!("! -s {POD_NETWORK} -d {pods} // RETURN")),
        nat(&format!(
            "-s {POD_NETWORK} ! -d 224.0.0.0/4 // MASQUERADE --random-fully"
        )),
        nat(&format!(
            "! -s {POD_NETWORK} -d {POD_NETWORK} // MASQUERADE --random-fully"
        )),
        format!(
            "iptables -N FLANNEL-FWD
             iptables -A FORWARD -m comment --comment 'flanneld forward' -j FLANNEL-FWD
             iptables -A FLANNEL-FWD -s {POD_NETWORK} -m comment --comment 'flanneld forward' -j ACCEPT
             iptables -A FLANNEL-FWD -d {POD_NETWORK} -m comment --comment 'flanneld forward' -j ACCEPT\n"
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
