//! What a debugger does with a machine: it looks, sets points to stop at, steps, and changes what is not the business of
//! the input door only where nobody logs.

use ftvm_accel::debug::{self, Watch};
use ftvm_accel::tcg::registers::View;
use ftvm_accel::{DebugHit, DebugPoints};

use super::Machine;

/// Where a debugger stopped the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugStop {
    /// The processor concerned.
    pub cpu: usize,
    pub reason: Reason,
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The processor executed the one instruction that was asked for.
    Step,
    /// It is about to execute the instruction at this linear address.
    Break(u64),
    /// Its last instruction accessed these bytes. (Where a replay goes back, its next one will.)
    Watch(Watch),
    /// The start of a recording, and its end.
    Begin,
    End,
}

impl From<DebugHit> for Reason {
    fn from(hit: DebugHit) -> Reason {
        match hit {
            DebugHit::Break(at) => Reason::Break(at),
            DebugHit::Watch(watch) => Reason::Watch(watch),
        }
    }
}

impl Machine {
    /// Stop at these points from now on; `None`: there is no debugger any more. False: a processor cannot do this.
    pub fn set_debug(&mut self, points: Option<&DebugPoints>) -> bool {
        self.still();
        if points.is_none() {
            self.step = None;
        }
        self.cpus.iter_mut().all(|cpu| cpu.set_debug(points))
    }

    /// Stop when this processor has executed one more instruction. (Others take their turns meanwhile.)
    pub fn set_step(&mut self, cpu: Option<usize>) {
        self.step = cpu;
        if self.is_hardware() {
            self.step_hardware(cpu);
        }
    }

    /// The processor whose turn it is.
    pub fn current_cpu(&self) -> usize {
        self.schedule.current as usize
    }

    /// The registers of one processor.
    pub fn view(&self, cpu: usize) -> Option<View> {
        self.cpus.get(cpu)?.view()
    }

    /// Replace them, from outside of the input door. False: this cannot be done.
    pub fn set_view(&mut self, cpu: usize, view: &View) -> bool {
        self.cpus.get_mut(cpu).is_some_and(|c| c.set_view(view))
    }

    /// Read memory by the linear addresses of a processor, or by physical ones. Returns how many bytes could be read.
    pub fn read_as(&self, cpu: Option<usize>, start: u64, out: &mut [u8]) -> usize {
        let view = cpu.and_then(|n| self.view(n));
        if cpu.is_some() && view.is_none() {
            return 0;
        }
        debug::read(view.as_ref(), &self.mem, start, out)
    }

    /// Write RAM, from outside of the input door; see [`Self::read_as`]. All is written, or nothing.
    pub fn write_as(&mut self, cpu: Option<usize>, start: u64, data: &[u8]) -> bool {
        let view = cpu.and_then(|n| self.view(n));
        (cpu.is_none() || view.is_some()) && debug::write(view.as_ref(), &self.mem, start, data)
    }
}
