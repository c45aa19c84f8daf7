//! Who may do what. On the system bus polkit decides, one action a verb; without polkit only root may.
//! A session bus admits its owner alone, who may do everything.

use std::collections::HashMap;

use zbus::message::Header;
use zbus::{fdo, Connection, Variant};

/// A verb: its polkit action is `org.ftvm.` and this name; the message says what the person is asked for.
pub struct Verb {
    pub action: &'static str,
    pub message: &'static str,
}

const fn verb(action: &'static str, message: &'static str) -> Verb {
    Verb { action, message }
}

/// All verbs.
pub const VERBS: &[Verb] = &[
    verb("define", "define a virtual machine"),
    verb("undefine", "remove the definition of a virtual machine"),
    verb("start", "start a virtual machine"),
    verb("shutdown", "shut a virtual machine down"),
    verb("reset", "reset a virtual machine"),
    verb("pause", "pause a virtual machine"),
    verb("resume", "resume a paused virtual machine"),
    verb("destroy", "cut the power of a virtual machine"),
    verb("ft-turn-on", "turn the fault tolerance of a virtual machine on"),
    verb("ft-turn-off", "turn the fault tolerance of a virtual machine off"),
    verb("ft-suspend", "suspend the fault tolerance of a virtual machine"),
    verb("ft-resume", "resume the fault tolerance of a virtual machine"),
    verb("ft-test-failover", "switch a virtual machine over to its backup"),
    verb("ft-test-restart", "restart the backup of a virtual machine"),
    verb("ft-migrate-backup", "move the backup of a virtual machine to another host"),
    verb("check-peer", "measure the network and the shared storage together with another host"),
    verb("maintenance", "move the virtual machines away from this host, or let them come again"),
];

/// Which bus the service is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    System,
    Session,
}

impl Bus {
    /// `Ok` if the caller may do this, AccessDenied with the reason if not.
    pub async fn check(self, connection: &Connection, header: &Header<'_>, action: &str) -> fdo::Result<()> {
        if self == Bus::Session {
            return Ok(());
        }
        let sender = header.sender().ok_or_else(|| denied(action, "the caller has no name on the bus"))?;
        // polkit would say so too, but need not run.
        let user = connection
            .call_method(
                Some("org.freedesktop.DBus"),
                "/org/freedesktop/DBus",
                Some("org.freedesktop.DBus"),
                "GetConnectionUnixUser",
                &sender.as_str(),
            )
            .await?;
        if user.body().deserialize::<u32>()? == 0 {
            return Ok(());
        }
        let subject = ("system-bus-name", HashMap::from([("name", Variant::from(sender.as_str()))]));
        let details: HashMap<&str, &str> = HashMap::new();
        // 1: a person may be asked for a password.
        let question = (subject, format!("{}.{action}", crate::BUS_NAME), details, 1u32, "");
        let answer = connection
            .call_method(
                Some("org.freedesktop.PolicyKit1"),
                "/org/freedesktop/PolicyKit1/Authority",
                Some("org.freedesktop.PolicyKit1.Authority"),
                "CheckAuthorization",
                &question,
            )
            .await
            .map_err(|e| denied(action, &format!("polkit cannot be asked ({e})")))?;
        let (authorized, _, _): (bool, bool, HashMap<String, String>) = answer.body().deserialize()?;
        if authorized {
            Ok(())
        } else {
            Err(denied(action, "polkit refuses it"))
        }
    }
}

fn denied(action: &str, why: &str) -> fdo::Error {
    fdo::Error::AccessDenied(format!("{}.{action}: {why}", crate::BUS_NAME))
}

/// The file of actions for polkit.
pub fn policy() -> String {
    let mut out = String::from(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <!DOCTYPE policyconfig PUBLIC \"-//freedesktop//DTD PolicyKit Policy Configuration 1.0//EN\"\n \
         \"http://www.freedesktop.org/standards/PolicyKit/1/policyconfig.dtd\">\n\
         <!-- Made by the example \"generate\" of ftvm-daemon: do not edit. -->\n\
         <policyconfig>\n  <vendor>ftvm</vendor>\n",
    );
    for Verb { action, message } in VERBS {
        out.push_str(&format!(
            "  <action id=\"{}.{action}\">\n    <description>{message}</description>\n    \
             <message>Authentication is required to {message}</message>\n    <defaults>\n      \
             <allow_any>auth_admin</allow_any>\n      <allow_inactive>auth_admin</allow_inactive>\n      \
             <allow_active>auth_admin_keep</allow_active>\n    </defaults>\n  </action>\n",
            crate::BUS_NAME,
        ));
    }
    out.push_str("</policyconfig>\n");
    out
}
