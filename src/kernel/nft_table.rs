//! Installs the agent's nft table with the `nft` program, and detects changes to it.
//!
//! After a change the table is listed (without counters), and a digest of the listing is stored in it as
//! the comment of a rule, with the identities of the requested table and of its frame (the table without
//! the elements of its sets). So any process can see which table this is, whether it was modified since,
//! independently of how this version of `nft` prints it, and whether new elements suffice in place of a new table.
//! nf_tables' generation number shows without a listing that nothing changed.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ::subprocess::{Exec, Process};
use anyhow::{Context as _, anyhow, bail, ensure};

use super::nfnetlink::Nfnetlink;
use super::nft::{self, SEAL, TABLE, frame, render, render_elements};
use super::nft_identity::digest;
use super::subprocess::{self, Failure};
use crate::clock::now;
use crate::diff::KernelChange;
use crate::refusal::Refusal;
use crate::state::{Firewall, FirewallId, Ruleset};

/// How the comment that seals the table starts.
const SEALED: &str = "installed";
/// How much of `nft`'s error output an error repeats, in bytes: the first line and the faulty rule.
const MAX_COMPLAINT: usize = 400;
/// How long `nft` may take. It loads a table for 5,000 nodes well within a second. If it takes longer than
/// this, it waits for a lock or in the kernel, for an unknown time.
const PATIENCE: Duration = Duration::from_secs(10);
/// The pause after a timeout before `nft` is run again: half of the time at most is spent on it.
const REST: Duration = PATIENCE;

/// The agent's table in the kernel.
#[derive(Debug)]
pub struct NftTable {
    installer: Mutex<Installer>,
    /// A socket of its own, so that the counters are read while `nft` hangs.
    counters: Mutex<Nfnetlink>,
}

/// What needs the program `nft`.
#[derive(Debug)]
struct Installer {
    netlink: Nfnetlink,
    /// The last result of a listing, and nf_tables' generation before it.
    last: Option<(u32, Option<Seal>)>,
    nft: Nft,
}

/// The identities in a table's seal.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Seal {
    requested: FirewallId,
    /// The requested table without the elements of its sets; none for an unknown table.
    frame: Option<FirewallId>,
}

impl Seal {
    const UNKNOWN: Self = Self {
        requested: FirewallId::UNKNOWN,
        frame: None,
    };
}

/// The program `nft`.
#[derive(Debug, Default)]
struct Nft {
    /// A run that was killed after its timeout, and when.
    late: Option<(Process, Instant)>,
}

/// The table's counters, in packets.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counters {
    /// Dropped: they would have left the region in clear.
    pub leak_drops: u64,
    /// Left the region in clear, with `--on-tunnel-down=open`.
    pub leaks: u64,
    /// Dropped: a leader received them from its region for another one, and would have sent them back.
    pub loop_drops: u64,
    /// Dropped: a pod sent them to the port of VXLAN or of the tunnel or to an address for echoes, or they were VXLAN
    /// out of the tunnel.
    pub pod_drops: u64,
    /// Dropped: they came from outside the mesh into it, or out of the tunnel to outside the region.
    pub stranger_drops: u64,
    /// Dropped: they came out of the tunnel and would have gone into it again.
    pub transit_drops: u64,
}

impl NftTable {
    /// Opens the sockets.
    ///
    /// # Errors
    ///
    /// Where the kernel gives no netlink socket.
    pub fn open() -> anyhow::Result<Self> {
        let open = || Nfnetlink::open().context("opening a socket to nf_tables");
        let installer = Installer {
            netlink: open()?,
            last: None,
            nft: Nft::default(),
        };
        Ok(Self {
            installer: Mutex::new(installer),
            counters: Mutex::new(open()?),
        })
    }

    /// What the table is, if it is there. Runs `nft` if nf_tables changed since the last call, so it may
    /// take [`PATIENCE`].
    ///
    /// # Errors
    ///
    /// Where the kernel does not answer. Without `nft` the table is unknown, which is no error.
    pub fn observe(&self) -> anyhow::Result<Option<Ruleset>> {
        let seal = self.installer().look()?;
        Ok(seal.map(|seal| Ruleset::Installed(seal.requested)))
    }

    /// Makes one change of a diff; see [`super::is_nft`].
    ///
    /// # Errors
    ///
    /// Those of [`Self::replace`] and [`Self::delete`], and for any other change.
    pub fn apply(&self, change: &KernelChange) -> anyhow::Result<()> {
        match change {
            KernelChange::ReplaceFirewall(firewall) => self.replace(firewall),
            KernelChange::DeleteFirewall => self.delete(),
            other => Err(anyhow!("nft does not make this change: {other}")),
        }
    }

    /// Makes the table this one, in one transaction. Where only the elements of its sets differ, the rules
    /// stay where they are, and a packet sees either the old elements or the new. Takes [`PATIENCE`] at
    /// most for each of three runs of `nft`.
    ///
    /// # Errors
    ///
    /// Where `nft` is missing, refuses the table, or takes too long.
    pub fn replace(&self, firewall: &Firewall) -> anyhow::Result<()> {
        self.installer().replace(firewall)
    }

    /// Deletes the table. It is no error if there is none.
    ///
    /// # Errors
    ///
    /// As for [`Self::replace`].
    pub fn delete(&self) -> anyhow::Result<()> {
        self.installer().delete()
    }

    /// What the table has counted, in packets; all zero where it is not there. Never waits for `nft`.
    ///
    /// # Errors
    ///
    /// Where the kernel does not answer.
    pub fn counters(&self) -> anyhow::Result<Counters> {
        let mut netlink = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        if !exists(&mut netlink)? {
            return Ok(Counters::default());
        }
        let mut packets = |name| {
            netlink
                .packets(TABLE, name)
                .with_context(|| format!("reading the counter {name}"))
        };
        Ok(Counters {
            leak_drops: packets(nft::LEAK_DROPS)?,
            leaks: packets(nft::LEAKS)?,
            loop_drops: packets(nft::LOOP_DROPS)?,
            transit_drops: packets(nft::TRANSIT_DROPS)?,
            pod_drops: packets(nft::POD_DROPS)?,
            stranger_drops: packets(nft::STRANGER_DROPS)?,
        })
    }

    fn installer(&self) -> MutexGuard<'_, Installer> {
        // It stays usable after a panic of the thread that held it.
        self.installer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Installer {
    fn look(&mut self) -> anyhow::Result<Option<Seal>> {
        // Read before the listing: what changes in between makes the next call list again.
        let generation = self
            .netlink
            .generation()
            .context("asking nf_tables for its generation")?;
        if let Some((last, seal)) = self.last
            && last == generation
        {
            return Ok(seal);
        }
        let seal = if exists(&mut self.netlink)? {
            match self.nft.list() {
                Ok(listing) => Some(sealed(&listing).unwrap_or(Seal::UNKNOWN)),
                // Without `nft` the table is unknown. A call that replaces or deletes it gets the error.
                Err(error) => {
                    tracing::debug!(error = %format_args!("{error:#}"), "listing the nft table failed");
                    return Ok(Some(Seal::UNKNOWN));
                }
            }
        } else {
            None
        };
        self.last = Some((generation, seal));
        Ok(seal)
    }

    fn replace(&mut self, firewall: &Firewall) -> anyhow::Result<()> {
        let names = firewall.vxlan.keys().chain(&firewall.region_devices);
        for name in names.chain([&firewall.tunnel]) {
            // The kernel allows nearly every character in a name, nft's language does not.
            ensure!(
                is_plain(name),
                "the name of the link {} cannot be written in nft's language",
                crate::text::quote(name)
            );
        }
        let frame = frame(firewall);
        let text = match self.look()? {
            Some(seal) if seal.frame == Some(frame) => {
                let elements = render_elements(firewall);
                format!("flush chain inet {TABLE} {SEAL}\n{elements}")
            }
            _ => render(firewall),
        };
        self.nft.run(&["-f", "-"], &text)?;
        let content = digest(self.nft.list()?.as_bytes());
        let comment = comment(firewall.id(), frame, content);
        self.nft.run(
            &["-f", "-"],
            &format!("add rule inet {TABLE} {SEAL} continue comment \"{comment}\"\n"),
        )?;
        Ok(())
    }

    fn delete(&mut self) -> anyhow::Result<()> {
        if exists(&mut self.netlink)? {
            self.nft.run(&["delete", "table", "inet", TABLE], "")?;
        }
        Ok(())
    }
}

fn exists(netlink: &mut Nfnetlink) -> anyhow::Result<bool> {
    netlink
        .has_table(TABLE)
        .context("asking nf_tables for the table inet selvedge")
}

/// The comment that seals a table.
fn comment(requested: FirewallId, frame: FirewallId, listed: FirewallId) -> String {
    format!("{SEALED} {} {} {}", hex(requested), hex(frame), hex(listed))
}

/// The seal in a listing; none if the rest of the listing is not what was sealed.
fn sealed(listing: &str) -> Option<Seal> {
    let mut content = String::with_capacity(listing.len());
    let mut comment = None;
    for line in listing.split_inclusive('\n') {
        match line.split_once(&format!("comment \"{SEALED} ")) {
            Some((_, rest)) if comment.is_none() => {
                comment = Some(rest.trim_end().strip_suffix('"')?);
            }
            _ => content.push_str(line),
        }
    }
    let mut identities = comment?.split(' ');
    let (requested, frame, listed) = (identities.next()?, identities.next()?, identities.next()?);
    let intact = identities.next().is_none() && listed == hex(digest(content.as_bytes()));
    intact.then_some(Seal {
        requested: from_hex(requested)?,
        frame: Some(from_hex(frame)?),
    })
}

fn hex(id: FirewallId) -> String {
    id.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<FirewallId> {
    let number = u128::from_str_radix(text, 16).ok()?;
    (text.len() == 32).then(|| FirewallId(number.to_be_bytes()))
}

fn is_plain(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    !name.is_empty() && name.bytes().all(plain)
}

impl Nft {
    /// The table as `nft` prints it, without the values of counters.
    fn list(&mut self) -> anyhow::Result<String> {
        self.run(&["--stateless", "list", "table", "inet", TABLE], "")
    }

    /// Runs `nft` and returns what it prints.
    fn run(&mut self, arguments: &[&str], input: &str) -> anyhow::Result<String> {
        self.check_late()?;
        let output = match subprocess::run(nft(arguments), input.as_bytes(), PATIENCE) {
            Ok(output) => output,
            Err(Failure::NotRun(error)) if error.kind() == io::ErrorKind::NotFound => {
                return Err(missing().into());
            }
            Err(Failure::NotRun(error)) => return Err(error).context("running the program nft"),
            Err(Failure::TimedOut(process)) => {
                self.late = Some((process, now()));
                return Err(late());
            }
        };
        if !output.exit_status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr);
            let complaint = crate::text::line(complaint.trim());
            let complaint: String = complaint.chars().take(MAX_COMPLAINT).collect();
            bail!(
                "nft {}: {complaint} ({})",
                arguments.join(" "),
                output.exit_status
            );
        }
        String::from_utf8(output.stdout).context("reading what nft printed")
    }

    /// Fails while a killed `nft` still exists, so that never two of them run, and during the pause.
    fn check_late(&mut self) -> anyhow::Result<()> {
        if let Some((process, killed)) = &self.late {
            if process.poll().is_none() || killed.elapsed() < REST {
                return Err(late());
            }
            self.late = None;
        }
        Ok(())
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "nft is the one program the agent runs: no maintained crate speaks enough of nf_tables"
)]
fn nft(arguments: &[&str]) -> Exec {
    Exec::cmd("nft").args(arguments).env("LC_ALL", "C")
}

fn missing() -> Refusal {
    Refusal::configuration(
        "the program nft is not on the PATH: install nftables 1.0 or newer, or use the container image, which carries it",
    )
}

/// One sentence for all calls, so that it is reported once.
fn late() -> anyhow::Error {
    anyhow!(
        "the program nft took longer than {} s and was ended, so the firewall stays as it is while all else goes on; it is tried again, but see what holds nf_tables on this node (ps -e, dmesg)",
        PATIENCE.as_secs()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTING: &str = "table inet selvedge {\n\tchain transit {\n\t\ticmp type 8 notrack\n\t}\n\n\tchain seal {\n\t}\n}\n";

    fn with_seal(listing: &str, comment: &str) -> String {
        let rule = format!("\tchain seal {{\n\t\tcontinue comment \"{comment}\"\n");
        listing.replace("\tchain seal {\n", &rule)
    }

    #[test]
    fn a_sealed_table_identifies_what_it_was_made_from() {
        let (requested, frame) = (FirewallId([7; 16]), FirewallId([8; 16]));
        let comment = comment(requested, frame, digest(LISTING.as_bytes()));
        assert!(comment.len() <= 128, "nft refuses longer comments");

        let frame = Some(frame);
        assert_eq!(
            sealed(&with_seal(LISTING, &comment)),
            Some(Seal { requested, frame })
        );
    }

    #[test]
    fn a_modified_table_has_no_identity() {
        let id = FirewallId([7; 16]);
        let comment = comment(id, id, digest(LISTING.as_bytes()));
        let listing = with_seal(LISTING, &comment);

        let modified = [
            listing.replace("icmp", "icmpv6"),
            listing.replace("\t\ticmp type 8 notrack\n", ""),
            listing.replace(&comment, "installed"),
            listing.replace(&comment, "installed 07 07 07"),
            listing.replace(&comment, &format!("{comment} 07")),
            listing.replace("continue", "continue comment \"installed x\"\n\t\tcontinue"),
            LISTING.to_owned(),
            String::new(),
        ];
        for listing in modified {
            assert_eq!(sealed(&listing), None, "{listing}");
        }
    }

    #[test]
    fn link_names_that_nft_cannot_quote_are_refused() {
        for name in ["", "kilo0\"", "a b", "x;y", "kilo0\n"] {
            assert!(!is_plain(name), "{name:?}");
        }
        assert!(is_plain("flannel-v6.1"));
    }
}
