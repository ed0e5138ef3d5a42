//! The replacement of this node's key: what it depends on, and what people see of it.

use std::time::Instant;

use super::super::key_rotation::{KeyStep, Look, OwnKeys, Progress, Refused, Sign};
use super::super::report;
use super::{Controller, Effect};
use crate::cluster::Notice;
use crate::topology::{Mode, Object, OtherKeys};
use crate::wireguard::Stats;
use crate::wireguard::key::PublicKey;

impl Controller {
    /// The operator asks for another key.
    ///
    /// # Errors
    /// Says why none is made.
    pub fn handle_key_request(&mut self, now: Instant) -> Result<(), Refused> {
        let look = self.look_at_keys(now, &Stats::default());
        self.key_rotation.handle_request(&look)
    }

    /// The keys were changed, as [`Effect::ChangeKeys`] asked for, or could not be.
    pub fn handle_keys(&mut self, now: Instant, step: KeyStep, changed: Result<OwnKeys, String>) {
        match changed {
            Ok(keys) => {
                let OtherKeys { next, previous } = keys.others;
                let (next, previous) = (
                    next.map(|key| key.to_string()),
                    previous.map(|key| key.to_string()),
                );
                let (public_key, next, previous) =
                    (keys.current, next.as_deref(), previous.as_deref());
                match step {
                    KeyStep::Make => {
                        tracing::info!(%public_key, next, "new key made and announced")
                    }
                    KeyStep::Switch => {
                        tracing::info!(%public_key, previous, "new key in use, old key still accepted")
                    }
                    KeyStep::Retire => {
                        tracing::info!(%public_key, "old key erased and accepted no longer")
                    }
                }
                self.key_rotation.handle_done(Some(keys), now);
            }
            Err(error) => {
                tracing::warn!(
                    ?step,
                    error,
                    "changing the key on disk failed: trying again"
                );
                self.key_rotation.handle_done(None, now);
            }
        }
        self.schedule.handle_trigger(now);
    }

    /// This node's current key.
    pub(super) fn public_key(&self) -> PublicKey {
        self.key_rotation.keys().current
    }

    /// Looks whether a step of the replacement is due.
    pub(super) fn follow_keys(&mut self, now: Instant, stats: &Stats) {
        let look = self.look_at_keys(now, stats);
        if let Some(step) = self.key_rotation.handle_look(&look, now) {
            self.effects.push_back(Effect::ChangeKeys(step));
        }
        if let Some((key, peers)) = self.key_rotation.poll_trials(&look, now) {
            self.effects.push_back(Effect::TryKey { key, peers });
        }
    }

    fn look_at_keys(&self, now: Instant, stats: &Stats) -> Look {
        let view = self.view.as_ref().filter(|view| view.live);
        let own = view.and_then(|view| view.snapshot.nodes.get(&self.config.node));
        let is_resting = self.key_rotation.keys().others == OtherKeys::default();
        let peers = stats.peers.iter().filter(|_| !is_resting);
        let peers = peers.map(|(id, peer)| Sign {
            id: id.clone(),
            is_leader: self.decision.keys.is_leader(&peer.public_key),
            is_alive: self.facts.alive.contains_key(&peer.public_key),
            sealed_under: peer.pair.map(|pair| pair.own),
        });
        Look {
            is_live: own.is_some(),
            is_native: self.decision.topology.mode == Mode::Native,
            unix: self.unix_at(now),
            published: own.and_then(|own| own.public_key),
            published_others: own.map(|own| own.other_keys).unwrap_or_default(),
            peers: peers.collect(),
        }
    }

    /// This node's clock in Unix seconds.
    fn unix_at(&self, now: Instant) -> i64 {
        self.unix.map_or(0, |(at, unix)| {
            let passed = now.saturating_duration_since(at).as_secs();
            unix.saturating_add_unsigned(passed)
        })
    }

    /// What a report shows of the keys.
    pub(super) fn report_keys(&self, now: Instant) -> report::Keys {
        let keys = self.key_rotation.keys();
        let age = self.unix_at(now).saturating_sub(keys.since);
        report::Keys {
            age: u64::try_from(age)
                .ok()
                .filter(|_| keys.since > 0 && self.unix.is_some()),
            others: keys.others,
            progress: self.key_rotation.progress(),
        }
    }

    /// An Event while an old key is accepted: external peers that have it need the new one.
    pub(super) fn key_notice(&self) -> Option<Notice> {
        let keys = self.key_rotation.keys();
        keys.others.previous?;
        let has_peers = !self.decision.topology.peers.is_empty();
        let is_leader = self.decision.topology.is_leader(&self.config.node);
        let hint = match has_peers && is_leader && self.key_rotation.progress() != Progress::Resting
        {
            true => {
                "; VPN peers that are configured with the old one need it: selvedge showconf prints it"
            }
            false => "",
        };
        Some(Notice {
            object: Object::Node(self.config.node.clone()),
            field: "replacement of the WireGuard key".to_owned(),
            reason: "SelvedgeKeyReplaced",
            note: format!(
                "the WireGuard key was replaced, and the new one is {}{hint}",
                keys.current
            ),
        })
    }
}
