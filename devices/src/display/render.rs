//! From the registers and the memory of a VGA to a picture.

use super::vga::Vga;
use super::Picture;

/// The largest text screen and VGA picture that is drawn, whatever the registers say.
const MAX_CELLS: usize = 256;
const MAX_LINES: usize = 2048;

/// How a text screen is laid out.
struct Text {
    columns: usize,
    rows: usize,
    /// Pixels of a cell.
    cell: (usize, usize),
    /// Where the first cell is in video memory, and how far it is from row to row.
    start: usize,
    pitch: usize,
}

impl Vga {
    fn byte(&self, at: usize) -> u8 {
        self.memory[at & (self.memory.len() - 1)]
    }

    /// One of the 256 colours.
    fn colour(&self, index: usize) -> u32 {
        let wide = self.r.dispi.wide_dac();
        let part = |i: usize| {
            let v = u32::from(self.r.palette[(index & 0xFF) * 3 + i]);
            // Six bits become eight as QEMU makes them: the lowest one is repeated.
            if wide {
                v
            } else {
                ((v & 63) << 2) | ((v & 1) * 3)
            }
        };
        part(0) << 16 | part(1) << 8 | part(2)
    }

    /// The 16 colours that the attribute controller selects.
    fn palette16(&self) -> [u32; 16] {
        let a = &self.r.attr;
        std::array::from_fn(|i| {
            let index = match a[0x10] & 0x80 {
                0 => (a[0x14] & 0xC) << 4 | a[i] & 0x3F,
                _ => (a[0x14] & 0xF) << 4 | a[i] & 0xF,
            };
            self.colour(index.into())
        })
    }

    /// Lines that the CRT controller shows.
    fn lines(&self) -> usize {
        let c = &self.r.crtc;
        let high = usize::from(c[7] & 2) << 7 | usize::from(c[7] & 0x40) << 3;
        ((usize::from(c[0x12]) | high) + 1).min(MAX_LINES)
    }

    /// Where the picture starts in video memory.
    fn start(&self) -> usize {
        4 * (usize::from(self.r.crtc[0xC]) << 8 | usize::from(self.r.crtc[0xD]))
    }

    fn columns(&self) -> usize {
        (usize::from(self.r.crtc[1]) + 1).min(MAX_CELLS)
    }

    /// The text screen's layout, if text is shown.
    fn layout(&self) -> Option<Text> {
        let r = &self.r;
        if r.gfx[6] & 1 != 0 || r.dispi.on() {
            return None;
        }
        let width = match r.seq[1] {
            v if v & 8 != 0 => 16,
            v if v & 1 != 0 => 8,
            _ => 9,
        };
        let height = usize::from(r.crtc[9] & 31) + 1;
        Some(Text {
            columns: self.columns(),
            rows: (self.lines() / height).min(MAX_CELLS),
            cell: (width, height),
            start: self.start(),
            pitch: usize::from(r.crtc[0x13]) << 3,
        })
    }

    /// The characters of the text screen.
    pub(super) fn cells(&self) -> Option<Vec<String>> {
        let t = self.layout()?;
        let cell = |row: usize, column: usize| match self.byte(t.start + row * t.pitch + 4 * column) {
            c @ 0x20..=0x7E => char::from(c),
            _ => ' ',
        };
        Some((0..t.rows).map(|row| (0..t.columns).map(|column| cell(row, column)).collect()).collect())
    }

    /// The picture as it is now.
    pub(super) fn draw(&self) -> Picture {
        let on = self.r.attr_index & 0x20 != 0;
        let mut picture = match self.layout() {
            Some(text) => self.draw_text(&text),
            None if self.r.dispi.on() => self.draw_mode(),
            None => self.draw_graphics(),
        };
        if !on {
            picture.pixels.fill(0);
        }
        picture
    }

    fn draw_text(&self, t: &Text) -> Picture {
        let (width, height) = (t.columns * t.cell.0, t.rows * t.cell.1);
        let mut pixels = vec![0; width * height];
        let colours = self.palette16();
        let c = &self.r.crtc;
        let cursor = 4 * (usize::from(c[0xE]) << 8 | usize::from(c[0xF]));
        let cursor_lines = match c[0xA] & 0x20 {
            0 => usize::from(c[0xA] & 31)..usize::from(c[0xB] & 31) + 1,
            _ => 0..0,
        };
        // Bit 3 of the attribute chooses between two fonts in plane 2.
        let map = usize::from(self.r.seq[3]);
        let font = |bank: usize| bank * 8192 * 4 + 2;
        let fonts = [font(map >> 4 & 1 | map << 1 & 6), font(map >> 5 & 1 | map >> 1 & 6)];
        let line_graphics = self.r.attr[0x10] & 4 != 0;
        for (row, column) in (0..t.rows).flat_map(|r| (0..t.columns).map(move |c| (r, c))) {
            let at = t.start + row * t.pitch + 4 * column;
            let (code, attribute) = (self.byte(at), self.byte(at + 1));
            let ink = colours[usize::from(attribute & 15)];
            let paper = colours[usize::from(attribute >> 4)];
            let glyph = fonts[usize::from(attribute >> 3 & 1)] + 128 * usize::from(code);
            for y in 0..t.cell.1 {
                let bits = u32::from(self.byte(glyph + 4 * y));
                let all = at == cursor && cursor_lines.contains(&y);
                let first = (row * t.cell.1 + y) * width + column * t.cell.0;
                for x in 0..t.cell.0 {
                    let lit = match (t.cell.0, x) {
                        (16, _) => bits >> (7 - x / 2) & 1 != 0,
                        // The ninth column repeats the eighth in frames, and is empty elsewhere.
                        (_, 8) => bits & 1 != 0 && line_graphics && (0xB0..=0xDF).contains(&code),
                        _ => bits >> (7 - x) & 1 != 0,
                    };
                    pixels[first + x] = if lit || all { ink } else { paper };
                }
            }
        }
        Picture { width: width as u32, height: height as u32, pixels }
    }

    /// A mode of the display interface.
    fn draw_mode(&self) -> Picture {
        let d = &self.r.dispi;
        let (width, height, pitch, start) = (d.width(), d.height(), d.pitch(), d.start());
        let mut pixels = Vec::with_capacity(width * height);
        let five = |v: u32| (v & 31) << 3 | (v & 31) >> 2;
        let six = |v: u32| (v & 63) << 2 | (v & 63) >> 4;
        let all: Vec<u32> = (0..256).map(|i| self.colour(i)).collect();
        for y in 0..height {
            let line = start + y * pitch;
            let little =
                |at: usize, n: usize| (0..n).fold(0, |v, i| v | u32::from(self.byte(at + i)) << (8 * i));
            match d.bpp() {
                4 => pixels.extend(self.planar_line(line, width)),
                8 => pixels.extend((0..width).map(|x| all[usize::from(self.byte(line + x))])),
                15 => pixels.extend((0..width).map(|x| {
                    let v = little(line + 2 * x, 2);
                    five(v >> 10) << 16 | five(v >> 5) << 8 | five(v)
                })),
                16 => pixels.extend((0..width).map(|x| {
                    let v = little(line + 2 * x, 2);
                    five(v >> 11) << 16 | six(v >> 5) << 8 | five(v)
                })),
                24 => pixels.extend((0..width).map(|x| little(line + 3 * x, 3))),
                _ => pixels.extend((0..width).map(|x| little(line + 4 * x, 3))),
            }
        }
        Picture { width: width as u32, height: height as u32, pixels }
    }

    /// A line of 16 colours out of four planes.
    fn planar_line(&self, at: usize, width: usize) -> impl Iterator<Item = u32> + '_ {
        let colours = self.palette16();
        let enabled = usize::from(self.r.attr[0x12] & 15);
        (0..width).map(move |x| {
            let group = at + x / 8 * 4;
            let bit = |p: usize| usize::from(self.byte(group + p) >> (7 - x % 8) & 1) << p;
            colours[(bit(0) | bit(1) | bit(2) | bit(3)) & enabled]
        })
    }

    /// The VGA's own graphics modes.
    fn draw_graphics(&self) -> Picture {
        let c = &self.r.crtc;
        let (height, mut width) = (self.lines(), self.columns() * 8);
        let shift = self.r.gfx[5] >> 5 & 3;
        // Pixels are twice as wide with half the dot clock.
        let half = self.r.seq[1] & 8 != 0 && shift < 2;
        if half {
            width *= 2;
        }
        let doubled = usize::from(c[9] >> 7);
        let repeat = if shift == 1 { doubled + 1 } else { (usize::from(c[9] & 31) + 1) << doubled };
        let split = usize::from(c[0x18]) | usize::from(c[7] & 0x10) << 4 | usize::from(c[9] & 0x40) << 3;
        let pitch = usize::from(c[0x13]) << 3;
        let (mut first, mut row) = (self.start(), 0);
        let mut pixels = Vec::with_capacity(width * height);
        for y in 0..height {
            let line = row / repeat;
            let mut at = first + line * pitch;
            // CGA's and Hercules' ways of putting rows into banks.
            if c[0x17] & 1 == 0 {
                let bit = 14 + usize::from(c[0x17] >> 6 & 1);
                at = at & !(1 << bit) | (row & 1) << bit;
            }
            if c[0x17] & 2 == 0 {
                at = at & !(1 << 15) | (row & 2) << 14;
            }
            match shift {
                0 if half => pixels.extend(self.planar_line(at, width / 2).flat_map(|p| [p, p])),
                0 => pixels.extend(self.planar_line(at, width)),
                1 => pixels.extend(self.cga_line(at, width, half)),
                _ => pixels.extend((0..width).map(|x| self.colour(self.byte(at + x / 2).into()))),
            }
            row += 1;
            if y == split {
                (first, row) = (0, 0);
            }
        }
        Picture { width: width as u32, height: height as u32, pixels }
    }

    /// A line of four colours, two bits each, out of planes 0 and 1.
    fn cga_line(&self, at: usize, width: usize, half: bool) -> impl Iterator<Item = u32> + '_ {
        let colours = self.palette16();
        let enabled = usize::from(self.r.attr[0x12] & 15);
        (0..width).map(move |x| {
            let x = if half { x / 2 } else { x };
            let plane = x / 4 % 2;
            let low = usize::from(self.byte(at + x / 8 * 4 + plane) >> (6 - 2 * (x % 4)) & 3);
            let high = usize::from(self.byte(at + x / 8 * 4 + plane + 2) >> (6 - 2 * (x % 4)) & 3);
            colours[(low | high << 2) & enabled]
        })
    }
}
