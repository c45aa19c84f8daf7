//! Doorbells of the machine's devices, where the guest sees them.

use ftvm_accel::kvm::{Bell, BellPlace};
use ftvm_accel::GuestMemory;

use super::Pc;

impl Pc {
    /// Changes whenever the map of ports and memory does.
    pub fn map_version(&self) -> u64 {
        self.map_version
    }

    /// The doorbells that the guest can reach as things are mapped now. Their tokens are good for as long as the machine is.
    pub fn bells(&self) -> Vec<Bell> {
        let mut out = Vec::new();
        for (device, model) in self.devices.iter().enumerate() {
            for (n, bell) in model.doorbells().iter().enumerate() {
                let token = (device as u64) << 32 | n as u64;
                let own = |m: &&super::Mapped| usize::from(m.device) == device && m.region == bell.region;
                // Where windows overlap, somebody else's answers.
                let place = match bell.value {
                    Some(value) => self.port_maps.iter().find(own).and_then(|m| {
                        let port = (m.start + bell.offset) as u16;
                        let answers = self.port_maps.get(usize::from(self.ports[usize::from(port)]));
                        answers.filter(own).map(|_| BellPlace::Port(port, value))
                    }),
                    None => self.memory_maps.iter().find(own).and_then(|m| {
                        let address = m.start + bell.offset;
                        self.memory_target(address).as_ref().filter(own).map(|_| BellPlace::Memory(address))
                    }),
                };
                out.extend(place.map(|place| Bell { place, token }));
            }
        }
        out
    }

    /// The guest wrote where the bell of this token is, or was a moment ago.
    pub fn ring(&mut self, mem: &GuestMemory, now_ns: u64, token: u64) {
        self.with(mem, now_ns, (token >> 32) as u16, |d, ctx| d.ring(ctx, token as u32 as usize));
    }
}
