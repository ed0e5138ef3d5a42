//! `selvedge showconf`: the WireGuard configuration of a node or peer, in Kilo's form.
//!
//! Pure: a [`Topology`] in, text out. Unlike in Kilo, keepalives are in seconds, names are not resolved, a peer
//! without an endpoint has none, the listening port is the node's own, and a node that does not lead is an
//! error.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use ipnet::IpNet;
use serde::Serialize;

use crate::cluster::peer::{API_VERSION, DnsOrIp, PeerEndpoint, PeerSpec};
use crate::topology::{Endpoint, ExternalPeer, Leader, NodeName, Object, Segment, Topology};
use crate::wireguard::key::{PresharedKey, PublicKey};

mod command;

pub use command::{Args, run};

/// `--output`. JSON and YAML are `Peer` objects, to be applied to another cluster.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Output {
    /// The file that `wg setconf` reads.
    #[default]
    Wireguard,
    /// A `Peer` object.
    Json,
    /// A `Peer` object.
    Yaml,
}

impl FromStr for Output {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "wireguard" => Ok(Self::Wireguard),
            "json" => Ok(Self::Json),
            "yaml" => Ok(Self::Yaml),
            _ => Err("unknown; possible values are: json, wireguard, yaml".into()),
        }
    }
}

/// The options of the output.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Shape {
    /// `--as-peer`: what another WireGuard device needs to have the node or peer as its peer.
    pub as_peer: bool,
    /// `--output`; with [`Self::as_peer`] only.
    pub output: Output,
    /// `--allowed-ips`: further prefixes behind the node or peer; with [`Self::as_peer`] only.
    pub allowed_ips: Vec<IpNet>,
    /// `--port`: instead of the port that the node's endpoint has.
    pub listen_port: Option<u16>,
}

/// The reason for which there is nothing to show.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum NothingToShow {
    /// No node takes part.
    #[error("did not find any valid Kilo nodes in the cluster")]
    NoNodes,
    /// There is no such Node.
    #[error("did not find any node named {:?} in the cluster", .0.0)]
    NoSuchNode(NodeName),
    /// The Node exists but takes no part in the mesh.
    #[error("node {:?} is not in the mesh: see selvedge graph --format text", .0.0)]
    NotInTheMesh(NodeName),
    /// Another node carries its traffic.
    #[error("Node {:?} is not a leader node; {:?} leads {segment}", node.0, leader.0)]
    NotALeader {
        /// The requested node.
        node: NodeName,
        /// The leader.
        leader: NodeName,
        /// The segment that it leads.
        segment: String,
    },
    /// There is no such Peer, or it was refused.
    #[error("did not find any peer named {0:?} in the cluster")]
    NoSuchPeer(String),
}

/// Renders the configuration of a node or peer.
///
/// # Errors
///
/// When the node or peer has no configuration of its own.
pub fn showconf(
    topology: &Topology,
    object: &Object,
    shape: &Shape,
) -> Result<String, NothingToShow> {
    if topology.segments.is_empty() {
        return Err(NothingToShow::NoNodes);
    }
    match object {
        Object::Node(name) => {
            let (segment, leader) = led_by(topology, name)?;
            Ok(match shape.as_peer {
                true => as_peer(&name.0, Section::of_leader_itself(segment, leader), shape),
                false => {
                    let port = shape.listen_port;
                    Configuration::of_leader(topology, segment, leader, port).to_string()
                }
            })
        }
        Object::Peer(name) => {
            let peer = topology.peers.iter().find(|peer| peer.name == *name);
            let peer = peer.ok_or_else(|| NothingToShow::NoSuchPeer(name.clone()))?;
            Ok(match shape.as_peer {
                true => as_peer(name, Section::of_peer_itself(peer), shape),
                false => Configuration::of_peer(topology, peer).to_string(),
            })
        }
    }
}

fn led_by<'a>(
    topology: &'a Topology,
    name: &NodeName,
) -> Result<(&'a Segment, &'a Leader), NothingToShow> {
    let Some(segment) = topology.segment_of(name) else {
        let known = topology.outsiders.iter().any(|node| node.name == *name);
        return Err(match known {
            true => NothingToShow::NotInTheMesh(name.clone()),
            false => NothingToShow::NoSuchNode(name.clone()),
        });
    };
    match segment.leader(name) {
        Some(leader) => Ok((segment, leader)),
        None => Err(NothingToShow::NotALeader {
            node: name.clone(),
            leader: segment.primary().node.clone(),
            segment: segment.name.to_string(),
        }),
    }
}

/// A whole configuration, displayed as `wg setconf` reads it. It holds no private key, which never leaves its
/// node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Configuration {
    /// The listening port; `None` leaves the `[Interface]` section out.
    pub listen_port: Option<u16>,
    /// The peers, in Kilo's order.
    pub peers: Vec<Section>,
}

/// One `[Peer]`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Section {
    /// In Kilo's order, see [`crate::topology::Segment::allowed_ips`].
    pub allowed_ips: Vec<IpNet>,
    /// A name is not resolved.
    pub endpoint: Option<Endpoint>,
    /// Seconds; 0 is off.
    pub persistent_keepalive: u16,
    /// The preshared key.
    pub preshared_key: Option<PresharedKey>,
    /// The public key.
    pub public_key: PublicKey,
}

impl Configuration {
    /// What a leader's device has: the segments of the other groups, then the external peers.
    pub fn of_leader(
        topology: &Topology,
        segment: &Segment,
        own: &Leader,
        listen_port: Option<u16>,
    ) -> Self {
        let keepalive = own.persistent_keepalive;
        let segments = topology
            .segments
            .iter()
            .filter(|other| other.group != segment.group)
            .flat_map(|other| Section::of_leaders(other, keepalive));
        let peers = topology.peers.iter().map(|peer| Section {
            persistent_keepalive: keepalive,
            ..Section::of_peer(topology, peer)
        });
        let own_port = own.endpoint.as_ref().map(|endpoint| match endpoint {
            Endpoint::Addr(address) => address.port(),
            Endpoint::Dns { port, .. } => *port,
        });
        Self {
            listen_port: listen_port.or(own_port).or(Some(51820)),
            peers: segments.chain(peers).collect(),
        }
    }

    /// What an external peer must load: all segments, then the other peers.
    pub fn of_peer(topology: &Topology, own: &ExternalPeer) -> Self {
        let keepalive = own.persistent_keepalive;
        let segments = topology.segments.iter().map(|segment| Section {
            preshared_key: own.preshared_key.clone(),
            ..Section::of_segment(segment, keepalive)
        });
        let others = topology
            .peers
            .iter()
            .filter(|peer| peer.name != own.name)
            .map(|peer| Section {
                persistent_keepalive: keepalive,
                // That peer and the mesh share it. Other peers must not know it.
                preshared_key: None,
                ..Section::of_peer(topology, peer)
            });
        Self {
            listen_port: None,
            peers: segments.chain(others).collect(),
        }
    }
}

impl Section {
    /// A segment as external peers reach it at the moment, through its primary.
    fn of_segment(segment: &Segment, keepalive: u16) -> Self {
        let leader = segment.primary();
        Self::of_leader(leader, segment.allowed_ips().collect(), keepalive)
    }

    /// A segment as leaders of other segments reach it, through all of its leaders. A WireGuard configuration has one
    /// peer for each destination, so what the leaders share stands at the primary.
    fn of_leaders(segment: &Segment, keepalive: u16) -> impl Iterator<Item = Self> + '_ {
        let all = segment.leaders.iter().collect::<Vec<_>>();
        let mut taken = BTreeSet::new();
        segment.leaders.iter().map(move |leader| {
            let nets = segment.routes_to(leader, &all, &all);
            let nets = nets.filter(|net| !taken.contains(net)).collect::<Vec<_>>();
            taken.extend(nets.iter().copied());
            Self::of_leader(leader, nets, keepalive)
        })
    }

    /// A leader as others reach it at the moment.
    fn of_leader(leader: &Leader, allowed_ips: Vec<IpNet>, keepalive: u16) -> Self {
        let seen = leader
            .discovered
            .filter(|seen| leader.address != Some(*seen));
        Self {
            allowed_ips,
            endpoint: seen.map(Endpoint::Addr).or_else(|| leader.endpoint.clone()),
            persistent_keepalive: keepalive,
            preshared_key: None,
            public_key: leader.public_key(),
        }
    }

    /// A leader as it describes itself, without the address at which others observe it. All of its segment
    /// is behind it.
    fn of_leader_itself(segment: &Segment, leader: &Leader) -> Self {
        Self {
            allowed_ips: segment.node_allowed_ips().collect(),
            endpoint: leader.endpoint.clone(),
            persistent_keepalive: 0,
            preshared_key: None,
            public_key: leader.public_key(),
        }
    }

    /// A peer as the mesh reaches it at the moment.
    fn of_peer(topology: &Topology, peer: &ExternalPeer) -> Self {
        let seen = topology
            .peer_addresses
            .get(&peer.public_key)
            .and_then(|place| {
                place
                    .discovered
                    .filter(|_| place.address != place.discovered)
            });
        Self {
            endpoint: seen.map(Endpoint::Addr).or_else(|| peer.endpoint.clone()),
            ..Self::of_peer_itself(peer)
        }
    }

    fn of_peer_itself(peer: &ExternalPeer) -> Self {
        Self {
            allowed_ips: peer.allowed_ips.clone(),
            endpoint: peer.endpoint.clone(),
            persistent_keepalive: peer.persistent_keepalive,
            preshared_key: peer.preshared_key.clone(),
            public_key: peer.public_key,
        }
    }
}

impl fmt::Display for Configuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        if let Some(port) = self.listen_port {
            write!(f, "[Interface]\nListenPort = {port}\n")?;
            first = false;
        }
        for peer in &self.peers {
            if !first {
                writeln!(f)?;
            }
            first = false;
            write!(f, "{peer}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "[Peer]")?;
        if !self.allowed_ips.is_empty() {
            let nets: Vec<_> = self.allowed_ips.iter().map(IpNet::to_string).collect();
            writeln!(f, "AllowedIPs = {}", nets.join(", "))?;
        }
        if let Some(endpoint) = &self.endpoint {
            writeln!(f, "Endpoint = {endpoint}")?;
        }
        writeln!(f, "PersistentKeepalive = {}", self.persistent_keepalive)?;
        if let Some(key) = &self.preshared_key {
            writeln!(f, "PresharedKey = {}", *key.to_base64())?;
        }
        writeln!(f, "PublicKey = {}", self.public_key)
    }
}

fn as_peer(name: &str, mut section: Section, shape: &Shape) -> String {
    for net in &shape.allowed_ips {
        if !section.allowed_ips.contains(net) {
            section.allowed_ips.push(*net);
        }
    }
    match shape.output {
        Output::Wireguard => section.to_string(),
        // Without a line break at the end, as Kilo's.
        Output::Json => serde_json::to_string_pretty(&PeerObject::new(name, &section))
            .expect("strings and numbers have a JSON form"),
        Output::Yaml => yaml(name, &section),
    }
}

/// A `Peer` object in Kilo's order of keys.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PeerObject<'a> {
    kind: &'static str,
    api_version: &'static str,
    metadata: Metadata<'a>,
    spec: PeerSpec,
}

#[derive(Serialize)]
struct Metadata<'a> {
    name: &'a str,
}

impl<'a> PeerObject<'a> {
    fn new(name: &'a str, section: &Section) -> Self {
        Self {
            kind: "Peer",
            api_version: API_VERSION,
            metadata: Metadata { name },
            spec: section.to_spec(),
        }
    }
}

impl Section {
    /// The specification of a `Peer` object with the same meaning.
    pub fn to_spec(&self) -> PeerSpec {
        let keepalive = self.persistent_keepalive;
        PeerSpec {
            allowed_ips: self.allowed_ips.iter().map(IpNet::to_string).collect(),
            endpoint: self.endpoint.as_ref().map(|endpoint| match endpoint {
                Endpoint::Addr(address) => PeerEndpoint {
                    dns_or_ip: DnsOrIp {
                        dns: None,
                        ip: Some(address.ip().to_string()),
                    },
                    port: address.port().into(),
                },
                Endpoint::Dns { host, port } => PeerEndpoint {
                    dns_or_ip: DnsOrIp {
                        dns: Some(host.clone()),
                        ip: None,
                    },
                    port: (*port).into(),
                },
            }),
            persistent_keepalive: (keepalive != 0).then_some(keepalive.into()),
            preshared_key: self
                .preshared_key
                .as_ref()
                .map(|key| key.to_base64().to_string()),
            public_key: self.public_key.to_string(),
        }
    }
}

/// The same object as YAML. Its values are names, prefixes, numbers and base64. Only a name that looks like a
/// number needs quotes.
fn yaml(name: &str, section: &Section) -> String {
    let spec = section.to_spec();
    let mut lines = vec![
        format!("apiVersion: {API_VERSION}"),
        "kind: Peer".to_owned(),
        "metadata:".to_owned(),
        format!("  name: {}", scalar(name)),
        "spec:".to_owned(),
    ];
    match spec.allowed_ips.is_empty() {
        true => lines.push("  allowedIPs: []".to_owned()),
        false => lines.push("  allowedIPs:".to_owned()),
    }
    lines.extend(
        spec.allowed_ips
            .iter()
            .map(|net| format!("  - {}", scalar(net))),
    );
    if let Some(endpoint) = &spec.endpoint {
        lines.extend(["  endpoint:".to_owned(), "    dnsOrIP:".to_owned()]);
        let DnsOrIp { dns, ip } = &endpoint.dns_or_ip;
        lines.extend(dns.iter().map(|dns| format!("      dns: {}", scalar(dns))));
        lines.extend(ip.iter().map(|ip| format!("      ip: {}", scalar(ip))));
        lines.push(format!("    port: {}", endpoint.port));
    }
    let keepalive = spec.persistent_keepalive.iter();
    lines.extend(keepalive.map(|seconds| format!("  persistentKeepalive: {seconds}")));
    let key = spec.preshared_key.iter();
    lines.extend(key.map(|key| format!("  presharedKey: {key}")));
    lines.push(format!("  publicKey: {}", spec.public_key));
    lines.join("\n") + "\n"
}

/// A YAML scalar that parsers read as the same string, without quotes where possible.
fn scalar(text: &str) -> String {
    let plain = text
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b".-/:".contains(&b))
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && !text.ends_with(':');
    let keyword = ["true", "false", "null", "yes", "no", "on", "off", "y", "n"]
        .contains(&text.to_ascii_lowercase().as_str());
    if plain && !keyword && !is_yaml_number(text) {
        text.to_owned()
    } else {
        // JSON strings are YAML strings.
        serde_json::Value::from(text).to_string()
    }
}

/// Whether YAML 1.1 might take a word for a number (also in base 60) or a date.
fn is_yaml_number(text: &str) -> bool {
    let only = |chars: &[u8]| {
        text.bytes()
            .all(|b| b.is_ascii_digit() || chars.contains(&b))
    };
    let dots = text.bytes().filter(|b| *b == b'.').count();
    text.starts_with(|c: char| c.is_ascii_digit())
        && (only(b":") || (dots <= 1 && only(b".-eExXoOaAbBcCdDfF")))
}

#[cfg(test)]
mod tests;
