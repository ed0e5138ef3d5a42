//! Checks before the agent changes anything: capabilities, the TUN device, the nft program.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::Path;

use crate::refusal::Refusal;

/// The device node that creates TUN devices.
const TUN: &str = "/dev/net/tun";
/// `CAP_NET_ADMIN`, the only capability that the agent needs.
const NET_ADMIN: u32 = 12;

/// Refuses a host or a container on which the agent cannot work.
pub fn check() -> Result<(), Refusal> {
    check_rights()?;
    tun(Path::new(TUN))?;
    program("nft", std::env::var_os("PATH").unwrap_or_default())
}

/// Refuses a process that may not change the network.
pub fn check_rights() -> Result<(), Refusal> {
    rights(&fs::read_to_string("/proc/self/status").unwrap_or_default())
}

/// Finds the capability in the text of `/proc/self/status`. Without that text the check passes, and the
/// kernel refuses later.
fn rights(status: &str) -> Result<(), Refusal> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    match effective {
        Some(set) if set & (1 << NET_ADMIN) == 0 => Err(Refusal::configuration(
            "this process may not change the network: run it as root with the capability NET_ADMIN",
        )),
        Some(_) | None => Ok(()),
    }
}

fn tun(path: &Path) -> Result<(), Refusal> {
    let shown = path.display();
    let refuse = |what: &str| {
        Err(Refusal::configuration(format!(
            "{shown} {what}: run modprobe tun on the node, and give the container the device"
        )))
    };
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return refuse("does not exist"),
        Ok(metadata) if !metadata.file_type().is_char_device() => return refuse("is not a device"),
        Ok(_) | Err(_) => {}
    }
    match fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Ok(()),
        // The device node exists, but the kernel has no driver for it.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => {
            refuse("has no driver")
        }
        Err(error) => refuse(&format!("cannot be opened ({error})")),
    }
}

/// Searches PATH for a program, as the shell does.
fn program(name: &str, path: impl AsRef<std::ffi::OsStr>) -> Result<(), Refusal> {
    let found = std::env::split_paths(&path).any(|dir| {
        fs::metadata(dir.join(name))
            .is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
    });
    if found {
        Ok(())
    } else {
        Err(Refusal::configuration(format!(
            "the program {name} is not in PATH: install nftables"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_without_net_admin_is_refused() {
        assert!(rights("Name:\tx\nCapEff:\t0000000000001000\n").is_ok());
        let error = rights("CapEff:\t00000000000000ff\n").unwrap_err();
        assert!(error.sentence.contains("NET_ADMIN"), "{error}");
        assert!(rights("").is_ok(), "the kernel refuses later");
    }

    #[test]
    fn a_path_that_is_not_a_tun_device_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tun");
        let error = tun(&path).unwrap_err();
        assert!(error.sentence.contains("tun does not exist"), "{error}");
        fs::write(&path, "").unwrap();
        let error = tun(&path).unwrap_err();
        assert!(error.sentence.contains("tun is not a device"), "{error}");
    }

    #[test]
    fn a_missing_program_is_named() {
        assert!(program("sh", "/nonexistent:/bin:/usr/bin").is_ok());
        let error = program("nft", "/nonexistent").unwrap_err();
        assert!(error.sentence.starts_with("the program nft"), "{error}");
    }
}
