//! Image operations by hand: `io IMAGE COMMAND...` with write=OFFSET,LEN,BYTE read=OFFSET,LEN,BYTE flush sleep=MS.
use std::path::Path;

fn main() {
    let mut args = std::env::args().skip(1);
    let image = args.next().unwrap_or_default();
    let opened = ftvm_block::open(Path::new(&image), &ftvm_block::OpenOptions::default());
    let image = match opened {
        Ok(image) => image,
        Err(e) => return println!("{e}"),
    };
    println!("{} {} bytes", image.format(), image.size());
    for arg in args {
        let (what, rest) = arg.split_once('=').unwrap_or((&arg, ""));
        let n: Vec<u64> = rest.split(',').filter_map(|n| n.parse().ok()).collect();
        let at = |i: usize| n.get(i).copied().unwrap_or(0);
        let result = match what {
            "write" => image.write_at(at(0), &vec![at(2) as u8; at(1) as usize]),
            "read" => {
                let mut buf = vec![0; at(1) as usize];
                image.read_at(at(0), &mut buf).map(|()| {
                    println!(
                        "pattern {}",
                        if buf.iter().all(|b| *b == at(2) as u8) { "found" } else { "NOT found" }
                    )
                })
            }
            "zero" => image.write_zeroes(at(0), at(1), true),
            "flush" => image.flush(),
            _ => {
                std::thread::sleep(std::time::Duration::from_millis(at(0)));
                Ok(())
            }
        };
        println!("{arg}: {result:?}");
    }
}
