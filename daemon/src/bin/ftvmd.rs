//! The service of this host's machines on D-Bus.

use std::path::PathBuf;

use ftvm_daemon::access::Bus;
use ftvm_daemon::machine::Dirs;

fn main() {
    let default_log = env_logger::Env::default().default_filter_or("info");
    env_logger::Builder::from_env(default_log).format_timestamp(None).init();
    let matches = ftvm_daemon::service::command().get_matches();
    let path = |name: &str| PathBuf::from(matches.get_one::<String>(name).map_or("", String::as_str));
    let absolute = |name: &str| std::path::absolute(path(name)).unwrap_or_else(|_| path(name));
    let dirs = Dirs { config: absolute("config-dir"), run: absolute("run-dir"), ftvm: path("ftvm") };
    let bus = if matches.get_flag("session") { Bus::Session } else { Bus::System };
    if let Err(e) = ftvm_daemon::service::run(dirs, bus) {
        eprintln!("ftvmd: {e}");
        std::process::exit(1);
    }
}
