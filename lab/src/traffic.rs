//! Traffic between the places of a lab: small servers in every place, and clients that ask them which
//! they see, move megabytes and compare every byte, or count what is lost while something happens.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::runtime::{Builder, Runtime};

use crate::netns::within_path;

/// The port of the servers, TCP and UDP.
pub const PORT: u16 = 7007;
/// The kubelet's port, where hosts serve the same.
pub const KUBELET_PORT: u16 = 10250;

/// Occurs in every packet that carries payload of these servers, so that a capture can find it.
pub const MAGIC: &[u8; 24] = b"selvedge-clear-text-magi";

/// How long a connection attempt may take before it counts as failed.
const CONNECT: Duration = Duration::from_secs(3);
/// How long a transfer may make no progress; TCP's first retransmissions fit well inside.
const STALL: Duration = Duration::from_secs(10);

/// One end of traffic: a pod or a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// What to call it: `node-agent-01` or `pod@node-agent-01`.
    pub name: String,
    /// The node it is on.
    pub node: String,
    /// Whether it is the node's pod, and not the node itself.
    pub pod: bool,
    /// Its address.
    pub address: IpAddr,
    /// The file of its network namespace.
    pub namespace: PathBuf,
}

/// Servers in a set of places, stopped when the value is dropped.
#[derive(Debug)]
pub struct Servers {
    // Dropping it ends all tasks.
    _runtime: Runtime,
}

impl Servers {
    /// Starts the servers in all places. A place may be given several times, with an address of each
    /// family.
    ///
    /// # Errors
    ///
    /// When a port is taken.
    pub fn start(places: &[Place]) -> anyhow::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("lab-servers")
            .enable_all()
            .build()?;
        let _entered = runtime.enter();
        let mut listening = BTreeSet::new();
        for place in places {
            let kubelet = (!place.pod).then_some(KUBELET_PORT);
            let first = listening.insert(&place.namespace);
            let ports = [PORT].into_iter().chain(kubelet).filter(|_| first);
            for port in ports {
                let listener = within_path(&place.namespace, || listen(port))?
                    .with_context(|| format!("port {port} in {}", place.name))?;
                listener.set_nonblocking(true)?;
                runtime.spawn(accept(tokio::net::TcpListener::from_std(listener)?));
            }
            let bind = || UdpSocket::bind((place.address, PORT));
            let socket = within_path(&place.namespace, bind)??;
            socket.set_nonblocking(true)?;
            runtime.spawn(echo(tokio::net::UdpSocket::from_std(socket)?));
        }
        drop(_entered);
        Ok(Self { _runtime: runtime })
    }
}

/// Asks a server whom it sees calling.
///
/// # Errors
///
/// When it does not answer within a few seconds.
pub fn source_seen(from: &Path, to: SocketAddr) -> anyhow::Result<IpAddr> {
    let mut stream = connect(from, to)?;
    stream.write_all(&0_u64.to_be_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.parse()?)
}

/// Sends `bytes` to a server, which checks them, and receives as many, which are checked here.
///
/// Returns how long both together took.
///
/// # Errors
///
/// When a byte differs, or when nothing moves for ten seconds.
pub fn transfer(from: &Path, to: SocketAddr, bytes: u64) -> anyhow::Result<Duration> {
    ensure!(
        bytes > 0,
        "a transfer of nothing is the question `source_seen`"
    );
    let start = Instant::now();
    let mut stream = connect(from, to)?;
    stream.write_all(&bytes.to_be_bytes())?;
    let mut source = Pattern::default();
    let mut left = bytes;
    while left > 0 {
        let chunk = source.next(left);
        stream.write_all(chunk).context("sending")?;
        left -= chunk.len() as u64;
    }
    let mut verdict = [0];
    stream
        .read_exact(&mut verdict)
        .context("waiting for the verdict on what was sent")?;
    ensure!(verdict == [1], "what arrived differs from what was sent");
    let mut source = Pattern::default();
    let mut left = bytes;
    let mut buffer = vec![0; Pattern::LENGTH];
    while left > 0 {
        let wanted = source.next(left);
        let received = &mut buffer[..wanted.len()];
        stream.read_exact(received).context("receiving")?;
        ensure!(
            received == wanted,
            "what arrived differs from what was sent"
        );
        left -= wanted.len() as u64;
    }
    Ok(start.elapsed())
}

/// Sends one datagram that carries the magic bytes, without waiting for an answer.
///
/// # Errors
///
/// When this host already refuses to send it.
pub fn shout(from: &Path, to: SocketAddr) -> anyhow::Result<()> {
    within_path(from, || unbound(to)?.send_to(&MAGIC.repeat(4), to))??;
    Ok(())
}

/// What happened to a steady stream of datagrams.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// How many were sent.
    pub sent: u32,
    /// How many came back.
    pub answered: u32,
    /// The longest time between two answers.
    pub silence: Duration,
    /// Which ones did not come back.
    pub missing: Vec<Missing>,
}

/// Datagrams in a row that did not come back.
#[derive(Clone, Debug)]
pub struct Missing {
    /// Their numbers, from 0.
    pub numbers: RangeInclusive<u32>,
    /// When the first of them was sent, since the beginning.
    pub at: Duration,
    /// How many of them this host's kernel refused to send.
    pub refused: u32,
}

impl Report {
    /// How many did not come back.
    #[must_use]
    pub fn lost(&self) -> u32 {
        self.sent - self.answered
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A reader needs to know how it began, not two thousand numbers.
        const SHOWN: usize = 5;
        let Self { sent, silence, .. } = self;
        let lost = self.lost();
        write!(f, "{lost} of {sent} lost")?;
        for (n, missing) in self.missing.iter().take(SHOWN).enumerate() {
            write!(f, "{}{missing}", if n == 0 { " (" } else { ", " })?;
        }
        match self.missing.len() {
            0 => {}
            1..=SHOWN => write!(f, ")")?,
            more => write!(f, ", and {} times more)", more - SHOWN)?,
        }
        write!(f, ", longest silence {silence:.0?}")
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = (self.numbers.start(), self.numbers.end());
        write!(f, "no. {first}")?;
        if first != last {
            write!(f, " to {last}")?;
        }
        write!(f, " after {:.0?}", self.at)?;
        if self.refused > 0 {
            write!(f, ", {} refused by the kernel", self.refused)?;
        }
        Ok(())
    }
}

/// A steady stream of datagrams, each of which the other end sends back.
#[derive(Debug)]
pub struct Stream {
    stop: Arc<AtomicBool>,
    worker: JoinHandle<io::Result<Report>>,
}

impl Stream {
    /// A datagram each ten milliseconds: fine enough to see an outage of one.
    const INTERVAL: Duration = Duration::from_millis(10);

    /// Starts sending.
    ///
    /// # Errors
    ///
    /// When no socket can be made there.
    pub fn start(from: &Path, to: SocketAddr) -> anyhow::Result<Self> {
        let socket = within_path(from, || unbound(to))??;
        socket.connect(to)?;
        Self::go_on(socket)
    }

    /// Starts sending where a server has just answered: for claims about what a change does to traffic
    /// that flows, not about how traffic begins.
    ///
    /// # Errors
    ///
    /// When no socket can be made there, or no answer comes within ten seconds.
    pub fn start_warm(from: &Path, to: SocketAddr) -> anyhow::Result<Self> {
        const PATIENCE: Duration = Duration::from_secs(10);
        let socket = within_path(from, || unbound(to))??;
        socket.connect(to)?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        // A number that the stream never comes to.
        let mut payload = [0xff; 28];
        payload[4..].copy_from_slice(MAGIC);
        let begun = Instant::now();
        let mut buffer = [0; 64];
        loop {
            let _ = socket.send(&payload);
            match socket.recv(&mut buffer) {
                Ok(_) => return Self::go_on(socket),
                Err(error) => ensure!(
                    begun.elapsed() < PATIENCE,
                    "{to} does not answer, so that nothing can be said of a change: {error}"
                ),
            }
        }
    }

    fn go_on(socket: UdpSocket) -> anyhow::Result<Self> {
        socket.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let worker = std::thread::Builder::new()
            .name("lab-stream".to_owned())
            .spawn(move || run_stream(&socket, &stopped))?;
        Ok(Self { stop, worker })
    }

    /// Stops sending, waits half a second for what is under way, and reports what happened.
    ///
    /// # Errors
    ///
    /// When the stream could not go on, for example because its pod vanished.
    pub fn stop(self) -> anyhow::Result<Report> {
        self.stop.store(true, Ordering::Relaxed);
        let report = self
            .worker
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok(report?)
    }
}

/// One datagram of a stream.
struct Sent {
    /// Since the beginning.
    at: Duration,
    refused: bool,
    answered: bool,
}

fn run_stream(socket: &UdpSocket, stop: &AtomicBool) -> io::Result<Report> {
    const FAREWELL: Duration = Duration::from_millis(500);
    let mut sent: Vec<Sent> = Vec::new();
    let begun = Instant::now();
    let mut silence = Duration::ZERO;
    let mut last = begun;
    let mut next = begun;
    let mut end = None;
    let mut buffer = [0; 64];
    loop {
        let now = Instant::now();
        if end.is_none() && stop.load(Ordering::Relaxed) {
            end = Some(now + FAREWELL);
        }
        match end {
            Some(end) if now >= end => return Ok(Report::of(&sent, silence)),
            None if now >= next => {
                let mut payload = [0; 28];
                let number = u32::try_from(sent.len()).map_err(io::Error::other)?;
                payload[..4].copy_from_slice(&number.to_be_bytes());
                payload[4..].copy_from_slice(MAGIC);
                next += Stream::INTERVAL;
                sent.push(Sent {
                    at: now - begun,
                    // "No route" and "refused" are outages to be measured, not reasons to stop.
                    refused: socket.send(&payload).is_err(),
                    answered: false,
                });
            }
            Some(_) | None => {}
        }
        while let Ok(length) = socket.recv(&mut buffer) {
            let Some(number) = buffer[..length].first_chunk() else {
                continue;
            };
            let number = u32::from_be_bytes(*number) as usize;
            if let Some(one) = sent.get_mut(number)
                && !std::mem::replace(&mut one.answered, true)
            {
                let now = Instant::now();
                silence = silence.max(now - last);
                last = now;
            }
        }
        if end.is_none() {
            silence = silence.max(last.elapsed());
        }
        sleep(Duration::from_millis(1));
    }
}

impl Report {
    fn of(sent: &[Sent], silence: Duration) -> Self {
        let mut report = Self {
            silence,
            ..Self::default()
        };
        let mut before = true;
        for (number, one) in (0..).zip(sent) {
            report.sent += 1;
            report.answered += u32::from(one.answered);
            if !one.answered {
                let refused = u32::from(one.refused);
                match report.missing.last_mut().filter(|_| !before) {
                    Some(missing) => {
                        missing.numbers = *missing.numbers.start()..=number;
                        missing.refused += refused;
                    }
                    None => report.missing.push(Missing {
                        numbers: number..=number,
                        at: one.at,
                        refused,
                    }),
                }
            }
            before = one.answered;
        }
        report
    }
}

/// A connection that is kept, with a line and its echo every so often.
#[derive(Debug)]
pub struct Conversation {
    stop: Arc<AtomicBool>,
    worker: JoinHandle<anyhow::Result<Report>>,
}

impl Conversation {
    /// Often enough to see an outage, seldom enough to be idle in between.
    const INTERVAL: Duration = Duration::from_millis(50);
    /// How long an echo may take: an outage is measured, an end of the connection is an error.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Connects, and starts talking.
    ///
    /// # Errors
    ///
    /// When the server does not answer.
    pub fn start(from: &Path, to: SocketAddr) -> anyhow::Result<Self> {
        let stream = connect(from, to)?;
        stream.set_read_timeout(Some(Self::PATIENCE))?;
        stream.set_nodelay(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let worker = std::thread::Builder::new()
            .name("lab-conversation".to_owned())
            .spawn(move || converse(stream, &stopped))?;
        Ok(Self { stop, worker })
    }

    /// Ends it and reports what happened; nothing is ever lost on a connection that holds.
    ///
    /// # Errors
    ///
    /// When the connection broke, or an echo was not what had been said.
    pub fn stop(self) -> anyhow::Result<Report> {
        self.stop.store(true, Ordering::Relaxed);
        self.worker
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

fn converse(mut stream: TcpStream, stop: &AtomicBool) -> anyhow::Result<Report> {
    stream.write_all(&ECHO.to_be_bytes())?;
    let mut report = Report::default();
    while !stop.load(Ordering::Relaxed) {
        let mut said = [0; 28];
        said[..4].copy_from_slice(&report.sent.to_be_bytes());
        said[4..].copy_from_slice(MAGIC);
        let start = Instant::now();
        report.sent += 1;
        let mut echo = [0; 28];
        let outcome = stream
            .write_all(&said)
            .and_then(|()| stream.read_exact(&mut echo));
        outcome.with_context(|| format!("the connection broke: {report}"))?;
        ensure!(echo == said, "the echo differs from what was said");
        report.answered += 1;
        report.silence = report.silence.max(start.elapsed());
        sleep(Conversation::INTERVAL);
    }
    Ok(report)
}

fn connect(from: &Path, to: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = within_path(from, || TcpStream::connect_timeout(&to, CONNECT))?
        .with_context(|| format!("connecting to {to}"))?;
    stream.set_read_timeout(Some(STALL))?;
    stream.set_write_timeout(Some(STALL))?;
    Ok(stream)
}

/// Listens for both families, or for IPv4 where there is no other.
fn listen(port: u16) -> io::Result<TcpListener> {
    let both = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port));
    if both
        .as_ref()
        .is_err_and(|error| error.kind() != io::ErrorKind::AddrInUse)
    {
        return TcpListener::bind((Ipv4Addr::UNSPECIFIED, port));
    }
    both
}

/// A datagram socket that can send to an address.
fn unbound(to: SocketAddr) -> io::Result<UdpSocket> {
    match to {
        SocketAddr::V4(_) => UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)),
    }
}

async fn accept(listener: tokio::net::TcpListener) {
    while let Ok((stream, peer)) = listener.accept().await {
        tokio::spawn(async move {
            // The client notices what went wrong.
            let _ = serve(stream, peer.ip().to_canonical()).await;
        });
    }
}

/// Instead of a length: whatever follows comes back at once.
const ECHO: u64 = u64::MAX;

/// The protocol: eight bytes of length. Zero asks for the caller's address, [`ECHO`] for an echo; else that much
/// payload follows, is answered by a verdict of one byte, and is returned.
async fn serve(mut stream: tokio::net::TcpStream, peer: IpAddr) -> io::Result<()> {
    let bytes = stream.read_u64().await?;
    if bytes == 0 {
        stream.write_all(peer.to_string().as_bytes()).await?;
        return stream.shutdown().await;
    }
    if bytes == ECHO {
        let (mut said, mut echo) = stream.split();
        tokio::io::copy(&mut said, &mut echo).await?;
        return Ok(());
    }
    let mut source = Pattern::default();
    let mut buffer = vec![0; Pattern::LENGTH];
    let mut left = bytes;
    let mut intact = true;
    while left > 0 {
        let wanted = source.next(left);
        let received = &mut buffer[..wanted.len()];
        stream.read_exact(received).await?;
        intact &= received == wanted;
        left -= wanted.len() as u64;
    }
    stream.write_u8(u8::from(intact)).await?;
    let mut source = Pattern::default();
    let mut left = bytes;
    while left > 0 {
        let chunk = source.next(left);
        stream.write_all(chunk).await?;
        left -= chunk.len() as u64;
    }
    stream.shutdown().await
}

async fn echo(socket: tokio::net::UdpSocket) {
    let mut buffer = [0; 2048];
    loop {
        // An ICMP error for an answer that could not be delivered ends up here: not our business.
        if let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
            let _ = socket.send_to(&buffer[..length], peer).await;
        }
    }
}

/// Payload whose every stretch of 96 bytes contains the magic, and whose position shows: what is
/// lost, doubled or swapped by whole packets does not compare equal.
#[derive(Clone, Debug)]
struct Pattern {
    block: Vec<u8>,
    turn: u64,
}

impl Pattern {
    /// A multiple of neither a packet nor a page.
    const LENGTH: usize = 48 * 1361;

    fn next(&mut self, at_most: u64) -> &[u8] {
        // The number of the block goes to its front; the rest is the same each time.
        self.block[..8].copy_from_slice(&self.turn.to_be_bytes());
        self.turn += 1;
        let length = usize::try_from(at_most).unwrap_or(usize::MAX);
        &self.block[..length.min(Self::LENGTH)]
    }
}

impl Default for Pattern {
    fn default() -> Self {
        let mut block = Vec::with_capacity(Self::LENGTH);
        let mut number = 0_u64;
        while block.len() < Self::LENGTH {
            // A cheap mix, so that no two stretches are alike.
            let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            block.extend_from_slice(&mixed.to_be_bytes());
            block.extend_from_slice(&mixed.rotate_left(23).to_be_bytes());
            block.extend_from_slice(&number.to_be_bytes());
            block.extend_from_slice(MAGIC);
            number += 1;
        }
        Self { block, turn: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netns::Namespace;

    fn place(namespace: &Namespace) -> Place {
        Place {
            name: "here".to_owned(),
            node: "here".to_owned(),
            pod: true,
            address: Ipv4Addr::LOCALHOST.into(),
            namespace: namespace.path(),
        }
    }

    #[test]
    fn a_server_tells_who_called_and_returns_what_it_got() {
        let namespace = Namespace::new("serve").unwrap();
        let place = place(&namespace);
        let _servers = Servers::start(std::slice::from_ref(&place)).unwrap();
        let server = SocketAddr::from((place.address, PORT));

        assert_eq!(
            source_seen(&place.namespace, server).unwrap(),
            Ipv4Addr::LOCALHOST
        );
        transfer(&place.namespace, server, 10_000_000).unwrap();
    }

    #[test]
    fn a_conversation_lives_through_an_outage_and_tells_how_long_it_was() {
        let namespace = Namespace::new("talk").unwrap();
        let place = place(&namespace);
        let servers = Servers::start(std::slice::from_ref(&place)).unwrap();
        let server = SocketAddr::from((place.address, PORT));

        let conversation = Conversation::start(&place.namespace, server).unwrap();
        sleep(Duration::from_millis(200));
        namespace.run("ip link set lo down").unwrap();
        sleep(Duration::from_millis(500));
        namespace.run("ip link set lo up").unwrap();
        sleep(Duration::from_secs(1));
        let report = conversation.stop().unwrap();
        assert!(report.silence > Duration::from_millis(300), "{report}");

        // Control: the end of the other side is an end.
        let conversation = Conversation::start(&place.namespace, server).unwrap();
        sleep(Duration::from_millis(100));
        drop(servers);
        sleep(Duration::from_millis(300));
        assert!(conversation.stop().is_err());
    }

    #[test]
    fn a_stream_counts_what_is_lost_while_the_link_is_down() {
        let namespace = Namespace::new("stream").unwrap();
        let place = place(&namespace);
        let _servers = Servers::start(std::slice::from_ref(&place)).unwrap();
        let server = SocketAddr::from((place.address, PORT));

        let undisturbed = Stream::start_warm(&place.namespace, server).unwrap();
        sleep(Duration::from_millis(300));
        let undisturbed = undisturbed.stop().unwrap();
        let disturbed = Stream::start(&place.namespace, server).unwrap();
        sleep(Duration::from_millis(200));
        namespace.run("ip link set lo down").unwrap();
        sleep(Duration::from_millis(500));
        namespace.run("ip link set lo up").unwrap();
        sleep(Duration::from_millis(200));
        let disturbed = disturbed.stop().unwrap();

        assert_eq!(undisturbed.lost(), 0, "{undisturbed}");
        assert!(undisturbed.missing.is_empty(), "{undisturbed}");
        assert!(disturbed.lost() > 20, "{disturbed}");
        let missing = disturbed.missing.iter();
        let missing: u32 = missing.map(|row| row.numbers.clone().count() as u32).sum();
        assert_eq!(missing, disturbed.lost(), "{disturbed}");
        let first = &disturbed.missing[0];
        assert!(*first.numbers.start() >= 10, "{disturbed}");
        assert!(first.at >= Duration::from_millis(100), "{disturbed}");
        assert!(
            disturbed.silence > Duration::from_millis(450),
            "{disturbed}"
        );
    }
}
