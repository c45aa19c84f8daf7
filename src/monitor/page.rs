//! `man/ftvm-qmp.7`, made from the schema that the program itself obeys. `cargo run --example generate` writes it.

use ftvm_qmp::{manual, Schema};

use crate::cli::man::{fill, roff};

const INTRODUCTION: &str = r#".SH NAME
ftvm\-qmp \- ftvm's machine protocol: commands and events
.SH DESCRIPTION
QMP is QEMU's monitor protocol: JSON objects over a socket.
ftvm offers it with
.BR "\-qmp unix:PATH,server=on,wait=off" ,
.B "\-qmp tcp:ADDR:PORT,server=on"
or
.B \-mon
on a socket chardev; there may be any number of monitors.
One client is served at a time on each socket.
Commands, types and events are those of QEMU 7.2, as far as they are listed here.
.PP
ftvm greets.
The client sends
.B qmp_capabilities
first; until then every other command is refused.
Replies carry the
.B id
of their request.
Wrong arguments get QEMU's errors.
.PP
.EX
$ nc \-U qmp.sock
{"QMP": {"version": ..., "capabilities": ["oob"]}}
{"execute": "qmp_capabilities"}
{"return": {}}
{"execute": "query\-ft"}
{"return": {"role": "primary", "state": "protected", ...}}
.EE
.PP
File descriptors come with
.B getfd
or
.B add\-fd
over a Unix socket (SCM_RIGHTS).
A client that sends without reading is not read from any more until it reads; one that leaves 16 MiB of events unread is dropped.
The machine never waits for a client.
.PP
Commands that change the machine belong to the primary of a pair; the backup gets them through the log.
Given to the backup they are an error.
.SH "HUMAN MONITOR"
.B \-monitor
and
.B human\-monitor\-command
take the commands that
.B help
and
.B info
list: info status, block, blockstats, network, pci, qtree, qom\-tree, registers, mtree, chardev, cpus, balloon, ft and others; stop, cont,
quit, system_reset, system_powerdown, nmi, sendkey, device_add, device_del, netdev_add, netdev_del, object_add, object_del, set_link, screendump,
eject, balloon, pmemsave, qom\-get, qom\-set, qom\-list.
"#;

const CLOSING: &str = r#".SH SEE ALSO
.BR ftvm (1),
.BR ftvm\-ft (7)
"#;

/// The man page in roff.
pub fn page() -> String {
    let schema = Schema::get();
    let mut out =
        String::from(".\\\" Made by \"cargo run --example generate\" from qmp/schema: do not edit.\n");
    out.push_str(&format!(
        ".TH FTVM-QMP 7 \"\" \"ftvm {}\" \"Miscellaneous Information\"\n",
        env!("CARGO_PKG_VERSION")
    ));
    out.push_str(INTRODUCTION);
    out.push_str(".SH COMMANDS\nArguments in brackets may be left out.\n");
    for [name, arguments, returns, about] in manual::commands(schema) {
        out.push_str(&format!(".TP\n.B {}\n{}\n", roff(&name), fill(&roff(&about))));
        if !arguments.is_empty() {
            out.push_str(&format!(".br\nArguments: {}.\n", fill(&roff(&arguments))));
        }
        if !returns.is_empty() {
            out.push_str(&format!(".br\nReturns: {}.\n", fill(&roff(&returns))));
        }
    }
    out.push_str(
        ".SH EVENTS\nEvents have a timestamp and go to every client that has sent qmp_capabilities.\n",
    );
    for [name, data, about] in manual::events(schema) {
        out.push_str(&format!(".TP\n.B {}\n{}\n", roff(&name), fill(&roff(&about))));
        if !data.is_empty() {
            out.push_str(&format!(".br\nData: {}.\n", fill(&roff(&data))));
        }
    }
    out.push_str(".SH TYPES\n");
    for [name, text] in manual::types(schema) {
        let text = if text.is_empty() { "No members.".to_owned() } else { format!("{text}.") };
        out.push_str(&format!(".TP\n.B {}\n{}\n", roff(&name), fill(&roff(&text))));
    }
    out.push_str(CLOSING);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_page_is_up_to_date() {
        let committed = concat!(env!("CARGO_MANIFEST_DIR"), "/man/ftvm-qmp.7");
        let text = std::fs::read_to_string(committed).unwrap_or_default();
        assert!(text == page(), "man/ftvm-qmp.7 is out of date: run  cargo run --example generate");
    }
}
