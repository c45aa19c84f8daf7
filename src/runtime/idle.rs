//! How the machine thread waits while the processors are idle.
//!
//! To fall asleep and be woken takes longer than many a request does, so the thread looks out for a short while before it
//! sleeps, as KVM does (`halt_poll_ns`): for longer when what it waited for came soon, for a shorter time and finally not at
//! all when it did not, and not while others want the host's processor.
//!
//! And it serves those networks itself that would otherwise pass on what arrives by a thread of their own; while the guest
//! computes, that thread serves them.

use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use nix::sys::resource::{getrusage, UsageWho};

use super::mail::{poll, Mailbox};
use super::Event;
use crate::host::Outside;

/// The longest that the thread looks out.
const MOST: Duration = Duration::from_micros(100);
/// The shortest.
const LEAST: Duration = Duration::from_micros(10);
/// One look that took this long was interrupted: somebody else wants the processor.
const STOLEN: Duration = Duration::from_micros(30);
/// For so long it does not look out when the processor was taken away from it.
const MODEST: Duration = Duration::from_millis(10);
/// The guest computes for so long before the networks are left to their own threads.
const BUSY: Duration = Duration::from_millis(2);

/// The machine thread's way to wait.
pub struct Idle {
    list: Vec<libc::pollfd>,
    lookout: Duration,
    /// How often the processor was taken away from the thread, and when that was noticed last.
    taken: i64,
    noticed: Option<Instant>,
    /// Networks are served here.
    attending: bool,
    /// When it waited last.
    since: Instant,
}

impl Default for Idle {
    fn default() -> Self {
        Idle {
            list: Vec::new(),
            lookout: Duration::ZERO,
            taken: 0,
            noticed: None,
            attending: false,
            since: Instant::now(),
        }
    }
}

impl Idle {
    /// The next event, if it comes within this time.
    pub fn wait(
        &mut self,
        mail: &Mailbox,
        outside: &Outside,
        at_most: Duration,
    ) -> Result<Event, RecvTimeoutError> {
        if let Ok(event) = mail.try_recv() {
            return Ok(event);
        }
        let start = Instant::now();
        let mut looked = false;
        let result = loop {
            self.list.clear();
            let due = outside.attend_nets(&mut self.list);
            self.attending = due.is_some();
            let left = at_most.saturating_sub(start.elapsed());
            let most = due.map_or(left, |due| due.min(left));
            let mut result = Err(RecvTimeoutError::Timeout);
            let mut ready = false;
            if !std::mem::replace(&mut looked, true) {
                (result, ready) = self.look_out(mail, start, most);
            }
            if result.is_err() && !ready {
                result = if self.attending {
                    mail.recv_or_ready(&mut self.list, most.saturating_sub(start.elapsed()))
                } else {
                    mail.recv_timeout(most.saturating_sub(start.elapsed()))
                };
            }
            if self.attending {
                outside.serve_nets(&self.list);
            }
            if !matches!(result, Err(RecvTimeoutError::Timeout)) {
                break result;
            }
            if let Ok(event) = mail.try_recv() {
                break Ok(event);
            }
            if start.elapsed() >= at_most {
                break result;
            }
        };
        self.since = Instant::now();
        self.adapt(self.since - start);
        result
    }

    /// Look out for an event, or for a descriptor that is ready, without going to sleep.
    fn look_out(
        &mut self,
        mail: &Mailbox,
        start: Instant,
        most: Duration,
    ) -> (Result<Event, RecvTimeoutError>, bool) {
        let most = most.min(self.lookout);
        if most.is_zero() || self.is_modest(start) {
            return (Err(RecvTimeoutError::Timeout), false);
        }
        let mut last = start;
        while last - start < most {
            if let Ok(event) = mail.try_recv() {
                return (Ok(event), false);
            }
            if !self.list.is_empty() && poll(&mut self.list, Duration::ZERO) {
                return (Err(RecvTimeoutError::Timeout), true);
            }
            std::hint::spin_loop();
            let now = Instant::now();
            if now - last > STOLEN {
                self.noticed = Some(now);
                break;
            }
            last = now;
        }
        (Err(RecvTimeoutError::Timeout), false)
    }

    /// Whether others wanted the processor of late.
    fn is_modest(&mut self, now: Instant) -> bool {
        let taken = getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |u| u.involuntary_context_switches());
        if std::mem::replace(&mut self.taken, taken) != taken {
            self.noticed = Some(now);
        }
        self.noticed.is_some_and(|n| now.saturating_duration_since(n) < MODEST)
    }

    /// It waited for this long.
    fn adapt(&mut self, waited: Duration) {
        if waited > MOST {
            self.lookout = if self.lookout > LEAST { self.lookout / 2 } else { Duration::ZERO };
        } else if waited > self.lookout {
            self.lookout = MOST.min(LEAST.max(self.lookout * 2));
        }
    }

    /// The guest computed, and does so still if its time was up.
    pub fn computed(&mut self, outside: &Outside, limit: bool) {
        if !self.attending {
            return;
        }
        if self.since.elapsed() > BUSY {
            return self.leave(outside);
        }
        if limit {
            self.list.clear();
            outside.attend_nets(&mut self.list);
            poll(&mut self.list, Duration::ZERO);
            outside.serve_nets(&self.list);
        }
    }

    /// The networks' own threads serve them.
    pub fn leave(&mut self, outside: &Outside) {
        if std::mem::take(&mut self.attending) {
            outside.leave_nets();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::mail::mailbox;
    use super::*;

    #[test]
    fn it_looks_out_while_events_come_soon_and_not_when_nothing_happens() {
        let mut idle = Idle::default();
        for _ in 0..5 {
            idle.adapt(MOST / 2);
        }
        assert!(idle.lookout >= MOST / 2);
        for _ in 0..10 {
            idle.adapt(Duration::from_millis(4));
        }
        assert_eq!(idle.lookout, Duration::ZERO);
    }

    #[test]
    fn what_came_is_told_and_nothing_is_awaited_longer_than_asked() {
        let (events, mail) = mailbox().unwrap();
        let (mut idle, outside) = (Idle::default(), Outside::default());
        assert!(events.send(Event::Woken).is_ok());
        assert!(matches!(idle.wait(&mail, &outside, Duration::from_secs(9)), Ok(Event::Woken)));
        let start = Instant::now();
        let nothing = idle.wait(&mail, &outside, Duration::from_millis(3));
        assert_eq!(nothing.err(), Some(RecvTimeoutError::Timeout));
        assert!((Duration::from_millis(3)..Duration::from_secs(5)).contains(&start.elapsed()));
        drop(events);
        let ended = idle.wait(&mail, &outside, Duration::from_secs(9));
        assert_eq!(ended.err(), Some(RecvTimeoutError::Disconnected));
    }
}
