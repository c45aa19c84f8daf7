//! Network back ends and cards.

use std::os::fd::IntoRawFd;

use ftvm_devices::Input;
use ftvm_qmp::{Call, QmpError};
use serde_json::{json, Value};

use super::{devices, done, Control, Reply};
use crate::cli::keyval::Params;
use crate::cli::net;
use crate::machine::MachineInput;

pub fn add(c: &Control, call: &mut Call) -> Reply {
    devices::check_id(call.text("id"))?;
    let mut params = Params::default();
    for (key, value) in call.arguments {
        match value {
            Value::String(s) => params.set(key, s),
            Value::Bool(b) => params.set(key, if *b { "on" } else { "off" }),
            Value::Number(n) => params.set(key, &n.to_string()),
            Value::Array(list) => {
                for item in list {
                    params.set(key, item["str"].as_str().unwrap_or_default());
                }
            }
            _ => {}
        }
    }
    let fd = call.text("fd").to_owned();
    let taken = c.shared.backends().netdevs.iter().any(|n| n.id == call.text("id"));
    if taken {
        return Err(QmpError::generic(format!("Duplicate ID '{}'", call.text("id"))));
    }
    if !fd.is_empty() && !fd.starts_with(|ch: char| ch.is_ascii_digit()) {
        // A descriptor that getfd has kept; it belongs to the back end from now on.
        params.set("fd", &call.fds.named(&fd)?.into_raw_fd().to_string());
    }
    let dev = net::netdev(&params).map_err(|e| QmpError::generic(e.to_string()))?;
    c.change(move |rt| {
        rt.shared.backends().netdevs.push(dev);
        devices::note(rt);
        done()
    })
}

pub fn del(c: &Control, call: &mut Call) -> Reply {
    let id = call.text("id").to_owned();
    c.change(move |rt| {
        let mut backends = rt.shared.backends();
        let at = backends.netdevs.iter().position(|n| n.id == id);
        let at = at.ok_or_else(|| QmpError::device_not_found(&id))?;
        if backends.nics.iter().flatten().any(|n| n.netdev == id) {
            return Err(QmpError::generic(format!("'{id}' is used by a network card: delete that first")));
        }
        backends.netdevs.remove(at);
        drop(backends);
        devices::note(rt);
        done()
    })
}

pub fn set_link(c: &Control, call: &mut Call) -> Reply {
    let (name, up) = (call.text("name").to_owned(), call.bool("up").unwrap_or(true));
    c.change(move |rt| {
        let inventory = rt.machine.chipset().inventory();
        let device = inventory.iter().find(|i| i.spec.id.as_deref() == Some(&name)).and_then(|i| i.spec.nic);
        let backends = rt.shared.backends();
        let of_netdev = backends.nics.iter().position(|n| n.as_ref().is_some_and(|n| n.netdev == name));
        drop(backends);
        let nic = device.or(of_netdev.map(|n| n as u32)).ok_or_else(|| QmpError::device_not_found(&name))?;
        rt.input(MachineInput::Device(Input::LinkState { nic, up }));
        Ok(json!({}))
    })
}
