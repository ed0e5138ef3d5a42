//! The routing policy rules of other programs.

use std::collections::BTreeMap;

use netlink_packet_route::route::RouteType;

use super::{Rtnetlink, dump};
use crate::state::{OtherAction, OtherRule};

/// The priority of the kernel's rule for table `main`; that for `default` follows it.
const LAST: u32 = 32_766;

impl Rtnetlink {
    /// The routing policy rules of other programs, of both families, in front of the kernel's own for
    /// the tables `main` and `default`.
    ///
    /// A table with `local` routes alone delivers to this host, as that of a transparent proxy. An empty
    /// table counts as one with routes, since it may be filled at any time.
    pub fn other_rules(&self) -> anyhow::Result<Vec<OtherRule>> {
        let mut netlink = self.netlink();
        let mut delivers = BTreeMap::new();
        let mut others = Vec::new();
        for found in dump::rules(&mut netlink)? {
            if found.is_ours() || found.priority >= LAST {
                continue;
            }
            let mut other = found.to_other();
            if let OtherAction::Lookup(table) = other.action {
                let local = match delivers.get(&(other.v6, table)) {
                    Some(local) => *local,
                    None => {
                        let routes = dump::routes(&mut netlink, other.v6, table)?;
                        let is_local =
                            |kind| matches!(kind, RouteType::Local | RouteType::Broadcast);
                        let local = !routes.is_empty()
                            && routes.iter().all(|route| is_local(route.header.kind));
                        delivers.insert((other.v6, table), local);
                        local
                    }
                };
                if local {
                    other.action = OtherAction::Deliver;
                }
            }
            others.push(other);
        }
        others.sort();
        Ok(others)
    }
}
