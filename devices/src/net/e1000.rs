//! The Intel 82540EM network card (PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's
//! Manual, 317453): registers, EEPROM and PHY. The rings are in `e1000_rings`.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::config::NicSpec;
use crate::ctx::{pack, unpack, Ctx, Device, DeviceError};
use crate::door::Input;
use crate::pci::{Bar, PciFunction, PciId, PciSaved};

/// Registers by byte offset (section 13.3).
pub const CTRL: usize = 0x0000;
pub const STATUS: usize = 0x0008;
const EECD: usize = 0x0010;
const EERD: usize = 0x0014;
const MDIC: usize = 0x0020;
const VET: usize = 0x0038;
pub const ICR: usize = 0x00C0;
const ITR: usize = 0x00C4;
const ICS: usize = 0x00C8;
pub const IMS: usize = 0x00D0;
const IMC: usize = 0x00D8;
pub const RCTL: usize = 0x0100;
pub const TCTL: usize = 0x0400;
const PBA: usize = 0x1000;
const LEDCTL: usize = 0x0E00;
pub const RDBAL: usize = 0x2800;
pub const RDBAH: usize = 0x2804;
pub const RDLEN: usize = 0x2808;
pub const RDH: usize = 0x2810;
pub const RDT: usize = 0x2818;
pub const TDBAL: usize = 0x3800;
pub const TDBAH: usize = 0x3804;
pub const TDLEN: usize = 0x3808;
pub const TDH: usize = 0x3810;
pub const TDT: usize = 0x3818;
pub const GPRC: usize = 0x4074;
pub const GPTC: usize = 0x4080;
pub const TPR: usize = 0x40D0;
pub const TPT: usize = 0x40D4;
pub const MTA: usize = 0x5200;
pub const RA: usize = 0x5400;
pub const VFTA: usize = 0x5600;
const MANC: usize = 0x5820;
const REGISTERS: usize = 0x8000 / 4;

const CTRL_RST: u32 = 1 << 26;
const CTRL_PHY_RST: u32 = 1 << 31;
const STATUS_LINK: u32 = 2;

pub const ICR_TXDW: u32 = 1;
pub const ICR_TXQE: u32 = 2;
const ICR_LSC: u32 = 4;
pub const ICR_RXDMT0: u32 = 0x10;
pub const ICR_RXO: u32 = 0x40;
pub const ICR_RXT0: u32 = 0x80;
const ICR_MDAC: u32 = 0x200;

/// EECD bits: clock, chip select, data in and out, request, grant, present.
const SK: u32 = 1;
const CS: u32 = 2;
const DI: u32 = 4;
const DO: u32 = 8;
const REQ: u32 = 0x40;
const GNT: u32 = 0x80;
const PRES: u32 = 0x100;

/// Timers: 0 is the interrupt throttle, this one goes on with a long transmit ring.
pub const TX_TIMER: u8 = 1;

/// Checksum context of the transmitter (section 3.3.6).
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct TxContext {
    pub ipcss: u8,
    pub ipcso: u8,
    pub ipcse: u16,
    pub tucss: u8,
    pub tucso: u8,
    pub tucse: u16,
    pub hdrlen: u8,
    pub mss: u16,
    pub v4: bool,
    pub tcp: bool,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Shift {
    input: u32,
    bits: u8,
    reading: bool,
    word: u8,
    place: u8,
    out: bool,
    clock: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    pub regs: Vec<u32>,
    phy: Vec<u16>,
    eeprom: Vec<u16>,
    shift: Shift,
    pub link: bool,
    /// The interrupt throttle timer runs; whether the line is high.
    throttled: bool,
    line: bool,
    io_address: u32,
    pub context: TxContext,
    /// The frame being put together from transmit descriptors, and what its first said.
    pub tx_frame: Vec<u8>,
    pub tx_overflow: bool,
    pub tx_popts: Option<u8>,
    pub backlog: VecDeque<Vec<u8>>,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    pci: PciSaved,
    s: State,
}

/// The card.
pub struct E1000 {
    name: String,
    pub pci: PciFunction,
    pub spec: NicSpec,
    pub s: State,
}

fn eeprom(mac: [u8; 6]) -> Vec<u16> {
    let mut e = vec![0xFFFFu16; 64];
    for i in 0..3 {
        e[i] = u16::from_le_bytes([mac[2 * i], mac[2 * i + 1]]);
    }
    e[0x03..0x0A].fill(0);
    // Initialization control 1, subsystem, device and vendor, initialization control 2 (section 5.6).
    e[0x0A] = 0x6403;
    e[0x0B] = 0x100E;
    e[0x0C] = 0x8086;
    e[0x0D] = 0x100E;
    e[0x0E] = 0x8086;
    e[0x0F] = 0x3040;
    e[0x3F] = 0;
    let total = e.iter().fold(0u16, |a, w| a.wrapping_add(*w));
    e[0x3F] = 0xBABAu16.wrapping_sub(total);
    e
}

fn phy() -> Vec<u16> {
    let mut p = vec![0u16; 32];
    // 88E1011: auto-negotiated, link up, 1000 Mbit/s full duplex.
    p[0] = 0x1140;
    p[1] = 0x796D;
    p[2] = 0x0141;
    p[3] = 0x0C20;
    p[4] = 0x0DE1;
    p[5] = 0xCDE1;
    p[6] = 0x000F;
    p[9] = 0x0E00;
    p[10] = 0x3C00;
    p[15] = 0x3000;
    p[16] = 0x0360;
    p[17] = 0xAC00;
    p[20] = 0x0D60;
    p
}

impl E1000 {
    /// A card at `devfn`.
    pub fn new(name: String, devfn: u8, spec: NicSpec) -> E1000 {
        let mut pci = PciFunction::new(
            devfn,
            PciId {
                vendor: 0x8086,
                device: 0x100E,
                revision: 3,
                class: 0x02_0000,
                subsystem_vendor: 0x1AF4,
                subsystem: 0x1100,
            },
        );
        pci.pin(1);
        pci.bar(0, Bar::Memory(0x2_0000));
        pci.bar(1, Bar::Io(0x40));
        pci.seal();
        let s = State {
            regs: vec![0; REGISTERS],
            phy: phy(),
            eeprom: eeprom(spec.mac),
            shift: Shift::default(),
            link: true,
            throttled: false,
            line: false,
            io_address: 0,
            context: TxContext::default(),
            tx_frame: Vec::new(),
            tx_overflow: false,
            tx_popts: None,
            backlog: VecDeque::new(),
        };
        E1000 { name, pci, spec, s }
    }

    pub fn reg(&self, offset: usize) -> u32 {
        self.s.regs.get(offset / 4).copied().unwrap_or(0)
    }

    pub fn set(&mut self, offset: usize, value: u32) {
        if let Some(r) = self.s.regs.get_mut(offset / 4) {
            *r = value;
        }
    }

    fn reset_device(&mut self, ctx: &mut Ctx) {
        self.s.regs.fill(0);
        self.s.phy = phy();
        self.s.shift = Shift::default();
        self.s.context = TxContext::default();
        self.s.tx_frame.clear();
        self.s.tx_overflow = false;
        self.s.tx_popts = None;
        self.s.backlog.clear();
        self.s.throttled = false;
        self.set(CTRL, 0x0014_0240);
        self.set(STATUS, 0x8008_0781);
        self.set(MANC, 0);
        self.set(PBA, 0x0010_0030);
        self.set(LEDCTL, 0x602);
        self.set(VET, 0x8100);
        let word = |i: usize| u32::from(self.s.eeprom[i]);
        let (low, high) = (word(0) | word(1) << 16, word(2) | 1 << 31);
        self.set(RA, low);
        self.set(RA + 4, high);
        self.show_link();
        ctx.set_timer(0, None);
        ctx.set_timer(TX_TIMER, None);
        self.update_irq(ctx);
    }

    fn show_link(&mut self) {
        let status = self.reg(STATUS);
        if self.s.link {
            self.set(STATUS, status | STATUS_LINK);
            self.s.phy[1] |= 0x24;
            self.s.phy[17] |= 0x400;
        } else {
            self.set(STATUS, status & !STATUS_LINK);
            self.s.phy[1] &= !0x24;
            self.s.phy[17] &= !0x400;
        }
    }

    /// Set interrupt causes.
    pub fn cause(&mut self, ctx: &mut Ctx, bits: u32) {
        let icr = self.reg(ICR) | bits;
        self.set(ICR, icr);
        self.update_irq(ctx);
    }

    fn update_irq(&mut self, ctx: &mut Ctx) {
        let wanted = self.reg(ICR) & self.reg(IMS) != 0;
        if wanted && !self.s.line {
            if self.s.throttled {
                return;
            }
            // ITR counts 256 ns between interrupts.
            let gap = u64::from(self.reg(ITR) & 0xFFFF) * 256;
            if gap != 0 {
                self.s.throttled = true;
                ctx.set_timer(0, Some(ctx.now.saturating_add(gap)));
            }
        }
        self.s.line = wanted;
        self.pci.set_intx(ctx, wanted);
    }

    fn eecd_write(&mut self, value: u32) {
        let s = &mut self.s.shift;
        let clock = value & SK != 0;
        if value & CS == 0 {
            *s = Shift { clock, ..Shift::default() };
        } else {
            if clock && !s.clock {
                if s.reading {
                    let word = self.s.eeprom[usize::from(s.word & 63)];
                    s.out = word >> (15 - s.place) & 1 != 0;
                    s.place += 1;
                    if s.place == 16 {
                        s.place = 0;
                        s.word = s.word.wrapping_add(1);
                    }
                } else if s.bits != 0 || value & DI != 0 {
                    // From the start bit on: two bits of opcode, six of address.
                    s.input = s.input << 1 | u32::from(value & DI != 0);
                    s.bits += 1;
                    if s.bits == 9 {
                        s.reading = s.input >> 6 == 6;
                        s.word = (s.input & 63) as u8;
                        s.bits = 0;
                        s.input = 0;
                        s.out = !s.reading;
                    }
                }
            }
            s.clock = clock;
        }
        self.set(EECD, value & (SK | CS | DI | REQ | 0x30));
    }

    fn eecd_read(&self) -> u32 {
        let v = self.reg(EECD);
        let grant = if v & REQ != 0 { GNT } else { 0 };
        let out = if self.s.shift.out || !self.s.shift.reading { DO } else { 0 };
        v | PRES | grant | out
    }

    fn mdic_write(&mut self, ctx: &mut Ctx, value: u32) {
        let register = (value >> 16 & 31) as usize;
        let mut v = value & !(1 << 30) | 1 << 28;
        if value >> 21 & 31 != 1 {
            v |= 1 << 30;
        } else if value >> 26 & 3 == 2 {
            v = v & 0xFFFF_0000 | u32::from(self.s.phy[register]);
        } else if value >> 26 & 3 == 1 {
            match register {
                // The reset and restart bits clear themselves.
                0 => {
                    self.s.phy[0] = value as u16 & 0x7DFF;
                    if value & 0x8000 != 0 {
                        self.s.phy = phy();
                        self.show_link();
                    }
                    if value & 0x0200 != 0 {
                        self.cause(ctx, ICR_LSC);
                    }
                }
                1..=3 | 5 | 6 | 10 | 15 | 17 | 19 => {}
                n => self.s.phy[n] = value as u16,
            }
        }
        self.set(MDIC, v);
        if value & 1 << 29 != 0 {
            self.cause(ctx, ICR_MDAC);
        }
    }

    fn read(&mut self, ctx: &mut Ctx, offset: usize) -> u32 {
        match offset {
            EECD => self.eecd_read(),
            ICR => {
                let v = self.reg(ICR);
                self.set(ICR, 0);
                self.update_irq(ctx);
                v
            }
            ICS | IMC => 0,
            // Statistics clear when read.
            0x4000..=0x40FC => {
                let v = self.reg(offset);
                self.set(offset, 0);
                v
            }
            _ => self.reg(offset),
        }
    }

    fn write(&mut self, ctx: &mut Ctx, offset: usize, value: u32) {
        match offset {
            CTRL | 0x0004 => {
                self.set(CTRL, value & !(CTRL_RST | CTRL_PHY_RST));
                if value & CTRL_PHY_RST != 0 {
                    self.s.phy = phy();
                    self.show_link();
                }
                if value & CTRL_RST != 0 {
                    self.reset_device(ctx);
                }
            }
            EECD => self.eecd_write(value),
            EERD if value & 1 != 0 => {
                let word = (value >> 8 & 0xFF) as usize;
                let data = u32::from(self.s.eeprom.get(word).copied().unwrap_or(0xFFFF));
                self.set(EERD, value & 0xFF00 | data << 16 | 0x10);
            }
            MDIC => self.mdic_write(ctx, value),
            ICR => {
                let icr = self.reg(ICR) & !value;
                self.set(ICR, icr);
                self.update_irq(ctx);
            }
            ICS => self.cause(ctx, value),
            IMS => {
                let ims = self.reg(IMS) | value;
                self.set(IMS, ims);
                self.update_irq(ctx);
            }
            IMC => {
                let ims = self.reg(IMS) & !value;
                self.set(IMS, ims);
                self.update_irq(ctx);
            }
            ITR => self.set(ITR, value & 0xFFFF),
            RCTL => {
                self.set(RCTL, value);
                self.receive(ctx);
            }
            TCTL => {
                self.set(TCTL, value);
                self.transmit(ctx);
            }
            RDLEN | TDLEN => self.set(offset, value & 0xF_FF80),
            RDBAL | TDBAL => self.set(offset, value & !15),
            RDH | TDH => self.set(offset, value & 0xFFFF),
            RDT => {
                self.set(RDT, value & 0xFFFF);
                self.receive(ctx);
            }
            TDT => {
                self.set(TDT, value & 0xFFFF);
                self.transmit(ctx);
            }
            0x0018..=0x0038
            | 0x0170..=0x017C
            | 0x0410..=0x0458
            | LEDCTL
            | PBA
            | 0x2160..=0x2168
            | 0x2804..=0x282C
            | 0x3804..=0x383C
            | 0x5000..=0x59FC
            | 0x5B50 => self.set(offset, value),
            _ => {}
        }
    }
}

impl Device for E1000 {
    fn name(&self) -> &str {
        &self.name
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        self.pci.reset(ctx);
        self.s.io_address = 0;
        self.reset_device(ctx);
    }
    fn mmio_read(&mut self, ctx: &mut Ctx, _region: u8, offset: u64, size: u8) -> u64 {
        let low = u64::from(self.read(ctx, offset as usize & !3)) >> (8 * (offset & 3));
        if size == 8 {
            low | u64::from(self.read(ctx, (offset as usize & !3) + 4)) << 32
        } else {
            low
        }
    }
    fn mmio_write(&mut self, ctx: &mut Ctx, _region: u8, offset: u64, size: u8, value: u64) {
        // Registers take whole dwords.
        if offset & 3 == 0 && size >= 4 {
            self.write(ctx, offset as usize, value as u32);
            if size == 8 {
                self.write(ctx, offset as usize + 4, (value >> 32) as u32);
            }
        }
    }
    fn pio_read(&mut self, ctx: &mut Ctx, _region: u8, offset: u16, _size: u8) -> u32 {
        match offset {
            0 => self.s.io_address,
            4 => self.read(ctx, self.s.io_address as usize & 0x1_FFFC),
            _ => 0,
        }
    }
    fn pio_write(&mut self, ctx: &mut Ctx, _region: u8, offset: u16, size: u8, value: u32) {
        match (offset, size) {
            (0, 4) => self.s.io_address = value,
            (4, 4) => self.write(ctx, self.s.io_address as usize & 0x1_FFFC, value),
            _ => {}
        }
    }
    fn timer(&mut self, ctx: &mut Ctx, id: u8) {
        if id == TX_TIMER {
            self.transmit(ctx);
        } else {
            self.s.throttled = false;
            self.update_irq(ctx);
        }
    }
    fn input(&mut self, ctx: &mut Ctx, input: &Input) {
        match input {
            Input::NetRx { nic, frame } if *nic == self.spec.index => self.arrive(ctx, frame),
            Input::LinkState { nic, up } if *nic == self.spec.index && self.s.link != *up => {
                self.s.link = *up;
                self.show_link();
                self.cause(ctx, ICR_LSC);
            }
            _ => {}
        }
    }
    fn pci(&self) -> Option<&PciFunction> {
        Some(&self.pci)
    }
    fn pci_mut(&mut self) -> Option<&mut PciFunction> {
        Some(&mut self.pci)
    }
    fn config_written(&mut self, ctx: &mut Ctx, offset: u8, _len: u8) {
        // Frames may wait for bus mastering.
        if offset < 8 {
            self.receive(ctx);
        }
    }
    fn save(&self) -> Vec<u8> {
        pack(&Saved { pci: self.pci.save(), s: self.s.clone() })
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let s: Saved = unpack(&self.name, data)?;
        let sound = s.s.regs.len() == REGISTERS && s.s.phy.len() == 32 && s.s.eeprom.len() == 64;
        let frames = s.s.backlog.iter().all(|f| f.len() >= 14);
        if !sound || !frames || s.s.shift.place > 15 || !self.pci.load(s.pci) {
            return Err(DeviceError::Misfit(self.name.clone()));
        }
        self.s = s.s;
        Ok(())
    }
}
