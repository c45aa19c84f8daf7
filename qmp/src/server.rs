//! Sessions over sockets.

use std::io::{IoSliceMut, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use nix::sys::socket::{recvmsg, ControlMessageOwned, MsgFlags, UnixAddr};

use crate::events::Outbox;
use crate::{EventSink, Fds, Handler, Session, Step};

/// What all sessions of a monitor share.
#[derive(Clone)]
pub struct Hub {
    pub handler: Arc<dyn Handler>,
    pub events: EventSink,
    /// Indent replies for people.
    pub pretty: bool,
}

/// A listening socket.
pub enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// A connected socket.
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn duplicate(&self) -> std::io::Result<Stream> {
        Ok(match self {
            Stream::Unix(s) => Stream::Unix(s.try_clone()?),
            Stream::Tcp(s) => Stream::Tcp(s.try_clone()?),
        })
    }

    fn close(&self) {
        let _ = match self {
            Stream::Unix(s) => s.shutdown(std::net::Shutdown::Both),
            Stream::Tcp(s) => s.shutdown(std::net::Shutdown::Both),
        };
    }

    /// Read; descriptors that come with the bytes go to `fds`.
    fn receive(&mut self, buf: &mut [u8], fds: &mut Fds) -> std::io::Result<usize> {
        let stream = match self {
            Stream::Tcp(s) => return s.read(buf),
            Stream::Unix(s) => s,
        };
        let mut space = nix::cmsg_space!([std::os::fd::RawFd; 16]);
        let mut parts = [IoSliceMut::new(buf)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let got = recvmsg::<UnixAddr>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
        for message in got.cmsgs()? {
            if let ControlMessageOwned::ScmRights(list) = message {
                for fd in list {
                    // SAFETY: the kernel has just made this descriptor for this process; nobody else has it.
                    fds.received(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
        }
        Ok(got.bytes)
    }

    fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Stream::Unix(s) => s.write_all(bytes),
            Stream::Tcp(s) => s.write_all(bytes),
        }
    }
}

/// Accept clients for ever, one after the other, as QEMU does on one monitor socket.
pub fn serve_listener(listener: Listener, hub: &Hub) {
    loop {
        let stream = match &listener {
            Listener::Unix(l) => l.accept().map(|(s, _)| Stream::Unix(s)),
            Listener::Tcp(l) => l.accept().map(|(s, _)| {
                let _ = s.set_nodelay(true);
                Stream::Tcp(s)
            }),
        };
        match stream {
            Ok(stream) => serve(stream, hub),
            Err(e) => {
                log::warn!("QMP: accept failed: {e}");
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        }
    }
}

/// Serve an already connected client until it goes.
pub fn serve_stream(stream: UnixStream, hub: &Hub) {
    serve(Stream::Unix(stream), hub);
}

fn serve(mut stream: Stream, hub: &Hub) {
    let Ok(mut out) = stream.duplicate() else { return };
    let outbox = Arc::new(Outbox::default());
    let source = Arc::clone(&outbox);
    let pretty = hub.pretty;
    let writer = std::thread::Builder::new().name("qmp-out".into()).spawn(move || {
        while let Some(value) = source.next() {
            let text = if pretty {
                serde_json::to_string_pretty(&value).unwrap_or_default().replace('\n', "\r\n")
            } else {
                value.to_string()
            };
            if out.write_all(format!("{text}\r\n").as_bytes()).is_err() {
                break;
            }
            source.sent(&value);
        }
        source.close();
        out.close();
    });
    if let Err(e) = writer {
        log::warn!("QMP: no thread for a client: {e}");
        return;
    }
    converse(&mut stream, &outbox, hub);
    outbox.close();
    stream.close();
}

fn converse(stream: &mut Stream, outbox: &Arc<Outbox>, hub: &Hub) {
    let mut session = Session::new();
    outbox.reply(Session::greeting(hub.handler.as_ref()));
    let mut registered = false;
    let mut buf = vec![0u8; 65536];
    loop {
        let n = match stream.receive(&mut buf, session.fds()) {
            Ok(0) => return,
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        session.feed(&buf[..n]);
        while let Some(step) = session.step(hub.handler.as_ref()) {
            let (Step::Reply(value) | Step::Last(value)) = &step;
            if !outbox.reply(value.clone()) || matches!(step, Step::Last(_)) {
                return;
            }
            if session.is_negotiated() && !registered {
                registered = true;
                hub.events.join(outbox);
            }
        }
    }
}
