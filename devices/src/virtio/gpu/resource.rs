//! Pictures that the driver has made: their pixels, and the guest memory that they are copied from.

use serde::{Deserialize, Serialize};

use super::super::Piece;
use super::Rect;
use crate::ctx::Ctx;
use crate::display::Picture;

/// Pieces of guest memory that one command may name.
pub const MAX_PIECES: usize = 16_384;
/// Bytes of a pixel, in every format that there is.
const PIXEL: usize = 4;

/// A picture.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Resource {
    format: Format,
    width: u32,
    height: u32,
    backing: Vec<Piece>,
    /// Where each piece begins, counted from the first one's start.
    #[serde(skip)]
    starts: Vec<u64>,
    /// Something was copied into it; until then it is black and takes no memory.
    filled: bool,
    #[serde(skip)]
    pixels: Vec<u8>,
}

/// Where in a pixel red, green and blue are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Format {
    red: u8,
    green: u8,
    blue: u8,
}

impl Format {
    /// A format by its number (5.7.6.8, RESOURCE_CREATE_2D); its name has the order of the bytes.
    pub fn of(number: u32) -> Option<Format> {
        let (red, green, blue) = match number {
            // B8G8R8A8, B8G8R8X8
            1 | 2 => (2, 1, 0),
            // A8R8G8B8, X8R8G8B8
            3 | 4 => (1, 2, 3),
            // R8G8B8A8, R8G8B8X8
            67 | 134 => (0, 1, 2),
            // X8B8G8R8, A8B8G8R8
            68 | 121 => (3, 2, 1),
            _ => return None,
        };
        Some(Format { red, green, blue })
    }

    fn is_one(self) -> bool {
        [1, 3, 67, 68].iter().any(|n| Format::of(*n) == Some(self))
    }
}

impl Resource {
    /// A black picture.
    pub fn new(format: Format, width: u32, height: u32) -> Resource {
        Resource {
            format,
            width,
            height,
            backing: Vec::new(),
            starts: Vec::new(),
            filled: false,
            pixels: Vec::new(),
        }
    }

    /// Bytes that its pixels take.
    pub fn bytes(&self) -> u64 {
        // Both are 32-bit numbers: four times their product can be more than 64 bits hold.
        u64::from(self.width).saturating_mul(self.height.into()).saturating_mul(PIXEL as u64)
    }

    /// Whether a part of it is one.
    pub fn has(&self, rect: Rect) -> bool {
        rect.is_in(self.width, self.height)
    }

    /// Pieces of guest memory that it has.
    pub fn pieces(&self) -> usize {
        self.backing.len()
    }

    /// The guest memory that is copied from now on.
    pub fn attach(&mut self, backing: Vec<Piece>) {
        let starts = backing.iter().scan(0u64, |at, p| {
            let start = *at;
            *at += u64::from(p.len);
            Some(start)
        });
        self.starts = starts.collect();
        self.backing = backing;
    }

    /// Copy a part of the picture out of guest memory, from `offset` of that on. False: there is no memory for it.
    pub fn transfer(&mut self, ctx: &Ctx, rect: Rect, offset: u64) -> bool {
        let Ok(size) = usize::try_from(self.bytes()) else { return false };
        if self.pixels.is_empty() && size > 0 {
            if self.pixels.try_reserve_exact(size).is_err() {
                return false;
            }
            self.pixels.resize(size, 0);
            self.filled = true;
        }
        let stride = self.width as usize * PIXEL;
        let (left, line) = (rect.x as usize * PIXEL, rect.width as usize * PIXEL);
        let first = rect.y as usize;
        let mut pixels = std::mem::take(&mut self.pixels);
        if line == stride {
            // Whole lines lie one behind the other.
            let lines = first * stride..(first + rect.height as usize) * stride;
            if let Some(part) = pixels.get_mut(lines) {
                self.read(ctx, offset, part);
            }
        } else {
            for (row, n) in (first..first + rect.height as usize).zip(0u64..) {
                let at = row * stride + left;
                if let Some(part) = pixels.get_mut(at..at + line) {
                    self.read(ctx, offset.saturating_add(n * stride as u64), part);
                }
            }
        }
        self.pixels = pixels;
        true
    }

    /// Read from the guest memory that belongs to the picture; what lies behind its end stays as it is.
    fn read(&self, ctx: &Ctx, at: u64, out: &mut [u8]) {
        let mut next = self.starts.partition_point(|start| *start <= at).saturating_sub(1);
        let (mut at, mut out) = (at, out);
        while let (Some(piece), Some(start), false) =
            (self.backing.get(next), self.starts.get(next), out.is_empty())
        {
            let skip = at - start;
            let n = u64::from(piece.len).saturating_sub(skip).min(out.len() as u64) as usize;
            let (now, later) = out.split_at_mut(n);
            if n > 0 {
                ctx.dma_read(piece.addr.wrapping_add(skip), now);
            }
            (at, out, next) = (at + n as u64, later, next + 1);
        }
    }

    /// A part of it, as people see it.
    pub fn picture(&self, rect: Rect) -> Picture {
        let mut out = Picture::black(rect.width, rect.height);
        if !self.filled || !self.has(rect) {
            return out;
        }
        let f = self.format;
        let stride = self.width as usize * PIXEL;
        for (row, line) in out.pixels.chunks_exact_mut(rect.width.max(1) as usize).enumerate() {
            let at = (rect.y as usize + row) * stride + rect.x as usize * PIXEL;
            let from = self.pixels.get(at..).unwrap_or_default();
            for (pixel, p) in line.iter_mut().zip(from.chunks_exact(PIXEL)) {
                let part = |i: u8| u32::from(p[usize::from(i & 3)]);
                *pixel = part(f.red) << 16 | part(f.green) << 8 | part(f.blue);
            }
        }
        out
    }

    /// All of it as 0xAARRGGBB, if it has this size; the byte of a pixel that is no colour says how opaque it is.
    pub fn pointer(&self, width: u32, height: u32) -> Option<Vec<u32>> {
        if (self.width, self.height) != (width, height) {
            return None;
        }
        let f = self.format;
        let alpha = 6 - (f.red + f.green + f.blue);
        let part = |p: &[u8], i: u8| u32::from(p[usize::from(i & 3)]);
        let one =
            |p: &[u8]| part(p, alpha) << 24 | part(p, f.red) << 16 | part(p, f.green) << 8 | part(p, f.blue);
        let mut out: Vec<u32> = self.pixels.chunks_exact(PIXEL).map(one).collect();
        out.resize(width as usize * height as usize, 0);
        Some(out)
    }

    /// The pixels, to be saved.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// Take the pixels from the start of `bytes`; what follows them. None: this is no state of such a picture.
    pub fn restore<'a>(&mut self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        if !self.format.is_one() || self.backing.len() > MAX_PIECES {
            return None;
        }
        let backing = std::mem::take(&mut self.backing);
        self.attach(backing);
        let size = if self.filled { usize::try_from(self.bytes()).ok()? } else { 0 };
        let (mine, rest) = bytes.split_at_checked(size)?;
        self.pixels = mine.to_vec();
        Some(rest)
    }
}
