//! Which accelerator a machine gets: the first of those asked for that can be had, as QEMU chooses.

use std::io::Error;

use crate::cli::config::Accel;
use crate::cli::Config;

/// Choose, saying on standard error what cannot be had and why.
pub fn choose(config: &Config) -> Result<Accel, String> {
    let mut failed = false;
    for wish in &config.host.accels {
        let place = if wish.option.is_empty() { String::new() } else { format!("{}: ", wish.option) };
        let chosen = match wish.name.as_str() {
            "tcg" => Ok(Accel::Tcg),
            "kvm" => kvm(config).map(|()| Accel::Kvm).map_err(|e| format!("failed to initialize kvm: {e}")),
            other => Err(format!("invalid accelerator {other}")),
        };
        match chosen {
            Ok(accel) => {
                if failed {
                    eprintln!("ftvm: falling back to {}", accel.name());
                }
                return Ok(accel);
            }
            Err(reason) => {
                eprintln!("ftvm: {place}{reason}");
                failed = true;
            }
        }
    }
    match failed {
        true => Err(String::new()),
        false => Ok(Accel::Tcg),
    }
}

/// Whether a machine of this configuration can run on KVM here.
fn kvm(config: &Config) -> Result<(), String> {
    if config.host.ft.is_some() {
        return Err("fault tolerance (-ft) needs the deterministic processor: hardware cannot be stopped at an \
                    exact instruction, so a backup could not follow. Use -accel tcg; or start without -ft and \
                    protect the machine while it runs (ft-turn-on moves it to tcg)"
            .into());
    }
    let icount = &config.machine.icount;
    if icount.record.is_some() || icount.replay.is_some() {
        return Err(
            "recording and replaying (-icount rr=) need the deterministic processor; use -accel tcg".into()
        );
    }
    if icount.shift.is_some() || !icount.sleep {
        return Err("-icount is not allowed with hardware virtualization; use -accel tcg".into());
    }
    match ftvm_accel::kvm::open() {
        Ok(_) => Ok(()),
        Err(e) => {
            let Some(cause) = e.open_error() else { return Err(e.to_string()) };
            eprintln!("Could not access KVM kernel module: {}", words(cause));
            Err(words(cause))
        }
    }
}

/// The error in the C library's words alone.
fn words(e: &Error) -> String {
    e.raw_os_error().map_or_else(|| e.to_string(), |n| nix::errno::Errno::from_raw(n).desc().to_owned())
}
