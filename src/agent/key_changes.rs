//! Changes of the keys on disk, off the loop: a disk may take long.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use super::key_ring::KeyRing;
use super::key_rotation::{KeyStep, OwnKeys};
use crate::wireguard::Device;

/// A step that was made, or its error.
pub(super) type Done = (KeyStep, Result<OwnKeys, String>);

/// Makes the steps of a replacement one after the other.
pub(super) struct KeyChanges {
    ring: Arc<Mutex<KeyRing>>,
    sender: mpsc::UnboundedSender<Done>,
    made: mpsc::UnboundedReceiver<Done>,
}

impl KeyChanges {
    pub(super) fn new(ring: KeyRing) -> Self {
        let (sender, made) = mpsc::unbounded_channel();
        Self {
            ring: Arc::new(Mutex::new(ring)),
            sender,
            made,
        }
    }

    /// Begins a step.
    pub(super) fn start(&self, step: KeyStep) {
        let (ring, sender) = (Arc::clone(&self.ring), self.sender.clone());
        tokio::task::spawn_blocking(move || {
            let mut ring = ring.lock().unwrap_or_else(PoisonError::into_inner);
            let changed = ring.step(step).map_err(|error| error.to_string());
            // The loop may have ended.
            let _ = sender.send((step, changed.map(|()| ring.public())));
        });
    }

    /// The next step that was made.
    pub(super) async fn done(&mut self) -> Option<Done> {
        self.made.recv().await
    }

    /// Gives the tunnel the keys after a step, before any other node learns of them.
    pub(super) fn finish(&self, done: Done, tunnel: &Device) -> Done {
        if done.1.is_ok() {
            let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
            let (current, also) = ring.identities();
            tunnel.set_identities(current, also);
        }
        done
    }
}
