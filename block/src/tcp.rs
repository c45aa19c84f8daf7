//! TCP connections to storage servers.

use std::io::{self, BufReader, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags};

/// How long sent data may stay unacknowledged before the kernel gives the connection up. What sits in a socket
/// that long must not reach a server much later.
const UNACKNOWLEDGED: Duration = Duration::from_secs(10);

/// The lock of a value that a panic elsewhere leaves usable.
pub fn held<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Send all of `parts`; a connection that takes nothing any more is `broken`.
pub fn write_all(
    mut stream: &TcpStream,
    mut parts: &mut [IoSlice<'_>],
    broken: fn() -> io::Error,
) -> io::Result<()> {
    IoSlice::advance_slices(&mut parts, 0);
    while !parts.is_empty() {
        match stream.write_vectored(parts) {
            Ok(0) => return Err(broken()),
            Ok(n) => IoSlice::advance_slices(&mut parts, n),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Connect to `host` (a name or an address, IPv6 with or without brackets).
pub fn connect(host: &str, port: u16, limit: Duration) -> io::Result<TcpStream> {
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    let mut last = io::Error::new(io::ErrorKind::NotFound, format!("'{host}' has no address"));
    for address in (bare, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, limit) {
            Ok(stream) => return prepare(stream),
            Err(e) => last = e,
        }
    }
    Err(last)
}

fn prepare(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    let limit = UNACKNOWLEDGED.as_millis() as u32;
    nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::TcpUserTimeout, &limit)?;
    nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::KeepAlive, &true)?;
    Ok(stream)
}

/// The receiving side of a connection. Whoever waits for an answer reads for all (there is no thread for it), so
/// an answer on a quiet connection costs no change of threads.
pub struct Input {
    reader: BufReader<TcpStream>,
    /// How long the rest of a unit may take whose beginning is there.
    patience: Duration,
}

impl Input {
    /// The receiving side of `stream`.
    pub fn new(stream: TcpStream, patience: Duration) -> io::Result<Self> {
        stream.set_read_timeout(Some(Duration::from_millis(500)))?;
        Ok(Input { reader: BufReader::with_capacity(64 << 10, stream), patience })
    }

    /// Wait until there is something to read (or the end of the connection); false: not within `limit`.
    pub fn wait(&self, limit: Duration) -> io::Result<bool> {
        if !self.reader.buffer().is_empty() {
            return Ok(true);
        }
        let fd = self.reader.get_ref().as_fd();
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
        let ms = u16::try_from(limit.as_millis().max(1)).unwrap_or(u16::MAX);
        match poll(&mut fds, ms) {
            Ok(n) => Ok(n > 0),
            Err(nix::errno::Errno::EINTR) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }
}

impl Read for Input {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let start = Instant::now();
        loop {
            match self.reader.read(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && start.elapsed() < self.patience => {}
                other => return other,
            }
        }
    }
}

/// As [`connect`], from a port below 1024 if this process may have one: many NFS servers take no others.
pub fn connect_reserved(host: &str, port: u16, limit: Duration) -> io::Result<TcpStream> {
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    let addresses: Vec<SocketAddr> = (bare, port).to_socket_addrs()?.collect();
    for address in addresses {
        let start = std::process::id() as u16;
        for n in 0..64u16 {
            // 665 to 1023, as bindresvport(3) avoids the well-known ones below.
            let local = 665 + (start.wrapping_mul(31).wrapping_add(n * 7)) % 359;
            match from_port(local, address, limit) {
                Ok(stream) => return prepare(stream),
                Err(e) if matches!(e.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable) => {}
                Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return connect(host, port, limit),
                Err(e) => return Err(e),
            }
        }
    }
    connect(host, port, limit)
}

fn from_port(local: u16, remote: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    use nix::sys::socket::{bind, connect, socket, AddressFamily, SockFlag, SockType, SockaddrStorage};
    let (family, any): (_, SocketAddr) = match remote {
        SocketAddr::V4(_) => (AddressFamily::Inet, (std::net::Ipv4Addr::UNSPECIFIED, local).into()),
        SocketAddr::V6(_) => (AddressFamily::Inet6, (std::net::Ipv6Addr::UNSPECIFIED, local).into()),
    };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(any))?;
    match connect(fd.as_raw_fd(), &SockaddrStorage::from(remote)) {
        Ok(()) | Err(nix::errno::Errno::EINPROGRESS) => {}
        Err(e) => return Err(e.into()),
    }
    let ms = u16::try_from(limit.as_millis().max(1)).unwrap_or(u16::MAX);
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut fds, ms)? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let stream = TcpStream::from(fd);
    if let Some(e) = stream.take_error()? {
        return Err(e);
    }
    stream.set_nonblocking(false)?;
    Ok(stream)
}
