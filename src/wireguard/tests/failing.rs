//! What the kernel refuses is counted, costs the packet and nothing else; a thread that dies costs all.

use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};

use super::*;
use crate::wireguard::threads::AbortOnPanic;

#[test]
fn whatever_error_a_send_meets_the_session_goes_on() {
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
    assert_eq!(world.count(1), handshakes, "a session was given up");
}

#[test]
fn a_thread_that_dies_takes_the_process_with_it() {
    const DIE: &str = "SELVEDGE_TEST_DIES";
    if std::env::var_os(DIE).is_some() {
        let thread = std::thread::spawn(|| {
            let _guard = AbortOnPanic;
            panic!("on purpose");
        });
        let _ = thread.join();
        return;
    }
    let name = "wireguard::tests::failing::a_thread_that_dies_takes_the_process_with_it";
    #[expect(clippy::disallowed_methods, reason = "to die takes another process")]
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name])
        .env(DIE, "1")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.signal(), Some(libc::SIGABRT), "{status}");
}
