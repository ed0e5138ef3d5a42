//! Kilo's interface end to end, on a real flannel and a real kube-apiserver: VPN clients behind NAT,
//! regions behind NAT that find each other, and every granularity.
//!
//! Each group of steps has a cluster of its own; its steps run in order.
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test may run programs and wait, and fails by panicking"
)]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use selvedge_lab::claims::{self, By};
use selvedge_lab::controlplane::program;
use selvedge_lab::lab::{Access, Mesh, Options, Proxy, SCENARIO_FLAGS};
use selvedge_lab::netns::unique_prefix;
use selvedge_lab::topology::{MASTER, MASTER_PUBLIC, Master, Shape, Third, public_address};
use selvedge_lab::traffic::{PORT, Servers, Stream, transfer, who};
use selvedge_lab::{Lab, Namespace, Node, Process, Steps, scratch, wait_for};
use serde_json::{Value, json};

#[path = "kilo_mesh/bad_peers.rs"]
mod bad_peers;

const SELVEDGE: &str = env!("CARGO_BIN_EXE_selvedge");
const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/selvedge-k3s.yaml");
const PEERS: &str = "/apis/kilo.squat.ai/v1alpha1/peers";

const LEADER: &str = "node-agent-01";
const FOLLOWER: &str = "node-agent-02";
const THIRD_LEADER: &str = "node-third-01";

/// How long the mesh may take to follow a change in a loaded machine.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    let mut steps = Steps::from_args("kilo_mesh");
    vpn_clients(&mut steps);
    for granularity in ["full", "cross"] {
        granularities(&mut steps, granularity);
    }
    mixed(&mut steps);
    six_clouds(&mut steps);
    steps.finish()
}

fn mesh<'a>(flags: &'a [&'a str], annotate: bool) -> Mesh<'a> {
    Mesh {
        binary: Path::new(SELVEDGE),
        manifest: Path::new(MANIFEST),
        access: Access::Kubeconfig,
        flags,
        annotate,
    }
}

fn flags<'a>(more: &[&'a str]) -> Vec<&'a str> {
    SCENARIO_FLAGS.iter().chain(more).copied().collect()
}

fn up(shape: Shape, proxy: Proxy) -> anyhow::Result<Lab> {
    let options = Options {
        shape,
        proxy,
        ..Options::default()
    };
    Lab::up(&unique_prefix(), scratch("kilo-mesh")?, options, &|_| {})
}

/// A home with a router that translates addresses, and two computers.
struct Home {
    laptop: Node,
    desktop: Node,
    _router: Namespace,
}

impl Home {
    fn new(lab: &Lab) -> anyhow::Result<Self> {
        let prefix = lab.network().prefix();
        let router = Namespace::named(format!("{prefix}-home"))?;
        let internet = lab.network().internet();
        internet.veth("home", &router, "wan")?;
        internet.run("ip link set home master br0")?;
        router.sh("ip address add 203.0.113.40/24 dev wan
             ip route add default via 203.0.113.1
             ip link add br0 type bridge forward_delay 0
             ip link set br0 up
             ip address add 192.168.178.1/24 dev br0
             iptables -P FORWARD DROP
             iptables -A FORWARD -i br0 -j ACCEPT
             iptables -A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
             iptables -t nat -A POSTROUTING -o wan -j MASQUERADE")?;
        let _ = router.sysctl("bridge/bridge-nf-call-iptables", "0");
        router.sysctl("ipv4/ip_forward", "1")?;
        let computer = |name: &str, last: u8| {
            let namespace = Namespace::named(format!("{prefix}-{name}"))?;
            let address = Ipv4Addr::new(192, 168, 178, last);
            router.veth(name, &namespace, "eth0")?;
            router.run(&format!("ip link set {name} master br0"))?;
            namespace.sh(&format!(
                "ip address add {address}/24 dev eth0
                 ip route add default via 192.168.178.1"
            ))?;
            for link in ["all", "default", "eth0"] {
                namespace.sysctl(&format!("ipv4/conf/{link}/rp_filter"), "1")?;
            }
            Node::new(name, address, namespace, lab.directory().join(name))
        };
        Ok(Self {
            laptop: computer("laptop", 21)?,
            desktop: computer("desktop", 22)?,
            _router: router,
        })
    }
}

/// Whatever of the cluster a client does not reach, asked all at once.
fn unreached(lab: &Lab, client: &Node, services: bool) -> Vec<String> {
    let from = client.namespace().path();
    let mut targets = Vec::new();
    for place in lab.places() {
        targets.push((place.name.clone(), place.address));
        if services {
            targets.push((
                format!("the service of {}", place.name),
                lab.service(&place),
            ));
        }
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = targets
            .iter()
            .map(|(name, address)| {
                let ask = || who(&from, SocketAddr::from((*address, PORT)));
                (name, scope.spawn(ask))
            })
            .collect();
        let answers = threads.into_iter().filter_map(|(name, thread)| {
            let error = thread.join().unwrap().err()?;
            Some(format!("{name}: {error:#}"))
        });
        answers.collect()
    })
}

fn selvedge(client: &Node, lab: &Lab, arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = Command::new(SELVEDGE);
    command
        .args(arguments)
        .env("KUBECONFIG", lab.admin_kubeconfig());
    let output = client.output(command)?;
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{arguments:?}: {complaint}");
    Ok(String::from_utf8(output.stdout)?)
}

fn connect(client: &Node, lab: &Lab) -> anyhow::Result<Process> {
    let mut command = Command::new(SELVEDGE);
    command
        .args([
            "connect",
            "laptop",
            "--allowed-ip=10.10.10.10/32",
            "--allowed-ips=10.43.0.0/16",
        ])
        .arg("--resync-period=2s")
        .env("KUBECONFIG", lab.admin_kubeconfig());
    client.spawn("connect", command)
}

fn create_peer(lab: &Lab, name: &str, spec: &Value) -> anyhow::Result<()> {
    lab.api().create(
        PEERS,
        &json!({
            "apiVersion": "kilo.squat.ai/v1alpha1", "kind": "Peer",
            "metadata": {"name": name}, "spec": spec,
        }),
    )?;
    Ok(())
}

/// Links, addresses, rules, routes and sockets of a machine.
fn dump(machine: &Node) -> anyhow::Result<String> {
    let lines = [
        "ip -br link",
        "ip -br address",
        "ip rule",
        "ip route show table all",
        "ls /run/wireguard",
    ];
    let outputs: anyhow::Result<Vec<_>> = lines
        .iter()
        .map(|line| Ok(machine.run(line).unwrap_or_default()))
        .collect();
    // The kernel takes its time with link-local addresses.
    let text = outputs?.join("\n");
    let lines = text.lines().filter(|line| !line.contains("fe80::"));
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// Two regions behind NAT, a public master, and VPN clients behind a NAT of their own.
fn vpn_clients(steps: &mut Steps) -> Option<()> {
    let shape = Shape {
        agents: 2,
        third: Third::Distinct,
        ..Shape::default()
    };
    let mut lab = steps.required("a_cluster_of_three_regions_comes_up", || {
        up(shape, Proxy::Iptables)
    })?;
    let _servers = Servers::start(&lab.places()).ok()?;
    let flags = flags(&["--service-cidr=10.43.0.0/16"]);
    steps.required("its_agents_become_ready", || {
        lab.join(&mesh(&flags, true))?;
        Ok(String::new())
    })?;

    steps.step("everybody_reaches_everybody", || settled(&lab));
    steps.step("two_regions_behind_nat_find_each_other", || {
        found_each_other(&lab)
    });
    steps.step("what_they_say_to_each_other_passes_nobody_else", || {
        goes_directly(&lab)
    });

    // Hosts that drop what they forward let flannel's networks pass, and a client has another. Their
    // operators must let it pass too.
    for name in lab.node_names() {
        let node = lab.node(&name).unwrap();
        node.run("iptables -P FORWARD ACCEPT").unwrap();
    }
    let home = Home::new(&lab).unwrap();
    let before = dump(&home.laptop).unwrap();
    steps.step("without_a_tunnel_a_client_reaches_nothing", || {
        let pod = lab.pod(LEADER)?.address();
        let from = home.laptop.namespace().path();
        ensure!(who(&from, SocketAddr::from((pod, PORT))).is_err());
        Ok(String::new())
    });
    let process = connect(&home.laptop, &lab).unwrap();
    steps.step(
        "a_connected_laptop_reaches_pods_nodes_and_services_of_all_regions",
        || reaches_everything(&lab, &home.laptop, true),
    );
    steps.step("pods_see_the_laptops_own_address", || {
        sees(&lab, &home.laptop, [10, 10, 10, 10])
    });
    steps.step("megabytes_reach_the_laptop_intact", || {
        for node in [MASTER, LEADER, FOLLOWER, THIRD_LEADER] {
            let server = SocketAddr::from((lab.pod(node)?.address(), PORT));
            transfer(&home.laptop.namespace().path(), server, 3_000_000).context(node)?;
        }
        Ok(String::new())
    });
    steps.step("the_cluster_reaches_the_laptop", || {
        let laptop = selvedge_lab::traffic::Place {
            name: "laptop".into(),
            node: "laptop".into(),
            pod: false,
            address: [10, 10, 10, 10].into(),
            namespace: home.laptop.namespace().path(),
        };
        let _server = Servers::start(std::slice::from_ref(&laptop))?;
        for place in lab.places() {
            who(&place.namespace, SocketAddr::from((laptop.address, PORT))).context(place.name)?;
        }
        Ok(String::new())
    });
    let wireguard = steps.required("plain_wireguard_takes_what_showconf_prints", || {
        plain_wireguard(&home.desktop, &lab).map(Plain)
    });
    steps.step("a_plain_wireguard_desktop_reaches_the_same", || {
        reaches_everything(&lab, &home.desktop, false)
    });
    steps.step("a_laptop_that_changes_its_port_is_followed", || {
        roams(&lab, &home.laptop)
    });
    steps.step("peers_that_come_change_and_go_disturb_nobody", || {
        peers_disturb_nobody(&lab)
    });
    steps.step(
        "of_two_equal_claims_the_older_keeps_and_the_other_is_told",
        || duplicate_claim(&lab),
    );
    steps.step(
        "bad_peers_are_left_out_with_an_event_and_a_condition_and_disturb_nobody",
        || bad_peers::left_out_and_told(&lab),
    );
    steps.step(
        "a_location_without_a_route_back_is_masqueraded_for_clients",
        || allowed_location(&lab, &home.laptop),
    );
    drop(wireguard);
    steps.step(
        "disconnecting_leaves_neither_link_nor_route_nor_peer",
        || {
            let status = process.stop()?;
            ensure!(status.code() == Some(0), "{status}");
            let after = dump(&home.laptop)?;
            ensure!(after == before, "before:\n{before}\nafter:\n{after}");
            ensure!(
                lab.api().get(&format!("{PEERS}/laptop")).is_err(),
                "the Peer is still there"
            );
            Ok(String::new())
        },
    );
    steps.step(
        "a_leader_whose_nat_forgot_it_is_followed_within_one_keepalive",
        || follows_a_new_mapping(&lab),
    );
    Some(())
}

/// The endpoint of each leader behind NAT, as the other one has it.
fn found_each_other(lab: &Lab) -> anyhow::Result<String> {
    let mut seen = String::new();
    wait_for("a direct session", PATIENCE, || {
        let peers = claims::wg_show(lab, LEADER).unwrap_or_default();
        let third = peers
            .iter()
            .find(|peer| peer.endpoint.starts_with("203.0.113.30:"));
        seen = format!("{peers:?}");
        third.is_some_and(|peer| peer.handshake > 0)
    })
    .with_context(|| seen.clone())?;
    Ok(String::new())
}

/// While the two regions behind NAT talk, the master's tunnel carries next to nothing.
fn goes_directly(lab: &Lab) -> anyhow::Result<String> {
    let bytes = || -> anyhow::Result<u64> {
        let text = lab.node(MASTER)?.run("wg show kilo0 transfer")?;
        let numbers = text
            .split_whitespace()
            .filter_map(|word| word.parse::<u64>().ok());
        Ok(numbers.sum())
    };
    let before = bytes()?;
    let server = SocketAddr::from((lab.pod(THIRD_LEADER)?.address(), PORT));
    transfer(&lab.pod(FOLLOWER)?.namespace().path(), server, 2_000_000)?;
    let carried = bytes()? - before;
    ensure!(carried < 200_000, "{carried} bytes went through the master");
    Ok(format!("2 MB each way, {carried} bytes through the master"))
}

/// The router restarts: what it lets out comes from other ports than before, and what comes in for the
/// old ones is dropped.
fn follows_a_new_mapping(lab: &Lab) -> anyhow::Result<String> {
    let endpoint = || {
        let peers = claims::wg_show(lab, MASTER).unwrap_or_default();
        let mut endpoints = peers.into_iter().map(|peer| peer.endpoint);
        endpoints.find(|endpoint| endpoint.starts_with("203.0.113.20:"))
    };
    let before = endpoint().context("the leader behind NAT")?;
    // A link that goes down takes the mappings of its MASQUERADE rules with it.
    lab.network().router("nat1")?.sh(
        "iptables -t nat -I POSTROUTING -o wan -p udp -j MASQUERADE --to-ports 40000-40999
         ip link set wan down
         ip link set wan up
         ip route replace default via 203.0.113.1",
    )?;
    // Of the 25 seconds between two keepalives some are over.
    let waited = wait_for("the new mapping", Duration::from_secs(60), || {
        endpoint().is_some_and(|now| now != before && now.starts_with("203.0.113.20:40"))
    })?;
    // The leader behind the other NAT hears nothing more, and looks for it where the master sees it when
    // two keepalives have not come, and five seconds more.
    let patience = Duration::from_secs(90);
    let pairs = claims::everybody_comes_to_reach_everybody(lab, By::OwnAddress, patience)?;
    let seconds = waited.as_secs_f64();
    Ok(format!("{before} moved after {seconds:.0} s; {pairs}"))
}

fn reaches_everything(lab: &Lab, client: &Node, services: bool) -> anyhow::Result<String> {
    let mut failures = Vec::new();
    let outcome = wait_for("the client's tunnel", PATIENCE, || {
        failures = unreached(lab, client, services);
        failures.is_empty()
    });
    outcome.with_context(|| failures.join("\n"))?;
    let targets = lab.places().len() * if services { 2 } else { 1 };
    Ok(format!("{targets} targets"))
}

fn sees(lab: &Lab, client: &Node, expected: [u8; 4]) -> anyhow::Result<String> {
    for place in lab.places().iter().filter(|place| place.pod) {
        let server = SocketAddr::from((place.address, PORT));
        let seen = who(&client.namespace().path(), server)?;
        ensure!(
            seen == Ipv4Addr::from(expected),
            "{} sees {seen}",
            place.name
        );
    }
    Ok(String::new())
}

/// wireguard-go on a machine; ended when the value is dropped.
struct Plain(#[expect(dead_code, reason = "held for its end")] Process);

impl selvedge_lab::steps::Outcome for Plain {
    fn detail(&self) -> String {
        String::new()
    }
}

/// Registers a Peer and sets wireguard-go up with `showconf peer`, as Kilo's guide tells.
fn plain_wireguard(client: &Node, lab: &Lab) -> anyhow::Result<Process> {
    let key = client.run("wg genkey")?;
    std::fs::write(client.outside("/run/key"), key.trim())?;
    let mut command = Command::new("sh");
    command.args(["-c", "wg pubkey < /run/key"]);
    let public_key = String::from_utf8(client.output(command)?.stdout)?;
    create_peer(
        lab,
        "desktop",
        &json!({
            "allowedIPs": ["10.10.10.11/32"], "publicKey": public_key.trim(),
            "persistentKeepalive": 10,
            "presharedKey": "PSKwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=",
        }),
    )?;
    let mut command = Command::new(program("wireguard-go")?);
    command.args(["--foreground", "wg0"]);
    let process = client.spawn("wireguard-go", command)?;
    wait_for("wireguard-go", PATIENCE, || client.tunnel_answers("wg0"))?;

    // Where a leader behind NAT is seen may change until the mesh has settled.
    let configuration = selvedge(client, lab, &["showconf", "peer", "desktop"])?;
    std::fs::write(client.outside("/run/wg0.conf"), &configuration)?;
    client.run("wg setconf wg0 /run/wg0.conf")?;
    client.run("wg set wg0 private-key /run/key")?;
    client.run("ip address add 10.10.10.11/32 dev wg0")?;
    client.run("ip link set wg0 up")?;
    // The endpoint of a public node is one of its allowed IPs: it keeps to the network's own route.
    let endpoints: Vec<_> = configuration
        .lines()
        .filter_map(|line| line.strip_prefix("Endpoint = ")?.rsplit_once(':'))
        .map(|(address, _)| format!("{address}/32"))
        .collect();
    let allowed = configuration
        .lines()
        .filter_map(|line| line.strip_prefix("AllowedIPs = "));
    for net in allowed.flat_map(|list| list.split(", ")) {
        if !endpoints.iter().any(|endpoint| endpoint == net) {
            client.run(&format!("ip route add {net} dev wg0"))?;
        }
    }
    Ok(process)
}

/// A client's packets come from another port of its router from one moment to the next.
fn roams(lab: &Lab, laptop: &Node) -> anyhow::Result<String> {
    let server = SocketAddr::from((lab.pod(MASTER)?.address(), PORT));
    let stream = Stream::start(&laptop.namespace().path(), server)?;
    sleep(Duration::from_millis(500));
    let port = laptop.run("wg show kilo0 listen-port")?;
    let other = port.trim().parse::<u16>()?.wrapping_add(1).max(1024);
    laptop.run(&format!("wg set kilo0 listen-port {other}"))?;
    sleep(Duration::from_millis(1500));
    // The public leader hears it where it is now.
    let report = stream.stop()?;
    ensure!(report.silence < Duration::from_secs(2), "{report}");
    // Those behind NAT learn from it, once they have missed two keepalives of ten seconds.
    let mut failures = Vec::new();
    let waited = wait_for("the leaders behind NAT", Duration::from_secs(60), || {
        failures = unreached(lab, laptop, false);
        failures.is_empty()
    });
    let waited = waited.with_context(|| failures.join("\n"))?;
    Ok(format!(
        "{report}; behind NAT after {:.0} s",
        waited.as_secs_f64()
    ))
}

/// Peers without an endpoint, with a name that resolves nowhere, changed and deleted, while pods talk.
fn peers_disturb_nobody(lab: &Lab) -> anyhow::Result<String> {
    let server = SocketAddr::from((lab.pod(FOLLOWER)?.address(), PORT));
    let stream = Stream::start(&lab.pod(MASTER)?.namespace().path(), server)?;
    // Its key sorts before every other.
    let first = "ABCwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=";
    create_peer(
        lab,
        "roaming",
        &json!({"allowedIPs": ["10.10.11.1/32"], "publicKey": first}),
    )?;
    create_peer(
        lab,
        "nowhere",
        &json!({
            "allowedIPs": ["10.10.11.2/32"],
            "publicKey": "oGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=",
            "endpoint": {"dnsOrIP": {"dns": "nowhere.invalid"}, "port": 51820},
        }),
    )?;
    on_the_master(lab, &["10.10.11.1/32", "10.10.11.2/32"])?;
    // A change behind the peer without an endpoint arrives all the same.
    let change = json!({"spec": {"allowedIPs": ["10.10.11.3/32"]}});
    lab.api().merge(&format!("{PEERS}/nowhere"), &change)?;
    on_the_master(lab, &["10.10.11.1/32", "10.10.11.3/32"])?;
    for name in ["roaming", "nowhere"] {
        lab.api().delete(&format!("{PEERS}/{name}"))?;
    }
    wait_for("the peers' end", PATIENCE, || {
        let peers = claims::wg_show(lab, MASTER).unwrap_or_default();
        peers
            .iter()
            .all(|peer| peer.allowed.iter().all(|net| !net.starts_with("10.10.11.")))
    })?;
    let report = stream.stop()?;
    ensure!(report.lost() == 0, "{report}");
    Ok(report.to_string())
}

fn on_the_master(lab: &Lab, nets: &[&str]) -> anyhow::Result<()> {
    let mut seen = Vec::new();
    wait_for("the peers on the master", PATIENCE, || {
        seen = claims::wg_show(lab, MASTER).unwrap_or_default();
        nets.iter()
            .all(|net| seen.iter().any(|peer| peer.allowed.contains(*net)))
    })
    .with_context(|| format!("{nets:?} in {seen:?}"))?;
    Ok(())
}

fn duplicate_claim(lab: &Lab) -> anyhow::Result<String> {
    let spec = |key: &str| json!({"allowedIPs": ["10.10.12.1/32"], "publicKey": key});
    create_peer(
        lab,
        "z-older",
        &spec("oGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA="),
    )?;
    // Ages are told in whole seconds.
    sleep(Duration::from_millis(1100));
    create_peer(
        lab,
        "a-newer",
        &spec("zGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA="),
    )?;
    on_the_master(lab, &["10.10.12.1/32"])?;
    let told = wait_for("an Event about the newer one", PATIENCE, || {
        lab.kubectl(&["get", "events", "--all-namespaces"])
            .is_ok_and(|events| events.contains("a-newer"))
    });
    told.with_context(|| lab.tail(MASTER, "agent"))?;
    let condition = |name: &str| -> anyhow::Result<(String, String)> {
        let peer = lab.api().get(&format!("{PEERS}/{name}"))?;
        let condition = &peer["status"]["conditions"][0];
        let field = |name: &str| condition[name].as_str().unwrap_or_default().to_owned();
        Ok((field("status"), field("message")))
    };
    let told = wait_for("the conditions", PATIENCE, || {
        let (newer, older) = (condition("a-newer"), condition("z-older"));
        newer.is_ok_and(|(status, message)| status == "False" && message.contains("z-older"))
            && older.is_ok_and(|(status, _)| status == "True")
    });
    told.with_context(|| format!("{:?} {:?}", condition("a-newer"), condition("z-older")))?;
    let dump = lab.node(MASTER)?.run("wg show kilo0 allowed-ips")?;
    let owner = dump.lines().find(|line| line.contains("10.10.12.1/32"));
    ensure!(
        owner.is_some_and(|line| line.starts_with("oGFwdG9w")),
        "{dump}"
    );
    for name in ["z-older", "a-newer"] {
        lab.api().delete(&format!("{PEERS}/{name}"))?;
    }
    Ok(String::new())
}

/// A machine beside a follower that knows no way back to VPN clients is reached all the same.
fn allowed_location(lab: &Lab, laptop: &Node) -> anyhow::Result<String> {
    let router = lab.network().router("nat1")?;
    let printer = Namespace::named(format!("{}-printer", lab.network().prefix()))?;
    router.veth("printer", &printer, "eth0")?;
    router.run("ip link set printer master br0")?;
    // In the data centre's subnet, without a default route: it answers neighbours only.
    printer.run("ip address add 192.168.50.99/24 dev eth0")?;
    let place = selvedge_lab::traffic::Place {
        name: "printer".into(),
        node: "printer".into(),
        pod: false,
        address: [192, 168, 50, 99].into(),
        namespace: printer.path(),
    };
    let _server = Servers::start(std::slice::from_ref(&place))?;
    let annotation = (
        "kilo.squat.ai/allowed-location-ips",
        Some("192.168.50.99/32"),
    );
    lab.api().annotate(LEADER, &[annotation])?;
    let target = SocketAddr::from((place.address, PORT));
    let from_laptop = laptop.namespace().path();
    let mut seen = Err(anyhow::anyhow!("nobody asked"));
    wait_for("the printer", PATIENCE, || {
        seen = who(&from_laptop, target);
        seen.is_ok()
    })
    .with_context(|| format!("{seen:?}"))?;
    // A neighbour's address: the leader's own.
    ensure!(seen? == Ipv4Addr::new(192, 168, 50, 11));
    who(&lab.pod(MASTER)?.namespace().path(), target).context("from a pod elsewhere")?;
    lab.api()
        .annotate(LEADER, &[("kilo.squat.ai/allowed-location-ips", None)])?;
    Ok(String::new())
}

/// Tunnels of every node, with `full` to all others, with `cross` to other regions.
fn granularities(steps: &mut Steps, granularity: &str) -> Option<()> {
    let shape = Shape {
        agents: 2,
        third: Third::Distinct,
        ..Shape::default()
    };
    let name = format!("a_{granularity}_mesh_comes_up");
    let flag = format!("--mesh-granularity={granularity}");
    let flags = flags(&[&flag]);
    let mut lab = steps.required(&name, || up(shape, Proxy::None))?;
    let _servers = Servers::start(&lab.places()).ok()?;
    steps.required(
        &format!("the_agents_of_the_{granularity}_mesh_become_ready"),
        || {
            lab.join(&mesh(&flags, false))?;
            Ok(String::new())
        },
    )?;
    steps.step(
        &format!("in_a_{granularity}_mesh_everybody_reaches_everybody"),
        || settled(&lab),
    );
    steps.step(
        &format!("in_a_{granularity}_mesh_every_node_has_its_tunnels"),
        || {
            // Five nodes: four others, or with cross those of the two other regions.
            for (node, tunnels) in [(MASTER, (4, 4)), (LEADER, (4, 3)), (THIRD_LEADER, (4, 3))] {
                let expected = if granularity == "full" {
                    tunnels.0
                } else {
                    tunnels.1
                };
                let peers = claims::wg_show(&lab, node)?;
                ensure!(peers.len() == expected, "{node}: {peers:?}");
            }
            Ok(String::new())
        },
    );
    Some(())
}

/// Logical groups: two of a data centre's three nodes form one, the third stands for itself.
fn mixed(steps: &mut Steps) -> Option<()> {
    let mut lab = steps.required("a_mixed_mesh_comes_up", || {
        up(Shape::default(), Proxy::None)
    })?;
    let _servers = Servers::start(&lab.places()).ok()?;
    let flags = flags(&[]);
    steps.required("the_agents_of_the_mixed_mesh_become_ready", || {
        let location = ("kilo.squat.ai/location", Some("edge"));
        lab.api().annotate("node-agent-03", &[location])?;
        lab.join(&mesh(&flags, true))?;
        Ok(String::new())
    })?;
    steps.step("in_a_mixed_mesh_everybody_reaches_everybody", || {
        settled(&lab)
    });
    steps.step("in_a_mixed_mesh_each_group_has_a_leader", || {
        for (node, tunnels) in [
            (MASTER, 2),
            (LEADER, 2),
            (FOLLOWER, 0),
            ("node-agent-03", 2),
        ] {
            let peers = claims::wg_show(&lab, node)?;
            ensure!(peers.len() == tunnels, "{node}: {peers:?}");
        }
        Ok(String::new())
    });
    Some(())
}

/// Six nodes in five clouds, each with a public address by 1:1 NAT; one cloud has two of them.
fn six_clouds(steps: &mut Steps) -> Option<()> {
    let shape = Shape {
        agents: 0,
        master: Master::ElasticIp,
        clouds: 4,
        ..Shape::default()
    };
    let mut lab = steps.required("five_clouds_come_up", || up(shape, Proxy::None))?;
    let _servers = Servers::start(&lab.places()).ok()?;
    let flags = flags(&[]);
    steps.required("the_agents_in_five_clouds_become_ready", || {
        let publics = [(1, 1), (2, 1), (2, 2), (3, 1), (4, 1)].map(|(cloud, number)| {
            let name = format!("node-cloud{cloud}-{number:02}");
            (name, public_address(cloud, number))
        });
        let master = (MASTER.to_owned(), MASTER_PUBLIC);
        for (node, public) in publics.into_iter().chain([master]) {
            let endpoint = format!("{public}:51820");
            let annotations = [
                ("kilo.squat.ai/force-endpoint", Some(endpoint.as_str())),
                ("kilo.squat.ai/persistent-keepalive", Some("20")),
            ];
            lab.api().annotate(&node, &annotations)?;
        }
        lab.join(&mesh(&flags, false))?;
        Ok(String::new())
    })?;
    steps.step("across_five_clouds_everybody_reaches_everybody", || {
        settled(&lab)
    });
    steps.step("across_five_clouds_each_leader_has_four_tunnels", || {
        // By name of the region: cloud-1 .1, cloud-2 .2, cloud-3 .3, cloud-4 .4, default .5.
        let expected = [
            ("node-cloud1-01", 4, "10.4.0.1"),
            ("node-cloud2-01", 4, "10.4.0.2"),
            ("node-cloud2-02", 0, ""),
            (MASTER, 4, "10.4.0.5"),
        ];
        for (node, tunnels, wireguard_ip) in expected {
            let peers = claims::wg_show(&lab, node)?;
            ensure!(peers.len() == tunnels, "{node}: {peers:?}");
            let addresses = lab.node(node)?.run("ip -br address show kilo0")?;
            ensure!(addresses.contains(wireguard_ip), "{node}: {addresses}");
        }
        Ok(String::new())
    });
    steps.step("the_agents_page_draws_what_the_command_draws", || {
        let command = selvedge(lab.node(MASTER)?, &lab, &["graph"])?;
        let (status, page) = lab.ask_agent(MASTER, "/graph?format=dot&layout=neato")?;
        ensure!(
            status == 200 && format!("{page}\n") == command,
            "{status} {page}\n{command}"
        );
        let (_, picture) = lab.ask_agent(MASTER, "/graph")?;
        ensure!(picture.starts_with("<svg "), "{picture}");
        let (status, refusal) = lab.ask_agent(MASTER, "/graph?format=foo")?;
        ensure!(
            status == 500 && refusal.trim() == "unsupported format",
            "{status} {refusal}"
        );
        Ok(String::new())
    });
    steps.step("across_five_clouds_showconf_and_wg_agree", || {
        let master = lab.node(MASTER)?;
        let conf = selvedge(master, &lab, &["showconf", "node", MASTER])?;
        let mut shown: Vec<_> = conf
            .lines()
            .filter_map(|line| line.strip_prefix("AllowedIPs = "))
            .map(|list| {
                let mut nets: Vec<_> = list.split(", ").map(str::to_owned).collect();
                nets.sort();
                nets
            })
            .collect();
        let mut real: Vec<Vec<_>> = claims::wg_show(&lab, MASTER)?
            .into_iter()
            .map(|peer| peer.allowed.into_iter().collect())
            .collect();
        shown.sort();
        real.sort();
        ensure!(shown == real, "showconf: {shown:?}\nwg: {real:?}");
        Ok(String::new())
    });
    steps.step("an_agent_needs_no_more_than_its_manifest_grants", || {
        confined(&mut lab, &flags)
    });
    Some(())
}

/// The master's agent again, with the one capability of the manifest, no way to more, a read-only root
/// and read-only sysctls.
fn confined(lab: &mut Lab, flags: &[&str]) -> anyhow::Result<String> {
    lab.take_agent(MASTER)?.stop()?;
    let node = lab.node(MASTER)?;
    let script = format!(
        "mount --make-rprivate /
         mount --bind /proc/sys /proc/sys
         mount -o remount,bind,ro /proc/sys
         mount -o remount,bind,ro /
         exec setpriv --no-new-privs --bounding-set=-all,+net_admin --inh-caps=-all --ambient-caps=-all \
             {SELVEDGE} agent --kubeconfig=/run/selvedge-lab.kubeconfig --hostname={MASTER} {}",
        flags.join(" ")
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-euc", &script]);
    let agent = node.spawn("agent", command)?;
    let ready = || {
        lab.ask_agent(MASTER, "/ready")
            .is_ok_and(|(status, _)| status == 200)
    };
    wait_for("the confined agent", Duration::from_secs(30), ready)
        .with_context(|| lab.tail(MASTER, "agent"))?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid()))?;
    // Bit 12 is CAP_NET_ADMIN (linux/capability.h).
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        let expected = format!("{set}:\t0000000000001000");
        ensure!(status.contains(&expected), "{status}");
    }

    // It does not only stand there: what is taken away comes back.
    node.run("nft delete table inet selvedge")?;
    node.run("ip route flush table 5130")?;
    node.run("ip link set kilo0 mtu 1300")?;
    let repaired = wait_for("the repair", PATIENCE, || {
        node.run("nft list table inet selvedge").is_ok()
            && node
                .run("ip route show table 5130")
                .is_ok_and(|routes| routes.contains("kilo0"))
            && node
                .run("ip link show kilo0")
                .is_ok_and(|link| link.contains("mtu 1420"))
    });
    repaired.with_context(|| lab.tail(MASTER, "agent"))?;
    let pairs = settled(lab)?;
    agent.stop()?;
    Ok(pairs)
}

/// Everybody reaches everybody, at the latest when the nodes behind NAT have found each other.
fn settled(lab: &Lab) -> anyhow::Result<String> {
    claims::everybody_comes_to_reach_everybody(lab, By::OwnAddress, Duration::from_secs(40))
}
