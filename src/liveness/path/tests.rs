//! The echoes of one path over a fake link, on a clock that the tests move.

use proptest::prelude::*;
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::*;

const GOOD_LEADER: Statement = Statement {
    draining: false,
    forwards: true,
};

#[expect(clippy::disallowed_methods, reason = "an Instant has no other origin")]
fn start() -> Instant {
    Instant::now()
}

fn millis(count: u64) -> Duration {
    Duration::from_millis(count)
}

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

/// One path, the answers under way, and the states that it went through.
struct Link {
    path: Path,
    now: Instant,
    token: u64,
    /// Answers with the times of their arrival.
    coming: Vec<(Instant, u64)>,
    says: Statement,
    trip: Duration,
    moves: Vec<(Instant, PathState)>,
    echoes: u32,
}

impl Link {
    fn new() -> Self {
        Self::with(INTERVAL)
    }

    fn with(interval: Duration) -> Self {
        let now = start();
        Self {
            path: Path::new(now, now, interval),
            now,
            token: 0,
            coming: Vec::new(),
            says: GOOD_LEADER,
            trip: millis(1),
            moves: Vec::new(),
            echoes: 0,
        }
    }

    /// Runs for so long; an echo at a time that `carries` refuses is lost.
    fn run(&mut self, time: Duration, mut carries: impl FnMut(Instant) -> bool) {
        let end = self.now + time;
        loop {
            let answer = self.coming.iter().map(|(at, _)| *at).min();
            let timeouts = [
                Some(self.path.poll_echo()),
                self.path.poll_timeout(),
                answer,
            ];
            let next = timeouts.into_iter().flatten().min().unwrap();
            if next > end {
                self.now = end;
                return;
            }
            self.now = self.now.max(next);
            let now = self.now;
            let before = self.path.state();
            let (arrived, coming) = self.coming.iter().partition(|(at, _)| *at <= now);
            self.coming = coming;
            let arrived: Vec<(Instant, u64)> = arrived;
            for (_, token) in arrived {
                assert!(self.path.handle_answer(now, token, self.says));
            }
            self.path.handle_timeout(now);
            if self.path.poll_echo() <= now {
                self.token += 1;
                self.echoes += 1;
                self.path.handle_sent(now, self.token, Duration::ZERO);
                if carries(now) {
                    self.coming.push((now + self.trip, self.token));
                }
            }
            if self.path.state() != before {
                self.moves.push((now, self.path.state()));
            }
        }
    }

    fn states(&self) -> Vec<PathState> {
        self.moves.iter().map(|(_, state)| *state).collect()
    }
}

#[test]
fn the_first_answer_makes_a_path_up() {
    let mut link = Link::new();
    link.run(millis(1_400), |_| false);
    assert_eq!(link.path.state(), PathState::Unknown);
    link.run(seconds(1), |_| true);
    assert_eq!(link.states(), [PathState::Up]);
}

#[test]
fn a_path_that_never_answers_is_down_after_two_seconds_and_up_by_its_first_answer() {
    let mut link = Link::new();
    link.run(millis(2_200), |_| false);
    assert_eq!(link.states(), [PathState::Down(Cause::Silent)]);
    link.run(seconds(60), |_| false);
    assert_eq!(link.states(), [PathState::Down(Cause::Silent)]);
    link.run(millis(700), |_| true);
    assert_eq!(link.path.state(), PathState::Up);
    // Afterwards it is judged as any other.
    link.run(seconds(3), |_| false);
    link.run(millis(700), |_| true);
    assert_eq!(link.path.state(), PathState::Down(Cause::Silent));
}

#[test]
fn a_healthy_path_costs_two_echoes_a_second() {
    let mut link = Link::new();
    link.run(seconds(60), |_| true);
    assert!((120..=121).contains(&link.echoes), "{}", link.echoes);
    assert_eq!(link.path.loss(), Some(0));
    assert_eq!(link.path.rtt(), Some(millis(1)));
}

#[test]
fn a_dead_path_is_down_within_two_seconds_wherever_in_the_interval_it_died() {
    for offset in (0..500).step_by(50) {
        let mut link = Link::new();
        link.run(seconds(10) + millis(offset), |_| true);
        let died = link.now;
        link.coming.clear();
        link.run(seconds(2), |_| false);
        let (at, state) = *link.moves.last().unwrap();
        assert_eq!(state, PathState::Down(Cause::Silent), "{offset} ms");
        assert!(at - died <= millis(1_500), "{offset} ms: {:?}", at - died);
        assert!(at - died >= millis(1_000), "{offset} ms: {:?}", at - died);
    }
}

#[test]
fn a_rare_echo_finds_a_dead_path_soon_after() {
    let mut link = Link::with(millis(1_106));
    link.run(seconds(10), |_| true);
    let died = link.now;
    link.run(seconds(3), |_| false);
    let (at, state) = *link.moves.last().unwrap();
    assert_eq!(state, PathState::Down(Cause::Silent));
    assert!(at - died <= millis(2_010), "{:?}", at - died);
}

#[test]
fn three_lost_echoes_in_a_row_are_not_enough_while_others_follow() {
    let mut link = Link::new();
    link.run(seconds(10), |_| true);
    let mut lost = 0;
    link.run(seconds(10), |_| {
        lost += 1;
        lost > 5
    });
    assert_eq!(link.states(), [PathState::Up]);
}

#[test]
fn one_packet_in_ten_that_is_lost_moves_nothing_for_five_minutes() {
    for seed in 0..50 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut link = Link::new();
        link.run(seconds(1), |_| true);
        // In both directions.
        let mut arrives = || random.next_u64() % 10 != 0;
        link.run(seconds(300), |_| arrives() && arrives());
        assert_eq!(link.states(), [PathState::Up], "seed {seed}");
        let loss = link.path.loss().unwrap();
        assert!((50..400).contains(&loss), "{loss} of 1000 at seed {seed}");
    }
}

#[test]
fn answers_that_do_not_come_back_make_a_path_down_though_its_echoes_arrive() {
    let mut link = Link::new();
    link.run(seconds(10), |_| true);
    let mut arrived = 0;
    link.run(seconds(2), |_| {
        arrived += 1;
        false
    });
    assert!(arrived > 3);
    assert_eq!(link.path.state(), PathState::Down(Cause::Silent));
}

#[test]
fn a_path_that_flaps_every_two_seconds_moves_three_times_in_a_minute() {
    for offset in (0..2_000).step_by(90) {
        let mut link = Link::new();
        link.run(seconds(20) + millis(offset), |_| true);
        let begun = link.now;
        link.moves.clear();
        link.run(seconds(60), |now| {
            (now - begun).as_millis() / 2_000 % 2 == 1
        });
        // Whether it is returning makes no difference to a leader with any other path.
        let mut preferred = link.states();
        preferred.iter_mut().for_each(|state| {
            if *state == PathState::Returning {
                *state = PathState::Down(Cause::Silent);
            }
        });
        preferred.dedup();
        assert!(preferred.len() <= 3, "{offset} ms: {preferred:?}");
        assert_eq!(preferred.last(), Some(&PathState::Down(Cause::Silent)));
    }
}

#[test]
fn a_flapping_path_that_answers_again_is_returning_and_better_than_a_dead_one() {
    let mut link = Link::new();
    link.run(seconds(40), |_| true);
    for _ in 0..4 {
        link.run(seconds(4), |_| false);
        link.run(seconds(4), |_| true);
    }
    assert_eq!(link.path.state(), PathState::Returning);
    link.run(seconds(3), |_| false);
    assert_eq!(link.path.state(), PathState::Down(Cause::Silent));
    // Having failed again on the way back makes the next way longer.
    link.run(seconds(10), |_| true);
    assert_eq!(link.path.state(), PathState::Returning);
    link.run(seconds(25), |_| true);
    assert_eq!(link.path.state(), PathState::Up);
}

#[test]
fn a_path_comes_back_after_three_good_answers_and_a_flapping_one_after_more() {
    let mut link = Link::new();
    let mut returns = Vec::new();
    link.run(seconds(40), |_| true);
    for _ in 0..8 {
        link.run(seconds(4), |_| false);
        assert_eq!(link.path.state(), PathState::Down(Cause::Silent));
        let begun = link.now;
        while link.path.state() != PathState::Up {
            assert!(link.now - begun < seconds(40));
            link.run(millis(100), |_| true);
        }
        returns.push((link.now - begun).as_secs());
    }
    // Three answers; later twice as many each time, up to half a minute.
    assert!(returns[0] <= 2, "{returns:?}");
    let grows = |two: &[u64]| two[0] <= two[1] + 1;
    assert!(returns.windows(2).all(grows), "{returns:?}");
    assert!((28..=31).contains(returns.last().unwrap()), "{returns:?}");

    // After a minute without a break all is forgotten.
    link.run(seconds(61), |_| true);
    link.run(seconds(4), |_| false);
    let begun = link.now;
    link.run(seconds(3), |_| true);
    let (at, state) = *link.moves.last().unwrap();
    assert_eq!(state, PathState::Up);
    assert!(at - begun <= seconds(2));
}

#[test]
fn a_sender_that_was_held_up_blames_no_path() {
    let mut link = Link::new();
    link.run(seconds(10), |_| true);
    // The machine slept.
    link.coming.clear();
    link.now += seconds(60);
    link.run(seconds(10), |_| true);
    assert_eq!(link.states(), [PathState::Up]);
}

#[test]
fn a_leader_that_drains_is_known_by_a_second_answer_to_one_echo() {
    let mut link = Link::new();
    link.run(seconds(10), |_| true);
    let says = Statement {
        draining: true,
        ..GOOD_LEADER
    };
    assert!(link.path.handle_answer(link.now, link.token, says));
    assert_eq!(link.path.state(), PathState::Draining);
    link.says = says;
    link.run(seconds(10), |_| true);
    assert_eq!(link.path.state(), PathState::Draining);
    link.says = GOOD_LEADER;
    link.run(seconds(1), |_| true);
    assert_eq!(link.path.state(), PathState::Up);

    // It says nothing of the path: the leader is dead when nothing else comes.
    let token = link.token;
    link.run(millis(1_400), |_| false);
    assert!(link.path.handle_answer(link.now, token, says));
    link.run(millis(600), |_| false);
    assert_eq!(link.path.state(), PathState::Down(Cause::Silent));
}

#[test]
fn a_path_that_returns_is_draining_when_an_answer_says_so_and_returns_afterwards() {
    let mut link = Link::new();
    link.run(seconds(10), |_| true);
    // It flaps, so many answers are needed before it is up again.
    for _ in 0..4 {
        link.run(seconds(3), |_| false);
        link.run(seconds(3), |_| true);
    }
    assert_eq!(link.path.state(), PathState::Returning);
    link.says.draining = true;
    link.run(seconds(1), |_| true);
    assert_eq!(link.path.state(), PathState::Draining);
    link.says.draining = false;
    link.run(seconds(1), |_| true);
    assert_eq!(link.path.state(), PathState::Returning);
    link.run(seconds(60), |_| true);
    assert_eq!(link.path.state(), PathState::Up);

    // The first answer of a path that was down says so as well.
    link.run(seconds(3), |_| false);
    assert_eq!(link.path.state(), PathState::Down(Cause::Silent));
    link.says.draining = true;
    link.run(millis(600), |_| true);
    assert_eq!(link.path.state(), PathState::Draining);
}

#[test]
fn a_leader_that_says_it_does_not_forward_is_down_at_once_and_for_that_reason() {
    let mut link = Link::new();
    link.run(seconds(10), |_| true);
    link.says.forwards = false;
    link.run(millis(501), |_| true);
    assert_eq!(link.path.state(), PathState::Down(Cause::NotForwarding));
    link.run(seconds(60), |_| true);
    assert_eq!(link.path.state(), PathState::Down(Cause::NotForwarding));
    link.says.forwards = true;
    link.run(seconds(2), |_| true);
    assert_eq!(link.path.state(), PathState::Up);
}

#[test]
fn an_answer_to_no_recent_echo_is_ignored() {
    let mut link = Link::new();
    link.run(seconds(10), |_| true);
    assert!(!link.path.handle_answer(link.now, 0, GOOD_LEADER));
    assert!(!link.path.handle_answer(link.now, 1, GOOD_LEADER));
    assert!(!link.path.handle_answer(link.now, u64::MAX, GOOD_LEADER));
}

#[test]
fn a_long_way_round_the_world_is_no_loss() {
    let mut link = Link::new();
    link.trip = millis(620);
    link.run(seconds(60), |_| true);
    assert_eq!(link.states(), [PathState::Up]);
    assert!(link.echoes <= 130, "{} echoes", link.echoes);
    assert_eq!(link.path.rtt(), Some(millis(620)));
}

proptest! {
    /// Whatever is lost: the path is never down while answers come often enough, and always when none does.
    #[test]
    fn a_path_is_down_exactly_after_silence(
        losses in prop::collection::vec((any::<bool>(), 1..3_000_u64), 1..40),
    ) {
        let mut link = Link::new();
        link.run(seconds(2), |_| true);
        for (carries, time) in losses {
            let (before, last) = (link.moves.len(), link.path.heard().unwrap());
            link.run(millis(time), |_| carries);
            let heard = link.path.heard().unwrap();
            if link.now - heard > millis(1_501) {
                prop_assert_eq!(link.path.state(), PathState::Down(Cause::Silent));
            }
            for (at, state) in &link.moves[before..] {
                if *state == PathState::Down(Cause::Silent) {
                    prop_assert!(*at - last >= millis(1_500) || *at - heard >= millis(1_500));
                }
            }
        }
    }
}
