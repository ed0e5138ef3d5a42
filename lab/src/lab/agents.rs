//! Selvedge on the nodes of a lab: annotations as an operator sets them, and the real program.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};

use super::{Lab, Parts, Places as _};
use crate::controlplane::kubernetes_service;
use crate::process::{Process, wait_for};
use crate::topology::{MASTER, Site};

/// How an agent finds the API server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// By `--kubeconfig`.
    #[default]
    Kubeconfig,
    /// As a pod of a DaemonSet: a service account's files and two environment variables.
    InCluster,
}

/// Where an agent finds its kubeconfig, on its node.
const KUBECONFIG: &str = "/run/selvedge-lab.kubeconfig";

/// The flags that an operator gives agents beside flannel, after `--kubeconfig` and `--hostname`.
pub const AGENT_FLAGS: [&str; 4] = [
    "--cni=false",
    "--compatibility=flannel",
    "--local=false",
    "--encapsulate=crosssubnet",
];

/// The same, with one leader a region: for labs in which it must be known which node carries the traffic.
pub const ONE_LEADER: [&str; 5] = {
    let [cni, compatibility, local, encapsulate] = AGENT_FLAGS;
    [
        cni,
        compatibility,
        local,
        encapsulate,
        "--leaders-per-region=1",
    ]
};

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
    /// Whether the nodes are annotated ([`Lab::annotate_nodes`]), or have only their regions' labels.
    pub annotate: bool,
}

impl<'a> Mesh<'a> {
    /// Nodes annotated as an operator of two regions does, and a kubeconfig for each agent.
    #[must_use]
    pub fn annotated(binary: &'a Path, manifest: &'a Path) -> Self {
        Self {
            binary,
            manifest,
            access: Access::Kubeconfig,
            flags: &AGENT_FLAGS,
            annotate: true,
        }
    }

    /// The same with one leader a region ([`ONE_LEADER`]).
    #[must_use]
    pub fn of_one_leader(binary: &'a Path, manifest: &'a Path) -> Self {
        Self {
            flags: &ONE_LEADER,
            ..Self::annotated(binary, manifest)
        }
    }

    /// Nodes with their regions' labels and no annotation, agents with these flags and a kubeconfig each.
    #[must_use]
    pub fn labelled(binary: &'a Path, manifest: &'a Path, flags: &'a [&'a str]) -> Self {
        Self {
            flags,
            annotate: false,
            ..Self::annotated(binary, manifest)
        }
    }
}

impl Lab {
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

    /// Labels and annotates the nodes as an operator of two regions does, command by command.
    ///
    /// # Errors
    ///
    /// When the API server refuses.
    pub fn annotate_nodes(&self) -> anyhow::Result<()> {
        self.label_regions()?;
        let endpoint = SocketAddr::new(self.options.shape.master_public(), 51820).to_string();
        self.api().annotate(
            MASTER,
            &[
                ("kilo.squat.ai/force-endpoint", Some(endpoint.as_str())),
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

    /// Applies Selvedge's manifest, labels the regions, annotates the nodes, and starts an agent on
    /// every node; returns when all of them are ready.
    ///
    /// # Errors
    ///
    /// When an agent does not become ready within two minutes.
    pub fn join(&mut self, mesh: &Mesh<'_>) -> anyhow::Result<Duration> {
        if self.options.parts == Parts::Real {
            self.kubectl_apply(mesh.manifest)?;
        }
        if mesh.annotate {
            self.annotate_nodes()?;
        } else {
            self.label_regions()?;
        }
        for name in self.node_names() {
            self.start_agent(mesh.binary, &name, mesh.access, mesh.flags)?;
        }
        self.wait_agents(Duration::from_secs(120))
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
        match access {
            Access::Kubeconfig => {
                let kubeconfig = self.server.kubeconfig(&token, "kube-system")?;
                fs::write(machine.outside(KUBECONFIG), kubeconfig)?;
            }
            Access::InCluster => {
                let directory = machine.outside("/run/secrets/kubernetes.io/serviceaccount");
                fs::create_dir_all(&directory)?;
                fs::write(directory.join("token"), &token)?;
                fs::write(directory.join("namespace"), "kube-system")?;
                fs::copy(self.plane()?.authority(), directory.join("ca.crt"))?;
            }
        }
        self.restart_agent(binary, node, access, flags)
    }

    /// Starts an agent with what one before it was given: that needs no API server.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn restart_agent(
        &mut self,
        binary: &Path,
        node: &str,
        access: Access,
        flags: &[&str],
    ) -> anyhow::Result<()> {
        let machine = self.network.node(node)?;
        let service = kubernetes_service(self.family());
        let mut command = Command::new(binary);
        command.env_clear().env("NODE_NAME", node).arg("agent");
        match access {
            Access::Kubeconfig => {
                command.arg(format!("--kubeconfig={KUBECONFIG}"));
            }
            Access::InCluster => {
                command
                    .env("KUBERNETES_SERVICE_HOST", service.to_string())
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
}
