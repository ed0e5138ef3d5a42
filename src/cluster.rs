//! Access to the Kubernetes API: finding a server, watching Nodes and Peers, publishing.
//!
//! [`crate::topology`] decides what the objects mean together. The data plane never waits for the
//! API: [`Cluster`] runs on its own tasks, and the agent reads [`View`]s and sets what to publish
//! and to report.

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
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

pub use access::{Access, Origin, Sources};
pub use backoff::Timeouts;
pub use conditions::{Verdict, Verdicts, verdicts};
pub use events::Notice;
pub use node::ParseSettings;
pub use publish::{Annotations, withdraw};
pub use rejected::Rejected;
pub use servers::Servers;

use access::Connection;
use listwatch::{Event, Expectation, ListWatch, SwitchRequest};
use store::Store;

use crate::clock;
use crate::topology::{NodeName, Object, Snapshot};

/// Debounce: a view is sent when no change arrived for this long.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// A view is sent at least this often while changes keep arriving.
const MAX_DEBOUNCE: Duration = Duration::from_millis(500);
/// How long the first view waits for the Peers and the servers' addresses once the Nodes are known.
///
/// Without the addresses the plan could cut this node off from its API server.
const FIRST_VIEW_TIMEOUT: Duration = Duration::from_secs(5);

/// The cluster at one moment, as far as the agent knows it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct View {
    /// The objects that could be parsed; fields that only the agent knows are empty.
    pub snapshot: Arc<Snapshot>,
    /// The values of these objects that were refused.
    pub rejected: BTreeSet<Rejected>,
    /// The API servers.
    pub servers: Servers,
    /// The last change of the own Node, in Unix seconds of the API server; `None` where the API does
    /// not say.
    pub own_changed: Option<i64>,
    /// Whether the view comes from the API; otherwise it comes from the cache on disk.
    pub live: bool,
}

/// The state of the connection to the API, for people and probes.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ApiStatus {
    /// The server in use.
    pub origin: Option<Origin>,
    /// The last error; `None` while the connection works.
    pub error: Option<String>,
    /// Admission policies that are not in force, one sentence each, as of this agent's last check.
    pub missing_policies: Vec<String>,
}

/// The agent's tasks that talk to the API. Dropping it ends them.
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
    /// Starts to connect to a server and to watch the cluster, for the agent of the Node `own`.
    ///
    /// A `cached` view becomes the first view. Without one, the first view is sent when the lists
    /// are complete.
    pub fn start(
        access: Access,
        own: NodeName,
        settings: ParseSettings,
        cached: Option<View>,
    ) -> Self {
        Self::start_with(access, own, settings, cached, &Timeouts::default())
    }

    /// [`Self::start`] with other timeouts, for tests.
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
        let (notices, notices_to_report) = watch::channel(BTreeSet::new());
        let (verdicts, to_judge) = watch::channel(Verdicts::new());
        let (conditions, observed) = watch::channel(conditions::Conditions::new());
        let (connections, connection) = watch::channel(None);
        let (statuses, api_status) = watch::channel(ApiStatus::default());
        let (switch_requests, switch_request) = mpsc::channel(8);
        let (own_annotations, to_compare) = watch::channel(None);
        let (pending_events, to_send) = mpsc::channel(events::QUEUE);
        let cached = cached.unwrap_or_default();
        let knows_servers = !cached.servers.addresses.is_empty();
        let (servers, addresses) = watch::channel(cached.servers);

        let store = Store::new(settings, own.clone(), &cached.snapshot);
        let (nodes, peers) = store.counts();
        // Small, so that the watch waits for the store instead of filling memory.
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
        tasks.spawn(conditions::run(connection.clone(), to_judge, observed));
        tasks.spawn(events::run(own.clone(), connection, to_send));
        let publisher = ViewPublisher {
            own,
            store,
            notice_filter: events::NoticeFilter::default(),
            views,
            own_annotations,
            conditions,
            pending_events,
            addresses,
            knows_servers,
            notices: notices_to_report,
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

    /// Ends all tasks: nothing is published after this.
    pub fn end(&mut self) {
        self.tasks.abort_all();
    }

    /// The latest view; `None` before the first. The receiver wakes on changes only.
    pub fn views(&self) -> watch::Receiver<Option<Arc<View>>> {
        self.views.clone()
    }

    /// The state of the connection to the API.
    pub fn api_status(&self) -> watch::Receiver<ApiStatus> {
        self.api_status.clone()
    }

    /// Sets the annotations of the own Node. A task writes them, and again whenever the Node differs.
    pub fn publish(&self, annotations: Annotations) {
        self.desired.send_if_modified(|desired| {
            let changed = desired.as_ref() != Some(&annotations);
            *desired = Some(annotations);
            changed
        });
    }

    /// Sets the verdict on each Peer. A task writes them as conditions where they changed.
    pub fn judge(&self, verdicts: Verdicts) {
        self.verdicts.send_if_modified(|current| {
            let changed = *current != verdicts;
            *current = verdicts;
            changed
        });
    }

    /// Sets all notices, except those about values refused by the parser, which the cluster adds.
    pub fn report(&self, notices: BTreeSet<Notice>) {
        self.notices.send_if_modified(|current| {
            let changed = *current != notices;
            *current = notices;
            changed
        });
    }
}

/// Connects to a server at the start and after each request to switch.
async fn connect(
    access: Access,
    connections: watch::Sender<Option<Connection>>,
    statuses: watch::Sender<ApiStatus>,
    mut switch_requests: mpsc::Receiver<SwitchRequest>,
) {
    // Short: the data plane does not wait for a server, but operators wait for their changes.
    let mut backoff = backoff::Backoff::up_to(Duration::from_secs(5));
    let mut avoid = None;
    let mut last = None;
    for number in 1.. {
        match access.connect(number, avoid.as_ref()).await {
            Ok(connection) => {
                let origin = connection.origin.clone();
                if last.as_ref() != Some(&origin) || backoff.failures() > 0 {
                    tracing::info!(server = %origin, "API server connected");
                }
                last = Some(origin.clone());
                statuses.send_modify(|api_status| {
                    api_status.origin = Some(origin.clone());
                    api_status.error = None;
                });
                if connections.send(Some(connection)).is_err() {
                    return;
                }
                // Requests about earlier connections do not concern this one.
                let switch_request = loop {
                    match switch_requests.recv().await {
                        None => return,
                        Some(switch_request) if switch_request.number == number => {
                            break switch_request;
                        }
                        Some(_) => {}
                    }
                };
                tracing::debug!(server = %origin, error = %switch_request.failure, "API server given up");
                statuses.send_modify(|api_status| {
                    api_status.error = Some(switch_request.failure.to_string())
                });
                if switch_request.failure.is_of_connection() {
                    avoid = Some(origin);
                }
                backoff.reset();
                // A server that accepts a connection and then fails must not be retried in a loop.
                tokio::time::sleep(backoff::jitter(Duration::from_secs(1))).await;
            }
            Err(error) => {
                let pause = backoff.pause(None);
                // Logged when the error changes, not at every attempt.
                let error = error.to_string();
                if statuses.borrow().error.as_ref() != Some(&error) {
                    tracing::warn!(%error, "no API server reached");
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

/// Owns the store and publishes a [`View`] of it after each burst of changes.
struct ViewPublisher {
    own: NodeName,
    store: Store,
    notice_filter: events::NoticeFilter,
    views: watch::Sender<Option<Arc<View>>>,
    own_annotations: watch::Sender<publish::Observed>,
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
        // Times of the first and the last change since the last view.
        let mut changed: Option<(Instant, Instant)> = None;
        let mut first_view_by: Option<Instant> = None;
        loop {
            let now = clock::now();
            let all = self.store.knows_peers() && self.knows_servers;
            if self.store.knows_nodes() && first_view_by.is_none() {
                first_view_by = Some(now + FIRST_VIEW_TIMEOUT);
            }
            let complete =
                self.store.knows_nodes() && (all || first_view_by.is_some_and(|by| now >= by));
            let publish_at =
                changed.map(|(first, last)| (last + DEBOUNCE).min(first + MAX_DEBOUNCE));
            let publish_at = match (complete, publish_at) {
                (true, at) => at,
                (false, _) => first_view_by,
            };

            let changed_view = tokio::select! {
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
                () = clock::sleep_until(publish_at) => {
                    changed = None;
                    self.publish();
                    continue;
                }
            };
            if changed_view {
                let now = clock::now();
                changed = Some((changed.map_or(now, |(first, _)| first), now));
            }
        }
    }

    fn publish(&mut self) {
        let view = View {
            snapshot: Arc::new(self.store.snapshot()),
            rejected: self.store.rejected(),
            servers: self.addresses.borrow_and_update().clone(),
            own_changed: self.store.own_changed(),
            live: true,
        };

        let published = self.store.published().cloned();
        self.own_annotations.send_if_modified(|observed| {
            let changed = *observed != published;
            *observed = published;
            changed
        });

        let observed = self.store.conditions();
        self.conditions.send_if_modified(|conditions| {
            let changed = *conditions != observed;
            *conditions = observed;
            changed
        });

        let mut notices: BTreeSet<_> = view.rejected.iter().map(Notice::from).collect();
        notices.extend(self.notices.borrow_and_update().iter().cloned());
        let missing = &self.api_status.borrow_and_update().missing_policies;
        notices.extend(policies::notice(&self.own, missing));
        for notice in self.notice_filter.new_notices(notices, clock::now()) {
            tracing::warn!(object = %notice.object, reason = notice.reason, notice = %notice.note, "object problem found");
            if events::is_reporter(&self.own, &notice.object, &view.snapshot) {
                let uid = match &notice.object {
                    Object::Node(_) => String::new(),
                    Object::Peer(name) => self.store.peer_uid(name).to_owned(),
                };
                // A full queue drops the Event; the log holds the notice.
                let _ = self
                    .pending_events
                    .try_send(events::PendingEvent { notice, uid });
            }
        }

        self.views.send_if_modified(|latest| {
            let changed = latest.as_deref() != Some(&view);
            if changed {
                *latest = Some(Arc::new(view));
            }
            changed
        });
    }
}

/// Logs events that the store does not record.
fn log_event<K>(resource: &str, event: &Event<K>) {
    match event {
        Event::Forbidden(reason) => {
            tracing::warn!(resource, error = %reason, "reading objects refused: check the ClusterRole");
        }
        Event::Absent => tracing::debug!(resource, "resource not defined"),
        Event::Undecodable(reason) => {
            tracing::warn!(resource, error = %reason, "decoding an object failed");
        }
        Event::Listing
        | Event::Listed(_)
        | Event::Complete
        | Event::Applied(_)
        | Event::Deleted(_) => {}
    }
}
