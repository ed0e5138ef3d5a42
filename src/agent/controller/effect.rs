//! What a [`Controller`](super::Controller) wants done.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::super::key_rotation::KeyStep;
use super::super::saved_view::SavedView;
use crate::cluster::{Annotations, Notice, Verdicts};
use crate::guard::Guard;
use crate::probe::Targets;
use crate::reconciler::core::Desired;
use crate::topology::Topology;
use crate::wireguard::PeerId;
use crate::wireguard::key::PublicKey;

/// One thing to do. None of them is waited for.
#[derive(Debug)]
pub enum Effect {
    /// Read the kernel's facts, and hand them in by [`handle_kernel`](super::Controller::handle_kernel).
    Observe,
    /// Keep these annotations on the own Node.
    Publish(Annotations),
    /// Keep these conditions on the Peers.
    Judge(Verdicts),
    /// Report this as Events.
    Report(BTreeSet<Notice>),
    /// Remember the cluster for the next run.
    Save(SavedView),
    /// Keep this guard for the next boot.
    KeepGuard(Guard),
    /// Keep these names resolved.
    Resolve(BTreeSet<String>),
    /// Send one handshake initiation of a peer to these candidates.
    FindPeer {
        /// The peer.
        id: PeerId,
        /// The candidate endpoints.
        candidates: Vec<SocketAddr>,
    },
    /// Translate these aliases at the tunnel, each to the address of its host. They replace the last ones.
    Translate(BTreeMap<IpAddr, IpAddr>),
    /// Change the node's keys on disk and in the tunnel, and hand the result in by
    /// [`handle_keys`](super::Controller::handle_keys).
    ChangeKeys(KeyStep),
    /// Send one handshake initiation to each of these peers under an own key.
    TryKey {
        /// The key.
        key: PublicKey,
        /// The peers.
        peers: Vec<PeerId>,
    },
    /// Make the node so. It replaces what was asked for before.
    Reconcile(Desired),
    /// Send echoes to these targets, and answer theirs.
    Probe(Box<Targets>),
    /// Show this topology on the pages.
    Show(Arc<Topology>),
}
