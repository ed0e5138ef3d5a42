//! The handshake between two sides, driven as an embedder drives it. The first three tests are those of
//! `Tunn` upstream; each of the others shows one patch of `PATCHES.md`.

use super::handshake::{Handshake, SessionKeys, Timestamp, parse_handshake_anon};
use super::rate_limiter::RateLimiter;
use super::*;
use crate::x25519::{PublicKey, StaticSecret};
use rand_core::OsRng;
use std::net::SocketAddr;
use std::time::Duration;

const MY_INDEX: u32 = 0x0102_0304;
const THEIR_INDEX: u32 = 0xf1f2_f3f4;
const NOW: Timestamp = [1; 12];

struct Side {
    private: StaticSecret,
    public: PublicKey,
    handshake: Handshake,
}

impl Side {
    fn new(private: StaticSecret, peer: &PublicKey, preshared_key: Option<[u8; 32]>) -> Side {
        let public = PublicKey::from(&private);
        let handshake = Handshake::new(private.clone(), public, *peer, preshared_key);
        Side {
            private,
            public,
            handshake,
        }
    }

    fn initiate(&mut self, timestamp: Timestamp) -> Vec<u8> {
        let mut dst = [0; HANDSHAKE_INIT_SZ];
        self.handshake
            .format_handshake_initiation(MY_INDEX, timestamp, &mut dst)
            .expect("an initiation")
            .to_vec()
    }

    fn receive_initiation(&mut self, message: &[u8]) -> Result<(), WireGuardError> {
        let Packet::HandshakeInit(packet) = parse_incoming_packet(message)? else {
            return Err(WireGuardError::WrongPacketType);
        };
        let half = parse_handshake_anon(&self.private, &self.public, &packet)?;
        self.handshake.receive_handshake_initialization(half)
    }

    fn respond(&mut self, initiation: &[u8]) -> (Vec<u8>, SessionKeys) {
        self.receive_initiation(initiation)
            .expect("an authentic initiation");
        let mut dst = [0; HANDSHAKE_RESP_SZ];
        let (message, keys) = self
            .handshake
            .format_handshake_response(THEIR_INDEX, &mut dst)
            .expect("a response");
        (message.to_vec(), keys)
    }

    fn receive_response(&mut self, message: &[u8]) -> Result<SessionKeys, WireGuardError> {
        let Packet::HandshakeResponse(packet) = parse_incoming_packet(message)? else {
            return Err(WireGuardError::WrongPacketType);
        };
        self.handshake.receive_handshake_response(packet)
    }
}

fn two_sides(mine: Option<[u8; 32]>, theirs: Option<[u8; 32]>) -> (Side, Side) {
    let my_private = StaticSecret::random_from_rng(OsRng);
    let their_private = StaticSecret::random_from_rng(OsRng);
    let my_public = PublicKey::from(&my_private);
    let their_public = PublicKey::from(&their_private);
    (
        Side::new(my_private, &their_public, mine),
        Side::new(their_private, &my_public, theirs),
    )
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

#[test]
fn handshake_init() {
    let (mut me, _) = two_sides(None, None);
    let init = me.initiate(NOW);
    assert!(matches!(
        parse_incoming_packet(&init),
        Ok(Packet::HandshakeInit(_))
    ));
}

#[test]
fn handshake_init_and_response() {
    let (mut me, mut them) = two_sides(None, None);
    let (response, _) = them.respond(&me.initiate(NOW));
    assert!(matches!(
        parse_incoming_packet(&response),
        Ok(Packet::HandshakeResponse(_))
    ));
}

#[test]
fn full_handshake() {
    let (mut me, mut them) = two_sides(Some([7; 32]), Some([7; 32]));
    let (response, theirs) = them.respond(&me.initiate(NOW));
    let mine = me
        .receive_response(&response)
        .expect("an authentic response");

    assert_eq!(*mine.sending_key, *theirs.receiving_key);
    assert_eq!(*mine.receiving_key, *theirs.sending_key);
    assert_ne!(*mine.sending_key, *mine.receiving_key);
    assert_eq!((mine.local_index, mine.peer_index), (MY_INDEX, THEIR_INDEX));
    assert_eq!(
        (theirs.local_index, theirs.peer_index),
        (THEIR_INDEX, MY_INDEX)
    );
}

#[test]
fn an_initiation_is_refused_unless_its_timestamp_is_newer_than_the_last_one() {
    let (mut me, mut them) = two_sides(None, None);
    them.respond(&me.initiate([2; 12]));

    for timestamp in [[2; 12], [1; 12]] {
        assert!(matches!(
            them.receive_initiation(&me.initiate(timestamp)),
            Err(WireGuardError::WrongTai64nTimestamp)
        ));
    }
    them.receive_initiation(&me.initiate([3; 12]))
        .expect("a newer timestamp");
}

#[test]
fn the_last_two_initiations_may_be_answered_and_no_other() {
    let (mut me, mut them) = two_sides(None, None);
    let mut dst = [0; HANDSHAKE_INIT_SZ];
    for index in 1..=3 {
        me.handshake
            .format_handshake_initiation(index, [index as u8; 12], &mut dst)
            .expect("an initiation");
    }
    assert_eq!(me.handshake.awaiting(), [Some(3), Some(2)]);

    let (response, _) = them.respond(&dst);
    me.receive_response(&response).expect("the third answered");
    assert_eq!(me.handshake.awaiting(), [None, Some(2)]);
    assert!(matches!(
        me.receive_response(&response),
        Err(WireGuardError::UnexpectedPacket)
    ));
}

#[test]
fn a_response_without_an_initiation_is_an_error_and_no_panic() {
    let (mut me, _) = two_sides(None, None);
    assert!(matches!(
        me.handshake
            .format_handshake_response(MY_INDEX, &mut [0; HANDSHAKE_RESP_SZ]),
        Err(WireGuardError::UnexpectedPacket)
    ));
}

#[test]
fn an_initiation_of_another_peer_is_refused() {
    let (_, mut them) = two_sides(None, None);
    let private = StaticSecret::random_from_rng(OsRng);
    let mut stranger = Side::new(private, &them.public, None);
    assert!(matches!(
        them.receive_initiation(&stranger.initiate(NOW)),
        Err(WireGuardError::WrongKey)
    ));
}

#[test]
fn no_handshake_is_made_with_a_key_of_small_order() {
    // The points zero and one: of order 4 and 1 (RFC 7748, 6.1).
    let mut one = [0; 32];
    one[0] = 1;
    for small in [[0; 32], one] {
        let private = StaticSecret::random_from_rng(OsRng);
        let mut me = Side::new(private, &PublicKey::from(small), None);
        assert!(matches!(
            me.handshake
                .format_handshake_initiation(MY_INDEX, NOW, &mut [0; HANDSHAKE_INIT_SZ]),
            Err(WireGuardError::WrongKey)
        ));
    }
}

#[test]
fn an_initiation_with_an_ephemeral_key_of_small_order_is_refused() {
    let (mut me, mut them) = two_sides(None, None);
    let mut init = me.initiate(NOW);
    init[8..40].fill(0);
    assert!(matches!(
        them.receive_initiation(&init),
        Err(WireGuardError::WrongKey)
    ));
}

#[test]
fn a_changed_preshared_key_counts_for_the_answer_to_an_initiation_under_way() {
    let (mut me, mut them) = two_sides(None, Some([7; 32]));
    let init = me.initiate(NOW);
    let (response, _) = them.respond(&init);
    assert!(matches!(
        me.receive_response(&response),
        Err(WireGuardError::InvalidAeadTag)
    ));

    me.handshake.set_preshared_key(Some([7; 32]));
    me.receive_response(&response)
        .expect("the preshared keys are equal now");
}

#[test]
fn a_new_private_key_forgets_the_handshakes_under_way() {
    let (mut me, mut them) = two_sides(None, None);
    let (response, _) = them.respond(&me.initiate(NOW));
    let private = StaticSecret::random_from_rng(OsRng);
    let public = PublicKey::from(&private);
    me.handshake.set_static_private(private, public);

    assert_eq!(me.handshake.awaiting(), [None, None]);
    assert!(matches!(
        me.receive_response(&response),
        Err(WireGuardError::UnexpectedPacket)
    ));
}

#[test]
fn mac1_is_made_with_the_receivers_public_key() {
    let (mut me, them) = two_sides(None, None);
    let mut init = me.initiate(NOW);
    assert!(RateLimiter::new(&them.public).verify_mac1(&init));
    assert!(!RateLimiter::new(&me.public).verify_mac1(&init));
    init[4] ^= 1;
    assert!(!RateLimiter::new(&them.public).verify_mac1(&init));
    assert!(!RateLimiter::new(&them.public).verify_mac1(&init[..31]));
}

#[test]
fn a_cookie_is_good_for_one_address_and_port_and_for_a_limited_time() {
    let (mut me, them) = two_sides(None, None);
    let limiter = RateLimiter::new(&them.public);
    let (source, start) = (address("192.0.2.1:51820"), Duration::from_secs(1));
    let first = me.initiate(NOW);
    assert!(!limiter.verify_mac2(&first, source, start));

    let mut dst = [0; COOKIE_REPLY_SZ];
    let reply = limiter
        .cookie_reply(&first, source, start, &mut dst)
        .expect("a cookie reply");
    let Ok(Packet::PacketCookieReply(reply)) = parse_incoming_packet(reply) else {
        panic!("no cookie reply");
    };
    me.handshake
        .receive_cookie_reply(reply)
        .expect("an authentic cookie");

    let second = me.initiate([2; 12]);
    assert!(limiter.verify_mac2(&second, source, start));
    assert!(!limiter.verify_mac2(&second, address("192.0.2.1:51821"), start));
    assert!(!limiter.verify_mac2(&second, address("192.0.2.2:51820"), start));
    assert!(!limiter.verify_mac2(&second, source, start + Duration::from_secs(128)));
}

#[test]
fn two_cookie_replies_have_different_nonces() {
    let (mut me, them) = two_sides(None, None);
    let limiter = RateLimiter::new(&them.public);
    let init = me.initiate(NOW);
    let nonce = || {
        let mut dst = [0; COOKIE_REPLY_SZ];
        limiter
            .cookie_reply(&init, address("[::1]:1"), Duration::ZERO, &mut dst)
            .expect("a cookie reply");
        dst[8..32].to_vec()
    };
    assert_ne!(nonce(), nonce());
}
