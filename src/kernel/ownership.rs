//! What is the agent's and what is not: refuses to start on what others own, and removes all of its
//! own at the end.

use std::ops::RangeInclusive;

use super::{Kernel, list, route, rule};
use crate::diff::diff;
use crate::plan::{PROTOCOL, State, Table};
use crate::refusal::Refusal;

impl Kernel {
    /// Refuses to work where others already use what the agent would: a rule on one of its
    /// `priorities`, routes in its tables, a link that is no tunnel under its tunnel's name.
    pub fn check(&self, priorities: RangeInclusive<u32>) -> anyhow::Result<()> {
        let mut netlink = self.netlink();
        let links = list::links(&mut netlink)?;
        if let Some(link) = links.iter().find(|link| link.name == self.interface)
            && !link.is_tun()
        {
            return Err(Refusal::configuration(format!(
                "there is a link {} already, of the kind {}: delete it (ip link del {}), or choose another name with --interface",
                self.interface,
                link.kind.as_deref().unwrap_or("hardware"),
                self.interface
            ))
            .into());
        }
        let rules = list::rules(&mut netlink)?;
        if let Some(found) = rules
            .iter()
            .find(|found| priorities.contains(&found.priority) && !found.is_ours())
        {
            return Err(refuse_rule(found, &priorities).into());
        }
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
                let routes = list::routes(&mut netlink, v6, table)?;
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

    /// Removes all of the agent's and nothing else, as far as it goes; returns what could not be
    /// removed, each with the command that would.
    pub fn cleanup(&self) -> Vec<anyhow::Error> {
        let observed = match self.observe() {
            Ok(observed) => observed,
            Err(error) => return vec![error],
        };
        let changes = diff(&observed, &State::default());
        for change in &changes {
            tracing::info!("{change}");
        }
        self.apply_all(&changes)
            .into_iter()
            .map(|(change, error)| error.context(change.to_string()))
            .collect()
    }
}

fn refuse_rule(found: &rule::Found, priorities: &RangeInclusive<u32>) -> Refusal {
    Refusal::configuration(format!(
        "the routing rule priority {} is used by another program (lookup {}): choose another base for the priorities {} to {} with --rule-priority",
        found.priority,
        found.table,
        priorities.start(),
        priorities.end()
    ))
}
