//! Verdicts on liveness: every verdict of the agent on whether a peer or node is alive. Pure, on values.
//!
//! | verdict | question | made from | decides |
//! |---|---|---|---|
//! | [`is_heard`] | Did this peer ever answer? | handshake | readiness; what is published of its endpoint |
//! | [`is_alive`] | Does the session carry packets? | handshake, bytes received | where routes and datagrams go |
//! | [`is_suspect`] | Is an answer overdue? | unanswered packets | the search at its candidates |
//! | [`is_silent`] | Are keepalives missing? | bytes received | the search at its candidates |
//! | [`looks_dead`] | Should it be shown as a problem? | handshake | `status`, `doctor` |
//! | [`may_lead`] | May this node lead its region, or speak for others? | the Node's `Ready` | the topology; Events |
//! | [`PathState`] | Do packets get through, by or to this leader? | echoes, see [`path`] | next hops and the tunnel's routes |
//!
//! Whether the tunnel can encrypt at all (it has a session) stays inside [`crate::wireguard`].

pub mod path;

use std::time::Duration;

use crate::wireguard::{REJECT_AFTER_TIME, SILENT_AFTER};

/// What was sent and not answered for so long makes a peer suspect; the tunnel reports the peer then.
const SUSPECT: Duration = SILENT_AFTER;
/// The same for a peer that was suspected and answered at its present endpoint. One that only receives says
/// nothing for ten seconds (WireGuard paper, 6.5: KEEPALIVE_TIMEOUT), and is no more suspected for it.
const SUSPECT_PATIENTLY: Duration = Duration::from_secs(12);
/// Beside two keepalives of which neither arrived: how late they may be.
const LATE: Duration = Duration::from_secs(5);

/// What is known of one peer's answers.
#[derive(Clone, Copy, Debug)]
pub struct Signs {
    /// Since the last handshake; `None` where there was none.
    pub handshake: Option<Duration>,
    /// Since something last came from the peer, or since it is watched.
    pub received: Duration,
    /// The seconds between the keepalives that the peer sends unprompted; 0 for none.
    pub keepalive: u16,
}

/// What echoes say of a path: through a leader of the own region, or to a leader of another one.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub enum PathState {
    /// Echoes come back.
    Up,
    /// No echo has come back yet, or no echoes are sent.
    #[default]
    Unknown,
    /// Echoes come back again, for too short a time to prefer the path to one that was up all along.
    Returning,
    /// Echoes come back, and say that the leader is about to stop.
    Draining,
    /// Echoes came back once, and do not any more.
    Down(Cause),
}

impl PathState {
    /// Whether echoes over the path come back.
    pub fn answers(self) -> bool {
        match self {
            Self::Up | Self::Returning | Self::Draining => true,
            Self::Unknown | Self::Down(_) => false,
        }
    }
}

/// Why a path is down.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Cause {
    /// Echoes do not come back.
    Silent,
    /// The leader answers, and says that it does not forward for its region.
    NotForwarding,
}

/// Whether the peer ever answered.
pub fn is_heard(handshake: Option<Duration>) -> bool {
    handshake.is_some()
}

/// Whether the session with the peer carries packets.
///
/// A peer without keepalives may be silent for minutes while it is alive. When its session has ended as well,
/// it is not.
pub fn is_alive(signs: Signs) -> bool {
    signs
        .handshake
        .is_some_and(|age| age < REJECT_AFTER_TIME || !is_silent(signs))
}

/// Whether an answer is overdue. `unanswered` is how long ago the first packet was sent after something
/// last came; `patiently` is for a peer that was suspected in vain.
pub fn is_suspect(unanswered: Option<Duration>, patiently: bool) -> bool {
    let limit = if patiently {
        SUSPECT_PATIENTLY
    } else {
        SUSPECT
    };
    unanswered.is_some_and(|since| since >= limit)
}

/// Whether the peer said nothing for longer than two of its keepalives, or than a session lasts.
pub fn is_silent(signs: Signs) -> bool {
    let limit = match signs.keepalive {
        0 => REJECT_AFTER_TIME,
        seconds => 2 * Duration::from_secs(seconds.into()) + LATE,
    };
    signs.received >= limit
}

/// Whether the age of the last handshake says that nothing comes through: handshakes are renewed every two minutes while there
/// is traffic, and keepalives, which this node sends every `keepalive` seconds, are traffic (paper, 6.1).
pub fn looks_dead(handshake: Option<Duration>, keepalive: u16) -> bool {
    handshake.is_none_or(|age| age > REJECT_AFTER_TIME && keepalive > 0)
}

/// Whether a node with this `Ready` condition may lead its region, or write Events for others.
pub fn may_lead(ready: bool) -> bool {
    ready
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    fn signs(handshake: Option<u64>, received: u64, keepalive: u16) -> Signs {
        Signs {
            handshake: handshake.map(seconds),
            received: seconds(received),
            keepalive,
        }
    }

    #[test]
    fn a_peer_without_a_handshake_is_not_alive() {
        assert!(!is_heard(None));
        assert!(!is_alive(signs(None, 0, 25)));
        assert!(looks_dead(None, 0));
    }

    #[test]
    fn a_session_keeps_a_silent_peer_alive_until_it_ends() {
        assert!(is_alive(signs(Some(179), 179, 25)));
        assert!(!is_alive(signs(Some(180), 180, 25)));
        assert!(is_alive(signs(Some(200), 50, 25)), "keepalives come");
        assert!(!is_alive(signs(Some(200), 180, 0)));
    }

    #[test]
    fn two_keepalives_that_are_missing_make_a_peer_silent() {
        assert!(!is_silent(signs(Some(60), 54, 25)));
        assert!(is_silent(signs(Some(60), 55, 25)));
        assert!(!is_silent(signs(Some(60), 179, 0)));
    }

    #[test]
    fn an_answer_is_overdue_after_five_seconds_or_twelve() {
        assert!(!is_suspect(None, false));
        assert!(!is_suspect(Some(seconds(4)), false));
        assert!(is_suspect(Some(seconds(5)), false));
        assert!(!is_suspect(Some(seconds(11)), true));
        assert!(is_suspect(Some(seconds(12)), true));
    }

    #[test]
    fn an_old_handshake_looks_dead_where_keepalives_would_have_renewed_it() {
        assert!(!looks_dead(Some(seconds(180)), 25));
        assert!(looks_dead(Some(seconds(181)), 25));
        assert!(!looks_dead(Some(seconds(900)), 0));
    }
}
