//! Where a machine's state goes to or comes from: QEMU's migration URIs.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use serde_json::{json, Value};

use crate::host::tls::{Credentials, Duplex};

/// Errors of a URI and what it names.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    #[error("unknown migration protocol: {0}")]
    Unknown(String),
    #[error("{0}: {1}")]
    Io(String, #[source] std::io::Error),
    #[error("{0}")]
    Plain(String),
}

/// A parsed URI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Uri {
    /// `tcp:HOST:PORT`
    Tcp(String),
    /// `unix:PATH`
    Unix(String),
    /// `exec:COMMAND`
    Exec(String),
    /// `fd:NAME-OR-NUMBER`
    Fd(String),
    /// `file:PATH`
    File(String),
    /// `defer`: the URI comes by `migrate-incoming`.
    Defer,
}

impl Uri {
    /// Parse it.
    pub fn parse(text: &str) -> Result<Uri, ChannelError> {
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        match (kind, rest) {
            ("defer", "") => Ok(Uri::Defer),
            ("tcp", place) => {
                let (host, port) = place.rsplit_once(':').ok_or_else(|| {
                    ChannelError::Plain(format!("error parsing address '{place}': HOST:PORT is expected"))
                })?;
                let port: u16 =
                    port.split(',').next().and_then(|p| p.parse().ok()).ok_or_else(|| {
                        ChannelError::Plain(format!("error parsing port in address '{place}'"))
                    })?;
                // "0" and "" are every address, as in QEMU.
                let host = if host.is_empty() || host == "0" { "0.0.0.0" } else { host };
                Ok(Uri::Tcp(format!("{host}:{port}")))
            }
            ("unix", path) if !path.is_empty() => Ok(Uri::Unix(path.to_owned())),
            ("exec", command) if !command.is_empty() => Ok(Uri::Exec(command.to_owned())),
            ("fd", name) if !name.is_empty() => Ok(Uri::Fd(name.to_owned())),
            ("file", path) if !path.is_empty() => Ok(Uri::File(path.to_owned())),
            _ => Err(ChannelError::Unknown(text.to_owned())),
        }
    }

    /// The host that it names.
    pub fn host(&self) -> Option<&str> {
        match self {
            Uri::Tcp(place) => place.rsplit_once(':').map(|(host, _)| host.trim_matches(['[', ']'])),
            _ => None,
        }
    }

    /// The text again.
    fn text(&self) -> String {
        match self {
            Uri::Tcp(p) => format!("tcp:{p}"),
            Uri::Unix(p) => format!("unix:{p}"),
            Uri::Exec(p) => format!("exec:{p}"),
            Uri::Fd(p) => format!("fd:{p}"),
            Uri::File(p) => format!("file:{p}"),
            Uri::Defer => "defer".into(),
        }
    }
}

/// An open way out or in.
pub struct Channel {
    pub input: Option<Box<dyn Read + Send>>,
    pub output: Option<Box<dyn Write + Send>>,
    /// Ends whatever waits on it.
    pub stop: Arc<dyn Fn() + Send + Sync>,
    /// The program behind it; what it says at its end counts.
    pub child: Option<Child>,
    /// What it is, if both directions are one socket.
    socket: Option<UnixStream>,
}

/// How a channel becomes a secret one, on the side that begins it.
#[derive(Clone, Debug)]
pub struct Client {
    pub credentials: Arc<Credentials>,
    /// The name that the other side's certificate must have.
    pub host: String,
}

/// The same, on the side that is called.
#[derive(Clone, Debug)]
pub struct Server {
    pub credentials: Arc<Credentials>,
    /// The name that the caller's certificate must have.
    pub identity: Option<String>,
}

impl Channel {
    /// A connection that goes both ways.
    fn socket(stream: UnixStream) -> std::io::Result<Channel> {
        let (input, stop, socket) = (stream.try_clone()?, stream.try_clone()?, stream.try_clone()?);
        Ok(Channel {
            input: Some(Box::new(input)),
            output: Some(Box::new(stream)),
            stop: Arc::new(move || drop(stop.shutdown(Shutdown::Both))),
            child: None,
            socket: Some(socket),
        })
    }

    fn take_socket(&mut self) -> Result<UnixStream, String> {
        self.socket
            .take()
            .ok_or_else(|| "TLS needs a channel that goes both ways: tcp:, unix: or a socket's fd:".into())
    }

    fn with(self, duplex: Duplex) -> Channel {
        let (input, output) = duplex.split();
        Channel { input: Some(Box::new(input)), output: Some(Box::new(output)), ..self }
    }

    /// Speak TLS from here on, as the side that begins. It waits for the other side.
    pub fn secure(mut self, client: &Client) -> Result<Channel, String> {
        let duplex = client.credentials.connect(self.take_socket()?, &client.host)?;
        Ok(self.with(duplex))
    }

    /// As [`Self::secure`], as the side that is called.
    pub fn secure_server(mut self, server: &Server) -> Result<Channel, String> {
        let duplex = server.credentials.accept(self.take_socket()?, server.identity.as_deref())?;
        Ok(self.with(duplex))
    }

    fn tcp(stream: TcpStream) -> std::io::Result<Channel> {
        stream.set_nodelay(true)?;
        // What is said of any stream socket is said of this one too.
        Channel::socket(UnixStream::from(OwnedFd::from(stream)))
    }

    fn one_way(input: Option<File>, output: Option<File>) -> Channel {
        Channel {
            input: input.map(|f| Box::new(f) as Box<dyn Read + Send>),
            output: output.map(|f| Box::new(f) as Box<dyn Write + Send>),
            stop: Arc::new(|| {}),
            child: None,
            socket: None,
        }
    }

    /// Whether the other side can answer.
    pub fn answers(&self) -> bool {
        self.input.is_some() && self.output.is_some()
    }

    fn descriptor(fd: OwnedFd, out: bool) -> std::io::Result<Channel> {
        let stat = nix::sys::stat::fstat(&fd)?;
        if stat.st_mode & libc::S_IFMT == libc::S_IFSOCK {
            return Channel::socket(UnixStream::from(fd));
        }
        let file = File::from(fd);
        Ok(match out {
            true => Channel::one_way(None, Some(file)),
            false => Channel::one_way(Some(file), None),
        })
    }

    /// Wait for the program behind the channel, which must have ended well.
    pub fn finish(child: Option<Child>) -> Result<(), String> {
        let Some(mut child) = child else { return Ok(()) };
        drop(child.stdin.take());
        match child.wait() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("the command of exec: failed ({status})")),
            Err(e) => Err(format!("the command of exec: {e}")),
        }
    }
}

/// Open the way out. `named` finds what `getfd` has kept.
pub fn connect(
    uri: &Uri,
    named: impl FnOnce(&str) -> Result<OwnedFd, String>,
) -> Result<Channel, ChannelError> {
    let fail = |e: std::io::Error| ChannelError::Io(uri.text(), e);
    match uri {
        Uri::Tcp(place) => TcpStream::connect(place).and_then(Channel::tcp).map_err(fail),
        Uri::Unix(path) => UnixStream::connect(path).and_then(Channel::socket).map_err(fail),
        Uri::Fd(name) => {
            let fd = named(name).map_err(ChannelError::Plain)?;
            Channel::descriptor(fd, true).map_err(fail)
        }
        Uri::File(path) => {
            let file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).open(path);
            file.map(|f| Channel::one_way(None, Some(f))).map_err(fail)
        }
        Uri::Exec(command) => {
            let mut child =
                shell(command).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().map_err(fail)?;
            let output = child.stdin.take().map(|s| File::from(OwnedFd::from(s)));
            Ok(Channel { child: Some(child), ..Channel::one_way(None, output) })
        }
        Uri::Defer => Err(ChannelError::Unknown("defer".into())),
    }
}

fn shell(command: &str) -> Command {
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", command]);
    shell
}

/// The way in, ready to be taken.
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
    /// What needs no waiting; once.
    Open(Option<Channel>),
}

/// Open the way in; nothing is waited for.
pub fn listen(uri: &Uri) -> Result<Listener, ChannelError> {
    let fail = |e: std::io::Error| ChannelError::Io(uri.text(), e);
    match uri {
        Uri::Tcp(place) => TcpListener::bind(place).map(Listener::Tcp).map_err(fail),
        Uri::Unix(path) => {
            // One that nobody listens on any more is in the way.
            if UnixStream::connect(path).is_err() {
                let _ = std::fs::remove_file(path);
            }
            UnixListener::bind(path).map(Listener::Unix).map_err(fail)
        }
        Uri::Fd(number) => {
            let number: i32 = number
                .parse()
                .ok()
                .filter(|n| *n > 2 && nix::fcntl::fcntl(borrow(*n), nix::fcntl::FcntlArg::F_GETFD).is_ok())
                .ok_or_else(|| {
                    ChannelError::Plain(format!("fd:{number}: there is no such file descriptor"))
                })?;
            // SAFETY: the descriptor is open, and was given to this process for this use alone.
            let fd = unsafe { OwnedFd::from_raw_fd(number) };
            Channel::descriptor(fd, false).map(|c| Listener::Open(Some(c))).map_err(fail)
        }
        Uri::File(path) => {
            File::open(path).map(|f| Listener::Open(Some(Channel::one_way(Some(f), None)))).map_err(fail)
        }
        Uri::Exec(command) => {
            let mut child =
                shell(command).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(fail)?;
            let input = child.stdout.take().map(|s| File::from(OwnedFd::from(s)));
            Ok(Listener::Open(Some(Channel { child: Some(child), ..Channel::one_way(input, None) })))
        }
        Uri::Defer => Err(ChannelError::Unknown("defer".into())),
    }
}

fn borrow(number: i32) -> std::os::fd::BorrowedFd<'static> {
    // SAFETY: only asked whether it is open; a number that is not is answered with an error.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(number) }
}

impl Listener {
    /// Wait for the sender; `secure` says each time whether it must speak TLS. One that does not, or is not who it should be,
    /// is sent away, and the next is waited for.
    pub fn accept(&mut self, secure: impl Fn() -> Result<Option<Server>, String>) -> Result<Channel, String> {
        let text = |e: std::io::Error| e.to_string();
        let upgrade = |channel: Channel| match secure()? {
            Some(server) => channel.secure_server(&server),
            None => Ok(channel),
        };
        loop {
            let channel = match self {
                Listener::Tcp(l) => l.accept().and_then(|(s, _)| Channel::tcp(s)).map_err(text)?,
                Listener::Unix(l) => l.accept().and_then(|(s, _)| Channel::socket(s)).map_err(text)?,
                Listener::Open(channel) => {
                    return upgrade(channel.take().ok_or("the way in is closed")?);
                }
            };
            match upgrade(channel) {
                Ok(channel) => return Ok(channel),
                Err(e) => log::warn!("migration: a caller was sent away: {e}"),
            }
        }
    }

    /// Ends the waiting in [`Self::accept`].
    pub fn stopper(&self) -> Option<Box<dyn FnOnce() + Send>> {
        let fd = match self {
            Listener::Tcp(l) => l.as_fd().try_clone_to_owned().ok()?,
            Listener::Unix(l) => l.as_fd().try_clone_to_owned().ok()?,
            Listener::Open(_) => return None,
        };
        Some(Box::new(move || {
            let _ = nix::sys::socket::shutdown(fd.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        }))
    }

    /// Where it listens, as QEMU's `SocketAddress`.
    pub fn address(&self) -> Option<Value> {
        match self {
            Listener::Tcp(l) => {
                let a = l.local_addr().ok()?;
                Some(json!({"type": "inet", "host": a.ip().to_string(), "port": a.port().to_string()}))
            }
            Listener::Unix(l) => {
                let path = l.as_fd().try_clone_to_owned().ok().map(UnixListener::from)?;
                let path = path.local_addr().ok()?.as_pathname()?.display().to_string();
                Some(json!({"type": "unix", "path": path}))
            }
            Listener::Open(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_qemus() {
        let ok = |t: &str| Uri::parse(t).unwrap();
        assert_eq!(ok("tcp:0:4444"), Uri::Tcp("0.0.0.0:4444".into()));
        assert_eq!(ok("tcp:[::]:49152"), Uri::Tcp("[::]:49152".into()));
        assert_eq!(ok("exec:gzip -c > a:b"), Uri::Exec("gzip -c > a:b".into()));
        assert_eq!(ok("defer"), Uri::Defer);
        assert_eq!(ok("tcp:[::1]:49152").host(), Some("::1"));
        for bad in ["", "tcp:host", "tcp:host:x", "unix:", "rdma:host:1", "carrier-pigeon:"] {
            assert!(Uri::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_program_that_fails_is_told_of() {
        let channel = connect(&Uri::Exec("exit 3".into()), |_| Err(String::new())).unwrap();
        assert!(Channel::finish(channel.child).unwrap_err().contains('3'));
    }
}
