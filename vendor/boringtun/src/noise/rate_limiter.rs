use super::errors::WireGuardError;
use super::handshake::{b2s_hash, b2s_keyed_mac_16, b2s_keyed_mac_16_2};
use crate::noise::handshake::{LABEL_COOKIE, LABEL_MAC1};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use aead::generic_array::GenericArray;
use aead::{AeadInPlace, KeyInit};
use chacha20poly1305::{Key, XChaCha20Poly1305};
use rand_core::{OsRng, RngCore};
use subtle::ConstantTimeEq;

const COOKIE_REFRESH: u64 = 128; // Use 128 and not 120 so the compiler can optimize out the division
const COOKIE_SIZE: usize = 16;

type Cookie = [u8; COOKIE_SIZE];

/// Checks the MACs of handshake messages and makes cookies (WireGuard paper 5.4.4, 5.4.7).
///
/// When to ask for a cookie is the caller's decision, and so are the clock and the rate at which
/// replies are sent. The nonces of replies are random; the secret behind the cookies is derived from
/// a random key and the period the time falls into.
pub struct RateLimiter {
    /// The key we use to derive the cookie
    secret_key: [u8; 32],
    mac1_key: [u8; 32],
    cookie_key: Key,
}

impl RateLimiter {
    pub fn new(public_key: &crate::x25519::PublicKey) -> Self {
        let mut secret_key = [0u8; 32];
        OsRng.fill_bytes(&mut secret_key);
        RateLimiter {
            secret_key,
            mac1_key: b2s_hash(LABEL_MAC1, public_key.as_bytes()),
            cookie_key: b2s_hash(LABEL_COOKIE, public_key.as_bytes()).into(),
        }
    }

    /// Compute the correct cookie value based on the current secret value and the source address and port
    fn current_cookie(&self, addr: SocketAddr, now: Duration) -> Cookie {
        let mut addr_bytes = [0u8; 18];

        match addr.ip() {
            IpAddr::V4(a) => addr_bytes[..4].copy_from_slice(&a.octets()[..]),
            IpAddr::V6(a) => addr_bytes[..16].copy_from_slice(&a.octets()[..]),
        }
        addr_bytes[16..].copy_from_slice(&addr.port().to_be_bytes());

        // The current cookie for a given IP is the MAC(responder.changing_secret_every_two_minutes, initiator.ip_address)
        // First we derive the secret from the current time, the value of cur_counter would change with time.
        let cur_counter = now.as_secs() / COOKIE_REFRESH;

        // Next we derive the cookie
        b2s_keyed_mac_16_2(&self.secret_key, &cur_counter.to_le_bytes(), &addr_bytes)
    }

    /// Whether a handshake message was made by someone who knows our public key.
    pub fn verify_mac1(&self, message: &[u8]) -> bool {
        let Some(end) = message.len().checked_sub(2 * COOKIE_SIZE) else {
            return false;
        };
        let (msg, macs) = message.split_at(end);
        b2s_keyed_mac_16(&self.mac1_key, msg)
            .ct_eq(&macs[..COOKIE_SIZE])
            .into()
    }

    /// Whether the sender of a handshake message can receive at the address it sends from.
    ///
    /// `now` is any clock that does not go back.
    pub fn verify_mac2(&self, message: &[u8], addr: SocketAddr, now: Duration) -> bool {
        let Some(end) = message.len().checked_sub(2 * COOKIE_SIZE) else {
            return false;
        };
        let (msg, macs) = message.split_at(end);
        let (mac1, mac2) = macs.split_at(COOKIE_SIZE);
        let cookie = self.current_cookie(addr, now);
        b2s_keyed_mac_16_2(&cookie, msg, mac1).ct_eq(mac2).into()
    }

    /// Writes the reply that tells the sender of a handshake message its cookie.
    pub fn cookie_reply<'a>(
        &self,
        message: &[u8],
        addr: SocketAddr,
        now: Duration,
        dst: &'a mut [u8],
    ) -> Result<&'a mut [u8], WireGuardError> {
        if message.len() < 8 + 2 * COOKIE_SIZE {
            return Err(WireGuardError::InvalidPacket);
        }
        let sender_idx = u32::from_le_bytes([message[4], message[5], message[6], message[7]]);
        let mac1 = &message[message.len() - 2 * COOKIE_SIZE..][..COOKIE_SIZE];
        self.format_cookie_reply(sender_idx, self.current_cookie(addr, now), mac1, dst)
    }

    fn format_cookie_reply<'a>(
        &self,
        idx: u32,
        cookie: Cookie,
        mac1: &[u8],
        dst: &'a mut [u8],
    ) -> Result<&'a mut [u8], WireGuardError> {
        if dst.len() < super::COOKIE_REPLY_SZ {
            return Err(WireGuardError::DestinationBufferTooSmall);
        }

        let (message_type, rest) = dst.split_at_mut(4);
        let (receiver_index, rest) = rest.split_at_mut(4);
        let (nonce, rest) = rest.split_at_mut(24);
        let (encrypted_cookie, _) = rest.split_at_mut(16 + 16);

        // msg.message_type = 3
        // msg.reserved_zero = { 0, 0, 0 }
        message_type.copy_from_slice(&super::COOKIE_REPLY.to_le_bytes());
        // msg.receiver_index = little_endian(initiator.sender_index)
        receiver_index.copy_from_slice(&idx.to_le_bytes());
        OsRng.fill_bytes(nonce);

        let cipher = XChaCha20Poly1305::new(&self.cookie_key);

        let iv = GenericArray::from_slice(nonce);

        encrypted_cookie[..16].copy_from_slice(&cookie);
        let tag = cipher
            .encrypt_in_place_detached(iv, mac1, &mut encrypted_cookie[..16])
            .map_err(|_| WireGuardError::DestinationBufferTooSmall)?;

        encrypted_cookie[16..].copy_from_slice(&tag);

        Ok(&mut dst[..super::COOKIE_REPLY_SZ])
    }
}
