//! What an operator may choose about how traffic travels.
//!
//! The flags that set these values are read by [`crate::config`]; [`crate::plan`] follows them.

use std::str::FromStr;

/// `--encapsulate`: how the nodes of a region reach their leader.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Encapsulation {
    /// As flannel itself reaches it: VXLAN across subnets, directly where flannel goes directly.
    CrossSubnet,
    /// The same beside flannel, in Kilo as here: where flannel goes directly (`DirectRouting`, `host-gw`),
    /// its VXLAN device, if any, knows no near node. Kilo's default.
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
