//! What is fuzzed: one function for each door at which bytes of strangers come in. Shared by the targets in
//! `fuzz_targets` (cargo-fuzz) and by `tests/fuzz_corpus.rs` (plain cargo test).
//!
//! Each function may be given any bytes. It must return, in little time and memory, and panics only where a
//! promise is broken.

use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use ftvm::cli::keyval::Params;
use ftvm::lockstep::backup::Backup;
use ftvm::lockstep::heartbeat::{Heartbeat, Listener};
use ftvm::lockstep::log::{self, Decoder, Encoder};
use ftvm::lockstep::primary::Timing;
use ftvm::lockstep::wire::{self, Epoch, Message};
use ftvm::lockstep::Side;
use ftvm::machine::Stamp;
use ftvm::monitor::Control;
use ftvm::runtime::ft::Fetch;
use ftvm::runtime::record::Player;
use ftvm_accel::bus::Ipi;
use ftvm_accel::state::Segment;
use ftvm_accel::tcg::{Registers, SoftCpu};
use ftvm_accel::{Bus, CpuModel, Exit, GuestMemory, Processor};
use ftvm_block::{OpenOptions, Snapshot, SnapshotChange};
use ftvm_qmp::{Session, Step};

/// An entry point for bytes.
pub type Entry = fn(&[u8]);

/// Every entry point with its name; `corpus/NAME` holds its seeds.
pub const ALL: &[(&str, Entry)] = &[
    ("log", log),
    ("wire", wire),
    ("heartbeat", heartbeat),
    ("qmp", qmp),
    ("qcow2", qcow2),
    ("snapshots", snapshots),
    ("command_line", command_line),
    ("recording", recording),
    ("processor", processor),
    ("iscsi", iscsi),
    ("nfs", nfs),
    ("luks", luks),
    ("rfb", rfb),
    ("migration", migration),
    ("nbd", nbd),
];

/// What a target sends while a command is under way.
pub fn iscsi(data: &[u8]) {
    let _ = ftvm_block::iscsi::fuzz(data);
}

/// The header of an encrypted volume.
pub fn luks(data: &[u8]) {
    ftvm_block::crypto::fuzz(data);
}

/// What an NBD client says: from the beginning, and as requests behind a negotiation.
pub fn nbd(data: &[u8]) {
    use ftvm::host::nbd::export::{Export, Hangup, Source, Wanted};
    use ftvm::host::nbd::session::{serve, Offers};
    struct Client<'a>(&'a [u8]);
    impl std::io::Read for Client<'_> {
        fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
            self.0.read(buf)
        }
    }
    impl Write for Client<'_> {
        fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
            Ok(buf.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    struct Offer(std::sync::Arc<Export>);
    impl Offers for Offer {
        fn exports(&self) -> Vec<std::sync::Arc<Export>> {
            vec![std::sync::Arc::clone(&self.0)]
        }
        fn hangup(&self) -> Hangup {
            Box::new(|| {})
        }
    }
    let Some((_fd, path)) = memory_file(&[5; 16 << 10]) else { return };
    let options = OpenOptions { format: Some("raw".into()), ..OpenOptions::default() };
    let Ok(node) = ftvm_block::Node::open("n", &path, &options, None) else { return };
    let Ok(bitmap) = node.add_bitmap("b", Some(512), false, true) else { return };
    let offer = Offer(Export::new(Wanted {
        id: "x".into(),
        name: "x".into(),
        description: Some("d".into()),
        source: Source::Node(std::sync::Arc::clone(&node)),
        writable: true,
        writethrough: false,
        depth: true,
        bitmaps: vec![bitmap],
    }));
    let text = |t: &str| [&(t.len() as u32).to_be_bytes(), t.as_bytes()].concat();
    let option = |number: u32, body: &[u8]| {
        [&b"IHAVEOPT"[..], &number.to_be_bytes(), &(body.len() as u32).to_be_bytes(), body].concat()
    };
    let contexts =
        [text("x"), 2u32.to_be_bytes().to_vec(), text("base:allocation"), text("qemu:dirty-bitmap:b")];
    let negotiated = [
        3u32.to_be_bytes().to_vec(),
        option(8, &[]),
        option(10, &contexts.concat()),
        option(7, &[text("x"), vec![0; 2]].concat()),
    ];
    for bytes in [data.to_vec(), [&negotiated.concat(), data].concat()] {
        let _ = serve(&mut Client(&bytes), &offer);
        assert!(!offer.0.is_used(), "nobody is there any more");
    }
    drop(offer);
    assert!(!node.bitmaps()[0].info().busy, "its bitmaps are free");
}

/// What an NFS server answers.
pub fn nfs(data: &[u8]) {
    ftvm_block::nfs::fuzz(data);
}

/// A machine's state that comes in: as it is, and as frames whose checksums are right (kind, length in 16 bits, payload).
pub fn migration(data: &[u8]) {
    use ftvm::migration::stream::{head, put, Frame, Reader};
    let read = |bytes: &[u8]| {
        let Ok(mut reader) = Reader::new(bytes) else { return };
        while let Ok(frame) = reader.frame() {
            match frame {
                Frame::State { state, .. } => drop(ftvm::machine::MachineState::from_bytes(&state)),
                Frame::End { .. } => break,
                _ => {}
            }
        }
    };
    read(data);
    let mut stream = head(0);
    let mut rest = data;
    while let [kind, low, high, more @ ..] = rest {
        let (payload, behind) = more.split_at(usize::from(u16::from_le_bytes([*low, *high])).min(more.len()));
        stream.extend(put(*kind, payload));
        rest = behind;
    }
    read(&stream);
}

/// What a VNC client sends.
pub fn rfb(mut data: &[u8]) {
    use ftvm::host::vnc::rfb;
    while let Ok(Some((message, used))) = rfb::parse(data) {
        assert!(used > 0 && used <= data.len());
        data = &data[used..];
        match message {
            rfb::Message::SetPixelFormat(format) => {
                let picture = rfb::Picture { width: 2, height: 1, pixels: vec![0, 0xFF_FFFF] };
                rfb::raw(&mut Vec::new(), &picture, 0, 1, &format);
            }
            rfb::Message::Key { symbol, .. } => {
                rfb::key_name(symbol);
            }
            _ => {}
        }
    }
}

/// The lockstep log, alone and through a backup's state machine.
pub fn log(data: &[u8]) {
    let start = Stamp { position: 1000, ns: 50_000 };
    if let Ok(entries) = Decoder::new(start).take_all(data) {
        let mut bytes = Vec::new();
        let mut encoder = Encoder::new(start);
        for entry in &entries {
            encoder.put(&mut bytes, entry);
        }
        assert_eq!(
            Decoder::new(start).take_all(&bytes).as_ref(),
            Ok(&entries),
            "what is read can be written"
        );
        let timing = Timing {
            heartbeat: Duration::from_millis(100),
            timeout: Duration::from_millis(1000),
            max_lag: Duration::from_millis(1000),
        };
        let epoch = Epoch { number: 1, token: "token".into() };
        let mut backup = Backup::new(timing, epoch, start, Duration::ZERO);
        let message = Message::Log { first: 0, count: entries.len() as u64, entries: data.to_vec() };
        if backup.on_message(&message, Duration::ZERO).is_ok() {
            let mut last = start;
            while let Some(entry) = backup.done() {
                assert!(entry.stamp() >= last, "the log never goes back");
                last = entry.stamp();
                if let log::Entry::Fetch { payload, .. } = entry {
                    let _ = Fetch::from_bytes(&payload);
                }
            }
        }
    }
}

/// A frame of the logging channel: as it comes, and with a checksum that is right.
pub fn wire(data: &[u8]) {
    let _ = wire::read(&mut &*data);
    let Some((flags, payload)) = data.split_first() else { return };
    let flags = flags & 1;
    let crc = crc(&[&[flags], payload]);
    if let Ok(message) = wire::decode(flags, crc, payload) {
        let Ok(frame) = wire::encode(&message) else { return };
        let again = wire::read(&mut frame.as_slice()).map(|(m, _)| m);
        assert_eq!(again.ok(), Some(message), "what is read can be written");
    }
}

fn crc(parts: &[&[u8]]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize()
}

/// A heartbeat's datagram: as it comes, and with a checksum that is right.
pub fn heartbeat(data: &[u8]) {
    let mut listener = Listener::new("token", Side::Backup);
    for datagram in [data.to_vec(), [data, &crc(&[data]).to_le_bytes()].concat()] {
        if let Some(beat) = Heartbeat::decode(&datagram) {
            assert_eq!(beat.encode(), datagram);
        }
        if listener.accept(&datagram) {
            assert!(!listener.accept(&datagram), "a repeated heartbeat is no sign of life");
        }
    }
}

/// A QMP client: what it says must not depend on how it is cut into packets.
pub fn qmp(data: &[u8]) {
    // Without a machine behind it: what needs one is an error.
    let Ok(control) = Control::bare("none") else { return };
    let take = |session: &mut Session| std::iter::from_fn(|| session.step(&control)).collect::<Vec<_>>();
    let mut whole = Session::new();
    whole.feed(data);
    let all = take(&mut whole);
    assert!(all.iter().all(|s| matches!(s, Step::Reply(v) if v.is_object())));
    let mut session = Session::new();
    let mut pieces = Vec::new();
    for piece in data.chunks(7) {
        session.feed(piece);
        pieces.extend(take(&mut session));
    }
    assert_eq!(all, pieces);
    assert_eq!(whole.is_negotiated(), session.is_negotiated());
}

/// A file in memory with a name.
fn memory_file(data: &[u8]) -> Option<(OwnedFd, PathBuf)> {
    let fd = nix::sys::memfd::memfd_create(c"fuzz", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).ok()?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    std::fs::File::options().write(true).open(&path).ok()?.write_all(data).ok()?;
    Some((fd, path))
}

/// A qcow2 image whose internal snapshots and size change.
pub fn snapshots(data: &[u8]) {
    if data.len() > 1 << 20 || data.get(8..16).is_some_and(|offset| offset != [0; 8]) {
        return;
    }
    let Some((_fd, path)) = memory_file(data) else { return };
    let options = OpenOptions { format: Some("qcow2".into()), discard: true, ..OpenOptions::default() };
    let Ok(image) = ftvm_block::open(&path, &options) else { return };
    // A large size in a small file: its tables are made as large when it changes.
    if image.size() > 1 << 30 {
        return;
    }
    let before = image.info().snapshots;
    for snapshot in before.iter().take(4) {
        let _ = image.snapshot(&SnapshotChange::Apply(snapshot.id.clone()));
    }
    if image.snapshot(&SnapshotChange::Create(Snapshot::new("fuzz", 1))).is_ok() {
        assert_eq!(image.info().snapshots.len(), before.len() + 1);
        let _ = image.write_at(0, &[0x5A; 512]);
        let _ = image.flush();
        let delete = SnapshotChange::Delete { id: None, name: Some("fuzz".into()) };
        if !before.iter().any(|s| s.name == "fuzz") && image.snapshot(&delete).is_ok() {
            assert_eq!(image.info().snapshots, before);
        }
    }
    for size in [4 << 20, 64 << 10, 1 << 20] {
        if image.size() <= 1 << 30 && image.resize(size).is_ok() {
            assert_eq!(image.size(), size);
        }
    }
}

/// A qcow2 image: opened, read, written.
pub fn qcow2(data: &[u8]) {
    // An image may name any backing file of the host; here it names none.
    if data.len() > 1 << 20 || data.get(8..16).is_some_and(|offset| offset != [0; 8]) {
        return;
    }
    let Some((_fd, path)) = memory_file(data) else { return };
    let options =
        |read_only| OpenOptions { format: Some("qcow2".into()), read_only, ..OpenOptions::default() };
    let mut buf = vec![0u8; 4096];
    let places = |size: u64| [0, 512, size / 2, size.saturating_sub(4096)].map(|at| at / 512 * 512);
    if let Ok(image) = ftvm_block::open(&path, &options(true)) {
        for at in places(image.size()) {
            let _ = image.read_at(at, &mut buf);
        }
        assert!(image.read_at(image.size(), &mut buf).is_err());
        assert!(image.write_at(0, &buf).is_err());
    }
    if let Ok(image) = ftvm_block::open(&path, &options(false)) {
        for at in places(image.size()) {
            let _ = image.write_at(at, &[0xA5; 1024]);
            let _ = image.discard(at, 512);
            let _ = image.write_zeroes(at, 512, true);
        }
        let _ = image.flush();
        let _ = image.read_at(0, &mut buf);
    }
}

/// A command line, one word a line; each word is also read as a list of keys and values.
pub fn command_line(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let words: Vec<String> = text.lines().map(str::to_owned).collect();
    for word in &words {
        if let Ok(params) = Params::parse(word, Some("implied")) {
            for (key, _) in params.iter() {
                let _ = (params.bool(key), params.number(key), params.size(key, 1 << 20));
            }
        }
    }
    if let Err(e) = ftvm::cli::parse(&words) {
        assert!(!e.to_string().is_empty());
    }
}

/// A record/replay file: as it comes, as the header behind right magic and checksum, and as a batch of entries
/// behind a right header.
pub fn recording(data: &[u8]) {
    let part = |bytes: &[u8]| {
        [&(bytes.len() as u32).to_le_bytes()[..], &crc(&[bytes]).to_le_bytes(), bytes].concat()
    };
    // Version "", machine "", seed, clock base 0, no drives, 1.0 ns.
    let mut header = vec![0u8; 2 + 32 + 2];
    header.extend(1.0f64.to_le_bytes());
    let headed = [&b"ftvm-rr1"[..], &part(data)].concat();
    let batched = [&b"ftvm-rr1"[..], &part(&header), &part(data)].concat();
    for (file, header_is_right) in [(data, false), (&headed[..], false), (&batched[..], true)] {
        let Some((_fd, path)) = memory_file(file) else { return };
        match Player::open(&path.to_string_lossy()) {
            Ok((mut player, _)) => {
                while let Ok(Some(_)) = player.peek() {
                    player.done();
                }
            }
            Err(e) => assert!(!header_is_right, "{e}"),
        }
    }
}

struct Ports(u64);

impl Bus for Ports {
    fn io_read(&mut self, position: u64, port: u16, _: u8) -> u32 {
        u32::from(port) ^ position as u32
    }
    fn io_write(&mut self, _: u64, _: u16, _: u8, _: u32) {}
    fn mmio_read(&mut self, position: u64, addr: u64, _: u8) -> u64 {
        addr ^ position
    }
    fn mmio_write(&mut self, _: u64, _: u64, _: u8, _: u64) {}
    fn clock_ns(&mut self, position: u64) -> u64 {
        position
    }
    fn intr(&mut self) -> bool {
        false
    }
    fn intr_ack(&mut self, _: u64) -> u8 {
        0xFF
    }
    fn eoi(&mut self, _: u64, _: u8) {}
    fn send_ipi(&mut self, _: Ipi) {}
    fn random(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        self.0
    }
    fn break_requested(&self) -> bool {
        false
    }
}

/// Where the code lies, and how many instructions are run.
const CODE: u64 = 0x7C00;
const BUDGET: u64 = 400;

/// A processor with `code` to run: mode 0 real, 1 protected 32-bit, 2 64-bit with paging; privilege level 0.
fn machine(mode: u8, code: &[u8]) -> Option<(SoftCpu, GuestMemory)> {
    let mem = GuestMemory::new(2 << 20).ok()?;
    mem.write(CODE, code).ok()?;
    let mut cpu = SoftCpu::new(0, 1, &CpuModel::parse("max").ok()?);
    let flat = |selector, attr| Segment { selector, base: 0, limit: 0xFFFF_FFFF, attr };
    let data = flat(0x10, 0xC093);
    let mut r: Registers = cpu.registers();
    r.rip = CODE;
    match mode {
        0 => {
            let real = |attr| Segment { selector: 0, base: 0, limit: 0xFFFF, attr };
            r.segs = [real(0x93); 6];
            r.segs[1] = real(0x9B);
            r.idt = (0, 0x3FF);
        }
        _ => {
            let s = cpu.state_mut();
            s.cr0 = 0x33;
            s.cr4 = 0x600;
            r.segs = [data; 6];
            r.segs[1] = flat(8, 0xC09B);
            r.gdt = (0x6000, 0x17);
            for (i, d) in [0u64, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF].into_iter().enumerate() {
                mem.write(0x6000 + i as u64 * 8, &d.to_le_bytes()).ok()?;
            }
            r.idt = (0x5000, 0x7FF);
            if mode == 2 {
                // 2 MiB by one large page.
                for (at, entry) in [(0x1000, 0x2003u64), (0x2000, 0x3003), (0x3000, 0x83)] {
                    mem.write(at, &entry.to_le_bytes()).ok()?;
                }
                s.cr0 |= 1 << 31;
                s.cr4 |= 0x20;
                r.cr3 = 0x1000;
                r.efer = 0xD01;
                r.segs[1] = flat(8, 0xA09B);
            }
        }
    }
    cpu.state_mut().gpr[4] = 0x7000;
    cpu.set_registers(&r);
    Some((cpu, mem))
}

/// Machine code (behind a byte for the mode): it must not stop the program, and how the run is cut into pieces must not show.
pub fn processor(data: &[u8]) {
    let Some((mode, code)) = data.split_first() else { return };
    if code.len() > 4096 {
        return;
    }
    let run = |pieces: &[u64]| -> Option<(Vec<u8>, u64)> {
        let (mut cpu, mem) = machine(mode % 3, code)?;
        let mut bus = Ports(1);
        let mut position = 0;
        for piece in pieces {
            let end = position + piece;
            while position < end {
                let result = cpu.run(&mem, &mut bus, position, end - position);
                position += result.retired;
                match result.exit {
                    Exit::Budget | Exit::Break | Exit::Pause => {}
                    Exit::Internal => panic!("the processor cannot go on"),
                    Exit::Halt | Exit::Shutdown | Exit::Debug => return Some((cpu.save(), position)),
                }
            }
        }
        Some((cpu.save(), position))
    };
    let (whole, position) = run(&[BUDGET]).unwrap_or_default();
    let (pieces, again) = run(&[BUDGET / 3, 1, BUDGET - BUDGET / 3 - 1]).unwrap_or_default();
    assert_eq!(position, again, "the same number of instructions");
    assert!(whole == pieces, "the state depends on how the run is cut");
}
