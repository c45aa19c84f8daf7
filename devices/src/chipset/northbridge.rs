//! The host bridges, with the PAM registers that switch the legacy window: the 82441FX (Intel 440FX datasheet)
//! and Q35's MCH, which also gives memory-mapped access to configuration space (Intel 3 Series datasheet, 5.1.16).

use ftvm_accel::mem::Shadow;
use serde::{Deserialize, Serialize};

use crate::ctx::{pack, unpack, Ctx, Device, DeviceError, Window};
use crate::pci::{PciFunction, PciId, PciSaved};

/// PCIEXBAR: where configuration space lies in memory.
const PCIEXBAR: usize = 0x60;
/// The region of the MCH that is configuration space; the machine itself serves it.
pub const CONFIG_REGION: u8 = 0xCF;
/// Where firmware puts it (the MCFG table names it).
pub const CONFIG_BASE: u64 = 0xB000_0000;

#[derive(Serialize, Deserialize)]
struct Saved {
    pci: PciSaved,
}

/// The host bridge, PCI 00:00.0.
pub struct HostBridge {
    name: &'static str,
    pci: PciFunction,
    /// Where PAM0 lies.
    pam: u8,
}

impl HostBridge {
    fn new(name: &'static str, device: u16, revision: u8, pam: u8) -> HostBridge {
        let id = PciId {
            vendor: 0x8086,
            device,
            revision,
            class: 0x06_0000,
            subsystem_vendor: 0x1AF4,
            subsystem: 0x1100,
        };
        HostBridge { name, pci: PciFunction::new(0, id), pam }
    }

    /// The i440FX.
    pub fn i440fx() -> HostBridge {
        let mut bridge = HostBridge::new("i440FX", 0x1237, 2, 0x59);
        bridge.pci.allow(0x50, &[0xFF; 0x30]);
        bridge.pci.set8(0x72, 0x02);
        bridge.pci.seal();
        bridge
    }

    /// Q35's memory controller hub.
    pub fn mch() -> HostBridge {
        let mut bridge = HostBridge::new("mch", 0x29C0, 0, 0x90);
        bridge.pci.set32(PCIEXBAR, CONFIG_BASE as u32);
        bridge.pci.allow(PCIEXBAR, &[0x07, 0, 0, 0xFC, 0xFF, 0, 0, 0]);
        bridge.pci.allow(0x90, &[0x33; 7]);
        // SMRAM is closed, and stays so: there is no SMM.
        bridge.pci.set8(0x9D, 0x02);
        bridge.pci.seal();
        bridge
    }
}

impl HostBridge {
    fn apply(&self, ctx: &Ctx) {
        const MODES: [Shadow; 4] = [Shadow::Rom, Shadow::ReadRam, Shadow::WriteRam, Shadow::Ram];
        let modes = ctx.mem.shadow_modes();
        let set = |start: u64, len: u64, bits: u8| {
            let mode = MODES[usize::from(bits & 3)];
            for page in (start..start + len).step_by(4096) {
                // Each change costs the processor its TLB.
                if modes.get(((page - 0xA_0000) / 4096) as usize) != Some(&(mode as u8)) {
                    ctx.mem.set_shadow(page, mode);
                }
            }
        };
        set(0xF_0000, 0x1_0000, self.pci.get8(usize::from(self.pam)) >> 4);
        for i in 0..12u64 {
            let reg = self.pci.get8(usize::from(self.pam) + 1 + (i / 2) as usize);
            set(0xC_0000 + i * 0x4000, 0x4000, reg >> (4 * (i & 1)));
        }
    }
}

impl Device for HostBridge {
    fn name(&self) -> &str {
        self.name
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        self.pci.reset(ctx);
        self.apply(ctx);
    }
    fn pci(&self) -> Option<&PciFunction> {
        Some(&self.pci)
    }
    fn pci_mut(&mut self) -> Option<&mut PciFunction> {
        Some(&mut self.pci)
    }
    fn config_written(&mut self, ctx: &mut Ctx, offset: u8, len: u8) {
        if offset < self.pam + 7 && offset.saturating_add(len) > self.pam {
            self.apply(ctx);
        }
        if self.name == "mch" && usize::from(offset) < PCIEXBAR + 8 {
            ctx.remap();
        }
    }
    fn windows(&self) -> Vec<Window> {
        let low = self.pci.get32(PCIEXBAR);
        if self.name != "mch" || low & 1 == 0 {
            return Vec::new();
        }
        let bits = match low >> 1 & 3 {
            0 => 28,
            1 => 27,
            2 => 26,
            _ => return Vec::new(),
        };
        let base = (u64::from(low) | u64::from(self.pci.get32(PCIEXBAR + 4)) << 32) & !((1 << bits) - 1);
        vec![Window::new(CONFIG_REGION, base, 1 << bits)]
    }
    fn save(&self) -> Vec<u8> {
        pack(&Saved { pci: self.pci.save() })
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let s: Saved = unpack(self.name, data)?;
        if !self.pci.load(s.pci) {
            return Err(DeviceError::Misfit(self.name.into()));
        }
        Ok(())
    }
}
