//! What a qcow2 image says of the dirty bitmaps that it keeps, as QEMU's tools read it.

use serde_json::Value;

use crate::guests::run;
use crate::Result;

/// A bitmap's flags, if `info` (of `qemu-img info --output=json`) knows it.
pub fn flags(info: &str, name: &str) -> Result<Option<Vec<String>>> {
    // For a LUN the client's own messages follow.
    let mut values = serde_json::Deserializer::from_str(info).into_iter::<Value>();
    let info =
        values.next().ok_or("qemu-img info says nothing")?.map_err(|e| format!("qemu-img info: {e}"))?;
    let list = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    let found = list.into_iter().find(|b| b["name"] == name);
    let text = |flag: &Value| flag.as_str().unwrap_or_default().to_owned();
    Ok(found.map(|b| b["flags"].as_array().into_iter().flatten().map(text).collect()))
}

/// Every block of an image that differs from the raw image `before` is dirty in the bitmap; how many differ.
pub fn covers(before: &str, image: &str, name: &str) -> Result<usize> {
    const BLOCK: usize = 1 << 16;
    let after = format!("{before}.after");
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", image, &after])?;
    let read = |path: &str| std::fs::read(path).map_err(|e| format!("{path}: {e}"));
    let (old, new) = (read(before)?, read(&after)?);
    std::fs::remove_file(&after).map_err(|e| format!("{after}: {e}"))?;
    let context = format!("--map=qemu:dirty-bitmap:{name}");
    let map = run(
        "nbdinfo",
        &["--json", &context, "--", "[", "qemu-nbd", "-r", "-f", "qcow2", "-B", name, image, "]"],
    )?;
    let map: Value = serde_json::from_str(&map).map_err(|e| format!("nbdinfo: {e}"))?;
    let dirty: Vec<(u64, u64)> = map
        .as_array()
        .into_iter()
        .flatten()
        .filter(|e| e["description"] == "dirty")
        .filter_map(|e| Some((e["offset"].as_u64()?, e["length"].as_u64()?)))
        .collect();
    let pairs = old.chunks(BLOCK).zip(new.chunks(BLOCK)).enumerate();
    let differ: Vec<usize> = pairs.filter(|(_, (a, b))| a != b).map(|(n, _)| n).collect();
    for n in &differ {
        let at = (n * BLOCK) as u64;
        let is_dirty = dirty.iter().any(|(from, len)| *from <= at && at + BLOCK as u64 <= from + len);
        if !is_dirty {
            return Err(format!("{image}: what was written at {at} is not in the bitmap '{name}'"));
        }
    }
    Ok(differ.len())
}
