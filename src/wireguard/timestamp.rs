//! The timestamps of initiations, which must grow for as long as the key lives.
//!
//! A peer refuses an initiation that is not newer than the last one it took. The wall clock alone
//! does not see to that: it may be set back, or be in 1970 at boot. So the highest timestamp that may
//! have been used is reserved on disk by the embedder's [`Store`]: two minutes ahead of the clock, and
//! again when half of that is used. An orderly end writes the last timestamp that was used instead.
//! So timestamps are ahead of the clock only after a crash, by two minutes at most, however many
//! crashes there were.

use std::collections::BTreeMap;
use std::time::Duration;

use super::key::PublicKey;

/// Seconds and nanoseconds since the Unix epoch, in the order of time.
///
/// Sent as TAI64N with UTC's seconds, which is what WireGuard implementations send.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Timestamp(Duration);

/// What keeps timestamps over restarts. What it is given should be on disk when a call returns.
///
/// It is called on one thread of its own, one call at a time, and a call may take as long as the disk
/// needs: handshakes go on meanwhile.
pub trait Store: Send {
    /// Keeps the timestamp that the initiations of the next run must be later than: about once a minute
    /// in which there are handshakes. Each call has a later one, but for the last: at an orderly end it
    /// is the timestamp that was used last.
    fn keep_own(&self, mark: Timestamp);

    /// Keeps the greatest timestamp that was accepted of each peer: about once a second at most. It is
    /// never put off by more than that, or by twenty times what the last call took.
    fn keep_accepted(&self, accepted: &Accepted);
}

/// The greatest timestamp that was accepted of each peer, as it was sent.
pub type Accepted = BTreeMap<PublicKey, Tai64n>;

/// A timestamp as it is sent: eight bytes of seconds and four of nanoseconds, big endian (TAI64N), so
/// that bytes compare as times do.
pub type Tai64n = [u8; 12];

/// Timestamps are no finer than this, so that they do not tell the machine's load or its clock's
/// drift (as in the kernel: 2^24 ns).
const GRANULARITY: u32 = 1 << 24;

const TAI64_BASE: u64 = (1 << 62) + 10;

impl Timestamp {
    /// A time since the Unix epoch.
    pub const fn from_unix(since_epoch: Duration) -> Self {
        Self(since_epoch)
    }

    /// The time since the Unix epoch.
    pub const fn to_unix(self) -> Duration {
        self.0
    }

    pub(super) fn plus(self, time: Duration) -> Self {
        Self(self.0.saturating_add(time))
    }

    pub(super) fn coarse(self) -> Self {
        let nanos = self.0.subsec_nanos() & !(GRANULARITY - 1);
        Self(Duration::new(self.0.as_secs(), nanos))
    }

    /// The form in which it is sent.
    pub fn to_tai64n(self) -> Tai64n {
        let mut bytes = [0; 12];
        let seconds = TAI64_BASE.wrapping_add(self.0.as_secs());
        bytes[..8].copy_from_slice(&seconds.to_be_bytes());
        bytes[8..].copy_from_slice(&self.0.subsec_nanos().to_be_bytes());
        bytes
    }
}
