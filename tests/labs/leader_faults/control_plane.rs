//! What the control plane does to leaders: it loses sight of all nodes, and it drains one.

use std::thread::{scope, sleep};
use std::time::Duration;

use anyhow::Context as _;
use selvedge_lab::lab::status;
use selvedge_lab::traffic::flows::FlowReport;
use serde_json::{Value, json};

use super::changes::{APART, LOST, during};
use super::field::Field;
use super::measure::Worst;
use super::{LEADER, SECOND, at_most, thorough};

/// Longer than a former leader stays one.
const LASTING: Duration = Duration::from_secs(4);

/// All Nodes are NotReady at once, and later Ready again, as a control plane writes that lost sight of its nodes.
pub(super) fn not_ready(field: &mut Field) -> anyhow::Result<String> {
    field.lead_by(2)?;
    let flows = field.flows()?;
    field.settle(&flows, |_| true)?;
    let capture = field.capture("not-ready")?;
    let felt = during(
        field,
        &flows,
        |_| true,
        |field| {
            say_ready(field, false)?;
            sleep(LASTING);
            say_ready(field, true)?;
            sleep(LASTING);
            Ok(())
        },
    )?;
    field.settle(&flows, |_| true)?;
    field.nothing_in_clear(capture)?;
    little(&felt)?;
    Ok(felt.to_string())
}

/// All Nodes are written at the same time, as by the workers of a controller.
fn say_ready(field: &Field, ready: bool) -> anyhow::Result<()> {
    let names = field.lab.node_names();
    let write = |name: &String| {
        let path = format!("/api/v1/nodes/{name}/status");
        let address = field.lab.node(name)?.address();
        let status = status(address, name, ready);
        field.lab.api().merge(&path, &status).map(drop)
    };
    let write = &write;
    scope(|scope| {
        let writes = names.iter().map(|name| scope.spawn(move || write(name)));
        let writes = writes.collect::<Vec<_>>();
        let mut outcomes = writes.into_iter().map(|write| {
            let outcome = write.join();
            outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        outcomes.try_for_each(|outcome| outcome)
    })
}

/// A leader's Node is cordoned and gets a taint that evicts its pods: its agent gets SIGTERM and stays away for a while.
pub(super) fn drained(field: &mut Field) -> anyhow::Result<String> {
    field.lead_by(2)?;
    let victims: &[&str] = match thorough() {
        true => &[LEADER, SECOND],
        false => &[LEADER],
    };
    let mut summary = Vec::new();
    for victim in victims {
        let flows = field.flows()?;
        field.settle(&flows, |_| true)?;
        let capture = field.capture(&format!("drained-{victim}"))?;
        let others = |flow: &FlowReport| flow.from.node != *victim && flow.to.node != *victim;
        let felt = during(field, &flows, others, |field| {
            let taints = json!([
                {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"},
                {"key": "example.com/maintenance", "effect": "NoExecute"},
            ]);
            set_spec(field, victim, &json!(true), &taints)?;
            field.lab.take_agent(victim)?.stop()?;
            sleep(LASTING);
            set_spec(field, victim, &Value::Null, &Value::Null)?;
            field.start_agent(victim)?;
            field.settle(&flows, |_| true)?;
            Ok(())
        })?;
        field.nothing_in_clear(capture)?;
        little(&felt).with_context(|| (*victim).to_owned())?;
        summary.push(format!("{victim}: {felt}"));
    }
    Ok(summary.join("; "))
}

/// Nothing is lost, but for what agents lose that are busy and see a change apart.
fn little(felt: &Worst) -> anyhow::Result<()> {
    if felt.lost > LOST {
        let why = || format!("{felt}\n{}", felt.which);
        at_most("the longest gap", felt.gap, APART).with_context(why)?;
    }
    Ok(())
}

fn set_spec(
    field: &Field,
    node: &str,
    unschedulable: &Value,
    taints: &Value,
) -> anyhow::Result<()> {
    let spec = json!({"spec": {"unschedulable": unschedulable, "taints": taints}});
    let path = format!("/api/v1/nodes/{node}");
    field.lab.api().merge(&path, &spec)?;
    Ok(())
}
