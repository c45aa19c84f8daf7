//! SMBIOS tables (DMTF DSP0134, entry point 2.8) for firmware to place.

use crate::chipset::fwcfg::FwCfg;

struct Builder {
    out: Vec<u8>,
    count: u16,
    largest: usize,
}

impl Builder {
    fn structure(&mut self, kind: u8, handle: u16, body: &[u8], strings: &[&str]) {
        let start = self.out.len();
        self.out.extend([kind, (4 + body.len()) as u8]);
        self.out.extend(handle.to_le_bytes());
        self.out.extend(body);
        for s in strings {
            self.out.extend(s.bytes().filter(|b| *b != 0));
            self.out.push(0);
        }
        if strings.is_empty() {
            self.out.push(0);
        }
        self.out.push(0);
        self.count += 1;
        self.largest = self.largest.max(self.out.len() - start);
    }
}

/// Put the tables into fw_cfg. All zeros as `uuid` means none was given.
pub fn install(fw: &mut FwCfg, machine: &str, uuid: &[u8; 16], cpus: u32, ram: u64) {
    let mut b = Builder { out: Vec::new(), count: 0, largest: 0 };

    // System information. The UUID's first three fields are little-endian here.
    let mut body = vec![1, 2, 3, 0];
    let u = uuid;
    body.extend([u[3], u[2], u[1], u[0], u[5], u[4], u[7], u[6]]);
    body.extend(&u[8..]);
    body.extend([6, 0, 0]);
    let product = match crate::config::is_q35(machine) {
        true => "Standard PC (Q35 + ICH9, 2009)",
        false => "Standard PC (i440FX + PIIX, 1996)",
    };
    b.structure(1, 0x100, &body, &["FTVM", product, machine]);

    // Chassis.
    let mut body = vec![1, 1, 2, 0, 0, 3, 3, 3, 2];
    body.extend([0; 4]);
    body.extend([0, 0, 0, 0]);
    b.structure(3, 0x300, &body, &["FTVM", machine]);

    for i in 0..cpus.min(255) {
        let mut body = vec![1, 3, 1, 2];
        body.extend([0; 8]);
        body.extend([3, 0]);
        body.extend([0, 0, 0xD0, 0x07, 0xD0, 0x07]);
        body.extend([0x41, 1]);
        body.extend([0xFF; 6]);
        body.extend([0, 0, 0, 1, 1, 1]);
        body.extend([2, 0, 1, 0]);
        let socket = format!("CPU {i}");
        b.structure(4, 0x400 + i as u16, &body, &[&socket, "FTVM", machine]);
    }

    // One array of memory, one device in it for each 16 GiB.
    let chunk = 16u64 << 30;
    let devices = ram.div_ceil(chunk).clamp(1, 64);
    let mut body = vec![1, 3, 6];
    body.extend(0x8000_0000u32.to_le_bytes());
    body.extend([0xFE, 0xFF]);
    body.extend((devices as u16).to_le_bytes());
    body.extend(ram.to_le_bytes());
    b.structure(16, 0x1000, &body, &[]);
    for i in 0..devices {
        let mib = ((ram - (i * chunk).min(ram)).min(chunk) >> 20) as u32;
        let mut body = 0x1000u16.to_le_bytes().to_vec();
        body.extend([0xFE, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF]);
        body.extend((mib as u16 & 0x7FFF).to_le_bytes());
        body.extend([9, 0, 1, 0, 7, 2, 0, 0, 0, 2, 0, 0, 0, 0]);
        body.extend([0; 12]);
        let label = format!("DIMM {i}");
        b.structure(17, 0x1100 + i as u16, &body, &[&label, "FTVM"]);
    }
    let mut body = 0u32.to_le_bytes().to_vec();
    body.extend(((ram >> 10).saturating_sub(1).min(0xFFFF_FFFF) as u32).to_le_bytes());
    body.extend(0x1000u16.to_le_bytes());
    body.push(1);
    b.structure(19, 0x1300, &body, &[]);
    b.structure(32, 0x2000, &[0; 7], &[]);
    b.structure(127, 0x7F00, &[], &[]);

    let mut anchor = b"_SM_".to_vec();
    anchor.extend([0, 31, 2, 8]);
    anchor.extend((b.largest as u16).to_le_bytes());
    anchor.extend([0; 6]);
    anchor.extend(b"_DMI_");
    anchor.push(0);
    anchor.extend((b.out.len() as u16).to_le_bytes());
    anchor.extend(0u32.to_le_bytes());
    anchor.extend(b.count.to_le_bytes());
    anchor.push(0x28);
    fw.file("etc/smbios/smbios-anchor", anchor);
    fw.file("etc/smbios/smbios-tables", b.out);
}
