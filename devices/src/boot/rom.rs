//! Option ROMs that start a kernel given by `-kernel`. Firmware finds them through fw_cfg and
//! enters their bootstrap entry vector (Plug and Play BIOS specification 1.0a, section 3); they fetch
//! the images by fw_cfg DMA.
//!
//! Scratch memory: descriptor at 0x7000, its answer at 0x7010, a GDT at 0x7100, a jump at 0x7200, stack below 0x7C00.

use std::arch::global_asm;

// Registers at the entry of `get32`: AX = key; the value comes back in EAX. `load` takes the address of
// three keys (address, size, data) in SI.
macro_rules! common {
    () => {
        "
    .byte 0x55, 0xAA, 2
    lret
    .org 0x1A, 0
    .word 0x20
    .org 0x20, 0
    .ascii \"$PnP\"
    .byte 1, 2
    .word 0
    .byte 0, 0
    .long 0
    .word 0, 0
    .byte 2, 0, 0
    .byte 0xE4
    .word 0, 0
    .word 0x60
    .word 0, 0
    .org 0x60, 0
    jmp 90f
80: # get32
    movzwl %ax, %eax
    shll $16, %eax
    orl $0x0A, %eax
    bswapl %eax
    movl %eax, 0x7000
    movl $0x04000000, 0x7004
    movl $0, 0x7008
    movl $0x10700000, 0x700C
    call 82f
    movl 0x7010, %eax
    ret
81: # load
    lodsw %cs:(%si), %ax
    call 80b
    movl %eax, %ebp
    lodsw %cs:(%si), %ax
    call 80b
    movl %eax, %edi
    lodsw %cs:(%si), %ax
    testl %edi, %edi
    jz 83f
    shll $16, %eax
    movw $0x0A, %ax
    bswapl %eax
    movl %eax, 0x7000
    bswapl %edi
    movl %edi, 0x7004
    movl $0, 0x7008
    bswapl %ebp
    movl %ebp, 0x700C
82: # start the transfer and wait for its end
    movw $0x514, %dx
    xorl %eax, %eax
    outl %eax, %dx
    movw $0x518, %dx
    movl $0x00700000, %eax
    outl %eax, %dx
84: movl 0x7000, %eax
    andl $0xFEFFFFFF, %eax
    jnz 84b
83: ret
90: # the bootstrap entry
    cld
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    cli
    movw %ax, %ss
    movl $0x7C00, %esp
    sti
"
    };
}

global_asm!(
    ".pushsection .rodata.ftvm_linux_rom, \"a\"",
    ".code16",
    ".globl ftvm_linux_rom",
    "ftvm_linux_rom:",
    common!(),
    "
    movw $(91f - ftvm_linux_rom), %si
    call 81b
    call 81b
    call 81b
    call 81b
    movw $0x13, %ax
    call 80b
    movl %eax, %ebx
    movw $0x16, %ax
    call 80b
    subl %eax, %ebx
    subl $16, %ebx
    shrl $4, %eax
    cli
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %fs
    movw %ax, %gs
    movw %ax, %ss
    movl %ebx, %esp
    addw $0x20, %ax
    pushw %ax
    pushw $0
    xorl %eax, %eax
    xorl %ebx, %ebx
    xorl %ecx, %ecx
    xorl %edx, %edx
    xorl %esi, %esi
    xorl %edi, %edi
    xorl %ebp, %ebp
    lret
91: .word 0x16, 0x17, 0x18
    .word 0x13, 0x14, 0x15
    .word 0x07, 0x08, 0x11
    .word 0x0A, 0x0B, 0x12
",
    ".org 1024, 0",
    ".code64",
    ".popsection",
    options(att_syntax)
);

// The SETUP image of this ROM starts with four words: the offset of an entry within a 24-byte memory map
// slot, the address to store the size of the map at, the unit to count in, and the magic number for EAX. The structure
// for EBX follows at +16, the memory map is built at 0x9000.
global_asm!(
    ".pushsection .rodata.ftvm_multiboot_rom, \"a\"",
    ".code16",
    ".globl ftvm_multiboot_rom",
    "ftvm_multiboot_rom:",
    common!(),
    "
    movw $(91f - ftvm_multiboot_rom), %si
    call 81b
    call 81b
    call 81b
    call 81b
    movw $0x10, %ax
    call 80b
    pushl %eax
    movw $0x16, %ax
    call 80b
    movw %ax, %si
    movw $0x9000, %di
    xorl %ebx, %ebx
    xorl %ebp, %ebp
1:  movl $20, (%di)
    pushw %di
    addw (%si), %di
    movl $0xE820, %eax
    movl $20, %ecx
    movl $0x534D4150, %edx
    int $0x15
    popw %di
    jc 2f
    cmpl $0x534D4150, %eax
    jne 2f
    addw $24, %di
    addl 8(%si), %ebp
    testl %ebx, %ebx
    jz 2f
    cmpw $0x9C00, %di
    jb 1b
2:  movl 4(%si), %edi
    movl %ebp, (%di)
    movl 12(%si), %eax
    movzwl %si, %ebx
    addl $16, %ebx
    popl %ecx
    cli
    pushw %cs
    popw %ds
    movw $(92f - ftvm_multiboot_rom), %si
    movw $0x7100, %di
    movl %ecx, %edx
    movw $32, %cx
    rep movsb
    movl %edx, %ecx
    xorw %dx, %dx
    movw %dx, %ds
    lgdtl 0x7118
    movl %cr0, %edx
    orl $1, %edx
    movl %edx, %cr0
    # the 32-bit code is jmp *%ecx
    movw $0xE1FF, 0x7200
    movl $0x10, %edx
    movw %dx, %ds
    movw %dx, %es
    movw %dx, %fs
    movw %dx, %gs
    movw %dx, %ss
    .byte 0x66, 0xEA
    .long 0x7200
    .word 8
    .balign 8
92: .quad 0
    .quad 0x00CF9A000000FFFF
    .quad 0x00CF92000000FFFF
    .word 0x17
    .long 0x7100
    .word 0
91: .word 0x16, 0x17, 0x18
    .word 0x13, 0x14, 0x15
    .word 0x07, 0x08, 0x11
    .word 0x0A, 0x0B, 0x12
",
    ".org 1024, 0",
    ".code64",
    ".popsection",
    options(att_syntax)
);

extern "C" {
    static ftvm_linux_rom: [u8; 1024];
    static ftvm_multiboot_rom: [u8; 1024];
}

/// With the byte that makes the sum of all bytes zero.
fn finish(image: &[u8; 1024]) -> Vec<u8> {
    let mut rom = image.to_vec();
    let fix = |range: &mut [u8], at: usize| {
        let sum = range.iter().fold(0u8, |a, b| a.wrapping_add(*b));
        range[at] = range[at].wrapping_sub(sum);
    };
    fix(&mut rom[0x20..0x40], 9);
    fix(&mut rom, 1023);
    rom
}

/// The ROM for Linux's real-mode boot protocol.
pub fn linux() -> Vec<u8> {
    // SAFETY: the symbol names the 1024 constant bytes assembled above.
    finish(unsafe { &ftvm_linux_rom })
}

/// The ROM for kernels entered in 32-bit protected mode (multiboot, PVH).
pub fn protected() -> Vec<u8> {
    // SAFETY: the symbol names the 1024 constant bytes assembled above.
    finish(unsafe { &ftvm_multiboot_rom })
}

#[cfg(test)]
mod tests {
    #[test]
    fn roms_have_headers_and_checksums() {
        for rom in [super::linux(), super::protected()] {
            assert_eq!(rom[..3], [0x55, 0xAA, 2]);
            assert_eq!(&rom[0x20..0x24], b"$PnP");
            assert_eq!(rom.iter().fold(0u8, |a, b| a.wrapping_add(*b)), 0);
            assert_eq!(rom[0x3A], 0x60);
        }
    }
}
