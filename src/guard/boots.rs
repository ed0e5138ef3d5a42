//! Finds whether the guard ran at this boot.
//!
//! An installed guard may not run: the host may have no systemd, another unit for its kubelet, or SELinux
//! rules that keep systemd from running a program of the state directory. So the guard saves the kernel's
//! boot id when it runs, the installation saves that of its own boot, and the agent and `selvedge doctor`
//! compare both with the present one.

use std::fs;
use std::path::Path;

use super::install::BIN;
use crate::secure_file;

/// The boot at which the guard ran last, below `--state-dir`.
pub(super) const RAN: &str = "guard-ran";
/// The boot at which the guard was installed, below [`BIN`].
pub(super) const INSTALLED: &str = "installed";
/// A boot id is 36 bytes.
const MAX_SIZE: u64 = 256;

/// The sentence on [`Verdict::DidNotRun`].
pub const DID_NOT_RUN: &str = "the boot guard is installed and did not run at this boot, so traffic for other regions could leave in clear until the agent's first pass: see systemctl status of the unit that starts the kubelet";

/// The result of comparing the boot ids.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// The guard is not installed.
    NotInstalled,
    /// The guard is installed, and this host has not booted since.
    NotBootedSince,
    /// The guard ran at this boot.
    Ran,
    /// The guard was installed before this boot and did not run at it.
    DidNotRun,
}

/// Compares the boot ids that were saved below `state_dir` with the present one.
pub fn look(state_dir: &Path) -> Verdict {
    verdict(
        read(&state_dir.join(BIN).join(INSTALLED)).as_deref(),
        read(&state_dir.join(RAN)).as_deref(),
        boot_id().as_deref(),
    )
}

/// Saves the boot id, which shows that the guard ran at this boot. A failure to write is ignored: guarding
/// matters more.
pub(super) fn record_run(state_dir: &Path) {
    if let Some(id) = boot_id() {
        let _ = secure_file::replace(state_dir, RAN, id.as_bytes());
    }
}

/// The kernel's id of this boot, which is the same in all containers.
pub(super) fn boot_id() -> Option<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

fn read(path: &Path) -> Option<String> {
    let text = secure_file::read(path, MAX_SIZE).ok()??;
    Some(text.trim().to_owned())
}

fn verdict(installed: Option<&str>, ran: Option<&str>, now: Option<&str>) -> Verdict {
    match (installed, now) {
        (None, _) => Verdict::NotInstalled,
        _ if ran.is_some() && ran == now => Verdict::Ran,
        (Some(installed), Some(now)) if installed != now => Verdict::DidNotRun,
        (Some(_), _) => Verdict::NotBootedSince,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guard_that_did_not_run_at_this_boot_is_noticed() {
        let (first, second) = (Some("first"), Some("second"));
        assert_eq!(verdict(None, None, first), Verdict::NotInstalled);
        assert_eq!(verdict(first, None, first), Verdict::NotBootedSince);
        assert_eq!(verdict(first, second, second), Verdict::Ran);
        assert_eq!(verdict(first, None, second), Verdict::DidNotRun);
        assert_eq!(verdict(first, first, second), Verdict::DidNotRun);
        assert_eq!(verdict(first, first, None), Verdict::NotBootedSince);
    }

    #[test]
    fn a_run_saves_the_id_of_this_boot() {
        let dir = tempfile::tempdir().unwrap();
        record_run(dir.path());
        assert_eq!(read(&dir.path().join(RAN)), boot_id());
        record_run(Path::new("/proc/nonexistent"));
    }
}
