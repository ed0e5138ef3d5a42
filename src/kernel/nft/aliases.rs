//! The part of the table that translates aliases of the own region.
//!
//! What this host and its pods send to an alias of their region gets the node's address, and is tracked, so that answers
//! come from the alias. Packets of other regions get the address at the tunnel, where no state is kept.

use std::collections::BTreeSet;

use super::{Family, TABLE, Text, one_of};

/// What the names of the maps begin with.
const MAP: &str = "aliases";
/// Before kube-proxy's rules (`dstnat`), for which an alias means nothing.
const PRIORITY: i32 = -101;

impl Text<'_> {
    /// The families with a pool. Their maps exist even if they are empty, so that the rules stay when they fill.
    fn alias_families(&self) -> Vec<Family> {
        let pools = self.firewall.alias_pools.iter();
        let families = pools.map(Family::of).collect::<BTreeSet<_>>();
        families.into_iter().collect()
    }

    /// `{ alias : address }`, or `None` where the region has none of the family.
    fn aliases(&self, family: Family) -> Option<String> {
        let aliases = self.firewall.region_aliases.iter();
        let aliases = aliases.filter(|(alias, _)| alias.is_ipv6() == (family == Family::V6));
        let pairs = aliases.map(|(alias, address)| format!("{alias} : {address}"));
        let pairs = pairs.collect::<Vec<_>>();
        (!pairs.is_empty()).then(|| one_of(pairs))
    }

    /// The maps, with their elements or without.
    pub(super) fn alias_maps(&mut self, filled: bool) {
        for family in self.alias_families() {
            let kind = family.protocol();
            self.line(0, "");
            self.line(1, format!("map {MAP}{} {{", family.digit()));
            self.rule(format!("type {kind}_addr : {kind}_addr"));
            if let Some(elements) = self.aliases(family).filter(|_| filled) {
                self.rule(format!("elements = {elements}"));
            }
            self.line(1, "}");
        }
    }

    /// The elements of the maps, in place of those of a table of the same frame.
    pub(super) fn alias_elements(&mut self) {
        for family in self.alias_families() {
            let map = format!("inet {TABLE} {MAP}{}", family.digit());
            self.line(0, format!("flush map {map}"));
            if let Some(elements) = self.aliases(family) {
                self.line(0, format!("add element {map} {elements}"));
            }
        }
    }

    /// The chains that translate.
    pub(super) fn translate_aliases(&mut self) {
        let families = self.alias_families();
        if families.is_empty() {
            return;
        }
        let of_pods = format!("iifname != \"{}\" ", self.firewall.tunnel);
        for (name, hook, from) in [
            ("aliases_of_pods", "prerouting", of_pods.as_str()),
            ("aliases_of_host", "output", ""),
        ] {
            let hook = format!("nat hook {hook} priority {PRIORITY}");
            self.chain(name, Some(&hook), |text| {
                for family in &families {
                    let ip = family.ip();
                    let map = format!("@{MAP}{}", family.digit());
                    text.rule(format!("{from}dnat {ip} to {ip} daddr map {map}"));
                }
            });
        }
    }
}
