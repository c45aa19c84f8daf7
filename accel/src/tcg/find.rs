//! Finding the block to run next: by linear address, by physical address, or by decoding it.

use super::cache::{CROSSING, DEAD, JUMPS};
use super::large::Kept;
use super::op::*;
use super::paging::CodeEntry;
use super::{access, decode, jit, SoftCpu, MAX_BLOCK};

impl SoftCpu {
    /// The key under which the table by linear address has `lin` now.
    #[inline(always)]
    pub(super) fn key_of(&self, lin: u64) -> u64 {
        self.more_slots[KEY - 32 + (lin >> 63) as usize]
    }

    /// The set of a linear address in the table. (The same code in different address spaces must not share a
    /// place, so the key takes part.)
    #[inline(always)]
    pub(super) fn place(&self, lin: u64) -> usize {
        (lin ^ lin >> 13 ^ self.key_of(lin)) as usize & (JUMPS - 1)
    }

    /// The block at CS:RIP.
    #[inline(always)]
    pub(super) fn find_block(&mut self) -> R<*const Block> {
        let lin = if self.long { self.rip } else { self.segs[CS].base.wrapping_add(self.rip) & 0xFFFF_FFFF };
        let (place, key) = (self.place(lin), self.key_of(lin));
        for n in 0..2 {
            let j = self.jumps[place].0[n];
            if j.lin == lin && j.key == key {
                Block::fetch_ahead(j.block);
                // SAFETY: a block in the table is in the cache or in limbo.
                let block = unsafe { &*j.block };
                if block.key == DEAD {
                    continue;
                }
                if self.long || self.rip + block.bytes as u64 - 1 <= self.segs[CS].limit as u64 {
                    // It may have been compiled since.
                    self.jumps[place].0[n].code = self.far_entry(block, lin);
                    return Ok(j.block);
                }
            }
        }
        self.find_slow(lin)
    }

    /// The block at CS:RIP, which `from` led to.
    #[inline(always)]
    pub(super) fn follow(&mut self, from: *const Block) -> R<*const Block> {
        if !self.long {
            return self.find_block();
        }
        // SAFETY: `from` has just run, and the graveyard is empty: it is in the cache.
        let from = unsafe { &*from };
        let key = self.key_of(self.rip);
        for link in &from.links {
            let l = link.get();
            if l.rip == self.rip && l.key == key {
                Block::fetch_ahead(l.block);
                return Ok(l.block);
            }
        }
        let block = self.find_block()?;
        // Blocks of one page are dropped together: such a link never leads to one that is gone.
        // SAFETY: the block is in the cache, the lone one, or in the graveyard.
        let near = unsafe { (*block).key ^ from.key } & !0xFFF == 0 && from.key != 0;
        if near && self.cache.graveyard.is_empty() {
            let stale = from.links[0].get().key != key;
            from.links[!stale as usize].set(Link { rip: self.rip, key, block });
        }
        Ok(block)
    }

    #[inline(never)]
    fn find_slow(&mut self, lin: u64) -> R<*const Block> {
        if self.long {
            if !access::canonical(lin) {
                return self.gp(0);
            }
        } else if self.rip > self.segs[CS].limit as u64 {
            return self.gp(0);
        }
        let e = self.fetch_page(lin)?;
        if e.host.is_null() {
            return self.lone_block(lin);
        }
        let key = e.phys | lin & 0xFFF | (self.code_mode as u64) << 60;
        // Perhaps the table has it, from before translations were dropped.
        let set = &self.jumps[self.place(lin)].0;
        // SAFETY: blocks in the table are in the cache or in limbo.
        let known = (0..2)
            .find(|&n| set[n].lin == lin && !set[n].block.is_null() && unsafe { (*set[n].block).key } == key);
        let block = match known {
            Some(n) => set[n].block,
            None => {
                // SAFETY: pages of the cache stay where they are until all code is dropped, and the fetch TLB
                // with it.
                match unsafe { (*e.page).find(key) } {
                    Some(b) => b,
                    None => match self.decode_block(e, lin, key) {
                        Some(b) => self.insert_block(b),
                        None => match self.crossing_block(e, lin, key | CROSSING)? {
                            Some(b) => b,
                            None => return self.lone_block(lin),
                        },
                    },
                }
            }
        };
        // SAFETY: the block is in the cache.
        let b = unsafe { &*block };
        if !self.long && self.rip + b.bytes as u64 - 1 > self.segs[CS].limit as u64 {
            return self.lone_block(lin);
        }
        if jit::near_hole(lin) {
            // Compiled code finds only what is in the table.
            return Ok(block);
        }
        self.enter(known, lin, b);
        Ok(block)
    }

    /// How instructions are decoded.
    fn decode_mode(&self) -> u8 {
        if self.code_mode == decode::FLAT32 {
            decode::MODE32
        } else {
            self.code_mode
        }
    }

    /// Decode from one page; `None` if the first instruction crosses into the next.
    fn decode_block(&mut self, e: CodeEntry, lin: u64, key: u64) -> Option<Kept<Block>> {
        const MOST: usize = MAX_BLOCK * 15;
        let at = (lin & 0xFFF) as usize;
        let len = (4096 - at).min(MOST);
        let mut copy = [0; MOST];
        // SAFETY: `host` is a whole page of guest memory; it is copied before anything can write to it.
        copy[..len].copy_from_slice(unsafe { std::slice::from_raw_parts(e.host.add(at), len) });
        let bytes = &copy[..len];
        let mut b = Block::new(key);
        let phys = e.phys | lin & 0xFFF;
        self.mark_cut(&b, phys);
        let mut ops = std::mem::take(&mut self.cache.ops);
        ops.clear();
        loop {
            match decode::decode(&bytes[b.bytes as usize..], self.decode_mode()) {
                Ok(d) => {
                    let ends = d.ends;
                    add_op(&mut b, &mut ops, d);
                    if ends || ops.len() >= MAX_BLOCK || self.points.cut(phys + b.bytes as u64) {
                        break;
                    }
                }
                Err(_) => {
                    debug_assert!(len == 4096 - at || !ops.is_empty());
                    break;
                }
            }
        }
        let block = (!ops.is_empty()).then(|| b.finish(&ops));
        self.cache.ops = ops;
        block
    }

    /// The block of one instruction that starts in the page `e` and ends in the next. `None`: not in memory, or too close
    /// to the code segment's limit.
    fn crossing_block(&mut self, e: CodeEntry, lin: u64, key: u64) -> R<Option<*const Block>> {
        if !self.long && self.rip + 14 > self.segs[CS].limit as u64 {
            return Ok(None);
        }
        let first = 4096 - (lin & 0xFFF) as usize;
        let mut at = lin.wrapping_add(first as u64);
        if self.long && !access::canonical(at) {
            return self.gp(0);
        }
        if !self.lma() {
            at &= 0xFFFF_FFFF;
        }
        let next = self.fetch_page(at)?;
        if next.host.is_null() {
            return Ok(None);
        }
        // SAFETY: as in `find_slow`. (Filling the fetch TLB does not move pages.)
        if let Some(b) = unsafe { (*e.page).find(key) } {
            // SAFETY: the block is in the cache.
            return Ok(unsafe { (*b).second == next.phys }.then_some(b));
        }
        let mut bytes = [0; 15];
        // SAFETY: both are whole pages of guest memory; `first` bytes, at most 14, are left of the one.
        unsafe {
            bytes[..first].copy_from_slice(std::slice::from_raw_parts(e.host.add(4096 - first), first));
            bytes[first..].copy_from_slice(std::slice::from_raw_parts(next.host, 15 - first));
        }
        let Ok(d) = decode::decode(&bytes, self.decode_mode()) else { return Ok(None) };
        let mut b = Block::new(key);
        let phys = e.phys | lin & 0xFFF;
        self.mark_cut(&b, phys);
        let mut ops = Vec::with_capacity(1);
        add_op(&mut b, &mut ops, d);
        b.second = next.phys;
        Ok(Some(self.insert_block(b.finish(&ops))))
    }

    /// One instruction that runs into the code segment's limit, or is not in memory: looked at afresh each time.
    fn lone_block(&mut self, lin: u64) -> R<*const Block> {
        let mut bytes = Vec::with_capacity(15);
        let mut page = self.fetch_page(lin)?;
        let first = page.phys;
        let limit = self.segs[CS].limit as u64;
        loop {
            let n = bytes.len() as u64;
            if !self.long && self.rip + n > limit {
                return self.gp(0);
            }
            let mut at = lin.wrapping_add(n);
            if !self.lma() {
                at &= 0xFFFF_FFFF;
            }
            if at & !0xFFF != page.tag & !0xFFF {
                if self.long && !access::canonical(at) {
                    return self.gp(0);
                }
                page = self.fetch_page(at)?;
            }
            let v = if page.host.is_null() {
                self.phys_load(page.phys | at & 0xFFF, 1) as u8
            } else {
                // SAFETY: `host` is a whole page of guest memory.
                unsafe { *page.host.add((at & 0xFFF) as usize) }
            };
            bytes.push(v);
            if let Ok(d) = decode::decode(&bytes, self.decode_mode()) {
                let mut b = Block::new(0);
                self.mark_cut(&b, first | lin & 0xFFF);
                let mut ops = Vec::with_capacity(1);
                add_op(&mut b, &mut ops, d);
                let b = b.finish(&ops);
                let p: *const Block = &*b;
                if let Some(old) = self.lone.replace(b) {
                    self.cache.graveyard.push(old);
                }
                return Ok(p);
            }
        }
    }
}

fn add_op(b: &mut Block, ops: &mut Vec<Op>, d: decode::Decoded) {
    let mut op = d.op;
    op.idx = ops.len() as u8;
    op.off = b.bytes as u16;
    if op.base == BLOCKIP {
        op.disp += op.off as i64 + op.len as i64;
    }
    b.bytes += op.len as u32;
    ops.push(op);
    if let Some(vec) = d.vec {
        b.vecs = std::mem::take(&mut b.vecs).into_vec().into_iter().chain([vec]).collect();
    }
}
