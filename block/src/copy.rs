//! Copying between nodes while they are in use: what block jobs are made of.
//!
//! Everything here is done in steps of at most [`STEP`] bytes, beside the guest's requests. A guest's write that meets a
//! step wins: with [`Mirror`] it marks what it touched, before and after, and a marked chunk is copied again; a
//! [`Backup`] saves the old bytes before the write; a [`Stream`] copies a cluster only while no request is under way.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bits::Bits;
use crate::node::Watch;
use crate::{BlockError, Held, Image, Node};

/// Bytes of a chunk, the unit that changes are noted in.
pub const CHUNK: u64 = 1 << 16;
/// Bytes copied in one step at the most.
pub const STEP: u64 = 1 << 20;
/// A mirror may end when at most this much differs.
const NEAR: u64 = 64;

/// Which part of a source is copied.
#[derive(Clone)]
pub enum Part {
    /// All of it.
    Full,
    /// What the topmost image holds itself.
    Top,
    /// What the images above this one hold.
    Above(Arc<Node>),
    /// Only what is written from now on.
    New,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Chunks that were written (a dirty bitmap without a file).
struct Dirty(Mutex<Bits>);

impl Dirty {
    /// Nothing yet, of an image of `size` bytes.
    fn new(size: u64) -> Arc<Self> {
        Arc::new(Dirty(Mutex::new(Bits::new(size, CHUNK))))
    }
}

impl Watch for Dirty {
    fn before(&self, _: &dyn Image, offset: u64, len: u64) -> Result<(), BlockError> {
        // For a copier that looks after it; and again after the write, for one that looked in between.
        lock(&self.0).add(offset, len);
        Ok(())
    }
    fn after(&self, offset: u64, len: u64) {
        lock(&self.0).add(offset, len);
    }
}

/// What is to come after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// More, this many bytes having been copied.
    More(u64),
    /// Both are (nearly) equal, and stay so as long as steps are done.
    Ready,
    /// Nothing.
    Done,
}

/// Work in steps.
pub trait Work: Send {
    /// Do one; an error ends the work, or the step is tried again.
    fn step(&mut self) -> Result<Step, BlockError>;
    /// (bytes done, bytes altogether), as far as is known.
    fn progress(&self) -> (u64, u64);
}

/// The nodes above `base` in the chain of `top`.
fn above(top: &Arc<Node>, base: Option<&Arc<Node>>) -> Vec<Arc<Node>> {
    top.chain().into_iter().take_while(|n| base.is_none_or(|b| !Arc::ptr_eq(n, b))).collect()
}

/// Add what any of `layers` holds.
fn add_held(chunks: &mut Bits, layers: &[Arc<Node>]) -> Result<(), BlockError> {
    for layer in layers {
        let (mut at, size) = (0, layer.size());
        while at < size {
            let (held, len) = layer.held(at)?;
            if held != Held::None {
                chunks.add(at, len);
            }
            at += len.max(1);
        }
    }
    Ok(())
}

fn copy(source: &dyn Image, target: &dyn Image, offset: u64, len: u64) -> Result<(), BlockError> {
    let mut data = crate::buffers::take(len as usize);
    source.read_at(offset, &mut data)?;
    let result = if data.iter().all(|b| *b == 0) {
        target.write_zeroes(offset, len, true)
    } else {
        target.write_at(offset, &data)
    };
    crate::buffers::give(data);
    result
}

/// Makes a node's contents those of another, and keeps them so.
pub struct Mirror {
    source: Arc<Node>,
    target: Arc<Node>,
    part: Part,
    dirty: Arc<Dirty>,
    watch: Arc<dyn Watch>,
    size: u64,
    started: bool,
    ready: bool,
    cursor: u64,
    done: u64,
}

impl Mirror {
    /// From `source` to `target`; every write to `source` is seen from here on.
    pub fn new(source: Arc<Node>, target: Arc<Node>, part: Part) -> Result<Self, BlockError> {
        let size = source.size();
        if target.size() < size {
            return Err(BlockError::Unsupported("Source and target image have different sizes".into()));
        }
        let dirty = Dirty::new(size);
        let watch: Arc<dyn Watch> = Arc::clone(&dirty) as _;
        source.watch(Arc::clone(&watch));
        let (started, ready) = (false, false);
        Ok(Mirror { source, target, part, dirty, watch, size, started, ready, cursor: 0, done: 0 })
    }

    fn begin(&mut self) -> Result<(), BlockError> {
        let mut first = Bits::new(self.size, CHUNK);
        match &self.part {
            Part::Full => first.add(0, self.size),
            Part::Top => add_held(&mut first, std::slice::from_ref(&self.source))?,
            Part::Above(base) => add_held(&mut first, &above(&self.source, Some(base)))?,
            Part::New => {}
        }
        lock(&self.dirty.0).merge(&first);
        self.started = true;
        Ok(())
    }

    /// Copy up to `limit` neighbouring chunks; bytes copied.
    fn copy_some(&mut self) -> Result<u64, BlockError> {
        let Some((first, n)) = lock(&self.dirty.0).take(self.cursor, STEP / CHUNK) else { return Ok(0) };
        let offset = first * CHUNK;
        let len = (n * CHUNK).min(self.size - offset);
        if let Err(e) = copy(self.source.as_ref(), self.target.as_ref(), offset, len) {
            lock(&self.dirty.0).add(offset, len);
            return Err(e);
        }
        self.cursor = first + n;
        self.done += len;
        Ok(len)
    }

    /// Whether so little differs that requests may wait for it.
    pub fn is_near(&self) -> bool {
        self.started && lock(&self.dirty.0).count() <= NEAR
    }

    /// Make both equal, and the target's bytes safe. The caller keeps requests out.
    pub fn finish(&mut self) -> Result<(), BlockError> {
        while self.copy_some()? > 0 {}
        self.target.flush()
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.source.unwatch(&self.watch);
    }
}

impl Work for Mirror {
    fn step(&mut self) -> Result<Step, BlockError> {
        if !self.started {
            self.begin()?;
        }
        let copied = self.copy_some()?;
        self.ready |= copied == 0;
        Ok(if copied == 0 || self.ready && self.is_near() { Step::Ready } else { Step::More(copied) })
    }
    fn progress(&self) -> (u64, u64) {
        let left = lock(&self.dirty.0).bytes();
        let left = if self.started { left } else { self.size };
        (self.done, self.done + left)
    }
}

/// Moves what the images from `top` down to `base` (without it) hold into `base`. None of them is written meanwhile.
pub struct Commit {
    top: Arc<Node>,
    base: Arc<Node>,
    chunks: Option<Bits>,
    done: u64,
    total: u64,
}

impl Commit {
    pub fn new(top: Arc<Node>, base: Arc<Node>) -> Self {
        let total = top.size();
        Commit { top, base, chunks: None, done: 0, total }
    }
}

impl Work for Commit {
    fn step(&mut self) -> Result<Step, BlockError> {
        if self.chunks.is_none() {
            let mut chunks = Bits::new(self.top.size(), CHUNK);
            add_held(&mut chunks, &above(&self.top, Some(&self.base)))?;
            self.total = chunks.bytes();
            self.chunks = Some(chunks);
        }
        let taken = self.chunks.as_mut().and_then(|c| c.take(0, STEP / CHUNK));
        let Some((first, n)) = taken else {
            self.base.flush()?;
            return Ok(Step::Done);
        };
        let offset = first * CHUNK;
        let len = (n * CHUNK).min(self.top.size().saturating_sub(offset));
        if let Err(e) = copy(self.top.as_ref(), self.base.as_ref(), offset, len) {
            if let Some(chunks) = &mut self.chunks {
                chunks.add(offset, len);
            }
            return Err(e);
        }
        self.done += n * CHUNK;
        Ok(Step::More(len))
    }
    fn progress(&self) -> (u64, u64) {
        (self.done, self.total.max(self.done))
    }
}

/// Copies what the images below `top`, down to `base` (without it) or to the end, hold into `top`.
pub struct Stream {
    top: Arc<Node>,
    base: Option<Arc<Node>>,
    below: Vec<Arc<Node>>,
    at: u64,
}

impl Stream {
    pub fn new(top: Arc<Node>, base: Option<Arc<Node>>) -> Self {
        let below = above(&top, base.as_ref()).split_off(1);
        Stream { top, base, below, at: 0 }
    }

    fn is_below(&self, mut at: u64, end: u64) -> Result<bool, BlockError> {
        for layer in &self.below {
            let start = at;
            let end = end.min(layer.size());
            while at < end {
                let (held, len) = layer.held(at)?;
                if held != Held::None {
                    return Ok(true);
                }
                at += len.max(1);
            }
            at = start;
        }
        Ok(false)
    }

    /// Copy one of the top's clusters, if it is to be copied; bytes copied.
    fn copy_cluster(&self, top: &dyn Image, offset: u64) -> Result<(u64, u64), BlockError> {
        let (held, len) = top.held(offset)?;
        if held == Held::Whole || !self.is_below(offset, offset + len)? {
            return Ok((len, 0));
        }
        copy(top, top, offset, len)?;
        Ok((len, len))
    }
}

impl Work for Stream {
    fn step(&mut self) -> Result<Step, BlockError> {
        let size = self.top.size();
        if self.at >= size {
            self.top.flush()?;
            return Ok(Step::Done);
        }
        let start = self.at;
        let (at, copied) = self.top.alone(|top| {
            let (mut at, mut copied) = (start, 0);
            // What is there already is looked at quickly, but not for ever.
            while at < size && copied < STEP && at - start < 256 * STEP {
                let (len, more) = self.copy_cluster(top, at)?;
                at += len.max(1);
                copied += more;
            }
            Ok::<_, BlockError>((at, copied))
        })?;
        self.at = at;
        Ok(Step::More(copied))
    }
    fn progress(&self) -> (u64, u64) {
        (self.at, self.top.size())
    }
}

impl Stream {
    /// What the top stands on at the end.
    pub fn base(&self) -> Option<Arc<Node>> {
        self.base.clone()
    }
}

/// Saves the contents that a node has now.
pub struct Backup {
    source: Arc<Node>,
    saver: Arc<Saver>,
    watch: Arc<dyn Watch>,
    /// Only what the guest overwrites is saved.
    only_old: bool,
    total: u64,
}

struct Saver {
    target: Arc<Node>,
    size: u64,
    /// Chunks still to be saved: as large as the target's clusters, so that nothing is read from what it stands on. Held
    /// while one is saved.
    left: Mutex<Bits>,
    /// Chunks that were overwritten without having been saved, and why: the guest's requests must not fail because of the
    /// copy, so the job does.
    lost: Mutex<Option<(Bits, BlockError)>>,
}

impl Saver {
    fn save(&self, image: &dyn Image, left: &mut Bits, chunk: u64) -> Result<u64, BlockError> {
        let offset = chunk * left.granularity();
        let len = left.granularity().min(self.size - offset);
        copy(image, self.target.as_ref(), offset, len)?;
        left.remove(chunk);
        Ok(len)
    }
}

impl Watch for Saver {
    fn before(&self, image: &dyn Image, offset: u64, len: u64) -> Result<(), BlockError> {
        let mut left = lock(&self.left);
        if left.count() == 0 || len == 0 {
            return Ok(());
        }
        let chunk = left.granularity();
        for chunk in offset / chunk..=(offset + len - 1) / chunk {
            if left.has(chunk) {
                if let Err(e) = self.save(image, &mut left, chunk) {
                    left.remove(chunk);
                    let none = || (Bits::new(self.size, left.granularity()), e);
                    let mut lost = lock(&self.lost);
                    lost.get_or_insert_with(none).0.add(chunk * left.granularity(), 1);
                }
            }
        }
        Ok(())
    }
    fn after(&self, _: u64, _: u64) {}
}

impl Backup {
    /// From `source` as it is now to `target`: of `part`, only what is in `only`; `Part::New` saves only what is overwritten.
    /// The caller keeps requests out.
    pub fn new(
        source: Arc<Node>,
        target: Arc<Node>,
        part: &Part,
        only: Option<&Bits>,
    ) -> Result<Self, BlockError> {
        let size = source.size();
        if target.size() < size {
            return Err(BlockError::Unsupported("Source and target image have different sizes".into()));
        }
        let mut left = Bits::new(size, CHUNK.max(target.grain()));
        match (part, only) {
            (_, Some(bits)) => left.merge(bits),
            (Part::Top, None) => add_held(&mut left, std::slice::from_ref(&source))?,
            _ => left.add(0, size),
        }
        let total = left.bytes();
        let saver = Arc::new(Saver { target, size, left: Mutex::new(left), lost: Mutex::default() });
        let watch: Arc<dyn Watch> = Arc::clone(&saver) as _;
        source.watch(Arc::clone(&watch));
        Ok(Backup { source, saver, watch, only_old: matches!(part, Part::New), total })
    }

    /// What is not saved (yet).
    pub fn left(&self) -> Bits {
        let mut left = lock(&self.saver.left).clone();
        if let Some((lost, _)) = &*lock(&self.saver.lost) {
            left.merge(lost);
        }
        left
    }
}

impl Drop for Backup {
    fn drop(&mut self) {
        self.source.unwatch(&self.watch);
    }
}

impl Work for Backup {
    fn step(&mut self) -> Result<Step, BlockError> {
        if let Some((_, e)) = &*lock(&self.saver.lost) {
            return Err(e.again());
        }
        if self.only_old {
            return Ok(Step::More(0));
        }
        // The image first, as a guest's request does.
        let saved = self.source.with(|image| {
            let mut left = lock(&self.saver.left);
            let chunk = left.next(0);
            chunk.map_or(Ok(0), |chunk| self.saver.save(image, &mut left, chunk))
        })?;
        if saved > 0 {
            return Ok(Step::More(saved));
        }
        self.saver.target.flush()?;
        Ok(Step::Done)
    }
    fn progress(&self) -> (u64, u64) {
        (self.total - lock(&self.saver.left).bytes(), self.total)
    }
}

#[cfg(test)]
mod tests;
