//! The controller, driven by hand with values and a clock that the tests move.

use std::collections::BTreeSet;

use super::*;
use crate::cluster::{ParseSettings, node};
use crate::liveness::{Cause, PathState};
use crate::probe::{RegionLeader, Verdicts};
use crate::reconciler::core::FailureKind;
use crate::topology::{NodeName, Snapshot};

#[expect(clippy::disallowed_methods, reason = "an Instant has no other origin")]
fn start() -> Instant {
    Instant::now()
}

fn millis(count: u64) -> Duration {
    Duration::from_millis(count)
}

fn controller(now: Instant) -> Controller {
    let config = Config::from_args(["--hostname=a1"]).unwrap();
    let setup = Setup {
        config: Arc::new(config),
        keys: OwnKeys::of(PublicKey([1; 32])),
        key_files: Vec::new(),
        resolved: Arc::default(),
    };
    Controller::new(setup, now)
}

/// A kernel on which flannel is not up.
fn kernel() -> KernelFacts {
    KernelFacts {
        addresses: Some(Vec::new()),
        connected: Some(BTreeSet::new()),
        other_rules: Some(Vec::new()),
        underlay_mtu: Some(None),
        flannel: Err(Unready::Waiting("its file".to_owned())),
    }
}

fn view(live: bool) -> Arc<View> {
    let object = serde_json::json!({"metadata": {"name": "a1"}});
    let object = serde_json::from_value(object).unwrap();
    let (node, _) = node::parse(&object, &ParseSettings::default());
    Arc::new(View {
        snapshot: Arc::new(Snapshot {
            nodes: [(NodeName("a1".into()), node.unwrap())].into(),
            ..Snapshot::default()
        }),
        live,
        ..View::default()
    })
}

fn effects(controller: &mut Controller) -> Vec<Effect> {
    std::iter::from_fn(|| controller.poll_effect()).collect()
}

fn failure(kind: FailureKind, sentence: &str) -> Failure {
    Failure {
        kind,
        sentence: sentence.to_owned(),
    }
}

#[test]
fn facts_are_asked_for_at_once_and_only_once_until_they_come() {
    let t0 = start();
    let mut controller = controller(t0);
    assert_eq!(controller.poll_timeout(), Some(t0));
    controller.handle_timeout(t0);
    assert!(matches!(effects(&mut controller)[..], [Effect::Observe]));

    controller.handle_trigger(t0 + millis(10));
    assert_eq!(controller.poll_timeout(), None, "facts are awaited");
    controller.handle_timeout(t0 + millis(500));
    assert!(effects(&mut controller).is_empty());

    controller.handle_kernel(t0 + millis(501), WallClock::default(), kernel());
    effects(&mut controller);
    assert_eq!(controller.poll_timeout(), Some(t0 + millis(60)));
    controller.handle_timeout(t0 + millis(501));
    assert!(matches!(effects(&mut controller)[..], [Effect::Observe]));
}

#[test]
fn a_view_is_followed_at_once_and_news_of_the_kernel_after_a_pause() {
    let t0 = start();
    let mut controller = controller(t0);
    controller.handle_timeout(t0);
    controller.handle_kernel(t0, WallClock::default(), kernel());
    effects(&mut controller);

    let later = t0 + Duration::from_secs(5);
    controller.handle_trigger(later);
    assert_eq!(controller.poll_timeout(), Some(later + millis(50)));
    controller.handle_view(later + millis(1), view(true));
    assert_eq!(controller.poll_timeout(), Some(later + millis(1)));
}

#[test]
fn what_comes_from_the_cache_is_neither_published_nor_saved() {
    let t0 = start();
    for live in [false, true] {
        let mut controller = controller(t0);
        controller.handle_view(t0, view(live));
        controller.handle_timeout(t0);
        controller.handle_kernel(t0, WallClock::default(), kernel());
        let effects = effects(&mut controller);
        let has = |wanted: fn(&Effect) -> bool| effects.iter().any(wanted);
        assert_eq!(has(|effect| matches!(effect, Effect::Publish(_))), live);
        assert_eq!(has(|effect| matches!(effect, Effect::Save(_))), live);
        assert!(has(|effect| matches!(effect, Effect::Reconcile(_))));
    }
}

#[test]
fn the_same_happenings_lead_to_the_same_effects() {
    let t0 = start();
    let run = || {
        let mut controller = controller(t0);
        controller.handle_view(t0, view(true));
        controller.handle_timeout(t0);
        controller.handle_kernel(t0, WallClock::default(), kernel());
        format!("{:?}", effects(&mut controller))
    };
    assert_eq!(run(), run());
}

#[test]
fn a_failure_is_a_problem_until_it_is_gone_and_a_taken_port_is_told_once() {
    let t0 = start();
    let mut controller = controller(t0);
    controller.handle_view(t0, view(true));
    controller.handle_timeout(t0);
    controller.handle_kernel(t0, WallClock::default(), kernel());
    let problems = |controller: &Controller| {
        let report = controller.report(t0, &ShellFacts::default());
        report.problems
    };
    let before = problems(&controller);
    assert!(before.contains(&"waiting for flannel: its file".to_owned()));

    let applied = |failures: Vec<Failure>| Applied {
        failed: !failures.is_empty(),
        failures,
        ..Applied::default()
    };
    let port = failure(FailureKind::ListenPort, "UDP port 51820 is kg's");
    let route = failure(FailureKind::Change, "ip route replace: EINVAL");
    controller.handle_applied(t0, applied(vec![port, route]));
    let now = problems(&controller);
    let told = |sentence: &str| now.iter().filter(|told| told.contains(sentence)).count();
    assert_eq!(told("port 51820"), 1);
    assert_eq!(told("EINVAL"), 1);

    controller.handle_applied(t0, applied(Vec::new()));
    assert_eq!(problems(&controller), before);
}

/// The state of the path through a2, as a prober says it.
fn through_a2(state: PathState) -> Verdicts {
    let leader = RegionLeader {
        state,
        ..RegionLeader::default()
    };
    Verdicts {
        leaders: [(NodeName("a2".into()), leader)].into(),
        ..Verdicts::default()
    }
}

/// The notices of a pass about this node's paths.
fn path_notices(controller: &mut Controller, now: Instant) -> Vec<(&'static str, String)> {
    controller.handle_timeout(now);
    controller.handle_kernel(now, WallClock::default(), kernel());
    let reports = effects(controller).into_iter().find_map(|effect| {
        if let Effect::Report(notices) = effect {
            Some(notices)
        } else {
            None
        }
    });
    reports
        .into_iter()
        .flatten()
        .filter(|notice| notice.reason.starts_with("SelvedgePath"))
        .map(|notice| (notice.reason, notice.note))
        .collect()
}

#[test]
fn a_path_that_goes_down_leads_to_a_pass_at_once_and_to_an_event_as_does_its_return() {
    let t0 = start();
    let mut controller = controller(t0);
    controller.handle_view(t0, view(true));
    assert_eq!(path_notices(&mut controller, t0), []);
    controller.handle_verdicts(t0, through_a2(PathState::Up));
    assert_eq!(path_notices(&mut controller, t0), []);

    let later = t0 + Duration::from_secs(5);
    controller.handle_verdicts(later, through_a2(PathState::Down(Cause::Silent)));
    assert_eq!(controller.poll_timeout(), Some(later), "not debounced");
    let notices = path_notices(&mut controller, later);
    let down = "the path through leader a2 is down: its echoes do not come back, and other leaders are used";
    assert_eq!(notices, [("SelvedgePathDown", down.to_owned())]);
    let report = controller.report(later, &ShellFacts::default());
    assert_eq!(report.failovers, [("silent".to_owned(), 1)].into());

    let later = later + Duration::from_secs(5);
    controller.handle_verdicts(later, through_a2(PathState::Up));
    let notices = path_notices(&mut controller, later);
    assert_eq!(
        notices,
        [(
            "SelvedgePathUp",
            "the path through leader a2 is up again".to_owned()
        )]
    );

    // The same verdict again is no reason for a pass.
    let due = controller.poll_timeout();
    controller.handle_verdicts(later + millis(1), through_a2(PathState::Up));
    assert_eq!(controller.poll_timeout(), due);
}

#[test]
fn one_event_tells_that_all_paths_are_down() {
    let t0 = start();
    let mut controller = controller(t0);
    controller.handle_view(t0, view(true));
    let mut verdicts = through_a2(PathState::Down(Cause::Silent));
    let leader = verdicts.leaders[&NodeName("a2".into())].clone();
    verdicts.leaders.insert(NodeName("a3".into()), leader);
    controller.handle_verdicts(t0, verdicts);
    let notices = path_notices(&mut controller, t0);
    assert_eq!(notices.len(), 1, "{notices:?}");
    assert!(
        notices[0].1.starts_with("none of the 2 paths"),
        "{notices:?}"
    );
}

#[test]
fn an_agent_that_is_cut_off_publishes_the_same_times_of_its_claims() {
    let t0 = start();
    let mut controller = controller(t0);
    controller.handle_view(t0, view(true));
    let mut publish = |seconds: u64| {
        let now = t0 + Duration::from_secs(seconds);
        let wall = WallClock {
            node: 0,
            server: Some(1_796_081_284 + i64::try_from(seconds).unwrap()),
        };
        controller.handle_trigger(now);
        controller.handle_timeout(now + millis(50));
        controller.handle_kernel(now + millis(50), wall, kernel());
        let effects = effects(&mut controller);
        let mut published = effects.into_iter().filter_map(|effect| {
            if let Effect::Publish(annotations) = effect {
                annotations.get(annotation::SINCE).cloned()
            } else {
                None
            }
        });
        published.next().expect("it publishes its claims")
    };
    let first = publish(0);
    for seconds in [4, 6, 12, 100] {
        assert_eq!(publish(seconds), first, "after {seconds} s");
    }
}
