//! The address families of a lab: that of what lies between the sites, and those of pods and
//! services. The networks are those of k3s and its documentation.

use std::net::IpAddr;

/// An address family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    #[default]
    V4,
    /// IPv6.
    V6,
}

/// The families of pods, services and `InternalIP`s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Inner {
    /// Only IPv4.
    #[default]
    V4,
    /// Only IPv6: flannel runs without IPv4.
    V6,
    /// Both.
    Dual,
}

impl Family {
    /// Both families.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    #[must_use]
    pub const fn of(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// The pods' network.
    #[must_use]
    pub const fn pod_network(self) -> &'static str {
        match self {
            Self::V4 => "10.42.0.0/16",
            Self::V6 => "2001:cafe:42::/56",
        }
    }

    /// The services' network.
    #[must_use]
    pub const fn service_network(self) -> &'static str {
        match self {
            Self::V4 => "10.43.0.0/16",
            Self::V6 => "2001:cafe:43::/112",
        }
    }

    /// The option of `ip` that chooses the family.
    #[must_use]
    pub const fn option(self) -> &'static str {
        match self {
            Self::V4 => "-4",
            Self::V6 => "-6",
        }
    }

    /// The program that speaks the family's part of the firewall: `iptables` or `ip6tables`.
    #[must_use]
    pub const fn iptables(self) -> &'static str {
        match self {
            Self::V4 => "iptables",
            Self::V6 => "ip6tables",
        }
    }
}

impl Inner {
    /// Whether a family is among them.
    #[must_use]
    pub fn has(self, family: Family) -> bool {
        match self {
            Self::V4 => family == Family::V4,
            Self::V6 => family == Family::V6,
            Self::Dual => true,
        }
    }

    /// The families, the primary one first: where there are two, that of the network between the
    /// sites.
    #[must_use]
    pub fn families(self, wan: Family) -> Vec<Family> {
        let mut families = Family::BOTH.to_vec();
        families.retain(|family| self.has(*family));
        families.sort_by_key(|family| *family != wan);
        families
    }
}
