//! Resolves the names in endpoints, in the background.
//!
//! A slow name delays nothing: the mesh uses the last good address of each name, and a name that never
//! resolves affects only its own peer.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::clock::now;
use crate::topology::is_unicast;

/// How long an answer is used before the next lookup. Names of home connections change, and the system's
/// resolver does not report their TTL.
const REFRESH: Duration = Duration::from_secs(30);
/// Most concurrent lookups. Each blocks a thread for as long as the system's resolver takes: half a
/// minute for a name whose servers do not answer. Threads must be left for the name of the API server.
const MAX_LOOKUPS: usize = 2;

/// Last good addresses, by name.
pub type Addresses = BTreeMap<String, IpAddr>;

/// Resolves `names` periodically, and sends all last good addresses when one of them changes.
///
/// Ends when a channel is closed.
pub async fn follow(
    names: mpsc::Receiver<BTreeSet<String>>,
    addresses: mpsc::Sender<Addresses>,
    known: Addresses,
) {
    follow_with(look_up, REFRESH, names, addresses, known).await;
}

async fn follow_with<L>(
    look_up: impl Fn(String) -> L,
    refresh: Duration,
    mut names: mpsc::Receiver<BTreeSet<String>>,
    addresses: mpsc::Sender<Addresses>,
    mut known: Addresses,
) where
    L: Future<Output = (String, Vec<IpAddr>)> + Send + 'static,
{
    let mut due = BTreeMap::<String, Instant>::new();
    let mut lookups = JoinSet::new();
    let mut pending = BTreeSet::new();
    loop {
        let next = due
            .iter()
            .filter(|(name, _)| !pending.contains(*name))
            .min_by_key(|(_, at)| **at)
            .map(|(name, at)| (name.clone(), *at));
        let wait = async {
            match next {
                Some((name, at)) if pending.len() < MAX_LOOKUPS => {
                    tokio::time::sleep_until(at.into()).await;
                    name
                }
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            wanted = names.recv() => {
                let Some(wanted) = wanted else { return };
                due.retain(|name, _| wanted.contains(name));
                for name in wanted {
                    due.entry(name).or_insert_with(now);
                }
                let before = known.len();
                known.retain(|name, _| due.contains_key(name));
                if known.len() != before && addresses.send(known.clone()).await.is_err() {
                    return;
                }
            }
            name = wait => {
                pending.insert(name.clone());
                lookups.spawn(look_up(name));
            }
            Some(Ok((name, answer))) = lookups.join_next() => {
                pending.remove(&name);
                let Some(at) = due.get_mut(&name) else { continue };
                *at = now() + refresh;
                let Some(address) = choose(&answer, known.get(&name)) else {
                    tracing::debug!(name = %crate::text::quote(&name), "name does not resolve");
                    continue;
                };
                if known.insert(name, address) != Some(address)
                    && addresses.send(known.clone()).await.is_err()
                {
                    return;
                }
            }
        }
    }
}

async fn look_up(name: String) -> (String, Vec<IpAddr>) {
    // Without a timeout: the resolver's thread would stay blocked anyway.
    let answer = match tokio::net::lookup_host((name.as_str(), 0)).await {
        Ok(addresses) => addresses.map(|address| address.ip()).collect(),
        Err(_) => Vec::new(),
    };
    (name, answer)
}

/// The address in use if it is still among the answers, so that a peer with several addresses keeps its
/// endpoint; else the lowest, IPv4 first. Addresses that no other host can have are ignored.
pub(crate) fn choose(answer: &[IpAddr], current: Option<&IpAddr>) -> Option<IpAddr> {
    let usable = answer.iter().copied().filter(|ip| is_unicast(*ip));
    usable
        .clone()
        .find(|ip| Some(ip) == current)
        .or_else(|| usable.min())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_in_use_is_kept_while_it_is_an_answer() {
        let ips = ["203.0.113.9", "203.0.113.5", "2001:db8::1"].map(|ip| ip.parse().unwrap());
        assert_eq!(choose(&ips, Some(&ips[2])), Some(ips[2]));
        assert_eq!(choose(&ips, None), Some(ips[1]));
        assert_eq!(choose(&[], Some(&ips[0])), None);
    }

    #[test]
    fn addresses_of_this_host_are_ignored() {
        let ips =
            ["127.0.0.1", "0.0.0.0", "169.254.1.1", "::1", "fe80::1"].map(|ip| ip.parse().unwrap());
        assert_eq!(choose(&ips, None), None);
    }

    #[tokio::test]
    async fn unanswered_names_leave_threads_for_others() {
        let (names, wanted) = mpsc::channel(1);
        let (sender, _addresses) = mpsc::channel(1);
        let (begun, mut count) = mpsc::unbounded_channel();
        let look_up = move |name: String| {
            begun.send(name).unwrap();
            std::future::pending()
        };
        let task = tokio::spawn(follow_with(
            look_up,
            REFRESH,
            wanted,
            sender,
            Addresses::new(),
        ));

        let many = (0..9).map(|n| format!("{n}.example.com")).collect();
        names.send(many).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;

        let mut blocked = 0;
        while count.try_recv().is_ok() {
            blocked += 1;
        }
        assert_eq!(blocked, MAX_LOOKUPS);
        task.abort();
    }

    #[tokio::test]
    async fn a_changed_address_is_used_and_a_vanished_name_keeps_its_address() {
        let (names, wanted) = mpsc::channel(1);
        let (sender, mut addresses) = mpsc::channel(1);
        let asked = std::sync::atomic::AtomicUsize::new(0);
        let look_up = move |name: String| {
            // Two answers with different addresses, then none.
            let turn = asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let answer = [[203, 0, 113, 1], [203, 0, 113, 2]].get(turn).copied();
            std::future::ready((name, answer.map(IpAddr::from).into_iter().collect()))
        };
        let soon = Duration::from_millis(5);
        let task = tokio::spawn(follow_with(look_up, soon, wanted, sender, Addresses::new()));

        let name = "vpn.example.com".to_owned();
        names.send([name.clone()].into()).await.unwrap();

        for address in [[203, 0, 113, 1], [203, 0, 113, 2]] {
            let expected: Addresses = [(name.clone(), address.into())].into();
            assert_eq!(addresses.recv().await, Some(expected));
        }
        let more = tokio::time::timeout(Duration::from_millis(100), addresses.recv()).await;
        assert!(more.is_err(), "the last good address went: {more:?}");
        task.abort();
    }

    #[tokio::test]
    async fn unwanted_names_are_dropped() {
        let (names, wanted) = mpsc::channel(1);
        let (sender, mut addresses) = mpsc::channel(1);
        let known = [("vpn.example.com".to_owned(), [203, 0, 113, 9].into())].into();
        let task = tokio::spawn(follow(wanted, sender, known));

        names.send(BTreeSet::new()).await.unwrap();

        assert_eq!(addresses.recv().await, Some(Addresses::new()));
        drop(names);
        task.await.unwrap();
    }
}
