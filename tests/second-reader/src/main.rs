//! `second-reader IMAGE OUT`: what qcow2-rs reads from a qcow2 image, as a raw file.

use std::io::Write;
use std::path::PathBuf;

use qcow2_rs::dev::Qcow2DevParams;
use qcow2_rs::helpers::Qcow2IoBuf;
use qcow2_rs::utils::qcow2_setup_dev_sync;

const STEP: usize = 1 << 16;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(image), Some(out)) = (args.next(), args.next()) else {
        return Err("usage: second-reader IMAGE OUT".into());
    };
    let params = Qcow2DevParams::new(9, None, None, true, false);
    let mut file = std::fs::File::create(out)?;
    futures::executor::block_on(async {
        let dev = qcow2_setup_dev_sync(&PathBuf::from(image), &params)?;
        dev.qcow2_prep_io().await?;
        let size = dev.info.virtual_size();
        let mut buf = Qcow2IoBuf::<u8>::new(STEP);
        let mut at = 0;
        while at < size {
            let len = (size - at).min(STEP as u64) as usize;
            let got = dev.read_at(&mut buf[..len], at).await?;
            if got != len {
                return Err(format!("{got} of {len} bytes at {at}").into());
            }
            file.write_all(&buf[..len])?;
            at += len as u64;
        }
        Ok(())
    })
}
