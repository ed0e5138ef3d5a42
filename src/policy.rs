//! The operator's choices about the paths of traffic.
//!
//! [`crate::config`] reads the flags that set these values; [`crate::plan`] follows them.

use std::str::FromStr;

/// `--encapsulate`: how the nodes of a region reach their leader.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Encapsulation {
    /// By flannel's routes: VXLAN across subnets, directly where flannel routes directly.
    CrossSubnet,
    /// The same with flannel, as in Kilo: where flannel routes directly (`DirectRouting`, `host-gw`),
    /// its VXLAN device, if any, has no entries for nodes of the same subnet. Kilo's default.
    #[default]
    Always,
    /// By the leader's own address, which must be on the same subnet.
    Never,
}

impl FromStr for Encapsulation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "crosssubnet" => Ok(Self::CrossSubnet),
            "always" => Ok(Self::Always),
            "never" => Ok(Self::Never),
            _ => Err("unknown; possible values are: never, crosssubnet, always".into()),
        }
    }
}

/// `--on-tunnel-down`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum OnTunnelDown {
    /// Traffic between regions is refused; none leaves in clear.
    #[default]
    Closed,
    /// flannel carries it, in clear.
    Open,
}

impl FromStr for OnTunnelDown {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "closed" => Ok(Self::Closed),
            "open" => Ok(Self::Open),
            _ => Err("unknown; possible values are: closed, open".into()),
        }
    }
}

/// `--relay`: which regions relay between regions that do not reach each other.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Relaying {
    /// All of them, the nearest first.
    #[default]
    Auto,
    /// None.
    Off,
    /// These, the first of them that can. A node with a tunnel of its own has its own name.
    Regions(Vec<String>),
}

impl Relaying {
    /// The preference for a region as a relay, the lowest first; `None` where it may not relay.
    pub fn rank(&self, region: &str) -> Option<usize> {
        match self {
            Self::Auto => Some(0),
            Self::Off => None,
            Self::Regions(regions) => regions.iter().position(|name| name == region),
        }
    }
}

impl FromStr for Relaying {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim() {
            "auto" => return Ok(Self::Auto),
            "off" => return Ok(Self::Off),
            _ => {}
        }
        let mut regions = Vec::<String>::new();
        for region in text.split(',').map(str::trim) {
            if region.is_empty() {
                return Err("an empty name; possible values are: auto, off, or names of regions between commas".into());
            }
            if regions.iter().any(|name| name == region) {
                return Err(format!("{region} stands in it twice"));
            }
            regions.push(region.to_owned());
        }
        Ok(Self::Regions(regions))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relays_are_preferred_in_the_order_of_the_flag() {
        let read = |text: &str| text.parse::<Relaying>();
        assert_eq!(read("auto").unwrap().rank("nd"), Some(0));
        assert_eq!(read("off").unwrap().rank("nd"), None);
        let two = read("default, nd").unwrap();
        let ranks = ["default", "nd", "home"].map(|region| two.rank(region));
        assert_eq!(ranks, [Some(0), Some(1), None]);
        for wrong in ["", "nd,", "nd,nd"] {
            assert!(read(wrong).is_err(), "{wrong:?}");
        }
    }
}
