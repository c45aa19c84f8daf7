//! What the machine shows, for people: `screendump`.

use std::io::{BufWriter, Write};

use ftvm_devices::Picture;
use ftvm_qmp::{Call, QmpError};

use super::{done, Control, Reply};

/// The picture's rows as bytes, red, green and blue of each pixel.
fn rgb(picture: &Picture) -> Vec<u8> {
    picture.pixels.iter().flat_map(|p| [(p >> 16) as u8, (p >> 8) as u8, *p as u8]).collect()
}

fn write_ppm(out: &mut impl Write, picture: &Picture) -> std::io::Result<()> {
    write!(out, "P6\n{} {}\n255\n", picture.width, picture.height)?;
    out.write_all(&rgb(picture))
}

fn write_png(out: &mut impl Write, picture: &Picture) -> Result<(), png::EncodingError> {
    let mut encoder = png::Encoder::new(out, picture.width, picture.height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&rgb(picture))?;
    writer.finish()
}

pub fn screendump(c: &Control, call: &mut Call) -> Reply {
    let device = call.arguments.get("device").and_then(|d| d.as_str()).map(str::to_owned);
    let head = call.int("head");
    if device.is_none() && head.is_some() {
        return Err(QmpError::generic("'head' must be specified together with 'device'"));
    }
    let (wanted, head) = (device.clone(), head.unwrap_or(0));
    let picture = c.machine(move |rt| {
        let screen = rt.machine.chipset().screen(wanted.as_deref());
        screen.map(|screen| u32::try_from(head).ok().and_then(|head| screen.head(head)))
    })?;
    let picture = match (picture, device) {
        (Some(Some(picture)), _) => picture,
        (None, Some(device)) => return Err(QmpError::device_not_found(&device)),
        (Some(None), Some(device)) => {
            let text = format!("Device '{device}' (head {head}) is not bound to a QemuConsole");
            return Err(QmpError::generic(text));
        }
        (_, None) => return Err(QmpError::generic("There is no console to take a screendump from")),
    };
    let path = call.text("filename").to_owned();
    let failed = |e: &dyn std::fmt::Display| QmpError::generic(format!("failed to write '{path}': {e}"));
    let file = std::fs::File::create(&path)
        .map_err(|e| QmpError::generic(format!("failed to open file '{path}': {e}")))?;
    let mut out = BufWriter::new(file);
    match call.arguments.get("format").and_then(|f| f.as_str()) {
        Some("png") => write_png(&mut out, &picture).map_err(|e| failed(&e))?,
        _ => write_ppm(&mut out, &picture).map_err(|e| failed(&e))?,
    }
    out.flush().map_err(|e| failed(&e))?;
    done()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_written_as_readers_of_the_formats_expect() {
        let picture = Picture { width: 2, height: 1, pixels: vec![0xFF_8001, 0x00_0203] };
        let mut ppm = Vec::new();
        write_ppm(&mut ppm, &picture).unwrap();
        assert_eq!(ppm, b"P6\n2 1\n255\n\xFF\x80\x01\x00\x02\x03");
        let mut png = Vec::new();
        write_png(&mut png, &picture).unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
        let mut back = vec![0; 6];
        reader.next_frame(&mut back).unwrap();
        assert_eq!(back, rgb(&picture));
    }
}
