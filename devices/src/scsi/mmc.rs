//! What only CD drives answer (MMC-3).

use super::{be16, Sense, INVALID_FIELD, NO_MEDIUM};

/// Minutes, seconds, frames of a block address.
fn msf(lba: u32) -> [u8; 4] {
    let f = lba.wrapping_add(150);
    [0, (f / 75 / 60) as u8, (f / 75 % 60) as u8, (f % 75) as u8]
}

/// A mode page of a CD drive.
pub fn page(number: u8, locked: bool) -> Option<Vec<u8>> {
    let mut p = match number {
        // Audio.
        0x0E => vec![0x0E, 14, 4],
        // Capabilities: reads CD-R, DVD-ROM, DVD-R; tray; speeds.
        0x2A => {
            vec![0x2A, 20, 0x3B, 0, 0x70, 0x71, 0x29 | u8::from(locked) << 1, 0, 2, 0xC2, 0, 2, 2, 0, 2, 0xC2]
        }
        _ => return None,
    };
    p.resize(usize::from(p[1]) + 2, 0);
    Some(p)
}

/// READ TOC, GET CONFIGURATION, GET EVENT STATUS NOTIFICATION, READ DISC INFORMATION, MECHANISM STATUS.
pub fn command(cdb: &[u8], blocks: Option<u64>) -> Result<Vec<u8>, Sense> {
    match cdb[0] {
        0x43 => toc(cdb, blocks.ok_or(NO_MEDIUM)? as u32),
        0x46 => Ok(configuration(blocks, 1)),
        0x4A if cdb[1] & 1 == 0 => Err(INVALID_FIELD),
        0x4A if cdb[4] & 0x10 == 0 => Ok(vec![0, 2, 0x80, 0x10]),
        0x4A => Ok(vec![0, 6, 4, 0x10, 0, if blocks.is_some() { 2 } else { 0 }, 0, 0]),
        0x51 => {
            blocks.ok_or(NO_MEDIUM)?;
            let mut r = vec![0, 32, 0x0E, 1, 1, 1, 1, 0x20];
            r.resize(34, 0);
            Ok(r)
        }
        _ => Ok(vec![0, 0, 0, 0, 0, 1, 0, 0]),
    }
}

fn toc(cdb: &[u8], blocks: u32) -> Result<Vec<u8>, Sense> {
    let in_msf = cdb[1] & 2 != 0;
    let format = match cdb[2] & 15 {
        0 => cdb[9] >> 6,
        f => f,
    };
    let address = |lba: u32| if in_msf { msf(lba) } else { lba.to_be_bytes() };
    let mut r = match format {
        0 => {
            let start = cdb[6];
            if start > 1 && start != 0xAA {
                return Err(INVALID_FIELD);
            }
            let mut r = vec![0, 0, 1, 1];
            if start <= 1 {
                r.extend([0, 0x14, 1, 0]);
                r.extend(address(0));
            }
            r.extend([0, 0x16, 0xAA, 0]);
            r.extend(address(blocks));
            r
        }
        1 => {
            let mut r = vec![0, 0, 1, 1, 0, 0x14, 1, 0];
            r.extend(address(0));
            r
        }
        _ => return Err(INVALID_FIELD),
    };
    let len = (r.len() - 2) as u16;
    r[..2].copy_from_slice(&len.to_be_bytes());
    debug_assert_eq!(be16(&r, 0), len);
    Ok(r)
}

/// GET CONFIGURATION's answer (MMC-3, 6.6) of a drive with a medium of so many blocks, or none; `interface`: the physical interface
/// standard that the core feature names (1 SCSI, 2 ATAPI).
pub fn configuration(blocks: Option<u64>, interface: u8) -> Vec<u8> {
    // More than a CD holds is a DVD.
    let profile: u16 = match blocks {
        None => 0,
        Some(b) if b > 80 * 60 * 75 => 0x10,
        Some(_) => 8,
    };
    let mut r = vec![0, 0, 0, 0, 0, 0];
    r.extend(profile.to_be_bytes());
    // Profile list: DVD-ROM and CD-ROM.
    r.extend([0, 0, 3, 8]);
    for p in [0x10u16, 8] {
        r.extend(p.to_be_bytes());
        r.extend([u8::from(p == profile), 0]);
    }
    // Core feature and removable medium.
    r.extend([0, 1, 0x0B, 8, 0, 0, 0, interface, 1, 0, 0, 0]);
    r.extend([0, 3, 3, 4, 0x29, 0, 0, 0]);
    let len = (r.len() - 4) as u32;
    r[..4].copy_from_slice(&len.to_be_bytes());
    r
}
