//! What can be seen of a pair of hosts only with the service of the other one.

use std::time::{Duration, Instant};

use super::race::{self, Racer};
use super::{wrong, Finding, Seen};
use crate::cluster::peers::Talk;
use crate::cluster::wire::{Answer, HostState, Request};
use crate::cluster::{server, Cluster};

/// Round trips that are measured.
const TRIPS: usize = 20;
/// The longest round trip between two hosts (VMware asks for less than 10 ms): each output waits for one.
const ROUND_TRIP: Duration = Duration::from_millis(10);
/// The least bandwidth, in Mbit/s: what the paper names as enough for most machines.
const BANDWIDTH: f64 = 20.0;
/// What is sent to measure it, at most, and for how long.
const POUR: usize = 64 << 20;
const POUR_TIME: Duration = Duration::from_millis(1500);
/// How far clocks may be apart. The guest's clock follows the primary's host.
const CLOCKS: Duration = Duration::from_secs(1);

fn talk_failed(e: &crate::Error) -> (String, String) {
    (e.to_string(), "look after ftvmd there, the port (8099), and the certificates (ftctl cert)".into())
}

/// Check this host against a peer.
pub fn run(cluster: &Cluster, peer: &str, lock_dir: Option<&str>, memory: Option<u64>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut put = |what: &str, result: Seen| findings.push(Finding::new(what, result));
    let mut talk = match cluster.talk_to(peer) {
        Ok(talk) => talk,
        Err(e) => {
            put("service", Err(talk_failed(&e)));
            return findings;
        }
    };
    let own = cluster.own_state();
    match talk.ask(&Request::State(Box::new(own.clone()))) {
        Ok(Answer::State(state)) => {
            put("service", Ok(format!("{peer} answers, and both know each other's certificate")));
            put("versions", versions(&own, &state));
            put("features", features(&own, &state));
            put("their memory", their_memory(&state, memory));
            put("maintenance", maintenance(&state));
        }
        Ok(other) => put("service", wrong(format!("an unexpected answer: {other:?}"), "update both hosts")),
        Err(e) => put("service", Err(talk_failed(&e))),
    }
    let clock = clock(&mut talk);
    match clock {
        Ok((trip, apart)) => {
            put("round trip", round_trip(trip));
            put("clocks", clocks(apart));
        }
        Err(e) => put("round trip", Err(talk_failed(&e))),
    }
    put("bandwidth", bandwidth(&mut talk).unwrap_or_else(|e| Err(talk_failed(&e))));
    if let Some(dir) = lock_dir {
        put("shared lock", contest(cluster, peer, dir));
    }
    findings
}

fn versions(own: &HostState, peer: &HostState) -> Seen {
    match own.version == peer.version {
        true => Ok(format!("both hosts have ftvm {}", own.version)),
        false => wrong(
            format!("this host has ftvm {}, {} has {}", own.version, peer.name, peer.version),
            "install the same version on both",
        ),
    }
}

fn features(own: &HostState, peer: &HostState) -> Seen {
    let lacks = |a: &HostState, b: &HostState| -> Vec<String> {
        a.features.iter().filter(|f| !b.features.contains(f)).cloned().collect()
    };
    let (there, here) = (lacks(own, peer), lacks(peer, own));
    let mend = "give machines a processor model that both have (-cpu qemu64, or a named one; not -cpu max)";
    match (there.is_empty(), here.is_empty()) {
        (true, true) => Ok("both processors have the same of what machines can be given".into()),
        (false, _) => wrong(format!("{} lacks {}", peer.name, there.join(", ")), mend),
        (_, false) => wrong(format!("this host lacks {}", here.join(", ")), mend),
    }
}

fn their_memory(peer: &HostState, wanted: Option<u64>) -> Seen {
    let available = peer.available >> 20;
    let needed = wanted.map_or(0, |mib| mib + (crate::cluster::place::BESIDES >> 20));
    match needed > available {
        true => wrong(
            format!("{} has {available} MiB; the machine takes up to {needed} MiB", peer.name),
            "end something else there, add memory, or give the machine less (-m)",
        ),
        false => Ok(format!("{available} MiB available on {}", peer.name)),
    }
}

fn maintenance(peer: &HostState) -> Seen {
    match peer.maintenance {
        true => wrong(format!("{} is in maintenance", peer.name), "end it there: ftctl maintenance off"),
        false => Ok(format!("{} takes machines", peer.name)),
    }
}

/// The median round trip, and how far the peer's clock is from this one's.
fn clock(talk: &mut Talk) -> crate::Result<(Duration, Duration)> {
    let mut trips = Vec::new();
    for _ in 0..TRIPS {
        let (start, before) = (Instant::now(), server::now());
        let theirs = match talk.ask(&Request::Clock)? {
            Answer::Clock(time) => time,
            other => return Err(crate::Error::Machine(format!("an unexpected answer: {other:?}"))),
        };
        let trip = start.elapsed();
        trips.push((trip, (before + trip.as_micros() as u64 / 2).abs_diff(theirs)));
    }
    trips.sort();
    let apart = trips.first().map_or(0, |t| t.1);
    Ok((trips[TRIPS / 2].0, Duration::from_micros(apart)))
}

fn round_trip(trip: Duration) -> Seen {
    let ms = trip.as_secs_f64() * 1000.0;
    match trip > ROUND_TRIP {
        true => wrong(
            format!("{ms:.2} ms: every output of a protected machine waits so long"),
            format!("put the hosts on one network, less than {} ms apart", ROUND_TRIP.as_millis()),
        ),
        false => Ok(format!("{ms:.2} ms (median of {TRIPS})")),
    }
}

fn clocks(apart: Duration) -> Seen {
    match apart > CLOCKS {
        true => wrong(
            format!(
                "the hosts' clocks are {:.1} s apart; a guest's clock would go after it in a takeover",
                apart.as_secs_f64()
            ),
            "set them by one source: chrony, systemd-timesyncd",
        ),
        false => Ok(format!("{:.1} ms apart", apart.as_secs_f64() * 1000.0)),
    }
}

fn bandwidth(talk: &mut Talk) -> crate::Result<Seen> {
    let block = vec![0x5A; 256 << 10];
    let (start, mut poured) = (Instant::now(), 0);
    while poured < POUR && start.elapsed() < POUR_TIME {
        talk.ask_with(&Request::Sink(block.len() as u64 * 8), |t| (0..8).try_for_each(|_| t.pour(&block)))?;
        poured += block.len() * 8;
    }
    let mbps = poured as f64 * 8.0 / start.elapsed().as_secs_f64() / 1e6;
    Ok(match mbps < BANDWIDTH {
        true => wrong(
            format!("{mbps:.0} Mbit/s: the log of a busy machine does not fit"),
            format!("use a network of more than {BANDWIDTH} Mbit/s between the hosts, better 1 Gbit/s"),
        ),
        false => Ok(format!("{mbps:.0} Mbit/s over one encrypted connection")),
    })
}

/// Both hosts reach for the same names in a directory of the shared storage.
fn contest(cluster: &Cluster, peer: &str, dir: &str) -> Seen {
    let mut wins = (0, 0);
    for kind in race::KINDS {
        match contest_by(cluster, peer, dir, kind) {
            Ok((mine, theirs)) => wins = (wins.0 + mine, wins.1 + theirs),
            Err(cause) => return wrong(cause, race::MEND),
        }
    }
    Ok(format!(
        "{dir}: in every race one of both hosts wins, by {} and by {} (this host {}, {peer} {})",
        race::KINDS[0],
        race::KINDS[1],
        wins.0,
        wins.1
    ))
}

fn contest_by(cluster: &Cluster, peer: &str, dir: &str, kind: &str) -> Result<(u32, u32), String> {
    let said = |e: crate::Error| format!("{peer}: {e}");
    let race = race::of(dir, kind);
    let racer = Racer::new(&race, "asker")?;
    let mut talk = cluster.talk_to(peer).map_err(said)?;
    let (mut mine, mut theirs) = (0, 0);
    let mut trip = Duration::ZERO;
    for round in 0..race.rounds {
        racer.ready(round)?;
        let ready = match round {
            0 => talk.ask(&Request::Race(race.clone())),
            _ => talk.answer(),
        };
        ready.map_err(said).inspect_err(|_| racer.clean(round))?;
        let start = Instant::now();
        talk.say(&Request::Go).map_err(said)?;
        // The word is under way for half a round trip. Now and then one is sooner, now and then the other.
        let lead = trip / 2 * (round % 3);
        while start.elapsed() < lead {
            std::hint::spin_loop();
        }
        let won = racer.run(round)?;
        let other = match talk.answer().map_err(said)? {
            Answer::Won(won) => won,
            other => return Err(format!("{peer}: an unexpected answer: {other:?}")),
        };
        trip = start.elapsed().min(Duration::from_millis(20));
        let seen = racer.sees(round);
        racer.clean(round);
        match (won, other) {
            (true, true) => {
                return Err(format!(
                    "{dir}: both hosts won a race by {kind}: it is not the same storage, or not atomic"
                ))
            }
            (false, false) => return Err(format!("{dir}: no host won a race by {kind}")),
            (false, true) if !seen => {
                return Err(format!("{dir}: {peer} won a race by {kind}, and its file is not seen here"))
            }
            (true, false) => mine += 1,
            (false, true) => theirs += 1,
        }
    }
    Ok((mine, theirs))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str, features: &[&str]) -> HostState {
        HostState {
            language: 1,
            name: name.into(),
            service: String::new(),
            version: "1".into(),
            features: features.iter().map(|f| (*f).to_owned()).collect(),
            processors: 1,
            load: 0.0,
            memory: 1 << 30,
            available: 1 << 30,
            maintenance: false,
            machines: Vec::new(),
        }
    }

    #[test]
    fn what_differs_is_named_with_its_mend() {
        let (a, mut b) = (host("a", &["avx", "avx2"]), host("b", &["avx"]));
        let (cause, mend) = features(&a, &b).unwrap_err();
        assert!(cause == "b lacks avx2" && mend.contains("-cpu"), "{cause}");
        assert!(features(&b, &a).unwrap_err().0.contains("this host lacks avx2"));
        assert!(features(&a, &a).is_ok());
        b.version = "2".into();
        assert!(versions(&a, &b).unwrap_err().1.contains("same version"));
        assert!(their_memory(&b, Some(4096)).unwrap_err().0.contains("4608 MiB"));
        assert!(round_trip(Duration::from_millis(30)).is_err() && round_trip(ROUND_TRIP).is_ok());
        assert!(clocks(Duration::from_secs(3)).unwrap_err().1.contains("chrony"));
    }
}
