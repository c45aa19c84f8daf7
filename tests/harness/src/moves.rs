//! A machine that moves between the hosts of a [`Pair`].

use std::time::Duration;

use serde_json::{json, Value};

use crate::hosts::Network;
use crate::pair::Pair;
use crate::qmp::Qmp;
use crate::Result;

/// Where a destination waits.
const PORT: u16 = 4444;
const LIMIT: Duration = Duration::from_secs(120);

/// Wait until the migration that this side sends has ended; its `query-migrate`.
pub fn wait_migration(qmp: &mut Qmp, limit: Duration) -> Result<Value> {
    let mut last = Value::Null;
    let ended = crate::wait_for("the end of the migration", limit, || {
        match qmp.command("query-migrate", Value::Null) {
            Ok(q) => last = q,
            Err(e) => return Some(Err(e)),
        }
        let status = last["status"].as_str().unwrap_or_default();
        ["completed", "failed", "cancelled"].contains(&status).then_some(Ok(()))
    });
    match ended {
        Ok(Ok(())) => Ok(last),
        Ok(Err(e)) | Err(e) => Err(format!("{e}; last: {last}")),
    }
}

impl Pair {
    /// Start a machine on the other host that waits to be filled, with `more` arguments.
    pub fn destination(&mut self, more: &[&str]) -> Result<()> {
        let other = self.other();
        let mut args = self.args.clone();
        let uri = format!("tcp:{}:{PORT}", Network::address(self.place[other]));
        args.extend(["-incoming", &uri].iter().chain(more).map(|s| (*s).to_owned()));
        let words: Vec<&str> = args.iter().map(String::as_str).collect();
        let vm = self.spawn(other, &words)?;
        let mut qmp = vm.qmp()?;
        self.hosts[other] = Some(vm);
        crate::wait_for("the destination", LIMIT, || {
            (qmp.command("query-migrate", Value::Null).ok()?["status"] == "setup").then_some(())
        })
    }

    /// Where the other host's destination is.
    pub fn destination_uri(&self) -> String {
        format!("tcp:{}:{PORT}", Network::address(self.place[self.other()]))
    }

    /// Begin to send the machine to the destination.
    pub fn begin_move(&mut self) -> Result<Qmp> {
        let uri = self.destination_uri();
        let mut qmp = self.qmp()?;
        qmp.command("migrate", json!({"uri": uri}))?;
        Ok(qmp)
    }

    /// Move the machine to the other host while it runs; the source ends. Its `query-migrate`.
    pub fn move_machine(&mut self) -> Result<Value> {
        self.destination(&[])?;
        let mut qmp = self.begin_move()?;
        let done = wait_migration(&mut qmp, LIMIT).map_err(|e| format!("{e}\n{}", self.logs()))?;
        if done["status"] != "completed" {
            return Err(format!("the migration ended with {done}\n{}", self.logs()));
        }
        // A socket serves one client at a time.
        drop(qmp);
        self.arrive()?;
        Ok(done)
    }

    /// The machine runs on the other host now; the source ends.
    pub fn arrive(&mut self) -> Result<()> {
        let (old, new) = (self.live, self.other());
        let mut there = self.hosts[new].as_ref().ok_or("there is no destination")?.qmp()?;
        crate::wait_for("the machine on its new host", LIMIT, || {
            (there.command("query-status", Value::Null).ok()?["status"] == "running").then_some(())
        })
        .map_err(|e| format!("{e}\n{}", self.logs()))?;
        self.qmp()?.command("quit", Value::Null)?;
        let mut vm = self.hosts[old].take().ok_or("the source is gone")?;
        match vm.wait_exit(LIMIT)? {
            0 => {}
            status => return Err(format!("the source ended with {status}\n{}", vm.log())),
        }
        self.live = new;
        Ok(())
    }

    /// The destination has refused the machine and ended; what it said. The source goes on.
    pub fn expect_refusal(&mut self) -> Result<String> {
        let other = self.other();
        let mut vm = self.hosts[other].take().ok_or("there is no destination")?;
        if vm.wait_exit(LIMIT)? == 0 {
            return Err(format!("the destination ended as if all were well\n{}", vm.log()));
        }
        let mut qmp = self.qmp()?;
        let running = crate::wait_for("the source's going on", LIMIT, || {
            (qmp.command("query-status", Value::Null).ok()?["status"] == "running").then_some(())
        });
        running.map_err(|e| format!("{e}\n{}", self.logs()))?;
        Ok(vm.log())
    }
}
