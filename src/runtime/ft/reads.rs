//! Disk reads on the backup (section 4.2 of the paper), the backup's half.
//!
//! The log says where in the image's file the bytes of a read are, not which they are: the primary has looked the
//! places up, so what this side might remember of the image's tables does not matter. They are read when the log
//! arrives, ahead of the execution, past this host's page cache. The primary keeps them as they are until this side
//! has executed the read's end. A checksum says whether they are the same bytes; if not, or if the read fails, it is tried again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use ftvm_block::Store;
use serde::{Deserialize, Serialize};

use super::FtEvent;
use crate::runtime::{Event, Events};

/// Reads side by side.
const THREADS: usize = 4;
/// Bytes that may lie ready for the execution.
const READY: usize = 64 << 20;
/// The largest read: as the log's.
const LARGEST: u64 = 33 << 20;
/// The pause before a read is tried again.
const AGAIN: Duration = Duration::from_millis(50);

/// A read's end in the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetch {
    pub id: u64,
    drive: u32,
    checksum: u32,
    /// Places in the image's file: (offset, length).
    extents: Vec<(u64, u64)>,
}

impl Fetch {
    /// The read `id` found `data` there.
    pub fn new(id: u64, drive: u32, data: &[u8], extents: Vec<(u64, u64)>) -> Self {
        Fetch { id, drive, checksum: crc32fast::hash(data), extents }
    }

    /// From the log.
    pub fn from_bytes(payload: &[u8]) -> Option<Fetch> {
        let fetch: Fetch = postcard::from_bytes(payload).ok()?;
        let len = fetch.extents.iter().try_fold(0u64, |sum, (_, len)| sum.checked_add(*len))?;
        (len <= LARGEST).then_some(fetch)
    }
}

/// Opens the file of a drive's image for reading, past this host's cache.
pub type OpenShared = Box<dyn Fn(u32) -> Result<Arc<dyn Store>, String> + Send + Sync>;

#[derive(Default)]
struct Ready {
    /// By request: the read's place in the log's order, and its data.
    data: HashMap<u64, (u64, Vec<u8>)>,
    bytes: usize,
    /// Why the last try failed.
    error: String,
}

struct Inner {
    open: OpenShared,
    stores: Mutex<HashMap<u32, Arc<dyn Store>>>,
    ready: Mutex<Ready>,
    taken: Condvar,
    closed: AtomicBool,
    events: Events,
}

/// Reads that this side does itself.
pub struct BackupReads {
    inner: Arc<Inner>,
    jobs: Sender<(u64, Fetch)>,
    queue: Arc<Mutex<Receiver<(u64, Fetch)>>>,
    started: AtomicBool,
    /// Reads begun.
    count: AtomicU64,
}

impl BackupReads {
    /// Nothing to read yet.
    pub fn new(open: OpenShared, events: Events) -> Self {
        let (jobs, queue) = channel();
        let inner = Inner {
            open,
            stores: Mutex::default(),
            ready: Mutex::default(),
            taken: Condvar::new(),
            closed: AtomicBool::new(false),
            events,
        };
        let (inner, queue) = (Arc::new(inner), Arc::new(Mutex::new(queue)));
        BackupReads { inner, jobs, queue, started: AtomicBool::new(false), count: AtomicU64::new(0) }
    }

    /// Begin what the log has just said.
    pub fn begin(&self, payload: &[u8]) {
        // An unreadable one is found again, and reported, when it is executed.
        let Some(fetch) = Fetch::from_bytes(payload) else { return };
        if !self.started.swap(true, Ordering::SeqCst) {
            for _ in 0..THREADS {
                let (inner, queue) = (Arc::clone(&self.inner), Arc::clone(&self.queue));
                let run = move || loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok((number, fetch)) = next else { return };
                    inner.serve(number, &fetch);
                };
                if let Err(e) = std::thread::Builder::new().name("ft-read".into()).spawn(run) {
                    log::error!("ft: no thread for disk reads: {e}");
                }
            }
        }
        let _ = self.jobs.send((self.count.fetch_add(1, Ordering::SeqCst), fetch));
    }

    /// The data of a read, if it is there.
    pub fn take(&self, id: u64) -> Option<Vec<u8>> {
        let mut ready = self.inner.ready.lock().ok()?;
        let (_, data) = ready.data.remove(&id)?;
        ready.bytes -= data.len();
        self.inner.taken.notify_all();
        Some(data)
    }

    /// Why the last try failed.
    pub fn error(&self) -> String {
        self.inner.ready.lock().map_or_else(|_| String::new(), |r| r.error.clone())
    }
}

impl Drop for BackupReads {
    fn drop(&mut self) {
        self.inner.closed.store(true, Ordering::SeqCst);
        self.inner.taken.notify_all();
    }
}

impl Inner {
    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Try until it succeeds: the primary's read did.
    fn serve(&self, number: u64, fetch: &Fetch) {
        let mut tries = 0u32;
        while !self.is_closed() {
            match self.read(fetch) {
                Ok(data) => {
                    let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
                    // What lies ready is enough, unless the execution needs this one before all of that.
                    let first = |ready: &Ready| ready.data.values().all(|(n, _)| *n > number);
                    while ready.bytes > READY && !first(&ready) && !self.is_closed() {
                        let waited = self.taken.wait_timeout(ready, AGAIN);
                        ready = waited.unwrap_or_else(PoisonError::into_inner).0;
                    }
                    ready.bytes += data.len();
                    ready.data.insert(fetch.id, (number, data));
                    drop(ready);
                    let _ = self.events.send(Event::Ft(FtEvent::Wake));
                    return;
                }
                Err(reason) => {
                    if tries.is_multiple_of(100) {
                        log::warn!("ft: a disk read of the backup: {reason}; trying again");
                    }
                    tries = tries.wrapping_add(1);
                    if let Ok(mut ready) = self.ready.lock() {
                        ready.error = reason;
                    }
                    // Whatever this side knew of the file is forgotten.
                    self.stores.lock().unwrap_or_else(PoisonError::into_inner).remove(&fetch.drive);
                    std::thread::sleep(AGAIN);
                }
            }
        }
    }

    fn store(&self, drive: u32) -> Result<Arc<dyn Store>, String> {
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = stores.get(&drive) {
            return Ok(Arc::clone(store));
        }
        let store = (self.open)(drive)?;
        stores.insert(drive, Arc::clone(&store));
        Ok(store)
    }

    fn read(&self, fetch: &Fetch) -> Result<Vec<u8>, String> {
        let store = self.store(fetch.drive)?;
        let len: u64 = fetch.extents.iter().map(|(_, len)| len).sum();
        let mut data = ftvm_block::buffers::take(len as usize);
        let mut at = 0;
        for (offset, len) in &fetch.extents {
            let end = at + *len as usize;
            store.read_at(*offset, &mut data[at..end]).map_err(|e| e.to_string())?;
            at = end;
        }
        if crc32fast::hash(&data) != fetch.checksum {
            return Err(format!("'{}' gives other data here than on the primary", store.path().display()));
        }
        Ok(data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn reads_are_tried_until_the_storage_gives_what_the_primary_saw() {
        let path = std::env::temp_dir().join(format!("ftvm-reads-{}", std::process::id()));
        std::fs::write(&path, [1; 8192]).unwrap();
        let (events, wake) = crate::runtime::mailbox().unwrap();
        let file = path.clone();
        let open = move |drive| {
            let look = ftvm_block::OpenOptions { read_only: true, ..Default::default() };
            match drive {
                0 => ftvm_block::open_store(&file, &look).map_err(|e| e.to_string()),
                n => Err(format!("no drive {n}")),
            }
        };
        let reads = BackupReads::new(Box::new(open), events);
        let fetch = |id, data: &[u8]| {
            let extents = vec![(4096, 512), (0, 512)];
            postcard::to_stdvec(&Fetch::new(id, 0, data, extents)).unwrap()
        };
        reads.begin(&fetch(1, &[1; 1024]));
        wake.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(reads.take(1), Some(vec![1; 1024]));
        assert_eq!(reads.take(1), None);
        let mut other = vec![2; 512];
        other.extend([1; 512]);
        reads.begin(&fetch(2, &other));
        assert!(wake.recv_timeout(Duration::from_millis(200)).is_err());
        assert!(reads.error().contains("other data"), "{}", reads.error());
        std::fs::write(&path, [[1; 4096], [2; 4096]].concat()).unwrap();
        wake.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(reads.take(2), Some(other));
        let liar = Fetch { id: 3, drive: 0, checksum: 0, extents: vec![(0, u64::MAX), (0, 9)] };
        assert_eq!(Fetch::from_bytes(&postcard::to_stdvec(&liar).unwrap()), None);
        std::fs::remove_file(path).unwrap();
    }
}
