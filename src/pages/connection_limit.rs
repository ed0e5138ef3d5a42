//! The connections of those who look at the pages: few, and none for long.
//!
//! Whoever opens connections and says nothing must not use up the agent's file descriptors, nor keep
//! the kubelet's probes out.

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

/// Connections at once; for one more the oldest goes. Probes, a Prometheus or two and a person.
const AT_ONCE: usize = 32;
/// How long a connection lasts, whatever is done with it. Who wants more connects again.
const LIFETIME: Duration = Duration::from_secs(60);

/// Accepts connections within these bounds.
#[derive(Debug)]
pub(super) struct ConnectionLimit {
    listener: TcpListener,
    /// The open connections, the oldest first; one whose end is dropped here is closed.
    open: VecDeque<oneshot::Sender<()>>,
}

impl ConnectionLimit {
    /// Will accept from `listener`.
    pub(super) fn new(listener: TcpListener) -> Self {
        Self {
            listener,
            open: VecDeque::new(),
        }
    }
}

impl Listener for ConnectionLimit {
    type Io = Visit;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Visit, SocketAddr) {
        let (stream, address) = Listener::accept(&mut self.listener).await;
        self.open.retain(|visit| !visit.is_closed());
        if self.open.len() == AT_ONCE {
            self.open.pop_front();
        }
        let (stay, sent_away) = oneshot::channel();
        self.open.push_back(stay);
        let visit = Visit {
            stream,
            sent_away,
            lifetime: Box::pin(tokio::time::sleep(LIFETIME)),
        };
        (visit, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that ends by itself.
#[derive(Debug)]
pub(super) struct Visit {
    stream: TcpStream,
    sent_away: oneshot::Receiver<()>,
    lifetime: Pin<Box<Sleep>>,
}

impl Visit {
    /// The connection for as long as it lasts.
    fn stream(&mut self, context: &mut Context<'_>) -> io::Result<Pin<&mut TcpStream>> {
        let over = self.lifetime.as_mut().poll(context).is_ready()
            || Pin::new(&mut self.sent_away).poll(context).is_ready();
        if over {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(Pin::new(&mut self.stream))
    }
}

impl AsyncRead for Visit {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.stream(context)?.poll_read(context, buffer)
    }
}

impl AsyncWrite for Visit {
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
