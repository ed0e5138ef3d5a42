//! Peers behind a relay: hosts 1 and 2, with hosts 3 and 4 that reach both.

use super::super::RELAY_PORT;
use super::super::config::PeerMtu;
use super::super::relay_packet::Headers;
use super::super::timers::SILENT_AFTER;
use super::*;

/// The WireGuard address of host `n`.
fn wireguard_ip(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 4, 0, n)
}

/// The endpoint of host `n` through a relay.
fn relayed(n: u8) -> SocketAddr {
    (wireguard_ip(n), RELAY_PORT).into()
}

/// Host `n` as a peer that owns its prefix and its WireGuard address.
fn peer(n: u8) -> PeerConfig {
    let address = IpAddr::from(wireguard_ip(n));
    let prefixes = [net(&format!("10.0.{n}.0/24")), address.into()];
    config(n).with_allowed_ips(prefixes.into())
}

/// Host `n` as a peer that relays to another host, and may relay for it.
fn relay(n: u8, to: u8) -> PeerConfig {
    PeerConfig {
        relays_to: [wireguard_ip(to).into()].into(),
        ..possible_relay(n, to)
    }
}

/// Host `n` as a peer that may relay for another host.
fn possible_relay(n: u8, from: u8) -> PeerConfig {
    PeerConfig {
        relayed_from: [wireguard_ip(from).into()].into(),
        ..peer(n)
    }
}

/// Four hosts, the last two of which forward packets as routers do.
struct Mesh {
    world: World,
    /// Whether hosts 1 and 2 reach each other.
    direct: bool,
    /// Every packet that hosts 3 and 4 have forwarded.
    forwarded: Vec<Vec<u8>>,
}

impl Mesh {
    /// Hosts 1 and 2 do not reach each other, and both use host 3 as their relay.
    fn new() -> Self {
        let world = World::of([1, 2, 3, 4]);
        for host in &world.hosts {
            let n = host.wire.address.ip();
            let IpAddr::V4(address) = n else {
                unreachable!()
            };
            let own = wireguard_ip(address.octets()[3]);
            host.core.set_own_addresses([own.into()].into());
        }
        let mesh = Self {
            world,
            direct: false,
            forwarded: Vec::new(),
        };
        mesh.set_peers(0, [peer(2), relay(3, 2), possible_relay(4, 2)]);
        mesh.set_peers(1, [peer(1), relay(3, 1), possible_relay(4, 1)]);
        mesh.set_peers(2, [peer(1), peer(2), peer(4)]);
        mesh.set_peers(3, [peer(1), peer(2), peer(3)]);
        mesh
    }

    /// The same, and the two have a session through the relay.
    fn connected() -> Self {
        let mut mesh = Self::new();
        mesh.settle();
        mesh.try_relay(0);
        mesh.assert_connected();
        assert_eq!(mesh.endpoints(), [relayed(2), relayed(1)]);
        mesh
    }

    fn set_peers(&self, host: usize, peers: [PeerConfig; 3]) {
        let named = |config: PeerConfig| (PeerId::from(&config.public_key), config);
        let peers = peers.map(named).into();
        let host = &self.world.hosts[host];
        host.core.set_peers(&peers, self.world.now);
    }

    /// Host 1 or 2 tries to reach the other through its relay.
    fn try_relay(&mut self, host: usize) {
        self.try_candidates(host, &[relayed(if host == 0 { 2 } else { 1 })]);
        self.settle();
    }

    fn try_candidates(&mut self, host: usize, candidates: &[SocketAddr]) {
        self.world.now = self.world.now + seconds(1);
        let other = self.world.hosts[1 - host].id();
        let core = &self.world.hosts[host].core;
        core.try_candidates(&other, candidates);
    }

    /// The endpoints that hosts 1 and 2 have of each other.
    fn endpoints(&self) -> [SocketAddr; 2] {
        let hosts = &self.world.hosts;
        [(0, 1), (1, 0)].map(|(at, of)| hosts[at].peer(&hosts[of]).way().unwrap().remote())
    }

    /// All datagrams arrive, and the relays forward what they get.
    fn settle(&mut self) {
        let direct = self.direct;
        let pair = [address(1), address(2)];
        for _ in 0..100 {
            self.world.settle_with(|datagram| {
                direct || !(pair.contains(&datagram.from) && pair.contains(&datagram.to))
            });
            if !self.forward() {
                return;
            }
        }
        panic!("the hosts do not stop sending");
    }

    /// The relays' kernels forward packets that are not for themselves; true if there were any.
    fn forward(&mut self) -> bool {
        let mut any = false;
        for host in [2, 3] {
            for mut packet in std::mem::take(&mut self.world.hosts[host].delivered) {
                let number = u8::try_from(host + 1).unwrap();
                if packet[16..20] == wireguard_ip(number).octets() {
                    continue;
                }
                packet[8] -= 1;
                packet[10..12].fill(0);
                let sum = checksum::finish(checksum::sum(&packet[..20]));
                packet[10..12].copy_from_slice(&sum.to_be_bytes());
                self.forwarded.push(packet.clone());
                self.world.send(host, &packet);
                any = true;
            }
        }
        any
    }

    fn pass(&mut self, time: Duration) {
        let end = self.world.now + time;
        while self.world.now < end {
            self.world.now = end.min(self.world.now + Duration::from_millis(200));
            self.settle();
        }
    }

    /// Packets pass between hosts 1 and 2 both ways.
    fn assert_connected(&mut self) {
        for (from, to) in [(0, 1), (1, 0)] {
            self.world.hosts[to].delivered.clear();
            let sent = self.packet(from, b"are you there");
            self.world.send(from, &sent);
            self.settle();
            assert_eq!(self.world.hosts[to].delivered, [sent]);
            self.world.hosts[to].delivered.clear();
        }
    }

    /// A packet from host 1 or 2 to the other.
    fn packet(&self, from: usize, payload: &[u8]) -> Vec<u8> {
        let (a, b) = if from == 0 { (1, 2) } else { (2, 1) };
        packet(a, b, payload)
    }

    /// The datagrams that went to the WireGuard address of a host by its sender's socket.
    fn leaked(&self) -> usize {
        let is_leaked = |datagram: &&Datagram| matches!(datagram.to.ip(), IpAddr::V4(to) if to.octets()[..2] == [10, 4]);
        self.world.log.iter().filter(is_leaked).count()
    }

    /// A packet in the session of host 3 with host 2, from any source to any destination.
    fn through_the_relay(&mut self, packet: &[u8]) {
        self.world.send(2, packet);
        self.settle();
    }

    fn drops(&self, host: usize, reason: Dropped) -> u64 {
        self.world.hosts[host].drops(reason)
    }
}

/// A datagram in the packet that a relay would carry.
fn envelope(from: Ipv4Addr, to: Ipv4Addr, datagram: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    Headers::new(from.into(), to.into(), Outer::default()).wrap(datagram, &mut packet);
    packet
}

#[test]
fn packets_are_carried_both_ways_and_the_relay_sees_datagrams_only() {
    let mut mesh = Mesh::connected();
    mesh.forwarded.clear();
    let secret = b"a payload that the relay must not see";
    for from in [0, 1] {
        let sent = mesh.packet(from, secret);
        mesh.world.send(from, &sent);
        mesh.settle();
        assert_eq!(mesh.world.hosts[1 - from].delivered, [sent]);
    }
    assert_eq!(mesh.forwarded.len(), 2);
    let holds = |bytes: &[u8]| bytes.windows(secret.len()).any(|window| window == secret);
    assert!(!mesh.forwarded.iter().any(|packet| holds(packet)));
    for packet in &mesh.forwarded {
        assert_eq!(packet[9], 17);
        assert_eq!(packet[20..24], [0xca, 0x6c, 0xca, 0x6c]);
        assert_eq!(packet[28], 4, "no data message");
    }
    assert_eq!(mesh.leaked(), 0);
}

#[test]
fn a_payload_is_seen_where_it_is_routed_through_another_host_in_plain() {
    let mut mesh = Mesh::new();
    let plain = [net("10.0.2.0/24")];
    let router = peer(3).with_allowed_ips(plain.into());
    mesh.set_peers(0, [router, peer(4), PeerConfig::new(peer(2).public_key)]);
    mesh.settle();
    let sent = mesh.packet(0, b"seen");
    mesh.world.send(0, &sent);
    mesh.settle();
    let last = mesh.forwarded.last().unwrap();
    assert!(last.ends_with(b"seen"), "the control sees nothing");
}

#[test]
fn a_run_of_packets_goes_through_the_relay_as_one_run_and_in_order() {
    let mut mesh = Mesh::connected();
    let sent: Vec<_> = (0..200_u8).map(|n| mesh.packet(0, &[n; 1300])).collect();
    mesh.world.send_run(0, &sent);
    mesh.settle();
    assert_eq!(mesh.world.hosts[1].delivered.len(), 200);
    assert_eq!(mesh.world.hosts[1].delivered, sent);
}

#[test]
fn a_relayed_packet_is_padded_within_the_mtu_that_the_relay_leaves() {
    let mut mesh = Mesh::connected();
    for (payload, wire) in [(1332, 1452), (1325, 1452), (1316, 1440)] {
        mesh.world.log.clear();
        let sent = mesh.packet(0, &vec![1; payload]);
        mesh.world.send(0, &sent);
        mesh.settle();
        assert_eq!(mesh.world.hosts[1].delivered.pop(), Some(sent));
        let sizes: Vec<_> = mesh.world.log.iter().map(|one| one.bytes.len()).collect();
        assert!(
            sizes.iter().all(|&size| size == wire),
            "{payload}: {sizes:?}"
        );
    }
    let too_long = mesh.packet(0, &[1; 1333]);
    mesh.world.send(0, &too_long);
    mesh.settle();
    assert_eq!(mesh.drops(0, Dropped::TooBig), 1);
    assert!(mesh.world.hosts[1].delivered.is_empty());
}

#[test]
fn one_side_that_chose_a_relay_gets_a_session_and_the_other_stays_until_it_chose_one() {
    let mut mesh = Mesh::new();
    mesh.set_peers(1, [peer(1), possible_relay(3, 1), possible_relay(4, 1)]);
    mesh.settle();
    mesh.try_relay(0);
    assert_eq!(mesh.endpoints(), [relayed(2), address(1)]);
    let sent = mesh.packet(0, b"one way");
    mesh.world.send(0, &sent);
    mesh.settle();
    assert_eq!(mesh.world.hosts[1].delivered, [sent]);

    mesh.set_peers(1, [peer(1), relay(4, 1), possible_relay(3, 1)]);
    let sent = mesh.packet(0, b"the endpoint follows: nothing ever came directly");
    mesh.world.send(0, &sent);
    mesh.settle();
    mesh.assert_connected();
}

#[test]
fn a_source_that_is_not_admitted_is_dropped_and_so_is_another_port() {
    let mut mesh = Mesh::connected();
    let datagram = [4; 100];
    let to = wireguard_ip(2);
    let genuine = envelope(wireguard_ip(1), to, &datagram);
    mesh.through_the_relay(&genuine);
    // Admitted, and then it belongs to no session.
    assert_eq!(mesh.drops(1, Dropped::ForeignRelay), 0);
    let received = mesh.drops(1, Dropped::UnknownIndex) + mesh.drops(1, Dropped::Malformed);
    assert_eq!(received, 1);

    mesh.through_the_relay(&envelope(wireguard_ip(4), to, &datagram));
    mesh.through_the_relay(&envelope([10, 0, 1, 7].into(), to, &datagram));
    let mut from_another_port = genuine.clone();
    from_another_port[21] += 1;
    mesh.through_the_relay(&from_another_port);
    assert_eq!(mesh.drops(1, Dropped::ForeignRelay), 3);
    assert!(mesh.world.hosts[1].delivered.is_empty());
}

#[test]
fn to_another_port_or_address_the_source_must_be_the_relays_own() {
    let mut mesh = Mesh::connected();
    let genuine = envelope(wireguard_ip(1), wireguard_ip(2), &[4; 100]);
    let mut to_another_port = genuine.clone();
    to_another_port[23] += 1;
    mesh.through_the_relay(&to_another_port);
    mesh.through_the_relay(&envelope(wireguard_ip(1), [10, 0, 2, 1].into(), &[4; 100]));
    let mut fragment = genuine;
    fragment[6] = 0x20;
    mesh.through_the_relay(&fragment);
    assert_eq!(mesh.drops(1, Dropped::ForeignSource), 3);
    assert!(mesh.world.hosts[1].delivered.is_empty());
}

#[test]
fn a_peer_that_may_not_relay_is_refused() {
    let mut mesh = Mesh::connected();
    mesh.set_peers(1, [peer(1), relay(4, 1), peer(3)]);
    let sent = mesh.packet(0, b"through host 3");
    mesh.world.send(0, &sent);
    mesh.settle();
    assert_eq!(mesh.drops(1, Dropped::ForeignRelay), 1);
    assert!(mesh.world.hosts[1].delivered.is_empty());
}

#[test]
fn a_peer_does_not_speak_for_itself_through_its_own_session_in_an_envelope() {
    let mut mesh = Mesh::connected();
    let own = envelope(wireguard_ip(1), wireguard_ip(2), &[4; 100]);
    mesh.world.send(0, &own);
    mesh.settle();
    // Its own session is relayed: an envelope in an envelope.
    assert_eq!(mesh.drops(0, Dropped::RelayedTwice), 1);

    mesh.direct = true;
    mesh.try_candidates(0, &[address(2)]);
    mesh.settle();
    mesh.world.send(0, &own);
    mesh.settle();
    assert_eq!(mesh.drops(1, Dropped::ForeignRelay), 1);
    assert!(mesh.world.hosts[1].delivered.is_empty());
}

#[test]
fn an_altered_or_repeated_datagram_is_dropped() {
    let mut mesh = Mesh::connected();
    let sent = mesh.packet(0, b"hello");
    mesh.world.send(0, &sent);
    mesh.settle();
    mesh.world.hosts[1].delivered.clear();
    let genuine = mesh.forwarded.last().unwrap().clone();
    let mut altered = genuine.clone();
    *altered.last_mut().unwrap() ^= 1;
    mesh.through_the_relay(&altered);
    mesh.through_the_relay(&genuine);
    assert_eq!(
        mesh.drops(1, Dropped::Unauthentic) + mesh.drops(1, Dropped::Replayed),
        2
    );
    assert!(mesh.world.hosts[1].delivered.is_empty());
    mesh.assert_connected();
}

#[test]
fn a_relayed_datagram_in_a_relayed_datagram_is_dropped() {
    let mut mesh = Mesh::connected();
    // Host 1 puts an envelope into its session with host 2, although it is relayed.
    let inner = envelope(wireguard_ip(4), wireguard_ip(2), &[4; 100]);
    {
        let host = &mut mesh.world.hosts[0];
        let two = mesh_peer(&host.core, 2);
        assert!(super::super::transmit::send_alone(
            &host.core,
            &host.wire,
            &two,
            &inner,
            None,
            mesh.world.now
        ));
    }
    mesh.world.collect();
    mesh.settle();
    assert_eq!(mesh.drops(1, Dropped::RelayedTwice), 1);
    assert!(mesh.world.hosts[1].delivered.is_empty());
}

fn mesh_peer(core: &Core, n: u8) -> Arc<Peer> {
    core.table.load().peers[&PrivateKey([n; 32]).public_key()].clone()
}

#[test]
fn a_relay_that_is_behind_a_relay_is_not_used() {
    let mut mesh = Mesh::connected();
    // Host 1 reaches host 3 through host 4 now.
    let through_four = PeerConfig {
        relays_to: [wireguard_ip(3).into()].into(),
        ..peer(4)
    };
    mesh.set_peers(0, [peer(2), relay(3, 2), through_four]);
    let three = mesh_peer(&mesh.world.hosts[0].core, 3);
    three.set_way(Some(Way::Relayed(wireguard_ip(3).into())));
    let before = mesh.world.log.len();
    mesh.world.send(0, &mesh.packet(0, b"two relays"));
    assert_eq!(mesh.world.log.len(), before);
    assert_eq!(mesh.drops(0, Dropped::RelayedTwice), 1);
}

#[test]
fn another_relay_takes_over_at_once_and_keeps_the_session() {
    let mut mesh = Mesh::connected();
    let handshakes = mesh.world.count(1);
    let mut expected = Vec::new();
    for n in 0..100_u8 {
        if n == 50 {
            mesh.set_peers(0, [peer(2), relay(4, 2), possible_relay(3, 2)]);
        }
        if n == 70 {
            mesh.set_peers(1, [peer(1), relay(4, 1), possible_relay(3, 1)]);
        }
        let sent = mesh.packet(0, &[n]);
        mesh.world.send(0, &sent);
        let back = mesh.packet(1, &[n]);
        mesh.world.send(1, &back);
        expected.push((sent, back));
        if n % 10 == 9 {
            mesh.settle();
        }
    }
    let delivered = |host: usize| mesh.world.hosts[host].delivered.clone();
    let (mut there, mut back): (Vec<_>, Vec<_>) = expected.into_iter().unzip();
    let (mut got_there, mut got_back) = (delivered(1), delivered(0));
    for packets in [&mut there, &mut back, &mut got_there, &mut got_back] {
        packets.sort();
    }
    assert_eq!((got_there, got_back), (there, back));
    assert_eq!(mesh.world.count(1), handshakes, "the session was not kept");
}

#[test]
fn without_a_relay_nothing_leaves() {
    let mut mesh = Mesh::connected();
    mesh.set_peers(0, [peer(2), possible_relay(3, 2), possible_relay(4, 2)]);
    let before = mesh.world.log.len();
    for _ in 0..3 {
        mesh.world.send(0, &mesh.packet(0, b"nowhere"));
    }
    assert_eq!(mesh.drops(0, Dropped::NoRelay), 3);
    assert_eq!(mesh.world.log.len(), before);
    // Nor do the handshakes that follow, nor candidates.
    mesh.try_candidates(0, &[relayed(2)]);
    mesh.pass(seconds(60));
    assert_eq!(mesh.leaked(), 0);
    // A relay that is there again carries on.
    mesh.set_peers(0, [peer(2), relay(4, 2), possible_relay(3, 2)]);
    mesh.pass(seconds(1));
    mesh.assert_connected();
}

#[test]
fn without_a_session_with_the_relay_nothing_leaves_and_a_handshake_with_it_begins() {
    let mut mesh = Mesh::connected();
    mesh.world.now = mesh.world.now + seconds(10);
    let three = mesh_peer(&mesh.world.hosts[0].core, 3);
    three.forget_sessions();
    mesh.world.send(0, &mesh.packet(0, b"lost"));
    assert_eq!(mesh.drops(0, Dropped::NoRelay), 1);
    mesh.settle();
    assert!(three.has_session());
    mesh.assert_connected();
}

#[test]
fn a_session_behind_a_relay_is_rekeyed_through_it_for_an_hour() {
    let mut mesh = Mesh::connected();
    for _ in 0..360 {
        mesh.pass(seconds(10));
        mesh.assert_connected();
    }
    assert_eq!(mesh.endpoints(), [relayed(2), relayed(1)]);
    assert_eq!(mesh.leaked(), 0);
}

/// Numbered packets both ways, many of them under way at a time.
struct Numbered {
    sent: [Vec<Vec<u8>>; 2],
}

impl Numbered {
    fn new() -> Self {
        Self {
            sent: [Vec::new(), Vec::new()],
        }
    }

    fn send(&mut self, mesh: &mut Mesh, count: usize) {
        for _ in 0..count {
            for from in [0, 1] {
                let number = u32::try_from(self.sent[from].len()).unwrap();
                let packet = mesh.packet(from, &number.to_be_bytes());
                mesh.world.send(from, &packet);
                self.sent[from].push(packet);
            }
        }
    }

    /// All packets arrived, each once.
    fn assert_complete(mut self, mesh: &Mesh) {
        for from in [0, 1] {
            let mut delivered = mesh.world.hosts[1 - from].delivered.clone();
            delivered.sort();
            self.sent[from].sort();
            assert_eq!(delivered.len(), self.sent[from].len());
            assert_eq!(delivered, self.sent[from]);
        }
    }
}

#[test]
fn when_the_direct_way_opens_both_ends_take_it_and_lose_nothing() {
    for begins in [0, 1] {
        let mut mesh = Mesh::connected();
        let mut numbered = Numbered::new();
        numbered.send(&mut mesh, 100);
        mesh.direct = true;
        mesh.try_candidates(begins, &[if begins == 0 { address(2) } else { address(1) }]);
        // Before, while and after the handshake is under way, with packets under way through the relay.
        numbered.send(&mut mesh, 100);
        mesh.world.work();
        numbered.send(&mut mesh, 100);
        mesh.settle();
        assert_eq!(mesh.endpoints(), [address(2), address(1)]);
        numbered.send(&mut mesh, 100);
        mesh.settle();
        numbered.assert_complete(&mesh);
        mesh.pass(seconds(300));
        assert_eq!(mesh.endpoints(), [address(2), address(1)]);
    }
}

#[test]
fn when_the_direct_way_breaks_an_answer_through_the_relay_moves_and_loses_nothing_more() {
    let mut mesh = Mesh::connected();
    mesh.direct = true;
    mesh.try_candidates(0, &[address(2)]);
    mesh.settle();
    mesh.assert_connected();
    mesh.direct = false;
    // Both ends notice, one after the other.
    mesh.try_relay(0);
    mesh.try_relay(1);
    assert_eq!(mesh.endpoints(), [relayed(2), relayed(1)]);
    let mut numbered = Numbered::new();
    numbered.send(&mut mesh, 100);
    mesh.settle();
    numbered.assert_complete(&mesh);
}

#[test]
fn an_end_that_does_not_notice_follows_after_five_seconds() {
    let mut mesh = Mesh::connected();
    mesh.direct = true;
    mesh.try_candidates(0, &[address(2)]);
    mesh.settle();
    mesh.direct = false;
    mesh.try_relay(0);
    assert_eq!(mesh.endpoints(), [relayed(2), address(1)]);
    mesh.pass(SILENT_AFTER);
    mesh.world.send(0, &mesh.packet(0, b"through the relay"));
    mesh.settle();
    mesh.assert_connected();
}

#[test]
fn packets_of_one_direction_that_arrive_directly_do_not_end_a_relay() {
    let mut mesh = Mesh::connected();
    // Host 2 reaches host 1 directly, and host 1 does not reach host 2.
    let two = mesh.world.hosts[1].peer(&mesh.world.hosts[0]);
    two.set_way(Some(Way::Direct(address(1).into())));
    for _ in 0..20 {
        let sent = mesh.packet(1, b"one way");
        mesh.world.send(1, &sent);
        let datagram = mesh.world.under_way.pop_back().unwrap();
        assert_eq!(datagram.to, address(1));
        mesh.world.deliver(&datagram);
        mesh.settle();
        assert_eq!(mesh.endpoints()[0], relayed(2));
    }
    assert_eq!(mesh.world.hosts[0].delivered.len(), 20);
}

#[test]
fn a_new_configured_endpoint_is_tried_while_the_relay_carries_on() {
    let mut mesh = Mesh::connected();
    let moved = |endpoint| PeerConfig {
        endpoint: Some(endpoint),
        ..peer(2)
    };
    mesh.world.now = mesh.world.now + seconds(10);
    mesh.set_peers(0, [moved(address(9)), relay(3, 2), possible_relay(4, 2)]);
    mesh.settle();
    mesh.assert_connected();
    assert_eq!(mesh.endpoints()[0], relayed(2));

    mesh.direct = true;
    mesh.set_peers(0, [moved(address(2)), relay(3, 2), possible_relay(4, 2)]);
    mesh.settle();
    assert_eq!(mesh.endpoints(), [address(2), address(1)]);
}

#[test]
fn an_initiation_through_a_relay_is_not_unasked_and_no_relayed_endpoint_counts_as_direct() {
    let mut mesh = Mesh::new();
    mesh.settle();
    mesh.world.now = mesh.world.now + seconds(1000);
    // The sessions with the relay, which have ended.
    for (host, n) in [(0, 1), (1, 2)] {
        mesh.world.send(host, &packet(n, 3, b"hello"));
        mesh.settle();
    }
    mesh.try_relay(1);
    mesh.assert_connected();
    let hosts = &mesh.world.hosts;
    let two = hosts[0].peer(&hosts[1]);
    assert_eq!(two.heard_unasked(), None);
    assert_eq!(two.direct_endpoint(), None);
}

/// What host 2 does with 2,000 initiations of a stranger, through host 3 or directly: how many it refuses, and how many
/// handshake messages of its own they lead to.
fn flood(through_the_relay: bool) -> (u64, usize) {
    let mut mesh = Mesh::new();
    mesh.settle();
    let own = mesh.world.log.len();
    for n in 0..2000 {
        let bytes = early::initiation(9, 9, n);
        if through_the_relay {
            // Host 2 has no relayed endpoint yet: the source is unknown.
            let packet = envelope(wireguard_ip(1), wireguard_ip(2), &bytes);
            mesh.world.send(2, &packet);
        } else {
            let (from, to, ecn) = (address(77), address(2), Ecn::NotCapable);
            mesh.world.under_way.push_back(Datagram {
                from,
                to,
                bytes,
                ecn,
                fragments: Fragments::Allowed,
            });
        }
        // The handshake thread has no time meanwhile.
        while let Some(datagram) = mesh.world.under_way.pop_front() {
            mesh.world.deliver(&datagram);
        }
    }
    mesh.settle();
    let refused = [Dropped::QueueFull, Dropped::RateLimited].map(|reason| mesh.drops(1, reason));
    let answers = mesh.world.log[own..].iter();
    let answers = answers.filter(|datagram| datagram.from == address(2));
    (refused.iter().sum(), answers.count())
}

#[test]
fn a_flood_of_initiations_through_a_relay_is_limited_as_one_from_the_network() {
    let (direct, relayed) = (flood(false), flood(true));
    assert!(direct.0 > 1500, "{direct:?}");
    assert_eq!(relayed.0, direct.0);
    assert!(relayed.1 <= direct.1, "{relayed:?} {direct:?}");
}

#[test]
fn a_relayed_datagram_is_never_larger_than_the_relays_path_nor_fragmented() {
    let mut mesh = Mesh::connected();
    let with = |config, bytes| PeerConfig {
        mtu: PeerMtu::Path(bytes),
        ..config
    };
    let set = |mesh: &Mesh, relays_path| {
        let relay = with(relay(3, 2), relays_path);
        mesh.set_peers(0, [with(peer(2), 1240), relay, possible_relay(4, 2)]);
    };
    let full = packet(1, 2, &[0; 1240 - 28]);
    // IPv4, UDP and WireGuard take 60 bytes.
    set(&mesh, 1300);
    let before = mesh.world.log.len();
    mesh.world.send(0, &full);
    let sent = &mesh.world.log[before];
    assert_eq!((sent.bytes.len(), sent.to), (1300 + 32, address(3)));
    assert_eq!(sent.fragments, Fragments::None);
    set(&mesh, 1299);
    mesh.world.send(0, &full);
    assert_eq!(mesh.world.log.len(), before + 1);
    assert_eq!(mesh.drops(0, Dropped::TooBig), 1);
}
