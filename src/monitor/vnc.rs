//! The screen behind the VNC server, and what monitors tell and set of that server.

use ftvm_devices::{Input, Picture};
use ftvm_qmp::{Call, QmpError};
use serde_json::{json, Value};

use super::input::{self, Pointer};
use super::{done, Control, Reply};
use crate::host::keys::Key;
use crate::host::vnc::{Console, View, Vnc};
use crate::machine::MachineInput;

/// What a machine without a video card shows.
const BLANK: (u32, u32) = (640, 480);

/// Buttons as RFB has them (left, middle, right) and as the input door has them.
const BUTTONS: [(u8, u8); 3] = [(1, 1), (2, 4), (4, 2)];

impl Console for Control {
    fn look(&self, since: Option<u64>) -> Result<Option<View>, String> {
        let seen = self.machine(move |rt| match rt.machine.chipset().screen(None) {
            None if since == Some(0) => None,
            None => Some(View { picture: Picture::black(BLANK.0, BLANK.1), ..View::default() }),
            Some(screen) if since == Some(screen.changes()) => None,
            Some(screen) => Some(View {
                number: screen.changes(),
                picture: screen.picture(),
                pointer: screen.pointer().cloned(),
                takes_size: screen.takes_size(),
            }),
        });
        seen.map_err(|e| e.to_string())
    }

    fn resize(&self, width: u16, height: u16) -> bool {
        let told = self.change(move |rt| {
            let takes = rt.machine.chipset().screen(None).is_some_and(|s| s.takes_size());
            if takes && width > 0 && height > 0 {
                let input = Input::Display { head: 0, width: width.into(), height: height.into() };
                rt.input(MachineInput::Device(input));
            }
            Ok(takes && width > 0 && height > 0)
        });
        told.unwrap_or(false)
    }

    fn key(&self, key: Key, down: bool) {
        // Without a machine, or on a backup, keys go nowhere.
        let _ = input::keys(self, vec![(key, down)]);
    }

    fn pointer(&self, now: (u16, u16, u8), before: (u16, u16, u8), size: (u32, u32)) {
        let scale =
            |at: u16, size: u32| (u32::from(at) * 0x7FFF / size.saturating_sub(1).max(1)).min(0x7FFF) as u16;
        let way = |a: u16, b: u16| (i32::from(a) - i32::from(b)).clamp(-0x7FFF, 0x7FFF) as i16;
        let (pressed, released) = (now.2 & !before.2, before.2 & !now.2);
        let bits = |from: u8| BUTTONS.iter().filter(|(b, _)| from & b != 0).fold(0, |m, (_, bit)| m | bit);
        let pointer = Pointer {
            x: Some(scale(now.0, size.0)),
            y: Some(scale(now.1, size.1)),
            dx: way(now.0, before.0),
            dy: way(now.1, before.1),
            wheel: i8::from(pressed & 8 != 0) - i8::from(pressed & 16 != 0),
            press: bits(pressed),
            release: bits(released),
        };
        let _ = input::point(self, pointer);
    }

    fn name(&self) -> String {
        match &self.config.name {
            Some(name) => format!("ftvm ({name})"),
            None => "ftvm".into(),
        }
    }
}

fn server(c: &Control) -> Result<&Vnc, QmpError> {
    c.vnc.get().map(|v| &**v).ok_or_else(|| QmpError::generic("no VNC display is active"))
}

pub fn query(c: &Control, _: &mut Call) -> Reply {
    let Some((server, (host, port))) = c.vnc.get().and_then(|v| Some((v, v.address()?))) else {
        return Ok(json!({"enabled": false}));
    };
    let family = |host: &str| match host.contains(':') {
        true => "ipv6",
        false => "ipv4",
    };
    let clients: Vec<Value> = server
        .clients()
        .iter()
        .map(|peer| match peer.rsplit_once(':') {
            Some((host, service)) => {
                let host = host.trim_matches(['[', ']']);
                json!({"host": host, "service": service, "family": family(host), "websocket": false})
            }
            None => json!({"host": "", "service": "", "family": "unix", "websocket": false}),
        })
        .collect();
    let (service, family) = match port {
        Some(port) => (port.to_string(), family(&host)),
        None => (host.clone(), "unix"),
    };
    Ok(json!({
        "enabled": true,
        "host": host,
        "family": family,
        "service": service,
        "auth": if server.asks_password() { "vnc" } else { "none" },
        "clients": clients,
    }))
}

fn set(c: &Control, password: &str) -> Reply {
    let password = Some(password.to_owned()).filter(|p| !p.is_empty());
    match server(c)?.set_password(password) {
        true => done(),
        false => Err(QmpError::generic("Could not set password")),
    }
}

pub fn change_password(c: &Control, call: &mut Call) -> Reply {
    set(c, call.text("password"))
}

pub fn set_password(c: &Control, call: &mut Call) -> Reply {
    if call.text("protocol") != "vnc" {
        return Err(QmpError::generic("there is no SPICE server"));
    }
    if !matches!(call.text("connected"), "" | "keep") {
        return Err(QmpError::generic("Parameter 'connected' expects 'keep' when used with VNC"));
    }
    set(c, call.text("password"))
}
