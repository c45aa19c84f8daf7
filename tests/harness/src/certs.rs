//! Certificates for tests, in the files that QEMU's `tls-creds-x509` and libvirt look for.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};

use crate::Result;

/// An authority that tests trust, or do not.
pub struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

impl Authority {
    pub fn new(name: &str) -> Result<Authority> {
        let key = KeyPair::generate().map_err(text)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(text)?.pem();
        let issuer = Issuer::from_ca_cert_pem(&certificate, key).map_err(text)?;
        Ok(Authority { certificate, issuer })
    }

    fn sign(&self, name: &str, names: &[&str]) -> Result<(String, String)> {
        let key = KeyPair::generate().map_err(text)?;
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let mut params = CertificateParams::new(names).map_err(text)?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "ftvm tests");
        params.distinguished_name.push(DnType::CommonName, name);
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer).map_err(text)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }

    /// Fill `dir` for a host with these names (or addresses): as a server it is all of them, as a client `O=ftvm tests,CN=name`.
    pub fn issue(&self, dir: &str, name: &str, names: &[&str]) -> Result<String> {
        let (certificate, key) = self.sign(name, names)?;
        std::fs::create_dir_all(dir).map_err(text)?;
        let put =
            |file: &str, contents: &str| std::fs::write(Path::new(dir).join(file), contents).map_err(text);
        put("ca-cert.pem", &self.certificate)?;
        for side in ["server", "client"] {
            put(&format!("{side}-cert.pem"), &certificate)?;
            put(&format!("{side}-key.pem"), &key)?;
        }
        Ok(dir.to_owned())
    }
}
