//! Sources and endpoints of datagrams: roaming, NAT, and source addresses that are added and removed.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use selvedge_lab::netns::Namespace;
use selvedge_lab::process::wait_for;

use crate::pair::{End, LEFT_PORT, LEFT4, Pair, Pairing, RIGHT_PORT, RIGHT4, RIGHT6, reaches};
use crate::tunnel::{Key, Program, SOON, Tunnel};

/// Fails unless an end has this endpoint for its peer.
fn expect_endpoint(end: &End, peer: &End, endpoint: &str) -> Result<()> {
    let found = end.endpoint_of(peer)?;
    ensure!(
        found == endpoint,
        "the peer is at {found}, not at {endpoint}"
    );
    Ok(())
}

pub(crate) fn a_peer_may_roam_over_ipv4(pairing: Pairing) -> Result<()> {
    let pair = Pair::new(pairing)?;
    let (left, right) = (&pair.left, &pair.right);
    left.ping(RIGHT4)?;
    pair.under.run("ip address delete 127.0.0.1/8 dev lo")?;
    pair.under.run("ip address add 127.212.121.99/8 dev lo")?;
    left.tunnel.set("listen-port 9999")?;
    left.endpoint(right, "127.0.0.1:2")?;
    left.ping(RIGHT6)?;
    expect_endpoint(right, left, "127.212.121.99:9999")?;
    right.ping(LEFT4)
}

pub(crate) fn a_peer_may_roam_to_ipv6(pairing: Pairing) -> Result<()> {
    let pair = Pair::new(pairing)?;
    let (left, right) = (&pair.left, &pair.right);
    left.ping(RIGHT4)?;
    left.tunnel.set("listen-port 9998")?;
    left.endpoint(right, "[::1]:2")?;
    left.ping(RIGHT4)?;
    expect_endpoint(right, left, "[::1]:9998")?;
    right.ping(LEFT4)?;
    left.endpoint(right, "127.0.0.1:2")?;
    left.ping(RIGHT4)?;
    expect_endpoint(right, left, "127.0.0.1:9998")
}

/// Keepalives keep a peer reachable behind a NAT whose mappings end after four seconds.
pub(crate) fn a_keepalive_holds_a_nat_open(pairing: Pairing) -> Result<()> {
    let (nat, left, right) = (
        Namespace::new("nat")?,
        Namespace::new("left")?,
        Namespace::new("right")?,
    );
    left.veth("cable", &nat, "inside")?;
    right.veth("cable", &nat, "outside")?;
    for (space, address, device) in [
        (&left, "192.168.1.100/24", "cable"),
        (&nat, "192.168.1.1/24", "inside"),
        (&nat, "10.0.0.1/24", "outside"),
        (&right, "10.0.0.100/24", "cable"),
    ] {
        space.run(&format!("ip address add {address} dev {device}"))?;
    }
    left.run("ip route add default via 192.168.1.1")?;
    nat.run("nft add table ip nat")?;
    nat.run("nft add chain ip nat out { type nat hook postrouting priority 100 ; }")?;
    nat.run("nft add rule ip nat out oifname outside ip saddr 192.168.1.0/24 snat to 10.0.0.1")?;
    nat.sysctl("ipv4/ip_forward", "1")?;
    nat.sysctl("netfilter/nf_conntrack_udp_timeout", "4")?;
    nat.sysctl("netfilter/nf_conntrack_udp_timeout_stream", "4")?;
    reaches(&left, "10.0.0.100")?;

    let pair = Pair::hosts(pairing, nat, left, right)?;
    let (left, right) = (&pair.left, &pair.right);
    let behind = &left.tunnel;
    let peer = format!("peer {}", right.key.public);
    behind.set(&format!(
        "{peer} endpoint 10.0.0.100:2 persistent-keepalive 1"
    ))?;
    left.ping(RIGHT4)?;
    right.ping(LEFT4)?;
    expect_endpoint(right, left, "10.0.0.1:1")?;
    thread::sleep(Duration::from_secs(7));
    right.ping(LEFT4)?;
    behind.set(&format!("{peer} persistent-keepalive 0"))?;
    thread::sleep(Duration::from_secs(7));
    // The control: without keepalives the mapping ends.
    right.ping_fails(LEFT4)
}

/// Two hosts on a cable, 10.0.0.x/24 and fd00:aa::x/96.
fn on_a_cable(pairing: Pairing, left: &[u8], right: &[u8]) -> Result<Pair> {
    let pair = Pair::by_cable(pairing)?;
    for (end, addresses) in [(&pair.left, left), (&pair.right, right)] {
        // Otherwise the kernel removes the other addresses with the first.
        end.space
            .sysctl("ipv4/conf/cable/promote_secondaries", "1")?;
        for last in addresses {
            end.ip(&format!("address add 10.0.0.{last}/24 dev cable"))?;
            end.ip(&format!("address add fd00:aa::{last}/96 dev cable nodad"))?;
        }
        end.settled()?;
    }
    // A link that just went up silently drops packets for a moment.
    for last in right {
        pair.left.reaches(&format!("10.0.0.{last}"))?;
        pair.left.reaches(&format!("fd00:aa::{last}"))?;
    }
    Ok(pair)
}

pub(crate) fn a_removed_ipv4_source_is_replaced(pairing: Pairing) -> Result<()> {
    let pair = on_a_cable(pairing, &[1], &[2])?;
    let (left, right) = (&pair.left, &pair.right);
    left.endpoint(right, "10.0.0.2:2")?;
    left.ping(RIGHT4)?;
    left.ip("address add 10.0.0.10/24 dev cable")?;
    left.ip("address delete 10.0.0.1/24 dev cable")?;
    left.reaches(RIGHT4)?;
    expect_endpoint(right, left, "10.0.0.10:1")?;
    right.ping(LEFT4)
}

pub(crate) fn a_removed_ipv6_source_is_replaced(pairing: Pairing) -> Result<()> {
    let pair = on_a_cable(pairing, &[1], &[2])?;
    let (left, right) = (&pair.left, &pair.right);
    left.endpoint(right, "[fd00:aa::2]:2")?;
    left.ping(RIGHT4)?;
    left.ip("address add fd00:aa::10/96 dev cable nodad")?;
    left.settled()?;
    left.ip("address delete fd00:aa::1/96 dev cable")?;
    left.reaches(RIGHT4)?;
    expect_endpoint(right, left, "[fd00:aa::10]:1")?;
    right.ping(LEFT4)
}

/// The local address that the peer sent to is removed, and no route with it: datagrams get another source, and
/// none is lost. wireguard-go's code does not send again either, but it has forgotten the address before that
/// matters.
pub(crate) fn a_removed_local_address_costs_no_packet(pairing: Pairing) -> Result<()> {
    let pair = on_a_cable(pairing, &[1], &[3])?;
    let (left, right) = (&pair.left, &pair.right);
    left.ip("link add other type veth peer name nowhere")?;
    left.ip("link set nowhere up")?;
    left.ip("link set other up")?;
    left.ip("address add fd00:bb::1/128 dev other nodad")?;
    left.settled()?;
    right.ip("route add fd00:bb::1/128 via fd00:aa::1 dev cable")?;
    right.endpoint(left, "[fd00:bb::1]:1")?;
    right.ping(LEFT4)?;
    expect_endpoint(right, left, "[fd00:bb::1]:1")?;
    left.ip("address delete fd00:bb::1/128 dev other")?;
    left.ping(RIGHT4)
        .context("after the removal of the local address")?;
    expect_endpoint(right, left, "[fd00:aa::1]:1")
}

/// Several times, because wireguard-go keeps the addresses that it sends to in a pool and overwrites only the
/// first four bytes of a former IPv4 address with an IPv6 one: which entry it uses is chance.
pub(crate) fn an_address_of_one_family_does_not_spoil_the_other(pairing: Pairing) -> Result<()> {
    let pair = on_a_cable(pairing, &[1], &[2])?;
    let (left, right) = (&pair.left, &pair.right);
    for endpoint in ["10.0.0.2:2", "[fd00:aa::2]:2"].repeat(6) {
        left.endpoint(right, endpoint)?;
        left.ping(RIGHT4)
            .and_then(|()| right.ping(LEFT4))
            .with_context(|| format!("to {endpoint}"))?;
        let own = endpoint.replace("2:2", "1:1").replace("2]:2", "1]:1");
        expect_endpoint(right, left, &own)?;
    }
    Ok(())
}

/// A device with several addresses answers from the one that the peer sent to. Several times, see
/// [`an_address_of_one_family_does_not_spoil_the_other`].
pub(crate) fn the_source_of_an_answer_is_the_address_the_peer_sent_to(
    pairing: Pairing,
) -> Result<()> {
    let pair = on_a_cable(pairing, &[1, 2], &[3])?;
    let (left, right) = (&pair.left, &pair.right);
    let endpoints = [
        "10.0.0.1:1",
        "10.0.0.2:1",
        "[fd00:aa::1]:1",
        "[fd00:aa::2]:1",
    ];
    for endpoint in endpoints.repeat(4) {
        right.endpoint(left, endpoint)?;
        right
            .ping(LEFT4)
            .with_context(|| format!("calling {endpoint}"))?;
        expect_endpoint(right, left, endpoint)?;
    }
    Ok(())
}

/// The address that the peer sent to may belong to another interface than the route back.
pub(crate) fn the_source_of_an_answer_may_belong_to_another_interface(
    pairing: Pairing,
) -> Result<()> {
    let pair = on_a_cable(pairing, &[1], &[3])?;
    let (left, right) = (&pair.left, &pair.right);
    left.ip("link add other type veth peer name nowhere")?;
    left.ip("link set nowhere up")?;
    left.ip("link set other up")?;
    left.ip("address add 10.50.0.1/24 dev other")?;
    right.ip("route add 10.50.0.0/24 dev cable")?;
    right.endpoint(left, "10.50.0.1:1")?;
    right.ping(LEFT4)?;
    expect_endpoint(right, left, "10.50.0.1:1")
}

/// A better route through another interface is used as soon as it exists, with its own source.
pub(crate) fn a_better_route_is_used_with_its_own_source(pairing: Pairing) -> Result<()> {
    let pair = on_a_cable(pairing, &[1], &[2])?;
    let (left, right) = (&pair.left, &pair.right);
    left.space.veth("second", &right.space, "second")?;
    left.ip("address add 10.0.0.3/24 dev second noprefixroute")?;
    for device in ["cable", "second", "all"] {
        let key = format!("ipv4/conf/{device}/rp_filter");
        left.space.sysctl(&key, "0")?;
        right.space.sysctl(&key, "0")?;
    }
    left.ip("route flush dev cable")?;
    left.ip("route add 10.0.0.0/24 dev cable src 10.0.0.1 metric 2")?;
    left.endpoint(right, "10.0.0.2:2")?;
    left.ping(RIGHT4)?;
    expect_endpoint(right, left, "10.0.0.1:1")?;
    left.ip("route add 10.0.0.0/24 dev second src 10.0.0.3 metric 1")?;
    // The daemon notices it after a while.
    wait_for("the better route to be taken", SOON, || {
        left.ping(RIGHT4).is_ok() && expect_endpoint(right, left, "10.0.0.3:1").is_ok()
    })
    .map(drop)
}

pub(crate) fn a_changed_port_works_at_once(pairing: Pairing) -> Result<()> {
    let pair = Pair::new(pairing)?;
    let (left, right) = (&pair.left, &pair.right);
    right.ping(LEFT4)?;
    left.tunnel.set("listen-port 0")?;
    let port: u16 = left.tunnel.wg("show {} listen-port")?.parse()?;
    ensure!(port != 0 && port != LEFT_PORT, "port 0 gave port {port}");
    right.endpoint(left, &format!("127.0.0.1:{port}"))?;
    right.ping(LEFT4)?;
    let taken = left.tunnel.set(&format!("listen-port {RIGHT_PORT}"));
    ensure!(taken.is_err(), "a port that the other daemon has was taken");
    Ok(())
}

/// With a persistent keepalive, a device sends as soon as it is up and has a key.
pub(crate) fn keepalives_begin_when_the_link_comes_up(program: Program) -> Result<()> {
    for key_first in [true, false] {
        let space = Namespace::new("keepalive")?;
        let tunnel = Tunnel::start(program, &space)?;
        let (key, peer) = (Key::new()?, Key::new()?);
        let set_key = || tunnel.set(&format!("private-key {}", key.file()));
        if key_first {
            set_key()?;
        }
        tunnel.set(&format!(
            "peer {} endpoint 127.0.0.1:9 persistent-keepalive 1",
            peer.public
        ))?;
        let sent = || tunnel.transfer(&peer.public).map(|(_, sent)| sent);
        let up = || space.run(&format!("ip link set {} up", tunnel.name));
        if !key_first {
            up()?;
        }
        thread::sleep(Duration::from_secs(2));
        ensure!(sent()? == 0, "it sends too early (key first: {key_first})");
        if key_first {
            up()?;
        } else {
            set_key()?;
        }
        wait_for("an initiation", SOON, || sent().is_ok_and(|sent| sent > 0))?;
    }
    Ok(())
}

pairs! {
    a_peer_may_roam_over_ipv4;
    a_peer_may_roam_to_ipv6;
    a_keepalive_holds_a_nat_open;
    a_removed_ipv4_source_is_replaced;
    a_removed_ipv6_source_is_replaced;
    a_removed_local_address_costs_no_packet
        fails with WireguardGo on left: "the peer is at [fd00:aa::1]:1, not at [fd00:bb::1]:1";
    an_address_of_one_family_does_not_spoil_the_other
        fails with WireguardGo on left: "to [fd00:aa::2]:2", right: "to [fd00:aa::2]:2";
    the_source_of_an_answer_is_the_address_the_peer_sent_to
        fails with WireguardGo on
            left: "the peer is at 10.0.0.1:1, not at 10.0.0.2:1",
            right: "[fd00:aa::";
    the_source_of_an_answer_may_belong_to_another_interface
        fails with WireguardGo on left: "the peer is at 10.0.0.1:1, not at 10.50.0.1:1";
    a_better_route_is_used_with_its_own_source;
    a_changed_port_works_at_once;
}

devices! {
    keepalives_begin_when_the_link_comes_up fails with WireguardGo: "it sends too early";
}
