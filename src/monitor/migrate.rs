//! Commands that move the machine.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use ftvm_qmp::{Call, Fds, QmpError};
use serde_json::{json, Value};

use super::{done, Control, Reply};
use crate::migration::channel::{connect, Channel, Uri};
use crate::migration::postcopy::{self, arriving};
use crate::migration::status::{Status, CAPABILITIES};
use crate::migration::{incoming, outgoing};
use crate::runtime::announce::pauses;
use crate::runtime::control::RunState;

fn uri(call: &Call) -> Result<Uri, QmpError> {
    match Uri::parse(call.text("uri")) {
        Ok(Uri::Defer) | Err(_) => {
            Err(QmpError::generic("Parameter 'uri' expects a valid migration protocol"))
        }
        Ok(uri) => Ok(uri),
    }
}

/// `migrate`
pub fn migrate(c: &Control, call: &mut Call) -> Reply {
    if call.bool("blk") == Some(true) || call.bool("inc") == Some(true) {
        return Err(QmpError::generic("disks are not copied: the destination must see the same images"));
    }
    let uri = uri(call)?;
    if call.bool("resume") == Some(true) {
        c.change(|rt| outgoing::can_resume(rt).map_err(QmpError::generic))?;
        let tls = c.shared.migration.tls_client(&uri).map_err(QmpError::generic)?;
        let channel = open(&uri, call.fds)?;
        return c.change(move |rt| {
            outgoing::resume(rt, channel, tls).map_err(QmpError::generic)?;
            done()
        });
    }
    c.change(|rt| {
        if rt.incoming.is_some() {
            return Err(QmpError::generic("Guest is waiting for an incoming migration"));
        }
        if rt.outgoing.is_some() {
            return Err(QmpError::generic("There's a migration process in progress"));
        }
        if rt.images_away || rt.shared.state() == RunState::PostMigrate {
            return Err(QmpError::generic("Can't migrate the vm that was paused due to previous migration"));
        }
        outgoing::blocked(rt).map_or(Ok(()), |reason| Err(QmpError::generic(reason)))
    })?;
    let failed = |e: &QmpError| c.shared.migration.state().error = Some(e.to_string());
    let tls = c.shared.migration.tls_client(&uri).map_err(QmpError::generic).inspect_err(failed)?;
    let channel = open(&uri, call.fds).inspect_err(failed)?;
    c.change(move |rt| {
        if rt.outgoing.is_some() {
            return Err(QmpError::generic("There's a migration process in progress"));
        }
        outgoing::start(rt, channel, tls).map_err(QmpError::generic)?;
        done()
    })
}

fn open(uri: &Uri, fds: &mut Fds) -> Result<Channel, QmpError> {
    connect(uri, |name| fds.named(name).map_err(|e| e.to_string()))
        .map_err(|e| QmpError::generic(e.to_string()))
}

/// `migrate_cancel`
pub fn cancel(c: &Control, _: &mut Call) -> Reply {
    c.machine(outgoing::cancel)?;
    done()
}

/// `migrate-start-postcopy`
pub fn start_postcopy(c: &Control, _: &mut Call) -> Reply {
    if !c.shared.migration.has("postcopy-ram") {
        let text = "Enable postcopy with migrate_set_capability before the start of migration";
        return Err(QmpError::generic(text));
    }
    if c.shared.migration.state().status == Status::None {
        return Err(QmpError::generic("Postcopy must be started after migration has been started"));
    }
    // One that has ended meanwhile is none to complain of.
    c.shared.migration.start_postcopy.store(true, Ordering::Relaxed);
    done()
}

/// `migrate-pause`; the machine thread, which may wait for a page, is not asked where it arrives.
pub fn pause(c: &Control, _: &mut Call) -> Reply {
    let active = c.shared.migration.state().status == Status::PostcopyActive;
    match c.shared.migration.arriving() {
        Some(arriving) if active => {
            arriving.pause();
            return done();
        }
        None if active && c.machine(|rt| outgoing::break_off(rt))? => return done(),
        _ => {}
    }
    Err(QmpError::generic("migrate-pause is currently only supported during postcopy-active state"))
}

/// `migrate-recover`
pub fn recover(c: &Control, call: &mut Call) -> Reply {
    let uri = uri(call)?;
    arriving::recover(&uri, &c.shared).map_err(QmpError::generic)?;
    done()
}

/// `migrate-continue`
pub fn go_on(c: &Control, call: &mut Call) -> Reply {
    if call.text("state") != "pre-switchover" {
        return Err(QmpError::generic("Migration not in expected state: pre-switchover"));
    }
    c.change(|rt| {
        outgoing::go_on(rt).map_err(QmpError::generic)?;
        done()
    })
}

/// `migrate-incoming`
pub fn incoming(c: &Control, call: &mut Call) -> Reply {
    let uri = uri(call)?;
    let shared = Arc::clone(&c.shared);
    c.change(move |rt| {
        if rt.incoming.is_none() {
            return Err(QmpError::generic("'-incoming' was not specified on the command line"));
        }
        if rt.shared.migration.state().status.is_busy() {
            return Err(QmpError::generic("The incoming migration has already been started"));
        }
        incoming::start(&uri, &shared, &rt.events).map_err(|e| QmpError::generic(e.to_string()))?;
        done()
    })
}

/// `migrate-set-capabilities`
pub fn set_capabilities(c: &Control, call: &mut Call) -> Reply {
    let list = call.arguments.get("capabilities").and_then(Value::as_array).cloned().unwrap_or_default();
    let mut wanted = Vec::new();
    for item in &list {
        let (name, on) = (item["capability"].as_str().unwrap_or_default(), item["state"] == json!(true));
        match CAPABILITIES.iter().find(|(known, _)| *known == name) {
            Some((known, _)) => wanted.push((*known, on)),
            None if on => {
                return Err(QmpError::generic(format!(
                    "the migration capability '{name}' is not available here"
                )))
            }
            None => {}
        }
    }
    if wanted.contains(&("postcopy-ram", true)) && c.shared.state() == RunState::InMigrate {
        let kernel = c.machine(|rt| rt.machine.is_hardware())?;
        postcopy::supported(kernel).map_err(QmpError::generic)?;
    }
    let mut state = c.shared.migration.state();
    if state.status.is_busy() && !state.incoming {
        return Err(QmpError::generic("There's a migration process in progress"));
    }
    for (name, on) in wanted {
        state.capabilities.retain(|n| *n != name);
        if on {
            state.capabilities.push(name);
        }
    }
    done()
}

/// `query-migrate-capabilities`
pub fn capabilities(c: &Control, _: &mut Call) -> Reply {
    let on = c.shared.migration.state().capabilities.clone();
    Ok(CAPABILITIES.iter().map(|(n, _)| json!({"capability": n, "state": on.contains(n)})).collect())
}

/// `migrate-set-parameters`
pub fn set_parameters(c: &Control, call: &mut Call) -> Reply {
    c.shared.migration.set_parameters(call.arguments).map_err(QmpError::generic)?;
    done()
}

/// `query-migrate-parameters`
pub fn parameters(c: &Control, _: &mut Call) -> Reply {
    Ok(c.shared.migration.query_parameters())
}

/// `query-migrate`
pub fn query(c: &Control, _: &mut Call) -> Reply {
    let mut answer = c.shared.migration.query();
    // Without a machine there is nothing that could move.
    if c.shared.migration.arriving().is_some() {
        // The machine thread may wait for a page, so it is not asked.
        answer["blocked-reasons"] = json!([postcopy::MISSING]);
    } else if c.config.machine != "none" {
        if let Some(reason) = c.machine(|rt| outgoing::blocked(rt))? {
            answer["blocked-reasons"] = json!([reason]);
        }
    }
    Ok(answer)
}

/// `announce-self`
pub fn announce(c: &Control, call: &mut Call) -> Reply {
    let number = |name: &str| call.int(name).and_then(|n| u64::try_from(n).ok()).unwrap_or(0);
    let pauses = pauses(number("initial"), number("step"), number("max"), number("rounds").min(1000));
    let only: Option<Vec<String>> = call
        .arguments
        .get("interfaces")
        .and_then(Value::as_array)
        .map(|list| list.iter().filter_map(|n| n.as_str().map(str::to_owned)).collect());
    c.change(move |rt| {
        rt.announce_cards(only.as_deref(), pauses);
        done()
    })
}

/// The human monitor's lines.
pub fn line(c: &Control, verb: &str, words: &[&str], fds: &mut Fds) -> Result<String, QmpError> {
    let missing = || QmpError::generic(format!("{verb}: an argument is missing; see 'help'"));
    let word = |n: usize| words.get(n).copied().ok_or_else(missing);
    match verb {
        "migrate" => {
            let (detach, resume) = (words.contains(&"-d"), words.contains(&"-r"));
            let uri: Vec<&str> = words.iter().filter(|w| !["-d", "-r"].contains(w)).copied().collect();
            if uri.is_empty() {
                return Err(missing());
            }
            let uri = uri.join(" ").trim_matches('"').to_owned();
            c.run("migrate", json!({"uri": uri, "resume": resume}), fds)?;
            let waits = || {
                let status = c.shared.migration.state().status;
                status.is_busy() && status != Status::PostcopyPaused
            };
            while !detach && waits() {
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
            let error = c.shared.migration.state().error.clone().filter(|_| !detach);
            error.map_or(Ok(String::new()), |e| Err(QmpError::generic(e)))
        }
        "migrate_cancel" => c.run("migrate_cancel", json!({}), fds),
        "migrate_start_postcopy" => c.run("migrate-start-postcopy", json!({}), fds),
        "migrate_pause" => c.run("migrate-pause", json!({}), fds),
        "migrate_recover" => c.run("migrate-recover", json!({"uri": words.join(" ").trim_matches('"')}), fds),
        "migrate_continue" => c.run("migrate-continue", json!({"state": word(0)?}), fds),
        "migrate_incoming" => {
            c.run("migrate-incoming", json!({"uri": words.join(" ").trim_matches('"')}), fds)
        }
        "migrate_set_capability" => {
            let on = match word(1)? {
                "on" => true,
                "off" => false,
                other => return Err(QmpError::generic(format!("'{other}' is neither on nor off"))),
            };
            let list = json!([{"capability": word(0)?, "state": on}]);
            c.run("migrate-set-capabilities", json!({"capabilities": list}), fds)
        }
        "migrate_set_parameter" => {
            let (name, text) = (word(0)?, word(1)?);
            // As in QEMU, a bandwidth without a suffix is in MiB a second.
            let unit = if name.starts_with("max-") && name.ends_with("-bandwidth") { 1 << 20 } else { 1 };
            let value = match name {
                "tls-creds" | "tls-hostname" | "tls-authz" => json!(text),
                _ => json!(crate::cli::keyval::parse_size(text, unit)
                    .ok_or_else(|| QmpError::generic(format!("'{text}' is not a number")))?),
            };
            c.run("migrate-set-parameters", json!({name: value}), fds)
        }
        "announce_self" => {
            let p = c.shared.migration.state().parameters.clone();
            let arguments = json!({
                "initial": p.announce_initial,
                "max": p.announce_max,
                "rounds": p.announce_rounds,
                "step": p.announce_step,
            });
            c.run("announce-self", arguments, fds)
        }
        _ => Ok(format!("unknown command: '{verb}'\n")),
    }
}

fn pairs(value: &Value) -> String {
    let one = |(name, value): (&String, &Value)| match value {
        Value::String(text) => format!("{name}: {text}\n"),
        other => format!("{name}: {other}\n"),
    };
    value.as_object().into_iter().flatten().map(one).collect()
}

/// `info migrate`
pub fn info(c: &Control) -> Result<String, QmpError> {
    let answer = c.query("query-migrate")?;
    let mut out = String::new();
    let mut rest = serde_json::Map::new();
    for (name, value) in answer.as_object().into_iter().flatten() {
        match name.as_str() {
            "status" => out = format!("Migration status: {}\n", value.as_str().unwrap_or_default()),
            "ram" => rest.extend(value.as_object().cloned().unwrap_or_default()),
            _ => drop(rest.insert(name.clone(), value.clone())),
        }
    }
    Ok(out + &pairs(&Value::Object(rest)))
}

/// `info migrate_capabilities`
pub fn info_capabilities(c: &Control) -> Result<String, QmpError> {
    let list = c.query("query-migrate-capabilities")?;
    let one = |v: &Value| {
        let on = if v["state"] == json!(true) { "on" } else { "off" };
        format!("{}: {on}\n", v["capability"].as_str().unwrap_or_default())
    };
    Ok(list.as_array().into_iter().flatten().map(one).collect())
}

/// `info migrate_parameters`
pub fn info_parameters(c: &Control) -> Result<String, QmpError> {
    Ok(pairs(&c.query("query-migrate-parameters")?))
}
