//! `subnet.env`, which flannel writes once it is up.

use ipnet::IpNet;

/// The content of `subnet.env`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SubnetEnv {
    /// `FLANNEL_NETWORK`, `FLANNEL_IPV6_NETWORK`.
    pub networks: Vec<IpNet>,
    /// `FLANNEL_SUBNET`, `FLANNEL_IPV6_SUBNET`, truncated: flannel writes the bridge's address.
    pub subnets: Vec<IpNet>,
    /// `FLANNEL_MTU` in bytes.
    pub mtu: u32,
}

/// Why a `subnet.env` is invalid; every text names the key.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SubnetEnvError {
    /// Not text.
    #[error("is not text")]
    NotText,
    /// A key has a value that flannel does not write.
    #[error("has a {key} that is not {wanted}")]
    Value {
        /// The key.
        key: &'static str,
        /// The expected value.
        wanted: &'static str,
    },
    /// A key is missing.
    #[error("has no {0}")]
    Missing(&'static str),
    /// The subnet lies outside the network.
    #[error("has a {subnet} outside its {network}")]
    Outside {
        /// The subnet's key.
        subnet: &'static str,
        /// The network's key.
        network: &'static str,
    },
}

impl SubnetEnv {
    /// Parses the file's content; unknown keys are ignored.
    pub fn parse(bytes: &[u8]) -> Result<Self, SubnetEnvError> {
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let text = std::str::from_utf8(bytes).map_err(|_| SubnetEnvError::NotText)?;
        let value = |wanted: &str| {
            text.lines()
                .filter_map(|line| line.trim().split_once('='))
                .filter(|(key, _)| key.trim() == wanted)
                .map(|(_, value)| value.trim().trim_matches('"'))
                .next_back()
                .filter(|value| !value.is_empty())
        };
        let net = |key: &'static str, v6: bool| match value(key) {
            None => Ok(None),
            Some(text) => match text.parse::<IpNet>() {
                Ok(net) if net.addr().is_ipv6() == v6 && net.prefix_len() > 0 => {
                    Ok(Some(net.trunc()))
                }
                Ok(_) | Err(_) => Err(SubnetEnvError::Value {
                    key,
                    wanted: if v6 { "one IPv6 CIDR" } else { "one IPv4 CIDR" },
                }),
            },
        };

        let mut networks = Vec::new();
        let mut subnets = Vec::new();
        for (network_key, subnet_key, v6) in [
            ("FLANNEL_NETWORK", "FLANNEL_SUBNET", false),
            ("FLANNEL_IPV6_NETWORK", "FLANNEL_IPV6_SUBNET", true),
        ] {
            match (net(network_key, v6)?, net(subnet_key, v6)?) {
                (None, None) => {}
                (Some(_), None) => return Err(SubnetEnvError::Missing(subnet_key)),
                (None, Some(_)) => return Err(SubnetEnvError::Missing(network_key)),
                (Some(network), Some(subnet)) if !network.contains(&subnet) => {
                    return Err(SubnetEnvError::Outside {
                        subnet: subnet_key,
                        network: network_key,
                    });
                }
                (Some(network), Some(subnet)) => {
                    networks.push(network);
                    subnets.push(subnet);
                }
            }
        }
        if networks.is_empty() {
            return Err(SubnetEnvError::Missing("FLANNEL_NETWORK"));
        }
        let mtu = value("FLANNEL_MTU").ok_or(SubnetEnvError::Missing("FLANNEL_MTU"))?;
        let mtu = mtu
            .parse::<u32>()
            .ok()
            // 68 is the kernel's minimum for a link (RFC 791).
            .filter(|mtu| (68..=65_535).contains(mtu))
            .ok_or(SubnetEnvError::Value {
                key: "FLANNEL_MTU",
                wanted: "a number of bytes from 68 to 65535",
            })?;

        Ok(Self {
            networks,
            subnets,
            mtu,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USUAL: &str = "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

    #[test]
    fn the_bridges_address_becomes_the_subnet() {
        let env = SubnetEnv::parse(USUAL.as_bytes()).unwrap();
        assert_eq!(env.networks, ["10.42.0.0/16".parse().unwrap()]);
        assert_eq!(env.subnets, ["10.42.1.0/24".parse().unwrap()]);
        assert_eq!(env.mtu, 1450);
    }

    #[test]
    fn both_families_and_ipv6_alone_are_read() {
        let v6 = "FLANNEL_IPV6_NETWORK=2001:cafe:42::/56\nFLANNEL_IPV6_SUBNET=2001:cafe:42:1::1/64\nFLANNEL_MTU=1450\n";
        let env = SubnetEnv::parse(v6.as_bytes()).unwrap();
        assert_eq!(env.subnets, ["2001:cafe:42:1::/64".parse().unwrap()]);

        let both = SubnetEnv::parse(format!("{USUAL}{v6}").as_bytes()).unwrap();
        assert_eq!(both.networks.len(), 2);
    }

    #[test]
    fn bad_values_name_their_key() {
        for (from, to, key) in [
            (
                "10.42.0.0/16",
                "10.42.0.0/16,10.43.0.0/16",
                "FLANNEL_NETWORK",
            ),
            ("10.42.0.0/16", "fd42::/56", "FLANNEL_NETWORK"),
            ("10.42.1.1/24", "10.99.1.1/24", "FLANNEL_SUBNET outside"),
            ("10.42.1.1/24", "10.42.1.1", "FLANNEL_SUBNET"),
            ("FLANNEL_SUBNET=10.42.1.1/24", "", "no FLANNEL_SUBNET"),
            ("FLANNEL_NETWORK=10.42.0.0/16", "", "no FLANNEL_NETWORK"),
            ("1450", "0", "FLANNEL_MTU"),
            ("1450", "65536", "FLANNEL_MTU"),
            ("FLANNEL_MTU=1450", "", "no FLANNEL_MTU"),
        ] {
            let error = SubnetEnv::parse(USUAL.replace(from, to).as_bytes()).unwrap_err();
            assert!(error.to_string().contains(key), "{to:?}: {error}");
        }
        assert_eq!(SubnetEnv::parse(b"\xff"), Err(SubnetEnvError::NotText));
        assert_eq!(
            SubnetEnv::parse(b""),
            Err(SubnetEnvError::Missing("FLANNEL_NETWORK"))
        );
    }
}
