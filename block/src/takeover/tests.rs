use super::*;

fn setup(name: &str) -> (PathBuf, PathBuf) {
    let d = std::env::temp_dir().join(format!("ftvm-takeover-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&d);
    std::fs::create_dir_all(&d).unwrap();
    let path = d.join("vm.qcow2");
    create_overlay(&path, 4 << 20, None, None).unwrap();
    (d, path)
}

#[test]
fn a_free_image_is_opened_itself() {
    let (d, path) = setup("free");
    let image = Takeover::open(&path, &OpenOptions::default(), true).unwrap();
    image.write_at(0, &[1; 512]).unwrap();
    assert!(!image.background());
    assert!(!has_overlays(&path).unwrap());
    std::fs::remove_dir_all(d).unwrap();
}

/// The old owner's word for a bitmap is worth nothing once a new one has written, even where it comes late.
#[test]
fn a_bitmap_that_a_stalled_owner_keeps_is_not_believed() {
    let (d, path) = setup("bitmap");
    let bits = |path: &Path| {
        let look = OpenOptions { read_only: true, ..OpenOptions::default() };
        let stored = crate::open(path, &look).unwrap().stored_bitmaps().unwrap();
        stored.into_iter().map(|b| (b.name, b.bits.is_some())).collect::<Vec<_>>()
    };
    let open = || Node::open("old", &path, &OpenOptions::default(), None).unwrap();
    let old = open();
    old.add_bitmap("b", None, true, true).unwrap();
    drop(old);
    assert_eq!(bits(&path), [("b".to_owned(), true)]);
    let old = open();
    old.write_at(0, &[0xA1; 4096]).unwrap();
    let new =
        Node::named("new", Box::new(Takeover::open(&path, &OpenOptions::default(), true).unwrap())).unwrap();
    assert!(new.bitmaps().is_empty());
    new.write_at(1 << 20, &[0xB1; 4096]).unwrap();
    // It ends in order, and does not know better.
    drop(old);
    assert_eq!(bits(&path), [("b".to_owned(), true)]);
    while new.background() {}
    assert!(!has_overlays(&path).unwrap());
    drop(new);
    assert_eq!(bits(&path), [("b".to_owned(), false)]);
    std::fs::remove_dir_all(d).unwrap();
}

/// An image that no overlay lies on keeps a machine's state as others do.
#[test]
fn a_free_image_keeps_a_machines_state() {
    let (d, path) = setup("state");
    let image = Takeover::open(&path, &OpenOptions::default(), false).unwrap();
    image.write_vm_state(0, &[7; 65536]).unwrap();
    let mut snapshot = Snapshot::new("s", 0);
    snapshot.vm_state_size = 65536;
    let made = image.snapshot(&SnapshotChange::Create(snapshot)).unwrap();
    image.drop_vm_state().unwrap();
    let mut buf = [0; 65536];
    image.read_vm_state(&made.id, 0, &mut buf).unwrap();
    assert!(buf.iter().all(|b| *b == 7));
    drop(image);
    std::fs::remove_dir_all(d).unwrap();
}

#[test]
fn a_late_write_of_a_stalled_owner_is_hidden_and_merged_away() {
    for raw in [false, true] {
        let (d, mut path) = setup(if raw { "late-raw" } else { "late" });
        if raw {
            path = d.join("vm.raw");
            std::fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
        }
        let old = crate::open(&path, &OpenOptions::default()).unwrap();
        old.write_at(0, &[0xA1; 4096]).unwrap();
        old.write_at(1 << 20, &[0xA2; 4096]).unwrap();
        old.flush().unwrap();
        assert!(matches!(
            Takeover::open(&path, &OpenOptions::default(), false),
            Err(BlockError::Locked { .. })
        ));
        let new = Takeover::open(&path, &OpenOptions::default(), true).unwrap();
        assert!(has_overlays(&path).unwrap());
        // The request that was in flight is reissued, and overwritten by the guest.
        new.write_at(0, &[0xB1; 4096]).unwrap();
        new.write_at(0, &[0xB2; 4096]).unwrap();
        new.flush().unwrap();
        assert!(new.background(), "waits for the old owner");
        // The old owner wakes up, and its write lands.
        old.write_at(0, &[0xA1; 4096]).unwrap();
        old.flush().unwrap();
        let mut buf = [0u8; 4096];
        new.read_at(0, &mut buf).unwrap();
        assert_eq!(buf, [0xB2; 4096]);
        drop(old);
        let mut n = 0u8;
        while new.background() {
            // Work goes on while merging.
            n += 1;
            new.write_at(2 << 20, &[n; 512]).unwrap();
            assert!(n < 100);
        }
        assert!(!has_overlays(&path).unwrap());
        for (at, want) in [(0u64, 0xB2u8), (1 << 20, 0xA2), (2 << 20, n)] {
            new.read_at(at, &mut buf[..512]).unwrap();
            assert_eq!(buf[..512], [want; 512], "at {at}");
        }
        drop(new);
        let again = crate::open(&path, &OpenOptions::default()).unwrap();
        again.read_at(0, &mut buf).unwrap();
        assert_eq!(buf, [0xB2; 4096]);
        std::fs::remove_dir_all(d).unwrap();
    }
}

#[test]
fn an_overlay_that_was_left_is_found_and_merged_at_the_next_opening() {
    let (d, path) = setup("left");
    let old = crate::open(&path, &OpenOptions::default()).unwrap();
    let new = Takeover::open(&path, &OpenOptions::default(), true).unwrap();
    new.write_at(4096, &[7; 4096]).unwrap();
    new.flush().unwrap();
    drop(new);
    drop(old);
    let image = Takeover::open(&path, &OpenOptions::default(), false).unwrap();
    let mut buf = [0u8; 4096];
    image.read_at(4096, &mut buf).unwrap();
    assert_eq!(buf, [7; 4096]);
    while image.background() {}
    assert!(!has_overlays(&path).unwrap());
    image.read_at(4096, &mut buf).unwrap();
    assert_eq!(buf, [7; 4096]);
    std::fs::remove_dir_all(d).unwrap();
}
