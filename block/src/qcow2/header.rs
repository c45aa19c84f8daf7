//! The qcow2 header (QEMU's `docs/interop/qcow2.txt`, "Header" and "Header extensions").

use std::path::PathBuf;

use crate::store::Store;
use crate::BlockError;

/// The first four bytes of an image.
pub const MAGIC: &[u8; 4] = b"QFI\xfb";

const INCOMPAT_DIRTY: u64 = 1;
const INCOMPAT_CORRUPT: u64 = 1 << 1;
const INCOMPAT_DATA_FILE: u64 = 1 << 2;
const INCOMPAT_COMPRESSION: u64 = 1 << 3;
const INCOMPAT_EXTENDED_L2: u64 = 1 << 4;

/// Bits that this engine serves, or (corrupt) serves for reading.
const KNOWN: u64 =
    INCOMPAT_DIRTY | INCOMPAT_CORRUPT | INCOMPAT_DATA_FILE | INCOMPAT_COMPRESSION | INCOMPAT_EXTENDED_L2;

/// The header extension that says where the LUKS header is.
pub(super) const LUKS_HEADER: u32 = 0x0537_BE77;

/// The header extension that says where the directory of bitmaps is.
pub(super) const BITMAPS: u32 = 0x2385_2875;

/// Autoclear bit: the extension about bitmaps can be believed.
pub const AUTOCLEAR_BITMAPS: u64 = 1;
/// Autoclear bit: the external data file is a raw image of the same contents.
pub const AUTOCLEAR_RAW_DATA: u64 = 1 << 1;

/// QEMU's bounds: bitmaps of an image, bytes of their directory.
pub(super) const MAX_BITMAPS: u32 = 65535;
pub(super) const MAX_BITMAP_DIRECTORY: u64 = 1024 * MAX_BITMAPS as u64;

/// Where the directory of bitmaps is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmaps {
    pub count: u32,
    pub offset: u64,
    /// In bytes.
    pub length: u64,
}

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    Zlib,
    Zstd,
}

/// What the header says.
#[derive(Clone, Debug)]
pub struct Header {
    pub version: u32,
    pub cluster_bits: u32,
    pub size: u64,
    pub l1_size: u32,
    pub l1_offset: u64,
    pub refcount_offset: u64,
    pub refcount_clusters: u32,
    /// log2 of the width of a reference count in bits.
    pub refcount_order: u32,
    pub snapshots: u32,
    pub autoclear: u64,
    pub incompatible: u64,
    /// Reference counts may be written late (another program's; here they never are).
    pub lazy_refcounts: bool,
    pub snapshots_offset: u64,
    pub compression: Compression,
    /// Where the LUKS header lies (offset, length), if the data is encrypted.
    pub luks: Option<(u64, u64)>,
    /// Name of the external data file.
    pub data_file: Option<String>,
    /// Where the bitmaps are, if the autoclear bit says that it can be believed.
    pub bitmaps: Option<Bitmaps>,
    /// (bit, name) of incompatible features, as the image names them.
    feature_names: Vec<(u8, String)>,
    pub backing: Option<PathBuf>,
    /// The name of the backing file as it is written.
    pub backing_text: Option<String>,
    pub backing_format: Option<String>,
}

fn be32(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).map_or(0, |s| u32::from_be_bytes([s[0], s[1], s[2], s[3]]))
}

fn be64(b: &[u8], at: usize) -> u64 {
    u64::from(be32(b, at)) << 32 | u64::from(be32(b, at + 4))
}

impl Header {
    /// Read and check a header.
    pub fn read(file: &dyn Store) -> Result<Self, BlockError> {
        let bad = |reason: String| BlockError::Format { path: file.path().to_owned(), reason };
        let mut raw = vec![0u8; 104];
        file.read_at(0, &mut raw)?;
        if &raw[..4] != MAGIC {
            return Err(bad("Image is not in qcow2 format".into()));
        }
        let version = be32(&raw, 4);
        if version != 2 && version != 3 {
            return Err(bad(format!("Unsupported qcow2 version {version}")));
        }
        let cluster_bits = be32(&raw, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(bad(format!("Unsupported cluster size: 2^{cluster_bits}")));
        }
        let cluster = 1u64 << cluster_bits;
        match be32(&raw, 32) {
            0 => {}
            // As QEMU: broken since 2014.
            1 => {
                return Err(bad(
                    "Use of AES-CBC encrypted qcow2 images is no longer supported in system emulators".into(),
                ))
            }
            2 => {}
            other => return Err(bad(format!("Unsupported encryption method {other}"))),
        }
        let (incompat, autoclear, refcount_order, length) = if version == 3 {
            (be64(&raw, 72), be64(&raw, 88), be32(&raw, 96), u64::from(be32(&raw, 100)))
        } else {
            (0, 0, 4, 72)
        };
        let size = be64(&raw, 24);
        let header = Header {
            version,
            cluster_bits,
            size: size / 512 * 512,
            l1_size: be32(&raw, 36),
            l1_offset: be64(&raw, 40),
            refcount_offset: be64(&raw, 48),
            refcount_clusters: be32(&raw, 56),
            refcount_order,
            snapshots: be32(&raw, 60),
            autoclear,
            incompatible: incompat,
            lazy_refcounts: version == 3 && be64(&raw, 80) & 1 != 0,
            snapshots_offset: be64(&raw, 64),
            compression: Compression::Zlib,
            luks: None,
            data_file: None,
            bitmaps: None,
            feature_names: Vec::new(),
            backing: None,
            backing_text: None,
            backing_format: None,
        };
        if refcount_order > 6 {
            return Err(bad("Reference count entry width too large; may not exceed 64 bits".into()));
        }
        if length < 72 || length > cluster || (version == 3 && length < 104) {
            return Err(bad("qcow2 header length is wrong".into()));
        }
        let aligned = |at: u64| at.is_multiple_of(cluster) && at < 1 << 56;
        if !aligned(header.l1_offset) || !aligned(header.refcount_offset) {
            return Err(bad("a table of the image is not aligned".into()));
        }
        if u64::from(header.l1_size) * 8 > 32 << 20 {
            return Err(bad("Active L1 table too large".into()));
        }
        let covered = u128::from(header.l1_size) << (2 * cluster_bits - 3);
        if covered < u128::from(size) {
            return Err(bad("L1 table is too small".into()));
        }
        if u64::from(header.refcount_clusters) << cluster_bits > 8 << 20 || header.refcount_clusters == 0 {
            return Err(bad("Image does not contain a reference count table of a usable size".into()));
        }
        header.with_extensions(file, length, &raw)?.with_features(file, length)
    }

    /// Whether the reference counts may be too low (lazy refcounts, and a crash).
    pub fn is_dirty(&self) -> bool {
        self.incompatible & INCOMPAT_DIRTY != 0
    }

    /// Whether QEMU marked the image as damaged.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & INCOMPAT_CORRUPT != 0
    }

    /// Whether an L2 entry has 16 bytes and describes 32 subclusters.
    pub fn has_subclusters(&self) -> bool {
        self.incompatible & INCOMPAT_EXTENDED_L2 != 0
    }

    /// Whether guest data is in another file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & INCOMPAT_DATA_FILE != 0
    }

    fn with_features(mut self, file: &dyn Store, length: u64) -> Result<Self, BlockError> {
        let bad = |reason: String| BlockError::Format { path: file.path().to_owned(), reason };
        let unknown = self.incompatible & !KNOWN;
        if unknown != 0 {
            let name = |bit: u32| {
                let found = self.feature_names.iter().find(|(b, _)| u32::from(*b) == bit);
                found.map_or_else(|| format!("Unknown incompatible feature: bit {bit}"), |(_, n)| n.clone())
            };
            let names: Vec<String> = (0..64).filter(|b| unknown >> b & 1 != 0).map(name).collect();
            return Err(bad(format!("Unsupported qcow2 feature(s): {}", names.join(", "))));
        }
        if self.has_subclusters() {
            let covered = u128::from(self.l1_size) << (2 * self.cluster_bits - 4);
            if self.cluster_bits < 14 || covered < u128::from(self.size) {
                return Err(bad("the image's tables are too small for extended L2 entries".into()));
            }
        }
        let mut kind = [0u8; 1];
        if length > 104 {
            file.read_at(104, &mut kind)?;
        }
        let named = self.incompatible & INCOMPAT_COMPRESSION != 0;
        self.compression = match (kind[0], named) {
            (0, false) => Compression::Zlib,
            (1, true) => Compression::Zstd,
            (kind, _) => return Err(bad(format!("qcow2: unknown compression type: {kind}"))),
        };
        if self.has_data_file() && self.data_file.is_none() {
            return Err(bad("'data-file' is required for this image".into()));
        }
        Ok(self)
    }

    fn with_extensions(mut self, file: &dyn Store, length: u64, raw: &[u8]) -> Result<Self, BlockError> {
        let bad = |reason: String| BlockError::Format { path: file.path().to_owned(), reason };
        let encrypted = be32(raw, 32) == 2;
        let mut first = vec![0u8; 1 << self.cluster_bits];
        file.read_at(0, &mut first)?;
        let mut at = length as usize;
        while at + 8 <= first.len() {
            let (kind, len) = (be32(&first, at), be32(&first, at + 4) as usize);
            if kind == 0 {
                break;
            }
            let Some(body) = first.get(at + 8..at + 8 + len) else {
                return Err(bad("a header extension is too long".into()));
            };
            match kind {
                0xE279_2ACA => self.backing_format = Some(String::from_utf8_lossy(body).into_owned()),
                0x4441_5441 => self.data_file = Some(String::from_utf8_lossy(body).into_owned()),
                0x6803_F857 => {
                    for entry in body.chunks_exact(48).filter(|e| e[0] == 0) {
                        let name = String::from_utf8_lossy(&entry[2..]);
                        self.feature_names.push((entry[1], name.trim_end_matches('\0').to_owned()));
                    }
                }
                BITMAPS if self.autoclear & AUTOCLEAR_BITMAPS != 0 => {
                    self.bitmaps = Some(self.bitmaps_extension(body).map_err(|text| bad(text.into()))?);
                }
                BITMAPS => log::warn!(
                    "{}: a program that knows no bitmaps may have changed the image: all its bitmaps are inconsistent",
                    file.path().display()
                ),
                LUKS_HEADER if encrypted => {
                    let (offset, length) = (be64(body, 0), be64(body, 8));
                    if len != 16 {
                        return Err(bad(format!("CRYPTO header extension size {len} but expected size 16")));
                    }
                    let end = offset.checked_add(length).filter(|end| *end <= file.length());
                    if !offset.is_multiple_of(1 << self.cluster_bits) || offset == 0 || end.is_none() {
                        return Err(bad(format!(
                            "Encryption header offset '{offset}' is not a multiple of cluster size '{}'",
                            1u64 << self.cluster_bits
                        )));
                    }
                    self.luks = Some((offset, length));
                }
                _ => {}
            }
            at += 8 + len.next_multiple_of(8);
        }
        if encrypted && self.luks.is_none() {
            return Err(bad("Missing encryption header".into()));
        }
        let (name_at, name_len) = (be64(raw, 8), be32(raw, 16) as usize);
        if name_at != 0 && name_len != 0 {
            let name = usize::try_from(name_at).ok().and_then(|at| first.get(at..at.checked_add(name_len)?));
            let name = name
                .filter(|_| name_len <= 1023)
                .ok_or_else(|| bad("backing file name is misplaced".into()))?;
            let name =
                String::from_utf8(name.to_vec()).map_err(|_| bad("backing file name is not UTF-8".into()))?;
            self.backing = Some(super::naming::resolve(file.path(), &name));
            self.backing_text = Some(name);
        }
        Ok(self)
    }

    fn bitmaps_extension(&self, body: &[u8]) -> Result<Bitmaps, &'static str> {
        if body.len() != 24 {
            return Err("bitmaps_ext: Invalid extension length");
        }
        let ext = Bitmaps { count: be32(body, 0), length: be64(body, 8), offset: be64(body, 16) };
        if be32(body, 4) != 0 {
            return Err("bitmaps_ext: Reserved field is not zero");
        }
        if ext.count == 0 {
            return Err("found bitmaps extension with zero bitmaps");
        }
        if ext.count > MAX_BITMAPS {
            return Err("bitmaps_ext: image has more bitmaps than the maximum of 65535");
        }
        if ext.offset == 0 || ext.offset >= 1 << 56 || !ext.offset.is_multiple_of(1 << self.cluster_bits) {
            return Err("bitmaps_ext: invalid bitmap directory offset");
        }
        if ext.length == 0 || ext.length > MAX_BITMAP_DIRECTORY {
            return Err("bitmaps_ext: bitmap directory size exceeds the maximum");
        }
        Ok(ext)
    }
}
