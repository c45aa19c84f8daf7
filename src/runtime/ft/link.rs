//! The logging channel's threads and the heartbeats' thread.

use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{channel, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::lockstep::heartbeat::{Heartbeat, Listener};
use crate::lockstep::wire::{self, Message, WireError};
use crate::lockstep::Side;
use crate::runtime::ft::FtEvent;

/// A connection to the peer.
pub struct Link {
    /// Tells this connection from earlier ones.
    pub id: u64,
    pub peer: SocketAddr,
    sender: Sender<Message>,
    queued: Arc<AtomicUsize>,
    sent: Arc<AtomicU64>,
    stream: TcpStream,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

fn weight(message: &Message) -> usize {
    64 + match message {
        Message::Pages { pages } => pages.iter().map(|(_, p)| p.len() + 16).sum(),
        Message::State { state, .. } => state.len(),
        Message::DiskChunks { chunks, .. } => chunks.iter().map(|(_, c)| c.len() + 16).sum(),
        Message::Log { entries, .. } => entries.len(),
        Message::Config { config, .. } => config.len(),
        _ => 0,
    }
}

impl Link {
    /// Start the writer's thread on a stream that has been greeted.
    pub fn start(stream: TcpStream) -> Result<Link, WireError> {
        stream.set_nodelay(true)?;
        let peer = stream.peer_addr()?;
        let (sender, messages) = channel::<Message>();
        let queued = Arc::new(AtomicUsize::new(0));
        let sent = Arc::new(AtomicU64::new(0));
        let mut out = stream.try_clone()?;
        let (q, s) = (Arc::clone(&queued), Arc::clone(&sent));
        std::thread::Builder::new().name("ft-out".into()).spawn(move || {
            for message in messages {
                let w = weight(&message);
                let done = wire::encode(&message).and_then(|frame| {
                    s.fetch_add(frame.len() as u64, Ordering::Relaxed);
                    std::io::Write::write_all(&mut out, &frame).map_err(WireError::from)
                });
                q.fetch_sub(w, Ordering::Relaxed);
                if let Err(e) = done {
                    log::info!("ft: sending to the peer stopped: {e}");
                    let _ = out.shutdown(std::net::Shutdown::Both);
                    return;
                }
            }
        })?;
        Ok(Link { id: NEXT_ID.fetch_add(1, Ordering::Relaxed), peer, sender, queued, sent, stream })
    }

    /// Queue a message.
    pub fn send(&self, message: Message) {
        self.queued.fetch_add(weight(&message), Ordering::Relaxed);
        let _ = self.sender.send(message);
    }

    /// A handle for other threads to send by.
    pub fn sender(&self) -> impl Fn(Message) + Send + 'static {
        let (sender, queued) = (self.sender.clone(), Arc::clone(&self.queued));
        move |message| {
            queued.fetch_add(weight(&message), Ordering::Relaxed);
            let _ = sender.send(message);
        }
    }

    /// The count of bytes waiting to be sent, for other threads.
    pub fn queue(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.queued)
    }

    /// Bytes waiting to be sent.
    pub fn queued(&self) -> usize {
        self.queued.load(Ordering::Relaxed)
    }

    /// Bytes sent in all, as they went over the wire.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Start the reader's thread: every message goes to `on_message`, the end to `on_end`.
    pub fn read(
        &self,
        on_message: impl FnMut(Message) + Send + 'static,
        on_end: impl FnOnce(String) + Send + 'static,
    ) -> Result<(), WireError> {
        self.read_after(Vec::new(), on_message, on_end)
    }

    /// As [`Self::read`], where `first` was already read from the stream.
    pub fn read_after(
        &self,
        first: Vec<u8>,
        mut on_message: impl FnMut(Message) + Send + 'static,
        on_end: impl FnOnce(String) + Send + 'static,
    ) -> Result<(), WireError> {
        let stream = self.stream.try_clone()?;
        std::thread::Builder::new().name("ft-in".into()).spawn(move || {
            let rest = std::io::BufReader::with_capacity(1 << 16, stream);
            let mut input = std::io::Read::chain(std::io::Cursor::new(first), rest);
            loop {
                match wire::read(&mut input) {
                    Ok((message, _)) => on_message(message),
                    Err(e) => return on_end(e.to_string()),
                }
            }
        })?;
        Ok(())
    }

    /// Say that this connection is of no use any more.
    pub fn fail(&self, events: &crate::runtime::Events, reason: String) {
        let event = FtEvent::Disconnected(self.id, reason);
        let _ = events.send(crate::runtime::Event::Ft(event));
    }

    /// Close the connection.
    pub fn close(&self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close();
    }
}

/// Sends and hears heartbeats until dropped.
pub struct Pulse {
    stop: Arc<AtomicBool>,
}

impl Pulse {
    /// Heartbeats of pairing `token` on a socket from `bind`, which is tried until it succeeds (the port may
    /// still be held by the heartbeats of the pairing before). `peer` is where to send; a primary learns it from the
    /// backup's first beat. `heard` is called for every fresh beat of the peer, `tick` regularly.
    pub fn start(
        bind: impl Fn() -> std::io::Result<UdpSocket> + Send + 'static,
        token: String,
        side: Side,
        peer: Option<SocketAddr>,
        interval: Duration,
        heard: impl Fn() + Send + 'static,
        tick: impl Fn() + Send + 'static,
    ) -> std::io::Result<Pulse> {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let step = (interval / 4).clamp(Duration::from_millis(1), Duration::from_millis(50));
        let peer = Mutex::new(peer);
        std::thread::Builder::new().name("ft-pulse".into()).spawn(move || {
            let other = if side == Side::Primary { Side::Backup } else { Side::Primary };
            let mut listener = Listener::new(&token, other);
            let mut count = 0u64;
            let mut last_sent: Option<Instant> = None;
            let mut last_tick = Instant::now();
            let mut buf = [0u8; 512];
            let mut told = false;
            let socket = loop {
                if flag.load(Ordering::Relaxed) {
                    return;
                }
                match bind().and_then(|s| s.set_read_timeout(Some(step)).map(|()| s)) {
                    Ok(socket) => break socket,
                    Err(e) => {
                        if !std::mem::replace(&mut told, true) {
                            log::info!("ft: no heartbeats yet: {e}");
                        }
                        std::thread::sleep(step);
                    }
                }
            };
            while !flag.load(Ordering::Relaxed) {
                if last_sent.is_none_or(|at| at.elapsed() >= interval) {
                    last_sent = Some(Instant::now());
                    count += 1;
                    let to = peer.lock().ok().and_then(|p| *p);
                    if let Some(to) = to {
                        let beat = Heartbeat { token: token.clone(), side, count };
                        let _ = socket.send_to(&beat.encode(), to);
                    }
                }
                if let Ok((n, from)) = socket.recv_from(&mut buf) {
                    if listener.accept(&buf[..n]) {
                        if let Ok(mut p) = peer.lock() {
                            *p = Some(from);
                        }
                        heard();
                    }
                }
                if last_tick.elapsed() >= step {
                    last_tick = Instant::now();
                    tick();
                }
            }
        })?;
        Ok(Pulse { stop })
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
