//! Runs a flat firmware image on the software processor with hardly any machine around it: the debug
//! port 0x402 and serial port 0x3F8 print. `flat IMAGE [MILLIONS] [CPU]`.

use ftvm_accel::bus::Ipi;
use ftvm_accel::{Bus, CpuModel, Exit, GuestMemory, Processor, SoftCpu};
use std::io::Write;

#[derive(Default)]
struct Ports {
    cmos: u8,
    line: Vec<u8>,
}

impl Bus for Ports {
    fn io_read(&mut self, position: u64, port: u16, size: u8) -> u32 {
        match port {
            0x402 => 0xE9,
            0x71 => match self.cmos & 0x7F {
                // 15 MiB above 1 MiB, the rest above 16 MiB in 64 KiB units.
                0x30 | 0x17 => 0x00,
                0x31 | 0x18 => 0x3C,
                0x34 => 0x00,
                0x35 => 0x03,
                0x0A => 0x26,
                0x0D => 0x80,
                _ => 0,
            },
            // ACPI PM timer: 3.579545 MHz of virtual time.
            0x608 => (position as u128 * 3_579_545 / 1_000_000_000) as u32 & 0xFF_FFFF,
            0x61 => ((position >> 14) as u32 & 1) << 4,
            0x92 => 2,
            0x64 => 0x1C,
            _ => u32::MAX >> (32 - 8 * size as u32),
        }
    }
    fn io_write(&mut self, _: u64, port: u16, _: u8, value: u32) {
        match port {
            0x70 => self.cmos = value as u8,
            0x402 | 0x3F8 => {
                self.line.push(value as u8);
                if value as u8 == b'\n' {
                    let _ = std::io::stdout().write_all(&self.line);
                    self.line.clear();
                }
            }
            _ => {}
        }
    }
    fn mmio_read(&mut self, _: u64, _: u64, size: u8) -> u64 {
        u64::MAX >> (64 - 8 * size as u32)
    }
    fn mmio_write(&mut self, _: u64, _: u64, _: u8, _: u64) {}
    fn clock_ns(&mut self, position: u64) -> u64 {
        position
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
        4
    }
    fn break_requested(&self) -> bool {
        false
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let image = args.next().unwrap_or_else(|| "/usr/share/seabios/bios.bin".into());
    let millions: u64 = args.next().map_or(Ok(100), |s| s.parse())?;
    let model = CpuModel::parse(&args.next().unwrap_or_else(|| "qemu64".into()))?;
    let mem = GuestMemory::new(64 << 20)?;
    mem.set_firmware(std::fs::read(image)?)?;
    for page in 0xC0..0x100u64 {
        // Shadow everything, as if the chipset did: copy the ROM's view into RAM first.
        let mut buf = vec![0u8; 4096];
        let b = mem.backing(page << 12);
        if !b.read.is_null() {
            // SAFETY: `read` points at a whole page.
            buf.copy_from_slice(unsafe { std::slice::from_raw_parts(b.read, 4096) });
        }
        mem.write(page << 12, &buf)?;
        mem.set_shadow(page << 12, ftvm_accel::mem::Shadow::Ram);
    }
    let mut cpu = SoftCpu::new(0, 1, &model);
    let mut bus = Ports::default();
    let mut position = 0;
    let start = std::time::Instant::now();
    while position < millions * 1_000_000 {
        let r = cpu.run(&mem, &mut bus, position, 1_000_000);
        position += r.retired;
        match r.exit {
            Exit::Budget | Exit::Pause | Exit::Break | Exit::Debug => {}
            Exit::Halt => match cpu.next_deadline() {
                Some(d) => {
                    position = position.max(d);
                    cpu.advance(position);
                }
                None => break,
            },
            Exit::Shutdown | Exit::Internal => {
                println!("stopped: {:?}", r.exit);
                break;
            }
        }
    }
    let t = start.elapsed().as_secs_f64();
    println!("{position} instructions in {t:.3} s: {:.1} million/s", position as f64 / t / 1e6);
    print!("{}", cpu.describe());
    Ok(())
}
