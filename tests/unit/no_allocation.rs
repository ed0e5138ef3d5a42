//! Packets pass the device without a piece of memory being asked for, once it has carried some.
//!
//! The device's way of a packet runs here without sockets and threads; what the kernel does for it is
//! not counted. A run whose datagrams are kept is the control.
#![expect(
    unsafe_code,
    reason = "an allocator that counts can be written in no other way"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use selvedge::wireguard::bench_support::{DevicePair, Run, superpacket};

/// The system's allocator, with a count of what each thread asks for.
struct Counting;

thread_local! {
    static ASKED: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call is passed on to the system's allocator as it is; the count is a number of the
// calling thread's own that needs neither memory nor a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ASKED.set(ASKED.get() + 1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the memory came from the system's allocator, by the calls beside this one.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ASKED.set(ASKED.get() + 1);
        // SAFETY: as above.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How often memory is asked for while something is done.
fn asked(what: impl FnOnce()) -> u64 {
    let before = ASKED.get();
    what();
    ASKED.get() - before
}

/// Large packets that are cut into many, and single small ones.
fn packets() -> [Vec<u8>; 3] {
    [
        superpacket(44, 1380),
        superpacket(1, 24),
        superpacket(2, 1380),
    ]
}

#[test]
fn packets_that_go_out_take_no_memory() {
    let mut bench = DevicePair::default();
    let packets = packets();
    packets.iter().for_each(|packet| bench.transmit(packet));
    let count = asked(|| {
        for _ in 0..1000 {
            packets.iter().for_each(|packet| bench.transmit(packet));
        }
    });
    assert_eq!(count, 0, "for 47,000 datagrams");

    let kept = asked(|| drop(bench.transmitted(&packets[0])));
    assert!(kept > 0, "what is kept takes memory, and is counted");
}

#[test]
fn datagrams_that_come_in_take_no_memory() {
    let (mut sending, mut receiving) = (DevicePair::default(), DevicePair::default());
    let packets = packets();
    let mut rounds = (0..101).map(|_| {
        let runs = packets
            .iter()
            .flat_map(|packet| sending.transmitted(packet));
        runs.collect::<Vec<Run>>()
    });
    let mut receive = |runs: &mut [Run]| {
        for run in runs {
            assert_eq!(receiving.receive(run), 1, "joined again");
        }
    };
    let mut first = rounds.next().expect("101 rounds");
    let mut others: Vec<_> = rounds.collect();
    receive(&mut first);
    let count = asked(|| others.iter_mut().for_each(|runs| receive(runs)));
    assert_eq!(count, 0, "for 4,700 datagrams");
}
