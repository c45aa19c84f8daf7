//! A directory of small files in etcd, `etcd://HOST[:PORT][,HOST[:PORT]...]/KEY[?ca=FILE&cert=FILE&key=FILE]`: for locks that
//! lie with a third party. A file is a key, its directory what the key has before the last `/`.
//!
//! Each change is one transaction, so it has happened as a whole or not at all, and etcd answers only after a majority of
//! its members has it on stable storage. Reads are linearizable. No key has a lease: what a pair that died has left
//! stays, as a file would.
//!
//! Any member may be dead or cut off from the others: each call asks all of them whether they can read, uses the one that
//! can first, and goes on to another when that does not answer after all. So a change may be asked for twice, or may happen
//! after its caller was told an error; callers read back, as they must with NFS.

use std::future::Future;
use std::io::{self, ErrorKind};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, Error, GetOptions, Identity, TlsOptions, Txn,
    TxnOp, TxnOpResponse,
};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use crate::files::Files;

/// How long a member may take to say that it can read.
const HELLO: Duration = Duration::from_secs(1);
/// How long a member that can read may take to answer; a change waits for the disks of a majority.
const ANSWER: Duration = Duration::from_secs(2);
/// How long members are asked again when none answers: they choose a new leader meanwhile.
const PATIENCE: Duration = Duration::from_secs(8);
/// A connection that was used within this time is used again. Nothing looks after one in between.
const FRESH: Duration = Duration::from_secs(2);
/// The port where there is none in the URL.
const PORT: u16 = 2379;

/// A parsed URL.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Url {
    members: Vec<String>,
    /// What keys begin with, up to the last `/`.
    dir: String,
    name: String,
    ca: Option<String>,
    certificate: Option<String>,
    key: Option<String>,
}

fn invalid(reason: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, reason.to_owned())
}

impl Url {
    fn parse(url: &str) -> io::Result<Self> {
        let rest = url.strip_prefix("etcd://").ok_or_else(|| invalid("not an etcd:// URL"))?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (hosts, key) = rest.split_once('/').ok_or_else(|| invalid("the URL names no key"))?;
        let key = format!("/{key}");
        let (dir, name) = key.rsplit_once('/').unwrap_or(("", ""));
        if name.is_empty() {
            return Err(invalid("the URL names no key"));
        }
        let mut parsed = Url { dir: format!("{dir}/"), name: name.to_owned(), ..Url::default() };
        for pair in query.split('&').filter(|p| !p.is_empty()) {
            let value = |v: &str| Some(v.to_owned()).filter(|v| !v.is_empty());
            match pair.split_once('=').unwrap_or((pair, "")) {
                ("ca", v) => parsed.ca = value(v),
                ("cert", v) => parsed.certificate = value(v),
                ("key", v) => parsed.key = value(v),
                (other, _) => return Err(invalid(&format!("the URL's parameter '{other}' is not known"))),
            }
        }
        if parsed.certificate.is_some() != parsed.key.is_some() {
            return Err(invalid("the URL needs both cert and key, or neither"));
        }
        let scheme = if parsed.is_tls() { "https" } else { "http" };
        for host in hosts.split(',') {
            let has_port = host
                .rsplit_once(':')
                .is_some_and(|(h, p)| (!h.contains(':') || h.ends_with(']')) && p.parse::<u16>().is_ok());
            if host.is_empty() || host.contains('@') {
                return Err(invalid("the URL's hosts must be HOST[:PORT][,HOST[:PORT]...]"));
            }
            let port = if has_port { String::new() } else { format!(":{PORT}") };
            parsed.members.push(format!("{scheme}://{host}{port}"));
        }
        Ok(parsed)
    }

    fn is_tls(&self) -> bool {
        self.ca.is_some() || self.certificate.is_some()
    }

    fn connect_options(&self) -> io::Result<ConnectOptions> {
        let options = ConnectOptions::new().with_timeout(ANSWER).with_connect_timeout(HELLO);
        if !self.is_tls() {
            return Ok(options);
        }
        let read = |path: &String| {
            std::fs::read_to_string(path).map_err(|e| io::Error::new(e.kind(), format!("{path}: {e}")))
        };
        let mut tls = TlsOptions::new();
        if let Some(ca) = &self.ca {
            tls = tls.ca_certificate(Certificate::from_pem(read(ca)?));
        }
        if let (Some(certificate), Some(key)) = (&self.certificate, &self.key) {
            tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
        }
        Ok(options.with_tls(tls))
    }
}

/// A connection to one member, by its number, and when it was last used.
struct Talk {
    client: Client,
    member: usize,
    used: Instant,
}

struct State {
    runtime: Runtime,
    talk: Option<Talk>,
}

/// The directory.
struct Etcd {
    url: Url,
    options: ConnectOptions,
    state: Mutex<State>,
}

/// What one exchange with a member gives.
type Exchange<'a, T> = Pin<Box<dyn Future<Output = Result<T, Error>> + 'a>>;

/// The directory of a URL and the name in it.
pub(crate) fn beside(url: &str) -> io::Result<(Arc<dyn Files>, String)> {
    let url = Url::parse(url)?;
    let (name, options) = (url.name.clone(), url.connect_options()?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let state = Mutex::new(State { runtime, talk: None });
    Ok((Arc::new(Etcd { url, options, state }), name))
}

/// Connect to whichever member reads (that is, reaches a majority) first, of those that are not in `failed`.
async fn connect(url: &Url, options: &ConnectOptions, failed: &[usize]) -> io::Result<Talk> {
    let mut tries = JoinSet::new();
    for (member, address) in url.members.iter().enumerate().filter(|(m, _)| !failed.contains(m)) {
        let (address, options, key) = (address.clone(), options.clone(), url.dir.clone());
        tries.spawn(async move {
            let connected = async {
                let mut client = Client::connect([&address], Some(options)).await?;
                client.get(key, None).await?;
                Ok(client)
            };
            match tokio::time::timeout(HELLO, connected).await {
                Ok(Ok(client)) => Ok(Talk { client, member, used: Instant::now() }),
                Ok(Err(e)) => Err(failure(&address, &e)),
                Err(_) => Err(no_answer(&address)),
            }
        });
    }
    let mut last = None;
    while let Some(tried) = tries.join_next().await {
        match tried {
            Ok(Ok(talk)) => return Ok(talk),
            Ok(Err(e)) => last = Some(e),
            Err(e) => last = Some(io::Error::other(e.to_string())),
        }
    }
    Err(last.unwrap_or_else(|| io::Error::other("etcd: no member answers")))
}

fn failure(member: &str, error: &Error) -> io::Error {
    let text = match error {
        Error::GRpcStatus(status) => status.message().to_owned(),
        other => other.to_string(),
    };
    io::Error::other(format!("etcd: {member}: {text}"))
}

fn no_answer(member: &str) -> io::Error {
    io::Error::new(ErrorKind::TimedOut, format!("etcd: {member}: no answer"))
}

impl Etcd {
    fn key(&self, name: &str) -> Vec<u8> {
        format!("{}{name}", self.url.dir).into_bytes()
    }

    /// Have one member after the other do `work` until one has; also whether an earlier one may have done it.
    fn ask<T>(&self, work: impl Fn(Client) -> Exchange<'static, T>) -> io::Result<(T, bool)> {
        let mut state = self.state.lock().map_err(|_| io::Error::other("internal lock"))?;
        let State { runtime, talk } = &mut *state;
        let (mut failed, mut again, start) = (Vec::new(), false, Instant::now());
        runtime.block_on(async {
            loop {
                let kept = talk.take().filter(|t| t.used.elapsed() < FRESH);
                let fresh = kept.is_none();
                let mut current = match kept {
                    Some(talk) => talk,
                    None => match connect(&self.url, &self.options, &failed).await {
                        Ok(talk) => talk,
                        Err(e) if start.elapsed() > PATIENCE => return Err(e),
                        Err(_) => {
                            failed.clear();
                            tokio::time::sleep(Duration::from_millis(100)).await;
                            continue;
                        }
                    },
                };
                let done = tokio::time::timeout(ANSWER, work(current.client.clone())).await;
                let address = &self.url.members[current.member];
                let error = match done {
                    Ok(Ok(done)) => {
                        current.used = Instant::now();
                        *talk = Some(current);
                        return Ok((done, again));
                    }
                    Ok(Err(e)) => failure(address, &e),
                    Err(_) => no_answer(address),
                };
                if start.elapsed() > PATIENCE {
                    return Err(error);
                }
                again = true;
                // An old connection says nothing of its member.
                if fresh {
                    failed.push(current.member);
                }
            }
        })
    }

    /// A transaction; what it says when its conditions do not hold (then `otherwise` was done).
    fn change(
        &self,
        conditions: Vec<Compare>,
        then: Vec<TxnOp>,
        otherwise: Vec<TxnOp>,
    ) -> io::Result<(Change, bool)> {
        let txn = Txn::new().when(conditions).and_then(then).or_else(otherwise);
        self.ask(move |mut client| {
            let txn = txn.clone();
            Box::pin(async move {
                let answer = client.txn(txn).await?;
                let values = answer
                    .op_responses()
                    .into_iter()
                    .filter_map(|r| match r {
                        TxnOpResponse::Get(got) => Some(got.kvs().first().map(|kv| kv.value().to_vec())),
                        _ => None,
                    })
                    .collect();
                Ok(Change { done: answer.succeeded(), values })
            })
        })
    }
}

/// How a transaction ended, and what its reads gave.
struct Change {
    done: bool,
    values: Vec<Option<Vec<u8>>>,
}

fn exists(key: &[u8]) -> Compare {
    Compare::version(key, CompareOp::Greater, 0)
}

fn is_missing(key: &[u8]) -> Compare {
    Compare::version(key, CompareOp::Equal, 0)
}

fn not_found() -> io::Error {
    io::Error::new(ErrorKind::NotFound, "no such key")
}

impl Files for Etcd {
    fn create(&self, name: &str, contents: &[u8]) -> io::Result<()> {
        let key = self.key(name);
        let put = TxnOp::put(key.clone(), contents, None);
        let (change, again) =
            self.change(vec![is_missing(&key)], vec![put], vec![TxnOp::get(key.clone(), None)])?;
        let there = change.values.into_iter().next().flatten();
        // A member that did not answer may have made it.
        if change.done || again && there.as_deref() == Some(contents) {
            return Ok(());
        }
        Err(io::Error::new(ErrorKind::AlreadyExists, "the key exists"))
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let key = self.key(name);
        let (value, _) = self.ask(move |mut client| {
            let key = key.clone();
            Box::pin(async move {
                let got = client.get(key, None).await?;
                Ok(got.kvs().first().map(|kv| kv.value().to_vec()))
            })
        })?;
        value.ok_or_else(not_found)
    }

    /// A second key with the first one's value, if that is still the first one's.
    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        let value = self.read(from)?;
        let (from, to) = (self.key(from), self.key(to));
        let conditions = vec![Compare::value(from, CompareOp::Equal, value.clone()), is_missing(&to)];
        let (change, _) =
            self.change(conditions, vec![TxnOp::put(to.clone(), value, None)], vec![TxnOp::get(to, None)])?;
        match (change.done, change.values.into_iter().next().flatten()) {
            (true, _) => Ok(()),
            (false, Some(_)) => Err(io::Error::new(ErrorKind::AlreadyExists, "the key exists")),
            (false, None) => Err(not_found()),
        }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let value = self.read(from)?;
        let (from, to) = (self.key(from), self.key(to));
        let condition = Compare::value(from.clone(), CompareOp::Equal, value.clone());
        let (change, again) = self.change(
            vec![condition],
            vec![TxnOp::put(to.clone(), value.clone(), None), TxnOp::delete(from, None)],
            vec![TxnOp::get(to, None)],
        )?;
        let there = change.values.into_iter().next().flatten();
        if change.done || again && there == Some(value) {
            return Ok(());
        }
        Err(not_found())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let key = self.key(name);
        let (change, again) = self.change(vec![exists(&key)], vec![TxnOp::delete(key, None)], Vec::new())?;
        if change.done || again {
            return Ok(());
        }
        Err(not_found())
    }

    fn exists(&self, name: &str) -> io::Result<bool> {
        match self.read(name) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let dir = self.url.dir.clone();
        let keys = self.ask(move |mut client| {
            let dir = dir.clone();
            Box::pin(async move {
                let options = GetOptions::new().with_prefix().with_keys_only();
                let got = client.get(dir, Some(options)).await?;
                Ok(got.kvs().iter().map(|kv| kv.key().to_vec()).collect::<Vec<_>>())
            })
        });
        let names = keys?.0.into_iter().filter_map(|key| {
            let name = String::from_utf8(key).ok()?.strip_prefix(&self.url.dir)?.to_owned();
            (!name.contains('/')).then_some(name)
        });
        Ok(names.collect())
    }

    fn check(&self) -> io::Result<()> {
        self.exists(&self.url.name).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let url = Url::parse("etcd://a:1,[::1],c/locks/web?ca=/x").unwrap();
        assert_eq!(url.members, ["https://a:1", "https://[::1]:2379", "https://c:2379"]);
        assert_eq!((url.dir.as_str(), url.name.as_str()), ("/locks/", "web"));
        assert_eq!(Url::parse("etcd://a/web").unwrap().members, ["http://a:2379"]);
        for bad in [
            "etcd://a",
            "etcd://a/",
            "etcd:///web",
            "etcd://a,/web",
            "etcd://a/web?cert=x",
            "etcd://a/web?b=c",
        ] {
            assert!(Url::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn no_member_is_an_error_and_not_an_answer() {
        let (files, name) = beside("etcd://127.0.0.1:1,127.0.0.1:2/locks/web").unwrap();
        let error = files.exists(&name).unwrap_err();
        assert_ne!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().contains("etcd"), "{error}");
    }
}
