//! Device models of the PC. A device model knows guest memory, the virtual clock, its interrupt
//! line and the doors ([`door`]); it never names a file, a socket, a thread or a host clock.

mod acpi;
mod audio;
mod boot;
mod chipset;
pub mod config;
pub mod ctx;
pub mod display;
pub mod door;
mod ide;
mod net;
pub mod pc;
pub mod pci;
mod random;
pub mod registry;
mod rootport;
mod scsi;
mod smbios;
mod usb;
mod virtio;

pub use boot::KernelKind;
pub use config::{DeviceSpec, DriveSpec, InitrdFile, KernelImages, NicSpec, PcConfig, SerialSpec};
pub use ctx::DeviceError;
pub use display::{Picture, Pointer, Screen};
pub use door::{DiskOp, Input, MachineRequest, Output, Plug};
pub use ftvm_accel::ApicMessage;
pub use pc::{FunctionView, Inventory, Pc, WindowView};
pub use registry::{device_help, model_help};

#[cfg(test)]
mod tests;
