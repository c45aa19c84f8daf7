//! Every choice made where the architecture leaves flags or results undefined, so that all hosts and
//! all tiers agree.
//!
//! - MUL, IMUL: SF, PF from the low half of the result as Intel's processors do, ZF = 0... see
//!   [`mul_flags`]; AF = 0.
//! - DIV, IDIV: all flags keep their values (as AMD's and recent Intel processors do).
//! - AAA, AAS: OF = 0; SF, ZF, PF from AL. AAM, AAD: OF = AF = CF = 0. DAA, DAS: OF = 0.
//! - Shifts: AF = 0; SHL: OF = CF xor top bit of the result for every count; SHR: OF = the top bit before the
//!   last single step; SAR: OF = 0; a count past the width shifts in zeros (sign bits) to the end and CF
//!   is the last bit shifted out, 0 past the width of SHL and SHR.
//! - Rotates: OF as for a count of 1 applied to the result, for every count that is not zero.
//! - SHLD, SHRD: OF = top bit changed by the last step's result; AF = 0; 16-bit counts above 16 rotate on
//!   through the first operand again, as Intel's processors do.
//! - BSF, BSR of zero leave the destination as it is (a 32-bit one too: its upper half is kept) and set ZF;
//!   CF, OF, AF, SF = 0 and PF as of the source.
//! - BT, BTS, BTR, BTC: OF, SF, AF, PF, ZF keep their values.
//! - LZCNT, TZCNT: OF, SF, AF, PF = 0. POPCNT: all but ZF = 0 (defined).
//! - BEXTR, BZHI, BLSx: SF where undefined from the result, AF = PF = 0.
//! - AND, OR, XOR, TEST: AF = 0.
//! - BSWAP of a 16-bit register clears it.

use super::op::Int;
use super::SoftCpu;

/// CF = OF = the result did not fit; SF, ZF, PF from the low half; AF = 0.
#[inline(always)]
pub fn mul_flags<T: Int>(c: &mut SoftCpu, low: u64, over: bool) {
    c.set_res_co::<T>(low, over, over);
}

/// AAA and AAS: AF = CF = adjusted; OF = 0; the rest from AL.
pub fn ascii_flags(c: &mut SoftCpu, al: u8, adjusted: bool) {
    c.set_res_co::<u8>(al as u64, adjusted, false);
    if adjusted {
        c.f_aux |= 8;
    }
}
