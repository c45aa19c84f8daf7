//! Near branches, SETcc, LOOP, PAUSE.

use super::access::canonical;
use super::alu::read_rm;
use super::op::*;
use super::SoftCpu;

impl SoftCpu {
    /// RIP of the next instruction.
    #[inline(always)]
    pub(crate) fn next_ip(&self, op: &Op) -> u64 {
        self.st.gpr[17].wrapping_add(op.off as u64 + op.len as u64) & self.ip_mask
    }

    /// Jump to a near target with its checks.
    #[inline(always)]
    pub(crate) fn jump(&mut self, op: &Op, target: u64) -> R<()> {
        let t = match op.osz {
            2 => target & 0xFFFF,
            4 => target & 0xFFFF_FFFF,
            _ => {
                if !canonical(target) {
                    return self.gp(0);
                }
                self.rip = target;
                return Ok(());
            }
        };
        if t > self.segs[CS].limit as u64 {
            return self.gp(0);
        }
        self.rip = t;
        Ok(())
    }
}

fn jcc64<const C: u8>(c: &mut SoftCpu, op: &Op) -> R<()> {
    if c.cond::<C>() {
        let t = c.next_ip(op).wrapping_add(op.imm);
        if !canonical(t) {
            return c.gp(0);
        }
        c.rip = t;
    }
    Ok(())
}
fn jcc<const C: u8>(c: &mut SoftCpu, op: &Op) -> R<()> {
    if c.cond::<C>() {
        let t = c.next_ip(op).wrapping_add(op.imm);
        return c.jump(op, t);
    }
    Ok(())
}
fn setcc<const C: u8>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = c.cond::<C>() as u64;
    if op.kind == K_REG {
        c.set::<u8>(op.rm, v);
        return Ok(());
    }
    let lin = c.ea(op, 1, true)?;
    c.wr::<u8>(lin, v)
}
macro_rules! sixteen {
    ($f:ident) => { sixteen!($f 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15) };
    ($f:ident $($c:literal)*) => { [$($f::<$c>),*] };
}
pub static JCC64: [Handler; 16] = sixteen!(jcc64);
pub static JCC: [Handler; 16] = sixteen!(jcc);
pub static SETCC: [Handler; 16] = sixteen!(setcc);

pub fn jmp64(c: &mut SoftCpu, op: &Op) -> R<()> {
    let t = c.next_ip(op).wrapping_add(op.imm);
    if !canonical(t) {
        return c.gp(0);
    }
    c.rip = t;
    Ok(())
}
pub fn jmp(c: &mut SoftCpu, op: &Op) -> R<()> {
    let t = c.next_ip(op).wrapping_add(op.imm);
    c.jump(op, t)
}
pub fn call64(c: &mut SoftCpu, op: &Op) -> R<()> {
    let next = c.next_ip(op);
    let t = next.wrapping_add(op.imm);
    if !canonical(t) {
        return c.gp(0);
    }
    c.push::<u64>(next)?;
    c.rip = t;
    Ok(())
}
/// Call a near target: the jump's checks come first, so that a fault leaves the stack alone.
fn call_to(c: &mut SoftCpu, op: &Op, t: u64) -> R<()> {
    let next = c.next_ip(op);
    let fall = c.rip;
    c.jump(op, t)?;
    if let Err(f) = c.push_sz(op.osz, next) {
        c.rip = fall;
        return Err(f);
    }
    Ok(())
}
pub fn call(c: &mut SoftCpu, op: &Op) -> R<()> {
    let t = c.next_ip(op).wrapping_add(op.imm);
    call_to(c, op, t)
}
fn target(c: &mut SoftCpu, op: &Op) -> R<u64> {
    match op.osz {
        2 => read_rm::<u16>(c, op),
        4 => read_rm::<u32>(c, op),
        _ => read_rm::<u64>(c, op),
    }
}
pub fn call_rm(c: &mut SoftCpu, op: &Op) -> R<()> {
    let t = target(c, op)?;
    call_to(c, op, t)
}
pub fn jmp_rm(c: &mut SoftCpu, op: &Op) -> R<()> {
    let t = target(c, op)?;
    c.jump(op, t)
}
pub fn ret(c: &mut SoftCpu, op: &Op) -> R<()> {
    let t = c.peek_sz(0, op.osz)?;
    c.jump(op, t)?;
    c.add_sp(op.osz as u64 + op.imm);
    Ok(())
}
/// LOOPNE, LOOPE, LOOP, JCXZ: the count is as wide as the address size.
pub fn loops(c: &mut SoftCpu, op: &Op) -> R<()> {
    let mut n = c.get_sz(1, op.asz);
    let taken = if op.opcode == 0xE3 {
        n == 0
    } else {
        n = n.wrapping_sub(1) & (u64::MAX >> (64 - 8 * op.asz as u32));
        n != 0
            && match op.opcode {
                0xE0 => !c.zf(),
                0xE1 => c.zf(),
                _ => true,
            }
    };
    if taken {
        let t = c.next_ip(op).wrapping_add(op.imm);
        c.jump(op, t)?;
    }
    if op.opcode != 0xE3 {
        c.set_sz(1, op.asz, n);
    }
    Ok(())
}
pub fn pause(c: &mut SoftCpu, _: &Op) -> R<()> {
    // Nobody else to run on a machine with one processor.
    if c.cpus > 1 {
        c.paused = true;
        c.attend();
    }
    Ok(())
}
