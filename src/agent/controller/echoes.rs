//! What echoes say of the paths through and to other leaders, and of this node's own forwarding.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Instant;

use super::super::decision;
use super::{Controller, Effect};
use crate::cluster::Notice;
use crate::liveness::{Cause, PathState};
use crate::probe::{self, Forwarding, Targets, Verdicts};
use crate::topology::{NodeName, Object};
use crate::wireguard::PeerId;

/// What the controller keeps of the echoes, beside the verdicts among the facts.
#[derive(Debug, Default)]
pub(super) struct Echoes {
    /// The targets that were last handed out.
    targets: Targets,
    /// Whether a pass came since the last decision, so that the routes to the probe addresses exist.
    pub(super) is_routed: bool,
    /// What the echoes of the region say of this node's forwarding.
    pub(super) forwarding: Forwarding,
    /// Paths that were down and came back.
    returned: BTreeSet<PathName>,
    /// How often traffic left a path, by cause.
    pub(super) failovers: BTreeMap<&'static str, u64>,
}

/// A path, as people know it.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum PathName {
    Through(NodeName),
    To(PeerId, NodeName),
}

impl fmt::Display for PathName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Through(node) => write!(f, "through leader {node}"),
            Self::To(_, node) => write!(f, "to leader {node}"),
        }
    }
}

impl Controller {
    /// What the echoes say of the other leaders is this now. Other next hops are not waited for: the pass is due at
    /// once.
    pub fn handle_verdicts(&mut self, now: Instant, verdicts: Verdicts) {
        if verdicts == self.facts.verdicts {
            return;
        }
        let before = self.paths(&self.facts.verdicts);
        let after = self.paths(&verdicts);
        for (name, state) in &after {
            let before = before.get(name).copied().unwrap_or_default();
            if before != *state {
                self.follow_path(name, before, *state);
            }
        }
        self.echoes
            .returned
            .retain(|name| matches!(after.get(name), Some(PathState::Up | PathState::Draining)));
        self.follow_relays(&verdicts);
        self.facts.verdicts = verdicts;
        self.schedule.handle_news(now);
    }

    /// The paths to leaders of other regions carry packets of so many bytes now.
    pub fn handle_mtus(&mut self, now: Instant, mtus: BTreeMap<PeerId, u32>) {
        if mtus == self.facts.mtus {
            return;
        }
        let lead = self.echoes.targets.lead.as_ref();
        for (id, bytes) in &mtus {
            let before = self.facts.mtus.get(id);
            let far = lead.and_then(|lead| lead.peers.get(id));
            let (Some(before), Some(far)) = (before.filter(|before| *before != bytes), far) else {
                continue;
            };
            let path = PathName::To(id.clone(), far.node.clone());
            if bytes < before {
                tracing::warn!(%path, bytes, before, "path MTU lowered");
            } else {
                tracing::info!(%path, bytes, before, "path MTU raised");
            }
        }
        self.facts.mtus = mtus;
        self.schedule.handle_news(now);
    }

    /// What the echoes of the region say of this node's forwarding is this now.
    pub fn handle_echo_forwarding(&mut self, now: Instant, forwarding: Forwarding) {
        self.echoes.forwarding = forwarding;
        self.handle_obstacles(now);
    }

    /// Another state of the kernel is desired from now on.
    pub(super) fn follow_decided_targets(&mut self) {
        self.echoes.is_routed = false;
        self.follow_targets();
    }

    /// A pass did all that it could, and nothing waits for the firewall.
    pub(super) fn follow_routed_targets(&mut self) {
        if !self.echoes.is_routed {
            self.echoes.is_routed = true;
            self.follow_targets();
        }
    }

    /// Hands out the targets of the echoes, if they are others than before.
    ///
    /// An echo to a probe address without a route would take the default route, and the firewall would count it as
    /// a leak. So new leaders of the region wait for the pass that makes their routes.
    pub(super) fn follow_targets(&mut self) {
        let may_forward = self.forwarding_off.is_none() && self.host_firewall.is_none();
        let mut targets = probe::targets(
            &self.decision.topology,
            &self.config.node,
            self.facts.flannel.as_ref(),
            may_forward,
            decision::sizes(&self.facts, &self.config),
            &self.config.relaying,
        );
        if let Some(lead) = &mut targets.lead {
            let known = |id: &&PeerId| lead.peers.contains_key(*id);
            lead.relayed = self.facts.relayed.iter().filter(known).cloned().collect();
        }
        if !self.echoes.is_routed {
            let known = &self.echoes.targets.leaders;
            targets
                .leaders
                .retain(|_, ip| known.values().any(|known| known == ip));
        }
        if targets != self.echoes.targets {
            self.echoes.targets = targets.clone();
            self.effects.push_back(Effect::Probe(Box::new(targets)));
        }
    }

    /// The paths that are down, and those that came back, as notices about this node.
    pub(super) fn path_notices(&self) -> Vec<Notice> {
        let paths = self.paths(&self.facts.verdicts);
        let notice = |field: String, reason, note| Notice {
            object: Object::Node(self.config.node.clone()),
            field,
            reason,
            note,
        };
        let down = paths
            .iter()
            .filter_map(|(name, state)| match state {
                PathState::Down(cause) => Some((name, *cause)),
                PathState::Up | PathState::Unknown | PathState::Returning | PathState::Draining => {
                    None
                }
            })
            .collect::<Vec<_>>();
        if down.len() > 1 && down.len() == paths.len() {
            let note = format!(
                "none of the {} paths to other leaders carries packets: the network of this node has failed, most likely",
                down.len()
            );
            return vec![notice("all paths".to_owned(), "SelvedgePathDown", note)];
        }
        let down = down.into_iter().map(|(name, cause)| {
            let note = format!("the path {name} is down: {}", sentence(cause));
            notice(format!("path {name}"), "SelvedgePathDown", note)
        });
        let returned = self.echoes.returned.iter().map(|name| {
            let note = format!("the path {name} is up again");
            notice(format!("return of path {name}"), "SelvedgePathUp", note)
        });
        down.chain(returned).chain(self.relay_notices()).collect()
    }

    /// The sentence about this node's forwarding, if echoes say that it fails.
    pub(super) fn echo_problem(&self) -> Option<String> {
        let says = match self.echoes.forwarding {
            Forwarding::Unknown | Forwarding::Works => return None,
            Forwarding::NoWayBack => {
                "this node receives echoes from its region, and its answers do not get back"
            }
            Forwarding::NoWayIn => "echoes from its region do not get through this node any more",
        };
        Some(format!(
            "{says}, so it does not forward for its region and other leaders are used: look at net.ipv4.ip_forward and at the firewall's forward chain (selvedge doctor names a chain that drops)"
        ))
    }

    fn follow_path(&mut self, name: &PathName, before: PathState, after: PathState) {
        let was_down = matches!(before, PathState::Down(_) | PathState::Returning);
        match after {
            PathState::Down(cause) => {
                if !was_down {
                    tracing::warn!(path = %name, cause = label(cause), "path down");
                }
                self.echoes.returned.remove(name);
            }
            PathState::Up if was_down => {
                tracing::info!(path = %name, "path up again");
                self.echoes.returned.insert(name.clone());
            }
            PathState::Returning => tracing::info!(path = %name, "path returning"),
            PathState::Draining => tracing::info!(path = %name, "leader stopping"),
            PathState::Up | PathState::Unknown => {}
        }
        let cause = match (before, after) {
            (PathState::Up, PathState::Draining) => "draining",
            (PathState::Up, PathState::Down(cause)) => label(cause),
            _ => return,
        };
        *self.echoes.failovers.entry(cause).or_default() += 1;
    }

    /// Logs which relays are chosen, and which are not any more.
    fn follow_relays(&self, verdicts: &Verdicts) {
        let before = &self.facts.verdicts.relays;
        for (region, relay) in &verdicts.relays {
            if before.get(region) != Some(relay) {
                tracing::info!(%region, via = self.name_of(relay), "relay chosen");
            }
        }
        for (region, relay) in before {
            if !verdicts.relays.contains_key(region) {
                tracing::info!(%region, via = self.name_of(relay), "relay ended");
            }
        }
    }

    /// The notices about relays that are in use.
    fn relay_notices(&self) -> impl Iterator<Item = Notice> + '_ {
        let relays = self.facts.verdicts.relays.iter();
        let used = relays.filter(|(region, _)| {
            let lead = self.echoes.targets.lead.as_ref();
            let mut peers = lead.into_iter().flat_map(|lead| &lead.peers);
            peers.any(|(id, far)| far.segment == **region && self.facts.relayed.contains(id))
        });
        used.map(|(region, relay)| Notice {
            object: Object::Node(self.config.node.clone()),
            field: format!("relay to {region}"),
            reason: "SelvedgeRelayed",
            note: format!(
                "no leader of {region} answers this node directly: traffic goes through leader {}, encrypted end to end",
                self.name_of(relay)
            ),
        })
    }

    /// The node of a leader elsewhere.
    fn name_of<'s>(&'s self, id: &'s PeerId) -> &'s str {
        let lead = self.echoes.targets.lead.as_ref();
        let far = lead.and_then(|lead| lead.peers.get(id));
        far.map_or(id.as_str(), |far| far.node.0.as_str())
    }

    fn paths(&self, verdicts: &Verdicts) -> BTreeMap<PathName, PathState> {
        let lead = self.echoes.targets.lead.as_ref();
        let through = verdicts.leaders.iter();
        let through = through.map(|(name, leader)| (PathName::Through(name.clone()), leader.state));
        let to = verdicts.peers.iter().filter_map(|(id, state)| {
            let far = lead?.peers.get(id)?;
            Some((PathName::To(id.clone(), far.node.clone()), *state))
        });
        through.chain(to).collect()
    }
}

fn sentence(cause: Cause) -> &'static str {
    match cause {
        Cause::Silent => "its echoes do not come back, and other leaders are used",
        Cause::NotForwarding => {
            "the leader says that it does not forward for its region, and other leaders are used"
        }
    }
}

/// The cause in the words of logs and metrics.
pub(in crate::agent) fn label(cause: Cause) -> &'static str {
    match cause {
        Cause::Silent => "silent",
        Cause::NotForwarding => "not_forwarding",
    }
}
