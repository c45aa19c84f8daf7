//! Commands about the machine as a whole.

use std::io::Write;

use ftvm_qmp::{Call, QmpError};
use serde_json::{json, Value};

use super::{done, Control, Reply};
use crate::cli::config::{format_uuid, Accel, MACHINES};
use crate::machine::MachineInput;
use crate::runtime::control::RunState;
use crate::runtime::live::Runtime;
use crate::runtime::{Event, Quit};

pub fn status(c: &Control, _: &mut Call) -> Reply {
    let state = c.shared.state();
    Ok(json!({"running": state == RunState::Running, "singlestep": false, "status": state.word()}))
}

pub fn name(c: &Control, _: &mut Call) -> Reply {
    Ok(c.config.name.as_ref().map_or_else(|| json!({}), |n| json!({"name": n})))
}

pub fn uuid(c: &Control, _: &mut Call) -> Reply {
    Ok(json!({"UUID": format_uuid(&c.config.uuid)}))
}

pub fn kvm(c: &Control, _: &mut Call) -> Reply {
    // "Present" is what the program has, as in QEMU.
    Ok(json!({"enabled": c.shared.accel() == Accel::Kvm, "present": true}))
}

pub fn quit(c: &Control, _: &mut Call) -> Reply {
    let _ = c.events.send(Event::Quit(Quit::HostQmpQuit));
    c.shared.end_if_stuck();
    done()
}

pub fn stop(c: &Control, _: &mut Call) -> Reply {
    c.control(|rt| {
        if rt.incoming.is_some() {
            // It will not run when it has come.
            rt.autostart = false;
            return done();
        }
        if matches!(rt.shared.state(), RunState::FinishMigrate) {
            return Err(QmpError::generic("Migration is not finalized yet"));
        }
        rt.stop(RunState::Paused);
        done()
    })
}

pub fn cont(c: &Control, _: &mut Call) -> Reply {
    if c.machine(|rt| rt.is_following())? {
        // libvirt says this to every program that it starts: here the machine runs as its primary does.
        c.shared.events.emit("RESUME", Value::Null);
        return done();
    }
    c.control(|rt| {
        if rt.shared.state() == RunState::InMigrate {
            rt.autostart = true;
            return done();
        }
        rt.may_run().map_err(QmpError::generic)?;
        // Given away, or to a file: another host may have the images open by now.
        rt.fetch_images().map_err(QmpError::generic)?;
        rt.cont();
        done()
    })
}

pub fn reset(c: &Control, _: &mut Call) -> Reply {
    c.change(|rt| {
        rt.reset();
        done()
    })
}

pub fn powerdown(c: &Control, _: &mut Call) -> Reply {
    c.change(|rt| {
        rt.powerdown();
        done()
    })
}

pub fn nmi(c: &Control, _: &mut Call) -> Reply {
    c.change(|rt| {
        rt.input(MachineInput::Nmi);
        done()
    })
}

pub fn set_action(c: &Control, call: &mut Call) -> Reply {
    let word = |name: &str| call.arguments.get(name).and_then(Value::as_str).map(str::to_owned);
    let (reboot, shutdown, panic) = (word("reboot"), word("shutdown"), word("panic"));
    if matches!(panic.as_deref(), Some("shutdown" | "exit-failure")) {
        return Err(QmpError::generic("a panic can only pause the machine or lead to nothing (pause, none)"));
    }
    if word("watchdog").is_some() {
        return Err(QmpError::generic("this machine has no watchdog"));
    }
    c.machine(move |rt| {
        if let Some(reboot) = reboot {
            rt.options.no_reboot = reboot == "shutdown";
        }
        if let Some(shutdown) = shutdown {
            rt.options.no_shutdown = shutdown == "pause";
        }
        if let Some(panic) = panic {
            rt.options.pause_on_panic = panic == "pause";
        }
    })?;
    done()
}

pub fn machines(_: &Control, _: &mut Call) -> Reply {
    let mut list = Vec::new();
    for m in MACHINES {
        let mut entry = json!({
            "name": m.name,
            "cpu-max": m.max_cpus,
            "hotpluggable-cpus": false,
            "numa-mem-supported": false,
            "deprecated": false,
        });
        if let Some(alias) = m.alias {
            entry["alias"] = json!(alias);
        }
        if m.is_default {
            entry["is-default"] = json!(true);
        }
        if m.max_cpus > 1 {
            entry["default-cpu-type"] = json!("qemu64-x86_64-cpu");
            entry["default-ram-id"] = json!("pc.ram");
        }
        list.push(entry);
    }
    Ok(json!(list))
}

pub fn memory_size(c: &Control, _: &mut Call) -> Reply {
    Ok(json!({"base-memory": c.config.memory, "plugged-memory": 0}))
}

pub fn memdev(c: &Control, _: &mut Call) -> Reply {
    if c.config.machine == "none" {
        return Ok(json!([]));
    }
    let id = c.config.memory_backend.as_deref().unwrap_or("pc.ram");
    Ok(json!([{
        "id": id,
        "size": c.config.memory,
        "merge": false,
        "dump": true,
        "prealloc": false,
        "share": false,
        "reserve": false,
        "host-nodes": [],
        "policy": "default",
    }]))
}

pub fn replay(c: &Control, _: &mut Call) -> Reply {
    let work =
        |rt: &mut Runtime| (rt.machine.stamp().position, rt.replay.as_ref().map(|r| r.file().to_owned()));
    let (icount, played) = c.machine(work)?;
    let mut reply = json!({"mode": "none", "icount": icount});
    if let Some(file) = played {
        reply["mode"] = json!("play");
        reply["filename"] = json!(file);
    } else if let Some(file) = &c.config.icount.record {
        reply["mode"] = json!("record");
        reply["filename"] = json!(file);
    }
    Ok(reply)
}

/// The argument `icount`.
fn icount(call: &Call) -> Result<u64, QmpError> {
    let count = call.int("icount").and_then(|n| u64::try_from(n).ok());
    count.ok_or_else(|| QmpError::generic("Parameter 'icount' expects a count of instructions"))
}

pub fn replay_break(c: &Control, call: &mut Call) -> Reply {
    let at = icount(call)?;
    c.control(move |rt| match rt.replay.is_some() {
        true => rt.replay_break(Some(at)).map_err(QmpError::generic),
        false => Err(QmpError::generic("setting the breakpoint is allowed only in play mode")),
    })?;
    done()
}

pub fn replay_delete_break(c: &Control, _: &mut Call) -> Reply {
    c.control(|rt| match rt.replay.is_some() {
        true => rt.replay_break(None).map_err(QmpError::generic),
        false => Err(QmpError::generic("replay breakpoints are allowed only in play mode")),
    })?;
    done()
}

pub fn replay_seek(c: &Control, call: &mut Call) -> Reply {
    let at = icount(call)?;
    c.control(move |rt| match rt.replay.is_some() {
        true => rt.replay_seek(at).map_err(QmpError::generic),
        false => Err(QmpError::generic("replay must be enabled to seek")),
    })?;
    done()
}

pub fn pmemsave(c: &Control, call: &mut Call) -> Reply {
    let number = |name: &str| {
        call.int(name).and_then(|n| u64::try_from(n).ok()).ok_or_else(|| {
            QmpError::generic(format!("Invalid parameter type for '{name}', expected: integer"))
        })
    };
    let (mut at, mut left, path) = (number("val")?, number("size")?, call.text("filename").to_owned());
    let failed = |e: std::io::Error| QmpError::generic(format!("Could not open '{path}': {e}"));
    let mut file = None;
    while left > 0 {
        let n = left.min(1 << 20);
        let bytes = c.machine(move |rt| {
            let mut bytes = vec![0; n as usize];
            rt.machine.memory().read(at, &mut bytes).map(|()| bytes).ok()
        })?;
        let bytes =
            bytes.ok_or_else(|| QmpError::generic(format!("Invalid addr {at:#018x}/size {n} specified")))?;
        // Made only when there is something to write.
        let file = match &mut file {
            Some(file) => file,
            None => file.insert(std::fs::File::create(&path).map_err(failed)?),
        };
        file.write_all(&bytes).map_err(|e| QmpError::generic(format!("'{path}': {e}")))?;
        at += n;
        left -= n;
    }
    done()
}
