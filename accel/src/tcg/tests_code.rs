//! Tests of what is remembered of code: where calls return, where jumps led, what address spaces share.

use super::tests::*;
use super::*;

/// Runs machines interpreted and compiled, in strides; the whole state must agree at every stop. Returns RBX in the end.
pub(super) fn in_every_tier(make: impl Fn() -> Machine) -> u64 {
    let mut rbx = None;
    for tier in [Tier::AtOnce, Tier::After(2), Tier::Random(5)] {
        for stride in [1, 3, 7, 5000] {
            let (mut a, mut b) = (make(), make());
            a.cpu.set_tier(Tier::Never);
            b.cpu.set_tier(tier);
            loop {
                let (x, y) = (a.run(stride), b.run(stride));
                assert_eq!(x, y, "{tier:?}, {stride} at a time, at {}", a.position);
                assert_eq!(a.cpu.save(), b.cpu.save(), "{tier:?}, {stride} at a time, at {}", a.position);
                if x.exit != Exit::Budget {
                    assert_eq!(x.exit, Exit::Halt);
                    break;
                }
                assert!(a.position < 5000);
            }
            assert_eq!(*rbx.get_or_insert(b.cpu.st.gpr[RBX]), b.cpu.st.gpr[RBX]);
        }
    }
    rbx.unwrap()
}

pub(super) fn put(m: &Machine, parts: &[(u64, &[u8])]) {
    for (at, bytes) in parts {
        m.mem.write(*at, bytes).unwrap();
    }
}
/// A page table of the first 2 MiB.
fn identity(m: &Machine, at: u64) {
    for i in 0..512 {
        words(m, &[(at + 8 * i, i << 12 | 7)]);
    }
}
pub(super) fn words(m: &Machine, words: &[(u64, u64)]) {
    for (at, v) in words {
        m.mem.write(*at, &v.to_le_bytes()).unwrap();
    }
}

#[test]
fn a_call_returns_to_code_that_changed_meanwhile() {
    // mov ecx,21; a: call 5000h; inc ebx; dec ecx; jnz a; hlt
    let code = [0xB9, 21, 0, 0, 0, 0xE8, 0xF6, 0x3F, 0, 0, 0xFF, 0xC3, 0xFF, 0xC9, 0x75, 0xF5, 0xF4];
    let rbx = in_every_tier(|| {
        let mut m = Machine::long(&code);
        m.cpu.st.gpr[RSP] = 0x7800;
        // xor byte [100Bh],8 (inc becomes dec, and back); ret
        put(&m, &[(0x5000, &[0x80, 0x34, 0x25, 0x0B, 0x10, 0, 0, 8, 0xC3])]);
        m
    });
    assert_eq!(rbx as u32, u32::MAX);
}

#[test]
fn a_call_returns_to_another_page_at_the_same_address() {
    // mov ecx,20; a: call 2000h; dec ecx; jnz a; hlt
    let code = [0xB9, 20, 0, 0, 0, 0xE8, 0xF6, 0x0F, 0, 0, 0xFF, 0xC9, 0x75, 0xF7, 0xF4];
    let rbx = in_every_tier(|| {
        let mut m = Machine::long(&code);
        m.cpu.st.gpr[RSP] = 0x7800;
        put(
            &m,
            &[
                // call 5000h; inc ebx; ret
                (0x2000, &[0xE8, 0xFB, 0x2F, 0, 0, 0xFF, 0xC3, 0xC3]),
                // call 5000h; add ebx,100; ret
                (0x3000, &[0xE8, 0xFB, 0x2F, 0, 0, 0x83, 0xC3, 100, 0xC3]),
                // xor byte [13011h],10h (2000h and 3000h show at 2000h in turn); ret
                (0x5000, &[0x80, 0x34, 0x25, 0x11, 0x30, 0x01, 0, 0x10, 0xC3]),
            ],
        );
        m
    });
    assert_eq!(rbx, 10 * 100 + 10);
}

#[test]
fn code_in_both_halves_returns_by_the_tables_of_its_own() {
    // mov ecx,20; a: call 2000h; dec ecx; jnz a; mov ecx,20; mov rdi,HIGH_HALF+2000h; b: call rdi; dec ecx; jnz b; hlt
    let code = [
        0xB9, 20, 0, 0, 0, 0xE8, 0xF6, 0x0F, 0, 0, 0xFF, 0xC9, 0x75, 0xF7, 0xB9, 20, 0, 0, 0, 0x48, 0xBF, 0,
        0x20, 0, 0, 0x80, 0xFF, 0xFF, 0xFF, 0xFF, 0xD7, 0xFF, 0xC9, 0x75, 0xFA, 0xF4,
    ];
    let rbx = in_every_tier(|| {
        let mut m = Machine::long(&code);
        m.cpu.st.gpr[RSP] = 0x7800;
        words(&m, &[(0x1_0FF8, 0x1_A027), (0x1_A000, 0x1_B007), (0x1_B000, 0x1_C007)]);
        identity(&m, 0x1_C000);
        put(
            &m,
            &[
                // call 5000h; inc ebx; ret
                (0x2000, &[0xE8, 0xFB, 0x2F, 0, 0, 0xFF, 0xC3, 0xC3]),
                // call 5000h; add ebx,100; ret
                (0x3000, &[0xE8, 0xFB, 0x2F, 0, 0, 0x83, 0xC3, 100, 0xC3]),
                // xor byte [1C011h],10h (2000h and 3000h show at HIGH_HALF+2000h in turn); ret
                (0x5000, &[0x80, 0x34, 0x25, 0x11, 0xC0, 0x01, 0, 0x10, 0xC3]),
            ],
        );
        m
    });
    assert_eq!(rbx, 20 + 10 * 100 + 10);
}

#[test]
fn short_keys_that_come_again_hold_for_nothing_older() {
    // mov ecx,20; a: call 5000h; dec ecx; jnz a; hlt
    let code = [0xB9, 20, 0, 0, 0, 0xE8, 0xF6, 0x3F, 0, 0, 0xFF, 0xC9, 0x75, 0xF7, 0xF4];
    let mut m = Machine::long(&code);
    // inc ebx; ret. add ebx,100; ret
    put(&m, &[(0x5000, &[0xFF, 0xC3, 0xC3]), (0x6000, &[0x83, 0xC3, 100, 0xC3])]);
    m.cpu.set_tier(Tier::AtOnce);
    m.cpu.st.gpr[RSP] = 0x7800;
    assert_eq!(m.run(1000).exit, Exit::Halt);
    assert_eq!(m.cpu.st.gpr[RBX], 20);
    // Another page at 5000h, and as many epochs as there are short keys.
    let (key, epoch) = (m.cpu.more_slots[SHORT_KEYS - 32] as u32, m.cpu.epoch);
    words(&m, &[(0x1_3028, 0x6007)]);
    assert_eq!(m.run(0).exit, Exit::Budget);
    m.cpu.epochs = epoch + cache::SHORT - 1;
    m.cpu.new_low_epoch();
    assert_eq!(m.cpu.more_slots[SHORT_KEYS - 32] as u32, key);
    (m.cpu.rip, m.cpu.halted) = (0x1000, false);
    assert_eq!(m.run(1000).exit, Exit::Halt);
    assert_eq!(m.cpu.st.gpr[RBX], 20 + 20 * 100);
}

#[test]
fn an_instruction_across_pages_follows_both() {
    // mov ecx,24; jmp 1FE0h
    let code = [0xB9, 24, 0, 0, 0, 0xE9, 0xD6, 0x0F, 0, 0];
    let rbx = in_every_tier(|| {
        let m = Machine::long(&code);
        // xor byte [2001h],2; test cl,1; jz c; xor byte [13011h],10h (the second page is 2000h or 3000h); c: nops;
        // add ebx,imm32, of which three bytes are in the second page; dec ecx; jz d; jmp 1FE0h; d: hlt
        let mut first = vec![
            0x80, 0x34, 0x25, 0x01, 0x20, 0, 0, 2, 0xF6, 0xC1, 1, 0x74, 8, 0x80, 0x34, 0x25, 0x11, 0x30,
            0x01, 0, 0x10,
        ];
        first.resize(0x1D, 0x90);
        first.extend([0x81, 0xC3, 0x44]);
        let rest = [0xFF, 0xC9, 0x74, 5, 0xE9, 0xD4, 0xFF, 0xFF, 0xFF, 0xF4];
        put(
            &m,
            &[
                (0x1FE0, &first),
                (0x2000, &[0x33, 0x22, 0x11]),
                (0x2003, &rest),
                (0x3000, &[0xAA, 0xBB, 0xCC]),
                (0x3003, &rest),
            ],
        );
        m
    });
    let (mut pages, mut at, mut sum) = ([[0x33, 0x22, 0x11], [0xAA, 0xBB, 0xCC]], 0, 0u32);
    for n in (1..=24).rev() {
        pages[at][1] ^= 2;
        at ^= n & 1;
        let [a, b, c] = pages[at];
        sum = sum.wrapping_add(u32::from_le_bytes([0x44, a, b, c]));
    }
    assert_eq!(rbx, u64::from(sum));
}

/// Where the tests' kernel half begins: entry 511 of the top table.
const HIGH_HALF: u64 = 0xFFFF_FF80_0000_0000;

#[test]
fn address_spaces_share_kernel_code_only_while_they_agree() {
    // mov ecx,20; a: CR3 changes between 10000h and 16000h; add rbx,[5000h]; call HIGH_HALF+7000h; if ecx is 10: the top
    // entry 511 of the space that is not in use leads to 1A000h; dec ecx; jnz a; hlt
    let code = [
        0xB9, 0x14, 0x00, 0x00, 0x00, 0x0F, 0x20, 0xD8, 0x35, 0x00, 0x60, 0x00, 0x00, 0x0F, 0x22, 0xD8, 0x48,
        0x03, 0x1C, 0x25, 0x00, 0x50, 0x00, 0x00, 0xE8, 0xE3, 0x5F, 0x00, 0x00, 0x83, 0xF9, 0x0A, 0x75, 0x1E,
        0x0F, 0x20, 0xD8, 0x35, 0x00, 0x60, 0x00, 0x00, 0x48, 0xBA, 0x00, 0x00, 0x00, 0x00, 0x80, 0xFF, 0xFF,
        0xFF, 0x48, 0xC7, 0x84, 0x02, 0xF8, 0x0F, 0x00, 0x00, 0x27, 0xA0, 0x01, 0x00, 0xFF, 0xC9, 0x75, 0xC1,
        0xF4,
    ];
    let rbx = in_every_tier(|| {
        let mut m = Machine::long(&code);
        put(
            &m,
            &[
                // add rbx,1000h; ret
                (0x7000, &[0x48, 0x81, 0xC3, 0, 0x10, 0, 0, 0xC3]),
                // add rbx,100000h; ret
                (0xD000, &[0x48, 0x81, 0xC3, 0, 0, 0x10, 0, 0xC3]),
            ],
        );
        words(&m, &[(0x5000, 1), (0x6000, 2)]);
        // Both spaces have the upper half of the first's tables, accessed already.
        words(&m, &[(0x1_0FF8, 0x1_1027), (0x1_6FF8, 0x1_1027)]);
        // The second's lower half: 6000h at 5000h.
        words(&m, &[(0x1_6000, 0x1_7007), (0x1_7000, 0x1_8007), (0x1_8000, 0x1_9007), (0x1_9028, 0x6007)]);
        // Another upper half: D000h at 7000h.
        words(&m, &[(0x1_A000, 0x1_B007), (0x1_B000, 0x1_C007)]);
        identity(&m, 0x1_C000);
        words(&m, &[(0x1_C038, 0xD007)]);
        m.cpu.rip = HIGH_HALF + 0x1000;
        m.cpu.st.gpr[RSP] = HIGH_HALF + 0x6000;
        m
    });
    assert_eq!(rbx, 30 + 15 * 0x1000 + 5 * 0x10_0000);
}

#[test]
fn code_of_an_address_space_put_aside_is_found_anew_when_its_page_moves() {
    // mov ecx,40; mov rdi,HIGH_HALF; a: CR3 changes between 10000h and 16000h; twice call 5000h; what the space that is not
    // in use has at 5000h moves to D000h or back (E000h from 6000h in the second's); dec ecx; jnz a; hlt
    let code = [
        0xB9, 0x28, 0, 0, 0, 0x48, 0xBF, 0, 0, 0, 0, 0x80, 0xFF, 0xFF, 0xFF, 0x0F, 0x20, 0xD8, 0x35, 0, 0x60,
        0, 0, 0x0F, 0x22, 0xD8, 0xBE, 0, 0x50, 0, 0, 0xFF, 0xD6, 0xFF, 0xD6, 0x35, 0, 0x60, 0, 0, 0x80, 0xB4,
        7, 0x29, 0x30, 0, 0, 0x80, 0xFF, 0xC9, 0x75, 0xDB, 0xF4,
    ];
    let rbx = in_every_tier(|| {
        let mut m = Machine::long(&code);
        for (at, more) in [(0x5000, 0), (0x6000, 1), (0xD000, 2), (0xE000, 3)] {
            // add rbx,imm32; ret
            put(
                &m,
                &[
                    (at, &[0x48, 0x81, 0xC3]),
                    (at + 3, &(1u32 << (8 * more)).to_le_bytes()),
                    (at + 7, &[0xC3]),
                ],
            );
        }
        // The upper half has tables of its own, the same in both spaces.
        words(&m, &[(0x1_0FF8, 0x1_A027), (0x1_6FF8, 0x1_A027), (0x1_A000, 0x1_B007), (0x1_B000, 0x1_C007)]);
        identity(&m, 0x1_C000);
        // The second's lower half: 6000h at 5000h.
        words(&m, &[(0x1_6000, 0x1_7007), (0x1_7000, 0x1_8007), (0x1_8000, 0x1_9007), (0x1_9028, 0x6007)]);
        m.cpu.rip = HIGH_HALF + 0x1000;
        m.cpu.st.gpr[RSP] = HIGH_HALF + 0x7800;
        m
    });
    assert_eq!(rbx, 20 * 0x0101_0101);
}

#[test]
fn table_entries_of_every_level_are_noticed() {
    // Four times: add rbx,[5000h]; then for the PTE, the PDE (after 40 writes beside it), the PDPTE and the top entry:
    // xor of the entry; add rbx,[5000h]; xor back; add rbx,[5000h].
    let code = [
        0xB9, 0x04, 0x00, 0x00, 0x00, 0x48, 0xBF, 0x00, 0x00, 0x00, 0x00, 0x80, 0xFF, 0xFF, 0xFF, 0x48, 0x03,
        0x1C, 0x25, 0x00, 0x50, 0x00, 0x00, 0x80, 0xB7, 0x29, 0x30, 0x01, 0x00, 0x30, 0x48, 0x03, 0x1C, 0x25,
        0x00, 0x50, 0x00, 0x00, 0x80, 0xB7, 0x29, 0x30, 0x01, 0x00, 0x30, 0x48, 0x03, 0x1C, 0x25, 0x00, 0x50,
        0x00, 0x00, 0xBA, 0x28, 0x00, 0x00, 0x00, 0x48, 0xC7, 0x84, 0xD7, 0x00, 0x24, 0x01, 0x00, 0x00, 0x00,
        0x00, 0x00, 0xFF, 0xCA, 0x75, 0xF0, 0x80, 0xB7, 0x01, 0x20, 0x01, 0x00, 0xA0, 0x48, 0x03, 0x1C, 0x25,
        0x00, 0x50, 0x00, 0x00, 0x80, 0xB7, 0x01, 0x20, 0x01, 0x00, 0xA0, 0x48, 0x03, 0x1C, 0x25, 0x00, 0x50,
        0x00, 0x00, 0x80, 0xB7, 0x01, 0x10, 0x01, 0x00, 0xF0, 0x48, 0x03, 0x1C, 0x25, 0x00, 0x50, 0x00, 0x00,
        0x80, 0xB7, 0x01, 0x10, 0x01, 0x00, 0xF0, 0x48, 0x03, 0x1C, 0x25, 0x00, 0x50, 0x00, 0x00, 0x80, 0xB7,
        0x01, 0x00, 0x01, 0x00, 0xE0, 0x48, 0x03, 0x1C, 0x25, 0x00, 0x50, 0x00, 0x00, 0x80, 0xB7, 0x01, 0x00,
        0x01, 0x00, 0xE0, 0x48, 0x03, 0x1C, 0x25, 0x00, 0x50, 0x00, 0x00, 0xFF, 0xC9, 0x0F, 0x85, 0x63, 0xFF,
        0xFF, 0xFF, 0xF4,
    ];
    let rbx = in_every_tier(|| {
        let mut m = Machine::long(&code);
        words(&m, &[(0x5000, 1), (0x6000, 2), (0xD000, 4), (0xE000, 8), (0xF000, 16)]);
        // The upper half has tables of its own.
        words(&m, &[(0x1_0FF8, 0x1_A007), (0x1_A000, 0x1_B007), (0x1_B000, 0x1_C007)]);
        identity(&m, 0x1_C000);
        words(&m, &[(0x1_9028, 0xD007)]);
        words(&m, &[(0x1_D000, 0x1_E007), (0x1_E028, 0xE007)]);
        words(&m, &[(0x1_F000, 0x2_0007), (0x2_0000, 0x2_1007), (0x2_1028, 0xF007)]);
        m.cpu.rip = HIGH_HALF + 0x1000;
        m
    });
    assert_eq!(rbx, 4 * (1 + 3 + 5 + 9 + 17));
}

/// 32-bit code in protected mode, in flat segments; the GDT has one at 18h that is not (it begins at 1000h).
fn flat32(code: &[u8]) -> Machine {
    let mut m = Machine::real(code);
    words(
        &m,
        &[(0x8008, 0x00CF_9B00_0000_FFFF), (0x8010, 0x00CF_9300_0000_FFFF), (0x8018, 0x00CF_9300_1000_FFFF)],
    );
    let c = &mut m.cpu;
    c.gdt = (0x8000, 0x1F);
    c.segs[CS] = Segment { selector: 8, base: 0, limit: u32::MAX, attr: 0xC09B };
    for s in [ES, SS, DS] {
        c.segs[s] = Segment { selector: 0x10, base: 0, limit: u32::MAX, attr: 0xC093 };
    }
    c.st.cr0 |= CR0_PE;
    c.st.gpr[RSP] = 0x7800;
    c.update_mode();
    m
}

#[test]
fn flat_32_bit_code_is_compiled_until_a_segment_is_not_flat() {
    // mov esi,6; o: mov ecx,9; a: push ecx; call 2000h; pop ecx; lea eax,[ecx*4+ebx-7]; xor ebx,eax; dec ecx; jnz a;
    // DS becomes 10h or 18h in turn; add ebx,[5000h]; dec esi; jnz o; hlt
    let code = [
        0xBE, 0x06, 0x00, 0x00, 0x00, 0xB9, 0x09, 0x00, 0x00, 0x00, 0x51, 0xE8, 0xF0, 0x0F, 0x00, 0x00, 0x59,
        0x8D, 0x44, 0x8B, 0xF9, 0x31, 0xC3, 0x49, 0x75, 0xF0, 0xB8, 0x18, 0x00, 0x00, 0x00, 0xF7, 0xC6, 0x01,
        0x00, 0x00, 0x00, 0x74, 0x05, 0xB8, 0x10, 0x00, 0x00, 0x00, 0x8E, 0xD8, 0x03, 0x1D, 0x00, 0x50, 0x00,
        0x00, 0x4E, 0x75, 0xCE, 0xF4,
    ];
    let make = || {
        let m = flat32(&code);
        // push ebp; mov ebp,esp; inc ebx; add ebx,[ebp+8]; add [5010h],ebx; push 3; push dword [5010h]; pop edx;
        // mov eax,2100h; call eax; leave; ret
        let f = [
            0x55, 0x89, 0xE5, 0x43, 0x03, 0x5D, 0x08, 0x01, 0x1D, 0x10, 0x50, 0x00, 0x00, 0x6A, 0x03, 0xFF,
            0x35, 0x10, 0x50, 0x00, 0x00, 0x5A, 0xB8, 0x00, 0x21, 0x00, 0x00, 0xFF, 0xD0, 0xC9, 0xC3,
        ];
        // add ebx,edx; jc q; ret; q: inc edi; ret
        let g = [0x01, 0xD3, 0x72, 0x01, 0xC3, 0x47, 0xC3];
        put(&m, &[(0x2000, &f), (0x2100, &g)]);
        words(&m, &[(0x5000, 0x1234_5678), (0x6000, 0x0BAD_CAFE)]);
        m
    };
    in_every_tier(make);
    let mut m = make();
    m.cpu.set_tier(Tier::AtOnce);
    m.run(5000);
    assert!(m.cpu.jit.compiled_bytes() > 0);
    // The same, computed here.
    let (mut ebx, mut ds, mut sums) = (0u32, 0u32, [0u32; 2]);
    for esi in (1..=6).rev() {
        for ecx in (1..=9u32).rev() {
            ebx = ebx.wrapping_add(1).wrapping_add(ecx);
            let sum = &mut sums[ds as usize];
            *sum = sum.wrapping_add(ebx);
            ebx = ebx.wrapping_add(*sum);
            ebx ^= ecx.wrapping_mul(4).wrapping_add(ebx).wrapping_sub(7);
        }
        ds = 1 - (esi & 1);
        ebx = ebx.wrapping_add([0x1234_5678, 0x0BAD_CAFE][ds as usize]);
    }
    assert_eq!(m.cpu.st.gpr[RBX], u64::from(ebx));
}

#[test]
fn strings_move_downwards_as_one_by_one() {
    // std; rep movsb or movsq; hlt
    for (size, code) in [(1, &[0xFD, 0xF3, 0xA4, 0xF4][..]), (8, &[0xFD, 0xF3, 0x48, 0xA5, 0xF4][..])] {
        for (from, to) in
            [(0x2_4F80, 0x2_8013), (0x2_4F80, 0x2_4F90), (0x2_4F90, 0x2_4F80), (0x2_4F80, 0x2_4F80)]
        {
            let mut m = Machine::long(code);
            let mut bytes: Vec<u8> = (0..0xA000u32).map(|i| (i ^ i >> 7) as u8).collect();
            m.mem.write(0x2_0000, &bytes).unwrap();
            let count = 0x2345 / size;
            (m.cpu.st.gpr[RSI], m.cpu.st.gpr[RDI], m.cpu.st.gpr[RCX]) = (from, to, count);
            let mut stride = 1;
            while m.run(stride).exit == Exit::Budget {
                stride = stride % 997 * 2 + 1;
            }
            assert_eq!(m.position, count + 2);
            for i in 0..count {
                for k in 0..size {
                    let at = |base: u64| (base - i * size + k - 0x2_0000) as usize;
                    // An element is read whole before it is written, which these distances do not show.
                    bytes[at(to)] = bytes[at(from)];
                }
            }
            let mut got = vec![0; bytes.len()];
            m.mem.read(0x2_0000, &mut got).unwrap();
            assert!(got == bytes, "{size}: {from:x} to {to:x}");
            assert_eq!((m.cpu.st.gpr[RSI], m.cpu.st.gpr[RCX]), (from - count * size, 0));
        }
    }
}

#[test]
fn interrupts_come_on_alike_in_compiled_code() {
    // mov ecx,5; a: cli; inc ebx; sti; dec ecx; sti; jnz a; hlt
    let code = [0xB9, 5, 0, 0, 0, 0xFA, 0xFF, 0xC3, 0xFB, 0xFF, 0xC9, 0xFB, 0x75, 0xF7, 0xF4];
    for rf in [0, flags::RF] {
        let rbx = in_every_tier(|| {
            let mut m = Machine::long(&code);
            m.cpu.eflags |= rf;
            m
        });
        assert_eq!(rbx, 5);
    }
}

#[test]
fn what_kernels_do_often_is_the_same_compiled() {
    // a:
    let body: &[&[u8]] = &[
        &[0xFA],                                           // cli
        &[0x9C, 0x58, 0x48, 0x01, 0xC3],                   // pushf; pop rax; add rbx,rax
        &[0x65, 0x48, 0x8B, 0x04, 0x25, 0, 0x20, 0, 0],    // mov rax,gs:[2000h]
        &[0x0F, 0x01, 0xF8],                               // swapgs
        &[0x65, 0x48, 0x03, 0x04, 0x25, 0, 0x20, 0, 0],    // add rax,gs:[2000h]
        &[0x48, 0x01, 0xC3],                               // add rbx,rax
        &[0xAC, 0xAB, 0x48, 0xA5, 0x66, 0xA5],             // lodsb; stosd; movsq; movsw
        &[0xF3, 0x0F, 0xBC, 0xD1, 0x48, 0x11, 0xD3],       // tzcnt edx,ecx; adc rbx,rdx
        &[0xF3, 0x48, 0x0F, 0xBD, 0xD3, 0x48, 0x11, 0xD3], // lzcnt rdx,rbx; adc rbx,rdx
        &[0xF3, 0x49, 0x0F, 0xBC, 0xD0, 0x9C, 0x58],       // tzcnt rdx,r8; pushf; pop rax
        &[0x48, 0x01, 0xC3, 0x48, 0x01, 0xD3],             // add rbx,rax; add rbx,rdx
        &[0x33, 0x1C, 0x25, 0, 0x60, 0, 0],                // xor ebx,[6000h]
        &[0xFF, 0xC9, 0xFB],                               // dec ecx; sti
    ];
    let body = body.concat();
    // mov ecx,40; a: ...; jnz a; hlt
    let mut code = vec![0xB9, 40, 0, 0, 0];
    code.extend(&body);
    code.extend([0x0F, 0x85]);
    code.extend((-(body.len() as i32 + 6)).to_le_bytes());
    code.push(0xF4);
    for (down, r8) in [(false, 0), (false, 0x90), (true, 1 << 63)] {
        in_every_tier(|| {
            let mut m = Machine::long(&code);
            m.cpu.segs[GS].base = 0x100;
            m.cpu.msr.kernel_gs_base = 0x1100;
            m.cpu.eflags |= if down { flags::DF } else { 0 };
            let g = &mut m.cpu.st.gpr;
            // Both runs cross a page.
            (g[RSP], g[8], g[RSI], g[RDI]) = (0x7800, r8, 0x4FE0, 0x5FD3);
            words(&m, &[(0x2100, 0x1234_5678_9ABC_DEF0), (0x3100, 77), (0x4FE0, u64::MAX / 3)]);
            m
        });
    }
}

#[test]
fn accesses_follow_the_tables_whatever_was_translated_before() {
    // Two tables of each level below two top tables, and pages. (The code and the tables are mapped by entry 0.)
    const TOPS: [u64; 2] = [0x1_0000, 0x4_0000];
    const TABLES: [[u64; 2]; 3] = [[0x2_0000, 0x2_1000], [0x2_2000, 0x2_3000], [0x2_4000, 0x2_5000]];
    const TOP_ENTRIES: [u64; 2] = [1, 511];
    const PAGES: u64 = 0x3_0000;
    // mov rbx,[rsi]; mov [rsi],rdx; mov [rdi],rax; mov cr3,rax; mov [rdi],al
    let code = [0x48, 0x8B, 0x1E, 0x48, 0x89, 0x16, 0x48, 0x89, 0x07, 0x0F, 0x22, 0xD8, 0x88, 0x07];
    const LOAD: u64 = 0x1000;
    const STORE: u64 = 0x1003;
    const CHANGE: u64 = 0x1006;
    const SWITCH: u64 = 0x1009;
    const CHANGE_BYTE: u64 = 0x100C;
    // add rbx,n: what pages consist of.
    let add = |n: u64| 0x9090_9090_00C3_8348 | (n & 0x7F) << 24;
    for seed in 1..=6u64 {
        let mut random = seed;
        let mut draw = |n: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random >> 11) % n
        };
        // What an entry of a level (4 to 1) may lead to: some pages are large, some small ones have their PAT bit.
        let entry = |level: usize, draw: &mut dyn FnMut(u64) -> u64| match (level, draw(4)) {
            (2, 0) => 0x20_0087,
            (1, n) => (PAGES + (draw(4) << 12)) | 7 | if n == 0 { 0x80 } else { 0 },
            (level, _) => TABLES[4 - level][draw(2) as usize] | 7,
        };
        let make = || Machine::long(&code);
        let (mut a, mut b) = (make(), make());
        let both = |at: u64, v: u64| [&a, &b].iter().for_each(|m| words(m, &[(at, v)]));
        for top in TOPS {
            both(top, 0x1_1007);
            TOP_ENTRIES.iter().for_each(|n| both(top + 8 * n, entry(4, &mut draw)));
        }
        for level in 1..=3 {
            for table in TABLES[3 - level] {
                (0..2).for_each(|n| both(table + 8 * n, entry(level, &mut draw)));
            }
        }
        for n in 0..0x1000 {
            both(PAGES + 8 * n, add(n / 512 + 1));
            both(0x20_0000 + 8 * n, add(n / 512 + 9));
        }
        for step in 0..4000 {
            let near = draw(2) << 30 | draw(2) << 21 | draw(2) << 12 | draw(512) << 3;
            let lin = [1 << 39, 511 << 39 | 0xFFFF << 48][draw(2) as usize] | near;
            // (Fetched, it is the start of an instruction.)
            let (mut rip, mut rax, mut rdi, mut times) = ([LOAD, STORE, lin][draw(3) as usize], 0, 0, 1);
            let rdx = add(draw(128));
            match draw(16) {
                0 => (rip, rax) = (SWITCH, TOPS[draw(2) as usize]),
                change @ 1..=6 => {
                    let level = if change > 4 { 1 } else { 1 + draw(4) as usize };
                    let n = draw(2);
                    (rip, rax) = (CHANGE, entry(level, &mut draw));
                    rdi = match level {
                        4 => TOPS[draw(2) as usize] + 8 * TOP_ENTRIES[n as usize],
                        level => TABLES[3 - level][draw(2) as usize] + 8 * n,
                    };
                    if change > 2 {
                        // One bit: present, writable, user, accessed, dirty, one that is ignored, no execution.
                        rax = a.word(rdi) ^ 1 << [0, 1, 1, 1, 2, 5, 6, 6, 9, 58, 63][draw(11) as usize];
                        rip = [CHANGE, CHANGE_BYTE][draw(2) as usize];
                    }
                    times = if draw(20) == 0 { 30 } else { 1 };
                }
                _ => {}
            }
            for _ in 0..times {
                for m in [&mut a, &mut b] {
                    m.cpu.rip = rip;
                    let g = &mut m.cpu.st.gpr;
                    (g[RAX], g[RDX], g[RDI], g[RSI], g[RSP]) = (rax, rdx, rdi, lin, 0x7800);
                    m.cpu.halted = false;
                }
                // The one starts from nothing each time.
                b.cpu.flush_tlb();
                assert_eq!(a.run(1), b.run(1));
            }
            assert_eq!(
                a.cpu.save(),
                b.cpu.save(),
                "seed {seed}, step {step}, {rip:x} {lin:x} {rax:x} {rdi:x}"
            );
            let tables = |m: &Machine| {
                let mut bytes = vec![0; 0x3_8000];
                m.mem.read(0x1_0000, &mut bytes).unwrap();
                bytes
            };
            assert!(step % 16 != 0 || tables(&a) == tables(&b), "seed {seed}, step {step}: memory");
        }
    }
}

#[test]
fn a_push_of_a_distant_word_keeps_what_later_pushes_rely_on() {
    // mov ecx,9; a: push [esi] (by a 32-bit address); push rcx; push rbx; pop rax; add ebx,eax; pop rax; add rbx,rax;
    // pop rax; lea ebx,[rbx+rax*2]; add esi,1000h; dec ecx; jnz a; hlt
    let code = [
        0xB9, 9, 0, 0, 0, 0x67, 0xFF, 0x36, 0x51, 0x53, 0x58, 0x01, 0xC3, 0x58, 0x48, 0x01, 0xC3, 0x58, 0x8D,
        0x1C, 0x43, 0x81, 0xC6, 0, 0x10, 0, 0, 0xFF, 0xC9, 0x75, 0xE6, 0xF4,
    ];
    let rbx = in_every_tier(|| {
        let mut m = Machine::long(&code);
        m.cpu.st.gpr[RSP] = 0x7800;
        // Each page is new to the TLB, so that the push is done by its handler.
        m.cpu.st.gpr[RSI] = 0x10_0000;
        (0..9).for_each(|n| words(&m, &[(0x10_0000 + n * 0x1000, n + 3)]));
        m
    });
    let expected = (0..9).fold(0u32, |rbx, n| (rbx.wrapping_mul(2) + 9 - n).wrapping_add((n + 3) * 2));
    assert_eq!(rbx as u32, expected);
}

#[test]
fn a_single_step_begins_with_the_popf_that_asks_for_it() {
    // mov ecx,12; a: pushf; or byte [rsp+1],1; popf; inc edx; dec ecx; jnz a; hlt
    let code = [
        0xB9, 12, 0, 0, 0, 0x9C, 0x80, 0x4C, 0x24, 0x01, 0x01, 0x9D, 0xFF, 0xC2, 0xFF, 0xC9, 0x75, 0xF3, 0xF4,
    ];
    let rbx = in_every_tier(|| {
        let mut m = Machine::long(&code);
        m.cpu.st.gpr[RSP] = 0x7800;
        // #DB: inc ebx; and byte [rsp+17],FEh (TF of the frame); iretq
        put(&m, &[(0xC010, &[0xFF, 0xC3, 0x80, 0x64, 0x24, 0x11, 0xFE, 0x48, 0xCF])]);
        m
    });
    assert_eq!(rbx, 12);
}

#[test]
fn a_string_move_downwards_keeps_what_later_accesses_rely_on() {
    // std; mov ecx,9; a: mov rdx,rsi; lodsb; add ebx,[rdx]; add esi,1001h; dec ecx; jnz a; hlt
    let code = [
        0xFD, 0xB9, 9, 0, 0, 0, 0x48, 0x89, 0xF2, 0xAC, 0x03, 0x1A, 0x81, 0xC6, 1, 0x10, 0, 0, 0xFF, 0xC9,
        0x75, 0xF0, 0xF4,
    ];
    let rbx = in_every_tier(|| {
        let mut m = Machine::long(&code);
        m.cpu.st.gpr[RSI] = 0x10_0000;
        (0..9).for_each(|n| words(&m, &[(0x10_0000 + n * 0x1000, n + 3)]));
        m
    });
    assert_eq!(rbx, (3..12).sum::<u64>());
}

#[test]
fn a_page_becomes_a_table_while_the_address_space_that_wrote_to_it_is_put_aside() {
    // mov [rdi],rax; mov rbx,[rsi]; mov cr3,rax
    let code = [0x48, 0x89, 0x07, 0x48, 0x8B, 0x1E, 0x0F, 0x22, 0xD8];
    let mut m = Machine::long(&code);
    let [store, load, switch] = [0x1000, 0x1003, 0x1006];
    // The second space has the first's lower 512 GiB, and a page above them by the table at 19000h.
    words(&m, &[(0x1_6000, 0x1_1007), (0x1_6008, 0x1_7007), (0x1_7000, 0x1_8007), (0x1_8000, 0x1_9007)]);
    words(&m, &[(0x5000, 1), (0x6000, 2)]);
    let mut go = |rip, rax, rdi| {
        m.cpu.rip = rip;
        let g = &mut m.cpu.st.gpr;
        (g[RAX], g[RDI], g[RSI]) = (rax, rdi, 1 << 39);
        m.run(1);
        m.cpu.st.gpr[RBX]
    };
    go(store, 0x5007, 0x1_9000);
    go(switch, 0x1_6000, 0);
    assert_eq!(go(load, 0, 0), 1);
    go(switch, 0x1_0000, 0);
    go(store, 0x6007, 0x1_9000);
    go(switch, 0x1_6000, 0);
    assert_eq!(go(load, 0, 0), 2);
}

#[test]
fn what_only_writes_depend_on_leaves_code_known() {
    // mov [rdi],rax; mov [rsi],rbx; mov rbx,[rsi]; mov cr4,rax
    let code = [0x48, 0x89, 0x07, 0x48, 0x89, 0x1E, 0x48, 0x8B, 0x1E, 0x0F, 0x22, 0xE0];
    let [store, write, _, control] = [0x1000, 0x1003, 0x1006, 0x1009];
    let mut m = Machine::long(&code);
    // Entries of the code's page and of one that is written.
    let [own, data] = [0x1_3008, 0x1_3028];
    let go = |m: &mut Machine, rip: u64, rax: u64, rdi: u64| {
        m.cpu.rip = rip;
        let g = &mut m.cpu.st.gpr;
        (g[RAX], g[RDI], g[RSI], g[RSP]) = (rax, rdi, 0x5000, 0x7800);
        m.run(1);
        (m.cpu.epoch, m.cpu.highs[0].epoch, m.cpu.rip)
    };
    go(&mut m, write, 0, 0);
    let before = go(&mut m, store, 0, 0x6000);
    // No longer writable, nor dirty, with a bit that is ignored: in the same table as the code, and of the code's page.
    for (at, v) in [(own, 0x1025), (own, 0x1225), (data, 0x5025)] {
        assert_eq!(go(&mut m, store, v, at), before);
    }
    // The write faults, which was permitted before: the handler halts.
    assert_eq!(go(&mut m, write, 0, 0).2, 0xC0E1);
    m.cpu.halted = false;
    assert_eq!(go(&mut m, store, 0x5027, data), before);
    assert_eq!(go(&mut m, write, 0, 0).2, write + 3);
    assert_eq!(m.word(data), 0x5067);
    // Translations agree with the tables whatever PGE says.
    let cr4 = m.cpu.st.cr4;
    let (low, high, _) = before;
    let (now_low, now_high, _) = go(&mut m, control, cr4 | 0x80, 0);
    assert_eq!((now_low, now_high), (low, high));
    assert_eq!(m.cpu.st.cr4, cr4 | 0x80);
    // Accessed no more: the next fetch must say so.
    assert_ne!(go(&mut m, store, 0x1007, own).0, low);
    assert_eq!(m.word(own), 0x1007);
    go(&mut m, write, 0, 0);
    assert_eq!(m.word(own), 0x1027);
}
