//! A machine with a screen: what the guest writes on its console is in the picture, and VNC clients see and type.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use common::*;
use ftvm_harness::guests::generic;
use ftvm_harness::libvirt::Console;
use ftvm_harness::qmp::Qmp;
use ftvm_harness::{wait_for, Result, Scratch};
use serde_json::json;

/// A cell of the console's text mode.
const CELL: (usize, usize) = (9, 16);
/// A cell of the console that Linux draws itself.
const DRAWN: (usize, usize) = (8, 16);

/// The shapes of the characters, out of the video BIOS: found by that of 'A'.
fn font() -> Result<Vec<[u8; 16]>> {
    const A: [u8; 16] = [0, 0, 0x10, 0x38, 0x6C, 0xC6, 0xC6, 0xFE, 0xC6, 0xC6, 0xC6, 0xC6, 0, 0, 0, 0];
    let bios = std::fs::read("/usr/share/seabios/vgabios-stdvga.bin").map_err(|e| e.to_string())?;
    let at = bios.windows(16).position(|w| w == A).ok_or("no font in the video BIOS")?;
    let start = at.checked_sub(16 * usize::from(b'A')).ok_or("the font does not begin in the video BIOS")?;
    Ok(bios[start..].chunks_exact(16).take(256).map(|c| c.try_into().unwrap_or_default()).collect())
}

/// The size of a picture (PPM) and its pixels.
fn read_ppm(ppm: &[u8]) -> Result<((usize, usize), &[u8])> {
    let mut parts = ppm.splitn(4, |b| *b == b'\n');
    let mut next = || parts.next().ok_or("a short PPM");
    let (magic, size, depth, pixels) = (next()?, next()?, next()?, next()?);
    assert_eq!((magic, depth), (&b"P6"[..], &b"255"[..]));
    let size: Vec<usize> = String::from_utf8_lossy(size).split(' ').filter_map(|n| n.parse().ok()).collect();
    assert_eq!(pixels.len(), size[0] * size[1] * 3);
    Ok(((size[0], size[1]), pixels))
}

/// The lines of text in a picture (PPM), read by the shapes of the characters in cells of this size.
fn read_text(ppm: &[u8], in_cells: (usize, usize)) -> Result<Vec<String>> {
    let font = font()?;
    let ((width, height), pixels) = read_ppm(ppm)?;
    let lit = |x: usize, y: usize| pixels[3 * (y * width + x)..][..3] != [0; 3];
    let cell = |column: usize, row: usize| {
        let shape: [u8; 16] = std::array::from_fn(|y| {
            (0..8).fold(0, |bits, x| bits << 1 | u8::from(lit(column * in_cells.0 + x, row * in_cells.1 + y)))
        });
        let printable = (b' '..=b'~').find(|c| font[usize::from(*c)] == shape);
        printable.map_or('?', char::from)
    };
    let line = |row| (0..width / in_cells.0).map(|column| cell(column, row)).collect();
    Ok((0..height / in_cells.1).map(line).collect())
}

/// What a machine's screen shows, as PPM.
fn screen(qmp: &mut Qmp, scratch: &Scratch) -> Result<Vec<u8>> {
    let path = scratch.path("screen.ppm");
    qmp.command("screendump", json!({"filename": path}))?;
    std::fs::read(path).map_err(|e| e.to_string())
}

fn wait_screen(qmp: &mut Qmp, scratch: &Scratch, in_cells: (usize, usize), mark: &str) -> Result<()> {
    let mut last = Vec::new();
    let seen = wait_for(mark, LONG, || {
        last = screen(qmp, scratch).and_then(|p| read_text(&p, in_cells)).ok()?;
        last.iter().any(|l| l.contains(mark)).then_some(())
    });
    seen.map_err(|e| format!("{e}; the screen shows:\n{}", last.join("\n")))
}

fn wait_size(qmp: &mut Qmp, scratch: &Scratch, size: (usize, usize)) -> Result<()> {
    wait_for(&format!("a screen of {size:?}"), LONG, || {
        (read_ppm(&screen(qmp, scratch).ok()?).ok()?.0 == size).then_some(())
    })
}

/// A VNC client of the simplest kind: no password, raw pixels of 32 bits.
struct VncClient(TcpStream);

impl VncClient {
    fn connect(port: u16) -> Result<(VncClient, usize, usize)> {
        let stream = TcpStream::connect(("127.0.0.1", port)).map_err(|e| e.to_string())?;
        stream.set_read_timeout(Some(LONG)).map_err(|e| e.to_string())?;
        let mut client = VncClient(stream);
        assert_eq!(client.read(12)?, b"RFB 003.008\n");
        client.write(b"RFB 003.008\n")?;
        assert_eq!(client.read(2)?, [1, 1]);
        client.write(&[1])?;
        assert_eq!(client.read(4)?, [0; 4]);
        client.write(&[1])?;
        let init = client.read(24)?;
        let name = client.read(usize::from(init[23]))?;
        assert_eq!(name, b"ftvm (shown)");
        Ok((
            client,
            usize::from(init[0]) << 8 | usize::from(init[1]),
            usize::from(init[2]) << 8 | usize::from(init[3]),
        ))
    }

    fn read(&mut self, n: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; n];
        self.0.read_exact(&mut bytes).map_err(|e| format!("VNC: {e}"))?;
        Ok(bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.0.write_all(bytes).map_err(|e| format!("VNC: {e}"))
    }

    /// Press a key and let it go.
    fn strike(&mut self, symbol: u32) -> Result<()> {
        for down in [1, 0] {
            self.write(&[4, down, 0, 0])?;
            self.write(&symbol.to_be_bytes())?;
        }
        std::thread::sleep(Duration::from_millis(50));
        Ok(())
    }

    /// The whole picture, as PPM.
    fn picture(&mut self, width: usize, height: usize) -> Result<Vec<u8>> {
        self.write(&[3, 0, 0, 0, 0, 0, (width >> 8) as u8, width as u8, (height >> 8) as u8, height as u8])?;
        let head = self.read(16)?;
        assert_eq!((&head[..4], &head[12..]), (&[0, 0, 0, 1][..], &[0; 4][..]));
        let pixels = self.read(width * height * 4)?;
        let mut ppm = format!("P6\n{width} {height}\n255\n").into_bytes();
        pixels.chunks_exact(4).for_each(|p| ppm.extend([p[2], p[1], p[0]]));
        Ok(ppm)
    }
}

#[test]
fn the_console_is_in_the_picture_and_vnc_clients_see_it_and_type() -> Result<()> {
    let scratch = Scratch::new("display")?;
    let port = free_port()?.port();
    let display = port.checked_sub(5900).ok_or("a port below VNC's")?;
    let more = format!("-net none -vga std -name shown -vnc 127.0.0.1:{display}");
    // The last console= is that of the shell.
    let vm = start_tiny(&scratch, "vm", "console=tty0", &more)?;
    let mut qmp = vm.qmp()?;
    wait_screen(&mut qmp, &scratch, CELL, "tiny guest ready")?;
    let (mut client, width, height) = VncClient::connect(port)?;
    assert_eq!((width, height), (80 * CELL.0, 25 * CELL.1));
    for c in "echo $((6*7))x".chars() {
        let shifted = "$(*)".contains(c);
        if shifted {
            client.write(&[4, 1, 0, 0, 0, 0, 0xFF, 0xE1])?;
        }
        client.strike(c.into())?;
        if shifted {
            client.write(&[4, 0, 0, 0, 0, 0, 0xFF, 0xE1])?;
        }
    }
    client.strike(0xFF0D)?;
    wait_for("the shell's answer in the client's picture", LONG, || {
        let lines = client.picture(width, height).and_then(|p| read_text(&p, CELL)).ok()?;
        lines.iter().any(|l| l.starts_with("42x")).then_some(())
    })?;
    let shown = qmp.command("query-vnc", json!({}))?;
    assert_eq!((&shown["auth"], shown["clients"].as_array().map(Vec::len)), (&json!("none"), Some(1)));
    Ok(())
}

/// Debian's kernel for all machines has a driver for virtio's graphics card (the cloud kernel has none): until it is loaded
/// the card is a VGA, then the driver draws, on a monitor that a viewer gives another size, until the machine is reset.
#[test]
fn a_virtio_card_is_a_vga_until_the_guests_driver_draws() -> Result<()> {
    let scratch = Scratch::new("virtio-vga")?;
    let (kernel, initrd) = generic()?;
    let (port, socket) = (free_port()?.port(), scratch.path("tty"));
    let display = port.checked_sub(5900).ok_or("a port below VNC's")?;
    let more = format!(
        "-m 256 -kernel {kernel} -initrd {initrd} -net none -vga virtio -name shown -vnc 127.0.0.1:{display} \
         -serial unix:{socket},server=on,wait=off"
    );
    let mut args: Vec<&str> = more.split_whitespace().collect();
    args.extend(["-append", "console=tty0 console=ttyS0 vt.global_cursor_default=0"]);
    let vm = start(&scratch, "vm", &args)?;
    let mut qmp = vm.qmp()?;
    let mut line = Console::socket(&socket)?;
    line.until("tiny guest ready", LONG)?;
    line.run("echo seen $((40 + 2)) > /dev/tty1")?;
    wait_screen(&mut qmp, &scratch, CELL, "seen 42")?;
    let tree = qmp.command("human-monitor-command", json!({"command-line": "info qtree"}))?;
    assert!(tree.as_str().unwrap_or_default().contains("dev: virtio-vga"), "{tree}");

    line.run("modprobe virtio-gpu")?;
    wait_size(&mut qmp, &scratch, (1280, 800))?;
    line.run("echo painted $((40 + 3)) > /dev/tty1")?;
    wait_screen(&mut qmp, &scratch, DRAWN, "painted 43")?;
    let edid = line.run("wc -c < /sys/class/drm/card0-Virtual-1/edid")?;
    assert!(edid.contains("128"), "{edid}");

    let (mut client, width, height) = VncClient::connect(port)?;
    assert_eq!((width, height), (1280, 800));
    let seen = read_text(&client.picture(width, height)?, DRAWN)?;
    assert!(seen.iter().any(|l| l.contains("painted 43")), "{seen:?}");
    let mut wish = vec![251, 0, 4, 0, 3, 0, 1, 0];
    wish.resize(24, 0);
    client.write(&wish)?;
    assert_eq!(client.read(36)?[..8], [0, 0, 0, 1, 0, 1, 0, 4]);
    wait_size(&mut qmp, &scratch, (1024, 768))?;
    let modes = line.run("head -n 1 /sys/class/drm/card0-Virtual-1/modes")?;
    assert!(modes.contains("1024x768"), "{modes}");

    qmp.command("system_reset", json!({}))?;
    wait_size(&mut qmp, &scratch, (80 * CELL.0, 25 * CELL.1))
}

#[test]
fn there_is_no_picture_without_a_video_card() -> Result<()> {
    let scratch = Scratch::new("dark")?;
    let vm = start(&scratch, "vm", &["-S", "-net", "none", "-m", "32"])?;
    let mut qmp = vm.qmp()?;
    let error =
        qmp.command("screendump", json!({"filename": scratch.path("none.ppm")})).err().unwrap_or_default();
    assert!(error.contains("There is no console to take a screendump from"), "{error}");
    assert_eq!(qmp.command("query-vnc", json!({}))?, json!({"enabled": false}));
    Ok(())
}
