//! NFS version 3 (RFC 1813): the calls that images and locks need, repeated until the server answers.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::rpc::{credential, header, results, Conn, Procedure};
use super::url::Server;
use super::xdr::{bad, In, Out};
use crate::tcp;

const CONNECT: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(200);
const NFS: u32 = 100_003;
const MOUNT: u32 = 100_005;
const PORTMAP: u32 = 100_000;
/// Longest handle (RFC 1813, 2.4).
const HANDLE: usize = 64;

const GETATTR: u32 = 1;
const SETATTR: u32 = 2;
const LOOKUP: u32 = 3;
const READ: u32 = 6;
const WRITE: u32 = 7;
const CREATE: u32 = 8;
const REMOVE: u32 = 12;
const RENAME: u32 = 14;
const LINK: u32 = 15;
const READDIR: u32 = 16;
const FSINFO: u32 = 19;
const COMMIT: u32 = 21;

/// An answer, and where in it the results behind the status begin.
struct Answer(Vec<u8>, usize);

impl Answer {
    fn results(&self) -> In<'_> {
        In(&self.0[self.1..])
    }
}

/// A file handle.
pub type Handle = Vec<u8>;

/// An error of the server for a status (RFC 1813, 2.6), with the errno that it means.
fn status(code: u32) -> io::Error {
    let errno = match code {
        1 => libc::EPERM,
        2 => libc::ENOENT,
        13 => libc::EACCES,
        17 => libc::EEXIST,
        20 => libc::ENOTDIR,
        21 => libc::EISDIR,
        22 => libc::EINVAL,
        27 => libc::EFBIG,
        28 => libc::ENOSPC,
        30 => libc::EROFS,
        63 => libc::ENAMETOOLONG,
        69 => libc::EDQUOT,
        70 | 10001 => libc::ESTALE,
        _ => libc::EIO,
    };
    io::Error::from_raw_os_error(errno)
}

#[derive(Default)]
struct Inner {
    conn: Option<Arc<Conn>>,
    port: u16,
}

/// A mounted directory of a server.
pub struct Client {
    server: Server,
    root: Handle,
    credential: Vec<u8>,
    inner: Mutex<Inner>,
    next: AtomicU32,
    /// Bytes in one read, one write at the most.
    pub read_max: usize,
    pub write_max: usize,
}

fn xid() -> u32 {
    let mut b = [0u8; 4];
    if let Ok(mut f) = std::fs::File::open("/dev/urandom") {
        let _ = io::Read::read_exact(&mut f, &mut b);
    }
    u32::from_ne_bytes(b)
}

/// One call to a service of its own connection.
fn ask(server: &Server, port: u16, what: Procedure, args: Out) -> io::Result<Vec<u8>> {
    let conn = Conn::start(tcp::connect_reserved(&server.host, port, CONNECT)?)?;
    let id = xid();
    let head = header(id, what, &credential(server.uid, server.gid)).fixed(&args.0);
    let answer = conn.call(id, &head.0, &[], Instant::now() + CONNECT)?;
    let at = results(&answer)?;
    Ok(answer[at..].to_vec())
}

/// The port of a program, from the port mapper.
fn port_of(server: &Server, program: u32) -> io::Result<u16> {
    let args = Out::default().u32(program).u32(3).u32(6).u32(0);
    let answer = ask(server, 111, (PORTMAP, 2, 3), args)?;
    match In(&answer).u32()? {
        0 => Err(io::Error::new(io::ErrorKind::ConnectionRefused, "NFS: the server offers no NFS version 3")),
        port => u16::try_from(port).map_err(|_| bad()),
    }
}

impl Client {
    /// Mount the server's directory.
    pub fn mount(server: &Server) -> io::Result<Client> {
        let mount_port = match server.mount_port {
            0 => port_of(server, MOUNT)?,
            port => port,
        };
        let answer = ask(server, mount_port, (MOUNT, 3, 1), Out::default().opaque(server.dir.as_bytes()))?;
        let mut r = In(&answer);
        match r.u32()? {
            0 => {}
            code => return Err(status(code)),
        }
        let root = r.opaque(HANDLE)?.to_vec();
        let mut client = Client {
            server: server.clone(),
            root,
            credential: credential(server.uid, server.gid),
            inner: Mutex::default(),
            next: AtomicU32::new(xid()),
            read_max: 65536,
            write_max: 65536,
        };
        let root = client.root.clone();
        let info = client.call(FSINFO, Out::default().opaque(&root), &[])?;
        let mut r = info.results();
        r.attributes()?;
        let numbers: Vec<u32> = (0..5).map(|_| r.u32()).collect::<io::Result<_>>()?;
        client.read_max = (numbers[0] as usize).clamp(4096, 1 << 20);
        client.write_max = (numbers[3] as usize).clamp(4096, 1 << 20);
        Ok(client)
    }

    /// The directory.
    pub fn root(&self) -> &Handle {
        &self.root
    }

    fn limit(&self) -> Duration {
        match self.server.timeout {
            0 => Duration::from_secs(365 * 86400),
            n => Duration::from_secs(n),
        }
    }

    fn connection(&self, deadline: Instant) -> io::Result<Arc<Conn>> {
        loop {
            let error = {
                let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(conn) = inner.conn.as_ref().filter(|c| !c.is_dead()) {
                    return Ok(Arc::clone(conn));
                }
                inner.conn = None;
                let made = (|| {
                    let port = match self.server.nfs_port {
                        0 if inner.port == 0 => port_of(&self.server, NFS)?,
                        0 => inner.port,
                        port => port,
                    };
                    let conn = Conn::start(tcp::connect_reserved(&self.server.host, port, CONNECT)?)?;
                    Ok::<_, io::Error>((port, conn))
                })();
                match made {
                    Ok((port, conn)) => {
                        let conn = Arc::new(conn);
                        inner.port = port;
                        inner.conn = Some(Arc::clone(&conn));
                        return Ok(conn);
                    }
                    Err(e) => {
                        // It may come back on another port.
                        inner.port = 0;
                        e
                    }
                }
            };
            if Instant::now() >= deadline {
                return Err(error);
            }
            log::debug!("NFS: no connection to {}: {error}", self.server.host);
            std::thread::sleep(PAUSE);
        }
    }

    /// Do a call, again over new connections (with the same number, so that the server can tell) until it is
    /// answered. The results behind the status; another status than success is an error.
    fn call(&self, number: u32, args: Out, data: &[u8]) -> io::Result<Answer> {
        let deadline = Instant::now() + self.limit();
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let head = header(id, (NFS, 3, number), &self.credential).fixed(&args.0).0;
        loop {
            let conn = self.connection(deadline)?;
            let answer = match conn.call(id, &head, data, deadline) {
                Ok(answer) => answer,
                Err(e) if Instant::now() >= deadline => return Err(e),
                Err(e) => {
                    log::debug!("{e}; the call is repeated");
                    std::thread::sleep(Duration::from_millis(20));
                    continue;
                }
            };
            let at = results(&answer)?;
            match In(&answer[at..]).u32()? {
                0 => return Ok(Answer(answer, at + 4)),
                // "Try later".
                10008 if Instant::now() < deadline => std::thread::sleep(PAUSE),
                code => return Err(status(code)),
            }
        }
    }

    fn named(&self, name: &str) -> Out {
        Out::default().opaque(&self.root).opaque(name.as_bytes())
    }

    /// A name's handle.
    pub fn lookup(&self, name: &str) -> io::Result<Handle> {
        let r = self.call(LOOKUP, self.named(name), &[])?;
        Ok(r.results().opaque(HANDLE)?.to_vec())
    }

    /// A file's size.
    pub fn size(&self, file: &Handle) -> io::Result<u64> {
        let r = self.call(GETATTR, Out::default().opaque(file), &[])?;
        r.results().size()
    }

    /// Set size or mode.
    pub fn set(&self, file: &Handle, size: Option<u64>, mode: Option<u32>) -> io::Result<()> {
        let mut args = Out::default().opaque(file);
        args = match mode {
            Some(mode) => args.u32(1).u32(mode),
            None => args.u32(0),
        };
        args = args.u32(0).u32(0);
        args = match size {
            Some(size) => args.u32(1).u64(size),
            None => args.u32(0),
        };
        self.call(SETATTR, args.u32(0).u32(0).u32(0), &[]).map(|_| ())
    }

    /// Fill `buf`; how much there was before the end of the file.
    pub fn read(&self, file: &Handle, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let args = Out::default().opaque(file).u64(offset).u32(buf.len() as u32);
        let answer = self.call(READ, args, &[])?;
        let mut r = answer.results();
        r.attributes()?;
        let (_count, eof) = (r.u32()?, r.u32()?);
        let data = r.opaque(buf.len())?;
        buf[..data.len()].copy_from_slice(data);
        if data.is_empty() && eof == 0 {
            return Err(bad());
        }
        let len = data.len();
        crate::buffers::give(answer.0);
        Ok(len)
    }

    /// Write; how much was, whether it is on stable storage, and the server's verifier.
    pub fn write(
        &self,
        file: &Handle,
        offset: u64,
        data: &[u8],
        stable: bool,
    ) -> io::Result<(usize, bool, u64)> {
        let args = Out::default().opaque(file).u64(offset).u32(data.len() as u32);
        let args = args.u32(if stable { 2 } else { 0 }).u32(data.len() as u32);
        let answer = self.call(WRITE, args, data)?;
        let mut r = answer.results();
        r.change()?;
        let (count, committed, verifier) = (r.u32()? as usize, r.u32()?, r.u64()?);
        if count == 0 || count > data.len() {
            return Err(bad());
        }
        Ok((count, committed > 0, verifier))
    }

    /// Everything written before is on stable storage, unless the verifier is another than the writes'.
    pub fn commit(&self, file: &Handle) -> io::Result<u64> {
        let answer = self.call(COMMIT, Out::default().opaque(file).u64(0).u32(0), &[])?;
        let mut r = answer.results();
        r.change()?;
        r.u64()
    }

    /// Make a new file. Exclusive by a verifier, so that a repetition of the call is told from another's file.
    pub fn create(&self, name: &str) -> io::Result<Handle> {
        let verifier = u64::from(xid()) << 32 | u64::from(xid());
        self.call(CREATE, self.named(name).u32(2).u64(verifier), &[])?;
        let file = self.lookup(name)?;
        self.set(&file, None, Some(0o644))?;
        Ok(file)
    }

    pub fn remove(&self, name: &str) -> io::Result<()> {
        self.call(REMOVE, self.named(name), &[]).map(|_| ())
    }

    /// Rename; what a repetition finds done already is done.
    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let file = self.lookup(from)?;
        let args = self.named(from).opaque(&self.root).opaque(to.as_bytes());
        match self.call(RENAME, args, &[]) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) && self.lookup(to)? == file => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// All names in the directory.
    pub fn list(&self) -> io::Result<Vec<String>> {
        let (mut cookie, mut verifier) = (0, 0);
        let mut names = Vec::new();
        loop {
            let args = Out::default().opaque(&self.root).u64(cookie).u64(verifier).u32(32768);
            let answer = self.call(READDIR, args, &[])?;
            let mut r = answer.results();
            r.attributes()?;
            verifier = r.u64()?;
            let before = names.len();
            while r.u32()? != 0 {
                r.u64()?;
                names.push(String::from_utf8_lossy(r.opaque(4096)?).into_owned());
                cookie = r.u64()?;
            }
            if r.u32()? != 0 || names.len() == before {
                return Ok(names);
            }
        }
    }

    pub fn link(&self, from: &str, to: &str) -> io::Result<()> {
        let file = self.lookup(from)?;
        let args = Out::default().opaque(&file).opaque(&self.root).opaque(to.as_bytes());
        self.call(LINK, args, &[]).map(|_| ())
    }
}
