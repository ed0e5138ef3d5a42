//! Control messages: the data that accompanies a run of datagrams.
//!
//! Sent: the source address, the hop limit, the congestion mark, and the size that the kernel cuts to
//! (ip(7), ipv6(7), udp(7)). Received: the local address that the peer sent to, the mark, and the size of
//! the datagrams that the kernel joined.
#![expect(
    unsafe_code,
    reason = "only C's macros know where control messages are in their buffer"
)]

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nix::errno::Errno;

use super::{Message, size_of_u32};
use crate::wireguard::packet::{Ecn, Outer};

/// Room for the control messages of one run, aligned as they need it.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub(super) struct Control([u8; 128]);

impl Default for Control {
    fn default() -> Self {
        Self([0; 128])
    }
}

impl Control {
    /// All of it, for the kernel to read or write.
    pub(super) fn room(&mut self) -> &mut [u8] {
        &mut self.0
    }

    /// Writes the control messages of a run; returns their bytes.
    ///
    /// # Errors
    /// `EINVAL` if the stride is longer than any datagram.
    pub(super) fn write(
        &mut self,
        v6: bool,
        local: Option<(IpAddr, u32)>,
        outer: Outer,
        stride: Option<usize>,
    ) -> io::Result<usize> {
        let mut writer = Writer {
            control: self,
            length: 0,
        };
        match local {
            Some((IpAddr::V4(local), _)) if !v6 => writer.push(
                libc::IPPROTO_IP,
                libc::IP_PKTINFO,
                // The route decides on the interface; the address stays.
                libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr {
                        s_addr: u32::from_ne_bytes(local.octets()),
                    },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                },
            ),
            Some((IpAddr::V6(local), interface)) if v6 => writer.push(
                libc::IPPROTO_IPV6,
                libc::IPV6_PKTINFO,
                libc::in6_pktinfo {
                    ipi6_addr: libc::in6_addr {
                        s6_addr: local.octets(),
                    },
                    // A link-local address means nothing without its link.
                    ipi6_ifindex: if local.is_unicast_link_local() {
                        interface
                    } else {
                        0
                    },
                },
            ),
            _ => {}
        }
        if let Some(hops) = outer.hops {
            let hops = libc::c_int::from(hops.get());
            if v6 {
                writer.push(libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT, hops);
            } else {
                writer.push(libc::IPPROTO_IP, libc::IP_TTL, hops);
            }
        }
        if outer.ecn != Ecn::NotCapable {
            let tos = libc::c_int::from(outer.ecn as u8);
            if v6 {
                writer.push(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, tos);
            } else {
                writer.push(libc::IPPROTO_IP, libc::IP_TOS, tos);
            }
        }
        if let Some(stride) = stride {
            let stride = u16::try_from(stride).map_err(|_| Errno::EINVAL)?;
            writer.push(libc::SOL_UDP, libc::UDP_SEGMENT, stride);
        }
        Ok(writer.length)
    }
}

struct Writer<'a> {
    control: &'a mut Control,
    length: usize,
}

impl Writer<'_> {
    /// Appends a control message of a plain C type.
    fn push<T: Copy>(&mut self, level: libc::c_int, kind: libc::c_int, value: T) {
        let size = size_of_u32::<T>();
        // SAFETY: pure arithmetic.
        let (space, length) = unsafe { (libc::CMSG_SPACE(size), libc::CMSG_LEN(size)) };
        let end = self.length + space as usize;
        let room = &mut self.control.0[self.length..end];
        let header = room.as_mut_ptr().cast::<libc::cmsghdr>();
        // SAFETY: the room is `space` bytes at a multiple of the alignment of cmsghdr (the buffer is
        // so aligned, and CMSG_SPACE keeps it), which holds the header and, where CMSG_DATA points,
        // the value; the value is written without assuming its own alignment.
        unsafe {
            (*header).cmsg_level = level;
            (*header).cmsg_type = kind;
            (*header).cmsg_len = length as _;
            libc::CMSG_DATA(header).cast::<T>().write_unaligned(value);
        }
        self.length = end;
    }
}

/// Reads the control messages of a message.
///
/// # Safety
/// The header is as the kernel left it, and its control messages are still where it wrote them.
pub(super) unsafe fn read(header: &libc::msghdr, message: &mut Message) {
    // SAFETY: the kernel has filled in msg_control up to msg_controllen, both still valid.
    let mut control = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give null or a header that lies whole in the buffer.
    while let Some(cmsg) = unsafe { control.as_ref() } {
        // SAFETY: the header is followed by its data.
        let data = unsafe { libc::CMSG_DATA(control) };
        // SAFETY (of the reads below): the kernel writes each of these kinds with the type read, and
        // no alignment is assumed.
        match (cmsg.cmsg_level, cmsg.cmsg_type) {
            (libc::SOL_UDP, libc::UDP_GRO) => {
                // SAFETY: an int, see above.
                let stride = unsafe { data.cast::<libc::c_int>().read_unaligned() };
                if let Ok(stride @ 1..) = usize::try_from(stride) {
                    message.stride = stride;
                }
            }
            (libc::IPPROTO_IP, libc::IP_TOS) => {
                // SAFETY: one byte, see above.
                message.ecn = Ecn::from_bits(unsafe { data.read() });
            }
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                // SAFETY: an int, see above.
                let class = unsafe { data.cast::<libc::c_int>().read_unaligned() };
                message.ecn = Ecn::from_bits(u8::try_from(class & 0xff).unwrap_or(0));
            }
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                // SAFETY: an in_pktinfo, see above.
                let info = unsafe { data.cast::<libc::in_pktinfo>().read_unaligned() };
                let local = Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes());
                let interface = u32::try_from(info.ipi_ifindex).unwrap_or(0);
                message.from.local = Some((local.into(), interface));
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                // SAFETY: an in6_pktinfo, see above.
                let info = unsafe { data.cast::<libc::in6_pktinfo>().read_unaligned() };
                let local = Ipv6Addr::from(info.ipi6_addr.s6_addr);
                message.from.local = Some((local.into(), info.ipi6_ifindex));
            }
            _ => {}
        }
        // SAFETY: both pointers are into the live buffer, see above.
        control = unsafe { libc::CMSG_NXTHDR(header, control) };
    }
}
