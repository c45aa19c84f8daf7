//! Generates cases: every opcode in every prefix and ModRM form, on operand values that matter.

use iced_x86::{
    Code, ConstantOffsets, CpuidFeature, Decoder, DecoderOptions, EncodingKind, FlowControl, Instruction,
    InstructionInfoFactory, Mnemonic, OpKind, Register, RflagsBits,
};

use super::case::{Case, Compare, Mode, Regs, CODE, CODE_SIZE, DATA, DATA_SIZE, ENTRY, READ_ONLY};
use super::values::{fill_data, registers, Rng};

/// One instruction form: prefix, map, opcode and ModRM.reg.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    map: u8,
    prefix: u8,
    opcode: u8,
    reg: u8,
    memory: bool,
    rex_w: bool,
    /// VEX: 0 or the `pp` field plus one.
    vex: u8,
    /// VEX.L
    l: bool,
    /// ModRM.reg is part of the opcode.
    group: bool,
}

fn is_prefix(map: u8, opcode: u8, long: bool) -> bool {
    match map {
        0 => {
            matches!(
                opcode,
                0x0F | 0x26 | 0x2E | 0x36 | 0x3E | 0x64..=0x67 | 0xC4 | 0xC5 | 0xF0 | 0xF2 | 0xF3
            ) || long && (0x40..0x50).contains(&opcode)
        }
        1 => matches!(opcode, 0x0F | 0x38 | 0x3A),
        _ => false,
    }
}

/// Extensions of the processor model under test.
fn claimed(feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(
        feature,
        INTEL8086
            | INTEL8086_ONLY
            | INTEL186
            | INTEL286
            | INTEL386
            | INTEL486
            | X64
            | FPU
            | FPU287
            | FPU387
            | MMX
            | SSE
            | SSE2
            | SSE3
            | SSSE3
            | SSE4_1
            | SSE4_2
            | AES
            | PCLMULQDQ
            | SHA
            | CMOV
            | CX8
            | CMPXCHG16B
            | FXSR
            | BMI1
            | BMI2
            | ADX
            | MOVBE
            | POPCNT
            | LZCNT
            | XSAVE
            | XSAVEOPT
            | XSAVEC
            | AVX
            | AVX2
            | FMA
            | F16C
            | MULTIBYTENOP
            | PAUSE
            | CLFSH
            | PREFETCHW
            | D3NOW
    )
}

/// Instructions that depend on more than the program's own state.
fn excluded(i: &Instruction) -> bool {
    use Mnemonic::*;
    let m = i.mnemonic();
    i.is_privileged()
        || matches!(i.flow_control(), FlowControl::XbeginXabortXend)
        || matches!(
            m,
            Syscall
                | Sysenter
                | Sysexit
                | Sysret
                | Int
                | Int1
                | Iret
                | Iretd
                | Iretq
                | Cpuid
                | Rdtsc
                | Rdtscp
                | Rdpmc
                | Rdrand
                | Rdseed
                | Rdpid
                | Sgdt
                | Sidt
                | Sldt
                | Str
                | Smsw
                | Lfs
                | Lgs
                | Xgetbv
                | Rsm
                | Loadall
                | Storeall
        )
        || matches!(m, Mov | Pop) && matches!(i.op0_register(), Register::FS | Register::GS | Register::CS)
        // AMD's processors have no far pointers of 80 bits.
        || matches!(i.code(), Code::Call_m1664 | Code::Jmp_m1664 | Code::Lss_r64_m1664)
        || i.cpuid_features().iter().any(|f| !claimed(*f))
        || i.cpuid_features().contains(&CpuidFeature::D3NOW) && i.mnemonic() != Prefetch
}

/// Offset of the first instruction: one that generated integers do not hit.
const START: usize = 0x863;

/// Selectors that mean the same on the host and in the guest: null ones, Linux's user segments, the
/// local table's with privilege levels 3 and 0, and one past the local table.
const SELECTORS: [u16; 20] = [
    0, 3, 0x2B, 0x28, 0x23, 0x33, 0x0F, 0x17, 0x1F, 0x27, 0x2F, 0x37, 0x3F, 0x47, 0x4F, 0x0C, 0x14, 0x1C,
    0x2D, 0x0F,
];

/// An offset of an INT3 in the code segment of a selector.
fn far_target(rng: &mut Rng, selector: u16) -> u64 {
    let flat = matches!(selector, 0x20..=0x23 | 0x33);
    rng.below(0x840) + if flat { CODE } else { 0 } + if rng.one_in(12) { 0x1000 } else { 0 }
}

/// Whether the instruction loads or looks at a selector.
fn uses_selector(i: &Instruction) -> bool {
    use Mnemonic::*;
    match i.mnemonic() {
        Lar | Lsl | Verr | Verw | Lds | Les | Lss | Retf => true,
        Mov | Pop => i.op0_register().is_segment_register(),
        Jmp | Call => {
            matches!(i.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32)
                || matches!(i.code(), Code::Call_m1616 | Code::Call_m1632 | Code::Jmp_m1616 | Code::Jmp_m1632)
        }
        _ => false,
    }
}

/// Makes cases for one mode.
pub struct Generator {
    mode: Mode,
    pub forms: Vec<Form>,
    info: InstructionInfoFactory,
    next: usize,
}

fn decode(bytes: &[u8], ip: u64, mode: Mode) -> Instruction {
    Decoder::with_ip(mode.bits(), bytes, ip, DecoderOptions::NONE).decode()
}

/// Where immediate and displacement lie in the instruction.
fn layout(bytes: &[u8], mode: Mode) -> ConstantOffsets {
    let mut d = Decoder::with_ip(mode.bits(), bytes, 0, DecoderOptions::NONE);
    let i = d.decode();
    d.get_constant_offsets(&i)
}

impl Generator {
    /// `filter` chooses among the instructions that are claimed at all.
    pub fn new(mode: Mode, filter: impl Fn(&Instruction) -> bool) -> Generator {
        let long = mode == Mode::Long;
        let mut forms = Vec::new();
        let mut rng = Rng(1);
        for vex in 0..5u8 {
            for map in 0..4u8 {
                for opcode in 0..=255u8 {
                    // ftvm has no VEX in 16-bit code, which hardly any program uses.
                    if vex != 0 && (map < 1 || mode == Mode::Segmented16) || is_prefix(map, opcode, long) {
                        continue;
                    }
                    for prefix in if vex == 0 { &[0, 0x66, 0xF3, 0xF2][..] } else { &[0][..] } {
                        for memory in [false, true] {
                            for rex_w in [false, true] {
                                if rex_w && !long && vex == 0 {
                                    continue;
                                }
                                for l in [false, true] {
                                    if l && vex == 0 {
                                        continue;
                                    }
                                    let form = |reg| Form {
                                        map,
                                        prefix: *prefix,
                                        opcode,
                                        reg,
                                        memory,
                                        rex_w,
                                        vex,
                                        l,
                                        group: true,
                                    };
                                    let decoded: Vec<Instruction> = (0..8)
                                        .map(|reg| {
                                            let mut bytes = assemble(&form(reg), &mut rng, long, true);
                                            bytes.resize(32, 0);
                                            decode(&bytes, 0, mode)
                                        })
                                        .collect();
                                    let good = |i: &Instruction| !i.is_invalid() && !excluded(i) && filter(i);
                                    let same = decoded.iter().all(|i| i.code() == decoded[0].code());
                                    if same && good(&decoded[0]) {
                                        forms.push(Form { group: false, ..form(0) });
                                    } else if !same {
                                        for (reg, i) in decoded.iter().enumerate() {
                                            if good(i) {
                                                forms.push(form(reg as u8));
                                            }
                                        }
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
        Generator { mode, forms, info: InstructionInfoFactory::new(), next: 0 }
    }

    /// A case of `count` instructions. Single instructions walk through all forms in turn.
    pub fn case(&mut self, rng: &mut Rng, count: usize) -> Case {
        loop {
            if let Some(case) = self.try_case(rng, count) {
                return case;
            }
        }
    }

    fn try_case(&mut self, rng: &mut Rng, count: usize) -> Option<Case> {
        let mut case = Case {
            mode: self.mode,
            code: [0xCC; CODE_SIZE],
            regs: registers(rng, self.mode),
            data: [0; DATA_SIZE],
            starts: Vec::new(),
            undefined: 0,
            undefined_after: Vec::new(),
            compare: Compare::default(),
            open_bytes: Vec::new(),
        };
        fill_data(rng, &mut case.data);
        let mut at = START;
        case.regs.rip = CODE - self.mode.code_base() + at as u64;
        let mut compare_next = false;
        let mut left = count;
        // General registers that earlier instructions used: their values are spoken for.
        let mut touched = 0u32;
        while left > 0 {
            if compare_next {
                // cmp eax, ecx defines all flags again.
                case.code[at..at + 2].copy_from_slice(&[0x39, 0xC8]);
                case.starts.push(at as u16);
                at += 2;
                compare_next = false;
                case.undefined = 0;
                case.undefined_after.push(0);
            }
            let form = if count == 1 {
                self.next = (self.next + 1) % self.forms.len();
                self.forms[self.next]
            } else {
                self.forms[rng.below(self.forms.len() as u64) as usize]
            };
            let mut bytes = assemble(&form, rng, self.mode == Mode::Long, false);
            bytes.resize(32, 0);
            bytes[15..].fill_with(|| rng.next() as u8);
            let ip = CODE - self.mode.code_base() + at as u64;
            let mut i = decode(&bytes, ip, self.mode);
            if i.is_invalid() || excluded(&i) || i.has_lock_prefix() && i.is_invalid() {
                return None;
            }
            if matches!(i.segment_prefix(), Register::FS | Register::GS) {
                return None;
            }
            // Branches stay near: what a jump hits is INT3 in the code page.
            let len = i.len();
            let branch = !matches!(
                i.flow_control(),
                FlowControl::Next | FlowControl::Interrupt | FlowControl::Exception
            );
            if branch && self.mode == Mode::Long && bytes[..len].contains(&0x66) {
                // With this prefix AMD's processors branch to 16 bits of the address.
                return None;
            }
            if (0..i.op_count()).any(|n| {
                matches!(i.op_kind(n), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64)
            }) {
                let size = layout(&bytes, self.mode).immediate_size();
                if size > 1 {
                    let disp = (rng.below(1500) as i32 - 1500).to_le_bytes();
                    bytes[len - size..len].copy_from_slice(&disp[..size]);
                    i = decode(&bytes, ip, self.mode);
                }
                // Not into the case itself, which might not end.
                let to = i
                    .near_branch_target()
                    .wrapping_add(self.mode.code_base())
                    .wrapping_sub(CODE + START as u64);
                if i.len() != len || to < (at - START) as u64 + 16 {
                    return None;
                }
            }
            if i.is_ip_rel_memory_operand() {
                let target = target_address(rng, &i);
                let disp = target.wrapping_sub(ip + len as u64) as u32;
                let at = layout(&bytes, self.mode).displacement_offset();
                bytes[at..at + 4].copy_from_slice(&disp.to_le_bytes());
                i = decode(&bytes, ip, self.mode);
            }
            let absolute =
                touches_memory(&i) && i.memory_base() == Register::None && i.memory_index() == Register::None;
            if absolute && !rng.one_in(20) {
                let offsets = layout(&bytes, self.mode);
                let (at, size) = (offsets.displacement_offset(), offsets.displacement_size());
                let target = target_address(rng, &i).wrapping_sub(segment_base(&i, self.mode));
                bytes[at..at + size].copy_from_slice(&target.to_le_bytes()[..size]);
                i = decode(&bytes, ip, self.mode);
            }
            if matches!(i.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32) {
                let mut selector = rng.pick(&SELECTORS);
                if self.mode.segmented() && selector == 0x33 {
                    selector = 0;
                }
                let target = far_target(rng, selector).to_le_bytes();
                let size = if i.op0_kind() == OpKind::FarBranch16 { 2 } else { 4 };
                bytes[len - 2..len].copy_from_slice(&selector.to_le_bytes());
                bytes[len - 2 - size..len - 2].copy_from_slice(&target[..size]);
                i = decode(&bytes, ip, self.mode);
            }
            if count > 1 && uses_selector(&i) {
                return None;
            }
            let needs = needs(&i);
            if needs & touched != 0 {
                return None;
            }
            let first = case.starts.is_empty();
            if !self.settle(rng, &mut case, &i) {
                return None;
            }
            if count > 1 {
                let fragile = !case.open_bytes.is_empty()
                    || case.compare.unusual()
                    || matches!(i.mnemonic(), Mnemonic::Fldenv | Mnemonic::Frstor | Mnemonic::Fldcw)
                    || !matches!(i.flow_control(), FlowControl::Next);
                if matches!(
                    i.flow_control(),
                    FlowControl::IndirectBranch | FlowControl::IndirectCall | FlowControl::Return
                ) {
                    return None;
                }
                let loads_state = matches!(
                    i.mnemonic(),
                    Mnemonic::Ldmxcsr
                        | Mnemonic::Vldmxcsr
                        | Mnemonic::Fxrstor
                        | Mnemonic::Fxrstor64
                        | Mnemonic::Xrstor
                        | Mnemonic::Xrstor64
                        | Mnemonic::Popf
                        | Mnemonic::Popfd
                        | Mnemonic::Popfq
                );
                // What `settle` knows of operand values holds for the first instruction only.
                let by_value = matches!(
                    i.mnemonic(),
                    Mnemonic::F2xm1
                        | Mnemonic::Fyl2x
                        | Mnemonic::Fyl2xp1
                        | Mnemonic::Fptan
                        | Mnemonic::Fpatan
                        | Mnemonic::Fsin
                        | Mnemonic::Fcos
                        | Mnemonic::Fsincos
                        | Mnemonic::Fbld
                        | Mnemonic::Shld
                        | Mnemonic::Shrd
                );
                if fragile && left > 1 || (loads_state || by_value) && !first {
                    return None;
                }
                for used in self.info.info(&i).used_registers() {
                    if used.register().is_gpr() {
                        touched |= 1 << used.register().full_register().number();
                    }
                }
            }
            let mut undefined = u64::from(i.rflags_undefined());
            if rotates_whole(&i) {
                undefined |= u64::from(RflagsBits::OF);
            }
            if undefined != 0 {
                let mut bits = 0;
                for (flag, bit) in [
                    (RflagsBits::OF, 11),
                    (RflagsBits::SF, 7),
                    (RflagsBits::ZF, 6),
                    (RflagsBits::AF, 4),
                    (RflagsBits::CF, 0),
                    (RflagsBits::PF, 2),
                ] {
                    if undefined & u64::from(flag) != 0 {
                        bits |= 1 << bit;
                    }
                }
                case.undefined |= bits;
                compare_next = true;
            }
            if self.mode == Mode::Segmented16 {
                let sp = &mut case.regs.gpr[4];
                *sp = ENTRY & !0xFFFF | *sp & 0xFFFF;
            }
            case.code[at..at + len].copy_from_slice(&bytes[..len]);
            case.starts.push(at as u16);
            case.undefined_after.push(case.undefined);
            at += len;
            left -= 1;
        }
        Some(case)
    }

    /// Give the registers and data values that make the instruction do something, and note what
    /// of its results the architecture leaves open. False: not a case worth having.
    fn settle(&mut self, rng: &mut Rng, case: &mut Case, i: &Instruction) -> bool {
        use Mnemonic::*;
        let m = i.mnemonic();
        let r = &mut case.regs;
        let base = self.mode.data_base();
        let wide = |rng: &mut Rng| DATA - base + 512 + rng.below(DATA_SIZE as u64 - 1024);
        if i.is_string_instruction() || matches!(m, Maskmovq | Maskmovdqu | Vmaskmovdqu) {
            for n in [6, 7] {
                if !rng.one_in(30) {
                    r.gpr[n] = wide(rng);
                }
            }
            r.gpr[1] = rng.below(40);
        }
        if i.is_stack_instruction() || matches!(m, Enter | Leave) {
            if !rng.one_in(30) {
                r.gpr[4] = wide(rng) & if rng.one_in(4) { !0 } else { !7 };
            }
            if !rng.one_in(10) {
                r.gpr[5] = wide(rng);
            }
        }
        if m == Xlatb && !rng.one_in(10) {
            r.gpr[3] = wide(rng);
        }
        let mut address: Option<u64> = None;
        if touches_memory(i)
            && !i.is_string_instruction()
            && !matches!(m, Maskmovq | Maskmovdqu | Vmaskmovdqu | Xlatb)
        {
            if i.is_ip_rel_memory_operand() {
                address = Some(i.memory_displacement64());
            } else if i.is_vsib() {
                // The base near the data, small indices, and about half of the elements asked for.
                let segment = segment_base(i, self.mode);
                let target = target_address(rng, i).wrapping_sub(segment);
                if i.memory_base() == Register::None || !place(rng, r, i, target) {
                    return false;
                }
                let index = i.memory_index().number();
                let size = if i.is_vsib64() { 8 } else { 4 };
                for at in (0..16).step_by(size) {
                    for wide in [true, false] {
                        let v = (rng.below(64) as i64 - 20).to_le_bytes();
                        let half = if wide {
                            &mut r.high[index * 16 + at..]
                        } else {
                            &mut r.fx[160 + index * 16 + at..]
                        };
                        half[..size].copy_from_slice(&v[..size]);
                    }
                }
                // Faults of later elements may come first.
                case.compare.cr2_open = true;
            } else {
                let segment = segment_base(i, self.mode);
                let target = target_address(rng, i).wrapping_sub(segment);
                if !place(rng, r, i, target) {
                    return false;
                }
                if self.mode == Mode::Segmented16 {
                    if i.memory_base() == Register::ESP {
                        return false;
                    }
                    r.gpr[4] = ENTRY & !0xFFFF | r.gpr[4] & 0xFFFF;
                }
                address = effective_address(i, r).map(|a| a.wrapping_add(segment));
            }
        }
        let offset = address.map(|a| a.wrapping_sub(DATA)).filter(|o| *o < DATA_SIZE as u64 - 640);
        if self.mode != Mode::Long {
            r.gpr.iter_mut().for_each(|v| *v &= 0xFFFF_FFFF);
        }
        // Bit strings reach far from the operand's address.
        if matches!(m, Bt | Btc | Btr | Bts)
            && address.is_some()
            && i.op1_kind() == OpKind::Register
            && !rng.one_in(20)
        {
            let reg = i.op1_register().full_register();
            if reg == i.memory_base().full_register() || reg == i.memory_index().full_register() {
                return false;
            }
            let far = if self.mode == Mode::Long { !0x7FF } else { 0xFFFF_F800 };
            r.gpr[reg.number()] = rng.next() & 0x7FF | if rng.one_in(2) { 0 } else { far };
        }
        let stack_mask = if self.mode == Mode::Segmented16 { 0xFFFF } else { u64::MAX };
        // A call checks its target before or after it pushes; ENTER checks the new top early or late.
        case.compare.order_open |= matches!(m, Call | Enter | Retf);
        case.compare.error_open |= m == Arpl;
        // Where neither operand is there, processors differ in the one that they miss first.
        case.compare.cr2_open |= matches!(m, Retf | Cmpsb | Cmpsw | Cmpsd | Cmpsq);
        case.compare.cr2_open |= !matches!(i.memory_size().size(), 0..=10 | 16);
        if uses_selector(i) {
            let mut selector = rng.pick(&SELECTORS);
            if m == Call && self.mode.segmented() && selector == 0x33 {
                // The return address goes to the stack of the old mode or of the new one.
                selector = 0;
            }
            if !matches!(i.flow_control(), FlowControl::Next) {
                // Outside 64-bit mode the upper half of RSP is not kept.
                r.gpr[4] &= 0xFFFF_FFFF;
            }
            let target = far_target(rng, selector).to_le_bytes();
            let place = |data: &mut [u8; DATA_SIZE], at: Option<u64>, bytes: &[u8]| {
                let at = at.map_or(DATA_SIZE, |a| a as usize);
                if at < DATA_SIZE - bytes.len() {
                    data[at..at + bytes.len()].copy_from_slice(bytes);
                }
            };
            let stack = (r.gpr[4] & stack_mask).wrapping_sub(DATA - base);
            let source = if matches!(m, Verr | Verw) { 0 } else { 1 };
            match m {
                Pop => place(&mut case.data, Some(stack), &selector.to_le_bytes()),
                // A 16-bit stack pointer that wraps carries into ESP or not.
                Retf if self.mode == Mode::Segmented16 && i.op_count() > 0 && i.immediate(0) > 0xC000 => {
                    return false;
                }
                Retf => {
                    let size = i.stack_pointer_increment() as usize / 2;
                    let size = match size {
                        2..=3 => 2,
                        4..=7 => 4,
                        _ => 8,
                    };
                    let size = if matches!(i.code(), Code::Retfw | Code::Retfw_imm16) { 2 } else { size };
                    let size = if matches!(i.code(), Code::Retfd | Code::Retfd_imm16) { 4 } else { size };
                    let size = if matches!(i.code(), Code::Retfq | Code::Retfq_imm16) { 8 } else { size };
                    place(&mut case.data, Some(stack), &target[..size]);
                    place(&mut case.data, Some(stack.wrapping_add(size as u64)), &selector.to_le_bytes());
                }
                Lds | Les | Lss | Jmp | Call => {
                    let size = i.memory_size().size().saturating_sub(2);
                    place(&mut case.data, offset, &target[..size]);
                    place(&mut case.data, offset.map(|o| o + size as u64), &selector.to_le_bytes());
                }
                _ if i.op_kind(source) == OpKind::Memory => {
                    place(&mut case.data, offset, &selector.to_le_bytes());
                }
                _ => {
                    let n = i.op_register(source).full_register().number();
                    r.gpr[n] = r.gpr[n] & !0xFFFF | u64::from(selector);
                }
            }
        }
        match m {
            Ldmxcsr | Vldmxcsr => {
                if let (Some(o), false) = (offset, rng.one_in(10)) {
                    case.data[o as usize + 2..o as usize + 4].fill(0);
                } else if offset.is_some() {
                    return false;
                }
            }
            Fxrstor | Fxrstor64 | Fxsave | Fxsave64 | Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xrstor
            | Xrstor64 | Xsavec | Xsavec64 => {
                let Some(o) = offset else { return false };
                let o = o as usize;
                case.data[o + 26..o + 28].fill(0);
                r.gpr[0] &= 3;
                r.gpr[2] = 0;
                if matches!(i.memory_base().full_register(), Register::RAX | Register::RDX)
                    || matches!(i.memory_index().full_register(), Register::RAX | Register::RDX)
                {
                    return false;
                }
                if matches!(m, Xrstor | Xrstor64) && !rng.one_in(8) {
                    case.data[o + 512..o + 576].fill(0);
                    case.data[o + 512] = rng.below(4) as u8;
                    if rng.one_in(2) {
                        case.data[o + 527] = 0x80;
                        case.data[o + 520] = 3;
                    }
                }
                if matches!(m, Xsave | Xsave64 | Xsaveopt | Xsaveopt64) {
                    case.data[o + 512..o + 576].fill(0);
                }
                case.open_bytes.push((o + 6, 18));
                case.open_bytes.push((o + 28, 4));
                for k in 0..8 {
                    // Bits above a register's 80 are reserved.
                    case.data[o + 32 + k * 16 + 10..o + 32 + k * 16 + 16].fill(0);
                }
            }
            Fnsave | Fnstenv => {
                if let Some(o) = offset {
                    case.open_bytes.push((o as usize + 6, 22));
                } else {
                    return false;
                }
            }
            // The roundings within a dot product have no defined order of exceptions.
            Dpps | Dppd | Vdpps | Vdppd if r.mxcsr() & 0x1F80 != 0x1F80 => return false,
            // Nor has the choice among several NaNs.
            Dpps | Vdpps => case.compare.nan_open = 4,
            Dppd | Vdppd => case.compare.nan_open = 8,
            // Unmasked overflow and underflow are judged by the rounded result here.
            _ if i.encoding() == EncodingKind::VEX && r.mxcsr() & 0xC00 != 0xC00 => return false,
            Movsxd if i.op0_register().is_gpr16() => return false,
            Rcpps | Rcpss | Rsqrtps | Rsqrtss | Vrcpps | Vrcpss | Vrsqrtps | Vrsqrtss => {
                case.compare.xmm_close = true
            }
            F2xm1 | Fyl2x | Fyl2xp1 | Fptan | Fpatan | Fsin | Fcos | Fsincos => {
                let st = |n: usize| (r.word(40 + n * 16) & 0x7FFF, r.word(40 + n * 16) >> 15 != 0);
                // Outside their ranges F2XM1 and FYL2XP1 are undefined; a processor's pi of 66 bits
                // makes other sines than ftvm's.
                let bound = match m {
                    F2xm1 => 0x3FFF,
                    Fyl2xp1 => 0x3FFD,
                    Fptan | Fsin | Fcos | Fsincos => 0x3FFE,
                    _ => 0x8000,
                };
                let special = st(0).0 == 0x7FFF;
                if matches!(m, F2xm1 | Fyl2xp1) && st(0).0 >= bound && !special {
                    return false;
                }
                case.compare.x87_close = true;
                case.compare.x87_open = st(0).0 >= bound && !special;
            }
            Fbld => {
                // Digits past nine are undefined.
                let digits = offset.and_then(|o| case.data.get_mut(o as usize..o as usize + 9));
                match digits {
                    Some(digits) if !rng.one_in(8) => {
                        digits.iter_mut().for_each(|b| *b = (*b % 10) | (((*b >> 4) % 10) << 4));
                    }
                    _ => case.compare.x87_open = true,
                }
            }
            Fld if i.memory_size().size() < 10 && r.word(0) & 2 == 0 && touches_memory(i) => {
                // With denormals unmasked processors differ in whether the value is pushed.
                return false;
            }
            Sha1msg1 | Sha1msg2 | Sha1nexte | Sha1rnds4 | Sha256msg1 | Sha256msg2 | Sha256rnds2
                if address.is_some_and(|a| a & 15 != 0) =>
            {
                // AMD's processors do not ask for alignment.
                return false;
            }
            Maskmovq | Maskmovdqu | Vmaskmovdqu => {
                // Whether a masked-out byte faults is the implementation's choice.
                let narrow = match self.mode {
                    Mode::Long => i.op0_kind() != OpKind::MemorySegRDI,
                    Mode::Segmented16 => i.op0_kind() != OpKind::MemorySegDI,
                    _ => i.op0_kind() != OpKind::MemorySegEDI,
                };
                if i.has_segment_prefix() || narrow {
                    return false;
                }
                r.gpr[7] = DATA - base + 64 + rng.below(DATA_SIZE as u64 - 128);
            }
            Bswap if i.op0_register().is_gpr16() => return false,
            Shld | Shrd if i.op0_kind() != OpKind::Memory && i.op0_register().is_gpr16() => {
                case.compare.exception_only = shift_count(i, r) > 16;
            }
            Shld | Shrd if matches!(i.memory_size().size(), 2) => {
                case.compare.exception_only = shift_count(i, r) > 16;
            }
            // Prefixes that the manuals do not define for these.
            Loope | Loopne if i.has_rep_prefix() || i.has_repne_prefix() => return false,
            Reservednop
                if i.code() as u32 == Code::Reservednop_rm16_r16_0F0D as u32
                    || i.code() == Code::Reservednop_rm32_r32_0F0D
                    || i.code() == Code::Reservednop_rm64_r64_0F0D =>
            {
                return false
            }
            // The upper half of the slot is written or not.
            Push if self.mode != Mode::Long && i.op0_register().is_segment_register() => {
                let o = (r.gpr[4] & stack_mask).wrapping_sub(DATA - base) as usize;
                if o < DATA_SIZE {
                    case.open_bytes.push((o.saturating_sub(4), 4));
                }
            }
            Popf | Popfd | Popfq => {
                let o = (r.gpr[4] & stack_mask).wrapping_sub(DATA - base) as usize;
                if o < DATA_SIZE - 8 {
                    case.data[o + 1] &= !0x41;
                    case.data[o + 2] &= !0x04;
                }
            }
            _ => {}
        }
        true
    }
}

/// The registers that [`Generator::settle`] may give values.
fn needs(i: &Instruction) -> u32 {
    use Mnemonic::*;
    let mut list = 0;
    let bit = |r: Register| if r.is_gpr() { 1 << r.full_register().number() } else { 0 };
    if touches_memory(i) {
        list |= bit(i.memory_base()) | bit(i.memory_index());
        if matches!(i.mnemonic(), Bt | Btc | Btr | Bts) && i.op1_kind() == OpKind::Register {
            list |= bit(i.op1_register());
        }
    }
    if i.is_string_instruction() || matches!(i.mnemonic(), Maskmovq | Maskmovdqu | Vmaskmovdqu) {
        list |= 0xC2;
    }
    if i.is_stack_instruction() || matches!(i.mnemonic(), Enter | Leave) {
        list |= 0x30;
    }
    match i.mnemonic() {
        Xlatb => list | 8,
        Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Xrstor | Xrstor64 => list | 5,
        _ => list,
    }
}

/// RCL and RCR of 8 or 16 bits by a count that brings every bit back: OF is undefined as for every
/// count but one (SDM vol. 2, RCL; APM vol. 3, RCL), which the decoder's tables overlook.
fn rotates_whole(i: &Instruction) -> bool {
    matches!(i.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr)
        && i.op1_kind() == OpKind::Immediate8
        && i.immediate8() & 31 > 1
}

fn shift_count(i: &Instruction, r: &Regs) -> u64 {
    let count = if i.op2_kind() == OpKind::Register { r.gpr[1] } else { i.immediate(2) };
    count & 31
}

fn touches_memory(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory)
}

/// The offset of the memory operand.
pub fn effective_address(i: &Instruction, r: &Regs) -> Option<u64> {
    let operand = (0..i.op_count()).find(|n| i.op_kind(*n) == OpKind::Memory)?;
    i.virtual_address(operand, 0, |reg, _, _| {
        if reg.is_segment_register() {
            return Some(0);
        }
        let mask = u64::MAX >> (64 - reg.size() * 8);
        Some(r.gpr[reg.full_register().number()] & mask)
    })
}

/// Where a memory operand is to lie: nearly always in the data, sometimes across its edges,
/// in the read-only page, or nowhere.
fn target_address(rng: &mut Rng, i: &Instruction) -> u64 {
    let size = i.memory_size().size().max(1) as u64;
    let any = DATA + rng.below(DATA_SIZE as u64 - 640);
    match rng.below(40) {
        0 => DATA + DATA_SIZE as u64 - rng.below(size + 1),
        1 => DATA.wrapping_sub(rng.below(size + 1)),
        2 => READ_ONLY + rng.below(4000),
        3 => DATA + 4096 - rng.below(size + 1),
        4 => CODE + rng.below(2000),
        5..=12 => any,
        _ if size >= 64 => any & !63,
        _ if size >= 32 => any & !31,
        _ => any & !15,
    }
}

/// Set base and index registers so that the operand lies at `target`.
fn place(rng: &mut Rng, r: &mut Regs, i: &Instruction, target: u64) -> bool {
    let index = if i.is_vsib() { Register::None } else { i.memory_index() };
    let base = i.memory_base();
    let number = |reg: Register| reg.full_register().number();
    let disp = i.memory_displacement64();
    let mut rest = target.wrapping_sub(disp);
    if index != Register::None {
        if base == Register::None {
            let scale = u64::from(i.memory_index_scale());
            r.gpr[number(index)] = rest / scale;
            return true;
        }
        if number(index) == number(base) {
            r.gpr[number(base)] = rest / (u64::from(i.memory_index_scale()) + 1);
            return true;
        }
        let value = rng.below(64).wrapping_sub(rng.below(64));
        r.gpr[number(index)] = value;
        rest = rest.wrapping_sub(value.wrapping_mul(i.memory_index_scale().into()));
    }
    if base == Register::None {
        return true;
    }
    if base.size() == 2 {
        // BP, BX, SI, DI: the upper half is anything.
        let old = r.gpr[number(base)];
        r.gpr[number(base)] = old & !0xFFFF | rest & 0xFFFF;
        return true;
    }
    if base.size() == 4 {
        rest &= 0xFFFF_FFFF;
        if rng.one_in(2) && i.code_size() == iced_x86::CodeSize::Code64 {
            rest |= rng.next() << 32;
        }
    }
    r.gpr[number(base)] = rest;
    true
}

/// Base of the segment of a memory operand.
pub fn segment_base(i: &Instruction, mode: Mode) -> u64 {
    if i.memory_segment() == Register::CS {
        mode.code_base()
    } else {
        mode.data_base()
    }
}

/// The bytes of an instruction of this form with random rest; the length is what decoding says.
fn assemble(form: &Form, rng: &mut Rng, long: bool, plain: bool) -> Vec<u8> {
    let mut b = Vec::with_capacity(32);
    if !plain {
        if rng.one_in(30) {
            b.push(rng.pick(&[0x2E, 0x36, 0x3E, 0x26]));
        }
        if rng.one_in(20) {
            b.push(0x67);
        }
        if rng.one_in(12) && form.memory {
            b.push(0xF0);
        }
        if rng.one_in(16) && form.vex == 0 {
            b.push(0x66);
        }
    }
    let extend = if plain || !long { 0 } else { rng.below(8) as u8 };
    if form.vex == 0 {
        if form.prefix != 0 {
            b.push(form.prefix);
        }
        if long && (form.rex_w || extend != 0) {
            b.push(0x40 | u8::from(form.rex_w) << 3 | extend);
        }
        match form.map {
            1 => b.push(0x0F),
            2 => b.extend([0x0F, 0x38]),
            3 => b.extend([0x0F, 0x3A]),
            _ => {}
        }
    } else {
        let v = if plain || rng.one_in(2) { 0 } else { rng.below(if long { 16 } else { 8 }) as u8 };
        b.extend([
            0xC4,
            (!extend & 7) << 5 | form.map,
            u8::from(form.rex_w) << 7 | (!v & 15) << 3 | u8::from(form.l) << 2 | (form.vex - 1),
        ]);
    }
    b.push(form.opcode);
    let rm = if plain { 0 } else { rng.below(8) as u8 };
    let mode = match (form.memory, plain) {
        (false, _) => 3,
        (true, true) => 0,
        _ => rng.below(3) as u8,
    };
    let reg = if form.group || plain { form.reg } else { rng.below(8) as u8 };
    b.push(mode << 6 | reg << 3 | rm);
    if plain {
        return b;
    }
    if rm == 4 && mode != 3 {
        b.push(rng.next() as u8);
    }
    let disp = match mode {
        1 => 1,
        2 => 4,
        _ => 0,
    };
    for k in 0..disp {
        b.push(if k == 3 { rng.pick(&[0, 0, 0xFF]) } else { rng.next() as u8 });
    }
    for _ in 0..12 {
        b.push(rng.next() as u8);
    }
    b
}

/// Instruction `n` of a case.
pub fn instruction(case: &Case, n: usize) -> Instruction {
    let start = case.starts[n] as usize;
    let ip = CODE - case.mode.code_base() + start as u64;
    decode(&case.code[start..(start + 16).min(CODE_SIZE)], ip, case.mode)
}

/// All opcodes that occur in a case, for the count of what was covered.
pub fn codes(case: &Case) -> Vec<Code> {
    case.starts
        .iter()
        .map(|s| {
            let ip = CODE + u64::from(*s);
            decode(&case.code[*s as usize..(*s as usize + 16).min(CODE_SIZE)], ip, case.mode).code()
        })
        .collect()
}

/// Whether a case ends with a branch to an address from a register, memory or the stack.
pub fn jumps_anywhere(case: &Case) -> bool {
    case.starts.last().is_some_and(|s| {
        let i = decode(&case.code[*s as usize..(*s as usize + 16).min(CODE_SIZE)], 0, case.mode);
        matches!(
            i.flow_control(),
            FlowControl::IndirectBranch | FlowControl::IndirectCall | FlowControl::Return
        )
    })
}
