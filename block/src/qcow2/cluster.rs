//! Guest data: reading and writing clusters.

use std::collections::VecDeque;
use std::io::Read;
use std::sync::{Arc, Mutex, MutexGuard};

use flate2::{Decompress, FlushDecompress};

use super::header::{Compression, AUTOCLEAR_RAW_DATA};
use super::{Place, Qcow2, State, COPIED, SUBCLUSTERS, ZERO};
use crate::{BlockError, Image};

/// Clusters allocated in one go at the most.
const RUN: u64 = 64;
/// Memory for unpacked clusters at the most (but for one, which may be larger): boot loaders and file systems read a cluster in
/// several pieces.
const UNPACKED: usize = 1 << 20;

/// Compressed clusters that were read in part, unpacked, by their L2 entries; the one used last comes last. Nothing writes
/// compressed clusters while an image is open, so what an entry refers to stays the same.
#[derive(Default)]
pub(super) struct Unpacked(Mutex<VecDeque<(u64, Arc<Vec<u8>>)>>);

impl Unpacked {
    fn get(&self, entry: u64) -> Option<Arc<Vec<u8>>> {
        let mut kept = self.0.lock().ok()?;
        let at = kept.iter().rposition(|(e, _)| *e == entry)?;
        let found = kept.remove(at)?;
        let data = Arc::clone(&found.1);
        kept.push_back(found);
        Some(data)
    }

    fn keep(&self, entry: u64, data: Arc<Vec<u8>>) {
        let Ok(mut kept) = self.0.lock() else { return };
        let most = (UNPACKED / data.len().max(1)).max(1);
        if kept.iter().all(|(e, _)| *e != entry) {
            kept.push_back((entry, data));
        }
        if kept.len() > most {
            kept.pop_front();
        }
    }
}

impl Qcow2 {
    fn read_compressed(&self, entry: u64) -> Result<Vec<u8>, BlockError> {
        let (offset, len) = self.compressed_extent(entry);
        let mut packed = vec![0u8; len as usize];
        self.file.read_at(offset, &mut packed)?;
        let mut out = vec![0u8; self.cluster() as usize];
        let unreadable = |e: &dyn std::fmt::Display| {
            BlockError::Corrupt(format!("a compressed cluster at {offset:#x} is not readable: {e}"))
        };
        match self.header.compression {
            Compression::Zlib => {
                let mut unpack = Decompress::new(false);
                // Whatever follows the cluster's contents is padding.
                unpack.decompress(&packed, &mut out, FlushDecompress::Finish).map_err(|e| unreadable(&e))?;
                if unpack.total_out() < self.cluster() {
                    return Err(unreadable(&"it ends too early"));
                }
            }
            Compression::Zstd => ruzstd::decoding::StreamingDecoder::new(packed.as_slice())
                .map_err(|e| unreadable(&e))?
                .read_exact(&mut out)
                .map_err(|e| unreadable(&e))?,
        }
        Ok(out)
    }

    fn read_backing(&self, guest: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        let Some(backing) = self.below() else {
            buf.fill(0);
            return Ok(());
        };
        let available = backing.size().saturating_sub(guest).min(buf.len() as u64) as usize;
        let (inside, past) = buf.split_at_mut(available);
        past.fill(0);
        if inside.is_empty() {
            return Ok(());
        }
        backing.read_at(guest, inside)
    }

    pub(super) fn read_place(&self, place: Place, guest: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        let within = guest & (self.cluster() - 1);
        match place {
            Place::Unallocated => self.read_backing(guest, buf),
            Place::Zero(_) => {
                buf.fill(0);
                Ok(())
            }
            Place::Data(host) => Ok(self.data.read_at(host + within, buf)?),
            Place::Mixed(host, bitmap) => {
                let size = self.cluster() / SUBCLUSTERS;
                let mut at = within;
                let mut rest = buf;
                while !rest.is_empty() {
                    let n = at / size;
                    let len = (((n + 1) * size - at) as usize).min(rest.len());
                    let (now, later) = rest.split_at_mut(len);
                    if bitmap >> n & 1 != 0 {
                        self.data.read_at(host + at, now)?;
                    } else if bitmap >> (32 + n) & 1 != 0 {
                        now.fill(0);
                    } else {
                        self.read_backing(guest - within + at, now)?;
                    }
                    at += len as u64;
                    rest = later;
                }
                Ok(())
            }
            Place::Compressed(entry) => {
                let data = match self.unpacked.get(entry) {
                    Some(data) => data,
                    None => {
                        let data = Arc::new(self.read_compressed(entry)?);
                        if buf.len() < data.len() {
                            self.unpacked.keep(entry, Arc::clone(&data));
                        }
                        data
                    }
                };
                let at = within as usize;
                buf.copy_from_slice(&data[at..at + buf.len()]);
                Ok(())
            }
        }
    }

    /// The state once the guest cluster `guest` is not being allocated by another request.
    fn when_settled(&self, guest: u64) -> Result<MutexGuard<'_, State>, BlockError> {
        let mut state = self.lock()?;
        while state.busy.contains(&(guest >> self.header.cluster_bits)) {
            state = self.settled.wait(state).map_err(super::broken)?;
        }
        Ok(state)
    }

    /// Allocate up to `want` host clusters that lie side by side: (offset, how many, nothing was ever written there).
    pub(super) fn allocate(&self, state: &mut State, want: u64) -> Result<(u64, u64, bool), BlockError> {
        let bits = self.header.cluster_bits;
        let (first, got) = state.refs.allocate(self.file.as_ref(), want)?;
        let (start, end) = (first << bits, (first + got) << bits);
        let untouched = start >= state.untouched && self.data.grows_with_zeroes();
        state.untouched = state.untouched.max(end);
        Ok((start, got, untouched))
    }

    /// Where the data of the guest clusters from `guest` on goes.
    fn allocate_data(
        &self,
        state: &mut State,
        guest: u64,
        want: u64,
    ) -> Result<(u64, u64, bool), BlockError> {
        if self.external {
            // The same place as in the guest, and not counted.
            return Ok((guest, want, false));
        }
        self.allocate(state, want)
    }

    /// Write a range.
    pub(super) fn write_span(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        let mut done = 0;
        while done < data.len() {
            done += self.write_run(offset + done as u64, &data[done..])?;
        }
        Ok(())
    }

    /// Write the beginning of a range, as much as lies side by side in the file; how much that was.
    fn write_run(&self, guest: u64, data: &[u8]) -> Result<usize, BlockError> {
        let (size, bits) = (self.cluster(), self.header.cluster_bits);
        let within = guest & (size - 1);
        let mut state = self.when_settled(guest)?;
        let mut len = (size - within).min(data.len() as u64);
        let limit = data.len() as u64;
        if let Some(host) = self.own(&mut state, guest)? {
            let mut next = host + size;
            while len < limit && !state.busy.contains(&((guest + len) >> bits)) {
                match self.own(&mut state, guest + len)? {
                    Some(at) if at == next => {
                        len += size.min(limit - len);
                        next += size;
                    }
                    _ => break,
                }
            }
            let _active = self.begin(&mut state);
            drop(state);
            self.data.write_at(host + within, &data[..len as usize])?;
            return Ok(len as usize);
        }
        // New host clusters (or the one kept for zeroes) get the whole contents.
        let first = self.place(&mut state, guest)?;
        let mut last = first;
        let mut kept = false;
        let (host, count, untouched) = match first {
            Place::Zero(Some(host)) if self.is_own(&state, guest) => {
                kept = true;
                (host, 1, false)
            }
            _ => {
                let mut want = 1;
                let mut end = len;
                while end < limit && want < RUN && !state.busy.contains(&((guest + end) >> bits)) {
                    if matches!(self.place(&mut state, guest + end)?, Place::Zero(Some(_)))
                        || self.own(&mut state, guest + end)?.is_some()
                    {
                        break;
                    }
                    end += size.min(limit - end);
                    want += 1;
                }
                self.allocate_data(&mut state, guest - within, want)?
            }
        };
        let start = guest - within;
        len = (count * size - within).min(limit);
        if count > 1 {
            last = self.place(&mut state, start + (count - 1) * size)?;
        }
        for n in 0..count {
            state.busy.insert((start >> bits) + n);
        }
        let active = self.begin(&mut state);
        drop(state);
        let written = self.fill(host, start, count, (first, last), within, &data[..len as usize], untouched);
        let state = self.state.lock().map_err(super::broken);
        let result = state.and_then(|mut state| {
            let mut result = written;
            if result.is_ok() && state.poisoned {
                result = Err(super::broken(()));
            }
            for n in 0..count {
                if result.is_ok() {
                    result = self.set_entry(&mut state, start + n * size, (host + n * size) | COPIED);
                }
                state.busy.remove(&((start >> bits) + n));
                if result.is_err() && !kept && !self.external {
                    // Nothing refers to it, and nothing will.
                    let _ = state.refs.release(self.file.as_ref(), (host >> bits) + n);
                }
            }
            result
        });
        self.settled.notify_all();
        drop(active);
        result.map(|()| len as usize)
    }

    /// Write `data` at `within` into `count` new clusters at `host`, with what belongs around it.
    #[allow(clippy::too_many_arguments)]
    fn fill(
        &self,
        host: u64,
        start: u64,
        count: u64,
        old: (Place, Place),
        within: u64,
        data: &[u8],
        untouched: bool,
    ) -> Result<(), BlockError> {
        let whole = count * self.cluster();
        let end = within + data.len() as u64;
        let is_zero = |p: Place| match p {
            Place::Zero(_) => true,
            Place::Unallocated => self.below().is_none(),
            _ => false,
        };
        let (head, tail) = (within > 0, end < whole);
        if untouched && (!head || is_zero(old.0)) && (!tail || is_zero(old.1)) || !(head || tail) {
            return Ok(self.data.write_at(host + within, data)?);
        }
        let mut all = vec![0u8; whole as usize];
        if head {
            self.read_place(old.0, start, &mut all[..within as usize])?;
        }
        if tail {
            // The last cluster of an image may reach past its end.
            let valid = (self.size() - start).min(whole);
            if end < valid {
                self.read_place(old.1, start + end, &mut all[end as usize..valid as usize])?;
            }
        }
        all[within as usize..end as usize].copy_from_slice(data);
        Ok(self.data.write_at(host, &all)?)
    }

    /// Make a whole guest cluster read as zero.
    pub(super) fn zero_cluster(&self, guest: u64) -> Result<(), BlockError> {
        if self.header.autoclear & AUTOCLEAR_RAW_DATA != 0 {
            // The data file is to be read without the tables too.
            let valid = (self.size() - guest).min(self.cluster());
            return self.write_span(guest, &vec![0; valid as usize]);
        }
        let bare = self.below().is_none();
        let mut state = self.when_settled(guest)?;
        match self.place(&mut state, guest)? {
            Place::Unallocated if bare => Ok(()),
            Place::Zero(_) => Ok(()),
            _ if bare => self.set_entry(&mut state, guest, 0),
            _ if self.header.version >= 3 => self.set_entry(&mut state, guest, ZERO),
            _ => {
                drop(state);
                // Version 2 cannot say "zero" above a backing image.
                let valid = (self.size() - guest).min(self.cluster());
                self.write_span(guest, &vec![0; valid as usize])
            }
        }
    }
}
