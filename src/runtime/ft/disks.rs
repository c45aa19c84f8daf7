//! Disks that are not shared (section 4.1 of the paper): each side has an image of its own and writes it itself, in
//! lockstep. A backup's image is brought up to date while the machine runs: it tells digests of its chunks, and
//! those that differ travel, then whatever is written meanwhile.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use ftvm_block::files::{beside, beside_path};
use ftvm_block::track::{Digest, Tracked};
use ftvm_block::BlockError;
use ftvm_devices::{DiskOp, Output};

use crate::lockstep::wire::Message;

/// The images of a side; `None`: a drive without a medium, or one that is not written.
pub type Disks = Vec<Option<Arc<Tracked>>>;

/// Digests in one message, and chunks in one message.
const DIGESTS: u64 = 1024;
const CHUNKS: usize = 16;
/// With at most this many changed chunks the copy may be finished in the final stop.
const NEAR: u64 = 64;
/// Bytes that may wait for the network.
const WINDOW: usize = 8 << 20;

/// Digests of all chunks of a side's images, in messages.
pub fn digests(disks: &Disks) -> impl Iterator<Item = Result<Message, BlockError>> + '_ {
    disks.iter().enumerate().filter_map(|(n, d)| Some((n as u32, d.as_ref()?))).flat_map(|(drive, disk)| {
        (0..disk.chunks()).step_by(DIGESTS as usize).map(move |first| {
            let last = (first + DIGESTS).min(disk.chunks());
            let digests =
                (first..last).map(|c| disk.digest_chunk(c)).collect::<Result<Vec<Digest>, BlockError>>()?;
            Ok(Message::DiskDigests { drive, first, digests })
        })
    })
}

/// The backup's digests arrived: mark what differs.
pub fn compare(disks: &Disks, drive: u32, first: u64, digests: &[Digest]) -> Result<(), BlockError> {
    let Some(Some(disk)) = disks.get(drive as usize) else { return Ok(()) };
    for (chunk, theirs) in (first..disk.chunks()).zip(digests) {
        if disk.digest_chunk(chunk)? != *theirs {
            disk.mark(chunk);
        }
    }
    Ok(())
}

/// Chunks still to be copied.
fn left(disks: &Disks) -> u64 {
    disks.iter().flatten().map(|d| d.count()).sum()
}

/// One message of changed chunks; `None`: nothing is left.
pub fn next_chunks(disks: &Disks) -> Result<Option<Message>, BlockError> {
    for (drive, disk) in disks.iter().enumerate() {
        let Some(disk) = disk else { continue };
        let taken = disk.take(CHUNKS);
        if !taken.is_empty() {
            let chunks =
                taken.into_iter().map(|c| Ok((c, disk.read_chunk(c)?))).collect::<Result<_, BlockError>>()?;
            return Ok(Some(Message::DiskChunks { drive: drive as u32, chunks }));
        }
    }
    Ok(None)
}

/// Copies changed chunks beside the running machine.
pub struct Copier {
    stop: Arc<AtomicBool>,
    near: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Copier {
    /// Start; `fail` is told if an image cannot be read.
    pub fn start(
        disks: Disks,
        queued: Arc<AtomicUsize>,
        send: impl Fn(Message) + Send + 'static,
        fail: impl FnOnce(String) + Send + 'static,
    ) -> std::io::Result<Copier> {
        let (stop, near) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (s, n) = (Arc::clone(&stop), Arc::clone(&near));
        let thread = std::thread::Builder::new().name("ft-disks".into()).spawn(move || {
            while !s.load(Ordering::Relaxed) {
                if left(&disks) <= NEAR {
                    n.store(true, Ordering::Relaxed);
                }
                if queued.load(Ordering::Relaxed) > WINDOW {
                    std::thread::sleep(Duration::from_millis(2));
                    continue;
                }
                match next_chunks(&disks) {
                    Ok(Some(message)) => send(message),
                    Ok(None) => std::thread::sleep(Duration::from_millis(5)),
                    Err(e) => return fail(e.to_string()),
                }
            }
        })?;
        Ok(Copier { stop, near, thread: Some(thread) })
    }

    /// Whether so little is left that the machine may be stopped for it.
    pub fn is_near(&self) -> bool {
        self.near.load(Ordering::Relaxed)
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A backup's own writes: what it has begun and what has ended.
#[derive(Default)]
pub struct OwnWrites {
    begun: HashSet<u64>,
    ended: HashMap<u64, Option<crate::host::disk::DiskFailure>>,
}

impl OwnWrites {
    /// The machine made a request: what is to be done here too. Reads' data comes in the log.
    pub fn begin(&mut self, output: Output) -> Option<Output> {
        match &output {
            Output::Disk { op: DiskOp::Read { .. }, .. } => None,
            Output::Disk { id, .. } => {
                self.begun.insert(*id);
                Some(output)
            }
            _ => None,
        }
    }

    /// A request of this side ended.
    pub fn ended(&mut self, id: u64, failure: Option<crate::host::disk::DiskFailure>) {
        if self.begun.remove(&id) {
            self.ended.insert(id, failure);
        }
    }

    /// Whether this side still works on a request whose completion the log has.
    pub fn is_busy(&self, id: u64) -> bool {
        self.begun.contains(&id)
    }

    /// The log's completion was applied.
    pub fn forget(&mut self, id: u64) {
        self.ended.remove(&id);
    }

    /// This side goes live: what has ended although the log does not say so.
    pub fn take_ended(&mut self, id: u64) -> Option<Option<crate::host::disk::DiskFailure>> {
        self.ended.remove(&id)
    }
}

/// Which image is the newest: a number that grows with every time that one side went on alone, beside the lock and
/// beside each image. An image whose number is smaller than the lock's has missed writes.
pub struct Generations {
    lock: PathBuf,
    images: Vec<PathBuf>,
    /// The lock's number when this side began to take a primary's images over. Not that of the moment when it has them: the
    /// primary may have gone on alone meanwhile.
    joined: AtomicI64,
}

/// An image that is just being written over.
const HALF: i64 = -1;

fn read(path: &Path) -> std::io::Result<i64> {
    let (files, name) = beside(path)?;
    match files.read(&name) {
        Ok(text) => String::from_utf8_lossy(&text).trim().parse().map_err(|_| {
            std::io::Error::new(
                std::io::ErrorKind::InvalidData,
                format!("{} is not a number", path.display()),
            )
        }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(e) => Err(e),
    }
}

/// Replace a number so that it is the old one or the new one, whatever happens.
fn write(path: &Path, number: i64) -> std::io::Result<()> {
    let (files, name) = beside(path)?;
    let new = format!("{name}.new");
    match files.remove(&new) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    files.create(&new, format!("{number}\n").as_bytes())?;
    files.rename(&new, &name)
}

impl Generations {
    /// Of these images under this lock.
    pub fn new(lock: &Path, images: &[PathBuf]) -> Self {
        Generations {
            lock: beside_path(lock, ".generation"),
            images: images.iter().map(|i| beside_path(i, ".ftgen")).collect(),
            joined: AtomicI64::new(HALF),
        }
    }

    /// Refuse an image that has missed writes.
    pub fn check(&self) -> Result<(), String> {
        let fail = |p: &Path, e: std::io::Error| format!("{}: {e}", p.display());
        let last = read(&self.lock).map_err(|e| fail(&self.lock, e))?;
        for image in &self.images {
            let own = read(image).map_err(|e| fail(image, e))?;
            if own < last {
                return Err(format!(
                    "this host's image is older than the machine's last state ({} has {own}, {} has {last}): start it \
                     where it ran last, and this side as its backup; to go on from the old state all the same, remove both files",
                    image.display(),
                    self.lock.display()
                ));
            }
        }
        Ok(())
    }

    /// This side goes on alone from here: only its images are the newest.
    pub fn advance(&self) -> std::io::Result<()> {
        let mut next = read(&self.lock)?;
        for image in &self.images {
            next = next.max(read(image)?);
        }
        for image in &self.images {
            write(image, next + 1)?;
        }
        write(&self.lock, next + 1)
    }

    /// This side's images are about to be written over by a primary's.
    pub fn invalidate(&self) -> std::io::Result<()> {
        self.joined.store(read(&self.lock)?, Ordering::SeqCst);
        self.images.iter().try_for_each(|image| write(image, HALF))
    }

    /// This side's images are the primary's now.
    pub fn adopt(&self) -> std::io::Result<()> {
        let number = self.joined.load(Ordering::SeqCst);
        self.images.iter().try_for_each(|image| write(image, number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_missed_writes_is_refused() {
        let dir = std::env::temp_dir().join(format!("ftvm-generations-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let of = |image: &str| Generations::new(&dir.join("lock"), &[dir.join(image)]);
        let (a, b) = (of("a"), of("b"));
        a.check().unwrap();
        a.advance().unwrap();
        assert!(b.check().unwrap_err().contains("older than the machine's last state"));
        b.invalidate().unwrap();
        b.adopt().unwrap();
        // A slow backup that finishes when the primary has given it up.
        a.advance().unwrap();
        b.adopt().unwrap();
        assert!(b.check().is_err());
        b.invalidate().unwrap();
        b.adopt().unwrap();
        // While both are equal either may start; then the other has missed something.
        b.check().unwrap();
        b.advance().unwrap();
        b.check().unwrap();
        assert!(a.check().is_err());
        a.invalidate().unwrap();
        assert!(a.check().is_err());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
