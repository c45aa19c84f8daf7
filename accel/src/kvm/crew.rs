//! The processors' threads: running, standing still, and what an exit has to do besides.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::bells::Bells;
use super::desk::{Board, Desk};
use super::points::DebugExit;
use super::vcpu::{Entry, Vcpu};
use super::vm::Vm;
use super::KvmError;
use crate::debug::DebugHit;

/// How long to wait for a processor that was told to stop before it is told again.
const PATIENCE: Duration = Duration::from_millis(2);

/// What the machine thread has to deal with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// A triple fault: the machine resets.
    Shutdown,
    /// A processor cannot go on.
    Failed(String),
    /// A processor stopped for the debugger; `None`: behind its step.
    Debug(u32, Option<DebugHit>),
}

/// A processor's place: its thread has the state while it runs, the machine thread while it stands still.
pub struct Seat {
    pub index: u32,
    pub vcpu: Mutex<Vcpu>,
    immediate_exit: AtomicPtr<u8>,
    thread: AtomicI32,
}

impl Seat {
    /// For a processor that no thread runs yet.
    pub fn new(index: u32, mut vcpu: Vcpu) -> Seat {
        let flag = vcpu.immediate_exit();
        Seat {
            index,
            vcpu: Mutex::new(vcpu),
            immediate_exit: AtomicPtr::new(flag),
            thread: AtomicI32::new(0),
        }
    }

    /// The processor.
    pub fn vcpu(&self) -> MutexGuard<'_, Vcpu> {
        self.vcpu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The id of its thread.
    pub fn thread(&self) -> i32 {
        self.thread.load(Ordering::Acquire)
    }

    fn flag(&self) -> &AtomicU8 {
        // SAFETY: a byte in the mapping that the processor's handle keeps, which lives as long as the seat. The
        // kernel and the processor's thread look at it; all of this program's accesses while it may be shared are
        // atomic.
        unsafe { AtomicU8::from_ptr(self.immediate_exit.load(Ordering::Relaxed)) }
    }

    /// Make it leave the guest, or not enter it. Whatever it is to see then has been set before.
    fn kick(&self) {
        self.flag().store(1, Ordering::SeqCst);
        let thread = self.thread();
        if thread != 0 {
            // SAFETY: numbers only. The thread lives as long as the seat is in use, and its handler does nothing.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
        }
    }
}

/// The signal that takes a thread out of KVM_RUN.
fn signal() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn nothing(_: i32) {}

/// Let [`signal`] interrupt system calls, in all threads.
fn install_handler() -> std::io::Result<()> {
    // SAFETY: the action is complete: a handler that does nothing, no flags (so calls are not restarted).
    let done = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(i32) as usize;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(signal(), &action, std::ptr::null_mut())
    };
    if done != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

/// This thread takes no other signal: those are for the program's other threads.
fn mask_signals() {
    // SAFETY: sets that live across the calls.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::sigdelset(&mut all, signal());
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
    }
}

#[derive(Default)]
struct Gate {
    running: bool,
    parked: usize,
    quit: bool,
    trouble: Option<Trouble>,
}

/// What the threads share.
pub struct Crew {
    pub vm: Vm,
    bells: Bells,
    desk: Desk,
    gate: Mutex<Gate>,
    moved: Condvar,
    running: AtomicBool,
    /// The 8259s' INTR line when it was last looked at.
    intr: AtomicBool,
    woken: AtomicBool,
    wake: Box<dyn Fn() + Send + Sync>,
    seats: Vec<Arc<Seat>>,
}

impl Crew {
    /// Processors that stand still. `wake` makes the machine thread look at [`Self::trouble`] and its devices.
    pub fn new(
        vm: Vm,
        seats: Vec<Arc<Seat>>,
        wake: Box<dyn Fn() + Send + Sync>,
    ) -> Result<Arc<Crew>, KvmError> {
        let crew = Crew {
            vm,
            bells: Bells::new()?,
            desk: Desk::default(),
            gate: Mutex::default(),
            moved: Condvar::new(),
            running: AtomicBool::new(false),
            intr: AtomicBool::new(false),
            woken: AtomicBool::new(false),
            wake,
            seats,
        };
        Ok(Arc::new(crew))
    }

    /// Start the threads.
    pub fn start(self: &Arc<Self>) -> Result<Vec<std::thread::JoinHandle<()>>, KvmError> {
        install_handler().map_err(KvmError::io("sigaction"))?;
        let mut threads = Vec::new();
        for seat in &self.seats {
            let (crew, own) = (Arc::clone(self), Arc::clone(seat));
            let thread = std::thread::Builder::new()
                .name(format!("CPU {}/KVM", seat.index))
                .spawn(move || crew.thread(&own))
                .map_err(KvmError::io("a processor's thread"))?;
            threads.push(thread);
        }
        let crew = Arc::clone(self);
        let ringer = std::thread::Builder::new()
            .name("doorbells".into())
            .spawn(move || crew.answer())
            .map_err(KvmError::io("the doorbells' thread"))?;
        threads.push(ringer);
        // Until they are here, they cannot be told anything.
        let mut gate = self.gate();
        while gate.parked < self.seats.len() {
            gate = self.moved.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(threads)
    }

    /// The processors.
    pub fn seats(&self) -> &[Arc<Seat>] {
        &self.seats
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- the processors' side

    /// Whether the 8259s ask for an interrupt.
    pub fn intr(&self) -> bool {
        self.intr.load(Ordering::SeqCst)
    }

    /// Use the board, and see to what that leads to. `None`: the machine is at its end.
    pub fn with<T>(&self, work: impl FnOnce(&mut dyn Board) -> T) -> Option<T> {
        self.desk.with(|board, until| {
            let result = work(board);
            let earlier = board.next_deadline().is_some_and(|d| until.is_none_or(|until| d < until));
            if let Err(e) = self.deliver(board) {
                self.complain(Trouble::Failed(e.to_string()));
            }
            if earlier || board.has_news() {
                self.wake();
            }
            result
        })
    }

    /// The I/O APIC's entries may have changed.
    pub fn set_pins(&self, board: &mut dyn Board) {
        if let Err(e) = self.vm.set_pins(board.level_pins()) {
            self.complain(Trouble::Failed(e.to_string()));
        }
    }

    fn wake(&self) {
        if !self.woken.swap(true, Ordering::SeqCst) {
            (self.wake)();
        }
    }

    fn complain(&self, trouble: Trouble) {
        self.gate().trouble.get_or_insert(trouble);
        self.wake();
    }

    /// Interrupt messages to the APICs, INTR to the boot processor, a changed map of memory to KVM.
    pub fn deliver(&self, board: &mut dyn Board) -> Result<(), KvmError> {
        for message in board.take_messages() {
            self.vm.send(message)?;
        }
        self.vm.map(board.memory())?;
        let bells = board.bells_version();
        if !self.bells.is_current(bells) {
            self.bells.hang(self.vm.fd(), bells, &board.bells())?;
        }
        let intr = board.intr();
        if intr != self.intr.swap(intr, Ordering::SeqCst) && intr {
            if let Some(boot) = self.seats.first() {
                boot.kick();
            }
        }
        Ok(())
    }

    /// Tell devices of their doorbells.
    fn answer(&self) {
        mask_signals();
        let closed = || self.gate().quit;
        self.bells.hear(closed, |rung| {
            self.with(|board| rung.iter().for_each(|token| board.ring(*token)));
        });
    }

    fn thread(&self, seat: &Seat) {
        mask_signals();
        // SAFETY: no arguments.
        seat.thread.store(unsafe { libc::gettid() }, Ordering::Release);
        loop {
            {
                let mut gate = self.gate();
                gate.parked += 1;
                self.moved.notify_all();
                while !gate.running && !gate.quit {
                    gate = self.moved.wait(gate).unwrap_or_else(PoisonError::into_inner);
                }
                if gate.quit {
                    return;
                }
                gate.parked -= 1;
            }
            let mut vcpu = seat.vcpu();
            if let Some(trouble) = self.run(seat, &mut vcpu) {
                self.complain(trouble);
                let mut gate = self.gate();
                while gate.running && !gate.quit {
                    gate = self.moved.wait(gate).unwrap_or_else(PoisonError::into_inner);
                }
            } else if let Err(e) = self.come_to_rest(seat, &mut vcpu) {
                self.complain(Trouble::Failed(e.to_string()));
            }
        }
    }

    /// Run until the processors are to stand still.
    fn run(&self, seat: &Seat, vcpu: &mut Vcpu) -> Option<Trouble> {
        loop {
            // In this order: what is set before a kick is seen here, or else the kick ends the entry.
            seat.flag().store(0, Ordering::SeqCst);
            if !self.running.load(Ordering::SeqCst) {
                return None;
            }
            if let Err(e) = vcpu.offer_interrupt(self) {
                return Some(Trouble::Failed(e.to_string()));
            }
            let entry = match vcpu.steps() {
                Ok(false) => Ok(vcpu.enter(self)),
                Ok(true) => vcpu.step(self, &|| self.running.load(Ordering::SeqCst)),
                Err(e) => Err(e),
            };
            let entry = entry.unwrap_or_else(|e| Entry::Failed(e.to_string()));
            match self.debugged(seat, vcpu, entry) {
                Entry::Again | Entry::Stepped => {}
                Entry::Debug(_) => return None,
                Entry::Shutdown => return Some(Trouble::Shutdown),
                Entry::Failed(text) => return Some(Trouble::Failed(text)),
            }
        }
    }

    /// Tell the debugger of an entry that ended for it; [`Entry::Debug`]: it was told, and the processor waits.
    fn debugged(&self, seat: &Seat, vcpu: &mut Vcpu, entry: Entry) -> Entry {
        let hit = match entry {
            Entry::Stepped if vcpu.stepped() => None,
            Entry::Debug(exit) => match vcpu.judge(exit) {
                Ok(Some(hit)) => Some(hit),
                Ok(None) => return Entry::Again,
                Err(e) => return Entry::Failed(e.to_string()),
            },
            other => return other,
        };
        self.complain(Trouble::Debug(seat.index, hit));
        let mut gate = self.gate();
        while gate.running && !gate.quit {
            gate = self.moved.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        Entry::Debug(DebugExit { exception: 1, pc: 0, dr6: 0 })
    }

    /// End what an exit began, so that the state can be read.
    fn come_to_rest(&self, seat: &Seat, vcpu: &mut Vcpu) -> Result<(), KvmError> {
        loop {
            let incomplete = vcpu.is_incomplete();
            if !incomplete && !vcpu.is_queued()? {
                return Ok(());
            }
            // A vector that waits is taken by an entry, out of which a kick leads again.
            seat.flag().store(incomplete.into(), Ordering::SeqCst);
            let entry = vcpu.enter(self);
            if let Entry::Failed(text) = self.debugged(seat, vcpu, entry) {
                return Err(KvmError::Entry(text));
            }
        }
    }

    // ---- the machine thread's side

    /// Lend the board while `work` runs, at most until virtual time `until`.
    pub fn lend<T>(&self, board: &mut dyn Board, until: Option<u64>, work: impl FnOnce() -> T) -> T {
        self.desk.lend(board, until, work)
    }

    /// Before the machine thread looks at everything: whoever has something for it later must wake it.
    pub fn awake(&self) {
        self.woken.store(false, Ordering::SeqCst);
    }

    /// What went wrong, once.
    pub fn trouble(&self) -> Option<Trouble> {
        self.gate().trouble.take()
    }

    /// Let the processors run.
    pub fn go(&self) {
        self.running.store(true, Ordering::SeqCst);
        self.gate().running = true;
        self.moved.notify_all();
    }

    /// Make the processors stand still, between two instructions.
    pub fn halt(&self, board: &mut dyn Board) {
        self.running.store(false, Ordering::SeqCst);
        self.gate().running = false;
        self.moved.notify_all();
        self.seats.iter().for_each(|s| s.kick());
        // Exits that are under way want the board.
        let turn = self.desk.lend(board, Some(0), || {
            let mut gate = self.gate();
            while gate.parked < self.seats.len() {
                let (next, late) =
                    self.moved.wait_timeout(gate, PATIENCE).unwrap_or_else(PoisonError::into_inner);
                gate = next;
                if late.timed_out() && gate.parked < self.seats.len() {
                    drop(gate);
                    self.seats.iter().for_each(|s| s.kick());
                    gate = self.gate();
                }
            }
            drop(gate);
            self.bells.turn()
        });
        let rung = self.bells.rest(&turn);
        rung.iter().for_each(|token| board.ring(*token));
        if let Err(e) = self.deliver(board) {
            self.complain(Trouble::Failed(e.to_string()));
        }
    }

    /// The threads are to end.
    pub fn quit(&self) {
        self.running.store(false, Ordering::SeqCst);
        self.desk.close();
        {
            let mut gate = self.gate();
            gate.running = false;
            gate.quit = true;
        }
        self.moved.notify_all();
        self.bells.nudge();
        self.seats.iter().for_each(|s| s.kick());
    }
}
