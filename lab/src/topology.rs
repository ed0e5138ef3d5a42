//! The network of two regions in namespaces: a master with a public address, a private data centre
//! behind a NAT router that admits nothing inbound, and, if asked, a third region.
//!
//! ```text
//!     internet (203.0.113.0/24, one segment; drops private destinations like the real one)
//!      |.10            |.20                         |.30
//!    node-master     nat1                         nat2            (third region only)
//!                      | 192.168.50.1/24            | 192.168.60.1/24, or 192.168.50.1/24 again
//!               +------+------+                 +---+---+
//!             node-agent-01 -02 -03           node-third-01 -02
//!               .11   .12   .13                 .11   .12
//! ```
//!
//! [`Shape::clouds`] adds more regions, each with a router that gives its nodes public addresses, one to
//! one, as the master has with [`Master::ElasticIp`]: 203.0.113.111; .121 and .122; .131; and so on.
//!
//! With [`Master::ElasticIp`] the master is 172.16.0.10 behind a router that translates all of
//! 203.0.113.10 to it, one to one, as clouds do. [`Shape::beside_master`] adds nodes there: node-public-01 is
//! 172.16.0.11 and 203.0.113.11, and so on.
//!
//! With [`Shape::wan`] of IPv6 the internet carries nothing else. Then the master is 2001:db8:0:1::10 and,
//! where there is IPv4 inside, 172.16.0.10; the data centre's nodes have unique local addresses
//! (fd5e:1ab:0:50::11, …) and global ones (2001:db8:0:50::11, …) behind a router that translates
//! nothing and admits nothing inbound. Where only pods and services have IPv6, all nodes have unique
//! local addresses.
//!
//! This module knows nothing of Kubernetes, flannel or Selvedge.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::family::{Family, Inner};

mod network;

pub use network::Network;

/// How the master is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Master {
    /// Its network card has the public address.
    #[default]
    Direct,
    /// A router translates the public address to its private one, both ways, for all ports.
    ElasticIp,
}

/// The region beside the cloud and the data centre.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Third {
    /// There is none.
    #[default]
    None,
    /// Two nodes behind a NAT of their own, in another subnet.
    Distinct,
    /// The same, but in the very subnet the data centre uses, with the same addresses.
    Overlapping,
}

/// How the NAT routers choose the external port of a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Nat {
    /// One external port per inner socket, whatever its destination.
    #[default]
    Cone,
    /// A random one per destination: holes cannot be punched.
    Symmetric,
}

/// What the network looks like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// How many nodes the private data centre has.
    pub agents: u8,
    /// How the master is reached.
    pub master: Master,
    /// How many nodes stand beside a master with [`Master::ElasticIp`], at most nine, each with an elastic IP.
    pub beside_master: u8,
    /// The third region.
    pub third: Third,
    /// Further clouds, at most nine.
    pub clouds: u8,
    /// What the NAT routers do.
    pub nat: Nat,
    /// Whether the sites' private networks are routed to each other, untranslated, as by leased lines.
    /// Of IPv4 only, and not with [`Third::Overlapping`].
    pub routed: bool,
    /// Strict reverse path filters and a FORWARD policy of DROP on every node.
    pub strict: bool,
    /// The families of pods and services, which every node has, too.
    pub inner: Inner,
    /// The family of the internet. IPv6 knows no elastic IP, no further clouds and no third region
    /// in the subnet of the second.
    pub wan: Family,
    /// The MTU in bytes of every link, where it is not 1,500.
    pub mtu: Option<u32>,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            agents: 3,
            master: Master::Direct,
            beside_master: 0,
            third: Third::None,
            clouds: 0,
            nat: Nat::Cone,
            routed: false,
            strict: true,
            inner: Inner::V4,
            wan: Family::V4,
            mtu: None,
        }
    }
}

/// The address under which all nodes reach the master over IPv4.
pub const MASTER_PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);

/// The name of the master.
pub const MASTER: &str = "node-master";

/// The node that leads the data centre, where the operator or the order of the names decides.
pub const LEADER: &str = "node-agent-01";

/// The node that leads the data centre beside [`LEADER`] where a region has two leaders.
pub const SECOND_LEADER: &str = "node-agent-02";

/// A node of the data centre that follows [`LEADER`] where a region has one leader.
pub const FOLLOWER: &str = "node-agent-02";

/// The first node beside the master.
pub const PUBLIC: &str = "node-public-01";

/// The node that follows both leaders in a data centre of three nodes.
pub const FOLLOWER_OF_TWO: &str = "node-agent-03";

/// The node that leads the third region.
pub const THIRD_LEADER: &str = "node-third-01";

/// A node before it exists.
struct Blueprint {
    name: String,
    site: Site,
    v4: Ipv4Addr,
    /// The last group of its IPv6 addresses.
    v6: u16,
}

/// A place where nodes stand: each hangs on a bridge of the router of its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// Where the master is.
    Cloud,
    /// The private data centre.
    DataCentre,
    /// The third region.
    Third,
    /// One of the further clouds, counted from 1.
    Further(u8),
}

impl Site {
    /// An address of the site that is of use inside of it alone (RFC 4193).
    #[must_use]
    pub const fn unique_local(self, last: u16) -> Ipv6Addr {
        Ipv6Addr::new(0xfd5e, 0x1ab, 0, self.number(), 0, 0, 0, last)
    }

    /// An address of the site that the internet of IPv6 routes.
    #[must_use]
    pub const fn global(self, last: u16) -> Ipv6Addr {
        Ipv6Addr::new(0x2001, 0xdb8, 0, self.number(), 0, 0, 0, last)
    }

    const fn number(self) -> u16 {
        match self {
            Self::Cloud => 1,
            Self::DataCentre => 0x50,
            Self::Third => 0x60,
            Self::Further(number) => 0x100 + number as u16,
        }
    }

    /// The region that the site's nodes are labelled with.
    #[must_use]
    pub fn region(self) -> &'static str {
        match self {
            Self::Cloud => "default",
            Self::DataCentre => "nd",
            Self::Third => "third",
            Self::Further(number) => {
                const NAMES: [&str; 10] = [
                    "cloud-0", "cloud-1", "cloud-2", "cloud-3", "cloud-4", "cloud-5", "cloud-6",
                    "cloud-7", "cloud-8", "cloud-9",
                ];
                NAMES[usize::from(number) % NAMES.len()]
            }
        }
    }
}

impl Shape {
    /// Whether nodes have addresses of a family.
    #[must_use]
    pub fn has(&self, family: Family) -> bool {
        self.wan == family || self.inner.has(family)
    }

    /// The address under which all nodes reach the master.
    #[must_use]
    pub fn master_public(&self) -> IpAddr {
        match self.wan {
            Family::V4 => MASTER_PUBLIC.into(),
            Family::V6 => Site::Cloud.global(0x10).into(),
        }
    }

    fn blueprints(&self) -> Vec<Blueprint> {
        let master = match self.master {
            Master::Direct if self.wan == Family::V4 => MASTER_PUBLIC,
            Master::Direct | Master::ElasticIp => Ipv4Addr::new(172, 16, 0, 10),
        };
        let mut all = vec![Blueprint {
            name: MASTER.to_owned(),
            site: Site::Cloud,
            v4: master,
            v6: 0x10,
        }];
        all.extend((1..=self.agents).map(|number| Blueprint {
            name: format!("node-agent-{number:02}"),
            site: Site::DataCentre,
            v4: Ipv4Addr::new(192, 168, 50, 10 + number),
            v6: 0x10 + u16::from(number),
        }));
        all.extend((1..=self.beside_master).map(|number| Blueprint {
            name: format!("node-public-{number:02}"),
            site: Site::Cloud,
            v4: Ipv4Addr::new(172, 16, 0, 10 + number),
            v6: 0x10 + u16::from(number),
        }));
        for cloud in 1..=self.clouds {
            all.extend((1..=nodes_of_cloud(cloud)).map(|number| Blueprint {
                name: format!("node-cloud{cloud}-{number:02}"),
                site: Site::Further(cloud),
                v4: Ipv4Addr::new(172, 16, cloud, 10 + number),
                v6: 0x10 + u16::from(number),
            }));
        }
        let third = match self.third {
            Third::None => return all,
            Third::Distinct => 60,
            Third::Overlapping => 50,
        };
        all.extend((1..=2).map(|number| Blueprint {
            name: format!("node-third-{number:02}"),
            site: Site::Third,
            v4: Ipv4Addr::new(192, 168, third, 10 + number),
            v6: 0x10 + u16::from(number),
        }));
        all
    }
}

/// The public address of a node beside the master, counted from 1.
#[must_use]
pub const fn beside_master(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(203, 0, 113, 10 + number)
}

/// One region of two nodes among regions of one.
const fn nodes_of_cloud(cloud: u8) -> u8 {
    if cloud == 2 { 2 } else { 1 }
}

/// The public address of a node in one of the further clouds; both are counted from 1.
#[must_use]
pub const fn public_address(cloud: u8, number: u8) -> Ipv4Addr {
    Ipv4Addr::new(203, 0, 113, 100 + 10 * cloud + number)
}
