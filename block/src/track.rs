//! An image that remembers which of its chunks were written, so that a copy of it on another host can be made
//! while it is in use, and brought up to date by what differs.

use std::sync::{Arc, Mutex};

use crate::bitmap::StoredBitmap;
use crate::{BlockError, Image};

/// Bytes of a chunk; the last one of an image may be shorter.
pub const CHUNK: u64 = 1 << 16;

/// What tells contents of chunks apart.
pub type Digest = [u8; 16];

/// An image with a set of changed chunks.
pub struct Tracked {
    image: Box<dyn Image>,
    dirty: Mutex<Vec<u64>>,
}

/// The digest of a chunk's contents.
pub fn digest(data: &[u8]) -> Digest {
    let mut short = [0; 16];
    short.copy_from_slice(&blake3::hash(data).as_bytes()[..16]);
    short
}

impl Tracked {
    /// Nothing has changed yet.
    pub fn new(image: Box<dyn Image>) -> Arc<Self> {
        let words = image.size().div_ceil(CHUNK).div_ceil(64) as usize;
        Arc::new(Tracked { image, dirty: Mutex::new(vec![0; words]) })
    }

    /// How many chunks the image has.
    pub fn chunks(&self) -> u64 {
        self.image.size().div_ceil(CHUNK)
    }

    fn len(&self, chunk: u64) -> usize {
        self.image.size().saturating_sub(chunk * CHUNK).min(CHUNK) as usize
    }

    /// Note that a chunk is to be copied.
    pub fn mark(&self, chunk: u64) {
        self.mark_range(chunk * CHUNK, 1);
    }

    fn mark_range(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let Ok(mut dirty) = self.dirty.lock() else { return };
        for chunk in offset / CHUNK..=offset.saturating_add(len - 1) / CHUNK {
            if let Some(word) = dirty.get_mut((chunk / 64) as usize) {
                *word |= 1 << (chunk % 64);
            }
        }
    }

    /// Forget what has changed so far.
    pub fn clear(&self) {
        if let Ok(mut dirty) = self.dirty.lock() {
            dirty.fill(0);
        }
    }

    /// Chunks that changed.
    pub fn count(&self) -> u64 {
        self.dirty.lock().map_or(0, |d| d.iter().map(|w| u64::from(w.count_ones())).sum())
    }

    /// Up to `limit` changed chunks, which count as copied from now on: read them after this.
    pub fn take(&self, limit: usize) -> Vec<u64> {
        let mut taken = Vec::new();
        let Ok(mut dirty) = self.dirty.lock() else { return taken };
        for (i, word) in dirty.iter_mut().enumerate() {
            while *word != 0 && taken.len() < limit {
                taken.push(i as u64 * 64 + u64::from(word.trailing_zeros()));
                *word &= *word - 1;
            }
        }
        taken
    }

    /// The contents of a chunk; empty if they are all zero.
    pub fn read_chunk(&self, chunk: u64) -> Result<Vec<u8>, BlockError> {
        let mut data = vec![0; self.len(chunk)];
        self.image.read_at(chunk * CHUNK, &mut data)?;
        if data.iter().all(|b| *b == 0) {
            data = Vec::new();
        }
        Ok(data)
    }

    /// Store what [`Self::read_chunk`] gave elsewhere.
    pub fn write_chunk(&self, chunk: u64, data: &[u8]) -> Result<(), BlockError> {
        let len = self.len(chunk);
        if chunk >= self.chunks() || !(data.is_empty() || data.len() == len) {
            return Err(BlockError::OutOfRange {
                offset: chunk.saturating_mul(CHUNK),
                len: data.len() as u64,
                size: self.image.size(),
            });
        }
        if data.is_empty() {
            self.image.write_zeroes(chunk * CHUNK, len as u64, true)
        } else {
            self.image.write_at(chunk * CHUNK, data)
        }
    }

    /// The digest of a chunk.
    pub fn digest_chunk(&self, chunk: u64) -> Result<Digest, BlockError> {
        let data = self.read_chunk(chunk)?;
        Ok(digest(&data))
    }

    fn marked(
        &self,
        offset: u64,
        len: u64,
        write: impl FnOnce(&dyn Image) -> Result<(), BlockError>,
    ) -> Result<(), BlockError> {
        // Before, for a copier that looks after it; and after, for one that looked in between.
        self.mark_range(offset, len);
        let result = write(self.image.as_ref());
        self.mark_range(offset, len);
        result
    }
}

impl Image for Tracked {
    fn size(&self) -> u64 {
        self.image.size()
    }
    fn read_only(&self) -> bool {
        self.image.read_only()
    }
    fn format(&self) -> &'static str {
        self.image.format()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.image.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.marked(offset, data.len() as u64, |i| i.write_at(offset, data))
    }
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.marked(offset, len, |i| i.write_zeroes(offset, len, may_unmap))
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.marked(offset, len, |i| i.discard(offset, len))
    }
    fn flush(&self) -> Result<(), BlockError> {
        self.image.flush()
    }
    fn background(&self) -> bool {
        self.image.background()
    }
    fn info(&self) -> crate::ImageInfo {
        self.image.info()
    }
    fn check_bitmap(&self, name: &str, granularity: u64, others: &[String]) -> Result<(), BlockError> {
        self.image.check_bitmap(name, granularity, others)
    }
    fn keep_bitmaps(&self, bitmaps: &[StoredBitmap]) -> Result<(), BlockError> {
        self.image.keep_bitmaps(bitmaps)
    }
    fn drop_bitmap(&self, name: &str) -> Result<(), BlockError> {
        self.image.drop_bitmap(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{open, OpenOptions};

    /// The node in front has the bitmaps, and what is copied from elsewhere is not in them: they are given up.
    #[test]
    fn bitmaps_of_a_tracked_image_are_kept_or_given_up() {
        let dir = std::env::temp_dir().join(format!("ftvm-track-bitmaps-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("image");
        crate::qcow2::create_overlay(&path, 1 << 20, None, None).unwrap();
        let open = || crate::Node::open("disk", &path, &OpenOptions::default(), None).unwrap();
        let in_front = |node: &Arc<crate::Node>| {
            let tracked = Tracked::new(Box::new(Arc::clone(node)));
            (node.behind(Arc::clone(&tracked) as _), tracked)
        };
        let node = open();
        node.add_bitmap("b", None, true, true).unwrap();
        let (front, tracked) = in_front(&node);
        assert!(node.bitmaps().is_empty() && front.name() == "disk");
        front.add_bitmap("more", None, true, true).unwrap();
        front.write_at(CHUNK, &[1; 512]).unwrap();
        drop((front, tracked, node));
        let node = open();
        let shown =
            || node.bitmaps().iter().map(|b| (b.info().count, b.info().inconsistent)).collect::<Vec<_>>();
        assert_eq!(shown(), [(CHUNK, false); 2]);
        let (front, tracked) = in_front(&node);
        front.distrust_bitmaps();
        tracked.write_chunk(3, &[1; CHUNK as usize]).unwrap();
        drop((front, tracked, node));
        let node = open();
        assert!(node.bitmaps().len() == 2 && node.bitmaps().iter().all(|b| b.info().inconsistent));
        drop(node);
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_copy_follows_an_image_that_is_written() {
        let dir = std::env::temp_dir().join(format!("ftvm-track-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let make = |name: &str| {
            let path = dir.join(name);
            std::fs::write(&path, vec![0; 5 * CHUNK as usize + 512]).unwrap();
            let options = OpenOptions { format: Some("raw".into()), ..OpenOptions::default() };
            Tracked::new(open(&path, &options).unwrap())
        };
        let (from, to) = (make("from"), make("to"));
        assert_eq!((from.chunks(), from.count()), (6, 0));
        from.write_at(CHUNK - 1, &[7, 8]).unwrap();
        from.write_at(5 * CHUNK, &[9; 512]).unwrap();
        assert_eq!(from.take(2), [0, 1]);
        assert_eq!(from.take(9), [5]);
        assert_eq!(from.count(), 0);
        for chunk in [0, 1, 5] {
            to.write_chunk(chunk, &from.read_chunk(chunk).unwrap()).unwrap();
        }
        for chunk in 0..6 {
            assert_eq!(from.digest_chunk(chunk).unwrap(), to.digest_chunk(chunk).unwrap());
        }
        from.discard(0, CHUNK).unwrap();
        assert_eq!(from.take(9), [0]);
        assert!(to.write_chunk(6, &[]).is_err() && to.write_chunk(0, &[1]).is_err());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
