//! Two tunnels back to back, the start of most scenarios.
//!
//! Both daemons run in one namespace, `under`, and exchange datagrams over its loopback. Each link is moved to a
//! namespace of its own, so that all packets between `left` and `right` have passed the tunnel.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use selvedge_lab::netns::Namespace;
use selvedge_lab::process::wait_for;

use crate::tunnel::{Key, Program, SOON, Tunnel};

/// The programs at the two ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pairing {
    pub(crate) left: Program,
    pub(crate) right: Program,
}

impl Pairing {
    /// The number of needless handshakes that are accepted in this time.
    ///
    /// wireguard-go starts its timer for an answer after sending, not before (`RoutineSequentialSender`). If the
    /// answer is faster, as on a busy host, nothing stops the timer, and after 15 seconds it begins a needless
    /// handshake.
    pub(crate) fn needless_handshakes(self, time: Duration) -> usize {
        let programs = [self.left, self.right].into_iter();
        let ends = programs.filter(|program| *program == Program::WireguardGo);
        ends.count() * usize::try_from(time.as_secs() / 15).unwrap_or(usize::MAX)
    }
}

/// A tunnel and the namespace its link is in.
pub(crate) struct End {
    // Dropped in this order: the daemon comes first.
    pub(crate) tunnel: Tunnel,
    pub(crate) space: Namespace,
    pub(crate) key: Key,
}

/// Waits until the IPv6 addresses of a namespace may be used.
pub(crate) fn settled(space: &Namespace) -> Result<()> {
    wait_for("the IPv6 addresses", SOON, || {
        space
            .run("ip -o -6 address show scope global tentative")
            .is_ok_and(|tentative| tentative.is_empty())
    })
    .map(drop)
}

/// Sends echo requests until one is answered.
pub(crate) fn reaches(space: &Namespace, address: &str) -> Result<()> {
    wait_for(&format!("an answer from {address}"), SOON, || {
        space
            .run(&format!("ping -q -n -c 1 -W 1 {address}"))
            .is_ok()
    })
    .map(drop)
}

/// Two ends, configured for each other; the link addresses end in .1 (`left`) and .2 (`right`).
pub(crate) struct Pair {
    pub(crate) left: End,
    pub(crate) right: End,
    pub(crate) under: Namespace,
    pub(crate) psk: Key,
}

/// The addresses of the ends inside the tunnel.
pub(crate) const LEFT4: &str = "192.168.241.1";
pub(crate) const RIGHT4: &str = "192.168.241.2";
pub(crate) const LEFT6: &str = "fd00::1";
pub(crate) const RIGHT6: &str = "fd00::2";

/// The UDP ports the ends listen on.
pub(crate) const LEFT_PORT: u16 = 1;
pub(crate) const RIGHT_PORT: u16 = 2;

impl End {
    /// A daemon whose sockets are in `under` and whose link is in a new namespace.
    pub(crate) fn over(program: Program, under: &Namespace, label: &str) -> Result<Self> {
        let space = Namespace::new(label)?;
        let tunnel = Tunnel::start(program, under)?;
        tunnel.move_link(under, &space)?;
        Ok(Self {
            tunnel,
            space,
            key: Key::new()?,
        })
    }

    /// A daemon whose sockets and link are in one namespace.
    pub(crate) fn within(program: Program, space: Namespace) -> Result<Self> {
        Ok(Self {
            tunnel: Tunnel::start(program, &space)?,
            space,
            key: Key::new()?,
        })
    }

    /// `ip` in the end's namespace, with a line in which `{}` is the link.
    pub(crate) fn ip(&self, line: &str) -> Result<String> {
        let line = line.replace("{}", &self.tunnel.name);
        self.space.run(&format!("ip {line}"))
    }

    /// Sets the addresses of the link and the key, port and peer of the device, and sets the link up.
    pub(crate) fn configure(
        &self,
        port: u16,
        psk: &Key,
        peer: &Self,
        [own4, own6]: [&str; 2],
        [peer4, peer6]: [&str; 2],
    ) -> Result<()> {
        self.ip(&format!("address add {own4}/24 dev {{}}"))?;
        self.ip(&format!("address add {own6}/112 dev {{}} nodad"))?;
        self.tunnel.set(&format!(
            "private-key {} listen-port {port} peer {} preshared-key {} \
             allowed-ips {peer4}/32,{peer6}/128",
            self.key.file(),
            peer.key.public,
            psk.file(),
        ))?;
        self.ip("link set {} up")?;
        self.settled()?;
        self.tunnel.listens(port)?;
        // wireguard-go opens its port before it starts its peers, and drops their packets until then. To set
        // anything of a peer waits for that.
        self.tunnel.set(&format!("peer {}", peer.key.public))
    }

    /// Waits until the IPv6 addresses of the end's namespace may be used. Even without duplicate address
    /// detection the kernel needs a moment.
    pub(crate) fn settled(&self) -> Result<()> {
        settled(&self.space)
    }

    /// Sets the endpoint of the peer.
    pub(crate) fn endpoint(&self, peer: &Self, endpoint: &str) -> Result<()> {
        self.tunnel
            .set(&format!("peer {} endpoint {endpoint}", peer.key.public))
    }

    /// The endpoint of the peer.
    pub(crate) fn endpoint_of(&self, peer: &Self) -> Result<String> {
        self.tunnel.peer("endpoints", &peer.key.public)
    }

    /// One echo request that is answered, even if it must wait for the handshake.
    pub(crate) fn ping(&self, address: &str) -> Result<()> {
        self.space
            .run(&format!("ping -q -n -c 1 -W 10 {address}"))
            .map(drop)
    }

    /// Echo requests until one is answered, where the first may be lost.
    pub(crate) fn reaches(&self, address: &str) -> Result<()> {
        reaches(&self.space, address)
    }

    /// One echo request that is not answered within a second.
    pub(crate) fn ping_fails(&self, address: &str) -> Result<()> {
        let output = self
            .space
            .attempt(&format!("ping -n -c 1 -W 1 {address}"))?;
        ensure!(!output.status.success(), "{address} answers");
        Ok(())
    }

    /// A value of the link's statistics in the namespace: `rx_bytes`, `tx_packets`.
    pub(crate) fn statistic(&self, name: &str) -> Result<u64> {
        let path = format!("/sys/class/net/{}/statistics/{name}", self.tunnel.name);
        let text = self.space.run(&format!("cat {path}"))?;
        text.trim().parse().context(path)
    }
}

impl Pair {
    /// Both ends up and configured, each with the other's endpoint on the IPv4 loopback.
    pub(crate) fn new(pairing: Pairing) -> Result<Self> {
        let pair = Self::without_endpoints(pairing)?;
        pair.meet("127.0.0.1")?;
        Ok(pair)
    }

    /// Both ends up and configured, but without endpoints.
    pub(crate) fn without_endpoints(pairing: Pairing) -> Result<Self> {
        let under = Namespace::new("under")?;
        let left = End::over(pairing.left, &under, "left")?;
        let right = End::over(pairing.right, &under, "right")?;
        let psk = Key::new()?;
        left.configure(LEFT_PORT, &psk, &right, [LEFT4, LEFT6], [RIGHT4, RIGHT6])?;
        right.configure(RIGHT_PORT, &psk, &left, [RIGHT4, RIGHT6], [LEFT4, LEFT6])?;
        Ok(Self {
            left,
            right,
            under,
            psk,
        })
    }

    /// Two tunnels in the namespaces of two hosts that a cable joins: sockets and links together.
    /// The cable's devices are `cable`, without addresses.
    pub(crate) fn by_cable(pairing: Pairing) -> Result<Self> {
        let under = Namespace::new("under")?;
        let left = Namespace::new("left")?;
        let right = Namespace::new("right")?;
        left.veth("cable", &right, "cable")?;
        Self::hosts(pairing, under, left, right)
    }

    /// Two tunnels in the namespaces of two hosts.
    pub(crate) fn hosts(
        pairing: Pairing,
        under: Namespace,
        left: Namespace,
        right: Namespace,
    ) -> Result<Self> {
        let left = End::within(pairing.left, left)?;
        let right = End::within(pairing.right, right)?;
        let psk = Key::new()?;
        left.configure(LEFT_PORT, &psk, &right, [LEFT4, LEFT6], [RIGHT4, RIGHT6])?;
        right.configure(RIGHT_PORT, &psk, &left, [RIGHT4, RIGHT6], [LEFT4, LEFT6])?;
        Ok(Self {
            left,
            right,
            under,
            psk,
        })
    }

    /// Sets the endpoint of both peers to this address of `under`.
    pub(crate) fn meet(&self, address: &str) -> Result<()> {
        let Self { left, right, .. } = self;
        left.endpoint(right, &format!("{address}:{RIGHT_PORT}"))?;
        right.endpoint(left, &format!("{address}:{LEFT_PORT}"))
    }

    /// Sets the MTU of both links.
    pub(crate) fn mtu(&self, mtu: u32) -> Result<()> {
        self.left.ip(&format!("link set {{}} mtu {mtu}"))?;
        self.right.ip(&format!("link set {{}} mtu {mtu}"))?;
        Ok(())
    }
}
