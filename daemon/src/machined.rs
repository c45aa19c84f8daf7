//! Machines are known to systemd-machined, where there is one: `machinectl` lists them, and each is a scope of its own, so
//! that it is not one of the service's processes.

use zbus::{Connection, Variant};

use crate::machine::Machine;

/// org.freedesktop.machine1(5).
const NAME: &str = "org.freedesktop.machine1";

/// The name under which machined knows it: one that a host could have.
fn name(machine: &str) -> String {
    let fine = |c: char| if c.is_ascii_alphanumeric() || c == '-' || c == '.' { c } else { '-' };
    format!("ftvm-{}", machine.chars().map(fine).collect::<String>().trim_matches(['-', '.']))
}

/// The sixteen bytes of a UUID; none, if it is none.
fn id(uuid: &str) -> Vec<u8> {
    let digits: String = uuid.chars().filter(|c| *c != '-').collect();
    let byte = |i: usize| digits.get(i..i + 2).and_then(|d| u8::from_str_radix(d, 16).ok());
    let bytes: Option<Vec<u8>> = (0..digits.len()).step_by(2).map(byte).collect();
    bytes.filter(|b| b.len() == 16).unwrap_or_default()
}

/// Tell it of a machine's process.
pub async fn register(connection: &Connection, machine: &Machine, pid: u32) {
    let properties: Vec<(&str, Variant<'_>)> =
        vec![("Description", format!("ftvm machine {}", machine.name).into())];
    let body = (name(&machine.name), id(&machine.uuid()), "ftvm", "vm", pid, "", properties);
    let told = connection
        .call_method(
            Some(NAME),
            "/org/freedesktop/machine1",
            Some("org.freedesktop.machine1.Manager"),
            "CreateMachine",
            &body,
        )
        .await;
    match told {
        Ok(_) => log::debug!("{}: known to systemd-machined", machine.name),
        Err(zbus::Error::MethodError(error, text, _)) => {
            // It is not there, or knows the machine since before this service started anew.
            let calm = ["ServiceUnknown", "MachineExists", "NameHasNoOwner", "UnitMasked", "NoSuchUnit"];
            let text = text.unwrap_or_default();
            match calm.iter().any(|c| error.ends_with(c)) {
                true => log::debug!("{}: systemd-machined: {error}: {text}", machine.name),
                false => log::warn!("{}: systemd-machined: {error}: {text}", machine.name),
            }
        }
        Err(e) => log::debug!("{}: systemd-machined: {e}", machine.name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_ids_are_what_machined_takes() {
        assert_eq!(name("web_1.a"), "ftvm-web-1.a");
        let bytes = id("00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!((bytes.len(), bytes[1], bytes[15]), (16, 0x11, 0xff));
        assert!(id("").is_empty() && id("xyz").is_empty());
    }
}
