//! The state of a node under Kilo's agent, as an operator sees it, and Selvedge's counterpart of each line.
//!
//! Kilo's lines are worked out by hand from its rules. [`Node::ours`] translates them line by line and collects the
//! [`Difference`]s. Each scenario lists those it expects, so a new one and a missing one are both noticed.

use std::collections::{BTreeMap, BTreeSet};

use selvedge::agent::publication;
use selvedge::state::{Scope, State};
use selvedge::topology::{Ledger, NodeName, OtherKeys};

use super::Mesh;

/// The differences of our routes, rules and addresses from Kilo's, with their reasons.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Difference {
    /// Routes are in own tables, with an own protocol number: in table main flannel replaces routes when it
    /// restarts, and after Kilo's clean-up they are missing.
    OwnTables,
    /// The source is the node's address in the cluster network, which every node routes, and not its
    /// private one, which two regions may both have.
    ClusterSource,
    /// Routes carry the tunnel's MTU, so that senders do not depend on ICMP from the leader.
    Mtu,
    /// Each route to another region has an `unreachable` backstop: no packet falls through to flannel's route, which
    /// would send it in clear.
    Backstop,
    /// The own pods have a `throw` route: no wider claim of another node takes them.
    OwnPodsStay,
    /// The cluster network is `unreachable`, with a `throw` for the region's other pods: packets for a deleted Node
    /// are refused and do not use the default route.
    NetworkEnds,
    /// Each existing WireGuard address has a route, instead of the whole pool on the link. The own one is a /32 in
    /// scope `link`.
    OneRoutePerAddress,
    /// Members' hosts are selected by one rule for the link, and not by one per address.
    OneRuleForMembers,
    /// Our rules have other priorities. They keep the tunnel's datagrams out of the tunnel and distinguish pods
    /// from the host.
    FixedRules,
    /// An address that is a tunnel's endpoint is carried for pods from the start, and left to the host
    /// itself. Kilo does not carry it until a node has observed that node at another endpoint.
    EndpointForPods,
}

/// A node with its state under Kilo.
pub(crate) struct Node<'a> {
    /// Its name.
    pub(crate) name: &'a str,
    /// The first address of its pod CIDR.
    pub(crate) cluster_address: &'a str,
    /// The WireGuard addresses of all leaders but its own.
    pub(crate) others: &'a [&'a str],
    /// The pod CIDRs of the other nodes of its region.
    pub(crate) region_pods: &'a [&'a str],
    /// Kilo's routes and rules, as `ip route`, `ip route show table 1107` (with `table 1107` before each
    /// line) and `ip rule` print them.
    pub(crate) kilo: &'a str,
    /// Addresses that Kilo leaves out because they are endpoints, with the next hop they would have.
    pub(crate) endpoints: &'a [(&'a str, &'a str)],
}

/// A route's line in one of our tables.
fn route(table: u32, line: &str) -> String {
    format!("ip route replace table {table} {line} proto 118")
}

impl Node<'_> {
    /// Our routes, rules and addresses, and the differences that they have from Kilo's.
    pub(crate) fn ours(&self) -> (BTreeSet<String>, BTreeSet<Difference>) {
        let mut lines = BTreeSet::new();
        let mut seen = BTreeSet::from([
            Difference::FixedRules,
            Difference::OwnPodsStay,
            Difference::NetworkEnds,
        ]);
        let own_pods = format!("{}/24", self.cluster_address);
        lines.insert(route(5130, &format!("throw {own_pods}")));
        for net in self.region_pods {
            lines.insert(route(5130, &format!("throw {net}")));
        }
        lines.insert(route(5130, "unreachable 10.42.0.0/16 metric 4278198272"));
        lines.insert("ip rule add pref 5191 from 10.42.0.0/16 lookup 5131 proto 118".into());
        lines.insert(
            "ip rule add pref 5192 not from all fwmark 0x51e00000 lookup 5130 proto 118".into(),
        );

        let source = self.cluster_address;
        let mut remote = |table, destination: &str, way: &str| {
            seen.extend([
                Difference::OwnTables,
                Difference::ClusterSource,
                Difference::Mtu,
                Difference::Backstop,
            ]);
            let line = format!("{destination} {way} src {source} mtu 1420");
            lines.insert(route(table, &line));
            let backstop = format!("unreachable {destination} metric 4278198272");
            lines.insert(route(table, &backstop));
        };
        let mut own = BTreeSet::new();
        let mut more = BTreeSet::new();
        for line in self
            .kilo
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
        {
            let words: Vec<_> = line.split_whitespace().collect();
            match words[..] {
                [
                    "10.4.0.0/16",
                    "dev",
                    "kilo0",
                    "proto",
                    "kernel",
                    "scope",
                    "link",
                    "src",
                    address,
                ] => {
                    for other in self.others {
                        remote(5130, other, "dev kilo0");
                    }
                    own.insert(format!("ip addr add {address}/32 dev kilo0 scope link"));
                    own.insert(format!("ip addr add {source}/32 dev kilo0"));
                    more.insert(Difference::OneRoutePerAddress);
                }
                [
                    destination,
                    "via",
                    hop,
                    "dev",
                    dev,
                    "proto",
                    "static",
                    "src",
                    _,
                    "onlink",
                ] => {
                    remote(5130, destination, &format!("via {hop} dev {dev} onlink"));
                }
                [destination, "dev", "kilo0", "proto", "static", "src", _] => {
                    remote(5130, destination, "dev kilo0");
                }
                [
                    "table",
                    "1107",
                    destination,
                    "via",
                    hop,
                    "dev",
                    dev,
                    "proto",
                    "static",
                    "onlink",
                ] => {
                    own.insert(route(
                        5132,
                        &format!("{destination} via {hop} dev {dev} onlink"),
                    ));
                }
                ["from", "all", "to", _, "iif", "kilo0", "lookup", "1107"] => {
                    own.insert(
                        "ip rule add pref 5190 from all iif kilo0 lookup 5132 proto 118".into(),
                    );
                    more.insert(Difference::OneRuleForMembers);
                }
                _ => panic!("{}: what does Kilo mean by {line:?}?", self.name),
            }
        }
        for (address, way) in self.endpoints {
            remote(5131, address, way);
            more.insert(Difference::EndpointForPods);
        }
        lines.extend(own);
        seen.extend(more);
        (lines, seen)
    }

    /// Expects that the plan for the node is Kilo's with these differences and no other.
    pub(crate) fn check(&self, mesh: &Mesh, expected: &[Difference]) {
        let (lines, differences) = self.ours();
        let wanted = ["ip route", "ip rule", "ip addr"];
        let planned = mesh.commands_of(self.name, &wanted);
        let planned: BTreeSet<_> = planned.lines().map(str::to_owned).collect();
        assert_eq!(planned, lines, "{}", self.name);
        let expected: BTreeSet<_> = expected.iter().copied().collect();
        assert_eq!(differences, expected, "{}", self.name);
    }
}

/// The tunnel as `wg showconf` prints it, but for the private key.
pub(crate) fn wireguard(state: &State, names: &BTreeMap<String, &str>) -> String {
    let mut text = String::new();
    if let Some(port) = state.listen_port {
        text += &format!("listen {port}\n");
    }
    for (address, scope) in &state.addresses {
        if *scope == Scope::Link {
            text += &format!("address {address}\n");
        }
    }
    let mut peers: Vec<_> = state.peers.values().collect();
    peers.sort_by_key(|peer| names.get(&peer.public_key.to_string()).copied());
    for peer in peers {
        let key = peer.public_key.to_string();
        let endpoint = peer
            .endpoint
            .map_or_else(|| "nowhere".to_owned(), |at| at.to_string());
        let keepalive = peer.persistent_keepalive.map_or(0, u16::from);
        let secret = if peer.preshared_key.is_some() {
            " psk"
        } else {
            ""
        };
        let nets: Vec<_> = peer.allowed_ips().map(ToString::to_string).collect();
        let name = names.get(&key).copied().unwrap_or(&key);
        text += &format!(
            "{name} at {endpoint} every {keepalive}{secret}: {}\n",
            nets.join(" ")
        );
    }
    text
}

/// The annotations that a node's agent publishes after it received from these peers: `key: value` lines.
pub(crate) fn annotations(
    mesh: &Mesh,
    me: &str,
    heard: &[(selvedge::wireguard::key::PublicKey, &str)],
) -> String {
    let topology = mesh.topology();
    let node = &mesh.snapshot.nodes[&NodeName(me.into())];
    let heard = heard.iter().map(|(key, at)| (*key, at.parse().unwrap()));
    let config = selvedge::config::Config::from_args([format!("--hostname={me}").as_str()]);
    let published = publication::annotations(&publication::Inputs {
        node,
        snapshot: &mesh.snapshot,
        topology: &topology,
        config: &config.unwrap(),
        links: node.private_ip.as_slice(),
        offered: &[],
        port: 51820,
        public_key: node.public_key.unwrap(),
        other_keys: OtherKeys::default(),
        heard: &heard.collect(),
        last_seen: 1_000,
        server_time: None,
        pending: &Ledger::default(),
        lead: None,
    });
    // The ledger holds only times. Its own tests cover it.
    let lines = published
        .into_iter()
        .filter(|(key, _)| *key != selvedge::cluster::annotation::SINCE)
        .map(|(key, value)| format!("{key}: {value}\n"));
    lines.collect()
}

/// The same cluster with a real `kg` on one node: Kilo's algorithm, rule by rule.
pub(crate) fn with_a_real_kilo(mut mesh: Mesh, node: &str) -> Mesh {
    mesh.now = 1_000;
    for node in mesh.snapshot.nodes.values_mut() {
        node.last_seen = Some(990);
    }
    mesh.node(node).ours = false;
    mesh
}
