//! The keys of the options whose values are lists `key=value,...`: what [`super::config`] accepts and what monitors are
//! told of.

/// What a key's value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    Text,
    Bool,
    Number,
    Size,
}

use Value::{Bool, Number, Size, Text};

/// By option, in the order of the alphabet.
pub const KEYS: &[(&str, &[(&str, Value)])] = &[
    ("accel", &[("accel", Text), ("kernel-irqchip", Text), ("thread", Text), ("tb-size", Number)]),
    ("boot", &[("order", Text), ("once", Text), ("menu", Bool), ("strict", Bool), ("splash-time", Number)]),
    (
        "chardev",
        &[
            ("backend", Text),
            ("id", Text),
            ("path", Text),
            ("host", Text),
            ("port", Text),
            ("server", Bool),
            ("wait", Bool),
            ("nodelay", Bool),
            ("mux", Bool),
            ("signal", Bool),
            ("append", Bool),
            ("logfile", Text),
            ("logappend", Bool),
            ("fd", Text),
            ("ipv4", Bool),
            ("ipv6", Bool),
            ("to", Number),
            ("reconnect", Number),
            ("telnet", Bool),
        ],
    ),
    (
        "icount",
        &[
            ("shift", Text),
            ("rr", Text),
            ("rrfile", Text),
            ("sleep", Bool),
            ("align", Bool),
            ("rrsnapshot", Text),
        ],
    ),
    (
        "machine",
        &[
            ("type", Text),
            ("accel", Text),
            ("usb", Bool),
            ("dump-guest-core", Bool),
            ("hpet", Bool),
            ("graphics", Bool),
            ("vmport", Text),
            ("acpi", Bool),
            ("memory-backend", Text),
            ("kernel-irqchip", Text),
            ("pcspk-audiodev", Text),
            ("smm", Text),
        ],
    ),
    ("memory", &[("size", Size), ("slots", Number), ("maxmem", Size)]),
    ("mon", &[("chardev", Text), ("mode", Text), ("pretty", Bool), ("id", Text)]),
    ("msg", &[("timestamp", Bool), ("guest-name", Bool)]),
    ("name", &[("guest", Text), ("process", Text), ("debug-threads", Bool)]),
    ("overcommit", &[("mem-lock", Bool), ("cpu-pm", Bool)]),
    ("rtc", &[("base", Text), ("clock", Text), ("driftfix", Text)]),
    (
        "sandbox",
        &[
            ("enable", Bool),
            ("obsolete", Text),
            ("elevateprivileges", Text),
            ("spawn", Text),
            ("resourcecontrol", Text),
        ],
    ),
    (
        "smp",
        &[
            ("cpus", Number),
            ("sockets", Number),
            ("dies", Number),
            ("cores", Number),
            ("threads", Number),
            ("maxcpus", Number),
        ],
    ),
    (
        "vnc",
        &[
            ("vnc", Text),
            ("to", Number),
            ("password", Bool),
            ("password-secret", Text),
            ("share", Text),
            ("audiodev", Text),
        ],
    ),
];

/// The keys of `option`.
pub fn keys(option: &str) -> Vec<&'static str> {
    let found = KEYS.iter().find(|(o, _)| *o == option);
    found.map_or(Vec::new(), |(_, keys)| keys.iter().map(|(k, _)| *k).collect())
}
