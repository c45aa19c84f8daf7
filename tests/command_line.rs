//! Wrong command lines: exit status 1 and one sentence that names the cause.

mod common;

use std::process::Stdio;

use common::*;
use ftvm_harness::guests::run;
use ftvm_harness::{Result, Scratch};

/// Run to the end; the status and the messages.
fn say(args: &[&str]) -> Result<(i32, String)> {
    let out = ftvm().args(args).stdin(Stdio::null()).output().map_err(|e| e.to_string())?;
    Ok((out.status.code().unwrap_or(-1), String::from_utf8_lossy(&out.stderr).into_owned()))
}

/// Each line: the arguments, and what the message says after `ftvm: `.
const WRONG: &[(&str, &str)] = &[
    ("-frobnicate", "-frobnicate: invalid option"),
    ("stray extra", "drive"),
    ("-m", "-m: requires an argument"),
    ("-m lots", "-m lots:"),
    ("-m 0", "guest memory must be between 1M and 1T"),
    ("-m 128,slots=2", "memory cannot be hot-plugged"),
    ("-smp 0", "Invalid SMP CPUs 0"),
    ("-smp two", "-smp two:"),
    ("-cpu pentium9", "-cpu pentium9:"),
    ("-cpu qemu64,+warp", "warp"),
    ("-machine q36", "unsupported machine type 'q36'"),
    ("-accel warp", "warp"),
    ("-device warp-drive", "'warp-drive' is not a valid device model name"),
    ("-device virtio-rng-pci,speed=9", "Property 'virtio-rng-pci.speed' not found"),
    ("-device virtio-blk-pci", "drive"),
    ("-device virtio-blk-pci,drive=nowhere", "Property 'virtio-blk-pci.drive' can't find value 'nowhere'"),
    ("-device e1000,netdev=nowhere", "Property 'e1000.netdev' can't find value 'nowhere'"),
    ("-device e1000,mac=12:34", "mac"),
    ("-device virtio-rng-pci,rng=nothing", "Property 'virtio-rng-pci.rng' can't find value 'nothing'"),
    ("-drive file=/no/such.qcow2", "/no/such.qcow2: "),
    ("-drive file=/no/such.raw,format=raw", "No such file or directory"),
    ("-drive file=/etc/hostname,format=qcow2", "/etc/hostname"),
    ("-drive file=/etc/hostname,format=vhdx9", "vhdx9"),
    ("-drive file=/etc/hostname,colour=red", "'colour'"),
    ("-drive file=/etc/hostname,if=mfm", "mfm"),
    ("-drive file=/etc/hostname,cache=warm", "cache"),
    ("-drive file=x,werror=maybe", "'maybe' invalid write error action"),
    ("-drive file=x,rerror=enospc", "'enospc' invalid read error action"),
    ("-drive file=x,aio=native", "requires cache.direct=on"),
    ("-drive file=x,bps_max=5", "require corresponding bps/iops values"),
    ("-drive file=x,throttling.iops-warp=5", "'throttling.iops-warp'"),
    ("-drive file=x,detect-zeroes=unmap", "without setting discard operation to unmap"),
    ("-drive file=iscsi://h/x", "iSCSI URL must be of the form"),
    ("-drive file=iscsi://127.0.0.1:1/iqn.x:y/1", "Connection refused"),
    ("-drive file=nfs://h", "No file path specified in the NFS URL"),
    ("-drive file=nfs://h/x?warp=1", "Unknown NFS parameter name"),
    ("-drive file=nfs://127.0.0.1/a/b?nfsport=1&mountport=1", "Connection refused"),
    (
        "-blockdev driver=iscsi,node-name=f,portal=h,transport=iser,target=x",
        "transport 'iser' is not supported",
    ),
    ("-blockdev driver=iscsi,node-name=f,portal=h,target=x,password-secret=s", "No secret with id 's'"),
    ("-blockdev driver=nfs,node-name=f,server.host=h,path=/x,colour=red", "'colour'"),
    ("-cdrom /no/such.iso", "/no/such.iso"),
    ("-kernel /no/such.bin", "could not load kernel '/no/such.bin': No such file or directory"),
    ("-kernel /etc/passwd", "kernel"),
    ("-bios /no/such.bin", "could not load firmware '/no/such.bin'"),
    ("-bios nosuch.bin", "could not find firmware 'nosuch.bin'"),
    ("-initrd /dev/null", "-initrd"),
    ("-append quiet", "-append"),
    ("-netdev warp,id=n0", "warp"),
    ("-netdev user", "id"),
    ("-netdev user,id=n0 -netdev user,id=n0", "Duplicate ID 'n0' for netdev"),
    ("-device virtio-rng-pci,id=a -device virtio-rng-pci,id=a", "Duplicate ID 'a' for device"),
    ("-chardev null,id=c -chardev null,id=c", "Duplicate ID 'c' for chardev"),
    ("-object rng-builtin,id=r -object rng-builtin,id=r", "Duplicate ID 'r' for object"),
    ("-netdev user,id=n0,hostfwd=tcp:nonsense", "nonsense"),
    ("-nic user,model=ne9000", "ne9000"),
    ("-serial warp", "'warp' is not a valid char driver"),
    ("-serial file:/no/such/dir/x", "/no/such/dir/x"),
    ("-serial chardev:nowhere", "chardev 'nowhere' not found"),
    ("-qmp unix:/no/such/dir/q,server=on,wait=off", "/no/such/dir/q"),
    ("-boot order=z", "Invalid boot device 'z'"),
    ("-uuid 123", "-uuid 123"),
    ("-rtc base=yesterday", "invalid datetime format: 'yesterday'"),
    ("-icount shift=99", "Invalid shift value"),
    ("-icount shift=3,rr=sing", "sing"),
    ("-icount shift=3,rr=record,rrfile=/no/such/dir/r", "/no/such/dir/r"),
    ("-icount shift=3,rr=replay,rrfile=/no/such/r", "/no/such/r"),
    ("-object warp,id=x", "invalid object type: warp"),
    ("-ft tertiary", "tertiary"),
    ("-ft primary,speed=9", "'speed'"),
    ("-ft primary", "lock"),
    ("-ft backup", "peer"),
    ("-ft primary,lock=/tmp/x -accel kvm", "fault tolerance (-ft) needs the deterministic processor"),
    ("-accel kvm -icount shift=3", "-icount is not allowed with hardware virtualization"),
    ("-accel kvm -icount shift=3,rr=record,rrfile=/tmp/x", "need the deterministic processor"),
    ("-machine pc,accel=tcg -accel tcg", "options are incompatible"),
    ("-d warp", "unknown log item"),
    ("-pidfile /no/such/dir/p", "/no/such/dir/p"),
];

#[test]
fn every_wrong_command_line_is_one_sentence_and_status_1() -> Result<()> {
    let mut wrong = Vec::new();
    for (line, sentence) in WRONG {
        let mut args = vec!["-display", "none"];
        if !line.contains("-serial") {
            args.extend(["-serial", "none"]);
        }
        args.extend(line.split(' '));
        let child = ftvm()
            .args(&args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| e.to_string())?;
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        let guard = std::thread::spawn(move || child.wait_with_output());
        let ended = ftvm_harness::wait_for("its end", std::time::Duration::from_secs(10), || {
            guard.is_finished().then_some(())
        });
        if ended.is_err() {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        let out = guard.join().map_err(|_| "thread")?.map_err(|e| e.to_string())?;
        let text = String::from_utf8_lossy(&out.stderr);
        let fine = ended.is_ok()
            && out.status.code() == Some(1)
            && text.starts_with("ftvm: ")
            && text.contains(sentence)
            && text.lines().count() <= 2;
        if !fine {
            wrong.push(format!("ftvm {line}\n    status {:?}: {}", out.status.code(), text.trim_end()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn an_image_in_use_is_refused() -> Result<()> {
    let scratch = Scratch::new("locked")?;
    let image = scratch.path("disk.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "16M"])?;
    let drive = format!("file={image}");
    let first = start(&scratch, "first", &["-drive", &drive, "-net", "none", "-S"])?;
    first.qmp()?;
    let (status, text) = say(&["-drive", &drive, "-display", "none", "-serial", "none", "-net", "none"])?;
    assert_eq!(status, 1);
    assert!(text.contains(&image) && text.contains("lock"), "{text}");
    let info = run("qemu-img", &["info", &image]);
    assert!(info.is_err_and(|e| e.contains("lock")), "qemu-img sees the lock too");
    Ok(())
}

#[test]
fn a_failed_start_leaves_nothing_behind() -> Result<()> {
    let scratch = Scratch::new("nothing")?;
    let image = scratch.path("disk.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "16M"])?;
    let before = std::fs::read(&image).map_err(|e| e.to_string())?;
    let (pid, qmp, rr) = (scratch.path("pid"), scratch.path("qmp"), scratch.path("rr"));
    let (status, text) = say(&[
        "-drive",
        &format!("file={image}"),
        "-pidfile",
        &pid,
        "-qmp",
        &format!("unix:{qmp},server=on,wait=off"),
        "-icount",
        &format!("shift=3,rr=record,rrfile={rr}"),
        "-daemonize",
        "-display",
        "none",
        "-net",
        "none",
        "-kernel",
        "/no/such.bin",
    ])?;
    assert_eq!((status, text.lines().count()), (1, 1), "{text}");
    assert!(text.contains("/no/such.bin"), "{text}");
    let left: Vec<_> = std::fs::read_dir(&scratch.0).map_err(|e| e.to_string())?.flatten().collect();
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(std::fs::read(&image).map_err(|e| e.to_string())?, before, "the image changed");
    Ok(())
}
