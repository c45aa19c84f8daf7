//! Pages of guest memory on their way.
//!
//! Their contents lie one behind the other as they do in the stream, so that a page is copied once where it is taken and
//! once where it is put.

use super::stream::PAGE;

/// Zero or not is found out in pieces of this many bytes.
const PIECE: usize = 256;

/// Pages with their guest physical addresses, in the order in which they were taken.
#[derive(Clone, Debug, Default)]
pub struct Pages {
    /// The address, which is a page's: the lowest bit says that there are contents; without, it is all zero.
    heads: Vec<u64>,
    data: Vec<u8>,
    /// Where in `data` the contents begin.
    start: usize,
}

/// Whether a page is all zero.
pub fn is_zero(page: &[u8; PAGE]) -> bool {
    page.chunks_exact(PIECE).all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
}

impl Pages {
    /// None, with room for so many.
    pub fn with_room(pages: usize) -> Pages {
        Pages { heads: Vec::with_capacity(pages), data: Vec::with_capacity(pages * PAGE), start: 0 }
    }

    /// As a stream has them: `data` is the contents from `start` on of those pages whose heads say so. `None`: it is not.
    pub fn from_parts(heads: Vec<u64>, data: Vec<u8>, start: usize) -> Option<Pages> {
        let full = heads.iter().filter(|head| *head & 1 != 0).count();
        let fits = data.len().checked_sub(start) == Some(full * PAGE);
        let aligned = heads.iter().all(|head| head & (PAGE as u64 - 2) == 0);
        (fits && aligned).then_some(Pages { heads, data, start })
    }

    /// One more. `read` fills in its contents, and says whether it could; what cannot be read is zero.
    pub fn push(&mut self, gpa: u64, read: impl FnOnce(&mut [u8; PAGE]) -> bool) {
        let at = self.data.len();
        self.data.resize(at + PAGE, 0);
        let full = match self.data.last_chunk_mut::<PAGE>() {
            Some(page) => read(page) && !is_zero(page),
            None => false,
        };
        if !full {
            self.data.truncate(at);
        }
        self.heads.push(gpa | u64::from(full));
    }

    /// Give back room that was not needed: pages without contents may wait for a slow channel in great number.
    pub fn trim(&mut self) {
        if self.data.len() < self.data.capacity() / 2 {
            self.data.shrink_to_fit();
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.heads.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    /// How many have contents.
    pub fn full(&self) -> usize {
        self.contents().len() / PAGE
    }

    /// Bytes that they take in a stream, about.
    pub fn bytes(&self) -> usize {
        self.heads.len() * 8 + self.contents().len()
    }

    /// The addresses with their bits.
    pub fn heads(&self) -> &[u64] {
        &self.heads
    }

    /// The contents of those that have any.
    pub fn contents(&self) -> &[u8] {
        self.data.get(self.start..).unwrap_or_default()
    }

    /// Each page's address, and its contents (`None`: all zero).
    pub fn iter(&self) -> impl Iterator<Item = (u64, Option<&[u8; PAGE]>)> {
        let mut contents = self.contents();
        self.heads.iter().map(move |head| {
            let page = match head & 1 {
                0 => None,
                _ => contents.split_first_chunk::<PAGE>().map(|(page, rest)| {
                    contents = rest;
                    page
                }),
            };
            (head & !1, page)
        })
    }

    /// The same in pieces whose addresses follow one another.
    pub fn runs(&self) -> impl Iterator<Item = (u64, Run<'_>)> {
        let (mut heads, mut contents) = (self.heads.as_slice(), self.contents());
        std::iter::from_fn(move || {
            let (first, rest) = heads.split_first()?;
            if first & 1 == 0 {
                heads = rest;
                return Some((*first, Run::Zero));
            }
            let follows = |pair: &[u64]| pair[0].checked_add(PAGE as u64) == Some(pair[1]);
            let len = 1 + heads.windows(2).take_while(|pair| follows(pair)).count();
            let (run, more) = contents.split_at_checked(len * PAGE)?;
            (heads, contents) = (&heads[len..], more);
            Some((first & !1, Run::Full(run)))
        })
    }
}

/// Pages with contents one after another, or one without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run<'a> {
    Full(&'a [u8]),
    Zero,
}

impl PartialEq for Pages {
    fn eq(&self, other: &Pages) -> bool {
        self.heads == other.heads && self.contents() == other.contents()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_out_as_they_went_in() {
        let mut pages = Pages::with_room(2);
        pages.push(0x1000, |page| {
            page[4095] = 1;
            true
        });
        pages.push(0x3000, |_| true);
        pages.push(0x2000, |page| {
            page.fill(9);
            false
        });
        pages.push(0x8000, |page| {
            page.fill(7);
            true
        });
        let got: Vec<_> = pages.iter().map(|(gpa, page)| (gpa, page.map(|p| (p[0], p[4095])))).collect();
        assert_eq!(got, [(0x1000, Some((0, 1))), (0x3000, None), (0x2000, None), (0x8000, Some((7, 7)))]);
        for gpa in [0x9000, 0xA000, 0xC000] {
            pages.push(gpa, |page| {
                page[7] = 7;
                true
            });
        }
        let runs: Vec<_> = pages
            .runs()
            .map(|(gpa, run)| {
                (gpa, matches!(run, Run::Full(c) if c.len() == 3 * PAGE && c[4096] == 0 && c[4103] == 7))
            })
            .collect();
        assert_eq!(
            runs,
            [(0x1000, false), (0x3000, false), (0x2000, false), (0x8000, true), (0xC000, false)]
        );
        assert_eq!((pages.len(), pages.full(), pages.bytes()), (7, 5, 56 + 5 * PAGE));
        let mut raw = vec![5; 3];
        raw.extend(pages.contents());
        assert_eq!(Pages::from_parts(pages.heads().to_vec(), raw.clone(), 3), Some(pages.clone()));
        assert_eq!(Pages::from_parts(pages.heads().to_vec(), raw.clone(), 4), None);
        assert_eq!(Pages::from_parts(pages.heads().to_vec(), raw, usize::MAX), None);
        assert_eq!(Pages::from_parts(vec![0x1002], vec![], 0), None);
    }
}
