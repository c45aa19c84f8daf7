//! SIGTERM, SIGINT and SIGHUP end the program in order.

use std::sync::OnceLock;

use nix::sys::signal::{SigSet, Signal};

use crate::runtime::{Event, Events, Quit};

static ON_END: OnceLock<Box<dyn Fn() + Send + Sync>> = OnceLock::new();

/// What else is to be done when a signal ends the program.
pub fn on_end(work: Box<dyn Fn() + Send + Sync>) {
    let _ = ON_END.set(work);
}

/// Block the signals in this thread (and those it starts) and wait for them on a thread of its own.
pub fn install(events: Events) -> std::io::Result<()> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block().map_err(std::io::Error::from)?;
    std::thread::Builder::new().name("signals".into()).spawn(move || loop {
        match set.wait() {
            Ok(signal) => {
                log::info!("ending on {signal}");
                if events.send(Event::Quit(Quit::HostSignal)).is_err() {
                    return;
                }
                if let Some(work) = ON_END.get() {
                    work();
                }
            }
            Err(_) => return,
        }
    })?;
    Ok(())
}
