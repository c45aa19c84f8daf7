//! A Linux guest boots to the same state whichever tier runs it, and however the run is cut.

#[path = "../examples/linux.rs"]
#[allow(dead_code)]
mod linux;

use ftvm_accel::tcg::Tier;
use ftvm_accel::CpuModel;

#[test]
fn a_linux_boot_does_not_depend_on_the_tier() {
    let guests = concat!(env!("CARGO_MANIFEST_DIR"), "/../build/guests/");
    let read = |name: &str| {
        let path = format!("{guests}{name}");
        std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e} (make guests builds it)"))
    };
    // To where the kernel starts its services: decompression, page tables, interrupts, the first processes.
    let boot = |chunk, tier| {
        let boot = linux::Boot {
            kernel: read("vmlinuz"),
            initrd: read("tiny.cpio.gz"),
            line: "console=ttyS0 8250.nr_uarts=1 quiet".into(),
            until: 1_300_000_000,
            model: CpuModel::parse("max").unwrap(),
            chunk,
            tier,
        };
        let done = boot.run().unwrap();
        (done.position, done.instructions, done.hash)
    };
    let interpreted = boot(0, Some(Tier::Never));
    assert!(interpreted.1 > 500_000_000, "only {} instructions", interpreted.1);
    assert_eq!(boot(0, None), interpreted, "compiled when hot");
    assert_eq!(boot(200_000, Some(Tier::AtOnce)), interpreted, "compiled at once, the run cut");
    assert_eq!(boot(20_000, Some(Tier::Random(7))), interpreted, "tiers at random, the run cut");
}
