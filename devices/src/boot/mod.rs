//! `-kernel`: Linux bzImages by the real-mode boot protocol, multiboot kernels and PVH kernels,
//! handed to firmware through fw_cfg with an option ROM that starts them.

mod elf;
mod rom;

use crate::chipset::fwcfg::{self, FwCfg};
use crate::config::KernelImages;
use crate::ctx::DeviceError;

/// The option ROM's name in fw_cfg, and what the boot order calls it.
const ROM_FILE: &str = "genroms/linuxboot.bin";
pub const BOOT_PATH: &str = "/rom@genroms/linuxboot.bin";

/// Which boot protocol a kernel image takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelKind {
    /// Linux/x86 boot protocol, with its version (0 for images before 2.00).
    Linux(u16),
    Multiboot,
    Pvh,
}

const MULTIBOOT_MAGIC: u32 = 0x1BAD_B002;
/// Where real-mode setup code, its command line and 32-bit kernels lie.
const SETUP_ADDR: u32 = 0x1_0000;
const CMDLINE_ADDR: u32 = 0x2_0000;
const KERNEL_ADDR: u32 = 0x10_0000;
/// Firmware puts ACPI tables into the end of RAM.
const TOP_RESERVED: u64 = 0x2_8000;
/// Where the information structures of 32-bit kernels lie.
const INFO_ADDR: u32 = 0x8000;
const INFO_LIMIT: usize = 0x1000;
const MAP_ADDR: u32 = 0x9000;

fn word(data: &[u8], at: usize) -> u16 {
    data.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
}

fn long(data: &[u8], at: usize) -> u32 {
    u32::from(word(data, at)) | u32::from(word(data, at + 2)) << 16
}

fn multiboot_header(data: &[u8]) -> Option<usize> {
    (0..data.len().min(8192).saturating_sub(11)).step_by(4).find(|&at| {
        long(data, at) == MULTIBOOT_MAGIC
            && long(data, at).wrapping_add(long(data, at + 4)).wrapping_add(long(data, at + 8)) == 0
    })
}

impl KernelKind {
    /// Tell what a kernel image is.
    pub fn detect(data: &[u8]) -> Option<KernelKind> {
        if data.get(0x202..0x206) == Some(b"HdrS") {
            return Some(KernelKind::Linux(word(data, 0x206)));
        }
        if multiboot_header(data).is_some() {
            return Some(KernelKind::Multiboot);
        }
        if elf::pvh_entry(data).is_some() {
            return Some(KernelKind::Pvh);
        }
        if word(data, 0x1FE) == 0xAA55 && data.len() > 0x400 {
            return Some(KernelKind::Linux(0));
        }
        None
    }
}

fn bad(images: &KernelImages, why: &str) -> DeviceError {
    DeviceError::Config(format!("could not load kernel '{}': {why}", images.name))
}

fn number(fw: &mut FwCfg, key: u16, value: u32) {
    fw.item(key, value.to_le_bytes());
}

/// Put the images into fw_cfg with the option ROM that starts them.
pub fn install(images: &KernelImages, low_ram: u64, fw: &mut FwCfg) -> Result<(), DeviceError> {
    match KernelKind::detect(&images.kernel) {
        Some(KernelKind::Linux(protocol)) => linux(images, protocol, low_ram, fw),
        Some(kind) => protected(images, kind, low_ram, fw),
        None => Err(bad(images, "it is no bzImage, multiboot or PVH kernel")),
    }
}

/// The `vga=` option, which the setup header takes (Linux's admin guide, svga).
fn video_mode(cmdline: &str) -> Option<u16> {
    let value = cmdline.split_ascii_whitespace().find_map(|w| w.strip_prefix("vga="))?;
    match value {
        "normal" => Some(0xFFFF),
        "ext" => Some(0xFFFE),
        "ask" => Some(0xFFFD),
        v => match v.strip_prefix("0x") {
            Some(hex) => u16::from_str_radix(hex, 16).ok(),
            None => v.parse().ok(),
        },
    }
}

/// The Linux/x86 boot protocol (Documentation/arch/x86/boot.rst).
fn linux(images: &KernelImages, protocol: u16, low_ram: u64, fw: &mut FwCfg) -> Result<(), DeviceError> {
    let image = &images.kernel;
    let sectors = match image.get(0x1F1) {
        Some(0) | None => 4,
        Some(n) => usize::from(*n),
    };
    let setup_size = (sectors + 1) * 512;
    if image.len() <= setup_size {
        return Err(bad(images, "the file is too short"));
    }
    let mut setup = image[..setup_size].to_vec();
    let kernel = &image[setup_size..];
    let mut cmdline = images.cmdline.as_bytes().to_vec();
    cmdline.push(0);
    cmdline.resize(cmdline.len().next_multiple_of(16), 0);

    let high = protocol >= 0x200 && setup[0x211] & 1 != 0;
    let old_cmdline = 0x9_A000u32.saturating_sub(cmdline.len() as u32);
    let (setup_addr, cmdline_addr, kernel_addr) = match (high, protocol) {
        (false, _) => (0x9_0000, old_cmdline, 0x1_0000),
        (true, ..=0x201) => (0x9_0000, old_cmdline, KERNEL_ADDR),
        (true, _) => (SETUP_ADDR, CMDLINE_ADDR, KERNEL_ADDR),
    };
    if cmdline.len() > 0xA000 {
        return Err(bad(images, "the command line is too long"));
    }
    let mut put = |at: usize, bytes: &[u8]| setup[at..at + bytes.len()].copy_from_slice(bytes);
    if protocol >= 0x202 {
        put(0x228, &cmdline_addr.to_le_bytes());
    } else {
        put(0x20, &0xA33Fu16.to_le_bytes());
        put(0x22, &((cmdline_addr - setup_addr) as u16).to_le_bytes());
    }
    if let Some(mode) = video_mode(&images.cmdline) {
        put(0x1FA, &mode.to_le_bytes());
    }
    if protocol >= 0x200 {
        // An unregistered loader.
        put(0x210, &[0xB0]);
    }
    if protocol >= 0x201 {
        let flags = image[0x211] | 0x80;
        put(0x211, &[flags]);
        put(0x224, &((cmdline_addr - setup_addr - 0x200) as u16).to_le_bytes());
    }

    let mut initrd_addr = 0;
    let initrd: &[u8] = images.initrds.first().map_or(&[], |i| &i.data);
    if images.initrds.len() > 1 {
        return Err(bad(images, "a Linux kernel takes one initial RAM disk"));
    }
    if !initrd.is_empty() {
        if protocol < 0x200 {
            return Err(bad(images, "it is too old for an initial RAM disk"));
        }
        let mut max = match protocol {
            0x20C.. if word(image, 0x236) & 2 != 0 => 0xFFFF_FFFF,
            0x203.. => u64::from(long(image, 0x22C)),
            _ => 0x37FF_FFFF,
        };
        max = max.min(low_ram.saturating_sub(TOP_RESERVED + 1));
        let size = initrd.len() as u64;
        let floor = u64::from(kernel_addr) + kernel.len() as u64;
        if size > max || (max - size) & !4095 < floor {
            return Err(bad(
                images,
                &format!("the initial RAM disk of {size} bytes does not fit into memory"),
            ));
        }
        initrd_addr = ((max - size) & !4095) as u32;
        put(0x218, &initrd_addr.to_le_bytes());
        put(0x21C, &(size as u32).to_le_bytes());
    }
    if u64::from(kernel_addr) + kernel.len() as u64 > low_ram {
        return Err(bad(images, "it does not fit into memory"));
    }

    number(fw, fwcfg::SETUP_ADDR, setup_addr);
    number(fw, fwcfg::SETUP_SIZE, setup.len() as u32);
    fw.item(fwcfg::SETUP_DATA, setup);
    number(fw, fwcfg::CMDLINE_ADDR, cmdline_addr);
    number(fw, fwcfg::CMDLINE_SIZE, cmdline.len() as u32);
    fw.item(fwcfg::CMDLINE_DATA, cmdline);
    number(fw, fwcfg::KERNEL_ADDR, kernel_addr);
    number(fw, fwcfg::KERNEL_SIZE, kernel.len() as u32);
    fw.item(fwcfg::KERNEL_DATA, kernel);
    number(fw, fwcfg::INITRD_ADDR, initrd_addr);
    number(fw, fwcfg::INITRD_SIZE, initrd.len() as u32);
    fw.item(fwcfg::INITRD_DATA, initrd);
    fw.file(ROM_FILE, rom::linux());
    Ok(())
}

/// A kernel as it lies in memory.
pub(crate) struct Flat {
    pub addr: u32,
    pub data: Vec<u8>,
    pub entry: u32,
}

fn multiboot_image(images: &KernelImages, low_ram: u64) -> Result<Flat, DeviceError> {
    let data = &images.kernel;
    let at = multiboot_header(data).ok_or_else(|| bad(images, "it has no multiboot header"))?;
    let flags = long(data, at + 4);
    if flags & 0x1_0000 == 0 {
        return elf::flatten(data, low_ram).map_err(|e| bad(images, &e));
    }
    // The addresses are in the header (multiboot 0.6.96, section 3.1.3).
    let field = |i: usize| long(data, at + 12 + 4 * i);
    let (header, load, load_end, bss_end, entry) = (field(0), field(1), field(2), field(3), field(4));
    let skip = header.checked_sub(load).and_then(|d| at.checked_sub(d as usize));
    let Some(start) = skip else { return Err(bad(images, "its multiboot addresses are wrong")) };
    let have = data.len() - start;
    let size = match load_end.checked_sub(load) {
        Some(n) if load_end != 0 => (n as usize).min(have),
        _ => have,
    };
    let mut image = data[start..start + size].to_vec();
    if let Some(n) = bss_end.checked_sub(load).filter(|n| *n as usize > image.len()) {
        if u64::from(load) + u64::from(n) > low_ram {
            return Err(bad(images, "it does not fit into memory"));
        }
        image.resize(n as usize, 0);
    }
    Ok(Flat { addr: load, data: image, entry })
}

/// Multiboot 1 and PVH: the kernel flat in memory, its information structure in EBX.
fn protected(
    images: &KernelImages,
    kind: KernelKind,
    low_ram: u64,
    fw: &mut FwCfg,
) -> Result<(), DeviceError> {
    let multiboot = kind == KernelKind::Multiboot;
    let flat = if multiboot {
        multiboot_image(images, low_ram)?
    } else {
        let mut flat = elf::flatten(&images.kernel, low_ram).map_err(|e| bad(images, &e))?;
        flat.entry = elf::pvh_entry(&images.kernel).unwrap_or(flat.entry);
        flat
    };

    // Modules follow the kernel, each on a page.
    let modules_addr = (u64::from(flat.addr) + flat.data.len() as u64 + 4096).next_multiple_of(4096);
    let mut modules = Vec::new();
    let mut ranges = Vec::new();
    for file in &images.initrds {
        modules.resize(modules.len().next_multiple_of(4096), 0);
        let start = modules_addr + modules.len() as u64;
        modules.extend(&file.data);
        ranges.push((start, start + file.data.len() as u64));
    }
    if modules_addr + modules.len() as u64 + TOP_RESERVED > low_ram {
        return Err(bad(images, "the kernel with its modules does not fit into memory"));
    }

    let mut strings = Vec::new();
    let mut text = |s: &str| -> u32 {
        let at = CMDLINE_ADDR + strings.len() as u32;
        strings.extend(s.bytes());
        strings.push(0);
        at
    };
    let full = if multiboot { format!("{} {}", images.name, images.cmdline) } else { images.cmdline.clone() };
    let cmdline = text(&full);
    let names: Vec<u32> = images.initrds.iter().map(|i| text(&i.name)).collect();
    let loader = text("ftvm");

    let body_addr = INFO_ADDR + 16;
    let list_addr = body_addr + 0x80;
    let mut body = vec![0u8; 0x80];
    let mut put = |at: usize, value: u32| body[at..at + 4].copy_from_slice(&value.to_le_bytes());
    let parameters: [u32; 4] = if multiboot {
        // Memory, boot device, command line, modules, memory map, loader name (section 3.3).
        put(0, 1 | 2 | 4 | 8 | 0x40 | 0x200);
        put(4, 640);
        put(8, (low_ram / 1024).saturating_sub(1024) as u32);
        put(12, 0x8000_FFFF);
        put(16, cmdline);
        put(20, ranges.len() as u32);
        put(24, list_addr);
        put(48, MAP_ADDR);
        put(64, loader);
        [4, body_addr + 44, 24, 0x2BAD_B002]
    } else {
        // struct hvm_start_info (Xen's public/arch-x86/hvm/start_info.h).
        put(0, 0x336E_C578);
        put(4, 1);
        put(12, ranges.len() as u32);
        put(16, list_addr);
        put(24, cmdline);
        put(40, MAP_ADDR);
        [0, body_addr + 48, 1, 0]
    };
    let mut info: Vec<u8> = parameters.iter().flat_map(|v| v.to_le_bytes()).collect();
    info.extend(body);
    for ((start, end), name) in ranges.iter().zip(&names) {
        if multiboot {
            [*start as u32, *end as u32, *name, 0].iter().for_each(|v| info.extend(v.to_le_bytes()));
        } else {
            [*start, end - start, u64::from(*name), 0].iter().for_each(|v| info.extend(v.to_le_bytes()));
        }
    }
    if info.len() > INFO_LIMIT || strings.len() > 0x1_0000 {
        return Err(bad(images, "too many modules, or a command line that is too long"));
    }

    number(fw, fwcfg::SETUP_ADDR, INFO_ADDR);
    number(fw, fwcfg::SETUP_SIZE, info.len() as u32);
    fw.item(fwcfg::SETUP_DATA, info);
    number(fw, fwcfg::CMDLINE_ADDR, CMDLINE_ADDR);
    number(fw, fwcfg::CMDLINE_SIZE, strings.len() as u32);
    fw.item(fwcfg::CMDLINE_DATA, strings);
    number(fw, fwcfg::KERNEL_ADDR, flat.addr);
    number(fw, fwcfg::KERNEL_SIZE, flat.data.len() as u32);
    number(fw, fwcfg::KERNEL_ENTRY, flat.entry);
    fw.item(fwcfg::KERNEL_DATA, flat.data);
    number(fw, fwcfg::INITRD_ADDR, modules_addr as u32);
    number(fw, fwcfg::INITRD_SIZE, modules.len() as u32);
    fw.item(fwcfg::INITRD_DATA, modules);
    fw.file(ROM_FILE, rom::protected());
    Ok(())
}
