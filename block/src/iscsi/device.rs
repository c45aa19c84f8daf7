//! A LUN that this host's kernel has attached (`/dev/sdX`, `/dev/disk/by-path/...`): its persistent reservation, by
//! SCSI commands through the kernel (ioctl SG_IO, linux/scsi/sg.h). The reservation belongs to the host, not to the
//! process: a program that is started again on the host has what the one before it had.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::conn::{Command, Reply};
use super::reserve::{give_back, Sender, Unit, LIMIT};
use super::session::{sense, BUSY, CHECK_CONDITION, TASK_SET_FULL};

const SG_IO: libc::c_ulong = 0x2285;
const NO_DATA: i32 = -1;
const TO_DEVICE: i32 = -2;
const FROM_DEVICE: i32 = -3;

/// `struct sg_io_hdr`.
#[repr(C)]
struct SgIoHeader {
    interface_id: i32,
    direction: i32,
    cdb_len: u8,
    max_sense: u8,
    iovec_count: u16,
    data_len: u32,
    data: *mut c_void,
    cdb: *const u8,
    sense: *mut u8,
    timeout_ms: u32,
    flags: u32,
    pack_id: i32,
    user: *mut c_void,
    status: u8,
    masked_status: u8,
    msg_status: u8,
    sense_written: u8,
    host_status: u16,
    driver_status: u16,
    residual: i32,
    duration_ms: u32,
    info: u32,
}

/// A host's device.
pub struct Device {
    file: File,
    holding: Mutex<Option<u64>>,
    took: AtomicBool,
}

/// Devices in use by this process.
static DEVICES: Mutex<Vec<(PathBuf, Weak<Device>)>> = Mutex::new(Vec::new());

/// Whether `path` names a block device of this host.
pub fn is_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device())
}

impl Device {
    /// The device at `path`; an error says what to do if it has no persistent reservations.
    pub fn open(path: &Path) -> io::Result<Arc<Device>> {
        let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
        devices.retain(|(_, d)| d.strong_count() > 0);
        if let Some(found) = devices.iter().find(|(p, _)| p == path).and_then(|(_, d)| d.upgrade()) {
            return Ok(found);
        }
        let file = File::options().read(true).write(true).open(path)?;
        let device = Arc::new(Device { file, holding: Mutex::default(), took: AtomicBool::new(false) });
        super::reserve::holder(device.as_ref()).map_err(|e| {
            io::Error::new(
                io::ErrorKind::Unsupported,
                format!(
                    "'{}' does not answer to SCSI persistent reservations ({e}), so it cannot be a pair's lock: \
                     give lock=PATH on storage that both hosts see",
                    path.display()
                ),
            )
        })?;
        devices.push((path.to_owned(), Arc::downgrade(&device)));
        Ok(device)
    }

    fn execute(&self, command: &Command<'_>) -> io::Result<Reply> {
        let mut sense = [0u8; 64];
        let mut data =
            if command.data_out.is_empty() { vec![0; command.read] } else { command.data_out.to_vec() };
        let direction = match (command.data_out.is_empty(), command.read) {
            (false, _) => TO_DEVICE,
            (true, 0) => NO_DATA,
            (true, _) => FROM_DEVICE,
        };
        // Length by the group of the operation code (SPC-4, 4.2.5.1).
        let cdb_len = match command.cdb[0] >> 5 {
            0 => 6,
            1 | 2 => 10,
            5 => 12,
            _ => 16,
        };
        let mut header = SgIoHeader {
            interface_id: i32::from(b'S'),
            direction,
            cdb_len,
            max_sense: sense.len() as u8,
            iovec_count: 0,
            data_len: data.len() as u32,
            data: data.as_mut_ptr().cast(),
            cdb: command.cdb.as_ptr(),
            sense: sense.as_mut_ptr(),
            timeout_ms: LIMIT.as_millis() as u32,
            flags: 0,
            pack_id: 0,
            user: std::ptr::null_mut(),
            status: 0,
            masked_status: 0,
            msg_status: 0,
            sense_written: 0,
            host_status: 0,
            driver_status: 0,
            residual: 0,
            duration_ms: 0,
            info: 0,
        };
        // SAFETY: the header has the layout of sg.h's version 3 ('S'); its pointers are to `data`, the command and `sense`,
        // which have the lengths given beside them and outlive the call.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), SG_IO, &mut header) } == -1 {
            return Err(io::Error::last_os_error());
        }
        if header.host_status != 0 {
            return Err(io::Error::other(format!("the host's adapter reports {:#x}", header.host_status)));
        }
        data.truncate(data.len().saturating_sub(header.residual.max(0) as usize));
        let sense = sense[..usize::from(header.sense_written).min(sense.len())].to_vec();
        Ok(Reply {
            status: header.status,
            sense,
            data: if direction == FROM_DEVICE { data } else { Vec::new() },
        })
    }
}

impl Sender for Device {
    fn send(&self, command: &Command<'_>) -> io::Result<Reply> {
        let deadline = Instant::now() + LIMIT;
        let mut attentions = 0;
        loop {
            let reply = self.execute(command)?;
            match reply.status {
                CHECK_CONDITION if sense(&reply.sense).0 == 6 && attentions < 20 => attentions += 1,
                BUSY | TASK_SET_FULL if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                _ => return Ok(reply),
            }
        }
    }
}

impl Unit for Device {
    fn sender(&self) -> &dyn Sender {
        self
    }
    fn holding(&self) -> &Mutex<Option<u64>> {
        &self.holding
    }
    fn took(&self) -> &AtomicBool {
        &self.took
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        give_back(self, self);
    }
}

/// The program ends: let every device go that this process still holds.
pub fn release_devices() {
    let devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    devices.iter().filter_map(|(_, d)| d.upgrade()).for_each(|d| give_back(d.as_ref(), d.as_ref()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_the_kernels() {
        assert_eq!(std::mem::size_of::<SgIoHeader>(), 88);
        assert_eq!(std::mem::offset_of!(SgIoHeader, status), 64);
    }

    #[test]
    fn what_has_no_reservations_says_what_to_do() {
        let path = std::env::temp_dir().join(format!("ftvm-device-{}", std::process::id()));
        std::fs::write(&path, [0; 512]).unwrap();
        let error = Device::open(&path).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("does not answer") && error.contains("give lock=PATH"), "{error}");
        assert!(!is_device(&path) && !is_device(Path::new("/dev/null")));
        std::fs::remove_file(path).unwrap();
    }
}
