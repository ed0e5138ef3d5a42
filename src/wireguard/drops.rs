//! Why packets were dropped, counted.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal,)+) => {
        /// Why a packet or datagram went no further.
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
    /// A datagram to a session that is not, or no longer, known.
    UnknownIndex = "unknown_index",
    /// A datagram whose tag or MAC is wrong.
    Unauthentic = "unauthentic",
    /// A datagram that came before.
    Replayed = "replayed",
    /// A datagram of a session past its time or its number of messages.
    Expired = "expired",
    /// A decrypted packet whose source address belongs to another peer or to none.
    ForeignSource = "foreign_source",
    /// A decrypted packet to an address that no packet of another host is for: loopback, link-local,
    /// multicast, broadcast, unspecified, mapped.
    ForeignDestination = "foreign_destination",
    /// A packet to an address that no peer owns.
    NoPeer = "no_peer",
    /// A packet that fits into no datagram.
    TooBig = "too_big",
    /// A tunnel's datagram that is within too many tunnels, or goes round.
    TooDeep = "too_deep",
    /// A packet to a peer without an endpoint.
    NoEndpoint = "no_endpoint",
    /// A packet that waited too long for a session, or too many with it.
    NoSession = "no_session",
    /// A handshake message beyond what the limits allow.
    RateLimited = "rate_limited",
    /// A handshake message that met a full queue.
    QueueFull = "queue_full",
    /// A decrypted packet marked as having met congestion where its sender knows no such mark (RFC 6040).
    Congested = "congested",
    /// A datagram that the kernel did not take.
    SendFailed = "send_failed",
    /// A packet that the TUN device did not take.
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
