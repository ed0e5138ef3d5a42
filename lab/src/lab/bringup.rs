//! Bringing a cluster up, from the network to the services.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::bail;
use serde_json::{Value, json};

use super::{Lab, Options, Parts, Proxy};
use crate::apiserver::ApiServer;
use crate::client::Client;
use crate::controlplane::Reach;
use crate::family::Family;
use crate::flannel::{self, Firewall, Lease, Part, SUBNET_ENV};
use crate::pod::Pod;
use crate::process::wait_for;
use crate::scratch::Scratch;
use crate::topology::{MASTER, Network};
use crate::traffic::PORT;

impl Lab {
    /// Brings up a cluster without agents; `progress` gets a line for each part.
    ///
    /// # Errors
    ///
    /// When a part is missing or does not start.
    pub fn up(
        prefix: &str,
        scratch: Scratch,
        options: Options,
        progress: &dyn Fn(&str),
    ) -> anyhow::Result<Self> {
        let directory = scratch.path();
        progress("network: the internet, NAT routers, nodes");
        let network = Network::up(prefix, &directory.join("nodes"), options.shape)?;
        let search_path = options.firewall.search_path(directory)?;
        let master = network.node(MASTER)?;
        let server = match options.parts {
            Parts::Real => {
                progress("control plane: etcd, kube-apiserver, controllers, scheduler");
                let reach = Reach {
                    public: options.shape.master_public(),
                    advertised: master.address(),
                    families: options.shape.inner.families(options.shape.wan),
                };
                ApiServer::real(master, reach, &directory.join("control-plane"))?
            }
            Parts::StandIns => {
                progress("control plane: the API server's stand-in");
                let public = options.shape.master_public();
                ApiServer::stand_in(master, public, &directory.join("control-plane"))?
            }
        };
        let mut lab = Self {
            agents: BTreeMap::new(),
            proxies: Vec::new(),
            flanneld: BTreeMap::new(),
            server,
            pods: BTreeMap::new(),
            network,
            options,
            search_path,
            scratch,
        };
        progress("nodes: registered, with an InternalIP and a pod CIDR each");
        lab.register()?;
        if options.shape.strict && options.firewall != Firewall::Nftables {
            lab.policy_of_forward("DROP")?;
        }
        match options.parts {
            Parts::Real => {
                progress("flannel: flanneld on every node, one pod each");
                lab.run_flannel()?;
            }
            Parts::StandIns => {
                progress("flannel: its state on every node, set up by hand, one pod each");
                lab.imitate_flannel()?;
            }
        }
        for name in lab.node_names() {
            let node = lab.network.node(&name)?;
            let plugins = options.parts == Parts::Real;
            let pod = Pod::create(node, &format!("{prefix}-pod-{name}"), plugins)?;
            lab.pods.insert(name, pod);
        }
        if options.proxy != Proxy::None {
            progress("services: kube-proxy on every node, one service per place");
            lab.start_proxies()?;
        }
        Ok(lab)
    }

    /// Sets what happens to forwarded packets that no rule accepts, as docker or ufw do with `DROP`.
    ///
    /// # Errors
    ///
    /// When `iptables` fails on a node.
    pub fn policy_of_forward(&self, policy: &str) -> anyhow::Result<()> {
        for family in self.families() {
            let program = family.iptables();
            for node in self.network.nodes() {
                let mut command = Command::new(program);
                command
                    .env("PATH", &self.search_path)
                    .args(["-P", "FORWARD", policy]);
                let output = node.output(command)?;
                if !output.status.success() {
                    let complaint = String::from_utf8_lossy(&output.stderr);
                    bail!("{program} -P FORWARD {policy}: {}", complaint.trim());
                }
            }
        }
        Ok(())
    }

    /// Registers the nodes one after the other, so that the pod CIDRs follow their order.
    fn register(&self) -> anyhow::Result<()> {
        for (number, node) in self.network.nodes().iter().enumerate() {
            let name = node.name();
            // The stand-in has no controllers that would assign pod CIDRs.
            let stand_in = self.options.parts == Parts::StandIns;
            let families = self.families().into_iter().filter(|_| stand_in);
            let pods = families.map(|family| match family {
                Family::V4 => format!("10.42.{number}.0/24"),
                Family::V6 => format!("2001:cafe:42:{number:x}::/64"),
            });
            let pods: Vec<String> = pods.collect();
            register_node_with(self.api(), name, node.addresses(), &pods)?;
            let what = format!("pod CIDR of {name}");
            wait_for(&what, Duration::from_secs(120), || {
                self.pod_cidr(name).is_ok()
            })?;
        }
        Ok(())
    }

    fn run_flannel(&mut self) -> anyhow::Result<()> {
        let Options {
            shape,
            backend,
            firewall,
            ..
        } = self.options;
        flannel::create_account(self.api())?;
        let token = self.plane()?.token("kube-flannel", "flannel")?;
        let kubeconfig = self.plane()?.kubeconfig(&token, "kube-flannel")?;
        fs::write(self.flannel_kubeconfig(), kubeconfig)?;
        for name in self.node_names() {
            flannel::write_net_conf(self.node(&name)?, backend, firewall, shape.inner)?;
            self.start_flannel(&name)?;
        }
        for name in self.node_names() {
            self.wait_flannel(&name)?;
        }
        Ok(())
    }

    fn imitate_flannel(&self) -> anyhow::Result<()> {
        let Options {
            shape,
            backend,
            firewall,
            ..
        } = self.options;
        let leases = self
            .network
            .nodes()
            .iter()
            .enumerate()
            .map(|(number, node)| {
                let pods = self.pod_cidrs(node.name())?;
                let parts = pods.into_iter().filter_map(|pods| {
                    let family = Family::of(pods.addr());
                    let first = if family == Family::V4 { "00" } else { "06" };
                    Some(Part {
                        pods,
                        public: node.address_of(family)?,
                        mac: format!("02:00:00:00:{first}:{:02x}", number + 1),
                    })
                });
                Ok(Lease {
                    node: node.name().to_owned(),
                    parts: parts.collect(),
                })
            });
        let leases: Vec<Lease> = leases.collect::<anyhow::Result<_>>()?;
        for lease in &leases {
            let node = self.node(&lease.node)?;
            flannel::write_net_conf(node, backend, firewall, shape.inner)?;
            flannel::stand_in(node, &leases, backend)?;
            let annotations = flannel::annotations(lease, backend);
            let annotations: Vec<_> = annotations
                .iter()
                .map(|(key, value)| (key.as_str(), Some(value.as_str())))
                .collect();
            self.api().annotate(&lease.node, &annotations)?;
        }
        Ok(())
    }

    pub(super) fn wait_flannel(&mut self, name: &str) -> anyhow::Result<()> {
        let file = self.node(name)?.outside(SUBNET_ENV);
        let outcome = wait_for(
            &format!("flannel on {name}"),
            Duration::from_secs(120),
            || file.exists(),
        );
        if let Err(error) = outcome {
            bail!("{error}:\n{}", self.tail(name, "flanneld"));
        }
        Ok(())
    }

    fn start_proxies(&mut self) -> anyhow::Result<()> {
        let mode = match self.options.proxy {
            Proxy::Nftables => "nftables",
            Proxy::Iptables | Proxy::None => "iptables",
        };
        for node in self.network.nodes() {
            let process = self.plane()?.kube_proxy(node, mode, &self.search_path)?;
            self.proxies.push(process);
        }
        for place in self.places_of_all_families() {
            let (family, suffix) = match Family::of(place.address) {
                Family::V4 => ("IPv4", ""),
                Family::V6 => ("IPv6", "-v6"),
            };
            let name = format!("{}{suffix}", place.name.replace('@', "-"));
            let address = self.service(&place).to_string();
            self.api().create(
                "/api/v1/namespaces/default/services",
                &json!({
                    "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
                    "spec": {"clusterIP": address, "ipFamilies": [family],
                        "ports": [{"port": PORT, "protocol": "TCP"}]},
                }),
            )?;
            self.api().create(
                "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices",
                &json!({
                    "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                    "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}},
                    "addressType": family,
                    "endpoints": [{"addresses": [place.address.to_string()],
                        "nodeName": place.node, "conditions": {"ready": true}}],
                    "ports": [{"name": "", "port": PORT, "protocol": "TCP"}],
                }),
            )?;
        }
        Ok(())
    }
}

/// Registers one node and reports its status as a kubelet would.
///
/// # Errors
///
/// When the API server refuses.
pub fn register_node(
    api: &Client,
    name: &str,
    address: impl Into<IpAddr>,
    pods: Option<&str>,
) -> anyhow::Result<()> {
    let pods: Vec<String> = pods.map(str::to_owned).into_iter().collect();
    register_node_with(api, name, &[address.into()], &pods)
}

/// The same, with all its `InternalIP`s and `spec.podCIDRs`, the primary ones first.
fn register_node_with(
    api: &Client,
    name: &str,
    addresses: &[IpAddr],
    pods: &[String],
) -> anyhow::Result<()> {
    let mut node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {
            "kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}},
    });
    if let Some(first) = pods.first() {
        node["spec"] = json!({"podCIDR": first, "podCIDRs": pods});
    }
    api.create("/api/v1/nodes", &node)?;
    let path = format!("/api/v1/nodes/{name}/status");
    api.merge(&path, &status_with(addresses, name, true))?;
    Ok(())
}

/// A merge patch of a node's status.
#[must_use]
pub fn status(address: IpAddr, name: &str, ready: bool) -> Value {
    status_with(&[address], name, ready)
}

fn status_with(addresses: &[IpAddr], name: &str, ready: bool) -> Value {
    // No test compares these times, and a clock is one more thing that can differ.
    const THEN: &str = "2026-01-01T00:00:00Z";
    let ready = if ready { "True" } else { "False" };
    let addresses = addresses.iter();
    let mut all: Vec<Value> = addresses
        .map(|address| json!({"type": "InternalIP", "address": address.to_string()}))
        .collect();
    all.push(json!({"type": "Hostname", "address": name}));
    json!({"status": {
        "addresses": all,
        "conditions": [{"type": "Ready", "status": ready, "reason": "Lab",
            "lastHeartbeatTime": THEN, "lastTransitionTime": THEN}],
    }})
}
