//! The destination: takes memory and state, holds the images, and runs when the source says so.

use std::io::{BufReader, Read};
use std::sync::mpsc::{channel, sync_channel, Receiver, SyncSender};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ftvm_accel::mem::{DIRTY_HASH, DIRTY_MIGRATION};
use serde_json::json;

use super::channel::{listen, Channel, ChannelError, Listener, Uri};
use super::pages::{is_zero, Pages};
use super::postcopy;
use super::postcopy::arriving::{self, Behind, Connection, Input};
use super::postcopy::pages::PageSet;
use super::status::Status;
use super::stream::{Answer, Frame, MachineInfo, Reader, PAGE};
use crate::machine::MachineState;
use crate::runtime::control::{RunState, Shared};
use crate::runtime::live::Runtime;
use crate::runtime::{Event, Events};

/// Frames of pages (1 MiB each at the most) that may wait for the machine thread. The source takes what it could send for what has
/// arrived: all that waits here when it stops is waited for.
const WINDOW: usize = 4;
/// What is read at once where less is asked for: contents of pages go where they belong without a stop in between.
pub const BUFFER: usize = 64 << 10;
/// The images may take a moment to become free on the other host.
const IMAGES_WITHIN: Duration = Duration::from_secs(5);
/// The sender's patience with a refusal.
const REASON_WITHIN: Duration = Duration::from_secs(2);

/// A machine that waits to be filled.
#[derive(Default)]
pub struct Incoming {
    ran: bool,
}

/// What is told of a machine that comes.
pub fn set(shared: &Shared, status: Status) {
    shared.migration.state().status = status;
    if shared.migration.has("events") {
        shared.events.emit("MIGRATION", json!({"status": status.word()}));
    }
}

/// Open the way in, and wait on a thread of its own.
pub fn start(uri: &Uri, shared: &Arc<Shared>, events: &Events) -> Result<(), ChannelError> {
    let listener = listen(uri)?;
    {
        let mut s = shared.migration.state();
        s.incoming = true;
        s.error = None;
        s.addresses = listener.address().into_iter().collect();
    }
    set(shared, Status::Setup);
    let (shared, events) = (Arc::clone(shared), events.clone());
    let spawned = std::thread::Builder::new().name("incoming".into()).spawn(move || {
        if let Err(e) = receive(listener, &shared, &events) {
            shared.migration.state().error = Some(e.clone());
            set(&shared, Status::Failed);
            let _ = events.send(Event::Fail(format!("the machine did not arrive: {e}")));
        }
    });
    spawned.map(drop).map_err(|e| ChannelError::Io("migration".into(), e))
}

/// Ask the machine thread, and wait.
pub fn ask<T: Send + 'static>(
    events: &Events,
    work: impl FnOnce(&mut Runtime) -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let (sender, receiver) = channel();
    let call = Box::new(move |rt: &mut Runtime| drop(sender.send(work(rt))));
    let ended = || "the program ends".to_owned();
    events.send(Event::Call(call)).map_err(|_| ended())?;
    receiver.recv().map_err(|_| ended())?
}

fn receive(mut listener: Listener, shared: &Arc<Shared>, events: &Events) -> Result<(), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let channel = listener.accept(|| shared.migration.tls_server())?;
    set(shared, Status::Active);
    drop(listener);
    let (Some(input), mut output, child, stop) = (channel.input, channel.output, channel.child, channel.stop)
    else {
        return Err("the channel has no way in".into());
    };
    let mut reader = Reader::new(BufReader::with_capacity(BUFFER, input)).map_err(|e| text(&e))?;
    if reader.answers && output.is_none() {
        return Err("its sender waits for answers, which this channel does not carry".into());
    }
    let answers = reader.answers;
    let taken = take(&mut reader, events);
    if let (Err(reason), Some(output), true) = (&taken, &mut output, answers) {
        let _ = Answer::Failed(reason.clone()).write(output);
        // What is on its way already is let in, so that the connection does not break before the reason is read.
        let until = Instant::now() + REASON_WITHIN;
        let mut rest = [0; 65536];
        while Instant::now() < until && reader.input().read(&mut rest).is_ok_and(|n| n > 0) {}
    }
    if let Some((behind, kernel)) = taken? {
        let output = output.ok_or("a post-copy needs a channel that goes both ways")?;
        let connection = Connection { input: reader, output, stop };
        return arriving::take_over(behind, connection, kernel, shared, events);
    }
    if let (Some(output), true) = (&mut output, answers) {
        Answer::Loaded.write(output).map_err(|e| text(&e))?;
        match Answer::read(reader.input()) {
            Ok(Answer::Go) => {}
            Ok(_) => return Err("its sender gave an answer that makes no sense".into()),
            Err(e) => return Err(format!("its sender did not give it away: {e}")),
        }
    } else {
        Channel::finish(child)?;
    }
    ask(events, |rt| {
        arrived(rt, Some(Status::Completed));
        Ok(())
    })
}

/// What comes in post-copy, and whether the kernel will touch its memory too.
type Rest = (Behind, bool);

/// Take frames to the end, and make the machine complete; or to where the rest comes in post-copy.
fn take(reader: &mut Input, events: &Events) -> Result<Option<Rest>, String> {
    if reader.resumes {
        return Err("it goes on with a migration that is not paused here".into());
    }
    let mut received = match reader.postcopy {
        true => Some(PageSet::new(ask(events, postcopy::prepare)?)),
        false => None,
    };
    let mut session = 0;
    let (free, window): (SyncSender<()>, Receiver<()>) = sync_channel(WINDOW);
    for _ in 0..WINDOW {
        let _ = free.try_send(());
    }
    let (wrong, bad) = channel::<String>();
    let mut state = None;
    loop {
        if let Ok(reason) = bad.try_recv() {
            return Err(reason);
        }
        match reader.frame().map_err(|e| e.to_string())? {
            Frame::Machine(info) => ask(events, move |rt| compare(rt, info))?,
            Frame::Pages(pages) => {
                if let Some(received) = &received {
                    for (gpa, _) in pages.iter() {
                        received.insert(gpa);
                    }
                }
                window.recv().map_err(|_| "the program ends".to_owned())?;
                let (free, wrong) = (free.clone(), wrong.clone());
                let call = Box::new(move |rt: &mut Runtime| {
                    if let Err(e) = put(rt, &pages) {
                        let _ = wrong.send(e);
                    }
                    let _ = free.try_send(());
                });
                events.send(Event::Call(call)).map_err(|_| "the program ends".to_owned())?;
            }
            Frame::State { running, state: bytes } => state = Some((running, bytes)),
            Frame::Advise(number) => session = number,
            Frame::Discard(runs) => {
                let set = received.as_ref().ok_or("it discards pages out of place")?;
                runs.iter().for_each(|(gpa, pages)| set.remove(*gpa, *pages));
                // Pages that came before it are in their places by then.
                ask(events, move |rt| postcopy::discard(&rt.machine.memory().blocks(), &runs))?;
            }
            Frame::Postcopy => {
                let kernel = ask(events, |rt| Ok(rt.machine.is_hardware()))?;
                if let Ok(reason) = bad.try_recv() {
                    return Err(reason);
                }
                let (Some((running, state)), Some(received)) = (state, received.take()) else {
                    return Err("it came without its state".into());
                };
                return Ok(Some((Behind { session, running, state, received }, kernel)));
            }
            Frame::Resume(_) | Frame::Go => return Err("its parts are not in their order".into()),
            Frame::End { .. } => break,
        }
    }
    let Some((running, bytes)) = state else { return Err("it came without its state".into()) };
    ask(events, move |rt| load(rt, running, &bytes))?;
    // Pages were put before the state; what was wrong with them is known now.
    match bad.try_recv() {
        Ok(reason) => Err(reason),
        Err(_) => Ok(None),
    }
}

/// Whether the machine that comes is this one.
pub fn compare(rt: &mut Runtime, info: MachineInfo) -> Result<(), String> {
    let Some(home) = &rt.home else { return Err("this machine cannot take another's state".into()) };
    if let Some(difference) =
        crate::assembly::Blueprint::fingerprint_difference(&info.identity, &home.identity)
    {
        return Err(format!("it is another machine: {difference}"));
    }
    if info.firmware != home.firmware {
        log::info!("migration: the firmware of '{}' is used until the machine ends", info.program);
        rt.machine.memory().set_firmware(info.firmware).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// Put pages into guest memory.
pub fn put(rt: &mut Runtime, pages: &Pages) -> Result<(), String> {
    let mem = rt.machine.memory();
    let mut old = [0u8; PAGE];
    for (gpa, page) in pages.iter() {
        let done = match page {
            Some(page) => mem.write(gpa, page),
            // Memory that was never touched is zero, and stays untouched.
            None => mem.read(gpa, &mut old).and_then(|()| match is_zero(&old) {
                true => Ok(()),
                false => mem.write(gpa, &[0; PAGE]),
            }),
        };
        done.map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// Load the state of everything but RAM, and open the images.
pub fn load(rt: &mut Runtime, running: bool, bytes: &[u8]) -> Result<(), String> {
    restore(rt, bytes)?;
    if let Some(incoming) = &mut rt.incoming {
        incoming.ran = running;
    }
    rt.images_away = true;
    let until = Instant::now() + IMAGES_WITHIN;
    loop {
        match rt.fetch_images() {
            Ok(()) => return Ok(()),
            Err(e) if Instant::now() >= until => return Err(e),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Load a state into the machine, whose memory is in place.
pub fn restore(rt: &mut Runtime, bytes: &[u8]) -> Result<(), String> {
    let state = MachineState::from_bytes(bytes).map_err(|e| e.to_string())?;
    rt.machine.load(&state).map_err(|e| e.to_string())?;
    rt.machine.memory().set_all_dirty(DIRTY_MIGRATION | DIRTY_HASH);
    // What was plugged in on the other host may be part of this host's command line; then its own view holds.
    let own = rt.shared.backends().to_note();
    let mut mine = rt.shared.backends();
    if !rt.machine.note().is_empty() && !mine.has_all_of(rt.machine.note()) {
        mine.take_note(rt.machine.note());
    } else if !rt.machine.note().is_empty() {
        drop(mine);
        rt.input(crate::machine::MachineInput::Note(own));
    }
    Ok(())
}

/// The machine is this side's; the status of its migration is `status` now.
pub fn arrived(rt: &mut Runtime, status: Option<Status>) {
    let Some(incoming) = rt.incoming.take() else { return };
    rt.restart_pace();
    if let Some(status) = status {
        set(&rt.shared, status);
    }
    rt.shared.migration.state().addresses.clear();
    for output in rt.machine.pending_disk() {
        rt.outside.perform(output);
    }
    rt.announce();
    log::info!("migration: the machine has arrived");
    rt.shared.set_state(RunState::Paused);
    if incoming.ran && rt.autostart {
        rt.cont();
    }
}
