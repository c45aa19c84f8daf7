//! The 82441FX host bridge (Intel 440FX datasheet): PAM registers and the identity SeaBIOS looks for.

use ftvm_accel::mem::Shadow;
use serde::{Deserialize, Serialize};

use crate::ctx::{pack, unpack, Ctx, Device, DeviceError};
use crate::pci::{PciFunction, PciId, PciSaved};

const PAM0: u8 = 0x59;
const PAM6: u8 = 0x5F;

#[derive(Serialize, Deserialize)]
struct Saved {
    pci: PciSaved,
}

/// The host bridge, PCI 00:00.0.
pub struct HostBridge {
    pci: PciFunction,
}

impl Default for HostBridge {
    fn default() -> Self {
        let mut pci = PciFunction::new(
            0,
            PciId {
                vendor: 0x8086,
                device: 0x1237,
                revision: 2,
                class: 0x06_0000,
                subsystem_vendor: 0x1AF4,
                subsystem: 0x1100,
            },
        );
        pci.allow(0x50, &[0xFF; 0x30]);
        pci.set8(0x72, 0x02);
        pci.seal();
        HostBridge { pci }
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
        set(0xF_0000, 0x1_0000, self.pci.get8(usize::from(PAM0)) >> 4);
        for i in 0..12u64 {
            let reg = self.pci.get8(usize::from(PAM0) + 1 + (i / 2) as usize);
            set(0xC_0000 + i * 0x4000, 0x4000, reg >> (4 * (i & 1)));
        }
    }
}

impl Device for HostBridge {
    fn name(&self) -> &str {
        "i440FX"
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
        if offset <= PAM6 && offset.saturating_add(len) > PAM0 {
            self.apply(ctx);
        }
    }
    fn save(&self) -> Vec<u8> {
        pack(&Saved { pci: self.pci.save() })
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let s: Saved = unpack("i440FX", data)?;
        if !self.pci.load(s.pci) {
            return Err(DeviceError::Misfit("i440FX".into()));
        }
        Ok(())
    }
}
