//! Relays between leaders: how a datagram passes one, and when a pair of leaders is promised a relay.

use std::net::IpAddr;
use std::time::Duration;

use super::device::Device;
use super::lookup::{Source, Step};
use super::network::{BROKEN, Id};
use super::world::World;

/// How long after the last fault two leaders that do not reach each other are connected through a third, if one reaches
/// both: a leader that never answered is given 5 s, and the next initiation through the relay follows 5 s after one that
/// was lost because the other end, or the relay's firewall, did not know of it yet. A path to the relay may have been
/// down itself: 1.5 s until three answers came. Then an echo says so, and the tunnel's counters are read each second.
pub(crate) const BOUND: Duration = Duration::from_secs(14);

impl World {
    /// A node's kernel forwards the relayed datagrams that came out of its tunnel.
    pub(crate) fn pass_on(&mut self, id: Id) {
        let forwarded = match &mut self.nodes[id].agent {
            Some(agent) => agent.device.take_forwarded(),
            None => return,
        };
        for relayed in forwarded {
            let next = self.next_of_relayed(id, relayed.to);
            let key = next.map(|next| self.nodes[next].key);
            if let (Some(key), Some(agent)) = (key, &mut self.nodes[id].agent) {
                agent.device.forward(&key, relayed);
            }
        }
    }

    /// The node to which a relay's kernel and tunnel send a datagram for a WireGuard address.
    fn next_of_relayed(&mut self, id: Id, to: IpAddr) -> Option<Id> {
        let steps = self.steps_to(id, Source::Relay, to);
        if steps != [Step::Tunnel] {
            return None;
        }
        let peers = self.nodes[id].kernel.state().peers.values();
        let mut owners = peers.filter(|peer| peer.routes.contains(&to.into()));
        let key = owners.next()?.public_key;
        self.nodes.iter().position(|node| node.key == key)
    }

    /// Whether two leaders that do not reach each other are promised a relay.
    pub(crate) fn has_relay(&self, a: Id, b: Id) -> bool {
        let region = |id: Id| self.network.places[id].region;
        let is_leg = |relay: Id, end: Id| {
            let history = self.paths.get(&(relay.min(end), relay.max(end)));
            let since = history.and_then(|history| history.passes);
            self.is_far_good(relay, end)
                && !self.is_lossy(relay, end)
                && since.is_some_and(|since| self.now >= since + BOUND)
        };
        let leads = |id: Id| {
            let name = &self.nodes[id].name;
            let agents = [a, b].map(|end| self.nodes[end].agent.as_ref());
            agents.iter().flatten().all(|agent| {
                let mut leaders = agent.shown.leaders();
                leaders.any(|(_, leader)| leader.node.0 == *name)
            })
        };
        let mut relays = 0..self.nodes.len();
        self.now >= self.disturbed + BOUND
            && region(a) != region(b)
            && relays.any(|relay| {
                region(relay) != region(a)
                    && region(relay) != region(b)
                    && self.works(relay)
                    && leads(relay)
                    && is_leg(relay, a)
                    && is_leg(relay, b)
            })
    }

    /// Why packets through the relay that a node uses do not arrive, if they do not.
    pub(crate) fn relay_fails(&mut self, id: Id, far: Id, to: IpAddr) -> Option<String> {
        let near = self.nodes[id].agent.as_ref()?;
        let Some(key) = near.device.relay_to(to) else {
            return Some(format!("nothing relays to {}", self.nodes[far].name));
        };
        let relay = self.nodes.iter().position(|node| node.key == key)?;
        let name = self.nodes[relay].name.clone();
        if !self.works(relay) {
            return Some(format!("the relay {name} does not work"));
        }
        for (from, to) in [(id, relay), (relay, far)] {
            let (from_node, to_node) = (&self.nodes[from], &self.nodes[to]);
            let endpoint = from_node.agent.as_ref()?.device.endpoint(&to_node.key);
            if endpoint.is_none_or(Device::is_relayed) {
                return Some(format!("{name} relays to {} through a relay", to_node.name));
            }
            if self.network.far_loss(from, to) >= BROKEN || !self.has_session(from, to) {
                let (from, to) = (&from_node.name, &to_node.name);
                return Some(format!("the relay's leg from {from} to {to} is broken"));
            }
        }
        if self.next_of_relayed(relay, to) != Some(far) {
            return Some(format!("{name} does not pass it on"));
        }
        let mut own = self.nodes[id].kernel.state().addresses.keys();
        let source = own.find(|net| Device::is_relayed((net.addr(), 51_820).into()));
        let source = source.map(ipnet::IpNet::addr)?;
        let admits = self.nodes[far].agent.as_ref()?.device.admits(&key, source);
        (!admits).then(|| format!("{} does not take it from {name}", self.nodes[far].name))
    }
}
