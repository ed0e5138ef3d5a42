//! Where a peer is, and from which of our addresses it is spoken to.
//!
//! A host may have several addresses, and a NAT in front of the peer lets in only what comes from the one
//! that the peer called. So the source sticks to that address, but not against the route of now: where
//! the way back leads through another interface, the address may not be valid there, and a provider drops
//! what is sent from it. A datagram that still arrives by the interface of before must not bring that
//! source back. So the route is looked up when a peer calls another address of ours. Where it comes by
//! another interface than before, the address is the source only after that; where the route says
//! otherwise, the kernel chooses the source. The kernel's WireGuard looks the route up for each packet
//! (`send4` in drivers/net/wireguard/socket.c).
//!
//! No I/O: who looks the route up tells the result.

use std::time::Duration;

use super::clock::Time;
use super::udp::Endpoint;

/// An initiation that follows an answer by less than this was sent before the answer could arrive.
const ANSWER_ARRIVES: Duration = Duration::from_secs(2);

/// Where a peer is.
#[derive(Debug, Default)]
pub(super) struct Place {
    pub(super) endpoint: Option<Endpoint>,
    /// The source in it agrees with the route.
    trusted: Option<Endpoint>,
    /// The source in it does not agree with the route.
    refused: Option<Endpoint>,
    /// An answer from there failed to come, and was not tried again.
    failed: Option<Endpoint>,
    /// Is being looked up.
    pending: Option<Endpoint>,
    /// What initiation was last answered, whether from the address that it called, and when.
    answered: Option<(Endpoint, bool, Time)>,
}

impl Place {
    /// Follows the peer to where a message came from; true if the route back is to be looked up.
    pub(super) fn roam(&mut self, from: Endpoint) -> bool {
        if self.endpoint == Some(from) {
            return false;
        }
        if from.local.is_none() || self.trusted == Some(from) {
            self.endpoint = Some(from);
            return false;
        }
        let is_refused = self.refused == Some(from) || self.failed == Some(from);
        let interface = |endpoint: Endpoint| endpoint.local.map(|(_, interface)| interface);
        let current = self.endpoint.filter(|to| to.remote == from.remote);
        let is_likely = match current {
            // It has moved, or speaks another family: as a rule it called a valid address.
            None => true,
            // Another address of the interface that is the way back.
            Some(current) => interface(current) == interface(from),
        };
        if is_likely && !is_refused {
            self.endpoint = Some(from);
        } else if current.is_none() {
            self.endpoint = Some(from.remote.into());
        }
        // One look-up at a time: the next datagram asks again, and no peer can make them pile up.
        if is_refused || self.pending.is_some() {
            return false;
        }
        self.pending = Some(from);
        true
    }

    /// Takes note of what was looked up.
    pub(super) fn judge(&mut self, from: Endpoint, leads: bool) {
        self.pending.take_if(|pending| *pending == from);
        if !leads {
            self.refuse(from);
        } else if self.failed != Some(from) {
            self.trusted = Some(from);
            // Another address of the same interface was called meanwhile, and stays.
            let interface = |endpoint: &Endpoint| endpoint.local.map(|(_, interface)| interface);
            if let Some(endpoint) = &mut self.endpoint
                && endpoint.remote == from.remote
                && interface(endpoint) != interface(&from)
            {
                *endpoint = from;
            }
        }
    }

    /// Takes note that an initiation is answered; returns where to, and from where.
    ///
    /// An answer that the peer does not confirm has failed to arrive, or its confirmation has. Then the
    /// next one leaves from where the kernel chooses, and the one after it from the address that was
    /// called, and so on: one of both is right.
    pub(super) fn answer(
        &mut self,
        from: Endpoint,
        leads: bool,
        is_unconfirmed: bool,
        now: Time,
    ) -> Endpoint {
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

    fn refuse(&mut self, from: Endpoint) {
        self.trusted.take_if(|trusted| *trusted == from);
        self.refused = Some(from);
        if let Some(endpoint) = self.endpoint.as_mut().filter(|endpoint| **endpoint == from) {
            endpoint.local = None;
        }
    }

    /// Lets the kernel choose, and forgets what was looked up.
    pub(super) fn clear_source(&mut self) {
        if let Some(endpoint) = &mut self.endpoint {
            endpoint.local = None;
        }
        self.forget_judgements();
        self.failed = None;
    }

    /// Forgets what was looked up, so that it is looked up again when it is needed.
    pub(super) fn forget_judgements(&mut self) {
        (self.trusted, self.refused) = (None, None);
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

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
    fn the_address_that_was_called_is_the_source_once_the_route_agrees() {
        let mut place = Place {
            endpoint: Some(first().remote.into()),
            ..Place::default()
        };
        assert!(place.roam(first()));
        assert_eq!(place.endpoint, Some(first().remote.into()));
        assert!(!place.roam(first()), "looked up twice");
        place.judge(first(), true);
        assert_eq!(place.endpoint, Some(first()));
        assert!(!place.roam(first()));
    }

    #[test]
    fn a_datagram_by_the_uplink_of_before_does_not_bring_its_address_back() {
        let mut place = Place::default();
        assert!(place.roam(first()));
        place.judge(first(), true);
        // The route moves, and some datagrams are still on the old way.
        place.clear_source();
        assert!(place.roam(first()));
        place.judge(first(), false);
        assert_eq!(place.endpoint, Some(first().remote.into()));
        assert!(!place.roam(first()));
        assert_eq!(place.endpoint, Some(first().remote.into()));
        // The peer follows, and the last of them arrive after that.
        assert!(place.roam(second()));
        place.judge(second(), true);
        assert!(!place.roam(first()));
        assert_eq!(place.endpoint, Some(second()));
    }

    #[test]
    fn another_address_of_the_same_interface_is_the_source_at_once_and_looked_up_all_the_same() {
        let mut place = Place::default();
        assert!(place.roam(first()));
        place.judge(first(), true);
        let other = endpoint("192.0.2.1:5", "198.51.100.2", 1);
        assert!(place.roam(other));
        assert_eq!(place.endpoint, Some(other));
        place.judge(first(), true);
        assert_eq!(place.endpoint, Some(other));
        place.judge(other, false);
        assert_eq!(place.endpoint, Some(other.remote.into()));
    }

    #[test]
    fn a_peer_that_moves_is_answered_from_where_it_called_until_the_route_is_known() {
        let mut place = Place::default();
        assert!(place.roam(first()));
        place.judge(first(), true);
        let moved = endpoint("192.0.2.9:5", "198.51.100.1", 1);
        assert!(place.roam(moved));
        assert_eq!(place.endpoint, Some(moved));
        // What was looked up meanwhile for where it was says nothing.
        place.judge(first(), false);
        assert_eq!(place.endpoint, Some(moved));
        place.judge(moved, false);
        assert_eq!(place.endpoint, Some(moved.remote.into()));
    }

    #[test]
    fn an_answer_that_fails_to_come_is_given_from_another_address() {
        let mut place = Place::default();
        assert_eq!(place.answer(first(), true, false, at(0)), first());
        // Sent before the answer could arrive, or for another reason.
        assert_eq!(place.answer(first(), true, true, at(1)), first());
        assert_eq!(place.answer(first(), true, false, at(10)), first());
        // Not confirmed: from the one, from the other, from the one.
        let chosen = Endpoint::from(first().remote);
        assert_eq!(place.answer(first(), true, true, at(15)), chosen);
        assert!(!place.roam(first()));
        assert_eq!(place.endpoint, Some(chosen));
        // The routes are looked up now and then, which says nothing of the answer.
        place.forget_judgements();
        assert!(!place.roam(first()));
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
