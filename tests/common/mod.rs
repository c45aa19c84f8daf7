//! What the whole-machine tests share.
#![allow(dead_code)]

pub mod blocks;

use std::net::{SocketAddr, TcpListener};
use std::process::Command;
use std::time::Duration;

use ftvm_harness::guests::{run, tiny};
use ftvm_harness::vm::Vm;
use ftvm_harness::{Result, Scratch};

/// The longest that a step of a guest may take on a busy host.
pub const LONG: Duration = Duration::from_secs(240);

/// The program under test.
pub fn ftvm() -> Command {
    Command::new(env!("CARGO_BIN_EXE_ftvm"))
}

/// The arguments of a tiny guest whose init does what `words` say.
pub fn tiny_args(words: &str) -> Result<Vec<String>> {
    let (kernel, initrd) = tiny()?;
    let append = format!("console=ttyS0 {words}");
    Ok(["-m", "256", "-kernel", &kernel, "-initrd", &initrd, "-append", &append].map(str::to_owned).to_vec())
}

/// Start a tiny guest with `more` arguments (split at blanks).
pub fn start_tiny(scratch: &Scratch, name: &str, words: &str, more: &str) -> Result<Vm> {
    let mut args = tiny_args(words)?;
    args.extend(more.split_whitespace().map(str::to_owned));
    start(scratch, name, &args.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Start a machine.
pub fn start(scratch: &Scratch, name: &str, args: &[&str]) -> Result<Vm> {
    Vm::start(ftvm(), scratch, name, args)
}

/// A TCP port of the loopback address that was free just now.
pub fn free_port() -> Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).map_err(|e| e.to_string())
}

/// A raw image of `mib` MiB with an empty ext4 file system.
pub fn ext4(scratch: &Scratch, name: &str, mib: u32) -> Result<String> {
    let path = scratch.path(name);
    run("mke2fs", &["-q", "-t", "ext4", &path, &format!("{mib}M")])?;
    Ok(path)
}

/// Wait for the end of a machine, which must be a clean one.
pub fn ends_well(vm: &mut Vm) -> Result<()> {
    match vm.wait_exit(LONG)? {
        0 => Ok(()),
        status => Err(format!("the exit status was {status}\n{}\n{}", vm.text(), vm.log())),
    }
}

/// Whether the tests that take minutes are asked for (`FTVM_LONG=1`).
pub fn long(what: &str) -> bool {
    let asked = std::env::var_os("FTVM_LONG").is_some_and(|v| v != "0");
    if !asked {
        eprintln!("skipped: {what} takes minutes; FTVM_LONG=1 runs it");
    }
    asked
}

/// Firmware of 64 KiB whose reset vector jumps to `code` (16-bit real mode, at F000:0000).
pub fn firmware(scratch: &Scratch, name: &str, code: &[u8]) -> Result<String> {
    let mut rom = vec![0xF4u8; 65536];
    rom[..code.len()].copy_from_slice(code);
    rom[0xFFF0..0xFFF5].copy_from_slice(&[0xEA, 0x00, 0x00, 0x00, 0xF0]);
    let path = scratch.path(name);
    std::fs::write(&path, rom).map_err(|e| format!("{path}: {e}"))?;
    Ok(path)
}

/// A boot sector that says a word on the serial line.
pub fn boot_sector(scratch: &Scratch, name: &str, word: &str) -> Result<String> {
    // cs: mov si, text; loop: lodsb; test al, al; jz halt; mov dx, 3F8h; out dx, al; jmp loop; halt: hlt; jmp halt
    let mut code = vec![0x31, 0xC0, 0x8E, 0xD8, 0xFC, 0xBE, 0x17, 0x7C, 0xAC, 0x84, 0xC0, 0x74, 0x06];
    code.extend([0xBA, 0xF8, 0x03, 0xEE, 0xEB, 0xF5, 0xF4, 0xEB, 0xFD, 0x90]);
    assert_eq!(code.len(), 0x17);
    code.extend(word.bytes());
    code.push(0);
    code.resize(1 << 20, 0);
    code[510..512].copy_from_slice(&[0x55, 0xAA]);
    let path = scratch.path(name);
    std::fs::write(&path, code).map_err(|e| e.to_string())?;
    Ok(path)
}
