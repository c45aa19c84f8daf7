//! Persistent reservations (SPC-4, 5.13): arbitration and fencing in one.
//!
//! A host that writes a LUN as one side of a pair holds a reservation of type "write exclusive": the target
//! refuses everybody else's writes, whenever they come from a socket, a queue or a paused process. The key under
//! which it is held is the state of the lock: taking the lock is changing the holder's key, which the target does
//! atomically. The primary changes its own (REGISTER), the backup puts its own in its place (PREEMPT); each names the
//! key that it expects, so exactly one of both can succeed. What the holder's key is afterwards (READ RESERVATION)
//! decides, so an answer that was lost on the way does no harm.
//!
//! Registrants other than the holder may not write under this type, so registering again after a reconnect is
//! harmless: it gives nothing but the right to try.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::conn::{Command, Conn, Reply};
use super::device::Device;
use super::session::{failure, retry_attention, sense, Session, CHECK_CONDITION, GOOD, RESERVATION_CONFLICT};
use crate::{BlockError, Reserve};

/// How long a question about the reservation may take.
pub(super) const LIMIT: Duration = Duration::from_secs(3);
/// Write exclusive.
const WRITE_EXCLUSIVE: u8 = 1;

const REGISTER: u8 = 0;
const RESERVE: u8 = 1;
const RELEASE: u8 = 2;
const CLEAR: u8 = 3;
const PREEMPT: u8 = 4;
const PREEMPT_AND_ABORT: u8 = 5;
const REGISTER_AND_IGNORE: u8 = 6;

/// What sends commands: a session (on whatever connection), one connection, or a device of this host.
pub(super) trait Sender {
    fn send(&self, command: &Command<'_>) -> io::Result<Reply>;
}

impl Sender for Session {
    fn send(&self, command: &Command<'_>) -> io::Result<Reply> {
        self.command(command, LIMIT)
    }
}

impl Sender for Conn {
    fn send(&self, command: &Command<'_>) -> io::Result<Reply> {
        retry_attention(self, command, Instant::now() + LIMIT)
    }
}

/// A LUN, and what this process has of its reservation.
pub(super) trait Unit: Send + Sync {
    fn sender(&self) -> &dyn Sender;
    /// The key under which it is held.
    fn holding(&self) -> &Mutex<Option<u64>>;
    /// Whether it was taken from another host.
    fn took(&self) -> &AtomicBool;
}

impl Unit for Session {
    fn sender(&self) -> &dyn Sender {
        self
    }
    fn holding(&self) -> &Mutex<Option<u64>> {
        &self.holding
    }
    fn took(&self) -> &AtomicBool {
        &self.took
    }
}

/// The key of the reservation's holder.
pub(super) fn holder(sender: &dyn Sender) -> io::Result<Option<u64>> {
    let mut cdb = [0; 16];
    cdb[0] = 0x5E;
    cdb[1] = 1;
    cdb[8] = 64;
    let reply = sender.send(&Command { cdb, data_out: &[], read: 64, ordered: false })?;
    if reply.status != GOOD {
        return Err(failure(&reply));
    }
    let d = &reply.data;
    let long = |at: usize| d.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes);
    match d.get(4..8).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]])) {
        Some(0) => Ok(None),
        Some(_) => long(8).map(Some).ok_or_else(|| super::pdu::bad("the reservation is not readable")),
        None => Err(super::pdu::bad("the reservation is not readable")),
    }
}

/// PERSISTENT RESERVE OUT; whether the target did it (false: a conflict).
fn out(sender: &dyn Sender, action: u8, key: u64, new: u64) -> io::Result<bool> {
    let mut cdb = [0; 16];
    cdb[0] = 0x5F;
    cdb[1] = action;
    cdb[2] = WRITE_EXCLUSIVE;
    cdb[8] = 24;
    let mut data = [0u8; 24];
    data[..8].copy_from_slice(&key.to_be_bytes());
    data[8..16].copy_from_slice(&new.to_be_bytes());
    let reply = sender.send(&Command { cdb, data_out: &data, read: 0, ordered: false })?;
    match reply.status {
        GOOD => Ok(true),
        RESERVATION_CONFLICT => Ok(false),
        _ => Err(failure(&reply)),
    }
}

/// Put this registrant's key in the holder's place, and let nothing of the old holder be under way afterwards.
fn preempt(sender: &dyn Sender, mine: u64, theirs: u64) -> io::Result<bool> {
    match out(sender, PREEMPT_AND_ABORT, mine, theirs) {
        Ok(done) => return Ok(done),
        // Some targets (tgt) have no ABORT.
        Err(e) if e.kind() == io::ErrorKind::Other => {}
        Err(e) => return Err(e),
    }
    let done = out(sender, PREEMPT, mine, theirs)?;
    if done {
        barrier(sender)?;
    }
    Ok(done)
}

/// An ordered command: it ends after every command that the LUN took before, of any host.
fn barrier(sender: &dyn Sender) -> io::Result<()> {
    let mut cdb = [0; 16];
    cdb[0] = 0x35;
    let reply = sender.send(&Command { cdb, data_out: &[], read: 0, ordered: true })?;
    match reply.status {
        GOOD => Ok(()),
        // No cache to synchronize: the order was kept all the same.
        CHECK_CONDITION if sense(&reply.sense).0 == 5 => Ok(()),
        _ => Err(failure(&reply)),
    }
}

/// Phase of a key: its owner took the LUN from another host, and has ended in order. The reservation stays, because
/// it is what refuses the writes that the other host may still have on their way; ftvm may take it.
pub const ENDED: u8 = 5;

/// A key: `ft`, the phase, a generation (it counts reconnects), a tag.
pub fn key(phase: u8, tag: u32) -> u64 {
    0x6674 << 48 | u64::from(phase) << 40 | u64::from(tag)
}

/// The phase of a key; `None` if it is not ftvm's.
pub fn phase(key: u64) -> Option<u8> {
    (key >> 48 == 0x6674).then_some((key >> 40) as u8)
}

/// The same key, one generation on: for a new connection's registration.
fn next_generation(key: u64) -> u64 {
    let generation = ((key >> 32) as u8).wrapping_add(1);
    (key & !(0xFF << 32)) | u64::from(generation) << 32
}

/// After a reconnect, before anything else: take back a reservation that this session holds, if it still does.
/// A target may tie registrations to connections (tgt does), or have lost them all with a restart.
pub(super) fn recover(session: &Session, conn: &Conn) -> io::Result<()> {
    let mut holding = session.holding.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(key) = *holding else { return Ok(()) };
    for _ in 0..4 {
        match holder(conn)? {
            None => {
                out(conn, REGISTER_AND_IGNORE, 0, key)?;
                if out(conn, RESERVE, key, 0)? {
                    log::warn!("iSCSI: the target had lost the reservation; it is made again");
                    return Ok(());
                }
            }
            Some(found) if found == key || found == next_generation(key) => {
                let mine = next_generation(found);
                out(conn, REGISTER_AND_IGNORE, 0, mine)?;
                // The old connection's registration holds it, unless the target took this one for the same.
                let done = holder(conn)? == Some(mine) || preempt(conn, mine, found)?;
                *holding = Some(mine);
                if done {
                    return Ok(());
                }
            }
            Some(_) => {
                session.lost.store(true, Ordering::SeqCst);
                *holding = None;
                log::error!("iSCSI: another host has taken the LUN");
                return Ok(());
            }
        }
    }
    Err(super::pdu::bad("the reservation does not settle"))
}

/// In order: let the LUN go, by `sender`.
pub(super) fn give_back(unit: &dyn Unit, sender: &dyn Sender) {
    let Some(mine) = unit.holding().lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
    if unit.took().load(Ordering::SeqCst) {
        let _ = out(sender, REGISTER, mine, key_of_end(mine));
    } else {
        let _ = out(sender, RELEASE, mine, 0);
        let _ = out(sender, REGISTER, mine, 0);
    }
}

fn key_of_end(mine: u64) -> u64 {
    key(ENDED, mine as u32)
}

/// The lock that a LUN's reservation is.
#[derive(Clone)]
pub struct LunLock(Arc<dyn Unit>);

impl LunLock {
    /// The lock of the LUN that `url` names, or of the device of this host at that path.
    pub fn open(url: &str) -> io::Result<LunLock> {
        if !url.starts_with("iscsi://") {
            return Ok(LunLock(Device::open(Path::new(url))?));
        }
        let target =
            super::url::Target::parse(url).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        Ok(LunLock(Session::open(&target)?))
    }

    pub(super) fn of(session: &Arc<Session>) -> LunLock {
        LunLock(Arc::clone(session) as _)
    }

    /// The key of the reservation's holder.
    pub fn holder(&self) -> io::Result<Option<u64>> {
        holder(self.0.sender())
    }

    /// The key under which this process holds the LUN.
    pub fn held(&self) -> Option<u64> {
        *self.0.holding().lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_held(&self, key: u64) {
        *self.0.holding().lock().unwrap_or_else(PoisonError::into_inner) = Some(key);
    }

    /// Take a LUN that nobody holds (or whose owner has ended); false: somebody does.
    pub fn take_free(&self, key: u64) -> io::Result<bool> {
        let session = self.0.sender();
        if self.held().is_some() {
            return Ok(true);
        }
        if let Some(ended) = holder(session)?.filter(|k| phase(*k) == Some(ENDED)) {
            return self.take_from(ended, key);
        }
        out(session, REGISTER_AND_IGNORE, 0, key)?;
        out(session, RESERVE, key, 0)?;
        let mine = holder(session)? == Some(key);
        if mine {
            self.set_held(key);
        }
        Ok(mine)
    }

    /// The holder changes its own key; false: it is not the holder any more.
    pub fn change(&self, to: u64) -> io::Result<bool> {
        let Some(from) = self.held() else { return Ok(false) };
        let answer = out(self.0.sender(), REGISTER, from, to);
        // Whatever the answer was (it may be lost, or be that of a repetition): what counts is what is there.
        match holder(self.0.sender())? {
            Some(found) if found == to => {
                self.set_held(to);
                Ok(true)
            }
            Some(found) if Some(found) == self.held() => {
                answer?;
                Err(super::pdu::bad("the holder's key did not change"))
            }
            None => Err(super::pdu::bad("the target has lost the reservation")),
            Some(_) => Ok(false),
        }
    }

    /// Take the LUN from the holder `theirs`; false: the holder is not (any more) `theirs`.
    pub fn take_from(&self, theirs: u64, mine: u64) -> io::Result<bool> {
        let session = self.0.sender();
        if holder(session)? == Some(mine) {
            self.set_held(mine);
            return Ok(true);
        }
        out(session, REGISTER_AND_IGNORE, 0, mine)?;
        let answer = preempt(session, mine, theirs);
        if holder(session)? == Some(mine) {
            // Also after a lost answer nothing of the old holder may be under way.
            barrier(session)?;
            self.0.took().store(true, Ordering::SeqCst);
            self.set_held(mine);
            return Ok(true);
        }
        answer.map(|_| false)
    }

    /// Let the LUN go, whoever holds it: for a person who knows that nobody writes it any more.
    pub fn clear(&self) -> io::Result<()> {
        let session = self.0.sender();
        let mine = key(ENDED, 0);
        out(session, REGISTER_AND_IGNORE, 0, mine)?;
        out(session, CLEAR, mine, 0)?;
        match holder(session)? {
            None => Ok(()),
            Some(_) => Err(super::pdu::bad("the reservation is still there")),
        }
    }

    /// Take the LUN from whoever holds it: for a side that has won the pair's lock elsewhere.
    pub fn seize(&self, mine: u64) -> io::Result<()> {
        for _ in 0..8 {
            if self.held().is_some() {
                return Ok(());
            }
            let done = match self.holder()? {
                None => self.take_free(mine)?,
                Some(theirs) => self.take_from(theirs, mine)?,
            };
            if done {
                return Ok(());
            }
        }
        Err(super::pdu::bad("the reservation does not settle"))
    }

    /// Reserve the LUN that is opened for writing as `path`.
    pub(crate) fn reserve(&self, path: &Path, how: Reserve) -> Result<(), BlockError> {
        let fail = |source: io::Error| match source.kind() {
            io::ErrorKind::Other => BlockError::Format {
                path: path.to_owned(),
                reason: format!("the LUN cannot be reserved, which a pair needs ({source})"),
            },
            _ => BlockError::Open { path: path.to_owned(), source },
        };
        let is_held = |holder: u64| {
            BlockError::Format {
            path: path.to_owned(),
            reason: format!(
                "another host holds the reservation of the LUN (key {holder:#018x}); if it is gone for good: ftvm-lock clear"
            ),
        }
        };
        match how {
            Reserve::No => match self.holder() {
                Ok(Some(holder)) if phase(holder) == Some(ENDED) => {
                    self.take_from(holder, key(ENDED, std::process::id())).map_err(fail)?;
                }
                Ok(Some(holder)) => return Err(is_held(holder)),
                // A target without reservations is used without.
                Ok(None) | Err(_) => {}
            },
            Reserve::Free(key) => {
                if !self.take_free(key).map_err(fail)? {
                    return Err(is_held(self.holder().map_err(fail)?.unwrap_or(0)));
                }
            }
            Reserve::Seize(key) => self.seize(key).map_err(fail)?,
        }
        Ok(())
    }
}
