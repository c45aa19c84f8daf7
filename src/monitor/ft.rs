//! Commands about the pair, in vSphere's words.

use ftvm_qmp::{Call, QmpError};

use super::{done, Control, Reply};
use crate::runtime::control::FtWish;

pub fn query(c: &Control, _: &mut Call) -> Reply {
    serde_json::to_value(c.shared.ft()).map_err(|e| QmpError::generic(e.to_string()))
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

pub fn suspend(c: &Control, _: &mut Call) -> Reply {
    wish(c, FtWish::Suspend, &["unprotected", "synchronizing", "protected"])
}

pub fn resume(c: &Control, _: &mut Call) -> Reply {
    wish(c, FtWish::Resume, &["unprotected"])
}

pub fn test_failover(c: &Control, _: &mut Call) -> Reply {
    wish(c, FtWish::TestFailover, &["protected"])
}

pub fn test_restart(c: &Control, _: &mut Call) -> Reply {
    wish(c, FtWish::RestartBackup, &["synchronizing", "protected"])
}
