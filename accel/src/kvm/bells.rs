//! Doorbells: writes that only say that there is work, for a device that nobody has to wait for.
//!
//! KVM turns such a write into a signal (KVM_IOEVENTFD) and the guest goes on; a thread of this module's hears it and
//! rings the device, as an exit would have. Whoever stops the machine rings what has been signalled till then
//! ([`Bells::rest`]): a write that the guest has made is never lost.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::KvmError;

/// Signals that are heard at once.
const BATCH: usize = 32;
/// Not a bell: the thread is to look about.
const NUDGE: u64 = u64::MAX;

/// Where a guest's write rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum BellPlace {
    /// Any write to this address of memory-mapped I/O.
    Memory(u64),
    /// A write of this 16-bit value to this port.
    Port(u16, u16),
}

/// A doorbell of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bell {
    pub place: BellPlace,
    /// What the board knows it by, wherever it is: below `u64::MAX`.
    pub token: u64,
}

fn new_event() -> Result<EventFd, KvmError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(KvmError::io("eventfd"))
}

struct Hung {
    bell: Bell,
    event: EventFd,
}

impl Hung {
    fn connect(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        match self.bell.place {
            BellPlace::Memory(at) => vm.register_ioevent(&self.event, &IoEventAddress::Mmio(at), NoDatamatch),
            BellPlace::Port(port, value) => {
                vm.register_ioevent(&self.event, &IoEventAddress::Pio(port.into()), value)
            }
        }
    }

    fn disconnect(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        match self.bell.place {
            BellPlace::Memory(at) => {
                vm.unregister_ioevent(&self.event, &IoEventAddress::Mmio(at), NoDatamatch)
            }
            BellPlace::Port(port, value) => {
                vm.unregister_ioevent(&self.event, &IoEventAddress::Pio(port.into()), value)
            }
        }
    }
}

#[derive(Default)]
struct Rope {
    version: Option<u64>,
    hung: BTreeMap<u64, Hung>,
    /// Signalled when their bell was taken down.
    late: Vec<u64>,
}

/// A machine's doorbells.
pub struct Bells {
    epoll: Epoll,
    nudge: EventFd,
    rope: Mutex<Rope>,
    /// Held by whoever has taken signals until the devices know of them.
    turn: Mutex<()>,
}

/// Nobody else takes signals while this lives.
pub type Turn<'a> = MutexGuard<'a, ()>;

impl Bells {
    /// None yet.
    pub fn new() -> Result<Bells, KvmError> {
        let epoll = Epoll::new().map_err(KvmError::io("epoll_create1"))?;
        let nudge = new_event()?;
        let bells = Bells { epoll, nudge, rope: Mutex::default(), turn: Mutex::default() };
        bells.listen(&bells.nudge, NUDGE)?;
        Ok(bells)
    }

    fn listen(&self, event: &EventFd, token: u64) -> Result<(), KvmError> {
        let wanted = EpollEvent::new(EventSet::IN, token);
        self.epoll
            .ctl(ControlOperation::Add, event.as_raw_fd(), wanted)
            .map_err(KvmError::io("EPOLL_CTL_ADD"))
    }

    fn rope(&self) -> MutexGuard<'_, Rope> {
        self.rope.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the bells are those of this version.
    pub fn is_current(&self, version: u64) -> bool {
        self.rope().version == Some(version)
    }

    /// From now on these are the bells, until the next version of them.
    pub fn hang(&self, vm: &VmFd, version: u64, bells: &[Bell]) -> Result<(), KvmError> {
        let mut rope = self.rope();
        let gone: Vec<u64> =
            rope.hung.values().filter(|h| !bells.contains(&h.bell)).map(|h| h.bell.token).collect();
        for token in gone {
            let Some(old) = rope.hung.remove(&token) else { continue };
            old.disconnect(vm).map_err(KvmError::call("KVM_IOEVENTFD"))?;
            if old.event.read().is_ok() {
                rope.late.push(token);
                self.nudge();
            }
        }
        for bell in bells {
            if rope.hung.contains_key(&bell.token) {
                continue;
            }
            let new = Hung { bell: *bell, event: new_event()? };
            match new.connect(vm) {
                Ok(()) => {}
                // The bus has no place left, or another function decodes the same address: these are exits then.
                Err(e) if matches!(e.errno(), libc::ENOSPC | libc::EEXIST) => continue,
                Err(e) => return Err(KvmError::call("KVM_IOEVENTFD")(e)),
            }
            self.listen(&new.event, bell.token)?;
            rope.hung.insert(bell.token, new);
        }
        rope.version = Some(version);
        Ok(())
    }

    /// What has been signalled, some of it at least. It is the caller's, who has the turn, to ring.
    fn heard(&self) -> Vec<u64> {
        let mut events = [EpollEvent::default(); BATCH];
        let count = self.wait(0, &mut events);
        let mut rope = self.rope();
        let mut heard = std::mem::take(&mut rope.late);
        for event in &events[..count] {
            // Taken down meanwhile, or heard by another: nothing.
            if rope.hung.get(&event.data()).is_some_and(|h| h.event.read().is_ok()) {
                heard.push(event.data());
            }
        }
        heard
    }

    /// Events, waiting `timeout` ms for one (-1: for ever).
    fn wait(&self, timeout: i32, events: &mut [EpollEvent]) -> usize {
        self.epoll.wait(timeout, events).unwrap_or_else(|e| {
            if e.kind() != std::io::ErrorKind::Interrupted {
                log::error!("epoll_wait: {e}");
            }
            0
        })
    }

    /// Wait for signals and call `ring` with them, until `closed` (see [`Self::nudge`]).
    pub fn hear(&self, closed: impl Fn() -> bool, mut ring: impl FnMut(&[u64])) {
        while !closed() {
            // Only whether there is one: the turn comes before what it is.
            self.wait(-1, &mut [EpollEvent::default()]);
            let turn = self.turn();
            let _ = self.nudge.read();
            let heard = self.heard();
            if !heard.is_empty() {
                ring(&heard);
            }
            drop(turn);
        }
    }

    /// Wait until all that was heard has been rung, for which the devices must be lent meanwhile.
    pub fn turn(&self) -> Turn<'_> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that has been signalled. The caller has the turn, and guests stand still.
    pub fn rest(&self, _: &Turn<'_>) -> Vec<u64> {
        let mut all = Vec::new();
        loop {
            let heard = self.heard();
            if heard.is_empty() {
                return all;
            }
            all.extend(heard);
        }
    }

    /// Make [`Self::hear`] look about.
    pub fn nudge(&self) {
        if let Err(e) = self.nudge.write(1) {
            log::error!("eventfd: {e}");
        }
    }
}
