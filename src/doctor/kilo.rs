//! Finds links, rules and routes of Kilo's `kg` on this node, for migrations between Kilo and Selvedge.

use super::Finding;
use crate::config::Config;
use crate::kernel::{KilosRemains, Rtnetlink};

/// The remains of Kilo, with remedies.
pub(super) fn findings(config: &Config) -> Vec<Finding> {
    match Rtnetlink::open(&config.interface).and_then(|kernel| kernel.left_by_kilo()) {
        Ok(remains) => of(&remains, &config.interface),
        Err(error) => vec![Finding::warning(
            format!("Links, rules and routes could not be read: {error:#}."),
            "Run this as root on the node.",
        )],
    }
}

fn of(remains: &KilosRemains, interface: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    if remains.link {
        findings.push(Finding::note(format!(
            "{interface} is a WireGuard link of the kernel, which Kilo creates and leaves behind: a starting agent replaces it."
        )));
    }
    if remains.rules.is_empty() && remains.routes == 0 {
        return findings;
    }
    let mut priorities = remains.rules.clone();
    priorities.sort_unstable();
    priorities.dedup();
    let rules = match priorities.as_slice() {
        [] => "no rule points to it".to_owned(),
        some => {
            let some: Vec<_> = some.iter().map(u32::to_string).collect();
            format!("the rules of priority {} point to it", some.join(", "))
        }
    };
    let mut remedy = "If no kg runs on this node: ".to_owned();
    for priority in &priorities {
        remedy.push_str(&format!("ip rule del pref {priority} lookup 1107; "));
    }
    remedy.push_str("ip route flush table 1107.");
    findings.push(Finding::warning(
        format!(
            "Kilo's routing table 1107 is not empty (routes: {}), and {rules}.",
            remains.routes
        ),
        remedy,
    ));
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_without_remains_of_kilo_has_no_findings() {
        assert!(of(&KilosRemains::default(), "kilo0").is_empty());
    }

    #[test]
    fn kilos_remains_are_listed_with_commands_to_remove_them() {
        let remains = KilosRemains {
            link: true,
            rules: vec![32765, 32764, 32764],
            routes: 2,
        };
        let text: Vec<_> = of(&remains, "kilo0")
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            text,
            [
                "note: kilo0 is a WireGuard link of the kernel, which Kilo creates and leaves behind: a starting agent replaces it.",
                "warning: Kilo's routing table 1107 is not empty (routes: 2), and the rules of priority 32764, 32765 point to it.\n  to do: If no kg runs on this node: ip rule del pref 32764 lookup 1107; ip rule del pref 32765 lookup 1107; ip route flush table 1107.",
            ]
        );
    }
}
