//! What is fuzzed: each function takes any bytes and must not panic, and where it knows better, it
//! compares. `fuzz_targets` runs them with a fuzzer, `tests/unit/fuzz_corpus.rs` over the corpora.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net};
use ring::digest::{SHA256, digest};
use selvedge::agent::saved_view;
use selvedge::cluster::annotation;
use selvedge::cluster::node::{self, NodeObject, ParseSettings};
use selvedge::cluster::peer::{self, PeerObject};
use selvedge::cluster::since;
use selvedge::flannel::{Lease, NetConf, SubnetEnv};
use selvedge::kernel;
use selvedge::topology::{
    Endpoint, Granularity, LeaderCount, Ledger, Mode, Node, NodeName, OtherKeys, RegionName,
    Settings, Snapshot, Topology,
};
use selvedge::wireguard::gso::{Coalescer, Split, VNET_HEADER, VnetHeader};
use selvedge::wireguard::key::PublicKey;
use selvedge::wireguard::packet::Header;
use selvedge::wireguard::replay::{ReplayWindow, WINDOW};
use selvedge::wireguard::table::AllowedIps;
use selvedge::wireguard::uapi::Parser;

/// A target's name, which is that of its corpus, and what it runs.
pub(crate) type Target = (&'static str, fn(&[u8]));

/// Every target that needs no device.
pub(crate) const ALL: &[Target] = &[
    ("uapi", uapi),
    ("allowed_ips", allowed_ips),
    ("replay_window", replay_window),
    ("vnet_header", vnet_header),
    ("ip_header", ip_header),
    ("node", node),
    ("peer_object", peer_object),
    ("net_conf", net_conf),
    ("subnet_env", subnet_env),
    ("lease", lease),
    ("annotations", annotations),
    ("endpoint", endpoint),
    ("topology", topology),
    ("state_cache", state_cache),
    ("netlink_message", netlink_message),
];

/// The configuration protocol means the same however its bytes are cut.
pub(crate) fn uapi(data: &[u8]) {
    let Some((&piece, text)) = data.split_first() else {
        return;
    };
    let parse = |piece: usize| {
        let mut parser = Parser::default();
        let mut requests = Vec::new();
        for mut input in text.chunks(piece) {
            while let Some(request) = parser.feed(&mut input) {
                requests.push(request);
            }
        }
        requests
    };
    assert_eq!(parse(usize::from(piece).max(1)), parse(text.len().max(1)));
}

/// The interval table against a look at every prefix.
pub(crate) fn allowed_ips(data: &[u8]) {
    let mut prefixes = BTreeMap::new();
    let mut addresses = Vec::new();
    for (owner, piece) in data.chunks_exact(6).take(200).enumerate() {
        let &[kind, length, a, b, c, d] = piece else {
            continue;
        };
        // Few different bits, so that prefixes nest.
        let address: IpAddr = if kind & 1 == 0 {
            Ipv4Addr::new(a & 3, b & 3, c, d).into()
        } else {
            Ipv6Addr::from([a & 3, b & 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, c, d]).into()
        };
        addresses.push(address);
        let bits = if address.is_ipv4() { 33 } else { 129 };
        if let Ok(net) = IpNet::new(address, length % bits) {
            addresses.extend([net.network(), net.broadcast()]);
            prefixes.insert(net.trunc(), owner);
        }
    }
    let table = AllowedIps::new(prefixes.clone());
    for address in addresses {
        let owner = prefixes
            .iter()
            .filter(|(net, _)| net.contains(&address))
            .max_by_key(|(net, _)| net.prefix_len())
            .map(|(_, owner)| owner);
        assert_eq!(table.get(address), owner, "{address} in {prefixes:?}");
    }
}

/// The replay window against the set of all that it saw.
pub(crate) fn replay_window(data: &[u8]) {
    let mut window = ReplayWindow::default();
    let mut seen = BTreeSet::new();
    let mut counter = 0_u64;
    for piece in data.chunks_exact(3) {
        let &[how, low, high] = piece else {
            continue;
        };
        let step = u64::from(u16::from_le_bytes([low, high]));
        counter = match how % 4 {
            0 => counter.saturating_add(1),
            1 => counter.saturating_add(step),
            2 => counter.saturating_sub(step),
            _ => counter.saturating_add(step << 40),
        }
        .min(u64::MAX - 1);
        let highest = seen.last().copied().unwrap_or(0);
        let in_window = seen.is_empty() || counter > highest || highest - counter < WINDOW;
        let fresh = in_window && !seen.contains(&counter);
        assert_eq!(window.is_fresh(counter), fresh, "{counter} after {highest}");
        assert_eq!(window.mark(counter), fresh);
        if fresh {
            seen.insert(counter);
        }
    }
}

/// What a large packet is cut into is joined to packets that are cut into the same again.
pub(crate) fn vnet_header(data: &[u8]) {
    let Some((vnet, packet)) = VnetHeader::read(data) else {
        return;
    };
    let Some(pieces) = cut(&vnet, packet) else {
        return;
    };
    let mut arena = Vec::new();
    let mut coalescer = Coalescer::default();
    let mut ranges = Vec::new();
    for piece in &pieces {
        let range = arena.len()..arena.len() + piece.len();
        arena.extend(piece);
        ranges.push(range);
    }
    for (range, piece) in ranges.into_iter().zip(&pieces) {
        if let Some(header) = Header::parse(piece) {
            coalescer.push(&arena, range, &header);
        }
    }
    let parsed = pieces
        .iter()
        .filter(|piece| Header::parse(piece).is_some())
        .count();
    let mut again = 0;
    coalescer.finish(&mut arena, |joined, count| {
        let joined: Vec<u8> = joined
            .iter()
            .flat_map(|piece| piece.iter().copied())
            .collect();
        assert!(joined.len() >= VNET_HEADER);
        again += count;
        if let Some((vnet, packet)) = VnetHeader::read(&joined)
            && count > 1
        {
            let cut = cut(&vnet, packet).map(|pieces| pieces.len());
            assert_eq!(cut, Some(count), "joined packets come apart differently");
        }
    });
    assert_eq!(again, parsed, "packets were lost or made");
}

fn cut(vnet: &VnetHeader, packet: &[u8]) -> Option<Vec<Vec<u8>>> {
    let header = Header::parse(packet)?;
    let split = Split::new(vnet, packet, &header)?;
    // As many as the kernel makes of one packet, and some.
    let count = split.count().min(256);
    let pieces = (0..count).map(|n| {
        let mut out = vec![0; split.length(n)];
        split.write(n, &mut out);
        out
    });
    Some(pieces.collect())
}

/// Headers of IP packets.
pub(crate) fn ip_header(data: &[u8]) {
    if let Some(header) = Header::parse(data) {
        assert!(header.header <= header.length && header.length <= data.len());
        header.flow_hash(data);
    }
}

/// A Node object, as the API server sends it.
pub(crate) fn node(data: &[u8]) {
    if let Ok(object) = serde_json::from_slice::<NodeObject>(data) {
        node::parse(&object, &ParseSettings::default());
    }
}

/// A Peer object, as the API server sends it.
pub(crate) fn peer_object(data: &[u8]) {
    if let Ok(object) = serde_json::from_slice::<PeerObject>(data) {
        peer::parse(&object);
    }
}

/// flannel's net-conf.json.
pub(crate) fn net_conf(data: &[u8]) {
    let _ = NetConf::parse(data);
}

/// flannel's subnet.env.
pub(crate) fn subnet_env(data: &[u8]) {
    let _ = SubnetEnv::parse(data);
}

/// flannel's annotations of a Node: `KEY=VALUE` in lines, `~` for `flannel.alpha.coreos.com/`.
pub(crate) fn lease(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    let annotations = pairs
        .map(|(key, value)| {
            let key = key.replace('~', "flannel.alpha.coreos.com/");
            (key, value.to_owned())
        })
        .collect();
    Lease::parse(&annotations, |_, _, reason| drop(reason.to_string()));
}

/// The values of annotations, one at a time; a formatted value parses to the same value.
pub(crate) fn annotations(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else {
        return;
    };
    if let Ok(endpoint) = annotation::endpoint(text) {
        let again = annotation::format_endpoint(&endpoint);
        assert_eq!(annotation::endpoint(&again).ok(), Some(endpoint));
    }
    let _ = annotation::address(text);
    let _ = annotation::interface_addr(text);
    if let Ok(addresses) = annotation::wireguard_ips(text) {
        annotation::format_addrs(&addresses);
    }
    let _ = annotation::prefix(text);
    let _ = annotation::keepalive(text);
    let _ = annotation::region(text);
    let _ = annotation::granularity(text);
    let _ = annotation::discovered(text);
    if let Ok(read) = since::parse(text) {
        let again = since::parse(&since::format(&read.ledger));
        assert_eq!(again.map(|read| read.ledger), Ok(read.ledger));
    }
}

/// An endpoint, alone and with whatever may follow it; what it means survives being written.
pub(crate) fn endpoint(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else {
        return;
    };
    for text in text.lines() {
        let Ok(endpoint) = annotation::endpoint(text) else {
            continue;
        };
        assert_ne!(endpoint.port(), 0, "{text:?}");
        let again = annotation::format_endpoint(&endpoint);
        assert_eq!(
            annotation::endpoint(&again).ok(),
            Some(endpoint),
            "{text:?}"
        );
    }
}

/// Any cluster: every node is somewhere once, a leader leads its own segment, and no prefix is carried
/// for two of them, unless it is Kilo that decides.
pub(crate) fn topology(data: &[u8]) {
    let Some((&how, nodes)) = data.split_first() else {
        return;
    };
    let nodes = nodes.chunks_exact(8).take(24).enumerate();
    let nodes = nodes.filter_map(|(n, piece)| Some(any_node(n, piece.first_chunk()?)));
    let snapshot = Snapshot {
        nodes: nodes.map(|node| (node.name.clone(), node)).collect(),
        ..Snapshot::default()
    };
    let granularity = [Granularity::Location, Granularity::Full, Granularity::Cross];
    let pool = [16, 24, 30, 32][usize::from(how >> 2 & 3)];
    let settings = Settings {
        granularity: granularity[usize::from(how & 3) % 3],
        leaders_per_region: LeaderCount::new(1 + (how >> 6)).unwrap_or_default(),
        subnets: vec![net([10, 4, 0, 0], pool)],
        service_cidrs: vec![net([10, 96, 0, 0], 16)],
        internal_cidrs: if how & 16 == 0 {
            Vec::new()
        } else {
            vec![net([192, 168, 0, 0], 16)]
        },
        alias_pools: vec![],
        region_networks: BTreeMap::new(),
        beside_kilo: how & 32 != 0,
        cluster_networks: vec![net([10, 42, 0, 0], 16)],
    };
    let topology = Topology::new(&snapshot, &settings, &BTreeMap::new(), 1000);
    let mut owners = BTreeMap::new();
    for segment in &topology.segments {
        assert!(!segment.leaders.is_empty());
        for leader in &segment.leaders {
            assert!(!leader.keys.is_empty());
            assert!(segment.member(&leader.node).is_some());
        }
        for prefix in segment.allowed_ips() {
            let other = owners.insert(prefix, &segment.name);
            assert!(
                topology.mode != Mode::Native || other.is_none_or(|other| *other == segment.name),
                "{prefix} is carried for {other:?} and {:?}",
                segment.name
            );
        }
    }
    for name in snapshot.nodes.keys() {
        let inside = topology.segments.iter().flat_map(|segment| &segment.nodes);
        let inside = inside.filter(|member| member.name == *name).count();
        let outside = usize::from(topology.outsider(name).is_some());
        assert_eq!(inside + outside, 1, "{name:?}");
    }
}

fn net([a, b, c, d]: [u8; 4], bits: u8) -> IpNet {
    let net = Ipv4Net::new(Ipv4Addr::new(a, b, c, d), bits.min(32));
    IpNet::V4(net.unwrap_or_default())
}

/// Few different values, so that claims collide.
fn any_node(
    n: usize,
    &[
        region,
        key,
        private,
        pods,
        flags,
        wireguard,
        location,
        endpoint,
    ]: &[u8; 8],
) -> Node {
    let has = |bit: u8| flags & 1 << bit != 0;
    let some = |byte: u8| byte & 0x80 == 0;
    let private_ip = net([192, 168, private >> 3 & 3, private & 7], 24);
    let address = IpAddr::from([203, 0, 113, endpoint & 7]);
    Node {
        name: NodeName(format!("n{n:02}")),
        created: i64::from(region >> 4),
        region: RegionName(["", "a", "b", "c"][usize::from(region & 3)].to_owned()),
        region_declared: region & 2 != 0,
        public_key: some(key).then_some(PublicKey([key & 31; 32])),
        endpoint: some(endpoint).then(|| Endpoint::Addr((address, 51820).into())),
        endpoint_forced: has(0),
        internal_ips: vec![if has(1) { address } else { private_ip.addr() }],
        external_ips: if has(2) { vec![address] } else { Vec::new() },
        private_ip: some(private).then_some(private_ip),
        private_ip_forced: has(3),
        pod_cidrs: if some(pods) {
            vec![net([10, 42, pods & 15, 0], 20 + (pods >> 4)).trunc()]
        } else {
            Vec::new()
        },
        wireguard_ips: if some(wireguard) {
            vec![net([10, 4, 0, wireguard & 15], 16)]
        } else {
            Vec::new()
        },
        leader: has(4),
        ready: has(5),
        persistent_keepalive: has(6).then_some(25),
        allowed_location_ips: match location & 7 {
            0..=3 => Vec::new(),
            4 => vec![net([0; 4], 0)],
            5 => vec![net([10, 42, 1, 0], 24)],
            _ => vec![
                net([10, 6, location >> 6, 0], 24),
                net([192, 168, 1, location >> 4 & 3], 32),
            ],
        },
        discovered_endpoints: BTreeMap::new(),
        aliases: vec![],
        candidates: Vec::new(),
        granularity: None,
        last_seen: Some(i64::from(region) * 8),
        ours: !has(7),
        ledger: Ledger::default(),
        other_keys: OtherKeys::default(),
        relay_forbidden: false,
        lease: None,
    }
}

/// The agent's memory of the cluster: as a file, and as what stands in it behind a checksum that fits.
pub(crate) fn state_cache(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else {
        return;
    };
    let _ = saved_view::decode(text);
    let sha256: String = digest(&SHA256, data)
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let _ = saved_view::decode(&format!(
        "{{\"format\":1,\"sha256\":\"{sha256}\",\"state\":{text}}}"
    ));
}

/// What the kernel tells of links, addresses, routes, rules and tables.
pub(crate) fn netlink_message(data: &[u8]) {
    kernel::classify("kilo0", data);
}
