//! The service of this host's machines on D-Bus.

use std::path::PathBuf;

use clap::{Arg, ArgAction, Command};
use ftvm_daemon::access::Bus;
use ftvm_daemon::machine::Dirs;

fn main() {
    let default_log = env_logger::Env::default().default_filter_or("info");
    env_logger::Builder::from_env(default_log).format_timestamp(None).init();
    let option = |name: &'static str, value: &'static str, default: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name(value).default_value(default).help(help)
    };
    let matches = Command::new("ftvmd")
        .version(env!("CARGO_PKG_VERSION"))
        .about("The D-Bus service of the ftvm machines of this host")
        .arg(
            Arg::new("session")
                .long("session")
                .action(ArgAction::SetTrue)
                .help("Serve on the session bus instead of the system bus"),
        )
        .arg(option("config-dir", "DIR", "/etc/ftvm/machines", "Where the definitions are"))
        .arg(option("run-dir", "DIR", "/run/ftvm", "Where sockets, pidfiles and logs go"))
        .arg(option("ftvm", "PROGRAM", "ftvm", "The program that runs a machine"))
        .get_matches();
    let path = |name: &str| PathBuf::from(matches.get_one::<String>(name).map_or("", String::as_str));
    let absolute = |name: &str| std::path::absolute(path(name)).unwrap_or_else(|_| path(name));
    let dirs = Dirs { config: absolute("config-dir"), run: absolute("run-dir"), ftvm: path("ftvm") };
    let bus = if matches.get_flag("session") { Bus::Session } else { Bus::System };
    if let Err(e) = ftvm_daemon::service::run(dirs, bus) {
        eprintln!("ftvmd: {e}");
        std::process::exit(1);
    }
}
