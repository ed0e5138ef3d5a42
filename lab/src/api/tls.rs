//! A certificate authority for a stand-in, and what clients need to trust it.

use std::net::IpAddr;
use std::sync::Arc;

use anyhow::Context as _;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::TlsAcceptor;

/// Names that every API server's certificate carries.
const NAMES: [&str; 5] = [
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
    "localhost",
];

/// A certificate authority.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority")
    }
}

impl Authority {
    /// A new authority with a key of its own.
    ///
    /// # Errors
    ///
    /// None that are known; the libraries' interfaces have them.
    pub fn new() -> anyhow::Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "lab-ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        let key = KeyPair::generate().context("generating the CA's key")?;
        let pem = params
            .self_signed(&key)
            .context("signing the CA's certificate")?
            .pem();
        let issuer = Issuer::new(params, key);
        Ok(Self { issuer, pem })
    }

    /// The certificate, as clients want it.
    #[must_use]
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// The server's side of TLS, for an API server at these addresses.
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    pub fn acceptor(&self, addresses: &[IpAddr]) -> anyhow::Result<TlsAcceptor> {
        let names = NAMES.map(str::to_owned).to_vec();
        let mut params = CertificateParams::new(names).context("the server's names")?;
        params
            .distinguished_name
            .push(DnType::CommonName, "kube-apiserver");
        let addresses = addresses.iter().map(|ip| SanType::IpAddress(*ip));
        params.subject_alt_names.extend(addresses);
        let key = KeyPair::generate().context("generating the server's key")?;
        let certificate = params
            .signed_by(&key, &self.issuer)
            .context("signing the server's certificate")?;

        let chain = vec![CertificateDer::from(certificate.der().to_vec())];
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}
