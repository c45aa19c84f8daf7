//! `ftctl check`: is this host fit for a protected machine? Every reason against it comes with its mend.

use std::collections::HashMap;

use clap::{Arg, ArgMatches, Command};
use serde_json::json;

use super::client::Client;
use super::print;
use crate::check::{local, Finding, Local};

/// The command line.
pub fn command() -> Command {
    let option = |name: &'static str, value: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name(value).help(help)
    };
    Command::new("check")
        .about("Find out whether this host is fit for fault tolerance, alone or together with a peer")
        .arg(option("lock-dir", "DIR", "Where the images and their lock are: the shared storage"))
        .arg(option(
            "peer",
            "HOST[:PORT]",
            "A peer of ftvmd.conf: both services measure and race; or else a primary that is to be reached",
        ))
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

/// What the services of this host and of a peer say; `None`: the peer is none of this host's.
fn together(session: bool, peer: &str, of: &ArgMatches) -> Option<Result<Vec<Finding>, String>> {
    let client = Client::connect(session).ok()?;
    let peers: HashMap<String, super::client::Dict> = client.manager("Peers", &()).ok()?;
    peers.contains_key(peer).then(|| {
        let dir = of.get_one::<String>("lock-dir");
        let dir = dir.map(|d| std::path::absolute(d).map_or_else(|_| d.clone(), |p| p.display().to_string()));
        let mut options: HashMap<&str, zbus::Variant<'_>> = HashMap::new();
        options.extend(dir.as_deref().map(|d| ("lock-dir", d.into())));
        options.extend(of.get_one::<u64>("memory").map(|m| ("memory", (*m).into())));
        let list: Vec<(String, bool, String, String)> = client.manager("CheckPeer", &(peer, options))?;
        let finding = |(what, fit, seen, mend): (String, bool, String, String)| {
            Finding::new(&what, if fit { Ok(seen) } else { Err((seen, mend)) })
        };
        Ok(list.into_iter().map(finding).collect())
    })
}

/// Check; 0 if this host is fit, 1 if not.
pub fn run(of: &ArgMatches, as_json: bool) -> i32 {
    let text = |key: &str| of.get_one::<String>(key).map(String::as_str);
    let peer = text("peer");
    let both = peer.and_then(|peer| together(of.get_flag("session"), peer, of));
    let mut findings = local(&Local {
        firmware: text("firmware").unwrap_or_default(),
        port: of.get_one::<u16>("port").copied().unwrap_or(8100),
        memory: of.get_one::<u64>("memory").copied(),
        lock_dir: text("lock-dir"),
        peer: peer.filter(|_| both.is_none()),
    });
    match both {
        Some(Ok(more)) => findings.extend(more),
        Some(Err(e)) => {
            findings.push(Finding::new("service", Err((e, "look after ftvmd on this host".into()))))
        }
        None => {}
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
            Ok(seen) => format!("ok    {:<12} {seen}", f.what),
            Err((cause, mend)) => format!("WRONG {:<12} {cause}\n      {:<12} {mend}", f.what, "mend:"),
        };
        findings.iter().map(line).collect::<Vec<_>>().join("\n")
    };
    i32::from(print(&lines).is_err() || !fit)
}
