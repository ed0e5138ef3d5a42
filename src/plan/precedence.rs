//! The priorities of the agent's rules among the rules of other programs.
//!
//! The kernel evaluates rules in the order of their priorities, and the first route found decides. A rule of
//! another program before the agent's may find flannel's route to a pod of another region, or a default route to
//! a node there. So the agent's rules come before every such rule. Pure.

use ipnet::IpNet;

use crate::state::{OtherAction, OtherRule, RULES};

/// The priorities of the agent's rules.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Place {
    /// The priority of the first of [`RULES`] rules.
    pub first: u32,
    /// A rule of another program that comes before them, because no priorities are free before it.
    pub obstacle: Option<OtherRule>,
}

impl OtherRule {
    /// Whether it may send a packet for one of these destinations elsewhere.
    fn diverts<'a>(&self, mut destinations: impl Iterator<Item = &'a IpNet>) -> bool {
        match self.action {
            OtherAction::Deliver | OtherAction::Vrf | OtherAction::Refuse => false,
            OtherAction::Lookup(_) | OtherAction::Goto(_) => match self.to {
                None => true,
                Some(to) => destinations.any(|net| net.contains(&to) || to.contains(net)),
            },
        }
    }
}

/// Chooses the priorities of the agent's rules, the same for both families: from `preferred` on if no rule
/// before that sends packets for one of the `destinations` elsewhere, else right before the first that does. A
/// priority of another program's rule is not used.
pub fn place<'a, I>(preferred: u32, others: &[OtherRule], destinations: impl Fn() -> I) -> Place
where
    I: Iterator<Item = &'a IpNet>,
{
    let obstacle = others
        .iter()
        .filter(|rule| rule.priority < preferred + RULES && rule.diverts(destinations()))
        .min();
    let limit = obstacle.map_or(u32::MAX, |rule| rule.priority);
    let highest = preferred.min(limit.saturating_sub(RULES));
    let is_free = |first: &u32| {
        let taken = |rule: &OtherRule| (*first..first + RULES).contains(&rule.priority);
        !others.iter().any(taken)
    };
    match (1..=highest).rev().find(is_free) {
        Some(first) => Place {
            first,
            obstacle: None,
        },
        None => Place {
            first: preferred,
            obstacle: obstacle.cloned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::MAIN;

    fn rule(priority: u32, action: OtherAction) -> OtherRule {
        OtherRule {
            priority,
            v6: false,
            to: None,
            action,
        }
    }

    fn chosen(others: &[OtherRule]) -> Place {
        let pods: IpNet = "10.42.0.0/16".parse().unwrap();
        place(5190, others, || std::iter::once(&pods))
    }

    fn first(others: &[OtherRule]) -> u32 {
        let place = chosen(others);
        assert_eq!(place.obstacle, None);
        place.first
    }

    #[test]
    fn the_preferred_priority_is_used_where_no_rule_is_in_the_way() {
        let main = rule(32766, OtherAction::Lookup(MAIN));
        let local = rule(0, OtherAction::Deliver);
        let vrf = rule(1000, OtherAction::Vrf);
        let proxy = rule(9, OtherAction::Deliver);
        let prohibit = rule(50, OtherAction::Refuse);
        let tailscale = rule(5210, OtherAction::Lookup(MAIN));
        assert_eq!(first(&[local, proxy, prohibit, vrf, tailscale, main]), 5190);
    }

    #[test]
    fn the_agents_rules_come_before_those_of_a_vpn() {
        let suppress = rule(100, OtherAction::Lookup(MAIN));
        let vpn = rule(110, OtherAction::Lookup(7120));
        assert_eq!(first(&[suppress, vpn]), 97);
    }

    #[test]
    fn a_rule_for_other_destinations_is_not_in_the_way() {
        let to = |net: &str| OtherRule {
            to: Some(net.parse().unwrap()),
            ..rule(100, OtherAction::Lookup(7120))
        };
        assert_eq!(first(&[to("172.16.0.0/12")]), 5190);
        assert_eq!(first(&[to("10.0.0.0/8")]), 97);
        assert_eq!(first(&[to("10.42.7.9/32")]), 97);
    }

    #[test]
    fn a_rule_that_skips_the_agents_is_in_the_way() {
        assert_eq!(first(&[rule(5000, OtherAction::Goto(32766))]), 4997);
    }

    #[test]
    fn priorities_of_other_programs_are_not_used() {
        let harmless = rule(5191, OtherAction::Refuse);
        assert_eq!(first(&[harmless]), 5188);
        let close = rule(98, OtherAction::Refuse);
        assert_eq!(first(&[close, rule(100, OtherAction::Lookup(9))]), 95);
    }

    #[test]
    fn a_rule_with_no_free_priorities_before_it_is_reported() {
        for priority in [0, 1, 3] {
            let obstacle = rule(priority, OtherAction::Lookup(2004));
            let place = chosen(&[rule(4000, OtherAction::Lookup(9)), obstacle.clone()]);
            assert_eq!(place.first, 5190);
            assert_eq!(place.obstacle, Some(obstacle));
        }
        assert_eq!(first(&[rule(4, OtherAction::Lookup(2004))]), 1);
    }
}
