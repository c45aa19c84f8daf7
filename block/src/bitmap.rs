//! Dirty bitmaps: which parts of a node were written while they recorded (QEMU's `docs/interop/bitmaps.rst`).

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::bits::Bits;
use crate::BlockError;

/// The longest name, in bytes.
pub const MAX_NAME: usize = 1023;

/// A bitmap as an image's file keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredBitmap {
    pub name: String,
    /// Bytes of a part.
    pub granularity: u64,
    /// It records from the moment when the image is opened for writing.
    pub auto: bool,
    /// Its contents; `None`: it was in use when its program ended, and nobody knows.
    pub bits: Option<Bits>,
}

/// What a command wants of a bitmap ([`DirtyBitmap::check`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Look at it, or switch its recording.
    Read,
    /// Change what it says.
    Change,
    /// Take it away; one that is inconsistent may be.
    Remove,
}

#[derive(Clone, Debug)]
struct State {
    bits: Bits,
    recording: bool,
    /// Something works on it: what is written meanwhile goes into the successor.
    busy: bool,
    successor: Option<Bits>,
    inconsistent: bool,
}

/// A dirty bitmap of a node.
#[derive(Debug)]
pub struct DirtyBitmap {
    name: String,
    persistent: bool,
    state: Mutex<State>,
}

/// What a bitmap is at a moment (QEMU's `BlockDirtyInfo`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    pub name: String,
    /// Bytes in its parts.
    pub count: u64,
    pub granularity: u64,
    pub recording: bool,
    pub busy: bool,
    pub persistent: bool,
    pub inconsistent: bool,
}

impl DirtyBitmap {
    /// An empty one of a node of `size` bytes.
    pub fn new(name: &str, size: u64, granularity: u64, persistent: bool, recording: bool) -> Self {
        let bits = Bits::new(size, granularity);
        let state = State { bits, recording, busy: false, successor: None, inconsistent: false };
        DirtyBitmap { name: name.to_owned(), persistent, state: Mutex::new(state) }
    }

    /// One that an image's file keeps.
    pub(crate) fn of_file(stored: StoredBitmap, size: u64) -> Self {
        let inconsistent = stored.bits.is_none();
        let bits = stored.bits.unwrap_or_else(|| Bits::new(size, stored.granularity));
        let recording = stored.auto && !inconsistent;
        let state = State { bits, recording, busy: false, successor: None, inconsistent };
        DirtyBitmap { name: stored.name, persistent: true, state: Mutex::new(state) }
    }

    /// As a file is to keep it.
    pub(crate) fn to_file(&self) -> StoredBitmap {
        let state = self.state();
        let mut bits = state.bits.clone();
        if let Some(successor) = &state.successor {
            bits.merge(successor);
        }
        StoredBitmap {
            name: self.name.clone(),
            granularity: bits.granularity(),
            auto: state.recording,
            bits: (!state.inconsistent).then_some(bits),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the image's file keeps it.
    pub fn is_persistent(&self) -> bool {
        self.persistent
    }

    pub fn info(&self) -> BitmapInfo {
        let state = self.state();
        BitmapInfo {
            name: self.name.clone(),
            count: state.bits.bytes(),
            granularity: state.bits.granularity(),
            recording: state.recording,
            busy: state.busy,
            persistent: self.persistent,
            inconsistent: state.inconsistent,
        }
    }

    /// A range was written, or part of it.
    pub(crate) fn mark(&self, offset: u64, len: u64) {
        let mut state = self.state();
        if state.recording {
            let State { bits, successor, .. } = &mut *state;
            successor.as_mut().unwrap_or(bits).add(offset, len);
        }
    }

    /// The image has another size; what is new counts as written.
    pub(crate) fn resize(&self, size: u64) {
        let mut state = self.state();
        let (old, recording) = (state.bits.size(), state.recording);
        let State { bits, successor, .. } = &mut *state;
        for bits in std::iter::once(bits).chain(successor) {
            bits.resize(size);
            if recording {
                bits.add(old, size.saturating_sub(old));
            }
        }
    }

    /// Whether it can be used like that, in QEMU's words; `read_only`: the image that keeps it is.
    pub fn check(&self, how: Use, read_only: bool) -> Result<(), BlockError> {
        let state = self.state();
        let fail = |text: &str| Err(BlockError::Unsupported(format!("Bitmap '{}' is {text}", self.name)));
        if state.busy {
            return fail("currently in use by another operation and cannot be used");
        }
        if how != Use::Read && self.persistent && read_only {
            return fail("readonly and cannot be modified");
        }
        if how != Use::Remove && state.inconsistent {
            return fail("inconsistent and cannot be used");
        }
        Ok(())
    }

    /// Let it record, or not.
    pub fn record(&self, yes: bool) {
        self.state().recording = yes;
    }

    /// What it says is wrong from here on.
    pub(crate) fn distrust(&self) {
        let mut state = self.state();
        (state.inconsistent, state.recording) = (true, false);
    }

    /// Its contents at this moment.
    pub fn bits(&self) -> Bits {
        self.state().bits.clone()
    }

    /// Whether the byte at `offset` was written, and for how many bytes the answer holds.
    pub fn run(&self, offset: u64) -> (bool, u64) {
        self.state().bits.run(offset)
    }

    /// Give it other contents; what it had.
    pub fn replace(&self, bits: Bits) -> Bits {
        std::mem::replace(&mut self.state().bits, bits)
    }

    /// Add what another set has; what it had.
    pub fn add(&self, more: &Bits) -> Bits {
        let mut state = self.state();
        let had = state.bits.clone();
        state.bits.merge(more);
        had
    }

    /// Empty it; what it had.
    pub fn clear(&self) -> Bits {
        let mut state = self.state();
        let empty = Bits::new(state.bits.size(), state.bits.granularity());
        std::mem::replace(&mut state.bits, empty)
    }

    /// Something reads it, and nothing else may use it meanwhile; it goes on recording (QEMU locks those of exports so).
    pub fn hold(&self, busy: bool) {
        self.state().busy = busy;
    }

    /// A job begins that works on its present contents: what is written from here on is noted beside them.
    pub fn freeze(&self) -> Bits {
        let mut state = self.state();
        state.busy = true;
        state.successor = Some(Bits::new(state.bits.size(), state.bits.granularity()));
        state.bits.clone()
    }

    /// The job has ended. `done`: what it worked on is dealt with, but for `left`; else nothing has happened.
    pub fn thaw(&self, done: bool, left: Option<&Bits>) {
        let mut state = self.state();
        state.busy = false;
        let Some(successor) = state.successor.take() else { return };
        if done {
            state.bits = successor;
        } else {
            state.bits.merge(&successor);
        }
        if let Some(left) = left {
            state.bits.merge(left);
        }
    }
}
