//! ATAPI CD-ROM drives (ATA/ATAPI-6 packet feature set; SFF-8020i; MMC-3).

use super::ata::{put_string, to_bytes};
use super::channel::{Channel, Phase, ABORTED, DRQ, ERR, READY, SEEK};
use crate::ctx::Ctx;
use crate::door::GuestEvent;

const BLOCK: u64 = 2048;
const NOT_READY: u8 = 2;
const ILLEGAL_REQUEST: u8 = 5;
const UNIT_ATTENTION: u8 = 6;
const NO_MEDIUM: u8 = 0x3A;
const INVALID_OPCODE: u8 = 0x20;
const OUT_OF_RANGE: u8 = 0x21;
const INVALID_FIELD: u8 = 0x24;
const MEDIUM_CHANGED: u8 = 0x28;
const REMOVAL_PREVENTED: u8 = 0x53;

fn be16(b: &[u8], at: usize) -> u32 {
    u32::from(b[at]) << 8 | u32::from(b[at + 1])
}

fn be32(b: &[u8], at: usize) -> u32 {
    be16(b, at) << 16 | be16(b, at + 2)
}

/// Minutes, seconds, frames of a block address.
fn msf(lba: u32) -> [u8; 4] {
    let f = lba.wrapping_add(150);
    [0, (f / 75 / 60) as u8, (f / 75 % 60) as u8, (f % 75) as u8]
}

impl Channel {
    pub fn atapi_command(&mut self, ctx: &mut Ctx, command: u8) {
        match command {
            0x08 => self.device_reset(),
            0xA0 => {
                self.s.dma = self.current().feature[0] & 1 != 0;
                // Interrupt reason: a command packet is wanted.
                self.current().count[0] = 1;
                self.s.packet = true;
                self.s.phase = Phase::Packet;
                self.accept(12);
            }
            0xA1 => {
                self.s.dma = self.is_port();
                let data = self.identify_packet();
                self.reply(ctx, data, 512);
            }
            0xEC | 0x20 | 0x21 => {
                // The signature tells a prober that this is a packet device.
                let d = self.current();
                d.signature(true);
                self.fail(ctx, ABORTED);
            }
            0xEF => self.set_features(ctx),
            0x90 => self.ata_command(ctx, command),
            0xE0..=0xE3 | 0xE6 => self.succeed(ctx),
            0xE5 => {
                self.current().count[0] = 0xFF;
                self.succeed(ctx);
            }
            _ => self.fail(ctx, ABORTED),
        }
    }

    fn identify_packet(&mut self) -> Vec<u8> {
        let (mw, ultra) = self.modes();
        let mut w = [0u16; 256];
        // CD-ROM, removable, DRQ within 50 us, 12-byte packets.
        w[0] = 0x85C0;
        let serial = self.spec[self.selected()].as_ref().map_or("", |s| &s.serial);
        put_string(&mut w[10..20], serial);
        w[20] = 3;
        w[21] = 512;
        w[22] = 4;
        put_string(&mut w[23..27], "2.5+");
        put_string(&mut w[27..47], "QEMU DVD-ROM");
        w[48] = 1;
        w[49] = 0x0300;
        w[53] = 7;
        w[63] = mw;
        w[64] = 3;
        w[65..67].fill(0xB4);
        w[67..69].fill(0x12C);
        w[71..73].fill(30);
        w[80] = 0x1E;
        w[88] = ultra;
        to_bytes(&w)
    }

    /// The whole command ended well.
    pub fn packet_succeed(&mut self, ctx: &mut Ctx) {
        let d = self.current();
        d.sense = 0;
        d.asc = 0;
        d.error = 0;
        d.count[0] = 3;
        self.s.dma = false;
        self.succeed(ctx);
    }

    /// The command ended with CHECK CONDITION.
    pub fn packet_fail(&mut self, ctx: &mut Ctx, sense: u8, asc: u8) {
        self.stop();
        self.s.dma = false;
        let d = self.current();
        d.sense = sense;
        d.asc = asc;
        d.error = sense << 4 | ABORTED;
        d.status = READY | SEEK | ERR;
        d.count[0] = 3;
        self.raise(ctx);
    }

    fn medium_blocks(&mut self) -> Option<u64> {
        let d = self.current();
        let blocks = d.bytes / BLOCK;
        (!d.open && blocks > 0).then_some(blocks)
    }

    /// Answer with at most `limit` bytes.
    fn packet_reply(&mut self, ctx: &mut Ctx, mut data: Vec<u8>, limit: u32) {
        data.truncate(limit as usize);
        if data.is_empty() {
            return self.packet_succeed(ctx);
        }
        let block = self.byte_limit();
        self.reply(ctx, data, block);
    }

    /// What the guest takes in one DRQ block (the byte count registers).
    fn byte_limit(&mut self) -> u32 {
        let d = self.current();
        let n = u32::from(d.lba[1][0]) | u32::from(d.lba[2][0]) << 8;
        match n {
            0 => 0xFFFE,
            0xFFFF => 0xFFFE,
            n => (n & !1).max(2),
        }
    }

    pub fn packet(&mut self, ctx: &mut Ctx) {
        let mut cdb = [0u8; 12];
        let n = self.s.buffer.len().min(12);
        cdb[..n].copy_from_slice(&self.s.buffer[..n]);
        self.s.buffer.clear();
        self.s.at = 0;
        self.s.block_end = 0;
        let op = cdb[0];
        // A change of medium is told once, to all but INQUIRY, REQUEST SENSE and GET EVENT STATUS.
        if !matches!(op, 0x03 | 0x12 | 0x4A | 0x46) && std::mem::take(&mut self.current().attention) {
            return self.packet_fail(ctx, UNIT_ATTENTION, MEDIUM_CHANGED);
        }
        let medium = self.medium_blocks();
        let needs_medium = matches!(op, 0x00 | 0x25 | 0x28 | 0x2B | 0x43 | 0x51 | 0xA8 | 0xBE | 0x42);
        if needs_medium && medium.is_none() {
            return self.packet_fail(ctx, NOT_READY, NO_MEDIUM);
        }
        let blocks = medium.unwrap_or(0);
        match op {
            0x00 | 0x2B | 0xBB => self.packet_succeed(ctx),
            // START STOP UNIT with LoEj: the guest moves the tray.
            0x1B => {
                let device = self.spec[self.selected()].as_ref().map_or(String::new(), |s| s.device.clone());
                let d = self.current();
                let open = cdb[4] & 1 == 0;
                if cdb[4] & 2 != 0 && d.open != open {
                    if open && d.locked {
                        return self.packet_fail(ctx, ILLEGAL_REQUEST, REMOVAL_PREVENTED);
                    }
                    d.open = open;
                    d.attention |= !open;
                    ctx.event(GuestEvent::TrayMoved { device, open });
                }
                self.packet_succeed(ctx);
            }
            0x1E => {
                self.current().locked = cdb[4] & 1 != 0;
                self.packet_succeed(ctx);
            }
            0x03 => {
                let d = self.current();
                let mut r = vec![0; 18];
                r[0] = 0xF0;
                r[2] = d.sense;
                r[7] = 10;
                r[12] = d.asc;
                self.packet_reply(ctx, r, u32::from(cdb[4]));
            }
            0x12 => {
                if cdb[1] & 1 != 0 {
                    return self.packet_fail(ctx, ILLEGAL_REQUEST, INVALID_FIELD);
                }
                let mut r = vec![5, 0x80, 0, 0x21, 31, 0, 0, 0];
                r.extend(b"QEMU    QEMU DVD-ROM    2.5+");
                self.packet_reply(ctx, r, be16(&cdb, 3));
            }
            0x25 => {
                let mut r = ((blocks - 1).min(0xFFFF_FFFF) as u32).to_be_bytes().to_vec();
                r.extend((BLOCK as u32).to_be_bytes());
                self.packet_reply(ctx, r, 8);
            }
            0x28 => self.packet_read(ctx, be32(&cdb, 2), be16(&cdb, 7)),
            0xA8 => self.packet_read(ctx, be32(&cdb, 2), be32(&cdb, 6)),
            0xBE => {
                let count = u32::from(cdb[6]) << 16 | be16(&cdb, 7);
                // Only user data of 2048 bytes a block.
                match cdb[9] & 0xF8 {
                    0 => self.packet_succeed(ctx),
                    0x10 => self.packet_read(ctx, be32(&cdb, 2), count),
                    _ => self.packet_fail(ctx, ILLEGAL_REQUEST, INVALID_FIELD),
                }
            }
            0x43 => self.read_toc(ctx, &cdb, blocks as u32),
            0x46 => self.get_configuration(ctx, &cdb, medium),
            0x4A => {
                if cdb[1] & 1 == 0 {
                    return self.packet_fail(ctx, ILLEGAL_REQUEST, INVALID_FIELD);
                }
                let mut r = vec![0, 6, 4, 0x10];
                if cdb[4] & 0x10 == 0 {
                    r = vec![0, 2, 0x80, 0x10];
                } else {
                    r.extend([0, if medium.is_some() { 2 } else { 0 }, 0, 0]);
                }
                self.packet_reply(ctx, r, be16(&cdb, 7));
            }
            0x51 => {
                let mut r = vec![0, 32, 0x0E, 1, 1, 1, 1, 0x20];
                r.resize(34, 0);
                self.packet_reply(ctx, r, be16(&cdb, 7));
            }
            0x5A => self.mode_sense(ctx, &cdb, medium.is_some()),
            0xBD => {
                let r = vec![0, 0, 0, 0, 0, 1, 0, 0];
                self.packet_reply(ctx, r, be16(&cdb, 8));
            }
            _ => self.packet_fail(ctx, ILLEGAL_REQUEST, INVALID_OPCODE),
        }
    }

    fn packet_read(&mut self, ctx: &mut Ctx, lba: u32, count: u32) {
        let Some(blocks) = self.medium_blocks() else {
            return self.packet_fail(ctx, NOT_READY, NO_MEDIUM);
        };
        if count == 0 {
            return self.packet_succeed(ctx);
        }
        if u64::from(lba) + u64::from(count) > blocks {
            return self.packet_fail(ctx, ILLEGAL_REQUEST, OUT_OF_RANGE);
        }
        self.s.offset = u64::from(lba) * BLOCK;
        self.s.left = u64::from(count) * BLOCK;
        self.s.block = self.byte_limit();
        self.s.phase = Phase::In;
        if self.s.dma {
            self.current().status = READY | SEEK | DRQ;
            self.current().count[0] = 2;
            self.dma_start(ctx);
        } else {
            self.fetch(ctx);
        }
    }

    fn read_toc(&mut self, ctx: &mut Ctx, cdb: &[u8; 12], blocks: u32) {
        let in_msf = cdb[1] & 2 != 0;
        let format = match cdb[2] & 15 {
            0 => cdb[9] >> 6,
            f => f,
        };
        let address = |lba: u32| if in_msf { msf(lba) } else { lba.to_be_bytes() };
        let r = match format {
            0 => {
                let start = cdb[6];
                if start > 1 && start != 0xAA {
                    return self.packet_fail(ctx, ILLEGAL_REQUEST, INVALID_FIELD);
                }
                let mut r = vec![0, 0, 1, 1];
                if start <= 1 {
                    r.extend([0, 0x14, 1, 0]);
                    r.extend(address(0));
                }
                r.extend([0, 0x16, 0xAA, 0]);
                r.extend(address(blocks));
                let len = (r.len() - 2) as u16;
                r[..2].copy_from_slice(&len.to_be_bytes());
                r
            }
            1 => {
                let mut r = vec![0, 10, 1, 1, 0, 0x14, 1, 0];
                r.extend(address(0));
                r
            }
            2 => {
                let mut r = vec![0, 0, 1, 1];
                for point in [0xA0u8, 0xA1, 0xA2, 1] {
                    r.extend([1, if point == 1 { 0x14 } else { 0x16 }, 0, point, 0, 0, 0]);
                    r.extend(match point {
                        0xA2 => address(blocks),
                        1 => address(0),
                        _ => [0, 1, 0, 0],
                    });
                }
                let len = (r.len() - 2) as u16;
                r[..2].copy_from_slice(&len.to_be_bytes());
                r
            }
            _ => return self.packet_fail(ctx, ILLEGAL_REQUEST, INVALID_FIELD),
        };
        self.packet_reply(ctx, r, be16(cdb, 7));
    }

    fn get_configuration(&mut self, ctx: &mut Ctx, cdb: &[u8; 12], medium: Option<u64>) {
        let r = crate::scsi::mmc::configuration(medium, 2);
        self.packet_reply(ctx, r, be16(cdb, 7));
    }

    fn mode_sense(&mut self, ctx: &mut Ctx, cdb: &[u8; 12], medium: bool) {
        if cdb[2] >> 6 == 3 {
            return self.packet_fail(ctx, ILLEGAL_REQUEST, 0x39);
        }
        let locked = self.current().locked;
        let page = match cdb[2] & 0x3F {
            1 => vec![1, 6, 0, 5, 0, 0, 0, 0],
            0x0E => {
                let mut p = vec![0x0E, 14, 4];
                p.resize(16, 0);
                p
            }
            0x2A => {
                let mut p = vec![0x2A, 20, 0x3B, 0, 0x70, 0x71, 0x29 | u8::from(locked) << 1, 0];
                p.extend(706u16.to_be_bytes());
                p.extend([0, 2]);
                p.extend(512u16.to_be_bytes());
                p.extend(706u16.to_be_bytes());
                p.resize(22, 0);
                p
            }
            _ => return self.packet_fail(ctx, ILLEGAL_REQUEST, INVALID_FIELD),
        };
        // Medium type: 120 mm data disc, or door closed without a disc.
        let mut r = vec![0, 0, if medium { 1 } else { 0x70 }, 0, 0, 0, 0, 0];
        r.extend(page);
        let len = (r.len() - 2) as u16;
        r[..2].copy_from_slice(&len.to_be_bytes());
        self.packet_reply(ctx, r, be16(cdb, 7));
    }
}
