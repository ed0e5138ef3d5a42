//! How fast one TCP connection is, from a pod to a pod.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use selvedge_lab::Lab;
use selvedge_lab::netns::within_path;

const PORT: u16 = 7200;
/// How long nothing is counted, while the window grows, and how long it is counted then.
const WARMING: Duration = Duration::from_secs(1);
const COUNTING: Duration = Duration::from_secs(3);
const BUFFER: usize = 256 << 10;

/// Mbit/s of payload.
pub(super) fn measure(lab: &Lab, from: &str, to: &str) -> anyhow::Result<f64> {
    let (from, to) = (lab.pod(from)?, lab.pod(to)?);
    let address = SocketAddr::from((to.address(), PORT));
    let listener = within_path(&to.namespace().path(), || TcpListener::bind(address))??;
    let connect = || TcpStream::connect_timeout(&address, Duration::from_secs(5));
    let mut source = within_path(&from.namespace().path(), connect)?
        .with_context(|| format!("connecting to {address}"))?;
    let (mut sink, _) = listener.accept()?;
    sink.set_read_timeout(Some(Duration::from_secs(10)))?;
    let (received, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    scope(|scope| {
        scope.spawn(|| {
            let bytes = vec![0; BUFFER];
            while !stop.load(Ordering::Relaxed) {
                if source.write_all(&bytes).is_err() {
                    break;
                }
            }
            // The end of the stream, for the other side.
            let _ = source.shutdown(std::net::Shutdown::Both);
        });
        scope.spawn(|| {
            let mut bytes = vec![0; BUFFER];
            while let Ok(count @ 1..) = sink.read(&mut bytes) {
                received.fetch_add(count as u64, Ordering::Relaxed);
            }
        });
        sleep(WARMING);
        let (before, begun) = (received.load(Ordering::Relaxed), Instant::now());
        sleep(COUNTING);
        let counted = received.load(Ordering::Relaxed) - before;
        let rate = counted as f64 * 8.0 / begun.elapsed().as_secs_f64() / 1e6;
        stop.store(true, Ordering::Relaxed);
        Ok(rate)
    })
}
