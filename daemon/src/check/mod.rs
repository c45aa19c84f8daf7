//! Is this host fit for a protected machine? Every reason against it comes with its mend.

pub mod race;
pub mod remote;

use std::fs::File;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a peer may take to answer.
const REACH: Duration = Duration::from_secs(3);

/// What was seen, or what is wrong and its mend.
pub type Seen = Result<String, (String, String)>;

/// What was found.
pub struct Finding {
    pub what: String,
    pub result: Seen,
}

impl Finding {
    pub fn new(what: &str, result: Seen) -> Finding {
        Finding { what: what.to_owned(), result }
    }
}

fn wrong(cause: impl Into<String>, mend: impl Into<String>) -> Seen {
    Err((cause.into(), mend.into()))
}

/// What can be seen from this host alone.
pub struct Local<'a> {
    pub firmware: &'a str,
    pub port: u16,
    /// The machine's memory in MiB.
    pub memory: Option<u64>,
    pub lock_dir: Option<&'a str>,
    /// A primary, or its host.
    pub peer: Option<&'a str>,
}

/// Look.
pub fn local(of: &Local<'_>) -> Vec<Finding> {
    let mut findings = vec![
        Finding::new("firmware", firmware(of.firmware)),
        Finding::new("program", program()),
        Finding::new("processor", processor()),
        Finding::new("port", port_free(of.port)),
        Finding::new("memory", memory(of.memory)),
    ];
    if let Some(dir) = of.lock_dir {
        findings.push(Finding::new("lock", race::alone(Path::new(dir))));
    }
    if let Some(peer) = of.peer {
        findings.push(Finding::new("peer", reach(peer, of.port)));
    }
    findings
}

/// Every x86-64 processor will do; what it has besides is what machines can be given.
fn processor() -> Seen {
    let features = crate::cluster::features();
    Ok(match features.is_empty() {
        true => "x86-64".into(),
        false => format!("x86-64 with {}", features.join(" ")),
    })
}

fn firmware(path: &str) -> Seen {
    match File::open(path) {
        Ok(_) => Ok(path.to_owned()),
        Err(e) => {
            wrong(format!("{path}: {e}"), "install the package seabios (seabios-bin where packages are RPMs)")
        }
    }
}

fn program() -> Seen {
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
fn port_free(port: u16) -> Seen {
    let mend = "stop the program that has it, or give the machine another: -ft primary,listen=:PORT";
    match (TcpListener::bind(("0.0.0.0", port)), UdpSocket::bind(("0.0.0.0", port))) {
        (Ok(_), Ok(_)) => Ok(format!("{port} is free (TCP and UDP)")),
        (Err(e), _) => wrong(format!("TCP port {port}: {e}"), mend),
        (_, Err(e)) => wrong(format!("UDP port {port}: {e}"), mend),
    }
}

fn memory(wanted: Option<u64>) -> Seen {
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

/// Whether the peer answers on its port; a refusal shows that its host is there.
fn reach(peer: &str, port: u16) -> Seen {
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
        assert!(race::alone(&dir).is_ok());
        let (cause, mend) = race::alone(&dir.join("ftctl-nowhere")).unwrap_err();
        assert!(cause.contains("No such file") && mend.contains("hard links"), "{cause}");
        assert!(race::alone(Path::new("/proc")).is_err());
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
