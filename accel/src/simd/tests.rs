//! Tests on a processor core that is nothing but registers and a little memory.

use super::*;

#[derive(Default)]
pub(super) struct Mock {
    pub state: CpuState,
    pub memory: Vec<u8>,
    /// The operand's address in `memory`.
    pub operand: u64,
    pub flags: [bool; 6],
}

impl Mock {
    pub fn new() -> Self {
        let mut m = Mock { memory: vec![0; 8192], ..Default::default() };
        m.state.cr4 = 1 << 9 | 1 << 10 | 1 << 18;
        m.state.xcr0 = 7;
        m
    }

    fn range(&self, offset: u64, len: usize) -> Result<std::ops::Range<usize>, Exception> {
        let start = (self.operand + offset) as usize;
        if start + len > self.memory.len() {
            return Err(Exception::page_fault(0, start as u64));
        }
        Ok(start..start + len)
    }

    pub fn set(&mut self, i: usize, value: u128) {
        self.state.vector.ymm[i][..16].copy_from_slice(&value.to_le_bytes());
    }

    pub fn get(&self, i: usize) -> u128 {
        u128::from_le_bytes(self.state.vector.ymm[i][..16].try_into().unwrap())
    }

    pub fn run(&mut self, mut insn: VecInsn) -> Result<(), Exception> {
        resolve::<Mock>(&mut insn).expect("known instruction")(self, &insn)
    }
}

impl Core for Mock {
    fn state(&mut self) -> &mut CpuState {
        &mut self.state
    }
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), Exception> {
        buf.copy_from_slice(&self.memory[self.range(offset, buf.len())?]);
        Ok(())
    }
    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), Exception> {
        let range = self.range(offset, buf.len())?;
        self.memory[range].copy_from_slice(buf);
        Ok(())
    }
    fn check_align(&mut self, align: u64) -> Result<(), Exception> {
        if self.operand.is_multiple_of(align) {
            Ok(())
        } else {
            Err(Exception::gp(0))
        }
    }
    fn set_flags(&mut self, cf: bool, pf: bool, af: bool, zf: bool, sf: bool, of: bool) {
        self.flags = [cf, pf, af, zf, sf, of];
    }
    fn flags_for_fcmov(&mut self) -> (bool, bool, bool) {
        (self.flags[0], self.flags[3], self.flags[1])
    }
    fn pointers(&mut self) -> ((u16, u64), (u16, u64)) {
        ((8, 0x1234), (16, self.operand))
    }
    fn cpl(&mut self) -> u8 {
        0
    }
    fn write_maskmov(&mut self, offset: u64, byte: u8) -> Result<(), Exception> {
        self.write(offset, &[byte])
    }
}

/// A register form; `rm` 8 and above stands for memory in `mem`.
pub(super) fn insn(map: Map, prefix: Prefix, opcode: u8, reg: u8, rm: Rm) -> VecInsn {
    let modrm = match rm {
        Rm::Reg(r) => 0xC0 | (reg & 7) << 3 | r & 7,
        Rm::Mem => (reg & 7) << 3,
    };
    VecInsn {
        map,
        prefix,
        opcode,
        modrm,
        reg,
        rm,
        rex_w: false,
        long: true,
        opsize16: false,
        imm: 0,
        vex: None,
        host: None,
    }
}

fn op(prefix: Prefix, opcode: u8) -> VecInsn {
    insn(Map::M0F, prefix, opcode, 1, Rm::Reg(2))
}

#[test]
fn addps_adds_and_keeps_sticky_flags() {
    let mut m = Mock::new();
    m.set(1, u128::from(1.5f32.to_bits()));
    m.set(2, u128::from(0.1f32.to_bits()));
    m.run(op(Prefix::None, 0x58)).unwrap();
    assert_eq!(f32::from_bits(m.get(1) as u32), 1.6);
    assert_eq!(m.state.vector.mxcsr, 0x1FA0);
}

#[test]
fn an_unmasked_zero_divide_stores_nothing() {
    let mut m = Mock::new();
    m.state.vector.mxcsr = 0x1D80;
    m.set(1, u128::from(1.0f64.to_bits()));
    assert_eq!(m.run(op(Prefix::F2, 0x5E)), Err(Exception::XM));
    assert_eq!(m.get(1), u128::from(1.0f64.to_bits()));
    assert_eq!(m.state.vector.mxcsr, 0x1D84);
    m.state.cr4 &= !(1 << 10);
    assert_eq!(m.run(op(Prefix::F2, 0x5E)), Err(Exception::UD));
}

#[test]
fn unmasked_underflow_is_signalled_for_an_exact_denormal() {
    let mut m = Mock::new();
    m.set(1, 0x0080_0000);
    m.set(2, u128::from(0.5f32.to_bits()));
    m.run(op(Prefix::F3, 0x59)).unwrap();
    assert_eq!((m.get(1), m.state.vector.mxcsr), (0x0040_0000, 0x1F80));
    m.set(1, 0x0080_0000);
    m.state.vector.mxcsr = 0x1780;
    assert_eq!(m.run(op(Prefix::F3, 0x59)), Err(Exception::XM));
    assert_eq!((m.get(1), m.state.vector.mxcsr), (0x0080_0000, 0x1790));
}

#[test]
fn memory_operands_have_exact_sizes_and_alignment() {
    let mut m = Mock::new();
    m.operand = 8192 - 4;
    m.memory[8188..].copy_from_slice(&2.0f32.to_le_bytes());
    m.set(1, u128::from(3.0f32.to_bits()) | 7 << 64);
    m.run(insn(Map::M0F, Prefix::F3, 0x59, 1, Rm::Mem)).unwrap();
    assert_eq!(m.get(1), u128::from(6.0f32.to_bits()) | 7 << 64);
    let before = m.state.clone();
    assert_eq!(m.run(insn(Map::M0F, Prefix::F2, 0x59, 1, Rm::Mem)).unwrap_err().vector, 14);
    assert_eq!(m.run(insn(Map::M0F, Prefix::None, 0x59, 1, Rm::Mem)), Err(Exception::gp(0)));
    assert_eq!(m.run(insn(Map::M0F, Prefix::None, 0x10, 1, Rm::Mem)).unwrap_err().vector, 14);
    assert_eq!(m.state, before);
    m.run(insn(Map::M0F38, Prefix::P66, 0x31, 1, Rm::Mem)).unwrap();
}

#[test]
fn availability_follows_the_control_registers() {
    let mut m = Mock::new();
    m.state.cr0 = 8;
    assert_eq!(m.run(op(Prefix::None, 0x28)), Err(Exception::NM));
    m.state.cr0 = 4;
    assert_eq!(m.run(op(Prefix::None, 0x28)), Err(Exception::UD));
    assert_eq!(m.run(insn(Map::M0F, Prefix::None, 0xFC, 0, Rm::Reg(1))), Err(Exception::UD));
    m.state.cr0 = 0;
    m.state.cr4 = 0;
    assert_eq!(m.run(op(Prefix::None, 0x28)), Err(Exception::UD));
    m.run(insn(Map::M0F, Prefix::None, 0xFC, 0, Rm::Reg(1))).unwrap();
    m.state.x87.fsw = 0x80;
    assert_eq!(m.run(insn(Map::M0F, Prefix::None, 0xFC, 0, Rm::Reg(1))), Err(Exception::MF));
}

#[test]
fn mmx_aliases_the_x87_registers() {
    let mut m = Mock::new();
    m.state.x87.top = 5;
    m.state.x87.st[1][..8].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 0xFF]);
    m.state.x87.st[2][..8].copy_from_slice(&[1; 8]);
    m.run(insn(Map::M0F, Prefix::None, 0xFC, 1, Rm::Reg(2))).unwrap();
    assert_eq!(m.state.x87.st[1][..10], [2, 3, 4, 5, 6, 7, 8, 0, 0xFF, 0xFF]);
    assert_eq!((m.state.x87.top, m.state.x87.tag), (0, 0xFF));
    m.run(insn(Map::M0F, Prefix::None, 0x77, 0, Rm::Reg(0))).unwrap();
    assert_eq!(m.state.x87.tag, 0);
}

#[test]
fn moves_shuffles_and_strings() {
    let mut m = Mock::new();
    m.set(1, 0x0F0E_0D0C_0B0A_0908_0706_0504_0302_0100);
    m.state.gpr[2] = 0xAABB_CCDD_EEFF_0011;
    let mut i = insn(Map::M0F3A, Prefix::P66, 0x22, 1, Rm::Reg(2));
    (i.rex_w, i.imm) = (true, 1);
    m.run(i).unwrap();
    assert_eq!(m.get(1) >> 64, 0xAABB_CCDD_EEFF_0011);
    let mut i = insn(Map::M0F, Prefix::P66, 0x70, 3, Rm::Reg(1));
    i.imm = 0x1B;
    m.run(i).unwrap();
    assert_eq!(m.get(3), 0x0302_0100_0706_0504_EEFF_0011_AABB_CCDD);
    let mut i = insn(Map::M0F, Prefix::P66, 0x73, 3, Rm::Reg(3));
    (i.modrm, i.imm) = (0xDB, 4);
    m.run(i).unwrap();
    assert_eq!(m.get(3), 0x0302_0100_0706_0504_EEFF_0011);
    m.run(insn(Map::M0F, Prefix::P66, 0xD7, 0, Rm::Reg(3))).unwrap();
    assert_eq!(m.state.gpr[0], 0b1100);
    // PCMPISTRI, equal any: the first of "lo" in "hello".
    m.set(1, u128::from(u16::from_le_bytes(*b"lo")));
    let mut hello = [0u8; 16];
    hello[..5].copy_from_slice(b"hello");
    m.set(2, u128::from_le_bytes(hello));
    m.run(insn(Map::M0F3A, Prefix::P66, 0x63, 1, Rm::Reg(2))).unwrap();
    assert_eq!(m.state.gpr[1], 2);
    assert_eq!(m.flags, [true, false, false, true, true, false]);
}

#[test]
fn conversions_use_general_registers_of_both_widths() {
    let mut m = Mock::new();
    m.state.gpr[2] = (-3i64) as u64;
    let mut i = insn(Map::M0F, Prefix::F2, 0x2A, 1, Rm::Reg(2));
    m.run(i).unwrap();
    assert_eq!(f64::from_bits(m.get(1) as u64), -3.0);
    i.rex_w = true;
    m.state.gpr[2] = 1 << 40;
    m.run(i).unwrap();
    assert_eq!(f64::from_bits(m.get(1) as u64), (1u64 << 40) as f64);
    let mut i = insn(Map::M0F, Prefix::F2, 0x2D, 3, Rm::Reg(1));
    m.run(i).unwrap();
    assert_eq!(m.state.gpr[3], 0x8000_0000);
    i.rex_w = true;
    m.run(i).unwrap();
    assert_eq!(m.state.gpr[3], 1 << 40);
    m.set(2, u128::from(f64::NAN.to_bits()));
    m.run(insn(Map::M0F, Prefix::P66, 0x2E, 1, Rm::Reg(2))).unwrap();
    assert_eq!(m.flags, [true, true, false, true, false, false]);
}

fn group(opcode: u8, reg: u8, rex_w: bool) -> VecInsn {
    VecInsn { rex_w, ..insn(Map::M0F, Prefix::None, opcode, reg, Rm::Mem) }
}

#[test]
fn fxsave_and_xsave_images_come_back() {
    for (save, load, rex_w) in [
        (group(0xAE, 0, true), group(0xAE, 1, true), true),
        (group(0xAE, 4, true), group(0xAE, 5, true), true),
        (group(0xAE, 6, true), group(0xAE, 5, true), true),
        (group(0xC7, 4, true), group(0xAE, 5, true), true),
    ] {
        let _ = rex_w;
        let mut m = Mock::new();
        m.operand = 1024;
        m.state.gpr[0] = 7;
        let fxsave = save.opcode == 0xAE && save.modrm >> 3 & 7 == 0;
        for i in 0..16 {
            m.set(i, 0x1111 * i as u128);
            if !fxsave {
                m.state.vector.ymm[i][20] = i as u8;
            }
        }
        m.state.vector.mxcsr = 0x1FA5;
        m.state.x87.top = 3;
        m.state.x87.fsw = 0x4100;
        m.state.x87.fcw = 0x27F;
        m.state.x87.tag = 0x18;
        m.state.x87.fip = 0x1234_5678_9ABC;
        m.state.x87.st[3] = [1, 2, 3, 4, 5, 6, 7, 0x80, 0xFF, 0x3F, 0, 0, 0, 0, 0, 0];
        let saved = m.state.clone();
        m.run(save).unwrap();
        m.state.vector = Default::default();
        m.state.x87 = Default::default();
        m.run(load).unwrap();
        assert_eq!(m.state, saved);
    }
}

#[test]
fn xrstor_initialises_what_the_header_leaves_out_and_checks_it() {
    let mut m = Mock::new();
    m.operand = 1024;
    m.state.gpr[0] = 7;
    m.set(4, 99);
    m.state.x87.tag = 1;
    m.memory[1024 + 24..1024 + 28].copy_from_slice(&0x1F00u32.to_le_bytes());
    m.run(group(0xAE, 5, false)).unwrap();
    assert_eq!((m.get(4), m.state.x87.tag, m.state.vector.mxcsr), (0, 0, 0x1F00));
    m.memory[1024 + 512] = 8;
    assert_eq!(m.run(group(0xAE, 5, false)), Err(Exception::gp(0)));
    m.memory[1024 + 512] = 0;
    m.memory[1024 + 26] = 1;
    assert_eq!(m.run(group(0xAE, 5, false)), Err(Exception::gp(0)));
    m.operand = 1032;
    assert_eq!(m.run(group(0xAE, 5, false)), Err(Exception::gp(0)));
    m.state.cr4 = 0;
    assert_eq!(m.run(group(0xAE, 5, false)), Err(Exception::UD));
}

#[test]
fn ldmxcsr_refuses_reserved_bits() {
    let mut m = Mock::new();
    m.memory[..4].copy_from_slice(&0x1_0000u32.to_le_bytes());
    assert_eq!(m.run(group(0xAE, 2, false)), Err(Exception::gp(0)));
    m.memory[..4].copy_from_slice(&0xFFC0u32.to_le_bytes());
    m.run(group(0xAE, 2, false)).unwrap();
    assert_eq!(m.state.vector.mxcsr, 0xFFC0);
}

#[test]
fn every_operation_of_the_table_has_a_routine_and_a_handler() {
    let mut known = 0;
    for map in [Map::M0F, Map::M0F38, Map::M0F3A] {
        for prefix in [Prefix::None, Prefix::P66, Prefix::F3, Prefix::F2] {
            for opcode in 0..=255u8 {
                let Some(op) = table::lookup(map, prefix, opcode) else { continue };
                if !host_supports(op.feature) {
                    continue;
                }
                for imm in [0u8, 0x41, 0xFF] {
                    let mut m = Mock::new();
                    let i = VecInsn { imm, ..insn(map, prefix, opcode, 1, Rm::Reg(2)) };
                    m.run(i).unwrap();
                    m.run(VecInsn { rm: Rm::Mem, modrm: 0, ..i }).unwrap();
                }
                known += 1;
            }
        }
    }
    assert!(known > 250, "{known}");
}

#[test]
fn of_several_nans_a_dot_product_gives_the_first() {
    if !host_supports(Feature::Sse41) {
        return;
    }
    let lanes = |v: [u32; 4]| v.iter().rev().fold(0u128, |all, lane| all << 32 | u128::from(*lane));
    let (one, zero, inf) = (1f32.to_bits(), 0, f32::INFINITY.to_bits());
    let nan = |payload: u32| 0x7FC0_0000 | payload;
    let indefinite = 0xFFC0_0000;
    for (a, b, imm, result) in [
        ([nan(1), nan(2), nan(3), nan(4)], [one; 4], 0xFF, nan(1)),
        ([nan(1), nan(2), nan(3), nan(4)], [nan(5); 4], 0xEF, nan(2)),
        ([one, one, nan(3), one], [one, one, one, nan(4)], 0xFF, nan(3)),
        // A signalling one is quieted; a product's second operand counts when the first is none.
        ([one; 4], [one, 0x7F80_0002, nan(3), one], 0xFF, nan(2)),
        // 0 + 1 comes before 2 and 3.
        ([inf, inf, nan(3), one], [one, inf ^ 1 << 31, one, one], 0xFF, indefinite),
        ([inf, nan(2), one, one], [zero, one, one, one], 0xFF, indefinite),
        ([one, one, one, one], [one; 4], 0xFF, 4f32.to_bits()),
    ] {
        for (out, expected) in [(imm, [result; 4]), (imm & 0xF0 | 5, [result, 0, result, 0])] {
            let mut m = Mock::new();
            m.set(1, lanes(a));
            m.set(2, lanes(b));
            m.run(VecInsn { imm: out, ..insn(Map::M0F3A, Prefix::P66, 0x40, 1, Rm::Reg(2)) }).unwrap();
            assert_eq!(m.get(1), lanes(expected), "{a:x?} {b:x?} {out:#x}");
        }
    }
    let wide = |low: u64, high: u64| u128::from(low) | u128::from(high) << 64;
    let mut m = Mock::new();
    m.set(1, wide(1f64.to_bits(), f64::NAN.to_bits() | 2));
    m.set(2, wide(f64::NAN.to_bits() | 1, 1f64.to_bits()));
    m.run(VecInsn { imm: 0x33, ..insn(Map::M0F3A, Prefix::P66, 0x41, 1, Rm::Reg(2)) }).unwrap();
    assert_eq!(m.get(1), wide(f64::NAN.to_bits() | 1, f64::NAN.to_bits() | 1));
}
