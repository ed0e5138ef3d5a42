//! Ends the process when a thread panics.

use std::thread;

/// Ends the process when the thread panics, also where panics unwind.
pub(super) struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            std::process::abort();
        }
    }
}
