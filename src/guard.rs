//! `selvedge guard`: the agent's `unreachable` routes are in force at the next boot, before the agent runs.
//!
//! After a reboot flannel and pods are up before the agent, and flannel sends to other regions in clear. So
//! the agent saves the rules of its last desired [`State`] and its routes without next hops (`unreachable`,
//! `throw`) to a file. systemd runs this command before the kubelet (see [`install`]), and the command adds
//! them. It needs netlink and the file, and no API server, flannel, `nft` or link. The agent finds the same
//! rules and routes, keeps them, and adds the routes through the tunnel.
//!
//! Changes of the cluster while the node was off are not in the file. Nor is the nft table: it names links
//! and addresses of flannel's, and the agent installs it in its first pass.

use std::collections::BTreeSet;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, anyhow};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::envelope::Envelope;
use crate::kernel;
use crate::node_lock::agent_runs;
use crate::refusal::Refusal;
use crate::state::{Route, RouteKey, Rule, State};
use crate::{preflight, secure_file};

pub mod boots;
pub mod install;

/// The file's name below `--state-dir`.
pub(crate) const FILE: &str = "guard.json";
/// The version of the file's format; it changes with any type in it.
pub const FORMAT: u32 = 1;
/// Some 100 bytes a route, and a route or two for each of five thousand nodes' addresses and prefixes.
const MAX_SIZE: u64 = 16 << 20;

/// The flags of `selvedge guard`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Directory in which the agent keeps what is to be guarded
    #[arg(long, value_name = "DIR", default_value = "/var/lib/selvedge")]
    pub state_dir: PathBuf,
    /// Instead of guarding, copy this program into DIR/bin and have systemd run it before the kubelet
    #[arg(long)]
    pub install: bool,
    /// Instead of guarding, remove what --install and the agent wrote for the guard
    #[arg(long, conflicts_with = "install")]
    pub uninstall: bool,
    /// With --install, the unit that starts the kubelet (repeatable) [default: k3s.service,
    /// k3s-agent.service, kubelet.service]
    #[arg(long = "unit", value_name = "UNIT", requires = "install", value_parser = install::unit)]
    pub units: Vec<String>,
    /// Directory of this host's own systemd units
    #[arg(long, value_name = "DIR", default_value = install::SYSTEMD)]
    pub systemd_dir: PathBuf,
}

/// The content of the file: all rules of a [`State`], and its routes that need no link.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Guard {
    /// The tunnel's link, whose lock a running agent holds.
    interface: String,
    rules: BTreeSet<Rule>,
    unreachable: BTreeSet<RouteKey>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    blackhole: BTreeSet<RouteKey>,
    throw: BTreeSet<RouteKey>,
}

impl Guard {
    /// The part of a state to guard. Empty if no route is `unreachable` (`--on-tunnel-down=open`).
    pub fn of(state: &State) -> Self {
        let keys = |wanted: &Route| {
            let routes = state.routes.iter();
            let routes = routes.filter(|(_, route)| *route == wanted);
            routes.map(|(key, _)| *key).collect::<BTreeSet<_>>()
        };
        let unreachable = keys(&Route::Unreachable);
        if unreachable.is_empty() {
            return Self::default();
        }
        let link = state.link.as_ref();
        Self {
            interface: link.map(|link| link.name.clone()).unwrap_or_default(),
            rules: state.rules.clone(),
            throw: keys(&Route::Throw),
            blackhole: keys(&Route::Blackhole),
            unreachable,
        }
    }

    /// Whether there is nothing to guard.
    pub fn is_empty(&self) -> bool {
        self.unreachable.is_empty()
    }

    /// Replaces the file below `state_dir`; removes it if there is nothing to guard.
    ///
    /// # Errors
    ///
    /// If the file cannot be written or removed.
    pub fn save(&self, state_dir: &Path) -> anyhow::Result<()> {
        if self.is_empty() {
            return Ok(secure_file::remove(&state_dir.join(FILE))?);
        }
        Ok(secure_file::replace(
            state_dir,
            FILE,
            self.encode()?.as_bytes(),
        )?)
    }

    /// Reads the file below `state_dir`; none if there is no such file.
    ///
    /// # Errors
    ///
    /// If the file is damaged, of another version, or one that other users could have written.
    fn load(state_dir: &Path) -> anyhow::Result<Option<Self>> {
        let text = secure_file::read(&state_dir.join(FILE), MAX_SIZE)?;
        text.map(|text| Self::decode(&text)).transpose()
    }

    fn encode(&self) -> anyhow::Result<String> {
        let state = RawValue::from_string(serde_json::to_string(self)?)?;
        Ok(serde_json::to_string(&Envelope::new(FORMAT, &state))?)
    }

    fn decode(text: &str) -> anyhow::Result<Self> {
        let state = Envelope::open(text, FORMAT)?;
        serde_json::from_str(state.get())
            .ok()
            .context("it is of another version")
    }

    /// Adds the missing routes and rules to this network namespace.
    ///
    /// # Errors
    ///
    /// Lists all that could not be added; the rest was added.
    pub fn apply(&self) -> anyhow::Result<()> {
        let throw = self.throw.iter().map(|key| (*key, Route::Throw));
        let unreachable = self.unreachable.iter();
        let unreachable = unreachable.map(|key| (*key, Route::Unreachable));
        let blackhole = self.blackhole.iter().map(|key| (*key, Route::Blackhole));
        let routes = throw
            .chain(blackhole)
            .chain(unreachable)
            .collect::<Vec<_>>();
        let failed = kernel::guard(&routes, &self.rules)?;
        if failed.is_empty() {
            return Ok(());
        }
        let failed = failed.iter();
        let failed = failed.map(|(change, error)| format!("{change}: {error:#}"));
        let failed = failed.collect::<Vec<_>>().join("; ");
        Err(anyhow!("not all could be guarded: {failed}"))
    }
}

/// Guards this node, or installs or uninstalls what guards it at boot.
///
/// # Errors
///
/// A [`Refusal`] if the file is not valid or a capability is missing; otherwise all that could not be added.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let sentences = if args.install {
        install::install(&args.state_dir, &args.systemd_dir, &args.units)
    } else if args.uninstall {
        let failures = install::uninstall(&args.state_dir, &args.systemd_dir);
        if !failures.is_empty() {
            return Err(anyhow!("not all could be removed: {}", failures.join("; ")));
        }
        vec!["nothing of the guard is left on this host".to_owned()]
    } else {
        vec![guard(&args.state_dir)?]
    };
    for sentence in sentences {
        // A reader that closed the pipe has read enough.
        let _ = writeln!(io::stdout(), "{sentence}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Adds the routes and rules of the file, and returns a sentence on what it did.
fn guard(state_dir: &Path) -> anyhow::Result<String> {
    preflight::check_rights()?;
    boots::record_run(state_dir);
    let path = state_dir.join(FILE);
    let loaded = Guard::load(state_dir).map_err(|error| {
        Refusal::configuration(format!(
            "cannot use {}: {error:#}: remove it; the agent writes it again",
            path.display()
        ))
    })?;
    let Some(wanted) = loaded else {
        return Ok(format!(
            "there is no {}, so there is nothing to guard: no agent ran here yet, or it ran with --on-tunnel-down=open",
            path.display()
        ));
    };
    if agent_runs(&wanted.interface) {
        return Ok("the agent runs and guards this node itself".to_owned());
    }
    wanted.apply()?;
    Ok(format!(
        "{} routes and {} rules guard this node until its agent runs",
        wanted.unreachable.len() + wanted.blackhole.len() + wanted.throw.len(),
        wanted.rules.len()
    ))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;
    use crate::state::{BACKSTOP_METRIC, Link, NextHop, Table};

    fn key(table: Table, dst: &str, metric: u32) -> RouteKey {
        let dst = dst.parse().unwrap();
        RouteKey { table, dst, metric }
    }

    fn rule(priority: u32, table: u32) -> Rule {
        Rule {
            priority,
            v6: false,
            from: None,
            iif: None,
            fwmark: None,
            not: false,
            table,
        }
    }

    /// A leader's, with a route through the tunnel, which needs the link and is not guarded.
    fn state() -> State {
        let through_tunnel = Route::Unicast {
            next_hops: [NextHop {
                via: None,
                dev: "kilo0".into(),
                onlink: false,
            }]
            .into(),
            src: None,
            mtu: Some(1420),
        };
        let backstop = key(Table::Mesh, "10.42.0.0/24", BACKSTOP_METRIC);
        State {
            link: Some(Link {
                name: "kilo0".into(),
                mtu: 1420,
                up: true,
            }),
            routes: [
                (key(Table::Mesh, "10.42.0.0/24", 0), through_tunnel),
                (backstop, Route::Unreachable),
                (key(Table::Mesh, "10.42.1.0/24", 0), Route::Throw),
                (
                    key(Table::Pods, "203.0.113.10/32", BACKSTOP_METRIC),
                    Route::Unreachable,
                ),
            ]
            .into(),
            rules: [rule(5193, 5130), rule(5192, 5131)].into(),
            ..State::default()
        }
    }

    fn saved(dir: &Path) -> PathBuf {
        Guard::of(&state()).save(dir).unwrap();
        dir.join(FILE)
    }

    #[test]
    fn rules_and_routes_without_a_link_are_saved_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Guard::load(dir.path()).unwrap(), None);
        let path = saved(dir.path());
        let guard = Guard::load(dir.path()).unwrap().unwrap();
        assert_eq!(guard.rules, state().rules);
        assert_eq!((guard.unreachable.len(), guard.throw.len()), (2, 1));
        let mode = fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn nothing_is_guarded_with_on_tunnel_down_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = saved(dir.path());
        let mut open = state();
        open.routes.retain(|_, route| *route != Route::Unreachable);
        let guard = Guard::of(&open);
        assert!(guard.is_empty());
        guard.save(dir.path()).unwrap();
        guard.save(dir.path()).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_is_damaged_or_writable_by_other_users_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = saved(dir.path());
        let complaint = || format!("{:#}", Guard::load(dir.path()).unwrap_err());
        let text = fs::read_to_string(&path).unwrap();
        for at in 0..text.len() {
            let mut bytes = text.as_bytes().to_vec();
            bytes[at] ^= 1;
            if let Ok(changed) = String::from_utf8(bytes) {
                assert!(Guard::decode(&changed).is_err(), "byte {at}");
            }
            assert!(Guard::decode(&text[..at]).is_err(), "{at} bytes");
        }
        let newer = text.replacen("\"format\":1", "\"format\":2", 1);
        let error = Guard::decode(&newer).unwrap_err().to_string();
        assert_eq!(error, "it has format 2, and this version reads format 1");

        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(complaint(), "other users may read or write it");
        fs::rename(&path, dir.path().join("elsewhere")).unwrap();
        symlink(dir.path().join("elsewhere"), &path).unwrap();
        assert!(complaint().contains("symbolic link"), "{}", complaint());
    }

    /// If this fails, files of older versions can no longer be read: raise [`FORMAT`].
    #[test]
    fn the_format_of_the_file_matches_its_version() {
        let text = include_str!("../tests/testdata/guard-1.json");
        assert_eq!(Guard::of(&state()).encode().unwrap(), text.trim_end());
        assert_eq!(Guard::decode(text).unwrap(), Guard::of(&state()));
    }
}
