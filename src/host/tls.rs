//! TLS with the certificates that `tls-creds-x509` objects name, as QEMU has them: the files in a directory, and who must show a
//! certificate. What is said on a connection goes through [`Reader`] and [`Writer`], which are for a thread each.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, Connection, DigitallySignedStruct, RootCertStore,
    ServerConfig, ServerConnection, SignatureScheme,
};

/// A peer that is silent for so long while the two make their acquaintance is let go.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(20);

/// The properties of a `tls-creds-x509` object.
#[derive(Clone, Copy, Debug, Default)]
pub struct X509Properties<'a> {
    pub dir: Option<&'a str>,
    /// `client` (or nothing), `server`
    pub endpoint: Option<&'a str>,
    /// As a server: clients must show a certificate; as a client: the server's must be good. (On, if nothing is said.)
    pub verify_peer: Option<bool>,
}

enum Config {
    Client(Arc<ClientConfig>),
    Server(Arc<ServerConfig>),
}

/// The certificates of one side.
pub struct Credentials(Config);

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.is_server() { "Credentials(server)" } else { "Credentials(client)" })
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// A file of the directory; one that is `needed` must be there. The errors are QEMU's.
fn file(dir: &Path, name: &str, needed: bool) -> Result<Option<PathBuf>, String> {
    let path = dir.join(name);
    match std::fs::File::open(&path) {
        Ok(_) => Ok(Some(path)),
        Err(e) if e.kind() == io::ErrorKind::NotFound && !needed => Ok(None),
        Err(e) => Err(format!("Unable to access credentials {}: {}", path.display(), plain(&e))),
    }
}

/// The host's words for an error, without its number.
fn plain(e: &io::Error) -> String {
    e.to_string().split(" (os error").next().unwrap_or_default().to_owned()
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let wrong = |e| format!("Unable to load certificates from {}: {e}", path.display());
    let list: Vec<_> =
        CertificateDer::pem_file_iter(path).map_err(wrong)?.collect::<Result<_, _>>().map_err(wrong)?;
    match list.is_empty() {
        true => Err(format!("Unable to load certificates from {}: there is none", path.display())),
        false => Ok(list),
    }
}

/// A side's own certificate and key.
type Own = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn own(certificate: &Path, key: &Path) -> Result<Own, String> {
    let chain = certificates(certificate)?;
    let key = PrivateKeyDer::from_pem_file(key)
        .map_err(|e| format!("Unable to load the private key {}: {e}", key.display()))?;
    Ok((chain, key))
}

impl Credentials {
    /// Read the files.
    pub fn read(properties: &X509Properties) -> Result<Credentials, String> {
        let dir = Path::new(properties.dir.ok_or("Missing 'dir' property value")?);
        let server = match properties.endpoint {
            None | Some("client") => false,
            Some("server") => true,
            Some(other) => return Err(format!("Parameter 'endpoint' does not accept value '{other}'")),
        };
        let verify = properties.verify_peer.unwrap_or(true);
        let ca = file(dir, "ca-cert.pem", true)?.unwrap_or_default();
        let revoked = file(dir, "ca-crl.pem", false)?;
        let side = if server { "server" } else { "client" };
        let certificate = file(dir, &format!("{side}-cert.pem"), server)?;
        let key = file(dir, &format!("{side}-key.pem"), server)?;
        let mut roots = RootCertStore::empty();
        for root in certificates(&ca)? {
            roots.add(root).map_err(|e| format!("{}: {e}", ca.display()))?;
        }
        let roots = Arc::new(roots);
        let revoked = match &revoked {
            None => Vec::new(),
            Some(path) => {
                let wrong = |e| format!("Unable to load the revocations {}: {e}", path.display());
                let list = CertificateRevocationListDer::pem_file_iter(path).map_err(wrong)?;
                list.collect::<Result<Vec<_>, _>>().map_err(wrong)?
            }
        };
        let own = match (&certificate, &key) {
            (Some(certificate), Some(key)) => Some(own(certificate, key)?),
            _ => None,
        };
        let wrong = |e: &dyn std::fmt::Display| format!("the certificates in {}: {e}", dir.display());
        let config = match (server, own) {
            (true, Some((chain, key))) => {
                let builder = ServerConfig::builder_with_provider(provider())
                    .with_safe_default_protocol_versions()
                    .map_err(|e| wrong(&e))?;
                let builder = match verify {
                    true => builder.with_client_cert_verifier(
                        WebPkiClientVerifier::builder_with_provider(roots, provider())
                            .with_crls(revoked)
                            .allow_unknown_revocation_status()
                            .build()
                            .map_err(|e| wrong(&e))?,
                    ),
                    false => builder.with_no_client_auth(),
                };
                let mut config = builder.with_single_cert(chain, key).map_err(|e| wrong(&e))?;
                // A connection is made once, and nobody comes back to it.
                config.send_tls13_tickets = 0;
                Config::Server(Arc::new(config))
            }
            (true, None) => return Err(wrong(&"a server needs a certificate and its key")),
            (false, own) => {
                let builder = ClientConfig::builder_with_provider(provider())
                    .with_safe_default_protocol_versions()
                    .map_err(|e| wrong(&e))?;
                let builder = match verify {
                    true => builder.with_webpki_verifier(
                        WebPkiServerVerifier::builder_with_provider(roots, provider())
                            .with_crls(revoked)
                            .allow_unknown_revocation_status()
                            .build()
                            .map_err(|e| wrong(&e))?,
                    ),
                    false => {
                        builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody(provider())))
                    }
                };
                let config = match own {
                    Some((chain, key)) => builder.with_client_auth_cert(chain, key).map_err(|e| wrong(&e))?,
                    None => builder.with_no_client_auth(),
                };
                Config::Client(Arc::new(config))
            }
        };
        Ok(Credentials(config))
    }

    /// Whether they are a server's.
    pub fn is_server(&self) -> bool {
        matches!(self.0, Config::Server(_))
    }

    /// Begin to speak TLS to the server `host`, whose certificate must have that name.
    pub fn connect(&self, socket: UnixStream, host: &str) -> Result<Duplex, String> {
        let Config::Client(config) = &self.0 else {
            return Err("Expected TLS credentials for a client endpoint".into());
        };
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| format!("'{host}' is no name of a host that a certificate could have"))?;
        let connection = ClientConnection::new(Arc::clone(config), name).map_err(|e| e.to_string())?;
        Duplex::shake_hands(connection.into(), socket).map_err(|e| explain(&e, host))
    }

    /// Speak TLS to a client; `identity`: the distinguished name that its certificate must have.
    pub fn accept(&self, socket: UnixStream, identity: Option<&str>) -> Result<Duplex, String> {
        let Config::Server(config) = &self.0 else {
            return Err("Expected TLS credentials for a server endpoint".into());
        };
        let connection = ServerConnection::new(Arc::clone(config)).map_err(|e| e.to_string())?;
        let duplex = Duplex::shake_hands(connection.into(), socket).map_err(|e| explain(&e, ""))?;
        if let Some(identity) = identity {
            let is = duplex.peer().unwrap_or_default();
            if is != identity {
                return Err(format!("TLS x509 authz check for {is} is denied"));
            }
        }
        Ok(duplex)
    }
}

/// A failed handshake in QEMU's words, as far as it has words for it.
fn explain(e: &io::Error, host: &str) -> String {
    let inner = e.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    let text = match inner {
        Some(rustls::Error::InvalidCertificate(why)) => match why {
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                return format!("Certificate does not match the hostname {host}")
            }
            CertificateError::UnknownIssuer => "The certificate hasn't got a known issuer",
            CertificateError::Revoked => "The certificate has been revoked",
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "The certificate has expired"
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "The certificate is not yet activated"
            }
            other => return format!("The certificate is not trusted: {other}"),
        },
        Some(other) => return format!("TLS handshake failed: {other}"),
        None if e.kind() == io::ErrorKind::UnexpectedEof => {
            return "TLS handshake failed: the peer hung up".into()
        }
        None => return format!("TLS handshake failed: {}", plain(e)),
    };
    text.to_owned()
}

/// A client with `verify-peer=no` takes every server.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// What both directions of a connection share. Whoever writes to the socket holds `order` alone meanwhile, never
/// `connection`: so a peer that does not read stops the writer but not the reader, and two sides that both send much do not wait
/// for one another.
struct Both {
    order: Mutex<UnixStream>,
    connection: Mutex<Connection>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection whose ends know each other.
pub struct Duplex {
    both: Arc<Both>,
    socket: UnixStream,
}

impl Duplex {
    fn shake_hands(mut connection: Connection, mut socket: UnixStream) -> io::Result<Duplex> {
        socket.set_read_timeout(Some(HANDSHAKE_WITHIN))?;
        socket.set_write_timeout(Some(HANDSHAKE_WITHIN))?;
        while connection.is_handshaking() {
            connection.complete_io(&mut socket)?;
        }
        while connection.wants_write() {
            connection.write_tls(&mut socket)?;
        }
        socket.set_read_timeout(None)?;
        socket.set_write_timeout(None)?;
        let both =
            Arc::new(Both { order: Mutex::new(socket.try_clone()?), connection: Mutex::new(connection) });
        Ok(Duplex { both, socket })
    }

    /// The distinguished name of the peer's certificate, as QEMU writes it.
    fn peer(&self) -> Option<String> {
        let connection = lock(&self.both.connection);
        let certificate = connection.peer_certificates()?.first()?.clone();
        let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).ok()?;
        // Its parts are in the certificate's order, as QEMU has them.
        Some(parsed.subject().to_string().replace(", ", ","))
    }

    /// The two directions.
    pub fn split(self) -> (Reader, Writer) {
        let reader =
            Reader { both: Arc::clone(&self.both), socket: self.socket, raw: vec![0; 1 << 16], rest: 0..0 };
        (reader, Writer { both: self.both })
    }
}

/// What the peer says.
pub struct Reader {
    both: Arc<Both>,
    socket: UnixStream,
    raw: Vec<u8>,
    /// What of `raw` was not decrypted yet.
    rest: std::ops::Range<usize>,
}

impl Read for Reader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            {
                let mut connection = lock(&self.both.connection);
                match connection.reader().read(buf) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    done => return done,
                }
                if !self.rest.is_empty() {
                    let mut rest = &self.raw[self.rest.clone()];
                    self.rest.start += connection.read_tls(&mut rest)?;
                    connection.process_new_packets().map_err(io::Error::other)?;
                    continue;
                }
            }
            let n = match self.socket.read(&mut self.raw) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                n => n?,
            };
            self.rest = 0..n;
        }
    }
}

/// What this side says. Dropped, it tells the peer that there is no more.
pub struct Writer {
    both: Arc<Both>,
}

impl Writer {
    fn send(&self, work: impl FnOnce(&mut Connection) -> io::Result<usize>) -> io::Result<usize> {
        // What is encrypted first must be sent first.
        let mut socket = lock(&self.both.order);
        let mut out = Vec::new();
        let n = {
            let mut connection = lock(&self.both.connection);
            let n = work(&mut connection)?;
            while connection.wants_write() {
                connection.write_tls(&mut out)?;
            }
            n
        };
        socket.write_all(&out)?;
        Ok(n)
    }
}

impl Write for Writer {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.send(|connection| connection.writer().write(buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send(|_| Ok(0)).map(drop)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.send(|connection| {
            connection.send_close_notify();
            Ok(0)
        });
    }
}

/// What `-object` and `object-add` made.
#[derive(Clone)]
enum Kept {
    Credentials(Arc<Credentials>),
    /// `authz-simple`: who may come.
    Identity(String),
}

static KEPT: Mutex<BTreeMap<String, Kept>> = Mutex::new(BTreeMap::new());

/// Keep credentials under the name of their object.
pub fn keep(id: &str, credentials: Credentials) {
    lock(&KEPT).insert(id.to_owned(), Kept::Credentials(Arc::new(credentials)));
}

/// Keep the one identity that an `authz-simple` object lets in.
pub fn keep_identity(id: &str, identity: &str) {
    lock(&KEPT).insert(id.to_owned(), Kept::Identity(identity.to_owned()));
}

/// The object is gone.
pub fn forget(id: &str) {
    lock(&KEPT).remove(id);
}

/// The credentials of an object, which must be those of this kind of endpoint. The errors are QEMU's.
pub fn find(id: &str, server: bool) -> Result<Arc<Credentials>, String> {
    match lock(&KEPT).get(id) {
        None => Err(format!("No TLS credentials with id '{id}'")),
        Some(Kept::Identity(_)) => Err(format!("Object with id '{id}' is not TLS credentials")),
        Some(Kept::Credentials(c)) if c.is_server() != server => {
            let kind = if server { "server" } else { "client" };
            Err(format!("Expected TLS credentials for a {kind} endpoint"))
        }
        Some(Kept::Credentials(c)) => Ok(Arc::clone(c)),
    }
}

/// Whom an `authz-simple` object lets in.
pub fn find_identity(id: &str) -> Result<String, String> {
    match lock(&KEPT).get(id) {
        Some(Kept::Identity(identity)) => Ok(identity.clone()),
        Some(Kept::Credentials(_)) => Err(format!("Object '{id}' is not an authorization object")),
        None => Err(format!("Failed to find authz object '{id}'")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ftvm_harness::certs::Authority;
    use ftvm_harness::Scratch;

    fn creds(dir: &str, endpoint: &str, verify: bool) -> Credentials {
        let properties =
            X509Properties { dir: Some(dir), endpoint: Some(endpoint), verify_peer: Some(verify) };
        Credentials::read(&properties).unwrap()
    }

    /// Both sides' opinions of each other.
    fn meet(
        server: Credentials,
        identity: Option<&'static str>,
        client: &Credentials,
        host: &str,
    ) -> (String, String) {
        let (a, b) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || {
            let duplex = server.accept(b, identity)?;
            let (mut input, mut output) = duplex.split();
            let mut text = [0; 5];
            input.read_exact(&mut text).map_err(|e| e.to_string())?;
            output.write_all(&text).map_err(|e| e.to_string())
        });
        let said = client.connect(a, host).and_then(|duplex| {
            let (mut input, mut output) = duplex.split();
            output.write_all(b"hello").map_err(|e| e.to_string())?;
            let mut text = Vec::new();
            input.read_to_end(&mut text).map_err(|e| e.to_string())?;
            assert_eq!(text, b"hello");
            Ok(())
        });
        let text = |r: Result<(), String>| r.err().unwrap_or_else(|| "well".into());
        (text(server.join().unwrap()), text(said))
    }

    #[test]
    fn sides_take_only_whom_they_should() {
        let scratch = Scratch::new("tls").unwrap();
        let (ours, theirs) = (Authority::new("ours").unwrap(), Authority::new("theirs").unwrap());
        let good = ours.issue(&scratch.path("good"), "host.example", &["host.example", "127.0.0.1"]).unwrap();
        let other = theirs.issue(&scratch.path("other"), "host.example", &["host.example"]).unwrap();
        let client = creds(&good, "client", true);
        let server = || creds(&good, "server", true);
        let well = ("well".to_owned(), "well".to_owned());
        assert_eq!(meet(server(), None, &client, "host.example"), well);
        assert_eq!(meet(server(), Some("O=ftvm tests,CN=host.example"), &client, "127.0.0.1"), well);
        let (said, _) = meet(server(), Some("CN=other"), &client, "127.0.0.1");
        assert_eq!(said, "TLS x509 authz check for O=ftvm tests,CN=host.example is denied");
        let (_, said) = meet(server(), None, &client, "else.example");
        assert_eq!(said, "Certificate does not match the hostname else.example");
        let (_, said) = meet(creds(&other, "server", false), None, &client, "host.example");
        assert_eq!(said, "The certificate hasn't got a known issuer");
        // One that does not look takes everybody, but shows what it has.
        let (said, _) = meet(server(), None, &creds(&other, "client", false), "host.example");
        assert_eq!(said, "The certificate hasn't got a known issuer");
        assert_eq!(meet(creds(&good, "server", false), None, &creds(&other, "client", false), "x"), well);
        // A client needs no certificate of its own, and a server that wants one says so.
        std::fs::remove_file(scratch.path("good/client-cert.pem")).unwrap();
        let bare = creds(&good, "client", true);
        assert_eq!(meet(creds(&good, "server", false), None, &bare, "host.example"), well);
        let (said, _) = meet(server(), None, &bare, "host.example");
        assert!(said.starts_with("TLS handshake failed: "), "{said}");
    }

    #[test]
    fn two_that_both_send_much_do_not_wait_for_each_other() {
        let scratch = Scratch::new("tls-both").unwrap();
        let dir =
            Authority::new("a").unwrap().issue(&scratch.path("d"), "h.example", &["h.example"]).unwrap();
        let (a, b) = UnixStream::pair().unwrap();
        let server = creds(&dir, "server", true);
        let there = std::thread::spawn(move || server.accept(b, None).unwrap());
        let here = creds(&dir, "client", true).connect(a, "h.example").unwrap();
        let threads: Vec<_> = [here, there.join().unwrap()]
            .into_iter()
            .flat_map(|duplex| {
                let (mut input, mut output) = duplex.split();
                let sends = std::thread::spawn(move || {
                    for n in 0..200u32 {
                        output.write_all(&vec![n as u8; 50_000]).unwrap();
                    }
                });
                let takes = std::thread::spawn(move || {
                    // The other side sends all of it before this one begins to read.
                    std::thread::sleep(Duration::from_millis(50));
                    let mut all = Vec::new();
                    input.read_to_end(&mut all).unwrap();
                    assert_eq!(all.len(), 10_000_000);
                    assert!(all.chunks(50_000).enumerate().all(|(n, c)| c.iter().all(|b| *b == n as u8)));
                });
                [sends, takes]
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
    }

    #[test]
    fn what_is_not_there_is_named() {
        let read = |dir, endpoint| {
            Credentials::read(&X509Properties { dir, endpoint, verify_peer: None }).unwrap_err()
        };
        assert_eq!(read(None, None), "Missing 'dir' property value");
        assert_eq!(
            read(Some("/nonexistent"), None),
            "Unable to access credentials /nonexistent/ca-cert.pem: No such file or directory"
        );
        assert!(read(Some("/"), Some("middle")).contains("'middle'"));
        assert_eq!(find("nobody", false).unwrap_err(), "No TLS credentials with id 'nobody'");
        keep_identity("somebody", "CN=x");
        assert_eq!(find("somebody", true).unwrap_err(), "Object with id 'somebody' is not TLS credentials");
        assert_eq!(find_identity("somebody").unwrap(), "CN=x");
        forget("somebody");
        assert_eq!(find_identity("somebody").unwrap_err(), "Failed to find authz object 'somebody'");
    }
}
