//! Tests of the x87 unit on the mock core.

use super::tests::Mock;
use super::x87::F80;
use super::*;

fn x87(opcode: u8, modrm: u8) -> VecInsn {
    let rm = if modrm < 0xC0 { Rm::Mem } else { Rm::Reg(modrm & 7) };
    VecInsn {
        map: Map::X87,
        prefix: Prefix::None,
        opcode,
        modrm,
        reg: modrm >> 3 & 7,
        rm,
        rex_w: false,
        long: true,
        opsize16: false,
        imm: 0,
        vex: None,
        host: None,
    }
}

fn push(m: &mut Mock, value: f64) {
    m.memory[..8].copy_from_slice(&value.to_le_bytes());
    m.run(x87(0xDD, 0x00)).unwrap();
}

fn pop(m: &mut Mock) -> f64 {
    m.run(x87(0xDD, 0x18)).unwrap();
    f64::from_le_bytes(m.memory[..8].try_into().unwrap())
}

#[test]
fn arithmetic_and_the_stack() {
    let mut m = Mock::new();
    push(&mut m, 3.0);
    push(&mut m, 0.5);
    m.run(x87(0xD8, 0xE1)).unwrap(); // fsub st0, st1
    assert_eq!(pop(&mut m), -2.5);
    push(&mut m, 12.0);
    m.run(x87(0xDE, 0xF9)).unwrap(); // fdivp st1, st0
    assert_eq!(pop(&mut m), 0.25);
    assert_eq!((m.state.x87.tag, m.state.x87.top, m.state.x87.fsw), (0, 0, 0));
    assert_eq!((m.state.x87.fop, m.state.x87.fip, m.state.x87.fcs), (0x518, 0x1234, 8));
}

#[test]
fn decimal_digits_count_up_to_fifteen() {
    let mut m = Mock::new();
    for (digits, value) in [
        ([0x67, 0x45, 0x23, 1, 0, 0, 0, 0, 0, 0], 1_234_567.0),
        ([0x99, 0x99, 0x99, 0x99, 0x99, 0x99, 0x99, 0, 0, 0x80], -99_999_999_999_999.0),
        ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0x80], -0.0),
        ([0xFA, 0x1F, 0, 0, 0, 0, 0, 0, 0, 0x7F], 2_660.0),
    ] {
        m.memory[..10].copy_from_slice(&digits);
        m.run(x87(0xDF, 0x20)).unwrap();
        assert_eq!(m.state.x87.fsw, 0);
        assert_eq!(pop(&mut m).to_bits(), f64::to_bits(value), "{digits:x?}");
    }
    // All of them fifteen: exact in the register's 64 bits.
    m.memory[..10].copy_from_slice(&[0xFF; 10]);
    m.run(x87(0xDF, 0x20)).unwrap();
    let value = F80::of(&m.state.x87.st[m.state.x87.top as usize]);
    let sum = 15 * 111_111_111_111_111_111u64;
    assert_eq!(value, F80 { neg: true, exp: 16383 + 60, mant: sum << 3 });
}

#[test]
fn precision_control_rounds_and_its_reserved_value_is_extended() {
    let third = |fcw: u16| {
        let mut m = Mock::new();
        m.state.x87.fcw = fcw;
        push(&mut m, 3.0);
        push(&mut m, 1.0);
        m.run(x87(0xD8, 0xF1)).unwrap(); // fdiv st0, st1
        F80::of(&m.state.x87.st[m.state.x87.top as usize]).mant
    };
    assert_eq!(third(0x07F), 0xAAAA_AB00_0000_0000);
    assert_eq!(third(0x27F), 0xAAAA_AAAA_AAAA_A800);
    assert_eq!(third(0x37F), 0xAAAA_AAAA_AAAA_AAAB);
    assert_eq!(third(0x17F), third(0x37F));
}

#[test]
fn stack_faults_are_masked_or_pend() {
    let mut m = Mock::new();
    m.run(x87(0xD8, 0xC1)).unwrap();
    assert_eq!(m.state.x87.fsw, 0x41);
    assert!(pop(&mut m).is_nan());
    m.state.x87 = Default::default();
    for _ in 0..8 {
        push(&mut m, 1.0);
    }
    m.state.x87.fcw = 0x37E;
    m.run(x87(0xD9, 0xE8)).unwrap();
    assert_eq!(m.state.x87.fsw, 0x82C1);
    assert_eq!(m.run(x87(0xD9, 0xE8)), Err(Exception::MF));
    assert_eq!(x87_wait(&mut m), Err(Exception::MF));
    m.run(x87(0xDB, 0xE2)).unwrap();
    assert_eq!(x87_wait(&mut m), Ok(()));
    m.state.cr0 = 0xA;
    assert_eq!(x87_wait(&mut m), Err(Exception::NM));
}

#[test]
fn an_unmasked_divide_by_zero_leaves_the_operands() {
    let mut m = Mock::new();
    push(&mut m, 1.0);
    m.state.x87.fcw = 0x37B;
    m.memory[..8].copy_from_slice(&0.0f64.to_le_bytes());
    m.run(x87(0xDC, 0x30)).unwrap();
    assert_eq!(m.state.x87.fsw, 0x8084);
    m.run(x87(0xDB, 0xE2)).unwrap();
    assert_eq!(pop(&mut m), 1.0);
}

#[test]
fn a_faulting_store_changes_nothing() {
    let mut m = Mock::new();
    push(&mut m, 1.0);
    let before = m.state.clone();
    m.operand = 8190;
    assert!(m.run(x87(0xDD, 0x18)).is_err());
    assert!(m.run(x87(0xDB, 0x38)).is_err());
    assert!(m.run(x87(0xDD, 0x00)).is_err());
    assert!(m.run(x87(0xDD, 0x30)).is_err());
    assert_eq!(m.state, before);
}

#[test]
fn environments_come_back_in_both_sizes() {
    for opsize16 in [false, true] {
        let mut m = Mock::new();
        m.state.cr0 = 1;
        push(&mut m, 2.5);
        push(&mut m, -7.0);
        m.state.x87.fip = 0x1234;
        let saved = m.state.x87;
        let with = |i: VecInsn| VecInsn { opsize16, ..i };
        m.run(with(x87(0xDD, 0x30))).unwrap();
        assert_eq!((m.state.x87.fcw, m.state.x87.tag, m.state.x87.top), (0x37F, 0, 0));
        m.run(with(x87(0xDD, 0x20))).unwrap();
        let fop = if opsize16 { 0 } else { saved.fop };
        assert_eq!(m.state.x87, crate::state::X87 { fop, ..saved });
        m.run(with(x87(0xD9, 0x30))).unwrap();
        m.run(with(x87(0xD9, 0x20))).unwrap();
        assert_eq!(pop(&mut m), -7.0);
    }
}

#[test]
fn packed_decimal_and_integers() {
    let mut m = Mock::new();
    push(&mut m, -1234567.0);
    m.run(x87(0xDF, 0x30)).unwrap();
    assert_eq!(m.memory[..10], [0x67, 0x45, 0x23, 1, 0, 0, 0, 0, 0, 0x80]);
    m.run(x87(0xDF, 0x20)).unwrap();
    m.run(x87(0xDB, 0x08)).unwrap();
    assert_eq!(m.memory[..4], (-1234567i32).to_le_bytes());
}

#[test]
fn transcendental_functions() {
    let mut m = Mock::new();
    for v in [0.1f64, -0.7, 0.99, 1e-9] {
        push(&mut m, v);
        m.run(x87(0xD9, 0xF0)).unwrap();
        assert!((pop(&mut m) - (v * std::f64::consts::LN_2).exp_m1()).abs() < 5e-16);
        push(&mut m, v * 1e5);
        m.run(x87(0xD9, 0xFB)).unwrap();
        assert!((pop(&mut m) - (v * 1e5).cos()).abs() < 3e-16);
        assert!((pop(&mut m) - (v * 1e5).sin()).abs() < 3e-16);
        push(&mut m, v);
        push(&mut m, -2.0);
        m.run(x87(0xD9, 0xF3)).unwrap();
        assert!((pop(&mut m) - v.atan2(-2.0)).abs() < 5e-16);
        push(&mut m, 10.0);
        push(&mut m, v.abs());
        m.run(x87(0xD9, 0xF1)).unwrap();
        assert!((pop(&mut m) - 10.0 * v.abs().log2()).abs() < 1e-13);
    }
    push(&mut m, 0.0);
    push(&mut m, 8.0);
    m.state.x87.fsw = 0;
    push(&mut m, 3.0);
    m.run(x87(0xD9, 0xC9)).unwrap();
    m.run(x87(0xD9, 0xF1)).unwrap(); // 3 * log2(8), exact
    assert_eq!((pop(&mut m), m.state.x87.fsw & 0x3F), (9.0, 0));
}

/// Results fixed for every host: whatever computes them, these bits must come out.
#[test]
fn transcendental_bits_are_fixed() {
    let sin = |mant: u64, exp: u16| {
        let mut m = Mock::new();
        m.state.x87.tag = 1;
        m.state.x87.st[0] = F80 { neg: false, exp, mant }.image();
        m.run(x87(0xD9, 0xFE)).unwrap();
        F80::of(&m.state.x87.st[0])
    };
    // sin(1) = 0.84147098480789650665250232163029899962256306079837...
    assert_eq!(sin(1 << 63, 0x3FFF), F80 { neg: false, exp: 0x3FFE, mant: 0xD76A_A478_4867_7021 });
    // The 64-bit value nearest to pi: the sine is pi's error, -5.016557612668332e-20.
    let near_pi = sin(0xC90F_DAA2_2168_C235, 0x4000);
    assert!(near_pi.neg);
    assert_eq!(near_pi, F80 { neg: true, exp: 0x3FBE, mant: 0xECE6_75D1_FC8F_8CBB });
}
