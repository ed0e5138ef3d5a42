//! One path on a simulated link that drops what is too large, loses packets, and changes.

use std::collections::BTreeMap;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;

const TICK: Duration = Duration::from_millis(1);

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

fn v4(underlay: u32) -> Limits {
    let sizes = Sizes {
        start: 1420.min(underlay - 80),
        underlay,
    };
    Limits::direct([192, 0, 2, 1].into(), sizes)
}

/// A link of this MTU for IP packets, and the path over it.
struct Link {
    path: PathMtu,
    now: Instant,
    carries: u32,
    round_trip: Duration,
    /// Packets that each direction loses, in thousandths.
    loss: u32,
    random: StdRng,
    answers: Vec<(Instant, u64)>,
    tokens: u64,
    /// How many echoes of each size were sent.
    sent: BTreeMap<u32, usize>,
    /// What the MTU was, and since when.
    told: Vec<(Instant, u32)>,
}

impl Link {
    fn new(limits: Limits, carries: u32) -> Self {
        let now = start();
        let mut path = PathMtu::new(now, limits);
        path.set_alive(now, true);
        path.set_busy(now, true);
        let mut link = Self {
            path,
            now,
            carries,
            round_trip: millis(20),
            loss: 0,
            random: StdRng::seed_from_u64(7),
            answers: Vec::new(),
            tokens: 0,
            sent: BTreeMap::new(),
            told: Vec::new(),
        };
        link.tell_quality();
        link
    }

    fn tell_quality(&mut self) {
        let arrives = u64::from(1_000 - self.loss).pow(2);
        let lost = 1_000 - u32::try_from(arrives / 1_000).unwrap();
        let overdue = (self.round_trip * 2).clamp(millis(150), seconds(1));
        self.path.set_quality(overdue, Some(lost));
    }

    fn is_lost(&mut self) -> bool {
        self.random.random_range(0..1_000) < self.loss
    }

    fn send(&mut self, size: u32) -> u64 {
        self.tokens += 1;
        *self.sent.entry(size).or_default() += 1;
        let fits = size + self.path.limits.overhead <= self.carries;
        if fits && !self.is_lost() && !self.is_lost() {
            self.answers.push((self.now + self.round_trip, self.tokens));
        }
        self.tokens
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            let answer = self.answers.iter().map(|(at, _)| *at).min();
            let next = [self.path.poll_timeout(), answer, Some(end)];
            let next = next.into_iter().flatten().min().unwrap_or(end);
            self.now = next.clamp(self.now + TICK, end.max(self.now + TICK));
            let now = self.now;
            let due = self.answers.extract_if(.., |(at, _)| *at <= now);
            for (_, token) in due.collect::<Vec<_>>() {
                assert!(self.path.handle_answer(now, token) || self.round_trip > seconds(2));
            }
            if self.path.poll_timeout().is_some_and(|at| at <= now) {
                self.path.handle_timeout(now);
                if let Some(ask) = self.path.poll_ask(now) {
                    let large = self.send(ask.size);
                    let beside = ask.beside.map(|size| self.send(size));
                    self.path.handle_sent(now, large, beside);
                }
            }
            if self
                .told
                .last()
                .is_none_or(|(_, mtu)| *mtu != self.path.mtu())
            {
                self.told.push((now, self.path.mtu()));
            }
        }
    }

    fn outer(&self) -> u32 {
        self.path.mtu() + self.path.limits.overhead
    }

    fn count(&self) -> usize {
        self.sent.values().sum()
    }
}

#[test]
fn every_usual_size_is_found_within_five_seconds_with_a_bounded_number_of_echoes() {
    for (underlay, carries) in [
        (1500, 1280),
        (1500, 1300),
        (1500, 1337),
        (1500, 1400),
        (1500, 1420),
        (1500, 1454),
        (1500, 1480),
        (1500, 1492),
        (1500, 1500),
        (9000, 1280),
        (9000, 1500),
        (9000, 9000),
        (9001, 8500),
        (9001, 9001),
    ] {
        let mut link = Link::new(v4(underlay), carries);
        link.run(seconds(5));
        assert_eq!(link.outer(), carries, "below a link of {underlay}");
        assert!(link.path.is_confirmed());
        assert!(link.count() < 90, "{} echoes", link.count());
    }
}

#[test]
fn a_size_that_is_found_by_bytes_is_at_most_a_thousandth_too_small() {
    for carries in [1281, 1311, 1459, 3_333, 7_777, 8_949] {
        let mut link = Link::new(v4(9000), carries);
        link.run(seconds(8));
        let short = carries - link.outer();
        assert!(short <= carries / 1_000, "{short} bytes of {carries}");
    }
}

#[test]
fn a_path_over_ipv6_never_goes_below_its_least_mtu() {
    let sizes = Sizes {
        start: 1420,
        underlay: 1500,
    };
    let limits = Limits::direct("2001:db8::1".parse().unwrap(), sizes);
    let mut link = Link::new(limits, 1500);
    link.run(seconds(3));
    assert_eq!(link.path.mtu(), 1420);
    // No such path may exist; nothing smaller helps.
    link.carries = 1200;
    link.run(seconds(10));
    assert_eq!(link.path.mtu(), 1200);
    link.carries = 1280;
    link.run(seconds(60));
    assert_eq!(link.path.mtu(), 1200);
}

#[test]
fn a_path_that_shrinks_under_load_is_lowered_within_two_seconds_and_exact_within_six() {
    for offset in [0, 130, 333, 700, 999] {
        for (before, after) in [(1500, 1300), (1500, 1280), (1500, 1492), (9000, 1500)] {
            let mut link = Link::new(v4(9000), before);
            link.run(seconds(12) + millis(offset));
            assert_eq!(link.outer(), before);
            link.carries = after;
            let changed = link.now;
            link.told.clear();
            link.run(seconds(2));
            let lowered = link.told.iter().find(|(_, mtu)| *mtu + 60 <= after);
            let lowered = lowered.expect("it is lowered").0 - changed;
            assert!(lowered < seconds(2), "{lowered:?} to {after}");
            link.run(seconds(4));
            assert_eq!(link.outer(), after);
        }
    }
}

#[test]
fn not_even_the_base_passes_and_the_path_goes_down_to_what_does() {
    let mut link = Link::new(v4(1500), 1500);
    link.run(seconds(3));
    link.carries = 700;
    link.run(seconds(12));
    assert_eq!(link.outer(), 700);
}

#[test]
fn loss_of_one_packet_in_ten_lowers_no_path_in_eight_hours() {
    for seed in 0..10 {
        let mut link = Link::new(v4(1500), 1500);
        link.loss = 100;
        link.random = StdRng::seed_from_u64(seed);
        link.tell_quality();
        link.run(seconds(600));
        assert_eq!(link.outer(), 1500);
        link.told.clear();
        link.run(seconds(3_000));
        let lower = link.told.iter().filter(|(_, mtu)| *mtu < 1440).count();
        assert_eq!(lower, 0, "seed {seed}: {:?}", link.told);
    }
}

#[test]
fn heavy_loss_lowers_a_path_at_most_for_a_moment() {
    for seed in 0..5 {
        let mut link = Link::new(v4(1500), 1500);
        link.loss = 250;
        link.random = StdRng::seed_from_u64(seed);
        link.tell_quality();
        link.run(seconds(600));
        let lower = link.told.iter().filter(|(_, mtu)| *mtu <= 1220).count();
        assert!(lower <= 1, "seed {seed}: {:?}", link.told);
    }
}

#[test]
fn an_outage_lowers_nothing_whether_small_echoes_have_noticed_it_or_not() {
    let mut link = Link::new(v4(1500), 1500);
    link.run(seconds(5));
    link.carries = 0;
    link.run(seconds(30));
    assert_eq!(link.outer(), 1500);
    assert!(link.sent[&0] < 200, "{:?}", link.sent);
    let now = link.now;
    link.path.set_alive(now, false);
    let before = link.count();
    link.run(seconds(30));
    assert_eq!((link.outer(), link.count()), (1500, before));
    link.carries = 1500;
    link.path.set_alive(link.now, true);
    link.run(seconds(5));
    assert_eq!(link.outer(), 1500);
    assert_eq!(link.told.iter().filter(|(_, mtu)| *mtu < 1420).count(), 0);
}

#[test]
fn a_path_that_grows_again_is_raised_after_half_a_minute_and_later_ever_more_rarely() {
    let mut link = Link::new(v4(1500), 1300);
    link.run(seconds(6));
    assert_eq!(link.outer(), 1300);
    link.carries = 1500;
    link.run(seconds(35));
    assert_eq!(link.outer(), 1500);

    let mut link = Link::new(v4(1500), 1300);
    link.run(seconds(1_300));
    let largest = link.sent[&1440];
    link.run(seconds(3_600));
    let tries = link.sent[&1440] - largest;
    assert!((5..=7).contains(&(tries / SEARCHED)), "{tries} in an hour");
    link.carries = 1500;
    link.run(seconds(620));
    assert_eq!(link.outer(), 1500);
}

#[test]
fn a_moved_endpoint_begins_again_at_once_and_with_no_more_than_before() {
    let mut link = Link::new(v4(1500), 1300);
    link.run(seconds(6));
    link.carries = 1500;
    link.path.handle_move(link.now, v4(1500));
    assert_eq!(link.outer(), 1300);
    link.run(seconds(2));
    assert_eq!(link.outer(), 1500);
    let v6 = Limits::direct(
        "2001:db8::1".parse().unwrap(),
        Sizes {
            start: 1420,
            underlay: 1500,
        },
    );
    link.path.handle_move(link.now, v6);
    assert_eq!(link.path.mtu(), 1420);
}

#[test]
fn a_relayed_path_is_smaller_by_another_tunnel_and_follows_the_relays() {
    let sizes = Sizes {
        start: 1420,
        underlay: 1500,
    };
    let relay = Limits::direct([192, 0, 2, 1].into(), sizes);
    for (inside, less) in [("10.4.0.2", 60), ("fd00::2", 80)] {
        let limits = |carried| Limits::relayed(inside.parse().unwrap(), sizes, &relay, carried);
        let mut link = Link::new(limits(1440), 1500);
        link.run(seconds(2));
        assert_eq!(link.path.mtu(), 1440 - less);
        // The relay's own path shrank. Its datagrams would not even leave this host.
        link.path.handle_limits(link.now, limits(1240));
        assert_eq!(link.path.mtu(), 1240 - less);
    }
}

#[test]
fn a_path_without_traffic_costs_an_echo_in_fifteen_seconds_and_one_with_traffic_one_a_second() {
    for (is_busy, most) in [(true, 62), (false, 6)] {
        let mut link = Link::new(v4(1500), 1500);
        link.run(seconds(5));
        link.path.set_busy(link.now, is_busy);
        link.run(seconds(2));
        let before = link.count();
        link.run(seconds(60));
        let count = link.count() - before;
        assert!((most - 4..=most).contains(&count), "{count} echoes");
    }
}

#[test]
fn traffic_after_a_rest_has_the_size_confirmed_at_once() {
    let mut link = Link::new(v4(1500), 1500);
    link.run(seconds(5));
    link.path.set_busy(link.now, false);
    link.run(seconds(20));
    link.carries = 1300;
    link.run(seconds(1));
    link.path.set_busy(link.now, true);
    link.run(seconds(1));
    assert!(link.outer() <= 1300, "{}", link.outer());
}

#[test]
fn an_answer_that_is_only_slow_is_believed() {
    let mut link = Link::new(v4(1500), 1500);
    // Slower than any echo may be: each counts as lost, and then comes.
    link.round_trip = millis(1_500);
    link.path.set_quality(seconds(1), None);
    link.run(seconds(90));
    assert!(link.outer() >= 1280);
    link.round_trip = millis(20);
    link.run(seconds(40));
    assert_eq!(link.outer(), 1500);
}

#[test]
fn a_long_round_trip_still_finds_the_size_within_ten_seconds() {
    for carries in [1280, 1300, 1400, 1500] {
        let mut link = Link::new(v4(1500), carries);
        link.round_trip = millis(300);
        link.tell_quality();
        link.run(seconds(10));
        assert_eq!(link.outer(), carries);
    }
}
