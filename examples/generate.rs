//! Writes what is made from the program's own tables: the manual pages and the completion for bash.

use std::path::Path;

fn main() -> std::io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (name, text) in [
        ("man/ftvm.1", ftvm::cli::man::page()),
        ("man/ftvm-qmp.7", ftvm::monitor::page::page()),
        ("packaging/ftvm.bash", ftvm::cli::completion::bash()),
    ] {
        std::fs::write(root.join(name), text)?;
        println!("{name}");
    }
    Ok(())
}
