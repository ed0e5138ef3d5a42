//! Instructions per packet, which do not depend on the machine's mood: what sealing, opening and the
//! ways from and to the TUN device take, next to raw `ring`.
//!
//! Runs itself under `valgrind --tool=callgrind` twice for each case, with different numbers of
//! rounds; the difference is the rounds', without what comes before and after.

use std::process::{Command, ExitCode};

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use selvedge::wireguard::bench_support::{DevicePair, Run, superpacket};

/// Packets in a round, as in a batch of UDP segmentation offload.
const BATCH: u16 = 44;
const ROUNDS: [u32; 2] = [10, 60];

type Case = (&'static str, usize, fn(usize, u32));

/// Names, bytes of plaintext, and what runs a number of rounds. A case that opens seals as well, and
/// so does its counterpart with `ring`: the table subtracts.
const CASES: [Case; 10] = [
    ("ring seal", 64, |length, rounds| raw(length, rounds, false)),
    ("ring seal + open", 64, |length, rounds| {
        raw(length, rounds, true)
    }),
    ("session seal", 64, |length, rounds| {
        session(length, rounds, false)
    }),
    ("session seal + open", 64, |length, rounds| {
        session(length, rounds, true)
    }),
    ("ring seal", 1420, |length, rounds| {
        raw(length, rounds, false)
    }),
    ("ring seal + open", 1420, |length, rounds| {
        raw(length, rounds, true)
    }),
    ("session seal", 1420, |length, rounds| {
        session(length, rounds, false)
    }),
    ("session seal + open", 1420, |length, rounds| {
        session(length, rounds, true)
    }),
    ("device transmit", 1420, |length, rounds| {
        device(length, rounds, false)
    }),
    ("device transmit + receive", 1420, |length, rounds| {
        device(length, rounds, true)
    }),
];

fn raw(length: usize, rounds: u32, open: bool) {
    let key = UnboundKey::new(&CHACHA20_POLY1305, &[7; 32]).expect("32 bytes are a key");
    let key = LessSafeKey::new(key);
    let mut packet = vec![0; length];
    for n in 0..rounds * u32::from(BATCH) {
        let nonce = || {
            let mut nonce = [0; 12];
            nonce[..4].copy_from_slice(&n.to_le_bytes());
            Nonce::assume_unique_for_key(nonce)
        };
        packet.truncate(length);
        let sealed = key.seal_in_place_append_tag(nonce(), Aad::empty(), &mut packet);
        assert!(sealed.is_ok());
        if open {
            let opened = key.open_in_place(nonce(), Aad::empty(), &mut packet);
            assert!(opened.is_ok());
        }
    }
}

fn session(length: usize, rounds: u32, open: bool) {
    let mut bench = DevicePair::default();
    let mut run = Run::of_zeros(BATCH.into(), length);
    for _ in 0..rounds {
        bench.seal(&mut run);
        if open {
            assert_eq!(bench.open(&mut run), usize::from(BATCH));
        }
    }
}

fn device(length: usize, rounds: u32, receive: bool) {
    let mut bench = DevicePair::default();
    let segment = u16::try_from(length - 40).expect("a packet is shorter than 64 KiB");
    let packet = superpacket(BATCH, segment);
    for _ in 0..rounds {
        if receive {
            for mut run in bench.transmitted(&packet) {
                assert_eq!(bench.receive(&mut run), 1);
            }
        } else {
            bench.transmit(&packet);
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the product runs no programs, a benchmark does"
)]
fn collected(case: usize, rounds: u32) -> Option<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe().ok()?)
        .args(["run", &case.to_string(), &rounds.to_string()])
        .output()
        .ok()?;
    let said = String::from_utf8_lossy(&output.stderr);
    let (_, count) = said.split_once("Collected : ")?;
    count.split_whitespace().next()?.parse().ok()
}

#[expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a table for people, and what is missing"
)]
fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, run, case, rounds] = arguments.as_slice()
        && run == "run"
    {
        let (Ok(case), Ok(rounds)) = (case.parse::<usize>(), rounds.parse()) else {
            return ExitCode::from(64);
        };
        let (_, length, body) = CASES[case];
        body(length, rounds);
        return ExitCode::SUCCESS;
    }
    println!("| | bytes | instructions per packet |\n|---|---|---|");
    for (number, (name, length, _)) in CASES.iter().enumerate() {
        let [Some(few), Some(many)] = ROUNDS.map(|rounds| collected(number, rounds)) else {
            eprintln!("valgrind did not run: scripts/setup.sh bench installs it");
            return ExitCode::FAILURE;
        };
        let packets = u64::from(ROUNDS[1] - ROUNDS[0]) * u64::from(BATCH);
        println!("| {name} | {length} | {} |", (many - few) / packets);
    }
    ExitCode::SUCCESS
}
