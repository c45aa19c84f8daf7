//! Video cards, and what they show.

mod dispi;
pub mod edid;
mod render;
mod stdvga;
mod vga;
mod virtio_vga;

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use stdvga::StdVga;
pub use virtio_vga::VirtioVga;

/// The cards with a VGA and a video BIOS, and the file of the latter in SeaBIOS' package.
pub const VGA_CARDS: [(&str, &str); 2] =
    [("VGA", "vgabios-stdvga.bin"), ("virtio-vga", "vgabios-virtio.bin")];

/// What a screen shows at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Picture {
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
    /// Rows from the top, 0x00RRGGBB each.
    pub pixels: Vec<u32>,
}

/// The shape of a pointer that whoever looks is to draw.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pointer {
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
    /// The pixel that points.
    pub hot: (u32, u32),
    /// Rows from the top, 0xAARRGGBB each.
    pub pixels: Vec<u32>,
}

impl Picture {
    /// A black picture.
    pub fn black(width: u32, height: u32) -> Picture {
        Picture { width, height, pixels: vec![0; width as usize * height as usize] }
    }
}

/// A screen that people outside look at. Looking changes nothing of the machine.
pub trait Screen {
    /// Another number whenever the picture may have changed; it means nothing else and is no part of the state.
    fn changes(&self) -> u64;
    /// What is shown now.
    fn picture(&self) -> Picture;
    /// The text on the screen, line by line, while it shows text.
    fn text(&self) -> Option<Vec<String>>;
    /// What the card's output `head` shows, from 0; none: there is no such output.
    fn head(&self, head: u32) -> Option<Picture> {
        (head == 0).then(|| self.picture())
    }
    /// Whether a driver shows something on it. (A VGA is always used.)
    fn is_used(&self) -> bool {
        true
    }
    /// The pointer that the card shows by itself, in front of the picture.
    fn pointer(&self) -> Option<&Pointer> {
        None
    }
    /// Whether the guest can be told that the monitor has another size.
    fn takes_size(&self) -> bool {
        false
    }
}
