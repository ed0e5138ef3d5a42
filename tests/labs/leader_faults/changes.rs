//! What is no fault, or should not count as one: a leader that ends, another leader, a bad line, a loose plug.

use std::fmt::Write as _;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use selvedge_lab::traffic::flows::{FlowReport, Flows, now};

use super::field::Field;
use super::measure::{UNDER_WAY, Worst};
use super::paths::watched;
use super::{FACTOR, LEADER, MASTER, MEMBER, PUBLIC, SECOND, at_most, thorough};

/// How many datagrams may be lost where none should be, on a machine that is busy.
pub(super) const LOST: usize = 5;

/// How far apart agents may see a change of the cluster.
pub(super) const APART: Duration = Duration::from_millis(200);

const MINUTE: Duration = Duration::from_secs(60);

/// The worst of the flows while something is done, and for a second after.
pub(super) fn during(
    field: &mut Field,
    flows: &Flows,
    wanted: impl Fn(&FlowReport) -> bool,
    work: impl FnOnce(&mut Field) -> anyhow::Result<()>,
) -> anyhow::Result<Worst> {
    let begin = now();
    work(field)?;
    sleep(Duration::from_secs(1));
    let end = now();
    sleep(UNDER_WAY);
    Ok(Worst::of(&flows.report(&(begin..end)), wanted))
}

/// A leader that gets SIGTERM has others take over before it ends.
pub(super) fn terminated(field: &mut Field) -> anyhow::Result<String> {
    field.lead_by(2)?;
    let mut told = Vec::new();
    let victims: &[&str] = if thorough() {
        &[SECOND, PUBLIC, LEADER, MASTER, SECOND]
    } else {
        &[SECOND]
    };
    for victim in victims {
        let flows = field.flows()?;
        field.settle(&flows, |_| true)?;
        let capture = field.capture(&format!("terminated-{victim}"))?;
        let others = |flow: &FlowReport| flow.from.node != *victim && flow.to.node != *victim;
        let down = during(field, &flows, others, |field| {
            field.lab.take_agent(victim)?.stop()?;
            Ok(())
        })?;
        let up = during(field, &flows, others, |field| {
            field.start_agent(victim)?;
            field.settle(&flows, |_| true)?;
            Ok(())
        })?;
        field.nothing_in_clear(capture)?;
        let line = format!("{victim}: it ends: {down}; it starts: {up}");
        ensure!(
            down.lost <= LOST && up.lost <= LOST,
            "{line}\n{}\n{}",
            down.which,
            up.which
        );
        told.push(line);
    }
    Ok(told.join("; "))
}

/// The operator's choice moves from one leader to the follower, and back.
pub(super) fn annotation_moved(field: &mut Field) -> anyhow::Result<String> {
    field.lead_by(2)?;
    let flows = field.flows()?;
    field.settle(&flows, |_| true)?;
    let capture = field.capture("annotation")?;
    let mut told = String::new();
    let count = if thorough() { 5 } else { 1 };
    let before = [LEADER, SECOND, MASTER, PUBLIC];
    let after = [MEMBER, SECOND, MASTER, PUBLIC];
    let mut worst = Worst::default();
    for (leaders, newcomer) in [(after, MEMBER), (before, LEADER)]
        .iter()
        .cycle()
        .take(2 * count)
    {
        let felt = during(
            field,
            &flows,
            |_| true,
            |field| {
                field.annotate_these(leaders)?;
                sleep(Duration::from_secs(4));
                Ok(())
            },
        )?;
        let link = field.lab.node(newcomer)?;
        let link = link.run("ip -br link show dev kilo0 up")?;
        ensure!(!link.is_empty(), "{newcomer} does not lead");
        write!(told, "{newcomer} leads: {felt}; ")?;
        if felt.lost > worst.lost {
            worst = felt;
        }
    }
    field.settle(&flows, |_| true)?;
    field.nothing_in_clear(capture)?;
    if worst.lost > LOST {
        // Agents that are busy see the change apart.
        at_most("the longest gap", worst.gap, APART)
            .with_context(|| format!("{told}\n{}", worst.which))?;
    }
    Ok(told)
}

/// Of what crosses the border of the region, each tenth packet is lost.
pub(super) fn random_loss(field: &mut Field) -> anyhow::Result<String> {
    field.lead_by(2)?;
    let lasting = if thorough() { MINUTE * 5 } else { MINUTE / 3 };
    let flows = field.flows()?;
    field.settle(&flows, |_| true)?;
    let capture = field.capture("loss")?;
    let router = field.lab.network().router("nat1")?;
    let nodes = [MEMBER, LEADER, SECOND, MASTER, PUBLIC];
    let begin = now();
    let (done, histories) = watched(&field.lab, &nodes, || {
        router.sh("nft add table ip lost
             nft add chain ip lost forwarded '{ type filter hook forward priority 0; }'
             nft add rule ip lost forwarded iifname wan numgen random mod 10 == 0 drop
             nft add rule ip lost forwarded oifname wan numgen random mod 10 == 0 drop")?;
        sleep(lasting);
        router.run("nft delete table ip lost")
    });
    let end = now();
    done?;
    sleep(UNDER_WAY);
    let felt = Worst::of(&flows.report(&(begin..end)), |_| true);
    field.settle(&flows, |_| true)?;
    field.nothing_in_clear(capture)?;
    let changes: usize = histories.values().map(|history| history.changes()).sum();
    let text = format!("{changes} changes in {lasting:?}; {felt}");
    ensure!(changes == 0, "{text}\n{}", told(&histories));
    Ok(text)
}

/// A leader's link is off for two seconds and on for two.
pub(super) fn flapping(field: &mut Field) -> anyhow::Result<String> {
    field.lead_by(2)?;
    const HALF: Duration = Duration::from_secs(2);
    let cycles = if thorough() { 30 } else { 5 };
    let flows = field.flows()?;
    field.settle(&flows, |_| true)?;
    let capture = field.capture("flapping")?;
    let network = field.lab.network();
    let begin = now();
    let nodes = [MEMBER, SECOND, MASTER, PUBLIC];
    let (done, histories) = watched(&field.lab, &nodes, || {
        for _ in 0..cycles {
            network.plug(LEADER, false)?;
            sleep(HALF);
            network.plug(LEADER, true)?;
            sleep(HALF);
        }
        anyhow::Ok(())
    });
    done?;
    let end = now();
    sleep(UNDER_WAY);
    let others = |flow: &FlowReport| flow.from.node != LEADER && flow.to.node != LEADER;
    let felt = Worst::of(&flows.report(&(begin..end)), others);
    field.nothing_in_clear(capture)?;
    let most = histories
        .iter()
        .max_by_key(|(_, history)| history.changes());
    let (node, history) = most.context("no node was looked at")?;
    let changes = history.changes();
    let minutes = ((HALF * 2 * cycles).as_secs_f64() / 60.0).max(1.0);
    let promised = 3.0 * minutes;
    let text = format!(
        "at most {changes} changes ({node}) in {:?}; {felt}",
        HALF * 2 * cycles
    );
    ensure!(
        changes as f64 <= promised * f64::from(FACTOR),
        "{text}\n{}",
        told(&histories)
    );
    // The control: the paths did change.
    ensure!(changes > 0, "{text}");
    Ok(text)
}

fn told(histories: &std::collections::BTreeMap<String, super::paths::History>) -> String {
    let mut text = String::new();
    for (node, history) in histories {
        text += &format!("[{node}]{history}\n");
    }
    text
}
