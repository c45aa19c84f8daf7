//! Commands about the pair, in vSphere's words.

use ftvm_qmp::{Call, QmpError};

use super::{done, Control, Reply};
use crate::cli::config::Accel;
use crate::cli::ft::FtConfig;
use crate::migration::postcopy::MISSING;
use crate::runtime::control::{FtStatus, FtWish};
use crate::runtime::live::Sink;

/// The state of the pair; of a machine that is recorded, where it is and how long the recording's log is.
pub fn status(c: &Control) -> Result<FtStatus, QmpError> {
    let mut ft = c.shared.ft();
    if c.config.icount.record.is_some() {
        (ft.position, ft.log_bytes) = c.machine(|rt| {
            let bytes = if let Sink::File(recorder) = &rt.sink { recorder.bytes() } else { 0 };
            (rt.machine.stamp().position, bytes)
        })?;
    }
    Ok(ft)
}

pub fn query(c: &Control, _: &mut Call) -> Reply {
    serde_json::to_value(status(c)?).map_err(|e| QmpError::generic(e.to_string()))
}

/// A wish that makes sense for a primary in these states.
fn wish(c: &Control, wish: FtWish, states: &'static [&'static str]) -> Reply {
    c.machine(move |rt| {
        let ft = rt.shared.ft();
        if ft.role != "primary" {
            return Err(QmpError::generic(format!(
                "this side is no primary (role {}, {})",
                ft.role, ft.state
            )));
        }
        // A machine that has just gone live is without a backup.
        let state = if ft.state == "live" { "unprotected" } else { ft.state };
        if !states.contains(&state) {
            return Err(QmpError::generic(format!(
                "the machine is {}, not {}",
                ft.state,
                states.join(" or ")
            )));
        }
        crate::runtime::ft::wish(rt, wish);
        done()
    })?
}

/// Make a running machine a primary: its writes become durable, and it waits for a backup.
pub fn turn_on(c: &Control, call: &mut Call) -> Reply {
    let mut option = "primary".to_owned();
    for name in ["listen", "lock"] {
        if let Some(value) = call.arguments.get(name).and_then(serde_json::Value::as_str) {
            option.push_str(&format!(",{name}={}", value.replace(',', ",,")));
        }
    }
    for name in ["heartbeat", "timeout", "max-lag"] {
        if let Some(value) = call.int(name) {
            option.push_str(&format!(",{name}={value}"));
        }
    }
    let config = FtConfig::parse(&option).map_err(|e| QmpError::generic(e.to_string()))?;
    c.change(move |rt| {
        if rt.ft.is_some() {
            return Err(QmpError::generic("fault tolerance is on"));
        }
        if rt.shared.jobs.is_busy() {
            return Err(QmpError::generic("a block job runs: it must end before"));
        }
        if rt.shared.migration.arriving().is_some() {
            return Err(QmpError::generic(MISSING));
        }
        if rt.outgoing.is_some() {
            return Err(QmpError::generic("There's a migration process in progress"));
        }
        if rt.shared.backends().moved {
            return Err(QmpError::generic(
                "the machine has other images than it was started with (external snapshots or block jobs): start it on \
                 them with -ft primary",
            ));
        }
        if !matches!(rt.sink, Sink::None) {
            return Err(QmpError::generic("a machine that is recorded cannot be protected"));
        }
        let turn_on = rt.turn_on.as_ref();
        let turn_on =
            turn_on.ok_or_else(|| QmpError::generic("this machine was started as one of a pair"))?;
        let turn_on = turn_on.clone();
        // What runs on hardware cannot be followed.
        let was = rt.shared.accel();
        rt.change_processors(Accel::Tcg).map_err(QmpError::generic)?;
        let side = match turn_on(config) {
            Ok(side) => side,
            Err(e) => {
                if let Err(e) = rt.change_processors(was) {
                    log::warn!("the machine stays on tcg: {e}");
                }
                return Err(QmpError::generic(e));
            }
        };
        rt.outside.set_durable(|_| true).map_err(|e| QmpError::generic(e.to_string()))?;
        rt.ft = Some(side);
        done()
    })
}

pub fn turn_off(c: &Control, _: &mut Call) -> Reply {
    wish(c, FtWish::TurnOff, &["unprotected", "synchronizing", "protected"])
}

pub fn suspend(c: &Control, _: &mut Call) -> Reply {
    wish(c, FtWish::Suspend, &["unprotected", "synchronizing", "protected"])
}

pub fn resume(c: &Control, _: &mut Call) -> Reply {
    wish(c, FtWish::Resume, &["unprotected"])
}

pub fn test_failover(c: &Control, _: &mut Call) -> Reply {
    wish(c, FtWish::TestFailover, &["protected"])
}

pub fn migrate_backup(c: &Control, _: &mut Call) -> Reply {
    wish(c, FtWish::MigrateBackup, &["synchronizing", "protected"])
}

pub fn test_restart(c: &Control, _: &mut Call) -> Reply {
    wish(c, FtWish::RestartBackup, &["synchronizing", "protected"])
}
