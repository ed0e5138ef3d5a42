//! Whether the datagrams of a socket may be fragmented.
//!
//! Linux has this as an option of the socket, not of a datagram (ip(7), IP_MTU_DISCOVER; ipv6(7), IPV6_MTU_DISCOVER).
//! So the option changes when a datagram needs another value than the one before, while nothing else sends. Most
//! datagrams need none: small ones, and those to peers of one kind.
//!
//! | option | flag "don't fragment" | the size that counts |
//! |---|---|---|
//! | `DONT` | not set | the path MTU that the kernel keeps, also from ICMP errors: larger datagrams are cut |
//! | `PROBE` | set | the MTU of the link: larger datagrams are refused with EMSGSIZE |
//!
//! With `PROBE` no ICMP error, forged or not, has an effect.

use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::{PoisonError, RwLock};

use super::{UdpSocket, set_option};
use crate::wireguard::packet::{Fragments, LEAST_IPV6};

/// Every path carries IPv4 datagrams with this much in UDP unfragmented, or loses them in any case: 576 bytes
/// (RFC 791, 3.1) without the headers of IP and UDP.
const SMALL_V4: usize = 548;
/// The same for IPv6: 1,280 bytes (RFC 8200, 5).
const SMALL_V6: usize = 1232;

/// The present value of the option.
#[derive(Debug)]
pub(super) struct SocketOption(RwLock<Fragments>);

impl SocketOption {
    /// Sets it for a new socket: datagrams may be fragmented, as with the kernel's WireGuard.
    pub(super) fn new(socket: &socket2::Socket, v6: bool) -> io::Result<Self> {
        set(socket, v6, Fragments::Allowed)?;
        Ok(Self(RwLock::new(Fragments::Allowed)))
    }
}

impl UdpSocket {
    /// Calls a function that sends datagrams of at most this many bytes, so that they may be fragmented as wanted.
    pub(super) fn with_fragments<T>(
        &self,
        wanted: Fragments,
        length: usize,
        send: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let small = if self.v6 { SMALL_V6 } else { SMALL_V4 };
        let lock = &self.fragments.0;
        {
            let present = lock.read().unwrap_or_else(PoisonError::into_inner);
            if length <= small || *present == wanted {
                return send();
            }
        }
        let mut present = lock.write().unwrap_or_else(PoisonError::into_inner);
        if *present != wanted {
            set(&self.socket, self.v6, wanted)?;
            *present = wanted;
        }
        send()
    }
}

fn set(socket: &socket2::Socket, v6: bool, wanted: Fragments) -> io::Result<()> {
    let fd = socket.as_raw_fd();
    if !v6 {
        let value = match wanted {
            Fragments::Allowed | Fragments::Small => libc::IP_PMTUDISC_DONT,
            Fragments::None => libc::IP_PMTUDISC_PROBE,
        };
        return set_option(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, value);
    }
    let (value, size) = match wanted {
        Fragments::Allowed => (libc::IPV6_PMTUDISC_DONT, 0),
        Fragments::None => (libc::IPV6_PMTUDISC_PROBE, 0),
        Fragments::Small => (libc::IPV6_PMTUDISC_DONT, LEAST_IPV6.into()),
    };
    set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, value)?;
    set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_MTU, size)
}
