//! Limits the number and the lifetime of HTTP connections.
//!
//! A client that opens idle connections must not exhaust the agent's file descriptors or block the
//! kubelet's probes.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::Sleep;

/// Most open connections; a new one beyond this closes the oldest. Enough for probes, a few Prometheus servers and people.
const MAX_CONNECTIONS: usize = 32;
/// Longest lifetime of a connection, even a busy one. A client can connect again.
const LIFETIME: Duration = Duration::from_secs(60);

/// A listener that enforces these limits.
#[derive(Debug)]
pub(super) struct ConnectionLimit {
    listener: TcpListener,
    /// The open connections, the oldest first; dropping a sender closes its connection.
    open: VecDeque<oneshot::Sender<()>>,
}

impl ConnectionLimit {
    /// Accepts connections from `listener`.
    pub(super) fn new(listener: TcpListener) -> Self {
        Self {
            listener,
            open: VecDeque::new(),
        }
    }
}

impl Listener for ConnectionLimit {
    type Io = LimitedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (LimitedStream, SocketAddr) {
        let (stream, address) = Listener::accept(&mut self.listener).await;
        self.open.retain(|limited| !limited.is_closed());
        if self.open.len() == MAX_CONNECTIONS {
            self.open.pop_front();
        }
        let (keep_open, closed) = oneshot::channel();
        self.open.push_back(keep_open);
        let limited = LimitedStream {
            stream,
            closed,
            lifetime: Box::pin(tokio::time::sleep(LIFETIME)),
        };
        (limited, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection with a limited lifetime.
#[derive(Debug)]
pub(super) struct LimitedStream {
    stream: TcpStream,
    closed: oneshot::Receiver<()>,
    lifetime: Pin<Box<Sleep>>,
}

impl LimitedStream {
    /// The stream, or an error once the connection has ended.
    fn stream(&mut self, context: &mut Context<'_>) -> io::Result<Pin<&mut TcpStream>> {
        let over = self.lifetime.as_mut().poll(context).is_ready()
            || Pin::new(&mut self.closed).poll(context).is_ready();
        if over {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(Pin::new(&mut self.stream))
    }
}

impl AsyncRead for LimitedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.stream(context)?.poll_read(context, buffer)
    }
}

impl AsyncWrite for LimitedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.stream(context)?.poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream(context)?.poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
