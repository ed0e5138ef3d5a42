//! Which paths nodes use, looked at again and again while something happens.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::Duration;

use selvedge_lab::Lab;
use selvedge_lab::traffic::flows::{Time, now};

/// Often enough to see a path that is down for as short as it takes to notice that.
const LOOKS: Duration = Duration::from_millis(200);

/// The paths that a node used, with the time when each was seen first.
#[derive(Clone, Debug, Default)]
pub(super) struct History(Vec<(Time, String)>);

impl History {
    /// How often the paths changed.
    pub(super) fn changes(&self) -> usize {
        self.0.len().saturating_sub(1)
    }
}

impl std::fmt::Display for History {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let begun = self.0.first().map_or(Time::ZERO, |(time, _)| *time);
        for (time, paths) in &self.0 {
            write!(f, "\nafter {:.1?}:\n{paths}", *time - begun)?;
        }
        Ok(())
    }
}

/// Does something, and returns which paths these nodes used meanwhile.
pub(super) fn watched<T>(
    lab: &Lab,
    nodes: &[&str],
    work: impl FnOnce() -> T,
) -> (T, BTreeMap<String, History>) {
    let stop = AtomicBool::new(false);
    scope(|scope| {
        let looking = scope.spawn(|| {
            let mut histories = BTreeMap::<String, History>::new();
            while !stop.load(Ordering::Relaxed) {
                for node in nodes {
                    let Some(paths) = paths_of(lab, node) else {
                        continue;
                    };
                    let history = histories.entry((*node).to_owned()).or_default();
                    if history.0.last().is_none_or(|(_, last)| *last != paths) {
                        history.0.push((now(), paths));
                    }
                }
                sleep(LOOKS);
            }
            histories
        });
        let done = work();
        stop.store(true, Ordering::Relaxed);
        let histories = looking.join();
        (
            done,
            histories.unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        )
    })
}

/// Next hops, and what goes to each peer.
fn paths_of(lab: &Lab, node: &str) -> Option<String> {
    let mut command = Command::new("sh");
    command.args([
        "-c",
        "ip -o route show table 5130; wg show kilo0 allowed-ips",
    ]);
    let output = lab.node(node).ok()?.output(command).ok()?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}
