//! `net-conf.json`, flannel's configuration.
//!
//! Parsed as in Go: keys in any case, unknown keys ignored. Only the fields that Selvedge needs are kept.

use ipnet::IpNet;
use serde_json::{Map, Value};

use super::Backend;

/// The content of `net-conf.json`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NetConf {
    /// `Network` and `IPv6Network` of the enabled families; k3s's `::/0` means none.
    pub networks: Vec<IpNet>,
    /// `Backend.Type`.
    pub backend: Backend,
    /// `Backend.VNI`; 1 where absent.
    pub vni: u32,
    /// `Backend.DirectRouting`.
    pub direct_routing: bool,
}

/// Why a `net-conf.json` is invalid; every text names the field.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum NetConfError {
    /// Not JSON, not an object, or not text.
    #[error("is not a JSON object ({0})")]
    Json(String),
    /// A field has a value of another type or outside its range.
    #[error("has a {field} that is not {wanted}")]
    Field {
        /// The field's name, from the outermost object.
        field: &'static str,
        /// The expected value.
        wanted: &'static str,
    },
    /// No address family is enabled.
    #[error("has no Network for any enabled address family")]
    NoNetwork,
    /// A backend that Selvedge does not support.
    #[error(
        "sets Backend.Type to {0:?}, which Selvedge does not support: use \"vxlan\" or \"host-gw\""
    )]
    Backend(String),
}

impl NetConf {
    /// Parses the file's content; a byte order mark is skipped.
    pub fn parse(bytes: &[u8]) -> Result<Self, NetConfError> {
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let object = serde_json::from_slice::<Map<String, Value>>(bytes)
            .map_err(|error| NetConfError::Json(crate::text::quote(&error.to_string())))?;

        let v4 = flag(&object, "EnableIPv4")?.unwrap_or(true);
        let v6 = flag(&object, "EnableIPv6")?.unwrap_or(false);
        let mut networks = Vec::new();
        if v4 {
            networks.extend(network(&object, "Network")?);
        }
        if v6 {
            networks.extend(network(&object, "IPv6Network")?);
        }
        if networks.is_empty() {
            return Err(NetConfError::NoNetwork);
        }

        let none = Map::new();
        let backend = match field(&object, "Backend") {
            Some(Value::Object(backend)) => backend,
            Some(_) => {
                return Err(NetConfError::Field {
                    field: "Backend",
                    wanted: "an object",
                });
            }
            None => &none,
        };
        let kind = match field(backend, "Type") {
            Some(Value::String(kind)) => kind.as_str(),
            Some(_) => {
                return Err(NetConfError::Field {
                    field: "Backend.Type",
                    wanted: "text",
                });
            }
            // flannel's default in code, which differs from its documentation.
            None => "udp",
        };
        let kind = match kind {
            "vxlan" => Backend::Vxlan,
            "host-gw" => Backend::HostGw,
            other => return Err(NetConfError::Backend(crate::text::quote(other))),
        };
        let vni = number(
            backend,
            "VNI",
            "Backend.VNI",
            "a number below 16777216",
            0xff_ffff,
        )?;
        // Checked to report mistakes; the agent uses the values of the kernel's device.
        number(backend, "Port", "Backend.Port", "a port", 65_535)?;
        number(
            backend,
            "MTU",
            "Backend.MTU",
            "a number of bytes up to 65535",
            65_535,
        )?;

        Ok(Self {
            networks,
            backend: kind,
            vni: vni.unwrap_or(1),
            direct_routing: flag(backend, "DirectRouting")?.unwrap_or(false),
        })
    }
}

/// The field of that name, in any case as in Go; `null` counts as absent.
fn field<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    object
        .get(name)
        .or_else(|| {
            object
                .iter()
                .find(|(key, _)| key.eq_ignore_ascii_case(name))
                .map(|(_, value)| value)
        })
        .filter(|value| !value.is_null())
}

fn flag(object: &Map<String, Value>, name: &'static str) -> Result<Option<bool>, NetConfError> {
    match field(object, name) {
        None => Ok(None),
        Some(Value::Bool(on)) => Ok(Some(*on)),
        Some(_) => Err(NetConfError::Field {
            field: name,
            wanted: "true or false",
        }),
    }
}

fn network(object: &Map<String, Value>, name: &'static str) -> Result<Option<IpNet>, NetConfError> {
    let v6 = name.starts_with("IPv6");
    let wrong = NetConfError::Field {
        field: name,
        wanted: if v6 { "an IPv6 CIDR" } else { "an IPv4 CIDR" },
    };
    match field(object, name) {
        None => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Ok(None),
        Some(Value::String(text)) => match text.parse::<IpNet>() {
            Ok(net) if net.addr().is_ipv6() != v6 => Err(wrong),
            Ok(net) if net.prefix_len() == 0 => Ok(None),
            Ok(net) => Ok(Some(net.trunc())),
            Err(_) => Err(wrong),
        },
        Some(_) => Err(wrong),
    }
}

fn number(
    object: &Map<String, Value>,
    name: &str,
    shown: &'static str,
    wanted: &'static str,
    max: u32,
) -> Result<Option<u32>, NetConfError> {
    let Some(value) = field(object, name) else {
        return Ok(None);
    };
    value
        .as_u64()
        .and_then(|number| u32::try_from(number).ok())
        .filter(|number| *number <= max)
        .map(Some)
        .ok_or(NetConfError::Field {
            field: shown,
            wanted,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<NetConf, NetConfError> {
        NetConf::parse(text.as_bytes())
    }

    fn with_backend(backend: &str) -> Result<NetConf, NetConfError> {
        parse(&format!(
            r#"{{"Network":"10.42.0.0/16","Backend":{backend}}}"#
        ))
    }

    #[test]
    fn what_k3s_writes_is_read() {
        let conf = parse(
            "{\n\t\"Network\": \"10.42.0.0/16\",\n\t\"EnableIPv6\": false,\n\t\"EnableIPv4\": true,\n\t\"IPv6Network\": \"::/0\",\n\t\"Backend\": {\n\t\"Type\": \"vxlan\"\n}\n}\n",
        )
        .unwrap();

        assert_eq!(conf.networks, ["10.42.0.0/16".parse().unwrap()]);
        assert_eq!(
            (conf.backend, conf.vni, conf.direct_routing),
            (Backend::Vxlan, 1, false)
        );
    }

    #[test]
    fn keys_are_read_in_any_case_and_unknown_ones_ignored() {
        let conf = parse(
            r#"{"network":"10.42.7.0/16","enableNFTables":true,"Future":[1],
                "backend":{"type":"vxlan","vni":7,"directRouting":true,"Port":0,"MTU":null,"GBP":true}}"#,
        )
        .unwrap();

        assert_eq!(conf.networks, ["10.42.0.0/16".parse().unwrap()]);
        assert_eq!((conf.vni, conf.direct_routing), (7, true));
    }

    #[test]
    fn ipv6_alone_and_both_families_are_read() {
        let conf = parse(
            r#"{"Network":"0.0.0.0/0","EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"2001:cafe:42::/56","Backend":{"Type":"host-gw"}}"#,
        )
        .unwrap();
        assert_eq!(conf.networks, ["2001:cafe:42::/56".parse().unwrap()]);
        assert_eq!(conf.backend, Backend::HostGw);

        let conf = parse(
            r#"{"Network":"10.42.0.0/16","EnableIPv6":true,"IPv6Network":"fd42::/56","Backend":{"Type":"vxlan"}}"#,
        )
        .unwrap();
        assert_eq!(conf.networks.len(), 2);
    }

    #[test]
    fn a_byte_order_mark_is_skipped() {
        let text = "\u{feff}{\"Network\":\"10.42.0.0/16\",\"Backend\":{\"Type\":\"vxlan\"}}";
        assert!(parse(text).is_ok());
    }

    #[test]
    fn unsupported_backends_are_refused_by_name() {
        for kind in [
            "none",
            "extension",
            "wireguard",
            "wireguard-native",
            "udp",
            "ipip",
            "ipsec",
            "VXLAN",
            "",
        ] {
            let error = with_backend(&format!(r#"{{"Type":"{kind}"}}"#)).unwrap_err();
            assert_eq!(error, NetConfError::Backend(kind.into()));
        }
        assert_eq!(
            parse(r#"{"Network":"10.42.0.0/16"}"#)
                .unwrap_err()
                .to_string(),
            "sets Backend.Type to \"udp\", which Selvedge does not support: use \"vxlan\" or \"host-gw\""
        );
    }

    #[test]
    fn bad_fields_are_named() {
        for (backend, field) in [
            (r#"{"Type":"vxlan","VNI":16777216}"#, "Backend.VNI"),
            (r#"{"Type":"vxlan","VNI":-1}"#, "Backend.VNI"),
            (r#"{"Type":"vxlan","VNI":"1"}"#, "Backend.VNI"),
            (r#"{"Type":"vxlan","Port":70000}"#, "Backend.Port"),
            (r#"{"Type":"vxlan","MTU":65536}"#, "Backend.MTU"),
            (r#"{"Type":"vxlan","DirectRouting":"yes"}"#, "DirectRouting"),
            (r#"{"Type":5}"#, "Backend.Type"),
            (r#""vxlan""#, "Backend"),
        ] {
            let error = with_backend(backend).unwrap_err().to_string();
            assert!(error.contains(field), "{backend}: {error}");
        }
        for (text, field) in [
            (r#"{"Network":"10.42.0.0"}"#, "Network"),
            (r#"{"Network":"fd42::/56"}"#, "Network"),
            (r#"{"Network":["10.42.0.0/16","10.43.0.0/16"]}"#, "Network"),
            (r#"{"Network":"10.42.0.0/16,10.43.0.0/16"}"#, "Network"),
            (
                r#"{"EnableIPv6":true,"Network":"10.42.0.0/16","IPv6Network":"10.0.0.0/8"}"#,
                "IPv6Network",
            ),
            (r#"{"EnableIPv4":1,"Network":"10.42.0.0/16"}"#, "EnableIPv4"),
            (r#"{}"#, "Network"),
            (
                r#"{"EnableIPv4":false,"Network":"10.42.0.0/16"}"#,
                "Network",
            ),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(field), "{text}: {error}");
        }
    }

    #[test]
    fn anything_but_a_json_object_is_refused_in_one_line() {
        for bytes in [
            &b""[..],
            b"{",
            b"[]",
            b"\xff\xfe{\0}\0",
            b"{\"Network\":\"10.42",
            b"null",
        ] {
            let error = NetConf::parse(bytes).unwrap_err();
            assert!(matches!(error, NetConfError::Json(_)), "{error}");
            assert!(!error.to_string().contains('\n'));
        }
    }
}
