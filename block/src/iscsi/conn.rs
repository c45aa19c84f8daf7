//! One connection to a target: commands under way and their answers.

use std::collections::HashMap;
use std::io::{self, IoSlice, Read};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

use super::login::Agreed;
use super::pdu::{self, inn, out, Header, NO_TAG};
use crate::tcp::{held, write_all, Input};

/// Silence with a command under way after which the target is asked whether it is there.
const PING: Duration = Duration::from_secs(4);
/// How often an idle connection is looked at.
const IDLE: Duration = Duration::from_millis(500);
/// Silence after which the connection is given up.
const SILENCE: Duration = Duration::from_secs(9);

/// A SCSI command.
pub struct Command<'a> {
    pub cdb: [u8; 16],
    /// What is written with it.
    pub data_out: &'a [u8],
    /// How much is read at the most.
    pub read: usize,
    /// Wait until every command before it, of any host, has ended.
    pub ordered: bool,
}

/// How a command ended.
#[derive(Debug)]
pub struct Reply {
    /// SAM-5 status.
    pub status: u8,
    pub sense: Vec<u8>,
    pub data: Vec<u8>,
}

#[derive(Clone, Copy)]
struct R2t {
    tag: u32,
    offset: usize,
    len: usize,
}

#[derive(Default)]
struct TaskState {
    data: Vec<u8>,
    received: usize,
    r2t: Vec<R2t>,
    done: Option<Result<(u8, Vec<u8>), ()>>,
}

impl TaskState {
    fn has_news(&self) -> bool {
        self.done.is_some() || !self.r2t.is_empty()
    }
}

struct Task {
    state: Mutex<TaskState>,
    waiter: Thread,
}

struct Writer {
    cmd_sn: u32,
    next_tag: u32,
}

/// A connection in the full feature phase.
pub struct Conn {
    stream: TcpStream,
    input: Mutex<Option<Input>>,
    writer: Mutex<Writer>,
    tasks: Mutex<HashMap<u32, Arc<Task>>>,
    exp_stat_sn: AtomicU32,
    max_cmd_sn: Mutex<u32>,
    window: Condvar,
    heard: Mutex<Instant>,
    dead: AtomicBool,
    agreed: Agreed,
    lun: u16,
}

fn broken() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "iSCSI: the connection broke")
}

/// Serial number arithmetic (RFC 1982).
fn after(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) > 0
}

impl Conn {
    /// Take over a stream that has logged in.
    pub fn start(stream: TcpStream, agreed: Agreed, lun: u16) -> io::Result<Arc<Conn>> {
        let input = Input::new(stream.try_clone()?, SILENCE)?;
        let conn = Arc::new(Conn {
            stream,
            input: Mutex::new(Some(input)),
            writer: Mutex::new(Writer { cmd_sn: agreed.cmd_sn, next_tag: 1 }),
            tasks: Mutex::default(),
            exp_stat_sn: AtomicU32::new(agreed.exp_stat_sn),
            max_cmd_sn: Mutex::new(agreed.max_cmd_sn),
            window: Condvar::new(),
            heard: Mutex::new(Instant::now()),
            dead: AtomicBool::new(false),
            agreed,
            lun,
        });
        // While no command is under way, somebody must answer the target's questions.
        let c = Arc::downgrade(&conn);
        std::thread::Builder::new().name("iscsi".into()).spawn(move || {
            while let Some(conn) = c.upgrade().filter(|c| !c.is_dead()) {
                if held(&conn.tasks).is_empty() {
                    conn.read_while(Duration::ZERO, || true);
                    conn.pass_on();
                }
                drop(conn);
                std::thread::sleep(IDLE);
            }
        })?;
        Ok(conn)
    }

    /// Read for all, if nobody else does, as long as `go_on` says and something comes within `limit`; false: somebody
    /// else reads.
    fn read_while(&self, limit: Duration, go_on: impl Fn() -> bool) -> bool {
        let Ok(mut input) = self.input.try_lock() else { return false };
        let Some(input) = input.as_mut() else { return false };
        while go_on() {
            let result = match input.wait(limit) {
                Ok(true) => self.read_one(input),
                Ok(false) => return true,
                Err(e) => Err(e),
            };
            let error = match result {
                Ok(true) => continue,
                Ok(false) => pdu::bad("the target closes the session"),
                Err(e) => e,
            };
            if !self.is_dead() {
                log::warn!("{error}");
            }
            self.close();
            return true;
        }
        true
    }

    /// Let another waiting command read on.
    fn pass_on(&self) {
        let next = held(&self.tasks).values().find(|t| !held(&t.state).has_news()).cloned();
        if let Some(task) = next {
            task.waiter.unpark();
        }
    }

    /// Whether nothing can be asked here any more.
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    /// Give the connection up; what is under way fails.
    pub fn close(&self) {
        self.dead.store(true, Ordering::SeqCst);
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        for (_, task) in held(&self.tasks).drain() {
            held(&task.state).done.get_or_insert(Err(()));
            task.waiter.unpark();
        }
        self.window.notify_all();
    }

    /// Send a frame made of a header and data.
    fn send(&self, mut h: Header, data: &[u8], _order: &MutexGuard<'_, Writer>) -> io::Result<()> {
        h.set_data_len(data.len());
        h.put32(28, self.exp_stat_sn.load(Ordering::SeqCst));
        let pad = [0u8; 3];
        let mut parts =
            [IoSlice::new(&h.0), IoSlice::new(data), IoSlice::new(&pad[..pdu::padding(data.len())])];
        write_all(&self.stream, &mut parts, broken)
    }

    /// Do a command; an error says that the connection is of no use any more or that time ran out.
    pub fn execute(&self, command: &Command<'_>, deadline: Instant) -> io::Result<Reply> {
        let task = Arc::new(Task {
            state: Mutex::new(TaskState { data: crate::buffers::take(command.read), ..TaskState::default() }),
            waiter: std::thread::current(),
        });
        let tag = match self.submit(command, &task, deadline) {
            Ok(tag) => tag,
            Err(e) => {
                if e.kind() != io::ErrorKind::TimedOut {
                    self.close();
                }
                return Err(e);
            }
        };
        let result = self.wait(command, &task, tag, deadline);
        held(&self.tasks).remove(&tag);
        self.pass_on();
        result
    }

    fn submit(&self, command: &Command<'_>, task: &Arc<Task>, deadline: Instant) -> io::Result<u32> {
        let mut writer = held(&self.writer);
        // The target says how many commands it takes.
        let mut max = held(&self.max_cmd_sn);
        while after(writer.cmd_sn, *max) {
            drop(writer);
            if self.is_dead() {
                return Err(broken());
            }
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let nap = Duration::from_millis(100);
            drop(self.window.wait_timeout(max, nap).unwrap_or_else(PoisonError::into_inner));
            writer = held(&self.writer);
            max = held(&self.max_cmd_sn);
        }
        drop(max);
        if self.is_dead() {
            return Err(broken());
        }
        let tag = writer.next_tag;
        writer.next_tag = if tag >= NO_TAG - 1 { 1 } else { tag + 1 };
        held(&self.tasks).insert(tag, Arc::clone(task));
        let attribute = if command.ordered { 2 } else { 1 };
        let direction = match (command.read, command.data_out.len()) {
            (0, 0) => 0,
            (0, _) => 0x20,
            _ => 0x40,
        };
        let mut h = Header::new(out::COMMAND, 0x80 | direction | attribute, tag);
        h.set_lun(self.lun);
        h.put32(20, command.read.max(command.data_out.len()) as u32);
        h.put32(24, writer.cmd_sn);
        h.0[32..48].copy_from_slice(&command.cdb);
        writer.cmd_sn = writer.cmd_sn.wrapping_add(1);
        let now = command.data_out.len().min(self.agreed.immediate);
        self.send(h, &command.data_out[..now], &writer)?;
        Ok(tag)
    }

    fn wait(&self, command: &Command<'_>, task: &Task, tag: u32, deadline: Instant) -> io::Result<Reply> {
        let mut pinged = false;
        loop {
            let wanted = {
                let mut state = held(&task.state);
                if let Some(done) = state.done.take() {
                    let (status, sense) = done.map_err(|()| broken())?;
                    let mut data = std::mem::take(&mut state.data);
                    data.truncate(state.received);
                    return Ok(Reply { status, sense, data });
                }
                std::mem::take(&mut state.r2t)
            };
            for r2t in wanted {
                if let Err(e) = self.answer(command, r2t, tag) {
                    self.close();
                    return Err(e);
                }
            }
            let now = Instant::now();
            if now >= deadline {
                // It may still be done: only a new session makes sure that it is not.
                self.close();
                return Err(io::Error::new(io::ErrorKind::TimedOut, "iSCSI: the target does not answer"));
            }
            let quiet = now.saturating_duration_since(*held(&self.heard));
            if quiet >= SILENCE {
                self.close();
                return Err(io::Error::new(io::ErrorKind::TimedOut, "iSCSI: the target is silent"));
            }
            if quiet >= PING && !pinged {
                pinged = true;
                self.ping(NO_TAG, None);
            }
            let nap = (deadline - now).min(Duration::from_secs(1));
            if !self.read_while(nap, || !held(&task.state).has_news()) {
                std::thread::park_timeout(nap);
            }
        }
    }

    /// Send the data that the target asks for.
    fn answer(&self, command: &Command<'_>, r2t: R2t, tag: u32) -> io::Result<()> {
        let data = r2t.offset.checked_add(r2t.len).and_then(|end| command.data_out.get(r2t.offset..end));
        let data = data.ok_or_else(|| pdu::bad("the target asks for data that was not offered"))?;
        let mut offset = r2t.offset;
        let pieces = data.chunks(self.agreed.max_send);
        let last = pieces.len().saturating_sub(1);
        for (i, piece) in pieces.enumerate() {
            let mut h = Header::new(out::DATA, if i == last { 0x80 } else { 0 }, tag);
            h.set_lun(self.lun);
            h.put32(20, r2t.tag);
            h.put32(36, i as u32);
            h.put32(40, offset as u32);
            offset += piece.len();
            self.send(h, piece, &held(&self.writer))?;
        }
        Ok(())
    }

    /// A NOP-Out: an answer to the target's NOP-In, or a question of our own.
    fn ping(&self, target_tag: u32, echo: Option<&[u8]>) {
        let mut writer = held(&self.writer);
        let tag = if target_tag == NO_TAG {
            let tag = writer.next_tag;
            writer.next_tag = if tag >= NO_TAG - 1 { 1 } else { tag + 1 };
            tag
        } else {
            NO_TAG
        };
        let mut h = Header::new(out::NOP | 0x40, 0x80, tag);
        h.set_lun(self.lun);
        h.put32(20, target_tag);
        h.put32(24, writer.cmd_sn);
        let _ = self.send(h, echo.unwrap_or(&[]), &writer);
    }

    /// Leave in order.
    pub fn logout(&self) {
        let writer = held(&self.writer);
        let mut h = Header::new(out::LOGOUT | 0x40, 0x80, NO_TAG - 1);
        h.put32(24, writer.cmd_sn);
        let _ = self.send(h, &[], &writer);
        drop(writer);
        self.close();
    }

    fn task(&self, tag: u32) -> Option<Arc<Task>> {
        held(&self.tasks).get(&tag).cloned()
    }

    /// Handle one unit of the target; false: it ends the session.
    fn read_one(&self, input: &mut impl Read) -> io::Result<bool> {
        let h = pdu::read_header(input)?;
        *held(&self.heard) = Instant::now();
        let carries_status = match h.opcode() {
            inn::DATA => h.flags() & 1 != 0,
            inn::R2T => false,
            inn::NOP => h.tag() != NO_TAG,
            _ => true,
        };
        if carries_status {
            self.exp_stat_sn.store(h.get32(24).wrapping_add(1), Ordering::SeqCst);
        }
        {
            let mut max = held(&self.max_cmd_sn);
            if after(h.get32(32), *max) {
                *max = h.get32(32);
                self.window.notify_all();
            }
        }
        match h.opcode() {
            inn::DATA => {
                let task = self.task(h.tag()).ok_or_else(|| pdu::bad("data for no command"))?;
                let mut state = held(&task.state);
                let (offset, len) = (h.get32(40) as usize, h.data_len());
                let end = offset.checked_add(len).filter(|e| *e <= state.data.len());
                let end = end.ok_or_else(|| pdu::bad("more data than was asked for"))?;
                input.read_exact(&mut state.data[offset..end])?;
                pdu::skip_padding(input, &h)?;
                state.received = state.received.max(end);
                if h.flags() & 1 != 0 {
                    state.done.get_or_insert(Ok((h.0[3], Vec::new())));
                    task.waiter.unpark();
                }
            }
            inn::RESPONSE => {
                let data = pdu::read_data(input, &h)?;
                if let Some(task) = self.task(h.tag()) {
                    // Anything but "completed at target" is no answer of the disk.
                    let done = if h.0[2] == 0 {
                        Ok((h.0[3], data.get(2..).unwrap_or(&[]).to_vec()))
                    } else {
                        Err(())
                    };
                    held(&task.state).done.get_or_insert(done);
                    task.waiter.unpark();
                }
            }
            inn::R2T => {
                pdu::read_data(input, &h)?;
                let task = self.task(h.tag()).ok_or_else(|| pdu::bad("a request for data of no command"))?;
                let r2t = R2t { tag: h.get32(20), offset: h.get32(40) as usize, len: h.get32(44) as usize };
                held(&task.state).r2t.push(r2t);
                task.waiter.unpark();
            }
            inn::NOP => {
                let data = pdu::read_data(input, &h)?;
                if h.get32(20) != NO_TAG {
                    self.ping(h.get32(20), Some(&data));
                }
            }
            inn::ASYNC => {
                pdu::read_data(input, &h)?;
                // 0 is SCSI sense, 255 a vendor's; all others end the session or the connection.
                return Ok(matches!(h.0[36], 0 | 255));
            }
            inn::LOGOUT => return Ok(false),
            inn::REJECT => {
                return Err(pdu::bad(&format!("the target rejects a unit (reason {:02x})", h.0[2])))
            }
            other => return Err(pdu::bad(&format!("the target sends an unknown unit {other:02x}"))),
        }
        Ok(true)
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

/// For tests of foreign bytes: read `bytes` as what a target sends while one read of 4096 bytes is under way.
pub fn fuzz(bytes: &[u8]) -> io::Result<()> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let stream = TcpStream::connect(listener.local_addr()?)?;
    let agreed = Agreed { max_send: 8192, immediate: 8192, cmd_sn: 1, exp_stat_sn: 1, max_cmd_sn: 64 };
    let conn = Conn {
        stream,
        input: Mutex::new(None),
        writer: Mutex::new(Writer { cmd_sn: 1, next_tag: 2 }),
        tasks: Mutex::default(),
        exp_stat_sn: AtomicU32::new(1),
        max_cmd_sn: Mutex::new(64),
        window: Condvar::new(),
        heard: Mutex::new(Instant::now()),
        dead: AtomicBool::new(false),
        agreed,
        lun: 1,
    };
    let state = Mutex::new(TaskState { data: vec![0; 4096], ..TaskState::default() });
    held(&conn.tasks).insert(1, Arc::new(Task { state, waiter: std::thread::current() }));
    let mut input = bytes;
    while conn.read_one(&mut input)? {}
    Ok(())
}
