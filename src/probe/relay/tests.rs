//! One leader's choice of relays among a few far leaders, on a clock that the tests move.

use super::*;
use crate::liveness::Cause;
use crate::topology::RegionName;

const DOWN: PathState = PathState::Down(Cause::Silent);

fn segment(region: &str) -> SegmentName {
    SegmentName::Location(RegionName(region.into()))
}

fn id(node: &str) -> PeerId {
    PeerId::new(format!("node/{node}"))
}

#[expect(clippy::disallowed_methods, reason = "an Instant has no other origin")]
fn start() -> Instant {
    Instant::now()
}

/// The paths of a leader. A node is named by its region and a number.
struct Ways {
    now: Instant,
    ways: BTreeMap<PeerId, Way>,
    siblings: BTreeSet<SegmentName>,
    relays: Relays,
}

impl Ways {
    /// b1 was up and is down; c1 and d1 are up, and say that they relay to b.
    fn new() -> Self {
        let mut ways = Self {
            now: start(),
            ways: BTreeMap::new(),
            siblings: BTreeSet::new(),
            relays: Relays::default(),
        };
        ways.add("b1", DOWN, 10, &[]);
        ways.add("c1", PathState::Up, 20, &["b"]);
        ways.add("d1", PathState::Up, 30, &["b"]);
        ways
    }

    fn add(&mut self, node: &str, state: PathState, millis: u64, relays_to: &[&str]) {
        let way = Way {
            node: NodeName(node.into()),
            segment: segment(&node[..1]),
            group: segment(&node[..1]),
            state,
            since: self.now,
            rtt: Some(Duration::from_millis(millis)),
            relayed: false,
            rank: Some(0),
            relays_to: relays_to.iter().map(|region| segment(region)).collect(),
        };
        self.ways.insert(id(node), way);
    }

    fn way(&mut self, node: &str) -> &mut Way {
        self.ways.get_mut(&id(node)).unwrap()
    }

    fn set(&mut self, node: &str, state: PathState) {
        let now = self.now;
        let way = self.way(node);
        (way.state, way.since) = (state, now);
    }

    /// The relay to region b after so many milliseconds.
    fn after(&mut self, millis: u64) -> Option<String> {
        let end = self.now + Duration::from_millis(millis);
        // As the prober does: at once after a change, and at each time that is asked for.
        self.look();
        while let Some(due) = self.relays.poll_timeout().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            self.look();
            if self
                .relays
                .poll_timeout()
                .is_some_and(|due| due <= self.now)
            {
                self.now += Duration::from_millis(1);
            }
        }
        self.now = end;
        self.look();
        self.present()
    }

    fn look(&mut self) {
        self.relays
            .handle_ways(self.now, &self.ways, &self.siblings);
    }

    fn present(&self) -> Option<String> {
        let relay = self.relays.relay(&segment("b"))?;
        Some(relay.peer.as_str().trim_start_matches("node/").to_owned())
    }
}

#[test]
fn the_nearest_relay_is_chosen_a_moment_after_the_direct_path_is_down() {
    let mut ways = Ways::new();
    assert_eq!(ways.after(1_000), None);
    assert_eq!(ways.after(100).as_deref(), Some("c1"));
    assert_eq!(ways.relays.peers(), [(segment("b"), id("c1"))].into());
}

#[test]
fn a_leader_that_never_answered_is_given_five_seconds() {
    let mut ways = Ways::new();
    ways.set("b1", PathState::Unknown);
    ways.way("b1").rtt = None;
    assert_eq!(ways.after(2_000), None);
    ways.set("b1", DOWN);
    assert_eq!(ways.after(2_900), None);
    assert_eq!(ways.after(200).as_deref(), Some("c1"));
}

#[test]
fn no_relay_is_used_to_a_region_of_which_one_leader_answers_directly() {
    let mut ways = Ways::new();
    ways.add("b2", PathState::Up, 10, &[]);
    assert_eq!(ways.after(10_000), None);
    ways.set("b2", PathState::Returning);
    assert_eq!(ways.after(10_000), None);
}

#[test]
fn another_leader_of_the_own_region_that_reaches_the_region_is_preferred() {
    let mut ways = Ways::new();
    ways.siblings.insert(segment("b"));
    assert_eq!(ways.after(10_000), None);
    ways.siblings.clear();
    assert!(ways.after(10).is_some());
    ways.siblings.insert(segment("b"));
    assert!(ways.after(900).is_some(), "its members know after a moment");
    assert_eq!(ways.after(200), None);
}

#[test]
fn only_a_leader_of_a_third_region_with_a_direct_path_that_says_so_relays() {
    let forbidden: [fn(&mut Way); 6] = [
        |way| way.state = PathState::Unknown,
        |way| way.state = DOWN,
        |way| way.relayed = true,
        |way| way.relays_to.clear(),
        |way| way.rank = None,
        |way| way.group = segment("b"),
    ];
    for (number, forbid) in forbidden.iter().enumerate() {
        let mut ways = Ways::new();
        forbid(ways.way("c1"));
        assert_eq!(ways.after(1_100).as_deref(), Some("d1"), "{number}");
        forbid(ways.way("d1"));
        assert_eq!(ways.after(10), None, "{number}");
    }
}

#[test]
fn a_relay_that_is_lost_is_replaced_at_once() {
    let lost = [
        DOWN,
        PathState::Draining,
        PathState::Unknown,
        PathState::Returning,
    ];
    for state in lost {
        let mut ways = Ways::new();
        ways.after(1_100);
        ways.set("c1", state);
        assert_eq!(ways.after(0).as_deref(), Some("d1"));
    }
    let mut ways = Ways::new();
    ways.after(1_100);
    ways.way("c1").relays_to.clear();
    assert_eq!(ways.after(0).as_deref(), Some("d1"));
    ways.set("d1", PathState::Draining);
    assert_eq!(ways.after(0).as_deref(), Some("d1"), "it still relays");
    ways.set("d1", DOWN);
    assert_eq!(ways.after(0), None);
}

#[test]
fn a_nearer_relay_takes_over_after_ten_seconds_and_one_that_is_hardly_nearer_never() {
    let mut ways = Ways::new();
    // The path through the relay answers.
    ways.after(1_100);
    ways.set("b1", PathState::Up);
    ways.way("b1").relayed = true;
    ways.way("d1").rtt = Some(Duration::from_millis(16));
    assert_eq!(ways.after(60_000).as_deref(), Some("c1"));
    ways.way("d1").rtt = Some(Duration::from_millis(9));
    assert_eq!(ways.after(9_000).as_deref(), Some("c1"));
    ways.way("d1").rtt = Some(Duration::from_millis(19));
    assert_eq!(ways.after(1_000).as_deref(), Some("c1"));
    ways.way("d1").rtt = Some(Duration::from_millis(9));
    assert_eq!(ways.after(9_000).as_deref(), Some("c1"));
    assert_eq!(ways.after(2_000).as_deref(), Some("d1"));
}

#[test]
fn a_path_that_flapped_relays_where_no_other_does() {
    let mut ways = Ways::new();
    ways.set("c1", PathState::Returning);
    ways.set("d1", DOWN);
    assert_eq!(ways.after(1_100).as_deref(), Some("c1"));
}

#[test]
fn the_operators_order_comes_before_the_round_trip_time() {
    let mut ways = Ways::new();
    ways.way("c1").rank = Some(1);
    assert_eq!(ways.after(1_100).as_deref(), Some("d1"));
}

#[test]
fn of_two_relays_at_the_same_distance_the_first_by_name_is_chosen() {
    let mut ways = Ways::new();
    ways.way("d1").rtt = ways.way("c1").rtt;
    assert_eq!(ways.after(1_100).as_deref(), Some("c1"));
}

#[test]
fn a_direct_path_ends_the_relay_after_three_seconds() {
    let mut ways = Ways::new();
    ways.after(1_100);
    ways.set("b1", PathState::Up);
    ways.way("b1").relayed = true;
    assert!(ways.after(60_000).is_some());
    ways.way("b1").relayed = false;
    assert!(ways.after(2_900).is_some());
    assert_eq!(ways.after(200), None);
    // A direct path that fails meanwhile changes nothing.
    ways.set("b1", DOWN);
    ways.after(1_100);
    ways.set("b1", PathState::Up);
    ways.after(2_000);
    ways.way("b1").relayed = true;
    ways.after(2_000);
    ways.way("b1").relayed = false;
    assert!(ways.after(2_000).is_some());
}

#[test]
fn a_relay_that_brings_no_answer_is_left_for_another_one() {
    let mut ways = Ways::new();
    assert_eq!(ways.after(1_100).as_deref(), Some("c1"));
    assert_eq!(ways.after(10_000).as_deref(), Some("c1"));
    assert_eq!(ways.after(2_000).as_deref(), Some("d1"));
    ways.set("b1", PathState::Up);
    ways.way("b1").relayed = true;
    // The one that failed is nearer, and comes last for a minute.
    assert_eq!(ways.after(40_000).as_deref(), Some("d1"));
}
