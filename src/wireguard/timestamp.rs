//! The timestamps of initiations, which must grow for as long as the key lives.
//!
//! A peer refuses an initiation that is not newer than the last one it accepted. The wall clock alone does
//! not ensure that: it may be set back, or be in 1970 at boot. So the embedder's [`Store`] reserves on disk
//! the highest timestamp that may be used: two minutes ahead of the clock, and again when half of that is
//! used. An orderly end writes the last used timestamp instead. So timestamps are ahead of the clock only
//! after a crash, and by two minutes at most after any number of crashes.

use std::collections::BTreeMap;
use std::time::Duration;

use super::key::PublicKey;

/// Seconds and nanoseconds since the Unix epoch, in the order of time.
///
/// Sent as TAI64N with UTC's seconds, which is what WireGuard implementations send.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Timestamp(Duration);

/// Keeps timestamps across restarts. A call should return when its value is on disk.
///
/// The device calls it on one thread of its own, one call at a time. A call may take as long as the disk
/// needs: handshakes go on meanwhile.
pub trait Store: Send {
    /// Keeps the timestamp that the initiations of the next run must be later than. Called about once a
    /// minute while there are handshakes. Each call has a later timestamp, except the last: at an orderly
    /// end it is the last timestamp that was used.
    fn keep_own(&self, mark: Timestamp);

    /// Keeps the greatest timestamp that was accepted from each peer. Called at most about once a second,
    /// and with a delay of at most that, or of twenty times the duration of the last call.
    fn keep_accepted(&self, accepted: &Accepted);
}

/// The greatest timestamp that was accepted from each peer, in the form in which it was sent.
pub type Accepted = BTreeMap<PublicKey, Tai64n>;

/// A timestamp as it is sent: eight bytes of seconds and four of nanoseconds, big endian (TAI64N), so
/// that bytes compare as times do.
pub type Tai64n = [u8; 12];

/// Timestamps are no finer than this, so that they do not reveal the host's load or the drift of its clock
/// (2^24 ns, as in the kernel).
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
