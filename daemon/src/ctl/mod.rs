//! `ftctl`: the service for people.

pub mod cert;
pub mod check;
pub mod client;
mod watch;

use clap::{Arg, ArgAction, ArgMatches, Command};
use serde_json::{json, Map, Value};

use client::{Client, FT, MACHINE};

/// The command line.
pub fn command() -> Command {
    let name = || Arg::new("name").value_name("NAME").required(true).help("The machine");
    let verb = |verb: &'static str, about: &'static str| Command::new(verb).about(about).arg(name());
    Command::new("ftctl")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Looks at and controls the ftvm machines of this host, through ftvmd")
        .subcommand_required(true)
        .arg(
            Arg::new("session")
                .long("session")
                .global(true)
                .action(ArgAction::SetTrue)
                .help("Use the session bus instead of the system bus"),
        )
        .arg(Arg::new("json").long("json").global(true).action(ArgAction::SetTrue).help("Print JSON"))
        .subcommand(Command::new("list").about("List the machines"))
        .subcommand(
            verb("status", "Show a machine and its pair").arg(
                Arg::new("watch")
                    .long("watch")
                    .action(ArgAction::SetTrue)
                    .help("Keep showing, twice a second, until interrupted"),
            ),
        )
        .subcommand(verb("start", "Start a machine"))
        .subcommand(verb("shutdown", "Press a machine's power button"))
        .subcommand(verb("reset", "Press a machine's reset button"))
        .subcommand(verb("pause", "Let a machine stand still"))
        .subcommand(verb("resume", "Let a paused machine go on"))
        .subcommand(verb("destroy", "Cut a machine's power"))
        .subcommand(
            verb("protect", "Turn fault tolerance on: make a running machine a primary")
                .arg(
                    Arg::new("listen")
                        .long("listen")
                        .value_name("ADDR:PORT")
                        .help("Where the backup connects"),
                )
                .arg(Arg::new("lock").long("lock").value_name("PATH").help("The lock's path")),
        )
        .subcommand(verb("unprotect", "Turn fault tolerance off"))
        .subcommand(verb("back", "Define and start the backup of a primary on another host").arg(
            Arg::new("peer").value_name("HOST[:PORT]").required(true).help("The primary's logging channel"),
        ))
        .subcommand(
            verb("move-backup", "Have another host start the backup in the place of the one that has it").arg(
                Arg::new("host").value_name("HOST").help("A peer; without it, where there is most room"),
            ),
        )
        .subcommand(verb("failover", "Switch a protected machine over to its backup"))
        .subcommand(verb("restart-backup", "Let the backup give up and join anew"))
        .subcommand(
            Command::new("events")
                .about("Print what happens, until interrupted")
                .arg(Arg::new("name").value_name("NAME").help("Only of this machine")),
        )
        .subcommand(
            verb("define", "Define a machine").arg(
                Arg::new("file")
                    .value_name("FILE")
                    .required(true)
                    .help("ftvm's arguments, one a line; - is standard input"),
            ),
        )
        .subcommand(verb("undefine", "Remove a machine's definition"))
        .subcommand(check::command())
        .subcommand(Command::new("host").about("Show what this host has"))
        .subcommand(Command::new("peers").about("Show the other hosts"))
        .subcommand(
            Command::new("maintenance")
                .about("Give all machines away so that this host can be switched off, and wait until none is left")
                .arg(
                    Arg::new("what")
                        .value_name("WHAT")
                        .value_parser(["on", "off", "state"])
                        .default_value("state")
                        .help("on, off (take machines again) or state"),
                ),
        )
        .subcommand(cert::command())
        .subcommand(
            Command::new("completions").about("Print the completions of a shell").arg(
                Arg::new("shell")
                    .value_parser(clap::builder::EnumValueParser::<clap_complete::Shell>::new())
                    .required(true)
                    .help("The shell"),
            ),
        )
}

/// Run a command line; the exit status.
pub fn main(matches: &ArgMatches) -> i32 {
    let Some((verb, of)) = matches.subcommand() else { return 2 };
    let json = of.get_flag("json");
    let result = match verb {
        "check" => return check::run(of, json),
        "cert" => cert::run(of),
        "completions" => {
            if let Some(shell) = of.get_one::<clap_complete::Shell>("shell") {
                clap_complete::generate(*shell, &mut command(), "ftctl", &mut std::io::stdout());
            }
            Ok(())
        }
        _ => Client::connect(of.get_flag("session")).and_then(|client| run(&client, verb, of, json)),
    };
    match result {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("ftctl: {e}");
            1
        }
    }
}

fn run(client: &Client, verb: &str, of: &ArgMatches, json: bool) -> Result<(), String> {
    let text = |key: &str| of.get_one::<String>(key).map_or("", String::as_str);
    match verb {
        "list" => return list(client, json),
        "events" => return watch::events(client, of.get_one::<String>("name").map(String::as_str), json),
        "host" => {
            let host: client::Dict = client.manager("HostInventory", &())?;
            return show(&client::to_json(&host), json);
        }
        "peers" => return peers(client, json),
        "maintenance" => return maintenance(client, text("what"), json),
        "define" => {
            let file = text("file");
            let definition = match file {
                "-" => std::io::read_to_string(std::io::stdin()),
                path => std::fs::read_to_string(path),
            };
            let definition = definition.map_err(|e| format!("{file}: {e}"))?;
            let _: zbus::OwnedObjectPath = client.manager("Define", &(text("name"), definition))?;
            return Ok(());
        }
        "undefine" => return client.manager("Undefine", &text("name")),
        "back" => {
            let definition = format!("-ft backup,peer={}\n", text("peer").replace(',', ",,"));
            let _: zbus::OwnedObjectPath = client.manager("Define", &(text("name"), definition))?;
            let _: zbus::OwnedObjectPath = client.manager("Start", &text("name"))?;
            return Ok(());
        }
        _ => {}
    }
    let machine = client.find(text("name"))?;
    let call = |interface: &str, method: &str| client.call::<_, ()>(&machine, interface, method, &());
    match verb {
        "status" if of.get_flag("watch") => watch::status(client, &machine),
        "status" => show(&status(client, &machine)?, json),
        "start" => call(MACHINE, "Start"),
        "shutdown" => call(MACHINE, "Shutdown"),
        "reset" => call(MACHINE, "Reset"),
        "pause" => call(MACHINE, "Pause"),
        "resume" => call(MACHINE, "Resume"),
        "destroy" => call(MACHINE, "Destroy"),
        "protect" => {
            let given =
                |key: &'static str| of.get_one::<String>(key).map(|v| (key, zbus::Variant::from(v.as_str())));
            let options: std::collections::HashMap<&str, zbus::Variant<'_>> =
                ["listen", "lock"].into_iter().filter_map(given).collect();
            client.call(&machine, FT, "TurnOn", &options)
        }
        "unprotect" => call(FT, "TurnOff"),
        "move-backup" => {
            let host: String = client.call(&machine, FT, "MigrateBackup", &text("host"))?;
            print(&format!("the backup is on {host}"))
        }
        "failover" => call(FT, "TestFailover"),
        "restart-backup" => call(FT, "TestRestart"),
        other => Err(format!("'{other}' is no command")),
    }
}

/// A machine's properties, in the order of the page.
fn status(client: &Client, machine: &str) -> Result<Value, String> {
    let mut out = Map::new();
    let own = client.properties(machine, MACHINE)?;
    let pair = client.properties(machine, FT)?;
    let take = |from: &Value, key: &str| from.get(key).cloned().unwrap_or(Value::Null);
    for (key, name) in [
        ("Name", "name"),
        ("Uuid", "uuid"),
        ("Origin", "origin"),
        ("State", "state"),
        ("Pid", "pid"),
        ("QmpSocket", "qmp-socket"),
    ] {
        out.insert(name.into(), take(&own, key));
    }
    for (key, name) in [
        ("Role", "role"),
        ("State", "ft-state"),
        ("Peer", "peer"),
        ("PeerHost", "peer-host"),
        ("Lag", "lag-ms"),
        ("LogBandwidth", "log-mbps"),
        ("Throttle", "throttle-percent"),
        ("LastFailover", "last-failover"),
    ] {
        out.insert(name.into(), take(&pair, key));
    }
    out.insert("statistics".into(), take(&own, "Statistics"));
    Ok(Value::Object(out))
}

fn list(client: &Client, json: bool) -> Result<(), String> {
    let machines: Vec<(zbus::OwnedObjectPath, String, String)> = client.manager("List", &())?;
    let mut rows = Vec::new();
    for (path, name, state) in &machines {
        let pair = client.properties(path.as_str(), FT)?;
        rows.push(json!({"name": name, "state": state, "role": pair["Role"], "ft-state": pair["State"], "peer": pair["Peer"]}));
    }
    if json {
        return print(&format!("{:#}", Value::Array(rows)));
    }
    print(&format!("{:<24} {:<10} {:<8} {:<14} PEER", "NAME", "STATE", "ROLE", "PAIR"))?;
    for row in rows {
        let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
        let line = format!(
            "{:<24} {:<10} {:<8} {:<14} {}",
            text("name"),
            text("state"),
            text("role"),
            text("ft-state"),
            text("peer")
        );
        print(line.trim_end())?;
    }
    Ok(())
}

fn peers(client: &Client, json: bool) -> Result<(), String> {
    let peers: std::collections::BTreeMap<String, client::Dict> = client.manager("Peers", &())?;
    if json {
        let all: Map<String, Value> = peers.iter().map(|(k, v)| (k.clone(), client::to_json(v))).collect();
        return print(&format!("{:#}", Value::Object(all)));
    }
    let line = |name: &str, state: &str, load: &str, memory: &str, machines: &str| {
        print(format!("{name:<20} {state:<12} {load:>6} {memory:>10}  {machines}").trim_end())
    };
    line("NAME", "STATE", "LOAD", "FREE MIB", "MACHINES")?;
    for (name, dict) in &peers {
        let peer = client::to_json(dict);
        let state = match (peer["answers"] == true, peer["maintenance"] == true) {
            (false, _) => "silent",
            (_, true) => "maintenance",
            _ => "ready",
        };
        let machines: Vec<_> = peer["machines"].as_array().into_iter().flatten().map(plain).collect();
        let mib = peer["memory-available"].as_u64().map_or(String::new(), |b| (b >> 20).to_string());
        let load = peer["load"].as_f64().map_or(String::new(), |l| format!("{l:.2}"));
        let problem = plain(&peer["problem"]);
        let last = if state == "silent" { problem } else { machines.join(" ") };
        line(name, state, &load, &mib, &last)?;
    }
    Ok(())
}

/// Enter, leave or look; entering takes until no machine is left, or the person interrupts it (it goes on then).
fn maintenance(client: &Client, what: &str, json: bool) -> Result<(), String> {
    match what {
        "on" => client.manager::<_, ()>("EnterMaintenance", &())?,
        "off" => client.manager::<_, ()>("LeaveMaintenance", &())?,
        _ => {}
    }
    let mut told: Vec<Value> = Vec::new();
    loop {
        let host = client.properties(crate::ROOT, client::MANAGER)?;
        let waits = host["MaintenanceWaits"].as_array().cloned().unwrap_or_default();
        if what != "on" || host["Maintenance"] != "entering" {
            return match json {
                true => print(&format!("{:#}", json!({"maintenance": host["Maintenance"], "waits": waits}))),
                false => {
                    print(&plain(&host["Maintenance"]))?;
                    waits.iter().try_for_each(|w| print(&plain(w)))
                }
            };
        }
        for wait in waits.iter().filter(|w| !told.contains(w)) {
            eprintln!("ftctl: {}", plain(wait));
        }
        told = waits;
        std::thread::sleep(std::time::Duration::from_millis(250));
    }
}

/// Members, one a line, or JSON.
fn show(value: &Value, json: bool) -> Result<(), String> {
    if json {
        return print(&format!("{value:#}"));
    }
    for (key, value) in value.as_object().into_iter().flatten() {
        let text = match value {
            Value::Object(members) => {
                members.iter().map(|(k, v)| format!("{k} {}", plain(v))).collect::<Vec<_>>().join(", ")
            }
            other => plain(other),
        };
        print(format!("{key:<17} {text}").trim_end())?;
    }
    Ok(())
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        Value::Number(n) if n.is_f64() => format!("{:.2}", n.as_f64().unwrap_or(0.0)),
        other => other.to_string(),
    }
}

/// A line on standard output, whose end (a closed pipe) is the end of the program.
fn print(line: &str) -> Result<(), String> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(|e| format!("standard output: {e}"))
}
