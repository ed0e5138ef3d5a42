//! The thread of the echoes on loopback addresses, with a leader that the test plays.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;

use super::*;
use crate::liveness::{Cause, PathState};
use crate::probe::PORT;
use crate::probe::message::{Kind, Message};
use crate::topology::{NodeName, RegionName, SegmentName};

const LEADER: Ipv4Addr = Ipv4Addr::new(127, 91, 0, 2);

/// A device that nothing goes through.
#[derive(Default)]
struct NoTunnel(Mutex<BTreeSet<IpAddr>>);

impl Tunnel for NoTunnel {
    fn set_diverted(&self, addresses: BTreeSet<IpAddr>) {
        *self.0.lock().unwrap() = addresses;
    }

    fn set_own_addresses(&self, _: BTreeSet<IpAddr>) {}

    fn take_diverted(&self) -> Vec<Diverted> {
        Vec::new()
    }

    fn send_packet(&self, _: &PeerId, _: &[u8]) -> bool {
        false
    }

    fn send_padded(&self, _: &PeerId, _: &[u8], _: u16) -> bool {
        false
    }

    fn ways(&self) -> BTreeMap<PeerId, PeerWay> {
        BTreeMap::new()
    }

    fn write_packet(&self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

/// Answers echoes until `ends` is set.
fn lead(ends: Arc<AtomicBool>) -> JoinHandle<()> {
    let socket = UdpSocket::bind((LEADER, PORT)).unwrap();
    let timeout = Some(Duration::from_millis(50));
    socket.set_read_timeout(timeout).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 2 * LENGTH];
        while !ends.load(Ordering::Relaxed) {
            let Ok((length, from)) = socket.recv_from(&mut buffer) else {
                continue;
            };
            let echo = Message::parse(&buffer[..length]).unwrap();
            let answer = Message {
                kind: Kind::Answer,
                ..echo
            };
            socket.send_to(&answer.encode(), from).unwrap();
        }
    })
}

fn targets(own: [u8; 4]) -> Targets {
    Targets {
        own: Some(own.into()),
        segment: Some(SegmentName::Location(RegionName("a".into()))),
        leaders: [(NodeName("a1".into()), LEADER.into())].into(),
        ..Targets::default()
    }
}

/// Waits until the path through the leader is so.
fn wait_for(said: &Receiver<News>, wanted: PathState) {
    loop {
        let news = said.recv_timeout(Duration::from_secs(10)).unwrap();
        let leader = news.verdicts.leaders.get(&NodeName("a1".into()));
        if leader.is_some_and(|leader| leader.state == wanted) {
            return;
        }
    }
}

#[test]
fn the_thread_follows_a_leader_over_a_socket_that_is_bound_again() {
    let (send, said) = channel();
    let wake = Wake::new().unwrap();
    let tunnel = Arc::new(NoTunnel::default());
    let echoes = Echoes::start(tunnel.clone(), wake, move |news| {
        let _ = send.send(news);
    })
    .unwrap();

    // An address that this host does not have: counted, and tried again.
    echoes.set_targets(targets([192, 0, 2, 1]));
    wait_for(&said, PathState::Unknown);
    let begun = now();
    while echoes.shown().failures < 2 {
        assert!(now() - begun < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(20));
    }

    let ends = Arc::new(AtomicBool::new(false));
    let leader = lead(Arc::clone(&ends));
    echoes.set_targets(targets([127, 91, 0, 1]));
    wait_for(&said, PathState::Up);
    let begun = now();
    while echoes.shown().paths[0].rtt.is_none() {
        assert!(now() - begun < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(20));
    }
    // All that send echoes to this node know it: there are none.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    assert_eq!(runtime.block_on(echoes.drain()), Ok(true));

    ends.store(true, Ordering::Relaxed);
    leader.join().unwrap();
    wait_for(&said, PathState::Down(Cause::Silent));

    // Without another leader there is nothing to wait for.
    assert_eq!(runtime.block_on(echoes.drain()), Ok(false));
    drop(echoes);
    assert_eq!(Arc::strong_count(&tunnel), 1, "the device can end");
}
