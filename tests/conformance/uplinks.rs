//! A host with two uplinks, whose default route moves from one to the other and back.
//!
//! Each provider forwards only datagrams with its own address as the source, and delivers datagrams to that
//! address whatever route the host has. So datagrams of the peer arrive through the earlier uplink until one has
//! reached the peer through the new one, which takes that provider half a second in half of the runs. The test
//! prints the figures.

use std::net::{IpAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use selvedge_lab::netns::Namespace;

use crate::pair::{LEFT4, Pair, Pairing, RIGHT4, reaches};

/// Between two numbers.
const PACE: Duration = Duration::from_millis(5);
/// How long each route stays.
const KEPT: Duration = Duration::from_secs(3);
/// How many times the route moves.
const MOVES: usize = 6;
/// How long a slow provider forwards none of the host's datagrams at first.
const SLOW: Duration = Duration::from_millis(500);
/// The longest gap of a move beyond that: less than the timeout of a handshake.
const GAP: Duration = Duration::from_secs(1);

struct Uplinks {
    pair: Pair,
    /// Dropped after the pair.
    providers: [Namespace; 2],
}

impl Uplinks {
    /// The host is `left`; the peer, `right`, is at 10.9.0.9.
    fn new(pairing: Pairing) -> Result<Self> {
        let (host, far) = (Namespace::new("host")?, Namespace::new("far")?);
        let providers = [Namespace::new("isp1")?, Namespace::new("isp2")?];
        far.run("ip link set lo up")?;
        far.run("ip address add 10.9.0.9/32 dev lo")?;
        for space in [&host, &far] {
            space.sysctl("ipv4/conf/all/rp_filter", "0")?;
            space.sysctl("ipv4/conf/default/rp_filter", "0")?;
        }
        for (n, provider) in (1..).zip(&providers) {
            let (up, out) = (format!("up{n}"), format!("out{n}"));
            host.veth(&up, provider, "in")?;
            provider.veth("out", &far, &out)?;
            host.sysctl(&format!("ipv4/conf/{up}/rp_filter"), "0")?;
            far.sysctl(&format!("ipv4/conf/{out}/rp_filter"), "0")?;
            host.run(&format!("ip address add 10.{n}.0.2/24 dev {up}"))?;
            provider.run(&format!("ip address add 10.{n}.0.1/24 dev in"))?;
            provider.run(&format!("ip address add 10.1{n}.0.1/24 dev out"))?;
            far.run(&format!("ip address add 10.1{n}.0.9/24 dev {out}"))?;
            provider.run(&format!("ip route add 10.9.0.9/32 via 10.1{n}.0.9"))?;
            far.run(&format!(
                "ip route add 10.{n}.0.0/24 via 10.1{n}.0.1 src 10.9.0.9"
            ))?;
            provider.sysctl("ipv4/ip_forward", "1")?;
            provider.run("nft add table ip valid")?;
            provider
                .run("nft add chain ip valid hold { type filter hook forward priority -1 ; }")?;
            provider.run("nft add chain ip valid out { type filter hook forward priority 0 ; }")?;
            provider.run(&format!(
                "nft add rule ip valid out iifname in ip saddr != 10.{n}.0.0/24 counter drop"
            ))?;
        }
        host.run("ip route add default via 10.1.0.1")?;
        reaches(&host, "10.9.0.9")?;
        let under = Namespace::new("under")?;
        let pair = Pair::hosts(pairing, under, host, far)?;
        Ok(Self { pair, providers })
    }

    /// The number of datagrams that the providers dropped because of their source.
    fn refused(&self) -> Result<u64> {
        let mut refused = 0;
        for provider in &self.providers {
            let rules = provider.run("nft list chain ip valid out")?;
            let count = rules.split("packets ").nth(1).context("a counter")?;
            let count = count.split_whitespace().next().context("a number")?;
            refused += count.parse::<u64>()?;
        }
        Ok(refused)
    }
}

/// Sends numbers until `stop` is set; returns how many.
fn send(space: &Namespace, to: (&str, u16), stop: &AtomicBool) -> Result<u32> {
    let socket = space.within(|| UdpSocket::bind("0.0.0.0:0"))?;
    socket.connect(to)?;
    let mut number = 0_u32;
    while !stop.load(Ordering::Relaxed) {
        // Datagrams without a route are lost.
        let _ = socket.send(&number.to_be_bytes());
        number += 1;
        thread::sleep(PACE);
    }
    Ok(number)
}

/// Receives numbers until `stop` is set; returns the time of each arrival.
fn receive(socket: &UdpSocket, stop: &AtomicBool) -> Vec<Instant> {
    let mut arrivals = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        if socket.recv(&mut [0; 4]).is_ok() {
            arrivals.push(Instant::now());
        }
    }
    arrivals
}

fn listen(space: &Namespace, address: &str) -> Result<UdpSocket> {
    let address: IpAddr = address.parse()?;
    let socket = space.within(|| UdpSocket::bind((address, 0)))?;
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    Ok(socket)
}

/// The longest time between two arrivals, from `since` on.
fn longest_gap(arrivals: &[Instant], since: Instant, until: Instant) -> Duration {
    let within = arrivals
        .iter()
        .copied()
        .filter(|at| (since..until).contains(at));
    let times: Vec<_> = [since].into_iter().chain(within).chain([until]).collect();
    let gaps = times.windows(2).map(|pair| pair[1] - pair[0]);
    gaps.max().unwrap_or_default()
}

/// The default route moves while both sides send, and the host's datagrams arrive through the new uplink.
pub(crate) fn the_source_follows_the_default_route(pairing: Pairing) -> Result<()> {
    for slow in [Duration::ZERO, SLOW] {
        moves(pairing, slow).with_context(|| format!("with a provider that takes {slow:?}"))?;
    }
    Ok(())
}

fn moves(pairing: Pairing, slow: Duration) -> Result<()> {
    let uplinks = Uplinks::new(pairing)?;
    let (left, right) = (&uplinks.pair.left, &uplinks.pair.right);
    left.endpoint(right, "10.9.0.9:2")?;
    left.ping(RIGHT4)?;
    let (inward, outward) = (listen(&left.space, LEFT4)?, listen(&right.space, RIGHT4)?);
    let (to_left, to_right) = (inward.local_addr()?.port(), outward.local_addr()?.port());
    let stop = AtomicBool::new(false);
    let (arrivals, moved, sent) = thread::scope(|scope| -> Result<_> {
        let senders = [
            scope.spawn(|| send(&left.space, (RIGHT4, to_right), &stop)),
            scope.spawn(|| send(&right.space, (LEFT4, to_left), &stop)),
        ];
        let receivers = [
            scope.spawn(|| receive(&outward, &stop)),
            scope.spawn(|| receive(&inward, &stop)),
        ];
        let mut moved = Vec::new();
        let mut follow = || -> Result<()> {
            thread::sleep(KEPT);
            for n in 0..MOVES {
                let uplink = 2 - n % 2;
                let provider = &uplinks.providers[uplink - 1];
                if !slow.is_zero() {
                    provider.run("nft add rule ip valid hold iifname in drop")?;
                }
                left.ip(&format!("route replace default via 10.{uplink}.0.1"))?;
                moved.push(Instant::now());
                thread::sleep(slow);
                provider.run("nft flush chain ip valid hold")?;
                thread::sleep(KEPT);
            }
            moved.push(Instant::now());
            Ok(())
        };
        let followed = follow();
        stop.store(true, Ordering::Relaxed);
        let sent: u32 = senders
            .into_iter()
            .map(|sender| sender.join().unwrap())
            .sum::<Result<u32>>()?;
        let arrivals = receivers.map(|receiver| receiver.join().unwrap());
        followed?;
        Ok((arrivals, moved, sent))
    })?;

    let mut worst = Duration::ZERO;
    for (n, times) in moved.windows(2).enumerate() {
        let gaps = [0, 1].map(|way| longest_gap(&arrivals[way], times[0], times[1]));
        println!(
            "{pairing:?} taking {slow:?}, move {n}: longest gap outward {:?}, inward {:?}",
            gaps[0], gaps[1]
        );
        worst = worst.max(gaps[0]).max(gaps[1]);
    }
    let arrived = arrivals.iter().map(Vec::len).sum::<usize>();
    println!(
        "{pairing:?} taking {slow:?}: {arrived} of {sent} arrived, {} dropped for their source",
        uplinks.refused()?
    );
    ensure!(
        worst < slow + GAP,
        "nothing arrived for {worst:?} after a move"
    );
    Ok(())
}

mod ours {
    use crate::pair::Pairing;
    use crate::tunnel::Program;

    #[test]
    fn the_source_follows_the_default_route() {
        for right in [Program::Selvedge, Program::WireguardGo] {
            let pairing = Pairing {
                left: Program::Selvedge,
                right,
            };
            crate::judge(&[], || super::the_source_follows_the_default_route(pairing));
        }
    }
}
