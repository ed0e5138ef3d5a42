//! Runs of datagrams between two pairs of sockets on the loopback.

use std::num::NonZeroU8;

use super::*;
use crate::wireguard::packet::Fragments;

fn receive(sockets: &Sockets, v6: bool) -> Vec<(Vec<u8>, Message)> {
    let mut arena = Arena::default();
    sockets
        .family(v6)
        .unwrap()
        .receive(&mut arena, MAX_MESSAGES, true)
        .unwrap();
    let bytes = &arena.bytes;
    arena
        .messages
        .iter()
        .map(|message| (bytes[message.range.clone()].to_vec(), message.clone()))
        .collect()
}

/// Two sockets, and the endpoint of the second for the first.
fn on_loopback(v6: bool) -> (Sockets, Sockets, Endpoint) {
    let (ours, theirs) = (Sockets::bind(0, 0).unwrap(), Sockets::bind(0, 0).unwrap());
    let address: IpAddr = if v6 {
        Ipv6Addr::LOCALHOST.into()
    } else {
        Ipv4Addr::LOCALHOST.into()
    };
    let to = Endpoint::from(SocketAddr::new(address, theirs.port()));
    (ours, theirs, to)
}

#[test]
fn a_run_of_datagrams_arrives_with_its_stride_and_addresses_and_marks() {
    for v6 in [false, true] {
        let (ours, theirs, to) = on_loopback(v6);
        let address = to.remote.ip();
        let outer = Outer {
            ecn: Ecn::Ect0,
            hops: NonZeroU8::new(56),
            ..Outer::default()
        };
        let run: Vec<u8> = (0..250).map(|n| u8::try_from(n).unwrap()).collect();

        assert!(ours.send(&run, 100, &to, outer, true).unwrap());
        let (mut bytes, mut strides) = (Vec::new(), Vec::new());
        while bytes.len() < run.len() {
            for (received, message) in receive(&theirs, v6) {
                bytes.extend(received);
                strides.push(message.stride);
                assert_eq!(message.from.remote, SocketAddr::new(address, ours.port()));
                assert_eq!(message.from.local.unwrap().0, address);
                assert_eq!(message.ecn, Ecn::Ect0);
            }
        }
        assert_eq!(bytes, run);
        assert!(strides[0] == 100, "{strides:?}");

        let back = Endpoint {
            remote: SocketAddr::new(address, ours.port()),
            local: Some((address, 1)),
        };
        theirs.send(b"x", 1, &back, Outer::default(), true).unwrap();
        assert_eq!(receive(&ours, v6)[0].0, b"x");
    }
}

#[test]
fn without_offload_the_datagrams_go_one_by_one() {
    let (ours, theirs) = (Sockets::bind(0, 0).unwrap(), Sockets::bind(0, 0).unwrap());
    let to = Endpoint::from(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), theirs.port()));
    assert!(
        !ours
            .send(&[7; 25], 10, &to, Outer::default(), false)
            .unwrap()
    );
    let mut bytes = 0;
    while bytes < 25 {
        bytes += receive(&theirs, false)
            .iter()
            .map(|(bytes, _)| bytes.len())
            .sum::<usize>();
    }
}

#[test]
fn an_error_for_a_missing_source_address_is_recognised() {
    let sockets = Sockets::bind(0, 0).unwrap();
    let to = Endpoint {
        remote: (Ipv4Addr::LOCALHOST, 9).into(),
        local: Some((Ipv4Addr::new(192, 0, 2, 77).into(), 1)),
    };
    let error = sockets
        .send(b"x", 1, &to, Outer::default(), true)
        .unwrap_err();
    assert!(is_source_gone(&error), "{error}");
}

#[test]
fn a_taken_port_is_refused() {
    let taken = Sockets::bind(0, 0).unwrap();
    let error = Sockets::bind(taken.port(), 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
}

#[test]
fn shutting_down_wakes_the_reader() {
    let sockets = std::sync::Arc::new(Sockets::bind(0, 0).unwrap());
    let reader = std::thread::spawn({
        let sockets = sockets.clone();
        move || {
            let mut arena = Arena::default();
            let _ = sockets.family(false).unwrap().receive(&mut arena, 1, true);
            arena
                .messages
                .iter()
                .map(|message| message.range.len())
                .sum::<usize>()
        }
    });
    std::thread::sleep(std::time::Duration::from_millis(50));
    sockets.shut_down();
    assert_eq!(reader.join().unwrap(), 0);
}

/// What the option that decides on fragments is now.
fn discovery(socket: &UdpSocket) -> libc::c_int {
    let (level, name) = if socket.v6 {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER)
    } else {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER)
    };
    let mut value: libc::c_int = -1;
    let mut length = size_of_u32::<libc::c_int>();
    // SAFETY: the value and its length live through the call.
    let result = unsafe {
        libc::getsockopt(
            socket.socket.as_raw_fd(),
            level,
            name,
            ptr::from_mut(&mut value).cast(),
            &raw mut length,
        )
    };
    assert_eq!(result, 0);
    value
}

#[test]
fn the_option_of_the_socket_follows_what_each_datagram_needs() {
    for v6 in [false, true] {
        let (ours, _theirs, to) = on_loopback(v6);
        let send = |length: usize, fragments| {
            let outer = Outer {
                fragments,
                ..Outer::default()
            };
            ours.send(&vec![0; length], 1400, &to, outer, true).unwrap();
            discovery(ours.family(v6).unwrap())
        };
        let (dont, probe) = (libc::IP_PMTUDISC_DONT, libc::IP_PMTUDISC_PROBE);
        assert_eq!(send(1400, Fragments::Allowed), dont);
        assert_eq!(send(1400, Fragments::None), probe);
        // A small datagram goes in any way, and a run of them.
        assert_eq!(send(148, Fragments::Allowed), probe);
        assert_eq!(send(2800, Fragments::None), probe);
        assert_eq!(send(1400, Fragments::Small), dont);
        assert_eq!(send(148, Fragments::None), dont);
    }
}
