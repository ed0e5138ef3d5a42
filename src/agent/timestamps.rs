//! Keeps handshake timestamps in the state directory: how far this node's have come, and the greatest
//! that was accepted of each peer.
//!
//! The device decides when (`wireguard::Store`); the files are known here. They are caches like the state
//! beside them: what is damaged is ignored with a warning, and what cannot be written costs a warning.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::secure_file;
use crate::wireguard::{Accepted, Store, Tai64n, Timestamp};

/// What the initiations of the next run must be later than: seconds and nanoseconds since 1970.
const OWN: &str = "handshake-time";
/// A line for each peer: its key, and its timestamp in hexadecimal digits.
const ACCEPTED: &str = "accepted-handshakes";

/// Twice what the device keeps of peers.
const MAX_SIZE: u64 = 4 << 20;

/// The files below a state directory.
#[derive(Debug)]
pub struct Disk {
    state_dir: PathBuf,
}

impl Disk {
    /// Keeps timestamps below this directory, which exists.
    pub fn new(state_dir: PathBuf) -> Self {
        Self { state_dir }
    }

    fn replace(&self, name: &str, text: &str, consequence: &str) {
        if let Err(error) = secure_file::replace(&self.state_dir, name, text.as_bytes()) {
            let path = self.state_dir.join(name);
            tracing::warn!(path = %path.display(), %error, consequence, "writing timestamps failed");
        }
    }
}

impl Store for Disk {
    fn keep_own(&self, mark: Timestamp) {
        let mark = mark.to_unix();
        let text = format!("{}.{:09}\n", mark.as_secs(), mark.subsec_nanos());
        self.replace(
            OWN,
            &text,
            "after a restart with the clock set back, peers may refuse handshakes for a while",
        );
    }

    fn keep_accepted(&self, accepted: &Accepted) {
        let mut text = String::with_capacity(70 * accepted.len());
        for (key, timestamp) in accepted {
            let _ = write!(text, "{key} ");
            for byte in timestamp {
                let _ = write!(text, "{byte:02x}");
            }
            text.push('\n');
        }
        self.replace(
            ACCEPTED,
            &text,
            "after a restart, initiations that were recorded may be answered once more",
        );
    }
}

/// Reads what this node's initiations must be later than; zero where that is not known.
pub fn load_own(state_dir: &Path) -> Timestamp {
    let parse = |text: &str| {
        let text = text.trim();
        // Whole seconds were written by versions before 0.2.
        let (seconds, nanos) = text.split_once('.').unwrap_or((text, "0"));
        let context = "it is not a time in seconds";
        let (seconds, nanos) = (
            seconds.parse().context(context)?,
            nanos.parse().context(context)?,
        );
        ensure!(nanos < 1_000_000_000, context);
        Ok(Timestamp::from_unix(Duration::new(seconds, nanos)))
    };
    load(&state_dir.join(OWN), parse).unwrap_or_default()
}

/// Reads the greatest timestamps that were accepted of peers. A line that is damaged costs that peer's.
pub fn load_accepted(state_dir: &Path) -> Accepted {
    let path = state_dir.join(ACCEPTED);
    let parse = |text: &str| {
        let lines: Vec<_> = text.lines().map(accepted).collect();
        let damaged = lines.iter().filter(|line| line.is_none()).count();
        if damaged > 0 {
            tracing::warn!(path = %path.display(), count = damaged, "damaged timestamps ignored");
        }
        Ok(lines.into_iter().flatten().collect())
    };
    load(&path, parse).unwrap_or_default()
}

fn accepted(line: &str) -> Option<(crate::wireguard::key::PublicKey, Tai64n)> {
    let (key, digits) = line.split_once(' ')?;
    if digits.len() != 24 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    let mut timestamp = Tai64n::default();
    for (n, byte) in timestamp.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[2 * n..2 * n + 2], 16).ok()?;
    }
    Some((key.parse().ok()?, timestamp))
}

/// Reads a file; nothing where there is none, or where it is damaged, which is logged.
fn load<T>(path: &Path, parse: impl Fn(&str) -> anyhow::Result<T>) -> Option<T> {
    let read = secure_file::read(path, MAX_SIZE)
        .and_then(|text| text.map(|text| parse(&text)).transpose());
    read.unwrap_or_else(|error| {
        tracing::warn!(path = %path.display(), error = %format_args!("{error:#}"), "reading timestamps failed: starting without them");
        None
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::wireguard::key::PublicKey;

    #[test]
    fn the_nodes_own_timestamp_survives_to_the_nanosecond() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(load_own(dir.path()), Timestamp::default());
        let disk = Disk::new(dir.path().to_owned());
        for nanos in [0, 1, 999_999_999] {
            let used = Timestamp::from_unix(Duration::new(1_767_225_600, nanos));
            disk.keep_own(used);
            assert_eq!(load_own(dir.path()), used);
        }
    }

    #[test]
    fn a_file_of_whole_seconds_is_read_and_a_damaged_one_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let write = |text| {
            let path = dir.path().join(OWN);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        };
        write("1767225601\n");
        let seconds = load_own(dir.path()).to_unix();
        assert_eq!(seconds, Duration::from_secs(1_767_225_601));
        for text in ["nonsense", "1.x", "1.1000000000", "-1", ""] {
            write(text);
            assert_eq!(load_own(dir.path()), Timestamp::default(), "{text:?}");
        }
    }

    #[test]
    fn what_was_accepted_of_peers_survives_and_a_damaged_line_costs_one_peer() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(load_accepted(dir.path()), Accepted::new());
        let all: Accepted = (1..6).map(|n| (PublicKey([n; 32]), [n + 6; 12])).collect();
        Disk::new(dir.path().to_owned()).keep_accepted(&all);
        assert_eq!(load_accepted(dir.path()), all);

        let path = dir.path().join(ACCEPTED);
        let text = fs::read_to_string(&path).unwrap();
        let damaged = text.replacen("0707", "07é7", 1);
        fs::write(&path, format!("{damaged}more\n")).unwrap();
        let left = load_accepted(dir.path());
        assert_eq!(left.len(), 4);
        assert!(!left.contains_key(&PublicKey([1; 32])));
    }

    #[test]
    fn a_file_that_others_may_write_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let all = Accepted::from([(PublicKey([1; 32]), [7; 12])]);
        Disk::new(dir.path().to_owned()).keep_accepted(&all);
        let path = dir.path().join(ACCEPTED);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        assert_eq!(load_accepted(dir.path()), Accepted::new());
    }
}
