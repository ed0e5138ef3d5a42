//! The clocks of the process, read by the shell alone. Everything that decides takes the time as an argument.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Now, on the clock that all timers and timeouts of the control plane run on.
#[expect(clippy::disallowed_methods, reason = "the shell reads the clock")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Waits until then; for ever where there is no time.
pub(crate) async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// The wall clock in Unix seconds; 0 while it is before 1970.
#[expect(clippy::disallowed_methods, reason = "the shell reads the clock")]
pub(crate) fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    })
}
