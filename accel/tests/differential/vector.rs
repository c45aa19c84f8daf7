//! The vector and x87 unit alone as the subject: decodes just enough to hand it one instruction.

use ftvm_accel::simd::{resolve, Core, Map, Prefix, Rm, VecInsn};
use ftvm_accel::state::CpuState;
use ftvm_accel::Exception;
use iced_x86::{Decoder, Instruction, OpKind};

use super::case::{Case, Outcome, CODE, DATA, DATA_SIZE, READ_ONLY};

pub struct Vector {
    state: CpuState,
    flags: u64,
    address: u64,
    rdi: u64,
    data: Vec<u8>,
}

impl Vector {
    pub fn new() -> Vector {
        let state = CpuState { cr4: 1 << 9 | 1 << 10 | 1 << 18, cr0: 1, xcr0: 7, ..Default::default() };
        Vector { state, flags: 2, address: 0, rdi: 0, data: vec![0; DATA_SIZE] }
    }

    fn access(&self, addr: u64, len: usize, write: bool) -> Result<(), Exception> {
        for a in (0..len as u64).map(|i| addr.wrapping_add(i)) {
            if (a as i64) << 16 >> 16 != a as i64 {
                return Err(Exception::gp(0));
            }
            let present = (DATA..DATA + DATA_SIZE as u64).contains(&a);
            let read_only = (READ_ONLY..READ_ONLY + 4096).contains(&a) || (CODE..CODE + 4096).contains(&a);
            if !present && (write || !read_only) {
                return Err(Exception::page_fault(4 | u32::from(write) << 1 | u32::from(read_only), a));
            }
        }
        Ok(())
    }

    /// False: this is not an instruction of the unit.
    pub fn run(&mut self, case: &Case, out: &mut Outcome) -> bool {
        let start = case.starts[0] as usize;
        let bytes = &case.code[start..start + 15];
        let mut d = Decoder::with_ip(if case.long { 64 } else { 32 }, bytes, case.regs.rip, 0);
        let i = d.decode();
        let odd = matches!(i.mnemonic(), iced_x86::Mnemonic::Maskmovq | iced_x86::Mnemonic::Maskmovdqu);
        if odd && bytes[..4].contains(&0x67) {
            return false;
        }
        let offsets = d.get_constant_offsets(&i);
        let Some(insn) = describe(bytes, &i, case.long, offsets.immediate_offset()) else { return false };
        let Some(f) = resolve::<Vector>(&insn) else { return false };
        super::soft_state::load(&mut self.state, &case.regs);
        self.flags = case.regs.flags;
        self.data.copy_from_slice(&case.data);
        self.rdi = case.regs.gpr[7];
        self.address = i
            .virtual_address(memory_operand(&i), 0, |r, _, _| {
                Some(if r.is_segment_register() {
                    0
                } else {
                    let v = case.regs.gpr[r.full_register().number()];
                    if r.size() == 4 {
                        v & 0xFFFF_FFFF
                    } else {
                        v
                    }
                })
            })
            .unwrap_or(0);
        let result = f(self, &insn);
        out.error = 0;
        out.cr2 = 0;
        match result {
            Ok(()) => {
                out.vector = 3;
                out.regs.rip = case.regs.rip + i.len() as u64 + 1;
            }
            Err(e) => {
                out.vector = e.vector;
                out.error = e.error.unwrap_or(0);
                out.cr2 = e.cr2;
                out.regs.rip = case.regs.rip;
            }
        }
        out.regs.flags = self.flags;
        super::soft_state::store(&self.state, &mut out.regs);
        out.data.copy_from_slice(&self.data);
        true
    }
}

fn memory_operand(i: &Instruction) -> u32 {
    (0..i.op_count()).find(|n| i.op_kind(*n) == OpKind::Memory).unwrap_or(0)
}

fn describe(bytes: &[u8], i: &Instruction, long: bool, imm_at: usize) -> Option<VecInsn> {
    let (mut at, mut rex) = (0, 0);
    let (mut p66, mut rep) = (false, Prefix::None);
    loop {
        match bytes[at] {
            0x66 => p66 = true,
            0xF2 => rep = Prefix::F2,
            0xF3 => rep = Prefix::F3,
            0x2E if !long => return None,
            0x67 | 0x26 | 0x2E | 0x36 | 0x3E => {}
            0xF0 => return None,
            b if long && b & 0xF0 == 0x40 => {
                rex = b;
                at += 1;
                break;
            }
            _ => break,
        }
        at += 1;
    }
    let (map, opcode) = match (bytes[at], bytes[at + 1]) {
        (0x0F, 0x38) => (Map::M0F38, bytes[at + 2]),
        (0x0F, 0x3A) => (Map::M0F3A, bytes[at + 2]),
        (0x0F, op) => (Map::M0F, op),
        (op @ 0xD8..=0xDF, _) => (Map::X87, op),
        _ => return None,
    };
    at += match map {
        Map::X87 => 1,
        Map::M0F => 2,
        _ => 3,
    };
    let modrm = bytes[at];
    let prefix = match (rep, p66) {
        _ if map == Map::X87 => Prefix::None,
        (Prefix::None, true) => Prefix::P66,
        (r, _) => r,
    };
    let rm = if modrm < 0xC0 { Rm::Mem } else { Rm::Reg(modrm & 7 | (rex & 1) << 3) };
    Some(VecInsn {
        map,
        prefix,
        opcode,
        modrm,
        reg: modrm >> 3 & 7 | (rex & 4) << 1,
        rm,
        rex_w: rex & 8 != 0,
        long,
        opsize16: p66,
        imm: if imm_at != 0 { bytes[i.len() - 1] } else { 0 },
    })
}

impl Core for Vector {
    fn state(&mut self) -> &mut CpuState {
        &mut self.state
    }
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), Exception> {
        let addr = self.address.wrapping_add(offset);
        self.access(addr, buf.len(), false)?;
        if (DATA..DATA + DATA_SIZE as u64).contains(&addr) {
            buf.copy_from_slice(&self.data[(addr - DATA) as usize..][..buf.len()]);
        } else if addr >= READ_ONLY {
            buf.fill(0);
        } else {
            buf.fill(0xCC);
        }
        Ok(())
    }
    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), Exception> {
        let addr = self.address.wrapping_add(offset);
        self.access(addr, buf.len(), true)?;
        self.data[(addr - DATA) as usize..][..buf.len()].copy_from_slice(buf);
        Ok(())
    }
    fn check_align(&mut self, align: u64) -> Result<(), Exception> {
        if self.address & (align - 1) == 0 {
            Ok(())
        } else {
            Err(Exception::gp(0))
        }
    }
    fn set_flags(&mut self, cf: bool, pf: bool, af: bool, zf: bool, sf: bool, of: bool) {
        let bits = [(cf, 0), (pf, 2), (af, 4), (zf, 6), (sf, 7), (of, 11)];
        self.flags &= !0x8D5;
        self.flags |= bits.iter().fold(0, |f, (on, n)| f | u64::from(*on) << n);
    }
    fn flags_for_fcmov(&mut self) -> (bool, bool, bool) {
        (self.flags & 1 != 0, self.flags & 0x40 != 0, self.flags & 4 != 0)
    }
    fn pointers(&mut self) -> ((u16, u64), (u16, u64)) {
        ((0, 0), (0, 0))
    }
    fn cpl(&mut self) -> u8 {
        3
    }
    fn write_maskmov(&mut self, offset: u64, byte: u8) -> Result<(), Exception> {
        self.address = self.rdi;
        self.write(offset, &[byte])
    }
}
