//! Why packets were dropped, counted.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal,)+) => {
        /// The reason why a packet or datagram was dropped.
        #[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
        pub enum Dropped {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Dropped {
            /// Every reason.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The reason in a word or two, for metrics.
            pub const fn label(self) -> &'static str {
                match self {
                    $(Self::$name => $label,)+
                }
            }
        }
    };
}

reasons! {
    /// A datagram that is no WireGuard message, or a packet that is not IP.
    Malformed = "malformed",
    /// A datagram to an unknown or ended session.
    UnknownIndex = "unknown_index",
    /// A datagram whose tag or MAC is wrong.
    Unauthentic = "unauthentic",
    /// A datagram that was received before.
    Replayed = "replayed",
    /// A datagram of a session past its time or its number of messages.
    Expired = "expired",
    /// A decrypted packet whose source address belongs to another peer or to none.
    ForeignSource = "foreign_source",
    /// A decrypted packet to an address that is invalid between hosts: loopback, link-local, multicast,
    /// broadcast, unspecified, mapped.
    ForeignDestination = "foreign_destination",
    /// A packet to an address that no peer owns.
    NoPeer = "no_peer",
    /// A packet too long for a datagram.
    TooBig = "too_big",
    /// A tunnel's datagram within too many tunnels, or in a routing loop.
    TooDeep = "too_deep",
    /// A packet to a peer without an endpoint.
    NoEndpoint = "no_endpoint",
    /// A packet that waited too long for a session, or was one of too many.
    NoSession = "no_session",
    /// A handshake message beyond what the limits allow.
    RateLimited = "rate_limited",
    /// A handshake message for a full queue.
    QueueFull = "queue_full",
    /// A decrypted packet whose datagram is marked as congested although its sender supports no marks
    /// (RFC 6040).
    Congested = "congested",
    /// An echo to a diverted address that is too long, or one of too many that wait.
    NotDiverted = "not_diverted",
    /// A datagram to a peer behind a relay, while no peer relays to it, there is no session with that peer, or this
    /// device has no address for it.
    NoRelay = "no_relay",
    /// A relayed datagram from a peer that may not relay for its source, or from another port.
    ForeignRelay = "foreign_relay",
    /// A relayed datagram in another, or to a relay that is behind a relay itself.
    RelayedTwice = "relayed_twice",
    /// A datagram that the kernel refused to send.
    SendFailed = "send_failed",
    /// A packet that could not be read from or written to the TUN device.
    TunFailed = "tun_failed",
}

/// A counter for each reason.
#[derive(Debug)]
pub(super) struct Drops([AtomicU64; Dropped::ALL.len()]);

impl Default for Drops {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Drops {
    /// Counts packets.
    pub(super) fn add(&self, reason: Dropped, packets: u64) {
        if packets != 0 {
            self.0[reason as usize].fetch_add(packets, Ordering::Relaxed);
        }
    }

    /// The packets so far.
    pub(super) fn count(&self, reason: Dropped) -> u64 {
        self.0[reason as usize].load(Ordering::Relaxed)
    }
}
