//! `tap`: a TAP interface of the host.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::process::Command;

use crate::{Backend, NetError, Receive};

// linux/if_tun.h: _IOW('T', 202, int)
nix::ioctl_write_int!(tun_set_iff, b'T', 202);

/// A TAP interface.
pub struct Tap {
    file: File,
    name: String,
    downscript: Option<String>,
}

impl Tap {
    /// Open (and create, if need be) the interface `name` (`None`: the kernel picks `tapN`), run
    /// `script` with its name as argument, and deliver what arrives to `receive`.
    pub fn open(
        name: Option<&str>,
        script: Option<&str>,
        downscript: Option<&str>,
        receive: Receive,
    ) -> Result<Self, NetError> {
        let shown = name.unwrap_or("tap%d").to_owned();
        let fail = |e: std::io::Error| NetError::Tap(shown.clone(), e);
        let file = File::options().read(true).write(true).open("/dev/net/tun").map_err(fail)?;
        // SAFETY: an all-zero ifreq is a valid value of that C structure.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if shown.len() >= request.ifr_name.len() {
            return Err(fail(std::io::Error::from_raw_os_error(libc::ENAMETOOLONG)));
        }
        for (slot, byte) in request.ifr_name.iter_mut().zip(shown.bytes()) {
            *slot = byte as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes the ifreq, which outlives the call.
        unsafe { tun_set_iff(file.as_raw_fd(), std::ptr::from_mut(&mut request) as u64) }
            .map_err(|e| fail(e.into()))?;
        let name: String =
            request.ifr_name.iter().take_while(|c| **c != 0).map(|c| *c as u8 as char).collect();
        if let Some(script) = script {
            run_script(script, &name)?;
        }
        Self::start(file, name, downscript.map(str::to_owned), receive)
    }

    /// Use an already configured TAP descriptor (`fd=`).
    pub fn from_fd(fd: RawFd, receive: Receive) -> Result<Self, NetError> {
        // SAFETY: the descriptor was passed to this process for this use; wrong numbers fail at the first read.
        let file = unsafe { File::from_raw_fd(fd) };
        Self::start(file, format!("fd {fd}"), None, receive)
    }

    fn start(
        file: File,
        name: String,
        downscript: Option<String>,
        mut receive: Receive,
    ) -> Result<Self, NetError> {
        let mut reader = file.try_clone().map_err(|e| NetError::Tap(name.clone(), e))?;
        std::thread::Builder::new()
            .name(format!("net-{name}"))
            .spawn(move || {
                let mut buf = vec![0u8; 65536];
                loop {
                    match reader.read(&mut buf) {
                        Ok(0) => return,
                        Ok(n) => receive(buf[..n].to_vec()),
                        Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                        Err(e) if e.raw_os_error() == Some(libc::EIO) => {
                            // The interface is down: it may come up again.
                            std::thread::sleep(std::time::Duration::from_millis(100));
                        }
                        Err(e) => {
                            log::warn!("tap: reading stopped: {e}");
                            return;
                        }
                    }
                }
            })
            .map_err(NetError::Thread)?;
        Ok(Tap { file, name, downscript })
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

fn run_script(script: &str, name: &str) -> Result<(), NetError> {
    let status = Command::new(script).arg(name).status().map_err(|e| NetError::Tap(script.to_owned(), e))?;
    if status.success() {
        Ok(())
    } else {
        Err(NetError::Script(script.to_owned(), status.code().unwrap_or(-1)))
    }
}

impl Backend for Tap {
    fn send(&mut self, frame: &[u8]) {
        if let Err(e) = self.file.write_all(frame) {
            log::debug!("tap {}: a frame was dropped: {e}", self.name);
        }
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if let Some(script) = &self.downscript {
            if let Err(e) = run_script(script, &self.name) {
                log::warn!("{e}");
            }
        }
    }
}
