//! Tunnels among routes, marks, namespaces and other tunnels.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use selvedge_lab::netns::Namespace;
use selvedge_lab::process::wait_for;

use crate::pair::{End, LEFT4, LEFT6, Pair, Pairing, RIGHT4, RIGHT6, reaches, settled};
use crate::traffic::{tcp, tcp_within, udp};
use crate::tunnel::{Key, Program, SOON, Tunnel};

/// Two hosts on a cable, 10.0.0.1 and 10.0.0.2, and the tunnel between them up.
fn hosts(pairing: Pairing) -> Result<Pair> {
    let pair = Pair::by_cable(pairing)?;
    let (left, right) = (&pair.left, &pair.right);
    left.ip("address add 10.0.0.1/24 dev cable")?;
    left.ip("address add fd00:aa::1/96 dev cable nodad")?;
    right.ip("address add 10.0.0.2/24 dev cable")?;
    right.ip("address add fd00:aa::2/96 dev cable nodad")?;
    cabled(&pair)?;
    left.endpoint(right, "10.0.0.2:2")?;
    left.reaches(RIGHT4)?;
    Ok(pair)
}

/// Waits until the cable carries packets: a link that just went up silently drops them for a moment.
fn cabled(pair: &Pair) -> Result<()> {
    pair.left.settled()?;
    pair.right.settled()?;
    pair.left.reaches("10.0.0.2")
}

/// A pair whose UDP sockets are in the namespaces of another pair's links, and reach each other through that
/// pair's tunnel.
fn nested(pairing: Pairing, outer: &Pair) -> Result<(End, End)> {
    let (outer_left, outer_right) = (&outer.left, &outer.right);
    for (end, peer, own, other) in [
        (outer_left, outer_right, "fd00::5:1", "fd00::5:2"),
        (outer_right, outer_left, "fd00::5:2", "fd00::5:1"),
    ] {
        end.ip("address flush dev {}")?;
        end.ip(&format!("address add {own}/112 dev {{}} nodad"))?;
        end.settled()?;
        end.tunnel
            .set(&format!("peer {} allowed-ips {other}/128", peer.key.public))?;
    }
    let left = End::over(pairing.left, &outer_left.space, "inleft")?;
    let right = End::over(pairing.right, &outer_right.space, "inright")?;
    let psk = Key::new()?;
    for (end, peer, own, other, endpoint) in [
        (
            &left,
            &right,
            [LEFT4, LEFT6],
            [RIGHT4, RIGHT6],
            "[fd00::5:2]:5",
        ),
        (
            &right,
            &left,
            [RIGHT4, RIGHT6],
            [LEFT4, LEFT6],
            "[fd00::5:1]:5",
        ),
    ] {
        end.configure(5, &psk, peer, own, other)?;
        // With 80 bytes of headers, and without padding that could exceed the outer tunnel's MTU.
        end.ip("link set {} mtu 1328")?;
        end.endpoint(peer, endpoint)?;
    }
    Ok((left, right))
}

pub(crate) fn a_tunnel_carries_a_tunnel(pairing: Pairing) -> Result<()> {
    let outer = Pair::new(pairing)?;
    let (left, right) = nested(pairing, &outer)?;
    left.ping(RIGHT4)?;
    right.ping(LEFT6)?;
    for address in [RIGHT4, RIGHT6] {
        tcp(&left.space, &right.space, address, 8 << 20)?;
        udp(&left.space, &right.space, address, (0..1280).step_by(101))?;
    }
    tcp(&right.space, &left.space, LEFT4, 8 << 20)
}

/// A route of a tunnel's datagrams back into the tunnel, through another one: each loops a few times only, and ten
/// echo requests cause no more traffic than netns.sh permits the kernel. Both daemons survive it, and the tunnel
/// works again without the route.
pub(crate) fn a_routing_loop_is_bounded_and_ends_with_its_cause(pairing: Pairing) -> Result<()> {
    let mut outer = Pair::new(pairing)?;
    let (mut inner, _right) = nested(pairing, &outer)?;
    inner.ping(RIGHT4)?;
    // The inner tunnel's link joins the outer tunnel's sockets, whose peer is now behind it.
    let link = &inner.tunnel;
    link.move_link(&inner.space, &outer.under)?;
    let under = &outer.under;
    under.run(&format!("ip address add {LEFT4}/24 dev {}", link.name))?;
    under.run(&format!("ip link set {} up", link.name))?;
    reaches(under, RIGHT4)?;
    let carried = || -> Result<u64> {
        let path = format!("/sys/class/net/{}/statistics/tx_bytes", link.name);
        Ok(under.run(&format!("cat {path}"))?.trim().parse()?)
    };
    outer.left.endpoint(&outer.right, &format!("{RIGHT4}:7"))?;
    let before = carried()?;
    let answered = under.attempt(&format!("ping -q -n -c 10 -f -W 1 {RIGHT4}"))?;
    ensure!(!answered.status.success(), "the loop answers");
    thread::sleep(Duration::from_secs(1));
    let grown = carried()? - before;
    ensure!(grown < 70_000, "{grown} bytes went round");
    outer.left.endpoint(&outer.right, "127.0.0.1:2")?;
    reaches(under, RIGHT4)?;
    ensure!(
        !inner.tunnel.ended() && !outer.left.tunnel.ended(),
        "a daemon has ended"
    );
    Ok(())
}

/// A peer behind another peer; and then a peer behind itself, which is unreachable.
pub(crate) fn a_peer_may_be_behind_a_peer_but_not_behind_itself(pairing: Pairing) -> Result<()> {
    let mut pair = hosts(pairing)?;
    let (left, right) = (&pair.left, &pair.right);
    let third = Tunnel::start(pairing.right, &right.space)?;
    let key = Key::new()?;
    third.set(&format!(
        "private-key {} listen-port 5 peer {} allowed-ips 192.168.242.1/32",
        key.file(),
        left.key.public
    ))?;
    right.ip(&format!("address add 192.168.242.2/24 dev {}", third.name))?;
    right.ip(&format!("link set {} up", third.name))?;
    left.tunnel.set(&format!(
        "peer {} allowed-ips 192.168.242.2/32 endpoint {RIGHT4}:5",
        key.public
    ))?;
    left.ip("address add 192.168.242.1/24 dev {}")?;
    left.reaches("192.168.242.2")?;
    drop(third);
    left.tunnel
        .set(&format!("peer {} endpoint 192.168.242.2:5", key.public))?;
    left.ping_fails("192.168.242.2")?;
    ensure!(!pair.left.tunnel.ended(), "the daemon has ended");
    let left = &pair.left;
    left.tunnel.set(&format!("peer {} remove", key.public))?;
    left.reaches(RIGHT4)
}

/// All traffic goes into the tunnel except the marked datagrams of the tunnel itself, as wg-quick sets it up.
pub(crate) fn a_mark_keeps_the_datagrams_out_of_the_default_route_into_the_tunnel(
    pairing: Pairing,
) -> Result<()> {
    let pair = hosts(pairing)?;
    let (left, right) = (&pair.left, &pair.right);
    left.ip("-6 route add default via fd00:aa::2")?;
    right.ip("address add 192.168.99.7/32 dev {}")?;
    right.ip("address add abab::1111/128 dev {} nodad")?;
    right.settled()?;
    left.tunnel.set(&format!(
        "fwmark 51820 peer {} allowed-ips 192.168.99.7/32,abab::1111/128",
        right.key.public
    ))?;
    ensure!(left.tunnel.wg("show {} fwmark")? == "0xca6c");
    for family in ["-4", "-6"] {
        left.ip(&format!("{family} route add default dev {{}} table 51820"))?;
        left.ip(&format!("{family} rule add not fwmark 51820 table 51820"))?;
        left.ip(&format!(
            "{family} rule add table main suppress_prefixlength 0"
        ))?;
    }
    left.space.sysctl("ipv4/conf/all/rp_filter", "0")?;
    left.space.sysctl("ipv4/conf/cable/rp_filter", "0")?;
    left.space.run("nft add table inet marks")?;
    left.space
        .run("nft add chain inet marks out { type filter hook output priority 0 ; }")?;
    left.space
        .run("nft add rule inet marks out oifname cable udp dport 2 meta mark != 51820 counter")?;
    for address in ["192.168.99.7", "abab::1111"] {
        left.space
            .run(&format!("ping -q -n -c 100 -f -W 10 {address}"))?;
    }
    let unmarked = left.space.run("nft list chain inet marks out")?;
    ensure!(
        unmarked.contains("packets 0"),
        "unmarked datagrams: {unmarked}"
    );
    left.tunnel.set("fwmark 0")?;
    ensure!(left.tunnel.wg("show {} fwmark")? == "off");
    Ok(())
}

/// Packets bound to the tunnel's interface, and packets that are rerouted because of a mark.
pub(crate) fn bound_and_marked_packets_pass(pairing: Pairing) -> Result<()> {
    let pair = hosts(pairing)?;
    let left = &pair.left;
    let bound = format!("ping -q -n -c 1 -W 10 -I {} {RIGHT4}", left.tunnel.name);
    left.space.run(&bound)?;
    left.space.run("nft add table ip marks")?;
    left.space
        .run("nft add chain ip marks out { type route hook output priority -150 ; }")?;
    left.space
        .run("nft add rule ip marks out meta mark set 1")?;
    left.ping(RIGHT4)?;
    left.space.run(&bound).map(drop)
}

/// The sender gets an ICMP error for an address without a peer, or of a peer without an endpoint.
pub(crate) fn destinations_without_a_peer_or_endpoint_are_unreachable(
    program: Program,
) -> Result<()> {
    let space = Namespace::new("icmp")?;
    let tunnel = Tunnel::start(program, &space)?;
    let key = Key::new()?;
    tunnel.set(&format!(
        "private-key {} peer {} allowed-ips 192.168.241.2/32,fd00::2/128",
        key.file(),
        Key::new()?.public
    ))?;
    let name = &tunnel.name;
    space.run(&format!("ip address add {LEFT4}/24 dev {name}"))?;
    space.run(&format!("ip address add {LEFT6}/112 dev {name} nodad"))?;
    space.run(&format!("ip link set {name} up"))?;
    settled(&space)?;
    // .2 is a peer without an endpoint, .3 is no peer.
    for address in [RIGHT4, "192.168.241.3", RIGHT6, "fd00::3"] {
        let output = space.attempt(&format!("ping -n -c 1 -W 5 {address}"))?;
        let report = String::from_utf8_lossy(&output.stdout).to_lowercase();
        ensure!(
            report.contains("unreachable"),
            "no ICMP for {address}: {report}"
        );
    }
    Ok(())
}

/// A router reports a removed peer with the right source address.
pub(crate) fn a_removed_peer_is_reported_by_the_router(pairing: Pairing) -> Result<()> {
    let pair = hosts(pairing)?;
    let (left, right) = (&pair.left, &pair.right);
    right.space.sysctl("ipv4/ip_forward", "1")?;
    let client = Namespace::new("client")?;
    client.veth("eth0", &right.space, "clients")?;
    client.run("ip address add 10.1.0.2/24 dev eth0")?;
    right.ip("address add 10.1.0.1/24 dev clients")?;
    client.run("ip route add 192.168.241.0/24 via 10.1.0.1")?;
    left.ip("route add 10.1.0.0/24 dev {}")?;
    left.tunnel.set(&format!(
        "peer {} allowed-ips {RIGHT4}/32,10.1.0.0/24",
        right.key.public
    ))?;
    reaches(&client, LEFT4)?;
    right
        .tunnel
        .set(&format!("peer {} remove", left.key.public))?;
    let output = client.attempt(&format!("ping -n -c 1 -W 5 {LEFT4}"))?;
    let report = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        report.contains("Destination Host Unreachable"),
        "no ICMP: {report}"
    );
    Ok(())
}

/// Adds a rule in a namespace that counts the packets that its words describe.
fn count(space: &Namespace, hook: &str, words: &str) -> Result<()> {
    space.run("nft add table inet count")?;
    space.run(&format!(
        "nft add chain inet count {hook} {{ type filter hook {hook} priority 0 ; }}"
    ))?;
    space
        .run(&format!("nft add rule inet count {hook} {words}"))
        .map(drop)
}

fn counted(space: &Namespace, hook: &str) -> Result<bool> {
    let rules = space.run(&format!("nft list chain inet count {hook}"))?;
    Ok(!rules.contains("packets 0 "))
}

pub(crate) fn ecn_is_copied_to_the_datagram(pairing: Pairing) -> Result<()> {
    let pair = Pair::new(pairing)?;
    pair.left.ping(RIGHT4)?;
    count(&pair.under, "input", "udp dport 2 ip ecn ect0 counter")?;
    pair.left
        .space
        .run(&format!("ping -q -n -c 3 -i 0.1 -W 10 -Q 2 {RIGHT4}"))?;
    ensure!(counted(&pair.under, "input")?, "ECT(0) stayed inside");
    count(
        &pair.under,
        "prerouting",
        "udp dport 2 ip6 ecn ect0 counter",
    )?;
    pair.meet("[::1]")?;
    pair.left
        .space
        .run(&format!("ping -q -n -c 3 -i 0.1 -W 10 -Q 2 {RIGHT6}"))?;
    ensure!(
        counted(&pair.under, "prerouting")?,
        "ECT(0) stayed inside of IPv6"
    );
    Ok(())
}

pub(crate) fn congestion_marks_reach_the_inner_packets(pairing: Pairing) -> Result<()> {
    let pair = Pair::new(pairing)?;
    pair.left.ping(RIGHT4)?;
    count(&pair.under, "output", "udp dport 2 ip ecn set ce counter")?;
    count(
        &pair.right.space,
        "input",
        "icmp type echo-request ip ecn ce counter",
    )?;
    pair.left
        .space
        .run(&format!("ping -q -n -c 3 -i 0.1 -W 10 -Q 2 {RIGHT4}"))?;
    ensure!(
        counted(&pair.under, "output")?,
        "the mark was not set outside"
    );
    ensure!(counted(&pair.right.space, "input")?, "the mark was lost");
    Ok(())
}

pub(crate) fn dscp_does_not_leak(pairing: Pairing) -> Result<()> {
    let pair = Pair::new(pairing)?;
    let under = &pair.under;
    let classes = [
        ("input", "ip dscp != cs0 counter"),
        ("prerouting", "ip6 dscp != cs0 counter"),
    ];
    for (hook, words) in classes {
        count(under, hook, words)?;
    }
    for underlay in ["127.0.0.1", "[::1]"] {
        pair.meet(underlay)?;
        for address in [RIGHT4, RIGHT6] {
            pair.left
                .space
                .run(&format!("ping -q -n -c 3 -i 0.1 -W 10 -Q 0xb8 {address}"))?;
        }
    }
    let leaks = || -> Result<_> { Ok([counted(under, "input")?, counted(under, "prerouting")?]) };
    ensure!(leaks()? == [false; 2], "the class of traffic shows outside");
    // The control: outside of the tunnel it is visible.
    for address in ["127.0.0.1", "::1"] {
        under.run(&format!("ping -q -n -c 1 -W 10 -Q 0xb8 {address}"))?;
    }
    ensure!(leaks()? == [true; 2], "nothing is counted at all");
    Ok(())
}

pub(crate) fn a_link_may_move_to_another_namespace_again(pairing: Pairing) -> Result<()> {
    let mut pair = Pair::new(pairing)?;
    pair.left.ping(RIGHT4)?;
    for label in ["second", "third"] {
        let next = Namespace::new(label)?;
        pair.left.tunnel.move_link(&pair.left.space, &next)?;
        pair.left.space = next;
        let left = &pair.left;
        left.ip(&format!("address add {LEFT4}/24 dev {{}}"))?;
        left.ip("link set {} up")?;
        left.reaches(RIGHT4)?;
        pair.right.reaches(LEFT4)?;
    }
    tcp(&pair.left.space, &pair.right.space, RIGHT4, 1 << 20)
}

pub(crate) fn a_link_deleted_with_its_namespace_ends_the_daemon(program: Program) -> Result<()> {
    let under = Namespace::new("under")?;
    let space = Namespace::new("doomed")?;
    let mut tunnel = Tunnel::start(program, &under)?;
    tunnel.move_link(&under, &space)?;
    space.run(&format!("ip link set {} up", tunnel.name))?;
    drop(space);
    wait_for("the end", SOON, || tunnel.ended())?;
    ensure!(!tunnel.socket().exists(), "the socket is still there");
    Ok(())
}

/// The endpoint may be unreachable for a while, with each error that the kernel reports.
pub(crate) fn the_tunnel_recovers_with_the_underlay(pairing: Pairing) -> Result<()> {
    let mut pair = hosts(pairing)?;
    let ways: [(&str, &str); 4] = [
        (
            "route add unreachable 10.0.0.2",
            "route delete unreachable 10.0.0.2",
        ),
        (
            "route add prohibit 10.0.0.2",
            "route delete prohibit 10.0.0.2",
        ),
        (
            "route add blackhole 10.0.0.2",
            "route delete blackhole 10.0.0.2",
        ),
        ("link set cable down", "link set cable up"),
    ];
    for (away, back) in ways {
        pair.left.ip(away)?;
        pair.left.ping_fails(RIGHT4)?;
        pair.left.ip(back)?;
        let left = &pair.left;
        left.reaches(RIGHT4).context(back)?;
        ensure!(
            !pair.left.tunnel.ended(),
            "the daemon has ended after {away}"
        );
    }
    tcp(&pair.left.space, &pair.right.space, RIGHT4, 1 << 20)
}

/// A handshake that a firewall or a missing route keeps from being sent is retried, and the log reports each
/// obstacle once.
pub(crate) fn a_refused_handshake_is_retried(pairing: Pairing) -> Result<()> {
    let pair = hosts(pairing)?;
    let left = &pair.left;
    let refuse = "nft add table ip no ; \
        nft add chain ip no out { type filter hook output priority 0 \\; } ; \
        nft add rule ip no out udp dport 2 drop";
    let ways = [
        (refuse, "nft delete table ip no"),
        (
            "ip route add unreachable 10.0.0.2",
            "ip route delete unreachable 10.0.0.2",
        ),
        ("ip link set cable down", "ip link set cable up"),
    ];
    let peer = format!("peer {}", pair.right.key.public);
    for (refused, granted) in ways {
        left.space.sh(refused)?;
        left.tunnel.set(&format!("{peer} remove"))?;
        left.tunnel.set(&format!(
            "{peer} preshared-key {} allowed-ips {RIGHT4}/32 endpoint 10.0.0.2:2",
            pair.psk.file()
        ))?;
        left.ping_fails(RIGHT4)?;
        left.ping_fails(RIGHT4)?;
        left.space.sh(granted)?;
        left.reaches(RIGHT4).context(granted)?;
    }
    if pairing.left == Program::Selvedge {
        let log = left.tunnel.log();
        let reports = log.matches("refuses to send").count();
        ensure!(reports == ways.len(), "{reports} reports:\n{log}");
    }
    Ok(())
}

/// TCP works even if the underlay's MTU is too small for full datagrams.
pub(crate) fn a_narrow_underlay_still_carries_tcp(pairing: Pairing) -> Result<()> {
    let pair = hosts(pairing)?;
    for end in [&pair.left, &pair.right] {
        end.ip("link set cable mtu 1400")?;
    }
    for (from, to, address) in [
        (&pair.left, &pair.right, RIGHT4),
        (&pair.right, &pair.left, LEFT6),
    ] {
        // Longer than it takes, and shorter than with wireguard-go's retransmissions.
        let limit = Duration::from_secs(30);
        tcp_within(limit, &from.space, &to.space, address, 4 << 20)?;
    }
    Ok(())
}

pairs! {
    a_narrow_underlay_still_carries_tcp
        fails with WireguardGo on left: "ing over TCP", right: "ing over TCP";
    a_tunnel_carries_a_tunnel;
    a_routing_loop_is_bounded_and_ends_with_its_cause
        fails with WireguardGo on left: "bytes went round";
    a_peer_may_be_behind_a_peer_but_not_behind_itself;
    a_mark_keeps_the_datagrams_out_of_the_default_route_into_the_tunnel;
    bound_and_marked_packets_pass;
    a_removed_peer_is_reported_by_the_router fails with WireguardGo on right: "no ICMP";
    ecn_is_copied_to_the_datagram fails with WireguardGo on left: "ECT(0) stayed inside";
    congestion_marks_reach_the_inner_packets fails with WireguardGo on right: "the mark was lost";
    dscp_does_not_leak;
    a_link_may_move_to_another_namespace_again;
    the_tunnel_recovers_with_the_underlay;
    a_refused_handshake_is_retried;
}

devices! {
    destinations_without_a_peer_or_endpoint_are_unreachable fails with WireguardGo: "no ICMP";
    a_link_deleted_with_its_namespace_ends_the_daemon;
}
