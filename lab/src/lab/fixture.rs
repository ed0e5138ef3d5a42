//! What end-to-end tests begin with, a cluster of their own with a server at every place, and what most of
//! them look at.

use std::path::Path;
use std::process::Command;

use anyhow::ensure;

use super::{Lab, Options};
use crate::capture::Capture;
use crate::netns::unique_prefix;
use crate::scratch::scratch;
use crate::steps::{Outcome, Steps};
use crate::traffic::Servers;

/// A cluster for a test, and a server at each of its places, by every address of theirs.
impl Outcome for (Lab, Servers) {
    fn detail(&self) -> String {
        self.0.detail()
    }
}

impl Steps {
    /// Brings up a cluster in a step that the following ones depend on. `label` is part of its directory's name.
    ///
    /// Returns `None` when that failed.
    pub fn cluster(&mut self, step: &str, label: &str, options: Options) -> Option<(Lab, Servers)> {
        self.required(step, || {
            let lab = Lab::for_test(label, options)?;
            let servers = Servers::start(&lab.places_of_all_families())?;
            Ok((lab, servers))
        })
    }
}

impl Lab {
    /// Brings up a cluster without agents, under names and in a directory of its own.
    ///
    /// # Errors
    ///
    /// When a part is missing or does not start.
    pub fn for_test(label: &str, options: Options) -> anyhow::Result<Self> {
        Self::up(&unique_prefix(), scratch(label)?, options, &|_| {})
    }

    /// Begins to capture what crosses the internet, into a file of this name.
    ///
    /// # Errors
    ///
    /// When the capture does not start.
    pub fn capture_internet(&self, name: &str) -> anyhow::Result<Capture> {
        let file = self.directory().join(format!("{name}.pcap"));
        Capture::start(self.network().internet(), &file)
    }

    /// An annotation of a Node; empty if it has none of this key.
    ///
    /// # Errors
    ///
    /// When the API server does not answer or has no such Node.
    pub fn annotation(&self, node: &str, key: &str) -> anyhow::Result<String> {
        let object = self.api().get(&format!("/api/v1/nodes/{node}"))?;
        let value = object["metadata"]["annotations"][key].as_str();
        Ok(value.unwrap_or_default().to_owned())
    }

    /// What the program `selvedge` prints on a node, whatever it exits with.
    ///
    /// # Errors
    ///
    /// When it cannot be run, or prints nothing but a complaint.
    pub fn selvedge(
        &self,
        binary: &Path,
        node: &str,
        arguments: &[&str],
    ) -> anyhow::Result<String> {
        let mut command = Command::new(binary);
        command.args(arguments);
        let output = self.node(node)?.output(command)?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(
            !output.stdout.is_empty() || output.status.success(),
            "selvedge {} on {node}: {complaint}",
            arguments.join(" ")
        );
        Ok(String::from_utf8(output.stdout)?)
    }
}
