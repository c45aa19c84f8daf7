//! Character back ends: where serial lines go. Output is written by the caller's thread into a
//! queue of the back end; input arrives on the back end's own thread.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{sync_channel, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::termios;

use super::mux::Mux;
use crate::cli::Char;

/// What is done with bytes that were typed.
pub type Typed = Box<dyn FnMut(&[u8]) + Send>;

/// What is done when somebody takes the other end of a back end, or leaves it.
pub type Opened = Box<dyn FnMut(bool) + Send>;

/// Errors of opening a character back end.
#[derive(Debug, thiserror::Error)]
pub enum CharError {
    #[error("could not open '{0}': {1}")]
    Open(String, #[source] std::io::Error),
    #[error("the terminal is already used by another character device")]
    TerminalTaken,
}

/// Where output of one character device goes.
#[derive(Clone, Default)]
pub struct CharSink {
    queue: Option<SyncSender<Vec<u8>>>,
    /// Chunks that were queued and are not written yet.
    pending: Arc<AtomicUsize>,
    /// Wait for room rather than lose bytes.
    lossless: bool,
    /// It is one of several front ends of this device.
    mux: Option<Arc<Mux>>,
    /// What a person can be told of it (`pty:/dev/pts/3`).
    pub label: String,
    ends: Arc<Ends>,
}

/// The sockets of a back end that listens, to end them from elsewhere.
#[derive(Default)]
struct Ends {
    closed: AtomicBool,
    listener: Mutex<Option<OwnedFd>>,
    /// How many clients there were, and the present one.
    client: Mutex<(u64, Option<OwnedFd>)>,
}

impl Ends {
    fn client(&self) -> MutexGuard<'_, (u64, Option<OwnedFd>)> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn listens(&self, listener: &impl AsFd) {
        let socket = listener.as_fd().try_clone_to_owned().ok();
        *self.listener.lock().unwrap_or_else(PoisonError::into_inner) = socket;
    }
    fn end(socket: Option<OwnedFd>) {
        if let Some(socket) = socket {
            let _ = nix::sys::socket::shutdown(socket.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        }
    }
}

impl CharSink {
    /// The output of one of the front ends of a device.
    pub fn through(mux: Arc<Mux>, label: String) -> Self {
        CharSink { mux: Some(mux), label, ..CharSink::default() }
    }

    /// Write; a reader that does not keep up loses bytes rather than stopping the machine. A file loses none.
    pub fn write(&self, bytes: &[u8]) {
        if let Some(mux) = &self.mux {
            return mux.write(bytes);
        }
        if let Some(queue) = &self.queue {
            self.pending.fetch_add(1, Ordering::SeqCst);
            if self.lossless {
                // A file takes what it is given; should it be slow, the machine waits.
                let _ = queue.send(bytes.to_vec());
                return;
            }
            if let Err(e) = queue.try_send(bytes.to_vec()) {
                self.pending.fetch_sub(1, Ordering::SeqCst);
                if matches!(e, TrySendError::Disconnected(_)) {
                    return;
                }
                log::debug!("a slow reader of {} lost {} bytes", self.label, bytes.len());
            }
        }
    }

    /// Write to client `number` (the first has 1) of a back end that listens, if it is still there.
    pub fn write_to(&self, number: u64, bytes: &[u8]) {
        let client = self.ends.client().0;
        if client == number || client == 0 {
            self.write(bytes);
        }
    }

    /// End the connection of client `number`.
    pub fn hang_up(&self, number: u64) {
        let mut client = self.ends.client();
        if client.0 == number {
            Ends::end(client.1.take());
        }
    }

    /// Listen no more.
    pub fn close(&self) {
        self.ends.closed.store(true, Ordering::SeqCst);
        Ends::end(self.ends.listener.lock().unwrap_or_else(PoisonError::into_inner).take());
        Ends::end(self.ends.client().1.take());
    }

    /// Wait until what was written has left, but not for ever for a reader that does not read.
    pub fn drain(&self) {
        if let Some(mux) = &self.mux {
            return mux.drain();
        }
        let until = Instant::now() + Duration::from_millis(500);
        while self.pending.load(Ordering::SeqCst) > 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

type Clients = Arc<Mutex<Option<Box<dyn Write + Send>>>>;

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), CharError> {
    std::thread::Builder::new()
        .name(format!("char-{name}"))
        .spawn(work)
        .map(|_| ())
        .map_err(|e| CharError::Open(name.to_owned(), e))
}

fn sink(label: &str, out: Clients) -> Result<CharSink, CharError> {
    let (queue, bytes) = sync_channel::<Vec<u8>>(4096);
    let pending = Arc::new(AtomicUsize::new(0));
    let written = Arc::clone(&pending);
    spawn("out", move || {
        for chunk in bytes {
            if let Ok(mut guard) = out.lock() {
                if let Some(w) = guard.as_mut() {
                    if w.write_all(&chunk).and_then(|()| w.flush()).is_err() {
                        *guard = None;
                    }
                }
            }
            written.fetch_sub(1, Ordering::SeqCst);
        }
    })?;
    let lossless = label.starts_with("file:");
    let ends = Arc::default();
    Ok(CharSink { queue: Some(queue), pending, lossless, mux: None, label: label.to_owned(), ends })
}

fn pump(mut from: impl Read, typed: &mut Typed) {
    let mut buf = [0u8; 4096];
    loop {
        match from.read(&mut buf) {
            Ok(0) => return,
            Ok(n) => typed(&buf[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Open a back end named `label`; `typed` receives its input, `opened` hears whether somebody is there.
pub fn open(dev: &Char, label: &str, mut typed: Typed, mut opened: Opened) -> Result<CharSink, CharError> {
    let server = matches!(
        dev.inner(),
        Char::Unix { server: true, .. } | Char::Tcp { server: true, .. } | Char::Fd { server: true, .. }
    );
    if !server {
        opened(true);
    }
    let io = |path: &str| {
        let path = path.to_owned();
        move |e| CharError::Open(path.clone(), e)
    };
    let ends: Arc<Ends> = Arc::default();
    let opened_sink = match dev {
        Char::Null => Ok(CharSink::default()),
        Char::Mux(dev) => return open(dev, label, typed, opened),
        Char::Id(id) => Err(CharError::Open(id.clone(), std::io::ErrorKind::NotFound.into())),
        Char::Stdio { signal } => {
            terminal(*signal)?;
            spawn("stdin", move || pump(std::io::stdin(), &mut typed))?;
            sink("stdio", Arc::new(Mutex::new(Some(Box::new(std::io::stdout())))))
        }
        Char::File { path, append } => {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .append(*append)
                .truncate(!*append)
                .open(path)
                .map_err(io(path))?;
            sink(&format!("file:{path}"), Arc::new(Mutex::new(Some(Box::new(file)))))
        }
        Char::Pipe { path } => {
            // PATH.in and PATH.out, or PATH for both, as QEMU.
            let open = |p: &str| OpenOptions::new().read(true).write(true).open(p);
            let input = open(&format!("{path}.in")).or_else(|_| open(path)).map_err(io(path))?;
            let output = open(&format!("{path}.out")).or_else(|_| open(path)).map_err(io(path))?;
            spawn("pipe", move || pump(input, &mut typed))?;
            sink(&format!("pipe:{path}"), Arc::new(Mutex::new(Some(Box::new(output)))))
        }
        Char::Pty => {
            let pty = nix::pty::openpty(None, None).map_err(|e| CharError::Open("pty".into(), e.into()))?;
            let name = nix::unistd::ttyname(pty.slave.as_fd())
                .map_err(|e| CharError::Open("pty".into(), e.into()))?;
            let mut raw =
                termios::tcgetattr(pty.slave.as_fd()).map_err(|e| CharError::Open("pty".into(), e.into()))?;
            termios::cfmakeraw(&mut raw);
            let _ = termios::tcsetattr(pty.slave.as_fd(), termios::SetArg::TCSANOW, &raw);
            let master = File::from(pty.master);
            let reader = master.try_clone().map_err(io("pty"))?;
            let slave = pty.slave;
            spawn("pty", move || {
                // Held open so that the master survives clients that come and go.
                let _slave = slave;
                pump(reader, &mut typed);
            })?;
            eprintln!("char device redirected to {} (label {label})", name.display());
            sink(&format!("pty:{}", name.display()), Arc::new(Mutex::new(Some(Box::new(master)))))
        }
        Char::Unix { path, server, wait } => {
            let clients: Clients = Arc::default();
            if *server {
                let _ = std::fs::remove_file(path);
                let listener = UnixListener::bind(path).map_err(io(path))?;
                ends.listens(&listener);
                accept(path, *wait, (typed, opened), Arc::clone(&clients), &ends, move || {
                    let (s, _) = listener.accept()?;
                    accepted(s.as_fd().try_clone_to_owned()?, s.try_clone()?, s)
                })?;
            } else {
                let s = UnixStream::connect(path).map_err(io(path))?;
                let reader = s.try_clone().map_err(io(path))?;
                spawn("unix", move || pump(reader, &mut typed))?;
                set(&clients, Box::new(s));
            }
            sink(&format!("unix:{path}"), clients)
        }
        Char::Tcp { addr, server, wait } => {
            let clients: Clients = Arc::default();
            if *server {
                let addr = if addr.starts_with(':') { format!("0.0.0.0{addr}") } else { addr.clone() };
                let listener = TcpListener::bind(&addr).map_err(io(&addr))?;
                ends.listens(&listener);
                accept(&addr, *wait, (typed, opened), Arc::clone(&clients), &ends, move || {
                    let (s, _) = listener.accept()?;
                    s.set_nodelay(true)?;
                    accepted(s.as_fd().try_clone_to_owned()?, s.try_clone()?, s)
                })?;
            } else {
                let s = TcpStream::connect(addr).map_err(io(addr))?;
                let reader = s.try_clone().map_err(io(addr))?;
                spawn("tcp", move || pump(reader, &mut typed))?;
                set(&clients, Box::new(s));
            }
            sink(&format!("tcp:{addr}"), clients)
        }
        Char::Fd { fd, server } => {
            if !*server {
                return Err(CharError::Open(format!("fd {fd}"), std::io::ErrorKind::Unsupported.into()));
            }
            // SAFETY: the descriptor was passed to this process as a listening socket for this use.
            let listener = unsafe { UnixListener::from_raw_fd(*fd) };
            let clients: Clients = Arc::default();
            ends.listens(&listener);
            accept("fd", false, (typed, opened), Arc::clone(&clients), &ends, move || {
                let (s, _) = listener.accept()?;
                accepted(s.as_fd().try_clone_to_owned()?, s.try_clone()?, s)
            })?;
            sink(&format!("fd:{fd}"), clients)
        }
    };
    opened_sink.map(|sink| CharSink { ends, ..sink })
}

fn set(clients: &Clients, writer: Box<dyn Write + Send>) {
    if let Ok(mut guard) = clients.lock() {
        *guard = Some(writer);
    }
}

/// A client's socket, and both ways to it.
type Accepted = std::io::Result<(OwnedFd, Box<dyn Read + Send>, Box<dyn Write + Send>)>;

fn accepted(
    socket: OwnedFd,
    reader: impl Read + Send + 'static,
    writer: impl Write + Send + 'static,
) -> Accepted {
    Ok((socket, Box::new(reader), Box::new(writer)))
}

/// Serve one client after the other; with `wait` the first one is waited for here.
fn accept(
    name: &str,
    wait: bool,
    (mut typed, mut opened): (Typed, Opened),
    clients: Clients,
    ends: &Arc<Ends>,
    mut next: impl FnMut() -> Accepted + Send + 'static,
) -> Result<(), CharError> {
    let mut first = None;
    if wait {
        eprintln!("ftvm: waiting for connection on {name}");
        first = Some(next().map_err(|e| CharError::Open(name.to_owned(), e))?);
    }
    let ends = Arc::clone(ends);
    spawn(name, move || loop {
        let client = match first.take() {
            Some(c) => Ok(c),
            None => next(),
        };
        match client {
            _ if ends.closed.load(Ordering::SeqCst) => return,
            Ok((socket, reader, writer)) => {
                {
                    let mut client = ends.client();
                    set(&clients, writer);
                    *client = (client.0 + 1, Some(socket));
                }
                opened(true);
                pump(reader, &mut typed);
                opened(false);
                ends.client().1 = None;
                if let Ok(mut guard) = clients.lock() {
                    *guard = None;
                }
            }
            Err(e) => {
                log::warn!("a character device's accept failed: {e}");
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        }
    })
}

static SAVED_TERMINAL: Mutex<Option<termios::Termios>> = Mutex::new(None);

/// Put the terminal into raw mode until [`restore_terminal`]; with `signal` Ctrl-C still ends the program.
fn terminal(signal: bool) -> Result<(), CharError> {
    let stdin = std::io::stdin();
    let Ok(saved) = termios::tcgetattr(stdin.as_fd()) else { return Ok(()) };
    let mut raw = saved.clone();
    termios::cfmakeraw(&mut raw);
    raw.output_flags |= termios::OutputFlags::OPOST;
    if signal {
        raw.local_flags |= termios::LocalFlags::ISIG;
    }
    match SAVED_TERMINAL.lock() {
        Ok(mut slot) if slot.is_none() => *slot = Some(saved),
        _ => return Err(CharError::TerminalTaken),
    }
    let _ = termios::tcsetattr(stdin.as_fd(), termios::SetArg::TCSANOW, &raw);
    Ok(())
}

/// Give the terminal back as it was.
pub fn restore_terminal() {
    let Ok(saved) = SAVED_TERMINAL.lock() else { return };
    if let Some(saved) = saved.as_ref() {
        let _ = termios::tcsetattr(std::io::stdin().as_fd(), termios::SetArg::TCSANOW, saved);
    }
}
