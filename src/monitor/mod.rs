//! The monitors: QMP commands and the human monitor's. A command that needs the machine runs on the machine thread
//! (see [`Control::machine`]); everything else runs on the monitor's own thread.

mod backup;
mod bitmaps;
mod block;
mod chars;
mod commit;
mod cpu;
pub mod devices;
mod display;
pub mod dump;
mod exports;
mod fdsets;
mod ft;
mod gdb;
mod graph;
mod hmp;
mod input;
mod jobs;
mod limits;
mod machine;
mod migrate;
mod net;
mod options;
pub mod page;
mod pci;
mod qom;
mod reopen;
mod snapshot_jobs;
mod snapshots;
mod transaction;
mod types;
mod vnc;

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use ftvm_qmp::{Call, Handler, QmpError};
use serde_json::{json, Value};

pub use chars::CharView;

use crate::cli::MachineConfig;
use crate::host::Outside;
use crate::runtime::control::Shared;
use crate::runtime::live::Runtime;
use crate::runtime::{Event, Events};

/// What a command returns.
pub type Reply = Result<Value, QmpError>;

/// Executes monitor commands.
pub struct Control {
    pub shared: Arc<Shared>,
    pub events: Events,
    /// The machine as it was started.
    pub config: MachineConfig,
    pub outside: Arc<Outside>,
    /// The character devices, the monitors' own among them.
    pub chars: Mutex<Vec<CharView>>,
    /// Those of them that have several front ends, by their labels.
    pub muxes: Mutex<std::collections::BTreeMap<String, Arc<crate::host::mux::Mux>>>,
    pub fdsets: fdsets::FdSets,
    /// The stub for GDB, if there is one.
    pub gdb: Mutex<Option<crate::gdb::Server>>,
    /// The VNC server, if there is one.
    pub vnc: OnceLock<Arc<crate::host::vnc::Vnc>>,
    /// The machine thread's id.
    pub machine_thread: i32,
    /// Itself, for servers that outlive a command.
    pub this: Weak<Control>,
}

type Command = fn(&Control, &mut Call) -> Reply;

/// Every command of the schema but those that the protocol itself answers.
const COMMANDS: &[(&str, Command)] = &[
    ("query-version", |_, _| Ok(version())),
    ("query-command-line-options", options::query),
    ("add-fd", fdsets::add),
    ("remove-fd", fdsets::remove),
    ("query-fdsets", fdsets::query),
    ("human-monitor-command", |c, call| Ok(json!(c.command_line(call)))),
    ("quit", machine::quit),
    ("query-status", machine::status),
    ("query-name", machine::name),
    ("query-uuid", machine::uuid),
    ("query-kvm", machine::kvm),
    ("query-target", |_, _| Ok(json!({"arch": "x86_64"}))),
    ("stop", machine::stop),
    ("cont", machine::cont),
    ("system_reset", machine::reset),
    ("system_powerdown", machine::powerdown),
    ("inject-nmi", machine::nmi),
    ("set-action", machine::set_action),
    ("send-key", input::send_key),
    ("input-send-event", input::send_event),
    ("screendump", display::screendump),
    ("query-vnc", vnc::query),
    ("change-vnc-password", vnc::change_password),
    ("set_password", vnc::set_password),
    ("query-machines", machine::machines),
    ("query-current-machine", |_, _| Ok(json!({"wakeup-suspend-support": false}))),
    ("query-cpu-definitions", cpu::definitions),
    ("query-cpu-model-expansion", cpu::expansion),
    ("query-hotpluggable-cpus", cpu::hotpluggable),
    ("query-cpus-fast", cpu::fast),
    ("query-memory-size-summary", machine::memory_size),
    ("query-memory-devices", |_, _| Ok(json!([]))),
    ("query-memdev", machine::memdev),
    ("query-replay", machine::replay),
    ("replay-break", machine::replay_break),
    ("replay-delete-break", machine::replay_delete_break),
    ("replay-seek", machine::replay_seek),
    ("pmemsave", machine::pmemsave),
    ("dump-guest-memory", dump::dump),
    ("query-dump", dump::query),
    ("query-dump-guest-memory-capability", dump::capability),
    ("qom-list-types", types::list),
    ("qom-list", qom::list),
    ("qom-get", qom::get),
    ("qom-set", qom::set),
    ("qom-list-properties", types::qom_properties),
    ("device-list-properties", types::device_properties),
    ("object-add", devices::object_add),
    ("object-del", devices::object_del),
    ("device_add", devices::add),
    ("device_del", devices::del),
    ("query-pci", pci::query),
    ("query-iothreads", |_, _| Ok(json!([]))),
    ("query-tpm", |_, _| Ok(json!([]))),
    ("query-tpm-models", |_, _| Ok(json!([]))),
    ("query-tpm-types", |_, _| Ok(json!([]))),
    ("query-balloon", devices::query_balloon),
    ("balloon", devices::balloon),
    ("query-named-block-nodes", block::nodes),
    ("query-block", block::devices),
    ("query-blockstats", block::stats),
    ("query-jobs", jobs::query),
    ("query-block-jobs", jobs::query_block),
    ("job-pause", jobs::pause),
    ("job-resume", jobs::resume),
    ("job-cancel", jobs::cancel),
    ("job-complete", jobs::complete),
    ("job-dismiss", jobs::dismiss),
    ("job-finalize", jobs::finalize),
    ("block-job-set-speed", jobs::set_speed),
    ("block-job-cancel", jobs::block_cancel),
    ("block-job-pause", jobs::pause),
    ("block-job-resume", jobs::resume),
    ("block-job-complete", jobs::complete),
    ("block-job-dismiss", jobs::dismiss),
    ("block-job-finalize", jobs::finalize),
    ("block-commit", jobs::commit),
    ("block-stream", jobs::stream),
    ("blockdev-mirror", jobs::mirror),
    ("drive-mirror", jobs::drive_mirror),
    ("blockdev-backup", backup::backup),
    ("drive-backup", backup::drive_backup),
    ("blockdev-create", jobs::create),
    ("blockdev-snapshot", transaction::snapshot),
    ("blockdev-snapshot-sync", transaction::snapshot_sync),
    ("transaction", transaction::transaction),
    ("change-backing-file", graph::change_backing_file),
    ("block-dirty-bitmap-add", bitmaps::add),
    ("block-dirty-bitmap-remove", bitmaps::remove),
    ("block-dirty-bitmap-clear", bitmaps::clear),
    ("block-dirty-bitmap-enable", bitmaps::enable),
    ("block-dirty-bitmap-disable", bitmaps::disable),
    ("block-dirty-bitmap-merge", bitmaps::merge),
    ("x-debug-block-dirty-bitmap-sha256", bitmaps::sha256),
    ("nbd-server-start", exports::start),
    ("nbd-server-add", exports::server_add),
    ("nbd-server-remove", exports::server_remove),
    ("nbd-server-stop", exports::stop),
    ("block-export-add", exports::add),
    ("block-export-del", exports::del),
    ("query-block-exports", exports::query),
    ("block_set_io_throttle", block::set_io_throttle),
    ("blockdev-add", block::add),
    ("blockdev-del", block::del),
    ("blockdev-reopen", reopen::reopen),
    ("block_resize", snapshots::resize),
    ("eject", block::eject),
    ("blockdev-snapshot-internal-sync", snapshots::create),
    ("blockdev-snapshot-delete-internal-sync", snapshots::delete),
    ("snapshot-save", snapshot_jobs::save),
    ("snapshot-load", snapshot_jobs::load),
    ("snapshot-delete", snapshot_jobs::delete),
    ("blockdev-open-tray", block::open_tray),
    ("blockdev-close-tray", block::close_tray),
    ("blockdev-insert-medium", block::insert_medium),
    ("blockdev-remove-medium", block::remove_medium),
    ("blockdev-change-medium", block::change_medium),
    ("netdev_add", net::add),
    ("netdev_del", net::del),
    ("set_link", net::set_link),
    ("query-chardev", chars::query),
    ("query-chardev-backends", chars::backends),
    ("migrate", migrate::migrate),
    ("migrate_cancel", migrate::cancel),
    ("migrate-continue", migrate::go_on),
    ("migrate-incoming", migrate::incoming),
    ("migrate-start-postcopy", migrate::start_postcopy),
    ("migrate-pause", migrate::pause),
    ("migrate-recover", migrate::recover),
    ("migrate-set-capabilities", migrate::set_capabilities),
    ("query-migrate-capabilities", migrate::capabilities),
    ("migrate-set-parameters", migrate::set_parameters),
    ("query-migrate-parameters", migrate::parameters),
    ("query-migrate", migrate::query),
    ("announce-self", migrate::announce),
    ("query-ft", ft::query),
    ("ft-turn-on", ft::turn_on),
    ("ft-turn-off", ft::turn_off),
    ("ft-suspend", ft::suspend),
    ("ft-resume", ft::resume),
    ("ft-test-failover", ft::test_failover),
    ("ft-test-restart", ft::test_restart),
    ("ft-migrate-backup", ft::migrate_backup),
];

/// The version of the interface, and of the program.
fn version() -> Value {
    let number = |text: &str| text.parse::<u64>().unwrap_or(0);
    json!({
        "qemu": {"major": 7, "minor": 2, "micro": 0},
        "package": format!("ftvm-{}", env!("CARGO_PKG_VERSION")),
        "ftvm": {
            "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": number(env!("CARGO_PKG_VERSION_PATCH")),
        },
    })
}

/// Nothing to say but that it is done.
fn done() -> Reply {
    Ok(json!({}))
}

impl Control {
    /// Monitors of a machine type without a machine (for tests: what needs one is an error).
    pub fn bare(machine: &str) -> std::io::Result<Control> {
        let (events, _) = crate::runtime::mailbox()?;
        let given = [crate::cli::options::Given { name: "machine".into(), value: Some(machine.to_owned()) }];
        let config = crate::cli::Config::from_given(&given).map(|c| c.machine).unwrap_or_default();
        Ok(Control {
            shared: Shared::new(),
            events,
            config,
            outside: Arc::default(),
            chars: Mutex::default(),
            muxes: Mutex::default(),
            fdsets: Default::default(),
            gdb: Mutex::default(),
            vnc: OnceLock::new(),
            machine_thread: 0,
            this: Weak::new(),
        })
    }

    /// Do something on the machine thread and wait for it.
    pub fn machine<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Runtime) -> T + Send + 'static,
    ) -> Result<T, QmpError> {
        let ended = || QmpError::generic("there is no machine, or it has ended");
        let (sender, receiver) = channel();
        let call = Box::new(move |rt: &mut Runtime| {
            let _ = sender.send(work(rt));
        });
        self.events.send(Event::Call(call)).map_err(|_| ended())?;
        receiver.recv().map_err(|_| ended())
    }

    /// Change the machine: as [`Self::control`], but not what a recording says.
    pub fn change<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Runtime) -> Result<T, QmpError> + Send + 'static,
    ) -> Result<T, QmpError> {
        self.control(move |rt| {
            if rt.replay.is_some() {
                return Err(QmpError::generic(
                    "this machine does again what was recorded: nothing else can happen to it",
                ));
            }
            work(rt)
        })
    }

    /// Stop the machine or let it run, and the like: as [`Self::machine`], but not on a backup, which does as its primary does.
    pub fn control<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Runtime) -> Result<T, QmpError> + Send + 'static,
    ) -> Result<T, QmpError> {
        self.machine(move |rt| {
            if rt.is_following() {
                return Err(QmpError::generic("this is a backup: give the command to the primary"));
            }
            work(rt)
        })?
    }
}

impl Handler for Control {
    fn execute(&self, call: &mut Call) -> Reply {
        match COMMANDS.iter().find(|(name, _)| *name == call.command) {
            Some((_, command)) => command(self, call),
            None => Err(QmpError::command_not_found(call.command)),
        }
    }

    fn version(&self) -> Value {
        version()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_of_the_schema_is_there_once() {
        const PROTOCOL: [&str; 5] =
            ["qmp_capabilities", "query-commands", "query-qmp-schema", "getfd", "closefd"];
        let mut ours: Vec<&str> = COMMANDS.iter().map(|(n, _)| *n).chain(PROTOCOL).collect();
        let mut schema: Vec<&str> =
            ftvm_qmp::Schema::get().commands.iter().map(|c| c.name.as_str()).collect();
        ours.sort_unstable();
        schema.sort_unstable();
        assert_eq!(ours, schema);
    }
}
