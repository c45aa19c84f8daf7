//! What the README and the manual pages list is what exists.

fn read(path: &str) -> String {
    let path = format!("{}/{path}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

#[test]
fn every_member_of_query_ft_is_documented() {
    let readme = read("README.md");
    let status = serde_json::to_value(ftvm::runtime::control::FtStatus::default()).unwrap();
    for member in status.as_object().unwrap().keys() {
        assert!(readme.contains(&format!("\"{member}\"")), "README.md lacks {member}");
    }
}

#[test]
fn the_example_of_query_ft_is_json_and_paths_exist() {
    let readme = read("README.md");
    let (_, rest) = readme.split_once("```json\n").unwrap();
    let (example, _) = rest.split_once("```").unwrap();
    let values: Result<Vec<serde_json::Value>, _> =
        serde_json::Deserializer::from_str(example).into_iter().collect();
    assert_eq!(values.unwrap().len(), 2);
    let (_, layout) = readme.split_once("## The repository").unwrap();
    for line in layout.lines().filter(|l| l.starts_with("| `")) {
        for path in line.split('|').nth(1).unwrap().split('`').skip(1).step_by(2) {
            read_dir_or_file(path);
        }
    }
}

fn read_dir_or_file(path: &str) {
    let full = format!("{}/{path}", env!("CARGO_MANIFEST_DIR"));
    assert!(std::path::Path::new(&full).exists(), "README.md names {path}, which does not exist");
}

#[test]
fn the_protocols_constants_are_those_of_the_page() {
    let page = read("man/ftvm-ft.7").replace("\\-", "-");
    let magic = String::from_utf8_lossy(ftvm::lockstep::wire::MAGIC);
    assert!(page.contains(magic.as_ref()));
    assert!(page.contains(&format!("{} MiB", ftvm::lockstep::wire::MAX_FRAME >> 20)));
    assert!(page.contains(&format!("({})", ftvm::cli::ft::DEFAULT_PORT)));
    assert!(page.contains(&format!("{} MiB of log", ftvm::lockstep::primary::LOG_BUFFER >> 20)));
}
