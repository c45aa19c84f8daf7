//! The completion of bash, made from the option table. `cargo run --example generate` writes it.

use ftvm_devices::registry::MODELS;

use super::config::MACHINES;
use super::options::OPTIONS;

/// Options whose value is a file.
const FILES: &[&str] =
    &["hda", "hdb", "hdc", "hdd", "cdrom", "kernel", "initrd", "bios", "L", "pidfile", "D"];

/// `packaging/ftvm.bash`.
pub fn bash() -> String {
    let names: Vec<String> = OPTIONS.iter().map(|(name, ..)| format!("-{name}")).collect();
    let with_value: Vec<String> =
        OPTIONS.iter().filter(|(_, value, ..)| !value.is_empty()).map(|(n, ..)| format!("-{n}")).collect();
    let machines: Vec<&str> = MACHINES.iter().flat_map(|m| m.alias.into_iter().chain([m.name])).collect();
    let devices: Vec<&str> = MODELS.iter().map(|m| m.name).collect();
    let files: Vec<String> = FILES.iter().map(|n| format!("-{n}")).collect();
    format!(
        "# bash completion of ftvm; made by \"cargo run --example generate\": do not edit.\n\
         _ftvm() {{\n\
         \x20   local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD - 1]}}\n\
         \x20   case $prev in\n\
         \x20       -machine | -M) COMPREPLY=($(compgen -W '{} help' -- \"$cur\")) ;;\n\
         \x20       -device) COMPREPLY=($(compgen -W '{} help' -- \"$cur\")) ;;\n\
         \x20       -accel) COMPREPLY=($(compgen -W 'tcg kvm kvm:tcg help' -- \"$cur\")) ;;\n\
         \x20       -cpu) COMPREPLY=($(compgen -W \"$(\"$1\" -cpu help 2>/dev/null | sed -n 's/^x86 \\([^ ]*\\).*/\\1/p') help\" -- \"$cur\")) ;;\n\
         \x20       -ft) COMPREPLY=($(compgen -W 'primary backup,peer=' -- \"$cur\")) ;;\n\
         \x20       -display) COMPREPLY=($(compgen -W 'none vnc=' -- \"$cur\")) ;;\n\
         \x20       -d) COMPREPLY=($(compgen -W 'ft disk net cpu all' -- \"$cur\")) ;;\n\
         \x20       {}) COMPREPLY=($(compgen -f -- \"$cur\")) ;;\n\
         \x20       {}) COMPREPLY=() ;;\n\
         \x20       *)\n\
         \x20           if [[ $cur == -* ]]; then\n\
         \x20               COMPREPLY=($(compgen -W '{}' -- \"$cur\"))\n\
         \x20           else\n\
         \x20               COMPREPLY=($(compgen -f -- \"$cur\"))\n\
         \x20           fi\n\
         \x20           ;;\n\
         \x20   esac\n\
         }}\n\
         complete -o filenames -o bashdefault -F _ftvm ftvm\n",
        machines.join(" "),
        devices.join(" "),
        files.join(" | "),
        with_value.join(" | "),
        names.join(" "),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_script_is_up_to_date_and_bash_takes_it() {
        let committed = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/ftvm.bash");
        let text = std::fs::read_to_string(committed).unwrap_or_default();
        assert!(text == bash(), "packaging/ftvm.bash is out of date: run  cargo run --example generate");
        let ask = format!(
            "set -e; . {committed}; COMP_WORDS=(ftvm -blo); COMP_CWORD=1; _ftvm ftvm; echo \"${{COMPREPLY[*]}}\"
             COMP_WORDS=(ftvm -device virtio-n); COMP_CWORD=2; _ftvm ftvm; echo \"${{COMPREPLY[*]}}\""
        );
        let Ok(out) = std::process::Command::new("bash").args(["-c", &ask]).output() else { return };
        assert_eq!(String::from_utf8_lossy(&out.stdout), "-blockdev\nvirtio-net-pci\n");
    }

    #[test]
    fn file_options_exist() {
        for name in FILES {
            assert!(OPTIONS.iter().any(|(o, value, ..)| o == name && !value.is_empty()), "{name}");
        }
    }
}
