//! A session with a LUN: commands that are repeated on a new connection when one breaks.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::conn::{Command, Conn, Reply};
use super::login;
use super::url::Target;
use crate::tcp;

/// How long one attempt to connect and log in may take.
const CONNECT: Duration = Duration::from_secs(3);
/// Between attempts.
const PAUSE: Duration = Duration::from_millis(200);

/// SAM-5 statuses.
pub const GOOD: u8 = 0;
pub const CHECK_CONDITION: u8 = 2;
pub const BUSY: u8 = 8;
pub const RESERVATION_CONFLICT: u8 = 0x18;
pub const TASK_SET_FULL: u8 = 0x28;

/// Sense key, additional sense code and its qualifier (SPC-4, 4.5).
pub fn sense(data: &[u8]) -> (u8, u8, u8) {
    let at = |i: usize| data.get(i).copied().unwrap_or(0);
    match at(0) & 0x7F {
        0x72 | 0x73 => (at(1) & 15, at(2), at(3)),
        _ => (at(2) & 15, at(12), at(13)),
    }
}

/// The error that a failed command means for a disk.
pub fn failure(reply: &Reply) -> io::Error {
    if reply.status == RESERVATION_CONFLICT {
        return lost();
    }
    let (key, code, qualifier) = sense(&reply.sense);
    let text = format!("iSCSI: status {:02x}, sense {key:x}/{code:02x}/{qualifier:02x}", reply.status);
    let kind = match (key, code, qualifier) {
        (5, 0x21, _) | (7, 0x27, 7) => io::ErrorKind::StorageFull,
        (7, _, _) => io::ErrorKind::ReadOnlyFilesystem,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, text)
}

/// Another host has the LUN.
pub fn lost() -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, "iSCSI: another host holds the reservation of the LUN")
}

#[derive(Default)]
struct Inner {
    conn: Option<Arc<Conn>>,
    connecting: bool,
}

/// A session with one LUN.
pub struct Session {
    target: Target,
    isid: [u8; 6],
    inner: Mutex<Inner>,
    connected: Condvar,
    /// The key with which this session holds the LUN's reservation, if it does.
    pub(super) holding: Mutex<Option<u64>>,
    /// The reservation went to another host: nothing may be written any more.
    pub(super) lost: AtomicBool,
    /// It was taken from another host.
    pub(super) took: AtomicBool,
}

/// Sessions of this process: a LUN's reservation belongs to a session, so all that use a LUN share one.
static SESSIONS: Mutex<Vec<(Target, Weak<Session>)>> = Mutex::new(Vec::new());

impl Session {
    /// The session with `target`, connected now if there is none yet.
    pub fn open(target: &Target) -> io::Result<Arc<Session>> {
        let mut sessions = SESSIONS.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|(_, s)| s.strong_count() > 0);
        if let Some(found) = sessions.iter().find(|(t, _)| t == target).and_then(|(_, s)| s.upgrade()) {
            return Ok(found);
        }
        let mut random = [0u8; 5];
        io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut random)?;
        let [a, b, c, d, e] = random;
        let session = Arc::new(Session {
            target: target.clone(),
            // "Random" format (RFC 7143, 11.12.5). It stays: a new connection ends what the old one left.
            isid: [0x80, a, b, c, d, e],
            inner: Mutex::default(),
            connected: Condvar::new(),
            holding: Mutex::default(),
            lost: AtomicBool::new(false),
            took: AtomicBool::new(false),
        });
        let conn = session.connect()?;
        session.lock().conn = Some(conn);
        sessions.push((target.clone(), Arc::downgrade(&session)));
        Ok(session)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long a request may take with all repetitions.
    pub fn limit(&self) -> Duration {
        match self.target.timeout {
            0 => Duration::from_secs(365 * 86400),
            n => Duration::from_secs(n),
        }
    }

    fn connect(&self) -> io::Result<Arc<Conn>> {
        let t = &self.target;
        let stream = tcp::connect(&t.host, t.port, CONNECT)?;
        stream.set_read_timeout(Some(CONNECT))?;
        stream.set_write_timeout(Some(CONNECT))?;
        let agreed = login::login(&stream, t, self.isid)?;
        // A target that takes nothing for this long is not there.
        stream.set_write_timeout(Some(Duration::from_secs(10)))?;
        let conn = Conn::start(stream, agreed, t.lun)?;
        if let Err(e) = super::reserve::recover(self, &conn) {
            conn.close();
            return Err(e);
        }
        Ok(conn)
    }

    /// A live connection; made anew if need be.
    fn connection(&self, deadline: Instant) -> io::Result<Arc<Conn>> {
        let mut inner = self.lock();
        loop {
            if let Some(conn) = inner.conn.as_ref().filter(|c| !c.is_dead()) {
                return Ok(Arc::clone(conn));
            }
            if Instant::now() >= deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "iSCSI: the target cannot be reached"));
            }
            if inner.connecting {
                inner = self.connected.wait_timeout(inner, PAUSE).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            inner.connecting = true;
            inner.conn = None;
            drop(inner);
            let result = self.connect();
            inner = self.lock();
            inner.connecting = false;
            self.connected.notify_all();
            match result {
                Ok(conn) => {
                    log::info!("iSCSI: connected to {} again", self.target.host);
                    inner.conn = Some(conn);
                }
                Err(e) => {
                    log::debug!("iSCSI: no connection to {}: {e}", self.target.host);
                    drop(inner);
                    std::thread::sleep(PAUSE);
                    inner = self.lock();
                }
            }
        }
    }

    /// Do a command, again and again over new connections until it is answered or `limit` is over. Only for
    /// commands that may be done twice.
    pub fn command(&self, command: &Command<'_>, limit: Duration) -> io::Result<Reply> {
        let deadline = Instant::now() + limit;
        loop {
            if self.lost.load(Ordering::SeqCst) && !command.data_out.is_empty() {
                return Err(lost());
            }
            let conn = self.connection(deadline)?;
            match retry_attention(&conn, command, deadline) {
                Ok(reply) => {
                    // The holder is refused only when it is not the holder any more. (0x5E, 0x5F: PERSISTENT RESERVE.)
                    let asks = matches!(command.cdb[0], 0x5E | 0x5F);
                    let holding = || self.holding.lock().is_ok_and(|h| h.is_some());
                    if reply.status == RESERVATION_CONFLICT && !asks && holding() {
                        self.lost.store(true, Ordering::SeqCst);
                    }
                    return Ok(reply);
                }
                Err(e) if Instant::now() >= deadline => return Err(e),
                Err(e) => log::debug!("{e}; the request is repeated"),
            }
        }
    }
}

/// Open sessions anew from here on, as another process would (for tests).
pub fn forget_sessions() {
    SESSIONS.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

/// The program ends: let every LUN go that this process still holds.
pub fn release_all() {
    let sessions: Vec<Arc<Session>> = {
        let list = SESSIONS.lock().unwrap_or_else(PoisonError::into_inner);
        list.iter().filter_map(|(_, s)| s.upgrade()).collect()
    };
    for session in sessions {
        let conn = session.lock().conn.clone().filter(|c| !c.is_dead());
        if let Some(conn) = conn {
            give_back(session.as_ref(), &conn);
        }
    }
    super::device::release_devices();
}

/// Let the LUN go, if it has not gone to another host.
fn give_back(session: &Session, conn: &Arc<Conn>) {
    if session.lost.load(Ordering::SeqCst) {
        *session.holding.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
    super::reserve::give_back(session, conn.as_ref());
}

/// Do a command on one connection; unit attentions and a busy target are waited out.
pub fn retry_attention(conn: &Conn, command: &Command<'_>, deadline: Instant) -> io::Result<Reply> {
    let mut attentions = 0;
    loop {
        let reply = conn.execute(command, deadline)?;
        match reply.status {
            CHECK_CONDITION if sense(&reply.sense).0 == 6 && attentions < 20 => attentions += 1,
            BUSY | TASK_SET_FULL if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10))
            }
            _ => return Ok(reply),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let conn = self.lock().conn.take().filter(|c| !c.is_dead());
        if let Some(conn) = conn {
            give_back(self, &conn);
            conn.logout();
        }
    }
}
