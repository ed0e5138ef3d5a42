//! The world: nodes, API and network on one clock, which jumps from event to event.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use selvedge::agent::controller::WallClock;
use selvedge::cluster::View;
use selvedge::config::Config;
use selvedge::topology::NodeName;

use super::api::{Api, region_name};
use super::device::Message;
use super::faults::{Fault, Plan};
use super::flannel::{kernel_facts, mesh_of};
use super::kernel::Kernel;
use super::network::{Id, Kind, Network};
use super::node::{Life, Node};
use super::rng::Rng;
use super::walk::Fib;
use crate::fake_kernel::FakeKernel;
use crate::mesh::{self, net};

/// The API server's time when the simulation begins.
const EPOCH: i64 = 1_796_081_284;
/// What is broken on purpose, to show that the simulation finds it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum Mutant {
    #[default]
    None,
    /// One agent alone takes a Ready node for one that is not: a verdict in the topology.
    VerdictInTopology,
    /// Deletions are applied before additions.
    DeletesFirst,
    /// The firewall's rule against packets that turn back is left out.
    TurnsBack,
    /// The controller gets no verdict.
    NoVerdicts,
    /// Nothing is kept of a path when the targets come again.
    NoDamping,
    /// A leader that has to stop does not wait until the others know.
    NoDrain,
    /// No region relays.
    NoRelays,
    /// The firewall's rule against packets that go through the tunnel twice is left out.
    PassesOn,
}

/// What happens at a time.
#[derive(Debug)]
enum Event {
    Wake(Id),
    Datagram {
        from: Id,
        source: SocketAddr,
        to: SocketAddr,
        message: Message,
    },
    /// A packet by flannel, inside a region.
    Near {
        from: Id,
        to: Id,
        packet: Vec<u8>,
    },
    Fault(Fault),
    Check,
}

struct Due(Instant, u64, Event);

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

pub(crate) struct World {
    pub(crate) now: Instant,
    begun: Instant,
    end: Instant,
    queue: BinaryHeap<Reverse<Due>>,
    sequence: u64,
    pub(crate) rng: Rng,
    pub(crate) network: Network,
    pub(crate) api: Api,
    pub(crate) nodes: Vec<Node>,
    pub(crate) mutant: Mutant,
    runs: u64,
    /// When the last fault happened.
    pub(crate) disturbed: Instant,
    /// Whether something changed on which the invariants depend.
    pub(crate) dirty: bool,
    /// What was wrong.
    pub(crate) findings: Vec<String>,
    /// What happened, for people.
    pub(crate) story: Vec<String>,
    pub(crate) checks: u64,
    pub(crate) pairs_checked: u64,
    pub(crate) events: u64,
    /// The paths between all nodes.
    pub(crate) paths: BTreeMap<(Id, Id), super::invariants::History>,
    /// When a node last moved, or booted with what it knew before another one moved.
    pub(crate) moved: Option<Instant>,
    /// Events at the present moment.
    at_once: u64,
}

impl World {
    pub(crate) fn new(plan: &Plan, mutant: Mutant) -> Self {
        #[expect(clippy::disallowed_methods, reason = "an Instant has no other origin")]
        let now = Instant::now();
        let mut network = Network::new(plan.kinds.clone());
        network.places = plan
            .nodes
            .iter()
            .map(|it| network.place(it.region, it.number))
            .collect();
        let mut world = Self {
            now,
            begun: now,
            end: now + plan.length,
            queue: BinaryHeap::new(),
            sequence: 0,
            rng: Rng::new(plan.seed ^ 0x5e1f),
            network,
            api: Api::new(now),
            nodes: Vec::new(),
            mutant,
            runs: 0,
            disturbed: now,
            dirty: false,
            findings: Vec::new(),
            story: Vec::new(),
            checks: 0,
            pairs_checked: 0,
            events: 0,
            paths: BTreeMap::new(),
            moved: None,
            at_once: 0,
        };
        let cidrs: Vec<_> = (0..plan.kinds.len())
            .map(|region| format!("{}=192.168.{}.0/24", region_name(region), 50 + region))
            .collect();
        let cidrs = format!("--region-cidr={}", cidrs.join(","));
        for (id, node) in plan.nodes.iter().enumerate() {
            let place = world.network.places[id];
            let name = format!("n{}", node.number);
            let config = Config::from_args([
                format!("--hostname={name}").as_str(),
                "--encapsulate=crosssubnet",
                "--service-cidr=10.43.0.0/16",
                if mutant == Mutant::NoRelays {
                    "--relay=off"
                } else {
                    "--relay=auto"
                },
                &cidrs,
            ])
            .expect("these flags are good");
            world.nodes.push(Node {
                kernel: Kernel {
                    fake: FakeKernel::default(),
                    pods: net(&format!("10.42.{}.0/24", node.number)),
                    address: place.address,
                    targets: Vec::new(),
                    others: Vec::new(),
                    forwards: true,
                    turns_back: mutant != Mutant::TurnsBack,
                    passes_on: mutant == Mutant::PassesOn,
                    deletes_first: mutant == Mutant::DeletesFirst,
                    findings: Vec::new(),
                    changes: 0,
                },
                name,
                number: node.number,
                key: mesh::key(node.number),
                config: Arc::new(config),
                is_on: false,
                life: Life::Ended,
                agent: None,
                saved: None,
                fib: Fib::default(),
                looked: (0, 0),
                is_installed: false,
                watch: node.watch,
                skew: node.skew,
                wake_at: None,
                busy_passes: 0,
            });
        }
        for (id, node) in plan.nodes.iter().enumerate() {
            if node.is_there {
                world.switch_on(id);
            }
        }
        for (after, fault) in &plan.faults {
            world.push(now + *after, Event::Fault(fault.clone()));
        }
        world.push(now + plan.settled, Event::Check);
        world.push(now + plan.settled + super::relays::BOUND, Event::Check);
        world.disturbed = now + plan.settled - super::invariants::BOUND;
        world
    }

    /// Checks convergence when it is due after what has just happened, and once more when lost handshakes are made
    /// good.
    fn push_checks(&mut self) {
        let (now, bound) = (self.now, super::invariants::BOUND);
        self.push(now + bound, Event::Check);
        self.push(
            now + bound + super::invariants::HANDSHAKE_RETRY,
            Event::Check,
        );
        self.push(now + super::relays::BOUND, Event::Check);
    }

    fn push(&mut self, at: Instant, event: Event) {
        self.sequence += 1;
        self.queue.push(Reverse(Due(at, self.sequence, event)));
    }

    /// Runs to the end, or to the first finding.
    pub(crate) fn run(&mut self) {
        while self.findings.is_empty()
            && let Some(Reverse(Due(at, _, event))) = self.queue.pop()
        {
            if at > self.end {
                break;
            }
            if at > self.now {
                self.at_once = 0;
            }
            self.now = at;
            self.events += 1;
            self.at_once += 1;
            if self.at_once > 1_000 {
                self.findings
                    .push(format!("the simulation does not get on: {event:?}"));
                return;
            }
            match event {
                Event::Wake(id) => {
                    if self.nodes[id].wake_at == Some(at) {
                        self.nodes[id].wake_at = None;
                        self.wake(id);
                    }
                }
                Event::Datagram {
                    from,
                    source,
                    to,
                    message,
                } => {
                    self.arrive(from, source, to, message);
                }
                Event::Near { from, to, packet } => self.arrive_near(from, to, &packet),
                Event::Fault(fault) => {
                    if !matches!(fault, Fault::Stop(_)) {
                        self.disturbed = at;
                    }
                    self.happen(&fault);
                    self.push_checks();
                }
                Event::Check => self.check_if_due(),
            }
            if std::mem::take(&mut self.dirty) {
                self.check_always();
            }
        }
    }

    /// Checks convergence, or puts the check off while the last cause is still on its way.
    fn check_if_due(&mut self) {
        let settled = super::invariants::BOUND;
        let has_moved = self.moved.is_some_and(|at| self.now < at + settled);
        if !self.is_calm() || has_moved {
            return;
        }
        self.checks += 1;
        self.check_convergence();
    }

    /// Whether the last cause of a change is long enough ago, and every agent has heard of it.
    pub(crate) fn is_calm(&self) -> bool {
        let is_late = |node: &Node| {
            let agent = node.agent.as_ref().filter(|_| node.is_running());
            agent.is_some_and(|agent| agent.seen.is_none_or(|seen| seen < self.api.caused))
        };
        // A view that still has to come is a cause of its own.
        self.now >= self.disturbed + super::invariants::BOUND
            && self.api.is_up
            && !self.nodes.iter().any(is_late)
    }

    pub(crate) fn wake(&mut self, id: Id) {
        let now = self.now;
        if !self.nodes[id].is_running() {
            return;
        }
        self.deliver_view(id);
        self.publish(id);
        let wall = self.wall(id);
        let (nodes, api, network) = (&mut self.nodes, &self.api, &self.network);
        let node = &mut nodes[id];
        let (name, number, place) = (node.name.clone(), node.number, network.places[id]);
        node.handle_timeout(now, wall, || {
            kernel_facts(&mesh_of(api), &name, number, place.address)
        });
        self.after(id);
    }

    /// Sends what a node's device has to send, and notes when the node is to be looked at next.
    pub(crate) fn after(&mut self, id: Id) {
        let now = self.now;
        self.pass_on(id);
        let node = &mut self.nodes[id];
        let mut outgoing = Vec::new();
        let mut sessions = 0;
        let (mut transmits, mut said, mut has_new_leaders) = (Vec::new(), Vec::new(), false);
        node.carry_out(now);
        if let Some(agent) = &mut node.agent {
            agent.hurry(now);
            transmits = std::mem::take(&mut agent.transmits);
            said = std::mem::take(&mut agent.said);
            has_new_leaders = std::mem::take(&mut agent.has_new_leaders);
            outgoing = agent.device.take_outgoing();
            sessions = agent.device.changes;
        }
        self.findings.append(&mut node.kernel.findings);
        if (node.kernel.changes, sessions) != node.looked {
            if node.kernel.changes != node.looked.0 {
                node.fib.clear();
            }
            node.looked = (node.kernel.changes, sessions);
            self.dirty = true;
        }
        let port = node
            .kernel
            .state()
            .listen_port
            .map_or(51820, |port| port.get());
        for (to, message) in outgoing {
            let source = self.network.leave(id, port, to);
            let delay = self.rng.millis(3, 12);
            self.push(
                now + delay,
                Event::Datagram {
                    from: id,
                    source,
                    to,
                    message,
                },
            );
        }
        if has_new_leaders && now > self.disturbed {
            self.disturbed = now;
            self.push_checks();
        }
        let name = self.nodes[id].name.clone();
        for said in said {
            self.tell(format!("{name}: {said}"));
        }
        for transmit in transmits {
            self.transmit(id, transmit);
        }
        self.follow_drain(id);
        self.plan_wake(id);
    }

    /// Ends an agent that has to stop, when it may.
    fn follow_drain(&mut self, id: Id) {
        let now = self.now;
        let node = &mut self.nodes[id];
        let is_running = node.is_running();
        let Some(agent) = node.agent.as_mut().filter(|_| is_running) else {
            return;
        };
        let Some(drain) = agent.poll_drain(now) else {
            return;
        };
        let is_promised = drain.is_calm && drain.all_know() && self.is_calm();
        self.stop(id, is_promised);
    }

    /// An agent stops. `is_promised` says that all others know, and have changed their routes.
    pub(crate) fn stop(&mut self, id: Id, is_promised: bool) {
        self.end_agent(id);
        if is_promised {
            let before = self.findings.len();
            self.check_convergence();
            for finding in &mut self.findings[before..] {
                finding.insert_str(0, "a leader stopped after its drain, and ");
            }
        }
        self.disturbed = self.now;
        self.push_checks();
    }

    pub(crate) fn end_agent(&mut self, id: Id) {
        let name = self.nodes[id].name.clone();
        self.tell(format!("the agent of {name} ends"));
        self.nodes[id].end();
        self.note_paths();
        self.dirty = true;
    }

    pub(crate) fn push_near(&mut self, delay: Duration, from: Id, to: Id, packet: Vec<u8>) {
        self.push(self.now + delay, Event::Near { from, to, packet });
    }

    pub(crate) fn plan_wake(&mut self, id: Id) {
        let api_is_up = self.api.is_up;
        let node = &mut self.nodes[id];
        let Some(at) = node.poll_timeout(self.now, api_is_up) else {
            return;
        };
        let at = at.max(self.now);
        if node.wake_at.is_none_or(|planned| at < planned) {
            node.wake_at = Some(at);
            self.push(at, Event::Wake(id));
        }
    }

    fn arrive(&mut self, from: Id, source: SocketAddr, to: SocketAddr, message: Message) {
        let Some((id, port)) = self.network.arrive(source, to) else {
            return;
        };
        let loss = self.network.far_loss(from, id);
        if loss > 0 && self.rng.chance(loss) || !self.nodes[id].is_running() {
            return;
        }
        let now = self.now;
        let node = &mut self.nodes[id];
        let listens = node
            .kernel
            .state()
            .listen_port
            .is_some_and(|it| it.get() == port);
        if let Some(agent) = node.agent.as_mut().filter(|_| listens) {
            agent.device.handle_message(now, source, message);
            self.after(id);
        }
    }

    fn wall(&self, id: Id) -> WallClock {
        let passed = (self.now - self.begun).as_secs();
        let server = EPOCH + i64::try_from(passed).expect("minutes");
        WallClock {
            node: server + self.nodes[id].skew,
            server: Some(server),
        }
    }

    fn deliver_view(&mut self, id: Id) {
        let now = self.now;
        if !self.api.is_up {
            return;
        }
        let watch = self.nodes[id].watch;
        let Some(agent) = &mut self.nodes[id].agent else {
            return;
        };
        if agent.view_at.take_if(|at| *at <= now).is_none() {
            return;
        }
        let mut number = self.api.latest();
        while number > 0
            && self
                .api
                .version(number)
                .is_some_and(|(at, _)| *at + watch > now)
        {
            number -= 1;
        }
        let latest = self.api.latest();
        if number < latest
            && let Some((at, _)) = self.api.version(number + 1)
        {
            agent.view_at = Some(*at + watch);
        }
        if agent.seen.is_some_and(|seen| seen >= number) {
            return;
        }
        let is_cause =
            agent.seen.is_none_or(|seen| seen < self.api.caused) && number >= self.api.caused;
        agent.seen = Some(number);
        let Some((_, snapshot)) = self.api.version(number) else {
            return;
        };
        let mut snapshot = Arc::clone(snapshot);
        if self.mutant == Mutant::VerdictInTopology && id == 0 {
            let leaders = agent.shown.leaders().map(|(_, leader)| leader.node.clone());
            if let Some(leader) = leaders.last()
                && let Some(node) = Arc::make_mut(&mut snapshot).nodes.get_mut(&leader)
            {
                node.ready = false;
            }
        }
        let view = View {
            snapshot,
            live: true,
            ..View::default()
        };
        agent.controller.handle_view(now, Arc::new(view));
        if is_cause && now > self.disturbed {
            self.disturbed = now;
            self.push_checks();
        }
    }

    fn publish(&mut self, id: Id) {
        let now = self.now;
        let node = &mut self.nodes[id];
        let Some(agent) = &mut node.agent else { return };
        if !self.api.is_up || agent.publish_at.take_if(|at| *at <= now).is_none() {
            return;
        }
        if let Some(annotations) = &agent.publish
            && self.api.publish(now, &node.name, annotations)
        {
            self.announce();
        }
    }

    /// The API has a new version: every watch will show it.
    pub(crate) fn announce(&mut self) {
        for id in 0..self.nodes.len() {
            let at = self.now + self.nodes[id].watch;
            if let Some(agent) = &mut self.nodes[id].agent {
                agent.view_at.get_or_insert(at);
                self.plan_wake(id);
            }
        }
    }

    /// The nodes or their places have changed: flannel's routes and the targets of others follow at once.
    pub(crate) fn follow_nodes(&mut self) {
        let known: Vec<_> = (0..self.nodes.len())
            .filter(|id| self.api.has(&self.nodes[*id].name))
            .collect();
        for id in 0..self.nodes.len() {
            let others = known.iter().filter(|other| **other != id);
            let others: Vec<IpNet> = others.map(|other| self.nodes[*other].kernel.pods).collect();
            let targets: Vec<IpAddr> = known
                .iter()
                .filter(|other| **other != id)
                .flat_map(|other| [self.pod_of(*other), self.network.places[*other].address])
                .collect();
            let node = &mut self.nodes[id];
            node.kernel.others = others;
            node.kernel.targets = targets;
            node.fib.clear();
        }
        self.dirty = true;
    }

    pub(crate) fn pod_of(&self, id: Id) -> IpAddr {
        IpAddr::from([10, 42, self.nodes[id].number, 5])
    }

    /// A node boots: a fresh kernel, and flannel; the agent starts with it.
    pub(crate) fn switch_on(&mut self, id: Id) {
        let now = self.now;
        let place = self.network.places[id];
        let (name, number) = (self.nodes[id].name.clone(), self.nodes[id].number);
        self.api.register(now, &name, number, place);
        let mesh = mesh_of(&self.api);
        let node = &mut self.nodes[id];
        node.kernel.fake = FakeKernel::before_the_agent(&mesh, &NodeName(name));
        node.kernel.address = place.address;
        node.kernel.changes += 1;
        node.kernel.forwards = true;
        node.is_on = true;
        node.is_installed = false;
        self.follow_nodes();
        self.start_agent(id);
        self.announce();
    }

    pub(crate) fn start_agent(&mut self, id: Id) {
        self.runs += 1;
        let (now, runs) = (self.now, self.runs);
        let delay = self.rng.millis(20, 200);
        let node = &mut self.nodes[id];
        if !node.is_on {
            return;
        }
        node.start(now, runs, self.mutant);
        if let Some(agent) = &mut node.agent {
            agent.view_at = Some(now + node.watch.max(delay));
        }
        node.wake_at = None;
        self.plan_wake(id);
    }

    pub(crate) fn tell(&mut self, text: String) {
        let at = (self.now - self.begun).as_secs_f64();
        self.story.push(format!("{at:7.3} s  {text}"));
    }

    pub(crate) fn seconds(&self) -> f64 {
        (self.now - self.begun).as_secs_f64()
    }

    pub(crate) fn busy_passes(&self) -> u64 {
        self.nodes.iter().map(|node| node.busy_passes).sum()
    }

    pub(crate) fn kinds(&self) -> &[Kind] {
        &self.network.kinds
    }
}

/// How long a node's watch usually takes.
pub(crate) fn usual_watch(rng: &mut Rng) -> Duration {
    rng.millis(20, 150)
}
