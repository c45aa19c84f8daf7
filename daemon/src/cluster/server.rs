//! What peers ask of this host.

use std::io::Read;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::tls::ServerStream;
use super::wire::{receive, send, Answer, Order, Request};
use super::Cluster;
use crate::check::race::Racer;
use crate::{definition, Error, Result};

/// More connections than this at a time are not taken.
const MAX_CONNECTIONS: usize = 128;
/// A peer that says nothing for so long has gone.
const IDLE: Duration = Duration::from_secs(60);
/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// The most that a measurement of the bandwidth sends.
pub const MAX_SINK: u64 = 1 << 30;

/// Listen for peers.
pub fn listen(cluster: &Arc<Cluster>) -> Result<()> {
    let port = cluster.settings.port;
    let bound = TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)));
    let listener = bound.map_err(|e| Error::File(format!("port {port} for peers"), e))?;
    let cluster = Arc::clone(cluster);
    std::thread::spawn(move || {
        let open = Arc::new(AtomicUsize::new(0));
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                // Out of descriptors, perhaps.
                std::thread::sleep(Duration::from_millis(100));
                continue;
            };
            if open.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
                open.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let (cluster, open) = (Arc::clone(&cluster), Arc::clone(&open));
            std::thread::spawn(move || {
                let from =
                    stream.peer_addr().map_or_else(|_| "?".into(), |a| a.ip().to_canonical().to_string());
                if let Err(e) = cluster.serve(stream) {
                    log::debug!("the peer at {from}: {e}");
                }
                open.fetch_sub(1, Ordering::Relaxed);
            });
        }
    });
    Ok(())
}

impl Cluster {
    fn serve(self: &Arc<Self>, stream: TcpStream) -> std::io::Result<()> {
        let from = stream.peer_addr()?.ip().to_canonical();
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(HANDSHAKE))?;
        stream.set_write_timeout(Some(HANDSHAKE))?;
        let mut stream = self.identity().map_err(std::io::Error::other)?.accept(stream).inspect_err(|e| {
            log::warn!("a connection from {from} was not accepted: {e}");
        })?;
        stream.sock.set_read_timeout(Some(IDLE))?;
        loop {
            match receive(&mut stream)? {
                Request::State(state) => {
                    self.peer_told(*state);
                    send(&mut stream, &Answer::State(Box::new(self.own_state())))?;
                }
                Request::Clock => send(&mut stream, &Answer::Clock(now()))?,
                Request::StartBackup(order) => {
                    let cluster = Arc::clone(self);
                    work(&mut stream, move || cluster.start_backup(order, from))?;
                }
                Request::MoveBackup { uuid, from, to } => {
                    let cluster = Arc::clone(self);
                    work(&mut stream, move || cluster.move_backup(&uuid, &from, to.as_deref()).map(drop))?;
                }
                Request::Race(race) => race_along(&mut stream, &race)?,
                Request::Go => send(&mut stream, &Answer::Refused("no race was prepared".into()))?,
                Request::Sink(bytes) if bytes > MAX_SINK => {
                    send(&mut stream, &Answer::Refused("that is too much".into()))?;
                    return Ok(());
                }
                Request::Sink(bytes) => {
                    let taken = std::io::copy(&mut stream.by_ref().take(bytes), &mut std::io::sink())?;
                    if taken != bytes {
                        return Err(std::io::ErrorKind::UnexpectedEof.into());
                    }
                    send(&mut stream, &Answer::Done)?;
                }
            }
        }
    }

    /// Start the backup of a peer's machine. Its definition is kept here from now on, so that it outlives the peer.
    fn start_backup(&self, mut order: Order, from: IpAddr) -> Result<()> {
        if self.maintenance.is_wanted() {
            return Err(Error::State("this host is in maintenance".into()));
        }
        if let Some(port) = order.peer.strip_prefix(':') {
            order.peer = match from {
                IpAddr::V4(ip) => format!("{ip}:{port}"),
                IpAddr::V6(ip) => format!("[{ip}]:{port}"),
            };
        }
        let machine = self.registry.for_backup(&order.name, &order.uuid)?;
        let result = (|| {
            if machine.definition_text().is_none() {
                if order.separate {
                    return Err(Error::State(
                        "the machine has disks=separate, and no definition here names its disk".into(),
                    ));
                }
                if let Some(text) = &order.definition {
                    definition::write(&machine.config_path(), text)?;
                }
            }
            machine.start_backup(&order, self.registry.port(&order.name)?)
        })();
        machine.begun.store(false, Ordering::Relaxed);
        if result.is_ok() {
            log::info!("{}: the backup of the machine at {} runs here", order.name, order.peer);
        }
        result
    }
}

/// Do something while the peer is told that it is under way.
fn work(
    stream: &mut ServerStream,
    work: impl FnOnce() -> Result<()> + Send + 'static,
) -> std::io::Result<()> {
    let (done, end) = channel();
    std::thread::spawn(move || done.send(work()));
    loop {
        match end.recv_timeout(Duration::from_secs(1)) {
            Ok(Ok(())) => return send(stream, &Answer::Done),
            Ok(Err(e)) => return send(stream, &Answer::Refused(e.to_string())),
            Err(RecvTimeoutError::Timeout) => send(stream, &Answer::Working)?,
            Err(RecvTimeoutError::Disconnected) => {
                return send(stream, &Answer::Refused("an internal error; the log says more".into()))
            }
        }
    }
}

fn race_along(stream: &mut ServerStream, race: &super::wire::Race) -> std::io::Result<()> {
    let racer = match Racer::new(race, "peer") {
        Ok(racer) => racer,
        Err(e) => return send(stream, &Answer::Refused(e)),
    };
    for round in 0..race.rounds {
        if let Err(e) = racer.ready(round) {
            return send(stream, &Answer::Refused(e));
        }
        send(stream, &Answer::Done)?;
        let Request::Go = receive(stream)? else {
            return Err(std::io::Error::other("a race ends when its rounds are over"));
        };
        match racer.run(round) {
            Ok(won) => send(stream, &Answer::Won(won))?,
            Err(e) => return send(stream, &Answer::Refused(e)),
        }
    }
    Ok(())
}

/// Microseconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64)
}
