//! Runs a case on ftvm's software processor, in a guest that looks like a process of the host: the
//! same pages at the same addresses, 64-bit or compatibility mode at privilege level 3. Every
//! exception vector leads to a HLT of its own.

use ftvm_accel::bus::Ipi;
use ftvm_accel::state::Segment;
use ftvm_accel::tcg::{Registers, SoftCpu, Tier};
use ftvm_accel::{Bus, CpuModel, Exit, GuestMemory, Processor};

use super::case::{Case, Descriptor, Mode, Outcome, CODE, CODE_SIZE, DATA, DATA_SIZE, LDT, READ_ONLY};
use super::soft_state;

// Addresses that generated operands do not hit by chance.
const HANDLERS: u64 = 0x175_3000;
const IDT: u64 = 0x175_5000;
const GDT: u64 = 0x175_7000;
const TSS: u64 = 0x175_9000;
const STACK: u64 = 0x175_B000;
const LOCAL: u64 = 0x175_D000;
const TABLES: u64 = 0x180_0000;
const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
/// Accessed and dirty.
const USED: u64 = 0x60;
const NX: u64 = 1 << 63;

struct Nothing;

impl Bus for Nothing {
    fn io_read(&mut self, _: u64, _: u16, _: u8) -> u32 {
        u32::MAX
    }
    fn io_write(&mut self, _: u64, _: u16, _: u8, _: u32) {}
    fn mmio_read(&mut self, _: u64, _: u64, _: u8) -> u64 {
        u64::MAX
    }
    fn mmio_write(&mut self, _: u64, _: u64, _: u8, _: u64) {}
    fn clock_ns(&mut self, _: u64) -> u64 {
        0
    }
    fn intr(&mut self) -> bool {
        false
    }
    fn intr_ack(&mut self, _: u64) -> u8 {
        0
    }
    fn eoi(&mut self, _: u64, _: u8) {}
    fn send_ipi(&mut self, _: Ipi) {}
    fn random(&mut self) -> u64 {
        0
    }
    fn break_requested(&self) -> bool {
        false
    }
}

pub struct Soft {
    cpu: SoftCpu,
    mem: GuestMemory,
    base: Registers,
    position: u64,
    code: [u8; CODE_SIZE],
}

fn segment(selector: u16, attr: u16) -> Segment {
    Segment { selector, base: 0, limit: 0xFFFF_FFFF, attr }
}

/// The descriptor as Linux writes it: accessed, DPL 3.
fn raw(d: &Descriptor) -> u64 {
    let kind = u64::from(d.contents) << 2 | u64::from(!d.restricted) << 1 | 1;
    let access = kind | 0x10 | 3 << 5 | u64::from(d.present) << 7;
    let high = u64::from(d.limit >> 16) | u64::from(d.big) << 6;
    u64::from(d.limit & 0xFFFF)
        | (d.base & 0xFF_FFFF) << 16
        | access << 40
        | high << 48
        | (d.base >> 24) << 56
}

fn local(selector: u16) -> Segment {
    let d = &LDT[(selector >> 3) as usize - 1];
    let v = raw(d);
    Segment { selector, base: d.base, limit: d.limit, attr: (v >> 40 & 0xF0FF) as u16 }
}

impl Soft {
    pub fn new(tier: Tier) -> Soft {
        let mem = GuestMemory::new(32 << 20).unwrap();
        let put = |at: u64, v: u64| mem.write(at, &v.to_le_bytes()).unwrap();
        // Four levels; the page tables for the first 32 MiB follow each other.
        let (pdpt, pd, pt) = (TABLES + 0x1000, TABLES + 0x2000, TABLES + 0x3000);
        put(TABLES, pdpt | PRESENT | WRITE | USER | USED);
        put(pdpt, pd | PRESENT | WRITE | USER | USED);
        for i in 0..16 {
            put(pd + i * 8, (pt + i * 4096) | PRESENT | WRITE | USER | USED);
        }
        let page = |at: u64, flags: u64| put(pt + (at >> 12) * 8, at | flags | PRESENT | USED);
        for at in [HANDLERS, IDT, GDT, TSS, STACK, LOCAL] {
            page(at, WRITE);
        }
        page(CODE, USER);
        for at in (0..DATA_SIZE as u64).step_by(4096) {
            page(DATA + at, USER | WRITE | NX);
        }
        page(READ_ONLY, USER | NX);
        for vector in 0..256u64 {
            let handler = HANDLERS + vector * 16;
            mem.write(handler, &[0xF4]).unwrap();
            // 64-bit interrupt gate, DPL 3, IST 1 so that the stack does not matter.
            put(
                IDT + vector * 16,
                handler & 0xFFFF | 0x10 << 16 | 1 << 32 | 0xEE << 40 | (handler >> 16) << 48,
            );
            put(IDT + vector * 16 + 8, 0);
        }
        // As Linux lays them out: 0x10 kernel code, 0x18 data, 0x23 user 32, 0x2B data, 0x33 user 64.
        for (i, d) in [
            (2, 0x00AF_9B00_0000_FFFF),
            (3, 0x00CF_9300_0000_FFFF),
            (4, 0x00CF_FB00_0000_FFFF),
            (5, 0x00CF_F300_0000_FFFF),
            (6, 0x00AF_FB00_0000_FFFF),
        ] {
            put(GDT + i * 8, d);
        }
        for (i, d) in (1u64..).zip(&LDT) {
            put(LOCAL + i * 8, raw(d));
        }
        put(TSS + 4, STACK + 0x1000);
        put(TSS + 36, STACK + 0x1000);
        let mut cpu = SoftCpu::new(0, 1, &CpuModel::parse("max").unwrap());
        cpu.set_tier(tier);
        let s = cpu.state_mut();
        // PE MP ET NE WP AM PG; PAE PGE OSFXSR OSXMMEXCPT FSGSBASE OSXSAVE SMEP.
        s.cr0 = 0x8005_0033;
        s.cr4 = 0x20 | 0x80 | 0x200 | 0x400 | 1 << 16 | 1 << 18 | 1 << 20;
        s.xcr0 = if super::case::has_avx() { 7 } else { 3 };
        let data = segment(0x2B, 0xC0F3);
        let null = Segment::default();
        let base = Registers {
            rip: CODE,
            rflags: 0x202,
            segs: [data, segment(0x33, 0xA0FB), data, data, null, null],
            ldtr: Segment { selector: 0x50, base: LOCAL, limit: 8 * (LDT.len() as u32 + 1) - 1, attr: 0x82 },
            tr: Segment { selector: 0x40, base: TSS, limit: 0x67, attr: 0x8B },
            gdt: (GDT, 0x37),
            idt: (IDT, 0xFFF),
            cr2: 0,
            cr3: TABLES,
            efer: 0xD01,
            cpl: 3,
            halted: false,
        };
        Soft { cpu, mem, base, position: 0, code: [0; CODE_SIZE] }
    }

    fn qword(&self, at: u64) -> u64 {
        let mut b = [0; 8];
        self.mem.read(at, &mut b).unwrap();
        u64::from_le_bytes(b)
    }

    /// The whole state after each of these numbers of instructions: the processor's, and the data.
    pub fn states(&mut self, case: &Case, stops: &[u64]) -> Vec<(u64, Vec<u8>, Vec<u8>)> {
        self.begin(case);
        // The state names the position of the last exception.
        let mut position = 0;
        let mut states = Vec::new();
        for stop in stops {
            while position < *stop {
                let r = self.cpu.run(&self.mem, &mut Nothing, position, stop - position);
                position += r.retired;
                if r.exit != Exit::Budget && r.exit != Exit::Pause {
                    break;
                }
            }
            let mut data = vec![0; DATA_SIZE];
            self.mem.read(DATA, &mut data).unwrap();
            states.push((position, self.cpu.save(), data));
        }
        states
    }

    /// False: the case does not come to an end.
    pub fn run(&mut self, case: &Case, out: &mut Outcome) -> bool {
        self.begin(case);
        let mut result = self.cpu.run(&self.mem, &mut Nothing, self.position, 1 << 20);
        self.position += result.retired;
        while result.exit == Exit::Pause {
            result = self.cpu.run(&self.mem, &mut Nothing, self.position, 1 << 20);
            self.position += result.retired;
        }
        soft_state::store(self.cpu.state(), &mut out.regs);
        let end = self.cpu.registers();
        if result.exit != Exit::Halt {
            return false;
        }
        self.outcome(&end, out);
        true
    }

    fn begin(&mut self, case: &Case) {
        if self.code != case.code {
            self.mem.write(CODE, &case.code).unwrap();
            self.code = case.code;
        }
        self.mem.write(DATA, &case.data).unwrap();
        soft_state::load(self.cpu.state_mut(), &case.regs);
        let mut r = self.base.clone();
        r.rip = case.regs.rip;
        r.rflags = case.regs.flags;
        if case.mode == Mode::Flat32 {
            r.segs[1] = segment(0x23, 0xC0FB);
        } else if case.mode.segmented() {
            r.segs[1] = local(case.mode.code_selector());
            for i in [0, 2, 3] {
                r.segs[i] = local(case.mode.data_selector());
            }
        }
        self.cpu.set_registers(&r);
    }

    fn outcome(&self, end: &Registers, out: &mut Outcome) {
        out.vector = ((end.rip - HANDLERS) / 16) as u8;
        out.cr2 = end.cr2;
        let has_error = matches!(out.vector, 8 | 10..=14 | 17);
        let mut frame = STACK + 0x1000 - 40;
        out.error = 0;
        if has_error {
            out.error = self.qword(frame - 8) as u32;
        }
        if self.cpu.state().gpr[4] != frame - if has_error { 8 } else { 0 } {
            frame = self.cpu.state().gpr[4];
        }
        let selector = |i: usize| end.segs[i].selector;
        out.regs.selectors =
            [selector(0), self.qword(frame + 8) as u16, self.qword(frame + 32) as u16, selector(3)];
        out.regs.rip = self.qword(frame);
        out.regs.flags = self.qword(frame + 16);
        out.regs.gpr[4] = self.qword(frame + 24);
        self.mem.read(DATA, &mut out.data).unwrap();
    }
}
