//! USB: host controllers, and what is plugged into them.

mod device;
pub mod ehci;
pub mod hid;
mod pipe;
mod ports;
mod slots;
mod storage;
pub mod uhci;
pub mod xhci;

pub use ports::{bus_of, check, controller, fix_ports, served};
