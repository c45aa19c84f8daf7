use super::*;
use crate::door::{GuestEvent, MachineRequest};
use crate::{device_help, model_help, DeviceError};

fn cmos(r: &mut Rig, index: u8) -> u8 {
    r.outb(0x70, index);
    r.inb(0x71)
}

#[test]
fn the_clock_runs_and_can_be_set() {
    let mut r = Rig::new();
    assert_eq!(
        [cmos(&mut r, 0), cmos(&mut r, 4), cmos(&mut r, 7), cmos(&mut r, 0x32)],
        [0x59, 0x23, 0x31, 0x20]
    );
    r.pass(1_500_000_000);
    r.migrate();
    assert_eq!([cmos(&mut r, 0), cmos(&mut r, 8), cmos(&mut r, 9)], [0, 1, 0x24]);
    // SET, minutes to 30, go.
    for (i, v) in [(0x0B, 0x82), (2, 0x30), (0x0B, 0x02)] {
        r.outb(0x70, i);
        r.outb(0x71, v);
    }
    r.pass(60_000_000_000);
    assert_eq!(cmos(&mut r, 2), 0x31);
    let events = r.serve();
    assert_eq!(events, [Output::Event(GuestEvent::RtcChange { offset: 1800 })]);
}

#[test]
fn the_periodic_interrupt_comes_through_the_8259() {
    let mut r = Rig::new();
    for (chip, base) in [(0x20u16, 8u8), (0xA0, 0x70)] {
        r.outb(chip, 0x11);
        for v in [base, if chip == 0x20 { 4 } else { 2 }, 1, 0] {
            r.outb(chip + 1, v);
        }
    }
    r.outb(0x70, 0x0B);
    r.outb(0x71, 0x42);
    // 1024 Hz.
    r.pass(1_000_000);
    r.migrate();
    assert!(r.pc.intr());
    assert_eq!(r.pc.intr_ack(), 0x70);
    assert!(!r.pc.intr());
    assert_eq!(cmos(&mut r, 0x0C) & 0xC0, 0xC0);
}

#[test]
fn channel_0_of_the_timer_interrupts_at_its_rate() {
    let mut r = Rig::new();
    r.outb(0x20, 0x11);
    for v in [8, 4, 1, 0xFE] {
        r.outb(0x21, v);
    }
    r.outb(0x43, 0x34);
    r.outb(0x40, 0xA9);
    r.outb(0x40, 0x04); // 1193 clocks: about 1 ms
    let mut ticks = 0;
    for _ in 0..100 {
        r.pass(1_000_000);
        if r.pc.intr() {
            assert_eq!(r.pc.intr_ack(), 8);
            r.outb(0x20, 0x20);
            ticks += 1;
        }
    }
    assert!((99..=101).contains(&ticks), "{ticks}");
    r.outb(0x43, 0);
    let low = r.inb(0x40);
    let high = r.inb(0x40);
    assert!(u16::from(low) | u16::from(high) << 8 <= 1193);
}

#[test]
fn the_hpet_replaces_the_timer() {
    let mut r = Rig::new();
    const HPET: u64 = 0xFED0_0000;
    // I/O APIC pin 2: vector 0x30.
    r.write32(0xFEC0_0000, 0x14);
    r.write32(0xFEC0_0010, 0x30);
    r.write32(HPET + 0x10, 3);
    r.write32(HPET + 0x100, 0x4C); // periodic, enabled, set accumulator
    for _ in 0..2 {
        // The comparator, then the period: 1 ms.
        r.pc.mmio_write(&r.mem, r.now, HPET + 0x108, 8, 100_000);
    }
    r.pass(10_500_000);
    let messages = r.pc.take_messages();
    assert_eq!(messages.len(), 10);
    assert!(messages.iter().all(|m| m.data & 0xFF == 0x30));
    r.migrate();
    assert_eq!(r.read32(HPET + 0xF0), 1_050_000);
}

#[test]
fn acpi_timer_power_button_and_soft_off() {
    let mut r = Rig::new();
    r.config_write(0x0B, 0x40, 0x601);
    r.config_write(0x0B, 0x80, 1);
    r.pass(1_000_000_000);
    assert_eq!(r.inl(0x608), 3_579_545);
    r.outb(0xB2, 0xF1);
    assert_eq!(r.inw(0x604) & 1, 1);
    r.outw(0x602, 0x100);
    r.write32(0xFEC0_0000, 0x10 + 18);
    r.write32(0xFEC0_0010, 0x8049);
    r.input(Input::Powerdown);
    assert_eq!(r.pc.take_messages().len(), 1);
    assert_eq!(r.inw(0x600) & 0x100, 0x100);
    r.outw(0x600, 0x100);
    assert_eq!(r.inw(0x600) & 0x100, 0);
    assert_eq!(r.pc.take_request(), None);
    r.outw(0x604, 0x2001);
    assert_eq!(r.pc.take_request(), Some(MachineRequest::Poweroff));
}

#[test]
fn serial_lines_send_and_receive() {
    let mut r = Rig::new();
    for b in *b"ok" {
        r.outb(0x3F8, b);
    }
    assert_eq!(r.serve(), [Output::CharOut { port: 0, bytes: b"ok".to_vec() }]);
    r.outb(0x3FA, 1);
    r.outb(0x3F9, 1);
    let text: Vec<u8> = (0..40).collect();
    r.input(Input::CharIn { port: 0, bytes: text.clone() });
    r.migrate();
    let mut got = Vec::new();
    while r.inb(0x3FD) & 1 != 0 {
        assert_eq!(r.inb(0x3FA) & 0x0F & 4, 4);
        got.push(r.inb(0x3F8));
    }
    assert_eq!(got, text, "more than the FIFO holds waits outside");
    // Loopback: DTR, RTS, OUT1, OUT2 show as DSR, CTS, RI, DCD.
    r.outb(0x3FC, 0x1A);
    assert_eq!(r.inb(0x3FE) & 0xF0, 0x90);
}

#[test]
fn the_keyboard_controller_translates_and_resets() {
    let mut r = Rig::new();
    r.outb(0x64, 0xAA);
    assert_eq!(r.inb(0x60), 0x55);
    r.outb(0x64, 0x60);
    r.outb(0x60, 0x41);
    // "a" pressed and released, set 2.
    r.input(Input::Keyboard { bytes: vec![0x1C, 0xF0, 0x1C] });
    r.migrate();
    assert_eq!([r.inb(0x60), r.inb(0x60)], [0x1E, 0x9E]);
    r.outb(0x64, 0xD4);
    r.outb(0x60, 0xF2);
    assert_eq!(r.inb(0x64) & 0x21, 0x21);
    assert_eq!([r.inb(0x60), r.inb(0x60)], [0xFA, 0]);
    r.outb(0x64, 0xFE);
    assert_eq!(r.pc.take_request(), Some(MachineRequest::Reset));
}

#[test]
fn reset_control_debug_ports_and_pvpanic() {
    let mut r = Rig::new();
    r.outb(0xCF9, 6);
    assert_eq!(r.pc.take_request(), Some(MachineRequest::Reset));
    r.outl(0x501, 3);
    assert_eq!(r.pc.take_request(), Some(MachineRequest::Exit(7)));
    assert_eq!(r.inb(0x505), 3);
    r.outb(0x505, 1);
    r.outb(0x402, b'x');
    let out = r.serve();
    assert_eq!(out[0], Output::Event(GuestEvent::Panicked));
    assert_eq!(out[1], Output::CharOut { port: 7, bytes: vec![b'x'] });
    r.outl(0xE0, 0x1234_5678);
    assert_eq!(r.inb(0xE9), 0x56);
    r.write32(0xFF00_0010, 99);
    assert_eq!(r.read32(0xFF00_0010), 99);
}

#[test]
fn firmware_reads_its_configuration_by_port_and_by_dma() {
    let mut r = Rig::new();
    r.outw(0x510, 0);
    assert_eq!([0; 4].map(|_| r.inb(0x511)), *b"QEMU");
    // The directory by DMA.
    let mut request = Vec::new();
    request.extend((0x19_000Au32).to_be_bytes());
    request.extend(4096u32.to_be_bytes());
    request.extend(0x2000u64.to_be_bytes());
    r.mem.write(0x1000, &request).unwrap();
    r.outl(0x514, 0);
    r.outl(0x518, 0x1000u32.swap_bytes());
    let mut control = [1; 4];
    r.mem.read(0x1000, &mut control).unwrap();
    assert_eq!(control, [0; 4]);
    let mut dir = vec![0; 4096];
    r.mem.read(0x2000, &mut dir).unwrap();
    let text = String::from_utf8_lossy(&dir);
    for name in ["etc/e820", "etc/acpi/tables", "etc/table-loader", "etc/smbios/smbios-anchor", "bootorder"] {
        assert!(text.contains(name), "{name}");
    }
}

#[test]
fn pam_registers_open_the_bios_area() {
    let mut r = Rig::new();
    assert!(r.mem.backing(0xF_0000).write.is_null());
    r.config_write(0, 0x58, 0x3000);
    assert!(!r.mem.backing(0xF_0000).write.is_null());
    assert!(r.mem.backing(0xE_0000).write.is_null());
}

#[test]
fn wrong_devices_are_named_as_qemu_names_them() {
    let mem = GuestMemory::new(1 << 20).unwrap();
    let build = |d: DeviceSpec| {
        let config = PcConfig { ram_size: 1 << 20, cpus: 1, devices: vec![d], ..PcConfig::default() };
        Pc::new(config, &mem).err().map(|e| e.to_string())
    };
    assert_eq!(build(device("foo", &[])).unwrap(), "'foo' is not a valid device model name");
    assert_eq!(build(device("e1000", &[("foo", "1")])).unwrap(), "Property 'e1000.foo' not found");
    assert!(build(device("e1000", &[("addr", "77")])).unwrap().contains("doesn't take value '77'"));
    assert!(build(device("virtio-blk-pci", &[])).is_some());
    assert_eq!(build(device("e1000", &[("mac", "52:54:00:12:34:56")])), None);
    assert!(device_help().contains("name \"virtio-net-pci\", bus PCI"));
    assert!(model_help("e1000").unwrap().contains("mac=<str>"));
    assert!(model_help("nope").is_err());
}

#[test]
fn a_newer_or_foreign_state_is_refused_by_name() {
    let mut r = Rig::new();
    let mut small = r.config.clone();
    small.devices.retain(|d| d.driver != "e1000");
    let other = Pc::new(small, &r.mem).unwrap();
    let error = r.pc.load(&other.save()).unwrap_err();
    assert!(matches!(&error, DeviceError::MissingSection(n) if n == "e1000@03.0"), "{error}");
    let mut less = other;
    let error = less.load(&r.pc.save()).unwrap_err();
    assert!(matches!(&error, DeviceError::UnknownSection(n) if n == "e1000@03.0"), "{error}");
    let saved = r.pc.save();
    for cut in [0, 1, 50, saved.len() / 2, saved.len() - 1] {
        assert!(r.pc.load(&saved[..cut]).is_err());
    }
}
