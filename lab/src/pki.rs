//! Certificates and keys of a lab's API server, made fresh for each lab and of no use outside it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};

/// The files that the parts of a control plane are pointed at.
#[derive(Clone, Debug)]
pub struct Pki {
    /// The authority's certificate, which clients are given.
    pub ca: PathBuf,
    /// The API server's certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The key that signs service accounts' tokens (ES256).
    pub service_account: PathBuf,
    /// Its public half, which verifies them.
    pub service_account_public: PathBuf,
}

impl Pki {
    /// Makes all files in `directory`; the server's certificate is good for `names`, which are
    /// host names or addresses.
    ///
    /// # Errors
    ///
    /// When a name is not one, or the directory cannot be written.
    pub fn create(directory: &Path, names: &[&str]) -> anyhow::Result<Self> {
        fs::create_dir_all(directory)?;
        let mut authority = CertificateParams::new(Vec::new())?;
        authority
            .distinguished_name
            .push(DnType::CommonName, "lab-ca");
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;

        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut server = CertificateParams::new(names)?;
        server
            .distinguished_name
            .push(DnType::CommonName, "kube-apiserver");
        server.use_authority_key_identifier_extension = true;
        server.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let server_key = KeyPair::generate()?;
        let server = server.signed_by(&server_key, &authority)?;

        let signer = KeyPair::generate()?;

        let write = |name: &str, text: String| -> anyhow::Result<PathBuf> {
            let path = directory.join(name);
            fs::write(&path, text).with_context(|| path.display().to_string())?;
            Ok(path)
        };
        Ok(Self {
            ca: write("ca.crt", authority.as_ref().pem())?,
            certificate: write("apiserver.crt", server.pem())?,
            key: write("apiserver.key", server_key.serialize_pem())?,
            service_account: write("sa.key", signer.serialize_pem())?,
            service_account_public: write("sa.pub", signer.public_key_pem())?,
        })
    }
}
