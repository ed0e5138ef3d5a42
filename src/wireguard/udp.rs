//! The UDP sockets: batches out with segmentation offload, batches in with coalescing.
//!
//! A message is a run of datagrams of one size in one buffer, the last of which may be shorter. If the
//! kernel or the path refuses a run, it is sent in pieces. Answers have the local address that the peer sent
//! to as their source, which the packet information tells.
#![expect(
    unsafe_code,
    reason = "sendmsg and recvmmsg with control messages, without an allocation per call"
)]

mod control;
mod fragments;
#[cfg(test)]
mod tests;

use std::io;
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use socket2::{Domain, Protocol, Socket, Type};

use self::control::Control;
use super::packet::{Ecn, Outer};
use super::routes::RouteQuery;

/// The most bytes of one send with segmentation: what IPv4 and IPv6 both take, with some slack for
/// the headers the kernel counts in.
pub(super) const MAX_SEND: usize = 65_000;
/// The most datagrams of one send with segmentation.
pub(super) const MAX_DATAGRAMS: usize = 64;
/// The bytes of the largest message that can be received, coalesced or not.
pub(super) const MAX_MESSAGE: usize = 65_536;

/// The most messages of one receive. Many only while they are small: sixteen large ones would not
/// stay in the second-level cache until they are opened.
pub(super) const MAX_MESSAGES: usize = 16;

/// Large enough for a full transmit batch and a stall of some milliseconds.
const BUFFER: usize = 4 << 20;
/// A send that the kernel does not accept within this time is given up, so that no thread hangs.
const SEND_TIMEOUT: std::time::Duration = std::time::Duration::from_millis(100);

/// The address of a peer, and the local address that datagrams to it are sent from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Endpoint {
    /// The address and port of the peer.
    pub remote: SocketAddr,
    /// The local address that it sent to, and the interface that the datagram came in by; `None` lets the
    /// kernel choose.
    pub local: Option<(IpAddr, u32)>,
}

impl From<SocketAddr> for Endpoint {
    fn from(remote: SocketAddr) -> Self {
        Self {
            remote,
            local: None,
        }
    }
}

/// The sockets of both families, on one port.
#[derive(Debug)]
pub(super) struct Sockets {
    port: u16,
    v4: Option<UdpSocket>,
    v6: Option<UdpSocket>,
    routes: RouteQuery,
    fwmark: AtomicU32,
}

/// A socket of one family.
#[derive(Debug)]
pub(super) struct UdpSocket {
    socket: Socket,
    v6: bool,
    fragments: fragments::SocketOption,
}

impl Sockets {
    /// Opens the sockets on a port; 0 takes one that is free in both families. A family that the kernel does
    /// not support is left out.
    ///
    /// # Errors
    /// `EADDRINUSE` if the port is taken, or another error of the kernel.
    pub(super) fn bind(port: u16, fwmark: u32) -> io::Result<Self> {
        // A port that is free for one family may be taken for the other.
        let mut tries = if port == 0 { 20 } else { 1 };
        loop {
            tries -= 1;
            match Self::bind_once(port, fwmark) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && tries > 0 => {}
                result => return result,
            }
        }
    }

    fn bind_once(port: u16, fwmark: u32) -> io::Result<Self> {
        let v4 = UdpSocket::bind(Ipv4Addr::UNSPECIFIED.into(), port, fwmark)?;
        let port = match &v4 {
            Some(socket) => socket.port()?,
            None => port,
        };
        let v6 = UdpSocket::bind(Ipv6Addr::UNSPECIFIED.into(), port, fwmark)?;
        let port = match &v6 {
            Some(socket) => socket.port()?,
            None => port,
        };
        if v4.is_none() && v6.is_none() {
            return Err(Errno::EAFNOSUPPORT.into());
        }
        Ok(Self {
            port,
            v4,
            v6,
            routes: RouteQuery::new()?,
            fwmark: AtomicU32::new(fwmark),
        })
    }

    /// The port of both.
    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// The socket for IPv4 or IPv6, if the kernel supports the family.
    pub(super) fn family(&self, v6: bool) -> Option<&UdpSocket> {
        if v6 {
            self.v6.as_ref()
        } else {
            self.v4.as_ref()
        }
    }

    /// Sets the mark of datagrams that are sent from now on.
    ///
    /// # Errors
    /// The error of the kernel: `EPERM` without `CAP_NET_ADMIN`.
    pub(super) fn set_fwmark(&self, fwmark: u32) -> io::Result<()> {
        let sockets = [&self.v4, &self.v6];
        sockets
            .into_iter()
            .flatten()
            .try_for_each(|socket| socket.socket.set_mark(fwmark))?;
        self.fwmark.store(fwmark, Ordering::Relaxed);
        Ok(())
    }

    /// Whether datagrams from the local address of an endpoint leave through the interface that the peer's
    /// datagram came in by.
    pub(super) fn leads(&self, endpoint: &Endpoint) -> bool {
        let mark = self.fwmark.load(Ordering::Relaxed);
        endpoint.local.is_none_or(|(local, interface)| {
            self.routes
                .leads(endpoint.remote.ip(), local, interface, mark)
        })
    }

    /// Sends a run of datagrams of `stride` bytes, the last of which may be shorter.
    ///
    /// With `offload` the kernel cuts the run. Returns whether it did. A run that it refused to cut was sent
    /// in pieces.
    ///
    /// # Errors
    /// The error of the kernel for the first datagram that it refused.
    pub(super) fn send(
        &self,
        run: &[u8],
        stride: usize,
        to: &Endpoint,
        outer: Outer,
        offload: bool,
    ) -> io::Result<bool> {
        let v6 = to.remote.is_ipv6();
        let socket = self.family(v6).ok_or(Errno::EAFNOSUPPORT)?;
        socket.with_fragments(outer.fragments, run.len().min(stride), || {
            let mut offload = offload;
            if run.len() > stride && offload {
                match socket.send(run, Some(stride), to, outer) {
                    Ok(()) => return Ok(true),
                    // No checksum offload on the way (EIO), or a path MTU below the stride (EINVAL,
                    // EMSGSIZE), where single datagrams are fragmented, or are refused too.
                    Err(error) if is_offload_refused(&error) => offload = false,
                    Err(error) => return Err(error),
                }
            }
            for datagram in run.chunks(stride) {
                socket.send(datagram, None, to, outer)?;
            }
            Ok(offload)
        })
    }

    /// Wakes the threads that wait on these sockets.
    pub(super) fn shut_down(&self) {
        for socket in [&self.v4, &self.v6].into_iter().flatten() {
            // Fails with ENOTCONN, and wakes the readers nevertheless.
            let _ = socket.socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

fn is_offload_refused(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE)
    )
}

/// Whether a send may have failed only because its source address or the interface does not exist any more.
pub(super) fn is_source_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EINVAL
                | libc::EADDRNOTAVAIL
                | libc::ENETUNREACH
                | libc::EHOSTUNREACH
                | libc::ENODEV
        )
    )
}

/// One message that was received.
#[derive(Clone, Debug)]
pub(super) struct Message {
    /// Its range in the arena.
    pub range: Range<usize>,
    /// The bytes of each datagram but the last.
    pub stride: usize,
    /// Its sender, and the local address that it was sent to.
    pub from: Endpoint,
    /// The congestion mark of its outer header.
    pub ecn: Ecn,
}

/// The memory that messages are received into.
pub(super) struct Arena {
    /// Room for [`MAX_MESSAGES`]. Pages without a received message are never touched.
    pub bytes: Vec<u8>,
    /// The messages of the last receive.
    pub messages: Vec<Message>,
    /// Buffers for the senders' addresses and the control messages. They are kept, because to clear them each
    /// time takes longer than to open a small packet.
    names: Box<[libc::sockaddr_storage; MAX_MESSAGES]>,
    controls: Box<[Control; MAX_MESSAGES]>,
}

impl Default for Arena {
    fn default() -> Self {
        Self {
            bytes: vec![0; MAX_MESSAGES * MAX_MESSAGE],
            messages: Vec::with_capacity(MAX_MESSAGES),
            // SAFETY: all-zero bytes are a valid address, of no family.
            names: Box::new(unsafe { mem::zeroed() }),
            controls: Box::new([Control::default(); MAX_MESSAGES]),
        }
    }
}

impl UdpSocket {
    fn bind(address: IpAddr, port: u16, fwmark: u32) -> io::Result<Option<Self>> {
        let v6 = address.is_ipv6();
        let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
        let socket = match Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)) {
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => return Ok(None),
            socket => socket?,
        };
        let fd = socket.as_raw_fd();
        if v6 {
            socket.set_only_v6(true)?;
            set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)?;
            set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1)?;
        } else {
            set_option(fd, libc::IPPROTO_IP, libc::IP_PKTINFO, 1)?;
            set_option(fd, libc::IPPROTO_IP, libc::IP_RECVTOS, 1)?;
        }
        let fragments = fragments::SocketOption::new(&socket, v6)?;
        if fwmark != 0 {
            socket.set_mark(fwmark)?;
        }
        set_buffer(fd, libc::SO_RCVBUFFORCE, libc::SO_RCVBUF)?;
        set_buffer(fd, libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)?;
        socket.set_write_timeout(Some(SEND_TIMEOUT))?;
        // Coalescing came with Linux 5.0; without it every datagram arrives alone.
        let _ = set_option(fd, libc::SOL_UDP, libc::UDP_GRO, 1);
        match socket.bind(&SocketAddr::new(address, port).into()) {
            // IPv6 is supported but disabled.
            Err(error) if v6 && error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(None),
            bound => bound.map(|()| {
                Some(Self {
                    socket,
                    v6,
                    fragments,
                })
            }),
        }
    }

    fn port(&self) -> io::Result<u16> {
        let address = self.socket.local_addr()?.as_socket();
        Ok(address.map_or(0, |address| address.port()))
    }

    fn send(
        &self,
        bytes: &[u8],
        stride: Option<usize>,
        to: &Endpoint,
        outer: Outer,
    ) -> io::Result<()> {
        let address = socket2::SockAddr::from(to.remote);
        let mut control = Control::default();
        let length = control.write(self.v6, to.local, outer, stride)?;
        let mut piece = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: all-zero bytes are a valid msghdr; some targets have padding fields to be zero.
        let mut header: libc::msghdr = unsafe { mem::zeroed() };
        header.msg_name = address.as_ptr().cast_mut().cast();
        header.msg_namelen = address.len();
        header.msg_iov = &raw mut piece;
        header.msg_iovlen = 1;
        if length > 0 {
            header.msg_control = control.room().as_mut_ptr().cast();
            header.msg_controllen = length as _;
        }
        // SAFETY: the header points to a live address, one live piece that sendmsg only reads, and
        // control messages written in full up to their length; all outlive the call.
        let sent = unsafe { libc::sendmsg(self.socket.as_raw_fd(), &raw const header, 0) };
        Errno::result(sent).map(drop).map_err(Into::into)
    }

    /// Takes at most `limit` messages; with `wait`, waits for the first one.
    ///
    /// # Errors
    /// The error of the kernel: `EAGAIN` if there is no message and it may not wait. Returns without a
    /// message if the sockets are shut down while it waits.
    pub(super) fn receive(&self, arena: &mut Arena, limit: usize, wait: bool) -> io::Result<()> {
        arena.messages.clear();
        let limit = limit.clamp(1, MAX_MESSAGES);
        // SAFETY: all-zero bytes are valid for these plain structures of integers and pointers.
        let mut pieces: [libc::iovec; MAX_MESSAGES] = unsafe { mem::zeroed() };
        // SAFETY: as above.
        let mut headers: [libc::mmsghdr; MAX_MESSAGES] = unsafe { mem::zeroed() };
        let slots = arena.bytes.chunks_exact_mut(MAX_MESSAGE);
        for ((((header, piece), name), control), slot) in headers
            .iter_mut()
            .zip(&mut pieces)
            .zip(&mut *arena.names)
            .zip(&mut *arena.controls)
            .zip(slots)
            .take(limit)
        {
            piece.iov_base = slot.as_mut_ptr().cast();
            piece.iov_len = slot.len();
            header.msg_hdr.msg_iov = piece;
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_name = ptr::from_mut(name).cast();
            header.msg_hdr.msg_namelen = size_of_u32::<libc::sockaddr_storage>();
            header.msg_hdr.msg_control = control.room().as_mut_ptr().cast();
            header.msg_hdr.msg_controllen = control.room().len() as _;
        }
        let flags = if wait {
            libc::MSG_WAITFORONE
        } else {
            libc::MSG_DONTWAIT
        };
        // SAFETY: the first `limit` headers point to live, disjoint buffers of the lengths in them,
        // which outlive the call; MAX_MESSAGES bounds `limit`.
        let received = unsafe {
            libc::recvmmsg(
                self.socket.as_raw_fd(),
                headers.as_mut_ptr(),
                limit as libc::c_uint,
                flags as _,
                ptr::null_mut(),
            )
        };
        let received = usize::try_from(Errno::result(received)?).unwrap_or(0);
        for (n, header) in headers.iter().enumerate().take(received) {
            let length = header.msg_len as usize;
            let Some(remote) = socket_address(&arena.names[n]) else {
                continue;
            };
            if header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0 {
                continue;
            }
            let mut message = Message {
                range: n * MAX_MESSAGE..n * MAX_MESSAGE + length,
                stride: length,
                from: remote.into(),
                ecn: Ecn::NotCapable,
            };
            // SAFETY: recvmmsg has filled in this header, and the arena holds what it points to.
            unsafe { control::read(&header.msg_hdr, &mut message) };
            arena.messages.push(message);
        }
        Ok(())
    }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn size_of_u32<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("these structures are small")
}

fn set_option(
    fd: RawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the option's value is one int, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            fd,
            level,
            name,
            ptr::from_ref(&value).cast(),
            size_of_u32::<libc::c_int>(),
        )
    };
    Errno::result(result).map(drop).map_err(Into::into)
}

/// Beyond the system's limit where that is permitted, else up to it.
fn set_buffer(fd: RawFd, force: libc::c_int, plain: libc::c_int) -> io::Result<()> {
    let size = libc::c_int::try_from(BUFFER).unwrap_or(libc::c_int::MAX);
    set_option(fd, libc::SOL_SOCKET, force, size)
        .or_else(|_| set_option(fd, libc::SOL_SOCKET, plain, size))
}

fn socket_address(name: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match libc::c_int::from(name.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family tells the type, and the storage is large and aligned enough.
            let name = unsafe { &*ptr::from_ref(name).cast::<libc::sockaddr_in>() };
            let address = Ipv4Addr::from(name.sin_addr.s_addr.to_ne_bytes());
            Some(SocketAddrV4::new(address, u16::from_be(name.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let name = unsafe { &*ptr::from_ref(name).cast::<libc::sockaddr_in6>() };
            let address = Ipv6Addr::from(name.sin6_addr.s6_addr);
            let port = u16::from_be(name.sin6_port);
            Some(SocketAddrV6::new(address, port, 0, name.sin6_scope_id).into())
        }
        _ => None,
    }
}
