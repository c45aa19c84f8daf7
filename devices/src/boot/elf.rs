//! As much of ELF (System V ABI, generic and x86) as loading a kernel takes.

use super::{long, word, Flat};

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// XEN_ELFNOTE_PHYS32_ENTRY (Xen's public/elfnote.h).
const PHYS32_ENTRY: u32 = 18;
/// More program headers than any kernel has.
const MAX_HEADERS: usize = 64;

struct Segment {
    kind: u32,
    offset: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
    align: u64,
}

fn quad(data: &[u8], at: usize) -> u64 {
    u64::from(long(data, at)) | u64::from(long(data, at.saturating_add(4))) << 32
}

fn segments(data: &[u8]) -> Option<Vec<Segment>> {
    if data.len() < 64 || data[..4] != *b"\x7FELF" || data[5] != 1 {
        return None;
    }
    let wide = data[4] == 2;
    let (table, size, count) = if wide {
        (quad(data, 32), usize::from(word(data, 54)), usize::from(word(data, 56)))
    } else {
        (u64::from(long(data, 28)), usize::from(word(data, 42)), usize::from(word(data, 44)))
    };
    let table = usize::try_from(table).ok()?;
    let mut out = Vec::new();
    for i in 0..count.min(MAX_HEADERS) {
        let at = table.checked_add(i * size)?;
        if at.checked_add(56)? > data.len() + if wide { 0 } else { 24 } {
            return None;
        }
        out.push(if wide {
            Segment {
                kind: long(data, at),
                offset: quad(data, at + 8),
                paddr: quad(data, at + 24),
                filesz: quad(data, at + 32),
                memsz: quad(data, at + 40),
                align: quad(data, at + 48),
            }
        } else {
            let f = |n: usize| u64::from(long(data, at + 4 * n));
            Segment {
                kind: long(data, at),
                offset: f(1),
                paddr: f(3),
                filesz: f(4),
                memsz: f(5),
                align: f(7),
            }
        });
    }
    Some(out)
}

fn bytes<'a>(data: &'a [u8], s: &Segment) -> Option<&'a [u8]> {
    let start = usize::try_from(s.offset).ok()?;
    data.get(start..start.checked_add(usize::try_from(s.filesz).ok()?)?)
}

/// The 32-bit entry point of a PVH kernel, from its Xen note.
pub fn pvh_entry(data: &[u8]) -> Option<u32> {
    for s in segments(data)?.iter().filter(|s| s.kind == PT_NOTE) {
        let Some(notes) = bytes(data, s) else { continue };
        let align = if s.align == 8 { 8 } else { 4 };
        let mut at = 0usize;
        while at + 12 <= notes.len() {
            let (name, desc, kind) =
                (long(notes, at) as usize, long(notes, at + 4) as usize, long(notes, at + 8));
            let name_at = at + 12;
            let desc_at = name_at.checked_add(name)?.checked_next_multiple_of(align)?;
            if kind == PHYS32_ENTRY && notes.get(name_at..name_at + 4) == Some(b"Xen\0") {
                return Some(long(notes, desc_at));
            }
            at = desc_at.checked_add(desc)?.checked_next_multiple_of(align)?;
        }
    }
    None
}

/// The loadable segments at their physical addresses, as one piece.
pub fn flatten(data: &[u8], low_ram: u64) -> Result<Flat, String> {
    let all = segments(data).ok_or("it is no ELF file")?;
    let load: Vec<&Segment> = all.iter().filter(|s| s.kind == PT_LOAD && s.memsz != 0).collect();
    let start = load.iter().map(|s| s.paddr).min().ok_or("it has nothing to load")?;
    let end = load
        .iter()
        .map(|s| s.paddr.checked_add(s.memsz.max(s.filesz)))
        .max()
        .flatten()
        .ok_or("its addresses are wrong")?;
    if load.iter().any(|s| s.paddr.checked_add(s.memsz.max(s.filesz)).is_none()) || end > low_ram {
        return Err("it does not fit into memory".into());
    }
    let mut image = vec![0u8; (end - start) as usize];
    for s in &load {
        let from = bytes(data, s).ok_or("the file is cut off")?;
        let at = (s.paddr - start) as usize;
        image[at..at + from.len()].copy_from_slice(from);
    }
    let wide = data[4] == 2;
    let entry = if wide { quad(data, 24) } else { u64::from(long(data, 24)) };
    Ok(Flat { addr: start as u32, data: image, entry: entry as u32 })
}
