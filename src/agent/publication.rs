//! What this node's agent writes on its own Node. Pure; the cluster module writes it, on change.
//!
//! In steady state nothing here changes: no heartbeat, and what others see of this node's peers is
//! kept from one life of the agent to the next.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::address::Own;
use crate::cluster::{Annotations, annotation, since};
use crate::config::Config;
use crate::topology::{
    Claim, Endpoint, InterfaceAddr, Ledger, Mode, Node, NodeName, Origin, OtherKeys, SegmentName,
    Snapshot, Topology,
};
use crate::wireguard::key::PublicKey;

/// Endpoints published at most: those behind NAT first, then VPN peers. An entry has up to 120 bytes, and the
/// admission policy lets the annotation have 64 KiB; a longer one would keep all others from being
/// written too.
const MAX_DISCOVERED: usize = 512;

/// Everything that is published is made from these.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// This node's own object.
    pub node: &'a Node,
    /// The cluster.
    pub snapshot: &'a Snapshot,
    /// The topology.
    pub topology: &'a Topology,
    /// The flags.
    pub config: &'a Config,
    /// The addresses on this node's links.
    pub links: &'a [InterfaceAddr],
    /// Those of them at which the tunnel may be offered to others.
    pub offered: &'a [IpAddr],
    /// The UDP port of the endpoint.
    pub port: u16,
    /// This node's key.
    pub public_key: PublicKey,
    /// Its other keys, while it replaces its key.
    pub other_keys: OtherKeys,
    /// Where the tunnel last heard each peer with which it ever had a session.
    pub heard: &'a BTreeMap<PublicKey, SocketAddr>,
    /// When this node checked in, in Unix seconds.
    pub last_seen: i64,
    /// The API server's time in Unix seconds, for claims that are new; without it none is recorded.
    pub server_time: Option<i64>,
    /// Entries that were handed out to be written and that the API does not show yet: they keep their time.
    pub pending: &'a Ledger,
    /// The segment that this node has led for long enough to record it.
    pub lead: Option<&'a SegmentName>,
}

/// The annotations this node should carry; of those in [`annotation::PUBLISHED`] what is not in here
/// is to be removed.
pub fn annotations(inputs: &Inputs<'_>) -> Annotations {
    let Inputs {
        node,
        topology,
        config,
        ..
    } = inputs;
    let private_ip = private_ip(inputs);
    let last_seen = matches!(topology.mode, Mode::Kilo(_)).then_some(inputs.last_seen);
    let mut published = BTreeMap::from([
        (annotation::AGENT, annotation::format_agent(last_seen)),
        (annotation::KEY, inputs.public_key.to_string()),
        (
            annotation::INTERNAL_IP,
            annotation::format_addrs(private_ip.as_ref()),
        ),
        (
            annotation::GRANULARITY,
            annotation::format_granularity(topology.granularity).to_owned(),
        ),
    ]);
    let OtherKeys { next, previous } = inputs.other_keys;
    let others = [
        (annotation::NEXT_KEY, next),
        (annotation::PREVIOUS_KEY, previous),
    ];
    let others = others
        .into_iter()
        .filter_map(|(name, key)| Some((name, key?.to_string())));
    published.extend(others);
    if let Some(endpoint) = endpoint(inputs) {
        published.insert(annotation::ENDPOINT, annotation::format_endpoint(&endpoint));
        // What the operator forced is the only one, and Kilo's agents know no other.
        if !node.endpoint_forced && topology.mode == Mode::Native {
            let candidates = own(inputs).candidates(&endpoint, &reserved(inputs));
            published.insert(
                annotation::CANDIDATES,
                annotation::format_candidates(&candidates),
            );
        }
    }
    let wireguard_ips = topology
        .wireguard_annotation(&config.node)
        .unwrap_or_else(|| node.wireguard_ips.clone());
    if !wireguard_ips.is_empty() || matches!(topology.mode, Mode::Kilo(_)) {
        let ips = annotation::format_addrs(&wireguard_ips);
        published.insert(annotation::WIREGUARD_IP, ips);
    }
    let aliases = aliases(inputs);
    if !aliases.is_empty() {
        published.insert(annotation::ALIAS, annotation::format_aliases(&aliases));
    }
    let discovered = discovered(inputs);
    if !discovered.is_empty() {
        published.insert(
            annotation::DISCOVERED_ENDPOINTS,
            annotation::format_discovered(&discovered),
        );
    }
    let claims = claims(inputs, private_ip, &wireguard_ips, &aliases);
    let known = node.ledger.iter().chain(inputs.pending.iter());
    let known = Ledger::new(known.map(|(claim, since)| (claim.clone(), since)));
    let ledger = known.renewed(claims, inputs.server_time);
    if !ledger.is_empty() {
        published.insert(annotation::SINCE, since::format(&ledger));
    }
    if let Some(time) = last_seen {
        published.insert(annotation::CNI_COMPATIBILITY_IP, String::new());
        published.insert(annotation::LAST_SEEN, time.to_string());
    }
    published
}

/// What this node claims before all others: its keys, its addresses, its place in a region, and the
/// lead of it.
///
/// A lead is claimed once it has lasted; one that was recorded before, by an earlier life of the agent,
/// stays for as long as the node leads.
fn claims(
    inputs: &Inputs<'_>,
    private_ip: Option<InterfaceAddr>,
    wireguard_ips: &[InterfaceAddr],
    aliases: &[IpAddr],
) -> Vec<Claim> {
    let (topology, me) = (inputs.topology, &inputs.config.node);
    let own = inputs.node.internal_ips.iter().copied();
    let addresses = private_ip.iter().chain(wireguard_ips);
    let addresses = addresses.map(InterfaceAddr::addr).chain(own);
    let addresses = addresses.chain(aliases.iter().copied());
    let mut claims = addresses.map(Claim::Address).collect::<Vec<_>>();
    claims.push(Claim::Key(inputs.public_key));
    claims.extend(inputs.other_keys.iter().map(Claim::Key));
    let segment = topology.segment_of(me).map(|segment| &segment.group);
    let group = segment.or_else(|| Some(&topology.outsider(me)?.group));
    claims.extend(
        group
            .filter(|group| is_location(group))
            .cloned()
            .map(Claim::Region),
    );
    claims.extend(
        lead(topology, me)
            .cloned()
            .map(Claim::Lead)
            .filter(|claim| {
                let proven = inputs.lead.cloned().map(Claim::Lead);
                proven.as_ref() == Some(claim) || inputs.node.ledger.since(claim).is_some()
            }),
    );
    claims
}

/// The aliases that this node has, and keeps while it takes no part in the mesh. Without pools, as without
/// `--alias-cidr` or with Kilo's algorithm, they are withdrawn.
fn aliases(inputs: &Inputs<'_>) -> Vec<IpAddr> {
    let topology = inputs.topology;
    if topology.alias_pools.is_empty() {
        return Vec::new();
    }
    let given = topology.alias_annotation(&inputs.config.node);
    given.unwrap_or_else(|| inputs.node.aliases.clone())
}

/// The segment of several nodes that a node leads.
pub fn lead<'a>(topology: &'a Topology, node: &NodeName) -> Option<&'a SegmentName> {
    let segment = topology.segment_of(node)?;
    let leads = segment.leader(node).is_some() && is_location(&segment.name);
    leads.then_some(&segment.name)
}

fn is_location(segment: &SegmentName) -> bool {
    matches!(segment, SegmentName::Location(_))
}

fn own<'a>(inputs: &'a Inputs<'_>) -> Own<'a> {
    Own {
        external_ips: &inputs.node.external_ips,
        internal_ips: &inputs.node.internal_ips,
        links: inputs.links,
        offered: inputs.offered,
        internal_cidrs: &inputs.config.internal_cidrs,
    }
}

/// Networks inside of the cluster: of pods, services and WireGuard addresses.
fn reserved(inputs: &Inputs<'_>) -> Vec<IpNet> {
    let nodes = inputs.snapshot.nodes.values();
    let pods = nodes.flat_map(|node| &node.pod_cidrs);
    pods.chain(&inputs.config.service_cidrs)
        .chain(&inputs.topology.subnets)
        .chain(&inputs.topology.alias_pools)
        .copied()
        .collect()
}

/// The operator's, else what is found.
fn private_ip(inputs: &Inputs<'_>) -> Option<InterfaceAddr> {
    if inputs.node.private_ip_forced {
        inputs.node.private_ip
    } else {
        own(inputs).private_ip()
    }
}

/// The operator's, else what is found. Unlike Kilo, what was published once does not stay for ever
/// when the address or `--port` changes; but it stays where nothing better is known.
fn endpoint(inputs: &Inputs<'_>) -> Option<Endpoint> {
    if inputs.node.endpoint_forced {
        return inputs.node.endpoint.clone();
    }
    own(inputs)
        .endpoint(inputs.port, inputs.config.prioritise_private_addresses)
        .or_else(|| inputs.node.endpoint.clone())
}

/// Where this node saw those that others may look for: leaders at an address that they do not announce, and
/// VPN peers.
fn discovered(inputs: &Inputs<'_>) -> BTreeMap<PublicKey, SocketAddr> {
    let topology = inputs.topology;
    if !topology.is_leader(&inputs.config.node) {
        return BTreeMap::new();
    }
    let sought = topology
        .leaders()
        .filter(|(_, leader)| leader.behind_nat || topology.mode == Mode::Native)
        .map(|(_, leader)| (&leader.keys[..], &leader.candidates[..]))
        .chain(
            topology
                .peers
                .iter()
                .map(|peer| (std::slice::from_ref(&peer.public_key), &[][..])),
        )
        .filter(|(keys, _)| !keys.contains(&inputs.public_key));
    sought
        .filter_map(|(keys, candidates)| {
            let key = *keys.first()?;
            let heard = keys.iter().find_map(|key| inputs.heard.get(key));
            // A new tunnel has heard no peer yet; what the last one heard is still the best guess.
            let before = &inputs.node.discovered_endpoints;
            let before = keys.iter().find_map(|key| before.get(key));
            let others = || match topology.mode {
                // Kilo's agents pass on endpoints that others published.
                Mode::Kilo(_) => topology
                    .segments
                    .iter()
                    .flat_map(|segment| &segment.nodes)
                    .filter_map(|member| inputs.snapshot.nodes.get(&member.name))
                    .find_map(|node| node.discovered_endpoints.get(&key)),
                Mode::Native => None,
            };
            let endpoint = heard.or(before).or_else(others)?;
            let is_known = candidates.iter().any(|candidate| {
                candidate.address == *endpoint && candidate.origin < Origin::Discovered
            });
            (!is_known).then_some((key, *endpoint))
        })
        .take(MAX_DISCOVERED)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::{Leader, Member, RegionName, Segment};
    use crate::wireguard::key::PrivateKey;

    fn node(name: &str) -> Node {
        let object = serde_json::json!({
            "metadata": {"name": name},
            "status": {"addresses": [
                {"type": "InternalIP", "address": "192.168.50.11"},
                {"type": "ExternalIP", "address": "203.0.113.7"},
            ]},
        });
        let object = serde_json::from_value(object).unwrap();
        crate::cluster::node::parse(&object, &crate::cluster::ParseSettings::default())
            .0
            .unwrap()
    }

    fn config() -> Config {
        Config::from_args(["--hostname=a1"]).unwrap()
    }

    fn segment(leader: &str, key: PublicKey, behind_nat: bool) -> Segment {
        Segment {
            name: SegmentName::Node(NodeName(leader.into())),
            group: SegmentName::Node(NodeName(leader.into())),
            leaders: vec![Leader {
                node: NodeName(leader.into()),
                keys: vec![key],
                endpoint: None,
                address: None,
                discovered: None,
                candidates: vec![],
                behind_nat,
                persistent_keepalive: 0,
                keepalive_forced: false,
                wireguard_ips: vec!["10.4.0.2".parse().unwrap()],
                probe_ip: None,
            }],
            nodes: vec![Member {
                name: NodeName(leader.into()),
                endpoint: None,
                pod_cidrs: vec![],
                addresses: vec![],
                aliases: [].into(),
                underlay: [].into(),
                flannel_ips: [].into(),
                private_ip: None,
            }],
            allowed_location_ips: vec![],
        }
    }

    struct World {
        node: Node,
        snapshot: Snapshot,
        topology: Topology,
        config: Config,
        key: PublicKey,
        other: PublicKey,
        heard: BTreeMap<PublicKey, SocketAddr>,
        server_time: Option<i64>,
        lead: Option<SegmentName>,
    }

    impl World {
        fn new() -> Self {
            let key = PrivateKey::generate().public_key();
            let other = PrivateKey::generate().public_key();
            Self {
                node: node("a1"),
                snapshot: Snapshot::default(),
                topology: Topology {
                    subnets: vec!["10.4.0.0/16".parse().unwrap()],
                    segments: vec![segment("a1", key, false), segment("b1", other, true)],
                    ..Topology::default()
                },
                config: config(),
                key,
                other,
                heard: BTreeMap::new(),
                server_time: Some(1_796_081_284),
                lead: None,
            }
        }

        fn annotations(&self) -> Annotations {
            annotations(&Inputs {
                node: &self.node,
                snapshot: &self.snapshot,
                topology: &self.topology,
                config: &self.config,
                links: &["192.168.50.11/24".parse().unwrap()],
                offered: &["192.168.50.11".parse().unwrap()],
                port: self.config.port,
                public_key: self.key,
                other_keys: OtherKeys::default(),
                heard: &self.heard,
                last_seen: 100,
                server_time: self.server_time,
                pending: &Ledger::default(),
                lead: self.lead.as_ref(),
            })
        }
    }

    #[test]
    fn a_new_leader_says_who_and_where_it_is() {
        let world = World::new();
        let published = world.annotations();

        assert_eq!(published[annotation::KEY], world.key.to_string());
        assert_eq!(published[annotation::ENDPOINT], "203.0.113.7:51820");
        assert_eq!(
            published[annotation::CANDIDATES],
            "203.0.113.7:51820,192.168.50.11:51820"
        );
        assert_eq!(published[annotation::INTERNAL_IP], "192.168.50.11/24");
        assert_eq!(published[annotation::WIREGUARD_IP], "10.4.0.2/16");
        assert_eq!(published[annotation::GRANULARITY], "location");
        assert!(!published.contains_key(annotation::LAST_SEEN));
        assert!(!published.contains_key(annotation::DISCOVERED_ENDPOINTS));
    }

    #[test]
    fn the_operators_endpoint_and_address_are_published_as_they_are() {
        let mut world = World::new();
        world.node.endpoint = annotation::endpoint("vpn.example.com:443").ok();
        world.node.endpoint_forced = true;
        world.node.private_ip = None;
        world.node.private_ip_forced = true;

        let published = world.annotations();

        assert_eq!(published[annotation::ENDPOINT], "vpn.example.com:443");
        assert_eq!(published[annotation::INTERNAL_IP], "");
        assert!(!published.contains_key(annotation::CANDIDATES));
    }

    #[test]
    fn an_endpoint_published_earlier_follows_the_nodes_address() {
        let mut world = World::new();
        world.node.endpoint = annotation::endpoint("198.51.100.1:51820").ok();
        assert_eq!(
            world.annotations()[annotation::ENDPOINT],
            "203.0.113.7:51820"
        );
    }

    #[test]
    fn a_leader_tells_where_it_saw_those_behind_nat_and_remembers_it() {
        let mut world = World::new();
        let seen: SocketAddr = "198.51.100.7:24276".parse().unwrap();
        world.heard.insert(world.other, seen);
        world
            .heard
            .insert(PrivateKey::generate().public_key(), seen);

        let published = world.annotations();
        let expected = annotation::format_discovered(&[(world.other, seen)].into());
        assert_eq!(published[annotation::DISCOVERED_ENDPOINTS], expected);

        // The next run of the agent has heard no peer yet.
        world.node.discovered_endpoints = [(world.other, seen)].into();
        world.heard.clear();
        assert_eq!(world.annotations(), published);
    }

    #[test]
    fn a_follower_withdraws_what_it_saw_and_keeps_its_wireguard_address() {
        let mut world = World::new();
        let seen: SocketAddr = "198.51.100.7:24276".parse().unwrap();
        world.node.discovered_endpoints = [(world.other, seen)].into();
        world.node.wireguard_ips = vec!["10.4.0.9/16".parse().unwrap()];
        world.topology.segments[0].leaders[0].node = NodeName("a0".into());

        let published = world.annotations();

        assert!(!published.contains_key(annotation::DISCOVERED_ENDPOINTS));
        assert_eq!(published[annotation::WIREGUARD_IP], "10.4.0.9/16");
    }

    #[test]
    fn beside_kilo_the_time_is_published_too() {
        let mut world = World::new();
        world.topology.mode = Mode::Kilo(vec![NodeName("b1".into())]);
        let published = world.annotations();

        assert_eq!(published[annotation::LAST_SEEN], "100");
        assert_eq!(published[annotation::CNI_COMPATIBILITY_IP], "");
        let mark = published[annotation::AGENT].as_str();
        assert!(annotation::is_ours(Some(mark), Some(100)), "{mark}");
    }

    /// The ledger that would be published; the node is in region nd.
    fn ledger(world: &mut World) -> Ledger {
        let nd = SegmentName::Location(RegionName("nd".into()));
        let segment = &mut world.topology.segments[0];
        (segment.name, segment.group) = (nd.clone(), nd.clone());
        let text = &world.annotations()[annotation::SINCE];
        let read = since::parse(text).unwrap();
        assert_eq!(read.skipped, 0, "{text}");
        assert!(read.ledger.since(&Claim::Region(nd)).is_some());
        read.ledger
    }

    #[test]
    fn what_is_claimed_is_recorded_with_the_servers_time_and_keeps_it() {
        let mut world = World::new();
        let first = ledger(&mut world);
        let times = first.iter().map(|(_, since)| since).collect::<Vec<_>>();
        // The private and the WireGuard address, the key, the region.
        assert_eq!(times, [1_796_081_284; 4]);

        world.node.ledger = first.clone();
        world.server_time = Some(1_796_090_000);
        assert_eq!(ledger(&mut world), first);

        // An older Node that names a new address claims it now, not when it was made.
        let new = "192.168.50.99".parse().unwrap();
        world.node.internal_ips = vec![new];
        let then = ledger(&mut world);
        assert_eq!(then.since(&Claim::Address(new)), Some(1_796_090_000));
        let old = Claim::Address("192.168.50.11".parse().unwrap());
        assert_eq!(then.since(&old), None);
    }

    #[test]
    fn a_lead_is_recorded_when_it_has_lasted_and_dropped_with_it() {
        let mut world = World::new();
        let nd = SegmentName::Location(RegionName("nd".into()));
        let lead = Claim::Lead(nd.clone());
        assert_eq!(ledger(&mut world).since(&lead), None);

        world.lead = Some(nd);
        world.node.ledger = ledger(&mut world);
        assert!(world.node.ledger.since(&lead).is_some());

        // The next life of the agent need not wait for what the last one recorded.
        world.lead = None;
        assert!(ledger(&mut world).since(&lead).is_some());

        world.topology.segments[0].leaders[0].node = NodeName("a0".into());
        assert_eq!(ledger(&mut world).since(&lead), None);
    }

    #[test]
    fn any_number_of_vpn_peers_fits_into_the_annotation() {
        let mut world = World::new();
        for number in 0..2_000_u16 {
            let mut key = [7; 32];
            key[..2].copy_from_slice(&number.to_be_bytes());
            let public_key = PublicKey(key);
            let seen = format!("[2001:db8:ffff:ffff:ffff:ffff:ffff:{number:x}]:65535");
            world.heard.insert(public_key, seen.parse().unwrap());
            world.topology.peers.push(crate::topology::ExternalPeer {
                name: number.to_string(),
                created: 0,
                public_key,
                preshared_key: None,
                endpoint: None,
                persistent_keepalive: 0,
                allowed_ips: vec![],
            });
        }
        let behind_nat = "198.51.100.7:24276".parse().unwrap();
        world.heard.insert(world.other, behind_nat);

        let published = &world.annotations()[annotation::DISCOVERED_ENDPOINTS];

        assert!(published.len() <= 64 << 10, "{} bytes", published.len());
        let read = annotation::discovered(published).unwrap();
        assert_eq!(read.endpoints.get(&world.other), Some(&behind_nat));
    }
}
