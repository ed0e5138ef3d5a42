//! A program that has to end at once and say why.
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test may run programs and wait, and fails by panicking"
)]

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A second is promised; a busy machine gets some more before it is a failure.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the program to its end and checks its exit code and its last line on stderr.
pub(crate) fn refused(mut command: Command, code: i32, expected: &str) {
    let begun = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("it runs instead of saying {expected:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    let last = stderr.lines().last().unwrap_or_default();
    assert!(last.contains(expected), "{expected:?} is not in {stderr:?}");
    assert!(last.starts_with("selvedge: "), "{stderr:?}");
    assert_eq!(status.code(), Some(code), "{stderr}");
}
