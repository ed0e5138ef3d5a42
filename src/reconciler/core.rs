//! What to change next, and what became of each change. Pure but for the [`Platform`]: the time is passed in.
//!
//! Every pass observes the platform, computes the difference to the desired state and applies it. A change
//! that fails is kept with its own back-off: until its next attempt a pass leaves it out and makes all others.
//!
//! The firewall is not part of a pass. It is handed out as a [`firewall::Job`] and its outcome handed in.
//! What waits for it, and why:
//!
//! - A table that is not there yet, or whose rules differ (another role, port or device): routes, rules and
//!   removals wait for the outcome, good or bad. A new leader must not carry what its firewall does not
//!   guard, and a leader's transit must never be tracked. `nft` has a time limit, so the wait ends.
//! - A table in which only elements of sets differ: nothing waits.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::firewall::{self, Job};
use crate::diff::{Change, KernelChange, TunnelChange, diff};
use crate::kernel::flannel_repair::Repair;
use crate::kernel::nft;
use crate::state::{Firewall, RouteKey, Rule, Ruleset, State};
use crate::wireguard::PeerId;

/// First pause before a failed change is made again; doubled each time.
const RETRY: Duration = Duration::from_millis(100);
/// Longest pause, so that a repair of the cause shows soon.
const MAX_RETRY: Duration = Duration::from_secs(5);
/// Pause before a port that another process has is asked for again.
const RETRY_PORT: Duration = Duration::from_secs(1);

/// What a desired state is applied to: the kernel without nf_tables, and the tunnel.
pub trait Platform {
    /// Reads the agent's state, without the firewall.
    ///
    /// # Errors
    ///
    /// When the kernel cannot be read.
    fn observe(&mut self) -> anyhow::Result<State>;

    /// Makes changes in their order and returns those that failed; one that fails does not keep those
    /// behind it from being made. It is no error if all is already so.
    fn apply_all<'a>(&mut self, changes: &'a [Change]) -> Vec<(&'a Change, anyhow::Error)>;

    /// Makes repairs to what flannel forgot, and returns those that failed.
    fn repair<'a>(&mut self, repairs: &'a [Repair]) -> Vec<(&'a Repair, anyhow::Error)>;
}

/// What the node should become.
#[derive(Clone, Debug, Default)]
pub struct Desired {
    /// All of it; `None` leaves everything as it is but for the port.
    pub state: Option<State>,
    /// The name of the tunnel's link.
    pub interface: String,
    /// The UDP port to listen on while there is no state.
    pub listen_port: Option<std::num::NonZeroU16>,
    /// What flannel forgot.
    pub repairs: Vec<Repair>,
}

/// What a failure is about.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum FailureKind {
    /// Reading the kernel.
    Observe,
    /// The tunnel's UDP port.
    ListenPort,
    /// The nft table.
    Firewall,
    /// An entry of flannel's.
    FlannelRepair,
    /// Any other change.
    Change,
}

/// Something that could not be done, and will be tried again.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Failure {
    /// What it is about.
    pub kind: FailureKind,
    /// The sentence for people.
    pub sentence: String,
}

/// What made changes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Source {
    /// A pass over the kernel and the tunnel.
    #[default]
    Pass,
    /// The firewall's worker.
    Firewall,
}

/// What a pass, or the firewall, came to.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    /// Which of them.
    pub source: Source,
    /// How long it took.
    pub took: Duration,
    /// The changes made, in order.
    pub made: Vec<Change>,
    /// Whether something was attempted that failed.
    pub failed: bool,
    /// Everything that is not done, whether or not it was attempted this time.
    pub failures: Vec<Failure>,
    /// Whether routes and rules wait for the firewall.
    pub waiting: bool,
}

/// The thing that a change is made to: changes to one item replace each other.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Item {
    Link,
    Sysctl(String),
    Address(ipnet::IpNet),
    ListenPort,
    Peer(PeerId),
    Firewall,
    Route(RouteKey),
    Rule(Rule),
}

impl Item {
    fn of(change: &Change) -> Self {
        match change {
            Change::Tunnel(TunnelChange::CreateLink { .. })
            | Change::Kernel(KernelChange::SetMtu { .. })
            | Change::Kernel(KernelChange::SetUp { .. })
            | Change::Kernel(KernelChange::SetDown { .. })
            | Change::Kernel(KernelChange::DeleteLink { .. }) => Self::Link,
            Change::Kernel(KernelChange::SetSysctl { path, .. }) => Self::Sysctl(path.clone()),
            Change::Kernel(KernelChange::AddAddress { address, .. })
            | Change::Kernel(KernelChange::DeleteAddress { address, .. }) => {
                Self::Address(*address)
            }
            Change::Tunnel(TunnelChange::SetListenPort { .. }) => Self::ListenPort,
            Change::Tunnel(TunnelChange::SetPeer { id, .. })
            | Change::Tunnel(TunnelChange::RemovePeer { id, .. }) => Self::Peer(id.clone()),
            Change::Kernel(KernelChange::ReplaceFirewall(_))
            | Change::Kernel(KernelChange::DeleteFirewall) => Self::Firewall,
            Change::Kernel(KernelChange::ReplaceRoute { key, .. })
            | Change::Kernel(KernelChange::DeleteRoute(key)) => Self::Route(*key),
            Change::Kernel(KernelChange::AddRule(rule))
            | Change::Kernel(KernelChange::DeleteRule(rule)) => Self::Rule(rule.clone()),
        }
    }
}

/// A change that failed.
#[derive(Clone, Debug)]
struct Failed {
    change: Change,
    sentence: String,
    retry: Retry,
}

/// When to try again.
#[derive(Clone, Copy, Debug)]
struct Retry {
    failures: u32,
    at: Instant,
    next: Instant,
}

impl Retry {
    fn after(previous: Option<Self>, now: Instant) -> Self {
        let failures = previous.map_or(0, |retry| retry.failures);
        let pause = RETRY
            .saturating_mul(2_u32.saturating_pow(failures))
            .min(MAX_RETRY);
        Self {
            failures: failures.saturating_add(1),
            at: now,
            next: now + pause,
        }
    }

    /// The next attempt is made as soon as the first one was.
    fn hurry(&mut self) {
        self.next = self.next.min(self.at + RETRY);
    }
}

/// The state of every change that is not made yet.
#[derive(Debug, Default)]
pub struct Core {
    desired: Desired,
    failed: BTreeMap<Item, Failed>,
    observe: Option<(Retry, String)>,
    repair: Option<(Retry, Vec<String>)>,
    firewall: Table,
}

/// What is known of the nft table.
#[derive(Debug, Default)]
struct Table {
    /// What it should be; `None` while nothing is desired.
    wanted: Option<Wanted>,
    /// What the last outcome was about.
    attempted: Option<Wanted>,
    /// Whether the rules of the wanted table differ from those of the attempted one.
    is_new: bool,
    /// Whether a job is handed out.
    busy: bool,
    /// Whether another job is due.
    due: bool,
    failed: Option<(Retry, String)>,
}

impl Table {
    /// Compares the rules of the wanted table with those of the attempted one.
    fn compare(&mut self) {
        self.is_new = match (&self.attempted, &self.wanted) {
            (Some(Some(old)), Some(Some(new))) => old != new && nft::frame(old) != nft::frame(new),
            (Some(None) | None, Some(Some(_))) => true,
            (_, Some(None) | None) => false,
        };
    }
}

/// A table, or none.
type Wanted = Option<Arc<Firewall>>;

impl Core {
    /// Takes what the node should become. It replaces what was desired before.
    pub fn handle_desired(&mut self, mut desired: Desired) {
        let table = &mut self.firewall;
        match desired.state.as_mut().map(|state| state.firewall.take()) {
            None => table.wanted = None,
            Some(ruleset) => {
                let wanted = match ruleset {
                    Some(Ruleset::Planned(firewall)) => Some(Arc::from(firewall)),
                    Some(Ruleset::Installed(_)) | None => None,
                };
                table.wanted = Some(wanted);
                table.due = true;
                table.compare();
            }
        }
        // Something has changed, and may be the cause of a failure that is gone.
        for failed in self.failed.values_mut() {
            failed.retry.hurry();
        }
        self.desired = desired;
    }

    /// Takes what became of a job.
    pub fn handle_firewall(&mut self, outcome: firewall::Outcome, now: Instant) -> Applied {
        let table = &mut self.firewall;
        table.busy = false;
        let mut applied = Applied {
            source: Source::Firewall,
            took: outcome.took,
            ..Applied::default()
        };
        match outcome.result {
            Ok(changed) => {
                table.failed = None;
                applied.made.extend(changed);
            }
            Err(error) => {
                let previous = table.failed.as_ref().map(|(retry, _)| *retry);
                table.failed = Some((Retry::after(previous, now), format!("{error:#}")));
                applied.failed = true;
            }
        }
        table.attempted = Some(outcome.firewall);
        table.compare();
        applied.failures = self.failures();
        applied.waiting = self.waits_for_firewall();
        applied
    }

    /// The next job for the firewall, if one is due and none is under way. A table is deleted only when no
    /// route needs it any more.
    pub fn poll_firewall(&mut self, now: Instant) -> Option<Job> {
        let table = &mut self.firewall;
        if table
            .failed
            .as_ref()
            .is_some_and(|(retry, _)| retry.next <= now && table.wanted.is_some())
        {
            table.due = true;
        }
        if table.busy || !table.due {
            return None;
        }
        let firewall = table.wanted.clone()?;
        table.busy = true;
        table.due = false;
        Some(Job { firewall })
    }

    /// Whether the desired table has other elements than the attempted one and the same rules, so that a
    /// short wait for it keeps the usual order.
    pub fn has_new_elements(&self) -> bool {
        let table = &self.firewall;
        table.busy && !table.is_new && table.wanted != table.attempted
    }

    /// Whether a job is handed out.
    pub fn awaits_outcome(&self) -> bool {
        self.firewall.busy
    }

    /// Whether routes and rules wait for the firewall.
    pub fn waits_for_firewall(&self) -> bool {
        self.firewall.is_new
    }

    /// Makes the platform as desired, as far as it goes.
    pub fn pass(&mut self, platform: &mut impl Platform, now: Instant) -> Applied {
        let mut applied = Applied::default();
        match platform.observe() {
            Ok(observed) => {
                self.observe = None;
                self.apply(platform, &observed, now, &mut applied);
            }
            Err(error) => {
                let previous = self.observe.take().map(|(retry, _)| retry);
                let sentence = format!("reading the kernel: {error:#}");
                self.observe = Some((Retry::after(previous, now), sentence));
                applied.failed = true;
            }
        }
        self.make_repairs(platform, now, &mut applied);
        applied.failures = self.failures();
        applied.waiting = self.waits_for_firewall();
        applied
    }

    fn apply(
        &mut self,
        platform: &mut impl Platform,
        observed: &State,
        now: Instant,
        applied: &mut Applied,
    ) {
        let mut changes = match &self.desired.state {
            Some(desired) => diff(observed, desired),
            None => self.port_change(observed).into_iter().collect(),
        };
        // What the difference no longer holds is made, or is not wanted any more.
        let items: BTreeSet<_> = changes.iter().map(Item::of).collect();
        self.failed.retain(|item, _| items.contains(item));
        if self.waits_for_firewall() {
            let first = changes.iter().position(is_after_firewall);
            changes.truncate(first.unwrap_or(changes.len()));
        }
        changes.retain(|change| {
            let failed = self.failed.get(&Item::of(change));
            failed.is_none_or(|failed| failed.change != *change || failed.retry.next <= now)
        });
        let refused: Vec<_> = platform
            .apply_all(&changes)
            .into_iter()
            .map(|(change, error)| (change.clone(), error))
            .collect();
        applied.failed |= !refused.is_empty();
        let is_refused = |change: &Change| refused.iter().any(|(refused, _)| refused == change);
        for change in &changes {
            if !is_refused(change) {
                self.failed.remove(&Item::of(change));
            }
        }
        applied.made = changes
            .into_iter()
            .filter(|change| !is_refused(change))
            .collect();
        for (change, error) in refused {
            self.keep_failed(change, &error, now);
        }
    }

    fn keep_failed(&mut self, change: Change, error: &anyhow::Error, now: Instant) {
        let item = Item::of(&change);
        let previous = self.failed.get(&item);
        let previous = previous.filter(|failed| failed.change == change);
        let mut retry = Retry::after(previous.map(|failed| failed.retry), now);
        let sentence = if item == Item::ListenPort {
            retry.next = now + RETRY_PORT;
            format!("{error:#}")
        } else {
            format!("{change}: {error:#}")
        };
        let failed = Failed {
            change,
            sentence,
            retry,
        };
        self.failed.insert(item, failed);
    }

    fn port_change(&self, observed: &State) -> Option<Change> {
        let port = self.desired.listen_port?;
        (observed.listen_port != Some(port)).then(|| {
            Change::Tunnel(TunnelChange::SetListenPort {
                dev: self.desired.interface.clone(),
                port,
            })
        })
    }

    fn make_repairs(&mut self, platform: &mut impl Platform, now: Instant, applied: &mut Applied) {
        let waits = self
            .repair
            .as_ref()
            .is_some_and(|(retry, _)| retry.next > now);
        if self.desired.repairs.is_empty() || waits {
            if self.desired.repairs.is_empty() {
                self.repair = None;
            }
            return;
        }
        let repairs = std::mem::take(&mut self.desired.repairs);
        for repair in &repairs {
            tracing::info!(%repair, "restoring what flannel forgot");
        }
        let mut failed = Vec::new();
        let mut sentences = Vec::new();
        for (repair, error) in platform.repair(&repairs) {
            sentences.push(format!("{repair}: {error:#}"));
            failed.push(repair.clone());
        }
        applied.failed |= !failed.is_empty();
        let previous = self.repair.take().map(|(retry, _)| retry);
        self.repair = (!failed.is_empty()).then(|| (Retry::after(previous, now), sentences));
        self.desired.repairs = failed;
    }

    /// When the next attempt at something that failed is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let waits = self.waits_for_firewall();
        let blind = self.observe.is_some();
        let failed = self.failed.values();
        let failed = failed.filter(|failed| !(blind || waits && may_wait(&failed.change)));
        let failed = failed.map(|failed| failed.retry.next);
        let observe = self.observe.iter().map(|(retry, _)| retry.next);
        let repair = self.repair.iter().map(|(retry, _)| retry.next);
        let firewall = self.firewall.failed.iter().map(|(retry, _)| retry.next);
        let firewall = firewall.filter(|_| !self.firewall.busy && self.firewall.wanted.is_some());
        failed.chain(observe).chain(repair).chain(firewall).min()
    }

    fn failures(&self) -> Vec<Failure> {
        let failure = |kind: FailureKind, sentence: &String| Failure {
            kind,
            sentence: sentence.clone(),
        };
        let observe = self.observe.iter();
        let observe = observe.map(|(_, sentence)| failure(FailureKind::Observe, sentence));
        let firewall = self.firewall.failed.iter();
        let firewall = firewall.map(|(_, sentence)| failure(FailureKind::Firewall, sentence));
        let changes = self.failed.iter().map(|(item, failed)| {
            let kind = match item {
                Item::ListenPort => FailureKind::ListenPort,
                Item::Link
                | Item::Sysctl(_)
                | Item::Address(_)
                | Item::Peer(_)
                | Item::Firewall
                | Item::Route(_)
                | Item::Rule(_) => FailureKind::Change,
            };
            failure(kind, &failed.sentence)
        });
        let repairs = self.repair.iter().flat_map(|(_, sentences)| sentences);
        let repairs = repairs.map(|sentence| failure(FailureKind::FlannelRepair, sentence));
        observe
            .chain(firewall)
            .chain(changes)
            .chain(repairs)
            .collect()
    }
}

/// Whether a change may be left out while the firewall is waited for.
fn may_wait(change: &Change) -> bool {
    is_after_firewall(change)
        || matches!(change, Change::Kernel(KernelChange::DeleteAddress { .. }))
}

/// Whether the order of a difference puts a change behind the firewall.
fn is_after_firewall(change: &Change) -> bool {
    match change {
        Change::Kernel(KernelChange::ReplaceRoute { .. })
        | Change::Kernel(KernelChange::AddRule(_))
        | Change::Kernel(KernelChange::DeleteRule(_))
        | Change::Kernel(KernelChange::DeleteRoute(_))
        | Change::Tunnel(TunnelChange::RemovePeer { .. })
        | Change::Kernel(KernelChange::SetDown { .. })
        | Change::Kernel(KernelChange::DeleteLink { .. })
        | Change::Kernel(KernelChange::DeleteFirewall) => true,
        Change::Tunnel(TunnelChange::CreateLink { .. })
        | Change::Kernel(KernelChange::SetMtu { .. })
        | Change::Kernel(KernelChange::SetSysctl { .. })
        | Change::Kernel(KernelChange::SetUp { .. })
        | Change::Kernel(KernelChange::AddAddress { .. })
        | Change::Kernel(KernelChange::DeleteAddress { .. })
        | Change::Tunnel(TunnelChange::SetListenPort { .. })
        | Change::Tunnel(TunnelChange::SetPeer { .. })
        | Change::Kernel(KernelChange::ReplaceFirewall(_)) => false,
    }
}

#[cfg(test)]
#[path = "core/tests.rs"]
mod tests;
