//! Writes what is made from the option table: `man/ftvm.1` and `packaging/ftvm.bash`.

use std::path::Path;

fn main() -> std::io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (name, text) in
        [("man/ftvm.1", ftvm::cli::man::page()), ("packaging/ftvm.bash", ftvm::cli::completion::bash())]
    {
        std::fs::write(root.join(name), text)?;
        println!("{name}");
    }
    Ok(())
}
