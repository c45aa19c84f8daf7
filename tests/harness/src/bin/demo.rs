//! `make demo`: a protected Debian machine on two hosts; the primary is killed; a client says what it saw.

use std::io::Write;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ftvm_harness::client::{Client, Seen};
use ftvm_harness::hosts::{become_root, Network, GUEST};
use ftvm_harness::vm::Vm;
use ftvm_harness::{guests, Result, Scratch};

fn step(text: &str) {
    println!("\n== {text}");
}

/// Show that something long is going on.
fn progress(start: Instant, text: &str) {
    print!("\r   {:4.0} s  {text:60.60}", start.elapsed().as_secs_f64());
    let _ = std::io::stdout().flush();
}

fn wait_console(vm: &mut Vm, mark: &str, limit: Duration) -> Result<()> {
    let start = Instant::now();
    while !vm.text().contains(mark) {
        if !vm.is_running() {
            return Err(format!("ftvm ended:\n{}", vm.log()));
        }
        if start.elapsed() > limit {
            return vm.wait_console(mark, Duration::ZERO);
        }
        let text = vm.text();
        let last = text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("");
        let plain: String = last.chars().filter(|c| !c.is_control()).collect();
        progress(start, &plain);
        std::thread::sleep(Duration::from_millis(500));
    }
    println!("\r   ready after {:.0} s{:60}", start.elapsed().as_secs_f64(), "");
    Ok(())
}

fn report(name: &str, seen: &Seen) {
    println!(
        "   {name:22} {:6} answered, {} wrong or lost, longest pause {:.0} ms (median {:.1}, 99 % {:.1} ms)",
        seen.answers,
        seen.wrong.len(),
        seen.longest.as_secs_f64() * 1000.0,
        seen.percentile(0.5),
        seen.percentile(0.99),
    );
    for wrong in seen.wrong.iter().take(5) {
        println!("      {wrong}");
    }
}

fn sleep_with_status(primary: &Vm, seconds: u64) -> Result<()> {
    let mut qmp = primary.qmp()?;
    for _ in 0..seconds {
        std::thread::sleep(Duration::from_secs(1));
        let ft = qmp.ft()?;
        println!(
            "   {:12} lag {:6.1} ms   log {:7.3} Mbit/s   outputs held {}   throttle {} %",
            ft["state"].as_str().unwrap_or("?"),
            ft["lag-ms"].as_f64().unwrap_or(0.0),
            ft["log-mbps"].as_f64().unwrap_or(0.0),
            ft["outputs-held"],
            ft["throttle-percent"].as_f64().unwrap_or(0.0) as u64,
        );
    }
    Ok(())
}

fn demo() -> Result<()> {
    let scratch = Scratch::new("demo")?;
    step("Guest: Debian 12 (systemd, sshd, nginx, sqlite) as a qcow2 image");
    let image = scratch.path("vm.qcow2");
    std::fs::copy(guests::debian()?, &image).map_err(|e| e.to_string())?;
    println!("   {image} (shared storage of both hosts)");

    step("Hosts: network namespaces hostA (10.77.0.11), hostB (10.77.0.12), client (10.77.0.1), a switch between");
    let net = Network::new(2)?;
    let ftvm = guests::ftvm()?;
    let drive = format!("file={image},if=virtio");
    let machine = |ft: &str| {
        vec![
            "-m".to_owned(),
            "512M".into(),
            "-drive".into(),
            drive.clone(),
            "-netdev".into(),
            "tap,id=n0,ifname=vmtap,script=no,downscript=no".into(),
            "-device".into(),
            "virtio-net-pci,netdev=n0".into(),
            "-ft".into(),
            ft.to_owned(),
        ]
    };
    fn words(v: &[String]) -> Vec<&str> {
        v.iter().map(String::as_str).collect()
    }

    step("hostA$ ftvm -m 512M -drive file=vm.qcow2,if=virtio -netdev tap,... -ft primary");
    let a = machine("primary");
    let mut first = Vm::start(net.on_host(0, &ftvm), &scratch, "a", &words(&a))?;
    wait_console(&mut first, "GUEST READY", Duration::from_secs(900))?;

    step("hostB$ ftvm -ft backup,peer=10.77.0.11");
    let start = Instant::now();
    let peer = format!("backup,peer={}", Network::address(0));
    let mut second = Vm::start(net.on_host(1, &ftvm), &scratch, "b", &["-ft", &peer])?;
    first
        .qmp()?
        .wait_ft("protected", Duration::from_secs(120))
        .map_err(|e| format!("{e}\n{}{}", first.log(), second.log()))?;
    println!("   protected after {:.1} s", start.elapsed().as_secs_f64());

    step("Client: one TCP session that counts, durable writes, HTTP from nginx");
    let at =
        |port: u16| -> SocketAddr { SocketAddr::new(GUEST.parse().unwrap_or([0, 0, 0, 0].into()), port) };
    let session = Client::session(Some(net.client()), at(7000), Duration::from_millis(10));
    let journal = Client::journal(Some(net.client()), at(7000), "demo", Duration::from_millis(20));
    let http = Client::http(Some(net.client()), at(80), "ftvm guest", Duration::from_millis(50));
    sleep_with_status(&first, 10)?;

    step("hostA dies: SIGKILL to the primary");
    let before = (session.answers(), journal.answers(), http.answers());
    let died = Instant::now();
    first.kill();
    let mut qmp = second.qmp()?;
    let ft = qmp.wait_ft("live", Duration::from_secs(30)).map_err(|e| format!("{e}\n{}", second.log()))?;
    while session.answers() == before.0 && died.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let pause = died.elapsed();
    println!("   hostB is live: {}", ft["last-failover"]);
    println!(
        "   the client's TCP session got its next answer {:.0} ms after the kill",
        pause.as_secs_f64() * 1000.0
    );
    std::thread::sleep(Duration::from_secs(5));

    step("hostA$ ftvm -ft backup,peer=10.77.0.12   (hostA is back as the new backup)");
    let peer = format!("backup,peer={}", Network::address(1));
    let third = Vm::start(net.on_host(0, &ftvm), &scratch, "c", &["-ft", &peer])?;
    qmp.wait_ft("protected", Duration::from_secs(120))
        .map_err(|e| format!("{e}\n{}{}", second.log(), third.log()))?;
    // A monitor serves one client at a time.
    drop(qmp);
    sleep_with_status(&second, 4)?;
    step("hostB dies: SIGKILL again");
    second.kill();
    let mut qmp = third.qmp()?;
    let ft = qmp.wait_ft("live", Duration::from_secs(30)).map_err(|e| format!("{e}\n{}", third.log()))?;
    println!("   hostA is live: {}", ft["last-failover"]);
    std::thread::sleep(Duration::from_secs(5));

    step("What the client saw through both failovers");
    let mut wrong = 0;
    for (name, client) in
        [("TCP session (inc)", session), ("durable writes (put)", journal), ("HTTP (nginx)", http)]
    {
        let seen = client.finish().map_err(|e| format!("{name}: {e}"))?;
        report(name, &seen);
        wrong += seen.wrong.len();
    }
    println!("   before the first kill: {} inc, {} put, {} http", before.0, before.1, before.2);

    step("Power off by ACPI, then qemu-img check");
    let mut last = third;
    qmp.command("system_powerdown", serde_json::Value::Null)?;
    let status = last.wait_exit(Duration::from_secs(180))?;
    println!("   ftvm ended with status {status}");
    let checked = guests::run("qemu-img", &["check", &image]).or_else(|e| {
        // As with QEMU: a host that dies while it allocates leaves clusters that are counted and not used.
        if !guests::only_leaks(&e) {
            return Err(e);
        }
        println!(
            "   A host died while it allocated; qemu-img check -r leaks gives back what it left counted."
        );
        guests::run("qemu-img", &["check", "-r", "leaks", &image])
    })?;
    print!("   {}", checked.replace('\n', "\n   "));
    println!();
    if wrong > 0 {
        return Err(format!("{wrong} answers were wrong or lost"));
    }
    println!("\nNothing that a client was told is lost: no answer wrong, the TCP session never broke.");
    Ok(())
}

fn main() {
    if let Err(e) = become_root().and_then(|()| demo()) {
        eprintln!("\ndemo: {e}");
        std::process::exit(1);
    }
}
