//! The destination's side: pages come, are asked for, and are put where they are missing.

use std::collections::BTreeSet;
use std::io::{BufReader, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::pages::PageSet;
use super::small_pages;
use super::uffd::Uffd;
use crate::migration::channel::{listen, Channel, Uri};
use crate::migration::incoming::{arrived, ask, load, set, BUFFER};
use crate::migration::pages::Run;
use crate::migration::status::Status;
use crate::migration::stream::{Answer, Frame, Reader, PAGE};
use crate::runtime::control::Shared;
use crate::runtime::Events;

/// How often the thread that hears of faults looks whether it is still needed.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Whether the source gave the machine away, or why not.
type Given = Result<(), String>;

/// Where pages come from.
pub type Input = Reader<BufReader<Box<dyn Read + Send>>>;

/// A way to the source and back.
pub struct Connection {
    pub input: Input,
    pub output: Box<dyn Write + Send>,
    /// Ends whatever waits on it.
    pub stop: Arc<dyn Fn() + Send + Sync>,
}

/// What came before the machine can run without the rest.
pub struct Behind {
    pub session: u64,
    pub running: bool,
    pub state: Vec<u8>,
    pub received: PageSet,
}

/// A machine that runs, or is about to, while pages are missing.
pub struct Arriving {
    session: u64,
    received: PageSet,
    uffd: Uffd,
    /// Pages that were asked for and did not come yet.
    asked: Mutex<BTreeSet<u64>>,
    /// The way to the source, if there is one.
    back: Mutex<Option<Box<dyn Write + Send>>>,
    stop: Mutex<Arc<dyn Fn() + Send + Sync>>,
    /// Ends the waiting for another connection.
    stop_listening: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    next: Mutex<Sender<Connection>>,
    done: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Take the machine over, and the rest of its memory.
pub fn take_over(
    behind: Behind,
    connection: Connection,
    kernel: bool,
    shared: &Arc<Shared>,
    events: &Events,
) -> Result<(), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let Behind { session, running, state, received } = behind;
    let uffd = Uffd::open(kernel).map_err(|e| text(&e))?;
    for b in received.blocks.iter() {
        uffd.register(b.host, b.len as usize).map_err(|e| format!("userfaultfd: {e}"))?;
    }
    log::info!("migration: {} of {} pages are there", received.count(), received.blocks.pages());
    let (next, connections) = channel();
    let arriving = Arc::new(Arriving {
        session,
        received,
        uffd,
        asked: Mutex::default(),
        back: Mutex::new(Some(connection.output)),
        stop: Mutex::new(connection.stop),
        stop_listening: Mutex::default(),
        next: Mutex::new(next),
        done: AtomicBool::new(false),
    });
    shared.migration.set_arriving(Some(Arc::clone(&arriving)));
    let this = Arc::clone(&arriving);
    let thread = |name: &str| std::thread::Builder::new().name(name.into());
    thread("postcopy-fault").spawn(move || this.hear_faults()).map_err(|e| text(&e))?;
    let (go, given) = channel();
    let (this, hears) = (Arc::clone(&arriving), Arc::clone(shared));
    let input = connection.input;
    thread("postcopy-listen")
        .spawn(move || this.listen(input, go, &connections, &hears))
        .map_err(|e| text(&e))?;
    // This may touch missing pages already.
    if let Err(reason) = ask(events, move |rt| load(rt, running, &state)) {
        arriving.say(&Answer::Failed(reason.clone()));
        return Err(reason);
    }
    arriving.say(&Answer::Loaded);
    given.recv().map_err(|_| "the program ends".to_owned())??;
    ask(events, |rt| {
        arrived(rt, None);
        Ok(())
    })
}

impl Arriving {
    /// Put a page where it is missing.
    fn put(&self, gpa: u64, page: Option<&[u8; PAGE]>) -> Result<(), String> {
        let to = self.received.blocks.host(gpa).ok_or_else(|| format!("there is no RAM at {gpa:#x}"))?;
        if !self.received.contains(gpa) {
            self.uffd
                .put(to, page)
                .map_err(|e| format!("the page at {gpa:#x} cannot be put in its place: {e}"))?;
            // Now, not before: what is in the set and still missing was dropped by the guest's wish, and is zero.
            self.received.insert(gpa);
        }
        lock(&self.asked).remove(&gpa);
        Ok(())
    }

    /// The same with pages one behind the other.
    fn put_run(&self, gpa: u64, pages: &[u8]) -> Result<(), String> {
        let (mut gpa, mut rest) = (gpa, pages);
        while let Some((page, more)) = rest.split_first_chunk::<PAGE>() {
            let at = |n: usize| gpa.wrapping_add((n * PAGE) as u64);
            let first = self.received.blocks.host(gpa);
            // As far as they are missing, and one behind the other here, too.
            let put_here = |n: &usize| {
                let host = self.received.blocks.host(at(*n));
                !self.received.contains(at(*n)) && host.is_some() && host == first.map(|f| f + n * PAGE)
            };
            let missing = (0..rest.len() / PAGE).take_while(put_here).count();
            let done = match first {
                Some(to) if missing > 1 => self
                    .uffd
                    .put_run(to, &rest[..missing * PAGE])
                    .map_err(|e| format!("the pages at {gpa:#x} cannot be put in their place: {e}"))?,
                _ => 0,
            };
            if done == 0 {
                self.put(gpa, Some(page))?;
                (gpa, rest) = (at(1), more);
                continue;
            }
            for n in 0..done {
                self.received.insert(at(n));
            }
            let (from, end) = (gpa, at(done));
            lock(&self.asked).retain(|page| !(from..end).contains(page));
            (gpa, rest) = (end, rest.get(done * PAGE..).unwrap_or_default());
        }
        Ok(())
    }

    fn hear_faults(&self) {
        while !self.done.load(Ordering::Acquire) {
            match self.uffd.faults(LOOK_EVERY) {
                Ok(faults) => {
                    let pages: BTreeSet<u64> = faults
                        .into_iter()
                        .filter_map(|at| self.received.blocks.guest(at & !(PAGE - 1)))
                        .collect();
                    let wanted: Vec<u64> = pages.into_iter().filter(|gpa| self.is_wanted(*gpa)).collect();
                    if !wanted.is_empty() {
                        self.say(&Answer::Wanted(wanted));
                    }
                }
                Err(e) => {
                    log::error!("migration: missing pages are not heard of: {e}");
                    std::thread::sleep(LOOK_EVERY);
                }
            }
        }
    }

    /// Whether a page that somebody waits for is to be asked for.
    fn is_wanted(&self, gpa: u64) -> bool {
        if !self.received.contains(gpa) {
            return lock(&self.asked).insert(gpa);
        }
        // It was there: either it is, or it was dropped since (a balloon does that), which makes it zero.
        if let Some(at) = self.received.blocks.host(gpa) {
            match self.uffd.put(at, None) {
                Ok(true) => {}
                Ok(false) => drop(self.uffd.wake(at)),
                // All is there, and nothing is watched any more.
                Err(_) if self.done.load(Ordering::Acquire) => {}
                Err(e) => log::error!("migration: the page at {gpa:#x}: {e}"),
            }
        }
        false
    }

    /// Tell the source. If it does not hear, the other direction is broken too, and that is where it is noticed.
    fn say(&self, answer: &Answer) {
        if let Some(back) = lock(&self.back).as_mut() {
            if let Err(e) = answer.write(back) {
                log::debug!("migration: {e}");
            }
        }
    }

    fn listen(
        &self,
        mut input: Input,
        go: Sender<Given>,
        connections: &Receiver<Connection>,
        shared: &Shared,
    ) {
        let mut go = Some(go);
        while let Err(why) = self.pour(&mut input, &mut go, shared) {
            if let Some(go) = go.take() {
                // It is the source's machine still. Whoever waits here is let go, so that this program can end.
                self.forget();
                let _ = go.send(Err(format!("its sender did not give it away: {why}")));
                return;
            }
            log::warn!("migration: paused, since the connection is broken: {why}");
            *lock(&self.back) = None;
            shared.migration.state().error = Some(why);
            set(shared, Status::PostcopyPaused);
            let Ok(next) = connections.recv() else { return };
            input = next.input;
            *lock(&self.back) = Some(next.output);
            *lock(&self.stop) = next.stop;
            shared.migration.state().error = None;
            set(shared, Status::PostcopyActive);
            let again: Vec<u64> = lock(&self.asked).iter().copied().collect();
            if !again.is_empty() {
                self.say(&Answer::Wanted(again));
            }
        }
        self.forget();
        small_pages(&self.received.blocks, false);
        self.say(&Answer::Complete);
        shared.migration.set_arriving(None);
        log::info!("migration: all of the memory has come");
        set(shared, Status::Completed);
    }

    /// Take pages to the end, which is all of them.
    fn pour(&self, input: &mut Input, go: &mut Option<Sender<Given>>, shared: &Shared) -> Given {
        loop {
            match input.frame().map_err(|e| e.to_string())? {
                Frame::Pages(pages) => {
                    pages.runs().try_for_each(|(gpa, run)| match run {
                        Run::Full(contents) => self.put_run(gpa, contents),
                        Run::Zero => self.put(gpa, None),
                    })?;
                }
                Frame::Go => {
                    if let Some(go) = go.take() {
                        set(shared, Status::PostcopyActive);
                        let _ = go.send(Ok(()));
                    }
                }
                Frame::End { .. } if go.is_some() => return Err("it ends before it was given away".into()),
                Frame::End { .. } if self.received.is_full() => return Ok(()),
                Frame::End { .. } => return Err("its sender thinks that all pages were sent".into()),
                _ => return Err("its parts are not in their order".into()),
            }
        }
    }

    /// Nothing is waited for any more.
    fn forget(&self) {
        self.done.store(true, Ordering::Release);
        for b in self.received.blocks.iter() {
            if let Err(e) = self.uffd.unregister(b.host, b.len as usize) {
                log::error!("migration: userfaultfd: {e}");
            }
        }
    }

    /// `migrate-pause`: break the connection.
    pub fn pause(&self) {
        let stop = Arc::clone(&lock(&self.stop));
        stop();
    }

    /// One that called: is it the source, and goes on? Then it is told what is there.
    fn greet(&self, channel: Channel, shared: &Shared) -> Result<Connection, String> {
        let (Some(input), Some(mut output)) = (channel.input, channel.output) else {
            return Err("the channel does not go both ways".into());
        };
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let mut input = Reader::new(BufReader::with_capacity(BUFFER, input)).map_err(|e| text(&e))?;
        let session = match input.resumes {
            true => input.frame().map_err(|e| text(&e))?,
            false => Frame::Go,
        };
        if session != Frame::Resume(self.session) {
            let reason = "it does not go on with the migration that is paused here";
            let _ = Answer::Failed(reason.into()).write(&mut output);
            return Err(reason.into());
        }
        set(shared, Status::PostcopyRecover);
        Answer::Have(self.received.to_bytes()).write(&mut output).map_err(|e| text(&e))?;
        Ok(Connection { input, output, stop: channel.stop })
    }
}

/// `migrate-recover`: wait here for the source to go on.
pub fn recover(uri: &Uri, shared: &Arc<Shared>) -> Result<(), String> {
    let paused = shared.migration.state().status == Status::PostcopyPaused;
    let arriving = shared.migration.arriving().filter(|_| paused);
    let arriving = arriving.ok_or("Migrate recover can only be run when postcopy is paused.")?;
    // Another place that was named before is left.
    if let Some(stop) = lock(&arriving.stop_listening).take() {
        stop();
    }
    let mut listener = listen(uri).map_err(|e| e.to_string())?;
    shared.migration.state().addresses = listener.address().into_iter().collect();
    *lock(&arriving.stop_listening) = listener.stopper();
    let shared = Arc::clone(shared);
    let wait = move || loop {
        let channel = match listener.accept(|| shared.migration.tls_server()) {
            Ok(channel) => channel,
            Err(e) => return log::debug!("migration: nobody is waited for at that place any more: {e}"),
        };
        match arriving.greet(channel, &shared) {
            Ok(connection) => {
                lock(&arriving.stop_listening).take();
                let _ = lock(&arriving.next).send(connection);
                return;
            }
            Err(e) => {
                log::warn!("migration: a caller was sent away: {e}");
                set(&shared, Status::PostcopyPaused);
            }
        }
    };
    std::thread::Builder::new().name("postcopy-recover".into()).spawn(wait).map_err(|e| e.to_string())?;
    Ok(())
}
