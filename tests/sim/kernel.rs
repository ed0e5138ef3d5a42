//! The platform of a node's reconciler: the fake kernel, looked at after every single change.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::time::Duration;

use anyhow::anyhow;
use ipnet::IpNet;
use selvedge::diff::{Change, KernelChange, TunnelChange};
use selvedge::kernel::flannel_repair::Repair;
use selvedge::reconciler::core::Platform;
use selvedge::reconciler::firewall::{Job, Outcome};
use selvedge::state::{Ruleset, State};

use super::lookup::{Host, Source, Step, TUNNEL, steps};
use crate::fake_kernel::FakeKernel;

/// The kernel of one node.
pub(crate) struct Kernel {
    pub(crate) fake: FakeKernel,
    pub(crate) pods: IpNet,
    pub(crate) address: IpAddr,
    /// The addresses that others look for.
    pub(crate) targets: Vec<IpAddr>,
    /// The pod networks of the other nodes.
    pub(crate) others: Vec<IpNet>,
    pub(crate) forwards: bool,
    pub(crate) turns_back: bool,
    /// Whether the rule against packets that go through the tunnel twice is left out.
    pub(crate) passes_on: bool,
    /// A mutant: deletions are applied before additions.
    pub(crate) deletes_first: bool,
    /// What was wrong between two changes.
    pub(crate) findings: Vec<String>,
    /// Counts changes that were made.
    pub(crate) changes: u64,
}

impl Kernel {
    pub(crate) fn state(&self) -> &State {
        self.fake.state()
    }

    pub(crate) fn host(&self) -> Host<'_> {
        Host {
            pods: self.pods,
            address: self.address,
            others: &self.others,
            forwards: self.forwards,
            turns_back: self.turns_back,
            passes_on: self.passes_on,
        }
    }

    /// Does what the firewall's worker does.
    pub(crate) fn work(&mut self, job: Job) -> Outcome {
        let wanted = job.firewall.as_deref().cloned().map(Box::new);
        let change = wanted
            .filter(|wanted| self.state().firewall != Some(Ruleset::Planned(wanted.clone())))
            .map(|it| Change::Kernel(KernelChange::ReplaceFirewall(it)));
        let result = match &change {
            Some(change) => self.fake.apply(change).map_err(|error| anyhow!(error)),
            None => Ok(()),
        };
        self.changes += u64::from(change.is_some());
        Outcome {
            firewall: job.firewall,
            took: Duration::ZERO,
            result: result.map(|()| change),
        }
    }

    /// An agent starts: the tunnel device makes its link, if it is not there, and opens its port.
    pub(crate) fn begin_tunnel(&mut self, port: u16) {
        let name = TUNNEL.to_owned();
        let dev = name.clone();
        let port = NonZeroU16::new(port).expect("--port is not 0");
        for change in [
            TunnelChange::CreateLink { name, mtu: 1420 },
            TunnelChange::SetListenPort { dev, port },
        ] {
            // What is there already is refused.
            let _ = self.fake.apply(&Change::Tunnel(change));
        }
        self.changes += 1;
    }

    /// The agent's process ends, and the tunnel device with it. Its link stays, since it is persistent.
    pub(crate) fn end_tunnel(&mut self) {
        let state = self.state();
        let Some(dev) = state.link.as_ref().map(|link| link.name.clone()) else {
            return;
        };
        let peers = state
            .peers
            .iter()
            .map(|(id, peer)| (id.clone(), peer.public_key));
        for (id, key) in peers.collect::<Vec<_>>() {
            let dev = dev.clone();
            let change = Change::Tunnel(TunnelChange::RemovePeer { dev, id, key });
            self.fake.apply(&change).expect("the peer is there");
        }
        self.changes += 1;
    }

    /// Whether a packet of a local pod has somewhere to go.
    fn has_way(&self, dst: IpAddr) -> bool {
        let steps = steps(self.state(), &self.host(), Source::Pod, dst);
        steps
            .iter()
            .all(|step| matches!(step, Step::Tunnel | Step::Flannel(_)))
    }

    fn affected(&self, change: &Change) -> Vec<IpAddr> {
        match change {
            Change::Kernel(
                KernelChange::ReplaceRoute { key, .. } | KernelChange::DeleteRoute(key),
            ) => {
                let targets = self.targets.iter().copied();
                targets.filter(|dst| key.dst.contains(dst)).collect()
            }
            Change::Kernel(
                KernelChange::AddRule(_)
                | KernelChange::DeleteRule(_)
                | KernelChange::SetDown { .. }
                | KernelChange::DeleteAddress { .. },
            ) => self.targets.clone(),
            Change::Kernel(_) | Change::Tunnel(_) => Vec::new(),
        }
    }
}

impl Platform for Kernel {
    fn observe(&mut self) -> anyhow::Result<State> {
        Ok(State {
            firewall: None,
            ..self.fake.observe()
        })
    }

    fn apply_all<'a>(&mut self, changes: &'a [Change]) -> Vec<(&'a Change, anyhow::Error)> {
        let mut ordered: Vec<_> = changes.iter().collect();
        if self.deletes_first {
            let is_deletion = |change: &&Change| {
                matches!(
                    change,
                    Change::Kernel(KernelChange::DeleteRoute(_) | KernelChange::DeleteRule(_))
                )
            };
            ordered.sort_by_key(|change| !is_deletion(change));
        }
        let affected: BTreeSet<_> = changes.iter().flat_map(|it| self.affected(it)).collect();
        let before: Vec<_> = affected
            .into_iter()
            .filter(|dst| self.has_way(*dst))
            .collect();
        let mut gaps = BTreeSet::new();
        let mut failed = Vec::new();
        for change in ordered {
            match self.fake.apply(change) {
                Ok(()) => self.changes += 1,
                Err(error) => failed.push((change, anyhow!(error))),
            }
            for dst in self.affected(change) {
                if before.contains(&dst) && !self.has_way(dst) {
                    gaps.insert((dst, change.to_string()));
                }
            }
        }
        for (dst, change) in gaps {
            if self.has_way(dst) {
                self.findings
                    .push(format!("no way to {dst} in between, after `{change}`"));
            }
        }
        failed
    }

    fn repair<'a>(&mut self, _: &'a [Repair]) -> Vec<(&'a Repair, anyhow::Error)> {
        Vec::new()
    }
}
