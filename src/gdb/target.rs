//! The machine as the `gdbstub` crate asks for it. Each question is put to the machine thread.

use std::sync::Arc;

use ftvm_accel::debug::Watch;
use ftvm_accel::tcg::registers::View;
use gdbstub::common::{Signal, Tid};
use gdbstub::outputln;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::reverse_exec::{ReverseCont, ReverseContOps, ReverseStep, ReverseStepOps};
use gdbstub::target::ext::base::single_register_access::{SingleRegisterAccess, SingleRegisterAccessOps};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint,
    SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};

use super::arch::{self, Number, RegisterBytes, X86_64};
use super::packets::{Modes, NO_IRQ, STEP};
use crate::monitor::Control;
use crate::runtime::debug::Go;
use crate::runtime::live::Runtime;

/// The program ended: there is no machine to ask any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the machine has ended")]
pub struct Gone;

const EFAULT: u8 = 14;
const EINVAL: u8 = 22;

/// What GDB is connected with.
pub struct Debuggee {
    control: Arc<Control>,
    pub modes: Modes,
    /// Processors.
    count: usize,
    /// It can go back.
    replays: bool,
    step: Option<usize>,
    /// The number of the run that the news are to be of.
    pub run: u64,
    /// Breakpoints that GDB calls hardware's.
    pub hard: Vec<u64>,
}

fn cpu(tid: Tid) -> usize {
    tid.get() - 1
}

/// A processor's thread.
pub fn thread(cpu: usize) -> Tid {
    Tid::MIN.saturating_add(cpu)
}

impl Debuggee {
    pub fn new(control: Arc<Control>) -> Result<Debuggee, Gone> {
        let look = |rt: &mut Runtime| (rt.machine.cpu_count(), rt.is_logged(), rt.replay.is_some());
        let (count, logged, replays) = control.machine(look).map_err(|_| Gone)?;
        let modes = Modes::new(logged);
        Ok(Debuggee { control, modes, count, replays, step: None, run: 0, hard: Vec::new() })
    }

    pub fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Runtime) -> T + Send + 'static,
    ) -> Result<T, Gone> {
        self.control.machine(work).map_err(|_| Gone)
    }

    fn view(&self, tid: Tid) -> TargetResult<View, Self> {
        let view = self.ask(move |rt| rt.machine.view(cpu(tid))).map_err(TargetError::Fatal)?;
        view.ok_or(TargetError::Errno(EINVAL))
    }

    /// Do what may be refused; the reason goes to the log, since the protocol has none.
    fn try_change(
        &self,
        work: impl FnOnce(&mut Runtime) -> Result<(), String> + Send + 'static,
    ) -> TargetResult<(), Self> {
        self.ask(work).map_err(TargetError::Fatal)?.map_err(|text| {
            log::warn!("gdb: {text}");
            TargetError::Errno(EFAULT)
        })
    }

    fn go(&mut self, go: Go) -> Result<(), Gone> {
        self.run = self.ask(move |rt| rt.debug_go(go))?;
        Ok(())
    }

    /// By which addresses memory is meant.
    fn space(&self, tid: Tid) -> Option<usize> {
        (!self.modes.physical).then(|| cpu(tid))
    }

    fn watch(&self, address: u64, len: u64, kind: WatchKind, add: bool) -> TargetResult<bool, Self> {
        let reads = matches!(kind, WatchKind::Read | WatchKind::ReadWrite);
        let writes = matches!(kind, WatchKind::Write | WatchKind::ReadWrite);
        let watch = Watch { start: address, len, reads, writes };
        if len == 0 {
            return Ok(false);
        }
        let work = move |rt: &mut Runtime| {
            let mut found = add;
            let can = rt.debug_points(|p| match p.watches.iter().position(|w| *w == watch) {
                _ if add => p.watches.push(watch),
                Some(at) => {
                    p.watches.remove(at);
                    found = true;
                }
                None => {}
            });
            found && can
        };
        self.ask(work).map_err(TargetError::Fatal)
    }

    fn set_break(&self, address: u64, add: bool) -> TargetResult<bool, Self> {
        let work = move |rt: &mut Runtime| {
            let mut found = true;
            let can = rt.debug_points(|p| match add {
                true => {
                    p.breaks.insert(address);
                }
                false => found = p.breaks.remove(&address),
            });
            found && can
        };
        self.ask(work).map_err(TargetError::Fatal)
    }
}

impl Target for Debuggee {
    type Arch = X86_64;
    type Error = Gone;

    fn base_ops(&mut self) -> BaseOps<'_, X86_64, Gone> {
        BaseOps::MultiThread(self)
    }
    fn guard_rail_implicit_sw_breakpoints(&self) -> bool {
        true
    }
    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Debuggee {
    fn read_registers(&mut self, regs: &mut RegisterBytes, tid: Tid) -> TargetResult<(), Self> {
        *regs = RegisterBytes::of(&self.view(tid)?);
        Ok(())
    }

    fn write_registers(&mut self, regs: &RegisterBytes, tid: Tid) -> TargetResult<(), Self> {
        let mut view = self.view(tid)?;
        if !regs.apply(&mut view) {
            return Err(TargetError::Errno(EINVAL));
        }
        self.try_change(move |rt| rt.debug_set_view(cpu(tid), &view))
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let (space, len) = (self.space(tid), data.len());
        let work = move |rt: &mut Runtime| {
            let mut bytes = vec![0; len];
            let n = rt.machine.read_as(space, start, &mut bytes);
            bytes.truncate(n);
            bytes
        };
        let bytes = self.ask(work).map_err(TargetError::Fatal)?;
        if bytes.is_empty() && len > 0 {
            return Err(TargetError::Errno(EFAULT));
        }
        data[..bytes.len()].copy_from_slice(&bytes);
        Ok(bytes.len())
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let (space, data) = (self.space(tid), data.to_vec());
        self.try_change(move |rt| rt.debug_write(space, start, &data))
    }

    fn list_active_threads(&mut self, each: &mut dyn FnMut(Tid)) -> Result<(), Gone> {
        (0..self.count).for_each(|n| each(thread(n)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl SingleRegisterAccess<Tid> for Debuggee {
    fn read_register(&mut self, tid: Tid, reg: Number, buf: &mut [u8]) -> TargetResult<usize, Self> {
        let (view, size) = (self.view(tid)?, reg.0.size());
        let out = buf.get_mut(..size).ok_or(TargetError::Errno(EINVAL))?;
        arch::read(&view, reg.0, out);
        Ok(size)
    }

    fn write_register(&mut self, tid: Tid, reg: Number, val: &[u8]) -> TargetResult<(), Self> {
        let mut view = self.view(tid)?;
        if !arch::write(&mut view, reg.0, val) {
            return Err(TargetError::Errno(EINVAL));
        }
        self.try_change(move |rt| rt.debug_set_view(cpu(tid), &view))
    }
}

impl ThreadExtraInfo for Debuggee {
    fn thread_extra_info(&self, tid: Tid, buf: &mut [u8]) -> Result<usize, Gone> {
        let halted = self.ask(move |rt| rt.machine.view(cpu(tid)).is_some_and(|v| v.registers.halted))?;
        let text = format!("CPU#{} [{}]", cpu(tid), if halted { "halted " } else { "running" });
        let n = text.len().min(buf.len());
        buf[..n].copy_from_slice(&text.as_bytes()[..n]);
        Ok(n)
    }
}

impl MultiThreadResume for Debuggee {
    fn resume(&mut self) -> Result<(), Gone> {
        let modes = self.modes;
        let go = match self.step.take().filter(|_| modes.step & STEP != 0) {
            Some(cpu) => Go::Step { cpu, hold_interrupts: modes.step & NO_IRQ != 0 },
            None => Go::On,
        };
        self.go(go)
    }

    fn clear_resume_actions(&mut self) -> Result<(), Gone> {
        self.step = None;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, _: Tid, _: Option<Signal>) -> Result<(), Gone> {
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_reverse_step(&mut self) -> Option<ReverseStepOps<'_, Tid, Self>> {
        match self.replays {
            true => Some(self),
            false => None,
        }
    }

    fn support_reverse_cont(&mut self) -> Option<ReverseContOps<'_, Tid, Self>> {
        match self.replays {
            true => Some(self),
            false => None,
        }
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl ReverseStep<Tid> for Debuggee {
    fn reverse_step(&mut self, tid: Tid) -> Result<(), Gone> {
        self.go(Go::StepBack { cpu: cpu(tid) })
    }
}

impl ReverseCont<Tid> for Debuggee {
    fn reverse_cont(&mut self) -> Result<(), Gone> {
        self.go(Go::Back)
    }
}

impl MultiThreadSingleStep for Debuggee {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Gone> {
        self.step = Some(cpu(tid));
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Debuggee {
    /// The other processors take their turns all the same: the schedule is part of the machine.
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Gone> {
        Ok(())
    }
}

impl Breakpoints for Debuggee {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }
    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }
    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Debuggee {
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.set_break(address, true)
    }
    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        if self.hard.contains(&address) {
            return Ok(true);
        }
        self.set_break(address, false)
    }
}

impl HwBreakpoint for Debuggee {
    fn add_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.hard.push(address);
        self.set_break(address, true)
    }
    fn remove_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.hard.retain(|a| *a != address);
        self.set_break(address, false)
    }
}

impl HwWatchpoint for Debuggee {
    fn add_hw_watchpoint(&mut self, address: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        self.watch(address, len, kind, true)
    }
    fn remove_hw_watchpoint(&mut self, address: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        self.watch(address, len, kind, false)
    }
}

impl MonitorCmd for Debuggee {
    fn handle_monitor_cmd(&mut self, line: &[u8], mut out: ConsoleOutput<'_>) -> Result<(), Gone> {
        let line = String::from_utf8_lossy(line);
        let answer = self.control.human(&line, &mut ftvm_qmp::Fds::default());
        for line in answer.replace("\r\n", "\n").lines() {
            outputln!(out, "{line}");
        }
        Ok(())
    }
}
