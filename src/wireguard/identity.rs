//! The device's own keys: the current one and, while it is replaced, a second one.
//!
//! An initiation to either is answered. A message says by its first MAC which of them it is for.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::x25519;

use super::key::{PrivateKey, PublicKey};

/// One key of the device and what is derived from it.
pub(super) struct Identity {
    pub(super) private: PrivateKey,
    pub(super) public: PublicKey,
    pub(super) secret: x25519::StaticSecret,
    pub(super) cookies: RateLimiter,
}

impl Identity {
    pub(super) fn new(private: PrivateKey) -> Self {
        let secret = x25519::StaticSecret::from(private.0);
        let public = x25519::PublicKey::from(&secret);
        Self {
            private,
            public: PublicKey(public.to_bytes()),
            secret,
            cookies: RateLimiter::new(&public),
        }
    }
}

/// The keys of a device, the current one first. Empty while the device has none.
#[derive(Clone, Default)]
pub(super) struct Identities(Vec<Arc<Identity>>);

impl Identities {
    /// These keys, the current one first. A key that the device has already keeps its cookies.
    pub(super) fn new(keys: impl IntoIterator<Item = PrivateKey>, before: &Self) -> Self {
        let mut identities = Vec::<Arc<Identity>>::new();
        for private in keys {
            if identities.iter().any(|known| known.private == private) {
                continue;
            }
            let known = before.0.iter().find(|known| known.private == private);
            let identity = known.cloned();
            identities.push(identity.unwrap_or_else(|| Arc::new(Identity::new(private))));
        }
        Self(identities)
    }

    pub(super) fn current(&self) -> Option<&Arc<Identity>> {
        self.0.first()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Identity>> {
        self.0.iter()
    }

    pub(super) fn has(&self, key: &PublicKey) -> bool {
        self.0.iter().any(|identity| identity.public == *key)
    }

    /// Whether these are the same keys in the same order.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let key = |identities: &Self| {
            identities
                .0
                .iter()
                .map(|own| own.public)
                .collect::<Vec<_>>()
        };
        key(self) == key(other)
    }

    /// The key that a handshake message is for, by its first MAC.
    pub(super) fn addressed(&self, message: &[u8]) -> Option<&Arc<Identity>> {
        let mut identities = self.0.iter();
        identities.find(|identity| identity.cookies.verify_mac1(message))
    }

    /// Whether the second MAC proves that the sender receives at its address.
    pub(super) fn is_proven(&self, message: &[u8], from: SocketAddr, now: Duration) -> bool {
        let mut identities = self.0.iter();
        identities.any(|identity| identity.cookies.verify_mac2(message, from, now))
    }
}
