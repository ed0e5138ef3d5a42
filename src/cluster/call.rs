//! One request to the API server: with a deadline, an answer of bounded size, and errors sorted by
//! what can be done about them.

use std::error::Error as StdError;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use kube::Client;
use kube::client::Body;
use serde::Deserialize;

/// Longest wait for an answer's head, and between two pieces of its body. A server under load sheds
/// requests after a minute, so what takes longer is lost.
const ANSWER: Duration = Duration::from_secs(30);
/// Largest answer that is read whole. A page of a hundred Nodes is some two megabytes.
const MAX_ANSWER: usize = 64 << 20;
/// Longest pause a server can ask for; a proxy's maintenance page must not silence an agent for a day.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(600);

/// What came of a request instead of the answer.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(super) enum Failure {
    /// No connection, or it broke.
    #[error("{0}")]
    Unreachable(String),
    /// A connection on which nothing comes.
    #[error("nothing was heard for {} s", .0.as_secs())]
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
    /// 410: the resource version is not kept any more.
    #[error("the server does not keep changes since the last one seen")]
    Gone,
    /// 429 and what else passes by waiting, with the pause the server asks for.
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
        /// The server's words, cut.
        message: String,
    },
    /// An answer that is not what was asked for.
    #[error("the answer makes no sense: {0}")]
    Unreadable(String),
}

/// The parts of a `Status` object that are looked at.
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
    /// Sorts an answer that is no success.
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
        // The cause is what a reader needs: "Connection refused", "invalid peer certificate".
        let mut cause = error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        Self::Unreachable(crate::text::message(&cause.to_string()))
    }

    /// The pause that the server asks for.
    pub(super) const fn pause(&self) -> Option<Duration> {
        if let Self::Busy { pause, .. } = self {
            *pause
        } else {
            None
        }
    }

    /// Whether another server, or another connection to the same, may do better.
    pub(super) const fn is_of_connection(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Silent(_))
    }
}

/// Makes a request without a body.
pub(super) fn get(path_and_query: &str) -> Request<Body> {
    let request = Request::get(path_and_query).header(header::ACCEPT, "application/json");
    request
        .body(Body::empty())
        .expect("paths are made of constants and names that the API server gave")
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
        .expect("paths are made of constants and names that the API server gave")
}

/// Sends a request and reads the head of the answer; what is no success becomes a [`Failure`].
pub(super) async fn open(
    client: &Client,
    request: Request<Body>,
) -> Result<Response<Body>, Failure> {
    let response = match tokio::time::timeout(ANSWER, client.send(request)).await {
        Err(_) => return Err(Failure::Silent(ANSWER)),
        Ok(Err(error)) => return Err(Failure::unreachable(&error)),
        Ok(Ok(response)) => response,
    };
    if response.status().is_success() {
        return Ok(response);
    }

    let code = response.status().as_u16();
    let pause = retry_after(&response);
    let body = read(response, MAX_ANSWER).await.unwrap_or_default();
    let mut status: Status = serde_json::from_slice(&body).unwrap_or_else(|_| Status {
        message: String::from_utf8_lossy(&body).into_owned(),
        ..Status::default()
    });
    status.code = code;
    Err(Failure::of(status, pause))
}

/// Sends a request and reads the whole answer.
pub(super) async fn call(client: &Client, request: Request<Body>) -> Result<Vec<u8>, Failure> {
    read(open(client, request).await?, MAX_ANSWER).await
}

/// The next piece of an answer's body; none at its end.
pub(super) async fn next_piece(
    body: &mut Body,
    timeouts: Duration,
) -> Result<Option<Bytes>, Failure> {
    loop {
        match tokio::time::timeout(timeouts, body.frame()).await {
            Err(_) => return Err(Failure::Silent(timeouts)),
            Ok(None) => return Ok(None),
            Ok(Some(Err(error))) => return Err(Failure::unreachable(&error)),
            // Trailers carry nothing for us.
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
    while let Some(piece) = next_piece(&mut body, ANSWER).await? {
        if answer.len() + piece.len() > limit {
            return Err(Failure::Unreadable("it is too large".to_owned()));
        }
        answer.extend_from_slice(&piece);
    }
    Ok(answer)
}

/// `Retry-After` in seconds; the form with a date is not used between API servers and clients.
fn retry_after(response: &Response<Body>) -> Option<Duration> {
    let text = response.headers().get(header::RETRY_AFTER)?.to_str().ok()?;
    text.trim().parse().ok().map(Duration::from_secs)
}

/// Whether the status says that the request itself was understood and refused for its content.
pub(super) fn is_invalid(failure: &Failure) -> bool {
    let invalid = [StatusCode::BAD_REQUEST, StatusCode::UNPROCESSABLE_ENTITY];
    matches!(failure, Failure::Refused { code, .. } if invalid.iter().any(|i| i.as_u16() == *code))
}
