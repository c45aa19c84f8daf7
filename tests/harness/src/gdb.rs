//! GDB, and a client of its protocol.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::guests::root;
use crate::{wait_for, Result};

/// An ELF file with the symbols of the kernel `image` (a bzImage compressed with LZ4, as Debian's cloud kernel is), recovered from
/// the kernel's own table; kept beside it. `None` where the tool for that (from PyPI) cannot be had.
pub fn symbols(image: &str) -> Result<Option<String>> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let elf = format!("{image}.elf");
    let time = |path: &str| Path::new(path).metadata().and_then(|m| m.modified()).ok();
    if time(&elf).is_some_and(|t| Some(t) >= time(image)) {
        return Ok(Some(elf));
    }
    let packages = root().join("build/vmlinux-to-elf");
    if !packages.join("bin/vmlinux-to-elf").exists() {
        let done = Command::new("python3")
            .args(["-m", "pip", "install", "-q", "--disable-pip-version-check", "--target"])
            .arg(&packages)
            .arg("vmlinux-to-elf==1.4.0")
            .output();
        let reason = match done {
            Ok(out) if out.status.success() => None,
            Ok(out) => Some(String::from_utf8_lossy(&out.stderr).trim().to_owned()),
            Err(e) => Some(e.to_string()),
        };
        if let Some(reason) = reason {
            eprintln!("skipped: vmlinux-to-elf: {reason}");
            return Ok(None);
        }
    }
    // Other programs' tests may make it at the same time.
    let new = format!("{elf}.{}", std::process::id());
    let made = Command::new("python3")
        .arg("-c")
        .arg(include_str!("vmlinux.py"))
        .arg(&packages)
        .args([image, &new])
        .output()
        .map_err(|e| format!("python3: {e}"))?;
    let _ = std::fs::remove_file(format!("{new}.raw"));
    if !made.status.success() || !Path::new(&new).exists() {
        return Err(format!("symbols of {image}: {}", String::from_utf8_lossy(&made.stderr)));
    }
    std::fs::rename(&new, &elf).map_err(|e| format!("{elf}: {e}"))?;
    Ok(Some(elf))
}

/// Run gdb on the program file `elf` with these commands after it has connected to `target`; what it said.
pub fn gdb(elf: Option<&str>, target: &str, commands: &[&str], limit: Duration) -> Result<String> {
    let connect = format!("target remote {target}");
    let first = ["set pagination off", "set confirm off", "set width 0", &connect];
    let mut command = Command::new("timeout");
    command.arg(limit.as_secs().to_string()).args(["gdb", "-nx", "-batch"]);
    for line in first.iter().chain(commands) {
        command.args(["-ex", line]);
    }
    let out = command.args(elf).output().map_err(|e| format!("gdb: {e}"))?;
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    match out.status.success() {
        true => Ok(text),
        false => Err(format!("gdb ended with {}:\n{text}", out.status)),
    }
}

/// A client of the remote protocol, without a mind of its own.
pub struct Rsp(TcpStream);

impl Rsp {
    /// Connect.
    pub fn connect(address: SocketAddr) -> Result<Rsp> {
        let stream = wait_for("the stub", Duration::from_secs(20), || TcpStream::connect(address).ok())?;
        stream.set_read_timeout(Some(Duration::from_secs(60))).map_err(|e| e.to_string())?;
        Ok(Rsp(stream))
    }

    /// Send bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.0.write_all(bytes).map_err(|e| format!("gdb stub: {e}"))
    }

    /// Send a packet.
    pub fn send(&mut self, body: &str) -> Result<()> {
        let sum = body.bytes().fold(0u8, u8::wrapping_add);
        self.raw(format!("${body}#{sum:02x}").as_bytes())
    }

    /// Wait for a packet and acknowledge it; `None`: the connection is closed.
    pub fn receive(&mut self) -> Result<Option<String>> {
        let mut body = Vec::new();
        let mut byte = [0];
        loop {
            match self.0.read(&mut byte) {
                Ok(0) => return Ok(None),
                Ok(_) => body.push(byte[0]),
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return Ok(None),
                Err(e) => return Err(format!("gdb stub: {e}")),
            }
            if body.len() >= 3 && body[body.len() - 3] == b'#' {
                self.raw(b"+")?;
                let start = body.iter().position(|b| *b == b'$').map_or(0, |at| at + 1);
                return Ok(Some(unpack(&body[start..body.len() - 3])));
            }
        }
    }

    /// Send a packet and return the answer.
    pub fn ask(&mut self, body: &str) -> Result<String> {
        self.send(body)?;
        let answer = self.receive().map_err(|e| format!("{body}: {e}"))?;
        answer.ok_or_else(|| format!("the stub hung up instead of an answer to {body}"))
    }
}

/// Undo run-length encoding.
fn unpack(body: &[u8]) -> String {
    let mut out = Vec::new();
    let mut bytes = body.iter();
    while let Some(b) = bytes.next() {
        match (b, bytes.as_slice().first(), out.last().copied()) {
            (b'*', Some(n), Some(last)) => {
                out.extend(std::iter::repeat_n(last, usize::from(n.saturating_sub(29))));
                bytes.next();
            }
            _ => out.push(*b),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}
