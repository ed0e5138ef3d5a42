//! What belongs to the agent, to Kilo, and to other programs: what the agent takes over at its start, and
//! what it refuses to start on.

use super::link::Found;
use super::{Rtnetlink, dump, route};
use crate::diff::KernelChange;
use crate::refusal::Refusal;
use crate::state::{PROTOCOL, Table};

/// The default link of Kilo's `kg`. A WireGuard link of another name may belong to any program.
const KILOS_LINK: &str = "kilo0";
/// The routing table of Kilo's `kg`, which never empties it.
const KILOS_TABLE: u32 = 1107;

/// What Kilo's `kg` has or left on this node.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct KilosRemains {
    /// Whether Kilo's WireGuard link, one of the kernel's, has the name of the tunnel.
    pub link: bool,
    /// The priorities of the rules that lead to its table.
    pub rules: Vec<u32>,
    /// How many routes are in it.
    pub routes: usize,
}

impl Rtnetlink {
    /// Deletes Kilo's WireGuard link if it has the tunnel's name, and returns whether there was one.
    ///
    /// By default Kilo's `kg` leaves its link with UDP port and configuration when it exits. An operator who
    /// changes the image, or moves a node, expects the next agent to take over. The link's routes are
    /// deleted with it.
    pub fn take_over(&self) -> anyhow::Result<bool> {
        if !self.left_by_kilo()?.link {
            return Ok(false);
        }
        let change = KernelChange::DeleteLink {
            name: self.interface.clone(),
        };
        match self.apply_all(&[&change]).pop() {
            None => Ok(true),
            Some((change, error)) => Err(error.context(change.to_string())),
        }
    }

    /// Whether a link of the tunnel's name is Kilo's.
    fn is_kilos(&self, link: &Found) -> bool {
        link.name == self.interface && link.name == KILOS_LINK && link.is_wireguard()
    }

    /// Finds what Kilo's `kg` has or left on this node.
    pub fn left_by_kilo(&self) -> anyhow::Result<KilosRemains> {
        let mut netlink = self.netlink();
        let link = dump::links(&mut netlink)?
            .iter()
            .any(|link| self.is_kilos(link));
        let rules = dump::rules(&mut netlink)?;
        let rules = rules.iter().filter(|rule| rule.table == KILOS_TABLE);
        let rules = rules.map(|rule| rule.priority).collect();
        let mut routes = 0;
        for v6 in [false, true] {
            routes += dump::routes(&mut netlink, v6, KILOS_TABLE)?.len();
        }
        Ok(KilosRemains {
            link,
            rules,
            routes,
        })
    }

    /// Fails if another program uses the agent's routing tables, or has a link of the tunnel's name that is
    /// neither a TUN device nor one that [`Self::take_over`] replaces.
    pub fn check(&self) -> anyhow::Result<()> {
        let mut netlink = self.netlink();
        let links = dump::links(&mut netlink)?;
        if let Some(link) = links.iter().find(|link| link.name == self.interface)
            && !link.is_tun()
            && !self.is_kilos(link)
        {
            return Err(Refusal::configuration(format!(
                "there is a link {} already, of the kind {}: delete it (ip link del {}), or choose another name with --interface",
                self.interface,
                link.kind.as_deref().unwrap_or("hardware"),
                self.interface
            ))
            .into());
        }
        let rules = dump::rules(&mut netlink)?;
        for table in Table::ALL.map(Table::id) {
            if let Some(found) = rules
                .iter()
                .find(|found| found.table == table && !found.is_ours())
            {
                return Err(Refusal::configuration(format!(
                    "the routing table {table} is used by another program's rule (priority {}): delete the rule",
                    found.priority
                ))
                .into());
            }
            for v6 in [false, true] {
                let routes = dump::routes(&mut netlink, v6, table)?;
                let foreign = routes
                    .iter()
                    .find(|message| u8::from(message.header.protocol) != PROTOCOL);
                if let Some(message) = foreign {
                    let dst = route::destination(message).map(|dst| dst.to_string());
                    return Err(Refusal::configuration(format!(
                        "the routing table {table} holds another program's route (to {}, protocol {}): delete it",
                        dst.unwrap_or_default(),
                        u8::from(message.header.protocol)
                    ))
                    .into());
                }
            }
        }
        Ok(())
    }
}
