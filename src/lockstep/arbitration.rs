//! The atomic test-and-set on shared storage (section 2.3 of the paper).
//!
//! Beside the image lie, for the pairing with token `T`:
//!
//! * `LOCK.T.primary` and `LOCK.T.backup`, the claims: each side makes its own before the machine is
//!   protected, and the backup checks that it sees the primary's (same storage);
//! * `LOCK.T`, the lock: a hard link to the winner's claim, made with link(2), which is atomic on
//!   local file systems and NFS.
//!
//! The winner removes the loser's claim. A side whose claim is gone has lost: its link(2) fails, so a
//! stale side of an older pairing can never win, whenever it wakes up. An ambiguous answer (a reply lost on
//! NFS and the request repeated) is settled by reading the lock back: it holds the winner's name.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use ftvm_block::files::Files;

use super::wire::{Epoch, Side};

/// The answer of the test-and-set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Won,
    Lost,
}

/// A place where exactly one side of a pairing can win, once.
pub trait Arbiter: Send + Sync {
    /// What it is, for messages.
    fn describe(&self) -> String;
    /// Make this side's claim, before the machine is protected.
    fn claim(&self, epoch: &Epoch, side: Side) -> io::Result<()>;
    /// Whether the other side's claim is visible here, that is, whether both see one storage.
    fn sees_peer(&self, epoch: &Epoch, side: Side) -> io::Result<bool>;
    /// Test-and-set. An error means no answer: ask again, do not go live.
    fn try_win(&self, epoch: &Epoch, side: Side) -> io::Result<Verdict>;
    /// The pairing ended without a contest (resignation, end of the machine): take the claims away.
    fn retire(&self, epoch: &Epoch);
}

/// The lock as files beside the image, on a mounted file system or an NFS server.
#[derive(Clone)]
pub struct FileLock {
    files: Arc<dyn Files>,
    name: String,
    path: PathBuf,
}

fn name(side: Side) -> &'static str {
    match side {
        Side::Primary => "primary",
        Side::Backup => "backup",
    }
}

fn other(side: Side) -> Side {
    match side {
        Side::Primary => Side::Backup,
        Side::Backup => Side::Primary,
    }
}

impl FileLock {
    /// A lock at `path` (usually `<image>.ftlock`), a path or an `nfs://` URL.
    pub fn new(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        let (files, name) = ftvm_block::files::beside(&path)?;
        Ok(FileLock { files, name, path })
    }

    fn lock(&self, epoch: &Epoch) -> String {
        format!("{}.{}", self.name, epoch.token)
    }

    fn claim_name(&self, epoch: &Epoch, side: Side) -> String {
        format!("{}.{}.{}", self.name, epoch.token, name(side))
    }

    /// Who holds the lock of a pairing, read back from the file.
    fn holder(&self, epoch: &Epoch) -> io::Result<Option<Side>> {
        match self.files.read(&self.lock(epoch)) {
            Ok(text) => match text.split(|b| b.is_ascii_whitespace()).next() {
                Some(b"primary") => Ok(Some(Side::Primary)),
                Some(b"backup") => Ok(Some(Side::Backup)),
                _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the lock's contents are not readable")),
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }
}

impl Arbiter for FileLock {
    fn describe(&self) -> String {
        self.path.display().to_string()
    }

    fn claim(&self, epoch: &Epoch, side: Side) -> io::Result<()> {
        let text = format!("{} {} {}\n", name(side), epoch.number, epoch.token);
        self.files.create(&self.claim_name(epoch, side), text.as_bytes())
    }

    fn sees_peer(&self, epoch: &Epoch, side: Side) -> io::Result<bool> {
        match self.files.read(&self.claim_name(epoch, other(side))) {
            Ok(text) => Ok(String::from_utf8_lossy(&text).contains(&epoch.token)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn try_win(&self, epoch: &Epoch, side: Side) -> io::Result<Verdict> {
        let linked = self.files.link(&self.claim_name(epoch, side), &self.lock(epoch));
        let verdict = match (linked, self.holder(epoch)) {
            (_, Ok(Some(holder))) if holder == side => Verdict::Won,
            (_, Ok(Some(_))) => Verdict::Lost,
            // No claim and no lock: the winner has cleaned up; this pairing is long over.
            (Err(e), Ok(None)) if e.kind() == io::ErrorKind::NotFound => {
                // Only if the storage itself answers: its directory must be there.
                self.files.check()?;
                Verdict::Lost
            }
            (Err(e), _) => return Err(e),
            (Ok(()), Ok(None)) => return Err(io::Error::other("the lock vanished after it was made")),
            (Ok(()), Err(e)) => return Err(e),
        };
        if verdict == Verdict::Won {
            self.files.check()?;
            match self.files.remove(&self.claim_name(epoch, other(side))) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        Ok(verdict)
    }

    fn retire(&self, epoch: &Epoch) {
        // The claims first: from then on nobody can win.
        for side in [Side::Primary, Side::Backup] {
            let _ = self.files.remove(&self.claim_name(epoch, side));
        }
        let _ = self.files.remove(&self.lock(epoch));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::sync::Barrier;

    fn epoch(n: u64) -> Epoch {
        Epoch { number: n, token: format!("tok{n}") }
    }

    fn dir(name: &str) -> PathBuf {
        let d = std::env::temp_dir().join(format!("ftvm-lock-{name}-{}", std::process::id()));
        fs::create_dir_all(&d).unwrap();
        d
    }

    #[test]
    fn exactly_one_side_wins_every_race() {
        let d = dir("race");
        for round in 0..200 {
            let barrier = Arc::new(Barrier::new(2));
            let lock = FileLock::new(d.join("vm.ftlock")).unwrap();
            let e = epoch(round);
            for side in [Side::Primary, Side::Backup] {
                lock.claim(&e, side).unwrap();
            }
            assert!(lock.sees_peer(&e, Side::Backup).unwrap());
            let threads: Vec<_> = [Side::Primary, Side::Backup]
                .map(|side| {
                    let (lock, e, barrier) = (lock.clone(), e.clone(), barrier.clone());
                    std::thread::spawn(move || {
                        barrier.wait();
                        lock.try_win(&e, side).unwrap()
                    })
                })
                .into();
            let verdicts: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
            assert!(verdicts.contains(&Verdict::Won) && verdicts.contains(&Verdict::Lost), "{verdicts:?}");
        }
        fs::remove_dir_all(d).unwrap();
    }

    #[test]
    fn the_winner_wins_again_and_a_stale_side_never() {
        let d = dir("stale");
        let lock = FileLock::new(d.join("vm.ftlock")).unwrap();
        let e = epoch(1);
        lock.claim(&e, Side::Primary).unwrap();
        lock.claim(&e, Side::Backup).unwrap();
        assert_eq!(lock.try_win(&e, Side::Backup).unwrap(), Verdict::Won);
        assert_eq!(lock.try_win(&e, Side::Backup).unwrap(), Verdict::Won, "an ambiguous answer is settled");
        assert_eq!(lock.try_win(&e, Side::Primary).unwrap(), Verdict::Lost);
        lock.retire(&e);
        assert_eq!(
            lock.try_win(&e, Side::Primary).unwrap(),
            Verdict::Lost,
            "after the winner cleaned up too"
        );
        fs::remove_dir_all(&d).unwrap();
        assert!(lock.try_win(&e, Side::Primary).is_err(), "no storage is no answer");
    }
}
