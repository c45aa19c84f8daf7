//! The whole machine in an internal snapshot of its images: `savevm`, `loadvm`, `delvm`.
//!
//! The state has the form of a migration's stream and lies in one of the images. To load it is to read it twice: before
//! anything is changed it must be whole and of this machine.

use std::io::{BufReader, Read};
use std::sync::mpsc::Sender;
use std::sync::Arc;

use ftvm_accel::mem::DIRTY_MIGRATION;
use ftvm_block::{Image, Snapshot, SnapshotChange};

use super::incoming::{compare, put, restore};
use super::outgoing::{disks_are_idle, take_pages};
use super::stream::{self, Frame, MachineInfo, Reader};
use crate::runtime::control::RunState;
use crate::runtime::live::Runtime;

/// Pages in one frame.
const PAGES: usize = 1024;

/// What is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Into all writable images, in place of one of that name; or into the chosen ones, where none has that name.
    Save {
        name: String,
        of: Option<Chosen>,
    },
    Load {
        name: String,
        of: Option<Chosen>,
    },
}

/// Drives that the user chose. The first one's image keeps the state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen(pub Vec<usize>);

/// A wish that waits for the disks to be idle.
pub struct Pending {
    wish: Wish,
    ran: bool,
    reply: Sender<Result<(), String>>,
}

/// A drive whose image takes part: its number and name.
type Drive = (String, Arc<dyn Image>);

/// The writable images, or the chosen ones; all of them must be able to have snapshots.
fn images(rt: &Runtime, of: Option<&Chosen>) -> Result<Vec<Drive>, String> {
    let drives = rt.shared.backends().drives.clone();
    let mut out = Vec::new();
    let indexes: Vec<usize> = of.map_or_else(|| (0..drives.len()).collect(), |of| of.0.clone());
    for i in indexes {
        let Some(Some(drive)) = drives.get(i) else { continue };
        let Some(image) = rt.outside.disk_image(i).filter(|image| !image.read_only()) else {
            match of {
                None => continue,
                Some(_) => return Err(format!("Device '{}' is not writable", drive.id)),
            }
        };
        if image.format() != "qcow2" {
            return Err(format!("Device '{}' is writable but does not support snapshots", drive.id));
        }
        out.push((drive.id.clone(), image));
    }
    match out.is_empty() {
        true => Err("No block device can accept snapshots".into()),
        false => Ok(out),
    }
}

fn find(image: &dyn Image, name: &str) -> Option<Snapshot> {
    image.info().snapshots.into_iter().find(|s| s.name == name)
}

/// Begin: the machine stops, and when its disks are idle the rest is done.
pub fn begin(rt: &mut Runtime, wish: Wish, reply: Sender<Result<(), String>>) -> Result<(), String> {
    let busy = rt.outgoing.is_some() || rt.incoming.is_some() || rt.images_away || rt.snapshotting.is_some();
    if rt.shared.migration.arriving().is_some() {
        return Err(super::postcopy::MISSING.into());
    }
    if busy {
        return Err("the machine is on its way, or a snapshot is under way".into());
    }
    if rt.ft.is_some() {
        return Err("the machine is one of a pair (ft-turn-off ends the pair)".into());
    }
    if rt.is_logged() {
        return Err("the machine is recorded".into());
    }
    if rt.shared.jobs.is_busy() {
        return Err("a block job is under way".into());
    }
    match &wish {
        Wish::Load { name, of } => {
            let images = images(rt, of.as_ref())?;
            check(rt, &images, name)?;
        }
        Wish::Save { name, of } => {
            let images = images(rt, of.as_ref())?;
            if of.is_some() && images.iter().any(|(_, image)| find(image.as_ref(), name).is_some()) {
                return Err(format!("Snapshot '{name}' already exists in one or more devices"));
            }
        }
    }
    let ran = !rt.machine.is_paused();
    let state = if matches!(wish, Wish::Save { .. }) { RunState::SaveVm } else { RunState::RestoreVm };
    if ran {
        rt.stop(state);
    }
    rt.snapshotting = Some(Box::new(Pending { wish, ran, reply }));
    work(rt);
    Ok(())
}

/// The machine thread's part, in each of its rounds.
pub fn work(rt: &mut Runtime) {
    if rt.snapshotting.is_none() || !disks_are_idle(rt) {
        return;
    }
    let Some(pending) = rt.snapshotting.take() else { return };
    let done = match &pending.wish {
        Wish::Save { name, of } => save(rt, name, of.as_ref(), pending.ran),
        Wish::Load { name, of } => load(rt, name, of.as_ref()),
    };
    if pending.ran {
        if let Err(e) = &done {
            log::warn!("{e}");
        }
        rt.shared.set_state(RunState::Paused);
        rt.cont();
    }
    rt.restart_pace();
    let _ = pending.reply.send(done);
}

/// Writes a state into an image in pieces of whole clusters.
struct StateWriter<'a> {
    image: &'a dyn Image,
    piece: usize,
    buffer: Vec<u8>,
    stored: u64,
}

impl StateWriter<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.buffer.extend(bytes);
        let whole = self.buffer.len() - self.buffer.len() % self.piece;
        if whole > 0 {
            self.store(whole)?;
        }
        Ok(())
    }

    fn store(&mut self, len: usize) -> Result<(), String> {
        let rest = self.buffer.split_off(len);
        let data = std::mem::replace(&mut self.buffer, rest);
        self.image.write_vm_state(self.stored, &data).map_err(|e| e.to_string())?;
        self.stored += data.len() as u64;
        Ok(())
    }
}

fn save(rt: &mut Runtime, name: &str, of: Option<&Chosen>, ran: bool) -> Result<(), String> {
    let images = images(rt, of)?;
    // As in QEMU, the name is free for the new one.
    delete(&images, name)?;
    let (_, first) = &images[0];
    let size = write_state(rt, first.as_ref(), ran);
    let made = size.and_then(|size| {
        let mut new = Snapshot::new(name, rt.machine.stamp().ns);
        new.icount = Some(rt.machine.stamp().position);
        for (n, (device, image)) in images.iter().enumerate() {
            new.vm_state_size = if n == 0 { size } else { 0 };
            let done = image.snapshot(&SnapshotChange::Create(new.clone()));
            if let Err(e) = done {
                // All of them or none.
                delete(&images[..n], name)?;
                return Err(format!("Error while creating snapshot on '{device}': {e}"));
            }
        }
        Ok(())
    });
    let dropped = first.drop_vm_state().map_err(|e| e.to_string());
    made.and(dropped)
}

fn write_state(rt: &mut Runtime, image: &dyn Image, running: bool) -> Result<u64, String> {
    let home = rt.home.as_ref().ok_or("this machine's state cannot be saved")?;
    let info = MachineInfo {
        program: format!("ftvm {}", env!("CARGO_PKG_VERSION")),
        identity: home.identity.clone(),
        firmware: home.firmware.clone(),
    };
    let cluster = image.info().cluster_size.unwrap_or(65536) as usize;
    let piece = cluster * (1usize << 20).div_ceil(cluster);
    let mut out = StateWriter { image, piece, buffer: Vec::new(), stored: 0 };
    out.put(&stream::head(0))?;
    out.put(&Frame::Machine(info).to_bytes(true))?;
    let mut frames = 1;
    let (mem, mut cursor) = (rt.machine.memory(), 0);
    mem.set_all_dirty(DIRTY_MIGRATION);
    loop {
        let pages = take_pages(mem, &mut cursor, PAGES);
        if pages.is_empty() {
            break;
        }
        out.put(&Frame::Pages(pages).to_bytes(true))?;
        frames += 1;
    }
    out.put(&Frame::State { running, state: rt.machine.save().to_bytes() }.to_bytes(true))?;
    out.put(&Frame::End { frames: frames + 1 }.to_bytes(true))?;
    out.store(out.buffer.len())?;
    Ok(out.stored)
}

/// Reads a state that a snapshot keeps.
struct StateReader<'a> {
    image: &'a dyn Image,
    id: &'a str,
    at: u64,
    size: u64,
}

impl Read for StateReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let len = buf.len().min((self.size - self.at) as usize);
        self.image.read_vm_state(self.id, self.at, &mut buf[..len]).map_err(std::io::Error::other)?;
        self.at += len as u64;
        Ok(len)
    }
}

/// The image that keeps the machine's state of this name.
fn keeper<'a>(images: &'a [Drive], name: &str) -> Result<(&'a dyn Image, Snapshot), String> {
    for (device, image) in images {
        if find(image.as_ref(), name).is_none() {
            return Err(format!("Snapshot '{name}' does not exist in '{device}'"));
        }
    }
    let found = images.iter().find_map(|(_, image)| {
        let snapshot = find(image.as_ref(), name).filter(|s| s.vm_state_size > 0)?;
        Some((image.as_ref(), snapshot))
    });
    found.ok_or_else(|| "This is a disk-only snapshot. Revert to it offline using qemu-img".to_owned())
}

/// Call `each` with every frame of a state.
fn read_state(
    image: &dyn Image,
    snapshot: &Snapshot,
    mut each: impl FnMut(Frame) -> Result<(), String>,
) -> Result<(), String> {
    let state = StateReader { image, id: &snapshot.id, at: 0, size: snapshot.vm_state_size };
    let mut reader = Reader::new(BufReader::with_capacity(1 << 20, state)).map_err(|e| e.to_string())?;
    loop {
        match reader.frame().map_err(|e| e.to_string())? {
            Frame::End { .. } => return Ok(()),
            frame => each(frame)?,
        }
    }
}

/// The state is whole and of this machine.
fn check(rt: &mut Runtime, images: &[Drive], name: &str) -> Result<(), String> {
    let (image, snapshot) = keeper(images, name)?;
    read_state(image, &snapshot, |frame| match frame {
        Frame::Machine(info) => compare(rt, info),
        _ => Ok(()),
    })
}

fn load(rt: &mut Runtime, name: &str, of: Option<&Chosen>) -> Result<(), String> {
    let images = images(rt, of)?;
    let (image, snapshot) = keeper(&images, name)?;
    for (device, image) in &images {
        let was = image.size();
        let apply = image.snapshot(&SnapshotChange::Apply(name.to_owned()));
        apply.map_err(|e| format!("Error while activating snapshot '{name}' on '{device}': {e}"))?;
        if image.size() != was {
            if let Some(index) = rt.shared.backends().drive(device) {
                rt.outside.disk_resized(index, image.size());
            }
        }
    }
    rt.errors.forget();
    read_state(image, &snapshot, |frame| match frame {
        Frame::Pages(pages) => put(rt, &pages),
        Frame::State { state, .. } => restore(rt, &state),
        _ => Ok(()),
    })?;
    for (_, image) in &images {
        image.drop_vm_state().map_err(|e| e.to_string())?;
    }
    for output in rt.machine.pending_disk() {
        rt.outside.perform(output);
    }
    Ok(())
}

/// Delete the snapshots of this name.
pub fn delete(images: &[Drive], name: &str) -> Result<(), String> {
    for (device, image) in images {
        if find(image.as_ref(), name).is_some() {
            let change = SnapshotChange::Delete { id: None, name: Some(name.to_owned()) };
            image
                .snapshot(&change)
                .map_err(|e| format!("Error while deleting snapshot on device '{device}': {e}"))?;
        }
    }
    Ok(())
}

/// `delvm`: the snapshot of this name goes, wherever it is; or from the chosen images.
pub fn forget(rt: &mut Runtime, name: &str, of: Option<&Chosen>) -> Result<(), String> {
    if rt.ft.is_some() {
        return Err("the machine is one of a pair (ft-turn-off ends the pair)".into());
    }
    let images = images(rt, of)?;
    if of.is_none() && !images.iter().any(|(_, image)| find(image.as_ref(), name).is_some()) {
        return Err(format!("Snapshot '{name}' does not exist in any of the images"));
    }
    delete(&images, name)
}
