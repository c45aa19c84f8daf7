//! ftvm: a virtual machine monitor that survives the death of its host.

pub mod cli;
pub mod lockstep;
pub mod machine;
