//! The endpoint of a peer, and the local address that datagrams to it are sent from.
//!
//! A host may have several addresses, and a NAT in front of the peer lets in only datagrams from the one
//! that the peer sent to. So the source stays at that address, but not against the present route: where the
//! way back leads through another interface, the address may not be valid there, and a provider drops what
//! is sent from it. A datagram that still arrives through the earlier interface must not bring that source
//! back. So the route is looked up when a peer sends to another local address. If the datagram came through
//! another interface than before, the address becomes the source only after the look-up. If the route
//! disagrees, the kernel chooses the source. The kernel's WireGuard looks up the route of each packet
//! (`send4` in drivers/net/wireguard/socket.c).
//!
//! No I/O: the caller looks up the route and passes in the result.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::clock::Time;
use super::endpoint_rule::{Evidence, Kind, Situation};
use super::udp::Endpoint;
use super::way::Way;

/// An initiation less than this after an answer was sent before the answer could arrive.
const ANSWER_ARRIVES: Duration = Duration::from_secs(2);

/// The endpoint of a peer and what is known of its local address.
#[derive(Debug, Default)]
pub(super) struct Place {
    /// The direct endpoint.
    endpoint: Option<Endpoint>,
    /// The WireGuard address of a peer behind a relay. It comes before the direct endpoint.
    relayed: Option<IpAddr>,
    /// When something last came directly, and when the direct way was last proven to work both ways.
    heard: Option<Time>,
    proven: Option<Time>,
    /// Where the last initiation that was answered came from.
    answered_at: Option<SocketAddr>,
    /// An endpoint whose local address agrees with the route.
    trusted: Option<Endpoint>,
    /// An endpoint whose local address does not agree with the route.
    refused: Option<Endpoint>,
    /// An endpoint from whose local address an answer did not arrive, and was not tried again.
    failed: Option<Endpoint>,
    /// An endpoint that is being looked up.
    pending: Option<Endpoint>,
    /// The source of the last initiation that was answered, whether the answer was sent from the local
    /// address that it was sent to, and when.
    answered: Option<(Endpoint, bool, Time)>,
}

/// The effect of a message of a peer on its endpoint.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Roamed {
    /// The peer has another address or port than before.
    pub(super) moved: bool,
    /// The route back must be looked up.
    pub(super) look_up: bool,
}

impl Place {
    /// How datagrams are sent to the peer.
    pub(super) fn way(&self) -> Option<Way> {
        let relayed = self.relayed.map(Way::Relayed);
        relayed.or_else(|| self.endpoint.map(Way::Direct))
    }

    /// The direct endpoint, where datagrams are not sent through a relay.
    pub(super) fn direct(&self) -> Option<Endpoint> {
        self.endpoint.filter(|_| self.relayed.is_none())
    }

    /// Sets the endpoint.
    pub(super) fn set(&mut self, way: Option<Way>) {
        (self.endpoint, self.relayed) = match way {
            None => (None, None),
            Some(Way::Direct(endpoint)) => (Some(endpoint), None),
            Some(Way::Relayed(address)) => (self.endpoint, Some(address)),
        };
    }

    /// Moves the endpoint to the source of a message, if the message proves enough. `has_relay` tells whether a peer
    /// relays to an address.
    pub(super) fn roam(
        &mut self,
        from: Way,
        evidence: Evidence,
        has_relay: impl FnOnce(IpAddr) -> bool,
        now: Time,
    ) -> Roamed {
        let relayed = match from {
            Way::Direct(endpoint) => {
                let is_settled = self.relayed.is_none() && evidence == Evidence::Message;
                if is_settled && self.endpoint == Some(endpoint) {
                    self.heard = Some(now);
                    return Roamed::default();
                }
                self.relayed
            }
            Way::Relayed(address) if self.relayed == Some(address) => return Roamed::default(),
            Way::Relayed(address) => Some(address),
        };
        let kind = |way: Way| match way {
            Way::Direct(_) => Kind::Direct,
            Way::Relayed(_) => Kind::Relayed,
        };
        let before = self.way();
        let situation = Situation {
            present: before.map(kind),
            source: kind(from),
            evidence,
            was_answered_there: self.answered_at == Some(from.remote()),
            has_relay: relayed.is_some_and(has_relay),
            heard: self.heard,
            proven: self.proven,
        };
        let moves = situation.moves(now);
        if situation.proves_direct() {
            self.proven = Some(now);
        }
        let look_up = match from {
            Way::Direct(endpoint) => {
                self.heard = Some(now);
                if moves {
                    self.relayed = None;
                }
                moves && self.endpoint != Some(endpoint) && self.follow(endpoint)
            }
            Way::Relayed(address) => {
                if moves {
                    self.relayed = Some(address);
                }
                false
            }
        };
        Roamed {
            moved: self.way().map(Way::remote) != before.map(Way::remote),
            look_up,
        }
    }

    /// The same; true if the route back must be looked up.
    fn follow(&mut self, from: Endpoint) -> bool {
        if from.local.is_none() || self.trusted == Some(from) {
            self.endpoint = Some(from);
            return false;
        }
        let is_refused = self.refused == Some(from) || self.failed == Some(from);
        let interface = |endpoint: Endpoint| endpoint.local.map(|(_, interface)| interface);
        let current = self.endpoint.filter(|to| to.remote == from.remote);
        let is_likely = match current {
            // The peer has moved or uses another family: usually it sent to a valid address.
            None => true,
            // Another address of the interface that leads back.
            Some(current) => interface(current) == interface(from),
        };
        if is_likely && !is_refused {
            self.endpoint = Some(from);
        } else if current.is_none() {
            self.endpoint = Some(from.remote.into());
        }
        // One look-up at a time: the next datagram asks again, and no peer can make look-ups pile up.
        if is_refused || self.pending.is_some() {
            return false;
        }
        self.pending = Some(from);
        true
    }

    /// Records the result of a look-up.
    pub(super) fn judge(&mut self, from: Endpoint, leads: bool) {
        self.pending.take_if(|pending| *pending == from);
        if !leads {
            self.refuse(from);
        } else if self.failed != Some(from) {
            self.trusted = Some(from);
            // The peer has sent to another address of the same interface meanwhile: that one stays.
            let interface = |endpoint: &Endpoint| endpoint.local.map(|(_, interface)| interface);
            if let Some(endpoint) = &mut self.endpoint
                && endpoint.remote == from.remote
                && interface(endpoint) != interface(&from)
            {
                *endpoint = from;
            }
        }
    }

    /// Records that an initiation is answered; returns the endpoint for the answer.
    ///
    /// If the peer does not confirm an answer, the answer or the confirmation was lost. Then the next answer
    /// has the source that the kernel chooses, the one after it the local address that the peer sent to, and
    /// so on: one of the two is right.
    pub(super) fn answer(
        &mut self,
        from: Endpoint,
        leads: bool,
        is_unconfirmed: bool,
        now: Time,
    ) -> Endpoint {
        self.answered_at = Some(from.remote);
        let failed = self.answered.filter(|(to, _, at)| {
            is_unconfirmed && *to == from && now.since(*at) >= ANSWER_ARRIVES
        });
        let sticks = leads && !failed.is_some_and(|(_, sticks, _)| sticks);
        self.answered = Some((from, sticks, now));
        if sticks {
            self.failed.take_if(|failed| *failed == from);
            self.trusted = Some(from);
            from
        } else {
            self.refuse(from);
            self.failed = failed.map(|(to, ..)| to);
            from.remote.into()
        }
    }

    /// Records that an initiation through a relay is answered the same way.
    pub(super) fn answer_relayed(&mut self, from: Way) {
        self.answered_at = Some(from.remote());
    }

    fn refuse(&mut self, from: Endpoint) {
        self.trusted.take_if(|trusted| *trusted == from);
        self.refused = Some(from);
        if let Some(endpoint) = self.endpoint.as_mut().filter(|endpoint| **endpoint == from) {
            endpoint.local = None;
        }
    }

    /// Lets the kernel choose the source, and forgets what was looked up.
    pub(super) fn clear_source(&mut self) {
        if let Some(endpoint) = &mut self.endpoint {
            endpoint.local = None;
        }
        self.forget_judgements();
        self.failed = None;
    }

    /// Forgets what was looked up. It is looked up again when needed.
    pub(super) fn forget_judgements(&mut self) {
        (self.trusted, self.refused) = (None, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message comes directly, and there is no relay.
    fn roam(place: &mut Place, from: Endpoint) -> Roamed {
        place.roam(from.into(), Evidence::Message, |_| false, at(0))
    }

    fn endpoint(remote: &str, local: &str, interface: u32) -> Endpoint {
        Endpoint {
            remote: remote.parse().unwrap(),
            local: Some((local.parse::<IpAddr>().unwrap(), interface)),
        }
    }

    fn first() -> Endpoint {
        endpoint("192.0.2.1:5", "198.51.100.1", 1)
    }

    fn second() -> Endpoint {
        endpoint("192.0.2.1:5", "203.0.113.1", 2)
    }

    fn at(seconds: u64) -> Time {
        Time::from_duration(Duration::from_secs(1000 + seconds))
    }

    #[test]
    fn the_local_address_becomes_the_source_when_the_route_agrees() {
        let mut place = Place {
            endpoint: Some(first().remote.into()),
            ..Place::default()
        };
        assert!(roam(&mut place, first()).look_up);
        assert_eq!(place.endpoint, Some(first().remote.into()));
        assert!(!roam(&mut place, first()).look_up, "looked up twice");
        place.judge(first(), true);
        assert_eq!(place.endpoint, Some(first()));
        assert!(!roam(&mut place, first()).look_up);
    }

    #[test]
    fn a_datagram_through_the_earlier_uplink_does_not_bring_its_address_back() {
        let mut place = Place::default();
        assert!(roam(&mut place, first()).look_up);
        place.judge(first(), true);
        // The route changes, and some datagrams are still on the old path.
        place.clear_source();
        assert!(roam(&mut place, first()).look_up);
        place.judge(first(), false);
        assert_eq!(place.endpoint, Some(first().remote.into()));
        assert!(!roam(&mut place, first()).look_up);
        assert_eq!(place.endpoint, Some(first().remote.into()));
        // The peer follows, and the last of them arrive later.
        assert!(roam(&mut place, second()).look_up);
        place.judge(second(), true);
        assert!(!roam(&mut place, first()).look_up);
        assert_eq!(place.endpoint, Some(second()));
    }

    #[test]
    fn another_address_of_the_same_interface_is_the_source_at_once_and_is_looked_up() {
        let mut place = Place::default();
        assert!(roam(&mut place, first()).look_up);
        place.judge(first(), true);
        let other = endpoint("192.0.2.1:5", "198.51.100.2", 1);
        assert!(roam(&mut place, other).look_up);
        assert_eq!(place.endpoint, Some(other));
        place.judge(first(), true);
        assert_eq!(place.endpoint, Some(other));
        place.judge(other, false);
        assert_eq!(place.endpoint, Some(other.remote.into()));
    }

    #[test]
    fn a_peer_that_moves_is_answered_from_the_local_address_until_the_route_is_known() {
        let mut place = Place::default();
        assert!(roam(&mut place, first()).look_up);
        place.judge(first(), true);
        let moved = endpoint("192.0.2.9:5", "198.51.100.1", 1);
        assert!(roam(&mut place, moved).look_up);
        assert_eq!(place.endpoint, Some(moved));
        // A look-up of its earlier endpoint changes nothing.
        place.judge(first(), false);
        assert_eq!(place.endpoint, Some(moved));
        place.judge(moved, false);
        assert_eq!(place.endpoint, Some(moved.remote.into()));
    }

    #[test]
    fn after_a_lost_answer_the_next_one_has_another_source() {
        let mut place = Place::default();
        assert_eq!(place.answer(first(), true, false, at(0)), first());
        // Sent before the answer could arrive, or for another reason.
        assert_eq!(place.answer(first(), true, true, at(1)), first());
        assert_eq!(place.answer(first(), true, false, at(10)), first());
        // Not confirmed: the sources alternate.
        let chosen = Endpoint::from(first().remote);
        assert_eq!(place.answer(first(), true, true, at(15)), chosen);
        assert!(!roam(&mut place, first()).look_up);
        assert_eq!(place.endpoint, Some(chosen));
        // Routes are looked up now and then, which proves nothing about the answer.
        place.forget_judgements();
        assert!(!roam(&mut place, first()).look_up);
        assert_eq!(place.endpoint, Some(chosen));
        assert_eq!(place.answer(first(), true, true, at(20)), first());
        assert_eq!(place.answer(first(), true, true, at(25)), chosen);
    }

    #[test]
    fn no_answer_leaves_against_the_route() {
        let mut place = Place::default();
        let chosen = Endpoint::from(first().remote);
        assert_eq!(place.answer(first(), false, false, at(0)), chosen);
        assert_eq!(place.answer(first(), false, true, at(5)), chosen);
    }
}
