//! The I/O of echoes, on a thread of its own: a UDP socket in the pod network, and the tunnel device.
//!
//! What is sent and what an answer proves is decided in [`crate::probe`]. The agent's loop neither waits for this
//! thread nor holds it up: targets come by a queue, verdicts go by another, and what people see is the latest
//! value.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::oneshot;

use crate::clock::now;
use crate::probe::message::LENGTH;
use crate::probe::{News, PathStats, Prober, Targets, Transmit};
use crate::wireguard::{Device, Diverted, Origin, PeerId, PeerWay};

/// How long a socket that could not be bound, or that failed, is left alone.
const RETRY: Duration = Duration::from_secs(1);
/// How long further failures are not logged.
const QUIET: Duration = Duration::from_secs(600);
/// How often the shown measurements are renewed.
const SHOWN: Duration = Duration::from_millis(500);
/// How often it is looked whether all others know that this node drains.
const DRAINING: Duration = Duration::from_millis(20);
/// How often it is looked how the tunnel's peers are reached, and how much is sent to them.
const WAYS: Duration = Duration::from_millis(250);
/// Datagrams that are read before packets of the device have their turn.
const BATCH: usize = 64;

/// Wakes the thread. The device does so when it has packets for it.
#[derive(Clone, Debug)]
pub struct Wake(Arc<EventFd>);

impl Wake {
    /// # Errors
    /// When the process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(Arc::new(EventFd::from_flags(flags)?)))
    }

    /// Wakes it. Does not block.
    pub fn wake(&self) {
        // Fails only if the counter is full, and then the thread is about to wake.
        let _ = self.0.write(1);
    }
}

/// The tunnel device, as far as echoes go through it.
pub trait Tunnel: Send + Sync {
    /// As [`Device::set_diverted`].
    fn set_diverted(&self, addresses: BTreeSet<IpAddr>);
    /// As [`Device::set_own_addresses`].
    fn set_own_addresses(&self, addresses: BTreeSet<IpAddr>);
    /// As [`Device::take_diverted`].
    fn take_diverted(&self) -> Vec<Diverted>;
    /// As [`Device::send_packet`].
    fn send_packet(&self, id: &PeerId, packet: &[u8]) -> bool;
    /// As [`Device::send_padded`].
    fn send_padded(&self, id: &PeerId, packet: &[u8], length: u16) -> bool;
    /// As [`Device::ways`].
    fn ways(&self) -> BTreeMap<PeerId, PeerWay>;
    /// As [`Device::write_packet`].
    fn write_packet(&self, packet: &[u8]) -> io::Result<()>;
}

impl Tunnel for Device {
    fn set_diverted(&self, addresses: BTreeSet<IpAddr>) {
        Self::set_diverted(self, addresses);
    }

    fn set_own_addresses(&self, addresses: BTreeSet<IpAddr>) {
        Self::set_own_addresses(self, addresses);
    }

    fn take_diverted(&self) -> Vec<Diverted> {
        Self::take_diverted(self)
    }

    fn send_packet(&self, id: &PeerId, packet: &[u8]) -> bool {
        Self::send_packet(self, id, packet)
    }

    fn send_padded(&self, id: &PeerId, packet: &[u8], length: u16) -> bool {
        Self::send_padded(self, id, packet, length)
    }

    fn ways(&self) -> BTreeMap<PeerId, PeerWay> {
        Self::ways(self)
    }

    fn write_packet(&self, packet: &[u8]) -> io::Result<()> {
        Self::write_packet(self, packet)
    }
}

enum Command {
    Targets(Box<Targets>),
    Drain(oneshot::Sender<bool>),
}

/// What people see of the echoes.
#[derive(Clone, Debug, Default)]
pub struct Shown {
    /// The paths.
    pub paths: Vec<PathStats>,
    /// How often the socket could not be bound, or could not send or receive.
    pub failures: u64,
}

/// The running thread. It has ended, and let go of the device, when this is dropped: only then can the device store its
/// last timestamps.
#[derive(Debug)]
pub struct Echoes {
    commands: Sender<Command>,
    wake: Wake,
    shown: Arc<Mutex<Arc<Shown>>>,
    thread: Option<JoinHandle<()>>,
}

impl Echoes {
    /// Starts the thread in the network namespace of the calling one. `send` is called on it with what the
    /// echoes say, so it must not block.
    ///
    /// # Errors
    /// When no thread can be started, or there is no randomness.
    pub fn start(
        device: Arc<dyn Tunnel>,
        wake: Wake,
        send: impl Fn(News) + Send + 'static,
    ) -> io::Result<Self> {
        let (commands, received) = channel();
        let shown = Arc::<Mutex<Arc<Shown>>>::default();
        let begun = now();
        let thread = Thread {
            prober: Prober::new(rand::random()),
            device,
            send,
            received,
            wake: wake.clone(),
            socket: None,
            retry: None,
            logged: None,
            draining: Vec::new(),
            failures: 0,
            shown: Arc::clone(&shown),
            shown_at: begun,
            looked: begun,
        };
        let thread = std::thread::Builder::new()
            .name("echoes".to_owned())
            .spawn(move || thread.run())?;
        Ok(Self {
            commands,
            wake,
            shown,
            thread: Some(thread),
        })
    }

    /// These are the targets from now on.
    pub fn set_targets(&self, targets: Targets) {
        self.send(Command::Targets(Box::new(targets)));
    }

    /// Tells all that send echoes to this node that it is about to stop, if another leader of its region answers.
    /// The receiver gets true when all of them know, or false at once if there is no such leader.
    pub fn drain(&self) -> oneshot::Receiver<bool> {
        let (done, drained) = oneshot::channel();
        self.send(Command::Drain(done));
        drained
    }

    /// What people see.
    pub fn shown(&self) -> Arc<Shown> {
        Arc::clone(&self.shown.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn send(&self, command: Command) {
        // The thread ends with this value; a panic in it ends the process.
        let _ = self.commands.send(command);
        self.wake.wake();
    }
}

impl Drop for Echoes {
    fn drop(&mut self) {
        // The thread then finds the queue closed.
        self.commands = channel().0;
        self.wake.wake();
        if let Some(thread) = self.thread.take() {
            // A panic in it ends the process.
            let _ = thread.join();
        }
    }
}

struct Thread<F> {
    prober: Prober,
    device: Arc<dyn Tunnel>,
    send: F,
    received: Receiver<Command>,
    wake: Wake,
    /// The socket, with the address that it is bound to.
    socket: Option<(IpAddr, UdpSocket)>,
    /// When it is tried again to bind it.
    retry: Option<Instant>,
    /// When a failure was last logged.
    logged: Option<Instant>,
    /// Who waits until all others know that this node drains.
    draining: Vec<oneshot::Sender<bool>>,
    failures: u64,
    shown: Arc<Mutex<Arc<Shown>>>,
    shown_at: Instant,
    /// When it was last looked how the peers are reached.
    looked: Instant,
}

impl<F: Fn(News)> Thread<F> {
    fn run(mut self) {
        loop {
            let time = now();
            if !self.take_commands(time) {
                return;
            }
            self.bind(time);
            // Echoes come before answers: what they say of this node's forwarding goes into answers to others.
            for diverted in self.device.take_diverted() {
                let peer = match &diverted.origin {
                    Origin::Peer(id) => Some(id),
                    Origin::Link => None,
                };
                self.prober.handle_packet(time, peer, &diverted.packet);
            }
            let is_drained = self.receive(time);
            self.look_at_ways(time);
            self.prober.handle_timeout(time);
            self.transmit(time);
            if let Some(news) = self.prober.poll_news(time) {
                self.show(time);
                (self.send)(news);
            } else if time.saturating_duration_since(self.shown_at) >= SHOWN {
                self.show(time);
            }
            if !self.draining.is_empty() && self.prober.is_drained(time) {
                for done in self.draining.drain(..) {
                    let _ = done.send(true);
                }
            }
            if is_drained {
                self.wait(time);
            }
        }
    }

    /// Takes what the agent wants; false if it has ended.
    fn take_commands(&mut self, time: Instant) -> bool {
        loop {
            match self.received.try_recv() {
                Ok(Command::Targets(targets)) => {
                    self.device.set_diverted(targets.diverted());
                    self.device.set_own_addresses(targets.own_addresses());
                    if targets.own != self.prober.targets().own {
                        self.retry = None;
                    }
                    self.prober.handle_targets(time, *targets);
                }
                Ok(Command::Drain(done)) => {
                    if self.prober.has_other_leader() {
                        self.prober.handle_drain(time);
                        self.draining.push(done);
                    } else {
                        let _ = done.send(false);
                    }
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Sees how the peers are reached. The echoes of a leader wake the thread often enough.
    fn look_at_ways(&mut self, time: Instant) {
        let lead = self.prober.targets().lead.as_ref();
        let is_measured = lead.is_some_and(|lead| lead.sizes.is_some() && !lead.peers.is_empty());
        if is_measured && time.saturating_duration_since(self.looked) >= WAYS {
            self.looked = time;
            self.prober.handle_ways(time, &self.device.ways());
        }
    }

    /// Binds the socket to the address that the targets name, or closes it.
    fn bind(&mut self, time: Instant) {
        let wanted = self.prober.targets().own;
        if self.socket.as_ref().map(|(address, _)| *address) == wanted {
            return;
        }
        self.socket = None;
        let is_early = self.retry.is_some_and(|retry| retry > time);
        let Some(address) = wanted.filter(|_| !is_early) else {
            return;
        };
        let bound = UdpSocket::bind((address, 0)).and_then(|socket| {
            socket.set_nonblocking(true)?;
            Ok(socket)
        });
        match bound {
            Ok(socket) => {
                self.socket = Some((address, socket));
                self.retry = None;
                if self.logged.take().is_some() {
                    tracing::info!(%address, "echo socket opened again");
                }
            }
            Err(error) => {
                self.retry = Some(time + RETRY);
                self.fail(time, address, &error);
            }
        }
    }

    /// Reads what has come to the socket; false if there may be more.
    fn receive(&mut self, time: Instant) -> bool {
        // One byte more than a message has shows that one is too long.
        let mut buffer = [0; LENGTH + 1];
        for _ in 0..BATCH {
            let Some((address, socket)) = &self.socket else {
                return true;
            };
            match socket.recv_from(&mut buffer) {
                Ok((length, from)) => {
                    self.prober.handle_datagram(time, from, &buffer[..length]);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    let address = *address;
                    self.fail(time, address, &error);
                    self.reopen(time);
                    return true;
                }
            }
        }
        false
    }

    fn transmit(&mut self, time: Instant) {
        while let Some(transmit) = self.prober.poll_transmit() {
            match transmit {
                Transmit::Socket { to, payload } => self.send_to(time, to, &payload),
                // A packet that the link does not take is a lost one.
                Transmit::Link(packet) => {
                    let _ = self.device.write_packet(&packet);
                }
                Transmit::Peer(id, packet) => {
                    self.device.send_packet(&id, &packet);
                }
                Transmit::Padded(id, packet, length) => {
                    self.device.send_padded(&id, &packet, length);
                }
            }
        }
    }

    fn send_to(&mut self, time: Instant, to: SocketAddr, payload: &[u8]) {
        let Some((address, socket)) = &self.socket else {
            return;
        };
        let Err(error) = socket.send_to(payload, to) else {
            return;
        };
        let address = *address;
        self.fail(time, address, &error);
        // What a route or the firewall refuses, another socket cannot send either.
        let is_refused = matches!(
            error.kind(),
            ErrorKind::WouldBlock
                | ErrorKind::Interrupted
                | ErrorKind::HostUnreachable
                | ErrorKind::NetworkUnreachable
                | ErrorKind::PermissionDenied
        );
        if !is_refused {
            self.reopen(time);
        }
    }

    fn reopen(&mut self, time: Instant) {
        self.socket = None;
        self.retry = Some(time + RETRY);
    }

    /// Counts a failure of the socket, and logs the first one of a while.
    fn fail(&mut self, time: Instant, address: IpAddr, error: &io::Error) {
        self.failures += 1;
        let is_recent = |at: Instant| time.saturating_duration_since(at) < QUIET;
        if !self.logged.is_some_and(is_recent) {
            self.logged = Some(time);
            tracing::warn!(%address, %error, "echo socket failed");
        }
    }

    fn show(&mut self, time: Instant) {
        self.shown_at = time;
        let shown = Shown {
            paths: self.prober.stats(),
            failures: self.failures,
        };
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(shown);
    }

    /// Waits until something comes or is due.
    fn wait(&self, time: Instant) {
        let is_bound = self.socket.is_some() || self.prober.targets().own.is_none();
        let retry = self.retry.filter(|_| !is_bound);
        let drain = (!self.draining.is_empty()).then(|| time + DRAINING);
        let due = self
            .prober
            .poll_timeout()
            .into_iter()
            .chain(retry)
            .chain(drain);
        let timeout = due.min().map_or(PollTimeout::NONE, |due| {
            let left = due.saturating_duration_since(now());
            // Rounded up, or the thread would spin for the last millisecond.
            let millis = left.as_micros().div_ceil(1_000);
            let millis = i32::try_from(millis).unwrap_or(i32::MAX);
            PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
        });
        let wake = PollFd::new(self.wake.0.as_fd(), PollFlags::POLLIN);
        // An error ends the wait, and the next look finds out.
        let _ = match &self.socket {
            Some((_, socket)) => poll(
                &mut [wake, PollFd::new(socket.as_fd(), PollFlags::POLLIN)],
                timeout,
            ),
            None => poll(&mut [wake], timeout),
        };
        let _ = self.wake.0.read();
    }
}

#[cfg(test)]
mod tests;
