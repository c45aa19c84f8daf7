//! `ftctl check`: is this host fit for a protected machine? Every reason against it comes with its mend.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Arg, ArgMatches, Command};
use serde_json::json;

use super::print;

/// How long a peer may take to answer.
const REACH: Duration = Duration::from_secs(3);

/// The command line.
pub fn command() -> Command {
    let option = |name: &'static str, value: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name(value).help(help)
    };
    Command::new("check")
        .about("Find out whether this host is fit for fault tolerance")
        .arg(option("lock-dir", "DIR", "Where the images and their lock are: the shared storage"))
        .arg(option("peer", "HOST[:PORT]", "A primary (or its host) that is to be reached"))
        .arg(
            option("memory", "MIB", "The memory of the machine, in MiB")
                .value_parser(clap::value_parser!(u64)),
        )
        .arg(
            option("port", "PORT", "The port of the logging channel")
                .default_value("8100")
                .value_parser(clap::value_parser!(u16)),
        )
        .arg(option("firmware", "FILE", "The firmware").default_value("/usr/share/seabios/bios-256k.bin"))
}

/// What was found.
struct Finding {
    what: &'static str,
    /// What was seen, or what is wrong and its mend.
    result: Result<String, (String, String)>,
}

fn wrong(cause: impl Into<String>, mend: impl Into<String>) -> Result<String, (String, String)> {
    Err((cause.into(), mend.into()))
}

/// Check; 0 if this host is fit, 1 if not.
pub fn run(of: &ArgMatches, as_json: bool) -> i32 {
    let text = |key: &str| of.get_one::<String>(key).map(String::as_str);
    let port = of.get_one::<u16>("port").copied().unwrap_or(8100);
    let mut findings = vec![
        Finding { what: "firmware", result: firmware(text("firmware").unwrap_or_default()) },
        Finding { what: "program", result: program() },
        Finding { what: "port", result: port_free(port) },
        Finding { what: "memory", result: memory(of.get_one::<u64>("memory").copied()) },
    ];
    if let Some(dir) = text("lock-dir") {
        findings.push(Finding { what: "lock", result: lock(Path::new(dir)) });
    }
    if let Some(peer) = text("peer") {
        findings.push(Finding { what: "peer", result: reach(peer, port) });
    }
    let fit = findings.iter().all(|f| f.result.is_ok());
    let lines = if as_json {
        let list: Vec<_> = findings
            .iter()
            .map(|f| match &f.result {
                Ok(seen) => json!({"check": f.what, "fit": true, "seen": seen}),
                Err((cause, mend)) => json!({"check": f.what, "fit": false, "cause": cause, "mend": mend}),
            })
            .collect();
        format!("{:#}", json!({"fit": fit, "checks": list}))
    } else {
        let line = |f: &Finding| match &f.result {
            Ok(seen) => format!("ok    {:<9} {seen}", f.what),
            Err((cause, mend)) => format!("WRONG {:<9} {cause}\n      {:<9} {mend}", f.what, "mend:"),
        };
        findings.iter().map(line).collect::<Vec<_>>().join("\n")
    };
    i32::from(print(&lines).is_err() || !fit)
}

fn firmware(path: &str) -> Result<String, (String, String)> {
    match File::open(path) {
        Ok(_) => Ok(path.to_owned()),
        Err(e) => {
            wrong(format!("{path}: {e}"), "install the package seabios (seabios-bin where packages are RPMs)")
        }
    }
}

fn program() -> Result<String, (String, String)> {
    match std::process::Command::new("ftvm").arg("-version").output() {
        Ok(out) if out.status.success() => {
            Ok(String::from_utf8_lossy(&out.stdout).lines().next().unwrap_or_default().to_owned())
        }
        Ok(out) => wrong(
            format!("ftvm -version: {}", String::from_utf8_lossy(&out.stderr).trim()),
            "install the package ftvm anew",
        ),
        Err(e) => wrong(format!("ftvm: {e}"), "install the package ftvm, or put the program into PATH"),
    }
}

/// The channel takes TCP, the heartbeats UDP.
fn port_free(port: u16) -> Result<String, (String, String)> {
    let mend = "stop the program that has it, or give the machine another: -ft primary,listen=:PORT";
    match (TcpListener::bind(("0.0.0.0", port)), UdpSocket::bind(("0.0.0.0", port))) {
        (Ok(_), Ok(_)) => Ok(format!("{port} is free (TCP and UDP)")),
        (Err(e), _) => wrong(format!("TCP port {port}: {e}"), mend),
        (_, Err(e)) => wrong(format!("UDP port {port}: {e}"), mend),
    }
}

fn memory(wanted: Option<u64>) -> Result<String, (String, String)> {
    // The machine's memory, and what the program, its log and compiled code take.
    const BESIDES: u64 = 512;
    let available = crate::registry::memory().1 >> 20;
    match wanted {
        Some(mib) if mib + BESIDES > available => wrong(
            format!(
                "{available} MiB are available; a machine of {mib} MiB takes up to {} MiB",
                mib + BESIDES
            ),
            "end something else on this host, add memory, or give the machine less (-m)",
        ),
        _ => Ok(format!("{available} MiB available")),
    }
}

/// Whether exclusive creation and link(2) are atomic here: two handles race for each name, and one of them wins.
fn lock(dir: &Path) -> Result<String, (String, String)> {
    let mend =
        "use storage that both hosts see and that has hard links (NFS, OCFS2, GFS2), or a LUN (iscsi://)";
    let base = format!(".ftctl-check-{}", std::process::id());
    let path = |what: &str| -> PathBuf { dir.join(format!("{base}-{what}")) };
    let names: Vec<PathBuf> = ["target", "0", "1"].iter().map(|w| path(w)).collect();
    let clean = || names.iter().for_each(|n| drop(std::fs::remove_file(n)));
    let result = (|| {
        const ROUNDS: usize = 50;
        for kind in ["exclusive creation", "link"] {
            for _ in 0..ROUNDS {
                clean();
                let won = race(kind, &names)
                    .map_err(|e| (format!("{}: {kind}: {e}", dir.display()), mend.to_owned()))?;
                if won != 1 {
                    return wrong(format!("{}: {won} of two racers won by {kind}", dir.display()), mend);
                }
            }
        }
        Ok(format!(
            "{}: one of two racers wins, by exclusive creation and by link, {ROUNDS} times each",
            dir.display()
        ))
    })();
    clean();
    result
}

/// Two threads try to make the first name at once; how many succeeded.
fn race(kind: &str, names: &[PathBuf]) -> std::io::Result<usize> {
    let start = std::sync::Barrier::new(2);
    let contend = |own: &Path| -> std::io::Result<bool> {
        let ready = match kind {
            "link" => OpenOptions::new().write(true).create_new(true).open(own).map(drop),
            _ => Ok(()),
        };
        // The other one waits even for a racer that cannot start.
        start.wait();
        ready?;
        let made = match kind {
            "link" => std::fs::hard_link(own, &names[0]),
            _ => OpenOptions::new().write(true).create_new(true).open(&names[0]).map(drop),
        };
        match made {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(e),
        }
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| contend(&names[1]));
        let mine = contend(&names[2]);
        let other = other.join().unwrap_or_else(|_| Err(std::io::Error::other("a racer failed")));
        Ok(usize::from(mine?) + usize::from(other?))
    })
}

/// Whether the peer answers on its port; a refusal shows that its host is there.
fn reach(peer: &str, port: u16) -> Result<String, (String, String)> {
    let mend = "check the name, the route and the firewalls between: TCP and UDP to the logging port";
    let address = match peer.to_socket_addrs().or_else(|_| (peer, port).to_socket_addrs()) {
        Ok(mut list) => list.next(),
        Err(e) => return wrong(format!("{peer}: {e}"), mend),
    };
    let Some(address): Option<SocketAddr> = address else {
        return wrong(format!("{peer} has no address"), mend);
    };
    let start = Instant::now();
    match TcpStream::connect_timeout(&address, REACH) {
        Ok(_) => Ok(format!("{address} answers within {:.1} ms", start.elapsed().as_secs_f64() * 1000.0)),
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => Ok(format!(
            "{} answers within {:.1} ms; no primary listens on port {} yet",
            address.ip(),
            start.elapsed().as_secs_f64() * 1000.0,
            address.port()
        )),
        Err(e) => wrong(format!("{address}: {e}"), mend),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_with_hard_links_is_fit_and_one_that_is_missing_is_not() {
        let dir = std::env::temp_dir();
        assert!(lock(&dir).is_ok());
        let (cause, mend) = lock(&dir.join("ftctl-nowhere")).unwrap_err();
        assert!(cause.contains("No such file") && mend.contains("hard links"), "{cause}");
        assert!(lock(Path::new("/proc")).is_err());
    }

    #[test]
    fn a_taken_port_is_told() {
        let taken = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        assert!(port_free(port).unwrap_err().0.contains("in use"));
        assert!(reach("127.0.0.1", port).unwrap().contains("answers"));
        drop(taken);
        assert!(port_free(port).is_ok());
    }

    #[test]
    fn no_host_has_so_much_memory() {
        assert!(memory(Some(1 << 40)).unwrap_err().1.contains("-m"));
        assert!(memory(Some(1)).is_ok());
    }
}
