//! An ftvm process.

use std::fs::File;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::qmp::Qmp;
use crate::{wait_for, Result, Scratch};

/// A running ftvm; killed when dropped.
pub struct Vm {
    child: Child,
    /// Where its messages go.
    pub messages: String,
    /// Its serial line's output.
    pub console: String,
    /// Its QMP socket.
    pub socket: String,
}

impl Vm {
    /// Start `command` (ftvm, perhaps on a host) with `args`; adds QMP and a serial line to a file.
    pub fn start(mut command: Command, scratch: &Scratch, name: &str, args: &[&str]) -> Result<Vm> {
        let (messages, console, socket) = (
            scratch.path(&format!("{name}.log")),
            scratch.path(&format!("{name}.console")),
            scratch.path(&format!("{name}.qmp")),
        );
        let log = File::create(&messages).map_err(|e| format!("{messages}: {e}"))?;
        let child = command
            .args(args)
            .args([
                "-display",
                "none",
                "-serial",
                &format!("file:{console}"),
                "-qmp",
                &format!("unix:{socket},server=on,wait=off"),
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|e| format!("ftvm: {e}"))?;
        Ok(Vm { child, messages, console, socket })
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Send a signal.
    pub fn signal(&self, signal: Signal) {
        let _ = kill(Pid::from_raw(self.pid()), signal);
    }

    /// SIGKILL, and wait until the process is gone.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        let _ = self.child.wait();
    }

    /// Connect to its QMP.
    pub fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.socket).map_err(|e| format!("{e}\n{}", self.log()))
    }

    /// Its messages so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.messages).unwrap_or_default()
    }

    /// The console's text so far.
    pub fn text(&self) -> String {
        std::fs::read(&self.console).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
    }

    /// Wait until the console shows `mark`.
    pub fn wait_console(&mut self, mark: &str, limit: Duration) -> Result<()> {
        let mut gone = false;
        let result = wait_for(&format!("'{mark}' on the console"), limit, || {
            gone = !self.is_running();
            (self.text().contains(mark) || gone).then_some(())
        });
        if self.text().contains(mark) {
            return Ok(());
        }
        let text = self.text();
        let tail: String = text.chars().skip(text.chars().count().saturating_sub(600)).collect();
        Err(format!(
            "{}{}\n{tail}\n{}",
            result.err().unwrap_or_default(),
            if gone { "the program ended" } else { "" },
            self.log()
        ))
    }

    /// Whether the process runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Wait for the end; the exit status.
    pub fn wait_exit(&mut self, limit: Duration) -> Result<i32> {
        let status = wait_for("the end of the program", limit, || self.child.try_wait().ok().flatten())?;
        Ok(status.code().unwrap_or(-1))
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.kill();
    }
}
