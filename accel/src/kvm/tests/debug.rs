//! A debugger's points and steps.

use std::time::{Duration, Instant};

use super::guests::AT;
use super::*;
use crate::debug::{DebugHit, Watch};

/// inc word [0x500]; inc ax, bx, cx, dx, si, di; out 0x90, al; and again.
const LOOP: [u8; 14] = [0xFF, 0x06, 0x00, 0x05, 0x40, 0x43, 0x41, 0x42, 0x46, 0x47, 0xE6, 0x90, 0xEB, 0xF2];

/// Let it run until it stops for the debugger.
fn stop_of(kvm: &mut Kvm, board: &mut TestBoard) -> Option<DebugHit> {
    let start = Instant::now();
    kvm.go(0, true).unwrap();
    loop {
        assert!(start.elapsed() < Duration::from_secs(10), "it does not stop");
        kvm.lend(board, None, || std::thread::sleep(Duration::from_micros(200)));
        match kvm.trouble() {
            None => {}
            Some(Trouble::Debug(0, hit)) => {
                kvm.stop(board, || 1_000_000).unwrap();
                return hit;
            }
            Some(other) => panic!("{other:?}"),
        }
    }
}

#[test]
fn points_stop_a_processor_and_steps_move_it() {
    let mem = GuestMemory::new(4 << 20).unwrap();
    mem.write(AT, &LOOP).unwrap();
    let mut board = TestBoard::new(mem);
    let Some((mut kvm, mut cpus)) = kvm(&board.mem, 1) else { return };
    let mut soft = SoftCpu::new(0, 1, &model());
    real_mode(&mut soft, AT);
    cpus[0].load(&soft.saved().to_bytes()).unwrap();
    let rip = |cpus: &[Box<dyn Processor>]| cpus[0].view().unwrap().registers.rip;
    // A fifth one is INT3.
    let executed = points::guests_are_executed();
    let five = DebugPoints { breaks: (AT + 4..=AT + 8).collect(), ..Default::default() };
    assert_eq!(cpus[0].set_debug(Some(&five)), executed);
    if !executed {
        println!("skipped: INT3 and watchpoints, since the processor shows neither VMX nor SVM, so this KVM emulates guests");
        let four = DebugPoints { breaks: (AT + 4..AT + 8).collect(), ..Default::default() };
        assert!(cpus[0].set_debug(Some(&four)));
    }
    assert_eq!(kvm.soft_breaks().len(), usize::from(executed));
    for round in 1..=2 {
        for at in AT + 4..AT + 8 {
            assert_eq!(stop_of(&mut kvm, &mut board), Some(DebugHit::Break(at)), "round {round}");
            assert_eq!(rip(&cpus), at);
            // The machine puts INT3 there while the processors run.
            if executed {
                board.mem.write(AT + 8, &[0xCC]).unwrap();
            }
        }
        if !executed {
            continue;
        }
        assert_eq!(stop_of(&mut kvm, &mut board), Some(DebugHit::Break(AT + 8)));
        board.mem.write(AT + 8, &LOOP[8..9]).unwrap();
        assert_eq!((rip(&cpus), kvm.at_soft_breaks()), (AT + 8, vec![0]));
        kvm.step(&mut board, 0).unwrap();
        assert_eq!((rip(&cpus), kvm.at_soft_breaks()), (AT + 9, vec![]));
        board.mem.write(AT + 8, &[0xCC]).unwrap();
    }
    board.mem.write(AT + 8, &LOOP[8..9]).unwrap();
    let view = cpus[0].view().unwrap();
    // AX, BX, CX: each instruction was executed once in a round.
    assert_eq!([0, 3, 1].map(|r| view.gpr[r] & 0xFFFF), [2; 3]);

    // A write that is watched stops it behind the instruction.
    let watch = Watch { start: 0x500, len: 2, reads: false, writes: true };
    let watched = DebugPoints { watches: vec![watch], ..Default::default() };
    assert_eq!(cpus[0].set_debug(Some(&watched)), executed);
    if executed {
        assert_eq!(stop_of(&mut kvm, &mut board), Some(DebugHit::Watch(watch)));
        assert_eq!(rip(&cpus), AT + 4);
    }
    let reads = Watch { reads: true, writes: false, ..watch };
    assert!(!cpus[0].set_debug(Some(&DebugPoints { watches: vec![reads], ..Default::default() })));

    // Steps, through a port too.
    let from = rip(&cpus) - AT;
    assert!(cpus[0].set_debug(Some(&DebugPoints::default())));
    let places = [0, 4, 5, 6, 7, 8, 9, 10, 12];
    let turn = places.iter().cycle().skip_while(|at| **at != from).skip(1);
    for at in turn.take(12) {
        kvm.set_step(Some(0));
        assert_eq!(stop_of(&mut kvm, &mut board), None);
        assert_eq!(rip(&cpus), AT + at);
    }
    kvm.set_step(None);
    // Its registers are the debugger's to change.
    let mut view = cpus[0].view().unwrap();
    (view.gpr[0], view.registers.rip) = (0x4321, AT + 10);
    assert!(cpus[0].set_view(&view));
    let wrote = board.written.len();
    assert!(cpus[0].set_debug(None));
    kvm.go(0, true).unwrap();
    let start = Instant::now();
    while board.written.len() < wrote + 20 {
        assert!(start.elapsed() < Duration::from_secs(10), "it runs freely");
        kvm.lend(&mut board, None, || std::thread::sleep(Duration::from_micros(200)));
        assert_eq!(kvm.trouble(), None);
    }
    kvm.stop(&mut board, || 2_000_000).unwrap();
    assert_eq!(board.written[wrote], (0x90, 0x21));
}
