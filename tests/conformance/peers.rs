//! Cryptokey routing, changes of keys, and changes of live peers.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use selvedge_lab::process::wait_for;

use crate::pair::{End, LEFT4, Pair, Pairing, RIGHT4, RIGHT6};
use crate::relay::Relay;
use crate::traffic::{tcp, udp};
use crate::tunnel::{Key, SOON, Tunnel};

/// Whether a datagram from one end reaches the other in this time.
fn arrives(from: &End, to: &End, address: &str, patience: Duration) -> Result<bool> {
    let receiver = to.space.within(|| UdpSocket::bind((address, 0)))?;
    receiver.set_read_timeout(Some(patience))?;
    let sender = from.space.within(|| UdpSocket::bind("0.0.0.0:0"))?;
    sender.send_to(b"X", receiver.local_addr()?)?;
    Ok(receiver.recv(&mut [0; 8]).is_ok())
}

/// A packet with a source of a more specific owner is dropped. Its datagram is authentic, so the endpoint moves.
pub(crate) fn a_source_belongs_to_its_most_specific_owner(pairing: Pairing) -> Result<()> {
    let pair = Pair::new(pairing)?;
    let (left, right) = (&pair.left, &pair.right);
    let peer = format!("peer {}", right.key.public);
    left.tunnel
        .set(&format!("{peer} allowed-ips 192.168.241.0/24"))?;
    ensure!(
        arrives(right, left, LEFT4, SOON)?,
        "the owner of the /24 may send"
    );
    let other = Key::new()?.public;
    left.tunnel
        .set(&format!("peer {other} allowed-ips {RIGHT4}/32"))?;
    right.tunnel.set("listen-port 9997")?;
    ensure!(
        !arrives(right, left, LEFT4, Duration::from_secs(1))?,
        "a source of another owner came through"
    );
    wait_for("the endpoint to follow the datagram", SOON, || {
        left.endpoint_of(right)
            .is_ok_and(|endpoint| endpoint == "127.0.0.1:9997")
    })?;
    left.tunnel.set(&format!("peer {other} remove"))?;
    ensure!(arrives(right, left, LEFT4, SOON)?, "the /24 is whole again");
    Ok(())
}

/// The same with an owner that is configured from the beginning, without changes.
pub(crate) fn packets_with_a_spoofed_source_are_dropped(pairing: Pairing) -> Result<()> {
    let pair = Pair::without_endpoints(pairing)?;
    let (left, right) = (&pair.left, &pair.right);
    let other = Key::new()?.public;
    left.tunnel.set(&format!(
        "peer {} allowed-ips 192.168.241.0/24,fd00::/112 peer {other} allowed-ips {RIGHT4}/32",
        right.key.public
    ))?;
    pair.meet("127.0.0.1")?;
    // The tunnel carries its own addresses.
    right.ip("address add 192.168.241.7/24 dev {}")?;
    right
        .space
        .run(&format!("ping -q -n -c 1 -W 10 -I 192.168.241.7 {LEFT4}"))?;
    let before = left.statistic("rx_packets")?;
    let output = right
        .space
        .attempt(&format!("ping -q -n -c 5 -i 0.1 -W 1 -I {RIGHT4} {LEFT4}"))?;
    ensure!(!output.status.success(), "a spoofed echo is answered");
    let spoofed = left.statistic("rx_packets")? - before;
    ensure!(spoofed == 0, "{spoofed} of 5 spoofed packets came through");
    Ok(())
}

pub(crate) fn a_changed_private_key_makes_a_new_handshake_at_once(pairing: Pairing) -> Result<()> {
    let pair = Pair::new(pairing)?;
    let (left, right) = (&pair.left, &pair.right);
    left.ping(RIGHT4)?;
    let new = Key::new()?;
    left.tunnel.set(&format!("private-key {}", new.file()))?;
    right.tunnel.set(&format!(
        "peer {} preshared-key {} allowed-ips {LEFT4}/32 peer {} remove",
        new.public,
        pair.psk.file(),
        left.key.public,
    ))?;
    left.ping(RIGHT4)?;
    let peers = right.tunnel.wg("show {} peers")?;
    ensure!(peers == new.public, "the peers are {peers}");
    Ok(())
}

pub(crate) fn a_changed_preshared_key_keeps_the_session(pairing: Pairing) -> Result<()> {
    let pair = Pair::without_endpoints(pairing)?;
    let relay = Relay::listening(&pair)?;
    let since = Instant::now();
    let (left, right) = (&pair.left, &pair.right);
    left.ping(RIGHT4)?;
    let other = Key::new()?;
    let set = |end: &End, peer: &End, psk: &Key| {
        let (peer, psk) = (&peer.key.public, psk.file());
        end.tunnel.set(&format!("peer {peer} preshared-key {psk}"))
    };
    set(left, right, &other)?;
    left.ping(RIGHT4)?;
    set(right, left, &other)?;
    left.ping(RIGHT4)?;
    let count = initiations(&relay)?;
    let granted = 1 + pairing.needless_handshakes(since.elapsed());
    ensure!(count <= granted, "the session has ended");
    Ok(())
}

pub(crate) fn different_preshared_keys_make_no_session(pairing: Pairing) -> Result<()> {
    let pair = Pair::new(pairing)?;
    let (left, right) = (&pair.left, &pair.right);
    let other = Key::new()?;
    let psk = |key: &Key| {
        left.tunnel.set(&format!(
            "peer {} preshared-key {}",
            right.key.public,
            key.file()
        ))
    };
    psk(&other)?;
    left.ping_fails(RIGHT4)?;
    right.ping_fails(LEFT4)?;
    psk(&pair.psk)?;
    // The attempt under way must time out first: five seconds.
    left.reaches(RIGHT4)
}

fn initiations(relay: &Relay) -> Result<usize> {
    let seen = relay.seen()?;
    let initiations = seen.iter().filter(|seen| seen.bytes.first() == Some(&1));
    Ok(initiations.count())
}

/// Changes of a peer with a session take effect without a new handshake.
pub(crate) fn changes_of_a_live_peer_keep_its_session(pairing: Pairing) -> Result<()> {
    let pair = Pair::without_endpoints(pairing)?;
    let relay = Relay::listening(&pair)?;
    let since = Instant::now();
    let (left, right) = (&pair.left, &pair.right);
    left.ping(RIGHT4)?;
    let peer = format!("peer {}", right.key.public);
    for change in [
        format!("{peer} persistent-keepalive 25"),
        format!("{peer} persistent-keepalive 0"),
        format!("{peer} allowed-ips {RIGHT4}/32"),
        format!("{peer} allowed-ips 192.168.241.0/24,{RIGHT6}/128"),
        format!("{peer} endpoint {}", left.endpoint_of(right)?),
        "fwmark 7".to_owned(),
        "fwmark 0".to_owned(),
        format!("listen-port {}", crate::pair::LEFT_PORT),
        format!("private-key {}", left.key.file()),
        format!("peer {} allowed-ips 10.0.0.0/8", Key::new()?.public),
    ] {
        left.tunnel.set(&change)?;
        left.ping(RIGHT4)
            .with_context(|| format!("after {change}"))?;
        let count = initiations(&relay)?;
        let granted = 1 + pairing.needless_handshakes(since.elapsed());
        ensure!(count <= granted, "{count} initiations after {change}");
    }
    tcp(&left.space, &right.space, RIGHT6, 1 << 20)?;
    let count = initiations(&relay)?;
    let granted = 1 + pairing.needless_handshakes(since.elapsed());
    ensure!(count <= granted, "a new handshake in the end");
    Ok(())
}

/// Changes during a transfer lose no byte of it.
pub(crate) fn a_transfer_survives_hundreds_of_changes(pairing: Pairing) -> Result<()> {
    let pair = Pair::new(pairing)?;
    let (left, right) = (&pair.left, &pair.right);
    left.ping(RIGHT4)?;
    std::thread::scope(|scope| {
        let transfer = scope.spawn(|| tcp(&left.space, &right.space, RIGHT4, 16 << 20));
        let mut round = 0;
        while !transfer.is_finished() || round < 20 {
            round += 1;
            let key = Key::new()?.public;
            left.tunnel
                .set(&format!("peer {key} allowed-ips 10.{}.0.0/16", round % 256))?;
            left.tunnel.set(&format!(
                "peer {} allowed-ips {RIGHT4}/32,{RIGHT6}/128 persistent-keepalive {}",
                right.key.public,
                round % 30
            ))?;
            left.tunnel.set(&format!("peer {key} remove"))?;
        }
        transfer.join().unwrap()
    })
}

pub(crate) fn nothing_is_sent_to_or_accepted_from_a_removed_peer(pairing: Pairing) -> Result<()> {
    let pair = Pair::new(pairing)?;
    let (left, right) = (&pair.left, &pair.right);
    left.ping(RIGHT4)?;
    left.tunnel
        .set(&format!("peer {} remove", right.key.public))?;
    right.ping_fails(LEFT4)?;
    left.ping_fails(RIGHT4)?;
    left.tunnel.set(&format!(
        "peer {} preshared-key {} allowed-ips {RIGHT4}/32 endpoint 127.0.0.1:2",
        right.key.public,
        pair.psk.file()
    ))?;
    left.ping(RIGHT4)
}

/// A restarted end has a session again after the first packets of either end.
pub(crate) fn a_restarted_end_has_a_session_again(pairing: Pairing) -> Result<()> {
    let mut pair = Pair::new(pairing)?;
    pair.left.ping(RIGHT4)?;
    pair.left.tunnel.stop()?;
    pair.left.tunnel = Tunnel::start(pairing.left, &pair.under)?;
    pair.left.tunnel.move_link(&pair.under, &pair.left.space)?;
    let Pair {
        left, right, psk, ..
    } = &pair;
    left.configure(
        crate::pair::LEFT_PORT,
        psk,
        right,
        [LEFT4, crate::pair::LEFT6],
        [RIGHT4, RIGHT6],
    )?;
    left.endpoint(right, "127.0.0.1:2")?;
    left.ping(RIGHT4)?;
    right.ping(LEFT4)?;
    udp(&right.space, &left.space, LEFT4, [1, 100, 1000])
}

pairs! {
    a_source_belongs_to_its_most_specific_owner;
    packets_with_a_spoofed_source_are_dropped;
    a_changed_private_key_makes_a_new_handshake_at_once;
    a_changed_preshared_key_keeps_the_session;
    different_preshared_keys_make_no_session;
    changes_of_a_live_peer_keep_its_session;
    a_transfer_survives_hundreds_of_changes;
    nothing_is_sent_to_or_accepted_from_a_removed_peer;
    a_restarted_end_has_a_session_again;
}
