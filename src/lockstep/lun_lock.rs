//! The test-and-set on a SCSI LUN: the key under which its persistent reservation is held.
//!
//! | the holder's key says | who may win |
//! |---|---|
//! | alone | nobody: there is no pairing |
//! | paired with token `T`, held by the primary | the primary by changing its key, the backup by taking its place |
//! | ended | nobody; the next machine may have the LUN |
//! | won with token `T`, by the primary or the backup | that side has won; the other has lost |
//!
//! Both changes are one command each that names the key it expects, so exactly one is done. From the moment the
//! backup's is done the target refuses whatever the old primary still writes.

use std::io;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use ftvm_block::iscsi::{LunLock, ENDED};

use super::arbitration::{Arbiter, Verdict};
use super::wire::{Epoch, Side};

const ALONE: u8 = 1;
const PAIRED: u8 = 2;
const PRIMARY_WON: u8 = 3;
const BACKUP_WON: u8 = 4;

/// A target that lost all reservations with a restart cannot say who won before. A winner that lives makes its
/// reservation again as soon as the target answers; so whoever finds none waits this long.
const ABSENT: Duration = Duration::from_secs(5);

fn key(phase: u8, token: &str) -> u64 {
    ftvm_block::iscsi::key(phase, crc32fast::hash(token.as_bytes()))
}

/// The key of a machine that is not paired.
pub fn alone(token: &str) -> u64 {
    key(ALONE, token)
}

/// Equal but for the generation.
fn same(a: u64, b: u64) -> bool {
    (a ^ b) & !(0xFF << 32) == 0
}

/// What a key says, in words; `None` if it is not ftvm's.
pub fn describe(key: u64) -> Option<&'static str> {
    match ftvm_block::iscsi::phase(key)? {
        ALONE => Some("a machine without a backup"),
        PAIRED => Some("the primary of a pair"),
        PRIMARY_WON => Some("a primary that went on alone"),
        BACKUP_WON => Some("a backup that took over"),
        ENDED => Some("nobody: a side that had taken over, and ended in order"),
        _ => None,
    }
}

/// The reservation of a LUN as the lock.
pub struct LunArbiter {
    lock: LunLock,
    url: String,
    absent: Mutex<Option<Instant>>,
}

impl LunArbiter {
    /// The lock on the LUN `url`; `shown` is its name without a password.
    pub fn open(url: &str, shown: String) -> io::Result<Self> {
        Ok(LunArbiter { lock: LunLock::open(url)?, url: shown, absent: Mutex::default() })
    }

    /// Nobody holds the LUN: after a while whoever comes first may.
    fn nobody(&self, mine: u64) -> io::Result<Verdict> {
        let since = {
            let mut absent = self.absent.lock().map_err(|_| io::Error::other("internal lock"))?;
            *absent.get_or_insert_with(Instant::now)
        };
        if since.elapsed() >= ABSENT && self.lock.take_free(mine)? {
            return Ok(Verdict::Won);
        }
        Err(io::Error::other("the target has lost its reservations: waiting for their owner"))
    }
}

impl Arbiter for LunArbiter {
    fn describe(&self) -> String {
        format!("reservation of {}", self.url)
    }

    fn claim(&self, epoch: &Epoch, side: Side) -> io::Result<()> {
        match side {
            Side::Primary if self.lock.change(key(PAIRED, &epoch.token))? => Ok(()),
            Side::Primary => Err(io::Error::other("this host does not hold the LUN's reservation")),
            // The backup's is its right to take the primary's place; it needs nothing on the LUN before.
            Side::Backup => self.lock.holder().map(|_| ()),
        }
    }

    fn sees_peer(&self, epoch: &Epoch, _side: Side) -> io::Result<bool> {
        Ok(self.lock.holder()?.is_some_and(|h| same(h, key(PAIRED, &epoch.token))))
    }

    fn try_win(&self, epoch: &Epoch, side: Side) -> io::Result<Verdict> {
        let phase = if side == Side::Primary { PRIMARY_WON } else { BACKUP_WON };
        let (paired, won) = (key(PAIRED, &epoch.token), key(phase, &epoch.token));
        let Some(holder) = self.lock.holder()? else { return self.nobody(won) };
        *self.absent.lock().map_err(|_| io::Error::other("internal lock"))? = None;
        if same(holder, won) {
            return Ok(Verdict::Won);
        }
        if !same(holder, paired) {
            return Ok(Verdict::Lost);
        }
        let done = match side {
            Side::Primary => self.lock.change(won)?,
            Side::Backup => self.lock.take_from(holder, won)?,
        };
        if done {
            return Ok(Verdict::Won);
        }
        // It changed in between: the next look decides.
        match self.lock.holder()? {
            Some(now) if !same(now, paired) && !same(now, won) => Ok(Verdict::Lost),
            _ => Err(io::Error::other("the reservation has just changed")),
        }
    }

    fn retire(&self, epoch: &Epoch) {
        if self.lock.held().is_some_and(|h| same(h, key(PAIRED, &epoch.token))) {
            if let Err(e) = self.lock.change(key(ALONE, &epoch.token)) {
                log::warn!("the {}: {e}", self.describe());
            }
        }
    }
}
