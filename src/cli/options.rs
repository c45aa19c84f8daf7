//! The table of options and the lexer of QEMU's single-dash long options.

use clap::{Arg, ArgAction, Command};
use serde::{Deserialize, Serialize};

/// One option as given: name without dashes, and its value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Given {
    pub name: String,
    pub value: Option<String>,
}

impl Given {
    /// The value, or the empty string.
    pub fn value(&self) -> &str {
        self.value.as_deref().unwrap_or_default()
    }
}

/// Errors of the command line as a whole.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    #[error("-{0}: invalid option")]
    Unknown(String),
    #[error("-{0}: requires an argument")]
    NoArgument(String),
}

/// (name, value's placeholder or "", section, help)
pub const OPTIONS: &[(&str, &str, &str, &str)] = &[
    ("help", "", "Standard options", "display this help and exit"),
    ("h", "", "Standard options", "same as -help"),
    ("version", "", "Standard options", "display version information and exit"),
    (
        "machine",
        "[type=]name[,prop=value]",
        "Standard options",
        "select the machine ('-machine help' lists them)",
    ),
    ("M", "name", "Standard options", "same as -machine"),
    (
        "cpu",
        "model[,+feature|,-feature]",
        "Standard options",
        "select the CPU model ('-cpu help' lists them)",
    ),
    (
        "accel",
        "[accel=]name",
        "Standard options",
        "select the accelerator: tcg (ftvm's deterministic processor) or kvm (the host's)",
    ),
    ("enable-kvm", "", "Standard options", "same as -accel kvm"),
    ("smp", "[cpus=]n[,sockets=n,cores=n,threads=n,maxcpus=n]", "Standard options", "number of processors"),
    ("m", "[size=]megs", "Standard options", "guest memory; suffix k, M, G, T (default 128M)"),
    (
        "boot",
        "[order=]drives[,menu=on|off,strict=on|off]",
        "Standard options",
        "boot order: a floppy, c disk, d CD-ROM, n network",
    ),
    ("name", "[guest=]name[,debug-threads=on|off]", "Standard options", "name of the guest"),
    ("uuid", "uuid", "Standard options", "UUID of the machine"),
    ("device", "driver[,prop=value]", "Standard options", "add a device ('-device help' lists them)"),
    ("global", "driver.prop=value", "Standard options", "set a default for a device property"),
    (
        "object",
        "type[,prop=value]",
        "Standard options",
        "create an object: rng-random, rng-builtin, memory-backend-ram, secret, tls-creds-x509, authz-simple",
    ),
    (
        "rtc",
        "[base=utc|localtime|date][,clock=host|vm][,driftfix=none|slew]",
        "Standard options",
        "the real-time clock's base",
    ),
    (
        "icount",
        "[shift=]N|auto[,rr=record|replay,rrfile=file][,sleep=on|off][,align=on|off]",
        "Standard options",
        "virtual time by instruction count; record and replay",
    ),
    ("hda", "file", "Block devices", "disk 0"),
    ("hdb", "file", "Block devices", "disk 1"),
    ("hdc", "file", "Block devices", "disk 2"),
    ("hdd", "file", "Block devices", "disk 3"),
    ("cdrom", "file", "Block devices", "CD-ROM image"),
    (
        "drive",
        "file=f[,if=ide|virtio|none][,format=f][,...]",
        "Block devices",
        "a drive and, unless if=none, its disk",
    ),
    ("blockdev", "driver=d,node-name=n[,...]", "Block devices", "a block node"),
    ("snapshot", "", "Block devices", "write to temporary files instead of the disk images"),
    ("netdev", "user|tap,id=n[,...]", "Network", "a network back end"),
    ("nic", "[tap|user|none][,model=m][,mac=a]", "Network", "a network card with its back end"),
    ("net", "nic|user|tap|none[,...]", "Network", "old form of -netdev and -nic"),
    ("chardev", "stdio|file|socket|null|pty|pipe,id=c[,...]", "Character devices", "a character back end"),
    ("serial", "dev", "Character devices", "where a serial line goes"),
    ("monitor", "dev", "Character devices", "where the human monitor goes"),
    ("qmp", "dev", "Character devices", "where the QMP monitor goes"),
    ("qmp-pretty", "dev", "Character devices", "like -qmp, for people's eyes"),
    (
        "mon",
        "[chardev=]c[,mode=readline|control][,pretty=on|off]",
        "Character devices",
        "a monitor on a chardev",
    ),
    ("debugcon", "dev", "Character devices", "where the debug console (port 0xe9) goes"),
    ("kernel", "file", "Boot images", "a kernel: Linux bzImage, multiboot or PVH ELF"),
    ("initrd", "file", "Boot images", "initial RAM disk, or multiboot modules"),
    ("append", "line", "Boot images", "kernel command line"),
    ("bios", "file", "Boot images", "firmware file (default bios-256k.bin)"),
    ("L", "dir", "Boot images", "directory of firmware files"),
    ("nographic", "", "Display", "no graphics: serial line 0 and monitor on the terminal"),
    ("display", "none|vnc=...", "Display", "kind of display (none, vnc)"),
    ("vnc", "display", "Display", "show the screen to VNC clients"),
    ("vga", "std|virtio|none", "Display", "kind of video card (none)"),
    ("no-reboot", "", "Debug and expert", "exit instead of rebooting"),
    ("no-shutdown", "", "Debug and expert", "stop instead of exiting when the guest powers off"),
    (
        "incoming",
        "tcp:host:port|unix:path|fd:n|exec:command|file:path|defer",
        "Debug and expert",
        "take the machine from a migration ('defer': 'migrate-incoming' says where)",
    ),
    ("loadvm", "name", "Debug and expert", "go on from a snapshot of the machine ('savevm')"),
    ("s", "", "Debug and expert", "wait for gdb on port 1234 (-gdb tcp::1234)"),
    (
        "gdb",
        "dev",
        "Debug and expert",
        "where gdb connects: tcp::port, unix:path,server=on,wait=off, stdio, pty, chardev:id",
    ),
    ("S", "", "Debug and expert", "do not start the processors ('cont' does)"),
    ("daemonize", "", "Debug and expert", "go to the background when the sockets listen"),
    ("pidfile", "file", "Debug and expert", "write the process id to a file"),
    ("D", "file", "Debug and expert", "write the log to a file"),
    ("d", "item[,...]", "Debug and expert", "log more: ft, disk, net, cpu, all"),
    ("nodefaults", "", "Debug and expert", "no default devices"),
    ("no-user-config", "", "Debug and expert", "read no configuration files (ftvm reads none)"),
    ("no-hpet", "", "Debug and expert", "no HPET"),
    (
        "sandbox",
        "on|off[,obsolete=allow|deny][,elevateprivileges=allow|deny|children][,spawn=allow|deny][,resourcecontrol=allow|deny]",
        "Debug and expert",
        "refuse system calls that the program does not need",
    ),
    ("overcommit", "mem-lock=on|off[,cpu-pm=on|off]", "Debug and expert", "keep the program's memory in RAM"),
    ("audiodev", "none,id=a", "Debug and expert", "a sound back end (none: what is played is not heard)"),
    ("msg", "timestamp=on|off", "Debug and expert", "put the time before messages"),
    (
        "ft",
        "primary|backup,peer=HOST[:PORT][,...]",
        "Fault tolerance",
        "run as one of a pair; see ftvm-ft(7)",
    ),
];

/// The clap command: the registry from which help and man page are made.
pub fn command() -> Command {
    let mut command = Command::new("ftvm")
        .version(env!("CARGO_PKG_VERSION"))
        .disable_help_flag(true)
        .disable_version_flag(true)
        .about("A virtual machine monitor that survives the death of its host")
        .arg(Arg::new("image").help("disk image of drive 0").action(ArgAction::Append));
    for (name, value, section, help) in OPTIONS {
        let arg = Arg::new(*name).long(*name).help(*help).help_heading(*section);
        command = command.arg(if value.is_empty() {
            arg.action(ArgAction::Count)
        } else {
            arg.action(ArgAction::Append).value_name(*value).allow_hyphen_values(true)
        });
    }
    command
}

/// Split a command line (without the program's name) into options in the order given. `-x` and
/// `--x` are the same; a lone word is a disk image (`hda`).
pub fn lex(args: &[String]) -> Result<Vec<Given>, OptionError> {
    let command = command();
    let mut out = Vec::new();
    let mut words = args.iter();
    while let Some(word) = words.next() {
        let Some(name) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')).filter(|n| !n.is_empty())
        else {
            out.push(Given { name: "hda".into(), value: Some(word.clone()) });
            continue;
        };
        let arg = command
            .get_arguments()
            .find(|a| a.get_long() == Some(name))
            .ok_or_else(|| OptionError::Unknown(name.to_owned()))?;
        let value = if arg.get_action().takes_values() {
            Some(words.next().ok_or_else(|| OptionError::NoArgument(name.to_owned()))?.clone())
        } else {
            None
        };
        let name = match name {
            "M" => "machine",
            "h" => "help",
            other => other,
        };
        out.push(Given { name: name.to_owned(), value });
    }
    Ok(out)
}

/// The text of `-help`.
pub fn help() -> String {
    let mut text =
        String::from("usage: ftvm [options] [disk_image]\n\n'disk_image' is a disk image for IDE disk 0\n");
    let mut last = "";
    for (name, value, section, help) in OPTIONS {
        if *section != last {
            text.push_str(&format!("\n{section}:\n"));
            last = section;
        }
        let head = if value.is_empty() { format!("-{name}") } else { format!("-{name} {value}") };
        if head.len() > 24 {
            text.push_str(&format!("{head}\n{:24}{help}\n", ""));
        } else {
            text.push_str(&format!("{head:24}{help}\n"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn single_and_double_dashes_and_values_that_look_like_options() {
        let got = lex(&words("-m 2G --append -foo disk.img -S")).unwrap();
        let pairs: Vec<_> = got.iter().map(|g| (g.name.as_str(), g.value())).collect();
        assert_eq!(pairs, [("m", "2G"), ("append", "-foo"), ("hda", "disk.img"), ("S", "")]);
    }

    #[test]
    fn wrong_options_are_named() {
        assert_eq!(lex(&words("-bogus")).unwrap_err().to_string(), "-bogus: invalid option");
        assert_eq!(lex(&words("-m")).unwrap_err().to_string(), "-m: requires an argument");
    }

    #[test]
    fn clap_accepts_the_table() {
        command().debug_assert();
    }
}
