//! Lists what the kernel has, the agent's and other programs'. Each listing is one request, which the
//! kernel filters where it can.

use std::net::IpAddr;

use anyhow::Context as _;
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::netlink::{Netlink, Refused};
use super::{flannel_repair, link, route, rule};
use crate::flannel::Mac;

/// The index of a link, if there is one of this name.
pub(super) fn index(netlink: &mut Netlink, name: &str) -> anyhow::Result<Option<u32>> {
    match netlink.get(RouteNetlinkMessage::GetLink(link::to_get(name))) {
        Ok(answers) => Ok(answers.iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(message) => Some(message.header.index),
            _ => None,
        })),
        // No such link; a name longer than any link's.
        Err(refused) if [libc::ENODEV, libc::ERANGE].contains(&refused.errno()) => Ok(None),
        Err(refused) => Err(refused).with_context(|| format!("looking for the link {name}")),
    }
}

pub(super) fn links(netlink: &mut Netlink) -> anyhow::Result<Vec<link::Found>> {
    let answers = netlink
        .dump(RouteNetlinkMessage::GetLink(link::to_dump()))
        .context("listing links")?;
    Ok(answers
        .iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(message) => Some(link::from_message(message)),
            _ => None,
        })
        .collect())
}

/// The addresses of one link, or of all (0).
pub(super) fn addresses(netlink: &mut Netlink, index: u32) -> anyhow::Result<Vec<link::Address>> {
    let request = RouteNetlinkMessage::GetAddress(link::to_address_dump(index));
    let answers = netlink.dump(request).context("listing addresses")?;
    Ok(answers
        .iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewAddress(message) => link::from_address(message),
            _ => None,
        })
        .filter(|address| index == 0 || address.index == index)
        .collect())
}

/// All routes in one table.
pub(super) fn routes(
    netlink: &mut Netlink,
    v6: bool,
    table: u32,
) -> anyhow::Result<Vec<RouteMessage>> {
    let mut routes = routes_like(netlink, route::to_dump(v6, table))
        .with_context(|| format!("listing the routes of table {table}"))?;
    // An older kernel lists all tables, and another family where it lacks this one.
    routes.retain(|message| route::table(message) == table);
    Ok(routes)
}

/// The routes in table main that may be flannel's.
pub(super) fn flannel_routes(netlink: &mut Netlink, v6: bool) -> anyhow::Result<Vec<RouteMessage>> {
    let mut routes =
        routes_like(netlink, route::to_flannel_dump(v6)).context("listing flannel's routes")?;
    routes.retain(route::may_be_flannels);
    Ok(routes)
}

fn routes_like(netlink: &mut Netlink, like: RouteMessage) -> anyhow::Result<Vec<RouteMessage>> {
    let answers = match netlink.dump(RouteNetlinkMessage::GetRoute(like)) {
        Ok(answers) => answers,
        Err(refused) if is_absent(&refused) => Vec::new(),
        Err(refused) => return Err(refused.into()),
    };
    Ok(answers
        .into_iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(message) => Some(message),
            _ => None,
        })
        .collect())
}

pub(super) fn rules(netlink: &mut Netlink) -> anyhow::Result<Vec<rule::Found>> {
    let mut rules = Vec::new();
    for v6 in [false, true] {
        let answers = match netlink.dump(RouteNetlinkMessage::GetRule(rule::to_dump(v6))) {
            Ok(answers) => answers,
            Err(refused) if is_absent(&refused) => Vec::new(),
            Err(refused) => return Err(refused).context("listing routing rules"),
        };
        rules.extend(answers.iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRule(message) => rule::from_message(message),
            _ => None,
        }));
    }
    Ok(rules)
}

/// Whether a listing was refused because what it lists does not exist: a table without routes, or
/// IPv6 in a kernel without it.
fn is_absent(refused: &Refused) -> bool {
    [libc::ENOENT, libc::EAFNOSUPPORT, libc::EOPNOTSUPP].contains(&refused.errno())
}

/// The permanent neighbours on a link.
pub(super) fn neighbours(
    netlink: &mut Netlink,
    index: u32,
) -> anyhow::Result<Vec<(u32, IpAddr, Mac)>> {
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        found.extend(neighbours_of(netlink, family, index)?);
    }
    Ok(found)
}

/// The forwarding entries of a vxlan link: where it sends packets for a hardware address.
pub(super) fn forwarding(
    netlink: &mut Netlink,
    index: u32,
) -> anyhow::Result<Vec<(u32, IpAddr, Mac)>> {
    neighbours_of(netlink, AddressFamily::Bridge, index)
}

fn neighbours_of(
    netlink: &mut Netlink,
    family: AddressFamily,
    index: u32,
) -> anyhow::Result<Vec<(u32, IpAddr, Mac)>> {
    let request = RouteNetlinkMessage::GetNeighbour(flannel_repair::to_dump(family, index));
    let answers = match netlink.dump(request) {
        Ok(answers) => answers,
        Err(refused) if is_absent(&refused) => Vec::new(),
        Err(refused) => return Err(refused).context("listing neighbours"),
    };
    Ok(answers
        .iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewNeighbour(message) => flannel_repair::from_message(message),
            _ => None,
        })
        .filter(|(of, _, _)| *of == index)
        .collect())
}
