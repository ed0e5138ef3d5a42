//! A node with leaders and peers that replaces its key, on clocks that the tests move.

use super::*;

const OLD: PublicKey = PublicKey([0; 32]);
const NEW: PublicKey = PublicKey([7; 32]);
const HOUR: Duration = Duration::from_secs(3600);
const BEGUN: i64 = 1_796_000_000;

#[expect(clippy::disallowed_methods, reason = "any instant to count from")]
fn start() -> Instant {
    Instant::now()
}

/// A node, what it looks at, and the disk that it would have.
struct World {
    rotation: KeyRotation,
    look: Look,
    disk: OwnKeys,
    start: Instant,
    now: Instant,
    /// Whether the API shows what the node has.
    publishes: bool,
    steps: Vec<(KeyStep, u64)>,
    trials: Vec<(PublicKey, Vec<String>)>,
}

fn leader(name: &str) -> Sign {
    Sign {
        id: PeerId::new(name),
        is_leader: true,
        is_alive: true,
        sealed_under: Some(OLD),
    }
}

impl World {
    fn new(after: Option<Duration>) -> Self {
        let disk = OwnKeys {
            since: BEGUN,
            ..OwnKeys::of(OLD)
        };
        let start = start();
        Self {
            rotation: KeyRotation::new(disk, after, 24 * HOUR),
            look: Look {
                is_live: true,
                is_native: true,
                peers: vec![leader("b"), leader("c")],
                ..Look::default()
            },
            disk,
            start,
            now: start,
            publishes: true,
            steps: Vec::new(),
            trials: Vec::new(),
        }
    }

    fn seconds(&self) -> u64 {
        (self.now - self.start).as_secs()
    }

    /// Seconds pass, with a look in each; `answers` says which leaders answer a trial.
    fn pass(&mut self, seconds: u64, answers: &[&str]) {
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            self.look.unix = BEGUN + i64::try_from(self.seconds()).unwrap();
            if self.publishes {
                self.look.published = Some(self.disk.current);
                self.look.published_others = self.disk.others;
            }
            if let Some(step) = self.rotation.handle_look(&self.look, self.now) {
                self.steps.push((step, self.seconds()));
                self.write(step);
                self.rotation.handle_done(Some(self.disk), self.now);
            }
            if let Some((key, peers)) = self.rotation.poll_trials(&self.look, self.now) {
                for sign in self
                    .look
                    .peers
                    .iter_mut()
                    .filter(|sign| peers.contains(&sign.id))
                {
                    if answers.contains(&sign.id.as_str()) {
                        sign.sealed_under = Some(key);
                    }
                }
                let peers = peers.iter().map(ToString::to_string).collect();
                self.trials.push((key, peers));
            }
        }
    }

    fn write(&mut self, step: KeyStep) {
        let disk = &mut self.disk;
        match step {
            KeyStep::Make => disk.others.next = Some(PublicKey([disk.current.0[1] + 7; 32])),
            KeyStep::Switch => {
                disk.others.previous = Some(disk.current);
                disk.current = disk.others.next.take().unwrap();
                disk.since = self.look.unix;
            }
            KeyStep::Retire => disk.others.previous = None,
        }
    }

    /// The agent ends, and another one begins with what is on the disk. Its sessions are new.
    fn restart(&mut self, after: Option<Duration>) {
        self.rotation = KeyRotation::new(self.disk, after, 24 * HOUR);
        for sign in &mut self.look.peers {
            sign.sealed_under = Some(self.disk.current);
        }
    }

    fn ask(&mut self) -> Result<(), Refused> {
        self.rotation.handle_request(&self.look)
    }

    fn made(&self) -> Vec<KeyStep> {
        self.steps.iter().map(|(step, _)| *step).collect()
    }

    fn sign(&mut self, id: &str) -> &mut Sign {
        let mut peers = self.look.peers.iter_mut();
        peers.find(|sign| sign.id.as_str() == id).unwrap()
    }
}

const ALL: [KeyStep; 3] = [KeyStep::Make, KeyStep::Switch, KeyStep::Retire];

#[test]
fn a_key_is_replaced_within_a_minute_where_every_leader_answers() {
    let mut world = World::new(None);
    world.pass(60, &["b", "c"]);
    assert!(world.steps.is_empty(), "nothing was asked for");
    assert_eq!(world.ask(), Ok(()));
    world.pass(60, &["b", "c"]);
    assert_eq!(world.made(), ALL, "{:?}", world.steps);
    assert_eq!(world.trials, [(NEW, vec!["b".into(), "c".into()])]);
    assert_eq!(world.disk.current, NEW);
    assert_eq!(world.disk.others, OtherKeys::default());
    world.pass(600, &[]);
    assert_eq!(world.made(), ALL);
}

#[test]
fn no_step_is_made_before_the_api_shows_the_one_before() {
    let mut world = World::new(None);
    world.pass(1, &[]);
    world.ask().unwrap();
    world.pass(1, &[]);
    assert_eq!(world.made(), [KeyStep::Make]);
    world.publishes = false;
    world.pass(1_000, &["b", "c"]);
    assert_eq!(world.made(), [KeyStep::Make]);
    assert!(world.trials.is_empty(), "others do not know the key yet");
    world.publishes = true;
    world.pass(12, &["b", "c"]);
    assert_eq!(world.made(), ALL[..2]);
    world.look.is_live = false;
    world.pass(100_000, &[]);
    assert_eq!(world.made(), ALL[..2]);
}

#[test]
fn a_leader_with_a_session_that_does_not_answer_holds_the_switch_up_for_five_minutes() {
    let mut world = World::new(None);
    world.ask().unwrap();
    world.pass(290, &["b"]);
    assert_eq!(world.made(), ALL[..1]);
    assert_eq!(
        world.rotation.progress(),
        Progress::Announced { missing: 1 }
    );
    world.pass(20, &["b"]);
    assert_eq!(world.made(), ALL[..2]);
}

#[test]
fn a_leader_that_is_away_holds_up_only_the_end_and_that_for_a_day() {
    let mut world = World::new(None);
    world.sign("c").is_alive = false;
    world.ask().unwrap();
    world.pass(60, &["b"]);
    assert_eq!(world.made(), ALL[..2]);
    assert_eq!(
        world.rotation.progress(),
        Progress::Overlapping { missing: 1 }
    );
    world.pass(23 * 3600, &["b"]);
    assert_eq!(world.made(), ALL[..2]);
    world.pass(3600, &["b"]);
    assert_eq!(world.made(), ALL);
}

#[test]
fn a_leader_that_comes_back_and_answers_lets_the_old_key_go() {
    let mut world = World::new(None);
    world.sign("c").is_alive = false;
    world.ask().unwrap();
    world.pass(3600, &["b"]);
    *world.sign("c") = leader("c");
    world.pass(1, &["b"]);
    assert_eq!(
        world.made(),
        ALL[..2],
        "its session is still under the old key"
    );
    world.pass(10, &["b", "c"]);
    assert_eq!(world.made(), ALL);
}

#[test]
fn an_external_peer_that_uses_the_old_key_is_given_a_day_and_not_tried() {
    let mut world = World::new(None);
    world.look.peers.push(Sign {
        is_leader: false,
        ..leader("laptop")
    });
    world.ask().unwrap();
    world.pass(7200, &["b", "c"]);
    assert_eq!(world.made(), ALL[..2]);
    let mut tried = world.trials.iter().flat_map(|(_, peers)| peers);
    assert!(!tried.any(|peer| peer == "laptop"));
    world.sign("laptop").sealed_under = Some(NEW);
    world.pass(1, &[]);
    assert_eq!(world.made(), ALL);
}

#[test]
fn an_agent_that_is_restarted_every_few_seconds_goes_on_where_it_was() {
    for every in [12, 17, 23] {
        let mut world = World::new(None);
        world.ask().unwrap();
        world.pass(2, &[]);
        for _ in 0..20 {
            world.restart(None);
            world.pass(every, &["b", "c"]);
        }
        let made = world.made();
        // The shortest life is shorter than the overlap.
        let expected = if every == 23 { &ALL[..] } else { &ALL[..2] };
        assert_eq!(made, expected, "every {every} s");
        world.pass(40, &["b", "c"]);
        assert_eq!(world.made(), ALL, "every {every} s");
    }
}

#[test]
fn a_step_that_fails_on_disk_is_tried_again() {
    let mut world = World::new(None);
    world.pass(1, &[]);
    world.ask().unwrap();
    for second in 0..20 {
        world.now += Duration::from_secs(1);
        let step = world.rotation.handle_look(&world.look, world.now);
        assert_eq!(step.is_some(), second % 5 == 0, "{second}");
        if step.is_some() {
            // While it is under way no other is handed out.
            assert_eq!(world.rotation.handle_look(&world.look, world.now), None);
            world.rotation.handle_done(None, world.now);
        }
    }
    world.pass(60, &["b", "c"]);
    assert_eq!(world.made(), ALL);
}

#[test]
fn a_request_is_refused_while_it_cannot_be_done_without_loss() {
    let mut world = World::new(None);
    world.look.is_native = false;
    assert_eq!(world.ask(), Err(Refused::BesideKilo));
    world.look.is_native = true;
    world.look.is_live = false;
    assert_eq!(world.ask(), Err(Refused::Offline));
    world.look.is_live = true;
    assert_eq!(world.ask(), Ok(()));
    assert_eq!(world.ask(), Err(Refused::UnderWay));
    world.pass(20, &["b", "c"]);
    assert_eq!(world.ask(), Err(Refused::UnderWay));
    world.pass(60, &["b", "c"]);
    assert_eq!(world.ask(), Ok(()));
}

#[test]
fn a_key_is_replaced_at_its_age_and_nodes_differ_by_an_eighth_of_it() {
    let mut world = World::new(Some(HOUR));
    world.pass(3599, &["b", "c"]);
    assert!(world.steps.is_empty());
    world.pass(60, &["b", "c"]);
    assert_eq!(world.made(), ALL);
    // The new one is as old as its time in place, over restarts.
    world.restart(Some(HOUR));
    world.pass(3500, &["b", "c"]);
    assert_eq!(world.made(), ALL);
    world.pass(660, &["b", "c"]);
    assert_eq!(world.steps.len(), 6, "{:?}", world.steps);

    let age_of = |first: u8| {
        let mut world = World::new(Some(8 * HOUR));
        world.disk.current.0[0] = first;
        world.restart(Some(8 * HOUR));
        world.pass(10 * 3600, &["b", "c"]);
        world.steps[0].1
    };
    assert_eq!(age_of(0), 8 * 3600);
    assert_eq!(age_of(128), 8 * 3600 + 1800);
}

#[test]
fn a_follower_has_no_peer_to_ask_and_replaces_its_key_too() {
    let mut world = World::new(None);
    world.look.peers.clear();
    world.ask().unwrap();
    world.pass(45, &[]);
    assert_eq!(world.made(), ALL);
}
