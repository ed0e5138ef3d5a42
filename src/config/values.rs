//! Parsers of flag values: Go's booleans and durations, CIDR lists, names of links.
//!
//! A parser's error is a short clause; the caller adds the flag's name.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;

use crate::topology::{Granularity, RegionName, is_public, is_unicast};

/// Go's `strconv.ParseBool`, which parses Kilo's boolean flags.
pub(crate) fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("must be true or false".into()),
    }
}

/// Go's `time.ParseDuration` for whole and fractional numbers with units, such as `1m30s`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "must be a duration such as 30s or 1m30s".to_owned();
    let mut rest = text;
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(wrong)?;
        let (number, tail) = rest.split_at(digits);
        let end = tail
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let number = f64::from_str(number).map_err(|_| wrong())?;
        let seconds = match unit {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(wrong()),
        };
        let part = Duration::try_from_secs_f64(number * seconds).map_err(|_| wrong())?;
        total = total.checked_add(part).ok_or_else(wrong)?;
        rest = tail;
    }
    Ok(total)
}

/// An age of keys of at least a minute.
pub(super) fn key_age(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        age if age < Duration::from_secs(60) => Err("must be at least 1m".into()),
        age => Ok(age),
    }
}

/// An overlap of keys of at least half a minute.
pub(super) fn key_overlap(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        overlap if overlap < Duration::from_secs(30) => Err("must be at least 30s".into()),
        overlap => Ok(overlap),
    }
}

/// `--resync-period`: 1 s to 24 h.
pub(crate) fn resync_period(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        period if period < Duration::from_secs(1) => Err("must be at least 1s".into()),
        period if period > Duration::from_secs(86_400) => Err("must be at most 24h".into()),
        period => Ok(period),
    }
}

/// A UDP port. The error is Kilo's without its misspelling.
pub(crate) fn port(text: &str) -> Result<u16, String> {
    match u16::from_str(text) {
        Ok(port) if port != 0 => Ok(port),
        Ok(_) | Err(_) => Err("must be a port in the range 1 to 65535".into()),
    }
}

/// `--mtu`: `auto`, or the MTU of the tunnel's link.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mtu {
    /// The MTU of the link that leads to the other regions, without the tunnel's overhead, and at most
    /// 1,420 bytes: the path beyond the link is not known.
    Auto,
    /// So many bytes.
    Bytes(u32),
}

impl FromStr for Mtu {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, u32::from_str(text)) {
            ("auto", _) => Ok(Self::Auto),
            // Every IPv4 host must accept 576 (RFC 791); a UDP datagram cannot hold more than the maximum.
            (_, Ok(bytes @ 576..=65_455)) => Ok(Self::Bytes(bytes)),
            _ => Err("must be auto or a number of bytes in the range 576 to 65455".into()),
        }
    }
}

/// CIDRs, separated by commas; host bits are masked as Kilo masks them.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Cidrs(pub(super) Vec<IpNet>);

impl FromStr for Cidrs {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split(',')
            .map(str::trim)
            .filter(|item| !item.is_empty())
            .map(|item| match item.parse::<IpNet>() {
                Ok(net) => Ok(net.trunc()),
                Err(_) => Err(format!("{item:?} is not a CIDR such as 10.43.0.0/16")),
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

/// `--region-cidr`: the networks of a region, as `REGION=CIDR[,CIDR]`. Several regions on one line are
/// separated by commas too, as the environment and the file of `--config` write lists.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RegionCidrs(Vec<(RegionName, Vec<IpNet>)>);

/// The networks of all values of a repeatable flag, by region.
pub(crate) fn region_networks(lists: Vec<RegionCidrs>) -> BTreeMap<RegionName, Vec<IpNet>> {
    let mut networks = BTreeMap::<_, Vec<_>>::new();
    for (region, nets) in lists.into_iter().flat_map(|RegionCidrs(regions)| regions) {
        networks.entry(region).or_default().extend(nets);
    }
    networks
}

impl FromStr for RegionCidrs {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut regions = Vec::<(RegionName, Vec<IpNet>)>::new();
        for item in text
            .split(',')
            .map(str::trim)
            .filter(|item| !item.is_empty())
        {
            let cidrs = match item.rsplit_once('=') {
                Some((region, cidr)) => {
                    regions.push((RegionName(region.trim().to_owned()), Vec::new()));
                    cidr
                }
                None => item,
            };
            let Some((_, networks)) = regions.last_mut() else {
                return Err(
                    "must name the region before its networks, as in nd=192.168.50.0/24".into(),
                );
            };
            let Cidrs(nets) = cidrs.parse()?;
            networks.extend(nets);
        }
        if regions.iter().any(|(_, networks)| networks.is_empty()) {
            return Err(
                "must name the networks behind the region, as in nd=192.168.50.0/24".into(),
            );
        }
        let bad = |net: &&IpNet| net.prefix_len() == 0 || !is_unicast(net.network());
        if regions
            .iter()
            .flat_map(|(_, networks)| networks)
            .any(|net| bad(&net))
        {
            return Err("must name networks of unicast addresses".into());
        }
        Ok(Self(regions))
    }
}

/// `--subnet`: the pools of WireGuard addresses, at most one of each family.
pub(super) fn pools(text: &str) -> Result<Cidrs, String> {
    pools_for(text, "an address for each region")
}

/// `--alias-cidr`: the pools of aliases, at most one of each family.
pub(super) fn alias_pools(text: &str) -> Result<Cidrs, String> {
    let Cidrs(pools) = pools_for(text, "an address for each node that needs an alias")?;
    // A public address of a node's status is taken for the endpoint of its tunnel.
    if pools.iter().any(|pool| is_public(pool.network())) {
        return Err("must be a private network, of RFC 1918, RFC 6598 or RFC 4193".into());
    }
    Ok(Cidrs(pools))
}

fn pools_for(text: &str, what: &str) -> Result<Cidrs, String> {
    let Cidrs(pools) = text.parse::<Cidrs>()?;
    let of_family = |v6| {
        pools
            .iter()
            .filter(|net| net.addr().is_ipv6() == v6)
            .count()
    };
    if pools.is_empty() || of_family(false) > 1 || of_family(true) > 1 {
        return Err("must be one CIDR, or one of each family separated by a comma".into());
    }
    for pool in &pools {
        if pool.max_prefix_len() - pool.prefix_len() < 2 {
            return Err(format!("is too small: it must hold {what}"));
        }
        if pool.prefix_len() == 0 || !is_unicast(pool.network()) {
            return Err("is not a network of unicast addresses".into());
        }
    }
    Ok(Cidrs(pools))
}

/// `--master`: an HTTP or HTTPS URL; empty, Kilo's default, means none.
pub(super) fn master(text: &str) -> Result<String, String> {
    let valid = text.parse::<http::Uri>().is_ok_and(|url| {
        matches!(url.scheme_str(), Some("https" | "http"))
            && url.host().is_some_and(|host| !host.is_empty())
    });
    if text.is_empty() || valid {
        Ok(text.into())
    } else {
        Err("must be a URL such as https://10.0.0.1:6443".into())
    }
}

/// The key of a Node's label: a name of at most 63 characters, with an optional prefix of a DNS subdomain and a slash.
pub(crate) fn label_key(text: &str) -> Result<String, String> {
    let (prefix, name) = match text.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, text),
    };
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let is_name = name.len() <= 63
        && edge(name.chars().next())
        && edge(name.chars().last())
        && name.chars().all(inside);
    if is_name && prefix.is_none_or(|prefix| node_name(prefix).is_ok()) {
        Ok(text.into())
    } else {
        Err("must be the key of a Node label, such as topology.kubernetes.io/region".into())
    }
}

/// The name of a link that the kernel accepts (`dev_valid_name`).
pub(crate) fn link_name(text: &str) -> Result<String, String> {
    let valid = !text.is_empty()
        && text.len() <= 15
        && text != "."
        && text != ".."
        && text
            .chars()
            .all(|c| c.is_ascii_graphic() && c != '/' && c != ':');
    if valid {
        Ok(text.into())
    } else {
        Err("must be a link name of 1 to 15 letters, digits, dots or dashes".into())
    }
}

/// A Node's name: a DNS subdomain (RFC 1123), as the API server demands.
pub(super) fn node_name(text: &str) -> Result<String, String> {
    let label = |label: &str| {
        let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        edge(label.chars().next())
            && edge(label.chars().last())
            && label
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
    };
    if text.len() <= 253 && text.split('.').all(label) {
        Ok(text.into())
    } else {
        Err("must be the name of a Kubernetes Node, in lower case".into())
    }
}

/// `--mesh-granularity`.
pub(super) fn granularity(text: &str) -> Result<Granularity, String> {
    match text {
        "location" => Ok(Granularity::Location),
        "full" => Ok(Granularity::Full),
        "cross" => Ok(Granularity::Cross),
        _ => Err("unknown; possible values are: location, full, cross".into()),
    }
}

/// The address of the HTTP pages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Listen {
    /// One address.
    Address(SocketAddr),
    /// Every address of this node, of both families (Kilo's `:1107`).
    Everywhere(u16),
    /// No pages (an empty value).
    Off,
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "must be ADDRESS:PORT, such as 127.0.0.1:1107, or :PORT".to_owned();
        if text.is_empty() {
            return Ok(Self::Off);
        }
        if let Some(port) = text.strip_prefix(':') {
            return self::port(port).map(Self::Everywhere).map_err(|_| wrong());
        }
        let text = text
            .strip_prefix("localhost:")
            .map_or_else(|| text.to_owned(), |port| format!("127.0.0.1:{port}"));
        match text.parse::<SocketAddr>() {
            Ok(address) if address.port() != 0 => Ok(Self::Address(address)),
            Ok(_) | Err(_) => Err(wrong()),
        }
    }
}

impl Listen {
    /// The addresses to try in order; the first that can be bound is used.
    pub fn addresses(self) -> Vec<SocketAddr> {
        match self {
            Self::Address(address) => vec![address],
            // A host without IPv6 refuses the first.
            Self::Everywhere(port) => vec![
                SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port),
                SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port),
            ],
            Self::Off => Vec::new(),
        }
    }
}

/// `--rule-priority`: the first of the agent's rules; all of them come before Tailscale's at 5210
/// and before `main` at 32766.
pub(super) fn rule_priority(text: &str) -> Result<u32, String> {
    match u32::from_str(text) {
        Ok(priority @ 1..=5204) => Ok(priority),
        Ok(_) | Err(_) => Err("must be a number in the range 1 to 5204".into()),
    }
}

/// `--fwmark`: a whole mark, without the bits that other programs use.
pub(super) fn fwmark(text: &str) -> Result<u32, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => u32::from_str(text),
    };
    match parsed {
        Ok(0) | Err(_) => Err("must be a number other than 0, such as 0x51e00000".into()),
        // kube-proxy's masquerade and drop bits: kube-proxy would act on the tunnel's own datagrams.
        Ok(mark) if mark & 0xc000 != 0 => {
            Err("must not contain 0x4000 or 0x8000, which kube-proxy acts on".into())
        }
        Ok(mark) => Ok(mark),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_gos_format() {
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("1.5h"), Ok(Duration::from_secs(5400)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        for wrong in ["", "30", "s", "-1s", "1d", "1..2s", "9e99h", "1s "] {
            assert!(duration(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn cidr_lists_lose_host_bits_and_keep_their_order() {
        let Cidrs(list) = "10.43.0.1/16, fd00::1/64,".parse().unwrap();
        assert_eq!(
            list,
            ["10.43.0.0/16", "fd00::/64"].map(|n| n.parse().unwrap())
        );
        assert!("10.43.0.0".parse::<Cidrs>().is_err());
        assert!("10.43.0.0/33".parse::<Cidrs>().is_err());
    }

    #[test]
    fn networks_of_regions_follow_their_names() {
        let read = |text: &str| {
            let RegionCidrs(regions) = text.parse::<RegionCidrs>()?;
            let shown = regions
                .iter()
                .map(|(region, nets)| format!("{region} {nets:?}"));
            Ok::<_, String>(shown.collect::<Vec<_>>())
        };
        assert_eq!(
            read("nd=192.168.50.1/24,192.168.51.0/24").unwrap(),
            ["nd [192.168.50.0/24, 192.168.51.0/24]"]
        );
        assert_eq!(
            read("nd=192.168.50.0/24, third=10.0.0.0/8,fd00::/8").unwrap(),
            ["nd [192.168.50.0/24]", "third [10.0.0.0/8, fd00::/8]"]
        );
        // Nodes without a label form a region too.
        assert_eq!(read("=10.0.0.0/8").unwrap(), [" [10.0.0.0/8]"]);
        for wrong in [
            "192.168.50.0/24",
            "nd=",
            "nd=192.168.50.0",
            "nd=0.0.0.0/0",
            "nd=224.0.0.0/8",
        ] {
            assert!(read(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_port_alone_listens_on_both_families() {
        let listen = ":1107".parse::<Listen>().unwrap();
        assert_eq!(listen, Listen::Everywhere(1107));
        assert_eq!(listen.addresses().len(), 2);
        assert_eq!("".parse::<Listen>(), Ok(Listen::Off));
        for wrong in [
            "1107",
            ":0",
            "127.0.0.1",
            "127.0.0.1:65536",
            "example.com:80",
        ] {
            assert!(wrong.parse::<Listen>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn marks_that_kube_proxy_reads_are_refused() {
        assert_eq!(fwmark("0x51e00000"), Ok(0x51e0_0000));
        assert!(
            fwmark("0xca6c").is_err(),
            "wg-quick's mark holds kube-proxy's bits"
        );
        assert!(fwmark("0").is_err());
    }

    #[test]
    fn link_names_follow_the_kernels_rules() {
        assert!(link_name("kilo0").is_ok());
        for wrong in [
            "",
            "..",
            "a/b",
            "sixteen-letters-",
            "with space",
            "with:colon",
        ] {
            assert!(link_name(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn node_names_are_dns_subdomains() {
        assert!(node_name("node-agent-01.example.com").is_ok());
        for wrong in ["", "Node", "-a", "a-", "a..b", "a_b", &"a".repeat(254)] {
            assert!(node_name(wrong).is_err(), "{wrong:?}");
        }
    }
}
