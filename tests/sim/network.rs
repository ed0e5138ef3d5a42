//! The underlay: regions with their NATs, and the loss and delay of their links.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// A node's number in the simulation.
pub(crate) type Id = usize;

/// How a region's nodes are reached from other regions.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Kind {
    /// By their own addresses, as over a leased line.
    Routed,
    /// By a public address of each node, which its Node names.
    Public,
    /// Only by mappings of a router that masquerades.
    Nat,
    /// The same, and the router gives each destination another port.
    Symmetric,
}

/// A router that masquerades as Linux does: it keeps a port where it can, and lets in answers only.
#[derive(Clone, Debug, Default)]
pub(crate) struct Nat {
    is_symmetric: bool,
    /// (outer port, remote) → (node, inner port).
    inward: BTreeMap<(u16, SocketAddr), (Id, u16)>,
    outward: BTreeMap<(Id, u16, SocketAddr), u16>,
    next: u16,
}

impl Nat {
    fn map(&mut self, node: Id, port: u16, to: SocketAddr) -> u16 {
        if let Some(outer) = self.outward.get(&(node, port, to)) {
            return *outer;
        }
        let mut outer = port;
        if self.is_symmetric {
            self.next = self.next.wrapping_add(1);
            outer = 1024 + self.next;
        }
        while self.inward.contains_key(&(outer, to)) {
            self.next = self.next.wrapping_add(1);
            outer = 1024 + self.next;
        }
        self.inward.insert((outer, to), (node, port));
        self.outward.insert((node, port, to), outer);
        outer
    }

    fn forget(&mut self) {
        self.inward.clear();
        self.outward.clear();
        self.next = self.next.wrapping_add(97);
    }
}

/// Where a node is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Place {
    pub(crate) region: usize,
    pub(crate) address: IpAddr,
    pub(crate) public: Option<IpAddr>,
}

/// All links. Losses are in thousandths and have a direction.
#[derive(Clone, Debug)]
pub(crate) struct Network {
    pub(crate) kinds: Vec<Kind>,
    nats: Vec<Nat>,
    pub(crate) places: Vec<Place>,
    between: BTreeMap<(usize, usize), u32>,
    out: BTreeMap<Id, u32>,
    into: BTreeMap<Id, u32>,
    near: BTreeMap<(Id, Id), u32>,
}

/// A loss beyond which a link counts as broken, and one below which it counts as good.
pub(crate) const BROKEN: u32 = 1000;
pub(crate) const GOOD: u32 = 100;

impl Network {
    pub(crate) fn new(kinds: Vec<Kind>) -> Self {
        Self {
            nats: kinds
                .iter()
                .map(|kind| Nat {
                    is_symmetric: *kind == Kind::Symmetric,
                    ..Nat::default()
                })
                .collect(),
            kinds,
            places: Vec::new(),
            between: BTreeMap::new(),
            out: BTreeMap::new(),
            into: BTreeMap::new(),
            near: BTreeMap::new(),
        }
    }

    /// The place of a node's number in a region.
    pub(crate) fn place(&self, region: usize, number: u8) -> Place {
        let third = u8::try_from(50 + region).expect("few regions");
        let public = Ipv4Addr::new(203, 0, 113, number);
        Place {
            region,
            address: Ipv4Addr::new(192, 168, third, number).into(),
            public: (self.kinds[region] == Kind::Public).then_some(public.into()),
        }
    }

    fn router(region: usize) -> IpAddr {
        let last = u8::try_from(region + 1).expect("few regions");
        Ipv4Addr::new(198, 51, 100, last).into()
    }

    /// The source that others see of a datagram.
    pub(crate) fn leave(&mut self, from: Id, port: u16, to: SocketAddr) -> SocketAddr {
        let place = self.places[from];
        match self.kinds[place.region] {
            Kind::Routed => SocketAddr::new(place.address, port),
            Kind::Public => SocketAddr::new(place.public.unwrap_or(place.address), port),
            Kind::Nat | Kind::Symmetric => {
                let outer = self.nats[place.region].map(from, port, to);
                SocketAddr::new(Self::router(place.region), outer)
            }
        }
    }

    /// The node and port at which a datagram arrives.
    pub(crate) fn arrive(&self, from: SocketAddr, to: SocketAddr) -> Option<(Id, u16)> {
        let mut places = self.places.iter().enumerate();
        let direct = places.find(|(_, place)| match self.kinds[place.region] {
            Kind::Routed => place.address == to.ip(),
            Kind::Public => place.public == Some(to.ip()),
            Kind::Nat | Kind::Symmetric => false,
        });
        if let Some((node, _)) = direct {
            return Some((node, to.port()));
        }
        let region = (0..self.kinds.len()).find(|region| Self::router(*region) == to.ip())?;
        let inward = &self.nats[region].inward;
        inward.get(&(to.port(), from)).copied()
    }

    /// The node at which a datagram would arrive, as far as that is known without sending it.
    pub(crate) fn reaches(&self, from: Id, port: u16, to: SocketAddr) -> Option<Id> {
        let place = self.places[from];
        let source = match self.kinds[place.region] {
            Kind::Routed => SocketAddr::new(place.address, port),
            Kind::Public => SocketAddr::new(place.public?, port),
            Kind::Nat | Kind::Symmetric => {
                let outer = self.nats[place.region].outward.get(&(from, port, to))?;
                SocketAddr::new(Self::router(place.region), *outer)
            }
        };
        Some(self.arrive(source, to)?.0)
    }

    /// Whether the routers of two regions let no datagram of the other in.
    pub(crate) fn is_blocked(&self, one: usize, other: usize) -> bool {
        matches!(
            (self.kinds[one], self.kinds[other]),
            (Kind::Symmetric, Kind::Symmetric | Kind::Nat) | (Kind::Nat, Kind::Symmetric)
        )
    }

    pub(crate) fn forget_mappings(&mut self, region: usize) {
        self.nats[region].forget();
    }

    pub(crate) fn set_between(&mut self, from: usize, to: usize, loss: u32) {
        self.between.insert((from, to), loss);
    }

    pub(crate) fn set_uplink(&mut self, node: Id, out: u32, into: u32) {
        self.out.insert(node, out);
        self.into.insert(node, into);
    }

    pub(crate) fn set_near(&mut self, from: Id, to: Id, loss: u32) {
        self.near.insert((from, to), loss);
    }

    /// The loss from a node to one of another region, of the worst link on the way.
    pub(crate) fn far_loss(&self, from: Id, to: Id) -> u32 {
        let regions = (self.places[from].region, self.places[to].region);
        let losses = [
            self.out.get(&from),
            self.between.get(&regions),
            self.into.get(&to),
        ];
        losses.into_iter().flatten().copied().max().unwrap_or(0)
    }

    /// The loss from a node to one of its region.
    pub(crate) fn near_loss(&self, from: Id, to: Id) -> u32 {
        if self.places[from].region != self.places[to].region {
            return BROKEN;
        }
        self.near.get(&(from, to)).copied().unwrap_or(0)
    }

    /// Every link that loses anything.
    pub(crate) fn faulty(&self) -> BTreeSet<String> {
        let mut all = BTreeSet::new();
        let lossy = |loss: &u32| *loss > 0;
        for (link, loss) in self.between.iter().filter(|(_, loss)| lossy(loss)) {
            all.insert(format!("regions {} to {}: {loss}", link.0, link.1));
        }
        for (node, loss) in self.out.iter().filter(|(_, loss)| lossy(loss)) {
            all.insert(format!("out of node {node}: {loss}"));
        }
        for (node, loss) in self.into.iter().filter(|(_, loss)| lossy(loss)) {
            all.insert(format!("into node {node}: {loss}"));
        }
        for (link, loss) in self.near.iter().filter(|(_, loss)| lossy(loss)) {
            all.insert(format!("node {} to node {}: {loss}", link.0, link.1));
        }
        all
    }
}
