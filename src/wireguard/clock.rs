//! The clock of the tunnel's timers.
//!
//! It includes suspended time, as in the kernel's WireGuard: a session must not outlive its limit because the
//! host was suspended. Only the threads read the clock; all else takes a [`Time`] as an argument.

use std::time::Duration;

/// A point in time since boot. Zero is never reached, so that zero can mean "not armed".
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Time(u64);

impl Time {
    /// Now, by `CLOCK_BOOTTIME`.
    pub(super) fn now() -> Self {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
            .expect("every Linux since 2.6.39 has CLOCK_BOOTTIME");
        Self::from_duration(Duration::from(now))
    }

    /// A time this long after boot.
    pub(super) fn from_duration(since_boot: Duration) -> Self {
        Self(
            u64::try_from(since_boot.as_nanos())
                .unwrap_or(u64::MAX)
                .max(1),
        )
    }

    /// The time since `earlier`; zero if it is in the future.
    pub(super) fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// The duration since boot.
    pub(super) fn as_duration(self) -> Duration {
        Duration::from_nanos(self.0)
    }

    /// The nanoseconds since boot, for an atomic.
    pub(super) fn as_nanos(self) -> u64 {
        self.0
    }

    /// The time behind [`Self::as_nanos`], unless that is 0.
    pub(super) fn from_nanos(nanos: u64) -> Option<Self> {
        (nanos != 0).then_some(Self(nanos))
    }
}

impl std::ops::Add<Duration> for Time {
    type Output = Self;

    fn add(self, later: Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(later.as_nanos()).unwrap_or(u64::MAX)),
        )
    }
}
