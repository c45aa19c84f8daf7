//! The service of this host's machines on D-Bus.

use std::path::PathBuf;

use ftvm_daemon::access::Bus;
use ftvm_daemon::config::Settings;
use ftvm_daemon::machine::Dirs;

fn main() {
    let default_log = env_logger::Env::default().default_filter_or("info");
    env_logger::Builder::from_env(default_log).format_timestamp(None).init();
    let matches = ftvm_daemon::service::command().get_matches();
    let path = |name: &str| PathBuf::from(matches.get_one::<String>(name).map_or("", String::as_str));
    let absolute = |name: &str| std::path::absolute(path(name)).unwrap_or_else(|_| path(name));
    let run = absolute("run-dir");
    let registry = run.join("machines");
    let dirs = Dirs { config: absolute("config-dir"), run, ftvm: path("ftvm"), registry };
    let bus = if matches.get_flag("session") { Bus::Session } else { Bus::System };
    let settings = Settings::read(&path("config")).map_err(|e| e.to_string());
    let state = absolute("state-dir");
    let result = settings.and_then(|settings| ftvm_daemon::service::run(dirs, settings, &state, bus));
    if let Err(e) = result {
        eprintln!("ftvmd: {e}");
        std::process::exit(1);
    }
}
