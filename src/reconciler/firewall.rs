//! The nft table on a separate thread, since `nft` may hang. At most one job is under way; the next one
//! has the latest content.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use crate::clock::now;
use crate::diff::{Change, KernelChange};
use crate::kernel::NftTable;
use crate::state::{Firewall, Ruleset};

/// Replacements in a row that may follow each other at once. More of them mean that another program undoes
/// what the agent does.
const BURST: u32 = 20;
/// Pause between the replacements of such a fight.
const FIGHT: Duration = Duration::from_millis(500);

/// What the table should be.
#[derive(Clone, Debug)]
pub struct Job {
    /// Its content; `None` for no table.
    pub firewall: Option<Arc<Firewall>>,
}

/// What became of a [`Job`].
#[derive(Debug)]
pub struct Outcome {
    /// What was asked for.
    pub firewall: Option<Arc<Firewall>>,
    /// How long it took.
    pub took: Duration,
    /// The change that was made, if one was needed.
    pub result: anyhow::Result<Option<Change>>,
}

/// The worker's thread. It ends when this is dropped and the job under way is done; it is not waited for.
#[derive(Debug)]
pub(super) struct Worker {
    jobs: Sender<Job>,
}

impl Worker {
    /// Starts the thread in the network namespace of the calling one.
    ///
    /// # Errors
    ///
    /// When no thread can be started.
    pub(super) fn start(
        table: Arc<NftTable>,
        outcome: impl Fn(Outcome) + Send + 'static,
    ) -> io::Result<Self> {
        let (jobs, received) = channel();
        std::thread::Builder::new()
            .name("firewall".to_owned())
            .spawn(move || run(&table, &received, outcome))?;
        Ok(Self { jobs })
    }

    pub(super) fn send(&self, job: Job) {
        // The thread ends with this value, not before.
        let _ = self.jobs.send(job);
    }
}

fn run(table: &NftTable, jobs: &Receiver<Job>, outcome: impl Fn(Outcome)) {
    let mut last: Option<Instant> = None;
    let mut burst = 0;
    while let Ok(job) = jobs.recv() {
        if burst > BURST {
            std::thread::sleep(FIGHT);
        }
        let begun = now();
        let result = ensure(table, job.firewall.as_deref());
        if matches!(result, Ok(Some(_))) {
            let follows = last.is_some_and(|last| last.elapsed() < 2 * FIGHT);
            burst = if follows { burst + 1 } else { 0 };
            last = Some(now());
        }
        outcome(Outcome {
            firewall: job.firewall,
            took: begun.elapsed(),
            result,
        });
    }
}

/// Makes the table so, if it is not; returns the change that was needed.
pub(super) fn ensure(
    table: &NftTable,
    firewall: Option<&Firewall>,
) -> anyhow::Result<Option<Change>> {
    let observed = table.observe()?;
    match firewall {
        Some(firewall) => {
            if observed.as_ref().map(Ruleset::id) == Some(firewall.id()) {
                return Ok(None);
            }
            table.replace(firewall)?;
            Ok(Some(Change::Kernel(KernelChange::ReplaceFirewall(
                Box::new(firewall.clone()),
            ))))
        }
        None if observed.is_some() => {
            table.delete()?;
            Ok(Some(Change::Kernel(KernelChange::DeleteFirewall)))
        }
        None => Ok(None),
    }
}
