//! How processors' threads reach what the machine thread owns.
//!
//! The machine thread has the devices and the map of memory for itself, as it has with the software processor. Only
//! while it waits for events it lends them ([`Desk::lend`]): then an exit of any processor may use them, one at a
//! time ([`Desk::with`]). An exit that comes at another time waits. This is QEMU's big lock with the owner's part
//! made implicit: nothing of the machine needs a lock of its own.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::bells::Bell;
use crate::{ApicMessage, GuestMemory};

/// What processors reach outside themselves.
pub trait Board {
    /// Read `size` (1, 2, 4) bytes of an I/O port.
    fn io_read(&mut self, port: u16, size: u8) -> u32;
    /// Write `size` (1, 2, 4) bytes to an I/O port.
    fn io_write(&mut self, port: u16, size: u8, value: u32);
    /// Read `size` (1 to 8) bytes of memory-mapped I/O.
    fn mmio_read(&mut self, address: u64, size: u8) -> u64;
    /// Write `size` (1 to 8) bytes of memory-mapped I/O.
    fn mmio_write(&mut self, address: u64, size: u8, value: u64);
    /// The 8259 pair's INTR line.
    fn intr(&self) -> bool;
    /// Interrupt acknowledge cycle of the 8259 pair: the vector.
    fn intr_ack(&mut self) -> u8;
    /// A local APIC ended a level-triggered interrupt.
    fn eoi(&mut self, vector: u8);
    /// Interrupt messages for the local APICs.
    fn take_messages(&mut self) -> Vec<ApicMessage>;
    /// What each pin of the I/O APIC would send, for those that are level-triggered: whose end is to be told.
    fn level_pins(&self) -> Vec<Option<ApicMessage>>;
    /// Something waits for the machine thread: an output, a wish of the guest.
    fn has_news(&self) -> bool;
    /// Virtual time in ns at which the next timer of a device fires.
    fn next_deadline(&self) -> Option<u64>;
    /// Guest memory.
    fn memory(&self) -> &GuestMemory;
    /// Changes whenever [`Self::bells`] does.
    fn bells_version(&self) -> u64 {
        0
    }
    /// Where writes only ring, as things are mapped now.
    fn bells(&self) -> Vec<Bell> {
        Vec::new()
    }
    /// A guest wrote where a bell of this token is, or was.
    fn ring(&mut self, _token: u64) {}
}

struct Lent(*mut (dyn Board + 'static));

// SAFETY: the pointer is followed by one thread at a time (under the desk's mutex) while its owner, which may not
// touch what it points to meanwhile, waits in `lend`. What a board consists of may move between threads (a machine's
// chipset and memory are `Send`).
unsafe impl Send for Lent {}

#[derive(Default)]
struct State {
    board: Option<Lent>,
    /// When the lender will look again by itself, in virtual time.
    until: Option<u64>,
    /// Borrowers that came, and that were served or went.
    came: u64,
    served: u64,
    closed: bool,
}

/// See the module.
#[derive(Default)]
pub struct Desk {
    state: Mutex<State>,
    lent: Condvar,
    done: Condvar,
}

/// Takes back what is lent, also when the lender's work panics.
struct TakeBack<'a> {
    desk: &'a Desk,
    wanted: u64,
}

impl Drop for TakeBack<'_> {
    fn drop(&mut self) {
        let mut state = self.desk.state();
        // Whoever waited when the lending began has its turn, however short the lending was.
        while state.served < self.wanted {
            state = self.desk.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.board = None;
    }
}

impl Desk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lend `board` while `work` runs, which waits until virtual time `until` at most.
    pub fn lend<T>(&self, board: &mut dyn Board, until: Option<u64>, work: impl FnOnce() -> T) -> T {
        let pointer: *mut (dyn Board + '_) = board;
        // SAFETY: only the lifetime changes. `TakeBack` removes the pointer under the mutex before this function
        // ends, so nobody follows it longer than `board` is borrowed.
        let pointer: *mut (dyn Board + 'static) = unsafe { std::mem::transmute(pointer) };
        let mut state = self.state();
        state.board = Some(Lent(pointer));
        state.until = until;
        let back = TakeBack { desk: self, wanted: state.came };
        drop(state);
        self.lent.notify_all();
        let result = work();
        drop(back);
        result
    }

    /// Use the board, waiting until it is lent. `work` also hears until when the lender waits. `None`: the machine is
    /// at its end.
    pub fn with<T>(&self, work: impl FnOnce(&mut dyn Board, Option<u64>) -> T) -> Option<T> {
        let mut state = self.state();
        state.came += 1;
        while state.board.is_none() && !state.closed {
            state = self.lent.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let until = state.until;
        let result = state.board.as_mut().map(|lent| {
            // SAFETY: see `Lent`: the mutex is held, and the board is still lent.
            work(unsafe { &mut *lent.0 }, until)
        });
        state.served += 1;
        drop(state);
        self.done.notify_all();
        result
    }

    /// Nothing will be lent any more.
    pub fn close(&self) {
        self.state().closed = true;
        self.lent.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    struct Counter {
        mem: GuestMemory,
        count: u32,
    }

    impl Board for Counter {
        fn io_read(&mut self, _: u16, _: u8) -> u32 {
            self.count += 1;
            self.count
        }
        fn io_write(&mut self, _: u16, _: u8, _: u32) {}
        fn mmio_read(&mut self, _: u64, _: u8) -> u64 {
            0
        }
        fn mmio_write(&mut self, _: u64, _: u8, _: u64) {}
        fn intr(&self) -> bool {
            false
        }
        fn intr_ack(&mut self) -> u8 {
            0
        }
        fn eoi(&mut self, _: u8) {}
        fn take_messages(&mut self) -> Vec<ApicMessage> {
            Vec::new()
        }
        fn level_pins(&self) -> Vec<Option<ApicMessage>> {
            Vec::new()
        }
        fn has_news(&self) -> bool {
            false
        }
        fn next_deadline(&self) -> Option<u64> {
            None
        }
        fn memory(&self) -> &GuestMemory {
            &self.mem
        }
    }

    #[test]
    fn every_borrower_has_its_turn_and_none_after_the_end() {
        let desk = Arc::new(Desk::default());
        let mut board = Counter { mem: GuestMemory::new(1 << 20).unwrap(), count: 0 };
        let borrowers: Vec<_> = (0..4)
            .map(|_| {
                let desk = Arc::clone(&desk);
                std::thread::spawn(move || {
                    (0..250).filter(|_| desk.with(|b, _| b.io_read(0, 1)).is_some()).count()
                })
            })
            .collect();
        while board.count < 1000 {
            let before = board.count;
            desk.lend(&mut board, None, || ());
            assert!(board.count >= before);
        }
        assert_eq!(borrowers.into_iter().map(|b| b.join().unwrap()).sum::<usize>(), 1000);
        desk.close();
        assert_eq!(desk.with(|b, _| b.io_read(0, 1)), None);
        assert_eq!(board.count, 1000);
    }
}
