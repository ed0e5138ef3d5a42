//! Network namespaces with unique names that vanish with the value that stands for them, and ways
//! to run a command or a piece of code inside one.
//!
//! What is put into the namespaces is other modules' business; see `topology` for a whole network.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, bail, ensure};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns};
use nix::unistd::geteuid;

use crate::process::Process;

/// Where `ip netns` keeps the names.
const NETNS_DIR: &str = "/run/netns";

/// A named network namespace, deleted when the value is dropped (also by a panicking test).
///
/// The name is visible to `ip netns`, so that a person can look at a lab that is up.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    keep: bool,
}

impl Namespace {
    /// Makes a namespace called `<unique prefix>-<label>`, with `lo` up.
    ///
    /// # Errors
    ///
    /// Without root, or when `ip netns add` fails.
    pub fn new(label: &str) -> anyhow::Result<Self> {
        Self::named(format!("{}-{label}", unique_prefix()))
    }

    /// Makes a namespace of exactly this name, for several of them that share one prefix.
    ///
    /// # Errors
    ///
    /// Without root, or when a namespace of this name exists already.
    pub fn named(name: String) -> anyhow::Result<Self> {
        require_root()?;
        finish(
            "ip netns add",
            Command::new("ip").args(["netns", "add", &name]),
        )?;
        let namespace = Self { name, keep: false };
        namespace.run("ip link set lo up")?;
        Ok(namespace)
    }

    /// The namespace's name, as `ip netns list` prints it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for the namespace, for programs that want a path (CNI plugins do).
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(NETNS_DIR).join(&self.name)
    }

    /// Leaves the namespace behind when the value is dropped, for a lab that stays up.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// A command that will run inside; its process id is that of `program`.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command.stdin(Stdio::null());
        command
    }

    /// Runs a command line whose words are separated by blanks, and returns what it printed.
    ///
    /// # Errors
    ///
    /// When it cannot be started or fails; the error repeats the line and its standard error.
    pub fn run(&self, line: &str) -> anyhow::Result<String> {
        let mut words = line.split_whitespace();
        let program = words.next().context("an empty command line")?;
        finish(
            &format!("[{}] {line}", self.name),
            self.command(program).args(words),
        )
    }

    /// Runs a command line like [`run`](Self::run) and returns its outcome, whatever it is.
    ///
    /// # Errors
    ///
    /// Only when it cannot be started.
    pub fn attempt(&self, line: &str) -> anyhow::Result<Output> {
        let mut words = line.split_whitespace();
        let program = words.next().context("an empty command line")?;
        self.command(program)
            .args(words)
            .output()
            .with_context(|| format!("[{}] {line}", self.name))
    }

    /// Runs a shell script (`sh -eu`), for pipes, quotes and several commands at once.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    pub fn sh(&self, script: &str) -> anyhow::Result<String> {
        finish(
            &format!("[{}] {script}", self.name),
            self.command("sh").args(["-euc", script]),
        )
    }

    /// Starts a command line in the background; it is stopped when the returned value is dropped.
    ///
    /// Its output goes to this process's standard error.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn spawn(&self, line: &str) -> anyhow::Result<Process> {
        let mut words = line.split_whitespace();
        let program = words.next().context("an empty command line")?;
        let mut command = self.command(program);
        command.args(words);
        Process::start(line, command)
    }

    /// Moves the calling thread into the namespace, for good.
    ///
    /// Sockets and processes made by this thread from now on belong there. Use it on a thread of
    /// its own; [`within`](Self::within) makes one.
    ///
    /// # Errors
    ///
    /// Without root, or when the namespace is gone.
    pub fn enter(&self) -> anyhow::Result<()> {
        enter_path(&self.path())
    }

    /// Runs `work` on a new thread inside the namespace and returns its result.
    ///
    /// # Panics
    ///
    /// When the namespace cannot be entered, and when `work` panics (with its message).
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        within_path(&self.path(), work)
            .expect("a namespace exists as long as its value, and only root can make one")
    }

    /// Sets one sysctl, named with slashes or dots below `net`: `ipv4/conf/all/rp_filter`.
    ///
    /// # Errors
    ///
    /// When this kernel has no such setting, or refuses the value.
    pub fn sysctl(&self, key: &str, value: &str) -> anyhow::Result<()> {
        // The files under /proc/sys/net are those of the namespace of the thread that opens them.
        let path = format!("/proc/sys/net/{key}");
        self.within(|| fs::write(&path, value))
            .with_context(|| format!("[{}] {path} = {value}", self.name))
    }

    /// Connects this namespace to another by a pair of Ethernet devices, both up.
    ///
    /// # Errors
    ///
    /// When one of the names is taken or longer than 15 letters.
    pub fn veth(&self, device: &str, peer: &Self, peer_device: &str) -> anyhow::Result<()> {
        self.run(&format!(
            "ip link add {device} type veth peer name {peer_device} netns {}",
            peer.name
        ))?;
        self.run(&format!("ip link set {device} up"))?;
        peer.run(&format!("ip link set {peer_device} up"))?;
        Ok(())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        // There is no caller to return an error to; the next run has other names in any case.
        let path = self.path();
        let _ = umount2(&path, MntFlags::MNT_DETACH);
        let _ = fs::remove_file(path);
    }
}

/// A prefix for names in shared places: at most eight letters, different for each call and process.
///
/// Short, because interface names end after 15 letters.
#[must_use]
pub fn unique_prefix() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let count = NEXT.fetch_add(1, Ordering::Relaxed);
    // Process ids need at most five digits here (4194304 is 2hwcg in base 36).
    format!("s{}{}", base36(std::process::id()), base36(count % 1296))
}

/// Fails with one clear sentence unless this process may make namespaces.
///
/// # Errors
///
/// When the effective user is not root.
pub fn require_root() -> anyhow::Result<()> {
    ensure!(
        geteuid().is_root(),
        "this needs root, because it makes network namespaces: run it as root (sudo -E make ...)"
    );
    Ok(())
}

/// Runs `work` on a new thread inside the namespace that the file stands for.
///
/// # Errors
///
/// When the namespace cannot be entered.
///
/// # Panics
///
/// When `work` panics, with its message.
pub fn within_path<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
    let inside = || {
        enter_path(path)?;
        Ok(work())
    };
    std::thread::scope(|scope| {
        scope
            .spawn(inside)
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn enter_path(path: &Path) -> anyhow::Result<()> {
    let what = || format!("entering namespace {}", path.display());
    let file = File::open(path).with_context(what)?;
    setns(file, CloneFlags::CLONE_NEWNET).with_context(what)
}

/// Runs a command to its end; its standard output if it succeeded.
pub(crate) fn finish(what: &str, command: &mut Command) -> anyhow::Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| what.to_owned())?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{what}: {} ({})", stderr.trim(), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn base36(mut number: u32) -> String {
    let mut digits = Vec::new();
    loop {
        digits.push(char::from_digit(number % 36, 36).expect("a remainder of 36 is a digit"));
        number /= 36;
        if number == 0 {
            return digits.into_iter().rev().collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn prefixes_are_short_and_differ() {
        let (one, two) = (unique_prefix(), unique_prefix());

        assert_ne!(one, two);
        assert!(one.len() <= 8, "{one}");
    }

    #[test]
    fn a_namespace_has_its_own_addresses_and_vanishes_with_its_value() {
        let namespace = Namespace::new("own").unwrap();
        let path = namespace.path();
        namespace
            .run("ip address add 192.0.2.77/32 dev lo")
            .unwrap();

        let inside = namespace.within(|| UdpSocket::bind("192.0.2.77:7777").is_ok());

        assert!(inside, "the address exists inside");
        assert!(
            UdpSocket::bind("192.0.2.77:7777").is_err(),
            "and only there"
        );
        drop(namespace);
        assert!(!path.exists());
    }

    #[test]
    fn a_failing_command_tells_its_line_and_its_complaint() {
        let namespace = Namespace::new("fail").unwrap();

        let error = namespace
            .run("ip link show nosuch0")
            .unwrap_err()
            .to_string();

        assert!(error.contains("ip link show nosuch0"), "{error}");
        assert!(error.contains("does not exist"), "{error}");
    }

    #[test]
    fn a_sysctl_is_set_inside_only() {
        let namespace = Namespace::new("sysctl").unwrap();

        namespace.sysctl("ipv4/conf/lo/rp_filter", "2").unwrap();

        let inside = namespace.run("cat /proc/sys/net/ipv4/conf/lo/rp_filter");
        assert_eq!(inside.unwrap().trim(), "2");
    }

    #[test]
    fn two_namespaces_joined_by_a_veth_reach_each_other() {
        let (left, right) = (Namespace::new("l").unwrap(), Namespace::new("r").unwrap());
        left.veth("eth0", &right, "eth0").unwrap();
        left.run("ip address add 192.0.2.1/24 dev eth0").unwrap();
        right.run("ip address add 192.0.2.2/24 dev eth0").unwrap();

        left.run("ping -c 1 -W 2 192.0.2.2").unwrap();
    }
}
