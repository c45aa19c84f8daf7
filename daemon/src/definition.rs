//! Definitions: files that a person can write, `NAME.conf` with ftvm's arguments, one a line.
//!
//! A line is one argument, blanks and all: an option and its value are two lines, or one line of the form
//! `-option value`, where the first blank divides them. Empty lines and lines that begin with `#` say nothing.

use std::io::Write;
use std::path::Path;

use crate::{Error, Result};

/// The longest definition: a line for every device of a large machine, and no more.
const MAX_BYTES: usize = 256 * 1024;

/// Options that the service gives itself; a definition that has them would take the machine out of its hands.
const RESERVED: &[&str] = &["daemonize", "pidfile", "D"];

/// Refuse a name that is no file name, bus path or socket name.
pub fn check_name(name: &str) -> Result<()> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.is_empty() || name.len() > 48 || name.starts_with(['.', '-']) || !name.chars().all(fine) {
        return Err(Error::Invalid(format!(
            "'{name}' is no machine name: up to 48 letters, digits, '.', '_' or '-', not beginning with '.' or '-'"
        )));
    }
    Ok(())
}

/// The arguments that a definition holds.
pub fn parse(text: &str) -> Result<Vec<String>> {
    if text.len() > MAX_BYTES || text.contains('\0') {
        return Err(Error::Invalid(format!("a definition is text of at most {MAX_BYTES} bytes")));
    }
    let mut args = Vec::new();
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let (option, value) = match line.split_once(char::is_whitespace) {
            Some((option, value)) if line.starts_with('-') => (option, Some(value.trim_start())),
            _ => (line, None),
        };
        let word = option.trim_start_matches('-');
        if option.starts_with('-') && RESERVED.contains(&word) {
            return Err(Error::Invalid(format!("-{word} is ftvmd's to give")));
        }
        args.push(option.to_owned());
        args.extend(value.map(str::to_owned));
    }
    Ok(args)
}

/// The value of an option, if it is given.
pub fn value<'a>(args: &'a [String], option: &str) -> Option<&'a str> {
    let at = args.iter().position(|a| a.trim_start_matches('-') == option && a.starts_with('-'))?;
    args.get(at + 1).map(String::as_str)
}

/// The keys of `-ft`'s value; the first word without a key is the role. `,,` stands for a comma.
pub fn ft_keys(value: &str) -> Vec<(String, String)> {
    let mut words = vec![String::new()];
    let mut rest = value.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            ',' if rest.next_if_eq(&',').is_none() => words.push(String::new()),
            c => words.last_mut().into_iter().for_each(|w| w.push(c)),
        }
    }
    let pair = |(i, word): (usize, String)| match word.split_once('=') {
        Some((key, value)) => (key.to_owned(), value.to_owned()),
        None if i == 0 => ("role".to_owned(), word),
        None => (word, "on".to_owned()),
    };
    words.into_iter().enumerate().map(pair).collect()
}

/// `-ft`'s value of these keys.
pub fn ft_value(keys: &[(String, String)]) -> String {
    let words = keys.iter().map(|(key, value)| format!("{key}={}", value.replace(',', ",,")));
    words.collect::<Vec<_>>().join(",")
}

/// The arguments with another value of `-ft`.
pub fn with_ft(args: &[String], value: &str) -> Vec<String> {
    let mut out = args.to_vec();
    match out.iter().position(|a| a == "-ft" || a == "--ft") {
        Some(at) if at + 1 < out.len() => value.clone_into(&mut out[at + 1]),
        _ => out.extend(["-ft".to_owned(), value.to_owned()]),
    }
    out
}

/// Whether these are the arguments of a backup, which takes name, UUID and all else from its primary.
pub fn is_backup(args: &[String]) -> bool {
    value(args, "ft").is_some_and(|v| v.starts_with("backup") || v.contains("role=backup"))
}

/// Read a definition's arguments.
pub fn read(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::File(path.display().to_string(), e))?;
    parse(&text).map_err(|e| Error::Invalid(format!("{}: {e}", path.display())))
}

/// Write a definition, whole or not at all. A machine without a UUID gets one. A definition that exists is replaced.
pub fn write(path: &Path, text: &str) -> Result<()> {
    let args = parse(text)?;
    let mut text = text.to_owned();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    if value(&args, "uuid").is_none() && !is_backup(&args) {
        let random = "/proc/sys/kernel/random/uuid";
        let uuid = std::fs::read_to_string(random).map_err(|e| Error::File(random.into(), e))?;
        text.push_str(&format!("-uuid {}\n", uuid.trim()));
    }
    let new = path.with_extension("new");
    let save = || -> std::io::Result<()> {
        let mut file = std::fs::File::create(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, path)
    };
    save().map_err(|e| Error::File(path.display().to_string(), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_argument_a_line() {
        let text =
            "# a machine\n-m 512\n-drive\nfile=/a b.qcow2,if=virtio\n\n-append console=ttyS0 quiet\n-S\n";
        let want =
            ["-m", "512", "-drive", "file=/a b.qcow2,if=virtio", "-append", "console=ttyS0 quiet", "-S"];
        assert_eq!(parse(text).unwrap(), want);
        assert_eq!(value(&parse(text).unwrap(), "m"), Some("512"));
        assert!(parse("-daemonize").unwrap_err().to_string().contains("-daemonize"));
        assert!(parse("-pidfile /x").is_err());
    }

    #[test]
    fn the_value_of_ft_is_taken_apart_and_made() {
        let keys = ft_keys("primary,lock=/a,,b,max-lag=5");
        let word = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        assert_eq!(keys, [word("role", "primary"), word("lock", "/a,b"), word("max-lag", "5")]);
        assert_eq!(ft_value(&keys), "role=primary,lock=/a,,b,max-lag=5");
        let args = ["-m", "64", "-ft", "primary"].map(str::to_owned);
        assert_eq!(with_ft(&args, "backup,peer=a"), ["-m", "64", "-ft", "backup,peer=a"]);
        assert_eq!(with_ft(&args[..2], "primary"), args);
    }

    #[test]
    fn names_that_are_none() {
        for name in ["", "../x", "a/b", ".x", "-x", "a b", &"x".repeat(49)] {
            assert!(check_name(name).is_err(), "{name}");
        }
        check_name("web-1.example_x").unwrap();
    }

    #[test]
    fn a_definition_gets_a_uuid_once() {
        let path = std::env::temp_dir().join(format!("ftvm-definition-{}.conf", std::process::id()));
        write(&path, "-m 64").unwrap();
        let first = read(&path).unwrap();
        let uuid = value(&first, "uuid").unwrap().to_owned();
        assert_eq!(uuid.len(), 36);
        write(&path, &std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(read(&path).unwrap(), first);
        write(&path, "-ft backup,peer=a").unwrap();
        assert_eq!(read(&path).unwrap(), ["-ft", "backup,peer=a"]);
        std::fs::remove_file(&path).unwrap();
    }
}
