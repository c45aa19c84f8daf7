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

use arrayvec::ArrayVec;

use super::super::op::{Op, BLOCKIP, FS, RBP, RDI, RSI, RSP};
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

/// A memory access, as its instruction says.
#[derive(Clone, Copy)]
enum Reach {
    /// `size` bytes of the memory operand.
    Operand { size: u64, write: bool },
    /// `size` bytes, `disp` bytes above what register `r` holds.
    Slot { r: usize, disp: i32, size: u8, write: bool },
    /// One that takes no part in groups comes before those that follow.
    Apart,
}

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

impl Request {
    /// Whether it is what instruction `i` asks for.
    pub fn is(&self, i: usize, size: u64, write: bool) -> bool {
        (self.i, self.size, self.write) == (i, size as i64, write)
    }
}

/// The accesses of an instruction, in the order in which its code asks for them.
fn accesses(kind: &Kind, word: u8) -> ArrayVec<Reach, 3> {
    let mut list = ArrayVec::new();
    let operand = |size: u8, write| Reach::Operand { size: size as u64, write };
    let push = Reach::Slot { r: RSP, disp: -(word as i32), size: word, write: true };
    let top = |r| Reach::Slot { r, disp: 0, size: word, write: false };
    match *kind {
        Kind::Vector { native, mem: true, .. } if !native.align => {
            list.push(operand(native.size, native.write))
        }
        Kind::Extend { from: size, s: None, .. }
        | Kind::Load { size, .. }
        | Kind::AluLoad { size, .. }
        | Kind::AluStore { op: 7, size, .. }
        | Kind::TestMem { size, .. }
        | Kind::Bit { op: 0, size, d: None, .. }
        | Kind::Div { size, s: None, .. }
        | Kind::Scan { size, s: None, .. }
        | Kind::Count { size, s: None, .. }
        | Kind::Popcnt { size, s: None, .. }
        | Kind::Imul { size, s: None, .. }
        | Kind::Mul { size, s: None, .. }
        | Kind::Cmov { size, s: None, .. } => list.push(operand(size, false)),
        Kind::Store { size, .. }
        | Kind::AluStore { size, .. }
        | Kind::XchgMem { size, .. }
        | Kind::Inc { size, d: None, .. }
        | Kind::Not { size, d: None }
        | Kind::Neg { size, d: None }
        | Kind::Bit { size, d: None, .. }
        | Kind::Cmpxchg { size, .. }
        | Kind::Xadd { size, .. }
        | Kind::ShiftMem { size, .. } => list.push(operand(size, true)),
        Kind::SetccMem { .. } => list.push(operand(1, true)),
        Kind::Push(_) | Kind::Pushf | Kind::Call { .. } => list.push(push),
        Kind::PushMem => list.extend([operand(word, false), push]),
        Kind::Pop(_) | Kind::Ret { .. } => list.push(top(RSP)),
        Kind::Leave => list.push(top(RBP)),
        Kind::Movs(size) | Kind::Stos(size) | Kind::Lods(size) => {
            // The handler may do it all before its first access is looked at, so that it must not lead a group.
            list.push(Reach::Apart);
            if !matches!(kind, Kind::Stos(_)) {
                list.push(Reach::Slot { r: RSI, disp: 0, size, write: false });
            }
            if !matches!(kind, Kind::Lods(_)) {
                list.push(Reach::Slot { r: RDI, disp: 0, size, write: true });
            }
        }
        Kind::Indirect { call, s } => {
            list.extend(s.is_none().then(|| operand(word, false)));
            list.extend(call.then_some(push));
        }
        _ => {}
    }
    list
}

/// What registers hold: the number of an unknown value, and a constant more.
struct Values {
    regs: [(u16, i64); 16],
    fresh: u16,
    era: u32,
    requests: Vec<Request>,
    /// The last instruction with an access that is no request.
    apart: Option<usize>,
}

impl Values {
    fn new(requests: Vec<Request>) -> Values {
        let regs = std::array::from_fn(|r| (r as u16, 0));
        Values { regs, fresh: 16, era: 0, requests, apart: None }
    }

    /// The accesses of a trace, into `room`.
    fn requests(trace: &Trace, mut room: Vec<Request>) -> Vec<Request> {
        room.clear();
        let mut values = Values::new(room);
        for (i, kind) in trace.kinds.iter().enumerate() {
            let op = trace.op(i);
            for reach in accesses(kind, trace.word) {
                match reach {
                    Reach::Operand { size, write } if op.asz == trace.word => {
                        values.operand(i, op, trace.part(i).at, size, write);
                    }
                    Reach::Operand { .. } | Reach::Apart => values.apart = Some(i),
                    Reach::Slot { r, disp, size, write } => {
                        values.at_register(i, r, disp, size as u64, write)
                    }
                }
            }
            values.follow(kind, op, trace.word);
        }
        values.requests
    }

    /// The memory operand of `op`, in a part of the trace that starts at `at` in its page.
    fn operand(&mut self, i: usize, op: &Op, at: u64, size: u64, write: bool) {
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
    fn at_register(&mut self, i: usize, r: usize, disp: i32, size: u64, write: bool) {
        let (base, more) = self.regs[r];
        self.push(i, (base, NOTHING, 0, 0), more.wrapping_add(disp as i64), size, write);
    }
    fn push(&mut self, i: usize, base: Base, disp: i64, size: u64, write: bool) {
        let second = self.apart == Some(i) || self.requests.last().is_some_and(|r| r.i == i);
        self.requests.push(Request { i, base, disp, size: size as i64, write, era: self.era, second });
    }

    /// After instruction `i`.
    fn follow(&mut self, kind: &Kind, op: &Op, word: u8) {
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
    pub requests: Vec<Request>,
    pub roles: Vec<Role>,
    /// Instructions all of whose accesses are members: they cannot fail.
    pub calm: Vec<bool>,
    pub grouped: bool,
    groups: Vec<Group>,
    /// The group of each access.
    group_of: Vec<u8>,
}

/// Accesses that one look may serve.
struct Group {
    base: Base,
    era: u32,
    members: u32,
    low: i64,
    high: i64,
    write: bool,
    /// Where the leader keeps the host address.
    slot: Option<usize>,
    /// The leader has been met.
    led: bool,
}

const NO_GROUP: u8 = u8::MAX;

impl Plan {
    /// Plan a trace.
    pub fn make(&mut self, trace: &Trace) {
        let requests = Values::requests(trace, std::mem::take(&mut self.requests));
        self.group(&requests);
        self.roles.clear();
        for (r, &g) in requests.iter().zip(&self.group_of) {
            let role = match self.groups.get_mut(g as usize) {
                Some(&mut Group { slot: Some(slot), low, high, write, ref mut led, .. }) => {
                    let at = (r.disp - low) as i32;
                    if std::mem::replace(led, true) {
                        Role::Member { slot, at }
                    } else {
                        Role::Leader { slot, lead: at, len: (high - low) as u32, write }
                    }
                }
                _ => Role::Alone,
            };
            self.roles.push(role);
        }
        self.calm.clear();
        self.calm.resize(trace.len(), false);
        for (r, role) in requests.iter().zip(&self.roles) {
            let member = matches!(role, Role::Member { .. });
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
            self.calm[r.i] = member && !other && (!r.second || self.calm[r.i]);
        }
        self.requests = requests;
    }

    /// No groups.
    pub fn clear(&mut self) {
        self.requests.clear();
        self.roles.clear();
        self.calm.clear();
        self.grouped = false;
    }

    fn group(&mut self, requests: &[Request]) {
        let Plan { groups, group_of, .. } = self;
        groups.clear();
        group_of.clear();
        for r in requests {
            let end = r.disp.wrapping_add(r.size);
            let fits = |g: &Group| {
                g.base == r.base && g.era == r.era && g.high.max(end).wrapping_sub(g.low.min(r.disp)) <= RANGE
            };
            let n = match groups.iter().rposition(fits) {
                Some(n) => {
                    let g = &mut groups[n];
                    g.members += 1;
                    g.low = g.low.min(r.disp);
                    g.high = g.high.max(end);
                    g.write |= r.write;
                    n as u8
                }
                // The handler may do all of an instruction, should its first access go the slow way.
                None if r.second || groups.len() == NO_GROUP as usize => NO_GROUP,
                None => {
                    let (low, high, write) = (r.disp, end, r.write);
                    let (base, era) = (r.base, r.era);
                    groups.push(Group { base, era, members: 1, low, high, write, slot: None, led: false });
                    (groups.len() - 1) as u8
                }
            };
            group_of.push(n);
        }
        // The largest groups first, should there be too few slots.
        self.grouped = false;
        for slot in SLOTS {
            let open = groups.iter_mut().rev().filter(|g| g.members > 1 && g.slot.is_none());
            let Some(g) = open.max_by_key(|g| g.members) else { break };
            g.slot = Some(slot);
            self.grouped = true;
        }
    }
}
