//! `ftvm-lock show|clear [--sure] IMAGE`: who holds a shared image, and how to let it go by hand.

use std::path::Path;

use ftvm::lockstep::lun_lock::describe;
use ftvm_block::files::{beside, is_etcd, is_nfs};
use ftvm_block::iscsi::{hide_secret, is_lun, LunLock};
use ftvm_block::takeover::{is_held, top_overlay};

const USAGE: &str = "usage: ftvm-lock show IMAGE
       ftvm-lock clear [--sure] IMAGE
IMAGE: a path, a device (/dev/sdX), nfs://HOST/PATH or iscsi://HOST/IQN/LUN, as ftvm's -drive file= has it; or what -ft \
lock= names, a path, a URL of these or etcd://HOST[:PORT][,HOST[:PORT]...]/KEY";

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

fn show_lun(url: &str) -> Result<(), String> {
    match LunLock::open(url).and_then(|l| l.holder()).map_err(text)? {
        None => println!("{}: not reserved", hide_secret(url)),
        Some(key) => {
            let who = describe(key).unwrap_or("another program");
            println!("{}: reserved by {who} (key {key:#018x}, pairing {:08x})", hide_secret(url), key as u32);
        }
    }
    Ok(())
}

/// The lock files of an image, or those at a lock's own path: name and contents.
fn lock_files(path: &Path) -> Result<Vec<(String, String)>, String> {
    let (files, name) = beside(path).map_err(text)?;
    let mut names = files.list().map_err(text)?;
    names.sort();
    let mut locks = Vec::new();
    for file in names {
        let Some(rest) = file.strip_prefix(name.as_str()) else { continue };
        let rest = rest.strip_prefix(".ftlock").unwrap_or(rest);
        let Some(rest) = rest.strip_prefix('.') else { continue };
        let token = rest.strip_suffix(".primary").or(rest.strip_suffix(".backup")).unwrap_or(rest);
        let contents = files.read(&file).map(|c| String::from_utf8_lossy(&c).trim().to_owned());
        let contents = contents.unwrap_or_default();
        // The side, the epoch's number and the token of the pairing.
        if contents.split(' ').nth(2) == Some(token) {
            locks.push((file, contents));
        }
    }
    Ok(locks)
}

fn show(image: &str) -> Result<(), String> {
    if is_lun(Path::new(image)) {
        return show_lun(image);
    }
    let path = Path::new(image);
    if !is_nfs(path) && path.exists() {
        let held = is_held(path).map_err(text)?;
        println!("{image}: {}", if held { "in use (its byte locks are held)" } else { "not in use" });
    }
    if let Some(layer) =
        Some(path).filter(|p| !is_etcd(p)).map(top_overlay).transpose().map_err(text)?.flatten()
    {
        println!("{image}: a takeover has left {}; ftvm merges it when it runs", layer.display());
    }
    let locks = lock_files(path)?;
    if locks.is_empty() {
        println!("{image}: no pairing");
    }
    for (name, contents) in locks {
        let mut words = contents.split(' ');
        let (side, number) = (words.next().unwrap_or(""), words.next().unwrap_or("?"));
        let what = match name.rsplit('.').next() {
            Some("primary" | "backup") => format!("claim of the {side}"),
            _ => format!("won by the {side}"),
        };
        println!("{name}: {what}, epoch {number}");
    }
    Ok(())
}

fn clear(image: &str, sure: bool) -> Result<(), String> {
    let path = Path::new(image);
    let lun = is_lun(path);
    if !lun && !is_nfs(path) && path.exists() && is_held(path).map_err(text)? {
        return Err(format!("{image} is in use: end the program that has it open first"));
    }
    if !sure {
        let why =
            "this is safe only when no host of the pair can write any more, because the programs have ended \
                   and the hosts are off. If so, say --sure";
        return Err(why.into());
    }
    if lun {
        LunLock::open(image).and_then(|l| l.clear()).map_err(text)?;
        println!("{}: reservation cleared", hide_secret(image));
        return Ok(());
    }
    let (files, _) = beside(path).map_err(text)?;
    for (name, _) in lock_files(path)? {
        files.remove(&name).map_err(text)?;
        println!("{name}: removed");
    }
    Ok(())
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["show", image] => show(image),
        ["clear", image] => clear(image, false),
        ["clear", "--sure", image] => clear(image, true),
        ["--help" | "-h"] => {
            println!("{USAGE}");
            Ok(())
        }
        _ => Err(USAGE.into()),
    };
    if let Err(e) = result {
        eprintln!("ftvm-lock: {e}");
        std::process::exit(1);
    }
}
