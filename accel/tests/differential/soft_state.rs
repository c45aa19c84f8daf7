//! Between FXSAVE images and the software processor's state.

use ftvm_accel::state::{CpuState, Vector, X87};

use super::case::Regs;

pub fn load(s: &mut CpuState, r: &Regs) {
    s.gpr[..16].copy_from_slice(&r.gpr);
    let fsw = r.word(2);
    s.x87 = X87 {
        fcw: r.word(0),
        fsw: fsw & !0x3800,
        top: (fsw >> 11 & 7) as u8,
        tag: r.fx[4],
        ..X87::default()
    };
    for i in 0..8 {
        let st = &mut s.x87.st[(i + s.x87.top as usize) & 7];
        st[..10].copy_from_slice(&r.fx[32 + i * 16..42 + i * 16]);
    }
    s.vector = Vector::default();
    s.vector.mxcsr = r.mxcsr();
    for i in 0..16 {
        s.vector.ymm[i][..16].copy_from_slice(&r.fx[160 + i * 16..176 + i * 16]);
        s.vector.ymm[i][16..].copy_from_slice(&r.high[i * 16..i * 16 + 16]);
    }
}

pub fn store(s: &CpuState, r: &mut Regs) {
    r.gpr.copy_from_slice(&s.gpr[..16]);
    r.fx = [0; 512];
    let x = &s.x87;
    r.fx[0..2].copy_from_slice(&x.fcw.to_le_bytes());
    r.fx[2..4].copy_from_slice(&(x.fsw | u16::from(x.top) << 11).to_le_bytes());
    r.fx[4] = x.tag;
    r.fx[24..28].copy_from_slice(&s.vector.mxcsr.to_le_bytes());
    for i in 0..8 {
        r.fx[32 + i * 16..42 + i * 16].copy_from_slice(&x.st[(i + x.top as usize) & 7][..10]);
    }
    for i in 0..16 {
        r.fx[160 + i * 16..176 + i * 16].copy_from_slice(&s.vector.ymm[i][..16]);
        r.high[i * 16..i * 16 + 16].copy_from_slice(&s.vector.ymm[i][16..]);
    }
}
