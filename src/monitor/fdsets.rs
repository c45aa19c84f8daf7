//! Sets of file descriptors: `/dev/fdset/N` names set N wherever a file is opened.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Mutex;

use ftvm_qmp::{Call, QmpError};
use serde_json::json;

use super::{done, Control, Reply};

/// Descriptors in all sets together.
const MAX: usize = 1024;

struct Member {
    fd: OwnedFd,
    opaque: Option<String>,
}

/// All sets by number.
#[derive(Default)]
pub struct FdSets(Mutex<BTreeMap<i64, Vec<Member>>>);

impl FdSets {
    /// The name under which a file given by a user can be opened: one of the set's descriptors for
    /// `/dev/fdset/N`, the name itself otherwise.
    pub fn resolve(&self, path: &str) -> Result<String, QmpError> {
        let Some(number) = path.strip_prefix("/dev/fdset/") else { return Ok(path.to_owned()) };
        let sets = self.0.lock().map_err(|_| QmpError::generic("internal lock"))?;
        let members = number.parse().ok().and_then(|n: i64| sets.get(&n));
        let members =
            members.ok_or_else(|| QmpError::generic(format!("Could not open '{path}': no such set")))?;
        // Prefer one that can be written: an image for reading is opened from it as well.
        let writable = |m: &&Member| {
            let flags = nix::fcntl::fcntl(&m.fd, nix::fcntl::FcntlArg::F_GETFL).unwrap_or(0);
            flags & libc::O_ACCMODE != libc::O_RDONLY
        };
        let member = members.iter().find(writable).or(members.first());
        member
            .map(|m| format!("/proc/self/fd/{}", m.fd.as_raw_fd()))
            .ok_or_else(|| QmpError::generic(format!("Could not open '{path}': the set is empty")))
    }
}

pub fn add(c: &Control, call: &mut Call) -> Reply {
    let fd = call.fds.take()?;
    let opaque = call.arguments.get("opaque").and_then(|o| o.as_str()).map(str::to_owned);
    let mut sets = c.fdsets.0.lock().map_err(|_| QmpError::generic("internal lock"))?;
    if sets.values().map(Vec::len).sum::<usize>() >= MAX {
        return Err(QmpError::generic("too many file descriptors in sets"));
    }
    let id = match call.int("fdset-id") {
        Some(id) if id < 0 => {
            return Err(QmpError::generic("Parameter 'fdset-id' expects a non-negative value"))
        }
        Some(id) => id,
        None => (0..).find(|n| !sets.contains_key(n)).unwrap_or(0),
    };
    let number = fd.as_raw_fd();
    sets.entry(id).or_default().push(Member { fd, opaque });
    Ok(json!({"fdset-id": id, "fd": number}))
}

pub fn remove(c: &Control, call: &mut Call) -> Reply {
    let (id, fd) = (call.int("fdset-id").unwrap_or(-1), call.int("fd"));
    let mut sets = c.fdsets.0.lock().map_err(|_| QmpError::generic("internal lock"))?;
    let text = match fd {
        Some(fd) => format!("fdset-id:{id}, fd:{fd}"),
        None => format!("fdset-id:{id}"),
    };
    let missing = || QmpError::generic(format!("File descriptor named '{text}' not found"));
    let members = sets.get_mut(&id).ok_or_else(missing)?;
    let before = members.len();
    members.retain(|m| fd.is_some_and(|fd| i64::from(m.fd.as_raw_fd()) != fd));
    if members.len() == before {
        return Err(missing());
    }
    if members.is_empty() {
        sets.remove(&id);
    }
    done()
}

pub fn query(c: &Control, _: &mut Call) -> Reply {
    let sets = c.fdsets.0.lock().map_err(|_| QmpError::generic("internal lock"))?;
    let mut out = Vec::new();
    for (id, members) in sets.iter() {
        let mut fds = Vec::new();
        for m in members {
            let mut entry = json!({"fd": m.fd.as_raw_fd()});
            if let Some(opaque) = &m.opaque {
                entry["opaque"] = json!(opaque);
            }
            fds.push(entry);
        }
        out.push(json!({"fdset-id": id, "fds": fds}));
    }
    Ok(json!(out))
}
