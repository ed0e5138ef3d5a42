//! VPN clients behind a NAT of their own: one that `connect` made, one of plain WireGuard.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use selvedge_lab::claims;
use selvedge_lab::controlplane::program;
use selvedge_lab::topology::MASTER;
use selvedge_lab::traffic::{PORT, Place, Servers, Stream, source_seen, transfer};
use selvedge_lab::{Lab, Namespace, Node, Process, Steps, wait_for};
use serde_json::{Value, json};

use crate::bad_peers;
use crate::nat::{DATA_CENTRE, endpoints, restart_router};
use crate::{FOLLOWER, LEADER, PATIENCE, SECOND_LEADER, SELVEDGE, THIRD_LEADER, selvedge};

pub(crate) const PEERS: &str = "/apis/kilo.squat.ai/v1alpha1/peers";

pub(crate) fn clients(steps: &mut Steps, lab: &Lab) -> Option<()> {
    // Hosts whose firewall drops forwarded packets accept flannel's networks. A client's network is another one,
    // which the operator has to accept.
    for name in lab.node_names() {
        let node = lab.node(&name).unwrap();
        node.run("iptables -P FORWARD ACCEPT").unwrap();
    }
    let home = Home::new(lab).unwrap();
    let before = dump(&home.laptop).unwrap();
    steps.step("without_a_tunnel_a_client_reaches_nothing", || {
        let pod = lab.pod(LEADER)?.address();
        let from = home.laptop.namespace().path();
        ensure!(source_seen(&from, SocketAddr::from((pod, PORT))).is_err());
        Ok(String::new())
    });
    let process = connect(&home.laptop, lab).unwrap();
    steps.step(
        "a_connected_laptop_reaches_pods_nodes_and_services_of_all_regions",
        || reaches_everything(lab, &home.laptop, true),
    );
    steps.step("pods_see_the_laptops_own_address", || {
        sees(lab, &home.laptop, [10, 10, 10, 10])
    });
    steps.step("megabytes_reach_the_laptop_intact", || {
        for node in [MASTER, LEADER, SECOND_LEADER, FOLLOWER, THIRD_LEADER] {
            let server = SocketAddr::from((lab.pod(node)?.address(), PORT));
            transfer(&home.laptop.namespace().path(), server, 3_000_000).context(node)?;
        }
        Ok(String::new())
    });
    steps.step("the_cluster_reaches_the_laptop", || {
        let laptop = Place {
            name: "laptop".into(),
            node: "laptop".into(),
            pod: false,
            address: [10, 10, 10, 10].into(),
            namespace: home.laptop.namespace().path(),
        };
        let _server = Servers::start(std::slice::from_ref(&laptop))?;
        for place in lab.places() {
            source_seen(&place.namespace, SocketAddr::from((laptop.address, PORT)))
                .context(place.name)?;
        }
        Ok(String::new())
    });
    let wireguard = steps.required("plain_wireguard_takes_what_showconf_prints", || {
        plain_wireguard(&home.desktop, lab).map(Plain)
    });
    steps.step("a_plain_wireguard_desktop_reaches_the_same", || {
        reaches_everything(lab, &home.desktop, false)
    });
    steps.step("a_laptop_that_changes_its_port_is_followed", || {
        roams(lab, &home.laptop)
    });
    steps.step(
        "a_connected_laptop_follows_a_leader_whose_nat_forgot_it",
        || follows_its_leader(lab, &home.laptop),
    );
    steps.step("peers_that_come_change_and_go_disturb_no_other", || {
        peers_disturb_no_other(lab)
    });
    steps.step(
        "of_two_equal_claims_the_older_wins_and_the_other_peer_gets_an_event",
        || duplicate_claim(lab),
    );
    steps.step(
        "bad_peers_are_left_out_with_an_event_and_a_condition_and_disturb_no_other",
        || bad_peers::left_out_with_event_and_condition(lab),
    );
    steps.step(
        "a_location_without_a_route_back_is_masqueraded_for_clients",
        || allowed_location(lab, &home.laptop),
    );
    steps.step(
        "a_location_behind_a_node_that_does_not_lead_need_not_know_its_leader",
        || behind_a_follower(lab, &home.laptop),
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
    Some(())
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
             iptables -A INPUT -i wan -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
             iptables -A INPUT -i wan -j DROP
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

/// All places of the cluster that a client does not reach, tried at once.
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
                let ask = || source_seen(&from, SocketAddr::from((*address, PORT)));
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

pub(crate) fn create_peer(lab: &Lab, name: &str, spec: &Value) -> anyhow::Result<()> {
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
        let seen = source_seen(&client.namespace().path(), server)?;
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

/// Registers a Peer and sets wireguard-go up with `showconf peer`, as Kilo's guide describes.
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

    // The observed endpoint of a leader behind NAT may change until the mesh has settled.
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

/// The router of a client changes its port: connections to the public region and to those behind NAT go on.
fn roams(lab: &Lab, laptop: &Node) -> anyhow::Result<String> {
    let from = laptop.namespace().path();
    let streams: anyhow::Result<Vec<_>> = [MASTER, LEADER, THIRD_LEADER]
        .into_iter()
        .map(|node| {
            let server = SocketAddr::from((lab.pod(node)?.address(), PORT));
            Ok((node, Stream::start(&from, server)?))
        })
        .collect();
    sleep(Duration::from_millis(500));
    let port = laptop.run("wg show kilo0 listen-port")?;
    let other = port.trim().parse::<u16>()?.wrapping_add(1).max(1024);
    laptop.run(&format!("wg set kilo0 listen-port {other}"))?;
    // The public leader sees the new endpoint; the leaders behind NAT learn it from the public leader.
    let mut failures = Vec::new();
    wait_for("the leaders behind NAT", Duration::from_secs(25), || {
        failures = unreached(lab, laptop, false);
        failures.is_empty()
    })
    .with_context(|| failures.join("\n"))?;
    let mut reports = Vec::new();
    for (node, stream) in streams? {
        let report = stream.stop()?;
        ensure!(report.silence < Duration::from_secs(10), "{node}: {report}");
        reports.push(format!("{node}: {report}"));
    }
    Ok(reports.join("; "))
}

/// A leader's router restarts while a laptop talks to its region.
fn follows_its_leader(lab: &Lab, laptop: &Node) -> anyhow::Result<String> {
    let server = SocketAddr::from((lab.pod(LEADER)?.address(), PORT));
    let stream = Stream::start(&laptop.namespace().path(), server)?;
    sleep(Duration::from_millis(500));
    restart_router(lab, "nat1", "43000-43999")?;
    let new = format!("{DATA_CENTRE}43");
    wait_for("the new mapping", Duration::from_secs(125), || {
        // Of both leaders behind the router.
        endpoints(lab, MASTER, &new).len() == 2
    })?;
    let mut failures = Vec::new();
    wait_for("the laptop", PATIENCE, || {
        failures = unreached(lab, laptop, false);
        failures.is_empty()
    })
    .with_context(|| failures.join("\n"))?;
    let report = stream.stop()?;
    ensure!(report.silence < Duration::from_secs(125), "{report}");
    Ok(report.to_string())
}

/// Peers without an endpoint, with a name that resolves nowhere, changed and deleted, while pods talk.
fn peers_disturb_no_other(lab: &Lab) -> anyhow::Result<String> {
    let server = SocketAddr::from((lab.pod(FOLLOWER)?.address(), PORT));
    let stream = Stream::start_warm(&lab.pod(MASTER)?.namespace().path(), server)?;
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
    // A change after the peer without an endpoint still arrives.
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

pub(crate) fn on_the_master(lab: &Lab, nets: &[&str]) -> anyhow::Result<()> {
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
    // Ages are in whole seconds.
    sleep(Duration::from_millis(1100));
    create_peer(
        lab,
        "a-newer",
        &spec("zGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA="),
    )?;
    on_the_master(lab, &["10.10.12.1/32"])?;
    let waited = wait_for("an Event about the newer one", PATIENCE, || {
        lab.kubectl(&["get", "events", "--all-namespaces"])
            .is_ok_and(|events| events.contains("a-newer"))
    });
    waited.with_context(|| lab.tail(MASTER, "agent"))?;
    let condition = |name: &str| -> anyhow::Result<(String, String)> {
        let peer = lab.api().get(&format!("{PEERS}/{name}"))?;
        let condition = &peer["status"]["conditions"][0];
        let field = |name: &str| condition[name].as_str().unwrap_or_default().to_owned();
        Ok((field("status"), field("message")))
    };
    let waited = wait_for("the conditions", PATIENCE, || {
        let (newer, older) = (condition("a-newer"), condition("z-older"));
        newer.is_ok_and(|(status, message)| status == "False" && message.contains("z-older"))
            && older.is_ok_and(|(status, _)| status == "True")
    });
    waited.with_context(|| format!("{:?} {:?}", condition("a-newer"), condition("z-older")))?;
    let owner = || -> anyhow::Result<String> {
        let dump = lab.node(MASTER)?.run("wg show kilo0 allowed-ips")?;
        let owner = dump.lines().find(|line| line.contains("10.10.12.1/32"));
        Ok(owner.unwrap_or_default().to_owned())
    };
    ensure!(owner()?.starts_with("oGFwdG9w"), "{}", owner()?);
    // The other one has waited, and its condition changes when it is accepted.
    lab.api().delete(&format!("{PEERS}/z-older"))?;
    let taken_over = wait_for("the newer one's turn", PATIENCE, || {
        owner().is_ok_and(|owner| owner.starts_with("zGFwdG9w"))
            && condition("a-newer").is_ok_and(|(status, _)| status == "True")
    });
    taken_over.with_context(|| format!("{:?} {:?}", owner(), condition("a-newer")))?;
    lab.api().delete(&format!("{PEERS}/a-newer"))?;
    Ok(String::new())
}

/// A machine beside a follower is reached although it has no route back to VPN clients.
fn allowed_location(lab: &Lab, laptop: &Node) -> anyhow::Result<String> {
    let router = lab.network().router("nat1")?;
    let printer = Namespace::named(format!("{}-printer", lab.network().prefix()))?;
    router.veth("printer", &printer, "eth0")?;
    router.run("ip link set printer master br0")?;
    // In the data centre's subnet, without a default route: it answers neighbours only.
    printer.run("ip address add 192.168.50.99/24 dev eth0")?;
    let place = Place {
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
    let mut seen = Err(anyhow::anyhow!("not asked yet"));
    wait_for("the printer", PATIENCE, || {
        seen = source_seen(&from_laptop, target);
        seen.is_ok()
    })
    .with_context(|| format!("{seen:?}"))?;
    // A neighbour's address: the leader's own.
    ensure!(seen? == Ipv4Addr::new(192, 168, 50, 11));
    // The laptop's program and each agent see the change at different times.
    let from_pod = lab.pod(MASTER)?.namespace().path();
    let mut seen = Err(anyhow::anyhow!("not asked yet"));
    wait_for("the printer, from a pod elsewhere", PATIENCE, || {
        seen = source_seen(&from_pod, target);
        seen.is_ok()
    })
    .with_context(|| format!("{seen:?}"))?;
    lab.api()
        .annotate(LEADER, &[("kilo.squat.ai/allowed-location-ips", None)])?;
    Ok(String::new())
}

/// Machines beside a follower have a route to that node only, and none to its leaders or further.
fn behind_a_follower(lab: &Lab, laptop: &Node) -> anyhow::Result<String> {
    let follower = lab.node(FOLLOWER)?;
    let scanner = Namespace::named(format!("{}-scanner", lab.network().prefix()))?;
    follower.namespace().veth("scanners", &scanner, "eth0")?;
    follower.run("ip address add 192.168.77.1/24 dev scanners")?;
    scanner.run("ip address add 192.168.77.9/24 dev eth0")?;
    // Routes inside the region are the operator's task.
    let leaders = [lab.node(LEADER)?, lab.node(SECOND_LEADER)?];
    let way = format!("192.168.77.0/24 via {}", follower.address());
    for leader in leaders {
        leader.run(&format!("ip route add {way}"))?;
    }
    let place = Place {
        name: "scanner".into(),
        node: "scanner".into(),
        pod: false,
        address: [192, 168, 77, 9].into(),
        namespace: scanner.path(),
    };
    let _server = Servers::start(std::slice::from_ref(&place))?;
    let key = "kilo.squat.ai/allowed-location-ips";
    lab.api()
        .annotate(FOLLOWER, &[(key, Some("192.168.77.0/24"))])?;
    let target = SocketAddr::from((place.address, PORT));
    for from in [
        laptop.namespace().path(),
        lab.pod(MASTER)?.namespace().path(),
    ] {
        let mut seen = Err(anyhow::anyhow!("not asked yet"));
        wait_for("the scanner", PATIENCE, || {
            seen = source_seen(&from, target);
            seen.is_ok()
        })
        .with_context(|| format!("{seen:?} from {}", from.display()))?;
        ensure!(seen? == Ipv4Addr::new(192, 168, 77, 1));
    }
    lab.api().annotate(FOLLOWER, &[(key, None)])?;
    for leader in leaders {
        leader.run(&format!("ip route del {way}"))?;
    }
    Ok(String::new())
}
