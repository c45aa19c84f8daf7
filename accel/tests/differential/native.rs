//! Runs a case on the real processor, in user mode: registers are loaded, the code is entered with
//! IRET (64-bit or compatibility mode), and whatever exception ends it comes back as a signal whose
//! frame holds the final state.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicPtr, AtomicU64, Ordering};

use super::case::{Case, Outcome, Regs, CODE, CODE_SIZE, DATA, DATA_SIZE, ENTRY, LDT, READ_ONLY};

/// What the entry code reads.
#[repr(C, align(64))]
struct Entry {
    fx: [u8; 512],
    gpr: [u64; 16],
    frame: [u64; 5],
    data_selector: u64,
    avx: u64,
    reserved: u64,
    high: [u8; 256],
}

core::arch::global_asm!(
    ".globl ftvm_diff_enter",
    "ftvm_diff_enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [rsi], rsp",
    // NT, which a case may have set, is not among the flags that sigreturn sets.
    "push 0x202",
    "popfq",
    "fxrstor64 [rdi]",
    "cmp qword ptr [rdi + 688], 0",
    "je 2f",
    "vinsertf128 ymm0, ymm0, xmmword ptr [rdi + 704], 1",
    "vinsertf128 ymm1, ymm1, xmmword ptr [rdi + 720], 1",
    "vinsertf128 ymm2, ymm2, xmmword ptr [rdi + 736], 1",
    "vinsertf128 ymm3, ymm3, xmmword ptr [rdi + 752], 1",
    "vinsertf128 ymm4, ymm4, xmmword ptr [rdi + 768], 1",
    "vinsertf128 ymm5, ymm5, xmmword ptr [rdi + 784], 1",
    "vinsertf128 ymm6, ymm6, xmmword ptr [rdi + 800], 1",
    "vinsertf128 ymm7, ymm7, xmmword ptr [rdi + 816], 1",
    "vinsertf128 ymm8, ymm8, xmmword ptr [rdi + 832], 1",
    "vinsertf128 ymm9, ymm9, xmmword ptr [rdi + 848], 1",
    "vinsertf128 ymm10, ymm10, xmmword ptr [rdi + 864], 1",
    "vinsertf128 ymm11, ymm11, xmmword ptr [rdi + 880], 1",
    "vinsertf128 ymm12, ymm12, xmmword ptr [rdi + 896], 1",
    "vinsertf128 ymm13, ymm13, xmmword ptr [rdi + 912], 1",
    "vinsertf128 ymm14, ymm14, xmmword ptr [rdi + 928], 1",
    "vinsertf128 ymm15, ymm15, xmmword ptr [rdi + 944], 1",
    "2:",
    "mov eax, [rdi + 680]",
    "mov ds, eax",
    "mov es, eax",
    "lea rsp, [rdi + 640]",
    "mov rax, [rdi + 512]",
    "mov rcx, [rdi + 520]",
    "mov rdx, [rdi + 528]",
    "mov rbx, [rdi + 536]",
    "mov rbp, [rdi + 552]",
    "mov rsi, [rdi + 560]",
    "mov r8, [rdi + 576]",
    "mov r9, [rdi + 584]",
    "mov r10, [rdi + 592]",
    "mov r11, [rdi + 600]",
    "mov r12, [rdi + 608]",
    "mov r13, [rdi + 616]",
    "mov r14, [rdi + 624]",
    "mov r15, [rdi + 632]",
    "mov rdi, [rdi + 568]",
    "iretq",
    ".globl ftvm_diff_leave",
    "ftvm_diff_leave:",
    "fninit",
    "push 0x1f80",
    "ldmxcsr [rsp]",
    "pop rax",
    "xor eax, eax",
    "mov ds, eax",
    "mov es, eax",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
);

extern "sysv64" {
    fn ftvm_diff_enter(entry: *const Entry, stack: *mut u64);
    fn ftvm_diff_leave();
}

/// The outcome that the handler fills, while a case runs.
static TARGET: AtomicPtr<Outcome> = AtomicPtr::new(std::ptr::null_mut());
static RUNNING: AtomicBool = AtomicBool::new(false);
static mut HOST_STACK: u64 = 0;
/// Number of the case in hand, and what it was at the last tick of the watchdog.
static SEQUENCE: AtomicU64 = AtomicU64::new(0);
static SEEN: AtomicU64 = AtomicU64::new(0);
/// The thread that runs the cases.
static THREAD: AtomicI64 = AtomicI64::new(0);
/// Stands for the vector of a case that the watchdog ended.
pub const ENDLESS: u8 = 255;

extern "C" fn on_signal(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    if signal == libc::SIGALRM {
        // SAFETY: plain system calls; the timer's signal goes to any thread, so it is passed on.
        unsafe {
            let thread = THREAD.load(Ordering::SeqCst);
            if libc::syscall(libc::SYS_gettid) != thread {
                libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal);
                return;
            }
        }
        let now = SEQUENCE.load(Ordering::SeqCst);
        if SEEN.swap(now, Ordering::SeqCst) != now || !RUNNING.load(Ordering::SeqCst) {
            return;
        }
    }
    if !RUNNING.swap(false, Ordering::SeqCst) {
        // SAFETY: restoring the default action is what makes the second delivery final.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    // SAFETY: the kernel passes a valid context; TARGET and HOST_STACK were set before RUNNING.
    unsafe {
        let uc = &mut *context.cast::<libc::ucontext_t>();
        let out = &mut *TARGET.load(Ordering::SeqCst);
        let g = &mut uc.uc_mcontext.gregs;
        let order = [
            libc::REG_RAX,
            libc::REG_RCX,
            libc::REG_RDX,
            libc::REG_RBX,
            libc::REG_RSP,
            libc::REG_RBP,
            libc::REG_RSI,
            libc::REG_RDI,
            libc::REG_R8,
            libc::REG_R9,
            libc::REG_R10,
            libc::REG_R11,
            libc::REG_R12,
            libc::REG_R13,
            libc::REG_R14,
            libc::REG_R15,
        ];
        for (slot, reg) in out.regs.gpr.iter_mut().zip(order) {
            *slot = g[reg as usize] as u64;
        }
        // An interrupt of the host's that returned to a 16-bit stack segment has left the upper half of Linux's stack for
        // that (espfix), which no 64-bit case sees.
        if out.regs.gpr[4] >> 39 == 0x1FF_FFFE && g[libc::REG_CSGSFS as usize] as u16 != 0x33 {
            out.regs.gpr[4] &= 0xFFFF_FFFF;
        }
        out.regs.rip = g[libc::REG_RIP as usize] as u64;
        out.regs.flags = g[libc::REG_EFL as usize] as u64;
        out.vector = g[libc::REG_TRAPNO as usize] as u8;
        out.error = g[libc::REG_ERR as usize] as u32;
        out.cr2 = g[libc::REG_CR2 as usize] as u64;
        if signal == libc::SIGALRM {
            out.vector = ENDLESS;
        }
        out.signal = signal;
        let fx = uc.uc_mcontext.fpregs.cast::<u8>();
        std::ptr::copy_nonoverlapping(fx, out.regs.fx.as_mut_ptr(), 416);
        // The kernel's extended frame: its mark, then the XSAVE header's XSTATE_BV; AVX follows the header.
        let (mark, used) = (fx.add(464).cast::<u32>().read_unaligned(), fx.add(512).cast::<u64>());
        out.regs.high = [0; 256];
        if mark == 0x4650_5853 && used.read_unaligned() & 4 != 0 {
            std::ptr::copy_nonoverlapping(fx.add(576), out.regs.high.as_mut_ptr(), 256);
        }
        g[libc::REG_RIP as usize] = ftvm_diff_leave as *const () as i64;
        g[libc::REG_RSP as usize] = HOST_STACK as i64;
        g[libc::REG_EFL as usize] = 0x202;
        let selectors = &mut g[libc::REG_CSGSFS as usize];
        let (es, ds): (u16, u16);
        core::arch::asm!("mov {0:e}, es", "mov {1:e}, ds", out(reg) es, out(reg) ds);
        out.regs.selectors = [es, *selectors as u16, (*selectors >> 48) as u16, ds];
        *selectors = 0x33 | 0x2B << 48;
    }
}

/// The real processor, ready to run cases.
pub struct Native {
    code: *mut u8,
    entry: *mut Entry,
}

fn map(addr: u64, len: usize, prot: i32, fd: i32) -> *mut u8 {
    let mut flags = if fd < 0 { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS } else { libc::MAP_SHARED };
    if addr != 0 {
        flags |= libc::MAP_FIXED_NOREPLACE;
    }
    // SAFETY: a new mapping that replaces nothing.
    let p = unsafe { libc::mmap(addr as *mut _, len, prot, flags, fd, 0) };
    assert!(p != libc::MAP_FAILED && (addr == 0 || p as u64 == addr), "mmap at {addr:#x}");
    p.cast()
}

impl Native {
    pub fn new() -> Native {
        // SAFETY: plain system calls with valid arguments.
        let fd = unsafe { libc::memfd_create(c"code".as_ptr(), 0) };
        assert!(fd >= 0);
        // SAFETY: as above.
        assert_eq!(unsafe { libc::ftruncate(fd, CODE_SIZE as i64) }, 0);
        map(CODE, CODE_SIZE, libc::PROT_READ | libc::PROT_EXEC, fd);
        let code = map(0, CODE_SIZE, libc::PROT_READ | libc::PROT_WRITE, fd);
        map(DATA, DATA_SIZE, libc::PROT_READ | libc::PROT_WRITE, -1);
        let page = map(READ_ONLY, 4096, libc::PROT_READ, -1);
        // SAFETY: the page was just mapped. Touched, it is present when a case first writes to it.
        unsafe { page.read_volatile() };
        let stack = map(0, 1 << 17, libc::PROT_READ | libc::PROT_WRITE, -1);
        // SAFETY: the alternate stack is a live mapping; the handler has the SA_SIGINFO signature.
        unsafe {
            let ss = libc::stack_t { ss_sp: stack.cast(), ss_flags: 0, ss_size: 1 << 17 };
            assert_eq!(libc::sigaltstack(&ss, std::ptr::null_mut()), 0);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            // The watchdog must not interrupt the handler of what ends a case.
            libc::sigaddset(&mut action.sa_mask, libc::SIGALRM);
            THREAD.store(libc::syscall(libc::SYS_gettid), Ordering::SeqCst);
            let tick = libc::timeval { tv_sec: 1, tv_usec: 0 };
            let timer = libc::itimerval { it_interval: tick, it_value: tick };
            action.sa_flags |= libc::SA_RESTART;
            assert_eq!(libc::sigaction(libc::SIGALRM, &action, std::ptr::null_mut()), 0);
            assert_eq!(libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()), 0);
            for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP] {
                assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
            }
        }
        let entry = map(ENTRY, 4096, libc::PROT_READ | libc::PROT_WRITE, -1).cast();
        for (i, d) in LDT.iter().enumerate() {
            // struct user_desc of modify_ldt(2).
            let bits = u32::from(d.big)
                | d.contents << 1
                | u32::from(d.restricted) << 3
                | u32::from(!d.present) << 5;
            let desc = [i as u32 + 1, d.base as u32, d.limit, bits];
            // SAFETY: function 1 reads one user_desc of 16 bytes.
            let r = unsafe { libc::syscall(libc::SYS_modify_ldt, 1, desc.as_ptr(), 16) };
            assert_eq!(r as i32, 0, "modify_ldt");
        }
        Native { code, entry }
    }

    pub fn run(&mut self, case: &Case, out: &mut Outcome) {
        out.regs = Regs::default();
        // SAFETY: `code` and DATA are the mappings made in `new`; the entry code gets a complete
        // entry, and every way out of the case goes through the handler back to `ftvm_diff_leave`.
        unsafe {
            std::ptr::copy_nonoverlapping(case.code.as_ptr(), self.code, CODE_SIZE);
            let data = DATA as *mut u8;
            std::ptr::copy_nonoverlapping(case.data.as_ptr(), data, DATA_SIZE);
            let e = &mut *self.entry;
            e.fx = case.regs.fx;
            e.high = case.regs.high;
            e.avx = super::case::has_avx().into();
            e.gpr = case.regs.gpr;
            let (cs, ss) = (case.mode.code_selector().into(), case.mode.data_selector().into());
            e.frame = [case.regs.rip, cs, case.regs.flags, case.regs.gpr[4], ss];
            e.data_selector = ss;
            TARGET.store(out, Ordering::SeqCst);
            SEQUENCE.fetch_add(1, Ordering::SeqCst);
            RUNNING.store(true, Ordering::SeqCst);
            ftvm_diff_enter(e, &raw mut HOST_STACK);
            std::ptr::copy_nonoverlapping(data, out.data.as_mut_ptr(), DATA_SIZE);
        }
    }
}
