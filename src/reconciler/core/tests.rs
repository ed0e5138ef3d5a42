//! Passes over a platform that fails as the tests ask, with a clock that they move.

use std::collections::BTreeMap;
use std::num::NonZeroU16;

use anyhow::anyhow;

use super::*;
use crate::state::{Link, NextHop, Route, Table};

/// A platform that makes every change but those that are refused, and keeps what was asked of it.
#[derive(Default)]
struct Fake {
    state: State,
    refused: Vec<String>,
    blind: bool,
    asked: Vec<String>,
}

impl Platform for Fake {
    fn observe(&mut self) -> anyhow::Result<State> {
        if self.blind {
            return Err(anyhow!("the socket overran"));
        }
        Ok(self.state.clone())
    }

    fn apply_all<'a>(&mut self, changes: &'a [Change]) -> Vec<(&'a Change, anyhow::Error)> {
        let mut failed = Vec::new();
        for change in changes {
            let line = change.to_string();
            self.asked.push(line.clone());
            if self.refused.iter().any(|refused| line.contains(refused)) {
                failed.push((change, anyhow!("EINVAL")));
                continue;
            }
            #[expect(clippy::wildcard_enum_match_arm, reason = "routes are enough here")]
            match change {
                Change::Kernel(KernelChange::ReplaceRoute { key, route }) => {
                    self.state.routes.insert(*key, route.clone());
                }
                Change::Kernel(KernelChange::DeleteRoute(key)) => {
                    self.state.routes.remove(key);
                }
                Change::Tunnel(TunnelChange::SetListenPort { port, .. }) => {
                    self.state.listen_port = Some(*port)
                }
                _ => {}
            }
        }
        failed
    }

    fn repair<'a>(&mut self, _: &'a [Repair]) -> Vec<(&'a Repair, anyhow::Error)> {
        Vec::new()
    }
}

#[expect(clippy::disallowed_methods, reason = "an Instant has no other origin")]
fn start() -> Instant {
    Instant::now()
}

fn millis(count: u64) -> Duration {
    Duration::from_millis(count)
}

fn desired(prefixes: &[&str], firewall: Option<Firewall>) -> Desired {
    let route = |prefix: &&str| {
        let key = RouteKey {
            table: Table::Mesh,
            dst: prefix.parse().unwrap(),
            metric: 0,
        };
        let hop = NextHop {
            via: None,
            dev: "kilo0".into(),
            onlink: false,
        };
        let route = Route::Unicast {
            next_hops: [hop].into(),
            src: None,
            mtu: None,
        };
        (key, route)
    };
    Desired {
        state: Some(State {
            link: Some(link()),
            routes: prefixes.iter().map(route).collect::<BTreeMap<_, _>>(),
            firewall: firewall.map(|firewall| Ruleset::Planned(Box::new(firewall))),
            ..State::default()
        }),
        interface: "kilo0".into(),
        ..Desired::default()
    }
}

fn link() -> Link {
    Link {
        name: "kilo0".into(),
        mtu: 1420,
        up: true,
    }
}

fn fake() -> Fake {
    Fake {
        state: State {
            link: Some(link()),
            ..State::default()
        },
        ..Fake::default()
    }
}

fn firewall(leader: bool, known: &[&str]) -> Firewall {
    Firewall {
        leader,
        tunnel: "kilo0".into(),
        known: known.iter().map(|net| net.parse().unwrap()).collect(),
        ..Firewall::default()
    }
}

fn done(job: Job) -> firewall::Outcome {
    firewall::Outcome {
        firewall: job.firewall,
        took: Duration::ZERO,
        result: Ok(None),
    }
}

#[test]
fn one_change_that_fails_is_tried_again_alone_with_growing_pauses() {
    let (t0, mut core, mut fake) = (start(), Core::default(), fake());
    fake.refused.push("10.1.0.0/24".into());
    core.handle_desired(desired(&["10.1.0.0/24", "10.2.0.0/24"], None));
    let applied = core.pass(&mut fake, t0);
    assert_eq!((applied.made.len(), applied.failures.len()), (1, 1));
    assert!(applied.failures[0].sentence.ends_with("EINVAL"));

    let (mut now, mut pauses) = (t0, Vec::new());
    fake.asked.clear();
    for _ in 0..7 {
        let due = core.poll_timeout().unwrap();
        pauses.push((due - now).as_millis());
        now = due;
        let applied = core.pass(&mut fake, now);
        assert!(applied.failed && applied.made.is_empty());
    }
    assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 5000]);
    assert!(fake.asked.iter().all(|line| line.contains("10.1.0.0/24")));

    // A pass between two attempts leaves it out, and still says that it is not done.
    fake.asked.clear();
    let applied = core.pass(&mut fake, now + millis(1));
    assert!(fake.asked.is_empty() && !applied.failed);
    assert_eq!(applied.failures.len(), 1);

    fake.refused.clear();
    let applied = core.pass(&mut fake, core.poll_timeout().unwrap());
    assert_eq!(applied.made.len(), 1);
    assert!(applied.failures.is_empty());
    assert_eq!(core.poll_timeout(), None);
}

#[test]
fn another_desired_state_is_made_at_once_and_hurries_what_failed() {
    let (t0, mut core, mut fake) = (start(), Core::default(), fake());
    fake.refused.push("10.1.0.0/24".into());
    core.handle_desired(desired(&["10.1.0.0/24"], None));
    let mut now = t0;
    for _ in 0..8 {
        core.pass(&mut fake, now);
        now = core.poll_timeout().unwrap();
    }
    let late = now - Duration::from_secs(4);

    core.handle_desired(desired(&["10.1.0.0/24", "10.3.0.0/24"], None));
    fake.refused.clear();
    let applied = core.pass(&mut fake, late);
    assert_eq!(applied.made.len(), 2, "both at once");

    // What is not wanted any more is no failure.
    fake.refused.push("10.4.0.0/24".into());
    core.handle_desired(desired(&["10.4.0.0/24"], None));
    assert_eq!(core.pass(&mut fake, late).failures.len(), 1);
    core.handle_desired(desired(&["10.3.0.0/24"], None));
    assert_eq!(core.pass(&mut fake, late).failures.len(), 0);
    assert_eq!(core.poll_timeout(), None);
}

#[test]
fn routes_wait_for_the_first_firewall_and_for_other_rules_but_not_for_elements() {
    let (t0, mut core, mut fake) = (start(), Core::default(), fake());
    let pass = |core: &mut Core, fake: &mut Fake| {
        core.pass(fake, t0);
        fake.state.routes.len()
    };
    core.handle_desired(desired(
        &["10.1.0.0/24"],
        Some(firewall(false, &["10.1.0.0/24"])),
    ));
    let job = core.poll_firewall(t0).unwrap();
    assert!(core.poll_firewall(t0).is_none(), "one at a time");
    assert_eq!(pass(&mut core, &mut fake), 0, "the table is not there");
    core.handle_firewall(done(job), t0);
    assert_eq!(pass(&mut core, &mut fake), 1);

    let two = ["10.1.0.0/24", "10.2.0.0/24"];
    core.handle_desired(desired(&two, Some(firewall(false, &["10.2.0.0/24"]))));
    let job = core.poll_firewall(t0).unwrap();
    assert!(core.has_new_elements());
    assert_eq!(pass(&mut core, &mut fake), 2, "elements hold nothing up");
    core.handle_firewall(done(job), t0);

    let three = ["10.1.0.0/24", "10.2.0.0/24", "10.3.0.0/24"];
    core.handle_desired(desired(&three, Some(firewall(true, &["10.2.0.0/24"]))));
    let job = core.poll_firewall(t0).unwrap();
    assert_eq!(pass(&mut core, &mut fake), 2, "a leader's rules come first");
    // An outcome is an outcome: a firewall that fails does not keep the routes away.
    let failed = firewall::Outcome {
        result: Err(anyhow!("the program nft took longer than 10 s")),
        ..done(job)
    };
    let applied = core.handle_firewall(failed, t0);
    assert_eq!(applied.failures[0].kind, FailureKind::Firewall);
    assert_eq!(pass(&mut core, &mut fake), 3);
    assert!(core.poll_firewall(t0).is_none());
    assert!(
        core.poll_firewall(t0 + millis(100)).is_some(),
        "tried again"
    );
}

#[test]
fn the_latest_firewall_follows_the_one_under_way() {
    let (t0, mut core) = (start(), Core::default());
    core.handle_desired(desired(&[], Some(firewall(false, &["10.1.0.0/24"]))));
    let job = core.poll_firewall(t0).unwrap();
    for known in ["10.2.0.0/24", "10.3.0.0/24"] {
        core.handle_desired(desired(&[], Some(firewall(false, &[known]))));
        assert!(core.poll_firewall(t0).is_none());
    }
    core.handle_firewall(done(job), t0);
    let job = core.poll_firewall(t0).unwrap();
    assert_eq!(*job.firewall.unwrap(), firewall(false, &["10.3.0.0/24"]));
}

#[test]
fn a_kernel_that_cannot_be_read_is_read_again_and_nothing_is_changed() {
    let (t0, mut core, mut fake) = (start(), Core::default(), fake());
    fake.blind = true;
    core.handle_desired(desired(&["10.1.0.0/24"], None));
    let applied = core.pass(&mut fake, t0);
    assert_eq!(applied.failures[0].kind, FailureKind::Observe);
    assert!(fake.asked.is_empty());

    fake.blind = false;
    let due = core.poll_timeout().unwrap();
    assert_eq!(due, t0 + millis(100));
    assert_eq!(core.pass(&mut fake, due).made.len(), 1);
}

#[test]
fn a_taken_port_is_asked_for_every_second_even_without_a_state() {
    let (t0, mut core, mut fake) = (start(), Core::default(), fake());
    fake.refused.push("listen-port".into());
    core.handle_desired(Desired {
        interface: "kilo0".into(),
        listen_port: NonZeroU16::new(51820),
        ..Desired::default()
    });
    let applied = core.pass(&mut fake, t0);
    assert_eq!(applied.failures[0].kind, FailureKind::ListenPort);
    assert_eq!(applied.failures[0].sentence, "EINVAL");
    for second in 1..20 {
        let due = core.poll_timeout().unwrap();
        assert_eq!(due, t0 + Duration::from_secs(second));
        core.pass(&mut fake, due);
    }
    fake.refused.clear();
    let applied = core.pass(&mut fake, core.poll_timeout().unwrap());
    assert_eq!((applied.made.len(), applied.failures.len()), (1, 0));
}
