//! File descriptors that a client passes over its Unix socket (SCM_RIGHTS).

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;

use crate::QmpError;

/// Descriptors that may wait for a command to take them; older ones are closed.
const WAITING: usize = 16;

/// One client's descriptors.
#[derive(Default)]
pub struct Fds {
    waiting: VecDeque<OwnedFd>,
    named: BTreeMap<String, OwnedFd>,
}

impl Fds {
    /// A descriptor came in.
    pub fn received(&mut self, fd: OwnedFd) {
        if self.waiting.len() == WAITING {
            self.waiting.pop_front();
        }
        self.waiting.push_back(fd);
    }

    /// The descriptor that came with this command.
    pub fn take(&mut self) -> Result<OwnedFd, QmpError> {
        self.waiting
            .pop_front()
            .ok_or_else(|| QmpError::generic("No file descriptor supplied via SCM_RIGHTS"))
    }

    /// `getfd`.
    pub fn keep(&mut self, name: &str) -> Result<(), QmpError> {
        let fd = self.take()?;
        if name.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(QmpError::generic("Parameter 'fdname' expects a name not starting with a digit"));
        }
        self.named.insert(name.to_owned(), fd);
        Ok(())
    }

    /// `closefd`.
    pub fn close(&mut self, name: &str) -> Result<(), QmpError> {
        match self.named.remove(name) {
            Some(_) => Ok(()),
            None => Err(QmpError::generic(format!("File descriptor named '{name}' not found"))),
        }
    }

    /// Take the descriptor that `getfd` has put under this name.
    pub fn named(&mut self, name: &str) -> Result<OwnedFd, QmpError> {
        self.named
            .remove(name)
            .ok_or_else(|| QmpError::generic(format!("File descriptor named '{name}' has not been found")))
    }
}
