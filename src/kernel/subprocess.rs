//! Runs another program to its end, or kills it when it takes too long.
//!
//! A program may hang: on a lock, on a disk, in the kernel. The caller decides what a timeout means, and
//! when the program is tried again.

use std::fs::File;
use std::io::{self, Seek as _, Write as _};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use subprocess::{Capture, Exec, Job, Process, Redirection};

use crate::clock::now;

/// The most that a program may print, in bytes. A listing of the nft table for 5,000 nodes has some 2 MiB.
const MAX_OUTPUT: usize = 64 << 20;
/// How long a killed program gets to exit before it is left to the init process. What hangs in the kernel
/// exits only when the kernel lets it.
const EXIT_TIMEOUT: Duration = Duration::from_millis(100);

/// Why a program gave no output.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It could not be run, or printed more than [`MAX_OUTPUT`].
    NotRun(io::Error),
    /// It took too long and was killed. It may still be there, if it hangs in the kernel:
    /// [`Process::poll`] tells, and collects its exit status.
    TimedOut(Process),
}

/// Runs a program with this standard input, for no longer than `timeout`.
///
/// The program inherits no descriptors but its three standard streams.
///
/// # Errors
///
/// See [`Failure`]. A program that exits with an error is no failure here.
pub(crate) fn run(program: Exec, input: &[u8], timeout: Duration) -> Result<Capture, Failure> {
    let deadline = now() + timeout;
    let input = in_memory(input).map_err(Failure::NotRun)?;
    let mut job = program
        .stdin(input)
        .stdout(Redirection::Pipe)
        .stderr(Redirection::Pipe)
        .start()
        .map_err(Failure::NotRun)?;
    let outcome = communicate(&mut job, deadline);
    if let Ok(Some(output)) = outcome {
        return Ok(output);
    }
    // It may have exited just now, which is as good.
    let _ = job.kill();
    let exited = job.wait_timeout(EXIT_TIMEOUT);
    // Without this, dropping the job would wait for its exit without a limit.
    job.detach();
    match (outcome, job.processes.pop()) {
        (Err(error), _) => Err(Failure::NotRun(error)),
        (Ok(_), Some(process)) => Err(Failure::TimedOut(process)),
        (Ok(_), None) => Err(Failure::NotRun(io::Error::other(format!(
            "no process was started: {exited:?}"
        )))),
    }
}

/// A file in memory for the program's input.
///
/// Not a pipe: if a program exits without reading a full one, `subprocess` reports a timeout in place of the
/// program's error (it does not look for `POLLERR`).
fn in_memory(content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create("input", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file)
}

/// Reads until the program exits; `None` when it has not by the deadline.
fn communicate(job: &mut Job, deadline: Instant) -> io::Result<Option<Capture>> {
    let left = || deadline.saturating_duration_since(now());
    let mut streams = job.communicate()?.limit_time(left()).limit_size(MAX_OUTPUT);
    let (stdout, stderr) = match streams.read() {
        Ok(said) => said,
        Err(error) if error.kind() == io::ErrorKind::TimedOut => return Ok(None),
        Err(error) => return Err(error),
    };
    if stdout.len() + stderr.len() >= MAX_OUTPUT {
        return Err(io::Error::other("it printed too much"));
    }
    // It has closed its outputs, which it normally does by exiting.
    let status = job.wait_timeout(left())?;
    Ok(status.map(|exit_status| Capture {
        stdout,
        stderr,
        exit_status,
    }))
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test may run programs")]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn sh(script: &str) -> Exec {
        Exec::cmd("sh").args(["-c", script])
    }

    #[test]
    fn input_and_output_larger_than_a_pipe_pass_both_ways() {
        let input = "0123456789abcdef".repeat(20_000);

        let output = run(
            sh("cat; head -c 200000 /dev/zero >&2; exit 3"),
            input.as_bytes(),
            LONG,
        )
        .unwrap();

        assert!(output.stdout == input.as_bytes());
        assert_eq!(output.stderr.len(), 200_000);
        assert_eq!(output.exit_status.code(), Some(3));
    }

    #[test]
    fn the_output_of_a_program_that_reads_no_input_is_captured() {
        let input = vec![b'x'; 1_000_000];

        let output = run(sh("echo no >&2; exit 1"), &input, LONG).unwrap();

        assert_eq!(output.stderr, b"no\n");
        assert_eq!(output.exit_status.code(), Some(1));
    }

    #[test]
    fn a_program_that_takes_too_long_is_killed() {
        let soon = Duration::from_millis(200);
        // Silent from the start; silent after a word; with closed outputs.
        for script in [
            "exec sleep 600",
            "echo x; exec sleep 600",
            "exec sleep 600 >&- 2>&-",
        ] {
            let failure = run(sh(script), b"x", soon).unwrap_err();

            let Failure::TimedOut(process) = failure else {
                panic!("{script}: {failure:?}");
            };
            // 600 seconds would be longer than any test.
            let status = process.wait().unwrap();
            assert!(status.is_killed_by(libc::SIGKILL), "{script}: {status}");
        }
    }

    #[test]
    fn a_program_that_prints_without_end_is_killed() {
        let failure = run(sh("exec cat /dev/zero"), b"", LONG).unwrap_err();

        let Failure::NotRun(error) = failure else {
            panic!("{failure:?}");
        };
        assert_eq!(error.to_string(), "it printed too much");
    }

    #[test]
    fn a_program_inherits_no_open_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let name = file.path().file_name().unwrap().to_str().unwrap();

        let output = run(sh("ls -l /proc/self/fd"), b"", LONG).unwrap();

        let listing = output.stdout_str();
        assert!(listing.contains("pipe:"), "{listing}");
        assert!(!listing.contains(name), "{listing}");
    }

    #[test]
    fn a_missing_program_is_distinguished_from_a_hanging_one() {
        let failure = run(Exec::cmd("/nonexistent"), b"", LONG).unwrap_err();

        let Failure::NotRun(error) = failure else {
            panic!("{failure:?}");
        };
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
