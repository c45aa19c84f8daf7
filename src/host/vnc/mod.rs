//! A VNC server: shows the machine's screen, and brings keys and pointers. It changes nothing of the guest but
//! through the input door.

pub mod rfb;

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use des::cipher::{BlockEncrypt, KeyInit};
use ftvm_devices::{Picture, Pointer};

use super::keys::{self, Key};
use rfb::{Message, PixelFormat};

/// How often the screen is looked at.
const FRAME: Duration = Duration::from_millis(40);
/// A client that does not take bytes for so long is let go.
const PATIENCE: Duration = Duration::from_secs(10);
/// For the words of greeting.
const GREETING: Duration = Duration::from_secs(10);
const MAX_CLIENTS: usize = 32;

/// What is to be seen at one moment.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Another one whenever something may have changed.
    pub number: u64,
    pub picture: Picture,
    /// The pointer that clients draw.
    pub pointer: Option<Pointer>,
    /// The guest can be told of another size.
    pub takes_size: bool,
}

/// The machine behind the screen.
pub trait Console: Send + Sync {
    /// What is to be seen, if its number is another than `since`; an error when there is no machine any more.
    fn look(&self, since: Option<u64>) -> Result<Option<View>, String>;
    /// The monitor has another size; whether the guest is told.
    fn resize(&self, width: u16, height: u16) -> bool;
    fn key(&self, key: Key, down: bool);
    /// Where the pointer is in a picture of this size, and its buttons (a bit each: left, middle, right, wheel up, wheel
    /// down), now and before.
    fn pointer(&self, now: (u16, u16, u8), before: (u16, u16, u8), size: (u32, u32));
    /// The machine's name.
    fn name(&self) -> String;
}

/// Who may come in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Access {
    #[default]
    Everybody,
    /// Who knows the password; nobody, while there is none.
    Password(Option<String>),
}

/// What the server and its users share.
#[derive(Default)]
pub struct Vnc {
    access: Mutex<Access>,
    clients: Mutex<Vec<(usize, String)>>,
    next: AtomicUsize,
    /// Host and port (or path, and none).
    address: Mutex<Option<(String, Option<u16>)>>,
}

impl Vnc {
    /// A server that lets these in.
    pub fn new(access: Access) -> Arc<Vnc> {
        Arc::new(Vnc { access: Mutex::new(access), ..Vnc::default() })
    }

    fn access(&self) -> Access {
        self.access.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether a password is asked for.
    pub fn asks_password(&self) -> bool {
        matches!(self.access(), Access::Password(_))
    }

    /// Set the password; false: this server does not ask for one.
    pub fn set_password(&self, password: Option<String>) -> bool {
        let mut access = self.access.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *access {
            Access::Everybody => false,
            Access::Password(old) => {
                *old = password;
                true
            }
        }
    }

    /// The other ends of those that are being served.
    pub fn clients(&self) -> Vec<String> {
        let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.iter().map(|(_, peer)| peer.clone()).collect()
    }

    /// Where it listens.
    pub fn address(&self) -> Option<(String, Option<u16>)> {
        self.address.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Listen on TCP ports `first..=last` (the first that is free) of `host`, all addresses if that is empty.
    pub fn listen_tcp(
        self: &Arc<Self>,
        host: &str,
        ports: std::ops::RangeInclusive<u16>,
        console: Arc<dyn Console>,
    ) -> std::io::Result<()> {
        let host = if host.is_empty() { "0.0.0.0" } else { host };
        let mut outcome = Err(ErrorKind::AddrInUse.into());
        for port in ports {
            outcome = TcpListener::bind((host.trim_matches(['[', ']']), port));
            if outcome.is_ok() {
                break;
            }
        }
        let listener = outcome?;
        let port = listener.local_addr()?.port();
        self.listens(host.to_owned(), Some(port));
        let server = Arc::clone(self);
        std::thread::Builder::new().name("vnc".into()).spawn(move || {
            for stream in listener.incoming().flatten() {
                let peer = stream.peer_addr().map_or(String::new(), |a| a.to_string());
                let _ = stream.set_nodelay(true);
                server.admit(stream, peer, &console);
            }
        })?;
        Ok(())
    }

    /// Listen on a Unix socket.
    pub fn listen_unix(self: &Arc<Self>, path: &str, console: Arc<dyn Console>) -> std::io::Result<()> {
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path)?;
        self.listens(path.to_owned(), None);
        let server = Arc::clone(self);
        std::thread::Builder::new().name("vnc".into()).spawn(move || {
            for stream in listener.incoming().flatten() {
                server.admit(stream, String::new(), &console);
            }
        })?;
        Ok(())
    }

    fn listens(&self, host: String, port: Option<u16>) {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner) = Some((host, port));
    }

    fn admit<S: Stream>(self: &Arc<Self>, stream: S, peer: String, console: &Arc<dyn Console>) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if clients.len() >= MAX_CLIENTS {
            return;
        }
        clients.push((number, peer));
        drop(clients);
        let (server, console) = (Arc::clone(self), Arc::clone(console));
        let served = std::thread::Builder::new().name("vnc-client".into()).spawn(move || {
            let mut pressed = BTreeSet::new();
            if let Err(e) = server.serve(stream, &*console, &mut pressed) {
                log::debug!("vnc: {e}");
            }
            // Nobody is left to let these go.
            pressed.into_iter().filter_map(keys::by_number).for_each(|k| console.key(k, false));
            server.forget(number);
        });
        if served.is_err() {
            self.forget(number);
        }
    }

    fn forget(&self, number: usize) {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner).retain(|(n, _)| *n != number);
    }

    fn serve<S: Stream>(
        &self,
        mut stream: S,
        console: &dyn Console,
        pressed: &mut BTreeSet<u64>,
    ) -> std::io::Result<()> {
        stream.timeouts(GREETING, PATIENCE)?;
        if !self.greet(&mut stream)? {
            return Ok(());
        }
        // ClientInit: whether others may stay; they may.
        exactly::<1>(&mut stream)?;
        let gone = |e: String| std::io::Error::other(e);
        let View { mut number, picture: mut shown, takes_size, .. } =
            console.look(None).map_err(gone)?.unwrap_or_default();
        stream.write_all(&rfb::server_init(shown.width as u16, shown.height as u16, &console.name()))?;
        let mut format = PixelFormat::OWN;
        let mut encodings = Vec::new();
        // What the client waits for: nothing, changes, everything.
        let mut wish: Option<bool> = None;
        let mut pointer = (0, 0, 0);
        // The shape that the client has been sent.
        let mut shape: Option<Pointer> = None;
        let mut skip = 0;
        let (mut buffer, mut chunk) = (Vec::new(), vec![0; 1 << 16]);
        let mut looked = Instant::now();
        stream.timeouts(FRAME, PATIENCE)?;
        loop {
            match stream.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(n) => buffer.extend_from_slice(&chunk[..n]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
            loop {
                let skipped = buffer.len().min(skip);
                buffer.drain(..skipped);
                skip -= skipped;
                let Some((message, used)) = rfb::parse(&buffer).map_err(std::io::Error::other)? else {
                    break;
                };
                buffer.drain(..used);
                match message {
                    Message::SetPixelFormat(f) => format = f,
                    Message::SetEncodings(list) => {
                        if list.contains(&rfb::EXTENDED_KEY) && !encodings.contains(&rfb::EXTENDED_KEY) {
                            let mut out = rfb::update(1);
                            rfb::rectangle(&mut out, [0; 4], rfb::EXTENDED_KEY);
                            stream.write_all(&out)?;
                        }
                        if takes_size
                            && list.contains(&rfb::EXTENDED_SIZE)
                            && !encodings.contains(&rfb::EXTENDED_SIZE)
                        {
                            let mut out = rfb::update(1);
                            rfb::extended_size(&mut out, 0, 0, shown.width as u16, shown.height as u16);
                            stream.write_all(&out)?;
                        }
                        encodings = list;
                    }
                    Message::UpdateRequest { incremental } => {
                        wish = Some(wish.unwrap_or(false) || !incremental);
                    }
                    Message::Key { down, symbol } => {
                        press(console, rfb::key_name(symbol).and_then(keys::by_name), down, pressed);
                    }
                    Message::KeyNumber { down, number } => {
                        press(console, keys::by_number(number.into()), down, pressed);
                    }
                    Message::Pointer { buttons, x, y } => {
                        let now = (x, y, buttons);
                        console.pointer(now, pointer, (shown.width, shown.height));
                        pointer = now;
                    }
                    Message::SetDesktopSize { width, height } => {
                        let status = if console.resize(width, height) { 4 } else { 3 };
                        let mut out = rfb::update(1);
                        rfb::extended_size(&mut out, 1, status, shown.width as u16, shown.height as u16);
                        stream.write_all(&out)?;
                    }
                    Message::CutText { bytes } => skip = bytes as usize,
                }
            }
            let Some(all) = wish.filter(|all| *all || looked.elapsed() >= FRAME) else { continue };
            looked = Instant::now();
            let new = console.look((!all).then_some(number)).map_err(gone)?;
            let Some(View { number: changes, picture: mut new, pointer: drawn, .. }) = new else { continue };
            number = changes;
            let mut out;
            if (new.width, new.height) != (shown.width, shown.height) {
                let extended = takes_size && encodings.contains(&rfb::EXTENDED_SIZE);
                if extended || encodings.contains(&rfb::DESKTOP_SIZE) {
                    let (width, height) = (new.width as u16, new.height as u16);
                    out = rfb::update(1);
                    match extended {
                        true => rfb::extended_size(&mut out, 0, 0, width, height),
                        false => rfb::rectangle(&mut out, [0, 0, width, height], rfb::DESKTOP_SIZE),
                    }
                    stream.write_all(&out)?;
                    // Nothing of the new picture is there yet: the next request, of whatever kind, gets all of it.
                    shown = Picture { pixels: Vec::new(), ..new };
                    number = number.wrapping_sub(1);
                    wish = None;
                    continue;
                }
                new = cut(&new, shown.width, shown.height);
            }
            let bands = if all { vec![(0, new.height)] } else { rfb::differences(&shown, &new) };
            let other = encodings.contains(&rfb::CURSOR) && shape != drawn;
            if bands.is_empty() && !other {
                continue;
            }
            out = rfb::update(bands.len() as u16 + u16::from(other));
            if other {
                rfb::cursor(&mut out, drawn.as_ref(), &format);
                shape = drawn;
            }
            bands.iter().for_each(|(from, to)| rfb::raw(&mut out, &new, *from, *to, &format));
            stream.write_all(&out)?;
            shown = new;
            wish = None;
        }
    }

    /// The words before the first message; whether the client may come in.
    fn greet<S: Stream>(&self, stream: &mut S) -> std::io::Result<bool> {
        stream.write_all(b"RFB 003.008\n")?;
        let version = exactly::<12>(stream)?;
        let minor = match &version {
            b"RFB 003.007\n" => 7,
            b"RFB 003.008\n" => 8,
            v if v.starts_with(b"RFB 003.") => 3,
            _ => return Err(std::io::Error::other("not an RFB client")),
        };
        let access = self.access();
        let kind: u8 = if access == Access::Everybody { 1 } else { 2 };
        if minor == 3 {
            stream.write_all(&u32::from(kind).to_be_bytes())?;
        } else {
            stream.write_all(&[1, kind])?;
            if exactly::<1>(stream)? != [kind] {
                return Err(std::io::Error::other("the client wants another kind of authentication"));
            }
        }
        let Access::Password(password) = access else {
            if minor == 8 {
                stream.write_all(&0u32.to_be_bytes())?;
            }
            return Ok(true);
        };
        let mut challenge = [0; 16];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut challenge)?;
        stream.write_all(&challenge)?;
        let answer = exactly::<16>(stream)?;
        let good = password.is_some_and(|p| encrypt(&p, challenge) == answer);
        stream.write_all(&u32::from(!good).to_be_bytes())?;
        if !good && minor == 8 {
            const REASON: &[u8] = b"Authentication failed";
            stream.write_all(&(REASON.len() as u32).to_be_bytes())?;
            stream.write_all(REASON)?;
        }
        Ok(good)
    }
}

/// A socket of either kind.
trait Stream: Read + Write + Send + 'static {
    fn timeouts(&self, read: Duration, write: Duration) -> std::io::Result<()>;
}

impl Stream for TcpStream {
    fn timeouts(&self, read: Duration, write: Duration) -> std::io::Result<()> {
        self.set_read_timeout(Some(read))?;
        self.set_write_timeout(Some(write))
    }
}

impl Stream for UnixStream {
    fn timeouts(&self, read: Duration, write: Duration) -> std::io::Result<()> {
        self.set_read_timeout(Some(read))?;
        self.set_write_timeout(Some(write))
    }
}

fn exactly<const N: usize>(stream: &mut impl Read) -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Press a key or let it go, and keep in mind what is pressed.
fn press(console: &dyn Console, key: Option<Key>, down: bool, pressed: &mut BTreeSet<u64>) {
    let Some(key) = key else { return };
    if down {
        pressed.insert(key.number.into());
    } else {
        pressed.remove(&key.number.into());
    }
    console.key(key, down);
}

/// The client's answer to a challenge (RFC 6143, 7.2.2): DES with the password as key, its bits in each byte reversed.
fn encrypt(password: &str, challenge: [u8; 16]) -> [u8; 16] {
    let mut key = [0; 8];
    password.bytes().zip(&mut key).for_each(|(byte, slot)| *slot = byte.reverse_bits());
    let cipher = des::Des::new(&key.into());
    let mut out = challenge;
    out.chunks_exact_mut(8).for_each(|block| cipher.encrypt_block(block.into()));
    out
}

/// As much of a picture as a client sees that cannot change its size.
fn cut(picture: &Picture, width: u32, height: u32) -> Picture {
    let at = |x: u32, y: u32| match x < picture.width && y < picture.height {
        true => picture.pixels[(y * picture.width + x) as usize],
        false => 0,
    };
    let pixels = (0..height).flat_map(|y| (0..width).map(move |x| at(x, y))).collect();
    Picture { width, height, pixels }
}

#[cfg(test)]
mod tests;
