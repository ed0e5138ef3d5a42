//! How the echoes of the real prober travel: by flannel inside a region, through the tunnel to other regions.
//!
//! Inside a region a leader's kernel has to forward them, as its rules and routes say at that moment.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use selvedge::liveness::PathState;
use selvedge::probe::message::{Datagram, datagram, packet};
use selvedge::probe::{News, PORT, Targets, Transmit};
use selvedge::wireguard::PeerId;

use super::lookup::{Source, Step};
use super::network::Id;
use super::node::Agent;
use super::world::World;

/// The port of every node's socket.
const SOCKET: u16 = 40_000;

/// How far an agent that has to stop has come.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drain {
    /// It stops then, whatever the others know.
    until: Instant,
    /// When it stops because all know.
    drained: Option<Instant>,
    /// Whether nothing else was wrong when it began.
    pub(crate) is_calm: bool,
}

/// As the agent: how long the end waits for the others, and how long they have to change their routes.
const DRAIN: Duration = Duration::from_millis(1_200);
const SETTLE: Duration = Duration::from_millis(300);
/// How often a path may come up again within the memory of the flap damping. It takes twice as many answers each
/// time, so that the fourth return takes 12 s.
const MOST_RETURNS: usize = 6;
const MEMORY: Duration = Duration::from_secs(60);
/// How often it is looked whether all others know.
const DRAINING: Duration = Duration::from_millis(20);

impl Agent {
    /// Hands the prober what came through the tunnel, and the controller what the echoes say.
    pub(crate) fn follow_echoes(&mut self, now: Instant) {
        for (peer, packet) in self.device.take_received() {
            if self.is_diverted(&packet) {
                self.prober.handle_packet(now, Some(&peer), &packet);
            }
        }
        if self.prober.poll_timeout().is_some_and(|at| at <= now) {
            self.prober.handle_timeout(now);
        }
        while let Some(transmit) = self.prober.poll_transmit() {
            match transmit {
                // Every link of the simulation carries any size.
                Transmit::Peer(id, packet) | Transmit::Padded(id, packet, _) => {
                    self.device.send_packet(now, &id, packet);
                }
                Transmit::Socket { .. } | Transmit::Link(_) => self.transmits.push(transmit),
            }
        }
        let Some(news) = self.prober.poll_news(now) else {
            return;
        };
        self.said.push(describe(&news));
        self.count_returns(now, &news);
        if !self.keeps_paths
            && news
                .verdicts
                .peers
                .values()
                .any(|it| matches!(it, PathState::Down(_)))
        {
            let targets = self.prober.targets().clone();
            self.prober.handle_targets(now, Targets::default());
            self.prober.handle_targets(now, targets);
        }
        if self.hears_echoes {
            self.controller.handle_verdicts(now, news.verdicts);
            self.controller.handle_mtus(now, news.mtus);
            self.controller.handle_echo_forwarding(now, news.forwarding);
        }
    }

    /// Notes when each path to another region came up again.
    fn count_returns(&mut self, now: Instant, news: &News) {
        for (peer, state) in &news.verdicts.peers {
            let is_up = *state == PathState::Up;
            let (was_up, returns) = self.returns.entry(peer.clone()).or_default();
            if is_up && !*was_up {
                returns.push(now);
            }
            *was_up = is_up;
        }
    }

    /// The path that came up again more often than the flap damping allows, and how often.
    pub(crate) fn flapping(&self, now: Instant) -> Option<(&PeerId, usize)> {
        self.returns.iter().find_map(|(peer, (_, returns))| {
            let recent = returns.iter().filter(|at| now - **at < MEMORY).count();
            (recent > MOST_RETURNS).then_some((peer, recent))
        })
    }

    fn is_diverted(&self, packet: &[u8]) -> bool {
        let read = datagram(packet);
        read.is_some_and(|it| it.to.port() == PORT && self.diverted.contains(&it.to.ip()))
    }

    /// The agent has to stop. False if it stops at once.
    pub(crate) fn begin_drain(&mut self, now: Instant, is_calm: bool) -> bool {
        if !self.prober.has_other_leader() {
            return false;
        }
        self.prober.handle_drain(now);
        self.drain.get_or_insert(Drain {
            until: now + DRAIN,
            drained: None,
            is_calm,
        });
        true
    }

    /// When to look at the drain again.
    pub(crate) fn drain_at(&self, now: Instant) -> Option<Instant> {
        let drain = self.drain?;
        Some(
            drain
                .drained
                .unwrap_or_else(|| drain.until.min(now + DRAINING)),
        )
    }

    /// Whether the agent stops now, and whether all others know.
    pub(crate) fn poll_drain(&mut self, now: Instant) -> Option<Drain> {
        let drain = self.drain.as_mut()?;
        if drain.drained.is_none() && self.prober.is_drained(now) {
            drain.drained = Some(now + SETTLE);
        }
        let end = drain.drained.unwrap_or(drain.until);
        (now >= end).then_some(*drain)
    }
}

fn describe(news: &News) -> String {
    let mut text = String::new();
    for (peer, state) in &news.verdicts.peers {
        text += &format!("{peer} {state:?}, ");
    }
    for (leader, it) in &news.verdicts.leaders {
        text += &format!("through {leader} {:?}", it.state);
        for segment in &it.unreached {
            text += &format!(" not to {segment}");
        }
        text += ", ";
    }
    text + &format!("forwarding {:?}", news.forwarding)
}

impl Drain {
    pub(crate) fn all_know(&self) -> bool {
        self.drained.is_some()
    }
}

impl World {
    /// Sends a packet of a node's own agent on its first hop in the region.
    pub(crate) fn transmit(&mut self, id: Id, transmit: Transmit) {
        match transmit {
            Transmit::Socket { to, payload } => {
                let number = self.nodes[id].number;
                let own = IpAddr::from([10, 42, number, 0]);
                let echo = Datagram {
                    from: SocketAddr::new(own, SOCKET),
                    to,
                    payload: &payload,
                };
                let echo = packet(&echo).expect("both are IPv4");
                self.send_near(id, Source::Host, to.ip(), echo);
            }
            Transmit::Link(packet) => {
                if let Some(to) = datagram(&packet).map(|it| it.to.ip()) {
                    self.send_near(id, Source::Tunnel, to, packet);
                }
            }
            // The device has sent it.
            Transmit::Peer(..) | Transmit::Padded(..) => {}
        }
    }

    fn send_near(&mut self, id: Id, source: Source, to: IpAddr, packet: Vec<u8>) {
        let steps = self.steps_to(id, source, to);
        let hops: Vec<_> = steps
            .iter()
            .filter_map(|step| match step {
                Step::Flannel(pods) => self.node_of_pods(pods),
                Step::Deliver | Step::Tunnel | Step::Underlay | Step::Refused(_) => None,
            })
            .collect();
        if let Some(next) = self.rng.pick(&hops) {
            let delay = Duration::from_micros(200 + self.rng.next() % 600);
            self.push_near(delay, id, next, packet);
        }
    }

    /// A packet comes to a node by flannel's device.
    pub(crate) fn arrive_near(&mut self, from: Id, id: Id, packet: &[u8]) {
        let loss = self.network.near_loss(from, id);
        if !self.nodes[id].is_on || loss > 0 && self.rng.chance(loss) {
            return;
        }
        let Some(it) = datagram(packet) else { return };
        let steps = self.steps_to(id, Source::Region, it.to.ip());
        let now = self.now;
        let node = &mut self.nodes[id];
        let is_running = node.is_running();
        let Some(agent) = node.agent.as_mut().filter(|_| is_running) else {
            return;
        };
        match steps.first() {
            Some(Step::Deliver) => agent.prober.handle_datagram(now, it.from, it.payload),
            Some(Step::Tunnel) if agent.is_diverted(packet) => {
                agent.prober.handle_packet(now, None, packet);
            }
            Some(Step::Tunnel | Step::Flannel(_) | Step::Underlay | Step::Refused(_)) | None => {
                return;
            }
        }
        self.after(id);
    }
}
