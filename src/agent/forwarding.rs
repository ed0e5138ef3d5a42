//! Whether this node's kernel and firewall let a leader forward traffic of its region.
//!
//! The settings are files of `/proc`, read at every tick. The firewall can only be listed by `nft`, and the
//! loop waits for no program. So a task of its own runs `nft` when the kernel reports a change of others'
//! rules, at most twice a minute, and sends the loop what it found. Tables of iptables-legacy, of which the
//! kernel reports no changes, are only looked at by the doctor.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};

use crate::doctor::firewall;

/// Changes of a firewall come in bursts: that of a daemon that starts is over by then.
const QUIET: Duration = Duration::from_secs(2);
/// A host with thousands of services changes its rules all the time, and listing them costs it a second.
const INTERVAL: Duration = Duration::from_secs(30);

/// The settings that keep this node from forwarding between flannel's links and the tunnel's, in one
/// sentence; `links` are the names of those links.
pub fn settings(links: &[&str], ipv6: bool) -> Option<String> {
    settings_in(Path::new("/proc/sys/net"), links, ipv6)
}

fn settings_in(net: &Path, links: &[&str], ipv6: bool) -> Option<String> {
    let is_off = |path: &str| {
        // What is not there or cannot be read says nothing.
        std::fs::read_to_string(net.join(path)).is_ok_and(|value| value.trim() == "0")
    };
    let all = [
        (true, "ipv4/ip_forward", "net.ipv4.ip_forward".to_owned()),
        (
            ipv6,
            "ipv6/conf/all/forwarding",
            "net.ipv6.conf.all.forwarding".to_owned(),
        ),
    ];
    // The kernel looks at the setting of the link that a packet came in by (`IN_DEV_FORWARD`). IPv6 knows
    // only the one for all (`ip6_forward`).
    let of_links = links.iter().map(|link| {
        // A dot in a link's name is a slash in that of its setting.
        let name = link.replace('.', "/");
        (
            true,
            format!("ipv4/conf/{link}/forwarding"),
            format!("net.ipv4.conf.{name}.forwarding"),
        )
    });
    let all = all.map(|(matters, path, name)| (matters, path.to_owned(), name));
    let (_, _, name) = all
        .into_iter()
        .chain(of_links)
        .find(|(matters, path, _)| *matters && is_off(path))?;
    Some(format!(
        "{name} is 0, so this node leads its region and forwards nothing: run sysctl -w {name}=1, and make it last in /etc/sysctl.d"
    ))
}

/// What others' firewalls do to forwarded packets, as it was last found.
#[derive(Debug)]
pub struct HostFirewall {
    again: Arc<Notify>,
    found: watch::Receiver<Option<String>>,
}

impl HostFirewall {
    /// Begins to look, for the tunnel's link of this name. Needs a tokio runtime, with which it ends.
    pub fn start(interface: &str) -> Self {
        let again = Arc::new(Notify::new());
        let (sender, found) = watch::channel(None);
        again.notify_one();
        tokio::spawn(look(interface.to_owned(), Arc::clone(&again), sender));
        Self { again, found }
    }

    /// Rules of others have changed.
    pub fn handle_change(&self) {
        self.again.notify_one();
    }

    /// Waits until it is another, and returns why this node's firewall drops what the mesh forwards; none
    /// where it does not. May be dropped and called again.
    pub async fn changed(&mut self) -> Option<String> {
        if self.found.changed().await.is_err() {
            // The task has ended with the runtime.
            std::future::pending::<()>().await;
        }
        self.found.borrow_and_update().clone()
    }
}

async fn look(interface: String, again: Arc<Notify>, found: watch::Sender<Option<String>>) {
    loop {
        again.notified().await;
        tokio::time::sleep(QUIET).await;
        let link = interface.clone();
        let looked = tokio::task::spawn_blocking(move || firewall::in_the_way(&link));
        match looked.await.expect("a panic ends the process") {
            Ok(problem) => {
                found.send_if_modified(|known| {
                    let changed = *known != problem;
                    *known = problem;
                    changed
                });
            }
            // What was found last stays: an nft that hangs opens no firewall.
            Err(error) => {
                tracing::debug!(error = %format_args!("{error:#}"), "listing the host's firewall failed")
            }
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A `/proc/sys/net` with these files.
    fn net(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, value) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        }
        dir
    }

    #[test]
    fn a_leader_that_forwards_nothing_is_told_which_setting_is_off() {
        let found = |files: &[(&str, &str)], ipv6| {
            settings_in(net(files).path(), &["kilo0", "flannel.1"], ipv6)
        };
        let on = ("ipv4/ip_forward", "1\n");
        assert_eq!(found(&[on], true), None, "what is not there says nothing");
        let sentence = found(&[("ipv4/ip_forward", "0\n")], false).unwrap();
        assert!(sentence.contains("sysctl -w net.ipv4.ip_forward=1"));

        let of_link = ("ipv4/conf/flannel.1/forwarding", "0\n");
        let sentence = found(&[on, of_link], false).unwrap();
        assert!(
            sentence.contains("sysctl -w net.ipv4.conf.flannel/1.forwarding=1"),
            "{sentence}"
        );

        let v6 = ("ipv6/conf/all/forwarding", "0\n");
        assert_eq!(found(&[on, v6], false), None, "flannel has no IPv6");
        assert!(
            found(&[on, v6], true)
                .unwrap()
                .starts_with("net.ipv6.conf.all.forwarding is 0")
        );
    }
}
