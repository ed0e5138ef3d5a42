//! Which of several owners of a prefix gets a flow, while the table changes.

use super::*;

const FLOWS: u64 = 1000;

/// The names of these leaders of one segment, which all own 10.9.0.0/16.
fn leaders(names: &[&str]) -> BTreeMap<PeerId, PeerConfig> {
    let leader = |name: &&str| {
        // The third byte of the name is a digit.
        let n = name.as_bytes()[2];
        let config = config(n).with_allowed_ips([net("10.9.0.0/16")].into());
        (PeerId::new(*name), config)
    };
    names.iter().map(leader).collect()
}

/// The owner of every flow.
fn owners(host: &Host) -> Vec<PeerId> {
    let table = host.core.table.load();
    let owner = |flow| table.route(ip("10.9.1.1"), || flow).unwrap().id().clone();
    (0..FLOWS).map(owner).collect()
}

#[test]
fn flows_keep_their_owner_when_another_prefix_changes() {
    let host = Host::new(1);
    let now = Time::default();
    let mut peers = leaders(&["a-2", "b-3", "c-4"]);
    host.core.set_peers(&peers, now);
    let before = owners(&host);
    for name in peers.keys() {
        let share = before.iter().filter(|owner| *owner == name).count();
        assert!((200..500).contains(&share), "{name} has {share}");
    }

    peers.insert(PeerId::new("d-5"), config(5));
    host.core.set_peers(&peers, now);
    assert_eq!(owners(&host), before);
    peers.remove(&PeerId::new("d-5"));
    host.core.set_peers(&peers, now);
    assert_eq!(owners(&host), before);
}

#[test]
fn an_owner_that_leaves_moves_only_its_own_flows_and_gets_them_back() {
    let host = Host::new(1);
    let now = Time::default();
    let all = leaders(&["a-2", "b-3", "c-4"]);
    host.core.set_peers(&all, now);
    let before = owners(&host);

    host.core.set_peers(&leaders(&["a-2", "c-4"]), now);
    let gone = PeerId::new("b-3");
    let mut takers: Vec<_> = Vec::new();
    for (before, after) in before.iter().zip(owners(&host)) {
        if *before == gone {
            takers.push(after);
        } else {
            assert_eq!(after, *before);
        }
    }
    takers.sort();
    takers.dedup();
    assert_eq!(takers, ["a-2", "c-4"].map(PeerId::new));

    host.core.set_peers(&all, now);
    assert_eq!(owners(&host), before);
}
