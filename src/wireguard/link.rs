//! Follows the state of the TUN link: its MTU, whether it is up, and its network namespace.
//!
//! The link may move to another network namespace while the sockets stay. Then a thread enters that namespace
//! every second, reads the state and leaves nothing behind: a socket there would keep the namespace, and so
//! the link, alive for ever. Entering needs `CAP_SYS_ADMIN`. Without it the last known state stays.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::thread;
use std::time::Duration;

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket as Netlink, SocketAddr};
use nix::sched::{CloneFlags, setns};
use socket2::Socket;

use super::tun::{Tun, interface_socket, link_state};

/// The multicast group of links (`RTMGRP_LINK`).
const LINKS: u32 = 1;

/// How often the state of a link in another namespace is read.
const ELSEWHERE: Duration = Duration::from_secs(1);

/// Where the state of the link is read.
pub(super) struct LinkWatch {
    events: Netlink,
    query: Socket,
    /// The namespace that the sockets are in.
    home: u64,
    elsewhere: bool,
}

/// The last known state of the link.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct LinkState {
    pub(super) mtu: u32,
    pub(super) up: bool,
}

impl LinkWatch {
    /// Watches the namespace of the calling thread.
    pub(super) fn new() -> io::Result<Self> {
        let mut events = Netlink::new(NETLINK_ROUTE)?;
        events.set_non_blocking(true)?;
        events.bind(&SocketAddr::new(0, LINKS))?;
        Ok(Self {
            events,
            query: interface_socket()?,
            home: File::open("/proc/thread-self/ns/net")?.metadata()?.ino(),
            elsewhere: false,
        })
    }

    /// When to read the state again without a notification, if at all.
    pub(super) fn interval(&self) -> Option<Duration> {
        self.elsewhere.then_some(ELSEWHERE)
    }

    /// The descriptor to poll for reading.
    pub(super) fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// Discards the notifications: they only mean that the state must be read again.
    pub(super) fn drain(&self) {
        drain(&self.events);
    }

    /// Reads the state of the link, in another namespace if it has moved.
    pub(super) fn look(&mut self, tun: &Tun) -> io::Result<LinkState> {
        let name = tun.name()?;
        // If the kernel cannot tell the namespace, the link counts as not moved.
        let namespace = tun.network_namespace().ok().map(File::from);
        let namespace = match namespace {
            Some(namespace) if namespace.metadata()?.ino() != self.home => Some(namespace),
            _ => None,
        };
        self.elsewhere = namespace.is_some();
        let (mtu, up) = match namespace {
            Some(namespace) => state_elsewhere(namespace.into(), &name)?,
            None => link_state(&self.query, &name)?,
        };
        Ok(LinkState { mtu, up })
    }
}

/// The MTU of a link in another namespace, and whether it is up.
fn state_elsewhere(namespace: OwnedFd, name: &str) -> io::Result<(u32, bool)> {
    let entered = thread::scope(|scope| {
        let inside = scope.spawn(|| {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            link_state(&interface_socket()?, name)
        });
        inside.join()
    });
    entered.unwrap_or_else(|_| {
        Err(io::Error::other(
            "the thread that reads the state of the link died",
        ))
    })
}

/// Discards the notifications that wait on a socket.
pub(super) fn drain(events: &Netlink) {
    let mut buffer = Vec::with_capacity(8192);
    // An overrun is reported once as an error. It means the same as a notification.
    for _ in 0..64 {
        buffer.clear();
        match events.recv(&mut buffer, 0) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Ok(_) | Err(_) => {}
        }
    }
}
