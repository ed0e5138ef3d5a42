//! One thread for both directions, and one that relieves it.
//!
//! With few CPUs a thread for each direction costs more than it gains: every acknowledgement wakes the one
//! while the other has the CPU. So one thread waits for the TUN device and the sockets and serves them in
//! turn. It reads the kernel's answer to a written packet at once, without a wake-up. Only when the thread
//! uses all of a CPU of its own and carries much traffic in both directions, it hands the TUN device over
//! to the other thread, until that one has nothing to do.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::time::{ClockId, clock_gettime};

use super::clock::Time;
use super::core::Core;
use super::io::{Inward, Io, Outward, RETRY};
use super::tun::Tun;
use super::udp::UdpSocket;

/// The most that is read from the TUN device before the turn of the sockets: some large packets, or as
/// many small ones as take about the same time.
const TURN_BYTES: usize = 256 << 10;
const TURN_PACKETS: usize = 128;
/// A socket that had nothing to read is tried again after this many turns at the latest.
const TRY_AGAIN: u32 = 16;
/// How often the load is measured. In a shorter window a thread that shares its CPU seems to have all of it
/// between two decisions of the scheduler.
const WINDOW: Duration = Duration::from_millis(100);
/// The relieving thread gives the TUN device back after this many milliseconds without a packet.
const QUIET_MS: u8 = 10;

/// How the TUN device goes from one thread to the other and back.
pub(super) struct Handover {
    /// Whether the relieving thread has the TUN device.
    away: AtomicBool,
    /// Readable when the relieving thread is to take it.
    go: EventFd,
    /// Readable when it was given back.
    back: EventFd,
}

impl Handover {
    pub(super) fn new() -> io::Result<Self> {
        let event = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        Ok(Self {
            away: AtomicBool::new(false),
            go: event()?,
            back: event()?,
        })
    }

    fn give(&self) {
        self.away.store(true, Ordering::Release);
        // Fails only if it is readable already, as below.
        let _ = self.go.write(1);
    }

    fn give_back(&self) {
        self.away.store(false, Ordering::Release);
        let _ = self.back.write(1);
    }

    fn is_away(&self) -> bool {
        self.away.load(Ordering::Acquire)
    }
}

/// Carries packets both ways.
pub(super) fn both(core: &Core, io: &Io, handover: &Handover) {
    let (mut outward, mut inward) = (Outward::default(), Inward::default());
    let mut load = Load::new(Time::now());
    // Whether the sockets of IPv4 and IPv6 had something to read since the last wait.
    let mut awake = [true; 2];
    let mut turn = 0_u32;
    while !io.is_stopping() {
        let (tuns, sockets) = (io.tuns.load(), io.sockets.load());
        let Some(tun) = tuns.first() else {
            thread::sleep(RETRY);
            continue;
        };
        // One time for the whole turn, which is short compared with the timers.
        let now = Time::now();
        let away = handover.is_away();
        let (mut received, mut sent, mut dry) = (0, 0, true);
        turn = turn.wrapping_add(1);
        for (awake, v6) in awake.iter_mut().zip([false, true]) {
            let Some(socket) = sockets
                .family(v6)
                .filter(|_| *awake || turn.is_multiple_of(TRY_AGAIN))
            else {
                continue;
            };
            if let Some(taken) = inward.take(socket, false) {
                (received, dry) = (received + taken.bytes, dry && taken.all);
                *awake = true;
                inward.open(core, &tuns, now);
                inward.write(core, &tuns);
            }
        }
        if !away {
            let mut packets = 0;
            while let Some(bytes) = outward.packet(core, io, tun, &sockets, now) {
                (sent, packets) = (sent + bytes, packets + 1);
                if sent >= TURN_BYTES || packets == TURN_PACKETS {
                    dry = false;
                    break;
                }
            }
        }
        if load.is_too_much(received, sent, now) && !away {
            outward.flush(core, &sockets, now);
            outward.rest();
            handover.give();
        } else if dry {
            outward.rest();
            let sockets = [false, true].map(|v6| sockets.family(v6));
            awake = wait(handover, (!away).then_some(tun), sockets);
        }
    }
}

/// Waits until there is something to do; returns which sockets have something to read.
///
/// Each descriptor costs time at each packet that comes alone. So the thread waits only for the sockets and
/// the TUN device or, while the other thread has it, its return. A shutdown of the sockets wakes the thread
/// when it must end or use other sockets.
fn wait(handover: &Handover, tun: Option<&Tun>, sockets: [Option<&UdpSocket>; 2]) -> [bool; 2] {
    let other = tun.map_or_else(|| handover.back.as_fd(), |tun| tun.as_fd());
    // A missing family is replaced by a descriptor that is in the list anyway.
    let [v4, v6] = sockets.map(|socket| socket.map_or(other, |socket| socket.as_fd()));
    let mut fds = [other, v4, v6].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    let _ = poll(&mut fds, PollTimeout::NONE);
    let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
    if tun.is_none() && ready(&fds[0]) {
        let _ = handover.back.read();
    }
    [ready(&fds[1]), ready(&fds[2])]
}

/// Carries packets from the TUN device to the wire while the other thread is overloaded.
pub(super) fn relief(core: &Core, io: &Io, handover: &Handover) {
    // Made when first needed, which is never on most hosts.
    let mut outward = None;
    let stop = io.stop.as_fd();
    while !io.is_stopping() {
        let mut fds = [handover.go.as_fd(), stop].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let _ = poll(&mut fds, PollTimeout::NONE);
        let _ = handover.go.read();
        while handover.is_away() && !io.is_stopping() {
            let tuns = io.tuns.load();
            let Some(tun) = tuns.first() else {
                thread::sleep(RETRY);
                continue;
            };
            let outward = outward.get_or_insert_with(Outward::default);
            if outward
                .packet(core, io, tun, &io.sockets.load(), Time::now())
                .is_some()
            {
                continue;
            }
            outward.rest();
            let mut fds = [tun.as_fd(), stop].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            if poll(&mut fds, PollTimeout::from(QUIET_MS)) == Ok(0) {
                handover.give_back();
            }
        }
    }
}

/// Decides when one thread is overloaded and two could do more.
#[derive(Debug)]
struct Load {
    begun: Time,
    /// The thread's CPU time at the beginning of the window.
    used: Option<Duration>,
    received: usize,
    sent: usize,
}

impl Load {
    fn new(now: Time) -> Self {
        Self {
            begun: now,
            used: None,
            received: 0,
            sent: 0,
        }
    }

    /// Counts the bytes of a turn; true at the end of a window with too much load.
    fn is_too_much(&mut self, received: usize, sent: usize, now: Time) -> bool {
        self.received += received;
        self.sent += sent;
        if now.since(self.begun) < WINDOW {
            return false;
        }
        let used = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).ok();
        self.account(used.map(Duration::from), now)
    }

    /// Ends a window. A thread that does not get all of a CPU shares it with others, and a second thread would
    /// only add to them. Where one direction is small compared with the other, a second thread relieves
    /// little.
    fn account(&mut self, used: Option<Duration>, now: Time) -> bool {
        let elapsed = now.since(self.begun);
        let spent = used
            .zip(self.used)
            .map(|(now, then)| now.saturating_sub(then));
        let (less, more) = (self.received.min(self.sent), self.received.max(self.sent));
        *self = Self {
            used,
            ..Self::new(now)
        };
        spent.is_some_and(|spent| spent >= elapsed * 19 / 20) && less >= more / 4 && less > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load() -> (Load, Time) {
        let now = Time::from_duration(Duration::from_secs(1));
        let mut load = Load::new(now);
        assert!(!load.account(Some(Duration::ZERO), now));
        (load, now)
    }

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn a_thread_that_has_a_cpu_and_uses_it_up_in_both_directions_has_too_much_to_do() {
        let (mut load, now) = load();
        assert!(!load.is_too_much(1000, 3000, now + millis(50)));
        assert!(load.account(Some(millis(100)), now + millis(100)));
        assert!(
            !load.account(Some(millis(200)), now + millis(200)),
            "nothing was carried"
        );
    }

    #[test]
    fn a_thread_that_rests_or_shares_its_cpu_or_carries_one_way_does_not() {
        for (received, sent, used) in [(1000, 3000, 94), (1000, 5000, 100), (0, 5000, 100)] {
            let (mut load, now) = load();
            assert!(!load.is_too_much(received, sent, now + millis(50)));
            assert!(!load.account(Some(millis(used)), now + millis(100)));
        }
    }
}
