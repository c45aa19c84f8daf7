//! Record and replay: the recording is all that a replay needs, every state hash is equal to the end, and a
//! recording that does not fit is refused.

mod common;

use std::time::Duration;

use common::*;
use ftvm_harness::client::{Client, Line};
use ftvm_harness::{Result, Scratch};
use serde_json::Value;

fn icount(mode: &str, file: &str) -> String {
    format!("-icount shift=3,rr={mode},rrfile={file}")
}

/// Replay, and check that it went to the end with equal hashes and the same console.
fn replays(scratch: &Scratch, words: &str, more: &str, recorded: &str) -> Result<()> {
    let mut vm = start_tiny(scratch, "replay", words, more)?;
    ends_well(&mut vm)?;
    let log = vm.log();
    assert!(log.contains("replay ended at position") && log.contains("state hashes equal"), "{log}");
    assert_eq!(vm.text(), recorded, "the console differs");
    Ok(())
}

#[test]
fn a_boot_with_a_screen_replays_with_equal_hashes() -> Result<()> {
    let scratch = Scratch::new("rrboot")?;
    let file = scratch.path("boot.rr");
    let words = "console=tty0 console=ttyS0 halt";
    let more = format!("-net none -vga std -smp 2 {}", icount("record", &file));
    let mut vm = start_tiny(&scratch, "record", words, &more)?;
    ends_well(&mut vm)?;
    replays(&scratch, words, &more.replace("rr=record", "rr=replay"), &vm.text())
}

#[test]
fn disk_and_network_load_replays_without_the_image_and_the_network() -> Result<()> {
    let scratch = Scratch::new("rrload")?;
    let (file, image) = (scratch.path("load.rr"), ext4(&scratch, "disk.raw", 48)?);
    let (tcp, http) = (free_port()?, free_port()?);
    let nic = format!("-nic user,model=virtio,hostfwd=tcp:{tcp}-:7000,hostfwd=tcp:{http}-:8080");
    let more = format!("{nic} -smp 2 -drive file={image},format=raw,if=virtio {}", icount("record", &file));
    let words = "net disk serve diskload";
    let mut vm = start_tiny(&scratch, "record", words, &more)?;
    vm.wait_console("ftload: http on 8080", LONG)?;
    vm.wait_console("ftload: serving on 7000", LONG)?;
    let session = Client::session(None, tcp, Duration::from_millis(2));
    let journal = Client::journal(None, tcp, "line", Duration::from_millis(2));
    let counter = Client::http(None, http, "200 OK", Duration::from_millis(5));
    vm.wait_console("disk: 8 MiB ok", LONG)?;
    ftvm_harness::wait_for("progress of the clients", LONG, || {
        [&session, &journal, &counter].iter().all(|c| c.answers() >= 30).then_some(())
    })?;
    for client in [session, journal, counter] {
        let seen = client.finish()?;
        assert!(seen.wrong.is_empty(), "{:?}", seen.wrong);
    }
    assert_eq!(Line::connect(tcp)?.ask("inc")?.0, "1");
    let mut qmp = vm.qmp()?;
    qmp.command("stop", Value::Null)?;
    let (ft, icount) = (qmp.ft()?, qmp.command("query-replay", Value::Null)?["icount"].clone());
    qmp.command("quit", Value::Null)?;
    ends_well(&mut vm)?;
    // The log has what the guest read from its disk. The file has a header and an end besides, and heads of batches.
    let size = std::fs::metadata(&file).map_err(|e| e.to_string())?.len();
    let log = ft["log-bytes"].as_u64().unwrap_or(0);
    assert!(log > 8 << 20 && (log..log + 4096 + log / 4096).contains(&size), "{ft} {size}");
    assert_eq!(ft["position"], icount);
    std::fs::rename(&image, scratch.path("gone")).map_err(|e| e.to_string())?;
    replays(&scratch, words, &more.replace("rr=record", "rr=replay"), &vm.text())
}

/// Firmware that counts on a debug port for a while and then ends the machine.
fn small(scratch: &Scratch) -> Result<String> {
    // mov cx, 5000; l: in al, 0x40; out 0xed, al; loop l; mov al, 0; out 0xf4, al; hlt
    firmware(
        scratch,
        "small.rom",
        &[0xB9, 0x88, 0x13, 0xE4, 0x40, 0xE6, 0xED, 0xE2, 0xFA, 0xB0, 0x00, 0xE6, 0xF4, 0xF4],
    )
}

#[test]
fn a_recording_that_does_not_fit_is_refused_in_one_sentence() -> Result<()> {
    let scratch = Scratch::new("rrbad")?;
    let (rom, file) = (small(&scratch)?, scratch.path("small.rr"));
    let device = "isa-debug-exit,iobase=0xf4,iosize=0x04";
    let run = |name: &str, memory: &str, mode: &str, file: &str| -> Result<(i32, String)> {
        let icount = format!("shift=3,rr={mode},rrfile={file}");
        let args = ["-bios", &rom, "-m", memory, "-net", "none", "-device", device, "-icount", &icount];
        let mut vm = start(&scratch, name, &args)?;
        Ok((vm.wait_exit(LONG)?, vm.log()))
    };
    assert_eq!(run("record", "16", "record", &file)?, (1, String::new()));
    let (status, log) = run("replay", "16", "replay", &file)?;
    assert!(status == 0 && log.contains("replay ended at position"), "{status} {log}");

    let good = std::fs::read(&file).map_err(|e| e.to_string())?;
    let bad = scratch.path("bad.rr");
    let refused = |what: &str, data: &[u8], memory: &str, sentence: &str| -> Result<()> {
        std::fs::write(&bad, data).map_err(|e| e.to_string())?;
        let (status, log) = run("bad", memory, "replay", &bad)?;
        let lines: Vec<&str> = log.lines().collect();
        assert!(
            status == 1 && lines.len() == 1 && lines[0].starts_with("ftvm: ") && log.contains(sentence),
            "{what}: {status} {log}"
        );
        Ok(())
    };
    refused(
        "another memory size",
        &good,
        "32",
        "was recorded on another machine: memory was 16 MiB, is 32 MiB",
    )?;
    refused("no recording", b"hello, world", "16", "is not a record/replay file of ftvm")?;
    for at in [9, 40, good.len() / 2, good.len() - 3] {
        let mut changed = good.clone();
        changed[at] ^= 0x10;
        refused(&format!("byte {at} changed"), &changed, "16", "is damaged")?;
    }
    for cut in [good.len() - 1, good.len() / 2] {
        refused(&format!("cut at {cut}"), &good[..cut], "16", "is damaged")?;
    }
    std::fs::remove_file(&bad).map_err(|e| e.to_string())?;
    let (status, log) = run("bad", "16", "replay", &bad)?;
    assert!(status == 1 && log.contains("No such file or directory"), "{status} {log}");
    Ok(())
}
