//! Boots a Linux bzImage on the software processor with the least machine around it that Linux bears: an
//! 8259, a PIT channel and a serial port. `linux KERNEL INITRD CMDLINE [MILLIONS] [CPU] [CHUNK] [TIER]`: with
//! CHUNK the run is cut into calls of varying length up to it, and the processor is now and then saved and
//! loaded into a fresh one; the hash at the end must not depend on it,
//! nor on TIER: `never`, `always` or a seed say when blocks are compiled.

use ftvm_accel::bus::Ipi;
use ftvm_accel::tcg::Tier;
use ftvm_accel::{Bus, ClockLine, CpuModel, Exit, GuestMemory, Processor, SoftCpu};
use std::io::Write;

/// Enters 32-bit protected mode and jumps to 1 MiB with ESI = 0x90000 (boot parameters).
const STUB: [u8; 102] = [
    0xfa, 0x2e, 0x66, 0x0f, 0x01, 0x16, 0x60, 0xff, 0x0f, 0x20, 0xc0, 0x66, 0x83, 0xc8, 0x01, 0x0f, 0x22,
    0xc0, 0x66, 0xea, 0x1a, 0xff, 0x0f, 0x00, 0x10, 0x00, 0x66, 0xb8, 0x18, 0x00, 0x8e, 0xd8, 0x8e, 0xc0,
    0x8e, 0xd0, 0x8e, 0xe0, 0x8e, 0xe8, 0xbe, 0x00, 0x00, 0x09, 0x00, 0x31, 0xed, 0x31, 0xff, 0x31, 0xdb,
    0xbc, 0x00, 0xf0, 0x08, 0x00, 0xb8, 0x00, 0x00, 0x10, 0x00, 0xff, 0xe0, 0x90, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00, 0x00, 0x00,
    0x9a, 0xcf, 0x00, 0xff, 0xff, 0x00, 0x00, 0x00, 0x92, 0xcf, 0x00, 0x1f, 0x00, 0x40, 0xff, 0x0f, 0x00,
];
const PIT_HZ: u128 = 1_193_182;

#[derive(Default)]
struct Pic {
    irr: u8,
    isr: u8,
    imr: u8,
    base: u8,
    icw: u8,
    auto: bool,
}
impl Pic {
    fn write(&mut self, odd: bool, v: u8) {
        match (odd, self.icw) {
            (false, _) if v & 0x10 != 0 => {
                *self = Pic { icw: 1, ..Default::default() };
            }
            (false, _) => {
                if v & 0x20 != 0 {
                    self.isr &= self.isr.wrapping_sub(1);
                }
            }
            (true, 1) => {
                self.base = v;
                self.icw = 2;
            }
            (true, 2) => self.icw = 3,
            (true, 3) => {
                self.auto = v & 2 != 0;
                self.icw = 0;
            }
            _ => self.imr = v,
        }
    }
    fn pending(&self) -> Option<u32> {
        let p = self.irr & !self.imr;
        let n = p.trailing_zeros();
        (p != 0 && (self.isr == 0 || n < self.isr.trailing_zeros())).then_some(n)
    }
}

#[derive(Default)]
struct Ports {
    master: Pic,
    slave: Pic,
    ier: u8,
    lcr: u8,
    reload: u32,
    latch: u8,
    low: bool,
    mode: u8,
    next: u64,
    since: u64,
    count2: u32,
    since2: u64,
    low2: bool,
    port61: u8,
    latched: Option<u16>,
    want: bool,
    rearmed: bool,
}
impl Ports {
    fn period(&self) -> u64 {
        let n = if self.reload == 0 { 65536 } else { self.reload };
        (n as u128 * 1_000_000_000 / PIT_HZ) as u64
    }
    fn tick(&mut self, now: u64) {
        if self.next != 0 && now >= self.next {
            self.master.irr |= 1;
            self.next = if self.mode & 7 == 2 || self.mode & 7 == 3 { self.next + self.period() } else { 0 };
        }
    }
}

impl Bus for Ports {
    fn io_read(&mut self, position: u64, port: u16, size: u8) -> u32 {
        match port {
            0x20 => 0,
            0x21 => self.master.imr as u32,
            0xA1 => self.slave.imr as u32,
            0x3F9 if self.lcr & 0x80 == 0 => self.ier as u32,
            0x3FA => {
                if self.ier & 2 != 0 {
                    2
                } else {
                    1
                }
            }
            0x3FB => self.lcr as u32,
            0x3FD => 0x60,
            0x3FE => 0xB0,
            0x3F8 | 0x3F9 | 0x3FC | 0x3FF => 0,
            0x40 => {
                let c = self.latched.unwrap_or_else(|| {
                    let n = if self.reload == 0 { 65536 } else { self.reload } as u128;
                    let t = (position - self.since.min(position)) as u128 * PIT_HZ / 1_000_000_000;
                    (n - t % n) as u16
                });
                self.low = !self.low;
                if self.low {
                    self.latched = Some(c);
                    c as u32 & 0xFF
                } else {
                    self.latched = None;
                    c as u32 >> 8
                }
            }
            0x61 => {
                let t = (position - self.since2.min(position)) as u128 * PIT_HZ / 1_000_000_000;
                self.port61 as u32 & 0xF | if t >= self.count2 as u128 { 0x20 } else { 0 }
            }
            0x42 => {
                let t = (position - self.since2.min(position)) as u128 * PIT_HZ / 1_000_000_000;
                let c = (self.count2 as u128).wrapping_sub(t) as u16;
                self.low2 = !self.low2;
                if self.low2 {
                    c as u32 & 0xFF
                } else {
                    c as u32 >> 8
                }
            }
            _ => u32::MAX >> (32 - 8 * size as u32),
        }
    }
    fn io_write(&mut self, position: u64, port: u16, _: u8, value: u32) {
        let v = value as u8;
        match port {
            0x20 | 0x21 => self.master.write(port & 1 != 0, v),
            0xA0 | 0xA1 => self.slave.write(port & 1 != 0, v),
            0x3F8 if self.lcr & 0x80 == 0 => {
                let _ = std::io::stdout().write_all(&[v]);
            }
            0x3F9 if self.lcr & 0x80 == 0 => self.ier = v,
            0x3FB => self.lcr = v,
            0x43 => {
                if v >> 6 == 0 {
                    if v & 0x30 != 0 {
                        self.mode = v >> 1 & 7;
                        self.next = 0;
                    }
                    self.low = false;
                    self.latched = None;
                } else if v >> 6 == 2 {
                    self.low2 = false;
                }
            }
            0x40 => {
                self.low = !self.low;
                if self.low {
                    self.latch = v;
                } else {
                    self.reload = self.latch as u32 | (v as u32) << 8;
                    self.since = position;
                    self.next = position + self.period();
                    self.rearmed = true;
                }
            }
            0x42 => {
                self.low2 = !self.low2;
                if self.low2 {
                    self.latch = v;
                } else {
                    self.count2 = self.latch as u32 | (v as u32) << 8;
                    self.since2 = position;
                }
            }
            0x61 => self.port61 = v,
            0x64 if v == 0xFE => self.want = true,
            _ => {}
        }
        if matches!(port, 0x3F8 | 0x3F9) {
            // The transmitter is always ready.
            self.master.irr = self.master.irr & !16 | (self.ier & 2) << 3;
        }
        self.tick(position);
    }
    fn mmio_read(&mut self, _: u64, _: u64, size: u8) -> u64 {
        u64::MAX >> (64 - 8 * size as u32)
    }
    fn mmio_write(&mut self, _: u64, _: u64, _: u8, _: u64) {}
    fn clock_ns(&mut self, position: u64) -> u64 {
        position
    }
    fn clock_line(&self, _: u64) -> ClockLine {
        ClockLine { base_ns: 0, rate: 1 << ClockLine::SHIFT }
    }
    fn intr(&mut self) -> bool {
        self.master.pending().is_some()
    }
    fn intr_ack(&mut self, _: u64) -> u8 {
        let n = self.master.pending().unwrap_or(7);
        self.master.irr &= !(1 << n);
        if !self.master.auto {
            self.master.isr |= 1 << n;
        }
        self.master.base + n as u8
    }
    fn eoi(&mut self, _: u64, _: u8) {}
    fn send_ipi(&mut self, _: Ipi) {}
    fn random(&mut self) -> u64 {
        4
    }
    fn break_requested(&self) -> bool {
        self.master.pending().is_some() || self.want || self.rearmed
    }
}

/// A run: what to boot, how far, and what must not matter.
pub struct Boot {
    pub kernel: Vec<u8>,
    pub initrd: Vec<u8>,
    pub line: String,
    /// Virtual nanoseconds.
    pub until: u64,
    pub model: CpuModel,
    /// Cut the run into calls of up to so many instructions; 0: do not.
    pub chunk: u64,
    pub tier: Option<Tier>,
}

/// What came of it.
pub struct Done {
    pub instructions: u64,
    pub position: u64,
    pub hash: u64,
    pub registers: String,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    if args.len() < 4 {
        return Err("linux KERNEL INITRD CMDLINE [MILLIONS] [CPU] [CHUNK] [TIER]".into());
    }
    let millions: u64 = args.get(4).map_or(Ok(20_000), |s| s.parse())?;
    let tier = match args.get(7).map(String::as_str) {
        None | Some("") => None,
        Some("never") => Some(Tier::Never),
        Some("always") => Some(Tier::AtOnce),
        Some(seed) => Some(Tier::Random(seed.parse()?)),
    };
    let boot = Boot {
        kernel: std::fs::read(&args[1])?,
        initrd: std::fs::read(&args[2])?,
        line: args[3].clone(),
        until: millions * 1_000_000,
        model: CpuModel::parse(args.get(5).map_or("qemu64", |s| s))?,
        chunk: args.get(6).map_or(Ok(0), |s| s.parse())?,
        tier,
    };
    let start = std::time::Instant::now();
    let done = boot.run()?;
    let t = start.elapsed().as_secs_f64();
    println!(
        "\n{} instructions in {t:.3} s: {:.1} million/s, virtual time {:.3} s",
        done.instructions,
        done.instructions as f64 / t / 1e6,
        done.position as f64 / 1e9
    );
    print!("{}", done.registers);
    println!("state {:016x} at {}", done.hash, done.position);
    Ok(())
}

impl Boot {
    /// Run it, printing what the guest prints.
    pub fn run(&self) -> Result<Done, Box<dyn std::error::Error>> {
        const SIZE: u64 = 256 << 20;
        let mem = GuestMemory::new(SIZE)?;
        let mut rom = vec![0u8; 65536];
        rom[0xFF00..0xFF00 + STUB.len()].copy_from_slice(&STUB);
        rom[0xFFF0..0xFFF5].copy_from_slice(&[0xEA, 0x00, 0xFF, 0x00, 0xF0]);
        mem.set_firmware(rom)?;
        let (kernel, initrd) = (&self.kernel, &self.initrd);
        let setup = (kernel[0x1F1] as usize).max(4) * 512 + 512;
        mem.write(0x10_0000, &kernel[setup..])?;
        let at = (SIZE - initrd.len() as u64 - 0x20_0000) & !0xFFF;
        mem.write(at, initrd)?;
        let mut p = vec![0u8; 4096];
        p[0x1F1..0x290].copy_from_slice(&kernel[0x1F1..0x290]);
        p[0x210] = 0xFF;
        p[0x211] |= 0x81;
        p[0x218..0x21C].copy_from_slice(&(at as u32).to_le_bytes());
        p[0x21C..0x220].copy_from_slice(&(initrd.len() as u32).to_le_bytes());
        p[0x228..0x22C].copy_from_slice(&0x9_1000u32.to_le_bytes());
        p[0x1E8] = 2;
        let mut e820 = |i: usize, start: u64, len: u64| {
            let o = 0x2D0 + 20 * i;
            p[o..o + 8].copy_from_slice(&start.to_le_bytes());
            p[o + 8..o + 16].copy_from_slice(&len.to_le_bytes());
            p[o + 16] = 1;
        };
        e820(0, 0, 0x9_FC00);
        e820(1, 0x10_0000, SIZE - 0x10_0000);
        mem.write(0x9_0000, &p)?;
        let mut line = self.line.clone().into_bytes();
        line.push(0);
        mem.write(0x9_1000, &line)?;

        let fresh = || {
            let mut cpu = SoftCpu::new(0, 1, &self.model);
            if let Some(tier) = self.tier {
                cpu.set_tier(tier);
            }
            cpu
        };
        let mut seed = 1u64;
        let mut cpu = fresh();
        let mut bus = Ports::default();
        let mut position = 0;
        let mut run = 0u64;
        while position < self.until && !bus.want {
            let mut to = (position + 1_000_000).min(self.until);
            if self.chunk != 0 {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                to = to.min(position + 1 + (seed >> 33) % self.chunk);
                if seed >> 40 & 0xFFF == 0 {
                    let saved = cpu.save();
                    cpu = fresh();
                    cpu.load(&saved)?;
                }
            }
            if bus.next != 0 {
                to = to.min(bus.next.max(position + 1));
            }
            if let Some(d) = cpu.next_deadline() {
                to = to.min(d.max(position + 1));
            }
            let r = cpu.run(&mem, &mut bus, position, to - position);
            bus.rearmed = false;
            position += r.retired;
            run += r.retired;
            if r.exit == Exit::Halt && cpu.is_idle(bus.intr()) {
                let next =
                    [cpu.next_deadline(), (bus.next != 0).then_some(bus.next)].into_iter().flatten().min();
                match next {
                    Some(d) => position = position.max(d),
                    None => break,
                }
            }
            if matches!(r.exit, Exit::Shutdown | Exit::Internal) {
                println!("stopped: {:?}", r.exit);
                break;
            }
            bus.tick(position);
            cpu.advance(position);
        }
        let mut page = vec![0u8; 4096];
        let mut hash = 0xCBF2_9CE4_8422_2325u64;
        let mut mix = |bytes: &[u8]| {
            for b in bytes {
                hash = (hash ^ *b as u64).wrapping_mul(0x100_0000_01B3);
            }
        };
        mix(&cpu.save());
        for at in (0..SIZE).step_by(4096) {
            mem.read(at, &mut page)?;
            mix(&page);
        }
        Ok(Done { instructions: run, position, hash, registers: cpu.describe() })
    }
}
