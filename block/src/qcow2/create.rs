//! Making new images, with the options of `qemu-img create -o`.

use std::path::Path;

use crate::{BlockError, Image, OpenOptions};

/// Space set aside when an image is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    #[default]
    Off,
    /// Tables for the whole disk; the file is as long as it will be.
    Metadata,
    /// And the file system has set the space aside.
    Falloc,
    /// And all of it has been written.
    Full,
}

/// How an image is made.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Bytes, a multiple of 512.
    pub size: u64,
    /// 2 (`compat=0.10`) or 3 (`compat=1.1`).
    pub version: u32,
    /// A power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// A power of two from 1 to 64; 16 with version 2.
    pub refcount_bits: u32,
    pub lazy_refcounts: bool,
    pub extended_l2: bool,
    /// Clusters that others compress are compressed by zstd, not zlib.
    pub zstd: bool,
    pub preallocation: Preallocation,
    /// Name and format of the image below.
    pub backing: Option<(String, String)>,
    /// Name of the file that holds the data, in the image's directory.
    pub data_file: Option<String>,
    pub data_file_raw: bool,
    /// All of a LUKS volume that lies before its data; the image is encrypted with its key.
    pub luks: Option<Vec<u8>>,
    /// The id of the secret that unlocks it.
    pub key_secret: Option<String>,
}

impl CreateOptions {
    /// QEMU's defaults for a disk of `size` bytes.
    pub fn new(size: u64) -> Self {
        CreateOptions {
            size,
            version: 3,
            cluster_size: 65536,
            refcount_bits: 16,
            lazy_refcounts: false,
            extended_l2: false,
            zstd: false,
            preallocation: Preallocation::Off,
            backing: None,
            data_file: None,
            data_file_raw: false,
            luks: None,
            key_secret: None,
        }
    }

    /// Encrypt it with a new key, for the passphrase that the secret with the id `secret` holds.
    pub fn encrypt(&mut self, options: &crate::crypto::LuksOptions, secret: &str) -> Result<(), BlockError> {
        self.luks = Some(crate::crypto::format(options, secret)?);
        self.key_secret = Some(secret.to_owned());
        Ok(())
    }

    fn check(&self) -> Result<(), &'static str> {
        let v3 = self.version == 3;
        let fail = |when: bool, text| if when { Err(text) } else { Ok(()) };
        fail(!(2..=3).contains(&self.version), "the version of a qcow2 image is 2 or 3")?;
        fail(!self.size.is_multiple_of(512), "Image size must be a multiple of 512 bytes")?;
        let power = self.cluster_size.is_power_of_two();
        fail(
            !power || !(512..=2 << 20).contains(&self.cluster_size),
            "Cluster size must be a power of two between 512 and 2048k",
        )?;
        let width = self.refcount_bits.is_power_of_two() && self.refcount_bits <= 64;
        fail(!width, "Refcount width must be a power of two and may not exceed 64 bits")?;
        fail(
            !v3 && self.refcount_bits != 16,
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
        )?;
        fail(
            !v3 && self.lazy_refcounts,
            "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        )?;
        fail(
            !v3 && self.extended_l2,
            "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        )?;
        fail(
            self.extended_l2 && self.cluster_size < 16384,
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
        )?;
        fail(
            !v3 && (self.zstd || self.data_file.is_some()),
            "Non-zlib compression and external data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        )?;
        fail(self.data_file_raw && self.data_file.is_none(), "data-file-raw requires data-file")?;
        fail(
            self.data_file_raw && self.backing.is_some(),
            "Backing file and data-file-raw cannot be used at the same time",
        )?;
        fail(
            self.backing.is_some() && self.preallocation != Preallocation::Off,
            "Backing file and preallocation cannot be used at the same time",
        )?;
        let leaf = |name: &String| !name.is_empty() && !name.contains('/');
        fail(
            self.data_file.as_ref().is_some_and(|d| !leaf(d)),
            "the external data file must lie in the image's directory",
        )?;
        fail(
            self.l1_entries() > 4 << 20,
            "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
        )?;
        fail(
            self.backing.as_ref().is_some_and(|(name, _)| name.len() > 1023),
            "backing file name is too long",
        )
    }

    fn l1_entries(&self) -> u64 {
        let entry = if self.extended_l2 { 16 } else { 8 };
        self.size.div_ceil(self.cluster_size * (self.cluster_size / entry)).max(1)
    }
}

/// Clusters of each kind in an empty image, in the order in which they lie behind the header.
struct Layout {
    table: u64,
    l1: u64,
    blocks: u64,
    /// Behind all others.
    luks: u64,
}

impl Layout {
    fn new(options: &CreateOptions) -> Self {
        let (cluster, per_block) =
            (options.cluster_size, options.cluster_size * 8 / u64::from(options.refcount_bits));
        let l1 = (options.l1_entries() * 8).div_ceil(cluster);
        let luks = options.luks.as_ref().map_or(0, |area| (area.len() as u64).div_ceil(cluster));
        let (mut table, mut blocks) = (1, 1);
        loop {
            let wanted = (1 + table + l1 + blocks + luks).div_ceil(per_block);
            let wide = (wanted * 8).div_ceil(cluster);
            if (wide, wanted) == (table, blocks) {
                return Layout { table, l1, blocks, luks };
            }
            (table, blocks) = (wide, wanted);
        }
    }
}

/// Make an image; the file must not exist.
pub fn create(path: &Path, options: &CreateOptions) -> Result<(), BlockError> {
    write_new(path, options, |all| {
        let (files, name) = crate::files::beside(path)?;
        files.create(&name, all)
    })
}

/// Make an image of a file or device that exists; what it held is lost. The magic number comes last: half an image is
/// none.
pub fn format(path: &Path, options: &CreateOptions) -> Result<(), BlockError> {
    let how = OpenOptions { format: Some("raw".into()), ..OpenOptions::default() };
    let store = crate::store::open(path, &how)?;
    write_new(path, options, |all| {
        store.set_length(0)?;
        store.write_at(0, &[0; 4])?;
        store.write_at(4, &all[4..])?;
        store.sync()?;
        store.write_at(0, &all[..4])?;
        store.sync()
    })
}

fn write_new(
    path: &Path,
    options: &CreateOptions,
    write: impl FnOnce(&[u8]) -> std::io::Result<()>,
) -> Result<(), BlockError> {
    options.check().map_err(|text| BlockError::Unsupported(text.into()))?;
    let open = |source| BlockError::Open { path: path.to_owned(), source };
    let mut options = options.clone();
    let data_name = options.data_file.clone();
    if let Some(data) = &data_name {
        // QEMU looks for a relative name in its working directory.
        let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let whole = std::fs::canonicalize(dir).map_err(open)?.join(data);
        options.data_file = Some(whole.to_string_lossy().into_owned());
    }
    let options = &options;
    let Layout { table, l1, blocks, luks } = Layout::new(options);
    let cluster = options.cluster_size;
    let luks_at = (1 + table + l1 + blocks) * cluster;
    let used = 1 + table + l1 + blocks + luks;
    let mut all = vec![0u8; (used * cluster) as usize];
    let area = options.luks.as_deref().unwrap_or_default();
    all[luks_at as usize..luks_at as usize + area.len()].copy_from_slice(area);
    let head = head(path, options, options.luks.as_ref().map(|area| (luks_at, area.len() as u64)))?;
    if head.len() as u64 > cluster {
        return Err(BlockError::Unsupported(
            "the name of the backing file does not fit into a cluster".into(),
        ));
    }
    all[..head.len()].copy_from_slice(&head);
    let first_block = (1 + table + l1) * cluster;
    for n in 0..blocks {
        let at = (cluster + n * 8) as usize;
        all[at..at + 8].copy_from_slice(&(first_block + n * cluster).to_be_bytes());
    }
    let order = options.refcount_bits.trailing_zeros();
    for n in 0..used as usize {
        super::refcount::store(&mut all[first_block as usize..], order, n, 1);
    }
    if let Some(data) = &data_name {
        let (files, _) = crate::files::beside(path).map_err(open)?;
        if !files.exists(data).map_err(open)? {
            files.create(data, &[]).map_err(open)?;
        }
    }
    write(&all).map_err(open)?;
    if options.preallocation != Preallocation::Off || options.data_file_raw {
        let key_secret = options.key_secret.clone();
        let how = OpenOptions {
            format: Some("qcow2".into()),
            locking: false,
            key_secret,
            ..OpenOptions::default()
        };
        let image = super::Qcow2::over(crate::store::open(path, &how)?, &how, 0)?;
        image.preallocate(options.preallocation)?;
        image.flush()?;
    }
    Ok(())
}

/// Make an empty version 3 image of `size` bytes with 64 KiB clusters, over `backing` (and its format) if given; and with the
/// key of the LUKS volume whose beginning `luks` is.
pub fn create_overlay(
    path: &Path,
    size: u64,
    backing: Option<(&str, &str)>,
    luks: Option<Vec<u8>>,
) -> Result<(), BlockError> {
    let backing = backing.map(|(name, format)| (name.to_owned(), format.to_owned()));
    create(path, &CreateOptions { backing, luks, ..CreateOptions::new(size) })
}

/// The header of such an image, with what follows it in the first cluster.
pub(super) fn head(
    path: &Path,
    options: &CreateOptions,
    luks: Option<(u64, u64)>,
) -> Result<Vec<u8>, BlockError> {
    let mut head = Vec::new();
    head.extend_from_slice(super::MAGIC);
    let put32 = |h: &mut Vec<u8>, v: u32| h.extend(v.to_be_bytes());
    let put64 = |h: &mut Vec<u8>, v: u64| h.extend(v.to_be_bytes());
    put32(&mut head, options.version);
    let length: u64 = match (options.version, options.zstd) {
        (2, _) => 72,
        (_, false) => 104,
        (_, true) => 112,
    };
    let mut extensions = Vec::new();
    let mut extend = |kind: u32, body: &[u8]| {
        put32(&mut extensions, kind);
        put32(&mut extensions, body.len() as u32);
        extensions.extend(body);
        extensions.resize(extensions.len().next_multiple_of(8), 0);
    };
    let mut name = Vec::new();
    if let Some((file, format)) = &options.backing {
        extend(0xE279_2ACA, format.as_bytes());
        name = file.as_bytes().to_vec();
        if name.len() > 1023 {
            return Err(BlockError::Format {
                path: path.to_owned(),
                reason: "backing file name is too long".into(),
            });
        }
    }
    if let Some(file) = &options.data_file {
        extend(0x4441_5441, file.as_bytes());
    }
    if let Some((offset, length)) = luks {
        extend(super::header::LUKS_HEADER, &[offset.to_be_bytes(), length.to_be_bytes()].concat());
    }
    extensions.extend([0; 8]);
    let name_at = if name.is_empty() { 0 } else { length + extensions.len() as u64 };
    let layout = Layout::new(options);
    put64(&mut head, name_at);
    put32(&mut head, name.len() as u32);
    put32(&mut head, options.cluster_size.trailing_zeros());
    put64(&mut head, options.size);
    put32(&mut head, if luks.is_some() { 2 } else { 0 });
    put32(&mut head, options.l1_entries() as u32);
    put64(&mut head, (1 + layout.table) * options.cluster_size);
    put64(&mut head, options.cluster_size);
    put32(&mut head, layout.table as u32);
    put32(&mut head, 0);
    put64(&mut head, 0);
    if options.version == 3 {
        let bit = |on: bool, n: u32| u64::from(on) << n;
        put64(
            &mut head,
            bit(options.data_file.is_some(), 2) | bit(options.zstd, 3) | bit(options.extended_l2, 4),
        );
        put64(&mut head, bit(options.lazy_refcounts, 0));
        put64(&mut head, bit(options.data_file_raw, 1));
        put32(&mut head, options.refcount_bits.trailing_zeros());
        put32(&mut head, length as u32);
        head.push(u8::from(options.zstd));
        head.resize(length as usize, 0);
    }
    head.extend(extensions);
    head.extend(name);
    Ok(head)
}

impl super::Qcow2 {
    /// Give every cluster of a new image its place.
    fn preallocate(&self, how: Preallocation) -> Result<(), BlockError> {
        let (size, cluster) = (self.size(), self.cluster());
        let mut guest = 0;
        let mut end = 0;
        while guest < size && how != Preallocation::Off {
            self.relieve()?;
            let mut state = self.lock()?;
            let want = (size - guest).div_ceil(cluster).min(1024);
            let (host, got) = if self.external {
                (guest, want)
            } else {
                let (host, got, _) = self.allocate(&mut state, want)?;
                (host, got)
            };
            for n in 0..got {
                self.set_entry(&mut state, guest + n * cluster, (host + n * cluster) | super::COPIED)?;
            }
            drop(state);
            if how == Preallocation::Full {
                self.data.write_at(host, &vec![0; (got * cluster) as usize])?;
            } else if how == Preallocation::Falloc {
                self.data.set_aside(host, got * cluster)?;
            }
            end = end.max(host + got * cluster);
            guest += got * cluster;
        }
        Ok(self.data.grow(if self.external { size } else { end })?)
    }
}
