//! One-way flows between many places at once, each numbered: which datagrams arrived, and when.
//!
//! Unlike a [`Stream`](super::Stream), whose echo passes the network twice, a flow tells in which direction
//! packets are lost. Arrivals have the kernel's timestamps, so that a busy machine does not look like an outage.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, SocketAddrV4, UdpSocket};
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, setsockopt, sockopt::RcvBufForce,
    sockopt::ReceiveTimestampns,
};
use nix::sys::time::TimeSpec;

use super::MAGIC;
use crate::netns::within_path;

/// The UDP port of both ends of a flow.
pub const PORT: u16 = 7100;

/// A datagram each ten milliseconds: fine enough to see an outage of one.
const INTERVAL: Duration = Duration::from_millis(10);
/// How often sockets are read.
const READING: Duration = Duration::from_millis(2);
/// Bytes of a socket's queue: seconds of a flow, should this process not run meanwhile.
const QUEUE: usize = 4 << 20;

/// Since the Unix epoch: what the kernel's timestamps count.
pub type Time = Duration;

/// One end of flows: an IPv4 address in a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// What to call it.
    pub name: String,
    /// The node it is on.
    pub node: String,
    /// Its address.
    pub address: IpAddr,
    /// The file of its network namespace.
    pub namespace: PathBuf,
}

/// Flows that go on until the value is dropped.
#[derive(Debug)]
pub struct Flows {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// What happened to a flow within a time.
#[derive(Clone, Debug)]
pub struct FlowReport {
    /// Who sent.
    pub from: End,
    /// Who received.
    pub to: End,
    /// How many datagrams were sent.
    pub sent: usize,
    /// How many of them did not arrive.
    pub lost: usize,
    /// The longest time in which none arrived.
    pub gap: Duration,
    /// When that began, since the beginning of the time that is reported.
    pub gap_at: Duration,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    flows: Mutex<Vec<Flow>>,
}

#[derive(Debug)]
struct Flow {
    from: End,
    to: End,
    sent: Vec<Time>,
    /// The number of each datagram that arrived, by its arrival.
    arrived: Vec<(Time, u32)>,
}

/// The present time, as flows count it.
#[must_use]
pub fn now() -> Time {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default()
}

impl Flows {
    /// Starts flows from the first to the second of each pair, and back.
    ///
    /// # Errors
    ///
    /// When an end has no such address, or its port is taken.
    pub fn start(pairs: &[(End, End)]) -> anyhow::Result<Self> {
        let ends = pairs.iter().flat_map(|(one, other)| [one, other]);
        let ends: BTreeMap<_, _> = ends.map(|end| (end.address, end)).collect();
        let sockets = ends.into_iter();
        let sockets = sockets.map(|(address, end)| Ok((address, socket(end)?)));
        let sockets: BTreeMap<_, _> = sockets.collect::<anyhow::Result<_>>()?;
        let both = pairs.iter().flat_map(|(one, other)| {
            [(one, other), (other, one)].map(|(from, to)| Flow {
                from: from.clone(),
                to: to.clone(),
                sent: Vec::new(),
                arrived: Vec::new(),
            })
        });
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            flows: Mutex::new(both.collect()),
        });
        let sockets = Arc::new(sockets);
        let worker = |name: &str, work: fn(&Shared, &BTreeMap<IpAddr, UdpSocket>)| {
            let (shared, sockets) = (Arc::clone(&shared), Arc::clone(&sockets));
            let thread = std::thread::Builder::new().name(name.to_owned());
            thread.spawn(move || work(&shared, &sockets))
        };
        let workers = vec![worker("lab-send", send)?, worker("lab-receive", receive)?];
        Ok(Self { shared, workers })
    }

    /// What each flow did within a time. Of datagrams that were sent shortly before its end, some may still be
    /// under way.
    #[must_use]
    pub fn report(&self, within: &Range<Time>) -> Vec<FlowReport> {
        let flows = self.shared.flows();
        flows.iter().map(|flow| flow.report(within)).collect()
    }

    /// Whether every flow that is wanted has arrived without a gap since a time.
    #[must_use]
    pub fn flow_since(
        &self,
        since: Time,
        gap: Duration,
        wanted: impl Fn(&End, &End) -> bool,
    ) -> bool {
        let reports = self.report(&(since..now()));
        let mut wanted = reports.iter().filter(|flow| wanted(&flow.from, &flow.to));
        wanted.all(|flow| flow.gap < gap)
    }
}

impl Drop for Flows {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn flows(&self) -> std::sync::MutexGuard<'_, Vec<Flow>> {
        self.flows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

impl Flow {
    fn report(&self, within: &Range<Time>) -> FlowReport {
        let part = |times: &[Time]| {
            let at = |time| times.partition_point(|sent| *sent < time);
            at(within.start)..at(within.end)
        };
        let sent = part(&self.sent);
        let numbers: Vec<bool> = {
            let mut arrived = vec![false; sent.len()];
            for (_, number) in &self.arrived {
                let index = (*number as usize).checked_sub(sent.start);
                if let Some(arrived) = index.and_then(|index| arrived.get_mut(index)) {
                    *arrived = true;
                }
            }
            arrived
        };
        let lost = numbers.iter().filter(|arrived| !**arrived).count();
        let times = self.arrived.iter().map(|(time, _)| *time);
        let times = times.filter(|time| within.contains(time));
        let (mut gap, mut gap_at) = (Duration::ZERO, Duration::ZERO);
        let mut last = within.start;
        for time in times.chain([within.end]) {
            let length = time.saturating_sub(last);
            if length > gap {
                (gap, gap_at) = (length, last - within.start);
            }
            last = last.max(time);
        }
        FlowReport {
            from: self.from.clone(),
            to: self.to.clone(),
            sent: sent.len(),
            lost,
            gap,
            gap_at,
        }
    }
}

impl fmt::Display for FlowReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            from,
            to,
            sent,
            lost,
            gap,
            gap_at,
        } = self;
        write!(
            f,
            "{} -> {}: {lost} of {sent} lost, longest gap {gap:.0?} after {gap_at:.1?}",
            from.name, to.name
        )
    }
}

fn socket(end: &End) -> anyhow::Result<UdpSocket> {
    ensure!(end.address.is_ipv4(), "{} has no IPv4 address", end.name);
    let bind = || UdpSocket::bind((end.address, PORT));
    let socket = within_path(&end.namespace, bind)?
        .with_context(|| format!("{} port {PORT} in {}", end.address, end.name))?;
    socket.set_nonblocking(true)?;
    setsockopt(&socket, ReceiveTimestampns, &true)?;
    setsockopt(&socket, RcvBufForce, &QUEUE)?;
    Ok(socket)
}

fn send(shared: &Shared, sockets: &BTreeMap<IpAddr, UdpSocket>) {
    let begun = now();
    let mut turn = 0;
    while !shared.stopped() {
        let next = begun + INTERVAL * turn;
        sleep(next.saturating_sub(now()));
        turn += 1;
        let mut flows = shared.flows();
        for flow in flows.iter_mut() {
            let Some(socket) = sockets.get(&flow.from.address) else {
                continue;
            };
            let number = u32::try_from(flow.sent.len()).unwrap_or(u32::MAX);
            let payload = [&number.to_be_bytes()[..], MAGIC].concat();
            flow.sent.push(now());
            // "No route" is an outage to be measured, not a reason to stop.
            let _ = socket.send_to(&payload, SocketAddr::new(flow.to.address, PORT));
        }
    }
}

fn receive(shared: &Shared, sockets: &BTreeMap<IpAddr, UdpSocket>) {
    while !shared.stopped() {
        for (to, socket) in sockets {
            while let Ok((from, at, number)) = receive_one(socket) {
                let mut flows = shared.flows();
                let mut flows = flows.iter_mut();
                let flow = flows.find(|flow| flow.from.address == from && flow.to.address == *to);
                if let Some(flow) = flow {
                    flow.arrived.push((at, number));
                }
            }
        }
        sleep(READING);
    }
}

/// The sender, the time of arrival and the number of one datagram.
fn receive_one(socket: &UdpSocket) -> io::Result<(IpAddr, Time, u32)> {
    let mut buffer = [0; 64];
    let mut space = cmsg_space!(TimeSpec);
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let message = recvmsg::<SockaddrIn>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut space),
        MsgFlags::MSG_DONTWAIT,
    )?;
    let mut stamp = None;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmTimestampns(time) = part {
            stamp = Some(Duration::from(time));
        }
    }
    let from = message.address.ok_or(Errno::EDESTADDRREQ)?;
    let from = IpAddr::from(*SocketAddrV4::from(from).ip());
    let number = buffer.first_chunk().copied().unwrap_or_default();
    Ok((from, stamp.unwrap_or_else(now), u32::from_be_bytes(number)))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::netns::Namespace;

    fn end(namespace: &Namespace, last: u8) -> End {
        End {
            name: format!("end {last}"),
            node: "here".to_owned(),
            address: Ipv4Addr::new(192, 0, 2, last).into(),
            namespace: namespace.path(),
        }
    }

    #[test]
    fn a_flow_reports_in_which_direction_and_for_how_long_nothing_arrived() {
        let (left, right) = (Namespace::new("l").unwrap(), Namespace::new("r").unwrap());
        left.veth("eth0", &right, "eth0").unwrap();
        left.run("ip address add 192.0.2.1/24 dev eth0").unwrap();
        right.run("ip address add 192.0.2.2/24 dev eth0").unwrap();
        right
            .sh("nft add table ip fault
                 nft add chain ip fault in '{ type filter hook input priority 0; }'")
            .unwrap();
        let flows = Flows::start(&[(end(&left, 1), end(&right, 2))]).unwrap();
        sleep(Duration::from_millis(300));

        let start = now();
        sleep(Duration::from_millis(200));
        right
            .run("nft add rule ip fault in udp dport 7100 drop")
            .unwrap();
        sleep(Duration::from_millis(500));
        right.run("nft flush chain ip fault in").unwrap();
        sleep(Duration::from_millis(200));
        let end = now();
        sleep(Duration::from_millis(100));

        let [there, back] = &flows.report(&(start..end))[..] else {
            panic!("two flows");
        };
        assert!(there.gap > Duration::from_millis(450), "{there}");
        assert!(there.gap_at > Duration::from_millis(100), "{there}");
        assert!((30..80).contains(&there.lost), "{there}");
        assert_eq!(back.lost, 0, "{back}");
        assert!(back.gap < Duration::from_millis(300), "{back}");
        assert!(!flows.flow_since(start, Duration::from_millis(300), |_, _| true));
        assert!(
            flows.flow_since(start, Duration::from_millis(300), |from, _| from.address
                == back.from.address)
        );
    }
}
