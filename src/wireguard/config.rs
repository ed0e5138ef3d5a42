//! A peer as it is configured: what the embedder says.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::num::NonZeroU16;

use ipnet::IpNet;

use super::key::PresharedKey;

/// The most candidate endpoints that one initiation is sent to.
pub const MAX_CANDIDATES: usize = 16;

/// A peer as it is configured.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct PeerConfig {
    /// Where to send until the peer is heard from elsewhere.
    pub endpoint: Option<SocketAddr>,
    /// The key mixed into handshakes.
    pub preshared_key: Option<PresharedKey>,
    /// Seconds between keepalives; `None` is off.
    pub persistent_keepalive: Option<NonZeroU16>,
    /// What may come from it and is sent to it.
    pub allowed_ips: BTreeSet<IpNet>,
}
