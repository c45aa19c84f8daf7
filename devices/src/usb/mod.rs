//! USB: host controllers, and what is plugged into them.

pub mod ehci;
pub mod hid;
mod pipe;
mod ports;
mod slots;
pub mod uhci;
pub mod xhci;
