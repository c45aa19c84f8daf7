//! The host code of vector instructions: mostly themselves.

use super::super::op::VecOp;
use super::asm::*;
use super::block::Compiler;
use super::flags::Flags;
use super::stubs::NONE;
use crate::simd::{self, Form, Map, Native, Prefix};

impl Compiler<'_> {
    /// Emit vector instruction `i`.
    pub fn vector(&mut self, i: usize, native: Native, mem: bool) {
        // SAFETY: `imm` points to what the block owns.
        let insn = unsafe { &(*(self.op(i).imm as *const VecOp)).insn };
        let level = 1 + native.vex.is_some() as u8;
        let clobbers = mem || self.loaded() < level;
        self.before(i, clobbers);
        self.load_vectors(i, level);
        let mut access = None;
        if mem {
            let size = native.size as u64;
            let mut open = if native.align {
                self.operand_alone(i, size, native.write)
            } else {
                self.operand(i, size, native.write)
            };
            if native.align {
                self.a.test_imm(1, Rm::R(RDI), native.size as i32 - 1);
                open.slow.push(self.a.jcc(cc::NE));
            }
            access = Some(open);
        }
        let prefix = match insn.prefix {
            Prefix::None => 0,
            Prefix::P66 => 0x66,
            Prefix::F3 => 0xF3,
            Prefix::F2 => 0xF2,
        };
        let map = match insn.map {
            Map::M0F38 => 2,
            Map::M0F3A => 3,
            _ => 1,
        };
        let general = matches!(native.form, Form::FromRm | Form::ToRm);
        let from = match insn.rm {
            simd::Rm::Mem => self.place,
            simd::Rm::Reg(r) if general => self.at(r),
            simd::Rm::Reg(r) => Rm::R(r),
        };
        if native.form == Form::Strings {
            self.a.load(8, RAX, self.at(0));
        }
        let mut put = |reg: u8, rm: Rm| {
            match native.vex {
                Some(vex) => {
                    let pp = insn.prefix as u8;
                    self.a.vex(pp, native.wide, vex.l, map, insn.opcode, vex.v, reg, rm);
                }
                None => self.a.enc(prefix, native.wide, map, insn.opcode, reg, rm, false),
            }
            self.a.b(native.imm.as_slice());
        };
        match (native.form, insn.rm) {
            (Form::ToReg, _) => match self.host[insn.reg as usize & 15] {
                NONE => {
                    put(RAX, from);
                    self.a.store(8, self.at(insn.reg & 15), RAX);
                }
                h => put(h, from),
            },
            (Form::ToRm, simd::Rm::Reg(r)) => match self.host[r as usize & 15] {
                NONE => {
                    put(insn.reg, Rm::R(RAX));
                    self.a.store(8, self.at(r & 15), RAX);
                }
                h => put(insn.reg, Rm::R(h)),
            },
            (Form::Plain, _) => {
                let l = native.vex.is_some_and(|v| v.l) as u8;
                self.a.b(&[0xC5, 0xF8 | l << 2, insn.opcode]);
            }
            (Form::Group, _) => put(insn.modrm >> 3 & 7, from),
            (Form::Strings, _) => {
                put(insn.reg, from);
            }
            _ => put(insn.reg, from),
        }
        if let Some(access) = access {
            self.join(access);
        }
        if matches!(native.form, Form::Flags | Form::Strings) {
            self.fl = Flags::HOST;
        } else {
            self.after(i, false);
        }
    }
}
