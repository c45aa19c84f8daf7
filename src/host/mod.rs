//! The outside of the machine: disks, networks, character devices. Everything here runs on host
//! threads; it reaches the machine only as [`Event`]s through the input door, and is reached only
//! by outputs that the output door has let go.

pub mod backends;
pub mod chars;
pub mod disk;
pub mod jobs;
pub mod keys;
pub mod mux;
pub mod nbd;
pub mod sandbox;
pub mod signals;
pub mod tls;
pub mod vnc;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, OnceLock};

use ftvm_devices::{Input, Output};

use crate::machine::MachineInput;
use crate::runtime::Event;

/// The machine's outside, live or not yet.
#[derive(Default)]
pub struct Outside {
    disks: Mutex<Vec<Option<disk::DiskWorker>>>,
    nets: Mutex<Vec<Option<Box<dyn ftvm_net::Backend>>>>,
    chars: OnceLock<Vec<chars::CharSink>>,
    /// A backup does reads itself.
    shares_reads: AtomicBool,
    news: Arc<AtomicBool>,
}

impl Outside {
    /// The character devices; disks and networks are attached when the machine is live.
    pub fn set_chars(&self, chars: Vec<chars::CharSink>) {
        let _ = self.chars.set(chars);
    }

    /// Set when a request of a disk has ended, of which the machine thread is told by an event.
    pub fn news(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.news)
    }

    /// Attach drive `index`.
    pub fn attach_disk(&self, index: usize, worker: disk::DiskWorker) {
        if let Ok(mut disks) = self.disks.lock() {
            if disks.len() <= index {
                disks.resize_with(index + 1, || None);
            }
            disks[index] = Some(worker);
        }
    }

    /// Attach the back end of network card `index`.
    pub fn attach_net(&self, index: usize, backend: Box<dyn ftvm_net::Backend>) {
        if let Ok(mut nets) = self.nets.lock() {
            if nets.len() <= index {
                nets.resize_with(index + 1, || None);
            }
            nets[index] = Some(backend);
        }
    }

    /// Whether network card `index` has a back end.
    pub fn has_net(&self, index: usize) -> bool {
        self.nets.lock().is_ok_and(|n| n.get(index).is_some_and(Option::is_some))
    }

    /// Close drive `index`.
    pub fn detach_disk(&self, index: usize) {
        let worker = self.disks.lock().ok().and_then(|mut d| d.get_mut(index).and_then(Option::take));
        drop(worker);
    }

    /// Close the back end of network card `index`.
    pub fn detach_net(&self, index: usize) {
        let net = self.nets.lock().ok().and_then(|mut n| n.get_mut(index).and_then(Option::take));
        drop(net);
    }

    /// What drive `index` has done so far.
    pub fn disk_counters(&self, index: usize) -> Option<disk::Counters> {
        self.disks.lock().ok()?.get(index)?.as_ref().map(|w| w.counters())
    }

    /// The image of drive `index`, if it is open.
    pub fn disk_image(&self, index: usize) -> Option<Arc<dyn ftvm_block::Image>> {
        Some(self.disks.lock().ok()?.get(index)?.as_ref()?.image())
    }

    /// What the requests of drive `index` go to.
    pub fn disk_root(&self, index: usize) -> Option<Arc<ftvm_block::Root>> {
        Some(self.disks.lock().ok()?.get(index)?.as_ref()?.root())
    }

    /// Other limits for drive `index`.
    pub fn set_limits(&self, index: usize, limits: ftvm_block::throttle::Limits) {
        self.each_disk(|i, worker| {
            if i == index {
                worker.set_limits(limits);
            }
        });
    }

    /// The node named `name`, among all that are open, and the drive in whose chain it is.
    pub fn find_node(&self, name: &str) -> Option<(usize, Arc<ftvm_block::Node>)> {
        let mut found = None;
        self.each_disk(|i, worker| {
            for (depth, node) in worker.root().node().chain().into_iter().enumerate() {
                // A node that is a drive itself is found there.
                if node.name() == name && (found.is_none() || depth == 0) {
                    found = Some((i, node));
                }
            }
        });
        found
    }

    /// The image of drive `index` has another size now.
    pub fn disk_resized(&self, index: usize, size: u64) {
        if let Ok(disks) = self.disks.lock() {
            if let Some(Some(worker)) = disks.get(index) {
                worker.resized(size);
            }
        }
    }

    /// Let an output leave.
    pub fn perform(&self, output: Output) {
        match output {
            Output::Disk { id, drive, op } => {
                if let Ok(disks) = self.disks.lock() {
                    if let Some(Some(worker)) = disks.get(drive as usize) {
                        worker.submit(id, op);
                    }
                }
            }
            Output::NetTx { nic, frame } => {
                if let Ok(mut nets) = self.nets.lock() {
                    if let Some(Some(net)) = nets.get_mut(nic as usize) {
                        net.send(&frame);
                    }
                }
            }
            Output::CharOut { port, bytes } => {
                if let Some(sink) = self.chars.get().and_then(|c| c.get(port as usize)) {
                    sink.write(&bytes);
                }
            }
            Output::Event(_) => {}
        }
    }

    /// Whether each drive's writes are told of only when they are on stable storage.
    pub fn set_durable(&self, durable: impl Fn(usize) -> bool) -> Result<(), ftvm_block::BlockError> {
        let Ok(disks) = self.disks.lock() else { return Ok(()) };
        disks
            .iter()
            .enumerate()
            .try_for_each(|(i, d)| d.as_ref().map_or(Ok(()), |d| d.set_durable(durable(i))))
    }

    /// Whether drive `index`'s writes are told of only when they are on stable storage.
    pub fn set_durable_of(&self, index: usize, durable: bool) {
        self.each_disk(|i, worker| {
            if i == index {
                if let Err(e) = worker.set_durable(durable) {
                    log::warn!("drive {index}: {e}");
                }
            }
        });
    }

    /// From here on a backup does the reads of the drives for which `shared` is true; `pending`: requests under way.
    pub fn share_reads(&self, pending: &[Output], shared: impl Fn(usize) -> bool) {
        self.shares_reads.store(true, Ordering::Relaxed);
        self.each_disk(|i, worker| {
            let own = pending.iter().filter_map(|output| match output {
                Output::Disk { id, drive, op } if *drive as usize == i => Some((*id, op.clone())),
                _ => None,
            });
            if shared(i) {
                worker.share_reads(own);
            }
        });
    }

    /// There is no such backup any more: what waited for it is done.
    pub fn keep_reads(&self) {
        if self.shares_reads.swap(false, Ordering::Relaxed) {
            self.each_disk(|_, worker| worker.keep_reads());
        }
    }

    /// Whether a backup may do the read `id` itself, which was done here.
    pub fn may_share(&self, drive: u32, id: u64) -> bool {
        let Ok(disks) = self.disks.lock() else { return false };
        disks.get(drive as usize).is_some_and(|d| d.as_ref().is_some_and(|d| d.may_share(id)))
    }

    /// The log's entry `number` ends the read `id`, which the backup does itself.
    pub fn read_logged(&self, drive: u32, id: u64, number: u64) {
        if let Some(Some(worker)) = self.disks.lock().ok().as_ref().and_then(|d| d.get(drive as usize)) {
            worker.read_logged(id, number);
        }
    }

    /// The request `id` ended here, and the log says all of it.
    pub fn disk_ended(&self, id: u64) {
        if self.shares_reads.load(Ordering::Relaxed) {
            self.each_disk(|_, worker| worker.ended(id));
        }
    }

    /// The backup has executed so many entries of the log.
    pub fn backup_executed(&self, entries: u64) {
        if self.shares_reads.load(Ordering::Relaxed) {
            self.each_disk(|_, worker| worker.backup_executed(entries));
        }
    }

    fn each_disk(&self, mut f: impl FnMut(usize, &disk::DiskWorker)) {
        if let Ok(disks) = self.disks.lock() {
            disks.iter().enumerate().filter_map(|(i, d)| Some((i, d.as_ref()?))).for_each(|(i, d)| f(i, d));
        }
    }

    /// Everything that was written is on stable storage.
    pub fn flush_disks(&self) -> Result<(), String> {
        let images: Vec<_> = match self.disks.lock() {
            Ok(disks) => disks.iter().flatten().map(|d| d.image()).collect(),
            Err(_) => Vec::new(),
        };
        images.iter().filter(|i| !i.read_only()).try_for_each(|i| i.flush().map_err(|e| e.to_string()))
    }

    /// Wait until every disk has served what was submitted, and close them.
    pub fn close_disks(&self) {
        let disks = match self.disks.lock() {
            Ok(mut d) => std::mem::take(&mut *d),
            Err(_) => return,
        };
        drop(disks);
    }

    /// Wait until character devices have written what they were given.
    pub fn drain_chars(&self) {
        for sink in self.chars.get().into_iter().flatten() {
            sink.drain();
        }
    }

    /// Stop disk writes at once: what is queued is thrown away (this side has lost).
    pub fn abandon(&self) {
        if let Ok(disks) = self.disks.lock() {
            for worker in disks.iter().flatten() {
                worker.abandon();
            }
        }
    }
}

/// A callback that hands received frames of network card `nic` to the machine.
pub fn net_receiver(nic: u32, events: Sender<Event>) -> ftvm_net::Receive {
    Box::new(move |frame| {
        let _ = events.send(Event::Input(MachineInput::Device(Input::NetRx { nic, frame })));
    })
}
