//! What is made from the program's own interfaces: introspection XML, org.ftvm(5), ftctl(1) and ftvmd(8)'s options.

use zbus::object_server::Interface;

/// The introspection XML of one interface, as it is installed.
pub fn interface_xml(interface: &dyn Interface) -> String {
    let mut out = String::from(
        "<!DOCTYPE node PUBLIC \"-//freedesktop//DTD D-BUS Object Introspection 1.0//EN\"\n \
         \"http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd\">\n<node>\n",
    );
    interface.introspect_to_writer(&mut out, 2);
    out.push_str("</node>\n");
    out
}

/// Text as troff has it.
fn troff(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-").replace('"', "\\(dq");
    let guard =
        |line: &str| if line.starts_with(['.', '\'']) { format!("\\&{line}") } else { line.to_owned() };
    text.lines().map(guard).collect::<Vec<_>>().join("\n")
}

fn attribute<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split_once(&format!("{key}=\""))?.1.split('"').next()
}

/// A page's section about one interface, from its introspection XML.
fn section(xml: &str) -> String {
    let mut out = String::new();
    let mut comment: Vec<String> = Vec::new();
    let mut inside = false;
    let mut member: Option<(String, String, Vec<String>, Vec<String>)> = None;
    let flush = |out: &mut String, m: Option<(String, String, Vec<String>, Vec<String>)>| {
        if let Some((head, text, ins, outs)) = m {
            let results =
                if outs.is_empty() { String::new() } else { format!(" \\(-> {}", troff(&outs.join(", "))) };
            let arguments = if head.starts_with("property") {
                troff(&ins.concat())
            } else {
                format!("({})", troff(&ins.join(", ")))
            };
            let (kind, name) = head.split_once(' ').unwrap_or(("", &head));
            out.push_str(&format!(
                ".TP\n{kind} \\fB{}\\fR{arguments}{results}\n{}\n",
                troff(name),
                troff(&text)
            ));
        }
    };
    for line in xml.lines().map(str::trim) {
        if line.starts_with("<!--") {
            inside = true;
            comment.clear();
        }
        if inside {
            let text = line.trim_start_matches("<!--").trim_end_matches("-->").trim();
            if !text.is_empty() {
                comment.push(text.to_owned());
            }
            inside = !line.ends_with("-->");
        } else if line.starts_with("<interface ") {
            let name = attribute(line, "name").unwrap_or_default();
            out.push_str(&format!(".SH {}\n{}\n", troff(name), troff(&comment.join("\n"))));
            comment.clear();
        } else if let Some(kind) =
            ["method", "signal", "property"].iter().find(|k| line.starts_with(&format!("<{k} ")))
        {
            flush(&mut out, member.take());
            let name = attribute(line, "name").unwrap_or_default();
            let mut ins = Vec::new();
            if *kind == "property" {
                ins.push(format!(" ({})", attribute(line, "type").unwrap_or_default()));
            }
            member = Some((format!("{kind} {name}"), comment.join("\n"), ins, Vec::new()));
            comment.clear();
        } else if line.starts_with("<arg ") {
            if let Some((_, _, ins, outs)) = &mut member {
                let word = |key| attribute(line, key).unwrap_or_default();
                let text = format!("{} {}", word("type"), word("name"));
                if word("direction") == "out" { outs } else { ins }.push(text.trim().to_owned());
            }
        }
    }
    flush(&mut out, member.take());
    out
}

fn header(title: &str, section: u8, group: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    format!(
        ".\\\" Made by \"cargo run -p ftvm-daemon --example generate\": do not edit.\n\
         .TH {} {section} \"\" \"ftvm {version}\" \"{group}\"\n",
        troff(title)
    )
}

/// org.ftvm(5).
pub fn interfaces_page(xml: &[String]) -> String {
    let mut out = header("ORG.FTVM", 5, "File Formats");
    out.push_str(
        ".SH NAME\norg.ftvm \\- the D\\-Bus interface of ftvm's machines\n.SH DESCRIPTION\n\
         .BR ftvmd (8)\nhas the name\n.B org.ftvm\non the system bus (with \\-\\-session, on the session bus).\n\
         The object\n.I /org/ftvm\nhas org.ftvm.Manager1 and org.freedesktop.DBus.ObjectManager;\n\
         each machine is an object\n.I /org/ftvm/machine/NAME\nwith org.ftvm.Machine1 and org.ftvm.FaultTolerance1.\n\
         In NAME every byte that is no letter or digit is an underscore and two hexadecimal digits: ask LookupByName.\n\
         .PP\nAnyone may read.\nOn the system bus each verb is an action of polkit; a refusal is \
         org.freedesktop.DBus.Error.AccessDenied.\nWithout polkit only root may.\n",
    );
    xml.iter().for_each(|x| out.push_str(&section(x)));
    out.push_str(".SH ACTIONS OF POLKIT\n");
    for verb in crate::access::VERBS {
        out.push_str(&format!(
            ".TP\n.B {}\n{}\n",
            troff(&format!("{}.{}", crate::BUS_NAME, verb.action)),
            troff(verb.message)
        ));
    }
    out.push_str(".SH SEE ALSO\n.BR ftctl (1),\n.BR ftvm\\-ft (7),\n.BR ftvmd (8)\n");
    out
}

fn options(command: &clap::Command, global: bool) -> String {
    let mut out = String::new();
    for arg in command.get_arguments().filter(|a| a.is_global_set() == global) {
        let value = arg.get_value_names().map(|v| v.join(" ")).unwrap_or_default();
        let takes = arg.get_action().takes_values();
        let head = match arg.get_long() {
            Some(long) if takes => {
                format!("\\fB{}\\fR \\fI{}\\fR", troff(&format!("--{long}")), troff(&value))
            }
            Some(long) => format!("\\fB{}\\fR", troff(&format!("--{long}"))),
            None => {
                format!("\\fI{}\\fR", troff(if value.is_empty() { arg.get_id().as_str() } else { &value }))
            }
        };
        let default: Vec<_> = arg.get_default_values().iter().map(|v| v.to_string_lossy()).collect();
        let help = arg.get_help().map(|h| h.to_string()).unwrap_or_default();
        let shown = if takes && !default.is_empty() {
            format!(" (default {})", default.join(" "))
        } else {
            String::new()
        };
        out.push_str(&format!(".TP\n{head}\n{}.\n", troff(&format!("{help}{shown}"))));
    }
    out
}

/// A subcommand's section, and those of its own subcommands.
fn subcommand(sub: &clap::Command, above: &str) -> String {
    let name = format!("{above}{}", sub.get_name());
    let about = sub.get_about().map(|a| a.to_string()).unwrap_or_default();
    let mut out = format!(".SS {}\n{}.\n", troff(&name), troff(&about));
    out.push_str(&options(sub, false));
    sub.get_subcommands().for_each(|s| out.push_str(&subcommand(s, &format!("{name} "))));
    out
}

/// ftctl(1).
pub fn ftctl_page(command: &clap::Command) -> String {
    let mut out = header("FTCTL", 1, "User Commands");
    out.push_str(
        ".SH NAME\nftctl \\- looks at and controls the ftvm machines of this host\n.SH SYNOPSIS\n.B ftctl\n\
         [\\-\\-session] [\\-\\-json]\n.I command\n[arguments]\n.SH DESCRIPTION\nftctl asks\n.BR ftvmd (8)\n\
         on the system bus.\n.B ftctl check\nneeds no service: it finds out whether this host is fit for fault tolerance \
         and names the mend of each reason against it.\n.SH OPTIONS\n",
    );
    out.push_str(&options(command, true));
    out.push_str(".SH COMMANDS\n");
    for sub in command.get_subcommands() {
        out.push_str(&subcommand(sub, ""));
    }
    out.push_str(
        ".SH EXIT STATUS\n0 if all went well; 1 if not, or if\n.B check\nfound a reason; 2 for a wrong command line.\n\
         .SH SEE ALSO\n.BR ftvmd.conf (5),\n.BR org.ftvm (5),\n.BR ftvm\\-ft (7),\n.BR ftvmd (8)\n",
    );
    out
}

/// ftvmd.conf(5).
pub fn configuration_page() -> String {
    let mut out = header("FTVMD.CONF", 5, "File Formats");
    out.push_str(
        ".SH NAME\nftvmd.conf \\- a host of ftvm machines among its peers\n.SH DESCRIPTION\n\
         .I /etc/ftvm/ftvmd.conf\nis read by\n.BR ftvmd (8)\nwhen it starts. It is TOML. Without it, or without peers in it, \
         the service knows its own host alone:\nmachines can be protected by hand, and nothing is healed.\n.PP\n\
         Services speak TLS with each other, and both ends show a certificate of one authority\n\
         .RB ( \"ftctl cert\" \", see \" ftctl (1)).\nWhoever has a certificate of it can have machines' backups started.\n",
    );
    let mut table = None;
    for key in crate::config::KEYS {
        if table != Some(key.table) {
            table = Some(key.table);
            let (title, about) = match key.table {
                "tls" => ("[tls]", "How this host proves who it is."),
                "peer" => ("[[peer]]", "The other hosts."),
                "heal" => ("[heal]", "Backups for machines that have lost theirs."),
                "etcd" => ("[etcd]", "A shared inventory of hosts; needs address."),
                _ => ("THIS HOST", "Before the first table."),
            };
            out.push_str(&format!(".SH {}\n{}\n", troff(title), troff(about)));
        }
        let default = match key.default {
            "" => String::new(),
            default => troff(&format!(" Default: {default}.")),
        };
        out.push_str(&format!(
            ".TP\n.B {} = {}\n{}{default}\n",
            troff(key.key),
            troff(key.example),
            troff(key.text)
        ));
    }
    out.push_str(
        ".SH EXAMPLE\n.nf\nname = \"hostA\"\naddress = \"192.0.2.11\"\n[[peer]]\nname = \"hostB\"\n\
         address = \"192.0.2.12\"\n[[peer]]\nname = \"hostC\"\naddress = \"192.0.2.13\"\n.fi\n\
         .SH HEALING\nA primary that has had no backup for\n.B wait\nseconds gets one from its host's service, on a peer \
         that answers, is not in maintenance,\nhas the same version, does not run the machine, and has enough memory: the \
         one with the least load and the most room.\nThe definition goes with it, and is kept there. A host that has a \
         definition of the machine that differs\nstarts the backup with its arguments (another tap, another path); else \
         the backup takes everything from the primary.\nAfter a planned switch the old primary, and a backup that is made \
         anew, are given 10 seconds to join by themselves.\n.PP\nA primary whose host does not run ftvmd is not healed. Two hosts never heal one machine: only the \
         primary's does,\nand the lock on storage sees to it that there is one.\n\
         .SH FILES\n.TP\n.I /etc/ftvm/ftvmd.conf\n.TP\n.I /etc/ftvm/tls/\nCertificates and key.\n\
         .SH SEE ALSO\n.BR ftctl (1),\n.BR ftvm\\-ft (7),\n.BR ftvmd (8)\n",
    );
    out
}

/// ftvmd(8).
pub fn ftvmd_page(command: &clap::Command) -> String {
    let mut out = header("FTVMD", 8, "System Administration");
    out.push_str(
        ".SH NAME\nftvmd \\- the D\\-Bus service of the ftvm machines of a host\n.SH SYNOPSIS\n.B ftvmd\n[options]\n\
         .SH DESCRIPTION\nftvmd starts machines, watches them and shows them on D\\-Bus (see\n.BR org.ftvm (5)).\n\
         Machines do not depend on it: it may end and be started again, and finds those that run.\n\
         With peers\n.RB ( ftvmd.conf (5))\nit gives a protected machine that lost a host a backup on another one.\n\
         .PP\nMachines that a person or another program (libvirt) started appear too: each ftvm listens for QMP on\n\
         .IR /run/ftvm/machines/PID.qmp ,\nif it may write there, or on\n.IR $XDG_RUNTIME_DIR/ftvm/machines/PID.qmp ;\n\
         $FTVM_REGISTRY names another directory, or none if it is empty.\n\
         A socket is believed only if the process at its other end is the one of its name.\n.SH OPTIONS\n",
    );
    out.push_str(&options(command, false));
    out.push_str(
        ".SH DEFINITIONS\nA machine is defined by a file NAME.conf: arguments of\n.BR ftvm (1),\none a line; an option and \
         its value may share a line.\nEmpty lines and lines that begin with # say nothing.\nftvmd adds name, monitors, \
         log and pidfile.\nA file that is written or removed by hand is seen within a second.\n.PP\n.nf\n\
         # a web server, protected\n\\-m 1024\n\\-drive file=/shared/web.qcow2,if=virtio\n\
         \\-netdev tap,id=n0,ifname=tap0\n\\-device virtio\\-net\\-pci,netdev=n0\n\\-ft primary\n.fi\n.SH FILES\n.TP\n\
         .I /etc/ftvm/machines/NAME.conf\nDefinitions.\n.TP\n.I /run/ftvm/NAME.qmp\nQMP of a machine, for other programs.\n\
         .TP\n.I /run/ftvm/NAME.log\nIts messages; what it said before goes to NAME.log.1 when it is over 1 MiB at a start.\n.TP\n.I /run/ftvm/NAME.pid\nIts process.\n.TP\n\
         .I /run/ftvm/NAME.control\nThe QMP socket of the service.\n\
         .TP\n.I /run/ftvm/machines/PID.qmp\nA machine that others started.\n\
         .TP\n.I /var/lib/ftvm/maintenance\nExists while the host is in maintenance.\n\
         .SH PACEMAKER\nThe resource agent ocf:ftvm:ftvm makes a machine a promotable clone; the promoted instance is where it \
         lives.\nftvm itself decides that, by its lock, and ftvmd makes the backups: the agent tells Pacemaker, which \
         follows.\n.PP\n.nf\npcs resource create web ocf:ftvm:ftvm name=web promotable\n.fi\n.SH SYSTEMD\n\
         systemd\\-machined, where it runs, is told of every machine that ftvmd starts: machinectl lists it as \
         ftvm\\-NAME,\nand it is a scope of its own.\n\
         .SH SEE ALSO\n.BR ftctl (1),\n.BR ftvm (1),\n.BR ftvmd.conf (5),\n.BR org.ftvm (5),\n.BR ftvm\\-ft (7)\n",
    );
    out
}
