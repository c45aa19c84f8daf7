//! The command line: QEMU's grammar and the configuration that comes out of it.

pub mod completion;
pub mod config;
pub mod drive;
pub mod ft;
pub mod keys;
pub mod keyval;
pub mod man;
pub mod net;
pub mod object;
pub mod options;
pub mod secret;
pub mod vnc;

pub use config::{Char, Config, HostConfig, MachineConfig};

/// Errors of the command line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CliError {
    #[error(transparent)]
    Option(#[from] options::OptionError),
    /// Option, value, what is wrong.
    #[error("-{0} {1}: {2}")]
    Value(String, String, String),
    #[error("{0}")]
    Plain(String),
}

/// What the command line asks for.
pub enum Request {
    /// Print this and exit with success.
    Print(String),
    Run(Box<Config>),
}

/// Parse a command line (without the program's name).
pub fn parse(args: &[String]) -> Result<Request, CliError> {
    let given = options::lex(args)?;
    for g in &given {
        let text = match (g.name.as_str(), g.value()) {
            ("help", _) => options::help(),
            ("version", _) => format!("ftvm version {}\n", env!("CARGO_PKG_VERSION")),
            ("machine", "help" | "?") | ("machine", "type=help") => {
                let mut out = String::from("Supported machines are:\n");
                for m in config::MACHINES {
                    if let Some(alias) = m.alias {
                        out.push_str(&format!("{alias:20} {} (alias of {})\n", m.description, m.name));
                    }
                    let default = if m.is_default { " (default)" } else { "" };
                    out.push_str(&format!("{:20} {}{default}\n", m.name, m.description));
                }
                out
            }
            ("accel", "help" | "?") => "Accelerators supported in ftvm:\ntcg\nkvm\n".to_owned(),
            _ => continue,
        };
        return Ok(Request::Print(text));
    }
    Ok(Request::Run(Box::new(Config::from_given(&given)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> Result<Config, CliError> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        match parse(&words)? {
            Request::Run(c) => Ok(*c),
            Request::Print(_) => panic!("printed"),
        }
    }

    #[test]
    fn the_readme_line() {
        let c = run("-m 2G -drive file=vm.qcow2 -ft primary").unwrap();
        assert_eq!(c.machine.memory, 2 << 30);
        assert_eq!(c.machine.drives[0].id, "ide0-hd0");
        assert_eq!(c.machine.nics[0].model, "e1000");
        assert!(c.host.ft.is_some());
    }

    #[test]
    fn errors_name_the_option_and_the_cause() {
        for (line, part) in [
            ("-bogus", "-bogus: invalid option"),
            ("-drive file=a,bogus=1", "-drive file=a,bogus=1: Invalid parameter 'bogus'"),
            ("-machine nope", "unsupported machine type 'nope'"),
            ("-m lots", "Parameter 'size' expects"),
            ("-smp 0", "Invalid SMP CPUs 0"),
            ("-M pc,accel=kvm -accel tcg", "incompatible"),
            ("-vga nope", "unknown vga type: nope"),
            ("-vga cirrus", "not available"),
            ("-netdev wire,id=a", "does not accept value 'wire'"),
            ("-uuid x", "invalid UUID"),
            ("-append x", "-append only allowed with -kernel"),
            ("-drive file=a -drive file=b,index=0", "exists"),
            ("-serial bogus:1", "not a valid char driver"),
            ("-serial mon:chardev:x", "not a valid char driver"),
            ("-icount 99", "shift"),
        ] {
            let e = run(line).unwrap_err().to_string();
            assert!(e.contains(part), "{line}: {e}");
        }
    }

    #[test]
    fn blockdev_nodes_stack() {
        let c = run(r#"-blockdev {"driver":"file","filename":"x","node-name":"s"} -blockdev {"node-name":"f","driver":"qcow2","file":"s","backing":null} -device virtio-blk-pci,drive=f"#).unwrap();
        assert_eq!(c.machine.drives.len(), 1);
        assert_eq!(c.machine.drives[0].format.as_deref(), Some("qcow2"));
        assert_eq!(c.machine.drives[0].file.as_deref(), Some("x"));
    }

    #[test]
    fn nographic_gives_the_serial_line_the_terminal() {
        let c = run("-nographic").unwrap();
        assert_eq!(c.machine.serials, [Some(Char::Mux(Box::new(Char::Stdio { signal: false })))]);
    }
}
