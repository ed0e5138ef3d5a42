//! Two regions end to end, on a real flannel and a real kube-apiserver: a public master, three
//! agents behind NAT, strict reverse path filters, a FORWARD policy of DROP, kube-proxy.
//!
//! A region has the default of two leaders: the master alone in its region, and two of the data centre's three
//! nodes. The third follows both of them.
//!
//! First without Selvedge, then with it, then with one fault after the other, and at last without it
//! again. The steps share one cluster and run in order; each states its claim in its name.
#![expect(
    clippy::disallowed_methods,
    reason = "a test may wait and read the clock"
)]

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use selvedge_lab::capture::Capture;
use selvedge_lab::claims::{self, By, Pairs};
use selvedge_lab::controlplane::POD_NETWORK;
use selvedge_lab::dumps::Dumps;
use selvedge_lab::lab::{Mesh, Options, Proxy};
use selvedge_lab::topology::{FOLLOWER_OF_TWO as FOLLOWER, LEADER, MASTER, SECOND_LEADER, Site};
use selvedge_lab::traffic::{PORT, Stream, shout};
use selvedge_lab::{Lab, Steps, wait_for};

mod faults;
mod node_ports;

use faults::{Restarts, flannel_restarts, untracked};

const SELVEDGE: &str = env!("CARGO_BIN_EXE_selvedge");
const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/selvedge-k3s.yaml");

/// The WireGuard IPs of the data centre's leaders: the first one's is asked for, the second takes the next.
const LEADERS_IPS: [&str; 2] = ["10.4.0.2", "10.4.0.3"];

fn main() -> ExitCode {
    let mut steps = Steps::from_args("two_regions_behind_nat");
    run(&mut steps);
    steps.finish()
}

fn run(steps: &mut Steps) -> Option<()> {
    let options = Options {
        proxy: Proxy::Iptables,
        ..Options::default()
    };
    let (mut lab, _servers) = steps.cluster("the_cluster_comes_up", "two-regions", options)?;

    without_selvedge(steps, &mut lab);
    let before = steps.required("the_nodes_are_dumped_before_selvedge", || Dumps::take(&lab))?;

    let mesh = Mesh::annotated(Path::new(SELVEDGE), Path::new(MANIFEST));
    steps.required("all_agents_become_ready", || {
        let time = lab.join(&mesh)?;
        Ok(format!(
            "{:.1} s after the last was started",
            time.as_secs_f64()
        ))
    })?;
    reachability(steps, &lab);
    steady_state(steps, &mut lab);
    faults::all(steps, &mut lab, &mesh);
    steps.step("sigterm_leaves_the_data_plane_at_work", || {
        terminated(&mut lab)
    });
    steps.step("with_clean_up_sigterm_leaves_nothing", || {
        terminated_with_clean_up(&mut lab, &mesh, &before)
    });
    steps.step("cleanup_leaves_the_nodes_as_they_were", || {
        claims::cleanup_leaves_nothing(&mut lab, Path::new(SELVEDGE), &before)
    });
    Some(())
}

/// The control run: what flannel does without Selvedge, and that the captures detect it.
fn without_selvedge(steps: &mut Steps, lab: &mut Lab) {
    steps.step("flannel_alone_connects_no_two_regions", || {
        claims::only_regions_are_connected(lab)
    });
    steps.step(
        "flannel_alone_sends_pod_traffic_between_regions_in_clear",
        || {
            let capture = lab.capture_internet("flannel-alone")?;
            leak_something(lab)?;
            let findings = capture.finish(POD_NETWORK.parse()?)?;
            ensure!(findings.magic > 0 && findings.vxlan > 0, "{findings}");
            Ok(findings.to_string())
        },
    );
    steps.step(
        "flannel_alone_loses_what_forward_drops_while_it_restarts",
        || {
            let pairs = [
                ("pod@node-agent-02", "pod@node-agent-01"),
                ("pod@node-agent-01", "pod@node-agent-03"),
                ("pod@node-agent-02", "pod@node-agent-03"),
            ];
            let Restarts {
                lost,
                dropped,
                summary,
            } = {
                // Untracked, as a leader's transit is: kube-proxy accepts only established connections.
                untracked(lab, true)?;
                let outcome = flannel_restarts(lab, &pairs);
                untracked(lab, false)?;
                outcome?
            };
            ensure!(lost <= dropped, "{lost} lost, {dropped} dropped: {summary}");
            Ok(format!(
                "{lost} lost, FORWARD dropped {dropped} packets: {summary}"
            ))
        },
    );
}

fn reachability(steps: &mut Steps, lab: &Lab) {
    let capture = steps.required(
        "listening_on_the_internet_since_the_agents_are_ready",
        || Ok(Listening(lab.capture_internet("ready")?)),
    );
    steps.step("the_regions_are_joined_within_ten_seconds", || {
        let mut summary = Vec::new();
        for (from, to) in [
            ("pod@node-agent-03", "pod@node-master"),
            ("pod@node-master", "pod@node-agent-03"),
            ("node-master", "node-agent-01"),
        ] {
            let time = claims::reached_within(lab, from, to, Duration::from_secs(10))?;
            summary.push(format!("{from} -> {to} after {time:.1?} more"));
        }
        Ok(summary.join(", "))
    });
    steps.step(
        "all_pods_and_nodes_reach_each_other_by_pod_ip_and_internal_ip",
        || claims::all_places_come_to_reach_each_other(lab, By::OwnAddress, claims::SETTLING),
    );
    steps.step("all_pods_and_nodes_reach_each_other_by_cluster_ip", || {
        claims::all_places_reach_each_other(lab, By::Service)
    });
    steps.step("pods_reach_the_service_kubernetes", || {
        claims::pods_reach_the_api(lab)
    });
    steps.step("a_server_sees_the_address_of_the_pod_that_calls", || {
        claims::pods_keep_their_address(lab)
    });
    steps.step("the_master_reaches_every_kubelet", || {
        claims::master_reaches_every_kubelet(lab)
    });
    steps.step(
        "the_master_pings_both_other_leaders_by_their_wireguard_ips",
        || {
            for ip in LEADERS_IPS {
                lab.node(MASTER)?.run(&format!("ping -c 2 -W 2 {ip}"))?;
            }
            Ok(String::new())
        },
    );
    steps.step("a_node_port_of_a_leader_leads_to_a_pod_elsewhere", || {
        node_ports::lead_to_pods(lab)
    });
    steps.step(
        "a_node_port_of_the_own_leader_leads_elsewhere_past_loose_filters_only",
        || node_ports::of_the_own_leader(lab),
    );
    steps.step(
        "doctor_reports_the_forward_policy_of_drop_and_nothing_else",
        || {
            for name in lab.node_names() {
                let text = doctor(lab, &name)?;
                let findings = text
                    .lines()
                    .filter(|line| line.starts_with("problem") || line.starts_with("warning"));
                for finding in findings {
                    ensure!(finding.contains("The chain FORWARD"), "{name}: {text}");
                }
                ensure!(text.contains("(answers)"), "{name}: {text}");
            }
            Ok(String::new())
        },
    );
    steps.step(
        "wg_shows_young_handshakes_and_the_right_allowed_ips",
        || wg_on_all_leaders(lab),
    );
    steps.step(
        "a_packet_too_large_for_the_path_is_refused_in_its_own_region",
        || {
            let master = lab.pod(MASTER)?.address();
            claims::too_large_is_refused_in_its_region(lab, LEADER, LEADER, master)?;
            claims::too_large_is_refused_in_its_region(lab, FOLLOWER, LEADER, master)
        },
    );
    steps.step("a_megabyte_arrives_intact_between_all_pairs", || {
        claims::bytes_arrive_intact(lab, 1_000_000, Pairs::BesidesPublicHosts)
    });
    steps.step("nothing_crosses_the_internet_in_clear", || {
        let capture = capture.context("the capture did not start")?.0;
        let findings = capture.finish(POD_NETWORK.parse()?)?;
        ensure!(findings.nothing_in_clear(), "{findings}");
        let tunnel = findings.udp.get(&51820).copied().unwrap_or(0);
        ensure!(
            tunnel > 1000,
            "only {tunnel} packets of the tunnel: {findings}"
        );
        Ok(findings.to_string())
    });
    steps.step("ten_megabytes_arrive_intact_between_all_pairs", || {
        claims::bytes_arrive_intact(lab, 10_000_000, Pairs::All)
    });
}

fn steady_state(steps: &mut Steps, lab: &mut Lab) {
    steps.step("an_idle_minute_brings_no_write_to_the_api_server", || {
        let agent = "system:serviceaccount:kube-system:selvedge";
        let writes = |lab: &Lab| -> anyhow::Result<Vec<String>> {
            let audit = lab.plane()?.audit()?;
            let written = audit.iter().filter(|entry| {
                entry["user"]["username"] == agent
                    && !["get", "list", "watch"].contains(&entry["verb"].as_str().unwrap_or(""))
            });
            Ok(written
                .map(|entry| format!("{} {}", entry["verb"], entry["requestURI"]))
                .collect())
        };
        // Each leader of a region records its lead once, after it has led for half a minute. The master, which
        // has a public address, stands for itself, so it has none to record.
        for leader in [LEADER, SECOND_LEADER] {
            claims::lead_is_recorded(lab, leader)?;
        }
        let earlier = writes(lab)?;
        ensure!(
            !earlier.is_empty(),
            "the audit log misses even the first annotations"
        );
        sleep(Duration::from_secs(60));
        let later = writes(lab)?;
        ensure!(
            later.len() == earlier.len(),
            "{:?}",
            &later[earlier.len()..]
        );
        Ok(format!("{} writes before, none since", earlier.len()))
    });
    steps.step("an_idle_agent_needs_little_memory", || {
        let mut sizes = Vec::new();
        for name in lab.node_names() {
            let pid = lab.agent(&name).context("no agent")?.pid();
            sizes.push(claims::resident_kib(pid)?);
        }
        // The limit of a release build is 24 MiB; four times that is a failure. A debug build
        // needs half as much again.
        ensure!(sizes.iter().all(|size| *size < 96 * 1024), "{sizes:?} KiB");
        let build = if cfg!(debug_assertions) {
            "debug build, of which a release build needs about 60 %"
        } else {
            "release build"
        };
        Ok(format!("resident KiB: {sizes:?} ({build})"))
    });
}

/// What `selvedge doctor` prints on a node, with the flags of the agent there.
fn doctor(lab: &Lab, node: &str) -> anyhow::Result<String> {
    let mut command = Command::new(SELVEDGE);
    command
        .args(["doctor", "--kubeconfig=/run/selvedge-lab.kubeconfig"])
        .arg(format!("--hostname={node}"));
    let output = lab.node(node)?.output(command)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A leader has one peer for each leader of the other region, and may receive all of that region from each.
fn wg_on_all_leaders(lab: &Lab) -> anyhow::Result<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let mut summary = Vec::new();
    for (leader, far, far_ips) in [
        (MASTER, Site::DataCentre, &LEADERS_IPS[..]),
        (LEADER, Site::Cloud, &["10.4.0.1"]),
        (SECOND_LEADER, Site::Cloud, &["10.4.0.1"]),
    ] {
        let peers = claims::wg_show(lab, leader)?;
        ensure!(peers.len() == far_ips.len(), "{leader} has {peers:?}");
        let expected = claims::allowed_ips_of(lab, far, far_ips)?;
        for peer in peers {
            ensure!(
                peer.allowed == expected,
                "{leader} allows {:?}, expected {expected:?}",
                peer.allowed
            );
            let age = now.saturating_sub(peer.handshake);
            ensure!(age < 180, "{leader}: the last handshake is {age} s old");
            ensure!(
                leader == MASTER || peer.keepalive == "25",
                "{leader} behind NAT has keepalive {}",
                peer.keepalive
            );
            summary.push(format!("{leader}: {age} s, {}", peer.endpoint));
        }
    }
    let follower = claims::wg_show(lab, FOLLOWER)?;
    ensure!(follower.is_empty(), "{FOLLOWER} has {follower:?}");
    Ok(summary.join("; "))
}

/// Routes, rules and the firewall stay when an agent ends, so that the next one finds them. The tunnel pauses
/// without a leader's process; without a follower's nothing is lost.
fn terminated(lab: &mut Lab) -> anyhow::Result<String> {
    let before = claims::own_state(lab, FOLLOWER)?;
    let stream = stream(lab, "pod@node-agent-03", "pod@node-master")?;
    sleep(Duration::from_millis(300));
    lab.take_agent(FOLLOWER)?.stop()?;
    sleep(Duration::from_secs(1));
    let after = claims::own_state(lab, FOLLOWER)?;
    let report = stream.stop()?;
    ensure!(before == after, "before:\n{before}\nafter:\n{after}");
    ensure!(report.lost() == 0, "{report}");
    Ok(report.to_string())
}

/// `--clean-up` and `--clean-up-interface`, which Kilo has on and off by default, and this agent off.
fn terminated_with_clean_up(
    lab: &mut Lab,
    mesh: &Mesh<'_>,
    before: &Dumps,
) -> anyhow::Result<String> {
    let mut flags = mesh.flags.to_vec();
    flags.extend(["--clean-up=true", "--clean-up-interface=true"]);
    for node in [FOLLOWER, LEADER] {
        if node == LEADER {
            lab.take_agent(node)?.stop()?;
        }
        lab.start_agent(mesh.binary, node, mesh.access, &flags)?;
        lab.wait_agents(Duration::from_secs(120))?;
        lab.take_agent(node)?.stop()?;
        let mut difference = String::new();
        let outcome = wait_for("the dump to be as before", Duration::from_secs(10), || {
            difference = match Dumps::take_of(lab, &[node.to_owned()]) {
                Ok(now) => now.difference(before),
                Err(error) => error.to_string(),
            };
            difference.is_empty()
        });
        outcome.with_context(|| difference.clone())?;
        let object = lab.api().get(&format!("/api/v1/nodes/{node}"))?;
        let annotations = object["metadata"]["annotations"].to_string();
        for own in ["kilo.squat.ai/key", "kilo.squat.ai/endpoint"] {
            ensure!(
                !annotations.contains(&format!("\"{own}\"")),
                "{annotations}"
            );
        }
    }
    Ok(String::new())
}

struct Listening(Capture);

impl selvedge_lab::steps::Outcome for Listening {
    fn detail(&self) -> String {
        String::new()
    }
}

fn stream(lab: &Lab, from: &str, to: &str) -> anyhow::Result<Stream> {
    let (from, to) = (lab.place(from)?, lab.place(to)?);
    Stream::start_warm(&from.namespace, SocketAddr::from((to.address, PORT)))
}

/// Pod traffic from the cloud to the data centre, recognisable wherever it is readable.
fn leak_something(lab: &Lab) -> anyhow::Result<()> {
    let from = lab.place("pod@node-master")?;
    let to = lab.place("pod@node-agent-01")?;
    for _ in 0..20 {
        shout(&from.namespace, SocketAddr::from((to.address, PORT)))?;
        sleep(Duration::from_millis(20));
    }
    Ok(())
}
