// Copyright (c) 2019 Cloudflare, Inc. All rights reserved.
// SPDX-License-Identifier: BSD-3-Clause

pub mod errors;
pub mod handshake;
pub mod rate_limiter;

use crate::noise::errors::WireGuardError;

use std::convert::{TryFrom, TryInto};

type MessageType = u32;
const HANDSHAKE_INIT: MessageType = 1;
const HANDSHAKE_RESP: MessageType = 2;
const COOKIE_REPLY: MessageType = 3;
const DATA: MessageType = 4;

pub const HANDSHAKE_INIT_SZ: usize = 148;
pub const HANDSHAKE_RESP_SZ: usize = 92;
pub const COOKIE_REPLY_SZ: usize = 64;
pub const DATA_OVERHEAD_SZ: usize = 32;

#[derive(Debug)]
pub struct HandshakeInit<'a> {
    sender_idx: u32,
    unencrypted_ephemeral: &'a [u8; 32],
    encrypted_static: &'a [u8],
    encrypted_timestamp: &'a [u8; 28],
}

#[derive(Debug)]
pub struct HandshakeResponse<'a> {
    sender_idx: u32,
    pub receiver_idx: u32,
    unencrypted_ephemeral: &'a [u8; 32],
    encrypted_nothing: &'a [u8],
}

#[derive(Debug)]
pub struct PacketCookieReply<'a> {
    pub receiver_idx: u32,
    nonce: &'a [u8],
    encrypted_cookie: &'a [u8],
}

#[derive(Debug)]
pub struct PacketData<'a> {
    pub receiver_idx: u32,
    pub counter: u64,
    pub encrypted_encapsulated_packet: &'a [u8],
}

/// Describes a packet from network
#[derive(Debug)]
pub enum Packet<'a> {
    HandshakeInit(HandshakeInit<'a>),
    HandshakeResponse(HandshakeResponse<'a>),
    PacketCookieReply(PacketCookieReply<'a>),
    PacketData(PacketData<'a>),
}

#[inline(always)]
pub fn parse_incoming_packet(src: &[u8]) -> Result<Packet<'_>, WireGuardError> {
    if src.len() < 4 {
        return Err(WireGuardError::InvalidPacket);
    }

    // Checks the type, as well as the reserved zero fields
    let packet_type = u32::from_le_bytes(src[0..4].try_into().unwrap());

    Ok(match (packet_type, src.len()) {
        (HANDSHAKE_INIT, HANDSHAKE_INIT_SZ) => Packet::HandshakeInit(HandshakeInit {
            sender_idx: u32::from_le_bytes(src[4..8].try_into().unwrap()),
            unencrypted_ephemeral: <&[u8; 32] as TryFrom<&[u8]>>::try_from(&src[8..40])
                .expect("length already checked above"),
            encrypted_static: &src[40..88],
            encrypted_timestamp: <&[u8; 28] as TryFrom<&[u8]>>::try_from(&src[88..116])
                .expect("length already checked above"),
        }),
        (HANDSHAKE_RESP, HANDSHAKE_RESP_SZ) => Packet::HandshakeResponse(HandshakeResponse {
            sender_idx: u32::from_le_bytes(src[4..8].try_into().unwrap()),
            receiver_idx: u32::from_le_bytes(src[8..12].try_into().unwrap()),
            unencrypted_ephemeral: <&[u8; 32] as TryFrom<&[u8]>>::try_from(&src[12..44])
                .expect("length already checked above"),
            encrypted_nothing: &src[44..60],
        }),
        (COOKIE_REPLY, COOKIE_REPLY_SZ) => Packet::PacketCookieReply(PacketCookieReply {
            receiver_idx: u32::from_le_bytes(src[4..8].try_into().unwrap()),
            nonce: &src[8..32],
            encrypted_cookie: &src[32..64],
        }),
        (DATA, DATA_OVERHEAD_SZ..=usize::MAX) => Packet::PacketData(PacketData {
            receiver_idx: u32::from_le_bytes(src[4..8].try_into().unwrap()),
            counter: u64::from_le_bytes(src[8..16].try_into().unwrap()),
            encrypted_encapsulated_packet: &src[16..],
        }),
        _ => return Err(WireGuardError::InvalidPacket),
    })
}

#[cfg(test)]
mod tests;
