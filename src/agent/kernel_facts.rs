//! What the kernel and flannel's files say of this node, read as values on the reconciler's thread.

use std::collections::BTreeSet;

use ipnet::IpNet;

use crate::config::Config;
use crate::flannel::{Files, Unready};
use crate::kernel::flannel_repair::FlannelState;
use crate::kernel::{LocalAddress, Rtnetlink, ipv6_is_off};
use crate::state::OtherRule;

/// One reading. What could not be read is `None`: what was known before stays in force.
#[derive(Clone, Debug)]
pub struct KernelFacts {
    /// The addresses on this node's links.
    pub addresses: Option<Vec<LocalAddress>>,
    /// The networks this node is connected to.
    pub connected: Option<BTreeSet<IpNet>>,
    /// The routing policy rules of other programs.
    pub other_rules: Option<Vec<OtherRule>>,
    /// The MTU in bytes of the link that leads out; `Some(None)` where no link does.
    pub underlay_mtu: Option<Option<u32>>,
    /// flannel's files and what the kernel holds of it, or why there is nothing to work beside.
    pub flannel: Result<FlannelFacts, Unready>,
}

/// flannel, without what its lease says.
#[derive(Clone, Debug)]
pub struct FlannelFacts {
    /// Its files, without the families that are off.
    pub files: Files,
    /// What the kernel holds of it.
    pub state: FlannelState,
    /// Whether it has IPv6, which this node has turned off.
    pub without_ipv6: bool,
}

/// Reads them. What cannot be read is logged.
pub fn read(config: &Config, kernel: &Rtnetlink) -> KernelFacts {
    KernelFacts {
        addresses: logged(kernel.node_addresses(), "reading node addresses failed"),
        connected: logged(kernel.connected(), "reading connected networks failed"),
        other_rules: logged(kernel.other_rules(), "reading other rules failed"),
        underlay_mtu: logged(kernel.uplink(), "reading the default route failed")
            .map(|uplink| uplink.map(|uplink| uplink.mtu)),
        flannel: read_flannel(config, kernel),
    }
}

fn read_flannel(config: &Config, kernel: &Rtnetlink) -> Result<FlannelFacts, Unready> {
    let mut files = Files::read(config.flannel_conf.as_deref(), &config.subnet_file)?;
    let without_ipv6 = ipv6_is_off(&config.interface) && files.leave_out_ipv6()?;
    let networks = files.env.as_ref().map(|env| env.networks.as_slice());
    let state = kernel
        .flannel(networks.unwrap_or_default())
        .map_err(|error| Unready::Waiting(format!("{error:#}")))?;
    Ok(FlannelFacts {
        files,
        state,
        without_ipv6,
    })
}

fn logged<T>(read: anyhow::Result<T>, message: &'static str) -> Option<T> {
    read.inspect_err(|error| tracing::warn!(error = %format_args!("{error:#}"), "{message}"))
        .ok()
}
