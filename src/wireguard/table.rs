//! Cryptokey routing: which peers own an address.
//!
//! A table never changes: a new one replaces it. So the packet threads look up without a lock, and a packet
//! sees either the old peers or the new.

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, RandomState};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::key::PublicKey;
use super::peer::Peer;
use super::relay_table::Relays;

/// The owner of every address: the owners of the most specific prefix that holds it.
///
/// The prefixes are laid out as the intervals they cut the address space into, in order, each with
/// its owner, so that a look-up is one binary search however the prefixes nest.
#[derive(Clone, Debug)]
pub struct AllowedIps<T> {
    v4: Intervals<u32>,
    v6: Intervals<u128>,
    owners: Vec<T>,
}

#[derive(Clone, Debug)]
struct Intervals<A> {
    /// Where each interval begins; it ends before the next one.
    starts: Vec<A>,
    /// Index into the owners, or [`NONE`].
    owners: Vec<u32>,
}

const NONE: u32 = u32::MAX;

impl<A: Ord + Copy> Intervals<A> {
    /// `prefixes` are first and last addresses and owners, ordered by first address, the wider of
    /// two first; `next` is the address after one, if any.
    fn new(prefixes: impl Iterator<Item = (A, A, u32)>, next: impl Fn(A) -> Option<A>) -> Self {
        let mut intervals = Self {
            starts: Vec::new(),
            owners: Vec::new(),
        };
        // The prefixes that hold the current address, the most specific last.
        let mut open: Vec<(A, u32)> = Vec::new();
        for (first, last, owner) in prefixes {
            intervals.close(&mut open, |end| end < first, &next);
            intervals.begin(first, owner);
            open.push((last, owner));
        }
        intervals.close(&mut open, |_| true, &next);
        intervals
    }

    fn close(
        &mut self,
        open: &mut Vec<(A, u32)>,
        is_over: impl Fn(A) -> bool,
        next: impl Fn(A) -> Option<A>,
    ) {
        while let Some((end, _)) = open.pop_if(|(end, _)| is_over(*end)) {
            if let Some(after) = next(end) {
                self.begin(after, open.last().map_or(NONE, |&(_, owner)| owner));
            }
        }
    }

    fn begin(&mut self, start: A, owner: u32) {
        if self.starts.last() == Some(&start) {
            self.starts.pop();
            self.owners.pop();
        }
        if self.owners.last() != Some(&owner) {
            self.starts.push(start);
            self.owners.push(owner);
        }
    }

    fn owner(&self, address: A) -> Option<usize> {
        let after = self.starts.partition_point(|&start| start <= address);
        let owner = *self.owners.get(after.checked_sub(1)?)?;
        usize::try_from(owner).ok().filter(|_| owner != NONE)
    }
}

impl<T> Default for AllowedIps<T> {
    fn default() -> Self {
        Self::new(BTreeMap::new())
    }
}

impl<T> AllowedIps<T> {
    /// The owners of truncated prefixes.
    pub fn new(prefixes: BTreeMap<IpNet, T>) -> Self {
        let (nets, owners): (Vec<IpNet>, Vec<T>) = prefixes.into_iter().unzip();
        let numbered = |net: &(u32, &IpNet)| (net.0, *net.1);
        // A map orders prefixes by address, then by length, which is what the intervals want.
        let nets = || (0_u32..).zip(&nets);
        Self {
            v4: Intervals::new(
                nets().filter_map(|net| match numbered(&net) {
                    (owner, IpNet::V4(net)) => {
                        Some((net.network().into(), net.broadcast().into(), owner))
                    }
                    (_, IpNet::V6(_)) => None,
                }),
                |address: u32| address.checked_add(1),
            ),
            v6: Intervals::new(
                nets().filter_map(|net| match numbered(&net) {
                    (owner, IpNet::V6(net)) => {
                        Some((net.network().into(), net.broadcast().into(), owner))
                    }
                    (_, IpNet::V4(_)) => None,
                }),
                |address: u128| address.checked_add(1),
            ),
            owners,
        }
    }

    /// The owner of the most specific prefix that holds an address.
    pub fn get(&self, address: IpAddr) -> Option<&T> {
        let owner = match address {
            IpAddr::V4(address) => self.v4.owner(address.into()),
            IpAddr::V6(address) => self.v6.owner(address.into()),
        };
        self.owners.get(owner?)
    }
}

/// Which peers own an address.
pub(super) type Owners = AllowedIps<Vec<Arc<Peer>>>;

/// The peers of a device by their current keys, the destinations that are sent to each, and the sources that are
/// accepted from each.
#[derive(Default)]
pub(super) struct Table {
    pub(super) peers: BTreeMap<PublicKey, Arc<Peer>>,
    /// The keys of peers beside their current ones.
    also: BTreeMap<PublicKey, Arc<Peer>>,
    routes: Arc<Owners>,
    accepts: Arc<Owners>,
    /// Who relays.
    pub(super) relays: Relays,
    spread: RandomState,
}

impl Table {
    /// A table of peers. Each prefix has at least one owner, all of them among the peers. Where routes
    /// and accepted sources are the same they may share their memory. `spread` decides which of several
    /// owners gets a flow: it must be the same for each table of a device, so that flows stay.
    pub(super) fn new(
        peers: BTreeMap<PublicKey, Arc<Peer>>,
        routes: Arc<Owners>,
        accepts: Arc<Owners>,
        relays: Relays,
        spread: RandomState,
    ) -> Self {
        Self {
            peers,
            also: BTreeMap::new(),
            routes,
            accepts,
            relays,
            spread,
        }
    }

    /// The same table with these keys of peers beside their current ones.
    pub(super) fn with_other_keys(self, also: BTreeMap<PublicKey, Arc<Peer>>) -> Self {
        Self { also, ..self }
    }

    /// The peer that has a key, the current one or another.
    pub(super) fn peer_of(&self, key: &PublicKey) -> Option<&Arc<Peer>> {
        self.peers.get(key).or_else(|| self.also.get(key))
    }

    /// The peer to send a packet to, one and the same for all packets of a flow.
    ///
    /// If several own the address, rendezvous hashing chooses one that has a session, or any if none has. So
    /// a peer that comes or goes moves only its share of the flows.
    pub(super) fn route(&self, destination: IpAddr, flow: impl Fn() -> u64) -> Option<&Arc<Peer>> {
        let owners = self.routes.get(destination)?;
        if let [owner] = owners.as_slice() {
            return Some(owner);
        }
        let flow = flow();
        owners
            .iter()
            .max_by_key(|peer| (peer.has_session(), self.spread.hash_one((flow, peer.id()))))
    }

    /// Whether a peer may send from an address.
    pub(super) fn accepts(&self, source: IpAddr, from: &Arc<Peer>) -> bool {
        let owners = self.accepts.get(source);
        owners.is_some_and(|owners| owners.iter().any(|owner| Arc::ptr_eq(owner, from)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table(prefixes: &[(&str, &'static str)]) -> AllowedIps<&'static str> {
        let prefixes = prefixes
            .iter()
            .map(|&(net, owner)| (net.parse().unwrap(), owner));
        AllowedIps::new(prefixes.collect())
    }

    #[test]
    fn the_most_specific_prefix_owns_the_address() {
        let table = table(&[
            ("10.0.0.0/8", "wide"),
            ("10.1.0.0/16", "narrow"),
            ("10.1.2.3/32", "host"),
            ("::/0", "all"),
            ("fd00::/8", "local"),
        ]);
        for (address, owner) in [
            ("9.255.255.255", None),
            ("10.0.0.0", Some("wide")),
            ("10.0.255.255", Some("wide")),
            ("10.1.0.0", Some("narrow")),
            ("10.1.2.2", Some("narrow")),
            ("10.1.2.3", Some("host")),
            ("10.1.2.4", Some("narrow")),
            ("10.2.0.0", Some("wide")),
            ("11.0.0.0", None),
            ("::", Some("all")),
            ("fcff::1", Some("all")),
            ("fd00::1", Some("local")),
            ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Some("all")),
        ] {
            assert_eq!(
                table.get(address.parse().unwrap()).copied(),
                owner,
                "{address}"
            );
        }
    }

    #[test]
    fn prefixes_that_end_together_end_together() {
        let table = table(&[
            ("0.0.0.0/0", "all"),
            ("128.0.0.0/1", "half"),
            ("255.255.255.255/32", "last"),
        ]);
        assert_eq!(table.get([255; 4].into()), Some(&"last"));
        assert_eq!(table.get([254; 4].into()), Some(&"half"));
        assert_eq!(table.get([1; 4].into()), Some(&"all"));
    }

    fn prefix() -> impl Strategy<Value = IpNet> {
        // Few bits that differ, so that prefixes nest and addresses hit them.
        let v4 = (0_u32..256, 0_u8..=32).prop_map(|(bits, length)| {
            let address = (bits & 0xf0) << 24 | (bits & 0x0f) | (0x00ff_0000 * (bits & 1));
            IpNet::new(IpAddr::V4(address.into()), length)
                .unwrap()
                .trunc()
        });
        let v6 = (0_u128..256, 0_u8..=128).prop_map(|(bits, length)| {
            let address = (bits & 0xf0) << 120 | (bits & 0x0f);
            IpNet::new(IpAddr::V6(address.into()), length)
                .unwrap()
                .trunc()
        });
        prop_oneof![v4, v6]
    }

    proptest! {
        #[test]
        fn the_intervals_agree_with_a_linear_search(nets in prop::collection::btree_set(prefix(), 0..60)) {
            let model: Vec<IpNet> = nets.iter().copied().collect();
            let table = AllowedIps::new(model.iter().map(|&net| (net, net)).collect());
            let edges = model.iter().flat_map(|net| [net.network(), net.broadcast()]);
            for edge in edges {
                let around = match edge {
                    IpAddr::V4(edge) => {
                        let edge = u32::from(edge);
                        [edge.wrapping_sub(1), edge, edge.wrapping_add(1)].map(|a| IpAddr::V4(a.into()))
                    }
                    IpAddr::V6(edge) => {
                        let edge = u128::from(edge);
                        [edge.wrapping_sub(1), edge, edge.wrapping_add(1)].map(|a| IpAddr::V6(a.into()))
                    }
                };
                for address in around {
                    let expected = model.iter().filter(|net| net.contains(&address)).max_by_key(|net| net.prefix_len());
                    prop_assert_eq!(table.get(address), expected, "{}", address);
                }
            }
        }
    }
}
