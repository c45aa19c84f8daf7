//! The registers of an x86-64 processor as GDB counts them. The description that GDB is given (`x86-64.xml`) lists them in
//! the order of [`REGISTERS`].

use std::num::NonZeroUsize;
use std::sync::OnceLock;

use ftvm_accel::state::X87;
use ftvm_accel::tcg::registers::View;
use gdbstub::arch::{Arch, RegId, Registers};

const DESCRIPTION: &str = include_str!("x86-64.xml");

/// A register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// By its number in instructions.
    General(usize),
    Rip,
    Rflags,
    /// ES, CS, SS, DS, FS, GS.
    Selector(usize),
    /// ST(i), whichever physical register that is.
    St(usize),
    /// FCTRL, FSTAT, FTAG, FISEG, FIOFF, FOSEG, FOOFF, FOP.
    Fpu(usize),
    Xmm(usize),
    Mxcsr,
    FsBase,
    GsBase,
    /// The upper half of a YMM register.
    YmmHigh(usize),
    KernelGsBase,
    Cr(usize),
    Efer,
}

use Register::*;

impl Register {
    /// Bytes that GDB gets of it.
    pub fn size(self) -> usize {
        match self {
            St(_) => 10,
            Xmm(_) | YmmHigh(_) => 16,
            Rflags | Selector(_) | Fpu(_) | Mxcsr => 4,
            _ => 8,
        }
    }
}

/// In GDB's order.
pub fn registers() -> &'static [Register] {
    static LIST: OnceLock<Vec<Register>> = OnceLock::new();
    LIST.get_or_init(|| {
        let mut list: Vec<Register> = [0, 3, 1, 2, 6, 7, 5, 4].map(General).into();
        list.extend((8..16).map(General));
        list.extend([Rip, Rflags]);
        list.extend([1, 2, 3, 0, 4, 5].map(Selector));
        list.extend((0..8).map(St));
        list.extend((0..8).map(Fpu));
        list.extend((0..16).map(Xmm));
        list.extend([Mxcsr, FsBase, GsBase]);
        list.extend((0..16).map(YmmHigh));
        list.push(KernelGsBase);
        list.extend([0, 2, 3, 4, 8].map(Cr));
        list.push(Efer);
        list
    })
}

/// The classical tag word, two bits for each physical register (SDM vol. 1, section 8.1.7).
fn full_tags(x: &X87) -> u16 {
    (0..8).fold(0, |tags, i| {
        let r = &x.st[i];
        let exponent = u16::from_le_bytes([r[8], r[9]]) & 0x7FFF;
        let fraction = r[..8].iter().any(|b| *b != 0);
        let tag = match x.tag >> i & 1 {
            0 => 3,
            _ if exponent == 0 && !fraction => 1,
            _ if exponent == 0 || exponent == 0x7FFF || r[7] & 0x80 == 0 => 2,
            _ => 0,
        };
        tags | tag << (2 * i)
    })
}

/// Read a register into `out`, which has its size.
pub fn read(view: &View, register: Register, out: &mut [u8]) {
    let (r, x) = (&view.registers, &view.x87);
    let word: u64 = match register {
        St(i) => return out.copy_from_slice(&x.st[(usize::from(x.top) + i) & 7][..10]),
        Xmm(i) => return out.copy_from_slice(&view.vector.ymm[i][..16]),
        YmmHigh(i) => return out.copy_from_slice(&view.vector.ymm[i][16..]),
        General(i) => view.gpr[i],
        Rip => r.rip,
        Rflags => r.rflags,
        Selector(i) => r.segs[i].selector.into(),
        Fpu(0) => x.fcw.into(),
        Fpu(1) => (x.fsw | u16::from(x.top) << 11).into(),
        Fpu(2) => full_tags(x).into(),
        Fpu(3) => x.fcs.into(),
        Fpu(4) => x.fip,
        Fpu(5) => x.fds.into(),
        Fpu(6) => x.fdp,
        Fpu(_) => x.fop.into(),
        Mxcsr => view.vector.mxcsr.into(),
        FsBase => r.segs[4].base,
        GsBase => r.segs[5].base,
        KernelGsBase => view.kernel_gs_base,
        Cr(0) => view.cr0,
        Cr(2) => r.cr2,
        Cr(3) => r.cr3,
        Cr(4) => view.cr4,
        Cr(_) => view.cr8,
        Efer => r.efer,
    };
    out.copy_from_slice(&word.to_le_bytes()[..out.len()]);
}

/// Change a register; false if this one cannot be (CR8 belongs to the APIC).
pub fn write(view: &mut View, register: Register, data: &[u8]) -> bool {
    if data.len() != register.size() {
        return false;
    }
    let mut bytes = [0; 8];
    let n = data.len().min(8);
    bytes[..n].copy_from_slice(&data[..n]);
    let word = u64::from_le_bytes(bytes);
    let (r, x) = (&mut view.registers, &mut view.x87);
    match register {
        St(i) => x.st[(usize::from(x.top) + i) & 7][..10].copy_from_slice(data),
        Xmm(i) => view.vector.ymm[i][..16].copy_from_slice(data),
        YmmHigh(i) => view.vector.ymm[i][16..].copy_from_slice(data),
        General(i) => view.gpr[i] = word,
        Rip => r.rip = word,
        Rflags => r.rflags = word | 2,
        // The hidden part stays: a debugger's selector is not loaded as an instruction would load it.
        Selector(i) => r.segs[i].selector = word as u16,
        Fpu(0) => x.fcw = word as u16,
        Fpu(1) => (x.fsw, x.top) = (word as u16 & !0x3800, (word >> 11 & 7) as u8),
        Fpu(2) => x.tag = (0..8).fold(0, |tag, i| tag | u8::from(word >> (2 * i) & 3 != 3) << i),
        Fpu(3) => x.fcs = word as u16,
        Fpu(4) => x.fip = word,
        Fpu(5) => x.fds = word as u16,
        Fpu(6) => x.fdp = word,
        Fpu(_) => x.fop = word as u16 & 0x7FF,
        Mxcsr => view.vector.mxcsr = word as u32,
        FsBase => r.segs[4].base = word,
        GsBase => r.segs[5].base = word,
        KernelGsBase => view.kernel_gs_base = word,
        Cr(0) => view.cr0 = word,
        Cr(2) => r.cr2 = word,
        Cr(3) => r.cr3 = word,
        Cr(4) => view.cr4 = word,
        Cr(_) => return word == view.cr8,
        Efer => r.efer = word,
    }
    true
}

/// All registers, as bytes in GDB's order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RegisterBytes(pub Vec<u8>);

impl RegisterBytes {
    pub fn of(view: &View) -> RegisterBytes {
        let mut bytes = Vec::new();
        for register in registers() {
            let at = bytes.len();
            bytes.resize(at + register.size(), 0);
            read(view, *register, &mut bytes[at..]);
        }
        RegisterBytes(bytes)
    }

    /// Put all of them into `view`; false if there are too few.
    pub fn apply(&self, view: &mut View) -> bool {
        // Twice: which physical register ST(i) is, FSTAT behind them says.
        for _ in 0..2 {
            let mut rest = &self.0[..];
            for register in registers() {
                let Some((data, next)) = rest.split_at_checked(register.size()) else { return false };
                write(view, *register, data);
                rest = next;
            }
        }
        true
    }
}

impl Registers for RegisterBytes {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.0.get(128..136).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        self.0.iter().for_each(|b| write_byte(Some(*b)));
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        self.0 = bytes.to_vec();
        Ok(())
    }
}

/// A register's number.
#[derive(Clone, Copy, Debug)]
pub struct Number(pub Register);

impl RegId for Number {
    fn from_raw_id(id: usize) -> Option<(Self, Option<NonZeroUsize>)> {
        let register = *registers().get(id)?;
        Some((Number(register), NonZeroUsize::new(register.size())))
    }
}

/// x86-64 with its system registers.
pub enum X86_64 {}

impl Arch for X86_64 {
    type Usize = u64;
    type Registers = RegisterBytes;
    type BreakpointKind = usize;
    type RegId = Number;

    fn target_description_xml() -> Option<&'static str> {
        Some(DESCRIPTION)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ftvm_accel::{CpuModel, SoftCpu};

    #[test]
    fn the_description_has_every_register_in_order_and_size() {
        let sizes: Vec<usize> = DESCRIPTION
            .split("<reg ")
            .skip(1)
            .map(|r| {
                r.split("bitsize=\"").nth(1).unwrap().split('"').next().unwrap().parse::<usize>().unwrap()
            })
            .collect();
        let ours: Vec<usize> = registers().iter().map(|r| 8 * r.size()).collect();
        assert_eq!(sizes, ours);
        let name =
            |n: usize| DESCRIPTION.split("<reg name=\"").nth(n + 1).unwrap().split('"').next().unwrap();
        for (n, r) in registers().iter().enumerate() {
            let expected = match r {
                Rip => "rip",
                Selector(0) => "es",
                Mxcsr => "mxcsr",
                Fpu(2) => "ftag",
                Cr(8) => "cr8",
                KernelGsBase => "k_gs_base",
                _ => continue,
            };
            assert_eq!(name(n), expected);
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let cpu = SoftCpu::new(0, 1, &CpuModel::parse("max").unwrap());
        let mut view = cpu.view();
        view.x87.top = 5;
        for (n, register) in registers().iter().enumerate() {
            let mut data: Vec<u8> = (0..register.size()).map(|i| (3 + 5 * n + i) as u8).collect();
            match register {
                Selector(_) | Fpu(0 | 3 | 5) => data[2..].fill(0),
                // Only what the view has room for, or what is there.
                Fpu(1 | 2 | 4 | 6 | 7) | Cr(8) => continue,
                Rflags => data[0] |= 2,
                _ => {}
            }
            assert!(write(&mut view, *register, &data));
            let mut back = vec![0; register.size()];
            read(&view, *register, &mut back);
            assert_eq!(back, data, "{register:?}");
        }
        let all = RegisterBytes::of(&view);
        assert_eq!(all.pc(), view.registers.rip);
        let mut other = cpu.view();
        assert!(all.apply(&mut other));
        assert_eq!(RegisterBytes::of(&other), all);
        assert!(!RegisterBytes(all.0[1..].to_vec()).apply(&mut other));
    }

    #[test]
    fn tags_tell_empty_zero_special_and_valid() {
        let mut x = X87 { tag: 0b1111, ..X87::default() };
        x.st[1][7] = 0x80;
        x.st[1][8..10].copy_from_slice(&0x3FFFu16.to_le_bytes());
        x.st[2][8..10].copy_from_slice(&0x7FFFu16.to_le_bytes());
        x.st[3][8] = 1;
        assert_eq!(full_tags(&x), 0xFF00 | 2 << 6 | 2 << 4 | 1);
    }
}
