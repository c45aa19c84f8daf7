//! The command line of the service.

fn main() {
    std::process::exit(ftvm_daemon::ctl::main(&ftvm_daemon::ctl::command().get_matches()));
}
