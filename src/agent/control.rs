//! What the agent answers people and probes: the control socket and the lock of the node.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::net::{SocketAddr, UnixListener as StdListener, UnixStream as StdStream};
use std::path::Path;
use std::sync::Arc;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixListener;
use tokio::sync::watch;

use crate::refusal::Refusal;
use crate::status::Report;

/// Held for as long as this process is the agent of its network namespace.
///
/// The name lives in the namespace itself and goes with the process, however that ends: no stale
/// lock, and agents on other nodes of a lab on one machine are not in the way.
#[derive(Debug)]
pub struct NodeLock {
    _listener: StdListener,
}

impl NodeLock {
    /// Takes the lock for the link `interface`.
    pub fn take(interface: &str) -> Result<Self, Refusal> {
        let name = format!("selvedge.{interface}");
        SocketAddr::from_abstract_name(&name)
            .and_then(|address| StdListener::bind_addr(&address))
            .map(|listener| Self {
                _listener: listener,
            })
            .map_err(|error| {
                Refusal::configuration(if error.kind() == io::ErrorKind::AddrInUse {
                    format!(
                        "another agent runs on this node with the link {interface}: stop it first"
                    )
                } else {
                    format!("cannot take this node's lock @{name}: {error}")
                })
            })
    }
}

/// Whether an agent of this user holds the lock of this network namespace for the link `interface`.
///
/// Any user can bind the lock's name. What another user holds is no agent.
pub(crate) fn agent_runs(interface: &str) -> bool {
    // A connection tells without taking the lock, which an agent that starts now would miss.
    let stream = SocketAddr::from_abstract_name(format!("selvedge.{interface}"))
        .and_then(|address| StdStream::connect_addr(&address));
    let held_by = stream
        .ok()
        .and_then(|stream| getsockopt(&stream, PeerCredentials).ok());
    held_by.is_some_and(|user| user.uid() == nix::unistd::geteuid().as_raw())
}

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

/// Answers everyone who connects with the latest report, as JSON.
pub async fn serve(listener: UnixListener, report: watch::Receiver<Arc<Report>>) {
    loop {
        let mut stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely; whoever asks will ask again.
                tracing::debug!(%error, "control socket");
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                continue;
            }
        };
        let report = Arc::clone(&report.borrow());
        tokio::spawn(async move {
            let answer = serde_json::to_vec(&*report).expect("a report is plain data");
            // Who does not wait for the answer does not want it.
            let _ = stream.write_all(&answer).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_is_told_so() {
        let name = format!("t{}", std::process::id());
        let held = NodeLock::take(&name).unwrap();
        let error = NodeLock::take(&name).unwrap_err();
        assert!(
            error
                .sentence
                .starts_with("another agent runs on this node"),
            "{error}"
        );
        assert!(agent_runs(&name));
        drop(held);
        assert!(!agent_runs(&name));
        assert!(NodeLock::take(&name).is_ok());
    }

    #[tokio::test]
    async fn whoever_connects_gets_the_latest_report() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run").join("selvedge.sock");
        fs::create_dir(dir.path().join("run")).unwrap();
        fs::write(&path, "stale").unwrap();
        let (sender, receiver) = watch::channel(Arc::new(Report::default()));
        let server = tokio::spawn(serve(bind(&path).unwrap(), receiver));
        sender.send_replace(Arc::new(Report {
            node: "a".into(),
            ..Report::default()
        }));

        let asked = tokio::task::spawn_blocking(move || crate::status::ask(&path));

        assert_eq!(asked.await.unwrap().unwrap().node, "a");
        server.abort();
    }
}
