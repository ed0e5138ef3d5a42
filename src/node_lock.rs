//! The lock that one agent holds for each tunnel link of a network namespace.
//!
//! It is an abstract Unix socket, so the kernel drops it with the process that holds it.

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener as StdListener, UnixStream as StdStream};

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

use crate::refusal::Refusal;

/// The lock of this process as the agent of its network namespace.
///
/// The name exists in the namespace only and disappears with the process, also after a crash. So there is
/// no stale lock, and agents in other namespaces of a lab on one host do not conflict.
#[derive(Debug)]
pub(crate) struct NodeLock {
    _listener: StdListener,
}

impl NodeLock {
    /// Takes the lock for the link `interface`.
    pub(crate) fn take(interface: &str) -> Result<Self, Refusal> {
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
/// Any user can bind the lock's name. A lock of another user does not count as an agent.
pub(crate) fn agent_runs(interface: &str) -> bool {
    // A connection attempt does not take the lock, which could stop an agent that starts now.
    let stream = SocketAddr::from_abstract_name(format!("selvedge.{interface}"))
        .and_then(|address| StdStream::connect_addr(&address));
    let held_by = stream
        .ok()
        .and_then(|stream| getsockopt(&stream, PeerCredentials).ok());
    held_by.is_some_and(|user| user.uid() == nix::unistd::geteuid().as_raw())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_for_the_same_link_is_refused() {
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
}
