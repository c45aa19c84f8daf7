//! The ways from one trace to another: jumps within the page, to other pages, returns, indirect jumps.

use super::super::cache::{CROSSING, NO_KEY, SHORT};
use super::super::op::{Block, KEY, LEFT, PAGE, RSP as GUEST_SP, SHORT_KEYS};
use super::super::SoftCpu;
use super::asm::*;
use super::block::{needs_flags, Access, Compiler};
use super::cold::{Astray, Cold};
use super::memory::Site;
use super::stubs::{mem, mem_at, returns, HOST};
use super::{near_hole, Jit, CHARGE, FAR};
use std::mem::offset_of;

/// A way from one trace to another.
pub struct Edge {
    /// Of the displacement of the jump (or what stands for one).
    jump_at: u64,
    /// Of the displacement of the jump that leaves while it is not linked.
    pub leave_at: u64,
    pub way: Way,
}

#[derive(Clone, Copy)]
pub enum Way {
    /// A jump to a block of the same guest page.
    Within {
        /// Of the budget's decrement.
        count_at: u64,
        /// Instructions of the trace that it leads to; 0: not linked.
        count: u32,
        /// Instructions that the trace it leaves was charged for and does not run.
        back: u32,
    },
    /// To what follows a call in the same guest page, when it returns.
    Return,
    /// A jump to another page, `target` bytes from the start of this one: it holds for one page while the short key is
    /// the same.
    Across {
        target: i32,
        /// Of the key, the linear page, the distance to the other page.
        key_at: u64,
        page_at: u64,
        distance_at: u64,
    },
}

/// Where the returns of calls are expected to lead: to address `lin`, and while the short key is the same, to `code`,
/// which charges the budget. A return has the place of its slot on the guest's stack ([`SLOT`]), which needs no counting,
/// and is the right one again after a switch of stacks; each half of linear addresses has places of its own.
#[repr(C, align(64))]
pub struct Returns {
    pub lin: [[u64; RETURNS]; 2],
    pub code: [[u64; RETURNS]; 2],
    pub key: [[u32; RETURNS]; 2],
}

/// As many places as a byte can tell apart.
pub const RETURNS: usize = 256;
/// Bytes of stack (as a power of two) that one place stands for.
const SLOT: u8 = 4;

impl Returns {
    pub const NONE: Returns =
        Returns { lin: [[0; RETURNS]; 2], code: [[0; RETURNS]; 2], key: [[NO_KEY; RETURNS]; 2] };
}

impl SoftCpu {
    /// Let an edge lead to `block`, which is at RIP, from now on.
    pub fn link(&mut self, edge: u32, block: &Block) {
        let (lin, keys, mask) = (self.rip, self.more_slots[SHORT_KEYS - 32], self.ip_mask);
        let (code, half) = (block.code.get() as u64, lin >> 63);
        if code == 0 || block.half.get() as u64 != half {
            return;
        }
        // Compiling may have emptied the code memory, and the edges with it.
        let Jit { edges, memory: Some(memory), stubs, asked_by, .. } = &mut self.jit else { return };
        let Some(e) = edges.get_mut(edge as usize) else { return };
        // Where the second page of such a block is depends on more than one page: always by the table.
        let crossing = block.key & CROSSING != 0;
        match &mut e.way {
            Way::Within { .. } | Way::Return if crossing => memory.aim(e.leave_at, stubs.far),
            Way::Within { count_at, count, back } => {
                *count = block.code_count.get();
                memory.patch(*count_at, &[(*count as u8).wrapping_sub(*back as u8)]);
                memory.aim(e.jump_at, code);
            }
            Way::Return => memory.aim(e.jump_at, code - FAR),
            Way::Across { target, key_at, page_at, distance_at } => {
                // Address spaces may take turns.
                memory.aim(e.leave_at, stubs.across);
                let page = lin.wrapping_sub(*target as i64 as u64) & mask;
                let distance = i32::try_from((lin & !0xFFF).wrapping_sub(page) as i64);
                let (Ok(distance), false) = (distance, crossing || near_hole(lin) || *asked_by != keys)
                else {
                    return;
                };
                memory.patch(*key_at, &NO_KEY.to_le_bytes());
                memory.patch(*page_at, &page.to_le_bytes());
                memory.patch(*distance_at, &distance.to_le_bytes());
                memory.aim(e.jump_at, code - FAR);
                memory.patch(*key_at, &((keys >> (32 * half)) as u32).to_le_bytes());
            }
        }
    }

    /// Short keys may come again soon.
    pub fn forget_short_keys(&mut self) {
        // Between two runs there are far fewer epochs than this.
        let era = self.epochs / (SHORT / 2);
        if era == self.jit.era {
            return;
        }
        self.jit.era = era;
        self.returns.key = Returns::NONE.key;
        let Jit { edges, memory: Some(memory), .. } = &mut self.jit else { return };
        for e in edges {
            if let Way::Across { key_at, .. } = e.way {
                memory.patch(key_at, &NO_KEY.to_le_bytes());
            }
        }
    }

    /// Whatever leads to the code of `block`, which is dropped, leads to the table from now on (which says what is there
    /// now).
    pub fn close(&mut self, block: &Block) {
        let Some(memory) = &mut self.jit.memory else { return };
        let Some(entry) = (block.code.get() as u64).checked_sub(FAR) else { return };
        // As if the budget had no room for it, but that it was not charged.
        let short = memory.target(entry + FAR - 4) + CHARGE as u64;
        memory.patch(entry, &[0xE9]); // jmp
        memory.aim(entry + 1, short);
    }
}

impl Compiler<'_> {
    /// On at an offset from the page's start, after instruction `i`.
    pub fn edge(&mut self, i: usize, target: i64) {
        let back = self.trace.rest(i + 1) as i32;
        if !(0..4096).contains(&target) {
            self.across(back, target as i32);
            return;
        }
        let first = self.trace.parts[0].block;
        let (key, n) = (self.key_within(target), self.edge_number());
        let (mut count, mut code, mut need) = (0, 0, true);
        if key == first.key {
            (count, code, need) = (self.trace.count, self.home, self.need[0]);
        } else if let Some(b) = self.cache.get(key) {
            need = needs_flags(b, self.alone);
            if let Some(known) = self.code_of(b) {
                (count, code) = (b.code_count.get(), known);
            }
        }
        if need || self.fl.recipe.is_none() {
            self.keep();
        }
        // A loop keeps registers where they are.
        let inside = key == first.key && self.entries.is_empty();
        if inside {
            code = self.a.address(self.inner);
        } else {
            self.give_back();
        }
        self.a.alu_imm(8, 5, mem(LEFT), count as i32 - back);
        let count_at = self.a.end_address(self.a.at()) - 1;
        let budget = self.a.jcc(cc::S);
        let link = if code != 0 {
            self.a.jmp_abs(code);
            None
        } else {
            Some(self.a.jmp())
        };
        let jump_at = self.a.end_address(self.a.at()) - 4;
        let way = Way::Within { count_at, count, back: back as u32 };
        self.edges.push(Edge { jump_at, leave_at: 0, way });
        self.cold.push(Cold::Edge { n, link, budget, flags: self.fl, target: target as i32, inside });
    }

    /// The number of the next edge.
    fn edge_number(&self) -> u32 {
        (self.first_edge + self.edges.len()) as u32
    }

    /// The key of the block `target` bytes from the page's start.
    fn key_within(&self, target: i64) -> u64 {
        self.trace.parts[0].block.key & !CROSSING & !0xFFF | target as u64
    }

    /// The code of a block of the same page, if there is any that can be jumped to.
    fn code_of(&self, block: &Block) -> Option<u64> {
        let code = block.code.get();
        (!code.is_null() && block.half.get() as usize == self.half).then_some(code as u64)
    }

    /// On at `target` bytes from the page's start, in another page; `back` instructions that were charged do not run.
    fn across(&mut self, back: i32, target: i32) {
        self.keep();
        if back != 0 {
            self.a.alu_imm(8, 0, mem(LEFT), back);
        }
        self.give_back();
        let (n, key) = (self.edge_number(), self.short_key());
        let a = &mut self.a;
        let end = |a: &Asm| a.end_address(a.at());
        a.word(4, 0, 0x81, 7, key); // cmp
        a.d32(NO_KEY as i32);
        let key_at = end(a) - 4;
        let stale = a.jcc(cc::NE);
        a.b(&[0x48, 0xBF]); // mov rdi, imm64
        a.b(&[0; 8]);
        let page_at = end(a) - 8;
        a.alu_load(8, 7, RDI, mem(PAGE));
        let elsewhere = a.jcc(cc::NE);
        a.b(&[0x48, 0x8D, 0xBF]); // lea rdi, [rdi + disp32]
        a.d32(0);
        let distance_at = end(a) - 4;
        a.store(8, mem(PAGE), RDI);
        a.jmp();
        let jump_at = end(a) - 4;
        self.edges.push(Edge {
            jump_at,
            leave_at: 0,
            way: Way::Across { target, key_at, page_at, distance_at },
        });
        self.cold.push(Cold::Across { from: [stale, elsewhere], n, target });
    }

    /// A new site, its address into RDI.
    fn site(&mut self) -> u64 {
        let at = self.first_site + (self.sites * size_of::<Site>()) as u64;
        self.sites += 1;
        self.a.lea_abs(RDI, at);
        at
    }

    /// The short key of the trace's half.
    fn short_key(&self) -> Rm {
        mem_at(SHORT_KEYS, 4 * self.half as i32)
    }

    /// On at the guest address in RAX after a return, of which the guest's stack pointer moves by `pop` bytes: where its
    /// call said; the flags are kept.
    pub fn back(&mut self, i: usize, pop: i32) {
        self.place_of_return();
        let half = self.half;
        self.a.alu_load(8, 7, RAX, returns(offset_of!(Returns, lin), half, 8));
        let from = self.a.jcc(cc::NE);
        self.cold.push(Cold::Astray { from, i, by: Astray::Return(pop) });
        self.pop(pop);
        self.give_back();
        let key = self.short_key();
        let a = &mut self.a;
        a.alu_imm(8, 4, Rm::R(RAX), -4096);
        a.store(8, mem(PAGE), RAX);
        a.load(4, RAX, key);
        a.alu_load(4, 7, RAX, returns(offset_of!(Returns, key), half, 4));
        a.jcc_abs(cc::NE, self.stubs.returned[half]);
        a.word(4, 0, 0xFF, 4, returns(offset_of!(Returns, code), half, 8)); // jmp
    }

    /// The place in [`Returns`] for the address on top of the guest's stack into RDI. Leaves the flags alone.
    fn place_of_return(&mut self) {
        let mut sp = HOST[GUEST_SP];
        if is_x86_feature_detected!("bmi2") {
            self.a.vex(3, false, false, 3, 0xF0, 0, RDI, Rm::R(sp)); // rorx
            self.a.b(&[SLOT]);
            sp = RDI;
        }
        // Of older hosts the low bits, which tell fewer places apart.
        self.a.enc(0, false, 1, 0xB6, RDI, Rm::R(sp), true); // movzx
    }

    /// Say where the return of instruction `i`, a call, leads: to the address in RAX, which is on top of the guest's stack.
    /// Uses RDI and leaves the flags alone.
    pub fn call_site(&mut self, i: usize) {
        let half = self.half;
        self.place_of_return();
        self.a.store(8, returns(offset_of!(Returns, lin), half, 8), RAX);
        self.return_code(i);
        self.a.store(8, returns(offset_of!(Returns, code), half, 8), RAX);
        self.a.load(4, RAX, self.short_key());
        self.a.store(4, returns(offset_of!(Returns, key), half, 4), RAX);
    }

    /// The code of what follows instruction `i` into RAX: from where its block is known on, an edge.
    fn return_code(&mut self, i: usize) {
        let target = self.trace.next(i);
        if !(0..4096).contains(&target) {
            self.a.lea_abs(RAX, self.stubs.returned[self.half]);
            return;
        }
        let n = self.edge_number();
        let known = self.cache.get(self.key_within(target)).and_then(|b| self.code_of(b));
        self.a.lea_abs(RAX, known.map_or(self.stubs.exit, |code| code - FAR));
        let jump_at = self.a.end_address(self.a.at()) - 4;
        self.edges.push(Edge { jump_at, leave_at: 0, way: Way::Return });
        if known.is_none() {
            let from = Fix::at(self.a.at());
            self.cold.push(Cold::Return { from, n, target: target as i32 });
        }
    }

    /// On at the guest address in RAX, for which there is a site of its own; the flags are kept, and registers in place. Of an
    /// address that is `unchecked` it is not known whether it is canonical.
    pub fn indirect(&mut self, i: usize, unchecked: bool) {
        let site = self.site();
        let field = |offset: usize| Rm::M(RDI, offset as i32);
        let a = &mut self.a;
        a.alu_load(8, 7, RAX, field(offset_of!(Site, lin)));
        if unchecked {
            let from = a.jcc(cc::NE);
            self.cold.push(Cold::Astray { from, i, by: Astray::Jump(site) });
            self.give_back();
        } else {
            self.give_back();
            self.a.jcc_abs(cc::NE, self.stubs.fill);
        }
        let a = &mut self.a;
        a.load(8, RAX, mem(KEY + self.half));
        a.alu_load(8, 7, RAX, field(offset_of!(Site, key)));
        a.jcc_abs(cc::NE, self.stubs.refill);
        a.load(8, RAX, field(offset_of!(Site, page)));
        a.store(8, mem(PAGE), RAX);
        a.word(4, 0, 0xFF, 4, field(offset_of!(Site, code))); // jmp
    }

    /// The same where the target lies in the upper half of linear addresses, as a rule, or in the lower.
    pub fn indirect_to(&mut self, i: usize, half: usize) {
        let here = std::mem::replace(&mut self.half, half);
        self.indirect(i, false);
        self.half = here;
    }

    /// The target in RAX is canonical, or else the handler deals with instruction `i`. Uses RDI.
    pub fn check_target(&mut self, access: &mut Access) {
        if self.trace.word == 4 {
            return;
        }
        self.a.load(8, RDI, Rm::R(RAX));
        self.a.shift(8, 7, Rm::R(RDI), 47);
        self.a.alu_imm(8, 0, Rm::R(RDI), 1);
        self.a.alu_imm(8, 7, Rm::R(RDI), 1);
        access.slow.push(self.a.jcc(cc::A));
    }

    /// The guest's stack pointer moves up.
    pub fn pop(&mut self, bytes: i32) {
        let sp = HOST[GUEST_SP];
        self.a.lea(self.trace.word, sp, Rm::M(sp, bytes));
    }
}
