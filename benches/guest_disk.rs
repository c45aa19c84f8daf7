//! The disk from inside the guest, side by side with QEMU's TCG on the same qcow2 image in the same run: 4 KiB spread over
//! the disk and 1 MiB in a row, reads and writes, 1 and 16 requests in flight, past the guest's page cache.
//!
//! `cargo bench --bench guest_disk`; FTVM_BENCH_ROUNDS (default 5). The guest is the tiny one on virtio-blk with both programs'
//! defaults (`cache=writeback`); the image's clusters are allocated and in the host's page cache, so what is measured is the
//! path of a request through the guest's kernel, the device and the block layer, not the host's disk. The table is
//! printed and written to `build/bench/`.

mod marked;

use std::fmt::Write as _;
use std::process::Command;

use ftvm_harness::{guests, Result, Scratch};
use marked::{run_marked, Runs};

/// Size of the image in MiB.
const SIZE: &str = "512";
/// A guest that takes longer hangs.
const SECONDS: &str = "300";

fn load(program: &str, more: &[&str], image: &str, runs: &mut Runs) -> Result<()> {
    let (kernel, initrd) = guests::tiny()?;
    let mut c = Command::new("timeout");
    c.args([SECONDS, program, "-m", "256", "-nographic", "-no-reboot", "-nic", "none"]);
    c.args(["-kernel", &kernel, "-initrd", &initrd, "-append", "console=ttyS0 quiet diskbench halt"]);
    c.args(["-drive", &format!("file={image},format=qcow2,if=virtio")]).args(more);
    run_marked(c, None, runs).map_err(|e| format!("{e}; `make guests` brings the guest up to date"))
}

fn bench() -> Result<()> {
    let qemu = "qemu-system-x86_64";
    if Command::new(qemu).arg("--version").output().is_err() {
        println!("skipped: there is no {qemu} to compare with");
        return Ok(());
    }
    let rounds = std::env::var("FTVM_BENCH_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(5usize);
    let scratch = Scratch::new("guest-disk")?;
    let (ftvm, image) = (guests::ftvm()?, scratch.path("disk.qcow2"));
    guests::run("qemu-img", &["create", "-q", "-f", "qcow2", &image, &format!("{SIZE}M")])?;
    let fill = ["bench", "-f", "qcow2", "-w", "--pattern=165", "-s", "1M", "-S", "1M", "-c", SIZE, &image];
    guests::run("qemu-img", &fill)?;
    let (mut ours, mut theirs) = (Runs::default(), Runs::default());
    for round in 0..rounds {
        load(&ftvm, &[], &image, &mut ours)?;
        load(qemu, &["-accel", "tcg"], &image, &mut theirs)?;
        eprintln!("round {round} done");
    }
    let (ours, theirs) = (ours.seconds, theirs.seconds);
    let mut table = String::from(
        "| requests of the guest | QEMU TCG (a second) | ftvm (a second) | times as fast |\n|---|---|---|---|\n",
    );
    for row in ours.order.iter().filter(|row| row.contains("depth")) {
        let (Some(a), Some(b)) = (ours.median(row), theirs.median(row)) else {
            return Err(format!("{row}: only one side has it"));
        };
        let (count, name) = row.split_once(' ').ok_or_else(|| format!("{row}: no number"))?;
        let count: f64 = count.parse().map_err(|e| format!("{row}: {e}"))?;
        let _ = writeln!(table, "| {name} | {:.0} | {:.0} | {:.2} |", count / b, count / a, b / a);
    }
    let _ = writeln!(
        table,
        "\nMedians of {rounds} rounds of each in turn; a qcow2 image of {SIZE} MiB in the host's page cache, virtio-blk, \
         cache=writeback, O_DIRECT and Linux's asynchronous I/O in the guest."
    );
    marked::report(&table, &[("guest_disk.md", &table)])
}

fn main() {
    marked::end(bench());
}
