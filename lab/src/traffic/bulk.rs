//! As much as a TCP connection carries, while a test changes the path: how much that is, and how long it stalls.

use std::fmt;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::{ECHO, Pattern, connect};

/// How long nothing may come back before the connection counts as dead.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection whose server sends everything back.
#[derive(Debug)]
pub struct Bulk {
    stop: Arc<AtomicBool>,
    writer: JoinHandle<()>,
    reader: JoinHandle<anyhow::Result<Moved>>,
}

/// What came back.
#[derive(Clone, Copy, Debug, Default)]
pub struct Moved {
    /// How many bytes.
    pub bytes: u64,
    /// The longest time in which none did.
    pub stall: Duration,
    /// How long it went on.
    pub time: Duration,
}

impl fmt::Display for Moved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bytes, stall, time } = self;
        let megabytes = bytes / 1_000_000;
        write!(f, "{megabytes} MB in {time:.1?}, longest stall {stall:.2?}")
    }
}

impl Bulk {
    /// Connects and begins.
    ///
    /// # Errors
    ///
    /// When the server does not answer.
    pub fn start(from: &Path, to: SocketAddr) -> anyhow::Result<Self> {
        let mut source = connect(from, to)?;
        source.write_all(&ECHO.to_be_bytes())?;
        source.set_write_timeout(Some(PATIENCE))?;
        let mut sink = source.try_clone()?;
        sink.set_read_timeout(Some(PATIENCE))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let writer = std::thread::spawn(move || {
            let mut pattern = Pattern::default();
            while !stopped.load(Ordering::Relaxed) {
                if source.write_all(pattern.next(u64::MAX)).is_err() {
                    break;
                }
            }
            // The reader notices what went wrong.
            let _ = source.shutdown(Shutdown::Write);
        });
        let reader = std::thread::spawn(move || {
            let begun = Instant::now();
            let mut moved = Moved::default();
            let mut last = begun;
            let mut buffer = vec![0; 1 << 16];
            loop {
                let count = match sink.read(&mut buffer) {
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    count => count.with_context(|| format!("after {moved}"))?,
                };
                moved.stall = moved.stall.max(last.elapsed());
                last = Instant::now();
                moved.time = begun.elapsed();
                if count == 0 {
                    return Ok(moved);
                }
                moved.bytes += count as u64;
            }
        });
        Ok(Self {
            stop,
            writer,
            reader,
        })
    }

    /// Ends it, after all that was sent has come back.
    ///
    /// # Errors
    ///
    /// When the connection broke, or nothing came back for half a minute.
    pub fn stop(self) -> anyhow::Result<Moved> {
        self.stop.store(true, Ordering::Relaxed);
        let moved = self.reader.join();
        let moved = moved.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // Ends with the connection.
        let _ = self.writer.join();
        moved
    }
}
