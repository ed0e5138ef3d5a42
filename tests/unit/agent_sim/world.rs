//! The controllers of several agents on one fake cluster, each with a fake kernel, a fake tunnel and a prober.
//!
//! Everything that the controllers ask for is carried out: what they publish is parsed as a Node is, what they want
//! is made in the kernel, a tunnel has a session when both ends send to each other, and echoes go over a fake
//! network.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use selvedge::agent::controller::{Controller, Effect, Setup, ShellFacts, WallClock};
use selvedge::agent::kernel_facts::{FlannelFacts, KernelFacts};
use selvedge::agent::key_rotation::{KeyStep, OwnKeys};
use selvedge::cluster::{ParseSettings, View, node};
use selvedge::config::Config;
use selvedge::diff::{Change, KernelChange};
use selvedge::flannel::{Files, SubnetEnv};
use selvedge::kernel::LocalAddress;
use selvedge::kernel::flannel_repair::{FlannelState, Repair};
use selvedge::reconciler::core::{Applied, Core, Platform};
use selvedge::reconciler::firewall::{Job, Outcome};
use selvedge::state::{RouteKey, Ruleset, State};
use selvedge::status::Report;
use selvedge::topology::{Node, NodeName, Snapshot, Topology};
use selvedge::wireguard::key::PublicKey;
use selvedge::wireguard::{Pair, PeerConfig, PeerId, PeerStats, Stats};
use serde_json::{Value, json};

use crate::echo_net::Net;
use crate::fake_kernel::FakeKernel;
use crate::mesh::{self, Mesh, net};

/// How long a written annotation takes to every agent.
const WATCH: Duration = Duration::from_millis(60);
const TICK: Duration = Duration::from_secs(1);
/// The API server's time when the simulation begins.
const EPOCH: i64 = 1_796_081_284;

/// Name, region, underlay address, number of the pod network.
pub(super) type Place = (&'static str, &'static str, &'static str, u8);

/// A kernel that refuses one route on demand, and counts its calls.
pub(super) struct OneBadRoute {
    pub(super) kernel: FakeKernel,
    pub(super) refused: Option<RouteKey>,
    pub(super) attempts: RefCell<BTreeMap<String, usize>>,
}

impl Platform for OneBadRoute {
    fn observe(&mut self) -> anyhow::Result<State> {
        Ok(State {
            firewall: None,
            ..self.kernel.observe()
        })
    }

    fn apply_all<'a>(&mut self, changes: &'a [Change]) -> Vec<(&'a Change, anyhow::Error)> {
        let mut failed = Vec::new();
        for change in changes {
            *self
                .attempts
                .borrow_mut()
                .entry(change.to_string())
                .or_default() += 1;
            let is_refused = matches!(
                change,
                Change::Kernel(KernelChange::ReplaceRoute { key, .. }) if Some(*key) == self.refused
            );
            let result = if is_refused {
                Err("EINVAL".to_owned())
            } else {
                self.kernel.apply(change)
            };
            if let Err(error) = result {
                failed.push((change, anyhow!(error)));
            }
        }
        failed
    }

    fn repair<'a>(&mut self, _: &'a [Repair]) -> Vec<(&'a Repair, anyhow::Error)> {
        Vec::new()
    }
}

/// How long `nft` takes. Routes wait for it where the table is new.
const NFT: Duration = Duration::from_millis(20);

/// One node: its controller, its reconciler, its kernel.
pub(super) struct Agent {
    pub(super) controller: Controller,
    core: Core,
    /// What `nft` is at, and when it ends.
    nft: Option<(Instant, Job)>,
    pub(super) node: OneBadRoute,
    pub(super) keys: OwnKeys,
    /// The key of its sessions with peers that never answered under another one.
    first_key: PublicKey,
    /// The own key of the session with each peer, where it is another one.
    sealed_under: BTreeMap<PeerId, PublicKey>,
    address: SocketAddr,
    pub(super) shown: Arc<Topology>,
    /// Whether the controller waits for facts.
    asked: bool,
    /// Whether its machine is off.
    is_dead: bool,
    received: BTreeMap<PublicKey, u64>,
    tried: usize,
}

pub(super) struct World {
    pub(super) now: Instant,
    begun: Instant,
    pub(super) objects: BTreeMap<String, Value>,
    /// When the agents see what was written last.
    seen_at: Option<Instant>,
    pub(super) api_is_up: bool,
    pub(super) agents: BTreeMap<&'static str, Agent>,
    next_tick: Instant,
    places: Vec<Place>,
    pub(super) net: Net,
}

impl World {
    pub(super) fn new(places: &[Place], flags: &[&str]) -> Self {
        #[expect(clippy::disallowed_methods, reason = "an Instant has no other origin")]
        let now = Instant::now();
        let objects = places.iter().map(|&(name, region, address, number)| {
            let object = json!({
                "metadata": {
                    "name": name,
                    "creationTimestamp": "2026-01-01T00:00:00Z",
                    "labels": {"topology.kubernetes.io/region": region},
                    "annotations": {
                        "flannel.alpha.coreos.com/backend-data":
                            format!("{{\"VNI\":1,\"VtepMAC\":\"02:00:00:00:00:0{number}\"}}"),
                        "flannel.alpha.coreos.com/backend-type": "vxlan",
                        "flannel.alpha.coreos.com/kube-subnet-manager": "true",
                        "flannel.alpha.coreos.com/public-ip": address,
                    },
                },
                "spec": {"podCIDRs": [format!("10.42.{number}.0/24")]},
                "status": {
                    "addresses": [{"type": "InternalIP", "address": address}],
                    "conditions": [{"type": "Ready", "status": "True"}],
                },
            });
            (name.to_owned(), object)
        });
        let mut world = Self {
            now,
            begun: now,
            objects: objects.collect(),
            seen_at: Some(now),
            api_is_up: true,
            agents: BTreeMap::new(),
            next_tick: now,
            places: places.to_vec(),
            net: Net::new(now, 1),
        };
        let fixtures = world.mesh();
        for &(name, _, address, number) in places {
            world.net.add(name, [10, 42, number, 0].into());
            let hostname = format!("--hostname={name}");
            let always = [
                hostname.as_str(),
                "--encapsulate=crosssubnet",
                "--service-cidr=10.43.0.0/16",
                "--region-cidr=a=192.168.50.0/24,b=192.168.60.0/24",
            ];
            let config = Config::from_args(always.into_iter().chain(flags.iter().copied()));
            let config = config.expect("these flags are good");
            let key = mesh::key(number);
            let setup = Setup {
                config: Arc::new(config),
                keys: OwnKeys::of(key),
                key_files: Vec::new(),
                resolved: Arc::default(),
            };
            let agent = Agent {
                controller: Controller::new(setup, now),
                core: Core::default(),
                nft: None,
                node: OneBadRoute {
                    kernel: FakeKernel::before_the_agent(&fixtures, &NodeName(name.into())),
                    refused: None,
                    attempts: RefCell::default(),
                },
                keys: OwnKeys::of(key),
                first_key: key,
                sealed_under: BTreeMap::new(),
                address: SocketAddr::new(address.parse().unwrap(), 51820),
                shown: Arc::default(),
                asked: false,
                is_dead: false,
                received: BTreeMap::new(),
                tried: 0,
            };
            world.agents.insert(name, agent);
        }
        world
    }

    fn place(&self, name: &str) -> Place {
        let mut places = self.places.iter();
        *places.find(|place| place.0 == name).unwrap()
    }

    fn nodes(&self) -> Vec<Node> {
        let parse = |object: &Value| {
            let object = serde_json::from_value(object.clone()).unwrap();
            node::parse(&object, &ParseSettings::default()).0.unwrap()
        };
        self.objects.values().map(parse).collect()
    }

    fn mesh(&self) -> Mesh {
        let mut mesh = Mesh::new(self.nodes());
        mesh.agreed.cluster_networks = vec![net("10.42.0.0/16")];
        mesh
    }

    fn view(&self) -> Arc<View> {
        let nodes = self.nodes().into_iter();
        Arc::new(View {
            snapshot: Arc::new(Snapshot {
                nodes: nodes.map(|node| (node.name.clone(), node)).collect(),
                ..Snapshot::default()
            }),
            live: true,
            ..View::default()
        })
    }

    fn wall(&self) -> WallClock {
        let passed = (self.now - self.begun).as_secs();
        let now = EPOCH + i64::try_from(passed).unwrap();
        WallClock {
            node: now,
            server: Some(now),
        }
    }

    fn kernel_facts(&self, name: &str) -> KernelFacts {
        let (_, _, address, number) = self.place(name);
        let flannel = self.mesh().flannel(&NodeName(name.into()));
        let env = format!(
            "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.{number}.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
        );
        let underlay = net(&format!("{address}/24"));
        KernelFacts {
            addresses: Some(vec![LocalAddress {
                link: "eth0".into(),
                net: underlay,
                offered: true,
            }]),
            connected: Some([underlay.trunc()].into()),
            other_rules: Some(Vec::new()),
            underlay_mtu: Some(Some(1500)),
            flannel: Ok(FlannelFacts {
                files: Files {
                    conf: None,
                    env: Some(SubnetEnv::parse(env.as_bytes()).unwrap()),
                    env_path: "/run/flannel/subnet.env".into(),
                },
                state: FlannelState {
                    vteps: flannel.vteps,
                    next_hops: flannel.next_hops,
                    ..FlannelState::default()
                },
                without_ipv6: false,
            }),
        }
    }

    /// What the tunnel of a node tells: a session with every peer that sends to where this node is.
    fn stats(&mut self, name: &str) -> Stats {
        let own = &self.agents[name];
        let (keys, address) = (own.keys, own.address);
        let is_own = |peer: &PeerConfig| {
            let mut own = std::iter::once(keys.current).chain(keys.others.iter());
            own.any(|key| peer.public_key == key || peer.also_keys.contains(&key))
        };
        let peers = own.node.kernel.observe().peers;
        let peers: Vec<_> = peers
            .into_iter()
            .map(|(id, config)| {
                let peer = config.public_key;
                let has_it = |keys: &OwnKeys| {
                    keys.current == peer || keys.others.iter().any(|other| other == peer)
                };
                let other = self.agents.values().find(|other| has_it(&other.keys));
                let is_mutual = other.is_some_and(|other| {
                    let peers = other.node.kernel.observe().peers;
                    let back = peers.values().find(|peer| is_own(peer));
                    config.endpoint == Some(other.address)
                        && back.and_then(|peer| peer.endpoint) == Some(address)
                });
                (id, config, is_mutual)
            })
            .collect();
        let own = self.agents.get_mut(name).unwrap();
        let stats = peers.into_iter().map(|(id, config, is_mutual)| {
            let public_key = config.public_key;
            let received = own.received.entry(public_key).or_default();
            *received += u64::from(is_mutual) * 148;
            let stats = PeerStats {
                public_key,
                pair: is_mutual.then(|| Pair {
                    own: own.sealed_under.get(&id).copied().unwrap_or(own.first_key),
                    peer: public_key,
                }),
                endpoint: config.endpoint,
                relayed: false,
                rx_bytes: *received,
                tx_bytes: 148,
                last_handshake: is_mutual.then_some(Duration::from_secs(1)),
                heard_unasked: None,
                unanswered: None,
                answer: None,
            };
            (id, stats)
        });
        Stats {
            peers: stats.collect(),
            drops: BTreeMap::new(),
        }
    }

    /// Carries out what a controller asks for.
    fn carry_out(&mut self, name: &'static str) {
        loop {
            let agent = self.agents.get_mut(name).unwrap();
            let Some(effect) = agent.controller.poll_effect() else {
                return;
            };
            match effect {
                Effect::Observe => agent.asked = true,
                Effect::Publish(annotations) => self.publish(name, &annotations),
                Effect::Reconcile(desired) => {
                    agent.core.handle_desired(desired);
                    self.reconcile(name);
                }
                Effect::Show(topology) => agent.shown = topology,
                Effect::FindPeer { .. } => agent.tried += 1,
                Effect::ChangeKeys(step) => self.change_keys(name, step),
                Effect::TryKey { key, peers } => self.try_key(name, key, peers),
                Effect::Probe(targets) => {
                    // Without its own route an echo would take the default route, past the tunnel.
                    let routes = agent.node.kernel.observe().routes;
                    for ip in targets.leaders.values() {
                        let has_route = routes.keys().any(|key| key.dst == ipnet::IpNet::from(*ip));
                        assert!(has_route, "{name} sends echoes to {ip} without a route");
                    }
                    self.net.now = self.now;
                    self.net.set_targets(name, *targets);
                    self.hear(name);
                }
                Effect::Judge(_)
                | Effect::Translate(_)
                | Effect::Report(_)
                | Effect::Save(_)
                | Effect::KeepGuard(_)
                | Effect::Resolve(_) => {}
            }
        }
    }

    /// Makes a step as the disk would. The number of the next key is 100 more.
    fn change_keys(&mut self, name: &str, step: KeyStep) {
        let unix = self.wall().node;
        let now = self.now;
        let agent = self.agents.get_mut(name).unwrap();
        let OwnKeys {
            current,
            others,
            since,
        } = &mut agent.keys;
        match step {
            KeyStep::Make => others.next = Some(mesh::key(current.0[0] + 100)),
            KeyStep::Switch => {
                others.previous = others.next.take();
                std::mem::swap(current, others.previous.as_mut().unwrap());
                *since = unix;
            }
            KeyStep::Retire => others.previous = None,
        }
        agent.controller.handle_keys(now, step, Ok(agent.keys));
    }

    /// The peers that know a key of this node answer under it.
    fn try_key(&mut self, name: &str, key: PublicKey, peers: Vec<PeerId>) {
        let knows = |id: &PeerId| {
            let other = &self.agents[id.as_str().strip_prefix("node/").unwrap()];
            let peers = other.node.kernel.observe().peers;
            let mut peers = peers.values();
            !other.is_dead
                && peers.any(|peer| peer.public_key == key || peer.also_keys.contains(&key))
        };
        let answered: Vec<_> = peers.into_iter().filter(knows).collect();
        let agent = self.agents.get_mut(name).unwrap();
        agent
            .sealed_under
            .extend(answered.into_iter().map(|id| (id, key)));
    }

    /// A node begins to replace its key.
    pub(super) fn rotate_key(&mut self, name: &str) {
        let now = self.now;
        let agent = self.agents.get_mut(name).unwrap();
        agent.controller.handle_key_request(now).unwrap();
    }

    fn publish(&mut self, name: &str, published: &BTreeMap<&'static str, String>) {
        if !self.api_is_up {
            return;
        }
        let object = self.objects.get_mut(name).unwrap();
        let annotations = object["metadata"]["annotations"].as_object_mut().unwrap();
        let before = annotations.clone();
        annotations.retain(|key, _| !selvedge::cluster::annotation::PUBLISHED.contains(&&**key));
        for (key, value) in published {
            annotations.insert((*key).to_owned(), json!(value));
        }
        if *annotations != before {
            self.seen_at.get_or_insert(self.now + WATCH);
        }
    }

    fn reconcile(&mut self, name: &'static str) {
        let now = self.now;
        let agent = self.agents.get_mut(name).unwrap();
        let mut all = Vec::new();
        if let Some((_, job)) = agent.nft.take_if(|(end, _)| *end <= now) {
            let observed = agent.node.kernel.observe().firewall;
            let wanted = job.firewall.as_deref().cloned().map(Box::new);
            let change = wanted
                .filter(|wanted| observed != Some(Ruleset::Planned(wanted.clone())))
                .map(|it| Change::Kernel(KernelChange::ReplaceFirewall(it)));
            if let Some(change) = &change {
                agent.node.kernel.apply(change).unwrap();
            }
            let outcome = Outcome {
                firewall: job.firewall,
                took: Duration::ZERO,
                result: Ok(change),
            };
            all.push(agent.core.handle_firewall(outcome, now));
        }
        if agent.nft.is_none() {
            let job = agent.core.poll_firewall(now);
            agent.nft = job.map(|job| (now + NFT, job));
        }
        all.push(agent.core.pass(&mut agent.node, now));
        for applied in all {
            self.applied(name, applied);
        }
    }

    fn applied(&mut self, name: &str, applied: Applied) {
        let now = self.now;
        let agent = self.agents.get_mut(name).unwrap();
        let is_news = !applied.made.is_empty();
        agent.controller.handle_applied(now, applied);
        if is_news {
            // The kernel reports the agent's own changes too.
            agent.controller.handle_trigger(now);
        }
    }

    pub(super) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        let names = self.places.iter().map(|place| place.0);
        let names: Vec<_> = names.filter(|name| !self.agents[name].is_dead).collect();
        loop {
            for name in &names {
                self.carry_out(name);
            }
            let alive = self.agents.values().filter(|agent| !agent.is_dead);
            let timeouts = alive.flat_map(|agent| {
                let timeout = agent.controller.poll_timeout();
                // Facts come a moment after they were asked for.
                let facts = agent.asked.then(|| self.now + Duration::from_millis(1));
                let nft = agent.nft.as_ref().map(|(end, _)| *end);
                [timeout, agent.core.poll_timeout(), facts, nft]
            });
            let seen_at = self.seen_at.filter(|_| self.api_is_up);
            let echoes = self.net.poll_timeout();
            let next = timeouts.flatten().chain(seen_at).chain(echoes);
            let next = next.chain([self.next_tick]);
            let next = next.min().unwrap();
            if next > end {
                break;
            }
            self.now = self.now.max(next);
            let now = self.now;
            if echoes.is_some_and(|at| at <= now) {
                self.net.handle_timeout(now);
                for name in &names {
                    self.hear(name);
                }
            }
            if seen_at.is_some_and(|at| at <= now) {
                self.seen_at = None;
                let view = self.view();
                for agent in self.agents.values_mut() {
                    agent.controller.handle_view(now, Arc::clone(&view));
                }
            }
            if self.next_tick <= now {
                self.next_tick = now + TICK;
                for name in &names {
                    let stats = self.stats(name);
                    let agent = self.agents.get_mut(name).unwrap();
                    agent.controller.handle_tunnel(now, &stats);
                }
            }
            for &name in &names {
                if std::mem::take(&mut self.agents.get_mut(name).unwrap().asked) {
                    let (stats, facts) = (self.stats(name), self.kernel_facts(name));
                    let wall = self.wall();
                    let agent = self.agents.get_mut(name).unwrap();
                    agent.controller.handle_tunnel(now, &stats);
                    agent.controller.handle_kernel(now, wall, facts);
                }
                let agent = self.agents.get_mut(name).unwrap();
                let nft = agent.nft.as_ref().map(|(end, _)| *end);
                let due = agent.core.poll_timeout().into_iter().chain(nft);
                if due.min().is_some_and(|at| at <= now) {
                    self.reconcile(name);
                }
                let agent = self.agents.get_mut(name).unwrap();
                if agent.controller.poll_timeout().is_some_and(|at| at <= now) {
                    agent.controller.handle_timeout(now);
                }
            }
        }
        self.now = end;
    }

    /// Hands what a prober says to the node's controller.
    fn hear(&mut self, name: &str) {
        let now = self.now;
        let news = std::mem::take(&mut self.net.node(name).news);
        let agent = self.agents.get_mut(name).unwrap();
        for (_, news) in news {
            agent.controller.handle_verdicts(now, news.verdicts);
            agent.controller.handle_mtus(now, news.mtus);
            agent
                .controller
                .handle_echo_forwarding(now, news.forwarding);
        }
    }

    /// Turns a node's machine off.
    pub(super) fn kill(&mut self, name: &str) {
        self.agents.get_mut(name).unwrap().is_dead = true;
        self.net.faults.dead.insert(name.to_owned());
    }

    pub(super) fn report(&self, name: &str) -> Report {
        let shell = ShellFacts {
            paths: self.net.nodes[name].prober.stats(),
            ..ShellFacts::default()
        };
        self.agents[name].controller.report(self.now, &shell)
    }

    pub(super) fn all_are_ready(&self) -> bool {
        self.places.iter().all(|place| self.report(place.0).ready)
    }

    /// The leaders that every agent agrees on.
    pub(super) fn leaders(&self) -> BTreeSet<String> {
        let leaders = |topology: &Topology| -> BTreeSet<_> {
            let segments = topology.segments.iter();
            segments
                .map(|segment| segment.primary().node.to_string())
                .collect()
        };
        let all: Vec<_> = self
            .agents
            .values()
            .map(|agent| leaders(&agent.shown))
            .collect();
        assert!(all.windows(2).all(|two| two[0] == two[1]), "{all:?}");
        all[0].clone()
    }

    pub(super) fn has_route(&self, name: &str, dst: &str) -> bool {
        let state = self.agents[name].node.kernel.observe();
        state.routes.keys().any(|key| key.dst == net(dst))
    }

    /// The agents see what a test wrote.
    pub(super) fn touch(&mut self) {
        self.seen_at.get_or_insert(self.now + WATCH);
    }

    pub(super) fn set_ready(&mut self, name: &str, ready: bool) {
        let status = if ready { "True" } else { "False" };
        let object = self.objects.get_mut(name).unwrap();
        object["status"]["conditions"][0]["status"] = json!(status);
        self.seen_at.get_or_insert(self.now + WATCH);
    }
}
