//! What keeps this node from being as it should be.

use std::time::Instant;

use super::super::listen_port::PortChange;
use super::super::obstacle::{self, Obstacle};
use super::Controller;
use crate::plan::Caveat;
use crate::reconciler::core::{Failure, FailureKind};

impl Controller {
    /// Everything that keeps this node from being as it should be, in sentences.
    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        problems.extend(self.awaited.clone());
        if self.view.is_none() {
            problems.push("waiting for the list of Nodes from the API server".to_owned());
        } else if !self.facts.snapshot.nodes.contains_key(&self.config.node) {
            problems.push(format!(
                "the cluster has no Node called {}: give --hostname",
                self.config.node
            ));
        } else if self.facts.flannel.is_some()
            && self.decision.desired.is_none()
            && self.obstacles.is_empty()
        {
            problems.push(format!(
                "node {} takes no part in the mesh yet",
                self.config.node
            ));
        }
        let caveats = self.decision.caveats.iter();
        let rules = caveats.filter(|caveat| matches!(caveat, Caveat::RuleInTheWay(_)));
        problems.extend(rules.map(ToString::to_string));
        let obstacles = self.obstacles.iter().map(|obstacle| &obstacle.sentence);
        problems.extend(obstacles.cloned());
        if self.firewall_awaited {
            problems.push("waiting for nft to install the firewall".to_owned());
        }
        // A port that another process has is an obstacle.
        let failures = self.failures.iter();
        let failures = failures.filter(|failure| failure.kind != FailureKind::ListenPort);
        problems.extend(failures.map(|failure| failure.sentence.clone()));
        problems
    }

    /// Replaces the failures. Logs new ones, and when none is left.
    pub(super) fn handle_failures(&mut self, failures: Vec<Failure>) {
        let new = failures.iter().filter(|new| !self.failures.contains(new));
        for failure in new.filter(|failure| failure.kind != FailureKind::ListenPort) {
            tracing::warn!(problem = failure.sentence, "change failed");
        }
        if failures.is_empty() && !self.failures.is_empty() {
            tracing::info!("all failed changes applied");
        }
        self.failures = failures;
        let mut failures = self.failures.iter();
        if failures.any(|failure| failure.kind == FailureKind::ListenPort) {
            let desired = self.decision.desired.as_ref();
            let port = desired.and_then(|desired| desired.listen_port);
            let change = port.and_then(|port| self.listen_port.handle_taken(port.get()));
            change.iter().for_each(PortChange::log);
        }
    }

    /// Finds the obstacles again. A change leads to a pass, which reports it.
    pub(super) fn handle_obstacles(&mut self, now: Instant) {
        if self.look_for_obstacles() {
            self.schedule.handle_trigger(now);
        }
    }

    /// Finds the obstacles that the operator has to remove. Returns whether they have changed.
    pub(super) fn look_for_obstacles(&mut self) -> bool {
        let (own, topology) = (&self.config.node, &self.decision.topology);
        let holder = obstacle::holder_of_key(&self.facts.snapshot, own, self.public_key());
        let mut obstacles = Vec::new();
        obstacles.extend(obstacle::key_taken(topology, holder, own, &self.key_files));
        let obstacle = |field: &str, sentence: &String| Obstacle {
            field: field.to_owned(),
            sentence: sentence.clone(),
        };
        let failures = self.failures.iter();
        let port = failures.filter(|failure| failure.kind == FailureKind::ListenPort);
        obstacles.extend(port.map(|failure| obstacle("the tunnel's port", &failure.sentence)));
        let desired = self.decision.desired.as_ref();
        if topology.is_leader(own) && desired.is_some_and(|desired| !desired.peers.is_empty()) {
            let forwarding = self.forwarding_off.iter();
            obstacles.extend(forwarding.map(|sentence| obstacle("forwarding", sentence)));
            let firewall = self.host_firewall.iter();
            obstacles.extend(firewall.map(|sentence| obstacle("the host's firewall", sentence)));
            // Those name the cause.
            let is_explained = self.forwarding_off.is_some() || self.host_firewall.is_some();
            let echoes = self.echo_problem().filter(|_| !is_explained);
            obstacles.extend(echoes.map(|sentence| obstacle("forwarding of echoes", &sentence)));
        }
        let news = self.obstacles != obstacles;
        // What is reported to the API is logged there.
        let new = |obstacle: &&Obstacle| !self.obstacles.contains(obstacle);
        for obstacle in obstacles.iter().filter(new).filter(|_| !self.is_live()) {
            tracing::warn!(problem = obstacle.sentence, "problem found");
        }
        let is_gone = |obstacle: &&Obstacle| {
            let mut others = obstacles.iter();
            !others.any(|other| other.field == obstacle.field)
        };
        for obstacle in self.obstacles.iter().filter(is_gone) {
            tracing::info!(problem = obstacle.field, "problem solved");
        }
        self.obstacles = obstacles;
        news
    }
}
