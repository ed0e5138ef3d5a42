//! Checks which program holds the tunnel's UDP port while no agent runs.

use super::Finding;
use crate::port_holder;

/// The program that would keep an agent from binding the port.
pub(super) fn finding(port: u16) -> Option<Finding> {
    let holder = port_holder::holder(port)?;
    Some(Finding::problem(
        format!("UDP port {port} is held by {holder}, so an agent would wait for it."),
        "Stop that program (an agent removes Kilo's link when it starts), or choose another port with --port on all nodes.",
    ))
}
