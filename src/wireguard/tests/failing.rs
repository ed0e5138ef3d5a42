//! An error of the kernel is counted and costs one packet. A panic of a thread ends the process.

use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use super::*;
use crate::wireguard::abort::AbortOnPanic;

#[test]
fn the_session_goes_on_after_any_error_of_a_send() {
    let mut world = World::connected_pair();
    let handshakes = world.count(1);
    for errno in [
        libc::EAGAIN,
        libc::EACCES,
        libc::EHOSTUNREACH,
        libc::EINVAL,
        libc::EIO,
        libc::EMSGSIZE,
        libc::ENETDOWN,
        libc::ENETUNREACH,
        libc::ENOBUFS,
        libc::EPERM,
    ] {
        let refused = world.hosts[0].drops(Dropped::SendFailed);
        world.hosts[0].wire.errno.set(Some(errno));
        world.send(0, &packet(1, 2, b"lost"));
        world.hosts[0].wire.errno.set(None);
        assert_eq!(
            world.hosts[0].drops(Dropped::SendFailed),
            refused + 1,
            "errno {errno}"
        );
        world.assert_connected();
        for host in &mut world.hosts {
            host.delivered.clear();
        }
    }
    assert_eq!(world.count(1), handshakes, "a session ended");
}

/// The log of a function, from INFO on.
fn logged(what: impl FnOnce()) -> Vec<String> {
    let log = Arc::<Mutex<Vec<u8>>>::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || Writer(writer.clone()))
        .finish();
    tracing::subscriber::with_default(subscriber, what);
    let log = log.lock().unwrap();
    let text = String::from_utf8(log.clone()).unwrap();
    text.lines().map(str::to_owned).collect()
}

struct Writer(Arc<Mutex<Vec<u8>>>);

impl io::Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut log = self.0.lock().map_err(|_| io::ErrorKind::Other)?;
        log.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_handshake_that_the_kernel_refuses_is_retried_and_reported_once() {
    for errno in [
        libc::EAGAIN,
        libc::EIO,
        libc::ENETUNREACH,
        libc::ENOBUFS,
        libc::EPERM,
    ] {
        let mut world = World::pair();
        world.hosts[0].wire.errno.set(Some(errno));
        world.hosts[1].wire.errno.set(Some(errno));
        let log = logged(|| {
            world.send(0, &packet(1, 2, b"hello"));
            world.pass(seconds(30));
            let tries = world.hosts[0].drops(Dropped::SendFailed);
            assert!((50..=61).contains(&tries), "{tries} tries in 30 s");
            world.hosts[0].wire.errno.set(None);
            world.hosts[1].wire.errno.set(None);
            world.pass(Duration::from_millis(700));
        });
        assert_eq!(
            world.hosts[1].delivered,
            [packet(1, 2, b"hello")],
            "errno {errno}: the waiting packet arrives"
        );
        world.hosts[1].delivered.clear();
        world.assert_connected();
        let count = |words: &str| log.iter().filter(|line| line.contains(words)).count();
        // Once by each of the two hosts.
        assert_eq!(count("refuses to send"), 2, "{log:?}");
        assert_eq!(count("sends to the peer again"), 2, "{log:?}");
    }
}

#[test]
fn a_handshake_that_the_kernel_always_refuses_is_given_up() {
    let mut world = World::pair();
    world.hosts[0].wire.errno.set(Some(libc::EPERM));
    world.hosts[1].wire.errno.set(Some(libc::EPERM));
    world.send(0, &packet(1, 2, b"hello"));
    world.pass(seconds(120));
    let tries = world.hosts[0].drops(Dropped::SendFailed);
    world.pass(seconds(300));
    assert_eq!(world.hosts[0].drops(Dropped::SendFailed), tries);
}

#[test]
fn occasional_refusals_of_the_kernel_are_reported_once_a_minute() {
    let mut world = World::connected_pair();
    let log = logged(|| {
        for round in 0..600 {
            let errno = (round % 2 == 0).then_some(libc::ENOBUFS);
            world.hosts[0].wire.errno.set(errno);
            world.send(0, &packet(1, 2, b"now and then"));
            world.now = world.now + Duration::from_millis(100);
        }
    });
    let refusals = log.iter().filter(|line| line.contains("refuses to send"));
    assert_eq!(refusals.count(), 1, "{log:?}");
}

#[test]
fn a_path_without_segmentation_offload_is_reported_once() {
    let mut world = World::connected_pair();
    world.hosts[0].wire.offload.set(false);
    let log = logged(|| {
        for _ in 0..200 {
            world.send_run(0, &[packet(1, 2, &[1; 100]), packet(1, 2, &[2; 100])]);
            world.now = world.now + seconds(1);
            world.settle();
        }
    });
    assert_eq!(
        world.hosts[1].delivered.len(),
        400,
        "every packet is delivered"
    );
    let reports = log
        .iter()
        .filter(|line| line.contains("segmentation offload"));
    assert_eq!(reports.count(), 1, "{log:?}");
}

#[test]
fn a_panic_of_a_thread_ends_the_process() {
    const DIE: &str = "SELVEDGE_TEST_DIES";
    if std::env::var_os(DIE).is_some() {
        let thread = std::thread::spawn(|| {
            let _guard = AbortOnPanic;
            panic!("on purpose");
        });
        let _ = thread.join();
        return;
    }
    let name = "wireguard::tests::failing::a_panic_of_a_thread_ends_the_process";
    #[expect(
        clippy::disallowed_methods,
        reason = "the process that ends must be another one"
    )]
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name])
        .env(DIE, "1")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.signal(), Some(libc::SIGABRT), "{status}");
}
