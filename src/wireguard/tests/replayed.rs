//! Initiations that another host has recorded and sends again move no endpoint.

use super::super::timestamp::Store;
use super::super::timestamp_store::StoreWriter;
use super::*;

fn endpoint(world: &World, of: usize, at: usize) -> Option<SocketAddr> {
    let way = world.hosts[at].peer(&world.hosts[of]).way();
    way.map(Way::remote)
}

/// The initiation of host 1 that host 2 answered.
fn recorded(world: &World) -> Datagram {
    let initiation = world.log.iter().find(|datagram| datagram.kind() == 1);
    initiation.unwrap().clone()
}

/// Host 2 is killed and starts again with these timestamps.
fn restart(world: &mut World, accepted: &Arc<Mutex<Accepted>>) {
    world.hosts[1] = Host::that_accepted(2, accepted.clone());
    let [one, two] = world.hosts.as_slice() else {
        unreachable!()
    };
    two.set_peers(&[(one, config(1))], world.now);
    // Without the datagrams of host 2 itself.
    world.work();
    world.under_way.clear();
}

/// The number of answers to the recorded initiation, sent from 192.0.2.66.
fn replay(world: &mut World, initiation: &Datagram) -> usize {
    let answers = world.count(2);
    let replayed = Datagram {
        from: address(66),
        ..initiation.clone()
    };
    world.deliver(&replayed);
    world.work();
    let answered = world.count(2) - answers;
    let sent: Vec<_> = world.under_way.drain(..).collect();
    let to_sender = sent.iter().filter(|sent| sent.to == address(66)).count();
    assert_eq!(to_sender, answered);
    answered
}

/// Two hosts with a session, and the accepted timestamps of the second.
fn connected_pair() -> (World, Arc<Mutex<Accepted>>) {
    let mut world = World::pair();
    let accepted = Arc::default();
    world.hosts[1] = Host::that_accepted(2, Arc::clone(&accepted));
    {
        let [one, two] = world.hosts.as_slice() else {
            unreachable!()
        };
        let anywhere = PeerConfig {
            endpoint: None,
            ..config(1)
        };
        two.set_peers(&[(one, anywhere)], world.now);
    }
    world.send(0, &packet(1, 2, b"hello"));
    world.settle();
    assert_eq!(endpoint(&world, 0, 1), Some(address(1)));
    (world, accepted)
}

#[test]
fn a_recorded_initiation_is_refused_after_a_restart_that_kept_the_timestamps() {
    let (mut world, accepted) = connected_pair();
    let initiation = recorded(&world);
    restart(&mut world, &accepted);
    assert_eq!(replay(&mut world, &initiation), 0);
    assert_eq!(world.hosts[1].drops(Dropped::Replayed), 1);
    assert_eq!(endpoint(&world, 0, 1), Some(address(1)));
}

#[test]
fn a_recorded_initiation_moves_no_endpoint_after_a_restart_that_lost_the_timestamps() {
    let (mut world, _) = connected_pair();
    let initiation = recorded(&world);
    restart(&mut world, &Arc::default());
    // The control: without the timestamp it is answered, once.
    assert_eq!(replay(&mut world, &initiation), 1);
    assert_eq!(
        endpoint(&world, 0, 1),
        Some(address(1)),
        "the endpoint moved"
    );
    world.now = world.now + seconds(1);
    assert_eq!(replay(&mut world, &initiation), 0);

    // Host 2 sends to host 1, and the two have a session again.
    world.send(1, &packet(2, 1, b"to host 1"));
    world.pass(seconds(6));
    assert!(
        world
            .log
            .iter()
            .rev()
            .take_while(|sent| sent.kind() != 2)
            .all(|sent| sent.to != address(66))
    );
    world.assert_connected();
}

#[test]
fn the_endpoint_moves_when_the_peer_confirms_the_session() {
    let mut world = World::connected_pair();
    world.hosts[0].wire.address = address(9);
    world.now = world.now + seconds(130);
    world.send(0, &packet(1, 2, b"rekey"));
    world.under_way.retain(|datagram| datagram.kind() == 1);
    world.work();
    world.under_way.retain(|datagram| datagram.kind() == 1);
    let initiation = world.under_way.pop_front().unwrap();
    assert_eq!(initiation.from, address(9));
    world.deliver(&initiation);
    world.work();
    assert_eq!(
        endpoint(&world, 0, 1),
        Some(address(1)),
        "moved by an initiation alone"
    );
    let answer = world.under_way.iter().find(|datagram| datagram.kind() == 2);
    assert_eq!(answer.unwrap().to, address(9));
    world.settle();
    assert_eq!(endpoint(&world, 0, 1), Some(address(9)));
    world.assert_connected();
}

#[test]
fn a_recorded_initiation_is_refused_after_a_peer_was_removed_and_added_again() {
    let (mut world, _) = connected_pair();
    let initiation = recorded(&world);
    world.hosts[1].set_peers(&[], world.now);
    let [one, two] = world.hosts.as_slice() else {
        unreachable!()
    };
    two.set_peers(&[(one, config(1))], world.now);
    world.work();
    world.under_way.clear();
    assert_eq!(replay(&mut world, &initiation), 0);
}

#[test]
fn a_copy_with_another_second_mac_is_dropped_and_the_handshake_succeeds() {
    for copy_first in [true, false] {
        let mut world = World::pair_with_one_endpoint();
        world.send(0, &packet(1, 2, b"hello"));
        // Each handshake message has a copy with another last byte.
        for _ in 0..20 {
            world.work();
            for datagram in std::mem::take(&mut world.under_way) {
                let mut pair = vec![datagram.clone()];
                if matches!(datagram.kind(), 1 | 2) {
                    let mut copy = datagram;
                    *copy.bytes.last_mut().unwrap() ^= 1;
                    pair.insert(usize::from(!copy_first), copy);
                }
                for datagram in pair {
                    world.deliver(&datagram);
                }
            }
        }
        assert_eq!(world.hosts[1].delivered, [packet(1, 2, b"hello")]);
        assert_eq!(world.count(2), 1, "answers");
        // At most one initiation in 20 milliseconds is accepted; a later copy is a replay.
        assert_eq!(world.hosts[1].drops(Dropped::RateLimited), 1);
        world.assert_connected();
    }
}

/// Records every call.
#[derive(Clone, Default)]
struct Counting(Arc<Mutex<Vec<Accepted>>>);

impl Store for Counting {
    fn keep_own(&self, _: Timestamp) {}

    fn keep_accepted(&self, accepted: &Accepted) {
        self.0.lock().unwrap().push(accepted.clone());
    }
}

#[test]
fn accepted_timestamps_are_written_at_once_and_a_burst_takes_few_writes() {
    let accepted = Arc::<Mutex<Accepted>>::default();
    let store = Counting::default();
    let writer = StoreWriter::start(
        Timestamp::default(),
        accepted.clone(),
        Box::new(store.clone()),
    );
    let writer = writer.unwrap();
    for n in 0..200 {
        accepted.lock().unwrap().insert(PublicKey([n; 32]), [n; 12]);
        writer.keep_accepted();
        std::thread::sleep(Duration::from_millis(2));
    }
    drop(writer);
    let kept = store.0.lock().unwrap();
    assert!((2..10).contains(&kept.len()), "{} writes", kept.len());
    assert_eq!(kept.last().unwrap().len(), 200);
    assert!(kept.first().unwrap().len() < 100, "the first one waited");
}
