//! Whether an authenticated message moves a peer's endpoint, where the peer is reached directly, through a relay, or
//! both. Pure.
//!
//! WireGuard sends to where the last authenticated message came from. With a relay that is not enough. Packets under way
//! on the other way would move the endpoint back and forth, and a message proves only that its own direction works: the
//! way back may be the reason why there is a relay. So:
//!
//! - The relay gives way to a direct endpoint that is proven to work in both directions: an answer to an initiation of
//!   this side came from it, or a confirmation of an answer that was sent to it. Other messages from it change nothing,
//!   as long as the relay can be used.
//! - A direct endpoint gives way to the relay for an answer to an initiation that is younger than its own proof: the
//!   embedder sends initiations through a relay where it finds the direct way broken. Other messages through the relay
//!   move the endpoint only if nothing came directly for [`DIRECT_LASTS`].
//! - While no peer relays to the address, no message moves the endpoint there.
//!
//! Both ends thus end up on the same way: what moves one of them directly, an answer, leads to the confirmation that
//! moves the other. Between two direct endpoints everything is as without relays.

use std::time::Duration;

use super::clock::Time;
use super::timers::SILENT_AFTER;

/// A direct endpoint from which something came within this time does not give way to a message through a relay.
pub(super) const DIRECT_LASTS: Duration = SILENT_AFTER;

/// What a message proves about the way on which it came.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Evidence {
    /// It answers an initiation of this side, begun at this time: both directions work.
    Answer {
        /// When the initiation was sent.
        begun: Time,
    },
    /// It confirms a session. If the answer to the peer's initiation was sent on the same way, both directions work.
    Confirmation,
    /// That this direction works.
    Message,
}

/// A kind of way.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    /// Through the sockets.
    Direct,
    /// Through a relay.
    Relayed,
}

/// What is known when a message arrives.
#[derive(Clone, Copy, Debug)]
pub(super) struct Situation {
    /// The present endpoint.
    pub(super) present: Option<Kind>,
    /// How the message came.
    pub(super) source: Kind,
    /// What it proves.
    pub(super) evidence: Evidence,
    /// Whether the last answer to an initiation of the peer was sent to the message's source.
    pub(super) was_answered_there: bool,
    /// Whether a peer relays to the relayed address, of the present endpoint or of the source.
    pub(super) has_relay: bool,
    /// When something last came directly.
    pub(super) heard: Option<Time>,
    /// When the direct way was last proven to work in both directions.
    pub(super) proven: Option<Time>,
}

impl Situation {
    /// Whether the message proves that the direct way works in both directions.
    pub(super) fn proves_direct(&self) -> bool {
        self.source == Kind::Direct
            && match self.evidence {
                Evidence::Answer { .. } => true,
                Evidence::Confirmation => self.was_answered_there,
                Evidence::Message => false,
            }
    }

    /// Whether the endpoint moves to the source of the message.
    pub(super) fn moves(&self, now: Time) -> bool {
        match (self.present, self.source) {
            (None | Some(Kind::Direct), Kind::Direct) => true,
            (None | Some(Kind::Relayed), Kind::Relayed) => self.has_relay,
            (Some(Kind::Relayed), Kind::Direct) => !self.has_relay || self.proves_direct(),
            (Some(Kind::Direct), Kind::Relayed) => self.has_relay && self.direct_gives_way(now),
        }
    }

    fn direct_gives_way(&self, now: Time) -> bool {
        if let Evidence::Answer { begun } = self.evidence
            && self.proven.is_none_or(|proven| begun > proven)
        {
            return true;
        }
        self.heard.is_none_or(|at| now.since(at) >= DIRECT_LASTS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Time {
        Time::from_duration(Duration::from_secs(1000 + seconds))
    }

    fn from(source: Kind) -> Situation {
        Situation {
            present: Some(Kind::Direct),
            source,
            evidence: Evidence::Message,
            was_answered_there: false,
            has_relay: true,
            heard: Some(at(0)),
            proven: Some(at(0)),
        }
    }

    fn answer(seconds: u64) -> Evidence {
        Evidence::Answer { begun: at(seconds) }
    }

    #[test]
    fn a_direct_endpoint_follows_every_direct_message() {
        for evidence in [Evidence::Message, Evidence::Confirmation, answer(0)] {
            for present in [None, Some(Kind::Direct)] {
                let situation = Situation {
                    present,
                    evidence,
                    ..from(Kind::Direct)
                };
                assert!(situation.moves(at(0)), "{situation:?}");
            }
        }
    }

    #[test]
    fn a_direct_endpoint_that_was_heard_lately_stays_for_messages_through_a_relay() {
        for evidence in [Evidence::Message, Evidence::Confirmation] {
            let situation = Situation {
                evidence,
                was_answered_there: true,
                ..from(Kind::Relayed)
            };
            assert!(!situation.moves(at(4)), "{situation:?}");
            assert!(situation.moves(at(5)), "{situation:?}");
            let never_heard = Situation {
                heard: None,
                ..situation
            };
            assert!(never_heard.moves(at(0)));
        }
    }

    #[test]
    fn an_answer_through_a_relay_moves_unless_the_direct_way_was_proven_since_its_initiation() {
        let answered = |begun| Situation {
            evidence: answer(begun),
            heard: Some(at(10)),
            proven: Some(at(10)),
            ..from(Kind::Relayed)
        };
        assert!(answered(11).moves(at(11)));
        assert!(!answered(9).moves(at(11)));
        assert!(answered(9).moves(at(15)), "nothing came directly since");
        let never_proven = Situation {
            proven: None,
            ..answered(9)
        };
        assert!(never_proven.moves(at(11)));
    }

    #[test]
    fn a_relay_gives_way_to_a_direct_endpoint_that_works_both_ways() {
        let relayed = Situation {
            present: Some(Kind::Relayed),
            ..from(Kind::Direct)
        };
        let with = |evidence, was_answered_there| Situation {
            evidence,
            was_answered_there,
            ..relayed
        };
        assert!(with(answer(0), false).moves(at(0)));
        assert!(with(Evidence::Confirmation, true).moves(at(0)));
        // The confirmation of an answer that went through the relay shows one direction, as any message.
        assert!(!with(Evidence::Confirmation, false).moves(at(0)));
        assert!(!with(Evidence::Message, true).moves(at(100)));
    }

    #[test]
    fn no_message_moves_to_an_address_that_no_peer_relays_to() {
        for present in [None, Some(Kind::Direct), Some(Kind::Relayed)] {
            for evidence in [Evidence::Message, Evidence::Confirmation, answer(50)] {
                let situation = Situation {
                    present,
                    evidence,
                    has_relay: false,
                    ..from(Kind::Relayed)
                };
                assert!(!situation.moves(at(100)), "{situation:?}");
            }
        }
    }

    #[test]
    fn a_relay_that_is_gone_gives_way_to_any_direct_message() {
        let situation = Situation {
            present: Some(Kind::Relayed),
            has_relay: false,
            ..from(Kind::Direct)
        };
        assert!(situation.moves(at(0)));
    }

    /// Both ends, whatever their own evidence is, agree after one handshake on the direct way, and messages under way
    /// through the relay move neither back.
    #[test]
    fn a_direct_handshake_moves_both_ends_and_late_relayed_messages_move_none_back() {
        let initiator = Situation {
            present: Some(Kind::Relayed),
            evidence: answer(20),
            ..from(Kind::Direct)
        };
        let responder = Situation {
            present: Some(Kind::Relayed),
            evidence: Evidence::Confirmation,
            was_answered_there: true,
            ..from(Kind::Direct)
        };
        assert!(initiator.moves(at(20)) && responder.moves(at(20)));
        let late = Situation {
            heard: Some(at(20)),
            proven: Some(at(20)),
            ..from(Kind::Relayed)
        };
        let late_answer = Situation {
            evidence: answer(19),
            ..late
        };
        assert!(!late.moves(at(21)) && !late_answer.moves(at(21)));
    }
}
