//! Several front ends on one character device (`mux=on`), as QEMU's: what any of them writes goes out, what is typed goes to the one in
//! front, and Ctrl-A is the key for the device itself.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use super::chars::{self, CharError, CharSink, Opened, Typed};
use crate::cli::Char;

/// Front ends on one device at the most.
const MOST: usize = 4;
/// Ctrl-A
const ESCAPE: u8 = 0x01;

const HELP: &str =
    "C-a h    print this help\r\nC-a x    exit emulator\r\nC-a s    save disk data back to file (if -snapshot)\r\n\
                    C-a t    toggle console timestamps\r\nC-a b    send break (magic sysrq)\r\nC-a c    switch between console and monitor\r\nC-a C-a  sends C-a\r\n";

/// What a front end is told.
pub struct Front {
    /// Bytes that were typed for it.
    pub typed: Typed,
    /// Whether somebody is at the other end.
    pub opened: Opened,
    /// Whether it is in front.
    pub focus: Opened,
    /// A break was sent to it.
    pub broken: Box<dyn FnMut() + Send>,
}

/// What keys of the device itself do elsewhere.
pub struct Keys {
    /// End the program.
    pub exit: Box<dyn Fn() + Send + Sync>,
    /// Write what images keep in front of others into those; what there is to say.
    pub commit: Box<dyn Fn() -> String + Send + Sync>,
}

#[derive(Default)]
struct State {
    fronts: Vec<Front>,
    focus: usize,
    open: bool,
    escape: bool,
    /// Each line of output begins with the time since then.
    stamps: Option<Instant>,
    /// The output is in the middle of a line.
    within: bool,
}

/// A device with several front ends.
pub struct Mux {
    state: Mutex<State>,
    sink: OnceLock<CharSink>,
    keys: Keys,
}

impl Mux {
    /// Open `dev`; `keys` is what Ctrl-A x and s do.
    pub fn open(dev: &Char, label: &str, keys: Keys) -> Result<Arc<Mux>, CharError> {
        let mux = Arc::new(Mux { state: Mutex::default(), sink: OnceLock::new(), keys });
        let (typed, opened) = (Arc::clone(&mux), Arc::clone(&mux));
        let typed: Typed = Box::new(move |bytes| typed.typed(bytes));
        let opened: Opened = Box::new(move |open| opened.opened(open));
        let sink = chars::open(dev, label, typed, opened)?;
        let _ = mux.sink.set(sink);
        Ok(mux)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Add a front end, which is in front from now on, or only if it is alone; where its output goes.
    pub fn attach(self: &Arc<Self>, mut front: Front, in_front: bool) -> Result<CharSink, String> {
        let mut state = self.lock();
        if state.fronts.len() == MOST {
            return Err(format!("too many uses of a multiplexed chardev (maximum is {MOST})"));
        }
        if state.open {
            (front.opened)(true);
        }
        state.fronts.push(front);
        if in_front {
            state.focus = state.fronts.len() - 1;
        }
        drop(state);
        Ok(CharSink::through(Arc::clone(self), self.label()))
    }

    /// What a person can be told of the device.
    fn label(&self) -> String {
        self.sink.get().map_or_else(String::new, |s| s.label.clone())
    }

    /// Output of a front end.
    pub fn write(&self, bytes: &[u8]) {
        let Some(sink) = self.sink.get() else { return };
        let mut state = self.lock();
        let Some(since) = state.stamps else { return sink.write(bytes) };
        let mut out = Vec::with_capacity(bytes.len() + 32);
        for byte in bytes {
            if !state.within {
                let ms = since.elapsed().as_millis();
                let (h, m, s) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60);
                out.extend(format!("[{h:02}:{m:02}:{s:02}.{:03}] ", ms % 1000).bytes());
            }
            state.within = *byte != b'\n';
            out.push(*byte);
        }
        sink.write(&out);
    }

    /// Wait until what was written has left.
    pub fn drain(&self) {
        if let Some(sink) = self.sink.get() {
            sink.drain();
        }
    }

    fn opened(&self, open: bool) {
        let mut state = self.lock();
        state.open = open;
        for at in 0..state.fronts.len() {
            let nothing: Opened = Box::new(|_| {});
            let mut opened = std::mem::replace(&mut state.fronts[at].opened, nothing);
            drop(state);
            opened(open);
            state = self.lock();
            state.fronts[at].opened = opened;
        }
        drop(state);
        if open {
            self.show(true);
        }
    }

    fn typed(&self, bytes: &[u8]) {
        let mut run = Vec::new();
        for byte in bytes {
            let mut state = self.lock();
            if !std::mem::take(&mut state.escape) {
                match *byte {
                    ESCAPE => state.escape = true,
                    other => run.push(other),
                }
                continue;
            }
            if *byte == ESCAPE {
                run.push(ESCAPE);
                continue;
            }
            drop(state);
            self.deliver(&mut run);
            self.command(*byte);
        }
        self.deliver(&mut run);
    }

    /// Give the front end in front what was typed for it. Its output comes back to `write`, so nothing is held meanwhile.
    fn deliver(&self, run: &mut Vec<u8>) {
        if run.is_empty() {
            return;
        }
        let mut state = self.lock();
        let at = state.focus;
        let nobody: Typed = Box::new(|_| {});
        let Some(front) = state.fronts.get_mut(at) else { return run.clear() };
        let mut typed = std::mem::replace(&mut front.typed, nobody);
        drop(state);
        typed(run);
        run.clear();
        if let Some(front) = self.lock().fronts.get_mut(at) {
            front.typed = typed;
        }
    }

    /// What follows Ctrl-A.
    fn command(&self, byte: u8) {
        match byte {
            b'h' | b'?' => self.write(HELP.as_bytes()),
            b'x' => {
                self.write(b"ftvm: Terminated\r\n");
                (self.keys.exit)();
            }
            b't' => {
                let mut state = self.lock();
                state.stamps = match state.stamps {
                    None => Some(Instant::now()),
                    Some(_) => None,
                };
            }
            b'c' => self.switch(),
            b'b' => {
                let mut state = self.lock();
                let at = state.focus;
                if let Some(front) = state.fronts.get_mut(at) {
                    (front.broken)();
                }
            }
            b's' => {
                let said = (self.keys.commit)();
                self.write(said.as_bytes());
            }
            _ => {}
        }
    }

    /// Whether there is one front end only.
    pub fn is_alone(&self) -> bool {
        self.lock().fronts.len() == 1
    }

    /// Tell the front end in front that it is, or is not any more.
    pub fn show(&self, now: bool) {
        let mut state = self.lock();
        let at = state.focus;
        let nothing: Opened = Box::new(|_| {});
        let Some(front) = state.fronts.get_mut(at) else { return };
        let mut focus = std::mem::replace(&mut front.focus, nothing);
        drop(state);
        focus(now);
        if let Some(front) = self.lock().fronts.get_mut(at) {
            front.focus = focus;
        }
    }

    fn switch(&self) {
        self.show(false);
        {
            let mut state = self.lock();
            state.focus = (state.focus + 1) % state.fronts.len().max(1);
        }
        self.show(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Log = Arc<Mutex<Vec<String>>>;

    fn front(name: &'static str, log: &Log) -> Front {
        let note = |log: &Log| {
            let log = Arc::clone(log);
            move |text: String| log.lock().unwrap().push(format!("{name} {text}"))
        };
        let (a, b, c, d) = (note(log), note(log), note(log), note(log));
        Front {
            typed: Box::new(move |bytes| a(String::from_utf8_lossy(bytes).into_owned())),
            opened: Box::new(move |open| b(format!("open {open}"))),
            focus: Box::new(move |focus| c(format!("focus {focus}"))),
            broken: Box::new(move || d("break".into())),
        }
    }

    #[test]
    fn the_escape_key_leads_what_is_typed() {
        let (log, ended) = (Log::default(), Arc::new(Mutex::new(0)));
        let end = Arc::clone(&ended);
        let saved = Arc::clone(&log);
        let keys = Keys {
            exit: Box::new(move || *end.lock().unwrap() += 1),
            commit: Box::new(move || {
                saved.lock().unwrap().push("commit".into());
                String::new()
            }),
        };
        let mux = Mux::open(&Char::Null, "x", keys).unwrap();
        for name in ["monitor", "serial"] {
            mux.attach(front(name, &log), true).unwrap();
        }
        log.lock().unwrap().clear();
        mux.typed(b"ab\x01\x01\x01");
        mux.typed(b"cde\x01cf\x01x\x01?\x01zg\x01b\x01sh");
        let want = [
            "serial ab\u{1}",
            "serial focus false",
            "monitor focus true",
            "monitor de",
            "monitor focus false",
        ];
        assert_eq!(log.lock().unwrap()[..5], want);
        assert_eq!(
            log.lock().unwrap()[5..],
            ["serial focus true", "serial f", "serial g", "serial break", "commit", "serial h"]
        );
        assert_eq!(*ended.lock().unwrap(), 1);
        mux.attach(front("third", &log), false).unwrap();
        mux.attach(front("fourth", &log), false).unwrap();
        assert!(mux.attach(front("fifth", &log), false).err().unwrap().contains("maximum is 4"));
    }

    #[test]
    fn lines_have_the_time_while_it_is_wanted() {
        let path = std::env::temp_dir().join(format!("ftvm-mux-{}", std::process::id()));
        let dev = Char::File { path: path.display().to_string(), append: false };
        let keys = Keys { exit: Box::new(|| {}), commit: Box::new(String::new) };
        let mux = Mux::open(&dev, "x", keys).unwrap();
        let sink = mux.attach(front("a", &Log::default()), true).unwrap();
        sink.write(b"one\n");
        mux.typed(b"\x01t");
        sink.write(b"tw");
        sink.write(b"o\nthree\n");
        mux.typed(b"\x01t");
        sink.write(b"four\n");
        sink.drain();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!((lines[0], lines[3]), ("one", "four"), "{text}");
        assert!(lines[1].starts_with("[00:00:0") && lines[1].ends_with("] two"), "{text}");
        assert!(lines[2].ends_with("] three"), "{text}");
        std::fs::remove_file(path).unwrap();
    }
}
