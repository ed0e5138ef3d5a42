//! The destinations that packets of a peer may have: with `unicast_only`, as in the agent, and without.

use super::*;

/// Host 1 sends packets to these addresses, which host 2 owns. Returns how many are delivered there, and how
/// many are dropped for their destination.
fn sent_to(unicast_only: bool, addresses: &[Ipv4Addr]) -> (usize, u64) {
    let mut world = World::of([1, 2]);
    world.hosts[1] = Host::with(2, Arc::default(), unicast_only);
    let [one, two] = world.hosts.as_slice() else {
        unreachable!()
    };
    let everything = config(2).with_allowed_ips([net("0.0.0.0/0")].into());
    one.set_peers(&[(two, everything)], world.now);
    two.set_peers(&[(one, config(1))], world.now);
    for &address in addresses {
        world.send(0, &packet_between([10, 0, 1, 1].into(), address, b"to you"));
        world.settle();
    }
    let two = &world.hosts[1];
    (two.delivered.len(), two.drops(Dropped::ForeignDestination))
}

const NO_UNICAST: [[u8; 4]; 6] = [
    [0, 0, 0, 0],
    [127, 0, 0, 1],
    [169, 254, 169, 254],
    [224, 0, 0, 5],
    [239, 255, 255, 250],
    [255, 255, 255, 255],
];

#[test]
fn packets_to_loopback_multicast_and_similar_addresses_do_not_reach_the_kernel() {
    let addresses = NO_UNICAST.map(Ipv4Addr::from);
    assert_eq!(sent_to(true, &addresses), (0, 6));
    assert_eq!(sent_to(true, &[[10, 0, 2, 1].into()]), (1, 0));
}

#[test]
fn without_unicast_only_they_are_delivered_as_by_the_kernel() {
    let addresses = NO_UNICAST.map(Ipv4Addr::from);
    assert_eq!(sent_to(false, &addresses), (6, 0));
}
