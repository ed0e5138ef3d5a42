//! Runs another program to its end, or ends it when it takes too long.
//!
//! A program may hang for as long as it likes: on a lock, on a disk, in the kernel. What its silence
//! means, and when it is tried again, is for the caller to say.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How much is written to a pipe that takes something: `PIPE_BUF`, which never blocks then (pipe(7)).
const PIECE: usize = 4096;
/// How often it is asked for its status once it has closed its outputs, which it does as it ends.
const ENDING: Duration = Duration::from_millis(1);

/// Why a program gave no outcome.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It could not be run.
    NotRun(io::Error),
    /// It took too long and was killed. It may still be there: what hangs in the kernel ends when the
    /// kernel lets it.
    Late(Child),
}

/// Runs a program with this standard input, for no longer than `patience`.
pub(crate) fn run(
    command: &mut Command,
    input: &[u8],
    patience: Duration,
) -> Result<Output, Failure> {
    let deadline = now() + patience;
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(Failure::NotRun)?;
    let outcome = converse(&mut child, input, deadline);
    if !matches!(outcome, Ok(Some(_))) {
        // It may have ended just now, which is as good.
        let _ = child.kill();
    }
    match outcome {
        Ok(Some(output)) => Ok(output),
        Ok(None) => Err(Failure::Late(child)),
        Err(error) => Err(Failure::NotRun(error)),
    }
}

/// Writes and reads until the program ends; `None` when it has not by the deadline.
fn converse(child: &mut Child, input: &[u8], deadline: Instant) -> io::Result<Option<Output>> {
    let file = |pipe: OwnedFd| File::from(pipe);
    let mut to = child.stdin.take().map(|pipe| file(pipe.into()));
    let mut from = [
        child.stdout.take().map(|pipe| file(pipe.into())),
        child.stderr.take().map(|pipe| file(pipe.into())),
    ];
    let mut unsaid = input;
    let mut said = [Vec::new(), Vec::new()];
    loop {
        if unsaid.is_empty() {
            // Closed, or the program would wait for more.
            to = None;
        }
        let open = from.iter().filter(|pipe| pipe.is_some()).count();
        if open == 0 && to.is_none() {
            break;
        }
        let Some(ready) = wait(to.as_ref(), &from, deadline)? else {
            return Ok(None);
        };
        if ready[0]
            && let Some(pipe) = &mut to
        {
            let (piece, _) = unsaid.split_at(unsaid.len().min(PIECE));
            match pipe.write(piece) {
                Ok(written) => unsaid = &unsaid[written..],
                // It ended early, and its status says why.
                Err(_) => unsaid = &[],
            }
        }
        for (number, pipe) in from.iter_mut().enumerate() {
            let Some(file) = pipe.as_mut().filter(|_| ready[1 + number]) else {
                continue;
            };
            let mut piece = [0; PIECE];
            match file.read(&mut piece)? {
                0 => *pipe = None,
                length => said[number].extend_from_slice(&piece[..length]),
            }
        }
    }
    let [stdout, stderr] = said;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(Output {
                status,
                stdout,
                stderr,
            }));
        }
        if now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(ENDING);
    }
}

/// Waits until one of the pipes can be written to or read from, or is closed at the other end; tells
/// which. `None` when none is by the deadline.
fn wait(
    to: Option<&File>,
    from: &[Option<File>; 2],
    deadline: Instant,
) -> io::Result<Option<[bool; 3]>> {
    let pipes = [to, from[0].as_ref(), from[1].as_ref()];
    let flags = [PollFlags::POLLOUT, PollFlags::POLLIN, PollFlags::POLLIN];
    let mut asked = Vec::with_capacity(pipes.len());
    for (pipe, flags) in pipes.iter().zip(flags) {
        asked.extend(pipe.map(|pipe| PollFd::new(pipe.as_fd(), flags)));
    }
    loop {
        let left = deadline.saturating_duration_since(now());
        if left.is_zero() {
            return Ok(None);
        }
        // Rounded up, or the last millisecond would be spent asking.
        let left = left + Duration::from_millis(1);
        match poll(
            &mut asked,
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX),
        ) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => break,
            Err(error) => return Err(error.into()),
        }
    }
    let mut answers = asked.iter().map(|asked| asked.any().unwrap_or(true));
    Ok(Some(pipes.map(|pipe| {
        pipe.is_some() && answers.next().unwrap_or(false)
    })))
}

#[expect(clippy::disallowed_methods, reason = "the shell reads the clock")]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test may run programs")]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn what_a_program_says_both_ways_is_heard_though_it_is_more_than_a_pipe_holds() {
        let input = "0123456789abcdef".repeat(20_000);

        let output = run(
            &mut sh("cat; head -c 200000 /dev/zero >&2; exit 3"),
            input.as_bytes(),
            PATIENCE,
        )
        .unwrap();

        assert!(output.stdout == input.as_bytes());
        assert_eq!(output.stderr.len(), 200_000);
        assert_eq!(output.status.code(), Some(3));
    }

    #[test]
    fn a_program_that_reads_nothing_is_heard_all_the_same() {
        let input = vec![b'x'; 1_000_000];

        let output = run(&mut sh("echo no >&2; exit 1"), &input, PATIENCE).unwrap();

        assert_eq!(output.stderr, b"no\n");
        assert_eq!(output.status.code(), Some(1));
    }

    #[test]
    fn a_program_that_takes_too_long_is_ended() {
        let soon = Duration::from_millis(200);
        // Silent from the start; silent after a word; with closed outputs.
        for script in [
            "exec sleep 600",
            "echo x; exec sleep 600",
            "exec sleep 600 >&- 2>&-",
        ] {
            let failure = run(&mut sh(script), b"x", soon).unwrap_err();

            let Failure::Late(mut child) = failure else {
                panic!("{script}: {failure:?}");
            };
            // Killed: 600 seconds would be longer than any test.
            assert!(!child.wait().unwrap().success(), "{script}");
        }
    }

    #[test]
    fn a_program_that_does_not_exist_is_told_from_one_that_hangs() {
        let failure = run(&mut Command::new("/nonexistent"), b"", PATIENCE).unwrap_err();

        let Failure::NotRun(error) = failure else {
            panic!("{failure:?}");
        };
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
