//! Makes more handshake initiations than any device should answer.
//!
//! Each is a genuine one from a stranger: the first MAC is right, which takes no more than the
//! device's public key, so that all the device can do is to work or to refuse. They are made before
//! the flood and sent over and over, because to make one costs as much as to answer it.

use std::io::{self, IoSlice};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Result;
use boringtun::noise::HANDSHAKE_INIT_SZ;
use boringtun::noise::handshake::Handshake;
use boringtun::x25519;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, sendmmsg, setsockopt, sockopt};
use nix::time::{ClockId, clock_gettime};
use selvedge::wireguard::key::PrivateKey;
use selvedge_lab::netns::Namespace;
use socket2::{Domain, Protocol, Socket, Type};

/// How many initiations differ; the device remembers none of them.
const DIFFERENT: u32 = 2048;
/// How many are sent with one call.
const AT_ONCE: usize = 64;
/// The bits of a made-up address that differ. So few that each comes again before the device has forgotten
/// it, after 4.5 seconds, also from a program that is not optimized and so sends less; others would be as
/// good as newcomers, and no flood.
const DIFFERENCE: u16 = if cfg!(debug_assertions) {
    0x3fff
} else {
    0xffff
};
/// IPv4 and UDP.
const HEADERS: usize = 28;

/// Whom a flood seems to come from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Sources {
    /// The address of the socket.
    One,
    /// Each of many addresses in 198.18.0.0/16 in turn, which is for measurements (RFC 2544); all made up.
    Many,
}

/// A flood that lasts until the value is dropped.
pub(crate) struct Flood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    /// What sending has taken, in nanoseconds of a CPU.
    spent: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
    start: Instant,
}

impl Flood {
    /// Begins to send so many initiations per second, from a namespace.
    pub(crate) fn start(
        from: &Namespace,
        to: SocketAddrV4,
        public_key: &str,
        sources: Sources,
        per_second: u32,
    ) -> Result<Self> {
        let messages = initiations(public_key)?;
        let mut send = match sources {
            Sources::One => from.within(|| from_one(to, messages))?,
            Sources::Many => from.within(|| from_many(to, messages))?,
        };
        let (stop, sent) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let spent = Arc::<AtomicU64>::default();
        let start = Instant::now();
        let thread = thread::spawn({
            let (stop, sent, spent) = (stop.clone(), sent.clone(), spent.clone());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let due = start.elapsed().as_secs_f64() * f64::from(per_second);
                    while (sent.load(Ordering::Relaxed) as f64) < due {
                        // What the kernel does not take is not part of the flood.
                        let count = send().unwrap_or(0);
                        sent.fetch_add(count, Ordering::Relaxed);
                        if count == 0 || stop.load(Ordering::Relaxed) {
                            break;
                        }
                    }
                    spent.store(cpu_time(), Ordering::Relaxed);
                    thread::sleep(Duration::from_micros(500));
                }
            }
        });
        Ok(Self {
            stop,
            sent,
            spent,
            thread: Some(thread),
            start,
        })
    }

    /// The initiations sent per second so far.
    pub(crate) fn per_second(&self) -> f64 {
        self.sent.load(Ordering::Relaxed) as f64 / self.start.elapsed().as_secs_f64()
    }

    /// The share of one CPU that the strangers take for themselves: their program, and the kernel's
    /// way from there to the device's socket.
    pub(crate) fn cpu_share(&self) -> f64 {
        self.spent.load(Ordering::Relaxed) as f64 / self.start.elapsed().as_nanos() as f64
    }
}

/// What the calling thread has taken, in nanoseconds of a CPU.
fn cpu_time() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
    let time = time.map_or(Duration::ZERO, Duration::from);
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Sends some and returns how many.
type Send = Box<dyn FnMut() -> io::Result<u64> + std::marker::Send>;

/// In large sends that the kernel cuts up, the cheapest a single attacker can do.
fn from_one(to: SocketAddrV4, messages: Vec<Vec<u8>>) -> io::Result<Send> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.connect(&to.into())?;
    let stride = i32::try_from(HANDSHAKE_INIT_SZ).map_err(io::Error::other)?;
    setsockopt(&socket, sockopt::UdpGsoSegment, &stride)?;
    let runs: Vec<Vec<u8>> = messages.chunks(AT_ONCE).map(<[_]>::concat).collect();
    let mut next = 0;
    Ok(Box::new(move || {
        next = (next + 1) % runs.len();
        let sent = socket.send(&runs[next])?;
        Ok((sent / HANDSHAKE_INIT_SZ) as u64)
    }))
}

/// Each with an IP header of its own, many with one call of the kernel. It fills in the checksum of IP;
/// UDP needs none.
fn from_many(to: SocketAddrV4, messages: Vec<Vec<u8>>) -> io::Result<Send> {
    // A raw socket of IPPROTO_RAW takes whole packets (raw(7)).
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255)))?;
    socket.connect(&to.into())?;
    let length = u16::try_from(HEADERS + HANDSHAKE_INIT_SZ).map_err(io::Error::other)?;
    let mut packets: Vec<Vec<u8>> = messages
        .iter()
        .map(|message| {
            let mut packet = vec![0; HEADERS];
            (packet[0], packet[8], packet[9]) = (0x45, 64, 17);
            packet[2..4].copy_from_slice(&length.to_be_bytes());
            packet[16..20].copy_from_slice(&to.ip().octets());
            packet[22..24].copy_from_slice(&to.port().to_be_bytes());
            packet[24..26].copy_from_slice(&(length - 20).to_be_bytes());
            packet.extend(message);
            packet
        })
        .collect();
    let (mut source, mut next) = (0_u16, 0);
    Ok(Box::new(move || {
        let runs = packets.len() / AT_ONCE;
        next = (next + 1) % runs;
        let run = &mut packets[next * AT_ONCE..][..AT_ONCE];
        for packet in &mut *run {
            source = source.wrapping_add(1);
            let from = Ipv4Addr::new(198, 18, 0, 0).to_bits() | u32::from(source & DIFFERENCE);
            packet[12..16].copy_from_slice(&from.to_be_bytes());
            packet[20..22].copy_from_slice(&(source | 1024).to_be_bytes());
        }
        let slices: Vec<_> = run.iter().map(|packet| [IoSlice::new(packet)]).collect();
        let mut headers = MultiHeaders::<SockaddrIn>::preallocate(AT_ONCE, None);
        let sent = sendmmsg(
            socket.as_raw_fd(),
            &mut headers,
            &slices,
            [None; AT_ONCE],
            [],
            MsgFlags::empty(),
        )?;
        Ok(sent.count() as u64)
    }))
}

/// Initiations to a device, from strangers.
fn initiations(public_key: &str) -> Result<Vec<Vec<u8>>> {
    let public_key: selvedge::wireguard::key::PublicKey = public_key.parse()?;
    let secret = x25519::StaticSecret::from(PrivateKey::generate().0);
    let public = x25519::PublicKey::from(&secret);
    let mut handshake = Handshake::new(secret, public, public_key.0.into(), None);
    let make = |index| {
        let mut buffer = [0; HANDSHAKE_INIT_SZ];
        let message = handshake
            .format_handshake_initiation(index, [0x40; 12], &mut buffer)
            .map_err(|error| anyhow::anyhow!("no initiation: {error:?}"))?;
        Ok(message.to_vec())
    };
    (0..DIFFERENT).map(make).collect()
}
