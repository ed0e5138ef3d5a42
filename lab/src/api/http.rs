//! The protocol: paths, verbs and watches, answered from the store as a real server would.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, RETRY_AFTER, USER_AGENT};
use hyper::{Method, Request, Response};
use serde_json::{Value, json};

use super::fault::Faults;
use super::store::{KINDS, Kind, PEERS, Refused, Selector, kind_of};
use super::{Logged, Shared, State, patch};

mod discovery;
mod watch;

type Body = BoxBody<Bytes, io::Error>;

/// Answers one request.
pub(super) async fn handle(
    shared: Arc<Shared>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let (parts, body) = request.into_parts();
    let call = Call::new(&parts.method, &parts.uri, &parts.headers);
    let body = body
        .collect()
        .await
        .map(http_body_util::Collected::to_bytes)
        .unwrap_or_default();

    let at = Instant::now();
    let user = shared.state().user(&parts.headers);
    let response = match &user {
        Ok(user) => {
            let faults = shared.state().faults.clone();
            tokio::time::sleep(faults.delay).await;
            if faults.half_open {
                // The answer never comes, not even when the fault is mended: the connection is dead.
                std::future::pending::<()>().await;
            }
            answer(&shared, &call, user, &body)
        }
        Err(refused) => Err(refused.clone()),
    };
    let response = response.unwrap_or_else(|refused| refusal(&refused));

    let agent = parts
        .headers
        .get(USER_AGENT)
        .and_then(|text| text.to_str().ok());
    shared.state().log.push(Logged {
        at,
        method: parts.method.to_string(),
        path: call.path,
        query: call.query,
        user: user.unwrap_or_default(),
        agent: agent.unwrap_or_default().to_owned(),
        status: response.status().as_u16(),
        body: String::from_utf8_lossy(&body).into_owned(),
    });
    Ok(response)
}

/// A request, taken apart.
struct Call {
    method: Method,
    path: String,
    query: BTreeMap<String, String>,
    media_type: String,
}

impl Call {
    fn new(method: &Method, uri: &hyper::Uri, headers: &HeaderMap) -> Self {
        let pairs = uri
            .query()
            .unwrap_or_default()
            .split('&')
            .filter(|pair| !pair.is_empty());
        let pair = |pair: &str| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (unescape(key), unescape(value))
        };
        let media_type = headers
            .get(CONTENT_TYPE)
            .and_then(|text| text.to_str().ok());
        let media_type = media_type
            .unwrap_or_default()
            .split(';')
            .next()
            .unwrap_or_default();
        Self {
            method: method.clone(),
            path: uri.path().to_owned(),
            query: pairs.map(pair).collect(),
            media_type: media_type.trim().to_owned(),
        }
    }

    fn asks(&self, key: &str) -> &str {
        self.query.get(key).map_or("", String::as_str)
    }

    fn is_set(&self, key: &str) -> bool {
        matches!(self.asks(key), "1" | "true")
    }

    fn revision(&self) -> Result<u64, Refused> {
        match self.asks("resourceVersion") {
            "" => Ok(0),
            text => text
                .parse()
                .map_err(|_| Refused::new(400, "BadRequest", "invalid resource version")),
        }
    }
}

/// What a path names.
struct Target {
    kind: &'static Kind,
    namespace: Option<String>,
    name: Option<String>,
    status: bool,
}

impl Target {
    fn of(path: &str) -> Option<Self> {
        let segments: Vec<_> = path.trim_matches('/').split('/').collect();
        let (group, version, rest) = match segments.as_slice() {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return None,
        };
        let (namespace, rest) = match rest {
            ["namespaces", namespace, plural, rest @ ..] if *plural != "status" => {
                (Some((*namespace).to_owned()), [&[*plural], rest].concat())
            }
            rest => (None, rest.to_vec()),
        };
        let (plural, name, status) = match rest.as_slice() {
            [plural] => (*plural, None, false),
            [plural, name] => (*plural, Some(unescape(name)), false),
            [plural, name, "status"] => (*plural, Some(unescape(name)), true),
            _ => return None,
        };
        let kind = KINDS
            .iter()
            .find(|k| k.group == group && k.version == version && k.plural == plural)?;
        let fits = kind.namespaced || namespace.is_none();
        (fits && (!status || kind.status)).then_some(Self {
            kind,
            namespace,
            name,
            status,
        })
    }
}

fn answer(
    shared: &Arc<Shared>,
    call: &Call,
    user: &str,
    body: &Bytes,
) -> Result<Response<Body>, Refused> {
    let mut state = shared.state();
    let faults = &mut state.faults;
    if Faults::spend(&mut faults.busy.0) {
        return Ok(too_many_requests(faults.busy.1));
    }
    if Faults::spend(&mut faults.unavailable) {
        return Err(Refused::new(503, "ServiceUnavailable", "etcd is not ready"));
    }
    if faults
        .forbid
        .iter()
        .any(|part| call.path.contains(part.as_str()))
    {
        let message = format!("User \"{user}\" cannot {} {}", call.method, call.path);
        return Err(Refused::new(403, "Forbidden", message));
    }
    if let Some(fixed) = discovery::fixed(&call.path) {
        return Ok(fixed);
    }

    let none = || Refused::not_found("the server could not find the requested resource");
    let target = Target::of(&call.path).ok_or_else(none)?;
    if *target.kind == PEERS && !state.has_peers() {
        return Err(none());
    }
    let namespace = target.namespace.clone().unwrap_or_default();
    match (&call.method, &target.name) {
        (&Method::GET, None) if call.is_set("watch") => {
            watch::watch(shared, &mut state, call, &target, user)
        }
        (&Method::GET, None) => list(&mut state, call, &target, user),
        (&Method::GET, Some(name)) => {
            state.selector(call, &target, user)?;
            state
                .store
                .get(target.kind, &namespace, name)
                .map(|object| ok(200, object))
        }
        (&Method::POST, None) => {
            let mut object = parse(body)?;
            validate(target.kind, &object)?;
            if let Some(object) = object.as_object_mut().filter(|_| target.kind.status) {
                // As real servers do: a request that creates an object does not set its status.
                object.remove("status");
            }
            let created = state.store.create(target.kind, &namespace, object)?;
            shared.changed();
            Ok(ok(201, &created))
        }
        (&Method::PUT, Some(name)) => {
            let new = parse(body)?;
            let edit = |old: &Value| Ok(keep(&target, old, new));
            let object = state.store.update(target.kind, &namespace, name, edit)?;
            shared.changed();
            Ok(ok(200, &object))
        }
        (&Method::PATCH, Some(name)) => {
            let apply = call.media_type.starts_with("application/apply-patch");
            if apply && call.asks("fieldManager").is_empty() {
                return Err(Refused::new(
                    422,
                    "Invalid",
                    "fieldManager: Required value: is required for apply patch",
                ));
            }
            if apply && state.store.get(target.kind, &namespace, name).is_err() {
                let created = state.store.create(target.kind, &namespace, parse(body)?)?;
                shared.changed();
                return Ok(ok(201, &created));
            }
            let edit = |old: &Value| {
                Ok(keep(
                    &target,
                    old,
                    patch::apply(&call.media_type, old, body)?,
                ))
            };
            let object = state.store.update(target.kind, &namespace, name, edit)?;
            shared.changed();
            Ok(ok(200, &object))
        }
        (&Method::DELETE, Some(name)) => {
            let object = state.store.delete(target.kind, &namespace, name)?;
            shared.changed();
            Ok(ok(200, &object))
        }
        _ => Err(Refused::new(
            405,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
        )),
    }
}

/// A write to an object leaves its status alone, and a write to the status the specification.
fn keep(target: &Target, old: &Value, mut new: Value) -> Value {
    if !target.kind.status {
        return new;
    }
    let part = if target.status { "spec" } else { "status" };
    match (old.get(part), new.as_object_mut()) {
        (Some(value), Some(new)) => drop(new.insert(part.to_owned(), value.clone())),
        (None, Some(new)) => drop(new.remove(part)),
        (_, None) => {}
    }
    new
}

/// What real servers demand of an Event of this version.
fn validate(kind: &Kind, object: &Value) -> Result<(), Refused> {
    if kind.plural != "events" {
        return Ok(());
    }
    let text = |field: &str| object[field].as_str().unwrap_or_default();
    let required = [
        "eventTime",
        "reportingController",
        "reportingInstance",
        "action",
        "reason",
    ];
    let missing = required.into_iter().find(|field| text(field).is_empty());
    let problem = match missing {
        Some(field) => Some(format!("{field}: Required value")),
        None if !matches!(text("type"), "Normal" | "Warning") => {
            Some("type: Invalid value".to_owned())
        }
        None if text("note").len() > 1024 => {
            Some("note: can have at most 1024 characters".to_owned())
        }
        None if text("reportingInstance").len() > 128 => {
            Some("reportingInstance: can have at most 128 characters".to_owned())
        }
        None => None,
    };
    problem.map_or(Ok(()), |problem| Err(Refused::new(422, "Invalid", problem)))
}

impl State {
    fn user(&self, headers: &HeaderMap) -> Result<String, Refused> {
        let unauthorized = || Refused::new(401, "Unauthorized", "Unauthorized");
        if self.tokens.is_empty() {
            return Ok("anonymous".to_owned());
        }
        let header = headers
            .get(AUTHORIZATION)
            .and_then(|text| text.to_str().ok());
        let token = header.and_then(|text| text.strip_prefix("Bearer "));
        let user = token.and_then(|token| self.tokens.get(token.trim()));
        user.cloned().ok_or_else(unauthorized)
    }

    fn has_peers(&self) -> bool {
        let definitions = kind_named("customresourcedefinitions");
        self.store
            .get(definitions, "", "peers.kilo.squat.ai")
            .is_ok()
    }

    fn selector(&self, call: &Call, target: &Target, user: &str) -> Result<Selector, Refused> {
        let mut selector = Selector {
            namespace: target.namespace.clone(),
            hidden: self.faults.hidden.get(user).cloned().unwrap_or_default(),
            ..Selector::default()
        };
        if let Some(name) = &target.name
            && selector.hidden.contains(name)
        {
            return Err(Refused::not_found(&format!(
                "{} \"{name}\"",
                target.kind.plural
            )));
        }
        for (key, value) in pairs(call.asks("labelSelector")) {
            selector.labels.insert(key, value);
        }
        for (key, value) in pairs(call.asks("fieldSelector")) {
            match key.as_str() {
                "metadata.name" => selector.name = Some(value),
                "metadata.namespace" => selector.namespace = Some(value),
                _ => {
                    let message = format!("field label not supported: {key}");
                    return Err(Refused::new(400, "BadRequest", message));
                }
            }
        }
        Ok(selector)
    }
}

/// The resource of this name.
pub(super) fn kind_named(plural: &str) -> &'static Kind {
    KINDS
        .iter()
        .find(|kind| kind.plural == plural)
        .expect("callers name resources that are served")
}

fn pairs(selector: &str) -> impl Iterator<Item = (String, String)> + '_ {
    selector.split(',').filter_map(|pair| {
        let (key, value) = pair.split_once("==").or_else(|| pair.split_once('='))?;
        Some((key.to_owned(), value.to_owned()))
    })
}

fn list(
    state: &mut State,
    call: &Call,
    target: &Target,
    user: &str,
) -> Result<Response<Body>, Refused> {
    let selector = state.selector(call, target, user)?;
    // A page goes on after a name, at the version the list began with.
    let (revision, after) = match call.asks("continue").split_once('/') {
        Some((revision, after)) => (revision.parse().unwrap_or_default(), after.to_owned()),
        None => (state.store.revision(), String::new()),
    };
    if !state.store.keeps(revision) {
        return Err(Refused::gone());
    }
    let path = |object: &Value| {
        let part = |field: &str| {
            object["metadata"][field]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        format!("{}/{}", part("namespace"), part("name"))
    };
    let mut items: Vec<_> = state
        .store
        .list(target.kind, &selector)
        .filter(|object| after.is_empty() || path(object) > after)
        .cloned()
        .collect();
    if Faults::spend(&mut state.faults.truncate.0) {
        items.truncate(state.faults.truncate.1);
    }
    let limit: usize = call.asks("limit").parse().unwrap_or_default();
    let mut metadata = json!({"resourceVersion": revision.to_string()});
    if limit > 0 && items.len() > limit {
        metadata["remainingItemCount"] = json!(items.len() - limit);
        items.truncate(limit);
        let last = items.last().map(path).unwrap_or_default();
        metadata["continue"] = json!(format!("{revision}/{last}"));
    }
    Ok(ok(
        200,
        &json!({
            "kind": format!("{}List", target.kind.kind),
            "apiVersion": target.kind.api_version(),
            "metadata": metadata,
            "items": items,
        }),
    ))
}

/// As API Priority and Fairness answers: plain text and a header.
fn too_many_requests(retry_after: u64) -> Response<Body> {
    let text = Bytes::from_static(b"Too many requests, please try again later.\n");
    let mut response = respond(429, "text/plain; charset=utf-8", full(text));
    response
        .headers_mut()
        .insert(RETRY_AFTER, retry_after.into());
    response
}

fn refusal(refused: &Refused) -> Response<Body> {
    ok(refused.code, &refused.status())
}

fn ok(code: u16, body: &Value) -> Response<Body> {
    respond(code, "application/json", full(body.to_string().into()))
}

fn full(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed()
}

fn respond(code: u16, media_type: &str, body: Body) -> Response<Body> {
    Response::builder()
        .status(code)
        .header(CONTENT_TYPE, media_type)
        .body(body)
        .expect("the status and the header are constants")
}

fn parse(body: &Bytes) -> Result<Value, Refused> {
    serde_json::from_slice(body).map_err(|error| Refused::new(400, "BadRequest", error.to_string()))
}

/// Undoes percent-encoding; what is no encoding stays.
fn unescape(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut plain = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let hex = bytes
            .get(at + 1..at + 3)
            .filter(|_| bytes[at] == b'%')
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match hex {
            Some(byte) => {
                plain.push(byte);
                at += 3;
            }
            None => {
                plain.push(if bytes[at] == b'+' { b' ' } else { bytes[at] });
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

/// The kind, namespace and name of an object, for changes that do not come by HTTP.
pub(super) fn target_of(object: &Value) -> anyhow::Result<(&'static Kind, String, String)> {
    let kind = kind_of(object).ok_or_else(|| {
        anyhow::anyhow!("{} {} is not served", object["apiVersion"], object["kind"])
    })?;
    let part = |field: &str| {
        object["metadata"][field]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    let namespace = match (kind.namespaced, part("namespace")) {
        (false, _) => String::new(),
        (true, namespace) if namespace.is_empty() => "default".to_owned(),
        (true, namespace) => namespace,
    };
    Ok((kind, namespace, part("name")))
}
