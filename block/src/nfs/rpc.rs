//! Remote procedure calls over TCP (RFC 5531): several under way on one connection.

use std::collections::HashMap;
use std::io::{self, IoSlice, Read};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::Thread;
use std::time::{Duration, Instant};

use super::xdr::{bad, In, Out};
use crate::tcp::{held, write_all, Input};

/// Longest answer.
const MAX_REPLY: usize = (1 << 20) + 4096;
/// How long the rest of an answer may take whose beginning is there.
const PATIENCE: Duration = Duration::from_secs(9);

/// A procedure: program, version, number.
pub type Procedure = (u32, u32, u32);

struct Call {
    answer: Mutex<Option<Result<Vec<u8>, ()>>>,
    waiter: Thread,
}

/// A connection to a program of a server.
pub struct Conn {
    stream: TcpStream,
    input: Mutex<Option<Input>>,
    writer: Mutex<()>,
    calls: Mutex<HashMap<u32, Arc<Call>>>,
    dead: AtomicBool,
}

fn broken() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "NFS: the connection broke")
}

/// A call up to its arguments; `credential` is the body of AUTH_SYS.
pub fn header(xid: u32, (program, version, number): Procedure, credential: &[u8]) -> Out {
    let out = Out::default().u32(xid).u32(0).u32(2).u32(program).u32(version).u32(number);
    out.u32(1).opaque(credential).u32(0).u32(0)
}

/// The body of AUTH_SYS (RFC 5531, appendix A).
pub fn credential(uid: u32, gid: u32) -> Vec<u8> {
    Out::default().u32(0).opaque(b"ftvm").u32(uid).u32(gid).u32(0).0
}

/// Strip an answer's header: where its results begin.
pub fn results(answer: &[u8]) -> io::Result<usize> {
    let mut r = In(answer);
    let (_, kind, status) = (r.u32()?, r.u32()?, r.u32()?);
    if kind != 1 {
        return Err(bad());
    }
    if status != 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "NFS: the server refuses our credentials",
        ));
    }
    r.u32()?;
    r.opaque(400)?;
    match r.u32()? {
        0 => Ok(answer.len() - r.0.len()),
        1 | 2 => Err(io::Error::new(io::ErrorKind::Unsupported, "NFS: the server has no NFS version 3")),
        _ => Err(io::Error::other("NFS: the server cannot do the call")),
    }
}

impl Conn {
    /// Take over a stream.
    pub fn start(stream: TcpStream) -> io::Result<Conn> {
        let input = Input::new(stream.try_clone()?, PATIENCE)?;
        stream.set_write_timeout(Some(PATIENCE))?;
        // What is still unsent when the connection is given up must not reach the server later.
        let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
        nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::Linger, &linger)?;
        Ok(Conn {
            stream,
            input: Mutex::new(Some(input)),
            writer: Mutex::new(()),
            calls: Mutex::default(),
            dead: AtomicBool::new(false),
        })
    }

    /// Whether nothing can be asked here any more.
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    /// Give the connection up; what is under way fails.
    pub fn close(&self) {
        self.dead.store(true, Ordering::SeqCst);
        let _ = self.stream.shutdown(std::net::Shutdown::Read);
        for (_, call) in held(&self.calls).drain() {
            held(&call.answer).get_or_insert(Err(()));
            call.waiter.unpark();
        }
        if let Ok(mut input) = self.input.try_lock() {
            *input = None;
        }
    }

    /// Send a call (its header, arguments and at the end `data` with padding) and wait for the answer.
    pub fn call(&self, xid: u32, head: &[u8], data: &[u8], deadline: Instant) -> io::Result<Vec<u8>> {
        let call = Arc::new(Call { answer: Mutex::default(), waiter: std::thread::current() });
        held(&self.calls).insert(xid, Arc::clone(&call));
        let result = match self.send(head, data) {
            Ok(()) => self.wait(&call, deadline),
            Err(e) => {
                self.close();
                Err(e)
            }
        };
        held(&self.calls).remove(&xid);
        // Another waiting call reads on.
        let next = held(&self.calls).values().find(|c| held(&c.answer).is_none()).cloned();
        if let Some(next) = next {
            next.waiter.unpark();
        }
        result
    }

    fn send(&self, head: &[u8], data: &[u8]) -> io::Result<()> {
        let pad = data.len().next_multiple_of(4) - data.len();
        let mark = (1u32 << 31 | (head.len() + data.len() + pad) as u32).to_be_bytes();
        let zeroes = [0u8; 3];
        let mut parts = [&mark[..], head, data, &zeroes[..pad]].map(IoSlice::new);
        let _order = held(&self.writer);
        if self.is_dead() {
            return Err(broken());
        }
        write_all(&self.stream, &mut parts, broken)
    }

    fn wait(&self, call: &Call, deadline: Instant) -> io::Result<Vec<u8>> {
        loop {
            if let Some(answer) = held(&call.answer).take() {
                return answer.map_err(|()| broken());
            }
            let now = Instant::now();
            if now >= deadline {
                self.close();
                return Err(io::Error::new(io::ErrorKind::TimedOut, "NFS: the server does not answer"));
            }
            let nap = (deadline - now).min(Duration::from_secs(1));
            if !self.read_while(nap, || held(&call.answer).is_none()) {
                std::thread::park_timeout(nap);
            }
        }
    }

    /// Read for all, if nobody else does, as long as `go_on` says and something comes within `limit`; false: somebody
    /// else reads.
    fn read_while(&self, limit: Duration, go_on: impl Fn() -> bool) -> bool {
        let Ok(mut guard) = self.input.try_lock() else { return false };
        let Some(input) = guard.as_mut() else { return false };
        while go_on() {
            let result = match input.wait(limit) {
                Ok(true) => self.read_one(input),
                Ok(false) => return true,
                Err(e) => Err(e),
            };
            if let Err(e) = result {
                if !self.is_dead() {
                    log::debug!("NFS: {e}");
                }
                *guard = None;
                drop(guard);
                self.close();
                return true;
            }
        }
        true
    }

    fn read_one(&self, input: &mut impl Read) -> io::Result<()> {
        let mut answer = Vec::new();
        loop {
            let mut mark = [0u8; 4];
            input.read_exact(&mut mark)?;
            let mark = u32::from_be_bytes(mark);
            let len = (mark & !(1 << 31)) as usize;
            let have = answer.len();
            if have + len > MAX_REPLY {
                return Err(bad());
            }
            if have == 0 {
                answer = crate::buffers::take(len);
            } else {
                answer.resize(have + len, 0);
            }
            input.read_exact(&mut answer[have..])?;
            if mark >> 31 != 0 {
                break;
            }
        }
        let xid = In(&answer).u32()?;
        // An answer that nobody waits for is one to a call that was given up.
        let call = held(&self.calls).get(&xid).cloned();
        if let Some(call) = call {
            held(&call.answer).get_or_insert(Ok(answer));
            call.waiter.unpark();
        }
        Ok(())
    }
}

/// For tests of foreign bytes: take `bytes` for a server's answer and read results from it in every way.
pub fn fuzz(bytes: &[u8]) {
    if let Ok(at) = results(bytes) {
        let mut r = In(&bytes[at..]);
        let _ = (r.u32(), r.change(), r.attributes(), r.opaque(1 << 20), r.u64());
    }
}
