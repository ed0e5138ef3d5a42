//! TCP and UDP through a tunnel, with every byte checked.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use selvedge_lab::netns::Namespace;

use crate::pair::{LEFT4, LEFT6, Pair, RIGHT4, RIGHT6};
use crate::tunnel::SOON;

/// The bytes 0 to 250, repeated: 251 is prime, so a missing, duplicated or misplaced segment is detected.
fn pattern(length: usize) -> Vec<u8> {
    (0..251).cycle().take(length).collect()
}

/// The number of last datagrams that may still be delayed when all are sent.
const FEW: u32 = 10;

/// How long to wait for datagrams that should not arrive.
const SHORT: Duration = Duration::from_millis(500);

/// The time limit of a transfer that takes a second on an idle host.
const LONG: Duration = Duration::from_secs(180);

/// Sends this number of bytes over TCP from one namespace to an address in another and checks them.
pub(crate) fn tcp(from: &Namespace, to: &Namespace, address: &str, bytes: usize) -> Result<()> {
    tcp_within(LONG, from, to, address, bytes)
}

/// The same within a time.
pub(crate) fn tcp_within(
    limit: Duration,
    from: &Namespace,
    to: &Namespace,
    address: &str,
    bytes: usize,
) -> Result<()> {
    let address: IpAddr = address.parse()?;
    let listener = to.within(|| TcpListener::bind((address, 0)))?;
    let target = listener.local_addr()?;
    thread::scope(|scope| {
        let receiver = scope.spawn(move || receive(&listener, bytes, limit));
        let sent = from.within(|| send(target, bytes, limit));
        // The sender's error comes first: the receiver's is its consequence.
        sent.context("sending over TCP")?;
        receiver
            .join()
            .map_err(|_| anyhow::anyhow!("the receiver panicked"))?
            .context("receiving over TCP")
    })
}

fn send(target: SocketAddr, bytes: usize, limit: Duration) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&target, limit)?;
    stream.set_write_timeout(Some(limit))?;
    let block = pattern(251 * 256);
    let mut left = bytes;
    let since = Instant::now();
    while left > 0 {
        ensure!(
            since.elapsed() < limit,
            "{left} bytes of {bytes} are unsent after {limit:?}"
        );
        let piece = &block[..left.min(block.len())];
        stream.write_all(piece)?;
        left -= piece.len();
    }
    Ok(())
}

fn receive(listener: &TcpListener, bytes: usize, limit: Duration) -> Result<()> {
    listener.set_nonblocking(true)?;
    let since = Instant::now();
    let mut stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock && since.elapsed() < limit => {
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error).context("no connection"),
        }
    };
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(limit))?;
    let mut buffer = vec![0; 1 << 16];
    let expected = pattern(251 + buffer.len());
    let mut got = 0;
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            break;
        }
        ensure!(
            buffer[..length] == expected[got % 251..][..length],
            "wrong bytes after {got}"
        );
        got += length;
    }
    ensure!(got == bytes, "{got} of {bytes} bytes arrived");
    Ok(())
}

/// Sends datagrams of these sizes, each after the arrival of the one before, and checks them. A lost one is an
/// error.
pub(crate) fn udp(
    from: &Namespace,
    to: &Namespace,
    address: &str,
    sizes: impl IntoIterator<Item = usize>,
) -> Result<()> {
    let address: IpAddr = address.parse()?;
    let receiver = to.within(|| UdpSocket::bind((address, 0)))?;
    receiver.set_read_timeout(Some(Duration::from_secs(2)))?;
    let sender = from.within(|| {
        let any = if address.is_ipv4() {
            "0.0.0.0:0"
        } else {
            "[::]:0"
        };
        UdpSocket::bind(any)
    })?;
    sender.connect(receiver.local_addr()?)?;
    let mut buffer = vec![0; 1 << 16];
    let mut previous = None;
    for (index, size) in sizes.into_iter().enumerate() {
        let datagram = pattern(size);
        // A busy host may lose one, but not the same one three times.
        let mut tries = 0..3;
        let length = loop {
            sender.send(&datagram)?;
            match receiver.recv(&mut buffer) {
                Err(_) if tries.next().is_some() => {}
                // It was late, and has been sent again meanwhile.
                Ok(length) if previous == Some(length) && length != size => {}
                received => {
                    let context = || format!("datagram {index} of {size} bytes");
                    break received.with_context(context)?;
                }
            }
        };
        ensure!(buffer[..length] == datagram, "datagram {index} is altered");
        previous = Some(size);
    }
    Ok(())
}

/// Sends this number of numbered datagrams. Each except the last few must arrive once, in any order.
pub(crate) fn numbered(from: &Namespace, to: &Namespace, address: &str, count: u32) -> Result<()> {
    let address: IpAddr = address.parse()?;
    let receiver = to.within(|| UdpSocket::bind((address, 0)))?;
    let sender = from.within(|| UdpSocket::bind("0.0.0.0:0"))?;
    sender.connect(receiver.local_addr()?)?;
    for number in 0..count + FEW {
        sender.send(&number.to_be_bytes())?;
        // Slowly enough for the network between.
        thread::sleep(Duration::from_millis(2));
    }
    let mut arrived = vec![0; (count + FEW) as usize];
    let due = |arrived: &[u32]| arrived[..count as usize].contains(&0);
    let mut buffer = [0; 4];
    loop {
        // Copies of the last ones may still be under way.
        let patience = if due(&arrived) { SOON } else { SHORT };
        receiver.set_read_timeout(Some(patience))?;
        match receiver.recv(&mut buffer) {
            Ok(4) => arrived[u32::from_be_bytes(buffer) as usize] += 1,
            Ok(length) => anyhow::bail!("a datagram of {length} bytes"),
            // A wait with a time-out is not resumed after a signal (signal(7)).
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    ensure!(!due(&arrived), "some did not arrive: {arrived:?}");
    ensure!(
        arrived.iter().all(|times| *times <= 1),
        "some arrived more than once: {arrived:?}"
    );
    Ok(())
}

/// Pings, TCP each way and in parallel, UDP of many sizes, over IPv4 and IPv6.
pub(crate) fn everything(pair: &Pair) -> Result<()> {
    let (left, right) = (&pair.left, &pair.right);
    for (from, to) in [
        (left, RIGHT4),
        (right, LEFT4),
        (left, RIGHT6),
        (right, LEFT6),
    ] {
        from.space
            .run(&format!("ping -q -n -c 10 -i 0.01 -W 10 {to}"))?;
    }
    for (from, to, address) in [
        (left, right, RIGHT4),
        (right, left, LEFT4),
        (left, right, RIGHT6),
        (right, left, LEFT6),
    ] {
        tcp(&from.space, &to.space, address, 8 << 20).with_context(|| format!("to {address}"))?;
        let sizes = (0..1392).step_by(29).chain([1392]);
        udp(&from.space, &to.space, address, sizes).with_context(|| format!("to {address}"))?;
    }
    Ok(())
}

/// This number of TCP connections at the same time.
pub(crate) fn parallel(pair: &Pair, streams: usize, bytes: usize) -> Result<()> {
    let (from, to) = (&pair.left.space, &pair.right.space);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..streams)
            .map(|_| scope.spawn(|| tcp(from, to, RIGHT4, bytes)))
            .collect();
        threads.into_iter().try_for_each(|thread| {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a stream's thread panicked"))?
        })
    })
}
