//! Watches: what they begin with, and the task that feeds each of them.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt as _;
use http_body_util::channel::{Channel, Sender};
use hyper::Response;
use serde_json::{Value, json};

use super::super::fault::Faults;
use super::super::store::{Kind, Refused, Selector};
use super::super::{Shared, State};
use super::{Body, Call, Target, respond};

/// Begins a watch: a list where one is asked for, then all that happens.
pub(super) fn watch(
    shared: &Arc<Shared>,
    state: &mut State,
    call: &Call,
    target: &Target,
    user: &str,
) -> Result<Response<Body>, Refused> {
    let selector = state.selector(call, target, user)?;
    let mut from = call.revision()?;
    let streamed = call.is_set("sendInitialEvents") && !state.faults.ignore_streamed_lists;
    if streamed && state.faults.no_streamed_lists {
        let message = "sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled";
        return Err(Refused::new(422, "Invalid", message));
    }
    let mut first = Vec::new();
    let mut ended = false;
    if from > 0 && !streamed && Faults::spend(&mut state.faults.gone) {
        if state.faults.gone_as_status {
            return Err(Refused::gone());
        }
        first.push(line("ERROR", &Refused::gone().status()));
        ended = true;
    } else if streamed || from == 0 {
        let mut items: Vec<_> = state.store.list(target.kind, &selector).collect();
        if streamed && Faults::spend(&mut state.faults.truncate.0) {
            items.truncate(state.faults.truncate.1);
        }
        first.extend(items.iter().map(|object| line("ADDED", object)));
        from = state.store.revision();
        if streamed {
            first.push(bookmark(target.kind, from, true));
        }
    } else if !state.store.keeps(from) {
        first.push(line("ERROR", &Refused::gone().status()));
        ended = true;
    }

    let (sender, body) = Channel::<Bytes, io::Error>::new(16);
    let seconds = call.asks("timeoutSeconds").parse().unwrap_or(1800);
    let watcher = Watcher {
        shared: Arc::clone(shared),
        kind: target.kind,
        selector,
        from,
        bookmarks: call.is_set("allowWatchBookmarks"),
        until: tokio::time::Instant::now() + Duration::from_secs(seconds),
        epoch: state.watch_epoch,
        ended,
    };
    tokio::spawn(watcher.run(sender, first));
    Ok(respond(200, "application/json", body.boxed()))
}

/// Feeds one watch.
struct Watcher {
    shared: Arc<Shared>,
    kind: &'static Kind,
    selector: Selector,
    from: u64,
    bookmarks: bool,
    until: tokio::time::Instant,
    epoch: u64,
    /// Whether it ends after what it begins with.
    ended: bool,
}

impl Watcher {
    async fn run(mut self, mut sender: Sender<Bytes, io::Error>, first: Vec<Bytes>) {
        for line in first {
            if sender.send_data(line).await.is_err() {
                return;
            }
        }
        let mut changes = self.shared.changes.subscribe();
        let mut bookmark_at = tokio::time::Instant::now() + self.shared.bookmarks;
        let shared = Arc::clone(&self.shared);
        while !self.ended {
            let (lines, stalled) = {
                let state = shared.state();
                let faults = &state.faults;
                if faults.short_watches || state.watch_epoch != self.epoch {
                    return;
                }
                match faults.stall_watches || faults.half_open {
                    true => (Vec::new(), true),
                    false => (self.take(&state), false),
                }
            };
            for line in lines {
                if sender.send_data(line).await.is_err() {
                    return;
                }
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(self.until) => return,
                () = tokio::time::sleep_until(bookmark_at) => {
                    bookmark_at += self.shared.bookmarks;
                    if self.bookmarks && !stalled {
                        let line = bookmark(self.kind, self.from, false);
                        if sender.send_data(line).await.is_err() {
                            return;
                        }
                    }
                }
            }
        }
    }

    /// What happened since the last look.
    fn take(&mut self, state: &State) -> Vec<Bytes> {
        let lines = match state.store.changes_after(self.from) {
            Ok(changes) => changes
                .filter(|change| {
                    change.plural == self.kind.plural && self.selector.matches(&change.object)
                })
                .map(|change| line(change.event, &change.object))
                .collect(),
            Err(gone) => {
                self.ended = true;
                vec![line("ERROR", &gone.status())]
            }
        };
        self.from = state.store.revision();
        lines
    }
}

fn line(event: &str, object: &Value) -> Bytes {
    let mut line = json!({"type": event, "object": object}).to_string();
    line.push('\n');
    line.into()
}

fn bookmark(kind: &Kind, revision: u64, ends_list: bool) -> Bytes {
    let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
    if ends_list {
        metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
    }
    line(
        "BOOKMARK",
        &json!({
            "kind": kind.kind,
            "apiVersion": kind.api_version(),
            "metadata": metadata,
        }),
    )
}
