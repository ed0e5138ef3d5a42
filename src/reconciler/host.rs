//! The node as a [`Platform`]: its kernel without nf_tables, and the tunnel in this process.

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroU16;
use std::sync::Arc;

use anyhow::{Context as _, anyhow};

use super::core::Platform;
use crate::diff::{Change, KernelChange, TunnelChange};
use crate::kernel::Rtnetlink;
use crate::kernel::flannel_repair::Repair;
use crate::port_holder;
use crate::state::State;
use crate::wireguard::{Device, PeerConfig, PeerId};

/// A node with a running tunnel.
pub struct Host {
    rtnetlink: Rtnetlink,
    tunnel: Arc<Device>,
    /// The peers as they were last set. An endpoint that an operator sets with `wg` is not in it, and
    /// stays until the plan has another one.
    asked: BTreeMap<PeerId, PeerConfig>,
    /// A port that is another's: its number, the inode of the socket that has it, and the sentence on it.
    port_taken: Option<(u16, Option<u64>, String)>,
}

impl Host {
    /// Puts the two together.
    pub fn new(rtnetlink: Rtnetlink, tunnel: Arc<Device>) -> Self {
        Self {
            rtnetlink,
            tunnel,
            asked: BTreeMap::new(),
            port_taken: None,
        }
    }

    /// The kernel without nf_tables.
    pub fn rtnetlink(&self) -> &Rtnetlink {
        &self.rtnetlink
    }

    /// Has the tunnel listen on a UDP port, if it does not yet. Until then it sends from the port that it
    /// has, so handshakes that it begins go on.
    ///
    /// # Errors
    /// One sentence that says which process has the port.
    fn listen_on(&mut self, port: u16) -> Result<(), String> {
        match self.tunnel.set_listen_port(port) {
            Ok(()) => {
                self.port_taken = None;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(self.taken(port)),
            Err(error) => Err(format!("listening on UDP port {port}: {error}")),
        }
    }

    /// Which process has a port. The processes are looked through once for each socket that has it.
    fn taken(&mut self, port: u16) -> String {
        let socket = port_holder::socket(port);
        match &self.port_taken {
            Some((of, seen, sentence)) if (*of, *seen) == (port, socket) => sentence.clone(),
            Some(_) | None => {
                let sentence = port_holder::taken(port);
                self.port_taken = Some((port, socket, sentence.clone()));
                sentence
            }
        }
    }

    /// The peers as they are. A change by `wg set` is noticed, except to an endpoint.
    fn peers(&self) -> BTreeMap<PeerId, PeerConfig> {
        let mut peers = self.tunnel.peers();
        for (id, peer) in &mut peers {
            if let Some(asked) = self.asked.get(id) {
                peer.endpoint = asked.endpoint;
            }
        }
        peers
    }

    /// Makes a change of the tunnel's; peers take effect with [`Device::set_peers`].
    fn apply_to_tunnel(&mut self, change: &TunnelChange) -> anyhow::Result<()> {
        match change {
            // The tunnel makes its link again; what needs the link is tried again then.
            TunnelChange::CreateLink { name, .. } => {
                Err(anyhow!("the link {name} is not there yet"))
            }
            TunnelChange::SetListenPort { port, .. } => self
                .listen_on(port.get())
                .map_err(|sentence| anyhow!(sentence)),
            TunnelChange::SetPeer { id, peer, .. } => {
                self.asked.insert(id.clone(), (**peer).clone());
                Ok(())
            }
            TunnelChange::RemovePeer { id, .. } => {
                self.asked.remove(id);
                Ok(())
            }
        }
    }

    /// Makes a run of changes that are all the kernel's.
    fn apply_to_kernel<'a>(&self, run: &'a [Change]) -> Vec<(&'a Change, anyhow::Error)> {
        let changes: Vec<_> = run.iter().filter_map(Change::of_kernel).collect();
        let failed = self.rtnetlink.apply_all(&changes);
        let whole = |refused: &KernelChange| {
            let is_it = |change: &&Change| change.of_kernel() == Some(refused);
            run.iter().find(is_it)
        };
        let failed = failed.into_iter();
        failed
            .filter_map(|(refused, error)| Some((whole(refused)?, error)))
            .collect()
    }
}

impl Platform for Host {
    fn observe(&mut self) -> anyhow::Result<State> {
        let peers = self.peers();
        // Peers that another program removed are forgotten, so that they are set again.
        self.asked.retain(|id, _| peers.contains_key(id));
        Ok(State {
            peers,
            listen_port: NonZeroU16::new(self.tunnel.listen_port()),
            ..self.rtnetlink.observe().context("reading what is there")?
        })
    }

    fn apply_all<'a>(&mut self, changes: &'a [Change]) -> Vec<(&'a Change, anyhow::Error)> {
        let mut failed = Vec::new();
        let is_of_kernel = |change: &Change| change.of_kernel().is_some();
        for run in changes.chunk_by(|a, b| is_of_kernel(a) == is_of_kernel(b)) {
            if run.first().is_some_and(is_of_kernel) {
                failed.extend(self.apply_to_kernel(run));
                continue;
            }
            let is_of_peer = |change: &Change| {
                matches!(
                    change,
                    Change::Tunnel(TunnelChange::SetPeer { .. } | TunnelChange::RemovePeer { .. })
                )
            };
            for change in run {
                if let Change::Tunnel(of_tunnel) = change
                    && let Err(error) = self.apply_to_tunnel(of_tunnel)
                {
                    failed.push((change, error));
                }
            }
            if run.iter().any(is_of_peer) {
                self.tunnel.set_peers(&self.asked);
            }
        }
        failed
    }

    fn repair<'a>(&mut self, repairs: &'a [Repair]) -> Vec<(&'a Repair, anyhow::Error)> {
        self.rtnetlink.repair(repairs)
    }
}
