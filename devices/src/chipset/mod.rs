//! The board's own devices.

pub mod acpi_regs;
pub mod debug;
pub mod fwcfg;
pub mod hpet;
pub mod i8042;
pub mod ich9;
pub mod ioapic;
pub mod northbridge;
pub mod pic;
pub mod pit;
pub mod pm;
pub mod rtc;
pub mod serial;
pub mod smbus;
pub mod southbridge;
pub mod testdev;
