//! What holds at every step, and what holds a while after the last fault.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use selvedge::state::Ruleset;
use selvedge::topology::NodeName;

use super::device::Device;
use super::lookup::{Source, Step};
use super::network::{BROKEN, GOOD, Id};
use super::node::Life;
use super::walk::{End, Target};
use super::world::World;

/// How long after the last fault every pair that has a way is connected.
pub(crate) const BOUND: Duration = Duration::from_secs(3);

/// How much longer it takes where a handshake was lost on a link or by an agent that stood still: WireGuard sends
/// the next initiation five seconds later, with a jitter of a third of a second (paper, 6.1).
pub(crate) const HANDSHAKE_RETRY: Duration = Duration::from_millis(5_400);

/// What is known of the path between two nodes.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    /// Since when no handshake is lost, or else `None`.
    pub(crate) passes: Option<Instant>,
}

impl World {
    /// Takes note of the paths over which handshakes pass.
    pub(crate) fn note_paths(&mut self) {
        let now = self.now;
        for a in 0..self.nodes.len() {
            for b in 0..a {
                let is_near = self.network.places[a].region == self.network.places[b].region;
                let link = if is_near {
                    self.is_near(a, b)
                } else {
                    self.is_far_good(a, b)
                };
                let stands = |id: Id| self.nodes[id].is_on && self.nodes[id].life == Life::Paused;
                let passes = link && !self.is_lossy(a, b) && !stands(a) && !stands(b);
                let history = self.paths.entry((b, a)).or_default();
                history.passes = history
                    .passes
                    .filter(|_| passes)
                    .or_else(|| passes.then_some(now));
            }
        }
    }

    /// What holds at every step.
    pub(crate) fn check_always(&mut self) {
        for id in 0..self.nodes.len() {
            self.check_owners(id);
        }
        for target in self.targets() {
            self.check_loops(target);
        }
    }

    fn targets(&self) -> Vec<Target> {
        let known = (0..self.nodes.len()).filter(|id| self.api.has(&self.nodes[*id].name));
        known
            .flat_map(|id| [Target::Pod(id), Target::Host(id)])
            .collect()
    }

    fn address(&self, target: Target) -> IpAddr {
        match target {
            Target::Pod(id) => self.pod_of(id),
            Target::Host(id) => self.network.places[id].address,
        }
    }

    /// No prefix has two owners of different segments.
    fn check_owners(&mut self, id: Id) {
        let node = &self.nodes[id];
        let Some(agent) = &node.agent else { return };
        let own = agent.made.segment_of(&NodeName(node.name.clone()));
        let mut owners = BTreeMap::<IpNet, &str>::new();
        for (peer, config) in &node.kernel.state().peers {
            let name = peer.as_str().trim_start_matches("node/");
            let node_name = NodeName(name.to_owned());
            let Some(segment) = agent.made.segment_of(&node_name) else {
                continue;
            };
            // It has moved here, and is removed once the firewall is as it should be.
            if own.is_some_and(|own| own.name == segment.name) {
                continue;
            }
            for net in config.allowed_ips() {
                let entry = *owners.entry(*net).or_insert(name);
                let first = agent.made.segment_of(&NodeName(entry.to_owned()));
                if first.is_some_and(|first| first.name != segment.name) {
                    let (first, own) = (entry, &node.name);
                    let finding = format!("{own}: {net} belongs to {first} and to {name}");
                    self.findings.push(finding);
                    return;
                }
            }
        }
    }

    /// No packet for a target comes back to where it was, and none leaves its region in clear.
    fn check_loops(&mut self, target: Target) {
        let mut done = BTreeSet::new();
        for id in 0..self.nodes.len() {
            if !self.nodes[id].is_on || !self.nodes[id].is_installed {
                continue;
            }
            for source in [Source::Host, Source::Pod] {
                let mut path = Vec::new();
                self.follow(target, id, source, &mut path, &mut done);
            }
        }
    }

    fn follow(
        &mut self,
        target: Target,
        id: Id,
        source: Source,
        path: &mut Vec<(Id, Source)>,
        done: &mut BTreeSet<(Id, Source)>,
    ) {
        if path.contains(&(id, source)) {
            if !self.agree_on_place(target, path) || !self.agree_on_leaders(path) {
                return;
            }
            let names: Vec<_> = path
                .iter()
                .map(|(id, _)| self.nodes[*id].name.clone())
                .collect();
            let name = &self.nodes[id].name;
            let finding = format!(
                "a packet for {target:?} goes in a loop: {}, {name}",
                names.join(", ")
            );
            self.findings.push(finding);
            return;
        }
        if !done.insert((id, source)) {
            return;
        }
        path.push((id, source));
        for step in self.steps(id, source, target) {
            for (next, source) in self.next(id, source, target, &step) {
                self.follow(target, next, source, path, done);
            }
        }
        path.pop();
    }

    /// Whether the agents of these nodes see the same leaders of each segment. A node that a late watch does not tell that
    /// it leads sends to a former leader, which sends to it, for as long as the watch is late.
    fn agree_on_leaders(&self, path: &[(Id, Source)]) -> bool {
        let agents = path
            .iter()
            .filter_map(|(id, _)| self.nodes[*id].agent.as_ref());
        let seen: BTreeSet<Vec<_>> = agents
            .map(|agent| {
                let leaders = agent.shown.leaders();
                leaders.map(|(_, leader)| &leader.node).collect()
            })
            .collect();
        seen.len() == 1
    }

    /// Whether the agents of these nodes see the target in one segment. While a node moves to another region they do
    /// not, and the two leaders may send its packets to each other.
    fn agree_on_place(&self, target: Target, path: &[(Id, Source)]) -> bool {
        let name = NodeName(self.nodes[target.node()].name.clone());
        let places: BTreeSet<_> = path
            .iter()
            .filter_map(|(id, _)| self.nodes[*id].agent.as_ref())
            .map(|agent| agent.shown.segment_of(&name).map(|segment| &segment.name))
            .collect();
        // What they have installed follows what they see, after the firewall.
        let has_moved = self.moved.is_some_and(|at| self.now < at + BOUND);
        places.len() == 1 && !has_moved
    }

    fn steps(&mut self, id: Id, source: Source, target: Target) -> Vec<Step> {
        self.steps_to(id, source, self.address(target))
    }

    pub(crate) fn steps_to(&mut self, id: Id, source: Source, address: IpAddr) -> Vec<Step> {
        let node = &mut self.nodes[id];
        let host = super::lookup::Host {
            pods: node.kernel.pods,
            address: node.kernel.address,
            others: &node.kernel.others,
            forwards: node.kernel.forwards,
            turns_back: node.kernel.turns_back,
            passes_on: node.kernel.passes_on,
        };
        let state = node.kernel.fake.state();
        node.fib.steps(state, &host, source, address).to_vec()
    }

    /// Where a packet comes next; notes a packet that leaves its region in clear.
    fn next(&mut self, id: Id, source: Source, target: Target, step: &Step) -> Vec<(Id, Source)> {
        match step {
            Step::Deliver | Step::Refused(_) => Vec::new(),
            Step::Tunnel => {
                if source == Source::Tunnel {
                    let name = &self.nodes[id].name;
                    let finding =
                        format!("{name} reads a packet for {target:?} of two other regions");
                    self.findings.push(finding);
                }
                let owners = self.owners(id, target);
                let with_session = owners.into_iter().filter(|far| self.has_session(id, *far));
                with_session.map(|far| (far, Source::Tunnel)).collect()
            }
            Step::Flannel(pods) => {
                let Some(other) = self.node_of_pods(pods) else {
                    return Vec::new();
                };
                if self.network.places[other].region != self.network.places[id].region {
                    if self.sends_vxlan_to(id, other) {
                        self.note_clear(id, target, "VXLAN", other);
                    }
                    return Vec::new();
                }
                let is_there = self.nodes[other].is_on && self.nodes[other].is_installed;
                if is_there {
                    vec![(other, Source::Region)]
                } else {
                    Vec::new()
                }
            }
            Step::Underlay => {
                let far = target.node();
                let is_near = self.network.places[far].region == self.network.places[id].region;
                if !is_near && self.is_clear(id, source, target) {
                    self.note_clear(id, target, "the underlay", far);
                }
                Vec::new()
            }
        }
    }

    fn note_clear(&mut self, id: Id, target: Target, way: &str, other: Id) {
        let (name, other) = (&self.nodes[id].name, &self.nodes[other].name);
        let finding = format!("{name} sends a packet for {target:?} in clear, by {way} to {other}");
        self.findings.push(finding);
    }

    /// Whether the firewall lets VXLAN out to a node.
    fn sends_vxlan_to(&self, id: Id, other: Id) -> bool {
        let address = self.network.places[other].address;
        match &self.nodes[id].kernel.state().firewall {
            Some(Ruleset::Planned(firewall)) => firewall.region_underlay.contains(&address),
            Some(Ruleset::Installed(_)) | None => true,
        }
    }

    /// Whether a packet by the underlay is one that the mesh carries. A host itself reaches some addresses
    /// directly, and knows nothing yet of a node that has just joined.
    fn is_clear(&self, id: Id, source: Source, target: Target) -> bool {
        let Some(Ruleset::Planned(firewall)) = &self.nodes[id].kernel.state().firewall else {
            return matches!(target, Target::Pod(_));
        };
        let address = self.address(target);
        let has = |nets: &BTreeSet<IpNet>| nets.iter().any(|net| net.contains(&address));
        match (target, source) {
            (Target::Pod(_), _) => true,
            (Target::Host(_), Source::Host) => has(&firewall.mesh_nodes),
            (Target::Host(_), _) => has(&firewall.remote_nodes),
        }
    }

    pub(crate) fn node_of_pods(&self, pods: &IpNet) -> Option<Id> {
        self.nodes.iter().position(|node| node.kernel.pods == *pods)
    }

    fn owners(&mut self, id: Id, target: Target) -> Vec<Id> {
        let address = self.address(target);
        let keys: Vec<_> = self.nodes.iter().map(|node| node.key.0).collect();
        let node = &mut self.nodes[id];
        let node_of = |key: &[u8; 32]| keys.iter().position(|it| it == key);
        let state = node.kernel.fake.state();
        node.fib.owners(state, address, node_of).to_vec()
    }

    fn accepts(&mut self, id: Id, from: Id, source: Id) -> bool {
        let address = self.pod_of(source);
        let keys: Vec<_> = self.nodes.iter().map(|node| node.key.0).collect();
        let node = &mut self.nodes[id];
        let node_of = |key: &[u8; 32]| keys.iter().position(|it| it == key);
        let state = node.kernel.fake.state();
        node.fib
            .accepted(state, (source, address), node_of)
            .contains(&from)
    }

    /// Whether a tunnel's device sends to another node's, and that one would understand it.
    pub(crate) fn has_session(&self, id: Id, far: Id) -> bool {
        let (near, far_node) = (&self.nodes[id], &self.nodes[far]);
        let (Some(own), Some(other)) = (&near.agent, &far_node.agent) else {
            return false;
        };
        let number = own.device.number_of(&far_node.key);
        near.is_running()
            && far_node.is_running()
            && number.is_some_and(|number| other.device.decrypts(&near.key, number))
    }

    /// Agents that have seen the same version agree on the topology, and no path came up too often.
    fn check_agents(&mut self) {
        let running = self.nodes.iter().filter(|node| node.is_running());
        let agents: Vec<_> = running
            .filter_map(|node| Some((node, node.agent.as_ref()?)))
            .collect();
        let mut findings = Vec::new();
        for (node, agent) in &agents {
            let (name, seen) = (&node.name, agent.seen);
            let mut others = agents.iter();
            let other = others.find(|(_, other)| {
                other.seen == seen && other.shown.segments != agent.shown.segments
            });
            if let Some((other, _)) = other {
                findings.push(format!(
                    "{name} and {} do not agree on the topology",
                    other.name
                ));
            }
            if let Some((peer, count)) = agent.flapping(self.now) {
                findings.push(format!(
                    "{name} took the path to {peer} for good {count} times within a minute"
                ));
            }
        }
        self.findings.extend(findings.into_iter().take(1));
    }

    /// All pairs that have a way are connected.
    pub(crate) fn check_convergence(&mut self) {
        self.check_agents();
        let targets = self.targets();
        for from in 0..self.nodes.len() {
            for target in &targets {
                let to = target.node();
                if from == to || !self.is_promised(from, to) {
                    continue;
                }
                for source in [Source::Host, Source::Pod] {
                    self.pairs_checked += 1;
                    let mut path = Vec::new();
                    if let End::Lost(why) = self.walk(from, *target, from, source, &mut path) {
                        let (from, name) = (&self.nodes[from].name, &self.nodes[to].name);
                        let path: Vec<_> = path
                            .iter()
                            .map(|id| self.nodes[*id].name.as_str())
                            .collect();
                        let path = path.join(", ");
                        let finding = format!(
                            "{source:?} of {from} does not reach {target:?} ({name}) by {path}: {why}"
                        );
                        self.findings.push(finding);
                        return;
                    }
                }
            }
        }
    }

    /// Walks a packet of node `origin`; `Delivered` if it is by every choice of next hop and peer.
    fn walk(
        &mut self,
        origin: Id,
        target: Target,
        id: Id,
        source: Source,
        path: &mut Vec<Id>,
    ) -> End {
        path.push(id);
        if path.len() > 6 {
            return End::Lost("too many hops".to_owned());
        }
        let steps = self.steps(id, source, target);
        for step in steps {
            let mut nexts = Vec::new();
            match step {
                Step::Deliver => {
                    if target.node() != id {
                        return End::Lost("it is delivered to another node".to_owned());
                    }
                }
                Step::Refused(why) => return End::Lost(why.to_owned()),
                Step::Underlay => {
                    // Directly, by the host itself: the underlay's own affair.
                    if let Target::Pod(_) = target {
                        return End::Lost("no route".to_owned());
                    }
                }
                Step::Flannel(pods) => {
                    let Some(other) = self.node_of_pods(&pods) else {
                        return End::Lost("no such node".to_owned());
                    };
                    let name = &self.nodes[other].name;
                    if !self.nodes[other].is_on {
                        return End::Lost(format!("{name} is off"));
                    }
                    if self.network.near_loss(id, other) >= BROKEN {
                        return End::Lost(format!("the link to {name} is broken"));
                    }
                    if !self.sends_vxlan_to(id, other) {
                        return End::Lost(format!("VXLAN to {name} is dropped"));
                    }
                    nexts.push((other, Source::Region));
                }
                Step::Tunnel => {
                    let owners = self.owners(id, target);
                    let with_session: Vec<_> = owners
                        .iter()
                        .copied()
                        .filter(|far| self.thinks_session(id, *far))
                        .collect();
                    let is_excused = owners.iter().any(|far| self.may_lack_session(id, *far));
                    if with_session.is_empty() && is_excused {
                        // The next handshake may succeed.
                        continue;
                    }
                    if with_session.is_empty() {
                        let names: Vec<_> = owners
                            .iter()
                            .map(|far| self.nodes[*far].name.as_str())
                            .collect();
                        return End::Lost(format!("no session with any of [{}]", names.join(", ")));
                    }
                    for far in with_session {
                        if let Some(why) = self.tunnel_fails(id, far) {
                            return End::Lost(why);
                        }
                        if !self.has_session(id, far) {
                            continue;
                        }
                        if !self.accepts(far, id, origin) {
                            let name = &self.nodes[far].name;
                            return End::Lost(format!("{name} does not accept the source"));
                        }
                        nexts.push((far, Source::Tunnel));
                    }
                }
            }
            for (next, source) in nexts {
                if let lost @ End::Lost(_) = self.walk(origin, target, next, source, path) {
                    return lost;
                }
            }
        }
        path.pop();
        End::Delivered
    }

    fn thinks_session(&self, id: Id, far: Id) -> bool {
        let agent = self.nodes[id].agent.as_ref();
        agent.is_some_and(|agent| agent.device.has_session(&self.nodes[far].key))
    }

    /// Why packets through the tunnel between two nodes do not arrive, if they do not.
    fn tunnel_fails(&mut self, id: Id, far: Id) -> Option<String> {
        let (near, other) = (&self.nodes[id], &self.nodes[far]);
        let name = &other.name;
        if !near.is_running() {
            return Some(format!("the tunnel of {} stands still", near.name));
        }
        if !other.is_running() {
            return Some(format!("the tunnel of {name} stands still"));
        }
        let endpoint = near.agent.as_ref()?.device.endpoint(&other.key)?;
        let is_relayed = Device::is_relayed(endpoint);
        if !is_relayed && self.network.far_loss(id, far) >= BROKEN {
            return Some(format!("the way to {name} is broken"));
        }
        if !self.has_session(id, far) && !self.may_lack_session(id, far) {
            return Some(format!("{name} does not know the session"));
        }
        if is_relayed {
            let why = self.relay_fails(id, far, endpoint.ip());
            // Without a relay that is promised, the direct candidates are tried again.
            return why.filter(|_| self.has_relay(id, far));
        }
        let port = near.kernel.state().listen_port?.get();
        let arrives = self
            .network
            .reaches(id, port, endpoint)
            .is_none_or(|node| node == far);
        (!arrives).then(|| format!("{endpoint} is not {name}"))
    }

    /// Whether a handshake between two nodes may have been lost, so that the next one is still to come.
    fn may_lack_session(&self, a: Id, b: Id) -> bool {
        if !self.is_far_good(a, b) {
            return !self.has_relay(a, b);
        }
        let passes = self
            .paths
            .get(&(a.min(b), a.max(b)))
            .and_then(|it| it.passes);
        passes.is_none_or(|since| self.now - since < BOUND + HANDSHAKE_RETRY)
    }

    /// Whether the tunnel between two nodes loses datagrams.
    pub(crate) fn is_lossy(&self, a: Id, b: Id) -> bool {
        self.network.far_loss(a, b) > 0 || self.network.far_loss(b, a) > 0
    }

    /// Whether the design promises that packets from a node reach another one. This is stated by what is broken,
    /// not by what the agents think.
    fn is_promised(&self, from: Id, to: Id) -> bool {
        let is_ready = |id: Id| self.nodes[id].is_running() && self.nodes[id].is_installed;
        if !is_ready(from) || !is_ready(to) || !self.api.has(&self.nodes[from].name) {
            return false;
        }
        let regions = (
            self.network.places[from].region,
            self.network.places[to].region,
        );
        if regions.0 == regions.1 {
            return self.network.near_loss(from, to) <= GOOD;
        }
        let (Some(near), Some(far)) = (self.leaders(from), self.leaders(to)) else {
            return false;
        };
        // A leader that works but does not reach one node of its region: no other node can know that.
        let is_odd = |leader: &Id, node: Id| self.works(*leader) && !self.is_near(*leader, node);
        if far.iter().any(|leader| is_odd(leader, to))
            || near.iter().any(|leader| is_odd(leader, from))
        {
            return false;
        }
        let near_ones = near.iter().filter(|leader| self.works(**leader));
        near_ones.into_iter().any(|near| {
            let mut far_ones = far.iter().filter(|leader| self.works(**leader));
            far_ones.any(|far| {
                self.is_far_good(*near, *far) && self.has_had_a_session(*near, *far)
                    || self.has_relay(*near, *far)
            })
        })
    }

    /// Whether two leaders had the time to find out that the way between them works. Where their handshake was lost, that
    /// time begins with their session.
    fn has_had_a_session(&self, a: Id, b: Id) -> bool {
        let lasts = |id: Id, far: Id| {
            let agent = self.nodes[id].agent.as_ref();
            let since = agent.and_then(|agent| agent.device.session_since(&self.nodes[far].key));
            since.is_some_and(|since| self.now - since >= BOUND)
        };
        !self.may_lack_session(a, b) || lasts(a, b) && lasts(b, a)
    }

    /// The leaders of a node's region, as its agent sees them. `None` while it is in no region's segment.
    fn leaders(&self, id: Id) -> Option<Vec<Id>> {
        let node = &self.nodes[id];
        let shown = &node.agent.as_ref()?.shown;
        let segment = shown.segment_of(&NodeName(node.name.clone()))?;
        let leaders = segment.leaders.iter();
        leaders
            .map(|leader| {
                self.nodes
                    .iter()
                    .position(|node| node.name == leader.node.0)
            })
            .collect()
    }

    /// Whether a leader carries packets at all.
    pub(crate) fn works(&self, id: Id) -> bool {
        let node = &self.nodes[id];
        node.is_running() && node.is_installed && node.kernel.forwards
    }

    fn is_near(&self, a: Id, b: Id) -> bool {
        a == b || self.network.near_loss(a, b) <= GOOD && self.network.near_loss(b, a) <= GOOD
    }

    pub(crate) fn is_far_good(&self, a: Id, b: Id) -> bool {
        let regions = (self.network.places[a].region, self.network.places[b].region);
        !self.network.is_blocked(regions.0, regions.1)
            && self.network.far_loss(a, b) <= GOOD
            && self.network.far_loss(b, a) <= GOOD
    }
}
