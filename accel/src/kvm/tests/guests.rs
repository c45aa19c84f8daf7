//! Guest programs, assembled with the tests. Each lies at the address it is assembled for; port 0xF4 ends it.

use crate::GuestMemory;

/// Where guest programs lie.
pub const AT: u64 = 0x1000;

macro_rules! guest {
    ($start:ident, $end:ident, $name:ident, $($line:expr),+ $(,)?) => {
        core::arch::global_asm!(
            ".pushsection .rodata.ftvm_guests, \"a\"",
            concat!(stringify!($start), ":"),
            $($line,)+
            concat!(stringify!($end), ":"),
            ".popsection",
        );
        extern "C" {
            static $start: u8;
            static $end: u8;
        }
        /// Put the program in place.
        pub fn $name(mem: &GuestMemory) {
            // SAFETY: both labels are of the block above, in this order, in one section.
            let code = unsafe {
                let (from, to) = (&raw const $start, &raw const $end);
                std::slice::from_raw_parts(from, to.offset_from(from) as usize)
            };
            mem.write(AT, code).unwrap();
        }
    };
}
guest!(
    ftvm_journey_start,
    ftvm_journey_end,
    journey,
    // Real mode: arithmetic, memory, strings, ports.
    ".code16",
    ".set JGDTR, 0x1000 + ftvm_journey_gdtr - ftvm_journey_start",
    ".set JIDTR, 0x1000 + ftvm_journey_idtr - ftvm_journey_start",
    ".set JGDT, 0x1000 + ftvm_journey_gdt - ftvm_journey_start",
    ".set J32, 0x1000 + ftvm_journey_32 - ftvm_journey_start",
    ".set J64, 0x1000 + ftvm_journey_64 - ftvm_journey_start",
    "2: cli; cld; xor ax, ax; mov ds, ax; mov es, ax; mov ss, ax; mov sp, 0xF00",
    "mov ax, 0x1234; mov bx, ax; add ax, bx; adc bx, 7; sub cx, bx; neg cx; not dx; inc si; dec di",
    "mov cx, 3; mov si, 0x1000; mov di, 0x3000; rep movsb; mov cx, 2; rep stosw",
    "push ax; push 0x55; pop dx; pop cx; call 3f; jmp 4f",
    "3: mul bx; imul si, ax, 5; ret",
    "4: mov dx, 0x80; mov al, 0x17; out dx, al; in al, dx; in ax, 0x84; out 0x82, ax; in eax, dx",
    "mov ax, 0x1000; mov es, ax; mov word ptr es:[0x10], 0xBEEF; mov bx, word ptr es:[0x10]",
    "mov eax, 0x89ABCDEF; ror eax, 5; shl eax, 3; sar ax, 2; rcl eax, 4; bswap eax; shld eax, ebx, 7",
    "bt eax, 3; bts bx, 5; bsr cx, ax; setc dl; cmovz ecx, eax; movzx edx, al; movsx esi, bl",
    "mov cx, 2; 5: loop 5b; xor ax, ax; stc; cmc; lahf; sahf; pushf; popf; cmp ax, bx; test al, al",
    // Protected mode.
    "lgdt [JGDTR]; lidt [JIDTR]",
    "mov eax, cr0; or al, 1; mov cr0, eax; .byte 0xEA; .word J32, 8",
    ".code32",
    "ftvm_journey_32: mov ax, 0x10; mov ds, ax; mov es, ax; mov ss, ax; mov fs, ax; mov gs, ax; mov esp, 0xF00",
    "mov eax, 0x01020304; mov ebx, 0x11223344; mul ebx; mov ecx, 0x77; xor edx, edx; div ecx; cdq; idiv ebx",
    "mov edi, 0x20000; mov ecx, 5; rep stosd; mov esi, 0x20000; lodsd; scasb; cmpsb; xlatb",
    "xadd eax, ebx; cmpxchg dword ptr [0x20000], ecx; cmpxchg8b qword ptr [0x20008]; xchg eax, [0x20010]",
    "enter 16, 0; leave; pusha; popa; push cs; pop eax; lea eax, [eax + ebx*4 + 8]; aam; aad; daa; das",
    "sldt ax; str bx; smsw cx; lsl eax, ecx; verr cx; clts; mov edx, cr3; mov edx, dr6; mov edx, dr7",
    "fninit; fld1; fldpi; faddp; fld1; fchs; fmulp; fstp qword ptr [0x20020]; fnstsw ax; fnstcw [0x20030]",
    // Four levels of tables: 2 MiB of small pages would be many; one 2 MiB page maps all of this.
    "mov dword ptr [0x10000], 0x11003; mov dword ptr [0x11000], 0x12003; mov dword ptr [0x12000], 0x83",
    "mov eax, 0x620; mov cr4, eax; mov eax, 0x10000; mov cr3, eax",
    "mov ecx, 0xC0000080; rdmsr; or eax, 0x901; wrmsr; mov eax, cr0; or eax, 0x80000000; mov cr0, eax",
    ".byte 0xEA; .long J64; .word 0x18",
    ".code64",
    "ftvm_journey_64: mov ax, 0x10; mov ss, ax; mov rsp, 0xF00; mov rax, 0x123456789ABCDEF0; mov r8, rax",
    "imul r8, rax; mov r9, r8; shr r9, 13; xor r10, r10; sub r10, 1; push r10; pop r11; movabs rcx, 0x7FFFFFFFF",
    "bsf rdx, rcx; bt rcx, 34; cqo; adc rax, rcx; sbb r9, rdx; movsxd r12, eax; xchg r12, r13; mul r10; div r10",
    "movq xmm0, rax; pshufd xmm1, xmm0, 0x4E; paddq xmm0, xmm1; cvtsi2sd xmm2, rax; sqrtsd xmm3, xmm2",
    "movaps [0x20040], xmm3; mulpd xmm2, xmm3; stmxcsr [0x20050]; movdqu xmm4, [0x20041]; ucomisd xmm2, xmm3",
    "mov ecx, 0xC0000081; mov edx, 0x00230008; xor eax, eax; wrmsr; inc ecx; xor edx, edx; mov eax, 0x7777; wrmsr",
    "mov ecx, 0xC0000102; mov eax, 0x1234; wrmsr; swapgs; swapgs; rdmsr; mov ecx, 0x277; rdmsr; invlpg [0x20000]",
    "int 0x30; ud2; xor ecx, ecx; div ecx; mov rax, [0x300000]; lock inc qword ptr [0x20060]; pushfq; popfq",
    "mov rax, cr8; mov eax, 3; mov cr8, rax; mov rax, cr8; xor eax, eax; mov cr8, rax; sti; nop; cli",
    "movnti [0x20070], rax; sfence; mfence; cpuid; xor eax, eax; mov dr0, rax; mov rdx, dr0",
    "mov al, 1; out 0xF4, al",
    "6: hlt; jmp 6b",
    // Handlers: 0 skips DIV (2 bytes), 6 UD2 (2), 13 and 14 take an error code and skip a MOV (8); others return.
    "ftvm_journey_skip2: add qword ptr [rsp], 2; iretq",
    "ftvm_journey_skip8: add rsp, 8; add qword ptr [rsp], 8; iretq",
    "ftvm_journey_back: iretq",
    ".balign 8",
    "ftvm_journey_gdt: .quad 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00AF9B000000FFFF",
    "ftvm_journey_gdtr: .word 31; .long JGDT",
    "ftvm_journey_idtr: .word 0xFFF; .long 0x5000",
    // The IDT is made by the test, of these.
    ".balign 8",
    "ftvm_journey_gates: .quad 0x1000 + ftvm_journey_skip2 - ftvm_journey_start, 0x1000 + ftvm_journey_skip8 - ftvm_journey_start, 0x1000 + ftvm_journey_back - ftvm_journey_start",
    ".quad 0x6A6F75726E657921",
);

guest!(
    ftvm_real_start,
    ftvm_real_end,
    real_mode_devices,
    // Memory that is a device's, ROM that is written to, an interrupt that an OUT raises, one that ends a HLT.
    ".code16",
    ".set RH20, 0x1000 + ftvm_real_20 - ftvm_real_start",
    ".set RH21, 0x1000 + ftvm_real_21 - ftvm_real_start",
    "cli; xor ax, ax; mov ds, ax; mov ss, ax; mov sp, 0xF00",
    "mov word ptr [0x80], offset RH20; mov word ptr [0x82], 0; mov word ptr [0x84], offset RH21; mov word ptr [0x86], 0",
    "mov ax, 0xB800; mov es, ax; mov dword ptr es:[0x10], 0x12345678; mov eax, dword ptr es:[0x21]",
    "mov dword ptr [0x600], eax",
    "mov ax, 0xF000; mov es, ax; mov al, byte ptr es:[0xFFF0]; mov byte ptr [0x604], al",
    "mov byte ptr es:[0xFFF0], 0x99; mov al, byte ptr es:[0xFFF0]; mov byte ptr [0x605], al",
    "mov ax, 0xE000; mov es, ax; mov byte ptr es:[0x20], 0x77; mov al, byte ptr es:[0x20]; mov byte ptr [0x606], al",
    "mov dx, 0x90; mov cx, 3; mov si, 0x1000; cld; rep outsb; push ds; pop es; mov di, 0x620; mov cx, 3; rep insw",
    "sti; out 0x55, al; 2: cmp byte ptr [0x610], 1; jne 2b",
    "cli; out 0x56, al; 3: sti; hlt; cli; cmp byte ptr [0x611], 1; jne 3b",
    "out 0xF4, al; 4: hlt; jmp 4b",
    "ftvm_real_20: inc byte ptr [0x610]; iret",
    "ftvm_real_21: inc byte ptr [0x611]; iret",
);

guest!(
    ftvm_bells_start,
    ftvm_bells_end,
    doorbells,
    // 1000 times: a doorbell in memory, one of a value at a port, the port with another value. Then forever the first.
    ".code16",
    "cli; xor ax, ax; mov ss, ax; mov sp, 0xF00; mov ax, 0xB800; mov es, ax; mov dx, 0x90; mov cx, 1000",
    "2: mov word ptr es:[0x10], cx; mov ax, 7; out dx, ax; loop 2b",
    "mov ax, 8; out dx, ax; out 0xF4, al; 3: mov byte ptr es:[0x10], cl; inc dword ptr ss:[0x600]; jmp 3b",
);

guest!(
    ftvm_apic_start,
    ftvm_apic_end,
    apic,
    // The local APIC: its timer, a second processor, messages by edge and by level with their ends.
    ".code16",
    ".set AGDTR, 0x1000 + ftvm_apic_gdtr - ftvm_apic_start",
    ".set AGDT, 0x1000 + ftvm_apic_gdt - ftvm_apic_start",
    ".set AIDTR, 0x1000 + ftvm_apic_idtr - ftvm_apic_start",
    ".set A32, 0x1000 + ftvm_apic_32 - ftvm_apic_start",
    ".set AH40, 0x1000 + ftvm_apic_40 - ftvm_apic_start",
    ".set AH41, 0x1000 + ftvm_apic_41 - ftvm_apic_start",
    ".set AH42, 0x1000 + ftvm_apic_42 - ftvm_apic_start",
    ".set AAP, 0x1000 + ftvm_apic_ap - ftvm_apic_start",
    "cli; xor ax, ax; mov ds, ax; lgdt [AGDTR]; lidt [AIDTR]",
    "mov eax, cr0; or al, 1; mov cr0, eax; .byte 0xEA; .word A32, 8",
    ".code32",
    "ftvm_apic_32: mov ax, 0x10; mov ds, ax; mov es, ax; mov ss, ax; mov esp, 0xF00",
    // Gates for 0x40 to 0x43: 32-bit interrupt gates.
    "mov edi, 0x5000 + 0x40 * 8",
    "mov ebx, offset AH40; call 9f",
    "mov ebx, offset AH41; call 9f",
    "mov ebx, offset AH42; call 9f",
    "mov ebp, 0xFEE00000; mov dword ptr [ebp + 0xF0], 0x1FF; sti",
    // Three periods of 100 microseconds.
    "mov dword ptr [ebp + 0x3E0], 0xB; mov dword ptr [ebp + 0x320], 0x20040; mov dword ptr [ebp + 0x380], 100000",
    "2: hlt; cmp dword ptr [0x600], 3; jb 2b; cli; mov dword ptr [ebp + 0x320], 0x10000; sti; out 0x61, al",
    // The second processor starts at 0x2000.
    "mov esi, offset AAP; mov edi, 0x2000; mov ecx, 64; rep movsb",
    "mov dword ptr [ebp + 0x310], 0x01000000; mov dword ptr [ebp + 0x300], 0x4500",
    "mov dword ptr [ebp + 0x310], 0x01000000; mov dword ptr [ebp + 0x300], 0x4602",
    "3: pause; cmp dword ptr [0x610], 0; je 3b; out 0x62, al",
    // What the board sends.
    "4: pause; cmp dword ptr [0x604], 1; jb 4b; out 0x63, al",
    "5: pause; cmp dword ptr [0x608], 2; jb 5b",
    "out 0xF4, al; 6: hlt; jmp 6b",
    "9: mov eax, ebx; and eax, 0xFFFF; or eax, 0x80000; mov [edi], eax; mov eax, ebx",
    "and eax, 0xFFFF0000; or eax, 0x8E00; mov [edi + 4], eax; add edi, 8; ret",
    // Not every KVM emulates IRET in protected mode.
    "ftvm_apic_return: pop eax; add esp, 4; popfd; jmp eax",
    "ftvm_apic_40: inc dword ptr [0x600]; mov dword ptr [ebp + 0xB0], 0; jmp ftvm_apic_return",
    "ftvm_apic_41: inc dword ptr [0x604]; mov dword ptr [ebp + 0xB0], 0; jmp ftvm_apic_return",
    "ftvm_apic_42: inc dword ptr [0x608]; mov dword ptr [ebp + 0xB0], 0; jmp ftvm_apic_return",
    ".balign 8",
    "ftvm_apic_gdt: .quad 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF",
    "ftvm_apic_gdtr: .word 23; .long AGDT",
    "ftvm_apic_idtr: .word 0x7FF; .long 0x5000",
    ".code16",
    "ftvm_apic_ap: cli; xor ax, ax; mov ds, ax; mov al, 7; out 0x70, al; mov byte ptr [0x610], 1; 7: hlt; jmp 7b",
);

guest!(
    ftvm_crunch_start,
    ftvm_crunch_end,
    crunch,
    // A generator fills 256 KiB from 0x40000 on, over and over, with sums of what was there; the sum goes to port 0x90.
    ".code16",
    ".set CGDTR, 0x1000 + ftvm_crunch_gdtr - ftvm_crunch_start",
    ".set CGDT, 0x1000 + ftvm_crunch_gdt - ftvm_crunch_start",
    ".set C32, 0x1000 + ftvm_crunch_32 - ftvm_crunch_start",
    "cli; xor ax, ax; mov ds, ax; lgdt [CGDTR]; mov eax, cr0; or al, 1; mov cr0, eax; .byte 0xEA; .word C32, 8",
    ".code32",
    "ftvm_crunch_32: mov ax, 0x10; mov ds, ax; mov es, ax; mov ss, ax; mov esp, 0xF00",
    "mov ecx, [0x700]; mov eax, 1; xor ebx, ebx; mov edi, 0x40000",
    "2: imul eax, eax, 1103515245; add eax, 12345; mov edx, eax; shr edx, 14; and edx, 0x3FFFC",
    "add [edi + edx], eax; adc ebx, [edi + edx]; rol ebx, 3; dec ecx; jnz 2b",
    "mov eax, ebx; mov dx, 0x90; out dx, eax; out 0xF4, al; 3: hlt; jmp 3b",
    ".balign 8",
    "ftvm_crunch_gdt: .quad 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF",
    "ftvm_crunch_gdtr: .word 23; .long CGDT",
);

/// The gates of [`journey`], in the IDT at 0x5000.
pub fn journey_gates(mem: &GuestMemory) {
    let mut image = vec![0u8; 0x1000];
    mem.read(AT, &mut image).unwrap();
    let mark = 0x6A6F_7572_6E65_7921u64.to_le_bytes();
    let end = image.windows(8).rposition(|w| w == mark).unwrap();
    let address = |n: usize| {
        let at = end - 24 + 8 * n;
        u64::from_le_bytes(image[at..at + 8].try_into().unwrap())
    };
    for vector in 0..256u64 {
        let handler = match vector {
            0 | 6 => address(0),
            13 | 14 => address(1),
            _ => address(2),
        };
        let low = handler & 0xFFFF | 0x18 << 16 | 0x8E << 40 | (handler >> 16) << 48;
        mem.write(0x5000 + vector * 16, &low.to_le_bytes()).unwrap();
    }
}
