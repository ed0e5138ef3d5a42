//! Datagrams from hosts that are no peers: they have no effect and get no answer.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rand::{Rng as _, SeedableRng as _};
use selvedge_lab::netns::Namespace;
use selvedge_lab::process::wait_for;

use crate::pair::{LEFT_PORT, LEFT4, LEFT6, Pair, Pairing, RIGHT_PORT, RIGHT4, RIGHT6};
use crate::relay::{Relay, Way};
use crate::traffic::{numbered, tcp};
use crate::tunnel::{Key, Program, SOON, Tunnel};

/// The public keys of small order, with which every shared secret is zero.
const LOW_ORDER: [&str; 7] = [
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
    "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
    "4Ot6fDtBuK4WVuP68Z/EatoJjeucMrH9hmIFFl9JuAA=",
    "X5yVvKNQjCSx0LFVnIPvWwREXMRYHI6G2CJO3dCfEVc=",
    "7P///////////////////////////////////////38=",
    "7f///////////////////////////////////////38=",
    "7v///////////////////////////////////////38=",
];

/// A socket in the daemons' namespace that belongs to no peer.
fn unknown_sender(pair: &Pair) -> Result<UdpSocket> {
    let socket = pair.under.within(|| UdpSocket::bind("127.0.0.1:666"))?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    Ok(socket)
}

/// Fails if anything came back to a socket.
fn expect_silence(socket: &UdpSocket) -> Result<()> {
    loop {
        return match socket.recv(&mut [0; 2048]) {
            Ok(length) => bail!("{length} bytes were sent to an unknown sender"),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                Ok(())
            }
            // A wait with a time-out is not resumed after a signal (signal(7)).
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => Err(error.into()),
        };
    }
}

/// Ten of ten echoes each way, one after the other: `ping -c 10` waits for the last one no longer than twice
/// the time of the others, which is too short on a busy host.
fn expect_no_loss(pair: &Pair) -> Result<()> {
    for (end, address) in [(&pair.left, RIGHT4), (&pair.right, LEFT4)] {
        for echo in 0..10 {
            end.ping(address)
                .with_context(|| format!("lost echo {echo}"))?;
        }
    }
    Ok(())
}

/// Numbered datagrams each way: each arrives exactly once.
fn expect_every_number(pair: &Pair) -> Result<()> {
    let (left, right) = (&pair.left.space, &pair.right.space);
    numbered(left, right, RIGHT4, 100).context("from left to right")?;
    numbered(right, left, LEFT4, 100).context("from right to left")
}

pub(crate) fn garbage_has_no_effect_and_gets_no_answer(pairing: Pairing) -> Result<()> {
    let mut pair = Pair::new(pairing)?;
    pair.left.ping(RIGHT4)?;
    let socket = unknown_sender(&pair)?;
    let mut random = rand::rngs::StdRng::seed_from_u64(7);
    let sizes = [
        0, 1, 2, 3, 4, 15, 16, 31, 32, 33, 48, 63, 64, 65, 91, 92, 93, 147, 148, 149, 1000, 1452,
        9000, 32_768, 65_507,
    ];
    for kind in [0_u8, 1, 2, 3, 4, 5, 255] {
        for size in sizes {
            for reserved in [0, 0xff] {
                let mut datagram = vec![0; size];
                random.fill_bytes(&mut datagram);
                for (byte, value) in datagram.iter_mut().zip([kind, reserved, 0, 0]) {
                    *byte = value;
                }
                for port in [LEFT_PORT, RIGHT_PORT] {
                    socket.send_to(&datagram, ("127.0.0.1", port))?;
                }
            }
        }
    }
    expect_silence(&socket)?;
    ensure!(!pair.left.tunnel.ended(), "the left daemon has ended");
    ensure!(!pair.right.tunnel.ended(), "the right daemon has ended");
    expect_no_loss(&pair)
}

/// The bytes of a datagram that its receiver authenticates (paper, 5.4). The second MAC of a handshake message is
/// not among them: it is checked under load only, so a copy with another one is a valid duplicate. According to
/// its source, wireguard-go may accept a duplicate and the message itself on two threads and then delete the keys
/// of its first answer, which the initiator uses (`ConsumeMessageInitiation`, `BeginSymmetricSession`). In 231
/// runs with such duplicates this did not happen.
fn authenticated(datagram: &[u8]) -> usize {
    const MAC: usize = 16;
    match datagram.first() {
        Some(1 | 2) => datagram.len() - MAC,
        _ => datagram.len(),
    }
}

/// Altered copies of genuine datagrams, from the peer's own address and just before the genuine ones: none of the
/// genuine ones is lost, and no copy is accepted.
pub(crate) fn altered_datagrams_are_dropped(pairing: Pairing) -> Result<()> {
    let pair = Pair::without_endpoints(pairing)?;
    let mut random = rand::rngs::StdRng::seed_from_u64(8);
    let _relay = Relay::between(&pair, move |_, bytes| {
        let mut out = Vec::new();
        let mut forge = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut forged = bytes.to_vec();
            change(&mut forged);
            out.push(forged);
        };
        let random = random.next_u32() as usize;
        let (length, authentic) = (bytes.len(), authenticated(bytes));
        forge(&|bytes| bytes[authentic - 1] ^= 1);
        forge(&|bytes| bytes[random % authentic] ^= 0x80);
        forge(&|bytes| bytes.truncate(random % length));
        forge(&|bytes| bytes.resize(length + 1 + random % 9000, 0));
        forge(&|bytes| bytes.fill(0));
        if bytes.first() == Some(&4) && bytes.len() > 16 {
            // A counter far ahead must not move the window before it is authentic.
            forge(&|bytes| bytes[8..16].fill(0xff));
            forge(&|bytes| bytes[8..16].fill(0x7f));
        }
        out.push(bytes.to_vec());
        out
    })?;
    expect_no_loss(&pair)?;
    expect_every_number(&pair)?;
    tcp(&pair.left.space, &pair.right.space, RIGHT4, 1 << 20)?;
    expect_every_number(&pair)
}

/// Another host sends all datagrams again: nothing is delivered, no endpoint moves, and there is no answer.
pub(crate) fn replayed_datagrams_have_no_effect(pairing: Pairing) -> Result<()> {
    let pair = Pair::without_endpoints(pairing)?;
    let relay = Relay::listening(&pair)?;
    expect_no_loss(&pair)?;
    let endpoints = || -> Result<_> {
        let (left, right) = (&pair.left, &pair.right);
        Ok([left.endpoint_of(right)?, right.endpoint_of(left)?])
    };
    let state = || -> Result<_> {
        let packets = [&pair.left, &pair.right].map(|end| end.statistic("rx_packets"));
        let [left, right] = packets;
        Ok(([left?, right?], endpoints()?))
    };
    let before = state()?;
    let socket = unknown_sender(&pair)?;
    let seen = relay.seen()?;
    ensure!(seen.len() > 20, "only {} datagrams to replay", seen.len());
    for datagram in seen {
        let port = match datagram.way {
            Way::Right => RIGHT_PORT,
            Way::Left => LEFT_PORT,
        };
        socket.send_to(&datagram.bytes, ("127.0.0.1", port))?;
    }
    expect_silence(&socket)?;
    let after = state()?;
    ensure!(after == before, "replay changed {before:?} to {after:?}");
    expect_no_loss(&pair)
}

/// After a restart a device does not know which initiations it accepted before, so an old one may get an answer
/// (paper, 5.1). The answer has no effect, and after a new handshake of the peer there is none.
pub(crate) fn datagrams_replayed_after_a_restart_deliver_nothing(pairing: Pairing) -> Result<()> {
    let mut pair = Pair::without_endpoints(pairing)?;
    let relay = Relay::listening(&pair)?;
    expect_no_loss(&pair)?;
    let seen = relay.seen()?;
    let seen: Vec<_> = seen.iter().filter(|seen| seen.way == Way::Right).collect();
    ensure!(seen.len() > 10, "only {} datagrams to replay", seen.len());
    let socket = unknown_sender(&pair)?;
    let replay = || -> Result<()> {
        for datagram in &seen {
            socket.send_to(&datagram.bytes, ("127.0.0.1", RIGHT_PORT))?;
        }
        Ok(())
    };

    pair.right.tunnel.stop()?;
    pair.right.tunnel = Tunnel::start(pairing.right, &pair.under)?;
    pair.right
        .tunnel
        .move_link(&pair.under, &pair.right.space)?;
    let (left, right) = (&pair.left, &pair.right);
    right.configure(
        RIGHT_PORT,
        &pair.psk,
        left,
        [RIGHT4, RIGHT6],
        [LEFT4, LEFT6],
    )?;
    let before = right.statistic("rx_packets")?;
    replay()?;
    let initiations = seen.iter().filter(|seen| seen.bytes.first() == Some(&1));
    let mut answers = 0;
    loop {
        match socket.recv(&mut [0; 2048]) {
            Ok(length) => {
                ensure!(
                    length == 92,
                    "{length} bytes were sent to an unknown sender"
                );
                answers += 1;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    ensure!(
        answers <= initiations.count(),
        "{answers} answers, more than initiations"
    );
    ensure!(
        right.statistic("rx_packets")? == before,
        "a replayed packet came through"
    );

    // The peer itself, with a new handshake.
    let restart = Key::new()?;
    left.tunnel
        .set(&format!("private-key {}", restart.file()))?;
    left.tunnel
        .set(&format!("private-key {}", left.key.file()))?;
    left.reaches(RIGHT4)?;
    let before = (right.statistic("rx_packets")?, right.endpoint_of(left)?);
    replay()?;
    expect_silence(&socket)?;
    let after = (right.statistic("rx_packets")?, right.endpoint_of(left)?);
    ensure!(after == before, "replay changed {before:?} to {after:?}");
    expect_no_loss(&pair)
}

/// Peers with keys of small order can be configured, and nothing is ever sent to them.
pub(crate) fn nothing_is_sent_to_keys_of_low_order(program: Program) -> Result<()> {
    let space = Namespace::new("low")?;
    let tunnel = Tunnel::start(program, &space)?;
    let own = Key::new()?;
    tunnel.set(&format!("private-key {}", own.file()))?;
    let socket = space.within(|| UdpSocket::bind("127.0.0.1:1111"))?;
    socket.set_read_timeout(Some(Duration::from_secs(3)))?;
    let add = |key: &str| {
        tunnel.set(&format!(
            "peer {key} persistent-keepalive 1 endpoint 127.0.0.1:1111"
        ))
    };
    for key in LOW_ORDER {
        add(key)?;
    }
    space.run(&format!("ip link set {} up", tunnel.name))?;
    expect_silence(&socket)?;
    // The control: a valid key causes an initiation.
    add(&Key::new()?.public)?;
    socket.set_read_timeout(Some(SOON))?;
    ensure!(socket.recv(&mut [0; 2048])? == 148, "no initiation");
    Ok(())
}

/// The own key becomes no peer, whether the peer or the private key is set first.
pub(crate) fn the_own_key_becomes_no_peer(program: Program) -> Result<()> {
    let space = Namespace::new("own")?;
    let tunnel = Tunnel::start(program, &space)?;
    let (key, other) = (Key::new()?, Key::new()?);
    let peers = || tunnel.wg("show {} peers");
    let private_key = |key: &Key| tunnel.set(&format!("private-key {}", key.file()));
    let peer = format!("peer {}", key.public);
    tunnel.set(&peer)?;
    ensure!(peers()? == key.public, "the key of another host is no peer");
    private_key(&key)?;
    ensure!(peers()?.is_empty(), "it remains a peer");
    tunnel.set(&peer)?;
    ensure!(peers()?.is_empty(), "it becomes a peer");
    private_key(&other)?;
    tunnel.set(&peer)?;
    ensure!(
        peers()? == key.public,
        "with another key, it is a peer again"
    );
    Ok(())
}

/// Ten thousands of datagrams from unknown senders have no lasting effect on the tunnel.
pub(crate) fn a_burst_of_garbage_has_no_lasting_effect(pairing: Pairing) -> Result<()> {
    let mut pair = Pair::new(pairing)?;
    pair.left.ping(RIGHT4)?;
    let mut random = rand::rngs::StdRng::seed_from_u64(9);
    let socket = unknown_sender(&pair)?;
    thread::scope(|scope| -> Result<()> {
        let transfer = scope.spawn(|| tcp(&pair.left.space, &pair.right.space, RIGHT4, 16 << 20));
        for _ in 0..20_000 {
            let mut datagram = vec![0; (random.next_u32() % 300) as usize];
            random.fill_bytes(&mut datagram);
            if let Some(kind) = datagram.first_mut() {
                *kind %= 6;
            }
            socket.send_to(&datagram, ("127.0.0.1", LEFT_PORT))?;
        }
        transfer.join().unwrap()
    })?;
    expect_silence(&socket)?;
    ensure!(!pair.left.tunnel.ended(), "the daemon has ended");
    // Datagrams that wait in the daemon's socket leave no room for later ones, which the kernel drops.
    wait_for("the daemon to read what it was sent", SOON, || {
        pair.left
            .tunnel
            .queue(LEFT_PORT)
            .is_ok_and(|(waiting, _)| waiting == 0)
    })?;
    let (_, before) = pair.left.tunnel.queue(LEFT_PORT)?;
    println!("{before} datagrams of the burst found no room in the socket");
    expect_no_loss(&pair)?;
    expect_every_number(&pair)?;
    let (_, after) = pair.left.tunnel.queue(LEFT_PORT)?;
    ensure!(
        after == before,
        "the kernel lost {} datagrams",
        after - before
    );
    Ok(())
}

pairs! {
    garbage_has_no_effect_and_gets_no_answer;
    altered_datagrams_are_dropped;
    replayed_datagrams_have_no_effect;
    datagrams_replayed_after_a_restart_deliver_nothing;
    a_burst_of_garbage_has_no_lasting_effect;
}

devices! {
    nothing_is_sent_to_keys_of_low_order;
    the_own_key_becomes_no_peer;
}
