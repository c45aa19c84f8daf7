//! A machine's process: its command line, and its start.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::cluster::wire::Order;
use crate::machine::{command_line, lock, Machine, Origin, END};
use crate::{definition, Error, Result};

/// How long ftvm may take until its sockets listen.
const START: Duration = Duration::from_secs(60);
/// How long a backup may take to copy its primary's memory and disks.
const COPY: Duration = Duration::from_secs(24 * 3600);
/// A log that has grown over this is put aside when the machine starts anew.
const LOG: u64 = 1 << 20;

/// The options that the service gives to every machine.
fn own_options(machine: &Machine) -> Vec<String> {
    let mut words = Vec::new();
    for what in ["control", "qmp"] {
        let socket = machine.run_path(what).display().to_string().replace(',', ",,");
        words.extend(["-qmp".to_owned(), format!("unix:{socket},server=on,wait=off")]);
    }
    let path = |what| machine.run_path(what).display().to_string();
    words.extend(["-daemonize", "-pidfile"].map(str::to_owned));
    words.extend([path("pid"), "-D".to_owned(), path("log")]);
    words
}

impl Machine {
    /// The process's command line, or the one that it would be started with.
    pub fn command_line(&self) -> Result<Vec<String>> {
        if let Some(words) = self.pid().and_then(command_line) {
            return Ok(words);
        }
        self.words(None)
    }

    /// The command line of a start; `port`: of the logging channel, where the definition has none.
    fn words(&self, port: Option<u16>) -> Result<Vec<String>> {
        let mut args = self.definition()?;
        let mut words = vec![self.dirs.ftvm.display().to_string()];
        if definition::value(&args, "name").is_none() && !definition::is_backup(&args) {
            words.extend(["-name".to_owned(), self.name.clone()]);
        }
        if let (Some(port), Some(value)) = (port, definition::value(&args, "ft")) {
            let mut keys = definition::ft_keys(value);
            if !keys.iter().any(|(key, _)| key == "listen") {
                keys.push(("listen".into(), format!("0.0.0.0:{port}")));
                args = definition::with_ft(&args, &definition::ft_value(&keys));
            }
        }
        words.extend(args);
        words.extend(own_options(self));
        Ok(words)
    }

    /// The command line of a backup. What a person has written of the machine on this host, if it is something else than
    /// what is written on the primary's, says what differs here; all else comes from the primary.
    fn backup_words(&self, order: &Order, port: u16) -> Result<Vec<String>> {
        let own = self.definition_text();
        let args = match &own {
            Some(text) => definition::parse(text)?,
            None => Vec::new(),
        };
        let said = definition::value(&args, "ft").map(definition::ft_keys).unwrap_or_default();
        let said = |key: &str| said.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone());
        let mut keys = vec![("role".to_owned(), "backup".to_owned()), ("peer".into(), order.peer.clone())];
        keys.push(("listen".into(), said("listen").unwrap_or_else(|| format!("0.0.0.0:{port}"))));
        if let Some(lock) = said("lock").or_else(|| order.lock.clone()) {
            keys.push(("lock".into(), lock));
        }
        keys.extend(said("max-lag").map(|lag| ("max-lag".into(), lag)));
        let differs = own.is_some() && own != order.definition && !definition::is_backup(&args);
        let args = match differs {
            true => args,
            false => ["-display", "none"].map(str::to_owned).to_vec(),
        };
        let mut words = vec![self.dirs.ftvm.display().to_string()];
        words.extend(definition::with_ft(&args, &definition::ft_value(&keys)));
        words.extend(own_options(self));
        Ok(words)
    }

    /// Start it; on return its sockets listen. `port`: for its logging channel.
    pub fn start(&self, port: u16) -> Result<()> {
        self.launch(START, || self.words(Some(port)))
    }

    /// Start it as another host's backup; on return it has the primary's state.
    pub fn start_backup(&self, order: &Order, port: u16) -> Result<()> {
        self.launch(COPY, || self.backup_words(order, port))
    }

    fn launch(&self, limit: Duration, words: impl FnOnce() -> Result<Vec<String>>) -> Result<()> {
        if self.origin != Origin::Service {
            return Err(Error::State(format!("'{}' was not started by this service", self.name)));
        }
        let _one = lock(&self.starting);
        if self.pid().is_some() {
            return Err(Error::State(format!("'{}' is running", self.name)));
        }
        self.begun.store(true, Ordering::Relaxed);
        let result = words().and_then(|words| self.run(&words, limit));
        self.begun.store(false, Ordering::Relaxed);
        result
    }

    fn run(&self, words: &[String], limit: Duration) -> Result<()> {
        let messages = self.run_path("log");
        let file = |e| Error::File(messages.display().to_string(), e);
        if std::fs::metadata(&messages).is_ok_and(|m| m.len() > LOG) {
            std::fs::rename(&messages, self.run_path("log.1")).map_err(file)?;
        }
        let log = OpenOptions::new().create(true).append(true).open(&messages).map_err(file)?;
        let before = log.metadata().map_err(file)?.len();
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .current_dir(&self.dirs.run)
            // It is known already.
            .env("FTVM_REGISTRY", "")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|e| Error::Machine(format!("{}: {e}", words[0])))?;
        let status = end_within(&mut child, limit).map_err(file)?;
        let Some(status) = status else {
            return Err(Error::Machine(format!("ftvm did not start within {} s", limit.as_secs())));
        };
        if !status.success() {
            let text = read_from(&messages, before).unwrap_or_default();
            return Err(Error::Machine(format!("ftvm did not start: {}", text.trim())));
        }
        // The answer to the next question is to be true.
        let until = Instant::now() + END;
        while self.status().pid == 0 && self.pid().is_some() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// Wait for a child's end; `None`: it was ended.
fn end_within(child: &mut Child, limit: Duration) -> std::io::Result<Option<ExitStatus>> {
    let until = Instant::now() + limit;
    loop {
        match child.try_wait()? {
            Some(status) => return Ok(Some(status)),
            None if Instant::now() > until => {
                let _ = child.kill();
                child.wait()?;
                return Ok(None);
            }
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// A file's text from a place on.
fn read_from(path: &Path, at: u64) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(at))?;
    let mut bytes = Vec::new();
    file.take(64 << 10).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
