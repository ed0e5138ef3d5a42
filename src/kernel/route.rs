//! Routes as netlink messages, and back. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::Context as _;
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHop,
    RouteNextHopFlags, RouteProtocol, RouteScope, RouteType, RouteVia,
};
use rtnetlink::{RouteMessageBuilder, RouteNextHopBuilder};

use crate::state::{MAIN, NextHop, PROTOCOL, Route, RouteKey, Table};

/// The indexes of links by their names.
pub(super) type Indexes = BTreeMap<String, u32>;
/// The names of links by their indexes.
pub(super) type Names = BTreeMap<u32, String>;

/// The flag that locks a route's MTU (`mtu lock`): bit `RTAX_MTU`, which is 2.
///
/// A forwarded IPv6 packet gets the MTU of the outgoing device unless the route's MTU is locked
/// (`ip6_dst_mtu_maybe_forward`); for IPv4 the route's MTU always counts. Without the lock a follower would
/// forward packets that fit flannel's device, and its leader would refuse them.
const MTU_LOCKED: RouteMetric = RouteMetric::Lock(1 << 2);

/// The message that adds the route, or replaces the one with the same key.
pub(super) fn to_message(
    key: &RouteKey,
    route: &Route,
    indexes: &Indexes,
) -> anyhow::Result<RouteMessage> {
    let message = to_key(key)?.protocol(RouteProtocol::Other(PROTOCOL));
    let (next_hops, src, mtu) = match route {
        Route::Throw => return Ok(message.kind(RouteType::Throw).build()),
        Route::Unreachable => return Ok(message.kind(RouteType::Unreachable).build()),
        Route::Blackhole => return Ok(message.kind(RouteType::BlackHole).build()),
        Route::Unicast {
            next_hops,
            src,
            mtu,
        } => (next_hops, src, mtu),
    };
    let v6 = key.dst.addr().is_ipv6();
    // As `ip` has it: without a gateway, the destination is taken to be on the link.
    let on_link = !v6 && next_hops.iter().all(|hop| hop.via.is_none());
    let mut message = if on_link {
        message.scope(RouteScope::Link)
    } else {
        message
    };
    let mut hops = next_hops.iter();
    message = match (hops.next(), hops.next()) {
        (Some(hop), None) => {
            let message = message.output_interface(index(&hop.dev, indexes)?);
            let message = if hop.onlink {
                message.onlink()
            } else {
                message
            };
            match hop.via {
                Some(via) => message.gateway(via)?,
                None => message,
            }
        }
        _ => {
            let hops = next_hops.iter().map(|hop| to_hop(hop, v6, indexes));
            message.multipath(hops.collect::<anyhow::Result<Vec<_>>>()?)
        }
    };
    if let Some(src) = src {
        message = message.pref_source(*src)?;
    }
    if let Some(mtu) = mtu {
        let lock = v6.then_some(MTU_LOCKED);
        let metrics = lock.into_iter().chain([RouteMetric::Mtu(*mtu)]).collect();
        let attributes = &mut message.get_mut().attributes;
        attributes.push(RouteAttribute::Metrics(metrics));
    }
    Ok(message.build())
}

/// The message that deletes the route with this key, of any kind.
pub(super) fn to_key_message(key: &RouteKey) -> anyhow::Result<RouteMessage> {
    Ok(to_key(key)?
        .protocol(RouteProtocol::Unspec)
        .scope(RouteScope::NoWhere)
        .kind(RouteType::Unspec)
        .build())
}

fn to_key(key: &RouteKey) -> anyhow::Result<RouteMessageBuilder> {
    let message = RouteMessageBuilder::<IpAddr>::new()
        .table_id(key.table.id())
        .destination_prefix(key.dst.network(), key.dst.prefix_len())?;
    Ok(if key.metric == 0 {
        message
    } else {
        message.priority(key.metric)
    })
}

/// The request for all routes of a table.
///
/// Not from a builder: what a builder sets by default would filter the answer.
pub(super) fn to_dump(v6: bool, table: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = if v6 {
        AddressFamily::Inet6
    } else {
        AddressFamily::Inet
    };
    message.header.table = u8::try_from(table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.attributes.push(RouteAttribute::Table(table));
    message
}

/// The request for flannel's routes: those in table main without a protocol of their own.
///
/// The kernel filters, so a router's hundred thousand other routes cost nothing here.
pub(super) fn to_flannel_dump(v6: bool) -> RouteMessage {
    let mut message = to_dump(v6, MAIN);
    message.header.protocol = RouteProtocol::Boot;
    message
}

/// Whether a route may be flannel's: it sets no protocol, and its routes have a gateway.
pub(super) fn may_be_flannels(message: &RouteMessage) -> bool {
    message.header.protocol == RouteProtocol::Boot
        && table(message) == MAIN
        && via(&message.attributes).is_some()
}

fn to_hop(hop: &NextHop, v6: bool, indexes: &Indexes) -> anyhow::Result<RouteNextHop> {
    let family = if v6 {
        AddressFamily::Inet6
    } else {
        AddressFamily::Inet
    };
    let mut message = RouteNextHopBuilder::new(family).interface(index(&hop.dev, indexes)?);
    if hop.onlink {
        message = message.onlink();
    }
    if let Some(via) = hop.via {
        message = message.via(via)?;
    }
    Ok(message.build())
}

fn index(link: &str, indexes: &Indexes) -> anyhow::Result<u32> {
    indexes
        .get(link)
        .copied()
        .with_context(|| format!("there is no link {}", crate::text::quote(link)))
}

/// The table a message is about.
pub(super) fn table(message: &RouteMessage) -> u32 {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Table(table) => Some(*table),
            _ => None,
        })
        .unwrap_or_else(|| message.header.table.into())
}

/// The route in a message about one of the agent's own tables; `None` if it is about another, or has
/// a key that none of the agent's routes can have.
///
/// A route that the agent could not have made (a prohibition, an encapsulation) comes out as one
/// without next hops, which equals none that it makes.
pub(super) fn from_message(message: &RouteMessage, names: &Names) -> Option<(RouteKey, Route)> {
    let id = table(message);
    let table = Table::ALL.into_iter().find(|table| table.id() == id)?;
    let header = &message.header;
    if header.tos != 0 || header.source_prefix_length != 0 {
        return None;
    }
    let mut parts = Parts::of(message);
    if message.header.address_family == AddressFamily::Inet6 && !parts.locked {
        parts.mtu = None;
    }
    let key = RouteKey {
        table,
        dst: destination(message)?,
        metric: parts.metric,
    };
    let foreign = Route::Unicast {
        next_hops: BTreeSet::new(),
        src: None,
        mtu: None,
    };
    let route = match header.kind {
        RouteType::Throw => Route::Throw,
        RouteType::Unreachable => Route::Unreachable,
        RouteType::BlackHole => Route::Blackhole,
        RouteType::Unicast if !parts.foreign => Route::Unicast {
            next_hops: next_hops(message, names),
            src: parts.src,
            mtu: parts.mtu,
        },
        _ => foreign,
    };
    Some((key, route))
}

/// The destination of a route.
pub(super) fn destination(message: &RouteMessage) -> Option<IpNet> {
    let address = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(address) => to_ip(address),
            _ => None,
        });
    let address = match (address, message.header.address_family) {
        (Some(address), _) => address,
        (None, AddressFamily::Inet) => IpAddr::from([0; 4]),
        (None, AddressFamily::Inet6) => IpAddr::from([0; 16]),
        (None, _) => return None,
    };
    IpNet::new(address, message.header.destination_prefix_length).ok()
}

/// The next hops of a unicast route. A link that no longer exists gets an impossible name.
pub(super) fn next_hops(message: &RouteMessage, names: &Names) -> BTreeSet<NextHop> {
    let name = |index: u32| {
        names
            .get(&index)
            .cloned()
            .unwrap_or_else(|| format!("link/{index}"))
    };
    let mut hops = BTreeSet::new();
    for attribute in &message.attributes {
        if let RouteAttribute::MultiPath(multiple) = attribute {
            hops.extend(multiple.iter().map(|hop| NextHop {
                via: via(&hop.attributes),
                dev: name(hop.interface_index),
                onlink: hop.flags.contains(RouteNextHopFlags::Onlink),
            }));
        }
        if let RouteAttribute::Oif(index) = attribute {
            hops.insert(NextHop {
                via: via(&message.attributes),
                dev: name(*index),
                onlink: message.header.flags.contains(RouteFlags::Onlink),
            });
        }
    }
    hops
}

/// The properties of a route besides its next hops.
#[derive(Default)]
struct Parts {
    metric: u32,
    src: Option<IpAddr>,
    mtu: Option<u32>,
    /// Whether the MTU is locked.
    locked: bool,
    /// Whether it has a property that the agent never sets.
    foreign: bool,
}

impl Parts {
    fn of(message: &RouteMessage) -> Self {
        let mut parts = Self::default();
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Priority(metric) => parts.metric = *metric,
                RouteAttribute::PrefSource(address) => parts.src = to_ip(address),
                RouteAttribute::Metrics(metrics) => {
                    for metric in metrics {
                        match metric {
                            RouteMetric::Mtu(mtu) => parts.mtu = Some(*mtu),
                            lock if *lock == MTU_LOCKED => parts.locked = true,
                            _ => parts.foreign = true,
                        }
                    }
                }
                RouteAttribute::Encap(_) | RouteAttribute::NhId(_) => parts.foreign = true,
                _ => {}
            }
        }
        parts
    }
}

fn via(attributes: &[RouteAttribute]) -> Option<IpAddr> {
    attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(address) => to_ip(address),
        RouteAttribute::Via(RouteVia::Inet(address)) => Some((*address).into()),
        RouteAttribute::Via(RouteVia::Inet6(address)) => Some((*address).into()),
        _ => None,
    })
}

/// The address of a route of either IP.
pub(super) fn to_ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::{Emitable as _, Parseable as _};
    use proptest::prelude::*;

    use super::*;
    use crate::state::BACKSTOP_METRIC;

    fn links() -> (Indexes, Names) {
        let links = [(1, "lo"), (3, "flannel.1"), (7, "kilo0"), (9, "eth0")];
        (
            links.map(|(index, name)| (name.to_owned(), index)).into(),
            links.map(|(index, name)| (index, name.to_owned())).into(),
        )
    }

    /// Encodes and decodes, as on the way to the kernel and back.
    fn round_trip(key: &RouteKey, route: &Route) -> Option<(RouteKey, Route)> {
        let (indexes, names) = links();
        let message = to_message(key, route, &indexes).unwrap();
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        from_message(&RouteMessage::parse(&bytes[..]).unwrap(), &names)
    }

    fn any_address(v6: bool) -> BoxedStrategy<IpAddr> {
        if v6 {
            any::<[u8; 16]>().prop_map(IpAddr::from).boxed()
        } else {
            any::<[u8; 4]>().prop_map(IpAddr::from).boxed()
        }
    }

    fn any_hop(v6: bool) -> impl Strategy<Value = NextHop> {
        (
            proptest::option::of(any_address(v6)),
            proptest::sample::select(vec!["flannel.1", "kilo0", "eth0"]),
            any::<bool>(),
        )
            .prop_map(|(via, dev, onlink)| NextHop {
                via,
                dev: dev.to_owned(),
                onlink,
            })
    }

    fn any_route(v6: bool) -> impl Strategy<Value = Route> {
        prop_oneof![
            Just(Route::Unreachable),
            Just(Route::Blackhole),
            Just(Route::Throw),
            (
                proptest::collection::btree_set(any_hop(v6), 1..4),
                proptest::option::of(any_address(v6)),
                proptest::option::of(1280..9000_u32),
            )
                .prop_map(|(next_hops, src, mtu)| Route::Unicast {
                    next_hops,
                    src,
                    mtu
                }),
        ]
    }

    fn any_entry() -> impl Strategy<Value = (RouteKey, Route)> {
        any::<bool>().prop_flat_map(|v6| {
            let length = if v6 { 0..=128_u8 } else { 0..=32_u8 };
            let key = (
                proptest::sample::select(&Table::ALL[..]),
                any_address(v6),
                length,
                proptest::sample::select(vec![0, 512, BACKSTOP_METRIC]),
            )
                .prop_map(|(table, address, length, metric)| RouteKey {
                    table,
                    dst: IpNet::new(address, length).unwrap().trunc(),
                    metric,
                });
            (key, any_route(v6))
        })
    }

    proptest! {
        #[test]
        fn every_route_survives_the_round_trip_through_a_message((key, route) in any_entry()) {
            prop_assert_eq!(round_trip(&key, &route), Some((key, route)));
        }
    }

    #[test]
    fn the_error_for_a_missing_link_names_the_link() {
        let key = RouteKey {
            table: Table::Mesh,
            dst: "10.42.2.0/24".parse().unwrap(),
            metric: 0,
        };
        let route = Route::Unicast {
            next_hops: [NextHop {
                via: None,
                dev: "kilo9".to_owned(),
                onlink: false,
            }]
            .into(),
            src: None,
            mtu: None,
        };
        let error = to_message(&key, &route, &links().0).unwrap_err();
        assert_eq!(error.to_string(), "there is no link kilo9");
    }

    #[test]
    fn routes_of_other_tables_are_ignored() {
        let mut message = to_dump(false, MAIN);
        message.header.kind = RouteType::Unicast;
        assert_eq!(from_message(&message, &Names::new()), None);
    }
}
