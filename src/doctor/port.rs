//! Who holds the tunnel's UDP port while the agent does not.

use super::Finding;
use crate::port_holder;

/// What keeps an agent from taking the port.
pub(super) fn finding(port: u16) -> Option<Finding> {
    let holder = port_holder::holder(port)?;
    Some(Finding::problem(
        format!("UDP port {port} is held by {holder}, so an agent would wait for it."),
        "Stop that (Kilo's link goes when an agent starts), or choose another port with --port on all nodes.",
    ))
}
