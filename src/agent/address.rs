//! This node's own addresses: which is private, which one others should send to.
//!
//! Pure. The Node's status comes first, because it is what the rest of the cluster uses; the links only
//! add the length of the prefix, and a public address the status does not know.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::cluster::annotation::MAX_CANDIDATES;
use crate::topology::{Endpoint, InterfaceAddr, is_public, is_unicast};

/// What is known of this node.
#[derive(Clone, Copy, Debug)]
pub struct Own<'a> {
    /// `ExternalIP` addresses of its status.
    pub external_ips: &'a [IpAddr],
    /// `InternalIP` addresses of its status.
    pub internal_ips: &'a [IpAddr],
    /// Addresses on its links, without the tunnel's, flannel's and the pods' bridge.
    pub links: &'a [InterfaceAddr],
    /// Those of them that are stable and lead out of this node.
    pub offered: &'a [IpAddr],
    /// `--internal-cidr`.
    pub internal_cidrs: &'a [IpNet],
}

impl Own<'_> {
    /// The address that others of the region use, with its link's prefix; `None` where the node has
    /// only public ones.
    pub fn private_ip(&self) -> Option<InterfaceAddr> {
        let allowed = |ip: &IpAddr| {
            self.internal_cidrs.is_empty() || self.internal_cidrs.iter().any(|net| net.contains(ip))
        };
        let of_status = self.internal_ips.iter().copied();
        // Only an operator's word makes another node believe an address the status does not have.
        let of_links = self
            .links
            .iter()
            .filter(|_| !self.internal_cidrs.is_empty())
            .map(IpNet::addr);
        let ip = ipv4_first(of_status)
            .chain(ipv4_first(of_links))
            .find(|ip| !is_public(*ip) && is_unicast(*ip) && allowed(ip))?;
        let on_link = self.links.iter().find(|link| link.addr() == ip).copied();
        Some(on_link.unwrap_or_else(|| IpNet::from(ip)))
    }

    /// Where others should send: a public address where there is one.
    pub fn endpoint(&self, port: u16, prefer_private: bool) -> Option<Endpoint> {
        let private = self.private_ip().map(|net| net.addr());
        let public = ipv4_first(self.external_ips.iter().copied())
            .chain(ipv4_first(self.internal_ips.iter().copied()))
            .chain(ipv4_first(self.offered.iter().copied()))
            .find(|ip| is_public(*ip));
        let fallback = ipv4_first(self.internal_ips.iter().copied()).find(|ip| is_unicast(*ip));
        let ip = if prefer_private {
            private.or(public)
        } else {
            public.or(private)
        };
        ip.or(fallback)
            .map(|ip| Endpoint::Addr(SocketAddr::new(ip, port)))
    }
}

impl Own<'_> {
    /// Every address at which others may reach the tunnel, the endpoint first: those of the status, and those
    /// of links that lead out. `reserved` networks, pods' and the like, are inside the cluster.
    ///
    /// Which of them can be reached from where is for the others to find out: each is tried.
    pub fn candidates(&self, endpoint: &Endpoint, reserved: &[IpNet]) -> Vec<SocketAddr> {
        let port = endpoint.port();
        let first = match endpoint {
            Endpoint::Addr(address) => Some(*address),
            Endpoint::Dns { .. } => None,
        };
        let is_inside = |ip: &IpAddr| reserved.iter().any(|net| net.contains(ip));
        let all = ipv4_first(self.external_ips.iter().copied())
            .chain(ipv4_first(self.internal_ips.iter().copied()))
            .chain(ipv4_first(self.offered.iter().copied()))
            .filter(|ip| is_unicast(*ip) && !is_inside(ip))
            .map(|ip| SocketAddr::new(ip, port));
        let mut candidates = Vec::new();
        for address in first.into_iter().chain(all) {
            if !candidates.contains(&address) && candidates.len() < MAX_CANDIDATES {
                candidates.push(address);
            }
        }
        candidates
    }
}

fn ipv4_first(ips: impl Iterator<Item = IpAddr> + Clone) -> impl Iterator<Item = IpAddr> {
    let v6 = ips.clone().filter(IpAddr::is_ipv6);
    ips.filter(IpAddr::is_ipv4).chain(v6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(list: &[&str]) -> Vec<IpAddr> {
        list.iter().map(|ip| ip.parse().unwrap()).collect()
    }

    fn nets(list: &[&str]) -> Vec<IpNet> {
        list.iter().map(|net| net.parse().unwrap()).collect()
    }

    struct Case<'a> {
        external: &'a [&'a str],
        internal: &'a [&'a str],
        links: &'a [&'a str],
        cidrs: &'a [&'a str],
    }

    fn detect(case: &Case<'_>) -> (Option<String>, Option<String>) {
        let own = Own {
            external_ips: &ips(case.external),
            internal_ips: &ips(case.internal),
            links: &nets(case.links),
            offered: &nets(case.links).iter().map(IpNet::addr).collect::<Vec<_>>(),
            internal_cidrs: &nets(case.cidrs),
        };
        (
            own.private_ip().map(|net| net.to_string()),
            own.endpoint(51820, false)
                .map(|endpoint| endpoint.to_string()),
        )
    }

    #[test]
    fn the_internal_ip_is_private_and_has_its_links_prefix() {
        let (private, endpoint) = detect(&Case {
            external: &[],
            internal: &["192.168.50.11"],
            links: &["10.9.9.9/8", "192.168.50.11/24"],
            cidrs: &[],
        });
        assert_eq!(private.as_deref(), Some("192.168.50.11/24"));
        assert_eq!(endpoint.as_deref(), Some("192.168.50.11:51820"));
    }

    #[test]
    fn a_public_address_of_the_status_or_of_a_link_is_the_endpoint() {
        for (external, links) in [
            (&["203.0.113.10"][..], &["172.16.0.10/24"][..]),
            (&[], &["172.16.0.10/24", "203.0.113.10/24"]),
        ] {
            let (private, endpoint) = detect(&Case {
                external,
                internal: &["172.16.0.10"],
                links,
                cidrs: &[],
            });
            assert_eq!(private.as_deref(), Some("172.16.0.10/24"));
            assert_eq!(endpoint.as_deref(), Some("203.0.113.10:51820"));
        }
    }

    #[test]
    fn a_node_with_a_public_internal_ip_has_no_private_one() {
        let case = Case {
            external: &[],
            internal: &["203.0.113.10"],
            links: &["203.0.113.10/24", "172.17.0.1/16"],
            cidrs: &[],
        };
        assert_eq!(detect(&case), (None, Some("203.0.113.10:51820".into())));
    }

    #[test]
    fn internal_cidrs_choose_among_private_addresses_and_may_name_a_links() {
        let case = Case {
            external: &[],
            internal: &["192.168.1.5"],
            links: &["10.0.0.5/16", "192.168.1.5/24"],
            cidrs: &["10.0.0.0/8"],
        };
        assert_eq!(detect(&case).0.as_deref(), Some("10.0.0.5/16"));
    }

    #[test]
    fn carrier_grade_nat_link_local_and_ula_are_not_public() {
        for ip in [
            "100.64.1.1",
            "169.254.1.1",
            "fd12::1",
            "fe80::1",
            "127.0.0.1",
            "224.0.0.1",
        ] {
            assert!(!is_public(ip.parse().unwrap()), "{ip}");
        }
        for ip in ["100.128.0.1", "203.0.113.1", "2001:db8::1"] {
            assert!(is_public(ip.parse().unwrap()), "{ip}");
        }
    }

    #[test]
    fn a_node_offers_every_address_that_stays_and_leads_out() {
        let (external, internal) = (ips(&["203.0.113.20"]), ips(&["192.168.50.11"]));
        let links = nets(&[
            "192.168.50.11/24",
            "2001:db8:50::11/64",
            "2001:db8:50::dead/64",
        ]);
        let own = Own {
            external_ips: &external,
            internal_ips: &internal,
            links: &links,
            offered: &ips(&["192.168.50.11", "10.42.1.1", "2001:db8:50::11"]),
            internal_cidrs: &[],
        };
        let endpoint = own.endpoint(51820, false).unwrap();
        let candidates = own.candidates(&endpoint, &nets(&["10.42.0.0/16"]));
        let expected = [
            "203.0.113.20:51820",
            "192.168.50.11:51820",
            "[2001:db8:50::11]:51820",
        ];
        let expected: Vec<SocketAddr> = expected.iter().map(|at| at.parse().unwrap()).collect();
        assert_eq!(candidates, expected);
    }

    #[test]
    fn a_temporary_address_is_no_endpoint() {
        let links = nets(&[
            "192.168.50.11/24",
            "2001:db8:50::dead/64",
            "2001:db8:50::11/64",
        ]);
        let own = Own {
            external_ips: &[],
            internal_ips: &ips(&["192.168.50.11"]),
            links: &links,
            offered: &ips(&["192.168.50.11", "2001:db8:50::11"]),
            internal_cidrs: &[],
        };
        let endpoint = own.endpoint(51820, false).unwrap();
        assert_eq!(endpoint.to_string(), "[2001:db8:50::11]:51820");
    }

    #[test]
    fn ipv6_endpoints_are_found_where_there_is_no_ipv4() {
        let case = Case {
            external: &[],
            internal: &["2001:db8::5"],
            links: &["2001:db8::5/64"],
            cidrs: &[],
        };
        assert_eq!(detect(&case).1.as_deref(), Some("[2001:db8::5]:51820"));
    }
}
