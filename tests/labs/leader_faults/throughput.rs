//! What two leaders of each region carry, beside one.
//!
//! All nodes share the machine's processors, so two leaders cannot be twice as fast here.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread::scope;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use selvedge_lab::traffic::{PORT, Servers, transfer};

use super::field::Field;
use super::{FACTOR, FAR_MEMBER, LEADER, MASTER, MEMBER, PUBLIC, SECOND};

/// The bytes of each connection, each way.
const BYTES: u64 = 4_000_000;
/// The best of so many runs counts: the machine does other things too.
const RUNS: usize = 3;

/// Pods of one region send to pods of the other by TCP, nine connections at once. With two leaders it should be as fast as
/// with one.
pub(super) fn compared(field: &mut Field) -> anyhow::Result<String> {
    let mut speeds = Vec::new();
    for per_region in [2, 1] {
        field.lead_by(per_region)?;
        let servers = Servers::start(&field.lab.places())?;
        let runs = (0..RUNS).map(|_| megabits(field));
        let runs = runs.collect::<anyhow::Result<Vec<_>>>()?;
        drop(servers);
        speeds.push(runs.into_iter().fold(0.0, f64::max));
    }
    let [two, one] = speeds[..] else {
        anyhow::bail!("two speeds");
    };
    let ratio = two / one;
    let text = format!("two leaders {two:.0} Mbit/s, one {one:.0}: {ratio:.2} times");
    ensure!(ratio * f64::from(FACTOR) >= 1.0, "{text}");
    Ok(text)
}

fn megabits(field: &Field) -> anyhow::Result<f64> {
    let mut ways = Vec::<(PathBuf, SocketAddr)>::new();
    for near in [MEMBER, LEADER, SECOND] {
        for far in [FAR_MEMBER, MASTER, PUBLIC] {
            let to = (field.lab.pod(far)?.address(), PORT);
            ways.push((field.lab.pod(near)?.namespace().path(), to.into()));
        }
    }
    let begin = Instant::now();
    scope(|scope| {
        let transfers = ways.iter().map(|(from, to)| {
            let work = move || transfer(from, *to, BYTES);
            scope.spawn(work)
        });
        let transfers = transfers.collect::<Vec<_>>();
        for transfer in transfers {
            let outcome = transfer.join();
            let outcome = outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome.context("a transfer")?;
        }
        anyhow::Ok(())
    })?;
    let bits = 2.0 * 8.0 * BYTES as f64 * ways.len() as f64;
    Ok(bits / begin.elapsed().as_secs_f64() / 1e6)
}
