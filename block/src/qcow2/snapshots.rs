//! Internal snapshots: the list of them in the image, and changes of it.

use super::header::Header;
use super::switch::Next;
use super::Qcow2;
use crate::store::Store;
use crate::{BlockError, Image, Snapshot, SnapshotChange};

/// QEMU's bounds.
const MAX_SNAPSHOTS: usize = 65536;
const MAX_TABLE: u64 = 64 << 20;
const MAX_EXTRA: usize = 1024;
/// An L1 table: 32 MiB.
const MAX_L1: u32 = 4 << 20;
/// Bytes of the extra data that are known: size of the machine state, size of the disk, instructions.
const EXTRA: usize = 24;

/// A snapshot and where its L1 table lies.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub public: Snapshot,
    pub l1_offset: u64,
    pub l1_entries: u32,
    /// Extra data that a later version added.
    pub more: Vec<u8>,
}

/// The list of snapshots as it lies in the image.
#[derive(Clone, Debug, Default)]
pub(super) struct SnapshotTable {
    pub offset: u64,
    /// In bytes.
    pub length: u64,
    pub entries: Vec<Entry>,
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |acc, b| acc << 8 | u64::from(*b))
}

impl SnapshotTable {
    /// Read the list that the header names.
    pub fn read(file: &dyn Store, header: &Header) -> Result<Self, BlockError> {
        let bad = |reason: &str| BlockError::Format {
            path: file.path().to_owned(),
            reason: format!("the image's list of snapshots is damaged: {reason}"),
        };
        let mut table = SnapshotTable { offset: header.snapshots_offset, ..Self::default() };
        let cluster = 1u64 << header.cluster_bits;
        if header.snapshots == 0 {
            return Ok(Self::default());
        }
        if header.snapshots as usize > MAX_SNAPSHOTS
            || !table.offset.is_multiple_of(cluster)
            || table.offset >= 1 << 56
        {
            return Err(bad("its place or length is wrong"));
        }
        for _ in 0..header.snapshots {
            let mut head = [0u8; 40];
            let at = table.offset + table.length;
            file.read_at(at, &mut head)?;
            let (id, name, extra) = (
                number(&head[12..14]) as usize,
                number(&head[14..16]) as usize,
                number(&head[36..40]) as usize,
            );
            if extra > MAX_EXTRA {
                return Err(bad("an entry is too long"));
            }
            let mut rest = vec![0u8; extra + id + name];
            file.read_at(at + 40, &mut rest)?;
            table.length += (40 + rest.len() as u64).next_multiple_of(8);
            if table.length > MAX_TABLE {
                return Err(bad("it is too long"));
            }
            let field = |n: usize| rest.get(n * 8..n * 8 + 8).filter(|_| extra >= n * 8 + 8).map(number);
            let text = |range: std::ops::Range<usize>| String::from_utf8_lossy(&rest[range]).into_owned();
            let entry = Entry {
                l1_offset: number(&head[0..8]),
                l1_entries: number(&head[8..12]) as u32,
                public: Snapshot {
                    id: text(extra..extra + id),
                    name: text(extra + id..extra + id + name),
                    vm_state_size: field(0).unwrap_or_else(|| number(&head[32..36])),
                    date_sec: number(&head[16..20]) as u32,
                    date_nsec: number(&head[20..24]) as u32,
                    vm_clock_nsec: number(&head[24..32]),
                    icount: field(2).filter(|n| *n != u64::MAX),
                    disk_size: field(1).unwrap_or(0),
                },
                more: rest.get(EXTRA..extra).unwrap_or_default().to_vec(),
            };
            if entry.l1_entries > MAX_L1
                || !entry.l1_offset.is_multiple_of(cluster)
                || entry.l1_offset >= 1 << 56
            {
                return Err(bad("an L1 table's place or length is wrong"));
            }
            table.entries.push(entry);
        }
        Ok(table)
    }

    /// The list as it is stored.
    pub fn bytes(&self) -> Result<Vec<u8>, BlockError> {
        let mut out = Vec::new();
        for Entry { public: s, l1_offset, l1_entries, more } in &self.entries {
            let (id, name) = (s.id.as_bytes(), s.name.as_bytes());
            let length = |len: usize| {
                u16::try_from(len)
                    .map_err(|_| BlockError::Unsupported("a snapshot's name is too long".into()))
            };
            out.extend(l1_offset.to_be_bytes());
            out.extend(l1_entries.to_be_bytes());
            out.extend(length(id.len())?.to_be_bytes());
            out.extend(length(name.len())?.to_be_bytes());
            out.extend(s.date_sec.to_be_bytes());
            out.extend(s.date_nsec.to_be_bytes());
            out.extend(s.vm_clock_nsec.to_be_bytes());
            out.extend(u32::try_from(s.vm_state_size).unwrap_or(0).to_be_bytes());
            out.extend(((EXTRA + more.len()) as u32).to_be_bytes());
            out.extend(s.vm_state_size.to_be_bytes());
            out.extend(s.disk_size.to_be_bytes());
            out.extend(s.icount.unwrap_or(u64::MAX).to_be_bytes());
            out.extend(more);
            out.extend(id);
            out.extend(name);
            out.resize(out.len().next_multiple_of(8), 0);
        }
        if self.entries.len() > MAX_SNAPSHOTS || out.len() as u64 > MAX_TABLE {
            return Err(BlockError::Unsupported("the image has too many snapshots".into()));
        }
        Ok(out)
    }

    /// The number of a snapshot by its id, or else by its name.
    fn find(&self, text: &str) -> Option<usize> {
        let by = |f: fn(&Snapshot) -> &str| self.entries.iter().position(|s| f(&s.public) == text);
        by(|s| &s.id).or_else(|| by(|s| &s.name))
    }
}

impl Qcow2 {
    /// Make, apply or delete a snapshot.
    pub(super) fn change_snapshots(&self, change: &SnapshotChange) -> Result<Snapshot, BlockError> {
        if self.read_only {
            return Err(BlockError::ReadOnly);
        }
        if self.external {
            return Err(BlockError::Unsupported(
                "an image with an external data file has no snapshots".into(),
            ));
        }
        let _alone = self.quiesce()?;
        self.settle()?;
        let mut state = self.lock()?;
        let mut next = Next {
            size: self.size(),
            l1: state.l1.clone(),
            snapshots: state.snapshots.entries.clone(),
            ..Next::default()
        };
        let missing = |what: &str| BlockError::Unsupported(format!("snapshot '{what}' does not exist"));
        let result = match change {
            SnapshotChange::Create(new) => {
                let ids = next.snapshots.iter().filter_map(|s| s.public.id.parse::<u64>().ok());
                let id = ids.max().unwrap_or(0).saturating_add(1).to_string();
                let public = Snapshot { id, disk_size: self.size(), ..new.clone() };
                next.added = Some(state.l1.clone());
                next.snapshots.push(Entry {
                    public: public.clone(),
                    // Both become those of the copy that is made.
                    l1_offset: 0,
                    l1_entries: 0,
                    more: Vec::new(),
                });
                next.copy_l1 = true;
                public
            }
            SnapshotChange::Apply(text) => {
                let n = state.snapshots.find(text).ok_or_else(|| missing(text))?;
                let entry = &state.snapshots.entries[n];
                if entry.public.disk_size != 0 {
                    next.size = entry.public.disk_size / 512 * 512;
                }
                let l1 = self.read_l1(entry)?;
                next.removed = Some(std::mem::replace(&mut next.l1, l1.clone()));
                next.added = Some(l1);
                let public = entry.public.clone();
                self.clear_flags(&next.l1)?;
                public
            }
            SnapshotChange::Delete { id, name } => {
                let is = |s: &Entry| {
                    id.as_ref().is_none_or(|id| s.public.id == *id)
                        && name.as_ref().is_none_or(|n| s.public.name == *n)
                };
                let found = next.snapshots.iter().position(is);
                let n = found.ok_or_else(|| missing(name.as_deref().or(id.as_deref()).unwrap_or("")))?;
                let entry = next.snapshots.remove(n);
                next.removed = Some(self.read_l1(&entry)?);
                next.dropped = Some((entry.l1_offset, u64::from(entry.l1_entries) * 8));
                entry.public
            }
        };
        self.switch(&mut state, next)?;
        Ok(result)
    }
}
