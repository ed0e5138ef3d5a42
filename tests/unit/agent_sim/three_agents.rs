//! Three agents' controllers on one fake cluster, each with a fake kernel and a fake tunnel.
//!
//! `a1` and `a2` are one region, `b1` is another. Everything that the controllers ask for is carried out:
//! what they publish is parsed as a Node is, what they want is made in the kernel, and a tunnel has a
//! session when both ends send to each other.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use selvedge::agent::controller::{Controller, Effect, Setup, ShellFacts, WallClock};
use selvedge::agent::kernel_facts::{FlannelFacts, KernelFacts};
use selvedge::cluster::{ParseSettings, View, node};
use selvedge::config::Config;
use selvedge::diff::{Change, KernelChange};
use selvedge::flannel::{Files, SubnetEnv};
use selvedge::kernel::LocalAddress;
use selvedge::kernel::flannel_repair::{FlannelState, Repair};
use selvedge::reconciler::core::{Applied, Core, Platform};
use selvedge::reconciler::firewall::Outcome;
use selvedge::state::{RouteKey, Ruleset, State};
use selvedge::status::{Report, Role};
use selvedge::topology::{Node, NodeName, Snapshot, Topology};
use selvedge::wireguard::key::PublicKey;
use selvedge::wireguard::{PeerConfig, PeerStats, Stats};
use serde_json::{Value, json};

use crate::fake_kernel::FakeKernel;
use crate::mesh::{self, Mesh, net};

/// How long a written annotation takes to every agent.
const WATCH: Duration = Duration::from_millis(60);
const TICK: Duration = Duration::from_secs(1);
/// The API server's time when the simulation begins.
const EPOCH: i64 = 1_796_081_284;

/// Name, region, underlay address, number of the pod network.
const NODES: [(&str, &str, &str, u8); 3] = [
    ("a1", "a", "192.168.50.11", 1),
    ("a2", "a", "192.168.50.12", 2),
    ("b1", "b", "192.168.60.11", 3),
];

/// A kernel that refuses one route on demand, and counts its calls.
struct OneBadRoute {
    kernel: FakeKernel,
    refused: Option<RouteKey>,
    attempts: RefCell<BTreeMap<String, usize>>,
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

/// One node: its controller, its reconciler, its kernel.
struct Agent {
    controller: Controller,
    core: Core,
    node: OneBadRoute,
    key: PublicKey,
    address: SocketAddr,
    shown: Arc<Topology>,
    /// Whether the controller waits for facts.
    asked: bool,
    received: BTreeMap<PublicKey, u64>,
    tried: usize,
}

struct World {
    now: Instant,
    begun: Instant,
    objects: BTreeMap<String, Value>,
    /// When the agents see what was written last.
    seen_at: Option<Instant>,
    api_is_up: bool,
    agents: BTreeMap<&'static str, Agent>,
    next_tick: Instant,
}

impl World {
    fn new() -> Self {
        #[expect(clippy::disallowed_methods, reason = "an Instant has no other origin")]
        let now = Instant::now();
        let objects = NODES.map(|(name, region, address, number)| {
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
            objects: objects.into(),
            seen_at: Some(now),
            api_is_up: true,
            agents: BTreeMap::new(),
            next_tick: now,
        };
        let fixtures = world.mesh();
        for (name, _, address, number) in NODES {
            let config = Config::from_args([
                "--leaders-per-region=1",
                format!("--hostname={name}").as_str(),
                "--encapsulate=crosssubnet",
                "--service-cidr=10.43.0.0/16",
                "--region-cidr=a=192.168.50.0/24,b=192.168.60.0/24",
            ])
            .expect("these flags are good");
            let key = mesh::key(number);
            let setup = Setup {
                config: Arc::new(config),
                public_key: key,
                key_files: Vec::new(),
                resolved: Arc::default(),
            };
            let agent = Agent {
                controller: Controller::new(setup, now),
                core: Core::default(),
                node: OneBadRoute {
                    kernel: FakeKernel::before_the_agent(&fixtures, &NodeName(name.into())),
                    refused: None,
                    attempts: RefCell::default(),
                },
                key,
                address: SocketAddr::new(address.parse().unwrap(), 51820),
                shown: Arc::default(),
                asked: false,
                received: BTreeMap::new(),
                tried: 0,
            };
            world.agents.insert(name, agent);
        }
        world
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
        let (_, _, address, number) = NODES.into_iter().find(|node| node.0 == name).unwrap();
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
        let (key, address) = (own.key, own.address);
        let peers = own.node.kernel.observe().peers;
        let peers: Vec<_> = peers
            .into_iter()
            .map(|(id, config)| {
                let peer = config.public_key;
                let other = self.agents.values().find(|other| other.key == peer);
                let is_mutual = other.is_some_and(|other| {
                    let peers = other.node.kernel.observe().peers;
                    let back = peers.values().find(|peer| peer.public_key == key);
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
                endpoint: config.endpoint,
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
                Effect::Judge(_)
                | Effect::Report(_)
                | Effect::Save(_)
                | Effect::KeepGuard(_)
                | Effect::Resolve(_) => {}
            }
        }
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
        if let Some(job) = agent.core.poll_firewall(now) {
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

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        let names = NODES.map(|node| node.0);
        loop {
            for name in names {
                self.carry_out(name);
            }
            let timeouts = self.agents.values().flat_map(|agent| {
                let timeout = agent.controller.poll_timeout();
                // Facts come a moment after they were asked for.
                let facts = agent.asked.then(|| self.now + Duration::from_millis(1));
                [timeout, agent.core.poll_timeout(), facts]
            });
            let seen_at = self.seen_at.filter(|_| self.api_is_up);
            let next = timeouts.flatten().chain(seen_at).chain([self.next_tick]);
            let next = next.min().unwrap();
            if next > end {
                break;
            }
            self.now = self.now.max(next);
            let now = self.now;
            if seen_at.is_some_and(|at| at <= now) {
                self.seen_at = None;
                let view = self.view();
                for agent in self.agents.values_mut() {
                    agent.controller.handle_view(now, Arc::clone(&view));
                }
            }
            if self.next_tick <= now {
                self.next_tick = now + TICK;
                for name in names {
                    let stats = self.stats(name);
                    let agent = self.agents.get_mut(name).unwrap();
                    agent.controller.handle_tunnel(now, &stats);
                }
            }
            for name in names {
                if std::mem::take(&mut self.agents.get_mut(name).unwrap().asked) {
                    let (stats, facts) = (self.stats(name), self.kernel_facts(name));
                    let wall = self.wall();
                    let agent = self.agents.get_mut(name).unwrap();
                    agent.controller.handle_tunnel(now, &stats);
                    agent.controller.handle_kernel(now, wall, facts);
                }
                let agent = self.agents.get_mut(name).unwrap();
                if agent.core.poll_timeout().is_some_and(|at| at <= now) {
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

    fn report(&self, name: &str) -> Report {
        let shell = ShellFacts::default();
        self.agents[name].controller.report(self.now, &shell)
    }

    fn all_are_ready(&self) -> bool {
        NODES.iter().all(|node| self.report(node.0).ready)
    }

    /// The leaders that every agent agrees on.
    fn leaders(&self) -> BTreeSet<String> {
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

    fn has_route(&self, name: &str, dst: &str) -> bool {
        let state = self.agents[name].node.kernel.observe();
        state.routes.keys().any(|key| key.dst == net(dst))
    }

    fn set_ready(&mut self, name: &str, ready: bool) {
        let status = if ready { "True" } else { "False" };
        let object = self.objects.get_mut(name).unwrap();
        object["status"]["conditions"][0]["status"] = json!(status);
        self.seen_at.get_or_insert(self.now + WATCH);
    }
}

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

#[test]
fn three_agents_come_to_one_mesh_and_rest() {
    let mut world = World::new();
    world.run(seconds(8));

    let reports: Vec<_> = NODES
        .iter()
        .map(|node| world.report(node.0).problems)
        .collect();
    assert!(world.all_are_ready(), "{reports:?}");
    assert_eq!(world.leaders(), ["a1".to_owned(), "b1".to_owned()].into());
    assert_eq!(world.report("a1").role, Role::Leader);
    assert_eq!(world.report("a2").role, Role::Follower);
    for (name, remote) in [
        ("a1", "10.42.3.0/24"),
        ("a2", "10.42.3.0/24"),
        ("b1", "10.42.2.0/24"),
    ] {
        assert!(
            world.has_route(name, remote),
            "{name} has no route to {remote}"
        );
    }

    // At rest nothing is written and nothing is changed.
    let (objects, attempts) = (
        world.objects.clone(),
        world.agents["a1"].node.attempts.borrow().clone(),
    );
    world.run(seconds(20));
    assert_eq!(*world.agents["a1"].node.attempts.borrow(), attempts);
    // But for the lead, which is recorded after half a minute.
    world.run(seconds(40));
    assert_ne!(world.objects["a1"], objects["a1"]);
    assert_eq!(world.objects["a2"], objects["a2"]);
}

#[test]
fn another_leader_is_followed_by_all_within_a_second() {
    let mut world = World::new();
    world.run(seconds(60));
    assert!(world.leaders().contains("a1"));

    world.set_ready("a1", false);
    world.run(seconds(1));

    assert_eq!(world.leaders(), ["a2".to_owned(), "b1".to_owned()].into());
    let peers = |world: &World| world.agents["b1"].node.kernel.observe().peers;
    let keys = |peers: &mut dyn Iterator<Item = &PeerConfig>| {
        peers.map(|peer| peer.public_key).collect::<Vec<_>>()
    };
    let peers_now = peers(&world);
    let mut with_routes = peers_now.values().filter(|peer| !peer.routes.is_empty());
    assert_eq!(keys(&mut with_routes), [mesh::key(2)]);
    assert_eq!(
        peers_now.len(),
        2,
        "what the former leader still sends is accepted"
    );
    world.run(seconds(5));
    assert_eq!(keys(&mut peers(&world).values()), [mesh::key(2)]);
    assert_eq!(world.report("b1").role, Role::Leader);
    assert!(
        world.report("b1").ready,
        "{:?}",
        world.report("b1").problems
    );
}

#[test]
fn an_outage_of_the_api_holds_up_no_repair_and_changes_nothing() {
    let mut world = World::new();
    world.run(seconds(10));
    let before = world.agents["b1"].node.kernel.observe();

    world.api_is_up = false;
    world.run(seconds(120));
    assert_eq!(world.agents["b1"].node.kernel.observe(), before);

    let now = world.now;
    let b1 = world.agents.get_mut("b1").unwrap();
    let route = *before.routes.keys().next().unwrap();
    b1.node
        .kernel
        .apply(&Change::Kernel(KernelChange::DeleteRoute(route)))
        .unwrap();
    b1.controller.handle_trigger(now);
    world.run(Duration::from_millis(100));
    assert_eq!(world.agents["b1"].node.kernel.observe(), before);

    world.api_is_up = true;
    world.set_ready("a1", false);
    world.run(seconds(2));
    assert!(world.leaders().contains("a2"));
}

#[test]
fn a_change_that_fails_is_tried_again_alone() {
    let mut world = World::new();
    world.run(seconds(10));
    let b1 = world.agents.get_mut("b1").unwrap();
    let routes = b1.node.kernel.observe().routes;
    let bad = *routes
        .keys()
        .find(|key| key.dst == net("10.42.1.0/24"))
        .unwrap();
    let good = *routes
        .keys()
        .find(|key| key.dst == net("10.42.2.0/24"))
        .unwrap();
    for key in [bad, good] {
        b1.node
            .kernel
            .apply(&Change::Kernel(KernelChange::DeleteRoute(key)))
            .unwrap();
    }
    b1.node.refused = Some(bad);
    b1.node.attempts.borrow_mut().clear();
    let now = world.now;
    world
        .agents
        .get_mut("b1")
        .unwrap()
        .controller
        .handle_trigger(now);

    world.run(seconds(20));

    let b1 = &world.agents["b1"];
    let state = b1.node.kernel.observe();
    assert!(state.routes.contains_key(&good) && !state.routes.contains_key(&bad));
    let attempts = b1.node.attempts.borrow().clone();
    let of_good = attempts
        .iter()
        .filter(|(change, _)| change.contains("10.42.2.0/24"));
    assert_eq!(of_good.map(|(_, count)| *count).collect::<Vec<_>>(), [1]);
    let of_bad: Vec<_> = attempts.values().filter(|count| **count > 1).collect();
    // 0.1, 0.2, 0.4, 0.8, 1.6, 3.2 and then every 5 seconds.
    assert_eq!(of_bad.len(), 1, "{attempts:?}");
    assert!((7..=12).contains(of_bad[0]), "{attempts:?}");
    let report = world.report("b1");
    assert!(
        report
            .problems
            .iter()
            .any(|problem| problem.contains("10.42.1.0/24"))
    );

    world.agents.get_mut("b1").unwrap().node.refused = None;
    world.run(seconds(6));
    assert!(
        world.agents["b1"]
            .node
            .kernel
            .observe()
            .routes
            .contains_key(&bad)
    );
    assert!(
        world.report("b1").ready,
        "{:?}",
        world.report("b1").problems
    );
}
