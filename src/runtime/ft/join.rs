//! A backup joins: it takes configuration and state from the primary.

use std::net::{TcpStream, ToSocketAddrs, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::disks;
use super::follow::{reader, Follow, HostSide};
use super::link::{Link, Pulse};
use super::{Common, FtEvent, FtSide, Role};
use crate::lockstep::backup::Backup;
use crate::lockstep::primary::Timing;
use crate::lockstep::wire::{self, Epoch, Message, WireError, PROTOCOL};
use crate::lockstep::Side;
use crate::machine::{Machine, MachineState, Stamp};
use crate::runtime::Event;

/// Between two tries to reach the primary.
const RETRY: Duration = Duration::from_millis(100);

/// Errors of joining a primary.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error("cannot reach the primary at {0}: {1}")]
    Connect(String, #[source] std::io::Error),
    #[error("the primary at {0}: {1}")]
    Wire(String, #[source] WireError),
    #[error("the primary at {0} refuses: {1}")]
    Refused(String, String),
    #[error("{0}")]
    Different(String),
    #[error("cannot use the lock '{0}' on the shared storage: {1}")]
    Lock(String, #[source] std::io::Error),
    #[error("the lock '{0}' of the primary is not visible here: both hosts must see the same storage (or give lock=PATH)")]
    Storage(String),
    #[error("the machine's state cannot be loaded: {0}")]
    State(String),
}

/// A backup that has the primary's configuration.
pub struct Joined {
    stream: TcpStream,
    peer: String,
    pub epoch: Epoch,
    /// The primary's blueprint.
    pub config: Vec<u8>,
    pub timing: (Duration, Duration),
    /// Each side has disks of its own.
    pub separate: bool,
    /// Disk reads are done by the backup itself.
    pub reads_disk: bool,
}

/// Connect to a primary and take its configuration.
/// `listen`: where this side will wait for a backup of its own when it is live. `retry`: how long to try, should the
/// primary not listen yet.
pub fn join(peer: &str, listen: &str, retry: Duration) -> Result<Joined, JoinError> {
    let connect = |e| JoinError::Connect(peer.to_owned(), e);
    let wire = |e| JoinError::Wire(peer.to_owned(), e);
    let address = peer
        .to_socket_addrs()
        .map_err(connect)?
        .next()
        .ok_or_else(|| connect(std::io::ErrorKind::NotFound.into()))?;
    let until = Instant::now() + retry;
    let mut stream = loop {
        match TcpStream::connect_timeout(&address, Duration::from_secs(10)) {
            Ok(stream) => break stream,
            Err(e) if Instant::now() >= until => return Err(connect(e)),
            Err(e) => log::info!("ft: cannot reach the primary at {peer} yet: {e}"),
        }
        std::thread::sleep(RETRY);
    };
    stream.set_nodelay(true).map_err(connect)?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).map_err(connect)?;
    wire::greet(&mut stream).map_err(wire)?;
    let port = listen.rsplit_once(':').and_then(|(_, p)| p.parse().ok()).unwrap_or(0);
    let hello = Message::Hello { protocol: PROTOCOL, version: env!("CARGO_PKG_VERSION").to_owned(), port };
    let frame = wire::encode(&hello).map_err(wire)?;
    std::io::Write::write_all(&mut stream, &frame).map_err(|e| wire(e.into()))?;
    match wire::read(&mut stream).map_err(wire)?.0 {
        Message::Config { epoch, config, heartbeat_ms, timeout_ms, separate_disks, reads_disk } => {
            Ok(Joined {
                stream,
                peer: peer.to_owned(),
                epoch,
                config,
                timing: (Duration::from_millis(heartbeat_ms), Duration::from_millis(timeout_ms)),
                separate: separate_disks,
                reads_disk,
            })
        }
        Message::Refuse { reason } => Err(JoinError::Refused(peer.to_owned(), reason)),
        _ => Err(wire(WireError::Format("an unexpected message instead of the configuration".into()))),
    }
}

impl Joined {
    /// Tell the primary why this host cannot be its backup.
    pub fn refuse(mut self, reason: String) -> JoinError {
        if let Ok(frame) = wire::encode(&Message::Refuse { reason: reason.clone() }) {
            let _ = std::io::Write::write_all(&mut self.stream, &frame);
        }
        JoinError::Different(reason)
    }

    /// Make the claim, take memory and state into `machine`.
    pub fn receive(mut self, common: &Common, machine: &mut Machine) -> Result<Received, JoinError> {
        let lock = common.lock.as_ref();
        let shown = lock.describe();
        let claimed = lock.sees_peer(&self.epoch, Side::Backup).and_then(|seen| {
            if seen {
                lock.claim(&self.epoch, Side::Backup)?;
            }
            Ok(seen)
        });
        match claimed {
            Ok(true) => {}
            Ok(false) => {
                let e = JoinError::Storage(shown);
                return Err(match self.refuse(e.to_string()) {
                    JoinError::Different(text) => JoinError::Different(text),
                    other => other,
                });
            }
            Err(e) => {
                let error = JoinError::Lock(shown, e);
                return Err(self.refuse(error.to_string()));
            }
        }
        let peer = self.peer.clone();
        let wire = |e| JoinError::Wire(peer.clone(), e);
        if let Some(Err(e)) = common.generations.as_ref().map(|g| g.invalidate()) {
            return Err(self.refuse(format!("the backup cannot mark its disks: {e}")));
        }
        for message in disks::digests(&common.disks) {
            let message = match message {
                Ok(m) => m,
                Err(e) => return Err(self.refuse(format!("the backup cannot read its disk: {e}"))),
            };
            let frame = wire::encode(&message).map_err(wire)?;
            std::io::Write::write_all(&mut self.stream, &frame).map_err(|e| wire(e.into()))?;
        }
        let frame = wire::encode(&Message::Ready).map_err(wire)?;
        std::io::Write::write_all(&mut self.stream, &frame).map_err(|e| wire(e.into()))?;
        let mut input = std::io::BufReader::with_capacity(1 << 20, &self.stream);
        let zero = [0u8; 4096];
        let mut pages_received = 0u64;
        let alive = wire::encode(&Message::Alive).map_err(wire)?;
        let mut last_alive = Instant::now();
        let start = loop {
            if last_alive.elapsed() >= self.timing.0 {
                // The primary must see that the copy goes on.
                last_alive = Instant::now();
                std::io::Write::write_all(&mut &self.stream, &alive).map_err(|e| wire(e.into()))?;
            }
            match wire::read(&mut input).map_err(wire)?.0 {
                Message::Pages { pages } => {
                    for (gpa, data) in pages {
                        let data = if data.is_empty() { &zero[..] } else { &data };
                        machine.memory().write(gpa, data).map_err(|e| JoinError::State(e.to_string()))?;
                        pages_received += 1;
                    }
                }
                Message::DiskChunks { drive, chunks } => {
                    let Some(Some(disk)) = common.disks.get(drive as usize) else {
                        return Err(JoinError::State(format!(
                            "the primary has a disk {drive} that is not here"
                        )));
                    };
                    for (chunk, data) in chunks {
                        disk.write_chunk(chunk, &data).map_err(|e| JoinError::State(e.to_string()))?;
                    }
                }
                Message::State { stamp, state } => {
                    let state =
                        MachineState::from_bytes(&state).map_err(|e| JoinError::State(e.to_string()))?;
                    machine.load(&state).map_err(|e| JoinError::State(e.to_string()))?;
                    if machine.stamp() != stamp {
                        return Err(JoinError::State("its position is not the announced one".into()));
                    }
                    break stamp;
                }
                Message::Refuse { reason } => return Err(JoinError::Refused(self.peer, reason)),
                _ => {
                    return Err(wire(WireError::Format(
                        "an unexpected message within the machine's state".into(),
                    )))
                }
            }
        };
        log::info!("ft: received {pages_received} pages and the state at position {}", start.position);
        let rest = input.buffer().to_vec();
        self.stream.set_read_timeout(None).map_err(|e| wire(e.into()))?;
        Ok(Received { joined: self, start, rest })
    }
}

/// A backup whose machine is loaded.
pub struct Received {
    joined: Joined,
    start: Stamp,
    /// Bytes of the log that came behind the state.
    rest: Vec<u8>,
}

impl Received {
    /// Start following: the threads of the channel and the heartbeats.
    pub fn follow(self, common: Arc<Common>, host: HostSide) -> Result<FtSide, JoinError> {
        let peer = self.joined.peer.clone();
        let wire = |e: WireError| JoinError::Wire(peer.clone(), e);
        let epoch = self.joined.epoch.clone();
        let timing = Timing {
            heartbeat: self.joined.timing.0,
            timeout: self.joined.timing.1,
            max_lag: common.config.max_lag,
        };
        let reads = Arc::clone(&host.reads);
        let core = Arc::new(Mutex::new(Backup::new(timing, epoch.clone(), self.start, common.now())));
        let link = Link::start(self.joined.stream).map_err(wire)?;
        link.send(Message::Loaded);
        let id = link.id;
        let (c1, c2) = (Arc::clone(&common), Arc::clone(&common));
        let end = move |reason| {
            let _ = c1.events.send(Event::Ft(FtEvent::Disconnected(id, reason)));
        };
        let bad = move |reason| {
            let _ = c2.events.send(Event::Ft(FtEvent::Disconnected(id, reason)));
        };
        let on_message = reader(Arc::clone(&core), Arc::clone(&common), reads, link.sender(), bad);
        link.read_after(self.rest, on_message, end).map_err(wire)?;
        let pulse = {
            let local = if link.peer.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
            let (k1, c1) = (Arc::clone(&core), Arc::clone(&common));
            let c2 = Arc::clone(&common);
            Pulse::start(
                move || UdpSocket::bind(local),
                epoch.token.clone(),
                Side::Backup,
                Some(link.peer),
                timing.heartbeat,
                move || {
                    if let Ok(mut core) = k1.lock() {
                        core.heard(c1.now());
                    }
                },
                move || {
                    let _ = c2.events.send(Event::Ft(FtEvent::Tick));
                },
            )
        };
        let pulse = match pulse {
            Ok(p) => Some(p),
            Err(e) => {
                log::warn!("ft: no heartbeats: {e}");
                None
            }
        };
        let (peer, number) = (link.peer.to_string(), epoch.number);
        common.shared.update_ft(|ft| {
            ft.role = "backup";
            ft.state = "synchronizing";
            ft.epoch = number;
            ft.peer = Some(peer);
            common.tell_place(ft);
        });
        let follow = Follow::new(core, link, pulse, epoch, host, common.config.separate);
        Ok(FtSide { common, role: Role::Backup(Box::new(follow)) })
    }
}
