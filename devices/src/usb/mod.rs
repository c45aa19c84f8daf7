//! USB host controllers.

pub mod uhci;
pub mod xhci;
