//! Random bytes, and networks that lose, repeat and reorder datagrams.

use proptest::prelude::*;

use super::*;

#[test]
fn random_bytes_get_no_answer() {
    let mut world = World::pair();
    world.settle();
    let sent = world.log.len();
    for kind in [0, 1, 2, 3, 4, 5, 255] {
        for length in [
            0, 1, 3, 4, 15, 16, 31, 32, 63, 64, 91, 92, 147, 148, 149, 1452, 65_507,
        ] {
            let mut bytes = vec![0x5a; length];
            if let Some(head) = bytes.get_mut(..4) {
                head.copy_from_slice(&[kind, 0, 0, 0]);
            }
            world.deliver(&Datagram {
                from: address(9),
                to: address(2),
                bytes,
                ecn: Ecn::NotCapable,
                fragments: Fragments::Allowed,
            });
        }
    }
    world.settle();
    assert_eq!(world.log.len(), sent);
    world.assert_connected();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn genuine_datagrams_with_a_changed_byte_are_dropped(at in 0_usize..200, bit in 0_u8..8, which in 0_usize..4) {
        let mut world = World::connected_pair();
        world.send(0, &packet(1, 2, &[1; 100]));
        world.under_way.clear();
        let of_interest: Vec<_> = world.log.iter().filter(|datagram| datagram.to == address(2)).cloned().collect();
        let mut changed = of_interest[which % of_interest.len()].clone();
        let at = at % changed.bytes.len();
        changed.bytes[at] ^= 1 << bit;
        // Only the second MAC is not checked without load.
        prop_assume!(changed.kind() != 1 || at < 132);
        let sent = world.log.len();
        world.deliver(&changed);
        world.settle();
        prop_assert_eq!(world.log.len(), sent);
        prop_assert_eq!(&world.hosts[1].delivered, &Vec::<Vec<u8>>::new());
        world.assert_connected();
    }

    #[test]
    fn on_a_bad_network_each_packet_arrives_at_most_once_and_the_tunnel_recovers(script in prop::collection::vec((0_u8..4, any::<u8>(), 0_u64..3000), 1..150)) {
        let mut world = World::pair();
        let mut n = 0_u32;
        for (what, which, millis) in script {
            match what {
                0 => { n += 1; world.send(usize::from(which & 1), &packet(1 + (which & 1), 2 - (which & 1), &n.to_be_bytes())); }
                1 => { world.work(); if !world.under_way.is_empty() { let at = usize::from(which) % world.under_way.len(); world.under_way.remove(at); } }
                2 => { world.work(); if !world.under_way.is_empty() { let at = usize::from(which) % world.under_way.len(); let again = world.under_way[at].clone(); world.deliver(&again); } }
                _ => { world.now = world.now + Duration::from_millis(millis); world.work(); world.under_way.make_contiguous().reverse(); let some: Vec<_> = world.under_way.drain(..).collect(); for datagram in some { world.deliver(&datagram); } }
            }
        }
        for host in &world.hosts {
            let mut once = host.delivered.clone();
            once.sort();
            once.dedup();
            prop_assert_eq!(once.len(), host.delivered.len());
        }
        world.pass(seconds(20));
        for host in &mut world.hosts { host.delivered.clear(); }
        world.assert_connected();
    }
}
