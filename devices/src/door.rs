//! What passes through the machine's input and output doors.
//!
//! Everything non-deterministic that the guest can notice is an [`Input`], applied at an exact
//! position; everything that leaves the machine is an [`Output`].

use serde::{Deserialize, Serialize};

use crate::config::{DeviceSpec, DriveSpec, NicSpec};

/// Something that comes into the machine from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    /// An Ethernet frame (without FCS) for network card number `nic`.
    NetRx { nic: u32, frame: Vec<u8> },
    /// The cable of network card `nic` was plugged in or pulled.
    LinkState { nic: u32, up: bool },
    /// The disk request `id` ended. `Ok` carries the data of a read (empty otherwise), `Err` an errno.
    DiskDone { id: u64, result: Result<Vec<u8>, i32> },
    /// The size of drive `drive` in bytes became `size`.
    DriveResized { drive: u32, size: u64 },
    /// Bytes typed into character device `port` (a serial line).
    CharIn { port: u32, bytes: Vec<u8> },
    /// A PS/2 scan code sequence (set 2) from a keyboard.
    Keyboard { bytes: Vec<u8> },
    /// The ACPI power button was pressed.
    Powerdown,
    /// A non-maskable interrupt.
    Nmi,
    /// Seconds to add to the real-time clock's offset from virtual time.
    RtcAdjust { seconds: i64 },
    /// A device is plugged into the running machine.
    Plug(Box<Plug>),
    /// The guest is asked to let go of the device with this id.
    Unplug { id: String },
    /// The tray of the CD drive with this device id is opened or closed, or another medium put in: a drive number and its size
    /// in bytes.
    Medium { device: String, open: bool, medium: Option<(u32, u64)> },
    /// The guest is to have this many bytes of memory (virtio balloon).
    Balloon { bytes: u64 },
    /// How often the guest is asked for its memory statistics, in seconds; 0: never.
    BalloonStats { seconds: u64 },
    /// Whether somebody outside holds the other end of character device `port`.
    CharOpen { port: u32, open: bool },
    /// A key of a USB keyboard, by QEMU's number for it.
    Key { number: u8, down: bool },
    /// A USB pointer goes to a place (0 to 0x7FFF) or by a way, turns its wheel, presses and lets go of buttons (a
    /// bit each: left, right, middle, side, extra).
    Pointer { x: Option<u16>, y: Option<u16>, dx: i16, dy: i16, wheel: i8, press: u8, release: u8 },
    /// The monitor at a video card's output `head` has this size in pixels; 0: there is none.
    Display { head: u32, width: u32, height: u32 },
    /// The other end of character device `port` sent a break (a serial line that was low for longer than a character).
    CharBreak { port: u32 },
}

/// A device to be plugged in, with what is behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plug {
    pub spec: DeviceSpec,
    /// PCI device and function number.
    pub devfn: u8,
    pub drive: Option<DriveSpec>,
    pub nic: Option<NicSpec>,
}

/// One disk operation. Offsets and lengths are in bytes, multiples of 512.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskOp {
    Read {
        offset: u64,
        len: u32,
    },
    /// The data is copied when the guest submits the request.
    Write {
        offset: u64,
        data: Vec<u8>,
    },
    Flush,
    Discard {
        offset: u64,
        len: u64,
    },
    WriteZeroes {
        offset: u64,
        len: u64,
        may_unmap: bool,
    },
}

/// Something that leaves the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Output {
    /// An Ethernet frame (without FCS) sent by network card number `nic`.
    NetTx { nic: u32, frame: Vec<u8> },
    /// A disk request; it ends with [`Input::DiskDone`] of the same id. Ids are unique for the
    /// life of the machine and are dealt out deterministically (a counter in the machine's saved state).
    Disk { id: u64, drive: u32, op: DiskOp },
    /// Bytes sent by character device `port`.
    CharOut { port: u32, bytes: Vec<u8> },
    /// Something a management client is told.
    Event(GuestEvent),
}

/// Guest-visible events for the outside (they become QMP events).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestEvent {
    /// The guest wrote the real-time clock: `offset` seconds from the base.
    RtcChange { offset: i64 },
    /// pvpanic: the guest says it panicked.
    Panicked,
    /// pvpanic: a crash kernel was loaded.
    CrashLoaded,
    /// The guest's driver changed the receive filter of network card `nic`.
    NicRxFilterChanged { nic: u32 },
    /// The guest let go of a device; it is gone.
    DeviceDeleted { spec: Box<DeviceSpec> },
    /// The guest has this many bytes of memory besides the balloon.
    BalloonChange { actual: u64 },
    /// The guest opened or closed the virtio-serial port of this device id.
    PortChange { id: String, open: bool },
    /// The guest or the user moved the tray of the CD drive with this device id.
    TrayMoved { device: String, open: bool },
}

/// What a device asks of the machine as a whole; handled after the instruction in hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MachineRequest {
    /// Reset (port 0xCF9, keyboard controller, ACPI reset register).
    Reset,
    /// ACPI S5.
    Poweroff,
    /// isa-debug-exit: end the program with this exit status.
    Exit(i32),
    /// ACPI S3.
    Suspend,
}
