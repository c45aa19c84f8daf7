//! iSCSI: a LUN of a target as a store (RFC 7143, SBC-3). An initiator of its own: what is needed is small,
//! and arbitration and fencing need a say in what happens when a connection is made again.

mod conn;
mod device;
mod login;
mod pdu;
mod reserve;
mod session;
mod url;

pub use conn::fuzz;
pub use device::is_device;
pub use reserve::{key, phase, LunLock, ENDED};
pub use session::{forget_sessions, release_all};
pub use url::{escape, host_port, unescape, Target};

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::store::Store;
use crate::{BlockError, OpenOptions};
use conn::{Command, Reply};
use session::{failure, Session, GOOD};

/// Whether an image's name is that of a LUN: a URL, or a block device of this host (which may be one).
pub fn is_lun(path: &Path) -> bool {
    path.to_str().is_some_and(|p| p.starts_with("iscsi://")) || is_device(path)
}

/// Bytes in one command at the most.
const MAX_TRANSFER: usize = 1 << 20;

/// A LUN.
pub struct Lun {
    session: Arc<Session>,
    path: PathBuf,
    block: u64,
    blocks: u64,
    no_flush: bool,
    thin: bool,
    /// The target knows WRITE SAME.
    write_same: AtomicBool,
    /// Held while the rest of a block is read and written back around a part of it.
    patching: Mutex<()>,
}

fn read16(lba: u64, blocks: u32) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = 0x88;
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

fn be(data: &[u8]) -> u64 {
    data.iter().fold(0, |n, b| n << 8 | u64::from(*b))
}

impl Lun {
    /// Log in and look at the LUN.
    pub fn open(url: &str, options: &OpenOptions) -> Result<Self, BlockError> {
        let path = PathBuf::from(hide_secret(url));
        let format = |reason: String| BlockError::Format { path: path.clone(), reason };
        let target = Target::parse(url).map_err(format)?;
        let fail = |source| BlockError::Open { path: path.clone(), source };
        let session = Session::open(&target).map_err(fail)?;
        let ask = |cdb: [u8; 16], read: usize| -> io::Result<Reply> {
            session.command(&Command { cdb, data_out: &[], read, ordered: false }, session.limit())
        };
        let mut cdb = [0; 16];
        cdb[0] = 0x12;
        cdb[4] = 36;
        let inquiry = ask(cdb, 36).map_err(fail)?;
        // Peripheral qualifier 0, direct access device.
        if inquiry.status != GOOD || inquiry.data.first().copied() != Some(0) {
            return Err(format(format!("LUN {} of the target is not a disk", target.lun)));
        }
        let mut cdb = [0; 16];
        (cdb[0], cdb[1], cdb[13]) = (0x9E, 0x10, 32);
        let capacity = ask(cdb, 32).map_err(fail)?;
        if capacity.status != GOOD || capacity.data.len() < 15 {
            return Err(fail(failure(&capacity)));
        }
        let (last, block) = (be(&capacity.data[..8]), be(&capacity.data[8..12]));
        if !(512..=65536).contains(&block) || !block.is_power_of_two() || last >= 1 << 50 {
            return Err(format(format!("a LUN with blocks of {block} bytes is not supported")));
        }
        let lun = Lun {
            session,
            path: path.clone(),
            block,
            blocks: last + 1,
            no_flush: options.no_flush || options.read_only,
            thin: capacity.data[14] & 0x80 != 0,
            write_same: AtomicBool::new(true),
            patching: Mutex::new(()),
        };
        if !options.read_only {
            LunLock::of(&lun.session).reserve(&path, options.reserve)?;
        }
        Ok(lun)
    }

    fn send(&self, cdb: [u8; 16], data_out: &[u8], read: usize) -> io::Result<Reply> {
        let command = Command { cdb, data_out, read, ordered: false };
        let reply = self.session.command(&command, self.session.limit())?;
        if reply.status != GOOD {
            return Err(failure(&reply));
        }
        Ok(reply)
    }

    fn read_blocks(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut at = offset / self.block;
        for piece in buf.chunks_mut(MAX_TRANSFER) {
            let count = piece.len() as u64 / self.block;
            let reply = self.send(read16(at, count as u32), &[], piece.len())?;
            if reply.data.len() != piece.len() {
                return Err(pdu::bad("the target returns less than was asked for"));
            }
            piece.copy_from_slice(&reply.data);
            crate::buffers::give(reply.data);
            at += count;
        }
        Ok(())
    }

    fn write_blocks(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut at = offset / self.block;
        for piece in data.chunks(MAX_TRANSFER) {
            let count = piece.len() as u64 / self.block;
            let mut cdb = read16(at, count as u32);
            cdb[0] = 0x8A;
            self.send(cdb, piece, 0)?;
            at += count;
        }
        Ok(())
    }

    fn outside(&self) -> io::Error {
        io::Error::new(io::ErrorKind::StorageFull, format!("the LUN ends at {} bytes", self.length()))
    }
}

/// A URL without its password.
pub fn hide_secret(url: &str) -> String {
    let shown = match (url.find('%'), url.rfind('@')) {
        (Some(a), Some(b)) if a < b => format!("{}{}", &url[..a], &url[b..]),
        _ => url.to_owned(),
    };
    match shown.find("password=") {
        Some(at) => {
            let end = shown[at..].find('&').map_or(shown.len(), |n| at + n);
            format!("{}{}", &shown[..at + 9], &shown[end..])
        }
        None => shown,
    }
}

impl Store for Lun {
    fn path(&self) -> &Path {
        &self.path
    }
    fn length(&self) -> u64 {
        self.block * self.blocks
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let inside = self.length().saturating_sub(offset).min(buf.len() as u64) as usize;
        let (buf, past) = buf.split_at_mut(inside);
        past.fill(0);
        let end = offset + buf.len() as u64;
        let (from, to) = (offset / self.block * self.block, end.next_multiple_of(self.block));
        if buf.is_empty() || (from, to) == (offset, end) {
            return self.read_blocks(offset, buf);
        }
        let mut whole = vec![0; (to - from) as usize];
        self.read_blocks(from, &mut whole)?;
        let at = (offset - from) as usize;
        buf.copy_from_slice(&whole[at..at + buf.len()]);
        Ok(())
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(data.len() as u64).filter(|e| *e <= self.length());
        let end = end.ok_or_else(|| self.outside())?;
        let (from, to) = (offset / self.block * self.block, end.next_multiple_of(self.block));
        if (from, to) == (offset, end) {
            return self.write_blocks(offset, data);
        }
        let _patching = self.patching.lock();
        let mut whole = vec![0; (to - from) as usize];
        self.read_blocks(from, &mut whole)?;
        let at = (offset - from) as usize;
        whole[at..at + data.len()].copy_from_slice(data);
        self.write_blocks(from, &whole)
    }
    fn grow(&self, length: u64) -> io::Result<()> {
        if length > self.length() {
            return Err(self.outside());
        }
        Ok(())
    }
    fn set_length(&self, length: u64) -> io::Result<()> {
        if length > self.length() {
            return Err(io::Error::other("Cannot grow iSCSI devices"));
        }
        Ok(())
    }
    fn grows_with_zeroes(&self) -> bool {
        false
    }
    fn zero_range(&self, offset: u64, len: u64, _unmap: bool) -> bool {
        let aligned = offset.is_multiple_of(self.block) && len.is_multiple_of(self.block);
        if !aligned || len / self.block > u64::from(u32::MAX) || !self.write_same.load(Ordering::Relaxed) {
            return false;
        }
        let mut cdb = read16(offset / self.block, (len / self.block) as u32);
        cdb[0] = 0x93;
        let done = self.send(cdb, &vec![0; self.block as usize], 0).is_ok();
        if !done {
            // Written out instead, now and later.
            self.write_same.store(false, Ordering::Relaxed);
        }
        done
    }
    fn punch(&self, offset: u64, len: u64) {
        let (from, to) = (offset.next_multiple_of(self.block), (offset + len) / self.block * self.block);
        if !self.thin || from >= to || (to - from) / self.block > u64::from(u32::MAX) {
            return;
        }
        let mut cdb = [0; 16];
        (cdb[0], cdb[8]) = (0x42, 24);
        let mut list = [0u8; 24];
        list[..2].copy_from_slice(&22u16.to_be_bytes());
        list[2..4].copy_from_slice(&16u16.to_be_bytes());
        list[8..16].copy_from_slice(&(from / self.block).to_be_bytes());
        list[16..20].copy_from_slice(&(((to - from) / self.block) as u32).to_be_bytes());
        if let Err(e) = self.send(cdb, &list, 0) {
            log::debug!("{}: {e}", self.path.display());
        }
    }
    fn sync(&self) -> io::Result<()> {
        if self.no_flush {
            return Ok(());
        }
        let mut cdb = [0; 16];
        cdb[0] = 0x35;
        let command = Command { cdb, data_out: &[], read: 0, ordered: false };
        let reply = self.session.command(&command, self.session.limit())?;
        match (reply.status, session::sense(&reply.sense)) {
            (GOOD, _) => Ok(()),
            // A target without a cache need not know the command.
            (session::CHECK_CONDITION, (5, 0x20, _)) => Ok(()),
            _ => Err(failure(&reply)),
        }
    }
}
