//! USB: host controllers, and what is plugged into them.

pub mod hid;
mod slots;
pub mod uhci;
pub mod xhci;
