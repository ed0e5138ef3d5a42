//! Handshakes one after the other and from both sides at the same time, with datagrams under way: no packet is
//! lost on a network that loses none.
//!
//! Two leaders behind NAT try several candidates of each other at the same time. So these cases, rare between a
//! client and a server, are common here: an initiation that crosses another, an answer to the last initiation
//! but one, a session that is replaced before its first message arrives.

use proptest::prelude::*;

use super::*;

/// The next step between two hosts whose datagrams keep their order.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// A host sends a packet.
    Packet(usize),
    /// A host begins a handshake.
    Begin(usize),
    /// The first datagram under way to a host arrives.
    Arrive(usize),
    /// Milliseconds pass.
    Time(u64),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (0_usize..2).prop_map(Event::Packet),
        1 => (0_usize..2).prop_map(Event::Begin),
        4 => (0_usize..2).prop_map(Event::Arrive),
        2 => (0_u64..50).prop_map(Event::Time),
    ]
}

/// A world and the packets that were sent in it.
struct Crossing {
    world: World,
    sent: [Vec<Vec<u8>>; 2],
}

impl Crossing {
    fn new() -> Self {
        let mut world = World::connected_pair();
        world.settle();
        world.now = world.now + seconds(1);
        Self {
            world,
            sent: [Vec::new(), Vec::new()],
        }
    }

    fn packet(&mut self, from: usize) {
        let number = u32::try_from(self.sent[from].len()).unwrap();
        let (a, b) = [(1, 2), (2, 1)][from];
        let packet = packet(a, b, &number.to_be_bytes());
        self.world.send(from, &packet);
        self.sent[from].push(packet);
    }

    fn begin(&mut self, from: usize) {
        let id = self.world.hosts[1 - from].id();
        let place = self.world.hosts[1 - from].wire.address;
        self.world.hosts[from].core.try_candidates(&id, &[place]);
        self.world.work();
    }

    fn arrive(&mut self, to: usize) {
        let address = self.world.hosts[to].wire.address;
        let mut under_way = self.world.under_way.iter();
        if let Some(at) = under_way.position(|datagram| datagram.to == address) {
            let datagram = self.world.under_way.remove(at).unwrap();
            self.world.deliver(&datagram);
            self.world.work();
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Packet(from) => self.packet(from),
            Event::Begin(from) => self.begin(from),
            Event::Arrive(to) => self.arrive(to),
            Event::Time(millis) => {
                self.world.now = self.world.now + Duration::from_millis(millis);
            }
        }
    }

    /// The packets that were lost after all datagrams under way have arrived.
    fn missing(mut self) -> Vec<Vec<u8>> {
        self.world.settle();
        let sent = self.sent.into_iter().zip(self.world.hosts.iter().rev());
        let missing = sent.flat_map(|(sent, to)| {
            let arrived = |packet: &Vec<u8>| to.delivered.contains(packet);
            sent.into_iter().filter(move |packet| !arrived(packet))
        });
        missing.collect()
    }
}

#[test]
fn no_packet_is_lost_when_both_sides_begin_at_the_same_time() {
    for first in 0..2 {
        let mut crossing = Crossing::new();
        crossing.begin(first);
        crossing.begin(1 - first);
        for to in [1 - first, first] {
            // The initiation arrives and is answered. Packets are still sealed with the old keys.
            crossing.arrive(to);
            crossing.packet(to);
        }
        for to in [0, 1, 0, 1, 0, 1] {
            crossing.arrive(to);
            crossing.packet(1 - to);
        }
        assert_eq!(crossing.missing(), Vec::<Vec<u8>>::new(), "{first} first");
    }
}

#[test]
fn no_packet_is_lost_when_an_initiation_follows_another() {
    let mut crossing = Crossing::new();
    crossing.begin(0);
    crossing.world.now = crossing.world.now + Duration::from_millis(30);
    crossing.begin(0);
    crossing.packet(0);
    // The first initiation and its answer, whose keys the initiator uses.
    crossing.arrive(1);
    crossing.packet(1);
    crossing.arrive(0);
    crossing.packet(0);
    crossing.world.now = crossing.world.now + Duration::from_millis(30);
    // The second one arrives after that.
    crossing.arrive(1);
    crossing.packet(1);
    assert_eq!(crossing.missing(), Vec::<Vec<u8>>::new());
}

proptest! {
    #[test]
    fn no_packet_is_lost_in_any_order_of_handshakes(events in prop::collection::vec(event(), 0..80)) {
        let mut crossing = Crossing::new();
        for event in events {
            crossing.handle(event);
        }
        prop_assert_eq!(crossing.missing(), Vec::<Vec<u8>>::new());
    }
}
