//! What the agent answers people and probes: the control socket.
//!
//! A client sends one line, or nothing, and ends its side. For nothing it gets the report, for [`ROTATE_KEY`] a
//! sentence: an empty one if another key is made. The socket is root's alone, so root on the node may ask.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use crate::status::{ROTATE_KEY, ReportSource};

/// The longest request in bytes.
const MAX_REQUEST: u64 = 64;
/// How long a client may take to send its request. One that never ends its side gets the report.
const PATIENCE: Duration = Duration::from_secs(1);

/// A request for another key. The agent answers with a sentence if it makes none.
pub type KeyRequest = oneshot::Sender<Result<(), String>>;

/// Binds the control socket, for root alone.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
    }
    // Left behind by an agent that is gone: the lock says that there is no other.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Answers every connection with the report of that moment, as JSON, or asks for another key.
pub async fn serve(
    listener: UnixListener,
    source: ReportSource,
    key_requests: mpsc::Sender<KeyRequest>,
) {
    loop {
        let mut stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely; the client will ask again.
                tracing::debug!(%error, "accepting on the control socket failed");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let (source, key_requests) = (source.clone(), key_requests.clone());
        tokio::spawn(async move {
            if read(&mut stream).await == ROTATE_KEY.as_bytes() {
                let answer = rotate_key(&key_requests).await;
                let _ = stream.write_all(answer.as_bytes()).await;
                return;
            }
            let Some(report) = source.report().await else {
                return;
            };
            let answer = serde_json::to_vec(&report).expect("a report is plain data");
            // A client that does not wait for the answer does not want it.
            let _ = stream.write_all(&answer).await;
        });
    }
}

/// Reads a request.
async fn read(stream: &mut UnixStream) -> Vec<u8> {
    let mut request = Vec::new();
    let mut limited = stream.take(MAX_REQUEST);
    // What came until then counts.
    let _ = tokio::time::timeout(PATIENCE, limited.read_to_end(&mut request)).await;
    request
}

/// Asks the agent for another key; returns why it makes none, or nothing.
async fn rotate_key(key_requests: &mpsc::Sender<KeyRequest>) -> String {
    let (request, answer) = oneshot::channel();
    let ending = "the agent is stopping: ask its successor";
    if key_requests.send(request).await.is_err() {
        return ending.to_owned();
    }
    match answer.await {
        Ok(Ok(())) => String::new(),
        Ok(Err(refused)) => refused,
        Err(_) => ending.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Report;

    #[tokio::test]
    async fn a_connection_gets_the_report_of_that_moment() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run").join("selvedge.sock");
        fs::create_dir(dir.path().join("run")).unwrap();
        fs::write(&path, "stale").unwrap();
        let source = ReportSource::fixed(Report {
            node: "a".into(),
            ..Report::default()
        });
        let (key_requests, mut asked_for_key) = mpsc::channel::<KeyRequest>(1);
        let server = tokio::spawn(serve(bind(&path).unwrap(), source, key_requests));

        let socket = path.clone();
        let asked = tokio::task::spawn_blocking(move || crate::status::ask(&socket));
        assert_eq!(asked.await.unwrap().unwrap().node, "a");

        for (answer, accepted) in [(Ok(()), true), (Err("not now".to_owned()), false)] {
            let socket = path.clone();
            let asked = tokio::task::spawn_blocking(move || crate::status::rotate_key(&socket));
            asked_for_key.recv().await.unwrap().send(answer).unwrap();
            assert_eq!(asked.await.unwrap().is_ok(), accepted);
        }
        server.abort();
    }
}
