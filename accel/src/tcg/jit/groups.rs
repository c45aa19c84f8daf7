//! Accesses of a trace that share one look at the TLB.
//!
//! Several memory operands of a trace often lie a constant apart: the slots of a stack frame, the fields of a
//! structure, an element that is read and written back. The first of such a group looks up the page for the
//! whole range of the group and keeps its host address; the others use that. The check fails when the range
//! crosses a page (or a page is not plainly writable that is written later on): then code of the same trace
//! without groups goes on from there, once there is such code; the interpreter before.
//!
//! Nothing between the accesses of a group may change translations: handlers end all groups, and an access
//! that goes the slow way leaves the trace if it dropped any.

use super::super::op::{Op, BLOCKIP, FS, RBP, RSP};
use super::kind::{Kind, Val};
use super::trace::Trace;

/// Slots of `gpr` for the host addresses of groups.
const SLOTS: [usize; 11] = [28, 29, 30, 32, 33, 34, 35, 36, 37, 38, 39];
/// A wider range would cross a page too often.
const RANGE: i64 = 512;

/// An address but for a constant: what the base and the index held, the scale, the segment.
pub type Base = (u16, u16, u8, u8);

const NOTHING: u16 = u16::MAX;
const PAGE_START: u16 = u16::MAX - 1;

/// One memory access, in the order in which they are compiled.
#[derive(Clone, Copy)]
pub struct Request {
    i: usize,
    base: Base,
    disp: i64,
    size: i64,
    write: bool,
    /// Counts what ends all groups before it.
    era: u32,
    /// Its instruction has an access before it.
    second: bool,
}

/// What an access does about the TLB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Alone,
    /// Looks up the page for `len` bytes, which start `lead` bytes below its own, for writing if `write`.
    Leader {
        slot: usize,
        lead: i32,
        len: u32,
        write: bool,
    },
    /// Lies `at` bytes above what the leader kept.
    Member {
        slot: usize,
        at: i32,
    },
}

impl Role {
    /// Bytes of the group below the access that leads it.
    pub fn lead(&self) -> i32 {
        match *self {
            Role::Leader { lead, .. } => lead,
            _ => 0,
        }
    }
}

/// What registers hold: the number of an unknown value, and a constant more.
pub struct Values {
    regs: [(u16, i64); 16],
    fresh: u16,
    era: u32,
    pub requests: Vec<Request>,
    /// The last instruction with an access that is no request.
    apart: Option<usize>,
}

impl Values {
    pub fn new() -> Values {
        let regs = std::array::from_fn(|r| (r as u16, 0));
        Values { regs, fresh: 16, era: 0, requests: Vec::new(), apart: None }
    }

    /// The memory operand of `op`, in a part of the trace that starts at `at` in its page.
    pub fn operand(&mut self, i: usize, op: &Op, at: u64, size: u64, write: bool) {
        let part = |r: u8| match r {
            0..=15 => self.regs[r as usize],
            BLOCKIP => (PAGE_START, at as i64),
            _ => (NOTHING, 0),
        };
        let (base, index) = (part(op.base), part(op.index));
        let scale = if index.0 == NOTHING { 0 } else { op.scale & 3 };
        let disp = (if op.asz == 4 { op.disp as i32 as i64 } else { op.disp })
            .wrapping_add(base.1)
            .wrapping_add(index.1 << scale);
        let seg = if op.seg >= FS as u8 { op.seg } else { 0 };
        self.push(i, (base.0, index.0, scale, seg), disp, size, write);
    }
    /// Memory `disp` bytes above what register `r` holds.
    pub fn at_register(&mut self, i: usize, r: usize, disp: i32, size: u64, write: bool) {
        let (base, more) = self.regs[r];
        self.push(i, (base, NOTHING, 0, 0), more.wrapping_add(disp as i64), size, write);
    }
    fn push(&mut self, i: usize, base: Base, disp: i64, size: u64, write: bool) {
        let second = self.apart == Some(i) || self.requests.last().is_some_and(|r| r.i == i);
        self.requests.push(Request { i, base, disp, size: size as i64, write, era: self.era, second });
    }
    /// Instruction `i` has an access that takes no part in groups.
    pub fn apart(&mut self, i: usize) {
        self.apart = Some(i);
    }

    /// After instruction `i`.
    pub fn follow(&mut self, kind: &Kind, op: &Op, word: u8) {
        let step = word as i64;
        let sp = self.regs[RSP];
        let known = match *kind {
            Kind::Mov { size, d, s } if size == word => Some((d, self.regs[s as usize])),
            Kind::Alu { op: n @ (0 | 5), size, d, s: Val::Imm(v) } if size == word => {
                let (base, more) = self.regs[d as usize];
                let v = v as i64;
                Some((d, (base, more.wrapping_add(if n == 0 { v } else { -v }))))
            }
            Kind::Inc { dec, size, d: Some(d) } if size == word => {
                let (base, more) = self.regs[d as usize];
                Some((d, (base, more.wrapping_add(if dec { -1 } else { 1 }))))
            }
            Kind::Lea { size, d } if size == word && op.base < 16 && op.index >= 16 => {
                let (base, more) = self.regs[op.base as usize];
                Some((d, (base, more.wrapping_add(op.disp))))
            }
            Kind::Push(_) | Kind::PushMem | Kind::Pushf | Kind::Call { .. } => {
                Some((RSP as u8, (sp.0, sp.1 - step)))
            }
            Kind::Leave => {
                let (base, more) = self.regs[RBP];
                Some((RSP as u8, (base, more.wrapping_add(step))))
            }
            Kind::Pop(d) if d != RSP as u8 => Some((RSP as u8, (sp.0, sp.1 + step))),
            Kind::Handler | Kind::Swapgs => {
                self.era += 1;
                None
            }
            _ => None,
        };
        let changes = kind.changes();
        for r in 0..16 {
            if changes >> r & 1 != 0 {
                self.regs[r] = (self.fresh, 0);
                self.fresh += 1;
            }
        }
        if let Some((r, value)) = known {
            self.regs[r as usize] = value;
        }
    }
}

/// The roles of a trace's accesses.
#[derive(Default)]
pub struct Plan {
    pub roles: Vec<Role>,
    /// Instructions all of whose accesses are members: they cannot fail.
    pub calm: Vec<bool>,
    pub grouped: bool,
}

struct Group {
    base: Base,
    era: u32,
    members: Vec<usize>,
    low: i64,
    high: i64,
    write: bool,
}

impl Plan {
    pub fn new(trace: &Trace, requests: &[Request]) -> Plan {
        let mut groups: Vec<Group> = Vec::new();
        for (n, r) in requests.iter().enumerate() {
            let end = r.disp.wrapping_add(r.size);
            let fits = |g: &&mut Group| {
                g.base == r.base && g.era == r.era && g.high.max(end).wrapping_sub(g.low.min(r.disp)) <= RANGE
            };
            match groups.iter_mut().rev().find(fits) {
                Some(g) => {
                    g.members.push(n);
                    g.low = g.low.min(r.disp);
                    g.high = g.high.max(end);
                    g.write |= r.write;
                }
                // The handler may do all of an instruction, should its first access go the slow way.
                None if r.second => {}
                None => groups.push(Group {
                    base: r.base,
                    era: r.era,
                    members: vec![n],
                    low: r.disp,
                    high: end,
                    write: r.write,
                }),
            }
        }
        let mut plan = Plan { roles: vec![Role::Alone; requests.len()], ..Plan::default() };
        // The largest groups first, should there be too few slots.
        groups.retain(|g| g.members.len() > 1);
        groups.sort_by_key(|g| std::cmp::Reverse(g.members.len()));
        for (g, slot) in groups.iter().zip(SLOTS) {
            plan.grouped = true;
            for (k, &n) in g.members.iter().enumerate() {
                let at = (requests[n].disp - g.low) as i32;
                plan.roles[n] = if k == 0 {
                    Role::Leader { slot, lead: at, len: (g.high - g.low) as u32, write: g.write }
                } else {
                    Role::Member { slot, at }
                };
            }
        }
        plan.calm = vec![false; trace.len()];
        for (n, r) in requests.iter().enumerate() {
            let member = matches!(plan.roles[n], Role::Member { .. });
            // These may need their handler for other reasons.
            let other = matches!(
                trace.kinds[r.i],
                Kind::Div { .. }
                    | Kind::Ret { .. }
                    | Kind::Indirect { .. }
                    | Kind::Vector { .. }
                    | Kind::Movs(_)
                    | Kind::Stos(_)
                    | Kind::Lods(_)
            );
            plan.calm[r.i] = member && !other && (!r.second || plan.calm[r.i]);
        }
        plan
    }
}
