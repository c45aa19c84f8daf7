//! What an image says of itself, and its internal snapshots.

/// An internal snapshot (QEMU's `docs/interop/qcow2.txt`, "Snapshots").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub id: String,
    pub name: String,
    /// Bytes of a saved machine state that QEMU kept with it.
    pub vm_state_size: u64,
    /// When it was made, by the host's clock.
    pub date_sec: u32,
    pub date_nsec: u32,
    /// The machine's clock at that time.
    pub vm_clock_nsec: u64,
    /// Instructions executed until then (QEMU's `-icount`), if it was noted.
    pub icount: Option<u64>,
    /// Size of the disk at that time; 0: not noted.
    pub disk_size: u64,
}

impl Snapshot {
    /// A snapshot to be made now.
    pub fn new(name: &str, vm_clock_nsec: u64) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Snapshot {
            id: String::new(),
            name: name.to_owned(),
            vm_state_size: 0,
            date_sec: now.as_secs() as u32,
            date_nsec: now.subsec_nanos(),
            vm_clock_nsec,
            icount: None,
            disk_size: 0,
        }
    }
}

/// What to do with internal snapshots.
#[derive(Clone, Debug)]
pub enum SnapshotChange {
    /// Make one; its id and disk size are filled in.
    Create(Snapshot),
    /// Make the snapshot with this id, or else with this name, the image's contents. Its size may be another one.
    Apply(String),
    /// Delete the snapshot with this id, or this name, or both.
    Delete { id: Option<String>, name: Option<String> },
}

/// What an image says of itself.
#[derive(Clone, Debug, Default)]
pub struct ImageInfo {
    /// How it is encrypted.
    pub luks: Option<crate::crypto::LuksInfo>,
    pub cluster_size: Option<u64>,
    pub snapshots: Vec<Snapshot>,
    /// Name of the backing file, its whole path, and its format.
    pub backing: Option<(String, String, Option<String>)>,
    /// Images below this one.
    pub depth: u32,
    pub qcow2: Option<Qcow2Info>,
}

/// A dirty bitmap as the file has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Bitmap {
    pub name: String,
    /// Bytes of a part.
    pub granularity: u64,
    /// The image is open for writing, or its program ended without storing the bitmap.
    pub in_use: bool,
    /// It records whenever the image is open for writing.
    pub auto: bool,
}

/// What only qcow2 images have.
#[derive(Clone, Debug)]
pub struct Qcow2Info {
    pub version: u32,
    pub refcount_bits: u32,
    pub lazy_refcounts: bool,
    pub extended_l2: bool,
    pub corrupt: bool,
    /// Clusters are compressed by zstd, not zlib.
    pub zstd: bool,
    pub bitmaps: Vec<Qcow2Bitmap>,
    pub data_file: Option<String>,
    pub data_file_raw: bool,
}
