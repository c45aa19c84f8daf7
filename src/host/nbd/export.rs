//! An export: a node as NBD clients see it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ftvm_block::bitmap::DirtyBitmap;
use ftvm_block::{BlockError, Held, Image, Node, Root};

/// Requests reach images in whole sectors.
const SECTOR: u64 = 512;
/// The most that is said of in one answer.
const EXTENTS: usize = 32 << 10;

/// What an export reads and writes.
pub enum Source {
    /// A drive: whatever node is at its front.
    Front(Arc<Root>),
    Node(Arc<Node>),
}

/// What a client can ask about ranges.
pub enum Context {
    Allocation,
    Depth,
    Bitmap(Arc<DirtyBitmap>),
}

impl Context {
    /// Its name on the wire.
    pub fn name(&self) -> String {
        match self {
            Context::Allocation => "base:allocation".into(),
            Context::Depth => "qemu:allocation-depth".into(),
            Context::Bitmap(bitmap) => format!("qemu:dirty-bitmap:{}", bitmap.name()),
        }
    }
}

/// How an export was asked for.
pub struct Wanted {
    pub id: String,
    pub name: String,
    pub description: Option<String>,
    pub source: Source,
    pub writable: bool,
    /// Every write is on stable storage when it is answered.
    pub writethrough: bool,
    pub depth: bool,
    pub bitmaps: Vec<Arc<DirtyBitmap>>,
}

/// Ends a client's connection.
pub type Hangup = Box<dyn Fn() + Send>;

#[derive(Default)]
struct Clients {
    next: u64,
    there: BTreeMap<u64, Hangup>,
    closing: bool,
}

/// An export.
pub struct Export {
    pub id: String,
    pub name: String,
    pub description: Option<String>,
    pub writable: bool,
    writethrough: bool,
    source: Source,
    contexts: Vec<Context>,
    clients: Mutex<Clients>,
    /// Held while the rest of a sector is read and written back around a part of it.
    patching: Mutex<()>,
}

impl Export {
    /// The bitmaps are held until it is gone.
    pub fn new(wanted: Wanted) -> Arc<Self> {
        let mut contexts = vec![Context::Allocation];
        if wanted.depth {
            contexts.push(Context::Depth);
        }
        for bitmap in wanted.bitmaps {
            bitmap.hold(true);
            contexts.push(Context::Bitmap(bitmap));
        }
        Arc::new(Export {
            id: wanted.id,
            name: wanted.name,
            description: wanted.description,
            writable: wanted.writable,
            writethrough: wanted.writethrough,
            source: wanted.source,
            contexts,
            clients: Mutex::default(),
            patching: Mutex::new(()),
        })
    }

    /// The node of the moment.
    pub fn node(&self) -> Arc<Node> {
        match &self.source {
            Source::Front(root) => root.node(),
            Source::Node(node) => Arc::clone(node),
        }
    }

    fn image(&self) -> &dyn Image {
        match &self.source {
            Source::Front(root) => root.as_ref(),
            Source::Node(node) => node.as_ref(),
        }
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.image().size()
    }

    pub fn contexts(&self) -> &[Context] {
        &self.contexts
    }

    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A client has chosen it; `None`: it is being closed.
    pub fn enter(self: &Arc<Self>, hangup: Hangup) -> Option<Visit> {
        let mut clients = self.clients();
        if clients.closing {
            return None;
        }
        let number = clients.next;
        clients.next += 1;
        clients.there.insert(number, hangup);
        Some(Visit { export: Arc::clone(self), number })
    }

    /// Whether clients use it.
    pub fn is_used(&self) -> bool {
        !self.clients().there.is_empty()
    }

    /// Whether it lets nobody in any more.
    pub fn is_closing(&self) -> bool {
        self.clients().closing
    }

    /// Let nobody in any more, and hang up on those who are there; whether nobody is.
    pub fn close(&self) -> bool {
        let mut clients = self.clients();
        clients.closing = true;
        clients.there.values().for_each(|hangup| hangup());
        clients.there.is_empty()
    }

    /// Do something that looks at several layers. While it does, the guest may overwrite what one below the top has; the old
    /// bytes are in the top before that (where a backup job saves them), so what has not changed there since was seen as it
    /// was.
    fn settled<R>(
        &self,
        offset: u64,
        len: u64,
        look: impl Fn(&Node) -> Result<R, BlockError>,
    ) -> Result<R, BlockError> {
        let node = self.node();
        if node.backing().is_none() {
            return look(&node);
        }
        let mut before = holdings(&node, offset, len)?;
        loop {
            let seen = look(&node)?;
            let after = holdings(&node, offset, len)?;
            if before == after {
                return Ok(seen);
            }
            before = after;
        }
    }

    /// Read a range, which lies inside.
    pub fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, BlockError> {
        let (start, end) = around(offset, len);
        let mut data = self.settled(start, end - start, |node| {
            let mut data = vec![0; (end - start) as usize];
            node.read_at(start, &mut data)?;
            Ok(data)
        })?;
        if (start, end) != (offset, offset + len) {
            data.drain(..(offset - start) as usize);
            data.truncate(len as usize);
        }
        Ok(data)
    }

    /// Write a range, which lies inside.
    pub fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<(), BlockError> {
        let (start, end) = around(offset, data.len() as u64);
        if (start, end) == (offset, offset + data.len() as u64) {
            self.image().write_at(offset, data)?;
        } else {
            let _one = self.patching.lock().unwrap_or_else(PoisonError::into_inner);
            let mut whole = vec![0; (end - start) as usize];
            self.image().read_at(start, &mut whole)?;
            whole[(offset - start) as usize..][..data.len()].copy_from_slice(data);
            self.image().write_at(start, &whole)?;
        }
        self.written(fua)
    }

    /// Make a range read as zero.
    pub fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool, fua: bool) -> Result<(), BlockError> {
        let (start, end) = (offset.next_multiple_of(SECTOR), (offset + len) / SECTOR * SECTOR);
        if start >= end {
            return self.write(offset, &vec![0; len as usize], fua);
        }
        self.image().write_zeroes(start, end - start, may_unmap)?;
        for (at, until) in [(offset, start), (end, offset + len)] {
            if at < until {
                self.write(at, &vec![0; (until - at) as usize], false)?;
            }
        }
        self.written(fua)
    }

    /// The client does not need a range any more.
    pub fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<(), BlockError> {
        let (start, end) = (offset.next_multiple_of(SECTOR), (offset + len) / SECTOR * SECTOR);
        if start < end {
            self.image().discard(start, end - start)?;
        }
        self.written(fua)
    }

    fn written(&self, fua: bool) -> Result<(), BlockError> {
        if fua || self.writethrough {
            self.flush()?;
        }
        Ok(())
    }

    /// Everything that was written is on stable storage.
    pub fn flush(&self) -> Result<(), BlockError> {
        self.image().flush()
    }

    /// What a context says of a range, from its beginning on: lengths and flags; of the first run alone, if `one`.
    pub fn status(
        &self,
        context: &Context,
        offset: u64,
        len: u64,
        one: bool,
    ) -> Result<Vec<(u32, u32)>, BlockError> {
        let (mut at, end) = (offset, offset + len);
        let mut out: Vec<(u32, u32)> = Vec::new();
        while at < end {
            let (flags, run) = match context {
                Context::Bitmap(bitmap) => {
                    let (dirty, run) = bitmap.run(at);
                    (u32::from(dirty), run)
                }
                Context::Depth => depth(&self.node(), at)?,
                Context::Allocation => {
                    let (zero, run) = self.settled(at, 1, |node| node.is_zero(at))?;
                    // A hole, that reads as zero.
                    (if zero { 3 } else { 0 }, run)
                }
            };
            // Up to the next sector, at least.
            let run = run.clamp(1, end - at);
            let full = out.len() == EXTENTS || one && !out.is_empty();
            match out.last_mut() {
                Some((have, same)) if *same == flags => *have += run as u32,
                _ if full => break,
                _ => out.push((run as u32, flags)),
            }
            at += run;
        }
        Ok(out)
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        for context in &self.contexts {
            if let Context::Bitmap(bitmap) = context {
                bitmap.hold(false);
            }
        }
    }
}

/// A client of an export.
pub struct Visit {
    pub export: Arc<Export>,
    number: u64,
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.export.clients().there.remove(&self.number);
    }
}

/// The sectors that a range touches.
fn around(offset: u64, len: u64) -> (u64, u64) {
    (offset / SECTOR * SECTOR, (offset + len).next_multiple_of(SECTOR))
}

/// Which parts of a range the top of a chain holds itself.
fn holdings(node: &Node, offset: u64, len: u64) -> Result<Vec<(Held, u64)>, BlockError> {
    let (mut at, end) = (offset, (offset + len).min(node.size()));
    let mut out = Vec::new();
    while at < end {
        let (held, run) = node.held(at)?;
        out.push((held, run));
        at += run.max(1);
    }
    Ok(out)
}

/// How far below the top what lies at `offset` is (1: in the top; 0: nowhere), and for how many bytes.
fn depth(node: &Arc<Node>, offset: u64) -> Result<(u32, u64), BlockError> {
    let mut shortest = u64::MAX;
    for (n, layer) in node.chain().iter().enumerate() {
        if offset >= layer.size() {
            break;
        }
        let (held, run) = layer.held(offset)?;
        shortest = shortest.min(run);
        if held != Held::None {
            return Ok((n as u32 + 1, shortest));
        }
    }
    Ok((0, shortest))
}
