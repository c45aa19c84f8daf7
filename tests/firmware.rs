//! Programs other than Linux from Debian's packages: iPXE, GRUB's rescue CD, memtest86+.

mod common;

use std::path::Path;

use common::*;
use ftvm_harness::{Result, Scratch};

fn installed(path: &str) -> bool {
    let there = Path::new(path).exists();
    if !there {
        eprintln!("skipped: {path} is not installed");
    }
    there
}

#[test]
fn ipxe_gets_an_address_over_the_default_e1000() -> Result<()> {
    let ipxe = "/usr/lib/ipxe/ipxe.lkrn";
    if !installed(ipxe) {
        return Ok(());
    }
    let scratch = Scratch::new("ipxe")?;
    let mut vm = start(&scratch, "vm", &["-nographic", "-m", "128", "-kernel", ipxe, "-nic", "user"])?;
    vm.wait_console("iPXE initialising devices...", LONG)?;
    vm.wait_console("Open Source Network Boot Firmware", LONG)?;
    vm.wait_console("using 82540em on 0000:00:03.0", LONG)?;
    vm.wait_console("net0: 10.0.2.15/255.255.255.0 gw 10.0.2.2", LONG)
}

#[test]
fn the_rescue_cd_starts_grub() -> Result<()> {
    let cd = "/usr/lib/grub-rescue/grub-rescue-cdrom.iso";
    if !installed(cd) {
        return Ok(());
    }
    let scratch = Scratch::new("grub")?;
    let args = ["-nographic", "-m", "128", "-cdrom", cd, "-boot", "d", "-net", "none"];
    let mut vm = start(&scratch, "vm", &args)?;
    vm.wait_console("SeaBIOS (version", LONG)?;
    vm.wait_console("Booting from DVD/CD", LONG)?;
    vm.wait_console("GNU GRUB", LONG)?;
    vm.wait_console("The highlighted entry will be executed automatically", LONG)
}

#[test]
fn memtest_finds_no_errors() -> Result<()> {
    let memtest = "/boot/memtest86+x64.bin";
    if !installed(memtest) {
        return Ok(());
    }
    let scratch = Scratch::new("memtest")?;
    let args = ["-m", "16", "-kernel", memtest, "-append", "console=ttyS0,115200", "-net", "none"];
    let mut vm = start(&scratch, "vm", &args)?;
    vm.wait_console("Memtest86+", LONG)?;
    // The screen shows the running test once a second of guest time; the last one, which waits for bits to fade, is
    // the one that always lasts longer.
    vm.wait_console("fade over", LONG)?;
    let text = vm.text();
    assert!(text.contains("Errors: 0"), "{text}");
    Ok(())
}
