//! The TUN device: large packets in and out, each behind a virtio-net header.
//!
//! A named link is made or, if a persistent one of this program exists, taken over. Others set its addresses,
//! its routes and whether it is up.
#![expect(unsafe_code, reason = "the ioctls of TUN and of interfaces")]

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use socket2::{Domain, Socket, Type};

use super::gso::{MAX_PACKET, VNET_HEADER};

/// The device node, which a container may lack.
const DEVICE: &str = "/dev/net/tun";

/// The most bytes of one read.
pub(super) const MAX_READ: usize = VNET_HEADER + MAX_PACKET;

/// The reason why there is no TUN link, in one sentence.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// The name is invalid.
    #[error(
        "{0:?} cannot be the name of a network interface: it must have 1 to 15 bytes, no '/' and no space"
    )]
    Name(String),
    /// The device node is missing.
    #[error("{DEVICE} is missing: load the kernel module tun, and give the container the device")]
    NoDevice,
    /// Permission is missing.
    #[error("making the network interface {0} needs CAP_NET_ADMIN and access to {DEVICE}")]
    Permission(String),
    /// There is a link of that name that another program made.
    #[error(
        "a network interface named {0} is there already and is no TUN device of ours: remove it (ip link delete {0}) or choose another name"
    )]
    Foreign(String),
    /// Another process has the link open.
    #[error(
        "the network interface {0} is in use by another process: stop that process or choose another name"
    )]
    Busy(String),
    /// Anything else.
    #[error("the kernel did not make the network interface {0}: {1}")]
    Kernel(String, io::Error),
}

/// One queue of a TUN link.
#[derive(Debug)]
pub(super) struct Tun {
    file: File,
    /// Whether the kernel accepts joined UDP packets.
    udp_offload: AtomicBool,
}

mod ioctl {
    nix::ioctl_write_ptr_bad!(set_interface, 0x4004_54ca, libc::ifreq);
    nix::ioctl_write_int_bad!(set_persist, 0x4004_54cb);
    nix::ioctl_write_int_bad!(set_offload, 0x4004_54d0);
    // By its parts: the number does not fit musl's type for requests.
    nix::ioctl_read_bad!(
        interface,
        nix::request_code_read!(b'T', 210, 4),
        libc::ifreq
    );
    nix::ioctl_none_bad!(network_namespace, 0x54e3);
    nix::ioctl_readwrite_bad!(mtu, libc::SIOCGIFMTU, libc::ifreq);
    nix::ioctl_write_ptr_bad!(set_mtu, libc::SIOCSIFMTU, libc::ifreq);
    nix::ioctl_readwrite_bad!(flags, libc::SIOCGIFFLAGS, libc::ifreq);
}

/// What the kernel may leave to this device: checksums, and cutting TCP and, since Linux 6.2, UDP.
const TCP_OFFLOAD: libc::c_uint =
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
const UDP_OFFLOAD: libc::c_uint = 0x20 | 0x40;

const FLAGS: libc::c_int =
    libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;

fn request(name: &str) -> Result<libc::ifreq, TunError> {
    let bytes = name.as_bytes();
    let valid = !bytes.is_empty()
        && bytes.len() < libc::IFNAMSIZ
        && !matches!(name, "." | "..")
        && !bytes.iter().any(|&byte| {
            byte == b'/' || byte == b':' || byte == b'%' || byte.is_ascii_whitespace() || byte == 0
        });
    if !valid {
        return Err(TunError::Name(name.to_owned()));
    }
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, &from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    Ok(request)
}

impl Tun {
    /// Makes the link, or opens a queue of an existing one.
    ///
    /// A new link gets `mtu`. With `persistent` it stays when the process ends.
    ///
    /// # Errors
    /// See [`TunError`].
    pub(super) fn open(name: &str, mtu: u32, persistent: bool) -> Result<Self, TunError> {
        let existed = Path::new("/sys/class/net").join(name).exists();
        let tun = Self::open_queue(name)?;
        let kernel = |error: Errno| TunError::Kernel(name.to_owned(), error.into());
        let fd = tun.file.as_raw_fd();
        // SAFETY: both calls pass plain integers to a TUN descriptor.
        unsafe {
            ioctl::set_persist(fd, libc::c_int::from(persistent)).map_err(kernel)?;
            // Each kernel accepts the kinds that it knows, and cuts the others itself.
            let all = TCP_OFFLOAD | UDP_OFFLOAD;
            for offload in [all, TCP_OFFLOAD, libc::TUN_F_CSUM, 0] {
                if ioctl::set_offload(fd, offload.cast_signed()).is_ok() {
                    tun.udp_offload.store(offload == all, Ordering::Relaxed);
                    break;
                }
            }
        }
        if !existed {
            Self::set_mtu(name, mtu).map_err(|error| TunError::Kernel(name.to_owned(), error))?;
        }
        Ok(tun)
    }

    /// Opens one more queue of a link that this process has open.
    ///
    /// # Errors
    /// See [`TunError`].
    pub(super) fn open_queue(name: &str) -> Result<Self, TunError> {
        let mut request = request(name)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(DEVICE)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TunError::NoDevice,
                Some(libc::EPERM | libc::EACCES) => TunError::Permission(name.to_owned()),
                _ => TunError::Kernel(name.to_owned(), error),
            })?;
        request.ifr_ifru.ifru_flags = FLAGS as libc::c_short;
        // SAFETY: the request lives through the call, and names a link as TUNSETIFF expects.
        unsafe { ioctl::set_interface(file.as_raw_fd(), &raw const request) }.map_err(|errno| {
            let name = name.to_owned();
            match errno as i32 {
                libc::EPERM => TunError::Permission(name),
                libc::EBUSY => TunError::Busy(name),
                // No TUN, or one made with other flags.
                libc::EINVAL | libc::EEXIST => TunError::Foreign(name),
                _ => TunError::Kernel(name, errno.into()),
            }
        })?;
        Ok(Self {
            file,
            udp_offload: AtomicBool::new(false),
        })
    }

    /// Sets whether the link stays when the process ends.
    ///
    /// # Errors
    /// The error of the kernel.
    pub(super) fn set_persistent(&self, persistent: bool) -> io::Result<()> {
        // SAFETY: a plain integer to a TUN descriptor.
        let result =
            unsafe { ioctl::set_persist(self.file.as_raw_fd(), libc::c_int::from(persistent)) };
        result.map(drop).map_err(Into::into)
    }

    /// Reads one packet behind its virtio-net header into a buffer of [`MAX_READ`] bytes.
    ///
    /// # Errors
    /// `EAGAIN` if there is none; `EBADFD` if the link was deleted.
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// Writes one packet, in pieces, that begins with its virtio-net header.
    ///
    /// # Errors
    /// `EIO` while the link is down; `EBADFD` if it was deleted; `EINVAL` for a joined packet of a kind that
    /// the kernel does not know.
    pub(super) fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        (&self.file).write_vectored(pieces).map(drop)
    }

    /// Whether joined UDP packets may be written.
    pub(super) fn takes_udp(&self) -> bool {
        self.udp_offload.load(Ordering::Relaxed)
    }

    /// Records that the kernel refused a joined UDP packet; true the first time.
    pub(super) fn refuses_udp(&self) -> bool {
        self.udp_offload.swap(false, Ordering::Relaxed)
    }

    /// The name of the link, which may have been renamed.
    ///
    /// # Errors
    /// `EBADFD` if it was deleted.
    pub(super) fn name(&self) -> io::Result<String> {
        let mut request = request("-").map_err(io::Error::other)?;
        // SAFETY: the kernel fills in the request, which lives through the call.
        unsafe { ioctl::interface(self.file.as_raw_fd(), &raw mut request) }?;
        let name = request.ifr_name.iter().take_while(|&&byte| byte != 0);
        let name = name.map(|byte| byte.cast_unsigned()).collect();
        String::from_utf8(name).map_err(io::Error::other)
    }

    /// The network namespace that the link is in.
    ///
    /// # Errors
    /// `ENOTTY` before Linux 5.2; `EBADFD` if the link was deleted.
    pub(super) fn network_namespace(&self) -> io::Result<OwnedFd> {
        // SAFETY: the call takes no argument.
        let fd = unsafe { ioctl::network_namespace(self.file.as_raw_fd()) }?;
        // SAFETY: the kernel returned a new descriptor that nothing else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn set_mtu(name: &str, mtu: u32) -> io::Result<()> {
        let socket = interface_socket()?;
        let mut request = request(name).map_err(io::Error::other)?;
        request.ifr_ifru.ifru_mtu = libc::c_int::try_from(mtu).unwrap_or(libc::c_int::MAX);
        // SAFETY: the request lives through the call, and names a link and an MTU.
        unsafe { ioctl::set_mtu(socket.as_raw_fd(), &raw const request) }?;
        Ok(())
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A socket for ioctls on interfaces of the namespace that it was made in.
///
/// # Errors
/// The error of the kernel.
pub(super) fn interface_socket() -> io::Result<Socket> {
    Socket::new(Domain::UNIX, Type::DGRAM, None)
}

/// The MTU of a link in the namespace of a socket, and whether it is up.
///
/// # Errors
/// `ENODEV` if there is none of that name.
pub(super) fn link_state(socket: &Socket, name: &str) -> io::Result<(u32, bool)> {
    let mut request = request(name).map_err(io::Error::other)?;
    // SAFETY: the kernel reads the name in the request and fills in its MTU; the field is read only
    // after the call succeeded.
    let mtu = unsafe {
        ioctl::mtu(socket.as_raw_fd(), &raw mut request)?;
        request.ifr_ifru.ifru_mtu
    };
    // SAFETY: as above, for the flags.
    let flags = unsafe {
        ioctl::flags(socket.as_raw_fd(), &raw mut request)?;
        request.ifr_ifru.ifru_flags
    };
    let up = libc::c_int::from(flags) & libc::IFF_UP != 0;
    Ok((u32::try_from(mtu).unwrap_or(0), up))
}
