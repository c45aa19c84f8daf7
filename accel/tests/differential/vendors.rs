//! The software processor gives AMD's answers, on every host. This is where other vendors' processors are known to
//! give different ones: what the architecture leaves open, or what the manuals of the two define differently. Each
//! entry says precisely what they do instead; whatever is not of this table is a failure on every processor.

use iced_x86::{Code, Encoder, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};

use super::case::{Case, Mode, Outcome, CODE_SIZE, DATA, DATA_SIZE};
use super::compare;
use super::generate::{effective_address, instruction, segment_base};
use super::native::Native;
use super::soft::Soft;

/// A difference between vendors.
pub struct Known {
    pub name: &'static str,
    /// Why neither answer is wrong.
    pub reason: &'static str,
    /// What another vendor's processor makes of the case; `None`: this is not the case's difference.
    expected: fn(&mut Look) -> Option<Outcome>,
}

/// A case whose last instruction is the one that differs.
struct Look<'a> {
    case: &'a Case,
    last: Instruction,
    soft: &'a Outcome,
    real: &'a Outcome,
    machine: &'a mut Soft,
}

pub const TABLE: [Known; 12] = [
    Known {
        name: "VPINSRQ and VPEXTRQ outside 64-bit mode",
        reason: "SDM vol. 2 (PINSRQ, PEXTRQ): VEX.W is ignored there; to AMD's processors they are invalid",
        expected: narrow_element,
    },
    Known {
        name: "PAUSE with REX.B",
        reason: "PAUSE, or XCHG R8, RAX under an F3 prefix: the manuals define neither encoding",
        expected: pause,
    },
    Known {
        name: "an operand across the end of 4 GiB",
        reason: "SDM vol. 3, section 6.3: with a limit of FFFFFFFFh such an access may or may not be a limit violation",
        expected: wrap,
    },
    Known {
        name: "x87 store with an unmasked exception to where nothing can be stored",
        reason: "which of the two exceptions is seen: one is of the operation, the other of a store that is not done",
        expected: numeric_first,
    },
    Known {
        name: "FSTP m80, FBSTP or MOVBE across a page's end",
        reason: "whether the first part is stored before the page fault of the second",
        expected: partial_store,
    },
    Known {
        name: "MMX store that faults",
        reason: "whether TOP is already zero, as the instruction leaves it when it is done (SDM vol. 3, section 13.1)",
        expected: top_cleared,
    },
    Known {
        name: "VCVTPS2PH that faults",
        reason: "whether the conversion comes first: MXCSR's flags are set already, an unmasked exception is raised",
        expected: flags_first,
    },
    Known {
        name: "masked store across a page's end",
        reason: "which of the bytes that are not there CR2 names",
        expected: masked_byte,
    },
    Known {
        name: "PUSHA that faults",
        reason: "whether the registers before the one that cannot be stored are stored",
        expected: partial_push,
    },
    Known {
        name: "CMPS whose operands both fault",
        reason: "which of the two is read first",
        expected: either_operand,
    },
    Known {
        name: "BOUND whose upper bound cannot be read",
        reason: "whether it is read at all when the index lies below the lower one",
        expected: bound_first,
    },
    Known {
        name: "repeated string instruction with 32-bit addresses that faults",
        reason: "whether the upper halves of RSI and RDI are already zero before the first element is done",
        expected: narrow_pointers,
    },
];

/// The entry of [`TABLE`] that explains why the processor and the software processor differ in a case.
pub fn explain(case: &Case, real: &mut Native, soft: &mut Soft) -> Option<&'static str> {
    let (mut a, mut b) = (Outcome::new(), Outcome::new());
    for n in 0..case.starts.len() {
        // The shortest beginning of the case in which they differ already.
        let cut = cut(case, n);
        real.run(&cut, &mut a);
        if !soft.run(&cut, &mut b) {
            return None;
        }
        if compare::difference(&cut, &a, &b).is_none() {
            continue;
        }
        let last = instruction(&cut, n);
        let mut look = Look { case: &cut, last, soft: &b, real: &a, machine: soft };
        return TABLE.iter().find_map(|known| {
            let expected = (known.expected)(&mut look)?;
            compare::difference(&cut, &a, &expected).is_none().then_some(known.name)
        });
    }
    None
}

/// The case up to its instruction `n`.
fn cut(case: &Case, n: usize) -> Case {
    let mut cut = case.clone();
    cut.starts.truncate(n + 1);
    cut.undefined = case.undefined_after[n];
    if let Some(next) = case.starts.get(n + 1) {
        let after = case.starts[case.starts.len() - 1] as usize;
        let end = (after + instruction(case, case.starts.len() - 1).len()).min(CODE_SIZE);
        cut.code[*next as usize..end].fill(0xCC);
    }
    cut
}

impl Look<'_> {
    /// What the software processor makes of the case with its last instruction in another form.
    fn instead(&mut self, bytes: &[u8]) -> Option<Outcome> {
        let mut case = self.case.clone();
        let start = *case.starts.last()? as usize;
        let (old, new) = (self.last.len(), bytes.len());
        let length = old.max(new);
        case.code[start..start + length].fill(0xCC);
        case.code[start..start + new].copy_from_slice(bytes);
        let mut out = Outcome::new();
        if !self.machine.run(&case, &mut out) {
            return None;
        }
        if out.regs.rip == self.last.ip() + new as u64 + 1 {
            out.regs.rip = self.last.ip() + old as u64 + 1;
        }
        Some(out)
    }

    fn bytes(&self) -> Vec<u8> {
        let start = self.case.starts.last().map_or(0, |s| *s as usize);
        self.case.code[start..start + self.last.len()].to_vec()
    }

    /// The case with the last instruction's memory operand at [`NEAR`].
    fn operand_near(&mut self) -> Option<Outcome> {
        let mut i = self.last;
        i.set_segment_prefix(Register::None);
        i.set_memory_base(Register::None);
        i.set_memory_index(Register::None);
        i.set_memory_index_scale(1);
        i.set_memory_displ_size(match self.case.mode {
            Mode::Long => 8,
            Mode::Segmented16 => 2,
            _ => 4,
        });
        i.set_memory_displacement64(NEAR - self.case.mode.data_base());
        let mut encoder = Encoder::new(self.case.mode.bits());
        encoder.encode(&i, self.last.ip()).ok()?;
        self.instead(&encoder.take_buffer())
    }

    /// The linear address of the last instruction's memory operand.
    fn operand(&self) -> Option<u64> {
        let offset = effective_address(&self.last, &self.soft.regs)?;
        Some(offset.wrapping_add(segment_base(&self.last, self.case.mode)))
    }

    fn memory_fault(&self) -> bool {
        matches!(self.soft.vector, 12..=14)
    }
}

/// Where an operand can be read and written.
const NEAR: u64 = DATA + 64;

fn is_prefix(mode: Mode, byte: u8) -> bool {
    matches!(byte, 0x26 | 0x2E | 0x36 | 0x3E | 0x64..=0x67 | 0xF0 | 0xF2 | 0xF3)
        || mode == Mode::Long && byte & 0xF0 == 0x40
}

fn narrow_element(look: &mut Look) -> Option<Outcome> {
    let known =
        matches!(look.last.code(), Code::VEX_Vpinsrd_xmm_xmm_rm32_imm8 | Code::VEX_Vpextrd_rm32_xmm_imm8);
    if !known || look.case.mode == Mode::Long || look.soft.vector != 6 {
        return None;
    }
    let mut bytes = look.bytes();
    let vex = bytes.iter().position(|b| !is_prefix(look.case.mode, *b))?;
    bytes[vex + 2] &= 0x7F;
    look.instead(&bytes)
}

fn pause(look: &mut Look) -> Option<Outcome> {
    if look.last.code() != Code::Pause || look.case.mode != Mode::Long {
        return None;
    }
    let mut bytes = look.bytes();
    let rex = bytes.iter_mut().rev().nth(1).filter(|b| **b & 0xF1 == 0x41)?;
    *rex &= !1;
    look.instead(&bytes)
}

fn wrap(look: &mut Look) -> Option<Outcome> {
    let mut info = InstructionInfoFactory::new();
    let near = |address: u64| (address as u32).wrapping_add(64) < 128;
    let regs = &look.soft.regs;
    let reaches = info.info(&look.last).used_memory().iter().any(|m| {
        let value = |r: Register| if r.is_gpr() { regs.gpr[r.full_register().number()] } else { 0 };
        m.virtual_address(0, |r, _, _| Some(value(r))).is_some_and(near)
    });
    let flat = look.case.mode == Mode::Flat32 && matches!(look.soft.vector, 12 | 13) && look.soft.error == 0;
    let fault = look.real.vector == 14 && look.real.error & 4 != 0 && near(look.real.cr2);
    (flat && reaches && fault).then(|| Outcome {
        vector: 14,
        error: look.real.error,
        cr2: look.real.cr2,
        ..look.soft.clone()
    })
}

fn numeric_first(look: &mut Look) -> Option<Outcome> {
    use Mnemonic::{Fbstp, Fist, Fistp, Fisttp, Fst, Fstp};
    if !matches!(look.last.mnemonic(), Fst | Fstp | Fist | Fistp | Fisttp | Fbstp) || !look.memory_fault() {
        return None;
    }
    let out = look.operand_near()?;
    // Nothing is stored.
    (out.vector == 3 && out.data == look.soft.data).then_some(out)
}

fn partial_store(look: &mut Look) -> Option<Outcome> {
    let at = look.operand()?.wrapping_sub(DATA) as usize;
    let first = match look.last.code() {
        Code::Fbstp_m80bcd | Code::Fstp_m80fp => 8,
        // As much as lies in the first page.
        Code::Movbe_m16_r16 | Code::Movbe_m32_r32 | Code::Movbe_m64_r64 => 0x1000 - (at & 0xFFF),
        _ => return None,
    };
    if look.soft.vector != 14 {
        return None;
    }
    let stored = look.operand_near()?;
    let near = (NEAR - DATA) as usize;
    let mut out = look.soft.clone();
    let from = stored.data.get(near..near + first)?;
    out.data.get_mut(at..at.checked_add(first)?)?.copy_from_slice(from);
    Some(out)
}

fn partial_push(look: &mut Look) -> Option<Outcome> {
    let size = match look.last.code() {
        Code::Pushaw => 2,
        Code::Pushad => 4,
        _ => return None,
    };
    if !look.memory_fault() {
        return None;
    }
    let mask = if look.case.mode == Mode::Segmented16 { 0xFFFF } else { 0xFFFF_FFFF };
    let mut out = look.soft.clone();
    let mut sp = out.regs.gpr[4];
    for value in &look.soft.regs.gpr[..8] {
        sp = sp.wrapping_sub(size as u64) & mask;
        let at = sp.wrapping_add(look.case.mode.data_base()).wrapping_sub(DATA) as usize;
        let Some(slot) = at.checked_add(size).and_then(|end| out.data.get_mut(at..end)) else { break };
        slot.copy_from_slice(&value.to_le_bytes()[..size]);
    }
    Some(out)
}

fn either_operand(look: &mut Look) -> Option<Outcome> {
    use Mnemonic::{Cmpsb, Cmpsd, Cmpsq, Cmpsw};
    let known = matches!(look.last.mnemonic(), Cmpsb | Cmpsw | Cmpsd | Cmpsq);
    (known && look.memory_fault() && matches!(look.real.vector, 12..=14)).then(|| Outcome {
        vector: look.real.vector,
        error: look.real.error,
        cr2: look.real.cr2,
        ..look.soft.clone()
    })
}

fn top_cleared(look: &mut Look) -> Option<Outcome> {
    let known = matches!(
        look.last.code(),
        Code::Movd_rm32_mm | Code::Movq_rm64_mm | Code::Movq_mmm64_mm | Code::Movntq_m64_mm
    );
    if !known || !look.memory_fault() {
        return None;
    }
    let mut out = look.soft.clone();
    let fsw = out.regs.word(2);
    let top = (fsw >> 11 & 7) as usize;
    out.regs.fx[2..4].copy_from_slice(&(fsw & !0x3800).to_le_bytes());
    for n in 0..8 {
        let from = 32 + (n + 8 - top) % 8 * 16;
        out.regs.fx[32 + n * 16..48 + n * 16].copy_from_slice(&look.soft.regs.fx[from..from + 16]);
    }
    Some(out)
}

fn flags_first(look: &mut Look) -> Option<Outcome> {
    if look.last.mnemonic() != Mnemonic::Vcvtps2ph || !look.memory_fault() {
        return None;
    }
    let done = look.operand_near()?;
    if done.vector == 19 {
        return Some(Outcome { data: look.soft.data, ..done });
    }
    let mut out = look.soft.clone();
    out.regs.fx[24..28].copy_from_slice(&done.regs.fx[24..28]);
    (done.vector == 3).then_some(out)
}

fn masked_byte(look: &mut Look) -> Option<Outcome> {
    let size = match look.last.mnemonic() {
        Mnemonic::Vmaskmovps | Mnemonic::Vpmaskmovd => 4,
        Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovq => 8,
        _ => return None,
    };
    if look.last.op0_kind() != OpKind::Memory || look.soft.vector != 14 {
        return None;
    }
    let mask = look.last.op1_register().number();
    let at = look.operand()?;
    // The last byte of all that is asked for.
    let asked = |end: usize| look.soft.regs.fx[160 + mask * 16 + end] & 0x80 != 0;
    let end = (size - 1..16).step_by(size).rev().find(|end| asked(*end))?;
    let cr2 = at + end as u64;
    (cr2 >> 12 == look.soft.cr2 >> 12).then(|| Outcome { cr2, ..look.soft.clone() })
}

fn bound_first(look: &mut Look) -> Option<Outcome> {
    let size = match look.last.code() {
        Code::Bound_r16_m1616 => 2,
        Code::Bound_r32_m3232 => 4,
        _ => return None,
    };
    let at = look.operand()?.wrapping_sub(DATA) as usize;
    if at >= DATA_SIZE || !look.memory_fault() {
        return None;
    }
    let signed = |bytes: &[u8]| match *bytes {
        [a, b] => Some(i32::from(i16::from_le_bytes([a, b]))),
        [a, b, c, d] => Some(i32::from_le_bytes([a, b, c, d])),
        _ => None,
    };
    let lower = signed(look.soft.data.get(at..at + size)?)?;
    let index = look.soft.regs.gpr[look.last.op0_register().full_register().number()].to_le_bytes();
    (signed(&index[..size])? < lower).then(|| Outcome { vector: 5, error: 0, ..look.soft.clone() })
}

fn narrow_pointers(look: &mut Look) -> Option<Outcome> {
    let i = &look.last;
    let repeated = i.has_rep_prefix() || i.has_repne_prefix();
    let narrow = look.bytes().iter().take_while(|b| is_prefix(look.case.mode, **b)).any(|b| *b == 0x67);
    if look.case.mode != Mode::Long
        || !i.is_string_instruction()
        || !repeated
        || !narrow
        || !look.memory_fault()
    {
        return None;
    }
    let uses = |list: &[OpKind]| (0..i.op_count()).any(|n| list.contains(&i.op_kind(n)));
    let mut out = look.soft.clone();
    if uses(&[OpKind::MemorySegESI]) {
        out.regs.gpr[6] &= 0xFFFF_FFFF;
    }
    if uses(&[OpKind::MemoryESEDI]) {
        out.regs.gpr[7] &= 0xFFFF_FFFF;
    }
    Some(out)
}
