//! Keys and pointers: `send-key` and `input-send-event`.

use std::time::Duration;

use ftvm_devices::Input;
use ftvm_qmp::{Call, QmpError};
use serde_json::Value;

use super::{done, Control, Reply};
use crate::host::keys::{self, Key};
use crate::machine::MachineInput;
use crate::runtime::live::Runtime;
use crate::runtime::Event;

/// The largest coordinate of a pointer that says where it is.
const MAX_COORDINATE: i64 = 0x7FFF;

/// What of the machine takes keys and pointers.
#[derive(Clone, Copy)]
struct Takers {
    usb_keyboard: bool,
    tablet: bool,
    mouse: bool,
}

fn takers(rt: &Runtime) -> Takers {
    let inventory = rt.machine.chipset().inventory();
    let has = |name: &str| inventory.iter().any(|i| i.spec.driver == name);
    Takers { usb_keyboard: has("usb-kbd"), tablet: has("usb-tablet"), mouse: has("usb-mouse") }
}

/// A key for the machine's keyboard: a USB keyboard, if there is one, takes what the PS/2 keyboard would.
fn key_input(usb: bool, key: Key, down: bool) -> Input {
    match (usb, down) {
        (true, _) => Input::Key { number: key.number, down },
        (false, true) => Input::Keyboard { bytes: key.pressed() },
        (false, false) => Input::Keyboard { bytes: key.released() },
    }
}

/// Press keys together, and let them go after `hold`.
pub fn press(c: &Control, keys: Vec<Key>, hold: Duration) -> Reply {
    let usb = c.machine(|rt| takers(rt).usb_keyboard)?;
    let pressed: Vec<Input> = keys.iter().map(|k| key_input(usb, *k, true)).collect();
    c.change(move |rt| {
        pressed.into_iter().for_each(|i| rt.input(MachineInput::Device(i)));
        done()
    })?;
    let released: Vec<Input> = keys.iter().rev().map(|k| key_input(usb, *k, false)).collect();
    let events = c.events.clone();
    std::thread::Builder::new()
        .name("send-key".into())
        .spawn(move || {
            std::thread::sleep(hold);
            for input in released {
                let _ = events.send(Event::Input(MachineInput::Device(input)));
            }
        })
        .map_err(|e| QmpError::generic(format!("no thread to release the keys: {e}")))?;
    done()
}

/// The key that a QMP `KeyValue` names.
fn key_of(value: &Value) -> Result<Key, QmpError> {
    let data = &value["data"];
    let found = match data.as_str() {
        Some(name) => keys::by_name(name),
        None => data.as_u64().and_then(keys::by_number),
    };
    found.ok_or_else(|| QmpError::generic(format!("this keyboard has no key {data}")))
}

pub fn send_key(c: &Control, call: &mut Call) -> Reply {
    let list = call.arguments.get("keys").and_then(Value::as_array).into_iter().flatten();
    let pressed = list.map(key_of).collect::<Result<Vec<Key>, QmpError>>()?;
    let hold = call.int("hold-time").unwrap_or(100).clamp(0, 10_000) as u64;
    press(c, pressed, Duration::from_millis(hold))
}

/// The pointer's part of a list of events, gathered until it changes a button twice.
#[derive(Default)]
struct Pointer {
    x: Option<u16>,
    y: Option<u16>,
    dx: i16,
    dy: i16,
    wheel: i8,
    press: u8,
    release: u8,
}

impl Pointer {
    fn take(&mut self) -> Option<Input> {
        let Pointer { x, y, dx, dy, wheel, press, release } = std::mem::take(self);
        let any = x.is_some() || y.is_some() || dx != 0 || dy != 0 || wheel != 0 || press | release != 0;
        any.then_some(Input::Pointer { x, y, dx, dy, wheel, press, release })
    }
}

/// The bit of a button in [`Input::Pointer`].
fn button_bit(name: &str) -> u8 {
    match name {
        "left" => 1,
        "right" => 2,
        "middle" => 4,
        "side" => 8,
        _ => 16,
    }
}

/// What a list of QMP `InputEvent` means for this machine.
fn inputs_of(events: &[Value], takers: Takers) -> Result<Vec<Input>, QmpError> {
    let none = || QmpError::generic("Input handler not found for event type");
    let mut out = Vec::new();
    let mut pointer = Pointer::default();
    for event in events {
        let data = &event["data"];
        let down = data["down"] == true;
        let value = data["value"].as_i64().unwrap_or(0);
        match event["type"].as_str().unwrap_or_default() {
            "key" => {
                out.extend(pointer.take());
                out.push(key_input(takers.usb_keyboard, key_of(&data["key"])?, down));
            }
            "btn" if !takers.tablet && !takers.mouse => return Err(none()),
            "btn" => match data["button"].as_str().unwrap_or_default() {
                "wheel-up" if down => pointer.wheel = pointer.wheel.saturating_add(1),
                "wheel-down" if down => pointer.wheel = pointer.wheel.saturating_sub(1),
                name if name.starts_with("wheel") => {}
                name => {
                    let bit = button_bit(name);
                    if (pointer.press | pointer.release) & bit != 0 {
                        out.extend(pointer.take());
                    }
                    *(if down { &mut pointer.press } else { &mut pointer.release }) |= bit;
                }
            },
            "abs" if takers.tablet => {
                let place = Some(value.clamp(0, MAX_COORDINATE) as u16);
                *(if data["axis"] == "x" { &mut pointer.x } else { &mut pointer.y }) = place;
            }
            "rel" if takers.mouse => {
                let way = if data["axis"] == "x" { &mut pointer.dx } else { &mut pointer.dy };
                *way = way.saturating_add(value.clamp(-0x7FFF, 0x7FFF) as i16);
            }
            _ => return Err(none()),
        }
    }
    out.extend(pointer.take());
    Ok(out)
}

pub fn send_event(c: &Control, call: &mut Call) -> Reply {
    if call.arguments.contains_key("device") || call.arguments.contains_key("head") {
        return Err(QmpError::generic("this machine has no consoles that events could be sent to"));
    }
    let events: Vec<Value> =
        call.arguments.get("events").and_then(Value::as_array).cloned().unwrap_or_default();
    c.change(move |rt| {
        for input in inputs_of(&events, takers(rt))? {
            rt.input(MachineInput::Device(input));
        }
        done()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const ALL: Takers = Takers { usb_keyboard: true, tablet: true, mouse: false };

    #[test]
    fn events_of_a_pointer_are_gathered_and_a_click_has_two() {
        let button = |down: bool| json!({"type": "btn", "data": {"button": "left", "down": down}});
        let axis = |a: &str, v: i64| json!({"type": "abs", "data": {"axis": a, "value": v}});
        let seen = inputs_of(&[axis("x", 5), axis("y", 99_999), button(true), button(false)], ALL);
        let point = |x, y, press, release| Input::Pointer { x, y, dx: 0, dy: 0, wheel: 0, press, release };
        assert_eq!(seen.ok(), Some(vec![point(Some(5), Some(0x7FFF), 1, 0), point(None, None, 0, 1)]));
    }

    #[test]
    fn keys_go_to_the_usb_keyboard_if_there_is_one_and_nobody_takes_what_nothing_takes() {
        let key = json!({"type": "key", "data": {"down": true, "key": {"type": "qcode", "data": "a"}}});
        let none = Takers { usb_keyboard: false, tablet: false, mouse: false };
        let usb = inputs_of(std::slice::from_ref(&key), ALL);
        assert_eq!(usb.ok(), Some(vec![Input::Key { number: 0x1E, down: true }]));
        let ps2 = inputs_of(&[key], none);
        assert_eq!(ps2.ok(), Some(vec![Input::Keyboard { bytes: vec![0x1C] }]));
        let rel = json!({"type": "rel", "data": {"axis": "x", "value": 1}});
        assert!(inputs_of(&[rel], none).is_err());
    }
}
