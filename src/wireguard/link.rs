//! Follows the state of the TUN link: its MTU, whether it is up, and where it went.
//!
//! The link may be moved to another network namespace while the sockets stay. There it is watched
//! through sockets that were made in that namespace; entering it for that needs `CAP_SYS_ADMIN`, and
//! without it the link counts as it was last seen.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::thread;

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket as Netlink, SocketAddr};
use nix::sched::{CloneFlags, setns};
use socket2::Socket;

use super::tun::{Tun, interface_socket, link_state};

/// The multicast group of links (`RTMGRP_LINK`).
const LINKS: u32 = 1;

/// The sockets that see the link where it is.
pub(super) struct LinkWatch {
    events: Netlink,
    query: Socket,
}

/// The link as it was last seen.
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
        })
    }

    /// What to poll for reading.
    pub(super) fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// Reads away what made the descriptor readable: what happened is asked for, not followed.
    pub(super) fn drain(&self) {
        let mut buffer = Vec::with_capacity(8192);
        // An overrun is reported once as an error and means no more than "look again".
        for _ in 0..64 {
            buffer.clear();
            match self.events.recv(&mut buffer, 0) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {}
            }
        }
    }

    /// Looks at the link, and follows it where it has gone.
    pub(super) fn look(&mut self, tun: &Tun) -> io::Result<LinkState> {
        let name = tun.name()?;
        let (mtu, up) = match link_state(&self.query, &name) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
                *self = follow(tun)?;
                link_state(&self.query, &name)?
            }
            state => state?,
        };
        Ok(LinkState { mtu, up })
    }
}

/// Makes the sockets in the namespace of the link, on a thread that enters it and ends there.
fn follow(tun: &Tun) -> io::Result<LinkWatch> {
    let namespace = tun.network_namespace()?;
    let entered = thread::scope(|scope| {
        let inside = scope.spawn(|| {
            setns(&namespace, CloneFlags::CLONE_NEWNET)?;
            LinkWatch::new()
        });
        inside.join()
    });
    entered.unwrap_or_else(|_| Err(io::Error::other("the thread that looked for the link died")))
}
