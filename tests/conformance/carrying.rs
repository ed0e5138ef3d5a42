//! The packets that a tunnel carries, and its datagrams as seen from outside.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use selvedge_lab::netns::Namespace;
use selvedge_lab::process::wait_for;

use crate::pair::{LEFT4, LEFT6, Pair, Pairing, RIGHT4, RIGHT6};
use crate::relay::Relay;
use crate::traffic::{everything, numbered, parallel, tcp, udp};
use crate::tunnel::SOON;

pub(crate) fn ipv4_and_ipv6_pass_over_ipv4(pairing: Pairing) -> Result<()> {
    everything(&Pair::new(pairing)?)
}

pub(crate) fn ipv4_and_ipv6_pass_over_ipv6(pairing: Pairing) -> Result<()> {
    let pair = Pair::without_endpoints(pairing)?;
    pair.meet("[::1]")?;
    everything(&pair)
}

pub(crate) fn fifty_tcp_streams_share_a_tunnel(pairing: Pairing) -> Result<()> {
    parallel(&Pair::new(pairing)?, 50, 1 << 20)
}

/// Ten echo requests of 84 bytes: padded to 96, with 32 bytes of header and tag. The requesting side sends the
/// initiation (148) and gets the response (92); it may also send a keepalive (32).
pub(crate) fn counters_are_exact(pairing: Pairing) -> Result<()> {
    let pair = Pair::new(pairing)?;
    let (left, right) = (&pair.left, &pair.right);
    right
        .space
        .run(&format!("ping -q -n -c 10 -f -W 1 {LEFT4}"))?;
    // ping does not wait longer for the last answers than for the others.
    let counted = || -> Result<bool> {
        let (received, sent) = right.tunnel.transfer(&left.key.public)?;
        let (left_received, left_sent) = left.tunnel.transfer(&right.key.public)?;
        Ok([received, left_sent] == [1372; 2]
            && [sent, left_received]
                .iter()
                .all(|sum| [1428, 1460].contains(sum)))
    };
    wait_for("1372 bytes one way and 1428 the other", SOON, || {
        counted().is_ok_and(|right| right)
    })
    .with_context(|| format!("{:?}", right.tunnel.transfer(&left.key.public)))?;
    // And no more come.
    thread::sleep(Duration::from_millis(500));
    ensure!(
        counted()?,
        "more than that: {:?}",
        right.tunnel.transfer(&left.key.public)
    );
    for (end, peer) in [(left, right), (right, left)] {
        let handshake = end.tunnel.peer("latest-handshakes", &peer.key.public)?;
        let age = unix_time()?.abs_diff(handshake.parse()?);
        ensure!(age < 60, "the last handshake was {age} s ago");
    }
    Ok(())
}

/// Seconds since the epoch.
fn unix_time() -> Result<u64> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    Ok(now.as_secs())
}

pub(crate) fn a_raised_mtu_is_used(pairing: Pairing) -> Result<()> {
    let pair = Pair::new(pairing)?;
    pair.left.ping(RIGHT4)?;
    let usual = 1420;
    // Twice what fits into the datagrams of the loopback, and no round number.
    let big = 34_736;
    pair.mtu(big)?;
    for (end, peer) in [
        (&pair.left, RIGHT4),
        (&pair.right, LEFT4),
        (&pair.left, RIGHT6),
    ] {
        end.space
            .run(&format!(
                "ping -q -n -c 3 -i 0.01 -W 10 -M do -s 30000 {peer}"
            ))
            .context("with the big MTU")?;
    }
    for address in [RIGHT4, RIGHT6] {
        tcp(&pair.left.space, &pair.right.space, address, 16 << 20)?;
        let sizes = (0..34_000).step_by(3001);
        udp(&pair.left.space, &pair.right.space, address, sizes)?;
    }
    pair.meet("[::1]")?;
    tcp(&pair.right.space, &pair.left.space, LEFT6, 16 << 20).context("over IPv6")?;
    pair.mtu(usual)?;
    tcp(&pair.left.space, &pair.right.space, RIGHT4, 1 << 20).context("back to the usual MTU")
}

pub(crate) fn padding_fills_blocks_of_sixteen(pairing: Pairing) -> Result<()> {
    let pair = Pair::without_endpoints(pairing)?;
    let relay = Relay::listening(&pair)?;
    pair.left.ping(RIGHT4)?;
    for payload in [0, 1, 4, 5, 21, 100, 1000] {
        let before = relay.seen()?.len();
        pair.left
            .space
            .run(&format!("ping -q -n -c 1 -W 10 -s {payload} {RIGHT4}"))?;
        let inner = (20_usize + 8 + payload).next_multiple_of(16);
        let seen = relay.seen()?;
        let sizes: Vec<_> = seen[before..]
            .iter()
            .filter(|seen| seen.is_data())
            .map(|seen| seen.bytes.len())
            .collect();
        ensure!(
            sizes == [inner + 32; 2],
            "{payload} bytes of payload made datagrams of {sizes:?} bytes, not {}",
            inner + 32
        );
    }
    Ok(())
}

pub(crate) fn padding_never_exceeds_the_mtu(pairing: Pairing) -> Result<()> {
    let pair = Pair::by_cable(pairing)?;
    let (left, right) = (&pair.left, &pair.right);
    left.ip("address add 10.0.0.1/24 dev cable")?;
    right.ip("address add 10.0.0.2/24 dev cable")?;
    left.reaches("10.0.0.2")?;
    left.endpoint(right, "10.0.0.2:2")?;
    full_sized_packets_pass(&pair, &left.space, &right.space)
}

/// The same with an MTU that is set in another namespace than the daemon's.
pub(crate) fn padding_never_exceeds_an_mtu_set_in_another_namespace(
    pairing: Pairing,
) -> Result<()> {
    let pair = Pair::new(pairing)?;
    pair.mtu(1299)?;
    // A daemon gets no notification about a link in another namespace: it must poll.
    thread::sleep(Duration::from_secs(2));
    full_sized_packets_pass(&pair, &pair.under, &pair.under)
}

/// Packets just below an odd MTU pass where datagrams that exceed it by their padding would not.
fn full_sized_packets_pass(pair: &Pair, left: &Namespace, right: &Namespace) -> Result<()> {
    pair.mtu(1299)?;
    for under in [left, right] {
        under.run("nft add table ip narrow")?;
        under.run("nft add chain ip narrow in { type filter hook input priority 0 ; }")?;
        // 1299 bytes in 60 of headers.
        under.run("nft add rule ip narrow in ip length > 1359 counter drop")?;
    }
    pair.left.reaches(RIGHT4)?;
    for payload in 1255..=1271 {
        pair.right
            .space
            .run(&format!("ping -q -n -c 1 -W 5 -M do -s {payload} {LEFT4}"))?;
    }
    for under in [left, right] {
        let rules = under.run("nft list chain ip narrow in")?;
        ensure!(
            rules.contains("packets 0"),
            "datagrams were dropped: {rules}"
        );
    }
    Ok(())
}

pub(crate) fn a_tenth_of_the_datagrams_may_be_lost(pairing: Pairing) -> Result<()> {
    let pair = Pair::new(pairing)?;
    let under = &pair.under;
    under.run("nft add table inet lossy")?;
    under.run("nft add chain inet lossy in { type filter hook input priority 0 ; }")?;
    // Every tenth and not at random: if chance loses a segment several times in a row, TCP waits for minutes,
    // and the test would have to.
    under.run("nft add rule inet lossy in meta l4proto udp numgen inc mod 10 == 0 counter drop")?;
    // The handshake may be lost too, and is retried after five seconds.
    pair.left.reaches(RIGHT4)?;
    for (from, to, address) in [
        (&pair.left, &pair.right, RIGHT4),
        (&pair.right, &pair.left, LEFT6),
    ] {
        tcp(&from.space, &to.space, address, 1 << 20)?;
    }
    let rules = under.run("nft list chain inet lossy in")?;
    ensure!(
        !rules.contains("packets 0 "),
        "nothing was dropped: {rules}"
    );
    Ok(())
}

/// Datagrams that are duplicated and reordered are delivered once each.
pub(crate) fn reordered_and_doubled_datagrams_arrive_once(pairing: Pairing) -> Result<()> {
    let pair = Pair::without_endpoints(pairing)?;
    let mut held: Option<(crate::relay::Way, Vec<u8>)> = None;
    let mut count = 0_u32;
    let _relay = Relay::between(&pair, move |way, bytes| {
        let mut out = vec![bytes.to_vec(), bytes.to_vec()];
        count += 1;
        match held.take_if(|(held_way, _)| *held_way == way) {
            Some((_, late)) => out.push(late),
            // Only data: a delayed handshake would wait for a next datagram that never comes.
            None if count.is_multiple_of(3) && bytes.first() == Some(&4) && held.is_none() => {
                held = Some((way, bytes.to_vec()));
                return Vec::new();
            }
            None => {}
        }
        out
    })?;
    // A delayed datagram is sent with the next one.
    pair.left.reaches(RIGHT4)?;
    numbered(&pair.left.space, &pair.right.space, RIGHT4, 100)
}

pub(crate) fn an_idle_tunnel_is_silent(pairing: Pairing) -> Result<()> {
    let pair = Pair::without_endpoints(pairing)?;
    let relay = Relay::listening(&pair)?;
    thread::sleep(Duration::from_secs(1));
    ensure!(relay.seen()?.is_empty(), "datagrams without any traffic");
    let since = Instant::now();
    pair.left.ping(RIGHT4)?;
    // The keepalive after the last message comes after ten seconds, and then nothing more.
    thread::sleep(Duration::from_secs(12));
    let before = relay.seen()?.len();
    // Two handshakes, if both sides begin one, and the echo.
    ensure!(before <= 12, "{before} datagrams for one echo");
    thread::sleep(Duration::from_secs(12));
    let more = relay.seen()?.len() - before;
    // An initiation, its answer and the confirming keepalive.
    let needless = 3 * pairing.needless_handshakes(since.elapsed());
    ensure!(more <= needless, "{more} more datagrams while idle");
    Ok(())
}

pub(crate) fn a_link_that_was_down_carries_packets_again(pairing: Pairing) -> Result<()> {
    let pair = Pair::new(pairing)?;
    let (left, right) = (&pair.left, &pair.right);
    left.ping(RIGHT4)?;
    for _ in 0..3 {
        left.ip("link set {} down")?;
        left.ip("link set {} up")?;
        // A link that goes down loses its IPv6 addresses.
        left.ip(&format!("address add {LEFT6}/112 dev {{}} nodad"))?;
        left.settled()?;
        left.reaches(RIGHT4)?;
        right.reaches(LEFT6)?;
    }
    tcp(&left.space, &right.space, RIGHT4, 1 << 20)
}

pairs! {
    ipv4_and_ipv6_pass_over_ipv4;
    ipv4_and_ipv6_pass_over_ipv6;
    fifty_tcp_streams_share_a_tunnel;
    counters_are_exact;
    a_raised_mtu_is_used;
    padding_fills_blocks_of_sixteen;
    padding_never_exceeds_the_mtu;
    padding_never_exceeds_an_mtu_set_in_another_namespace
        fails with WireguardGo on
            left: "-M do", right: "-M do";
    a_tenth_of_the_datagrams_may_be_lost;
    reordered_and_doubled_datagrams_arrive_once;
    an_idle_tunnel_is_silent;
    a_link_that_was_down_carries_packets_again;
}
