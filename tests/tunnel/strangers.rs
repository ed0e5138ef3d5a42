//! A stranger, without a key of a peer, gets no answer from a device: not to a million datagrams of all kinds,
//! not at any TCP port, not to recorded datagrams of others.
//!
//! Each silence has a control that is answered. The scenarios of `conformance` say the same of a few
//! datagrams, next to wireguard-go.
#![expect(
    clippy::disallowed_methods,
    reason = "a harness starts programs and looks at the clock"
)]
#![expect(clippy::print_stdout, reason = "the figures are what it is for")]

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail, ensure};
use boringtun::noise::handshake::Handshake;
use boringtun::noise::{HANDSHAKE_INIT_SZ, HANDSHAKE_RESP_SZ};
use boringtun::x25519;
use nix::sys::socket::{setsockopt, sockopt};
use rand::SeedableRng as _;
use selvedge::agent::timestamps;
use selvedge::wireguard::key::{PrivateKey, PublicKey};
use selvedge::wireguard::{Device, Options, PeerConfig, PeerId, Timestamp};
use selvedge_lab::netns::Namespace;
use selvedge_lab::process::wait_for;

use crate::alone;
use crate::tunnel::{Key, Program, SOON, Tunnel};

const PORT: u16 = 51820;
const VICTIM4: Ipv4Addr = Ipv4Addr::new(10, 97, 0, 1);
const VICTIM6: Ipv6Addr = Ipv6Addr::new(0xfd97, 0, 0, 0, 0, 0, 0, 1);

/// How many datagrams strangers send.
const DATAGRAMS: u32 = 1_000_000;
/// How many of one size the kernel cuts a send into.
const AT_ONCE: usize = 60;
/// What may wait at the device's sockets, in bytes of the kernel's memory: a quarter of their buffers.
const WAITING: u64 = 1 << 20;

/// A device takes itself to be under load for a second after the last sign of it.
const AFTER_LOAD: Duration = Duration::from_millis(1500);

/// A device, and a link to strangers.
struct Arena {
    victim: Tunnel,
    key: Key,
    here: Namespace,
    outside: Namespace,
}

impl Arena {
    fn new() -> Result<Self> {
        let (here, outside) = (Namespace::new("victim")?, Namespace::new("outside")?);
        here.veth("wire", &outside, "wire")?;
        for (space, last) in [(&here, 1), (&outside, 2)] {
            space.run(&format!("ip address add 10.97.0.{last}/24 dev wire"))?;
            space.run(&format!("ip address add fd97::{last}/64 dev wire nodad"))?;
        }
        let (victim, key) = (Tunnel::start(Program::Selvedge, &here)?, Key::new()?);
        victim.set(&format!("private-key {} listen-port {PORT}", key.file()))?;
        here.run(&format!("ip link set {} up", victim.name))?;
        // Whatever comes back, of UDP or about it.
        outside.run("nft add table inet heard")?;
        outside
            .run("nft add chain inet heard in { type filter hook prerouting priority -300 ; }")?;
        outside.run(&format!(
            "nft add rule inet heard in udp sport {PORT} counter"
        ))?;
        outside.run("nft add rule inet heard in icmp type destination-unreachable counter")?;
        outside.run("nft add rule inet heard in icmpv6 type destination-unreachable counter")?;
        Ok(Self {
            victim,
            key,
            here,
            outside,
        })
    }

    /// The packets that came back to the strangers.
    fn answers(&self) -> Result<u64> {
        let rules = self.outside.run("nft list chain inet heard in")?;
        let counts = rules
            .split("packets ")
            .skip(1)
            .filter_map(|rest| rest.split_whitespace().next());
        let counts = counts.map(str::parse::<u64>);
        Ok(counts.sum::<Result<u64, _>>()?)
    }

    /// What waits at the device's sockets in bytes, and how many datagrams they had no room for.
    fn sockets(&self) -> Result<(u64, u64)> {
        self.victim.queue(PORT)
    }

    /// Waits until the device has looked at nearly everything.
    fn keep_pace(&self, waiting: u64) -> Result<()> {
        wait_for("the device to read what it was sent", SOON, || {
            self.sockets().is_ok_and(|(queued, _)| queued <= waiting)
        })?;
        Ok(())
    }
}

/// A socket of a stranger's that sends runs of datagrams of one size at once.
fn stranger(arena: &Arena, v6: bool) -> Result<UdpSocket> {
    let (any, to): (SocketAddr, SocketAddr) = if v6 {
        ((Ipv6Addr::UNSPECIFIED, 0).into(), (VICTIM6, PORT).into())
    } else {
        ((Ipv4Addr::UNSPECIFIED, 0).into(), (VICTIM4, PORT).into())
    };
    let socket = arena.outside.within(|| UdpSocket::bind(any))?;
    socket.connect(to)?;
    Ok(socket)
}

/// An initiation by `from` to a device, as WireGuard wants it.
fn initiation(from: &PrivateKey, to: &str) -> Result<Vec<u8>> {
    Ok(begin_handshake(from, &to.parse()?)?.1)
}

/// A handshake that has begun, and its initiation.
fn begin_handshake(from: &PrivateKey, to: &PublicKey) -> Result<(Handshake, Vec<u8>)> {
    let secret = x25519::StaticSecret::from(from.0);
    let public = x25519::PublicKey::from(&secret);
    let mut handshake = Handshake::new(secret, public, to.0.into(), None);
    let mut buffer = [0; HANDSHAKE_INIT_SZ];
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    let timestamp = Timestamp::from_unix(now).to_tai64n();
    let message = handshake
        .format_handshake_initiation(7, timestamp, &mut buffer)
        .map_err(|error| anyhow::anyhow!("no initiation: {error:?}"))?
        .to_vec();
    Ok((handshake, message))
}

/// What a stranger sends in a run: of every type and length, random but for what makes it plausible.
fn run_of_datagrams(round: usize, random: &mut impl rand::Rng, wrong: &[u8]) -> (usize, Vec<u8>) {
    // The lengths of the four messages, and what lies beside them.
    const SIZES: [usize; 20] = [
        148, 92, 64, 32, 148, 92, 64, 96, 1, 3, 4, 16, 31, 33, 63, 65, 91, 147, 149, 1024,
    ];
    let size = SIZES[round % SIZES.len()];
    let mut run = vec![0; size * AT_ONCE];
    random.fill_bytes(&mut run);
    for (n, datagram) in run.chunks_exact_mut(size).enumerate() {
        let kind = match round / SIZES.len() % 3 {
            0 => [1, 2, 3, 4][round % 4],
            1 => [1, 2, 3, 4][n % 4],
            _ => datagram[0],
        };
        for (byte, value) in datagram.iter_mut().zip([kind, 0, 0, 0]) {
            *byte = value;
        }
        if n % 16 == 0 && size == wrong.len() {
            // Well formed, but for another device.
            datagram.copy_from_slice(wrong);
        }
    }
    (size, run)
}

#[test]
fn a_million_datagrams_from_strangers_are_not_answered() {
    let _alone = alone();
    let run = || -> Result<()> {
        let mut arena = Arena::new()?;
        let mut random = rand::rngs::StdRng::seed_from_u64(11);
        let wrong = initiation(&PrivateKey::generate(), &Key::new()?.public)?;
        let sockets = (0..64).map(|n| stranger(&arena, n % 2 == 1));
        let sockets = sockets.collect::<Result<Vec<_>>>()?;
        let (start, mut sent, mut round) = (Instant::now(), 0, 0);
        while sent < DATAGRAMS {
            let (size, datagrams) = run_of_datagrams(round, &mut random, &wrong);
            let socket = &sockets[round % sockets.len()];
            setsockopt(socket, sockopt::UdpGsoSegment, &i32::try_from(size)?)?;
            match socket.send(&datagrams) {
                Ok(length) => sent += u32::try_from(length / size)?,
                Err(error) => bail!("a stranger got {error} in round {round}"),
            }
            round += 1;
            if round % 16 == 0 {
                arena.keep_pace(WAITING)?;
            }
        }
        // An empty datagram, and the largest ones.
        for v6 in [false, true] {
            let socket = stranger(&arena, v6)?;
            for size in [0, 9000, 65_000] {
                socket.send(&vec![4; size])?;
            }
        }
        arena.keep_pace(0)?;
        // Late answers; and a device under load answers with a cookie first.
        sleep(AFTER_LOAD);
        let (_, dropped) = arena.sockets()?;
        let answers = arena.answers()?;
        println!(
            "{sent} datagrams in {:?}: {answers} answers",
            start.elapsed()
        );
        ensure!(dropped == 0, "{dropped} datagrams never reached the device");
        ensure!(answers == 0, "{answers} answers to strangers");
        ensure!(!arena.victim.ended(), "the daemon is gone");

        // A peer's handshake, by the same line, is answered and seen.
        let friend = PrivateKey::generate();
        let public = friend.public_key();
        arena
            .victim
            .set(&format!("peer {public} allowed-ips 10.96.0.2/32"))?;
        let socket = stranger(&arena, false)?;
        socket.set_read_timeout(Some(SOON))?;
        socket.send(&initiation(&friend, &arena.key.public)?)?;
        let length = socket.recv(&mut [0; 2048]).context("no answer to a peer")?;
        ensure!(length == HANDSHAKE_RESP_SZ, "an answer of {length} bytes");
        ensure!(arena.answers()? == 1, "the answer was not counted");
        Ok(())
    };
    report(run());
}

#[test]
fn no_tcp_port_of_a_device_is_open() {
    let _alone = alone();
    let run = || -> Result<()> {
        let arena = Arena::new()?;
        // The control: the port of another program is found.
        let found = arena.here.within(|| TcpListener::bind((VICTIM4, 0)))?;
        let other = found.local_addr()?.port();
        let open = arena.outside.within(|| {
            let mut open = Vec::new();
            for port in 1..=u16::MAX {
                let to = SocketAddr::from((VICTIM4, port));
                match TcpStream::connect_timeout(&to, SOON) {
                    Ok(_) => open.push(port),
                    Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                    Err(error) => bail!("port {port}: {error}"),
                }
            }
            Ok(open)
        })?;
        ensure!(open == [other], "open ports: {open:?}, not {other} alone");
        Ok(())
    };
    report(run());
}

/// A device in a namespace of its own, whose timestamps go on after those in a directory.
fn device(
    space: &Namespace,
    key: &PrivateKey,
    state: Option<&Path>,
    floor: Timestamp,
) -> Result<Device> {
    let mut options = Options::new("wg");
    options.listen_port = PORT;
    options.timestamp_floor = floor;
    if let Some(state) = state {
        options.store = Some(Box::new(timestamps::Disk::new(state.to_owned())));
        options.accepted = timestamps::load_accepted(state);
    }
    let device = space.within(|| Device::start(options))?;
    device.set_private_key(Some(key.clone()));
    space.run("ip address add 10.96.0.1/24 dev wg")?;
    space.run("ip link set wg up")?;
    Ok(device)
}

/// One peer, called by its key.
fn only(peer: PeerConfig) -> BTreeMap<PeerId, PeerConfig> {
    BTreeMap::from([(PeerId::from(&peer.public_key), peer)])
}

/// The first handshake after a start, with a peer that has seen those of the run before.
fn is_taken(space: &Namespace, device: &Device, peer: PeerConfig) -> bool {
    device.set_peers(&only(peer));
    space.run("ping -q -n -c 1 -W 3 10.96.0.2").is_ok()
}

/// The clock is a day back after a restart: what was remembered on disk decides.
#[test]
fn a_clock_that_went_back_a_day_is_made_up_for_by_the_mark_on_disk() {
    let _alone = alone();
    let run = || -> Result<()> {
        let (left, right) = (Namespace::new("left")?, Namespace::new("right")?);
        left.veth("wire", &right, "wire")?;
        left.run("ip address add 10.97.0.1/24 dev wire")?;
        right.run("ip address add 10.97.0.2/24 dev wire")?;
        let (key, peer_key) = (PrivateKey::generate(), Key::new()?);
        let peer = Tunnel::start(Program::Selvedge, &right)?;
        peer.set(&format!(
            "private-key {} listen-port {PORT} peer {} allowed-ips 10.96.0.1/32",
            peer_key.file(),
            key.public_key()
        ))?;
        right.run(&format!("ip address add 10.96.0.2/24 dev {}", peer.name))?;
        right.run(&format!("ip link set {} up", peer.name))?;
        let other = || -> Result<PeerConfig> {
            let key = peer_key.public.parse()?;
            Ok(PeerConfig {
                endpoint: Some(SocketAddr::from(([10, 97, 0, 2], PORT))),
                ..PeerConfig::new(key).with_allowed_ips(["10.96.0.2/32".parse()?].into())
            })
        };

        let disk = tempfile::tempdir()?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        let tomorrow = Timestamp::from_unix(now + Duration::from_secs(86_400));
        let first = device(&left, &key, Some(disk.path()), tomorrow)?;
        ensure!(
            is_taken(&left, &first, other()?),
            "the first run gets through"
        );
        drop(first);
        // A device's end does not wait for a slow disk for long.
        let later_than = |mark| {
            wait_for("a later mark on disk", SOON, || {
                timestamps::load_own(disk.path()) > mark
            })
        };
        later_than(tomorrow)?;
        let mark = timestamps::load_own(disk.path());

        let forgetful = device(&left, &key, None, Timestamp::default())?;
        ensure!(
            !is_taken(&left, &forgetful, other()?),
            "without the mark an old timestamp is taken: nothing is shown"
        );
        drop(forgetful);
        let second = device(&left, &key, Some(disk.path()), mark)?;
        ensure!(
            is_taken(&left, &second, other()?),
            "with the mark it is refused"
        );
        drop(second);
        later_than(mark).context("the second run left no mark of its own")?;
        Ok(())
    };
    report(run());
}

/// Environment of the process that [`a_device_that_is_killed`] runs in: the directory of its timestamps, its
/// private key, its peer's public key.
const STATE: &str = "SELVEDGE_TEST_STATE";
const OWN_KEY: &str = "SELVEDGE_TEST_KEY";
const PEER_KEY: &str = "SELVEDGE_TEST_PEER";

/// Not a test: the responder that the next test starts and kills.
#[test]
fn a_device_that_is_killed() {
    let Ok(state) = std::env::var(STATE) else {
        return;
    };
    let run = || -> Result<()> {
        let state = Path::new(&state);
        let mut options = Options::new("wg");
        options.listen_port = PORT;
        options.timestamp_floor = timestamps::load_own(state);
        options.accepted = timestamps::load_accepted(state);
        options.store = Some(Box::new(timestamps::Disk::new(state.to_owned())));
        let device = Device::start(options)?;
        device.set_private_key(Some(std::env::var(OWN_KEY)?.parse()?));
        device.set_peers(&only(PeerConfig::new(std::env::var(PEER_KEY)?.parse()?)));
        loop {
            let peers = device.stats().peers;
            let endpoint = peers.values().find_map(|peer| peer.endpoint);
            let text = endpoint.map_or(String::new(), |endpoint| endpoint.to_string());
            fs::write(state.join("endpoint"), text)?;
            sleep(Duration::from_millis(20));
        }
    };
    report(run());
}

/// A responder in a process of its own, which is killed when this goes.
struct Responder(selvedge_lab::process::Process);

impl Responder {
    fn start(space: &Namespace, state: &Path, key: &PrivateKey, peer: &PublicKey) -> Result<Self> {
        let program = std::env::current_exe()?;
        let mut command = space.command(&program.to_string_lossy());
        command.args([
            "--exact",
            "strangers::a_device_that_is_killed",
            "--test-threads=1",
        ]);
        command.env(STATE, state);
        command.env(OWN_KEY, &*key.to_base64());
        command.env(PEER_KEY, peer.to_string());
        let _ = fs::remove_file(state.join("endpoint"));
        let process = selvedge_lab::process::Process::start_logging(
            "responder",
            command,
            &state.join("log"),
        )?;
        wait_for("the responder", SOON, || state.join("endpoint").exists())?;
        Ok(Self(process))
    }

    fn kill(self) -> Result<()> {
        self.0.signal(nix::sys::signal::Signal::SIGKILL);
        let mut process = self.0;
        wait_for("the responder's end", SOON, || process.ended().is_some())?;
        Ok(())
    }
}

/// Where the responder has its peer.
fn endpoint(state: &Path) -> String {
    // Twice the pace at which it is written.
    sleep(Duration::from_millis(100));
    fs::read_to_string(state.join("endpoint")).unwrap_or_default()
}

/// A peer that does a handshake by hand, and what was recorded of it.
struct Caller {
    socket: UdpSocket,
    initiation: Vec<u8>,
}

impl Caller {
    /// Does a handshake and confirms it.
    fn calls(space: &Namespace, from: &PrivateKey, to: &PublicKey) -> Result<Self> {
        let socket = space.within(|| UdpSocket::bind("10.97.0.2:0"))?;
        socket.connect((VICTIM4, PORT))?;
        socket.set_read_timeout(Some(Duration::from_secs(3)))?;
        let (mut handshake, initiation) = begin_handshake(from, to)?;
        socket.send(&initiation)?;
        let mut answer = [0; 256];
        let length = socket.recv(&mut answer).context("no answer")?;
        let parsed = boringtun::noise::parse_incoming_packet(&answer[..length]);
        let Ok(boringtun::noise::Packet::HandshakeResponse(response)) = parsed else {
            bail!("{length} bytes that are no answer");
        };
        let keys = handshake
            .receive_handshake_response(response)
            .map_err(|error| anyhow::anyhow!("a wrong answer: {error:?}"))?;
        let key = ring::aead::UnboundKey::new(&ring::aead::CHACHA20_POLY1305, &*keys.sending_key)
            .map_err(|_| anyhow::anyhow!("no key"))?;
        let mut keepalive = vec![4, 0, 0, 0];
        keepalive.extend(keys.peer_index.to_le_bytes());
        keepalive.extend([0; 8]);
        let tag = ring::aead::LessSafeKey::new(key)
            .seal_in_place_separate_tag(
                ring::aead::Nonce::assume_unique_for_key([0; 12]),
                ring::aead::Aad::empty(),
                &mut [],
            )
            .map_err(|_| anyhow::anyhow!("no tag"))?;
        keepalive.extend(tag.as_ref());
        socket.send(&keepalive)?;
        Ok(Self { socket, initiation })
    }

    fn address(&self) -> Result<String> {
        Ok(self.socket.local_addr()?.to_string())
    }
}

/// What a responder that was killed had accepted is refused when it is sent again from elsewhere.
#[test]
fn a_recorded_initiation_is_refused_after_the_responder_was_killed() {
    let _alone = alone();
    let run = || -> Result<()> {
        let (here, outside) = (Namespace::new("victim")?, Namespace::new("outside")?);
        here.veth("wire", &outside, "wire")?;
        here.run("ip address add 10.97.0.1/24 dev wire")?;
        outside.run("ip address add 10.97.0.2/24 dev wire")?;
        outside.run("ip address add 10.97.0.3/24 dev wire")?;
        let (key, caller_key) = (PrivateKey::generate(), PrivateKey::generate());
        let (public, caller) = (key.public_key(), caller_key.public_key());
        let disk = tempfile::tempdir()?;
        let state = disk.path();
        let thief = outside.within(|| UdpSocket::bind("10.97.0.3:0"))?;
        thief.connect((VICTIM4, PORT))?;
        thief.set_read_timeout(Some(Duration::from_millis(500)))?;
        let replay = |recorded: &[u8]| -> Result<usize> {
            thief.send(recorded)?;
            Ok(thief.recv(&mut [0; 2048]).unwrap_or(0))
        };

        let responder = Responder::start(&here, state, &key, &caller)?;
        let first = Caller::calls(&outside, &caller_key, &public)?;
        wait_for("the caller to be followed", SOON, || {
            first
                .address()
                .is_ok_and(|address| endpoint(state) == address)
        })?;
        let since = Instant::now();
        wait_for("the timestamp on disk", SOON, || {
            !timestamps::load_accepted(state).is_empty()
        })?;
        println!("the timestamp was on disk after {:?}", since.elapsed());
        responder.kill()?;

        let responder = Responder::start(&here, state, &key, &caller)?;
        let answer = replay(&first.initiation)?;
        println!(
            "after kill -9: {answer} bytes of answer, endpoint {:?}",
            endpoint(state)
        );
        ensure!(answer == 0, "a recorded initiation was answered");
        ensure!(endpoint(state).is_empty(), "it moved the endpoint");
        // The peer itself is heard.
        let second = Caller::calls(&outside, &caller_key, &public)?;
        wait_for("the caller to be followed", SOON, || {
            second
                .address()
                .is_ok_and(|address| endpoint(state) == address)
        })?;
        responder.kill()?;

        // The control: without the stored timestamps it is answered, as before, but still moves nothing.
        fs::remove_file(state.join("accepted-handshakes"))?;
        let responder = Responder::start(&here, state, &key, &caller)?;
        let answer = replay(&second.initiation)?;
        println!(
            "without the file: {answer} bytes of answer, endpoint {:?}",
            endpoint(state)
        );
        ensure!(
            answer == 92,
            "the control is not answered: nothing is shown"
        );
        ensure!(
            endpoint(state).is_empty(),
            "an initiation alone moved the endpoint"
        );
        responder.kill()
    };
    report(run());
}

/// Thirteen orderly restarts within a second, then as many that are killed.
#[test]
fn restarts_do_not_put_timestamps_ahead_of_the_clock() {
    let _alone = alone();
    let run = || -> Result<()> {
        let space = Namespace::new("left")?;
        space.run("ip link set lo up")?;
        let (key, peer) = (PrivateKey::generate(), PrivateKey::generate().public_key());
        let disk = tempfile::tempdir()?;
        let ahead = || -> Result<i64> {
            let mark = timestamps::load_own(disk.path()).to_unix().as_millis();
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
            Ok(i64::try_from(mark)? - i64::try_from(now.as_millis())?)
        };
        for start in 1..=13 {
            let floor = timestamps::load_own(disk.path());
            let device = device(&space, &key, Some(disk.path()), floor)?;
            let config = PeerConfig {
                endpoint: Some(SocketAddr::from(([127, 0, 0, 1], 9))),
                ..PeerConfig::new(peer)
            };
            device.set_peers(&only(config));
            wait_for("an initiation", SOON, || {
                device.stats().peers.values().any(|peer| peer.tx_bytes > 0)
            })?;
            // The handshake does not wait for the disk.
            wait_for("the reserved timestamp on disk", SOON, || {
                ahead().is_ok_and(|ahead| ahead > 0)
            })?;
            let running = ahead()?;
            drop(device);
            // The end does not wait for a slow disk for long.
            wait_for("the last timestamp on disk", SOON, || {
                ahead().is_ok_and(|ahead| ahead <= 0)
            })?;
            println!(
                "start {start}: {running} ms ahead while it ran, {} ms after it",
                ahead()?
            );
        }
        Ok(())
    };
    report(run());
}

fn report(outcome: Result<()>) {
    if let Err(error) = outcome {
        panic!("{error:#}\n{}", crate::tunnel::take_logs());
    }
}
