//! Access to the Kubernetes API: finding a server, watching Nodes and Peers, publishing.
//!
//! What the objects mean together is not decided here ([`crate::topology`] does), and nothing the
//! data plane does waits for the API. [`Cluster`] runs on tasks of its own; the agent reads
//! [`View`]s and says what to publish and to report.

mod access;
pub mod annotation;
mod backoff;
mod call;
mod conditions;
mod events;
pub(crate) mod kubeconfig;
mod listwatch;
pub mod node;
mod object;
pub mod peer;
pub mod policies;
mod publish;
mod rejected;
mod servers;
pub mod since;
mod store;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

pub use access::{Access, Origin, Sources};
pub use backoff::Timeouts;
pub use conditions::{Verdict, Verdicts, verdicts};
pub use events::Notice;
pub use node::ParseSettings;
pub use publish::{Annotations, withdraw};
pub use rejected::{Object, Rejected};
pub use servers::Servers;

use access::Connection;
use listwatch::{Event, Expectation, ListWatch, SwitchRequest};
use store::Store;

use crate::topology::{NodeName, Snapshot};

/// Changes that come together are seen together: a list of changes ends when none came for this long.
const QUIET: Duration = Duration::from_millis(50);
/// A cluster that never rests is looked at this often all the same.
const AT_MOST: Duration = Duration::from_millis(500);
/// How long the first view waits for the Peers and the servers' addresses once the Nodes are there.
///
/// Without the addresses the plan could take the way to the API server away from this very node.
const REST: Duration = Duration::from_secs(5);

/// What is known of the cluster at one moment.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct View {
    /// The objects that could be read; what only the agent knows is left empty.
    pub snapshot: Arc<Snapshot>,
    /// What was refused of them.
    pub rejected: BTreeSet<Rejected>,
    /// The API servers.
    pub servers: Servers,
    /// When the own Node was last changed by anyone, in Unix seconds of the API server, as far as the
    /// API tells.
    pub own_changed: Option<i64>,
    /// Whether this comes from the API; else it is what the cache held.
    pub live: bool,
}

/// How the API is reached, for people and probes.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ApiStatus {
    /// The server in use.
    pub origin: Option<Origin>,
    /// Why there is none, or none yet.
    pub error: Option<String>,
    /// Which admission policies are not in force, in sentences, as far as this agent has looked.
    pub missing_policies: Vec<String>,
}

/// The agent's dealings with the API. They end when this is dropped.
#[derive(Debug)]
pub struct Cluster {
    views: watch::Receiver<Option<Arc<View>>>,
    api_status: watch::Receiver<ApiStatus>,
    desired: watch::Sender<Option<Annotations>>,
    notices: watch::Sender<BTreeSet<Notice>>,
    verdicts: watch::Sender<Verdicts>,
    tasks: JoinSet<()>,
}

impl Cluster {
    /// Begins to look for a server and to follow the cluster, for the agent of the Node `own`.
    ///
    /// With a `cached` view, that is the first to be seen; else the first is seen when the lists are
    /// complete.
    pub fn start(
        access: Access,
        own: NodeName,
        settings: ParseSettings,
        cached: Option<View>,
    ) -> Self {
        Self::start_with(access, own, settings, cached, &Timeouts::default())
    }

    /// [`Self::start`] with another timeouts, for tests that have little.
    pub fn start_with(
        access: Access,
        own: NodeName,
        settings: ParseSettings,
        cached: Option<View>,
        timeouts: &Timeouts,
    ) -> Self {
        let cached = cached.map(|view| View {
            live: false,
            ..view
        });
        let (views, seen) = watch::channel(cached.clone().map(Arc::new));
        let (desired, to_publish) = watch::channel(None);
        let (notices, new_notices) = watch::channel(BTreeSet::new());
        let (verdicts, to_judge) = watch::channel(Verdicts::new());
        let (conditions, told) = watch::channel(conditions::Conditions::new());
        let (connections, connection) = watch::channel(None);
        let (statuses, api_status) = watch::channel(ApiStatus::default());
        let (switch_requests, switch_request) = mpsc::channel(8);
        let (shown, to_compare) = watch::channel(None);
        let (pending_events, to_send) = mpsc::channel(events::QUEUE);
        let cached = cached.unwrap_or_default();
        let knows_servers = !cached.servers.addresses.is_empty();
        let (servers, addresses) = watch::channel(cached.servers);

        let store = Store::new(settings, own.clone(), &cached.snapshot);
        let (nodes, peers) = store.counts();
        // Small: the watch waits for the store, and not memory for both.
        let (node_events, of_nodes) = mpsc::channel(16);
        let (peer_events, of_peers) = mpsc::channel(16);
        let known = |known, never_empty| Expectation { known, never_empty };

        let mark = access.mark();
        let mut tasks = JoinSet::new();
        tasks.spawn(policies::run(
            own.clone(),
            connection.clone(),
            seen.clone(),
            statuses.clone(),
            timeouts.policies,
        ));
        tasks.spawn(connect(access, connections, statuses, switch_request));
        tasks.spawn(
            ListWatch::new(known(nodes, true), timeouts.clone(), node_events)
                .run(connection.clone(), switch_requests.clone()),
        );
        tasks.spawn(
            ListWatch::new(known(peers, false), timeouts.clone(), peer_events)
                .run(connection.clone(), switch_requests),
        );
        tasks.spawn(servers::run(mark, connection.clone(), servers));
        tasks.spawn(publish::run(
            own.clone(),
            connection.clone(),
            to_publish,
            to_compare,
        ));
        tasks.spawn(conditions::run(connection.clone(), to_judge, told));
        tasks.spawn(events::run(own.clone(), connection, to_send));
        let publisher = ViewPublisher {
            own,
            store,
            notice_filter: events::NoticeFilter::default(),
            views,
            shown,
            conditions,
            pending_events,
            addresses,
            knows_servers,
            notices: new_notices,
            api_status: api_status.clone(),
        };
        tasks.spawn(publisher.run(of_nodes, of_peers));

        Self {
            views: seen,
            api_status,
            desired,
            notices,
            verdicts,
            tasks,
        }
    }

    /// Ends all dealings: nothing is published any more.
    pub fn end(&mut self) {
        self.tasks.abort_all();
    }

    /// The cluster as it is known; none until anything is. Only changes wake who waits for them.
    pub fn views(&self) -> watch::Receiver<Option<Arc<View>>> {
        self.views.clone()
    }

    /// How the API is reached.
    pub fn api_status(&self) -> watch::Receiver<ApiStatus> {
        self.api_status.clone()
    }

    /// Says what the own Node is to carry. Written in the background, and again whenever it differs.
    pub fn publish(&self, annotations: Annotations) {
        self.desired.send_if_modified(|desired| {
            let changed = desired.as_ref() != Some(&annotations);
            *desired = Some(annotations);
            changed
        });
    }

    /// Says what became of the Peers. Told to them in the background, where it is news.
    pub fn judge(&self, verdicts: Verdicts) {
        self.verdicts.send_if_modified(|current| {
            let changed = *current != verdicts;
            *current = verdicts;
            changed
        });
    }

    /// Says all that is to be reported beside what was refused while reading.
    pub fn report(&self, notices: BTreeSet<Notice>) {
        self.notices.send_if_modified(|current| {
            let changed = *current != notices;
            *current = notices;
            changed
        });
    }
}

/// Looks for a server at the start and whenever the one in use is complained of.
async fn connect(
    access: Access,
    connections: watch::Sender<Option<Connection>>,
    statuses: watch::Sender<ApiStatus>,
    mut switch_requests: mpsc::Receiver<SwitchRequest>,
) {
    // Short: the data plane waits for no server, but people wait for their changes.
    let mut backoff = backoff::Backoff::up_to(Duration::from_secs(5));
    let mut avoid = None;
    let mut last = None;
    for number in 1.. {
        match access.connect(number, avoid.as_ref()).await {
            Ok(connection) => {
                let origin = connection.origin.clone();
                if last.as_ref() != Some(&origin) || backoff.failures() > 0 {
                    tracing::info!(server = %origin, "connected to the API");
                }
                last = Some(origin.clone());
                statuses.send_modify(|api_status| {
                    api_status.origin = Some(origin.clone());
                    api_status.error = None;
                });
                if connections.send(Some(connection)).is_err() {
                    return;
                }
                // Complaints of what was given up before are not about this one.
                let switch_request = loop {
                    match switch_requests.recv().await {
                        None => return,
                        Some(switch_request) if switch_request.number == number => {
                            break switch_request;
                        }
                        Some(_) => {}
                    }
                };
                tracing::debug!(server = %origin, failure = %switch_request.failure, "looking for a server");
                statuses.send_modify(|api_status| {
                    api_status.error = Some(switch_request.failure.to_string())
                });
                if switch_request.failure.is_of_connection() {
                    avoid = Some(origin);
                }
                backoff.reset();
                // A server that accepts a connection and then fails must not be asked in a loop.
                tokio::time::sleep(backoff::jitter(Duration::from_secs(1))).await;
            }
            Err(error) => {
                let pause = backoff.pause(None);
                // Said again when it is news, not at every attempt.
                let error = error.to_string();
                let news = statuses.borrow().error.as_ref() != Some(&error);
                if news {
                    tracing::warn!("{error}");
                }
                statuses.send_modify(|api_status| {
                    api_status.origin = None;
                    api_status.error = Some(error);
                });
                tokio::time::sleep(pause).await;
            }
        }
    }
}

/// Owns what is known, and shows it.
struct ViewPublisher {
    own: NodeName,
    store: Store,
    notice_filter: events::NoticeFilter,
    views: watch::Sender<Option<Arc<View>>>,
    shown: watch::Sender<publish::Shown>,
    conditions: watch::Sender<conditions::Conditions>,
    pending_events: mpsc::Sender<events::PendingEvent>,
    addresses: watch::Receiver<Servers>,
    knows_servers: bool,
    notices: watch::Receiver<BTreeSet<Notice>>,
    api_status: watch::Receiver<ApiStatus>,
}

impl ViewPublisher {
    async fn run(
        mut self,
        mut nodes: mpsc::Receiver<Event<node::NodeObject>>,
        mut peers: mpsc::Receiver<Event<peer::PeerObject>>,
    ) {
        // When the first and the last change came that were not shown yet.
        let mut changed: Option<(Instant, Instant)> = None;
        let mut rest_by: Option<Instant> = None;
        loop {
            let now = Instant::now();
            let all = self.store.knows_peers() && self.knows_servers;
            if self.store.knows_nodes() && rest_by.is_none() {
                rest_by = Some(now + REST);
            }
            let complete = self.store.knows_nodes() && (all || rest_by.is_some_and(|by| now >= by));
            let show_at = changed.map(|(first, last)| (last + QUIET).min(first + AT_MOST));
            let show_at = match (complete, show_at) {
                (true, at) => at,
                (false, _) => rest_by,
            };

            let news = tokio::select! {
                event = nodes.recv() => match event {
                    Some(event) => {
                        log_event("Nodes", &event);
                        self.store.handle_node(event)
                    }
                    None => return,
                },
                event = peers.recv() => match event {
                    Some(event) => {
                        log_event("Peers", &event);
                        self.store.handle_peer(event)
                    }
                    None => return,
                },
                addresses = self.addresses.changed() => match addresses {
                    Ok(()) => {
                        self.knows_servers = true;
                        true
                    }
                    Err(_) => return,
                },
                notices = self.notices.changed() => match notices {
                    Ok(()) => true,
                    Err(_) => return,
                },
                api_status = self.api_status.changed() => match api_status {
                    Ok(()) => true,
                    Err(_) => return,
                },
                () = sleep_until(show_at) => {
                    changed = None;
                    self.show();
                    continue;
                }
            };
            if news {
                let now = Instant::now();
                changed = Some((changed.map_or(now, |(first, _)| first), now));
            }
        }
    }

    fn show(&mut self) {
        let view = View {
            snapshot: Arc::new(self.store.snapshot()),
            rejected: self.store.rejected(),
            servers: self.addresses.borrow_and_update().clone(),
            own_changed: self.store.own_changed(),
            live: true,
        };

        let published = self.store.published().cloned();
        self.shown.send_if_modified(|shown| {
            let changed = *shown != published;
            *shown = published;
            changed
        });

        let told = self.store.conditions();
        self.conditions.send_if_modified(|conditions| {
            let changed = *conditions != told;
            *conditions = told;
            changed
        });

        let mut notices: BTreeSet<_> = view.rejected.iter().map(Notice::from).collect();
        notices.extend(self.notices.borrow_and_update().iter().cloned());
        let missing = &self.api_status.borrow_and_update().missing_policies;
        notices.extend(policies::notice(&self.own, missing));
        for notice in self.notice_filter.news(notices, Instant::now()) {
            tracing::warn!("{}", notice.note);
            if events::is_reporter(&self.own, &notice.object, &view.snapshot) {
                let uid = match &notice.object {
                    Object::Node(_) => String::new(),
                    Object::Peer(name) => self.store.peer_uid(name).to_owned(),
                };
                // A full queue drops the Event; the log has the notice.
                let _ = self
                    .pending_events
                    .try_send(events::PendingEvent { notice, uid });
            }
        }

        self.views.send_if_modified(|shown| {
            let changed = shown.as_deref() != Some(&view);
            if changed {
                *shown = Some(Arc::new(view));
            }
            changed
        });
    }
}

/// Logs what the store does not keep.
fn log_event<K>(what: &str, event: &Event<K>) {
    match event {
        Event::Forbidden(reason) => {
            tracing::warn!(%reason, "the agent may not read {what}: check its ClusterRole");
        }
        Event::Absent => tracing::debug!("there is no definition of {what}"),
        Event::Undecodable(reason) => {
            tracing::warn!(%reason, "one of the {what} cannot be decoded")
        }
        Event::Listing
        | Event::Listed(_)
        | Event::Complete
        | Event::Applied(_)
        | Event::Deleted(_) => {}
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
