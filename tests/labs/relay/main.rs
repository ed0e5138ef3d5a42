//! Two regions that do not reach each other, and talk through a third: the relay sees nothing of it, another relay takes
//! over, and the direct way is taken as soon as there is one.
//!
//! ```text
//!    region nd,    behind a symmetric NAT: node-agent-01, which leads, and -02
//!    region third, behind a symmetric NAT: node-third-01, which leads, and -02
//!    region default, and region cloud-1, both public: node-master, and node-cloud1-01
//! ```
//!
//! Real flannel, a real kube-apiserver, real NATs. A step fails at five times of what is promised, since CI machines are
//! slow, and prints what it measured.
#![expect(
    clippy::disallowed_methods,
    reason = "a test may run programs and wait"
)]

use std::net::SocketAddr;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use selvedge_lab::capture::Capture;
use selvedge_lab::claims::{self, By};
use selvedge_lab::controlplane::POD_NETWORK;
use selvedge_lab::topology::{FOLLOWER, LEADER, MASTER, THIRD_LEADER};
use selvedge_lab::traffic::flows::{PORT, now};
use selvedge_lab::traffic::shout;
use selvedge_lab::{Steps, wait_for};

mod field;
mod throughput;

use field::Field;

/// The follower of the third region.
const THIRD_FOLLOWER: &str = "node-third-02";
/// The nodes of the regions that may relay.
const RELAYS: [&str; 2] = [MASTER, "node-cloud1-01"];

/// How much longer than promised something may take on a slow machine.
const FACTOR: u32 = 5;
/// Another relay carries the flows after this time.
const FAILOVER: Duration = Duration::from_secs(2);
/// How much of the direct throughput a relay leaves.
const SHARE: f64 = 0.45;
/// How many datagrams may be lost where none should be, on a machine that is busy.
const LOST: usize = 5;
/// How long the mesh may take to follow a change on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// What was sent this recently may still be under way.
const UNDER_WAY: Duration = Duration::from_millis(300);
/// For how long flows are captured.
const LISTENING: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    let mut steps = Steps::from_args("relay");
    run(&mut steps);
    steps.finish()
}

fn run(steps: &mut Steps) -> Option<()> {
    let (lab, _servers) = steps.cluster("the_cluster_comes_up", "relay", field::options())?;
    let mut field = Field::new(lab);
    steps.required("the_agents_become_ready", || field.join())?;
    steps.required(
        "two_regions_behind_symmetric_nats_reach_each_other_through_a_relay",
        || reached_through_a_relay(&field),
    )?;
    steps.step("all_pods_and_hosts_reach_each_other", || {
        claims::all_places_come_to_reach_each_other(field.lab(), By::OwnAddress, PATIENCE)
    });
    steps.step("pods_keep_their_address_through_a_relay", || {
        claims::pods_keep_their_address(field.lab())
    });
    steps.step("the_relay_node_sees_no_packet_of_the_two_regions", || {
        relay_sees_nothing(&field)
    });
    steps.step("a_packet_that_is_routed_in_plain_is_seen_there", || {
        plain_packet_is_seen(&field)
    });
    let mut relayed = None;
    steps.step("tcp_goes_through_the_relay", || {
        let rate = throughput::measure(field.lab(), LEADER, THIRD_LEADER)?;
        relayed = Some(rate);
        Ok(format!("{rate:.0} Mbit/s"))
    });
    steps.step("the_relays_leader_is_killed_and_another_takes_over", || {
        relay_killed(&mut field)
    });
    steps.step(
        "the_nats_become_cones_and_the_direct_way_is_taken_without_loss",
        || nats_become_cones(&field),
    );
    steps.step("a_relay_leaves_most_of_the_throughput", || {
        let relayed = relayed.context("the relay's throughput was not measured")?;
        let direct = throughput::measure(field.lab(), LEADER, THIRD_LEADER)?;
        let share = relayed / direct;
        let text =
            format!("{relayed:.0} of {direct:.0} Mbit/s: {share:.2} of direct, {SHARE} wanted");
        ensure!(share >= SHARE / f64::from(FACTOR), "{text}");
        Ok(text)
    });
    Some(())
}

fn reached_through_a_relay(field: &Field) -> anyhow::Result<String> {
    let waited = wait_for("relayed endpoints", PATIENCE, || field.is_relayed());
    let waited = waited.with_context(|| field.evidence())?;
    let (from, to) = (format!("pod@{FOLLOWER}"), format!("pod@{THIRD_FOLLOWER}"));
    for (from, to) in [(&from, &to), (&to, &from)] {
        claims::reached_within(field.lab(), from, to, PATIENCE)
            .with_context(|| field.evidence())?;
    }
    Ok(format!("after {waited:.1?}"))
}

/// Begins to capture on all links of a node what is between the pods of two nodes' regions, and what holds the magic bytes.
fn listen(field: &Field, node: &str, name: &str) -> anyhow::Result<Capture> {
    let file = field.lab().directory().join(format!("{name}.pcap"));
    Capture::start(field.lab().node(node)?.namespace(), &file)
}

fn relay_sees_nothing(field: &Field) -> anyhow::Result<String> {
    let flows = field.flows()?;
    field.settle(&flows)?;
    let relay = field.relay()?;
    let in_the_node = listen(field, relay, "relay")?;
    let internet = field.lab().capture_internet("relayed")?;
    let begin = now();
    sleep(LISTENING);
    let end = now();
    sleep(UNDER_WAY);
    let felt = field::worst(&flows, &(begin..end));
    drop(flows);
    let file = in_the_node.file().to_owned();
    let findings = in_the_node.finish(POD_NETWORK.parse()?)?;
    let carried = findings.udp.get(&51820).copied().unwrap_or_default();
    ensure!(
        findings.magic == 0 && findings.vxlan == 0,
        "{relay}: {findings}"
    );
    // Echoes of this node itself have pods' addresses. Those of the two regions' pods are not among them.
    let inner = field.inner_packets(&file)?;
    ensure!(inner == 0, "{relay}: {inner} packets of the two regions");
    // Each datagram is seen four times: on the wire and on the tunnel's link, in and out.
    ensure!(
        carried > felt.sent,
        "{relay} carried {carried} datagrams of {}",
        felt.sent
    );
    let internet = internet.finish(POD_NETWORK.parse()?)?;
    ensure!(internet.nothing_in_clear(), "in clear: {internet}");
    Ok(format!(
        "{relay}: {carried} of the tunnel's datagrams, none readable; {felt}"
    ))
}

/// The control: what the relay's node routes for its own pod is seen.
fn plain_packet_is_seen(field: &Field) -> anyhow::Result<String> {
    let relay = field.relay()?;
    let capture = listen(field, relay, "plain")?;
    let to = SocketAddr::from((field.lab().pod(relay)?.address(), PORT));
    let from = field.lab().pod(LEADER)?.namespace().path();
    wait_for("a packet", PATIENCE, || shout(&from, to).is_ok())?;
    sleep(UNDER_WAY);
    let findings = capture.finish(POD_NETWORK.parse()?)?;
    ensure!(
        findings.magic > 0 && findings.pod_addresses > 0,
        "{findings}"
    );
    Ok(findings.to_string())
}

fn relay_killed(field: &mut Field) -> anyhow::Result<String> {
    let flows = field.flows()?;
    field.settle(&flows)?;
    let relay = field.relay()?;
    let internet = field.lab().capture_internet("killed")?;
    let begin = now();
    field.kill_agent(relay)?;
    let settled = field.settle(&flows);
    sleep(Duration::from_secs(1));
    let end = now();
    sleep(UNDER_WAY);
    let felt = field::worst(&flows, &(begin..end));
    let settled = settled.with_context(|| format!("{relay} is dead: {felt}"))?;
    let other = field.relay()?;
    field.start_agent(relay)?;
    ensure!(other != relay, "{relay} still relays");
    let internet = internet.finish(POD_NETWORK.parse()?)?;
    ensure!(internet.nothing_in_clear(), "in clear: {internet}");
    let text = format!("{other} in place of {relay}: {felt}; settled after {settled:.1?}");
    ensure!(
        felt.gap <= FAILOVER * FACTOR,
        "{text}\n{}",
        field.evidence()
    );
    Ok(text)
}

fn nats_become_cones(field: &Field) -> anyhow::Result<String> {
    let flows = field.flows()?;
    field.settle(&flows)?;
    ensure!(
        field.is_relayed(),
        "not relayed before\n{}",
        field.evidence()
    );
    let internet = field.lab().capture_internet("cones")?;
    let begin = now();
    field.make_cones()?;
    let waited = wait_for("direct endpoints", PATIENCE, || field.is_direct());
    let waited = waited.with_context(|| field.evidence())?;
    // Until nothing refers to the relay any more.
    sleep(Duration::from_secs(5));
    let end = now();
    sleep(UNDER_WAY);
    let felt = field::worst(&flows, &(begin..end));
    ensure!(
        field.is_direct(),
        "not direct any more\n{}",
        field.evidence()
    );
    ensure!(field.carried_by_relays()? == 0, "a relay still carries");
    let internet = internet.finish(POD_NETWORK.parse()?)?;
    ensure!(internet.nothing_in_clear(), "in clear: {internet}");
    let text = format!("direct after {waited:.1?}; {felt}");
    ensure!(felt.lost <= LOST, "{text}\n{}", field.evidence());
    Ok(text)
}
