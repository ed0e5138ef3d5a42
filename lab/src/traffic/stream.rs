//! Streams that go on while a test breaks something: numbered datagrams, and a TCP connection; what each lost,
//! and how long it was silent.

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use super::{ECHO, MAGIC, connect, unbound};
use crate::netns::within_path;

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
