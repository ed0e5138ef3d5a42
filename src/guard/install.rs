//! `selvedge guard --install`: makes systemd run the guard before the kubelet starts.
//!
//! It copies this program to `STATE-DIR/bin`, and writes a drop-in for each unit that may start the kubelet.
//! systemd reads all drop-ins when it starts, so the next boot needs no `daemon-reload`. The manifests do
//! this in an init container; an operator can do it on the host.
//!
//! A file that cannot be written is reported and is no failure: the agent starts after this, and matters more
//! than the guard of the next boot. [`super::boots`] notices a guard that does not run.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use anyhow::Context as _;

use super::FILE;
use super::boots::{self, INSTALLED};
use crate::secure_file;

/// Where a host keeps its own units and drop-ins.
pub const SYSTEMD: &str = "/etc/systemd/system";
/// The directory of the program below `--state-dir`.
pub(super) const BIN: &str = "bin";
/// The program's name there.
const PROGRAM: &str = "selvedge";
/// The drop-in's name.
const DROP_IN: &str = "50-selvedge-guard.conf";
/// The units of the distributions that start a kubelet.
const UNITS: [&str; 3] = ["k3s.service", "k3s-agent.service", "kubelet.service"];

/// Checks a unit's name, from which a directory's name is made.
pub(super) fn unit(text: &str) -> Result<String, String> {
    let name = text.strip_suffix(".service").unwrap_or_default();
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '@' | ':');
    if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
        return Err("must be the name of a service, such as kubelet.service".into());
    }
    Ok(text.to_owned())
}

/// Copies the program and writes the drop-ins of `units`. Returns sentences on what it wrote and what it
/// could not write. Files with the right content stay untouched.
pub(super) fn install(state_dir: &Path, systemd: &Path, units: &[String]) -> Vec<String> {
    if !systemd.is_dir() {
        return vec![format!(
            "this host has no {}, so it has no systemd: nothing runs the guard at boot",
            systemd.display()
        )];
    }
    let program = state_dir.join(BIN).join(PROGRAM);
    let mut sentences = Vec::new();
    match copy(Path::new("/proc/self/exe"), &program) {
        Ok(true) => sentences.push(format!("wrote {}", program.display())),
        Ok(false) => {}
        Err(error) => {
            return vec![format!(
                "cannot write {}: {error:#}: nothing runs the guard at boot",
                program.display()
            )];
        }
    }
    let text = drop_in(state_dir);
    let usual = UNITS.map(str::to_owned);
    let units = if units.is_empty() { &usual[..] } else { units };
    let (mut written, mut there) = (false, false);
    for unit in units {
        let dir = systemd.join(format!("{unit}.d"));
        let path = dir.join(DROP_IN);
        if fs::read_to_string(&path).is_ok_and(|old| old == text) {
            there = true;
            continue;
        }
        match write(&dir, &text) {
            Ok(()) => {
                written = true;
                sentences.push(format!("wrote {}", path.display()));
            }
            Err(error) => sentences.push(format!(
                "cannot write {}: {error}: {unit} starts without the guard",
                path.display()
            )),
        }
    }
    let mark = state_dir.join(BIN).join(INSTALLED);
    if (written || (there && !mark.exists()))
        && let Some(id) = boots::boot_id()
        && let Err(error) = secure_file::replace(&state_dir.join(BIN), INSTALLED, id.as_bytes())
    {
        sentences.push(format!("cannot write {}: {error}", mark.display()));
    }
    if sentences.is_empty() {
        sentences.push("the guard is installed already".to_owned());
    }
    sentences
}

/// Removes what [`install`] and the agent wrote for the guard, and returns what could not be removed.
pub fn uninstall(state_dir: &Path, systemd: &Path) -> Vec<String> {
    let bin = state_dir.join(BIN);
    let mut failures = Vec::new();
    let mut remove = |path: &Path| {
        if let Err(error) = secure_file::remove(path) {
            failures.push(format!("removing {}: {error}", path.display()));
        }
    };
    // Without an installation in this state directory, the drop-ins belong to another one.
    let units = fs::read_dir(systemd).ok().filter(|_| bin.is_dir());
    for unit in units.into_iter().flatten().flatten() {
        let dir = unit.path();
        let path = dir.join(DROP_IN);
        if path.symlink_metadata().is_ok() {
            remove(&path);
            // It is not empty if other programs have drop-ins in it.
            let _ = fs::remove_dir(&dir);
        }
    }
    for path in [
        state_dir.join(FILE),
        state_dir.join(boots::RAN),
        bin.join(INSTALLED),
        bin.join(PROGRAM),
    ] {
        remove(&path);
    }
    // It is not empty if another program keeps a file in it.
    let _ = fs::remove_dir(&bin);
    failures
}

fn drop_in(state_dir: &Path) -> String {
    let program = state_dir.join(BIN).join(PROGRAM);
    let state_dir = state_dir.display();
    format!(
        "# Written by selvedge guard --install. Until the agent runs, packets for other regions are refused.\n\
         # The kubelet starts even if this fails. On a node where no agent ever ran it does nothing.\n\
         [Service]\n\
         ExecStartPre=-{} guard --state-dir={state_dir}\n",
        program.display()
    )
}

/// Copies a program, unless the same is there; returns whether it did.
fn copy(from: &Path, to: &Path) -> anyhow::Result<bool> {
    let content = fs::read(from).context("reading this program")?;
    let dir = to.parent().context("it has no directory")?;
    fs::create_dir_all(dir)?;
    if fs::read(to).is_ok_and(|old| old == content) {
        return Ok(false);
    }
    secure_file::replace(dir, PROGRAM, &content)?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    Ok(true)
}

/// Replaces the drop-in. systemd reads only names that end in `.conf`, so never a half-written file.
fn write(dir: &Path, text: &str) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let new = dir.join(format!(".{DROP_IN}.new"));
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o644)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(&new)?;
    io::Write::write_all(&mut file, text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, dir.join(DROP_IN))?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Host {
        dir: tempfile::TempDir,
    }

    impl Host {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("systemd")).unwrap();
            Self { dir }
        }

        fn path(&self, name: &str) -> std::path::PathBuf {
            self.dir.path().join(name)
        }

        fn install(&self, units: &[&str]) -> String {
            let units = units.iter().map(|&unit| unit.to_owned());
            let (state, systemd) = (self.path("state"), self.path("systemd"));
            install(&state, &systemd, &units.collect::<Vec<_>>()).join("\n")
        }

        fn uninstall(&self) -> Vec<String> {
            uninstall(&self.path("state"), &self.path("systemd"))
        }
    }

    #[test]
    fn the_guard_is_installed_once_and_reports_what_it_wrote() {
        let host = Host::new();
        let output = host.install(&["k3s.service", "k3s-agent.service"]);
        assert_eq!(output.lines().count(), 3, "{output}");
        let drop_in = host.path("systemd/k3s.service.d").join(DROP_IN);
        let text = fs::read_to_string(drop_in).unwrap();
        let program = host.path("state/bin/selvedge");
        let line = format!("ExecStartPre=-{} guard ", program.display());
        assert!(text.contains(&line), "{text}");
        let mode = fs::metadata(&program).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
        assert_eq!(
            boots::look(&host.path("state")),
            boots::Verdict::NotBootedSince
        );

        let output = host.install(&["k3s.service", "k3s-agent.service"]);
        assert_eq!(output, "the guard is installed already");
        fs::write(&program, "an older version").unwrap();
        assert_eq!(
            host.install(&["k3s.service"]),
            format!("wrote {}", program.display())
        );
    }

    #[test]
    fn a_host_without_systemd_gets_no_guard() {
        let host = Host::new();
        fs::remove_dir(host.path("systemd")).unwrap();
        let output = host.install(&[]);
        assert!(output.contains("has no systemd"), "{output}");
        assert!(!host.path("state").exists());
        assert_eq!(
            boots::look(&host.path("state")),
            boots::Verdict::NotInstalled
        );
    }

    #[test]
    fn a_unit_whose_drop_in_cannot_be_written_is_named_and_the_others_get_theirs() {
        let host = Host::new();
        fs::write(host.path("systemd/k3s.service.d"), "in the way").unwrap();
        let output = host.install(&["k3s.service", "kubelet.service"]);
        assert!(
            output.contains("k3s.service starts without the guard"),
            "{output}"
        );
        assert!(
            host.path("systemd/kubelet.service.d")
                .join(DROP_IN)
                .exists()
        );
    }

    #[test]
    fn uninstall_removes_only_what_was_installed() {
        let host = Host::new();
        host.install(&[]);
        let others = host.path("systemd/kubelet.service.d/10-kubeadm.conf");
        fs::write(&others, "[Service]\n").unwrap();
        fs::write(host.path("state/key"), "a key").unwrap();
        fs::write(host.path("state").join(FILE), "{}").unwrap();
        boots::record_run(&host.path("state"));

        assert_eq!(host.uninstall(), Vec::<String>::new());

        let left = |name| fs::read_dir(host.path(name)).unwrap().count();
        assert_eq!(
            (
                left("systemd"),
                left("systemd/kubelet.service.d"),
                left("state")
            ),
            (1, 1, 1)
        );
        assert!(others.exists());
        assert_eq!(host.uninstall(), Vec::<String>::new());
    }

    #[test]
    fn a_drop_in_of_another_state_directory_stays() {
        let host = Host::new();
        host.install(&["k3s.service"]);
        let other = host.path("other");
        assert_eq!(
            uninstall(&other, &host.path("systemd")),
            Vec::<String>::new()
        );
        assert!(host.path("systemd/k3s.service.d").join(DROP_IN).exists());
    }

    #[test]
    fn a_units_name_is_the_name_of_a_service() {
        assert!(unit("k3s-agent.service").is_ok());
        for bad in [
            "",
            ".service",
            "k3s",
            "../k3s.service",
            "k3s.timer",
            "a b.service",
        ] {
            assert!(unit(bad).is_err(), "{bad}");
        }
    }
}
