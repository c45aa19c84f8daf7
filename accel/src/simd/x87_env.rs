//! FNSTENV, FLDENV, FNSAVE, FRSTOR in their 16-bit and 32-bit, real-mode and protected-mode layouts
//! (SDM vol. 1, figures 8-9 to 8-12).

use super::fxsave::{full_fsw, set_fcw, set_fsw, update_es};
use super::sse::Done;
use super::x87::{available, init, pending, F80};
use super::{Core, VecInsn};
use crate::state::{CpuState, X87};

const CR0_PE: u64 = 1;

/// The two-bit tags: 0 valid, 1 zero, 2 special, 3 empty.
fn full_tag(x: &X87) -> u16 {
    (0..8).fold(0, |tags, i| {
        let v = F80::of(&x.st[i]);
        let tag = if x.tag >> i & 1 == 0 {
            3
        } else if v.is_zero() {
            1
        } else if v.exp == 0 || v.exp == 0x7FFF || v.mant >> 63 == 0 {
            2
        } else {
            0
        };
        tags | tag << (i * 2)
    })
}

/// REX.W overrides an operand-size prefix.
fn short(insn: &VecInsn) -> bool {
    insn.opsize16 && !(insn.rex_w && insn.long)
}

fn size(insn: &VecInsn) -> usize {
    if short(insn) {
        14
    } else {
        28
    }
}

fn environment(s: &CpuState, insn: &VecInsn) -> [u8; 28] {
    let x = &s.x87;
    let real = s.cr0 & CR0_PE == 0;
    let (fip, fdp) = if real {
        // Real mode keeps linear addresses.
        ((u64::from(x.fcs) << 4).wrapping_add(x.fip), (u64::from(x.fds) << 4).wrapping_add(x.fdp))
    } else {
        (x.fip, x.fdp)
    };
    let (fip, fdp) = (fip as u32, fdp as u32);
    let fop = u32::from(x.fop & 0x7FF);
    let words: [u32; 7] = [x.fcw.into(), full_fsw(x).into(), full_tag(x).into(), 0, 0, 0, 0];
    let mut out = [0u8; 28];
    let words = match (real, short(insn)) {
        (false, false) => [
            words[0] | 0xFFFF_0000,
            words[1] | 0xFFFF_0000,
            words[2] | 0xFFFF_0000,
            fip,
            u32::from(x.fcs) | fop << 16,
            fdp,
            u32::from(x.fds) | 0xFFFF_0000,
        ],
        (false, true) => [words[0], words[1], words[2], fip, x.fcs.into(), fdp, x.fds.into()],
        (true, false) => [
            words[0] | 0xFFFF_0000,
            words[1] | 0xFFFF_0000,
            words[2] | 0xFFFF_0000,
            fip & 0xFFFF | 0xFFFF_0000,
            fop | fip >> 16 << 12,
            fdp & 0xFFFF | 0xFFFF_0000,
            fdp >> 16 << 12,
        ],
        (true, true) => {
            [words[0], words[1], words[2], fip, fop | (fip >> 16 & 15) << 12, fdp, (fdp >> 16 & 15) << 12]
        }
    };
    if short(insn) {
        for (o, w) in out.chunks_exact_mut(2).zip(words) {
            o.copy_from_slice(&(w as u16).to_le_bytes());
        }
    } else {
        for (o, w) in out.chunks_exact_mut(4).zip(words) {
            o.copy_from_slice(&w.to_le_bytes());
        }
    }
    out
}

fn set_environment(s: &mut CpuState, insn: &VecInsn, image: &[u8]) {
    let real = s.cr0 & CR0_PE == 0;
    let word = |i: usize| -> u32 {
        if short(insn) {
            u16::from_le_bytes([image[i * 2], image[i * 2 + 1]]).into()
        } else {
            u32::from_le_bytes([image[i * 4], image[i * 4 + 1], image[i * 4 + 2], image[i * 4 + 3]])
        }
    };
    let x = &mut s.x87;
    set_fcw(x, word(0) as u16);
    set_fsw(x, word(1) as u16);
    x.tag = (0..8).fold(0, |t, i| t | u8::from(word(2) >> (i * 2) & 3 != 3) << i);
    if real {
        let high = |w: u32| if short(insn) { w >> 12 & 15 } else { w >> 12 & 0xFFFF };
        x.fop = (word(4) & 0x7FF) as u16;
        x.fip = (word(3) & 0xFFFF | high(word(4)) << 16).into();
        x.fdp = (word(5) & 0xFFFF | high(word(6)) << 16).into();
        (x.fcs, x.fds) = (0, 0);
    } else {
        x.fip = word(3).into();
        x.fcs = word(4) as u16;
        x.fop = if short(insn) { 0 } else { (word(4) >> 16 & 0x7FF) as u16 };
        x.fdp = word(5).into();
        x.fds = word(6) as u16;
    }
    update_es(x);
}

/// FNSTENV: stores, then masks all exceptions.
pub(super) fn store_env<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    available(c)?;
    let image = environment(c.state(), insn);
    c.write(0, &image[..size(insn)])?;
    let x = &mut c.state().x87;
    x.fcw |= 0x3F;
    update_es(x);
    Ok(())
}

/// FLDENV
pub(super) fn load_env<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    available(c)?;
    pending(c)?;
    let mut image = [0; 28];
    c.read(0, &mut image[..size(insn)])?;
    set_environment(c.state(), insn, &image);
    Ok(())
}

/// FNSAVE: environment and registers, then FNINIT.
pub(super) fn save<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    available(c)?;
    let env = size(insn);
    let mut image = [0u8; 108];
    let s = c.state();
    image[..env].copy_from_slice(&environment(s, insn)[..env]);
    for i in 0..8 {
        let at = env + i * 10;
        image[at..at + 10].copy_from_slice(&s.x87.st[(i + s.x87.top as usize) & 7][..10]);
    }
    c.write(0, &image[..env + 80])?;
    init(c.state());
    Ok(())
}

/// FRSTOR
pub(super) fn restore<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    available(c)?;
    pending(c)?;
    let env = size(insn);
    let mut image = [0u8; 108];
    c.read(0, &mut image[..env + 80])?;
    let s = c.state();
    set_environment(s, insn, &image[..env]);
    for i in 0..8 {
        let at = env + i * 10;
        let r = &mut s.x87.st[(i + s.x87.top as usize) & 7];
        r[..10].copy_from_slice(&image[at..at + 10]);
    }
    Ok(())
}
