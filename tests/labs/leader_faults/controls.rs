//! The controls: with one leader a region the same faults last until they are mended, and the captures see a
//! leak.

use std::net::SocketAddr;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use selvedge_lab::Steps;
use selvedge_lab::controlplane::POD_NETWORK;
use selvedge_lab::traffic::flows::{FlowReport, PORT, now};
use selvedge_lab::traffic::shout;

use super::fault::{FAULTS, Fault};
use super::field::Field;
use super::measure::{UNDER_WAY, Worst};
use super::{LEADER, MASTER, MEMBER, thorough};

/// What is silent for longer is silent for ever.
const NEVER: Duration = Duration::from_secs(10);

/// One fault of each kind: a leader that is dead, cut off and sick.
const KINDS: [&str; 3] = [
    "a_leaders_agent_is_killed",
    "what_a_leader_sends_into_its_tunnels_is_lost",
    "a_leaders_kernel_forwards_nothing",
];

pub(super) fn all(steps: &mut Steps, field: &mut Field) {
    for fault in &FAULTS {
        let far = !fault.victims.contains(&LEADER);
        if far || (!thorough() && !KINDS.contains(&fault.name)) {
            continue;
        }
        let name = format!("with_one_leader_{}_and_no_flow_comes_back", fault.name);
        steps.step(&name, || never(field, fault));
    }
    steps.step("with_one_leader_its_end_is_felt_until_it_is_back", || {
        terminated(field)
    });
    steps.step("without_our_state_the_captures_see_clear_packets", || {
        leak(field)
    });
}

fn crosses(flow: &FlowReport) -> bool {
    flow.from.node == MEMBER || flow.to.node == MEMBER
}

fn never(field: &mut Field, fault: &Fault) -> anyhow::Result<String> {
    field.lead_by(1)?;
    let flows = field.flows()?;
    field.settle(&flows, |_| true)?;
    let capture = field.capture(&format!("one-{}", fault.name))?;
    let begin = now();
    (fault.make)(field, LEADER)?;
    sleep(NEVER + Duration::from_secs(1));
    let end = now();
    sleep(UNDER_WAY);
    let reports = flows.report(&(begin..end));
    (fault.mend)(field, LEADER)?;
    field.count()?;
    let kept = |node: &str| !fault.renews_pod || node != LEADER;
    field.settle(&flows, |end| kept(&end.node))?;
    field.nothing_in_clear(capture)?;
    let felt = Worst::of(&reports, crosses);
    ensure!(felt.gap > NEVER, "a flow came back: {felt}\n{}", felt.which);
    Ok(felt.to_string())
}

fn terminated(field: &mut Field) -> anyhow::Result<String> {
    field.lead_by(1)?;
    let flows = field.flows()?;
    field.settle(&flows, |_| true)?;
    let begin = now();
    field.lab.take_agent(LEADER)?.stop()?;
    sleep(Duration::from_secs(2));
    field.start_agent(LEADER)?;
    field.settle(&flows, |_| true)?;
    let end = now();
    let felt = Worst::of(&flows.report(&(begin..end)), crosses);
    ensure!(felt.gap > Duration::from_secs(1), "{felt}");
    Ok(felt.to_string())
}

/// The captures see a packet in clear once what Selvedge installed on a node is gone.
fn leak(field: &mut Field) -> anyhow::Result<String> {
    field.lab.take_agent(MASTER)?.kill();
    let master = field.lab.node(MASTER)?;
    master.run("ip rule add priority 1 lookup main")?;
    master.run("nft delete table inet selvedge")?;
    let capture = field.capture("leak")?;
    let from = field.lab.place(&format!("pod@{MASTER}"))?;
    let to = field.lab.place(&format!("pod@{MEMBER}"))?;
    for _ in 0..20 {
        shout(&from.namespace, SocketAddr::from((to.address, PORT)))?;
        sleep(Duration::from_millis(20));
    }
    let findings = capture.finish(POD_NETWORK.parse()?)?;
    field.lab.node(MASTER)?.run("ip rule delete priority 1")?;
    field.start_agent(MASTER)?;
    ensure!(
        findings.magic > 0 && !findings.nothing_in_clear(),
        "{findings}"
    );
    let flows = field.flows()?;
    field.settle(&flows, |_| true).context("afterwards")?;
    Ok(findings.to_string())
}
