//! The annotations on Nodes: their names, and parsers and formatters of their values.
//!
//! The text forms are Kilo's, so that its agents and tools understand the published values.
//! [`super::node`] decides what a malformed value means for the Node.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::topology::{Endpoint, Granularity, InterfaceAddr, is_unicast};
use crate::wireguard::key::PublicKey;

/// The operator's endpoint; wins over [`ENDPOINT`].
pub const FORCE_ENDPOINT: &str = "kilo.squat.ai/force-endpoint";
/// The endpoint in effect, published by the node's agent.
pub const ENDPOINT: &str = "kilo.squat.ai/endpoint";
/// The operator's private address; wins over [`INTERNAL_IP`].
pub const FORCE_INTERNAL_IP: &str = "kilo.squat.ai/force-internal-ip";
/// The private address in effect, published by the node's agent; empty for none.
pub const INTERNAL_IP: &str = "kilo.squat.ai/internal-ip";
/// The WireGuard public key, published by the node's agent.
pub const KEY: &str = "kilo.squat.ai/key";
/// The WireGuard public key that is to replace [`KEY`], published by the node's agent.
pub const NEXT_KEY: &str = "selvedge.dev/next-key";
/// The WireGuard public key that [`KEY`] replaced and that is still accepted, published by the node's agent.
pub const PREVIOUS_KEY: &str = "selvedge.dev/previous-key";
/// The agent's heartbeat in Unix seconds; only Kilo's algorithm reads it.
pub const LAST_SEEN: &str = "kilo.squat.ai/last-seen";
/// The WireGuard address with the mesh's prefix length; empty for none.
pub const WIREGUARD_IP: &str = "kilo.squat.ai/wireguard-ip";
/// The endpoints at which the node's agent observed its peers.
pub const DISCOVERED_ENDPOINTS: &str = "kilo.squat.ai/discovered-endpoints";
/// The agent's granularity.
pub const GRANULARITY: &str = "kilo.squat.ai/granularity";
/// Kilo's Cilium mode only; published empty.
pub const CNI_COMPATIBILITY_IP: &str = "kilo.squat.ai/cni-compatibility-ip";
/// The operator's request that the node lead its region; presence counts, not the value.
pub const LEADER: &str = "kilo.squat.ai/leader";
/// The operator's region; wins over the topology label, even when empty.
pub const LOCATION: &str = "kilo.squat.ai/location";
/// Seconds between keepalives that the node sends to every peer.
pub const PERSISTENT_KEEPALIVE: &str = "kilo.squat.ai/persistent-keepalive";
/// Additional prefixes that are reached through the node's region.
pub const ALLOWED_LOCATION_IPS: &str = "kilo.squat.ai/allowed-location-ips";
/// The mark of this product's agents: their version and, next to Kilo's agents, the time of [`LAST_SEEN`].
pub const AGENT: &str = "selvedge.dev/agent";
/// Since when the node has held each of its claims, in the form of [`super::since`].
pub const SINCE: &str = "selvedge.dev/since";

/// The operator's `"false"` keeps the node from relaying between other regions.
pub const RELAY: &str = "selvedge.dev/relay";

/// The candidate endpoints of the node's tunnel, in addition to [`ENDPOINT`].
pub const CANDIDATES: &str = "selvedge.dev/candidates";

/// The aliases of the node, one of each family: written by the node's agent, or before it by the operator.
pub const ALIAS: &str = "selvedge.dev/alias";

/// The annotations that an agent writes on its own Node, and that clean-up removes. None is the operator's.
pub const PUBLISHED: [&str; 14] = [
    AGENT,
    ALIAS,
    CANDIDATES,
    CNI_COMPATIBILITY_IP,
    DISCOVERED_ENDPOINTS,
    ENDPOINT,
    GRANULARITY,
    INTERNAL_IP,
    KEY,
    LAST_SEEN,
    NEXT_KEY,
    PREVIOUS_KEY,
    SINCE,
    WIREGUARD_IP,
];

/// Allowed location IPs beyond this many are refused: they become routes on every node.
pub const MAX_ALLOWED_LOCATION_IPS: usize = 256;
/// A list of more discovered endpoints than this, more than any mesh has leaders, is refused whole.
pub const MAX_DISCOVERED_ENDPOINTS: usize = 4096;
/// Candidates of one node beyond this many are refused: each is sent a handshake by every leader.
pub const MAX_CANDIDATES: usize = 8;
/// Longest name of a region in characters: the limit of a label's value.
const MAX_REGION: usize = 63;

/// Separates the version and the time in [`AGENT`].
const SEEN: &str = " last-seen=";

/// Formats [`AGENT`], with the time written to [`LAST_SEEN`] in the same patch, if any.
pub fn format_agent(last_seen: Option<i64>) -> String {
    let version = env!("CARGO_PKG_VERSION");
    match last_seen {
        None => version.to_owned(),
        Some(time) => format!("{version}{SEEN}{time}"),
    }
}

/// Whether an agent of this product was the last to write on a Node with this [`AGENT`] and [`LAST_SEEN`].
///
/// A real `kg` that follows an agent without clean-up ignores the mark and leaves it. But `kg` writes the
/// time. Agents of this product write it only next to a `kg`, and then the mark holds the same time.
pub fn is_ours(mark: Option<&str>, last_seen: Option<i64>) -> bool {
    let time_of = |mark: &str| mark.split_once(SEEN)?.1.parse::<i64>().ok();
    mark.is_some_and(|mark| last_seen.is_none() || last_seen == time_of(mark))
}

/// Why a text is malformed: a clause that follows "is refused:".
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

/// Reads `host:port`, where an IPv6 address stands in brackets and a name is of RFC 1123.
pub fn endpoint(text: &str) -> Result<Endpoint, Malformed> {
    let (host, port) = text
        .rsplit_once(':')
        .ok_or(Malformed("an endpoint is written host:port"))?;
    endpoint_of(host, parse_port(port)?)
}

/// Joins a host, in the form of [`endpoint`], and a valid port.
pub(super) fn endpoint_of(host: &str, port: u16) -> Result<Endpoint, Malformed> {
    if let Some(inner) = host.strip_prefix('[') {
        let inner = inner
            .strip_suffix(']')
            .ok_or(Malformed("the bracket before the port is missing"))?;
        let ip = address(inner)?;
        if ip.is_ipv4() {
            return Err(Malformed("only IPv6 addresses stand in brackets"));
        }
        return Ok(Endpoint::Addr(SocketAddr::new(ip, port)));
    }
    if host.contains(':') {
        return Err(Malformed(
            "an IPv6 address needs brackets, as in [2001:db8::1]:51820",
        ));
    }
    if host.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return Ok(Endpoint::Addr(SocketAddr::new(address(host)?, port)));
    }
    Ok(Endpoint::Dns {
        host: dns_name(host)?,
        port,
    })
}

/// Formats an endpoint as [`endpoint`] reads it.
pub fn format_endpoint(endpoint: &Endpoint) -> String {
    match endpoint {
        Endpoint::Addr(addr) => addr.to_string(),
        Endpoint::Dns { host, port } => format!("{host}:{port}"),
    }
}

fn parse_port(text: &str) -> Result<u16, Malformed> {
    let port = Malformed("a port is a number from 1 to 65535");
    if text.is_empty() || text.len() > 5 || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(port);
    }
    match text.parse() {
        Ok(0) | Err(_) => Err(port),
        Ok(number) => Ok(number),
    }
}

/// Reads an address that a node can have: unicast, routable, without a zone.
pub fn address(text: &str) -> Result<IpAddr, Malformed> {
    if text.contains('%') {
        return Err(Malformed(
            "an address with a zone is valid on one host only",
        ));
    }
    let ip = IpAddr::from_str(text).map_err(|_| Malformed("this is not an IP address"))?;
    usable(ip)?;
    Ok(ip)
}

/// Refuses addresses that no packet between nodes can carry.
fn usable(ip: IpAddr) -> Result<(), Malformed> {
    if let IpAddr::V6(v6) = ip
        && v6.to_ipv4_mapped().is_some()
    {
        return Err(Malformed(
            "write an IPv4 address as such, not mapped into IPv6",
        ));
    }
    if !is_unicast(ip) {
        return Err(Malformed(
            "unspecified, loopback, link-local, multicast and reserved addresses reach no other node",
        ));
    }
    Ok(())
}

/// Reads a name as RFC 1123 has it, in lower case.
fn dns_name(text: &str) -> Result<String, Malformed> {
    let bad = Malformed(
        "a name consists of letters, digits and hyphens between dots, at most 63 a part and 253 in all",
    );
    if text.is_empty() || text.len() > 253 {
        return Err(bad);
    }
    for label in text.split('.') {
        let inside = label
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-');
        let edges = !label.starts_with('-') && !label.ends_with('-');
        if label.is_empty() || label.len() > 63 || !inside || !edges {
            return Err(bad);
        }
    }
    let numeric = |label: &str| label.bytes().all(|b| b.is_ascii_digit());
    if text.rsplit('.').next().is_some_and(numeric) {
        return Err(Malformed(
            "a name does not end in a number; is it a mistyped address?",
        ));
    }
    Ok(text.to_ascii_lowercase())
}

/// Reads an address with the length of its link's prefix, as in `192.168.50.11/24`.
pub fn interface_addr(text: &str) -> Result<InterfaceAddr, Malformed> {
    let net = IpNet::from_str(text).map_err(|_| {
        Malformed("write the address with its prefix length, as in 192.168.50.11/24")
    })?;
    usable(net.addr())?;
    if net.prefix_len() == 0 {
        return Err(Malformed("no link has every address in its prefix"));
    }
    // RFC 3021: prefixes of one or two addresses have no network and broadcast address.
    if let IpNet::V4(v4) = net
        && v4.prefix_len() < 31
        && (v4.addr() == v4.network() || v4.addr() == v4.broadcast())
    {
        return Err(Malformed("this is the prefix itself, not an address in it"));
    }
    Ok(net)
}

/// Reads `wireguard-ip`: one address with its prefix length, or one of each family with a comma.
///
/// Empty means that the node has none.
pub fn wireguard_ips(text: &str) -> Result<Vec<InterfaceAddr>, Malformed> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let addrs = text
        .split(',')
        .map(|item| interface_addr(item.trim()))
        .collect::<Result<Vec<_>, _>>()?;
    let of_v6 = addrs.iter().filter(|a| a.addr().is_ipv6()).count();
    if of_v6 > 1 || addrs.len() - of_v6 > 1 {
        return Err(Malformed(
            "a node has at most one WireGuard address of each family",
        ));
    }
    Ok(addrs)
}

/// Reads `alias`: one address, or one of each family with a comma; empty means none.
pub fn aliases(text: &str) -> Result<Vec<IpAddr>, Malformed> {
    let items = text.split(',').map(str::trim);
    let items = items.filter(|item| !item.is_empty());
    let ips = items.map(address).collect::<Result<Vec<_>, _>>()?;
    let of_v6 = ips.iter().filter(|ip| ip.is_ipv6()).count();
    if of_v6 > 1 || ips.len() - of_v6 > 1 {
        return Err(Malformed("a node has at most one alias of each family"));
    }
    Ok(ips)
}

/// Writes aliases as [`aliases`] reads them.
pub fn format_aliases(aliases: &[IpAddr]) -> String {
    let texts: Vec<_> = aliases.iter().map(ToString::to_string).collect();
    texts.join(",")
}

/// Writes addresses as [`interface_addr`] and [`wireguard_ips`] read them; empty for none.
pub fn format_addrs<'a>(addrs: impl IntoIterator<Item = &'a InterfaceAddr>) -> String {
    let texts: Vec<_> = addrs.into_iter().map(ToString::to_string).collect();
    texts.join(",")
}

/// Reads one prefix that a node or a peer may claim, truncated.
pub fn prefix(text: &str) -> Result<IpNet, Malformed> {
    let net = IpNet::from_str(text)
        .map_err(|_| Malformed("write a prefix with its length, as in 10.6.0.0/24"))?
        .trunc();
    // The shortest prefixes that are ever assigned: an IPv4 /8, an IPv6 /16.
    let shortest = if net.addr().is_ipv4() { 8 } else { 16 };
    if net.prefix_len() < shortest {
        return Err(Malformed("the prefix is too wide to belong to one place"));
    }
    usable(net.addr())?;
    Ok(net)
}

/// Reads seconds between keepalives; 0 is off.
pub fn keepalive(text: &str) -> Result<u16, Malformed> {
    let bad = Malformed("a keepalive is a whole number of seconds from 0 to 65535");
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad);
    }
    text.parse().map_err(|_| bad)
}

/// Reads whether a node may relay.
pub fn relay(text: &str) -> Result<bool, Malformed> {
    match text.trim() {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(Malformed("write \"true\" or \"false\"")),
    }
}

/// Reads the name of a region, trimmed; it may be empty.
pub fn region(text: &str) -> Result<&str, Malformed> {
    let name = text.trim();
    if name.chars().count() > MAX_REGION {
        return Err(Malformed("the name of a region has at most 63 characters"));
    }
    if name.chars().any(char::is_control) {
        return Err(Malformed(
            "the name of a region holds no control characters",
        ));
    }
    Ok(name)
}

/// Reads a granularity; `cross` is an extension of Kilo's values.
pub fn granularity(text: &str) -> Result<Granularity, Malformed> {
    match text {
        "location" => Ok(Granularity::Location),
        "full" => Ok(Granularity::Full),
        "cross" => Ok(Granularity::Cross),
        _ => Err(Malformed("the granularities are location, full and cross")),
    }
}

/// Writes a granularity as [`granularity`] reads it.
pub const fn format_granularity(granularity: Granularity) -> &'static str {
    match granularity {
        Granularity::Location => "location",
        Granularity::Full => "full",
        Granularity::Cross => "cross",
    }
}

/// Reads `candidates`: at most [`MAX_CANDIDATES`] comma-separated addresses with ports; empty means none.
/// Names are refused: candidates are addresses found on the node.
pub fn candidates(text: &str) -> Result<Vec<SocketAddr>, Malformed> {
    let mut read = Vec::new();
    for item in text
        .split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
    {
        let Endpoint::Addr(address) = endpoint(item)? else {
            return Err(Malformed("candidates are addresses with ports, not names"));
        };
        if read.len() == MAX_CANDIDATES {
            return Err(Malformed("a node has at most 8 candidates"));
        }
        if !read.contains(&address) {
            read.push(address);
        }
    }
    Ok(read)
}

/// Writes candidates as [`candidates`] reads them.
pub fn format_candidates(candidates: &[SocketAddr]) -> String {
    let texts: Vec<_> = candidates.iter().map(ToString::to_string).collect();
    texts.join(",")
}

/// A UDP address in the JSON of Go's `net.UDPAddr`.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "PascalCase")]
struct UdpAddr {
    #[serde(rename = "IP")]
    ip: String,
    port: u16,
    #[serde(default)]
    zone: String,
}

/// The value of `discovered-endpoints`, and the number of its malformed entries.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Discovered {
    /// The valid entries.
    pub endpoints: BTreeMap<PublicKey, SocketAddr>,
    /// The number of malformed entries.
    pub skipped: usize,
}

/// Reads `discovered-endpoints`: a JSON object from public key to UDP address; empty means none.
pub fn discovered(text: &str) -> Result<Discovered, Malformed> {
    if text.is_empty() {
        return Ok(Discovered::default());
    }
    let entries: Option<BTreeMap<String, serde_json::Value>> = serde_json::from_str(text)
        .map_err(|_| Malformed("this is not a JSON object of endpoints by public key"))?;
    let entries = entries.unwrap_or_default();
    if entries.len() > MAX_DISCOVERED_ENDPOINTS {
        return Err(Malformed("there are more entries than a mesh has leaders"));
    }

    let mut read = Discovered::default();
    for (key, value) in entries {
        match discovered_entry(&key, value) {
            Some((key, endpoint)) => {
                read.endpoints.insert(key, endpoint);
            }
            None => read.skipped += 1,
        }
    }
    Ok(read)
}

fn discovered_entry(key: &str, value: serde_json::Value) -> Option<(PublicKey, SocketAddr)> {
    let addr: UdpAddr = serde_json::from_value(value).ok()?;
    let ip = address(&addr.ip).ok()?;
    if addr.port == 0 || !addr.zone.is_empty() {
        return None;
    }
    Some((key.parse().ok()?, SocketAddr::new(ip, addr.port)))
}

/// Writes discovered endpoints as [`discovered`] reads them, in Go's order of keys.
pub fn format_discovered(endpoints: &BTreeMap<PublicKey, SocketAddr>) -> String {
    let entries: BTreeMap<_, _> = endpoints
        .iter()
        .map(|(key, endpoint)| {
            let addr = UdpAddr {
                ip: endpoint.ip().to_string(),
                port: endpoint.port(),
                zone: String::new(),
            };
            (key.to_string(), addr)
        })
        .collect();
    serde_json::to_string(&entries).expect("maps of strings and numbers have a JSON form")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_addresses_with_ports_or_names_with_ports() {
        let addr = |text: &str| Endpoint::Addr(text.parse().unwrap());
        assert_eq!(
            endpoint("203.0.113.10:51820"),
            Ok(addr("203.0.113.10:51820"))
        );
        assert_eq!(endpoint("[2001:db8::1]:1"), Ok(addr("[2001:db8::1]:1")));
        assert_eq!(
            endpoint("VPN.Example.com:65535"),
            Ok(Endpoint::Dns {
                host: "vpn.example.com".to_owned(),
                port: 65535
            })
        );
    }

    #[test]
    fn malformed_and_unroutable_endpoints_are_refused() {
        let label = format!("{}.example:1", "a".repeat(64));
        let name = format!("{}com:1", "abcdefghi.".repeat(26));
        for text in [
            "",
            "203.0.113.10",
            ":51820",
            "203.0.113.10:",
            "203.0.113.10:0",
            "203.0.113.10:-1",
            "203.0.113.10:+1",
            "203.0.113.10:65536",
            "203.0.113.10:70000",
            "203.0.113.10: 1",
            "203.0.113.10:51820 ",
            "203.0.113.10:51820\r\n",
            "203.0.113.10:1,203.0.113.11:1",
            "203.0.113.256:1",
            "1.2.3:1",
            "2001:db8::1:51820",
            "[2001:db8::1:51820",
            "[203.0.113.10]:1",
            "[::1%eth0]:1",
            "[fe80::1%1]:1",
            "[::ffff:203.0.113.10]:1",
            "[::]:1",
            "[::1]:1",
            "[fe80::1]:1",
            "[ff02::1]:1",
            "0.0.0.0:1",
            "127.0.0.1:1",
            "169.254.1.1:1",
            "224.0.0.1:1",
            "255.255.255.255:1",
            "-a.example:1",
            "a-.example:1",
            "a..example:1",
            "example.com.:1",
            "ex ample:1",
            "exämple.com:1",
            "host.123:1",
            label.as_str(),
            name.as_str(),
        ] {
            assert!(endpoint(text).is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn endpoints_read_back_as_written() {
        for text in ["203.0.113.10:51820", "[2001:db8::1]:1", "vpn.example.com:7"] {
            assert_eq!(format_endpoint(&endpoint(text).unwrap()), text);
        }
    }

    #[test]
    fn interface_addresses_keep_their_host_bits() {
        assert_eq!(
            interface_addr("192.168.50.11/24").unwrap().to_string(),
            "192.168.50.11/24"
        );
        for text in [
            "192.168.50.11",
            "192.168.50.11/33",
            "192.168.50.11/0",
            "192.168.50.0/24",
            "192.168.50.255/24",
            "127.0.0.1/8",
            "fe80::1/64",
            "-",
            "",
        ] {
            assert!(interface_addr(text).is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn wireguard_addresses_are_at_most_one_a_family() {
        assert_eq!(wireguard_ips(""), Ok(vec![]));
        assert_eq!(wireguard_ips("10.4.0.1/16").unwrap().len(), 1);
        assert_eq!(wireguard_ips("10.4.0.1/16, fd00:4::1/64").unwrap().len(), 2);
        assert!(wireguard_ips("10.4.0.1/16,10.4.0.2/16").is_err());
        assert!(wireguard_ips("10.4.0.0/16").is_err());
        assert!(wireguard_ips("10.4.255.255/16").is_err());
    }

    #[test]
    fn prefixes_are_truncated_and_never_wide() {
        assert_eq!(prefix("10.6.0.7/24").unwrap().to_string(), "10.6.0.0/24");
        assert_eq!(prefix("10.0.0.0/8").unwrap().to_string(), "10.0.0.0/8");
        for text in [
            "0.0.0.0/0",
            "::/0",
            "8.0.0.0/7",
            "2000::/3",
            "224.0.0.0/8",
            "10.6.0.0",
            "",
        ] {
            assert!(prefix(text).is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn keepalives_are_whole_seconds() {
        assert_eq!(keepalive("0"), Ok(0));
        assert_eq!(keepalive("65535"), Ok(65535));
        for text in [
            "",
            "-1",
            "+1",
            "65536",
            "1e3",
            "25s",
            " 25",
            "9223372036854775808",
        ] {
            assert!(keepalive(text).is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn candidates_are_at_most_eight_addresses_with_ports() {
        let text = "203.0.113.10:51820,[2001:db8::1]:51820,192.168.50.11:51820";
        let read = candidates(text).unwrap();
        assert_eq!(read.len(), 3);
        assert_eq!(format_candidates(&read), text);
        assert_eq!(candidates(""), Ok(vec![]));
        let many = |count: u8| {
            let texts: Vec<_> = (1..=count).map(|n| format!("192.0.2.{n}:51820")).collect();
            candidates(&texts.join(",")).map(|read| read.len())
        };
        assert_eq!(many(8), Ok(8));
        assert!(many(9).is_err());
        for text in [
            "vpn.example.com:51820",
            "203.0.113.10",
            "127.0.0.1:1",
            "[fe80::1]:1",
            "x",
        ] {
            assert!(candidates(text).is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn discovered_endpoints_are_go_udp_addresses_by_key() {
        let text = r#"{"jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w=":{"IP":"198.51.100.7","Port":24276,"Zone":""}}"#;
        let read = discovered(text).unwrap();
        assert_eq!(read.skipped, 0);
        assert_eq!(format_discovered(&read.endpoints), text);
        assert_eq!(format_discovered(&BTreeMap::new()), "{}");
    }

    #[test]
    fn a_malformed_entry_of_discovered_endpoints_is_skipped() {
        let read = discovered(
            r#"{"jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w=":{"IP":"198.51.100.7","Port":24276,"Zone":""},
                "short":{"IP":"198.51.100.7","Port":1,"Zone":""},
                "ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs=":{"IP":"127.0.0.1","Port":1}}"#,
        )
        .unwrap();
        assert_eq!(read.endpoints.len(), 1);
        assert_eq!(read.skipped, 2);
    }

    #[test]
    fn discovered_endpoints_other_than_an_object_are_refused() {
        assert_eq!(discovered(""), Ok(Discovered::default()));
        assert_eq!(discovered("null"), Ok(Discovered::default()));
        assert_eq!(discovered("{}"), Ok(Discovered::default()));
        for text in ["{", "[]", "7", "\"text\"", "{\"a\""] {
            assert!(discovered(text).is_err(), "{text:?} was accepted");
        }
    }
}
