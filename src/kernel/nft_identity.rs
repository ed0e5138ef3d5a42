//! Identities of nft tables, by which one is compared with another that is installed.

use ring::digest::SHA256;

use super::nft::render;
use crate::state::{Firewall, FirewallId, Ruleset};

impl Firewall {
    /// The identity of this content.
    pub fn id(&self) -> FirewallId {
        digest(render(self).as_bytes())
    }
}

impl Ruleset {
    /// The identity of the content.
    pub fn id(&self) -> FirewallId {
        match self {
            Self::Planned(firewall) => firewall.id(),
            Self::Installed(id) => *id,
        }
    }
}

impl PartialEq for Ruleset {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Planned(one), Self::Planned(two)) => one == two,
            (Self::Planned(_), Self::Installed(_)) | (Self::Installed(_), _) => {
                self.id() == other.id()
            }
        }
    }
}

impl Eq for Ruleset {}

/// The first half of SHA-256: an identity, not a secret.
pub(super) fn digest(bytes: &[u8]) -> FirewallId {
    let mut id = [0; 16];
    id.copy_from_slice(&ring::digest::digest(&SHA256, bytes).as_ref()[..16]);
    FirewallId(id)
}
