//! Which USB device is in which port of which controller.

use super::ehci::{self, is_ehci};
use super::uhci;
use super::xhci;
use crate::config::{DeviceSpec, PcConfig};
use crate::ctx::DeviceError;
use crate::registry::{self, parse_number, Attach};

/// A bus that devices are plugged into.
struct Bus<'a> {
    name: String,
    controller: &'a DeviceSpec,
}

fn is_uhci(driver: &str) -> bool {
    driver == "piix3-usb-uhci" || driver.starts_with("ich9-usb-uhci")
}

/// The machine's buses. A companion has none: it serves ports of another controller's. QEMU calls those of controllers
/// without id usb-bus.N.
fn buses(config: &PcConfig) -> Vec<Bus<'_>> {
    let takes = |d: &&DeviceSpec| {
        let own = is_uhci(&d.driver) && !d.properties.contains_key("masterbus");
        d.driver == "qemu-xhci" || is_ehci(&d.driver) || own
    };
    let mut unnamed = 0;
    let one = |controller| Bus { name: name(controller, &mut unnamed), controller };
    config.devices.iter().filter(takes).map(one).collect()
}

fn name(controller: &DeviceSpec, unnamed: &mut usize) -> String {
    match &controller.id {
        Some(id) => format!("{id}.0"),
        None => {
            *unnamed += 1;
            format!("usb-bus.{}", *unnamed - 1)
        }
    }
}

/// The bus of a controller that is one of the machine's.
pub fn own_bus(config: &PcConfig, controller: &DeviceSpec) -> String {
    let all = buses(config);
    let same = all.iter().find(|b| std::ptr::eq(b.controller, controller));
    let found = same.or_else(|| all.iter().find(|b| b.controller == controller));
    found.map_or_else(|| name(controller, &mut 0), |b| b.name.clone())
}

/// The bus that a USB device is plugged into: the one it names, or the first.
pub fn bus_of(config: &PcConfig, spec: &DeviceSpec) -> Option<String> {
    let named = spec.properties.get("bus");
    buses(config).into_iter().map(|b| b.name).find(|b| named.is_none_or(|n| n == b))
}

/// The controller that a USB device is plugged into.
pub fn controller<'a>(config: &'a PcConfig, spec: &DeviceSpec) -> Option<&'a DeviceSpec> {
    let bus = bus_of(config, spec)?;
    buses(config).into_iter().find(|b| b.name == bus).map(|b| b.controller)
}

fn count(controller: &DeviceSpec) -> usize {
    match controller.driver.as_str() {
        "qemu-xhci" => xhci::usb2_ports(controller),
        driver if is_ehci(driver) => ehci::PORTS as usize,
        _ => uhci::PORTS,
    }
}

/// The devices on a bus of `count` ports, each with its port, from 0.
pub fn on_bus<'a>(
    config: &'a PcConfig,
    bus: &str,
    count: usize,
) -> Result<Vec<(usize, &'a DeviceSpec)>, DeviceError> {
    let mut out: Vec<(usize, &DeviceSpec)> = Vec::new();
    for spec in &config.devices {
        let is_usb = registry::model(&spec.driver).is_ok_and(|m| m.attach == Attach::Usb);
        if !is_usb || bus_of(config, spec).as_deref() != Some(bus) {
            continue;
        }
        let free = |n: &usize| out.iter().all(|(m, _)| m != n);
        let port = match spec.properties.get("port") {
            None => (0..count).find(free).ok_or_else(|| {
                DeviceError::Config(format!(
                    "tried to attach usb device {} to a bus with no free ports",
                    spec.driver
                ))
            })?,
            Some(text) => {
                let n = text.parse::<usize>().ok().and_then(|n| n.checked_sub(1));
                n.filter(|n| *n < count && free(n)).ok_or_else(|| {
                    DeviceError::Config(format!("usb port {text} (bus {bus}) not found (in use?)"))
                })?
            }
        };
        out.push((port, spec));
    }
    Ok(out)
}

/// Say of each device in which port it is, so that it stays there whatever comes and goes. What cannot be is left for the
/// controllers to refuse.
pub fn fix_ports(config: &mut PcConfig) {
    let ports: Vec<Option<usize>> = {
        let all = buses(config);
        let places: Vec<(usize, &DeviceSpec)> =
            all.iter().filter_map(|b| on_bus(config, &b.name, count(b.controller)).ok()).flatten().collect();
        let of = |d: &DeviceSpec| places.iter().find(|(_, spec)| std::ptr::eq(*spec, d)).map(|(n, _)| *n);
        config.devices.iter().map(of).collect()
    };
    for (spec, port) in config.devices.iter_mut().zip(ports) {
        if let Some(port) = port {
            spec.properties.entry("port".into()).or_insert_with(|| (port + 1).to_string());
        }
    }
}

/// The port of a device that is the last of the configuration, from 1, if it can be there.
pub fn check(config: &PcConfig, spec: &DeviceSpec) -> Result<u8, DeviceError> {
    let none = || DeviceError::Config(format!("No 'usb-bus' bus found for device '{}'", spec.driver));
    let (bus, controller) = bus_of(config, spec).zip(controller(config, spec)).ok_or_else(none)?;
    let all = on_bus(config, &bus, count(controller))?;
    let port = all.iter().rev().find(|(_, d)| *d == spec).map(|(n, _)| *n).ok_or_else(none)?;
    if is_ehci(&controller.driver) {
        has_companion(config, &bus, port, spec)?;
    }
    super::device::UsbDevice::new(config, spec, false)?;
    Ok(port as u8 + 1)
}

/// The devices that a controller itself speaks with, each with its port there, from 0: not those that an EHCI controller
/// leaves to its companions.
pub fn served<'a>(config: &'a PcConfig, controller: &DeviceSpec) -> Vec<(usize, &'a DeviceSpec)> {
    if is_ehci(&controller.driver) || !(is_uhci(&controller.driver) || controller.driver == "qemu-xhci") {
        return Vec::new();
    }
    let number =
        |key: &str| controller.properties.get(key).and_then(|p| parse_number(p)).unwrap_or(0) as usize;
    let (bus, first, all) = match controller.properties.get("masterbus") {
        Some(bus) => (bus.clone(), number("firstport"), ehci::PORTS as usize),
        None => (own_bus(config, controller), 0, count(controller)),
    };
    let mine = first..first.saturating_add(count(controller));
    let there = on_bus(config, &bus, all).unwrap_or_default();
    there.into_iter().filter(|(n, _)| mine.contains(n)).map(|(n, spec)| (n - first, spec)).collect()
}

/// The first ports of the companions of an EHCI controller.
pub fn companions<'a>(config: &'a PcConfig, bus: &'a str) -> impl Iterator<Item = usize> + 'a {
    let own = move |d: &&DeviceSpec| d.properties.get("masterbus").is_some_and(|b| b == bus);
    let first =
        |d: &DeviceSpec| d.properties.get("firstport").and_then(|p| parse_number(p)).unwrap_or(0) as usize;
    config.devices.iter().filter(own).map(first)
}

/// All devices here are of full speed, so on an EHCI controller's bus a companion must serve them.
pub fn has_companion(
    config: &PcConfig,
    bus: &str,
    port: usize,
    spec: &DeviceSpec,
) -> Result<(), DeviceError> {
    if companions(config, bus).any(|first| (first..first + uhci::PORTS).contains(&port)) {
        return Ok(());
    }
    Err(DeviceError::Config(format!(
        "speed mismatch: a full-speed USB device ({}) in port {} of bus '{bus}' needs a companion controller there",
        spec.driver,
        port + 1
    )))
}
