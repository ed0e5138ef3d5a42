//! The API server of a lab: the real control plane, or the stand-in that comes up at once.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::json;

use crate::client::Client;
use crate::controlplane::{ControlPlane, Reach};
use crate::node::Node;
use crate::process::{Process, wait_for};

/// One that runs; stopped when the value is dropped.
#[derive(Debug)]
pub enum ApiServer {
    /// etcd, kube-apiserver and what belongs to them.
    Real(Box<ControlPlane>),
    /// The stand-in, as a process on the master.
    StandIn(StandIn),
}

/// The stand-in's process: it accepts every caller and does no more than answer.
#[derive(Debug)]
pub struct StandIn {
    process: Process,
    directory: PathBuf,
    admin: Client,
}

impl ApiServer {
    /// Starts the real one on a node.
    ///
    /// # Errors
    ///
    /// As [`ControlPlane::start`].
    pub fn real(master: &Node, reach: Reach, directory: &Path) -> anyhow::Result<Self> {
        let plane = ControlPlane::start(master, reach, directory)?;
        Ok(Self::Real(Box::new(plane)))
    }

    /// Starts the stand-in on a node whose network card has the public address.
    ///
    /// # Errors
    ///
    /// When its program has not been built, or does not listen within a minute.
    pub fn stand_in(master: &Node, public: IpAddr, directory: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(directory)?;
        let listen = SocketAddr::new(public, 6443);
        let mut command = Command::new(beside_this_program("selvedge-lab-api")?);
        command.arg(listen.to_string()).arg(directory);
        let process = master.spawn("api-server", command)?;
        let (kubeconfig, ca) = (
            directory.join("admin.kubeconfig"),
            directory.join("admin.ca.crt"),
        );
        let patience = Duration::from_secs(60);
        wait_for("the API stand-in", patience, || kubeconfig.exists())
            .with_context(|| fs::read_to_string(master.log("api-server")).unwrap_or_default())?;
        let admin = Client::new(&master.namespace().path(), listen, &ca, "")?;
        wait_for("the API stand-in", patience, || {
            admin.get("/api/v1/nodes").is_ok()
        })?;
        Ok(Self::StandIn(StandIn {
            process,
            directory: directory.to_owned(),
            admin,
        }))
    }

    /// A client with all rights, connecting from the master.
    #[must_use]
    pub fn admin(&self) -> &Client {
        match self {
            Self::Real(plane) => plane.admin(),
            Self::StandIn(StandIn { admin, .. }) => admin,
        }
    }

    /// A token of a service account, bound to a node as a pod's token is.
    ///
    /// # Errors
    ///
    /// When the account or the node does not exist.
    pub fn node_token(&self, namespace: &str, account: &str, node: &str) -> anyhow::Result<String> {
        let Self::Real(plane) = self else {
            return Ok(String::new());
        };
        let object = plane.admin().get(&format!("/api/v1/nodes/{node}"))?;
        let bound = json!({
            "apiVersion": "v1", "kind": "Node", "name": node, "uid": object["metadata"]["uid"]});
        plane.bound_token(namespace, account, &bound)
    }

    /// A kubeconfig's text for the holder of a token.
    ///
    /// # Errors
    ///
    /// When one of its parts cannot be read.
    pub fn kubeconfig(&self, token: &str, namespace: &str) -> anyhow::Result<String> {
        match self {
            Self::Real(plane) => plane.kubeconfig(token, namespace),
            Self::StandIn(StandIn { directory, .. }) => {
                Ok(fs::read_to_string(directory.join("admin.kubeconfig"))?)
            }
        }
    }

    /// The file of the kubeconfig with all rights.
    #[must_use]
    pub fn admin_kubeconfig(&self) -> PathBuf {
        match self {
            Self::Real(plane) => plane.kubeconfig_path("admin"),
            Self::StandIn(StandIn { directory, .. }) => directory.join("admin.kubeconfig"),
        }
    }

    /// The real one.
    ///
    /// # Errors
    ///
    /// When this is the stand-in.
    pub fn plane(&self) -> anyhow::Result<&ControlPlane> {
        match self {
            Self::Real(plane) => Ok(plane),
            Self::StandIn(_) => bail!("the API stand-in cannot do that: use the real parts"),
        }
    }

    /// Leaves it running when the value is dropped.
    pub fn keep(&mut self) {
        match self {
            Self::Real(plane) => plane.keep(),
            Self::StandIn(StandIn { process, .. }) => process.keep(),
        }
    }
}

/// A program that cargo built beside this one, which is a test or an example.
fn beside_this_program(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let path = own
        .parent()
        .and_then(Path::parent)
        .context("this program lies two directories deep")?
        .join(name);
    if !path.exists() {
        bail!(
            "{} is missing: run cargo build --package selvedge-lab",
            path.display()
        );
    }
    Ok(path)
}
