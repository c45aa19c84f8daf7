//! USB host controllers.

pub mod uhci;
