//! The PCI functions as the guest has set them up.

use ftvm_devices::pci::Bar;
use ftvm_devices::FunctionView;
use ftvm_qmp::Call;
use serde_json::{json, Value};

use super::{Control, Reply};

/// What class codes are called (QEMU's words).
const CLASSES: &[(u16, &str)] = &[
    (0x0000, "Unclassified device"),
    (0x0001, "VGA controller"),
    (0x0100, "SCSI controller"),
    (0x0101, "IDE controller"),
    (0x0106, "SATA controller"),
    (0x0180, "Storage controller"),
    (0x0200, "Ethernet controller"),
    (0x0280, "Network controller"),
    (0x0300, "VGA controller"),
    (0x0380, "Display controller"),
    (0x0500, "RAM controller"),
    (0x0600, "Host bridge"),
    (0x0601, "ISA bridge"),
    (0x0604, "PCI bridge"),
    (0x0680, "Bridge"),
    (0x0780, "Communication controller"),
    (0x0C03, "USB controller"),
    (0x0C05, "SMBus"),
    (0x00FF, "Class 255"),
];

fn word(f: &FunctionView, at: usize) -> u64 {
    u64::from(u16::from_le_bytes([f.config[at], f.config[at + 1]]))
}

fn dword(f: &FunctionView, at: usize) -> u64 {
    word(f, at) | word(f, at + 2) << 16
}

fn regions(f: &FunctionView) -> Vec<Value> {
    let mut out = Vec::new();
    for (n, bar) in f.bars.iter().enumerate() {
        let low = dword(f, 0x10 + 4 * n);
        out.push(match bar {
            Bar::None => continue,
            Bar::Io(size) => json!({"bar": n, "type": "io", "address": low & !3, "size": size}),
            Bar::Memory(size) => json!({
                "bar": n, "type": "memory", "address": low & !15, "size": size, "prefetch": false, "mem_type_64": false,
            }),
            Bar::Memory64(size) => {
                let address = low & !15 | dword(f, 0x14 + 4 * n) << 32;
                json!({"bar": n, "type": "memory", "address": address, "size": size, "prefetch": true, "mem_type_64": true})
            }
        });
    }
    out
}

/// What a bridge passes on, and what is behind it.
fn bridge(f: &FunctionView, all: &[FunctionView]) -> Value {
    let byte = |at: usize| u64::from(f.config[at]);
    let range = |base: u64, limit: u64| json!({"base": base, "limit": limit});
    let memory = |at: usize| (word(f, at) & 0xFFF0) << 16;
    let (upper_base, upper_limit) = (dword(f, 0x28) << 32, dword(f, 0x2C) << 32);
    let mut out = json!({"bus": {
        "number": byte(0x18),
        "secondary": byte(0x19),
        "subordinate": byte(0x1A),
        "io_range": range(
            (byte(0x1C) & 0xF0) << 8 | word(f, 0x30) << 16,
            (byte(0x1D) & 0xF0) << 8 | 0xFFF | word(f, 0x32) << 16,
        ),
        "memory_range": range(memory(0x20), memory(0x22) | 0xF_FFFF),
        "prefetchable_range": range(memory(0x24) | upper_base, memory(0x26) | 0xF_FFFF | upper_limit),
    }});
    if byte(0x19) != 0 {
        out["devices"] = json!(on_bus(f.config[0x19], all));
    }
    out
}

/// The functions on the bus of this number, in order.
fn on_bus(bus: u8, all: &[FunctionView]) -> Vec<Value> {
    let one = |f: &FunctionView| {
        let class = word(f, 10);
        let mut class_info = json!({"class": class});
        if let Some((_, text)) = CLASSES.iter().find(|(c, _)| u64::from(*c) == class) {
            class_info["desc"] = json!(text);
        }
        let mut id = json!({"vendor": word(f, 0), "device": word(f, 2)});
        let is_bridge = f.config[0x0E] & 0x7F == 1;
        if !is_bridge {
            id["subsystem-vendor"] = json!(word(f, 0x2C));
            id["subsystem"] = json!(word(f, 0x2E));
        }
        let mut entry = json!({
            "bus": bus,
            "slot": f.devfn >> 3,
            "function": f.devfn & 7,
            "class_info": class_info,
            "id": id,
            "irq_pin": f.config[0x3D],
            "qdev_id": f.id.clone().unwrap_or_default(),
            "regions": regions(f),
        });
        if f.config[0x3D] != 0 {
            entry["irq"] = json!(f.config[0x3C]);
        }
        if is_bridge {
            entry["pci_bridge"] = bridge(f, all);
        }
        entry
    };
    all.iter().filter(|f| f.bus == Some(bus)).map(one).collect()
}

/// The functions on the root bus, in order, with what is behind its bridges.
pub fn functions(c: &Control) -> Result<Vec<Value>, ftvm_qmp::QmpError> {
    if c.config.machine == "none" {
        return Ok(Vec::new());
    }
    let functions = c.machine(|rt| rt.machine.chipset().pci_functions())?;
    Ok(on_bus(0, &functions))
}

pub fn query(c: &Control, _: &mut Call) -> Reply {
    let devices = functions(c)?;
    if devices.is_empty() {
        return Ok(json!([]));
    }
    Ok(json!([{"bus": 0, "devices": devices}]))
}
