//! Listening to the internet of a lab: what crossed it, and whether anything of it was readable.
//!
//! tcpdump records all links of a namespace; the file is read here, by the outer
//! headers alone, whatever ports and protocols say.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ipnet::IpNet;
use nix::sys::signal::Signal;

use crate::netns::{Namespace, within_path};
use crate::process::{Process, wait_for};
use crate::traffic::MAGIC;

/// VXLAN as flannel speaks it.
const VXLAN_PORT: u16 = 8472;
/// Linux "cooked" capture, version 2, which tcpdump writes for `-i any`.
const LINKTYPE_LINUX_SLL2: u32 = 276;

/// A port without a server, for the datagram that ends a capture.
const DISCARD_PORT: u16 = 9;
/// How long tcpdump may take to write what has been captured, on a machine with much else to do.
const WRITING: Duration = Duration::from_secs(60);

/// A capture that is running.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Process,
    file: PathBuf,
    namespace: PathBuf,
}

/// What a capture saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// All packets.
    pub packets: usize,
    /// UDP packets to or from each port. A router may give a tunnel any port towards the internet.
    pub udp: BTreeMap<u16, usize>,
    /// Packets with a pod's address in their outer header.
    pub pod_addresses: usize,
    /// Packets that contain the magic bytes.
    pub magic: usize,
    /// VXLAN packets.
    pub vxlan: usize,
    /// When the last packet with the magic bytes was heard, since the Unix epoch.
    pub last_magic: Option<Duration>,
}

impl Capture {
    /// Starts listening on all links of a namespace; returns when packets are being recorded.
    ///
    /// # Errors
    ///
    /// When tcpdump is missing or does not start.
    pub fn start(namespace: &Namespace, file: &Path) -> anyhow::Result<Self> {
        Self::start_of(namespace, file, "")
    }

    /// Starts listening to what an expression of tcpdump's selects; empty for all.
    ///
    /// # Errors
    ///
    /// When tcpdump is missing, does not start or does not know the expression.
    pub fn start_of(namespace: &Namespace, file: &Path, expression: &str) -> anyhow::Result<Self> {
        let mut command = namespace.command("tcpdump");
        // Enough for all headers, VXLAN's too, and one whole turn of the payload's magic bytes.
        command
            .args(["-i", "any", "-y", "LINUX_SLL2", "-n", "-U", "-s", "220"])
            .args(["-B", "32768", "-Z", "root", "-w"])
            .arg(file);
        if !expression.is_empty() {
            // The datagram that ends the capture is always wanted.
            command.arg(format!("({expression}) or udp port {DISCARD_PORT}"));
        }
        let log = file.with_extension("log");
        let tcpdump = Process::start_logging("tcpdump", command, &log)?;
        wait_for("tcpdump", WRITING, || {
            fs::read_to_string(&log).is_ok_and(|text| text.contains("listening on"))
        })?;
        Ok(Self {
            tcpdump,
            file: file.to_owned(),
            namespace: namespace.path(),
        })
    }

    /// The file with the packets, for a person to look at.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Stops listening and reads what was heard; `pods` is the cluster's only pod network.
    ///
    /// # Errors
    ///
    /// As [`finish_all`](Self::finish_all).
    pub fn finish(self, pods: IpNet) -> anyhow::Result<Findings> {
        self.finish_all(&[pods])
    }

    /// Stops listening and reads what was heard; `pods` are the cluster's pod networks.
    ///
    /// # Errors
    ///
    /// When the file is not what tcpdump writes, or when tcpdump missed packets.
    pub fn finish_all(self, pods: &[IpNet]) -> anyhow::Result<Findings> {
        let Self {
            mut tcpdump,
            file,
            namespace,
        } = self;
        // What the kernel still holds when tcpdump ends is lost, and it hands packets over a second late
        // or later. They come in order: what was heard before this one is in the file when it is.
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let last = format!("the last packet of {name}");
        within_path(&namespace, || {
            let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
            socket.send_to(last.as_bytes(), (Ipv4Addr::LOCALHOST, DISCARD_PORT))
        })??;
        let mut read = 0;
        wait_for("tcpdump to write what it heard", WRITING, || {
            contains(&file, &mut read, last.as_bytes())
        })?;
        tcpdump.signal(Signal::SIGINT);
        tcpdump.wait(WRITING)?;
        let log = fs::read_to_string(file.with_extension("log"))?;
        ensure!(
            log.contains("\n0 packets dropped by kernel"),
            "the capture has holes: {log}"
        );
        Findings::read(&fs::read(&file)?, pods)
    }
}

/// Whether a file that grows contains some bytes, looked for from `read` on, which follows it.
fn contains(path: &Path, read: &mut u64, bytes: &[u8]) -> bool {
    let mut tail = Vec::new();
    let outcome = File::open(path).and_then(|mut file| {
        file.seek(SeekFrom::Start(*read))?;
        file.read_to_end(&mut tail)
    });
    // Those at the end may be the first of them.
    *read += tail.len().saturating_sub(bytes.len()) as u64;
    outcome.is_ok() && tail.windows(bytes.len()).any(|window| window == bytes)
}

impl Findings {
    /// Whether nothing in it was readable: no pod address, no magic bytes, no VXLAN.
    #[must_use]
    pub fn nothing_in_clear(&self) -> bool {
        self.pod_addresses == 0 && self.magic == 0 && self.vxlan == 0
    }

    fn read(file: &[u8], pods: &[IpNet]) -> anyhow::Result<Self> {
        let word = |at: usize| -> anyhow::Result<u32> {
            let bytes = file.get(at..).and_then(|rest| rest.first_chunk());
            Ok(u32::from_le_bytes(
                *bytes.context("a truncated capture file")?,
            ))
        };
        let known = [0xa1b2_c3d4, 0xa1b2_3c4d];
        ensure!(known.contains(&word(0)?), "not a capture file");
        ensure!(
            word(20)? & 0xffff == LINKTYPE_LINUX_SLL2,
            "an unexpected link type"
        );
        let mut findings = Self::default();
        let mut at = 24;
        while at + 16 <= file.len() {
            let length = word(at + 8)? as usize;
            // The last record may be half written.
            let Some(record) = file.get(at + 16..at + 16 + length) else {
                break;
            };
            let magic = findings.magic;
            findings.look_at(record, pods);
            if findings.magic > magic {
                // Nanoseconds where the file says so, else microseconds.
                let fraction = word(at + 4)?;
                let unit = if word(0)? == 0xa1b2_3c4d { 1 } else { 1000 };
                findings.last_magic = Some(Duration::new(word(at)?.into(), fraction * unit));
            }
            at += 16 + length;
        }
        Ok(findings)
    }

    fn look_at(&mut self, record: &[u8], pods: &[IpNet]) {
        self.packets += 1;
        if record.windows(MAGIC.len()).any(|bytes| bytes == MAGIC) {
            self.magic += 1;
        }
        let Some((head, packet)) = record.split_at_checked(20) else {
            return;
        };
        let Some(packet) = Outer::read([head[0], head[1]], packet) else {
            return;
        };
        let is_pod = |ip: IpAddr| pods.iter().any(|net| net.contains(&ip));
        if is_pod(packet.source) || is_pod(packet.target) {
            self.pod_addresses += 1;
        }
        let (17, [a, b, c, d, ..]) = (packet.protocol, packet.payload) else {
            return;
        };
        let (source, target) = (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d]));
        for port in BTreeSet::from([source, target]) {
            *self.udp.entry(port).or_default() += 1;
        }
        if target == VXLAN_PORT {
            self.vxlan += 1;
        }
    }
}

/// The outer header of a packet.
struct Outer<'a> {
    source: IpAddr,
    target: IpAddr,
    protocol: u8,
    payload: &'a [u8],
}

impl<'a> Outer<'a> {
    fn read(ethertype: [u8; 2], packet: &'a [u8]) -> Option<Self> {
        match ethertype {
            [0x08, 0x00] if packet.len() >= 20 => {
                let address = |at: usize| {
                    let octets: Option<&[u8; 4]> = packet[at..].first_chunk();
                    Some(IpAddr::from(*octets?))
                };
                Some(Self {
                    source: address(12)?,
                    target: address(16)?,
                    protocol: packet[9],
                    payload: packet.get(usize::from(packet[0] & 0x0f) * 4..)?,
                })
            }
            [0x86, 0xdd] if packet.len() >= 40 => {
                let address = |at: usize| {
                    let octets: Option<&[u8; 16]> = packet[at..].first_chunk();
                    Some(IpAddr::from(Ipv6Addr::from(*octets?)))
                };
                // A fragment's header is the only one between that is seen here.
                let fragment = packet[6] == 44 && packet.len() >= 48;
                let (protocol, start) = if fragment {
                    (packet[40], 48)
                } else {
                    (packet[6], 40)
                };
                Some(Self {
                    source: address(8)?,
                    target: address(24)?,
                    protocol,
                    payload: packet.get(start..)?,
                })
            }
            _ => None,
        }
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            packets,
            pod_addresses,
            magic,
            vxlan,
            ..
        } = self;
        write!(
            f,
            "{packets} packets: {pod_addresses} with a pod address, {magic} with the payload \
             readable, {vxlan} VXLAN"
        )
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::traffic::shout;

    #[test]
    fn a_readable_packet_is_found() {
        let directory = crate::scratch("capture").unwrap();
        let (left, right) = (Namespace::new("l").unwrap(), Namespace::new("r").unwrap());
        left.veth("eth0", &right, "eth0").unwrap();
        left.run("ip address add 10.42.0.1/24 dev eth0").unwrap();
        right.run("ip address add 10.42.0.2/24 dev eth0").unwrap();
        let capture = Capture::start(&right, &directory.path().join("right.pcap")).unwrap();

        shout(&left.path(), SocketAddr::from(([10, 42, 0, 2], VXLAN_PORT))).unwrap();

        let findings = capture.finish("10.42.0.0/16".parse().unwrap()).unwrap();
        assert!(findings.magic >= 1, "{findings}");
        assert!(findings.vxlan >= 1, "{findings}");
        assert!(findings.pod_addresses >= 1, "{findings}");
    }
}
