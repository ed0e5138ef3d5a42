//! The threads of a device: the packet threads, and one for handshakes, timers and the state of the link.
//!
//! On a host with few CPUs one thread carries packets both ways, and another relieves it under load, see
//! `duplex`. On a larger host there is a transmit thread for each TUN queue and as many receive threads for
//! each address family. A transmit thread reads until there is nothing to read, then sends what it gathered
//! and sleeps. A receive thread sleeps in `recvmmsg`. No thread waits for another for longer than a batch.
//! With several queues the kernel spreads flows over the transmit threads, which seal for one peer in
//! parallel. The receive threads take turns at the socket and open in parallel, see `sequencer`. A panic of a
//! thread ends the process: a half-dead tunnel is worse than a restart.
//!
//! The threads run at the ordinary priority. At a higher one (`SCHED_RR`, or nice -10) they preempt the
//! sender of the packets at each packet, so that no batch forms: twice the processor time for each small
//! packet, and 15 % less throughput; `bench/README.md` has the figures.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::abort::AbortOnPanic;
use super::admission::Waker;
use super::clock::Time;
use super::core::Core;
use super::duplex::{self, Handover};
use super::handshake::Handshaker;
use super::io::{Inward, Io, LARGE, OnGone, Outward, RETRY};
use super::link::LinkWatch;
use super::routes::RouteWatch;
use super::sequencer::Sequencer;

/// How often the timers of peers are polled: the packet threads arm them without a wake-up.
const TICK: Duration = Duration::from_millis(200);
/// How often the routes to peers are looked up without a notification of a change. It takes some ten
/// microseconds for each peer.
const ROUTES: Duration = Duration::from_secs(2);

/// How the handshake thread calls the embedder.
pub(super) struct Callbacks {
    /// When events of peers wait to be taken.
    pub(super) on_events: Box<dyn Fn() + Send + Sync>,
    /// When diverted packets wait to be taken.
    pub(super) on_diverted: Box<dyn Fn() + Send + Sync>,
}

/// The work of a thread.
type Body = Box<dyn FnOnce(&Core, &Io) + Send>;

/// Starts the threads.
pub(super) fn start(
    core: &Arc<Core>,
    io: &Arc<Io>,
    callbacks: Callbacks,
) -> io::Result<Vec<JoinHandle<()>>> {
    let waker = {
        let io = io.clone();
        Waker(Box::new(move || {
            // Fails only if it is readable already.
            let _ = io.jobs.write(1);
        }))
    };
    core.jobs.set_waker(waker);
    let (link, routes) = (LinkWatch::new()?, RouteWatch::new()?);
    let mut threads = Vec::new();
    let mut spawn = |name: String, body: Body| {
        let (core, io) = (core.clone(), io.clone());
        let thread = thread::Builder::new().name(name).spawn(move || {
            let _guard = AbortOnPanic;
            body(&core, &io);
        });
        thread.map(|thread| threads.push(thread))
    };
    let queues = io.tuns.load().len();
    if queues == 1 {
        let handover = Arc::new(Handover::new()?);
        let relief = handover.clone();
        spawn(
            "wg-both".to_owned(),
            Box::new(move |core, io| duplex::both(core, io, &handover)),
        )?;
        spawn(
            "wg-relief".to_owned(),
            Box::new(move |core, io| duplex::relief(core, io, &relief)),
        )?;
    }
    let several = if queues == 1 { 0 } else { queues };
    for queue in 0..several {
        spawn(
            format!("wg-tx-{queue}"),
            Box::new(move |core, io| transmit(core, io, queue)),
        )?;
    }
    for v6 in [false, true] {
        let sequencer = Arc::new(Sequencer::default());
        for queue in 0..several {
            let sequencer = sequencer.clone();
            let name = format!("wg-rx{}-{queue}", if v6 { 6 } else { 4 });
            let body = move |core: &Core, io: &Io| receive(core, io, v6, &sequencer);
            spawn(name, Box::new(body))?;
        }
    }
    let handshaker = Handshaker::new(core.clone());
    spawn(
        "wg-handshake".to_owned(),
        Box::new(move |core, io| handshake(core, io, handshaker, link, &routes, &callbacks)),
    )?;
    Ok(threads)
}

fn transmit(core: &Core, io: &Io, queue: usize) {
    let mut outward = Outward::default();
    while !io.is_stopping() {
        let tuns = io.tuns.load();
        let Some(tun) = tuns.get(queue) else {
            thread::sleep(RETRY);
            continue;
        };
        if outward
            .packet(core, io, tun, &io.sockets.load(), Time::now())
            .is_none()
        {
            outward.rest();
            let mut fds = [
                PollFd::new(tun.as_fd(), PollFlags::POLLIN),
                PollFd::new(io.stop.as_fd(), PollFlags::POLLIN),
            ];
            let _ = poll(&mut fds, PollTimeout::NONE);
        }
    }
}

fn receive(core: &Core, io: &Io, v6: bool, sequencer: &Sequencer) {
    let mut inward = Inward::default();
    while !io.is_stopping() {
        let sockets = io.sockets.load_full();
        let Some(socket) = sockets.family(v6) else {
            thread::sleep(RETRY);
            continue;
        };
        let mut entrance = sequencer.enter();
        let Some(taken) = inward.take(socket, true) else {
            continue;
        };
        let ticket = entrance.take();
        // To open a small batch takes less time than to wake another thread for the next one.
        let entrance = (taken.bytes < LARGE).then_some(entrance);
        let tuns = io.tuns.load();
        inward.open(core, &tuns, Time::now());
        sequencer.deliver(ticket, || inward.write(core, &tuns));
        drop(entrance);
    }
}

fn handshake(
    core: &Core,
    io: &Io,
    mut handshaker: Handshaker,
    mut link: LinkWatch,
    routes: &RouteWatch,
    callbacks: &Callbacks,
) {
    look_at_link(core, io, &mut link);
    let mut looked = Time::now();
    let mut looked_at_routes = looked;
    let mut unknown = None;
    while !io.is_stopping() {
        let now = Time::now();
        let next = handshaker.tick(&**io.sockets.load(), now);
        if link
            .interval()
            .is_some_and(|interval| now.since(looked) >= interval)
        {
            look_at_link(core, io, &mut link);
            looked = now;
        }
        // Notifications may be lost, and some changes that decide on a route send none.
        if now.since(looked_at_routes) >= ROUTES {
            look_at_routes(core, io);
            looked_at_routes = now;
        }
        let next = [next, unknown].into_iter().flatten().min();
        let timeout = next.map_or(TICK, |next| next.since(Time::now()).min(TICK));
        let mut fds = [
            PollFd::new(io.jobs.as_fd(), PollFlags::POLLIN),
            PollFd::new(link.events(), PollFlags::POLLIN),
            PollFd::new(routes.events(), PollFlags::POLLIN),
        ];
        // Rounded up: the thread must not wake up just before the time.
        let timeout = u16::try_from(timeout.as_millis())
            .unwrap_or(u16::MAX)
            .saturating_add(1);
        let _ = poll(&mut fds, PollTimeout::from(timeout));
        let link_changed = fds[1].any().unwrap_or(false);
        let routes_changed = fds[2].any().unwrap_or(false);
        // Empty if something else woke the thread.
        let _ = io.jobs.read();
        if io.gone.load(Ordering::Acquire)
            && matches!(io.on_gone, OnGone::Remake(..))
            && !io.remake()
        {
            thread::sleep(RETRY);
        }
        if link_changed {
            link.drain();
            look_at_link(core, io, &mut link);
        }
        if routes_changed {
            routes.drain();
            looked_at_routes = Time::now();
            look_at_routes(core, io);
        }
        unknown = handshaker.run(&**io.sockets.load(), Time::now);
        if core.signal.take() {
            (callbacks.on_events)();
        }
        if core.diversion.signal.take() {
            (callbacks.on_diverted)();
        }
    }
}

/// Looks up the routes to all peers again, and lets the kernel choose the source where a route has changed.
fn look_at_routes(core: &Core, io: &Io) {
    let sockets = io.sockets.load();
    for peer in core.table.load().peers.values() {
        let endpoint = peer.direct_endpoint();
        peer.forget_sources();
        if let Some(endpoint) = endpoint.filter(|endpoint| endpoint.local.is_some()) {
            peer.judge_source(endpoint, sockets.leads(&endpoint));
        }
    }
}

fn look_at_link(core: &Core, io: &Io, link: &mut LinkWatch) {
    let tuns = io.tuns.load();
    let Some(tun) = tuns.first() else {
        return;
    };
    match link.look(tun) {
        Ok(state) => {
            core.set_mtu(state.mtu);
            core.link_changed(state.up);
        }
        Err(error) => tracing::debug!(%error, "looking at the link"),
    }
}
