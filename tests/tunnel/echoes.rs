//! Echoes between two devices, through their sockets, threads and links.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::mpsc::{self, Receiver};

use anyhow::{Context as _, Result, ensure};
use selvedge::wireguard::key::PrivateKey;
use selvedge::wireguard::{Device, Diverted, ECHO_PORT, Options, Origin, PeerConfig, PeerId};
use selvedge_lab::netns::Namespace;
use selvedge_lab::process::wait_for;

use crate::alone;
use crate::tunnel::SOON;

const PORT: u16 = 51820;
const LEFT: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
const RIGHT: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 2);
/// An address of no host.
const PROBE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 254);

/// A device in a network namespace of its own.
struct End {
    space: Namespace,
    device: Device,
    called: Receiver<()>,
}

impl End {
    fn new(name: &str) -> Result<Self> {
        let space = Namespace::new(name)?;
        let mut options = Options::new("wg");
        options.listen_port = PORT;
        let (call, called) = mpsc::channel();
        options.on_diverted = Box::new(move || {
            let _ = call.send(());
        });
        let device = space.within(|| Device::start(options))?;
        Ok(Self {
            space,
            device,
            called,
        })
    }

    /// Gives the device its key, its address and its one peer.
    fn configure(
        &self,
        key: PrivateKey,
        own: Ipv4Addr,
        peer: (&PrivateKey, u8, Ipv4Addr),
    ) -> Result<PeerId> {
        let (peer_key, last, address) = peer;
        self.device.set_private_key(Some(key));
        self.space.run(&format!("ip address add {own}/24 dev wg"))?;
        self.space.run("ip link set wg up")?;
        let config = PeerConfig {
            endpoint: Some(SocketAddr::from(([10, 97, 0, last], PORT))),
            ..PeerConfig::new(peer_key.public_key())
                .with_allowed_ips([format!("{address}/32").parse()?].into())
        };
        let id = PeerId::new("other");
        self.device
            .set_peers(&BTreeMap::from([(id.clone(), config)]));
        Ok(id)
    }

    /// Waits for a call, and takes what was diverted.
    fn diverted(&self) -> Result<Vec<Diverted>> {
        self.called.recv_timeout(SOON).context("no call")?;
        Ok(self.device.take_diverted())
    }
}

/// The sum of 16-bit words, folded (RFC 1071).
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|word| {
        let [high, low] = [word[0], word.get(1).copied().unwrap_or(0)];
        u32::from(u16::from_be_bytes([high, low]))
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(u16::MAX)
}

/// A UDP packet without a checksum of UDP.
fn packet(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), payload: &[u8]) -> Result<Vec<u8>> {
    let length = u16::try_from(28 + payload.len())?;
    let [high, low] = length.to_be_bytes();
    let mut packet = vec![0x45, 0, high, low, 0, 0, 0x40, 0, 64, 17, 0, 0];
    packet.extend(from.0.octets());
    packet.extend(to.0.octets());
    let checksum = !sum(&packet);
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    for field in [from.1, to.1, length - 20, 0] {
        packet.extend(field.to_be_bytes());
    }
    packet.extend(payload);
    Ok(packet)
}

#[test]
fn echoes_go_to_the_peers_embedder_and_from_the_link_to_the_own_one_and_back() {
    let _alone = alone();
    let run = || -> Result<()> {
        let (left, right) = (End::new("left")?, End::new("right")?);
        left.space.veth("wire", &right.space, "wire")?;
        left.space.run("ip address add 10.97.0.1/24 dev wire")?;
        right.space.run("ip address add 10.97.0.2/24 dev wire")?;
        let keys = [PrivateKey::generate(), PrivateKey::generate()];
        let to_right = left.configure(keys[0].clone(), LEFT, (&keys[1], 2, RIGHT))?;
        let to_left = right.configure(keys[1].clone(), RIGHT, (&keys[0], 1, LEFT))?;
        left.device.set_diverted([LEFT.into(), PROBE.into()].into());
        right.device.set_diverted([RIGHT.into()].into());

        // Between the devices, both ways.
        let echo = packet((LEFT, ECHO_PORT), (RIGHT, ECHO_PORT), b"are you there")?;
        wait_for("a session", SOON, || {
            left.device.send_packet(&to_right, &echo)
        })?;
        let origin = Origin::Peer(to_left.clone());
        let taken = right.diverted()?;
        ensure!(
            taken
                == [Diverted {
                    origin,
                    packet: echo
                }],
            "right got {taken:?}"
        );
        let answer = packet((RIGHT, ECHO_PORT), (LEFT, ECHO_PORT), b"I am")?;
        wait_for("a session", SOON, || {
            right.device.send_packet(&to_left, &answer)
        })?;
        let origin = Origin::Peer(to_right);
        let taken = left.diverted()?;
        ensure!(
            taken
                == [Diverted {
                    origin,
                    packet: answer
                }],
            "left got {taken:?}"
        );

        // From the link and back into it. The kernel leaves the checksum of UDP to the device.
        let socket = left.space.within(|| UdpSocket::bind((LEFT, 0)))?;
        socket.set_read_timeout(Some(SOON))?;
        socket.send_to(b"does it forward", (PROBE, ECHO_PORT))?;
        let taken = left.diverted()?;
        let [
            Diverted {
                origin,
                packet: echo,
            },
        ] = taken.as_slice()
        else {
            anyhow::bail!("left got {taken:?}");
        };
        ensure!(*origin == Origin::Link, "it came from {origin:?}");
        ensure!(echo[28..] == *b"does it forward", "it is {echo:?}");
        let length = u16::try_from(echo.len() - 20)?.to_be_bytes();
        let pseudo = [&echo[12..20], &[0, 17], &length, &echo[20..]].concat();
        ensure!(sum(&pseudo) == 0xffff, "a wrong checksum: {echo:?}");
        let asker = (LEFT, socket.local_addr()?.port());
        let answer = packet((PROBE, ECHO_PORT), asker, b"it does")?;
        left.device.write_packet(&answer)?;
        let mut buffer = [0; 64];
        let (length, from) = socket.recv_from(&mut buffer).context("no answer")?;
        ensure!(buffer[..length] == *b"it does" && from == (PROBE, ECHO_PORT).into());

        ensure!(left.device.write_packet(&answer[..30]).is_err());
        Ok(())
    };
    if let Err(error) = run() {
        panic!("{error:#}");
    }
}
