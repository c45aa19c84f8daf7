//! Where the guest's arithmetic flags are while a block is compiled.
//!
//! They may be in the host's flags, in their slot, or nowhere but implied by registers that still hold what
//! they were computed from (a recipe). Storing them is put off as long as possible: most are overwritten
//! before anyone looks, and what looks first is often code out of line.

use super::super::op::FLAGS;
use super::asm::*;
use super::block::Compiler;
use super::kind::*;
use super::stubs::{self, mem, NONE};

/// How to compute flags again.
#[derive(Clone, Copy, Debug)]
pub enum Recipe {
    Cmp {
        size: u8,
        a: u8,
        b: Val,
    },
    Test {
        size: u8,
        a: u8,
        b: Val,
    },
    /// `d` is the sum of its old value and `s`.
    Add {
        size: u8,
        d: u8,
        s: Val,
    },
    /// `d` is the difference.
    Sub {
        size: u8,
        d: u8,
        s: Val,
    },
}

impl Recipe {
    fn uses(&self) -> u16 {
        let (a, b) = match *self {
            Recipe::Cmp { a, b, .. } | Recipe::Test { a, b, .. } => (a, b),
            Recipe::Add { d, s, .. } | Recipe::Sub { d, s, .. } => (d, s),
        };
        1 << a | if let Val::Reg(r) = b { 1 << r } else { 0 }
    }
}

/// What OF must be where the host leaves it undefined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overflow {
    /// The host's.
    Host,
    Clear,
    /// CF xor SF.
    Shl,
}

#[derive(Clone, Copy, Debug)]
pub struct Flags {
    /// Those that the host's flags hold.
    pub host: u8,
    /// The host leaves AF undefined where it must be clear.
    pub clear_af: bool,
    pub overflow: Overflow,
    /// The slot holds them all.
    pub kept: bool,
    pub recipe: Option<Recipe>,
}

impl Flags {
    pub const KEPT: Flags =
        Flags { host: 0, clear_af: false, overflow: Overflow::Host, kept: true, recipe: None };
    /// The host's flags are the guest's.
    pub const HOST: Flags = Flags { host: ALL, kept: false, ..Flags::KEPT };
    /// After AND, OR, XOR, TEST.
    pub const LOGIC: Flags = Flags { host: ALL & !AF, clear_af: true, ..Flags::HOST };

    pub fn with(self, recipe: Option<Recipe>) -> Flags {
        Flags { recipe, ..self }
    }
    fn safe(&self) -> bool {
        self.kept || self.recipe.is_some()
    }
}

const STORED: u8 = CF | PF | ZF | SF;

impl Compiler<'_> {
    /// Keep in sight what instruction `i` must not lose: the flags before it if it may leave to the
    /// interpreter or clobbers the host's flags on the way, those after it if it changes what they follow from.
    pub fn before(&mut self, i: usize, clobbers: bool) {
        let clobbers = clobbers && !self.calm(i);
        let kind = self.trace.kinds[i];
        let e = kind.effects();
        let passes = e.writes != ALL && self.need[i + 1];
        if let Some(r) = self.fl.recipe {
            if r.uses() & kind.changes() != 0 && passes && !self.fl.kept {
                if self.fl.host & STORED == STORED && !clobbers {
                    self.fl.recipe = None;
                } else {
                    self.keep();
                }
            }
        }
        if clobbers && self.need[i] && !self.fl.safe() {
            self.keep();
        }
    }

    /// After instruction `i`, which left the flags alone: a recipe may no longer hold.
    pub fn after(&mut self, i: usize, clobbers: bool) {
        let clobbers = clobbers && !self.calm(i);
        let changed = self.trace.kinds[i].changes();
        if self.fl.recipe.is_some_and(|r| r.uses() & changed != 0) {
            self.fl.recipe = None;
        }
        if clobbers {
            self.fl.host = 0;
        }
    }

    /// Store the flags into their slot. Uses RAX.
    pub fn keep(&mut self) {
        if self.fl.kept {
            return;
        }
        if self.fl.host & STORED != STORED {
            self.replay();
        }
        let (clear_af, overflow) = (self.fl.clear_af, self.fl.overflow);
        keep_host(&mut self.a, clear_af, overflow);
        if clear_af || overflow == Overflow::Shl {
            self.fl.host = 0;
        }
        self.fl.kept = true;
    }

    /// Compute the flags into the host's by the recipe. Uses RAX.
    fn replay(&mut self) {
        let Some(r) = self.fl.recipe else {
            debug_assert!(false, "flags are lost");
            return;
        };
        self.fl.host = ALL;
        self.fl.clear_af = false;
        self.fl.overflow = Overflow::Host;
        match r {
            Recipe::Cmp { size, a, b } => self.compare(7, size, a, b),
            Recipe::Test { size, a, b } => {
                self.compare(8, size, a, b);
                self.fl.clear_af = true;
                self.fl.host = ALL & !AF;
            }
            Recipe::Add { size, d, s } => {
                self.a.load(8, RAX, self.at(d));
                self.alu_val(5, size, Rm::R(RAX), s);
                self.alu_val(0, size, Rm::R(RAX), s);
            }
            Recipe::Sub { size, d, s } => {
                self.a.load(8, RAX, self.at(d));
                self.alu_val(0, size, Rm::R(RAX), s);
                self.alu_val(5, size, Rm::R(RAX), s);
            }
        }
    }

    /// The host's flags hold at least `mask`. Uses RAX.
    pub fn want(&mut self, mask: u8) {
        if self.fl.host & mask == mask {
            return;
        }
        if !self.fl.kept {
            if self.fl.recipe.is_some() {
                self.replay();
                return;
            }
            self.keep();
        }
        if mask == CF {
            self.a.word(2, 1, 0xBA, 4, mem(FLAGS)); // bt
            self.a.b(&[8]);
            self.fl.host = CF;
        } else {
            stubs::restore_flags(&mut self.a);
            self.fl.host = ALL;
        }
        self.fl.clear_af = false;
        self.fl.overflow = Overflow::Host;
    }

    /// `rm op= val`.
    pub fn alu_val(&mut self, op: u8, size: u8, rm: Rm, val: Val) {
        match val {
            Val::Imm(v) => self.a.alu_imm(size, op, rm, v),
            Val::Reg(r) if self.host[r as usize] != NONE => self.a.alu(size, op, rm, self.host[r as usize]),
            Val::Reg(r) => match rm {
                Rm::R(h) => self.a.alu_load(size, op, h, mem(r as usize)),
                _ => unreachable!("two operands in memory"),
            },
        }
    }

    /// CMP (7) or TEST (8) of a register.
    pub fn compare(&mut self, op: u8, size: u8, a: u8, b: Val) {
        let mut rm = self.at(a);
        if let (Rm::M(..), Val::Reg(r)) = (rm, b) {
            if self.host[r as usize] == NONE {
                self.a.load(8, RAX, rm);
                rm = Rm::R(RAX);
            }
        }
        if op == 7 {
            self.alu_val(7, size, rm, b);
            return;
        }
        match b {
            Val::Imm(v) => self.a.test_imm(size, rm, v),
            Val::Reg(r) if self.host[r as usize] != NONE => self.a.test(size, rm, self.host[r as usize]),
            // TEST has no order of operands.
            Val::Reg(r) => {
                let Rm::R(h) = rm else { unreachable!("two operands in memory") };
                self.a.test(size, mem(r as usize), h);
            }
        }
    }
}

/// Store the host's flags into the slot, as one word: what reads them back as a word must not wait. Uses RAX.
pub fn keep_host(a: &mut Asm, clear_af: bool, overflow: Overflow) {
    match overflow {
        Overflow::Host => a.setcc(cc::O, Rm::R(RAX)),
        Overflow::Clear => a.b(&[0xB0, 0]), // mov al, 0
        Overflow::Shl => {}
    }
    a.b(&[0x9F]); // lahf
    if overflow == Overflow::Shl {
        // AL = CF xor SF
        a.b(&[0x88, 0xE0]); // mov al, ah
        a.b(&[0xD0, 0xC0]); // rol al, 1
        a.b(&[0x30, 0xE0]); // xor al, ah
        a.b(&[0x24, 0x01]); // and al, 1
    }
    if clear_af {
        a.b(&[0x80, 0xE4, 0xEF]); // and ah, ~AF
    }
    a.store(2, mem(FLAGS), RAX);
}
