//! Which message counters of a session were seen (RFC 6479; WireGuard paper 5.4.6).
//!
//! A counter is looked up before the packet is opened and marked after, so that only authentic
//! packets move the window.

/// How far behind the highest counter a packet may be: 8,192, as in the kernel.
pub const WINDOW: u64 = 8192;

const WORD: u64 = u64::BITS as u64;
/// One word more than the window, so that the word being filled never counts as part of it.
const WORDS: usize = (WINDOW / WORD) as usize + 1;

/// A sliding window over message counters.
#[derive(Clone, Debug)]
pub struct ReplayWindow {
    /// One more than the highest counter seen.
    next: u64,
    words: [u64; WORDS],
}

impl Default for ReplayWindow {
    fn default() -> Self {
        Self {
            next: 0,
            words: [0; WORDS],
        }
    }
}

fn position(counter: u64) -> (usize, u64) {
    let word = (counter / WORD) % WORDS as u64;
    let word = usize::try_from(word).expect("it is less than WORDS");
    (word, 1 << (counter % WORD))
}

impl ReplayWindow {
    /// Whether a packet with this counter is neither a repetition nor too old.
    pub fn is_fresh(&self, counter: u64) -> bool {
        if counter >= self.next {
            return true;
        }
        let (word, bit) = position(counter);
        self.next - 1 - counter < WINDOW && self.words[word] & bit == 0
    }

    /// Marks a counter as seen; false if it was not fresh.
    ///
    /// `counter` must be less than `u64::MAX`, which the session's limit ensures.
    pub fn mark(&mut self, counter: u64) -> bool {
        if !self.is_fresh(counter) {
            return false;
        }
        if counter >= self.next {
            // The words between the highest so far and this one held counters a window ago.
            let (from, to) = (self.next.div_ceil(WORD), counter / WORD);
            if to >= from {
                if to - from >= WORDS as u64 {
                    self.words = [0; WORDS];
                } else {
                    for word in from..=to {
                        self.words[position(word * WORD).0] = 0;
                    }
                }
            }
            self.next = counter + 1;
        }
        let (word, bit) = position(counter);
        self.words[word] |= bit;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_of_8192_late_packets_is_accepted_once() {
        let mut window = ReplayWindow::default();
        assert!(window.mark(WINDOW));

        let taken = (1..WINDOW).rev().filter(|&counter| window.mark(counter));
        assert_eq!(taken.count() as u64, WINDOW - 1);
        assert!((1..=WINDOW).all(|counter| !window.mark(counter)));
        assert!(!window.is_fresh(0), "it is 8,192 behind");
    }

    #[test]
    fn a_counter_near_the_limit_neither_panics_nor_reopens_the_window() {
        let mut window = ReplayWindow::default();
        assert!(window.mark(5));
        assert!(window.mark(u64::MAX - 1));
        assert!(!window.mark(5));
        assert!(window.mark(u64::MAX - 2));
    }

    proptest! {
        #[test]
        fn the_window_agrees_with_a_set(steps in prop::collection::vec((any::<bool>(), 0_u64..20_000), 1..400)) {
            let (mut window, mut seen) = (ReplayWindow::default(), BTreeSet::new());
            let mut highest: u64 = 0;
            for (forward, distance) in steps {
                let counter = if forward { highest + distance % 200 } else { highest.saturating_sub(distance) };
                let fresh = !seen.contains(&counter) && (counter > highest || highest - counter < WINDOW);
                prop_assert_eq!(window.is_fresh(counter), fresh, "{} below {}", counter, highest);
                prop_assert_eq!(window.mark(counter), fresh);
                if fresh {
                    seen.insert(counter);
                    highest = highest.max(counter);
                }
            }
        }

        #[test]
        fn jumps_of_any_size_agree_with_a_set(counters in prop::collection::vec(prop_oneof![0_u64..30_000, 0_u64..10_000_000], 1..200)) {
            let (mut window, mut seen) = (ReplayWindow::default(), BTreeSet::new());
            for counter in counters {
                let highest = seen.last().copied().unwrap_or(0);
                let fresh = !seen.contains(&counter) && (counter > highest || highest - counter < WINDOW);
                prop_assert_eq!(window.mark(counter), fresh);
                if fresh {
                    seen.insert(counter);
                }
            }
        }
    }
}
