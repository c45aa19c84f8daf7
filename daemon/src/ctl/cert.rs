//! `ftctl cert`: the authority of a group of hosts, and a certificate for each. Any other authority will do as well.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, ArgMatches, Command};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

/// How long certificates are valid: ten years; hosts are few, and are taken out by a new authority.
const YEARS: i32 = 10;

/// The command line.
pub fn command() -> Command {
    let dir = || {
        Arg::new("dir").long("dir").value_name("DIR").default_value(".").help("Where the files are and go")
    };
    Command::new("cert")
        .about("Make the certificates by which hosts know each other")
        .subcommand_required(true)
        .subcommand(
            Command::new("ca")
                .about("Make the authority: ca.crt for every host, ca.key for nobody")
                .arg(dir()),
        )
        .subcommand(
            Command::new("host")
                .about("Make a host's certificate by the authority in DIR: NAME.crt and NAME.key")
                .arg(Arg::new("host").value_name("NAME").required(true).help("The host, as peers name it"))
                .arg(
                    Arg::new("other")
                        .value_name("OTHER")
                        .action(ArgAction::Append)
                        .help("More names or addresses of it"),
                )
                .arg(dir()),
        )
}

/// Run it.
pub fn run(of: &ArgMatches) -> Result<(), String> {
    let Some((what, of)) = of.subcommand() else { return Ok(()) };
    let dir = PathBuf::from(of.get_one::<String>("dir").map_or(".", String::as_str));
    match what {
        "ca" => authority(&dir),
        _ => {
            let name = of.get_one::<String>("host").map_or("", String::as_str);
            let others = of.get_many::<String>("other").into_iter().flatten().cloned();
            host(&dir, name, [name.to_owned()].into_iter().chain(others).collect())
        }
    }
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// Write a file that must not be there yet; a key is its owner's alone.
fn put(path: &Path, contents: &str, secret: bool) -> Result<(), String> {
    let mode = if secret { 0o600 } else { 0o644 };
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let put = file.and_then(|mut f| f.write_all(contents.as_bytes()));
    put.map_err(|e| format!("{}: {e}", path.display()))
}

fn valid(params: &mut CertificateParams) -> Result<(), String> {
    let now = time::OffsetDateTime::now_utc();
    // A host whose clock is a little behind is to take it too.
    params.not_before = now - time::Duration::days(1);
    params.not_after = now + time::Duration::days(365 * i64::from(YEARS));
    Ok(())
}

fn authority(dir: &Path) -> Result<(), String> {
    let key = KeyPair::generate().map_err(text)?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "ftvm hosts");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid(&mut params)?;
    let certificate = params.self_signed(&key).map_err(text)?;
    std::fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    put(&dir.join("ca.key"), &key.serialize_pem(), true)?;
    put(&dir.join("ca.crt"), &certificate.pem(), false)
}

fn host(dir: &Path, name: &str, names: Vec<String>) -> Result<(), String> {
    let read = |file: &str| {
        let path = dir.join(file);
        std::fs::read_to_string(&path).map_err(|e| format!("{}: {e} (ftctl cert ca)", path.display()))
    };
    let authority = KeyPair::from_pem(&read("ca.key")?).map_err(|e| format!("ca.key: {e}"))?;
    let issuer = Issuer::from_ca_cert_pem(&read("ca.crt")?, authority).map_err(|e| format!("ca.crt: {e}"))?;
    if rustls::pki_types::ServerName::try_from(name).is_err() || name.contains('/') {
        return Err(format!("'{name}' is no name of a host"));
    }
    let key = KeyPair::generate().map_err(text)?;
    let mut params = CertificateParams::new(names).map_err(text)?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    valid(&mut params)?;
    let certificate = params.signed_by(&key, &issuer).map_err(text)?;
    put(&dir.join(format!("{name}.key")), &key.serialize_pem(), true)?;
    put(&dir.join(format!("{name}.crt")), &certificate.pem(), false)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::cluster::tls::Identity;
    use crate::config::Tls;

    fn dir(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("ftvm-cert-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        dir
    }

    fn identity(dir: &Path, name: &str) -> Identity {
        let file = |f: String| dir.join(f);
        Identity::read(&Tls {
            ca: file("ca.crt".into()),
            certificate: file(format!("{name}.crt")),
            key: file(format!("{name}.key")),
        })
        .unwrap()
    }

    /// One end connects as `client` and expects `name`; the other one is `server`. Whether each was content.
    fn meet(client: &Identity, server: &Identity, name: &str) -> (bool, bool) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                let mut taken = server.accept(listener.accept().unwrap().0)?;
                std::io::Read::read_exact(&mut taken, &mut [0])
            });
            let mine = client.connect(stream, name).and_then(|mut s| s.write_all(b"x"));
            (mine.is_ok(), other.join().unwrap().is_ok())
        })
    }

    #[test]
    fn hosts_of_one_authority_know_each_other_and_no_others() {
        let (ours, others) = (dir("ours"), dir("others"));
        for dir in [&ours, &others] {
            authority(dir).unwrap();
            for name in ["host-a", "host-b"] {
                host(dir, name, vec![name.into(), "127.0.0.1".into()]).unwrap();
            }
        }
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &std::fs::metadata(ours.join("host-a.key")).unwrap().permissions(),
        );
        assert_eq!(mode & 0o777, 0o600);
        let (a, b, stranger) =
            (identity(&ours, "host-a"), identity(&ours, "host-b"), identity(&others, "host-a"));
        assert_eq!(meet(&a, &b, "host-b"), (true, true));
        assert!(!meet(&a, &b, "host-c").0, "another name");
        assert!(!meet(&stranger, &b, "host-b").1, "a stranger is not taken");
        assert!(!meet(&a, &stranger, "host-a").0, "a stranger is not believed");
        // Nothing is overwritten, least of all the authority.
        assert!(authority(&ours).unwrap_err().contains("exists"));
        assert!(host(&dir("nowhere"), "x", vec!["x".into()]).unwrap_err().contains("ftctl cert ca"));
        let _ = std::fs::remove_dir_all(&ours);
        let _ = std::fs::remove_dir_all(&others);
    }
}
