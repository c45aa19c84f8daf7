//! What an image says of itself.

use super::{bitmaps, header, Qcow2};
use crate::crypto::Volume;
use crate::{Image, ImageInfo, Qcow2Bitmap, Qcow2Info};

impl Qcow2 {
    pub(super) fn describe(&self) -> ImageInfo {
        let h = &self.header;
        let bitmap = |e: &bitmaps::Entry| Qcow2Bitmap {
            name: e.name.clone(),
            granularity: e.granularity(),
            in_use: e.is_in_use(),
            auto: e.is_auto(),
        };
        let bitmaps =
            self.bitmaps.lock().map_or_else(|_| Vec::new(), |d| d.entries.iter().map(bitmap).collect());
        let snapshots = self
            .state
            .lock()
            .map_or_else(|_| Vec::new(), |s| s.snapshots.entries.iter().map(|s| s.public.clone()).collect());
        ImageInfo {
            cluster_size: Some(self.cluster()),
            snapshots,
            backing: self
                .named
                .read()
                .map_or(None, |n| n.clone())
                .map(|n| (n.text, n.path.to_string_lossy().into_owned(), n.format)),
            luks: self.volume.as_ref().map(Volume::info),
            depth: self.below().map_or(0, |b| b.info().depth + 1),
            qcow2: Some(Qcow2Info {
                version: h.version,
                refcount_bits: 1 << h.refcount_order,
                lazy_refcounts: h.lazy_refcounts,
                extended_l2: h.has_subclusters(),
                corrupt: h.is_corrupt(),
                zstd: h.compression == header::Compression::Zstd,
                bitmaps,
                data_file: h.data_file.clone(),
                data_file_raw: h.autoclear & header::AUTOCLEAR_RAW_DATA != 0,
            }),
        }
    }
}
