//! Traffic between the places of a lab: small servers in every place, and clients that ask them which
//! they see, move megabytes and compare every byte, or count what is lost while something happens.

use std::collections::BTreeSet;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::runtime::{Builder, Runtime};

use crate::netns::within_path;

mod bulk;
pub mod flows;
mod stream;

pub use bulk::{Bulk, Moved};
pub use stream::{Conversation, Missing, Report, Stream};

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
    use std::thread::sleep;

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
    fn a_server_returns_the_callers_address_and_what_it_got() {
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
    fn a_conversation_survives_an_outage_and_reports_its_length() {
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
