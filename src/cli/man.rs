//! `man/ftvm.1`, made from the tables that the program itself reads: the options, the machines, the device
//! models. `cargo run --example generate` writes it.

use ftvm_devices::registry::{Attach, Kind, MODELS};

use super::config::MACHINES;
use super::options::OPTIONS;

/// What one line of `-help` cannot say: (option, paragraphs).
const DETAILS: &[(&str, &[&str])] = &[
    (
        "machine",
        &["Properties: accel=tcg|kvm, hpet=on|off, usb=on|off (a controller without devices), memory-backend=id (an object \
           of the size that -m says). acpi=off is refused. vmport, graphics, dump-guest-core and kernel-irqchip are \
           accepted and have no effect. The machine 'none' has nothing but monitors: management programs ask it what there is."],
    ),
    (
        "cpu",
        &["The default is qemu64. 'max' has every feature of the processor, and 'host' means the same on tcg. On kvm, 'host' is all \
           that KVM shows of the host's processor, and stays on kvm; the others have what both accelerators have. \
           A feature that the processor does not have (AVX-512 on tcg, for example) is refused by name. 'kvm=off' \
           hides KVM from the guest."],
    ),
    (
        "accel",
        &[
            "tcg is the deterministic processor in software, which -ft, -icount and -gdb need. kvm is the host's processor. Of \
             several, in one list ('kvm:tcg') or in options that follow each other, the first that can be had is \
             taken. A machine moves between the two by migration, and when ft-turn-on and ft-turn-off are called.",
            "kernel-irqchip is accepted: the local APICs are the kernel's, all other interrupt controllers are not \
             (as with 'split').",
        ],
    ),
    ("smp", &["1 to 255 processors. They cannot be hot-plugged: maxcpus must equal cpus."]),
    (
        "boot",
        &["once= is used as order=. The menu needs a terminal on serial line 0 (-nographic)."],
    ),
    ("global", &["A default for every device of that driver. PIIX4_PM.disable_s3 and disable_s4 can only be 1: there are no sleep states."]),
    (
        "rtc",
        &["The base is read from the host when the machine starts. Afterwards the clock follows virtual time. A \
           date has the form 2024-02-29T12:00:00. clock= and driftfix= are accepted and have no effect."],
    ),
    (
        "icount",
        &[
            "With shift=N an instruction takes 2^N nanoseconds of virtual time, N from 0 to 10. With shift=auto \
             (the default) the rate follows the host's speed; the changes are inputs of the machine and are logged.",
            "rr=record writes every input of the machine to rrfile (default replay.bin) from the start to the \
             end, with a hash of the state for every second of virtual time. rr=replay runs the machine from that \
             file and compares the hashes. The command line must describe the same machine, and ftvm must be of \
             the same version. Disk images are not needed for replay: what was read is in the file. Only output of \
             character devices leaves during replay.",
            "sleep=off skips the time in which the guest is idle. rr=record and -ft exclude each other. align=on \
             is refused. rrsnapshot= is accepted and has no effect: going back needs no snapshot in an image.",
            "A replay can be stopped, looked at and debugged, and it goes back: gdb's reverse-continue, reverse-stepi and the like, \
             replay_seek, replay_break and info replay of the monitor. For that it keeps moments of the machine in memory \
             (compressed pages that changed; at most the guest's memory size or 256 MiB, whichever is more), from when a debugger \
             has connected or replay_seek was used. With a debugger connected it stops at the recording's end.",
        ],
    ),
    (
        "drive",
        &[
            "Keys: file, if, index, bus, unit, media=disk|cdrom, format=raw|luks|qcow2, id, \
             cache=writeback|writethrough|none|directsync|unsafe, readonly, discard=ignore|unmap, \
             detect-zeroes=off|on|unmap, serial, file.locking=on|off, werror=report|ignore|stop|enospc, \
             rerror=report|ignore|stop, throttling.{bps,iops}-{total,read,write}[-max[-length]], \
             throttling.iops-size, snapshot=on. Without format the file is looked at. aio= is accepted and has no \
             effect: requests are served by threads.",
            "file= also takes nfs://HOST/PATH/IMAGE[?uid=N&gid=N&nfsport=N&mountport=N&timeout=S] (NFS version 3) and \
             iscsi://[USER%PASS@]HOST[:PORT]/IQN/LUN[?initiator-name=N&timeout=S]. A request that the server does not \
             answer is repeated, over new connections, for timeout= seconds (25; 0: for ever); then it fails.",
            "key-secret=ID (luks), encrypt.format=luks,encrypt.key-secret=ID (qcow2): the -object secret that unlocks an encrypted image; \
             backing.key-secret and backing.encrypt.key-secret unlock those below. With -ft each host is given the secret itself.",
            "werror=stop stops the machine with the event BLOCK_IO_ERROR and the status io-error; cont tries again.",
            "The image is locked with QEMU's byte locks (qemu-img sees them). With -ft every write completes only when \
             it is on stable storage, unless cache=unsafe says that flushes do nothing: do not use cache=unsafe \
             with -ft.",
        ],
    ),
    (
        "blockdev",
        &["Drivers: raw, luks and qcow2 over file, host_device, nfs (server.type=inet, server.host, path, user, group) and iscsi \
         (transport=tcp, portal, target, lun, user, password-secret, initiator-name, timeout). JSON is taken too. A -device refers to the node by drive=n."],
    ),
    (
        "snapshot",
        &["Writes go to a temporary overlay that is gone with the program, as with snapshot=on of -drive. Not with -ft."],
    ),
    (
        "netdev",
        &[
            "tap: ifname, fd, script, downscript. No script is run unless one is named. vhost=on is refused.",
            "user: hostfwd=[tcp|udp]:[addr]:port-[guest]:port (may be repeated), net, restrict, hostname. The \
             network is 10.0.2.0/24, the guest 10.0.2.15. Connections of user networking end with their host: use tap \
             for a machine with -ft.",
        ],
    ),
    ("nic", &["Models: e1000 (the default) and virtio."]),
    (
        "chardev",
        &["socket: path, or host and port; server, wait; fd. file: path, append. pipe: path. stdio: signal. With mux=on up to four front ends (serial lines, -mon) share the device: all write, and what is typed goes to one of them. Ctrl-A c goes to the next, Ctrl-A x ends the program, Ctrl-A t puts the time before each line, Ctrl-A b sends a break, Ctrl-A s writes into the images what -snapshot holds, Ctrl-A h shows these keys."],
    ),
    (
        "serial",
        &["dev is one of none, null, stdio, mon:stdio, file:path, pipe:path, pty, unix:path[,server=on][,wait=off], \
           tcp:addr:port[,server=on][,wait=off], chardev:id. A reader that does not keep up loses bytes; the \
           machine is never stopped for it."],
    ),
    ("qmp", &["Only listening sockets: unix:path,server=on or tcp:addr:port,server=on. One client at a time. See ftvm-qmp(7)."]),
    (
        "sandbox",
        &["The refused system calls fail with EPERM. obsolete=deny is the default; the other groups are allowed unless denied. \
           With spawn=deny a backup that has to start anew cannot do so and ends."],
    ),
    ("audiodev", &["Only the driver none: libvirt gives it to every machine."]),
    ("kernel", &["The kind of file is told by its contents."]),
    ("bios", &["Looked for in the directories of -L, then in /usr/share/ftvm, /usr/share/seabios and /usr/share/qemu."]),
    ("nographic", &["On the terminal C-a x ends ftvm, C-a c switches between serial line and monitor, C-a h shows the keys."]),
    ("vnc", &["[HOST]:N (TCP port 5900+N), unix:PATH or none; to=N tries further ports. password=on asks for the password that set_password or change-vnc-password sets, password-secret=ID for that of a secret object. share=, audiodev= do nothing. There is no TLS: listen on a loopback address, or in a network of trust. Give -vga std or virtio too: a VNC server brings no video card."]),
    ("vga", &["std is QEMU's standard VGA, as -device VGA; virtio is -device virtio-vga, the same until the guest's virtio-gpu driver takes it over (two dimensions, no virgl). Other than with QEMU there is no video card unless it is asked for."]),
    (
        "gdb",
        &[
            "dev is one of tcp:[addr]:port, unix:path,server=on,wait=off, stdio, pty, chardev:id, none. A debugger that connects stops \
             the machine; each processor is a thread. Break- and watchpoints of both kinds do not touch guest memory. \
             Addresses are those of the thread at hand; after 'maintenance packet Qqemu.PhyMemMode:1' they are physical. \
             'monitor' passes a line to the human monitor, whose gdbserver opens and closes the stub at any time. The stub \
             asks for no password: listen on a loopback address or a socket file.",
            "Stepping takes no interrupts, as with QEMU (Qqemu.sstep=, qqemu.sstepbits), unless the machine is one of a pair or \
             recorded. Registers and memory of such a machine can be looked at, not changed. A backup cannot be debugged.",
        ],
    ),
    ("d", &["The environment variable RUST_LOG is read too."]),
    (
        "ft",
        &[
            "A primary runs at once and waits for a backup. A backup takes configuration and state from the primary \
             at peer and follows it. Keys:",
            "listen=ADDR:PORT (0.0.0.0:8100): where a primary, or a backup that has become one, waits for a backup. TCP and UDP.",
            "lock=PATH: the lock on the shared storage; default the first writable image's path with .ftlock appended. PATH may be a \
             URL: nfs://HOST/PATH, iscsi://HOST/IQN/LUN, or \
             etcd://HOST[:PORT][,,HOST[:PORT]...]/KEY[?ca=FILE&cert=FILE&key=FILE] (with ca= or cert= by TLS; commas are doubled in \
             an option's value). In etcd the lock is KEY and what begins with KEY. and a majority of the members must answer.",
            "heartbeat=MS (100), timeout=MS (1000): how often to give a sign of life, and after how much silence to \
             suspect the peer. timeout must be at least twice heartbeat. A backup uses the primary's values.",
            "retry=MS (0): how long a backup tries to reach a primary that does not listen yet.",
            "max-lag=MS (1000): how far the backup's execution may fall behind before the primary is slowed.",
            "disks=separate: each host has images of its own (a backup is given its -drive options), and lock= names a place that both see.",
            "reads=log (the default): data of disk reads travels in the log. reads=disk: the backup reads the shared disk itself, \
             where it may (see ftvm-ft(7)); a backup does as its primary says. Not with disks=separate.",
        ],
    ),
];

/// Text as roff: no character of it may be taken for a request.
pub fn roff(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\e"),
            '-' => out.push_str("\\-"),
            '\'' => out.push_str("\\(aq"),
            '^' => out.push_str("\\(ha"),
            '~' => out.push_str("\\(ti"),
            '`' => out.push_str("\\(ga"),
            // Where a long word may be broken.
            '|' | '&' => out.extend([c, '\\', ':']),
            '[' => out.push_str("\\:["),
            c => out.push(c),
        }
    }
    if out.starts_with('.') {
        out.insert_str(0, "\\&");
    }
    out
}

/// Text with spaces and newlines made single, broken into lines that diff well.
pub fn fill(text: &str) -> String {
    let mut out = String::new();
    let mut width = 0;
    for word in text.split_whitespace() {
        if width > 0 && width + word.len() > 90 {
            out.push('\n');
            width = 0;
        } else if width > 0 {
            out.push(' ');
        }
        // A line must not begin as a request does.
        if width == 0 && (word.starts_with('.') || word.starts_with('\'')) {
            out.push_str("\\&");
        }
        out.push_str(word);
        width += word.len() + 1;
    }
    out
}

/// The man page in roff.
pub fn page() -> String {
    let mut out = String::from(
        ".\\\" Made by \"cargo run --example generate\" from the tables in src/cli and devices/src: do not edit.\n",
    );
    out.push_str(&format!(".TH FTVM 1 \"\" \"ftvm {}\" \"User Commands\"\n", env!("CARGO_PKG_VERSION")));
    out.push_str(INTRODUCTION);
    out.push_str(".SH OPTIONS\n");
    out.push_str(
        "\\-x and \\-\\-x are the same.\nA value is a list key=value,key=value; \",,\" stands for a comma, a key \
         without a value for key=on.\nA word that is no option is the image of IDE disk 0.\n",
    );
    let mut last = "";
    for (name, value, section, help) in OPTIONS {
        if *section != last {
            out.push_str(&format!(".SS {}\n", roff(section)));
            last = section;
        }
        out.push_str(".TP\n");
        if value.is_empty() {
            out.push_str(&format!(".B {}\n", roff(&format!("-{name}"))));
        } else {
            out.push_str(&format!(".BI {} \" {}\"\n", roff(&format!("-{name}")), roff(value)));
        }
        let mut sentence = help.to_string();
        if let Some(first) = sentence.get(..1) {
            sentence = first.to_uppercase() + &sentence[1..];
        }
        out.push_str(&fill(&roff(&format!("{sentence}."))));
        out.push('\n');
        for text in DETAILS.iter().filter(|(n, _)| n == name).flat_map(|(_, texts)| *texts) {
            out.push_str(&format!(".IP\n{}\n", fill(&roff(text))));
        }
    }
    out.push_str(".SH MACHINES\n");
    for m in MACHINES {
        let alias = m.alias.map_or(String::new(), |a| format!(", also called {a}"));
        out.push_str(&format!(".TP\n.B {}\n{}{alias}.\n", roff(m.name), roff(m.description)));
    }
    out.push_str(".SH DEVICES\n");
    for model in MODELS.iter().filter(|m| m.attach != Attach::Board) {
        out.push_str(&format!(".TP\n.BR {} \" ({})\"\n", roff(model.name), roff(model.bus_kind())));
        let properties: Vec<String> = model
            .all_properties()
            .iter()
            .map(|(name, kind, _)| {
                let kind = match kind {
                    Kind::Bool => "on|off",
                    Kind::Number => "number",
                    Kind::Size => "size",
                    Kind::Mac => "address",
                    Kind::Drive | Kind::Netdev | Kind::Chardev => "id",
                    Kind::Text => "text",
                };
                format!("{name}={kind}")
            })
            .collect();
        let mut text = model.description.to_owned();
        text.push('.');
        if !properties.is_empty() {
            text.push_str(&format!(" Properties: {}.", properties.join(", ")));
        }
        out.push_str(&fill(&roff(&text)));
        out.push('\n');
    }
    out.push_str(CLOSING);
    out
}

const INTRODUCTION: &str = r#".SH NAME
ftvm \- virtual machine monitor that survives the death of its host
.SH SYNOPSIS
.B ftvm
.RI [ option ]...\&
.RI [ disk_image ]
.SH DESCRIPTION
.B ftvm
runs an x86\-64 machine: QEMU's pc or q35 with SeaBIOS, disks, network cards and serial lines.
It takes QEMU's options.
With
.B \-ft
two hosts run one machine in lockstep.
When one host dies, the other carries on; see
.BR ftvm\-ft (7).
.PP
The processor is software and deterministic.
It needs no virtualization support of the host's processor.
"#;

const CLOSING: &str = r#".SH EXIT STATUS
0 when the machine was powered off, or was ended by a monitor or a signal.
1 after an error; one sentence on standard error says what it was.
The device isa\-debug\-exit gives its own status.
A primary that finds that its backup has gone live ends with status 1.
A backup ends with status 0 when the machine ended on the primary.
.SH SIGNALS
SIGTERM, SIGINT and SIGHUP end the program.
On a primary this ends the machine, and the backup ends with it.
On a backup it ends the backup; the primary goes on without one.
.SH FILES
.TP
.I IMAGE.ftlock.*
The lock and the claims of a pair, beside the first writable image.
.TP
.IR IMAGE.ft1 ", " IMAGE.ft<number> ", " IMAGE.ft<number>.raw
An overlay that a takeover left, and on NFS the new file of a raw image.
It is merged into the image in the background, or at the next start of the machine.
.SH EXAMPLES
A Debian image on the terminal:
.PP
.EX
ftvm \-m 1G \-drive file=vm.qcow2 \-nographic
.EE
.PP
The same machine protected; on host A, then on host B:
.PP
.EX
ftvm \-m 1G \-drive file=/shared/vm.qcow2 \-nic tap,ifname=vmtap \-ft primary
ftvm \-ft backup,peer=hostA
.EE
.SH SEE ALSO
.BR ftvm\-ft (7),
.BR ftvm\-qmp (7)
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_page_is_up_to_date() {
        let committed = concat!(env!("CARGO_MANIFEST_DIR"), "/man/ftvm.1");
        let text = std::fs::read_to_string(committed).unwrap_or_default();
        assert!(text == page(), "man/ftvm.1 is out of date: run  cargo run --example generate");
    }

    #[test]
    fn details_belong_to_options() {
        for (name, texts) in DETAILS {
            assert!(OPTIONS.iter().any(|(o, ..)| o == name), "{name}");
            assert!(!texts.is_empty(), "{name}");
        }
    }

    #[test]
    fn no_line_of_text_is_a_request() {
        assert_eq!(roff(".x -a'b"), "\\&.x \\-a\\(aqb");
        let long = "word ".repeat(17) + ". .TH";
        assert!(fill(&long).lines().all(|l| !l.starts_with('.')));
    }
}
