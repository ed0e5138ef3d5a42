//! Routing policy rules as netlink messages, and back. Pure.

use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{RouteHeader, RouteProtocol};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};

use crate::state::{OtherAction, OtherRule, PROTOCOL, Rule};

/// The mask of a rule that compares every bit of the mark.
const WHOLE_MARK: u32 = u32::MAX;
/// The kernel's value where no prefix length is suppressed.
const NOT_SUPPRESSED: u32 = u32::MAX;

/// The message that adds the rule, or deletes it.
pub(super) fn to_message(rule: &Rule) -> RuleMessage {
    let mut message = to_dump(rule.v6);
    message.header.action = RuleAction::ToTable;
    message.header.table = u8::try_from(rule.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.attributes = vec![
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::Table(rule.table),
        RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)),
    ];
    if let Some(from) = rule.from {
        message.header.src_len = from.prefix_len();
        message
            .attributes
            .push(RuleAttribute::Source(from.network()));
    }
    let iif = rule.iif.clone();
    message.attributes.extend(iif.map(RuleAttribute::Iifname));
    if let Some(mark) = rule.fwmark {
        message.attributes.extend([
            RuleAttribute::FwMark(mark),
            RuleAttribute::FwMask(WHOLE_MARK),
        ]);
    }
    if rule.not {
        message.header.flags |= RuleFlags::Invert;
    }
    message
}

/// The request for all rules of a family.
pub(super) fn to_dump(v6: bool) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = if v6 {
        AddressFamily::Inet6
    } else {
        AddressFamily::Inet
    };
    message
}

/// The kernel's table `local`.
pub(super) const LOCAL: u32 = 255;

/// A rule, of any program.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Found {
    pub(super) v6: bool,
    pub(super) priority: u32,
    pub(super) table: u32,
    pub(super) protocol: u8,
    /// The destinations that it selects; none for all.
    pub(super) to: Option<IpNet>,
    pub(super) action: OtherAction,
    /// `None` if it selects by a property that no rule of the agent uses.
    pub(super) rule: Option<Rule>,
}

impl Found {
    /// Whether the agent made it.
    pub(super) fn is_ours(&self) -> bool {
        self.protocol == PROTOCOL && self.rule.is_some()
    }

    /// The rule as one of another program.
    pub(super) fn to_other(&self) -> OtherRule {
        OtherRule {
            priority: self.priority,
            v6: self.v6,
            to: self.to,
            action: self.action,
        }
    }
}

/// The rule in a message; `None` where the family is not an IP.
pub(super) fn from_message(message: &RuleMessage) -> Option<Found> {
    let v6 = match message.header.family {
        AddressFamily::Inet => false,
        AddressFamily::Inet6 => true,
        _ => return None,
    };
    let header = &message.header;
    let mut rule = Rule {
        priority: 0,
        v6,
        from: None,
        iif: None,
        fwmark: None,
        not: header.flags.contains(RuleFlags::Invert),
        table: header.table.into(),
    };
    let mut protocol = 0;
    let (mut to, mut target, mut vrf) = (None, 0, false);
    let mut plain = header.action == RuleAction::ToTable && header.dst_len == 0 && header.tos == 0;
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Table(table) => rule.table = *table,
            RuleAttribute::Protocol(number) => protocol = u8::from(*number),
            RuleAttribute::Source(address) => {
                rule.from = IpNet::new(*address, header.src_len).ok();
            }
            RuleAttribute::Iifname(name) => rule.iif = Some(name.clone()),
            RuleAttribute::FwMark(mark) => rule.fwmark = Some(*mark),
            RuleAttribute::FwMask(mask) => plain &= *mask == WHOLE_MARK,
            RuleAttribute::SuppressPrefixLen(length) => plain &= *length == NOT_SUPPRESSED,
            RuleAttribute::Destination(address) => {
                plain = false;
                to = IpNet::new(*address, header.dst_len).ok();
            }
            RuleAttribute::Goto(priority) => {
                plain = false;
                target = *priority;
            }
            RuleAttribute::L3MDev(on) => {
                plain = false;
                vrf = *on;
            }
            _ => plain = false,
        }
    }
    let action = match header.action {
        RuleAction::ToTable if vrf => OtherAction::Vrf,
        RuleAction::ToTable if rule.table == LOCAL => OtherAction::Deliver,
        RuleAction::ToTable => OtherAction::Lookup(rule.table),
        RuleAction::Goto => OtherAction::Goto(target),
        _ => OtherAction::Refuse,
    };
    Some(Found {
        v6,
        priority: rule.priority,
        table: rule.table,
        protocol,
        // An inverted rule selects all other destinations.
        to: to.filter(|_| !rule.not),
        action,
        rule: plain.then_some(rule),
    })
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::{Emitable as _, Parseable as _};
    use proptest::prelude::*;

    use super::*;

    fn any_rule() -> impl Strategy<Value = Rule> {
        let from = prop_oneof![
            any::<[u8; 4]>().prop_map(|bytes| (std::net::IpAddr::from(bytes), 32)),
            any::<[u8; 16]>().prop_map(|bytes| (std::net::IpAddr::from(bytes), 128)),
        ];
        (
            1..32_766_u32,
            from,
            0..=32_u8,
            proptest::option::of(proptest::sample::select(vec!["lo", "kilo0"])),
            proptest::option::of(any::<u32>()),
            proptest::sample::select(vec![254, 5130, 5132]),
            any::<(bool, bool)>(),
        )
            .prop_map(
                |(priority, (address, _), length, iif, fwmark, table, (all, not))| Rule {
                    priority,
                    v6: address.is_ipv6(),
                    // A prefix of length 0 is every source.
                    from: (!all && length > 0)
                        .then(|| IpNet::new(address, length).unwrap().trunc()),
                    iif: iif.map(str::to_owned),
                    fwmark,
                    not,
                    table,
                },
            )
    }

    proptest! {
        #[test]
        fn every_rule_survives_the_round_trip_through_a_message(rule in any_rule()) {
            let message = to_message(&rule);
            let mut bytes = vec![0; message.buffer_len()];
            message.emit(&mut bytes);
            let found = from_message(&RuleMessage::parse(&bytes[..]).unwrap()).unwrap();
            prop_assert!(found.is_ours());
            prop_assert_eq!(found.rule, Some(rule));
        }
    }

    #[test]
    fn a_rule_with_further_selectors_is_not_the_agents() {
        let rule = Rule {
            priority: 5190,
            v6: false,
            from: None,
            iif: None,
            fwmark: Some(1),
            not: false,
            table: 5130,
        };
        let mut by_destination = to_message(&rule);
        by_destination.header.dst_len = 8;
        let mut masked = to_message(&rule);
        masked.attributes.push(RuleAttribute::FwMask(0xff));
        for message in [by_destination, masked] {
            assert!(!from_message(&message).unwrap().is_ours());
        }
    }

    #[test]
    fn vrf_rules_and_inverted_rules_are_decoded() {
        let mut vrf = to_dump(false);
        vrf.header.action = RuleAction::ToTable;
        vrf.attributes = vec![RuleAttribute::Priority(1000), RuleAttribute::L3MDev(true)];
        assert_eq!(from_message(&vrf).unwrap().action, OtherAction::Vrf);

        let mut not_there = to_dump(false);
        not_there.header.action = RuleAction::ToTable;
        not_there.header.dst_len = 16;
        not_there.header.flags |= RuleFlags::Invert;
        not_there.attributes = vec![
            RuleAttribute::Destination([172, 31, 0, 0].into()),
            RuleAttribute::Table(7120),
        ];
        let found = from_message(&not_there).unwrap();
        assert_eq!((found.to, found.action), (None, OtherAction::Lookup(7120)));
    }
}
