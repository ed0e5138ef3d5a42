//! A node boots: flannel and pods are up before the agent, or the agent never starts. What the agent
//! guarded before stays guarded, on a real flannel and a real kube-apiserver.
//!
//! Senders of UDP ignore errors, and a capture on the internet finds packets in clear. Each node boots
//! without the guard first, as the control: there the capture must find some.
#![expect(
    clippy::disallowed_methods,
    reason = "a test may wait and read the clock"
)]

use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use selvedge_lab::capture::{Capture, Findings};
use selvedge_lab::claims;
use selvedge_lab::controlplane::POD_NETWORK;
use selvedge_lab::lab::{Mesh, Options};
use selvedge_lab::netns::within_path;
use selvedge_lab::topology::{FOLLOWER_OF_TWO as FOLLOWER, LEADER, MASTER, Shape, Third};
use selvedge_lab::traffic::{MAGIC, PORT, Servers};
use selvedge_lab::{Lab, Steps, wait_for};

const SELVEDGE: &str = env!("CARGO_BIN_EXE_selvedge");
const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/selvedge-k3s.yaml");
const STATE: &str = "/var/lib/selvedge";

const FAR: &str = "node-third-02";

/// How long to send and capture while a node has no agent.
const LOOK: Duration = Duration::from_secs(3);
/// The longest that anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn mesh() -> Mesh<'static> {
    Mesh::annotated(Path::new(SELVEDGE), Path::new(MANIFEST))
}

fn main() -> ExitCode {
    let mut steps = Steps::from_args("boot_guard");
    run(&mut steps);
    steps.finish()
}

fn run(steps: &mut Steps) -> Option<()> {
    let options = Options {
        shape: Shape {
            third: Third::Distinct,
            ..Shape::default()
        },
        ..Options::default()
    };
    let (mut lab, servers) = steps.cluster("the_cluster_comes_up", "boot", options)?;
    let mut servers = vec![servers];

    steps.required(
        "at_the_first_boot_packets_leave_in_clear_until_the_agents_first_pass",
        || first_boot(&mut lab),
    )?;
    steps.required("every_agent_writes_its_guard_file", || {
        for name in lab.node_names() {
            let file = lab.node(&name)?.outside(&format!("{STATE}/guard.json"));
            wait_for(&format!("{name}'s guard.json"), PATIENCE, || file.exists())?;
        }
        // Changes within five seconds of the first are written together.
        sleep(Duration::from_secs(6));
        Ok(String::new())
    })?;
    steps.step("beside_a_running_agent_the_guard_does_nothing", || {
        let before = claims::own_state(&lab, FOLLOWER)?;
        let output = guard(&lab, FOLLOWER)?;
        ensure!(output.contains("the agent runs"), "{output}");
        ensure!(
            claims::own_state(&lab, FOLLOWER)? == before,
            "the guard changed the agent's state"
        );
        Ok(String::new())
    });
    for node in [MASTER, LEADER, FOLLOWER] {
        let name = node.replace('-', "_");
        steps.step(
            &format!("without_the_guard_{name}_boots_and_sends_in_clear"),
            || boots_unguarded(&mut lab, node),
        );
        steps.step(
            &format!("with_the_guard_{name}_boots_and_sends_nothing_in_clear"),
            || boots_guarded(&mut lab, &mut servers, node),
        );
    }
    steps.step("after_cleanup_nothing_is_guarded", || {
        lab.take_agent(FOLLOWER)?.stop()?;
        let mut command = Command::new(SELVEDGE);
        command.arg("cleanup");
        let output = lab.node(FOLLOWER)?.output(command)?;
        ensure!(output.status.success(), "{output:?}");
        let output = guard(&lab, FOLLOWER)?;
        ensure!(output.contains("nothing to guard"), "{output}");
        let rules = lab.node(FOLLOWER)?.run("ip rule")?;
        ensure!(!rules.contains("513"), "{rules}");
        Ok(String::new())
    });
    Some(())
}

/// Flannel and pods are up and no agent ever ran: measures how many packets leave in clear, and until when.
fn first_boot(lab: &mut Lab) -> anyhow::Result<String> {
    let mesh = mesh();
    lab.kubectl_apply(mesh.manifest)?;
    lab.annotate_nodes()?;
    let capture = capture(lab, "first")?;
    let sender = Sender::start(lab, &format!("pod@{MASTER}"), &[&format!("pod@{LEADER}")])?;
    sleep(Duration::from_secs(1));
    // The master's agent first, because the master's pod sends.
    lab.start_agent(mesh.binary, MASTER, mesh.access, mesh.flags)?;
    let begun = SystemTime::now().duration_since(UNIX_EPOCH)?;
    for name in lab.node_names().iter().filter(|name| *name != MASTER) {
        lab.start_agent(mesh.binary, name, mesh.access, mesh.flags)?;
    }
    lab.wait_agents(Duration::from_secs(120))?;
    let (sent, _) = sender.stop();
    let findings = capture.finish(POD_NETWORK.parse()?)?;
    let last = findings
        .last_magic
        .context("the control saw nothing in clear")?;
    let window = last.saturating_sub(begun);
    ensure!(
        window < PATIENCE,
        "in clear for {window:?} after the agent's start"
    );
    Ok(format!(
        "captured in clear {} times ({sent} datagrams): before the agent, and for {} ms after its start",
        findings.magic,
        window.as_millis()
    ))
}

/// The control run.
fn boots_unguarded(lab: &mut Lab, node: &str) -> anyhow::Result<String> {
    lab.power_off(node)?;
    let capture = capture(lab, &format!("unguarded-{node}"))?;
    let host = from_host(lab, node)?;
    lab.power_on(node)?;
    let pod = from_pod(lab, node)?;
    sleep(LOOK);
    let (sent, _) = pod.stop();
    let (from_host, _) = host.stop();
    let findings = capture.finish(POD_NETWORK.parse()?)?;
    ensure!(findings.magic > 0 && findings.vxlan > 0, "{findings}");
    Ok(format!(
        "captured in clear {} times ({} datagrams), {} times as VXLAN",
        findings.magic,
        sent + from_host,
        findings.vxlan
    ))
}

fn boots_guarded(lab: &mut Lab, servers: &mut Vec<Servers>, node: &str) -> anyhow::Result<String> {
    lab.power_off(node)?;
    let begun = Instant::now();
    let output = guard(lab, node)?;
    let time = begun.elapsed();
    ensure!(output.contains("guard this node until"), "{output}");

    let silent = capture(lab, &format!("guarded-{node}"))?;
    let host = from_host(lab, node)?;
    lab.power_on(node)?;
    let pod = from_pod(lab, node)?;
    // For the next node that boots.
    servers.push(Servers::start(&[lab.place(&format!("pod@{node}"))?])?);
    sleep(LOOK);
    // A kubelet must get through, or no agent would start.
    let server = SocketAddr::from((lab.options().shape.master_public(), 6443));
    let reached = within_path(&lab.node(node)?.namespace().path(), || {
        TcpStream::connect_timeout(&server, Duration::from_secs(5))
    })?;
    reached.context("the API server cannot be reached from the host")?;
    // An agent that cannot start, as with an image that cannot be pulled, changes nothing.
    let mesh = mesh();
    let flags = [mesh.flags, &["--mtu=nonsense"]].concat();
    lab.start_agent(mesh.binary, node, mesh.access, &flags)?;
    let ended = lab.take_agent(node)?.wait(PATIENCE)?;
    ensure!(ended.code() == Some(64), "the agent ended with {ended}");
    sleep(LOOK);
    let findings = silent.finish(POD_NETWORK.parse()?)?;
    quiet(&findings)?;

    let started = capture(lab, &format!("started-{node}"))?;
    lab.start_agent(mesh.binary, node, mesh.access, mesh.flags)?;
    let far = if node == MASTER { LEADER } else { MASTER };
    let (from, to) = (format!("pod@{node}"), format!("pod@{far}"));
    // A packet that arrives and is not in clear on the internet came through the tunnel.
    let joined = claims::reached_within(lab, &from, &to, PATIENCE)
        .with_context(|| lab.tail(node, "agent"))?;
    lab.wait_agents(Duration::from_secs(120))?;
    let (sent, refused) = pod.stop();
    let (from_host, refused_host) = host.stop();
    let findings = started.finish(POD_NETWORK.parse()?)?;
    quiet(&findings)?;
    Ok(format!(
        "captured in clear 0 times ({} datagrams, {} refused at the host itself); guarded in {} ms, joined {:.1} s after the agent's start",
        sent + from_host,
        refused + refused_host,
        time.as_millis(),
        joined.as_secs_f64()
    ))
}

fn quiet(findings: &Findings) -> anyhow::Result<()> {
    ensure!(findings.nothing_in_clear(), "{findings}");
    Ok(())
}

/// Runs the guard as systemd would.
fn guard(lab: &Lab, node: &str) -> anyhow::Result<String> {
    let mut command = Command::new(SELVEDGE);
    command.env_clear().arg("guard");
    let output = lab.node(node)?.output(command)?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{complaint}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// From a node's pod to pods of both other regions.
fn from_pod(lab: &Lab, node: &str) -> anyhow::Result<Sender> {
    let other = if node == MASTER { FOLLOWER } else { MASTER };
    let targets = [format!("pod@{other}"), format!("pod@{FAR}")];
    Sender::start(
        lab,
        &format!("pod@{node}"),
        &targets.each_ref().map(String::as_str),
    )
}

/// From a node's host, from before flannel comes up, to a pod and a node of another region.
fn from_host(lab: &Lab, node: &str) -> anyhow::Result<Sender> {
    Sender::start(lab, node, &[&format!("pod@{FAR}"), FAR])
}

fn capture(lab: &Lab, name: &str) -> anyhow::Result<Capture> {
    let file = lab.directory().join(format!("{name}.pcap"));
    Capture::start(lab.network().internet(), &file)
}

/// Sends recognisable datagrams every two milliseconds, whatever errors the network returns.
struct Sender {
    end: Arc<AtomicBool>,
    refused: Arc<AtomicU32>,
    thread: JoinHandle<u32>,
}

impl Sender {
    fn start(lab: &Lab, from: &str, to: &[&str]) -> anyhow::Result<Self> {
        let from = lab.place(from)?;
        let to = to.iter().map(|to| Ok(lab.place(to)?.address));
        let to = to.collect::<anyhow::Result<Vec<IpAddr>>>()?;
        let socket = within_path(&from.namespace, || UdpSocket::bind(("0.0.0.0", 0)))??;
        let (end, refused) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU32::new(0)),
        );
        let thread = {
            let (end, refused) = (Arc::clone(&end), Arc::clone(&refused));
            std::thread::spawn(move || {
                let mut sent = 0;
                while !end.load(Ordering::Relaxed) {
                    for to in &to {
                        sent += 1;
                        if socket.send_to(&MAGIC.repeat(4), (*to, PORT)).is_err() {
                            refused.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    sleep(Duration::from_millis(2));
                }
                sent
            })
        };
        Ok(Self {
            end,
            refused,
            thread,
        })
    }

    /// How many were sent, and how many of them the sender's own host refused.
    fn stop(self) -> (u32, u32) {
        self.end.store(true, Ordering::Relaxed);
        let sent = self.thread.join().unwrap_or_default();
        (sent, self.refused.load(Ordering::Relaxed))
    }
}
