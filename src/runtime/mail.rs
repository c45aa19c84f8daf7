//! The machine thread's mailbox: events, and descriptors that it waits for beside them.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{fence, AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver, RecvError, RecvTimeoutError, SendError, Sender, TryRecvError};
use std::sync::Arc;
use std::time::Duration;

use super::Event;

/// Wakes a thread that waits for descriptors.
struct Bell {
    fd: OwnedFd,
    /// The thread waits for `fd`, or is about to.
    asleep: AtomicBool,
}

impl Bell {
    fn new() -> std::io::Result<Bell> {
        // SAFETY: eventfd takes no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made, and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Bell { fd, asleep: AtomicBool::new(false) })
    }
}

/// Sends events to the machine thread.
#[derive(Clone)]
pub struct Events {
    sender: Sender<Event>,
    bell: Arc<Bell>,
}

impl Events {
    /// Send an event; it comes back if the machine thread has ended.
    pub fn send(&self, event: Event) -> Result<(), SendError<Event>> {
        self.sender.send(event)?;
        // Either this sees that the thread sleeps, or the thread sees the event before it does.
        fence(Ordering::SeqCst);
        if self.bell.asleep.load(Ordering::Relaxed) && self.bell.asleep.swap(false, Ordering::SeqCst) {
            let _ = nix::unistd::write(&self.bell.fd, &1u64.to_ne_bytes());
        }
        Ok(())
    }
}

/// Where the machine thread gets its events.
pub struct Mailbox {
    receiver: Receiver<Event>,
    bell: Arc<Bell>,
}

/// A new mailbox and its sender.
pub fn mailbox() -> std::io::Result<(Events, Mailbox)> {
    let (sender, receiver) = channel();
    let bell = Arc::new(Bell::new()?);
    Ok((Events { sender, bell: Arc::clone(&bell) }, Mailbox { receiver, bell }))
}

impl Mailbox {
    /// The next event, when there is one.
    pub fn recv(&self) -> Result<Event, RecvError> {
        self.receiver.recv()
    }

    /// The next event, if it is there.
    pub fn try_recv(&self) -> Result<Event, TryRecvError> {
        self.receiver.try_recv()
    }

    /// The next event, if it comes soon enough.
    pub fn recv_timeout(&self, at_most: Duration) -> Result<Event, RecvTimeoutError> {
        self.receiver.recv_timeout(at_most)
    }

    /// As [`Self::recv_timeout`]; also returns (`Timeout`) when one of the descriptors in `list` is ready.
    pub fn recv_or_ready(
        &self,
        list: &mut Vec<libc::pollfd>,
        at_most: Duration,
    ) -> Result<Event, RecvTimeoutError> {
        self.bell.asleep.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let first = self.receiver.try_recv();
        if matches!(first, Err(TryRecvError::Empty)) {
            list.push(libc::pollfd { fd: self.bell.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 });
            poll(list, at_most);
            let rung = list.pop().is_some_and(|p| p.revents != 0);
            if !self.bell.asleep.swap(false, Ordering::SeqCst) || rung {
                // What it says is read below; a sender that has not written yet wakes the thread once more, for nothing.
                let _ = nix::unistd::read(&self.bell.fd, &mut [0; 8]);
            }
        } else {
            self.bell.asleep.store(false, Ordering::SeqCst);
        }
        let event = if matches!(first, Err(TryRecvError::Empty)) { self.receiver.try_recv() } else { first };
        event.map_err(|e| match e {
            TryRecvError::Empty => RecvTimeoutError::Timeout,
            TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
        })
    }
}

/// Wait until one of the descriptors is ready, or the time is over; returns whether one is.
pub fn poll(list: &mut [libc::pollfd], at_most: Duration) -> bool {
    let time = libc::timespec {
        tv_sec: at_most.as_secs() as libc::time_t,
        tv_nsec: libc::c_long::from(at_most.subsec_nanos()),
    };
    // SAFETY: `list` is a valid array of pollfds of that length, and `time` a timespec that lives across the call.
    let n = unsafe { libc::ppoll(list.as_mut_ptr(), list.len() as libc::nfds_t, &time, std::ptr::null()) };
    if n < 0 {
        // Interrupted: nothing is ready as far as this call knows.
        list.iter_mut().for_each(|p| p.revents = 0);
    }
    n > 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn every_event_arrives_while_the_thread_falls_asleep_again_and_again() {
        let (events, mail) = mailbox().unwrap();
        let sender = std::thread::spawn(move || {
            for i in 0..20_000u32 {
                assert!(events.send(Event::Woken).is_ok());
                if i % 3 == 0 {
                    std::thread::yield_now();
                }
            }
        });
        let (start, mut got) = (Instant::now(), 0);
        while got < 20_000 {
            assert!(start.elapsed() < LONG, "{got} events came");
            got += u32::from(mail.recv_or_ready(&mut Vec::new(), LONG).is_ok());
        }
        sender.join().unwrap();
        assert!(start.elapsed() < LONG);
        assert_eq!(
            mail.recv_or_ready(&mut Vec::new(), Duration::ZERO).err(),
            Some(RecvTimeoutError::Disconnected)
        );
    }

    #[test]
    fn a_ready_descriptor_ends_the_wait() {
        let (_events, mail) = mailbox().unwrap();
        let (read, write) = nix::unistd::pipe().unwrap();
        nix::unistd::write(&write, &[1]).unwrap();
        let mut list = vec![libc::pollfd { fd: read.as_raw_fd(), events: libc::POLLIN, revents: 0 }];
        let start = Instant::now();
        assert_eq!(mail.recv_or_ready(&mut list, LONG).err(), Some(RecvTimeoutError::Timeout));
        assert!(start.elapsed() < LONG);
        assert_eq!((list.len(), list[0].revents), (1, libc::POLLIN));
    }
}
