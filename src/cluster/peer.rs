//! The `peers.kilo.squat.ai` resource, and a Peer object → [`ExternalPeer`].
//!
//! A Peer is used whole or not at all: each field restricts access, so none has a fallback.
//! [`crate::topology`] decides which claims of a Peer stand against those of nodes and other peers.

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};

use super::annotation::{self, Malformed};
use super::rejected::{Refusals, Rejected};
use crate::topology::{Endpoint, ExternalPeer, Object};
use crate::wireguard::key::PresharedKey;

/// The API version of Peer objects.
pub const API_VERSION: &str = "kilo.squat.ai/v1alpha1";

/// More allowed IPs than this are refused: each becomes a route on every node.
const MAX_ALLOWED_IPS: usize = 256;

const SPEC: &str = "spec";
const ALLOWED_IPS: &str = "spec.allowedIPs";
const ENDPOINT: &str = "spec.endpoint";
const ENDPOINT_PORT: &str = "spec.endpoint.port";
const ENDPOINT_HOST: &str = "spec.endpoint.dnsOrIP";
const KEEPALIVE: &str = "spec.persistentKeepalive";
const PRESHARED_KEY: &str = "spec.presharedKey";
const PUBLIC_KEY: &str = "spec.publicKey";

/// Replaces a secret in text.
const REDACTED: &str = "(hidden)";

/// A Peer as stored in the API. The specification stays unparsed, so that an invalid object from an older
/// CRD does not make the whole list unreadable.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct PeerObject {
    /// `metadata`.
    #[serde(default)]
    pub metadata: ObjectMeta,
    #[serde(default)]
    spec: serde_json::Value,
    /// `status`, written by an agent.
    #[serde(default)]
    pub(super) status: serde_json::Value,
}

super::object::cluster_scoped!(
    PeerObject,
    kind: "Peer",
    group: "kilo.squat.ai",
    version: "v1alpha1",
    plural: "peers"
);

/// The specification of a Peer, as written to the API.
#[derive(Clone, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerSpec {
    /// Prefixes that belong to the peer.
    #[serde(rename = "allowedIPs")]
    pub allowed_ips: Vec<String>,
    /// Its endpoint, for peers that do not start the handshake.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<PeerEndpoint>,
    /// Seconds between keepalives; 0 is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_keepalive: Option<i64>,
    /// The preshared key in base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preshared_key: Option<String>,
    /// The public key in base64.
    pub public_key: String,
}

impl std::fmt::Debug for PeerSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerSpec")
            .field("allowed_ips", &self.allowed_ips)
            .field("endpoint", &self.endpoint)
            .field("persistent_keepalive", &self.persistent_keepalive)
            .field(
                "preshared_key",
                &self.preshared_key.as_ref().map(|_| REDACTED),
            )
            .field("public_key", &self.public_key)
            .finish()
    }
}

/// `spec.endpoint`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct PeerEndpoint {
    /// A name or an address.
    #[serde(rename = "dnsOrIP")]
    pub dns_or_ip: DnsOrIp,
    /// 1..=65535.
    pub port: i64,
}

/// `spec.endpoint.dnsOrIP`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct DnsOrIp {
    /// A name of RFC 1123.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns: Option<String>,
    /// An address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<String>,
}

/// Parses a Peer object; `None` where any part of it is malformed.
pub fn parse(object: &PeerObject) -> (Option<ExternalPeer>, Vec<Rejected>) {
    let name = object.metadata.name.clone().unwrap_or_default();
    let mut refusals = Refusals::new(Object::Peer(name.clone()));
    let peer = read(object, name, &mut refusals);
    (peer, refusals.into_rejected())
}

/// Parses every field before it returns, so that all mistakes are reported at once.
fn read(object: &PeerObject, name: String, refusals: &mut Refusals) -> Option<ExternalPeer> {
    // Errors of serde quote the text in question, which may be the preshared key.
    let spec = PeerSpec::deserialize(&object.spec).map_err(|_| {
        Malformed("it needs allowedIPs and publicKey, and every field must have the right type")
    });
    let spec = refusals.take(SPEC, REDACTED, spec)?;

    let public_key = refusals.take(PUBLIC_KEY, &spec.public_key, spec.public_key.parse());
    let preshared_key = match spec.preshared_key.as_deref() {
        None | Some("") => Some(None),
        Some(text) => refusals
            .take(PRESHARED_KEY, REDACTED, preshared_key(text))
            .map(Some),
    };
    let endpoint = match &spec.endpoint {
        None => Some(None),
        Some(endpoint) => read_endpoint(endpoint, refusals).map(Some),
    };
    let seconds = spec.persistent_keepalive.unwrap_or_default();
    let keepalive = u16::try_from(seconds)
        .map_err(|_| Malformed("a keepalive is a whole number of seconds from 0 to 65535"));
    let keepalive = refusals.take(KEEPALIVE, &seconds.to_string(), keepalive);
    let allowed_ips = read_allowed_ips(&spec.allowed_ips, refusals);

    Some(ExternalPeer {
        name,
        created: super::object::created(&object.metadata),
        public_key: public_key?,
        preshared_key: preshared_key?,
        endpoint: endpoint?,
        persistent_keepalive: keepalive?,
        allowed_ips: allowed_ips?,
    })
}

fn preshared_key(text: &str) -> Result<PresharedKey, Malformed> {
    let key: PresharedKey = text.parse().map_err(|_| {
        Malformed("a preshared key is 32 bytes in base64; the peer is not let in without it")
    })?;
    if key.0 == [0; 32] {
        return Err(Malformed(
            "a preshared key of zeros protects nothing; leave the field out",
        ));
    }
    Ok(key)
}

/// Where both a name and an address are set, the name counts, as in Kilo's agents.
fn read_endpoint(endpoint: &PeerEndpoint, refusals: &mut Refusals) -> Option<Endpoint> {
    let port = u16::try_from(endpoint.port).ok().filter(|port| *port != 0);
    let port = port.ok_or(Malformed("a port is a number from 1 to 65535"));
    let port = refusals.take(ENDPOINT_PORT, &endpoint.port.to_string(), port);

    let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let dns = given(&endpoint.dns_or_ip.dns);
    let ip = given(&endpoint.dns_or_ip.ip);
    let host = match (&dns, &ip) {
        (None, None) => {
            refusals.add(ENDPOINT, "", "an endpoint has a name or an address");
            return None;
        }
        (Some(name), _) => refusals.take(
            ENDPOINT_HOST,
            name,
            annotation::endpoint_of(name, port.unwrap_or(1)),
        ),
        (None, Some(ip)) => {
            let addr = annotation::address(ip)
                .map(|ip| Endpoint::Addr(std::net::SocketAddr::new(ip, port.unwrap_or(1))));
            refusals.take(ENDPOINT_HOST, ip, addr)
        }
    };
    port.and(host)
}

fn read_allowed_ips(texts: &[String], refusals: &mut Refusals) -> Option<Vec<IpNet>> {
    if texts.is_empty() {
        refusals.add(
            ALLOWED_IPS,
            "",
            "a peer without allowed IPs cannot send anything",
        );
        return None;
    }
    if texts.len() > MAX_ALLOWED_IPS {
        let count = texts.len().to_string();
        refusals.add(ALLOWED_IPS, &count, "a peer has at most 256 of them");
        return None;
    }
    let mut allowed_ips = Vec::new();
    let mut all_read = true;
    for text in texts {
        match refusals.take(ALLOWED_IPS, text, annotation::prefix(text)) {
            Some(net) if !allowed_ips.contains(&net) => allowed_ips.push(net),
            Some(_) => {}
            None => all_read = false,
        }
    }
    all_read.then_some(allowed_ips)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const KEY: &str = "jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w=";
    const PSK: &str = "PSKwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=";

    fn parse_spec(spec: serde_json::Value) -> (Option<ExternalPeer>, Vec<Rejected>) {
        let object = json!({
            "metadata": {"name": "laptop", "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": spec,
        });
        parse(&serde_json::from_value(object).unwrap())
    }

    #[test]
    fn every_field_of_a_peer_is_parsed() {
        let (peer, rejected) = parse_spec(json!({
            "allowedIPs": ["10.5.0.1/32", "10.6.0.7/24", "10.5.0.1/32"],
            "endpoint": {"dnsOrIP": {"dns": "vpn.example.com"}, "port": 51999},
            "persistentKeepalive": 10,
            "presharedKey": PSK,
            "publicKey": KEY,
        }));
        assert!(rejected.is_empty(), "{rejected:?}");
        let peer = peer.unwrap();
        assert_eq!(
            peer.allowed_ips,
            [
                "10.5.0.1/32".parse().unwrap(),
                "10.6.0.0/24".parse().unwrap()
            ]
        );
        assert_eq!(
            peer.endpoint,
            Some(Endpoint::Dns {
                host: "vpn.example.com".to_owned(),
                port: 51999
            })
        );
        assert_eq!(peer.created, 1_767_225_600);
        assert!(peer.preshared_key.is_some());
    }

    #[test]
    fn any_bad_field_keeps_the_peer_out() {
        let good = json!({"allowedIPs": ["10.5.0.1/32"], "publicKey": KEY});
        assert!(parse_spec(good.clone()).0.is_some());
        for (field, value) in [
            ("allowedIPs", json!([])),
            ("allowedIPs", json!(null)),
            ("allowedIPs", json!(["10.5.0.1/32", "0.0.0.0/0"])),
            ("allowedIPs", json!(["10.5.0.1"])),
            ("allowedIPs", json!(vec!["10.5.0.1/32"; 257])),
            ("endpoint", json!({"dnsOrIP": {}, "port": 1})),
            (
                "endpoint",
                json!({"dnsOrIP": {"ip": "198.51.100.7"}, "port": 0}),
            ),
            (
                "endpoint",
                json!({"dnsOrIP": {"ip": "198.51.100.7"}, "port": 65536}),
            ),
            (
                "endpoint",
                json!({"dnsOrIP": {"ip": "127.0.0.1"}, "port": 1}),
            ),
            ("endpoint", json!({"dnsOrIP": {"dns": "a b"}, "port": 1})),
            ("persistentKeepalive", json!(-1)),
            ("persistentKeepalive", json!(65536)),
            ("persistentKeepalive", json!("10")),
            ("presharedKey", json!("secret")),
            (
                "presharedKey",
                json!("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="),
            ),
            ("publicKey", json!("")),
            (
                "publicKey",
                json!("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="),
            ),
        ] {
            let mut spec = good.clone();
            spec[field] = value.clone();
            let (peer, rejected) = parse_spec(spec);
            assert_eq!(peer, None, "{field} {value}");
            assert_eq!(rejected.len(), 1, "{field} {value}: {rejected:?}");
        }
    }

    #[test]
    fn no_message_holds_a_preshared_key() {
        for spec in [
            json!({"allowedIPs": ["10.5.0.1/32"], "publicKey": KEY, "presharedKey": "hunter2"}),
            json!({"allowedIPs": "hunter2", "publicKey": KEY, "presharedKey": "hunter2"}),
            json!({"allowedIPs": [], "publicKey": KEY, "presharedKey": ["hunter2"]}),
            json!("hunter2"),
        ] {
            let (_, rejected) = parse_spec(spec);
            assert!(!rejected.is_empty());
            assert!(!format!("{rejected:?}").contains("hunter2"), "{rejected:?}");
        }
    }

    #[test]
    fn a_name_wins_over_an_address() {
        let (peer, _) = parse_spec(json!({
            "allowedIPs": ["10.5.0.1/32"],
            "publicKey": KEY,
            "endpoint": {"dnsOrIP": {"dns": "vpn.example.com", "ip": "198.51.100.7"}, "port": 1},
        }));
        let endpoint = peer.unwrap().endpoint.unwrap();
        assert_eq!(annotation::format_endpoint(&endpoint), "vpn.example.com:1");
    }
}
