//! Sessions are renewed every two minutes, in real time and under load, and not one packet is lost.
//!
//! Numbered datagrams go both ways through three tunnels at once: ours at both ends, and ours with
//! wireguard-go at either end. Every number has to arrive, in order, once, while sessions come and go.
//! At last some are lost on purpose, which has to show.
//!
//! It lasts as long as one renewal takes, or SELVEDGE_SOAK seconds (`make soak`: ten minutes).
#![expect(
    clippy::disallowed_methods,
    reason = "a harness starts programs and looks at the clock"
)]
#![expect(clippy::unwrap_used, reason = "a failed thread is a failed test")]
#![expect(clippy::print_stdout, reason = "the figures are what it is for")]

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt};
use selvedge_lab::netns::Namespace;
use selvedge_lab::process::wait_for;

use crate::pair::{LEFT4, Pair, Pairing, RIGHT4};
use crate::tunnel::{Program, SOON};

/// One renewal at 120 s (REKEY_AFTER_TIME of the paper, 6.1), and time to see that it went well.
const USUAL: Duration = Duration::from_secs(130);
/// Between two datagrams.
const INTERVAL: Duration = Duration::from_millis(1);
/// With its number in front.
const LENGTH: usize = 1000;
/// The last ones may be under way so long.
const LATE: Duration = Duration::from_secs(2);
/// Holds some seconds of the stream, so that a busy machine loses none at the socket. The system's limit
/// holds a tenth of a second.
const BUFFER: usize = 8 << 20;
/// The same for the links, in packets; they hold half a second of their own.
const QUEUE: u32 = 5000;

/// What became of a stream.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Account {
    sent: u64,
    lost: u64,
    /// Doubled, or behind one that was sent later.
    disorderly: u64,
}

/// Sends numbers from one namespace to an address in the other until `stop` is set; counts there.
fn stream(from: &Namespace, to: &Namespace, address: &str, stop: &AtomicBool) -> Result<Account> {
    let receiver = to.within(|| UdpSocket::bind((address, 0)))?;
    setsockopt(&receiver, sockopt::RcvBufForce, &BUFFER)?;
    receiver.set_read_timeout(Some(LATE))?;
    let sender = from.within(|| UdpSocket::bind("0.0.0.0:0"))?;
    sender.connect(receiver.local_addr()?)?;
    thread::scope(|scope| {
        let sent = scope.spawn(|| -> Result<u64> {
            let (start, mut sent, mut datagram) = (Instant::now(), 0_u64, vec![0; LENGTH]);
            while !stop.load(Ordering::Relaxed) {
                datagram[..8].copy_from_slice(&sent.to_be_bytes());
                sender.send(&datagram)?;
                sent += 1;
                let due = INTERVAL * u32::try_from(sent)?;
                thread::sleep(due.saturating_sub(start.elapsed()));
            }
            Ok(sent)
        });
        let (mut expected, mut received, mut disorderly) = (0, 0, 0);
        let mut datagram = vec![0; LENGTH];
        loop {
            match receiver.recv(&mut datagram) {
                Ok(_) => {
                    let number = datagram
                        .first_chunk()
                        .map_or(0, |&bytes| u64::from_be_bytes(bytes));
                    if number < expected {
                        disorderly += 1;
                    } else {
                        received += 1;
                        expected = number + 1;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    // Nothing for two seconds is an outage, or the end.
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        let sent = sent.join().unwrap()?;
        Ok(Account {
            sent,
            lost: sent - received,
            disorderly,
        })
    })
}

/// Both directions for a time, with something done meanwhile.
fn both_ways(pair: &Pair, meanwhile: impl FnOnce() -> Result<()>) -> Result<[Account; 2]> {
    let stop = AtomicBool::new(false);
    let (left, right) = (&pair.left.space, &pair.right.space);
    thread::scope(|scope| {
        let right_going = scope.spawn(|| stream(left, right, RIGHT4, &stop));
        let left_going = scope.spawn(|| stream(right, left, LEFT4, &stop));
        let done = meanwhile();
        stop.store(true, Ordering::Relaxed);
        let accounts = [right_going.join().unwrap()?, left_going.join().unwrap()?];
        done.map(|()| accounts)
    })
}

/// The renewals of a pair's session within a time.
fn renewals(pair: &Pair, time: Duration) -> Result<usize> {
    let mut seen = BTreeSet::new();
    let start = Instant::now();
    while start.elapsed() < time {
        seen.insert(
            pair.left
                .tunnel
                .peer("latest-handshakes", &pair.right.key.public)?,
        );
        thread::sleep(Duration::from_secs(1));
    }
    Ok(seen.len() - 1)
}

fn no_number_is_lost(pairing: Pairing, time: Duration) -> Result<()> {
    let pair = Pair::new(pairing)?;
    for end in [&pair.left, &pair.right] {
        end.ip(&format!("link set {{}} txqueuelen {QUEUE}"))?;
    }
    pair.left.ping(RIGHT4)?;
    let mut renewed = 0;
    let accounts = both_ways(&pair, || {
        renewed = renewals(&pair, time)?;
        Ok(())
    })?;
    println!(
        "{:?}-{:?}: {renewed} renewals in {time:?}; {accounts:?}",
        pairing.left, pairing.right
    );
    for account in accounts {
        ensure!(
            (account.lost, account.disorderly) == (0, 0),
            "{account:?} with {renewed} renewals"
        );
        // A second without traffic could lose nothing.
        ensure!(
            account.sent > time.as_millis() as u64 / 5,
            "only {} were sent",
            account.sent
        );
    }
    let due = time.as_secs() / 125;
    ensure!(renewed as u64 >= due, "{renewed} renewals, not {due}");

    let lossy = both_ways(&pair, || {
        let under = &pair.under;
        under.run("nft add table ip loss")?;
        under.run("nft add chain ip loss arriving { type filter hook input priority 0 ; }")?;
        for port in [1, 2] {
            under.run(&format!(
                "nft add rule ip loss arriving udp dport {port} counter drop"
            ))?;
        }
        // Datagrams of a thousand bytes; what else goes by is no number.
        let numbers = |rules: &str| {
            let counted = rules.split("bytes ").skip(1);
            counted
                .filter_map(|rest| rest.split_whitespace().next()?.parse().ok())
                .filter(|bytes: &usize| *bytes >= 2 * LENGTH)
                .count()
        };
        wait_for("both streams to lose some", SOON, || {
            under
                .run("nft list chain ip loss arriving")
                .is_ok_and(|rules| numbers(&rules) == 2)
        })?;
        under.run("nft delete table ip loss")?;
        thread::sleep(Duration::from_millis(200));
        Ok(())
    })?;
    ensure!(
        lossy.iter().all(|account| account.lost > 0),
        "what was lost on purpose does not show: {lossy:?}"
    );
    Ok(())
}

#[test]
fn no_number_is_lost_while_sessions_are_renewed() {
    let _alone = crate::alone();
    let time = std::env::var("SELVEDGE_SOAK").map(|seconds| {
        seconds
            .parse()
            .expect("SELVEDGE_SOAK is a number of seconds")
    });
    let time = time.map_or(USUAL, Duration::from_secs);
    let (ours, theirs) = (Program::Selvedge, Program::WireguardGo);
    thread::scope(|scope| {
        let runs = [(ours, ours), (ours, theirs), (theirs, ours)].map(|(left, right)| {
            scope.spawn(move || {
                let pairing = Pairing { left, right };
                let result = no_number_is_lost(pairing, time);
                result.with_context(|| format!("{pairing:?}\n{}", crate::tunnel::take_logs()))
            })
        });
        for run in runs {
            if let Err(error) = run.join().unwrap() {
                panic!("{error:#}");
            }
        }
    });
}
