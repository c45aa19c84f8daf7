//! The XSAVE area (SDM vol. 1, section 13.4) in its standard form.

use crate::tcg::save::Saved;

const FCW: usize = 0;
const FSW: usize = 2;
const TAG: usize = 4;
const FOP: usize = 6;
const FIP: usize = 8;
const FDP: usize = 16;
const MXCSR: usize = 24;
const MXCSR_MASK: usize = 28;
const ST: usize = 32;
const XMM: usize = 160;
const XSTATE_BV: usize = 512;
const YMM: usize = 576;

fn put<const N: usize>(area: &mut [u8; 4096], at: usize, bytes: [u8; N]) {
    area[at..at + N].copy_from_slice(&bytes);
}

fn get<const N: usize>(area: &[u8; 4096], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&area[at..at + N]);
    bytes
}

/// The area of a state.
pub fn from_saved(s: &Saved) -> Box<[u8; 4096]> {
    let mut a = Box::new([0u8; 4096]);
    if let Some(whole) = s.extra.xsave.as_ref().filter(|x| x.len() == a.len()) {
        a.copy_from_slice(whole);
        return a;
    }
    let [fcw, fsw, fop, ..] = s.fpu;
    put(&mut a, FCW, fcw.to_le_bytes());
    put(&mut a, FSW, (fsw & !0x3800 | u16::from(s.top & 7) << 11).to_le_bytes());
    a[TAG] = s.tag;
    put(&mut a, FOP, fop.to_le_bytes());
    put(&mut a, FIP, s.fip.to_le_bytes());
    put(&mut a, FDP, s.fdp.to_le_bytes());
    put(&mut a, MXCSR, s.mxcsr.to_le_bytes());
    put(&mut a, MXCSR_MASK, 0xFFFFu32.to_le_bytes());
    for i in 0..8 {
        let mut image = s.st[(usize::from(s.top) + i) & 7];
        image[10..].fill(0);
        put(&mut a, ST + 16 * i, image);
    }
    let mut components = 3u64;
    for (i, ymm) in s.ymm.iter().enumerate() {
        let (low, high) = ymm.split_at(16);
        a[XMM + 16 * i..][..16].copy_from_slice(low);
        a[YMM + 16 * i..][..16].copy_from_slice(high);
        if high.iter().any(|b| *b != 0) {
            components |= 4;
        }
    }
    put(&mut a, XSTATE_BV, components.to_le_bytes());
    a
}

/// See [`from_saved`]. The area has no selectors of the last x87 instruction: they stay as they were as long as its
/// address does.
pub fn to_saved(a: &[u8; 4096], s: &mut Saved) {
    let fsw = u16::from_le_bytes(get(a, FSW));
    let (fip, fdp) = (u64::from_le_bytes(get(a, FIP)), u64::from_le_bytes(get(a, FDP)));
    let (mut fcs, mut fds) = (s.fpu[3], s.fpu[4]);
    if fip != s.fip {
        fcs = 0;
    }
    if fdp != s.fdp {
        fds = 0;
    }
    let word = |at| u16::from_le_bytes(get(a, at));
    s.fpu = [word(FCW), fsw & !0x3800, word(FOP), fcs, fds];
    s.top = (fsw >> 11 & 7) as u8;
    s.tag = a[TAG];
    (s.fip, s.fdp) = (fip, fdp);
    s.mxcsr = u32::from_le_bytes(get(a, MXCSR));
    for i in 0..8 {
        let mut image: [u8; 16] = get(a, ST + 16 * i);
        image[10..].fill(0);
        s.st[(usize::from(s.top) + i) & 7] = image;
    }
    for (i, ymm) in s.ymm.iter_mut().enumerate() {
        ymm[..16].copy_from_slice(&a[XMM + 16 * i..][..16]);
        ymm[16..].copy_from_slice(&a[YMM + 16 * i..][..16]);
    }
}
