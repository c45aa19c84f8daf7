//! The 82540EM's transmit and receive rings (section 3).

use super::e1000::*;
use super::{finish_checksum, segment, Headers, MAX_FRAME, MAX_GSO};
use crate::ctx::Ctx;

const RCTL_EN: u32 = 2;
const RCTL_UPE: u32 = 8;
const RCTL_MPE: u32 = 0x10;
const RCTL_LPE: u32 = 0x20;
const RCTL_BAM: u32 = 0x8000;
const RCTL_VFE: u32 = 0x4_0000;
const RCTL_BSEX: u32 = 1 << 25;
const RCTL_SECRC: u32 = 1 << 26;
const TCTL_EN: u32 = 2;
const CTRL_VME: u32 = 1 << 30;

/// Descriptors worked through at once, and the pause in ns until the next.
const BURST: u32 = 1024;
const BURST_GAP: u64 = 20_000;

const CMD_EOP: u8 = 1;
const CMD_IC: u8 = 4;
const CMD_TSE: u8 = 4;
const CMD_RS: u8 = 8;
const CMD_DEXT: u8 = 0x20;
const CMD_VLE: u8 = 0x40;
const POPTS_IXSM: u8 = 1;
const POPTS_TXSM: u8 = 2;

const STA_DD: u8 = 1;
const STA_EOP: u8 = 2;
const STA_IXSM: u8 = 4;
const STA_VP: u8 = 8;

/// Frames that wait for descriptors; more are lost.
const BACKLOG: usize = 256;
/// The longest frame without LPE: header, VLAN tag, 1500 bytes.
const NORMAL: usize = 1518;

impl E1000 {
    fn ring(&self, low: usize, high: usize, len: usize) -> (u64, u32) {
        let base = u64::from(self.reg(low)) | u64::from(self.reg(high)) << 32;
        (base, self.reg(len) / 16)
    }

    /// Work through the transmit ring from head to tail.
    pub fn transmit(&mut self, ctx: &mut Ctx) {
        if self.reg(TCTL) & TCTL_EN == 0 || !self.pci.master() {
            return;
        }
        let (base, count) = self.ring(TDBAL, TDBAH, TDLEN);
        let mut cause = 0;
        let mut head = self.reg(TDH);
        let tail = self.reg(TDT);
        if count == 0 || head >= count {
            return;
        }
        // What one kick moves is bounded; a timer goes on with the rest. A tail outside the ring is never
        // reached: once round is enough.
        for i in 0..count {
            if head == tail {
                break;
            }
            if i == BURST {
                ctx.set_timer(TX_TIMER, Some(ctx.now + BURST_GAP));
                break;
            }
            let at = base.wrapping_add(u64::from(head) * 16);
            let mut d = [0; 16];
            ctx.dma_read(at, &mut d);
            self.descriptor(ctx, &d);
            let cmd = d[11];
            if cmd & CMD_RS != 0 {
                ctx.dma_write(at + 12, &[d[12] & 0xF0 | STA_DD]);
                cause |= ICR_TXDW;
            }
            head = if head + 1 == count { 0 } else { head + 1 };
            self.set(TDH, head);
        }
        if head == tail {
            cause |= ICR_TXQE;
        }
        self.cause(ctx, cause);
    }

    fn descriptor(&mut self, ctx: &mut Ctx, d: &[u8; 16]) {
        let address = u64::from_le_bytes([d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]);
        let word = |at: usize| u16::from_le_bytes([d[at], d[at + 1]]);
        let cmd = d[11];
        let extended = cmd & CMD_DEXT != 0;
        if extended && d[10] >> 4 == 0 {
            self.s.context = TxContext {
                ipcss: d[0],
                ipcso: d[1],
                ipcse: word(2),
                tucss: d[4],
                tucso: d[5],
                tucse: word(6),
                hdrlen: d[13],
                mss: word(14),
                tcp: cmd & 1 != 0,
                v4: cmd & 2 != 0,
            };
            return;
        }
        let len = if extended {
            usize::from(word(8)) | usize::from(d[10] & 15) << 16
        } else {
            usize::from(word(8))
        };
        if self.s.tx_popts.is_none() {
            self.s.tx_popts = Some(if extended { d[13] } else { 0 });
        }
        let from = self.s.tx_frame.len();
        if from + len > MAX_GSO {
            self.s.tx_overflow = true;
        } else {
            self.s.tx_frame.resize(from + len, 0);
            ctx.dma_read(address, &mut self.s.tx_frame[from..]);
        }
        if cmd & CMD_EOP == 0 {
            return;
        }
        let mut frame = std::mem::take(&mut self.s.tx_frame);
        let popts = self.s.tx_popts.take().unwrap_or(0);
        if std::mem::take(&mut self.s.tx_overflow) || frame.len() < 14 {
            return;
        }
        let tag = (cmd & CMD_VLE != 0 && self.reg(CTRL) & CTRL_VME != 0).then(|| word(14));
        let c = self.s.context;
        if extended && cmd & CMD_TSE != 0 {
            let h = Headers {
                ip: usize::from(c.ipcss),
                l4: usize::from(c.tucss),
                payload: usize::from(c.hdrlen),
                v6: !c.v4,
                tcp: c.tcp,
            };
            for f in segment(&frame, h, usize::from(c.mss).max(64)) {
                self.send(ctx, f, tag);
            }
            return;
        }
        let end = |e: u16| if e == 0 { usize::MAX } else { usize::from(e) + 1 };
        if extended {
            if popts & POPTS_TXSM != 0 {
                finish_checksum(&mut frame, c.tucss.into(), c.tucso.into(), end(c.tucse));
            }
            if popts & POPTS_IXSM != 0 {
                finish_checksum(&mut frame, c.ipcss.into(), c.ipcso.into(), end(c.ipcse));
            }
        } else if cmd & CMD_IC != 0 {
            finish_checksum(&mut frame, d[13].into(), d[10].into(), usize::MAX);
        }
        self.send(ctx, frame, tag);
    }

    fn send(&mut self, ctx: &mut Ctx, mut frame: Vec<u8>, tag: Option<u16>) {
        if frame.len() > MAX_FRAME || !self.s.link {
            return;
        }
        if let Some(tci) = tag {
            let kind = 0x8100u16.to_be_bytes();
            let tci = tci.to_be_bytes();
            frame.splice(12..12, [kind[0], kind[1], tci[0], tci[1]]);
        }
        for counter in [GPTC, TPT] {
            let n = self.reg(counter).saturating_add(1);
            self.set(counter, n);
        }
        ctx.net_tx(self.spec.index, frame);
    }

    /// A frame arrives from outside.
    pub fn arrive(&mut self, ctx: &mut Ctx, frame: &[u8]) {
        let rctl = self.reg(RCTL);
        let long = frame.len() > NORMAL && rctl & RCTL_LPE == 0;
        let fits = (14..=16_384 - 4).contains(&frame.len());
        if rctl & RCTL_EN == 0 || !self.s.link || !fits || long || !self.passes(frame) {
            return;
        }
        if self.s.backlog.len() >= BACKLOG {
            self.cause(ctx, ICR_RXO);
            return;
        }
        self.s.backlog.push_back(frame.to_vec());
        self.receive(ctx);
    }

    /// The receive address filter (section 3.2.1, 13.5).
    fn passes(&self, frame: &[u8]) -> bool {
        let rctl = self.reg(RCTL);
        if rctl & RCTL_VFE != 0 && frame.len() >= 16 && frame[12..14] == [0x81, 0] {
            let vid = usize::from(u16::from_be_bytes([frame[14], frame[15]]) & 0xFFF);
            if self.reg(VFTA + 4 * (vid >> 5)) >> (vid & 31) & 1 == 0 {
                return false;
            }
        }
        let to = &frame[..6];
        let group = to[0] & 1 != 0;
        if (!group && rctl & RCTL_UPE != 0)
            || (group && rctl & RCTL_MPE != 0)
            || (to == [0xFF; 6] && rctl & RCTL_BAM != 0)
        {
            return true;
        }
        let low = u32::from_le_bytes([to[0], to[1], to[2], to[3]]);
        let high = u32::from(u16::from_le_bytes([to[4], to[5]]));
        let exact = (0..16).any(|i| {
            let (l, h) = (self.reg(RA + 8 * i), self.reg(RA + 8 * i + 4));
            h >> 31 != 0 && l == low && h & 0xFFFF == high
        });
        if exact {
            return true;
        }
        if !group {
            return false;
        }
        let shift = [4, 3, 2, 0][(rctl >> 12 & 3) as usize];
        let hash = ((usize::from(to[5]) << 8 | usize::from(to[4])) >> shift) & 0xFFF;
        self.reg(MTA + 4 * (hash >> 5)) >> (hash & 31) & 1 != 0
    }

    /// Give waiting frames to the driver as far as it has descriptors.
    pub fn receive(&mut self, ctx: &mut Ctx) {
        let mut cause = 0;
        while let Some(frame) = self.s.backlog.front().cloned() {
            match self.store(ctx, frame) {
                Some(bits) => {
                    cause |= bits;
                    self.s.backlog.pop_front();
                }
                None => break,
            }
        }
        if cause != 0 {
            self.cause(ctx, cause);
        }
    }

    /// Put a frame into the ring; the causes it makes, or `None` if there is no room.
    fn store(&mut self, ctx: &mut Ctx, mut frame: Vec<u8>) -> Option<u32> {
        let rctl = self.reg(RCTL);
        if rctl & RCTL_EN == 0 || !self.pci.master() {
            return None;
        }
        let (base, count) = self.ring(RDBAL, RDBAH, RDLEN);
        let (mut head, tail) = (self.reg(RDH), self.reg(RDT));
        if count == 0 || head >= count || tail >= count {
            return None;
        }
        let mut status = STA_IXSM;
        let mut special = 0;
        if self.reg(CTRL) & CTRL_VME != 0 && frame.len() >= 18 && frame[12..14] == [0x81, 0] {
            special = u16::from_be_bytes([frame[14], frame[15]]);
            status |= STA_VP;
            frame.drain(12..16);
        }
        frame.resize(frame.len().max(60), 0);
        if rctl & RCTL_SECRC == 0 {
            // The place of the FCS, which nobody checks.
            frame.extend([0; 4]);
        }
        let mut size = 2048usize >> (rctl >> 16 & 3);
        if rctl & RCTL_BSEX != 0 && rctl >> 16 & 3 != 0 {
            size *= 16;
        }
        let free = (tail + count - head) % count;
        if (free as usize) * size < frame.len() {
            return None;
        }
        let mut parts = frame.chunks(size).peekable();
        while let Some(part) = parts.next() {
            let at = base.wrapping_add(u64::from(head) * 16);
            let mut d = [0; 16];
            ctx.dma_read(at, &mut d);
            let address = u64::from_le_bytes([d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]);
            ctx.dma_write(address, part);
            d[8..10].copy_from_slice(&(part.len() as u16).to_le_bytes());
            d[10..12].fill(0);
            d[12] = status | STA_DD | if parts.peek().is_none() { STA_EOP } else { 0 };
            d[13] = 0;
            d[14..16].copy_from_slice(&special.to_le_bytes());
            ctx.dma_write(at, &d);
            head = if head + 1 == count { 0 } else { head + 1 };
        }
        self.set(RDH, head);
        for counter in [GPRC, TPR] {
            let n = self.reg(counter).saturating_add(1);
            self.set(counter, n);
        }
        let left = (tail + count - head) % count;
        // The minimum threshold is a half, a quarter or an eighth of the ring.
        let low = left <= count >> ((rctl >> 8 & 3) + 1);
        Some(ICR_RXT0 | if low { ICR_RXDMT0 } else { 0 })
    }
}
