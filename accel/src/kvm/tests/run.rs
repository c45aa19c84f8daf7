//! Whole runs on threads: devices, interrupts, two processors, pages that were written, and moves between the two kinds
//! of processors while a program runs.

use std::time::{Duration, Instant};

use super::guests::{apic, crunch, doorbells, real_mode_devices, AT};
use super::*;
use crate::mem::{Shadow, DIRTY_MIGRATION};

/// The boot processor in real mode at [`AT`].
fn begin(cpus: &mut [Box<dyn Processor>]) {
    let mut soft = SoftCpu::new(0, cpus.len() as u32, &model());
    real_mode(&mut soft, AT);
    cpus[0].load(&soft.saved().to_bytes()).unwrap();
}

fn word(mem: &GuestMemory, at: u64) -> u32 {
    let mut b = [0; 4];
    mem.read(at, &mut b).unwrap();
    u32::from_le_bytes(b)
}

/// Lend until `done`, delivering what the board has.
fn until(kvm: &Kvm, board: &mut TestBoard, what: &str, done: impl Fn(&TestBoard) -> bool) {
    let start = Instant::now();
    while !done(board) {
        assert!(start.elapsed() < Duration::from_secs(10), "{what} does not happen");
        kvm.deliver(board).unwrap();
        kvm.lend(board, None, || std::thread::sleep(Duration::from_micros(200)));
        assert_eq!(kvm.trouble(), None);
    }
}

fn wrote(board: &TestBoard, port: u64) -> bool {
    board.written.iter().any(|w| w.0 == port)
}

#[test]
fn exits_reach_the_devices_and_the_8259_reaches_the_processor() {
    let mem = GuestMemory::new(4 << 20).unwrap();
    real_mode_devices(&mem);
    let mut image = vec![0xAA; 0x2_0000];
    image[0x20] = 0x33;
    image[0x1_FFF0] = 0x5C;
    mem.set_firmware(image).unwrap();
    mem.set_shadow(0xE_0000, Shadow::WriteRam);
    let mut board = TestBoard::new(mem);
    let Some((mut kvm, mut cpus)) = kvm(&board.mem, 1) else { return };
    begin(&mut cpus);
    board.next_intr = Some(0x20);
    kvm.go(0, false).unwrap();
    until(&kvm, &mut board, "the first interrupt's end", |b| wrote(b, 0x56));
    // It sleeps, or is about to.
    board.intr = Some(0x21);
    until(&kvm, &mut board, "the end", |b| b.finished);
    let mut got = [0; 8];
    board.mem.read(0x600, &mut got).unwrap();
    // The read is not aligned: a byte, a word, a byte.
    let answer = |a: u64| a ^ 0x0123_4567_89AB_CDEF;
    let expected = [
        answer(0xB_8021) as u8,
        answer(0xB_8022) as u8,
        (answer(0xB_8022) >> 8) as u8,
        answer(0xB_8024) as u8,
    ];
    assert_eq!(got[..4], expected);
    assert_eq!(got[4..7], [0x5C, 0x5C, 0x33], "ROM stays, and is read where writes go to RAM");
    let mut behind = [0];
    board.mem.read(0xE_0020, &mut behind).unwrap();
    assert_eq!(behind, [0x77], "the write went to RAM");
    assert!(board.written.contains(&(0xB_8010, 0x1234_5678)));
    let strings: Vec<u64> = board.written.iter().filter(|w| w.0 == 0x90).map(|w| w.1).collect();
    let mut code = [0; 3];
    board.mem.read(AT, &mut code).unwrap();
    assert_eq!(strings, code.map(u64::from));
    assert_eq!(word(&board.mem, 0x620), (0x5A5A_5A5A ^ 0x90) & 0xFFFF | (0x5A5A ^ 0x90) << 16);
    assert_eq!(word(&board.mem, 0x610) & 0xFFFF, 0x0101);
}

#[test]
fn local_apics_have_timers_other_processors_and_messages() {
    let mem = GuestMemory::new(4 << 20).unwrap();
    apic(&mem);
    let mut board = TestBoard::new(mem);
    let Some((mut kvm, mut cpus)) = kvm(&board.mem, 2) else { return };
    begin(&mut cpus);
    let start = Instant::now();
    kvm.go(0, false).unwrap();
    until(&kvm, &mut board, "the timer", |b| wrote(b, 0x61));
    assert!(start.elapsed() >= Duration::from_micros(300), "three periods in {:?}", start.elapsed());
    until(&kvm, &mut board, "the second processor's start", |b| wrote(b, 0x62));
    assert!(board.written.contains(&(0x70, 7)));
    board.messages.push(ApicMessage { address: 0xFEE0_0000, data: 0x4041 });
    until(&kvm, &mut board, "the edge-triggered message", |b| wrote(b, 0x63));
    assert!(board.ended.is_empty(), "nobody is told of its end");
    let level = ApicMessage { address: 0xFEE0_0000, data: 0xC042 };
    board.pins = vec![None; 24];
    board.pins[11] = Some(level);
    for n in 1..=2 {
        board.messages.push(level);
        until(&kvm, &mut board, "the end of a level-triggered interrupt", |b| b.ended.len() == n);
    }
    until(&kvm, &mut board, "the end", |b| b.finished);
    assert_eq!(board.ended, [0x42, 0x42]);
    kvm.stop(&mut board, || 1_000_000_000).unwrap();
    for (i, cpu) in cpus.iter().enumerate() {
        let seen = cpu.view().unwrap().registers;
        assert!(seen.halted, "processor {i}: {}", cpu.describe());
    }
}

/// Memory with [`crunch`], which is to make so many rounds.
fn crunching(rounds: u32) -> GuestMemory {
    let mem = GuestMemory::new(4 << 20).unwrap();
    crunch(&mem);
    mem.write(0x700, &rounds.to_le_bytes()).unwrap();
    mem
}

/// What [`crunch`] gives after so many rounds.
fn crunch_alone(rounds: u32) -> (u64, Vec<u8>) {
    let mem = crunching(rounds);
    let mut board = TestBoard::new(GuestMemory::new(1 << 20).unwrap());
    let mut soft = SoftCpu::new(0, 1, &model());
    real_mode(&mut soft, AT);
    let mut position = 0;
    while !board.finished {
        position += soft.run(&mem, &mut board, position, 100_000).retired;
    }
    let mut data = vec![0; 0x4_0000];
    mem.read(0x4_0000, &mut data).unwrap();
    (board.written[0].1, data)
}

#[test]
fn a_program_that_moves_between_the_processors_computes_the_same() {
    const ROUNDS: u32 = 100_000;
    let mut board = TestBoard::new(crunching(ROUNDS));
    let Some((mut kvm, mut cpus)) = kvm(&board.mem, 1) else { return };
    begin(&mut cpus);
    let (mut now, mut moves, mut position) = (0, 0, 0);
    let mut slowest = Duration::ZERO;
    while !board.finished {
        kvm.go(now, false).unwrap();
        kvm.lend(&mut board, None, || std::thread::sleep(Duration::from_millis(1)));
        assert_eq!(kvm.trouble(), None);
        let start = Instant::now();
        now = kvm.stop(&mut board, || now + 1_000_000).unwrap();
        let hard = Saved::from_bytes(&cpus[0].save(), 0, model().signature()).unwrap();
        let mut soft = SoftCpu::new(0, 1, &model());
        soft.load(&hard.to_bytes()).unwrap();
        slowest = slowest.max(start.elapsed());
        assert_eq!(soft.saved(), hard, "to the software processor and out of it");
        // The memory of the board, which the software processor must not have together with the board itself.
        let lone = std::mem::replace(&mut board.mem, GuestMemory::new(1 << 20).unwrap());
        let result = soft.run(&lone, &mut board, position, 3_000);
        position += result.retired;
        board.mem = lone;
        let mut there = soft.saved();
        kvm.set_time(now);
        cpus[0].load(&there.to_bytes()).unwrap();
        let back = kvm.crew.seats()[0].vcpu().saved(now).unwrap();
        (there.deliveries, there.delivery_at) = (back.deliveries, back.delivery_at);
        assert_eq!(back, there, "to KVM and out of it");
        moves += 1;
    }
    let (sum, data) = crunch_alone(ROUNDS);
    println!("{moves} moves there and back, the slowest out of KVM took {slowest:?}");
    assert!(moves > 3);
    assert_eq!(board.written.iter().find(|w| w.0 == 0x90), Some(&(0x90, sum)));
    let mut got = vec![0; 0x4_0000];
    board.mem.read(0x4_0000, &mut got).unwrap();
    assert!(got == data);
}

#[test]
fn written_pages_are_found_while_the_guest_runs() {
    const ROUNDS: u32 = 60_000;
    let mut board = TestBoard::new(crunching(ROUNDS));
    let Some((mut kvm, mut cpus)) = kvm(&board.mem, 1) else { return };
    begin(&mut cpus);
    kvm.go(0, false).unwrap();
    kvm.lend(&mut board, None, || std::thread::sleep(Duration::from_millis(2)));
    // A migration: copy everything, then what was written meanwhile, until the machine stops; then the rest.
    let mut copy = vec![0u8; 4 << 20];
    kvm.track_dirty(true).unwrap();
    board.mem.set_all_dirty(DIRTY_MIGRATION);
    let mut passes = Vec::new();
    loop {
        let last = board.finished;
        if last {
            kvm.stop(&mut board, || 1_000_000).unwrap();
        }
        kvm.collect_dirty(&board.mem).unwrap();
        let (mut cursor, mut pages) = (0, 0);
        loop {
            let list = board.mem.take_dirty(DIRTY_MIGRATION, &mut cursor, 64);
            if list.is_empty() {
                break;
            }
            for gpa in list {
                let to = &mut copy[gpa as usize..gpa as usize + 4096];
                board.mem.read(gpa, to).unwrap();
                pages += 1;
            }
        }
        passes.push(pages);
        if last {
            break;
        }
        kvm.lend(&mut board, None, || std::thread::sleep(Duration::from_millis(5)));
        assert_eq!(kvm.trouble(), None);
    }
    println!("pages in each pass: {passes:?}");
    assert_eq!(passes[0], 1024);
    assert!(passes[1..].iter().any(|n| *n > 0) && passes[1..].iter().all(|n| *n < 200), "{passes:?}");
    let mut ram = vec![0u8; 4 << 20];
    board.mem.read(0, &mut ram).unwrap();
    assert!(ram == copy, "the copy differs");
}

#[test]
fn time_goes_on_from_where_it_stood() {
    let mem = GuestMemory::new(4 << 20).unwrap();
    crunch(&mem);
    mem.write(0x700, &u32::MAX.to_le_bytes()).unwrap();
    let mut board = TestBoard::new(mem);
    let Some((mut kvm, mut cpus)) = kvm(&board.mem, 2) else { return };
    begin(&mut cpus);
    let mut now = 5_000_000_000;
    for _ in 0..20 {
        let start = Instant::now();
        kvm.go(now, false).unwrap();
        kvm.lend(&mut board, None, || std::thread::sleep(Duration::from_millis(1)));
        let after = kvm.stop(&mut board, || now + start.elapsed().as_nanos() as u64).unwrap();
        let took = start.elapsed().as_nanos() as u64;
        // Where the host's TSC is not steady, its KVM may let the guest's run a little ahead.
        assert!(after > now && after <= now + took + 50_000_000, "{now} {after} {took}");
        std::thread::sleep(Duration::from_millis(3));
        now = after;
    }
    assert!(now < 5_000_000_000 + 1_000_000_000, "it stood while the processors did");
}

#[test]
fn doorbells_ring_without_an_exit_and_are_never_lost() {
    let mem = GuestMemory::new(4 << 20).unwrap();
    doorbells(&mem);
    let mut board = TestBoard::new(mem);
    let Some((mut kvm, mut cpus)) = kvm(&board.mem, 1) else { return };
    begin(&mut cpus);
    let in_memory = |token| Bell { place: BellPlace::Memory(0xB_8010), token };
    board.bells = (1, vec![in_memory(5), Bell { place: BellPlace::Port(0x90, 7), token: 6 }]);
    kvm.deliver(&mut board).unwrap();
    kvm.go(0, false).unwrap();
    until(&kvm, &mut board, "the end", |b| b.finished);
    // All the bells' writes came as signals (which may be heard later), as many as there were or fewer; another value is an
    // exit.
    until(&kvm, &mut board, "both bells", |b| b.rung.contains(&5) && b.rung.contains(&6));
    assert_eq!(board.written, [(0x90, 8), (0xF4, board.written[1].1)]);
    assert!(board.rung.len() <= 2001);

    // Whenever it stands still, what was signalled has been rung.
    board.finished = false;
    for _ in 0..20 {
        board.rung.clear();
        let before = word(&board.mem, 0x600);
        kvm.go(0, true).unwrap();
        let start = Instant::now();
        while word(&board.mem, 0x600) < before + 3 {
            assert!(start.elapsed() < Duration::from_secs(10), "it does not go on");
            std::thread::yield_now();
        }
        kvm.stop(&mut board, || 0).unwrap();
        assert!(board.rung.contains(&5));
        let silent = board.rung.len();
        kvm.lend(&mut board, None, || std::thread::sleep(Duration::from_millis(2)));
        assert_eq!(board.rung.len(), silent);
    }

    // The window moves: what is signalled belongs to the old place, the new place's token is another.
    board.bells = (2, vec![in_memory(9)]);
    board.rung.clear();
    kvm.deliver(&mut board).unwrap();
    kvm.go(0, true).unwrap();
    until(&kvm, &mut board, "the other bell", |b| b.rung.contains(&9));
    kvm.stop(&mut board, || 0).unwrap();
    let last_old = board.rung.iter().rposition(|t| *t == 5);
    let first_new = board.rung.iter().position(|t| *t == 9);
    assert!(last_old < first_new, "{:?}", board.rung);
    assert_eq!(board.written.len(), 2);
}
