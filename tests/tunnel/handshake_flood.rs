//! A device under a flood of handshakes: what it carries meanwhile, what it spends, whom it answers.
//!
//! Strangers that know the public key send 100,000 valid initiations per second, from one address and
//! from 65,536 made-up ones (20,000 from 16,384 to the program that is not optimized), on the same CPUs.
//! The tunnel goes on, memory does not grow, no answer is longer than its question, a new peer gets in,
//! and afterwards all is as before.
//!
//! The figures are printed. They are fit to compare with the optimized program only
//! (`bench/flood.sh`); here they fail where one is five times worse than it should be.
#![expect(
    clippy::disallowed_methods,
    reason = "a harness starts programs and looks at the clock"
)]
#![expect(clippy::unwrap_used, reason = "a failed thread is a failed test")]
#![expect(clippy::print_stdout, reason = "the figures are what it is for")]

mod generator;

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use selvedge_lab::netns::Namespace;
use selvedge_lab::process::wait_for;

use self::generator::{Flood, Sources};
use crate::tunnel::{Key, Program, SOON, Tunnel};

/// Initiations per second; a fifth of them for the program that is not optimized, which takes five times
/// as long for each and would have no CPU left where others have work, too.
const RATE: u32 = if cfg!(debug_assertions) {
    20_000
} else {
    100_000
};
/// So many at least make it a flood where others have the CPUs, too: to answer them would take one.
const FLOOD: f64 = 5_000.0;
/// For how long a throughput is measured.
const MEASURE: Duration = Duration::from_secs(3);

/// What should be left of the throughput.
const SHARE: f64 = 0.75;
/// In what time a new peer should get in.
const NEWCOMER: Duration = Duration::from_secs(5);
/// By how much the daemon's memory may grow, in KiB.
const MEMORY: u64 = 16 << 10;

const VICTIM: Ipv4Addr = Ipv4Addr::new(10, 97, 0, 1);
const PORT: u16 = 51820;

/// A device with a peer, and a link to strangers.
struct Arena {
    victim: Tunnel,
    victim_key: Key,
    friend: Tunnel,
    newcomer: Tunnel,
    newcomer_key: Key,
    here: Namespace,
    there: Namespace,
    outside: Namespace,
    elsewhere: Namespace,
}

impl Arena {
    fn new() -> Result<Self> {
        let here = Namespace::new("victim")?;
        let [there, outside, elsewhere] = ["friend", "outside", "newcomer"].map(Namespace::new);
        let (there, outside, elsewhere) = (there?, outside?, elsewhere?);
        for (n, other, device) in [
            (0, &outside, "out"),
            (1, &there, "friend"),
            (2, &elsewhere, "new"),
        ] {
            here.veth(device, other, "wire")?;
            here.run(&format!("ip address add 10.97.{n}.1/30 dev {device}"))?;
            other.run(&format!("ip address add 10.97.{n}.2/30 dev wire"))?;
            here.sysctl(&format!("ipv4/conf/{device}/rp_filter"), "0")?;
        }
        here.sysctl("ipv4/conf/all/rp_filter", "0")?;
        here.run("ip route add 198.18.0.0/16 via 10.97.0.2")?;
        // Of the answers, those that are longer than a request: 148 bytes and UDP's eight.
        outside.run("nft add table ip answers")?;
        outside.run(
            "nft add chain ip answers heard { type filter hook prerouting priority -300 ; }",
        )?;
        outside.run("nft add rule ip answers heard udp sport 51820 udp length > 156 counter")?;
        outside.run("nft add rule ip answers heard udp sport 51820 counter drop")?;

        let [victim_key, friend_key, newcomer_key] = [Key::new()?, Key::new()?, Key::new()?];
        let victim = Tunnel::start(Program::Selvedge, &here)?;
        let friend = Tunnel::start(Program::Selvedge, &there)?;
        let newcomer = Tunnel::start(Program::Selvedge, &elsewhere)?;
        victim.set(&format!(
            "private-key {} listen-port {PORT} peer {} allowed-ips 10.96.0.2/32 endpoint 10.97.1.2:{PORT}",
            victim_key.file(),
            friend_key.public
        ))?;
        friend.set(&format!(
            "private-key {} listen-port {PORT} peer {} allowed-ips 10.96.0.1/32 endpoint 10.97.1.1:{PORT}",
            friend_key.file(),
            victim_key.public
        ))?;
        newcomer.set(&format!("private-key {}", newcomer_key.file()))?;
        for (space, tunnel, own) in [
            (&here, &victim, 1),
            (&there, &friend, 2),
            (&elsewhere, &newcomer, 3),
        ] {
            space.run(&format!(
                "ip address add 10.96.0.{own}/24 dev {}",
                tunnel.name
            ))?;
            space.run(&format!("ip link set {} up", tunnel.name))?;
        }
        // Lines that just went up drop what they are given for a moment, and a handshake that is lost is
        // tried again after five seconds.
        wait_for("the friend's first answer", SOON, || {
            here.run("ping -q -n -c 1 -W 1 10.96.0.2").is_ok()
        })?;
        for (space, other) in [(&outside, "10.97.0.1"), (&elsewhere, "10.97.2.1")] {
            wait_for("an answer by the line", SOON, || {
                space.run(&format!("ping -q -n -c 1 -W 1 {other}")).is_ok()
            })?;
        }
        Ok(Self {
            victim,
            victim_key,
            friend,
            newcomer,
            newcomer_key,
            here,
            there,
            outside,
            elsewhere,
        })
    }

    /// Gbit/s of one TCP stream to the victim, whose packets come in by the socket that is flooded.
    fn throughput(&self) -> Result<f64> {
        let listener = self.here.within(|| TcpListener::bind("10.96.0.1:5001"))?;
        let bytes = thread::scope(|scope| -> Result<u64> {
            let sink = scope.spawn(move || -> Result<u64> {
                let (mut stream, _) = listener.accept()?;
                let (mut bytes, mut buffer) = (0, vec![0; 1 << 18]);
                loop {
                    match stream.read(&mut buffer)? {
                        0 => return Ok(bytes),
                        read => bytes += read as u64,
                    }
                }
            });
            self.there.within(|| -> Result<()> {
                let mut stream = TcpStream::connect("10.96.0.1:5001")?;
                let (start, buffer) = (Instant::now(), vec![7; 1 << 18]);
                while start.elapsed() < MEASURE {
                    stream.write_all(&buffer)?;
                }
                Ok(())
            })?;
            sink.join().unwrap()
        })?;
        Ok(bytes as f64 * 8.0 / 1e9 / MEASURE.as_secs_f64())
    }

    /// KiB of memory that the victim's daemon holds.
    fn memory(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.victim.pid().context("no process")?);
        let status = std::fs::read_to_string(path)?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next());
        Ok(kib.context("no VmRSS")?.parse()?)
    }

    /// How long the handshake of a new peer takes.
    fn newcomer(&self) -> Result<Duration> {
        self.victim.set(&format!(
            "peer {} allowed-ips 10.96.0.3/32",
            self.newcomer_key.public
        ))?;
        let start = Instant::now();
        self.newcomer.set(&format!(
            "peer {} allowed-ips 10.96.0.1/32 endpoint 10.97.2.1:{PORT}",
            self.victim_key.public
        ))?;
        wait_for("the newcomer's first answer", NEWCOMER * 5, || {
            self.elsewhere.run("ping -q -n -c 1 -W 1 10.96.0.1").is_ok()
        })?;
        let time = start.elapsed();
        self.victim
            .set(&format!("peer {} remove", self.newcomer_key.public))?;
        self.newcomer
            .set(&format!("peer {} remove", self.victim_key.public))?;
        Ok(time)
    }

    /// The packets that answered strangers: those longer than a request, and all.
    fn answers(&self) -> Result<[u64; 2]> {
        let rules = self.outside.run("nft list chain ip answers heard")?;
        let counted = rules
            .split("packets ")
            .skip(1)
            .filter_map(|rest| rest.split_whitespace().next()?.parse().ok());
        let counted: Vec<u64> = counted.collect();
        let counts = counted.try_into();
        counts
            .ok()
            .with_context(|| format!("two counters: {rules}"))
    }

    fn flood(&self, sources: Sources, idle: f64) -> Result<()> {
        let (memory, answered) = (self.memory()?, self.answers()?[1]);
        let to = SocketAddrV4::new(VICTIM, PORT);
        let flood = Flood::start(&self.outside, to, &self.victim_key.public, sources, RATE)?;
        let measured = self.throughput()?;
        let newcomer = self.newcomer()?;
        let (rate, theirs) = (flood.per_second(), flood.cpu_share());
        let grown = self.memory()?.saturating_sub(memory);
        drop(flood);
        let after = self.throughput()?;
        let [longer, answers] = self.answers()?;
        let answers = answers - answered;
        println!(
            "{sources:?}: {:.0} initiations/s; TCP {measured:.2} Gbit/s, {:.0} % of {idle:.2} idle, \
             {after:.2} afterwards; {answers} answers, {longer} longer than the request; memory \
             +{:.1} MiB; a new peer in {:.2} s; the strangers take {:.0} % of a CPU",
            rate,
            100.0 * measured / idle,
            grown as f64 / 1024.0,
            newcomer.as_secs_f64(),
            100.0 * theirs
        );
        ensure!(rate > FLOOD, "the flood was no flood");
        ensure!(
            answers > 0,
            "no initiation was answered: the flood did not arrive"
        );
        ensure!(longer == 0, "{longer} answers were longer than the request");
        ensure!(grown <= MEMORY, "memory grew by {grown} KiB");
        ensure!(measured > SHARE / 5.0 * idle, "nothing passes meanwhile");
        ensure!(after > SHARE / 5.0 * idle, "nothing passes afterwards");
        Ok(())
    }
}

#[test]
fn a_flood_of_handshakes_changes_little() {
    let _alone = crate::alone();
    let run = || -> Result<()> {
        let arena = Arena::new()?;
        let idle = arena.throughput()?;
        arena.flood(Sources::One, idle)?;
        arena.flood(Sources::Many, idle)?;
        ensure!(
            arena.friend.wg("show {} peers").is_ok(),
            "the friend is gone"
        );
        Ok(())
    };
    if let Err(error) = run() {
        panic!("{error:#}\n{}", crate::tunnel::take_logs());
    }
}
