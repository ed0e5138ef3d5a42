//! WireGuard daemons as black boxes: started in a namespace, driven by `wg`, stopped by signal.

use std::cell::RefCell;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use selvedge::wireguard::key::PrivateKey;
use selvedge_lab::netns::{Namespace, unique_prefix};
use selvedge_lab::process::{Process, wait_for};
use tempfile::TempDir;

/// The time limit of anything that should happen at once, on a busy host. It includes two attempts of a handshake,
/// five seconds apart.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// A program that makes a WireGuard device and serves its configuration socket.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Program {
    /// The control: it proves that the harness expects what WireGuard does.
    WireguardGo,
    /// The subject.
    Selvedge,
}

impl Program {
    fn command(self, namespace: &Namespace, interface: &str) -> Result<Command> {
        let mut command = match self {
            Self::WireguardGo => {
                let path = cached("wireguard-go")?;
                let mut command = namespace.command(&path.to_string_lossy());
                // Otherwise it prints twenty lines of advice.
                command.env("WG_PROCESS_FOREGROUND", "1");
                command.arg("-f");
                command
            }
            Self::Selvedge => {
                // Another build, for comparison.
                let other = env::var("SELVEDGE_PROGRAM").ok();
                let program = other.as_deref().unwrap_or(env!("CARGO_BIN_EXE_selvedge"));
                let mut command = namespace.command(program);
                command.arg("tunnel");
                command
            }
        };
        command.arg(interface);
        Ok(command)
    }
}

/// A program of the cache that the lab's build script fills.
fn cached(name: &str) -> Result<PathBuf> {
    let cache = match env::var_os("SELVEDGE_CACHE") {
        Some(cache) => PathBuf::from(cache),
        None => {
            PathBuf::from(env::var_os("HOME").context("HOME is not set")?).join(".cache/selvedge")
        }
    };
    let path = cache.join("bin").join(name);
    ensure!(
        path.exists(),
        "{} is missing: build the lab's programs first",
        path.display()
    );
    Ok(path)
}

/// A key pair, the private half in a file for `wg`.
pub(crate) struct Key {
    directory: TempDir,
    /// The public half, as `wg` prints it.
    pub(crate) public: String,
}

impl Key {
    pub(crate) fn new() -> Result<Self> {
        let mut private = PrivateKey::generate();
        // As `wg genkey` does (RFC 7748, 5), so that devices show the key as it was given.
        private.0[0] &= 248;
        private.0[31] = private.0[31] & 127 | 64;
        let directory = tempfile::tempdir()?;
        fs::write(directory.path().join("key"), private.to_base64())?;
        Ok(Self {
            directory,
            public: private.public_key().to_string(),
        })
    }

    /// The file with the private half.
    pub(crate) fn file(&self) -> String {
        self.directory.path().join("key").display().to_string()
    }

    /// The private half in base64.
    pub(crate) fn private(&self) -> Result<String> {
        Ok(fs::read_to_string(self.file())?)
    }
}

thread_local! {
    /// The output of the daemons of this thread's scenario, for the report of a failure.
    static LOGS: RefCell<String> = const { RefCell::new(String::new()) };
}

/// The output of the daemons that this thread has started and dropped since the last call.
pub(crate) fn take_logs() -> String {
    LOGS.take()
}

/// A running daemon and its device.
pub(crate) struct Tunnel {
    process: Option<Process>,
    /// The device's name, unique on the host: the sockets of all namespaces share a directory.
    pub(crate) name: String,
    log: TempDir,
}

impl Tunnel {
    /// Starts a daemon whose UDP sockets, and at first its link, are in a namespace.
    pub(crate) fn start(program: Program, namespace: &Namespace) -> Result<Self> {
        // wireguard-go looks for its new socket and may miss it while other sockets in the directory come and
        // go. It ends then, and is started once more.
        match Self::start_once(program, namespace) {
            Err(error) if format!("{error:#}").contains("Failed to listen on uapi socket") => {
                Self::start_once(program, namespace)
            }
            started => started,
        }
    }

    fn start_once(program: Program, namespace: &Namespace) -> Result<Self> {
        let name = format!("{}w", unique_prefix());
        let log = tempfile::tempdir()?;
        let command = program.command(namespace, &name)?;
        let what = format!("{program:?} {name}");
        let process = Process::start_logging(&what, command, &log.path().join("log"))?;
        let mut tunnel = Self {
            process: Some(process),
            name,
            log,
        };
        let ready = wait_for("the configuration socket", SOON, || {
            tunnel.ended() || tunnel.wg("show {} listen-port").is_ok()
        });
        if ready.is_err() || tunnel.ended() {
            bail!("{what} does not start: {}", tunnel.log());
        }
        Ok(tunnel)
    }

    /// The output of the daemon.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.log.path().join("log")).unwrap_or_default()
    }

    /// The daemon's process, while it has not been stopped.
    pub(crate) fn pid(&self) -> Option<u32> {
        Some(self.process.as_ref()?.pid())
    }

    /// Waits until the daemon has opened its port: wireguard-go does so some time after its link went up, and
    /// earlier initiations are lost until the next attempt, five seconds later.
    pub(crate) fn listens(&self, port: u16) -> Result<()> {
        let pid = self.pid().context("the daemon was stopped")?;
        // The sockets of the process's namespace, addresses and ports in hexadecimal digits.
        let (sockets, wanted) = (format!("/proc/{pid}/net/udp"), format!(":{port:04X} "));
        wait_for("the daemon's UDP port", SOON, || {
            fs::read_to_string(&sockets).is_ok_and(|sockets| sockets.contains(&wanted))
        })?;
        Ok(())
    }

    /// The bytes of the kernel's memory that wait in the sockets of a port of the daemon's namespace, and the
    /// number of datagrams that found no room (proc_net_udp(5): `rx_queue`, `drops`).
    pub(crate) fn queue(&self, port: u16) -> Result<(u64, u64)> {
        let pid = self.pid().context("the daemon was stopped")?;
        let (mut waiting, mut dropped) = (0, 0);
        for family in ["udp", "udp6"] {
            let table = fs::read_to_string(format!("/proc/{pid}/net/{family}"))?;
            for line in table.lines().skip(1) {
                let words: Vec<_> = line.split_whitespace().collect();
                let local = words.get(1).context("an address")?;
                if !local.ends_with(&format!(":{port:04X}")) {
                    continue;
                }
                let queues = words.get(4).context("queues")?;
                let (_, queue) = queues.split_once(':').context("two queues")?;
                waiting += u64::from_str_radix(queue, 16)?;
                dropped += words.last().context("drops")?.parse::<u64>()?;
            }
        }
        Ok((waiting, dropped))
    }

    /// Whether the daemon has ended.
    pub(crate) fn ended(&mut self) -> bool {
        self.process
            .as_mut()
            .is_none_or(|process| process.ended().is_some())
    }

    pub(crate) fn signal(&self, signal: Signal) {
        if let Some(process) = &self.process {
            process.signal(signal);
        }
    }

    /// Stops the daemon with SIGTERM.
    pub(crate) fn stop(&mut self) -> Result<()> {
        if let Some(process) = self.process.take() {
            process.stop()?;
        }
        Ok(())
    }

    /// The configuration socket.
    pub(crate) fn socket(&self) -> PathBuf {
        Path::new("/var/run/wireguard").join(format!("{}.sock", self.name))
    }

    /// Runs `wg` with a line of arguments in which `{}` is the device.
    pub(crate) fn wg(&self, line: &str) -> Result<String> {
        let line = line.replace("{}", &self.name);
        let output = Command::new("timeout")
            .args(["30", "wg"])
            .args(line.split_whitespace())
            .output()
            .context("wg cannot be run: install wireguard-tools")?;
        ensure!(
            output.status.success(),
            "wg {line}: {} ({})",
            String::from_utf8_lossy(&output.stderr).trim(),
            output.status
        );
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// `wg set DEVICE` and the line.
    pub(crate) fn set(&self, line: &str) -> Result<()> {
        self.wg(&format!("set {{}} {line}")).map(drop)
    }

    /// One column of `wg show DEVICE WHAT` for one peer.
    pub(crate) fn peer(&self, what: &str, public_key: &str) -> Result<String> {
        let all = self.wg(&format!("show {{}} {what}"))?;
        all.lines()
            .find_map(|line| line.strip_prefix(public_key)?.strip_prefix('\t'))
            .map(str::to_owned)
            .with_context(|| format!("no such peer under {what}:\n{all}"))
    }

    /// Bytes received from and sent to a peer, as the device counts them.
    pub(crate) fn transfer(&self, public_key: &str) -> Result<(u64, u64)> {
        let transfer = self.peer("transfer", public_key)?;
        let (received, sent) = transfer.split_once('\t').context("two columns")?;
        Ok((received.parse()?, sent.parse()?))
    }

    /// Moves the link to another namespace, which sets it down.
    pub(crate) fn move_link(&self, from: &Namespace, to: &Namespace) -> Result<()> {
        from.run(&format!("ip link set {} netns {}", self.name, to.name()))
            .map(drop)
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.process = None;
        let text = format!("--- {}\n{}", self.name, self.log());
        LOGS.with_borrow_mut(|logs| logs.push_str(&text));
    }
}
