//! Reads and changes the kernel: the only caller of netlink, nft and sysctl.
//!
//! [`Kernel::observe`] reads what the agent owns, [`Kernel::apply`] makes one change of a diff; both
//! are idempotent, and neither remembers what the kernel knows. The tunnel's port and peers belong to
//! the tunnel device ([`crate::wireguard`]).
//!
//! A [`Kernel`] has two parts, for two threads. [`Rtnetlink`] takes microseconds a call. [`NftTable`]
//! runs the program `nft`: some milliseconds, and seconds if `nft` hangs. Neither waits for the other.
//!
//! All calls work in the network namespace of the thread that opened the part, and must be made from
//! threads of the same namespace.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "netlink's messages and attributes are many and get more; each function wants a few"
)]

mod dump;
pub mod flannel_repair;
mod guard;
mod link;
mod monitor;
mod netlink;
mod nfnetlink;
pub mod nft;
mod nft_identity;
mod nft_table;
mod other_rules;
mod ownership;
mod route;
mod rtnetlink;
mod rule;
pub(crate) mod subprocess;
mod sysctl;
mod underlay;

pub use self::guard::guard;
pub use self::monitor::{Event, Monitor, classify};
pub use self::nft_table::{Counters, NftTable};
pub use self::ownership::KilosRemains;
pub use self::rtnetlink::Rtnetlink;
pub use self::sysctl::ipv6_is_off;
pub use self::underlay::{LocalAddress, Path, Uplink};
use crate::diff::{Change, KernelChange, diff};
use crate::state::State;

/// The kernel of this node, in one network namespace.
#[derive(Debug)]
pub struct Kernel {
    /// Links, addresses, routes and rules.
    pub rtnetlink: Rtnetlink,
    /// The agent's nft table.
    pub nft: NftTable,
}

impl Kernel {
    /// Opens the sockets; `interface` is the tunnel's link, whether or not it exists yet.
    ///
    /// # Errors
    ///
    /// Where the kernel gives no netlink socket.
    pub fn open(interface: &str) -> anyhow::Result<Self> {
        Ok(Self {
            rtnetlink: Rtnetlink::open(interface)?,
            nft: NftTable::open()?,
        })
    }

    /// Reads everything the agent owns, but for the tunnel's port and peers.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses a listing.
    pub fn observe(&self) -> anyhow::Result<State> {
        Ok(State {
            firewall: self.nft.observe()?,
            ..self.rtnetlink.observe()?
        })
    }

    /// Makes one change. It is no error if all is already so.
    ///
    /// # Errors
    ///
    /// Where the kernel or `nft` refuses it, and for a change of the tunnel device.
    pub fn apply(&self, change: &KernelChange) -> anyhow::Result<()> {
        if is_nft(change) {
            self.nft.apply(change)
        } else {
            self.rtnetlink.apply(change)
        }
    }

    /// Makes changes in their order and returns those that failed. One that fails does not keep
    /// those behind it from being made.
    pub fn apply_all<'a>(
        &self,
        changes: &[&'a KernelChange],
    ) -> Vec<(&'a KernelChange, anyhow::Error)> {
        let mut failed = Vec::new();
        for run in changes.chunk_by(|a, b| is_nft(a) == is_nft(b)) {
            if !run.first().is_some_and(|change| is_nft(change)) {
                failed.extend(self.rtnetlink.apply_all(run));
                continue;
            }
            for &change in run {
                if let Err(error) = self.nft.apply(change) {
                    failed.push((change, error));
                }
            }
        }
        failed
    }

    /// Removes all that the agent owns and nothing else, as far as possible. Returns what could not be
    /// removed, each with the command that would remove it.
    pub fn cleanup(&self) -> Vec<anyhow::Error> {
        let observed = match self.observe() {
            Ok(observed) => observed,
            Err(error) => return vec![error],
        };
        let changes = diff(&observed, &State::default());
        // Nothing of the tunnel's is observed.
        let changes = changes.iter().filter_map(Change::of_kernel);
        let changes: Vec<_> = changes.collect();
        for change in &changes {
            tracing::info!(%change, "removing agent state");
        }
        self.apply_all(&changes)
            .into_iter()
            .map(|(change, error)| error.context(change.to_string()))
            .collect()
    }
}

/// Whether a change is made to the nft table ([`NftTable`]), and not by [`Rtnetlink`].
pub fn is_nft(change: &KernelChange) -> bool {
    matches!(
        change,
        KernelChange::ReplaceFirewall(_) | KernelChange::DeleteFirewall
    )
}
