//! Background processes of a lab: each is known by its id and ends with the value that stands for
//! it, never by name.

use std::fs::OpenOptions;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// How long a process may take to end after SIGTERM before it is killed: many seconds on a busy machine.
const GRACE: Duration = Duration::from_secs(20);

/// How often a condition that is waited for is checked.
const POLL: Duration = Duration::from_millis(20);

/// A running program in a process group of its own, stopped when the value is dropped.
#[derive(Debug)]
pub struct Process {
    what: String,
    child: Child,
    /// The file that its output goes to.
    log: Option<PathBuf>,
    keep: bool,
}

/// As many of the last lines of the output are in an error.
const LAST_LINES: usize = 20;

impl Process {
    /// Starts a command; `what` names it in errors.
    ///
    /// # Errors
    ///
    /// When the program cannot be executed.
    pub fn start(what: &str, mut command: Command) -> anyhow::Result<Self> {
        let child = command
            .stdin(Stdio::null())
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting {what}"))?;
        Ok(Self {
            what: what.to_owned(),
            child,
            log: None,
            keep: false,
        })
    }

    /// Starts a command whose output is appended to a file.
    ///
    /// # Errors
    ///
    /// When the file cannot be opened or the program not be executed.
    pub fn start_logging(what: &str, mut command: Command, log: &Path) -> anyhow::Result<Self> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(log)
            .with_context(|| format!("log {}", log.display()))?;
        command.stdout(file.try_clone()?).stderr(file);
        let mut process = Self::start(what, command)?;
        process.log = Some(log.to_owned());
        Ok(process)
    }

    /// The process id, which is also that of its group.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The child itself, for its standard streams.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Leaves the process running when the value is dropped, for a lab that stays up.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// How it ended, or `None` while it runs.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Sends a signal to the process and the processes it started.
    pub fn signal(&self, signal: Signal) {
        let group = Pid::from_raw(self.child.id().cast_signed());
        // It may have ended just now, which is as good.
        let _ = killpg(group, signal);
    }

    /// Asks it to end (SIGTERM), waits, and returns how it ended; kills it after twenty seconds.
    ///
    /// # Errors
    ///
    /// When it had to be killed.
    pub fn stop(mut self) -> anyhow::Result<ExitStatus> {
        self.signal(Signal::SIGTERM);
        self.wait(GRACE)
    }

    /// Kills it (SIGKILL) and waits until it is gone.
    pub fn kill(mut self) {
        self.signal(Signal::SIGKILL);
        let _ = self.child.wait();
    }

    /// Waits until it ends without being stopped, and returns how.
    ///
    /// # Errors
    ///
    /// When it still runs after `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> anyhow::Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.ended() {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!(
                    "{} still runs after {timeout:?}; its last lines:\n{}",
                    self.what,
                    self.last_lines()
                );
            }
            sleep(POLL);
        }
    }

    fn last_lines(&self) -> String {
        let log = self.log.as_ref().map(std::fs::read_to_string);
        let log = log.and_then(Result::ok).unwrap_or_default();
        let lines = log.lines().collect::<Vec<_>>();
        lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.keep || self.ended().is_some() {
            return;
        }
        self.signal(Signal::SIGTERM);
        if self.wait(GRACE).is_err() {
            self.signal(Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// Waits until `condition` holds, and returns how long that took.
///
/// # Errors
///
/// When it does not hold within `timeout`; the error names `what`.
pub fn wait_for(
    what: &str,
    timeout: Duration,
    mut condition: impl FnMut() -> bool,
) -> anyhow::Result<Duration> {
    let start = Instant::now();
    while !condition() {
        if start.elapsed() >= timeout {
            bail!("gave up waiting for {what} after {timeout:?}");
        }
        sleep(POLL);
    }
    Ok(start.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper() -> Process {
        let mut command = Command::new("sleep");
        command.arg("600");
        Process::start("sleep", command).unwrap()
    }

    #[test]
    fn a_process_ends_with_its_value() {
        let process = sleeper();
        let proc_entry = format!("/proc/{}", process.pid());

        drop(process);

        assert!(!Path::new(&proc_entry).exists());
    }

    #[test]
    fn waiting_for_what_never_comes_names_it() {
        let error = wait_for("the moon", Duration::from_millis(50), || false).unwrap_err();

        assert!(error.to_string().contains("the moon"));
    }
}
