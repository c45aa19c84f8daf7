//! Clients of a guest that remember every acknowledged answer.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::hosts::ClientNet;
use crate::Result;

/// What a client saw.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Acknowledged requests.
    pub answers: u64,
    /// Requests that failed at the first try and were tried again (new connections only).
    pub retried: u64,
    /// Answers that were wrong, lost or repeated, in words.
    pub wrong: Vec<String>,
    /// The longest time between two answers, and all latencies in ms.
    pub longest: Duration,
    pub latencies: Vec<f64>,
}

impl Seen {
    /// The latency that `share` of the answers did not exceed, in ms.
    pub fn percentile(&self, share: f64) -> f64 {
        let mut all = self.latencies.clone();
        all.sort_by(f64::total_cmp);
        all.get(((all.len() as f64 - 1.0) * share) as usize).copied().unwrap_or(0.0)
    }
}

/// A client on a thread of its own.
pub struct Client {
    stop: Arc<AtomicBool>,
    pub seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Client {
    fn start(
        net: Option<ClientNet>,
        work: impl FnOnce(&AtomicBool, &Mutex<Seen>) -> Result<()> + Send + 'static,
    ) -> Client {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (s, w) = (Arc::clone(&stop), Arc::clone(&seen));
        let thread = std::thread::spawn(move || {
            if let Some(net) = net {
                net.enter()?;
            }
            work(&s, &w)
        });
        Client { stop, seen, thread: Some(thread) }
    }

    /// One TCP session for the whole time: `inc` must answer 1, 2, 3, ... without a gap.
    pub fn session(net: Option<ClientNet>, address: SocketAddr, pause: Duration) -> Client {
        Client::start(net, move |stop, seen| {
            let mut line = Line::connect(address)?;
            let mut count = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let (answer, took) = line.ask("inc")?;
                count += 1;
                note(
                    seen,
                    took,
                    (answer != count.to_string())
                        .then(|| format!("session answered {answer} instead of {count}")),
                );
                std::thread::sleep(pause);
            }
            Ok(())
        })
    }

    /// Durable writes over one TCP session: every acknowledged text must be there afterwards.
    pub fn journal(net: Option<ClientNet>, address: SocketAddr, tag: &str, pause: Duration) -> Client {
        let tag = tag.to_owned();
        Client::start(net, move |stop, seen| {
            let mut line = Line::connect(address)?;
            let mut acknowledged: Vec<(u64, String)> = Vec::new();
            let mut n = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let text = format!("{tag}-{n}");
                n += 1;
                let (answer, took) = line.ask(&format!("put {text}"))?;
                let place = answer.strip_prefix("ok ").and_then(|p| p.parse().ok());
                note(seen, took, place.is_none().then(|| format!("put answered {answer}")));
                acknowledged.extend(place.map(|p| (p, text)));
                std::thread::sleep(pause);
            }
            for (place, text) in acknowledged {
                let (answer, _) = line.ask(&format!("get {place}"))?;
                if answer != text {
                    if let Ok(mut s) = seen.lock() {
                        s.wrong.push(format!("line {place} is '{answer}' instead of '{text}'"));
                    }
                }
            }
            Ok(())
        })
    }

    /// HTTP: a new connection for every GET; a request may be tried again until it is answered.
    pub fn http(net: Option<ClientNet>, address: SocketAddr, expect: &str, pause: Duration) -> Client {
        let expect = expect.to_owned();
        Client::start(net, move |stop, seen| {
            while !stop.load(Ordering::Relaxed) {
                let start = Instant::now();
                loop {
                    match get(address) {
                        Ok(body) => {
                            note(
                                seen,
                                start.elapsed(),
                                (!body.contains(&expect)).then(|| format!("HTTP answered {body:?}")),
                            );
                            break;
                        }
                        Err(e) => {
                            if start.elapsed() > Duration::from_secs(60) {
                                return Err(format!("HTTP: {e}"));
                            }
                            if let Ok(mut s) = seen.lock() {
                                s.retried += 1;
                            }
                            std::thread::sleep(Duration::from_millis(20));
                        }
                    }
                }
                std::thread::sleep(pause);
            }
            Ok(())
        })
    }

    /// One shell over ssh for the whole time: it counts the lines that it has read.
    pub fn shell(net: Option<ClientNet>, host: String, pause: Duration) -> Client {
        Client::start(net, move |stop, seen| {
            let mut line = Line::ssh(&host, "n=0; while read -r _; do n=$((n+1)); echo $n; done")?;
            // The first answer includes the login.
            line.ask("next")?;
            let mut count = 1u64;
            while !stop.load(Ordering::Relaxed) {
                let (answer, took) = line.ask("next")?;
                count += 1;
                let wrong = (answer != count.to_string())
                    .then(|| format!("ssh answered {answer} instead of {count}"));
                note(seen, took, wrong);
                std::thread::sleep(pause);
            }
            Ok(())
        })
    }

    /// A database over ssh: every row is committed with fsync before the answer, and all must be there at every moment.
    pub fn database(net: Option<ClientNet>, host: String, pause: Duration) -> Client {
        Client::start(net, move |stop, seen| {
            let mut line = Line::ssh(&host, "stdbuf -oL sqlite3 -batch /var/lib/client.db")?;
            let (mode, _) = line.ask("CREATE TABLE t(n INTEGER PRIMARY KEY, s TEXT); PRAGMA synchronous;")?;
            if mode != "2" {
                return Err(format!("sqlite's PRAGMA synchronous is {mode:?}, not 2 (FULL)"));
            }
            let mut n = 0u64;
            while !stop.load(Ordering::Relaxed) {
                n += 1;
                let (answer, took) = line.ask(&format!(
                    "INSERT INTO t VALUES({n},'row {n}'); SELECT count(*)||' '||sum(n) FROM t;"
                ))?;
                let expect = format!("{n} {}", n * (n + 1) / 2);
                let wrong =
                    (answer != expect).then(|| format!("the database has '{answer}' instead of '{expect}'"));
                note(seen, took, wrong);
                std::thread::sleep(pause);
            }
            let (answer, _) = line.ask("PRAGMA integrity_check;")?;
            if answer != "ok" {
                return Err(format!("the database is damaged: {answer}"));
            }
            Ok(())
        })
    }

    /// Stop, and return what was seen; an error if the client itself failed (a broken connection).
    pub fn finish(mut self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| "a client panicked".to_owned())??;
        }
        self.seen.lock().map(|s| s.clone()).map_err(|_| "a client panicked".into())
    }

    /// Whether the client ended by itself (its connection broke).
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Answers so far.
    pub fn answers(&self) -> u64 {
        self.seen.lock().map_or(0, |s| s.answers)
    }
}

fn note(seen: &Mutex<Seen>, took: Duration, wrong: Option<String>) {
    if let Ok(mut s) = seen.lock() {
        s.answers += 1;
        s.longest = s.longest.max(took);
        s.latencies.push(took.as_secs_f64() * 1000.0);
        s.wrong.extend(wrong);
    }
}

/// A line-by-line conversation over TCP or ssh.
pub struct Line {
    out: Box<dyn Write>,
    input: Box<dyn BufRead>,
    ssh: Option<Child>,
}

impl Drop for Line {
    fn drop(&mut self) {
        if let Some(child) = &mut self.ssh {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Line {
    /// Connect, trying for a while. An answer may take a minute.
    pub fn connect(address: SocketAddr) -> Result<Line> {
        Line::connect_for(address, Duration::from_secs(60))
    }

    /// The same, for work whose answer may take as long as `patience`.
    pub fn connect_for(address: SocketAddr, patience: Duration) -> Result<Line> {
        let out = crate::wait_for(&format!("connection to {address}"), Duration::from_secs(30), || {
            TcpStream::connect_timeout(&address, Duration::from_secs(2)).ok()
        })?;
        out.set_nodelay(true).map_err(|e| e.to_string())?;
        out.set_read_timeout(Some(patience)).map_err(|e| e.to_string())?;
        let input = BufReader::new(out.try_clone().map_err(|e| e.to_string())?);
        Ok(Line { out: Box::new(out), input: Box::new(input), ssh: None })
    }

    /// Run `command` on `host` as root (whose password is "root"); its standard input and output.
    pub fn ssh(host: &str, command: &str) -> Result<Line> {
        let fail = |e: std::io::Error| format!("ssh: {e}");
        let askpass = std::env::temp_dir().join(format!("ftvm-askpass-{}", std::process::id()));
        std::fs::write(&askpass, "#!/bin/sh\necho root\n").map_err(fail)?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(&askpass, mode).map_err(fail)?;
        let mut child = Command::new("ssh")
            .args([
                "-o",
                "StrictHostKeyChecking=no",
                "-o",
                "UserKnownHostsFile=/dev/null",
                "-o",
                "LogLevel=ERROR",
            ])
            .args([
                "-o",
                "ServerAliveInterval=15",
                "-o",
                "ServerAliveCountMax=4",
                "-o",
                "PubkeyAuthentication=no",
            ])
            .args([&format!("root@{host}"), command])
            .env("SSH_ASKPASS", &askpass)
            .env("SSH_ASKPASS_REQUIRE", "force")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(fail)?;
        let (Some(out), Some(input)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("ssh has no pipes".into());
        };
        Ok(Line { out: Box::new(out), input: Box::new(BufReader::new(input)), ssh: Some(child) })
    }

    /// Send a line, read the answer.
    pub fn ask(&mut self, text: &str) -> Result<(String, Duration)> {
        let start = Instant::now();
        self.out.write_all(format!("{text}\n").as_bytes()).map_err(|e| format!("the session broke: {e}"))?;
        let mut answer = String::new();
        match self.input.read_line(&mut answer) {
            Ok(0) => Err("the session was closed".into()),
            Ok(_) => Ok((answer.trim_end().to_owned(), start.elapsed())),
            Err(e) => Err(format!("the session broke: {e}")),
        }
    }
}

/// One HTTP GET of `/`.
pub fn get(address: SocketAddr) -> std::io::Result<String> {
    let mut s = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    s.set_read_timeout(Some(Duration::from_secs(10)))?;
    s.write_all(b"GET / HTTP/1.0\r\nHost: guest\r\n\r\n")?;
    let mut text = String::new();
    s.read_to_string(&mut text)?;
    if !text.starts_with("HTTP/1.") {
        return Err(std::io::Error::other(format!("answered {text:?}")));
    }
    Ok(text)
}
