//! Real storage servers, nfs-ganesha by `nfs://` and tgtd by `iscsi://`, each on a host of its own (a network
//! namespace): what the block layer does with them, and protected machines on them. The primary is killed, cut
//! off, and paused; writes come late; servers are restarted and out of reach.

use std::path::Path;
use std::sync::{Arc, Barrier};
use std::time::Duration;

use ftvm::lockstep::{lun_lock, Arbiter, Epoch, FileLock, LunArbiter, Side, Verdict};
use ftvm_block::takeover::Takeover;
use ftvm_block::{BlockError, Image, OpenOptions, Reserve};
use ftvm_harness::client::Line;
use ftvm_harness::etcd::Etcd;
use ftvm_harness::hosts::{become_root, Network, GUEST};
use ftvm_harness::pair::{Clients, Guest, Pair};
use ftvm_harness::storage::{qemu_img, Kind, Server, CHAP};
use ftvm_harness::vm::Vm;
use ftvm_harness::{guests, wait_for, Result, Scratch};
use serde_json::Value;

const WAIT: Duration = Duration::from_secs(60);

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

fn ensure(what: &str, ok: bool) -> Result<()> {
    ok.then_some(()).ok_or_else(|| format!("not so: {what}"))
}

/// A network with a server whose files (or LUNs from 1 on) are an empty qcow2 image, another file, and an empty raw image.
fn served(name: &str, kind: Kind) -> Result<(Network, Scratch, Server)> {
    let scratch = Scratch::new(name)?;
    let mut net = Network::new(2)?;
    let (image, other, raw) = (scratch.path("vm.qcow2"), scratch.path("lun2"), scratch.path("vm.raw"));
    guests::run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "64M"])?;
    guests::run("truncate", &["-s", "64M", &raw])?;
    std::fs::write(&other, [0; 4096]).map_err(text)?;
    let server = Server::start(kind, &mut net, &scratch, &[&image, &other, &raw], 32 << 20)?;
    Ok((net, scratch, server))
}

/// Run `work` on host `i`.
fn on_host<R: Send>(net: &Network, i: usize, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
    let host = net.host(i);
    std::thread::scope(|s| {
        let thread = s.spawn(move || {
            host.enter()?;
            work()
        });
        thread.join().map_err(|_| "panicked".to_owned())?
    })
}

fn holds(image: &dyn Image, at: u64, byte: u8) -> Result<()> {
    let mut buf = vec![0; 4096];
    image.read_at(at, &mut buf).map_err(text)?;
    ensure(&format!("{byte:#x} at {at}, found {:#x}", buf[0]), buf == vec![byte; 4096])
}

/// Logging in with and without a password; two hosts that race for the reservation; what a loser still writes.
fn iscsi_reservations() -> Result<()> {
    let (net, _scratch, server) = served("reservations", Kind::Iscsi)?;
    on_host(&net, 0, || {
        let open = |url: String| ftvm_block::open(Path::new(&url), &OpenOptions::default()).map(|i| i.size());
        ensure("the right password", open(server.chap_url(1, CHAP.0, CHAP.1)).is_ok())?;
        for (user, secret) in [(CHAP.0, "another-secret16"), ("nobody", CHAP.1)] {
            let e = open(server.chap_url(1, user, secret)).err().map(text).unwrap_or_default();
            ensure(&e, e.contains("does not accept the user or password") && !e.contains(secret))?;
        }
        let none = server.chap_url(1, "", "").replace("%@", "");
        ensure("no password", open(none).is_err())?;
        Ok(())
    })?;
    // A barrier a round: each side tries to win the pairing; exactly one does.
    for round in 0..60u32 {
        let token = format!("token{round}");
        let epoch = Epoch { number: u64::from(round), token };
        let url = |side: &str| format!("{}?initiator-name=iqn.x:{side}{round}", server.lun(2));
        let (a, b) = (url("a"), url("b"));
        let free = Reserve::Free(lun_lock::alone("start"));
        let options = OpenOptions { reserve: free, format: Some("raw".into()), ..OpenOptions::default() };
        on_host(&net, 0, || {
            let image = ftvm_block::open(Path::new(&a), &options).map_err(text)?;
            let (first, second) = (
                LunArbiter::open(&a, "a".into()).map_err(text)?,
                LunArbiter::open(&b, "b".into()).map_err(text)?,
            );
            first.claim(&epoch, Side::Primary).map_err(text)?;
            ensure("the claim is seen", second.sees_peer(&epoch, Side::Backup).map_err(text)?)?;
            second.claim(&epoch, Side::Backup).map_err(text)?;
            let barrier = Barrier::new(2);
            let contest = |arbiter: &LunArbiter, side| {
                barrier.wait();
                for _ in 0..50 {
                    if let Ok(verdict) = arbiter.try_win(&epoch, side) {
                        return Some(verdict);
                    }
                }
                None
            };
            let (one, two) = std::thread::scope(|s| {
                let one = s.spawn(|| contest(&first, Side::Primary));
                let two = s.spawn(|| contest(&second, Side::Backup));
                (one.join().ok().flatten(), two.join().ok().flatten())
            });
            let won = [one, two].iter().filter(|v| **v == Some(Verdict::Won)).count();
            let lost = [one, two].iter().filter(|v| **v == Some(Verdict::Lost)).count();
            ensure(&format!("one winner in round {round}: {one:?} {two:?}"), won == 1 && lost == 1)?;
            ensure(
                "the winner wins again",
                [
                    first.try_win(&epoch, Side::Primary).map_err(text)?,
                    second.try_win(&epoch, Side::Backup).map_err(text)?,
                ] == [one.unwrap_or(Verdict::Lost), two.unwrap_or(Verdict::Lost)],
            )?;
            let written = image.write_at(0, &[7; 512]).is_ok();
            ensure("only the winner writes", written == (one == Some(Verdict::Won)))?;
            drop(image);
            ftvm_block::iscsi::release_all();
            Ok(())
        })?;
    }
    Ok(())
}

/// A primary is cut off with a write on its way; the other host takes over and writes; the cable is plugged in
/// again. On NFS the old write lands, where nobody looks; on iSCSI the target refuses it.
fn late_write(kind: Kind, format: &str) -> Result<()> {
    let (net, _scratch, server) = served("late", kind)?;
    let url = server.url(&format!("vm.{format}"));
    let path = Path::new(&url);
    let open = |seize: bool| -> std::result::Result<Box<dyn Image>, BlockError> {
        let key = lun_lock::alone(if seize { "second" } else { "first" });
        let reserve = if seize { Reserve::Seize(key) } else { Reserve::Free(key) };
        let options = OpenOptions { reserve, format: Some(format.into()), ..OpenOptions::default() };
        match kind {
            Kind::Iscsi => ftvm_block::open(path, &options),
            _ => Ok(Box::new(Takeover::open(path, &options, seize)?)),
        }
    };
    let old = on_host(&net, 0, || {
        let old = open(false).map_err(text)?;
        old.write_at(0, &[0xA1; 4096]).and_then(|()| old.write_at(1 << 20, &[0xA2; 4096])).map_err(text)?;
        old.flush().map_err(text)?;
        Ok(old)
    })?;
    let old: Arc<dyn Image> = Arc::from(old);
    net.cut_storage(0, true)?;
    let (late, host) = (Arc::clone(&old), net.host(0));
    let writer = std::thread::spawn(move || {
        host.enter()?;
        let done = late.write_at(0, &[0xA3; 4096]).and_then(|()| late.flush());
        Ok::<_, String>(done.map_err(text))
    });
    std::thread::sleep(Duration::from_millis(500));
    let new = on_host(&net, 1, || {
        // A second session of this process must be a session of its own, as another host's is.
        ftvm_block::iscsi::forget_sessions();
        ftvm_block::nfs::forget_clients();
        let new = open(true).map_err(text)?;
        holds(new.as_ref(), 0, 0xA1)?;
        holds(new.as_ref(), 1 << 20, 0xA2)?;
        new.write_at(0, &[0xB1; 4096]).and_then(|()| new.write_at(2 << 20, &[0xB2; 4096])).map_err(text)?;
        new.flush().map_err(text)?;
        Ok(new)
    })?;
    net.cut_storage(0, false)?;
    let written = writer.join().map_err(|_| "panicked")??;
    println!("{kind:?}: the late write ended with {written:?}");
    match kind {
        Kind::Iscsi => ensure("the late write is refused", written.is_err())?,
        _ => ensure("the late write lands", written.is_ok())?,
    }
    on_host(&net, 1, || {
        for _ in 0..200 {
            holds(new.as_ref(), 0, 0xB1)?;
            holds(new.as_ref(), 1 << 20, 0xA2)?;
            if !new.background() {
                break;
            }
        }
        // Again, behind everything.
        let again = old.write_at(2 << 20, &[0xA4; 4096]).and_then(|()| old.flush());
        println!("{kind:?}: another one with {:?}", again.as_ref().map_err(text));
        holds(new.as_ref(), 2 << 20, 0xB2)?;
        drop(new);
        Ok(())
    })?;
    drop(old);
    ftvm_block::iscsi::release_all();
    if format == "qcow2" {
        qemu_img(&net, &["check", &url])?;
    }
    on_host(&net, 1, || {
        let look = OpenOptions { read_only: true, format: Some(format.into()), ..OpenOptions::default() };
        let image = ftvm_block::open(path, &look).map_err(text)?;
        holds(image.as_ref(), 0, 0xB1)?;
        holds(image.as_ref(), 1 << 20, 0xA2)?;
        holds(image.as_ref(), 2 << 20, 0xB2)
    })
}

fn iscsi_late_write() -> Result<()> {
    late_write(Kind::Iscsi, "qcow2")
}

fn nfs_late_write() -> Result<()> {
    ["qcow2", "raw"].into_iter().try_for_each(|format| {
        late_write(Kind::Nfs, format)?;
        [0, 1, 2].into_iter().try_for_each(|moment| late_move(format, moment))
    })
}

/// Who took over is stalled while it moves the image to a new file, and taken over itself; then it goes on, before its
/// successor has moved the image, after, or after one that came later yet. Nothing of it may be seen.
fn late_move(format: &str, moment: u32) -> Result<()> {
    let (net, _scratch, server) = served("move", Kind::Nfs)?;
    let url = server.url(&format!("vm.{format}"));
    let options = OpenOptions { format: Some(format.into()), ..OpenOptions::default() };
    let take = || Takeover::open(Path::new(&url), &options, true).map_err(text);
    let write = |image: &Takeover, at: u64, byte: u8| {
        image.write_at(at, &[byte; 4096]).and_then(|()| image.flush()).map_err(text)
    };
    let all = |image: &Takeover| {
        let mut steps = 0;
        while image.background() && steps < 500 {
            steps += 1;
        }
        steps
    };
    on_host(&net, 0, || {
        let first = Takeover::open(Path::new(&url), &options, false).map_err(text)?;
        (0..32).try_for_each(|n| write(&first, n << 21, 0xA0 + n as u8))?;
        let stalled = take()?;
        write(&stalled, 0, 0xC1)?;
        ensure("it is not at the end", (0..3).all(|_| stalled.background()) || format == "qcow2")?;
        let second = take()?;
        write(&second, 2 << 21, 0xC2)?;
        let mut image = second;
        if moment > 0 {
            all(&image);
        }
        if moment > 1 {
            image = take()?;
            write(&image, 4 << 21, 0xC3)?;
        }
        println!("{format}: the stalled one makes {} steps more", all(&stalled));
        // What it still writes is not in the image, wherever it goes.
        let late = write(&stalled, 2 << 21, 0xEE);
        println!("{format}: and a write, {late:?}");
        drop(stalled);
        let check = |image: &dyn Image| {
            holds(image, 0, 0xC1)?;
            holds(image, 2 << 21, 0xC2)?;
            holds(image, 4 << 21, if moment > 1 { 0xC3 } else { 0xA4 })?;
            (5..32).try_for_each(|n| holds(image, n << 21, 0xA0 + n as u8))
        };
        check(&image)?;
        all(&image);
        check(&image)?;
        write(&image, 1 << 20, 0xC4)?;
        drop((image, first));
        let left: Vec<_> = std::fs::read_dir(server.export()).map_err(text)?.flatten().collect();
        let left: Vec<_> = left.iter().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        ensure(&format!("no layer is left: {left:?}"), left.iter().all(|n| !n.contains(".ft")))?;
        let look = OpenOptions { read_only: true, ..options.clone() };
        let image = ftvm_block::open(Path::new(&url), &look).map_err(text)?;
        holds(image.as_ref(), 1 << 20, 0xC4)?;
        check(image.as_ref())
    })?;
    if format == "qcow2" {
        qemu_img(&net, &["check", &url])?;
    }
    Ok(())
}

/// One winner in every race for the lock at `path`.
fn contests(path: &str, rounds: u32) -> Result<()> {
    for round in 0..rounds {
        let epoch = Epoch { number: u64::from(round), token: format!("tok{round}") };
        let lock = FileLock::new(path).map_err(text)?;
        let second = FileLock::new(path).map_err(text)?;
        for side in [Side::Primary, Side::Backup] {
            lock.claim(&epoch, side).map_err(text)?;
        }
        ensure("the claim is seen", lock.sees_peer(&epoch, Side::Backup).map_err(text)?)?;
        let barrier = Barrier::new(2);
        let contest = |lock: &FileLock, side| {
            barrier.wait();
            lock.try_win(&epoch, side).ok()
        };
        let verdicts = std::thread::scope(|s| {
            let one = s.spawn(|| contest(&lock, Side::Primary));
            let two = s.spawn(|| contest(&second, Side::Backup));
            [one.join().ok().flatten(), two.join().ok().flatten()]
        });
        let ok = verdicts.contains(&Some(Verdict::Won)) && verdicts.contains(&Some(Verdict::Lost));
        ensure(&format!("one winner in round {round}: {verdicts:?}"), ok)?;
        let side = if verdicts[0] == Some(Verdict::Won) { Side::Primary } else { Side::Backup };
        ensure("the winner's claim is not made twice", lock.claim(&epoch, side).is_err())?;
        ensure("it stays the winner", lock.try_win(&epoch, side).map_err(text)? == Verdict::Won)?;
        lock.retire(&epoch);
        let after = lock.try_win(&epoch, Side::Primary).map_err(text)?;
        ensure("nobody wins afterwards", after == Verdict::Lost)?;
    }
    Ok(())
}

/// The lock file on a server.
fn nfs_locks() -> Result<()> {
    let (net, _scratch, server) = served("locks", Kind::Nfs)?;
    on_host(&net, 0, || contests(&server.url("vm.qcow2.ftlock"), 100))
}

fn lock_tool(net: &Network, host: usize, args: &[&str]) -> Result<String> {
    let tool = Path::new(&guests::ftvm()?).with_file_name("ftvm-lock");
    let out = net.on_host(host, &tool.to_string_lossy()).args(args).output().map_err(text)?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    out.status.success().then_some(said).ok_or_else(|| String::from_utf8_lossy(&out.stderr).into_owned())
}

/// The lock in etcd, with certificates: two sides race; a member dies; without a majority nobody wins, although a member
/// answers.
fn etcd_locks() -> Result<()> {
    let (net, scratch) = (Network::new(3)?, Scratch::new("etcdlocks")?);
    let tls = scratch.path("tls");
    certificates(&tls)?;
    let mut etcd = Etcd::start(&net, &scratch, 3, Some(&tls))?;
    let url = etcd.lock_url("locks/vm");
    let url = format!("{url}?ca={tls}/ca.crt&cert={tls}/etcd.crt&key={tls}/etcd.key");
    on_host(&net, 0, || {
        wait_for("etcd", WAIT, || {
            let lock = FileLock::new(&url).ok()?;
            lock.sees_peer(&Epoch { number: 0, token: "none".into() }, Side::Primary).ok()
        })?;
        contests(&url, 20)
    })?;
    etcd.members[0].kill();
    on_host(&net, 0, || contests(&url, 5))?;
    let epoch = Epoch { number: 9, token: "last".into() };
    let claim = || {
        on_host(&net, 1, || {
            let lock = FileLock::new(&url).map_err(text)?;
            [Side::Primary, Side::Backup].into_iter().try_for_each(|s| lock.claim(&epoch, s)).map_err(text)
        })
    };
    claim()?;
    let shown = lock_tool(&net, 1, &["show", &url])?;
    ensure(&shown, shown.contains("claim of the primary, epoch 9"))?;
    ensure("clear asks", lock_tool(&net, 1, &["clear", &url]).is_err())?;
    let cleared = lock_tool(&net, 1, &["clear", "--sure", &url])?;
    ensure(&cleared, cleared.contains("vm.last.primary: removed"))?;
    ensure("cleared", lock_tool(&net, 1, &["show", &url])?.contains("no pairing"))?;
    claim()?;
    etcd.members[1].kill();
    on_host(&net, 2, || {
        let lock = FileLock::new(&url).map_err(text)?;
        let verdict = lock.try_win(&epoch, Side::Backup);
        ensure(&format!("no verdict: {verdict:?}"), verdict.is_err())
    })
}

/// An authority, and a certificate of the first three hosts that is good for both ends.
fn certificates(dir: &str) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(text)?;
    let hosts: Vec<String> = (0..3).map(|i| format!("IP:{}", Network::address(i))).collect();
    std::fs::write(format!("{dir}/ext"), format!("subjectAltName={}\n", hosts.join(","))).map_err(text)?;
    let openssl = |line: String| {
        guests::run("openssl", &line.replace("DIR", dir).split(' ').collect::<Vec<_>>()).map(|_| ())
    };
    let new = "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    openssl(format!("{new} -x509 -days 2 -subj /CN=authority -keyout DIR/ca.key -out DIR/ca.crt"))?;
    openssl(format!("{new} -subj /CN=etcd -keyout DIR/etcd.key -out DIR/etcd.csr"))?;
    openssl(
        "x509 -req -days 2 -in DIR/etcd.csr -CA DIR/ca.crt -CAkey DIR/ca.key -CAcreateserial -extfile DIR/ext -out DIR/etcd.crt"
            .into(),
    )
}

/// Disks of their own, the lock in etcd. The primary's host is cut off with its member of etcd, which alone says
/// nothing; then a member dies, and the primary.
fn etcd_failovers() -> Result<()> {
    let mut pair = Pair::start_on("etcd", Guest::Tiny, "", Kind::Etcd, "")?;
    let clients = clients(&pair, "etcd");
    let step = |pair: &Pair, more: u64| {
        clients.wait_progress(more, WAIT).map_err(|e| format!("{e}\n{}", pair.logs()))
    };
    pair.protect()?;
    step(&pair, 20)?;
    let ft = pair.unplug_primary(Duration::from_secs(3))?;
    println!("etcd: unplugged, failover {}", ft["last-failover"]);
    step(&pair, 20)?;
    pair.protect()?;
    let etcd = pair.etcd.as_mut().ok_or("no etcd")?;
    etcd.members[2].kill();
    let url = etcd.lock_url("locks/vm");
    let shown = lock_tool(&pair.net, 0, &["show", &url])?;
    ensure(&shown, shown.contains("claim of the primary, epoch 2"))?;
    step(&pair, 20)?;
    let ft = pair.kill_primary()?;
    println!("etcd: a member dead, the primary killed, failover {}", ft["last-failover"]);
    step(&pair, 20)?;
    ensure("the winner has cleaned up", lock_tool(&pair.net, 0, &["show", &url])?.contains("no pairing"))?;
    pair.protect()?;
    step(&pair, 10)?;
    clients.finish()?;
    pair.finish(false)
}

fn clients(pair: &Pair, tag: &str) -> Clients {
    Clients::start(pair, 8080, "HTTP/1.1 200", tag)
}

/// The primary is killed, paused, and cut from its peer; the server is restarted and out of reach for a while.
fn failovers(kind: Kind) -> Result<()> {
    let mut pair = Pair::start_on("storage", Guest::Tiny, "", kind, "")?;
    let clients = clients(&pair, "storage");
    let step = |pair: &Pair, more: u64| {
        clients.wait_progress(more, WAIT).map_err(|e| format!("{e}\n{}", pair.logs()))
    };
    pair.protect()?;
    step(&pair, 20)?;
    let ft = pair.kill_primary()?;
    println!("{kind:?}: killed, failover {}", ft["last-failover"]);
    step(&pair, 20)?;
    pair.protect()?;
    if let Some(server) = &mut pair.server {
        server.kill();
        std::thread::sleep(Duration::from_millis(700));
        server.launch()?;
    }
    step(&pair, 10)?;
    pair.net.set_storage_link(false)?;
    std::thread::sleep(Duration::from_secs(2));
    pair.net.set_storage_link(true)?;
    step(&pair, 10)?;
    println!("{kind:?}: server restarted and cut off");
    let ft = pair.stall_primary(Duration::from_secs(2))?;
    println!("{kind:?}: paused, failover {}", ft["last-failover"]);
    step(&pair, 20)?;
    pair.protect()?;
    step(&pair, 10)?;
    let ft = pair.unplug_primary(Duration::from_secs(1))?;
    println!("{kind:?}: unplugged, failover {}", ft["last-failover"]);
    step(&pair, 20)?;
    pair.protect()?;
    step(&pair, 10)?;
    pair.cut_apart()?;
    println!("{kind:?}: cut apart");
    step(&pair, 20)?;
    clients.finish()?;
    pair.finish(false)
}

fn iscsi_failovers() -> Result<()> {
    failovers(Kind::Iscsi)
}

fn nfs_failovers() -> Result<()> {
    failovers(Kind::Nfs)
}

/// The storage is gone for longer than a request may wait: `werror=stop` stops the machine, on both sides; whoever
/// is live when it is back goes on with `cont`, and nothing is lost.
fn long_outage() -> Result<()> {
    let options = "?timeout=2,werror=stop,rerror=stop";
    let mut pair = Pair::start_on("outage", Guest::Tiny, "", Kind::Nfs, options)?;
    let clients = clients(&pair, "outage");
    pair.protect()?;
    clients.wait_progress(20, WAIT)?;
    for kill in [false, true] {
        let mut qmp = pair.qmp()?;
        pair.net.set_storage_link(false)?;
        let event = qmp.wait_event("BLOCK_IO_ERROR", WAIT)?;
        ensure(&event.to_string(), event["data"]["action"] == "stop" && event["data"]["nospace"] == false)?;
        qmp.wait_event("STOP", WAIT)?;
        ensure("io-error", qmp.command("query-status", Value::Null)?["status"] == "io-error")?;
        pair.net.set_storage_link(true)?;
        if kill {
            pair.kill_primary()?;
            qmp = pair.qmp()?;
            ensure("stopped", qmp.command("query-status", Value::Null)?["running"] == false)?;
        }
        qmp.command("cont", Value::Null)?;
        clients.wait_progress(20, WAIT).map_err(|e| format!("{e}\n{}", pair.logs()))?;
    }
    clients.finish()?;
    pair.finish(false)
}

/// The guest's shell, from the client's host.
fn in_guest(pair: &Pair, commands: &[&str]) -> Result<f64> {
    let net = pair.net.client();
    std::thread::scope(|s| {
        let run = s.spawn(|| {
            net.enter()?;
            let address = (GUEST.parse::<std::net::Ipv4Addr>().map_err(text)?, 7000);
            let mut line = Line::connect(address.into())?;
            let mut took = 0.0;
            for command in commands {
                let answer = line.ask(&format!("run {command}"))?.0;
                let (status, seconds) = answer.split_once(' ').unwrap_or_default();
                ensure(&format!("'{command}' in the guest: {answer}"), status == "0")?;
                took += seconds.parse().unwrap_or(0.0);
            }
            Ok(took)
        });
        run.join().map_err(|_| "panicked".to_owned())?
    })
}

const FORGET: &str = "echo 3 > /proc/sys/vm/drop_caches";

/// What a read of 192 MB costs: seconds, bytes that the guest read, bytes of log.
fn reading(pair: &mut Pair) -> Result<(f64, f64, f64)> {
    let read = |pair: &mut Pair| -> Result<f64> {
        let stats = pair.qmp()?.command("query-blockstats", Value::Null)?;
        Ok(stats[0]["stats"]["rd_bytes"].as_f64().unwrap_or(0.0))
    };
    let log = |pair: &mut Pair| -> Result<f64> { Ok(pair.qmp()?.ft()?["log-bytes"].as_f64().unwrap_or(0.0)) };
    let (bytes, logged) = (read(pair)?, log(pair)?);
    let took = in_guest(pair, &[FORGET, "cat /mnt/f > /dev/null"].repeat(8))?;
    std::thread::sleep(Duration::from_millis(300));
    Ok((took, read(pair)? - bytes, log(pair)? - logged))
}

/// The backup reads the shared disk itself; the primary is killed while the guest reads and writes all it can.
fn disk_reads(kind: Kind) -> Result<()> {
    let mut cost = Vec::new();
    for option in ["", ",reads=disk"] {
        let mut pair = Pair::start_on("reads", Guest::Tiny, option, kind, "")?;
        in_guest(
            &pair,
            &["dd if=/dev/urandom of=/mnt/f bs=1M count=24", "sync", "sha256sum /mnt/f > /tmp/sum"],
        )?;
        pair.protect()?;
        let (took, read, logged) = reading(&mut pair)?;
        println!(
            "{kind:?} '{option}': {:.0} MB read in {took:.2} s, {:.2} MB of log, {:.1} Mbit/s",
            read / 1e6,
            logged / 1e6,
            logged * 8.0 / took / 1e6
        );
        cost.push((read, logged));
        if option.is_empty() {
            pair.finish(false)?;
            continue;
        }
        ensure(&format!("the reads are not in the log: {cost:?}"), read > 150e6 && logged < read / 20.0)?;
        let clients = clients(&pair, "reads");
        // Reads race with writes of the same blocks (the file system's, and a raw one in their midst).
        let load = "(while true; do echo 3 > /proc/sys/vm/drop_caches; cat /mnt/f > /dev/null; \
                    dd if=/mnt/f of=/mnt/g bs=256k count=16; sync; cp /mnt/g /mnt/h; rm /mnt/h; done) &";
        in_guest(&pair, &[load])?;
        for round in 0..2 {
            clients.wait_progress(60, WAIT).map_err(|e| format!("{e}\n{}", pair.logs()))?;
            std::thread::sleep(Duration::from_secs(1));
            let logs = pair.logs();
            ensure(&logs, !logs.contains("state differs") && !logs.contains("other data"))?;
            let ft =
                if round == 1 { pair.stall_primary(Duration::from_secs(1))? } else { pair.kill_primary()? };
            println!("{kind:?}: failover {}", ft["last-failover"]);
            clients.wait_progress(20, WAIT).map_err(|e| format!("{e}\n{}", pair.logs()))?;
            in_guest(&pair, &[FORGET, "sha256sum -c /tmp/sum"])?;
            pair.settle()?;
            pair.protect()?;
        }
        pair.kill_backup()?;
        clients.finish()?;
        in_guest(&pair, &[FORGET, "sha256sum -c /tmp/sum"])?;
        pair.finish(false)?;
    }
    Ok(())
}

fn path_disk_reads() -> Result<()> {
    disk_reads(Kind::Path)
}

fn nfs_disk_reads() -> Result<()> {
    disk_reads(Kind::Nfs)
}

/// Raw images: a file, a LUN and a file on an NFS server live through kills, pauses and a host that is unplugged.
fn raw(kind: Kind) -> Result<()> {
    let mut pair = Pair::start_on("raw", Guest::Tiny, "", kind, ",format=raw")?;
    let clients = clients(&pair, "raw");
    in_guest(&pair, &["dd if=/dev/urandom of=/mnt/f bs=1M count=8", "sync", "sha256sum /mnt/f > /tmp/sum"])?;
    let second = Duration::from_secs(1);
    let faults: [fn(&mut Pair, Duration) -> Result<Value>; 3] =
        [|pair, _| pair.kill_primary(), Pair::stall_primary, Pair::unplug_primary];
    // A directory cannot be cut off, and on a LUN the other tests do it.
    for fault in &faults[..if kind == Kind::Nfs { 3 } else { 2 }] {
        pair.protect()?;
        clients.wait_progress(20, WAIT).map_err(|e| format!("{e}\n{}", pair.logs()))?;
        let ft = fault(&mut pair, second)?;
        println!("raw {kind:?}: failover {}", ft["last-failover"]);
        clients.wait_progress(20, WAIT).map_err(|e| format!("{e}\n{}", pair.logs()))?;
        in_guest(&pair, &[FORGET, "sha256sum -c /tmp/sum"])?;
        pair.settle()?;
    }
    clients.finish()?;
    in_guest(&pair, &["sync", "umount -l /mnt", "sync"])?;
    pair.finish(false)
}

fn raw_images() -> Result<()> {
    raw(Kind::Path)?;
    raw(Kind::Iscsi)?;
    raw(Kind::Nfs)
}

/// Encrypted images: the backup needs the secret too, a takeover is no slower for it, and what it leaves beside the image
/// is encrypted.
fn encrypted_images() -> Result<()> {
    encrypted(Kind::Nfs, ",encrypt.key-secret=s")?;
    encrypted(Kind::Path, ",format=luks,key-secret=s")
}

fn encrypted(kind: Kind, options: &str) -> Result<()> {
    let mut pair = Pair::start_on("luks", Guest::Tiny, "", kind, options)?;
    let refused = pair.refused_backup()?;
    ensure(&refused, refused.contains("No secret with id 's'"))?;
    let clients = clients(&pair, "luks");
    in_guest(&pair, &["dd if=/dev/urandom of=/mnt/f bs=1M count=8", "sync", "sha256sum /mnt/f > /tmp/sum"])?;
    let faults: [fn(&mut Pair) -> Result<Value>; 2] =
        [Pair::kill_primary, |pair| pair.stall_primary(Duration::from_secs(1))];
    for fault in faults {
        pair.protect()?;
        clients.wait_progress(20, WAIT).map_err(|e| format!("{e}\n{}", pair.logs()))?;
        let ft = fault(&mut pair)?;
        println!("luks: failover {}", ft["last-failover"]);
        let took = ft["last-failover"]["takeover-ms"].as_f64().unwrap_or(f64::MAX);
        ensure(&format!("the key is at hand: {took} ms"), took < 1000.0)?;
        clients.wait_progress(20, WAIT).map_err(|e| format!("{e}\n{}", pair.logs()))?;
        in_guest(&pair, &[FORGET, "sha256sum -c /tmp/sum"])?;
        pair.settle()?;
    }
    clients.finish()?;
    pair.finish(false)
}

/// A block device that is no SCSI disk cannot hold the pair's lock, and the program says what to do.
fn other_device() -> Result<()> {
    let scratch = Scratch::new("device")?;
    let file = scratch.path("disk");
    guests::run("truncate", &["-s", "8M", &file])?;
    let device = guests::run("losetup", &["--find", "--show", &file])?.trim().to_owned();
    let result = (|| {
        let drive = format!("file={device},format=raw,if=virtio");
        let mut vm = Vm::start(
            std::process::Command::new(guests::ftvm()?),
            &scratch,
            "vm",
            &["-drive", &drive, "-ft", "primary,listen=127.0.0.1:18123"],
        )?;
        let status = vm.wait_exit(WAIT)?;
        let log = vm.log();
        ensure(&log, status != 0 && log.contains("give lock=PATH on storage that both hosts see"))
    })();
    guests::run("losetup", &["-d", &device])?;
    result
}

/// No space: the machine stops and goes on when there is; `bps=` keeps it slow enough to see.
fn no_space() -> Result<()> {
    let scratch = Scratch::new("nospace")?;
    let dir = scratch.path("small");
    std::fs::create_dir_all(&dir).map_err(text)?;
    guests::run("mount", &["-t", "tmpfs", "-o", "size=4m", "tmpfs", &dir])?;
    let result = (|| {
        let (image, raw) = (format!("{dir}/vm.qcow2"), scratch.path("fs.raw"));
        guests::run("truncate", &["-s", "48M", &raw])?;
        guests::run(
            "mke2fs",
            &["-q", "-t", "ext4", "-O", "^metadata_csum_seed,^orphan_file,^has_journal", &raw],
        )?;
        guests::run("qemu-img", &["convert", "-q", "-O", "qcow2", &raw, &image])?;
        let (kernel, initrd) = guests::tiny()?;
        let drive = format!("file={image},if=virtio,throttling.bps-write=4194304");
        let args = ["-m", "192M", "-kernel", &kernel, "-initrd", &initrd, "-net", "none", "-drive", &drive];
        let append = ["-append", "console=ttyS0 quiet disk diskload halt"];
        let start = std::time::Instant::now();
        let ftvm = std::process::Command::new(guests::ftvm()?);
        let mut vm = Vm::start(ftvm, &scratch, "vm", &[&args[..], &append[..]].concat())?;
        let mut qmp = vm.qmp()?;
        let event = qmp.wait_event("BLOCK_IO_ERROR", WAIT)?;
        ensure(&event.to_string(), event["data"]["action"] == "stop" && event["data"]["nospace"] == true)?;
        guests::run("mount", &["-o", "remount,size=64m", &dir])?;
        while !vm.text().contains("disk: 8 MiB ok") {
            if qmp.command("query-status", Value::Null)?["status"] == "io-error" {
                qmp.command("cont", Value::Null)?;
            }
            ensure("the guest goes on", start.elapsed() < WAIT)?;
            std::thread::sleep(Duration::from_millis(50));
        }
        let took = start.elapsed();
        ensure(&format!("8 MiB at 4 MiB a second in {took:.1?}"), took > Duration::from_millis(1500))?;
        vm.wait_exit(WAIT)?;
        guests::run("qemu-img", &["check", &image])?;
        guests::run("qemu-img", &["convert", "-O", "raw", &image, &raw])?;
        guests::run("e2fsck", &["-fn", &raw]).map(|_| ())
    })();
    let _ = guests::run("umount", &["-l", &dir]);
    result
}

type Test = (&'static str, Kind, fn() -> Result<()>);

fn main() {
    if let Err(e) = become_root() {
        println!("storage tests skipped: {e}");
        println!("0 passed, 0 failed");
        return;
    }
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let tests: [Test; 15] = [
        ("no_space", Kind::Path, no_space),
        ("iscsi_reservations", Kind::Iscsi, iscsi_reservations),
        ("iscsi_late_write", Kind::Iscsi, iscsi_late_write),
        ("iscsi_failovers", Kind::Iscsi, iscsi_failovers),
        ("nfs_locks", Kind::Nfs, nfs_locks),
        ("nfs_late_write", Kind::Nfs, nfs_late_write),
        ("nfs_failovers", Kind::Nfs, nfs_failovers),
        ("etcd_locks", Kind::Etcd, etcd_locks),
        ("etcd_failovers", Kind::Etcd, etcd_failovers),
        ("long_outage", Kind::Nfs, long_outage),
        ("raw_images", Kind::Nfs, raw_images),
        ("encrypted_images", Kind::Nfs, encrypted_images),
        ("other_device", Kind::Path, other_device),
        ("path_disk_reads", Kind::Path, path_disk_reads),
        ("nfs_disk_reads", Kind::Nfs, nfs_disk_reads),
    ];
    let (mut passed, mut failed) = (0, 0);
    for (name, kind, test) in tests {
        if !wanted.is_empty() && !wanted.iter().any(|w| name.contains(w.as_str())) {
            continue;
        }
        if let Some(reason) = Server::unavailable(kind) {
            println!("test storage::{name} ... skipped: {reason}");
            continue;
        }
        let start = std::time::Instant::now();
        match test() {
            Ok(()) => {
                passed += 1;
                println!("test storage::{name} ... ok ({:.0?})", start.elapsed());
            }
            Err(e) => {
                failed += 1;
                println!("test storage::{name} ... FAILED\n{e}");
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    std::process::exit(i32::from(failed > 0));
}
