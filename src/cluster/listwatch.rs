//! Follows one collection of the API: a list, then a watch from the list's resource version.
//!
//! This is not `kube::runtime`, because an agent on every node must not burden a failing API server:
//! a watch that ends as soon as it starts is not reopened at once, 410 to the request itself leads to
//! a new list, `Retry-After` is honoured up to a limit, lists have a budget, a silent connection is
//! closed, and an object that cannot be decoded is skipped alone.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::time::Duration;

use http::Response;
use kube::client::Body;
use kube::{Client, Resource};
use rand::RngExt as _;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use tokio::sync::{mpsc, watch};

use super::access::Connection;
use super::backoff::{Backoff, Budget, Timeouts, jitter};
use super::call::{self, Failure, Status};

use crate::clock::now;

/// Objects per page of a list; a hundred Nodes take some two megabytes while they are decoded.
const PAGE: u32 = 100;
/// The server ends a watch after this many seconds, so that watches spread over the servers again.
const WATCH_SECONDS: std::ops::RangeInclusive<u32> = 300..=600;
/// A watch that ended sooner counts as failed, even without an error.
const SHORT_WATCH: Duration = Duration::from_secs(5);
/// Longest line of a watch; an object is at most 1.5 MB (etcd's limit) and escapes add to that.
const MAX_LINE: usize = 4 << 20;
/// Consecutive failures after which the agent switches to another server.
const MAX_FAILURES: u32 = 3;

/// An event of a collection; to be applied in order.
#[derive(Debug)]
pub(super) enum Event<K> {
    /// A list starts: drop the objects of an unfinished one.
    Listing,
    /// An object of the list.
    Listed(K),
    /// The list is complete and trusted: it replaces all known objects.
    Complete,
    /// An object was added or changed.
    Applied(K),
    /// An object was deleted.
    Deleted(K),
    /// The resource is not served at all: there are no objects of it.
    Absent,
    /// Reading the resource is forbidden: the state of its objects is unknown.
    Forbidden(String),
    /// An object could not be decoded and is skipped.
    Undecodable(String),
}

/// How a list is requested.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Strategy {
    /// As the start of a watch (Kubernetes 1.34, by default from 1.32): the server holds no
    /// list in memory, and neither does the agent.
    Streamed,
    /// In pages.
    Paged,
}

/// The expected size of a collection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Expectation {
    /// The number of objects known before, for example from the cache on disk.
    pub(super) known: usize,
    /// Whether an empty list is always suspicious.
    pub(super) never_empty: bool,
}

impl Expectation {
    /// Whether a list of `count` objects needs a second list to confirm it.
    const fn doubts(self, count: usize) -> bool {
        count * 2 < self.known || (self.never_empty && count == 0)
    }
}

/// A request to switch to another server.
#[derive(Clone, Debug)]
pub(super) struct SwitchRequest {
    /// The number of the failed connection.
    pub(super) number: u64,
    /// The failure.
    pub(super) failure: Failure,
}

/// Follows one collection over any number of connections.
pub(super) struct ListWatch<K> {
    path: String,
    timeouts: Timeouts,
    strategy: Strategy,
    /// The resource version to watch from; `None` until a list is complete.
    version: Option<String>,
    expectation: Expectation,
    /// Whether the last list was doubted: the next is trusted.
    doubted: bool,
    /// Consecutive 404 answers. A starting server gives some too.
    absences: u32,
    lists: Budget,
    backoff: Backoff,
    events: mpsc::Sender<Event<K>>,
    kind: PhantomData<fn() -> K>,
}

/// How a session with a server ended.
enum End {
    /// The server ended the watch.
    Watched,
    /// The list must be requested once more before it is trusted.
    Doubted,
    /// The receiver of the events was dropped.
    Unwanted,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMeta {
    #[serde(default)]
    resource_version: String,
    #[serde(default, rename = "continue")]
    more: Option<String>,
}

#[derive(Deserialize)]
struct Page<'a> {
    metadata: ListMeta,
    #[serde(borrow, default)]
    items: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize)]
struct Marked {
    metadata: Mark,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mark {
    #[serde(default)]
    resource_version: String,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

impl<K> ListWatch<K>
where
    K: Resource<DynamicType = ()> + DeserializeOwned + Send + 'static,
{
    /// Prepares to follow the collection of `K`.
    pub(super) fn new(
        expectation: Expectation,
        timeouts: Timeouts,
        events: mpsc::Sender<Event<K>>,
    ) -> Self {
        Self {
            path: K::url_path(&(), None),
            strategy: Strategy::Streamed,
            version: None,
            expectation,
            doubted: false,
            absences: 0,
            // Enough for a start and one failure.
            lists: Budget::new(3, timeouts.between_lists),
            timeouts,
            backoff: Backoff::up_to(Duration::from_secs(30)),
            events,
            kind: PhantomData,
        }
    }

    /// Follows the collection until the receiver of its events is dropped.
    pub(super) async fn run(
        mut self,
        mut connections: watch::Receiver<Option<Connection>>,
        switch_requests: mpsc::Sender<SwitchRequest>,
    ) {
        loop {
            let Some(connection) = connections.borrow_and_update().clone() else {
                if connections.changed().await.is_err() {
                    return;
                }
                continue;
            };
            let began = now();
            let pause = match self.session(&connection.client).await {
                Ok(End::Unwanted) => return,
                Ok(End::Doubted) => jitter(self.timeouts.second_look),
                Ok(End::Watched) if began.elapsed() >= SHORT_WATCH => {
                    self.backoff.reset();
                    continue;
                }
                Ok(End::Watched) => self.backoff.pause(None),
                Err(failure) => {
                    if began.elapsed() >= SHORT_WATCH && failure == Failure::Gone {
                        self.backoff.reset();
                    }
                    tracing::debug!(resource = self.path, error = %failure, "watch failed");
                    match self.pause_after(&failure).await {
                        Some(pause) => {
                            self.request_switch(&connection, failure, &switch_requests);
                            pause
                        }
                        None => return,
                    }
                }
            };
            // A new connection is tried at once.
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                changed = connections.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Handles a failure; returns the pause before the next attempt, or `None` when the receiver is gone.
    async fn pause_after(&mut self, failure: &Failure) -> Option<Duration> {
        match failure {
            Failure::Gone => {
                self.version = None;
                Some(self.backoff.pause(None))
            }
            Failure::Busy { pause, .. } => Some(self.backoff.pause(*pause)),
            Failure::Absent => {
                self.version = None;
                self.absences += 1;
                if self.absences > 1 || self.expectation.known == 0 {
                    self.expectation.known = 0;
                    self.events.send(Event::Absent).await.ok()?;
                }
                Some(jitter(self.timeouts.absent))
            }
            Failure::Forbidden(reason) => {
                self.version = None;
                let event = Event::Forbidden(reason.clone());
                self.events.send(event).await.ok()?;
                Some(self.backoff.pause(None))
            }
            failure if call::is_invalid(failure) && self.strategy == Strategy::Streamed => {
                self.strategy = Strategy::Paged;
                Some(Duration::ZERO)
            }
            Failure::Refused { .. } | Failure::Unreadable(_) => {
                self.version = None;
                Some(self.backoff.pause(None))
            }
            Failure::Unreachable(_) | Failure::Silent(_) | Failure::Unauthorized => {
                Some(self.backoff.pause(None))
            }
        }
    }

    /// Requests another server if this one failed often enough, or cannot be used.
    fn request_switch(
        &self,
        connection: &Connection,
        failure: Failure,
        switch_requests: &mpsc::Sender<SwitchRequest>,
    ) {
        let unusable = failure == Failure::Unauthorized;
        let exhausted = failure.is_of_connection() && self.backoff.failures() >= MAX_FAILURES;
        if unusable || exhausted || matches!(failure, Failure::Silent(_)) {
            let number = connection.number;
            // A full queue holds such requests already.
            let _ = switch_requests.try_send(SwitchRequest { number, failure });
        }
    }

    async fn session(&mut self, client: &Client) -> Result<End, Failure> {
        let response = match (&self.version, self.strategy) {
            (Some(version), _) => {
                self.watch(client, &format!("&resourceVersion={version}"))
                    .await?
            }
            (None, Strategy::Streamed) => {
                self.spend_list().await;
                let query = "&sendInitialEvents=true&resourceVersionMatch=NotOlderThan";
                let response = self.watch(client, query).await?;
                if self.events.send(Event::Listing).await.is_err() {
                    return Ok(End::Unwanted);
                }
                response
            }
            (None, Strategy::Paged) => {
                self.spend_list().await;
                match self.list(client).await? {
                    Some(end) => return Ok(end),
                    None => {
                        let version = self.version.clone().unwrap_or_default();
                        self.watch(client, &format!("&resourceVersion={version}"))
                            .await?
                    }
                }
            }
        };
        self.follow(response).await
    }

    async fn spend_list(&mut self) {
        let wait = self.lists.take(now());
        if !wait.is_zero() {
            tracing::debug!(
                resource = self.path,
                wait_seconds = wait.as_secs(),
                "list rate-limited"
            );
            tokio::time::sleep(wait + jitter(wait / 4)).await;
        }
    }

    async fn watch(&self, client: &Client, query: &str) -> Result<Response<Body>, Failure> {
        let seconds = rand::rng().random_range(WATCH_SECONDS);
        let path = &self.path;
        let uri =
            format!("{path}?watch=true&allowWatchBookmarks=true&timeoutSeconds={seconds}{query}");
        call::open(client, call::get(&uri)).await
    }

    /// Lists in pages. `None` means that the list is complete and a watch may start.
    async fn list(&mut self, client: &Client) -> Result<Option<End>, Failure> {
        if self.events.send(Event::Listing).await.is_err() {
            return Ok(Some(End::Unwanted));
        }
        let mut more = String::new();
        let mut count = 0;
        loop {
            let uri = format!("{}?limit={PAGE}{more}", self.path);
            let body = call::call(client, call::get(&uri)).await?;
            let page: Page<'_> = serde_json::from_slice(&body)
                .map_err(|error| Failure::Unreadable(crate::text::message(&error.to_string())))?;
            for item in page.items.iter().flatten() {
                count += 1;
                if self.events.send(decode(item, Event::Listed)).await.is_err() {
                    return Ok(Some(End::Unwanted));
                }
            }
            match page.metadata.more.filter(|token| !token.is_empty()) {
                Some(token) => more = format!("&continue={}", escape(&token)),
                None => return self.complete(count, page.metadata.resource_version).await,
            }
        }
    }

    /// Ends a list. `None` means that it is trusted.
    async fn complete(&mut self, count: usize, version: String) -> Result<Option<End>, Failure> {
        if version.is_empty() {
            return Err(Failure::Unreadable(
                "the list has no resourceVersion".to_owned(),
            ));
        }
        if self.expectation.doubts(count) && !self.doubted {
            tracing::warn!(
                resource = self.path,
                count,
                known = self.expectation.known,
                "list shrank by more than half: requested again before use"
            );
            self.doubted = true;
            return Ok(Some(End::Doubted));
        }
        self.doubted = false;
        self.absences = 0;
        self.expectation.known = count;
        self.version = Some(version);
        self.backoff.reset();
        match self.events.send(Event::Complete).await {
            Ok(()) => Ok(None),
            Err(_) => Ok(Some(End::Unwanted)),
        }
    }

    /// Reads a watch to its end, including the streamed list at its start if one was requested.
    async fn follow(&mut self, response: Response<Body>) -> Result<End, Failure> {
        let mut body = response.into_body();
        let mut lines = Lines::default();
        let mut listed = 0;
        let mut last_listed = now();
        loop {
            let listing = self.version.is_none();
            let timeouts = match listing {
                // Bookmarks do not show progress of the list; only its objects reset the timeout.
                true => self
                    .timeouts
                    .streamed_list
                    .saturating_sub(last_listed.elapsed()),
                false => self.timeouts.silence,
            };
            let piece = match call::next_piece(&mut body, timeouts).await {
                Err(Failure::Silent(_)) if listing => {
                    tracing::info!(
                        resource = self.path,
                        "API server does not stream lists: using pages"
                    );
                    self.strategy = Strategy::Paged;
                    return Ok(End::Watched);
                }
                piece => piece?,
            };
            let Some(piece) = piece else {
                return Ok(End::Watched);
            };
            lines.push(&piece)?;
            while let Some(line) = lines.next() {
                let before = listed;
                if let Some(end) = self.line(&line, &mut listed).await? {
                    return Ok(end);
                }
                if listed > before {
                    last_listed = now();
                }
            }
        }
    }

    /// Handles one line of a watch. `None` means to read on.
    async fn line(&mut self, line: &[u8], listed: &mut usize) -> Result<Option<End>, Failure> {
        let unreadable = |error: serde_json::Error| {
            Failure::Unreadable(crate::text::message(&error.to_string()))
        };
        let line: Line<'_> = serde_json::from_slice(line).map_err(unreadable)?;
        let mark = || serde_json::from_str::<Marked>(line.object.get()).map_err(unreadable);

        let listing = self.version.is_none();
        let event = match line.kind {
            "ADDED" | "MODIFIED" if listing => {
                *listed += 1;
                decode(line.object, Event::Listed)
            }
            "BOOKMARK" if listing => {
                let mark = mark()?.metadata;
                let complete = mark.annotations.is_some_and(|annotations| {
                    annotations.contains_key("k8s.io/initial-events-end")
                });
                return match complete {
                    true => self.complete(*listed, mark.resource_version).await,
                    false => Ok(None),
                };
            }
            "BOOKMARK" => {
                self.version = Some(mark()?.metadata.resource_version);
                return Ok(None);
            }
            "ADDED" => {
                self.expectation.known += 1;
                decode(line.object, Event::Applied)
            }
            "MODIFIED" => decode(line.object, Event::Applied),
            "DELETED" => {
                self.expectation.known = self.expectation.known.saturating_sub(1);
                decode(line.object, Event::Deleted)
            }
            "ERROR" => {
                let status: Status = serde_json::from_str(line.object.get()).map_err(unreadable)?;
                return Err(Failure::of(status, None));
            }
            // Event types of later servers.
            _ => return Ok(None),
        };
        if !listing {
            self.version = Some(mark()?.metadata.resource_version);
        }
        match self.events.send(event).await {
            Ok(()) => Ok(None),
            Err(_) => Ok(Some(End::Unwanted)),
        }
    }
}

fn decode<K: DeserializeOwned>(object: &RawValue, event: impl FnOnce(K) -> Event<K>) -> Event<K> {
    match serde_json::from_str(object.get()) {
        Ok(object) => event(object),
        Err(error) => Event::Undecodable(crate::text::message(&error.to_string())),
    }
}

/// Escapes a continue token, which is base64, for a query.
fn escape(token: &str) -> String {
    let mut escaped = String::new();
    for byte in token.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                escaped.push(char::from(byte));
            }
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

/// Cuts a stream of bytes into lines of bounded length.
#[derive(Debug, Default)]
struct Lines {
    buffer: Vec<u8>,
    /// Start of the bytes that were not returned yet.
    begin: usize,
}

impl Lines {
    fn push(&mut self, piece: &[u8]) -> Result<(), Failure> {
        self.buffer.drain(..self.begin);
        self.begin = 0;
        if self.buffer.is_empty() {
            // One large object must not occupy memory for the life of the watch.
            self.buffer.shrink_to(64 << 10);
        }
        if self.buffer.len() + piece.len() > MAX_LINE {
            return Err(Failure::Unreadable(
                "a line of the watch has no end".to_owned(),
            ));
        }
        self.buffer.extend_from_slice(piece);
        Ok(())
    }

    fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            let rest = &self.buffer[self.begin..];
            let length = rest.iter().position(|byte| *byte == b'\n')?;
            let line = rest[..length].to_vec();
            self.begin += length + 1;
            if !line.iter().all(u8::is_ascii_whitespace) {
                return Some(line);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_joined_across_pieces() {
        let mut lines = Lines::default();
        lines.push(b"one\ntw").unwrap();
        assert_eq!(lines.next().as_deref(), Some(b"one".as_slice()));
        assert_eq!(lines.next(), None);
        lines.push(b"o\n\n\nthree\n").unwrap();
        assert_eq!(lines.next().as_deref(), Some(b"two".as_slice()));
        assert_eq!(lines.next().as_deref(), Some(b"three".as_slice()));
        assert_eq!(lines.next(), None);
    }

    #[test]
    fn a_line_without_end_is_an_error() {
        let mut lines = Lines::default();
        let piece = vec![b'x'; 1 << 20];
        let outcome = (0..5).try_for_each(|_| lines.push(&piece));
        assert!(outcome.is_err());
    }

    #[test]
    fn a_list_is_doubted_when_more_than_half_is_missing() {
        let nodes = Expectation {
            known: 4,
            never_empty: true,
        };
        assert!(!nodes.doubts(4) && !nodes.doubts(2) && nodes.doubts(1) && nodes.doubts(0));
        let peers = Expectation {
            known: 0,
            never_empty: false,
        };
        assert!(!peers.doubts(0));
    }
}
