//! What flows feel of a fault: while it lasts, and when it ends.

use std::fmt;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use selvedge_lab::traffic::flows::{End, FlowReport, Flows, now};

use super::fault::Fault;
use super::field::Field;
use super::{FACTOR, at_most, thorough};

/// How often a fault is repeated for a median.
const REPETITIONS: usize = 5;
/// A fault lasts at least this long, so that it is noticed even where nothing is lost at first.
const LASTING: Duration = Duration::from_secs(3);
/// What flows without a gap of [`STEADY_GAP`] for this long has recovered.
const STEADY: Duration = Duration::from_secs(1);
const STEADY_GAP: Duration = Duration::from_millis(200);
/// Flows through the other leader feel nothing, but for the machine's own pauses.
const UNTOUCHED: Duration = Duration::from_millis(50);

/// What flows felt, but for those of a pod that the fault cuts off.
#[derive(Clone, Debug)]
pub(super) struct Felt {
    /// By flows through the leader.
    pub(super) through: Worst,
    /// By flows through other leaders only.
    past: Worst,
    /// By all, when the fault ended.
    back: Worst,
    /// How long after the end all paths were in use again.
    settled: Duration,
    /// What the nodes knew, where something was wrong.
    evidence: String,
}

/// The worst of some flows.
#[derive(Clone, Debug, Default)]
pub(super) struct Worst {
    flows: usize,
    pub(super) lost: usize,
    pub(super) gap: Duration,
    pub(super) which: String,
}

impl Worst {
    /// Of those of the flows that are wanted.
    pub(super) fn of(reports: &[FlowReport], wanted: impl Fn(&FlowReport) -> bool) -> Self {
        let mut worst = Self::default();
        for report in reports.iter().filter(|report| wanted(report)) {
            worst.flows += 1;
            worst.lost += report.lost;
            if report.gap > worst.gap {
                worst.gap = report.gap;
                worst.which = report.to_string();
            }
        }
        worst
    }
}

impl fmt::Display for Worst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            flows, lost, gap, ..
        } = self;
        write!(f, "{gap:.2?}, {lost} lost of {flows} flows")
    }
}

impl fmt::Display for Felt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            through,
            past,
            back,
            settled,
            ..
        } = self;
        write!(
            f,
            "longest gap {through}; past it {past}; at the end {back}, all paths after {settled:.1?}"
        )
    }
}

/// A fault of each victim in turn, with two leaders a region.
pub(super) fn repeated(field: &mut Field, fault: &Fault) -> anyhow::Result<String> {
    field.lead_by(2)?;
    let count = if thorough() { REPETITIONS } else { 1 };
    let mut all = Vec::new();
    for victim in fault.victims.iter().cycle().take(count) {
        let felt = once(field, fault, victim).with_context(|| (*victim).to_owned())?;
        if count > 1 {
            eprintln!("{victim}: {felt}");
        }
        all.push(felt);
    }
    let summary = match &all[..] {
        [felt] => format!("{}: {felt}", fault.victims[0]),
        _ => {
            let median = |of: fn(&Felt) -> Duration| {
                let mut times: Vec<_> = all.iter().map(of).collect();
                times.sort();
                format!(
                    "{:.2?} (longest {:.2?})",
                    times[times.len() / 2],
                    times[times.len() - 1]
                )
            };
            format!(
                "{count} times, medians: longest gap {}; past it {}; at the end {}; all paths after {}",
                median(|felt| felt.through.gap),
                median(|felt| felt.past.gap),
                median(|felt| felt.back.gap),
                median(|felt| felt.settled)
            )
        }
    };
    for felt in &all {
        let why = || {
            let Felt {
                through,
                past,
                back,
                evidence,
                ..
            } = felt;
            format!(
                "{summary}\n{}\n{}\n{}\n{evidence}",
                through.which, past.which, back.which
            )
        };
        at_most("the longest gap", felt.through.gap, fault.promised).with_context(why)?;
        // Where nothing is lost, packets waited for the machine.
        if felt.past.lost > 0 {
            at_most("the longest gap past it", felt.past.gap, UNTOUCHED).with_context(why)?;
        }
        at_most("the longest gap at the end", felt.back.gap, fault.promised).with_context(why)?;
    }
    Ok(summary)
}

fn once(field: &mut Field, fault: &Fault, victim: &str) -> anyhow::Result<Felt> {
    let flows = field.flows()?;
    field.settle(&flows, |_| true)?;
    let carried = field.carried_steadily()?;
    let own = carried.get(victim).context("it does not lead")?;
    let apart = |node: &str| node != victim;
    let connected = |from: &End, to: &End| fault.own_pod || (apart(&from.node) && apart(&to.node));
    let is_through = |flow: &FlowReport| own.contains(&(flow.from.address, flow.to.address));
    let capture = field.capture(&format!("{}-{victim}", fault.name))?;

    let felt = lasting(field, fault, victim, &flows, &|flow| {
        (connected(&flow.from, &flow.to), is_through(flow))
    });
    // Whatever came of it, the next fault begins with all leaders.
    let begin = now();
    (fault.mend)(field, victim)?;
    field.count()?;
    // The pod of a node that was off is another one.
    let kept = |node: &str| !fault.renews_pod || apart(node);
    let settled = field.settle(&flows, |end| kept(&end.node));
    let felt = felt?;
    let settled = settled.with_context(|| felt.evidence.clone())?;
    let end = now();
    sleep(UNDER_WAY);
    let reports = flows.report(&(begin..end));
    let back = Worst::of(&reports, |flow| connected(&flow.from, &flow.to));
    field.nothing_in_clear(capture)?;
    Ok(Felt {
        back,
        settled,
        ..felt
    })
}

/// Makes a fault, and measures what flows feel while it lasts. `judge` says which count, and which of them are
/// through the leader.
fn lasting(
    field: &mut Field,
    fault: &Fault,
    victim: &str,
    flows: &Flows,
    judge: &dyn Fn(&FlowReport) -> (bool, bool),
) -> anyhow::Result<Felt> {
    let begin = now();
    (fault.make)(field, victim)?;
    let made = now();
    let longest = fault.promised * FACTOR + STEADY;
    loop {
        sleep(Duration::from_millis(100));
        let lasted = now().saturating_sub(made);
        let reports = flows.report(&(now() - STEADY..now()));
        let mut counted = reports.iter().filter(|flow| judge(flow).0);
        let steady = counted.all(|flow| flow.gap < STEADY_GAP);
        if (lasted > LASTING && steady) || lasted > longest {
            break;
        }
    }
    let end = now();
    sleep(UNDER_WAY);
    let reports = flows.report(&(begin..end));
    let of = |through| Worst::of(&reports, |flow| judge(flow) == (true, through));
    let (through, past) = (of(true), of(false));
    ensure!(through.flows > 0, "no flow that counts passes {victim}");
    let evidence = if through.gap.max(past.gap) > fault.promised * FACTOR {
        field.evidence()
    } else {
        String::new()
    };
    Ok(Felt {
        through,
        past,
        back: Worst::default(),
        settled: Duration::ZERO,
        evidence,
    })
}

/// What was sent this recently may still be under way.
pub(super) const UNDER_WAY: Duration = Duration::from_millis(200);
