//! Machines that a person or another program started. Each makes itself known by a QMP socket, `PID.qmp`, in a
//! directory; what lies there is believed only if the process at the other end is the one that the name says.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde_json::Value;

use crate::definition;
use crate::machine::{began, lock, Foreign};
use crate::qmp::Link;

/// More sockets than this in the directory are not looked at.
const MAX: usize = 1024;

/// A machine that was found.
#[derive(Clone, Debug)]
pub struct Found {
    pub name: String,
    pub process: Foreign,
}

/// Looks into the directory.
pub struct Finder {
    dir: PathBuf,
    /// Sockets that are being asked, or have been.
    asked: Mutex<BTreeSet<PathBuf>>,
    found: Arc<Mutex<Vec<Found>>>,
}

impl Finder {
    pub fn new(dir: &Path) -> Finder {
        Finder { dir: dir.to_owned(), asked: Mutex::default(), found: Arc::default() }
    }

    /// Ask the sockets that are new; the machines found since the last look.
    pub fn look(&self) -> Vec<Found> {
        let files = std::fs::read_dir(&self.dir).into_iter().flatten().flatten().take(MAX);
        let sockets: BTreeSet<PathBuf> = files.map(|f| f.path()).filter(|p| pid(p).is_some()).collect();
        let mut asked = lock(&self.asked);
        asked.retain(|p| sockets.contains(p));
        for path in sockets {
            let Some(pid) = pid(&path) else { continue };
            if began(pid).is_none() {
                // Left behind by a process that was killed.
                let _ = std::fs::remove_file(&path);
                asked.remove(&path);
                continue;
            }
            if !asked.insert(path.clone()) {
                continue;
            }
            let found = Arc::clone(&self.found);
            // It may take its time to answer.
            std::thread::spawn(move || match ask(&path, pid) {
                Ok(machine) => lock(&found).push(machine),
                Err(e) => log::warn!("{}: {e}", path.display()),
            });
        }
        drop(asked);
        std::mem::take(&mut *lock(&self.found))
    }
}

/// The process that a socket's name says.
fn pid(path: &Path) -> Option<u32> {
    path.file_name()?.to_str()?.strip_suffix(".qmp")?.parse().ok()
}

fn ask(path: &Path, pid: u32) -> Result<Found, String> {
    let start = began(pid).ok_or("the process has ended")?;
    let text = |e: std::io::Error| e.to_string();
    let owner = std::fs::symlink_metadata(path).map_err(text)?.uid();
    let stream = UnixStream::connect(path).map_err(text)?;
    let peer = getsockopt(&stream, PeerCredentials).map_err(|e| e.to_string())?;
    if peer.pid() != pid as i32 || peer.uid() != owner {
        return Err(format!("the socket is process {}'s of user {}", peer.pid(), peer.uid()));
    }
    let (link, _events) = Link::negotiate(stream).map_err(text)?;
    let name = link.command("query-name", Value::Null).map_err(|e| e.to_string())?;
    let name: String = name["name"].as_str().unwrap_or_default().chars().take(40).collect();
    let name = name.replace(|c: char| !c.is_ascii_alphanumeric() && !"._-".contains(c), "_");
    let name = match definition::check_name(&name) {
        Ok(()) => name,
        Err(_) => format!("process-{pid}"),
    };
    Ok(Found { name, process: Foreign { pid, began: start, socket: path.to_owned() } })
}
