//! One request to the API server: with a timeout, a response of bounded size, and errors classified by
//! how to handle them.

use std::error::Error as StdError;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use kube::Client;
use kube::client::Body;
use serde::Deserialize;

/// Longest wait for a response's head, and between two pieces of its body. A server under load sheds
/// requests after a minute, so a slower response is lost.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Largest response body that is read. A page of a hundred Nodes is some two megabytes.
const MAX_BODY: usize = 64 << 20;
/// Longest `Retry-After` that is honoured; a proxy's maintenance page must not stop an agent for a day.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(600);

/// Why a request failed.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(super) enum Failure {
    /// No connection, or a broken one.
    #[error("{0}")]
    Unreachable(String),
    /// A connection without data.
    #[error("no data for {} s", .0.as_secs())]
    Silent(Duration),
    /// 401.
    #[error("the server does not accept the token or certificate")]
    Unauthorized,
    /// 403.
    #[error("{0}")]
    Forbidden(String),
    /// 404.
    #[error("there is no such object or resource")]
    Absent,
    /// 410: the server no longer keeps this resource version.
    #[error("the server no longer keeps the requested resource version")]
    Gone,
    /// 429 and other temporary errors, with the pause from `Retry-After`.
    #[error("the server cannot answer now ({code})")]
    Busy {
        /// The HTTP status.
        code: u16,
        /// `Retry-After`.
        pause: Option<Duration>,
    },
    /// Any other status that is not success.
    #[error("{code}: {message}")]
    Refused {
        /// The HTTP status.
        code: u16,
        /// The server's message, cut.
        message: String,
    },
    /// A response that cannot be parsed.
    #[error("the response is malformed: {0}")]
    Unreadable(String),
}

/// The parts of a `Status` object that are read.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Status {
    #[serde(default)]
    code: u16,
    #[serde(default)]
    message: String,
    #[serde(default)]
    details: Option<StatusDetails>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StatusDetails {
    #[serde(default)]
    retry_after_seconds: u64,
}

impl Failure {
    /// Classifies an error response.
    pub(super) fn of(status: Status, pause: Option<Duration>) -> Self {
        let asked = status.details.unwrap_or_default().retry_after_seconds;
        let pause = pause
            .or_else(|| (asked > 0).then(|| Duration::from_secs(asked)))
            .map(|pause| pause.min(MAX_RETRY_AFTER));
        let message = crate::text::message(&status.message);
        match status.code {
            401 => Self::Unauthorized,
            403 => Self::Forbidden(message),
            404 => Self::Absent,
            410 => Self::Gone,
            code @ (429 | 500..=599) => Self::Busy { code, pause },
            code => Self::Refused { code, message },
        }
    }

    fn unreachable(error: &dyn StdError) -> Self {
        // The root cause is the useful part: "Connection refused", "invalid peer certificate".
        let mut cause = error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        Self::Unreachable(crate::text::message(&cause.to_string()))
    }

    /// The pause from `Retry-After`.
    pub(super) const fn pause(&self) -> Option<Duration> {
        if let Self::Busy { pause, .. } = self {
            *pause
        } else {
            None
        }
    }

    /// Whether another server, or a new connection to this one, may succeed.
    pub(super) const fn is_of_connection(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Silent(_))
    }
}

/// Makes a request without a body.
pub(super) fn get(path_and_query: &str) -> Request<Body> {
    let request = Request::get(path_and_query).header(header::ACCEPT, "application/json");
    request
        .body(Body::empty())
        .expect("paths consist of constants and of names from the API server")
}

/// Makes a request that carries JSON of the media type `content_type`.
pub(super) fn send_json(
    method: Method,
    path_and_query: &str,
    content_type: &str,
    json: &serde_json::Value,
) -> Request<Body> {
    let request = Request::builder()
        .method(method)
        .uri(path_and_query)
        .header(header::ACCEPT, "application/json")
        .header(header::CONTENT_TYPE, content_type);
    request
        .body(Body::from(json.to_string().into_bytes()))
        .expect("paths consist of constants and of names from the API server")
}

/// Sends a request and reads the head of the response; an error status becomes a [`Failure`].
pub(super) async fn open(
    client: &Client,
    request: Request<Body>,
) -> Result<Response<Body>, Failure> {
    let response = match tokio::time::timeout(TIMEOUT, client.send(request)).await {
        Err(_) => return Err(Failure::Silent(TIMEOUT)),
        Ok(Err(error)) => return Err(Failure::unreachable(&error)),
        Ok(Ok(response)) => response,
    };
    if response.status().is_success() {
        return Ok(response);
    }

    let code = response.status().as_u16();
    let pause = retry_after(&response);
    let body = read(response, MAX_BODY).await.unwrap_or_default();
    let mut status: Status = serde_json::from_slice(&body).unwrap_or_else(|_| Status {
        message: String::from_utf8_lossy(&body).into_owned(),
        ..Status::default()
    });
    status.code = code;
    Err(Failure::of(status, pause))
}

/// Sends a request and reads the whole response body.
pub(super) async fn call(client: &Client, request: Request<Body>) -> Result<Vec<u8>, Failure> {
    read(open(client, request).await?, MAX_BODY).await
}

/// The next piece of a response's body; `None` at its end.
pub(super) async fn next_piece(
    body: &mut Body,
    timeout: Duration,
) -> Result<Option<Bytes>, Failure> {
    loop {
        match tokio::time::timeout(timeout, body.frame()).await {
            Err(_) => return Err(Failure::Silent(timeout)),
            Ok(None) => return Ok(None),
            Ok(Some(Err(error))) => return Err(Failure::unreachable(&error)),
            // Trailers carry nothing of interest.
            Ok(Some(Ok(frame))) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}

async fn read(response: Response<Body>, limit: usize) -> Result<Vec<u8>, Failure> {
    let mut body = response.into_body();
    let mut answer = Vec::new();
    while let Some(piece) = next_piece(&mut body, TIMEOUT).await? {
        if answer.len() + piece.len() > limit {
            return Err(Failure::Unreadable("it is too large".to_owned()));
        }
        answer.extend_from_slice(&piece);
    }
    Ok(answer)
}

/// `Retry-After` in seconds; API servers do not use the form with a date.
fn retry_after(response: &Response<Body>) -> Option<Duration> {
    let text = response.headers().get(header::RETRY_AFTER)?.to_str().ok()?;
    text.trim().parse().ok().map(Duration::from_secs)
}

/// Whether the server understood the request and refused its content.
pub(super) fn is_invalid(failure: &Failure) -> bool {
    let invalid = [StatusCode::BAD_REQUEST, StatusCode::UNPROCESSABLE_ENTITY];
    matches!(failure, Failure::Refused { code, .. } if invalid.iter().any(|i| i.as_u16() == *code))
}
