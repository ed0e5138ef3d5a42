//! Applies the desired state on separate threads, and reads the kernel's facts there.
//!
//! ```text
//!   owner ── read / reconcile ──► reconciler ── rtnetlink, tunnel
//!         ◄── facts / applied ──      │  ▲
//!                                 job │  │ outcome
//!                                     ▼  │
//!                                  firewall ── nft
//! ```
//!
//! The owner never waits: it sends commands and receives [`Message`]s. The latest desired state wins.
//! The reconciler's thread takes microseconds a change; `nft`, which may hang, runs on a second thread.
//! What is made in which order, and what waits for the firewall, is decided in [`core`].

pub mod core;
pub mod firewall;
pub mod host;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use self::core::{Applied, Core, Desired, Platform as _};
use self::host::Host;
use crate::clock::now;
use crate::diff::{Change, diff};
use crate::kernel::{Kernel, NftTable, Rtnetlink};
use crate::state::{Link, State};
use crate::wireguard::Device;

/// How long a pass waits for `nft` to fill the sets of a table, so that on a healthy node a prefix is in
/// the firewall before it is routed. A new prefix that is routed first is only tracked for that time.
const ELEMENTS: Duration = Duration::from_millis(25);

/// How long the end waits for `nft`, which is ended after 10 s.
const FAREWELL: Duration = Duration::from_secs(12);

/// A message of the reconciler to its owner.
#[derive(Debug)]
pub enum Message<F> {
    /// The facts that were asked for.
    Facts(Box<F>),
    /// What a pass, or the firewall, came to.
    Applied(Applied),
}

/// How the reconciler reads the facts of type `F` and sends messages to its owner.
pub struct Owner<F> {
    /// Reads the facts; called on the reconciler's thread.
    pub read: Box<dyn FnMut(&Rtnetlink) -> F + Send>,
    /// Sends a message; called on the reconciler's thread, so it must not block.
    pub send: Box<dyn Fn(Message<F>) + Send>,
}

enum Command {
    Read,
    Reconcile(Box<Desired>),
    Firewall(Box<firewall::Outcome>),
    /// Ends the thread. With `remove`, everything but the link is removed before.
    Stop {
        remove: bool,
        done: Sender<Removed>,
    },
}

/// What a removal came to.
#[derive(Debug, Default)]
pub struct Removed {
    /// The changes made.
    pub made: Vec<Change>,
    /// What could not be done, in sentences.
    pub failed: Vec<String>,
}

/// The running reconciler. Dropping it leaves the node as it is.
pub struct Reconciler {
    commands: Sender<Command>,
    nft: Arc<NftTable>,
    tunnel: Arc<Device>,
}

impl Reconciler {
    /// Starts the threads in the network namespace of the calling one.
    ///
    /// # Errors
    ///
    /// When no thread can be started.
    pub fn start<F: Send + 'static>(
        kernel: Kernel,
        tunnel: Arc<Device>,
        owner: Owner<F>,
    ) -> io::Result<Self> {
        let Kernel { rtnetlink, nft } = kernel;
        let nft = Arc::new(nft);
        let (commands, received) = channel();
        let outcomes = commands.clone();
        let worker = firewall::Worker::start(Arc::clone(&nft), move |outcome| {
            // The reconciler may have ended meanwhile.
            let _ = outcomes.send(Command::Firewall(Box::new(outcome)));
        })?;
        let thread = Thread {
            core: Core::default(),
            host: Host::new(rtnetlink, Arc::clone(&tunnel)),
            nft: Arc::clone(&nft),
            worker,
            owner,
            received,
            waiting: VecDeque::new(),
        };
        std::thread::Builder::new()
            .name("reconciler".to_owned())
            .spawn(move || thread.run())?;
        Ok(Self {
            commands,
            nft,
            tunnel,
        })
    }

    /// Has the facts be read; they come as a [`Message::Facts`].
    pub fn read(&self) {
        self.send(Command::Read);
    }

    /// Has the node be made so; every pass comes as a [`Message::Applied`].
    pub fn reconcile(&self, desired: Desired) {
        self.send(Command::Reconcile(Box::new(desired)));
    }

    /// Ends the reconciler after the pass under way; with `remove`, what it made is removed, but for the
    /// link, which the tunnel still holds. Blocks for as long as that takes.
    pub fn stop(self, remove: bool) -> Removed {
        let (done, removed) = channel();
        self.send(Command::Stop { remove, done });
        removed.recv().unwrap_or_default()
    }

    /// What the nft table has counted. Does not wait for `nft`.
    ///
    /// # Errors
    ///
    /// When nf_tables does not answer.
    pub fn counters(&self) -> anyhow::Result<crate::kernel::Counters> {
        self.nft.counters()
    }

    /// The tunnel.
    pub fn tunnel(&self) -> &Arc<Device> {
        &self.tunnel
    }

    fn send(&self, command: Command) {
        // The thread ends with this value; a panic in it ends the process.
        let _ = self.commands.send(command);
    }
}

struct Thread<F> {
    core: Core,
    host: Host,
    nft: Arc<NftTable>,
    worker: firewall::Worker,
    owner: Owner<F>,
    received: Receiver<Command>,
    /// What came while the firewall was waited for.
    waiting: VecDeque<Command>,
}

/// Why the thread goes on.
enum Wake {
    Command(Command),
    Retry,
    /// The owner is gone.
    End,
}

impl<F> Thread<F> {
    fn run(mut self) {
        loop {
            let mut next = match self.wait() {
                Wake::Command(command) => Some(command),
                Wake::Retry => None,
                Wake::End => return,
            };
            let mut is_pass_due = next.is_none();
            // The latest desired state wins: what came meanwhile is taken before the pass.
            while let Some(command) = next {
                match command {
                    Command::Read => {
                        let facts = (self.owner.read)(self.host.rtnetlink());
                        (self.owner.send)(Message::Facts(Box::new(facts)));
                    }
                    Command::Reconcile(desired) => {
                        self.core.handle_desired(*desired);
                        is_pass_due = true;
                    }
                    Command::Firewall(outcome) => is_pass_due |= self.take_outcome(*outcome),
                    Command::Stop { remove, done } => {
                        self.finish_firewall();
                        let removed = if remove {
                            self.remove()
                        } else {
                            Removed::default()
                        };
                        let _ = done.send(removed);
                        return;
                    }
                }
                next = self
                    .waiting
                    .pop_front()
                    .or_else(|| self.received.try_recv().ok());
            }
            self.hand_out_firewall();
            if is_pass_due {
                self.pass();
            }
        }
    }

    /// Waits for the next command, or until something is to be tried again.
    fn wait(&mut self) -> Wake {
        if let Some(command) = self.waiting.pop_front() {
            return Wake::Command(command);
        }
        let received = match self.core.poll_timeout() {
            Some(at) => self
                .received
                .recv_timeout(at.saturating_duration_since(now())),
            None => self.received.recv().map_err(RecvTimeoutError::from),
        };
        match received {
            Ok(command) => Wake::Command(command),
            Err(RecvTimeoutError::Timeout) => Wake::Retry,
            Err(RecvTimeoutError::Disconnected) => Wake::End,
        }
    }

    /// Takes an outcome of the firewall's; returns whether routes waited for it.
    fn take_outcome(&mut self, outcome: firewall::Outcome) -> bool {
        let waited = self.core.waits_for_firewall();
        let applied = self.core.handle_firewall(outcome, now());
        (self.owner.send)(Message::Applied(applied));
        waited
    }

    /// Gives the firewall's thread what is due, and waits a moment for it where only sets are filled.
    fn hand_out_firewall(&mut self) {
        let Some(job) = self.core.poll_firewall(now()) else {
            return;
        };
        self.worker.send(job);
        if !self.core.has_new_elements() {
            return;
        }
        let until = now() + ELEMENTS;
        while let Ok(command) = self
            .received
            .recv_timeout(until.saturating_duration_since(now()))
        {
            match command {
                Command::Firewall(outcome) => {
                    self.take_outcome(*outcome);
                    return;
                }
                other @ (Command::Read | Command::Reconcile(_) | Command::Stop { .. }) => {
                    self.waiting.push_back(other);
                }
            }
        }
    }

    fn pass(&mut self) {
        let begun = now();
        let mut applied = self.core.pass(&mut self.host, begun);
        applied.took = begun.elapsed();
        (self.owner.send)(Message::Applied(applied));
    }

    /// Waits for a job under way: half a ruleset must not be what the process leaves behind.
    fn finish_firewall(&mut self) {
        let until = now() + FAREWELL;
        while self.core.awaits_outcome() {
            let left = until.saturating_duration_since(now());
            match self.received.recv_timeout(left) {
                Ok(Command::Firewall(outcome)) => {
                    self.core.handle_firewall(*outcome, now());
                }
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }

    /// Removes everything but the link. At the end, so `nft` may be waited for.
    fn remove(&mut self) -> Removed {
        let mut removed = Removed::default();
        match self.host.observe() {
            Ok(observed) => {
                let link = observed.link.clone();
                let nothing = State {
                    link: link.map(|link| Link { up: false, ..link }),
                    ..State::default()
                };
                let changes = diff(&observed, &nothing);
                let failed = self.host.apply_all(&changes);
                let is_failed =
                    |change: &&Change| failed.iter().any(|(failed, _)| failed == change);
                let made = changes.iter().filter(|change| !is_failed(change));
                removed.made.extend(made.cloned());
                let failed = failed.iter();
                let failed = failed.map(|(change, error)| format!("{change}: {error:#}"));
                removed.failed.extend(failed);
            }
            Err(error) => removed
                .failed
                .push(format!("reading the kernel: {error:#}")),
        }
        match firewall::ensure(&self.nft, None) {
            Ok(change) => removed.made.extend(change),
            Err(error) => removed
                .failed
                .push(format!("removing the firewall: {error:#}")),
        }
        removed
    }
}
