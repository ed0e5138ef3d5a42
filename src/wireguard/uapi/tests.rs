//! Tests of the configuration protocol: its text both ways, hostile input, the socket.
#![expect(clippy::disallowed_methods, reason = "waits for threads")]

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use proptest::prelude::*;

use super::*;

/// What a client writes for a request: the parser's opposite.
fn set_text(set: &Set) -> String {
    fn key<K>(
        text: &mut String,
        name: &str,
        update: &KeyUpdate<K>,
        bytes: impl Fn(&K) -> [u8; 32],
    ) {
        match update {
            KeyUpdate::Keep => {}
            KeyUpdate::Clear => line(text, name, Hex(&[0; 32])),
            KeyUpdate::Set(key) => line(text, name, Hex(&bytes(key))),
        }
    }
    let mut text = "set=1\n".to_owned();
    key(&mut text, "private_key", &set.private_key, |key| key.0);
    if let Some(port) = set.listen_port {
        line(&mut text, "listen_port", port);
    }
    if let Some(mark) = set.fwmark {
        line(&mut text, "fwmark", mark);
    }
    if set.replace_peers {
        line(&mut text, "replace_peers", true);
    }
    for peer in &set.peers {
        line(&mut text, "public_key", Hex(&peer.public_key.0));
        if peer.remove {
            line(&mut text, "remove", true);
        }
        if peer.update_only {
            line(&mut text, "update_only", true);
        }
        key(&mut text, "preshared_key", &peer.preshared_key, |key| key.0);
        if let Some(endpoint) = peer.endpoint {
            line(&mut text, "endpoint", endpoint);
        }
        if let Some(seconds) = peer.persistent_keepalive {
            line(&mut text, "persistent_keepalive_interval", seconds);
        }
        if peer.replace_allowed_ips {
            line(&mut text, "replace_allowed_ips", true);
        }
        for change in &peer.allowed_ips {
            match change {
                AllowedIp::Add(net) => line(&mut text, "allowed_ip", net),
                AllowedIp::Remove(net) => line(&mut text, "allowed_ip", format!("-{net}")),
            }
        }
    }
    text.push('\n');
    text
}

/// Feeds text in pieces of the given size and returns what came out.
fn parse(text: &[u8], piece: usize) -> Vec<Result<Request, Errno>> {
    let mut parser = Parser::default();
    let mut requests = Vec::new();
    for mut input in text.chunks(piece) {
        while let Some(request) = parser.feed(&mut input) {
            requests.push(request);
        }
        assert!(input.is_empty(), "the parser left {input:?}");
    }
    requests
}

fn parse_one(text: &str) -> Result<Set, Errno> {
    match parse(text.as_bytes(), usize::MAX).pop() {
        Some(Ok(Request::Set(set))) => Ok(set),
        Some(Ok(Request::Get)) => panic!("{text:?} was read as a get"),
        Some(Err(errno)) => Err(errno),
        None => panic!("{text:?} is not a whole request"),
    }
}

fn key_text(byte: u8) -> String {
    Hex(&[byte; 32]).to_string()
}

#[test]
fn a_request_as_wg_writes_it_is_read() {
    let set = parse_one(&format!(
        "set=1\nprivate_key={}\nlisten_port=51820\nfwmark=51966\nreplace_peers=true\n\
         public_key={}\npreshared_key={}\nendpoint=[2001:db8::1]:51820\n\
         persistent_keepalive_interval=25\nreplace_allowed_ips=true\n\
         allowed_ip=10.42.1.7/24\nallowed_ip=-fd00::/8\npublic_key={}\nremove=true\n\n",
        key_text(1),
        key_text(2),
        key_text(0),
        key_text(0xff),
    ))
    .unwrap();
    let mut first = PeerSet::new(PublicKey([2; 32]));
    first.preshared_key = KeyUpdate::Clear;
    first.endpoint = Some("[2001:db8::1]:51820".parse().unwrap());
    first.persistent_keepalive = Some(25);
    first.replace_allowed_ips = true;
    first.allowed_ips = vec![
        AllowedIp::Add("10.42.1.0/24".parse().unwrap()),
        AllowedIp::Remove("fd00::/8".parse().unwrap()),
    ];
    let mut second = PeerSet::new(PublicKey([0xff; 32]));
    second.remove = true;
    assert_eq!(
        set,
        Set {
            private_key: KeyUpdate::Set(clamped([1; 32])),
            listen_port: Some(51820),
            fwmark: Some(51966),
            replace_peers: true,
            peers: vec![first, second],
        }
    );
}

#[test]
fn several_requests_on_one_connection_are_read_one_by_one() {
    let text = b"get=1\n\nset=1\n\nset=1\nlisten_port=x\n\nget=1\n\n";
    let expected = [
        Ok(Request::Get),
        Ok(Request::Set(Set::default())),
        Err(Errno::EINVAL),
        Ok(Request::Get),
    ];
    for piece in [1, 2, 7, usize::MAX] {
        assert_eq!(parse(text, piece), expected, "in pieces of {piece}");
    }
}

#[test]
fn a_request_that_breaks_off_changes_nothing() {
    let whole = format!(
        "set=1\npublic_key={}\nallowed_ip=10.0.0.0/24\n\n",
        key_text(9)
    );
    for end in 0..whole.len() {
        assert_eq!(
            parse(&whole.as_bytes()[..end], 11),
            [],
            "cut after {end} bytes"
        );
    }
}

#[test]
fn invalid_lines_are_answered_with_an_errno() {
    let public_key = format!("public_key={}\n", key_text(7));
    let cases = [
        ("", "", Errno::EPROTO),
        ("", "get=2\n", Errno::EPROTO),
        ("", "set\n", Errno::EPROTO),
        ("", "listen_port=1\n", Errno::EPROTO),
        ("", "get=1\nlisten_port=1\n", Errno::EINVAL),
        ("set=1\n", "listen_port\n", Errno::EPROTO),
        ("set=1\n", "listen_port=\n", Errno::EINVAL),
        ("set=1\n", "listen_port=65536\n", Errno::EINVAL),
        ("set=1\n", "listen_port=+1\n", Errno::EINVAL),
        ("set=1\n", "listen_port=1 \n", Errno::EINVAL),
        ("set=1\n", "listen_port=1\r\n", Errno::EINVAL),
        ("set=1\n", "listen_port=1\0\n", Errno::EINVAL),
        ("set=1\n", "fwmark=0x1\n", Errno::EINVAL),
        ("set=1\n", "fwmark=4294967296\n", Errno::EINVAL),
        ("set=1\n", "replace_peers=false\n", Errno::EINVAL),
        ("set=1\n", "unknown=1\n", Errno::EINVAL),
        ("set=1\n", "endpoint=192.0.2.1:1\n", Errno::EINVAL),
        ("set=1\n", "private_key=00\n", Errno::EINVAL),
        ("set=1\n", "public_key=é\n", Errno::EINVAL),
        ("peer", "listen_port=1\n", Errno::EINVAL),
        ("peer", "remove=1\n", Errno::EINVAL),
        ("peer", "update_only=\n", Errno::EINVAL),
        ("peer", "protocol_version=2\n", Errno::EINVAL),
        (
            "peer",
            "persistent_keepalive_interval=65536\n",
            Errno::EINVAL,
        ),
        ("peer", "endpoint=192.0.2.1\n", Errno::EINVAL),
        ("peer", "endpoint=192.0.2.1:0\n", Errno::EINVAL),
        ("peer", "endpoint=192.0.2.1:65536\n", Errno::EINVAL),
        ("peer", "endpoint=localhost:1\n", Errno::EINVAL),
        ("peer", "endpoint=[fe80::1%no-such-zone]:1\n", Errno::EINVAL),
        ("peer", "endpoint=[fe80::1%]:1\n", Errno::EINVAL),
        ("peer", "endpoint=[fe80::1%1:1\n", Errno::EINVAL),
        ("peer", "allowed_ip=10.0.0.0\n", Errno::EINVAL),
        ("peer", "allowed_ip=10.0.0.0/33\n", Errno::EINVAL),
        ("peer", "allowed_ip=10.0.0.0/\n", Errno::EINVAL),
        ("peer", "allowed_ip=--10.0.0.0/8\n", Errno::EINVAL),
        ("peer", "allowed_ip=::/129\n", Errno::EINVAL),
    ];
    for (before, lines, errno) in cases {
        let before = match before {
            "peer" => format!("set=1\n{public_key}"),
            before => before.to_owned(),
        };
        // The connection is usable afterwards.
        let text = format!("{before}{lines}fwmark=1\n\nget=1\n\n");
        let text = if lines.is_empty() {
            "\nget=1\n\n"
        } else {
            &text
        };
        assert_eq!(
            parse(text.as_bytes(), 3),
            [Err(errno), Ok(Request::Get)],
            "for {text:?}"
        );
    }
}

#[test]
fn a_link_local_endpoint_keeps_its_zone() {
    for zone in ["lo", "1"] {
        let text = format!(
            "set=1\npublic_key={}\nendpoint=[fe80::1%{zone}]:7\n\n",
            key_text(7)
        );
        let set = parse_one(&text).unwrap();
        let endpoint = SocketAddrV6::new("fe80::1".parse().unwrap(), 7, 0, 1);
        assert_eq!(set.peers[0].endpoint, Some(endpoint.into()), "zone {zone}");
    }
}

#[test]
fn a_line_without_an_end_costs_no_memory() {
    let mut parser = Parser::default();
    let block = vec![b'a'; 1 << 16];
    for _ in 0..1024 {
        assert_eq!(parser.feed(&mut block.as_slice()), None);
        assert!(parser.line.capacity() <= 4 * MAX_LINE);
    }
    let mut rest = b"\n\nget=1\n\n".as_slice();
    assert_eq!(parser.feed(&mut rest), Some(Err(Errno::EINVAL)));
    assert_eq!(parser.feed(&mut rest), Some(Ok(Request::Get)));
}

#[test]
fn a_request_without_an_end_is_given_up() {
    let mut parser = Parser::default();
    let text = format!("set=1\npublic_key={}\n", key_text(7));
    assert_eq!(parser.feed(&mut text.as_bytes()), None);
    let block = "allowed_ip=10.0.0.0/8\n".repeat(1 << 15);
    for _ in 0..64 {
        assert_eq!(parser.feed(&mut block.as_bytes()), None);
    }
    assert_eq!(parser.request, None, "what was read so far is forgotten");
    assert_eq!(parser.feed(&mut b"\n".as_slice()), Some(Err(Errno::EINVAL)));
}

#[test]
fn one_request_takes_130000_allowed_ips() {
    let mut text = format!("set=1\npublic_key={}\n", key_text(7));
    for index in 0..130_000_u32 {
        let net = Ipv6Addr::from(0xfd00_1234_5678_9abc_def0_1234_0000_0000 + u128::from(index));
        writeln!(text, "allowed_ip={net}/128").unwrap();
    }
    text.push('\n');
    let set = parse_one(&text).unwrap();
    assert_eq!(set.peers[0].allowed_ips.len(), 130_000);
}

#[test]
fn a_device_is_printed_as_wg_reads_it() {
    let get = Get {
        private_key: Some(PrivateKey([1; 32])),
        listen_port: 51820,
        fwmark: 7,
        peers: vec![PeerGet {
            public_key: PublicKey([2; 32]),
            preshared_key: None,
            endpoint: Some("192.0.2.1:51820".parse().unwrap()),
            last_handshake: Some(Duration::new(1_700_000_000, 5)),
            rx_bytes: 1372,
            tx_bytes: 1428,
            persistent_keepalive: 25,
            allowed_ips: vec!["10.42.1.0/24".parse().unwrap()],
        }],
    };
    let expected = format!(
        "private_key={}\nlisten_port=51820\nfwmark=7\npublic_key={}\npreshared_key={}\n\
         protocol_version=1\nendpoint=192.0.2.1:51820\nlast_handshake_time_sec=1700000000\n\
         last_handshake_time_nsec=5\ntx_bytes=1428\nrx_bytes=1372\n\
         persistent_keepalive_interval=25\nallowed_ip=10.42.1.0/24\nerrno=0\n\n",
        key_text(1),
        key_text(2),
        key_text(0),
    );
    assert_eq!(get.to_text().as_str(), expected);
    assert_eq!(Get::default().to_text().as_str(), "errno=0\n\n");
}

#[test]
fn errors_are_answered_as_negative_numbers() {
    assert_eq!(errno_text(Ok(())), "errno=0\n\n");
    assert_eq!(errno_text(Err(Errno::EINVAL)), "errno=-22\n\n");
}

fn any_prefix() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        (any::<Ipv4Addr>(), 0..=32_u8).prop_map(|(ip, len)| IpNet::new(ip.into(), len)),
        (any::<Ipv6Addr>(), 0..=128_u8).prop_map(|(ip, len)| IpNet::new(ip.into(), len)),
    ]
    .prop_map(|net| net.unwrap().trunc())
}

fn any_key<K: std::fmt::Debug + Clone + 'static>(
    key: impl Fn([u8; 32]) -> K + Clone + 'static,
) -> impl Strategy<Value = KeyUpdate<K>> {
    prop_oneof![
        Just(KeyUpdate::Keep),
        Just(KeyUpdate::Clear),
        (1..=u8::MAX, any::<[u8; 31]>()).prop_map(move |(first, rest)| {
            let mut bytes = [first; 32];
            bytes[1..].copy_from_slice(&rest);
            KeyUpdate::Set(key(bytes))
        }),
    ]
}

fn any_peer() -> impl Strategy<Value = PeerSet> {
    let change = (any::<bool>(), any_prefix()).prop_map(|(remove, net)| match remove {
        true => AllowedIp::Remove(net),
        false => AllowedIp::Add(net),
    });
    (
        (any::<[u8; 32]>(), any::<[bool; 3]>(), any_key(PresharedKey)),
        proptest::option::of((any::<IpAddr>(), 1..=u16::MAX)),
        proptest::option::of(any::<u16>()),
        proptest::collection::vec(change, 0..5),
    )
        .prop_map(
            |(
                (public_key, [remove, update_only, replace], preshared_key),
                endpoint,
                keepalive,
                ips,
            )| {
                PeerSet {
                    public_key: PublicKey(public_key),
                    remove,
                    update_only,
                    preshared_key,
                    endpoint: endpoint.map(SocketAddr::from),
                    persistent_keepalive: keepalive,
                    replace_allowed_ips: replace,
                    allowed_ips: ips,
                }
            },
        )
}

fn any_set() -> impl Strategy<Value = Set> {
    (
        any_key(clamped),
        any::<Option<u16>>(),
        any::<Option<u32>>(),
        any::<bool>(),
        proptest::collection::vec(any_peer(), 0..4),
    )
        .prop_map(
            |(private_key, listen_port, fwmark, replace_peers, peers)| Set {
                private_key,
                listen_port,
                fwmark,
                replace_peers,
                peers,
            },
        )
}

proptest! {
    #[test]
    fn what_is_printed_is_read_back_however_it_is_cut(set in any_set(), piece in 1..600_usize) {
        let text = set_text(&set);
        prop_assert_eq!(parse(text.as_bytes(), piece), [Ok(Request::Set(set))]);
    }

    #[test]
    fn the_pieces_it_comes_in_do_not_change_the_meaning(
        lines in proptest::collection::vec(
            "(set=1|get=1||public_key=[0-9a-f]{64}|allowed_ip=(10|::)[./0-9]{0,9}|[a-z_]{0,9}=?.{0,9})",
            0..20,
        ),
        piece in 1..50_usize,
    ) {
        let text = lines.join("\n");
        prop_assert_eq!(parse(text.as_bytes(), piece), parse(text.as_bytes(), usize::MAX));
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in any::<Vec<u8>>(), piece in 1..50_usize) {
        parse(&bytes, piece);
    }
}

/// A device that records its requests.
#[derive(Default)]
struct Recorder(Mutex<Vec<Set>>);

impl Control for Recorder {
    fn set(&self, set: Set) -> Result<(), Errno> {
        if set.listen_port == Some(1) {
            return Err(Errno::EADDRINUSE);
        }
        self.0.lock().map_err(|_| Errno::EIO)?.push(set);
        Ok(())
    }

    fn get(&self) -> Get {
        Get {
            listen_port: 51820,
            ..Get::default()
        }
    }
}

fn ask(mut stream: &UnixStream, text: &str) -> String {
    stream.write_all(text.as_bytes()).unwrap();
    let mut answer = String::new();
    while !answer.ends_with("\n\n") {
        let mut buffer = [0; 4096];
        match stream.read(&mut buffer).unwrap() {
            0 => break,
            length => answer.push_str(str::from_utf8(&buffer[..length]).unwrap()),
        }
    }
    answer
}

#[test]
fn the_socket_answers_and_is_for_its_owner_only() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path().join("wireguard");
    let device = Arc::new(Recorder::default());
    let server = serve_in(&directory, "wg0", device.clone()).unwrap();

    let mode = |path: &std::path::Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&directory), 0o700);
    assert_eq!(mode(server.path()), 0o600);

    let stream = UnixStream::connect(server.path()).unwrap();
    assert_eq!(ask(&stream, "get=1\n\n"), "listen_port=51820\nerrno=0\n\n");
    assert_eq!(ask(&stream, "set=1\nfwmark=3\n\n"), "errno=0\n\n");
    assert_eq!(ask(&stream, "set=1\nlisten_port=1\n\n"), "errno=-98\n\n");
    assert_eq!(ask(&stream, "set=1\nfwmark=x\n\n"), "errno=-22\n\n");
    assert_eq!(device.0.lock().unwrap().len(), 1);

    let path = server.path().to_owned();
    drop(server);
    assert!(!path.exists());
}

#[test]
fn a_client_that_goes_away_in_the_middle_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let device = Arc::new(Recorder::default());
    let server = serve_in(directory.path(), "wg0", device.clone()).unwrap();
    let mut stream = UnixStream::connect(server.path()).unwrap();
    stream.write_all(b"set=1\nfwmark=3\nlisten_port=7").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, b"");
    assert_eq!(*device.0.lock().unwrap(), []);
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("wg0.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a listener leaves its socket behind");

    let device = Arc::new(Recorder::default());
    let first = serve_in(directory.path(), "wg0", device.clone()).unwrap();
    let Err(refused) = serve_in(directory.path(), "wg0", device) else {
        panic!("a second server took a live socket");
    };
    assert!(
        refused.to_string().contains("another process serves"),
        "{refused:#}"
    );
    let stream = UnixStream::connect(first.path()).unwrap();
    assert_eq!(ask(&stream, "set=1\n\n"), "errno=0\n\n");
}

#[test]
fn a_socket_of_another_program_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let device = Arc::new(Recorder::default());
    let server = serve_in(directory.path(), "wg0", device).unwrap();
    let path = server.path().to_owned();
    std::fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(server);
    assert!(path.exists());
}

#[test]
fn invalid_interface_names_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["", "..", "a/b", "sixteen-letters-"] {
        let device = Arc::new(Recorder::default());
        assert!(
            serve_in(directory.path(), name, device).is_err(),
            "{name:?}"
        );
    }
}

#[test]
fn a_hundred_connections_are_served_and_one_more_is_closed() {
    let directory = tempfile::tempdir().unwrap();
    let device = Arc::new(Recorder::default());
    let server = serve_in(directory.path(), "wg0", device).unwrap();
    let open: Vec<_> = (0..100)
        .map(|_| {
            let stream = UnixStream::connect(server.path()).unwrap();
            assert!(ask(&stream, "get=1\n\n").ends_with("errno=0\n\n"));
            stream
        })
        .collect();
    let mut refused = UnixStream::connect(server.path()).unwrap();
    assert_eq!(refused.read(&mut [0; 8]).unwrap(), 0, "closed at once");

    drop(open);
    let since = Instant::now();
    loop {
        let mut stream = UnixStream::connect(server.path()).unwrap();
        let mut answer = [0; 8];
        let wrote = stream.write_all(b"get=1\n\n");
        if wrote.is_ok() && stream.read(&mut answer).is_ok_and(|length| length > 0) {
            return;
        }
        assert!(
            since.elapsed() < Duration::from_secs(10),
            "the connections stay counted"
        );
    }
}
