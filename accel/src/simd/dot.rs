//! Which NaN a dot product gives. DPPS and DPPD add several products, and where more than one of the terms is a NaN, the manuals do
//! not say whose payload comes out; processors differ, even between the elements of one result. Here it is the
//! one of (0 + 1) + (2 + 3), each addition and multiplication by the rule of ADDPS and MULPS: the first operand's.

use super::host::{routines, Routine};
use super::{Map, Prefix, VecInsn};

/// Whether an instruction is DPPS, DPPD or VDPPS, VDPPD.
pub(super) fn is_dot(insn: &VecInsn) -> bool {
    insn.map == Map::M0F3A && matches!(insn.opcode, 0x40 | 0x41)
}

fn nan(v: &[u8], double: bool) -> bool {
    match *v {
        [a, b, c, d, e, f, g, h, ..] if double => f64::from_le_bytes([a, b, c, d, e, f, g, h]).is_nan(),
        [a, b, c, d, ..] => f32::from_le_bytes([a, b, c, d]).is_nan(),
        _ => false,
    }
}

/// `a` = `a` op `b` under `mxcsr` with its exceptions masked; their flags are of no interest.
fn run(routine: Routine, mxcsr: u32, a: &mut [u8; 16], b: &mut [u8; 16]) {
    let mut context = [mxcsr & 0xFFC0 | 0x1F80, 0];
    // SAFETY: the routine reads and writes 16 bytes at most at the operands and 8 at the context.
    unsafe { routine(a.as_mut_ptr(), b.as_mut_ptr(), context.as_mut_ptr().cast()) };
}

/// Give a result of the host's dot product of `a` and `b` (128 bits of each) the NaN that the rule above says.
pub(super) fn settle_nan(insn: &VecInsn, mxcsr: u32, a: &[u8; 16], b: &[u8; 16], result: &mut [u8]) {
    let double = insn.opcode == 0x41;
    let (size, count, prefix) = if double { (8, 2, Prefix::P66) } else { (4, 4, Prefix::None) };
    let place = |lane: usize| lane * size..(lane + 1) * size;
    if !(0..count).any(|lane| nan(&result[place(lane)], double)) {
        return;
    }
    let get = |opcode| routines().and_then(|r| r.get(Map::M0F, prefix, opcode, 0));
    let (Some(multiply), Some(add)) = (get(0x59), get(0x58)) else { return };
    let (mut terms, mut b) = (*a, *b);
    run(multiply, mxcsr, &mut terms, &mut b);
    (0..count).filter(|lane| insn.imm >> (4 + lane) & 1 == 0).for_each(|lane| terms[place(lane)].fill(0));
    // The even terms and the odd ones, then the two sums.
    let (mut even, mut odd) = ([0; 16], [0; 16]);
    for lane in 0..count {
        let to = if lane & 1 == 0 { &mut even } else { &mut odd };
        to[place(lane / 2)].copy_from_slice(&terms[place(lane)]);
    }
    run(add, mxcsr, &mut even, &mut odd);
    let mut sum = even;
    if !double {
        let mut high = [0; 16];
        high[place(0)].copy_from_slice(&even[place(1)]);
        run(add, mxcsr, &mut sum, &mut high);
    }
    for lane in (0..count).filter(|lane| insn.imm >> lane & 1 != 0) {
        result[place(lane)].copy_from_slice(&sum[place(0)]);
    }
}
