//! Both processors execute the same program, instruction by instruction, and must be in the same state after each.

use std::collections::BTreeMap;

use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter};

use super::guests::{journey, journey_gates, AT};
use super::*;

/// The lines in which two states differ, without what is one's own: where the last exception was, clocks, the resume
/// flag (debuggers' business), the place of the last x87 instruction (which handlers of its exceptions look at), and the
/// flags `open`.
fn differences(soft: &Saved, hard: &Saved, open: u64) -> Vec<String> {
    let plain = |s: &Saved| {
        let mut s = s.clone();
        (s.deliveries, s.delivery_at) = (0, 0);
        s.extra = Default::default();
        s.msr.tsc_adjust = 0;
        s.rflags &= !(1 << 16 | open);
        (s.fip, s.fdp, s.fpu[2], s.fpu[3], s.fpu[4]) = (0, 0, 0, 0, 0);
        s
    };
    let (soft, hard) = (format!("{:#x?}", plain(soft)), format!("{:#x?}", plain(hard)));
    let lines = soft.lines().zip(hard.lines()).filter(|(a, b)| a != b);
    lines.map(|(a, b)| format!("software {}, hardware {}", a.trim(), b.trim())).collect()
}

fn instruction(mem: &GuestMemory, s: &Saved) -> Instruction {
    let mut code = [0u8; 15];
    let at = s.segs[1].1.wrapping_add(s.rip);
    let _ = mem.read(at, &mut code);
    let bits = match (s.efer >> 10 & 1, s.segs[1].3 >> 13 & 3) {
        (1, bits) if bits & 1 != 0 => 64,
        (_, bits) if bits & 2 != 0 => 32,
        _ => 16,
    };
    Decoder::with_ip(bits, &code, s.rip, DecoderOptions::NONE).decode()
}

fn text(i: &Instruction) -> String {
    let mut text = String::new();
    IntelFormatter::new().format(i, &mut text);
    text
}

/// RFLAGS bits that an instruction leaves undefined.
fn undefined(i: &Instruction) -> u64 {
    use iced_x86::RflagsBits as R;
    let bits = i.rflags_undefined();
    let pairs = [(R::CF, 0), (R::PF, 2), (R::AF, 4), (R::ZF, 6), (R::SF, 7), (R::OF, 11)];
    pairs.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, n)| 1 << n).sum()
}

#[test]
fn both_processors_agree_after_each_instruction() {
    let make = || {
        let mem = GuestMemory::new(4 << 20).unwrap();
        journey(&mem);
        journey_gates(&mem);
        TestBoard::new(mem)
    };
    let (mut soft_board, mut hard_board) = (make(), make());
    let Some((mut kvm, mut hard)) = kvm(&hard_board.mem, 1) else { return };
    let mut soft = SoftCpu::new(0, 1, &model());
    // A second memory for the software processor would hide writes that only one of them makes.
    let soft_mem = GuestMemory::new(4 << 20).unwrap();
    journey(&soft_mem);
    journey_gates(&soft_mem);
    real_mode(&mut soft, AT);
    hard[0].load(&soft.saved().to_bytes()).unwrap();
    let (mut position, mut steps) = (0, 0u32);
    let mut beyond: BTreeMap<String, String> = BTreeMap::new();
    let mut unlike = Vec::new();
    while !soft_board.finished {
        let before = soft.saved();
        let i = instruction(&soft_mem, &before);
        // Each round of a REP instruction counts as one; hardware may do several at once.
        let rounds = i.has_rep_prefix() || i.has_repne_prefix();
        loop {
            let result = soft.run(&soft_mem, &mut soft_board, position, 1);
            position += result.retired;
            if !rounds || soft.saved().rip != before.rip {
                break;
            }
        }
        let mut target = soft.saved();
        let read = |kvm: &Kvm| kvm.crew.seats()[0].vcpu().saved(0).unwrap();
        let mut stepped = kvm.step(&mut hard_board, 0);
        let mut now = read(&kvm);
        for _ in 0..if rounds { 64 } else { 1 } {
            // Another round; or it stands before the first instruction of an exception's handler, which software
            // has executed.
            if stepped.is_err() || now.rip == target.rip || (!rounds && now.rip == i.next_ip()) {
                break;
            }
            stepped = kvm.step(&mut hard_board, 0);
            now = read(&kvm);
        }
        // After instructions that a hypervisor does itself, the trap may come one or two later.
        for _ in 0..4 {
            if stepped.is_err() || now.rip == target.rip {
                break;
            }
            position += soft.run(&soft_mem, &mut soft_board, position, 1).retired;
            target = soft.saved();
        }
        steps += 1;
        let place = format!("{:#x}: {}", before.rip, text(&i));
        let open = undefined(&i);
        match &stepped {
            Err(e) => {
                beyond.entry(place).or_insert(e.to_string().lines().next().unwrap_or_default().to_owned());
            }
            Ok(()) => {
                let found = differences(&target, &now, open);
                // KVM's emulator takes AAD's flags from 16 bits.
                if !found.is_empty() && i.mnemonic() != iced_x86::Mnemonic::Aad {
                    unlike.push(format!("{place}: {}", found.join("; ")));
                }
            }
        }
        if stepped.is_err() || !differences(&target, &now, 0).is_empty() {
            hard[0].load(&target.to_bytes()).unwrap();
        }
        let (mut ours, mut theirs) = (vec![0u8; 1 << 20], vec![0u8; 1 << 20]);
        soft_mem.read(0, &mut ours).unwrap();
        hard_board.mem.read(0, &mut theirs).unwrap();
        if let Some(at) = ours.iter().zip(&theirs).position(|(a, b)| a != b) {
            // Flags that are undefined may have been pushed, and the trap flag, by which hardware steps.
            if stepped.is_ok() && open == 0 && !matches!(ours[at] ^ theirs[at], 0x10 | 1) {
                unlike.push(format!("{}: memory at {at:#x}: {} {}", text(&i), ours[at], theirs[at]));
            }
            hard_board.mem.write(0, &ours).unwrap();
        }
        assert!(steps < 2000, "the program does not end");
    }
    println!("{steps} instructions; beyond this KVM are {}:", beyond.len());
    for (code, what) in &beyond {
        println!("  {code}: {what}");
    }
    assert!(unlike.is_empty(), "{} differ:\n{}", unlike.len(), unlike.join("\n"));
    assert_eq!(soft_board.written, hard_board.written);
    assert_eq!(soft_board.reads, hard_board.reads);
}
