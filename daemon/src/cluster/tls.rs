//! Peers prove to each other who they are: both ends show a certificate of the authority that all hosts trust.

use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned};

use crate::config::Tls;
use crate::{Error, Result};

/// A connection that this side began.
pub type ClientStream = StreamOwned<ClientConnection, TcpStream>;
/// A connection that a peer began.
pub type ServerStream = StreamOwned<ServerConnection, TcpStream>;

/// This host's certificate, for both roles.
pub struct Identity {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

fn pem<T>(path: &Path, what: std::result::Result<T, rustls::pki_types::pem::Error>) -> Result<T> {
    what.map_err(|e| Error::Invalid(format!("{}: {e}", path.display())))
}

impl Identity {
    /// Read the files.
    pub fn read(files: &Tls) -> Result<Identity> {
        let mut roots = RootCertStore::empty();
        for certificate in pem(&files.ca, CertificateDer::pem_file_iter(&files.ca))? {
            let certificate = pem(&files.ca, certificate)?;
            let added = roots.add(certificate);
            added.map_err(|e| Error::Invalid(format!("{}: {e}", files.ca.display())))?;
        }
        let chain = pem(&files.certificate, CertificateDer::pem_file_iter(&files.certificate))?;
        let chain: Vec<_> = pem(&files.certificate, chain.collect())?;
        let key = pem(&files.key, PrivateKeyDer::from_pem_file(&files.key))?;
        let wrong = |e: rustls::Error| Error::Invalid(format!("{}: {e}", files.certificate.display()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let roots = Arc::new(roots);
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|e| Error::Invalid(format!("{}: {e}", files.ca.display())))?;
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(wrong)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(wrong)?;
        let client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(wrong)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(wrong)?;
        Ok(Identity { client: Arc::new(client), server: Arc::new(server) })
    }

    /// Speak to the host `name`, whose certificate must have that name.
    pub fn connect(&self, stream: TcpStream, name: &str) -> std::io::Result<ClientStream> {
        let name = ServerName::try_from(name.to_owned()).map_err(std::io::Error::other)?;
        let connection =
            ClientConnection::new(Arc::clone(&self.client), name).map_err(std::io::Error::other)?;
        let mut stream = StreamOwned::new(connection, stream);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(stream)
    }

    /// Take a peer's connection; it must have shown a certificate of the authority.
    pub fn accept(&self, stream: TcpStream) -> std::io::Result<ServerStream> {
        let connection = ServerConnection::new(Arc::clone(&self.server)).map_err(std::io::Error::other)?;
        let mut stream = StreamOwned::new(connection, stream);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(stream)
    }
}
