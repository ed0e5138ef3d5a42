//! A mesh and a schedule of faults, all from one seed.

use std::time::Duration;

use super::network::{BROKEN, Id, Kind};
use super::node::Life;
use super::rng::Rng;
use super::world::{Mutant, World, usual_watch};

/// When a new mesh is expected to be at work.
const SETTLED: Duration = Duration::from_secs(15);
/// How long a kubelet is silent before its Node is not Ready: the controller manager's grace period.
const NOT_READY: Duration = Duration::from_secs(40);

/// Something that happens from outside.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Fault {
    Off(Id),
    On(Id),
    Pause(Id),
    Resume(Id),
    EndAgent(Id),
    StartAgent(Id),
    /// The agent gets SIGTERM.
    Stop(Id),
    /// The kernel's `ip_forward`.
    Forwarding(Id, bool),
    /// The loss out of and into a node, to and from other regions, in thousandths.
    Uplink(Id, u32, u32),
    /// The loss from a region to another.
    Between(usize, usize, u32),
    /// The loss from a node to one of its region.
    Near(Id, Id, u32),
    /// A NAT forgets its mappings.
    Forget(usize),
    /// How long a change of the API takes to a node.
    Watch(Id, Duration),
    Api(bool),
    /// The controller manager or the kubelet writes the Node's condition, as the node is then.
    Condition(Id),
    /// All conditions at once.
    Conditions(bool),
    Join(Id),
    Leave(Id),
    /// To another region, with another address. The node boots there.
    Move(Id, usize),
}

/// A node of the plan.
#[derive(Clone, Debug)]
pub(crate) struct PlannedNode {
    pub(crate) number: u8,
    pub(crate) region: usize,
    /// Whether it is there from the beginning.
    pub(crate) is_there: bool,
    pub(crate) watch: Duration,
    pub(crate) skew: i64,
}

/// The mesh, and what happens to it.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) kinds: Vec<Kind>,
    pub(crate) nodes: Vec<PlannedNode>,
    pub(crate) settled: Duration,
    pub(crate) length: Duration,
    pub(crate) faults: Vec<(Duration, Fault)>,
}

impl Plan {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let regions = 2 + rng.below(3);
        let mut kinds: Vec<_> = (0..regions)
            .map(|_| {
                if rng.chance(500) {
                    Kind::Routed
                } else {
                    Kind::Public
                }
            })
            .collect();
        if rng.chance(400) {
            kinds[rng.below(regions)] = Kind::Nat;
        }
        let count = (4 + rng.below(6)).max(regions);
        let mut nodes = Vec::new();
        for index in 0..count {
            let region = if index < regions {
                index
            } else {
                rng.below(regions)
            };
            nodes.push(PlannedNode {
                number: u8::try_from(11 + index).expect("few nodes"),
                region,
                is_there: index < regions + 1 || rng.chance(900),
                watch: usual_watch(&mut rng),
                skew: i64::try_from(rng.below(240)).expect("small") - 120,
            });
        }
        let mut plan = Self {
            seed,
            kinds,
            nodes,
            settled: SETTLED,
            length: SETTLED,
            faults: Vec::new(),
        };
        plan.add_faults(&mut rng);
        // Other numbers, so that a seed has the faults that it had before there were relays.
        plan.block_regions(&mut Rng::new(seed ^ 0x7e1a));
        plan
    }

    /// Two regions that never, or for a while, reach each other directly, beside a third.
    fn block_regions(&mut self, rng: &mut Rng) {
        let regions = self.kinds.len();
        if regions < 3 || !rng.chance(400) {
            return;
        }
        let one = rng.below(regions);
        let other = (one + 1 + rng.below(regions - 1)) % regions;
        if rng.chance(500) {
            for kind in &mut self.kinds {
                if *kind == Kind::Nat {
                    *kind = Kind::Public;
                }
            }
            (self.kinds[one], self.kinds[other]) = (Kind::Symmetric, Kind::Symmetric);
        } else {
            let at = if rng.chance(500) {
                Duration::ZERO
            } else {
                self.settled + rng.millis(0, 20_000)
            };
            let later = at + rng.millis(25_000, 60_000);
            let ends = rng.chance(500);
            for (from, to) in [(one, other), (other, one)] {
                self.faults.push((at, Fault::Between(from, to, BROKEN)));
                if ends {
                    self.faults.push((later, Fault::Between(from, to, 0)));
                }
            }
            self.faults.sort_by_key(|(at, _)| *at);
        }
        let last = self.faults.last().map_or(self.length, |(at, _)| *at);
        self.length = self.length.max(last) + super::relays::BOUND + Duration::from_secs(2);
    }

    /// Groups of faults with pauses in which the mesh has to recover. Most faults end again.
    fn add_faults(&mut self, rng: &mut Rng) {
        let mut at = self.settled + Duration::from_millis(100);
        for _ in 0..3 + rng.below(4) {
            for _ in 0..1 + rng.below(3) {
                at += rng.millis(0, 700);
                self.add_fault(rng, at);
            }
            at += rng.millis(3_500, 12_000);
        }
        self.faults.sort_by_key(|(at, _)| *at);
        let last = self.faults.last().map_or(at, |(at, _)| *at);
        self.length = last.max(at) + Duration::from_secs(8);
    }

    fn add_fault(&mut self, rng: &mut Rng, at: Duration) {
        let regions = self.kinds.len();
        let id = rng.below(self.nodes.len());
        let region = self.nodes[id].region;
        let later = at + rng.millis(2_000, 25_000);
        let mut add = |at, fault| self.faults.push((at, fault));
        let near: Vec<_> = (0..self.nodes.len())
            .filter(|other| *other != id && self.nodes[*other].region == region)
            .collect();
        let loss = if rng.chance(300) { 100 } else { BROKEN };
        match rng.below(100) {
            0..18 => {
                add(at, Fault::Off(id));
                add(at + NOT_READY, Fault::Condition(id));
                if rng.chance(700) {
                    add(later, Fault::On(id));
                }
            }
            18..32 => {
                add(at, Fault::Pause(id));
                add(later, Fault::Resume(id));
            }
            32..39 => {
                add(at, Fault::EndAgent(id));
                add(at + rng.millis(300, 4_000), Fault::StartAgent(id));
            }
            39..46 => {
                add(at, Fault::Stop(id));
                add(at + rng.millis(1_600, 6_000), Fault::StartAgent(id));
            }
            46..56 => {
                add(at, Fault::Forwarding(id, false));
                add(later, Fault::Forwarding(id, true));
            }
            56..66 => {
                let (out, into) = match rng.below(3) {
                    0 => (loss, 0),
                    1 => (0, loss),
                    _ => (loss, loss),
                };
                add(at, Fault::Uplink(id, out, into));
                add(later, Fault::Uplink(id, 0, 0));
            }
            66..68 => {
                // A link that flaps.
                let other = (region + 1 + rng.below(regions - 1)) % regions;
                let mut at = at;
                for _ in 0..8 {
                    add(at, Fault::Between(region, other, BROKEN));
                    at += rng.millis(2_000, 2_500);
                    add(at, Fault::Between(region, other, 0));
                    at += rng.millis(2_000, 4_000);
                }
            }
            68..72 => {
                let other = (region + 1 + rng.below(regions - 1)) % regions;
                let both = rng.chance(500);
                add(at, Fault::Between(region, other, loss));
                add(later, Fault::Between(region, other, 0));
                if both {
                    add(at, Fault::Between(other, region, loss));
                    add(later, Fault::Between(other, region, 0));
                }
            }
            72..78 => {
                if let Some(other) = rng.pick(&near) {
                    let both = rng.chance(500);
                    add(at, Fault::Near(id, other, loss));
                    add(later, Fault::Near(id, other, 0));
                    if both {
                        add(at, Fault::Near(other, id, loss));
                        add(later, Fault::Near(other, id, 0));
                    }
                }
            }
            78..82 => add(at, Fault::Forget(region)),
            82..86 => {
                add(at, Fault::Watch(id, rng.millis(500, 8_000)));
                add(later, Fault::Watch(id, usual_watch(rng)));
            }
            86..90 => {
                add(at, Fault::Api(false));
                add(later, Fault::Api(true));
            }
            90..93 => {
                add(at, Fault::Conditions(false));
                add(later, Fault::Conditions(true));
            }
            93..95 => add(at, Fault::Join(id)),
            95..97 => add(at, Fault::Leave(id)),
            _ => {
                let other = (region + 1 + rng.below(regions - 1)) % regions;
                add(at, Fault::Off(id));
                add(at + rng.millis(1_000, 4_000), Fault::Move(id, other));
            }
        }
    }
}

impl World {
    /// Makes a fault happen.
    pub(crate) fn happen(&mut self, fault: &Fault) {
        let now = self.now;
        let what = format!("{fault:?}");
        self.tell(what);
        self.dirty = true;
        match *fault {
            Fault::Off(id) => self.switch_off(id),
            Fault::On(id) | Fault::Join(id) => {
                let name = self.nodes[id].name.clone();
                let is_known = self.api.has(&name) || matches!(fault, Fault::Join(_));
                if !self.nodes[id].is_on && is_known && self.api.is_up {
                    self.moved = self.moved.map(|_| now);
                    self.switch_on(id);
                }
            }
            Fault::Pause(id) => {
                let node = &mut self.nodes[id];
                if node.is_running() {
                    node.life = Life::Paused;
                }
            }
            Fault::Resume(id) => {
                let node = &mut self.nodes[id];
                if node.is_on && node.life == Life::Paused {
                    node.life = Life::Running;
                    node.wake_at = None;
                    self.plan_wake(id);
                }
            }
            Fault::EndAgent(id) => {
                if self.nodes[id].is_on {
                    self.nodes[id].end();
                }
            }
            Fault::StartAgent(id) => {
                if self.nodes[id].is_on && self.nodes[id].life == Life::Ended {
                    self.start_agent(id);
                }
            }
            Fault::Stop(id) => {
                let is_calm = self.is_calm();
                let waits = self.mutant != Mutant::NoDrain;
                if self.nodes[id].is_running() {
                    let agent = self.nodes[id].agent.as_mut();
                    if !agent.is_some_and(|agent| waits && agent.begin_drain(now, is_calm)) {
                        self.stop(id, is_calm && !waits);
                    }
                }
            }
            Fault::Forwarding(id, works) => {
                let node = &mut self.nodes[id];
                node.kernel.forwards = works;
                node.fib.clear();
            }
            Fault::Uplink(id, out, into) => self.network.set_uplink(id, out, into),
            Fault::Between(from, to, loss) => self.network.set_between(from, to, loss),
            Fault::Near(from, to, loss) => self.network.set_near(from, to, loss),
            Fault::Forget(region) => self.network.forget_mappings(region),
            Fault::Watch(id, watch) => self.nodes[id].watch = watch,
            Fault::Api(is_up) => {
                self.api.is_up = is_up;
                if is_up {
                    for id in 0..self.nodes.len() {
                        self.plan_wake(id);
                    }
                }
            }
            Fault::Condition(id) => {
                let (name, is_on) = (self.nodes[id].name.clone(), self.nodes[id].is_on);
                self.api.set_ready(now, &name, is_on);
                self.announce();
            }
            Fault::Conditions(ready) => {
                for id in 0..self.nodes.len() {
                    let (name, is_on) = (self.nodes[id].name.clone(), self.nodes[id].is_on);
                    self.api.set_ready(now, &name, ready && is_on);
                }
                self.announce();
            }
            Fault::Leave(id) => {
                // A region keeps a node, so that there is a mesh.
                if self.api.nodes().len() > 3 {
                    self.switch_off(id);
                    let name = self.nodes[id].name.clone();
                    self.api.delete(now, &name);
                    self.follow_nodes();
                    self.announce();
                }
            }
            Fault::Move(id, region) => {
                let name = self.nodes[id].name.clone();
                if self.api.has(&name) && self.api.is_up {
                    self.switch_off(id);
                    self.moved = Some(now);
                    // It has a new disk there.
                    self.nodes[id].saved = None;
                    let number = self.nodes[id].number;
                    self.network.places[id] = self.network.place(region, number);
                    self.switch_on(id);
                }
            }
        }
        self.note_paths();
        for id in 0..self.nodes.len() {
            self.after(id);
        }
    }

    fn switch_off(&mut self, id: Id) {
        let node = &mut self.nodes[id];
        node.is_on = false;
        node.agent = None;
        node.life = Life::Ended;
    }
}
