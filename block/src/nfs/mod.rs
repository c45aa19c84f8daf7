//! NFS: an image on a server, without a mount (version 3).
//!
//! A client of its own: the crate for it (nfs3_client) has one call under way on a connection and wants an
//! asynchronous runtime; here several are under way, and it must be known what happens to a write when a
//! connection is given up.

mod client;
mod rpc;
mod url;
mod xdr;

pub use rpc::fuzz;
pub use url::{parse, Server};

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::files::Files;
use crate::store::Store;
use crate::{BlockError, OpenOptions};
use client::{Client, Handle};

/// Bytes written but not committed at the most.
const UNCOMMITTED: usize = 64 << 20;

/// Mounted directories of this process.
static CLIENTS: Mutex<Vec<(Server, Weak<Client>)>> = Mutex::new(Vec::new());

fn client(server: &Server) -> io::Result<Arc<Client>> {
    let mut clients = CLIENTS.lock().unwrap_or_else(PoisonError::into_inner);
    clients.retain(|(_, c)| c.strong_count() > 0);
    if let Some(found) = clients.iter().find(|(s, _)| s == server).and_then(|(_, c)| c.upgrade()) {
        return Ok(found);
    }
    let made = Arc::new(Client::mount(server)?);
    clients.push((server.clone(), Arc::downgrade(&made)));
    Ok(made)
}

/// Connect anew from here on, as another process would (for tests).
pub fn forget_clients() {
    CLIENTS.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

/// A server's directory and the name in it that a URL means.
pub fn beside(url: &str) -> io::Result<(Arc<dyn Files>, String)> {
    let (server, name) = parse(url).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
    Ok((Arc::new(Directory(client(&server)?)), name))
}

/// Written, but perhaps only in the server's memory.
#[derive(Default)]
struct Uncommitted {
    writes: Vec<(u64, Vec<u8>, u64)>,
    bytes: usize,
}

/// A file on a server. It is its handle that is used, never again its name: when another host has put another
/// file in its place, this one writes where nobody looks.
pub struct NfsFile {
    client: Arc<Client>,
    handle: Handle,
    path: PathBuf,
    length: AtomicU64,
    no_flush: bool,
    uncommitted: Mutex<Uncommitted>,
    committing: Mutex<()>,
}

impl NfsFile {
    /// Look the file up.
    pub fn open(url: &str, options: &OpenOptions) -> Result<Self, BlockError> {
        let path = PathBuf::from(url);
        let (server, name) =
            parse(url).map_err(|reason| BlockError::Format { path: path.clone(), reason })?;
        let fail = |source| BlockError::Open { path: path.clone(), source };
        let client = client(&server).map_err(fail)?;
        let handle = client.lookup(&name).map_err(fail)?;
        let length = client.size(&handle).map_err(fail)?;
        Ok(NfsFile {
            client,
            handle,
            path,
            length: AtomicU64::new(length),
            no_flush: options.no_flush || options.read_only,
            uncommitted: Mutex::default(),
            committing: Mutex::new(()),
        })
    }

    fn write_piece(&self, mut offset: u64, mut data: &[u8], stable: bool) -> io::Result<()> {
        while !data.is_empty() {
            let (count, committed, verifier) = self.client.write(&self.handle, offset, data, stable)?;
            if !committed {
                let mut list = self.uncommitted.lock().unwrap_or_else(PoisonError::into_inner);
                let mut copy = crate::buffers::take(count);
                copy.copy_from_slice(&data[..count]);
                list.bytes += count;
                list.writes.push((offset, copy, verifier));
            }
            offset += count as u64;
            data = &data[count..];
        }
        Ok(())
    }

    fn commit(&self) -> io::Result<()> {
        let _one = self.committing.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = std::mem::take(&mut *self.uncommitted.lock().unwrap_or_else(PoisonError::into_inner));
        if taken.writes.is_empty() {
            return Ok(());
        }
        let done = self.client.commit(&self.handle).and_then(|verifier| {
            if taken.writes.iter().all(|(_, _, v)| *v == verifier) {
                return Ok(());
            }
            log::warn!(
                "{}: the server was restarted; {} writes are repeated",
                self.path.display(),
                taken.writes.len()
            );
            for (offset, data, _) in &taken.writes {
                let mut at = 0;
                while at < data.len() {
                    let piece = &data[at..];
                    at += self.client.write(&self.handle, *offset + at as u64, piece, true)?.0;
                }
            }
            Ok(())
        });
        if done.is_ok() {
            taken.writes.into_iter().for_each(|(_, data, _)| crate::buffers::give(data));
        } else {
            // They are still to be made safe, before what came since.
            let mut list = self.uncommitted.lock().unwrap_or_else(PoisonError::into_inner);
            let since = std::mem::replace(&mut *list, taken);
            list.bytes += since.bytes;
            list.writes.extend(since.writes);
        }
        done
    }
}

impl Store for NfsFile {
    fn path(&self) -> &Path {
        &self.path
    }
    fn length(&self) -> u64 {
        self.length.load(Ordering::Relaxed)
    }
    fn read_at(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            let len = buf.len().min(self.client.read_max);
            let got = self.client.read(&self.handle, offset, &mut buf[..len])?;
            if got == 0 {
                buf.fill(0);
                return Ok(());
            }
            offset += got as u64;
            buf = &mut buf[got..];
        }
        Ok(())
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        for (i, piece) in data.chunks(self.client.write_max).enumerate() {
            self.write_piece(offset + (i * self.client.write_max) as u64, piece, false)?;
        }
        self.length.fetch_max(offset + data.len() as u64, Ordering::Relaxed);
        let waiting = self.uncommitted.lock().unwrap_or_else(PoisonError::into_inner).bytes;
        if waiting > UNCOMMITTED {
            self.commit()?;
        }
        Ok(())
    }
    fn grow(&self, length: u64) -> io::Result<()> {
        if length > self.length() {
            self.client.set(&self.handle, Some(length), None)?;
            self.length.fetch_max(length, Ordering::Relaxed);
        }
        Ok(())
    }
    fn set_length(&self, length: u64) -> io::Result<()> {
        self.client.set(&self.handle, Some(length), None)?;
        self.length.store(length, Ordering::Relaxed);
        Ok(())
    }
    fn grows_with_zeroes(&self) -> bool {
        true
    }
    fn zero_range(&self, _offset: u64, _len: u64, _unmap: bool) -> bool {
        false
    }
    fn punch(&self, _offset: u64, _len: u64) {}
    fn sync(&self) -> io::Result<()> {
        if self.no_flush {
            return Ok(());
        }
        self.commit()
    }
}

/// A directory on a server. Its changes are on stable storage when the server answers (RFC 1813, 4.8).
struct Directory(Arc<Client>);

impl Files for Directory {
    fn create(&self, name: &str, contents: &[u8]) -> io::Result<()> {
        let file = self.0.create(name)?;
        let mut at = 0;
        while at < contents.len() {
            let end = contents.len().min(at + self.0.write_max);
            at += self.0.write(&file, at as u64, &contents[at..end], true)?.0;
        }
        Ok(())
    }
    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let file = self.0.lookup(name)?;
        let mut buf = vec![0; 4096];
        let len = self.0.read(&file, 0, &mut buf)?;
        buf.truncate(len);
        Ok(buf)
    }
    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        self.0.link(from, to)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.0.rename(from, to)
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.0.remove(name)
    }
    fn exists(&self, name: &str) -> io::Result<bool> {
        match self.0.lookup(name) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }
    fn list(&self) -> io::Result<Vec<String>> {
        self.0.list()
    }
    fn check(&self) -> io::Result<()> {
        self.0.size(self.0.root()).map(|_| ())
    }
}
