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

/// The functions, in order.
pub fn functions(c: &Control) -> Result<Vec<Value>, ftvm_qmp::QmpError> {
    if c.config.machine == "none" {
        return Ok(Vec::new());
    }
    let functions = c.machine(|rt| rt.machine.chipset().pci_functions())?;
    let one = |f: &FunctionView| {
        let class = word(f, 10);
        let mut class_info = json!({"class": class});
        if let Some((_, text)) = CLASSES.iter().find(|(c, _)| u64::from(*c) == class) {
            class_info["desc"] = json!(text);
        }
        let mut entry = json!({
            "bus": 0,
            "slot": f.devfn >> 3,
            "function": f.devfn & 7,
            "class_info": class_info,
            "id": {
                "vendor": word(f, 0), "device": word(f, 2),
                "subsystem-vendor": word(f, 0x2C), "subsystem": word(f, 0x2E),
            },
            "irq_pin": f.config[0x3D],
            "qdev_id": f.id.clone().unwrap_or_default(),
            "regions": regions(f),
        });
        if f.config[0x3D] != 0 {
            entry["irq"] = json!(f.config[0x3C]);
        }
        entry
    };
    Ok(functions.iter().map(one).collect())
}

pub fn query(c: &Control, _: &mut Call) -> Reply {
    let devices = functions(c)?;
    if devices.is_empty() {
        return Ok(json!([]));
    }
    Ok(json!([{"bus": 0, "devices": devices}]))
}
