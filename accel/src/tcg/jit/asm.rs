//! A small x86-64 encoder: the few forms that the compiler needs, straight into bytes.
//!
//! Guest and host speak the same instruction set, so most of what is emitted is the guest's own opcode
//! with other registers. An encoder of forms (opcode, register, r/m) says that in one line each; the
//! general assemblers measured for this job (dynasm-rs, iced-x86's `CodeAssembler`, Cranelift) would each
//! take an instruction apart into a description of their own first.

pub const RAX: u8 = 0;
pub const RCX: u8 = 1;
pub const RDX: u8 = 2;
pub const RBX: u8 = 3;
pub const RSP: u8 = 4;
pub const RBP: u8 = 5;
pub const RSI: u8 = 6;
pub const RDI: u8 = 7;

/// An r/m operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rm {
    /// A register.
    R(u8),
    /// Memory at a register plus displacement.
    M(u8, i32),
    /// Memory at base + index << scale + displacement; the index is not RSP.
    X(u8, u8, u8, i32),
    /// Memory at index << scale + displacement.
    I(u8, u8, i32),
}

impl Rm {
    /// Memory `bytes` below this one, where a displacement can say so.
    pub fn below(self, bytes: i32) -> Option<Rm> {
        Some(match self {
            Rm::R(_) => self,
            Rm::M(b, disp) => Rm::M(b, disp.checked_sub(bytes)?),
            Rm::X(b, i, scale, disp) => Rm::X(b, i, scale, disp.checked_sub(bytes)?),
            Rm::I(i, scale, disp) => Rm::I(i, scale, disp.checked_sub(bytes)?),
        })
    }
}

/// Condition codes, as Jcc encodes them.
pub mod cc {
    pub const O: u8 = 0;
    pub const B: u8 = 2;
    pub const E: u8 = 4;
    pub const NE: u8 = 5;
    pub const BE: u8 = 6;
    pub const A: u8 = 7;
    pub const S: u8 = 8;
}

/// Code under construction for a known address.
pub struct Asm {
    pub buf: Vec<u8>,
    /// Where the first byte will run.
    base: u64,
    /// From this offset on, code that seldom runs, which will lie apart; and where.
    apart: (usize, u64),
    /// The slot whose contents RDI holds, as far as is known.
    pub holds: Option<usize>,
}

/// A place that waits for a 32-bit relative target.
#[derive(Clone, Copy, Debug)]
pub struct Fix(usize);

impl Asm {
    /// Into `buf`, which is emptied.
    pub fn new(base: u64, mut buf: Vec<u8>) -> Asm {
        buf.clear();
        Asm { buf, base, apart: (usize::MAX, 0), holds: None }
    }
    /// Start anew.
    pub fn clear(&mut self) {
        self.buf.clear();
        self.apart.0 = usize::MAX;
        self.holds = None;
    }
    /// What follows will lie at `base`.
    pub fn apart(&mut self, base: u64) {
        self.apart = (self.at(), base);
    }
    /// What was written before [`Asm::apart`], and after.
    pub fn parts(&self) -> (&[u8], &[u8]) {
        self.buf.split_at(self.apart.0.min(self.at()))
    }
    pub fn at(&self) -> usize {
        self.buf.len()
    }
    /// Where the next byte will run.
    pub fn here_is(&self) -> u64 {
        self.address(self.at())
    }
    /// Where the byte at an offset will run.
    pub fn address(&self, offset: usize) -> u64 {
        match offset.checked_sub(self.apart.0) {
            None => self.base + offset as u64,
            Some(more) => self.apart.1 + more as u64,
        }
    }
    /// Where what ends at an offset (and is not empty) will end.
    pub fn end_address(&self, offset: usize) -> u64 {
        self.address(offset - 1) + 1
    }
    pub fn b(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
    }
    pub fn d32(&mut self, v: i32) {
        self.b(&v.to_le_bytes());
    }

    /// Prefix, REX, map (0 one-byte, 1 0F, 2 0F38, 3 0F3A), opcode, ModRM. `low8`: byte registers are named,
    /// so SPL to DIL need a REX prefix.
    #[allow(clippy::too_many_arguments)]
    pub fn enc(&mut self, prefix: u8, w: bool, map: u8, opcode: u8, reg: u8, rm: Rm, low8: bool) {
        self.may_change(reg, rm);
        if prefix != 0 {
            self.buf.push(prefix);
        }
        let (x, b) = match rm {
            Rm::R(r) | Rm::M(r, _) => (0, r >> 3),
            Rm::X(r, i, ..) => (i >> 3, r >> 3),
            Rm::I(i, ..) => (i >> 3, 0),
        };
        let rex = 0x40 | (w as u8) << 3 | (reg >> 3) << 2 | x << 1 | b;
        if rex != 0x40 || low8 {
            self.buf.push(rex);
        }
        match map {
            1 => self.b(&[0x0F]),
            2 => self.b(&[0x0F, 0x38]),
            3 => self.b(&[0x0F, 0x3A]),
            _ => {}
        }
        self.buf.push(opcode);
        self.modrm(reg, rm);
    }

    /// An instruction with these operands follows. (It may not write them, or they may not be general registers.)
    fn may_change(&mut self, reg: u8, rm: Rm) {
        if reg == RDI || rm == Rm::R(RDI) {
            self.holds = None;
        }
    }

    fn modrm(&mut self, reg: u8, rm: Rm) {
        let r = (reg & 7) << 3;
        let with_disp = |s: &mut Self, low: u8, sib: Option<u8>, base: u8, disp: i32| {
            // RBP and R13 as a base always take a displacement.
            let md = if disp == 0 && base & 7 != RBP {
                0
            } else if i8::try_from(disp).is_ok() {
                0x40
            } else {
                0x80
            };
            s.buf.push(md | r | low);
            s.buf.extend(sib);
            match md {
                0x40 => s.buf.push(disp as u8),
                0x80 => s.d32(disp),
                _ => {}
            }
        };
        match rm {
            Rm::R(b) => self.buf.push(0xC0 | r | b & 7),
            Rm::M(b, disp) if b & 7 == RSP => with_disp(self, 4, Some(0x24), b, disp),
            Rm::M(b, disp) => with_disp(self, b & 7, None, b, disp),
            Rm::X(b, i, s, disp) => with_disp(self, 4, Some(s << 6 | (i & 7) << 3 | b & 7), b, disp),
            Rm::I(i, s, disp) => {
                self.b(&[r | 4, s << 6 | (i & 7) << 3 | 5]);
                self.d32(disp);
            }
        }
    }

    /// A VEX-coded instruction (three-byte form): `pp` 0 none, 1 66, 2 F3, 3 F2.
    #[allow(clippy::too_many_arguments)]
    pub fn vex(&mut self, pp: u8, w: bool, l: bool, map: u8, opcode: u8, v: u8, reg: u8, rm: Rm) {
        self.may_change(reg, rm);
        let (x, b) = match rm {
            Rm::R(r) | Rm::M(r, _) => (0, r >> 3),
            Rm::X(r, i, ..) => (i >> 3, r >> 3),
            Rm::I(i, ..) => (i >> 3, 0),
        };
        let first = (!(reg >> 3) & 1) << 7 | (!x & 1) << 6 | (!b & 1) << 5 | map;
        let second = (w as u8) << 7 | (!v & 15) << 3 | (l as u8) << 2 | pp;
        self.b(&[0xC4, first, second, opcode]);
        self.modrm(reg, rm);
    }

    /// An opcode whose low bit tells bytes from words, at an operand size of 1, 2, 4 or 8 bytes.
    pub fn sized(&mut self, size: u8, map: u8, opcode: u8, reg: u8, rm: Rm) {
        let low8 = size == 1 && (reg >= 4 || matches!(rm, Rm::R(r) if r >= 4));
        let prefix = if size == 2 { 0x66 } else { 0 };
        self.enc(prefix, size == 8, map, opcode | (size > 1) as u8, reg, rm, low8);
    }
    /// The same for an opcode that has no byte form.
    pub fn word(&mut self, size: u8, map: u8, opcode: u8, reg: u8, rm: Rm) {
        let prefix = if size == 2 { 0x66 } else { 0 };
        self.enc(prefix, size == 8, map, opcode, reg, rm, false);
    }

    /// One of ADD OR ADC SBB AND SUB XOR CMP: `rm op= reg`.
    pub fn alu(&mut self, size: u8, op: u8, rm: Rm, reg: u8) {
        self.sized(size, 0, op << 3, reg, rm);
    }
    /// `reg op= rm`.
    pub fn alu_load(&mut self, size: u8, op: u8, reg: u8, rm: Rm) {
        self.sized(size, 0, op << 3 | 2, reg, rm);
    }
    /// `rm op= imm`.
    pub fn alu_imm(&mut self, size: u8, op: u8, rm: Rm, imm: i32) {
        if size == 1 {
            self.sized(1, 0, 0x80, op, rm);
            self.buf.push(imm as u8);
        } else if i8::try_from(imm).is_ok() {
            self.word(size, 0, 0x83, op, rm);
            self.buf.push(imm as u8);
        } else if rm == Rm::R(RAX) && size >= 4 {
            self.b(if size == 8 { &[0x48] } else { &[] });
            self.b(&[op << 3 | 5]);
            self.d32(imm);
        } else {
            self.word(size, 0, 0x81, op, rm);
            self.imm(size, imm);
        }
    }
    /// An immediate of operand size (32 bits for 64).
    pub fn imm(&mut self, size: u8, imm: i32) {
        match size {
            1 => self.buf.push(imm as u8),
            2 => self.b(&(imm as i16).to_le_bytes()),
            _ => self.d32(imm),
        }
    }
    pub fn test(&mut self, size: u8, rm: Rm, reg: u8) {
        self.sized(size, 0, 0x84, reg, rm);
    }
    pub fn test_imm(&mut self, size: u8, rm: Rm, imm: i32) {
        self.sized(size, 0, 0xF6, 0, rm);
        self.imm(size, imm);
    }
    /// `reg = rm`.
    pub fn load(&mut self, size: u8, reg: u8, rm: Rm) {
        self.sized(size, 0, 0x8A, reg, rm);
    }
    /// `rm = reg`.
    pub fn store(&mut self, size: u8, rm: Rm, reg: u8) {
        self.sized(size, 0, 0x88, reg, rm);
    }
    /// `rm = imm`.
    pub fn store_imm(&mut self, size: u8, rm: Rm, imm: i32) {
        self.sized(size, 0, 0xC6, 0, rm);
        self.imm(size, imm);
    }
    pub fn lea(&mut self, size: u8, reg: u8, rm: Rm) {
        self.word(size, 0, 0x8D, reg, rm);
    }
    /// The shortest that puts a constant into a register and leaves the flags alone.
    pub fn constant(&mut self, reg: u8, v: u64) {
        self.may_change(reg, Rm::R(reg));
        if v <= u32::MAX as u64 {
            if reg >= 8 {
                self.buf.push(0x41);
            }
            self.buf.push(0xB8 | reg & 7);
            self.d32(v as i32);
        } else if v as i64 == v as i32 as i64 {
            self.word(8, 0, 0xC7, 0, Rm::R(reg));
            self.d32(v as i32);
        } else {
            self.b(&[0x48 | reg >> 3, 0xB8 | reg & 7]);
            self.b(&v.to_le_bytes());
        }
    }
    /// Group 2: ROL ROR RCL RCR SHL SHR - SAR by an immediate.
    pub fn shift(&mut self, size: u8, op: u8, rm: Rm, count: u8) {
        if count == 1 {
            self.sized(size, 0, 0xD0, op, rm);
        } else {
            self.sized(size, 0, 0xC0, op, rm);
            self.buf.push(count);
        }
    }
    pub fn setcc(&mut self, cc: u8, rm: Rm) {
        let low8 = matches!(rm, Rm::R(r) if r >= 4);
        self.enc(0, false, 1, 0x90 | cc, 0, rm, low8);
    }

    // ---- jumps

    pub fn jcc(&mut self, cc: u8) -> Fix {
        self.b(&[0x0F, 0x80 | cc, 0, 0, 0, 0]);
        Fix(self.at())
    }
    pub fn jmp(&mut self) -> Fix {
        self.b(&[0xE9, 0, 0, 0, 0]);
        Fix(self.at())
    }
    /// A short forward jump on a condition; to be ended with `short_here`.
    pub fn jcc_short(&mut self, cc: u8) -> Fix {
        self.b(&[0x70 | cc, 0]);
        Fix(self.at())
    }
    pub fn short_here(&mut self, f: Fix) {
        let d = self.at() - f.0;
        assert!(d < 128);
        self.buf[f.0 - 1] = d as u8;
    }
    /// Let a jump lead to an offset in this code.
    pub fn to(&mut self, f: Fix, target: usize) {
        let d = self.address(target).wrapping_sub(self.end_address(f.0)) as i32;
        self.buf[f.0 - 4..f.0].copy_from_slice(&d.to_le_bytes());
    }
    pub fn here(&mut self, f: Fix) {
        self.to(f, self.at());
    }
    /// `reg = target`, an address near the code.
    pub fn lea_abs(&mut self, reg: u8, target: u64) {
        self.may_change(reg, Rm::R(reg));
        self.b(&[0x48 | reg >> 3 << 2, 0x8D, (reg & 7) << 3 | 5]);
        self.rel(target);
    }
    pub fn jcc_abs(&mut self, cc: u8, target: u64) {
        self.b(&[0x0F, 0x80 | cc]);
        self.rel(target);
    }
    fn rel(&mut self, target: u64) {
        let next = self.here_is() + 4;
        self.d32(target.wrapping_sub(next) as i32);
    }
    /// Jump to another place of the code cache.
    pub fn jmp_abs(&mut self, target: u64) {
        self.buf.push(0xE9);
        self.rel(target);
    }
    pub fn call_abs(&mut self, target: u64) {
        self.buf.push(0xE8);
        self.rel(target);
    }
}

impl Fix {
    /// A mark at an offset.
    pub fn at(offset: usize) -> Fix {
        Fix(offset)
    }
    /// Offset just past the field.
    pub fn end(self) -> usize {
        self.0
    }
}
