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

/// All pages.
fn pages() -> Vec<std::path::PathBuf> {
    let dir = format!("{}/man", env!("CARGO_MANIFEST_DIR"));
    let mut pages: Vec<_> = std::fs::read_dir(dir).unwrap().flatten().map(|f| f.path()).collect();
    pages.sort();
    pages
}

#[test]
fn every_page_is_rendered_without_a_warning() {
    for page in pages() {
        let out = std::process::Command::new("man")
            .args(["--warnings", "-E", "UTF-8", "-Tutf8", "-l"])
            .arg(&page)
            .env("MANWIDTH", "80")
            .env("LC_ALL", "C.UTF-8")
            .output();
        let Ok(out) = out else {
            println!("skipped: man is not installed");
            return;
        };
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success() && said.is_empty(), "{}: {said}", page.display());
        assert!(out.stdout.len() > 500, "{} is nearly empty", page.display());
    }
}

/// The text of a page, without what is troff's.
fn text(page: &str) -> String {
    read(page).replace("\\-", "-").replace("\\:", "").replace("\\(aq", "'").replace("\\&", "")
}

#[test]
fn every_option_command_and_key_is_in_its_page() {
    let page = text("man/ftvm.1");
    let heads: Vec<&str> = page
        .lines()
        .filter_map(|l| l.strip_prefix(".B -").or_else(|| l.strip_prefix(".BI -"))?.split_whitespace().next())
        .collect();
    for (name, ..) in ftvm::cli::options::OPTIONS {
        assert!(heads.contains(name), "ftvm(1) lacks -{name}");
    }
    let page = text("man/ftvm-qmp.7");
    let schema = ftvm_qmp::schema::Schema::get();
    for [name, ..] in ftvm_qmp::manual::commands(schema) {
        assert!(page.contains(&format!("\n.B {name}\n")), "ftvm-qmp(7) lacks {name}");
    }
}

#[test]
fn every_member_on_the_bus_is_in_its_page() {
    let page = text("man/org.ftvm.5");
    let dir = format!("{}/packaging/dbus", env!("CARGO_MANIFEST_DIR"));
    let mut members = 0;
    for file in
        std::fs::read_dir(dir).unwrap().flatten().filter(|f| f.path().extension().is_some_and(|e| e == "xml"))
    {
        let xml = std::fs::read_to_string(file.path()).unwrap();
        let comments = xml.split("<!--").skip(1).filter_map(|c| c.split("-->").next());
        assert!(!comments.into_iter().any(|c| c.contains("--")), "{:?} is no XML", file.path());
        for line in xml.lines().map(str::trim) {
            for kind in ["method", "signal", "property"] {
                let Some(rest) = line.strip_prefix(&format!("<{kind} name=\"")) else { continue };
                let name = rest.split('"').next().unwrap();
                assert!(
                    page.contains(&format!("\n{kind} \\fB{name}\\fR")),
                    "org.ftvm(5) lacks {kind} {name}"
                );
                members += 1;
            }
        }
    }
    assert!(members > 40, "{members} members");
}

/// The commands that the README gives for ftctl are ftctl's.
#[test]
fn the_commands_of_the_readme_are_in_the_page() {
    let page = text("man/ftctl.1");
    let readme = read("README.md");
    let commands = readme.lines().filter_map(|l| l.trim().strip_prefix("ftctl "));
    let mut seen = 0;
    for line in commands {
        let verb = line.split_whitespace().next().unwrap();
        assert!(page.contains(&format!("\n.SS {verb}\n")), "ftctl(1) lacks {verb}");
        seen += 1;
    }
    assert!(seen > 8);
}
