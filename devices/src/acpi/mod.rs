//! ACPI tables for the pc and q35 machines, given to firmware through fw_cfg with loader commands
//! (SeaBIOS's `romfile_loader`): ACPI 2.0 fixed tables and a DSDT of our own.

mod aml;

use aml::*;

use crate::chipset::{acpi_regs, fwcfg::FwCfg, hpet, ich9, ioapic, northbridge, pm};

/// What the tables depend on.
#[derive(Clone)]
pub struct Acpi {
    pub cpus: u32,
    pub low_ram: u64,
    pub hpet: bool,
    pub pvpanic: Option<u16>,
    /// COM ports present.
    pub serial: [bool; 4],
    pub q35: bool,
    /// Ports on the root bus whose slots can be filled and emptied: the machine's number of the bus behind it, device
    /// and function number.
    pub ports: Vec<(u8, u8)>,
}

const TABLES: &str = "etc/acpi/tables";
const RSDP: &str = "etc/acpi/rsdp";
/// Address of the ACPI registers that SeaBIOS programs into PMBASE.
const PM_BASE: u32 = 0x600;

fn header(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut out = signature.to_vec();
    out.extend((36 + body.len() as u32).to_le_bytes());
    out.extend([revision, 0]);
    out.extend(b"FTVM  FTVMPC  ");
    out.extend(1u32.to_le_bytes());
    out.extend(b"FTVM");
    out.extend(1u32.to_le_bytes());
    out.extend(body);
    out
}

fn gas_io(port: u32, bits: u8) -> Vec<u8> {
    [&[1, bits, 0, 0][..], &u64::from(port).to_le_bytes()].concat()
}

fn fadt(q35: bool) -> Vec<u8> {
    let (commands, gpe, gpe_len) = match q35 {
        true => (ich9::ACPI_COMMANDS, PM_BASE + u32::from(ich9::GPE0), 16),
        false => (pm::ACPI_COMMANDS, pm::GPE0 as u32, 4),
    };
    let mut t = vec![0u8; 208];
    let mut put = |at: usize, bytes: &[u8]| t[at - 36..at - 36 + bytes.len()].copy_from_slice(bytes);
    put(46, &u16::from(acpi_regs::SCI).to_le_bytes());
    put(48, &0xB2u32.to_le_bytes());
    put(52, &commands);
    put(56, &PM_BASE.to_le_bytes());
    put(64, &(PM_BASE + 4).to_le_bytes());
    put(76, &(PM_BASE + 8).to_le_bytes());
    put(80, &gpe.to_le_bytes());
    put(88, &[4, 2, 0, 4, gpe_len, 0]);
    // C2 and C3 latencies out of range: not supported.
    put(96, &0xFFFu16.to_le_bytes());
    put(98, &0xFFFu16.to_le_bytes());
    put(108, &[0x32]);
    // Legacy devices and an 8042 are there.
    put(109, &3u16.to_le_bytes());
    // WBINVD, C1, fixed power button, no sleep button, RTC not in fixed registers, reset register.
    put(112, &(0x1u32 | 0x4 | 0x20 | 0x40 | 0x400).to_le_bytes());
    put(116, &gas_io(0xCF9, 8));
    put(128, &[6]);
    put(148, &gas_io(PM_BASE, 32));
    put(172, &gas_io(PM_BASE + 4, 16));
    put(208, &gas_io(PM_BASE + 8, 32));
    put(220, &gas_io(gpe, 8 * gpe_len));
    header(b"FACP", 3, &t)
}

fn madt(cpus: u32) -> Vec<u8> {
    let mut t = 0xFEE0_0000u32.to_le_bytes().to_vec();
    t.extend(1u32.to_le_bytes());
    for i in 0..cpus as u8 {
        t.extend([0, 8, i, i, 1, 0, 0, 0]);
    }
    t.extend([1, 12, 0, 0]);
    t.extend((ioapic::BASE as u32).to_le_bytes());
    t.extend(0u32.to_le_bytes());
    for (irq, gsi, flags) in [(0u8, 2u32, 0u16), (5, 5, 13), (9, 9, 13), (10, 10, 13), (11, 11, 13)] {
        t.extend([2, 10, 0, irq]);
        t.extend(gsi.to_le_bytes());
        t.extend(flags.to_le_bytes());
    }
    t.extend([4, 6, 0xFF, 0, 0, 1]);
    header(b"APIC", 1, &t)
}

fn hpet_table() -> Vec<u8> {
    let mut t = (hpet::CAPABILITIES as u32).to_le_bytes().to_vec();
    t.extend([0, 64, 0, 0]);
    t.extend(hpet::BASE.to_le_bytes());
    t.extend([0, 0, 0, 0]);
    header(b"HPET", 1, &t)
}

/// The table of memory-mapped configuration space (PCI Firmware 3.0, 4.1.2): all 256 buses.
fn mcfg() -> Vec<u8> {
    let mut t = vec![0; 8];
    t.extend(northbridge::CONFIG_BASE.to_le_bytes());
    t.extend([0, 0, 0, 255, 0, 0, 0, 0]);
    header(b"MCFG", 1, &t)
}

/// A PIRQ link: its interrupt is in the ISA bridge's route control register.
fn link(n: usize) -> Vec<u8> {
    let field = || path(&format!("\\_SB.PCI0.ISA.PRQ{n}"));
    let letter = char::from(b'A' + n as u8);
    device(
        &format!("LNK{letter}"),
        &[
            name("_HID", eisa("PNP0C0F")),
            name("_UID", int(n as u64)),
            name("_PRS", resources(&[interrupts(&[5, 10, 11])])),
            method("_STA", 0, &[when(and(field(), int(0x80)), &[ret(int(9))]), ret(int(0x0B))]),
            method("_DIS", 0, &[or(field(), int(0x80), field())]),
            method(
                "_CRS",
                0,
                &[
                    name("PRR", resources(&[interrupts(&[0])])),
                    dword_field(path("PRR"), 5, "PRRI"),
                    store(and(field(), int(0x0F)), path("PRRI")),
                    ret(path("PRR")),
                ],
            ),
            method("_SRS", 1, &[dword_field(arg(0), 5, "PRRI"), store(path("PRRI"), field())]),
        ],
    )
}

/// ICH9's routes: slots 25 and on but 30 to PIRQ A to D by pin, the others round PIRQ E to H. `apic`: to the pins of
/// the I/O APIC that the PIRQs have for themselves.
fn ich9_routing(apic: bool) -> Vec<u8> {
    let mut out = Vec::new();
    for slot in 0..32u64 {
        for pin in 0..4u64 {
            let pirq = match slot {
                30 => pin + 4,
                25.. => pin,
                _ => ((slot + pin) & 3) + 4,
            };
            let link = format!("LNK{}", char::from(b'A' + pirq as u8));
            let [source, index] = if apic { [int(0), int(16 + pirq)] } else { [path(&link), int(0)] };
            out.push(package(&[int(slot << 16 | 0xFFFF), int(pin), source, index]));
        }
    }
    package(&out)
}

fn routing() -> Vec<u8> {
    let mut out = Vec::new();
    for slot in 0..32u64 {
        for pin in 0..4u64 {
            let link = match (slot, pin) {
                // The power management function's SCI.
                (1, 0) => "LNKS".to_string(),
                _ => format!("LNK{}", char::from(b'A' + ((slot + pin + 3) & 3) as u8)),
            };
            out.push(package(&[int(slot << 16 | 0xFFFF), int(pin), path(&link), int(0)]));
        }
    }
    package(&out)
}

fn isa_device(n: &str, id: &str, descriptors: &[Vec<u8>]) -> Vec<u8> {
    device(n, &[name("_HID", eisa(id)), name("_STA", int(0x0F)), name("_CRS", resources(descriptors))])
}

fn isa(config: &Acpi) -> Vec<u8> {
    let mut body = vec![
        name("_ADR", int(if config.q35 { 0x001F_0000 } else { 0x0001_0000 })),
        region("P40C", 2, 0x60, 4),
        byte_fields("P40C", &["PRQ0", "PRQ1", "PRQ2", "PRQ3"]),
        match config.q35 {
            true => {
                [region("P68C", 2, 0x68, 4), byte_fields("P68C", &["PRQ4", "PRQ5", "PRQ6", "PRQ7"])].concat()
            }
            false => Vec::new(),
        },
        isa_device("KBD", "PNP0303", &[io(0x60, 1), io(0x64, 1), irq(1)]),
        isa_device("MOU", "PNP0F13", &[irq(12)]),
        isa_device("RTC", "PNP0B00", &[io(0x70, 8), irq(8)]),
    ];
    for (i, (base, line)) in [(0x3F8, 4), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3)].into_iter().enumerate() {
        if config.serial[i] {
            body.push(device(
                &format!("COM{}", i + 1),
                &[
                    name("_HID", eisa("PNP0501")),
                    name("_UID", int(i as u64 + 1)),
                    name("_STA", int(0x0F)),
                    name("_CRS", resources(&[io(base, 8), irq(line)])),
                ],
            ));
        }
    }
    if let Some(port) = config.pvpanic {
        body.push(device(
            "PEVT",
            &[
                name("_HID", string("QEMU0001")),
                name("_STA", int(0x0F)),
                name("_CRS", resources(&[io(port, 1)])),
            ],
        ));
    }
    device("ISA", &body)
}

/// PCI slots that devices can be plugged into and pulled from: all but those of the chipset.
const HOTPLUG_SLOTS: std::ops::Range<u64> = 2..32;

/// A name for a slot, by its device and function number.
fn slot_name(slot: u64) -> String {
    format!("S{:02X}_", slot << 3)
}

/// The slots' devices and the method that tells the guest what happened to them.
fn hotplug() -> Vec<u8> {
    let mut out = vec![region("PHPR", 1, pm::HOTPLUG, 12), dword_fields("PHPR", &["PCIU", "PCID", "B0EJ"])];
    let notify_all = |event: u64| -> Vec<Vec<u8>> {
        HOTPLUG_SLOTS
            .map(|slot| when(and(local0(), int(1 << slot)), &[notify(&slot_name(slot), event)]))
            .collect()
    };
    for slot in HOTPLUG_SLOTS {
        out.push(device(
            &slot_name(slot),
            &[
                name("_SUN", int(slot)),
                name("_ADR", int(slot << 16)),
                method("_EJ0", 1, &[store(int(1 << slot), path("B0EJ"))]),
            ],
        ));
    }
    // 1: look for something new; 3: let go.
    let mut body = vec![store(path("PCIU"), local0())];
    body.extend(notify_all(1));
    body.push(store(path("PCID"), local0()));
    body.extend(notify_all(3));
    out.push(method("PCNT", 0, &body));
    out.concat()
}

/// The slots behind the root ports, and the method that tells the guest what happened to them.
fn port_hotplug(ports: &[(u8, u8)]) -> Vec<u8> {
    let mut out = vec![
        region("PHPR", 1, ich9::HOTPLUG, 0x18),
        dword_fields("PHPR", &["PCIU", "PCID", "B0EJ", "PRMV", "BNUM"]),
        mutex("BLCK"),
    ];
    let mut all = Vec::new();
    for (bus, devfn) in ports {
        let name_of = format!("P{devfn:02X}_");
        let select = [acquire("BLCK"), store(int(u64::from(*bus)), path("BNUM"))].concat();
        let eject = [select.clone(), store(int(1), path("B0EJ")), release("BLCK")];
        // 1: look for something new; 3: let go.
        let look = [
            select,
            store(path("PCIU"), local0()),
            when(and(local0(), int(1)), &[notify("S00_", 1)]),
            store(path("PCID"), local0()),
            when(and(local0(), int(1)), &[notify("S00_", 3)]),
            release("BLCK"),
        ];
        let slot = device(
            "S00_",
            &[name("_SUN", int(u64::from(*bus))), name("_ADR", int(0)), method("_EJ0", 1, &eject)],
        );
        let address = u64::from(devfn >> 3) << 16 | u64::from(devfn & 7);
        out.push(device(&name_of, &[name("_ADR", int(address)), slot, method("PCNT", 0, &look)]));
        all.push(call(&format!("\\_SB.PCI0.{name_of}.PCNT"), &[]));
    }
    out.push(method("PCNT", 0, &all));
    out.concat()
}

/// `_OSC` (PCI Firmware 3.0, 4.5.1): the guest gets the Express capability; hot-plug and the rest stay with ACPI.
fn osc() -> Vec<u8> {
    const UUID: [u8; 16] =
        [0x5B, 0x4D, 0xDB, 0x33, 0xF7, 0x1F, 0x1C, 0x40, 0x96, 0x57, 0x74, 0x41, 0xC0, 0x3D, 0xD7, 0x66];
    let set = |bit: u64| or(path("CDW1"), int(bit), path("CDW1"));
    method(
        "_OSC",
        4,
        &[
            dword_field(arg(3), 0, "CDW1"),
            when(
                equal(arg(0), buffer(&UUID)),
                &[
                    dword_field(arg(3), 8, "CDW3"),
                    store(and(path("CDW3"), int(0x10)), local0()),
                    when(differs(arg(1), int(1)), &[set(8)]),
                    when(differs(path("CDW3"), local0()), &[set(0x10)]),
                    store(local0(), path("CDW3")),
                ],
            ),
            otherwise(&[set(4)]),
            ret(arg(3)),
        ],
    )
}

fn q35_bus(config: &Acpi) -> Vec<u8> {
    let hole = (config.low_ram as u32).max(0x8000_0000);
    let mapped = northbridge::CONFIG_BASE as u32;
    device(
        "PCI0",
        &[
            name("_HID", eisa("PNP0A08")),
            name("_CID", eisa("PNP0A03")),
            name("_UID", int(0)),
            osc(),
            name(
                "_CRS",
                resources(&[
                    word_range(Space::Bus, 0, 0xFF),
                    io(0xCF8, 8),
                    word_range(Space::Io, 0, 0xCF7),
                    word_range(Space::Io, 0xD00, 0xFFFF),
                    dword_range(Space::Memory, 0xA_0000, 0xB_FFFF),
                    dword_range(Space::Memory, hole, mapped - 1),
                    dword_range(Space::Memory, mapped + 0x1000_0000, 0xFEBF_FFFF),
                ]),
            ),
            name("PRTP", ich9_routing(false)),
            name("PRTA", ich9_routing(true)),
            method("_PRT", 0, &[when(path("PICF"), &[ret(path("PRTA"))]), ret(path("PRTP"))]),
            device(
                "DRAC",
                &[name("_HID", eisa("PNP0C01")), name("_CRS", resources(&[memory32(mapped, 0x1000_0000)]))],
            ),
            isa(config),
            port_hotplug(&config.ports),
        ],
    )
}

fn i440fx_bus(config: &Acpi) -> Vec<u8> {
    let hole = (config.low_ram as u32).max(0x8000_0000);
    device(
        "PCI0",
        &[
            name("_HID", eisa("PNP0A03")),
            name("_ADR", int(0)),
            name("_UID", int(0)),
            name(
                "_CRS",
                resources(&[
                    word_range(Space::Bus, 0, 0xFF),
                    io(0xCF8, 8),
                    word_range(Space::Io, 0, 0xCF7),
                    word_range(Space::Io, 0xD00, 0xFFFF),
                    dword_range(Space::Memory, 0xA_0000, 0xB_FFFF),
                    dword_range(Space::Memory, hole, 0xFEBF_FFFF),
                ]),
            ),
            name("_PRT", routing()),
            isa(config),
            hotplug(),
        ],
    )
}

fn dsdt(config: &Acpi) -> Vec<u8> {
    let bus = if config.q35 { q35_bus(config) } else { i440fx_bus(config) };
    let system = device(
        "LNKS",
        &[
            name("_HID", eisa("PNP0C0F")),
            name("_UID", int(4)),
            name("_PRS", resources(&[interrupts(&[9])])),
            name("_CRS", resources(&[interrupts(&[9])])),
            name("_STA", int(0x0B)),
            method("_DIS", 0, &[]),
            method("_SRS", 1, &[]),
        ],
    );
    let mut sb = vec![bus];
    sb.extend((0..if config.q35 { 8 } else { 4 }).map(link));
    if !config.q35 {
        sb.push(system);
    }
    sb.push(device(
        "FWCF",
        &[
            name("_HID", string("QEMU0002")),
            name("_STA", int(0x0B)),
            name("_CRS", resources(&[io(0x510, 12)])),
        ],
    ));
    if config.hpet {
        sb.push(device(
            "HPET",
            &[
                name("_HID", eisa("PNP0103")),
                name("_UID", int(0)),
                name("_STA", int(0x0F)),
                name("_CRS", resources(&[memory32(hpet::BASE as u32, 0x400)])),
            ],
        ));
    }
    for i in 0..config.cpus {
        sb.push(device(
            &format!("C{i:03X}"),
            &[name("_HID", string("ACPI0007")), name("_UID", int(u64::from(i)))],
        ));
    }
    let gpe = scope(
        "\\_GPE",
        &[name("_HID", string("ACPI0006")), method("_E01", 0, &[call("\\_SB.PCI0.PCNT", &[])])],
    );
    // Whether the guest uses the I/O APIC.
    let mode = [name("PICF", int(0)), method("_PIC", 1, &[store(arg(0), path("PICF"))])].concat();
    let body = [mode, scope("\\_SB", &sb), gpe, name("\\_S5", package(&[int(0), int(0), int(0), int(0)]))];
    header(b"DSDT", 1, &body.concat())
}

fn file_field(name: &str) -> [u8; 56] {
    let mut out = [0; 56];
    out[..name.len()].copy_from_slice(name.as_bytes());
    out
}

/// Loader commands, 128 bytes each.
struct Loader(Vec<u8>);

impl Loader {
    fn push(&mut self, command: u32, parts: &[&[u8]]) {
        let start = self.0.len();
        self.0.extend(command.to_le_bytes());
        parts.iter().for_each(|p| self.0.extend(*p));
        self.0.resize(start + 128, 0);
    }

    /// `zone` 1: high memory; 2: the F segment.
    fn allocate(&mut self, file: &str, align: u32, zone: u8) {
        self.push(1, &[&file_field(file), &align.to_le_bytes(), &[zone]]);
    }

    /// Add the address of `source` to the 4-byte pointer at `offset` of `file`.
    fn pointer(&mut self, file: &str, source: &str, offset: usize) {
        self.push(2, &[&file_field(file), &file_field(source), &(offset as u32).to_le_bytes(), &[4]]);
    }

    fn checksum(&mut self, file: &str, at: usize, start: usize, length: usize) {
        let words = [at as u32, start as u32, length as u32].map(u32::to_le_bytes);
        self.push(3, &[&file_field(file), &words.concat()]);
    }
}

/// Put the tables and the loader commands into fw_cfg.
pub fn install(config: &Acpi, fw: &mut FwCfg) {
    let mut loader = Loader(Vec::new());
    loader.allocate(TABLES, 64, 1);
    loader.allocate(RSDP, 16, 2);

    let mut tables = vec![0u8; 64];
    tables[..4].copy_from_slice(b"FACS");
    tables[4] = 64;
    let add = |tables: &mut Vec<u8>, t: &[u8]| -> usize {
        let at = tables.len();
        tables.extend(t);
        at
    };
    let dsdt = dsdt(config);
    let dsdt_at = add(&mut tables, &dsdt);
    loader.checksum(TABLES, dsdt_at + 9, dsdt_at, dsdt.len());

    let fadt = fadt(config.q35);
    let fadt_at = add(&mut tables, &fadt);
    // FACS is at 0, so its pointer's addend is 0.
    tables[fadt_at + 40..fadt_at + 44].copy_from_slice(&(dsdt_at as u32).to_le_bytes());
    loader.pointer(TABLES, TABLES, fadt_at + 36);
    loader.pointer(TABLES, TABLES, fadt_at + 40);
    loader.checksum(TABLES, fadt_at + 9, fadt_at, fadt.len());

    let mut roots = vec![fadt_at];
    let mut plain = vec![madt(config.cpus)];
    if config.hpet {
        plain.push(hpet_table());
    }
    if config.q35 {
        plain.push(mcfg());
    }
    // WAET: the ACPI timer needs to be read only once.
    plain.push(header(b"WAET", 1, &2u32.to_le_bytes()));
    for t in plain {
        let at = add(&mut tables, &t);
        loader.checksum(TABLES, at + 9, at, t.len());
        roots.push(at);
    }

    let body: Vec<u8> = roots.iter().flat_map(|&at| (at as u32).to_le_bytes()).collect();
    let rsdt = header(b"RSDT", 1, &body);
    let rsdt_at = add(&mut tables, &rsdt);
    for i in 0..roots.len() {
        loader.pointer(TABLES, TABLES, rsdt_at + 36 + 4 * i);
    }
    loader.checksum(TABLES, rsdt_at + 9, rsdt_at, rsdt.len());

    let mut rsdp = b"RSD PTR \0FTVM  \0".to_vec();
    rsdp.extend((rsdt_at as u32).to_le_bytes());
    loader.pointer(RSDP, TABLES, 16);
    loader.checksum(RSDP, 8, 0, 20);

    fw.file(TABLES, tables);
    fw.file(RSDP, rsdp);
    fw.file("etc/table-loader", loader.0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_have_their_lengths() {
        let config = Acpi {
            cpus: 2,
            low_ram: 1 << 30,
            hpet: true,
            pvpanic: Some(0x505),
            serial: [true, false, false, false],
            q35: false,
            ports: vec![(1, 0x08), (2, 0x09)],
        };
        let q35 = Acpi { q35: true, ..config.clone() };
        for t in [dsdt(&config), dsdt(&q35), fadt(false), fadt(true), madt(2), hpet_table(), mcfg()] {
            assert_eq!(u32::from_le_bytes([t[4], t[5], t[6], t[7]]) as usize, t.len());
        }
        assert_eq!(fadt(true).len(), 244);
        assert_eq!(mcfg().len(), 60);
        assert_eq!(hpet_table().len(), 56);
    }
}
