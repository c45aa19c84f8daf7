//! The threads of a machine's source: one writes the stream, one hears the destination's answers.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::channel::{Channel, Client};
use super::outgoing::on_news;
use super::pages::Pages;
use super::status::Migration;
use super::stream::{self, Answer, Frame};
use crate::runtime::{Event, Events};

/// How long a reason may take behind a connection that broke.
const REASON_WITHIN: Duration = Duration::from_millis(500);
/// For how long bytes are counted to keep to a bandwidth.
const MEASURE_EVERY: Duration = Duration::from_millis(100);

/// What the sender's thread is to do.
enum Work {
    Frame(Frame),
    /// There is a page that is waited for.
    Urgent,
    /// All frames are there: send what waits, and hear the answer.
    Finish,
    /// Give the machine away.
    Go,
}

/// What the threads have to say.
pub enum News {
    /// Everything is on its way, and nobody answers.
    Written,
    /// The destination has everything that it needs to run.
    Loaded,
    /// It was told that the machine is its own.
    Given,
    /// It waits for these pages.
    Wanted(Vec<u64>),
    /// It has these pages of those that were sent before the connection broke.
    Have(Vec<u8>),
    /// It has all pages.
    Complete,
    Failed(String),
    /// The machine could not be given away.
    NotGiven(String),
}

/// The thread that writes the stream, seen from the machine thread.
pub struct Writer {
    work: Sender<Work>,
    urgent: Arc<Mutex<VecDeque<Frame>>>,
    /// Bytes of pages that wait for the channel.
    pub queued: Arc<AtomicUsize>,
    /// No limit of bandwidth any more: the machine stands still.
    pub hurry: Arc<AtomicBool>,
    /// Pages come behind the state.
    pub posts: Arc<AtomicBool>,
    /// Ends whatever waits on the channel.
    pub stop: Arc<dyn Fn() + Send + Sync>,
    frames: u64,
}

impl Writer {
    /// Send a frame when those before it are sent.
    pub fn send(&mut self, frame: Frame) {
        if let Frame::Pages(pages) = &frame {
            self.queued.fetch_add(pages.bytes(), Ordering::Relaxed);
        }
        self.frames += 1;
        let _ = self.work.send(Work::Frame(frame));
    }

    /// Send pages before all others that wait.
    pub fn send_first(&mut self, pages: Pages) {
        self.frames += 1;
        self.urgent.lock().unwrap_or_else(PoisonError::into_inner).push_back(Frame::Pages(pages));
        let _ = self.work.send(Work::Urgent);
    }

    /// Say that this is all, and wait for the answer.
    pub fn end(&mut self) {
        let frames = self.frames;
        self.send(Frame::End { frames });
        self.finish();
    }

    /// Nothing waits any more; the answer counts.
    pub fn finish(&self) {
        let _ = self.work.send(Work::Finish);
    }

    /// Give the machine away.
    pub fn go(&self) {
        let _ = self.work.send(Work::Go);
    }
}

/// Start the threads. The stream's head has these flags.
pub fn spawn(
    channel: Channel,
    tls: Option<Client>,
    flags: u32,
    id: u64,
    migration: &Arc<Migration>,
    events: Events,
) -> std::io::Result<Writer> {
    let (work, queue) = mpsc::channel();
    let urgent: Arc<Mutex<VecDeque<Frame>>> = Arc::default();
    let queued = Arc::new(AtomicUsize::new(0));
    let hurry = Arc::new(AtomicBool::new(false));
    let posts = Arc::new(AtomicBool::new(flags & stream::RESUME != 0));
    let stop = Arc::clone(&channel.stop);
    let sender = Sending {
        urgent: Arc::clone(&urgent),
        queued: Arc::clone(&queued),
        hurry: Arc::clone(&hurry),
        posts: Arc::clone(&posts),
        migration: Arc::clone(migration),
        flags,
        pack: migration.has("compress"),
    };
    let answers = Arc::clone(&posts);
    std::thread::Builder::new().name("migration".into()).spawn(move || {
        let say = teller(events.clone(), id);
        let mut channel = match &tls {
            None => channel,
            Some(tls) => match channel.secure(tls) {
                Ok(channel) => channel,
                Err(e) => return say(News::Failed(e)),
            },
        };
        let heard = Arc::new(AtomicBool::new(false));
        let listening = match channel.input.take().filter(|_| channel.output.is_some()) {
            Some(input) => listen(input, Arc::clone(&heard), answers, teller(events, id)).map(|()| true),
            None => Ok(false),
        };
        let sent = listening
            .map_err(|e| e.to_string())
            .and_then(|answers| sender.run(channel, answers, &queue, &say));
        if let Err(e) = sent {
            // A destination that refuses says why, and hangs up: the reason counts.
            let until = Instant::now() + REASON_WITHIN;
            while !heard.load(Ordering::SeqCst) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(5));
            }
            if !heard.load(Ordering::SeqCst) {
                say(News::Failed(e));
            }
        }
    })?;
    Ok(Writer { work, urgent, queued, hurry, posts, stop, frames: 0 })
}

/// Tells the machine thread.
fn teller(events: Events, id: u64) -> impl Fn(News) + Send {
    move |news| drop(events.send(Event::Call(Box::new(move |rt| on_news(rt, id, news)))))
}

/// Hear the destination's answer whenever it comes; in post-copy there are more than one.
fn listen(
    mut input: Box<dyn Read + Send>,
    heard: Arc<AtomicBool>,
    posts: Arc<AtomicBool>,
    say: impl Fn(News) + Send + 'static,
) -> std::io::Result<()> {
    let hear = move || loop {
        let (news, more) = match Answer::read(&mut input) {
            Ok(Answer::Loaded) => (News::Loaded, posts.load(Ordering::SeqCst)),
            Ok(Answer::Wanted(pages)) => (News::Wanted(pages), true),
            Ok(Answer::Have(pages)) => (News::Have(pages), true),
            Ok(Answer::Complete) => (News::Complete, false),
            Ok(Answer::Failed(reason)) => {
                (News::Failed(format!("the destination refuses the machine: {reason}")), false)
            }
            Ok(Answer::Go) => {
                (News::Failed("the destination gave an answer that makes no sense".into()), false)
            }
            Err(e) => (News::Failed(format!("the destination hung up: {e}")), false),
        };
        if !more {
            heard.store(true, Ordering::SeqCst);
        }
        say(news);
        if !more {
            return;
        }
    };
    std::thread::Builder::new().name("migration-answer".into()).spawn(hear).map(drop)
}

/// The sender's thread.
struct Sending {
    urgent: Arc<Mutex<VecDeque<Frame>>>,
    queued: Arc<AtomicUsize>,
    hurry: Arc<AtomicBool>,
    posts: Arc<AtomicBool>,
    migration: Arc<Migration>,
    flags: u32,
    pack: bool,
}

impl Sending {
    fn run(
        &self,
        channel: Channel,
        answers: bool,
        queue: &Receiver<Work>,
        say: &dyn Fn(News),
    ) -> Result<(), String> {
        let text = |e: &dyn std::fmt::Display| format!("the machine cannot be sent: {e}");
        let (Some(mut output), child) = (channel.output, channel.child) else {
            return Err("the channel has no way out".into());
        };
        let head = stream::head(self.flags);
        output.write_all(&head).map_err(|e| text(&e))?;
        self.migration.sent.fetch_add(head.len() as u64, Ordering::Relaxed);
        let (mut window, mut in_window) = (Instant::now(), 0u64);
        let mut behind = self.flags & stream::RESUME != 0;
        while let Ok(work) = queue.recv() {
            loop {
                let urgent = self.urgent.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                let Some(frame) = urgent else { break };
                self.put(output.as_mut(), &frame).map_err(|e| text(&e))?;
            }
            match work {
                Work::Frame(frame) => {
                    let queued = if let Frame::Pages(p) = &frame { p.bytes() } else { 0 };
                    if frame == Frame::Postcopy {
                        // What was sent in a hurry before is not made up for: now somebody waits.
                        (behind, window, in_window) = (true, Instant::now(), 0);
                    }
                    in_window += self.put(output.as_mut(), &frame).map_err(|e| text(&e))?;
                    self.queued.fetch_sub(queued, Ordering::Relaxed);
                    self.pace(&mut window, &mut in_window, behind);
                }
                Work::Urgent => {}
                Work::Finish => {
                    output.flush().map_err(|e| text(&e))?;
                    if !answers {
                        drop(output);
                        Channel::finish(child)?;
                        say(News::Written);
                        return Ok(());
                    }
                }
                Work::Go => {
                    if let Err(e) = Answer::Go.write(&mut output) {
                        say(News::NotGiven(text(&e)));
                        return Ok(());
                    }
                    say(News::Given);
                    if !self.posts.load(Ordering::SeqCst) {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    fn put(&self, output: &mut dyn Write, frame: &Frame) -> std::io::Result<u64> {
        let bytes = frame.write(output, self.pack)?;
        self.migration.sent.fetch_add(bytes, Ordering::Relaxed);
        Ok(bytes)
    }

    /// Keep to the bandwidth that the user allows; `behind` the state it is another.
    fn pace(&self, window: &mut Instant, in_window: &mut u64, behind: bool) {
        let bandwidth = if behind { &self.migration.postcopy_bandwidth } else { &self.migration.bandwidth };
        let limit = bandwidth.load(Ordering::Relaxed);
        // Behind the state the machine runs again, and somebody may wait.
        let hurried = || match behind {
            true => !self.urgent.lock().unwrap_or_else(PoisonError::into_inner).is_empty(),
            false => self.hurry.load(Ordering::Relaxed),
        };
        if limit == 0 || hurried() {
            return;
        }
        let due = Duration::from_secs_f64(*in_window as f64 / limit as f64);
        // In small pieces: the limit may change, and the machine may stop meanwhile.
        while window.elapsed() < due && !hurried() {
            let left = due.saturating_sub(window.elapsed());
            std::thread::sleep(left.min(Duration::from_millis(if behind { 1 } else { 5 })));
            if bandwidth.load(Ordering::Relaxed) != limit {
                break;
            }
        }
        if window.elapsed() > MEASURE_EVERY {
            *window = Instant::now();
            *in_window = 0;
        }
    }
}
