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
