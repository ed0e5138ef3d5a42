//! The addresses of the pools (`--subnet`): WireGuard addresses from their beginning, which nodes keep, and
//! probe addresses from their end.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::address::{is_host_of, nth, nth_last};
use super::claims::Claims;
use super::excluded::{Field, Object, Reason};
use super::{Claim, InterfaceAddr, LeaderCount, Node, NodeName, SegmentName, Settings};

/// The leaders of each segment, the primary first.
type Elected<'a> = BTreeMap<&'a SegmentName, Vec<&'a Node>>;
/// The nodes of each segment whose agents have not started yet.
type Expected<'a> = BTreeMap<SegmentName, Vec<&'a NodeName>>;

/// The addresses that were given out.
#[derive(Debug, Default)]
pub(super) struct Pools {
    wireguard_ips: BTreeMap<NodeName, Vec<IpAddr>>,
    /// The probe addresses of each family, IPv4 first, by the place of a leader among those of its segment, by name.
    probe_ips: [Vec<IpAddr>; 2],
}

impl Pools {
    /// Gives each leader one WireGuard address of each pool.
    ///
    /// A requested address is given to its node, whether or not it leads now, so that a node that joins or leaves
    /// renumbers no other. Of two equal requests the older claim wins. A leader without a request gets the lowest
    /// free address: the primaries first, in the order of segments, then the second leaders, and so on. In a new
    /// mesh the primaries have the addresses that Kilo gives.
    ///
    /// An address is left free for each leader that a segment will have when the agents of all its nodes have
    /// started (`expected`), so that the addresses of a new mesh do not depend on the order in which they start.
    pub(super) fn new(
        claims: &mut Claims<'_>,
        settings: &Settings,
        elected: &Elected<'_>,
        expected: &Expected<'_>,
    ) -> Self {
        let mut pools = Self::default();
        let turns = turns(settings.leaders_per_region, elected, expected);
        // Leaders of other segments use the same probe addresses.
        let probes = elected.values().map(Vec::len).max().unwrap_or_default();
        for pool in &settings.subnets {
            let kept = kept(pool, claims);
            let mut pool = Pool {
                used: kept.values().copied().collect(),
                offset: 1,
                net: pool,
            };
            for turn in &turns {
                let leader = match turn {
                    Turn::Leader(leader) => &leader.name,
                    Turn::Coming(nodes, place) => {
                        let keep = nodes.iter().filter(|node| kept.contains_key(**node));
                        if keep.count() <= *place {
                            pool.take();
                        }
                        continue;
                    }
                };
                match kept.get(leader).copied().or_else(|| pool.take()) {
                    Some(ip) => {
                        let given = pools.wireguard_ips.entry(leader.clone());
                        given.or_default().push(ip);
                    }
                    None => {
                        let field = Field::WireguardIp(pool.net.network());
                        claims.exclude(
                            Object::Node(leader.clone()),
                            field,
                            Reason::SubnetExhausted,
                        );
                    }
                }
            }
            pools.probe_ips[usize::from(pool.net.addr().is_ipv6())] = pool.last(probes);
        }
        for ips in pools.wireguard_ips.values_mut() {
            ips.sort();
        }
        pools
    }

    /// The WireGuard addresses of a leader.
    pub(super) fn wireguard_ips(&self, leader: &NodeName) -> Vec<IpAddr> {
        self.wireguard_ips.get(leader).cloned().unwrap_or_default()
    }

    /// The probe address of a leader at this place, by name, of its segment, of a family of its pods, IPv4 first; `None` where
    /// the pools have no room.
    pub(super) fn probe_ip(&self, place: usize, pod_cidrs: &[IpNet]) -> Option<IpAddr> {
        let has = |ip: &&IpAddr| {
            let mut pods = pod_cidrs.iter();
            pods.any(|net| net.addr().is_ipv6() == ip.is_ipv6())
        };
        let ips = self.probe_ips.iter().filter_map(|ips| ips.get(place));
        ips.copied().find(|ip| has(&ip))
    }
}

/// Who gets the next address.
#[derive(Debug)]
enum Turn<'a> {
    Leader(&'a Node),
    /// These nodes, when the agents of so many and one more have started.
    Coming(&'a [&'a NodeName], usize),
}

fn turns<'a>(
    count: LeaderCount,
    elected: &'a Elected<'_>,
    expected: &'a Expected<'_>,
) -> Vec<Turn<'a>> {
    let names = elected.keys().copied().chain(expected.keys());
    let names = names.collect::<BTreeSet<_>>();
    let turn = |place: usize, name: &SegmentName| {
        let leaders = elected.get(name).map_or(&[][..], Vec::as_slice);
        if let Some(leader) = leaders.get(place) {
            return Some(Turn::Leader(leader));
        }
        let place = place - leaders.len();
        let nodes = expected.get(name).filter(|nodes| place < nodes.len())?;
        Some(Turn::Coming(nodes, place))
    };
    let turns = (0..count.get()).flat_map(|place| {
        let names = names.iter();
        names.filter_map(move |name| turn(place, name))
    });
    turns.collect()
}

/// A pool while its addresses are given out.
#[derive(Debug)]
struct Pool<'a> {
    net: &'a IpNet,
    /// The addresses before this one are used.
    offset: u128,
    used: BTreeSet<IpAddr>,
}

impl Pool<'_> {
    /// The lowest free address, which is used from then on.
    fn take(&mut self) -> Option<IpAddr> {
        loop {
            let ip = nth(self.net, self.offset)?;
            self.offset += 1;
            if is_host_of(self.net, ip) && self.used.insert(ip) {
                return Some(ip);
            }
        }
    }

    /// The highest free addresses, at most so many.
    fn last(&self, count: usize) -> Vec<IpAddr> {
        let ips = (0..).map_while(|offset| nth_last(self.net, offset));
        let free = ips.filter(|ip| is_host_of(self.net, *ip) && !self.used.contains(ip));
        free.take(count).collect()
    }
}

/// The addresses of a pool that nodes requested and keep.
fn kept(pool: &IpNet, claims: &mut Claims<'_>) -> BTreeMap<NodeName, IpAddr> {
    let mut holders = BTreeMap::<IpAddr, &NodeName>::new();
    let mut kept = BTreeMap::new();
    let mut requests = Vec::new();
    for node in claims.by_age() {
        let mut requested = node.wireguard_ips.iter().map(InterfaceAddr::addr);
        if let Some(ip) = requested.find(|ip| ip.is_ipv6() == pool.addr().is_ipv6()) {
            let rank = node.ledger.rank(&Claim::Address(ip));
            requests.push((rank, node.created, &node.name, ip, node));
        }
    }
    requests.sort_by_key(|(rank, created, name, ..)| (*rank, *created, *name));
    for (.., ip, node) in requests {
        let meshed = claims.nodes[&node.name].is_meshed();
        let reason = if !is_host_of(pool, ip) {
            Some(Reason::NotInSubnet)
        } else {
            let holder = holders.get(&ip).copied().cloned();
            holder.map(|holder| Reason::TakenBy(Object::Node(holder)))
        };
        match reason {
            Some(_) if !meshed => {}
            Some(reason) => {
                let object = Object::Node(node.name.clone());
                claims.exclude(object, Field::WireguardIp(ip), reason);
            }
            None => {
                holders.insert(ip, &node.name);
                kept.insert(node.name.clone(), ip);
            }
        }
    }
    kept
}
