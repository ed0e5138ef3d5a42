//! Taking down a lab whose values are gone: one that was left up on purpose, or whose program was
//! killed.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::netns::require_root;
use crate::process::wait_for;

/// Ends every process in the namespaces whose names start with `<prefix>-`, and removes them.
///
/// Returns how many processes there were.
///
/// # Errors
///
/// Without root, or when the names cannot be listed.
pub fn teardown(prefix: &str) -> anyhow::Result<usize> {
    require_root()?;
    let namespaces = namespaces(prefix)?;
    let processes = processes(&namespaces);
    for pid in &processes {
        // It may have ended already.
        let _ = kill(*pid, Signal::SIGTERM);
    }
    let gone = || processes_alive(&processes) == 0;
    if wait_for("the lab's processes", Duration::from_secs(5), gone).is_err() {
        for pid in &processes {
            let _ = kill(*pid, Signal::SIGKILL);
        }
    }
    for path in namespaces {
        let _ = umount2(&path, MntFlags::MNT_DETACH);
        let _ = fs::remove_file(path);
    }
    Ok(processes.len())
}

fn namespaces(prefix: &str) -> anyhow::Result<Vec<PathBuf>> {
    let start = format!("{prefix}-");
    let Ok(entries) = fs::read_dir("/run/netns") else {
        // There was none since the machine started.
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&start) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// The processes that live in one of the namespaces, found by the inode of the namespace.
fn processes(namespaces: &[PathBuf]) -> Vec<Pid> {
    let inode = |path: &Path| fs::metadata(path).ok().map(|data| data.ino());
    let inodes: Vec<u64> = namespaces.iter().filter_map(|path| inode(path)).collect();
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let own = inode(&entry.path().join("ns/net"))?;
        inodes.contains(&own).then(|| Pid::from_raw(pid))
    })
    .collect()
}

fn processes_alive(processes: &[Pid]) -> usize {
    let alive = |pid: &&Pid| kill(**pid, None).is_ok();
    processes.iter().filter(alive).count()
}
