//! A whole cluster that is up: network, API server, registered nodes, flannel, one pod per node,
//! and the agents, started and stopped one by one.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use ipnet::IpNet;

use crate::apiserver::ApiServer;
use crate::client::Client;
use crate::controlplane::ControlPlane;
use crate::family::Family;
use crate::flannel::{self, Backend, Firewall, nth};
use crate::node::Node;
use crate::pod::Pod;
use crate::process::{Process, wait_for};
use crate::scratch::Scratch;
use crate::topology::{MASTER, Network, Shape};
use crate::traffic::Place;

mod agents;
mod bringup;
mod dump;
mod fixture;
mod places;
mod reboot;

pub use agents::{AGENT_FLAGS, Access, Mesh, ONE_LEADER};
pub use bringup::{register_node, status};
pub use places::{OfFamily, Places};

/// Which kube-proxy runs on the nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Proxy {
    /// None: services do not work.
    #[default]
    None,
    /// `--proxy-mode=iptables`.
    Iptables,
    /// `--proxy-mode=nftables`.
    Nftables,
}

/// Which programs act as Kubernetes and flannel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Parts {
    /// The real kube-apiserver, etcd, flanneld and CNI plugins.
    #[default]
    Real,
    /// Stand-ins that need nothing but `ip`, `bridge` and `iptables`; no services.
    StandIns,
}

/// What a lab is made of.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// The network.
    pub shape: Shape,
    /// Flannel's backend.
    pub backend: Backend,
    /// Flannel's firewall.
    pub firewall: Firewall,
    /// The service proxy.
    pub proxy: Proxy,
    /// Real parts or stand-ins.
    pub parts: Parts,
}

/// A cluster that is up; taken down when the value is dropped.
#[derive(Debug)]
pub struct Lab {
    // Declared in the order in which they must end.
    agents: BTreeMap<String, Process>,
    proxies: Vec<Process>,
    flanneld: BTreeMap<String, Process>,
    server: ApiServer,
    pods: BTreeMap<String, Pod>,
    network: Network,
    options: Options,
    search_path: String,
    scratch: Scratch,
}

impl Lab {
    /// The network below.
    #[must_use]
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The real control plane.
    ///
    /// # Errors
    ///
    /// In a lab of stand-ins.
    pub fn plane(&self) -> anyhow::Result<&ControlPlane> {
        self.server.plane()
    }

    /// The kubeconfig file of the administrator.
    #[must_use]
    pub fn admin_kubeconfig(&self) -> PathBuf {
        self.server.admin_kubeconfig()
    }

    /// A client of the API server with all rights.
    #[must_use]
    pub fn api(&self) -> &Client {
        self.server.admin()
    }

    /// What it was made of.
    #[must_use]
    pub fn options(&self) -> Options {
        self.options
    }

    /// A directory for a test's own files, removed with the lab.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.scratch.path()
    }

    /// The node of that name.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn node(&self, name: &str) -> anyhow::Result<&Node> {
        self.network.node(name)
    }

    /// All nodes' names: the master first.
    #[must_use]
    pub fn node_names(&self) -> Vec<String> {
        self.network
            .nodes()
            .iter()
            .map(|node| node.name().to_owned())
            .collect()
    }

    /// The pod on a node.
    ///
    /// # Errors
    ///
    /// When there is no such node.
    pub fn pod(&self, node: &str) -> anyhow::Result<&Pod> {
        self.pods
            .get(node)
            .with_context(|| format!("no pod on {node}"))
    }

    /// The cluster's address families, the primary one first.
    #[must_use]
    pub fn families(&self) -> Vec<Family> {
        let shape = self.options.shape;
        shape.inner.families(shape.wan)
    }

    /// The pods' networks, the primary family's first.
    #[must_use]
    pub fn pod_networks(&self) -> Vec<IpNet> {
        let networks = self.families().into_iter().map(Family::pod_network);
        let networks = networks.map(|network| network.parse());
        networks
            .collect::<Result<_, _>>()
            .expect("constants that are networks")
    }

    /// The lab as one of its families sees it.
    #[must_use]
    pub fn of(&self, family: Family) -> OfFamily<'_> {
        OfFamily { lab: self, family }
    }

    /// Every pod and every host, by its address of the primary family.
    #[must_use]
    pub fn places(&self) -> Vec<Place> {
        Places::places(self)
    }

    /// Every pod and every host, once for each family.
    #[must_use]
    pub fn places_of_all_families(&self) -> Vec<Place> {
        let families = self.families().into_iter();
        families
            .flat_map(|family| self.of(family).places())
            .collect()
    }

    /// The place of that name: `pod@node-master` or `node-master`.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn place(&self, name: &str) -> anyhow::Result<Place> {
        Places::place(self, name)
    }

    /// The address of the service in front of a place, of the family of the place's address.
    #[must_use]
    pub fn service(&self, place: &Place) -> IpAddr {
        let number = self
            .places()
            .iter()
            .position(|other| other.name == place.name);
        let number = number.and_then(|number| u8::try_from(number).ok());
        let number = number.unwrap_or(u8::MAX - 1);
        match Family::of(place.address) {
            Family::V4 => [10, 43, 7, 1 + number].into(),
            Family::V6 => {
                let network = Family::V6.service_network().parse();
                nth(
                    network.expect("a constant that is a network"),
                    0x71 + number,
                )
            }
        }
    }

    /// Whether two nodes are in different regions.
    ///
    /// # Errors
    ///
    /// When one of them does not exist.
    pub fn apart(&self, one: &str, other: &str) -> anyhow::Result<bool> {
        Ok(self.network.site(one)? != self.network.site(other)?)
    }

    /// Applies a manifest file with the real kubectl, as admin.
    ///
    /// # Errors
    ///
    /// When the API server refuses any object of it.
    pub fn kubectl_apply(&self, manifest: &Path) -> anyhow::Result<()> {
        let manifest = manifest.display().to_string();
        self.kubectl(&["apply", "-f", &manifest])?;
        Ok(())
    }

    /// Runs the real kubectl on the master, as admin, and returns what it printed.
    ///
    /// # Errors
    ///
    /// When it fails.
    pub fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(crate::controlplane::program("labcp")?);
        command
            .arg("kubectl")
            .arg("--kubeconfig")
            .arg(self.plane()?.kubeconfig_path("admin"))
            // A cache of another lab's API server, at the same address, would be wrong here.
            .arg("--cache-dir")
            .arg(self.directory().join("kubectl"))
            .args(arguments);
        let output = self.node(MASTER)?.output(command)?;
        if !output.status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr);
            bail!("kubectl {}: {}", arguments.join(" "), complaint.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The last lines of a program's log on a node.
    #[must_use]
    pub fn tail(&self, node: &str, program: &str) -> String {
        let text = self
            .node(node)
            .ok()
            .and_then(|node| fs::read_to_string(node.log(program)).ok())
            .unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }

    /// Starts flanneld on a node.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start_flannel(&mut self, node: &str) -> anyhow::Result<()> {
        let kubeconfig = self.flannel_kubeconfig();
        let machine = self.network.node(node)?;
        let process = flannel::start(machine, &kubeconfig, &self.search_path)?;
        self.flanneld.insert(node.to_owned(), process);
        Ok(())
    }

    /// Stops flanneld on a node; what it set up stays.
    ///
    /// # Errors
    ///
    /// When it does not end.
    pub fn stop_flannel(&mut self, node: &str) -> anyhow::Result<()> {
        if let Some(process) = self.flanneld.remove(node) {
            process.stop()?;
        }
        Ok(())
    }

    /// Stops flanneld on a node, starts it again and waits until it is up.
    ///
    /// # Errors
    ///
    /// When it does not end, or does not come up again.
    pub fn restart_flannel(&mut self, node: &str) -> anyhow::Result<()> {
        self.stop_flannel(node)?;
        // It is written again once flannel is up.
        let file = self.node(node)?.outside(flannel::SUBNET_ENV);
        let before = fs::metadata(&file)?.modified()?;
        self.start_flannel(node)?;
        wait_for("flannel to be up again", Duration::from_secs(60), || {
            fs::metadata(&file)
                .and_then(|data| data.modified())
                .is_ok_and(|written| written > before)
        })?;
        Ok(())
    }

    /// Leaves everything up when the value is dropped.
    pub fn keep(&mut self) {
        self.agents.values_mut().for_each(Process::keep);
        self.proxies.iter_mut().for_each(Process::keep);
        self.flanneld.values_mut().for_each(Process::keep);
        self.server.keep();
        self.pods.values_mut().for_each(Pod::keep);
        self.network.keep();
        self.scratch.keep();
    }

    /// A node's `spec.podCIDR`.
    ///
    /// # Errors
    ///
    /// When the node does not exist or has none.
    pub fn pod_cidr(&self, node: &str) -> anyhow::Result<IpNet> {
        let cidrs = self.pod_cidrs(node)?;
        cidrs.first().copied().context("a node without podCIDR")
    }

    /// A node's `spec.podCIDRs`.
    ///
    /// # Errors
    ///
    /// When the node does not exist.
    pub fn pod_cidrs(&self, node: &str) -> anyhow::Result<Vec<IpNet>> {
        let object = self.api().get(&format!("/api/v1/nodes/{node}"))?;
        let cidrs = object["spec"]["podCIDRs"].as_array().into_iter().flatten();
        let cidrs = cidrs.filter_map(|cidr| cidr.as_str());
        Ok(cidrs.map(str::parse).collect::<Result<_, _>>()?)
    }

    fn flannel_kubeconfig(&self) -> PathBuf {
        self.directory().join("flannel.kubeconfig")
    }
}
