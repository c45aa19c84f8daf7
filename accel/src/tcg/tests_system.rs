//! Tests of what kernels do often: the same compiled as interpreted, and compiled indeed.

use super::tests::*;
use super::tests_code::{in_every_tier, put, words};
use super::*;

/// How many handlers compiled code called in `make()` until it halts.
fn steps(make: impl Fn() -> Machine) -> u64 {
    let mut m = make();
    m.cpu.set_tier(Tier::AtOnce);
    while m.run(5000).exit == Exit::Budget {}
    m.cpu.jit.steps
}

/// What may be due when interrupts are let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    Nothing,
    /// Nothing, but the 8259 might ask.
    Direct,
    Two,
    Message,
}
const DUE: [Due; 4] = [Due::Nothing, Due::Direct, Due::Two, Due::Message];

/// A machine that counts interrupts in RBX.
fn machine(code: &[u8], due: Due) -> Machine {
    let mut m = Machine::long(code);
    m.cpu.st.gpr[RSP] = 0x7800;
    if due != Due::Direct {
        m.cpu.lapic.lvt[lapic::LINT0] |= lapic::MASKED;
    }
    if due == Due::Two {
        m.cpu.lapic.svr |= 0x100;
        m.cpu.lapic.raise(0x40, false);
        m.cpu.lapic.raise(0x50, false);
    }
    if due == Due::Message {
        m.cpu.extint = 0x160;
    }
    for vector in [0x40, 0x50, 0x60] {
        // add rbx,1000h; iretq
        put(&m, &[(0xC000 + 16 * vector, &[0x48, 0x81, 0xC3, 0, 0x10, 0, 0, 0x48, 0xCF])]);
    }
    m
}

#[test]
fn interrupts_clock_bits_and_shifts_are_the_same_compiled() {
    // a: cli; rdtsc; shl rdx,32; add rbx,rax; add rbx,rdx; mov rax,cr2; add rbx,rax; mov r13,cr3; add rbx,r13; std; F; cld;
    // shl byte [6000h],1; F; sar qword [6008h],1; F; shr dword [6010h],5; F; shl word [6018h],3; F (F: pushf; pop rax;
    // add rbx,rax); add dword [6010h],12345677h; add [6008h],rbx; add [6000h],bl; add [6018h],bx; imul edx,ecx,37;
    // sub edx,600; bt [r12],edx; adc ebx,0; movsxd r14,edx; bts [r12],r14; adc rbx,1; F; btr [r12+4],edx; adc rbx,rdx;
    // btc [r12],r14; adc rbx,3; bt [r12-8],r14; adc rbx,5; sti; add rbx,[6400h]; dec ecx; jnz a; hlt
    let code = [
        0xFA, 0x0F, 0x31, 0x48, 0xC1, 0xE2, 0x20, 0x48, 0x01, 0xC3, 0x48, 0x01, 0xD3, 0x0F, 0x20, 0xD0, 0x48,
        0x01, 0xC3, 0x41, 0x0F, 0x20, 0xDD, 0x4C, 0x01, 0xEB, 0xFD, 0x9C, 0x58, 0x48, 0x01, 0xC3, 0xFC, 0xD0,
        0x24, 0x25, 0x00, 0x60, 0x00, 0x00, 0x9C, 0x58, 0x48, 0x01, 0xC3, 0x48, 0xD1, 0x3C, 0x25, 0x08, 0x60,
        0x00, 0x00, 0x9C, 0x58, 0x48, 0x01, 0xC3, 0xC1, 0x2C, 0x25, 0x10, 0x60, 0x00, 0x00, 0x05, 0x9C, 0x58,
        0x48, 0x01, 0xC3, 0x66, 0xC1, 0x24, 0x25, 0x18, 0x60, 0x00, 0x00, 0x03, 0x9C, 0x58, 0x48, 0x01, 0xC3,
        0x81, 0x04, 0x25, 0x10, 0x60, 0x00, 0x00, 0x77, 0x56, 0x34, 0x12, 0x48, 0x01, 0x1C, 0x25, 0x08, 0x60,
        0x00, 0x00, 0x00, 0x1C, 0x25, 0x00, 0x60, 0x00, 0x00, 0x66, 0x01, 0x1C, 0x25, 0x18, 0x60, 0x00, 0x00,
        0x6B, 0xD1, 0x25, 0x81, 0xEA, 0x58, 0x02, 0x00, 0x00, 0x41, 0x0F, 0xA3, 0x14, 0x24, 0x83, 0xD3, 0x00,
        0x4C, 0x63, 0xF2, 0x4D, 0x0F, 0xAB, 0x34, 0x24, 0x48, 0x83, 0xD3, 0x01, 0x9C, 0x58, 0x48, 0x01, 0xC3,
        0x41, 0x0F, 0xB3, 0x54, 0x24, 0x04, 0x48, 0x11, 0xD3, 0x4D, 0x0F, 0xBB, 0x34, 0x24, 0x48, 0x83, 0xD3,
        0x03, 0x4D, 0x0F, 0xA3, 0x74, 0x24, 0xF8, 0x48, 0x83, 0xD3, 0x05, 0xFB, 0x48, 0x03, 0x1C, 0x25, 0x00,
        0x64, 0x00, 0x00, 0xFF, 0xC9, 0x0F, 0x85, 0x3A, 0xFF, 0xFF, 0xFF, 0xF4,
    ];
    let make = |due: Due, times: u64| {
        let mut m = machine(&code, due);
        let g = &mut m.cpu.st.gpr;
        (g[RCX], g[12]) = (times, 0x6400);
        (m.cpu.cr2, m.cpu.msr.tsc_adjust) = (0x1234_5678_9ABC, 1 << 40);
        words(&m, &[(0x6000, 0x5A), (0x6008, u64::MAX / 5 * 3), (0x6010, 0x8765_4321), (0x6018, 0x7777)]);
        m
    };
    for due in DUE {
        in_every_tier(|| make(due, 40));
    }
    assert_eq!(steps(|| make(Due::Nothing, 20)), steps(|| make(Due::Nothing, 40)));
}

#[test]
fn programs_do_not_read_the_clock_if_they_may_not() {
    // a: rdtsc; add rbx,rax; mov esi,ecx; rdtscp; lea rbx,[rbx+rcx*4]; sub rbx,rax; mov ecx,esi; dec ecx; jnz a; hlt
    let code = [
        0x0F, 0x31, 0x48, 0x01, 0xC3, 0x89, 0xCE, 0x0F, 0x01, 0xF9, 0x48, 0x8D, 0x1C, 0x8B, 0x48, 0x29, 0xC3,
        0x89, 0xF1, 0xFF, 0xC9, 0x75, 0xE9, 0xF4,
    ];
    for (tsd, cpl) in [(0, 0), (0, 3), (CR4_TSD, 0), (CR4_TSD, 3)] {
        in_every_tier(|| {
            let mut m = machine(&code, Due::Nothing);
            m.cpu.st.cr4 |= tsd;
            m.cpu.st.gpr[RCX] = 20;
            m.cpu.msr.tsc_aux = 0x8765_4321;
            if cpl == 3 {
                m.cpu.segs[CS] = Segment { selector: 0x23, base: 0, limit: u32::MAX, attr: 0xA0FB };
                m.cpu.segs[SS] = Segment { selector: 0x1B, base: 0, limit: u32::MAX, attr: 0xC0F3 };
                m.cpu.cpl = 3;
                m.cpu.update_mode();
            }
            m
        });
    }
}

#[test]
fn system_calls_are_the_same_compiled() {
    // a: mov ecx,5000h; mov r11,[rsi+rbp*8]; sysretq
    let code = [0xB9, 0x00, 0x50, 0x00, 0x00, 0x4C, 0x8B, 0x1C, 0xEE, 0x48, 0x0F, 0x07];
    // inc rbx; mov rax,[6000h]; cmp rax,rbx; syscall
    let user =
        [0x48, 0xFF, 0xC3, 0x48, 0x8B, 0x04, 0x25, 0x00, 0x60, 0x00, 0x00, 0x48, 0x39, 0xD8, 0x0F, 0x05];
    // pushf; pop rax; add rbx,rax; add rbx,rcx; add rbx,r11; ror rbx,7; xor [6000h],ebx; dec ebp; jz h; mov eax,1000h;
    // jmp rax; h: hlt
    let kernel = [
        0x9C, 0x58, 0x48, 0x01, 0xC3, 0x48, 0x01, 0xCB, 0x4C, 0x01, 0xDB, 0x48, 0xC1, 0xCB, 0x07, 0x31, 0x1C,
        0x25, 0x00, 0x60, 0x00, 0x00, 0xFF, 0xCD, 0x74, 0x07, 0xB8, 0x00, 0x10, 0x00, 0x00, 0xFF, 0xE0, 0xF4,
    ];
    let make = |due: Due, rest: u64, change: &dyn Fn(&mut SoftCpu), times: u64| {
        let mut m = machine(&code, due);
        put(&m, &[(0x5000, &user), (0x2000, &kernel)]);
        let g = &mut m.cpu.st.gpr;
        (g[RSI], g[RBP]) = (0x4000, times);
        for n in 0..64 {
            words(&m, &[(0x4000 + 8 * n, 0x246 ^ if n == 7 { rest } else { n % 2 } | (n & 4) << 4)]);
        }
        let c = &mut m.cpu;
        (c.msr.star, c.msr.lstar, c.msr.sfmask) = (0x10 << 48 | 8 << 32, 0x2000, 0x4_4700);
        change(c);
        m
    };
    let plain: &dyn Fn(&mut SoftCpu) = &|_| {};
    for due in DUE {
        in_every_tier(|| make(due, 0, plain, 30));
        // Interrupts stay on in the kernel.
        in_every_tier(|| make(due, 0, &|c| c.msr.sfmask = 0x400, 30));
    }
    // Flags that ask for more: AC, ID and IOPL, DF and NT, RF and VM, IF off, a single step.
    for rest in [flags::AC, flags::ID | flags::IOPL, flags::DF | flags::NT, flags::RF | flags::VM, IF, TF] {
        for sfmask in [0x4_4700, 0x100] {
            for cr0 in [0, CR0_AM] {
                in_every_tier(|| {
                    let change = |c: &mut SoftCpu| {
                        c.msr.sfmask = sfmask;
                        c.st.cr0 |= cr0;
                    };
                    make(Due::Nothing, rest, &change, 12)
                });
            }
        }
    }
    // No such instructions; a return to no address; a call from the kernel.
    in_every_tier(|| make(Due::Nothing, 0, &|c| c.efer &= !EFER_SCE, 12));
    in_every_tier(|| {
        let m = make(Due::Nothing, 0, plain, 12);
        // a: mov rcx,[rsi+rbp*8+200h]; mov r11,[rsi+rbp*8]; sysretq
        let code = [0x48, 0x8B, 0x8C, 0xEE, 0, 2, 0, 0, 0x4C, 0x8B, 0x1C, 0xEE, 0x48, 0x0F, 0x07];
        put(&m, &[(0x1000, &code)]);
        for n in 0..64 {
            words(&m, &[(0x4200 + 8 * n, if n == 5 { 1 << 63 } else { 0x5000 })]);
        }
        m
    });
    in_every_tier(|| {
        let m = make(Due::Nothing, 0, plain, 12);
        // syscall instead of sysretq
        put(&m, &[(0x1009, &[0x0F, 0x05, 0x90])]);
        m
    });
    assert_eq!(steps(|| make(Due::Nothing, 0, plain, 20)), steps(|| make(Due::Nothing, 0, plain, 60)));
}

#[test]
fn selectors_are_read_the_same_compiled_and_leave_the_flags() {
    // a: mov eax,ds; add rbx,rax; mov r9d,ss; add rbx,r9; cmp ecx,7; mov rdx,cs; adc rbx,rdx; mov r13d,fs; adc rbx,r13;
    // dec ecx; jnz a; mov ax,es; add rbx,rax; hlt
    let code = [
        0x8C, 0xD8, 0x48, 0x01, 0xC3, 0x41, 0x8C, 0xD1, 0x4C, 0x01, 0xCB, 0x83, 0xF9, 0x07, 0x48, 0x8C, 0xCA,
        0x48, 0x11, 0xD3, 0x41, 0x8C, 0xE5, 0x4C, 0x11, 0xEB, 0xFF, 0xC9, 0x75, 0xE2, 0x66, 0x8C, 0xC0, 0x48,
        0x01, 0xC3, 0xF4,
    ];
    let make = |times: u64| {
        let mut m = machine(&code, Due::Nothing);
        m.cpu.segs[FS].selector = 0x8033;
        let g = &mut m.cpu.st.gpr;
        (g[RAX], g[RCX], g[RDX], g[9], g[13]) = (u64::MAX, times, u64::MAX, u64::MAX, u64::MAX);
        m
    };
    let rbx = in_every_tier(|| make(20));
    // Six times the comparison borrows.
    assert_eq!(rbx, 20 * (0x10 + 0x10 + 8 + 0x8033) + 6 + 0x10);
    assert_eq!(steps(|| make(20)), steps(|| make(40)));
}
