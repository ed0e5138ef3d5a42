//! A whole cluster that is up: network, API server, registered nodes, flannel, one pod per node,
//! and the agents, started and stopped one by one.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use ipnet::Ipv4Net;
use serde_json::{Value, json};

use crate::apiserver::ApiServer;
use crate::client::Client;
use crate::controlplane::ControlPlane;
use crate::flannel::{self, Backend, Firewall, Lease, SUBNET_ENV};
use crate::node::Node;
use crate::pod::Pod;
use crate::process::{Process, wait_for};
use crate::scratch::Scratch;
use crate::topology::{MASTER, Network, Shape, Site};
use crate::traffic::{PORT, Place};

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

/// Who plays Kubernetes and flannel.
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

/// How an agent is told where the API server is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// By `--kubeconfig`, as scenario 000 does.
    #[default]
    Kubeconfig,
    /// As a pod of a DaemonSet: a service account's files and two environment variables.
    InCluster,
}

/// The flags of scenario 000, after `--kubeconfig` and `--hostname`.
pub const SCENARIO_FLAGS: [&str; 4] = [
    "--cni=false",
    "--compatibility=flannel",
    "--local=false",
    "--encapsulate=crosssubnet",
];

/// How Selvedge is put onto a lab's nodes.
#[derive(Clone, Copy, Debug)]
pub struct Mesh<'a> {
    /// The program `selvedge`.
    pub binary: &'a Path,
    /// Its manifest, for the service account and its rights.
    pub manifest: &'a Path,
    /// How the agents find the API server.
    pub access: Access,
    /// Flags after `--kubeconfig` and `--hostname`.
    pub flags: &'a [&'a str],
    /// Whether the nodes get scenario 000's annotations, or only their regions' labels.
    pub annotate: bool,
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
    /// Brings up a cluster without agents; `progress` is told what is being done.
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
                ApiServer::real(master, &directory.join("control-plane"))?
            }
            Parts::StandIns => {
                progress("control plane: the API server's stand-in");
                ApiServer::stand_in(master, &directory.join("control-plane"))?
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
            lab.drop_forwarded()?;
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

    /// Every pod and every host.
    #[must_use]
    pub fn places(&self) -> Vec<Place> {
        let pods = self.network.nodes().iter().filter_map(|node| {
            let pod = self.pods.get(node.name())?;
            Some(Place {
                name: format!("pod@{}", node.name()),
                node: node.name().to_owned(),
                pod: true,
                address: pod.address(),
                namespace: pod.namespace().path(),
            })
        });
        let hosts = self.network.nodes().iter().map(|node| Place {
            name: node.name().to_owned(),
            node: node.name().to_owned(),
            pod: false,
            address: node.address(),
            namespace: node.namespace().path(),
        });
        pods.chain(hosts).collect()
    }

    /// The place of that name: `pod@node-master` or `node-master`.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn place(&self, name: &str) -> anyhow::Result<Place> {
        self.places()
            .into_iter()
            .find(|place| place.name == name)
            .with_context(|| format!("the lab has no place {name}"))
    }

    /// The address of the service in front of a place.
    #[must_use]
    pub fn service(&self, place: &Place) -> Ipv4Addr {
        let number = self
            .places()
            .iter()
            .position(|other| other.name == place.name);
        let number = number.and_then(|number| u8::try_from(number).ok());
        Ipv4Addr::new(10, 43, 7, 1 + number.unwrap_or(u8::MAX - 1))
    }

    /// Whether two nodes are in different regions.
    ///
    /// # Errors
    ///
    /// When one of them does not exist.
    pub fn apart(&self, one: &str, other: &str) -> anyhow::Result<bool> {
        Ok(self.network.site(one)? != self.network.site(other)?)
    }

    /// Labels all nodes with their region, and nothing else.
    ///
    /// # Errors
    ///
    /// When the API server refuses.
    pub fn label_regions(&self) -> anyhow::Result<()> {
        for name in self.node_names() {
            let region = self.network.site(&name)?.region();
            self.api()
                .label(&name, &[("topology.kubernetes.io/region", Some(region))])?;
        }
        Ok(())
    }

    /// Labels and annotates the nodes as scenario 000 does, command by command.
    ///
    /// # Errors
    ///
    /// When the API server refuses.
    pub fn annotate_scenario(&self) -> anyhow::Result<()> {
        self.label_regions()?;
        self.api().annotate(
            MASTER,
            &[
                ("kilo.squat.ai/force-endpoint", Some("203.0.113.10:51820")),
                ("kilo.squat.ai/leader", Some("true")),
                ("kilo.squat.ai/wireguard-ip", Some("10.4.0.1/16")),
            ],
        )?;
        self.api().annotate(
            "node-agent-01",
            &[
                ("kilo.squat.ai/leader", Some("true")),
                ("kilo.squat.ai/wireguard-ip", Some("10.4.0.2/16")),
            ],
        )?;
        for name in self.node_names() {
            if self.network.site(&name)? != Site::Cloud {
                let keepalive = ("kilo.squat.ai/persistent-keepalive", Some("25"));
                self.api().annotate(&name, &[keepalive])?;
            }
        }
        Ok(())
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
            .args(arguments);
        let output = self.node(MASTER)?.output(command)?;
        if !output.status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr);
            bail!("kubectl {}: {}", arguments.join(" "), complaint.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Applies Selvedge's manifest, labels the regions, annotates the nodes, and starts an agent on
    /// every node; returns when all of them are ready.
    ///
    /// # Errors
    ///
    /// When an agent does not become ready within half a minute.
    pub fn join(&mut self, mesh: &Mesh<'_>) -> anyhow::Result<Duration> {
        if self.options.parts == Parts::Real {
            self.kubectl_apply(mesh.manifest)?;
        }
        if mesh.annotate {
            self.annotate_scenario()?;
        } else {
            self.label_regions()?;
        }
        for name in self.node_names() {
            self.start_agent(mesh.binary, &name, mesh.access, mesh.flags)?;
        }
        self.wait_agents(Duration::from_secs(30))
    }

    /// Starts `binary agent` on a node, as the service account of the deployed manifest.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start_agent(
        &mut self,
        binary: &Path,
        node: &str,
        access: Access,
        flags: &[&str],
    ) -> anyhow::Result<()> {
        let token = self.server.node_token("kube-system", "selvedge", node)?;
        let machine = self.network.node(node)?;
        let mut command = Command::new(binary);
        command.env_clear().env("NODE_NAME", node).arg("agent");
        match access {
            Access::Kubeconfig => {
                let file = machine.outside("/run/selvedge-lab.kubeconfig");
                fs::write(&file, self.server.kubeconfig(&token, "kube-system")?)?;
                command.arg("--kubeconfig=/run/selvedge-lab.kubeconfig");
            }
            Access::InCluster => {
                let directory = machine.outside("/run/secrets/kubernetes.io/serviceaccount");
                fs::create_dir_all(&directory)?;
                fs::write(directory.join("token"), &token)?;
                fs::write(directory.join("namespace"), "kube-system")?;
                fs::copy(self.plane()?.authority(), directory.join("ca.crt"))?;
                command
                    .env("KUBERNETES_SERVICE_HOST", "10.43.0.1")
                    .env("KUBERNETES_SERVICE_PORT", "443");
            }
        }
        command
            .env("PATH", &self.search_path)
            .arg(format!("--hostname={node}"))
            .args(flags);
        let process = machine.spawn("agent", command)?;
        self.agents.insert(node.to_owned(), process);
        Ok(())
    }

    /// The agent on a node, if one was started there.
    pub fn agent(&mut self, node: &str) -> Option<&mut Process> {
        self.agents.get_mut(node)
    }

    /// Takes the agent of a node out of the lab's hands, to stop or kill it.
    ///
    /// # Errors
    ///
    /// When none was started there.
    pub fn take_agent(&mut self, node: &str) -> anyhow::Result<Process> {
        self.agents
            .remove(node)
            .with_context(|| format!("no agent on {node}"))
    }

    /// Asks the agent on a node over HTTP: the status code and the body of `path`.
    ///
    /// # Errors
    ///
    /// When it does not listen.
    pub fn ask_agent(&self, node: &str, path: &str) -> anyhow::Result<(u16, String)> {
        crate::client::get_plain(
            &self.node(node)?.namespace().path(),
            ([127, 0, 0, 1], 1107).into(),
            path,
        )
    }

    /// Waits until every agent says that it is ready.
    ///
    /// # Errors
    ///
    /// When one does not within `patience`, or has ended; the error carries the end of its log.
    pub fn wait_agents(&mut self, patience: Duration) -> anyhow::Result<Duration> {
        let names: Vec<String> = self.agents.keys().cloned().collect();
        let mut waited = Duration::ZERO;
        for name in names {
            let mut ended = None;
            let outcome = wait_for(&format!("the agent on {name}"), patience, || {
                ended = self.agents.get_mut(&name).and_then(Process::ended);
                let ready = self.ask_agent(&name, "/ready");
                ended.is_some() || ready.is_ok_and(|(status, _)| status == 200)
            });
            if let Some(status) = ended {
                bail!(
                    "the agent on {name} ended ({status}):\n{}",
                    self.tail(&name, "agent")
                );
            }
            match outcome {
                Ok(time) => waited += time,
                Err(error) => bail!("{error}:\n{}", self.tail(&name, "agent")),
            }
        }
        Ok(waited)
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

    /// What an operator would look at on a node: links, addresses, rules, all tables, firewalls.
    ///
    /// Counters, timers and other things that change by themselves are left out, so that two dumps
    /// of an unchanged node are equal.
    ///
    /// # Errors
    ///
    /// When one of the commands fails.
    pub fn dump(&self, node: &str) -> anyhow::Result<BTreeMap<&'static str, String>> {
        let node = self.node(node)?;
        let mut dump = BTreeMap::new();
        for line in [
            "ip -4 rule",
            "ip -6 rule",
            "ip -4 route show table all",
            "ip -6 route show table all",
            "ip -o link",
            "ip -o address",
            "ip neighbour show nud permanent",
            "bridge fdb show",
            "nft -s list ruleset",
            "iptables-legacy-save",
            "sysctl -a -r ^net\\.",
        ] {
            let text = node.run(line).unwrap_or_else(|error| error.to_string());
            dump.insert(line, steady(&text));
        }
        Ok(dump)
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

    /// Registers the nodes one after the other, so that the pod CIDRs follow their order.
    fn register(&self) -> anyhow::Result<()> {
        for (number, node) in self.network.nodes().iter().enumerate() {
            let (name, address) = (node.name(), node.address());
            // The stand-in has no controllers, and so nobody who would hand out pod CIDRs.
            let pods = format!("10.42.{number}.0/24");
            let pods = (self.options.parts == Parts::StandIns).then_some(pods.as_str());
            register_node(self.api(), name, address, pods)?;
            let what = format!("pod CIDR of {name}");
            wait_for(&what, Duration::from_secs(30), || {
                self.pod_cidr(name).is_ok()
            })?;
        }
        Ok(())
    }

    /// A node's `spec.podCIDR`.
    ///
    /// # Errors
    ///
    /// When the node does not exist or has none.
    pub fn pod_cidr(&self, node: &str) -> anyhow::Result<Ipv4Net> {
        let object = self.api().get(&format!("/api/v1/nodes/{node}"))?;
        let cidr = object["spec"]["podCIDR"].as_str();
        Ok(cidr.context("a node without podCIDR")?.parse()?)
    }

    fn run_flannel(&mut self) -> anyhow::Result<()> {
        let Options {
            backend, firewall, ..
        } = self.options;
        flannel::create_account(self.api())?;
        let token = self.plane()?.token("kube-flannel", "flannel")?;
        let kubeconfig = self.plane()?.kubeconfig(&token, "kube-flannel")?;
        fs::write(self.flannel_kubeconfig(), kubeconfig)?;
        for name in self.node_names() {
            flannel::write_net_conf(self.node(&name)?, backend, firewall)?;
            self.start_flannel(&name)?;
        }
        for name in self.node_names() {
            self.wait_flannel(&name)?;
        }
        Ok(())
    }

    fn imitate_flannel(&self) -> anyhow::Result<()> {
        let Options {
            backend, firewall, ..
        } = self.options;
        let leases = self
            .network
            .nodes()
            .iter()
            .enumerate()
            .map(|(number, node)| {
                Ok(Lease {
                    node: node.name().to_owned(),
                    pods: self.pod_cidr(node.name())?,
                    public: node.address(),
                    mac: format!("02:00:00:00:00:{:02x}", number + 1),
                })
            });
        let leases: Vec<Lease> = leases.collect::<anyhow::Result<_>>()?;
        for lease in &leases {
            let node = self.node(&lease.node)?;
            flannel::write_net_conf(node, backend, firewall)?;
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

    /// What a careful administrator, docker or ufw does.
    fn drop_forwarded(&self) -> anyhow::Result<()> {
        for node in self.network.nodes() {
            let mut command = Command::new("iptables");
            command
                .env("PATH", &self.search_path)
                .args(["-P", "FORWARD", "DROP"]);
            let output = node.output(command)?;
            if !output.status.success() {
                bail!(
                    "iptables -P FORWARD DROP: {}",
                    String::from_utf8_lossy(&output.stderr).trim()
                );
            }
        }
        Ok(())
    }

    fn wait_flannel(&mut self, name: &str) -> anyhow::Result<()> {
        let file = self.node(name)?.outside(SUBNET_ENV);
        let outcome = wait_for(
            &format!("flannel on {name}"),
            Duration::from_secs(30),
            || file.exists(),
        );
        if let Err(error) = outcome {
            bail!("{error}:\n{}", self.tail(name, "flanneld"));
        }
        Ok(())
    }

    fn flannel_kubeconfig(&self) -> PathBuf {
        self.directory().join("flannel.kubeconfig")
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
        for place in self.places() {
            let name = place.name.replace('@', "-");
            let address = self.service(&place).to_string();
            self.api().create(
                "/api/v1/namespaces/default/services",
                &json!({
                    "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
                    "spec": {"clusterIP": address, "ports": [{"port": PORT, "protocol": "TCP"}]},
                }),
            )?;
            self.api().create(
                "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices",
                &json!({
                    "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                    "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}},
                    "addressType": "IPv4",
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
    address: Ipv4Addr,
    pods: Option<&str>,
) -> anyhow::Result<()> {
    let mut node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {
            "kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}},
    });
    if let Some(pods) = pods {
        node["spec"] = json!({"podCIDR": pods, "podCIDRs": [pods]});
    }
    api.create("/api/v1/nodes", &node)?;
    let path = format!("/api/v1/nodes/{name}/status");
    api.merge(&path, &status(IpAddr::V4(address), name, true))?;
    Ok(())
}

/// A merge patch of a node's status.
#[must_use]
pub fn status(address: IpAddr, name: &str, ready: bool) -> Value {
    // Times are compared by nobody here, and a clock is one more thing that can differ.
    const THEN: &str = "2026-01-01T00:00:00Z";
    let ready = if ready { "True" } else { "False" };
    json!({"status": {
        "addresses": [
            {"type": "InternalIP", "address": address.to_string()},
            {"type": "Hostname", "address": name},
        ],
        "conditions": [{"type": "Ready", "status": ready, "reason": "Lab",
            "lastHeartbeatTime": THEN, "lastTransitionTime": THEN}],
    }})
}

/// A dump without the lines and words that change while nobody does anything.
fn steady(text: &str) -> String {
    let mut steady = Vec::new();
    for line in text.lines() {
        let passing = ["conntrack", "nf_log", ".neigh.", "ipfrag_", "ip6frag"];
        if line.starts_with('#')
            || line.starts_with(':')
            || (line.starts_with("net.") && passing.iter().any(|word| line.contains(word)))
        {
            continue;
        }
        // Numbers of links change when one is made anew.
        let (number, rest) = line.split_once(": ").unwrap_or(("", line));
        let line = if number.parse::<u32>().is_ok() {
            rest
        } else {
            line
        };
        let words = line
            .split_whitespace()
            .take_while(|word| *word != "expires" && *word != "valid_lft");
        steady.push(words.collect::<Vec<_>>().join(" "));
    }
    // So does their order. An nft ruleset loses nothing by this that a difference would not show.
    steady.sort();
    steady.join("\n")
}
