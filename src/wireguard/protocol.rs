//! What WireGuard's protocol fixes: the sizes of messages, and the limits of keys and timers
//! (paper, 5.4 and 6.1).
//!
//! The times are those of the kernel's WireGuard. This is the only place where they stand.

use std::time::Duration;

/// The type of a handshake initiation, and its size in bytes. It is the longest handshake message.
pub(super) const INITIATION: u32 = 1;
pub(super) const INITIATION_SIZE: usize = 148;
/// The type of a handshake response, and its size in bytes.
pub(super) const RESPONSE: u32 = 2;
pub(super) const RESPONSE_SIZE: usize = 92;
/// The type of a cookie reply, and its size in bytes.
pub(super) const COOKIE_REPLY: u32 = 3;
pub(super) const COOKIE_REPLY_SIZE: usize = 64;
/// The type of a data message.
pub(super) const DATA: u32 = 4;

/// Bytes before the ciphertext of a data message: type, receiver index, counter.
pub(super) const DATA_HEADER: usize = 16;
/// Bytes of the authentication tag.
pub(super) const TAG: usize = 16;
/// Bytes a data message is longer than what it carries.
pub const OVERHEAD: usize = DATA_HEADER + TAG;

/// No key seals or opens more messages than this (paper, 6.2).
pub(super) const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// A new handshake is due after this many messages.
pub(super) const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
/// No key is used when it is older than this. A peer whose last handshake is older has no session.
pub const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
/// The initiator of a session begins a new handshake when it sends with a key older than this.
pub(super) const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
/// An initiation without an answer is repeated after this time.
pub(super) const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// Initiations are repeated for this time, then given up.
pub(super) const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
/// A peer that sent data is sent something within this time.
pub(super) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// An initiator that receives with a key older than this begins a new handshake. Without it the key
/// would run out while only the other side sends.
pub(super) const REKEY_ON_RECEIVE: Duration = Duration::from_secs(
    REJECT_AFTER_TIME.as_secs() - KEEPALIVE_TIMEOUT.as_secs() - REKEY_TIMEOUT.as_secs(),
);
/// The secret that a cookie is made with changes after this time.
pub(super) const COOKIE_SECRET_MAX_AGE: Duration = Duration::from_secs(120);

/// The receiver index and counter of a data message, if it is one.
pub(super) fn data_header(datagram: &[u8]) -> Option<(u32, u64)> {
    let (header, rest) = datagram.split_first_chunk::<DATA_HEADER>()?;
    let [t0, t1, t2, t3, i0, i1, i2, i3, counter @ ..] = *header;
    let is_data = u32::from_le_bytes([t0, t1, t2, t3]) == DATA && rest.len() >= TAG;
    is_data.then(|| {
        let index = u32::from_le_bytes([i0, i1, i2, i3]);
        (index, u64::from_le_bytes(counter))
    })
}
