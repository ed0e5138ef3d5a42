//! Lets several threads work on batches at the same time and delivers the batches in order.
//!
//! A thread takes a batch while it alone holds the entrance, works on it in parallel with the others, and
//! delivers it after all batches that were taken before. So the packets of one peer, which all come
//! through one socket, are opened on several CPUs and reach the link in the order of their arrival.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// An entrance and an exit, and the order between them.
#[derive(Debug, Default)]
pub(super) struct Sequencer {
    /// The number of the next batch to be taken.
    entrance: Mutex<u64>,
    /// The number of the next batch to be delivered.
    exit: Mutex<u64>,
    left: Condvar,
}

/// The right to take the next batch.
#[derive(Debug)]
pub(super) struct Entrance<'a>(MutexGuard<'a, u64>);

/// The place of a batch in the order. It must be delivered, or the batches behind it wait for ever.
#[derive(Debug)]
#[must_use]
pub(super) struct Ticket(u64);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sequencer {
    /// Waits for the right to take a batch.
    pub(super) fn enter(&self) -> Entrance<'_> {
        Entrance(lock(&self.entrance))
    }

    /// Delivers a batch when it is its turn.
    pub(super) fn deliver(&self, ticket: Ticket, batch: impl FnOnce()) {
        let mut exit = lock(&self.exit);
        while *exit != ticket.0 {
            exit = self.left.wait(exit).unwrap_or_else(PoisonError::into_inner);
        }
        batch();
        *exit += 1;
        drop(exit);
        self.left.notify_all();
    }
}

impl Entrance<'_> {
    /// Numbers the batch that was taken. The next thread may enter when the entrance is dropped.
    pub(super) fn take(&mut self) -> Ticket {
        let ticket = Ticket(*self.0);
        *self.0 += 1;
        ticket
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn batches_are_delivered_in_the_order_they_were_taken_whichever_thread_is_slow() {
        let sequencer = Sequencer::default();
        let batches = Mutex::new((0..200_u64).collect::<VecDeque<_>>());
        let delivered = Mutex::new(Vec::new());
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    loop {
                        let mut entrance = sequencer.enter();
                        let Some(batch) = batches.lock().unwrap().pop_front() else {
                            return;
                        };
                        let ticket = entrance.take();
                        drop(entrance);
                        thread::sleep(Duration::from_micros(batch * 7919 % 400));
                        sequencer.deliver(ticket, || delivered.lock().unwrap().push(batch));
                    }
                });
            }
        });
        let delivered = delivered.into_inner().unwrap();
        assert_eq!(delivered, (0..200).collect::<Vec<_>>());
    }
}
