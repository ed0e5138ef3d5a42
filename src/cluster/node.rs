//! A Node object → [`Node`] of the mesh: parse, don't validate.
//!
//! A malformed value is reported and its field is not used. Other fields and other nodes are not
//! affected. Only one object is parsed at a time; [`crate::topology`] compares the claims of several
//! nodes.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;

use super::annotation::{self, Malformed};
use super::rejected::{Refusals, Rejected};
use super::since;
use crate::flannel::Lease;
use crate::topology::{
    Endpoint, InterfaceAddr, Ledger, Node, NodeName, Object, OtherKeys, RegionName,
};
use crate::wireguard::key::PublicKey;

const POD_CIDRS: &str = "spec.podCIDRs";
const ADDRESSES: &str = "status.addresses";

/// Entries of `status.addresses` that are read. Kubelets and clouds write a handful: a name or two,
/// and an address of each kind and family.
const MAX_ADDRESSES: usize = 32;
/// Conditions that are read. Kubelets write four, clouds and detectors of problems some more.
const MAX_CONDITIONS: usize = 64;
/// Addresses of one kind and family that count: of `InternalIP` and of `ExternalIP`.
const MAX_INTERNAL_IPS: usize = 1;
const MAX_EXTERNAL_IPS: usize = 4;

/// The parts of a Node that are read; all others, such as images and capacities, are skipped while decoding.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct NodeObject {
    /// `metadata`.
    #[serde(default)]
    pub metadata: ObjectMeta,
    #[serde(default)]
    spec: Option<Spec>,
    #[serde(default)]
    status: Option<Status>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    #[serde(default, rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(default, rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Status {
    #[serde(default)]
    addresses: Option<Bounded<Address, MAX_ADDRESSES>>,
    #[serde(default)]
    conditions: Option<Bounded<Condition, MAX_CONDITIONS>>,
}

/// The first `MAX` items of a list. Further items are counted while decoding and take no memory.
#[derive(Clone, Debug)]
struct Bounded<T, const MAX: usize> {
    items: Vec<T>,
    left_out: usize,
}

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for Bounded<T, MAX> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(BoundedVisitor(std::marker::PhantomData))
    }
}

struct BoundedVisitor<T, const MAX: usize>(std::marker::PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> serde::de::Visitor<'de>
    for BoundedVisitor<T, MAX>
{
    type Value = Bounded<T, MAX>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut bounded = Bounded {
            items: Vec::new(),
            left_out: 0,
        };
        while bounded.items.len() < MAX {
            match list.next_element()? {
                Some(item) => bounded.items.push(item),
                None => return Ok(bounded),
            }
        }
        while list.next_element::<serde::de::IgnoredAny>()?.is_some() {
            bounded.left_out += 1;
        }
        Ok(bounded)
    }
}

#[derive(Clone, Debug, Deserialize)]
struct Address {
    #[serde(rename = "type")]
    kind: String,
    address: String,
}

#[derive(Clone, Debug, Deserialize)]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

super::object::cluster_scoped!(NodeObject, kind: "Node", group: "", version: "v1", plural: "nodes");

/// The operator's settings for parsing Nodes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ParseSettings {
    /// The label whose value is the region (`--topology-label`).
    pub topology_label: String,
}

impl Default for ParseSettings {
    fn default() -> Self {
        Self {
            topology_label: "topology.kubernetes.io/region".to_owned(),
        }
    }
}

/// Parses a Node object.
///
/// The result is `None` only for an object without a name. A node without a key or a pod CIDR cannot
/// take part yet, and is parsed too.
pub fn parse(object: &NodeObject, settings: &ParseSettings) -> (Option<Node>, Vec<Rejected>) {
    let name = NodeName(object.metadata.name.clone().unwrap_or_default());
    let mut refusals = Refusals::new(Object::Node(name.clone()));
    if name.0.is_empty() {
        refusals.add("metadata.name", "", "a node needs a name");
        return (None, refusals.into_rejected());
    }

    let none = BTreeMap::new();
    let mut reader = Reader {
        annotations: object.metadata.annotations.as_ref().unwrap_or(&none),
        refusals,
    };
    let (endpoint, endpoint_forced) = reader.endpoint();
    let (private_ip, private_ip_forced) = reader.private_ip();
    let last_seen = reader.read(annotation::LAST_SEEN, |text| {
        i64::from_str(text).map_err(|_| Malformed("this is not a count of seconds"))
    });
    let node = Node {
        name,
        created: super::object::created(&object.metadata),
        region: reader.region(&object.metadata, settings),
        region_declared: reader.is_located(),
        public_key: reader.public_key(annotation::KEY),
        other_keys: OtherKeys {
            next: reader.public_key(annotation::NEXT_KEY),
            previous: reader.public_key(annotation::PREVIOUS_KEY),
        },
        endpoint,
        endpoint_forced,
        internal_ips: reader.status_ips(object.status.as_ref(), "InternalIP", MAX_INTERNAL_IPS),
        external_ips: reader.status_ips(object.status.as_ref(), "ExternalIP", MAX_EXTERNAL_IPS),
        private_ip,
        private_ip_forced,
        pod_cidrs: reader.pod_cidrs(object.spec.as_ref()),
        wireguard_ips: reader
            .read(annotation::WIREGUARD_IP, annotation::wireguard_ips)
            .unwrap_or_default(),
        aliases: reader
            .read(annotation::ALIAS, annotation::aliases)
            .unwrap_or_default(),
        leader: reader.leader(),
        ready: is_ready(object.status.as_ref()),
        persistent_keepalive: reader.read(annotation::PERSISTENT_KEEPALIVE, annotation::keepalive),
        allowed_location_ips: reader.allowed_location_ips(),
        discovered_endpoints: reader.discovered_endpoints(),
        candidates: reader
            .read(annotation::CANDIDATES, annotation::candidates)
            .unwrap_or_default(),
        granularity: reader.granularity(),
        last_seen,
        ours: annotation::is_ours(reader.text(annotation::AGENT), last_seen),
        ledger: reader.ledger(),
        relay_forbidden: reader.read(annotation::RELAY, annotation::relay) == Some(false),
        lease: reader.lease(),
    };
    (Some(node), reader.refusals.into_rejected())
}

/// The annotations of one Node, and the refused values among them.
struct Reader<'a> {
    annotations: &'a BTreeMap<String, String>,
    refusals: Refusals,
}

impl<'a> Reader<'a> {
    fn text(&self, key: &str) -> Option<&'a str> {
        self.annotations.get(key).map(String::as_str)
    }

    fn read<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&'a str) -> Result<T, Malformed>,
    ) -> Option<T> {
        let text = self.text(key)?;
        self.refusals.take(key, text, read(text))
    }

    /// The annotation decides even if it is empty; a malformed one counts as absent.
    fn region(&mut self, metadata: &ObjectMeta, settings: &ParseSettings) -> RegionName {
        let label = metadata
            .labels
            .as_ref()
            .and_then(|labels| labels.get(&settings.topology_label));
        let name = self
            .read(annotation::LOCATION, annotation::region)
            .or_else(|| label.map(|label| label.trim()))
            .unwrap_or_default();
        RegionName(name.to_owned())
    }

    /// Whether the operator declares the node's region.
    fn is_located(&self) -> bool {
        let location = self.text(annotation::LOCATION);
        location.is_some_and(|text| annotation::region(text).is_ok())
    }

    fn public_key(&mut self, key: &'static str) -> Option<PublicKey> {
        let text = self.text(key)?;
        self.refusals.take(key, text, text.parse::<PublicKey>())
    }

    /// The endpoint, and whether it is the operator's. Both annotations are parsed, so that a mistake
    /// in the unused one is reported too.
    fn endpoint(&mut self) -> (Option<Endpoint>, bool) {
        let forced = self.read(annotation::FORCE_ENDPOINT, annotation::endpoint);
        let published = self.read(annotation::ENDPOINT, annotation::endpoint);
        let is_forced = forced.is_some();
        (forced.or(published), is_forced)
    }

    /// The private address, and whether it is the operator's. A valid `force-internal-ip` wins; empty
    /// and `-` mean that there is none.
    fn private_ip(&mut self) -> (Option<InterfaceAddr>, bool) {
        let published = match self.text(annotation::INTERNAL_IP) {
            Some("") => None,
            Some(_) | None => self.read(annotation::INTERNAL_IP, annotation::interface_addr),
        };
        match self.text(annotation::FORCE_INTERNAL_IP) {
            Some("" | "-") => (None, true),
            Some(_) | None => {
                let forced = self.read(annotation::FORCE_INTERNAL_IP, annotation::interface_addr);
                let is_forced = forced.is_some();
                (forced.or(published), is_forced)
            }
        }
    }

    /// The first addresses of a kind, at most `most` of each family. Further addresses are reported
    /// once.
    fn status_ips(&mut self, status: Option<&Status>, kind: &str, most: usize) -> Vec<IpAddr> {
        let mut ips = Vec::<IpAddr>::new();
        let Some(addresses) = status.and_then(|status| status.addresses.as_ref()) else {
            return ips;
        };
        let mut first = None;
        let mut further = addresses.left_out;
        for entry in addresses.items.iter().filter(|entry| entry.kind == kind) {
            let read = annotation::address(&entry.address);
            let Some(ip) = self.refusals.take(ADDRESSES, &entry.address, read) else {
                continue;
            };
            let of_family = ips.iter().filter(|have| have.is_ipv4() == ip.is_ipv4());
            if ips.contains(&ip) {
                continue;
            }
            if of_family.count() < most {
                ips.push(ip);
            } else {
                first.get_or_insert(entry.address.as_str());
                further += 1;
            }
        }
        if let Some(first) = first {
            let reason = format!(
                "only the first {most} {kind} of each family counts; {further} of this node's addresses are ignored"
            );
            self.refusals.add(ADDRESSES, first, reason);
        } else if further > 0 && kind == "InternalIP" {
            let reason = format!(
                "only the first {MAX_ADDRESSES} addresses of a node are read; {further} are ignored"
            );
            self.refusals.add(ADDRESSES, "", reason);
        }
        ips
    }

    fn pod_cidrs(&mut self, spec: Option<&Spec>) -> Vec<IpNet> {
        let Some(spec) = spec else {
            return Vec::new();
        };
        // Servers before dual-stack clusters set the singular field only.
        let texts = match &spec.pod_cidrs {
            Some(texts) if !texts.is_empty() => texts.as_slice(),
            Some(_) | None => spec.pod_cidr.as_slice(),
        };
        let mut cidrs = Vec::<IpNet>::new();
        for text in texts.iter().filter(|text| !text.is_empty()) {
            let read = annotation::prefix(text).and_then(|cidr| {
                let of_family = |have: &IpNet| have.addr().is_ipv4() == cidr.addr().is_ipv4();
                if cidrs.iter().any(of_family) {
                    return Err(Malformed("a node has one pod CIDR of each family"));
                }
                Ok(cidr)
            });
            cidrs.extend(self.refusals.take(POD_CIDRS, text, read));
        }
        cidrs
    }

    fn leader(&mut self) -> bool {
        let Some(text) = self.text(annotation::LEADER) else {
            return false;
        };
        if text.eq_ignore_ascii_case("false") {
            self.refusals.add(
                annotation::LEADER,
                text,
                "any value makes the node a preferred leader; remove the annotation to undo this",
            );
        }
        true
    }

    fn allowed_location_ips(&mut self) -> Vec<IpNet> {
        let key = annotation::ALLOWED_LOCATION_IPS;
        let mut ips = Vec::new();
        let items = self.text(key).unwrap_or_default().split(',').map(str::trim);
        for item in items.filter(|item| !item.is_empty()) {
            let Some(net) = self.refusals.take(key, item, annotation::prefix(item)) else {
                continue;
            };
            if ips.contains(&net) {
                continue;
            }
            if ips.len() == annotation::MAX_ALLOWED_LOCATION_IPS {
                let reason =
                    "a node has at most 256 of them; this one and all further ones are ignored";
                self.refusals.add(key, item, reason);
                break;
            }
            ips.push(net);
        }
        ips
    }

    fn discovered_endpoints(&mut self) -> BTreeMap<PublicKey, std::net::SocketAddr> {
        let key = annotation::DISCOVERED_ENDPOINTS;
        let read = self.read(key, annotation::discovered).unwrap_or_default();
        if read.skipped > 0 {
            let text = self.text(key).unwrap_or_default();
            let reason = format!("{} of its entries are malformed", read.skipped);
            self.refusals.add(key, text, reason);
        }
        read.endpoints
    }

    fn granularity(&mut self) -> Option<crate::topology::Granularity> {
        match self.text(annotation::GRANULARITY) {
            Some("") => None,
            Some(_) | None => self.read(annotation::GRANULARITY, annotation::granularity),
        }
    }

    fn ledger(&mut self) -> Ledger {
        let key = annotation::SINCE;
        let read = self.read(key, since::parse).unwrap_or_default();
        if read.skipped > 0 {
            let text = self.text(key).unwrap_or_default();
            let reason = format!("{} of its entries are malformed or too many", read.skipped);
            self.refusals.add(key, text, reason);
        }
        read.ledger
    }

    fn lease(&mut self) -> Option<Lease> {
        let refusals = &mut self.refusals;
        Lease::parse(self.annotations, |field, value, reason| {
            refusals.add(field, value, reason);
        })
    }
}

/// A Node without the condition was never reported on by its kubelet: not ready.
fn is_ready(status: Option<&Status>) -> bool {
    status
        .iter()
        .filter_map(|status| status.conditions.as_ref())
        .flat_map(|conditions| &conditions.items)
        .any(|condition| condition.kind == "Ready" && condition.status == "True")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse_json(object: serde_json::Value) -> (Node, Vec<String>) {
        let object = serde_json::from_value(object).unwrap();
        let (node, rejected) = parse(&object, &ParseSettings::default());
        (
            node.unwrap(),
            rejected.iter().map(ToString::to_string).collect(),
        )
    }

    fn annotated(pairs: &[(&str, &str)]) -> (Node, Vec<String>) {
        let annotations: BTreeMap<_, _> = pairs.iter().copied().collect();
        parse_json(json!({"metadata": {"name": "a1", "annotations": annotations}}))
    }

    #[test]
    fn a_node_is_parsed_from_kubernetes_flannel_and_agent_fields() {
        let (node, rejected) = parse_json(json!({
            "metadata": {
                "name": "a1",
                "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": {"topology.kubernetes.io/region": "nd"},
                "annotations": {
                    "flannel.alpha.coreos.com/backend-data": "{\"VNI\":1,\"VtepMAC\":\"9e:94:f2:d4:ca:3a\"}",
                    "flannel.alpha.coreos.com/backend-type": "vxlan",
                    "flannel.alpha.coreos.com/kube-subnet-manager": "true",
                    "flannel.alpha.coreos.com/public-ip": "192.168.50.11",
                    "kilo.squat.ai/endpoint": "192.168.50.11:51820",
                    "kilo.squat.ai/internal-ip": "192.168.50.11/24",
                    "kilo.squat.ai/key": "jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w=",
                    "kilo.squat.ai/leader": "",
                    "kilo.squat.ai/persistent-keepalive": "25",
                    "kilo.squat.ai/wireguard-ip": "10.4.0.2/16",
                    "selvedge.dev/agent": "0.1.0",
                },
            },
            "spec": {"podCIDR": "10.42.1.0/24", "podCIDRs": ["10.42.1.0/24", "2001:db8:42:1::/64"]},
            "status": {
                "addresses": [
                    {"type": "InternalIP", "address": "192.168.50.11"},
                    {"type": "Hostname", "address": "a1"},
                ],
                "conditions": [{"type": "Ready", "status": "True"}],
                "images": [{"names": ["skipped"]}],
            },
        }));
        assert!(rejected.is_empty(), "{rejected:?}");
        assert_eq!(node.region.0, "nd");
        assert!(node.leader && node.ready && node.ours && node.public_key.is_some());
        assert_eq!(node.persistent_keepalive, Some(25));
        assert_eq!(node.pod_cidrs.len(), 2);
        assert_eq!(
            node.internal_ips,
            ["192.168.50.11".parse::<IpAddr>().unwrap()]
        );
        assert_eq!(node.private_ip, Some("192.168.50.11/24".parse().unwrap()));
        assert_eq!(node.created, 1_767_225_600);
        assert!(node.lease.is_some());
    }

    #[test]
    fn a_mark_that_an_agent_left_behind_does_not_hide_kilo() {
        let ours = |pairs: &[(&str, &str)]| annotated(pairs).0.ours;
        let (mark, seen) = (annotation::AGENT, annotation::LAST_SEEN);
        let beside_kilo = annotation::format_agent(Some(1_767_225_600));

        assert!(ours(&[(mark, &annotation::format_agent(None))]));
        assert!(ours(&[(mark, &beside_kilo), (seen, "1767225600")]));
        // Only kg writes a time that differs from the mark's.
        assert!(!ours(&[(mark, &beside_kilo), (seen, "1767225630")]));
        assert!(!ours(&[(mark, "0.1.0"), (seen, "1767225600")]));
        assert!(!ours(&[(seen, "1767225600")]));
        // kg cannot parse this time either, so it is not from kg.
        assert!(ours(&[(mark, "0.1.0"), (seen, "yesterday")]));
    }

    #[test]
    fn a_node_without_annotations_is_a_node() {
        let (node, rejected) = parse_json(json!({"metadata": {"name": "a1"}}));
        assert!(rejected.is_empty());
        assert_eq!(node.region.0, "");
        assert!(node.public_key.is_none() && node.pod_cidrs.is_empty() && !node.ready);
    }

    #[test]
    fn the_location_wins_over_the_label_even_when_empty() {
        let region = |location: Option<&str>| {
            let mut object = json!({
                "metadata": {"name": "a1", "labels": {"topology.kubernetes.io/region": "nd"}},
            });
            if let Some(location) = location {
                object["metadata"]["annotations"] = json!({"kilo.squat.ai/location": location});
            }
            parse_json(object).0.region.0
        };
        assert_eq!(region(None), "nd");
        assert_eq!(region(Some(" home ")), "home");
        assert_eq!(region(Some("")), "");
        assert_eq!(region(Some(&"x".repeat(64))), "nd");
    }

    #[test]
    fn a_malformed_forced_endpoint_leaves_the_published_one() {
        let (node, rejected) = annotated(&[
            ("kilo.squat.ai/force-endpoint", "203.0.113.10"),
            ("kilo.squat.ai/endpoint", "192.168.50.11:51820"),
        ]);
        assert_eq!(
            node.endpoint,
            annotation::endpoint("192.168.50.11:51820").ok()
        );
        assert_eq!(
            rejected,
            [
                "node a1: kilo.squat.ai/force-endpoint \"203.0.113.10\" is refused: an endpoint is written host:port"
            ]
        );
    }

    #[test]
    fn a_dash_or_nothing_as_forced_internal_address_means_none() {
        for forced in ["", "-"] {
            let (node, rejected) = annotated(&[
                ("kilo.squat.ai/force-internal-ip", forced),
                ("kilo.squat.ai/internal-ip", "192.168.50.11/24"),
            ]);
            assert_eq!(node.private_ip, None);
            assert!(rejected.is_empty(), "{rejected:?}");
        }
        let (node, rejected) = annotated(&[
            ("kilo.squat.ai/force-internal-ip", "192.168.50.12"),
            ("kilo.squat.ai/internal-ip", "192.168.50.11/24"),
        ]);
        assert_eq!(node.private_ip, Some("192.168.50.11/24".parse().unwrap()));
        assert_eq!(rejected.len(), 1);
    }

    #[test]
    fn the_leader_annotation_counts_with_any_value() {
        let (node, rejected) = annotated(&[("kilo.squat.ai/leader", "false")]);
        assert!(node.leader);
        assert_eq!(rejected.len(), 1);
        assert!(!annotated(&[]).0.leader);
    }

    #[test]
    fn bad_allowed_location_ips_leave_the_good_ones() {
        let (node, rejected) = annotated(&[(
            "kilo.squat.ai/allowed-location-ips",
            "10.6.0.0/24, 0.0.0.0/0,,10.6.0.9/24,10.7.0.1",
        )]);
        assert_eq!(
            node.allowed_location_ips,
            ["10.6.0.0/24".parse::<IpNet>().unwrap()]
        );
        assert_eq!(rejected.len(), 2, "{rejected:?}");
    }

    #[test]
    fn no_node_claims_more_than_256_location_ips() {
        let items: Vec<_> = (0..10_000)
            .map(|i| format!("10.{}.{}.0/24", i / 256, i % 256))
            .collect();
        let (node, rejected) =
            annotated(&[("kilo.squat.ai/allowed-location-ips", &items.join(","))]);
        assert_eq!(node.allowed_location_ips.len(), 256);
        assert_eq!(rejected.len(), 1);
    }

    #[test]
    fn a_second_pod_cidr_of_a_family_is_refused() {
        let (node, rejected) = parse_json(json!({
            "metadata": {"name": "a1"},
            "spec": {"podCIDRs": ["10.42.1.0/24", "10.42.2.0/24", "nonsense"]},
        }));
        assert_eq!(node.pod_cidrs, ["10.42.1.0/24".parse::<IpNet>().unwrap()]);
        assert_eq!(rejected.len(), 2, "{rejected:?}");
    }
}
