//! What the threads do I/O with: sockets, TUN queues, and the buffers of each direction.
//!
//! Nothing here decides when to read or to send; that is for `threads` and `duplex`.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use arc_swap::ArcSwap;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::clock::Time;
use super::core::Core;
use super::drops::Dropped;
use super::gso::{MAX_SEGMENTS, Split, VnetHeader};
use super::icmp::{self, Answer, Pace};
use super::packet::{Header, Outer};
use super::peer::Wire;
use super::receive::Receive;
use super::transmit::{Refused, Transmit};
use super::tun::{MAX_READ, Tun, TunError};
use super::udp::{Arena, Endpoint, MAX_MESSAGES, Sockets, UdpSocket};

/// Pause between two attempts to make a deleted link again.
pub(super) const RETRY: Duration = Duration::from_millis(200);
/// Messages larger than this are received one at a time; see [`MAX_MESSAGES`].
pub(super) const LARGE: usize = 8 << 10;

/// What the threads do I/O with.
pub(super) struct Io {
    pub(super) sockets: ArcSwap<Sockets>,
    /// The queues of the TUN link, as many as there are transmit threads.
    pub(super) tuns: ArcSwap<Vec<Tun>>,
    pub(super) fwmark: AtomicU32,
    /// Set once, to end every thread.
    stopping: AtomicBool,
    /// Readable once the threads must end.
    pub(super) stop: EventFd,
    /// Readable while the handshake thread has jobs.
    pub(super) jobs: EventFd,
    /// Set while the link does not exist.
    pub(super) gone: AtomicBool,
    /// What to do when the link was deleted.
    pub(super) on_gone: OnGone,
}

/// The reaction to the deletion of the link by another program.
pub(super) enum OnGone {
    /// Makes it again, with this name and MTU, persistent or not.
    Remake(String, u32, bool),
    /// Calls the embedder.
    Call(Box<dyn Fn() + Send + Sync>),
}

impl Wire for Sockets {
    fn send(
        &self,
        run: &[u8],
        stride: usize,
        to: &Endpoint,
        outer: Outer,
        offload: bool,
    ) -> io::Result<bool> {
        Self::send(self, run, stride, to, outer, offload)
    }

    fn leads(&self, endpoint: &Endpoint) -> bool {
        Self::leads(self, endpoint)
    }
}

impl Io {
    pub(super) fn new(
        sockets: Sockets,
        tuns: Vec<Tun>,
        fwmark: u32,
        on_gone: OnGone,
    ) -> io::Result<Self> {
        let event = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        Ok(Self {
            sockets: ArcSwap::from_pointee(sockets),
            tuns: ArcSwap::from_pointee(tuns),
            fwmark: AtomicU32::new(fwmark),
            stopping: AtomicBool::new(false),
            stop: event()?,
            jobs: event()?,
            gone: AtomicBool::new(false),
            on_gone,
        })
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Makes every thread end soon.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        // Each fails only if the descriptor is readable already.
        let _ = self.stop.write(1);
        let _ = self.jobs.write(1);
        self.sockets.load().shut_down();
    }

    /// Replaces the sockets.
    pub(super) fn replace_sockets(&self, sockets: Sockets) {
        self.sockets.swap(Arc::new(sockets)).shut_down();
    }

    /// Reacts to the deletion of the link.
    fn link_is_gone(&self) {
        if !self.gone.swap(true, Ordering::AcqRel) {
            match &self.on_gone {
                OnGone::Call(call) => call(),
                // The handshake thread makes it again.
                OnGone::Remake(..) => {
                    let _ = self.jobs.write(1);
                }
            }
        }
        thread::sleep(RETRY / 4);
    }

    /// Makes the link again; true on success.
    pub(super) fn remake(&self) -> bool {
        let OnGone::Remake(name, mtu, persistent) = &self.on_gone else {
            return false;
        };
        let queues = self.tuns.load().len();
        match open_queues(name, *mtu, *persistent, queues) {
            Ok(tuns) => {
                tracing::info!(link = name, "link deleted by another program: made again");
                self.tuns.store(Arc::new(tuns));
                self.gone.store(false, Ordering::Release);
                true
            }
            Err(error) => {
                tracing::debug!(link = name, %error, "could not make the link again");
                false
            }
        }
    }
}

/// Opens the link and all its queues.
pub(super) fn open_queues(
    name: &str,
    mtu: u32,
    persistent: bool,
    queues: usize,
) -> Result<Vec<Tun>, TunError> {
    let first = Tun::open(name, mtu, persistent)?;
    let mut tuns = vec![first];
    for _ in 1..queues {
        tuns.push(Tun::open_queue(name)?);
    }
    Ok(tuns)
}

/// Carries packets from the TUN device to the wire.
pub(super) struct Outward {
    buffer: Vec<u8>,
    transmit: Transmit,
    pace: Pace,
}

impl Default for Outward {
    fn default() -> Self {
        Self {
            buffer: vec![0; MAX_READ],
            transmit: Transmit::default(),
            pace: Pace::default(),
        }
    }
}

impl Outward {
    /// Reads one packet; returns its length in bytes, or `None` if there was none. In that case all packets
    /// read so far are sent.
    pub(super) fn packet(
        &mut self,
        core: &Core,
        io: &Io,
        tun: &Tun,
        sockets: &Sockets,
        now: Time,
    ) -> Option<usize> {
        match tun.read(&mut self.buffer) {
            Ok(length) => {
                let bytes = &self.buffer[..length];
                if let Err(Refused(Some(answer))) = self.transmit.packet(core, sockets, bytes, now)
                    && self.pace.allows(now)
                {
                    answer_sender(tun, bytes, answer);
                }
                return Some(length);
            }
            Err(error) => match error.raw_os_error() {
                Some(libc::EAGAIN) => self.flush(core, sockets, now),
                Some(libc::EINTR) => {}
                Some(libc::EBADFD) => io.link_is_gone(),
                _ => {
                    core.drops.add(Dropped::TunFailed, 1);
                    tracing::debug!(%error, "could not read from the link");
                    thread::sleep(Duration::from_millis(10));
                }
            },
        }
        None
    }

    /// Sends all packets that were read.
    pub(super) fn flush(&mut self, core: &Core, sockets: &Sockets, now: Time) {
        self.transmit.flush(core, sockets, now);
    }

    /// Drops the references to peer and session, before a time without traffic.
    pub(super) fn rest(&mut self) {
        self.transmit.rest();
    }
}

/// Answers a packet that cannot be sent, with an ICMP error.
fn answer_sender(tun: &Tun, bytes: &[u8], answer: Answer) {
    let packet = VnetHeader::read(bytes).and_then(|(_, packet)| icmp::answer(packet, answer));
    if let Some(packet) = packet {
        let vnet = VnetHeader::default().to_bytes();
        // Fails while the link goes down, and the answer is lost.
        let _ = tun.write(&[IoSlice::new(&vnet), IoSlice::new(&packet)]);
    }
}

/// A batch that was taken from a socket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    pub(super) bytes: usize,
    /// Whether the socket is empty now.
    pub(super) all: bool,
}

/// Carries datagrams from the wire to the TUN device.
pub(super) struct Inward {
    arena: Arena,
    receive: Receive,
    limit: usize,
}

impl Default for Inward {
    fn default() -> Self {
        Self {
            arena: Arena::default(),
            receive: Receive::default(),
            limit: 1,
        }
    }
}

impl Inward {
    /// Takes a batch from a socket; `None` if there was nothing to read.
    pub(super) fn take(&mut self, socket: &UdpSocket, wait: bool) -> Option<Taken> {
        match socket.receive(&mut self.arena, self.limit, wait) {
            Ok(()) => {
                let messages = &self.arena.messages;
                let bytes = messages.iter().map(|message| message.range.len()).sum();
                let all = messages.len() < self.limit;
                self.limit = if bytes > LARGE * messages.len() {
                    1
                } else {
                    MAX_MESSAGES
                };
                Some(Taken { bytes, all })
            }
            Err(error) => {
                if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) {
                    tracing::debug!(%error, "could not receive from the socket");
                    thread::sleep(Duration::from_millis(1));
                }
                None
            }
        }
    }

    /// Opens the batch.
    pub(super) fn open(&mut self, core: &Core, tuns: &[Tun], now: Time) {
        self.receive
            .join_udp(tuns.first().is_some_and(Tun::takes_udp));
        for message in &self.arena.messages {
            self.receive
                .message(core, &mut self.arena.bytes, message, now);
        }
    }

    /// Writes the packets of the batch.
    pub(super) fn write(&mut self, core: &Core, tuns: &[Tun]) {
        self.receive.finish(&mut self.arena.bytes, |pieces, count| {
            if let Some(tun) = queue_of(tuns, pieces) {
                write(core, tun, pieces, count);
            }
        });
    }
}

/// The queue for a packet, by flow: the kernel reads the other direction of a flow into the queue that the
/// flow was last written to.
fn queue_of<'a>(tuns: &'a [Tun], pieces: &[IoSlice<'_>]) -> Option<&'a Tun> {
    if tuns.len() < 2 {
        return tuns.first();
    }
    let packet = pieces.get(1)?;
    let hash = Header::parse_piece(packet)?.flow_hash(packet);
    let queue = usize::try_from(hash >> 32).ok()? % tuns.len();
    tuns.get(queue)
}

/// Writes one packet. If the kernel refuses a joined packet, its parts are written one by one.
fn write(core: &Core, tun: &Tun, pieces: &[IoSlice<'_>], count: usize) {
    let Err(error) = tun.write(pieces) else {
        return;
    };
    if error.raw_os_error() == Some(libc::EINVAL) && count > 1 {
        if tun.refuses_udp() {
            tracing::info!("kernel refuses joined UDP packets: writing them one by one");
        }
        let joined: Vec<u8> = pieces
            .iter()
            .flat_map(|piece| piece.iter().copied())
            .collect();
        write_apart(core, tun, &joined);
    } else {
        core.drops.add(Dropped::TunFailed, count as u64);
    }
}

/// Writes one whole packet.
pub(super) fn write_alone(tuns: &[Tun], packet: &[u8]) -> io::Result<()> {
    if Header::parse(packet).is_none_or(|ip| ip.length != packet.len()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let vnet = VnetHeader::default().to_bytes();
    let pieces = [IoSlice::new(&vnet), IoSlice::new(packet)];
    let tun = queue_of(tuns, &pieces).ok_or(io::ErrorKind::NotConnected)?;
    tun.write(&pieces)
}

fn write_apart(core: &Core, tun: &Tun, joined: &[u8]) {
    let split = VnetHeader::read(joined).and_then(|(vnet, packet)| {
        let ip = Header::parse(packet)?;
        Split::new(&vnet, packet, &ip)
    });
    let Some(split) = split else {
        return core.drops.add(Dropped::TunFailed, MAX_SEGMENTS as u64);
    };
    let vnet = VnetHeader::default().to_bytes();
    for n in 0..split.count() {
        let mut packet = vec![0; split.length(n)];
        split.write(n, &mut packet);
        if tun
            .write(&[IoSlice::new(&vnet), IoSlice::new(&packet)])
            .is_err()
        {
            core.drops.add(Dropped::TunFailed, 1);
        }
    }
}
