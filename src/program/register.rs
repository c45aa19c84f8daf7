//! A machine makes itself known on its host: a QMP socket of its own, `PID.qmp`, in a directory that the service
//! (ftvmd) looks into. Without such a directory, or without leave to write there, nothing happens.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use ftvm_qmp::{serve_listener, Hub, Listener};

use crate::monitor::Control;

/// The directory, in the place of those below; empty: none.
const VARIABLE: &str = "FTVM_REGISTRY";
/// The system's service looks here; a user's looks below `XDG_RUNTIME_DIR`.
const SYSTEM: &str = "/run/ftvm/machines";

/// The socket, if there is one.
static SOCKET: Mutex<Option<PathBuf>> = Mutex::new(None);

fn directories() -> Vec<PathBuf> {
    if let Some(dir) = std::env::var_os(VARIABLE) {
        return if dir.is_empty() { Vec::new() } else { vec![dir.into()] };
    }
    let user = std::env::var_os("XDG_RUNTIME_DIR").map(|d| PathBuf::from(d).join("ftvm/machines"));
    [SYSTEM.into()].into_iter().chain(user).collect()
}

/// Listen in the first directory that takes the socket.
pub fn register(control: &Arc<Control>) {
    for dir in directories().into_iter().filter(|d| d.is_dir()) {
        let path = dir.join(format!("{}.qmp", std::process::id()));
        // A process that had this number before.
        let _ = std::fs::remove_file(&path);
        let listener = match UnixListener::bind(&path) {
            Ok(listener) => Listener::Unix(listener),
            Err(e) => {
                log::debug!("{}: {e}", path.display());
                continue;
            }
        };
        let hub =
            Hub { handler: Arc::clone(control) as _, events: control.shared.events.clone(), pretty: false };
        let serve = move || serve_listener(listener, &hub);
        match std::thread::Builder::new().name("qmp".into()).spawn(serve) {
            Ok(_) => *SOCKET.lock().unwrap_or_else(PoisonError::into_inner) = Some(path),
            Err(e) => {
                log::debug!("no thread for {}: {e}", path.display());
                let _ = std::fs::remove_file(&path);
            }
        }
        return;
    }
}

/// The machine ends: take the socket away.
pub fn forget() {
    if let Some(path) = SOCKET.lock().unwrap_or_else(PoisonError::into_inner).take() {
        let _ = std::fs::remove_file(path);
    }
}
