//! Tests of the software processor on hand-assembled code.

use super::*;

/// A bus that answers little and remembers what was written to ports.
#[derive(Default)]
struct TestBus {
    out: Vec<(u64, u16, u32)>,
    intr: Option<u8>,
    ipis: Vec<Ipi>,
    end: bool,
}
impl Bus for TestBus {
    fn io_read(&mut self, position: u64, port: u16, _: u8) -> u32 {
        port as u32 ^ position as u32
    }
    fn io_write(&mut self, position: u64, port: u16, _: u8, value: u32) {
        self.out.push((position, port, value));
    }
    fn mmio_read(&mut self, position: u64, addr: u64, _: u8) -> u64 {
        addr ^ position
    }
    fn mmio_write(&mut self, position: u64, addr: u64, _: u8, value: u64) {
        self.out.push((position, addr as u16, value as u32));
    }
    fn clock_ns(&mut self, position: u64) -> u64 {
        position * 10
    }
    fn clock_line(&self, _: u64) -> ClockLine {
        ClockLine { base_ns: 0, rate: 10 << ClockLine::SHIFT }
    }
    fn intr(&mut self) -> bool {
        self.intr.is_some()
    }
    fn intr_ack(&mut self, _: u64) -> u8 {
        self.intr.take().unwrap_or(0xFF)
    }
    fn eoi(&mut self, _: u64, _: u8) {}
    fn send_ipi(&mut self, ipi: Ipi) {
        self.ipis.push(ipi);
    }
    fn random(&mut self) -> u64 {
        42
    }
    fn break_requested(&self) -> bool {
        false
    }
    fn end_wanted(&self) -> bool {
        self.end
    }
}

pub(super) struct Machine {
    pub mem: GuestMemory,
    pub cpu: SoftCpu,
    bus: TestBus,
    pub position: u64,
}

impl Machine {
    /// Real mode, code at 0:1000, stack below it.
    pub fn real(code: &[u8]) -> Machine {
        let mem = GuestMemory::new(4 << 20).unwrap();
        mem.write(0x1000, code).unwrap();
        let mut cpu = SoftCpu::new(0, 1, &CpuModel::parse("max").unwrap());
        cpu.segs[CS] = Segment { selector: 0, base: 0, limit: 0xFFFF, attr: 0x9B };
        cpu.idt = (0, 0x3FF);
        cpu.rip = 0x1000;
        cpu.st.gpr[RSP] = 0x1000;
        cpu.update_mode();
        Machine { mem, cpu, bus: TestBus::default(), position: 0 }
    }

    /// 64-bit mode with paging: linear = physical for 2 MiB at PDE 0, page tables at 0x10000.., code at
    /// 0x1000. GDT at 0x8000: 08 kernel code, 10 kernel data, 1B user data, 23 user code, 28 TSS at 0x9000.
    /// IDT at 0xA000: every vector to a HLT at 0xC000 + 16 * vector.
    pub fn long(code: &[u8]) -> Machine {
        let mut m = Machine::real(code);
        let q = |m: &Machine, at: u64, v: u64| m.mem.write(at, &v.to_le_bytes()).unwrap();
        q(&m, 0x1_0000, 0x1_1007);
        q(&m, 0x1_1000, 0x1_2007);
        q(&m, 0x1_2000, 0x1_3007);
        for i in 0..512 {
            q(&m, 0x1_3000 + 8 * i, i << 12 | 7);
        }
        q(&m, 0x8008, 0x00AF_9B00_0000_FFFF);
        q(&m, 0x8010, 0x00CF_9300_0000_FFFF);
        q(&m, 0x8018, 0x00CF_F300_0000_FFFF);
        q(&m, 0x8020, 0x00AF_FB00_0000_FFFF);
        q(&m, 0x9004, 0x7000);
        for v in 0..256u64 {
            let to = 0xC000 + 16 * v;
            q(&m, 0xA000 + 16 * v, to & 0xFFFF | 8 << 16 | 0x8E00 << 32 | (to >> 16) << 48);
            m.mem.write(to, &[0xF4]).unwrap();
        }
        let c = &mut m.cpu;
        c.gdt = (0x8000, 0x37);
        c.idt = (0xA000, 0xFFF);
        c.tr = Segment { selector: 0x28, base: 0x9000, limit: 0x67, attr: 0x8B };
        c.segs[CS] = Segment { selector: 8, base: 0, limit: u32::MAX, attr: 0xA09B };
        for s in [ES, SS, DS] {
            c.segs[s] = Segment { selector: 0x10, base: 0, limit: u32::MAX, attr: 0xC093 };
        }
        c.st.cr0 = CR0_PE | CR0_PG | CR0_WP | CR0_NE | 0x10;
        c.st.cr4 = CR4_PAE;
        c.efer = EFER_LME | EFER_LMA | EFER_NXE | EFER_SCE;
        c.cr3 = 0x1_0000;
        c.st.gpr[RSP] = 0x6000;
        c.flush_tlb();
        c.update_mode();
        m
    }

    pub fn run(&mut self, n: u64) -> RunResult {
        let r = self.cpu.run(&self.mem, &mut self.bus, self.position, n);
        self.position += r.retired;
        r
    }
    pub fn deliver(&mut self, count: u32) -> RunResult {
        self.cpu.deliver(&self.mem, &mut self.bus, self.position, count)
    }
    pub fn word(&self, at: u64) -> u64 {
        let mut b = [0; 8];
        self.mem.read(at, &mut b).unwrap();
        u64::from_le_bytes(b)
    }
}

#[test]
fn real_mode_adds_and_halts() {
    // mov ax,7FFF; add ax,1; pushf; pop bx; hlt
    let mut m = Machine::real(&[0xB8, 0xFF, 0x7F, 0x05, 0x01, 0x00, 0x9C, 0x5B, 0xF4]);
    let r = m.run(100);
    assert_eq!((r.exit, r.retired), (Exit::Halt, 5));
    assert_eq!(m.cpu.st.gpr[RAX], 0x8000);
    // OF, SF, PF, AF.
    assert_eq!(m.cpu.st.gpr[RBX] & 0x8D5, 0x894);
}

/// Whoever replays what a machine did is given a budget up to there.
#[test]
fn an_end_that_was_wanted_at_an_access_is_that_of_a_budget() {
    let ends = |make: &dyn Fn() -> Machine| {
        let (mut m, mut twin) = (make(), make());
        m.bus.end = true;
        for ends in 0.. {
            let exit = m.run(1000).exit;
            while twin.position < m.position {
                twin.run(m.position - twin.position);
            }
            assert_eq!(m.cpu.save(), twin.cpu.save(), "at {}", m.position);
            assert_eq!(m.bus.out, twin.bus.out);
            match exit {
                Exit::Budget => {}
                Exit::Halt => return (ends, m.position),
                other => panic!("{other:?} at {}", m.position),
            }
        }
        (0, 0)
    };
    // in al,60h; mov dx,70h; mov di,5000h; mov cx,5; rep insb; sti; in al,dx; mov si,di; mov cl,4; rep outsb; sti;
    // out dx,al; cli; xor si,si; mov cx,9; rep movsb; add [si],ax; mov di,0F000h; movsb (which faults); hlt
    let real = [
        0xE4, 0x60, 0xBA, 0x70, 0x00, 0xBF, 0x00, 0x50, 0xB9, 0x05, 0x00, 0xF3, 0x6C, 0xFB, 0xEC, 0x89, 0xFE,
        0xB1, 0x04, 0xF3, 0x6E, 0xFB, 0xEE, 0xFA, 0x31, 0xF6, 0xB9, 0x09, 0x00, 0xF3, 0xA4, 0x01, 0x04, 0xBF,
        0x00, 0xF0, 0xA4, 0xF4,
    ];
    let in_real = || {
        let mut m = Machine::real(&real);
        // What DS reaches is a device. Interrupt 9 just returns, a fault ends it.
        m.cpu.segs[DS].base = 0xFEB0_0000;
        m.cpu.segs[ES].limit = 0x7FFF;
        m.mem.write(9 * 4, &[0, 0x30, 0, 0]).unwrap();
        m.mem.write(0x3000, &[0xCF]).unwrap();
        m.mem.write(13 * 4, &[0, 0x31, 0, 0]).unwrap();
        m.mem.write(0x3100, &[0xF4]).unwrap();
        m.bus.intr = Some(9);
        m
    };
    let (count, _) = ends(&in_real);
    // The interrupt's acknowledgement is one, too.
    assert_eq!(count, 1 + 5 + 1 + 1 + 4 + 1 + 9 + 1 + 1);
    // mov ecx,40; a: in al,60h; add ebx,eax; out 61h,al; dec ecx; jnz a; sti; in al,60h; hlt
    let long = [
        0xB9, 40, 0, 0, 0, 0xE4, 0x60, 0x01, 0xC3, 0xE6, 0x61, 0xFF, 0xC9, 0x75, 0xF6, 0xFB, 0xE4, 0x60, 0xF4,
    ];
    for tier in [Tier::Never, Tier::AtOnce] {
        let in_long = || {
            let mut m = Machine::long(&long);
            m.cpu.set_tier(tier);
            m
        };
        assert_eq!(ends(&in_long), (81, 1 + 40 * 5 + 3), "{tier:?}");
    }
}

#[test]
fn the_division_of_the_budget_does_not_show() {
    // mov cx,300; mov di,4000h; cld; rep stosb; mov cx,10; a: in al,60h; add [bx],al; loop a; hlt
    let code = [
        0xB9, 0x2C, 0x01, 0xBF, 0x00, 0x40, 0xFC, 0xF3, 0xAA, 0xB9, 0x0A, 0x00, 0xE4, 0x60, 0x00, 0x07, 0xE2,
        0xFA, 0xF4,
    ];
    let mut whole = Machine::real(&code);
    assert_eq!(whole.run(1000).exit, Exit::Halt);
    assert_eq!(whole.position, 3 + 300 + 1 + 30 + 1);
    for step in [1, 2, 3, 7, 50] {
        let mut m = Machine::real(&code);
        loop {
            let r = m.run(step);
            assert!(r.retired <= step);
            if r.exit == Exit::Halt {
                break;
            }
            // Saving and loading in the middle changes nothing either.
            let saved = m.cpu.save();
            let mut fresh = SoftCpu::new(0, 1, &CpuModel::parse("max").unwrap());
            Processor::load(&mut fresh, &saved).unwrap();
            assert_eq!(fresh.save(), saved);
            m.cpu = fresh;
        }
        assert_eq!(m.position, whole.position);
        assert_eq!(m.cpu.save(), whole.cpu.save());
        assert_eq!(m.word(0), whole.word(0));
    }
}

#[test]
fn code_that_changes_the_next_instruction_runs_changed() {
    // mov byte [100Ah],42h (inc dx); nop; nop; nop; nop; nop; then at 100A: inc cx; hlt
    let code = [0xC6, 0x06, 0x0A, 0x10, 0x42, 0x90, 0x90, 0x90, 0x90, 0x90, 0x41, 0xF4];
    let mut m = Machine::real(&code);
    m.cpu.st.gpr[RDX] = 0;
    m.run(100);
    assert_eq!((m.cpu.st.gpr[RCX], m.cpu.st.gpr[RDX]), (0, 1));
    // A device's write is seen too.
    m.mem.write(0x100A, &[0x43]).unwrap();
    m.mem.write(0x1000, &[0xEB, 0x08]).unwrap();
    m.cpu.rip = 0x1000;
    m.cpu.halted = false;
    m.run(100);
    assert_eq!(m.cpu.st.gpr[RBX], 1);
}

#[test]
fn a_page_fault_leaves_registers_and_pushes_its_frame() {
    // mov rax,[400000h] beyond the mapped 2 MiB.
    let mut m = Machine::long(&[0x48, 0x8B, 0x04, 0x25, 0x00, 0x00, 0x40, 0x00, 0xF4]);
    m.cpu.st.gpr[RAX] = 5;
    let r = m.run(100);
    // Only the handler's HLT retired.
    assert_eq!((r.exit, r.retired), (Exit::Halt, 1));
    assert_eq!((m.cpu.cr2, m.cpu.st.gpr[RAX]), (0x40_0000, 5));
    assert_eq!(m.cpu.rip, 0xC000 + 16 * 14 + 1);
    let sp = m.cpu.st.gpr[RSP];
    assert_eq!((m.word(sp), m.word(sp + 8), m.word(sp + 16)), (0, 0x1000, 8));
    assert_eq!(m.word(sp + 32), 0x6000);
}

#[test]
fn translations_follow_the_tables_without_invlpg() {
    // mov al,[5000h]; mov byte [13000h+8*5+1],40h (PTE of 5000h now maps 4000h); mov bl,[5000h]; hlt
    let code = [
        0x8A, 0x04, 0x25, 0x00, 0x50, 0, 0, 0xC6, 0x04, 0x25, 0x29, 0x30, 0x01, 0x00, 0x40, 0x8A, 0x1C, 0x25,
        0x00, 0x50, 0, 0, 0xF4,
    ];
    let mut m = Machine::long(&code);
    m.mem.write(0x5000, &[1]).unwrap();
    m.mem.write(0x4000, &[2]).unwrap();
    m.run(100);
    assert_eq!((m.cpu.st.gpr[RAX] & 0xFF, m.cpu.st.gpr[RBX] & 0xFF), (1, 2));
    // The walk set accessed, but not dirty.
    assert_eq!(m.word(0x1_3028) & 0x60, 0x20);
    assert_eq!(m.word(0x1_3000 + 8 * 0x13) & 0x60, 0x60);
}

#[test]
fn a_triple_fault_shuts_down_and_a_fault_loop_does_not_hang() {
    let mut m = Machine::long(&[0x0F, 0x0B]);
    m.cpu.idt = (0, 0);
    assert_eq!(m.run(10).exit, Exit::Shutdown);
    // #UD whose handler is an undefined instruction on an interrupt stack: time still passes.
    let mut m = Machine::long(&[0x0F, 0x0B]);
    m.mem.write(0xC060, &[0x0F, 0x0B]).unwrap();
    m.mem.write(0x9024, &0x6000u64.to_le_bytes()).unwrap();
    m.mem.write(0xA064, &[1]).unwrap();
    assert_eq!(m.run(10).exit, Exit::Budget);
}

#[test]
fn user_code_calls_the_kernel_and_returns() {
    // iretq to user 2000h; there: syscall -> 3000h: sysret; back: int 80h -> handler's HLT.
    let mut m = Machine::long(&[0x48, 0xCF]);
    for (i, v) in [0x2000u64, 0x23, 0x202, 0x5000, 0x1B].iter().enumerate() {
        m.mem.write(0x6000 + 8 * i as u64, &v.to_le_bytes()).unwrap();
    }
    m.mem.write(0x2000, &[0x0F, 0x05, 0x41, 0x53, 0xCD, 0x80]).unwrap();
    m.mem.write(0x3000, &[0x48, 0x0F, 0x07]).unwrap();
    m.cpu.msr.star = 0x0013 << 48 | 8 << 32;
    m.cpu.msr.lstar = 0x3000;
    m.mem.write(0xA000 + 16 * 0x80 + 5, &[0xEE]).unwrap();
    let r = m.run(100);
    assert_eq!((r.exit, r.retired), (Exit::Halt, 6));
    assert_eq!(m.cpu.cpl, 0);
    // The frame is on RSP0's stack and names user mode.
    assert_eq!(m.cpu.st.gpr[RSP], 0x7000 - 40);
    assert_eq!((m.word(0x7000 - 40), m.word(0x7000 - 32)), (0x2006, 0x23));
    assert_eq!(m.word(0x5000 - 8), 0x202);
}

#[test]
fn supervisor_access_to_user_pages_obeys_smap_and_smep() {
    // mov al,[5000h]; hlt
    let code = [0x8A, 0x04, 0x25, 0x00, 0x50, 0, 0, 0xF4];
    let mut m = Machine::long(&code);
    // Kernel pages, but for 5000h.
    for i in (0..512u64).filter(|i| *i != 5) {
        m.mem.write(0x1_3000 + 8 * i, &(i << 12 | 3).to_le_bytes()).unwrap();
    }
    m.cpu.st.cr4 |= CR4_SMAP | CR4_SMEP;
    m.cpu.st.gpr[RSP] = 0x8000;
    m.run(100);
    let sp = m.cpu.st.gpr[RSP];
    assert_eq!((m.cpu.cr2, m.word(sp)), (0x5000, 1));
    // With AC set it may.
    m.cpu.halted = false;
    m.cpu.rip = 0x1000;
    m.cpu.eflags |= flags::AC;
    m.cpu.update_mmu();
    m.run(100);
    assert_eq!(m.cpu.rip, 0x1008);
    // Fetching does not care about AC.
    m.cpu.halted = false;
    m.cpu.rip = 0x5000;
    m.run(100);
    let sp = m.cpu.st.gpr[RSP];
    assert_eq!((m.cpu.cr2, m.word(sp)), (0x5000, 0x11));
}

#[test]
fn sti_holds_interrupts_back_for_one_instruction() {
    // sti; inc ax; inc ax; hlt. Vector 20h: hlt at 0:3000.
    let mut m = Machine::real(&[0xFB, 0x40, 0x40, 0xF4]);
    m.mem.write(0x80, &[0x00, 0x30, 0, 0]).unwrap();
    m.mem.write(0x3000, &[0xF4]).unwrap();
    m.cpu.st.gpr[RAX] = 0;
    m.bus.intr = Some(0x20);
    m.run(100);
    assert_eq!((m.cpu.st.gpr[RAX], m.cpu.rip), (1, 0x3001));
}

#[test]
fn single_step_traps_after_each_instruction() {
    // pushf; pop ax; or ah,1; push ax; popf; nop; nop. Vector 1: hlt at 0:3000.
    let mut m = Machine::real(&[0x9C, 0x58, 0x80, 0xCC, 0x01, 0x50, 0x9D, 0x90, 0x90]);
    m.mem.write(4, &[0x00, 0x30, 0, 0]).unwrap();
    m.mem.write(0x3000, &[0xF4]).unwrap();
    m.run(100);
    assert_eq!(m.cpu.rip, 0x3001);
    assert_eq!(m.cpu.dr[6] & 0x4000, 0x4000);
    // The trap came after the NOP that followed POPF.
    assert_eq!(m.word(m.cpu.st.gpr[RSP]) & 0xFFFF, 0x1008);
}

#[test]
fn the_apic_timer_fires_at_its_virtual_time() {
    let mut m = Machine::long(&[0xEB, 0xFE]);
    let eff = |l: &mut Lapic, n, v| {
        l.write(n, v, 1000);
    };
    eff(&mut m.cpu.lapic, 0x0F, 0x1FF);
    eff(&mut m.cpu.lapic, 0x32, 0x30);
    eff(&mut m.cpu.lapic, 0x3E, 0xB);
    eff(&mut m.cpu.lapic, 0x38, 500);
    assert_eq!(m.cpu.next_deadline(), Some(1500));
    m.cpu.set_rflags(0x202);
    m.cpu.advance(1499);
    assert_eq!(m.run(10).exit, Exit::Budget);
    m.cpu.advance(1500);
    assert_eq!(m.run(10).exit, Exit::Halt);
    assert_eq!(m.cpu.rip, 0xC000 + 16 * 0x30 + 1);
}

#[test]
fn access_to_the_bus_names_its_position() {
    // nop; nop; out 80h,al; rep outsb (3); mov eax,[FED00000h]; hlt
    let code = [0x90, 0x90, 0xE6, 0x80, 0xF3, 0x6E, 0xA0, 0, 0, 0xD0, 0xFE, 0, 0, 0, 0, 0xF4];
    let mut m = Machine::long(&code);
    m.cpu.st.gpr[RCX] = 3;
    m.cpu.st.gpr[RDX] = 0x55;
    m.cpu.st.gpr[RSI] = 0x4000;
    // Map the high address through PDE 0x1F6 of the fourth gigabyte.
    m.mem.write(0x1_1018, &0x1_4007u64.to_le_bytes()).unwrap();
    m.mem.write(0x1_4000 + 8 * 0x1F6, &0xFEC0_0087u64.to_le_bytes()).unwrap();
    m.run(100);
    let at: Vec<(u64, u16)> = m.bus.out.iter().map(|o| (o.0, o.1)).collect();
    assert_eq!(at, [(2, 0x80), (3, 0x55), (4, 0x55), (5, 0x55)]);
    assert_eq!(m.cpu.st.gpr[RAX] & 0xFF, 6);
}

#[test]
fn protected_mode_task_switch_through_the_gdt() {
    // 32-bit: jmp 30h:0 (a TSS); the new task runs at 2000h: hlt.
    let mut m = Machine::real(&[0xEA, 0, 0, 0, 0, 0x30, 0]);
    let q = |m: &Machine, at: u64, v: u64| m.mem.write(at, &v.to_le_bytes()).unwrap();
    q(&m, 0x8008, 0x00CF_9B00_0000_FFFF);
    q(&m, 0x8010, 0x00CF_9300_0000_FFFF);
    q(&m, 0x8028, 0x0000_8B00_9000_0067);
    q(&m, 0x8030, 0x0000_8900_9100_0067);
    m.mem.write(0x2000, &[0xF4]).unwrap();
    for (off, v) in [(0x20u64, 0x2000u32), (0x24, 2), (0x28, 77), (0x38, 0x5000)] {
        m.mem.write(0x9100 + off, &v.to_le_bytes()).unwrap();
    }
    for (i, sel) in [0x10u32, 8, 0x10, 0x10, 0, 0].iter().enumerate() {
        m.mem.write(0x9100 + 0x48 + 4 * i as u64, &sel.to_le_bytes()).unwrap();
    }
    let c = &mut m.cpu;
    c.gdt = (0x8000, 0x37);
    c.tr = Segment { selector: 0x28, base: 0x9000, limit: 0x67, attr: 0x8B };
    c.segs[CS] = Segment { selector: 8, base: 0, limit: u32::MAX, attr: 0xC09B };
    c.segs[SS] = Segment { selector: 0x10, base: 0, limit: u32::MAX, attr: 0xC093 };
    c.st.cr0 |= CR0_PE;
    c.update_mode();
    let r = m.run(10);
    assert_eq!((r.exit, r.retired, m.cpu.rip), (Exit::Halt, 2, 0x2001));
    assert_eq!((m.cpu.st.gpr[RAX], m.cpu.tr.selector), (77, 0x30));
    // Old: available again, resumes after the jump. New: busy.
    assert_eq!(m.word(0x8028) >> 40 & 0xFF, 0x89);
    assert_eq!(m.word(0x8030) >> 40 & 0xFF, 0x8B);
    assert_eq!(m.word(0x9020) & 0xFFFF_FFFF, 0x1007);
}

/// Runs `code` interpreted and compiled, in strides; the whole state must agree at every stop.
fn same_in_every_tier(code: &[u8], expect: Exit) {
    let memory = |m: &Machine| {
        let mut bytes = vec![0; 0x2_0000];
        m.mem.read(0, &mut bytes).unwrap();
        bytes
    };
    for tier in [Tier::AtOnce, Tier::After(2), Tier::Random(5)] {
        for stride in [1, 2, 3, 7, 1000] {
            let (mut a, mut b) = (Machine::long(code), Machine::long(code));
            a.cpu.set_tier(Tier::Never);
            b.cpu.set_tier(tier);
            for _ in 0..1000 / stride {
                let (x, y) = (a.run(stride), b.run(stride));
                assert_eq!(x, y, "{tier:?}, {stride} at a time, at {}", a.position);
                assert_eq!(a.cpu.save(), b.cpu.save(), "{tier:?}, {stride} at a time, at {}", a.position);
                assert!(memory(&a) == memory(&b), "{tier:?}, {stride} at a time, at {}", a.position);
                if x.exit != Exit::Budget {
                    assert_eq!(x.exit, expect);
                    break;
                }
            }
        }
    }
}

#[test]
fn compiled_code_may_change_itself() {
    // mov ecx,20; a: inc byte [the next instruction's 1]; mov eax,1; add rbx,rax; push rax; call f; pop rax;
    // dec ecx; jnz a; hlt; f: shl rbx,3; mov rdx,[rsp]; jnc b; nop; b: ret
    let code = [
        0xB9, 0x14, 0, 0, 0, 0xFE, 0x05, 1, 0, 0, 0, 0xB8, 1, 0, 0, 0, 0x48, 0x01, 0xC3, 0x50, 0xE8, 6, 0, 0,
        0, 0x58, 0xFF, 0xC9, 0x75, 0xE7, 0xF4, 0x48, 0xC1, 0xE3, 0x03, 0x48, 0x8B, 0x14, 0x24, 0x73, 0x01,
        0x90, 0xC3,
    ];
    same_in_every_tier(&code, Exit::Halt);
    // The same without the change: the loop stays compiled.
    let mut still = code;
    still[5..11].fill(0x90);
    same_in_every_tier(&still, Exit::Halt);
}

#[test]
fn a_fault_in_compiled_code_is_exact() {
    // mov ebx,400000h; dec rax; setb cl; add rax,5; mov rdx,[rbx]; hlt. Nothing is mapped at 400000h.
    let code = [
        0xBB, 0, 0, 0x40, 0, 0x48, 0xFF, 0xC8, 0x0F, 0x92, 0xC1, 0x48, 0x83, 0xC0, 0x05, 0x48, 0x8B, 0x13,
        0xF4,
    ];
    same_in_every_tier(&code, Exit::Halt);
}

#[test]
fn compiled_code_follows_the_tables_without_invlpg() {
    // mov ecx,40; a: mov al,[5000h]; xor byte [13000h+8*5+1],10h (the PTE of 5000h maps 4000h and 5000h in turn);
    // mov bl,[5000h]; add [6000h],rbx; and byte [13000h+8*5],DFh (not accessed); dec ecx; jnz a; hlt
    let code = [
        0xB9, 40, 0, 0, 0, 0x8A, 0x04, 0x25, 0, 0x50, 0, 0, 0x80, 0x34, 0x25, 0x29, 0x30, 0x01, 0, 0x10,
        0x8A, 0x1C, 0x25, 0, 0x50, 0, 0, 0x48, 0x01, 0x1C, 0x25, 0, 0x60, 0, 0, 0x80, 0x24, 0x25, 0x28, 0x30,
        0x01, 0, 0xDF, 0xFF, 0xC9, 0x75, 0xD6, 0xF4,
    ];
    same_in_every_tier(&code, Exit::Halt);
}

#[test]
fn code_found_before_is_found_anew_when_its_page_moves() {
    // call 5000h; call 105000h (the same place in the fetch TLB); mov byte [13000h+8*5+1],60h (6000h shows at
    // 5000h); call 5000h; hlt. At 5000h: inc ebx; ret; at 6000h: dec ebx; dec ebx; ret; at 105000h: ret.
    let code = [
        0xE8, 0xFB, 0x3F, 0, 0, 0xE8, 0xF6, 0x3F, 0x10, 0, 0xC6, 0x04, 0x25, 0x29, 0x30, 0x01, 0, 0x60, 0xE8,
        0xE9, 0x3F, 0, 0, 0xF4,
    ];
    for tier in [Tier::Never, Tier::AtOnce] {
        let mut m = Machine::long(&code);
        m.mem.write(0x5000, &[0xFF, 0xC3, 0xC3]).unwrap();
        m.mem.write(0x6000, &[0xFF, 0xCB, 0xFF, 0xCB, 0xC3]).unwrap();
        m.mem.write(0x10_5000, &[0xC3]).unwrap();
        m.cpu.st.gpr[RSP] = 0x4000;
        m.cpu.set_tier(tier);
        assert_eq!(m.run(100).exit, Exit::Halt);
        assert_eq!(m.cpu.st.gpr[RBX] as u32, 0xFFFF_FFFF, "{tier:?}");
    }
}

#[test]
fn accesses_that_share_a_look_at_the_tlb_agree_with_single_ones() {
    // mov ebx,20000h; mov ecx,20; a: push [rbx] (a page that was not met before); push rcx; push rbx; pop rdx; pop rsi;
    // pop rdi; add rbx,1000h; dec ecx; jnz a; hlt
    let code = [
        0xBB, 0, 0, 2, 0, 0xB9, 20, 0, 0, 0, 0xFF, 0x33, 0x51, 0x53, 0x5A, 0x5E, 0x5F, 0x48, 0x81, 0xC3, 0,
        0x10, 0, 0, 0xFF, 0xC9, 0x75, 0xEE, 0xF4,
    ];
    same_in_every_tier(&code, Exit::Halt);
    // mov ebx,20F00h; mov ecx,600; a: mov rax,[rbx]; add [rbx+8],rax; inc qword [rbx+10h]; add rbx,8; dec ecx; jnz a;
    // hlt: the group crosses pages on its way.
    let code = [
        0xBB, 0, 0x0F, 2, 0, 0xB9, 0x58, 2, 0, 0, 0x48, 0x8B, 0x03, 0x48, 0x01, 0x43, 0x08, 0x48, 0xFF, 0x43,
        0x10, 0x48, 0x83, 0xC3, 0x08, 0xFF, 0xC9, 0x75, 0xED, 0xF4,
    ];
    same_in_every_tier(&code, Exit::Halt);
}

/// Loops that use R11 and R13 to R15 more than others have them in host registers.
#[test]
fn registers_change_places_in_a_loop_and_nobody_sees_it() {
    // All begin with: mov esi,1111h; mov edi,2222h; mov r8d,3333h; mov r9d,4444h; mov r10d,5555h; mov r12d,6666h.
    // One block, over pages that were not met before.
    // mov ebx,0x20000; mov ecx,200; a: add r13,[rbx]; add [rbx+8],r13; lea r14,[r13+r15*2+5]; xor r15,r14; rol
    // r13,9; sub r13,r14; cmp r14,r13; cmovb r11,r14; adc r15,3; imul r14,r15,77; mov [rbx+0x20],r14w; mov
    // r15b,r11b; bswap r11; add rbx,0x128; dec ecx; jnz a; hlt
    let code = [
        0xBE, 0x11, 0x11, 0, 0, 0xBF, 0x22, 0x22, 0, 0, 0x41, 0xB8, 0x33, 0x33, 0, 0, 0x41, 0xB9, 0x44, 0x44,
        0, 0, 0x41, 0xBA, 0x55, 0x55, 0, 0, 0x41, 0xBC, 0x66, 0x66, 0, 0, 0xBB, 0, 0, 2, 0, 0xB9, 0xC8, 0, 0,
        0, 0x4C, 3, 0x2B, 0x4C, 1, 0x6B, 8, 0x4F, 0x8D, 0x74, 0x7D, 5, 0x4D, 0x31, 0xF7, 0x49, 0xC1, 0xC5, 9,
        0x4D, 0x29, 0xF5, 0x4D, 0x39, 0xEE, 0x4D, 0x0F, 0x42, 0xDE, 0x49, 0x83, 0xD7, 3, 0x4D, 0x6B, 0xF7,
        0x4D, 0x66, 0x44, 0x89, 0x73, 0x20, 0x45, 0x88, 0xDF, 0x49, 0x0F, 0xCB, 0x48, 0x81, 0xC3, 0x28, 1, 0,
        0, 0xFF, 0xC9, 0x75, 0xC5, 0xF4,
    ];
    same_in_every_tier(&code, Exit::Halt);
    // More than one, with a way out between them, a division that may need its handler, and the stack.
    // mov ebx,0x20000; mov ecx,200; a: add r13,[rbx]; lea r14,[r13+r15*2+5]; xor r15,r14; sub r13,r14; adc r15,3;
    // test r13b,1; jz b; add r9,r13; push r15; pop r11; b: add rbx,0x128; add r13,r14; mov eax,r13d; cdq; idiv dword
    // ptr [rip+n]; add r14,rdx; add rdi,r9; sub ecx,1; jnz a; hlt; n: .long 1000003
    let code = [
        0xBE, 0x11, 0x11, 0, 0, 0xBF, 0x22, 0x22, 0, 0, 0x41, 0xB8, 0x33, 0x33, 0, 0, 0x41, 0xB9, 0x44, 0x44,
        0, 0, 0x41, 0xBA, 0x55, 0x55, 0, 0, 0x41, 0xBC, 0x66, 0x66, 0, 0, 0xBB, 0, 0, 2, 0, 0xB9, 0xC8, 0, 0,
        0, 0x4C, 3, 0x2B, 0x4F, 0x8D, 0x74, 0x7D, 5, 0x4D, 0x31, 0xF7, 0x4D, 0x29, 0xF5, 0x49, 0x83, 0xD7, 3,
        0x41, 0xF6, 0xC5, 1, 0x74, 7, 0x4D, 1, 0xE9, 0x41, 0x57, 0x41, 0x5B, 0x48, 0x81, 0xC3, 0x28, 1, 0, 0,
        0x4D, 1, 0xF5, 0x44, 0x89, 0xE8, 0x99, 0xF7, 0x3D, 0x0C, 0, 0, 0, 0x49, 1, 0xD6, 0x4C, 1, 0xCF, 0x83,
        0xE9, 1, 0x75, 0xC2, 0xF4, 0x43, 0x42, 0x0F, 0,
    ];
    same_in_every_tier(&code, Exit::Halt);
    // Entered from code that changed what gives way.
    // mov edx,20; o: mov ecx,4; lea rsi,[rsi+rdx*2]; add rdi,rsi; xor r8,rdi; sub r9,r8; a: add r13,rdx; lea
    // r14,[r13+r15*2+5]; xor r15,r14; sub r13,r14; add r11,r15; dec ecx; jnz a; add r12,r11; dec edx; jnz o; hlt
    let code = [
        0xBE, 0x11, 0x11, 0, 0, 0xBF, 0x22, 0x22, 0, 0, 0x41, 0xB8, 0x33, 0x33, 0, 0, 0x41, 0xB9, 0x44, 0x44,
        0, 0, 0x41, 0xBA, 0x55, 0x55, 0, 0, 0x41, 0xBC, 0x66, 0x66, 0, 0, 0xBA, 0x14, 0, 0, 0, 0xB9, 4, 0, 0,
        0, 0x48, 0x8D, 0x34, 0x56, 0x48, 1, 0xF7, 0x49, 0x31, 0xF8, 0x4D, 0x29, 0xC1, 0x49, 1, 0xD5, 0x4F,
        0x8D, 0x74, 0x7D, 5, 0x4D, 0x31, 0xF7, 0x4D, 0x29, 0xF5, 0x4D, 1, 0xFB, 0xFF, 0xC9, 0x75, 0xEB, 0x4D,
        1, 0xDC, 0xFF, 0xCA, 0x75, 0xD2, 0xF4,
    ];
    same_in_every_tier(&code, Exit::Halt);
    // Into a page that is not there.
    // mov ebx,0x1ff800; mov ecx,100; a: add r13,[rbx]; lea r14,[r13+r15*2+5]; xor r15,r14; sub r13,r14; adc r15,3;
    // add rbx,0x128; dec ecx; jnz a; hlt
    let code = [
        0xBE, 0x11, 0x11, 0, 0, 0xBF, 0x22, 0x22, 0, 0, 0x41, 0xB8, 0x33, 0x33, 0, 0, 0x41, 0xB9, 0x44, 0x44,
        0, 0, 0x41, 0xBA, 0x55, 0x55, 0, 0, 0x41, 0xBC, 0x66, 0x66, 0, 0, 0xBB, 0, 0xF8, 0x1F, 0, 0xB9, 0x64,
        0, 0, 0, 0x4C, 3, 0x2B, 0x4F, 0x8D, 0x74, 0x7D, 5, 0x4D, 0x31, 0xF7, 0x4D, 0x29, 0xF5, 0x49, 0x83,
        0xD7, 3, 0x48, 0x81, 0xC3, 0x28, 1, 0, 0, 0xFF, 0xC9, 0x75, 0xE3, 0xF4,
    ];
    same_in_every_tier(&code, Exit::Halt);
}
