//! The MTUs of the tunnel's link, its peers and the routes.
//!
//! Where the paths to other regions are measured (`--mtu auto`), a leader's routes to a segment have the MTU of the path:
//! its kernel tells senders what fits (RFC 1191, RFC 8201), and the firewall lowers the segment size that a SYN offers
//! to it. The routes of members have no MTU: flannel's device carries what it carries, and the leader, which knows the
//! path, tells their pods and hosts. External peers, and meshes with Kilo's algorithm, keep the configured MTU.

use std::collections::BTreeSet;

use super::site::Site;
use crate::state::NextHop;
use crate::topology::{Leader, Mode, Segment};
use crate::wireguard::PeerMtu;
use crate::wireguard::packet::LEAST_IPV6;

impl Site<'_> {
    /// The most that any path carries, if paths are measured.
    fn measured(&self) -> Option<u32> {
        let is_native = matches!(self.inputs.topology.mode, Mode::Native);
        self.inputs.settings.path_mtu.filter(|_| is_native)
    }

    /// The MTU of the tunnel's link: what the largest path carries.
    pub(super) fn link_mtu(&self) -> u32 {
        let configured = self.inputs.settings.mtu;
        self.measured()
            .map_or(configured, |most| most.max(configured))
    }

    /// The MTU of routes to a segment by these next hops; `None` is the MTU of the device.
    pub(super) fn mtu_to(
        &self,
        segment: &Segment,
        hops: &BTreeSet<NextHop>,
        v6: bool,
    ) -> Option<u32> {
        let configured = self.inputs.settings.mtu;
        if self.measured().is_none() {
            return Some(configured - self.relay_overhead(segment).min(configured));
        }
        if hops
            .iter()
            .any(|hop| hop.dev != self.inputs.settings.interface)
        {
            return None;
        }
        let leaders = self.leaders_of(segment).into_iter();
        let leaders = leaders.chain(self.direct_leaders_of(segment));
        let least = if v6 { LEAST_IPV6.into() } else { 0 };
        let path = leaders.map(|leader| self.path_mtu(leader));
        let path = path.chain(self.chosen_relay_mtu(segment)).min();
        Some(path.unwrap_or(configured).max(least))
    }

    /// What the path through a relay carries that is chosen and may not be measured yet: what the path to the relay does,
    /// without what the relay takes.
    fn chosen_relay_mtu(&self, segment: &Segment) -> Option<u32> {
        let relay = self.verdicts.relays.get(&segment.name)?;
        let to_relay = self.inputs.mtus.get(relay).copied();
        let to_relay = to_relay.unwrap_or(self.inputs.settings.mtu);
        Some(to_relay - self.relay_overhead(segment).min(to_relay))
    }

    /// The size of the packets that the tunnel sends to a leader of another region.
    pub(super) fn peer_mtu(&self, leader: &Leader) -> PeerMtu {
        match self.measured() {
            Some(_) => PeerMtu::Path(clamp(self.path_mtu(leader))),
            None => PeerMtu::Link,
        }
    }

    /// The size of the packets that the tunnel sends to external peers, whose paths are not measured.
    pub(super) fn external_mtu(&self) -> PeerMtu {
        // The link may carry more.
        let is_measured = self.measured().is_some();
        let configured = PeerMtu::Configured(clamp(self.inputs.settings.mtu));
        if is_measured {
            configured
        } else {
            PeerMtu::Link
        }
    }

    /// The MTU of the path to a leader of another region.
    fn path_mtu(&self, leader: &Leader) -> u32 {
        let measured = self.inputs.mtus.get(&leader.peer_id());
        measured.copied().unwrap_or(self.inputs.settings.mtu)
    }
}

fn clamp(bytes: u32) -> u16 {
    u16::try_from(bytes).unwrap_or(u16::MAX)
}
