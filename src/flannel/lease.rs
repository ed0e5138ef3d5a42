//! flannel's annotations on a Node → [`Lease`].
//!
//! Another program writes them: any part may be missing or malformed, and only that part is ignored.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use serde::Deserialize;

use super::{Backend, Lease, Mac};

const MANAGED: &str = "flannel.alpha.coreos.com/kube-subnet-manager";
const BACKEND_TYPE: &str = "flannel.alpha.coreos.com/backend-type";
const BACKEND_DATA: &str = "flannel.alpha.coreos.com/backend-data";
const BACKEND_V6_DATA: &str = "flannel.alpha.coreos.com/backend-v6-data";
const PUBLIC_IP: &str = "flannel.alpha.coreos.com/public-ip";
const PUBLIC_IPV6: &str = "flannel.alpha.coreos.com/public-ipv6";

/// A VXLAN network identifier has 24 bits (RFC 7348); flannel starts at 1.
const VNI: std::ops::RangeInclusive<u32> = 1..=0xff_ffff;

/// `backend-data` of the vxlan backend.
#[derive(Deserialize)]
struct BackendData {
    #[serde(rename = "VNI")]
    vni: Option<serde_json::Value>,
    #[serde(rename = "VtepMAC")]
    vtep_mac: Option<serde_json::Value>,
}

impl Lease {
    /// Reads the annotations of a Node; `None` where flannel does not manage it.
    ///
    /// `refuse` is called with the annotation, its value and the reason for each malformed part.
    pub fn parse(
        annotations: &BTreeMap<String, String>,
        mut refuse: impl FnMut(&'static str, &str, &dyn fmt::Display),
    ) -> Option<Self> {
        if annotations.get(MANAGED).map(String::as_str) != Some("true") {
            return None;
        }
        let text = |key| annotations.get(key).map(String::as_str);

        let backend = match text(BACKEND_TYPE) {
            Some("vxlan") => Some(Backend::Vxlan),
            Some("host-gw") => Some(Backend::HostGw),
            Some(_) | None => None,
        };
        let mut vtep = |key: &'static str| {
            let data = text(key).filter(|_| backend == Some(Backend::Vxlan));
            data.map_or((None, None), |data| {
                vtep(data, &mut |reason| refuse(key, data, &reason))
            })
        };
        let (vni, vtep_mac) = vtep(BACKEND_DATA);
        let (vni_v6, vtep_mac_v6) = vtep(BACKEND_V6_DATA);

        let mut address = |key: &'static str, usable: &dyn Fn(&str) -> bool| {
            let address = text(key).filter(|text| !text.is_empty())?;
            if !usable(address) {
                refuse(
                    key,
                    address,
                    &"this is not an address that VXLAN can be sent to",
                );
                return None;
            }
            Some(address)
        };
        let public_ip = address(PUBLIC_IP, &|text| {
            text.parse().is_ok_and(|ip: Ipv4Addr| {
                !ip.is_unspecified()
                    && !ip.is_loopback()
                    && !ip.is_multicast()
                    && !ip.is_broadcast()
            })
        });
        let public_ipv6 = address(PUBLIC_IPV6, &|text| {
            text.parse().is_ok_and(|ip: Ipv6Addr| {
                !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast()
            })
        });

        Some(Self {
            backend,
            vni: vni.or(vni_v6),
            vtep_mac,
            vtep_mac_v6,
            public_ip: public_ip.and_then(|text| text.parse().ok()),
            public_ipv6: public_ipv6.and_then(|text| text.parse().ok()),
        })
    }
}

/// Reads the VNI and the hardware address from `backend-data`; each is optional.
fn vtep(data: &str, refuse: &mut impl FnMut(&'static str)) -> (Option<u32>, Option<Mac>) {
    let Ok(data) = serde_json::from_str::<Option<BackendData>>(data) else {
        refuse("this is not the JSON that flannel's vxlan backend writes");
        return (None, None);
    };
    let Some(data) = data else {
        return (None, None);
    };
    let vni = data.vni.and_then(|value| {
        let vni = value.as_u64().and_then(|number| u32::try_from(number).ok());
        let vni = vni.filter(|vni| VNI.contains(vni));
        if vni.is_none() {
            refuse("the VNI is a number from 1 to 16777215");
        }
        vni
    });
    let mac = data.vtep_mac.and_then(|value| {
        let mac = value.as_str().and_then(mac);
        if mac.is_none() {
            refuse("the VTEP's hardware address is not a unicast MAC");
        }
        mac
    });
    (vni, mac)
}

/// Reads six octets in hexadecimal with colons; group addresses and zeros are refused.
fn mac(text: &str) -> Option<Mac> {
    let mut octets = [0; 6];
    let mut parts = text.split(':');
    for octet in &mut octets {
        let part = parts.next()?;
        if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        *octet = u8::from_str_radix(part, 16).ok()?;
    }
    let group = octets[0] & 1 == 1;
    (parts.next().is_none() && !group && octets != [0; 6]).then_some(Mac(octets))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> (Option<Lease>, Vec<String>) {
        let annotations = pairs
            .iter()
            .map(|(key, value)| {
                (
                    format!("flannel.alpha.coreos.com/{key}"),
                    (*value).to_owned(),
                )
            })
            .collect();
        let mut refused = Vec::new();
        let lease = Lease::parse(&annotations, |field, value, reason| {
            refused.push(format!("{field} {value}: {reason}"));
        });
        (lease, refused)
    }

    #[test]
    fn a_vxlan_node_has_a_vtep_for_each_family() {
        let (lease, refused) = parse(&[
            ("kube-subnet-manager", "true"),
            ("backend-type", "vxlan"),
            ("backend-data", r#"{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}"#),
            (
                "backend-v6-data",
                r#"{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e4"}"#,
            ),
            ("public-ip", "192.168.50.11"),
            ("public-ipv6", "2001:db8::11"),
        ]);
        assert_eq!(
            lease,
            Some(Lease {
                backend: Some(Backend::Vxlan),
                vni: Some(1),
                vtep_mac: Some(Mac([0x12, 0xc6, 0x65, 0x89, 0xb4, 0xe3])),
                vtep_mac_v6: Some(Mac([0x12, 0xc6, 0x65, 0x89, 0xb4, 0xe4])),
                public_ip: Some(Ipv4Addr::new(192, 168, 50, 11)),
                public_ipv6: Some("2001:db8::11".parse().unwrap()),
            })
        );
        assert!(refused.is_empty(), "{refused:?}");
    }

    #[test]
    fn a_node_that_flannel_does_not_manage_has_no_lease() {
        assert_eq!(parse(&[]).0, None);
        assert_eq!(parse(&[("backend-type", "vxlan")]).0, None);
        assert_eq!(parse(&[("kube-subnet-manager", "false")]).0, None);
    }

    #[test]
    fn a_host_gw_node_has_no_vtep() {
        let (lease, refused) = parse(&[
            ("kube-subnet-manager", "true"),
            ("backend-type", "host-gw"),
            ("backend-data", "null"),
            ("public-ip", "192.168.50.11"),
        ]);
        let lease = lease.unwrap();
        assert_eq!((lease.backend, lease.vni), (Some(Backend::HostGw), None));
        assert!(refused.is_empty(), "{refused:?}");
    }

    #[test]
    fn a_malformed_part_is_ignored_alone() {
        for (key, value) in [
            ("backend-data", "{"),
            ("backend-data", r#"{"VNI":0,"VtepMAC":"12:c6:65:89:b4:e3"}"#),
            (
                "backend-data",
                r#"{"VNI":16777216,"VtepMAC":"12:c6:65:89:b4:e3"}"#,
            ),
            ("backend-data", r#"{"VNI":1,"VtepMAC":"12:c6:65:89:b4"}"#),
            ("backend-data", r#"{"VNI":1,"VtepMAC":"01:00:5e:00:00:01"}"#),
            ("backend-data", r#"{"VNI":1,"VtepMAC":7}"#),
            ("public-ip", "192.168.50.256"),
            ("public-ip", "127.0.0.1"),
            ("public-ip", "::1"),
            ("public-ipv6", "192.168.50.11"),
        ] {
            let (lease, refused) = parse(&[
                ("kube-subnet-manager", "true"),
                ("backend-type", "vxlan"),
                (key, value),
            ]);
            assert!(lease.is_some());
            assert_eq!(refused.len(), 1, "{key} {value}: {refused:?}");
        }
    }
}
