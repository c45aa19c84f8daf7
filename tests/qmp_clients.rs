//! Clients that others wrote for QEMU, unchanged: QEMU's own Python library with its shell, and the `qapi` crate.

mod common;

use std::io::{BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use common::*;
use ftvm_harness::guests::root;
use ftvm_harness::vm::Vm;
use ftvm_harness::{Result, Scratch};
use qapi::{qmp, Qmp, Stream};

fn machine(scratch: &Scratch) -> Result<Vm> {
    let disk = ext4(scratch, "disk.raw", 16)?;
    start_tiny(scratch, "vm", "halt", &format!("-S -name clients -drive file={disk},format=raw,if=virtio"))
}

/// The Python library, from its package; `None` where it cannot be had.
fn python_library() -> Option<String> {
    let dir = root().join("build/python");
    if !dir.join("qemu/qmp/__init__.py").exists() {
        let done = Command::new("python3")
            .args(["-m", "pip", "install", "-q", "--disable-pip-version-check", "--target"])
            .arg(&dir)
            .arg("qemu.qmp==0.0.3")
            .output();
        match done {
            Ok(out) if out.status.success() => {}
            Ok(out) => {
                eprintln!("skipped: qemu.qmp: {}", String::from_utf8_lossy(&out.stderr).trim());
                return None;
            }
            Err(e) => {
                eprintln!("skipped: python3: {e}");
                return None;
            }
        }
    }
    Some(dir.display().to_string())
}

const SCRIPT: &str = r#"
import asyncio, sys
from qemu.qmp import QMPClient, ExecuteError

async def main():
    qmp = QMPClient('test')
    await qmp.connect(sys.argv[1])
    print('greeting', qmp.greeting.QMP.version['qemu']['major'], qmp.greeting.QMP.capabilities)
    print('name', (await qmp.execute('query-name'))['name'])
    with qmp.listener(names=('STOP', 'RESUME')) as events:
        await qmp.execute('cont')
        print('event', (await events.get())['event'])
        await qmp.execute('stop')
        print('event', (await events.get())['event'])
    many = await asyncio.gather(*(qmp.execute('query-status') for _ in range(200)))
    print('many', len(many), many[0]['status'])
    try:
        await qmp.execute('no-such-command')
    except ExecuteError as err:
        print('error', err.error_class, err)
    try:
        await qmp.execute('set_link', {'name': 5, 'up': True})
    except ExecuteError as err:
        print('error', err.error_class, err)
    print('oob', await qmp.execute_msg(qmp.make_execute_msg('query-version', oob=False)) != None)
    await qmp.disconnect()
asyncio.run(main())
"#;

#[test]
fn qemus_python_library_and_its_shell() -> Result<()> {
    let Some(library) = python_library() else { return Ok(()) };
    let scratch = Scratch::new("python")?;
    let vm = machine(&scratch)?;
    drop(vm.qmp()?);
    let out = Command::new("python3")
        .env("PYTHONPATH", &library)
        .args(["-c", SCRIPT, &vm.socket])
        .output()
        .map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{said}\n{}", String::from_utf8_lossy(&out.stderr));
    let lines: Vec<&str> = said.lines().collect();
    let expected = [
        "greeting 7 ['oob']",
        "name clients",
        "event RESUME",
        "event STOP",
        "many 200 paused",
        "error CommandNotFound The command no-such-command has not been found",
        "error GenericError Invalid parameter type for 'name', expected: string",
        "oob True",
    ];
    assert_eq!(lines, expected, "{said}");

    let mut shell = Command::new("python3")
        .env("PYTHONPATH", &library)
        .args(["-m", "qemu.qmp.qmp_shell", &vm.socket])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| e.to_string())?;
    if let Some(mut input) = shell.stdin.take() {
        input.write_all(b"query-status\nquery-name\n").map_err(|e| e.to_string())?;
    }
    let out = shell.wait_with_output().map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(said.contains("\"status\": \"paused\"") && said.contains("clients"), "{said}");
    Ok(())
}

#[test]
fn the_qapi_crate() -> Result<()> {
    let scratch = Scratch::new("qapi")?;
    let vm = machine(&scratch)?;
    drop(vm.qmp()?);
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let socket = UnixStream::connect(&vm.socket).map_err(|e| text(&e))?;
    let mut client = Qmp::new(Stream::new(BufReader::new(&socket), &socket));
    let greeting = client.handshake().map_err(|e| text(&e))?;
    assert_eq!(greeting.version.qemu.major, 7);
    let status = client.execute(&qmp::query_status {}).map_err(|e| format!("query_status: {e}"))?;
    assert_eq!((status.running, status.status), (false, qmp::RunState::prelaunch));
    client.execute(&qmp::cont {}).map_err(|e| format!("cont: {e}"))?;
    client.nop().map_err(|e| text(&e))?;
    let events: Vec<_> = client.events().collect();
    assert!(events.iter().any(|e| matches!(e, qmp::Event::RESUME { .. })), "{events:?}");
    client.execute(&qmp::stop {}).map_err(|e| format!("stop: {e}"))?;
    let block = client.execute(&qmp::query_block {}).map_err(|e| format!("query_block: {e}"))?;
    assert!(block.iter().any(|b| b.inserted.as_ref().is_some_and(|i| i.drv == "raw")), "{block:?}");
    client.execute(&qmp::query_cpus_fast {}).map_err(|e| format!("query_cpus_fast: {e}"))?;
    client.execute(&qmp::query_chardev {}).map_err(|e| format!("query_chardev: {e}"))?;
    client.execute(&qmp::query_migrate {}).map_err(|e| format!("query_migrate: {e}"))?;
    client.execute(&qmp::query_pci {}).map_err(|e| format!("query_pci: {e}"))?;
    let wrong = client.execute(&qmp::set_link { name: "nobody".into(), up: true });
    assert!(wrong.is_err_and(|e| e.to_string().contains("not found")));
    client.execute(&qmp::quit {}).map_err(|e| format!("quit: {e}"))?;
    Ok(())
}
