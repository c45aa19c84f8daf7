//! Compares two outcomes of a case, and shows a failing one.

use std::fmt::Write;

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

use super::case::{Case, Compare, Outcome, CODE, CODE_SIZE, DATA, DATA_SIZE};

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];
/// CF, PF, AF, ZF, SF, TF, IF, DF, OF, NT, AC, ID.
const FLAGS: u64 = 0x24_4FD5;
/// x87 exception flags that an approximate result may differ in: UE, PE, what
/// follows from them, and C1.
const CLOSE_STATUS: u16 = 0x82B0;

fn significand(v: &[u8]) -> (u16, u64) {
    let mut m = [0; 8];
    m.copy_from_slice(&v[..8]);
    (u16::from_le_bytes([v[8], v[9]]), u64::from_le_bytes(m))
}

fn x87_equal(a: &[u8], b: &[u8], close: bool) -> bool {
    if a == b {
        return true;
    }
    let ((ea, ma), (eb, mb)) = (significand(a), significand(b));
    // Units in the last place, also across a power of two.
    let line = |e: u16, m: u64| i128::from(e & 0x7FFF) << 63 | i128::from(m & (u64::MAX >> 1));
    close && ea >> 15 == eb >> 15 && (line(ea, ma) - line(eb, mb)).abs() <= 2
}

fn nan(v: &[u8]) -> bool {
    match *v {
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]).is_nan(),
        [a, b, c, d, e, f, g, h] => f64::from_le_bytes([a, b, c, d, e, f, g, h]).is_nan(),
        _ => false,
    }
}

fn xmm_equal(a: &[u8], b: &[u8], how: &Compare) -> bool {
    if a == b {
        return true;
    }
    let size = usize::from(how.nan_open);
    if size != 0 {
        return a.chunks(size).zip(b.chunks(size)).all(|(a, b)| a == b || nan(a) && nan(b));
    }
    how.xmm_close
        && a.chunks_exact(4).zip(b.chunks_exact(4)).all(|(a, b)| {
            let f = |v: &[u8]| f32::from_le_bytes([v[0], v[1], v[2], v[3]]);
            let (x, y) = (f(a), f(b));
            a == b || (x - y).abs() <= x.abs() / 1024.0 || x.abs().max(y.abs()) < f32::MIN_POSITIVE * 1.01
        })
}

/// What differs at all between two outcomes on the software processor, interpreted and compiled.
pub fn exact(interpreted: &Outcome, compiled: &Outcome) -> Option<String> {
    let (i, c) = (&interpreted.regs, &compiled.regs);
    let mut text = String::new();
    let mut note = |name: &str, a: u64, b: u64| {
        if a != b {
            let _ = writeln!(text, "  {name}: interpreted {a:#x}, compiled {b:#x}");
        }
    };
    note("exception", interpreted.vector.into(), compiled.vector.into());
    note("error code", interpreted.error.into(), compiled.error.into());
    note("cr2", interpreted.cr2, compiled.cr2);
    note("rip", i.rip, c.rip);
    note("flags", i.flags, c.flags);
    for ((name, a), b) in NAMES.iter().zip(i.gpr).zip(c.gpr) {
        note(name, a, b);
    }
    let mut parts = |name: &str, a: &[u8], b: &[u8]| {
        for (at, (a, b)) in a.iter().zip(b).enumerate().filter(|(_, (a, b))| a != b) {
            note(&format!("{name} byte {at:#x}"), u64::from(*a), u64::from(*b));
        }
    };
    parts("fx", &i.fx, &c.fx);
    parts("upper halves", &i.high, &c.high);
    parts("data", &interpreted.data, &compiled.data);
    for (at, (a, b)) in i.selectors.iter().zip(c.selectors).enumerate() {
        note(["es", "cs", "ss", "ds"][at], u64::from(*a), u64::from(b));
    }
    (!text.is_empty()).then_some(text)
}

/// `None` when they agree; otherwise what differs.
pub fn difference(case: &Case, real: &Outcome, soft: &Outcome) -> Option<String> {
    let mut text = String::new();
    let mut note = |name: &str, a: String, b: String| {
        let _ = writeln!(text, "  {name}: processor {a}, ftvm {b}");
    };
    let hex = |v: u64| format!("{v:#x}");
    let bytes = |v: &[u8]| v.iter().rev().map(|b| format!("{b:02x}")).collect::<String>();
    if case.compare.order_open && matches!((real.vector, soft.vector), (12..=14, 12..=14)) {
        return None;
    }
    if real.vector != soft.vector {
        let show = |o: &Outcome| format!("{} error {:#x} cr2 {:#x}", o.vector, o.error, o.cr2);
        note("exception", show(real), show(soft));
    }
    if case.compare.exception_only {
        return (!text.is_empty()).then_some(text);
    }
    let (r, s) = (&real.regs, &soft.regs);
    if r.rip != s.rip {
        note("rip", hex(r.rip), hex(s.rip));
    }
    if real.vector == soft.vector && matches!(real.vector, 8 | 10..=14 | 17) {
        // For addresses of its own half the kernel hides whether a page is present.
        if real.error != soft.error && !case.compare.error_open && real.cr2 < 0x7FFF_FFFF_F000 {
            note("error code", hex(real.error.into()), hex(soft.error.into()));
        }
        if real.vector == 14 && real.cr2 != soft.cr2 && !case.compare.cr2_open {
            note("cr2", hex(real.cr2), hex(soft.cr2));
        }
    }
    let mask = FLAGS & !case.undefined;
    if (r.flags ^ s.flags) & mask != 0 {
        note("flags", hex(r.flags & mask), hex(s.flags & mask));
    }
    for ((name, real), soft) in NAMES.iter().zip(r.gpr).zip(s.gpr) {
        if real != soft {
            note(name, hex(real), hex(soft));
        }
    }
    for (i, name) in ["es", "cs", "ss", "ds"].iter().enumerate() {
        // A null selector's privilege level may get lost on the way through the kernel.
        if r.selectors[i] != s.selectors[i] && (r.selectors[i] | s.selectors[i]) > 3 {
            note(name, hex(r.selectors[i].into()), hex(s.selectors[i].into()));
        }
    }
    let c = &case.compare;
    if r.word(0) != s.word(0) {
        note("fcw", hex(r.word(0).into()), hex(s.word(0).into()));
    }
    let status = !(c.fsw_open | if c.x87_close { CLOSE_STATUS } else { 0 });
    if (r.word(2) ^ s.word(2)) & status != 0 {
        note("fsw", hex(r.word(2).into()), hex(s.word(2).into()));
    }
    if r.fx[4] != s.fx[4] {
        note("tag", hex(r.fx[4].into()), hex(s.fx[4].into()));
    }
    if r.mxcsr() != s.mxcsr() {
        note("mxcsr", hex(r.mxcsr().into()), hex(s.mxcsr().into()));
    }
    for i in 0..8 {
        let at = 32 + i * 16;
        if c.x87_open && i < 2 {
            continue;
        }
        if !x87_equal(&r.fx[at..at + 10], &s.fx[at..at + 10], c.x87_close) {
            note(&format!("st{i}"), bytes(&r.fx[at..at + 10]), bytes(&s.fx[at..at + 10]));
        }
    }
    for i in 0..16 {
        let at = 160 + i * 16;
        if !xmm_equal(&r.fx[at..at + 16], &s.fx[at..at + 16], c) {
            note(&format!("xmm{i}"), bytes(&r.fx[at..at + 16]), bytes(&s.fx[at..at + 16]));
        }
        let (a, b) = (&r.high[i * 16..i * 16 + 16], &s.high[i * 16..i * 16 + 16]);
        if !xmm_equal(a, b, c) {
            note(&format!("ymm{i} above"), bytes(a), bytes(b));
        }
    }
    if real.data != soft.data {
        let mut shown = 0;
        for i in 0..DATA_SIZE {
            let open = case.open_bytes.iter().any(|(at, n)| (*at..at + n).contains(&i));
            if real.data[i] != soft.data[i] && !open && shown < 24 {
                note(
                    &format!("[{:#x}]", DATA + i as u64),
                    hex(real.data[i].into()),
                    hex(soft.data[i].into()),
                );
                shown += 1;
            }
        }
    }
    (!text.is_empty()).then_some(text)
}

/// The instructions and the initial state.
pub fn describe(case: &Case) -> String {
    let mut out = format!("  {:?}\n", case.mode);
    let mut formatter = IntelFormatter::new();
    for start in &case.starts {
        let start = *start as usize;
        let bytes = &case.code[start..(start + 15).min(CODE_SIZE)];
        let ip = CODE - case.mode.code_base() + start as u64;
        let i = Decoder::with_ip(case.mode.bits(), bytes, ip, DecoderOptions::NONE).decode();
        let mut text = String::new();
        formatter.format(&i, &mut text);
        let shown = if start == case.starts[case.starts.len() - 1] as usize { 15 } else { i.len() };
        let hex: Vec<String> = bytes[..shown].iter().map(|b| format!("{b:02x}")).collect();
        let _ = writeln!(out, "  {ip:#x}: {:32} {text}", hex.join(" "));
    }
    let r = &case.regs;
    for (i, name) in NAMES.iter().enumerate() {
        let _ = write!(out, "  {name}={:#x}{}", r.gpr[i], if i % 4 == 3 { "\n" } else { "" });
    }
    let _ = writeln!(
        out,
        "  flags={:#x} fcw={:#x} fsw={:#x} tag={:#x} mxcsr={:#x} undefined={:#x}",
        r.flags,
        r.word(0),
        r.word(2),
        r.fx[4],
        r.mxcsr(),
        case.undefined
    );
    let hex = |v: &[u8]| v.iter().rev().map(|b| format!("{b:02x}")).collect::<String>();
    for i in 0..8 {
        let _ = write!(out, "  st{i}={}", hex(&r.fx[32 + i * 16..42 + i * 16]));
    }
    let _ = writeln!(out);
    for i in 0..16 {
        let at = 160 + i * 16;
        let (high, low) = (hex(&r.high[i * 16..i * 16 + 16]), hex(&r.fx[at..at + 16]));
        let _ = write!(out, "  ymm{i}={high}_{low}{}", if i % 2 == 1 { "\n" } else { "" });
    }
    out
}
