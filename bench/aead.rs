//! What the ideal tunnel on this machine cannot avoid, as one line of JSON for `bench/tunnel.sh`.
//!
//! Nanoseconds that `ring` takes to seal and to open a packet of 1,420 bytes on one CPU, and
//! processor seconds that the four copies between user and kernel take for 10^9 bytes, measured
//! through a pair of sockets. Medians of several rounds.

use std::hint::black_box;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

const PACKET: usize = 1420;
const ROUNDS: usize = 7;
const COUNT: u32 = 50_000;

#[expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a measurement, for a script"
)]
fn main() {
    let key = UnboundKey::new(&CHACHA20_POLY1305, &[7; 32]).expect("32 bytes are a key");
    let key = LessSafeKey::new(key);
    let nonce = |n: u32| {
        let mut nonce = [0; 12];
        nonce[..4].copy_from_slice(&n.to_le_bytes());
        Nonce::assume_unique_for_key(nonce)
    };
    let median = |mut round: Box<dyn FnMut() -> f64>| {
        let mut times: Vec<f64> = (0..ROUNDS).map(|_| round()).collect();
        times.sort_by(f64::total_cmp);
        times[ROUNDS / 2]
    };
    let sealing = key.clone();
    let seal = median(Box::new(move || {
        let mut packet = [0xa5; PACKET];
        let begun = Instant::now();
        for n in 0..COUNT {
            let tag = sealing.seal_in_place_separate_tag(nonce(n), Aad::empty(), &mut packet);
            black_box(tag.is_ok());
        }
        begun.elapsed().as_secs_f64() * 1e9 / f64::from(COUNT)
    }));
    let open = median(Box::new(move || {
        let mut sealed = vec![0xa5; PACKET];
        let tagged = key.seal_in_place_append_tag(nonce(0), Aad::empty(), &mut sealed);
        assert!(tagged.is_ok());
        let mut packet = sealed.clone();
        let begun = Instant::now();
        for _ in 0..COUNT {
            packet.copy_from_slice(&sealed);
            let opened = key.open_in_place(nonce(0), Aad::empty(), &mut packet);
            black_box(opened.is_ok());
        }
        begun.elapsed().as_secs_f64() * 1e9 / f64::from(COUNT)
    }));
    let copies = median(Box::new(|| {
        let (mut one, mut other) = UnixStream::pair().expect("a pair of sockets");
        let mut bytes = vec![0xa5; 64 << 10];
        let rounds = 4000_u32;
        let begun = Instant::now();
        for _ in 0..rounds {
            one.write_all(&bytes).expect("it fits the socket's buffer");
            other.read_exact(&mut bytes).expect("it was written");
        }
        // Two copies for each byte, of the four.
        begun.elapsed().as_secs_f64() * 2.0 * 1e9 / (f64::from(rounds) * 65536.0)
    }));
    println!(
        r#"{{"aead_seal_ns": {seal:.1}, "aead_open_ns": {open:.1}, "four_copies_s_per_gb": {copies:.4}}}"#
    );
}
