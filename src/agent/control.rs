//! What the agent answers people and probes: the control socket.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::Path;

use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixListener;

use crate::status::ReportSource;

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

/// Answers every connection with the report of that moment, as JSON.
pub async fn serve(listener: UnixListener, source: ReportSource) {
    loop {
        let mut stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely; the client will ask again.
                tracing::debug!(%error, "accepting on the control socket failed");
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                continue;
            }
        };
        let source = source.clone();
        tokio::spawn(async move {
            let Some(report) = source.report().await else {
                return;
            };
            let answer = serde_json::to_vec(&report).expect("a report is plain data");
            // A client that does not wait for the answer does not want it.
            let _ = stream.write_all(&answer).await;
        });
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
        let server = tokio::spawn(serve(bind(&path).unwrap(), source));

        let asked = tokio::task::spawn_blocking(move || crate::status::ask(&path));

        assert_eq!(asked.await.unwrap().unwrap().node, "a");
        server.abort();
    }
}
