//! Video cards, and what they show.

mod dispi;
mod render;
mod vga;

#[cfg(test)]
mod tests;

pub use vga::Vga;

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

/// A screen that people outside look at. Looking changes nothing of the machine.
pub trait Screen {
    /// Another number whenever the picture may have changed; it means nothing else and is no part of the state.
    fn changes(&self) -> u64;
    /// What is shown now.
    fn picture(&self) -> Picture;
    /// The text on the screen, line by line, while it shows text.
    fn text(&self) -> Option<Vec<String>>;
}
