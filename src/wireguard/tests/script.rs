//! Two devices and the network between them, driven by arbitrary bytes: for the fuzzer, and for the replay of
//! its corpora.

use super::*;

/// Arbitrary datagrams and altered genuine ones reach a device with a session: none is delivered, and the
/// session goes on.
pub fn datagrams(data: &[u8]) {
    let mut world = World::connected_pair();
    let genuine: Vec<_> = world
        .log
        .iter()
        .filter(|datagram| datagram.to == address(2))
        .cloned()
        .collect();
    let mut rest = data;
    while let Some((&[how, length], after)) = rest.split_first_chunk() {
        let (piece, after) = after.split_at(usize::from(length).min(after.len()));
        rest = after;
        let mut datagram = genuine[usize::from(how) % genuine.len()].clone();
        match how >> 6 {
            // Other bytes, from another address or from the peer's own.
            0 => {
                datagram.bytes = piece.to_vec();
                datagram.from = address(9);
            }
            1 => datagram.bytes = piece.to_vec(),
            // A genuine datagram with other bytes at its beginning, or of another length.
            2 => {
                for (byte, change) in datagram.bytes.iter_mut().zip(piece) {
                    *byte ^= change;
                }
            }
            _ => {
                datagram.bytes.truncate(usize::from(length));
                datagram.bytes.extend(piece);
            }
        }
        world.deliver(&datagram);
        world.work();
        world.under_way.clear();
        assert!(
            world.hosts[1].delivered.is_empty(),
            "a forged or repeated datagram was delivered"
        );
    }
    world.pass(seconds(20));
    for host in &mut world.hosts {
        host.delivered.clear();
    }
    world.assert_connected();
}

/// A network that drops, repeats, reorders and delays datagrams as the script says: every packet arrives at
/// most once, and the tunnel recovers with the network.
pub fn pair(data: &[u8]) {
    let mut world = World::pair();
    let mut number = 0_u32;
    for step in data.chunks_exact(2).take(300) {
        let &[what, which] = step else { continue };
        let which = usize::from(which);
        match what % 6 {
            0 | 1 => {
                number += 1;
                let from = which & 1;
                let (a, b) = if from == 0 { (1, 2) } else { (2, 1) };
                world.send(from, &packet(a, b, &number.to_be_bytes()));
            }
            2 => {
                if !world.under_way.is_empty() {
                    world.under_way.remove(which % world.under_way.len());
                }
            }
            3 => {
                if let Some(again) = pick(&world, which) {
                    world.deliver(&again);
                }
            }
            4 => {
                let all: Vec<_> = world.under_way.drain(..).rev().collect();
                for datagram in all {
                    world.deliver(&datagram);
                }
            }
            // Up to a minute, so that scripts reach rekeys and the end of sessions.
            _ => world.now = world.now + Duration::from_millis(which as u64 * 250),
        }
        world.work();
    }
    for host in &world.hosts {
        let mut once = host.delivered.clone();
        once.sort();
        once.dedup();
        assert_eq!(
            once.len(),
            host.delivered.len(),
            "a packet was delivered twice"
        );
    }
    world.pass(seconds(20));
    for host in &mut world.hosts {
        host.delivered.clear();
    }
    world.assert_connected();
}

fn pick(world: &World, which: usize) -> Option<Datagram> {
    let length = world.under_way.len();
    (length > 0).then(|| world.under_way[which % length].clone())
}

#[cfg(test)]
fn replay(name: &str, target: fn(&[u8])) {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fuzz/corpus")
        .join(name);
    let mut count = 0;
    for input in std::fs::read_dir(&corpus).unwrap() {
        let data = std::fs::read(input.unwrap().path()).unwrap();
        target(&data);
        count += 1;
    }
    assert!(count > 0, "{} is empty", corpus.display());
}

#[test]
fn the_corpus_of_datagrams_passes() {
    replay("datagrams", datagrams);
}

#[test]
fn the_corpus_of_scripts_passes() {
    replay("pair", pair);
}
