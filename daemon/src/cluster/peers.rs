//! The other hosts: each is asked every second how it is, and told how this one is.

use std::net::{IpAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::tls::ClientStream;
use super::wire::{receive, send, Answer, HostState, Request, VERSION};
use super::Cluster;
use crate::config::resolve;
use crate::machine::lock;
use crate::{Error, Result};

/// How often a peer is asked.
const EVERY: Duration = Duration::from_secs(1);
/// How long a peer may take to answer.
const ANSWER: Duration = Duration::from_secs(3);
/// A peer that works on something says so each second; silence longer than this is its end.
const SILENCE: Duration = Duration::from_secs(10);

/// A peer.
pub struct Known {
    pub name: String,
    /// `HOST` or `HOST:PORT`.
    address: Mutex<String>,
    /// The configuration names it, so that it is never forgotten.
    fixed: bool,
    heard: Mutex<(Option<(HostState, Instant)>, String)>,
    forgotten: AtomicBool,
}

/// `HOST` with a port, if it has none.
pub fn with_port(host: &str, port: u16) -> String {
    match host.parse::<IpAddr>() {
        Ok(IpAddr::V6(ip)) => format!("[{ip}]:{port}"),
        _ if host.rsplit_once(':').is_some_and(|(_, p)| p.parse::<u16>().is_ok()) => host.to_owned(),
        _ => format!("{host}:{port}"),
    }
}

impl Known {
    /// What it said last, and when.
    pub fn state(&self) -> Option<(HostState, Instant)> {
        lock(&self.heard).0.clone()
    }

    /// Why it does not answer, or empty.
    pub fn problem(&self) -> String {
        lock(&self.heard).1.clone()
    }

    /// Where its service is.
    pub fn address(&self) -> String {
        lock(&self.address).clone()
    }

    fn heard(&self, state: HostState) {
        *lock(&self.heard) = (Some((state, Instant::now())), String::new());
    }
}

/// A conversation with a peer.
pub struct Talk(ClientStream);

impl Talk {
    /// Ask, and wait for the answer; a refusal is an error.
    pub fn ask(&mut self, request: &Request) -> Result<Answer> {
        self.ask_with(request, |_| Ok(()))
    }

    /// Say something whose answer comes later.
    pub fn say(&mut self, request: &Request) -> Result<()> {
        send(&mut self.0, request).map_err(|e| Error::Machine(e.to_string()))
    }

    /// Ask, with what belongs to the request behind it.
    pub fn ask_with(
        &mut self,
        request: &Request,
        more: impl FnOnce(&mut Talk) -> Result<()>,
    ) -> Result<Answer> {
        self.say(request)?;
        more(self)?;
        self.answer()
    }

    /// Wait for another answer.
    pub fn answer(&mut self) -> Result<Answer> {
        loop {
            match receive(&mut self.0).map_err(|e| Error::Machine(e.to_string()))? {
                Answer::Working => {}
                Answer::Refused(why) => return Err(Error::Machine(why)),
                answer => return Ok(answer),
            }
        }
    }

    /// Bytes that belong to a request.
    pub fn pour(&mut self, bytes: &[u8]) -> Result<()> {
        std::io::Write::write_all(&mut self.0, bytes).map_err(|e| Error::Machine(e.to_string()))
    }
}

impl Cluster {
    /// Begin to ask a peer. One that is known already may have another address now.
    pub fn meet(self: &Arc<Self>, name: &str, address: &str, fixed: bool) {
        let mut peers = lock(&self.peers);
        if let Some(known) = peers.get(name) {
            if !known.fixed {
                address.clone_into(&mut lock(&known.address));
            }
            return;
        }
        let known = Arc::new(Known {
            name: name.to_owned(),
            address: Mutex::new(address.to_owned()),
            fixed,
            heard: Mutex::new((None, "it was not asked yet".into())),
            forgotten: AtomicBool::new(false),
        });
        peers.insert(name.to_owned(), Arc::clone(&known));
        let cluster = Arc::clone(self);
        std::thread::spawn(move || cluster.keep_asking(&known));
    }

    /// The inventory does not list these peers any more: all but those, and those that the configuration names.
    pub fn forget_all_but(&self, listed: &[String]) {
        lock(&self.peers).retain(|name, known| {
            let stays = known.fixed || listed.contains(name);
            known.forgotten.store(!stays, Ordering::Relaxed);
            stays
        });
    }

    fn keep_asking(&self, known: &Known) {
        let mut talk = None;
        let mut answered = true;
        while !known.forgotten.load(Ordering::Relaxed) {
            let begin = Instant::now();
            let result = self.ask_state(known, &mut talk);
            if answered != result.is_ok() {
                answered = result.is_ok();
                match &result {
                    Ok(_) => log::info!("{}: answers", known.name),
                    Err(e) => log::warn!("{}: does not answer: {e}", known.name),
                }
            }
            match result {
                Ok(state) => known.heard(state),
                Err(e) => {
                    talk = None;
                    lock(&known.heard).1 = e.to_string();
                }
            }
            std::thread::sleep(EVERY.saturating_sub(begin.elapsed()).max(EVERY / 4));
        }
    }

    fn ask_state(&self, known: &Known, talk: &mut Option<Talk>) -> Result<HostState> {
        let talk = match talk {
            Some(talk) => talk,
            None => talk.insert(self.talk(known, ANSWER)?),
        };
        match talk.ask(&Request::State(Box::new(self.own_state())))? {
            Answer::State(state) if state.language != VERSION => Err(Error::State(format!(
                "it is ftvmd {}, which speaks another language ({}, not {VERSION})",
                state.version, state.language
            ))),
            Answer::State(state) if state.name == known.name => Ok(*state),
            Answer::State(state) => Err(Error::State(format!("it calls itself '{}'", state.name))),
            other => Err(Error::Machine(format!("an unexpected answer: {other:?}"))),
        }
    }

    fn talk(&self, known: &Known, silence: Duration) -> Result<Talk> {
        let identity = self.identity()?;
        let address = known.address();
        let failed = |e: std::io::Error| Error::Machine(format!("{}: {e}", known.name));
        let mut last = std::io::Error::from(std::io::ErrorKind::NotFound);
        for address in resolve(&address, crate::config::PORT).map_err(failed)? {
            match TcpStream::connect_timeout(&address, ANSWER) {
                Ok(stream) => {
                    let stream = (|| {
                        stream.set_nodelay(true)?;
                        stream.set_read_timeout(Some(silence))?;
                        stream.set_write_timeout(Some(silence))?;
                        identity.connect(stream, &known.name)
                    })();
                    return Ok(Talk(stream.map_err(failed)?));
                }
                Err(e) => last = e,
            }
        }
        Err(failed(last))
    }

    /// A conversation of its own with a peer, for what takes longer.
    pub fn talk_to(&self, name: &str) -> Result<Talk> {
        self.talk(&*self.peer(name)?, SILENCE)
    }

    /// Tell peers at once how this host is.
    pub fn tell_peers(self: &Arc<Self>) {
        for known in self.peers() {
            let cluster = Arc::clone(self);
            std::thread::spawn(move || {
                let _ = cluster.ask_state(&known, &mut None).map(|state| known.heard(state));
            });
        }
    }

    /// A peer told of itself.
    pub fn peer_told(&self, state: HostState) {
        let known = lock(&self.peers).get(&state.name).cloned();
        if let Some(known) = known.filter(|_| state.language == VERSION) {
            known.heard(state);
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_port_is_added_where_there_is_none() {
        for (host, want) in [("a", "a:7"), ("a:1", "a:1"), ("10.0.0.1", "10.0.0.1:7"), ("::1", "[::1]:7")] {
            assert_eq!(super::with_port(host, 7), want);
        }
    }
}
