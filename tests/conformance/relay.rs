//! A network between the two ends that a test can record and interfere with.
//!
//! Each end has one of the relay's two sockets as the endpoint of its peer. The relay runs in the namespace of the
//! daemons' sockets and keeps a copy of every datagram.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::pair::{LEFT_PORT, Pair, RIGHT_PORT};

/// The ports of the relay in place of the right end and of the left one.
const AS_RIGHT: u16 = 1002;
const AS_LEFT: u16 = 1001;

/// The direction of a datagram.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Way {
    Right,
    Left,
}

/// A datagram that the relay received.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) way: Way,
    pub(crate) bytes: Vec<u8>,
}

impl Seen {
    /// Whether it is a data message with a packet, and so no keepalive.
    pub(crate) fn is_data(&self) -> bool {
        self.bytes.first() == Some(&4) && self.bytes.len() > 32
    }
}

/// A running relay. Dropping it ends it.
pub(crate) struct Relay {
    seen: Arc<Mutex<Vec<Seen>>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Relay {
    /// Puts a relay between the ends of a pair. For each datagram, the relay forwards what `pass` returns, in
    /// this order.
    pub(crate) fn between<P>(pair: &Pair, pass: P) -> Result<Self>
    where
        P: FnMut(Way, &[u8]) -> Vec<Vec<u8>> + Send + 'static,
    {
        let bind = |port| {
            pair.under
                .within(|| UdpSocket::bind((Ipv4Addr::LOCALHOST, port)))
        };
        let (as_right, as_left) = (Arc::new(bind(AS_RIGHT)?), Arc::new(bind(AS_LEFT)?));
        let seen = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        let pass = Arc::new(Mutex::new(pass));
        let mut threads = Vec::new();
        for (way, from, to, port) in [
            (Way::Right, &as_right, &as_left, RIGHT_PORT),
            (Way::Left, &as_left, &as_right, LEFT_PORT),
        ] {
            from.set_read_timeout(Some(Duration::from_millis(50)))?;
            let (from, to, stop) = (Arc::clone(from), Arc::clone(to), Arc::clone(&stop));
            let (seen, pass) = (Arc::clone(&seen), Arc::clone(&pass));
            let target = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            threads.push(thread::spawn(move || {
                carry(way, &from, &to, target, &stop, &seen, &pass);
            }));
        }
        pair.left
            .endpoint(&pair.right, &format!("127.0.0.1:{AS_RIGHT}"))?;
        pair.right
            .endpoint(&pair.left, &format!("127.0.0.1:{AS_LEFT}"))?;
        Ok(Self {
            seen,
            stop,
            threads,
        })
    }

    /// A relay that only records.
    pub(crate) fn listening(pair: &Pair) -> Result<Self> {
        Self::between(pair, |_, bytes| vec![bytes.to_vec()])
    }

    /// The datagrams so far.
    pub(crate) fn seen(&self) -> Result<Vec<Seen>> {
        let seen = self.seen.lock().ok().context("the relay panicked")?;
        Ok(seen.clone())
    }
}

fn carry<P: FnMut(Way, &[u8]) -> Vec<Vec<u8>>>(
    way: Way,
    from: &UdpSocket,
    to: &UdpSocket,
    target: SocketAddr,
    stop: &AtomicBool,
    seen: &Mutex<Vec<Seen>>,
    pass: &Mutex<P>,
) {
    let mut buffer = vec![0; 1 << 16];
    while !stop.load(Ordering::Relaxed) {
        // Timeouts, and errors from a peer without a socket.
        let Ok(length) = from.recv(&mut buffer) else {
            continue;
        };
        let bytes = &buffer[..length];
        if let Ok(mut seen) = seen.lock() {
            seen.push(Seen {
                way,
                bytes: bytes.to_vec(),
            });
        }
        let Ok(mut pass) = pass.lock() else {
            return;
        };
        for datagram in pass(way, bytes) {
            // Lost, as on any network.
            let _ = to.send_to(&datagram, target);
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
