//! Whether storage's test-and-set is one: two racers reach for a name at once, and exactly one may have it.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Barrier;

use super::{wrong, Seen};
use crate::cluster::wire::Race;

/// The two ways in which a lock can be made.
pub const KINDS: [&str; 2] = ["exclusive creation", "link"];
/// The mend, if storage is not fit.
pub const MEND: &str =
    "use storage that both hosts see and that has hard links (NFS, OCFS2, GFS2), or a LUN (iscsi://)";
/// Rounds of each kind.
const ROUNDS: u32 = 50;
/// The most that a peer can be asked for.
const MAX_ROUNDS: u32 = 1000;

/// One of two who reach for the same names.
pub struct Racer {
    dir: PathBuf,
    tag: String,
    by_link: bool,
    who: String,
}

impl Racer {
    /// `who`: differs between the two.
    pub fn new(race: &Race, who: &str) -> Result<Racer, String> {
        let fine = |c: char| c.is_ascii_alphanumeric() || c == '-';
        if race.tag.is_empty() || race.tag.len() > 64 || !race.tag.chars().all(fine) {
            return Err("a race's tag is up to 64 letters, digits and '-'".into());
        }
        if !KINDS.contains(&race.kind.as_str()) || race.rounds > MAX_ROUNDS {
            return Err(format!("there is no race of {} rounds by {}", race.rounds, race.kind));
        }
        Ok(Racer {
            dir: race.dir.clone().into(),
            tag: race.tag.clone(),
            by_link: race.kind == "link",
            who: who.to_owned(),
        })
    }

    fn path(&self, round: u32, what: &str) -> PathBuf {
        self.dir.join(format!(".ftvm-check-{}-{round}-{what}", self.tag))
    }

    fn said(&self, e: &std::io::Error) -> String {
        format!("{}: {}: {e}", self.dir.display(), if self.by_link { KINDS[1] } else { KINDS[0] })
    }

    /// Make what a round needs.
    pub fn ready(&self, round: u32) -> Result<(), String> {
        if !self.by_link {
            return Ok(());
        }
        let own = self.path(round, &self.who);
        OpenOptions::new().write(true).create_new(true).open(own).map(drop).map_err(|e| self.said(&e))
    }

    /// Reach for the round's name; whether it was had.
    pub fn run(&self, round: u32) -> Result<bool, String> {
        let (own, target) = (self.path(round, &self.who), self.path(round, "target"));
        let made = match self.by_link {
            true => std::fs::hard_link(&own, &target),
            false => OpenOptions::new().write(true).create_new(true).open(&target).map(drop),
        };
        if self.by_link {
            let _ = std::fs::remove_file(&own);
        }
        match made {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(self.said(&e)),
        }
    }

    /// Whether the round's name is seen here, as it must be when the other one has it.
    pub fn sees(&self, round: u32) -> bool {
        self.path(round, "target").exists()
    }

    /// Take the round's name away.
    pub fn clean(&self, round: u32) {
        let _ = std::fs::remove_file(self.path(round, "target"));
        let _ = std::fs::remove_file(self.path(round, &self.who));
    }
}

/// A race of this kind, as the other one is told of it.
pub fn of(dir: &str, kind: &str) -> Race {
    let tag = format!("{}-{}", std::process::id(), crate::cluster::server::now());
    Race { dir: dir.to_owned(), tag, kind: kind.to_owned(), rounds: ROUNDS }
}

/// Two threads of this host race: what does not stand this does not stand two hosts.
pub fn alone(dir: &Path) -> Seen {
    for kind in KINDS {
        let race = of(&dir.display().to_string(), kind);
        for round in 0..race.rounds {
            let (mine, other) = match (Racer::new(&race, "a"), Racer::new(&race, "b")) {
                (Ok(a), Ok(b)) => (a, b),
                (Err(e), _) | (_, Err(e)) => return wrong(e, MEND),
            };
            let start = Barrier::new(2);
            let contend = |racer: &Racer| {
                let ready = racer.ready(round);
                // The other one waits even for a racer that cannot start.
                start.wait();
                ready.and_then(|()| racer.run(round))
            };
            let won = std::thread::scope(|scope| {
                let thread = scope.spawn(|| contend(&other));
                let mine = contend(&mine);
                (mine, thread.join().unwrap_or_else(|_| Err("a racer failed".into())))
            });
            mine.clean(round);
            other.clean(round);
            match won {
                (Ok(a), Ok(b)) if a != b => {}
                (Ok(a), Ok(b)) => {
                    let won = u32::from(a) + u32::from(b);
                    return wrong(format!("{}: {won} of two racers won by {kind}", dir.display()), MEND);
                }
                (Err(e), _) | (_, Err(e)) => return wrong(e, MEND),
            }
        }
    }
    Ok(format!(
        "{}: one of two racers on this host wins, by {} and by {}, {ROUNDS} times each",
        dir.display(),
        KINDS[0],
        KINDS[1]
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_race_that_a_peer_asks_for_stays_in_its_bounds() {
        let race = of("/tmp", "link");
        assert!(Racer::new(&race, "a").is_ok());
        for (tag, kind, rounds) in
            [("../x", "link", 1), ("x", "rename", 1), ("x", "link", 1001), ("", "link", 1)]
        {
            let race = Race { dir: "/tmp".into(), tag: tag.into(), kind: kind.into(), rounds };
            assert!(Racer::new(&race, "a").is_err(), "{tag} {kind} {rounds}");
        }
    }
}
