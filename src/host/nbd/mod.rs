//! Block exports: an NBD server that shows block nodes to other programs (QEMU's `docs/interop/nbd.rst`). It stands
//! outside of the machine: a reader (or writer) of the host's images beside the guest.

pub mod export;
pub mod session;
pub mod wire;

use std::io;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use ftvm_block::Node;
use ftvm_qmp::EventSink;
use serde_json::json;

use export::Hangup;
pub use export::{Export, Source, Wanted};
use session::Offers;

/// For the negotiation's words.
const GREETING: Duration = Duration::from_secs(10);
/// A client that does not take an answer for so long is let go.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where a server listens.
pub enum Address {
    /// Host and port.
    Tcp(String, String),
    Unix(String),
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, String),
}

/// A client's connection.
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Listener {
    fn open(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => {
                let listener = match UnixListener::bind(path) {
                    // A socket that nobody listens on any more, as QEMU.
                    Err(e) if e.kind() == io::ErrorKind::AddrInUse && UnixStream::connect(path).is_err() => {
                        std::fs::remove_file(path)?;
                        UnixListener::bind(path)?
                    }
                    other => other?,
                };
                Ok(Listener::Unix(listener, path.clone()))
            }
            Address::Tcp(host, port) => {
                let host = if host.is_empty() { "0.0.0.0" } else { host };
                let port: u16 = port.parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
                let places: Vec<_> = (host.trim_matches(['[', ']']), port).to_socket_addrs()?.collect();
                Ok(Listener::Tcp(TcpListener::bind(places.as_slice())?))
            }
        }
    }

    fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Tcp(l) => l.accept().map(|(s, _)| {
                let _ = s.set_nodelay(true);
                Stream::Tcp(s)
            }),
            Listener::Unix(l, _) => l.accept().map(|(s, _)| Stream::Unix(s)),
        }
    }

    /// Wake whoever waits for a client: none comes any more.
    fn shut(&self) {
        let fd = match self {
            Listener::Tcp(l) => l.as_raw_fd(),
            Listener::Unix(l, _) => l.as_raw_fd(),
        };
        let _ = nix::sys::socket::shutdown(fd, nix::sys::socket::Shutdown::Both);
        if let Listener::Unix(_, path) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Stream {
    fn try_clone(&self) -> io::Result<Stream> {
        Ok(match self {
            Stream::Tcp(s) => Stream::Tcp(s.try_clone()?),
            Stream::Unix(s) => Stream::Unix(s.try_clone()?),
        })
    }

    fn shut(&self) {
        let _ = match self {
            Stream::Tcp(s) => s.shutdown(std::net::Shutdown::Both),
            Stream::Unix(s) => s.shutdown(std::net::Shutdown::Both),
        };
    }

    /// How long a client may take to say something, and to listen.
    fn set_patience(&self, says: Option<Duration>) -> io::Result<()> {
        match self {
            Stream::Tcp(s) => s.set_read_timeout(says).and_then(|()| s.set_write_timeout(Some(PATIENCE))),
            Stream::Unix(s) => s.set_read_timeout(says).and_then(|()| s.set_write_timeout(Some(PATIENCE))),
        }
    }
}

impl io::Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => s.read(buf),
            Stream::Unix(s) => s.read(buf),
        }
    }
}

impl io::Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => s.write(buf),
            Stream::Unix(s) => s.write(buf),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The clients of a server.
#[derive(Default)]
struct Clients {
    there: Vec<(u64, Stream)>,
    next: u64,
    closing: bool,
}

struct Server {
    listener: Arc<Listener>,
    clients: Arc<(Mutex<Clients>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The exports, and the server that shows them.
#[derive(Default)]
pub struct Exports {
    list: Arc<Mutex<Vec<Arc<Export>>>>,
    server: Mutex<Option<Server>>,
    events: EventSink,
}

/// What one client sees.
struct Offer {
    list: Arc<Mutex<Vec<Arc<Export>>>>,
    stream: Stream,
}

impl Offers for Offer {
    fn exports(&self) -> Vec<Arc<Export>> {
        lock(&self.list).clone()
    }
    fn hangup(&self) -> Hangup {
        // It has chosen, and may be silent from here on.
        let stream = self.stream.set_patience(None).and_then(|()| self.stream.try_clone());
        Box::new(move || {
            if let Ok(stream) = &stream {
                stream.shut();
            }
        })
    }
}

/// Take those out of the list that are closing and that nobody uses, and tell of them.
fn settle(list: &Mutex<Vec<Arc<Export>>>, events: &EventSink) {
    let gone: Vec<Arc<Export>> = {
        let mut list = lock(list);
        let (gone, kept) = list.drain(..).partition(|e| e.is_closing() && !e.is_used());
        *list = kept;
        gone
    };
    for export in gone {
        let id = export.id.clone();
        // Its bitmaps are free before anybody hears of it.
        drop(export);
        events.emit("BLOCK_EXPORT_DELETED", json!({"id": id}));
    }
}

impl Exports {
    /// None yet; what happens to them is told to `events`.
    pub fn new(events: EventSink) -> Self {
        Exports { events, ..Self::default() }
    }

    /// Listen for clients, `max` at a time (0: any number).
    pub fn start(&self, address: &Address, max: u32) -> Result<(), String> {
        let mut server = lock(&self.server);
        if server.is_some() {
            return Err("NBD server already running".into());
        }
        let place = match address {
            Address::Unix(path) => format!("Failed to bind socket to {path}"),
            Address::Tcp(host, port) => format!("Failed to listen on {host}:{port}"),
        };
        let why = |e: io::Error| {
            let text = e.to_string();
            format!("{place}: {}", text.split(" (os error").next().unwrap_or(&text))
        };
        let listener = Arc::new(Listener::open(address).map_err(why)?);
        let clients: Arc<(Mutex<Clients>, Condvar)> = Arc::default();
        let (own, theirs) = (Arc::clone(&listener), Arc::clone(&clients));
        let (list, events) = (Arc::clone(&self.list), self.events.clone());
        let accept = move || {
            while let Some(stream) = next_client(&own, &theirs, max) {
                admit(stream, &theirs, &list, &events);
            }
        };
        let thread = std::thread::Builder::new().name("nbd".into()).spawn(accept);
        let thread = Some(thread.map_err(|e| e.to_string())?);
        *server = Some(Server { listener, clients, thread });
        Ok(())
    }

    /// Whether a server listens.
    pub fn is_running(&self) -> bool {
        lock(&self.server).is_some()
    }

    /// Hang up on everybody, and take all exports away; false: there is no server.
    pub fn stop(&self) -> bool {
        let Some(mut server) = lock(&self.server).take() else { return false };
        lock(&server.clients.0).closing = true;
        server.clients.1.notify_all();
        server.listener.shut();
        for export in self.all() {
            export.close();
        }
        lock(&server.clients.0).there.iter().for_each(|(_, stream)| stream.shut());
        if let Some(thread) = server.thread.take() {
            let _ = thread.join();
        }
        // Requests under way end.
        let mut clients = lock(&server.clients.0);
        while !clients.there.is_empty() {
            clients = server.clients.1.wait(clients).unwrap_or_else(PoisonError::into_inner);
        }
        drop(clients);
        settle(&self.list, &self.events);
        true
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Export>> {
        lock(&self.list).clone()
    }

    /// The one with this id.
    pub fn find(&self, id: &str) -> Option<Arc<Export>> {
        self.all().into_iter().find(|e| e.id == id)
    }

    /// The one that shows a node, or something that stands on it.
    pub fn user_of(&self, node: &Arc<Node>) -> Option<Arc<Export>> {
        self.all().into_iter().find(|e| Arc::ptr_eq(&e.node(), node))
    }

    /// Show one more.
    pub fn add(&self, wanted: Wanted) -> Result<(), String> {
        let mut list = lock(&self.list);
        if list.iter().any(|e| e.name == wanted.name) {
            return Err(format!("NBD server already has export named '{}'", wanted.name));
        }
        list.push(Export::new(wanted));
        Ok(())
    }

    /// Take one away; it is gone when its last client is.
    pub fn remove(&self, export: &Export) {
        export.close();
        settle(&self.list, &self.events);
    }
}

/// Wait for a client.
fn next_client(listener: &Listener, clients: &(Mutex<Clients>, Condvar), max: u32) -> Option<Stream> {
    loop {
        let mut state = lock(&clients.0);
        while max > 0 && state.there.len() >= max as usize && !state.closing {
            state = clients.1.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.closing {
            return None;
        }
        drop(state);
        match listener.accept() {
            Ok(stream) => return Some(stream),
            // Too many files are open, or the client has gone again.
            Err(e) if !lock(&clients.0).closing => {
                log::warn!("nbd: {e}");
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(_) => return None,
        }
    }
}

/// Serve a client on a thread of its own.
fn admit(
    stream: Stream,
    clients: &Arc<(Mutex<Clients>, Condvar)>,
    list: &Arc<Mutex<Vec<Arc<Export>>>>,
    events: &EventSink,
) {
    let (Ok(copy), Ok(other)) = (stream.try_clone(), stream.try_clone()) else { return };
    let number = {
        let mut state = lock(&clients.0);
        if state.closing {
            return;
        }
        state.next += 1;
        let number = state.next;
        state.there.push((number, copy));
        number
    };
    let (own, list, events) = (Arc::clone(clients), Arc::clone(list), events.clone());
    let serve = move || {
        let mut stream = stream;
        let offer = Offer { list: Arc::clone(&list), stream: other };
        let served = stream.set_patience(Some(GREETING)).and_then(|()| session::serve(&mut stream, &offer));
        if let Err(e) = served {
            log::debug!("nbd: a client is let go: {e}");
        }
        stream.shut();
        lock(&own.0).there.retain(|(n, _)| *n != number);
        own.1.notify_all();
        settle(&list, &events);
    };
    if let Err(e) = std::thread::Builder::new().name("nbd-client".into()).spawn(serve) {
        log::warn!("nbd: no thread for a client: {e}");
        lock(&clients.0).there.retain(|(n, _)| *n != number);
    }
}
