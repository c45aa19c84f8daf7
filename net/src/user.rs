//! `user`: networking without privileges, by libslirp: the guest is 10.0.2.15, the host 10.0.2.2, a DHCP
//! server and a DNS forwarder are at hand, and ports of the host may be forwarded to the guest.

use std::collections::BTreeMap;
use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use libslirp_sys as sys;

use crate::{Backend, NetError, Receive};

/// A forwarded port.
#[derive(Clone, Debug)]
pub struct Forward {
    pub udp: bool,
    pub host: (Ipv4Addr, u16),
    /// 0.0.0.0: the guest's first DHCP address.
    pub guest: (Ipv4Addr, u16),
}

/// Settings of user networking.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    pub forwards: Vec<Forward>,
    /// The guest can reach nothing but the forwards.
    pub restricted: bool,
    pub hostname: Option<String>,
    /// Network address, `10.0.2.0` by default, always /24.
    pub network: Option<Ipv4Addr>,
}

/// So many frames at once are a burst: its thread takes them off the one that attends it.
const BURST: usize = 16;
/// For so long after a burst it is left to its thread.
const BULK: Duration = Duration::from_millis(5);

/// User networking.
pub struct User {
    shared: Arc<Shared>,
    frames: Sender<Vec<u8>>,
    wake: OwnedFd,
    /// The user's thread serves the stack.
    attended: bool,
    /// Frames that were sent since it was attended last.
    sent: usize,
    burst: Option<Instant>,
}

/// What the network's own thread and the one that attends it have in common.
struct Shared {
    turn: Mutex<Turn>,
    left: Condvar,
    /// The network's thread was woken and has not looked yet.
    woken: AtomicBool,
}

/// The stack, and whose turn it is to serve it.
struct Turn {
    stack: Stack,
    /// Frames that the network's thread has not sent yet.
    queue: Receiver<Vec<u8>>,
    attended: bool,
    ended: bool,
    /// How often descriptors were asked for: libslirp knows only those of the last time.
    fills: u64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Turn {
    /// Send what waits.
    fn send_queued(&mut self) {
        while let Ok(frame) = self.queue.try_recv() {
            self.stack.input(&frame);
        }
    }

    fn fill(&mut self, list: &mut Vec<libc::pollfd>) -> Duration {
        self.fills += 1;
        self.stack.fill(list)
    }
}

fn address(ip: Ipv4Addr) -> sys::in_addr {
    ip.into()
}

impl User {
    /// Start the network on a thread of its own.
    pub fn start(settings: &Settings, receive: Receive) -> Result<Self, NetError> {
        let fail = |text: &str| NetError::User(text.to_owned());
        let (reader, wake) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK | nix::fcntl::OFlag::O_CLOEXEC)
            .map_err(|e| fail(&e.to_string()))?;
        let (frames, queue) = channel();
        let stack = Stack::new(settings, receive).map_err(NetError::User)?;
        let turn = Turn { stack, queue, attended: false, ended: false, fills: 0 };
        let shared =
            Arc::new(Shared { turn: Mutex::new(turn), left: Condvar::new(), woken: AtomicBool::new(false) });
        let own = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("net-user".into())
            .spawn(move || own.run(&reader))
            .map_err(NetError::Thread)?;
        Ok(User { shared, frames, wake, attended: false, sent: 0, burst: None })
    }

    fn wake(&self) {
        if !self.shared.woken.swap(true, Ordering::SeqCst) {
            let _ = nix::unistd::write(&self.wake, &[0]);
        }
    }
}

impl Backend for User {
    fn send(&mut self, frame: &[u8]) {
        self.sent += 1;
        if self.attended && self.sent > BURST {
            self.burst = Some(Instant::now());
            self.leave();
        }
        if self.attended {
            self.shared.lock().stack.input(frame);
        } else if self.frames.send(frame.to_vec()).is_ok() {
            self.wake();
        }
    }

    fn attend(&mut self, list: &mut Vec<libc::pollfd>) -> Option<Duration> {
        self.sent = 0;
        let mut turn = if self.attended {
            self.shared.lock()
        } else {
            if self.burst.is_some_and(|at| at.elapsed() < BULK) {
                return None;
            }
            match self.shared.turn.try_lock() {
                Ok(turn) => turn,
                Err(TryLockError::WouldBlock) => return None,
                Err(TryLockError::Poisoned(e)) => e.into_inner(),
            }
        };
        if !self.attended {
            // The network's thread finds out when something wakes it.
            turn.attended = true;
            turn.send_queued();
        }
        let wait = turn.fill(list);
        drop(turn);
        self.attended = true;
        Some(wait)
    }

    fn serve(&mut self, list: &[libc::pollfd]) {
        if !self.attended {
            return;
        }
        let mut turn = self.shared.lock();
        let before = turn.stack.received();
        turn.stack.serve(list, false);
        let burst = turn.stack.received() - before > BURST;
        drop(turn);
        if burst {
            self.burst = Some(Instant::now());
            self.leave();
        }
    }

    fn leave(&mut self) {
        if std::mem::take(&mut self.attended) {
            self.shared.lock().attended = false;
            self.shared.left.notify_one();
            // It may wait for descriptors of long ago.
            self.wake();
        }
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.left.notify_one();
        self.wake();
    }
}

impl Shared {
    /// The network's own thread.
    fn run(&self, wake: &OwnedFd) {
        let mut list: Vec<libc::pollfd> = Vec::new();
        let mut turn = self.lock();
        loop {
            while turn.attended && !turn.ended {
                turn = self.left.wait(turn).unwrap_or_else(std::sync::PoisonError::into_inner);
            }
            if turn.ended {
                return;
            }
            self.woken.store(false, Ordering::SeqCst);
            turn.send_queued();
            list.clear();
            let wait = turn.fill(&mut list);
            let fill = turn.fills;
            drop(turn);
            list.push(libc::pollfd { fd: wake.as_raw_fd(), events: libc::POLLIN, revents: 0 });
            // SAFETY: list is a valid array of pollfds.
            let rc = unsafe {
                libc::poll(list.as_mut_ptr(), list.len() as libc::nfds_t, wait.as_millis() as c_int)
            };
            if list.pop().is_some_and(|p| p.revents != 0) {
                let mut buf = [0u8; 256];
                while matches!(nix::unistd::read(wake, &mut buf), Ok(n) if n == buf.len()) {}
            }
            turn = self.lock();
            if !turn.attended && turn.fills == fill {
                turn.stack.serve(&list, rc < 0);
            }
        }
    }
}

struct Timer {
    callback: unsafe extern "C" fn(*mut c_void),
    argument: *mut c_void,
    at_ms: Option<i64>,
}

/// What libslirp's callbacks reach.
struct Callbacks {
    receive: Receive,
    start: Instant,
    timers: BTreeMap<usize, Timer>,
    next_timer: usize,
    /// Frames for the guest so far.
    received: usize,
}

impl Callbacks {
    fn now_ns(&self) -> i64 {
        self.start.elapsed().as_nanos() as i64
    }
}

/// # Safety
/// `opaque` is the `Callbacks` that `Stack::new` gave to libslirp; libslirp calls back only within calls made by
/// whoever has the stack to itself, so nobody else uses it.
unsafe fn callbacks<'a>(opaque: *mut c_void) -> &'a mut Callbacks {
    // SAFETY: see above.
    unsafe { &mut *opaque.cast::<Callbacks>() }
}

unsafe extern "C" fn send_packet(data: *const c_void, len: usize, opaque: *mut c_void) -> isize {
    // SAFETY: libslirp passes `len` readable bytes; see `callbacks` for the rest.
    unsafe {
        let frame = std::slice::from_raw_parts(data.cast::<u8>(), len).to_vec();
        let c = callbacks(opaque);
        c.received += 1;
        (c.receive)(frame);
    }
    len as isize
}

unsafe extern "C" fn guest_error(message: *const c_char, _opaque: *mut c_void) {
    // SAFETY: libslirp passes a C string.
    log::debug!("user network: {}", unsafe { CStr::from_ptr(message) }.to_string_lossy());
}

unsafe extern "C" fn clock(opaque: *mut c_void) -> i64 {
    // SAFETY: see `callbacks`.
    unsafe { callbacks(opaque) }.now_ns()
}

unsafe extern "C" fn timer_new(
    callback: sys::SlirpTimerCb,
    argument: *mut c_void,
    opaque: *mut c_void,
) -> *mut c_void {
    // SAFETY: see `callbacks`.
    let c = unsafe { callbacks(opaque) };
    let Some(callback) = callback else { return std::ptr::null_mut() };
    c.next_timer += 1;
    c.timers.insert(c.next_timer, Timer { callback, argument, at_ms: None });
    c.next_timer as *mut c_void
}

unsafe extern "C" fn timer_free(timer: *mut c_void, opaque: *mut c_void) {
    // SAFETY: see `callbacks`.
    unsafe { callbacks(opaque) }.timers.remove(&(timer as usize));
}

unsafe extern "C" fn timer_mod(timer: *mut c_void, at_ms: i64, opaque: *mut c_void) {
    // SAFETY: see `callbacks`.
    if let Some(t) = unsafe { callbacks(opaque) }.timers.get_mut(&(timer as usize)) {
        t.at_ms = Some(at_ms);
    }
}

unsafe extern "C" fn poll_fd(_fd: c_int, _opaque: *mut c_void) {}

unsafe extern "C" fn notify(_opaque: *mut c_void) {}

unsafe extern "C" fn add_poll(fd: c_int, events: c_int, opaque: *mut c_void) -> c_int {
    // SAFETY: `opaque` is the vector that `Stack::fill` passes to slirp_pollfds_fill.
    let list = unsafe { &mut *opaque.cast::<Vec<libc::pollfd>>() };
    let mut wanted = 0;
    for (slirp, poll) in FLAGS {
        if events & slirp != 0 {
            wanted |= poll;
        }
    }
    list.push(libc::pollfd { fd, events: wanted, revents: 0 });
    (list.len() - 1) as c_int
}

unsafe extern "C" fn get_revents(index: c_int, opaque: *mut c_void) -> c_int {
    // SAFETY: `opaque` is the slice that `Stack::serve` passes to slirp_pollfds_poll.
    let list = unsafe { *opaque.cast::<&[libc::pollfd]>() };
    let Some(entry) = list.get(index as usize) else { return 0 };
    FLAGS.iter().filter(|(_, poll)| entry.revents & poll != 0).fold(0, |acc, (slirp, _)| acc | slirp)
}

/// (libslirp's flag, poll's flag)
const FLAGS: [(c_int, i16); 5] =
    [(1, libc::POLLIN), (2, libc::POLLOUT), (4, libc::POLLPRI), (8, libc::POLLERR), (16, libc::POLLHUP)];

struct Stack {
    slirp: *mut sys::Slirp,
    callbacks: *mut Callbacks,
    /// libslirp keeps pointers into these.
    _table: Box<sys::SlirpCb>,
    _hostname: Option<CString>,
}

// SAFETY: libslirp is not bound to a thread, and the stack's pointers are its own: whoever has it to itself may use it. What
// it calls back (`receive`) is `Send`.
unsafe impl Send for Stack {}

impl Stack {
    fn new(settings: &Settings, receive: Receive) -> Result<Self, String> {
        let table = Box::new(sys::SlirpCb {
            send_packet: Some(send_packet),
            guest_error: Some(guest_error),
            clock_get_ns: Some(clock),
            timer_new: Some(timer_new),
            timer_free: Some(timer_free),
            timer_mod: Some(timer_mod),
            register_poll_fd: Some(poll_fd),
            unregister_poll_fd: Some(poll_fd),
            notify: Some(notify),
        });
        let hostname = settings.hostname.clone().map(CString::new).transpose().map_err(|e| e.to_string())?;
        let [a, b, c, _] = settings.network.unwrap_or(Ipv4Addr::new(10, 0, 2, 0)).octets();
        let host = |n| address(Ipv4Addr::new(a, b, c, n));
        // SAFETY: an all-zero SlirpConfig is a valid value of that C structure (null pointers, false, 0).
        let mut config: sys::SlirpConfig = unsafe { std::mem::zeroed() };
        config.version = 1;
        config.restricted = c_int::from(settings.restricted);
        config.in_enabled = true;
        config.vnetwork = host(0);
        config.vnetmask = address(Ipv4Addr::new(255, 255, 255, 0));
        config.vhost = host(2);
        config.vdhcp_start = host(15);
        config.vnameserver = host(3);
        config.vhostname = hostname.as_ref().map_or(std::ptr::null(), |h| h.as_ptr());
        let state = Box::into_raw(Box::new(Callbacks {
            receive,
            start: Instant::now(),
            timers: BTreeMap::new(),
            next_timer: 0,
            received: 0,
        }));
        // SAFETY: config lives across the call; table and state live until slirp_cleanup in drop.
        let slirp = unsafe { sys::slirp_new(&config, &*table, state.cast()) };
        let stack = Stack { slirp, callbacks: state, _table: table, _hostname: hostname };
        if slirp.is_null() {
            return Err("libslirp could not be started".into());
        }
        for f in &settings.forwards {
            let (h, g) = (address(f.host.0), address(f.guest.0));
            // SAFETY: slirp is valid.
            let rc = unsafe {
                sys::slirp_add_hostfwd(
                    slirp,
                    c_int::from(f.udp),
                    h,
                    c_int::from(f.host.1),
                    g,
                    c_int::from(f.guest.1),
                )
            };
            if rc < 0 {
                return Err(format!(
                    "Could not set up host forwarding rule '{}:{}:{}-{}:{}': {}",
                    if f.udp { "udp" } else { "tcp" },
                    f.host.0,
                    f.host.1,
                    f.guest.0,
                    f.guest.1,
                    std::io::Error::last_os_error()
                ));
            }
        }
        Ok(stack)
    }

    /// Add what libslirp waits for to the list, and say for how long at most.
    fn fill(&mut self, list: &mut Vec<libc::pollfd>) -> Duration {
        let mut timeout = 1000u32;
        // SAFETY: slirp is valid; add_poll gets `list`, which lives across the call.
        unsafe {
            sys::slirp_pollfds_fill(
                self.slirp,
                &mut timeout,
                Some(add_poll),
                std::ptr::from_mut(list).cast(),
            );
        }
        let wait = self.next_timer().map_or(i64::from(timeout), |t| t.min(i64::from(timeout)));
        Duration::from_millis(wait.clamp(0, 1000) as u64)
    }

    /// Do what the descriptors of the last list are ready for, and what is due.
    fn serve(&mut self, mut list: &[libc::pollfd], failed: bool) {
        // SAFETY: slirp is valid; get_revents gets the slice, which lives across the call.
        unsafe {
            sys::slirp_pollfds_poll(
                self.slirp,
                c_int::from(failed),
                Some(get_revents),
                std::ptr::from_mut(&mut list).cast(),
            );
        }
        self.fire_timers();
    }

    /// A frame of the guest's.
    fn input(&mut self, frame: &[u8]) {
        // SAFETY: slirp is valid; the frame's bytes are readable for its length.
        unsafe { sys::slirp_input(self.slirp, frame.as_ptr(), frame.len() as c_int) }
    }

    fn received(&self) -> usize {
        // SAFETY: the callbacks live until drop, and libslirp is not running now.
        unsafe { (*self.callbacks).received }
    }

    fn next_timer(&self) -> Option<i64> {
        // SAFETY: the callbacks live until drop, and libslirp is not running now.
        let c = unsafe { &*self.callbacks };
        let now = c.now_ns() / 1_000_000;
        c.timers.values().filter_map(|t| t.at_ms).min().map(|at| at - now)
    }

    fn fire_timers(&mut self) {
        loop {
            // SAFETY: as in next_timer; the borrow ends before the callback runs.
            let due = unsafe {
                let c = &mut *self.callbacks;
                let now = c.now_ns() / 1_000_000;
                c.timers.values_mut().find(|t| t.at_ms.is_some_and(|at| at <= now)).map(|t| {
                    t.at_ms = None;
                    (t.callback, t.argument)
                })
            };
            let Some((callback, argument)) = due else { return };
            // SAFETY: libslirp gave the callback with this argument.
            unsafe { callback(argument) };
        }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: slirp (if it was made) is cleaned up once, and then the callbacks it used.
        unsafe {
            if !self.slirp.is_null() {
                sys::slirp_cleanup(self.slirp);
            }
            drop(Box::from_raw(self.callbacks));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn the_host_answers_arp() {
        let (tx, rx) = mpsc::channel();
        let mut net = User::start(&Settings::default(), Box::new(move |f| drop(tx.send(f)))).unwrap();
        net.send(&question());
        let reply = rx.recv_timeout(Duration::from_secs(5)).unwrap();
        assert_eq!(reply[12..14], [8, 6]);
        assert_eq!(reply[28..32], [10, 0, 2, 2]);
    }

    /// An ARP request for the host.
    fn question() -> Vec<u8> {
        let mac = [0x52, 0x54, 0, 1, 2, 3];
        let mut arp = vec![0xFF; 6];
        arp.extend(mac);
        arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        arp.extend(mac);
        arp.extend([10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
        arp
    }

    #[test]
    fn whoever_attends_it_serves_it_and_its_thread_does_again_after_that() {
        let (tx, rx) = mpsc::channel();
        let receive = move |f| drop(tx.send((std::thread::current().id(), f)));
        let mut net = User::start(&Settings::default(), Box::new(receive)).unwrap();
        let own = std::thread::current().id();
        let end = Instant::now() + Duration::from_secs(10);
        for _ in 0..50 {
            // Its thread may be at it.
            let mut list = Vec::new();
            while net.attend(&mut list).is_none() {
                assert!(Instant::now() < end);
            }
            net.send(&question());
            net.serve(&list);
            assert_eq!(rx.try_recv().unwrap().0, own);
            net.leave();
            net.send(&question());
            assert_ne!(rx.recv_timeout(Duration::from_secs(5)).unwrap().0, own);
        }
    }

    #[test]
    fn what_was_sent_before_it_is_attended_goes_first() {
        let (tx, rx) = mpsc::channel();
        let mut net = User::start(&Settings::default(), Box::new(move |f| drop(tx.send(f)))).unwrap();
        let from = |n: u8| {
            let mut q = question();
            q[31] = n;
            q
        };
        for round in 50..150u8 {
            (0..3).for_each(|_| net.send(&from(round)));
            while net.attend(&mut Vec::new()).is_none() {}
            net.send(&from(200));
            let mut answers = (0..4).map(|_| rx.recv_timeout(Duration::from_secs(5)).unwrap()[41]);
            assert!(answers.by_ref().take(3).all(|n| n == round));
            assert_eq!(answers.next(), Some(200));
            net.leave();
        }
    }

    #[test]
    fn a_burst_is_left_to_its_thread_for_a_while() {
        let (tx, rx) = mpsc::channel();
        let receive = move |f| drop(tx.send((std::thread::current().id(), f)));
        let mut net = User::start(&Settings::default(), Box::new(receive)).unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        while net.attend(&mut Vec::new()).is_none() {
            assert!(Instant::now() < end);
        }
        let own = std::thread::current().id();
        (0..2 * BURST).for_each(|_| net.send(&question()));
        let from: Vec<_> =
            (0..2 * BURST).map(|_| rx.recv_timeout(Duration::from_secs(5)).unwrap().0).collect();
        assert!(from[..BURST].iter().all(|t| *t == own) && from[BURST..].iter().all(|t| *t != own));
        while net.attend(&mut Vec::new()).is_none() {
            assert!(Instant::now() < end);
        }
        assert!(net.burst.unwrap().elapsed() >= BULK);
    }

    #[test]
    fn a_taken_port_is_an_error_with_the_rule() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let forwards = vec![Forward {
            udp: false,
            host: (Ipv4Addr::LOCALHOST, port),
            guest: (Ipv4Addr::UNSPECIFIED, 80),
        }];
        let e = User::start(&Settings { forwards, ..Settings::default() }, Box::new(|_| {})).err().unwrap();
        assert!(e.to_string().contains(&port.to_string()), "{e}");
    }
}
