//! When to tell that a peer has moved. Pure: the time is passed in.
//!
//! Where a leader is seen is written to the API, and whoever reads it looks at everything anew. Some NATs
//! never come to rest: they give another port every minute, or to and fro between two. Whoever moves now
//! and then is told of at once; who keeps moving, ever more seldom, until it has been calm for a while.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::wireguard::key::PublicKey;

/// So many moves are told at once: a laptop changes its network, its router restarts, and both again.
const FREE: u32 = 6;
/// The pause before the next one; doubled with each.
const PAUSE: Duration = Duration::from_secs(30);
/// The longest one, so that who moves for ever costs twelve writes an hour.
const LONGEST: Duration = Duration::from_secs(300);
/// Who did not move for so long has come to rest.
const CALM: Duration = Duration::from_secs(900);

/// Where each peer was told to be.
#[derive(Debug, Default)]
pub struct Restless(BTreeMap<PublicKey, Told>);

#[derive(Debug)]
struct Told {
    place: SocketAddr,
    /// Where it was last heard.
    heard: SocketAddr,
    moved: Instant,
    at: Instant,
    /// The moves told since it was last calm.
    moves: u32,
}

impl Told {
    fn pause(&self) -> Duration {
        match self.moves.checked_sub(FREE) {
            None => Duration::ZERO,
            Some(more) => PAUSE.saturating_mul(1 << more.min(8)).min(LONGEST),
        }
    }
}

impl Restless {
    /// Takes where peers are heard; gives where they are to be told to be, and those of whom it is news
    /// that they do not come to rest.
    pub fn handle_heard(
        &mut self,
        heard: &BTreeMap<PublicKey, SocketAddr>,
        now: Instant,
    ) -> (BTreeMap<PublicKey, SocketAddr>, Vec<PublicKey>) {
        self.0.retain(|key, _| heard.contains_key(key));
        let mut news = Vec::new();
        for (key, place) in heard {
            let told = self.0.entry(*key).or_insert_with(|| Told {
                place: *place,
                heard: *place,
                moved: now,
                at: now,
                moves: 0,
            });
            if told.heard != *place {
                if now.saturating_duration_since(told.moved) >= CALM {
                    told.moves = 0;
                }
                (told.heard, told.moved) = (*place, now);
            }
            if told.place != *place && now.saturating_duration_since(told.at) >= told.pause() {
                (told.place, told.at) = (*place, now);
                told.moves += 1;
                news.extend((told.moves == FREE).then_some(*key));
            }
        }
        let places = self.0.iter().map(|(key, told)| (*key, told.place));
        (places.collect(), news)
    }
}

#[cfg(test)]
#[expect(
    clippy::disallowed_methods,
    reason = "an instant can only be had from the clock"
)]
mod tests {
    use super::*;

    const KEY: PublicKey = PublicKey([7; 32]);

    /// A peer, and what was told of it.
    struct World {
        restless: Restless,
        start: Instant,
        told: Option<SocketAddr>,
        times: Vec<u64>,
        news: Vec<u64>,
    }

    impl World {
        fn new() -> Self {
            Self {
                restless: Restless::default(),
                start: Instant::now(),
                told: None,
                times: Vec::new(),
                news: Vec::new(),
            }
        }

        /// It is heard at a port at a time in seconds.
        fn at(&mut self, seconds: u64, port: u16) {
            let place = SocketAddr::from(([198, 51, 100, 7], port));
            let now = self.start + Duration::from_secs(seconds);
            let (told, news) = self.restless.handle_heard(&[(KEY, place)].into(), now);
            if self.told != told.get(&KEY).copied() {
                self.told = told.get(&KEY).copied();
                self.times.push(seconds);
            }
            if !news.is_empty() {
                self.news.push(seconds);
            }
        }
    }

    #[test]
    fn the_first_moves_are_told_at_once() {
        let mut world = World::new();
        for (seconds, port) in [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)] {
            world.at(seconds, port);
        }
        assert_eq!(world.times, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_mapping_that_keeps_changing_is_told_ever_more_seldom_and_logged_once() {
        let mut world = World::new();
        for seconds in 0..3600 {
            // To and fro, each second.
            world.at(seconds, 1 + u16::try_from(seconds % 2).unwrap());
        }
        // Where it stands still when its time comes, it is told the second after.
        assert_eq!(world.times[..10], [0, 1, 2, 3, 4, 5, 6, 37, 98, 219]);
        assert!(world.times.len() < 22, "{:?}", world.times);
        assert_eq!(world.news, [6]);
    }

    #[test]
    fn where_it_comes_to_rest_is_told_in_the_end_and_later_moves_at_once_again() {
        let mut world = World::new();
        for seconds in 0..600 {
            world.at(seconds, 1 + u16::try_from(seconds).unwrap());
        }
        for seconds in 600..2000 {
            world.at(seconds, 9999);
        }
        let last = *world.times.last().unwrap();
        assert!((600..900).contains(&last), "{last}");
        assert_eq!(world.told.unwrap().port(), 9999);
        world.at(2000, 1);
        world.at(2001, 2);
        assert_eq!(world.times[world.times.len() - 2..], [2000, 2001]);
    }

    #[test]
    fn one_that_is_gone_is_forgotten() {
        let mut world = World::new();
        world.at(0, 1);
        let now = world.start + Duration::from_secs(1);
        assert_eq!(
            world.restless.handle_heard(&BTreeMap::new(), now).0.len(),
            0
        );
        assert!(world.restless.0.is_empty());
    }
}
