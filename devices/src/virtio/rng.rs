//! The entropy device (section 5.4): random numbers of the machine's own generator.

use super::{scatter, total, Io, Model};
use crate::ctx::DeviceError;

/// Bytes given for one request at most.
const LIMIT: u64 = 4096;

/// The device; it has no state.
pub struct Rng;

impl Model for Rng {
    fn kind(&self) -> u16 {
        4
    }
    fn class(&self) -> u32 {
        0x00_FF00
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &[8]
    }
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
    fn reset(&mut self) {}
    fn notify(&mut self, io: &mut Io, queue: usize) {
        let ram = io.ram();
        while let Some(chain) = io.queues[queue].pop(ram) {
            let n = total(&chain.writable).min(LIMIT) as usize;
            let mut data = Vec::with_capacity(n + 8);
            while data.len() < n {
                data.extend(io.ctx.random().to_le_bytes());
            }
            data.truncate(n);
            scatter(io.ctx, &chain.writable, 0, &data);
            io.queues[queue].push(ram, chain.head, n as u32);
        }
        io.queues[queue].rearm(ram);
    }
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }
    fn load(&mut self, _name: &str, _data: &[u8]) -> Result<(), DeviceError> {
        Ok(())
    }
}
