//! Compressed clusters that are read in pieces.

use super::{dir, exercise, open, qemu_img, verify, OpenOptions};

/// Clusters of the image: more than are kept unpacked.
const CLUSTERS: usize = 20;
const CLUSTER: usize = 64 << 10;
/// Kept unpacked.
const KEPT: usize = 16;

#[test]
fn compressed_clusters_that_are_read_in_pieces_are_unpacked_once() {
    for kind in ["zlib", "zstd"] {
        let d = dir(&format!("pieces-{kind}"));
        let (raw, path) = (d.join("x.raw"), d.join("x.qcow2"));
        let model: Vec<u8> = (0..CLUSTERS * CLUSTER).map(|i| (i / 700) as u8 ^ (i % 7) as u8).collect();
        std::fs::write(&raw, &model).unwrap();
        let (raw, p) = (raw.to_str().unwrap(), path.to_str().unwrap());
        let option = format!("compression_type={kind}");
        assert!(qemu_img(&["convert", "-q", "-c", "-O", "qcow2", "-o", &option, raw, p]));
        let image = open(&path, &OpenOptions { read_only: true, ..OpenOptions::default() }).unwrap();
        let read = |cluster: usize, at: usize, len: usize| {
            let (mut got, from) = (vec![0; len], cluster * CLUSTER + at);
            let result = image.read_at(from as u64, &mut got);
            assert!(result.is_err() || got == model[from..from + len], "cluster {cluster} at {at}");
            result
        };
        // One that is read whole is not kept.
        for cluster in 0..CLUSTERS {
            read(cluster, 4096 * (cluster % 16), 4096).unwrap();
        }
        read(0, 0, CLUSTER).unwrap();
        // What the file holds now unpacks to nothing.
        std::fs::write(&path, [3, 0].repeat(CLUSTERS * CLUSTER / 2)).unwrap();
        for cluster in (0..CLUSTERS).rev() {
            let result = read(cluster, 512, CLUSTER / 2);
            match cluster < CLUSTERS - KEPT {
                false => result.unwrap(),
                true => assert!(result.unwrap_err().to_string().contains("is not readable")),
            }
        }
        std::fs::remove_dir_all(d).unwrap();
    }
}

#[test]
fn a_compressed_cluster_that_is_kept_is_overwritten_like_any_other() {
    let d = dir("kept");
    let (raw, path) = (d.join("x.raw"), d.join("x.qcow2"));
    let mut model: Vec<u8> = (0..CLUSTERS * CLUSTER).map(|i| (i / 300) as u8).collect();
    std::fs::write(&raw, &model).unwrap();
    assert!(qemu_img(&["convert", "-q", "-c", "-O", "qcow2", raw.to_str().unwrap(), path.to_str().unwrap()]));
    let image = open(&path, &OpenOptions::default()).unwrap();
    let mut got = vec![0; 8192];
    for cluster in 0..CLUSTERS {
        let at = cluster * CLUSTER + 8192;
        image.read_at(at as u64, &mut got).unwrap();
        assert!(got == model[at..at + 8192]);
        model[at + 1024..at + 2048].fill(cluster as u8);
        image.write_at(at as u64 + 1024, &model[at + 1024..at + 2048]).unwrap();
        image.read_at(at as u64, &mut got).unwrap();
        assert!(got == model[at..at + 8192], "cluster {cluster}");
    }
    drop(image);
    verify(&path, &model);
    exercise(&path, &mut model, 56, 100, true);
    verify(&path, &model);
    std::fs::remove_dir_all(d).unwrap();
}
