//! Buffers of requests are used again: fresh memory for each large read costs more than the read itself.

use std::sync::Mutex;

/// Memory kept for reuse at the most.
const KEPT: usize = 64 << 20;
/// Smaller ones are not worth it.
const SMALLEST: usize = 16 << 10;

static FREE: Mutex<(usize, Vec<Vec<u8>>)> = Mutex::new((0, Vec::new()));

/// A buffer of `len` bytes with any contents: whoever takes it fills it.
pub fn take(len: usize) -> Vec<u8> {
    if len >= SMALLEST {
        if let Ok(mut free) = FREE.lock() {
            // The one given back last is warmest.
            if let Some(at) = free.1.iter().rposition(|b| b.capacity() >= len && b.capacity() / 2 <= len) {
                let mut buffer = free.1.swap_remove(at);
                free.0 -= buffer.capacity();
                buffer.resize(len, 0);
                return buffer;
            }
        }
    }
    vec![0; len]
}

/// Give a buffer back that is not needed any more.
pub fn give(buffer: Vec<u8>) {
    if buffer.capacity() < SMALLEST {
        return;
    }
    if let Ok(mut free) = FREE.lock() {
        if free.0 + buffer.capacity() <= KEPT {
            free.0 += buffer.capacity();
            free.1.push(buffer);
        }
    }
}
