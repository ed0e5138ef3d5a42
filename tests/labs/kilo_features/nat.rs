//! Leaders behind NAT: how they find each other, and are found again after their routers forgot them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;
use selvedge_lab::claims;
use selvedge_lab::lab::Proxy;
use selvedge_lab::topology::{MASTER, Nat, Shape, Third};
use selvedge_lab::traffic::{PORT, Stream, transfer};
use selvedge_lab::{Lab, Namespace, Process, Steps, wait_for};

use crate::{
    FOLLOWER, LEADER, PATIENCE, SECOND_LEADER, SELVEDGE, THIRD_LEADER, flags, mesh, selvedge,
    settled, up,
};

/// The public addresses of the master and of the routers, up to the port.
const CLOUD: &str = "203.0.113.10:";
pub(crate) const DATA_CENTRE: &str = "203.0.113.20:";
const THIRD: &str = "203.0.113.30:";

/// The leaders behind each router.
const DATA_CENTRES: [&str; 2] = [LEADER, SECOND_LEADER];
const THIRDS: [&str; 2] = [THIRD_LEADER, "node-third-02"];

/// The keepalive that the leaders behind NAT are annotated with.
const KEEPALIVE: Duration = Duration::from_secs(25);
/// After so long without traffic agents probe their connection to the API server.
const API_PROBES: Duration = Duration::from_secs(10);

pub(crate) fn regions(steps: &mut Steps, lab: &mut Lab, flags: &[&str]) {
    steps.step("two_regions_behind_nat_find_each_other", || {
        found_each_other(lab)
    });
    steps.step("their_traffic_passes_no_other_leader", || {
        goes_directly(lab)
    });
    steps.step("they_find_each_other_while_no_api_server_answers", || {
        without_the_api(lab, flags)
    });
    steps.step(
        "a_leader_whose_nat_forgot_it_is_followed_within_one_keepalive",
        || follows_new_mappings(lab, &[("nat1", DATA_CENTRE, "40000-40999")]),
    );
    steps.step("two_whose_nats_forgot_both_find_each_other_again", || {
        let both = [
            ("nat1", DATA_CENTRE, "41000-41999"),
            ("nat2", THIRD, "42000-42999"),
        ];
        follows_new_mappings(lab, &both)
    });
}

/// The endpoints that a node's tunnels have at a public address: those of both leaders there.
pub(crate) fn endpoints(lab: &Lab, node: &str, address: &str) -> Vec<String> {
    let peers = claims::wg_show(lab, node).unwrap_or_default();
    let endpoints = peers.into_iter().map(|peer| peer.endpoint);
    endpoints
        .filter(|endpoint| endpoint.starts_with(address))
        .collect()
}

/// Each of the two leaders behind a NAT has a session with both behind the other, at the router's address.
fn found_each_other(lab: &Lab) -> anyhow::Result<String> {
    for (nodes, other) in [(DATA_CENTRES, THIRD), (THIRDS, DATA_CENTRE)] {
        for node in nodes {
            let mut seen = String::new();
            wait_for("direct sessions", PATIENCE, || {
                let peers = claims::wg_show(lab, node).unwrap_or_default();
                let found = peers
                    .iter()
                    .filter(|peer| peer.endpoint.starts_with(other) && peer.handshake > 0);
                let found = found.count();
                seen = format!("{peers:?}");
                found == 2
            })
            .with_context(|| format!("{node}: {seen}"))?;
        }
    }
    Ok(String::new())
}

/// Traffic between the two regions behind NAT goes from router to router.
fn goes_directly(lab: &Lab) -> anyhow::Result<String> {
    let wire = Listener::start(
        lab.network().router("nat2")?,
        &lab.directory().join("nat2.txt"),
    )?;
    let server = (lab.pod(THIRD_LEADER)?.address(), PORT).into();
    transfer(&lab.pod(FOLLOWER)?.namespace().path(), server, 2_000_000)?;
    let datagrams = wire.stop()?;
    let bytes = |from: &str, to: &str| -> u64 {
        let matching = datagrams
            .iter()
            .filter(|((source, target), _)| source.starts_with(from) && target.starts_with(to));
        matching.map(|(_, bytes)| bytes).sum()
    };
    let direct = [bytes(DATA_CENTRE, THIRD), bytes(THIRD, DATA_CENTRE)];
    let other = bytes(CLOUD, THIRD) + bytes(THIRD, CLOUD);
    ensure!(
        direct.iter().all(|bytes| *bytes > 2_000_000) && other < 20_000,
        "{datagrams:?}"
    );
    Ok(format!(
        "2 MB each way: {} and {} bytes from router to router, {other} to and from the master",
        direct[0], direct[1]
    ))
}

/// tcpdump on a router's way out: how many bytes of UDP from which source to which destination.
struct Listener {
    tcpdump: Process,
    file: PathBuf,
}

impl Listener {
    fn start(router: &Namespace, file: &Path) -> anyhow::Result<Self> {
        let mut command = router.command("tcpdump");
        command.args([
            "-i", "wan", "-nn", "-q", "-t", "-B", "32768", "-Z", "root", "udp",
        ]);
        let tcpdump = Process::start_logging("tcpdump", command, file)?;
        wait_for("tcpdump", Duration::from_secs(10), || {
            std::fs::read_to_string(file).is_ok_and(|text| text.contains("listening on"))
        })?;
        Ok(Self {
            tcpdump,
            file: file.to_owned(),
        })
    }

    /// Bytes by source and destination, as `address:port`.
    fn stop(mut self) -> anyhow::Result<BTreeMap<(String, String), u64>> {
        // What the kernel still holds is lost otherwise.
        sleep(Duration::from_millis(1500));
        self.tcpdump.signal(Signal::SIGINT);
        self.tcpdump.wait(Duration::from_secs(10))?;
        let mut datagrams: BTreeMap<_, u64> = BTreeMap::new();
        // Packets that offloads joined count as one, so bytes are counted:
        // IP 203.0.113.20.51820 > 203.0.113.30.51820: UDP, length 148
        for line in std::fs::read_to_string(&self.file)?.lines() {
            let mut words = line.split_whitespace();
            if words.next() != Some("IP") {
                continue;
            }
            let ends = (words.next(), words.nth(1));
            let socket = |text: Option<&str>| {
                let (address, port) = text?.trim_end_matches(':').rsplit_once('.')?;
                Some(format!("{address}:{port}"))
            };
            let length = words.last().and_then(|word| word.parse::<u64>().ok());
            if let (Some(from), Some(to), Some(length)) = (socket(ends.0), socket(ends.1), length) {
                *datagrams.entry((from, to)).or_default() += length;
            }
        }
        Ok(datagrams)
    }
}

/// The agents of all leaders behind NAT restart with nothing but their state on disk.
fn without_the_api(lab: &mut Lab, flags: &[&str]) -> anyhow::Result<String> {
    // An agent writes its state within five seconds of a change.
    sleep(Duration::from_secs(6));
    lab.plane()?.freeze(true);
    let outcome = (|| {
        for node in DATA_CENTRES.into_iter().chain(THIRDS) {
            lab.take_agent(node)?.stop()?;
        }
        let mesh = mesh(flags, true);
        for node in DATA_CENTRES.into_iter().chain(THIRDS) {
            lab.restart_agent(mesh.binary, node, mesh.access, mesh.flags)?;
        }
        let begun = Instant::now();
        found_each_other(lab)?;
        let (from, to) = (format!("pod@{FOLLOWER}"), format!("pod@{THIRD_LEADER}"));
        claims::reached_within(lab, &from, &to, PATIENCE)?;
        Ok(format!("{:.1} s", begun.elapsed().as_secs_f64()))
    })();
    lab.plane()?.freeze(false);
    wait_for("the API server", PATIENCE, || lab.api().ready())?;
    outcome
}

/// The router restarts: it sends from other ports than before, and drops what arrives for the old ones.
pub(crate) fn restart_router(lab: &Lab, name: &str, ports: &str) -> anyhow::Result<()> {
    // A link that goes down takes the mappings of its MASQUERADE rules with it.
    lab.network().router(name)?.sh(&format!(
        "iptables -t nat -F POSTROUTING
         iptables -t nat -A POSTROUTING -o wan -p udp -j MASQUERADE --to-ports {ports}
         iptables -t nat -A POSTROUTING -o wan -j MASQUERADE
         ip link set wan down
         ip link set wan up
         ip route replace default via 203.0.113.1"
    ))?;
    Ok(())
}

/// `routers`: their names, the addresses of their leaders, and the ports that they use from now on.
fn follows_new_mappings(lab: &Lab, routers: &[(&str, &str, &str)]) -> anyhow::Result<String> {
    wait_for_records_of_leads(lab)?;
    let written = writes(lab)?;
    let server = (lab.pod(LEADER)?.address(), PORT).into();
    let stream = Stream::start(&lab.pod(THIRD_LEADER)?.namespace().path(), server)?;
    sleep(Duration::from_millis(500));
    for (name, _, ports) in routers {
        restart_router(lab, name, ports)?;
    }
    let begun = Instant::now();
    // The router also lost this leader's connection to the API; the change must still reach the leader.
    let location_ips = "kilo.squat.ai/allowed-location-ips";
    lab.api()
        .annotate(MASTER, &[(location_ips, Some("10.77.0.0/24"))])?;
    let mut heard = None;
    let mut times = String::new();
    // The public leader gets the next keepalive and publishes its source for the others.
    for observers in [
        &[MASTER][..],
        &[LEADER, SECOND_LEADER, THIRD_LEADER, THIRDS[1]],
    ] {
        let waited = wait_for("the new mappings", 5 * KEEPALIVE, || {
            if heard.is_none() && knows(lab, "10.77.0.0/24") {
                heard = Some(begun.elapsed());
            }
            routers.iter().all(|(_, address, ports)| {
                // 40000-40999: one thousand.
                let new = format!("{address}{}", &ports[..2]);
                let elsewhere = observers.iter().filter(|node| {
                    DATA_CENTRES.contains(node) != (*address == DATA_CENTRE) || **node == MASTER
                });
                elsewhere.into_iter().all(|node| {
                    let at = endpoints(lab, node, address);
                    at.len() == 2 && at.iter().all(|at| at.starts_with(&new))
                })
            })
        });
        waited.with_context(|| lab.tail(THIRD_LEADER, "agent"))?;
        times += &format!("{:.1} s, ", begun.elapsed().as_secs_f64());
    }
    let heard = match heard {
        Some(heard) => heard,
        None => {
            wait_for("a change in the API", 5 * API_PROBES, || {
                knows(lab, "10.77.0.0/24")
            })?;
            begun.elapsed()
        }
    };
    ensure!(
        heard < 5 * API_PROBES,
        "a change was heard of after {heard:?}"
    );
    lab.api().annotate(MASTER, &[(location_ips, None)])?;
    let pairs = settled(lab)?;
    let report = stream.stop()?;
    ensure!(report.silence < 5 * KEEPALIVE, "{report}");
    let written = writes(lab)? - written;
    // One of each of three leaders for each of two that it saw move; the clients' moves cause none.
    ensure!(written <= 6 * routers.len(), "{written} writes");
    Ok(format!(
        "seen by the master and by the other leader after {times}a connection was silent for {:.1} s; of a change in the API the leader heard after {:.1} s; {written} writes; {pairs}",
        report.silence.as_secs_f64(),
        heard.as_secs_f64()
    ))
}

/// Whether the first leader behind NAT routes a network.
fn knows(lab: &Lab, net: &str) -> bool {
    let node = lab.node(LEADER);
    let routes = node.and_then(|node| node.run("ip route show table 5130"));
    routes.is_ok_and(|routes| routes.contains(net))
}

/// A leader of a region records its lead once, after it has led for half a minute. That write is not about
/// endpoints. The master, which has a public address, stands for itself.
fn wait_for_records_of_leads(lab: &Lab) -> anyhow::Result<()> {
    let leaders = [DATA_CENTRES, THIRDS];
    let names = lab.node_names();
    let mut leads = names
        .iter()
        .filter(|name| leaders.as_flattened().contains(&name.as_str()));
    leads.try_for_each(|leader| claims::lead_is_recorded(lab, leader))
}

/// What `doctor` and `status` print on a node.
fn reports(lab: &Lab, node: &str) -> anyhow::Result<Vec<String>> {
    let mut command = Command::new(SELVEDGE);
    command.arg("doctor");
    let doctor = String::from_utf8(lab.node(node)?.output(command)?.stdout)?;
    let status = selvedge(lab.node(node)?, lab, &["status"])?;
    Ok(vec![doctor, status])
}

/// How often a Node was patched by an agent so far.
fn writes(lab: &Lab) -> anyhow::Result<usize> {
    let audit = lab.plane()?.audit()?;
    let patches = audit.iter().filter(|entry| {
        let uri = entry["requestURI"].as_str().unwrap_or_default();
        entry["verb"] == "patch" && uri.contains("fieldManager=selvedge") && uri.contains("/nodes/")
    });
    Ok(patches.count())
}

/// Two regions behind NATs that give each destination another port.
pub(crate) fn symmetric(steps: &mut Steps) -> Option<()> {
    let shape = Shape {
        agents: 1,
        third: Third::Distinct,
        nat: Nat::Symmetric,
        ..Shape::default()
    };
    let (mut lab, _servers) = up(
        steps,
        "two_regions_behind_symmetric_nats_come_up",
        shape,
        Proxy::None,
    )?;
    let flags = flags(&[]);
    steps.required("their_agents_become_ready", || {
        lab.join(&mesh(&flags, true))?;
        Ok(String::new())
    })?;
    steps.step("both_reach_the_public_region", || {
        for node in [LEADER, THIRD_LEADER] {
            for (from, to) in [(node, MASTER), (MASTER, node)] {
                let (from, to) = (format!("pod@{from}"), format!("pod@{to}"));
                claims::reached_within(&lab, &from, &to, PATIENCE)?;
            }
        }
        Ok(String::new())
    });
    steps.step(
        "they_do_not_reach_each_other_and_status_and_doctor_say_why",
        || {
            let (from, to) = (format!("pod@{LEADER}"), format!("pod@{THIRD_LEADER}"));
            let reached = claims::reached_within(&lab, &from, &to, Duration::from_secs(3));
            ensure!(reached.is_err(), "they reach each other");
            // A leader knows that it is behind NAT itself once another leader has published where it is.
            for (node, other) in [(LEADER, "location:third"), (THIRD_LEADER, "location:nd")] {
                let mut texts = Vec::new();
                let named = wait_for("status and doctor to name the NATs", PATIENCE, || {
                    texts = reports(&lab, node).unwrap_or_default();
                    texts.len() == 2
                        && texts
                            .iter()
                            .all(|text| text.contains(other) && text.contains("both behind NAT"))
                });
                named.with_context(|| texts.join("\n"))?;
            }
            Ok(String::new())
        },
    );
    steps.step("no_agent_writes_about_it_repeatedly", || {
        wait_for_records_of_leads(&lab)?;
        let before = writes(&lab)?;
        ensure!(
            before > 0,
            "the audit log misses even the first annotations"
        );
        sleep(Duration::from_secs(12));
        let written = writes(&lab)? - before;
        ensure!(written == 0, "{written} writes in 12 s");
        Ok(String::new())
    });
    Some(())
}
