//! Writes what is made from the service's own tables: introspection XML, manual pages, polkit's actions, completions.

use std::path::Path;

use clap_complete::Shell;

fn main() -> std::io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let put = |name: &str, text: String| {
        println!("{name}");
        std::fs::write(root.join(name), text)
    };
    let interfaces = ftvm_daemon::service::interfaces();
    for (name, xml) in &interfaces {
        put(&format!("packaging/dbus/{name}.xml"), xml.clone())?;
    }
    let xml: Vec<String> = interfaces.into_iter().map(|(_, xml)| xml).collect();
    put("man/org.ftvm.5", ftvm_daemon::page::interfaces_page(&xml))?;
    put("man/ftctl.1", ftvm_daemon::page::ftctl_page(&ftvm_daemon::ctl::command()))?;
    put("man/ftvmd.8", ftvm_daemon::page::ftvmd_page(&ftvm_daemon::service::command()))?;
    put("man/ftvmd.conf.5", ftvm_daemon::page::configuration_page())?;
    put("packaging/dbus/org.ftvm.policy", ftvm_daemon::access::policy())?;
    for (shell, name) in [(Shell::Bash, "ftctl.bash"), (Shell::Zsh, "ftctl.zsh"), (Shell::Fish, "ftctl.fish")]
    {
        let mut text = Vec::new();
        clap_complete::generate(shell, &mut ftvm_daemon::ctl::command(), "ftctl", &mut text);
        put(&format!("packaging/{name}"), String::from_utf8_lossy(&text).into_owned())?;
    }
    Ok(())
}
