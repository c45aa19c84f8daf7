//! `dump-guest-memory`: an ELF core file of the machine as QEMU writes it, which crash(8) and gdb read.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use ftvm_accel::tcg::registers::View;
use ftvm_qmp::{Call, QmpError};
use serde_json::{json, Value};

use super::{done, Control, Reply};
use crate::runtime::control::{RunState, Shared};
use crate::runtime::live::Runtime;
use crate::runtime::{Event, Events};

/// Bytes of guest memory taken at a time.
const PIECE: u64 = 4 << 20;

/// How far a dump is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// none, active, completed or failed
    pub status: Option<&'static str>,
    pub completed: u64,
    pub total: u64,
}

impl Progress {
    fn json(&self) -> Value {
        json!({"status": self.status.unwrap_or("none"), "completed": self.completed, "total": self.total})
    }
}

pub fn capability(_: &Control, _: &mut Call) -> Reply {
    Ok(json!({"formats": ["elf"]}))
}

pub fn query(c: &Control, _: &mut Call) -> Reply {
    Ok(c.shared.dump().json())
}

pub fn dump(c: &Control, call: &mut Call) -> Reply {
    let fail = |text: &str| Err(QmpError::generic(text));
    if call.bool("paging") == Some(true) {
        return fail("paging is not supported: the dump has physical addresses");
    }
    if !matches!(call.text("format"), "" | "elf") {
        return fail("Dump format is not supported: only 'elf' is");
    }
    let (begin, length) = (call.int("begin"), call.int("length"));
    let range = match (begin, length) {
        (None, None) => None,
        (Some(begin), Some(length)) if begin >= 0 && length > 0 => Some((begin as u64, length as u64)),
        (Some(_), None) => return fail("Parameter 'length' is missing"),
        (None, Some(_)) => return fail("Parameter 'begin' is missing"),
        _ => return fail("begin and length must name a range of guest memory"),
    };
    let protocol = call.text("protocol").to_owned();
    let file = match protocol.split_once(':') {
        Some(("fd", name)) => File::from(call.fds.named(name)?),
        Some(("file", path)) => {
            File::create(path).map_err(|e| QmpError::generic(format!("Could not open '{path}': {e}")))?
        }
        _ => return fail("parameter 'protocol' must start with 'fd:' or 'file:'"),
    };
    if c.shared.dump().status == Some("active") {
        return fail("There is a dump in process, please wait.");
    }
    let detach = call.bool("detach") == Some(true);
    let (views, ranges, ran) = c.control(move |rt| {
        let ran = !rt.is_stopped();
        rt.stop(RunState::Paused);
        let mut ranges = rt.machine.memory().ram_ranges();
        if let Some((begin, length)) = range {
            ranges = ranges.into_iter().filter_map(|r| cut(r, begin, length)).collect();
        }
        Ok((rt.machine.views(), ranges, ran))
    })?;
    let total = ranges.iter().map(|(_, len)| len).sum();
    c.shared.set_dump(Progress { status: Some("active"), completed: 0, total });
    let (shared, events) = (Arc::clone(&c.shared), c.events.clone());
    let work = move || {
        let written = write(file, &views, &ranges, &shared, &events);
        let mut progress = shared.dump();
        progress.status = Some(if written.is_ok() { "completed" } else { "failed" });
        shared.set_dump(progress);
        let mut data = json!({"result": progress.json()});
        if let Err(e) = &written {
            data["error"] = json!(e);
        }
        shared.events.emit("DUMP_COMPLETED", data);
        if ran {
            let _ = events.send(Event::Call(Box::new(|rt| rt.cont())));
        }
        written
    };
    if detach {
        std::thread::Builder::new()
            .name("dump".into())
            .spawn(work)
            .map_err(|e| QmpError::generic(e.to_string()))?;
        return done();
    }
    work().map_err(QmpError::generic)?;
    done()
}

/// The part of a range of memory that is wanted.
fn cut((start, len): (u64, u64), begin: u64, length: u64) -> Option<(u64, u64)> {
    let (from, to) = (start.max(begin), (start + len).min(begin.saturating_add(length)));
    (from < to).then(|| (from, to - from))
}

fn write(
    mut file: File,
    views: &[View],
    ranges: &[(u64, u64)],
    shared: &Shared,
    events: &Events,
) -> Result<(), String> {
    let text = |e: std::io::Error| format!("dump: failed to save memory: {e}");
    file.write_all(&headers(views, ranges)).map_err(text)?;
    for (start, len) in ranges {
        let mut at = 0;
        while at < *len {
            let (from, size) = (start + at, PIECE.min(len - at));
            let (sender, receiver) = std::sync::mpsc::channel();
            let read = move |rt: &mut Runtime| {
                let mut bytes = vec![0; size as usize];
                let _ = sender.send(rt.machine.memory().read(from, &mut bytes).map(|()| bytes));
            };
            events.send(Event::Call(Box::new(read))).map_err(|_| "the program ends")?;
            let bytes = receiver.recv().map_err(|_| "the program ends")?.map_err(|e| e.to_string())?;
            file.write_all(&bytes).map_err(text)?;
            at += size;
            let mut progress = shared.dump();
            progress.completed += size;
            shared.set_dump(progress);
        }
    }
    file.flush().map_err(text)
}

/// Bytes in little-endian order, put together.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn word(&mut self, value: u32) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    fn half(&mut self, value: u16) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    fn long(&mut self, value: u64) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    fn pad(&mut self, to: usize) -> &mut Self {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
        self
    }
}

const EHDR: u64 = 64;
const PHDR: u64 = 56;

/// ELF header, program headers and notes (System V gABI, chapters 4 and 5).
fn headers(views: &[View], ranges: &[(u64, u64)]) -> Vec<u8> {
    let mut notes = Bytes::default();
    for (i, view) in views.iter().enumerate() {
        note(&mut notes, "CORE", 1, &prstatus(i as u32 + 1, view));
    }
    for view in views {
        note(&mut notes, "QEMU", 0, &cpu_state(view));
    }
    let count = ranges.len() as u64 + 1;
    let notes_at = EHDR + PHDR * count;
    let memory_at = notes_at + notes.0.len() as u64;
    let mut out = Bytes(b"\x7FELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec());
    // A core file for x86-64, version 1; no entry, program headers behind this, no sections.
    out.half(4).half(62).word(1).long(0).long(EHDR).long(0).word(0);
    out.half(EHDR as u16).half(PHDR as u16).half(count as u16).half(0).half(0).half(0);
    let mut header = |kind: u32, offset: u64, address: u64, len: u64| {
        out.word(kind).word(0).long(offset).long(0).long(address).long(len).long(len).long(0);
    };
    header(4, notes_at, 0, notes.0.len() as u64);
    let mut offset = memory_at;
    for (start, len) in ranges {
        header(1, offset, *start, *len);
        offset += len;
    }
    out.0.extend(notes.0);
    out.0
}

fn note(out: &mut Bytes, name: &str, kind: u32, data: &[u8]) {
    out.word(name.len() as u32 + 1).word(data.len() as u32).word(kind);
    out.0.extend(name.as_bytes());
    out.0.push(0);
    out.pad(4);
    out.0.extend(data);
    out.pad(4);
}

/// Linux's `struct elf_prstatus`.
fn prstatus(pid: u32, view: &View) -> Vec<u8> {
    let (g, r) = (&view.gpr, &view.registers);
    let [es, cs, ss, ds, fs, gs] = r.segs;
    let mut out = Bytes(vec![0; 32]);
    out.word(pid);
    out.0.resize(112, 0);
    // R15 to R8 without those that system calls clobber, and so on: the order of struct user_regs_struct.
    for value in [
        g[15],
        g[14],
        g[13],
        g[12],
        g[5],
        g[3],
        g[11],
        g[10],
        g[9],
        g[8],
        g[0],
        g[1],
        g[2],
        g[6],
        g[7],
        g[0],
        r.rip,
        cs.selector.into(),
        r.rflags,
        g[4],
        ss.selector.into(),
        fs.base,
        gs.base,
        ds.selector.into(),
        es.selector.into(),
        fs.selector.into(),
        gs.selector.into(),
    ] {
        out.long(value);
    }
    out.0.resize(336, 0);
    out.0
}

/// QEMU's `QEMUCPUState`, version 1.
fn cpu_state(view: &View) -> Vec<u8> {
    const SIZE: u32 = 440;
    let (g, r) = (&view.gpr, &view.registers);
    let mut out = Bytes::default();
    out.word(1).word(SIZE);
    for n in [0, 3, 1, 2, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15] {
        out.long(g[n]);
    }
    out.long(r.rip).long(r.rflags);
    let [es, cs, ss, ds, fs, gs] = r.segs;
    for s in [cs, ds, es, fs, gs, ss, r.ldtr, r.tr] {
        out.word(s.selector.into()).word(s.limit).word(u32::from(s.attr) << 8).word(0).long(s.base);
    }
    for (base, limit) in [r.gdt, r.idt] {
        out.word(0).word(limit.into()).word(0).word(0).long(base);
    }
    out.long(view.cr0).long(0).long(r.cr2).long(r.cr3).long(view.cr4).long(view.kernel_gs_base);
    debug_assert_eq!(out.0.len(), SIZE as usize);
    out.0
}
